//! What user space sees of one volume: dirty regions, writes in flight, counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::REGION_BYTES;
use crate::capture::Shared;
use crate::group::VolumeSpec;
use crate::layout::{INFLIGHT_SLOTS, VolumeEntry, inflight_slot};
use crate::memory::Table;

/// Counters of a volume since it joined its group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeCounters {
    /// Writes (bios) seen, whatever became of them.
    pub captured_records: u64,
    /// Their bytes.
    pub captured_bytes: u64,
    /// Records that the ring had no room for; their regions are dirty.
    pub dropped_records: u64,
    /// Bytes of their extents.
    pub dropped_bytes: u64,
    /// Records whose pages could not be read, or whose device encrypts below us; their regions are dirty.
    pub unreadable: u64,
    /// Completions with an error; their regions are dirty.
    pub failed_writes: u64,
    /// Writes that reach over the volume's edge; the part inside is dirty.
    pub straddling: u64,
    /// Completions of writes that were in flight at the activation; their regions are dirty.
    pub late: u64,
    /// The same where the extent could not be known: the whole volume is to be compared.
    pub late_unknown: u64,
    /// Commands that bypass the block layer's operations: what they wrote is unknown.
    pub passthrough: u64,
    /// Writes that could not be remembered for their completion; their regions are dirty.
    pub untracked: u64,
    /// Times that a write found the volume's device with another size than before.
    pub resized: u64,
}

impl std::ops::AddAssign for VolumeCounters {
    fn add_assign(&mut self, o: Self) {
        self.captured_records += o.captured_records;
        self.captured_bytes += o.captured_bytes;
        self.dropped_records += o.dropped_records;
        self.dropped_bytes += o.dropped_bytes;
        self.unreadable += o.unreadable;
        self.failed_writes += o.failed_writes;
        self.straddling += o.straddling;
        self.late += o.late;
        self.late_unknown += o.late_unknown;
        self.passthrough += o.passthrough;
        self.untracked += o.untracked;
        self.resized += o.resized;
    }
}

/// One volume of a group, as the capture programs keep track of it.
pub struct VolumeTrack {
    shared: Arc<Shared>,
    index: u32,
    spec: VolumeSpec,
    bits: Arc<Table<AtomicU64>>,
}

impl VolumeTrack {
    pub(crate) fn new(shared: Arc<Shared>, index: u32, spec: VolumeSpec, bits: Arc<Table<AtomicU64>>) -> Self {
        Self { shared, index, spec, bits }
    }

    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    pub(crate) fn bits(&self) -> &Arc<Table<AtomicU64>> {
        &self.bits
    }

    pub(crate) fn entry(&self) -> &VolumeEntry {
        &self.shared.volumes[self.index as usize]
    }

    /// What was asked for.
    pub fn spec(&self) -> &VolumeSpec {
        &self.spec
    }

    /// Regions of [`REGION_BYTES`] that the volume has, the last one perhaps shorter.
    pub fn regions(&self) -> u64 {
        self.spec.bytes.div_ceil(REGION_BYTES)
    }

    fn word(&self, region: u64) -> (&AtomicU64, u64) {
        assert!(region < self.regions(), "region {region} of {}", self.regions());
        (&self.bits[(region / 64) as usize], 1 << (region % 64))
    }

    /// Makes a region dirty.
    pub fn set_dirty(&self, region: u64) {
        let (word, bit) = self.word(region);
        word.fetch_or(bit, Ordering::AcqRel);
    }

    /// The word that says whether a region was taken.
    fn taken(&self, region: u64) -> (&AtomicU64, u64) {
        let (_, bit) = self.word(region);
        (&self.bits[self.bits.len() / 2 + (region / 64) as usize], bit)
    }

    /// The words of the dirty regions.
    fn dirty(&self) -> &[AtomicU64] {
        &self.bits[..self.bits.len() / 2]
    }

