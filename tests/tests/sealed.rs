//! A clean stop leaves a proof that nobody wrote since: with it a new ring goes on where the last one ended, and nothing is
//! compared. Each way in which somebody may have written breaks it.
//!
//! A machine cannot be booted here, so capture is taken away by hand (`varve-agent --unpin-all`), which leaves what a boot leaves
//! but the kernel's counters; tests/vm/boots.rs has the boots.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(90);
const GROUP: &str = "db";
const BYTES: u64 = 320 * MIB;
const NOT_COMPARED: &str = "nothing is compared";

/// A group of one volume for each file system, each with a file, unmounted; protected.
struct Bench {
    pair: Pair,
    devices: Vec<LoopDevice>,
    replicas: Vec<PathBuf>,
    scratch: Scratch,
    written: u32,
}

impl Bench {
    fn new(filesystems: &[Filesystem], config: &str) -> Self {
        require_root();
        let scratch = Scratch::memory();
        let pair = Pair::with_agent_config(config);
        let device = |number: usize| LoopDevice::new(&scratch, &format!("volume-{number}"), BYTES);
        let devices: Vec<LoopDevice> = (0..filesystems.len()).map(device).collect();
        for (device, filesystem) in devices.iter().zip(filesystems) {
            filesystem.make(device.path());
        }
        let paths: Vec<&Path> = devices.iter().map(LoopDevice::path).collect();
        let replicas = pair.protect(GROUP, &paths);
        pair.wait_protected(GROUP, LIMIT);
        let mut bench = Bench { pair, devices, replicas, scratch, written: 0 };
        bench.write();
        bench
    }

    /// A new file on every volume, as a service does that is started and stopped.
    fn write(&mut self) {
        self.written += 1;
        for device in &self.devices {
            let mount = Mount::existing(&self.scratch, "mnt", device.path(), "defaults");
            let bytes = vec![self.written as u8; 300_000];
            std::fs::write(mount.path().join(format!("file-{}", self.written)), bytes).unwrap();
            mount.unmount();
        }
    }

    /// Stops the agent, takes capture away, does something, and starts the agent.
    fn boot(&mut self, meanwhile: impl FnOnce(&mut Self)) {
        self.pair.production.stop(Role::Agent);
        run(self.pair.production.command(Role::Agent).arg("--unpin-all")).ok();
        meanwhile(self);
        self.pair.production.start(Role::Agent);
    }

    fn group(&self) -> Value {
        self.pair.production.group(GROUP).unwrap()
    }

    #[track_caller]
    fn assert_equal(&self) {
        self.pair.wait_protected(GROUP, LIMIT);
        self.pair.wait_applied(GROUP, LIMIT);
        for (device, replica) in self.devices.iter().zip(&self.replicas) {
            assert_same(device.path(), replica);
        }
    }

    /// Protected and equal, without a look at any region.
    #[track_caller]
    fn assert_not_compared(&self) {
        self.pair.wait_protected(GROUP, LIMIT);
        let group = self.group();
        assert_eq!(group["counters"]["probes"], 0, "{group:#}");
        assert!(group["ring"]["origin"].as_str().unwrap().contains(NOT_COMPARED), "{group:#}");
        self.assert_equal();
    }

    /// All was compared, for this reason; and it is equal.
    #[track_caller]
    fn assert_compared(&self, why: &str) {
        self.pair.wait_protected(GROUP, LIMIT);
        let group = self.group();
        let regions = BYTES / MIB * self.devices.len() as u64;
        assert!(group["counters"]["probes"].as_u64().unwrap() >= regions, "{group:#}");
        let origin = group["ring"]["origin"].as_str().unwrap();
        assert!(origin.contains(why) && !origin.contains(NOT_COMPARED), "{why}: {origin}");
        self.assert_equal();
    }
}

