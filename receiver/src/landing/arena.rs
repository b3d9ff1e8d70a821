//! Memory for what arrives: a few large buffers, of which parts go to the lander and the applier while the rest is
//! still being filled. A buffer is used again when nobody holds a part of it any more.

use crate::limits::{ARENA_BYTES, ARENAS_MAX};
use bytes::BytesMut;
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use varve_common::format::BLOCK_BYTES;

/// An arena that nobody needed for so long is freed.
const UNUSED_TIME_MAX: Duration = Duration::from_secs(10);

/// The arenas of one session. Its memory is freed when the session and all who hold parts are done.
#[derive(Debug, Default)]
pub struct Arenas {
    /// Filled ones and since when, the newest last. Each handle is empty; it only keeps the allocation.
    retired: VecDeque<(Instant, BytesMut)>,
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
        // The newest first: the fewest are in use then, and the rest can be freed.
        if let Some(free) = (0..self.retired.len()).rev().find(|at| is_free(&mut self.retired[*at].1)) {
            return self.retired.remove(free).map(|(_, arena)| align(arena));
        }
        if self.count == ARENAS_MAX {
            return None;
        }
        self.count += 1;
        Some(align(BytesMut::with_capacity(ARENA_BYTES + BLOCK_BYTES)))
    }

    /// Gives back a buffer that was handed out in parts.
    pub fn retire(&mut self, rest: BytesMut) {
        self.retired.push_back((Instant::now(), rest));
    }

    /// Frees what was not needed for some time.
    pub fn trim(&mut self, now: Instant) {
        while let Some((since, oldest)) = self.retired.front_mut()
            && now.saturating_duration_since(*since) >= UNUSED_TIME_MAX
            && is_free(oldest)
        {
            self.retired.pop_front();
            self.count -= 1;
        }
    }
}

/// Whether nobody holds a part of it; then it is whole again.
fn is_free(arena: &mut BytesMut) -> bool {
    // More than alignment can cost: then it is the whole allocation again, from its start.
    arena.try_reclaim(ARENA_BYTES + BLOCK_BYTES)
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

    #[test]
    fn what_is_not_needed_is_freed() {
        let mut arenas = Arenas::new();
        let taken: Vec<_> = (0..3).map_while(|_| arenas.take()).collect();
        let mut held = Vec::new();
        for (number, mut arena) in taken.into_iter().enumerate() {
            arena.resize(BLOCK_BYTES, 1);
            let part = arena.split().freeze();
            arenas.retire(arena);
            if number == 1 {
                held.push(part);
            }
        }
        let later = Instant::now() + UNUSED_TIME_MAX;
        arenas.trim(Instant::now());
        assert_eq!(arenas.count, 3, "not yet");
        arenas.trim(later);
        assert_eq!(arenas.count, 2, "one was free, the next is held");
        held.clear();
        arenas.trim(later);
        assert_eq!((arenas.count, arenas.retired.len()), (0, 0));
        let used = arenas.take();
        assert!(used.is_some() && arenas.count == 1);
        arenas.trim(later);
        assert_eq!(arenas.count, 1, "what is being filled stays");
    }
}
