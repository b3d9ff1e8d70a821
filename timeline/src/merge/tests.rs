use super::*;
use crate::entry::Stored;
use crate::testing::{Change, History, SECTORS, VOLUMES, changes};
use proptest::prelude::*;

/// Gives its entries a few at a time, so that granules go over batches.
struct Drops(Vec<Entry>, usize);

impl EntrySource for Drops {
    fn next_batch(&mut self, batch: &mut Vec<Entry>) -> Result<(), HistoryError> {
        let count = self.1.min(self.0.len());
        batch.extend(self.0.drain(..count));
        Ok(())
    }
}

fn entries_of(changes: &[Change]) -> (History, Vec<Entry>) {
    let history = History::of(changes);
    let records = history.records.clone();
    (history, records)
}

proptest! {
    #[test]
    fn the_first_in_time_wins(changes in changes(120), inputs in 1usize..9, batch in 1usize..5, lists in 1usize..3) {
        let (history, records) = entries_of(&changes);
        // Inputs are stretches of time; each is dealt out to `lists` sources.
        let per_input = records.len().div_ceil(inputs);
        let source = |part: &[Entry], list: usize| {
            let mut entries: Vec<Entry> = part.iter().skip(list).step_by(lists).copied().collect();
            entries.sort_by_key(|entry| (entry.layer, entry.order()));
            entries.sort_by_key(|entry| entry.address);
            Box::new(Drops(entries, batch)) as Box<dyn EntrySource>
        };
        // An input is of one layer, as the order within it is that of the layer.
        let parts = records.chunk_by(|a, b| a.layer == b.layer).flat_map(|layer| layer.chunks(per_input));
        let inputs = parts.map(|part| (0..lists).map(|list| source(part, list)).collect()).collect();
        let pieces: Result<Vec<Entry>, _> = Changed::new(FirstWins::new(inputs, all_addresses(), 0).expect("inputs")).collect();
        let pieces = pieces.expect("no I/O");
        prop_assert!(pieces.windows(2).all(|pair| pair[0].end() <= pair[1].address));
        for pair in pieces.windows(2) {
            let same = (pair[0].layer, pair[0].offset, pair[0].address.number() - u64::from(pair[0].skip));
            let next = (pair[1].layer, pair[1].offset, pair[1].address.number() - u64::from(pair[1].skip));
            let touch = pair[0].end() == pair[1].address && pair[0].height == pair[1].height;
            prop_assert!(!touch || same != next || pair[0].stored == Stored::Zero, "pieces are as long as they can be");
        }
        for volume in 0..VOLUMES {
            for sector in 0..SECTORS {
                let address = Address::new(volume, sector);
                let piece = pieces.iter().find(|piece| piece.address <= address && address < piece.end());
                let record = history.expected(address, 0);
                prop_assert_eq!(piece.map(|piece| (piece.layer, piece.offset, piece.height, piece.stored_bytes)),
                    record.map(|record| (record.layer, record.offset, record.height, record.stored_bytes)));
                if let (Some(piece), Some(record)) = (piece, record.filter(|record| record.stored != Stored::Zero)) {
                    prop_assert_eq!(piece.address.number() - u64::from(piece.skip), record.address.number());
                    prop_assert!(piece.is_possible());
                }
            }
        }
    }

    #[test]
    fn stretches_are_those_of_the_mask(mask in any::<u128>(), ones in 0u32..129) {
        for mask in [mask, u128::MAX.checked_shl(ones).unwrap_or(0), mask & mask >> 1] {
            let mut again = 0;
            for_each_stretch(mask, |first, length| again |= sector_mask(first, length));
            prop_assert_eq!(again, mask);
        }
    }
}

#[test]
fn an_error_ends_it() {
    struct Broken;
    impl EntrySource for Broken {
        fn next_batch(&mut self, batch: &mut Vec<Entry>) -> Result<(), HistoryError> {
            if batch.capacity() > 0 {
                return Err(HistoryError::Missing { path: "run".into() });
            }
            batch.push(Entry {
                address: Address::new(0, 5),
                height: 1,
                layer: 1,
                offset: 0,
                crc: 0,
                stored_bytes: 0,
                sectors: 1,
                skip: 0,
                record_sectors: 1,
                stored: Stored::Zero,
            });
            Ok(())
        }
    }
    let mut pieces = Changed::new(FirstWins::new(vec![vec![Box::new(Broken)]], all_addresses(), 0).expect("first"));
    assert!(matches!(pieces.next(), Some(Err(HistoryError::Missing { .. }))));
    assert!(pieces.next().is_none());
}
