//! The fixtures themselves: do they make what they say, and is all of it gone afterwards?
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::libc::O_DIRECT;
use varve_tests::{
    Filesystem, Fio, FullTmpfs, Installation, LoopDevice, LoopOptions, MIB, Mount, Postgres, Role, Scratch, Seed,
    SlowDevice, judge, logical_sector_bytes, run_ok, size_bytes, wait_until,
};

fn pattern(bytes: u64) -> Vec<u8> {
    (0..bytes).map(|at| (at * 31 / 8) as u8).collect()
}

/// What the kernel knows of paths below `path`: mounts and loop devices.
fn traces(path: &Path) -> String {
    let word = path.display().to_string();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let loops = run_ok("losetup", &["--list"]);
    mounts.lines().chain(loops.lines()).filter(|line| line.contains(&word)).collect()
}

#[test]
fn loop_device_has_what_was_asked_and_is_gone_after() {
    let scratch = Scratch::memory();
    let backing = scratch.file("disk", 64 * MIB);
    {
        let device = LoopDevice::over(&backing, LoopOptions { sector_bytes: 4096, ..LoopOptions::default() });
        assert_eq!(logical_sector_bytes(device.path()), 4096);
        assert_eq!(size_bytes(device.path()), 64 * MIB);
        File::options().write(true).open(device.path()).unwrap().write_all(&pattern(8192)).unwrap();
        device.resize(96 * MIB);
        assert_eq!(size_bytes(device.path()), 96 * MIB);
    }
    {
        let device = LoopDevice::over(&backing, LoopOptions { read_only: true, ..LoopOptions::default() });
        let refused = File::options().write(true).open(device.path()).and_then(|mut file| file.write_all(&[1; 512]));
        assert!(refused.is_err(), "a read-only device took a write");
    }
    assert_eq!(traces(scratch.path()), "");
}

#[test]
fn partitions_show_up() {
    let scratch = Scratch::memory();
    let options = LoopOptions { partscan: true, ..LoopOptions::default() };
    let device = LoopDevice::over(&scratch.file("disk", 64 * MIB), options);
    let parts = device.partition("size=16MiB\nsize=8MiB");
    let sizes: Vec<u64> = parts.iter().map(|part| size_bytes(part)).collect();
    assert_eq!(sizes, [16 * MIB, 8 * MIB]);
}

#[test]
fn every_filesystem_mounts_freezes_checks_and_unmounts() {
    let scratch = Scratch::memory();
    for filesystem in Filesystem::ALL {
        let name = format!("{filesystem:?}");
        let device = LoopDevice::new(&scratch, &format!("{name}.img"), Filesystem::BYTES_MIN);
        let mount = Mount::format(&scratch, &name, filesystem, device.path());
        std::fs::write(mount.path().join("file"), pattern(MIB)).unwrap();
        mount.sync();
        let (before, after) = mount.frozen(|| {
            let before = judge::digest_device(device.path());
            std::thread::sleep(Duration::from_millis(100));
            (before, judge::digest_device(device.path()))
        });
        assert_eq!(before, after, "{name} wrote while frozen");
        mount.unmount();
        filesystem.check(device.path()).unwrap();
    }
    assert_eq!(traces(scratch.path()), "");
}

