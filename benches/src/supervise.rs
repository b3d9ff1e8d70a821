//! The process that a person starts: runs itself again as the worker, hands signals on, cleans up behind it.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use varve_tests::Scratch;

const MARK: &str = "VARVE_BENCH_WORKER";
const STATISTICS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Whether this process is the one that measures.
pub fn is_worker() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Runs the worker to its end.
pub fn run_worker() -> ExitCode {
    let own = std::env::current_exe().unwrap();
    let statistics = std::fs::read_to_string(STATISTICS).ok();
    // The worker dies with us, and what it started dies with it.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(&own).args(std::env::args_os().skip(1)).env(MARK, "1");
    // The programs under test are those that were built with this one.
    if std::env::var_os("VARVE_BIN_DIR").is_none() {
        command.env("VARVE_BIN_DIR", own.parent().unwrap());
    }
    let mut worker = command.spawn().expect("setpriv (util-linux) is needed");
    let awaited: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD].into_iter().collect();
    // From here on. A signal just before ends both of us at once, before anything was set up.
    awaited.thread_block().unwrap();
    let status = loop {
        if let Some(status) = worker.try_wait().unwrap() {
            break status;
        }
        match awaited.wait().unwrap() {
            Signal::SIGCHLD => {}
            signal => {
                eprintln!("varve-bench: {signal}, cleaning up");
                // Not reaped yet, so the number is its own.
                kill(Pid::from_raw(worker.id().cast_signed()), Signal::SIGKILL).unwrap();
            }
        }
    };
    if let Some(signal) = status.signal() {
        clean_up(statistics.as_deref());
        eprintln!("varve-bench: ended by signal {signal}, everything that was set up is gone");
        return ExitCode::FAILURE;
    }
    ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// What a killed worker's `Drop`s would have done. Its children got SIGKILL at its death.
fn clean_up(statistics: Option<&str>) {
    if let Some(before) = statistics {
        let _ = std::fs::write(STATISTICS, before);
    }
    std::thread::sleep(std::time::Duration::from_millis(500));
    // The first scratch directory of a process sweeps away those of the dead, their devices and mounts included.
    drop(Scratch::disk());
}
