//! A planned switch-over loses nothing, there and back, or does not happen; a source that comes back after an unplanned one is
//! told what to run, stays intact, and what only it has can be kept; nobody who does not know who is right goes on as if he did.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use serde_json::Value;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(60);
const PIECE: usize = 64 << 10;

fn promoted(pair: &Pair, volume: usize) -> PathBuf {
    pair.recovery.root().join(format!("run/varve/views/g-{volume}"))
}

fn hook(pair: &Pair, name: &str, text: &str) {
    let dir = pair.production.root().join("etc/varve/hooks");
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
}

fn is_read_only(device: &Path) -> bool {
    run_ok("blockdev", &[Path::new("--getro"), device]).trim() == "1"
}

fn write_at(device: &Path, value: u8, piece: u64) -> std::io::Result<()> {
    let file = OpenOptions::new().write(true).custom_flags(nix::libc::O_DIRECT | nix::libc::O_SYNC).open(device)?;
    file.write_all_at(&Aligned::filled(PIECE, &[value]), piece * PIECE as u64)
}

fn state(install: &Installation) -> (String, String) {
    let word = |status: &Value, key: &str| status[key].as_str().unwrap_or("none").to_owned();
    install.group("g").map_or_else(Default::default, |status| (word(&status, "role"), word(&status, "data")))
}

#[track_caller]
fn wait_state(install: &Installation, role: &str, data: &str) {
    let start = std::time::Instant::now();
    while state(install) != (role.to_owned(), data.to_owned()) {
        assert!(start.elapsed() < LIMIT, "not {role} and {data}: {:#?}", install.group("g"));
        std::thread::sleep(Duration::from_millis(30));
    }
}

#[track_caller]
fn wait_writable(device: &Path) {
    let rewrite = || {
        let mut piece = Aligned::new(PIECE, 0);
        let file = OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_DIRECT).open(device)?;
        file.read_exact_at(&mut piece, PIECE as u64)?;
        file.write_all_at(&piece, PIECE as u64)
    };
    wait_until(LIMIT, "the volume is writable", || !is_read_only(device) && rewrite().is_ok());
}

/// No comparison since `from` in the agent's log, and the replica is what the volume is.
#[track_caller]
fn assert_no_resync(pair: &Pair, from: usize, device: &Path, replica: &Path) {
    pair.wait_applied("g", LIMIT);
    assert_same(device, replica);
    let log = pair.production.log(Role::Agent);
    let bad: Vec<&str> = log[from..].lines().filter(|line| line.contains("resumed=false")).collect();
    assert!(bad.is_empty(), "{bad:#?}");
}

fn json(install: &Installation, args: &[&str]) -> Value {
    install.varve(&[args, &["--json"]].concat()).ok().json_lines().pop().unwrap()
}

/// Appends numbers, each synced, until it is told to stop: a database that the operator's hook stops and starts.
const SERVICE: &str = r#"
n=0
while [ ! -e "$1/stop" ]; do
    n=$((n + 1))
    echo $n >> "$2/log" && sync "$2/log" && echo $n > "$1/acknowledged"
done
rm -f "$1/stop"
"#;

