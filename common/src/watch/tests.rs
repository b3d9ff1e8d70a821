use super::*;
use crate::state::{Data, GapReason, Link, Role};
use proptest::prelude::*;
use std::collections::HashSet;

const BORN_NS: u64 = 1_700_000_000_000_000_000;

/// A group that is looked at once a second.
struct Played {
    watch: Watch,
    limits: Limits,
    now: Now,
    facts: Facts,
    position: u64,
}

impl Played {
    fn new(role: Role) -> Self {
        let facts = Facts {
            group: "db".into(),
            role,
            link: Link::Streaming,
            data: Data::Protected,
            reason: None,
            gap: None,
            newest_gap: None,
            rpo_seconds: Some(0.0),
            captured: None,
            durable: None,
            applied: None,
            writes: 0,
            resync: None,
            backlog: None,
            journal_error: None,
            window: None,
            damaged: 0,
            differing: Some(0),
            not_started: false,
            free: None,
            shortened: None,
            held: None,
            failure: None,
            born_ns: Some(BORN_NS),
            verified_ns: None,
        };
        let now = Now { steady_ns: 1_000_000_000, wall_ns: BORN_NS };
        Self { watch: Watch::default(), limits: Limits::default(), now, facts, position: 0 }
    }

    /// One more second; what was told.
    fn look(&mut self) -> Vec<String> {
        self.look_after(Duration::from_secs(1))
    }

    fn look_after(&mut self, passed: Duration) -> Vec<String> {
        self.now.steady_ns += passed.as_nanos() as u64;
        self.now.wall_ns += passed.as_nanos() as u64;
        let events = self.watch.look(&self.limits, self.now, std::slice::from_ref(&self.facts));
        let sign = |event: &Event| if event.raised { "+" } else { "-" };
        events.iter().map(|event| format!("{}{}", sign(event), event.alert.id)).collect()
    }

    /// A canary is captured, and everything acknowledged and applied.
    fn well(&mut self) {
        self.position += 56;
        let at = Some(format!("ab:{}", self.position));
        (self.facts.captured, self.facts.durable, self.facts.applied) = (at.clone(), at.clone(), at);
    }

    /// A canary is captured and goes nowhere.
    fn unacknowledged(&mut self) {
        self.position += 56;
        self.facts.captured = Some(format!("ab:{}", self.position));
    }

    fn told(&mut self, seconds: u64, mut step: impl FnMut(&mut Self)) -> Vec<String> {
        (0..seconds)
            .flat_map(|_| {
                step(self);
                self.look()
            })
            .collect()
    }

    fn flow(&self) -> Flow {
        self.watch.status("db").expect("looked at").flow
    }
}

#[test]
fn an_idle_group_is_well_for_months() {
    for role in [Role::Source, Role::Replica] {
        let mut played = Played::new(role);
        played.limits.verify_age = Duration::ZERO;
        let told = played.told(90 * 86_400 / 60, |played| {
            played.well();
            assert_eq!(played.look_after(Duration::from_secs(59)), [""; 0]);
            played.well();
        });
        assert_eq!((told, played.flow()), (vec![], Flow::Idle), "{role:?}");
    }
}

#[test]
fn a_source_that_is_silent_while_connected_is_not_idle() {
    let mut played = Played::new(Role::Replica);
    assert_eq!(played.told(60, Played::well), [""; 0]);
    assert_eq!(played.told(30, |_| {}), [""; 0]);
    assert_eq!(played.told(3000, |_| {}), ["+source-silent"]);
    assert_eq!(played.flow(), Flow::Stalled);
    let alert = &played.watch.alerts("db")[0];
    assert!(alert.text.contains("sent nothing for 50 min") && alert.severity == Severity::Critical, "{alert:?}");
    // The connection is found to be dead; then the agent comes back.
    played.facts.link = Link::Disconnected;
    assert_eq!(played.told(60, |_| {}), ["+source-gone", "-source-silent"]);
    played.facts.link = Link::Streaming;
    assert_eq!(played.told(20, |_| {}), ["-source-gone"], "what goes on takes its time to begin");
    assert_eq!(played.told(60, Played::well), [""; 0]);
    assert_eq!((played.flow(), played.watch.alerts("db")), (Flow::Idle, vec![]));
}

