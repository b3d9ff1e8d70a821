//! The thread that writes the journal: one batch at a time, each in one segment, synced before the ring is released.

use super::chunk::{buffer, total_bytes};
use super::index::ChunkRef;
use super::segment::{NoSegment, Segment};
use super::{Inner, Journal, Taken, Tape, lock};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use varve_common::format::BLOCK_BYTES;
use varve_common::format::journal::{
    CHUNK_BYTES_MAX, CHUNK_HEADER_BYTES, CHUNK_MAGIC, ChunkHeader, End, FLAG_FIRST, JournalSegmentHeader,
};
use varve_common::state::GapReason;
use varve_io::{AlignedBuf, IoError, IoQueue};

/// Chunks in one batch: with their padding this is the memory that a group's spilling takes.
const BATCH_CHUNKS: usize = 2;
/// Parts of a batch under way at once: a chunk is a little longer than one part.
const QUEUE_DEPTH: u32 = 4;
/// While there is no room, this long is waited for a segment to be freed before the disk is asked again.
const FULL_WAIT: Duration = Duration::from_millis(500);

/// What is to be done next.
enum Job {
    Stop,
    /// Everything was acknowledged or forgotten.
    Clean,
    /// Segments before this one are not needed any more.
    Recycle(u64),
    /// Bytes of the ring before this position.
    Spill(u64),
    /// Say that a gap began inside what was written already.
    Note,
}

/// Position, end, time of the first write, for each buffer.
type Batch = Vec<(u64, u64, Option<u64>)>;

struct Place {
    segment: Arc<Segment>,
    header: JournalSegmentHeader,
    offset: u64,
}

struct Spiller<'a> {
    journal: &'a Journal,
    tape: &'a dyn Tape,
    generation: u64,
    /// Where the next chunk goes; `None`: into a new segment.
    place: Option<Place>,
    /// Oldest segment that was not recycled yet.
    oldest: u64,
    /// The gap that the newest chunk tells of.
    told: Option<(GapReason, u64)>,
    /// Whether there may be segments in use.
    dirty: bool,
    queue: Option<IoQueue>,
    buffers: Vec<AlignedBuf>,
    full_until: Option<std::time::Instant>,
}

/// Works until it is told to stop or the disk fails; then the journal says so.
pub fn run(journal: &Journal, tape: &dyn Tape) {
    struct Gone<'a>(&'a Journal);
    impl Drop for Gone<'_> {
        fn drop(&mut self) {
            lock(&self.0.inner).spilling = false;
            if std::thread::panicking() {
                self.0.give_up("its thread failed");
            }
        }
    }
    let _gone = Gone(journal);
    let (generation, dirty) = {
        let inner = lock(&journal.inner);
        (inner.generation, inner.end.is_some() || inner.ended_at.is_some())
    };
    let mut spiller = Spiller {
        journal,
        tape,
        generation,
        place: None,
        oldest: 0,
        told: None,
        dirty,
        queue: None,
        buffers: Vec::new(),
        full_until: None,
    };
    loop {
        let done = match spiller.next() {
            Job::Stop => return,
            Job::Clean => spiller.clean(),
            Job::Recycle(sequence) => {
                spiller.oldest = sequence;
                if let Some(segments) = lock(&journal.segments).as_mut() {
                    segments.recycle_before(sequence);
                }
                spiller.full_until = None;
                Ok(())
            }
            Job::Spill(until) => spiller.spill(until),
            Job::Note => spiller.note(),
        };
        match done {
            Ok(()) => lock(&journal.inner).full = None,
            Err(NoSegment::Full(why)) => spiller.full(why),
            Err(NoSegment::Failed(error)) => {
                // What was written in this batch is not known; everything before it is as good as it was.
                journal.give_up(&error.chain());
            }
        }
    }
}

