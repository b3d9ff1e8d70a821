//! Answers about points: views, rollback, restore, retention.

use super::{ExportKind, GapStatus, Retention, Window};
use crate::point::Consistency;
use serde::{Deserialize, Serialize};

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
