//! The whole path on one machine: fio, agent, TLS, receiver, replica on the disk.
//!
//! First the fastest rate that holds: the writer runs at full speed and is stopped whenever the ring is half full. Then
//! a steady rate somewhat below that for a minute, in which no region may get dirty.

use std::path::Path;
use std::time::{Duration, Instant};

use varve_tests::{GIB, MIB, Pair, Role, compare_devices};

use super::GROUP;
use crate::machine::Usage;
use crate::pacer::{self, Load, Pace};
use crate::plan::Plan;
use crate::process::Memory;
use crate::report::{Report, Target};
use crate::status::{Agent, Group};
use crate::volume::Volume;

/// Of the fastest rate that holds: the steady ones that are tried, best first.
const SHARES: [f64; 7] = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.35];
pub const LIMIT: Duration = Duration::from_secs(120);

struct Aim {
    load: Load,
    block_bytes: f64,
    /// Wanted, bytes a second.
    bytes_per_s: f64,
    /// For people: how a rate is shown.
    unit: &'static str,
    unit_bytes: f64,
    /// Most CPU of the receiver, ms for 10^6 bytes.
    receiver_ms: f64,
}

pub fn small(plan: &Plan, report: &mut Report) {
    let load = pacer::SMALL;
    let (block_bytes, bytes_per_s) = (4096.0, 50_000.0 * 4096.0);
    measure(plan, report, &Aim { load, block_bytes, bytes_per_s, unit: "/s", unit_bytes: 4096.0, receiver_ms: 2.5 });
}

pub fn large(plan: &Plan, report: &mut Report) {
    let load = Load { block: "256k", depth: 8 };
    let (block_bytes, bytes_per_s) = (256.0 * 1024.0, 300e6);
    measure(plan, report, &Aim { load, block_bytes, bytes_per_s, unit: "MB/s", unit_bytes: 1e6, receiver_ms: 1.1 });
}

fn measure(plan: &Plan, report: &mut Report, aim: &Aim) {
    let volume = Volume::in_memory(if plan.quick { 256 * MIB } else { GIB });
    let (bytes, took) = pacer::run(&volume, aim.load, plan.run(3.0, 1.0).min(Duration::from_secs(3)), |_| Pace::Free);
    let alone = bytes as f64 / took.as_secs_f64();
    report.row("fio alone", aim.unit, &[alone / aim.unit_bytes], Target::None, "no Varve on the machine");

    let pair = Pair::new();
    let replicas = pair.protect(GROUP, &[volume.path()]);
    pair.wait_protected(GROUP, LIMIT);
    let mut agent = Agent::connect(pair.production.root(), GROUP);

    let time = plan.run(10.0, 3.0).min(Duration::from_secs(20));
    let (bytes, took) = pacer::as_fast_as_it_holds(&volume, aim.load, time, &mut agent);
    let fastest = bytes as f64 / took.as_secs_f64();
    report.row(
        "as fast as it goes",
        aim.unit,
        &[fastest / aim.unit_bytes],
        Target::None,
        "writer held up when the ring is half full",
    );
    for share in SHARES {
        wait_quiet(&pair, &mut agent);
        // If the target is within reach, it is what is tried.
        let rate = if share == SHARES[0] && fastest >= aim.bytes_per_s {
            (fastest * share).max(aim.bytes_per_s)
        } else {
            fastest * share
        };
        let run = steady(plan, &volume, aim, &pair, rate, &mut agent);
        if run.is_clean() {
            run.report(report, aim);
            break;
        }
        let changed: Vec<String> = run.before.troubles().iter().zip(run.after.troubles()).filter_map(rise).collect();
        report.note(&format!(
            "{:.0} % of the fastest rate did not hold: {:.0} {} for {:.0} s; {}; {} MB sent as images; gaps: {}.",
            share * 100.0,
            run.rate() / aim.unit_bytes,
            aim.unit,
            run.took.as_secs_f64(),
            changed.join(", "),
            (run.after.counter("image_bytes") - run.before.counter("image_bytes")) / 1_000_000,
            run.after.gaps(run.after.counter("gaps") - run.before.counter("gaps")).join(", "),
        ));
    }
    let begun = Instant::now();
    wait_quiet(&pair, &mut agent);
    report.note(&format!("Everything was applied {:.1} s after the last write.", begun.elapsed().as_secs_f64()));
    check_end(report, &pair, volume.path(), &replicas[0]);
}

fn rise(((name, before), (_, after)): (&(&str, u64), (&str, u64))) -> Option<String> {
    (after != *before).then(|| format!("{name} +{}", after - before))
}