#[test]
fn planned_there_and_back_loses_nothing() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 64 << 20);
    let mount = Mount::format(&scratch, "mnt", Filesystem::Ext4, device.path());
    let pair = Pair::new();
    let replicas = pair.protect("g", &[device.path()]);
    let control = scratch.join("control");
    std::fs::create_dir(&control).unwrap();
    let (place, dir) = (mount.path().to_owned(), control.display().to_string());
    hook(
        &pair,
        "quiesce",
        &format!(
            "touch {dir}/stop; while [ -e {dir}/stop ]; do sleep 0.02; done; umount {}; echo quiesce $1 $VARVE_WHY >>{dir}/said",
            place.display()
        ),
    );
    hook(&pair, "resume", &format!("echo resume $1 $VARVE_WHY >>{dir}/said"));
    pair.wait_protected("g", LIMIT);
    for round in 0..2u64 {
        let service = std::process::Command::new("sh").args(["-c", SERVICE, "service", &dir]).arg(&place).spawn();
        let mut service = service.unwrap();
        wait_until(LIMIT, "some writes", || {
            std::fs::read_to_string(control.join("acknowledged"))
                .is_ok_and(|n| n.trim().parse::<u64>().unwrap_or(0) > 20)
        });
        let from = pair.production.log(Role::Agent).len();
        let reply = json(&pair.recovery, &["failover", "g", "--planned", "--yes"]);
        assert!(service.wait().unwrap().success());
        let acknowledged = std::fs::read_to_string(control.join("acknowledged")).unwrap();
        std::fs::remove_file(control.join("acknowledged")).unwrap();
        let planned = &reply["planned"];
        eprintln!("round {round}: {} acknowledged, {planned}", acknowledged.trim());
        assert_eq!((&reply["not_here_bytes"], &planned["compared_bytes"]), (&Value::from(0), &Value::from(64 << 20)));
        assert!(planned["read_only"] == true && planned["hook_seconds"].as_f64().is_some(), "{planned:#}");
        // Nobody writes there: not through the device, not by mounting it.
        assert!(is_read_only(device.path()) && write_at(device.path(), 9, 3).is_err());
        let mounted = run(std::process::Command::new("mount").arg(device.path()).arg(&place));
        assert_ne!(mounted.code, 0, "it can be mounted");
        wait_until(LIMIT, "fenced", || state(&pair.production).0 == "fenced");
        let copy = Mount::existing(&scratch, &format!("copy{round}"), &promoted(&pair, 0), "rw");
        let last = std::fs::read_to_string(copy.path().join("log")).unwrap();
        assert_eq!(last.lines().last().unwrap(), acknowledged.trim(), "an acknowledged line is missing");
        if round == 0 {
            drop(copy);
            // And back by an abort: the source goes on where it was.
            pair.recovery.varve(&["failover", "abort", "g", "--yes"]).ok();
            wait_writable(device.path());
            wait_state(&pair.production, "source", "protected");
            run_ok("mount", &[device.path(), &place]);
            std::fs::remove_file(place.join("log")).unwrap();
            run_ok("sync", &["-f", place.to_str().unwrap()]);
            assert_no_resync(&pair, from, device.path(), &replicas[0]);
            continue;
        }
        std::fs::write(copy.path().join("there"), vec![7; 3 << 20]).unwrap();
        copy.unmount();
        pair.recovery.varve(&["failover", "commit", "g", "--yes"]).ok();
        let look = json(&pair.recovery, &["failback", "g", "--dry-run"]);
        // A few signs of life at most.
        let captured = look["captured_there_bytes"].as_u64().unwrap();
        assert!(look["only_there_bytes"] == 0 && captured < 1024, "{look:#}");
        pair.recovery.varve(&["failback", "g", "--yes"]).ok();
        json(&pair.recovery, &["failback", "g", "--cut-over", "--yes"]);
        wait_writable(device.path());
        wait_state(&pair.production, "source", "protected");
        assert_no_resync(&pair, from, device.path(), &replicas[0]);
        run_ok("mount", &[device.path(), &place]);
        assert_eq!(std::fs::read(place.join("there")).unwrap(), vec![7; 3 << 20]);
        assert_eq!(std::fs::read_to_string(place.join("log")).unwrap(), last);
    }
    let said = || std::fs::read_to_string(control.join("said")).unwrap();
    wait_until(LIMIT, "the last hook", || said().ends_with("resume g home\n"));
    assert_eq!(said(), "quiesce g planned\nresume g aborted\nquiesce g planned\nresume g home\n");
}

