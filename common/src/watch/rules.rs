//! The conditions of all alerts.

use super::{AlertId, Backlog, Facts, Flow, Limits, Now};
use crate::control::{WatchStatus, show_time};
use crate::state::{Data, GapReason, Link, Role};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// What a sync may take for one step.
const SYNC_STILL_MAX: Duration = Duration::from_secs(120);
/// What the applier may take for one step.
const APPLY_STILL_MAX: Duration = Duration::from_secs(60);
/// Without a write for so long a group is idle.
const IDLE_AFTER: Duration = Duration::from_secs(10);
/// Ring and journal: the rate is that of so long.
const RATE_WINDOW: Duration = Duration::from_secs(20);
/// A rate from less time is none.
const RATE_WINDOW_MIN: Duration = Duration::from_secs(3);
/// Parts of ring and journal below which no forecast is made, above which none is needed, and below which it is over.
const FILL_FORECAST: f64 = 0.10;
const FILL_NEARLY_FULL: f64 = 0.90;
const FILL_OVER: f64 = 0.05;
/// An RPO below this part of its limit is good again.
const RPO_GOOD: f64 = 0.8;

/// What a look says of one condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It holds.
    Bad { text: String, next: String },
    /// Neither it nor its opposite.
    Between,
    /// The opposite holds.
    Good,
}

/// A value and since when it has been that.
#[derive(Clone, Debug, Default)]
struct Still<T> {
    value: T,
    since: Duration,
}

impl<T: PartialEq> Still<T> {
    /// How long it has not changed.
    fn see(this: &mut Option<Self>, value: T, watched: Duration) -> Duration {
        match this {
            Some(still) if still.value == value => {}
            _ => *this = Some(Self { value, since: watched }),
        }
        this.as_ref().map_or(Duration::ZERO, |still| watched - still.since)
    }
}

/// What is remembered of a group from look to look.
#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    captured: Option<Still<Option<String>>>,
    durable: Option<Still<Option<String>>>,
    applied: Option<Still<Option<String>>>,
    writes: Option<Still<u64>>,
    sync: Option<Still<Option<(u64, u64)>>>,
    backlog: VecDeque<(Duration, u64)>,
    link: Option<Still<Option<Link>>>,
    newest_gap: Option<Option<String>>,
    had_points: bool,
    quiet: Duration,
    without_writes: Duration,
    has_written: bool,
    full_in: Option<Duration>,
}

type Verdicts = BTreeMap<AlertId, Verdict>;

/// Judges every condition that applies; one that is missing does not hold.
pub(super) fn judge(memory: &mut Memory, limits: &Limits, watched: Duration, now: Now, facts: &Facts) -> Verdicts {
    let gap_passed = memory.see(watched, facts);
    let mut verdicts = Verdicts::new();
    if facts.not_started {
        let why = facts.reason.clone().unwrap_or_else(|| "see the log of varve-agent".to_owned());
        let next = format!("do what it says; 'varve status {}' shows it, it is tried again by itself", facts.group);
        verdicts.insert(AlertId::NotProtected, Verdict::Bad { text: why, next });
        return verdicts;
    }
    verdicts.insert(AlertId::Gap, gap(facts, gap_passed));
    match facts.role {
        Role::Source => source(memory, limits, watched, facts, &mut verdicts),
        Role::Replica => replica(memory, limits, watched, facts, &mut verdicts),
        Role::Fenced => {
            let text = "this host was fenced off by a promotion: what is written here is not protected".to_owned();
            let next = "stop writing here; 'varve status' on the recovery host, then 'varve failback'".to_owned();
            verdicts.insert(AlertId::Fenced, Verdict::Bad { text, next });
        }
        Role::Promoted => {}
    }
    if facts.role != Role::Source {
        history(limits, now, facts, &mut verdicts);
    }
    if matches!(facts.role, Role::Source | Role::Replica) {
        verdicts.insert(AlertId::Rpo, rpo(limits, facts));
        verdicts.insert(AlertId::Refused, refused(facts));
    }
    verdicts.insert(AlertId::ReplicaDiffers, differs(facts));
    verdicts
}

impl Memory {
    /// Takes in the facts; the reason of a gap that came and went since the last look.
    fn see(&mut self, watched: Duration, facts: &Facts) -> Option<GapReason> {
        self.quiet = Still::see(&mut self.durable, facts.durable.clone(), watched);
        let before = self.writes.as_ref().map(|still| still.value);
        self.without_writes = Still::see(&mut self.writes, facts.writes, watched);
        self.has_written |= before.is_some_and(|before| before != facts.writes);
        self.full_in = facts.backlog.and_then(|backlog| self.forecast(backlog, watched));
        let newest = facts.newest_gap.as_ref().map(|(from, _)| from.clone());
        let before = self.newest_gap.replace(newest.clone());
        let is_new = before.is_some_and(|before| before != newest);
        // What belongs to the first sync took no point away, whatever its reason is called.
        let had_points = std::mem::replace(&mut self.had_points, facts.data != Data::InitialSync);
        facts.newest_gap.as_ref().filter(|_| is_new && had_points).map(|(_, reason)| *reason)
    }

