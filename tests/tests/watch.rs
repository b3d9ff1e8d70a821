//! The watch on itself: what stops is told by whoever is left, once, and told once when it goes on; what is idle is not.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use nix::sys::signal::Signal;
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(60);
const GROUP: &str = "watched";

/// A pair that alerts after five seconds, each side with a hook that writes down what it gets.
struct Watched {
    pair: Pair,
    // Dropped after the daemons that run it.
    hooks: Scratch,
}

impl Watched {
    #[track_caller]
    fn new(agent_more: &str, receiver_more: &str) -> Self {
        let hooks = Scratch::disk();
        let keys = |side: &str, more: &str| {
            let (hook, said) = (hooks.join(&format!("{side}-hook")), hooks.join(&format!("{side}.said")));
            let text = format!("#!/bin/sh\necho \"$VARVE_EVENT $VARVE_ALERT $(cat)\" >> {}\n", said.display());
            std::fs::write(&hook, text).unwrap();
            std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).unwrap();
            let metrics = hooks.join(&format!("{side}.prom"));
            format!(
                "alert_no_ack_seconds = 5\nalert_hook = \"{}\"\nmetrics_file = \"{}\"\n{more}",
                hook.display(),
                metrics.display()
            )
        };
        let mut pair = Pair::with_agent_config(&keys("agent", agent_more));
        let config = pair.recovery.root().join("etc/varve/receiver.toml");
        let text = std::fs::read_to_string(&config).unwrap() + "\n" + &keys("receiver", receiver_more);
        std::fs::write(&config, text).unwrap();
        pair.recovery.restart(Role::Receiver);
        Watched { pair, hooks }
    }

    fn side(&self, role: Role) -> &Installation {
        match role {
            Role::Agent => &self.pair.production,
            Role::Receiver => &self.pair.recovery,
        }
    }

    /// The ids of the alerts that stand there.
    fn alerts(&self, role: Role) -> Vec<String> {
        let status = self.side(role).group(GROUP).unwrap_or_default();
        let alerts = status["alerts"].as_array().cloned().unwrap_or_default();
        alerts.iter().map(|alert| alert["id"].as_str().unwrap().to_owned()).collect()
    }

    fn flow(&self, role: Role) -> Value {
        self.side(role).group(GROUP).unwrap()["watch"]["flow"].clone()
    }

    #[track_caller]
    fn wait(&self, role: Role, wanted: &[&str]) -> Duration {
        let mut found = Vec::new();
        wait_until(LIMIT, &format!("alerts {wanted:?} of {role:?}"), || {
            let now = self.alerts(role);
            if now != found {
                eprintln!("{role:?}: {now:?}");
                found.clone_from(&now);
            }
            now == wanted
        })
    }

    /// `raised no-ack {…}` for each run of that side's hook.
    fn hooked(&self, role: Role) -> Vec<(String, Value)> {
        let path: PathBuf = self.hooks.join(if role == Role::Agent { "agent.said" } else { "receiver.said" });
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = |line: &str| {
            let mut words = line.splitn(3, ' ');
            let event = format!("{} {}", words.next().unwrap(), words.next().unwrap());
            (event, serde_json::from_str(words.next().unwrap()).unwrap())
        };
        text.lines().map(line).collect()
    }

    /// Events of the log, in order.
    fn logged(&self, role: Role) -> Vec<String> {
        let log = self.side(role).log(role);
        let plain: Vec<String> = log.lines().map(without_colours).collect();
        let line = |line: &String| {
            let id = line.split("alert=\"").nth(1)?.split('"').next()?;
            let cleared = line.contains("the alert is cleared");
            Some(format!("{} {id}", if cleared { "cleared" } else { "raised" }))
        };
        plain.iter().filter_map(line).collect()
    }
}

fn without_colours(line: &str) -> String {
    let mut parts = line.split('\u{1b}');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |plain, part| plain + part.split_once('m').map_or("", |(_, rest)| rest))
}

