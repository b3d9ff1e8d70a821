//! All segments of one group's log: in use, free, to be made; and the writer at its end.

use super::Place;
use super::batch::Entry;
use super::segment::{self, Segment};
use crate::failpoint;
use crate::failure::Failure;
use crate::limits::{SEGMENTS_FREE_KEPT, SEGMENTS_FREE_TIME};
use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use varve_common::format::{BLOCK_BYTES, ENTRY_HEADER_BYTES};
use varve_io::{AlignedBuf, DirectFile, IoError, crashsafe};

/// The segments. Shared by the lander, which needs free ones, and the applier, which frees them.
#[derive(Debug)]
pub struct Log {
    dir: PathBuf,
    group: [u8; 16],
    segment_bytes: u64,
    bytes_max: u64,
    table: Mutex<Table>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    /// In use, by sequence number.
    live: BTreeMap<u64, Arc<Segment>>,
    free: Vec<Arc<Segment>>,
    /// Of all segments, those being made included.
    bytes: u64,
    newest_sequence: u64,
    newest_slot: u64,
    /// Fewest free segments since `spare_since`: so many were not needed in all that time.
    spare: usize,
    spare_since: Option<Instant>,
    /// Of a group that is taken over, beyond the usual limit.
    reserve_bytes: u64,
    /// The lander waits for a segment.
    starved: bool,
    closed: bool,
}

