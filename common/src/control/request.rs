//! What is asked.

use crate::point::PointSpec;
use serde::{Deserialize, Serialize};

/// What `varve` asks an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum AgentRequest {
    /// All groups, or one. Answer: [`StatusReply`](super::StatusReply).
    Status {
        /// Only this one.
        group: Option<String>,
    },
    /// The identity or configuration changed on disk (after `varve join`). Answer: nothing.
    Reload,
    /// Protect volumes as a group. Answer: [`ProtectReply`](super::ProtectReply).
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
    /// Answer: [`ProtectReply`](super::ProtectReply).
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
    /// Set a bookmark. Answer: [`BookmarkReply`](super::BookmarkReply).
    Bookmark {
        /// The group's name.
        group: String,
        /// The bookmark's name.
        name: String,
    },
    /// Compare volume and replica. Answers: [`Reply::Progress`](super::Reply::Progress) and at last [`VerifyReply`](super::VerifyReply).
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
    /// All groups, or one. Answer: [`StatusReply`](super::StatusReply).
    Status {
        /// Only this one.
        group: Option<String>,
    },
    /// Make a join token. Answer: [`InviteReply`](super::InviteReply).
    Invite {
        /// The host's name.
        name: String,
        /// How long the token is good.
        ttl_seconds: u64,
    },
    /// All hosts and open invitations. Answer: [`HostsReply`](super::HostsReply).
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
    /// What can be recovered. Answer: [`PointsReply`](super::PointsReply).
    Points {
        /// The group's name.
        group: String,
        /// Only what is not older, nanoseconds since 1970.
        from_ns: Option<u64>,
        /// Only what is not younger.
        to_ns: Option<u64>,
    },
    /// Open every volume of a group at a point. Answer: [`ViewReply`](super::ViewReply).
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
    /// The open views. Answer: [`ViewsReply`](super::ViewsReply).
    ViewList,
    /// Close a view. Answer: nothing. Refused while a device of it is in use.
    ViewClose {
        /// Its number.
        id: u64,
        /// Even then.
        #[serde(default)]
        force: bool,
    },
    /// Make the replica what it was. Answers: [`Reply::Progress`](super::Reply::Progress) and at last [`RollbackReply`](super::RollbackReply).
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
    /// Whether it could; nothing is changed. Not a flag of the other: a daemon that does not know it must not release. Answer:
    /// nothing.
    RollbackReleaseLook {
        /// The group's name.
        group: String,
    },
    /// Write one volume as it was to a file or device. Answers: [`Reply::Progress`](super::Reply::Progress) and at last [`RestoreReply`](super::RestoreReply).
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
        /// Device and inode of the directory of `to` as the asker sees it: the receiver may have another one of that name.
        #[serde(default)]
        dir: Option<(u64, u64)>,
    },
    /// Set what is given, tell what holds. Answer: [`RetentionReply`](super::RetentionReply).
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
    /// Read all of a group's history and check it. Answers: [`Reply::Progress`](super::Reply::Progress) and at last [`ScrubReply`](super::ScrubReply).
    Scrub {
        /// The group's name.
        group: String,
        /// At most; `None`: the configured rate.
        bytes_per_second: Option<u64>,
    },
    /// Run the group here. Answer: [`FailoverReply`](super::FailoverReply).
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
        /// It goes back by itself unless it is committed within so many seconds.
        #[serde(default)]
        abort_after_seconds: Option<u64>,
    },
    /// There is no way back but failback. Answer: [`FailoverReply`](super::FailoverReply).
    FailoverCommit {
        /// The group's name.
        group: String,
    },
    /// Back to replication, as if nothing had happened; ends a test as well. Answer: [`FailoverReply`](super::FailoverReply).
    FailoverAbort {
        /// The group's name.
        group: String,
        /// Even if a device is in use.
        force: bool,
        /// Only a test is meant, whatever else runs here.
        #[serde(default)]
        only_test: bool,
    },
    /// Call a group home that runs here. Answers: [`Reply::Progress`](super::Reply::Progress) and at last [`FailbackReply`](super::FailbackReply).
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
    /// Give it back. Answer: [`FailbackReply`](super::FailbackReply).
    FailbackCutOver {
        /// The group's name.
        group: String,
        /// Compare only what was sent since the volumes were claimed.
        quick: bool,
        /// Only check.
        dry_run: bool,
    },
    /// It is not to come home any more. Answer: [`FailbackReply`](super::FailbackReply).
    FailbackStop {
        /// The group's name.
        group: String,
    },
    /// Pin a bookmark against expiry, or let it go. Answer: [`KeepReply`](super::KeepReply).
    Keep {
        /// The group's name.
        group: String,
        /// The bookmark's name.
        bookmark: String,
        /// Pin it.
        keep: bool,
        /// Only say what it would cost, or let expire.
        #[serde(default)]
        dry_run: bool,
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
