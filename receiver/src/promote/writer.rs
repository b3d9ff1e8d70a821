//! The stream of a promoted group: what is written to its devices, in one order, through the landing log.
//!
//! ```text
//! device ─► record ─► frame ─► landing log (synced: a flush returns) ─► applier ─► replica
//!              └─► pending: read from here until the replica has it ──────┘
//! ```
//!
//! Pending content is in memory; beyond a limit the oldest is read from the landing log, so that a replica that is being rolled back
//! holds up nobody who writes until that is full.
//!
//! It is the same stream as a source's, of an incarnation of the receiver's own: records, frames, heights, history, points.

use crate::apply::work::Queue;
use crate::failure::Failure;
use crate::group::live::Live;
use crate::group::stream::{MARK_HEIGHT, onward_ns};
use crate::landing::batch::Batch;
use crate::landing::fetch::{EntryPlace, Fetcher};
use crate::limits::{PROMOTED_CONTENT_BYTES_MAX, PROMOTED_FRAME_BYTES, PROMOTED_PENDING_BYTES_MAX};
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use varve_common::clock::is_step;
use varve_common::format::{Mark, MarkKind};
use varve_common::record::{PAYLOAD_BYTES_MAX, RING_HEADER_BYTES, RecordHeader, RecordKind};
use varve_common::wire::messages::Incarnation;
use varve_timeline::limits::GRANULE_BYTES;
use varve_timeline::timeline::Timeline;
use zerocopy::IntoBytes;

/// Between two looks at whether the replica has what is pending.
const APPLIED_INTERVAL: Duration = Duration::from_millis(200);
/// What a record takes for each granule in which it is found: its number, and its part of the map.
const GRANULE_ENTRY_BYTES: usize = 64;
/// A longer stretch of zeroes becomes several records: each is found by its granules.
const ZERO_RECORD_BYTES: u64 = 64 << 20;

/// Where the stream stands when it begins.
#[derive(Clone, Debug)]
pub struct Start {
    /// The receiver's own incarnation.
    pub incarnation: Incarnation,
    /// Position in it.
    pub position: u64,
    /// The timeline's height there.
    pub height: u64,
    /// No record is older.
    pub time_ns: u64,
    /// Under which it is written.
    pub epoch: u64,
    /// A gap is open until this is true.
    pub gap_end: Option<Arc<AtomicBool>>,
}

/// See the module's text. Shared by all devices of the group.
#[derive(Debug)]
pub struct StreamWriter {
    incarnation: Incarnation,
    epoch: u64,
    live: Arc<Live>,
    queue: Arc<Queue>,
    timeline: Arc<Timeline>,
    fetcher: Arc<Fetcher>,
    inner: Mutex<Inner>,
    /// Something was written, landed, or failed.
    changed: Condvar,
}

#[derive(Debug)]
struct Inner {
    /// Records that are not under way yet.
    frame: Vec<u8>,
    frame_position: u64,
    /// Everything before is synced.
    landed: u64,
    /// Height at position 0, modulo 2^64.
    base: u64,
    time_ns: u64,
    pending: Pending,
    ended: Option<String>,
    /// The mark that ends the gap at the stream's begin is still to be landed, once the replicas are rolled back.
    gap_end: Option<Arc<AtomicBool>>,
}

/// What is not in the replica yet.
#[derive(Debug, Default)]
struct Pending {
    records: VecDeque<Record>,
    /// Number of the first of them.
    first: u64,
    /// Content of records before this one is not in memory.
    spilled: u64,
    /// Numbers of the records of each granule, in order.
    granules: HashMap<(u16, u64), VecDeque<u64>>,
    /// Of content in memory.
    content_bytes: usize,
    /// Of everything else.
    index_bytes: usize,
}

#[derive(Clone, Debug)]
struct Record {
    height: u64,
    volume: u16,
    start: u64,
    end: u64,
    content: Content,
    /// Position of its frame, and where its content begins in that.
    frame: u64,
    offset: u32,
    /// The frame, once it is landed.
    entry: Option<EntryPlace>,
}

