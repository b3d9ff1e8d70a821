//! One preallocated file of the journal, and the directory of them.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use varve_common::format::journal::JournalSegmentHeader;
use varve_common::format::{BLOCK_BYTES, FormatError};
use varve_common::limits::journal_floor;
use varve_common::wire::messages::Incarnation;
use varve_io::{AlignedBuf, DirectFile, IoError, crashsafe, sparse};
use zerocopy::IntoBytes;

/// How a segment is called while it is being made.
const TEMPORARY_SUFFIX: &str = "new";
/// How it is called.
const SUFFIX: &str = "seg";
/// A file of this name says that the journal is empty, whatever the segments hold: they are being recycled.
const EMPTY: &str = "empty";
/// Free segments that are kept when the journal is empty: an outage must not begin with a search for space.
const KEPT: usize = 2;

/// A segment. The spilling thread alone writes, others may read.
#[derive(Debug)]
pub struct Segment {
    file: DirectFile,
}

impl Segment {
    /// Makes one whose space is reserved. It is not filled: what is written to it is written once.
    fn create(dir: &Path, slot: u64, bytes: u64) -> Result<Self, IoError> {
        let temporary = dir.join(format!("{slot:016x}.{TEMPORARY_SUFFIX}"));
        let path = dir.join(format!("{slot:016x}.{SUFFIX}"));
        let made = reserve(&temporary, bytes).and_then(|()| {
            std::fs::rename(&temporary, &path).map_err(|e| IoError::new("rename a new segment to", &path, e))
        });
        if let Err(error) = made {
            // Half a segment on a full disk is only in the way. The first error is the one to report.
            let _ = std::fs::remove_file(&temporary);
            return Err(error);
        }
        crashsafe::fsync_dir(dir)?;
        Ok(Self { file: DirectFile::open_rw(path)? })
    }

    /// The file.
    pub fn file(&self) -> &DirectFile {
        &self.file
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.file.len()
    }

    /// Puts it to (new) use: from here on every chunk of an earlier life is void.
    fn begin(&self, header: &JournalSegmentHeader) -> Result<(), IoError> {
        let mut block = AlignedBuf::new(BLOCK_BYTES);
        block[..size_of::<JournalSegmentHeader>()].copy_from_slice(header.as_bytes());
        self.file.write_all_at_durable(&block, 0)
    }

    /// Whatever chunk begins at `offset` does not count.
    pub fn wipe(&self, offset: u64) -> Result<(), IoError> {
        self.file.write_all_at_durable(&AlignedBuf::new(BLOCK_BYTES), offset)
    }

    /// Nothing in it counts from here on.
    fn void(&self) -> Result<(), IoError> {
        self.file.write_all_at_durable(&AlignedBuf::new(BLOCK_BYTES), 0)
    }
}

fn reserve(path: &Path, bytes: u64) -> Result<(), IoError> {
    crashsafe::remove_durable(path)?;
    let file = DirectFile::create_new(path, bytes, 0o600)?;
    match sparse::preallocate(&file, 0, bytes) {
        // A file system without it: a full disk is then met by a write.
        Err(e) if e.errno() == Some(nix::errno::Errno::EOPNOTSUPP as i32) => {}
        other => other?,
    }
    file.sync_data()
}

/// Why there is no segment to write to.
#[derive(Debug)]
pub enum NoSegment {
    /// A limit; later there may be one.
    Full(String),
    /// The disk failed.
    Failed(IoError),
}

impl From<IoError> for NoSegment {
    fn from(error: IoError) -> Self {
        Self::Failed(error)
    }
}

/// All segments of a group's journal.
#[derive(Debug)]
pub struct Segments {
    dir: PathBuf,
    group: String,
    segment_bytes: u64,
    bytes_max: u64,
    live: BTreeMap<u64, (Arc<Segment>, JournalSegmentHeader)>,
    /// Oldest first, so that those in use have no hole in their numbers.
    free: VecDeque<Arc<Segment>>,
    bytes: u64,
    newest_slot: u64,
    newest_sequence: u64,
}

impl Segments {
    /// Opens (and makes) the directory of a group's journal.
    ///
    /// # Errors
    /// The first step that failed, or the name of a file that another version wrote.
    pub fn open(dir: &Path, group: &str, segment_bytes: u64, bytes_max: u64) -> Result<Self, IoError> {
        let mut segments = Self {
            dir: dir.to_owned(),
            group: group.to_owned(),
            segment_bytes,
            bytes_max,
            live: BTreeMap::new(),
            free: VecDeque::new(),
            bytes: 0,
            newest_slot: 0,
            newest_sequence: 0,
        };
        crashsafe::create_dir_all_durable(dir)?;
        crashsafe::remove_temporaries(dir)?;
        for (slot, path) in list(dir)? {
            segments.newest_slot = segments.newest_slot.max(slot);
            segments.adopt(&path)?;
        }
        if segments.empty_marker().exists() {
            segments.recycle_all()?;
        }
        Ok(segments)
    }

