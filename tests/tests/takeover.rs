//! A group that runs on the recovery host: nothing that was synced is lost, whatever ends the receiver; an abort leaves
//! replication as it was; an old source is fenced off and stays intact.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use rand::Rng;
use serde_json::Value;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;

fn device_of(reply: &Value, volume: usize) -> PathBuf {
    reply["volumes"][volume]["device"].as_str().unwrap_or_else(|| panic!("no device in {reply:#?}")).into()
}

/// The device of a group that was served again after a start.
fn served(pair: &Pair, group: &str) -> PathBuf {
    let start = Instant::now();
    loop {
        let status = pair.recovery.group(group).expect("the group");
        if let Some(device) = status["history"]["takeover"]["devices"][0].as_str() {
            return device.into();
        }
        assert!(start.elapsed() < LIMIT, "not served again: {status:#?}\n{}", pair.recovery.log(Role::Receiver));
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn failover(pair: &Pair, group: &str, at: &str) -> Value {
    pair.recovery.varve(&["failover", group, "--at", at, "--yes", "--json"]).ok().json()
}

fn wait_streaming(pair: &Pair, group: &str) {
    let start = Instant::now();
    while pair.production.group(group).is_none_or(|status| status["link"] != "streaming") {
        assert!(start.elapsed() < LIMIT, "{:#?}", pair.production.group(group));
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn taken_over_killed_served_again_and_aborted() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 128 << 20);
    let mount = Mount::format(&scratch, "mnt", Filesystem::Ext4, device.path());
    let mut pair = Pair::new();
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    std::fs::write(mount.path().join("file"), vec![7; 9 << 20]).unwrap();
    mount.sync();
    let before = mount.frozen(|| {
        pair.production.varve(&["bookmark", "db", "before"]).ok();
        digest_device(device.path())
    });
    pair.wait_applied("db", LIMIT);

    let plan = pair.recovery.varve(&["failover", "db", "--dry-run", "--json"]).ok().json();
    assert_eq!((&plan["dry_run"], &plan["epoch"]), (&Value::from(true), &Value::from(2)));
    assert_eq!(pair.recovery.group("db").unwrap()["role"], "replica", "a dry run changes nothing");
    let begin = Instant::now();
    let reply = failover(&pair, "db", "latest");
    assert!(begin.elapsed() < Duration::from_secs(20), "it took {:?}", begin.elapsed());
    let copy = Mount::existing(&scratch, "copy", &device_of(&reply, 0), "rw");
    assert_eq!(std::fs::read(copy.path().join("file")).unwrap(), vec![7; 9 << 20]);
    std::fs::write(copy.path().join("written-here"), "kept").unwrap();
    copy.sync();
    let busy = pair.recovery.varve(&["failover", "abort", "db", "--yes"]).expect_code(3);
    assert!(busy.stderr.contains("mounted"), "{}", busy.stderr);
    // The source is fenced off, told so, and its volume is as it was.
    let start = Instant::now();
    let told = |status: Value| status["reason"].as_str().is_some_and(|why| why.contains("taken over"));
    while !pair.production.group("db").is_some_and(told) {
        assert!(start.elapsed() < LIMIT, "{:#?}", pair.production.group("db"));
        std::thread::sleep(Duration::from_millis(50));
    }
    std::fs::write(mount.path().join("branch"), "not replicated").unwrap();
    mount.sync();

    pair.recovery.kill(Role::Receiver);
    drop(copy);
    pair.recovery.start(Role::Receiver);
    let copy = Mount::existing(&scratch, "again", &served(&pair, "db"), "rw");
    assert_eq!(std::fs::read_to_string(copy.path().join("written-here")).unwrap(), "kept");
    copy.unmount();
    pair.recovery.varve(&["failover", "abort", "db", "--yes"]).ok();
    wait_streaming(&pair, "db");
    pair.wait_protected("db", LIMIT);
    let status = pair.production.group("db").unwrap();
    let gaps: Vec<&str> = status["gaps"].as_array().unwrap().iter().filter_map(|gap| gap["reason"].as_str()).collect();
    assert_eq!(gaps, ["initial-sync"], "replication went on where it was: {status:#?}");
    let view = pair.recovery.varve(&["view", "open", "db", "--at", "bookmark:before", "--json"]).ok().json();
    assert_eq!(digest_device(&device_of(&view, 0)), before, "the old point is what it was");
    pair.recovery.varve(&["view", "close", &view["id"].to_string()]).ok();
    mount.unmount();
    pair.wait_applied("db", LIMIT);
    assert_same(device.path(), &replicas[0]);
}

#[test]
fn an_older_point_is_served_at_once_and_committed() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 96 << 20);
    let seed = Seed::new();
    let mut rng = seed.rng();
    let file = OpenOptions::new().write(true).custom_flags(nix::libc::O_SYNC).open(device.path()).unwrap();
    let pair = Pair::new();
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let mut scribble = |value: u8| {
        for _ in 0..200 {
            file.write_all_at(&[value; 16384], rng.random_range(0..96 << 6) * 16384).unwrap();
        }
    };
    scribble(1);
    pair.production.varve(&["bookmark", "db", "good"]).ok();
    let good = digest_device(device.path());
    scribble(2);
    scribble(3);
    pair.wait_applied("db", LIMIT);
    let reply = failover(&pair, "db", "bookmark:good");
    let promoted = device_of(&reply, 0);
    assert_eq!(digest_device(&promoted), good);
    let target = OpenOptions::new().write(true).custom_flags(nix::libc::O_SYNC).open(&promoted).unwrap();
    target.write_all_at(&[9; 4096], 40960).unwrap();
    drop(target);
    let start = Instant::now();
    while pair.recovery.group("db").unwrap()["data"] != "protected" {
        assert!(start.elapsed() < LIMIT, "{:#?}", pair.recovery.group("db"));
        std::thread::sleep(Duration::from_millis(100));
    }
    let served = digest_device(&promoted);
    assert_ne!(served, good);
    let late = pair.recovery.varve(&["view", "open", "db", "--at", "bookmark:good", "--json"]).ok().json();
    assert_eq!(digest_device(&device_of(&late, 0)), good, "the point is still what it was");
    pair.recovery.varve(&["view", "close", &late["id"].to_string()]).ok();
    pair.recovery.varve(&["failover", "commit", "db", "--yes"]).ok();
    let abort = pair.recovery.varve(&["failover", "abort", "db", "--yes"]).expect_code(3);
    assert!(abort.stderr.contains("failback"), "{}", abort.stderr);
    pair.recovery.varve(&["forget", "db", "--yes"]).expect_code(3);
    let latest = pair.recovery.varve(&["view", "open", "db", "--at", "latest", "--json"]).ok().json();
    assert_eq!(digest_device(&device_of(&latest, 0)), served, "what is written here has points, too");
    pair.recovery.varve(&["view", "close", &latest["id"].to_string()]).ok();
    assert_eq!(digest_device(&replicas[0]), served);
}