impl Spiller<'_> {
    /// Waits for something to do.
    fn next(&mut self) -> Job {
        let mut inner = lock(&self.journal.inner);
        loop {
            if inner.stopping {
                return Job::Stop;
            }
            let empty = inner.index.range().is_none();
            let usable = inner.failed.is_none() && inner.detached.is_none() && (!inner.sealed || empty);
            let waiting = self.full_until.is_some_and(|until| std::time::Instant::now() < until);
            let over = empty && (inner.sealed || !self.wants(&inner)) || self.generation != inner.generation;
            if usable && self.dirty && over {
                return Job::Clean;
            }
            if let Some(oldest) = inner.index.oldest_segment().filter(|oldest| *oldest > self.oldest) {
                return Job::Recycle(oldest);
            }
            if usable && !waiting {
                if self.wants(&inner) {
                    return Job::Spill(inner.offered);
                }
                let inside = |(_, position)| inner.end.is_some_and(|end| position < end.position);
                if inner.gap != self.told && inner.gap.is_some_and(inside) && !empty {
                    return Job::Note;
                }
            }
            if !inner.active && inner.flush.is_none() {
                // Memory is for outages.
                (self.queue, self.buffers) = (None, Vec::new());
            }
            let wait = &self.journal.wake;
            inner = if waiting {
                wait.wait_timeout(inner, FULL_WAIT).unwrap_or_else(PoisonError::into_inner).0
            } else {
                wait.wait(inner).unwrap_or_else(PoisonError::into_inner)
            };
        }
    }

    fn wants(&self, inner: &Inner) -> bool {
        let (consumer, _, capacity) = self.tape.extent();
        // Where the ring was acknowledged beyond the journal's end, the ring's begin is the place.
        let from = inner.ended().map_or(consumer, |end| end.max(consumer));
        // Small chunks are wasted space and syncs.
        let enough = (CHUNK_BYTES_MAX as u64).min(capacity / 32);
        inner.offered > from && (inner.active && inner.offered - from >= enough || inner.flush.is_some())
    }

    fn full(&mut self, why: String) {
        let mut inner = lock(&self.journal.inner);
        if inner.full.is_none() {
            tracing::warn!(group = %self.journal.group, "the journal takes no more: {why}");
        }
        inner.full = Some(why);
        self.full_until = Some(std::time::Instant::now() + FULL_WAIT);
        self.journal.progress.notify_all();
    }

    /// The run is over.
    fn clean(&mut self) -> Result<(), NoSegment> {
        {
            let mut inner = lock(&self.journal.inner);
            self.generation = inner.generation;
            if inner.index.range().is_some() {
                return Ok(());
            }
            inner.ended_at = inner.ended().or(inner.ended_at);
            (inner.end, inner.sealed) = (None, false);
        }
        (self.place, self.told, self.oldest, self.dirty) = (None, None, 0, false);
        if let Some(segments) = lock(&self.journal.segments).as_mut() {
            segments.recycle_all()?;
        }
        lock(&self.journal.inner).ended_at = None;
        self.tape.settle();
        Ok(())
    }

    /// Spills a batch, until the ring is as empty as is wanted.
    fn spill(&mut self, until: u64) -> Result<(), NoSegment> {
        let before = {
            let inner = lock(&self.journal.inner);
            inner.end.filter(|_| self.generation == inner.generation && inner.index.range().is_some())
        };
        let (consumer, _, _) = self.tape.extent();
        let before = before.filter(|before| before.position >= consumer);
        if before.is_none() && self.dirty {
            // All that is here was acknowledged: nothing here is wanted, and the next chunk is a first one.
            self.clean()?;
        }
        // An acknowledgement came between: the next look begins where the ring begins now.
        let Some(taken) = self.fill(before, until)? else { return Ok(()) };
        if taken.is_empty() {
            let mut inner = lock(&self.journal.inner);
            (inner.active, inner.flush) = (false, None);
            return Ok(());
        }
        self.write(before, &taken)?;
        let (consumer, producer, capacity) = self.tape.extent();
        let mut inner = lock(&self.journal.inner);
        if producer - consumer <= if inner.away { capacity / 16 } else { capacity / 4 } {
            inner.active = false;
        }
        if inner.flush.is_some_and(|flush| inner.ended().is_some_and(|end| end >= flush)) {
            inner.flush = None;
        }
        self.journal.progress.notify_all();
        Ok(())
    }

    /// Takes up to a batch out of the ring; `None` if the ring was released under it.
    fn fill(&mut self, before: Option<End>, until: u64) -> Result<Option<Batch>, NoSegment> {
        let mut taken = Batch::new();
        let mut fresh = false;
        while taken.len() < BATCH_CHUNKS {
            let Some(place) = &self.place else {
                self.begin_segment()?;
                fresh = true;
                continue;
            };
            let used: usize = taken.iter().map(|(from, end, _)| total_bytes(end - from)).sum();
            let room = (place.segment.bytes() - place.offset) as usize - used;
            if self.buffers.len() <= taken.len() {
                self.buffers.push(buffer());
            }
            let from = taken.last().map(|(_, end, _)| *end).or(before.map(|before| before.position));
            let bytes = room.saturating_sub(CHUNK_HEADER_BYTES).min(CHUNK_BYTES_MAX);
            let out = &mut self.buffers[taken.len()][CHUNK_HEADER_BYTES..][..bytes];
            match self.tape.take(from, until, out) {
                Taken::Bytes { from, end, first_write_ns } => taken.push((from, end, first_write_ns)),
                Taken::NoRoom if taken.is_empty() && !fresh => self.place = None,
                // A segment holds any record.
                Taken::NoRoom | Taken::Nothing => break,
                Taken::Moved => return Ok(None),
            }
        }
        Ok(Some(taken))
    }

    fn begin_segment(&mut self) -> Result<(), NoSegment> {
        let mut segments = lock(&self.journal.segments);
        let Some(segments) = segments.as_mut() else {
            return Err(NoSegment::Full("it could not be opened".to_owned()));
        };
        self.dirty = true;
        let (segment, header) = segments.begin_next(self.journal.incarnation)?;
        self.journal.written.fetch_add(BLOCK_BYTES as u64, Ordering::Relaxed);
        self.place = Some(Place { segment, header, offset: BLOCK_BYTES as u64 });
        Ok(())
    }

    /// Writes and syncs what was taken, then releases the ring.
    fn write(&mut self, before: Option<End>, taken: &[(u64, u64, Option<u64>)]) -> Result<(), NoSegment> {
        let gap = lock(&self.journal.inner).gap;
        let Some(place) = &mut self.place else { return Ok(()) };
        let mut chain = before.map_or(0, |before| before.chain);
        let mut offset = place.offset;
        let mut chunks = Vec::with_capacity(taken.len());
        for (number, &(position, end, first_write_ns)) in taken.iter().enumerate() {
            let buf = &mut self.buffers[number];
            let (bytes, total) = ((end - position) as usize, total_bytes(end - position));
            buf[CHUNK_HEADER_BYTES + bytes..total].fill(0);
            let first = before.is_none() && number == 0;
            let mut header = ChunkHeader {
                magic: CHUNK_MAGIC.into(),
                flags: if first { FLAG_FIRST } else { 0 },
                gap_reason: gap.map_or(0, |(reason, _)| reason as u8),
                reserved: 0.into(),
                segment: place.header.sequence,
                offset: offset.into(),
                incarnation: self.journal.incarnation,
                position: position.into(),
                gap_position: gap.map_or(0, |(_, position)| position).into(),
                bytes: (bytes as u32).into(),
                crc: crc32fast::hash(&buf[CHUNK_HEADER_BYTES..][..bytes]).into(),
                previous_crc: chain.into(),
                header_crc: 0.into(),
            };
            header.header_crc = header.checksum().into();
            buf[..CHUNK_HEADER_BYTES].copy_from_slice(&header.encode());
            chain = header.header_crc.get();
            let segment = place.header.sequence.get();
            chunks.push(ChunkRef { position, end, segment, offset, first_write_ns, gap });
            offset += total as u64;
        }
        let writes: Vec<(usize, u64, &[u8])> = chunks
            .iter()
            .zip(&self.buffers)
            .map(|(chunk, buf)| (0, chunk.offset, &buf[..total_bytes(chunk.end - chunk.position)]))
            .collect();
        let queue = match &mut self.queue {
            Some(queue) => queue,
            none => none.insert(IoQueue::new(QUEUE_DEPTH)?),
        };
        let file = place.segment.file();
        let written = queue.write_batch(&[file], &writes).and_then(|()| file.sync_data());
        if let Err(error) = written {
            self.place = None;
            return Err(failed(error));
        }
        let end = chunks.last().map_or(0, |chunk| chunk.end);
        let bytes = offset - place.offset;
        place.offset = offset;
        self.told = gap;
        self.keep(&chunks, End { chain, position: end, incarnation: self.journal.incarnation });
        self.journal.written.fetch_add(bytes, Ordering::Relaxed);
        let spilled: u64 = chunks.iter().map(|chunk| chunk.end - chunk.position).sum();
        self.journal.spilled.fetch_add(spilled, Ordering::Relaxed);
        Ok(())
    }

    /// The chunks are synced: from here on they are what the ring was.
    fn keep(&self, chunks: &[ChunkRef], end: End) {
        self.tape.synced(end.position, &mut |durable| {
            let mut inner = lock(&self.journal.inner);
            // All was forgotten meanwhile: these bytes are the ring's again.
            if inner.generation != self.generation {
                return false;
            }
            for chunk in chunks {
                inner.index.push(*chunk);
            }
            inner.index.release(durable);
            inner.end = Some(end);
            true
        });
    }

    /// Writes a chunk without records.
    fn note(&mut self) -> Result<(), NoSegment> {
        let before = lock(&self.journal.inner).end;
        let Some(before) = before else { return Ok(()) };
        let room = |place: &Place| place.segment.bytes() - place.offset >= BLOCK_BYTES as u64;
        if !self.place.as_ref().is_some_and(room) {
            self.begin_segment()?;
        }
        if self.buffers.is_empty() {
            self.buffers.push(buffer());
        }
        self.write(Some(before), &[(before.position, before.position, None)])
    }
}

fn failed(error: IoError) -> NoSegment {
    NoSegment::Failed(error)
}
