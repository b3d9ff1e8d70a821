//! What cannot be done is refused with words, with the right exit code, and changes nothing.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use std::time::Duration;
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(60);

/// The three lines that an operator reads.
#[track_caller]
fn assert_refused(out: &Output, code: i32, words: &[&str]) {
    assert_eq!(out.code, code, "{out:?}");
    for word in words {
        assert!(out.stderr.contains(word), "'{word}' is not in: {}", out.stderr);
    }
    assert!(out.stderr.contains("why:") && out.stderr.contains("next:"), "{}", out.stderr);
}

fn protect(pair: &Pair, args: &[&str]) -> Output {
    pair.production.varve(&[&["protect"], args].concat())
}

#[test]
fn volumes_that_cannot_be_protected() {
    require_root();
    let scratch = Scratch::disk();
    let file = scratch.file("backing", 16 << 20);
    let read_only = LoopDevice::over(&file, LoopOptions { read_only: true, ..LoopOptions::default() });
    let good = LoopDevice::new(&scratch, "good", 16 << 20);
    let pair = Pair::new();
    assert_refused(&protect(&pair, &["g", "/dev/no-such-disk"]), 5, &["/dev/no-such-disk"]);
    assert_refused(&protect(&pair, &["g", "/etc/passwd"]), 2, &["not a block device"]);
    assert_refused(&protect(&pair, &["g", "no/such/device"]), 5, &["no/such/device"]);
    assert_refused(&protect(&pair, &["g", read_only.path().to_str().unwrap()]), 3, &["read-only"]);
    assert_refused(&protect(&pair, &["g/h", good.path().to_str().unwrap()]), 2, &["g/h"]);
    let twice = good.path().to_str().unwrap();
    assert_refused(&protect(&pair, &["g", twice, twice]), 2, &["twice"]);
    assert!(pair.production.group("g").is_none(), "nothing was left behind");

    protect(&pair, &["g", twice]).ok();
    assert_refused(&protect(&pair, &["g", twice]), 3, &["exists already", "unprotect"]);
    assert_refused(&protect(&pair, &["h", twice]), 3, &["already protected", "'g'"]);
    pair.wait_protected("g", LIMIT);
    assert_refused(&pair.production.varve(&["unprotect", "x", "--yes"]), 5, &["'x'"]);
    pair.production.varve(&["unprotect", "g", "--yes"]).ok();
    assert!(pair.production.group("g").is_none());
}

/// What Varve writes to its own disk would be captured, and so cause more writing.
#[test]
fn the_disk_with_the_agents_own_state() {
    require_root();
    let own = {
        let device = run_ok("findmnt", &["--noheadings", "--output", "SOURCE", "--target", "/var/tmp"]);
        device.trim().to_owned()
    };
    let pair = Pair::new();
    if !own.starts_with("/dev/") {
        panic!("/var/tmp is on {own}: this test needs it on a block device");
    }
    let out = protect(&pair, &["root", &own]);
    assert_refused(&out, 3, &[&own, "varve", "another disk"]);
}

#[test]
fn replicas_that_cannot_be_used() {
    require_root();
    let scratch = Scratch::disk();
    let small = scratch.file("small.img", 4 << 20);
    let used = LoopDevice::new(&scratch, "used", 16 << 20);
    let mount = Mount::format(&scratch, "mnt", Filesystem::Ext4, used.path());
    let volume = LoopDevice::new(&scratch, "volume", 16 << 20);
    let pair = Pair::new();
    let volume = volume.path().to_str().unwrap();
    for (replica, word) in [(small.to_str().unwrap(), "small"), (used.path().to_str().unwrap(), "use")] {
        protect(&pair, &["g", volume, "--replica", replica]).ok();
        let reason = || pair.production.group("g").and_then(|group| group["reason"].as_str().map(str::to_owned));
        wait_until(LIMIT, "the refusal is told", || {
            let group = pair.production.group("g").unwrap();
            assert_ne!(group["data"], "protected");
            group["link"] == "refused" && reason().is_some_and(|reason| reason.contains(word))
        });
        let text = pair.production.varve(&["status", "g"]).ok().stdout;
        assert!(text.contains("refused"), "{text}");
        pair.production.varve(&["unprotect", "g", "--yes"]).ok();
    }
    assert_eq!(std::fs::metadata(&small).unwrap().len(), 4 << 20, "not touched");
    drop(mount);
}

