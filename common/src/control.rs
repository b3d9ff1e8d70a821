//! The words between `varve` and the daemons: one JSON object per line over a Unix socket. A request is one line; the
//! answer is any number of [`Reply::Progress`] lines and one [`Reply::Done`] or [`Reply::Problem`].
//!
//! The structs below `StatusReply` are also what `varve --json` prints (docs/json.md): fields are only ever added.

use crate::point::{Consistency, PointSpec};
use crate::problem::Problem;
use crate::state::{Data, GapReason, Link, Role};
use crate::watch::{Flow, Severity};
use crate::wire::messages::Verify;
use serde::{Deserialize, Serialize};

/// What `varve` asks an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum AgentRequest {
    /// All groups, or one. Answer: [`StatusReply`].
    Status {
        /// Only this one.
        group: Option<String>,
    },
    /// The identity or configuration changed on disk (after `varve join`). Answer: nothing.
    Reload,
    /// Protect volumes as a group. Answer: [`ProtectReply`].
    Protect {
        /// The group's name.
        group: String,
        /// Paths of the volumes, as given.
        volumes: Vec<String>,
        /// Replica paths at the receiver, none or one per volume.
        replicas: Vec<String>,
        /// Only check, change nothing.
        dry_run: bool,
    },
    /// Take a group that runs at the receiver, which named this host for it: what the volumes hold is overwritten.
    /// Answer: [`ProtectReply`].
    ComeHome {
        /// The group's name.
        group: String,
        /// Paths of the volumes, as given.
        volumes: Vec<String>,
    },
    /// End the quiet of a planned switch-over by hand: the volumes may be written again. Answer: nothing.
    Resume {
        /// The group's name.
        group: String,
        /// Although it may run, or does run, on the recovery host.
        force: bool,
    },
    /// Stop protecting a group. The receiver keeps what it has. Answer: nothing.
    Unprotect {
        /// The group's name.
        group: String,
    },
    /// Set a bookmark. Answer: [`BookmarkReply`].
    Bookmark {
        /// The group's name.
        group: String,
        /// The bookmark's name.
        name: String,
    },
    /// Compare volume and replica. Answers: [`Reply::Progress`] and at last [`VerifyReply`].
    Verify {
        /// The group's name.
        group: String,
        /// Send what differs.
        repair: bool,
    },
}

