//! Every limit in one place. Each is checked before anything is allocated or sent, on both sides.

/// Most plain bytes in one data frame: the largest record fits, with room to batch small ones.
pub const FRAME_PLAIN_BYTES_MAX: usize = 2 << 20;
/// Most bytes of a control body (everything that is neither data nor image).
pub const CONTROL_BYTES_MAX: usize = 64 << 10;
/// Groups on one agent.
pub const GROUPS_MAX: usize = 64;
/// Volumes in one group.
pub const VOLUMES_PER_GROUP_MAX: usize = 64;
/// Longest name of a group, host or bookmark in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest path in bytes in a message.
pub const PATH_BYTES_MAX: usize = 4096;
/// The unit of dirty tracking, image reads and comparison: one bit per region, in the kernel and here.
pub const REGION_BYTES: u64 = 1 << 20;
/// The unit of digests within a region.
pub const DIGEST_BLOCK_BYTES: u64 = 64 << 10;
/// Digests per region.
pub const DIGESTS_PER_REGION: usize = (REGION_BYTES / DIGEST_BLOCK_BYTES) as usize;
/// Extents in one image frame: a region in which every other sector was overwritten meanwhile.
pub const IMAGE_EXTENTS_MAX: usize = (REGION_BYTES / 512) as usize;
/// Regions that a sync may have under way at once: enough for what the receiver holds while it syncs its replica. Only
/// those that were not sent yet hold a buffer of [`REGION_BYTES`].
pub const SYNC_REGIONS_MAX: usize = 128;
/// Largest volume: 2^31 regions, a bitmap of 256 MiB.
pub const VOLUME_BYTES_MAX: u64 = 1 << 51;
/// Smallest and largest ring.
pub const RING_BYTES_MIN: u64 = 4 << 20;
/// See [`RING_BYTES_MIN`].
pub const RING_BYTES_MAX: u64 = 1 << 30;
/// Of the file system with the journals this part stays free,
const JOURNAL_FLOOR_PART: u64 = 20;
/// or this much, if that is less.
const JOURNAL_FLOOR_BYTES_MAX: u64 = 2 << 30;

/// Bytes that the journals leave free on a file system of `total`.
pub const fn journal_floor(total: u64) -> u64 {
    let part = total / JOURNAL_FLOOR_PART;
    if part < JOURNAL_FLOOR_BYTES_MAX { part } else { JOURNAL_FLOOR_BYTES_MAX }
}

/// A source's clock that is set back by less is met slowly, and its times do not fall; by more, and it was wrong before: its
/// times fall at once, at both ends, so that all that comes is not dated by the mistake until real time has caught up.
pub const CLOCK_SETBACK_NS_MIN: u64 = 10_000_000_000;

const _: () = assert!(crate::record::RECORD_BYTES_MAX <= FRAME_PLAIN_BYTES_MAX as u64);