/// A receiver that was started again finds nobody who sends: its own clock is enough.
#[test]
fn a_receiver_that_nobody_calls_says_so() {
    let mut played = Played::new(Role::Replica);
    (played.facts.link, played.facts.rpo_seconds, played.facts.data) = (Link::Disconnected, None, Data::Lagging);
    played.facts.window = Some((BORN_NS, BORN_NS));
    assert_eq!(played.told(40, |_| {}), ["+source-gone"]);
    assert!(played.watch.alerts("db")[0].text.contains("the newest point is of 2023-11-14T22:13:20"));
    played.limits.mute = vec!["db/source-gone".into()];
    assert_eq!(played.told(6, |_| {}), ["-source-gone"], "an operator knows");
}

#[test]
fn no_ack_needs_something_to_acknowledge() {
    let mut played = Played::new(Role::Source);
    played.told(10, Played::well);
    assert_eq!(played.told(30, Played::unacknowledged), [""; 0]);
    assert_eq!(played.told(100, Played::unacknowledged), ["+no-ack"]);
    assert_eq!(played.told(30, Played::well), ["-no-ack"]);
    // Capture itself stands still: everything is acknowledged, and that is not well either.
    assert_eq!(played.told(100, |_| {}), ["+stalled"]);
    assert_eq!((played.told(30, Played::well), played.flow()), (vec!["-stalled".to_owned()], Flow::Idle));
}

#[test]
fn a_lag_around_the_limit_does_not_flap() {
    let mut played = Played::new(Role::Source);
    let mut second = 0;
    let told = played.told(1000, |played| {
        played.well();
        second += 1;
        played.facts.rpo_seconds = Some(if second % 7 < 4 { 61.0 } else { 55.0 });
    });
    assert_eq!(told, ["+rpo"]);
    // Good, but never for as long as it takes.
    let told = played.told(1000, |played| {
        second += 1;
        played.well();
        played.facts.rpo_seconds = Some(if second % 8 == 0 { 61.0 } else { 1.0 });
    });
    assert_eq!(told, [""; 0]);
    played.facts.rpo_seconds = Some(1.0);
    assert_eq!(played.told(20, Played::well), ["-rpo"]);
}

#[test]
fn flows() {
    let mut played = Played::new(Role::Source);
    played.told(3, Played::well);
    assert_eq!(played.flow(), Flow::Idle, "it has never been seen to write");
    played.facts.writes = 1;
    played.told(2, Played::well);
    assert_eq!(played.flow(), Flow::Flowing);
    played.facts.data = Data::Lagging;
    played.told(1, Played::well);
    assert_eq!(played.flow(), Flow::Lagging);
    played.facts.data = Data::Protected;
    played.told(20, Played::well);
    assert_eq!(played.flow(), Flow::Idle);
}

#[test]
fn a_journal_that_fills_is_told_with_a_forecast() {
    let mut played = Played::new(Role::Source);
    let total = 4 << 30;
    played.facts.backlog = Some(Backlog { used: 1 << 20, total });
    played.told(60, Played::well);
    // 10 MB/s into 4 GiB: seven minutes.
    let fill = |played: &mut Played| {
        played.well();
        played.facts.backlog.as_mut().expect("set").used += 10 << 20;
    };
    assert_eq!(played.told(40, fill), [""; 0], "less than a tenth");
    assert_eq!(played.told(60, fill), ["+journal-filling"]);
    let alert = &played.watch.alerts("db")[0];
    assert!(alert.text.contains("24 % full, and full in less than 6 minutes"), "{alert:?}");
    // The link is back: it drains.
    let drain = |played: &mut Played| {
        played.well();
        let backlog = played.facts.backlog.as_mut().expect("set");
        backlog.used = backlog.used.saturating_sub(50 << 20);
    };
    assert_eq!(played.told(60, drain), ["-journal-filling"]);
    // Full is full, whatever the rate.
    played.facts.backlog = Some(Backlog { used: total, total });
    assert_eq!(played.told(60, Played::well), ["+journal-filling"]);
}

/// Half a ring in use, up and down with every burst, is what a busy group looks like.
#[test]
fn a_ring_that_is_emptied_again_and_again_is_not_filling() {
    let mut played = Played::new(Role::Source);
    let mut second = 0u64;
    let told = played.told(600, |played| {
        played.well();
        second += 1;
        played.facts.backlog = Some(Backlog { used: (second % 3) << 23, total: 64 << 20 });
    });
    assert_eq!(told, [""; 0]);
}

