//! One volume at one point: what `read` finds there, while the replica goes on changing.
//!
//! The race, and why a read is right anyway: the applier makes a before-image findable first, raises the region's version
//! second and overwrites the replica third. So after reading from the replica the version is looked at again: if it is
//! what it was when the parts were resolved, nothing there was overwritten meanwhile; if it is not, the parts are resolved
//! anew, and if those of this read are still the same, neither was anything of them.

use super::overlay::Overlay;
use crate::limits::{
    CATCH_UP_TIME_MAX, VIEW_GAP_BYTES, VIEW_MAPS_BYTES_MAX, VIEW_PIECE_BYTES, VIEW_READ_BYTES, VIEW_READ_DEPTH,
    VIEW_READERS_MAX,
};
use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use varve_common::format::BLOCK_BYTES;
use varve_common::limits::REGION_BYTES;
use varve_export::disk::{Disk, Stretch};
use varve_io::{AlignedBuf, DirectFile, IoError, IoQueue, sparse};
use varve_timeline::entry::Entry;
use varve_timeline::error::HistoryError;
use varve_timeline::layer::LayerFile;
use varve_timeline::limits::{GRANULE_BYTES, SECTOR_BYTES};
use varve_timeline::resolve::{Origin, Part};
use varve_timeline::timeline::Timeline;

const BLOCK: u64 = BLOCK_BYTES as u64;
/// A read that is overtaken this often is given up: each time means that its parts were overwritten since.
const RETRIES_MAX: usize = 10_000;

/// See the module's text.
#[derive(Debug)]
pub struct ViewVolume {
    timeline: Arc<Timeline>,
    /// Also opened by the applier, for writing.
    replica: DirectFile,
    volume: u16,
    bytes: u64,
    height: u64,
    maps: Mutex<Maps>,
    readers: Mutex<Vec<Reader>>,
    overlay: Option<RwLock<Overlay>>,
}

/// What regions consist of, as far as it was asked for. Bounded: beyond the limit all are forgotten.
#[derive(Debug, Default)]
struct Maps {
    regions: HashMap<u64, Map>,
    bytes: usize,
}

/// A region's parts, as they were at a version.
#[derive(Clone, Debug)]
struct Map {
    version: u64,
    parts: Arc<[Part]>,
}

/// What one read in progress needs. Reused.
struct Reader {
    queue: IoQueue,
    buf: AlignedBuf,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reader")
    }
}

/// One read of a file into the reader's memory.
struct Fetch {
    file: usize,
    offset: u64,
    len: usize,
}

impl Fetch {
    /// Every read begins on a block of memory, as O_DIRECT wants it.
    fn room(&self) -> usize {
        self.len.next_multiple_of(BLOCK_BYTES)
    }
}

/// What of a fetch goes where.
struct Wanted {
    fetch: usize,
    /// Where it begins in what is fetched.
    from: usize,
    /// Of a record `from` is where its stored bytes begin.
    record: Option<Record>,
    target: Range<usize>,
}

/// A record of a layer, and which of its plain bytes are wanted.
struct Record(Entry, Range<usize>);

/// What is read at once.
#[derive(Default)]
struct Round {
    fetches: Vec<Fetch>,
    wanted: Vec<Wanted>,
    /// Memory that it takes.
    used: usize,
}

impl ViewVolume {
    /// Of a volume of `bytes` at `height`, which the caller keeps from expiring.
    pub fn new(
        timeline: Arc<Timeline>,
        replica: DirectFile,
        volume: u16,
        bytes: u64,
        height: u64,
        overlay: Option<Overlay>,
    ) -> Self {
        let overlay = overlay.map(RwLock::new);
        let (maps, readers) = Default::default();
        Self { timeline, replica, volume, bytes, height, maps, readers, overlay }
    }

    /// Bytes that were written to it.
    pub fn overlay_bytes(&self) -> u64 {
        self.overlay.as_ref().map_or(0, |overlay| read_lock(overlay).bytes())
    }

    /// What the volume held at the point, without what was written to the view since.
    pub fn read_point(&self, buf: &mut [u8], offset: u64) -> Result<(), HistoryError> {
        self.read(buf, offset, true)
    }

    /// The same without waiting for the replicas to be there: what they lack of the point is to be laid over it.
    pub fn read_beneath(&self, buf: &mut [u8], offset: u64) -> Result<(), HistoryError> {
        self.read(buf, offset, false)
    }

