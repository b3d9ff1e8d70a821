use super::*;
use crate::cache::IndexCache;
use crate::error::HistoryError;
use crate::testing::{GROUP, directory, tail};
use std::path::Path;
use std::sync::Arc;

fn head(key: RunKey) -> RunHead {
    RunHead {
        group: GROUP,
        key,
        first_height: 10,
        last_height: 1 << 40,
        first_time_ns: 1,
        last_time_ns: 2,
        layer_bytes: 3,
    }
}

fn entry(sector: u64, height: u64) -> Entry {
    Entry {
        address: Address::new(0, sector),
        height,
        layer: 9,
        offset: 4096,
        crc: 1,
        stored_bytes: 4096,
        sectors: 8,
        skip: 0,
        record_sectors: 8,
        stored: Stored::Plain,
    }
}

fn cache() -> Arc<IndexCache> {
    Arc::new(IndexCache::new(1 << 20, 2))
}

fn write(dir: &Path, key: RunKey, entries: &[Entry]) -> u64 {
    let mut writer = RunWriter::create(dir, head(key)).expect("create");
    entries.iter().try_for_each(|entry| writer.push(entry)).expect("in order");
    writer.finish(&tail(9)).expect("finish")
}

/// Random numbers without a crate.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn names_have_one_form() {
    for key in [RunKey::of_layer(1), RunKey { level: 1, first: 8 }, RunKey { level: 6, first: 1 << 18 }] {
        assert_eq!(RunKey::from_file_name(&key.file_name()), Some(key));
    }
    assert_eq!(RunKey { level: 1, first: 8 }.file_name(), "L1-0000000008.run");
    for name in
        ["L0-1.run", "L1-0000000009.run", "L7-0000000000.run", "L0-0000000001.run.tmp", "L0-+000000001.run", "L0", ""]
    {
        assert_eq!(RunKey::from_file_name(name), None, "{name}");
    }
    let key = RunKey { level: 2, first: 128 };
    assert_eq!(key.below().map(|below| below.first).collect::<Vec<_>>(), [128, 136, 144, 152, 160, 168, 176, 184]);
    assert!(key.below().all(|below| below.above() == key));
    assert_eq!(RunKey::of_layer(3).below().count(), 0);
}

/// Measured on random 4 KiB records over 1 TiB: what an entry costs on disk, all of the file counted.
#[test]
fn an_entry_costs_some_seventeen_bytes() {
    let dir = directory();
    let mut state = 88172645463325252;
    for (level, count, layers) in [(0, 131_072u64, 1u64), (1, 1_048_576, 8)] {
        let mut entries: Vec<Entry> = (0..count)
            .map(|index| {
                let place = index % (count / layers);
                Entry {
                    layer: 8 + (index / (count / layers)) as u32,
                    offset: 4096 + place as u32 * 4096,
                    crc: random(&mut state) as u32,
                    ..entry(random(&mut state) % (1 << 28) * 8, 16 + index * 4144)
                }
            })
            .collect();
        entries.sort_by_key(Entry::order);
        if level > 0 {
            entries.dedup_by_key(|entry| entry.address);
        }
        let key = RunKey { level, first: 8 };
        let bytes = write(dir.path(), key, &entries);
        let run = Arc::new(Run::open(&dir.path().join(key.file_name()), GROUP, &cache()).expect("open"));
        run.verify().expect("whole");
        let per_entry = bytes as f64 / entries.len() as f64;
        println!("level {level}: {per_entry:.2} bytes per entry");
        assert!(per_entry < 17.6, "{per_entry}");
        assert_eq!((run.entries(), run.file_bytes()), (entries.len() as u64, bytes));
    }
}

#[test]
fn a_run_that_could_not_be_read_is_not_written() {
    let dir = directory();
    let low = RunKey::of_layer(9);
    let high = RunKey { level: 1, first: 8 };
    let refused = |key, entries: &[Entry]| {
        let mut writer = RunWriter::create(dir.path(), head(key)).expect("create");
        entries.iter().try_for_each(|entry| writer.push(entry)).is_err()
    };
    assert!(!refused(low, &[entry(8, 11), entry(8, 12), entry(9, 11)]));
    assert!(refused(high, &[entry(8, 11), entry(8, 12)]), "overlap");
    assert!(refused(low, &[entry(8, 12), entry(8, 11)]), "order");
    assert!(refused(low, &[entry(16, 12), entry(8, 12)]), "order");
    assert!(refused(low, &[entry(8, 10)]), "height");
    assert!(refused(low, &[entry(8, (1 << 40) + 1)]), "height");
    assert!(refused(low, &[Entry { layer: 10, ..entry(8, 11) }]), "layer");
    assert!(refused(low, &[entry(124, 11)]), "granule");
    assert!(RunWriter::create(dir.path(), head(RunKey { level: 1, first: 9 })).is_err());
    assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0, "nothing is left");
}

#[test]
fn a_run_is_known_by_group_name_and_tail() {
    let dir = directory();
    let key = RunKey::of_layer(9);
    write(dir.path(), key, &[entry(8, 11)]);
    let path = dir.path().join(key.file_name());
    let run = Run::open(&path, GROUP, &cache()).expect("open");
    assert_eq!((run.head(), run.blocks(), run.tail().expect("tail")), (&head(key), 1, tail(9)));
    assert!(matches!(Run::open(&path, [8; 16], &cache()), Err(HistoryError::Damaged { .. })));
    let other = dir.path().join("L0-0000000010.run");
    std::fs::copy(&path, &other).expect("copy");
    assert!(matches!(Run::open(&other, GROUP, &cache()), Err(HistoryError::Damaged { .. })));
    // One without entries.
    write(dir.path(), key, &[]);
    let run = Arc::new(Run::open(&path, GROUP, &cache()).expect("open"));
    run.verify().expect("whole");
    assert_eq!((run.blocks(), run.entries()), (0, 0));
}

/// The cache keeps few files open, and none of a run that is gone.
#[test]
fn the_cache_is_bounded() {
    let dir = directory();
    let cache = Arc::new(IndexCache::new(64 << 10, 2));
    let entries: Vec<Entry> = (0..4000).map(|index| entry(index * 8, 11 + index)).collect();
    let entries: Vec<Entry> = entries.iter().map(|entry| Entry { layer: 9, ..*entry }).collect();
    let mut runs = Vec::new();
    for level in [0, 1] {
        let key = RunKey { level, first: if level == 0 { 9 } else { 8 } };
        write(dir.path(), key, &entries);
        runs.push(Arc::new(Run::open(&dir.path().join(key.file_name()), GROUP, &cache).expect("open")));
    }
    let plan = crate::resolve::Plan { runs: runs.into(), open: Vec::new() };
    for start in 0..29 {
        let parts = crate::resolve::resolve(&plan, 0, start << 19, 1 << 20, 10).expect("whole");
        assert_eq!(parts.len(), 256);
        assert!(cache.bytes() <= 64 << 10 && cache.open_files() <= 2, "{}", cache.bytes());
    }
    drop(plan);
    assert_eq!(cache.open_files(), 0);
}