#[test]
fn what_stops_is_told_by_whoever_is_left() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 16 << 20);
    let mut watched = Watched::new("", "");
    watched.pair.protect(GROUP, &[device.path()]);
    watched.pair.wait_protected(GROUP, LIMIT);
    for role in [Role::Agent, Role::Receiver] {
        watched.wait(role, &[]);
    }

    // Idle for twice the limit: nothing to tell, on either side.
    std::thread::sleep(Duration::from_secs(12));
    for role in [Role::Agent, Role::Receiver] {
        assert_eq!((watched.alerts(role), watched.flow(role)), (vec![], "idle".into()), "{role:?}");
    }
    let quiet = watched.side(Role::Receiver).group(GROUP).unwrap()["watch"]["last_ack_seconds"].as_f64().unwrap();
    assert!(quiet < 5.0, "{quiet} s although canaries come");
    let before = watched.logged(Role::Receiver).len();

    // The agent hangs: the connection is there, and nothing comes.
    watched.pair.production.signal(Role::Agent, Signal::SIGSTOP);
    let took = watched.wait(Role::Receiver, &["source-silent"]);
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!(watched.flow(Role::Receiver), "stalled");
    let text = watched.pair.recovery.varve(&["status", GROUP]).ok().stdout;
    assert!(text.contains("ALERT   source-silent (critical since "), "{text}");
    let metrics = watched.pair.recovery.varve(&["metrics"]).ok().stdout;
    let line = "varve_alert{daemon=\"receiver\",group=\"watched\",id=\"source-silent\",severity=\"critical\"} 1\n";
    assert!(metrics.contains(line) && metrics.contains("flow=\"stalled\"} 1\n"), "{metrics}");
    watched.pair.production.signal(Role::Agent, Signal::SIGCONT);
    watched.wait(Role::Receiver, &[]);
    watched.wait(Role::Agent, &[]);

    // The agent is gone; and it stays so over a restart of the receiver, which nobody ever calls.
    watched.pair.production.kill(Role::Agent);
    watched.wait(Role::Receiver, &["source-gone"]);
    watched.pair.recovery.restart(Role::Receiver);
    watched.wait(Role::Receiver, &["source-gone"]);
    watched.pair.production.start(Role::Agent);
    watched.wait(Role::Receiver, &[]);

    // The receiver is gone.
    watched.pair.wait_protected(GROUP, LIMIT);
    watched.wait(Role::Agent, &[]);
    let told_before = watched.hooked(Role::Agent).len();
    watched.pair.recovery.kill(Role::Receiver);
    let took = watched.wait(Role::Agent, &["no-ack"]);
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!(watched.flow(Role::Agent), "stalled");
    watched.pair.recovery.start(Role::Receiver);
    watched.wait(Role::Agent, &[]);

    // Once each, in the log and to the hook, and with everything in it.
    let logged = watched.logged(Role::Receiver);
    let of_sources: Vec<&str> =
        logged[before..].iter().map(String::as_str).filter(|event| event.contains("source")).collect();
    // The killed one is silent until its connection is found to be dead, which takes longer than five seconds.
    let events = [
        "raised source-silent",
        "cleared source-silent",
        "raised source-silent",
        "raised source-gone",
        "cleared source-silent",
        "raised source-gone",
        "cleared source-gone",
    ];
    assert_eq!(of_sources, events);
    let hooked = |role| watched.hooked(role).into_iter().map(|(event, _)| event).collect::<Vec<_>>();
    for role in [Role::Agent, Role::Receiver] {
        wait_until(LIMIT, "the hooks are told of all", || hooked(role).len() == watched.logged(role).len());
        assert_eq!(hooked(role), watched.logged(role), "{role:?}");
    }
    let told = watched.hooked(Role::Agent);
    let (event, object) = &told[told_before..].iter().find(|(event, _)| event.contains("no-ack")).unwrap();
    assert_eq!(event, "raised no-ack");
    for (key, value) in
        [("event", "raised"), ("daemon", "agent"), ("group", GROUP), ("id", "no-ack"), ("severity", "critical")]
    {
        assert_eq!(object[key], value, "{object:#}");
    }
    assert!(object["next"].as_str().unwrap().contains("varve status watched"), "{object:#}");
    let file = watched.hooks.join("agent.prom");
    wait_until(LIMIT, "the metrics file is there", || {
        std::fs::read_to_string(&file).is_ok_and(|text| text.contains("varve_group_rpo_seconds{"))
    });
}

/// A hook that never ends and a metrics file that cannot be written hold up nobody.
#[test]
fn a_hook_that_hangs_holds_up_nobody() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 8 << 20);
    let mut watched = Watched::new("alert_hook_seconds = 1\n", "");
    let said = watched.hooks.join("agent.said");
    let hook = format!("#!/bin/sh\necho \"$VARVE_EVENT $VARVE_ALERT $(cat)\" >> {}\nsleep 1000\n", said.display());
    std::fs::write(watched.hooks.join("agent-hook"), hook).unwrap();
    std::fs::create_dir(watched.hooks.join("agent.prom")).ok();
    watched.pair.protect(GROUP, &[device.path()]);
    watched.pair.wait_protected(GROUP, LIMIT);
    watched.pair.recovery.kill(Role::Receiver);
    watched.wait(Role::Agent, &["no-ack"]);
    watched.pair.recovery.start(Role::Receiver);
    watched.wait(Role::Agent, &[]);
    wait_until(LIMIT, "both events are told", || {
        let told: Vec<String> = watched.hooked(Role::Agent).into_iter().map(|(event, _)| event).collect();
        told.ends_with(&["raised no-ack".to_owned(), "cleared no-ack".to_owned()])
    });
    let log = watched.pair.production.log(Role::Agent);
    assert!(log.contains("did not end and was killed"), "{log}");
    watched.pair.production.stop(Role::Agent);
}