#[test]
fn a_gap_that_nobody_looked_at_is_told() {
    let mut played = Played::new(Role::Source);
    played.told(5, Played::well);
    played.facts.newest_gap = Some(("2026-11-20T14:00:00Z".into(), GapReason::FailedWrite));
    assert_eq!(played.told(1, Played::well), ["+gap"]);
    let alert = &played.watch.alerts("db")[0];
    assert!(alert.text.contains("was a gap") && alert.text.contains("its region was read again"), "{alert:?}");
    assert!(alert.next.contains("it is closed"), "{alert:?}");
    assert_eq!(played.told(10, Played::well), ["-gap"]);
    (played.facts.gap, played.facts.data) = (Some(GapReason::RingFull), Data::Resync);
    assert_eq!(played.told(10, Played::well), ["+gap"]);
    assert!(played.watch.alerts("db")[0].text.contains("are sent again"), "an open one");
    let told = played.told(300, Played::well);
    assert_eq!(told, ["+sync-stalled"], "nothing of it is sent");
    let mut done = 0;
    let told = played.told(300, |played| {
        played.well();
        done += 1;
        played.facts.resync = Some((done, 1000));
    });
    assert_eq!(told, ["-sync-stalled"]);
    (played.facts.gap, played.facts.data) = (Some(GapReason::InitialSync), Data::InitialSync);
    assert_eq!(played.told(10, |_| {}), ["-gap"], "the first sync is none");
}

/// A receiver calls the gap of a first sync by the mark that began it.
#[test]
fn the_first_sync_is_no_gap_whatever_it_is_called() {
    let mut played = Played::new(Role::Replica);
    (played.facts.gap, played.facts.data) = (Some(GapReason::NewRing), Data::InitialSync);
    assert_eq!(played.told(5, Played::well), [""; 0]);
    played.facts.newest_gap = Some(("2026-11-20T14:00:00Z".into(), GapReason::NewRing));
    (played.facts.gap, played.facts.data) = (None, Data::Protected);
    assert_eq!(played.told(20, Played::well), [""; 0]);
    played.facts.newest_gap = Some(("2026-11-20T15:00:00Z".into(), GapReason::NewRing));
    assert_eq!(played.told(20, Played::well), ["+gap", "-gap"]);
}

#[test]
fn what_a_receiver_says_of_its_storage() {
    type Change = fn(&mut Facts);
    let cases: [(AlertId, Change); 8] = [
        (AlertId::StorageFailed, |f| f.failure = Some(("replica 0 failed: EIO".into(), "look".into()))),
        (AlertId::HistoryDamaged, |f| f.damaged = 2),
        (AlertId::Held, |f| f.held = Some("yesterday".into())),
        (AlertId::DiskLow, |f| f.free = Some((1 << 30, 1 << 30))),
        (AlertId::WindowShort, |f| f.shortened = Some("shorter than retention says".into())),
        (AlertId::ReplicaDiffers, |f| f.differing = Some(65536)),
        (AlertId::NotVerified, |f| f.born_ns = Some(BORN_NS - 31 * 86_400_000_000_000)),
        (AlertId::Refused, |f| f.link = Link::Refused),
    ];
    for (id, change) in cases {
        let mut played = Played::new(Role::Replica);
        played.facts.free = Some((1 << 40, 1 << 30));
        assert_eq!(played.told(60, Played::well), [""; 0]);
        let well = played.facts.clone();
        change(&mut played.facts);
        assert_eq!(played.told(60, Played::well), [format!("+{}", id.word())]);
        assert!(!played.watch.alerts("db")[0].next.is_empty());
        played.facts = Facts { durable: played.facts.durable.clone(), ..well };
        assert_eq!(played.told(60, Played::well), [format!("-{}", id.word())]);
    }
}

#[test]
fn a_window_may_be_as_short_as_the_group_is_young() {
    let mut played = Played::new(Role::Replica);
    let day = 86_400_000_000_000;
    played.limits.window = Duration::from_secs(86_400);
    played.facts.window = Some((BORN_NS, BORN_NS + day / 2));
    played.now.wall_ns = BORN_NS + day / 2;
    assert_eq!(played.told(60, Played::well), [""; 0]);
    played.now.wall_ns = BORN_NS + 2 * day;
    assert_eq!(played.told(60, Played::well), ["+window-short"]);
    assert!(played.watch.alerts("db")[0].text.contains("of only 12 h can be recovered, 24 h are wanted"));
    played.facts.window = Some((BORN_NS + day / 2, BORN_NS + 2 * day));
    assert_eq!(played.told(60, Played::well), ["-window-short"]);
}

