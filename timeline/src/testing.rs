//! Small histories for tests: what was written, and the index of it on disk, side by side.

use crate::cache::IndexCache;
use crate::catalogue::{Catalogue, LayerInfo};
use crate::entry::{Address, Entry, Stored};
use crate::limits::{GRANULE_SECTORS, SECTOR_BYTES};
use crate::merge::{merge, run_inputs};
use crate::open_index::OpenIndex;
use crate::resolve::{Origin, Part, Plan};
use crate::run::{Run, RunHead, RunKey, RunWriter};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

pub const GROUP: [u8; 16] = [7; 16];
/// Sectors of the volumes in these tests: a few granules, the last one cut off.
pub const SECTORS: u64 = 500;
pub const VOLUMES: u16 = 2;

/// One change of a volume.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    pub volume: u16,
    pub sector: u64,
    pub sectors: u64,
    /// Above the stamp before: 0 is an image in a gap that was sent twice.
    pub step: u64,
    pub stored: Stored,
    /// What comes after it in the layer.
    pub then: Then,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    Nothing,
    Chunk,
    Layer,
    /// Two layers end: the second one is empty.
    Layers,
}

pub fn changes(count: usize) -> impl Strategy<Value = Vec<Change>> {
    let stored = prop_oneof![Just(Stored::Plain), Just(Stored::Lz4), Just(Stored::Zero)];
    let then = prop_oneof![
        3 => Just(Then::Nothing), 3 => Just(Then::Chunk), 4 => Just(Then::Layer), 1 => Just(Then::Layers)
    ];
    let sectors = prop_oneof![1u64..10, Just(8u64), 1u64..300];
    let step = prop_oneof![Just(0u64), Just(1), Just(7), Just(8), Just(1 << 30)];
    let change = (0..VOLUMES, 0..SECTORS, sectors, step, stored, then);
    let change = change.prop_map(|(volume, sector, sectors, step, stored, then)| Change {
        volume,
        sector,
        sectors: sectors.min(SECTORS - sector),
        step,
        stored,
        then,
    });
    prop::collection::vec(change, 1..count)
}

/// In memory where that can be had: these tests write thousands of runs, each synced.
pub fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("directory")
}

pub struct History {
    pub dir: tempfile::TempDir,
    pub cache: Arc<IndexCache>,
    pub catalogue: Catalogue,
    /// Without merged runs.
    pub unmerged: Catalogue,
    pub runs: BTreeMap<RunKey, Arc<Run>>,
    pub open: OpenIndex,
    /// Every record in the order of appending.
    pub records: Vec<Entry>,
    height: u64,
}

impl History {
    pub fn new() -> Self {
        Self {
            dir: directory(),
            cache: Arc::new(IndexCache::new(1 << 20, 4)),
            catalogue: Catalogue::new(),
            unmerged: Catalogue::new(),
            runs: BTreeMap::new(),
            open: OpenIndex::new(),
            records: Vec::new(),
            height: 1000,
        }
    }

    pub fn of(changes: &[Change]) -> Self {
        let mut history = Self::new();
        let mut chunk = Vec::new();
        let mut layer = OpenLayer { number: 1, offset: 4096, first_height: 1000, lowest: u64::MAX };
        for (index, change) in changes.iter().enumerate() {
            history.take(change, &mut layer, index as u32, &mut chunk);
            if change.then != Then::Nothing {
                history.open.append(std::mem::take(&mut chunk)).expect("room");
            }
            if matches!(change.then, Then::Layer | Then::Layers) {
                history.close(&mut layer);
            }
            if change.then == Then::Layers {
                history.close(&mut layer);
            }
        }
        history.open.append(chunk).expect("room");
        let open = history.layer_info(&layer, true);
        history.catalogue.set_layer(open).expect("room");
        history.unmerged = history.catalogue.clone();
        history.merge_all();
        history
    }

    /// Cuts a change into records that do not cross granules.
    fn take(&mut self, change: &Change, layer: &mut OpenLayer, crc: u32, chunk: &mut Vec<Entry>) {
        self.height += change.step.max(u64::from(self.records.is_empty()));
        layer.lowest = layer.lowest.min(self.height);
        let (mut sector, end) = (change.sector, change.sector + change.sectors);
        while sector < end {
            let granule = u64::from(GRANULE_SECTORS);
            let sectors = (granule - sector % granule).min(end - sector) as u16;
            let stored_bytes = match change.stored {
                Stored::Zero => 0,
                Stored::Plain => u32::from(sectors) * 512,
                Stored::Lz4 => u32::from(sectors) * 511,
            };
            let entry = Entry {
                address: Address::new(change.volume, sector),
                height: self.height,
                layer: layer.number,
                offset: layer.offset,
                crc: if change.stored == Stored::Zero { 0 } else { crc },
                stored_bytes,
                sectors,
                skip: 0,
                record_sectors: sectors,
                stored: change.stored,
            };
            assert!(entry.is_possible());
            layer.offset += stored_bytes;
            chunk.push(entry);
            self.records.push(entry);
            sector += u64::from(sectors);
        }
    }

