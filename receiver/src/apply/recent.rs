//! Content of the blocks that were written last: what the next write to them will replace need not be read, and while one batch
//! follows the other a block that is written often need not be written to the replica each time: it is *late* there.

use super::plan::{Piece, Source};
use varve_common::format::BLOCK_BYTES;

const WAYS: usize = 4;
const EMPTY: u64 = u64::MAX;

/// A bounded cache of whole blocks, four ways to a set. Memory is only taken when something is kept.
#[derive(Debug, Default)]
pub struct RecentBlocks {
    sets: usize,
    /// Volume and block of each slot.
    keys: Vec<u64>,
    /// The next way of each set to be replaced.
    hands: Vec<u8>,
    bytes: Vec<u8>,
    /// Of each slot: the replica does not have it yet.
    late: Vec<bool>,
}

/// A block of a volume as one number; [`varve_common::limits::VOLUME_BYTES_MAX`] leaves room for the volume's number.
fn key(volume: u16, block: u64) -> u64 {
    u64::from(volume) << 48 | block
}

impl RecentBlocks {
    /// For at most `bytes` of content.
    pub fn new(bytes: usize) -> Self {
        let sets = (bytes / BLOCK_BYTES / WAYS).max(1);
        Self { sets, ..Self::default() }
    }

    /// Gives the memory back. Nothing is late.
    pub fn clear(&mut self) {
        debug_assert!(!self.late.contains(&true));
        *self = Self { sets: self.sets, ..Self::default() };
    }

    fn set(&self, key: u64) -> usize {
        // Fibonacci hashing: neighbours go to different sets.
        let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((u128::from(mixed) * self.sets as u128) >> 64) as usize
    }

    fn slot(&self, key: u64) -> Option<usize> {
        let first = self.set(key) * WAYS;
        let ways = self.keys.get(first..first + WAYS)?;
        ways.iter().position(|have| *have == key).map(|way| first + way)
    }

    /// The block's content, if it is known.
    pub fn get(&self, volume: u16, block: u64) -> Option<&[u8]> {
        let slot = self.slot(key(volume, block))?;
        Some(&self.bytes[slot * BLOCK_BYTES..(slot + 1) * BLOCK_BYTES])
    }

    /// The block was replaced as a whole. `late`: the replica gets it with the other late ones, unless there is no room for it
    /// among them, which is said.
    pub fn put(&mut self, volume: u16, block: u64, content: &[u8], late: bool) -> bool {
        debug_assert_eq!(content.len(), BLOCK_BYTES);
        if self.keys.is_empty() {
            self.keys = vec![EMPTY; self.sets * WAYS];
            self.hands = vec![0; self.sets];
            self.bytes = vec![0; self.sets * WAYS * BLOCK_BYTES];
            self.late = vec![false; self.sets * WAYS];
        }
        let key = key(volume, block);
        let Some(slot) = self.slot(key).or_else(|| self.make_room(key)) else { return false };
        self.keys[slot] = key;
        self.late[slot] |= late;
        self.bytes[slot * BLOCK_BYTES..(slot + 1) * BLOCK_BYTES].copy_from_slice(content);
        true
    }

    /// The next slot of its set whose block is not late.
    fn make_room(&mut self, key: u64) -> Option<usize> {
        let set = self.set(key);
        let first = usize::from(self.hands[set]);
        let way = (first..first + WAYS).map(|way| way % WAYS).find(|way| !self.late[set * WAYS + way])?;
        self.hands[set] = ((way + 1) % WAYS) as u8;
        Some(set * WAYS + way)
    }

    /// The late blocks, sorted; their source is buffer 0, which is [`RecentBlocks::bytes`].
    pub fn late(&self) -> Vec<Piece> {
        let slots = (0..self.keys.len()).filter(|slot| self.late[*slot]);
        let piece = |slot: usize| {
            let (volume, start) = ((self.keys[slot] >> 48) as u16, (self.keys[slot] << 16 >> 16) * BLOCK_BYTES as u64);
            let source = Some(Source { buffer: 0, offset: (slot * BLOCK_BYTES) as u32 });
            Piece { volume, start, end: start + BLOCK_BYTES as u64, source }
        };
        let mut pieces: Vec<Piece> = slots.map(piece).collect();
        pieces.sort_unstable_by_key(|piece| (piece.volume, piece.start));
        pieces
    }

