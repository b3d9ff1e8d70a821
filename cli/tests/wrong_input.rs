//! Wrong input of every subcommand: the exact exit code, and words that help.

mod fake;

use fake::{Root, Step, done, group, knows, problem};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Every subcommand with arguments that are well formed.
const EVERY: &[(&[&str], &str)] = &[
    (&["host", "invite", "db1"], "receiver"),
    (&["host", "list"], "receiver"),
    (&["host", "revoke", "db1", "--yes"], "receiver"),
    (&["forget", "db", "--yes"], "receiver"),
    (&["protect", "db", "/dev/vdb"], "agent"),
    (&["unprotect", "db", "--yes"], "agent"),
    (&["bookmark", "db", "b1"], "agent"),
    (&["bookmark", "db", "b1", "--keep"], "receiver"),
    (&["points", "db"], "receiver"),
    (&["view", "open", "db", "--at", "latest"], "receiver"),
    (&["view", "list"], "receiver"),
    (&["view", "close", "1"], "receiver"),
    (&["rollback", "db", "--at", "-5m", "--yes"], "receiver"),
    (&["rollback", "db", "--release", "--yes"], "receiver"),
    (&["restore", "db", "--at", "-5m", "--volume", "/dev/vdb", "--to", "/no/such/path"], "receiver"),
    (&["retention", "db"], "receiver"),
    (&["scrub", "db"], "receiver"),
];

#[test]
fn a_root_that_is_wrong() {
    let root = Root::new();
    root.write("file", "");
    let no = root.at("no");
    let no = no.to_str().expect("text");
    for (args, _) in EVERY.iter().chain(&[(&["status"] as &[&str], ""), (&["verify", "db"], ""), (&["doctor"], "")]) {
        let args: Vec<&str> = args.iter().copied().chain(["--root", no]).collect();
        root.varve(&args).problem(5, "there is no directory", "--root or VARVE_ROOT", "correct the path");
        assert!(!root.at("no").exists(), "{args:?} made it");
    }
    let file = root.at("file");
    let file = file.to_str().expect("text");
    root.varve(&["status", "--root", file]).problem(2, "is not a directory", "names something else", "directory");
    let long = format!("/tmp/{}", "long".repeat(30));
    root.varve(&["status", "--root", &long]).problem(2, "is too long", "more than 107 bytes", "shorter");
    root.varve(&["status", "--root", ""]).problem(2, "--root", "the usage is", "--help");
}

#[test]
fn words_of_commands_name_no_group() {
    let root = Root::production();
    for word in ["commit", "abort", "run", "show"] {
        root.varve(&["protect", word, "/dev/vdb"]).problem(
            2,
            "cannot name a group",
            "word of commands",
            "another name",
        );
    }
}

#[test]
fn a_root_without_configuration() {
    let root = Root::new();
    for (args, daemon) in EVERY {
        let next = if *daemon == "agent" { "varve join ADDR:7443 TOKEN" } else { "varve receiver init" };
        root.varve(args).problem(4, &format!("the {daemon} of this host is not reachable"), "does not exist", next);
    }
    root.varve(&["verify", "db"]).problem(4, "the agent of this host", "has not joined", "varve join");
    root.varve(&["status"]).problem(4, "no daemon of Varve is set up", "neither", "varve receiver init");
    root.varve(&["status", "db"]).problem(4, "no daemon of Varve is set up", "neither", "varve join");
    root.varve(&["status", "--watch"]).problem(4, "no daemon of Varve is set up", "neither", "varve join");
}

#[test]
fn a_daemon_that_does_not_run() {
    let root = Root::production();
    root.write("etc/varve/receiver.toml", "");
    root.dead_socket("receiver");
    for (args, daemon) in EVERY.iter().chain(&[(&["verify", "db"] as &[&str], "agent")]) {
        let said = root.varve(args);
        said.problem(4, &format!("the {daemon} of this host"), &format!("varve-{daemon} does not run"), "start it: ");
        assert!(said.out.is_empty(), "{said:?}");
    }
    root.varve(&["status"]).problem(4, "not reachable", "varve-agent does not run", "start it: VARVE_ROOT=");
}