/// What `varve` asks a receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum ReceiverRequest {
    /// All groups, or one. Answer: [`StatusReply`].
    Status {
        /// Only this one.
        group: Option<String>,
    },
    /// Make a join token. Answer: [`InviteReply`].
    Invite {
        /// The host's name.
        name: String,
        /// How long the token is good.
        ttl_seconds: u64,
    },
    /// All hosts and open invitations. Answer: [`HostsReply`].
    Hosts,
    /// Refuse a host from now on. Answer: nothing.
    Revoke {
        /// The host's name.
        name: String,
    },
    /// As [`AgentRequest::Verify`]: the agent of the group is asked.
    Verify {
        /// The group's name.
        group: String,
        /// Send what differs.
        repair: bool,
    },
    /// Forget a group that is no longer protected. Answer: nothing.
    Forget {
        /// The group's name.
        group: String,
    },
    /// What can be recovered. Answer: [`PointsReply`].
    Points {
        /// The group's name.
        group: String,
        /// Only what is not older, nanoseconds since 1970.
        from_ns: Option<u64>,
        /// Only what is not younger.
        to_ns: Option<u64>,
    },
    /// Open every volume of a group at a point. Answer: [`ViewReply`].
    ViewOpen {
        /// The group's name.
        group: String,
        /// Which point.
        at: PointSpec,
        /// Writes are taken, and gone when the view is closed.
        writable: bool,
        /// How it is served.
        export: ExportKind,
        /// Address and port for NBD over TCP with TLS; `None`: a Unix socket.
        listen: Option<String>,
    },
    /// The open views. Answer: [`ViewsReply`].
    ViewList,
    /// Close a view. Answer: nothing. Refused while a device of it is in use.
    ViewClose {
        /// Its number.
        id: u64,
        /// Even then.
        #[serde(default)]
        force: bool,
    },
    /// Make the replica what it was. Answers: [`Reply::Progress`] and at last [`RollbackReply`].
    Rollback {
        /// The group's name.
        group: String,
        /// Which point.
        at: PointSpec,
        /// Only find out what differs.
        dry_run: bool,
    },
    /// Let replication go on after a rollback. Answer: nothing.
    RollbackRelease {
        /// The group's name.
        group: String,
    },
    /// Write one volume as it was to a file or device. Answers: [`Reply::Progress`] and at last [`RestoreReply`].
    Restore {
        /// The group's name.
        group: String,
        /// Which point.
        at: PointSpec,
        /// The volume: its path at the source, or its number in the group.
        volume: String,
        /// Where to; an absolute path.
        to: String,
        /// Only check.
        dry_run: bool,
        /// Over what is there.
        force: bool,
    },
    /// Set what is given, tell what holds. Answer: [`RetentionReply`].
    Retention {
        /// The group's name.
        group: String,
        /// Points may expire when they are older; 0: whatever their age.
        age_seconds: Option<u64>,
        /// The oldest points expire when history has more bytes; 0: whatever its size.
        bytes: Option<u64>,
        /// Only find out what would expire.
        #[serde(default)]
        dry_run: bool,
    },
    /// Read all of a group's history and check it. Answers: [`Reply::Progress`] and at last [`ScrubReply`].
    Scrub {
        /// The group's name.
        group: String,
        /// At most; `None`: the configured rate.
        bytes_per_second: Option<u64>,
    },
    /// Run the group here. Answer: [`FailoverReply`].
    Failover {
        /// The group's name.
        group: String,
        /// Which point.
        at: PointSpec,
        /// Beside the replication, which goes on: what is written is gone with the test.
        test: bool,
        /// Only tell what would happen.
        dry_run: bool,
        /// Only if nothing is lost: the source is made quiet first.
        #[serde(default)]
        planned: Option<PlannedWish>,
    },
    /// There is no way back but failback. Answer: [`FailoverReply`].
    FailoverCommit {
        /// The group's name.
        group: String,
    },
    /// Back to replication, as if nothing had happened; ends a test as well. Answer: [`FailoverReply`].
    FailoverAbort {
        /// The group's name.
        group: String,
        /// Even if a device is in use.
        force: bool,
    },
    /// Call a group home that runs here. Answers: [`Reply::Progress`] and at last [`FailbackReply`].
    Failback {
        /// The group's name.
        group: String,
        /// To this host; `None`: its own.
        host: Option<String>,
        /// Keep what only the old source has as a group of this name, before it is overwritten.
        #[serde(default)]
        keep_branch: Option<String>,
        /// Only find out what would be sent.
        dry_run: bool,
    },
    /// Give it back. Answer: [`FailbackReply`].
    FailbackCutOver {
        /// The group's name.
        group: String,
        /// Compare only what was sent since the volumes were claimed.
        quick: bool,
        /// Only check.
        dry_run: bool,
    },
    /// It is not to come home any more. Answer: [`FailbackReply`].
    FailbackStop {
        /// The group's name.
        group: String,
    },
    /// Pin a bookmark against expiry, or let it go. Answer: [`KeepReply`].
    Keep {
        /// The group's name.
        group: String,
        /// The bookmark's name.
        bookmark: String,
        /// Pin it.
        keep: bool,
    },
}

/// How a planned switch-over is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedWish {
    /// How long the source may take until it is quiet and drained.
    pub limit_seconds: u64,
    /// Compare nothing at the barrier: the position alone proves that everything is here.
    pub quick: bool,
}

/// How a view is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExportKind {
    /// A block device of the recovery host.
    #[default]
    Device,
    /// The NBD protocol.
    Nbd,
}

/// One line of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply<T> {
    /// Work is under way.
    Progress(Progress),
    /// It is done.
    Done(T),
    /// It is not.
    Problem(Problem),
}

/// How far long work is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes per second of late.
    pub bytes_per_second: f64,
    /// Seconds left at that rate; `None` if there is none.
    pub seconds_left: Option<f64>,
}

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
    /// Something to say: why the window is shorter than retention says, why nothing is taken in.
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

/// Answer to `protect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtectReply {
    /// The group's name.
    pub group: String,
    /// What is (or would be) protected.
    pub volumes: Vec<VolumeStatus>,
    /// Things to know that are not errors.
    pub notes: Vec<String>,
}

/// Answer to `bookmark`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BookmarkReply {
    /// The group's name.
    pub group: String,
    /// The bookmark's name.
    pub name: String,
    /// Its exact position, `incarnation:offset`.
    pub position: String,
    /// Its time at the source (RFC 3339).
    pub time: String,
    /// `crash`.
    pub consistency: String,
    /// Whether the receiver has it already.
    pub durable: bool,
}

/// Answer to `verify`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReply {
    /// The group's name.
    pub group: String,
    /// The outcome.
    #[serde(flatten)]
    pub verify: Verify,
}