    fn read(&self, buf: &mut [u8], offset: u64, whole: bool) -> Result<(), HistoryError> {
        let mut reader = match lock(&self.readers).pop() {
            Some(reader) => reader,
            None => Reader { queue: IoQueue::new(VIEW_READ_DEPTH)?, buf: AlignedBuf::new(VIEW_READ_BYTES) },
        };
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let in_region = (REGION_BYTES - at % REGION_BYTES) as usize;
            let len = (buf.len() - done).min(in_region).min(VIEW_PIECE_BYTES);
            self.read_piece(&mut reader, &mut buf[done..done + len], at, whole)?;
            done += len;
        }
        let mut readers = lock(&self.readers);
        if readers.len() < VIEW_READERS_MAX {
            readers.push(reader);
        }
        Ok(())
    }

    /// Within one region.
    fn read_piece(&self, reader: &mut Reader, buf: &mut [u8], at: u64, whole: bool) -> Result<(), HistoryError> {
        let region = at / REGION_BYTES;
        let range = at..at + buf.len() as u64;
        for _ in 0..RETRIES_MAX {
            let setbacks = if whole { self.steady()? } else { self.timeline.setbacks() };
            if self.read_once(reader, buf, at, region, &range)? && self.timeline.setbacks() == setbacks {
                return Ok(());
            }
        }
        let what = format!("a read of volume {} at byte {at} was overtaken {RETRIES_MAX} times", self.volume);
        let source = io::Error::new(io::ErrorKind::TimedOut, what);
        Err(IoError::new("read", self.replica.path(), source).into())
    }

    /// Waits until the replicas are at the point or beyond: a group that failed applies again what it had applied before.
    fn steady(&self) -> Result<u64, HistoryError> {
        let setbacks = self.timeline.setbacks();
        if self.timeline.wait_applied(self.height, CATCH_UP_TIME_MAX) {
            return Ok(setbacks);
        }
        let why = "the replicas are not at the point yet: the group failed and has not caught up";
        let source = io::Error::new(io::ErrorKind::TimedOut, why);
        Err(IoError::new("read", self.replica.path(), source).into())
    }

    /// Whether nothing of it was overwritten meanwhile.
    fn read_once(
        &self,
        reader: &mut Reader,
        buf: &mut [u8],
        at: u64,
        region: u64,
        range: &Range<u64>,
    ) -> Result<bool, HistoryError> {
        let map = self.map(region)?;
        self.fetch(reader, &map.parts, buf, at)?;
        if self.timeline.version(self.volume, at) == map.version {
            return Ok(true);
        }
        let newer = self.map(region)?;
        Ok(parts_in(&newer.parts, range).eq(parts_in(&map.parts, range)))
    }

    /// The region's parts as they are now.
    fn map(&self, region: u64) -> Result<Map, HistoryError> {
        let start = region * REGION_BYTES;
        // Before they are resolved: what is published later raises it again.
        let version = self.timeline.version(self.volume, start);
        if let Some(map) = lock(&self.maps).regions.get(&region).filter(|map| map.version == version) {
            return Ok(map.clone());
        }
        let end = (start + REGION_BYTES).min(self.bytes);
        let sectors = (end - start).next_multiple_of(SECTOR_BYTES);
        let parts = self.timeline.resolve(self.volume, start, sectors, self.height)?;
        let map = Map { version, parts: parts.into() };
        lock(&self.maps).put(region, map.clone());
        Ok(map)
    }

    /// Reads what the parts say, however many rounds the memory takes.
    fn fetch(&self, reader: &mut Reader, parts: &[Part], buf: &mut [u8], at: u64) -> Result<(), HistoryError> {
        // The replica may be damaged where it is not wanted.
        self.fetch_over(VIEW_GAP_BYTES, reader, parts, buf, at).or_else(|_| self.fetch_over(0, reader, parts, buf, at))
    }

    /// What is wanted of the replica is read with what lies between, up to a `gap`: fewer reads are faster ones.
    fn fetch_over(
        &self,
        gap: u64,
        reader: &mut Reader,
        parts: &[Part],
        buf: &mut [u8],
        at: u64,
    ) -> Result<(), HistoryError> {
        let range = at..at + buf.len() as u64;
        let mut layers: Vec<Arc<LayerFile>> = Vec::new();
        let mut round = Round::default();
        for part in parts_in(parts, &range) {
            let target = (part.start - at) as usize..(part.end - at) as usize;
            let (fetch, from, record) = match part.origin {
                Origin::Zero => {
                    buf[target].fill(0);
                    continue;
                }
                Origin::Replica => {
                    let offset = part.start / BLOCK * BLOCK;
                    let end = part.end.next_multiple_of(BLOCK).min(self.replica.len());
                    let fetch = Fetch { file: 0, offset, len: (end - offset) as usize };
                    (fetch, (part.start - offset) as usize, None)
                }
                Origin::Record(entry) => self.fetch_record(&entry, &part, target.len(), &mut layers)?,
            };
            if round.join(&fetch, gap, from, &target, reader.buf.len()) {
                continue;
            }
            if round.used + fetch.room() > reader.buf.len() {
                self.round(reader, &layers, &mut round, buf)?;
            }
            round.used += fetch.room();
            round.wanted.push(Wanted { fetch: round.fetches.len(), from, record, target });
            round.fetches.push(fetch);
        }
        self.round(reader, &layers, &mut round, buf)
    }

    /// What to read for `len` bytes of a record, where it begins there, and which of its plain bytes they are.
    fn fetch_record(
        &self,
        entry: &Entry,
        part: &Part,
        len: usize,
        layers: &mut Vec<Arc<LayerFile>>,
    ) -> Result<(Fetch, usize, Option<Record>), HistoryError> {
        let known = layers.iter().position(|layer| layer.number() == entry.layer);
        let file = match known {
            Some(known) => known,
            None => {
                layers.push(self.timeline.layer(entry.layer)?);
                layers.len() - 1
            }
        };
        let plan = layers[file].plan_read(entry)?;
        // The part lies within the entry; a volume's last sector may be cut.
        let skipped = (part.start - entry.address.byte()) as usize;
        let fetch = Fetch { file: file + 1, offset: plan.offset, len: plan.bytes };
        Ok((fetch, plan.inner, Some(Record(*entry, skipped..skipped + len))))
    }

    /// Issues the reads and brings their bytes to where they belong.
    fn round(
        &self,
        reader: &mut Reader,
        layers: &[Arc<LayerFile>],
        round: &mut Round,
        buf: &mut [u8],
    ) -> Result<(), HistoryError> {
        let file = |number: usize| match number.checked_sub(1) {
            None => &self.replica,
            Some(layer) => layers[layer].file(),
        };
        let Round { fetches, wanted, used } = std::mem::take(round);
        let mut reads = Vec::with_capacity(fetches.len());
        let mut rest = &mut reader.buf[..used];
        for fetch in &fetches {
            let (here, after) = rest.split_at_mut(fetch.room());
            reads.push((fetch.file, fetch.offset, &mut here[..fetch.len]));
            rest = after;
        }
        match &mut reads[..] {
            [] => {}
            // The usual one of a database, and a plain read is the shorter way.
            [(number, offset, bytes)] => file(*number).read_exact_at(bytes, *offset)?,
            _ => {
                let files: Vec<&DirectFile> = (0..=layers.len()).map(file).collect();
                reader.queue.read_batch(&files, &mut reads)?;
            }
        }
        let mut plain = [0; GRANULE_BYTES as usize];
        for Wanted { fetch, from, record, target } in wanted {
            let (bytes, target) = (&reads[fetch].2, &mut buf[target]);
            match record {
                None => target.copy_from_slice(&bytes[from..from + target.len()]),
                Some(Record(entry, wanted)) => {
                    let layer = &layers[fetches[fetch].file - 1];
                    let whole = &mut plain[..usize::from(entry.sectors) * SECTOR_BYTES as usize];
                    let stored = bytes.get(from..from + entry.stored_bytes as usize).unwrap_or_default();
                    layer.finish_read(&entry, stored, whole)?;
                    target.copy_from_slice(&whole[wanted]);
                }
            }
        }
        Ok(())
    }

    fn check_writable(&self) -> io::Result<&RwLock<Overlay>> {
        self.overlay.as_ref().ok_or_else(|| io::Error::from_raw_os_error(nix::libc::EROFS))
    }

    fn write_overlay(&self, content: Option<&[u8]>, offset: u64, len: u64) -> io::Result<()> {
        let overlay = self.check_writable()?;
        let below = |buf: &mut [u8], at: u64| self.read_point(buf, at).map_err(as_io);
        write_lock(overlay).write(content, offset, len, below)
    }
}

