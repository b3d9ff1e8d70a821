//! The main job on real devices: protect while it is written to, stay equal, survive the death of either side.
//!
//! The pair is declared after the devices, so that it drops first: the agent lets go of them.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use rand::Rng;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(60);

/// Everything on the volume is equal to the replica, at a moment at which nobody writes.
#[track_caller]
fn assert_equal(pair: &Pair, group: &str, volumes: &[&Path], replicas: &[std::path::PathBuf]) {
    // A load that was too fast for two cores has made a gap; it must heal by itself.
    pair.wait_protected(group, LIMIT);
    pair.wait_applied(group, LIMIT);
    for (volume, replica) in volumes.iter().zip(replicas) {
        assert_same(volume, replica);
    }
}

fn file_system_survives(filesystem: Filesystem, bytes: u64) {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", bytes);
    let mount = Mount::format(&scratch, "mnt", filesystem, device.path());
    std::fs::write(mount.path().join("before"), vec![7; 3 << 20]).unwrap();
    mount.sync();
    let pair = Pair::new();
    let replicas = pair.protect("fs", &[device.path()]);
    let load = Fio::new(&mount.path().join("load"))
        .option("size=32m")
        .option("direct=0")
        .option("fsync=16")
        .block("512-256k")
        .option("blockalign=512")
        .seconds(4)
        .start(&scratch);
    pair.wait_protected("fs", LIMIT);
    load.finish();
    std::fs::rename(mount.path().join("before"), mount.path().join("after")).unwrap();
    mount.unmount();
    assert_equal(&pair, "fs", &[device.path()], &replicas);
    let copy = LoopDevice::over(&replicas[0], LoopOptions::default());
    filesystem.check(copy.path()).unwrap();
}

#[test]
fn ext4_is_replicated_under_load() {
    file_system_survives(Filesystem::Ext4, 128 << 20);
}

#[test]
fn xfs_is_replicated_under_load() {
    file_system_survives(Filesystem::Xfs, 320 << 20);
}

#[test]
fn btrfs_is_replicated_under_load() {
    file_system_survives(Filesystem::Btrfs, 256 << 20);
}

#[test]
fn first_sync_of_a_full_volume_under_random_writes() {
    require_root();
    let seed = Seed::new();
    let scratch = Scratch::memory();
    let bytes = 96 << 20;
    let device = LoopDevice::new(&scratch, "volume", bytes);
    let mut content = vec![0; bytes as usize];
    seed.rng().fill(&mut content[..]);
    OpenOptions::new().write(true).open(device.path()).unwrap().write_all_at(&content, 0).unwrap();
    run_ok("sync", &["-f", "/dev"]);
    run_ok("blockdev", &["--flushbufs", device.path().to_str().unwrap()]);
    let load = Fio::new(device.path())
        .block("512-4m")
        .option("blockalign=512")
        .depth(16)
        .seed(seed.number())
        .rate(60 << 20)
        .seconds(40)
        .start(&scratch);
    let pair = Pair::new();
    let replicas = pair.protect("random", &[device.path()]);
    pair.wait_protected("random", LIMIT);
    load.stop();
    assert_equal(&pair, "random", &[device.path()], &replicas);
}

/// Writes stay in flight for hundreds of milliseconds while the sync reads: none may be overwritten by an older image.
#[test]
fn first_sync_of_a_slow_volume_loses_no_write_in_flight() {
    require_root();
    let seed = Seed::new();
    let scratch = Scratch::memory();
    let slow = SlowDevice::new(&scratch, "slow", 24 << 20, Duration::from_millis(20), Duration::from_millis(300));
    let load = Fio::new(slow.path()).block("4k-128k").depth(32).seed(seed.number()).seconds(60).start(&scratch);
    // A fresh load has writes in flight when capture begins.
    let pair = Pair::new();
    let replicas = pair.protect("slow", &[slow.path()]);
    pair.wait_protected("slow", Duration::from_secs(90));
    load.stop();
    assert_equal(&pair, "slow", &[slow.path()], &replicas);
}

