//! Fixtures of the end-to-end tests: real devices, filesystems, databases and the three programs, each with a `Drop`
//! that takes away what it made.
//!
//! Nothing of the product is linked here: the programs are started and asked like a user does, and the [judge] reads
//! devices on its own. Fixtures panic with a sentence about what went wrong (a fixture's failure is a test's failure),
//! and a fixture that cannot clean up fails the test too. Everything needs root.
//!
//! Values drop in reverse order of their declaration, so declare from the ground up: scratch, device, mount, database.
#![allow(
    clippy::unwrap_used,
    reason = "a test's broken assumption is a panic with a line number, there is nobody to hand an error to"
)]

mod aligned;
pub mod campaign;
mod command;
mod database;
mod device;
mod fio;
mod guest;
pub mod impair;
mod installation;
pub mod judge;
mod mount;
mod scratch;
mod seed;
mod slow;

pub use aligned::Aligned;
pub use command::{Child, Output, run, run_ok};
pub use database::{Pgbench, Postgres, Session};
pub use device::{LoopDevice, LoopOptions, logical_sector_bytes, size_bytes};
pub use fio::{Fio, FioResult, FioRun};
pub use guest::{Guest, Machine};
pub use impair::{Conditions, Impair, Tally, Way};
pub use installation::{Installation, Pair, Role, built, free_port};
pub use judge::{assert_same, compare_devices, digest_device};
pub use mount::{Filesystem, FullTmpfs, Mount};
pub use scratch::Scratch;
pub use seed::Seed;
pub use slow::SlowDevice;

use std::time::{Duration, Instant};

/// One kibibyte.
pub const KIB: u64 = 1 << 10;
/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// Asks until `true` or panics with `what` when `limit` has passed. Returns how long it took.
#[track_caller]
pub fn wait_until(limit: Duration, what: &str, mut ask: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    loop {
        if ask() {
            return start.elapsed();
        }
        assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Panics unless root: a test that cannot test must not pass.
#[track_caller]
pub fn require_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test needs root (loop devices, mounts, BPF): run it with `make test` as root"
    );
}

/// For `Drop`: a fixture that leaves something behind fails the test, unless the test is failing already.
pub(crate) fn complain(words: &str) {
    assert!(std::thread::panicking(), "{words}");
    eprintln!("while cleaning up: {words}");
}
