//! The units, as `make install` puts them, under a real systemd: what they may do is enough for everything that the daemons do,
//! and what is left to systemd (restarts, timers, the way back from a takeover) is done.

use super::bed::LIMIT;
use serde_json::Value;
use std::time::{Duration, Instant};
use varve_tests::*;

const GROUP: &str = "db";
/// What systemd leaves out where units wait for each other is another thing at each boot.
const BOOTS: u32 = 2;
/// Both daemons are on this one host, the volume is `/dev/vdb`.
const PLAN: &str = r#"version = 1
[[step]]
name = "volumes"
kind = "attach"
volumes = { data = "/dev/vdb" }
[[step]]
name = "data"
kind = "mount"
device = "{data}"
where = "/srv/there"
fstype = "ext4"
[[step]]
name = "it is there"
kind = "check"
run = ["/usr/bin/test", "-s", "/srv/there/marked"]
"#;

/// What both sides say of the group.
struct Both {
    source: Value,
    replica: Value,
}

fn both(guest: &mut Guest) -> Option<Both> {
    let out = guest.shell_within(LIMIT, &format!("varve status {GROUP} --json"));
    let all = serde_json::from_str::<Value>(&out.stdout).ok()?;
    let is = |group: &Value, roles: &[&str]| group["role"].as_str().is_some_and(|role| roles.contains(&role));
    let of = |roles: &[&str]| all["groups"].as_array()?.iter().find(|group| is(group, roles)).cloned();
    Some(Both { source: of(&["source", "fenced"])?, replica: of(&["replica", "promoted"])? })
}

