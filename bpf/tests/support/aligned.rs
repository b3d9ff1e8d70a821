//! Memory with a chosen alignment, for O_DIRECT.

use std::alloc::{Layout, alloc_zeroed, dealloc};

/// `bytes` of memory that begin `offset` bytes after a page boundary.
pub struct Buffer {
    start: *mut u8,
    layout: Layout,
    offset: usize,
    bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Buffer {}

impl Buffer {
    pub fn new(bytes: usize, offset: usize) -> Self {
        Self::aligned(bytes, offset, 4096)
    }

    pub fn aligned(bytes: usize, offset: usize, alignment: usize) -> Self {
        let layout = Layout::from_size_align(bytes + offset, alignment).unwrap();
        assert!(layout.size() > 0);
        // SAFETY: the layout has a size.
        let start = unsafe { alloc_zeroed(layout) };
        assert!(!start.is_null());
        Self { start, layout, offset, bytes }
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: inside the allocation, initialised with zeroes.
        unsafe { std::slice::from_raw_parts(self.start.add(self.offset), self.bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(self.offset), self.bytes) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start, self.layout) }
    }
}