/// Every block says how often it was written. After a kill it holds the last count that was synced, or a later one.
#[test]
fn what_is_synced_on_a_promoted_volume_survives_every_kill() {
    require_root();
    let seed = Seed::new();
    let mut rng = seed.rng();
    let scratch = Scratch::disk();
    let blocks = 2048usize;
    let device = LoopDevice::new(&scratch, "volume", (blocks * BLOCK) as u64);
    let mut pair = Pair::new();
    pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let mut promoted = device_of(&failover(&pair, "db", "latest"), 0);
    let (mut synced, mut newest) = (vec![0u64; blocks], vec![0u64; blocks]);
    let mut count = 0u64;
    for round in 0..4 {
        let open = OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_DIRECT).open(&promoted).unwrap();
        for _ in 0..rng.random_range(50..400) {
            count += 1;
            let block = rng.random_range(0..blocks);
            let content = Aligned::filled(BLOCK, &count.to_le_bytes());
            open.write_all_at(&content, (block * BLOCK) as u64).unwrap();
            newest[block] = count;
            if rng.random_ratio(1, 16) {
                open.sync_data().unwrap();
                synced.clone_from(&newest);
            }
        }
        pair.recovery.kill(Role::Receiver);
        drop(open);
        pair.recovery.start(Role::Receiver);
        promoted = served(&pair, "db");
        let open = OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(&promoted).unwrap();
        let mut content = Aligned::filled(BLOCK, &[0]);
        for block in 0..blocks {
            open.read_exact_at(&mut content, (block * BLOCK) as u64).unwrap();
            let found = u64::from_le_bytes(content[..8].try_into().unwrap());
            let whole = content.chunks(8).all(|part| part == found.to_le_bytes());
            assert!(whole && found >= synced[block] && found <= newest[block], "round {round}, block {block}: {found}");
            // What it is now is what it is.
            newest[block] = found;
        }
        synced.clone_from(&newest);
    }
}