#[test]
fn what_is_not_quiet_is_refused_and_the_source_goes_on() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 32 << 20);
    let mount = Mount::format(&scratch, "mnt", Filesystem::Ext4, device.path());
    let mut pair = Pair::new();
    let replicas = pair.protect("g", &[device.path()]);
    pair.wait_protected("g", LIMIT);
    let from = pair.production.log(Role::Agent).len();
    let said = scratch.join("said");
    let goes_on = |pair: &Pair, words: &str, args: &[&str], code: i32| {
        let out = pair.recovery.varve(&[&["failover", "g", "--planned", "--yes"], args].concat()).expect_code(code);
        assert!(out.stderr.contains(words), "'{words}' is not in: {}", out.stderr);
        assert_eq!((state(&pair.recovery).0, is_read_only(device.path())), ("replica".to_owned(), false));
        wait_state(&pair.production, "source", "protected");
    };
    goes_on(&pair, "is mounted", &[], 3);
    std::fs::write(mount.path().join("file"), "goes on").unwrap();
    mount.unmount();
    let writer = OpenOptions::new().write(true).open(device.path()).unwrap();
    goes_on(&pair, "open for writing: ", &[], 3);
    drop(writer);
    goes_on(&pair, "--at", &["--at", "-1s"], 2);
    hook(&pair, "quiesce", "echo the database does not stop >&2; exit 1");
    hook(&pair, "resume", &format!("echo $VARVE_WHY >>{}", said.display()));
    goes_on(&pair, "the database does not stop", &[], 3);
    hook(&pair, "quiesce", "sleep 100");
    goes_on(&pair, "killed after 1 s", &["--limit", "1"], 3);
    wait_until(LIMIT, "the resume hook", || std::fs::read_to_string(&said).is_ok_and(|said| said.lines().count() >= 2));
    std::fs::remove_file(pair.production.root().join("etc/varve/hooks/quiesce")).unwrap();
    // The receiver ends when the source is quiet: it stays so until it is told, which the next welcome does; or it is
    // taken over, and an abort ends it.
    for (point, role) in [("planned-quiet", "replica"), ("promote-marked", "promoted")] {
        pair.recovery.set_env("VARVE_FAILPOINT", point);
        pair.recovery.restart(Role::Receiver);
        pair.recovery.set_env("VARVE_FAILPOINT", "");
        wait_state(&pair.production, "source", "protected");
        pair.recovery.varve(&["failover", "g", "--planned", "--yes"]).expect_code(4);
        wait_until(LIMIT, "it ends there", || !pair.recovery.running(Role::Receiver));
        assert!(is_read_only(device.path()), "{point}: nobody has said who is right");
        // Also an agent that begins again does not know.
        pair.production.kill(Role::Agent);
        pair.production.start(Role::Agent);
        wait_until(LIMIT, "held again", || is_read_only(device.path()));
        let abort = pair.production.varve(&["failover", "abort", "g", "--yes"]).expect_code(3);
        assert!(abort.stderr.contains("--force"), "{}", abort.stderr);
        pair.recovery.start(Role::Receiver);
        assert_eq!(state(&pair.recovery).0, role, "{point}");
        if role == "promoted" {
            wait_until(LIMIT, "fenced", || state(&pair.production).0 == "fenced");
            assert!(is_read_only(device.path()));
            wait_until(LIMIT, "served", || promoted(&pair, 0).exists());
            pair.recovery.varve(&["failover", "abort", "g", "--yes"]).ok();
        }
        wait_writable(device.path());
        wait_state(&pair.production, "source", "protected");
        assert_no_resync(&pair, from, device.path(), &replicas[0]);
    }
    pair.production.stop(Role::Agent);
    wait_until(LIMIT, "it is seen", || pair.recovery.group("g").unwrap()["link"] != "streaming");
    let out = pair.recovery.varve(&["failover", "g", "--planned", "--yes"]).expect_code(4);
    assert!(out.stderr.contains("not connected"), "{}", out.stderr);
    pair.production.start(Role::Agent);
}

