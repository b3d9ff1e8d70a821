//! The control structures that the programs share with us, as atomics over mapped memory.
//!
//! `src/bpf/record.h` is the C side; both sides assert sizes and offsets.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

pub(crate) const GROUPS_MAX: usize = 64;
pub(crate) const VOLUMES_MAX: usize = 1024;
/// The last entry of `dirty` belongs to nobody: replacing it makes the kernel wait for running programs.
pub(crate) const BARRIER_VOLUME: u32 = VOLUMES_MAX as u32 - 1;
pub(crate) const INFLIGHT_SLOTS: usize = 65536;
pub(crate) const DISKS_MAX: usize = 4096;
pub(crate) const DISK_PROBES: usize = 8;
pub(crate) const DISK_VOLUMES: usize = 24;
pub(crate) const DISK_VOLUME_NONE: u16 = 0xffff;

pub(crate) const DISK_REQUEST_BASED: u32 = 1;

pub(crate) const VOLUME_ACTIVE: u32 = 1;
pub(crate) const VOLUME_SETTLING: u32 = 2;
pub(crate) const VOLUME_DRAINING: u32 = 4;

/// Memory that may be viewed as this type whatever bytes it holds, shared with programs that change it.
///
/// # Safety
/// Only for `repr(C)` types that consist of atomic integers alone, without padding.
#[allow(unsafe_code)]
pub(crate) unsafe trait Shared {}

#[repr(C)]
pub(crate) struct DiskEntry {
    pub(crate) dev: AtomicU32,
    pub(crate) flags: AtomicU32,
    pub(crate) n: AtomicU32,
    pub(crate) unused: AtomicU32,
    pub(crate) volume: [AtomicU16; DISK_VOLUMES],
}

#[repr(C)]
pub(crate) struct VolumeEntry {
    pub(crate) flags: AtomicU32,
    pub(crate) group: AtomicU32,
    pub(crate) number: AtomicU32,
    pub(crate) unused0: AtomicU32,
    pub(crate) start: AtomicU64,
    pub(crate) sectors: AtomicU64,
    /// See [`crate::pins::disk_identity`].
    pub(crate) identity: AtomicU64,
    /// Sectors that the device had when last looked at; 0: it is not the volume alone, so its size says nothing.
    pub(crate) device: AtomicU64,
    pub(crate) unused1: [AtomicU64; 2],
    pub(crate) records: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) dropped_records: AtomicU64,
    pub(crate) dropped_bytes: AtomicU64,
    pub(crate) unreadable: AtomicU64,
    pub(crate) failed_writes: AtomicU64,
    pub(crate) straddling: AtomicU64,
    pub(crate) late: AtomicU64,
    pub(crate) late_unknown: AtomicU64,
    pub(crate) passthrough: AtomicU64,
    pub(crate) untracked: AtomicU64,
    /// How much of `late_unknown` has made the volume dirty.
    pub(crate) late_unknown_seen: AtomicU64,
    /// Times that the device was found to have another size.
    pub(crate) resized: AtomicU64,
    pub(crate) unused2: [AtomicU64; 3],
}

#[repr(C)]
pub(crate) struct GroupEntry {
    pub(crate) time_offset: AtomicU64,
    pub(crate) first_drop: AtomicU64,
    pub(crate) unused: [AtomicU64; 6],
}

#[repr(C)]
pub(crate) struct ConfigEntry {
    pub(crate) page_base: AtomicU64,
    pub(crate) data_base: AtomicU64,
    pub(crate) ratio: AtomicU64,
    pub(crate) bio_based: AtomicU32,
    pub(crate) unused: AtomicU32,
    pub(crate) rescued: AtomicU64,
}

const _: () = assert!(size_of::<DiskEntry>() == 64);
const _: () = assert!(size_of::<VolumeEntry>() == 192);
const _: () = assert!(core::mem::offset_of!(VolumeEntry, records) == 64);
const _: () = assert!(core::mem::offset_of!(VolumeEntry, start) == 16);
const _: () = assert!(core::mem::offset_of!(VolumeEntry, identity) == 32);
const _: () = assert!(core::mem::offset_of!(VolumeEntry, device) == 40);
const _: () = assert!(core::mem::offset_of!(VolumeEntry, untracked) == 144);
const _: () = assert!(core::mem::offset_of!(VolumeEntry, resized) == 160);
const _: () = assert!(core::mem::offset_of!(DiskEntry, volume) == 16);
const _: () = assert!(core::mem::offset_of!(GroupEntry, first_drop) == 8);
const _: () = assert!(size_of::<GroupEntry>() == 64);
const _: () = assert!(size_of::<ConfigEntry>() == 40);

