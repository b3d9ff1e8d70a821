//! The replicas of a group: files or block devices, written in whole blocks past the page cache.

use super::plan::{Piece, Source};
use crate::failpoint;
use crate::failure::Failure;
use crate::limits::{JOINED_BYTES_MAX, JOINED_GAP_BYTES, JOINED_STAGE_BYTES, REPLICA_DEPTH, STAGE_BYTES};
use std::sync::atomic::{AtomicBool, Ordering};
use varve_common::format::BLOCK_BYTES;
use varve_io::{AlignedBuf, DirectFile, IoError, IoQueue, sparse};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// One replica, open.
#[derive(Debug)]
pub struct Replica {
    file: DirectFile,
    volume_bytes: u64,
    /// Written since its last sync.
    dirty: AtomicBool,
}

impl Replica {
    /// Of a volume of `volume_bytes`; the file or device may be larger.
    pub fn new(file: DirectFile, volume_bytes: u64) -> Self {
        // Dirty: an earlier life may have written (an image, above all) and ended before it could sync. A probe reads that
        // back from the device's cache and finds it right, and then nothing but this sync makes it durable.
        Self { file, volume_bytes, dirty: AtomicBool::new(true) }
    }

    /// The file or device.
    pub fn file(&self) -> &DirectFile {
        &self.file
    }

    /// Size of the volume.
    pub fn volume_bytes(&self) -> u64 {
        self.volume_bytes
    }
}

/// All replicas of a group, and what is needed to read and to write them, each by a thread of its own if need be.
pub struct Replicas {
    list: Vec<Replica>,
    queue: IoQueue,
    /// What is read together and lies apart in memory.
    joined: Option<AlignedBuf>,
    writer: Writer,
}

/// The replicas as one thread reads them while another one may write.
pub struct Reading<'a> {
    list: &'a [Replica],
    queue: &'a mut IoQueue,
    joined: &'a mut Option<AlignedBuf>,
}

/// A volume, an offset, and memory to fill from there.
type Read<'a> = (u16, u64, &'a mut [u8]);

/// Consecutive reads of a volume that are made with one request, if they are more than one: then with what lies between them.
struct Join {
    reads: usize,
    start: u64,
    end: u64,
}

/// What writes them.
pub struct Writer {
    queue: IoQueue,
    stage: Option<AlignedBuf>,
    parts: Vec<Piece>,
    fill: Fill,
}

/// What the stage will hold when it is full: not copied before the blocks that are only partly overwritten are read.
#[derive(Debug, Default)]
struct Fill {
    used: usize,
    runs: Vec<Run>,
    copies: Vec<Copy>,
    /// Blocks that must be read first: offset in the stage, volume, offset in the volume, bytes.
    reads: Vec<(usize, u16, u64, usize)>,
}

/// Consecutive blocks of one volume.
#[derive(Clone, Copy, Debug)]
struct Run {
    volume: u16,
    start: u64,
    end: u64,
    stage: usize,
    /// Everything before is overwritten, or its block is read.
    covered: u64,
}

#[derive(Clone, Copy, Debug)]
struct Copy {
    stage: usize,
    bytes: usize,
    source: Option<Source>,
}

impl Replicas {
    /// Takes the open replicas in the order of their volumes.
    pub fn new(list: Vec<Replica>) -> Result<Self, IoError> {
        let [queue, writes] = [IoQueue::new(REPLICA_DEPTH)?, IoQueue::new(REPLICA_DEPTH)?];
        let writer = Writer { queue: writes, stage: None, parts: Vec::new(), fill: Fill::default() };
        Ok(Self { list, queue, joined: None, writer })
    }

    /// Writes sorted, disjoint pieces, with nobody reading beside it: see [`Writer::apply`].
    ///
    /// # Errors
    /// What was written is not known then.
    pub fn apply(&mut self, pieces: &[Piece], buffers: &[&[u8]]) -> Result<(), Failure> {
        self.writer.apply(&self.list, pieces, buffers)
    }