/// A verify is remembered; that there was none for too long is told.
#[test]
fn a_replica_that_nobody_verified() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 8 << 20);
    // A second and a half, in days.
    let mut watched = Watched::new("", "alert_verify_days = 0.00002\n");
    watched.pair.protect(GROUP, &[device.path()]);
    watched.pair.wait_protected(GROUP, LIMIT);
    watched.wait(Role::Receiver, &["not-verified-for"]);
    watched.pair.production.varve(&["verify", GROUP]).ok();
    let verified = || watched.pair.recovery.group(GROUP).unwrap()["watch"]["verified"].clone();
    wait_until(LIMIT, "the proof is noted", || verified().is_string());
    let noted = verified();
    watched.pair.recovery.restart(Role::Receiver);
    let after = wait_for_some(|| watched.pair.recovery.group(GROUP).map(|group| group["watch"]["verified"].clone()));
    assert_eq!(after, noted, "over a restart");
}

fn wait_for_some(mut ask: impl FnMut() -> Option<Value>) -> Value {
    let mut found = Value::Null;
    wait_until(LIMIT, "an answer", || {
        found = ask().unwrap_or_default();
        !found.is_null()
    });
    found
}

/// What shrank is not called protected any more, on either side; its points up to then stay, and there is a way on.
/// (Growth is followed: tests/resize.rs.)
#[test]
fn a_volume_that_shrinks() {
    require_root();
    let scratch = Scratch::memory();
    let mut watched = Watched::new("", "");
    let group = "shrinks";
    let device = LoopDevice::new(&scratch, group, 8 << 20);
    let filled = vec![7; 1 << 20];
    std::fs::write(device.path(), &filled).unwrap();
    watched.pair.protect(group, &[device.path()]);
    watched.pair.wait_protected(group, LIMIT);
    watched.pair.production.varve(&["bookmark", group, "before"]).ok();
    watched.pair.wait_applied(group, LIMIT);
    device.resize(4 << 20);
    let status = |role| watched.side(role).group(group).unwrap_or_default();
    let alerted = |role, id: &str| status(role)["alerts"].as_array().unwrap().iter().any(|alert| alert["id"] == id);
    wait_until(LIMIT, "the agent alerts", || alerted(Role::Agent, "not-protected"));
    let agent = status(Role::Agent);
    assert!(agent["reason"].as_str().unwrap().contains("shrank"), "{agent:#}");
    assert!(agent["alerts"][0]["text"].as_str().unwrap().contains("varve unprotect"), "{agent:#}");
    assert_eq!((&agent["data"], &agent["gap_reason"]), (&"gap".into(), &"volume-changed".into()), "{agent:#}");
    let receiver = status(Role::Receiver);
    assert_eq!((&receiver["data"], &receiver["gap_reason"]), (&"gap".into(), &"volume-changed".into()), "{receiver:#}");
    assert!(alerted(Role::Receiver, "gap"), "{receiver:#}");
    // What was good stays good, in its size.
    let restored = scratch.join(&format!("{group}.restored"));
    let to = restored.to_str().unwrap();
    watched.pair.recovery.varve(&["restore", group, "--at", "bookmark:before", "--volume", "0", "--to", to]).ok();
    let restored = std::fs::read(&restored).unwrap();
    assert!(restored.len() == 8 << 20 && restored.starts_with(&filled), "{} bytes", restored.len());
    // A daemon that is started anew knows no better.
    watched.pair.production.restart(Role::Agent);
    assert_eq!(watched.pair.production.group(group).unwrap()["gap_reason"], "volume-changed");
    // On, as the status says.
    watched.pair.production.varve(&["unprotect", group, "--yes"]).ok();
    let again = format!("{group}-again");
    watched.pair.protect(&again, &[device.path()]);
    watched.pair.wait_protected(&again, LIMIT);
    watched.pair.production.varve(&["unprotect", &again, "--yes"]).ok();
}

/// Somebody writes to the replica: found by a verify, told by both sides, mended by a repair.
#[test]
fn a_replica_that_was_changed_behind_its_back() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 8 << 20);
    let watched = Watched::new("", "");
    let replicas = watched.pair.protect(GROUP, &[device.path()]);
    watched.pair.wait_protected(GROUP, LIMIT);
    watched.pair.wait_applied(GROUP, LIMIT);
    std::os::unix::fs::FileExt::write_all_at(
        &std::fs::File::options().write(true).open(&replicas[0]).unwrap(),
        &[0xee; 4096],
        3 << 20,
    )
    .unwrap();
    watched.pair.production.varve(&["verify", GROUP]).expect_code(1);
    for role in [Role::Agent, Role::Receiver] {
        watched.wait(role, &["replica-differs"]);
    }
    watched.pair.production.varve(&["verify", GROUP, "--repair"]).ok();
    for role in [Role::Agent, Role::Receiver] {
        watched.wait(role, &[]);
    }
    watched.pair.production.varve(&["verify", GROUP]).ok();
    assert_same(device.path(), &replicas[0]);
}
