//! The benches, in the order in which they run.

mod backlog;
mod capture;
mod compare;
mod cost;
mod failover;
mod first_sync;
mod history_apply;
mod history_space;
mod idle;
mod overload;
mod path;
mod peer;
mod rollback;
mod rpo;
mod view;

use crate::plan::Plan;
use crate::report::Report;

/// One of them.
pub struct Bench {
    /// For `--only`.
    pub name: &'static str,
    /// What it measures.
    pub title: &'static str,
    /// Measures. Panics if it cannot.
    pub run: fn(&Plan, &mut Report),
}

/// All of them.
pub const ALL: &[Bench] = &[
    Bench { name: "capture", title: "Capture alone: what the writer keeps", run: capture::run },
    Bench { name: "cost", title: "In-kernel cost of the capture programs", run: cost::run },
    Bench { name: "path-4k", title: "Whole path, 4 KiB random writes", run: path::small },
    Bench { name: "path-256k", title: "Whole path, 256 KiB random writes", run: path::large },
    Bench { name: "overload", title: "More than fits through", run: overload::run },
    Bench { name: "rpo", title: "RPO at a steady 20 MB/s", run: rpo::run },
    Bench { name: "sync", title: "First sync of a half-full volume", run: first_sync::run },
    Bench { name: "compare", title: "Comparing a whole volume by digests", run: compare::run },
    Bench { name: "backlog", title: "Catching up after an outage at 20 MB/s", run: backlog::run },
    Bench { name: "history-apply", title: "Keeping what is replaced", run: history_apply::run },
    Bench { name: "history-space", title: "What history takes on disk", run: history_space::run },
    Bench { name: "view", title: "Views", run: view::run },
    Bench { name: "rollback", title: "Rolling back", run: rollback::run },
    Bench { name: "failover", title: "Taking over and coming home", run: failover::run },
    Bench { name: "idle", title: "Nothing to do", run: idle::run },
    Bench { name: "peer", title: "Beside qemu-storage-daemon", run: peer::run },
];

/// The name of every bench's group.
pub const GROUP: &str = "bench";