#[test]
fn a_crash_at_any_step_of_a_takeover_is_finished_by_the_next_start() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 32 << 20);
    let file = OpenOptions::new().write(true).custom_flags(nix::libc::O_SYNC).open(device.path()).unwrap();
    for (failpoint, command) in [
        ("promote-marked", "failover"),
        ("history-after:2", "failover"),
        ("mark-before", "failover"),
        ("promote-aborting", "abort"),
        ("promote-rolled", "abort"),
        ("history-after:2", "abort"),
    ] {
        let mut pair = Pair::new();
        let replicas = pair.protect("db", &[device.path()]);
        pair.wait_protected("db", LIMIT);
        for block in 0..64 {
            file.write_all_at(&[1; 65536], block * 131_072).unwrap();
        }
        pair.production.varve(&["bookmark", "db", "good"]).ok();
        let good = digest_device(device.path());
        for block in 0..64 {
            file.write_all_at(&[2; 65536], block * 131_072 + 32768).unwrap();
        }
        pair.wait_applied("db", LIMIT);
        let newest = digest_device(device.path());
        if command == "abort" {
            failover(&pair, "db", "bookmark:good");
        }
        pair.recovery.stop(Role::Receiver);
        pair.recovery.set_env("VARVE_FAILPOINT", failpoint);
        pair.recovery.start(Role::Receiver);
        if command == "abort" {
            served(&pair, "db");
        } else {
            wait_streaming(&pair, "db");
        }
        let words: &[&str] = match command {
            "abort" => &["failover", "abort", "db", "--yes"],
            _ => &["failover", "db", "--at", "bookmark:good", "--yes"],
        };
        // It may end before the failpoint if that is passed later by the applier.
        pair.recovery.varve(words);
        let start = Instant::now();
        while pair.recovery.running(Role::Receiver) && start.elapsed() < Duration::from_secs(3) {
            std::thread::sleep(Duration::from_millis(50));
        }
        if pair.recovery.running(Role::Receiver) {
            pair.recovery.kill(Role::Receiver);
        }
        pair.recovery.set_env("VARVE_FAILPOINT", "");
        pair.recovery.start(Role::Receiver);
        if command == "abort" {
            // Undone by itself, or to be told again.
            let start = Instant::now();
            while pair.recovery.group("db").is_none_or(|status| status["role"] != "replica") {
                pair.recovery.varve(words);
                assert!(start.elapsed() < LIMIT, "{failpoint}: {:#?}", pair.recovery.group("db"));
                std::thread::sleep(Duration::from_millis(200));
            }
            pair.wait_protected("db", LIMIT);
            pair.wait_applied("db", LIMIT);
            assert_eq!(digest_device(&replicas[0]), newest, "{failpoint} in {command}");
        } else {
            let promoted = match pair.recovery.group("db").unwrap()["role"].as_str() {
                Some("promoted") => served(&pair, "db"),
                _ => device_of(&failover(&pair, "db", "bookmark:good"), 0),
            };
            assert_eq!(digest_device(&promoted), good, "{failpoint} in {command}");
            let start = Instant::now();
            while pair.recovery.group("db").unwrap()["data"] != "protected" {
                assert!(start.elapsed() < LIMIT, "{failpoint}: {:#?}", pair.recovery.group("db"));
                std::thread::sleep(Duration::from_millis(100));
            }
            assert_eq!(digest_device(&promoted), good, "{failpoint} in {command}, rolled back");
            assert_eq!(digest_device(&replicas[0]), good);
        }
        pair.production.varve(&["unprotect", "db", "--yes"]).ok();
    }
}

#[test]
fn a_test_leaves_nothing() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 8 << 20);
    let pair = Pair::new();
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let reply = pair.recovery.varve(&["failover", "db", "--test", "--json"]).ok().json();
    let tested = pair.recovery.group("db").unwrap()["history"]["takeover"].clone();
    assert!(tested["test"] == true && tested["point"] == reply["point"]["time"], "{tested:#}");
    assert!(tested["since"].as_str().is_some_and(|since| since.starts_with("20")), "{tested:#}");
    write_somewhere(&device_of(&reply, 0));
    pair.recovery.varve(&["failover", "db", "--test"]).expect_code(3);
    assert_eq!(pair.production.group("db").unwrap()["data"], "protected", "replication goes on");
    pair.recovery.varve(&["failover", "abort", "db", "--yes"]).ok();
    assert_same(device.path(), &replicas[0]);
    assert!(!device_of(&reply, 0).exists() || size_bytes(&device_of(&reply, 0)) == 0);
    pair.recovery.varve(&["failover", "abort", "db", "--yes"]).expect_code(3);
    for (args, code, word) in [
        (&["failover", "nothing", "--yes"][..], 5, "nothing"),
        (&["failover", "db", "--at", "bookmark:no", "--yes"][..], 5, "no"),
        (&["failover", "db"][..], 3, "--yes"),
        (&["failover", "undo", "db"][..], 2, "commit"),
    ] {
        let output = pair.recovery.varve(args).expect_code(code);
        assert!(output.stderr.contains(word), "{args:?}: {}", output.stderr);
    }
}