impl Log {
    /// Opens (or makes) the directory and looks at every segment in it. `mark` is where applying goes on.
    pub fn open(dir: &Path, group: [u8; 16], segment_bytes: u64, bytes_max: u64, mark: Place) -> Result<Self, Failure> {
        let failed = |e: IoError| Failure::io("the landing log", &e);
        crashsafe::create_dir_all_durable(dir).map_err(failed)?;
        // A name that was given when the directory could not be synced, or by a life that was killed, counts from here on.
        crashsafe::fsync_dir(dir).map_err(failed)?;
        let mut table = Table { newest_sequence: mark.segment, ..Table::default() };
        for (slot, path) in segment::list(dir).map_err(failed)? {
            table.newest_slot = table.newest_slot.max(slot);
            let found = Segment::open(&path, group).map_err(failed)?;
            let segment = Arc::new(found.map_err(|e| Failure::format(&path, &e))?);
            table.newest_sequence = table.newest_sequence.max(segment.sequence());
            table.bytes += segment.bytes();
            if segment.sequence() < mark.segment {
                table.free.push(segment);
            } else if let Some(twin) = table.live.insert(segment.sequence(), segment) {
                return Err(Failure::damaged(format!(
                    "{} and another segment both have the number {}",
                    path.display(),
                    twin.sequence()
                )));
            }
        }
        let dir = dir.to_owned();
        let log = Self { dir, group, segment_bytes, bytes_max, table: Mutex::new(table), freed: Condvar::new() };
        log.drop_misfits();
        let mut table = log.lock();
        table.spare = table.free.len();
        drop(table);
        Ok(log)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The segment in use with this number.
    pub fn segment(&self, sequence: u64) -> Option<Arc<Segment>> {
        self.lock().live.get(&sequence).cloned()
    }

    /// The segment in use that follows the one with this number.
    pub fn segment_after(&self, sequence: u64) -> Option<Arc<Segment>> {
        let table = self.lock();
        table.live.range((Bound::Excluded(sequence), Bound::Unbounded)).next().map(|(_, segment)| segment.clone())
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.lock().bytes
    }

    /// Whether the lander waits for the applier.
    pub fn is_starved(&self) -> bool {
        self.lock().starved
    }

    /// Nobody waits for a free segment from here on.
    pub fn close(&self) {
        self.lock().closed = true;
        self.freed.notify_all();
    }

    /// Two segments beyond the limit: who takes the group over must not wait for an applier that lags by a whole log. They go
    /// when they are free again.
    pub fn open_reserve(&self) {
        self.lock().reserve_bytes = 2 * self.segment_bytes;
        self.freed.notify_all();
    }

    /// Every segment before the one with this number may be used again. Only after the applied mark is durable.
    pub fn recycle_before(&self, sequence: u64) {
        let mut table = self.lock();
        let keep = table.live.split_off(&sequence);
        let done = std::mem::replace(&mut table.live, keep);
        if done.is_empty() {
            return;
        }
        table.free.extend(done.into_values());
        drop(table);
        self.drop_misfits();
        self.freed.notify_all();
    }

    /// Gives the disk back what a burst took: segments that nobody has needed for [`SEGMENTS_FREE_TIME`]. Gives their number.
    pub fn give_back(&self, now: Instant) -> usize {
        let gone: Vec<Arc<Segment>> = {
            let mut table = self.lock();
            let free = table.free.len();
            let since = *table.spare_since.get_or_insert(now);
            if now.saturating_duration_since(since) < SEGMENTS_FREE_TIME {
                return 0;
            }
            let spare = std::mem::replace(&mut table.spare, free).min(free);
            let count = spare.saturating_sub(SEGMENTS_FREE_KEPT);
            table.spare_since = Some(now);
            table.spare -= count;
            // Those that were used last are at the end: the disk may still know where they are.
            table.free.drain(..count).collect()
        };
        for segment in &gone {
            if let Err(error) = self.remove(segment) {
                tracing::warn!(error = %error.chain(), "a segment of the landing log that is not needed stays");
            }
        }
        gone.len()
    }

    /// The segments after the one with this number are no part of the log: what they followed is lost.
    pub fn discard_after(&self, sequence: u64) -> Result<usize, Failure> {
        let gone = self.lock().live.split_off(&(sequence + 1));
        let count = gone.len();
        for segment in gone.into_values() {
            self.remove(&segment).map_err(|e| Failure::io("the landing log", &e))?;
        }
        Ok(count)
    }

    /// What stands right behind `end` or at the next block is no part of the log and never will be: else it would end the
    /// log there again, before what is written from now on.
    pub fn cut(&self, end: Place) -> Result<(), Failure> {
        let Some(segment) = self.segment(end.segment) else { return Ok(()) };
        let start = end.offset - end.offset % BLOCK_BYTES as u64;
        let stop = (end.next_block().offset + BLOCK_BYTES as u64).min(segment.bytes());
        let mut blocks = AlignedBuf::new(2 * BLOCK_BYTES);
        let blocks = &mut blocks[..stop.saturating_sub(start) as usize];
        let cut = segment.file().read_exact_at(blocks, start).and_then(|()| {
            blocks.iter_mut().skip((end.offset - start) as usize).for_each(|byte| *byte = 0);
            segment.file().write_all_at_durable(blocks, start)
        });
        cut.map_err(|e| Failure::io("the landing log", &e))
    }

    /// Segments that hold nothing after the one with this number are free.
    pub fn free_after(&self, sequence: u64) {
        let mut table = self.lock();
        let empty = table.live.split_off(&(sequence + 1));
        table.free.extend(empty.into_values());
    }

    fn remove(&self, segment: &Segment) -> Result<(), IoError> {
        crashsafe::remove_durable(segment.file().path())?;
        self.lock().bytes -= segment.bytes();
        Ok(())
    }

    /// Free segments of another size than configured, and more than allowed, go.
    fn drop_misfits(&self) {
        loop {
            let misfit = {
                let mut table = self.lock();
                let too_much = table.bytes > self.bytes_max;
                let at = table.free.iter().position(|s| too_much || s.bytes() != self.segment_bytes);
                at.map(|at| table.free.swap_remove(at))
            };
            let Some(misfit) = misfit else { return };
            if let Err(error) = self.remove(&misfit) {
                tracing::warn!(error = %error.chain(), "a segment of the landing log that is not needed stays");
            }
        }
    }

    /// A segment that may be put to use: a free one, a new one, or (at the limit) one that the applier frees.
    fn take(&self) -> Result<(Arc<Segment>, u64), Failure> {
        let mut table = self.lock();
        let segment = loop {
            if table.closed {
                return Err(Failure::stopping());
            }
            let free = table.free.pop();
            table.spare = table.spare.min(table.free.len());
            if let Some(segment) = free {
                break segment;
            }
            if table.bytes + self.segment_bytes <= self.bytes_max + table.reserve_bytes {
                table.bytes += self.segment_bytes;
                table.newest_slot += 1;
                let slot = table.newest_slot;
                drop(table);
                let made = Segment::create(&self.dir, slot, self.segment_bytes, false);
                table = self.lock();
                match made {
                    Ok(segment) => break Arc::new(segment),
                    Err(error) => {
                        table.bytes -= self.segment_bytes;
                        return Err(Failure::io("the landing log", &error));
                    }
                }
            }
            table.starved = true;
            table = self.freed.wait(table).unwrap_or_else(PoisonError::into_inner);
            table.starved = false;
        };
        table.newest_sequence += 1;
        Ok((segment, table.newest_sequence))
    }

    /// Makes segments until there are `count`, as far as the limit goes, so that the first ones are not made while
    /// somebody waits for an acknowledgement. That there is no room for them is found when they are needed.
    pub fn prepare(&self, count: usize) {
        loop {
            let slot = {
                let mut table = self.lock();
                let enough = table.live.len() + table.free.len() >= count;
                if enough || table.closed || table.bytes + self.segment_bytes > self.bytes_max {
                    return;
                }
                table.bytes += self.segment_bytes;
                table.newest_slot += 1;
                table.newest_slot
            };
            match Segment::create(&self.dir, slot, self.segment_bytes, true) {
                Ok(segment) => self.lock().free.push(Arc::new(segment)),
                Err(error) => {
                    self.lock().bytes -= self.segment_bytes;
                    tracing::debug!(error = %error.chain(), "no segment was made in advance");
                    return;
                }
            }
        }
    }

    fn begin_next(&self) -> Result<Arc<Segment>, Failure> {
        let (segment, sequence) = self.take()?;
        segment.begin(self.group, sequence).map_err(|e| Failure::io("the landing log", &e))?;
        self.lock().live.insert(sequence, segment.clone());
        Ok(segment)
    }
}

/// The end of the log. One per group, owned by the lander.
#[derive(Debug)]
pub struct Writer {
    log: Arc<Log>,
    segment: Option<Arc<Segment>>,
    offset: u64,
    chain: u32,
}

impl Writer {
    /// The log that it writes.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Goes on after the entry whose header has the CRC `chain`, in a new segment: behind that entry may stand what a torn
    /// batch left, and if the same bytes came to the same place again, the rest of that batch would follow them.
    pub fn new(log: Arc<Log>, _end: Place, chain: u32) -> Self {
        Self { log, segment: None, offset: 0, chain }
    }

