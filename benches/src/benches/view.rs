//! Views: how soon one can be used, what finding a block costs, and reading through one.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng, rngs::StdRng};
use varve_common::point::PointSpec;
use varve_io::cpu::thread_cpu_time;
use varve_io::{AlignedBuf, DirectFile};
use varve_receiver::apply::mark::AppliedFile;
use varve_receiver::group::open::{APPLIED_NAME, HISTORY_NAME};
use varve_receiver::group::stream::StreamState;
use varve_tests::{GIB, MIB, Role};
use varve_timeline::entry::Address;
use varve_timeline::layer::Before;
use varve_timeline::recorder::Recorder;
use varve_timeline::timeline::Timeline;

use super::GROUP;
use crate::feed::{Source, facts, index_cache};
use crate::plan::Plan;
use crate::recovery::{Recovery, bookmark};
use crate::report::{Report, Target};
use crate::statistics::{median, percentile, ratios};
use crate::volume::fio;

const BLOCK: u64 = 4096;
const TIB: u64 = 1024 * GIB;
/// A 4 KiB write in the stream.
const STEP: u64 = BLOCK + 40;
const STEP_NS: u64 = 20_000;
/// Records of a chunk, as the applier makes them under load, and of a layer, as a full one has.
const CHUNK: u64 = 4096;
const LAYER: u64 = 131_072;
/// A view finds out what a region of this size is made of at once.
const REGION: u64 = MIB;

/// A history of random 4 KiB writes that never happened.
pub(super) struct Past {
    /// Where it is.
    pub(super) recovery: Recovery,
    /// Height and time of its begin.
    pub(super) first: (u64, u64),
    last: (u64, u64),
    volume: u64,
}

impl Past {
    /// Of `records` records; the newest layer is still open. The daemon does not run.
    pub(super) fn new(volume: u64, records: u64) -> Self {
        Self::in_layers(volume, records, LAYER)
    }

    /// In layers of so many records each.
    fn in_layers(volume: u64, records: u64, layer: u64) -> Self {
        let recovery = Recovery::new(volume);
        let (mut group, mut source) = (recovery.group(), Source::new());
        group.fill(&mut source, 0);
        group.begin_history(&source);
        group.close();
        let mut mark = AppliedFile::open(&recovery.dir.join(APPLIED_NAME), recovery.meta.id()).unwrap();
        let mut state = StreamState::from_slot(mark.slot());
        let timeline = Timeline::open(&recovery.dir.join(HISTORY_NAME), recovery.meta.id(), index_cache()).unwrap();
        let mut recorder =
            Recorder::open(timeline.clone(), &facts(&state), mark.slot().history.get(), state.height).unwrap();
        let first = (state.height, state.at.time_ns);
        let mut random = StdRng::seed_from_u64(rand::random());
        let mut page = [0; BLOCK as usize];
        for number in 1..=records {
            (state.height, state.at.time_ns) = (first.0 + number * STEP, first.1 + number * STEP_NS);
            // Compresses to next to nothing: only the index counts here.
            page[..8].copy_from_slice(&number.to_le_bytes());
            let address = Address::new(0, random.random_range(0..volume / BLOCK) * 8);
            recorder.points(&[(state.height, state.at.time_ns)]).unwrap();
            recorder.push(address, state.height, Before::Bytes(&page)).unwrap();
            if number.is_multiple_of(CHUNK.min(layer)) || number == records {
                recorder.commit(state.height).unwrap();
            }
            if number.is_multiple_of(layer) {
                recorder.close_layer().unwrap();
            }
        }
        while timeline.merge_one(|| true).unwrap() {}
        state.at.position += records * STEP;
        let mut slot = *mark.slot();
        state.to_slot(&mut slot);
        slot.history = state.height.into();
        mark.write(slot).unwrap();
        Past { recovery, first, last: (state.height, state.at.time_ns), volume }
    }

    fn open(&self) -> Arc<Timeline> {
        let dir = self.recovery.dir.join(HISTORY_NAME);
        let timeline = Timeline::open(&dir, self.recovery.meta.id(), index_cache()).unwrap();
        let mark = AppliedFile::open(&self.recovery.dir.join(APPLIED_NAME), self.recovery.meta.id()).unwrap();
        let state = StreamState::from_slot(mark.slot());
        // Reads the open layer, as a start does; what it gives is only needed to append.
        drop(Recorder::open(timeline.clone(), &facts(&state), mark.slot().history.get(), state.height).unwrap());
        timeline
    }

    fn time(&self, random: &mut StdRng) -> u64 {
        random.random_range(self.first.1..=self.last.1)
    }
}

pub fn run(plan: &Plan, report: &mut Report) {
    let lengths: &[u32] = if plan.quick { &[4, 6] } else { &[4, 5, 6, 7] };
    for (name, volume) in [("1 GiB", GIB), ("1 TiB, sparse", TIB)] {
        for &exponent in lengths {
            let mut past = Past::new(volume, 10u64.pow(exponent));
            let what = format!("10^{exponent} records, {name}");
            let longest = lengths.last() == Some(&exponent);
            look_up(plan, report, &past, &what, longest);
            if longest || exponent == lengths[0] {
                usable(plan, report, &mut past, &what);
            }
        }
    }
    many_layers(plan, report);
    reading(plan, report);
}

