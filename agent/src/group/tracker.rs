//! Which parts of an image read are overtaken by the stream.
//!
//! An image read of a region may return data older than a write that was captured and is still under way, and newer
//! than the position at which the image is applied. Both are harmless if every sector that a captured write touched
//! *since the region was registered* is left out of the image, because:
//!
//! 1. the region's dirty bit is taken, then it is registered, with the stream's end *r* of that moment: records from *r*
//!    on are noted here;
//! 2. then the reader waits until no write to the region is in flight: every write with a position below *r* has
//!    completed (capture counts a write as in flight before it reserves its record);
//! 3. then it reads: the read holds all those writes, or newer ones, and newer ones are noted;
//! 4. the image is sent at a position up to which all records were noted, without the noted sectors: what is left was
//!    not written between *r* and that position, so it equals the volume at that position.
//!
//! A write that never reached the stream (ring full) has its region's dirty bit set again if it came after the bit was
//! taken: the region is read again. If it came before, the read holds it, or a record from *r* on is newer than it. (Not
//! from the walk's position on, which may lag behind *r*: a record from in between may be *older* than a dropped write.
//! The simulation found that.)

use varve_common::geometry::{Extent, ExtentSet};

/// Names one registered region.
pub type RegionId = u64;

struct Active {
    id: RegionId,
    volume: u16,
    extent: Extent,
    from: u64,
    overtaken: ExtentSet,
}

/// The regions being read or compared, and what was written to them since. At most
/// [`SYNC_REGIONS_MAX`](varve_common::limits::SYNC_REGIONS_MAX) are active, so a list is searched, not a map.
#[derive(Default)]
pub struct Tracker {
    active: Vec<Active>,
    next_id: RegionId,
}

impl Tracker {
    /// Starts noting what records from position `from` on write to `extent` of volume `volume`. `from` is the stream's end
    /// at this moment, and nothing behind it was walked yet: both are so if walk and registration hold the same lock.
    pub fn register(&mut self, volume: u16, extent: Extent, from: u64) -> RegionId {
        let id = self.next_id;
        self.next_id += 1;
        self.active.push(Active { id, volume, extent, from, overtaken: ExtentSet::new() });
        id
    }

    /// Stops noting.
    pub fn forget(&mut self, id: RegionId) {
        self.active.retain(|active| active.id != id);
    }

    /// Whether the region that starts at `start` is registered. It must not be taken again before it is done: the probe
    /// of the second read would be answered before the image of the first one is in the replica.
    pub fn is_active(&self, volume: u16, start: u64) -> bool {
        self.active.iter().any(|active| active.volume == volume && active.extent.start == start)
    }

    /// Whether nothing is registered.
    pub fn is_empty(&self) -> bool {
        self.active.is_empty()
    }

    /// The walk met a record at `position` that changes `extent` of volume `volume`.
    pub fn note(&mut self, position: u64, volume: u16, extent: Extent) {
        for active in self.active.iter_mut().filter(|active| active.volume == volume && position >= active.from) {
            if let Some(both) = active.extent.intersection(&extent) {
                active.overtaken.insert(both);
            }
        }
    }

    /// What was overtaken since `id` was registered; nothing if it was forgotten.
    pub fn overtaken(&self, id: RegionId) -> ExtentSet {
        self.active.iter().find(|active| active.id == id).map(|active| active.overtaken.clone()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_only_its_own_volume_and_extent() {
        let mut tracker = Tracker::default();
        let a = tracker.register(0, Extent { start: 1000, end: 2000 }, 10);
        let b = tracker.register(1, Extent { start: 1000, end: 2000 }, 10);
        tracker.note(10, 0, Extent { start: 500, end: 1100 });
        tracker.note(9, 0, Extent { start: 1500, end: 1600 });
        tracker.note(10, 0, Extent { start: 3000, end: 4000 });
        tracker.note(11, 1, Extent { start: 1900, end: 9000 });
        let extents = |id| tracker.overtaken(id).iter().collect::<Vec<_>>();
        assert_eq!(extents(a), [Extent { start: 1000, end: 1100 }]);
        assert_eq!(extents(b), [Extent { start: 1900, end: 2000 }]);
        tracker.forget(a);
        tracker.forget(b);
        assert!(tracker.is_empty());
    }
}
