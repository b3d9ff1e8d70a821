//! What the index costs, in CPU time of one thread: `cargo run --release -p varve-timeline --example index_timing [DIR]`.
//!
//! 76 layers of 131,072 random 4 KiB records (10^7 in all) on a volume of 40 GiB, with all merges made.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use varve_io::cpu::{process_rss_bytes, thread_cpu_time};
use varve_timeline::cache::IndexCache;
use varve_timeline::catalogue::load;
use varve_timeline::entry::{Address, Entry, Stored};
use varve_timeline::error::HistoryError;
use varve_timeline::merge::{all_addresses, merge, run_inputs};
use varve_timeline::open_index::OpenIndex;
use varve_timeline::resolve::{Plan, changed, resolve};
use varve_timeline::run::{Run, RunHead, RunKey, RunWriter};

const GROUP: [u8; 16] = [1; 16];
const LAYERS: u32 = 76;
const RECORDS: u64 = 131_072;
const VOLUME_BLOCKS: u64 = 10 << 20;
const HEIGHT_STEP: u64 = 4136;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn timed<T>(what: &str, per: u64, unit: &str, work: impl FnOnce() -> T) -> T {
    let begin = thread_cpu_time();
    let result = work();
    let took = thread_cpu_time() - begin;
    println!("{what}: {took:.2?}, {:.3} µs per {unit}", took.as_secs_f64() * 1e6 / per as f64);
    result
}

fn head(key: RunKey) -> RunHead {
    let height = |layer: u32| u64::from(layer) * RECORDS * HEIGHT_STEP;
    RunHead {
        group: GROUP,
        key,
        first_height: height(key.first),
        last_height: height(key.end()),
        first_time_ns: 0,
        last_time_ns: 0,
        layer_bytes: RECORDS * 4160,
    }
}

fn layer(number: u32, records: u64, random: &mut Random) -> Vec<Entry> {
    let first = u64::from(number) * RECORDS * HEIGHT_STEP;
    let step = HEIGHT_STEP * RECORDS / records;
    let entry = |index: u64| Entry {
        address: Address::new(0, random.next() % VOLUME_BLOCKS * 8),
        height: first + (index + 1) * step / 8 * 8,
        layer: number,
        offset: (index * 4096 % (1 << 32)) as u32,
        crc: random.next() as u32,
        stored_bytes: 4096,
        sectors: 8,
        skip: 0,
        record_sectors: 8,
        stored: Stored::Plain,
    };
    (0..records).map(entry).collect()
}

fn write_run(dir: &Path, key: RunKey, entries: impl Iterator<Item = Entry>) -> Result<u64, HistoryError> {
    let mut writer = RunWriter::create(dir, head(key))?;
    for entry in entries {
        writer.push(&entry)?;
    }
    writer.finish(&[])
}

fn merged(dir: &Path, key: RunKey, cache: &Arc<IndexCache>) -> Result<(u64, u64, Duration), HistoryError> {
    let open = |key: RunKey| Run::open(&dir.join(key.file_name()), GROUP, cache).map(Arc::new);
    let below: Vec<_> = key.below().map(open).collect::<Result<_, _>>()?;
    let begin = thread_cpu_time();
    let mut writer = RunWriter::create(dir, head(key))?;
    merge(run_inputs(&below)?, &mut writer, || true)?;
    writer.finish(&[])?;
    let took = thread_cpu_time() - begin;
    Ok((below.iter().map(|run| run.entries()).sum(), open(key)?.entries(), took))
}

/// Ten million entries from eight runs.
fn measure_merge(dir: &Path, cache: &Arc<IndexCache>, random: &mut Random) -> Result<(), HistoryError> {
    let key = RunKey { level: 1, first: 1024 };
    for below in key.below() {
        let mut entries = layer(below.first, 1_250_000, random);
        entries.sort_by_key(Entry::order);
        write_run(dir, below, entries.into_iter())?;
    }
    let (entries, kept, took) = merged(dir, key, cache)?;
    println!("merge of {entries} entries to {kept}: {took:.2?} with the file's sync");
    key.below().chain([key]).try_for_each(|key| {
        std::fs::remove_file(dir.join(key.file_name())).map_err(|e| varve_io::IoError::new("remove", dir, e).into())
    })
}

