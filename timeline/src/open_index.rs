//! The index of the layer that is being appended to, in memory. One thread appends, others read what was there when they
//! looked.

use crate::entry::{Address, Entry};
use crate::error::HistoryError;
use crate::limits::{CHUNK_RECORDS_MAX, LAYER_RECORDS, MERGE_FAN};
use crate::merge::ListSource;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Most entries: a layer is closed once it has [`LAYER_RECORDS`], which one chunk may exceed.
pub const OPEN_ENTRIES_MAX: usize = LAYER_RECORDS + CHUNK_RECORDS_MAX;

/// Entries by [`Entry::order`].
#[derive(Clone, Debug)]
struct List {
    entries: Arc<[Entry]>,
    /// How often it was merged.
    level: u8,
}

/// What the index held at one moment. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct OpenView {
    lists: Arc<[List]>,
    entries: usize,
}

impl OpenView {
    /// Entries in it.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Every entry by [`Entry::order`]: the level-0 run of the layer.
    pub fn sorted(&self) -> Vec<Entry> {
        sorted(self.lists.iter().map(|list| &*list.entries))
    }

    /// The entries whose address is in a range, list by list.
    pub(crate) fn slices(&self, addresses: Range<Address>) -> impl Iterator<Item = &[Entry]> {
        self.lists.iter().map(move |list| slice_of(&list.entries, &addresses))
    }

    /// Sources for the entries from `start` on: together one input of a merge.
    pub(crate) fn sources(&self, start: Address) -> impl Iterator<Item = ListSource> {
        self.lists.iter().map(move |list| ListSource::new(Arc::clone(&list.entries), start))
    }
}

/// Of entries in order, those whose address is in the range.
#[inline]
pub(crate) fn slice_of<'a>(entries: &'a [Entry], addresses: &Range<Address>) -> &'a [Entry] {
    let rest = &entries[entries.partition_point(|entry| entry.address < addresses.start)..];
    &rest[..rest.partition_point(|entry| entry.address < addresses.end)]
}

fn sorted<'a>(lists: impl Iterator<Item = &'a [Entry]>) -> Vec<Entry> {
    let mut all: Vec<Entry> = lists.flatten().copied().collect();
    // The sort finds the sorted lists and merges them.
    all.sort_by_key(Entry::order);
    all
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct OpenIndex {
    view: RwLock<OpenView>,
    /// Held while the next view is made, which readers need not wait for.
    appending: Mutex<()>,
}

impl OpenIndex {
    /// Without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// What it holds now.
    pub fn view(&self) -> OpenView {
        self.view.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adds a chunk's entries, in any order; readers that look afterwards see all of them.
    pub fn append(&self, mut entries: Vec<Entry>) -> Result<(), HistoryError> {
        let _one = self.appending.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.view();
        let total = before.entries + entries.len();
        if total > OPEN_ENTRIES_MAX {
            return Err(HistoryError::Limit { what: "the open layer's index", limit: OPEN_ENTRIES_MAX as u64 });
        }
        if entries.is_empty() {
            return Ok(());
        }
        entries.sort_by_key(Entry::order);
        let mut lists = before.lists.to_vec();
        lists.push(List { entries: entries.into(), level: 0 });
        // Eight of a level become one of the next: an entry is moved once per level, and a reader has few lists.
        while let Some(level) = full_level(&lists) {
            let merged = lists.split_off(lists.len() - MERGE_FAN as usize);
            let entries = sorted(merged.iter().map(|list| &*list.entries)).into();
            lists.push(List { entries, level: level + 1 });
        }
        let after = OpenView { lists: lists.into(), entries: total };
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = after;
        Ok(())
    }
}

/// The level that the last eight lists have, if they have one.
fn full_level(lists: &[List]) -> Option<u8> {
    let tail = &lists[lists.len().checked_sub(MERGE_FAN as usize)?..];
    let level = tail[0].level;
    tail.iter().all(|list| list.level == level).then_some(level)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Stored;

    fn entry(sector: u64, height: u64) -> Entry {
        Entry {
            address: Address::new(1, sector),
            height,
            layer: 1,
            offset: height as u32 * 512,
            crc: 0,
            stored_bytes: 512,
            sectors: 1,
            skip: 0,
            record_sectors: 1,
            stored: Stored::Plain,
        }
    }

    #[test]
    fn views_stay_as_they_were_and_lists_are_few() {
        let index = OpenIndex::new();
        let mut views = Vec::new();
        for number in 0..5000u64 {
            index.append(vec![entry(number * 7919 % 1000, number + 1)]).expect("room");
            if number % 997 == 0 {
                views.push((number as usize + 1, index.view()));
            }
        }
        for (length, view) in views {
            let sorted = view.sorted();
            assert_eq!((sorted.len(), view.len()), (length, length));
            assert!(sorted.is_sorted_by_key(Entry::order));
            assert!(sorted.iter().all(|entry| entry.height <= length as u64));
        }
        let view = index.view();
        assert!(view.lists.len() <= 7 * 5, "{}", view.lists.len());
        let addresses = Address::new(1, 10)..Address::new(1, 20);
        assert_eq!(view.slices(addresses).map(<[Entry]>::len).sum::<usize>(), 50);
    }

    #[test]
    fn it_has_a_limit() {
        let index = OpenIndex::new();
        index.append(vec![entry(1, 1); OPEN_ENTRIES_MAX]).expect("room");
        assert!(matches!(index.append(vec![entry(1, 1)]), Err(HistoryError::Limit { .. })));
        assert_eq!(index.view().len(), OPEN_ENTRIES_MAX);
        index.append(Vec::new()).expect("nothing");
    }
}
