//! What the subcommands ask of the daemons, and what they make of the answers: text and JSON.

mod fake;

use fake::{Root, Step, done, group, knows, problem, progress};
use serde_json::{Value, json};
use std::time::Duration;

fn host(name: &str, revoked: bool, connected: bool) -> Value {
    json!({"name": name, "revoked": revoked, "connected": connected, "joined": "2026-01-02T03:04:05.000000Z",
        "fingerprint": "00112233445566778899aabb", "address": if connected { json!("10.0.0.1:5000") } else { Value::Null }})
}

#[test]
fn host_invite() {
    let root = Root::recovery();
    let invite = json!({"name": "db1", "token": "varve1.abc", "expires": "2026-11-20T15:00:00.000000Z",
        "address": "[::]:7443", "replaces": false});
    let answer = invite.clone();
    let asked = root.daemon("receiver", move |request| {
        let mut answer = answer.clone();
        (answer["name"], answer["replaces"]) = (request["name"].clone(), json!(request["name"] == "old"));
        done(answer)
    });
    let said = root.varve(&["host", "invite", "db1", "--ttl", "30m"]);
    assert_eq!((said.code, said.out.as_str()), (0, "varve1.abc\n"), "standard output is the token alone");
    assert_eq!(
        said.err,
        "token for 'db1', good once, until 2026-11-20 15:00:00.000Z; on that host: varve join THIS-HOST:7443 TOKEN\n"
    );
    let said = root.varve(&["host", "invite", "db1", "--json"]);
    assert_eq!((said.code, said.json(), said.err.as_str()), (0, invite, ""));
    // One that is there already would be refused once somebody joins in its place.
    let said = root.varve(&["host", "invite", "old"]);
    assert_eq!((said.code, said.out.as_str()), (0, "varve1.abc\n"));
    let lines: Vec<&str> = said.err.lines().collect();
    assert!(lines.len() == 2 && lines[1].starts_with("'old' has joined already: "), "{lines:?}");
    assert_eq!(root.varve(&["host", "invite", "old", "--json"]).json()["replaces"], true);
    let asked = asked.lock().expect("fine");
    assert_eq!(asked[0], json!({"command": "invite", "name": "db1", "ttl_seconds": 1800}));
    assert_eq!(asked[1]["ttl_seconds"], 3600, "the default");
}

#[test]
fn host_list() {
    let root = Root::recovery();
    let hosts = json!({"hosts": [host("db1", false, true), host("old", true, false), host("web", false, false)],
        "invites": [{"name": "new", "expires": "2026-11-20T15:00:00.000000Z"}]});
    let answer = hosts.clone();
    root.daemon("receiver", move |_| done(answer.clone()));
    let expected = "\
NAME  STATE      SINCE / UNTIL             FROM           CERTIFICATE
db1   connected  2026-01-02 03:04:05.000Z  10.0.0.1:5000  0011223344556677
old   revoked    2026-01-02 03:04:05.000Z  -              0011223344556677
web   enrolled   2026-01-02 03:04:05.000Z  -              0011223344556677
new   invited    2026-11-20 15:00:00.000Z  -              -
";
    assert_eq!(root.varve(&["host", "list"]).out, expected);
    assert_eq!(root.varve(&["host", "list", "--json"]).json(), hosts);
}

#[test]
fn host_list_of_nobody() {
    let root = Root::recovery();
    root.daemon("receiver", |_| done(json!({"hosts": [], "invites": []})));
    let said = root.varve(&["host", "list"]);
    assert_eq!(said.out, "no host has joined and none is invited\nnext: varve host invite NAME\n");
}

