//! The faults, and what each of them excuses.

use crate::bench::{Bench, GROUP, KEPT_BYTES, LIMIT, WRITTEN_SECTORS};
use nix::sys::signal::Signal;
use rand::Rng;
use rand::rngs::StdRng;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use varve_tests::campaign::SECTOR;
use varve_tests::*;

/// Where the receiver can be made to die (receiver/src/failpoint.rs): each is a step of making something durable.
const FAILPOINTS: [&str; 12] = [
    "land-before",
    "land-torn",
    "land-after",
    "segment-made",
    "segment-begun",
    "history-before",
    "history-after",
    "apply-before",
    "apply-half",
    "apply-after",
    "mark-before",
    "mark-after",
];

/// One fault with all that was drawn for it: what is done does not depend on how fast anything is.
#[derive(Debug, Clone)]
pub enum Fault {
    /// `kill -9`, once or several times: for so long each lives before, and is away after.
    AgentKilled(Vec<(u64, u64)>),
    /// Stopped and started again, as an upgrade does.
    AgentExchanged(u64),
    /// Away for so long that the ring cannot hold what is written.
    AgentAwayTooLong,
    ReceiverKilled(u64),
    ReceiverStopped(u64),
    /// Stops answering without going away.
    ReceiverHangs(u64),
    /// Dies at a durable step.
    ReceiverDies(&'static str, u32),
    BothKilled(u64),
    /// Nothing passes; `true`: still so while the next fault happens.
    LinkCut(u64, bool),
    /// So many of 1000 packets are lost, so many come twice, so many late; and how late all are, in ms. Until the round ends, or
    /// until it is waited for that all is protected.
    LinkBad([u32; 3], u64),
    /// The agent has another address from here on, as behind a router that was restarted.
    LinkMoved,
    /// Nothing passes until ring and journal are full.
    Overflow,
    ReceiverDiskFull(u64),
    /// The disk below the second volume has no room.
    WritesFail(u64),
    /// The disk below the third volume fails writes (`true`: and reads).
    MediumFails(u64, bool),
    /// The first volume changes in these sectors (the first and how many), and the kernel has skipped the event; also while the
    /// agent is away.
    EventMissed(u64, u64, Option<u64>),
    /// The first volume (`true`: the last, below its file system) has so many sectors more; also while the agent is away.
    VolumeGrown(bool, u64, Option<u64>),
    /// Sectors of the first replica, from this one of those that the load leaves alone.
    ReplicaChanged(u64, u64),
    /// What a reboot leaves: no capture, and writes that nobody saw.
    CaptureLost,
    /// None at all: a verify under load must find nothing.
    Verified,
}

impl Fault {
    /// One at random.
    pub fn any(rng: &mut StdRng) -> Self {
        let away = rng.random_range(0..2500);
        match rng.random_range(0..115) {
            0..=11 => {
                let times = rng.random_range(1..=3);
                Fault::AgentKilled((0..times).map(|_| (rng.random_range(0..900), rng.random_range(0..300))).collect())
            }
            12..=19 => Fault::AgentExchanged(rng.random_range(0..400)),
            20..=23 => Fault::AgentAwayTooLong,
            24..=33 => Fault::ReceiverKilled(away),
            34..=38 => Fault::ReceiverStopped(away),
            39..=44 => Fault::ReceiverHangs(away),
            45..=56 => Fault::ReceiverDies(FAILPOINTS[rng.random_range(0..FAILPOINTS.len())], rng.random_range(1..12)),
            57..=61 => Fault::BothKilled(rng.random_range(0..500)),
            62..=70 => Fault::LinkCut(rng.random_range(5..6000), rng.random_bool(0.4)),
            71..=73 => Fault::LinkBad([60, 60, 100].map(|most| rng.random_range(0..most)), rng.random_range(0..40)),
            74..=75 => Fault::LinkMoved,
            76..=81 => Fault::Overflow,
            82..=85 => Fault::ReceiverDiskFull(rng.random_range(1500..5000)),
            86..=89 => Fault::WritesFail(rng.random_range(200..2500)),
            90..=93 => {
                let sectors = rng.random_range(1..=16);
                Fault::ReplicaChanged(rng.random_range(0..KEPT_BYTES / SECTOR as u64 - sectors), sectors)
            }
            94..=96 => Fault::CaptureLost,
            97..=101 => Fault::MediumFails(rng.random_range(200..2500), rng.random_bool(0.5)),
            102..=106 => {
                let sectors = rng.random_range(1..=64);
                let away = rng.random_bool(0.3).then(|| rng.random_range(0..300));
                Fault::EventMissed(rng.random_range(0..WRITTEN_SECTORS - sectors), sectors, away)
            }
            107..=111 => {
                let (last, sectors) = (rng.random_bool(0.3), rng.random_range(1..2 * MIB / SECTOR as u64));
                Fault::VolumeGrown(last, sectors, rng.random_bool(0.3).then(|| rng.random_range(0..300)))
            }
            _ => Fault::Verified,
        }
    }

    /// For the summary.
    pub fn name(&self) -> String {
        let text = format!("{self:?}");
        text.split('(').next().unwrap().to_owned()
    }