/// What was written.
#[derive(Clone, Debug)]
pub enum Content {
    /// Zeroes.
    Zeroes,
    /// These bytes.
    Bytes(Bytes),
    /// What the landing log's entry has from this offset on.
    Landed(EntryPlace, u32),
}

impl Content {
    /// Bytes of memory.
    fn memory(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Zeroes | Self::Landed(..) => 0,
        }
    }
}

impl Record {
    /// Bytes that it takes while it is pending, beside its content.
    fn index_memory(&self) -> usize {
        let granules = (self.end.div_ceil(GRANULE_BYTES) - self.start / GRANULE_BYTES) as usize;
        size_of::<Self>() + granules * GRANULE_ENTRY_BYTES
    }
}

/// A stretch that a device reads from what is pending.
#[derive(Clone, Debug)]
pub struct Patch {
    /// First byte.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
    /// What it is from `start` on.
    pub content: Content,
}

impl Pending {
    fn push(&mut self, record: Record) {
        let number = self.first + self.records.len() as u64;
        for granule in record.start / GRANULE_BYTES..record.end.div_ceil(GRANULE_BYTES) {
            self.granules.entry((record.volume, granule)).or_default().push_back(number);
        }
        self.content_bytes += record.content.memory();
        self.index_bytes += record.index_memory();
        self.records.push_back(record);
    }

    /// The frame at this position is landed.
    fn landed(&mut self, frame: u64, entry: EntryPlace) {
        let first = self.records.partition_point(|record| record.frame < frame);
        for record in self.records.range_mut(first..).take_while(|record| record.frame == frame) {
            record.entry = Some(entry);
        }
    }

    /// Lets go of the oldest content that is landed until the rest is no more than `most`.
    fn spill(&mut self, most: usize) {
        while self.content_bytes > most {
            let record = self.records.get_mut((self.spilled - self.first) as usize);
            let Some((record, entry)) = record.and_then(|record| record.entry.map(|entry| (record, entry))) else {
                return;
            };
            self.content_bytes -= record.content.memory();
            if let Content::Bytes(_) = record.content {
                record.content = Content::Landed(entry, record.offset);
            }
            self.spilled += 1;
        }
    }

    /// Bytes of memory in all.
    fn bytes(&self) -> usize {
        self.content_bytes + self.index_bytes
    }

    /// The replica has everything up to `applied`.
    fn forget(&mut self, applied: u64) {
        while self.records.front().is_some_and(|record| record.height <= applied) {
            let Some(record) = self.records.pop_front() else { return };
            for granule in record.start / GRANULE_BYTES..record.end.div_ceil(GRANULE_BYTES) {
                let key = (record.volume, granule);
                if let Some(numbers) = self.granules.get_mut(&key) {
                    numbers.pop_front();
                    if numbers.is_empty() {
                        self.granules.remove(&key);
                    }
                }
            }
            self.content_bytes -= record.content.memory();
            self.index_bytes -= record.index_memory();
            self.first += 1;
            self.spilled = self.spilled.max(self.first);
        }
    }

    /// What of a range is pending, oldest first.
    fn patches(&self, volume: u16, start: u64, end: u64) -> Vec<Patch> {
        let granules = start / GRANULE_BYTES..end.div_ceil(GRANULE_BYTES);
        let mut numbers: Vec<u64> =
            granules.filter_map(|granule| self.granules.get(&(volume, granule))).flatten().copied().collect();
        numbers.sort_unstable();
        numbers.dedup();
        let patch = |number: u64| {
            let record = self.records.get((number - self.first) as usize)?;
            let (from, to) = (record.start.max(start), record.end.min(end));
            let skip = (from - record.start) as usize;
            let content = || match &record.content {
                Content::Zeroes => Content::Zeroes,
                Content::Bytes(bytes) => Content::Bytes(bytes.slice(skip..skip + (to - from) as usize)),
                Content::Landed(entry, offset) => Content::Landed(*entry, offset + skip as u32),
            };
            (from < to).then(|| Patch { start: from, end: to, content: content() })
        };
        numbers.into_iter().filter_map(patch).collect()
    }
}

