//! The text of `varve status` for the states that a group can be in.

use super::picture::{DaemonProblem, Picture};
use super::table::render;
use varve_common::control::{
    AlertStatus, DaemonStatus, DrillStatus, DrillVerified, GapStatus, GroupStatus, HistoryStatus, ResyncStatus,
    VolumeStatus, Window,
};
use varve_common::problem::Problem;
use varve_common::state::{Data, GapReason, Link, Role};
use varve_common::watch::Severity;
use varve_common::wire::messages::Verify;

fn agent() -> DaemonStatus {
    DaemonStatus {
        daemon: "agent".into(),
        version: "0.1.0".into(),
        address: Some("10.0.0.2:7443".into()),
        name: Some("db1".into()),
        rss_bytes: 32 << 20,
        hosts_connected: None,
    }
}

fn receiver() -> DaemonStatus {
    DaemonStatus {
        daemon: "receiver".into(),
        version: "0.1.0".into(),
        address: Some("[::]:7443".into()),
        name: Some("backup".into()),
        rss_bytes: 44 << 20,
        hosts_connected: Some(2),
    }
}

fn group(data: Data) -> GroupStatus {
    GroupStatus {
        name: "db".into(),
        role: Role::Source,
        link: Link::Streaming,
        data,
        reason: None,
        gap_reason: None,
        epoch: 1,
        rpo_seconds: Some(0.012),
        lag_bytes: 8192,
        captured: Some("abababab:8192".into()),
        durable: Some("abababab:0".into()),
        applied: Some("abababab:0".into()),
        window: Window { from: None, to: Some("2026-11-20T14:03:22.512345Z".into()) },
        gaps: Vec::new(),
        volumes: vec![VolumeStatus { path: "/dev/vdb".into(), bytes: 20 << 30, replica: Some("/srv/db-0.img".into()) }],
        resync: None,
        verify: None,
        ring: None,
        journal: None,
        history: None,
        alerts: Vec::new(),
        watch: None,
        authority: None,
        drill: None,
        counters: Default::default(),
    }
}

fn of(group: GroupStatus) -> String {
    render(&Picture { groups: vec![group], daemons: vec![agent()], ..Picture::default() }, "varve ")
}

const HEAD: &str = "agent  0.1.0  receiver 10.0.0.2:7443, known there as 'db1', memory 32.0 MiB\n\n";
const VOLUME: &str = "  volume  /dev/vdb (20.0 GiB) -> /srv/db-0.img\n";

#[test]
fn a_history() {
    let history = HistoryStatus {
        layers: 25,
        bytes: 12 << 30,
        records: 1_234_567,
        views: 1,
        bookmarks: 3,
        kept: 1,
        notice: Some("the disk is nearly full, old points expire early".into()),
        ..HistoryStatus::default()
    };
    let window = Window { from: Some("2026-11-18T10:03:22.5Z".into()), to: Some("2026-11-20T14:03:22.512345Z".into()) };
    let text = of(GroupStatus { role: Role::Replica, window, history: Some(history), ..group(Data::Protected) });
    let expected = "  points  2026-11-18 10:03:22.500Z to 2026-11-20 14:03:22.512Z (2 d 4 h)
  past    12.0 GiB in 25 layers, 1234567 before-images, 1 view open, 3 bookmarks (1 kept)
  past    the disk is nearly full, old points expire early
";
    assert!(text.contains(expected), "{text}");
}

#[test]
fn drills() {
    let verified =
        DrillVerified { at: "2026-11-19T03:00:01Z".into(), point: "2026-11-19T03:00:00.5Z".into(), rto_seconds: 4.25 };
    let drill = |good, verified| {
        let drill = DrillStatus { began: "2026-11-20T03:00:01Z".into(), good, runs: 3, failures: 1, verified };
        of(GroupStatus { role: Role::Replica, drill: Some(drill), ..group(Data::Protected) })
    };
    let expected =
        "  drill   the last one FAILED (2026-11-20 03:00:01.000Z), point 2026-11-19 03:00:00.500Z came up in 4.25 s\n";
    let text = drill(false, Some(verified));
    assert!(text.contains(expected), "{text}");
    let expected = "  drill   the last one good (2026-11-20 03:00:01.000Z), no point was shown to come up yet\n";
    let text = drill(true, None);
    assert!(text.contains(expected), "{text}");
}

