//! What `varve status` shows.

use crate::state::{Data, GapReason, Link, Role};
use crate::watch::{Flow, Severity};
use crate::wire::messages::Verify;
use serde::{Deserialize, Serialize};

/// `varve status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StatusReply {
    /// In the order of their names.
    pub groups: Vec<GroupStatus>,
    /// The daemons that answered.
    pub daemons: Vec<DaemonStatus>,
}

/// A daemon as `varve status` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// `agent` or `receiver`.
    pub daemon: String,
    /// Its version.
    pub version: String,
    /// Agent: the receiver's address. Receiver: where it listens.
    pub address: Option<String>,
    /// This host's name as the other side knows it.
    pub name: Option<String>,
    /// Resident memory of its own: without shared pages, so without the rings.
    pub rss_bytes: u64,
    /// Connected hosts (receiver).
    pub hosts_connected: Option<u64>,
}

/// A group as `varve status` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Its name.
    pub name: String,
    /// The axis of authority.
    pub role: Role,
    /// The axis of the connection.
    pub link: Link,
    /// The axis of the replica's worth.
    pub data: Data,
    /// In words: why the link is refused, why there is a gap; `None` if there is nothing to say.
    pub reason: Option<String>,
    /// The open gap's reason.
    pub gap_reason: Option<GapReason>,
    /// Fencing token.
    pub epoch: u64,
    /// Age of the oldest captured write that is not durable at the receiver; 0 if there is none; `None` if not known.
    pub rpo_seconds: Option<f64>,
    /// Bytes captured and not durable at the receiver.
    pub lag_bytes: u64,
    /// Newest captured position, `incarnation:offset`.
    pub captured: Option<String>,
    /// Newest durable position.
    pub durable: Option<String>,
    /// Newest position that is in the replica.
    pub applied: Option<String>,
    /// Times between which points can be recovered (RFC 3339).
    pub window: Window,
    /// Gaps that were seen (the newest ones).
    pub gaps: Vec<GapStatus>,
    /// In the order of their numbers.
    pub volumes: Vec<VolumeStatus>,
    /// A running sync.
    pub resync: Option<ResyncStatus>,
    /// The newest verify.
    pub verify: Option<Verify>,
    /// Bytes of the ring in use and in all (agent).
    pub ring: Option<RingStatus>,
    /// The journal (agent, if it has one).
    #[serde(default)]
    pub journal: Option<JournalStatus>,
    /// The history (receiver).
    #[serde(default)]
    pub history: Option<HistoryStatus>,
    /// What is wrong, the worst first.
    #[serde(default)]
    pub alerts: Vec<AlertStatus>,
    /// What the watch sees; `None` until it has looked.
    #[serde(default)]
    pub watch: Option<WatchStatus>,
    /// Who may write, when that is not simply the source; `None`: it is.
    #[serde(default)]
    pub authority: Option<AuthorityStatus>,
    /// The drills of its takeover plan on this host; `None`: there were none (receiver).
    #[serde(default)]
    pub drill: Option<DrillStatus>,
    /// Counters since the daemon started, by name (docs/json.md).
    pub counters: std::collections::BTreeMap<String, u64>,
}

/// See [`GroupStatus::authority`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityStatus {
    /// What runs where, in words.
    pub text: String,
    /// Since when (RFC 3339).
    pub since: Option<String>,
    /// Bytes of the stream that were written at the recovery host since it was taken over: they are not home.
    pub not_home_bytes: Option<u64>,
    /// The volumes are quiet for a planned switch-over: `read-only`, `claimed`, or `not-held`.
    pub quiet: Option<String>,
    /// Whether this side does not know who is right.
    pub unsure: bool,
    /// The next sensible command.
    pub next: String,
}

/// See [`GroupStatus::drill`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrillStatus {
    /// When the last one began (RFC 3339).
    pub began: String,
    /// Every step of it was done.
    pub good: bool,
    /// Drills that were run.
    pub runs: u64,
    /// Drills that failed.
    pub failures: u64,
    /// The last one with every step done and at least one check good.
    pub verified: Option<DrillVerified>,
}

/// See [`DrillStatus::verified`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrillVerified {
    /// When it began (RFC 3339).
    pub at: String,
    /// Time of the point that came up (RFC 3339).
    pub point: String,
    /// Measured: from the begin until every step was done.
    pub rto_seconds: f64,
}

/// See [`GroupStatus::alerts`]. docs/monitor.md lists the ids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlertStatus {
    /// A stable word; newer daemons may have new ones.
    pub id: String,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong, as of now.
    pub text: String,
    /// When it was raised (RFC 3339).
    pub since: String,
    /// What to do next.
    pub next: String,
}