/// A then B, one after the other, durable: at any cut B is never ahead of A, and never more than one behind.
#[test]
fn volumes_of_a_group_share_one_order() {
    require_root();
    let scratch = Scratch::memory();
    let a = LoopDevice::new(&scratch, "a", 8 << 20);
    let b = LoopDevice::new(&scratch, "b", 8 << 20);
    let mut pair = Pair::new();
    let replicas = pair.protect("pair", &[a.path(), b.path()]);
    pair.wait_protected("pair", LIMIT);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let open = |path: &Path| OpenOptions::new().write(true).custom_flags(nix::libc::O_SYNC).open(path).unwrap();
            let (a, b) = (open(a.path()), open(b.path()));
            for number in 1u64.. {
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    break;
                }
                a.write_all_at(&number.to_le_bytes().repeat(512), 0).unwrap();
                b.write_all_at(&number.to_le_bytes().repeat(512), 0).unwrap();
            }
        });
        let number_of = |path: &Path| {
            let mut bytes = [0; 8];
            std::fs::File::open(path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
            u64::from_le_bytes(bytes)
        };
        wait_until(LIMIT, "numbers arrive", || number_of(&replicas[1]) > 500);
        pair.production.kill(Role::Agent);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    // What has landed is applied; then nothing changes any more.
    pair.recovery.stop(Role::Receiver);
    let number = |path: &Path| {
        let mut bytes = [0; 8];
        std::fs::File::open(path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        u64::from_le_bytes(bytes)
    };
    let (a, b) = (number(&replicas[0]), number(&replicas[1]));
    assert!(b > 500 && (a == b || a == b + 1), "a is at {a}, b at {b}: not a prefix of what was written");
}

#[test]
fn partitions_are_volumes_and_the_rest_of_the_disk_is_not() {
    require_root();
    let seed = Seed::new();
    let scratch = Scratch::memory();
    let file = scratch.file("disk", 64 << 20);
    let disk = LoopDevice::over(&file, LoopOptions { partscan: true, ..LoopOptions::default() });
    let parts = disk.partition("size=16MiB\nsize=20MiB\nsize=8MiB");
    let volumes: Vec<&Path> = parts[..2].iter().map(|path| path.as_path()).collect();
    let pair = Pair::new();
    let replicas = pair.protect("parts", &volumes);
    pair.wait_protected("parts", LIMIT);
    let loads: Vec<_> = parts
        .iter()
        .map(|part| {
            Fio::new(part).block("512-64k").option("blockalign=512").seed(seed.number()).seconds(3).start(&scratch)
        })
        .collect();
    for load in loads {
        load.finish();
    }
    assert_equal(&pair, "parts", &volumes, &replicas);
    let group = pair.production.group("parts").unwrap();
    assert_eq!(group["counters"]["straddling_writes"], 0);
}

#[test]
fn discards_zeroes_sectors_and_sizes() {
    require_root();
    let seed = Seed::new();
    let scratch = Scratch::disk();
    // An odd size, and sectors of 4096 bytes.
    let odd = LoopDevice::new(&scratch, "odd", (17 << 20) + 512 * 3);
    let big_sectors = scratch.file("big", 16 << 20);
    let big = LoopDevice::over(&big_sectors, LoopOptions { sector_bytes: 4096, ..LoopOptions::default() });
    let volumes = [odd.path(), big.path()];
    let fill = vec![0xa5; 16 << 20];
    for volume in volumes {
        OpenOptions::new().write(true).open(volume).unwrap().write_all_at(&fill, 0).unwrap();
        run_ok("blockdev", &["--flushbufs", volume.to_str().unwrap()]);
    }
    let pair = Pair::new();
    let replicas = pair.protect("mix", &volumes);
    pair.wait_protected("mix", LIMIT);
    let mut rng = seed.rng();
    for _ in 0..60 {
        for volume in volumes {
            let offset = rng.random_range(0..15u64 << 8) * 4096;
            let length = rng.random_range(1..200u64) * 4096;
            let (o, l) = (offset.to_string(), length.to_string());
            let volume = volume.to_str().unwrap();
            match rng.random_range(0..3) {
                0 => run_ok("blkdiscard", &["-f", "-o", &o, "-l", &l, volume]),
                1 => run_ok("blkdiscard", &["-f", "-z", "-o", &o, "-l", &l, volume]),
                _ => run_ok("fallocate", &["-p", "-o", &o, "-l", &l, volume]),
            };
        }
    }
    // The last sector of the odd one.
    let last = OpenOptions::new().write(true).custom_flags(nix::libc::O_DIRECT).open(odd.path()).unwrap();
    let aligned = Aligned::new(512, 0x5a);
    last.write_all_at(&aligned, (17 << 20) + 512 * 2).unwrap();
    assert_equal(&pair, "mix", &volumes, &replicas);
    assert_eq!(std::fs::metadata(&replicas[0]).unwrap().len(), (17 << 20) + 512 * 3);
    use std::os::unix::fs::MetadataExt;
    let allocated = std::fs::metadata(&replicas[1]).unwrap().blocks() * 512;
    assert!(allocated < 16 << 20, "discards make holes in the replica: {allocated} bytes are allocated");
}

#[test]
fn writes_that_fail_leave_no_difference() {
    require_root();
    let scratch = Scratch::memory();
    let full = FullTmpfs::new(&scratch, "full", 48 << 20);
    let backing = full.path().join("disk");
    std::fs::File::create(&backing).unwrap().set_len(32 << 20).unwrap();
    let device = LoopDevice::over(&backing, LoopOptions::default());
    let pair = Pair::new();
    let replicas = pair.protect("failing", &[device.path()]);
    pair.wait_protected("failing", LIMIT);
    full.fill(2 << 20);
    let result = Fio::new(device.path()).block("64k").depth(8).seconds(2).ignore_errors().run_failing(&scratch);
    assert!(result.errors > 0 || result.fatal_errno != 0, "the tmpfs was full, so writes failed: {result:?}");
    // One that the driver rejects: its payload is seen all the same.
    let misaligned = OpenOptions::new().write(true).custom_flags(nix::libc::O_DIRECT).open(device.path()).unwrap();
    let outcome = misaligned.write_at(&Aligned::new(4096, 0x77)[1..513], 0);
    eprintln!("misaligned write: {outcome:?}");
    full.free();
    wait_until(LIMIT, "the failed extents were sent", || {
        let group = pair.production.group("failing").unwrap();
        group["data"] == "protected" && group["counters"]["failed_writes"].as_u64().unwrap() > 0
    });
    assert_equal(&pair, "failing", &[device.path()], &replicas);
}

/// A disk that fails some writes with EIO in the midst of others, over and over: what it holds is read again, nothing else
/// is, and each good stretch between two gaps keeps its points.
#[test]
fn a_disk_that_fails_some_writes() {
    require_root();
    let seed = Seed::new();
    let scratch = Scratch::memory();
    let trigger = scratch.join("failing");
    let file = format!("error-pwrite-file={}", trigger.display());
    let parameters = ["error-pwrite=EIO", "error-pwrite-rate=5%", file.as_str()];
    let device = SlowDevice::with_filters(&scratch, "disk", 48 << 20, &["error"], &parameters);
    let pair = Pair::new();
    let replicas = pair.protect("eio", &[device.path()]);
    pair.wait_protected("eio", LIMIT);
    let counter = |name: &str| pair.production.group("eio").unwrap()["counters"][name].as_u64().unwrap();
    let mut points = Vec::new();
    let probes = counter("probes");
    for round in 0..3 {
        let name = format!("good{round}");
        pair.production.varve(&["bookmark", "eio", &name]).ok();
        points.push((name, digest_device(device.path())));
        let failed = counter("failed_writes");
        let load = Fio::new(device.path()).block("4k-64k").option("size=8m").depth(4).seed(seed.number() + round);
        let load = load.rate(4 << 20).seconds(600).ignore_errors().start(&scratch);
        std::fs::write(&trigger, "").unwrap();
        wait_until(LIMIT, "writes fail", || counter("failed_writes") > failed + 5);
        std::fs::remove_file(&trigger).unwrap();
        load.stop();
        wait_until(LIMIT, "what failed was read again", || {
            pair.production.group("eio").unwrap()["data"] == "protected"
        });
        assert_equal(&pair, "eio", &[device.path()], &replicas);
    }
    // Eight regions are written; the forty others are not looked at. A region may be read as often as a write in it fails.
    assert!(counter("image_bytes") <= counter("failed_writes") * (2 << 20) && counter("probes") > probes);
    let status = pair.recovery.group("eio").unwrap();
    let reasons: Vec<&str> =
        status["gaps"].as_array().unwrap().iter().filter_map(|gap| gap["reason"].as_str()).collect();
    assert!(reasons.contains(&"failed-write"), "{reasons:?}");
    for (name, digest) in points {
        let to = scratch.join("restored");
        let at = format!("bookmark:{name}");
        let path = to.to_str().unwrap();
        pair.recovery.varve(&["restore", "eio", "--at", &at, "--volume", "0", "--to", path]).ok();
        assert_eq!(digest_device(&to), digest, "{name}");
        std::fs::remove_file(to).unwrap();
    }
}

#[test]
fn the_receiver_dies_and_comes_back() {
    require_root();
    let seed = Seed::new();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 64 << 20);
    let mut pair = Pair::new();
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let load =
        Fio::new(device.path()).block("4k-64k").depth(4).rate(8 << 20).seed(seed.number()).seconds(60).start(&scratch);
    for _ in 0..3 {
        let before = pair.production.group("db").unwrap()["counters"]["sessions"].as_u64().unwrap();
        pair.recovery.kill(Role::Receiver);
        pair.recovery.start(Role::Receiver);
        wait_until(LIMIT, "a new session", || {
            pair.production.group("db").unwrap()["counters"]["sessions"].as_u64().unwrap() > before
        });
        pair.wait_protected("db", LIMIT);
    }
    load.stop();
    let group = pair.production.group("db").unwrap();
    assert_eq!(group["counters"]["gaps"], 1, "only the first sync: {group:#}");
    assert_equal(&pair, "db", &[device.path()], &replicas);
}

