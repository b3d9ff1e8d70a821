//! Extents, sets of extents, regions.

use crate::limits::REGION_BYTES;
use std::collections::BTreeMap;

/// A half-open stretch of bytes of one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
}

impl Extent {
    /// From an offset and a length; `None` if it would wrap.
    pub fn at(offset: u64, length: u64) -> Option<Self> {
        Some(Self { start: offset, end: offset.checked_add(length)? })
    }

    /// Bytes in it.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }

    /// What both hold.
    pub fn intersection(&self, other: &Extent) -> Option<Extent> {
        let both = Extent { start: self.start.max(other.start), end: self.end.min(other.end) };
        (!both.is_empty()).then_some(both)
    }
}

/// The extent of region `region` of a volume of `volume_bytes`.
pub fn region_extent(region: u64, volume_bytes: u64) -> Extent {
    let start = region * REGION_BYTES;
    Extent { start, end: (start + REGION_BYTES).min(volume_bytes) }
}

/// Regions of a volume of `volume_bytes`, the last one possibly short.
pub fn region_count(volume_bytes: u64) -> u64 {
    volume_bytes.div_ceil(REGION_BYTES)
}

/// A set of bytes of one volume, kept as disjoint, non-adjacent extents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtentSet {
    extents: BTreeMap<u64, u64>,
}

impl ExtentSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Number of disjoint extents.
    pub fn extent_count(&self) -> usize {
        self.extents.len()
    }

    /// Bytes in the set.
    pub fn bytes(&self) -> u64 {
        self.extents.iter().map(|(start, end)| end - start).sum()
    }

    /// Takes everything out.
    pub fn clear(&mut self) {
        self.extents.clear();
    }

    /// The extents in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        self.extents.iter().map(|(&start, &end)| Extent { start, end })
    }

    /// Calls `gap` for every part of `extent` that is not in the set, in ascending order.
    pub fn for_each_missing(&self, extent: Extent, mut gap: impl FnMut(Extent)) {
        let mut at = extent.start;
        let before = self.extents.range(..=extent.start).next_back();
        if let Some((_, &end)) = before {
            at = at.max(end);
        }
        for (&start, &end) in self.extents.range(extent.start..extent.end) {
            if at < start {
                gap(Extent { start: at, end: start });
            }
            at = at.max(end);
        }
        if at < extent.end {
            gap(Extent { start: at, end: extent.end });
        }
    }

    /// Whether any byte of `extent` is in the set.
    pub fn intersects(&self, extent: Extent) -> bool {
        if extent.is_empty() {
            return false;
        }
        self.extents.range(..extent.end).next_back().is_some_and(|(_, &end)| end > extent.start)
    }

    /// Puts `extent` into the set.
    pub fn insert(&mut self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        let Extent { mut start, mut end } = extent;
        if let Some((&s, &e)) = self.extents.range(..=start).next_back()
            && e >= start
        {
            start = s;
            end = end.max(e);
        }
        while let Some((&s, &e)) = self.extents.range(start..=end).next() {
            end = end.max(e);
            self.extents.remove(&s);
        }
        self.extents.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a plain array of booleans.
        #[test]
        fn set_equals_model(inserts in prop::collection::vec((0u64..200, 0u64..40), 0..40), ask in (0u64..220, 0u64..60)) {
            let mut set = ExtentSet::new();
            let mut model = [false; 300];
            for (offset, length) in inserts {
                set.insert(Extent { start: offset, end: offset + length });
                model[offset as usize..(offset + length) as usize].fill(true);
            }
            prop_assert_eq!(set.bytes(), model.iter().filter(|&&b| b).count() as u64);
            let mut last_end = None;
            for extent in set.iter() {
                prop_assert!(!extent.is_empty());
                prop_assert!(last_end.is_none_or(|end| end < extent.start), "disjoint and not adjacent");
                last_end = Some(extent.end);
            }
            let asked = Extent { start: ask.0, end: ask.0 + ask.1 };
            let mut missing = [false; 300];
            set.for_each_missing(asked, |gap| missing[gap.start as usize..gap.end as usize].fill(true));
            for byte in 0..300u64 {
                let inside = byte >= asked.start && byte < asked.end;
                prop_assert_eq!(missing[byte as usize], inside && !model[byte as usize]);
            }
            let any = (asked.start..asked.end).any(|byte| model[byte as usize]);
            prop_assert_eq!(set.intersects(asked), any);
        }
    }
}