impl StreamWriter {
    /// Begins at `start`, where the landing log ends. [`StreamWriter::run`] is to be run by a thread.
    pub fn new(
        start: Start,
        live: Arc<Live>,
        queue: Arc<Queue>,
        timeline: Arc<Timeline>,
        fetcher: Arc<Fetcher>,
    ) -> Arc<Self> {
        let inner = Inner {
            frame: Vec::new(),
            frame_position: start.position,
            landed: start.position,
            base: start.height.wrapping_sub(start.position),
            time_ns: start.time_ns,
            pending: Pending::default(),
            ended: None,
            gap_end: start.gap_end,
        };
        let (inner, changed) = (Mutex::new(inner), Condvar::new());
        let Start { incarnation, epoch, .. } = start;
        Arc::new(Self { incarnation, epoch, live, queue, timeline, fetcher, inner, changed })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>, limit: Duration) -> MutexGuard<'a, Inner> {
        self.changed.wait_timeout(inner, limit).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Writes; it can be read at once and is durable after [`StreamWriter::flush`].
    pub fn write(&self, volume: u16, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut at = offset;
        for part in bytes.chunks(PAYLOAD_BYTES_MAX as usize) {
            self.push(RecordKind::Write, volume, at, part.len() as u64, Some(Bytes::copy_from_slice(part)))?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Makes a stretch read as zeroes.
    pub fn zero(&self, volume: u16, offset: u64, len: u64, discard: bool) -> io::Result<()> {
        let kind = if discard { RecordKind::Discard } else { RecordKind::WriteZeroes };
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let part = (end - at).min(ZERO_RECORD_BYTES);
            self.push(kind, volume, at, part, None)?;
            at += part;
        }
        Ok(())
    }

    /// A named point.
    pub fn bookmark(&self, name: &str) -> io::Result<()> {
        self.push(RecordKind::Bookmark, 0, 0, 0, Some(Bytes::copy_from_slice(name.as_bytes())))?;
        self.flush()
    }

    fn push(&self, kind: RecordKind, volume: u16, start: u64, len: u64, bytes: Option<Bytes>) -> io::Result<()> {
        let mut inner = self.lock();
        let mut now_ns;
        loop {
            inner.check()?;
            inner.pending.forget(self.timeline.applied().height);
            inner.pending.spill(PROMOTED_CONTENT_BYTES_MAX);
            let room = inner.pending.bytes() < PROMOTED_PENDING_BYTES_MAX && inner.frame.len() < PROMOTED_FRAME_BYTES;
            now_ns = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
            // A frame is dated as a whole.
            if room && (inner.frame.is_empty() || !is_step(inner.time_ns, now_ns)) {
                break;
            }
            // The disks are slower than the writer: it waits, as it would for any disk.
            self.queue.hurry();
            inner = self.wait(inner, Duration::from_millis(5));
        }
        // The source's clock, which dated what came before, may have been ahead.
        inner.time_ns = onward_ns(inner.time_ns, now_ns);
        let payload = bytes.as_ref().map_or(&[][..], |bytes| &bytes[..]);
        let header = RecordHeader {
            kind: kind as u8,
            flags: 0,
            volume: volume.into(),
            payload: (payload.len() as u32).into(),
            time_ns: inner.time_ns.into(),
            offset: start.into(),
            length: len.into(),
        };
        let length = (size_of::<RecordHeader>() + payload.len()) as u32;
        inner.frame.extend_from_slice(&length.to_le_bytes());
        inner.frame.extend_from_slice(&[0; RING_HEADER_BYTES as usize - 4]);
        inner.frame.extend_from_slice(header.as_bytes());
        let (frame, offset) = (inner.frame_position, inner.frame.len() as u32);
        inner.frame.extend_from_slice(payload);
        let padded = inner.frame.len().next_multiple_of(8);
        inner.frame.resize(padded, 0);
        if kind.changes_data() {
            let height = inner.base.wrapping_add(inner.frame_position + inner.frame.len() as u64);
            let content = bytes.map_or(Content::Zeroes, Content::Bytes);
            let (end, entry) = (start + len, None);
            inner.pending.push(Record { height, volume, start, end, content, frame, offset, entry });
        }
        drop(inner);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits until everything written before is synced in the landing log.
    pub fn flush(&self) -> io::Result<()> {
        let mut inner = self.lock();
        let wanted = inner.frame_position + inner.frame.len() as u64;
        while inner.landed < wanted {
            inner.check()?;
            inner = self.wait(inner, APPLIED_INTERVAL);
        }
        inner.check()
    }

    /// What of a range is not in the replica yet, oldest first. To be asked before the replica is read.
    pub fn patches(&self, volume: u16, start: u64, end: u64) -> Vec<Patch> {
        let mut inner = self.lock();
        // Content of what is applied may be nowhere but in the replica.
        inner.pending.forget(self.timeline.applied().height);
        inner.pending.patches(volume, start, end)
    }

    /// Fills `target` with what a patch says. `false`: it is applied meanwhile, and whoever reads begins again.
    ///
    /// # Errors
    /// If the landing log cannot be read.
    pub fn fill(&self, content: &Content, target: &mut [u8]) -> Result<bool, Failure> {
        match content {
            Content::Zeroes => target.fill(0),
            Content::Bytes(bytes) => target.copy_from_slice(bytes),
            Content::Landed(entry, offset) => return self.fetcher.fill(*entry, *offset, target),
        }
        Ok(true)
    }

    /// Nothing is written any more; what waits is landed first.
    pub fn end(&self) {
        // A failure is told to whoever writes.
        let _ = self.flush();
        self.fail("the group is not promoted any more".to_owned());
    }

    fn fail(&self, why: String) {
        self.lock().ended.get_or_insert(why);
        self.changed.notify_all();
    }

    /// Lands frames until the stream ends. For a thread of its own.
    pub fn run(&self, batches: &mpsc::Sender<Batch>, runtime: &tokio::runtime::Handle) {
        let mut progress = self.live.subscribe();
        let mut spare = Vec::new();
        loop {
            let mut inner = self.lock();
            while inner.frame.is_empty() && !inner.gap_ends() {
                if inner.ended.is_some() {
                    return;
                }
                inner.pending.forget(self.timeline.applied().height);
                self.fetcher.tidy();
                inner = self.wait(inner, APPLIED_INTERVAL);
            }
            let (position, time_ns) = (inner.frame_position, inner.time_ns);
            let batch = if inner.gap_ends() && inner.frame.is_empty() {
                inner.gap_end = None;
                // What is written from here on stands behind the mark.
                inner.base = inner.base.wrapping_add(MARK_HEIGHT);
                Batch::of_mark(&self.gap_end(position, time_ns))
            } else {
                std::mem::swap(&mut inner.frame, &mut spare);
                inner.frame_position += spare.len() as u64;
                Batch::of_records(self.incarnation, position, &spare, time_ns)
            };
            drop(inner);
            let end = position + spare.len() as u64;
            let entry_bytes = if spare.is_empty() { None } else { Some(batch.entry_bytes as u32) };
            spare.clear();
            let before = progress.borrow_and_update().landed_batches;
            if batches.send(batch).is_err() {
                return self.fail("the landing log is closed".to_owned());
            }
            let landed =
                runtime.block_on(progress.wait_for(|now| now.landed_batches > before || now.failure.is_some()));
            let landed = landed.map(|now| (now.failure.clone(), now.newest_batch));
            match landed {
                Ok((None, place)) => {
                    let mut inner = self.lock();
                    if let Some((bytes, place)) = entry_bytes.zip(place) {
                        inner.pending.landed(position, EntryPlace { place, bytes, position });
                    }
                    inner.landed = end;
                }
                Ok((Some(failure), _)) => return self.fail(failure.text.clone()),
                Err(error) => return self.fail(error.to_string()),
            }
            self.changed.notify_all();
        }
    }

    fn gap_end(&self, position: u64, time_ns: u64) -> Mark {
        let (kind, reason) = (MarkKind::GapEnd, None);
        Mark { kind, reason, incarnation: self.incarnation, position, time_ns, epoch: self.epoch, height_min: 0 }
    }
}

impl Inner {
    fn gap_ends(&self) -> bool {
        self.gap_end.as_ref().is_some_and(|rolled| rolled.load(Ordering::SeqCst))
    }

    fn check(&self) -> io::Result<()> {
        match &self.ended {
            Some(why) => Err(io::Error::other(why.clone())),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::landing::Place;
    use proptest::prelude::*;

    proptest! {
        /// Patches over what the replica has give what was written.
        #[test]
        fn pending_and_replica_are_what_was_written(
            steps in prop::collection::vec((0u64..200_000, 1u64..90_000, any::<bool>(), 0u64..3), 1..60),
        ) {
            let (mut pending, mut height) = (Pending::default(), 0);
            let (mut model, mut replica) = (vec![0u8; 300_000], vec![0u8; 300_000]);
            let mut all: Vec<Record> = Vec::new();
            let mut applied = 0;
            // Every third record begins a frame; so many of them are landed, and little content stays in memory then.
            let place = |frame| EntryPlace { place: Place { segment: frame, offset: 0 }, bytes: 0, position: frame };
            for (number, (start, len, zero, apply)) in steps.into_iter().enumerate() {
                height += 8;
                let content = match zero {
                    true => Content::Zeroes,
                    false => Content::Bytes(Bytes::from(vec![number as u8 + 1; len as usize])),
                };
                let frame = number as u64 / 3;
                if apply > 0 && frame > 0 {
                    pending.landed(frame - 1, place(frame - 1));
                    pending.spill(100_000 * apply as usize - 100_000);
                }
                let (end, entry, offset) = (start + len, None, number as u32 * 1_000_000);
                let record = Record { height, volume: 0, start, end, content, frame, offset, entry };
                model[start as usize..(start + len) as usize].fill(if zero { 0 } else { number as u8 + 1 });
                pending.push(record.clone());
                all.push(record);
                let to = (applied + apply as usize).min(all.len());
                for record in &all[applied..to] {
                    let value = match &record.content {
                        Content::Bytes(bytes) => bytes[0],
                        _ => 0,
                    };
                    replica[record.start as usize..record.end as usize].fill(value);
                }
                applied = to;
                pending.forget(all.get(applied.wrapping_sub(1)).map_or(0, |record| record.height));
                let (from, to) = (start.saturating_sub(100), start + len);
                let mut read = replica[from as usize..to as usize].to_vec();
                for patch in pending.patches(0, from, to) {
                    let target = &mut read[(patch.start - from) as usize..(patch.end - from) as usize];
                    match patch.content {
                        Content::Bytes(bytes) => target.copy_from_slice(&bytes),
                        Content::Zeroes => target.fill(0),
                        Content::Landed(entry, offset) => {
                            let number = u64::from(offset) / 1_000_000;
                            let skipped = patch.start - all[number as usize].start;
                            prop_assert_eq!((entry, u64::from(offset)), (place(number / 3), number * 1_000_000 + skipped));
                            target.fill(number as u8 + 1);
                        }
                    }
                }
                prop_assert_eq!(&read[..], &model[from as usize..to as usize]);
            }
            pending.forget(u64::MAX);
            prop_assert!(pending.records.is_empty() && pending.granules.is_empty() && pending.bytes() == 0);
        }
    }
}
