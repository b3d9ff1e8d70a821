//! Memory for what arrives: a few large buffers, of which parts go to the lander and the applier while the rest is
//! still being filled. A buffer is used again when nobody holds a part of it any more.

use crate::limits::{ARENA_BYTES, ARENAS_MAX};
use bytes::BytesMut;
use std::collections::VecDeque;
use varve_common::format::BLOCK_BYTES;

/// The arenas of one session. Its memory is freed when the session and all who hold parts are done.
#[derive(Debug, Default)]
pub struct Arenas {
    /// Filled ones. Each handle is empty; it only keeps the allocation.
    retired: VecDeque<BytesMut>,
    /// All that exist, the one that is being filled included.
    count: usize,
}

impl Arenas {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty buffer with room for [`ARENA_BYTES`] from a block-aligned address on; `None` while all are in use.
    pub fn take(&mut self) -> Option<BytesMut> {
        // Asked for more than alignment can cost: then it is the whole allocation again, from its start.
        for _ in 0..self.retired.len() {
            let mut arena = self.retired.pop_front()?;
            if arena.try_reclaim(ARENA_BYTES + BLOCK_BYTES) {
                return Some(align(arena));
            }
            self.retired.push_back(arena);
        }
        if self.count == ARENAS_MAX {
            return None;
        }
        self.count += 1;
        Some(align(BytesMut::with_capacity(ARENA_BYTES + BLOCK_BYTES)))
    }

    /// Gives back a buffer that was handed out in parts.
    pub fn retire(&mut self, rest: BytesMut) {
        self.retired.push_back(rest);
    }
}

/// Zeroes, for what the receiver lands itself.
pub fn zeroes(bytes: usize) -> BytesMut {
    let mut zeroes = align(BytesMut::with_capacity(bytes + BLOCK_BYTES));
    zeroes.resize(bytes, 0);
    zeroes
}

/// Moves the start to a block boundary: what is written with O_DIRECT must lie so.
fn align(mut arena: BytesMut) -> BytesMut {
    arena.clear();
    let skip = arena.as_ptr().addr().next_multiple_of(BLOCK_BYTES) - arena.as_ptr().addr();
    arena.resize(skip, 0);
    let _ = arena.split();
    debug_assert!(arena.as_ptr().addr().is_multiple_of(BLOCK_BYTES));
    arena
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounded_aligned_and_used_again() {
        let mut arenas = Arenas::new();
        let mut parts = Vec::new();
        for _ in 0..ARENAS_MAX {
            let mut arena = arenas.take().expect("not all in use");
            assert!(arena.as_ptr().addr().is_multiple_of(BLOCK_BYTES));
            arena.resize(BLOCK_BYTES, 1);
            parts.push(arena.split().freeze());
            assert!(arena.as_ptr().addr().is_multiple_of(BLOCK_BYTES), "the rest is aligned, too");
            assert!(arena.capacity() >= ARENA_BYTES - BLOCK_BYTES);
            arenas.retire(arena);
        }
        assert!(arenas.take().is_none(), "all are held");
        let third = parts.remove(2);
        assert_eq!(third.len(), BLOCK_BYTES);
        let address = third.as_ptr();
        drop(third);
        let again = arenas.take().expect("one is free");
        assert_eq!(again.as_ptr(), address, "the same memory");
        assert!(again.capacity() >= ARENA_BYTES);
        assert!(arenas.take().is_none());
        assert!(parts.iter().all(|part| part.iter().all(|byte| *byte == 1)), "what is held was not touched");
    }
}
