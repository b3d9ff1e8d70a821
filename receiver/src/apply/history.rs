//! Before-images: what a part of a batch will replace is read (or known), kept durable, and only then replaced.
//!
//! A change becomes *cuts*, one for each granule that it touches, widened to whole sectors: the bytes around it are the
//! same before and after, so the wider before-image is as true. All blocks that cuts touch are brought to the stage
//! once; then the changes are played there in the order of the stream, and each cut's bytes are recorded just before
//! they are overwritten. So every version of a block that is written several times in a batch is kept, whatever overlaps.

use super::behind::{Behind, Known};
use super::holes::Holes;
use super::plan::{BatchPlan, Piece};
use super::recent::RecentBlocks;
use super::replica::{Reading, Replicas};
use crate::failpoint;
use crate::failure::Failure;
use crate::group::live::Counters;
use crate::group::stream::StreamState;
use crate::limits::{BEFORE_STAGE_BYTES, LATE_BYTES_MAX, RECENT_BYTES};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use varve_common::format::BLOCK_BYTES;
use varve_io::AlignedBuf;
use varve_timeline::chronicle::Event;
use varve_timeline::entry::Address;
use varve_timeline::error::HistoryError;
use varve_timeline::layer::Before;
use varve_timeline::limits::{GRANULE_BYTES, SECTOR_BYTES};
use varve_timeline::recorder::Recorder;
use varve_timeline::timeline::Timeline;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Where the changes of a part come from.
#[derive(Clone, Copy, Debug)]
pub enum Whose {
    /// Records: every change of the stream up to this height is in this part or was in an earlier one. After a crash they come
    /// again, and what is durable of them is recognised by it.
    Stream {
        /// See above.
        complete_to: u64,
    },
    /// An image, or a rollback, at this height of the stream: all that the stream changed before is taken or changed nothing.
    /// That must be durable with it, else a record that comes again after a crash would take the image for what was there.
    /// They do not come again themselves, so they are always taken.
    Image {
        /// See above.
        height: u64,
    },
}

/// How far what a part replaces is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It may be replaced.
    Durably,
    /// After [`History::settle`] it may.
    Soon,
}

/// Takes what the applier replaces. Owned by the applier.
#[derive(Debug)]
pub struct History {
    recorder: Recorder,
    counters: Arc<Counters>,
    holes: Holes,
    recent: RecentBlocks,
    stage: Option<AlignedBuf>,
    cuts: Vec<Cut>,
    order: Vec<u32>,
    spans: Vec<Span>,
    /// See [`History::remember_late`].
    others: Vec<Piece>,
}

/// The part of a change within one granule, in whole sectors.
#[derive(Clone, Copy, Debug)]
struct Cut {
    volume: u16,
    start: u64,
    end: u64,
    /// Of the plan's changes.
    change: u32,
    /// Where `start` is in the stage.
    stage: usize,
    /// Another cut of this part overlaps it.
    shared: bool,
    /// Its before-image is durable already.
    taken: bool,
}

/// Consecutive blocks that cuts touch.
#[derive(Clone, Copy, Debug)]
struct Span {
    volume: u16,
    start: u64,
    end: u64,
    stage: usize,
}

/// Bytes of the stage that a change may need at most: its blocks.
pub fn stage_bytes(piece: &Piece) -> u64 {
    piece.end.next_multiple_of(BLOCK) - piece.start / BLOCK * BLOCK
}

impl History {
    /// Takes the way to the layers.
    pub fn new(recorder: Recorder, counters: Arc<Counters>) -> Self {
        Self {
            recorder,
            counters,
            holes: Holes::default(),
            recent: RecentBlocks::new(RECENT_BYTES),
            stage: None,
            cuts: Vec::new(),
            order: Vec::new(),
            spans: Vec::new(),
            others: Vec::new(),
        }
    }

    /// What every change up to this height replaced is kept.
    pub fn complete_to(&self) -> u64 {
        self.recorder.complete_to()
    }

    /// What it records to.
    pub fn timeline(&self) -> &Arc<Timeline> {
        self.recorder.timeline()
    }

    /// Called with every part of a batch before anything of it reaches the replicas, from the first consistent point on:
    /// before it there is no past. On return what it replaces is durable, or, with `more` to come, on its way: that is said. The
    /// parts before may still be on their way to the replicas: they count as being there.
    pub fn before(
        &mut self,
        part: &BatchPlan,
        buffers: &[&[u8]],
        replicas: &mut Reading<'_>,
        behind: &mut Behind<'_, '_>,
        whose: Whose,
        more: bool,
    ) -> Result<Kept, Failure> {
        // What is durable already is not taken again.
        let (taken_to, complete_to) = match whose {
            Whose::Stream { complete_to } => (self.recorder.complete_to(), complete_to),
            Whose::Image { height } => (0, height),
        };
        self.cut(part, taken_to);
        self.place();
        let known = self.fill(replicas, behind)?;
        self.play(part, buffers)?;
        failpoint::hit(failpoint::HISTORY_BEFORE);
        // Where much has to be read the replicas are better written meanwhile.
        let soon = more && known && matches!(whose, Whose::Stream { .. });
        let kept = if soon { self.recorder.commit_behind(complete_to) } else { self.recorder.commit(complete_to) };
        kept.map_err(|e| history_failed(&e))?;
        failpoint::hit(failpoint::HISTORY_AFTER);
        Ok(if soon { Kept::Soon } else { Kept::Durably })
    }

