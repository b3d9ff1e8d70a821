//! Who owns which slot of the programs' tables, and how a slot becomes free again.
//!
//! A volume's index decides which in-flight counts it adds to, so an index may only be given away when every write
//! that was counted under it has completed. A volume that is given up is therefore *drained*: nothing new is counted,
//! completions still are, and the index is free when each of its counts was seen at zero once. A device that hangs
//! keeps its index; that is a few bytes, and honest.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libbpf_rs::{MapCore, MapFlags};

use crate::capture::Shared;
use crate::error::CaptureError;
use crate::group::VolumeSpec;
use crate::layout::*;
use crate::memory::Table;

/// How long dropping a group waits for its last writes before it leaves the rest to a later call.
const DRAIN_WAIT: Duration = Duration::from_millis(200);

/// Slots in use. Behind a lock in [`Shared`]; only its holder changes the tables' structure.
#[derive(Default)]
pub(crate) struct Slots {
    groups: HashSet<u32>,
    /// Of those: left by an earlier process, and not taken over yet.
    kept: BTreeSet<u32>,
    volumes: HashMap<u32, Option<Watched>>,
    draining: Vec<Draining>,
}

/// A volume that owns an index.
pub(crate) struct Watched {
    pub(crate) spec: VolumeSpec,
    pub(crate) bits: Arc<Table<AtomicU64>>,
}

struct Draining {
    index: u32,
    spec: VolumeSpec,
    /// The counts that were not yet seen at zero.
    counts: Vec<usize>,
}

impl Slots {
    pub(crate) fn take_group(&mut self) -> Result<u32, CaptureError> {
        let free = (0..GROUPS_MAX as u32).find(|slot| self.groups.insert(*slot));
        free.ok_or_else(|| {
            CaptureError::limit(format!("more than {GROUPS_MAX} groups"), "put volumes into fewer groups")
        })
    }

    pub(crate) fn free_group(&mut self, slot: u32) {
        self.groups.remove(&slot);
        self.kept.remove(&slot);
    }

    /// Groups of an earlier process that nobody has taken over.
    pub(crate) fn kept(&self) -> impl Iterator<Item = u32> + use<'_> {
        self.kept.iter().copied()
    }

    /// A group that an earlier process left.
    pub(crate) fn found_group(&mut self, slot: u32) {
        self.groups.insert(slot);
        self.kept.insert(slot);
    }

    /// It was left by this process, and somebody else may go on with it.
    pub(crate) fn leave_group(&mut self, slot: u32) {
        self.kept.insert(slot);
    }

    /// Somebody goes on with it.
    pub(crate) fn take_over_group(&mut self, slot: u32) {
        self.kept.remove(&slot);
    }

    /// The index is in use already.
    pub(crate) fn claim_volume(&mut self, index: u32) {
        self.volumes.entry(index).or_insert(None);
    }

    pub(crate) fn watched_at(&self, index: u32) -> Option<&Watched> {
        self.volumes.get(&index)?.as_ref()
    }

    pub(crate) fn take_volume(&mut self) -> Result<u32, CaptureError> {
        let free = (0..BARRIER_VOLUME).find(|index| !self.volumes.contains_key(index)).ok_or_else(|| {
            CaptureError::limit(format!("more than {BARRIER_VOLUME} volumes"), "protect fewer volumes on this host")
        })?;
        self.volumes.insert(free, None);
        Ok(free)
    }

    /// Notes whose the index is.
    pub(crate) fn own_volume(&mut self, index: u32, watched: Watched) {
        self.volumes.insert(index, Some(watched));
    }

    /// The volumes whose writes are counted, those that drain included.
    pub(crate) fn watched(&self) -> impl Iterator<Item = (u32, &Watched)> {
        self.volumes.iter().filter_map(|(&index, watched)| Some((index, watched.as_ref()?)))
    }

    pub(crate) fn free_volume(&mut self, index: u32) {
        self.volumes.remove(&index);
    }
}

impl Shared {
    fn find_disk(&self, dev: u32, insert: bool) -> Option<&DiskEntry> {
        let start = disk_slot(dev);
        for i in 0..DISK_PROBES {
            let entry = &self.disks[(start + i) & (DISKS_MAX - 1)];
            let there = entry.dev.load(Ordering::Acquire);
            if there == dev {
                return Some(entry);
            }
            if there == 0 {
                return insert.then_some(entry);
            }
        }
        None
    }