    /// When ring and journal are full, at the rate of the last seconds.
    fn forecast(&mut self, backlog: Backlog, watched: Duration) -> Option<Duration> {
        self.backlog.push_back((watched, backlog.used));
        while self.backlog.front().is_some_and(|(at, _)| watched - *at > RATE_WINDOW) {
            self.backlog.pop_front();
        }
        let (at, used) = *self.backlog.front()?;
        let passed = watched - at;
        if passed < RATE_WINDOW_MIN || backlog.used <= used {
            return None;
        }
        let rate = (backlog.used - used) as f64 / passed.as_secs_f64();
        // Bounded: a rate of a byte a day would be more than a Duration can hold.
        Some(Duration::from_secs_f64((backlog.total.saturating_sub(backlog.used) as f64 / rate).min(1e9)))
    }

    /// For the status.
    pub(super) fn status(&self, limits: &Limits, facts: &Facts) -> WatchStatus {
        let idle = !self.has_written || self.without_writes >= IDLE_AFTER;
        // What runs at the recovery host has no canaries.
        let stalled = self.quiet > limits.no_ack && facts.role != Role::Promoted;
        let flow = if facts.not_started || stalled {
            Flow::Stalled
        } else if facts.data == Data::Lagging {
            Flow::Lagging
        } else if idle {
            Flow::Idle
        } else {
            Flow::Flowing
        };
        WatchStatus {
            flow,
            last_ack_seconds: self.quiet.as_secs_f64(),
            full_in_seconds: self.full_in.map(|full_in| full_in.as_secs_f64()),
            free_bytes: facts.free.map(|(free, _)| free),
            verified: facts.verified_ns.map(show_time),
        }
    }
}

/// What only an agent can see.
fn source(memory: &mut Memory, limits: &Limits, watched: Duration, facts: &Facts, verdicts: &mut Verdicts) {
    let name = &facts.group;
    let capture_still = Still::see(&mut memory.captured, facts.captured.clone(), watched);
    let waits = facts.captured != facts.durable;
    let quiet = memory.quiet;
    let no_ack = if quiet > limits.no_ack && waits && facts.link != Link::Refused {
        let link = match facts.link {
            Link::Streaming => "although the link is up".to_owned(),
            _ => facts.reason.clone().unwrap_or_else(|| "there is no link to the receiver".to_owned()),
        };
        Verdict::Bad {
            text: format!("the receiver has acknowledged nothing for {}: {link}", words(quiet)),
            next: format!("'varve status {name}' on the recovery host; 'varve doctor' on both"),
        }
    } else {
        good_if(quiet < limits.no_ack / 2)
    };
    verdicts.insert(AlertId::NoAck, no_ack);
    let stalled = if capture_still > limits.no_ack && !waits {
        Verdict::Bad {
            text: format!("nothing was captured for {}, not even the agent's own canary", words(capture_still)),
            next: "restart varve-agent; send its log and the output of 'varve doctor'".to_owned(),
        }
    } else {
        good_if(capture_still < limits.no_ack / 2 || waits)
    };
    verdicts.insert(AlertId::Stalled, stalled);
    verdicts.insert(AlertId::JournalFilling, filling(memory, limits, facts));
    if let Some(error) = &facts.journal_error {
        let text = format!("nothing goes into the journal: {error}");
        let next =
            "make room or mend the disk below /var/lib/varve/agent; without it an outage ends in a gap".to_owned();
        verdicts.insert(AlertId::JournalOff, Verdict::Bad { text, next });
    }
    let still = Still::see(&mut memory.sync, facts.resync, watched);
    let syncing = facts.gap.is_some() && facts.link == Link::Streaming;
    if !syncing {
        memory.sync = None;
    } else if still > SYNC_STILL_MAX {
        let text = format!("the sync has made no progress for {}", words(still));
        let text = facts.reason.as_ref().map_or(text.clone(), |reason| format!("{text}: {reason}"));
        let next = format!("'varve status {name}'; the kernel's log: does the volume answer?");
        verdicts.insert(AlertId::SyncStalled, Verdict::Bad { text, next });
    }
}

