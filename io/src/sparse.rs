//! Holes, zeroes and allocation of files and block devices.

use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use crate::direct::DirectFile;
use crate::error::IoError;
use crate::sys;

/// The piece in which zeroes are written where nothing better exists, in bytes.
const ZEROES_BYTES: usize = 256 << 10;

/// Makes a range read as zeroes and gives its space back where that is possible.
///
/// A file: a hole. A block device: a write-zeroes that may unmap, which is the only discard whose result is defined; a
/// plain discard may leave anything and is never used. Where neither exists: as [`zero_range`]. Durable
/// after [`DirectFile::sync_data`]. Offset and length may be anything in a file; multiples of the sector in a device.
///
/// # Errors
/// A range past the end: kind `UnexpectedEof`; else the kernel's errno.
pub fn punch_hole(file: &DirectFile, offset: u64, len: u64) -> Result<(), IoError> {
    let Some(range) = check("punch", file, offset, len)? else { return Ok(()) };
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file.buffered(), flags, range.0, range.1) {
        Ok(()) => Ok(()),
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => zero_range(file, offset, len),
        Err(e) => Err(failed("punch", file, offset, len, e)),
    }
}

/// Makes a range read as zeroes and keeps its space, so that a later write to it finds room. Durable
/// after [`DirectFile::sync_data`].
///
/// # Errors
/// As [`punch_hole`].
pub fn zero_range(file: &DirectFile, offset: u64, len: u64) -> Result<(), IoError> {
    let Some(range) = check("zero", file, offset, len)? else { return Ok(()) };
    if file.is_block_device() {
        return sys::block_zero_out(file.buffered(), offset, len).map_err(|e| failed("zero", file, offset, len, e));
    }
    let flags = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file.buffered(), flags, range.0, range.1) {
        Ok(()) => Ok(()),
        // tmpfs, NFS, ...
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => write_zeroes(file, offset, len),
        Err(e) => Err(failed("zero", file, offset, len, e)),
    }
}

/// Buffered, so that any alignment goes; the kernel keeps direct reads behind it coherent.
fn write_zeroes(file: &DirectFile, offset: u64, len: u64) -> Result<(), IoError> {
    let zeroes = vec![0; ZEROES_BYTES];
    let mut done = 0;
    while done < len {
        let piece = usize::try_from(len - done).map_or(ZEROES_BYTES, |left| left.min(ZEROES_BYTES));
        file.buffered()
            .write_all_at(&zeroes[..piece], offset + done)
            .map_err(|e| failed("zero", file, offset + done, piece as u64, e))?;
        done += piece as u64;
    }
    Ok(())
}

/// Reserves the space of a range of a regular file, so that a write to it cannot meet a full disk. The
/// size does not change and holes in it still read as zeroes.
///
/// # Errors
/// ENOSPC if there is no room; EOPNOTSUPP if the file system cannot; as [`punch_hole`] otherwise.
pub fn preallocate(file: &DirectFile, offset: u64, len: u64) -> Result<(), IoError> {
    let Some(range) = check("preallocate", file, offset, len)? else { return Ok(()) };
    if file.is_block_device() {
        return Ok(());
    }
    fallocate(file.buffered(), FallocateFlags::FALLOC_FL_KEEP_SIZE, range.0, range.1)
        .map_err(|e| failed("preallocate", file, offset, len, e))
}

/// The next stretch at or after `offset` that may hold something else than zeroes, as (start, end) in
/// bytes, cut to begin at `offset`; `None` if there is none before the end. A block device is all data,
/// and so is a file where the file system does not keep holes.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn next_data(file: &DirectFile, offset: u64) -> Result<Option<(u64, u64)>, IoError> {
    let len = file.len();
    if offset >= len {
        return Ok(None);
    }
    if file.is_block_device() {
        return Ok(Some((offset, len)));
    }
    let fail = |e: Errno| IoError::new(format!("look for data from {offset} on in"), file.path(), e);
    let seek = |from: u64, whence| lseek(file.buffered(), i64::try_from(from).map_err(|_| Errno::EOVERFLOW)?, whence);
    let start = match seek(offset, Whence::SeekData) {
        Ok(start) => start as u64,
        Err(Errno::ENXIO) => return Ok(None),
        Err(e) => return Err(fail(e)),
    };
    if start >= len {
        return Ok(None);
    }
    let end = match seek(start, Whence::SeekHole) {
        Ok(end) => end as u64,
        // Cut off between the two questions.
        Err(Errno::ENXIO) => return Ok(None),
        Err(e) => return Err(fail(e)),
    };
    Ok(Some((start, end.min(len))))
}

/// The space that a file takes in its file system, in bytes; all of a block device.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn allocated_bytes(file: &DirectFile) -> Result<u64, IoError> {
    if file.is_block_device() {
        return Ok(file.len());
    }
    let stat = file.buffered().metadata().map_err(|e| IoError::new("look at", file.path(), e))?;
    Ok(stat.blocks() * 512)
}

/// The range as the kernel wants it; `None` if it is empty.
fn check(verb: &str, file: &DirectFile, offset: u64, len: u64) -> Result<Option<(i64, i64)>, IoError> {
    if len == 0 {
        return Ok(None);
    }
    match (offset.checked_add(len), i64::try_from(offset), i64::try_from(len)) {
        (Some(end), Ok(offset), Ok(len)) if end <= file.len() => Ok(Some((offset, len))),
        _ => {
            let why = format!("it ends at {}", file.len());
            Err(IoError::refused(doing(verb, offset, len), file.path(), io::ErrorKind::UnexpectedEof, why))
        }
    }
}

fn doing(verb: &str, offset: u64, len: u64) -> String {
    format!("{verb} {len} bytes at {offset} of")
}

fn failed(verb: &str, file: &DirectFile, offset: u64, len: u64, error: impl Into<io::Error>) -> IoError {
    IoError::new(doing(verb, offset, len), file.path(), error)
}