/// Answer to `host invite`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteReply {
    /// The host's name.
    pub name: String,
    /// To be given to `varve join`.
    pub token: String,
    /// Until when (RFC 3339).
    pub expires: String,
    /// Where this receiver listens.
    pub address: String,
}

/// Answer to `host list`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostsReply {
    /// Enrolled and revoked hosts.
    pub hosts: Vec<HostStatus>,
    /// Invitations that were not used yet.
    pub invites: Vec<InviteStatus>,
}

/// A host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// Its name.
    pub name: String,
    /// Whether it may connect.
    pub revoked: bool,
    /// Whether it is connected now.
    pub connected: bool,
    /// When it joined (RFC 3339).
    pub joined: String,
    /// Fingerprint of its certificate, hex.
    pub fingerprint: String,
    /// Where it connects from.
    pub address: Option<String>,
}

/// An open invitation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteStatus {
    /// The host's name.
    pub name: String,
    /// Until when (RFC 3339).
    pub expires: String,
}

/// A point that was taken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PointReply {
    /// Its time at the source (RFC 3339, to the nanosecond: asked for again, it gives the same point).
    pub time: String,
    /// Its position, `incarnation:offset`.
    pub position: String,
    /// Orders all points of the group.
    pub height: u64,
    /// What it promises.
    pub consistency: Consistency,
    /// What was asked for.
    pub asked: String,
    /// Seconds from what was asked to what was taken; negative: it is older.
    pub distance_seconds: f64,
}

/// Answer to `points`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PointsReply {
    /// The group's name.
    pub group: String,
    /// Oldest and newest point.
    pub window: Window,
    /// Points in the stretch that was asked for.
    pub points: u64,
    /// Before-images in it.
    pub records: u64,
    /// Bytes of history in it.
    pub bytes: u64,
    /// From old to new.
    pub bookmarks: Vec<BookmarkStatus>,
    /// From old to new.
    pub gaps: Vec<GapStatus>,
    /// Stretches of points that damage took away, from old to new.
    pub damaged: Vec<DamageStatus>,
    /// Streams, from old to new.
    pub stretches: Vec<StretchStatus>,
    /// Rollbacks, from old to new.
    pub rollbacks: Vec<RollbackStatus>,
    /// How many points where.
    pub density: Vec<DensityStatus>,
}

/// A bookmark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BookmarkStatus {
    /// Its name.
    pub name: String,
    /// Its time at the source.
    pub time: String,
    /// Its position.
    pub position: String,
    /// What it promises.
    pub consistency: Consistency,
    /// Whether it can be recovered: not inside a gap, not damaged.
    pub recoverable: bool,
    /// Whether it is pinned against expiry.
    pub kept: bool,
    /// Bytes of history that would expire without it; `None`: not kept.
    pub kept_bytes: Option<u64>,
}

/// Points that damage took away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamageStatus {
    /// Time of the last point before; `None`: from the oldest on.
    pub from: Option<String>,
    /// Time of the first point after; `None`: up to the newest.
    pub to: Option<String>,
    /// What is damaged.
    pub what: String,
}

/// A stream of one incarnation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StretchStatus {
    /// The incarnation, all hex digits.
    pub incarnation: String,
    /// When it began.
    pub from: String,
    /// When the next one began.
    pub to: Option<String>,
    /// Fencing token.
    pub epoch: u64,
}

/// A rollback.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollbackStatus {
    /// When it was done: the replica's time of the point, at the source.
    pub time: String,
    /// Time of the point that it went back to.
    pub to: String,
}

/// Points and bytes of a stretch of time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DensityStatus {
    /// From when.
    pub from: String,
    /// Until when.
    pub to: String,
    /// Points.
    pub points: u64,
    /// Bytes of history.
    pub bytes: u64,
}

/// Answer to `view open`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ViewReply {
    /// For `view close`.
    pub id: u64,
    /// The group's name.
    pub group: String,
    /// The exact point.
    pub point: PointReply,
    /// In the order of their numbers.
    pub volumes: Vec<ViewVolume>,
    /// Whether writes are taken.
    pub writable: bool,
    /// How it is served.
    pub export: ExportKind,
    /// What to know before it is mounted.
    pub hints: Vec<String>,
    /// When it was opened (the receiver's time).
    pub opened: Option<String>,
    /// Bytes of history that could expire without it.
    pub held_bytes: Option<u64>,
    /// Bytes that were written to it.
    pub written_bytes: Option<u64>,
}

/// A volume of a view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewVolume {
    /// Path at the source.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// The block device.
    pub device: Option<String>,
    /// The NBD URI.
    pub uri: Option<String>,
}