#[test]
fn nobody_wrote_and_nothing_is_compared() {
    let mut bench = Bench::new(&[Filesystem::Ext4, Filesystem::Xfs, Filesystem::Btrfs], "");
    for round in 0..3 {
        bench.pair.wait_applied(GROUP, LIMIT);
        let name = format!("before-{round}");
        bench.pair.production.varve(&["bookmark", GROUP, &name]).ok();
        let ring = bench.group()["captured"].as_str().unwrap().to_owned();
        bench.boot(|_| ());
        bench.assert_not_compared();
        assert_ne!(bench.group()["captured"].as_str().unwrap().split(':').next(), ring.split(':').next(), "a new ring");
        // What is written from now on, and what was before, are points as always.
        bench.write();
        bench.assert_equal();
        let points = bench.pair.recovery.varve(&["points", GROUP, "--json"]).ok().json();
        let gaps = points["gaps"].as_array().unwrap();
        assert!(gaps.iter().all(|gap| gap["to"].is_string()), "{gaps:#?}");
        let at = format!("bookmark:{name}");
        let view = bench.pair.recovery.varve(&["view", "open", GROUP, "--at", &at, "--json"]).ok().json();
        let device = view["volumes"][0]["device"].as_str().unwrap();
        Filesystem::Ext4.check(Path::new(device)).unwrap();
        bench.pair.recovery.varve(&["view", "close", &view["id"].to_string()]).ok();
    }
    let verify = bench.pair.production.varve(&["verify", GROUP, "--json"]).ok().json_lines();
    assert_eq!(verify.last().unwrap()["differing_bytes"], 0, "{verify:#?}");
}

/// What waits in the journal is sent before the new ring begins.
#[test]
fn what_was_not_sent_before_the_stop_comes_from_the_journal() {
    let mut bench = Bench::new(&[Filesystem::Ext4], "");
    bench.pair.wait_applied(GROUP, LIMIT);
    bench.pair.recovery.stop(Role::Receiver);
    bench.write();
    bench.boot(|_| ());
    // Nobody may say that all is well before the receiver was asked.
    assert_ne!(bench.group()["data"], "protected");
    bench.pair.recovery.start(Role::Receiver);
    bench.assert_not_compared();
}

#[test]
fn whoever_wrote_is_found() {
    let mut bench = Bench::new(&[Filesystem::Ext4, Filesystem::Xfs], "");
    // Beside the file system: the kernel counts.
    bench.boot(|bench| {
        let device = std::fs::File::options().write(true).open(bench.devices[1].path()).unwrap();
        device.write_all_at(&[7; 4096], BYTES - 8192).unwrap();
        device.sync_all().unwrap();
    });
    bench.assert_compared("was written to before capture began");
    // Through a file system.
    bench.boot(Bench::write);
    bench.assert_compared("was written to before capture began");
    // Where this device's counters see nothing: on another machine, in another boot.
    for number in 0..2 {
        bench.boot(|bench| {
            let other = LoopDevice::over(bench.devices[number].backing(), LoopOptions::default());
            let options = if number == 1 { "nouuid" } else { "defaults" };
            let mount = Mount::existing(&bench.scratch, "elsewhere", other.path(), options);
            std::fs::write(mount.path().join("elsewhere"), [9; 50_000]).unwrap();
            mount.unmount();
        });
        bench.assert_compared("was mounted or mended since");
    }
    // Mounted when the agent stopped: what was in the page cache nobody knows.
    let mount = Mount::existing(&bench.scratch, "mnt", bench.devices[0].path(), "defaults");
    std::fs::write(mount.path().join("late"), [5; 10_000]).unwrap();
    bench.boot(|_| ());
    bench.pair.wait_protected(GROUP, LIMIT);
    assert!(bench.group()["counters"]["probes"].as_u64().unwrap() >= 2 * BYTES / MIB);
    mount.unmount();
    bench.assert_equal();
}

/// A seal counts once, for the next begin of capture only.
#[test]
fn a_seal_counts_once() {
    let mut bench = Bench::new(&[Filesystem::Ext4], "");
    bench.pair.wait_applied(GROUP, LIMIT);
    bench.pair.recovery.stop(Role::Receiver);
    bench.boot(|_| ());
    // It has begun to capture, and is killed before the receiver has heard of it; its ring is lost with what was written.
    bench.write();
    bench.pair.production.kill(Role::Agent);
    run(bench.pair.production.command(Role::Agent).arg("--unpin-all")).ok();
    bench.pair.production.start(Role::Agent);
    bench.pair.recovery.start(Role::Receiver);
    bench.pair.wait_protected(GROUP, LIMIT);
    assert!(bench.group()["counters"]["probes"].as_u64().unwrap() >= BYTES / MIB);
    bench.assert_equal();
    // The same with a ring that stays.
    bench.pair.recovery.stop(Role::Receiver);
    bench.boot(|_| ());
    bench.write();
    bench.pair.production.kill(Role::Agent);
    bench.pair.production.start(Role::Agent);
    bench.pair.recovery.start(Role::Receiver);
    bench.assert_equal();
}

