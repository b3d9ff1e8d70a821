//! A volume that grew, captured on in its new size without a hole.
//!
//! The volume gets a second entry in the tables, in its new size, and the old one drains as if it were given up. So the
//! same two mechanisms decide which writes are counted as when a volume is added (settling) and taken away (draining), and
//! a write that is under way beyond the old end is a late one: its region is dirty when it completes. Between the two
//! steps both capture: a record may stand twice in the ring, which changes nothing.
//!
//! | killed after | the next process finds | and does |
//! |---|---|---|
//! | the new entry is there | flags of none | takes it away, grows again |
//! | it captures | two volumes of one number | begins a new ring: the volumes are compared |
//! | the old one drains | `late_unknown` above what was seen | makes the whole volume dirty |
//! | the bits are taken over | a volume of the new size | goes on |

use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::REGION_BYTES;
use crate::error::CaptureError;
use crate::group::{Group, VolumeSpec, set_inner};
use crate::layout::*;
use crate::recover::inner_map;
use crate::slots::Watched;
use crate::track::VolumeTrack;

impl Group {
    /// Whether a volume has another size in `specs` than it is captured in.
    pub fn is_outgrown(&self, specs: &[VolumeSpec]) -> bool {
        self.volumes().iter().zip(specs).any(|(track, spec)| track.spec().bytes != spec.bytes)
    }

    /// Captures the volumes in the sizes that `specs` say, none of which is smaller. What is new is dirty. Nobody else may
    /// have taken a region from the bitmaps and not finished it.
    ///
    /// # Errors
    /// As [`crate::Capture::add_group`]. The group goes on as it was, or with some volumes in their new size.
    pub fn grow(&mut self, specs: &[VolumeSpec]) -> Result<(), CaptureError> {
        for (number, spec) in specs.iter().enumerate().take(self.volumes().len()) {
            if spec.bytes > self.volumes()[number].spec().bytes {
                self.grow_volume(number, spec)?;
            }
        }
        Ok(())
    }

    fn grow_volume(&mut self, number: usize, spec: &VolumeSpec) -> Result<(), CaptureError> {
        crate::group::check_volume(spec)?;
        let new = self.add_volume(number as u32, spec)?;
        // Until everything of the old entry is taken over, whoever finds this one does not know enough of it.
        new.entry().late_unknown.store(1, Ordering::Release);
        let old = self.volumes()[number].spec().clone();
        let index = self.volumes()[number].index();
        for region in old.bytes / REGION_BYTES..new.regions() {
            new.set_dirty(region);
        }
        let shared = self.shared().clone();
        let mut slots = shared.slots();
        // What becomes dirty while the old entry drains is dirty in the new one's eyes.
        let shares = inner_map(&shared.dirty, new.index()).and_then(|map| {
            let map = map.ok_or_else(|| CaptureError::kernel("grow a bitmap", "the new one is not there"))?;
            set_inner(&shared.dirty, index, &map)
        });
        if let Err(error) = shares {
            shared.unwatch(spec, new.index());
            slots.free_volume(new.index());
            return Err(error);
        }
        slots.own_volume(index, Watched { spec: old.clone(), bits: new.bits().clone() });
        new.entry().flags.store(VOLUME_ACTIVE | VOLUME_SETTLING, Ordering::Release);
        shared.retire(&mut slots, std::iter::once((index, old)));
        let before = self.replace_track(number, new);
        // No program uses the old entry's bits or counts any more.
        take_over_state(&before, &self.volumes()[number]);
        *self.settle().lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        Ok(())
    }
}

fn take_over_state(old: &VolumeTrack, new: &VolumeTrack) {
    old.take_back();
    for region in std::iter::successors(old.next_dirty(0), |region| old.next_dirty(region + 1)) {
        new.set_dirty(region);
    }
    let (from, to) = (old.entry(), new.entry());
    let add = |to: &AtomicU64, from: &AtomicU64| to.fetch_add(from.load(Ordering::Acquire), Ordering::AcqRel);
    add(&to.records, &from.records);
    add(&to.bytes, &from.bytes);
    add(&to.dropped_records, &from.dropped_records);
    add(&to.dropped_bytes, &from.dropped_bytes);
    add(&to.unreadable, &from.unreadable);
    add(&to.failed_writes, &from.failed_writes);
    add(&to.straddling, &from.straddling);
    add(&to.late, &from.late);
    add(&to.passthrough, &from.passthrough);
    add(&to.untracked, &from.untracked);
    add(&to.resized, &from.resized);
    // Last and in this order: see the table.
    add(&to.late_unknown, &from.late_unknown);
    add(&to.late_unknown_seen, &from.late_unknown_seen);
    to.late_unknown.fetch_sub(1, Ordering::AcqRel);
}
