//! Commands that run or take back a takeover plan: what they do when nobody reads on, and what they refuse beforehand.

mod fake;

use fake::{Root, Step, done, group, knows, problem};
use serde_json::{Value, json};
use std::process::{Command, Stdio};
use varve_takeover::DrillMark;

/// A recovery host whose group `db` has a plan of two commands.
fn planned() -> Root {
    let root = Root::recovery();
    let step = |name: &str| {
        let file = root.at(name);
        format!(
            "[[step]]\nname = \"{name}\"\nkind = \"command\"\nrun = \"touch {0}\"\nundo = \"rm {0}\"\n",
            file.display()
        )
    };
    root.write("etc/varve/takeover/db.toml", &format!("version = 1\n{}{}", step("first"), step("second")));
    root
}

/// Runs `varve` here; nobody reads what it prints. The exit code.
fn unread(root: &Root, args: &[&str]) -> Option<i32> {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    Command::new(env!("CARGO_BIN_EXE_varve"))
        .args(args)
        .env("VARVE_ROOT", root.path())
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::null())
        .status()
        .expect("varve runs")
        .code()
}

/// A receiver that knows the group, and answers one command so.
fn receiver(
    root: &Root,
    command: &'static str,
    answer: fn() -> Vec<Step>,
) -> std::sync::Arc<std::sync::Mutex<Vec<Value>>> {
    let others = knows("receiver", vec![group("db", "promoted")]);
    root.daemon("receiver", move |request| match request["command"] == command {
        true => answer(),
        false => others(request),
    })
}

/// `varve failback db --cut-over --yes --json | head -1`: half of it would leave the business running nowhere.
#[test]
fn a_reader_that_leaves_does_not_end_the_work() {
    let root = planned();
    fake::run_plan_of(&root, "db");
    let home = || {
        done(json!({ "group": "db", "host": "db1", "phase": "home", "home": true, "dry_run": false, "epoch": 3,
            "changed_here_bytes": 0, "sent_bytes": 0, "compared_bytes": 0, "seconds": 1.0, "volumes": [], "next": "" }))
    };
    let asked = receiver(&root, "failback-cut-over", home);
    assert_eq!(unread(&root, &["failback", "db", "--cut-over", "--yes", "--json"]), Some(0));
    assert!(!root.at("first").exists() && !root.at("second").exists(), "the whole plan is taken back");
    let asked = asked.lock().expect("fine");
    assert!(asked.iter().any(|request| request["command"] == "failback-cut-over" && request["dry_run"] == false));
}

/// A problem that nobody reads is one all the same.
#[test]
fn the_exit_code_is_told_without_a_reader() {
    let root = planned();
    fake::run_plan_of(&root, "db");
    let refuse = || problem("refused", "it was not given back", "its host is away", "wait for it");
    receiver(&root, "failback-cut-over", refuse);
    assert_eq!(unread(&root, &["failback", "db", "--cut-over", "--yes", "--json"]), Some(3));
    assert_eq!(unread(&root, &["status", "nothing", "--json"]), Some(5));
    assert_eq!(unread(&root, &["status", "db"]), Some(0));
}

/// Its plan is in place as a test's, as far as the state on disk tells.
fn run_as_test(root: &Root) {
    fake::run_plan_of(root, "db");
    let live = root.paths().takeover_state("db").join("live/state.json");
    let text = std::fs::read_to_string(&live).expect("a state");
    std::fs::remove_file(&live).expect("removed");
    root.write("var/lib/varve/takeover/db/test/state.json", &text.replace("\"live\"", "\"test\""));
}

fn was_asked(asked: &std::sync::Mutex<Vec<Value>>, command: &str) -> bool {
    asked.lock().expect("fine").iter().any(|request| request["command"] == command)
}

/// What 'failover abort --force' left is found while the source is still the source.
#[test]
fn what_an_earlier_takeover_left_is_found_before_anything_moves() {
    let root = planned();
    fake::run_plan_of(&root, "db");
    let asked = root.daemon("receiver", knows("receiver", vec![group("db", "replica")]));
    std::fs::remove_file(root.at("first")).expect("removed");
    assert_eq!(root.varve(&["plan", "undo", "db", "--yes"]).code, 1, "its undo does not work");
    let what = "the takeover of group 'db' was not begun";
    for args in [&["failover", "db", "--yes"][..], &["failover", "db", "--dry-run"]] {
        root.varve(args).problem(3, what, "is not taken back", "plan undo db");
    }
    assert!(!was_asked(&asked, "failover"), "the source was not fenced");
    // A test meets nothing of it, and to make only the devices needs no plan.
    for args in [&["failover", "db", "--test"][..], &["failover", "db", "--no-plan", "--yes"]] {
        root.varve(args);
        assert!(was_asked(&asked, "failover"), "{args:?}");
        asked.lock().expect("fine").clear();
    }
    root.write("first", "");
    assert_eq!(root.varve(&["plan", "undo", "db", "--yes"]).code, 0);
    root.varve(&["failover", "db", "--yes"]);
    assert!(was_asked(&asked, "failover"));
    asked.lock().expect("fine").clear();

    run_as_test(&root);
    root.varve(&["failover", "db", "--test"]).problem(3, what, "a test of it", "failover abort db");
    assert!(!was_asked(&asked, "failover"));
}