#[test]
fn host_revoke() {
    let root = Root::recovery();
    let asked = root.daemon("receiver", |request| match request["command"].as_str() {
        Some("hosts") => done(json!({"hosts": [host("db1", false, true), host("web", false, true)],
            "invites": [{"name": "db1", "expires": "2026-11-20T15:00:00Z"}]})),
        _ => done(Value::Null),
    });
    let said = root.varve(&["host", "revoke", "db1", "--dry-run"]);
    let facts = "  certificate 0011223344556677, joined 2026-01-02 03:04:05.000Z: connected, the connection is closed
  invitation until 2026-11-20 15:00:00.000Z: withdrawn
  its replicas and their points stay
next: varve host invite db1 lets it come back
";
    assert_eq!(said.out, format!("host 'db1' would be refused from now on; nothing was changed\n{facts}"));
    let said = root.varve(&["host", "revoke", "db1", "--yes"]);
    assert_eq!((said.code, said.out), (0, format!("host 'db1' is refused from now on\n{facts}")));
    let answer = root.varve(&["host", "revoke", "db1", "--yes", "--json"]).json();
    assert_eq!(answer["name"], "db1");
    assert_eq!(answer["dry_run"], false);
    assert_eq!(answer["hosts"], json!([host("db1", false, true)]), "the other host stays");
    let commands: Vec<Value> = asked.lock().expect("fine").iter().map(|asked| asked["command"].clone()).collect();
    assert_eq!(commands, ["hosts", "hosts", "revoke", "hosts", "revoke"]);
}

#[test]
fn protect() {
    let root = Root::production();
    let reply = json!({"group": "db", "notes": ["/dev/vdc has 4096-byte sectors"], "volumes": [
        {"path": "/dev/vdb", "bytes": 21474836480u64, "replica": null},
        {"path": "/dev/vdc", "bytes": 1024, "replica": "/srv/c.img"}]});
    let answer = reply.clone();
    let asked = root.daemon("agent", move |_| done(answer.clone()));
    let said = root.varve(&["protect", "db", "/dev/vdb", "/dev/vdc"]);
    let facts = "  /dev/vdb  20.0 GiB  -> chosen by the recovery host
  /dev/vdc  1.0 KiB   -> /srv/c.img
  note: /dev/vdc has 4096-byte sectors
";
    let expected =
        format!("group 'db' is being captured, the first sync has begun\n{facts}next: varve status db --watch\n");
    assert_eq!((said.code, said.out), (0, expected));
    let said = root.varve(&["protect", "db", "/dev/vdb", "/dev/vdc", "--dry-run"]);
    assert_eq!(said.out, format!("group 'db' could be protected; nothing was changed\n{facts}"));
    let said = root.varve(&["protect", "db", "/dev/vdb", "/dev/vdc", "--replica", "/a", "--replica", "/b", "--json"]);
    assert_eq!(said.json(), reply);
    // A volume that is named relative to where the operator stands.
    root.varve_with(&["protect", "db", "vdb"], |command| {
        command.env("VARVE_ROOT", root.path()).current_dir("/dev");
    });
    let asked = asked.lock().expect("fine");
    let request = |volumes: Value, replicas: Value, dry: bool| json!({"command": "protect", "group": "db", "volumes": volumes, "replicas": replicas, "dry_run": dry});
    assert_eq!(asked[0], request(json!(["/dev/vdb", "/dev/vdc"]), json!([]), false));
    assert_eq!(asked[1], request(json!(["/dev/vdb", "/dev/vdc"]), json!([]), true));
    assert_eq!(asked[2], request(json!(["/dev/vdb", "/dev/vdc"]), json!(["/a", "/b"]), false));
    assert_eq!(asked[3], request(json!(["/dev/vdb"]), json!([]), false));
}

#[test]
fn unprotect() {
    let root = Root::production();
    let asked = root.daemon("agent", knows("agent", vec![group("db", "source")]));
    let facts = "  /dev/vdb (1.0 GiB): capture ends, its replica /srv/db-0.img stays
  newest point that stays: 2026-11-20 14:03:22.512Z
  captured and not yet at the recovery host: 4.0 KiB, not sent any more
  protecting it again compares all of it with the replica
";
    let said = root.varve(&["unprotect", "db", "--dry-run"]);
    let head = "group 'db' would no longer be protected; nothing was changed\n";
    assert_eq!((said.code, said.out), (0, format!("{head}{facts}")));
    assert!(asked.lock().expect("fine").iter().all(|request| request["command"] == "status"));
    let said = root.varve(&["unprotect", "db", "--yes"]);
    let next = "next: 'varve forget db' on the recovery host, if its points are not wanted any more\n";
    assert_eq!((said.code, said.out), (0, format!("group 'db' is no longer protected\n{facts}{next}")));
    assert_eq!(*asked.lock().expect("fine").last().expect("asked"), json!({"command": "unprotect", "group": "db"}));
    let answer = root.varve(&["unprotect", "db", "--yes", "--json"]).json();
    let expected = json!({"group": "db", "dry_run": false, "lag_bytes": 4096, "newest_point": "2026-11-20T14:03:22.512345Z",
        "volumes": [{"path": "/dev/vdb", "bytes": 1073741824, "replica": "/srv/db-0.img"}]});
    assert_eq!(answer, expected);
}