#[test]
fn a_replica_on_a_full_disk() {
    require_root();
    let scratch = Scratch::memory();
    let full = FullTmpfs::new(&scratch, "full", 24 << 20);
    let volume = LoopDevice::new(&scratch, "volume", 64 << 20);
    let bytes = vec![0x5a; 64 << 20];
    std::fs::write(volume.path(), &bytes).unwrap_or_else(|_| panic!("fill the volume"));
    let pair = Pair::new();
    let replica = full.path().join("replica.img");
    protect(&pair, &["g", volume.path().to_str().unwrap(), "--replica", replica.to_str().unwrap()]).ok();
    wait_until(LIMIT, "the full disk is told", || {
        let group = pair.production.group("g").unwrap();
        assert_ne!(group["data"], "protected", "{group:#}");
        let reason = group["reason"].as_str().unwrap_or_default().to_lowercase();
        group["link"] == "refused" && (reason.contains("space") || reason.contains("full"))
    });
}

#[test]
fn tokens() {
    require_root();
    let pair = Pair::new();
    let other = Installation::new();
    let join = |token: &str| other.varve(&["join", &pair.address, token]);
    assert_refused(&join("hello"), 2, &["token"]);
    let token = pair.recovery.varve(&["host", "invite", "second", "--json"]).ok().json();
    let token = token["token"].as_str().unwrap().to_owned();
    let mut mistyped = token.clone();
    let last = mistyped.pop().unwrap();
    mistyped.push(if last == 'a' { 'b' } else { 'a' });
    assert_refused(&join(&mistyped), 2, &["token"]);
    join(&token).ok();
    let invited = |name: &str| pair.recovery.varve(&["host", "invite", name, "--json"]).ok().json()["replaces"].clone();
    assert_eq!((invited("second"), invited("fourth")), (true.into(), false.into()));
    let third = Installation::new();
    let again = third.varve(&["join", &pair.address, &token]);
    assert_refused(&again, 3, &["used"]);
    let short = pair.recovery.varve(&["host", "invite", "third", "--ttl", "1s", "--json"]).ok().json();
    let short = short["token"].as_str().unwrap().to_owned();
    wait_until(LIMIT, "the token expires", || {
        let invites = pair.recovery.varve(&["host", "list", "--json"]).ok().json();
        let open = invites["invites"].as_array().unwrap();
        !open.iter().any(|invite| invite["name"] == "third")
    });
    assert_refused(&third.varve(&["join", &pair.address, &short]), 3, &["expired"]);
}

#[test]
fn a_revoked_host_is_refused_and_says_so() {
    require_root();
    let scratch = Scratch::memory();
    let volume = LoopDevice::new(&scratch, "volume", 16 << 20);
    let pair = Pair::new();
    pair.protect("g", &[volume.path()]);
    pair.wait_protected("g", LIMIT);
    pair.recovery.varve(&["host", "revoke", "production", "--yes"]).ok();
    wait_until(LIMIT, "the refusal is told", || {
        let group = pair.production.group("g").unwrap();
        group["link"] == "refused" && group["data"] != "protected"
    });
    let reason = pair.production.group("g").unwrap()["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("revoked"), "{reason}");
}

#[test]
fn without_the_capability_the_agent_says_which() {
    require_root();
    let scratch = Scratch::memory();
    let volume = LoopDevice::new(&scratch, "volume", 16 << 20);
    let mut pair = Pair::new();
    pair.production.stop(Role::Agent);
    pair.production.start_with(Role::Agent, &["setpriv", "--bounding-set", "-bpf,-sys_admin", "--inh-caps", "-all"]);
    let out = protect(&pair, &["g", volume.path().to_str().unwrap()]);
    assert_refused(&out, 1, &["CAP_BPF"]);
    assert!(pair.production.group("g").is_none(), "nothing was left behind");
}

#[test]
fn groups_that_are_not_there() {
    require_root();
    let pair = Pair::new();
    for args in [vec!["status", "nope"], vec!["verify", "nope"], vec!["bookmark", "nope", "b"]] {
        assert_refused(&pair.production.varve(&args), 5, &["'nope'"]);
    }
    let alone = Installation::new();
    assert_refused(&alone.varve(&["status"]), 4, &[]);
}
