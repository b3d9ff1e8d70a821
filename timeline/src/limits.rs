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