/// See [`GroupStatus::watch`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WatchStatus {
    /// Idle, flowing, lagging or stalled.
    pub flow: Flow,
    /// Since something was newly acknowledged (agent) or landed (receiver), or since the daemon started.
    pub last_ack_seconds: f64,
    /// When ring and journal are full at the rate of the last seconds; `None`: never (agent).
    pub full_in_seconds: Option<f64>,
    /// Free bytes where the history is (receiver).
    pub free_bytes: Option<u64>,
    /// When a verify last proved volume and replica equal (receiver).
    pub verified: Option<String>,
}

/// See [`GroupStatus::window`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Oldest point.
    pub from: Option<String>,
    /// Newest point.
    pub to: Option<String>,
}

/// See [`GroupStatus::gaps`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GapStatus {
    /// When it began (RFC 3339).
    pub from: String,
    /// When it ended; `None`: it is open.
    pub to: Option<String>,
    /// Why.
    pub reason: GapReason,
}

/// See [`GroupStatus::volumes`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Path at the source.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// Where the replica is, once that is known.
    pub replica: Option<String>,
}

/// See [`GroupStatus::resync`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncStatus {
    /// Bytes compared or sent.
    pub done_bytes: u64,
    /// Bytes that the sync covers.
    pub total_bytes: u64,
}

/// See [`GroupStatus::ring`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingStatus {
    /// Bytes not yet released.
    pub used_bytes: u64,
    /// Its size.
    pub total_bytes: u64,
    /// Whether capture goes on while the agent is stopped, killed or exchanged.
    #[serde(default)]
    pub pinned: bool,
    /// Whether the ring is new or was taken over from an agent before, and why it could not be, in words.
    #[serde(default)]
    pub origin: String,
}

/// See [`GroupStatus::journal`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalStatus {
    /// Bytes of the stream in it that are not durable at the receiver.
    pub used_bytes: u64,
    /// Most bytes that it may take on disk.
    pub total_bytes: u64,
    /// Why nothing goes into it, if it was given up or has no room.
    pub error: Option<String>,
}

/// See [`GroupStatus::history`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HistoryStatus {
    /// Layers, the open one included.
    pub layers: u64,
    /// Bytes on disk: layers, their indexes, the chronicle.
    pub bytes: u64,
    /// Before-images.
    pub records: u64,
    /// Open views.
    pub views: u64,
    /// Bookmarks, and those of them that are kept.
    pub bookmarks: u64,
    /// See `bookmarks`.
    pub kept: u64,
    /// Part of the bytes to be replaced that did not have to be read first, 0 to 1; `None`: nothing was replaced yet.
    pub avoided_reads: Option<f64>,
    /// Stretches of points that damage took away.
    pub damaged: u64,
    /// Limits that were set: age and bytes.
    pub retention: Retention,
    /// What runs here.
    #[serde(default)]
    pub takeover: Option<TakeoverStatus>,
    /// Something to say: why old points expire early, why nothing is taken in.
    pub notice: Option<String>,
}

/// How long history is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retention {
    /// Points may expire when they are older; `None`: whatever their age.
    pub age_seconds: Option<u64>,
    /// The oldest points expire when history has more bytes; `None`: whatever its size.
    pub bytes: Option<u64>,
}

/// A takeover as `varve status` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TakeoverStatus {
    /// When it was done.
    pub since: String,
    /// Time of the point that was taken.
    pub point: String,
    /// No way back but failback.
    pub committed: bool,
    /// Nothing but a test.
    pub test: bool,
    /// When it goes back by itself unless it is committed; `None`: never.
    #[serde(default)]
    pub abort_at: Option<String>,
    /// It is being undone, or that ended with an error.
    #[serde(default)]
    pub aborting: bool,
    /// The block devices.
    pub devices: Vec<String>,
    /// It is to come home.
    #[serde(default)]
    pub failback: Option<FailbackStatus>,
    /// The next sensible command.
    pub next: String,
}

/// See [`TakeoverStatus::failback`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailbackStatus {
    /// The host that it is brought to.
    pub host: String,
    /// When that was asked for.
    pub since: String,
    /// `waiting` for the host, `blocked` there, `comparing`, `following`, `cutting-over`.
    pub phase: String,
    /// The number of the pass.
    pub pass: u32,
    /// Bytes compared in it.
    pub done_bytes: u64,
    /// Bytes to compare in it.
    pub total_bytes: u64,
    /// Bytes sent since the host is connected.
    pub sent_bytes: u64,
    /// The longest that a write waits for being sent; `None`: the first pass is not over.
    pub lag_seconds: Option<f64>,
    /// What is in the way at the host.
    pub problem: Option<String>,
    /// The next sensible command.
    pub next: String,
}
