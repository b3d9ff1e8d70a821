//! Memory for O_DIRECT, without any code of the product.

use std::ops::Deref;

/// Bytes at an address that is a multiple of 4096.
#[derive(Debug)]
pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
    bytes: usize,
}

impl Aligned {
    /// `bytes` bytes of `value`.
    pub fn new(bytes: usize, value: u8) -> Self {
        let memory = vec![value; bytes + 4096];
        let start = memory.as_ptr().align_offset(4096);
        Aligned { memory, start, bytes }
    }
}

impl Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.bytes]
    }
}
