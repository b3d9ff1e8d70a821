//! Counts of bytes in flight that never come back to zero, and how they do.
//!
//! A completion can go unseen: the kernel skips a program that interrupts itself on its CPU (two programs watch, see
//! `complete.h`, so both must be hit), and a kernel may have rules of its own about when programs run. Then a count
//! stays above zero for ever, and whether the write failed is unknown. If the count has not changed over several
//! looks while none of the disks behind it had any write in flight, the completion was missed: the region gets dirty
//! first, then the count goes to zero. Should the write complete after all (its submitter slept between our program
//! and the disk's accounting all that time), the program finds the count below zero and makes the region dirty again.
//!
//! On a disk that is never idle nothing tells such a count from writes that follow each other closely. So where a completion went
//! unseen once, and only there, a count that is above zero at every look makes its regions dirty, too, and stays: in a moment
//! without writes they are read, and without one nobody can say that the replica is complete.

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

/// As long as a count may be above zero at every look, and how many looks that takes at least.
const BUSY_LIMIT: Duration = Duration::from_secs(10);
const BUSY_LOOKS: u32 = 8;
/// Then it is looked at closely for so long.
const BUSY_WATCH: Duration = Duration::from_millis(50);
const BUSY_POLL: Duration = Duration::from_micros(200);

/// Counts that looked stuck.
#[derive(Default)]
pub(crate) struct Stuck {
    /// On idle disks: slot → (value, looks so far).
    counts: HashMap<usize, (u64, u32)>,
    /// Slot → since when it is above zero at each look, and looks.
    busy: HashMap<usize, (Instant, u32)>,
    /// This kernel has lost completions.
    lossy: bool,
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
        let (mut looks, mut busy, mut due) = (HashMap::new(), HashMap::new(), Vec::new());
        let mut dirty = 0;
        for (slot, count) in self.inflight.iter().enumerate() {
            let value = count.load(Ordering::Acquire);
            if value == 0 {
                continue;
            }
            let (since, seen) = stuck.busy.get(&slot).copied().unwrap_or((now, 0));
            busy.insert(slot, (since, seen + 1));
            let behind = || spans.iter().filter(|span| span.regions_in(slot).next().is_some());
            if !behind().all(|span| idle[&span.disk]) {
                if stuck.lossy && now.duration_since(since) >= BUSY_LIMIT && seen >= BUSY_LOOKS {
                    due.push(slot);
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
            stuck.lossy = true;
            dirty += make_dirty(&spans, slot);
            // If it moved meanwhile, it is alive: let it be.
            let _ = count.compare_exchange(value, 0, Ordering::AcqRel, Ordering::Relaxed);
        }
        busy.retain(|slot, _| !due.contains(slot));
        for slot in self.never_zero(due) {
            dirty += make_dirty(&spans, slot);
        }
        stuck.counts = looks;
        stuck.busy = busy;
        Ok(dirty)
    }

    /// Which of these are above zero all the while.
    fn never_zero(&self, mut slots: Vec<usize>) -> Vec<usize> {
        let until = Instant::now() + BUSY_WATCH;
        while !slots.is_empty() && Instant::now() < until {
            slots.retain(|&slot| self.inflight[slot].load(Ordering::Acquire) != 0);
            std::thread::sleep(BUSY_POLL);
        }
        slots
    }
}

/// All that is counted in this slot; gives how many regions that are.
fn make_dirty(spans: &[Span], slot: usize) -> u64 {
    let regions = spans.iter().flat_map(|span| span.regions_in(slot).map(move |region| (span, region)));
    regions.map(|(span, region)| span.make_dirty(region)).count() as u64
}
