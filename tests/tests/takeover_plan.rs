//! The takeover plan as an operator meets it: checked, rehearsed, run, stopped in the middle, gone on with, taken back.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(60);

/// A protected filesystem with a file `orders`, and a plan that mounts it, tells somebody, and looks for that file.
struct Bed {
    pair: Pair,
    at: PathBuf,
    told: PathBuf,
    wanted: PathBuf,
    // In this order they go away.
    mount: Option<Mount>,
    device: LoopDevice,
    scratch: Scratch,
}

impl Bed {
    fn new() -> Self {
        require_root();
        let scratch = Scratch::disk();
        let device = LoopDevice::new(&scratch, "volume", 64 << 20);
        let mount = Mount::format(&scratch, "home", Filesystem::Ext4, device.path());
        let pair = Pair::new();
        pair.protect("db", &[device.path()]);
        pair.wait_protected("db", LIMIT);
        std::fs::write(mount.path().join("orders"), "17").unwrap();
        mount.sync();
        pair.wait_applied("db", LIMIT);
        let [at, told, wanted] = ["here", "told", "wanted"].map(|name| scratch.join(name));
        std::fs::create_dir(&at).unwrap();
        std::fs::write(&wanted, "").unwrap();
        let bed = Bed { pair, at, told, wanted, device, mount: Some(mount), scratch };
        bed.plan(bed.device.path());
        bed
    }

    fn plan_file(&self) -> PathBuf {
        self.pair.recovery.root().join("etc/varve/takeover/db.toml")
    }

    /// Its last check is content as long as the file `wanted` is there.
    fn plan(&self, volume: &Path) {
        let text = format!(
            r#"
version = 1
[[step]]
name = "volumes"
kind = "attach"
volumes = {{ data = "{volume}" }}
[[step]]
name = "data"
kind = "mount"
device = "{{data}}"
where = "{at}"
fstype = "ext4"
timeout = "5s"
[[step]]
name = "tell"
kind = "command"
run = "touch {told}"
undo = "rm {told}"
in_test = "skip"
[[step]]
name = "orders"
kind = "check"
run = "grep -q 17 {at}/orders"
[[step]]
name = "wanted"
kind = "check"
run = "test -e {wanted}"
timeout = "2s"
"#,
            volume = volume.display(),
            at = self.at.display(),
            told = self.told.display(),
            wanted = self.wanted.display(),
        );
        std::fs::create_dir_all(self.plan_file().parent().unwrap()).unwrap();
        std::fs::write(self.plan_file(), text).unwrap();
    }

    fn varve(&self, args: &[&str]) -> Output {
        self.pair.recovery.varve(args)
    }

    fn status(&self) -> Value {
        self.pair.recovery.group("db").expect("the group")
    }

    fn mounted(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        mounts.lines().any(|line| line.split(' ').nth(1) == self.at.to_str())
    }

    /// Nothing of a takeover is on this host, and replication goes on.
    #[track_caller]
    fn assert_as_before(&self) {
        assert!(!self.mounted());
        assert!(!self.told.exists());
        assert_eq!(self.status()["role"], "replica");
        assert_eq!(self.status()["history"]["takeover"], Value::Null);
        self.pair.wait_protected("db", LIMIT);
    }
}

fn last(output: &Output) -> Value {
    output.json_lines().pop().expect("an answer")
}

#[test]
fn rehearsed_and_remembered() {
    let bed = Bed::new();
    assert!(bed.varve(&["drill", "show", "db"]).expect_code(5).stderr.contains("no drill"));
    let report = last(&bed.varve(&["drill", "db", "--json"]).ok());
    assert_eq!((&report["outcome"], &report["mode"]), (&"done".into(), &"test".into()), "{report:#}");
    assert_eq!(report["checks"], 2, "{report:#}");
    bed.assert_as_before();
    let drill = bed.status()["drill"].clone();
    assert_eq!((&drill["good"], &drill["runs"], &drill["failures"]), (&true.into(), &1.into(), &0.into()), "{drill:#}");
    let verified = drill["verified"].clone();
    assert_eq!(verified["point"], report["point"]["time"]);
    assert_eq!(verified["rto_seconds"], report["rto_seconds"]);
    assert!(bed.varve(&["status"]).ok().stdout.contains("the last one good"));

    // One that fails takes nothing from what was proved before, and leaves as little behind.
    std::fs::remove_file(&bed.wanted).unwrap();
    let failed = bed.varve(&["drill", "db"]).expect_code(1);
    assert!(failed.stdout.contains("wanted") && failed.stderr.contains("next"), "{failed:?}");
    bed.assert_as_before();
    let drill = bed.status()["drill"].clone();
    assert_eq!(
        (&drill["good"], &drill["runs"], &drill["failures"]),
        (&false.into(), &2.into(), &1.into()),
        "{drill:#}"
    );
    assert_eq!(drill["verified"], verified);
    let metrics = bed.varve(&["metrics"]).ok().stdout;
    let value = |name: &str| metrics.lines().find(|line| line.starts_with(&format!("{name}{{"))).map(str::to_owned);
    assert!(value("varve_group_drill_failed").unwrap().ends_with(" 1"), "{metrics}");
    let rto = format!(" {}", verified["rto_seconds"]);
    assert!(value("varve_group_drill_rto_seconds").unwrap().ends_with(&rto), "{metrics}");

    // By hand: it stays until it is ended.
    std::fs::write(&bed.wanted, "").unwrap();
    let answer = last(&bed.varve(&["failover", "db", "--test", "--json"]).ok());
    assert_eq!(answer["report"]["outcome"], "done", "{answer:#}");
    assert_eq!(bed.status()["history"]["takeover"]["test"], true);
    assert!(!bed.mounted() && !bed.told.exists(), "a test is not seen from outside");
    let refused = bed.varve(&["drill", "db"]).expect_code(3);
    assert!(refused.stderr.contains("a test is in place") && refused.stderr.contains("abort db"), "{refused:?}");
    assert_eq!(bed.status()["history"]["takeover"]["test"], true, "it is left alone");
    bed.varve(&["failover", "abort", "db", "--yes"]).ok();
    bed.assert_as_before();
}

