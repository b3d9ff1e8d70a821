//! Commands that run or take back a takeover plan: what they do when nobody reads on, and what they refuse beforehand.

mod fake;

use fake::{Root, Step, done, group, knows, problem};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::SystemTime;
use varve_common::control::PointReply;
use varve_common::paths::Paths;
use varve_takeover::{Commands, Context, Device, Mode, Outcome, Plan, Runner, Tools};

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

fn paths(root: &Root) -> Paths {
    Paths::new(root.path())
}

/// Its plan was run for real.
fn run_plan(root: &Root) {
    let context = Context {
        group: "db".to_owned(),
        point: PointReply::default(),
        devices: vec![Device { volume: "/dev/vdb".into(), device: PathBuf::from("/dev/null"), bytes: 1 << 30 }],
        mode: Mode::Live,
        paths: paths(root),
        began: SystemTime::now(),
        tools: Tools::default(),
        commands: Commands { resume: "resume".into(), undo: "undo".into() },
    };
    let plan = Plan::load(paths(root).takeover_plan("db")).expect("a plan");
    let report = Runner::new(plan, context).expect("it fits").run(&mut |_| {}).expect("begun");
    assert_eq!(report.outcome, Outcome::Done, "{report}");
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
    run_plan(&root);
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
    run_plan(&root);
    let refuse = || problem("refused", "it was not given back", "its host is away", "wait for it");
    receiver(&root, "failback-cut-over", refuse);
    assert_eq!(unread(&root, &["failback", "db", "--cut-over", "--yes", "--json"]), Some(3));
    assert_eq!(unread(&root, &["status", "nothing", "--json"]), Some(5));
    assert_eq!(unread(&root, &["status", "db"]), Some(0));
}
