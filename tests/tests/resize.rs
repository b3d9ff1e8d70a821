//! A volume grows while it is protected: replica and timeline follow in order, in one ring and without a comparison of what
//! was there before; a point has the size that the volume had then.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use rand::Rng;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(90);
const MIB: u64 = 1 << 20;

/// Synced and past the page cache.
#[track_caller]
fn write(path: &Path, at: u64, bytes: usize, fill: u8) {
    let file = OpenOptions::new().write(true).custom_flags(nix::libc::O_DIRECT | nix::libc::O_SYNC).open(path).unwrap();
    file.write_all_at(&Aligned::new(bytes, fill), at).unwrap();
}

/// Sets a bookmark and gives what the volume holds; nobody may be writing.
#[track_caller]
fn moment(pair: &Pair, device: &LoopDevice, name: &str) -> (String, u64) {
    pair.production.varve(&["bookmark", "db", name]).ok();
    (digest_device(device.path()), size_bytes(device.path()))
}

/// The point is what the volume was then, in its size then.
#[track_caller]
fn assert_point(pair: &Pair, name: &str, moment: &(String, u64)) {
    let to = pair.recovery.scratch().join(&format!("{name}.restored"));
    let at = format!("bookmark:{name}");
    let path = to.to_str().unwrap();
    pair.recovery.varve(&["restore", "db", "--at", &at, "--volume", "0", "--to", path]).ok();
    assert_eq!((size_bytes(&to), digest_device(&to)), (moment.1, moment.0.clone()), "{name}");
    std::fs::remove_file(to).unwrap();
}

#[track_caller]
fn assert_equal(pair: &Pair, device: &LoopDevice, replica: &Path, bytes: u64) {
    wait_until(LIMIT, "the replica has the new size", || size_bytes(replica) == bytes);
    pair.wait_protected("db", LIMIT);
    pair.wait_applied("db", LIMIT);
    assert_same(device.path(), replica);
    assert_eq!(pair.recovery.group("db").unwrap()["volumes"][0]["bytes"], bytes);
    assert_eq!(pair.production.group("db").unwrap()["volumes"][0]["bytes"], bytes);
}

fn incarnation(pair: &Pair) -> String {
    let status = pair.production.group("db").unwrap();
    status["captured"].as_str().unwrap().rsplit_once(':').unwrap().0.to_owned()
}

fn counter(pair: &Pair, name: &str) -> u64 {
    pair.production.group("db").unwrap()["counters"][name].as_u64().unwrap()
}

/// Nothing was called an error; the ring is the one that it was.
#[track_caller]
fn assert_followed(pair: &Pair, ring: &str) {
    assert_eq!(incarnation(pair), ring, "one ring all the time");
    for log in [pair.production.log(Role::Agent), pair.recovery.log(Role::Receiver)] {
        let errors: Vec<&str> = log.lines().filter(|line| line.contains(" ERROR ")).collect();
        assert!(errors.is_empty(), "{errors:#?}");
    }
}

fn load(device: &LoopDevice, seed: u64) -> Fio {
    let fio = Fio::new(device.path()).block("512-64k").option("blockalign=512").option("size=20m").depth(4);
    fio.seed(seed).rate(10 << 20).seconds(600)
}

/// In steps, odd sizes among them, while what was there before is written; only what is new is compared.
#[test]
fn grows_in_steps_under_load() {
    require_root();
    let seed = Seed::new();
    let mut rng = seed.rng();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 24 * MIB);
    let pair = Pair::with_agent_config("ring_mib = 256\n");
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let ring = incarnation(&pair);
    let mut points = vec![("start".to_owned(), moment(&pair, &device, "start"))];
    let mut bytes = 24 * MIB;
    for step in 0..3u8 {
        let running = load(&device, seed.number() + u64::from(step)).start(&scratch);
        std::thread::sleep(Duration::from_millis(rng.random_range(0..500)));
        let old = bytes;
        bytes += rng.random_range(16..60 * MIB / 512) * 512;
        device.resize(bytes);
        // As a file system does: at once, behind the old end and over it.
        write(device.path(), bytes.next_multiple_of(4096) - 8192, 4096, 0x10 + step);
        write(device.path(), old / 4096 * 4096 - 4096, 8192, 0x20 + step);
        wait_until(LIMIT, "the replica has the new size", || size_bytes(&replicas[0]) == bytes);
        running.stop();
        assert_equal(&pair, &device, &replicas[0], bytes);
        write(device.path(), old.next_multiple_of(4096), 4096, 0x30 + step);
        let name = format!("step{step}");
        points.push((name.clone(), moment(&pair, &device, &name)));
        write(device.path(), old.next_multiple_of(4096), 4096, 0x40 + step);
    }
    assert_equal(&pair, &device, &replicas[0], bytes);
    for (name, moment) in &points {
        assert_point(&pair, name, moment);
    }
    // What is dirty because a write was under way then is some regions more.
    let new_regions = (bytes - 24 * MIB).div_ceil(MIB) + 3;
    assert!(
        counter(&pair, "probes") <= new_regions + 60,
        "{} probes for {new_regions} regions",
        counter(&pair, "probes")
    );
    assert_followed(&pair, &ring);
    pair.production.varve(&["verify", "db"]).ok();
}