    fn adopt(&mut self, path: &Path) -> Result<(), IoError> {
        let file = DirectFile::open_rw(path)?;
        // What a write left that was killed before its sync can be read here: it may be relied on from here on.
        file.sync_data()?;
        let segment = Arc::new(Segment { file });
        let mut block = AlignedBuf::new(BLOCK_BYTES);
        let header = if segment.bytes() < BLOCK_BYTES as u64 {
            None
        } else {
            segment.file.read_exact_at(&mut block, 0)?;
            match JournalSegmentHeader::decode(&block) {
                Ok(header) if header.is_of(&self.group) && header.bytes.get() == segment.bytes() => Some(header),
                Err(version @ FormatError::Version { .. }) => {
                    let other = std::io::Error::new(std::io::ErrorKind::Unsupported, version.to_string());
                    return Err(IoError::new("read", path, other));
                }
                // Never put to use, or of another group.
                Ok(_) | Err(FormatError::Damaged(_)) => None,
            }
        };
        self.bytes += segment.bytes();
        match header {
            Some(header) => {
                self.newest_sequence = self.newest_sequence.max(header.sequence.get());
                self.live.insert(header.sequence.get(), (segment, header));
            }
            None => self.free.push_back(segment),
        }
        Ok(())
    }

    /// The segments in use, oldest first.
    pub fn live(&self) -> impl Iterator<Item = (&Arc<Segment>, &JournalSegmentHeader)> {
        self.live.values().map(|(segment, header)| (segment, header))
    }

    /// The segment in use with this number.
    pub fn get(&self, sequence: u64) -> Option<(Arc<Segment>, JournalSegmentHeader)> {
        self.live.get(&sequence).cloned()
    }

    /// Puts a segment to use: a free one, or a new one if the limits allow.
    pub fn begin_next(&mut self, incarnation: Incarnation) -> Result<(Arc<Segment>, JournalSegmentHeader), NoSegment> {
        self.drop_misfits()?;
        let segment = match self.free.pop_front() {
            Some(segment) => segment,
            None => self.make()?,
        };
        let sequence = self.newest_sequence + 1;
        let header = JournalSegmentHeader::new(&self.group, incarnation, sequence, segment.bytes());
        if let Err(error) = segment.begin(&header) {
            self.free.push_back(segment);
            return Err(error.into());
        }
        self.newest_sequence = sequence;
        self.live.insert(sequence, (segment.clone(), header));
        Ok((segment, header))
    }

    fn make(&mut self) -> Result<Arc<Segment>, NoSegment> {
        if self.bytes + self.segment_bytes > self.bytes_max {
            return Err(NoSegment::Full(format!("the journal has reached its limit of {} MiB", self.bytes_max >> 20)));
        }
        let room = nix::sys::statvfs::statvfs(&self.dir)
            .map_err(|e| IoError::new("ask for the free space of", &self.dir, e))?;
        let unit = room.fragment_size();
        let floor = journal_floor(room.blocks() * unit);
        if room.blocks_available() * unit < floor + self.segment_bytes {
            let text = format!("{} has less than {} MiB left", self.dir.display(), (floor + self.segment_bytes) >> 20);
            return Err(NoSegment::Full(text));
        }
        match Segment::create(&self.dir, self.newest_slot + 1, self.segment_bytes) {
            Ok(segment) => {
                self.newest_slot += 1;
                self.bytes += self.segment_bytes;
                Ok(Arc::new(segment))
            }
            Err(error) if error.is_no_space() => Err(NoSegment::Full(error.chain())),
            Err(error) => Err(error.into()),
        }
    }

    /// Every segment before the one with this number may be used again.
    pub fn recycle_before(&mut self, sequence: u64) {
        let keep = self.live.split_off(&sequence);
        let done = std::mem::replace(&mut self.live, keep);
        self.free.extend(done.into_values().map(|(segment, _)| segment));
    }

    fn empty_marker(&self) -> PathBuf {
        self.dir.join(EMPTY)
    }

    /// The journal is empty: nothing in any file counts, and most of the space goes back. If this is cut off, no part of it
    /// may be taken for a journal that the ring does not go on from: nothing could be spilled until it was sent.
    pub fn recycle_all(&mut self) -> Result<(), IoError> {
        let done = std::mem::take(&mut self.live);
        let marker = self.empty_marker();
        if !done.is_empty() || !self.free.is_empty() {
            crashsafe::write_atomic(&marker, &[], 0o600)?;
        }
        self.free.extend(done.into_values().map(|(segment, _)| segment));
        let mut kept = VecDeque::new();
        for segment in std::mem::take(&mut self.free) {
            if kept.len() < KEPT && segment.bytes() == self.segment_bytes {
                // Those that were recycled before still say what they held.
                segment.void()?;
                kept.push_back(segment);
            } else {
                self.remove(&segment)?;
            }
        }
        self.free = kept;
        crashsafe::remove_durable(&marker)
    }

    /// Free segments of another size than configured, and more than allowed, go.
    fn drop_misfits(&mut self) -> Result<(), IoError> {
        for segment in std::mem::take(&mut self.free) {
            if self.bytes > self.bytes_max || segment.bytes() != self.segment_bytes {
                self.remove(&segment)?;
            } else {
                self.free.push_back(segment);
            }
        }
        Ok(())
    }

    fn remove(&mut self, segment: &Segment) -> Result<(), IoError> {
        crashsafe::remove_durable(segment.file.path())?;
        self.bytes -= segment.bytes();
        Ok(())
    }
}

/// The slots of all segments in `dir`, in order; what was left half made is removed.
fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>, IoError> {
    let fail = |e| IoError::new("list", dir, e);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let slot = path.file_stem().and_then(|stem| u64::from_str_radix(stem.to_str()?, 16).ok());
        match (slot, path.extension().and_then(|extension| extension.to_str())) {
            (Some(slot), Some(SUFFIX)) => found.push((slot, path)),
            (Some(_), Some(TEMPORARY_SUFFIX)) => crashsafe::remove_durable(&path)?,
            _ => {}
        }
    }
    found.sort_unstable();
    Ok(found)
}
