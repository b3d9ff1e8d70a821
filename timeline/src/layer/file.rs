//! Any layer, for reading.

use super::walk::{Manner, Step, Walk, Window, points_of, settle};
use super::{ChunkInfo, Damage, FIRST_CHUNK, LAYER_FILE_BYTES_MAX, Recovered, data_start, path_of};
use crate::entry::{Entry, Stored};
use crate::error::HistoryError;
use crate::limits::{GRANULE_BYTES, SECTOR_BYTES};
use std::cell::RefCell;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use varve_common::format::BLOCK_BYTES;
use varve_common::format::layer::{CHUNK_HEADER_BYTES, ChunkHeader, LayerHeader, Point, Points};
use varve_io::{AlignedBuf, DirectFile, IoError};

thread_local! {
    /// For one record: as stored with the blocks around it, and decompressed. Per thread, so that readers share a layer
    /// without a lock and without allocating.
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        stored: AlignedBuf::new(GRANULE_BYTES as usize + 2 * BLOCK_BYTES),
        plain: AlignedBuf::new(GRANULE_BYTES as usize),
    });
}

struct Scratch {
    stored: AlignedBuf,
    plain: AlignedBuf,
}

/// See the module's text. Shared between threads; it does not change what it reads.
#[derive(Clone, Debug)]
pub struct LayerFile {
    file: Arc<DirectFile>,
    header: LayerHeader,
    /// Nothing behind it counts. It grows while the layer is open.
    end: Arc<AtomicU64>,
}

/// What to read for one record, aligned for direct I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadPlan {
    /// Offset in the file, a multiple of 4096.
    pub offset: u64,
    /// Bytes to read; 0 if nothing is stored.
    pub bytes: usize,
    /// Where in them the stored bytes begin; they are [`Entry::stored_bytes`] long.
    pub inner: usize,
}

/// What a scrub tells of while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// A chunk was read. The place to wait, so that a scrub keeps to its rate.
    Chunk(ChunkInfo),
    /// A record in the chunk after the one that was told of last is damaged.
    Record {
        /// The whole record.
        entry: Entry,
        /// What was found.
        what: String,
    },
}

/// What a scrub has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// Whole chunks.
    pub chunks: u64,
    /// Records in them.
    pub records: u64,
    /// Those of them whose bytes are damaged.
    pub damaged_records: u64,
    /// Bytes of the layer up to where it ends.
    pub bytes: u64,
    /// All changes with a stamp up to this one are in the layer or in earlier ones. If the next layer begins at another
    /// height, whole chunks are missing at the end.
    pub complete_to: u64,
    /// Chunks that are damaged.
    pub damage: Vec<Damage>,
    /// It was ended by the callback.
    pub stopped: bool,
}

impl LayerFile {
    /// Opens layer `number` in `dir`. Only its header is read. To be used for closed layers: of one that is still open, all
    /// space that is reserved would count as damage; [`super::OpenLayer::reader`] is for that.
    ///
    /// # Errors
    /// If it is missing, not a layer of this group with this number, or cannot be read.
    pub fn open(dir: &Path, group: [u8; 16], number: u32) -> Result<Self, HistoryError> {
        let path = path_of(dir, number);
        let file = DirectFile::open_read(&path).map_err(|e| missing(&path, e))?;
        let header = read_header(&file, &group, number)?;
        let end = Arc::new(AtomicU64::new(file.len().min(LAYER_FILE_BYTES_MAX)));
        Ok(Self { file: Arc::new(file), header, end })
    }

    pub(super) fn of_open(file: Arc<DirectFile>, header: LayerHeader, end: Arc<AtomicU64>) -> Self {
        Self { file, header, end }
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.header.number.get()
    }

    /// All changes with a stamp up to this one are in earlier layers.
    pub fn first_height(&self) -> u64 {
        self.header.first_height.get()
    }

    /// When it was begun: no point in it is earlier.
    pub fn time_ns(&self) -> u64 {
        self.header.time_ns.get()
    }

    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// The file, for reading what [`LayerFile::plan_read`] says.
    pub fn file(&self) -> &DirectFile {
        &self.file
    }

