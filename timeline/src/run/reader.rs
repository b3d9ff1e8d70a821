//! Reads a run: the footer when it is opened, fences and blocks when they are needed, through the shared cache.

use super::{RunHead, from_numbers, in_order};
use crate::cache::{IndexCache, open};
use crate::entry::{Address, Entry};
use crate::error::HistoryError;
use crate::limits::{FILTER_UNITS_MAX, RUN_BLOCKS_MAX, RUN_TAIL_BYTES_MAX};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use varve_common::format::FormatError;
use varve_common::format::run::{BLOCK_ENTRIES_MAX, RUN_BLOCK_BYTES, RunFooter, decode_block, decode_fences};
use varve_io::IoError;

/// A run's file. Cheap to keep: neither file nor fences stay open or in memory beyond the cache's bounds.
#[derive(Debug)]
pub struct Run {
    id: u64,
    path: PathBuf,
    head: RunHead,
    footer: RunFooter,
    cache: Arc<IndexCache>,
}

impl Run {
    /// Opens the file of a run of `group`: reads only the footer.
    pub fn open(path: &Path, group: [u8; 16], cache: &Arc<IndexCache>) -> Result<Self, HistoryError> {
        let file = open(path)?;
        let bytes = file.metadata().map_err(|e| IoError::new("look at", path, e))?.len();
        let damaged = |what: &str| HistoryError::Damaged { path: path.to_path_buf(), offset: 0, what: what.to_owned() };
        let Some(footer_offset) = bytes.checked_sub(RUN_BLOCK_BYTES as u64) else {
            return Err(damaged("shorter than a footer"));
        };
        let mut block = [0; RUN_BLOCK_BYTES];
        read_at(&file, path, &mut block, footer_offset)?;
        let footer = RunFooter::decode(&block, bytes)
            .map_err(|source| HistoryError::Format { path: path.to_path_buf(), source })?;
        let head = RunHead::from_footer(&footer);
        if head.group != group {
            return Err(damaged("it is of another group"));
        }
        let named = path.file_name().is_some_and(|name| *name == *head.key.file_name());
        if !named || !head.key.is_possible() {
            return Err(damaged("it has another run's name"));
        }
        let sections = (footer.tail_bytes.get() as usize, footer.filter_bytes.get() as usize);
        if footer.blocks.get() > RUN_BLOCKS_MAX || sections.0 > RUN_TAIL_BYTES_MAX || sections.1 > FILTER_UNITS_MAX {
            return Err(HistoryError::Limit { what: "a run's size", limit: u64::from(RUN_BLOCKS_MAX) });
        }
        Ok(Self { id: cache.new_id(), path: path.to_path_buf(), head, footer, cache: Arc::clone(cache) })
    }

