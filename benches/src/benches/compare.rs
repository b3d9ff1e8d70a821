//! A comparison of a whole volume by digests, as after a crash of the host, beside the plain reading of the volume.
//!
//! The comparison is a real one: capture is taken away (as a boot does), a hundredth of the volume is changed unseen, and a
//! new agent must find it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::RngCore;
use varve_tests::{GIB, LoopDevice, LoopOptions, Pair, Role, Scratch, compare_devices};

use super::GROUP;
use crate::machine::Usage;
use crate::plan::Plan;
use crate::report::{FINE, Report, Target};
use crate::statistics;
use crate::status::Agent;
use crate::volume::{fill, fio};

const LIMIT: Duration = Duration::from_secs(300);
/// What a digest is of.
const BLOCK: u64 = 64 << 10;
/// One block of so many is changed.
const EVERY: u64 = 100;

pub fn run(plan: &Plan, report: &mut Report) {
    let scratch = Scratch::disk();
    let bytes = if plan.quick { GIB } else { 4 * GIB };
    let path = scratch.file("volume", bytes);
    let file = File::options().write(true).open(&path).unwrap();
    fill(&file, bytes, |_| true);
    file.sync_all().unwrap();
    let device = LoopDevice::over(&path, LoopOptions { direct_io: true, ..LoopOptions::default() });
    let (memory, disk) = (Scratch::memory(), Scratch::disk());
    // A device: to ask a file in memory for its holes takes longer than to read it.
    let other = LoopDevice::new(&memory, "replica", bytes);
    measure(plan, report, &scratch, &device, bytes, (other.path().to_owned(), false));
    measure(plan, report, &scratch, &device, bytes, (disk.join("replica.img"), true));
}

/// With the replica in memory the volume's disk is what there is to wait for, as it is between two hosts; with both on one disk
/// both are read from there.
fn measure(
    plan: &Plan,
    report: &mut Report,
    scratch: &Scratch,
    device: &LoopDevice,
    bytes: u64,
    (replica, same_disk): (PathBuf, bool),
) {
    let mut pair = Pair::new();
    let replicas = pair.protect_onto(GROUP, &[device.path()], vec![replica]);
    pair.wait_protected(GROUP, LIMIT);
    pair.wait_applied(GROUP, LIMIT);

    let mb = bytes as f64 / 1e6;
    let (mut reads, mut both, mut rates, mut wires, mut used) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), String::new());
    for _ in 0..plan.pairs(5, 2) {
        reads.push(mb / read_all(&[device.path()], scratch).as_secs_f64());
        if same_disk {
            both.push(mb / read_all(&[device.path(), &replicas[0]], scratch).as_secs_f64());
        }
        let outcome = compare(&mut pair, device.path(), bytes);
        rates.push(mb / outcome.seconds);
        wires.push(outcome.sent as f64 / (outcome.differs as f64 * 1.01 + bytes as f64 * 0.001));
        used = outcome.used;
    }
    let with = if same_disk { "replica on the same disk" } else { "replica in memory" };
    report.row(&format!("O_DIRECT read of the volume, {with}"), "MB/s", &reads, Target::None, "1 MiB, depth 4");
    let detail = format!("1 % of it differs, in blocks of 64 KiB; {used}");
    report.row(&format!("comparison, {with}"), "MB/s", &rates, Target::None, &detail);
    let ratio = statistics::ratios(&rates, &reads);
    if same_disk {
        let detail = "at once, as both lie on this disk: no comparison can be faster here";
        report.row("reading volume and replica", "MB/s", &both, Target::None, detail);
        report.row("comparison / reading the volume, same disk", "x", &ratio, Target::None, "");
        let detail = "what the one disk that holds both ends allows";
        report.row("comparison / reading both", "x", &statistics::ratios(&rates, &both), Target::None, detail);
    } else {
        report.row("comparison / reading the volume", "x", &ratio, Target::Min(0.8), "");
    }
    let detail = "everything on the loopback device, both ways, against 1.01 × what differs + 0.1 % of the volume";
    report.row(&format!("bytes on the wire / what is allowed, {with}"), FINE, &wires, Target::Max(1.0), detail);
    pair.wait_applied(GROUP, LIMIT);
    match compare_devices(device.path(), &replicas[0]) {
        Ok(()) => report.note("Volume and replica are equal, bit for bit."),
        Err(difference) => report.wrong(&format!("volume and replica differ: {difference}")),
    }
}

/// The time to read all of these, at once.
fn read_all(paths: &[&Path], scratch: &Scratch) -> Duration {
    let begun = Instant::now();
    let job = |path: &&Path| fio(path).option("rw=read").option("bs=1m").option("iodepth=4").start(scratch);
    let runs: Vec<_> = paths.iter().map(job).collect();
    for run in runs {
        run.finish();
    }
    begun.elapsed()
}

struct Outcome {
    seconds: f64,
    /// Bytes that left the agent for the receiver.
    sent: u64,
    differs: u64,
    used: String,
}

/// A new agent, with nothing pinned, over a volume that changed a little.
fn compare(pair: &mut Pair, device: &Path, bytes: u64) -> Outcome {
    pair.production.stop(Role::Agent);
    varve_tests::run(pair.production.command(Role::Agent).arg("--unpin-all")).ok();
    let file = File::options().write(true).open(device).unwrap();
    let mut block = vec![0; BLOCK as usize];
    let (mut random, mut differs) = (rand::rng(), 0);
    for number in (0..bytes / BLOCK).step_by(EVERY as usize) {
        random.fill_bytes(&mut block);
        file.write_all_at(&block, number * BLOCK).unwrap();
        differs += BLOCK;
    }
    file.sync_all().unwrap();
    drop(file);
    let receiver_before = pair.recovery.cpu_time(Role::Receiver);
    let (usage, loopback) = (Usage::now(), Loopback::now());
    pair.production.start(Role::Agent);
    let begun = Instant::now();
    let mut agent = Agent::connect(pair.production.root(), GROUP);
    let mut group = agent.group();
    while group.data != "protected" {
        assert!(begun.elapsed() < LIMIT, "no end after {:?}: {group:?}", begun.elapsed());
        std::thread::sleep(Duration::from_millis(5));
        group = agent.group();
    }
    let seconds = begun.elapsed().as_secs_f64();
    let cpu = [pair.production.cpu_time(Role::Agent), pair.recovery.cpu_time(Role::Receiver) - receiver_before];
    let used = format!(
        "in the last {seconds:.1} s, CPU of agent {:.1} s, of receiver {:.1} s, machine {:.0} % busy, both ways {:.1} MB over loopback; {:.1} MB of images in {} probes",
        cpu[0].as_secs_f64(),
        cpu[1].as_secs_f64(),
        usage.busy_percent(),
        loopback.since() as f64 / 1e6,
        group.counter("image_bytes") as f64 / 1e6,
        group.counter("probes"),
    );
    Outcome { seconds, sent: loopback.since(), differs, used }
}

/// What went over the loopback device, headers and answers included.
struct Loopback(u64);

impl Loopback {
    fn now() -> Self {
        let text = std::fs::read_to_string("/sys/class/net/lo/statistics/tx_bytes").unwrap();
        Loopback(text.trim().parse().unwrap())
    }

    fn since(&self) -> u64 {
        Loopback::now().0 - self.0
    }
}
