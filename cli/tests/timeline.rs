//! The commands of the timeline: what they ask, what they print, when they refuse.

mod fake;

use fake::{Root, Step, done, problem, progress};
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt;

fn point(asked: &str, distance: f64) -> Value {
    json!({"time": "2026-11-20T14:03:22.512345678Z", "position": "abababab:4096", "height": 4104,
        "consistency": "crash", "asked": asked, "distance_seconds": distance})
}

fn view(id: u64, writable: bool) -> Value {
    json!({"id": id, "group": "db", "point": point("-5m", -0.25), "writable": writable, "export": "device",
        "volumes": [{"path": "/dev/vdb", "bytes": 21474836480u64, "device": "/dev/loop7", "uri": null},
            {"path": "/dev/vdc", "bytes": 1024, "device": "/dev/loop8", "uri": null}],
        "hints": ["XFS: mount -o ro,norecovery,nouuid"], "opened": "2026-11-20T14:08:22Z",
        "held_bytes": 1073741824, "written_bytes": if writable { json!(8192) } else { Value::Null }})
}

#[test]
fn points() {
    let root = Root::recovery();
    let reply = json!({"group": "db", "window": {"from": "2026-11-18T10:03:22.5Z", "to": "2026-11-20T14:03:22.512345Z"},
        "points": 41233, "records": 77, "bytes": 1073741824,
        "bookmarks": [{"name": "nightly", "time": "2026-11-19T03:00:00.1Z", "position": "abababab:64",
                "consistency": "crash", "recoverable": true, "kept": true, "kept_bytes": 1048576},
            {"name": "b", "time": "2026-11-19T05:00:00Z", "position": "abababab:96",
                "consistency": "app", "recoverable": false, "kept": false, "kept_bytes": null}],
        "gaps": [{"from": "2026-11-19T04:59:00Z", "to": "2026-11-19T05:01:05Z", "reason": "ring-full"},
            {"from": "2026-11-20T01:00:00Z", "to": "2026-11-20T01:00:01Z", "reason": "rollback"}],
        "damaged": [{"from": "2026-11-18T11:00:00Z", "to": null, "what": "layer 3"}],
        "stretches": [{"incarnation": "abababababababababababababababab", "from": "2026-11-18T10:03:22.5Z",
            "to": null, "epoch": 1}],
        "rollbacks": [{"time": "2026-11-20T01:00:00Z", "to": "2026-11-19T03:00:00.1Z"}],
        "density": [{"from": "2026-11-18T10:00:00Z", "to": "2026-11-19T00:00:00Z", "points": 20000, "bytes": 536870912}]});
    let answer = reply.clone();
    let asked = root.daemon("receiver", move |_| done(answer.clone()));
    let said = root.varve(&["points", "db"]);
    let expected = "\
group 'db': 41233 points from 2026-11-18 10:03:22.5Z to 2026-11-20 14:03:22.512345Z (2 d 4 h)
  history: 1.0 GiB in 77 before-images
  gaps: 2, points inside cannot be recovered
    2026-11-19 04:59:00Z to 2026-11-19 05:01:05Z (2 min 5 s): the ring was full, the regions written meanwhile were sent again
    2026-11-20 01:00:00Z to 2026-11-20 01:00:01Z (1.0 s): the replicas were rolled back or taken over
  damaged: no points between 2026-11-18 11:00:00Z and the newest point: layer 3
  bookmarks:
    NAME     TIME                    POSITION     CONSISTENCY  KEPT
    nightly  2026-11-19 03:00:00.1Z  abababab:64  crash        kept (1.0 MiB)
    b        2026-11-19 05:00:00Z    abababab:96  app          -               cannot be recovered (gap or damage)
  rolled back at 2026-11-20 01:00:00Z to 2026-11-19 03:00:00.1Z
  density:
    FROM                      TO                        POINTS  HISTORY
    2026-11-18 10:00:00.000Z  2026-11-19 00:00:00.000Z  20000   512.0 MiB
";
    assert_eq!((said.code, said.out.as_str()), (0, expected));
    let said = root.varve(&["points", "db", "--json", "--from", "2026-11-20T14:03:22.5Z", "--to", "-0s"]);
    assert_eq!(said.json(), reply);
    let asked = asked.lock().expect("fine");
    assert_eq!(asked[0], json!({"command": "points", "group": "db", "from_ns": null, "to_ns": null}));
    assert_eq!(asked[1]["from_ns"], 1_795_183_402_500_000_000u64);
    assert!(asked[1]["to_ns"].as_u64().is_some_and(|to| to > 1_700_000_000_000_000_000));
}