/// A rollback would begin another stream under the devices' writers: what they were told is durable would be lost.
#[test]
fn what_runs_here_is_not_rolled_back() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 8 << 20);
    let mut pair = Pair::new();
    pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    pair.production.varve(&["bookmark", "db", "old"]).ok();
    write_somewhere(device.path());
    pair.wait_applied("db", LIMIT);
    let promoted = device_of(&failover(&pair, "db", "latest"), 0);
    for args in [&["--dry-run"][..], &["--yes"]] {
        let args = [&["rollback", "db", "--at", "bookmark:old"], args].concat();
        let refused = pair.recovery.varve(&args).expect_code(3);
        assert!(refused.stderr.contains("runs here") && refused.stderr.contains("failover abort"), "{refused:?}");
    }
    write_somewhere(&promoted);
    let digest = digest_device(&promoted);
    pair.recovery.kill(Role::Receiver);
    pair.recovery.start(Role::Receiver);
    assert_eq!(digest_device(&served(&pair, "db")), digest);
    pair.recovery.varve(&["failover", "abort", "db", "--yes"]).ok();
    pair.wait_protected("db", LIMIT);
    pair.recovery.varve(&["rollback", "db", "--at", "bookmark:old", "--yes"]).ok();
}

/// A test stands in the way of nothing: neither when it was closed as a view, nor when the disaster comes in the middle of it.
#[test]
fn a_test_does_not_hide_a_takeover() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 8 << 20);
    let pair = Pair::new();
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let takeover = || pair.recovery.group("db").unwrap()["history"]["takeover"].clone();
    let abort = || pair.recovery.varve(&["failover", "abort", "db", "--yes", "--json"]).ok().json();
    let view = || pair.recovery.varve(&["view", "list", "--json"]).ok().json()["views"][0]["id"].to_string();
    pair.recovery.varve(&["failover", "db", "--test"]).ok();
    assert_eq!(takeover()["test"], true);
    pair.recovery.varve(&["view", "close", &view()]).ok();
    assert!(takeover().is_null());
    pair.recovery.varve(&["failover", "db", "--test"]).ok();
    write_somewhere(&device_of(&failover(&pair, "db", "latest"), 0));
    assert_eq!(takeover()["test"], false);
    pair.recovery.varve(&["failover", "db", "--test"]).expect_code(3);
    assert_eq!(abort()["test"], false);
    assert_eq!(takeover()["test"], true);
    assert_eq!(abort()["test"], true);
    assert!(takeover().is_null());
    pair.wait_protected("db", LIMIT);
    pair.wait_applied("db", LIMIT);
    assert_same(device.path(), &replicas[0]);
}

/// Once the takeover is durable its devices come, whatever was in the way at first; and they do not go under a program that
/// writes to one without having it for itself.
#[test]
fn devices_come_by_themselves_and_stay_while_they_are_written() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 8 << 20);
    let pair = Pair::new();
    pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let in_the_way = pair.recovery.root().join("run/varve/views/promoted-db-0");
    std::fs::create_dir_all(in_the_way.parent().unwrap()).unwrap();
    std::fs::write(&in_the_way, "").unwrap();
    let failed = pair.recovery.varve(&["failover", "db", "--yes"]).expect_code(1);
    assert!(failed.stderr.contains("is taken over") && failed.stderr.contains("tried again by itself"), "{failed:?}");
    let next = || pair.recovery.group("db").unwrap()["history"]["takeover"]["next"].as_str().unwrap().to_owned();
    wait_until(LIMIT, "status says that they are missing", || next().contains("not all there"));
    std::fs::remove_file(&in_the_way).unwrap();
    let promoted = served(&pair, "db");
    wait_until(LIMIT, "status says nothing of it any more", || !next().contains("not all there"));
    let writer = OpenOptions::new().write(true).custom_flags(nix::libc::O_SYNC).open(&promoted).unwrap();
    let refused = pair.recovery.varve(&["failover", "abort", "db", "--yes"]).expect_code(3);
    assert!(refused.stderr.contains("open for writing"), "{refused:?}");
    writer.write_all_at(&[7; BLOCK], 0).unwrap();
    drop(writer);
    assert_eq!(served(&pair, "db"), promoted);
    pair.recovery.varve(&["failover", "abort", "db", "--yes"]).ok();
    pair.wait_protected("db", LIMIT);
}

fn write_somewhere(device: &Path) {
    let file = OpenOptions::new().write(true).custom_flags(nix::libc::O_SYNC).open(device).unwrap();
    file.write_all_at(&[5; 4096], 8192).unwrap();
}
