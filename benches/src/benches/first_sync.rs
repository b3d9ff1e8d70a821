//! First sync from disk to disk, beside what the device and the transport could do at best.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use varve_tests::{GIB, LoopDevice, LoopOptions, MIB, Pair, Role, Scratch, compare_devices};

use super::GROUP;
use crate::machine::Usage;
use crate::plan::Plan;
use crate::report::{Report, Target};
use crate::statistics::{self, median};
use crate::status::Agent;
use crate::volume::{fill, fio};

/// Data and holes take turns in stretches of this many MiB.
const STRETCH_MIB: u64 = 64;

pub fn run(plan: &Plan, report: &mut Report) {
    let scratch = Scratch::disk();
    let mut bytes = if plan.quick { GIB } else { 4 * GIB };
    // Half of it twice, and as much again for the log and for others.
    let free = nix::sys::statvfs::statvfs(scratch.path()).unwrap();
    let free = free.blocks_available() * free.fragment_size();
    if free < 2 * bytes {
        bytes = (free / 2 / MIB * MIB).max(256 * MIB);
        report.note(&format!("Only {} MiB are free on the disk: the volume has {} MiB.", free / MIB, bytes / MIB));
    }
    let path = scratch.file("volume", bytes);
    let file = File::options().write(true).open(&path).unwrap();
    fill(&file, bytes, |mib| (mib / STRETCH_MIB).is_multiple_of(2));
    file.sync_all().unwrap();
    let device = LoopDevice::over(&path, LoopOptions { direct_io: true, ..LoopOptions::default() });

    let (memory, disk) = (Scratch::memory(), Scratch::disk());
    let mb = bytes as f64 / 1e6;
    let (mut apart, mut apart_ratios, mut apart_used) = (Vec::new(), Vec::new(), String::new());
    let (mut reads, mut quinn, mut syncs, mut strict) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut both = Vec::new();
    let (mut ratios, mut used) = (Vec::new(), String::new());
    let rounds = plan.pairs(5, 2);
    for round in 0..rounds {
        let read = read_rate(device.path(), &scratch);
        both.push(mb / read_and_write(device.path(), bytes / 2, &scratch).as_secs_f64());
        let wire = quinn_rate(plan);
        let last = round + 1 == rounds;
        // A device: to ask a file in memory for its holes takes longer than to read it.
        let other = LoopDevice::new(&memory, &format!("replica-{round}"), bytes);
        let with_memory = sync(report, device.path(), other.path().to_owned(), last);
        drop(other);
        apart.push(mb / with_memory.took.as_secs_f64());
        apart_ratios.push(mb / with_memory.took.as_secs_f64() / read.min(wire));
        apart_used = with_memory.used();
        let file = disk.join("replica.img");
        let with_disk = sync(report, device.path(), file.clone(), last);
        std::fs::remove_file(file).unwrap();
        used = with_disk.used();
        let took = with_disk.took.as_secs_f64();
        let rate = mb / took;
        ratios.push(rate / read.min(wire));
        // Only half of the volume goes over the wire: the best possible time.
        strict.push((mb / read).max(mb / 2.0 / wire) / took);
        reads.push(read);
        quinn.push(wire);
        syncs.push(rate);
    }
    report.row("O_DIRECT read of the device", "MB/s", &reads, Target::None, "1 MiB, depth 4, holes included");
    let detail = "1 MiB, depth 4 each; at once, as both ends lie on this disk: no first sync can be faster here";
    report.row("reading all of it and writing half", "MB/s", &both, Target::None, detail);
    report.row("quinn alone over loopback", "MB/s", &quinn, Target::None, "same settings, TLS");
    let detail = format!("{:.1} GiB of volume, from 'protect' to 'protected'; {used}", bytes as f64 / GIB as f64);
    report.row("first sync, replica on the same disk", "MB/s", &syncs, Target::None, &detail);
    report.row("first sync, replica in memory", "MB/s", &apart, Target::None, &apart_used);
    let slower = if median(&reads) < median(&quinn) { "the device" } else { "quinn" };
    let detail = format!("{slower} is the slower one; the replica is a file of the same disk, which has to do both");
    report.row("first sync / the slower of device and quinn", "x", &ratios, Target::Min(0.7), &detail);
    let detail =
        "a device, so all of it is read and compared first; a loop device over tmpfs takes its share of the processors";
    report.row("the same, replica in memory", "x", &apart_ratios, Target::Min(0.7), detail);
    let detail = "of the volume's bytes, as the one disk that holds both ends allows";
    report.row(
        "first sync / reading all and writing half",
        "x",
        &statistics::ratios(&syncs, &both),
        Target::None,
        detail,
    );
    let detail = "holes cost no time on the wire: (slower of reading all and sending half) / time";
    report.row("replica on the same disk, against the best possible time", "x", &strict, Target::None, detail);
}