fn filling(memory: &Memory, limits: &Limits, facts: &Facts) -> Verdict {
    let Some(backlog) = facts.backlog.filter(|backlog| backlog.total > 0 && !limits.journal_full.is_zero()) else {
        return Verdict::Good;
    };
    let fill = backlog.used as f64 / backlog.total as f64;
    let soon = memory.full_in.is_some_and(|full_in| full_in < limits.journal_full);
    let far = memory.full_in.is_none_or(|full_in| full_in > limits.journal_full * 2);
    if fill >= FILL_NEARLY_FULL || (fill >= FILL_FORECAST && soon) {
        let part = (fill * 100.0).floor();
        let text = match memory.full_in {
            Some(full_in) => {
                format!("ring and journal are {part} % full, and full in less than {}", words_up(full_in))
            }
            None => format!("ring and journal are {part} % full"),
        };
        let next =
            "mend the link or the recovery host; when they are full a gap begins. 'journal_max_mib' in agent.toml";
        return Verdict::Bad { text, next: next.to_owned() };
    }
    good_if(fill < FILL_OVER || (far && fill < FILL_NEARLY_FULL * 0.9))
}

/// What a receiver sees of its source.
fn replica(memory: &mut Memory, limits: &Limits, watched: Duration, facts: &Facts, verdicts: &mut Verdicts) {
    let name = &facts.group;
    let newest = facts.window.map_or_else(
        || "nothing can be recovered yet".to_owned(),
        |(_, to)| format!("the newest point is of {}", show_time(to)),
    );
    let (quiet, connected) = (memory.quiet, Still::see(&mut memory.link, Some(facts.link), watched));
    let (mut silent, mut gone) = (good_if(quiet < limits.no_ack / 2), good_if(quiet < limits.no_ack / 2));
    if facts.held.is_some() {
        (silent, gone) = (Verdict::Good, Verdict::Good);
    } else if facts.link == Link::Streaming {
        gone = Verdict::Good;
        // One that has just come back is given its time.
        if quiet.min(connected) > limits.no_ack {
            let text = format!("the agent is connected and has sent nothing for {}; {newest}", words(quiet));
            let next = format!("'varve status {name}' and the log of varve-agent on the production host");
            silent = Verdict::Bad { text, next };
        }
    } else {
        silent = Verdict::Good;
        if quiet > limits.no_ack && facts.link != Link::Refused {
            let text = format!("nobody has sent this group for {}; {newest}", words(quiet));
            let next = format!(
                "start varve-agent on the production host, or look at its network; if '{name}' is to be protected no more: \
                 alert_mute in receiver.toml, or 'varve forget {name}'"
            );
            gone = Verdict::Bad { text, next };
        }
    }
    verdicts.insert(AlertId::SourceSilent, silent);
    verdicts.insert(AlertId::SourceGone, gone);
    let still = Still::see(&mut memory.applied, facts.applied.clone(), watched);
    let waits = facts.applied != facts.durable && facts.held.is_none();
    if !waits {
        memory.applied = None;
    } else if still > APPLY_STILL_MAX {
        let text = format!("what has landed has not been getting into the replica for {}", words(still));
        let next = "the kernel's log and the receiver's: does the replica's disk answer?".to_owned();
        verdicts.insert(AlertId::ApplyStalled, Verdict::Bad { text, next });
    }
}

/// What a receiver sees of its own storage.
fn history(limits: &Limits, now: Now, facts: &Facts, verdicts: &mut Verdicts) {
    let name = &facts.group;
    let mut bad = |id, text: String, next: String| drop(verdicts.insert(id, Verdict::Bad { text, next }));
    if let Some((text, next)) = &facts.failure {
        bad(AlertId::StorageFailed, text.clone(), next.clone());
    }
    if facts.damaged > 0 {
        let text = format!("history is damaged in {} stretches: their points are lost", facts.damaged);
        let next = format!("'varve points {name}' shows which; 'varve scrub {name}', and look after the disk");
        bad(AlertId::HistoryDamaged, text, next);
    }
    if let Some(to) = &facts.held {
        let text = format!("the replica was rolled back to {to}, and replication waits");
        bad(AlertId::Held, text, format!("'varve rollback {name} --release' lets it go on"));
    }
    let age = |since: u64| Duration::from_nanos(now.wall_ns.saturating_sub(since));
    let proved = facts.verified_ns.or(facts.born_ns).filter(|_| facts.is_replica() && !limits.verify_age.is_zero());
    if let Some(since) = proved.filter(|since| age(*since) > limits.verify_age) {
        let ever = if facts.verified_ns.is_some() { "since" } else { "ever; the group is of" };
        let text = format!("no verify has proved the replica equal {ever} {}", show_time(since));
        bad(AlertId::NotVerified, text, format!("'varve verify {name}'"));
    }
    let window = window_short(limits, age, facts);
    verdicts.insert(AlertId::WindowShort, window);
    verdicts.insert(AlertId::DiskLow, disk_low(facts));
}

