//! Every command that asks before it does something: what it advises a script to look with is there, and changes nothing.

mod fake;

use fake::{Root, Said, Step, done, group, knows};
use serde_json::{Value, json};
use std::process::Command;
use std::sync::{Arc, Mutex};

const POINT: &str = "2026-11-20T14:03:22.512345Z";

fn point() -> Value {
    json!({ "time": POINT, "position": "abababab:4096", "height": 7, "consistency": "crash", "asked": "latest",
        "distance_seconds": 0.0 })
}

/// `db` is replicated, `up` runs here and is called home, `tested` is being tested.
fn groups() -> Vec<Value> {
    let mut all = vec![group("db", "replica"), group("up", "promoted"), group("tested", "replica")];
    for (place, test) in [(1, false), (2, true)] {
        let failback = json!({ "host": "db1", "since": POINT, "phase": "following", "pass": 2, "done_bytes": 0,
            "total_bytes": 0, "sent_bytes": 4096, "lag_seconds": 0.0, "problem": null, "next": "" });
        all[place]["history"] = json!({ "layers": 0, "bytes": 0, "records": 0, "views": 0, "bookmarks": 0, "kept": 0,
            "avoided_reads": null, "damaged": 0, "retention": { "age_seconds": null, "bytes": null }, "notice": null,
            "takeover": { "since": POINT, "point": POINT, "committed": false, "test": test, "devices": ["/dev/null"],
                "failback": if test { Value::Null } else { failback }, "next": "" } });
    }
    all
}

fn answer(request: &Value) -> Vec<Step> {
    let (group, dry_run) = (&request["group"], &request["dry_run"]);
    match request["command"].as_str().expect("a command") {
        "hosts" => done(json!({ "invites": [], "hosts": [{ "name": "db1", "revoked": false, "connected": true,
            "joined": POINT, "fingerprint": "00ff", "address": "10.0.0.1:5" }] })),
        "keep" => done(json!({ "group": group, "name": "b", "time": POINT, "kept": true, "bytes": 1 })),
        "rollback" => {
            done(json!({ "group": group, "from_point": point(), "to_point": point(), "bytes": 0, "blocks": 0,
            "seconds": 0.0, "dry_run": dry_run, "held": true }))
        }
        "restore" => done(json!({ "group": group, "volume": "/dev/vdb", "to": request["to"], "point": point(),
            "bytes": 0, "written_bytes": 0, "seconds": 0.0, "digest": null, "verified": false, "dry_run": dry_run })),
        "retention" => done(json!({ "group": group, "retention": { "age_seconds": 3600, "bytes": null },
            "window": { "from": POINT, "to": POINT }, "bytes": 1, "expiring_bytes": 1, "expiring_to": POINT,
            "held_bytes": 0, "dry_run": dry_run })),
        "failover" => done(json!({ "group": group, "point": point(), "newest": point(), "left_out_bytes": 0,
            "not_here_bytes": null, "source_heard_seconds": null, "epoch": 2, "test": false, "committed": false,
            "aborted": false, "dry_run": dry_run, "seconds": 0.0, "volumes": [], "hints": [] })),
        "failback" | "failback-cut-over" => done(json!({ "group": group, "host": "db1", "epoch": 2, "phase": "none",
            "changed_here_bytes": 0, "differing_bytes": 0, "only_there_bytes": 0, "captured_there_bytes": 0,
            "compared_bytes": 0, "sent_bytes": 0, "lag_seconds": null, "pause_seconds": null, "seconds": 0.0,
            "home": false, "dry_run": dry_run, "volumes": [], "next": "" })),
        "rollback-release-look" if request["group"] != "db" => {
            fake::problem("refused", "nothing of it is held", "it was not rolled back", "varve status")
        }
        _ => knows("receiver", groups())(request),
    }
}

fn recovery() -> (Root, Arc<Mutex<Vec<Value>>>) {
    let root = Root::recovery();
    let asked = root.daemon("receiver", answer);
    let made = root.at("made");
    let made = made.display();
    let step = format!("[[step]]\nname = \"it\"\nkind = \"command\"\nrun = \"touch {made}\"\nundo = \"rm {made}\"\n");
    root.write("etc/varve/takeover/up.toml", &format!("version = 1\n{step}"));
    fake::run_plan_of(&root, "up");
    root.write("there.img", "");
    (root, asked)
}

/// A production host whose volumes a planned switch-over left quiet.
fn production() -> (Root, Arc<Mutex<Vec<Value>>>) {
    let root = Root::production();
    let mut quiet = group("db", "source");
    quiet["link"] = json!("disconnected");
    quiet["authority"] = json!({ "text": "it may run there", "since": null, "not_home_bytes": null,
        "quiet": "read-only", "unsure": true, "next": "ask there" });
    let asked = root.daemon("agent", move |request| match request["command"].as_str() {
        Some("protect") => done(json!({ "group": request["group"], "notes": [],
            "volumes": [{ "path": "/dev/vdb", "bytes": 1073741824, "replica": null }] })),
        _ => knows("agent", vec![quiet.clone()])(request),
    });
    (root, asked)
}

