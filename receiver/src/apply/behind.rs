//! What is on its way to the replicas while the applier reads and keeps what the next part replaces.
//!
//! ```text
//! applier   | before-images of 1 | before-images of 2 | before-images of 3 |
//! replica                        | writes 1           | writes 2           | writes 3 |
//! ```
//!
//! Nothing is written before what it replaces is durable, and parts are written one after the other, by a thread of its own; or
//! they wait here for later ones, and what several of them write is written once. Either way it is known here what they write, so
//! that nobody takes what the replica holds there meanwhile for what was there before.

use super::holes::Holes;
use super::plan::{BatchPlan, Piece, Source, Stamp};
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
    /// Parts that wait for later ones.
    waiting: BatchPlan,
    /// Where each begins among them.
    begins: Vec<usize>,
}

struct Wrote<'env> {
    writer: &'env mut Writer,
    pieces: Vec<Piece>,
    result: Result<(), Failure>,
}

/// What is known here of a stretch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// Nothing of it is on its way: the replica has it.
    Nothing,
    /// Some of it is: the replica has it when that is written.
    Some,
    /// One change brings all of it: it was copied.
    Copied,
}

impl<'scope, 'env> Behind<'scope, 'env> {
    /// Nothing is on its way. `buffers`: what pieces name.
    pub fn new(
        scope: &'scope Scope<'scope, 'env>,
        replicas: &'env [Replica],
        writer: &'env mut Writer,
        buffers: &'env [&'env [u8]],
    ) -> Self {
        Self {
            scope,
            replicas,
            buffers,
            writer: Some(writer),
            thread: None,
            pieces: Vec::new(),
            spare: Vec::new(),
            waiting: BatchPlan::new(),
            begins: Vec::new(),
        }
    }

    /// Fills `target`, blocks that begin at `start`, with what the replica will hold there, if that can be told from here.
    pub fn look_up(&self, volume: u16, start: u64, target: &mut [u8]) -> Known {
        let mut end = self.waiting.len();
        // The newest first.
        for begin in self.begins.iter().rev() {
            match look_up(&self.waiting.as_pushed()[*begin..end], self.buffers, volume, start, target) {
                Known::Nothing => end = *begin,
                known => return known,
            }
        }
        look_up(&self.pieces, self.buffers, volume, start, target)
    }

    /// Sorted, disjoint pieces that are written with what is written next. What they replace need not be durable before that.
    pub fn wait_for_more(&mut self, pieces: &[Piece]) {
        if pieces.is_empty() {
            return;
        }
        self.begins.push(self.waiting.len());
        pieces.iter().for_each(|piece| self.waiting.push(*piece, Stamp::default()));
    }

    /// Whether there are such pieces: before they are written, or waited for, what they replace must be durable.
    pub fn is_waiting(&self) -> bool {
        !self.begins.is_empty()
    }

    /// Returns when nothing is on its way any more. Gives the bytes that had waited.
    pub fn finish(&mut self, holes: &mut Holes) -> Result<u64, Failure> {
        let bytes = if self.is_waiting() { self.write(&[], false, holes)? } else { 0 };
        self.join(holes)?;
        Ok(bytes)
    }

    /// Writes what waited and these sorted, disjoint pieces, after those before. `more`: another part follows, so nobody waits for
    /// it here. Gives the bytes that are written.
    pub fn write(&mut self, pieces: &[Piece], more: bool, holes: &mut Holes) -> Result<u64, Failure> {
        self.join(holes)?;
        let Some(writer) = self.writer.take() else { return Err(lost()) };
        if self.is_waiting() {
            pieces.iter().for_each(|piece| self.waiting.push(*piece, Stamp::default()));
            self.pieces.extend_from_slice(self.waiting.resolve());
            self.waiting.clear();
            self.begins.clear();
        } else {
            self.pieces.extend_from_slice(pieces);
        }
        let bytes = self.pieces.iter().map(Piece::bytes).sum();
        let (replicas, buffers) = (self.replicas, self.buffers);
        let mut theirs = std::mem::take(&mut self.spare);
        theirs.clear();
        theirs.extend_from_slice(&self.pieces);
        if !more {
            self.take_back(Some(write_now(writer, replicas, theirs, buffers)), holes)?;
            return Ok(bytes);
        }
        // Taken by the thread, or back from it if there can be none.
        let job = Arc::new(Mutex::new(Some((writer, theirs))));
        let take = job.clone();
        let work = move || {
            let job = take.lock().unwrap_or_else(PoisonError::into_inner).take();
            job.map(|(writer, pieces)| write_now(writer, replicas, pieces, buffers))
        };
        match Builder::new().name("replica".to_owned()).spawn_scoped(self.scope, work) {
            Ok(thread) => self.thread = Some(thread),
            Err(error) => {
                tracing::debug!(%error, "no thread: the replica is written without");
                let job = job.lock().unwrap_or_else(PoisonError::into_inner).take();
                self.take_back(job.map(|(writer, pieces)| write_now(writer, replicas, pieces, buffers)), holes)?;
            }
        }
        Ok(bytes)
    }

    fn join(&mut self, holes: &mut Holes) -> Result<(), Failure> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let wrote = thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        self.take_back(wrote, holes)
    }

    fn take_back(&mut self, wrote: Option<Wrote<'env>>, holes: &mut Holes) -> Result<(), Failure> {
        let Some(Wrote { writer, pieces, result }) = wrote else { return Err(lost()) };
        (self.writer, self.spare) = (Some(writer), pieces);
        // Looked up for a neighbour while it was on its way, it may have seemed a hole.
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

/// In sorted, disjoint pieces. One that is no whole block is written with the rest of its blocks.
fn look_up(pieces: &[Piece], buffers: &[&[u8]], volume: u16, start: u64, target: &mut [u8]) -> Known {
    let end = start + target.len() as u64;
    let before = |piece: &Piece| (piece.volume, piece.end.next_multiple_of(BLOCK)) <= (volume, start);
    let next = pieces.get(pieces.partition_point(before));
    let touches = |piece: &&Piece| piece.volume == volume && piece.start / BLOCK * BLOCK < end;
    let Some(piece) = next.filter(touches) else { return Known::Nothing };
    if piece.start > start || piece.end < end {
        return Known::Some;
    }
    match piece.source {
        Some(Source { buffer, offset }) => {
            let at = offset as usize + (start - piece.start) as usize;
            target.copy_from_slice(&buffers[buffer as usize][at..at + target.len()]);
        }
        None => target.fill(0),
    }
    Known::Copied
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against looking at every byte of every piece.
        #[test]
        fn every_block_that_is_touched(
            ends in prop::collection::btree_set((0u16..3, 0u64..60_000), 0..12),
            whole in any::<bool>(), zeroes in prop::collection::vec(any::<bool>(), 12),
            volume in 0u16..3, first in 0u64..16, blocks in 1u64..8,
        ) {
            // Sorted, disjoint: each begins somewhere behind the end of the one before.
            let content: Vec<u8> = (0..64 * BLOCK).map(|at| (at / 7 % 251 + 1) as u8).collect();
            let mut pieces: Vec<Piece> = Vec::new();
            for (number, pair) in ends.into_iter().collect::<Vec<_>>().chunks_exact(2).enumerate() {
                let [(one, start), (other, end)] = [pair[0], pair[1]];
                let (start, end) = if whole { (start / BLOCK * BLOCK, end / BLOCK * BLOCK) } else { (start, end) };
                if one == other && start < end {
                    let source = (!zeroes[number]).then_some(Source { buffer: 0, offset: start as u32 });
                    pieces.push(Piece { volume: one, start, end, source });
                }
            }
            let (start, end) = (first * BLOCK, (first + blocks) * BLOCK);
            let touched = |block: u64| pieces.iter().any(|piece| {
                piece.volume == volume && piece.start < (block + 1) * BLOCK && piece.end > block * BLOCK
            });
            let of = |at: u64| pieces.iter().find(|piece| {
                piece.volume == volume && (piece.start..piece.end).contains(&at)
            });
            let mut target = vec![0xff; (end - start) as usize];
            let known = look_up(&pieces, &[&content], volume, start, &mut target);
            prop_assert_eq!(known != Known::Nothing, (first..first + blocks).any(touched));
            let one = of(start).is_some_and(|piece| piece.end >= end);
            prop_assert_eq!(known == Known::Copied, one);
            if known == Known::Copied {
                let zeroes = of(start).is_some_and(|piece| piece.source.is_none());
                let wanted: Vec<u8> = (start..end).map(|at| if zeroes { 0 } else { content[at as usize] }).collect();
                prop_assert_eq!(target, wanted);
            }
        }
    }
}
