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
use crate::qemu::{self, Device};
use crate::report::{Report, Target};
use crate::statistics::{median, ratios};
use crate::status::Agent;
use crate::volume::{Volume, fill, fio};

const BYTES: u64 = 256 * MIB;
const LIMIT: Duration = Duration::from_secs(120);

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
    let mut devices = [(); 3].map(|()| Device::new(BYTES, prefill));
    devices[0].mirror("write-blocking");
    devices[1].mirror("background");
    let plain = Volume::in_memory(BYTES);
    let pair = Pair::new();
    let [same, own] = ["same", GROUP].map(|group| {
        let device = if group == "same" { devices[2].path() } else { plain.path() };
        let replicas = pair.protect(group, &[device]);
        pair.wait_protected(group, LIMIT);
        (Agent::connect(pair.production.root(), group), replicas[0].clone())
    });
    let (mut same, mut own) = (same, own);
    let bare = Device::new(BYTES, prefill);

    let time = plan.run(5.0, 2.0).max(Duration::from_secs(1));
    let mut reached: [Reached; 5] = Default::default();
    for _ in 0..plan.pairs(3, 1) {
        reached[0].round(bare.path(), &plain, time, || ());
        reached[1].round(devices[0].path().to_owned().as_path(), &plain, time, || devices[0].wait_equal(LIMIT));
        reached[2].round(devices[1].path().to_owned().as_path(), &plain, time, || devices[1].wait_equal(LIMIT));
        reached[3].round(devices[2].path(), &plain, time, || quiet(&pair, "same", &mut same.0));
        own_device(&mut reached[4], &plain, time, &pair, &mut own.0);
    }

    let names = [
        "without replication",
        "mirror, write-blocking",
        "mirror, background",
        "Varve",
        "Varve on a plain loop device",
    ];
    for (name, reached) in names.iter().zip(&reached) {
        let detail = format!("the writer saw {:.0}/s", median(&reached.writer));
        report.row(&format!("4 KiB writes, {name}"), "/s", &reached.replicated, Target::None, &detail);
    }
    for (what, at) in [("same device", 3), ("each on what it is for", 4)] {
        let detail = "replicated writes";
        let ratio = |of: usize| ratios(&reached[at].replicated, &reached[of].replicated);
        report.row(&format!("Varve / write-blocking mirror, {what}"), "x", &ratio(1), Target::None, detail);
        report.row(&format!("Varve / background mirror, {what}"), "x", &ratio(2), Target::None, detail);
    }
    for (name, at) in [("write-blocking mirror", 1), ("background mirror", 2), ("Varve", 3)] {
        let left = ratios(&reached[at].writer, &reached[0].writer);
        report.row(
            &format!("what the writer keeps: {name}"),
            "x",
            &left,
            Target::None,
            "of the same device without replication",
        );
    }

    let sides = [
        ("the write-blocking mirror", devices[0].image().to_owned(), devices[0].end_mirror()),
        ("the background mirror", devices[1].image().to_owned(), devices[1].end_mirror()),
        ("Varve's replica (same device)", devices[2].image().to_owned(), same.1),
        ("Varve's replica (plain device)", plain.path().to_owned(), own.1),
    ];
    for (what, volume, replica) in sides {
        match compare_devices(&volume, &replica) {
            Ok(()) => report.note(&format!("{what} is equal, bit for bit.")),
            Err(difference) => report.wrong(&format!("{what} differs: {difference}")),
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