#[test]
fn points_of_nothing_yet() {
    let root = Root::recovery();
    root.daemon("receiver", |_| {
        done(json!({"group": "db", "window": {"from": null, "to": null}, "points": 0, "records": 0, "bytes": 0,
            "bookmarks": [], "gaps": [{"from": "2026-11-19T04:59:00Z", "to": null, "reason": "initial-sync"}],
            "damaged": [], "stretches": [], "rollbacks": [], "density": []}))
    });
    let expected = "\
group 'db': nothing can be recovered yet ('varve status db')
  history: 0 B in 0 before-images
  gaps: 1, points inside cannot be recovered
    2026-11-19 04:59:00Z to now (open): the first sync has not finished yet
  bookmarks: none
";
    assert_eq!(root.varve(&["points", "db"]).out, expected);
}

#[test]
fn view_open() {
    let root = Root::recovery();
    let asked = root.daemon("receiver", |request| done(view(3, request["writable"] == true)));
    let facts =
        "  point: 2026-11-20 14:03:22.512345678Z (position abababab:4096, crash-consistent), 0.25 s before '-5m'
  /dev/loop7 is /dev/vdb (20.0 GiB)
  /dev/loop8 is /dev/vdc (1.0 KiB)
  note: XFS: mount -o ro,norecovery,nouuid
next: 'varve view close 3' when you are done
";
    let said = root.varve(&["view", "open", "db", "--at", "-5m"]);
    assert_eq!((said.code, said.out), (0, format!("view 3 of group 'db', read-only\n{facts}")));
    let said =
        root.varve(&["view", "open", "db", "--at=bookmark:b", "--writable", "--export", "nbd", "--listen", "::1"]);
    let head = "view 3 of group 'db', writable, writes are gone when it is closed\n";
    assert_eq!((said.code, said.out), (0, format!("{head}{facts}")));
    assert_eq!(root.varve(&["view", "open", "db", "--at", "latest", "--json"]).json(), view(3, false));
    let asked = asked.lock().expect("fine");
    let request = |at: Value, writable: bool, export: &str, listen: Value| {
        json!({"command": "view-open", "group": "db",
        "at": at, "writable": writable, "export": export, "listen": listen})
    };
    assert_eq!(asked[0], request(json!({"age": {"secs": 300, "nanos": 0}}), false, "device", Value::Null));
    assert_eq!(asked[1], request(json!({"bookmark": "b"}), true, "nbd", json!("[::1]:10809")));
    assert_eq!(asked[2], request(json!("latest"), false, "device", Value::Null));
}

#[test]
fn a_point_that_is_refused() {
    let root = Root::recovery();
    root.daemon("receiver", |_| {
        problem(
            "refused",
            "'-5m' is no point of group 'db'",
            "it lies in a gap: the ring was full",
            "the nearest before: --at 2026-11-19T04:59:00Z; the nearest after: --at 2026-11-19T05:01:05Z",
        )
    });
    for args in [
        &["view", "open", "db", "--at", "-5m"] as &[&str],
        &["rollback", "db", "--at", "-5m", "--yes"],
        &["restore", "db", "--at", "-5m", "--volume", "0", "--to", "/no/such"],
    ] {
        root.varve(args).problem(3, "is no point", "in a gap", "--at 2026-11-19T05:01:05Z");
    }
}

