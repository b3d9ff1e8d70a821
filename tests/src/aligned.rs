//! Memory for O_DIRECT, without any code of the product.

use std::ops::{Deref, DerefMut};

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

impl Aligned {
    /// `bytes` bytes of `pattern`, again and again.
    pub fn filled(bytes: usize, pattern: &[u8]) -> Self {
        let mut aligned = Self::new(bytes, 0);
        let start = aligned.start;
        for (target, value) in aligned.memory[start..start + bytes].iter_mut().zip(pattern.iter().cycle()) {
            *target = *value;
        }
        aligned
    }
}

impl Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.bytes]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        let start = self.start;
        &mut self.memory[start..start + self.bytes]
    }
}
