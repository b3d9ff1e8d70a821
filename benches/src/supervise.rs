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
    sweep();
}

/// Takes away what killed runs left. Works once in a process.
pub fn sweep() {
    detach_dead();
    // The first scratch directory of a process sweeps away those of the dead, their devices and mounts included.
    drop(Scratch::disk());
}

/// Detaches loop devices over files of processes that are gone. A device over a FUSE file forgets its file's whole path
/// when that is unmounted, so this comes before the sweep.
fn detach_dead() {
    for device in std::fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let backing = std::fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
        let owner = backing.split_once("/varve-test-").and_then(|(_, rest)| rest.split_once('-'));
        // One that nobody reaps has no command line.
        let alive = |pid: &str| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty());
        if owner.is_some_and(|(pid, _)| pid.parse::<u32>().is_ok() && !alive(pid)) {
            let path = std::path::Path::new("/dev").join(device.file_name());
            let _ = varve_tests::run(Command::new("losetup").arg("--detach").arg(path));
        }
    }
}
