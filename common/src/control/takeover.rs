//! Answers about a takeover and the way home.

use super::{PointReply, ViewVolume, VolumeStatus};
use serde::{Deserialize, Serialize};

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
    /// When it goes back by itself unless it is committed; `None`: never.
    #[serde(default)]
    pub abort_at: Option<String>,
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

/// Answer to `failback`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FailbackReply {
    /// The group's name.
    pub group: String,
    /// The host that it is (would be) brought to.
    pub host: String,
    /// Fencing token.
    pub epoch: u64,
    /// As [`FailbackStatus::phase`](super::FailbackStatus::phase); also `none`, `stopped`, `home`.
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