#[test]
fn forget() {
    let root = Root::recovery();
    let asked = root.daemon("receiver", knows("receiver", vec![group("db", "replica")]));
    let said = root.varve(&["forget", "db", "--dry-run"]);
    let facts =
        "  points lost: the newest, 2026-11-20 14:03:22.512Z\n  replica of /dev/vdb (1.0 GiB) stays: /srv/db-0.img\n";
    assert_eq!((said.code, said.out), (0, format!("group 'db' would be forgotten; nothing was changed\n{facts}")));
    let said = root.varve(&["forget", "db", "--yes"]);
    assert_eq!((said.code, said.out), (0, format!("group 'db' is forgotten\n{facts}")));
    assert_eq!(*asked.lock().expect("fine").last().expect("asked"), json!({"command": "forget", "group": "db"}));
    assert_eq!(root.varve(&["forget", "db", "--yes", "--json"]).json()["dry_run"], false);
}

#[test]
fn bookmark() {
    let root = Root::production();
    let reply = json!({"group": "db", "name": "before", "position": "abababab:4096",
        "time": "2026-11-20T14:03:22.512345Z", "consistency": "crash", "durable": true});
    let answer = reply.clone();
    let asked = root.daemon("agent", move |_| done(answer.clone()));
    let said = root.varve(&["bookmark", "db", "before"]);
    let expected = "bookmark 'before' of group 'db' at 2026-11-20 14:03:22.512Z (position abababab:4096, crash-consistent), \
durable at the recovery host\n";
    assert_eq!((said.code, said.out.as_str()), (0, expected));
    assert_eq!(root.varve(&["bookmark", "db", "before", "--consistency", "crash", "--json"]).json(), reply);
    assert_eq!(asked.lock().expect("fine")[0], json!({"command": "bookmark", "group": "db", "name": "before"}));
}

fn verified(differing: u64, repair: bool, finished: bool) -> Value {
    let extents = if differing > 0 { json!([[0, 1048576, differing]]) } else { json!([]) };
    json!({"group": "db", "id": 3, "done_bytes": 1073741824, "total_bytes": 1073741824, "differing_bytes": differing,
        "unverified_bytes": 0, "extents": extents, "from": 1, "to": 2, "repair": repair, "finished": finished, "error": null})
}

fn verifying(answer: Value) -> Root {
    let root = Root::production();
    root.daemon("agent", move |request| match request["command"].as_str() {
        Some("status") => knows("agent", vec![group("db", "source")])(request),
        _ => done(answer.clone()),
    });
    root
}

#[test]
fn verify_equal() {
    let root = verifying(verified(0, false, true));
    let said = root.varve(&["verify", "db"]);
    assert_eq!(said.out, "group 'db': 1.0 GiB compared, volumes and replicas are equal\n");
    assert_eq!((said.code, said.err.as_str()), (0, ""));
    assert_eq!(root.varve(&["verify", "db", "--json"]).json(), verified(0, false, true));
    let said = root.varve(&["verify", "db", "--repair", "--dry-run"]);
    let expected = "group 'db': 1.0 GiB in 1 volume would be read and compared; nothing was done
  /dev/vdb (1.0 GiB) with /srv/db-0.img
  what differs would be sent again; no new point could be recovered until that is done
";
    assert_eq!((said.code, said.out.as_str()), (0, expected));
}

#[test]
fn verify_different() {
    let root = verifying(verified(65536, false, true));
    let said = root.varve(&["verify", "db"]);
    assert_eq!(said.out, "group 'db': 1.0 GiB compared, 64.0 KiB differ\n  volume 0: 64.0 KiB at byte 1048576\n");
    said.problem(1, "differ in 64.0 KiB", "not a write under way", "'varve verify db --repair'");
    let said = root.varve(&["verify", "db", "--json"]);
    assert_eq!((said.code, said.json()), (1, verified(65536, false, true)), "the answer tells all, so it stays last");

    let root = verifying(verified(65536, true, true));
    let said = root.varve(&["verify", "db", "--repair"]);
    assert_eq!(said.code, 0, "what was asked for was done: {said:?}");
    assert!(said.out.ends_with("  what differs is being sent again\n"), "{said:?}");

    let root = verifying(verified(0, false, false));
    root.varve(&["verify", "db"]).problem(1, "came to no result", "ended before", "varve verify db");
}