/// The operator gives up while the first hook runs, and tries again before it has ended. Both what he said and the late answer
/// of the first try end its quiet, the second of them when the second try is quiet already: that one stays.
#[test]
fn who_tries_again_while_the_hook_still_runs_gets_a_quiet_that_lasts() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 16 << 20);
    let pair = Pair::new();
    pair.protect("g", &[device.path()]);
    pair.wait_protected("g", LIMIT);
    let (held, said) = (scratch.join("held"), scratch.join("said"));
    let (wait, say) = (held.display(), said.display());
    hook(&pair, "quiesce", &format!("echo quiesce >>{say}; while [ -e {wait} ]; do sleep 0.02; done"));
    hook(&pair, "resume", &format!("echo resume $VARVE_WHY >>{say}"));
    std::fs::write(&held, "").unwrap();
    let planned = ["failover", "g", "--planned", "--yes"];
    let program = PathBuf::from(pair.recovery.command(Role::Receiver).get_program()).with_file_name("varve");
    let mut first = std::process::Command::new(program);
    first.args(planned).env("VARVE_ROOT", pair.recovery.root()).stdin(std::process::Stdio::null());
    let logged = |words: &str, times: usize| {
        wait_until(LIMIT, words, || pair.production.log(Role::Agent).matches(words).count() >= times);
    };
    let mut first = first.spawn().unwrap();
    wait_until(LIMIT, "the hook runs", || said.exists());
    first.kill().unwrap();
    first.wait().unwrap();
    logged("the planned switch-over was given up", 1);
    let client = pair.recovery.client();
    let second = std::thread::spawn(move || client.varve(&planned));
    logged("it is to be made quiet for a planned switch-over", 2);
    std::fs::remove_file(&held).unwrap();
    second.join().unwrap().ok();
    wait_until(LIMIT, "fenced", || state(&pair.production).0 == "fenced");
    assert_eq!(std::fs::read_to_string(&said).unwrap(), "quiesce\nresume refused\nquiesce\n");
    assert!(is_read_only(device.path()) && write_at(device.path(), 9, 3).is_err());
    pair.recovery.varve(&["failover", "abort", "g", "--yes"]).ok();
    wait_writable(device.path());
    wait_state(&pair.production, "source", "protected");
}

/// The agent looks at its volumes every three seconds, and they are read-only some time before it has all of them: here the hook
/// makes one so, and takes longer than that.
#[test]
fn a_volume_that_is_read_only_before_it_is_held_is_no_other_one() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 16 << 20);
    let pair = Pair::new();
    let replicas = pair.protect("g", &[device.path()]);
    pair.wait_protected("g", LIMIT);
    let from = pair.production.log(Role::Agent).len();
    hook(&pair, "quiesce", &format!("blockdev --setro {}; sleep 8", device.path().display()));
    pair.recovery.varve(&["failover", "g", "--planned", "--yes"]).ok();
    let log = pair.production.log(Role::Agent)[from..].to_owned();
    assert!(!log.contains("the group begins anew"), "{log}");
    wait_until(LIMIT, "fenced", || state(&pair.production).0 == "fenced");
    pair.recovery.varve(&["failover", "abort", "g", "--yes"]).ok();
    wait_state(&pair.production, "source", "protected");
    wait_writable(device.path());
    assert_no_resync(&pair, from, device.path(), &replicas[0]);
}

fn view_digest(pair: &Pair, group: &str, at: &str) -> String {
    let view = json(&pair.recovery, &["view", "open", group, "--at", at]);
    let digest = digest_device(Path::new(view["volumes"][0]["device"].as_str().unwrap()));
    pair.recovery.varve(&["view", "close", &view["id"].to_string()]).ok();
    digest
}

