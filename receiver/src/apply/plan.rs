//! A batch of changes as sorted, disjoint writes: of changes that overlap the later one wins. Pure.

use varve_common::geometry::{Extent, ExtentSet};

/// Where the bytes of a change are: in buffer `buffer` of the batch, from `offset` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Which of the batch's buffers.
    pub buffer: u32,
    /// Offset in it.
    pub offset: u32,
}

/// A stretch of a volume and what it becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The volume's number.
    pub volume: u16,
    /// First byte.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
    /// The bytes; `None`: zeroes.
    pub source: Option<Source>,
}

impl Piece {
    /// The part of it that `extent` covers, which lies within it.
    pub fn part(&self, extent: Extent) -> Self {
        let skipped = (extent.start - self.start) as u32;
        let source = self.source.map(|source| Source { offset: source.offset + skipped, ..source });
        Self { start: extent.start, end: extent.end, source, ..*self }
    }

    /// Bytes in it.
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// A batch. Its vectors are used again for the next one.
#[derive(Debug, Default)]
pub struct BatchPlan {
    changes: Vec<Piece>,
    stamps: Vec<Stamp>,
    order: Vec<u32>,
    pieces: Vec<Piece>,
    covered: Vec<ExtentSet>,
}

/// When a change happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// The timeline's height after it.
    pub height: u64,
}

impl BatchPlan {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets the last batch.
    pub fn clear(&mut self) {
        self.changes.clear();
        self.stamps.clear();
        self.pieces.clear();
    }

    /// Adds a change, after all that were added before. Empty ones are passed over.
    pub fn push(&mut self, piece: Piece, stamp: Stamp) {
        if piece.start < piece.end {
            self.changes.push(piece);
            self.stamps.push(stamp);
        }
    }

    /// Every change in the order of the stream, with its record: what a history is taken from.
    pub fn changes(&self) -> impl ExactSizeIterator<Item = (&Piece, &Stamp)> {
        self.changes.iter().zip(&self.stamps)
    }

    /// The same without their records.
    pub fn as_pushed(&self) -> &[Piece] {
        &self.changes
    }

    /// One of them.
    pub fn change(&self, number: usize) -> (&Piece, &Stamp) {
        (&self.changes[number], &self.stamps[number])
    }

    /// Number of changes.
    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// What each volume holds after the batch, by volume and address, each byte at most once.
    pub fn resolve(&mut self) -> &[Piece] {
        let changes = &self.changes;
        self.order.clear();
        self.order.extend(0..changes.len() as u32);
        // With the index: of changes at the same address the later one stays behind.
        self.order.sort_unstable_by_key(|&index| {
            let piece = &changes[index as usize];
            (piece.volume, piece.start, index)
        });
        self.pieces.clear();
        for index in &self.order {
            let piece = changes[*index as usize];
            match self.pieces.last_mut() {
                // The same block again: the usual form of an overlap.
                Some(last) if (last.volume, last.start, last.end) == (piece.volume, piece.start, piece.end) => {
                    *last = piece;
                }
                Some(last) if last.volume == piece.volume && last.end > piece.start => {
                    self.resolve_overlaps();
                    break;
                }
                _ => self.pieces.push(piece),
            }
        }
        &self.pieces
    }

    /// The general form: from the newest change back, what no later one has covered.
    fn resolve_overlaps(&mut self) {
        self.pieces.clear();
        self.covered.iter_mut().for_each(ExtentSet::clear);
        for change in self.changes.iter().rev() {
            let volume = usize::from(change.volume);
            if self.covered.len() <= volume {
                self.covered.resize_with(volume + 1, ExtentSet::new);
            }
            let extent = Extent { start: change.start, end: change.end };
            let pieces = &mut self.pieces;
            self.covered[volume].for_each_missing(extent, |missing| pieces.push(change.part(missing)));
            self.covered[volume].insert(extent);
        }
        self.pieces.sort_unstable_by_key(|piece| (piece.volume, piece.start));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VOLUME_BYTES: usize = 4096;

    fn change() -> impl Strategy<Value = (u16, u64, u64, bool)> {
        // Whole blocks of 512 as well as anything: both forms of overlap.
        let blocks = (0u16..3, 0u64..7, 1u64..3, any::<bool>()).prop_map(|(v, o, l, z)| (v, o * 512, l * 512, z));
        let anything = (0u16..3, 0u64..4000, 0u64..600, any::<bool>());
        prop_oneof![3 => blocks, 1 => anything]
    }

    proptest! {
        /// Against volumes that are written in the order of the stream.
        #[test]
        fn equals_writing_in_order(changes in prop::collection::vec(change(), 0..60)) {
            let mut model = vec![vec![0xeeu8; VOLUME_BYTES]; 3];
            let mut replica = model.clone();
            let mut buffers: Vec<Vec<u8>> = Vec::new();
            let mut plan = BatchPlan::new();
            for (number, (volume, offset, length, zero)) in changes.into_iter().enumerate() {
                let end = (offset + length).min(VOLUME_BYTES as u64);
                let range = offset as usize..end.max(offset) as usize;
                let bytes: Vec<u8> = range.clone().map(|at| (at * 7 + number * 31) as u8).collect();
                if range.is_empty() { continue; }
                if zero {
                    model[volume as usize][range].fill(0);
                } else {
                    model[volume as usize][range].copy_from_slice(&bytes);
                }
                let source = (!zero).then_some(Source { buffer: buffers.len() as u32, offset: 0 });
                plan.push(Piece { volume, start: offset, end, source }, Stamp::default());
                buffers.push(bytes);
            }
            let mut last: Option<Piece> = None;
            for piece in plan.resolve() {
                prop_assert!(piece.start < piece.end);
                if let Some(last) = last {
                    prop_assert!((last.volume, last.end) <= (piece.volume, piece.start) || last.volume < piece.volume);
                }
                last = Some(*piece);
                let target = &mut replica[piece.volume as usize][piece.start as usize..piece.end as usize];
                match piece.source {
                    None => target.fill(0),
                    Some(Source { buffer, offset }) => {
                        let bytes = &buffers[buffer as usize][offset as usize..][..target.len()];
                        target.copy_from_slice(bytes);
                    }
                }
            }
            prop_assert_eq!(replica, model);
        }
    }

    #[test]
    fn used_again_it_remembers_nothing() {
        let piece = |start, end| Piece { volume: 0, start, end, source: None };
        let mut plan = BatchPlan::new();
        plan.push(piece(0, 100), Stamp::default());
        plan.push(piece(50, 150), Stamp::default());
        assert_eq!(plan.resolve(), [piece(0, 50), piece(50, 150)]);
        plan.clear();
        plan.push(piece(0, 10), Stamp::default());
        plan.push(piece(5, 10), Stamp::default());
        assert_eq!(plan.resolve(), [piece(0, 5), piece(5, 10)]);
    }
}
