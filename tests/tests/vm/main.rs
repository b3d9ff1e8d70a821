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