fn build(dir: &Path, cache: &Arc<IndexCache>, random: &mut Random) -> Result<OpenIndex, HistoryError> {
    let (mut bytes, mut append, mut close) = (0, Duration::ZERO, Duration::ZERO);
    let mut open = OpenIndex::new();
    for number in 1..=LAYERS + 1 {
        let entries = layer(number, RECORDS, random);
        open = OpenIndex::new();
        let begin = thread_cpu_time();
        entries.chunks(1024).try_for_each(|chunk| open.append(chunk.to_vec()))?;
        append += thread_cpu_time() - begin;
        if number <= LAYERS {
            let begin = thread_cpu_time();
            bytes += write_run(dir, RunKey::of_layer(number), open.view().sorted().into_iter())?;
            close += thread_cpu_time() - begin;
        }
    }
    let all = u64::from(LAYERS) * RECORDS;
    let each = |took: Duration| took.as_secs_f64() * 1e6 / all as f64;
    println!("append: {:.3} µs per entry; close: {:.3} µs per entry", each(append), each(close));
    println!("level 0: {:.2} bytes per entry", bytes as f64 / all as f64);
    let (mut took, mut of) = (Duration::ZERO, 0);
    for level in 1..=2 {
        let step = 8u32.pow(level);
        for first in (step..=LAYERS + 1 - step).step_by(step as usize) {
            let (entries, _, time) = merged(dir, RunKey { level: level as u8, first }, cache)?;
            took += time;
            of += entries;
        }
    }
    println!("merges of {of} entries: {took:.2?}");
    Ok(open)
}

fn measure_resolve(plan: &Plan, point: u64, random: &mut Random) -> Result<(), HistoryError> {
    let regions = VOLUME_BLOCKS / 256;
    let resolve_all = |random: &mut Random, bytes: u64, times: u64| -> Result<usize, HistoryError> {
        let mut parts = 0;
        for _ in 0..times {
            let start = random.next() % regions * (1 << 20) + random.next() % 200 * 4096 * u64::from(bytes < 1 << 20);
            parts += resolve(plan, 0, start, bytes, point)?.len();
        }
        Ok(parts)
    };
    println!("-- {} runs and the open index --", plan.runs.len());
    timed("first reads of 4 KiB (blocks are read and decoded)", 2000, "read", || resolve_all(random, 4096, 2000))?;
    let times = regions;
    timed("1 MiB, cache being filled", times * 256, "4 KiB block", || {
        (0..regions).try_for_each(|region| resolve(plan, 0, region << 20, 1 << 20, point).map(|_| ()))
    })?;
    timed("1 MiB, warm", times * 256, "4 KiB block", || resolve_all(random, 1 << 20, times))?;
    timed("64 KiB in order, warm", 16 * times * 16, "4 KiB block", || {
        (0..16 * times).try_for_each(|at| resolve(plan, 0, at << 16, 1 << 16, point).map(|_| ()))
    })?;
    timed("64 KiB, warm", 20_000 * 16, "4 KiB block", || resolve_all(random, 64 << 10, 20_000))?;
    timed("4 KiB, warm", 100_000, "read", || resolve_all(random, 4096, 100_000))?;
    Ok(())
}

fn main() -> Result<(), HistoryError> {
    let dir = std::env::args().nth(1).unwrap_or_else(|| "/dev/shm/varve-index-timing".to_owned());
    let dir = Path::new(&dir);
    varve_io::crashsafe::create_dir_all_durable(dir)?;
    let mut random = Random(88_172_645_463_325_252);
    let cache = Arc::new(IndexCache::new(1 << 30, 64));
    measure_merge(dir, &cache, &mut random)?;
    let open = build(dir, &cache, &mut random)?;

    let layers: BTreeSet<u32> = (1..=LAYERS).collect();
    let loaded = timed("open", u64::from(LAYERS), "layer", || load(dir, GROUP, &layers, &cache))?;
    for layer in [1, 40] {
        let point = loaded.catalogue.layer(layer).map_or(0, |layer| layer.first_height + 1000);
        let keys = timed("plan", 1, "plan", || loaded.catalogue.plan(point)).unwrap_or_default();
        let runs: Vec<_> = keys.iter().filter_map(|key| loaded.runs.get(key).cloned()).collect();
        let plan = Plan { runs: runs.into(), open: vec![open.view()] };
        measure_resolve(&plan, point, &mut random)?;
        let rss = process_rss_bytes().unwrap_or(0);
        println!("cache: {} MiB, process: {} MiB", cache.bytes() >> 20, rss >> 20);
        let pieces =
            timed("changed, all of it", 1, "walk", || changed(&plan, all_addresses(), point).map(Iterator::count))?;
        println!("{pieces} pieces");
    }
    std::fs::remove_dir_all(dir).map_err(|e| varve_io::IoError::new("remove", dir, e))?;
    Ok(())
}