#[test]
fn view_list_and_close() {
    let root = Root::recovery();
    let asked = root.daemon("receiver", |request| match request["command"].as_str() {
        Some("view-list") => done(json!({"views": [view(3, false), view(12, true)]})),
        _ => done(Value::Null),
    });
    let expected = "\
VIEW  GROUP  POINT                     MODE                HOLDS    VOLUME    WHERE
3     db     2026-11-20 14:03:22.512Z  read-only           1.0 GiB  /dev/vdb  /dev/loop7
                                                                    /dev/vdc  /dev/loop8
12    db     2026-11-20 14:03:22.512Z  writable (8.0 KiB)  1.0 GiB  /dev/vdb  /dev/loop7
                                                                    /dev/vdc  /dev/loop8
";
    assert_eq!(root.varve(&["view", "list"]).out, expected);
    let said = root.varve(&["view", "close", "12"]);
    let gone = "view 12 of group 'db' is closed\n  8.0 KiB that were written to it are gone\n";
    assert_eq!((said.code, said.out.as_str()), (0, gone));
    assert_eq!(root.varve(&["view", "close", "3", "--force"]).out, "view 3 of group 'db' is closed\n");
    root.varve(&["view", "close", "4"]).problem(5, "there is no view 4", "it was closed", "varve view list");
    let answer = root.varve(&["view", "close", "3", "--json"]).json();
    assert_eq!(answer, json!({"id": 3, "view": view(3, false)}));
    let asked = asked.lock().expect("fine");
    let closes: Vec<&Value> = asked.iter().filter(|asked| asked["command"] == "view-close").collect();
    assert_eq!(*closes[0], json!({"command": "view-close", "id": 12, "force": false}));
    assert_eq!(closes[1]["force"], true);
    assert_eq!(closes.len(), 3, "nothing was asked for view 4");
}

#[test]
fn no_view_is_open() {
    let root = Root::recovery();
    root.daemon("receiver", |_| done(json!({"views": []})));
    assert_eq!(root.varve(&["view", "list"]).out, "no view is open\nnext: varve view open GROUP --at POINT\n");
}

#[test]
fn rollback() {
    let root = Root::recovery();
    let asked = root.daemon("receiver", |request| match request["command"].as_str() {
        Some("rollback") => done(json!({"group": "db", "from_point": point("latest", 0.0),
            "to_point": point("bookmark:b", 0.0), "bytes": 12582912, "blocks": 3072, "seconds": 2.1,
            "dry_run": request["dry_run"], "held": true})),
        _ => done(Value::Null),
    });
    let facts =
        "  to:   2026-11-20 14:03:22.512345678Z (position abababab:4096, crash-consistent), exactly 'bookmark:b'
  from: 2026-11-20 14:03:22.512345678Z (position abababab:4096)
";
    let said = root.varve(&["rollback", "db", "--at", "bookmark:b", "--dry-run"]);
    let expected = format!(
        "group 'db' would be rolled back; nothing was changed\n{facts}  would be written: 12.0 MiB that differ, in 3072 blocks, about 2.1 s
  replication would wait, so that the replica stays what it is
then 'varve rollback db --release' lets it go on: the replica becomes equal to the volumes again
"
    );
    assert_eq!((said.code, said.out), (0, expected));
    let said = root.varve(&["rollback", "db", "--at", "bookmark:b", "--yes"]);
    let expected = format!(
        "group 'db' is rolled back\n{facts}  written: 12.0 MiB that differ, in 3072 blocks, 2.1 s
  to undo it: varve rollback db --at 2026-11-20T14:03:22.512345678Z
  replication waits, so that the replica stays what it is
next: 'varve rollback db --release' lets it go on: the replica becomes equal to the volumes again
"
    );
    assert_eq!((said.code, said.out), (0, expected));
    let said = root.varve(&["rollback", "db", "--release", "--yes"]);
    let expected = "group 'db': replication goes on, the replica is being made equal to its volumes
next: varve status db --watch
";
    assert_eq!((said.code, said.out.as_str()), (0, expected));
    // Nobody can be asked here.
    root.varve(&["rollback", "db", "--at", "-5m"]).problem(
        3,
        "not done",
        "not a terminal",
        "rollback db --at '-5m' --yes",
    );
    root.varve(&["rollback", "db", "--release"]).problem(3, "not done", "not a terminal", "--release --yes");
    let asked = asked.lock().expect("fine");
    let request =
        |dry_run: bool| json!({"command": "rollback", "group": "db", "at": {"bookmark": "b"}, "dry_run": dry_run});
    assert_eq!(*asked, [request(true), request(false), json!({"command": "rollback-release", "group": "db"})]);
}

fn restored(request: &Value, verified: bool) -> Value {
    let dry_run = request["dry_run"] == true;
    json!({"group": "db", "volume": "/dev/vdb", "to": request["to"], "point": point("latest", 0.0),
        "bytes": 1073741824, "written_bytes": 1048576, "seconds": 1.5, "dry_run": dry_run,
        "digest": if dry_run { Value::Null } else { json!("00ff") }, "verified": verified})
}

