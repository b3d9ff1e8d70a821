//! Content of the blocks that were written last: what the next write to them will replace need not be read.

use varve_common::format::BLOCK_BYTES;

const WAYS: usize = 4;
const EMPTY: u64 = u64::MAX;

/// A bounded cache of whole blocks, four ways to a set. Memory is only taken when something is kept.
#[derive(Debug)]
pub struct RecentBlocks {
    sets: usize,
    /// Volume and block of each slot.
    keys: Vec<u64>,
    /// The next way of each set to be replaced.
    hands: Vec<u8>,
    bytes: Vec<u8>,
}

/// A block of a volume as one number; [`varve_common::limits::VOLUME_BYTES_MAX`] leaves room for the volume's number.
fn key(volume: u16, block: u64) -> u64 {
    u64::from(volume) << 48 | block
}

impl RecentBlocks {
    /// For at most `bytes` of content.
    pub fn new(bytes: usize) -> Self {
        let sets = (bytes / BLOCK_BYTES / WAYS).max(1);
        Self { sets, keys: Vec::new(), hands: Vec::new(), bytes: Vec::new() }
    }

    /// Gives the memory back.
    pub fn clear(&mut self) {
        *self = Self { sets: self.sets, keys: Vec::new(), hands: Vec::new(), bytes: Vec::new() };
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

    /// The block was replaced as a whole.
    pub fn put(&mut self, volume: u16, block: u64, content: &[u8]) {
        debug_assert_eq!(content.len(), BLOCK_BYTES);
        if self.keys.is_empty() {
            self.keys = vec![EMPTY; self.sets * WAYS];
            self.hands = vec![0; self.sets];
            self.bytes = vec![0; self.sets * WAYS * BLOCK_BYTES];
        }
        let key = key(volume, block);
        let slot = self.slot(key).unwrap_or_else(|| {
            let set = self.set(key);
            let way = usize::from(self.hands[set]);
            self.hands[set] = ((way + 1) % WAYS) as u8;
            set * WAYS + way
        });
        self.keys[slot] = key;
        self.bytes[slot * BLOCK_BYTES..(slot + 1) * BLOCK_BYTES].copy_from_slice(content);
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

    /// Nothing is known of these blocks any more.
    pub fn forget(&mut self, volume: u16, first: u64, end: u64) {
        if self.keys.is_empty() {
            return;
        }
        if end - first > self.keys.len() as u64 {
            let range = key(volume, first)..key(volume, end);
            self.keys.iter_mut().filter(|have| range.contains(have)).for_each(|have| *have = EMPTY);
            return;
        }
        for block in first..end {
            if let Some(slot) = self.slot(key(volume, block)) {
                self.keys[slot] = EMPTY;
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
        /// It may forget, but what it says is what was put there last.
        #[test]
        fn never_says_anything_old(steps in prop::collection::vec((0u8..4, 0u16..2, 0u64..40, 1u64..9), 1..300)) {
            let mut recent = RecentBlocks::new(16 * BLOCK_BYTES);
            let mut model: HashMap<(u16, u64), Vec<u8>> = HashMap::new();
            for (number, (what, volume, block, count)) in steps.into_iter().enumerate() {
                let content = vec![number as u8; BLOCK_BYTES];
                match what {
                    0 | 1 => {
                        recent.put(volume, block, &content);
                        model.insert((volume, block), content);
                    }
                    2 => {
                        let zero = count % 2 == 0;
                        recent.patch(volume, block, 100, (!zero).then_some(&content[..50]), 50);
                        if let Some(have) = model.get_mut(&(volume, block)) {
                            have[100..150].fill(if zero { 0 } else { number as u8 });
                        }
                    }
                    _ => {
                        recent.forget(volume, block, block + count * 8);
                        (block..block + count * 8).for_each(|block| { model.remove(&(volume, block)); });
                    }
                }
                for (volume, block) in (0..2).flat_map(|v| (0..120).map(move |b| (v, b))) {
                    if let Some(have) = recent.get(volume, block) {
                        prop_assert_eq!(Some(have), model.get(&(volume, block)).map(|m| &m[..]));
                    }
                }
            }
        }
    }
}
