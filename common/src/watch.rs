//! The watch on itself: from what a daemon knows of its groups to alerts, each raised once and cleared once.
//!
//! A daemon calls [`Watch::look`] about once a second with the facts of all its groups. No clock and no I/O: the daemon logs
//! the events, shows the standing alerts and runs the hook.
//!
//! - Idle, lagging and stalled are three things ([`Flow`]). A canary record a second tells them apart: an idle group whose
//!   canaries are acknowledged is well, for months; one whose canaries are not is stalled, whether anybody writes or not.
//! - The receiver watches by itself: it needs nobody to tell it that nobody tells it anything.
//! - Nothing flaps: an alert is raised when its condition has held for [`AlertId::raise_after`], cleared when the opposite
//!   (which leaves room between the two) has held for [`AlertId::clear_after`].
//! - Time counts only while somebody looks ([`LOOK_GAP_MAX`]): a host that slept for a night has no night's silence to report,
//!   and a wall clock that jumps changes nothing but what is shown.

mod facts;
mod rules;
#[cfg(test)]
mod tests;

pub use facts::{Backlog, Facts};

use crate::control::{AlertStatus, WatchStatus, show_time};
use rules::{Memory, Verdict};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// Most time that counts between two looks.
pub const LOOK_GAP_MAX: Duration = Duration::from_secs(5);

/// What an operator chose; see docs/monitor.md. Zero: that alert is off.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// RPO beyond which [`AlertId::Rpo`] is raised.
    pub rpo: Duration,
    /// Longest time without anything newly acknowledged; never off.
    pub no_ack: Duration,
    /// [`AlertId::JournalFilling`] is raised if ring and journal will be full sooner.
    pub journal_full: Duration,
    /// The window should be at least this long (receiver).
    pub window: Duration,
    /// Longest time without a verify that found no difference (receiver).
    pub verify_age: Duration,
    /// `GROUP`, `GROUP/ID` or `*/ID`: alerts that nobody wants to hear of.
    pub mute: Vec<String>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            rpo: Duration::from_secs(60),
            no_ack: Duration::from_secs(30),
            journal_full: Duration::from_secs(600),
            window: Duration::ZERO,
            verify_age: Duration::from_secs(30 * 86_400),
            mute: Vec::new(),
        }
    }
}

impl Limits {
    fn mutes(&self, group: &str, id: AlertId) -> bool {
        self.mute.iter().any(|mute| match mute.split_once('/') {
            None => mute == group,
            Some((of, word)) => (of == "*" || of == group) && word == id.word(),
        })
    }
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Protection goes on; somebody should look in the next days.
    Warning,
    /// Protection has stopped, or is about to.
    Critical,
}

