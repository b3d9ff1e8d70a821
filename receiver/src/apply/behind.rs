//! A part on its way to the replicas, by a thread of its own, while the applier reads and keeps what the next one replaces.
//!
//! ```text
//! applier   | before-images of 1 | before-images of 2 | before-images of 3 |
//! replica                        | writes 1           | writes 2           | writes 3 |
//! ```
//!
//! Nothing is written before what it replaces is durable, and parts are written one after the other. What is being written is
//! known here, so that nobody takes what the replica holds there meanwhile for what was there before.

use super::holes::Holes;
use super::plan::Piece;
use super::replica::{Replica, Writer};
use crate::failpoint;
use crate::failure::Failure;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, Scope, ScopedJoinHandle};
use varve_common::format::BLOCK_BYTES;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// See the module's text.
pub struct Behind<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    replicas: &'env [Replica],
    buffers: &'env [&'env [u8]],
    /// `None` while a thread has it.
    writer: Option<&'env mut Writer>,
    thread: Option<ScopedJoinHandle<'scope, Option<Wrote<'env>>>>,
    /// What it writes: sorted, disjoint.
    pieces: Vec<Piece>,
    /// Memory for the next one.
    spare: Vec<Piece>,
}

struct Wrote<'env> {
    writer: &'env mut Writer,
    pieces: Vec<Piece>,
    result: Result<(), Failure>,
}

impl<'scope, 'env> Behind<'scope, 'env> {
    /// Nothing is on its way. `buffers`: what pieces name.
    pub fn new(
        scope: &'scope Scope<'scope, 'env>,
        replicas: &'env [Replica],
        writer: &'env mut Writer,
        buffers: &'env [&'env [u8]],
    ) -> Self {
        let (pieces, spare) = (Vec::new(), Vec::new());
        Self { scope, replicas, buffers, writer: Some(writer), thread: None, pieces, spare }
    }

    /// Whether a block of that stretch is being written. It begins and ends at block boundaries.
    pub fn writes(&self, volume: u16, start: u64, end: u64) -> bool {
        writes(&self.pieces, volume, start, end)
    }

    /// Returns when nothing is on its way any more.
    pub fn wait(&mut self, holes: &mut Holes) -> Result<(), Failure> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let wrote = thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        self.take_back(wrote, holes)
    }

    /// Writes sorted, disjoint pieces after those before. `more`: another part follows, so nobody waits for it here.
    pub fn write(&mut self, pieces: &[Piece], more: bool, holes: &mut Holes) -> Result<(), Failure> {
        self.wait(holes)?;
        let Some(writer) = self.writer.take() else { return Err(lost()) };
        let (replicas, buffers) = (self.replicas, self.buffers);
        if !more {
            let result = writer.apply(replicas, pieces, buffers);
            self.writer = Some(writer);
            failpoint::hit(failpoint::APPLY_AFTER);
            return result;
        }
        self.pieces.extend_from_slice(pieces);
        let mut theirs = std::mem::take(&mut self.spare);
        theirs.clear();
        theirs.extend_from_slice(pieces);
        // Taken by the thread, or back from it if there can be none.
        let job = Arc::new(Mutex::new(Some((writer, theirs))));
        let take = job.clone();
        let work = move || {
            let job = take.lock().unwrap_or_else(PoisonError::into_inner).take();
            job.map(|(writer, pieces)| write_now(writer, replicas, pieces, buffers))
        };
        match Builder::new().name("replica".to_owned()).spawn_scoped(self.scope, work) {
            Ok(thread) => {
                self.thread = Some(thread);
                Ok(())
            }
            Err(error) => {
                tracing::debug!(%error, "no thread: the replica is written without");
                let job = job.lock().unwrap_or_else(PoisonError::into_inner).take();
                self.take_back(job.map(|(writer, pieces)| write_now(writer, replicas, pieces, buffers)), holes)
            }
        }
    }

    fn take_back(&mut self, wrote: Option<Wrote<'env>>, holes: &mut Holes) -> Result<(), Failure> {
        let Some(Wrote { writer, pieces, result }) = wrote else { return Err(lost()) };
        (self.writer, self.spare) = (Some(writer), pieces);
        // Looked up for a neighbour while it was written, it may have seemed a hole.
        self.pieces.iter().for_each(|piece| holes.filled(piece.volume, piece.start, piece.end));
        self.pieces.clear();
        result
    }
}

fn write_now<'env>(
    writer: &'env mut Writer,
    replicas: &[Replica],
    pieces: Vec<Piece>,
    buffers: &[&[u8]],
) -> Wrote<'env> {
    let result = writer.apply(replicas, &pieces, buffers);
    failpoint::hit(failpoint::APPLY_AFTER);
    Wrote { writer, pieces, result }
}

fn lost() -> Failure {
    Failure::damaged("the replicas have no writer")
}

/// A piece that is no whole block is written with the rest of its blocks.
fn writes(pieces: &[Piece], volume: u16, start: u64, end: u64) -> bool {
    let before = |piece: &Piece| (piece.volume, piece.end.next_multiple_of(BLOCK)) <= (volume, start);
    let next = pieces.get(pieces.partition_point(before));
    next.is_some_and(|piece| piece.volume == volume && piece.start / BLOCK * BLOCK < end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against looking at every block of every piece.
        #[test]
        fn every_block_that_is_touched(
            ends in prop::collection::btree_set((0u16..3, 0u64..60_000), 0..12),
            volume in 0u16..3, first in 0u64..16, blocks in 1u64..8,
        ) {
            // Sorted, disjoint: each begins somewhere behind the end of the one before.
            let mut pieces: Vec<Piece> = Vec::new();
            for pair in ends.into_iter().collect::<Vec<_>>().chunks_exact(2) {
                let [(one, start), (other, end)] = [pair[0], pair[1]];
                if one == other && start < end {
                    pieces.push(Piece { volume: one, start, end, source: None });
                }
            }
            let (start, end) = (first * BLOCK, (first + blocks) * BLOCK);
            let touched = |block: u64| pieces.iter().any(|piece| {
                piece.volume == volume && piece.start < (block + 1) * BLOCK && piece.end > block * BLOCK
            });
            prop_assert_eq!(writes(&pieces, volume, start, end), (first..first + blocks).any(touched));
        }
    }
}