#[test]
fn judge_sees_one_bit_a_length_and_what_a_filesystem_writes() {
    let scratch = Scratch::memory();
    let (left, right) = (scratch.join("left"), scratch.join("right"));
    let mut bytes = pattern(5 * MIB + 513);
    std::fs::write(&left, &bytes).unwrap();
    bytes[3_000_001] ^= 0x10;
    std::fs::write(&right, &bytes).unwrap();
    let found = judge::compare_devices(&left, &right).unwrap_err();
    assert_eq!((found.first_offset, found.blocks), (3_000_001, 1));
    assert_eq!(found.block_offsets, [3_000_001 / 4096 * 4096]);

    std::fs::copy(&left, &right).unwrap();
    judge::compare_devices(&left, &right).unwrap();
    assert_eq!(judge::digest_device(&left), run_ok("sha256sum", &[&left]).split(' ').next().unwrap());
    File::options().append(true).open(&right).unwrap().write_all(&[0]).unwrap();
    let found = judge::compare_devices(&left, &right).unwrap_err();
    assert_eq!(found.first_offset, 5 * MIB + 513);

    // A mounted filesystem writes below the page cache that an ordinary read of the device fills.
    let device = LoopDevice::new(&scratch, "disk", 64 * MIB);
    let mount = Mount::format(&scratch, "mount", Filesystem::Ext4, device.path());
    let mut keeps_cache = File::open(device.path()).unwrap();
    keeps_cache.read_to_end(&mut Vec::new()).unwrap();
    let before = judge::digest_device(device.path());
    std::fs::write(mount.path().join("file"), pattern(8 * MIB)).unwrap();
    mount.sync();
    assert_ne!(before, judge::digest_device(device.path()));
    mount.frozen(|| judge::assert_same(device.path(), device.backing()));
}

#[test]
fn slow_device_keeps_requests_in_flight_and_goes_away() {
    let scratch = Scratch::memory();
    {
        let delay = Duration::from_millis(250);
        let device = SlowDevice::new(&scratch, "slow", 64 * MIB, delay, delay);
        let file = File::options().write(true).custom_flags(O_DIRECT).open(device.path()).unwrap();
        let buffer = vec![7u8; 3 * 4096];
        let from = buffer.as_ptr().align_offset(4096);
        let start = Instant::now();
        file.write_all_at(&buffer[from..from + 4096], 0).unwrap();
        assert!(start.elapsed() >= delay, "a write took {:?} only", start.elapsed());

        // About five are in flight at a time (nbdfuse); one after the other would take 8 seconds.
        let start = Instant::now();
        let result = Fio::new(device.path()).depth(16).option("number_ios=32").run(&scratch);
        assert_eq!(result.writes, 32);
        assert!(start.elapsed() < 24 * delay, "32 writes took {:?}", start.elapsed());
    }
    assert_eq!(traces(scratch.path()), "");
}

#[test]
fn full_tmpfs_fails_the_writes_of_a_loop_device() {
    let scratch = Scratch::memory();
    let full = FullTmpfs::new(&scratch, "full", 8 * MIB);
    let backing = full.path().join("disk");
    File::create(&backing).unwrap().set_len(32 * MIB).unwrap();
    let device = LoopDevice::over(&backing, LoopOptions::default());
    full.fill(MIB);
    let job = Fio::new(device.path()).block("64k").option("rw=write").option("size=16m");
    let failing = job.run_failing(&scratch);
    assert_eq!(failing.fatal_errno, nix::libc::ENOSPC as u64, "{failing:?}");
    let going_on = job.clone().ignore_errors().run_failing(&scratch);
    assert!(going_on.errors > 0 && going_on.writes == 256, "{going_on:?}");
    full.free();
    assert_eq!(job.option("size=4m").run(&scratch).writes, 64);
}

