//! What a plan may say. Needs no root.
#![allow(clippy::unwrap_used, reason = "a test's broken assumption is a panic with a line number")]

use proptest::prelude::*;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};
use varve_common::control::PointReply;
use varve_common::paths::Paths;
use varve_takeover::plan::{InTest, Kind, Probe};
use varve_takeover::step::Action;
use varve_takeover::{Commands, Context, Device, Mode, Plan, Runner, Tools};

const EXAMPLE: &str = include_str!("../examples/db.toml");

fn step(body: &str) -> String {
    format!("version = 1\n\n[[step]]\nname = \"s\"\n{body}\n")
}

fn one(body: &str) -> Result<(Kind, InTest, Duration), String> {
    let plan = Plan::parse("p.toml", &step(body)).map_err(|problem| problem.why)?;
    let step = plan.steps.into_iter().next().unwrap();
    Ok((step.kind, step.in_test, step.timeout))
}

fn context(mode: Mode) -> Context {
    let device = |number: usize, volume: &str| Device {
        volume: volume.to_owned(),
        device: format!("/dev/loop{number}").into(),
        bytes: 1 << 30,
    };
    Context {
        group: "db".to_owned(),
        point: PointReply { time: "2026-11-20T14:03:22.5Z".to_owned(), ..PointReply::default() },
        devices: vec![device(7, "/dev/vdb"), device(8, "/dev/vdc")],
        mode,
        paths: Paths::new("/"),
        began: SystemTime::now(),
        tools: Tools::default(),
        commands: Commands { resume: "resume".to_owned(), undo: "undo".to_owned(), undo_plan: "undo plan".to_owned() },
    }
}

#[test]
fn the_example_is_good_in_both_modes() {
    let plan = Plan::parse("db.toml", EXAMPLE).unwrap_or_else(|problem| panic!("{problem}"));
    let volumes: Vec<String> = context(Mode::Live).devices.into_iter().map(|device| device.volume).collect();
    assert_eq!(plan.check(&volumes), []);
    assert_eq!(plan.check(&volumes[..1]).len(), 1);
    for mode in [Mode::Live, Mode::Test] {
        let runner = Runner::new(plan.clone(), context(mode)).unwrap();
        let dry = runner.dry_run();
        assert_eq!(dry.steps.len(), plan.steps.len());
        let json = serde_json::to_string(&dry).unwrap();
        assert_eq!(serde_json::from_str::<varve_takeover::DryRun>(&json).unwrap(), dry);
        println!("{dry}");
    }
}

#[test]
fn good_steps() {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let (kind, in_test, timeout) = one("kind = \"attach\"").unwrap();
    assert_eq!((kind, in_test, timeout.as_secs()), (Kind::Attach { volumes: vec![] }, InTest::Run, 10));
    let (kind, ..) = one("kind = \"lvm\"\nvg = \"vg-0\"").unwrap();
    assert_eq!(kind, Kind::Lvm { vg: "vg-0".to_owned(), devices: vec![] });
    let (kind, _, timeout) = one("kind = \"unit\"\nunit = \"pg@15-main\"\ntimeout = \"2m30s\"").unwrap();
    assert_eq!(kind, Kind::Unit { unit: "pg@15-main.service".to_owned(), test_run: None });
    assert_eq!(timeout.as_secs(), 150);
    let (_, in_test, _) = one("kind = \"unit\"\nunit = \"a.target\"").unwrap();
    assert_eq!(in_test, InTest::Skip, "systemd is not in a bubble");
    let (kind, ..) = one("kind = \"command\"\nrun = \"a | b\"\nundo = []").unwrap();
    let Kind::Command { run, undo, .. } = kind else { panic!("{kind:?}") };
    assert_eq!((run, undo), (words(&["/bin/sh", "-c", "a | b"]), vec![]));
    let (kind, ..) = one("kind = \"address\"\naddress = \"2001:db8::5/64\"\ninterface = \"eth0\"").unwrap();
    let address: IpAddr = "2001:db8::5".parse().unwrap();
    let interface = "eth0".to_owned();
    assert_eq!(kind, Kind::Address { address, prefix: 64, interface, announce: true, take_from_others: false });
    let probes = [
        ("tcp = \"db:5432\"", Probe::Tcp { host: "db".to_owned(), port: 5432 }),
        ("tcp = \"[::1]:80\"", Probe::Tcp { host: "::1".to_owned(), port: 80 }),
        ("http = \"http://h\"", http("h", 80, "/", 200)),
        ("http = \"http://h:8080/a?b=c\"\nstatus = 204", http("h", 8080, "/a?b=c", 204)),
        ("http = \"http://[::1]:81?x\"", http("::1", 81, "/?x", 200)),
        ("run = [\"/bin/true\", \"x\"]", Probe::Command { run: words(&["/bin/true", "x"]) }),
    ];
    for (text, wanted) in probes {
        let (kind, ..) = one(&format!("kind = \"check\"\n{text}")).unwrap_or_else(|why| panic!("{text}: {why}"));
        let Kind::Check { probe, .. } = kind else { panic!("{kind:?}") };
        assert_eq!(probe, wanted, "{text}");
    }
}