    /// On return all that parts replace is durable.
    pub fn settle(&mut self) -> Result<(), Failure> {
        self.recorder.settle().map_err(|e| history_failed(&e))
    }

    /// Records of the stream, whether they changed anything or not: points that can be named.
    pub fn points(&mut self, points: &[(u64, u64)]) -> Result<(), Failure> {
        self.recorder.points(points).map_err(|e| history_failed(&e))
    }

    /// Makes what happened to the stream durable: before the applied mark says that it is past.
    pub fn events(&mut self, events: &[Event]) -> Result<(), Failure> {
        self.recorder.events(events).map_err(|e| history_failed(&e))
    }

    /// Everything up to here is in the replicas, and what it replaced is kept: such points can be opened.
    pub fn applied(&mut self, state: &StreamState) -> Result<(), Failure> {
        self.recorder.applied(state.height, state.at.time_ns).map_err(|e| history_failed(&e))
    }

    fn cut(&mut self, part: &BatchPlan, taken_to: u64) {
        self.cuts.clear();
        for (number, (piece, stamp)) in part.changes().enumerate() {
            let taken = stamp.height <= taken_to;
            let end = piece.end.next_multiple_of(SECTOR_BYTES);
            let mut start = piece.start / SECTOR_BYTES * SECTOR_BYTES;
            while start < end {
                let until = ((start / GRANULE_BYTES + 1) * GRANULE_BYTES).min(end);
                let (volume, change) = (piece.volume, number as u32);
                let cut = Cut { volume, start, end: until, change, stage: 0, shared: false, taken };
                self.cuts.push(cut);
                start = until;
            }
        }
    }

    /// Gives every cut its place in the stage: cuts that touch the same blocks share them.
    fn place(&mut self) {
        self.spans.clear();
        self.order.clear();
        self.order.extend(0..self.cuts.len() as u32);
        let cuts = &mut self.cuts;
        self.order.sort_unstable_by_key(|&index| {
            let cut = &cuts[index as usize];
            (cut.volume, cut.start, index)
        });
        let mut used = 0;
        // The end of what the cuts before cover, and the cut that reaches it.
        let (mut covered, mut last) = (0, 0);
        for &index in &self.order {
            let cut = cuts[index as usize];
            let (first, end) = (cut.start / BLOCK * BLOCK, cut.end.next_multiple_of(BLOCK));
            let span = self.spans.last_mut().filter(|span| span.volume == cut.volume && first <= span.end);
            let (stage, overlaps) = match span {
                Some(span) => {
                    used += end.saturating_sub(span.end) as usize;
                    span.end = span.end.max(end);
                    (span.stage + (cut.start - span.start) as usize, cut.start < covered)
                }
                None => {
                    self.spans.push(Span { volume: cut.volume, start: first, end, stage: used });
                    let stage = used + (cut.start - first) as usize;
                    used += (end - first) as usize;
                    (stage, false)
                }
            };
            if overlaps {
                cuts[last as usize].shared = true;
            }
            cuts[index as usize].stage = stage;
            cuts[index as usize].shared = overlaps;
            if !overlaps || cut.end > covered {
                (covered, last) = (cut.end, index);
            }
        }
        debug_assert!(used <= BEFORE_STAGE_BYTES);
    }