/// The receiver has other things to say: its replica was rolled back, or the ring was too small meanwhile.
#[test]
fn a_receiver_that_stands_elsewhere_is_compared() {
    let mut bench = Bench::new(&[Filesystem::Ext4], "ring_mib = 16\njournal_max_mib = 64\n");
    bench.pair.wait_applied(GROUP, LIMIT);
    bench.pair.production.varve(&["bookmark", GROUP, "old"]).ok();
    bench.write();
    bench.pair.wait_applied(GROUP, LIMIT);
    bench.boot(|bench| {
        let recovery = &bench.pair.recovery;
        wait_until(LIMIT, "the session has ended", || recovery.group(GROUP).unwrap()["link"] == "disconnected");
        recovery.varve(&["rollback", GROUP, "--at", "bookmark:old", "--yes"]).ok();
        recovery.varve(&["rollback", GROUP, "--release", "--yes"]).ok();
    });
    bench.assert_compared("the receiver does not stand where the agent stopped");
    // More than the ring holds is written before the receiver is there again.
    bench.pair.recovery.stop(Role::Receiver);
    bench.boot(|_| ());
    Fio::new(bench.devices[0].path()).block("64k").option("size=48m").option("io_size=48m").run(&bench.scratch);
    bench.pair.recovery.start(Role::Receiver);
    bench.assert_compared("capture has not seen all since it began");
}

/// A disk whose partition is protected: what is written through the disk as a whole is counted for no partition.
#[test]
fn a_partition_is_written_to_through_its_disk() {
    require_root();
    let scratch = Scratch::memory();
    let disk = LoopDevice::over(&scratch.file("disk", BYTES), LoopOptions { partscan: true, ..LoopOptions::default() });
    let parts = disk.partition("size=100MiB\nsize=100MiB");
    let mut pair = Pair::with_agent_config("");
    for part in &parts {
        Filesystem::Ext4.make(part);
    }
    let replicas = pair.protect(GROUP, &[&parts[0]]);
    pair.wait_protected(GROUP, LIMIT);
    let boot = |pair: &mut Pair, write: &dyn Fn()| {
        pair.wait_applied(GROUP, LIMIT);
        pair.production.stop(Role::Agent);
        run(pair.production.command(Role::Agent).arg("--unpin-all")).ok();
        write();
        pair.production.start(Role::Agent);
        pair.wait_protected(GROUP, LIMIT);
        pair.wait_applied(GROUP, LIMIT);
        assert_same(&parts[0], &replicas[0]);
        pair.production.group(GROUP).unwrap()["ring"]["origin"].as_str().unwrap().to_owned()
    };
    let origin = boot(&mut pair, &|| ());
    assert!(origin.contains(NOT_COMPARED), "{origin}");
    // The other partition is nobody's business, nor is a flush of the disk.
    let origin = boot(&mut pair, &|| {
        let other = std::fs::File::options().write(true).open(&parts[1]).unwrap();
        other.write_all_at(&[3; 4096], 50 * MIB).unwrap();
        other.sync_all().unwrap();
    });
    assert!(origin.contains(NOT_COMPARED), "{origin}");
    let origin = boot(&mut pair, &|| {
        let whole = std::fs::File::options().write(true).open(disk.path()).unwrap();
        whole.write_all_at(&[7; 4096], 60 * MIB).unwrap();
        whole.sync_all().unwrap();
    });
    assert!(origin.contains("was written to around its partitions"), "{origin}");
    // A disk with partitions is no volume with marks.
    pair.production.varve(&["unprotect", GROUP, "--yes"]).ok();
    pair.production.varve(&["protect", "whole", disk.path().to_str().unwrap()]).ok();
    pair.wait_protected("whole", LIMIT);
    pair.production.stop(Role::Agent);
    run(pair.production.command(Role::Agent).arg("--unpin-all")).ok();
    pair.production.start(Role::Agent);
    pair.wait_protected("whole", LIMIT);
    let origin = pair.production.group("whole").unwrap()["ring"]["origin"].as_str().unwrap().to_owned();
    assert!(origin.contains("a partition table as well"), "{origin}");
}
