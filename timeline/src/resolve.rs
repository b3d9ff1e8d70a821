//! The one rule: of all records after a point, the earliest that covers a sector has what it held; if there is none, the
//! replica has.

use crate::entry::{Address, Entry, Stored};
use crate::error::HistoryError;
use crate::limits::{FILTERED_BYTES_MAX, GRANULE_BYTES, GRANULE_SECTORS, RESOLVE_BYTES_MAX, SECTOR_BYTES};
use crate::merge::{Changed, FirstWins, Input, for_each_stretch};
use crate::open_index::{OpenView, slice_of};
use crate::run::{Run, RunScan};
use std::ops::Range;
use std::sync::Arc;
use varve_common::format::run::{FILTER_UNIT_SECTORS, filter_may_have};
use varve_common::limits::VOLUME_BYTES_MAX;

/// What has the records after a point, oldest first: the runs that [`crate::catalogue::Catalogue::plan`] names, then the
/// layers that have no run yet. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Closed layers.
    pub runs: Arc<[Arc<Run>]>,
    /// Layers that are being closed, and the open one. Taken anew for every read, *before* the replica is read.
    pub open: Vec<OpenView>,
}

/// Where the bytes of a stretch are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nothing replaced them since the point.
    Replica,
    /// They were zeroes.
    Zero,
    /// In this (part of a) record.
    Record(Entry),
}

/// A stretch of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// First byte.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
    /// Where the bytes are.
    pub origin: Origin,
}

/// Granules that a range of the longest length may touch.
const GRANULES_MAX: usize = (RESOLVE_BYTES_MAX / GRANULE_BYTES) as usize + 1;

/// The sectors of a filter's unit.
const UNIT_MASK: u128 = (1 << FILTER_UNIT_SECTORS) - 1;

/// What is still to be found, and what was.
struct Search {
    addresses: Range<Address>,
    /// Begin of the first granule.
    base: Address,
    /// A bit for every sector that nothing covers yet.
    wanted: [u128; GRANULES_MAX],
    point: u64,
    /// Entries of one source.
    found: Vec<Entry>,
    pieces: Vec<Entry>,
}

impl Search {
    fn new(addresses: Range<Address>, point: u64) -> Self {
        let base = addresses.start.granule();
        let mut wanted = [0; GRANULES_MAX];
        for (index, mask) in wanted.iter_mut().enumerate() {
            let begin = base.plus(index as u64 * u64::from(GRANULE_SECTORS));
            *mask = crate::merge::allowed(begin, &addresses);
        }
        Self { addresses, base, wanted, point, found: Vec::new(), pieces: Vec::new() }
    }

    #[inline]
    fn granule(&self, entry: &Entry) -> usize {
        ((entry.address.number() - self.base.number()) / u64::from(GRANULE_SECTORS)) as usize
    }

    fn is_done(&self) -> bool {
        self.wanted == [0; GRANULES_MAX]
    }

    /// Takes the entries of one source that may count. They are in order, so a block that was written again and again
    /// stands in a row: only its first version after the point can count.
    fn collect(&mut self, entries: &[Entry]) {
        let entries = slice_of(entries, &(self.base..self.addresses.end));
        let mut last: Option<(Address, u16)> = None;
        for entry in entries {
            if entry.height <= self.point || last.is_some_and(|last| last.0 == entry.address && last.1 >= entry.sectors)
            {
                continue;
            }
            if self.wanted[self.granule(entry)] & entry.mask() != 0 {
                last = Some((entry.address, entry.sectors));
                self.found.push(*entry);
            }
        }
    }

    /// Cuts what was collected from one source to what is wanted.
    fn settle(&mut self, versions: bool) {
        if versions {
            self.found.sort_unstable_by_key(Entry::age);
        }
        for index in 0..self.found.len() {
            let entry = self.found[index];
            let granule = self.granule(&entry);
            let mask = entry.mask() & self.wanted[granule];
            self.wanted[granule] &= !mask;
            let pieces = &mut self.pieces;
            for_each_stretch(mask, |sector, sectors| pieces.push(entry.part(sector, sectors)));
        }
        self.found.clear();
    }

    fn bytes(&self) -> u64 {
        (self.addresses.end.number() - self.addresses.start.number()) * SECTOR_BYTES
    }

    /// Whether a run with this filter may have entries for what is wanted.
    fn may_be_in(&self, filter: &[u8]) -> bool {
        let sectors = self.addresses.start.number()..self.addresses.end.number();
        let mut units = sectors.start / FILTER_UNIT_SECTORS..sectors.end.div_ceil(FILTER_UNIT_SECTORS);
        filter.is_empty()
            || units.any(|unit| {
                let begin = unit * FILTER_UNIT_SECTORS - self.base.number();
                let granule = (begin / u64::from(GRANULE_SECTORS)) as usize;
                let wanted = self.wanted[granule] >> (begin % u64::from(GRANULE_SECTORS));
                wanted & UNIT_MASK != 0 && filter_may_have(filter, unit)
            })
    }

