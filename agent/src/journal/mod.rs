//! The journal of a group: the ring's byte stream, continued on disk while the receiver is slow or away, and at a clean
//! stop.
//!
//! ```text
//!          released          journal (index)            ring
//!   ───────────────────┬───────────────────────┬───────────────────┬──►
//!                   durable                 consumer            producer
//! ```
//!
//! A byte is in one place more than it must be, never in one less: the ring is released only up to what is durable at
//! the receiver or synced here. The journal grows at its end by the spilling thread ([`spill`]) alone, when the ring is
//! more than half full, and shrinks at its begin by acknowledgements. While the link keeps up, nothing is written.
//!
//! Every chunk says which gap was open when it was written: a write that went past the stream makes what follows it
//! worthless as points, and whoever finds the journal later must know.
//!
//! A journal found at the start is *attached* if the ring goes on where it ends, else *detached* ([`meeting`]): then its
//! bytes are sent first, in a session under its own ring's name, and the ring begins anew.

mod chunk;
mod index;
mod meeting;
mod recover;
mod segment;
mod spill;
#[cfg(test)]
mod tests;

pub use chunk::Chunk;
pub use meeting::{Drain, drain};

use index::Index;
use meeting::{Meeting, Ring, meet};
use segment::Segments;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use varve_common::control::JournalStatus;
use varve_common::format::journal::{Candidate, End, Verdict, decide, look};
use varve_common::state::GapReason;
use varve_common::wire::messages::Incarnation;
use varve_io::{AlignedBuf, IoError, crashsafe};

/// Segments that a journal of its largest size has at least.
const SEGMENTS_MIN: u64 = 4;
/// Size of a segment, unless the journal is too small for four of them.
const SEGMENT_BYTES_MAX: u64 = 64 << 20;

/// Where a group's journal lies and how large it may become. With a size of 0 nothing is put into it; what an agent
/// before left in it is sent all the same.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Of all groups' journals.
    pub dir: PathBuf,
    /// Most bytes on disk.
    pub bytes_max: u64,
}

impl Settings {
    fn segment_bytes(&self) -> u64 {
        (self.bytes_max / SEGMENTS_MIN).min(SEGMENT_BYTES_MAX) >> 20 << 20
    }

    /// Whether there is a directory for this group's journal.
    pub fn exists(&self, group: &str) -> bool {
        self.dir.join(group).is_dir()
    }

    /// Removes the journal of a group that is not protected any more.
    ///
    /// # Errors
    /// The step that failed.
    pub fn remove(dir: &Path, group: &str) -> Result<(), IoError> {
        let path = dir.join(group);
        match std::fs::remove_dir_all(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(IoError::new("remove", &path, e)),
            _ if dir.is_dir() => crashsafe::fsync_dir(dir),
            _ => Ok(()),
        }
    }
}

/// What [`Tape::take`] gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Nothing there.
    Nothing,
    /// The ring was released beyond the wanted place.
    Moved,
    /// The next record is longer than there is room.
    NoRoom,
    /// These bytes.
    Bytes {
        /// First position.
        from: u64,
        /// Behind the last one.
        end: u64,
        /// Time of the first record that changes data.
        first_write_ns: Option<u64>,
    },
}

/// What the journal needs of a ring.
pub trait Tape: Send + Sync {
    /// Oldest and newest position and capacity.
    fn extent(&self) -> (u64, u64, u64);
    /// Copies whole records of `[from, until)`, as many as fit. `from` `None`: from the oldest on.
    fn take(&self, from: Option<u64>, until: u64, out: &mut [u8]) -> Taken;
    /// Everything before `end` is synced: `keep` is told what is durable at the receiver and remembers where the rest
    /// is, and if it says so the space goes back to the kernel. Nobody else changes either meanwhile.
    fn synced(&self, end: u64, keep: &mut dyn FnMut(u64) -> bool);
    /// [`Journal::release`] holds nothing back any more: what is durable at the receiver goes back to the kernel.
    fn settle(&self);
}