/// SIGSTOP, a hang, an overloaded machine: the operator is told after a while, whatever was asked.
#[test]
fn a_daemon_that_hangs() {
    let root = Root::production();
    let _agent = root.hanging("agent");
    let start = Instant::now();
    root.varve(&["status"]).problem(4, "the agent of this host does not answer", "said nothing for 5 s", "log");
    assert!(start.elapsed() < Duration::from_secs(8));
    let version = root.varve(&["version"]);
    assert_eq!(version.code, 0);
    assert!(version.out.contains("varve-agent  does not answer: "), "{version:?}");
}

#[test]
fn answers_that_are_none() {
    let cases: [(Vec<Step>, i32, &str); 4] = [
        (Vec::new(), 4, "did not finish its answer"),
        (vec![Step::Raw(b"{\"done\":")], 4, "did not finish its answer"),
        (vec![Step::Raw(b"hello\n")], 1, "is not understood"),
        (vec![Step::Line(json!({"done": {"groups": [{"name": "x", "role": "emperor"}]}}))], 1, "is not understood"),
    ];
    for (steps, code, words) in cases {
        let root = Root::production();
        let steps = std::sync::Mutex::new(Some(steps));
        root.daemon("agent", move |_| steps.lock().expect("fine").take().unwrap_or_default());
        let said = root.varve(&["bookmark", "db", "b"]);
        assert_eq!(said.code, code, "{said:?}");
        said.problem(code, words, "", "");
    }
}

/// It may be done, or go on: the status tells, and a restart would come in the middle.
#[test]
fn an_answer_that_is_lost_while_authority_moves() {
    let root = Root::recovery();
    root.daemon("receiver", |request| match request["command"].as_str() {
        Some("status") => knows("receiver", vec![group("db", "replica")])(request),
        _ => Vec::new(),
    });
    for (args, then) in [
        (&["failover", "db", "--yes"] as &[&str], "its devices are shown there"),
        (&["failover", "db", "--test"], "'varve failover abort db' ends a test"),
        (&["failover", "commit", "db", "--yes"], "the same command"),
        (&["failover", "abort", "db", "--yes"], "the same command"),
        (&["failback", "db", "--yes"], "goes on by itself"),
        (&["failback", "db", "--cut-over", "--yes"], "the same command"),
        (&["failback", "db", "--stop", "--yes"], "the same command"),
        (&["rollback", "db", "--at", "-5m", "--yes"], "the same command"),
    ] {
        let said = root.varve(args);
        said.problem(
            4,
            "did not finish its answer",
            "closed the connection",
            "restart nothing: 'varve status db' tells",
        );
        said.problem(4, "did not finish its answer", "closed the connection", then);
    }
    root.write(
        "etc/varve/takeover/db.toml",
        "version = 1\n[[step]]\nname = \"it\"\nkind = \"command\"\nrun = \"true\"\nundo = []\n",
    );
    let said = root.varve(&["failover", "db", "--yes"]);
    said.problem(4, "did not finish its answer", "", "'varve failover db --resume' runs its takeover plan");
    // Where nothing is changed there is nothing to find out.
    root.varve(&["failover", "db", "--dry-run"]).problem(4, "did not finish its answer", "", "start it again");
}

#[test]
fn an_unknown_group() {
    let root = Root::production();
    root.daemon("agent", knows("agent", vec![group("db", "source")]));
    for args in [
        &["unprotect", "nix", "--yes"] as &[&str],
        &["unprotect", "nix", "--dry-run"],
        &["bookmark", "nix", "b"],
        &["status", "nix"],
        &["verify", "nix"],
        &["verify", "nix", "--dry-run"],
        &["status", "nix", "--watch"],
    ] {
        root.varve(args).problem(5, "there is no group", "", "varve status");
    }
    let recovery = Root::recovery();
    recovery.daemon("receiver", knows("receiver", vec![]));
    recovery.varve(&["forget", "nix", "--yes"]).problem(5, "there is no group", "", "varve status");
    recovery.varve(&["verify", "nix"]).problem(5, "there is no group", "", "varve status");
    // The silent agent might know it.
    recovery.write("etc/varve/agent.toml", "");
    recovery.varve(&["status", "nix"]).problem(4, "the agent of this host", "does not run", "start it");
    recovery.varve(&["verify", "nix"]).problem(4, "the agent of this host", "does not run", "start it");
}

