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
/// Memory of images that wait for the applier. Beyond, the session reads no further: data behind them waits for as long
/// as it takes to write them.
pub const IMAGE_BYTES_WAITING_MAX: usize = 32 << 20;
/// Images whose memory is kept for the next ones while a session sends some: of a MiB each.
pub const SPARE_IMAGES_MAX: usize = 8;
/// Probes that wait for the applier.
pub const PROBES_WAITING_MAX: usize = 64;
/// Probes that are read at once; one is digested meanwhile.
pub const PROBES_AT_ONCE: usize = 4;
/// Plain bytes that the applier takes at once.
pub const APPLY_BYTES_MAX: usize = 16 << 20;
/// Stored bytes that the applier takes at once: half of the arenas, so that landing can go on meanwhile.
pub const APPLY_STORED_BYTES_MAX: usize = (ARENAS_MAX / 2) * ARENA_BYTES;
/// The applier waits at most this long for more before it applies what it has: larger batches are sorted better, write a
/// block once that was written often, and fill the blocks of a layer.
pub const GATHER_TIME_MAX: Duration = Duration::from_millis(100);
/// Aligned memory in which a part of a batch is played to see what it replaces.
pub const BEFORE_STAGE_BYTES: usize = 6 << 20;
/// What a part takes of it, unless a single change takes more: while one part goes to the replicas, the next is played.
pub const PART_STAGE_BYTES: u64 = 2 << 20;
/// Content of recently written blocks that is kept so that it need not be read: per group that is being written.
pub const RECENT_BYTES: usize = 24 << 20;
/// What is written to a replica later than the rest of its batch, with what comes in the batches behind it, is no longer than this.
pub const LATE_BYTES_MAX: u64 = 16 << 10;
/// A longer stretch of zeroes is applied piece by piece, and what is a hole already is passed over.
pub const ZERO_PIECE_BYTES: u64 = 4 << 20;
/// Records that the applier takes at once.
pub const APPLY_RECORDS_MAX: usize = 64 << 10;
/// Aligned memory from which the replica is written.
pub const STAGE_BYTES: usize = 5 << 20;
/// Requests in flight to the replicas. Measured at random 4 KiB writes: 15 % less CPU than 64, no more than 256.
pub const REPLICA_DEPTH: u32 = 128;
/// Reads of a replica with no more than this between them become one.
pub const JOINED_GAP_BYTES: u64 = 16 << 10;
/// The longest of these.
pub const JOINED_BYTES_MAX: u64 = 256 << 10;
/// Aligned memory for those that are made at once.
pub const JOINED_STAGE_BYTES: usize = 4 << 20;
/// Aligned memory through which the landing log is read; at least the largest entry and two blocks.
pub const WINDOW_BYTES: usize = 4 << 20;
/// Bytes written to the replicas between two syncs, at most.
pub const UNSYNCED_BYTES_MAX: usize = 64 << 20;
/// Time between a write to the replicas and its sync, at most.
pub const UNSYNCED_TIME_MAX: Duration = Duration::from_millis(200);
/// Image bytes that share one sync.
pub const IMAGE_BYTES_PER_SYNC: usize = 64 << 20;
/// Image bytes that are written at once.
pub const IMAGES_AT_ONCE_BYTES: usize = 5 << 20;
/// Free space below which no session is opened: enough for the segment in use and what file systems keep back.
pub const DISK_FREE_BYTES_MIN: u64 = 64 << 20;
/// Segments that a group has from its beginning: one is written while the other is applied.
pub const SEGMENTS_PREPARED: usize = 2;
/// Free segments of a group that stay however long nobody needs them; those of a burst go.
pub const SEGMENTS_FREE_KEPT: usize = SEGMENTS_PREPARED;
/// How long a segment has to be free, together with as many others as the log ever had free meanwhile, to go: to make one again
/// costs a while in which nobody is acknowledged.
pub const SEGMENTS_FREE_TIME: Duration = Duration::from_secs(30);
/// Groups of all hosts together; one host has no more than [`varve_common::limits::GROUPS_MAX`] of them.
pub const GROUPS_MAX: usize = 1024;
/// A view reads at most this much at once, for one of its readers.
pub const VIEW_PIECE_BYTES: usize = 256 << 10;
/// What lies between two reads of the replica for a view, and is read with them rather than apart.
pub const VIEW_GAP_BYTES: u64 = 32 << 10;
/// Aligned memory of one reader of a view.
pub const VIEW_READ_BYTES: usize = 1 << 20;
/// Readers that a view keeps for the next read; more only live as long as theirs.
pub const VIEW_READERS_MAX: usize = 8;
/// Requests in flight of one reader.
pub const VIEW_READ_DEPTH: u32 = 64;
/// What a volume of a view remembers of how its regions are made up.
pub const VIEW_MAPS_BYTES_MAX: usize = 32 << 20;
/// Index blocks of all groups' histories in memory.
pub const INDEX_CACHE_BYTES: u64 = 128 << 20;
/// Index files held open.
pub const INDEX_FILES_OPEN_MAX: usize = 256;
/// The longest that a command waits for the replicas to reach what is landed.
pub const CATCH_UP_TIME_MAX: Duration = Duration::from_secs(60);
/// Free space below which the oldest layers go early; on a small file system a twentieth of it.
pub const FREE_BYTES_FLOOR: u64 = 1 << 30;
/// Between two looks at what is to be merged and what may expire.
pub const KEEPER_INTERVAL: Duration = Duration::from_secs(1);
/// How fast a scrub reads unless it is told otherwise, bytes a second.
pub const SCRUB_RATE: u64 = 200 << 20;
/// Stretches that `varve points` shows the density of points in.
pub const DENSITY_PARTS: usize = 24;
/// Damaged records that a scrub traces back to the points that they take away; beyond, a whole layer is given up.
pub const DAMAGES_TRACED_MAX: usize = 1000;
/// A rollback puts back this much at once, counted in whole blocks: while one part is written, the next is read.
pub const ROLLBACK_BYTES: u64 = 4 << 20;
/// It reads the records of this much at once, plain bytes: the more, the more of them lie side by side in their layers. Memory.
pub const ROLLBACK_ROUND_BYTES: u64 = 64 << 20;
/// What may lie between two records that are read with one request.
pub const ROLLBACK_GAP_BYTES: u64 = 16 << 10;
/// Aligned memory through which a rollback reads records.
pub const ROLLBACK_READ_BYTES: usize = 8 << 20;
/// Records that it reads at once.
pub const ROLLBACK_DEPTH: u32 = 128;
/// A restore reads and writes this much at once.
pub const RESTORE_BYTES: usize = 1 << 20;
/// Content that was written to promoted volumes of a group and is not in the replicas yet, as far as it is read from memory: beyond,
/// what is landed is read from there.
pub const PROMOTED_CONTENT_BYTES_MAX: usize = 64 << 20;
/// Memory for that and for knowing where the rest is. Beyond, writers wait; before it (some millions of writes) the landing log is
/// full.
pub const PROMOTED_PENDING_BYTES_MAX: usize = 256 << 20;
/// What is collected while the landing log is written. With one record more it is still a frame.
pub const PROMOTED_FRAME_BYTES: usize = 512 << 10;
/// Stretches that are landed and not applied when a group is taken over: some 64 bytes of memory each. With more, its devices
/// wait for the applier.
pub const BACKLOG_PIECES_MAX: usize = 1 << 20;
/// Entries of the landing log, decoded, that a promoted group keeps to read from.
pub const FETCHED_BYTES_MAX: usize = 32 << 20;
/// How often a read of a promoted volume begins again because what it was about to read from the landing log is applied.
pub const PROMOTED_RETRIES_MAX: usize = 1000;
/// Readers of a promoted volume whose memory is kept.
pub const PROMOTED_READERS_MAX: usize = 8;
/// Written to a view between two looks at the free space.
pub const OVERLAY_CREDIT_BYTES: u64 = 16 << 20;
/// Stretches of 256 KiB that were written to one view: beyond (1 TiB) it is full.
pub const OVERLAY_WORDS_MAX: u64 = 4 << 20;
/// The longest that a command waits for a group's files to be opened.
pub const OPEN_TIME_MAX: Duration = Duration::from_secs(10);
/// Views open at once, of all groups.
pub const VIEWS_MAX: usize = 64;
/// The longest that a takeover waits for a connected source to send what it has.
pub const DRAIN_TIME_MAX: Duration = Duration::from_secs(3);
/// A source that says nothing for so long (it reports twice a second) is not waited for.
pub const SOURCE_SILENT_TIME_MAX: Duration = Duration::from_millis(1500);
/// The longest that the comparison of a planned switch-over may stand still.
pub const PLANNED_STUCK_TIME_MAX: Duration = Duration::from_secs(60);
/// Gaps that the status shows.
pub const GAPS_SHOWN_MAX: usize = 16;
/// The longest that a peer may take for its preamble and hello.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest that a new session waits for the one that it replaces.
pub const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest that a release waits for what has the group in hand.
pub const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);
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
const _: () = assert!(
    PROMOTED_FRAME_BYTES as u64 + varve_common::record::RECORD_BYTES_MAX + 8
        <= varve_common::limits::FRAME_PLAIN_BYTES_MAX as u64
);
/// Regions under way to an agent whose group comes home, each with its bytes.
pub const HOME_REGIONS_MAX: usize = 24;
/// Regions read ahead of them.
pub const HOME_REGIONS_AHEAD: usize = 8;
/// Answers of such an agent that wait.
pub const HOME_WAITING_MAX: usize = 64;
/// Between two looks at what changed here meanwhile.
pub const HOME_LOOK_INTERVAL: Duration = Duration::from_millis(300);
/// The longest that such an agent may take to claim its volumes, or to begin to capture them.
pub const HOME_READY_TIME_MAX: Duration = Duration::from_secs(60);
/// The longest that a host may take to answer that its group is called home: its agent asks every ten seconds.
pub const HOME_CONNECT_TIME_MAX: Duration = Duration::from_secs(30);
/// The longest that the last pass and the comparison at the barrier may take. Then the group runs here again.
pub const HOME_CUT_OVER_TIME_MAX: Duration = Duration::from_secs(3600);
/// The longest that the operator waits for the agent to say that it has heard.
pub const HOME_TOLD_TIME_MAX: Duration = Duration::from_secs(20);
/// The longest that a disk here or there may take for a region of a group that comes home.
pub const HOME_STUCK_TIME_MAX: Duration = Duration::from_secs(60);
/// How long history is kept for an agent that has gone, so that it need not compare everything when it comes again.
pub const HOME_KEPT_TIME_MAX: Duration = Duration::from_secs(3600);