    /// Fills in the entries' headers and writes `bytes` (whole blocks); durable on return. Gives the place of the first
    /// byte.
    pub fn append<'a>(&mut self, bytes: &mut [u8], entries: impl Iterator<Item = &'a Entry>) -> Result<Place, Failure> {
        debug_assert!(bytes.len().is_multiple_of(BLOCK_BYTES));
        let segment = match &self.segment {
            Some(segment) if self.offset + bytes.len() as u64 <= segment.bytes() => segment.clone(),
            _ => {
                let next = self.log.begin_next()?;
                self.offset = BLOCK_BYTES as u64;
                self.segment = Some(next.clone());
                next
            }
        };
        let place = Place { segment: segment.sequence(), offset: self.offset };
        let mut chain = self.chain;
        for entry in entries {
            let header = entry.header(place.segment, place.offset + entry.at as u64, chain).encode();
            bytes[entry.at..entry.at + ENTRY_HEADER_BYTES].copy_from_slice(&header);
            chain = u32::from_le_bytes([header[68], header[69], header[70], header[71]]);
        }
        failpoint::hit(failpoint::LAND_BEFORE);
        write(segment.file(), bytes, place.offset).map_err(|e| Failure::io("the landing log", &e))?;
        failpoint::hit(failpoint::LAND_AFTER);
        self.chain = chain;
        self.offset += bytes.len() as u64;
        Ok(place)
    }
}

fn write(file: &DirectFile, bytes: &[u8], offset: u64) -> Result<(), IoError> {
    if failpoint::due(failpoint::LAND_TORN) {
        let half = (bytes.len() / 2).next_multiple_of(BLOCK_BYTES).min(bytes.len() - BLOCK_BYTES.min(bytes.len()));
        file.write_all_at_durable(&bytes[..half], offset)?;
        failpoint::crash(failpoint::LAND_TORN);
    }
    file.write_all_at_durable(bytes, offset)
}

const _: () = assert!(core::mem::offset_of!(varve_common::format::EntryHeader, header_crc) == 68);