    /// Makes the programs see the volume. Its control entry must be complete except for its flags, which are 0.
    pub(crate) fn watch(&self, spec: &VolumeSpec, index: u32) -> Result<(), CaptureError> {
        let dev = disk_number(spec.disk);
        let disk = self.find_disk(dev, true).ok_or_else(|| {
            CaptureError::limit("no room in the table of disks", "restart the agent: the table is new then")
        })?;
        let n = disk.n.load(Ordering::Acquire) as usize;
        let slots = &disk.volume;
        let hole = (0..n).find(|&i| slots[i].load(Ordering::Acquire) == DISK_VOLUME_NONE).unwrap_or(n);
        if hole == DISK_VOLUMES {
            return Err(CaptureError::limit(
                format!("more than {DISK_VOLUMES} protected volumes on disk {}:{}", spec.disk.0, spec.disk.1),
                "protect the whole disk as one volume",
            ));
        }
        let flags = if spec.request_based { DISK_REQUEST_BASED } else { 0 };
        let used = slots[..n].iter().any(|slot| slot.load(Ordering::Acquire) != DISK_VOLUME_NONE);
        if used && disk.flags.load(Ordering::Acquire) != flags {
            return Err(CaptureError::invalid(
                format!(
                    "disk {}:{} is request-based for one volume and bio-based for another",
                    spec.disk.0, spec.disk.1
                ),
                "this is a defect of the caller: `request_based` is a property of the disk",
            ));
        }
        disk.flags.store(flags, Ordering::Release);
        if !spec.request_based {
            self.config().bio_based.fetch_add(1, Ordering::AcqRel);
        }
        slots[hole].store(index as u16, Ordering::Release);
        if hole == n {
            disk.n.store(n as u32 + 1, Ordering::Release);
        }
        // Last, because it is what the programs find first.
        disk.dev.store(dev, Ordering::Release);
        Ok(())
    }

    /// Takes the volume away from the programs. Nothing of it may be in flight.
    pub(crate) fn unwatch(&self, spec: &VolumeSpec, index: u32) {
        let dev = disk_number(spec.disk);
        self.volumes[index as usize].flags.store(0, Ordering::Release);
        self.barrier();
        if let Some(disk) = self.find_disk(dev, false) {
            let n = disk.n.load(Ordering::Acquire) as usize;
            if let Some(at) = (0..n).find(|&i| disk.volume[i].load(Ordering::Acquire) == index as u16) {
                if spec.request_based {
                    self.forget_marks(dev, 1 << at);
                }
                disk.volume[at].store(DISK_VOLUME_NONE, Ordering::Release);
            }
            let used = (0..n).rev().find(|&i| disk.volume[i].load(Ordering::Acquire) != DISK_VOLUME_NONE);
            disk.n.store(used.map_or(0, |i| i as u32 + 1), Ordering::Release);
        }
        if !spec.request_based {
            self.config().bio_based.fetch_sub(1, Ordering::AcqRel);
        }
        self.barrier();
    }

    /// The bit of the volume in the masks of its disk.
    pub(crate) fn mask_of(&self, spec: &VolumeSpec, index: u32) -> u32 {
        let Some(disk) = self.find_disk(disk_number(spec.disk), false) else { return 0 };
        let at = disk.volume.iter().position(|slot| slot.load(Ordering::Acquire) == index as u16);
        at.map_or(0, |at| 1 << at)
    }

    /// Removes what bios of a request-based disk are remembered for. No program looks at these bits any more.
    pub(crate) fn forget_marks(&self, dev: u32, mask: u32) {
        for key in self.bios.keys().take(2 * INFLIGHT_SLOTS) {
            let Ok(Some(mut value)) = self.bios.lookup(&key, MapFlags::ANY) else { continue };
            if value.len() != TRACKED_BYTES || word(&value, TRACKED_DEV) != dev {
                continue;
            }
            let left = word(&value, TRACKED_MASK) & !mask;
            if left == word(&value, TRACKED_MASK) {
                continue;
            }
            // The bio may complete and delete the entry meanwhile: then there is nothing to do.
            let result = if left == 0 {
                self.bios.delete(&key)
            } else {
                value[TRACKED_MASK..TRACKED_MASK + 4].copy_from_slice(&left.to_ne_bytes());
                self.bios.update(&key, &value, MapFlags::EXIST)
            };
            drop(result);
        }
    }

    /// Stops the capture of volumes and waits a little for what is in flight. The caller holds `slots`.
    pub(crate) fn retire(&self, slots: &mut Slots, volumes: impl Iterator<Item = (u32, VolumeSpec)>) {
        let mut drain = Vec::new();
        for (index, spec) in volumes {
            let flags = &self.volumes[index as usize].flags;
            flags.fetch_or(VOLUME_DRAINING, Ordering::AcqRel);
            flags.fetch_and(!VOLUME_ACTIVE, Ordering::AcqRel);
            let regions = spec.bytes.div_ceil(crate::REGION_BYTES).min(INFLIGHT_SLOTS as u64);
            let counts = (0..regions).map(|region| inflight_slot(index, region)).collect();
            drain.push(Draining { index, spec, counts });
        }
        self.barrier();
        slots.draining.append(&mut drain);
        let end = Instant::now() + DRAIN_WAIT;
        while !self.drain(slots) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Frees what has drained; true if nothing is left to drain.
    pub(crate) fn drain(&self, slots: &mut Slots) -> bool {
        let mut i = 0;
        while i < slots.draining.len() {
            let draining = &mut slots.draining[i];
            draining.counts.retain(|&count| self.inflight[count].load(Ordering::Acquire) != 0);
            if draining.counts.is_empty() {
                let done = slots.draining.swap_remove(i);
                self.unwatch(&done.spec, done.index);
                slots.volumes.remove(&done.index);
            } else {
                i += 1;
            }
        }
        slots.draining.is_empty()
    }
}

fn word(value: &[u8], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&value[at..at + 4]);
    u32::from_ne_bytes(bytes)
}