impl Severity {
    /// The word in JSON, logs and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

macro_rules! alerts {
    ($($(#[doc = $doc:literal])+ $name:ident, $word:literal, $severity:ident, $raise:literal, $clear:literal;)+) => {
        /// What an alert is about. The words are stable: scripts, metrics and hooks rely on them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum AlertId { $($(#[doc = $doc])+ $name,)+ }

        impl AlertId {
            /// All of them.
            pub const ALL: &[AlertId] = &[$(Self::$name,)+];

            /// The stable word.
            pub fn word(self) -> &'static str {
                match self { $(Self::$name => $word,)+ }
            }

            /// How bad it is.
            pub fn severity(self) -> Severity {
                match self { $(Self::$name => Severity::$severity,)+ }
            }

            /// How long the condition has to hold before it is raised.
            pub fn raise_after(self) -> Duration {
                match self { $(Self::$name => Duration::from_secs($raise),)+ }
            }

            /// How long the opposite has to hold before it is cleared.
            pub fn clear_after(self) -> Duration {
                match self { $(Self::$name => Duration::from_secs($clear),)+ }
            }

            /// What it means, in one line.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc,)+).trim_ascii(),)+ }
            }
        }
    };
}

// Name, word, severity, seconds that it has to hold before it is raised, and before it is cleared. docs/monitor.md has the
// same table; a test compares them.
alerts! {
    /// the group cannot be captured: nothing of it is protected
    NotProtected, "not-protected", Critical, 2, 2;
    /// the oldest captured write that is not durable is older than `alert_rpo_seconds`
    Rpo, "rpo", Critical, 2, 10;
    /// nothing was acknowledged for `alert_no_ack_seconds` although there is something to acknowledge
    NoAck, "no-ack", Critical, 0, 5;
    /// not even the agent's own canary was captured for `alert_no_ack_seconds`
    Stalled, "stalled", Critical, 0, 5;
    /// the other side refuses
    Refused, "refused", Critical, 5, 5;
    /// at this rate ring and journal are full in less than `alert_journal_minutes`, or they are nearly full
    JournalFilling, "journal-filling", Critical, 4, 15;
    /// nothing goes into the journal: only the ring bridges an outage
    JournalOff, "journal-off", Warning, 10, 10;
    /// a stretch of time cannot be recovered; what differs is sent by itself
    Gap, "gap", Warning, 0, 5;
    /// a sync makes no progress although the link is up
    SyncStalled, "sync-stalled", Critical, 0, 5;
    /// this host was fenced off by a promotion: nothing of what it writes is protected
    Fenced, "fenced", Critical, 2, 2;
    /// connected, and nothing comes, not even canaries, for `alert_no_ack_seconds`
    SourceSilent, "source-silent", Critical, 0, 5;
    /// no agent sends this group since `alert_no_ack_seconds`
    SourceGone, "source-gone", Critical, 0, 5;
    /// the receiver's storage failed, or the group cannot be opened
    StorageFailed, "storage-failed", Critical, 0, 10;
    /// what has landed is not getting into the replica
    ApplyStalled, "apply-stalled", Critical, 0, 10;
    /// the window is shorter than `alert_window_hours` or old points expire early
    WindowShort, "window-short", Warning, 10, 30;
    /// little space is left where the history is
    DiskLow, "disk-low", Warning, 5, 30;
    /// points of the past are lost by damage
    HistoryDamaged, "history-damaged", Critical, 0, 5;
    /// no verify has proved the replica equal for `alert_verify_days`
    NotVerified, "not-verified-for", Warning, 10, 2;
    /// the newest verify found a difference that nobody repaired
    ReplicaDiffers, "replica-differs", Critical, 0, 2;
    /// the replica was rolled back and replication waits
    Held, "held", Warning, 0, 2;
}

/// How a group's stream is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flow {
    /// Nobody writes, and canaries are acknowledged.
    Idle,
    /// Writes come, and are acknowledged in time.
    Flowing,
    /// Acknowledgements come, but late.
    Lagging,
    /// Nothing moves.
    Stalled,
}

impl Flow {
    /// All of them.
    pub const ALL: [Flow; 4] = [Self::Idle, Self::Flowing, Self::Lagging, Self::Stalled];

    /// The word in JSON and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Flowing => "flowing",
            Self::Lagging => "lagging",
            Self::Stalled => "stalled",
        }
    }
}

/// The clocks at a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// A clock that nobody sets, nanoseconds.
    pub steady_ns: u64,
    /// Nanoseconds since 1970.
    pub wall_ns: u64,
}

/// Something to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The group.
    pub group: String,
    /// Raised, or cleared.
    pub raised: bool,
    /// As it stands, stood.
    pub alert: AlertStatus,
    /// When it was raised or cleared, nanoseconds since 1970.
    pub at_ns: u64,
}

/// One condition of one group.
#[derive(Clone, Debug, Default)]
struct Standing {
    bad_since: Option<Duration>,
    good_since: Option<Duration>,
    alert: Option<AlertStatus>,
}

#[derive(Clone, Debug, Default)]
struct GroupWatch {
    memory: Memory,
    standings: BTreeMap<AlertId, Standing>,
    shown: Option<WatchStatus>,
}

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    groups: BTreeMap<String, GroupWatch>,
    /// Time that was watched.
    watched: Duration,
    last_steady_ns: Option<u64>,
}

