//! Plain disks: in memory, and a file. For tests, examples and measurements of what serving alone costs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{PoisonError, RwLock};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use crate::disk::{Disk, Stretch};

/// The unit in which a [`MemoryDisk`] knows holes.
const BLOCK_BYTES: usize = 4096;

/// A disk in memory. Blocks of 4 KiB that were never written, or zeroed with `may_unmap`, are holes.
#[derive(Debug)]
pub struct MemoryDisk {
    inner: RwLock<Memory>,
    len: u64,
    read_only: bool,
}

#[derive(Debug)]
struct Memory {
    bytes: Vec<u8>,
    stored: Vec<bool>,
}

impl MemoryDisk {
    /// A disk of `len` bytes, all hole.
    pub fn new(len: usize) -> Self {
        let memory = Memory { bytes: vec![0; len], stored: vec![false; len.div_ceil(BLOCK_BYTES)] };
        Self { inner: RwLock::new(memory), len: len as u64, read_only: false }
    }

    /// A read-only disk of these bytes, all of them stored.
    pub fn read_only(bytes: Vec<u8>) -> Self {
        let (len, blocks) = (bytes.len() as u64, bytes.len().div_ceil(BLOCK_BYTES));
        Self { inner: RwLock::new(Memory { bytes, stored: vec![true; blocks] }), len, read_only: true }
    }

    /// What it holds.
    pub fn snapshot(&self) -> Vec<u8> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).bytes.clone()
    }
}

impl Disk for MemoryDisk {
    fn len(&self) -> u64 {
        self.len
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let memory = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let at = offset as usize;
        buf.copy_from_slice(memory.bytes.get(at..at + buf.len()).ok_or_else(past_end)?);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if self.read_only {
            return Err(Errno::EROFS.into());
        }
        if buf.is_empty() {
            return Ok(());
        }
        let mut memory = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        let at = offset as usize;
        memory.bytes.get_mut(at..at + buf.len()).ok_or_else(past_end)?.copy_from_slice(buf);
        memory.stored[at / BLOCK_BYTES..(at + buf.len()).div_ceil(BLOCK_BYTES)].fill(true);
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        if self.read_only {
            return Err(Errno::EROFS.into());
        }
        if len == 0 {
            return Ok(());
        }
        let mut memory = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        let (at, end) = (offset as usize, (offset + len) as usize);
        memory.bytes.get_mut(at..end).ok_or_else(past_end)?.fill(0);
        if may_unmap {
            let whole = if end as u64 == self.len { end.div_ceil(BLOCK_BYTES) } else { end / BLOCK_BYTES };
            let first = at.div_ceil(BLOCK_BYTES);
            memory.stored[first..whole.max(first)].fill(false);
        } else {
            memory.stored[at / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES)].fill(true);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn stretch(&self, offset: u64, len: u64) -> io::Result<Stretch> {
        let memory = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let first = offset as usize / BLOCK_BYTES;
        let stored = *memory.stored.get(first).ok_or_else(past_end)?;
        let blocks = memory.stored[first..].iter().take_while(|&&s| s == stored).count();
        let end = ((first + blocks) * BLOCK_BYTES) as u64;
        Ok(Stretch { len: (end - offset).min(len), hole: !stored })
    }
}

fn past_end() -> io::Error {
    io::Error::from(Errno::EINVAL)
}

/// A regular file, through the page cache.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    len: u64,
    read_only: bool,
}

impl FileDisk {
    /// Opens a regular file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(path: impl AsRef<Path>, read_only: bool) -> io::Result<Self> {
        let file = File::options().read(true).write(!read_only).open(path)?;
        let len = file.metadata()?.len();
        Ok(Self { file, len, read_only })
    }

    fn seek(&self, from: u64, whence: Whence) -> io::Result<u64> {
        match lseek(&self.file, from.cast_signed(), whence) {
            Ok(at) => Ok(at.cast_unsigned()),
            // Nothing of the kind before the end.
            Err(Errno::ENXIO) => Ok(self.len),
            Err(e) => Err(e.into()),
        }
    }
}

impl Disk for FileDisk {
    fn len(&self) -> u64 {
        self.len
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let how = if may_unmap { FallocateFlags::FALLOC_FL_PUNCH_HOLE } else { FallocateFlags::FALLOC_FL_ZERO_RANGE };
        let flags = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, flags, offset.cast_signed(), len.cast_signed())?)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn stretch(&self, offset: u64, len: u64) -> io::Result<Stretch> {
        let data = self.seek(offset, Whence::SeekData)?;
        if data > offset {
            return Ok(Stretch { len: (data - offset).min(len), hole: true });
        }
        let hole = self.seek(offset, Whence::SeekHole)?;
        Ok(Stretch { len: hole.saturating_sub(offset).clamp(1, len.max(1)), hole: false })
    }
}
