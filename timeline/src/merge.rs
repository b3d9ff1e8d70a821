//! The first entry in time for every sector, in address order: what merged runs are, and what a rollback walks.
//!
//! Granule by granule: the entries of the inputs are taken from the oldest input to the newest, within one by age, and each
//! keeps the sectors that nothing before it covered. Entries never cross a granule, so 128 bits say what is covered.

use crate::entry::{Address, Entry, sector_mask};
use crate::error::HistoryError;
use crate::limits::GRANULE_SECTORS;
use crate::run::{Run, RunScan, RunWriter};
use std::ops::Range;
use std::sync::Arc;

/// Entries in order of address (and of [`Entry::order`] within one input that has several versions), piece by piece.
pub trait EntrySource: Send {
    /// Appends the next entries to `batch`; nothing if there are no more.
    fn next_batch(&mut self, batch: &mut Vec<Entry>) -> Result<(), HistoryError>;
}

/// Entries in memory, in order.
#[derive(Debug)]
pub struct ListSource {
    entries: Arc<[Entry]>,
    at: usize,
}

/// Entries that a list gives at once.
const LIST_BATCH: usize = 1024;

impl ListSource {
    /// Those from `start` on.
    pub fn new(entries: Arc<[Entry]>, start: Address) -> Self {
        let at = entries.partition_point(|entry| entry.address < start);
        Self { entries, at }
    }
}

impl EntrySource for ListSource {
    fn next_batch(&mut self, batch: &mut Vec<Entry>) -> Result<(), HistoryError> {
        let end = self.entries.len().min(self.at + LIST_BATCH);
        batch.extend_from_slice(&self.entries[self.at..end]);
        self.at = end;
        Ok(())
    }
}

/// Inputs that are of one time: their entries are ordered by age among all of them.
pub type Input = Vec<Box<dyn EntrySource>>;

struct Head {
    source: Box<dyn EntrySource>,
    batch: Vec<Entry>,
    at: usize,
    /// Number of the granule of the next entry; [`NO_GRANULE`] at the end.
    granule: u64,
    /// The input that it is a part of, 0 is the oldest.
    input: usize,
}

const NO_GRANULE: u64 = u64::MAX;

fn granule_of(entry: &Entry) -> u64 {
    entry.address.number() / u64::from(GRANULE_SECTORS)
}

impl Head {
    fn refill(&mut self) -> Result<(), HistoryError> {
        if self.at == self.batch.len() {
            self.batch.clear();
            self.at = 0;
            self.source.next_batch(&mut self.batch)?;
        }
        self.granule = self.batch.get(self.at).map_or(NO_GRANULE, granule_of);
        Ok(())
    }

    /// Length of what the batch has of its granule; `None` if the next batch may have more of it.
    #[inline]
    fn whole(&self) -> Option<usize> {
        let rest = &self.batch[self.at..];
        let end = Address::from_number((self.granule + 1) * u64::from(GRANULE_SECTORS));
        rest.iter().position(|entry| entry.address >= end)
    }

    /// Moves its granule's entries to `gathered`.
    fn gather(&mut self, gathered: &mut Vec<Entry>) -> Result<(), HistoryError> {
        let granule = self.granule;
        while self.granule == granule {
            let length = self.whole().unwrap_or(self.batch.len() - self.at);
            gathered.extend_from_slice(&self.batch[self.at..self.at + length]);
            self.at += length;
            self.refill()?;
        }
        Ok(())
    }
}

/// The pieces of one granule, by their first sector.
struct Pieces {
    taken: u128,
    starts: u128,
    slots: Box<[Option<Entry>; GRANULE_SECTORS as usize]>,
}

impl Pieces {
    /// Keeps what of `entry` is within `allowed` and not taken.
    #[inline]
    fn add(&mut self, entry: &Entry, allowed: u128) {
        let mask = entry.mask();
        let free = mask & !self.taken & allowed;
        self.taken |= free;
        if free == mask {
            self.put(*entry);
        } else {
            for_each_stretch(free, |sector, sectors| self.put(entry.part(sector, sectors)));
        }
    }

    #[inline]
    fn put(&mut self, piece: Entry) {
        let slot = piece.address.in_granule();
        self.starts |= 1 << slot;
        self.slots[usize::from(slot)] = Some(piece);
    }

    /// Moves them to `out`, by address.
    #[inline]
    fn drain(&mut self, out: &mut Vec<Entry>) {
        while self.starts != 0 {
            let slot = self.starts.trailing_zeros() as usize;
            self.starts &= self.starts - 1;
            out.extend(self.slots[slot]);
        }
        self.taken = 0;
    }
}

/// Gives every stretch of ones in `mask`: its first bit and its length.
#[inline]
pub(crate) fn for_each_stretch(mut mask: u128, mut each: impl FnMut(u16, u16)) {
    while mask != 0 {
        let first = mask.trailing_zeros();
        let length = (!(mask >> first)).trailing_zeros();
        each(first as u16, length as u16);
        mask &= !sector_mask(first as u16, length as u16);
    }
}

/// For every sector the first entry in time with a height above a point.
pub struct FirstWins {
    heads: Vec<Head>,
    addresses: Range<Address>,
    point: u64,
    gathered: Vec<Entry>,
    pieces: Pieces,
}

