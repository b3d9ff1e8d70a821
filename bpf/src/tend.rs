//! Counts of bytes in flight that never come back to zero, and how they do.
//!
//! A completion can go unseen: the kernel skips a program that interrupts itself on its CPU (two programs watch, see
//! `complete.h`, so both must be hit), and a kernel may have rules of its own about when programs run. Then a count
//! stays above zero for ever, and whether the write failed is unknown. If the count has not changed over several
//! looks while none of the disks behind it had any write in flight, the completion was missed: the region gets dirty
//! first, then the count goes to zero. Should the write complete after all (its submitter slept between our program
//! and the disk's accounting all that time), the program finds the count below zero and makes the region dirty again.
//!
//! On a disk that is never idle nothing tells such a count from writes that follow each other closely. So a count that was
//! above zero at every look for long makes its regions dirty, too, and stays: in a moment without writes they are read
//! and all is well; without such a moment nobody can say that the replica is complete, and the group opens a gap.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::REGION_BYTES;
use crate::capture::Shared;
use crate::error::CaptureError;
use crate::group::disk_is_idle;
use crate::layout::{INFLIGHT_SLOTS, inflight_slot};
use crate::memory::Table;
use crate::slots::Watched;

/// Looks at an idle disk, at least [`LOOK_INTERVAL`] apart, that a count must survive unchanged.
const LOOKS: u32 = 3;
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// As long as a count may be above zero at every look.
const BUSY_LIMIT: Duration = Duration::from_secs(20);

/// Counts that looked stuck: on idle disks slot → (value, looks so far), on others slot → since when.
#[derive(Default)]
pub(crate) struct Stuck {
    counts: HashMap<usize, (u64, u32)>,
    busy: HashMap<usize, Instant>,
    last: Option<Instant>,
}

/// What a volume contributes to the counts: it starts at `first` and covers `regions` of them, around the end.
struct Span {
    index: u32,
    disk: (u32, u32),
    regions: u64,
    bits: Arc<Table<AtomicU64>>,
}

impl Span {
    fn new((index, watched): (u32, &Watched)) -> Self {
        Self {
            index,
            disk: watched.spec.disk,
            regions: watched.spec.bytes.div_ceil(REGION_BYTES),
            bits: watched.bits.clone(),
        }
    }

    fn make_dirty(&self, region: u64) {
        self.bits[(region / 64) as usize].fetch_or(1 << (region % 64), Ordering::AcqRel);
    }

    /// The regions of the volume that are counted in this slot.
    fn regions_in(&self, slot: usize) -> impl Iterator<Item = u64> + use<> {
        let first = slot.wrapping_sub(inflight_slot(self.index, 0)) & (INFLIGHT_SLOTS - 1);
        (first as u64..self.regions).step_by(INFLIGHT_SLOTS)
    }
}

impl Shared {
    /// See [`crate::Capture::tend`].
    pub(crate) fn tend(&self) -> Result<u64, CaptureError> {
        let mut slots = self.slots();
        let mut stuck = self.stuck();
        if stuck.last.is_some_and(|last| last.elapsed() < LOOK_INTERVAL) {
            return Ok(0);
        }
        let now = Instant::now();
        stuck.last = Some(now);
        self.drain(&mut slots);

        let spans: Vec<Span> = slots.watched().map(Span::new).collect();
        let mut idle: HashMap<(u32, u32), bool> = HashMap::new();
        for span in &spans {
            // The device may be gone: then nothing is in flight on it.
            idle.entry(span.disk).or_insert_with(|| disk_is_idle(span.disk).unwrap_or(true));
        }
        let mut looks = HashMap::new();
        let mut busy = HashMap::new();
        let mut dirty = 0;
        for (slot, count) in self.inflight.iter().enumerate() {
            let value = count.load(Ordering::Acquire);
            if value == 0 {
                continue;
            }
            let behind = || spans.iter().filter(|span| span.regions_in(slot).next().is_some());
            let make_dirty = || {
                let regions = behind().flat_map(|span| span.regions_in(slot).map(move |region| (span, region)));
                regions.map(|(span, region)| span.make_dirty(region)).count() as u64
            };
            if !behind().all(|span| idle[&span.disk]) {
                let since = *stuck.busy.get(&slot).unwrap_or(&now);
                if now.duration_since(since) < BUSY_LIMIT {
                    busy.insert(slot, since);
                } else {
                    dirty += make_dirty();
                    busy.insert(slot, now);
                }
                continue;
            }
            let seen = match stuck.counts.get(&slot) {
                Some(&(before, seen)) if before == value => seen + 1,
                _ => 1,
            };
            if seen < LOOKS {
                looks.insert(slot, (value, seen));
                continue;
            }
            dirty += make_dirty();
            // If it moved meanwhile, it is alive: let it be.
            let _ = count.compare_exchange(value, 0, Ordering::AcqRel, Ordering::Relaxed);
        }
        stuck.counts = looks;
        stuck.busy = busy;
        Ok(dirty)
    }
}
