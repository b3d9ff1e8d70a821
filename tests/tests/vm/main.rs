//! Real crashes on other kernels: the production host is a QEMU guest without KVM, the receiver is outside. `make vm` runs this,
//! `make test` does not: it wants QEMU and two of Debian's kernels, and takes some minutes.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

mod bed;
mod boots;
mod capture;
mod crashes;
mod log;
mod log_writes;
mod passthrough;
mod units;
mod views;

use std::path::{Path, PathBuf};

/// The series of Debian's cloud kernels that are tested.
macro_rules! on_kernels {
    ($test:ident) => {
        mod $test {
            #[test]
            #[ignore = "needs QEMU and Debian's kernels: make vm"]
            fn on_6_1() {
                super::$test("6.1");
            }

            #[test]
            #[ignore = "needs QEMU and Debian's kernels: make vm"]
            fn on_6_12() {
                super::$test("6.12");
            }
        }
    };
}
use on_kernels;

/// The newest build of a test of another crate: beside this one. No two crates may have a test of that name.
#[track_caller]
fn binary(name: &str) -> PathBuf {
    let directory = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let mine = |path: &Path| {
        let file = path.file_name().unwrap().to_str().unwrap_or_default();
        file.strip_prefix(name).is_some_and(|rest| rest.starts_with('-')) && path.extension().is_none()
    };
    let found = std::fs::read_dir(&directory).unwrap().flatten().map(|entry| entry.path()).filter(|path| mine(path));
    let newest = found.max_by_key(|path| std::fs::metadata(path).and_then(|meta| meta.modified()).unwrap());
    newest.unwrap_or_else(|| panic!("no {name}-… in {}: cargo build --workspace --tests", directory.display()))
}