impl FirstWins {
    /// Of `inputs`, the oldest first; only what is within `addresses` and has a height above `point`.
    pub fn new(inputs: Vec<Input>, addresses: Range<Address>, point: u64) -> Result<Self, HistoryError> {
        let mut heads = Vec::new();
        for (input, sources) in inputs.into_iter().enumerate() {
            for source in sources {
                let mut head = Head { source, batch: Vec::new(), at: 0, granule: NO_GRANULE, input };
                head.refill()?;
                heads.push(head);
            }
        }
        let pieces = Pieces { taken: 0, starts: 0, slots: Box::new([None; GRANULE_SECTORS as usize]) };
        Ok(Self { heads, addresses, point, gathered: Vec::new(), pieces })
    }

    /// Appends the pieces of the next granule that has entries to `out`, by address. It may be that none of them counts;
    /// false at the end.
    pub fn next_granule(&mut self, out: &mut Vec<Entry>) -> Result<bool, HistoryError> {
        let granule = self.heads.iter().map(|head| head.granule).min().unwrap_or(NO_GRANULE);
        let begin = granule.checked_mul(u64::from(GRANULE_SECTORS)).map(Address::from_number);
        let Some(begin) = begin.filter(|begin| *begin < self.addresses.end) else { return Ok(false) };
        let allowed = allowed(begin, &self.addresses);
        let mut at = 0;
        while at < self.heads.len() {
            if self.heads[at].granule != granule {
                at += 1;
                continue;
            }
            at = self.take_input(at, granule, allowed)?;
        }
        self.pieces.drain(out);
        Ok(true)
    }

    /// Takes the granule's entries of the input of head `at`; gives the next input's first head.
    fn take_input(&mut self, at: usize, granule: u64, allowed: u128) -> Result<usize, HistoryError> {
        let input = self.heads[at].input;
        let alone = self.heads.get(at + 1).is_none_or(|next| next.input != input);
        let head = &mut self.heads[at];
        // The usual case needs no copy: one source, all of it at hand, nothing that overlaps.
        if alone && let Some(length) = head.whole() {
            let entries = &head.batch[head.at..head.at + length];
            if entries.windows(2).all(|pair| pair[0].end() <= pair[1].address) {
                for entry in entries.iter().filter(|entry| entry.height > self.point) {
                    self.pieces.add(entry, allowed);
                }
                head.at += length;
                head.granule = granule_of(&head.batch[head.at]);
                return Ok(at + 1);
            }
        }
        self.gathered.clear();
        let mut next = at;
        while let Some(head) = self.heads.get_mut(next).filter(|head| head.input == input) {
            if head.granule == granule {
                head.gather(&mut self.gathered)?;
            }
            next += 1;
        }
        self.gathered.retain(|entry| entry.height > self.point);
        self.gathered.sort_unstable_by_key(Entry::age);
        for entry in &self.gathered {
            self.pieces.add(entry, allowed);
        }
        Ok(next)
    }
}

/// The sectors of the granule from `begin` on that are in `addresses`.
pub(crate) fn allowed(begin: Address, addresses: &Range<Address>) -> u128 {
    let sectors = u64::from(GRANULE_SECTORS);
    let first = addresses.start.number().saturating_sub(begin.number()).min(sectors) as u16;
    let end = addresses.end.number().saturating_sub(begin.number()).min(sectors) as u16;
    if first < end { sector_mask(first, end - first) } else { 0 }
}

/// Piece after piece; memory is bounded whatever the inputs hold.
pub struct Changed {
    engine: FirstWins,
    pieces: Vec<Entry>,
    at: usize,
    done: bool,
}

impl Changed {
    /// The engine's pieces one by one.
    pub fn new(engine: FirstWins) -> Self {
        Self { engine, pieces: Vec::new(), at: 0, done: false }
    }
}

impl Iterator for Changed {
    type Item = Result<Entry, HistoryError>;

    /// Nothing follows an error.
    fn next(&mut self) -> Option<Self::Item> {
        while self.at == self.pieces.len() && !self.done {
            self.pieces.clear();
            self.at = 0;
            match self.engine.next_granule(&mut self.pieces) {
                Ok(more) => self.done = !more,
                Err(error) => {
                    self.done = true;
                    return Some(Err(error));
                }
            }
        }
        let piece = self.pieces.get(self.at)?;
        self.at += 1;
        Some(Ok(*piece))
    }
}

/// All addresses.
pub fn all_addresses() -> Range<Address> {
    Address::from_number(0)..Address::from_number(u64::MAX)
}

/// Writes the first entry in time for every sector of `inputs`, the oldest first, to `out`. `go_on` is asked now and then:
/// false ends it early, and then so does this.
pub fn merge(inputs: Vec<Input>, out: &mut RunWriter, mut go_on: impl FnMut() -> bool) -> Result<bool, HistoryError> {
    let mut engine = FirstWins::new(inputs, all_addresses(), 0)?;
    let mut pieces = Vec::new();
    loop {
        pieces.clear();
        for _ in 0..4096 {
            if !engine.next_granule(&mut pieces)? {
                pieces.iter().try_for_each(|piece| out.push(piece))?;
                return Ok(true);
            }
        }
        pieces.iter().try_for_each(|piece| out.push(piece))?;
        if !go_on() {
            return Ok(false);
        }
    }
}

/// Inputs of [`merge`] that are whole runs.
pub fn run_inputs(runs: &[Arc<Run>]) -> Result<Vec<Input>, HistoryError> {
    let input = |run: &Arc<Run>| Ok(vec![Box::new(RunScan::new(Arc::clone(run), all_addresses())?) as _]);
    runs.iter().map(input).collect()
}

#[cfg(test)]
mod tests;