fn read_rate(device: &Path, scratch: &Scratch) -> f64 {
    let job = fio(device).option("rw=read").option("bs=1m").option("iodepth=4");
    let result = job.run(scratch);
    result.read_iops * MIB as f64 / 1e6
}

/// The time to read the device and to write so many bytes to a fresh file of the same disk, at once.
fn read_and_write(device: &Path, bytes: u64, scratch: &Scratch) -> Duration {
    let target = scratch.file("written", bytes);
    let begun = Instant::now();
    let job = |path: &Path, rw: &str| fio(path).option(rw).option("bs=1m").option("iodepth=4").option("fallocate=none");
    let runs = [job(device, "rw=read"), job(&target, "rw=write").option("end_fsync=1")].map(|job| job.start(scratch));
    for run in runs {
        run.finish();
    }
    let took = begun.elapsed();
    std::fs::remove_file(target).unwrap();
    took
}

/// MB/s of the transport without Varve on top.
fn quinn_rate(plan: &Plan) -> f64 {
    let program = std::env::current_exe().unwrap().with_file_name("varve-bench-quinn");
    assert!(program.exists(), "{} is missing: cargo build --release -p varve-bench --bins", program.display());
    let seconds = plan.run(2.0, 1.0).as_secs().clamp(1, 5).to_string();
    let out = varve_tests::run(Command::new(program).args(["--json", "--seconds", &seconds])).ok();
    out.json()["mb_per_s"].as_f64().unwrap()
}

/// What a first sync took.
struct Sync {
    took: Duration,
    /// CPU time of the agent.
    agent: Duration,
    /// CPU time of the receiver.
    receiver: Duration,
    busy_percent: f64,
}

impl Sync {
    fn used(&self) -> String {
        let [took, agent, receiver] = [self.took, self.agent, self.receiver].map(|time| time.as_secs_f64());
        let busy = self.busy_percent;
        format!(
            "in the last {took:.1} s, CPU of agent {agent:.1} s, of receiver {receiver:.1} s, machine {busy:.0} % busy"
        )
    }
}

/// One on a fresh pair.
fn sync(report: &mut Report, device: &Path, replica: PathBuf, compare: bool) -> Sync {
    let pair = Pair::new();
    let cpu = || (pair.production.cpu_time(Role::Agent), pair.recovery.cpu_time(Role::Receiver));
    let (cpu_before, usage) = (cpu(), Usage::now());
    let begun = Instant::now();
    let replicas = pair.protect_onto(GROUP, &[device], vec![replica]);
    let mut agent = Agent::connect(pair.production.root(), GROUP);
    loop {
        let group = agent.group();
        if group.data == "protected" {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(300), "no first sync after {:?}: {group:?}", begun.elapsed());
        std::thread::sleep(Duration::from_millis(10));
    }
    let (took, busy_percent, cpu_after) = (begun.elapsed(), usage.busy_percent(), cpu());
    if compare {
        pair.wait_applied(GROUP, Duration::from_secs(60));
        match compare_devices(device, &replicas[0]) {
            Ok(()) => report.note("Volume and replica are equal, bit for bit."),
            Err(difference) => report.wrong(&format!("volume and replica differ: {difference}")),
        }
    }
    let (agent, receiver) = (cpu_after.0 - cpu_before.0, cpu_after.1 - cpu_before.1);
    Sync { took, agent, receiver, busy_percent }
}