/// A receiver that starts opens every group's history.
fn many_layers(plan: &Plan, report: &mut Report) {
    let past = Past::in_layers(GIB, 100_000, 10);
    let files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let (mut seconds, mut layers, mut held) = (Vec::new(), 0, 0);
    for _ in 0..plan.pairs(9, 3) {
        let (before, begun) = (files(), Instant::now());
        let timeline = past.open();
        seconds.push(begun.elapsed().as_secs_f64());
        (layers, held) = (timeline.sizes().layers, files() - before);
    }
    let detail = format!("{layers} closed layers of 10 records; {held} files held open by it");
    report.row("10^4 layers: the history opened at a start", "s", &seconds, Target::Max(3.0), &detail);
}

/// Without devices: the point is found and the plan made, with nothing of the history in memory; then the look-ups.
fn look_up(plan: &Plan, report: &mut Report, past: &Past, what: &str, judged: bool) {
    let mut random = StdRng::seed_from_u64(rand::random());
    let mut ready = Vec::new();
    for _ in 0..plan.pairs(15, 5) {
        let timeline = past.open();
        let at = PointSpec::Time(past.time(&mut random));
        let begun = Instant::now();
        let point = timeline.locate(&at, past.last.1).unwrap();
        let pin = timeline.pin(point.height).unwrap();
        let made = timeline.plan(point.height).unwrap();
        ready.push(begun.elapsed().as_secs_f64() * 1e3);
        drop((made, pin));
    }
    let target = Target::Max(20.0);
    let detail = format!("p50 {:.2} ms, {} openings, caches empty", median(&ready), ready.len());
    report.row(&format!("{what}: plan ready, worst"), "ms", &[percentile(&ready, 1.0)], target, &detail);

    let timeline = past.open();
    let sizes = timeline.sizes();
    let count = if plan.quick { 200 } else { 1000 };
    let (mut cold, mut warm, mut single) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..count {
        let height = point_of(past, &timeline, &mut random);
        let region = random.random_range(0..past.volume / REGION) * REGION;
        for samples in [&mut cold, &mut warm] {
            let begun = thread_cpu_time();
            let parts = timeline.resolve(0, region, REGION, height).unwrap();
            samples.push((thread_cpu_time() - begun).as_secs_f64() * 1e6 / (REGION / BLOCK) as f64);
            std::hint::black_box(parts);
        }
        let block = region + random.random_range(0..REGION / BLOCK) * BLOCK;
        let begun = thread_cpu_time();
        std::hint::black_box(timeline.resolve(0, block, BLOCK, height).unwrap());
        single.push((thread_cpu_time() - begun).as_secs_f64() * 1e6);
    }
    let mean = |samples: &[f64]| samples.iter().sum::<f64>() / samples.len() as f64;
    let index = format!("{} layers, {:.0} MB of index", sizes.layers, sizes.run_bytes as f64 / 1e6);
    let target = if judged { Target::Max(1.0) } else { Target::None };
    let detail = format!("mean of {count} regions of 256 blocks at random points; {index}");
    report.row(&format!("{what}: look-up, a block, CPU"), "µs", &[mean(&warm)], target, &detail);
    let detail = format!("in memory; one block alone {:.1} µs", mean(&single));
    report.row(&format!("{what}: the same, index on disk"), "µs", &[mean(&cold)], target, &detail);
}

fn point_of(past: &Past, timeline: &Timeline, random: &mut StdRng) -> u64 {
    timeline.locate(&PointSpec::Time(past.time(random)), past.last.1).unwrap().height
}

/// By the command line: until it has ended and the first block is read from the device.
fn usable(plan: &Plan, report: &mut Report, past: &mut Past, what: &str) {
    past.recovery.start();
    let mut random = StdRng::seed_from_u64(rand::random());
    let (mut opened, mut read) = (Vec::new(), Vec::new());
    let before = past.recovery.host.resident_bytes(Role::Receiver);
    let mut held = 0;
    for round in 0..if plan.quick { 10 } else { 100 } {
        let at = PointSpec::Time(past.time(&mut random)).to_string();
        let begun = Instant::now();
        let (view, took) = past.recovery.varve(&["view", "open", GROUP, "--at", &at]);
        let device = view["volumes"][0]["device"].as_str().unwrap_or_else(|| panic!("no device: {view}")).to_owned();
        let mut reader = Reader::new(Path::new(&device));
        reader.read(random.random_range(0..past.volume / BLOCK) * BLOCK);
        opened.push(begun.elapsed().as_secs_f64() * 1e3);
        read.push((begun.elapsed() - took).as_secs_f64() * 1e3);
        if round == 0 {
            held = past.recovery.host.resident_bytes(Role::Receiver).saturating_sub(before);
        }
        drop(reader);
        past.recovery.varve(&["view", "close", &view["id"].to_string()]);
    }
    let detail = format!(
        "p50 {:.0} ms, {} openings at random points; of it the first read {:.1} ms",
        median(&opened),
        opened.len(),
        median(&read)
    );
    report.row(&format!("{what}: device usable, p99"), "ms", &[percentile(&opened, 0.99)], Target::Max(150.0), &detail);
    let mib = held as f64 / MIB as f64;
    report.row(&format!("{what}: memory of an open view"), "MiB", &[mib], Target::None, "after the first read");
    past.recovery.host.stop(Role::Receiver);
}