/// Answer to `view list`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ViewsReply {
    /// In the order of their numbers.
    pub views: Vec<ViewReply>,
}

/// Answer to `rollback`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RollbackReply {
    /// The group's name.
    pub group: String,
    /// What the replica was: with this the rollback can be rolled back.
    pub from_point: PointReply,
    /// What it is (would be) now.
    pub to_point: PointReply,
    /// Bytes that differ.
    pub bytes: u64,
    /// Blocks of 4096 bytes that they are in.
    pub blocks: u64,
    /// How long it took (would take).
    pub seconds: f64,
    /// Nothing was changed.
    pub dry_run: bool,
    /// Replication waits for `rollback --release`.
    pub held: bool,
}

/// Answer to `failover`, `failover commit` and `failover abort`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailoverReply {
    /// The group's name.
    pub group: String,
    /// The exact point.
    pub point: PointReply,
    /// The newest point that is here.
    pub newest: PointReply,
    /// Bytes that changed between the point and the newest: they are left out (and stay in the history).
    pub left_out_bytes: u64,
    /// How old that is: what the source wrote later is not here. By the clocks of both hosts. `None`: `commit`
    /// and `abort` do not look.
    #[serde(default)]
    pub newest_age_seconds: Option<f64>,
    /// Captured by the source and not here, as it said last: lost if the source does not come back. `None`: not known.
    pub not_here_bytes: Option<u64>,
    /// How long ago the source was heard of, seconds; `None`: never since the receiver started.
    pub source_heard_seconds: Option<f64>,
    /// Fencing token from now on.
    pub epoch: u64,
    /// Nothing but a test.
    pub test: bool,
    /// No way back but failback.
    pub committed: bool,
    /// It was undone.
    pub aborted: bool,
    /// Nothing was done.
    pub dry_run: bool,
    /// How long it took until the devices were there.
    pub seconds: f64,
    /// In the order of their numbers.
    pub volumes: Vec<ViewVolume>,
    /// What to know before they are mounted.
    pub hints: Vec<String>,
    /// The source was told and sent what it had; `None`: it was not connected, or an older point was asked for.
    #[serde(default)]
    pub drained: Option<DrainedReply>,
    /// Nothing is lost, and the proof.
    #[serde(default)]
    pub planned: Option<PlannedReply>,
}

/// See [`FailoverReply::drained`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrainedReply {
    /// Everything that the source had captured when it was told is here.
    pub complete: bool,
    /// How long that took, or was waited for.
    pub seconds: f64,
}

/// See [`FailoverReply::planned`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlannedReply {
    /// The position before which everything stands that was ever written at the source, `incarnation:offset`.
    pub barrier: String,
    /// The volumes there are read-only; else only claimed: nobody had them open, nobody can mount them.
    pub read_only: bool,
    /// How long the operator's steps there took; `None`: there are none.
    pub hook_seconds: Option<f64>,
    /// Bytes that were compared at the barrier and are equal; 0: not compared.
    pub compared_bytes: u64,
    /// From the moment that the source was told to the moment that the devices are here.
    pub pause_seconds: f64,
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

/// Answer to `failback`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FailbackReply {
    /// The group's name.
    pub group: String,
    /// The host that it is (would be) brought to.
    pub host: String,
    /// Fencing token.
    pub epoch: u64,
    /// As [`FailbackStatus::phase`]; also `none`, `stopped`, `home`.
    pub phase: String,
    /// Bytes that changed on the recovery host since it was taken over.
    pub changed_here_bytes: u64,
    /// Bytes that differ at the host, counted in blocks of 64 KiB: they would be sent. `None`: not compared.
    pub differing_bytes: Option<u64>,
    /// Those of them that did not change here: what the old source wrote and never sent. They would be overwritten.
    pub only_there_bytes: Option<u64>,
    /// Bytes of the stream that the old source captured and never sent, as it said last; `None`: it does not know.
    pub captured_there_bytes: Option<u64>,
    /// Bytes at the host that differ from the point of the split, in blocks of 64 KiB: what only it wrote. They are lost unless
    /// they are kept. `None`: not compared, or that point has expired.
    #[serde(default)]
    pub branch_bytes: Option<u64>,
    /// Time of the split: the newest point of the old source.
    #[serde(default)]
    pub branch_since: Option<String>,
    /// They are kept as this group.
    #[serde(default)]
    pub branch_kept: Option<String>,
    /// Bytes compared by the last pass; of a cut-over: at the barrier.
    pub compared_bytes: u64,
    /// Bytes sent; of a cut-over: while nobody could write.
    pub sent_bytes: u64,
    /// The longest that a write waits for being sent.
    pub lag_seconds: Option<f64>,
    /// How long nobody could write (cut-over).
    pub pause_seconds: Option<f64>,
    /// How long the command took.
    pub seconds: f64,
    /// It runs at home.
    pub home: bool,
    /// Nothing was done.
    pub dry_run: bool,
    /// In the order of their numbers.
    pub volumes: Vec<VolumeStatus>,
    /// The next sensible command.
    pub next: String,
}