#[test]
fn protected() {
    let expected = "GROUP  ROLE    LINK       DATA       RPO    LAG      DURABLE
db     source  streaming  protected  0.0 s  8.0 KiB  2026-11-20 14:03:22.512Z
";
    assert_eq!(of(group(Data::Protected)), format!("{HEAD}{expected}{VOLUME}"));
}

#[test]
fn alerts() {
    let alert = |id: &str, severity, text: &str, next: &str| AlertStatus {
        id: id.into(),
        severity,
        text: text.into(),
        since: "2026-11-20T14:03:53.1Z".into(),
        next: next.into(),
    };
    let alerts = vec![
        alert("source-silent", Severity::Critical, "the agent has sent nothing for 40 s", "look at the agent"),
        alert("not-verified-for", Severity::Warning, "no verify since then", "varve verify db"),
    ];
    let expected = "GROUP  ROLE    LINK       DATA       RPO    LAG      DURABLE
db     source  streaming  protected  0.0 s  8.0 KiB  2026-11-20 14:03:22.512Z
  ALERT   source-silent (critical since 2026-11-20 14:03:53.100Z): the agent has sent nothing for 40 s
  ALERT   not-verified-for (warning since 2026-11-20 14:03:53.100Z): no verify since then
";
    let text = of(GroupStatus { alerts, ..group(Data::Protected) });
    assert_eq!(text, format!("{HEAD}{expected}{VOLUME}  next    look at the agent\n"));
}

#[test]
fn lagging() {
    let late = GroupStatus { rpo_seconds: Some(75.0), lag_bytes: 3 << 30, ..group(Data::Lagging) };
    let expected = "GROUP  ROLE    LINK       DATA     RPO         LAG      DURABLE
db     source  streaming  lagging  1 min 15 s  3.0 GiB  2026-11-20 14:03:22.512Z
";
    let next = "  next    link or recovery host are slower than the writes: varve doctor on both sides\n";
    assert_eq!(of(late), format!("{HEAD}{expected}{VOLUME}{next}"));
}

#[test]
fn gap() {
    let gap = GapStatus { from: "2026-11-20T14:03:22.512345Z".into(), to: None, reason: GapReason::RingFull };
    let open = GroupStatus {
        gap_reason: Some(GapReason::RingFull),
        gaps: vec![gap],
        rpo_seconds: Some(4000.0),
        ..group(Data::Gap)
    };
    let expected = "GROUP  ROLE    LINK       DATA            RPO        LAG      DURABLE
db     source  streaming  gap(ring-full)  1 h 6 min  8.0 KiB  2026-11-20 14:03:22.512Z
  why     the ring was full, the regions written meanwhile are sent again
  gaps    1 seen, the newest from 2026-11-20 14:03:22.512Z to now (ring-full)
";
    let next =
        "  next    a resync begins by itself, the last good point before the gap stays; varve status db --watch\n";
    assert_eq!(of(open), format!("{HEAD}{expected}{VOLUME}{next}"));
}

#[test]
fn resync_with_rate_and_time_left() {
    let running = GroupStatus {
        gap_reason: Some(GapReason::MissedEvents),
        resync: Some(ResyncStatus { done_bytes: 9 << 30, total_bytes: 20 << 30 }),
        ..group(Data::Resync)
    };
    let mut picture = Picture { groups: vec![running], daemons: vec![agent()], ..Picture::default() };
    let expected = "GROUP  ROLE    LINK       DATA          RPO    LAG      DURABLE
db     source  streaming  resync(45 %)  0.0 s  8.0 KiB  2026-11-20 14:03:22.512Z
  why     the kernel skipped the capture program, so the whole volume is compared
  sync    9.0 GiB of 20.0 GiB (45 %)
";
    let next = "  next    the last good point before the gap stays; varve status db --watch\n";
    let once = format!("{HEAD}{expected}{VOLUME}{next}");
    assert_eq!(render(&picture, "varve "), once);
    picture.rates.insert("db 0".into(), (128 << 20) as f64);
    picture.watched = true;
    let watched =
        once.replace("(45 %)\n", "(45 %), 128.0 MiB/s, 1 min 28 s left\n").replace("; varve status db --watch", "");
    assert_eq!(render(&picture, "varve "), watched);
}