#[test]
fn restore() {
    let root = Root::recovery();
    let asked = root.daemon("receiver", |request| done(restored(request, request["group"] == "db")));
    let to = root.at("out.img");
    let to = to.to_str().expect("text");
    let args = ["restore", "db", "--at", "latest", "--volume", "/dev/vdb", "--to", to];
    let said = root.varve(&args);
    let point = "  point: 2026-11-20 14:03:22.512345678Z (position abababab:4096, crash-consistent), the newest\n";
    let size = "  size: 1.0 GiB, of which 1.0 MiB were written and the rest is zeroes, 1.5 s\n";
    let blake3 = "  blake3: 00ff (read again, the same)\n";
    let expected = format!("/dev/vdb of group 'db' is restored to {to}\n{point}{size}{blake3}");
    assert_eq!((said.code, said.out), (0, expected));
    let said = root.varve(&[&args[..], &["--dry-run"]].concat());
    let head = format!("/dev/vdb of group 'db' could be restored to {to}; nothing was written\n");
    assert_eq!((said.code, said.out), (0, format!("{head}{point}  size: 1.0 GiB\n")));
    // What is there is not lost by a slip.
    root.write("out.img", "precious");
    root.varve(&args).problem(3, "was not written to", "it exists", "--force");
    root.varve(&[&args[..], &["--force"]].concat()).problem(3, "not done", "not a terminal", "--force --yes");
    assert_eq!(asked.lock().expect("fine").len(), 2, "nobody was asked");
    assert_eq!(root.varve(&[&args[..], &["--force", "--yes"]].concat()).code, 0);
    let asked = asked.lock().expect("fine");
    let dir = root.at("").metadata().expect("there");
    let request = json!({"command": "restore", "group": "db", "at": "latest", "volume": "/dev/vdb", "to": to,
        "dry_run": false, "force": true, "dir": [dir.dev(), dir.ino()]});
    assert_eq!(asked[2], request);
}

#[test]
fn a_restore_that_is_not_what_it_should_be() {
    let root = Root::recovery();
    root.daemon("receiver", |request| done(restored(request, false)));
    let said = root.varve(&["restore", "db", "--at", "latest", "--volume", "0", "--to", "/no/such"]);
    said.problem(1, "is not known to be what was restored", "something else", "another disk");
    assert!(said.out.contains("NOT verified"), "{said:?}");
}

#[test]
fn retention() {
    let root = Root::recovery();
    let asked = root.daemon("receiver", |request| {
        let expiring = if request["age_seconds"] == 3600 { 1 << 30 } else { 0 };
        done(json!({"group": "db", "retention": {"age_seconds": 604800, "bytes": null},
            "window": {"from": "2026-11-18T10:03:22.5Z", "to": "2026-11-20T14:03:22.5Z"}, "bytes": 4294967296u64,
            "expiring_bytes": expiring, "expiring_to": if expiring > 0 { json!("2026-11-20T13:03:22Z") } else { Value::Null },
            "held_bytes": 1048576, "dry_run": request["dry_run"]}))
    });
    let facts = "  window: 2026-11-18 10:03:22.500Z to 2026-11-20 14:03:22.500Z
  history: 4.0 GiB
  1.0 MiB of it stay for kept bookmarks and open views
";
    let keeps = "points of the last 7 d 0 h, as many bytes as there is room for";
    let said = root.varve(&["retention", "db"]);
    assert_eq!((said.code, said.out), (0, format!("group 'db' keeps {keeps}\n{facts}")));
    let said = root.varve(&["retention", "db", "--age", "1h", "--dry-run"]);
    let expire = "  1.0 GiB would expire: points before 2026-11-20 13:03:22.000Z\n";
    assert_eq!(said.out, format!("group 'db' would keep {keeps}; nothing was changed\n{facts}{expire}"));
    let refused = root.varve(&["retention", "db", "--age", "1h"]);
    refused.problem(3, "1.0 GiB of the history of group 'db' expire, all points before", "terminal", "--age 1h --yes");
    assert_eq!(asked.lock().expect("fine").last().expect("asked")["dry_run"], true, "nothing was set");
    assert_eq!(root.varve(&["retention", "db", "--age", "1h", "--yes"]).code, 0);
    assert_eq!(root.varve(&["retention", "db", "--age", "none", "--bytes", "100GiB"]).code, 0, "nothing expires");
    let last =
        json!({"command": "retention", "group": "db", "age_seconds": 0, "bytes": 107374182400u64, "dry_run": false});
    assert_eq!(*asked.lock().expect("fine").last().expect("asked"), last);
}