#[test]
fn verify_on_the_recovery_host() {
    let root = Root::recovery();
    let asked = root.daemon("receiver", |_| done(verified(0, false, true)));
    assert_eq!(root.varve(&["verify", "db", "--repair"]).code, 0);
    assert_eq!(asked.lock().expect("fine")[0], json!({"command": "verify", "group": "db", "repair": true}));
}

/// A host with both roles: the group is the receiver's.
#[test]
fn verify_asks_whoever_knows_the_group() {
    let root = Root::recovery();
    root.write("etc/varve/agent.toml", "");
    root.daemon("agent", |_| problem("not-found", "there is no group 'db'", "not here", "varve status"));
    root.daemon("receiver", |_| done(verified(0, false, true)));
    let said = root.varve(&["verify", "db"]);
    assert_eq!((said.code, said.err.as_str()), (0, ""));
}

/// Long work: a line now and then for a log, JSON lines for a script, nothing in the first two seconds.
#[test]
fn progress_of_long_work() {
    let root = Root::production();
    root.daemon("agent", |_| {
        let mut steps = vec![progress(1 << 20, 1 << 30)];
        for second in 1..5u64 {
            steps.push(Step::Wait(Duration::from_millis(1000)));
            steps.push(progress(second << 28, 1 << 30));
        }
        steps.push(Step::Line(json!({"done": verified(0, false, true)})));
        steps
    });
    let plain = std::thread::scope(|scope| {
        let plain = scope.spawn(|| root.varve(&["verify", "db"]));
        let said = root.varve(&["verify", "db", "--json"]);
        let lines: Vec<Value> = said.out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        let steps: Vec<&Value> = lines[..lines.len() - 1].iter().map(|line| &line["progress"]).collect();
        assert!((2..=3).contains(&steps.len()), "not in the first two seconds, then once a second: {said:?}");
        for step in steps {
            assert_eq!(step["total_bytes"], 1u64 << 30);
            assert!(step["done_bytes"].as_u64().expect("a number") >= 2 << 28, "{step}");
            assert_eq!(step["bytes_per_second"], 104_857_600.0);
            assert!(step["seconds_left"].is_number());
        }
        assert_eq!(lines.last(), Some(&verified(0, false, true)), "the result is last");
        plain.join().expect("ran")
    });
    let lines: Vec<&str> = plain.out.lines().collect();
    assert_eq!(lines.len(), 2, "one line of progress and the result: {plain:?}");
    assert_eq!(lines[0], "verifying db  512.0 MiB of 1.0 GiB (50 %)  100.0 MiB/s  5.1 s left");
}

#[test]
fn version() {
    let root = Root::production();
    root.write("etc/varve/receiver.toml", "");
    root.daemon("agent", |_| {
        let mut status = fake::status("agent", vec![]);
        status["daemons"][0]["version"] = json!("0.0.9");
        done(status)
    });
    let own = env!("CARGO_PKG_VERSION");
    let said = root.varve(&["version"]);
    let lines: Vec<&str> = said.out.lines().collect();
    assert_eq!(said.code, 0);
    assert_eq!(lines[0], format!("varve           {own}"));
    assert_eq!(lines[1], "varve-agent     0.0.9  (another version than varve: restart it after the upgrade)");
    assert!(lines[2].starts_with("varve-receiver  does not answer: varve-receiver does not run"), "{said:?}");
    let answer = root.varve(&["version", "--json"]).json();
    assert_eq!(answer["varve"], own);
    assert_eq!(answer["daemons"][0], json!({"daemon": "agent", "version": "0.0.9"}));
    assert_eq!(answer["daemons"][1]["version"], Value::Null);
    assert_eq!(answer["daemons"][1]["problem"]["kind"], "unreachable");
    assert_eq!(Root::new().varve(&["version"]).out, format!("varve  {own}\n"));
}