fn http(host: &str, port: u16, path: &str, status: u16) -> Probe {
    Probe::Http { host: host.to_owned(), port, path: path.to_owned(), status, text: None }
}

#[test]
fn bad_plans_are_refused_with_the_line_and_the_key() {
    let mount = "kind = \"mount\"\ndevice = \"/dev/x\"\nfstype = \"ext4\"\n";
    let cases = [
        ("", vec!["line 3: step 1 's': the key 'kind' is missing"]),
        ("kind = \"reboot\"", vec!["line 5", "kind is one of attach, lvm, mount", "not 'reboot'"]),
        ("kind = \"attach\"\nvolume = 1", vec!["line 6: step 1 's': there is no key 'volume' here; there are"]),
        ("kind = \"attach\"\nvolumes = [\"/dev/x\"]", vec!["line 6", "volumes is a table"]),
        ("kind = \"attach\"\nvolumes = { \"a/b\" = \"/dev/x\" }", vec!["'a/b' cannot name a volume"]),
        ("kind = \"attach\"\nvolumes = { a = 1 }", vec!["'a' is the path of a volume"]),
        ("kind = \"attach\"\ntimeout = \"5\"", vec!["line 6", "no time such as 90s"]),
        ("kind = \"attach\"\ntimeout = 5", vec!["timeout is a text, not of the type integer"]),
        ("kind = \"attach\"\ntimeout = \"48h\"", vec!["is not from 100ms to 24h"]),
        ("kind = \"attach\"\ntimeout = \"1ms\"", vec!["is not from 100ms to 24h"]),
        ("kind = \"attach\"\nin_test = \"maybe\"", vec!["in_test is one of run, skip, not 'maybe'"]),
        ("kind = \"lvm\"", vec!["the key 'vg' is missing"]),
        ("kind = \"lvm\"\nvg = \"-x\"", vec!["'-x' cannot name a volume group"]),
        ("kind = \"mount\"", vec!["the key 'device' is missing", "the key 'fstype'", "the key 'where'"]),
        (&format!("{mount}where = \"srv\""), vec!["line 8", "not an absolute path"]),
        (&format!("{mount}where = \"/srv/../etc\""), vec!["not an absolute path"]),
        (&format!("{mount}where = \"/usr/\""), vec!["'/usr/' belongs to this host's own system"]),
        (&format!("{mount}where = \"/\""), vec!["belongs to this host's own system"]),
        (&format!("{mount}where = \"/a\"\noptions = \"rw,bind\""), vec!["line 9", "'bind' does not fit"]),
        (&format!("{mount}where = \"/a\"\noptions = \"rw,,x\""), vec!["single commas"]),
        ("kind = \"mount\"\ndevice = \"sda\"\nfstype = \"x\"\nwhere = \"/a\"", vec!["'sda' is neither a path nor"]),
        ("kind = \"mount\"\ndevice = \"/dev/x\"\nfstype = \"-o\\u0007\"\nwhere = \"/a\"", vec!["control character"]),
        ("kind = \"mount\"\ndevice = \"/dev/x\"\nfstype = \"btrfs\"\nwhere = \"/a\"", vec!["in_test = \"skip\""]),
        ("kind = \"address\"\ninterface = \"e\"\naddress = \"10.0.0.1\"", vec!["no address with its network's bits"]),
        ("kind = \"address\"\ninterface = \"e\"\naddress = \"10.0.0.1/33\"", vec!["network's bits"]),
        ("kind = \"address\"\ninterface = \"e\"\naddress = \"127.0.0.1/8\"", vec!["cannot be taken over"]),
        ("kind = \"address\"\ninterface = \"a/b\"\naddress = \"10.0.0.1/8\"", vec!["'a/b' cannot name a network"]),
        ("kind = \"address\"\ninterface = \"-x\"\naddress = \"10.0.0.1/8\"", vec!["'-x' cannot name a network"]),
        ("kind = \"address\"\naddress = \"10.0.0.1/8\"", vec!["the key 'interface' is missing"]),
        ("kind = \"unit\"\nunit = \"-x\"", vec!["'-x.service' cannot name a systemd unit"]),
        ("kind = \"unit\"\nunit = \"a b\"", vec!["cannot name a systemd unit"]),
        ("kind = \"unit\"\nunit = \"a\"\nin_test = \"run\"", vec!["line 7", "systemd is not inside a bubble"]),
        ("kind = \"command\"\nrun = \"x\"", vec!["the key 'undo' is missing: the command that takes it back"]),
        ("kind = \"command\"\nrun = []\nundo = []", vec!["run names no program"]),
        ("kind = \"command\"\nrun = [\"x\"]\nundo = []", vec!["with an absolute path"]),
        ("kind = \"command\"\nrun = [1]\nundo = []", vec!["run is an array of texts"]),
        ("kind = \"command\"\nrun = \"\"\nundo = []", vec!["run is empty"]),
        ("kind = \"check\"", vec!["exactly one of tcp, http and run"]),
        ("kind = \"check\"\ntcp = \"a:1\"\nrun = \"x\"", vec!["exactly one of tcp, http and run"]),
        ("kind = \"check\"\ntcp = \"a\"", vec!["'a' is not HOST:PORT"]),
        ("kind = \"check\"\ntcp = \"a:0\"", vec!["not HOST:PORT"]),
        ("kind = \"check\"\ntcp = \"a:1\"\nstatus = 200", vec!["line 7", "status and text belong to http"]),
        ("kind = \"check\"\nhttp = \"https://a\"", vec!["for https use run"]),
        ("kind = \"check\"\nhttp = \"http://a/b c\"", vec!["is not http://HOST"]),
        ("kind = \"check\"\nhttp = \"http://u@a/\"", vec!["is not http://HOST"]),
        ("kind = \"check\"\nhttp = \"http://a\"\nstatus = 20", vec!["20 is no status of HTTP"]),
        ("kind = \"check\"\nhttp = \"http://a\\r\\nX: y/\"", vec!["control character"]),
        ("kind = \"attach\"\n[[step]]\nname = \"s\"\nkind = \"attach\"", vec!["line 6: the name 's' was given"]),
        ("kind = \"attach\"\n[[step]]\nkind = \"attach\"", vec!["line 6: step 2: the key 'name' is missing"]),
        ("kind = \"attach\"\n[bubble]\nprivate = [\"x\"]", vec!["line 7: bubble: private: 'x' is no absolute path"]),
        ("kind = \"attach\"\n[bubble]\npublic = []", vec!["there is no key 'public' here; there are private"]),
        ("kind = \"attach\"\nkind = \"attach\"", vec!["line 6", "duplicate"]),
    ];
    for (body, words) in cases {
        let why = one(body).expect_err(body);
        for word in words {
            assert!(why.contains(word), "{body}\nsays: {why}\nnot: {word}");
        }
    }
    let whole = [
        ("", "line 1: the key 'version' is missing"),
        ("version = 2\n[[step]]\nname = \"a\"\nkind = \"attach\"", "version is 2; this program reads version 1"),
        ("version = 1", "there is no [[step]]"),
        ("version = 1\nstep = 3", "line 2: step is an array of tables"),
        ("version = 1\nsteps = []\n[[step]]\nname = \"a\"\nkind = \"attach\"", "line 2: there is no key 'steps' here"),
        ("version = ", "line 1"),
    ];
    for (text, word) in whole {
        let problem = Plan::parse("p.toml", text).expect_err(text);
        assert!(problem.why.contains(word), "{text}: {problem}");
        assert_eq!(problem.kind.exit_code(), 2);
        assert!(problem.what.contains("p.toml"));
    }
}

