//! What it costs to keep what is replaced: the applier with before-images, beside what fio can write to the same disk.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;
use varve_io::cpu::{process_cpu_time, thread_cpu_time};
use varve_tests::{GIB, MIB, Scratch};

use super::GROUP;
use crate::feed::{Group, Source, make_group};
use crate::plan::Plan;
use crate::report::{Report, Target};
use crate::statistics::{median, ratios};
use crate::volume::{fill, fio, writes_beside_log, writes_beside_reads};

const BLOCK: u64 = 4096;
/// As many requests as the receiver keeps in flight to its replicas.
const DEPTH: u32 = varve_receiver::limits::REPLICA_DEPTH;
/// Fits the receiver's memory of recently written blocks, which has 24 MiB.
const HOT_BYTES: u64 = 16 * MIB;
/// Older history goes, so that the disk does not fill up.
const KEEP_BYTES: u64 = 2 * GIB;
const COUNTERS: [&str; 2] = ["before_known_bytes", "before_read_bytes"];

/// One of the groups that are compared.
struct Contestant {
    group: Group,
    source: Source,
    volume_bytes: u64,
}

/// What a round of it reached.
struct Round {
    /// Writes a second, until the last one is in the replica, synced and marked.
    rate: f64,
    /// CPU time of a write in µs, without what makes the stream.
    cpu_us: f64,
    /// Part of the replaced bytes that did not have to be read.
    avoided: f64,
}

impl Contestant {
    fn new(dir: PathBuf, volume_bytes: u64, whole: bool, history: bool) -> Self {
        let meta = make_group(&dir, dir.join("replica-0.img"), volume_bytes);
        let start = if whole { Group::whole } else { Group::applier };
        let (mut group, mut source) = (start(&dir, &meta, KEEP_BYTES), Source::new());
        group.fill(&mut source, volume_bytes);
        if history {
            group.begin_history(&source);
        }
        Contestant { group, source, volume_bytes }
    }

    /// Random writes within the first `within` bytes.
    fn round(&mut self, within: u64, time: Duration) -> Round {
        assert!(within <= self.volume_bytes);
        let counters = COUNTERS.map(|name| self.group.counter(name));
        let cpu = || process_cpu_time() - thread_cpu_time();
        let (begun, cpu_before) = (Instant::now(), cpu());
        let place = |random: &mut StdRng| random.random_range(0..within / BLOCK) * BLOCK;
        let go_on = |_| if begun.elapsed() < time { usize::MAX } else { 0 };
        let written = self.group.write(&mut self.source, BLOCK as usize, place, go_on) as f64;
        self.group.finish(&self.source);
        let took = begun.elapsed().as_secs_f64();
        let cpu_us = (cpu() - cpu_before).as_secs_f64() * 1e6 / written;
        let [known, read] = [0, 1].map(|n| (self.group.counter(COUNTERS[n]) - counters[n]) as f64);
        Round { rate: written / took, cpu_us, avoided: known / (known + read).max(1.0) }
    }
}

pub fn run(plan: &Plan, report: &mut Report) {
    let bytes = if plan.quick { GIB } else { 4 * GIB };
    let scratch = Scratch::disk();
    let plain = scratch.file("plain", bytes);
    let log = scratch.file("log", bytes);
    for path in [&plain, &log] {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        fill(&file, bytes, |_| true);
        file.sync_all().unwrap();
    }
    let dir = |name: &str| scratch.dir(name).join(GROUP);
    let mut applier = Contestant::new(dir("applier"), bytes, false, true);
    let mut whole = Contestant::new(dir("whole"), bytes, true, true);
    let mut without = Contestant::new(dir("without"), bytes, false, false);

    let time = plan.run(4.0, 1.0);
    let (mut device, mut both, mut logged) = (Vec::new(), Vec::new(), Vec::new());
    let mut rounds: [Vec<Round>; 4] = Default::default();
    for round in 0..plan.pairs(5, 2) {
        let mut order = [0, 1, 2, 3, 4, 5, 6];
        if round % 2 == 1 {
            order.reverse();
        }
        for which in order {
            let reached = match which {
                0 => {
                    let job = fio(&plain).depth(DEPTH).option("time_based=1");
                    device.push(job.option(&format!("runtime={}ms", time.as_millis())).run(&scratch).write_iops);
                    continue;
                }
                5 => {
                    both.push(writes_beside_reads(&plain, 50, DEPTH, time, &scratch));
                    continue;
                }
                6 => {
                    // As many as the device may take alone in that time, by the last look.
                    let rate = device.last().copied().unwrap_or(50_000.0);
                    let writes = (rate * time.as_secs_f64()).min((bytes / BLOCK) as f64) as u64 / 512 * 512;
                    logged.push(writes_beside_log(&plain, &log, writes, DEPTH, &scratch));
                    continue;
                }
                1 => applier.round(bytes, time),
                2 => applier.round(HOT_BYTES, time),
                3 => whole.round(bytes, time),
                _ => without.round(bytes, time),
            };
            rounds[which - 1].push(reached);
        }
    }
    let detail = format!("fio, O_DIRECT, depth {DEPTH}, a file of {} GiB", bytes / GIB);
    report.row("4 KiB random writes to the device", "/s", &device, Target::None, &detail);
    let detail =
        "fio, the same with a read beside each write: no more can be applied when every before-image has to be read";
    report.row("the device, read and written", "/s", &both, Target::None, detail);
    let detail = "fio, the same, and as many bytes written in sequence to another file: no more can be applied when every before-image is kept and known";
    report.row("the device, written twice / the device", "x", &ratios(&logged, &device), Target::None, detail);
    let hot = format!("hot ({} MiB)", HOT_BYTES / MIB);
    let lines = [
        ("applied, every before-image read", Target::Min(0.5)),
        (&format!("applied, {hot}"), Target::Min(0.85)),
        ("landed and applied, every before-image read", Target::None),
        ("applied without before-images", Target::None),
    ];
    for ((what, target), rounds) in lines.into_iter().zip(&rounds) {
        let rates: Vec<f64> = rounds.iter().map(|round| round.rate).collect();
        let cpu: Vec<f64> = rounds.iter().map(|round| round.cpu_us).collect();
        let avoided: Vec<f64> = rounds.iter().map(|round| round.avoided).collect();
        let detail = format!(
            "{:.0}/s, {:.1} µs of CPU each, {:.0} % of the reads avoided",
            median(&rates),
            median(&cpu),
            100.0 * median(&avoided)
        );
        report.row(&format!("{what} / the device"), "x", &ratios(&rates, &device), target, &detail);
    }
    let rates: Vec<f64> = rounds[0].iter().map(|round| round.rate).collect();
    let what = "applied, every before-image read / the device, read and written";
    report.row(what, "x", &ratios(&rates, &both), Target::None, "layers and marks written besides");
    let rates: Vec<f64> = rounds[1].iter().map(|round| round.rate).collect();
    let what = format!("applied, {hot} / the device, written twice");
    report.row(&what, "x", &ratios(&rates, &logged), Target::None, "layers' indexes and marks written besides");
    report.note(
        "Rates are until everything is in the replica, synced and marked; merging of the history's indexes included.",
    );
    for contestant in [applier, whole, without] {
        contestant.group.close();
    }
}