#[test]
fn the_agent_dies_and_comes_back() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 32 << 20);
    let mut pair = Pair::new();
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    pair.production.kill(Role::Agent);
    // Nobody sees these.
    Fio::new(device.path()).block("4k").option("number_ios=500").run(&scratch);
    pair.production.start(Role::Agent);
    pair.wait_protected("db", LIMIT);
    let counters = pair.production.group("db").unwrap()["counters"].clone();
    assert_eq!((&counters["captured_records"], &counters["image_bytes"]), (&500.into(), &0.into()), "{counters:#}");
    assert_equal(&pair, "db", &[device.path()], &replicas);
}

/// Ring full: the writer is not held, the gap has a reason, and it closes by itself.
#[test]
fn overflow_is_a_gap_and_heals() {
    require_root();
    let seed = Seed::new();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 64 << 20);
    let mut pair = Pair::with_agent_config("ring_mib = 4\n");
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    pair.recovery.signal(Role::Receiver, nix::sys::signal::Signal::SIGSTOP);
    Fio::new(device.path()).block("4k-256k").depth(8).seed(seed.number()).option("io_size=48m").run(&scratch);
    let group = pair.production.group("db").unwrap();
    assert!(group["counters"]["dropped_records"].as_u64().unwrap() > 0, "{group:#}");
    wait_until(LIMIT, "the gap is told", || {
        let group = pair.production.group("db").unwrap();
        group["data"] != "protected" && group["gap_reason"] == "ring-full"
    });
    pair.recovery.signal(Role::Receiver, nix::sys::signal::Signal::SIGCONT);
    pair.wait_protected("db", LIMIT);
    assert_equal(&pair, "db", &[device.path()], &replicas);
    let gaps = pair.production.group("db").unwrap()["gaps"].clone();
    assert_eq!(gaps[1]["reason"], "ring-full", "{gaps:#}");
    assert!(gaps[1]["to"].is_string(), "closed: {gaps:#}");
}