/// The receiver is away: the order of what was written before, the growth, and what was written after is kept.
#[test]
fn grows_while_the_receiver_is_away() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 8 * MIB);
    let mut pair = Pair::new();
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let ring = incarnation(&pair);
    let before = moment(&pair, &device, "before");
    pair.recovery.kill(Role::Receiver);
    write(device.path(), MIB, 65536, 1);
    let away = moment(&pair, &device, "away");
    write(device.path(), MIB, 65536, 2);
    device.resize(80 * MIB);
    write(device.path(), 79 * MIB, 65536, 3);
    wait_until(LIMIT, "the agent sees it", || {
        pair.production.group("db").is_some_and(|status| status["volumes"][0]["bytes"] == 80 * MIB)
    });
    let refused = pair.production.varve(&["bookmark", "db", "nowhere"]);
    assert_ne!(refused.code, 0, "no point before the new part is there");
    write(device.path(), 78 * MIB, 65536, 4);
    // Written down, not done: the next one does it.
    pair.recovery.set_env("VARVE_FAILPOINT", "grown");
    pair.recovery.start(Role::Receiver);
    pair.recovery.reap(Role::Receiver);
    assert_eq!(size_bytes(&replicas[0]), 8 * MIB);
    pair.recovery.set_env("VARVE_FAILPOINT", "");
    pair.recovery.start(Role::Receiver);
    assert_equal(&pair, &device, &replicas[0], 80 * MIB);
    write(device.path(), 79 * MIB, 65536, 5);
    let after = moment(&pair, &device, "after");
    assert_equal(&pair, &device, &replicas[0], 80 * MIB);
    for (name, moment) in [("before", &before), ("away", &away), ("after", &after)] {
        assert_point(&pair, name, moment);
    }
    assert_eq!(incarnation(&pair), ring);
}

/// Either side is killed at a random moment around the growth, and it also grows while the agent is away.
#[test]
fn killed_around_the_growth() {
    require_root();
    let seed = Seed::new();
    let mut rng = seed.rng();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 24 * MIB);
    let mut pair = Pair::with_agent_config("ring_mib = 256\n");
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let mut points = vec![("start".to_owned(), moment(&pair, &device, "start"))];
    let mut bytes = 24 * MIB;
    let rounds = if std::env::var_os("VARVE_SOAK").is_some() { 40 } else { 4 };
    for round in 0..rounds {
        let running = load(&device, seed.number() + round).start(&scratch);
        let away = round % 4 == 0;
        if away {
            pair.production.kill(Role::Agent);
        }
        bytes += rng.random_range(16..8 * MIB / 512) * 512;
        device.resize(bytes);
        write(device.path(), bytes / 4096 * 4096 - 4096, 4096, 0x50);
        std::thread::sleep(Duration::from_millis(rng.random_range(0..1600)));
        match round % 4 {
            0 => pair.production.start(Role::Agent),
            1 | 3 => {
                pair.production.kill(Role::Agent);
                pair.production.start(Role::Agent);
            }
            _ => {
                pair.recovery.kill(Role::Receiver);
                pair.recovery.start(Role::Receiver);
            }
        }
        write(device.path(), bytes / 4096 * 4096 - 8192, 4096, 0x51);
        wait_until(LIMIT, "the replica has the new size", || size_bytes(&replicas[0]) == bytes);
        running.stop();
        assert_equal(&pair, &device, &replicas[0], bytes);
        let name = format!("round{round}");
        points.push((name.clone(), moment(&pair, &device, &name)));
    }
    assert_equal(&pair, &device, &replicas[0], bytes);
    for (name, moment) in &points {
        assert_point(&pair, name, moment);
    }
}

/// It has its size again, but what was behind the smaller one's end is gone, and no record says so: all of it is compared,
/// whoever saw it, and whether a write met the smaller size.
#[test]
fn shrinks_and_has_its_size_again() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 32 * MIB);
    let mut pair = Pair::new();
    let replicas = pair.protect("db", &[device.path()]);
    let written = |fill| write(device.path(), 20 * MIB, 1 << 16, fill);
    let equal = || digest_device(device.path()) == digest_device(&replicas[0]);
    let settle = |pair: &Pair| {
        wait_until(LIMIT, "the replica has what the volume has", equal);
        pair.wait_protected("db", LIMIT);
        assert_same(device.path(), &replicas[0]);
    };
    for round in 0..2 {
        // Refused by an agent that comes back meanwhile.
        written(0x60 + round);
        settle(&pair);
        pair.production.kill(Role::Agent);
        device.resize(16 * MIB);
        pair.production.start(Role::Agent);
        wait_until(LIMIT, "it is refused", || {
            let status = pair.production.group("db").unwrap();
            status["data"] == "gap" && status["reason"].as_str().is_some_and(|reason| reason.contains("shrank"))
        });
        if round == 1 {
            pair.production.kill(Role::Agent);
        }
        device.resize(32 * MIB);
        assert!(!equal(), "what was behind the end is gone");
        if round == 1 {
            pair.production.start(Role::Agent);
        }
        settle(&pair);
    }
    // While no agent runs, met by a write.
    written(0x70);
    settle(&pair);
    pair.production.kill(Role::Agent);
    device.resize(16 * MIB);
    write(device.path(), 4096, 4096, 0x71);
    device.resize(32 * MIB);
    assert!(!equal(), "what was behind the end is gone");
    pair.production.start(Role::Agent);
    settle(&pair);
    // And is larger then than it was.
    written(0x78);
    settle(&pair);
    pair.production.kill(Role::Agent);
    device.resize(16 * MIB);
    write(device.path(), 4096, 4096, 0x79);
    device.resize(40 * MIB);
    pair.production.start(Role::Agent);
    wait_until(LIMIT, "the replica has the new size", || size_bytes(&replicas[0]) == 40 * MIB);
    settle(&pair);
    // Under a running one, between two of its looks.
    written(0x80);
    settle(&pair);
    device.resize(16 * MIB);
    write(device.path(), 4096, 4096, 0x81);
    device.resize(40 * MIB);
    settle(&pair);
}

