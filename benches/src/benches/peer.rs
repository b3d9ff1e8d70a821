//! Varve beside `qemu-storage-daemon`, the one peer that copies every write and needs no kernel module.
//!
//! The peer's device is a loop device over a file that the daemon serves: nothing else can be mirrored by it. Varve
//! protects a device of exactly that kind here (the daemon without a mirror), and beside that a plain one, which is what
//! it is for.

use std::path::Path;
use std::time::{Duration, Instant};

use varve_tests::{MIB, Pair, compare_devices};

use super::GROUP;
use crate::pacer;
use crate::plan::Plan;
use crate::qemu::{self, Device, Mode, Way};
use crate::report::{Report, Target};
use crate::statistics::{median, ratios};
use crate::status::Agent;
use crate::volume::{Volume, fill, fio};

const BYTES: u64 = 256 * MIB;
const LIMIT: Duration = Duration::from_secs(120);

/// Over TCP its client holds packets back (it corks) as soon as two writes are under way; so also the other way.
const MIRRORS: [(&str, Mode, Way); 3] = [
    ("mirror, write-blocking, over TCP", Mode::WriteBlocking, Way::Tcp),
    ("mirror, write-blocking, over a Unix socket", Mode::WriteBlocking, Way::Unix),
    ("mirror, background, over a Unix socket", Mode::Background, Way::Unix),
];

/// What one of the contestants reached, one value a round.
#[derive(Default)]
struct Reached {
    /// Writes a second as the writer sees it.
    writer: Vec<f64>,
    /// Writes a second until the last one is in the replica.
    replicated: Vec<f64>,
}

impl Reached {
    fn round(&mut self, device: &Path, volume: &Volume, time: Duration, caught_up: impl FnOnce()) {
        let job = fio(device).depth(32).seconds(time.as_secs());
        let result = job.run(&volume.scratch);
        let ended = Instant::now();
        caught_up();
        self.writer.push(result.write_iops);
        let seconds = result.writes as f64 / result.write_iops;
        self.replicated.push(result.writes as f64 / (seconds + ended.elapsed().as_secs_f64()));
    }
}

pub fn run(plan: &Plan, report: &mut Report) {
    if !qemu::is_there() {
        report.wrong("qemu-storage-daemon is not installed (Debian: qemu-system-common)");
        return;
    }
    let prefill = |image: &Path| fill(&std::fs::File::options().write(true).open(image).unwrap(), BYTES, |_| true);
    let mut mirrors = MIRRORS.map(|(_, mode, way)| {
        let mut device = Device::new(BYTES, prefill);
        device.mirror(mode, way);
        device
    });
    let protected = Device::new(BYTES, prefill);
    let plain = Volume::in_memory(BYTES);
    let pair = Pair::new();
    let [same, own] = ["same", GROUP].map(|group| {
        let device = if group == "same" { protected.path() } else { plain.path() };
        let replicas = pair.protect(group, &[device]);
        pair.wait_protected(group, LIMIT);
        (Agent::connect(pair.production.root(), group), replicas[0].clone())
    });
    let (mut same, mut own) = (same, own);
    let bare = Device::new(BYTES, prefill);

    let time = plan.run(5.0, 2.0).max(Duration::from_secs(1));
    let (mut without, mut varve, mut plainly) = (Reached::default(), Reached::default(), Reached::default());
    let mut mirrored: [Reached; 3] = Default::default();
    for _ in 0..plan.pairs(3, 1) {
        without.round(bare.path(), &plain, time, || ());
        for (reached, device) in mirrored.iter_mut().zip(&mut mirrors) {
            let path = device.path().to_owned();
            reached.round(&path, &plain, time, || device.wait_equal(LIMIT));
        }
        varve.round(protected.path(), &plain, time, || quiet(&pair, "same", &mut same.0));
        own_device(&mut plainly, &plain, time, &pair, &mut own.0);
    }

    let mut row = |name: &str, reached: &Reached| {
        let detail = format!("the writer saw {:.0}/s", median(&reached.writer));
        report.row(&format!("replicated: {name}"), "/s", &reached.replicated, Target::None, &detail);
    };
    for ((name, ..), reached) in MIRRORS.iter().zip(&mirrored) {
        row(name, reached);
    }
    row("Varve, the same kind of device", &varve);
    row("Varve, a plain loop device", &plainly);
    for ((name, ..), reached) in MIRRORS.iter().zip(&mirrored) {
        let same = ratios(&varve.replicated, &reached.replicated);
        report.row(&format!("Varve, the same kind of device / {name}"), "x", &same, Target::None, "");
        let own = ratios(&plainly.replicated, &reached.replicated);
        report.row(&format!("Varve, a plain device / {name}"), "x", &own, Target::None, "");
    }
    let names = MIRRORS.iter().map(|(name, ..)| *name).chain(["Varve"]);
    for (name, reached) in names.zip(mirrored.iter().chain([&varve])) {
        let left = ratios(&reached.writer, &without.writer);
        let detail = format!("{:.0} of {:.0} IOPS", median(&reached.writer), median(&without.writer));
        report.row(&format!("what the writer keeps: {name}"), "x", &left, Target::None, &detail);
    }

    let mut sides: Vec<_> = Vec::new();
    for ((name, ..), device) in MIRRORS.iter().zip(&mut mirrors) {
        sides.push((*name, device.image().to_owned(), device.end_mirror()));
    }
    sides.push(("Varve, the same kind of device", protected.image().to_owned(), same.1));
    sides.push(("Varve, a plain loop device", plain.path().to_owned(), own.1));
    for (name, volume, replica) in sides {
        match compare_devices(&volume, &replica) {
            Ok(()) => report.note(&format!("Equal, bit for bit: {name}.")),
            Err(difference) => report.wrong(&format!("{name}: {difference}")),
        }
    }
}

/// Until the group is protected and all of it applied.
fn quiet(pair: &Pair, group: &str, agent: &mut Agent) {
    varve_tests::wait_until(LIMIT, "the group is protected", || agent.group().data == "protected");
    pair.wait_applied(group, LIMIT);
}

/// A plain device is faster than two cores can replicate: the writer is held up at a half full ring.
fn own_device(reached: &mut Reached, volume: &Volume, time: Duration, pair: &Pair, agent: &mut Agent) {
    let (bytes, took) = pacer::as_fast_as_it_holds(volume, pacer::SMALL, time, agent);
    let ended = Instant::now();
    quiet(pair, GROUP, agent);
    let writes = bytes as f64 / 4096.0;
    reached.writer.push(writes / took.as_secs_f64());
    reached.replicated.push(writes / (took + ended.elapsed()).as_secs_f64());
}
