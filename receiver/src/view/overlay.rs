//! What is written to a writable view: kept beside it, and gone with it.

use crate::keeper::free_space;
use crate::limits::{OVERLAY_CREDIT_BYTES, OVERLAY_WORDS_MAX};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use varve_common::format::BLOCK_BYTES;
use varve_io::IoError;

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Blocks of one word of the map.
const WORD_BLOCKS: u64 = 64;

/// Blocks in a file without a name: whatever ends the daemon, nothing of it stays.
#[derive(Debug)]
pub struct Overlay {
    file: File,
    /// By 64 blocks: which of them are in the file. 16 bytes for 256 KiB that were written to.
    map: HashMap<u64, u64>,
    len: u64,
    dir: PathBuf,
    /// Bytes that may be written before the free space is looked at again.
    credit: u64,
}

/// A stretch of what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Covered {
    /// Bytes.
    pub len: u64,
    /// Whether the overlay has it.
    pub here: bool,
}

impl Overlay {
    /// An empty one for a disk of `len` bytes, in `dir`.
    pub fn create(dir: &Path, len: u64) -> Result<Self, IoError> {
        let fail = |e| IoError::new("make an overlay in", dir, e);
        let file = tempfile_in(dir).map_err(fail)?;
        file.set_len(len.next_multiple_of(BLOCK)).map_err(fail)?;
        Ok(Self { file, map: HashMap::new(), len, dir: dir.to_path_buf(), credit: 0 })
    }

    fn has(&self, block: u64) -> bool {
        self.map.get(&(block / WORD_BLOCKS)).is_some_and(|word| word & 1 << (block % WORD_BLOCKS) != 0)
    }

    /// The first stretch of at most `len` bytes from `offset` on that is wholly here or wholly not.
    pub fn covered(&self, offset: u64, len: u64) -> Covered {
        let here = self.has(offset / BLOCK);
        let end = offset + len;
        let mut at = (offset / BLOCK + 1) * BLOCK;
        while at < end && self.has(at / BLOCK) == here {
            at += BLOCK;
        }
        Covered { len: at.min(end) - offset, here }
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Reads what [`Overlay::covered`] says is here.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    /// Writes; `None`: zeroes. `below` gives whole blocks of what is under it, for those that are only partly written.
    pub fn write(
        &mut self,
        content: Option<&[u8]>,
        offset: u64,
        len: u64,
        below: impl Fn(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = offset + len;
        self.check_room(if content.is_some() { len } else { 0 }, len)?;
        for edge in [offset, end] {
            let block = edge / BLOCK;
            // The disk's end need not be a block's end: what lies behind it is never read.
            if !edge.is_multiple_of(BLOCK) && edge < self.len && !self.has(block) {
                let mut bytes = [0; BLOCK_BYTES];
                let inside = (self.len - block * BLOCK).min(BLOCK) as usize;
                below(&mut bytes[..inside], block * BLOCK)?;
                self.file.write_all_at(&bytes, block * BLOCK)?;
                self.mark(block);
            }
        }
        match content {
            Some(content) => self.file.write_all_at(content, offset)?,
            None => self.write_zeroes(offset, len)?,
        }
        (offset / BLOCK..end.div_ceil(BLOCK)).for_each(|block| self.mark(block));
        Ok(())
    }

    /// What is written to a view must not cost the history its oldest points, which go when the disk gets full; nor memory
    /// without end.
    fn check_room(&mut self, bytes: u64, covers: u64) -> io::Result<()> {
        let full = || io::Error::from_raw_os_error(nix::libc::ENOSPC);
        if self.map.len() as u64 + covers / (BLOCK * WORD_BLOCKS) > OVERLAY_WORDS_MAX {
            return Err(full());
        }
        if self.credit < bytes {
            let (free, floor) = free_space(&self.dir).ok_or_else(full)?;
            let room = free.saturating_sub(floor + floor / 4);
            self.credit = (room / 4).min(OVERLAY_CREDIT_BYTES).max(bytes);
            if room < self.credit {
                self.credit = 0;
                return Err(full());
            }
        }
        self.credit -= bytes;
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        use nix::fcntl::{FallocateFlags, fallocate};
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let range = (i64::try_from(offset), i64::try_from(len));
        let (Ok(at), Ok(bytes)) = range else { return Err(io::ErrorKind::InvalidInput.into()) };
        Ok(fallocate(&self.file, flags, at, bytes)?)
    }

    fn mark(&mut self, block: u64) {
        *self.map.entry(block / WORD_BLOCKS).or_default() |= 1 << (block % WORD_BLOCKS);
    }

    /// Bytes that it takes on the disk.
    pub fn bytes(&self) -> u64 {
        self.map.values().map(|word| u64::from(word.count_ones()) * BLOCK).sum()
    }
}

fn tempfile_in(dir: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = nix::libc::O_TMPFILE;
    std::fs::OpenOptions::new().read(true).write(true).custom_flags(flags).mode(0o600).open(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LEN: usize = 40_000;

    proptest! {
        #[test]
        fn equals_a_written_copy(steps in prop::collection::vec((0usize..LEN, 1usize..9000, any::<bool>()), 1..40)) {
            let dir = tempfile::tempdir().expect("directory");
            let below: Vec<u8> = (0..LEN).map(|at| (at % 251) as u8).collect();
            let mut model = below.clone();
            let mut overlay = Overlay::create(dir.path(), LEN as u64).expect("overlay");
            let base = |buf: &mut [u8], at: u64| {
                buf.copy_from_slice(&below[at as usize..at as usize + buf.len()]);
                Ok(())
            };
            for (number, (offset, len, zero)) in steps.into_iter().enumerate() {
                let end = (offset + len).min(LEN);
                let content = vec![number as u8 + 1; end - offset];
                let new = (!zero).then_some(&content[..]);
                overlay.write(new, offset as u64, (end - offset) as u64, base).expect("write");
                model[offset..end].fill(if zero { 0 } else { number as u8 + 1 });
            }
            let mut read = vec![0; LEN];
            let mut at = 0;
            while at < LEN {
                let part = overlay.covered(at as u64, (LEN - at) as u64);
                let target = &mut read[at..at + part.len as usize];
                if part.here { overlay.read(target, at as u64) } else { base(target, at as u64) }.expect("read");
                at += part.len as usize;
            }
            prop_assert_eq!(read, model);
            prop_assert!(std::fs::read_dir(dir.path()).expect("list").next().is_none(), "it has no name");
        }
    }
}