#[test]
fn an_unknown_host() {
    let root = Root::recovery();
    root.daemon("receiver", |_| done(json!({"hosts": [], "invites": []})));
    for args in [&["host", "revoke", "nix", "--yes"] as &[&str], &["host", "revoke", "nix", "--dry-run"]] {
        root.varve(args).problem(5, "there is no host 'nix'", "neither joined", "varve host list");
    }
}

#[test]
fn names_are_checked_before_anybody_is_asked() {
    let root = Root::new();
    for bad in ["../x", "a b", "ä", ".x", "", "a/b", &"x".repeat(65)] {
        for args in [
            &["protect", bad, "/dev/vdb"] as &[&str],
            &["unprotect", bad, "--yes"],
            &["bookmark", bad, "b"],
            &["bookmark", "db", bad],
            &["status", bad],
            &["verify", bad],
            &["forget", bad, "--yes"],
        ] {
            root.varve(args).problem(2, "cannot name a", "a name has 1 to 64", "choose another name");
        }
        for args in [
            &["host", "invite", bad] as &[&str],
            &["host", "revoke", bad, "--yes"],
            &["receiver", "init", "--name", bad],
        ] {
            root.varve(args).problem(2, "cannot be a host's name", "1 to 64", "choose another name");
        }
    }
    root.varve(&["bookmark", "db", "a\u{1b}[31mb"]).problem(2, "'a\\u{1b}[31mb'", "1 to 64", "choose");
    root.varve(&["host", "invite", "Db1"]).problem(2, "'Db1'", "a-z", "choose another name");
    assert!(!root.at("etc").exists(), "nothing was made");
}

#[test]
fn a_bad_ttl() {
    let root = Root::new();
    for (bad, why) in [
        ("1", "does not end in s, m, h or d"),
        ("soon", "does not end in s, m, h or d"),
        ("-1h", "no whole number"),
        ("1.5h", "no whole number"),
        ("0s", "not between 1 second and 30 days"),
        ("31d", "not between 1 second and 30 days"),
        ("99999999999999999999d", "not between 1 second and 30 days"),
    ] {
        root.varve(&["host", "invite", "db1", "--ttl", bad]).problem(2, bad, why, "90s, 15m, 1h or 2d");
    }
}

#[test]
fn a_bad_address_or_token() {
    let root = Root::new();
    let token = "varve1.uws2ljnfuws2ljnfuws2ljnfuws2ljnfuws2ljnfuws2ljnfuws2ljnfuwsqobyha4dqobyha4dqobyha4dqobyha4dqobyha4dqobyhmrrc2mjomv4gc3lqnrs3ir2mde";
    for bad in ["", "host:0", "host:x", "https://host:7443", "10.0.0.300", "0.0.0.0:7443", "a b"] {
        root.varve(&["join", bad, token]).problem(2, "is not the address of a receiver", "", "recovery.example:7443");
    }
    let flipped = token.replace("mde", "mdf");
    let cut = &token[..60];
    for (bad, why) in [
        ("TOKEN", "does not start with 'varve1.'"),
        ("varve1.", "cut off"),
        ("varve1.!!!!", "a character that no token has"),
        (cut, ""),
        (flipped.as_str(), ""),
    ] {
        root.varve(&["join", "127.0.0.1", bad]).problem(2, "this is not a join token", why, "copy the whole token");
    }
    for bad in ["7443", "localhost:7443", "0.0.0.0:0", ""] {
        let said = root.varve(&["receiver", "init", "--listen", bad]);
        said.problem(2, "is not an address to listen on", "", "0.0.0.0:7443");
    }
    assert!(!root.at("etc").exists(), "nothing was made");
}