#[test]
fn names_are_given_before_they_are_used() {
    let volumes = ["/dev/vdb".to_owned()];
    let check = |steps: &str| {
        let plan =
            Plan::parse("p.toml", &format!("version = 1\n{steps}")).unwrap_or_else(|problem| panic!("{problem}"));
        plan.check(&volumes).into_iter().map(|problem| problem.what).collect::<Vec<_>>()
    };
    let mount = |device: &str| {
        format!("[[step]]\nname = \"m\"\nkind = \"mount\"\ndevice = \"{device}\"\nwhere = \"/m\"\nfstype = \"ext4\"\n")
    };
    let attach = "[[step]]\nname = \"a\"\nkind = \"attach\"\nvolumes = { data = \"/dev/vdb\" }\n";
    let lvm = "[[step]]\nname = \"l\"\nkind = \"lvm\"\nvg = \"vg0\"\ndevices = [\"{data}\"]\n";
    assert_eq!(check(&mount("{volume0}")), [""; 0]);
    assert_eq!(check(&format!("{attach}{lvm}{}", mount("/dev/{vg0}/lv"))), [""; 0]);
    let bad = [
        (mount("{volume1}"), "{volume1} stands for nothing"),
        (format!("{}{attach}", mount("{data}")), "{data} stands for nothing"),
        (attach.replace("vdb", "vdc"), "the group has no volume /dev/vdc"),
        (attach.replace("data =", "volume3 ="), "'volume3' is the name of a volume by its number"),
        (format!("{attach}{}", attach.replace("name = \"a\"", "name = \"b\"")), "the name 'data' is taken"),
        (format!("{attach}{}", lvm.replace("vg0", "data")), "the name 'data' is taken"),
    ];
    for (steps, word) in bad {
        let found = check(&steps);
        assert!(found.len() == 1 && found[0].contains(word) && found[0].contains("p.toml line"), "{steps}: {found:?}");
    }
}

