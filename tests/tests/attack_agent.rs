//! The production side under attack: whatever happens to it, nothing is lost silently and nothing is called protected
//! that is not.
//!
//! The pair is declared after the devices, so that it drops first: the agent lets go of them.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use nix::sys::signal::Signal;
use std::time::{Duration, Instant};
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(60);

fn word(pair: &Pair, group: &str) -> String {
    pair.production.group(group).map_or_else(String::new, |group| group["data"].as_str().unwrap().to_owned())
}

#[test]
fn a_volume_that_shrinks_is_not_called_protected() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 32 << 20);
    let pair = Pair::new();
    pair.protect("shrinks", &[device.path()]);
    pair.wait_protected("shrinks", LIMIT);
    device.resize(16 << 20);
    wait_until(Duration::from_secs(15), "it is not called protected any more", || {
        word(&pair, "shrinks") != "protected"
    });
    std::thread::sleep(Duration::from_secs(3));
    let status = pair.production.group("shrinks").unwrap();
    assert_eq!(status["data"], "gap", "{status:#}");
    assert!(status["reason"].as_str().unwrap().contains("shrank"), "{status:#}");
    // It says so for good, and can be let go of.
    pair.production.varve(&["unprotect", "shrinks", "--yes"]).ok();
}

#[test]
fn a_bookmark_is_set_under_full_load() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 64 << 20);
    let pair = Pair::new();
    pair.protect("load", &[device.path()]);
    pair.wait_protected("load", LIMIT);
    let load = Fio::new(device.path()).block("4k").depth(8).rate(40 << 20).seconds(12).start(&scratch);
    std::thread::sleep(Duration::from_secs(1));
    let mut worst = Duration::ZERO;
    for number in 0..10 {
        let began = Instant::now();
        let out = pair.production.varve(&["bookmark", "load", &format!("b{number}")]);
        worst = worst.max(began.elapsed());
        // Two cores may be too few for the load: then it is a gap, and no point of it gets a name.
        assert!(out.code == 0 || (out.code == 3 && word(&pair, "load") != "protected"), "{out:?}");
    }
    load.finish();
    assert!(worst < Duration::from_secs(15), "a bookmark took {worst:?}");
}

/// A journal's region is written all the time, several writes deep: the sync must get its turn in it.
#[test]
fn a_region_that_is_never_quiet_is_synced() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 16 << 20);
    let load =
        Fio::new(device.path()).option("size=1m").block("4k").depth(32).rate(20 << 20).seconds(30).start(&scratch);
    let pair = Pair::new();
    let replicas = pair.protect("hot", &[device.path()]);
    let took = pair.wait_protected("hot", Duration::from_secs(25));
    eprintln!("protected after {took:?}");
    load.finish();
    pair.wait_protected("hot", LIMIT);
    pair.wait_applied("hot", LIMIT);
    assert_same(device.path(), &replicas[0]);
}

#[test]
fn protect_and_unprotect_while_writes_are_in_flight() {
    require_root();
    let seed = Seed::new();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 24 << 20);
    let load = Fio::new(device.path())
        .block("512-128k")
        .option("blockalign=512")
        .depth(16)
        .seed(seed.number())
        .rate(20 << 20)
        .seconds(30)
        .start(&scratch);
    let pair = Pair::new();
    let mut replicas = pair.protect("again", &[device.path()]);
    for round in 0..8u64 {
        std::thread::sleep(Duration::from_millis(137 * round));
        pair.production.varve(&["unprotect", "again", "--yes"]).ok();
        replicas = pair.protect("again", &[device.path()]);
    }
    pair.wait_protected("again", LIMIT);
    load.finish();
    pair.wait_protected("again", LIMIT);
    pair.wait_applied("again", LIMIT);
    assert_same(device.path(), &replicas[0]);
    let verify = pair.production.varve(&["verify", "again", "--json"]).ok();
    let last = verify.json_lines().pop().unwrap();
    assert_eq!(last["verify"]["differing_bytes"].as_u64().or(last["differing_bytes"].as_u64()), Some(0), "{last:#}");
}

/// The receiver stands still, the ring is full: status says so, and neither unprotect nor SIGTERM waits for it.
#[test]
fn a_receiver_that_stands_still_holds_up_nothing() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 64 << 20);
    let other = LoopDevice::new(&scratch, "other", 8 << 20);
    let mut pair = Pair::with_agent_config("ring_mib = 4\n");
    pair.protect("stuck", &[device.path()]);
    pair.protect("second", &[other.path()]);
    pair.wait_protected("stuck", LIMIT);
    pair.wait_protected("second", LIMIT);
    pair.recovery.signal(Role::Receiver, Signal::SIGSTOP);
    Fio::new(device.path()).block("64k").depth(4).option("io_size=48m").run(&scratch);
    wait_until(Duration::from_secs(4), "the gap is in the status", || {
        matches!(word(&pair, "stuck").as_str(), "gap" | "resync")
    });
    let began = Instant::now();
    pair.production.varve(&["unprotect", "stuck", "--yes"]).ok();
    assert!(began.elapsed() < Duration::from_secs(15), "unprotect took {:?}", began.elapsed());
    let began = Instant::now();
    pair.production.stop(Role::Agent);
    assert!(began.elapsed() < Duration::from_secs(15), "SIGTERM took {:?}", began.elapsed());
    pair.recovery.signal(Role::Receiver, Signal::SIGCONT);
}