#[test]
fn initial_sync() {
    let begun = GroupStatus {
        gap_reason: Some(GapReason::InitialSync),
        resync: Some(ResyncStatus { done_bytes: 0, total_bytes: 20 << 30 }),
        window: Window::default(),
        rpo_seconds: None,
        ..group(Data::InitialSync)
    };
    let expected = "GROUP  ROLE    LINK       DATA          RPO      LAG      DURABLE
db     source  streaming  initial-sync  unknown  8.0 KiB  nothing yet
  why     the first sync has not finished yet
  sync    0 B of 20.0 GiB (0 %)
";
    let next = "  next    nothing can be recovered until the first sync is done; varve status db --watch\n";
    assert_eq!(of(begun), format!("{HEAD}{expected}{VOLUME}{next}"));
}

#[test]
fn disconnected() {
    let cut = GroupStatus {
        link: Link::Disconnected,
        reason: Some("nothing answers at 10.0.0.2:7443".into()),
        ..group(Data::Lagging)
    };
    let expected = "GROUP  ROLE    LINK          DATA     RPO    LAG      DURABLE
db     source  disconnected  lagging  0.0 s  8.0 KiB  2026-11-20 14:03:22.512Z
  why     nothing answers at 10.0.0.2:7443
";
    let next = "  next    varve status on the recovery host; varve doctor here (address, firewall, UDP port)\n";
    assert_eq!(of(cut), format!("{HEAD}{expected}{VOLUME}{next}"));
}

#[test]
fn refused() {
    let refused = GroupStatus {
        link: Link::Refused,
        reason: Some("the replica /srv/db-0.img is too small: 1.0 GiB for 20.0 GiB; make it larger".into()),
        ..group(Data::Lagging)
    };
    let expected = "GROUP  ROLE    LINK     DATA     RPO    LAG      DURABLE
db     source  refused  lagging  0.0 s  8.0 KiB  2026-11-20 14:03:22.512Z
  why     the replica /srv/db-0.img is too small: 1.0 GiB for 20.0 GiB; make it larger
";
    let next = "  next    do what the reason says; it is tried again by itself\n";
    assert_eq!(of(refused), format!("{HEAD}{expected}{VOLUME}{next}"));
}

#[test]
fn a_difference_asks_for_a_repair() {
    let verify = Verify {
        done_bytes: 20 << 30,
        total_bytes: 20 << 30,
        differing_bytes: 65536,
        finished: true,
        ..Verify::default()
    };
    let text = of(GroupStatus { verify: Some(verify), ..group(Data::Protected) });
    assert!(text.contains("  verify  20.0 GiB compared, 64.0 KiB differ\n"), "{text}");
    assert!(text.ends_with("  next    varve verify db --repair\n"), "{text}");
}

#[test]
fn a_fenced_source_is_told_to_stop() {
    let text = of(GroupStatus { role: Role::Fenced, epoch: 2, ..group(Data::Protected) });
    assert!(text.contains("db     fenced  "), "{text}");
    assert!(text.contains("  epoch   2\n"), "{text}");
    assert!(text.contains("  next    stop writing here"), "{text}");
}

#[test]
fn a_daemon_that_is_silent_stands_above_what_others_say() {
    let problem = Problem::unreachable(
        "the agent of this host is not reachable",
        "varve-agent does not run: nothing listens at /run/varve/agent.sock",
        "start it: systemctl enable --now varve-agent",
    );
    let replica = GroupStatus { role: Role::Replica, ..group(Data::Protected) };
    let picture = Picture {
        groups: vec![replica],
        daemons: vec![receiver()],
        problems: vec![DaemonProblem { daemon: "agent", problem }],
        ..Picture::default()
    };
    let expected = "receiver  0.1.0  'backup', listens on [::]:7443, 2 hosts connected, memory 44.0 MiB
agent  NOT REACHABLE, what it would say is not known: varve-agent does not run: nothing listens at /run/varve/agent.sock
  next  start it: systemctl enable --now varve-agent

GROUP  ROLE     LINK       DATA       RPO    LAG      DURABLE
db     replica  streaming  protected  0.0 s  8.0 KiB  2026-11-20 14:03:22.512Z
";
    assert_eq!(render(&picture, "varve "), format!("{expected}{VOLUME}"));
}

#[test]
fn nothing_protected_yet() {
    let picture = Picture { daemons: vec![agent()], ..Picture::default() };
    let expected = "nothing is protected yet\n  next  varve --root /r protect GROUP VOLUME...\n";
    assert_eq!(render(&picture, "varve --root /r "), format!("{HEAD}{expected}"));
}
