//! What all groups of the daemon share to read their indexes: decoded blocks, fences, filters and open files, each
//! bounded.

use crate::entry::Entry;
use crate::error::HistoryError;
use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter, sync::DefaultLifecycle};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use varve_io::IoError;

/// Of the bytes, the part that is for fences, and the same for filters.
const SMALL_PART: u64 = 8;
/// What a cached thing costs beside its content.
const OVERHEAD_BYTES: u64 = 96;
/// Entries of a block, typically; only a guess at the number of blocks, to size the tables.
const BLOCK_ENTRIES: u64 = 280;

/// A block's place: the run's number in this process, and the block's in the run.
type BlockKey = (u64, u32);

#[derive(Clone, Debug)]
struct ContentWeight;

impl<Key> Weighter<Key, Arc<[Entry]>> for ContentWeight {
    fn weight(&self, _key: &Key, block: &Arc<[Entry]>) -> u64 {
        size_of_val::<[Entry]>(block) as u64 + OVERHEAD_BYTES
    }
}

impl<Key> Weighter<Key, Arc<[u64]>> for ContentWeight {
    fn weight(&self, _key: &Key, fences: &Arc<[u64]>) -> u64 {
        size_of_val::<[u64]>(fences) as u64 + OVERHEAD_BYTES
    }
}

impl<Key> Weighter<Key, Arc<[u8]>> for ContentWeight {
    fn weight(&self, _key: &Key, filter: &Arc<[u8]>) -> u64 {
        filter.len() as u64 + OVERHEAD_BYTES
    }
}

/// See the module's text. Shared by reference between threads and groups.
#[derive(Debug)]
pub struct IndexCache {
    blocks: Cache<BlockKey, Arc<[Entry]>, ContentWeight>,
    fences: Cache<u64, Arc<[u64]>, ContentWeight>,
    filters: Cache<u64, Arc<[u8]>, ContentWeight>,
    files: Cache<u64, Arc<File>>,
    next_id: AtomicU64,
}

impl IndexCache {
    /// Keeps at most `bytes` of decoded index and `files` open files.
    pub fn new(bytes: u64, files: usize) -> Self {
        let small_bytes = bytes / SMALL_PART;
        let blocks_bytes = bytes - 2 * small_bytes;
        let blocks = blocks_bytes / (BLOCK_ENTRIES * size_of::<Entry>() as u64) + 1;
        Self {
            blocks: Cache::with_weighter(blocks as usize, blocks_bytes, ContentWeight),
            fences: one_shard(small_bytes),
            filters: one_shard(small_bytes),
            files: Cache::new(files.max(1)),
            next_id: AtomicU64::new(0),
        }
    }

    /// Bytes that it holds now, about.
    pub fn bytes(&self) -> u64 {
        self.blocks.weight() + self.fences.weight() + self.filters.weight()
    }

    /// Files that it holds open.
    pub fn open_files(&self) -> usize {
        self.files.len()
    }

    /// A number that no other run of this process has or had.
    pub(crate) fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// The run is not read any more; its space on disk is free only once its file is closed.
    pub(crate) fn forget(&self, id: u64) {
        self.files.remove(&id);
        self.fences.remove(&id);
        self.filters.remove(&id);
    }

    pub(crate) fn file(&self, id: u64, path: &Path) -> Result<Arc<File>, HistoryError> {
        self.files.get_or_insert_with(&id, || open(path).map(Arc::new))
    }

    pub(crate) fn fences(
        &self,
        id: u64,
        read: impl FnOnce() -> Result<Arc<[u64]>, HistoryError>,
    ) -> Result<Arc<[u64]>, HistoryError> {
        self.fences.get_or_insert_with(&id, read)
    }

    pub(crate) fn filter(
        &self,
        id: u64,
        read: impl FnOnce() -> Result<Arc<[u8]>, HistoryError>,
    ) -> Result<Arc<[u8]>, HistoryError> {
        self.filters.get_or_insert_with(&id, read)
    }

    pub(crate) fn block(
        &self,
        id: u64,
        index: u32,
        read: impl FnOnce() -> Result<Arc<[Entry]>, HistoryError>,
    ) -> Result<Arc<[Entry]>, HistoryError> {
        self.blocks.get_or_insert_with(&(id, index), read)
    }
}

/// A large run's fences or filter are a good part of all, and a shard takes nothing that is larger than itself.
fn one_shard<Content>(bytes: u64) -> Cache<u64, Content, ContentWeight>
where
    Content: Clone,
    ContentWeight: Weighter<u64, Content>,
{
    let options = OptionsBuilder::new().estimated_items_capacity(1024).weight_capacity(bytes).shards(1).build();
    let options = options.unwrap_or_else(|_| unreachable!("both capacities are set"));
    Cache::with_options(options, ContentWeight, DefaultHashBuilder::default(), DefaultLifecycle::default())
}

/// Opens a file of history to read it.
pub(crate) fn open(path: &Path) -> Result<File, HistoryError> {
    File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => HistoryError::Missing { path: path.to_path_buf() },
        _ => HistoryError::Io(IoError::new("open", path, error)),
    })
}