    /// Brings what the replicas hold to the stage, reading as little as possible. Gives whether most of it was known.
    fn fill(&mut self, replicas: &mut Reading<'_>, behind: &mut Behind<'_, '_>) -> Result<bool, Failure> {
        let stage = self.stage.get_or_insert_with(|| AlignedBuf::new(BEFORE_STAGE_BYTES));
        let mut reads: Vec<(u16, u64, &mut [u8])> = Vec::with_capacity(self.spans.len());
        let (mut known, mut read, mut waits) = (0, 0, false);
        let (mut rest, mut at) = (&mut stage[..], 0);
        for span in &self.spans {
            let len = replicas.get(span.volume).map_or(0, |replica| replica.file().len());
            let mut start = span.start;
            while start < span.end {
                let granule_end = ((start / GRANULE_BYTES + 1) * GRANULE_BYTES).min(span.end);
                let stage_at = span.stage + (start - span.start) as usize;
                let bytes = (granule_end - start) as usize;
                let (target, after) = rest.split_at_mut(stage_at - at).1.split_at_mut(bytes);
                (rest, at) = (after, stage_at + bytes);
                // Only from the first block that is not known to the last.
                let unknown = put_recent(&self.recent, span.volume, start, target);
                known += (bytes - unknown.len()) as u64;
                let (from, target) = (start + unknown.start as u64, &mut target[unknown]);
                start = granule_end;
                if target.is_empty() {
                    continue;
                }
                let on_its_way = behind.look_up(span.volume, from, target);
                // What is on its way is neither looked up nor read.
                let hole = match on_its_way {
                    Known::Nothing => self.holes.contains(replicas, span.volume, from),
                    Known::Some | Known::Copied => Ok(false),
                };
                let hole = hole.map_err(|e| Failure::io("a replica", &e))?;
                if hole {
                    target.fill(0);
                }
                if hole || on_its_way == Known::Copied {
                    put_recent(&self.recent, span.volume, from, target);
                    known += target.len() as u64;
                    continue;
                }
                // Past the volume's end there is nothing to read.
                let inside = (len.saturating_sub(from)).min(target.len() as u64) as usize;
                target[inside..].fill(0);
                read += inside as u64;
                waits |= on_its_way == Known::Some;
                if inside > 0 {
                    reads.push((span.volume, from, &mut target[..inside]));
                }
            }
        }
        if waits {
            self.recorder.settle().map_err(|e| history_failed(&e))?;
            let bytes = behind.finish(&mut self.holes)?;
            self.counters.replica_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        replicas.read(&mut reads)?;
        for (volume, start, target) in &mut reads {
            put_recent(&self.recent, *volume, *start, target);
        }
        self.counters.before_known_bytes.fetch_add(known, Ordering::Relaxed);
        self.counters.before_read_bytes.fetch_add(read, Ordering::Relaxed);
        Ok(known > read)
    }

    /// Plays the changes in the stage and records what each one replaces.
    fn play(&mut self, part: &BatchPlan, buffers: &[&[u8]]) -> Result<(), Failure> {
        let Some(stage) = &mut self.stage else { return Ok(()) };
        let (mut kept, mut same) = (0, 0);
        for cut in &self.cuts {
            let (piece, stamp) = part.change(cut.change as usize);
            let bytes = (cut.end - cut.start) as usize;
            let target = &mut stage[cut.stage..cut.stage + bytes];
            // The change's own bytes, without the sectors' rest around them.
            let (from, to) = (piece.start.max(cut.start), piece.end.min(cut.end));
            let inner = (from - cut.start) as usize..(to - cut.start) as usize;
            let new = piece.source.map(|source| {
                let at = source.offset as usize + (from - piece.start) as usize;
                &buffers[source.buffer as usize][at..at + (to - from) as usize]
            });
            let unchanged = match new {
                Some(new) => target[inner.clone()] == *new,
                None => target[inner.clone()].iter().all(|byte| *byte == 0),
            };
            if unchanged {
                same += bytes as u64;
                continue;
            }
            if !cut.taken {
                let address = Address::new(cut.volume, cut.start / SECTOR_BYTES);
                self.recorder.push(address, stamp.height, Before::Bytes(target)).map_err(|e| history_failed(&e))?;
                kept += bytes as u64;
            }
            if cut.shared {
                match new {
                    Some(new) => target[inner].copy_from_slice(new),
                    None => target[inner].fill(0),
                }
            }
        }
        self.counters.before_kept_bytes.fetch_add(kept, Ordering::Relaxed);
        self.counters.before_same_bytes.fetch_add(same, Ordering::Relaxed);
        Ok(())
    }

    /// What the replicas will hold from now on: called with what is written to them, just before. `keep`: also
    /// whole blocks that were not remembered, so that they need not be read when they are replaced.
    pub fn remember(&mut self, pieces: &[Piece], buffers: &[&[u8]], keep: bool) {
        for piece in pieces {
            self.holes.filled(piece.volume, piece.start, piece.end);
            let Some(source) = piece.source else {
                self.remember_zeroes(piece);
                continue;
            };
            let content = &buffers[source.buffer as usize][source.offset as usize..][..piece.bytes() as usize];
            let mut at = piece.start;
            while at < piece.end {
                let (block, inside) = (at / BLOCK, (at % BLOCK) as usize);
                let until = ((block + 1) * BLOCK).min(piece.end);
                let part = &content[(at - piece.start) as usize..(until - piece.start) as usize];
                match keep && part.len() == BLOCK_BYTES {
                    true => drop(self.recent.put(piece.volume, block, part, false)),
                    false => self.recent.patch(piece.volume, block, inside, Some(part), part.len()),
                }
                at = until;
            }
        }
    }

    fn remember_zeroes(&mut self, piece: &Piece) {
        let (first, end) = (piece.start.div_ceil(BLOCK), piece.end / BLOCK);
        if first < end {
            self.recent.forget(piece.volume, first, end);
        }
        // A block that is late is known by nobody else: what of it stays must not be forgotten.
        let head = piece.start..piece.end.min(first * BLOCK);
        let tail = piece.start.max(end * BLOCK).max(head.end)..piece.end;
        for part in [head, tail].into_iter().filter(|part| part.start < part.end) {
            let (block, inside) = (part.start / BLOCK, (part.start % BLOCK) as usize);
            self.recent.patch(piece.volume, block, inside, None, (part.end - part.start) as usize);
        }
    }

    /// As [`History::remember`], but what is short and whole is from here on late: the replicas get it with
    /// [`History::bring_late`]. Gives what is not, and is to be written now.
    pub fn remember_late(&mut self, pieces: &[Piece], buffers: &[&[u8]]) -> &[Piece] {
        self.others.clear();
        for piece in pieces {
            if !self.put_late(piece, buffers) {
                self.remember(&[*piece], buffers, true);
                self.others.push(*piece);
            }
        }
        &self.others
    }

    fn put_late(&mut self, piece: &Piece, buffers: &[&[u8]]) -> bool {
        let Some(source) = piece.source else { return false };
        let whole = piece.start.is_multiple_of(BLOCK) && piece.end.is_multiple_of(BLOCK);
        if !whole || piece.bytes() > LATE_BYTES_MAX {
            return false;
        }
        self.holes.filled(piece.volume, piece.start, piece.end);
        let content = &buffers[source.buffer as usize][source.offset as usize..][..piece.bytes() as usize];
        let mut blocks = content.chunks_exact(BLOCK_BYTES).zip(piece.start / BLOCK..);
        blocks.all(|(part, block)| self.recent.put(piece.volume, block, part, true))
    }

    /// On return the replicas have everything, and what it replaced is durable.
    pub fn bring_late(&mut self, replicas: &mut Replicas) -> Result<(), Failure> {
        self.settle()?;
        let late = self.recent.late();
        if late.is_empty() {
            return Ok(());
        }
        failpoint::hit(failpoint::APPLY_BEFORE);
        replicas.apply(&late, &[self.recent.bytes()])?;
        failpoint::hit(failpoint::APPLY_AFTER);
        // Looked up for a neighbour meanwhile, they may have seemed holes.
        late.iter().for_each(|piece| self.holes.filled(piece.volume, piece.start, piece.end));
        self.recent.written();
        let bytes = late.iter().map(Piece::bytes).sum();
        self.counters.replica_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.counters.late_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Has it written to the replicas what is kept durably now, with what waited. `more`: another part follows.
    pub fn write(&mut self, behind: &mut Behind<'_, '_>, pieces: &[Piece], more: bool) -> Result<(), Failure> {
        let bytes = behind.write(pieces, more, &mut self.holes)?;
        self.counters.replica_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// What was on its way to the replicas is there, but for what is late.
    pub fn finish(&mut self, behind: &mut Behind<'_, '_>) -> Result<(), Failure> {
        if behind.is_waiting() {
            self.settle()?;
        }
        let bytes = behind.finish(&mut self.holes)?;
        self.counters.replica_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Frees memory that is only needed while there is work, and closes a layer that is old.
    pub fn rest(&mut self) -> Result<(), Failure> {
        self.stage = None;
        self.recent.clear();
        self.recorder.rest().map_err(|e| history_failed(&e))
    }
}

/// Puts what is known of recently written blocks to `target`, over what it was filled with: that may be older. Gives the stretch of
/// it from the first block that is not known to the last.
fn put_recent(recent: &RecentBlocks, volume: u16, start: u64, target: &mut [u8]) -> Range<usize> {
    let mut unknown = 0..0;
    let len = target.len();
    for (number, (part, block)) in target.chunks_mut(BLOCK_BYTES).zip(start / BLOCK..).enumerate() {
        match recent.get(volume, block) {
            Some(content) => part.copy_from_slice(&content[..part.len()]),
            None => {
                let at = number * BLOCK_BYTES;
                let from = if unknown.is_empty() { at } else { unknown.start };
                unknown = from..(at + BLOCK_BYTES).min(len);
            }
        }
    }
    unknown
}

/// A group whose history cannot be written takes no data: what would be replaced would be lost.
pub fn history_failed(error: &HistoryError) -> Failure {
    match error {
        HistoryError::Io(error) => Failure::io("the history", error),
        other => Failure::damaged(format!("the history failed: {other}")),
    }
}

const _: () = assert!(BEFORE_STAGE_BYTES.is_multiple_of(BLOCK_BYTES));