#[test]
fn run_and_taken_back() {
    let bed = Bed::new();
    let epoch = bed.status()["epoch"].clone();
    let dry = bed.varve(&["failover", "db", "--dry-run", "--json"]).ok().json();
    assert_eq!(dry["plan"]["steps"].as_array().unwrap().len(), 5, "{dry:#}");
    assert!(bed.varve(&["failover", "db", "--dry-run"]).ok().stdout.contains("unmount"));
    bed.assert_as_before();

    let answer = last(&bed.varve(&["failover", "db", "--yes", "--json"]).ok());
    assert_eq!(answer["report"]["outcome"], "done", "{answer:#}");
    assert!(answer["report"]["rto_seconds"].as_f64().unwrap() < LIMIT.as_secs_f64());
    assert!(bed.mounted() && bed.told.exists());
    assert_eq!(std::fs::read_to_string(bed.at.join("orders")).unwrap(), "17");
    std::fs::write(bed.at.join("more"), "18").unwrap();
    // A shell in the directory is in the way: the abort says so, and nothing is torn from under anybody.
    let held = std::fs::File::open(bed.at.join("orders")).unwrap();
    let refused = bed.varve(&["failover", "abort", "db", "--yes"]);
    assert!([1, 3].contains(&refused.code), "{refused:?}");
    assert!(bed.mounted(), "{refused:?}");
    assert_eq!(bed.status()["role"], "promoted");
    drop(held);
    bed.varve(&["failover", "abort", "db", "--yes"]).ok();
    bed.assert_as_before();
    assert!(bed.status()["epoch"].as_u64() > epoch.as_u64(), "an epoch is never used again");
}

#[test]
fn back_by_itself() {
    let mut bed = Bed::new();
    for bad in ["soon", "1s", "-5m", "0"] {
        let refused = bed.varve(&["failover", "db", "--yes", &format!("--abort-after={bad}")]).expect_code(2);
        assert!(refused.stderr.contains("next"), "{refused:?}");
    }
    bed.varve(&["failover", "db", "--test", "--abort-after", "1h"]).expect_code(2);
    for word in ["commit", "abort"] {
        assert!(bed.varve(&["failover", word]).expect_code(2).stderr.contains("of which group"));
    }
    let asked = bed.varve(&["failover", "db", "--no-plan", "--abort-after", "1h"]).expect_code(3);
    assert!(asked.stderr.contains("--no-plan --abort-after 1h --yes"), "{asked:?}");
    bed.assert_as_before();

    // Also when the receiver was away meanwhile. The plan goes back first, or the mount would be in the way.
    let answer = last(&bed.varve(&["failover", "db", "--yes", "--json", "--abort-after", "8s"]).ok());
    assert_eq!(answer["report"]["outcome"], "done", "{answer:#}");
    let takeover = bed.status()["history"]["takeover"].clone();
    assert_eq!(takeover["abort_at"], answer["abort_at"], "{takeover:#}");
    assert!(takeover["next"].as_str().unwrap().contains("goes back by itself"), "{takeover:#}");
    assert!(bed.mounted());
    bed.pair.recovery.kill(Role::Receiver);
    bed.pair.recovery.start(Role::Receiver);
    wait_until(LIMIT, "the group is replicated again", || bed.status()["role"] == "replica");
    bed.assert_as_before();

    // Somebody uses it: nothing is taken from them, and why is said.
    bed.varve(&["failover", "db", "--yes", "--abort-after", "5s"]).ok();
    let held = std::fs::File::open(bed.at.join("orders")).unwrap();
    wait_until(LIMIT, "the attempt is over", || {
        bed.status()["history"]["takeover"]["next"].as_str().is_some_and(|next| next.contains("did not"))
    });
    assert_eq!(bed.status()["role"], "promoted");
    drop(held);
    // Committed: it stays. What was begun to be taken back is, and is done again.
    bed.varve(&["failover", "commit", "db", "--yes"]).ok();
    bed.varve(&["plan", "undo", "db", "--yes"]).ok();
    bed.varve(&["failover", "db", "--resume"]).ok();
    let takeover = bed.status()["history"]["takeover"].clone();
    assert_eq!((&takeover["committed"], &takeover["abort_at"]), (&true.into(), &Value::Null), "{takeover:#}");
    assert!(bed.mounted());
}

