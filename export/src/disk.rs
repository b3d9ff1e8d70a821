//! What can be served.

use std::io;

/// What a stretch of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Bytes.
    pub len: u64,
    /// Whether it is known to read as zeroes without anything stored.
    pub hole: bool,
}

/// A disk: bytes at offsets, served to several clients at once. Offsets and lengths are checked against [`Disk::len`] by the
/// caller and may be unaligned. Errors carry an errno where there is one.
pub trait Disk: Send + Sync {
    /// Size in bytes; does not change.
    fn len(&self) -> u64;
    /// Whether there is nothing on it.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;
    /// Fills `buf` from `offset` on.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes `buf` at `offset`.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Makes a stretch read as zeroes. `may_unmap`: it need not stay allocated.
    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;
    /// Makes everything that was written durable, as far as this disk is.
    fn flush(&self) -> io::Result<()>;
    /// What lies at `offset`: the first stretch of at most `len` bytes.
    fn stretch(&self, offset: u64, len: u64) -> io::Result<Stretch>;
}