/// Answer to `restore`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestoreReply {
    /// The group's name.
    pub group: String,
    /// Path of the volume at the source.
    pub volume: String,
    /// Where it was (would be) written to.
    pub to: String,
    /// The exact point.
    pub point: PointReply,
    /// Size of the volume.
    pub bytes: u64,
    /// Bytes that are not holes.
    pub written_bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// BLAKE3 of all bytes, hex; `None` with a dry run.
    pub digest: Option<String>,
    /// Whether it was read again and is the same.
    pub verified: bool,
    /// Nothing was written.
    pub dry_run: bool,
}

/// Answer to `retention`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetentionReply {
    /// The group's name.
    pub group: String,
    /// What holds (would hold) now.
    pub retention: Retention,
    /// The window before anything expires because of it.
    pub window: Window,
    /// Bytes of history.
    pub bytes: u64,
    /// Bytes that expire now.
    pub expiring_bytes: u64,
    /// Where the window will begin then; `None`: nothing expires.
    pub expiring_to: Option<String>,
    /// Bytes that are only there for kept bookmarks and open views.
    pub held_bytes: u64,
    /// Nothing was changed.
    #[serde(default)]
    pub dry_run: bool,
}

/// Answer to `scrub`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReply {
    /// The group's name.
    pub group: String,
    /// Layers read.
    pub layers: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What is damaged.
    pub damaged: Vec<LayerDamage>,
}

/// A damaged layer and the points that it takes away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerDamage {
    /// The layer's number; 0: it was found earlier, and which one is not known any more.
    pub layer: u64,
    /// What was found.
    pub what: String,
    /// Time of the first point that cannot be read any more; `None`: no point is lost.
    pub from: Option<String>,
    /// Time of the last one.
    pub to: Option<String>,
}

/// Answer to `bookmark --keep` and `--release`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepReply {
    /// The group's name.
    pub group: String,
    /// The bookmark.
    pub name: String,
    /// Its time.
    pub time: String,
    /// Whether it is kept now.
    pub kept: bool,
    /// Bytes of history that are (were) only there because of it.
    pub bytes: u64,
}

/// A position as people and scripts see it: the incarnation's first eight hex digits and the offset.
pub fn show_position(incarnation: &[u8; 16], offset: u64) -> String {
    let mut text = String::with_capacity(32);
    for byte in &incarnation[..4] {
        text.push_str(&format!("{byte:02x}"));
    }
    text.push_str(&format!(":{offset}"));
    text
}

/// Nanoseconds since 1970 as RFC 3339 in UTC, with microseconds.
pub fn show_time(time_ns: u64) -> String {
    match jiff::Timestamp::from_nanosecond(i128::from(time_ns)) {
        Ok(time) => format!("{time:.6}"),
        Err(_) => format!("{time_ns} ns"),
    }
}

/// Nanoseconds since 1970 as RFC 3339 in UTC, to the nanosecond: what names a point must give the same point again.
pub fn show_exact_time(time_ns: u64) -> String {
    match jiff::Timestamp::from_nanosecond(i128::from(time_ns)) {
        Ok(time) => time.to_string(),
        Err(_) => format!("{time_ns} ns"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_readable_json() {
        let done = Reply::Done(BookmarkReply {
            group: "db".into(),
            name: "b".into(),
            position: show_position(&[0xab; 16], 4096),
            time: show_time(1_700_000_000_123_456_789),
            consistency: "crash".into(),
            durable: true,
        });
        let text = serde_json::to_string(&done).expect("plain data");
        assert_eq!(
            text,
            r#"{"done":{"group":"db","name":"b","position":"abababab:4096","time":"2023-11-14T22:13:20.123456Z","consistency":"crash","durable":true}}"#
        );
        let problem: Reply<()> =
            Reply::Problem(Problem::not_found("no group 'x'", "it is not protected", "varve status"));
        let text = serde_json::to_string(&problem).expect("plain data");
        assert_eq!(serde_json::from_str::<Reply<()>>(&text).expect("own words"), problem);
    }
}