#[track_caller]
fn wait_both(guest: &mut Guest, what: &str, is: impl Fn(&Both) -> bool) -> Both {
    let begin = Instant::now();
    loop {
        if let Some(both) = both(guest).filter(|both| is(both)) {
            return both;
        }
        if begin.elapsed() > LIMIT {
            let status = guest.shell_within(LIMIT, "varve status; systemctl --no-pager list-jobs");
            let log = guest.shell_within(LIMIT, "journalctl -b --no-pager -o short-precise | tail -60");
            panic!("not within {LIMIT:?}: {what}\n{}{}\n{}", status.stdout, status.stderr, log.stdout);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn is_protected(both: &Both) -> bool {
    both.source["data"] == "protected" && both.replica["data"] == "protected"
}

fn gaps(both: &Both) -> usize {
    both.replica["gaps"].as_array().map_or(0, Vec::len)
}

/// Gaps that a new capture began.
fn new_rings(both: &Both) -> usize {
    let all = both.replica["gaps"].as_array().into_iter().flatten();
    all.filter(|gap| gap["reason"] == "new-ring").count()
}

/// The unit has been started anew `times` times and is active.
#[track_caller]
fn wait_restarted(guest: &mut Guest, unit: &str, times: u32) {
    wait_until(LIMIT, "it is started again", || {
        guest
            .shell(&format!("systemctl show -p NRestarts,ActiveState --value {unit}"))
            .split_whitespace()
            .eq([times.to_string().as_str(), "active"])
    });
}

fn everything_under_systemd(series: &str) {
    require_root();
    let scratch = Scratch::disk();
    let volume = scratch.file("volume.img", 256 * MIB);
    Filesystem::Ext4.make(&volume);
    let machine = Machine::system(&scratch, series, &[&volume]);
    let mut guest = machine.boot();
    eprintln!("{}: up after {:?}", guest.shell("uname -r"), guest.boot_time);

    guest.shell("varve receiver init --listen 127.0.0.1:4433");
    guest.shell("systemctl enable --now varve-receiver");
    let token = guest.shell_within(LIMIT, "varve host invite production --json").ok().json();
    guest.shell(&format!("varve join 127.0.0.1:4433 {}", token["token"].as_str().unwrap()));
    guest.shell("systemctl enable --now varve-agent");
    guest.shell(&format!("varve protect {GROUP} /dev/vdb"));
    wait_both(&mut guest, "first sync", is_protected);
    // As docs/protect.md has it: unmounted before the agent stops, mounted after it started.
    let line = "/dev/vdb /srv/data ext4 defaults,x-systemd.after=varve-agent.service 0 2";
    guest.shell(&format!("mkdir -p /srv/data && echo '{line}' >>/etc/fstab && systemctl daemon-reload"));
    guest.shell("systemctl start srv-data.mount && echo 1 >/srv/data/marked && sync -f /srv/data");
    guest.shell(&format!("varve bookmark {GROUP} marked"));
    guest.shell_within(LIMIT, &format!("varve verify {GROUP}")).ok();
    let had = gaps(&wait_both(&mut guest, "it is protected", is_protected));

    // Capture goes on without the agent, whoever ends it.
    guest.shell(
        "systemctl stop varve-agent && echo 2 >/srv/data/stopped && sync -f /srv/data && systemctl start varve-agent",
    );
    guest.shell("systemctl kill -s KILL varve-agent && echo 3 >/srv/data/killed && sync -f /srv/data");
    wait_restarted(&mut guest, "varve-agent", 1);
    guest.shell("systemctl kill -s KILL varve-receiver");
    wait_restarted(&mut guest, "varve-receiver", 1);
    let now = wait_both(&mut guest, "it is protected again", is_protected);
    assert_eq!(gaps(&now), had, "no gap: {:#}", now.replica);
    guest.shell_within(LIMIT, &format!("varve verify {GROUP}")).ok();

    // Views, and what mounts them.
    let view = guest.shell_within(LIMIT, &format!("varve view open {GROUP} --at bookmark:marked --json")).ok().json();
    let device = view["volumes"][0]["device"].as_str().unwrap().to_owned();
    assert_eq!(device.starts_with("/dev/ublkb"), series != "6.1", "{device}");
    guest.shell(&format!("mkdir -p /mnt/then && mount -o ro,noload {device} /mnt/then && grep -q 1 /mnt/then/marked"));
    guest.shell(&format!("test ! -e /mnt/then/killed && umount /mnt/then && varve view close {}", view["id"]));

    // What the unit hides is not called restored, what it closes has a way out.
    let restore = format!("varve restore {GROUP} --at bookmark:marked --volume 0 --dry-run --to");
    for (to, code, word) in
        [("/tmp", 3, "does not see"), ("/root", 3, "does not see"), ("/srv", 1, "ReadWritePaths=/srv")]
    {
        let refused = guest.shell_within(LIMIT, &format!("{restore} {to}/db.img")).expect_code(code);
        assert!(refused.stderr.contains(word), "{to}: {}", refused.stderr);
    }

    // Drills: now, by the unit, by the timer.
    guest.shell("mkdir -p /etc/varve/takeover /srv/there");
    let plan = PLAN.replace('\n', "\\n");
    guest.shell(&format!("printf '%b' '{plan}' >/etc/varve/takeover/{GROUP}.toml && varve plan check {GROUP}"));
    guest.shell_within(LIMIT, &format!("varve drill {GROUP}")).ok();
    guest.shell_within(LIMIT, &format!("systemctl start varve-drill@{GROUP}.service")).ok();
    guest.shell(&format!("varve drill {GROUP} --every 24h"));
    let timers = guest.shell("systemctl list-timers --no-pager --no-legend");
    assert!(timers.contains(&format!("varve-drill@{GROUP}.timer")), "{timers}");

    // It runs here for a while, and goes back by itself.
    guest.shell("systemctl stop srv-data.mount");
    guest.shell_within(LIMIT, &format!("varve failover {GROUP} --yes --abort-after 45s")).ok();
    guest.shell("grep -q 3 /srv/there/killed && echo 4 >/srv/there/promoted && sync -f /srv/there");
    let back =
        wait_both(&mut guest, "it goes back by itself", |both| both.replica["role"] == "replica" && is_protected(both));
    assert!(back.replica["history"]["takeover"].is_null(), "{:#}", back.replica);
    guest.shell("! mountpoint -q /srv/there && systemctl start srv-data.mount && test ! -e /srv/data/promoted");
    guest.shell_within(LIMIT, &format!("varve verify {GROUP}")).ok();

    let log =
        guest.shell("journalctl --no-pager -o cat -u varve-agent -u varve-receiver -u 'varve-drill@*' -p warning");
    eprintln!("--- warnings of the units\n{log}");
    let all = guest.shell("journalctl --no-pager -o cat -u varve-agent -u varve-receiver -u 'varve-drill@*'");
    for word in ["not permitted", "Permission denied", "panicked", "Read-only file system"] {
        assert!(!all.contains(word), "{word}:\n{all}");
    }
    let failed = guest.shell("systemctl list-units --failed --no-legend --plain 'varve*'");
    assert_eq!(failed, "");

    // A reboot as a person does it: compared anew, as docs/troubleshoot.md says and why, next to nothing differs.
    let rings = new_rings(&back);
    for boot in 1..=BOOTS {
        guest.reboot();
        guest = machine.boot();
        let now = wait_both(&mut guest, "it is protected after the boot", is_protected);
        wait_until(LIMIT, "the volume is mounted", || guest.shell_within(LIMIT, "mountpoint -q /srv/data").code == 0);
        let all = now.replica["gaps"].as_array().unwrap();
        assert_eq!(
            (all[0]["reason"].as_str(), all.last().unwrap()["reason"].as_str()),
            (Some("initial-sync"), Some("new-ring")),
            "{:#}\n{:#}",
            now.source,
            now.replica
        );
        assert_eq!(new_rings(&now), rings + boot as usize, "each boot is a gap: {:#}", now.replica);
        let sent = now.source["counters"]["image_bytes"].as_u64().unwrap();
        assert!(sent < 16 * MIB, "{sent} bytes differed after a clean reboot");
        guest.shell("test -s /srv/data/killed");
        guest.shell_within(LIMIT, &format!("varve verify {GROUP}")).ok();
        guest.shell_within(LIMIT, "systemctl is-active varve-agent varve-receiver").ok();
        let cycles = guest.shell("journalctl -b --no-pager -o cat | grep -i 'ordering cycle' || true");
        assert_eq!(cycles, "", "systemd leaves something out at some boots");
        eprintln!("boot {boot}: protected, {sent} bytes differed");
    }
    guest.reboot();
}
crate::on_kernels!(everything_under_systemd);
