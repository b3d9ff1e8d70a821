//! Sets of equal stretches of a group's volumes: regions to compare, blocks that changed.

use varve_common::geometry::Extent;
use varve_timeline::error::HistoryError;
use varve_timeline::merge::all_addresses;
use varve_timeline::resolve::changed;
use varve_timeline::timeline::Timeline;

/// One bit for each `unit` bytes of each volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    unit: u64,
    sizes: Vec<u64>,
    bits: Vec<Vec<u64>>,
}

impl Blocks {
    /// Nothing of volumes of these sizes.
    pub fn none(sizes: &[u64], unit: u64) -> Self {
        let bits = sizes.iter().map(|bytes| vec![0; bytes.div_ceil(unit).div_ceil(64) as usize]).collect();
        Self { unit, sizes: sizes.to_vec(), bits }
    }

    /// All of them.
    pub fn all(sizes: &[u64], unit: u64) -> Self {
        let mut all = Self::none(sizes, unit);
        for (volume, &bytes) in sizes.iter().enumerate() {
            all.insert(volume as u16, 0, bytes);
        }
        all
    }

    /// What changed after `height`.
    ///
    /// # Errors
    /// If an index cannot be read.
    pub fn changed_since(timeline: &Timeline, height: u64, sizes: &[u64], unit: u64) -> Result<Self, HistoryError> {
        let mut set = Self::none(sizes, unit);
        for entry in changed(&timeline.plan(height)?, all_addresses(), height)? {
            let entry = entry?;
            set.insert(entry.address.volume(), entry.address.byte(), entry.end().byte());
        }
        Ok(set)
    }

    /// Whatever a stretch touches. Beyond the end of a volume there is nothing.
    pub fn insert(&mut self, volume: u16, start: u64, end: u64) {
        let Some(&bytes) = self.sizes.get(usize::from(volume)) else { return };
        if start >= bytes {
            return;
        }
        let words = &mut self.bits[usize::from(volume)];
        for number in start / self.unit..end.min(bytes).div_ceil(self.unit) {
            words[(number / 64) as usize] |= 1 << (number % 64);
        }
    }

    /// Whether the block at this byte is in it.
    pub fn contains(&self, volume: u16, byte: u64) -> bool {
        let number = byte / self.unit;
        let word = self.bits.get(usize::from(volume)).and_then(|words| words.get((number / 64) as usize));
        word.is_some_and(|word| word & (1 << (number % 64)) != 0)
    }

    /// Everything that the other has, too.
    pub fn add(&mut self, other: &Self) {
        debug_assert_eq!((self.unit, &self.sizes), (other.unit, &other.sizes));
        for (mine, theirs) in self.bits.iter_mut().flatten().zip(other.bits.iter().flatten()) {
            *mine |= theirs;
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.bits.iter().flatten().all(|word| *word == 0)
    }

    /// Bytes of it.
    pub fn bytes(&self) -> u64 {
        self.iter().map(|(_, extent)| extent.len()).sum()
    }

    /// Volume and extent of each, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u16, Extent)> + '_ {
        self.bits.iter().enumerate().flat_map(move |(volume, words)| {
            let bytes = self.sizes[volume];
            words.iter().enumerate().filter(|(_, word)| **word != 0).flat_map(move |(index, word)| {
                (0..64).filter(move |bit| word & (1 << bit) != 0).map(move |bit| {
                    let start = (index as u64 * 64 + bit) * self.unit;
                    (volume as u16, Extent { start, end: (start + self.unit).min(bytes) })
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn as_a_plain_set(stretches in prop::collection::vec((0u16..3, 0u64..9000, 1u64..400), 0..30)) {
            let sizes = [8000, 1, 640];
            let mut set = Blocks::none(&sizes, 10);
            let mut model = std::collections::BTreeSet::new();
            for (volume, start, len) in stretches {
                set.insert(volume, start, start + len);
                let Some(&bytes) = sizes.get(usize::from(volume)) else { continue };
                model.extend((start..(start + len).min(bytes)).map(|byte| (volume, byte / 10 * 10)));
            }
            let end = |volume: u16, start: u64| (start + 10).min(sizes[usize::from(volume)]);
            let expected: Vec<_> =
                model.iter().map(|&(volume, start)| (volume, Extent { start, end: end(volume, start) })).collect();
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), expected);
            prop_assert_eq!(set.is_empty(), model.is_empty());
            prop_assert!(model.iter().all(|&(volume, byte)| set.contains(volume, byte)));
            let mut all = Blocks::all(&sizes, 10);
            prop_assert_eq!(all.bytes(), 8641);
            all.add(&set);
            prop_assert_eq!(all, Blocks::all(&sizes, 10));
        }
    }
}