    fn layer_info(&self, layer: &OpenLayer, open: bool) -> LayerInfo {
        // A stamp may go on from the layer before.
        let first_height = layer.first_height.min(layer.lowest.saturating_sub(1));
        LayerInfo {
            number: layer.number,
            first_height,
            last_height: self.height,
            first_time_ns: u64::from(layer.number),
            last_time_ns: u64::from(layer.number),
            bytes: u64::from(layer.offset),
            records: self.open.view().len() as u64,
            open,
        }
    }

    fn close(&mut self, layer: &mut OpenLayer) {
        let info = self.layer_info(layer, false);
        let head = RunHead {
            group: GROUP,
            key: RunKey::of_layer(info.number),
            first_height: info.first_height,
            last_height: info.last_height,
            first_time_ns: info.first_time_ns,
            last_time_ns: info.last_time_ns,
            layer_bytes: info.bytes,
        };
        let mut writer = RunWriter::create(self.dir.path(), head).expect("create");
        self.open.view().sorted().iter().try_for_each(|entry| writer.push(entry)).expect("in order");
        writer.finish(&tail(info.number)).expect("finish");
        self.open = OpenIndex::new();
        self.catalogue.set_layer(info).expect("room");
        self.add_run(head.key);
        *layer = OpenLayer { number: layer.number + 1, offset: 4096, first_height: self.height, lowest: u64::MAX };
    }

    fn add_run(&mut self, key: RunKey) {
        let run = Run::open(&self.dir.path().join(key.file_name()), GROUP, &self.cache).expect("our own run");
        self.runs.insert(key, Arc::new(run));
        self.catalogue.add_run(key);
    }

    pub fn merge_all(&mut self) {
        while let Some(key) = self.catalogue.due_merges().first().copied() {
            let head = self.catalogue.head_of(GROUP, key).expect("its layers");
            let below: Vec<_> = key.below().map(|key| Arc::clone(&self.runs[&key])).collect();
            let mut writer = RunWriter::create(self.dir.path(), head).expect("create");
            assert!(merge(run_inputs(&below).expect("runs"), &mut writer, || true).expect("merge"));
            writer.finish(&[]).expect("finish");
            self.add_run(key);
        }
    }

    pub fn plan(&self, catalogue: &Catalogue, point: u64) -> Plan {
        let keys = catalogue.plan(point).expect("all is there");
        Plan { runs: keys.iter().map(|key| Arc::clone(&self.runs[key])).collect(), open: vec![self.open.view()] }
    }

    /// Heights around every stamp, and before the first.
    pub fn points(&self) -> Vec<u64> {
        let mut points = vec![1000];
        for record in &self.records {
            points.extend([record.height - 1, record.height, record.height + 1]);
        }
        points.sort_unstable();
        points.dedup();
        points
    }

    /// The record that has what a sector held at `point`: found by asking every one.
    pub fn expected(&self, address: Address, point: u64) -> Option<&Entry> {
        self.records.iter().find(|record| record.height > point && record.address <= address && address < record.end())
    }

    /// Compares parts with what every sector is to have.
    pub fn check(&self, parts: &[Part], volume: u16, start: u64, bytes: u64, point: u64) {
        let mut at = start;
        for part in parts {
            assert_eq!(part.start, at, "no gaps");
            assert!(part.end > part.start);
            for sector in part.start / SECTOR_BYTES..part.end / SECTOR_BYTES {
                self.check_sector(&part.origin, Address::new(volume, sector), point);
            }
            if let Origin::Record(entry) = part.origin {
                assert_eq!((part.start, part.end), (entry.address.byte(), entry.end().byte()));
            }
            at = part.end;
        }
        assert_eq!(at, start + bytes);
    }

    pub fn check_sector(&self, origin: &Origin, address: Address, point: u64) {
        match (origin, self.expected(address, point)) {
            (Origin::Replica, None) => {}
            (Origin::Zero, Some(record)) => assert_eq!(record.stored, Stored::Zero),
            (Origin::Record(entry), Some(record)) => {
                let whole = (entry.layer, entry.offset, entry.crc, entry.record_sectors, entry.height);
                let same = (record.layer, record.offset, record.crc, record.record_sectors, record.height);
                assert_eq!(whole, same, "{address:?} at {point}");
                let first = entry.address.number() - u64::from(entry.skip);
                assert_eq!(first, record.address.number(), "the right part of it");
            }
            other => panic!("{address:?} at {point}: {other:?}"),
        }
    }
}

pub fn tail(layer: u32) -> Vec<u8> {
    vec![layer as u8; layer as usize * 3]
}

struct OpenLayer {
    number: u32,
    offset: u32,
    first_height: u64,
    lowest: u64,
}
