//! `varve status`: both daemons of a host in one picture, and never a picture that looks fine when it is not known.

mod fake;

use fake::{Root, group, knows, problem, status};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

#[test]
fn json_has_every_field_of_the_contract() {
    let root = Root::production();
    let mut group = group("db", "source");
    group["data"] = json!("resync");
    group["gap_reason"] = json!("ring-full");
    group["resync"] = json!({"done_bytes": 1, "total_bytes": 2});
    group["gaps"] = json!([{"from": "2026-11-20T14:00:00.000000Z", "to": null, "reason": "ring-full"}]);
    let expected = group.clone();
    root.daemon("agent", knows("agent", vec![group]));
    let said = root.varve(&["status", "--json"]);
    assert_eq!((said.code, said.err.as_str(), said.out.lines().count()), (0, "", 1));
    let answer = said.json();
    assert_eq!(keys(&answer), ["daemons", "groups", "problems"]);
    // Fields are only added: an agent that does not know the newest ones is shown as it answers.
    for (field, value) in expected.as_object().expect("a group") {
        assert_eq!(&answer["groups"][0][field], value, "{field}: what the agent says, unchanged");
    }
    assert_eq!(answer["daemons"], status("agent", vec![])["daemons"]);
    assert_eq!(answer["problems"], json!([]));
    // CLI.md, word for word.
    for field in [
        "name",
        "role",
        "link",
        "data",
        "reason",
        "epoch",
        "rpo_seconds",
        "lag_bytes",
        "captured",
        "durable",
        "window",
        "gaps",
        "volumes",
        "resync",
    ] {
        assert!(answer["groups"][0].get(field).is_some(), "{field}");
    }
    assert_eq!(keys(&answer["groups"][0]["window"]), ["from", "to"]);
    assert_eq!(keys(&answer["groups"][0]["volumes"][0]), ["bytes", "path", "replica"]);
    assert_eq!(keys(&answer["groups"][0]["resync"]), ["done_bytes", "total_bytes"]);
}

#[test]
fn metrics_say_who_is_silent() {
    let root = Root::production();
    root.write("etc/varve/receiver.toml", "");
    let mut group = group("db", "source");
    let alert = json!({ "id": "from-the-future", "severity": "critical", "text": "t", "since": "s", "next": "n" });
    group["alerts"] = json!([alert]);
    root.daemon("agent", knows("agent", vec![group]));
    let said = root.varve(&["metrics"]);
    assert_eq!((said.code, said.err.as_str()), (0, ""));
    for line in [
        "varve_daemon_up{daemon=\"receiver\"} 0",
        "varve_group_rpo_seconds{daemon=\"agent\",group=\"db\"} 0.5",
        "varve_group_data{daemon=\"agent\",group=\"db\",data=\"protected\"} 1",
        "varve_group_data{daemon=\"agent\",group=\"db\",data=\"gap\"} 0",
        "varve_alert{daemon=\"agent\",group=\"db\",id=\"from-the-future\",severity=\"critical\"} 1",
        "varve_group_events_total{daemon=\"agent\",group=\"db\",counter=\"frames_sent\"} 7",
    ] {
        assert!(said.out.lines().any(|found| found == line), "no '{line}' in\n{}", said.out);
    }
    let answer = root.varve(&["metrics", "--json"]).json();
    assert_eq!(answer["silent"], json!(["receiver"]));
    assert!(answer["metrics"].as_array().expect("metrics").iter().any(|metric| metric["name"] == "varve_alert"));
    // Nobody answers: the numbers say so as well.
    let nobody = Root::production();
    let said = nobody.varve(&["metrics"]);
    assert_eq!(said.code, 4);
    assert!(said.out.contains("varve_daemon_up{daemon=\"agent\"} 0"), "{said:?}");
}

#[test]
fn a_host_with_both_roles_is_one_picture() {
    let root = Root::production();
    root.write("etc/varve/receiver.toml", "");
    root.daemon("agent", knows("agent", vec![group("web", "source"), group("db", "source")]));
    root.daemon("receiver", knows("receiver", vec![group("mail", "replica"), group("db", "replica")]));
    let answer = root.varve(&["status", "--json"]).json();
    let groups: Vec<(&str, &str)> = answer["groups"]
        .as_array()
        .expect("groups")
        .iter()
        .map(|group| (group["name"].as_str().expect("a name"), group["role"].as_str().expect("a role")))
        .collect();
    assert_eq!(groups, [("db", "source"), ("db", "replica"), ("mail", "replica"), ("web", "source")]);
    assert_eq!(answer["daemons"].as_array().map(Vec::len), Some(2));
    // Known to one of them: no error.
    let said = root.varve(&["status", "mail"]);
    assert_eq!((said.code, said.err.as_str()), (0, ""));
    assert!(
        said.out.contains("mail   replica  streaming  protected  0.5 s  4.0 KiB  2026-11-20 14:03:22.512Z"),
        "{said:?}"
    );
    assert!(!said.out.contains("web"), "{said:?}");
}