#[test]
fn scrub() {
    let root = Root::recovery();
    let asked = root.daemon("receiver", |request| {
        let damaged = json!([
            {"layer": 7, "what": "chunk at byte 4096", "from": "2026-11-18T10:00:00Z", "to": "2026-11-18T10:00:01Z"},
            {"layer": 9, "what": "its index, which was made anew", "from": null, "to": null}]);
        let damaged = if request["group"] == "db" { json!([]) } else { damaged };
        let answer = json!({"group": request["group"], "layers": 12, "bytes": 1073741824, "damaged": damaged});
        vec![progress(1, 2), Step::Line(json!({ "done": answer }))]
    });
    let said = root.varve(&["scrub", "db", "--rate", "50MiB"]);
    assert_eq!((said.code, said.out.as_str()), (0, "group 'db': 1.0 GiB in 12 layers read, all whole\n"));
    assert_eq!(asked.lock().expect("fine")[0]["bytes_per_second"], 50 << 20);
    let said = root.varve(&["scrub", "web"]);
    said.problem(1, "the history of group 'web' is damaged", "not what was written", "varve points web");
    let expected = "group 'web': 1.0 GiB in 12 layers read, 2 places are damaged
  layer 7: chunk at byte 4096; points from 2026-11-18 10:00:00Z to 2026-11-18 10:00:01Z are lost
  layer 9: its index, which was made anew; no point is lost
";
    assert_eq!(said.out, expected);
}

#[test]
fn bookmarks_are_kept_and_let_go() {
    let root = Root::recovery();
    const TIME: &str = "2026-11-18T10:00:00.123456789Z";
    let asked = root.daemon("receiver", |request| {
        let (name, dry_run) = (&request["bookmark"], request["dry_run"] == true);
        if name == "none" {
            let problem = json!({"kind": "not-found", "what": "no bookmark 'none' in 'db'", "why": "it was not set",
                "next": "'varve points db' lists them"});
            return vec![Step::Line(json!({ "problem": problem }))];
        }
        let bytes = if name == "idle" { 0 } else { 1048576 };
        done(json!({"group": "db", "name": name, "time": TIME, "kept": dry_run || request["keep"] == true, "bytes": bytes}))
    });
    let said = root.varve(&["bookmark", "db", "b", "--keep"]);
    let expected = "bookmark 'b' of group 'db' at 2026-11-18 10:00:00.123456789Z is kept
  1.0 MiB of history stay because of it, and more as it gets older
";
    assert_eq!((said.code, said.out.as_str()), (0, expected));
    let release = ["bookmark", "db", "b", "--release"];
    let refused = root.varve(&release);
    refused.problem(3, "let 1.0 MiB of the history of group 'db' expire", "terminal", "'varve bookmark db b --release");
    let said = root.varve(&[&release[..], &["--dry-run"]].concat());
    assert!(said.out.contains("nothing was changed\n  1.0 MiB of history could expire at once\n"), "{said:?}");
    let json = root.varve(&[&release[..], &["--dry-run", "--json"]].concat()).json();
    let expected = json!({"group": "db", "name": "b", "time": TIME, "kept": true, "bytes": 1048576, "dry_run": true});
    assert_eq!(json, expected);
    root.varve(&["bookmark", "db", "none", "--release", "--yes"]).problem(5, "no bookmark 'none'", "", "points db");
    let released = || {
        asked
            .lock()
            .expect("fine")
            .iter()
            .filter(|request| request["keep"] == false && request["dry_run"] == false)
            .count()
    };
    assert_eq!(released(), 0);
    // Where nothing is lost nobody is asked.
    assert_eq!(root.varve(&["bookmark", "db", "idle", "--release"]).code, 0);
    assert_eq!(released(), 1);
    let said = root.varve(&[&release[..], &["--yes"]].concat());
    let expected = "bookmark 'b' of group 'db' at 2026-11-18 10:00:00.123456789Z is no longer kept
  1.0 MiB of history may expire now
";
    assert_eq!((said.code, said.out.as_str()), (0, expected));
    let expected = json!({"command": "keep", "group": "db", "bookmark": "b", "keep": true, "dry_run": false});
    assert_eq!(asked.lock().expect("fine")[0], expected);
}