    /// What the late blocks hold.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The replica has all of them.
    pub fn written(&mut self) {
        self.late.fill(false);
    }

    /// Some bytes of the block were replaced, from `at` on; `None`: by `len` zeroes.
    pub fn patch(&mut self, volume: u16, block: u64, at: usize, content: Option<&[u8]>, len: usize) {
        let Some(slot) = self.slot(key(volume, block)) else { return };
        let target = &mut self.bytes[slot * BLOCK_BYTES + at..][..len];
        match content {
            Some(content) => target.copy_from_slice(content),
            None => target.fill(0),
        }
    }

    /// Nothing is known of these blocks any more. They are not late: something else is written to the replica there.
    pub fn forget(&mut self, volume: u16, first: u64, end: u64) {
        if self.keys.is_empty() {
            return;
        }
        if end - first > self.keys.len() as u64 {
            let range = key(volume, first)..key(volume, end);
            let slots = self.keys.iter_mut().zip(&mut self.late).filter(|(have, _)| range.contains(have));
            slots.for_each(|(have, late)| (*have, *late) = (EMPTY, false));
            return;
        }
        for block in first..end {
            if let Some(slot) = self.slot(key(volume, block)) {
                (self.keys[slot], self.late[slot]) = (EMPTY, false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        /// It may forget, but what it says is what was put there last; and it does not forget what a replica does not have.
        #[test]
        fn never_says_anything_old(steps in prop::collection::vec((0u8..7, 0u16..2, 0u64..40, 1u64..9), 1..300)) {
            let mut recent = RecentBlocks::new(16 * BLOCK_BYTES);
            let mut model: HashMap<(u16, u64), Vec<u8>> = HashMap::new();
            let mut replica = model.clone();
            for (number, (what, volume, block, count)) in steps.into_iter().enumerate() {
                let content = vec![number as u8; BLOCK_BYTES];
                match what {
                    0 | 1 => {
                        recent.put(volume, block, &content, false);
                        replica.insert((volume, block), content.clone());
                        model.insert((volume, block), content);
                    }
                    2 | 3 => {
                        if !recent.put(volume, block, &content, true) {
                            replica.insert((volume, block), content.clone());
                        }
                        model.insert((volume, block), content);
                    }
                    4 => {
                        let zero = count % 2 == 0;
                        recent.patch(volume, block, 100, (!zero).then_some(&content[..50]), 50);
                        for held in [&mut model, &mut replica] {
                            if let Some(have) = held.get_mut(&(volume, block)) {
                                have[100..150].fill(if zero { 0 } else { number as u8 });
                            }
                        }
                    }
                    5 => {
                        // Longer than there are slots now and then.
                        let end = block + count * 8;
                        recent.forget(volume, block, end);
                        (block..end).for_each(|block| { model.remove(&(volume, block)); replica.remove(&(volume, block)); });
                    }
                    _ => {
                        for piece in recent.late() {
                            let from = piece.source.map_or(0, |source| source.offset as usize);
                            let content = recent.bytes()[from..from + BLOCK_BYTES].to_vec();
                            prop_assert_eq!(piece.bytes(), BLOCK_BYTES as u64);
                            replica.insert((piece.volume, piece.start / BLOCK_BYTES as u64), content);
                        }
                        recent.written();
                        prop_assert!(recent.late().is_empty());
                        prop_assert_eq!(&replica, &model);
                    }
                }
                for (volume, block) in (0..2).flat_map(|v| (0..120).map(move |b| (v, b))) {
                    if let Some(have) = recent.get(volume, block) {
                        prop_assert_eq!(Some(have), model.get(&(volume, block)).map(|m| &m[..]));
                    } else {
                        prop_assert_eq!(replica.get(&(volume, block)), model.get(&(volume, block)));
                    }
                }
            }
        }
    }
}