#[test]
fn what_only_the_old_source_has_is_kept_before_it_is_overwritten() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", (40 << 20) + 512 * 3);
    let mut pair = Pair::new();
    let replicas = pair.protect("g", &[device.path()]);
    pair.wait_protected("g", LIMIT);
    for piece in 0..200 {
        write_at(device.path(), piece as u8 + 1, piece * 3).unwrap();
    }
    pair.wait_applied("g", LIMIT);
    let split = digest_device(device.path());
    let reply = json(&pair.recovery, &["failover", "g", "--yes"]);
    assert_eq!(reply["drained"]["complete"], true, "{reply:#}");
    pair.recovery.varve(&["failover", "commit", "g", "--yes"]).ok();
    // Both write, some of it in the same place; one block becomes zeroes there.
    for piece in [1, 4, 30, 31, 599] {
        write_at(device.path(), 200, piece).unwrap();
    }
    write_at(device.path(), 0, 33).unwrap();
    for piece in [2, 4, 31, 500] {
        write_at(&promoted(&pair, 0), 100, piece).unwrap();
    }
    let (branch, here) = (digest_device(device.path()), digest_device(&promoted(&pair, 0)));
    let look = json(&pair.recovery, &["failback", "g", "--dry-run"]);
    assert_eq!(look["branch_bytes"], 6 * PIECE, "{look:#}");
    let asked = pair.recovery.varve(&["failback", "g"]).expect_code(3);
    assert!(asked.stderr.contains("384.0 KiB") && asked.stderr.contains("are lost"), "{}", asked.stderr);
    assert_eq!(digest_device(device.path()), branch, "nothing was touched");
    let taken = pair.recovery.varve(&["failback", "g", "--keep-branch", "g", "--yes"]).expect_code(3);
    assert!(taken.stderr.contains("already"), "{}", taken.stderr);
    pair.recovery.stop(Role::Receiver);
    for point in ["branch-whole", "branch-made"] {
        pair.recovery.set_env("VARVE_FAILPOINT", point);
        pair.recovery.start(Role::Receiver);
        pair.recovery.set_env("VARVE_FAILPOINT", "");
        if point == "branch-whole" {
            pair.recovery.varve(&["failback", "g", "--keep-branch", "old", "--yes"]).expect_code(4);
        }
        wait_until(LIMIT, "it ends there", || !pair.recovery.running(Role::Receiver));
        assert_eq!(digest_device(device.path()), branch, "{point}: nothing was touched");
    }
    pair.recovery.start(Role::Receiver);
    wait_until(LIMIT, "following", || {
        pair.recovery.group("g").unwrap()["history"]["takeover"]["failback"]["phase"] == "following"
    });
    assert_eq!(digest_device(device.path()), here);
    let done = json(&pair.recovery, &["failback", "g", "--yes"]);
    assert_eq!(done["branch_kept"], "old", "{done:#}");
    for (at, digest) in [("latest", &branch), ("bookmark:branch", &branch), ("bookmark:split", &split)] {
        assert_eq!(&view_digest(&pair, "old", at), digest, "{at}");
    }
    let status = pair.recovery.group("old").unwrap();
    assert!(
        status["reason"].as_str().unwrap().contains("branch of 'g'") && status["data"] == "protected",
        "{status:#}"
    );
    let points = json(&pair.recovery, &["points", "old"]);
    assert_eq!(points["bookmarks"].as_array().unwrap().len(), 2, "{points:#}");
    json(&pair.recovery, &["failback", "g", "--cut-over", "--yes"]);
    wait_state(&pair.production, "source", "protected");
    pair.wait_applied("g", LIMIT);
    assert_same(device.path(), &replicas[0]);
    // A restart of the receiver finds it again; another one of that name is not protected into it.
    pair.recovery.restart(Role::Receiver);
    assert_eq!(view_digest(&pair, "old", "latest"), branch);
    pair.recovery.varve(&["scrub", "old"]).ok();
    pair.recovery.varve(&["forget", "old", "--yes"]).ok();
}

/// A reboot: nothing is pinned any more.
fn reboot(install: &mut Installation, meanwhile: impl FnOnce(&Path)) {
    if install.running(Role::Agent) {
        install.stop(Role::Agent);
    }
    let agent = std::env::current_exe().unwrap().parent().and_then(Path::parent).unwrap().join("varve-agent");
    let agent = std::env::var_os("VARVE_BIN_DIR").map_or(agent, |dir| PathBuf::from(dir).join("varve-agent"));
    run(std::process::Command::new(agent).arg("--root").arg(install.root()).arg("--unpin-all")).ok();
    meanwhile(install.root());
    install.start(Role::Agent);
}