const OF_RECOVERY: &[&str] = &[
    "host revoke db1",
    "forget db",
    "rollback db --at -5m",
    "rollback db --release",
    "restore db --at -5m --volume /dev/vdb --to there.img --force",
    "retention db --age 1h",
    "bookmark db b --release",
    "failover db",
    "failover db --planned --quick --no-plan --abort-after 1h",
    "failover commit up",
    "failover abort up",
    "failover abort up --force",
    "failover abort tested",
    "plan undo up",
    "failback up",
    "failback up --to db2 --keep-branch mine",
    "failback up --cut-over",
    "failback up --cut-over --quick",
    "failback up --stop",
];
const OF_PRODUCTION: &[&str] = &["unprotect db", "failover abort db --force", "failback db --volume /dev/vdb"];

/// As a shell reads it; there is no terminal.
fn shell(root: &Root, line: &str) -> Said {
    let varve = format!("varve() {{ '{}' \"$@\"; }}; {line}", env!("CARGO_BIN_EXE_varve"));
    let mut command = Command::new("sh");
    command.args(["-c", &varve]).env("VARVE_ROOT", root.path()).current_dir(root.path());
    command.stdin(std::process::Stdio::null());
    let output = command.output().expect("a shell");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    Said { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
}

#[test]
fn what_is_advised_before_a_yes_is_there_and_changes_nothing() {
    for (of, (root, asked)) in [(OF_RECOVERY, recovery()), (OF_PRODUCTION, production())] {
        for words in of {
            let refused = shell(&root, &format!("varve {words}"));
            refused.problem(3, "nothing was changed", "standard input is not a terminal", "look with 'varve ");
            let next = refused.err.lines().last().expect("a line");
            let advised = next.split_once("look with '").and_then(|(_, rest)| rest.split_once("', then say '"));
            let (look, go) = advised.unwrap_or_else(|| panic!("{next}"));
            assert!(go.ends_with(" --yes'"), "{go}");
            // Nothing of what was said is lost on the way.
            for flag in words.split(' ').filter(|word| word.starts_with("--")) {
                assert!(look.contains(flag) && go.contains(flag), "{flag} in {next}");
            }
            // A yes beside it changes nothing either.
            for line in [look.to_owned(), format!("varve {words} --dry-run --yes")] {
                let said = shell(&root, &line);
                assert_eq!(said.code, 0, "{line}: {said:?}");
                assert!(
                    said.out.contains("nothing was changed") || said.out.contains("nothing was written"),
                    "{said:?}"
                );
                let said = shell(&root, &format!("{line} --json"));
                assert_eq!((said.code, &said.json()["dry_run"]), (0, &json!(true)), "{line}: {said:?}");
            }
        }
        for request in asked.lock().expect("fine").iter() {
            let harmless =
                ["status", "hosts", "points", "rollback-release-look"].iter().any(|word| request["command"] == *word);
            assert!(harmless || request["dry_run"] == true, "{request}");
        }
    }
}

#[test]
fn what_would_end_is_told() {
    let (root, _) = recovery();
    let commit = root.varve(&["failover", "commit", "up", "--dry-run"]).out;
    assert!(commit.contains("would run here for good, under epoch 1"), "{commit}");
    let abort = root.varve(&["failover", "abort", "up", "--dry-run"]).out;
    for words in ["would be undone", "goes away: /dev/null", "taken back before: "] {
        assert!(abort.contains(words), "{words} in {abort}");
    }
    let test = root.varve(&["failover", "abort", "tested", "--dry-run"]).out;
    assert!(test.contains("the test of group 'tested' would be over"), "{test}");
    let undo = root.varve(&["plan", "undo", "up", "--dry-run", "--json"]).json();
    assert_eq!((&undo["group"], undo["left"].as_array().map(Vec::len)), (&json!("up"), Some(1)), "{undo}");
    assert!(root.at("made").exists());
}

/// What would be refused is refused when it is looked at.
#[test]
fn there_is_nothing_to_look_at() {
    let (root, _) = recovery();
    for word in ["commit", "abort"] {
        root.varve(&["failover", word, "db", "--dry-run"]).problem(3, "nothing of 'db'", "not taken over", "status db");
    }
    root.varve(&["failover", "commit", "tested", "--dry-run"]).problem(3, "nothing of", "not taken over", "status");
    root.varve(&["plan", "undo", "db", "--dry-run"]).problem(5, "nothing of the plan of 'db'", "", "status db");
    root.varve(&["failback", "db", "--stop", "--dry-run"]).problem(3, "nothing of 'db'", "not called home", "failback");
    let (root, _) = production();
    let stay = "the volumes of 'db' would stay as they are";
    root.varve(&["failover", "abort", "db", "--dry-run"]).problem(3, stay, "it may run there", "--force");
}

/// They would be swallowed.
#[test]
fn flags_of_a_takeover_do_not_fit_its_end() {
    let (root, asked) = recovery();
    for word in ["commit", "abort"] {
        for flag in ["--at=-5m", "--test", "--planned", "--abort-after=1h", "--no-plan", "--resume"] {
            let said = root.varve(&["failover", word, "up", flag, "--yes"]);
            let name = flag.split('=').next().expect("a name");
            said.problem(2, &format!("{name} does not fit 'failover {word}'"), "--dry-run", word);
        }
    }
    root.varve(&["failover", "commit", "up", "--force", "--yes"]).problem(2, "--force", "", "failover commit GROUP");
    root.varve(&["failover", "db", "--force", "--yes"]).problem(2, "--force", "for abort", "failover abort db");
    assert!(asked.lock().expect("fine").is_empty());
}

/// What keeps history costs a disk, so it can be looked at, too; and a flag that fits nothing is told.
#[test]
fn a_bookmark_is_looked_at_before_it_is_kept() {
    let (root, asked) = recovery();
    let said = root.varve(&["bookmark", "db", "b", "--keep", "--dry-run"]);
    assert!(said.code == 0 && said.out.contains("would be kept; nothing was changed"), "{said:?}");
    assert_eq!(root.varve(&["bookmark", "db", "b", "--keep", "--dry-run", "--json"]).json()["dry_run"], true);
    assert!(asked.lock().expect("fine").iter().all(|request| request["dry_run"] == true));
    asked.lock().expect("fine").clear();
    root.varve(&["bookmark", "db", "b", "--dry-run"]).problem(
        2,
        "--dry-run does not fit",
        "--release",
        "leave it away",
    );
    root.varve(&["bookmark", "db", "b", "--keep", "--yes"]).problem(2, "--yes does not fit", "--release", "leave");
    for words in ["failback up --to db2 --quick --yes", "failover db --test --quick", "failover db --test --limit 5"] {
        let said = root.varve(&words.split(' ').collect::<Vec<_>>());
        said.problem(2, "cannot be used with", "the usage is", "--help");
    }
    root.varve(&["drill", "show", "db", "--every", "24h"]).problem(
        2,
        "'show' takes no other flags",
        "last drill",
        "--every",
    );
    assert!(asked.lock().expect("fine").is_empty());
}

#[test]
fn a_release_that_is_looked_at_is_asked_for() {
    let (root, _) = recovery();
    let said = root.varve(&["rollback", "db", "--release", "--dry-run"]);
    assert!(said.code == 0 && said.out.contains("nothing was changed"), "{said:?}");
    root.varve(&["rollback", "up", "--release", "--dry-run"]).problem(
        3,
        "nothing of it is held",
        "not rolled back",
        "status",
    );
    let root = Root::recovery();
    root.varve(&["rollback", "db", "--release", "--dry-run"]).problem(4, "not reachable", "does not run", "");
}

/// A host that protects a group and receives others: each abort goes to the daemon that it is about.
#[test]
fn an_abort_finds_its_daemon_on_a_host_with_both_roles() {
    let (root, received) = recovery();
    root.write("etc/varve/agent.toml", "receiver = \"127.0.0.1:7443\"\nname = \"db1\"\n");
    let mut quiet = group("own", "source");
    quiet["link"] = json!("disconnected");
    quiet["authority"] = json!({ "text": "it may run there", "since": null, "not_home_bytes": null,
        "quiet": "read-only", "unsure": true, "next": "ask there" });
    let mut same = quiet.clone();
    same["name"] = json!("up");
    let asked = root.daemon("agent", knows("agent", vec![quiet, same]));
    let said = root.varve(&["failover", "abort", "own", "--force", "--dry-run"]);
    assert!(said.code == 0 && said.out.contains("might be written here again"), "{said:?}");
    assert_eq!(root.varve(&["failover", "abort", "own", "--force", "--yes"]).code, 0);
    let resumed = |request: &Value| request["command"] == "resume" && request["group"] == "own";
    assert!(asked.lock().expect("fine").iter().any(resumed));
    assert!(received.lock().expect("fine").iter().all(|request| request["command"] == "status"));
    // A takeover here is meant, whatever the other daemon has under that name.
    let said = root.varve(&["failover", "abort", "up", "--dry-run"]);
    assert!(said.code == 0 && said.out.contains("would be undone"), "{said:?}");
}

/// A script's log on a full disk hides neither the problem nor its code.
#[test]
fn a_problem_is_told_although_the_answer_cannot_be() {
    let (root, _) = recovery();
    for flags in ["", " --json"] {
        let said = shell(&root, &format!("varve status nothing{flags} > /dev/full"));
        said.problem(5, "nothing", "", "");
    }
    assert_eq!(shell(&root, "varve status db --json > /dev/full").code, 1, "what nobody got is not done");
}