impl Round {
    /// Reads on from what is already read of the replica, if that is near enough and there is room.
    fn join(&mut self, more: &Fetch, gap: u64, from: usize, target: &Range<usize>, room: usize) -> bool {
        if more.file != 0 {
            return false;
        }
        let Some(number) = self.fetches.iter().rposition(|fetch| fetch.file == 0) else { return false };
        let last = &self.fetches[number];
        let end = last.offset + last.len as u64;
        // Parts are disjoint and in order; two may lie in one block.
        let joined =
            Fetch { file: 0, offset: last.offset, len: (more.offset + more.len as u64 - last.offset) as usize };
        let used = self.used - last.room() + joined.room();
        if more.offset > end + gap || used > room {
            return false;
        }
        let from = (more.offset - last.offset) as usize + from;
        self.wanted.push(Wanted { fetch: number, from, record: None, target: target.clone() });
        (self.fetches[number], self.used) = (joined, used);
        true
    }
}

impl Maps {
    fn put(&mut self, region: u64, map: Map) {
        let bytes = |map: &Map| size_of_val(&map.parts[..]) + 64;
        if self.bytes + bytes(&map) > VIEW_MAPS_BYTES_MAX {
            *self = Self::default();
        }
        self.bytes += bytes(&map);
        if let Some(old) = self.regions.insert(region, map) {
            self.bytes -= bytes(&old);
        }
    }
}

