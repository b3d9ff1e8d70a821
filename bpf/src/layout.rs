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
    pub(crate) unused1: [AtomicU64; 4],
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
    pub(crate) unused2: [AtomicU64; 5],
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
const _: () = assert!(core::mem::offset_of!(VolumeEntry, untracked) == 144);
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

/// The device number as the programs compute it.
pub(crate) fn disk_number((major, minor): (u32, u32)) -> u32 {
    major << 20 | minor
}

/// Where the search for a disk starts in the table.
pub(crate) fn disk_slot(dev: u32) -> usize {
    (dev.wrapping_mul(2_654_435_761) >> 20) as usize
}

/// The slot that counts the bytes in flight of a region.
pub(crate) fn inflight_slot(volume: u32, region: u64) -> usize {
    (volume.wrapping_mul(40503).wrapping_add(region as u32) as usize) & (INFLIGHT_SLOTS - 1)
}
