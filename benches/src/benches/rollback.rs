//! Rolling back: the time that it takes, by what changed and not by what there is; and the merging of indexes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use varve_io::cpu::thread_cpu_time;
use varve_tests::{GIB, MIB, Role, Scratch};
use varve_timeline::entry::{Address, Entry, Stored};
use varve_timeline::merge::{merge, run_inputs};
use varve_timeline::run::{Run, RunHead, RunKey, RunWriter};

use super::GROUP;
use crate::feed::{Source, index_cache};
use crate::plan::Plan;
use crate::recovery::{Recovery, bookmark};
use crate::report::{Report, Target};
use crate::volume::writes_beside_reads;

const BLOCK: u64 = 4096;
/// The part of the volume that holds data.
const DATA_BYTES: u64 = 4 * GIB;
const TIB: u64 = 1024 * GIB;
const PER_MILLION: f64 = 1e6;
const DEVICE_DEPTH: u32 = 64;
const DEVICE_TIME: Duration = Duration::from_secs(3);
/// Records of the merge, and runs that they are in.
const RECORDS: u64 = 10_000_000;
const RUNS: u64 = 8;

pub fn run(plan: &Plan, report: &mut Report) {
    let data = if plan.quick { GIB } else { DATA_BYTES };
    let blocks = data / BLOCK / 2;
    for (what, volume, target) in [
        ("the volume is twice as large", data, Target::Max(7.0)),
        ("the same in a volume of 1 TiB, sparse", TIB, Target::None),
    ] {
        let rolled = rolled_back(report, volume, data, blocks);
        let detail = format!(
            "{blocks} distinct blocks at random in {} GiB of data; receiver's CPU {:.2} s, its own figure {:.2} s",
            data / GIB,
            rolled.cpu_s,
            rolled.own_s
        );
        let scaled = rolled.seconds * PER_MILLION / blocks as f64;
        report.row(&format!("a million blocks rolled back, {what}"), "s", &[scaled], target, &detail);
        let detail = "fio: what is put back and what it replaces are read, and the replica is written, a block each";
        report.row("the device alone, two reads and a write for each", "s", &[rolled.device_s], Target::None, detail);
    }
    merging(plan, report);
}

struct Rolled {
    seconds: f64,
    own_s: f64,
    cpu_s: f64,
    /// For a million blocks.
    device_s: f64,
}

fn rolled_back(report: &mut Report, volume: u64, data: u64, blocks: u64) -> Rolled {
    let mut recovery = Recovery::new(volume);
    let (mut group, mut source) = (recovery.group(), Source::new());
    group.fill(&mut source, data);
    group.begin_history(&source);
    bookmark(&group, "before");
    let before = digest(recovery.replica(), data);
    let mut order: Vec<u32> = (0..(data / BLOCK) as u32).collect();
    order.shuffle(&mut source.random);
    let mut places = order.iter().map(|block| u64::from(*block) * BLOCK);
    group.write(&mut source, BLOCK as usize, |_| places.next().unwrap(), |written| (blocks - written) as usize);
    group.finish(&source);
    group.close();
    if digest(recovery.replica(), data) == before {
        report.wrong("writing changed nothing");
    }
    recovery.start();
    let cpu = recovery.host.cpu_time(Role::Receiver);
    let (reply, took) = recovery.varve(&["rollback", GROUP, "--at", "bookmark:before", "--yes"]);
    let cpu_s = (recovery.host.cpu_time(Role::Receiver) - cpu).as_secs_f64();
    if digest(recovery.replica(), data) != before {
        report.wrong("the replica is not what it was at the point");
    }
    // The replica has done its duty.
    let writes = writes_beside_reads(recovery.replica(), 67, DEVICE_DEPTH, DEVICE_TIME, &Scratch::disk());
    let device_s = PER_MILLION / writes;
    let own_s = reply["seconds"].as_f64().unwrap_or(f64::NAN);
    Rolled { seconds: took.as_secs_f64(), own_s, cpu_s, device_s }
}

fn digest(path: &Path, bytes: u64) -> u32 {
    let file = File::open(path).unwrap();
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; MIB as usize];
    for at in (0..bytes).step_by(buffer.len()) {
        file.read_exact_at(&mut buffer, at).unwrap();
        hasher.update(&buffer);
    }
    hasher.finalize()
}

/// Eight runs become one, as the keeper does it.
fn merging(plan: &Plan, report: &mut Report) {
    let scratch = Scratch::disk();
    let cache = index_cache();
    let per_run = if plan.quick { RECORDS / RUNS / 10 } else { RECORDS / RUNS };
    let mut random = StdRng::seed_from_u64(rand::random());
    for (what, blocks) in [("1 GiB", GIB / BLOCK), ("1 TiB", TIB / BLOCK)] {
        let runs: Vec<Arc<Run>> = (0..RUNS)
            .map(|number| {
                let key = RunKey::of_layer((RUNS + number) as u32);
                let mut writer = RunWriter::create(scratch.path(), head(key, per_run)).unwrap();
                entries(&mut random, key, per_run, blocks).iter().for_each(|entry| writer.push(entry).unwrap());
                writer.finish(&[]).unwrap();
                Arc::new(Run::open(&scratch.join(&key.file_name()), [1; 16], &cache).unwrap())
            })
            .collect();
        let key = RunKey { level: 1, first: RUNS as u32 };
        let mut seconds = Vec::new();
        let mut left = 0;
        for _ in 0..plan.pairs(3, 1) {
            let mut writer = RunWriter::create(scratch.path(), head(key, per_run)).unwrap();
            let begin = thread_cpu_time();
            assert!(merge(run_inputs(&runs).unwrap(), &mut writer, || true).unwrap());
            left = writer.entries();
            writer.finish(&[]).unwrap();
            let part = (per_run * RUNS) as f64 / RECORDS as f64;
            seconds.push((thread_cpu_time() - begin).as_secs_f64() / part);
        }
        let scaled = if plan.quick { "; scaled up: more fit the processor's cache than of all" } else { "" };
        let detail = format!("{} records in {RUNS} runs become {left}{scaled}", per_run * RUNS);
        let what = format!("merge of 10^7 records over {what}, CPU");
        report.row(&what, "s", &seconds, Target::Max(1.0), &detail);
    }
}

fn head(key: RunKey, per_run: u64) -> RunHead {
    let first = u64::from(key.first);
    let last_height = (first + u64::from(key.layers())) * per_run * 8 + 8;
    RunHead { group: [1; 16], key, first_height: 1, last_height, first_time_ns: 1, last_time_ns: 2, layer_bytes: 1 }
}

/// Of random 4 KiB writes.
fn entries(random: &mut StdRng, key: RunKey, count: u64, blocks: u64) -> Vec<Entry> {
    let mut entries: Vec<Entry> = (0..count)
        .map(|number| Entry {
            address: Address::new(0, random.random_range(0..blocks) * 8),
            height: (u64::from(key.first) * count + number) * 8 + 8,
            layer: key.first,
            offset: 4096 + number as u32 % 131_072 * 4096,
            crc: random.random(),
            stored_bytes: 4096,
            sectors: 8,
            skip: 0,
            record_sectors: 8,
            stored: Stored::Plain,
        })
        .collect();
    entries.sort_by_key(Entry::order);
    entries
}
