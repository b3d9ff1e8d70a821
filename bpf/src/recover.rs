//! Finding out what earlier processes left in the pins: who owns which slot, and what to finish for them.
//!
//! | the ledger says | the volume's flags | what was going on | what is done |
//! |---|---|---|---|
//! | kept | active | capture | its next agent may go on |
//! | any | none | killed while it was added or taken away | taken away |
//! | any | draining | killed while writes of a given up volume were in flight | drains on |
//! | building, ending, free | active | killed before the first note, or after it was given up | given up |

use std::sync::Arc;
use std::sync::atomic::Ordering;

use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::capture::{Shared, dirty_map};
use crate::error::CaptureError;
use crate::group::VolumeSpec;
use crate::layout::*;
use crate::memory::Table;
use crate::slots::{Slots, Watched};

/// The map behind a slot of a map of maps.
pub(crate) fn inner_map(outer: &MapHandle, slot: u32) -> Result<Option<MapHandle>, CaptureError> {
    let found = outer
        .lookup(&slot.to_ne_bytes(), MapFlags::ANY)
        .map_err(|e| CaptureError::kernel("look a pinned map up", e))?;
    let Some(id) = found.and_then(|id| Some(u32::from_ne_bytes(id.try_into().ok()?))) else { return Ok(None) };
    let map = MapHandle::from_map_id(id).map_err(|e| CaptureError::kernel("open a pinned map", e))?;
    Ok(Some(map))
}

impl Shared {
    /// The bitmap of a volume. One that is not there any more (its group was being given up) is made anew. A volume that
    /// drains because it grew shares the larger one.
    fn find_bits(&self, index: u32, words: u64) -> Result<Table<std::sync::atomic::AtomicU64>, CaptureError> {
        let map = match inner_map(&self.dirty, index)? {
            Some(map) if u64::from(map.max_entries()) >= words => map,
            _ => {
                let map = dirty_map(words as u32)?;
                crate::group::set_inner(&self.dirty, index, &map)?;
                map
            }
        };
        Table::new(&map, words as usize).map_err(|e| CaptureError::kernel("map a bitmap", e))
    }

    /// See the module's text. To be called once, before anything else is done with what was pinned.
    pub(crate) fn recover(&self) -> Result<(), CaptureError> {
        let mut slots = self.slots();
        for slot in 0..GROUPS_MAX as u32 {
            match self.ledger[slot as usize].state.load(Ordering::Acquire) {
                LEDGER_FREE => {}
                LEDGER_KEPT => slots.found_group(slot),
                _ => self.ledger[slot as usize].state.store(LEDGER_ENDING, Ordering::Release),
            }
        }
        let found = self.find_volumes(&mut slots)?;
        let on_bios = found.iter().filter(|(_, spec)| !spec.request_based).count();
        self.config().bio_based.store(on_bios as u32, Ordering::Release);
        let mut given_up = Vec::new();
        for (index, spec) in found {
            let entry = &self.volumes[index as usize];
            let kept =
                self.ledger[entry.group.load(Ordering::Acquire) as usize % GROUPS_MAX].state.load(Ordering::Acquire)
                    == LEDGER_KEPT;
            match entry.flags.load(Ordering::Acquire) {
                0 => {
                    self.unwatch(&spec, index);
                    slots.free_volume(index);
                }
                flags if flags & VOLUME_ACTIVE != 0 && kept => {}
                _ => given_up.push((index, spec)),
            }
        }
        self.retire(&mut slots, given_up.into_iter());
        for slot in 0..GROUPS_MAX as u32 {
            if self.ledger[slot as usize].state.load(Ordering::Acquire) == LEDGER_ENDING {
                let _ = self.rings.delete(&slot.to_ne_bytes());
                self.ledger[slot as usize].state.store(LEDGER_FREE, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Every volume in the table of disks, with its bitmap.
    fn find_volumes(&self, slots: &mut Slots) -> Result<Vec<(u32, VolumeSpec)>, CaptureError> {
        let mut found = Vec::new();
        for disk in self.disks.iter() {
            let dev = disk.dev.load(Ordering::Acquire);
            if dev == 0 {
                // Killed before the disk could be found: nothing of it counts.
                disk.n.store(0, Ordering::Release);
                continue;
            }
            let n = (disk.n.load(Ordering::Acquire) as usize).min(DISK_VOLUMES);
            for index in disk.volume[..n].iter().map(|slot| slot.load(Ordering::Acquire)) {
                if index == DISK_VOLUME_NONE || usize::from(index) >= VOLUMES_MAX {
                    continue;
                }
                let index = u32::from(index);
                let entry = &self.volumes[index as usize];
                let spec = VolumeSpec {
                    disk: disk_of(dev),
                    start_bytes: entry.start.load(Ordering::Acquire) * 512,
                    bytes: entry.sectors.load(Ordering::Acquire) * 512,
                    request_based: disk.flags.load(Ordering::Acquire) & DISK_REQUEST_BASED != 0,
                };
                slots.claim_volume(index);
                if entry.flags.load(Ordering::Acquire) != 0 {
                    let bits = Arc::new(self.find_bits(index, crate::group::bitmap_words(spec.bytes))?);
                    slots.own_volume(index, Watched { spec: spec.clone(), bits });
                }
                found.push((index, spec));
            }
        }
        Ok(found)
    }

    /// The slot of a group that an earlier process left.
    pub(crate) fn find_kept(&self, slots: &Slots, name: &str) -> Option<u32> {
        slots.kept().find(|slot| self.ledger[*slot as usize].is_named(name))
    }

    /// The volumes of a group, by their numbers.
    pub(crate) fn volumes_of(&self, slots: &Slots, slot: u32) -> Vec<(u32, u32)> {
        let mine = |index: &u32| {
            let entry = &self.volumes[*index as usize];
            entry.group.load(Ordering::Acquire) == slot && entry.flags.load(Ordering::Acquire) & VOLUME_ACTIVE != 0
        };
        let mut volumes: Vec<(u32, u32)> = slots
            .watched()
            .map(|(index, _)| index)
            .filter(mine)
            .map(|index| (self.volumes[index as usize].number.load(Ordering::Acquire), index))
            .collect();
        volumes.sort_unstable();
        volumes
    }

    /// See [`crate::Capture::give_up`].
    pub(crate) fn give_up(&self, name: &str) -> bool {
        let mut slots = self.slots();
        let Some(slot) = self.find_kept(&slots, name) else { return false };
        let volumes = self.volumes_of(&slots, slot);
        let specs = |slots: &Slots| -> Vec<(u32, VolumeSpec)> {
            let spec = |index| Some((index, slots.watched_at(index)?.spec.clone()));
            volumes.iter().filter_map(|&(_, index)| spec(index)).collect()
        };
        let specs = specs(&slots);
        self.end_group(&mut slots, slot, &specs);
        true
    }

    /// Ends the capture of a group. The caller holds `slots`.
    pub(crate) fn end_group(&self, slots: &mut Slots, slot: u32, volumes: &[(u32, VolumeSpec)]) {
        let ledger = &self.ledger[slot as usize];
        ledger.state.store(LEDGER_ENDING, Ordering::Release);
        // Deactivates first, and returns when no program uses the ring and the bitmaps any more.
        self.retire(slots, volumes.iter().cloned());
        let _ = self.rings.delete(&slot.to_ne_bytes());
        for (index, _) in volumes {
            let _ = self.dirty.delete(&index.to_ne_bytes());
        }
        ledger.state.store(LEDGER_FREE, Ordering::Release);
        slots.free_group(slot);
    }
}
