//! One preallocated file of the landing log.

use crate::failpoint;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use varve_common::format::{BLOCK_BYTES, FormatError, SegmentHeader};
use varve_io::{AlignedBuf, DirectFile, IoError, crashsafe, sparse};
use zerocopy::IntoBytes;

/// How a segment is called while it is being made.
const TEMPORARY_SUFFIX: &str = "new";
/// How it is called.
const SUFFIX: &str = "seg";
const ZEROES_BYTES: usize = 1 << 20;

/// A segment. It may be read by several threads; the writer alone writes.
#[derive(Debug)]
pub struct Segment {
    file: DirectFile,
    sequence: AtomicU64,
}

impl Segment {
    /// Makes a new one. In advance it is filled with zeroes: a synced append to blocks that were written before costs a third of
    /// one to blocks that are only allocated. When it is needed at once that can wait for its second use: filling it takes longer than
    /// a ring has room for.
    pub fn create(dir: &Path, slot: u64, bytes: u64, in_advance: bool) -> Result<Self, IoError> {
        let temporary = dir.join(format!("{slot:016x}.{TEMPORARY_SUFFIX}"));
        let path = path_of(dir, slot);
        crashsafe::remove_durable(&temporary)?;
        let made = make(&temporary, bytes, in_advance).and_then(|()| {
            failpoint::hit(failpoint::SEGMENT_MADE);
            std::fs::rename(&temporary, &path).map_err(|e| IoError::new("rename a new segment to", &path, e))
        });
        if let Err(error) = made {
            // Half a segment on a full disk is only in the way. The first error is the one to report.
            let _ = std::fs::remove_file(&temporary);
            return Err(error);
        }
        crashsafe::fsync_dir(dir)?;
        Ok(Self { file: DirectFile::open_rw(path)?, sequence: AtomicU64::new(0) })
    }

    /// Opens one that exists. One whose header is blank or damaged was never put to use (its header is durable before
    /// anything is put into it), so its sequence number is 0; one of another version is refused.
    pub fn open(path: &Path, group: [u8; 16]) -> Result<Result<Self, FormatError>, IoError> {
        let file = DirectFile::open_rw(path)?;
        // What a write left whose sync failed, or was killed, can be read here: it is acknowledged from here on.
        file.sync_data()?;
        let mut block = AlignedBuf::new(BLOCK_BYTES);
        let sequence = if file.len() < BLOCK_BYTES as u64 {
            0
        } else {
            file.read_exact_at(&mut block, 0)?;
            match SegmentHeader::decode(&block) {
                Ok(header) if header.group == group && header.bytes.get() == file.len() => header.sequence.get(),
                Err(version @ FormatError::Version { .. }) => return Ok(Err(version)),
                Ok(_) | Err(FormatError::Damaged(_)) => 0,
            }
        };
        Ok(Ok(Self { file, sequence: AtomicU64::new(sequence) }))
    }

    /// Puts it to (new) use: from here on every entry of an earlier life is void.
    pub fn begin(&self, group: [u8; 16], sequence: u64) -> Result<(), IoError> {
        let mut block = AlignedBuf::new(BLOCK_BYTES);
        let header = SegmentHeader::new(group, sequence, self.bytes());
        block[..size_of::<SegmentHeader>()].copy_from_slice(header.as_bytes());
        self.file.write_all_at_durable(&block, 0)?;
        self.sequence.store(sequence, Ordering::Release);
        failpoint::hit(failpoint::SEGMENT_BEGUN);
        Ok(())
    }

    /// Its number in the log; 0 if it was never put to use.
    pub fn sequence(&self) -> u64 {
        self.sequence.load(Ordering::Acquire)
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.file.len()
    }

    /// The file.
    pub fn file(&self) -> &DirectFile {
        &self.file
    }
}

fn make(path: &Path, bytes: u64, in_advance: bool) -> Result<(), IoError> {
    let file = DirectFile::create_new(path, bytes, 0o600)?;
    match sparse::preallocate(&file, 0, bytes) {
        // A file system without it: the zeroes below allocate as well.
        Err(e) if e.errno() == Some(nix::errno::Errno::EOPNOTSUPP as i32) => {}
        Ok(()) if !in_advance => return file.sync_data(),
        other => other?,
    }
    let zeroes = AlignedBuf::new(ZEROES_BYTES);
    let mut at = 0;
    while at < bytes {
        let piece = (bytes - at).min(ZEROES_BYTES as u64);
        file.write_all_at(&zeroes[..piece as usize], at)?;
        at += piece;
    }
    file.sync_data()
}

fn path_of(dir: &Path, slot: u64) -> PathBuf {
    dir.join(format!("{slot:016x}.{SUFFIX}"))
}

/// The slots of all segments in `dir`; what was left half made is removed.
pub fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>, IoError> {
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