#[test]
fn volumes_and_replicas_that_do_not_fit() {
    let root = Root::new();
    let many: Vec<String> = (0..65).map(|number| format!("/dev/v{number}")).collect();
    let many: Vec<&str> = ["protect", "db"].into_iter().chain(many.iter().map(String::as_str)).collect();
    root.varve(&many).problem(2, "65 volumes are too many", "at most 64", "several groups");
    root.varve(&["protect", "db", "/dev/a", "/dev/a"]).problem(2, "'/dev/a' is given twice", "once", "leave one");
    root.varve(&["protect", "db", "/dev/a", "/dev/b", "--replica", "/r"]).problem(
        2,
        "1 --replica for 2 volumes",
        "one per volume",
        "repeat --replica",
    );
    root.varve(&["protect", "db", "/dev/a", "--replica", "r.img"]).problem(2, "'r.img'", "recovery host", "'/'");
    root.varve(&["protect", "db", "/dev/a", "/dev/b", "--replica", "/r", "--replica", "/r"]).problem(
        2,
        "replica '/r' is given twice",
        "cannot share",
        "its own",
    );
    root.varve(&["protect", "db", ""]).problem(2, "cannot be a volume", "1 to 4096 bytes", "correct the path");
    let long = format!("/{}", "x".repeat(5000));
    root.varve(&["protect", "db", &long]).problem(2, "cannot be a volume", "1 to 4096 bytes", "correct the path");
    root.varve(&["protect", "db"]).problem(2, "<VOLUME>", "varve protect", "varve protect --help");
}

#[test]
fn consistencies_that_are_not_there() {
    let root = Root::production();
    let asked = root.daemon("agent", knows("agent", vec![group("db", "source")]));
    for word in ["fs", "app"] {
        let said = root.varve(&["bookmark", "db", "b", "--consistency", word]);
        said.problem(3, &format!("'{word}' was not set"), "cannot set it yet", "--consistency crash");
    }
    let said = root.varve(&["bookmark", "db", "b", "--consistency", "perfect"]);
    said.problem(2, "'perfect' is not a consistency", "crash, fs and app", "crash");
    assert!(asked.lock().expect("fine").is_empty());
}

/// What destroys or moves authority is not done by a script that did not say yes.
#[test]
fn nobody_said_yes() {
    let host = json!({"name": "db1", "revoked": false, "connected": true, "joined": "2026-01-01T00:00:00Z",
        "fingerprint": "00ff", "address": "10.0.0.1:5"});
    let root = Root::production();
    let agent = root.daemon("agent", knows("agent", vec![group("db", "source")]));
    root.write("etc/varve/receiver.toml", "");
    let receiver = root.daemon("receiver", move |request| match request["command"].as_str() {
        Some("hosts") => done(json!({"hosts": [host], "invites": []})),
        _ => knows("receiver", vec![group("db", "replica")])(request),
    });
    for args in [&["unprotect", "db"] as &[&str], &["host", "revoke", "db1"], &["forget", "db"]] {
        let command = format!("varve {}", args.join(" "));
        root.varve(args).problem(3, "nothing was changed", "not a terminal", &format!("'{command} --yes'"));
        let said = root.varve(&[args, &["--dry-run"]].concat());
        assert_eq!(said.code, 0, "{said:?}");
        assert!(said.out.contains("nothing was changed"), "{said:?}");
    }
    for asked in [agent, receiver] {
        for request in asked.lock().expect("fine").iter() {
            assert!(["status", "hosts"].iter().any(|harmless| request["command"] == *harmless), "{request}");
        }
    }
}