    /// Reads what `entry` speaks for into `out`, which is [`Entry::sectors`] long.
    ///
    /// # Errors
    /// If the record is damaged or cannot be read; `out` then holds anything.
    pub fn read(&self, entry: &Entry, out: &mut [u8]) -> Result<(), HistoryError> {
        let plan = self.plan_read(entry)?;
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { stored, plain } = scratch;
            let block = &mut stored[..plan.bytes];
            if plan.bytes > 0 {
                self.file.read_exact_at(block, plan.offset).map_err(|e| match e.kind() {
                    // Cut off after it was opened.
                    io::ErrorKind::UnexpectedEof => self.damaged(plan.offset, e.chain()),
                    _ => e.into(),
                })?;
            }
            let stored = block.get(plan.inner..plan.inner + entry.stored_bytes as usize).unwrap_or_default();
            self.finish(entry, stored, plain, out)
        })
    }

    /// What to read so that [`LayerFile::finish_read`] can be given the stored bytes: for many reads at once.
    ///
    /// # Errors
    /// If the entry's record cannot be in this file.
    pub fn plan_read(&self, entry: &Entry) -> Result<ReadPlan, HistoryError> {
        if entry.layer != self.number() || !entry.is_possible() {
            return Err(self.damaged(u64::from(entry.offset), "an index names a record that cannot be here"));
        }
        if entry.stored == Stored::Zero {
            return Ok(ReadPlan::default());
        }
        let (start, end) = (u64::from(entry.offset), self.bytes());
        let stop = start + u64::from(entry.stored_bytes);
        if start < data_start(FIRST_CHUNK) || stop > end {
            return Err(self.damaged(start, format!("a record ends at {stop}, the layer at {end}")));
        }
        let offset = start - start % BLOCK_BYTES as u64;
        // A file that was cut within a block: what is left of it can be read.
        let bytes = (stop.next_multiple_of(BLOCK_BYTES as u64).min(self.file.len()).max(stop) - offset) as usize;
        Ok(ReadPlan { offset, bytes, inner: (start - offset) as usize })
    }

    /// Checks `stored`, the record's stored bytes, and puts what `entry` speaks for into `out`.
    ///
    /// # Errors
    /// If the record is damaged; `out` then holds anything.
    pub fn finish_read(&self, entry: &Entry, stored: &[u8], out: &mut [u8]) -> Result<(), HistoryError> {
        SCRATCH.with_borrow_mut(|scratch| self.finish(entry, stored, &mut scratch.plain, out))
    }

    fn finish(&self, entry: &Entry, stored: &[u8], plain: &mut [u8], out: &mut [u8]) -> Result<(), HistoryError> {
        let sector = SECTOR_BYTES as usize;
        let (skip, bytes) = (usize::from(entry.skip) * sector, usize::from(entry.sectors) * sector);
        if !entry.is_possible() || out.len() != bytes {
            return Err(HistoryError::Limit { what: "what is read of a record", limit: bytes as u64 });
        }
        if entry.stored == Stored::Zero {
            out.fill(0);
            return Ok(());
        }
        let at = u64::from(entry.offset);
        if stored.len() != entry.stored_bytes as usize || crc32fast::hash(stored) != entry.crc {
            return Err(self.damaged(at, "a record's checksum is wrong"));
        }
        if entry.stored == Stored::Plain {
            out.copy_from_slice(&stored[skip..skip + bytes]);
            return Ok(());
        }
        let record_bytes = usize::from(entry.record_sectors) * sector;
        let whole = bytes == record_bytes;
        let target = if whole { &mut *out } else { &mut plain[..record_bytes] };
        if lz4_flex::block::decompress_into(stored, target).ok() != Some(record_bytes) {
            return Err(self.damaged(at, "a record does not decompress"));
        }
        if !whole {
            out.copy_from_slice(&plain[skip..skip + bytes]);
        }
        Ok(())
    }

    fn damaged(&self, offset: u64, what: impl Into<String>) -> HistoryError {
        HistoryError::Damaged { path: self.file.path().to_path_buf(), offset, what: what.into() }
    }

    fn walk(&self) -> Walk<'_> {
        Walk::new(&self.file, &self.header, self.bytes(), Manner::Closed)
    }

    /// All chunks, and what is missing between and behind them; what the device cannot read is missing as well. Tables are
    /// read, data is not.
    ///
    /// # Errors
    /// If it cannot be read for another reason than that the device fails.
    pub fn chunks(&self) -> Result<(Vec<ChunkInfo>, Vec<Damage>), HistoryError> {
        let (mut walk, mut chunks, mut damage) = (self.walk(), Vec::new(), Vec::new());
        loop {
            match walk.next()? {
                Step::Chunk(info) => {
                    settle(&mut damage, walk.entries());
                    chunks.push(info);
                }
                Step::Damaged(found) => damage.push(found),
                Step::End { case, why } => {
                    damage.extend(walk.cut(case, why));
                    return Ok((chunks, damage));
                }
            }
        }
    }

    /// Everything but the data: to make its index (again). What the device cannot read counts as damage.
    ///
    /// # Errors
    /// As [`LayerFile::chunks`].
    pub fn load(&self) -> Result<Recovered, HistoryError> {
        Ok(self.walk().collect(self.time_ns())?.0)
    }

    /// The points of a chunk, in order.
    ///
    /// # Errors
    /// If the chunk is damaged, not there, or cannot be read.
    pub fn points(&self, chunk: &ChunkInfo) -> Result<Vec<Point>, HistoryError> {
        let damaged = || self.damaged(chunk.offset, "a chunk or its points");
        let mut window = Window::new(&self.file, self.bytes());
        let bytes = window.bytes(chunk.offset, CHUNK_HEADER_BYTES)?;
        let header = bytes.and_then(|b| ChunkHeader::decode(b, &self.header.group, self.number(), chunk.offset));
        let header = header.filter(ChunkHeader::is_possible).ok_or_else(damaged)?;
        let start = chunk.offset + header.table_start() + u64::from(header.table_bytes.get());
        let bytes = window.bytes(start, header.points_bytes.get() as usize)?.ok_or_else(damaged)?;
        points_of(&header, bytes).ok_or_else(damaged)?;
        let (count, first_height) = (header.points.get(), header.first_height.get());
        Points::new(bytes, count, first_height, header.first_time_ns.get()).collect::<Option<_>>().ok_or_else(damaged)
    }

    /// Reads every stored byte again and checks it. It goes on behind whatever is damaged, also what the device cannot
    /// read, and stops when `tell` says so.
    ///
    /// # Errors
    /// As [`LayerFile::chunks`].
    pub fn scan(&self, mut tell: impl FnMut(Finding) -> ControlFlow<()>) -> Result<Scanned, HistoryError> {
        let mut walk = self.walk();
        let plain = vec![0; GRANULE_BYTES as usize];
        let mut scan = Scan { layer: self, found: Scanned::default(), tell: &mut tell, data: None, plain };
        loop {
            match walk.next()? {
                Step::Chunk(info) => {
                    settle(&mut scan.found.damage, walk.entries());
                    scan.found.chunks += 1;
                    scan.found.records += walk.entries().len() as u64;
                    let told = match scan.records(&info, walk.entries())? {
                        ControlFlow::Continue(()) => (scan.tell)(Finding::Chunk(info)),
                        stop => stop,
                    };
                    if told.is_break() {
                        scan.found.stopped = true;
                        break;
                    }
                }
                Step::Damaged(damage) => scan.found.damage.push(damage),
                Step::End { case, why } => {
                    scan.found.damage.extend(walk.cut(case, why));
                    break;
                }
            }
        }
        (scan.found.bytes, scan.found.complete_to) = (walk.at(), walk.complete_to());
        Ok(scan.found)
    }
}

