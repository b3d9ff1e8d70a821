//! The words between `varve` and the daemons: one JSON object per line over a Unix socket. A request is one line; the
//! answer is any number of [`Reply::Progress`] lines and one [`Reply::Done`] or [`Reply::Problem`].
//!
//! The structs below `StatusReply` are also what `varve --json` prints (docs/json.md): fields are only ever added.

use crate::problem::Problem;
use crate::state::{Data, GapReason, Link, Role};
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
    /// Times between which points can be recovered (RFC 3339); until there is a history only the newest.
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
    /// Counters since the daemon started, by name (docs/json.md).
    pub counters: std::collections::BTreeMap<String, u64>,
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