    fn search_run(&mut self, run: &Run) -> Result<(), HistoryError> {
        if run.head().last_height <= self.point {
            return Ok(());
        }
        if self.bytes() <= FILTERED_BYTES_MAX && !self.may_be_in(&run.filter()?) {
            return Ok(());
        }
        let fences = run.fences()?;
        for index in run.blocks_of(&fences, &(self.base..self.addresses.end)) {
            self.collect(&run.block(&fences, index)?);
        }
        self.settle(run.head().key.level == 0);
        Ok(())
    }

    fn search_open(&mut self, view: &OpenView) {
        for entries in view.slices(self.base..self.addresses.end) {
            self.collect(entries);
        }
        self.settle(true);
    }

    /// The pieces in order, the gaps between them filled.
    fn parts(mut self) -> Vec<Part> {
        self.pieces.sort_unstable_by_key(|piece| piece.address);
        let mut parts = Vec::with_capacity(2 * self.pieces.len() + 1);
        let mut at = self.addresses.start;
        for piece in &self.pieces {
            if piece.address > at {
                add(&mut parts, at, piece.address, Origin::Replica);
            }
            let origin = if piece.stored == Stored::Zero { Origin::Zero } else { Origin::Record(*piece) };
            add(&mut parts, piece.address, piece.end(), origin);
            at = piece.end();
        }
        if at < self.addresses.end {
            add(&mut parts, at, self.addresses.end, Origin::Replica);
        }
        parts
    }
}

fn add(parts: &mut Vec<Part>, start: Address, end: Address, origin: Origin) {
    let part = Part { start: start.byte(), end: end.byte(), origin };
    match parts.last_mut() {
        Some(last) if last.origin == origin && origin == Origin::Zero => last.end = part.end,
        _ => parts.push(part),
    }
}

/// Where the bytes of `bytes` bytes of `volume` from `start` on were at `point`: parts without gaps, in order. Both are
/// multiples of 512; at most [`RESOLVE_BYTES_MAX`].
///
/// # Errors
/// A damaged or unreadable index that has to be asked: never a guess.
pub fn resolve(plan: &Plan, volume: u16, start: u64, bytes: u64, point: u64) -> Result<Vec<Part>, HistoryError> {
    let addresses = addresses_of(volume, start, bytes)?;
    if bytes > RESOLVE_BYTES_MAX {
        return Err(HistoryError::Limit { what: "a range that is resolved at once", limit: RESOLVE_BYTES_MAX });
    }
    let mut search = Search::new(addresses, point);
    for run in plan.runs.iter() {
        if search.is_done() {
            return Ok(search.parts());
        }
        search.search_run(run)?;
    }
    for view in &plan.open {
        if !search.is_done() {
            search.search_open(view);
        }
    }
    Ok(search.parts())
}

/// The addresses of a stretch of a volume.
pub fn addresses_of(volume: u16, start: u64, bytes: u64) -> Result<Range<Address>, HistoryError> {
    let whole = start.is_multiple_of(SECTOR_BYTES) && bytes.is_multiple_of(SECTOR_BYTES);
    if !whole || start.checked_add(bytes).is_none_or(|end| end > VOLUME_BYTES_MAX) {
        return Err(HistoryError::Range { start, bytes });
    }
    let first = Address::new(volume, start / SECTOR_BYTES);
    Ok(first..first.plus(bytes / SECTOR_BYTES))
}

/// Everything in `addresses` that changed after `point`, in order of address, without overlaps: for each piece the record
/// that has what was there at the point. Walks all of it once; of each source some 100 KiB are in memory.
pub fn changed(plan: &Plan, addresses: Range<Address>, point: u64) -> Result<Changed, HistoryError> {
    let from = addresses.start.granule();
    let mut inputs: Vec<Input> = Vec::with_capacity(plan.runs.len() + plan.open.len());
    for run in plan.runs.iter().filter(|run| run.head().last_height > point) {
        inputs.push(vec![Box::new(RunScan::new(Arc::clone(run), from..addresses.end)?)]);
    }
    for view in &plan.open {
        inputs.push(view.sources(from).map(|source| Box::new(source) as _).collect());
    }
    Ok(Changed::new(FirstWins::new(inputs, addresses, point)?))
}

#[cfg(test)]
mod tests;