#[test]
fn verify_finds_and_mends_what_was_changed_behind_the_receivers_back() {
    require_root();
    let seed = Seed::new();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 48 << 20);
    let pair = Pair::new();
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let load = Fio::new(device.path())
        .block("4k-32k")
        .depth(4)
        .rate(10 << 20)
        .option("size=24m")
        .seed(seed.number())
        .seconds(60)
        .start(&scratch);
    // While writes go on: no false alarm.
    let clean = pair.production.varve(&["verify", "db", "--json"]).ok().json_lines();
    let clean = clean.last().unwrap();
    assert_eq!(clean["differing_bytes"], 0, "{clean:#}");
    // A flipped block that nobody writes to.
    let replica = OpenOptions::new().read(true).write(true).open(&replicas[0]).unwrap();
    replica.write_all_at(&[0xee; 4096], 40 << 20).unwrap();
    replica.sync_all().unwrap();
    let found = pair.production.varve(&["verify", "db", "--json"]);
    assert_eq!(found.code, 1, "a difference is a failure: {found:?}");
    let found = found.json_lines();
    let found = found.last().unwrap();
    assert_eq!(found["differing_bytes"], 65536, "{found:#}");
    assert_eq!(found["extents"][0][1], 40 << 20, "{found:#}");
    pair.recovery.varve(&["verify", "db", "--repair", "--json"]);
    pair.wait_protected("db", LIMIT);
    load.stop();
    assert_equal(&pair, "db", &[device.path()], &replicas);
}

