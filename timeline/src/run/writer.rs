//! Writes a run from entries that come in order, in bounded memory.

use super::{RunHead, RunKey, in_order, to_numbers};
use crate::entry::Entry;
use crate::error::HistoryError;
use crate::limits::{FILTER_UNITS_MAX, RUN_BLOCKS_MAX, RUN_TAIL_BYTES_MAX};
use std::path::{Path, PathBuf};
use varve_common::format::FORMAT_VERSION;
use varve_common::format::run::{
    BlockBuilder, FILTER_UNIT_SECTORS, RUN_BLOCK_BYTES, RUN_MAGIC, RunFooter, encode_fences, filter_add, filter_bytes,
};
use varve_io::crashsafe::NewFile;

/// Bytes that are written at once.
const WRITE_BYTES: usize = 256 << 10;

/// A run that is being written. It has its name only after [`RunWriter::finish`]; dropped before, it leaves nothing.
#[derive(Debug)]
pub struct RunWriter {
    file: NewFile,
    head: RunHead,
    block: BlockBuilder,
    /// Finished blocks that are not yet written.
    buffer: Vec<u8>,
    fences: Vec<u64>,
    /// For the filter; `None` once there are too many.
    units: Option<Vec<u64>>,
    entries: u64,
    last: Option<Entry>,
}

impl RunWriter {
    /// Begins the run `head` in the directory of runs.
    pub fn create(dir: &Path, head: RunHead) -> Result<Self, HistoryError> {
        let sane =
            head.key.is_possible() && head.first_height <= head.last_height && head.first_time_ns <= head.last_time_ns;
        let path = dir.join(head.key.file_name());
        if !sane {
            return Err(refused(&path, 0, format!("a run cannot be {head:?}")));
        }
        let file = NewFile::create(path)?;
        let block = BlockBuilder::new(head.key.first, head.key.layers(), head.first_height);
        let buffer = Vec::with_capacity(WRITE_BYTES);
        Ok(Self { file, head, block, buffer, fences: Vec::new(), units: Some(Vec::new()), entries: 0, last: None })
    }

    /// Adds the next entry. Level 0: by [`Entry::order`]; above: by address, without overlaps.
    pub fn push(&mut self, entry: &Entry) -> Result<(), HistoryError> {
        let follows = self.last.as_ref().is_none_or(|last| in_order(self.head.key.level, last, entry));
        // A run that cannot be read again would take away points; so it is not written.
        if !(follows && self.head.admits(entry) && entry.is_possible()) {
            return Err(refused(self.file.path(), self.entries, format!("out of order or impossible: {entry:?}")));
        }
        let numbers = to_numbers(entry);
        if !self.block.push(&numbers) {
            self.finish_block()?;
            self.block.push(&numbers);
        }
        self.add_units(entry);
        self.entries += 1;
        self.last = Some(*entry);
        Ok(())
    }

    fn add_units(&mut self, entry: &Entry) {
        let Some(units) = &mut self.units else { return };
        let first = entry.address.number() / FILTER_UNIT_SECTORS;
        let last = (entry.end().number() - 1) / FILTER_UNIT_SECTORS;
        // Entries come by address, so nearly all that are there already were added last.
        let new = units.last().map_or(first, |newest| first.max(newest + 1));
        units.extend(new..=last);
        if units.len() > FILTER_UNITS_MAX {
            self.units = None;
        }
    }

    fn filter(&mut self) -> Vec<u8> {
        let units = self.units.take().unwrap_or_default();
        let mut filter = vec![0; filter_bytes(units.len())];
        units.iter().for_each(|unit| filter_add(&mut filter, *unit));
        filter
    }

    /// Entries so far.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    fn finish_block(&mut self) -> Result<(), HistoryError> {
        if self.fences.len() as u64 >= u64::from(RUN_BLOCKS_MAX) {
            return Err(HistoryError::Limit { what: "a run's blocks", limit: u64::from(RUN_BLOCKS_MAX) });
        }
        self.fences.push(self.block.first_address());
        self.block.finish(&mut self.buffer);
        if self.buffer.len() >= WRITE_BYTES {
            self.file.append(&self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
    }

    /// Writes the rest with `tail`, syncs all of it, and gives the file its name, in place of an older one. Gives the
    /// file's bytes.
    pub fn finish(mut self, tail: &[u8]) -> Result<u64, HistoryError> {
        if tail.len() > RUN_TAIL_BYTES_MAX {
            return Err(HistoryError::Limit { what: "a run's tail", limit: RUN_TAIL_BYTES_MAX as u64 });
        }
        if self.block.entries() > 0 {
            self.finish_block()?;
        }
        let fences = encode_fences(&self.fences);
        let filter = self.filter();
        let head = &self.head;
        let mut footer = RunFooter {
            magic: RUN_MAGIC,
            version: FORMAT_VERSION.into(),
            level: head.key.level,
            reserved: [0; 5],
            group: head.group,
            first_layer: head.key.first.into(),
            layers: head.key.layers().into(),
            first_height: head.first_height.into(),
            last_height: head.last_height.into(),
            first_time_ns: head.first_time_ns.into(),
            last_time_ns: head.last_time_ns.into(),
            layer_bytes: head.layer_bytes.into(),
            entries: self.entries.into(),
            fences_offset: 0.into(),
            tail_offset: 0.into(),
            file_bytes: 0.into(),
            blocks: (self.fences.len() as u32).into(),
            tail_bytes: (tail.len() as u32).into(),
            fences_crc: crc32fast::hash(&fences).into(),
            tail_crc: crc32fast::hash(tail).into(),
            filter_bytes: (filter.len() as u32).into(),
            filter_crc: crc32fast::hash(&filter).into(),
            reserved_2: 0.into(),
            crc: 0.into(),
        };
        let footer_block = footer.encode();
        self.file.append(&self.buffer)?;
        self.file.append(&fences)?;
        self.file.append(&filter)?;
        self.file.append(tail)?;
        let sections = fences.len() + filter.len() + tail.len();
        self.file.append(&vec![0; sections.next_multiple_of(RUN_BLOCK_BYTES) - sections])?;
        self.file.append(&footer_block)?;
        self.file.commit()?;
        Ok(footer.file_bytes.get())
    }

    /// The file that it will be.
    pub fn path(&self) -> PathBuf {
        self.file.path().to_path_buf()
    }

    /// Which run it is.
    pub fn key(&self) -> RunKey {
        self.head.key
    }
}

fn refused(path: &Path, entry: u64, what: String) -> HistoryError {
    HistoryError::Damaged { path: path.to_path_buf(), offset: entry, what }
}
