//! Every limit of the timeline.

/// Records never cross a multiple of this many bytes of a volume.
pub const GRANULE_BYTES: u64 = 64 << 10;
/// The unit of addresses and lengths.
pub const SECTOR_BYTES: u64 = 512;
/// Sectors of a granule: the longest record.
pub const GRANULE_SECTORS: u16 = (GRANULE_BYTES / SECTOR_BYTES) as u16;
/// Most bytes of one chunk, header, table and padding included.
pub const CHUNK_BYTES_MAX: usize = 8 << 20;
/// Most records of one chunk.
pub const CHUNK_RECORDS_MAX: usize = 32 << 10;
/// Most points (records of the stream) that one chunk tells of.
pub const CHUNK_POINTS_MAX: usize = 128 << 10;
/// A layer is closed when it has this many bytes.
pub const LAYER_BYTES: u64 = 512 << 20;
/// A layer is closed when it has this many records: they are in memory until then.
pub const LAYER_RECORDS: usize = 256 << 10;
/// Layers merged into one run of the next level.
pub const MERGE_FAN: u32 = 8;
/// Most layers of one group.
pub const LAYERS_MAX: usize = 1 << 20;
/// Most levels of runs: `8^6` layers are under one run.
pub const LEVELS_MAX: u8 = 6;
/// Most bytes of a run's tail (a layer's chunk directory).
pub const RUN_TAIL_BYTES_MAX: usize = 32 << 20;
/// Most blocks of a run: 32 GiB, some 2 * 10^9 entries. Its fences, 64 MiB, are in memory while it is written.
pub const RUN_BLOCKS_MAX: u32 = 1 << 23;
/// Most units (4 KiB) that a run's filter is made for, and its bytes; a run with more has none. The list of them, 32 MiB,
/// is in memory while it is written.
pub const FILTER_UNITS_MAX: usize = 4 << 20;
/// A read of more bytes does not ask filters: one of its units would be there anyway.
pub const FILTERED_BYTES_MAX: u64 = 64 << 10;
/// Most bytes of a volume that are resolved at once.
pub const RESOLVE_BYTES_MAX: u64 = 1 << 20;
/// Blocks of a run that a scan reads at once.
pub const SCAN_BLOCKS: u32 = 32;
/// A layer that was begun this long ago is closed with the next commit: retention takes whole layers.
pub const LAYER_AGE_MAX: std::time::Duration = std::time::Duration::from_secs(15 * 60);
/// Closed layers whose files are held open, of one group.
pub const LAYER_FILES_OPEN_MAX: usize = 128;
/// A clock that is behind and goes on by more at once is being set right, even if it stays behind.
pub const LEAP_NS_MIN: u64 = 60_000_000_000;
/// How far the source's clock and the one here may be apart before a time that one showed is taken for a wrong one.
pub const CLOCKS_APART_NS_MAX: u64 = 60_000_000_000;
/// Counters of changes that regions share.
pub const VERSIONS: usize = 4096;
/// Most bookmarks of one group; then the oldest that is not kept goes.
pub const BOOKMARKS_MAX: usize = 64 << 10;
/// Most kept bookmarks of one group.
pub const KEPT_MAX: usize = 4096;
/// Most marks (begins of streams, of gaps and their ends) that a chronicle remembers; then the window begins later.
pub const MARKS_MAX: usize = 256 << 10;
/// Most marks where a kept bookmark is older than they are; then nothing more is taken until it is released.
pub const MARKS_WITH_KEPT_MAX: usize = MARKS_MAX / 2 * 3;
/// Most stretches of damage that are told apart.
pub const DAMAGES_MAX: usize = 1024;
/// Most bytes of a chronicle: with every limit above reached it has less than half.
pub const CHRONICLE_BYTES_MAX: u64 = 128 << 20;
/// A chronicle with fewer slots is never rewritten.
pub const CHRONICLE_SLOTS_SMALL: u64 = 4096;
/// Damaged runs that one look makes again before it gives up.
pub const RUNS_MENDED_MAX: usize = 16;