#[test]
fn stopped_in_the_middle_and_gone_on_with() {
    let mut bed = Bed::new();
    std::fs::remove_file(&bed.wanted).unwrap();
    let stopped = bed.varve(&["failover", "db", "--yes", "--json"]).expect_code(1);
    let answer = last(&stopped);
    assert_eq!(answer["report"]["outcome"], "stopped", "{answer:#}");
    assert!(!answer["report"]["left"].as_array().unwrap().is_empty(), "{answer:#}");
    assert!(stopped.stderr.contains("--resume") && stopped.stderr.contains("abort"), "{}", stopped.stderr);
    assert!(bed.mounted() && bed.told.exists(), "what was done stays");
    std::fs::write(&bed.wanted, "").unwrap();
    bed.varve(&["failover", "db", "--resume"]).ok();
    bed.varve(&["failover", "commit", "db", "--yes"]).ok();

    // What was committed is not aborted, and its plan not touched by the attempt; before it goes home, the plan goes back.
    bed.varve(&["failover", "abort", "db", "--yes"]).expect_code(3);
    assert!(bed.mounted());
    bed.varve(&["plan", "undo", "db", "--yes"]).ok();
    assert!(!bed.mounted() && !bed.told.exists());
    assert_eq!(bed.status()["role"], "promoted");
    assert!(bed.varve(&["plan", "undo", "db", "--yes"]).expect_code(5).stderr.contains("next"));

    // Up again, and home: the cut-over takes the plan back by itself.
    bed.varve(&["failover", "db", "--resume"]).ok();
    assert!(bed.mounted());
    std::fs::write(bed.at.join("more"), "18").unwrap();
    bed.mount = None;
    bed.varve(&["failback", "db", "--yes"]).ok();
    wait_until(LIMIT, "it follows", || bed.status()["history"]["takeover"]["failback"]["phase"] == "following");
    let dry = bed.varve(&["failback", "db", "--cut-over", "--dry-run", "--json"]).ok();
    assert!(last(&dry)["next"].as_str().unwrap().contains("in use here"), "{dry:?}");
    assert!(bed.mounted());
    bed.varve(&["failback", "db", "--cut-over", "--yes"]).ok();
    bed.assert_as_before();
    let home = Mount::existing(&bed.scratch, "again", bed.device.path(), "ro");
    assert_eq!(std::fs::read_to_string(home.path().join("more")).unwrap(), "18");
}

#[test]
fn a_plan_that_cannot_be_meant_changes_nothing() {
    let bed = Bed::new();
    let checked = bed.varve(&["plan", "check", "db"]).ok();
    assert!(checked.stdout.contains("understood") && checked.stdout.contains("mount"), "{checked:?}");
    let refuse = |args: &[&str], code: i32, words: &str| {
        let refused = bed.varve(args).expect_code(code);
        assert!(refused.stderr.contains(words), "{args:?}: {}", refused.stderr);
        assert!(refused.stderr.contains("next"), "{args:?}: {}", refused.stderr);
        bed.assert_as_before();
    };
    refuse(&["plan", "check", "nothing"], 5, "takeover/nothing.toml");
    refuse(&["drill", "nothing"], 5, "nothing");
    refuse(&["failover", "db", "--resume"], 3, "not served");
    refuse(&["drill", "db", "--every", "soon"], 2, "soon");
    refuse(&["drill", "db", "--every", "24h"], 3, "timer");
    // A volume that is not in the group.
    bed.plan(Path::new("/dev/nothing"));
    let epoch = bed.status()["epoch"].clone();
    refuse(&["failover", "db", "--yes"], 2, "/dev/nothing");
    refuse(&["drill", "db"], 2, "/dev/nothing");
    // Not understood.
    let text = std::fs::read_to_string(bed.plan_file()).unwrap().replace("fstype", "filesystem");
    std::fs::write(bed.plan_file(), text).unwrap();
    refuse(&["plan", "check", "db"], 2, "filesystem");
    refuse(&["failover", "db", "--yes"], 2, "filesystem");
    assert_eq!(bed.status()["epoch"], epoch);
    // It is not in the way of one who wants to do it by hand.
    bed.varve(&["failover", "db", "--yes", "--no-plan"]).ok();
    assert!(!bed.mounted());
    bed.varve(&["failover", "abort", "db", "--yes"]).ok();
    bed.assert_as_before();
}