    /// Makes a region clean; returns whether it was dirty. Do this *before* reading the region. It counts as taken until
    /// [`VolumeTrack::set_finished`]: who takes the group over finds it dirty again.
    pub fn take_dirty(&self, region: u64) -> bool {
        // Taken first: at no moment is neither bit set.
        let (taken, bit) = self.taken(region);
        let before = taken.fetch_or(bit, Ordering::AcqRel);
        let (word, _) = self.word(region);
        let was_dirty = word.fetch_and(!bit, Ordering::AcqRel) & bit != 0;
        if !was_dirty && before & bit == 0 {
            taken.fetch_and(!bit, Ordering::AcqRel);
        }
        was_dirty
    }

    /// A region that was taken is equal in the replica, or dirty again.
    pub fn set_finished(&self, region: u64) {
        let (taken, bit) = self.taken(region);
        taken.fetch_and(!bit, Ordering::AcqRel);
    }

    /// Makes every region dirty that was taken and not finished.
    pub(crate) fn take_back(&self) {
        let (dirty, taken) = self.bits.split_at(self.bits.len() / 2);
        for (dirty, taken) in dirty.iter().zip(taken) {
            // Dirty first: a process that is killed in between leaves both bits.
            dirty.fetch_or(taken.load(Ordering::Acquire), Ordering::AcqRel);
            taken.store(0, Ordering::Release);
        }
    }

    /// The first dirty region at or after `from`.
    pub fn next_dirty(&self, from: u64) -> Option<u64> {
        if from >= self.regions() {
            return None;
        }
        let first = (from / 64) as usize;
        for (i, word) in self.dirty().iter().enumerate().skip(first) {
            let mut bits = word.load(Ordering::Acquire);
            if i == first {
                bits &= u64::MAX << (from % 64);
            }
            if bits != 0 {
                return Some(i as u64 * 64 + u64::from(bits.trailing_zeros()));
            }
        }
        None
    }

    /// How many regions are dirty.
    pub fn dirty_count(&self) -> u64 {
        self.dirty().iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }

    /// Makes the whole volume dirty.
    pub fn set_all_dirty(&self) {
        let regions = self.regions();
        for (i, word) in self.dirty().iter().enumerate() {
            let left = regions - i as u64 * 64;
            word.fetch_or(if left >= 64 { u64::MAX } else { (1 << left) - 1 }, Ordering::AcqRel);
        }
    }

    /// Whether a write to the region may be in flight. Another region may share the count, so true may be false
    /// alarm; false is exact.
    pub fn in_flight(&self, region: u64) -> bool {
        self.in_flight_bytes(region) != 0
    }

    /// Regions that have between them all counts of the volume: in the others it is the same ones.
    pub fn counted_regions(&self) -> std::ops::Range<u64> {
        0..self.regions().min(INFLIGHT_SLOTS as u64)
    }

    /// The count behind [`VolumeTrack::in_flight`]: bytes submitted and not yet completed.
    pub fn in_flight_bytes(&self, region: u64) -> i64 {
        self.shared.inflight[inflight_slot(self.index, region)].load(Ordering::Acquire) as i64
    }

    /// Takes back what is in flight there, as [`crate::Capture::tend`] does on an idle disk. For tests: a disk that says that it is
    /// idle with a write under way is hard to come by.
    #[doc(hidden)]
    pub fn forgive_in_flight(&self, region: u64) {
        self.shared.inflight[inflight_slot(self.index, region)].store(0, Ordering::Release);
    }

    /// Counts bytes there whose completion nobody will see. For tests.
    #[doc(hidden)]
    pub fn lose_completion(&self, region: u64, bytes: u64) {
        self.shared.inflight[inflight_slot(self.index, region)].fetch_add(bytes, Ordering::AcqRel);
    }

    /// The counters.
    pub fn counters(&self) -> VolumeCounters {
        let entry = self.entry();
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        VolumeCounters {
            captured_records: get(&entry.records),
            captured_bytes: get(&entry.bytes),
            dropped_records: get(&entry.dropped_records),
            dropped_bytes: get(&entry.dropped_bytes),
            unreadable: get(&entry.unreadable),
            failed_writes: get(&entry.failed_writes),
            straddling: get(&entry.straddling),
            late: get(&entry.late),
            late_unknown: get(&entry.late_unknown),
            passthrough: get(&entry.passthrough),
            untracked: get(&entry.untracked),
            resized: get(&entry.resized),
        }
    }
}