    /// For reading, and for writing beside it.
    pub fn split(&mut self) -> (Reading<'_>, &mut Writer) {
        (Reading { list: &self.list, queue: &mut self.queue, joined: &mut self.joined }, &mut self.writer)
    }

    /// All of them, in the order of their volumes.
    pub fn all(&self) -> &[Replica] {
        &self.list
    }

    /// The replica of a volume.
    pub fn get(&self, volume: u16) -> Option<&Replica> {
        self.list.get(usize::from(volume))
    }

    /// Frees memory that is only needed while there is work.
    pub fn rest(&mut self) {
        (self.writer.stage, self.joined) = (None, None);
    }

    /// Makes everything written before durable.
    pub fn sync(&mut self) -> Result<(), Failure> {
        for (volume, replica) in self.list.iter().enumerate() {
            if replica.dirty.load(Ordering::Acquire) {
                replica.file.sync_data().map_err(|e| failed(volume as u16, &e))?;
                replica.dirty.store(false, Ordering::Release);
            }
        }
        Ok(())
    }
}

impl<'a> Reading<'a> {
    /// All of them, in the order of their volumes.
    pub fn all(&self) -> &'a [Replica] {
        self.list
    }

    /// The replica of a volume.
    pub fn get(&self, volume: u16) -> Option<&'a Replica> {
        self.list.get(usize::from(volume))
    }

    /// Fills buffers from (volume, offset), at queue depth. Offsets and lengths are whole blocks but at a replica's end. What lies
    /// close together, in this order, is read together.
    pub fn read(&mut self, reads: &mut [Read<'_>]) -> Result<(), Failure> {
        let mut rest = reads;
        while !rest.is_empty() {
            let joins = joins(rest);
            let taken = joins.iter().map(|join| join.reads).sum();
            let (now, later) = rest.split_at_mut(taken);
            if taken == joins.len() || self.read_joined(now, &joins).is_err() {
                // The disk may be damaged between what is wanted.
                self.read_each(now)?;
            }
            rest = later;
        }
        Ok(())
    }

    fn read_each(&mut self, reads: &mut [Read<'_>]) -> Result<(), Failure> {
        let files: Vec<&DirectFile> = self.list.iter().map(|replica| &replica.file).collect();
        self.queue.read_batch(&files, &mut numbered(reads)).map_err(|e| Failure::io("a replica", &e))
    }

    fn read_joined(&mut self, reads: &mut [Read<'_>], joins: &[Join]) -> Result<(), IoError> {
        let joined = self.joined.get_or_insert_with(|| AlignedBuf::new(JOINED_STAGE_BYTES));
        let files: Vec<&DirectFile> = self.list.iter().map(|replica| &replica.file).collect();
        let mut batch: Vec<(usize, u64, &mut [u8])> = Vec::with_capacity(joins.len());
        let (mut left, mut room) = (&mut *reads, &mut joined[..]);
        for join in joins {
            let (these, after) = left.split_at_mut(join.reads);
            left = after;
            let volume = usize::from(these[0].0);
            if let [(_, offset, buf)] = these {
                batch.push((volume, *offset, &mut **buf));
            } else {
                let (here, after) = room.split_at_mut(join.stage_bytes());
                room = after;
                batch.push((volume, join.start, &mut here[..(join.end - join.start) as usize]));
            }
        }
        self.queue.read_batch(&files, &mut batch)?;
        let (mut left, mut at) = (reads, 0);
        for join in joins {
            let (these, after) = left.split_at_mut(join.reads);
            left = after;
            if join.reads > 1 {
                for (_, offset, buf) in these {
                    let from = at + (*offset - join.start) as usize;
                    buf.copy_from_slice(&joined[from..from + buf.len()]);
                }
                at += join.stage_bytes();
            }
        }
        Ok(())
    }

    /// The first byte from `at` on that may be something else than zero; `None`: there is none.
    pub fn next_data(&self, volume: u16, at: u64) -> Result<Option<u64>, Failure> {
        let Some(replica) = self.get(volume) else { return Ok(None) };
        let data = sparse::next_data(&replica.file, at).map_err(|e| failed(volume, &e))?;
        Ok(data.map(|(start, _)| start))
    }
}

impl Join {
    /// What it takes of the memory for joined reads.
    fn stage_bytes(&self) -> usize {
        ((self.end - self.start) as usize).next_multiple_of(BLOCK_BYTES)
    }
}

/// Joins reads from the front as far as the memory for them goes, at least one. A third of what is read is wanted: an SSD reads that
/// in the time that the requests would take, a disk that turns in much less.
fn joins(reads: &[Read<'_>]) -> Vec<Join> {
    let (mut joins, mut used) = (Vec::with_capacity(reads.len()), 0);
    let mut at = 0;
    while let Some((volume, offset, buf)) = reads.get(at) {
        let mut join = Join { reads: 1, start: *offset, end: offset + buf.len() as u64 };
        let mut wanted = buf.len() as u64;
        while let Some((next, offset, buf)) = reads.get(at + join.reads) {
            let (end, with) = (offset + buf.len() as u64, wanted + buf.len() as u64);
            // A long one is worth a request, and not worth a copy.
            let short = (wanted / join.reads as u64).max(buf.len() as u64) <= JOINED_GAP_BYTES;
            let near = short && next == volume && (join.end..=join.end + JOINED_GAP_BYTES).contains(offset);
            if !near || end - join.start > JOINED_BYTES_MAX.min(3 * with) {
                break;
            }
            join = Join { reads: join.reads + 1, end, ..join };
            wanted = with;
        }
        if join.reads > 1 {
            used += join.stage_bytes();
            if used > JOINED_STAGE_BYTES {
                break;
            }
        }
        at += join.reads;
        joins.push(join);
    }
    joins
}

/// As the queue wants it: volumes are numbers of files.
fn numbered<'a>(reads: &'a mut [Read<'_>]) -> Vec<(usize, u64, &'a mut [u8])> {
    reads.iter_mut().map(|(volume, offset, buf)| (usize::from(*volume), *offset, &mut **buf)).collect()
}

fn replica(list: &[Replica], volume: u16) -> Result<&Replica, Failure> {
    let replica = list.get(usize::from(volume));
    replica.ok_or_else(|| Failure::damaged(format!("a change of volume {volume}, which the group does not have")))
}

/// Makes holes of whole blocks of zeroes; everything else goes to `parts`.
fn punch(list: &[Replica], pieces: &[Piece], parts: &mut Vec<Piece>) -> Result<(), Failure> {
    for piece in pieces {
        if piece.source.is_some() {
            parts.push(*piece);
            continue;
        }
        let replica = replica(list, piece.volume)?;
        let last_block = replica.file.len() - replica.file.len() % BLOCK;
        let inner = piece.start.next_multiple_of(BLOCK);
        // A file's tail is no whole block, but it can be punched; past a volume's end the device is not ours.
        let whole_tail = piece.end == replica.file.len() && !replica.file.is_block_device();
        let outer = if whole_tail { piece.end } else { (piece.end - piece.end % BLOCK).min(last_block) };
        if inner >= outer {
            parts.push(*piece);
            continue;
        }
        sparse::punch_hole(&replica.file, inner, outer - inner).map_err(|e| failed(piece.volume, &e))?;
        replica.dirty.store(true, Ordering::Release);
        for (start, end) in [(piece.start, inner), (outer, piece.end)] {
            if start < end {
                parts.push(Piece { start, end, ..*piece });
            }
        }
    }
    Ok(())
}

impl Writer {
    /// Writes sorted, disjoint pieces; `buffers` are what their sources name. Not durable before [`Replicas::sync`].
    /// Whole blocks of zeroes become holes where that is possible.
    pub fn apply(&mut self, list: &[Replica], pieces: &[Piece], buffers: &[&[u8]]) -> Result<(), Failure> {
        let mut parts = std::mem::take(&mut self.parts);
        parts.clear();
        let result = punch(list, pieces, &mut parts).and_then(|()| self.write_parts(list, &parts, buffers));
        self.parts = parts;
        result
    }

    fn write_parts(&mut self, list: &[Replica], parts: &[Piece], buffers: &[&[u8]]) -> Result<(), Failure> {
        for part in parts {
            let len = replica(list, part.volume)?.file.len();
            let (mut at, mut source) = (part.start, part.source);
            while at < part.end {
                let took = self.fill.add(&Piece { start: at, source, ..*part }, len);
                at += took;
                source = source.map(|source| Source { offset: source.offset + took as u32, ..source });
                if at < part.end {
                    self.flush(list, buffers)?;
                }
            }
        }
        self.flush(list, buffers)
    }

    /// Reads what must be read, copies, writes.
    fn flush(&mut self, list: &[Replica], buffers: &[&[u8]]) -> Result<(), Failure> {
        if self.fill.runs.is_empty() {
            return Ok(());
        }
        self.fill.close_run();
        let stage = self.stage.get_or_insert_with(|| AlignedBuf::new(STAGE_BYTES));
        let files: Vec<&DirectFile> = list.iter().map(|replica| &replica.file).collect();
        let fill = &mut self.fill;
        if !fill.reads.is_empty() {
            let mut reads = Vec::with_capacity(fill.reads.len());
            let (mut rest, mut at) = (&mut stage[..], 0);
            for &(stage_at, volume, offset, bytes) in &fill.reads {
                let (block, after) = rest.split_at_mut(stage_at - at).1.split_at_mut(bytes);
                (rest, at) = (after, stage_at + bytes);
                reads.push((usize::from(volume), offset, block));
            }
            self.queue.read_batch(&files, &mut reads).map_err(|e| Failure::io("a replica", &e))?;
        }
        for copy in &fill.copies {
            let target = &mut stage[copy.stage..copy.stage + copy.bytes];
            match copy.source {
                Some(Source { buffer, offset }) => {
                    target.copy_from_slice(&buffers[buffer as usize][offset as usize..][..copy.bytes]);
                }
                None => target.fill(0),
            }
        }
        let write = |run: &Run| {
            let bytes = &stage[run.stage..run.stage + (run.end - run.start) as usize];
            (usize::from(run.volume), run.start, bytes)
        };
        let mut writes: Vec<_> = fill.runs.iter().map(write).collect();
        let torn = failpoint::due(failpoint::APPLY_HALF);
        if torn {
            writes.truncate(writes.len() / 2);
        }
        self.queue.write_batch(&files, &writes).map_err(|e| Failure::io("a replica", &e))?;
        if torn {
            failpoint::crash(failpoint::APPLY_HALF);
        }
        for run in &fill.runs {
            list[usize::from(run.volume)].dirty.store(true, Ordering::Release);
        }
        fill.clear();
        Ok(())
    }
}

fn failed(volume: u16, error: &IoError) -> Failure {
    Failure::io(&format!("replica {volume}"), error)
}

impl Fill {
    fn clear(&mut self) {
        self.used = 0;
        self.runs.clear();
        self.copies.clear();
        self.reads.clear();
    }

    /// Takes as much of the front of `part` as there is room for; gives the bytes taken (at least one if the stage is
    /// empty). What is taken ends at the part's end or at a block boundary. `len` is the replica's size.
    fn add(&mut self, part: &Piece, len: u64) -> u64 {
        let block = part.start - part.start % BLOCK;
        let continues = self.runs.last().is_some_and(|run| run.volume == part.volume && block <= run.end);
        if !continues {
            self.close_run();
            self.used = self.used.next_multiple_of(BLOCK_BYTES);
            if self.used == STAGE_BYTES {
                return 0;
            }
            self.runs.push(Run { volume: part.volume, start: block, end: block, stage: self.used, covered: block });
        }
        let room = (STAGE_BYTES - self.used) as u64;
        let Some(run) = self.runs.last_mut() else { return 0 };
        let wanted_end = part.end.next_multiple_of(BLOCK).min(len);
        let end = wanted_end.min(run.end + room).max(run.end);
        let taken_end = part.end.min(end);
        if taken_end <= part.start {
            return 0;
        }
        if part.start > run.covered {
            // A stretch that nobody overwrites, in one block or two.
            let (first, second) = (run.covered, part.start);
            self.need(first, len);
            self.need(second, len);
        }
        let Some(run) = self.runs.last_mut() else { return 0 };
        self.used += (end - run.end) as usize;
        run.end = end;
        run.covered = taken_end;
        let stage = run.stage + (part.start - run.start) as usize;
        self.copies.push(Copy { stage, bytes: (taken_end - part.start) as usize, source: part.source });
        taken_end - part.start
    }

    /// The block around `at` of the last run must be read, unless `at` is a block boundary.
    fn need(&mut self, at: u64, len: u64) {
        let Some(run) = self.runs.last() else { return };
        let block = at - at % BLOCK;
        if at == block {
            return;
        }
        let stage = run.stage + (block - run.start) as usize;
        if self.reads.last().is_none_or(|last| last.0 != stage) {
            self.reads.push((stage, run.volume, block, (len - block).min(BLOCK) as usize));
        }
    }

    /// The last run ends: what is left of its last block must be read.
    fn close_run(&mut self) {
        let Some(run) = self.runs.last().copied() else { return };
        if run.covered < run.end {
            self.need(run.covered, run.end);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    const BYTES: u64 = (40 << 20) + 3 * 512;

    /// Dense, sparse, in order or not, up to an odd end: the bytes that are wanted, where they are wanted.
    #[test]
    fn joined_reads_bring_the_same() {
        let seed = rand::random();
        eprintln!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let dir = tempfile::TempDir::new_in("/var/tmp").unwrap();
        let mut contents = Vec::new();
        let open = |name: &str| {
            let mut bytes = vec![0; BYTES as usize];
            rng.fill(&mut bytes[..]);
            std::fs::write(dir.path().join(name), &bytes).unwrap();
            contents.push(bytes);
            Replica::new(DirectFile::open_rw(dir.path().join(name)).unwrap(), BYTES)
        };
        let mut replicas = Replicas::new(["a", "b"].map(open).into()).unwrap();
        for density in [0.9, 0.5, 0.3, 0.05] {
            let mut places: Vec<(u16, u64, usize)> = Vec::new();
            for volume in 0..2 {
                let mut at = 0;
                while at < BYTES {
                    let bytes = (BYTES - at).min(BLOCK * rng.random_range(1..=16));
                    if rng.random_bool(density) {
                        places.push((volume, at, bytes as usize));
                    }
                    at += bytes;
                }
            }
            if rng.random_bool(0.2) {
                places.reverse();
            }
            let mut memory = AlignedBuf::new((2 * BYTES as usize).next_multiple_of(BLOCK_BYTES) + (1 << 20));
            let mut rest = &mut memory[..];
            let mut reads: Vec<Read<'_>> = Vec::new();
            for (volume, offset, bytes) in &places {
                let (here, after) = rest.split_at_mut(bytes.next_multiple_of(BLOCK_BYTES));
                reads.push((*volume, *offset, &mut here[..*bytes]));
                rest = after;
            }
            replicas.split().0.read(&mut reads).unwrap();
            for (volume, offset, buf) in reads {
                let expected = &contents[usize::from(volume)][offset as usize..][..buf.len()];
                assert!(*buf == *expected, "{} bytes at {offset} of {volume}, density {density}", buf.len());
            }
        }
    }
}