fn authority(install: &Installation) -> Value {
    install.group("g").map_or(Value::Null, |status| status["authority"].clone())
}

#[track_caller]
fn wait_authority(install: &Installation, words: &str, unsure: bool) -> Value {
    let start = std::time::Instant::now();
    loop {
        let found = authority(install);
        if found["text"].as_str().is_some_and(|text| text.contains(words)) && found["unsure"] == unsure {
            return found;
        }
        assert!(start.elapsed() < LIMIT, "'{words}' is not said: {:#?}", install.group("g"));
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn copy_dir(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    run_ok("cp", &[Path::new("-a"), from, to]);
}

#[test]
fn who_comes_with_an_old_state_is_told_and_nobody_goes_on_as_if_he_knew() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 16 << 20);
    let mut pair = Pair::new();
    let replicas = pair.protect("g", &[device.path()]);
    pair.wait_protected("g", LIMIT);
    write_at(device.path(), 5, 5).unwrap();
    pair.wait_applied("g", LIMIT);
    let (agents, receivers) = (scratch.join("agent"), scratch.join("receiver"));
    pair.production.stop(Role::Agent);
    copy_dir(&pair.production.root().join("var/lib/varve/agent"), &agents);
    pair.production.start(Role::Agent);
    wait_state(&pair.production, "source", "protected");
    let name = json(&pair.recovery, &["status"])["daemons"][0]["name"].as_str().unwrap().to_owned();
    pair.recovery.varve(&["failover", "g", "--yes"]).ok();
    let told = wait_authority(&pair.production, "taken over", false);
    assert!(told["next"].as_str().unwrap().contains(&format!("on '{name}': 'varve failover abort g'")), "{told:#}");
    assert!(told["text"].as_str().unwrap().contains(&name) && told["since"].is_string(), "{told:#}");
    pair.recovery.varve(&["failover", "commit", "g", "--yes"]).ok();
    write_at(&promoted(&pair, 0), 6, 6).unwrap();
    let here = authority(&pair.recovery);
    assert!(here["not_home_bytes"].as_u64().unwrap() > PIECE as u64, "{here:#}");
    // What the agent was told it knows after a reboot, too, when nobody answers.
    pair.recovery.stop(Role::Receiver);
    copy_dir(&pair.recovery.root().join("var/lib/varve/receiver"), &receivers);
    reboot(&mut pair.production, |_| ());
    assert_eq!(state(&pair.production).0, "fenced");
    wait_authority(&pair.production, "taken over", false);
    pair.recovery.start(Role::Receiver);
    pair.recovery.varve(&["failback", "g", "--yes"]).ok();
    pair.recovery.varve(&["failback", "g", "--cut-over", "--yes"]).ok();
    wait_state(&pair.production, "source", "protected");
    assert_eq!(authority(&pair.production), Value::Null);
    pair.wait_applied("g", LIMIT);
    assert_same(device.path(), &replicas[0]);
    // An old image of the production host: refused, told what to run, its volume untouched.
    let now = digest_device(device.path());
    let newest = scratch.join("newest");
    reboot(&mut pair.production, |root| {
        copy_dir(&root.join("var/lib/varve/agent"), &newest);
        copy_dir(&agents, &root.join("var/lib/varve/agent"));
    });
    let told = wait_authority(&pair.production, "under epoch 1", false);
    assert!(told["next"].as_str().unwrap().contains("varve failover g"), "{told:#}");
    assert_eq!((state(&pair.production).0.as_str(), digest_device(device.path())), ("fenced", now.clone()));
    assert_eq!(state(&pair.recovery).0, "replica");
    reboot(&mut pair.production, |root| copy_dir(&newest, &root.join("var/lib/varve/agent")));
    wait_state(&pair.production, "source", "protected");
    // An old image of the recovery host, from when the group ran there: neither side goes on.
    pair.recovery.stop(Role::Receiver);
    copy_dir(&receivers, &pair.recovery.root().join("var/lib/varve/receiver"));
    pair.recovery.start(Role::Receiver);
    wait_authority(&pair.recovery, "who is right is not known", true);
    wait_authority(&pair.production, "who is right is not known", true);
    let served = || pair.recovery.group("g").unwrap()["history"]["takeover"]["devices"].as_array().unwrap().len();
    wait_until(LIMIT, "nothing is served", || served() == 0);
    assert_eq!(digest_device(device.path()), now);
    // And one that has lost everything.
    pair.recovery.stop(Role::Receiver);
    std::fs::remove_dir_all(pair.recovery.root().join("var/lib/varve/receiver/groups/g")).unwrap();
    pair.recovery.start(Role::Receiver);
    wait_authority(&pair.production, "lost its state", true);
    reboot(&mut pair.production, |_| ());
    let told = wait_authority(&pair.production, "lost its state", true);
    assert!(told["next"].as_str().unwrap().contains("varve unprotect g"), "{told:#}");
    pair.production.varve(&["unprotect", "g", "--yes"]).ok();
    assert!(!pair.production.root().join("var/lib/varve/agent/authority/g.json").exists());
}