#[test]
fn clocks_that_jump_and_hosts_that_sleep() {
    let mut played = Played::new(Role::Source);
    played.limits.verify_age = Duration::ZERO;
    played.told(10, Played::well);
    // A night's sleep, a year forward, ten years back.
    for (steady, wall) in [(8 * 3600, 8 * 3600), (1, 31_536_000), (1, -315_360_000i64)] {
        played.now.steady_ns += steady * 1_000_000_000;
        played.now.wall_ns = played.now.wall_ns.saturating_add_signed(wall * 1_000_000_000);
        played.unacknowledged();
        assert_eq!(played.look(), [""; 0]);
        assert_eq!(played.told(10, Played::well), [""; 0]);
    }
    // A steady clock that is not.
    played.now.steady_ns = 0;
    assert_eq!(played.told(10, Played::well), [""; 0]);
}

#[test]
fn a_group_that_is_gone_leaves_no_alert() {
    let mut played = Played::new(Role::Source);
    played.facts.not_started = true;
    played.facts.reason = Some("not protected: /dev/vdb is not there".into());
    assert_eq!(played.told(10, |_| {}), ["+not-protected"]);
    let events = played.watch.look(&played.limits, played.now, &[]);
    assert_eq!(events.len(), 1);
    assert!(!events[0].raised && events[0].alert.text.contains("/dev/vdb is not there"), "{events:?}");
    assert_eq!((played.watch.alerts("db"), played.watch.status("db")), (vec![], None));
}

#[test]
fn words_are_stable_and_documented() {
    let text = include_str!("../../../docs/monitor.md");
    let words: HashSet<&str> = AlertId::ALL.iter().map(|id| id.word()).collect();
    assert_eq!(words.len(), AlertId::ALL.len());
    for id in AlertId::ALL {
        let row = format!("| `{}` | {} | {} |", id.word(), id.severity().word(), id.meaning());
        assert!(text.contains(&row), "docs/monitor.md has no row\n{row}");
    }
}

proptest! {
    /// Whatever happens: raised and cleared alternate for each alert, what stands was raised, and nothing panics.
    #[test]
    fn raised_and_cleared_alternate(
        looks in prop::collection::vec((any::<u16>(), 0u64..40, any::<u32>()), 1..300),
        replica in any::<bool>(),
    ) {
        let mut played = Played::new(if replica { Role::Replica } else { Role::Source });
        let mut standing = HashSet::new();
        for (bits, seconds, number) in looks {
            let bit = |n: u32| bits & (1 << n) != 0;
            if bit(0) { played.well() } else if bit(1) { played.unacknowledged() }
            let links = [Link::Streaming, Link::Disconnected, Link::Refused, Link::Handshaking];
            played.facts.link = links[usize::from(bits >> 2 & 3)];
            played.facts.gap = bit(4).then_some(GapReason::RingFull);
            played.facts.rpo_seconds = bit(5).then_some(f64::from(number));
            played.facts.backlog = bit(6).then_some(Backlog { used: u64::from(number) / 2, total: u64::from(number) });
            played.facts.not_started = bit(7) && bit(8);
            played.facts.free = bit(9).then_some((u64::from(number), 1 << 30));
            played.facts.differing = bit(10).then_some(u64::from(bit(11)));
            played.facts.window = bit(12).then_some((u64::from(number), u64::MAX));
            played.facts.held = bit(13).then(|| "then".to_owned());
            played.facts.failure = bit(14).then(|| ("a".into(), "b".into()));
            played.now.wall_ns = u64::from(number) << 31;
            for event in played.look_after(Duration::from_secs(seconds)) {
                let (sign, id) = event.split_at(1);
                prop_assert_eq!(standing.contains(id), sign == "-", "{}", event);
                if sign == "+" { standing.insert(id.to_owned()) } else { standing.remove(id) };
            }
            let alerts: HashSet<String> = played.watch.alerts("db").into_iter().map(|alert| alert.id).collect();
            prop_assert_eq!(&alerts, &standing);
        }
    }
}