/// What a daemon says reaches the operator as it is, with its exit code.
#[test]
fn a_problem_of_the_daemon_is_passed_on() {
    for (kind, code) in [("failed", 1), ("usage", 2), ("refused", 3), ("unreachable", 4), ("not-found", 5)] {
        let root = Root::production();
        root.daemon("agent", move |_| problem(kind, "what it was", "why it was", "what to do"));
        root.varve(&["protect", "db", "/dev/vdb"]).problem(code, "what it was", "why it was", "what to do");
        let said = root.varve(&["protect", "db", "/dev/vdb", "--json"]);
        said.problem(code, "what it was", "why it was", "what to do");
        let expected =
            json!({"problem": {"kind": kind, "what": "what it was", "why": "why it was", "next": "what to do"}});
        assert_eq!(said.json(), expected);
    }
}

#[test]
fn words_that_are_not_understood() {
    let root = Root::new();
    root.varve(&["frobnicate"]).problem(2, "frobnicate", "varve [OPTIONS] <COMMAND>", "varve --help");
    root.varve(&["statsu"]).problem(2, "statsu", "did you mean 'status'", "varve --help");
    root.varve(&["status", "--wacth"]).problem(2, "--wacth", "did you mean '--watch'", "varve status --help");
    root.varve(&["host", "invite"]).problem(2, "<NAME>", "varve host invite", "varve host invite --help");
    root.varve(&["join", "127.0.0.1"]).problem(2, "<TOKEN>", "varve join", "varve join --help");
    for other in ["failover", "failback"] {
        root.varve(&[other]).problem(2, "GROUP", "usage", &format!("varve {other} --help"));
    }
    let said = root.varve(&["frobnicate", "--json"]);
    assert_eq!(said.code, 2);
    assert_eq!(said.json()["problem"]["kind"], Value::from("usage"));
    assert_eq!(root.varve(&[]).code, 2);
    assert_eq!(root.varve(&["host"]).code, 2);
    assert_eq!(root.varve(&["--json"]).json()["problem"]["kind"], Value::from("usage"));
}

#[test]
fn help_and_version_are_not_errors() {
    let root = Root::new();
    for args in [&["--help"] as &[&str], &["host", "invite", "--help"], &["doctor", "-h"], &["--version"]] {
        let said = root.varve(args);
        assert_eq!((said.code, said.err.as_str()), (0, ""), "{args:?}");
        assert!(!said.out.is_empty());
    }
}

/// Nothing is asked of a daemon before every word is understood: there is none here.
#[test]
fn words_of_the_timeline_that_are_wrong() {
    let root = Root::recovery();
    let cases: &[(&[&str], &str, &str)] = &[
        (&["view", "open", "db", "--at", "5m"], "'5m' is not a point", "'-' must stand before it"),
        (&["view", "open", "db", "--at", "2026-13-01 00:00"], "is not a point", "looks like a time"),
        (&["view", "open", "db", "--at", "-5m", "--export", "iscsi"], "'iscsi'", "device"),
        (&["view", "open", "db", "--at", "-5m", "--listen", "10.0.0.2"], "--listen does not fit", "has no address"),
        (&["view", "open", "db", "--at", "-5m", "--export", "nbd", "--listen", "x"], "'x'", "not an IP address"),
        (&["view", "open", "db"], "--at", "the usage is"),
        (&["view", "close", "x"], "'x'", "the usage is"),
        (&["rollback", "db"], "--at", "the usage is"),
        (&["rollback", "db", "--at", "pos:zz:1"], "is not a point", "hexadecimal"),
        (&["rollback", "../db", "--at", "-5m"], "cannot name a group", "a name has"),
        (&["restore", "db", "--at", "-5m", "--volume", "0"], "--to", "the usage is"),
        (&["retention", "db", "--age", "7"], "'7'", "no unit"),
        (&["retention", "db", "--bytes", "7x"], "'7x'", "its unit"),
        (&["scrub", "db", "--rate", "0"], "'0'", "less than a byte"),
        (&["points", "db", "--from", "latest"], "'latest' is not a time", "a point and not a time"),
        (&["bookmark", "db", "b", "--keep", "--release"], "--keep", "the usage is"),
        (&["bookmark", "db", "a b", "--keep"], "cannot name a bookmark", "a name has"),
    ];
    for (args, what, why) in cases {
        root.varve(args).problem(2, what, why, "");
    }
}
