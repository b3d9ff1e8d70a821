//! What a daemon knows of a group at a look.

use crate::control::GroupStatus;
use crate::state::{Data, GapReason, Link, Role};

/// What waits for the receiver: ring and journal together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backlog {
    /// Bytes in use.
    pub used: u64,
    /// Bytes in all.
    pub total: u64,
}

/// See the module's text. Most of it comes from the group's status; the rest only one of the daemons knows.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The group's name.
    pub group: String,
    /// The axis of authority.
    pub role: Role,
    /// The axis of the connection.
    pub link: Link,
    /// The axis of the replica's worth.
    pub data: Data,
    /// As the status shows it.
    pub reason: Option<String>,
    /// The open gap.
    pub gap: Option<GapReason>,
    /// Begin and reason of the newest gap but the first sync, open or not.
    pub newest_gap: Option<(String, GapReason)>,
    /// See [`GroupStatus::rpo_seconds`].
    pub rpo_seconds: Option<f64>,
    /// Newest captured position.
    pub captured: Option<String>,
    /// Newest durable position.
    pub durable: Option<String>,
    /// Newest position in the replica.
    pub applied: Option<String>,
    /// Rises with every write that a writer caused.
    pub writes: u64,
    /// Done and total bytes of a running sync.
    pub resync: Option<(u64, u64)>,
    /// Ring and journal (agent).
    pub backlog: Option<Backlog>,
    /// Why nothing goes into the journal (agent).
    pub journal_error: Option<String>,
    /// Oldest and newest point, nanoseconds since 1970.
    pub window: Option<(u64, u64)>,
    /// Stretches of points that damage took away (receiver).
    pub damaged: u64,
    /// The newest verify that finished found so many bytes different and did not repair them; `None`: there is none, or
    /// one runs.
    pub differing: Option<u64>,
    /// The group could not be started (agent).
    pub not_started: bool,
    /// Free bytes where the history is, and how many are kept free (receiver).
    pub free: Option<(u64, u64)>,
    /// Why old points expire early (receiver).
    pub shortened: Option<String>,
    /// The replica was rolled back and replication waits: to when (receiver).
    pub held: Option<String>,
    /// What failed in the receiver's storage, and what to do.
    pub failure: Option<(String, String)>,
    /// When the group was made, nanoseconds since 1970 (receiver).
    pub born_ns: Option<u64>,
    /// When a verify last proved volume and replica equal (receiver).
    pub verified_ns: Option<u64>,
}

impl Facts {
    /// What the status says; the rest is as if all were well.
    pub fn of(status: &GroupStatus) -> Self {
        let known = |name: &str| status.counters.get(name).copied();
        let ring = status.ring.as_ref().map(|ring| Backlog { used: ring.used_bytes, total: ring.total_bytes });
        let journal = status.journal.as_ref();
        let newest_gap = status.gaps.iter().rev().find(|gap| gap.reason != GapReason::InitialSync);
        let verify = status.verify.as_ref().filter(|verify| verify.finished && verify.error.is_none());
        Self {
            group: status.name.clone(),
            role: status.role,
            link: status.link,
            data: status.data,
            reason: status.reason.clone(),
            gap: status.gap_reason.filter(|_| !status.data.is_consistent()),
            newest_gap: newest_gap.map(|gap| (gap.from.clone(), gap.reason)),
            rpo_seconds: status.rpo_seconds,
            captured: status.captured.clone(),
            durable: status.durable.clone(),
            applied: status.applied.clone(),
            writes: known("captured_records").or(known("applied_records")).unwrap_or(0),
            resync: status.resync.as_ref().map(|sync| (sync.done_bytes, sync.total_bytes)),
            backlog: ring.map(|ring| {
                let journal = journal.filter(|journal| journal.error.is_none() || journal.used_bytes > 0);
                let (used, total) = journal.map_or((0, 0), |journal| match journal.error {
                    // What is in it stays in it, nothing more goes in.
                    Some(_) => (journal.used_bytes, journal.used_bytes),
                    None => (journal.used_bytes, journal.total_bytes.max(journal.used_bytes)),
                });
                Backlog { used: ring.used + used, total: ring.total + total }
            }),
            journal_error: journal.and_then(|journal| journal.error.clone()),
            window: time_ns(status.window.from.as_deref()).zip(time_ns(status.window.to.as_deref())),
            damaged: status.history.as_ref().map_or(0, |history| history.damaged),
            differing: verify.map(|verify| if verify.repair { 0 } else { verify.differing_bytes }),
            not_started: false,
            free: None,
            shortened: None,
            held: None,
            failure: None,
            born_ns: None,
            verified_ns: None,
        }
    }

    /// Whether this side takes in what another one writes.
    pub(super) fn is_replica(&self) -> bool {
        self.role == Role::Replica
    }
}

fn time_ns(text: Option<&str>) -> Option<u64> {
    let time: jiff::Timestamp = text?.parse().ok()?;
    u64::try_from(time.as_nanosecond()).ok()
}
