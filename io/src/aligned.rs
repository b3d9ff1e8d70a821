//! Memory that O_DIRECT accepts.
#![allow(unsafe_code)]

use std::alloc::{self, Layout};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::mman::{MmapAdvise, madvise};

use crate::PAGE_BYTES;

/// Heap memory aligned to 4096 bytes, zeroed, of a fixed size that is a multiple of 4096.
pub struct AlignedBuf {
    start: NonNull<u8>,
    bytes: usize,
}

impl AlignedBuf {
    /// Allocates `bytes` zeroed bytes.
    ///
    /// # Panics
    /// If `bytes` is zero or not a multiple of 4096: the size is the program's own constant, never
    /// a length from the wire, so a wrong one is a mistake in the code. Running out of memory aborts,
    /// as for every allocation in Rust.
    pub fn new(bytes: usize) -> Self {
        let layout = Self::layout(bytes);
        // SAFETY: the layout's size is not zero (asserted in `layout`).
        let start = unsafe { alloc::alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { alloc::handle_alloc_error(layout) };
        Self { start, bytes }
    }

    /// Gives the memory back to the kernel; what is read then is zeroes.
    fn discard(&mut self) {
        // SAFETY: whole pages of private anonymous memory that `self` owns and `&mut self` alone may use: afterwards they
        // are there, and zero, which any byte may be.
        let done = unsafe { madvise(self.start.cast(), self.bytes, MmapAdvise::MADV_DONTNEED) };
        // Locked memory is not given back; it is only more than it need be.
        let _ = done;
    }

    fn layout(bytes: usize) -> Layout {
        assert!(
            bytes > 0 && bytes.is_multiple_of(PAGE_BYTES),
            "{bytes} bytes: not a multiple of {PAGE_BYTES} above zero"
        );
        match Layout::from_size_align(bytes, PAGE_BYTES) {
            Ok(layout) => layout,
            Err(_) => panic!("{bytes} bytes: more than an allocation can have"),
        }
    }
}

// SAFETY: the buffer owns its memory alone; a shared reference only reads it, an exclusive one writes.
unsafe impl Send for AlignedBuf {}
// SAFETY: as above: `&AlignedBuf` gives out `&[u8]` and nothing that mutates.
unsafe impl Sync for AlignedBuf {}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `start` points to `bytes` initialised bytes that live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this same layout and freed only here.
        unsafe { alloc::dealloc(self.start.as_ptr(), Self::layout(self.bytes)) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.bytes)
    }
}

/// A fixed number of [`AlignedBuf`]s, all allocated at start-up. Clones share the same buffers.
#[derive(Clone, Debug)]
pub struct BufPool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    free: Mutex<Vec<AlignedBuf>>,
    count: usize,
    bytes: usize,
}

impl Shared {
    fn put(&self, buf: AlignedBuf) {
        // Never grows the vector: only buffers that were taken from it come back.
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(buf);
    }
}

impl BufPool {
    /// Allocates `count` buffers of `bytes` bytes each (a multiple of 4096).
    ///
    /// # Panics
    /// As [`AlignedBuf::new`].
    pub fn new(count: usize, bytes: usize) -> Self {
        let free = (0..count).map(|_| AlignedBuf::new(bytes)).collect();
        Self { shared: Arc::new(Shared { free: Mutex::new(free), count, bytes }) }
    }

    /// A buffer, or `None` while all are out. It holds what its last user left in it.
    pub fn take(&self) -> Option<PooledBuf> {
        let buf = self.shared.free.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        Some(PooledBuf { buf: Some(buf), home: Arc::clone(&self.shared) })
    }

    /// Gives the memory of buffers that nobody holds back to the kernel until they are taken again. For when there will be
    /// no work for a while: taking them then costs page faults.
    pub fn rest(&self) {
        for buf in self.shared.free.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
            buf.discard();
        }
    }

    /// How many buffers could be taken now.
    pub fn available(&self) -> usize {
        self.shared.free.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// How many buffers the pool has, taken ones included.
    pub fn count(&self) -> usize {
        self.shared.count
    }

    /// The size of each buffer in bytes.
    pub fn buf_bytes(&self) -> usize {
        self.shared.bytes
    }
}

/// A buffer out of a [`BufPool`]; goes back when dropped.
#[derive(Debug)]
pub struct PooledBuf {
    // `None` only inside `drop`.
    buf: Option<AlignedBuf>,
    home: Arc<Shared>,
}

impl Deref for PooledBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.buf.as_deref().unwrap_or_default()
    }
}

impl DerefMut for PooledBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buf.as_deref_mut().unwrap_or_default()
    }
}

impl Drop for PooledBuf {
    fn drop(&mut self) {
        if let Some(buf) = self.buf.take() {
            self.home.put(buf);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_zeroed_and_writable() {
        let mut buf = AlignedBuf::new(3 * PAGE_BYTES);
        assert_eq!(buf.len(), 3 * PAGE_BYTES);
        assert!(buf.as_ptr().addr().is_multiple_of(PAGE_BYTES));
        assert!(buf.iter().all(|&b| b == 0));
        buf[3 * PAGE_BYTES - 1] = 7;
        assert_eq!(buf.last(), Some(&7));
    }

    #[test]
    #[should_panic(expected = "not a multiple")]
    fn odd_size_is_a_mistake() {
        AlignedBuf::new(100);
    }

    #[test]
    fn a_pool_that_rests_gives_its_memory_back() {
        let pool = BufPool::new(2, 8 * PAGE_BYTES);
        let mut held = pool.take().expect("one");
        held.fill(1);
        let mut other = pool.take().expect("two");
        other.fill(2);
        drop(other);
        pool.rest();
        assert!(held.iter().all(|&byte| byte == 1), "what is in use stays");
        let again = pool.take().expect("the free one");
        assert!(again.iter().all(|&byte| byte == 0), "its pages were given back");
    }

    #[test]
    fn pool_is_bounded_and_refills() {
        let pool = BufPool::new(2, PAGE_BYTES);
        let mut first = pool.take().expect("first");
        first[0] = 9;
        let second = pool.take().expect("second");
        assert!(pool.take().is_none());
        assert_ne!(first.as_ptr(), second.as_ptr());
        drop(first);
        assert_eq!(pool.available(), 1);
        let again = std::thread::scope(|s| s.spawn(|| pool.take()).join()).expect("thread").expect("free again");
        assert_eq!((again.len(), again[0]), (PAGE_BYTES, 9));
        drop((again, second));
        assert_eq!((pool.available(), pool.count(), pool.buf_bytes()), (2, 2, PAGE_BYTES));
    }
}
