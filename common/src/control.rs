//! The words between `varve` and the daemons: one JSON object per line over a Unix socket. A request is one line; the
//! answer is any number of [`Reply::Progress`] lines and one [`Reply::Done`] or [`Reply::Problem`].
//!
//! The structs below `StatusReply` are also what `varve --json` prints (docs/json.md): fields are only ever added.

mod past;
mod request;
mod status;
mod takeover;

pub use past::*;
pub use request::*;
pub use status::*;
pub use takeover::*;

use crate::problem::Problem;
use crate::wire::messages::Verify;
use serde::{Deserialize, Serialize};

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
    /// A host of this name has joined: whoever redeems the token takes its place, and it is refused from then on.
    #[serde(default)]
    pub replaces: bool,
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