/// The parts of a range, cut to it.
fn parts_in<'a>(parts: &'a [Part], range: &'a Range<u64>) -> impl Iterator<Item = Part> + 'a {
    let first = parts.partition_point(|part| part.end <= range.start);
    parts[first..].iter().take_while(|part| part.start < range.end).map(|part| Part {
        start: part.start.max(range.start),
        end: part.end.min(range.end),
        origin: part.origin,
    })
}

impl Disk for ViewVolume {
    fn len(&self) -> u64 {
        self.bytes
    }

    fn is_read_only(&self) -> bool {
        self.overlay.is_none()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let Some(overlay) = &self.overlay else { return self.read_point(buf, offset).map_err(as_io) };
        // Held over the read below: a block must not move into the overlay between the question and the answer.
        let overlay = read_lock(overlay);
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let covered = overlay.covered(at, (buf.len() - done) as u64);
            let target = &mut buf[done..done + covered.len as usize];
            if covered.here {
                overlay.read(target, at)?;
            } else {
                self.read_point(target, at).map_err(as_io)?;
            }
            done += covered.len as usize;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_overlay(Some(buf), offset, buf.len() as u64)
    }

    fn zero(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        self.write_overlay(None, offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        // What is written to a view is gone when the view is closed or the daemon ends: there is nothing to promise.
        Ok(())
    }

    fn stretch(&self, offset: u64, len: u64) -> io::Result<Stretch> {
        let len = len.min(self.bytes - offset);
        if let Some(overlay) = &self.overlay {
            let covered = read_lock(overlay).covered(offset, len);
            if covered.here {
                return Ok(Stretch { len: covered.len, hole: false });
            }
            return self.stretch_of_point(offset, covered.len);
        }
        self.stretch_of_point(offset, len)
    }
}

impl ViewVolume {
    /// Stretches of one region at a time; a hole of the replica is longer, but what changed there since is not known.
    fn stretch_of_point(&self, offset: u64, len: u64) -> io::Result<Stretch> {
        let in_region = REGION_BYTES - offset % REGION_BYTES;
        let range = offset..offset + len.min(in_region);
        // What is applied again makes holes that are filled again.
        let setbacks = self.steady().map_err(as_io)?;
        let map = self.map(offset / REGION_BYTES).map_err(as_io)?;
        let mut end = offset;
        let mut hole = None;
        for part in parts_in(&map.parts, &range) {
            let (part_end, part_hole) = match part.origin {
                Origin::Zero => (part.end, true),
                Origin::Record(_) => (part.end, false),
                Origin::Replica => self.stretch_of_replica(part.start, part.end)?,
            };
            if *hole.get_or_insert(part_hole) != part_hole {
                break;
            }
            end = part_end;
            if part_end < part.end {
                break;
            }
        }
        // A hole of the replica may have been filled between the questions: the version tells. Or made for a while.
        if self.timeline.version(self.volume, offset) != map.version || self.timeline.setbacks() != setbacks {
            hole = Some(false);
        }
        Ok(Stretch { len: (end - offset).max(1), hole: hole.unwrap_or(false) })
    }

    fn stretch_of_replica(&self, start: u64, end: u64) -> io::Result<(u64, bool)> {
        let data = sparse::next_data(&self.replica, start).map_err(|e| io::Error::other(e.chain()))?;
        Ok(match data {
            Some((from, to)) if from <= start => (to.min(end), false),
            Some((from, _)) => (from.min(end), true),
            None => (end, true),
        })
    }
}

/// For a client of the device: whatever it was, this read failed. The log has the words.
fn as_io(error: HistoryError) -> io::Error {
    tracing::error!(%error, "a read of a view failed");
    io::Error::from_raw_os_error(nix::libc::EIO)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_lock<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write_lock<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

const _: () = assert!(VIEW_READ_BYTES >= VIEW_PIECE_BYTES + 2 * BLOCK_BYTES && VIEW_READ_BYTES >= 96 << 10);