/// A scrub under way.
struct Scan<'a, F> {
    layer: &'a LayerFile,
    found: Scanned,
    tell: &'a mut F,
    /// A whole chunk; as long as the longest so far.
    data: Option<AlignedBuf>,
    plain: Vec<u8>,
}

impl<F: FnMut(Finding) -> ControlFlow<()>> Scan<'_, F> {
    /// Checks the records of one chunk.
    fn records(&mut self, info: &ChunkInfo, entries: &[Entry]) -> Result<ControlFlow<()>, HistoryError> {
        let bytes = info.bytes as usize;
        if self.data.as_ref().is_none_or(|data| data.len() < bytes) {
            self.data = Some(AlignedBuf::new(bytes));
        }
        let Some(data) = &mut self.data else { return Ok(ControlFlow::Continue(())) };
        let whole = match self.layer.file.read_exact_at(&mut data[..bytes], info.offset) {
            Ok(()) => true,
            // Some sector of it: each record is read for itself, to know which.
            Err(e) if cannot_be_read(&e) => false,
            Err(e) => return Err(e.into()),
        };
        for entry in entries {
            let out = &mut self.plain[..usize::from(entry.sectors) * SECTOR_BYTES as usize];
            let checked = if whole {
                let from = (u64::from(entry.offset) - info.offset) as usize;
                let stored = data.get(from..from + entry.stored_bytes as usize).unwrap_or_default();
                self.layer.finish_read(entry, stored, out)
            } else {
                self.layer.read(entry, out)
            };
            let what = match checked {
                Ok(()) => continue,
                Err(HistoryError::Damaged { what, .. }) => what,
                Err(HistoryError::Io(e)) if cannot_be_read(&e) => e.chain(),
                Err(e) => return Err(e),
            };
            self.found.damaged_records += 1;
            if (self.tell)(Finding::Record { entry: *entry, what }).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// A file that is not there is named as missing.
pub(super) fn missing(path: &Path, error: IoError) -> HistoryError {
    if error.is_not_found() { HistoryError::Missing { path: path.to_path_buf() } } else { error.into() }
}

/// The header of a layer that must be number `number` of `group`.
pub(super) fn read_header(file: &DirectFile, group: &[u8; 16], number: u32) -> Result<LayerHeader, HistoryError> {
    let damaged = |what: String| HistoryError::Damaged { path: file.path().to_path_buf(), offset: 0, what };
    if file.len() < FIRST_CHUNK {
        return Err(damaged(format!("it ends at {}, within its header", file.len())));
    }
    let mut block = AlignedBuf::new(BLOCK_BYTES);
    file.read_exact_at(&mut block, 0)?;
    let header = LayerHeader::decode(&block)
        .map_err(|source| HistoryError::Format { path: file.path().to_path_buf(), source })?;
    if header.group != *group {
        return Err(damaged("it is a layer of another group".to_owned()));
    }
    if header.number.get() != number {
        return Err(damaged(format!("it is layer {}", header.number.get())));
    }
    Ok(header)
}

/// The device fails there, or the file has been cut since it was opened.
pub(super) fn cannot_be_read(error: &IoError) -> bool {
    error.is_device_failure() || error.kind() == std::io::ErrorKind::UnexpectedEof
}
