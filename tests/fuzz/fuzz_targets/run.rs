//! Runs of the index. Any bytes with right checksums are refused or read as what they say; entries that were written come
//! back; a run whose bytes were changed is an error or answers as before.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use varve_common::format::run::{BLOCK_ENTRIES_MAX, RUN_BLOCK_BYTES, RunFooter, decode_block};
use varve_fuzz::Input;
use varve_timeline::cache::IndexCache;
use varve_timeline::entry::{Address, Entry, Stored};
use varve_timeline::error::HistoryError;
use varve_timeline::merge::all_addresses;
use varve_timeline::resolve::{Part, Plan, changed, resolve};
use varve_timeline::run::{Run, RunHead, RunKey, RunWriter};

const GROUP: [u8; 16] = [7; 16];
const FOOTER_CRC: usize = 140;

static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
    let dir = varve_fuzz::work_dir("run").join("runs");
    std::fs::create_dir(&dir).expect("directory");
    dir
});

fuzz_target!(|data: &[u8]| {
    let Some((what, bytes)) = data.split_first() else { return };
    match what % 3 {
        0 => block(bytes),
        1 => footer(bytes),
        _ => file(&mut Input(bytes)),
    }
});

/// A block with the checksum put right: its entries are anything.
fn block(bytes: &[u8]) {
    let mut block = [0; RUN_BLOCK_BYTES];
    let taken = bytes.len().min(RUN_BLOCK_BYTES - 4);
    block[4..4 + taken].copy_from_slice(&bytes[..taken]);
    let index = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    let crc = crc32fast::hash(&block[4..]);
    block[..4].copy_from_slice(&crc.to_le_bytes());
    let mut entries = Vec::new();
    if let Ok(header) = decode_block(&block, index, |entry| entries.push(entry)) {
        assert_eq!(entries.len(), usize::from(header.entries.get()));
        assert!((1..=BLOCK_ENTRIES_MAX).contains(&entries.len()));
        assert!(entries.is_sorted_by_key(|entry| entry.address));
        assert!(entries.iter().all(|entry| entry.height >= header.base_height.get() && entry.stored <= 2));
        assert!(decode_block(&block, index.wrapping_add(1), |_| {}).is_err(), "in another's place");
    }
    block[100] ^= 1;
    assert!(decode_block(&block, index, |_| {}).is_err(), "damage is seen");
}

fn footer(bytes: &[u8]) {
    let mut block = [0; RUN_BLOCK_BYTES];
    let taken = bytes.len().min(FOOTER_CRC);
    block[..taken].copy_from_slice(&bytes[..taken]);
    block[..8].copy_from_slice(b"VARVERUN");
    let crc = crc32fast::hash(&block[..FOOTER_CRC]);
    block[FOOTER_CRC..FOOTER_CRC + 4].copy_from_slice(&crc.to_le_bytes());
    let file_bytes = u64::from_le_bytes(block[104..112].try_into().expect("eight bytes"));
    if let Ok(mut footer) = RunFooter::decode(&block, file_bytes) {
        assert!(footer.filter_offset() <= footer.tail_offset.get() && footer.tail_offset.get() < file_bytes);
        assert_eq!(footer.encode(), block, "one form");
        assert!(RunFooter::decode(&block, file_bytes.wrapping_add(4096)).is_err());
    }
}

fn head() -> RunHead {
    RunHead {
        group: GROUP,
        key: RunKey::of_layer(3),
        first_height: 0,
        last_height: u64::MAX,
        first_time_ns: 0,
        last_time_ns: 0,
        layer_bytes: 0,
    }
}

/// A run of a few entries, then some of its bytes changed.
fn file(input: &mut Input) {
    let mut entries = Vec::new();
    for _ in 0..input.u8() {
        let (sectors, stored) = (u16::from(input.u8() % 128) + 1, input.u8());
        let (place, granule) = (u64::from(input.u8()) % u64::from(129 - sectors), u64::from(input.u8() % 8));
        let (stored, stored_bytes) = match stored % 3 {
            0 => (Stored::Zero, 0),
            1 => (Stored::Plain, u32::from(sectors) * 512),
            _ => (Stored::Lz4, u32::from(input.u16()) % (u32::from(sectors) * 512 - 1) + 1),
        };
        entries.push(Entry {
            address: Address::new(0, granule * 128 + place),
            height: input.u64().max(1),
            layer: 3,
            offset: entries.len() as u32 * 65536,
            crc: if stored == Stored::Zero { 0 } else { 0xA5A5_0000 + entries.len() as u32 },
            stored_bytes,
            sectors,
            skip: 0,
            record_sectors: sectors,
            stored,
        });
    }
    entries.sort_by_key(Entry::order);
    let path = DIR.join(head().key.file_name());
    let mut writer = RunWriter::create(&DIR, head()).expect("create");
    entries.iter().try_for_each(|entry| writer.push(entry)).expect("in order");
    writer.finish(&[1, 2, 3]).expect("finish");
    let point = input.u64();
    let good = answers(&path, point).expect("whole");
    check(&entries, &good, point);

    let mut bytes = std::fs::read(&path).expect("read");
    while !input.is_empty() {
        let at = usize::from(input.u16()) % bytes.len();
        bytes[at] ^= input.u8();
    }
    std::fs::write(&path, &bytes).expect("write");
    if let Ok(parts) = answers(&path, point) {
        assert!(parts == good, "a wrong answer from a damaged run");
    }
}

fn answers(path: &std::path::Path, point: u64) -> Result<Vec<Part>, HistoryError> {
    let run = Run::open(path, GROUP, &Arc::new(IndexCache::new(1 << 18, 2)))?;
    let plan = Plan { runs: [Arc::new(run)].into(), open: Vec::new() };
    let mut parts = resolve(&plan, 0, 0, 512 << 10, point)?;
    for start in [0, 65536 * 3 + 512] {
        parts.extend(resolve(&plan, 0, start, 4096, point)?);
    }
    changed(&plan, all_addresses(), point)?.collect::<Result<Vec<Entry>, _>>()?;
    Ok(parts)
}

/// Every sector is that of the first record after the point.
fn check(entries: &[Entry], parts: &[Part], point: u64) {
    use varve_timeline::resolve::Origin;
    for part in parts {
        for sector in part.start / 512..part.end / 512 {
            let covers = |entry: &&Entry| {
                entry.height > point && entry.address.sector() <= sector && sector < entry.end().sector()
            };
            let first = entries.iter().filter(covers).min_by_key(|entry| entry.age());
            match (part.origin, first) {
                (Origin::Replica, None) => {}
                (Origin::Zero, Some(entry)) => assert_eq!(entry.stored, Stored::Zero),
                (Origin::Record(found), Some(entry)) => assert_eq!(found.age(), entry.age()),
                other => panic!("sector {sector}: {other:?}"),
            }
        }
    }
}