    pub fn inject(&self, bench: &mut Bench) {
        match self {
            Fault::AgentKilled(lives) => {
                for (alive, away) in lives {
                    sleep(*alive);
                    bench.agent_away(true, Duration::from_millis(*away), |_| {});
                }
            }
            Fault::AgentExchanged(away) => bench.agent_away(false, Duration::from_millis(*away), |_| {}),
            Fault::AgentAwayTooLong => agent_away_too_long(bench),
            Fault::ReceiverKilled(away) => {
                bench.pair.recovery.kill(Role::Receiver);
                away_for(bench, *away, |bench| bench.pair.recovery.start(Role::Receiver));
            }
            Fault::ReceiverStopped(away) => {
                bench.pair.recovery.stop(Role::Receiver);
                away_for(bench, *away, |bench| bench.pair.recovery.start(Role::Receiver));
            }
            Fault::ReceiverHangs(away) => {
                bench.pair.recovery.signal(Role::Receiver, Signal::SIGSTOP);
                away_for(bench, *away, |bench| bench.pair.recovery.signal(Role::Receiver, Signal::SIGCONT));
            }
            Fault::ReceiverDies(failpoint, count) => receiver_dies(bench, failpoint, *count),
            Fault::BothKilled(away) => {
                bench.pair.recovery.kill(Role::Receiver);
                bench.agent_away(true, Duration::from_millis(*away), |_| {});
                bench.pair.recovery.start(Role::Receiver);
                bench.receiver_was_away();
            }
            Fault::LinkCut(away, hold) => {
                bench.link.cut(true);
                if *hold {
                    sleep(*away / 4);
                    bench.receiver_was_away();
                } else {
                    away_for(bench, *away, |bench| bench.link.cut(false));
                }
            }
            Fault::LinkBad(of_1000, late_ms) => {
                let [loss, duplicate, reorder] = of_1000.map(|part| f64::from(part) / 1000.0);
                let (held, latency) = (Duration::from_millis(20), Duration::from_millis(*late_ms));
                bench.link.set(Conditions { loss, duplicate, reorder, held, latency, ..Conditions::default() });
                // What passes may be less than what is written.
                bench.receiver_was_away();
            }
            Fault::LinkMoved => bench.link.move_agent(),
            Fault::Overflow => overflow(bench),
            Fault::ReceiverDiskFull(time) => receiver_disk_full(bench, *time),
            Fault::WritesFail(time) => {
                bench.load.small(true);
                bench.full.fill(0);
                sleep(*time);
                bench.full.free();
                bench.load.small(false);
                bench.excuse.failed_write |= bench.load.failed() > 0;
            }
            Fault::MediumFails(time, reads) => {
                bench.load.small(true);
                bench.failing.fail(*reads, Duration::from_millis(*time));
                bench.load.small(false);
                bench.excuse.failed_write |= bench.load.failed() > 0;
            }
            Fault::EventMissed(from, sectors, away) => event_missed(bench, *from, *sectors, *away),
            Fault::VolumeGrown(last, sectors, away) => {
                let grow = |bench: &mut Bench| {
                    if !bench.grow(*last, *sectors) {
                        println!("  it has grown enough");
                    }
                };
                match away {
                    Some(away) => bench.agent_away(true, Duration::from_millis(*away), grow),
                    None => grow(bench),
                }
            }
            Fault::ReplicaChanged(from, sectors) => replica_changed(bench, *from, *sectors),
            Fault::CaptureLost => capture_lost(bench),
            Fault::Verified => {
                ready(bench);
                bench.excuse.verify = true;
                let out = bench.pair.production.varve(&["verify", GROUP, "--json"]).ok().json_lines();
                let last = out.last().unwrap();
                assert_eq!(last["differing_bytes"], 0, "a verify cries wolf: {last:#}");
            }
        }
    }
}

fn sleep(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// The receiver is away for a while and comes back.
fn away_for(bench: &mut Bench, ms: u64, back: impl FnOnce(&mut Bench)) {
    bench.watcher.receiver_is_away(true);
    sleep(ms);
    bench.watcher.receiver_is_away(false);
    back(bench);
    bench.receiver_was_away();
}

/// Everything runs and is connected, and the group is protected.
pub fn ready(bench: &mut Bench) {
    bench.receiver_was_away();
    bench.link.cut(false);
    // Over a bad one less may pass than is written, and then it never is.
    bench.link.set(Conditions::default());
    bench.pair.wait_protected(GROUP, LIMIT);
    bench.receiver_is_back();
    bench.note_drained();
}

fn agent_away_too_long(bench: &mut Bench) {
    let until = bench.written() + bench.ring_bytes * 115 / 100 + 16 * MIB;
    bench.pair.production.kill(Role::Agent);
    bench.load.pace(0);
    wait_until(LIMIT, "the ring is full", || bench.written() >= until);
    bench.load.pace(8 << 20);
    bench.excuse.ring_full = true;
    bench.pair.production.start(Role::Agent);
}

fn overflow(bench: &mut Bench) {
    bench.link.cut(true);
    let until = bench.written() + (bench.ring_bytes + bench.journal_bytes) * 115 / 100 + 16 * MIB;
    bench.load.pace(0);
    wait_until(LIMIT, "ring and journal are full", || bench.written() >= until);
    bench.load.pace(8 << 20);
    bench.excuse.ring_full = true;
    bench.watcher.loss_is_known(true);
    sleep(5500);
    bench.watcher.loss_is_known(false);
    bench.link.cut(false);
}

fn receiver_dies(bench: &mut Bench, failpoint: &str, count: u32) {
    let recovery = &mut bench.pair.recovery;
    recovery.stop(Role::Receiver);
    recovery.set_env("VARVE_FAILPOINT", &format!("{failpoint}:{count}"));
    let started = recovery.try_start(Role::Receiver);
    let began = Instant::now();
    if started.is_ok() {
        while recovery.running(Role::Receiver) && began.elapsed() < Duration::from_secs(4) {
            sleep(20);
        }
        match recovery.running(Role::Receiver) {
            // Nothing went that way in this time.
            true => recovery.kill(Role::Receiver),
            false => recovery.reap(Role::Receiver),
        }
    }
    recovery.unset_env("VARVE_FAILPOINT");
    recovery.start(Role::Receiver);
    bench.receiver_was_away();
}

fn receiver_disk_full(bench: &mut Bench, ms: u64) {
    let ballast = bench.small.path().join("ballast");
    let file = std::fs::File::create(&ballast).unwrap();
    let (began, mut bytes) = (Instant::now(), 0u64);
    while began.elapsed() < Duration::from_millis(ms) {
        // What expires makes room, which somebody else takes at once.
        let stat = nix::sys::statvfs::statvfs(bench.small.path()).unwrap();
        let free = stat.blocks_free() * stat.fragment_size();
        let step = free.saturating_sub(MIB);
        if step > 0 {
            use nix::fcntl::{FallocateFlags, fallocate};
            if fallocate(&file, FallocateFlags::empty(), bytes.cast_signed(), step.cast_signed()).is_ok() {
                bytes += step;
            }
        }
        sleep(50);
    }
    drop(file);
    std::fs::remove_file(&ballast).unwrap();
    bench.excuse.window = true;
    bench.receiver_was_away();
}

fn replica_changed(bench: &mut Bench, from: u64, sectors: u64) {
    ready(bench);
    bench.excuse.verify = true;
    bench.excuse.repair = true;
    let first = (bench.load.volumes()[0].bytes - KEPT_BYTES) / SECTOR as u64 + from;
    let replica = std::fs::File::options().write(true).open(&bench.replicas[0]).unwrap();
    replica.write_all_at(&vec![0xee; sectors as usize * SECTOR], first * SECTOR as u64).unwrap();
    replica.sync_all().unwrap();
    let found = bench.pair.production.varve(&["verify", GROUP, "--json"]);
    assert_eq!(found.code, 1, "{sectors} sectors from {first} on were changed, and verify says: {found:?}");
    let differing = found.json_lines().last().unwrap()["differing_bytes"].as_u64().unwrap();
    assert!(differing >= sectors * SECTOR as u64 && differing <= 2 * 65536, "{found:?}");
    let repaired = bench.pair.recovery.varve(&["verify", GROUP, "--repair", "--json"]);
    assert!([0, 1].contains(&repaired.code), "{repaired:?}");
    bench.pair.wait_protected(GROUP, LIMIT);
    // What the points before held there, nobody can know: they show what was found.
    bench.tainted.push((first..first + sectors, Instant::now()));
    let again = bench.pair.production.varve(&["verify", GROUP, "--json"]).ok().json_lines();
    assert_eq!(again.last().unwrap()["differing_bytes"], 0, "{again:?}");
}

fn event_missed(bench: &mut Bench, from: u64, sectors: u64, away: Option<u64>) {
    // Inside of another gap it would be no gap of its own, and nobody could count it.
    ready(bench);
    let gaps = |bench: &Bench| {
        let points = bench.points();
        points["gaps"].as_array().unwrap().iter().filter(|gap| gap["reason"] == "missed-events").count()
    };
    let before = gaps(bench);
    bench.excuse.comparisons += 1;
    match away {
        Some(away) => bench.agent_away(true, Duration::from_millis(away), |bench| bench.unseen(from, sectors)),
        None => {
            bench.unseen(from, sectors);
            // It has the write, or there is none.
            bench.moment(&format!("missed{}", bench.missed()));
        }
    }
    wait_until(LIMIT, "the gap is known at the receiver", || gaps(bench) > before);
    bench.pair.wait_protected(GROUP, LIMIT);
}

fn capture_lost(bench: &mut Bench) {
    let before = bench.load.written();
    bench.agent_away(false, Duration::ZERO, |bench| {
        run(bench.pair.production.command(Role::Agent).arg("--unpin-all")).ok();
    });
    // Somebody must have written what nobody saw, or there is nothing to find.
    assert!(bench.load.written() >= before);
    bench.excuse.comparisons += 1;
}