/// Single reads past the page cache.
struct Reader {
    file: DirectFile,
    buffer: AlignedBuf,
}

impl Reader {
    fn new(path: &Path) -> Self {
        Reader { file: DirectFile::open_read(path).unwrap(), buffer: AlignedBuf::new(BLOCK as usize) }
    }

    fn read(&mut self, offset: u64) -> Duration {
        let begun = Instant::now();
        self.file.read_exact_at(&mut self.buffer, offset).unwrap();
        begun.elapsed()
    }
}

/// Points of the group that is read: what part of its blocks was written since.
const POINTS: [(&str, u64); 3] = [("half of the blocks replaced since", 50), ("a tenth", 10), ("none", 0)];

fn reading(plan: &Plan, report: &mut Report) {
    let bytes = if plan.quick { GIB / 4 } else { GIB };
    let mut recovery = Recovery::new(bytes);
    let (mut group, mut source) = (recovery.group(), Source::new());
    group.fill(&mut source, bytes);
    group.begin_history(&source);
    let blocks = bytes / BLOCK;
    let mut order: Vec<u32> = (0..blocks as u32).collect();
    order.shuffle(&mut source.random);
    let mut places = order.iter().map(|block| u64::from(*block) * BLOCK);
    for (number, (_, percent)) in POINTS.iter().enumerate() {
        bookmark(&group, &format!("point{number}"));
        let next = POINTS.get(number + 1).map_or(0, |next| next.1);
        let count = (percent - next) * blocks / 100;
        group.write(&mut source, BLOCK as usize, |_| places.next().unwrap(), |written| (count - written) as usize);
        group.finish(&source);
    }
    group.close();
    recovery.start();

    let resident = recovery.host.resident_bytes(Role::Receiver);
    let views: Vec<(String, String)> = (0..POINTS.len())
        .map(|number| {
            let (view, _) = recovery.varve(&["view", "open", GROUP, "--at", &format!("bookmark:point{number}")]);
            (view["id"].to_string(), view["volumes"][0]["device"].as_str().unwrap().to_owned())
        })
        .collect();
    for depth in [8, 1] {
        let (mut direct, mut through) = (Vec::new(), [const { Vec::new() }; POINTS.len()]);
        for _ in 0..plan.pairs(5, 2) {
            let rate = |path: &Path| {
                let job = fio(path).option("rw=read").option("bs=64k").depth(depth);
                job.run(recovery.host.scratch()).read_iops * 65536.0 / 1e6
            };
            direct.push(rate(recovery.replica()));
            for (rates, (_, device)) in through.iter_mut().zip(&views) {
                rates.push(rate(Path::new(device)));
            }
        }
        for (rates, (what, percent)) in through.iter().zip(POINTS) {
            let target = if depth == 8 && percent <= 10 { Target::Min(0.6) } else { Target::None };
            let detail = format!("{:.0} of {:.0} MB/s", median(rates), median(&direct));
            let what = format!("64 KiB in sequence, depth {depth}, {what} / the replica's file");
            report.row(&what, "x", &ratios(rates, &direct), target, &detail);
        }
    }
    let mut random = StdRng::seed_from_u64(rand::random());
    let count = if plan.quick { 500 } else { 2000 };
    let (mut direct, mut through) = (Vec::new(), [const { Vec::new() }; POINTS.len()]);
    for _ in 0..plan.pairs(5, 2) {
        let mut p50 = |path: &Path| {
            let mut reader = Reader::new(path);
            let mut read = || reader.read(random.random_range(0..blocks) * BLOCK).as_secs_f64() * 1e6;
            let times: Vec<f64> = (0..count).map(|_| read()).collect();
            median(&times)
        };
        direct.push(p50(recovery.replica()));
        for (times, (_, device)) in through.iter_mut().zip(&views) {
            times.push(p50(Path::new(device)));
        }
    }
    for (times, (what, _)) in through.iter().zip(POINTS) {
        let detail = format!("{:.0} of {:.0} µs, one at a time", median(times), median(&direct));
        let what = format!("4 KiB at random, p50, {what} / the replica's file");
        report.row(&what, "x", &ratios(times, &direct), Target::Max(2.0), &detail);
    }
    let now = recovery.host.resident_bytes(Role::Receiver).saturating_sub(resident) as f64;
    let each = now / MIB as f64 / views.len() as f64;
    let detail = format!("of {} views, all of them read over and over, readers and index cache included", views.len());
    report.row("memory of a view that is read", "MiB", &[each], Target::None, &detail);
    for (id, _) in &views {
        recovery.varve(&["view", "close", id]);
    }
}
