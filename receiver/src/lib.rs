//! The daemon of the recovery host: takes what agents send, makes it durable, acknowledges it, and applies it in order
//! to 1:1 replicas.
//!
//! ```text
//! QUIC stream ──► session ──► lander thread ──► applier thread ──► replicas
//!               (checks,      (one synced       (batches, sorted,
//!                one copy)     write at a time)  then the mark)
//!                  ▲               │ durable        │ applied
//!                  └──── acks ─────┴────────────────┘
//! ```
//!
//! | module | for |
//! |---|---|
//! | [`daemon`] | start, accept loop, stop |
//! | [`session`] | one group's stream: handshake, frames, answers |
//! | [`group`] | what a group is, its directory, its two threads |
//! | [`landing`] | the landing log: segments, batches, recovery |
//! | [`apply`] | from landed entries to the replica |
//! | [`view`], [`restore`], [`rollback`] | the past, read and brought back |
//! | [`promote`] | running a group here |
//! | [`failback`] | bringing it home |
//! | [`keeper`] | merges, retention, free space |
//! | [`watch`] | alerts, also of a source that is silent |
//! | [`status`], [`control`] | what `varve` sees and asks |
//! | [`failpoint`] | places where tests end the process |
//!
//! Memory of a group with a session: [`limits::ARENAS_MAX`] × [`limits::ARENA_BYTES`] for what arrives,
//! [`limits::IMAGE_BYTES_WAITING_MAX`] for images and [`limits::SPARE_IMAGES_MAX`] MiB for the next ones,
//! [`limits::STAGE_BYTES`] + [`limits::WINDOW_BYTES`] + [`limits::APPLY_BYTES_MAX`] for the applier, and one frame
//! decompressed: 100 MiB at most; with a past [`limits::RECENT_BYTES`] and [`limits::BEFORE_STAGE_BYTES`] more, while hardly an
//! image waits. After ten seconds without a write it goes back: an arena and little else stays.

pub mod apply;
pub mod clock;
pub mod control;
pub mod daemon;
pub mod failback;
pub mod failpoint;
pub mod failure;
pub mod group;
pub mod keeper;
pub mod landing;
pub mod limits;
pub mod promote;
pub mod restore;
pub mod rollback;
pub mod session;
pub mod status;
pub mod view;
pub mod watch;