/// To a point before the growth: as a view in its size, rolled back and forth, taken over.
#[test]
fn a_point_before_the_growth_is_gone_back_to() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 8 * MIB + 512);
    let pair = Pair::new();
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    write(device.path(), 0, 1 << 20, 1);
    let small = moment(&pair, &device, "small");
    write(device.path(), 4096, 65536, 2);
    device.resize(12 * MIB);
    write(device.path(), 8 * MIB, 65536, 3);
    assert_equal(&pair, &device, &replicas[0], 12 * MIB);
    let large = moment(&pair, &device, "large");
    pair.wait_applied("db", LIMIT);
    for (name, moment) in [("small", &small), ("large", &large)] {
        assert_point(&pair, name, moment);
        let at = format!("bookmark:{name}");
        let view = pair.recovery.varve(&["view", "open", "db", "--at", &at, "--json"]).ok().json();
        let shown = PathBuf::from(view["volumes"][0]["device"].as_str().unwrap());
        // A block device has whole sectors of its own.
        assert_eq!((size_bytes(&shown), digest_device(&shown)), (moment.1, moment.0.clone()), "{name}");
        pair.recovery.varve(&["view", "close", &view["id"].to_string()]).ok();
    }
    let back = pair.recovery.varve(&["rollback", "db", "--at", "bookmark:small", "--yes", "--json"]).ok();
    drop(back);
    let replica = std::fs::read(&replicas[0]).unwrap();
    let restored = scratch.join("rolled");
    std::fs::write(&restored, &replica[..(8 * MIB + 512) as usize]).unwrap();
    assert_eq!(digest_device(&restored), small.0);
    assert!(replica[(8 * MIB + 512) as usize..].iter().all(|byte| *byte == 0), "nothing was there");
    pair.recovery.varve(&["rollback", "db", "--release", "--yes"]).ok();
    assert_equal(&pair, &device, &replicas[0], 12 * MIB);
    // A takeover of the old point is a disk of the old size.
    pair.recovery.varve(&["failover", "db", "--at", "bookmark:small", "--yes"]).ok();
    let promoted = pair.recovery.root().join("run/varve/views/db-0");
    assert_eq!((size_bytes(&promoted), digest_device(&promoted)), (small.1, small.0.clone()));
    pair.recovery.varve(&["failover", "abort", "db", "--yes"]).ok();
    assert_equal(&pair, &device, &replicas[0], 12 * MIB);
    assert_point(&pair, "large", &large);
}

/// A replica on a device that has no room: refused with the way on, never called protected; then it is given room.
#[test]
fn a_replica_without_room_is_refused_until_it_has_some() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 8 * MIB);
    let replica = LoopDevice::new(&scratch, "replica", 9 * MIB);
    let pair = Pair::new();
    let to = replica.path().to_str().unwrap();
    pair.production.varve(&["protect", "db", device.path().to_str().unwrap(), "--replica", to]).ok();
    pair.wait_protected("db", LIMIT);
    let small = moment(&pair, &device, "small");
    device.resize(16 * MIB);
    write(device.path(), 15 * MIB, 65536, 3);
    wait_until(LIMIT, "it is refused", || {
        let status = pair.production.group("db").unwrap_or_default();
        status["reason"].as_str().is_some_and(|reason| reason.contains("make that device larger"))
            && status["data"] == "gap"
    });
    assert_point(&pair, "small", &small);
    replica.resize(20 * MIB);
    wait_until(LIMIT, "it is followed", || {
        pair.recovery.group("db").is_some_and(|status| status["volumes"][0]["bytes"] == 16 * MIB)
    });
    pair.wait_protected("db", LIMIT);
    pair.wait_applied("db", LIMIT);
    let equal = std::fs::read(device.path()).unwrap() == std::fs::read(replica.path()).unwrap()[..(16 * MIB) as usize];
    assert!(equal);
    assert_point(&pair, "small", &small);
}