/// A takeover that is in place is gone on with, not begun again.
#[test]
fn a_takeover_that_is_in_place_is_not_begun_again() {
    let root = planned();
    fake::run_plan_of(&root, "db");
    let mut taken = group("db", "promoted");
    taken["history"] = json!({ "layers": 0, "bytes": 0, "records": 0, "views": 0, "bookmarks": 0, "kept": 0,
        "avoided_reads": null, "damaged": 0, "retention": { "age_seconds": null, "bytes": null }, "notice": null,
        "takeover": { "since": "2026-11-20T14:03:22Z", "point": "2026-11-20T14:03:22Z", "committed": false, "test": false,
            "devices": ["/dev/null"], "next": "" } });
    let asked = root.daemon("receiver", knows("receiver", vec![taken]));
    root.varve(&["failover", "db", "--yes"]).problem(3, "not begun", "in place", "failover db --resume");
    assert!(!was_asked(&asked, "failover"));
    let resumed = root.varve(&["failover", "db", "--resume"]);
    assert_eq!(resumed.code, 0, "{resumed:?}");
}

/// A receiver whose group is tested.
fn tested(root: &Root) -> std::sync::Arc<std::sync::Mutex<Vec<Value>>> {
    let mut tested = group("db", "replica");
    tested["history"] = json!({ "layers": 0, "bytes": 0, "records": 0, "views": 0, "bookmarks": 0, "kept": 0,
        "avoided_reads": null, "damaged": 0, "retention": { "age_seconds": null, "bytes": null }, "notice": null,
        "takeover": { "since": "2026-11-20T14:03:22Z", "point": "2026-11-20T14:03:22Z", "committed": false, "test": true,
            "devices": ["/dev/null"], "next": "" } });
    root.daemon("receiver", knows("receiver", vec![tested]))
}

/// Somebody works in it.
#[test]
fn a_drill_leaves_the_test_of_an_operator_alone() {
    let what = "the drill of group 'db' was not begun";
    let root = planned();
    let asked = tested(&root);
    root.varve(&["drill", "db"]).problem(3, what, "a test is in place", "failover abort db");
    assert!(!was_asked(&asked, "failover-abort"));
    // Its devices are gone (the receiver was started again), its bubble is not.
    let root = planned();
    run_as_test(&root);
    root.daemon("receiver", knows("receiver", vec![group("db", "replica")]));
    root.varve(&["drill", "db"]).problem(3, what, "a test is in place", "failover abort db");
    assert!(root.paths().takeover_state("db").join("test/state.json").exists());
}

#[test]
fn a_drill_takes_away_what_a_killed_one_left() {
    let root = planned();
    let asked = tested(&root);
    let mark = DrillMark::open(&root.paths(), "db").expect("the only one");
    mark.set().expect("noted");
    root.varve(&["drill", "db"]).problem(3, "was not begun", "another one is being run", "wait for it");
    assert!(!was_asked(&asked, "failover-abort"), "it is alive");
    drop(mark);
    // The receiver of this test understands no more of it.
    root.varve(&["drill", "db"]);
    assert!(was_asked(&asked, "failover-abort"), "it was killed");
}

/// What a killed drill noted does not make a later test its own.
#[test]
fn a_test_of_an_operator_is_no_drills() {
    let root = planned();
    let is_set = || DrillMark::open(&root.paths(), "db").expect("the only one").is_set();
    DrillMark::open(&root.paths(), "db").and_then(|mark| mark.set()).expect("noted");
    assert!(is_set());
    let refuse = || problem("refused", "it is not tested", "no point", "wait");
    receiver(&root, "failover", refuse);
    root.varve(&["failover", "db", "--test"]);
    assert!(!is_set());
    // Nothing was made by a drill that was refused.
    root.varve(&["drill", "db"]).problem(3, "it is not tested", "no point", "wait");
    assert!(!is_set());
}
