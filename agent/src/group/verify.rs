//! One comparison of a group's volumes with their replicas, while writes go on. Pure.
//!
//! A block counts as compared when it was read and compared at one position and nobody wrote to it in between. A block
//! that differs then is looked at again before anybody is alarmed; one that is written all the time is read again, and
//! in the end reported as *unverified*: neither a difference nor a proof.

use super::regions::{Blocks, all_blocks};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};
use varve_common::geometry::{region_count, region_extent};
use varve_common::limits::DIGEST_BLOCK_BYTES;
use varve_common::wire::messages::{VERIFY_EXTENTS_MAX, Verify};

/// How often a region is read before its restless blocks are given up.
const ATTEMPTS_MAX: u32 = 20;
/// How often a block must differ, each time untouched, before it counts as different.
const CONFIRMATIONS: u32 = 3;
/// Pause before a region is looked at again, times the attempts so far.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// Regions ordered at once.
const ORDER_MAX: usize = 16;

struct RegionCheck {
    attempts: u32,
    /// Blocks that are not settled yet.
    open: Blocks,
    /// How often each block differed.
    differed: [u32; 16],
}

/// See the module's text.
pub struct VerifyRun {
    outcome: Verify,
    sizes: Vec<u64>,
    next: (usize, u64),
    checks: BTreeMap<(u16, u64), RegionCheck>,
    again: VecDeque<(Instant, u16, u64)>,
    differing: Vec<(u16, u64)>,
}

impl VerifyRun {
    /// Compares volumes of `sizes`; number `id`; from position `from`.
    pub fn new(id: u64, repair: bool, sizes: Vec<u64>, from: u64) -> Self {
        let outcome = Verify { id, repair, total_bytes: sizes.iter().sum(), from, to: from, ..Verify::default() };
        Self { outcome, sizes, next: (0, 0), checks: BTreeMap::new(), again: VecDeque::new(), differing: Vec::new() }
    }

    /// Progress, or the outcome.
    pub fn outcome(&self) -> &Verify {
        &self.outcome
    }

    /// Regions with a difference.
    pub fn differing_regions(&self) -> &[(u16, u64)] {
        &self.differing
    }

    /// Ends without a result.
    pub fn fail(&mut self, error: impl Into<String>) {
        self.outcome.finished = true;
        self.outcome.error = Some(error.into());
    }

    /// Regions to read next; empty if enough is under way or nothing is due.
    pub fn order(&mut self, now: Instant) -> Vec<(u16, u64)> {
        let mut order = Vec::new();
        while self.under_way() + order.len() < ORDER_MAX {
            if self.again.front().is_some_and(|(due, ..)| *due <= now)
                && let Some((_, volume, region)) = self.again.pop_front()
            {
                order.push((volume, region));
            } else if let Some(fresh) = self.take_next() {
                order.push(fresh);
            } else {
                break;
            }
        }
        order
    }

    fn under_way(&self) -> usize {
        self.checks.len() - self.again.len().min(self.checks.len())
    }

    fn take_next(&mut self) -> Option<(u16, u64)> {
        loop {
            let (volume, region) = self.next;
            let bytes = *self.sizes.get(volume)?;
            if region >= region_count(bytes) {
                self.next = (volume + 1, 0);
                continue;
            }
            self.next.1 += 1;
            let blocks = region_extent(region, bytes).len().div_ceil(DIGEST_BLOCK_BYTES) as usize;
            let check = RegionCheck { attempts: 0, open: all_blocks(blocks), differed: [0; 16] };
            self.checks.insert((volume as u16, region), check);
            return Some((volume as u16, region));
        }
    }