#[test]
fn a_bookmark_has_an_exact_place() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 16 << 20);
    let pair = Pair::new();
    pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let first = pair.production.varve(&["bookmark", "db", "one", "--json"]).ok().json();
    Fio::new(device.path()).block("4k").option("number_ios=10").run(&scratch);
    let second = pair.production.varve(&["bookmark", "db", "two", "--json"]).ok().json();
    let offset = |reply: &serde_json::Value| -> u64 {
        reply["position"].as_str().unwrap().split_once(':').unwrap().1.parse().unwrap()
    };
    assert!(offset(&second) - offset(&first) >= 10 * 4096, "{first} {second}");
    assert_eq!(second["durable"], true);
}

/// What the first half of a sync has brought is not sent again.
#[test]
fn a_half_written_first_sync_goes_on() {
    require_root();
    let seed = Seed::new();
    let scratch = Scratch::memory();
    let bytes = 64 << 20;
    let slow = SlowDevice::new(&scratch, "slow", bytes, Duration::from_millis(40), Duration::ZERO);
    let mut content = vec![0; bytes as usize];
    seed.rng().fill(&mut content[..]);
    OpenOptions::new().write(true).open(slow.path()).unwrap().write_all_at(&content, 0).unwrap();
    run_ok("blockdev", &["--flushbufs", slow.path().to_str().unwrap()]);
    let mut pair = Pair::new();
    let replicas = pair.protect("half", &[slow.path()]);
    let done = |pair: &Pair| {
        let group = pair.production.group("half").unwrap();
        group["resync"]["done_bytes"].as_u64().unwrap_or(0)
    };
    wait_until(LIMIT, "a third is done", || done(&pair) > bytes / 3);
    pair.recovery.kill(Role::Receiver);
    assert_ne!(pair.production.group("half").unwrap()["data"], "protected");
    pair.recovery.start(Role::Receiver);
    pair.wait_protected("half", LIMIT);
    let sent = pair.production.group("half").unwrap()["counters"]["image_bytes"].as_u64().unwrap();
    assert!(sent < bytes + bytes / 2, "{sent} bytes of images for a volume of {bytes}: it started over");
    assert_equal(&pair, "half", &[slow.path()], &replicas);
}

#[test]
fn a_replica_may_be_a_block_device() {
    require_root();
    let seed = Seed::new();
    let scratch = Scratch::memory();
    let volume = LoopDevice::new(&scratch, "volume", 32 << 20);
    let replica = LoopDevice::new(&scratch, "replica", 32 << 20);
    // Left-overs of an earlier life must go, zeroes included.
    OpenOptions::new().write(true).open(replica.path()).unwrap().write_all_at(&[0xcc; 9 << 20], 4 << 20).unwrap();
    run_ok("blockdev", &["--flushbufs", replica.path().to_str().unwrap()]);
    let pair = Pair::new();
    let (from, to) = (volume.path().to_str().unwrap(), replica.path().to_str().unwrap());
    pair.production.varve(&["protect", "device", from, "--replica", to]).ok();
    pair.wait_protected("device", LIMIT);
    Fio::new(volume.path())
        .block("512-128k")
        .option("blockalign=512")
        .depth(4)
        .seed(seed.number())
        .seconds(3)
        .run(&scratch);
    run_ok("blkdiscard", &["-f", "-o", "1048576", "-l", "3145728", from]);
    assert_equal(&pair, "device", &[volume.path()], &[replica.path().to_owned()]);
}
