//! Limits that only the receiver has; those of the protocol are in [`varve_common::limits`].

use std::time::Duration;

/// What arrives is copied into arenas of this size; a batch of the landing log lies in one. At least two of the
/// largest frames.
pub const ARENA_BYTES: usize = 4 << 20;
/// Arenas of one group: some are being filled or written, the others hold what the applier has not taken yet.
pub const ARENAS_MAX: usize = 8;
/// A frame that is not complete keeps a batch from being written unless what has come of it is no more than this:
/// then it is copied into the next batch.
pub const CUT_COPY_BYTES_MAX: usize = 64 << 10;
/// Images that wait for the applier, plain bytes. Beyond, the session reads no further: data behind them waits for as long
/// as it takes to write them.
pub const IMAGE_BYTES_WAITING_MAX: usize = 32 << 20;
/// Probes that wait for the applier.
pub const PROBES_WAITING_MAX: usize = 64;
/// Plain bytes that the applier takes at once.
pub const APPLY_BYTES_MAX: usize = 16 << 20;
/// Stored bytes that the applier takes at once: half of the arenas, so that landing can go on meanwhile.
pub const APPLY_STORED_BYTES_MAX: usize = (ARENAS_MAX / 2) * ARENA_BYTES;
/// Records that the applier takes at once.
pub const APPLY_RECORDS_MAX: usize = 64 << 10;
/// Aligned memory from which the replica is written.
pub const STAGE_BYTES: usize = 4 << 20;
/// Requests in flight to the replicas. Measured at random 4 KiB writes: 15 % less CPU than 64, no more than 256.
pub const REPLICA_DEPTH: u32 = 128;
/// Aligned memory through which the landing log is read; at least the largest entry and two blocks.
pub const WINDOW_BYTES: usize = 4 << 20;
/// Bytes written to the replicas between two syncs, at most.
pub const UNSYNCED_BYTES_MAX: usize = 64 << 20;
/// Time between a write to the replicas and its sync, at most.
pub const UNSYNCED_TIME_MAX: Duration = Duration::from_millis(200);
/// Image bytes that share one sync.
pub const IMAGE_BYTES_PER_SYNC: usize = 64 << 20;
/// Free space below which no session is opened: enough for the segment in use and what file systems keep back.
pub const DISK_FREE_BYTES_MIN: u64 = 64 << 20;
/// Segments that a group has from its beginning: one is written while the other is applied.
pub const SEGMENTS_PREPARED: usize = 2;
/// Groups of all hosts together; one host has no more than [`varve_common::limits::GROUPS_MAX`] of them.
pub const GROUPS_MAX: usize = 1024;
/// Gaps that the status shows.
pub const GAPS_SHOWN_MAX: usize = 16;
/// The longest that a peer may take for its preamble and hello.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest that a new session waits for the one that it replaces.
pub const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest that a refused peer is given to read why.
pub const REFUSED_TIMEOUT: Duration = Duration::from_secs(3);
/// The longest that an agent may leave its answers unread before the session ends.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Answers (probes, images, asks) that wait to be written to one agent.
pub const ANSWERS_WAITING_MAX: usize = 1024;
/// Largest `group.json` that is read.
pub const GROUP_FILE_BYTES_MAX: u64 = 1 << 20;
/// Chunks taken from a stream at once.
pub const CHUNKS_AT_ONCE: usize = 64;
/// A report older than this says nothing of the present.
pub const REPORT_AGE_MAX: Duration = Duration::from_secs(5);

const _: () = assert!(ARENA_BYTES >= 2 * varve_common::limits::FRAME_PLAIN_BYTES_MAX);
const _: () = assert!(WINDOW_BYTES >= varve_common::limits::FRAME_PLAIN_BYTES_MAX + 4 * 4096);
const _: () = assert!(IMAGE_BYTES_WAITING_MAX >= 2 * varve_common::wire::IMAGE_BODY_BYTES_MAX);
// While one half of an agent's window is being synced the other half flows.
const _: () = assert!(
    2 * IMAGE_BYTES_PER_SYNC as u64
        <= varve_common::limits::SYNC_REGIONS_MAX as u64 * varve_common::limits::REGION_BYTES
);