#[test]
fn a_test_has_other_names_and_options() {
    let text = r#"
version = 1
[[step]]
name = "a"
kind = "attach"
volumes = { data = "/dev/vdb" }
[[step]]
name = "l"
kind = "lvm"
vg = "vg0"
devices = ["{data}"]
[[step]]
name = "m"
kind = "mount"
device = "/dev/{vg0}/lv"
where = "/srv/db"
fstype = "xfs"
[[step]]
name = "c"
kind = "command"
run = ["/bin/live", "{data}", "${HOME} {{x}}"]
undo = ["/bin/back"]
test_run = ["/bin/test", "{volume1}"]
test_undo = []
"#;
    let plan = Plan::parse("p.toml", text).unwrap_or_else(|problem| panic!("{problem}"));
    let actions = |mode| {
        let dry = Runner::new(plan.clone(), context(mode)).unwrap().dry_run();
        dry.steps.into_iter().map(|step| step.action).collect::<Vec<_>>()
    };
    let (live, test) = (actions(Mode::Live), actions(Mode::Test));
    let link = |action: &Action| match action {
        Action::Attach { links } => links[0].path.display().to_string(),
        other => panic!("{other:?}"),
    };
    assert_eq!((link(&live[0]).as_str(), link(&test[0]).as_str()), ("/dev/varve/db/data", "/dev/varve/.test/db/data"));
    let mount = |action: &Action| match action {
        Action::Mount { device, options, .. } => (device.display().to_string(), options.join(",")),
        other => panic!("{other:?}"),
    };
    assert_eq!(mount(&live[2]), ("/dev/vg0/lv".to_owned(), String::new()));
    assert_eq!(mount(&test[2]), ("/dev/varve-test-db-vg0/lv".to_owned(), "nouuid".to_owned()));
    let command = |action: &Action| match action {
        Action::Command { run, undo, .. } => (run.join(" "), undo.join(" ")),
        other => panic!("{other:?}"),
    };
    assert_eq!(command(&live[3]), ("/bin/live /dev/varve/db/data ${HOME} {x}".to_owned(), "/bin/back".to_owned()));
    assert_eq!(command(&test[3]), ("/bin/test /dev/loop8".to_owned(), String::new()));
}

proptest! {
    #[test]
    fn no_text_panics(cut in 0..EXAMPLE.len(), put in "\\PC{0,8}|[\\[\\]{}=\"\\n]{0,8}", len in 0usize..40) {
        let mut text = EXAMPLE.as_bytes().to_vec();
        let end = (cut + len).min(text.len());
        text.splice(cut..end, put.bytes());
        if let Ok(text) = String::from_utf8(text)
            && let Ok(plan) = Plan::parse("p.toml", &text)
        {
            let _ = plan.check(&["/dev/vdb".to_owned(), "/dev/vdc".to_owned()]);
            let _ = Runner::new(plan, context(Mode::Test)).map(|runner| runner.dry_run().to_string());
        }
    }
}
