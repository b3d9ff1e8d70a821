//! Reads a run from front to back, past the cache: merges and rollbacks would only push out what views need.

use super::Run;
use crate::entry::{Address, Entry};
use crate::error::HistoryError;
use crate::limits::SCAN_BLOCKS;
use crate::merge::EntrySource;
use std::ops::Range;
use std::sync::Arc;

/// The entries of a run whose address is in a range, in order.
#[derive(Debug)]
pub struct RunScan {
    run: Arc<Run>,
    fences: Arc<[u64]>,
    blocks: Range<u32>,
    buffer: Vec<u8>,
}

impl RunScan {
    /// `addresses` begin with a granule. The first and the last batch may have entries outside them.
    pub fn new(run: Arc<Run>, addresses: Range<Address>) -> Result<Self, HistoryError> {
        let fences = run.fences()?;
        let blocks = run.blocks_of(&fences, &addresses);
        Ok(Self { run, fences, blocks, buffer: Vec::new() })
    }
}

impl EntrySource for RunScan {
    fn next_batch(&mut self, batch: &mut Vec<Entry>) -> Result<(), HistoryError> {
        let end = self.blocks.end.min(self.blocks.start.saturating_add(SCAN_BLOCKS));
        let blocks = self.blocks.start..end;
        if blocks.is_empty() {
            return Ok(());
        }
        self.blocks.start = end;
        self.run.read_blocks(&self.fences, blocks, &mut self.buffer, batch)
    }
}