/// A journal that is not continued by the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Detached {
    /// Its ring.
    pub incarnation: Incarnation,
    /// First byte.
    pub start: u64,
    /// Behind its last byte.
    pub end: u64,
    /// The first gap in it.
    pub gap: Option<(GapReason, u64)>,
}

#[derive(Debug, Default)]
struct Inner {
    index: Index,
    /// See [`Detached`].
    detached: Option<Incarnation>,
    /// Nothing may be put behind what was found: its end is damaged.
    sealed: bool,
    /// Rises when everything is forgotten.
    generation: u64,
    /// The newest chunk of the run that is being written.
    end: Option<End>,
    /// Where the run ended that is being taken from the disk.
    ended_at: Option<u64>,
    /// There is a thread that will do that.
    spilling: bool,
    failed: Option<String>,
    full: Option<String>,
    /// Ring bytes before may be spilled.
    offered: u64,
    /// The open gap.
    gap: Option<(GapReason, u64)>,
    /// There is no session.
    away: bool,
    /// The ring is being spilled until it is half as full as it was allowed to be,
    active: bool,
    /// or until the journal ends here.
    flush: Option<u64>,
    stopping: bool,
}

impl Inner {
    fn ended(&self) -> Option<u64> {
        self.end.map(|end| end.position)
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Journal {
    group: String,
    incarnation: Incarnation,
    bytes_max: u64,
    inner: Mutex<Inner>,
    /// Only the spilling thread adds and removes; others look up.
    segments: Mutex<Option<Segments>>,
    wake: Condvar,
    progress: Condvar,
    /// Bytes written to disk, headers and padding included.
    written: AtomicU64,
    /// Bytes of the stream among them.
    spilled: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Journal {
    /// Opens a group's journal and finds out how it meets the ring, which must be released up to the end of
    /// [`Journal::range`] before anything is spilled. One that cannot be used says why in its status, and
    /// the group does without.
    pub fn open(settings: &Settings, group: &str, incarnation: Incarnation, tape: &dyn Tape) -> Self {
        let journal = Self {
            group: group.to_owned(),
            incarnation,
            bytes_max: settings.bytes_max,
            inner: Mutex::default(),
            segments: Mutex::new(None),
            wake: Condvar::new(),
            progress: Condvar::new(),
            written: AtomicU64::new(0),
            spilled: AtomicU64::new(0),
        };
        if let Err(error) = journal.find(settings, tape) {
            journal.give_up(&error.chain());
        }
        journal
    }

    fn find(&self, settings: &Settings, tape: &dyn Tape) -> Result<(), IoError> {
        let dir = settings.dir.join(&self.group);
        let mut segments = Segments::open(&dir, &self.group, settings.segment_bytes(), settings.bytes_max)?;
        let (consumer, producer, _) = tape.extent();
        let found = recover::recover(&segments, (self.incarnation, consumer))?;
        for (segment, offset) in &found.torn {
            segment.wipe(*offset)?;
        }
        if let Some(why) = &found.damage {
            tracing::error!(group = %self.group, "the journal is damaged and ends early: {why}");
        }
        let mut inner = lock(&self.inner);
        if let (Some((start, end)), Some(last)) = (found.index.range(), found.end) {
            let ring = (last.incarnation == self.incarnation).then_some((consumer, producer));
            let (letter, why, meeting) = meet(Ring::seen_from((start, end), ring));
            tracing::info!(group = %self.group, start, end, consumer, "a journal was found: case {letter}, {why}");
            if meeting != Meeting::Discard {
                (inner.index, inner.end) = (found.index, found.end);
                inner.sealed = found.damage.is_some();
                inner.detached = (meeting == Meeting::Detached).then_some(last.incarnation);
            }
        }
        match inner.index.oldest_segment() {
            Some(oldest) => segments.recycle_before(oldest),
            None => segments.recycle_all()?,
        }
        *lock(&self.segments) = Some(segments);
        Ok(())
    }

    /// Starts the thread that spills. It ends with [`Spilling`].
    pub fn spill(self: &Arc<Self>, tape: Arc<dyn Tape>) -> Result<Spilling, IoError> {
        lock(&self.inner).spilling = true;
        let journal = self.clone();
        let thread = std::thread::Builder::new().name("journal".into()).spawn(move || spill::run(&journal, &*tape));
        let thread = thread.map_err(|e| {
            lock(&self.inner).spilling = false;
            IoError::new("start a thread for", &self.group, e)
        })?;
        Ok(Spilling { journal: self.clone(), thread: Some(thread) })
    }

    /// The journal that the ring does not go on from, if this is one.
    pub fn detached(&self) -> Option<Detached> {
        let inner = lock(&self.inner);
        let (start, end) = inner.index.range()?;
        Some(Detached { incarnation: inner.detached?, start, end, gap: inner.index.gap() })
    }

    /// First position that is still wanted and the end of what goes on in the ring; `None`: empty (or detached).
    pub fn range(&self) -> Option<(u64, u64)> {
        let inner = lock(&self.inner);
        inner.index.range().filter(|_| inner.detached.is_none())
    }

    /// Whether the byte at `position` is in it.
    pub fn holds(&self, position: u64) -> bool {
        lock(&self.inner).index.find(position).is_some()
    }

    /// The first gap that the chunks know of.
    pub fn gap(&self) -> Option<(GapReason, u64)> {
        lock(&self.inner).index.gap()
    }

    /// Everything before `position` is durable at the receiver. Gives how far the ring may be released: not beyond the
    /// end of what is found on the disk after a kill, else that would not be known to be acknowledged, and nothing could be
    /// spilled behind it until the receiver was heard of.
    pub fn release(&self, position: u64) -> u64 {
        let mut inner = lock(&self.inner);
        if inner.detached.is_some() {
            return position;
        }
        self.release_locked(&mut inner, position);
        let end = inner.ended_at.or(inner.ended()).filter(|_| inner.spilling && inner.failed.is_none());
        end.map_or(position, |end| position.min(end))
    }

    /// The same for a detached journal, whose positions mean nothing to the ring.
    pub fn release_detached(&self, position: u64) {
        self.release_locked(&mut lock(&self.inner), position);
    }

    fn release_locked(&self, inner: &mut Inner, position: u64) {
        let before = inner.index.oldest_segment();
        if before.is_none() {
            return;
        }
        inner.index.release(position);
        if inner.index.oldest_segment() != before {
            self.wake.notify_all();
        }
    }

    /// Forgets everything.
    pub fn discard(&self) {
        let mut inner = lock(&self.inner);
        inner.index.clear();
        inner.generation += 1;
        inner.ended_at = inner.ended().filter(|_| inner.detached.is_none());
        (inner.end, inner.detached, inner.sealed) = (None, None, false);
        self.wake.notify_all();
    }

    /// The ring's bytes before `until` may be spilled, and this gap is open. Spills if the ring is more than half full,
    /// or, with the receiver `away`, an eighth: then it has room for the time that an agent needs to be started again.
    pub fn offer(&self, until: u64, gap: Option<(GapReason, u64)>, away: bool, extent: (u64, u64, u64)) {
        let (consumer, producer, capacity) = extent;
        if self.bytes_max == 0 {
            return;
        }
        let mut inner = lock(&self.inner);
        (inner.offered, inner.away) = (until, away);
        let limit = if away { capacity / 8 } else { capacity / 2 };
        let pressing = producer - consumer > limit && until > consumer;
        if (pressing && !inner.active) || inner.gap != gap {
            inner.active |= pressing;
            inner.gap = gap;
            self.wake.notify_all();
        } else if inner.active {
            // It may have waited for more to be offered.
            self.wake.notify_all();
        }
    }

    /// Spills everything before `until`; whether that was possible in time (or is not wanted).
    pub fn flush(&self, until: u64, gap: Option<(GapReason, u64)>, limit: Duration) -> bool {
        if self.bytes_max == 0 {
            return true;
        }
        let deadline = Instant::now() + limit;
        let mut inner = lock(&self.inner);
        (inner.offered, inner.flush, inner.gap) = (until, Some(until), gap);
        self.wake.notify_all();
        loop {
            if inner.ended().is_some_and(|end| end >= until) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || inner.failed.is_some() || inner.full.is_some() || inner.detached.is_some() {
                return false;
            }
            inner = self.progress.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Nothing is written any more. What is in it is still sent.
    fn give_up(&self, why: &str) {
        tracing::error!(group = %self.group, "the journal is given up: {why}; capture goes on by the ring alone");
        let mut inner = lock(&self.inner);
        inner.failed.get_or_insert_with(|| why.to_owned());
        (inner.active, inner.flush) = (false, None);
        self.progress.notify_all();
    }

    /// Part of it cannot be read: nothing in it is of use, since what follows would have a hole before it.
    pub fn give_up_reading(&self, why: &str) {
        self.give_up(why);
        self.discard();
    }

    /// Reads the chunk with the byte at `position`; blocks. `buf` is used if it is there.
    ///
    /// # Errors
    /// In words: not there, not readable, or not what was written.
    pub fn read(&self, position: u64, buf: Option<AlignedBuf>) -> Result<Chunk, String> {
        let wanted = lock(&self.inner).index.find(position);
        let wanted = wanted.ok_or_else(|| format!("position {position} is not in the journal"))?;
        let found = lock(&self.segments).as_ref().and_then(|segments| segments.get(wanted.segment));
        let (segment, header) = found.ok_or_else(|| format!("segment {} is gone", wanted.segment))?;
        let total = chunk::total_bytes(wanted.end - wanted.position);
        let mut buf = buf.unwrap_or_else(chunk::buffer);
        let read = segment.file().read_exact_at(&mut buf[..total], wanted.offset);
        read.map_err(|error| error.chain())?;
        let (facts, chunk) = look(&header, wanted.offset, &buf[..total], None);
        let whole =
            chunk.filter(|chunk| chunk.header.position.get() == wanted.position && chunk.header.end() == wanted.end);
        let (letter, why, verdict) = decide(Candidate::NextSegment, facts);
        if whole.is_none() || !matches!(verdict, Verdict::Take | Verdict::Restart) {
            return Err(format!(
                "segment {} has another content at offset {}: case {letter}, {why}",
                wanted.segment, wanted.offset
            ));
        }
        Ok(Chunk::new(wanted.position, wanted.end, buf))
    }

    /// Time of the oldest write at or after `durable` in it. A detached one tells nothing: the ring is not its ring.
    pub fn oldest_write_ns(&self, durable: u64) -> Option<u64> {
        let inner = lock(&self.inner);
        let durable = if inner.detached.is_some() { 0 } else { durable };
        inner.index.oldest_write_ns(durable)
    }

    /// Bytes of the stream that are not durable at the receiver, if they are no part of the ring's positions.
    pub fn detached_bytes(&self) -> u64 {
        let inner = lock(&self.inner);
        inner.detached.map_or(0, |_| inner.index.bytes())
    }

    /// As `varve status` shows it.
    pub fn status(&self) -> JournalStatus {
        let inner = lock(&self.inner);
        JournalStatus {
            used_bytes: inner.index.bytes(),
            total_bytes: self.bytes_max,
            error: inner.failed.clone().or_else(|| inner.full.clone()),
        }
    }

    /// Bytes of the stream that were spilled, and bytes that this took on disk.
    pub fn spent(&self) -> (u64, u64) {
        (self.spilled.load(Ordering::Relaxed), self.written.load(Ordering::Relaxed))
    }
}

/// The spilling thread. Dropped, it ends the thread, after the batch that is being written.
pub struct Spilling {
    journal: Arc<Journal>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Spilling {
    fn drop(&mut self) {
        lock(&self.journal.inner).stopping = true;
        self.journal.wake.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(group = %self.journal.group, "the journal's thread did not end well");
        }
    }
}
