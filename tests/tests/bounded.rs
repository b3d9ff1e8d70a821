//! Memory of both daemons is bounded: 32 groups of one volume, one group of 32 volumes; first sync, load, outage, catching
//! up, comparison. Own memory: without the rings, which are the kernel's and bounded by `ring_mib`.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use rand::Rng;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(120);
const VOLUMES: usize = 32;
const VOLUME_BYTES: u64 = 16 << 20;
/// The agent: 20 frames and 16 regions over all groups, and what QUIC holds unacknowledged.
const AGENT_BASE_BYTES_MAX: u64 = 64 << 20;
/// Of each group whose journal is in use: chunks of 1 MiB that are written and read.
const AGENT_GROUP_BYTES_MAX: u64 = 4 << 20;
/// The receiver: `receiver/src/lib.rs` says what a group may take; under this load none takes all of it.
const RECEIVER_GROUP_BYTES_MAX: u64 = 92 << 20;
const RECEIVER_BASE_BYTES_MAX: u64 = 160 << 20;
/// When nothing has been written for a while: an arena and indexes.
const RECEIVER_GROUP_REST_BYTES_MAX: u64 = 8 << 20;

/// The largest that each daemon was.
#[derive(Default)]
struct Most {
    agent: AtomicU64,
    receiver: AtomicU64,
}

impl Most {
    fn look(&self, pair: &Pair) {
        for (side, most) in [(&pair.production, &self.agent), (&pair.recovery, &self.receiver)] {
            let out = side.varve(&["status", "--json"]);
            if out.code == 0 {
                let bytes = out.json()["daemons"][0]["rss_bytes"].as_u64().unwrap_or(0);
                most.fetch_max(bytes, Ordering::Relaxed);
            }
        }
    }
}

/// Writes at random, about 50 MB/s over all volumes together, until told otherwise.
fn write(paths: &[&Path], seed: &Seed, stop: &AtomicBool) -> u64 {
    let files: Vec<_> = paths
        .iter()
        .map(|path| OpenOptions::new().write(true).custom_flags(nix::libc::O_DIRECT).open(path).unwrap())
        .collect();
    let (mut rng, mut written) = (seed.rng(), 0);
    let mut buffer = Aligned::new(256 << 10, 0);
    while !stop.load(Ordering::Relaxed) {
        for file in &files {
            let bytes = rng.random_range(1..=64usize) * 4096;
            rng.fill(&mut buffer[..bytes]);
            let at = rng.random_range(0..=(VOLUME_BYTES as usize - bytes) / 4096) * 4096;
            file.write_all_at(&buffer[..bytes], at as u64).unwrap();
            written += bytes as u64;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    written
}

fn bounded(groups: usize) {
    require_root();
    let (scratch, seed) = (Scratch::memory(), Seed::new());
    let devices: Vec<LoopDevice> =
        (0..VOLUMES).map(|number| LoopDevice::new(&scratch, &format!("v{number}"), VOLUME_BYTES)).collect();
    let paths: Vec<&Path> = devices.iter().map(LoopDevice::path).collect();
    let mut pair = Pair::with_agent_config("ring_mib = 4\njournal_max_mib = 64\n");
    let (most, stop) = (Most::default(), AtomicBool::new(false));
    let names: Vec<String> = (0..groups).map(|number| format!("g{number}")).collect();
    let per_group = VOLUMES / groups;
    for (name, paths) in names.iter().zip(paths.chunks(per_group)) {
        pair.protect(name, paths);
    }
    let mut stages = Vec::new();
    let mut stage = |pair: &Pair, most: &Most, name: &str| {
        most.look(pair);
        let [agent, receiver] = [&most.agent, &most.receiver].map(|most| most.load(Ordering::Relaxed) >> 20);
        stages.push(format!("{name}: agent {agent} MiB, receiver {receiver} MiB"));
    };
    let wait = |pair: &Pair| {
        for name in &names {
            wait_until(LIMIT, &format!("{name} is protected"), || {
                most.look(pair);
                pair.production.group(name).is_some_and(|group| group["data"] == "protected")
            });
        }
    };
    wait(&pair);
    stage(&pair, &most, "first sync");
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write(&paths, &seed, &stop));
        let look_for = |pair: &Pair, seconds: u64| {
            let end = std::time::Instant::now() + Duration::from_secs(seconds);
            while std::time::Instant::now() < end {
                most.look(pair);
                std::thread::sleep(Duration::from_millis(100));
            }
        };
        look_for(&pair, 8);
        stage(&pair, &most, "load");
        pair.recovery.kill(Role::Receiver);
        look_for(&pair, 8);
        stage(&pair, &most, "outage");
        pair.recovery.start(Role::Receiver);
        look_for(&pair, 8);
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap()
    });
    wait(&pair);
    stage(&pair, &most, "catching up");
    for name in &names {
        pair.wait_applied(name, LIMIT);
        pair.production.varve(&["verify", name]).ok();
        most.look(&pair);
    }
    stage(&pair, &most, "verify");
    let receiver_rests = RECEIVER_BASE_BYTES_MAX / 4 + groups as u64 * RECEIVER_GROUP_REST_BYTES_MAX;
    let mut rest = Most::default();
    wait_until(LIMIT, &format!("the receiver holds {receiver_rests} bytes or less"), || {
        rest = Most::default();
        rest.look(&pair);
        (1..=receiver_rests).contains(&rest.receiver.load(Ordering::Relaxed))
    });
    stage(&pair, &rest, "at rest");
    eprintln!("{groups} groups, {} MiB written:\n{}", written >> 20, stages.join("\n"));
    let [agent, receiver] = [&most.agent, &most.receiver].map(|most| most.load(Ordering::Relaxed));
    let may = AGENT_BASE_BYTES_MAX + groups as u64 * AGENT_GROUP_BYTES_MAX;
    assert!(agent <= may, "agent: {agent} bytes of {may}\n{}", stages.join("\n"));
    let may = RECEIVER_BASE_BYTES_MAX + groups as u64 * RECEIVER_GROUP_BYTES_MAX;
    assert!(receiver <= may, "receiver: {receiver} bytes of {may}\n{}", stages.join("\n"));
}

#[test]
fn thirty_two_groups_of_one_volume() {
    bounded(VOLUMES);
}

#[test]
fn one_group_of_thirty_two_volumes() {
    bounded(1);
}