#[test]
fn both_sides_promoted_by_hand_and_a_reboot_in_between() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 16 << 20);
    let mut pair = Pair::new();
    pair.protect("g", &[device.path()]);
    pair.wait_protected("g", LIMIT);
    write_at(device.path(), 5, 5).unwrap();
    pair.wait_applied("g", LIMIT);
    pair.recovery.stop(Role::Receiver);
    pair.recovery.set_env("VARVE_FAILPOINT", "promote-marked");
    pair.recovery.start(Role::Receiver);
    pair.recovery.set_env("VARVE_FAILPOINT", "");
    wait_state(&pair.production, "source", "protected");
    pair.recovery.varve(&["failover", "g", "--planned", "--yes"]).expect_code(4);
    wait_until(LIMIT, "it ends there", || !pair.recovery.running(Role::Receiver));
    // Nobody answers: a reboot does not make it writable, only the operator does, who takes it upon himself.
    reboot(&mut pair.production, |_| run_ok("blockdev", &[Path::new("--setrw"), device.path()]).clear());
    wait_until(LIMIT, "quiet again", || is_read_only(device.path()));
    let held = wait_authority(&pair.production, "not known yet", true);
    assert_eq!(held["quiet"], "read-only", "{held:#}");
    pair.production.varve(&["failover", "abort", "g", "--force", "--yes"]).ok();
    for piece in 10..14 {
        write_at(device.path(), 99, piece).unwrap();
    }
    reboot(&mut pair.production, |_| ());
    write_at(device.path(), 98, 14).unwrap();
    let branch = digest_device(device.path());
    pair.recovery.start(Role::Receiver);
    wait_until(LIMIT, "served", || promoted(&pair, 0).exists());
    write_at(&promoted(&pair, 0), 77, 20).unwrap();
    wait_authority(&pair.production, "taken over", false);
    assert_eq!((state(&pair.production).0.as_str(), digest_device(device.path())), ("fenced", branch.clone()));
    pair.recovery.varve(&["failover", "commit", "g", "--yes"]).ok();
    let look = json(&pair.recovery, &["failback", "g", "--dry-run"]);
    assert_eq!(look["branch_bytes"], 5 * PIECE, "{look:#}");
    pair.recovery.varve(&["failback", "g", "--keep-branch", "theirs", "--yes"]).ok();
    pair.recovery.varve(&["failback", "g", "--cut-over", "--yes"]).ok();
    wait_state(&pair.production, "source", "protected");
    assert_eq!(view_digest(&pair, "theirs", "latest"), branch);
    let content = std::fs::read(device.path()).unwrap();
    assert_eq!((content[20 * PIECE], content[12 * PIECE], content[5 * PIECE]), (77, 0, 5));
}