#[test]
fn a_silent_daemon_is_never_overlooked() {
    let root = Root::production();
    root.write("etc/varve/receiver.toml", "");
    root.daemon("receiver", knows("receiver", vec![group("db", "replica")]));
    let said = root.varve(&["status"]);
    assert_eq!(said.code, 0, "one of the two answered: {said:?}");
    assert!(
        said.out.contains("\nagent  NOT REACHABLE, what it would say is not known: varve-agent does not run"),
        "{said:?}"
    );
    assert!(said.out.contains("  next  start it: VARVE_ROOT="), "{said:?}");
    let answer = root.varve(&["status", "--json"]).json();
    assert_eq!(answer["problems"][0]["daemon"], "agent");
    assert_eq!(answer["problems"][0]["kind"], "unreachable");
    assert_eq!(answer["groups"][0]["name"], "db");

    let nobody = Root::production();
    nobody.dead_socket("agent");
    let said = nobody.varve(&["status", "--json"]);
    assert_eq!((said.code, &said.json()["problem"]["kind"]), (4, &json!("unreachable")));
    assert!(said.json().get("groups").is_none(), "nothing that a script could take for good news");
}

#[test]
fn a_daemon_that_cannot_say_is_shown_with_its_reason() {
    let root = Root::production();
    root.daemon("agent", |_| problem("failed", "the groups cannot be read", "the disk failed", "varve doctor"));
    let said = root.varve(&["status"]);
    said.problem(1, "the groups cannot be read", "the disk failed", "varve doctor");
}

/// On a host that is set up, somebody without rights is not told that it is not.
#[test]
fn without_rights_the_answer_is_to_be_root() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    if !std::fs::read_to_string("/proc/self/status").is_ok_and(|text| text.contains("\nUid:\t0\t")) {
        return;
    }
    let root = Root::production();
    root.daemon("agent", knows("agent", vec![]));
    // As systemd-tmpfiles makes them; the program itself must be reachable for somebody without rights.
    for (path, mode) in [("", 0o755), ("etc/varve", 0o700), ("run/varve", 0o755), ("run/varve/agent.sock", 0o600)] {
        std::fs::set_permissions(root.at(path), std::fs::Permissions::from_mode(mode)).expect("changed");
    }
    let program = root.at("varve");
    std::fs::copy(env!("CARGO_BIN_EXE_varve"), &program).expect("copied");
    let output = Command::new(&program)
        .arg("status")
        .env("VARVE_ROOT", root.path())
        .uid(65534)
        .gid(65534)
        .output()
        .expect("varve runs");
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(4), "{said}");
    assert!(said.contains("agent.sock may only be used by root\n  next: run it as root\n"), "{said}");
}

#[test]
fn suggestions_name_another_root() {
    let root = Root::production();
    root.daemon("agent", knows("agent", vec![]));
    let dir = root.path().to_str().expect("text");
    let said = root.varve_with(&["status", "--root", dir], |_| {});
    assert!(said.out.ends_with(&format!("  next  varve --root {dir} protect GROUP VOLUME...\n")), "{said:?}");
}

#[test]
fn watching_gives_a_line_a_second() {
    let root = Root::production();
    root.daemon("agent", knows("agent", vec![group("db", "source")]));
    let mut child = Command::new(env!("CARGO_BIN_EXE_varve"))
        .args(["status", "db", "--watch", "--json"])
        .env("VARVE_ROOT", root.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("varve runs");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    for _ in 0..2 {
        let line = lines.next().expect("a line").expect("text");
        let picture: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(picture["groups"][0]["name"], "db");
    }
    // The daemon goes away: that is a line too, and not one with groups in it.
    std::fs::remove_file(root.at("run/varve/agent.sock")).expect("removed");
    let gone = lines.map(|line| serde_json::from_str::<Value>(&line.expect("text")).expect("JSON"));
    let gone = gone.take(3).find(|picture| picture["groups"] == json!([])).expect("within three seconds");
    assert_eq!(gone["problems"][0]["kind"], "unreachable");
    child.kill().expect("ended");
    child.wait().expect("ended");
}

/// A reader that leaves (`varve status --watch | head`) ends the program, quietly.
#[test]
fn a_reader_that_leaves() {
    let root = Root::production();
    root.daemon("agent", knows("agent", vec![group("db", "source")]));
    let mut child = Command::new(env!("CARGO_BIN_EXE_varve"))
        .args(["status", "--watch", "--json"])
        .env("VARVE_ROOT", root.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("varve runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("ended");
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), b"".as_slice()));
}