    /// The outcome of one look at a region: `differs` as the receiver says, `touched` by writes meanwhile. `None` for
    /// both: the region was too busy to be read.
    pub fn looked(&mut self, volume: u16, region: u64, look: Option<(Blocks, Blocks)>, position: u64, now: Instant) {
        let Some(check) = self.checks.get_mut(&(volume, region)) else { return };
        check.attempts += 1;
        self.outcome.to = self.outcome.to.max(position);
        if let Some((differs, touched)) = look {
            let quiet = check.open & !touched;
            check.open &= !(quiet & !differs);
            for (index, count) in check.differed.iter_mut().enumerate() {
                if quiet & differs & (1 << index) != 0 {
                    *count += 1;
                }
            }
        }
        let confirmed = (0..16).filter(|&i| check.open & (1 << i) != 0 && check.differed[i] >= CONFIRMATIONS);
        let confirmed = confirmed.fold(0, |bits, i| bits | 1 << i);
        if check.open & !confirmed != 0 && check.attempts < ATTEMPTS_MAX {
            self.again.push_back((now + RETRY_PAUSE * check.attempts, volume, region));
            self.again.make_contiguous().sort_by_key(|(due, ..)| *due);
            return;
        }
        self.settle(volume, region);
    }

    fn settle(&mut self, volume: u16, region: u64) {
        let Some(check) = self.checks.remove(&(volume, region)) else { return };
        let extent = region_extent(region, self.sizes[usize::from(volume)]);
        let mut different = false;
        for index in (0..16u64).filter(|index| check.open & (1 << index) != 0) {
            let start = extent.start + index * DIGEST_BLOCK_BYTES;
            let length = DIGEST_BLOCK_BYTES.min(extent.end - start);
            if check.differed[index as usize] >= CONFIRMATIONS {
                different = true;
                self.outcome.differing_bytes += length;
                if self.outcome.extents.len() < VERIFY_EXTENTS_MAX {
                    self.outcome.extents.push((volume, start, length));
                }
            } else {
                self.outcome.unverified_bytes += length;
            }
        }
        if different {
            self.differing.push((volume, region));
        }
        self.outcome.done_bytes += extent.len();
        self.outcome.finished = self.outcome.done_bytes == self.outcome.total_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(sizes: Vec<u64>, mut look: impl FnMut(u16, u64, u32) -> Option<(Blocks, Blocks)>) -> Verify {
        let mut run = VerifyRun::new(1, false, sizes, 100);
        let mut now = Instant::now();
        let mut looks = BTreeMap::new();
        for _ in 0..10_000 {
            if run.outcome().finished {
                break;
            }
            for (volume, region) in run.order(now) {
                let count = looks.entry((volume, region)).or_insert(0);
                *count += 1;
                run.looked(volume, region, look(volume, region, *count), 200, now);
            }
            now += Duration::from_millis(100);
        }
        assert!(run.outcome().finished, "ends");
        run.outcome().clone()
    }

    #[test]
    fn equal_volumes() {
        let outcome = run(vec![40 << 20, (1 << 20) + 512], |_, _, _| Some((0, 0)));
        assert_eq!((outcome.differing_bytes, outcome.unverified_bytes), (0, 0));
        assert_eq!(outcome.done_bytes, (41 << 20) + 512);
    }

    #[test]
    fn a_difference_must_last() {
        let outcome = run(vec![4 << 20], |_, region, count| Some((if region == 2 && count == 1 { 8 } else { 0 }, 0)));
        assert_eq!(outcome.differing_bytes, 0, "it was gone at the second look: no alarm");
        let outcome = run(vec![4 << 20], |_, region, _| Some((if region == 2 { 8 } else { 0 }, 0)));
        assert_eq!(outcome.differing_bytes, 65536);
        assert_eq!(outcome.extents, [(0, (2 << 20) + 3 * 65536, 65536)]);
    }

    #[test]
    fn a_block_under_constant_writes_is_neither() {
        let outcome = run(vec![2 << 20], |_, region, _| Some(if region == 0 { (1, 1) } else { (0, 0) }));
        assert_eq!((outcome.differing_bytes, outcome.unverified_bytes), (0, 65536));
        let outcome = run(vec![512], |_, _, _| None);
        assert_eq!((outcome.differing_bytes, outcome.unverified_bytes), (0, 512));
    }
}
