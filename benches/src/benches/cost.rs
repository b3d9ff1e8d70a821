//! What the programs cost inside the kernel, by its own statistics.

use std::collections::BTreeMap;
use std::path::Path;

use varve_bpf::Capture;
use varve_tests::{LoopDevice, MIB, Scratch};

use crate::plan::Plan;
use crate::pump::{Drain, Pump};
use crate::report::{Report, Target};
use crate::volume::{Volume, fio};

const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";
/// The program on `block_bio_queue`; those for requests are attached to rarer tracepoints.
const CAPTURE: &str = "capture";

/// The kernel counts while this lives.
struct Statistics {
    before: String,
}

impl Statistics {
    fn on() -> Self {
        let before = std::fs::read_to_string(SWITCH).expect("this kernel has no statistics of BPF programs");
        std::fs::write(SWITCH, "1").unwrap();
        Statistics { before }
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        let _ = std::fs::write(SWITCH, &self.before);
    }
}

/// How often each program ran, and for how long.
type Costs = BTreeMap<String, (u64, u64)>;

fn costs(capture: &Capture) -> Costs {
    capture.costs().unwrap().into_iter().map(|cost| (cost.name, (cost.run_count, cost.run_time_ns))).collect()
}

/// Runs, nanoseconds of one program's name, or of all.
fn sum(before: &Costs, after: &Costs, wanted: impl Fn(&str) -> bool) -> (u64, u64) {
    let names = after.keys().filter(|name| wanted(name));
    names.fold((0, 0), |sum, name| (sum.0 + after[name].0 - before[name].0, sum.1 + after[name].1 - before[name].1))
}

/// One program's cost, if it ran.
fn per_run((name, (runs, ns)): (&String, (u64, u64))) -> Option<String> {
    (runs > 0).then(|| format!("{name} {:.0} ns", ns as f64 / runs as f64))
}

pub fn run(plan: &Plan, report: &mut Report) {
    let volume = Volume::in_memory(256 * MIB);
    let other = Volume::in_memory(256 * MIB);
    let scratch = Scratch::memory();
    let probe = LoopDevice::new(&scratch, "probe", MIB);
    let pump = Pump::start(volume.path(), probe.path(), Drain::Release);
    pump.settle();
    let _statistics = Statistics::on();
    let load = |device: &Path, block: &str| {
        let time = plan.run(1.0, 0.3);
        let job = fio(device).block(block).option("ioengine=psync");
        job.option("time_based=1").option(&format!("runtime={}ms", time.as_millis())).run(&volume.scratch).writes
    };

    let rounds = plan.pairs(5, 2);
    // First what is not protected: others' writes on this machine cost the same, and are taken off below.
    let (mut capture_ns, mut all_ns, mut each) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let before = costs(pump.capture());
        let writes = load(other.path(), "4k");
        let after = costs(pump.capture());
        let (runs, ns) = sum(&before, &after, |name| name == CAPTURE);
        assert!(runs >= writes, "{writes} writes, but the capture program ran {runs} times");
        capture_ns.push(ns as f64 / runs as f64);
        all_ns.push(sum(&before, &after, |_| true).1 as f64 / runs as f64);
        each =
            after.keys().map(|name| (name, sum(&before, &after, |other| other == name))).filter_map(per_run).collect();
    }
    report.row("a write to a device that is not protected", "ns", &capture_ns, Target::Max(70.0), "at submission");
    report.row("the same, completion included", "ns", &all_ns, Target::None, &each.join(", "));
    let foreign = [&capture_ns, &all_ns].map(|samples| crate::statistics::median(samples));

    let blocks = [
        ("512 B", "512", None),
        ("4 KiB", "4k", Some(1000.0)),
        ("16 KiB", "16k", None),
        ("64 KiB", "64k", None),
        ("1 MiB", "1m", None),
    ];
    let mut lost = 0;
    for (what, block, most) in blocks {
        let (mut capture_ns, mut all_ns) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let (before, records) = (costs(pump.capture()), pump.counters());
            load(volume.path(), block);
            let (after, now) = (costs(pump.capture()), pump.counters());
            lost += now.dropped_records - records.dropped_records;
            let records = now.captured_records - records.captured_records;
            let (runs, ns) = sum(&before, &after, |name| name == CAPTURE);
            let others = runs.saturating_sub(records) as f64;
            let all = sum(&before, &after, |_| true).1 as f64;
            capture_ns.push((ns as f64 - others * foreign[0]) / records as f64);
            all_ns.push((all - others * foreign[1]) / records as f64);
        }
        let target = most.map_or(Target::None, Target::Max);
        report.row(&format!("a write of {what}"), "ns", &capture_ns, target, "at submission, copy included");
        report.row(&format!("{what}, completion included"), "ns", &all_ns, Target::None, "all programs");
    }
    if lost > 0 {
        report.note(&format!("{lost} records found the ring full: others held up the thread that empties it."));
    }
    report
        .note("The kernel's own measuring is in these figures (two readings of the clock for each run of a program).");
}