// SAFETY: repr(C), atomic integers only, the size asserted above is the sum of the members.
#[allow(unsafe_code)]
unsafe impl Shared for DiskEntry {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Shared for VolumeEntry {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Shared for GroupEntry {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Shared for ConfigEntry {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Shared for LedgerEntry {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Shared for IdentityEntry {}
// SAFETY: an atomic integer.
#[allow(unsafe_code)]
unsafe impl Shared for AtomicU64 {}

/// `struct tracked`: a bio that its completion must recognise. Passed by value, so plain bytes.
pub(crate) const TRACKED_BYTES: usize = 24;
pub(crate) const TRACKED_DEV: usize = 12;
pub(crate) const TRACKED_MASK: usize = 16;

/// `struct mark`.
pub(crate) const MARK_BYTES: usize = 280;

/// `struct probe`: members before the page of data.
pub(crate) const PROBE_HEAD_BYTES: usize = 48;
pub(crate) const PROBE_BYTES: usize = PROBE_HEAD_BYTES + 4096;

/// Version of everything that outlives the agent in pins: the layouts in this file and of the records, what the maps
/// are called, what the programs do with them, the agent's note. Raise it with any change after which an agent could
/// not go on with the pins of the one before.
pub(crate) const PIN_LAYOUT: u32 = 1;
/// Words of the agent's note about a group.
pub const NOTE_WORDS: usize = 24;
pub(crate) const NAME_BYTES: usize = 64;

/// Nobody's.
pub(crate) const LEDGER_FREE: u32 = 0;
/// Being made, or its agent has not noted anything yet: nobody can go on with it.
pub(crate) const LEDGER_BUILDING: u32 = 1;
/// An agent that comes later goes on with it.
pub(crate) const LEDGER_KEPT: u32 = 2;
/// Given up: what is left of it is to be taken away.
pub(crate) const LEDGER_ENDING: u32 = 3;

/// What agents leave for the next one about a group. No program looks at it.
#[repr(C)]
pub(crate) struct LedgerEntry {
    pub(crate) state: AtomicU32,
    pub(crate) volumes: AtomicU32,
    pub(crate) name: [AtomicU64; NAME_BYTES / 8],
    pub(crate) incarnation: [AtomicU64; 2],
    /// Which of the notes holds: 0, 1.
    pub(crate) current: AtomicU64,
    pub(crate) notes: [[AtomicU64; NOTE_WORDS]; 2],
    pub(crate) unused: [AtomicU64; 4],
}

/// Says what is pinned. The first four members stay where they are in every layout.
#[repr(C)]
pub(crate) struct IdentityEntry {
    pub(crate) magic: AtomicU64,
    pub(crate) layout: AtomicU32,
    pub(crate) unused0: AtomicU32,
    pub(crate) boot: [AtomicU64; 2],
    pub(crate) software: [AtomicU64; 4],
    pub(crate) unused: [AtomicU64; 24],
}

const _: () = assert!(size_of::<LedgerEntry>() == 512);
const _: () = assert!(size_of::<IdentityEntry>() == 256);

/// The device number as the programs compute it.
pub(crate) fn disk_number((major, minor): (u32, u32)) -> u32 {
    major << 20 | minor
}

/// The other way round.
pub(crate) fn disk_of(number: u32) -> (u32, u32) {
    (number >> 20, number & ((1 << 20) - 1))
}

/// Where the search for a disk starts in the table.
pub(crate) fn disk_slot(dev: u32) -> usize {
    (dev.wrapping_mul(2_654_435_761) >> 20) as usize
}

/// The slot that counts the bytes in flight of a region.
pub(crate) fn inflight_slot(volume: u32, region: u64) -> usize {
    (volume.wrapping_mul(40503).wrapping_add(region as u32) as usize) & (INFLIGHT_SLOTS - 1)
}