impl Watch {
    /// Looks at all groups; gives what is to be told, in the order of groups and alerts.
    pub fn look(&mut self, limits: &Limits, now: Now, groups: &[Facts]) -> Vec<Event> {
        let passed = self.last_steady_ns.map_or(0, |last| now.steady_ns.saturating_sub(last));
        self.watched += Duration::from_nanos(passed).min(LOOK_GAP_MAX);
        self.last_steady_ns = Some(now.steady_ns);
        let mut events = self.forget_gone(now, groups);
        for facts in groups {
            let group = self.groups.entry(facts.group.clone()).or_default();
            group.look(limits, self.watched, now, facts, &mut events);
        }
        events
    }

    /// The alerts of a group that stand, the worst first.
    pub fn alerts(&self, group: &str) -> Vec<AlertStatus> {
        let standings = self.groups.get(group).into_iter().flat_map(|group| group.standings.values());
        let mut alerts: Vec<AlertStatus> = standings.filter_map(|standing| standing.alert.clone()).collect();
        alerts.sort_by_key(|alert| std::cmp::Reverse(alert.severity));
        alerts
    }

    /// What the watch sees of a group.
    pub fn status(&self, group: &str) -> Option<WatchStatus> {
        self.groups.get(group)?.shown.clone()
    }

    /// A group that is not protected any more has nothing to be told but that.
    fn forget_gone(&mut self, now: Now, groups: &[Facts]) -> Vec<Event> {
        let mut events = Vec::new();
        self.groups.retain(|name, group| {
            if groups.iter().any(|facts| facts.group == *name) {
                return true;
            }
            let alerts = group.standings.values_mut().filter_map(|standing| standing.alert.take());
            events.extend(alerts.map(|alert| Event { group: name.clone(), raised: false, alert, at_ns: now.wall_ns }));
            false
        });
        events
    }
}

impl GroupWatch {
    fn look(&mut self, limits: &Limits, watched: Duration, now: Now, facts: &Facts, events: &mut Vec<Event>) {
        let mut verdicts = rules::judge(&mut self.memory, limits, watched, now, facts);
        self.shown = Some(self.memory.status(limits, facts));
        for &id in AlertId::ALL {
            let verdict = verdicts.remove(&id).filter(|_| !limits.mutes(&facts.group, id)).unwrap_or(Verdict::Good);
            if matches!(verdict, Verdict::Good) && !self.standings.contains_key(&id) {
                continue;
            }
            let standing = self.standings.entry(id).or_default();
            let event = |raised, alert| Event { group: facts.group.clone(), raised, alert, at_ns: now.wall_ns };
            if let Some((raised, alert)) = standing.step(id, verdict, watched, now) {
                events.push(event(raised, alert));
            }
            if standing.alert.is_none() && standing.bad_since.is_none() {
                self.standings.remove(&id);
            }
        }
    }
}

impl Standing {
    /// Whether it was raised (`true`) or cleared, if either.
    fn step(&mut self, id: AlertId, verdict: Verdict, watched: Duration, now: Now) -> Option<(bool, AlertStatus)> {
        match verdict {
            Verdict::Bad { text, next } => {
                self.good_since = None;
                let since = *self.bad_since.get_or_insert(watched);
                if let Some(alert) = self.alert.as_mut() {
                    (alert.text, alert.next) = (text, next);
                    return None;
                }
                if watched - since < id.raise_after() {
                    return None;
                }
                let (id, severity) = (id.word().to_owned(), id.severity());
                let alert = AlertStatus { id, severity, text, since: show_time(now.wall_ns), next };
                self.alert = Some(alert.clone());
                Some((true, alert))
            }
            Verdict::Between => {
                self.good_since = None;
                None
            }
            Verdict::Good => {
                self.bad_since = None;
                self.alert.as_ref()?;
                let since = *self.good_since.get_or_insert(watched);
                if watched - since < id.clear_after() {
                    return None;
                }
                self.good_since = None;
                self.alert.take().map(|alert| (false, alert))
            }
        }
    }
}