    /// What it is.
    pub fn head(&self) -> &RunHead {
        &self.head
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Entries in it.
    pub fn entries(&self) -> u64 {
        self.footer.entries.get()
    }

    /// Its file's bytes.
    pub fn file_bytes(&self) -> u64 {
        self.footer.file_bytes.get()
    }

    /// Blocks of entries.
    pub fn blocks(&self) -> u32 {
        self.footer.blocks.get()
    }

    /// The tail that its writer was given.
    pub fn tail(&self) -> Result<Vec<u8>, HistoryError> {
        let mut tail = vec![0; self.footer.tail_bytes.get() as usize];
        let offset = self.footer.tail_offset.get();
        read_at(&*self.file()?, &self.path, &mut tail, offset)?;
        if crc32fast::hash(&tail) != self.footer.tail_crc.get() {
            return Err(self.damaged(offset, "the tail's checksum is wrong"));
        }
        Ok(tail)
    }

    /// The blocks that may have entries in these addresses. `addresses.start` is a granule's begin.
    pub(crate) fn blocks_of(&self, fences: &[u64], addresses: &Range<Address>) -> Range<u32> {
        let start = fences.partition_point(|fence| *fence < addresses.start.number());
        let end = fences.partition_point(|fence| *fence < addresses.end.number());
        // The block before may end with entries that begin at or after the start.
        start.saturating_sub(1) as u32..end as u32
    }

    /// The first address of every block.
    pub(crate) fn fences(&self) -> Result<Arc<[u64]>, HistoryError> {
        self.cache.fences(self.id, || {
            let offset = self.footer.fences_offset.get();
            // Opening compared the footer's sizes with each other and with the limits.
            let mut bytes = vec![0; self.footer.fences_bytes()];
            read_at(&*self.file()?, &self.path, &mut bytes, offset)?;
            let fences = decode_fences(&bytes, &self.footer).map_err(|error| self.damaged(offset, error))?;
            Ok(fences.into())
        })
    }

    /// The filter: empty if there is none.
    pub(crate) fn filter(&self) -> Result<Arc<[u8]>, HistoryError> {
        if self.footer.filter_bytes.get() == 0 {
            return Ok(Arc::default());
        }
        self.cache.filter(self.id, || {
            let mut filter = vec![0; self.footer.filter_bytes.get() as usize];
            let offset = self.footer.filter_offset();
            read_at(&*self.file()?, &self.path, &mut filter, offset)?;
            if crc32fast::hash(&filter) != self.footer.filter_crc.get() {
                return Err(self.damaged(offset, "the filter's checksum is wrong"));
            }
            Ok(filter.into())
        })
    }

    /// The entries of a block, from the cache.
    pub(crate) fn block(&self, fences: &[u64], index: u32) -> Result<Arc<[Entry]>, HistoryError> {
        self.cache.block(self.id, index, || {
            let mut bytes = [0; RUN_BLOCK_BYTES];
            read_at(&*self.file()?, &self.path, &mut bytes, u64::from(index) * RUN_BLOCK_BYTES as u64)?;
            let mut entries = Vec::with_capacity(BLOCK_ENTRIES_MAX);
            self.decode(&bytes, fences, index, &mut entries)?;
            Ok(entries.into())
        })
    }

    /// Reads and checks whole blocks past the cache; appends their entries.
    pub(crate) fn read_blocks(
        &self,
        fences: &[u64],
        blocks: Range<u32>,
        buffer: &mut Vec<u8>,
        entries: &mut Vec<Entry>,
    ) -> Result<(), HistoryError> {
        buffer.resize(blocks.len() * RUN_BLOCK_BYTES, 0);
        read_at(&*self.file()?, &self.path, buffer, u64::from(blocks.start) * RUN_BLOCK_BYTES as u64)?;
        for (index, block) in blocks.zip(buffer.chunks_exact(RUN_BLOCK_BYTES)) {
            self.decode(block, fences, index, entries)?;
        }
        Ok(())
    }

    fn decode(&self, block: &[u8], fences: &[u64], index: u32, entries: &mut Vec<Entry>) -> Result<(), HistoryError> {
        let begin = entries.len();
        let mut sane = true;
        let header = decode_block(block, index, |numbers| match from_numbers(&numbers) {
            Some(entry) => {
                let follows = entries[begin..].last().is_none_or(|last| in_order(self.head.key.level, last, &entry));
                sane &= follows && self.head.admits(&entry);
                entries.push(entry);
            }
            None => sane = false,
        });
        let offset = u64::from(index) * RUN_BLOCK_BYTES as u64;
        let header = header.map_err(|error: FormatError| self.damaged(offset, error))?;
        let here = fences.get(index as usize) == Some(&header.first_address.get());
        let last = entries.last().map(|entry| entry.address.number());
        let before_next = fences.get(index as usize + 1).is_none_or(|next| last <= Some(*next));
        if !(sane && here && before_next) {
            return Err(self.damaged(offset, "entries that cannot be here"));
        }
        Ok(())
    }

    /// Reads all of it, past the cache, and compares every checksum.
    pub fn verify(self: &Arc<Self>) -> Result<(), HistoryError> {
        // What is in memory was whole once.
        self.cache.forget(self.id);
        let mut scan = super::RunScan::new(Arc::clone(self), Address::from_number(0)..Address::from_number(u64::MAX))?;
        let (mut batch, mut entries, mut last) = (Vec::new(), 0, None::<Entry>);
        loop {
            batch.clear();
            crate::merge::EntrySource::next_batch(&mut scan, &mut batch)?;
            let (Some(first), Some(end)) = (batch.first(), batch.last()) else { break };
            if last.as_ref().is_some_and(|last| !in_order(self.head.key.level, last, first)) {
                return Err(self.damaged(0, "blocks are not in order"));
            }
            entries += batch.len() as u64;
            last = Some(*end);
        }
        if entries != self.entries() {
            return Err(self.damaged(0, "entries are missing"));
        }
        self.filter()?;
        self.tail().map(|_| ())
    }

    fn file(&self) -> Result<Arc<File>, HistoryError> {
        self.cache.file(self.id, &self.path)
    }

    fn damaged(&self, offset: u64, what: impl ToString) -> HistoryError {
        HistoryError::Damaged { path: self.path.clone(), offset, what: what.to_string() }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.cache.forget(self.id);
    }
}

fn read_at(file: &File, path: &Path, bytes: &mut [u8], offset: u64) -> Result<(), HistoryError> {
    file.read_exact_at(bytes, offset).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            HistoryError::Damaged { path: path.to_path_buf(), offset, what: "the file ends before it".to_owned() }
        }
        _ => HistoryError::Io(IoError::new(format!("read {} bytes at {offset} of", bytes.len()), path, error)),
    })
}