#[test]
fn fio_counts_and_stops() {
    let scratch = Scratch::memory();
    let seed = Seed::new();
    let device = LoopDevice::new(&scratch, "disk", 32 * MIB);
    let result = Fio::new(device.path()).seed(seed.number()).option("size=4m").run(&scratch);
    assert_eq!(result.writes, 1024);
    assert!(result.write_iops > 0.0 && result.write_p50 > Duration::ZERO && result.write_p99 >= result.write_p50);

    let mut run = Fio::new(device.path()).block("512-64k").depth(4).rate(MIB).seconds(60).start(&scratch);
    let stat = PathBuf::from("/sys/block").join(device.path().file_name().unwrap()).join("stat");
    let writes = || std::fs::read_to_string(&stat).unwrap().split_whitespace().nth(4).unwrap().parse::<u64>().unwrap();
    let before = writes();
    wait_until(Duration::from_secs(20), "it writes", || writes() > before + 20);
    assert!(run.running());
    let start = Instant::now();
    assert!(run.stop().writes > 0);
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn postgres_runs_on_a_volume_and_survives_a_copy_of_it() {
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "disk", 512 * MIB);
    let mount = Mount::format(&scratch, "mount", Filesystem::Ext4, device.path());
    let postgres = Postgres::create(&scratch, &mount.path().join("data"));
    postgres.pgbench_init(1);
    let mut load = postgres.pgbench_start(2, 60);
    wait_until(Duration::from_secs(20), "transactions happen", || {
        postgres.query("SELECT count(*) FROM pgbench_history") != "0"
    });
    assert!(load.running());

    // A frozen volume's copy is crash-consistent: the database recovers on it.
    let copy = scratch.join("copy");
    mount.frozen(|| std::fs::copy(device.backing(), &copy).unwrap());
    load.stop();
    let copied = LoopDevice::over(&copy, LoopOptions::default());
    let second = Mount::existing(&scratch, "second", copied.path(), "defaults");
    let restored = Postgres::open(&scratch, &second.path().join("data"));
    assert_ne!(restored.query("SELECT count(*) FROM pgbench_history"), "0");
    restored.stop();
    postgres.stop();
    second.unmount();
    mount.unmount();
    assert_eq!(traces(scratch.path()).matches("/mnt").count(), 0);
}

/// A stand-in for a daemon: says READY after a moment, logs, ends on SIGTERM.
const STUB: &str = r#"#!/bin/sh
trap 'exit 0' TERM
echo " INFO root is $VARVE_ROOT"
[ -n "$FAIL" ] && { echo " ERROR no"; exit 3; }
perl -MIO::Socket::UNIX -e 'sleep 1; IO::Socket::UNIX->new(Type => SOCK_DGRAM, Peer => $ENV{NOTIFY_SOCKET})->send("STATUS=x\nREADY=1")'
while :; do sleep 0.1; done
"#;

#[test]
fn installation_starts_kills_and_cleans() {
    let programs = Scratch::disk();
    for name in ["varve", "varve-agent", "varve-receiver"] {
        let path = programs.join(name);
        let text =
            if name == "varve" { "#!/bin/sh\necho \"{\\\"root\\\": \\\"$VARVE_ROOT\\\"}\"; exit 5\n" } else { STUB };
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut install = Installation::with_programs(programs.path());
    let root = install.root().to_owned();
    assert_eq!(install.varve(&["status"]).expect_code(5).json()["root"], root.to_str().unwrap());

    let start = Instant::now();
    install.start(Role::Agent);
    assert!(start.elapsed() >= Duration::from_secs(1), "did not wait for READY=1");
    assert!(install.log(Role::Agent).contains(root.to_str().unwrap()));
    assert!(install.resident_bytes(Role::Agent) > 0);
    let agent = install.pid(Role::Agent);
    install.restart(Role::Agent);
    assert_ne!(agent, install.pid(Role::Agent));
    install.kill(Role::Agent);
    assert!(!install.running(Role::Agent));

    install.set_env("FAIL", "1");
    assert_eq!(install.try_start(Role::Receiver), Err(3));
    assert_eq!(install.unexpected(Role::Receiver, &[]), [" ERROR no"]);
    assert!(install.unexpected(Role::Receiver, &["ERROR no"]).is_empty());

    install.set_env("FAIL", "");
    install.start(Role::Receiver);
    let receiver = install.pid(Role::Receiver);
    // A bpffs with pins would be mounted below the root like this.
    let point = root.join("bpf");
    std::fs::create_dir(&point).unwrap();
    run_ok("mount", &["-t", "tmpfs", "tmpfs", point.to_str().unwrap()]);
    drop(install);
    assert!(!root.exists());
    assert_eq!(traces(&root), "");
    assert!(!Path::new(&format!("/proc/{receiver}")).exists());
}

#[test]
#[should_panic(expected = "in vain: the moon is full")]
fn waiting_says_for_what() {
    wait_until(Duration::from_millis(50), "the moon is full", || false);
}
