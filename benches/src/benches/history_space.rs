//! What history costs on disk: the bytes that it keeps, and all that the receiver writes, for each byte of the source.

use std::path::Path;
use std::time::Duration;

use varve_tests::{Filesystem, MIB, Mount, Pair, Postgres, Role, Scratch};

use super::GROUP;
use super::path::{LIMIT, check_end, wait_quiet};
use crate::pacer::{self, Load, Pace};
use crate::plan::Plan;
use crate::report::{FINE, Report, Target};
use crate::status::Agent;
use crate::volume::{Volume, fio, written_bytes};

/// Small, so that there are closed layers and indexes of several levels.
const LAYER_MIB: u64 = 16;
const VOLUME_BYTES: u64 = 512 * MIB;
/// Longer than the receiver's keeper rests.
const KEEPER: Duration = Duration::from_millis(2500);

/// What a load cost.
struct Cost {
    kept: f64,
    written: f64,
    detail: String,
}

/// A load on a device, which it gets with its seconds.
type Writes<'a> = &'a dyn Fn(&Volume, Duration);

pub fn run(plan: &Plan, report: &mut Report) {
    let small = |volume: &Volume, time: Duration| {
        pacer::run(volume, Load { block: "4k", depth: 32 }, time, |_| Pace::Rate(60e6));
    };
    let large = |volume: &Volume, time: Duration| {
        let job = fio(volume.path()).option("rw=write").block("1m").depth(4).rate(120 << 20);
        job.option("refill_buffers=1").seconds(time.as_secs().max(1)).run(&volume.scratch);
    };
    let loads: [(&str, Writes<'_>, f64); 2] = [("4 KiB at random", &small, 1.02), ("1 MiB in sequence", &large, 1.02)];
    for (what, writes, most) in loads {
        let volume = Volume::in_memory(VOLUME_BYTES);
        let cost = cost(report, &volume, |volume| writes(volume, plan.run(10.0, 3.0)));
        rows(report, what, &cost, most);
    }

    let volume = Volume::in_memory(2 * VOLUME_BYTES);
    let disk = Scratch::disk();
    let mount = Mount::format(&disk, "database", Filesystem::Ext4, volume.path());
    let postgres = Postgres::create(&disk, &mount.path().join("data"));
    postgres.pgbench_init(20);
    postgres.query("CHECKPOINT");
    let cost = cost(report, &volume, |_| {
        postgres.pgbench_start(4, plan.run(20.0, 5.0).as_secs()).finish();
        postgres.query("CHECKPOINT");
        nix::unistd::sync();
    });
    rows(report, "pgbench on ext4", &cost, 0.55);
    drop(postgres);
    drop(mount);
    report.note(&format!(
        "Layers of {LAYER_MIB} MiB, so that indexes of three levels are in it. Random data is not compressed by anything; \
         the database's is, on the wire (and so in the landing log) and in the history."
    ));
}

fn rows(report: &mut Report, what: &str, cost: &Cost, most: f64) {
    report.row(
        &format!("{what}: history kept / written at the source"),
        FINE,
        &[cost.kept],
        Target::Max(most),
        &cost.detail,
    );
    report.row(
        &format!("{what}: written by the receiver / written at the source"),
        FINE,
        &[cost.written],
        Target::Max(3.05),
        "landing log, history and its indexes, replica",
    );
}

fn cost(report: &mut Report, volume: &Volume, writes: impl FnOnce(&Volume)) -> Cost {
    let mut pair = Pair::new();
    let config = pair.recovery.root().join("etc/varve/receiver.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("{text}\nhistory_layer_mib = {LAYER_MIB}\n")).unwrap();
    pair.recovery.restart(Role::Receiver);
    let replicas = pair.protect(GROUP, &[volume.path()]);
    pair.wait_protected(GROUP, LIMIT);
    let mut agent = Agent::connect(pair.production.root(), GROUP);
    let quiet = |pair: &Pair, agent: &mut Agent| {
        wait_quiet(pair, agent);
        std::thread::sleep(KEEPER);
    };
    quiet(&pair, &mut agent);
    let before = (written_bytes(volume.path()), daemon_written(&pair), history(&pair), agent.group());
    writes(volume);
    quiet(&pair, &mut agent);
    let after = (written_bytes(volume.path()), daemon_written(&pair), history(&pair), agent.group());
    let source = (after.0 - before.0) as f64;
    let images = after.3.counter("image_bytes") - before.3.counter("image_bytes");
    if images > 0 {
        report.note(&format!("{} MB went as images: the ring overflowed meanwhile.", images / 1_000_000));
    }
    let detail = format!("{:.0} MB written, {} layers", source / 1e6, after.2.1);
    check_end(report, &pair, volume.path(), &replicas[0]);
    let written = (after.1 - before.1) as f64 / source;
    Cost { kept: after.2.0.saturating_sub(before.2.0) as f64 / source, written, detail }
}

/// Bytes that the receiver has sent to disks.
fn daemon_written(pair: &Pair) -> u64 {
    let path = format!("/proc/{}/io", pair.recovery.pid(Role::Receiver));
    let text = std::fs::read_to_string(Path::new(&path)).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: ")).unwrap();
    line.trim().parse().unwrap()
}

/// Bytes and layers of the history.
fn history(pair: &Pair) -> (u64, u64) {
    let group = pair.recovery.group(GROUP).unwrap();
    let history = &group["history"];
    (history["bytes"].as_u64().unwrap(), history["layers"].as_u64().unwrap())
}