/// Volume and replica are equal, and the logs hold nothing that a reader should know.
pub fn check_end(report: &mut Report, pair: &Pair, volume: &Path, replica: &Path) {
    match compare_devices(volume, replica) {
        Ok(()) => report.note("Volume and replica are equal, bit for bit."),
        Err(difference) => report.wrong(&format!("volume and replica differ: {difference}")),
    }
    for (installation, role) in [(&pair.production, Role::Agent), (&pair.recovery, Role::Receiver)] {
        for line in installation.unexpected(role, &["a gap begins: the ring was full"]).iter().take(5) {
            report.note(&format!("In a log: `{line}`"));
        }
    }
}

/// Waits until the group is protected and everything is in the replica.
pub fn wait_quiet(pair: &Pair, agent: &mut Agent) {
    let begun = Instant::now();
    while agent.group().data != "protected" {
        let status = || serde_json::to_string(&pair.production.group(GROUP)).unwrap();
        assert!(begun.elapsed() < LIMIT, "not protected again after {LIMIT:?}: {}", status());
        std::thread::sleep(Duration::from_millis(10));
    }
    pair.wait_applied(GROUP, LIMIT);
}

/// What happened during a steady run.
struct Steady {
    bytes: u64,
    took: Duration,
    before: Group,
    after: Group,
    ring_most: f64,
    memory_most: Memory,
    agent_cpu: Duration,
    receiver_cpu: Duration,
    busy_percent: f64,
}

fn steady(plan: &Plan, volume: &Volume, aim: &Aim, pair: &Pair, rate: f64, agent: &mut Agent) -> Steady {
    let (production, recovery) = (&pair.production, &pair.recovery);
    let cpu = || (production.cpu_time(Role::Agent), recovery.cpu_time(Role::Receiver));
    let before = agent.group();
    let (cpu_before, usage) = (cpu(), Usage::now());
    let (mut ring_most, mut memory_most, mut next) = (0f64, Memory::default(), Duration::ZERO);
    let (bytes, took) = pacer::run(volume, aim.load, plan.run(60.0, 5.0), |at| {
        if at >= next {
            let group = agent.group();
            ring_most = ring_most.max(group.ring_used as f64 / group.ring_bytes as f64);
            let memory = Memory::of(production.pid(Role::Agent));
            if memory.beside > memory_most.beside {
                memory_most = memory;
            }
            next = at + Duration::from_millis(250);
        }
        Pace::Rate(rate)
    });
    let (cpu_after, busy_percent) = (cpu(), usage.busy_percent());
    // What was written last may overflow yet.
    std::thread::sleep(Duration::from_millis(200));
    let after = agent.group();
    let (agent_cpu, receiver_cpu) = (cpu_after.0 - cpu_before.0, cpu_after.1 - cpu_before.1);
    Steady { bytes, took, before, after, ring_most, memory_most, agent_cpu, receiver_cpu, busy_percent }
}

impl Steady {
    fn rate(&self) -> f64 {
        self.bytes as f64 / self.took.as_secs_f64()
    }

    /// No region got dirty, none was sent again.
    fn is_clean(&self) -> bool {
        self.before.troubles() == self.after.troubles()
            && self.before.counter("image_bytes") == self.after.counter("image_bytes")
            && self.after.data == "protected"
    }

    fn report(&self, report: &mut Report, aim: &Aim) {
        let seconds = self.took.as_secs_f64();
        let detail = format!(
            "{seconds:.0} s, no dirty region, ring at most {:.0} % full, {:.0} MB/s, machine {:.0} % busy",
            100.0 * self.ring_most,
            self.rate() / 1e6,
            self.busy_percent
        );
        let wanted = Target::Min(aim.bytes_per_s / aim.unit_bytes);
        report.row("sustained", aim.unit, &[self.rate() / aim.unit_bytes], wanted, &detail);
        let per_mb = |cpu: Duration| cpu.as_secs_f64() * 1e3 / (self.bytes as f64 / 1e6);
        let wire = (self.after.counter("wire_bytes") - self.before.counter("wire_bytes")) as f64 / self.bytes as f64;
        let writes = self.bytes as f64 / aim.block_bytes;
        let each = |cpu: Duration| format!("{:.1} µs a write", cpu.as_secs_f64() * 1e6 / writes);
        let detail = format!("{}, {wire:.2} bytes on the wire for each", each(self.agent_cpu));
        report.row("CPU of the agent for 10^6 bytes", "ms", &[per_mb(self.agent_cpu)], Target::Max(1.3), &detail);
        let most = Target::Max(aim.receiver_ms);
        report.row(
            "CPU of the receiver for 10^6 bytes",
            "ms",
            &[per_mb(self.receiver_cpu)],
            most,
            &each(self.receiver_cpu),
        );
        let mib = |bytes: u64| bytes as f64 / MIB as f64;
        let (files, rings) = (mib(self.memory_most.files), mib(self.memory_most.rings));
        let detail =
            format!("{files:.1} MiB of it program text; and {rings:.0} MiB of mapped ring, which is mapped twice");
        let beside = [mib(self.memory_most.beside)];
        report.row("memory of the agent beside the ring, most", "MiB", &beside, Target::Max(64.0), &detail);
    }
}