fn window_short(limits: &Limits, age: impl Fn(u64) -> Duration, facts: &Facts) -> Verdict {
    let next = format!("'varve retention {}'; more space for the history", facts.group);
    if let Some(why) = &facts.shortened {
        return Verdict::Bad { text: why.clone(), next };
    }
    if limits.window.is_zero() {
        return Verdict::Good;
    }
    let (Some((from, to)), Some(born_ns)) = (facts.window, facts.born_ns) else { return Verdict::Between };
    let window = Duration::from_nanos(to.saturating_sub(from));
    // A young group cannot have more than its age.
    if window >= limits.window || age(born_ns) < limits.window + limits.window / 20 {
        return Verdict::Good;
    }
    if window > limits.window.mul_f64(0.98) {
        return Verdict::Between;
    }
    let text = format!("points of only {} can be recovered, {} are wanted", words(window), words(limits.window));
    Verdict::Bad { text, next }
}

fn disk_low(facts: &Facts) -> Verdict {
    let Some((free, floor)) = facts.free else { return Verdict::Between };
    if free >= floor.saturating_mul(2) {
        return good_if(free >= floor.saturating_mul(2) + floor / 5);
    }
    let text =
        format!("{} MiB are free where the history is; below {} MiB old points expire early", free >> 20, floor >> 20);
    let next = format!("make room or add space; 'varve retention {}' lets old points go", facts.group);
    Verdict::Bad { text, next }
}

fn rpo(limits: &Limits, facts: &Facts) -> Verdict {
    let Some(rpo) = facts.rpo_seconds.filter(|_| !limits.rpo.is_zero()) else {
        // It is not known while a gap from before this process is open, or while the source is silent.
        return if facts.gap.is_some() || facts.is_replica() { Verdict::Between } else { Verdict::Good };
    };
    let limit = limits.rpo.as_secs_f64();
    if rpo > limit {
        let (is, may) = (words(Duration::from_secs_f64(rpo.min(1e9))), words(limits.rpo));
        let text = format!("a failure now would lose the writes of {is}; the limit is {may}");
        let next = "is the link or the receiver's disk slower than the writes? 'varve doctor' on both sides".to_owned();
        return Verdict::Bad { text, next };
    }
    good_if(rpo < limit * RPO_GOOD)
}

fn refused(facts: &Facts) -> Verdict {
    match facts.link {
        Link::Refused if facts.held.is_some() => Verdict::Good,
        Link::Refused => {
            let text = facts.reason.clone().unwrap_or_else(|| "without a reason".to_owned());
            let next = "do what the reason says; it is tried again by itself".to_owned();
            Verdict::Bad { text, next }
        }
        Link::Handshaking => Verdict::Between,
        Link::Streaming | Link::Disconnected => Verdict::Good,
    }
}

fn gap(facts: &Facts, passed: Option<GapReason>) -> Verdict {
    let open = facts.gap.filter(|reason| *reason != GapReason::InitialSync && facts.data != Data::InitialSync);
    let Some(reason) = open else {
        return passed.map_or(Verdict::Good, |reason| Verdict::Bad {
            text: format!("there was a gap, in which no point can be recovered: {}", reason.explain_closed()),
            next: "nothing: it is closed, the points before and after it can be had".to_owned(),
        });
    };
    let text = format!("points cannot be recovered from a gap on: {}", reason.explain());
    let next = match reason {
        GapReason::VolumeChanged => {
            format!(
                "nothing if it grew: what is new is sent by itself. If it shrank, 'varve status {}' says more",
                facts.group
            )
        }
        _ => "nothing: what differs is sent by itself, and the last good point before stays".to_owned(),
    };
    Verdict::Bad { text, next }
}

fn differs(facts: &Facts) -> Verdict {
    match facts.differing {
        Some(0) => Verdict::Good,
        None => Verdict::Between,
        Some(bytes) => Verdict::Bad {
            text: format!("the newest verify found {bytes} bytes different"),
            next: format!("'varve verify {} --repair'", facts.group),
        },
    }
}

fn good_if(good: bool) -> Verdict {
    if good { Verdict::Good } else { Verdict::Between }
}

/// `40 s`, `3 min`, `5 h`, `2 d`: rounded down.
pub(super) fn words(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// In minutes, rounded up.
fn words_up(time: Duration) -> String {
    let minutes = time.as_secs() / 60 + 1;
    if minutes == 1 { "1 minute".to_owned() } else { format!("{minutes} minutes") }
}
