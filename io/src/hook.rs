//! Runs the operator's program: one call at a time, bounded in time and in number, in a thread of its own that nobody
//! waits for.

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// Calls that may wait.
pub const CALLS_MAX: usize = 64;
/// Between two looks at whether the program has ended.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// One run of the program.
#[derive(Debug)]
pub struct Call {
    /// The program, without arguments.
    pub program: PathBuf,
    /// It and what it started are killed after so long.
    pub timeout: Duration,
    /// Its standard input; `dropped` in it becomes the number of calls that were dropped before this one ran.
    pub object: serde_json::Value,
    /// Added to this process's environment.
    pub environment: Vec<(String, String)>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Hook {
    calls: SyncSender<Call>,
    dropped: Arc<AtomicU64>,
}

impl Hook {
    /// Starts the thread.
    ///
    /// # Errors
    /// If there can be no thread.
    pub fn start() -> io::Result<Self> {
        let (calls, waiting) = sync_channel(CALLS_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        let counted = dropped.clone();
        std::thread::Builder::new().name("hook".to_owned()).spawn(move || run(&waiting, &counted))?;
        Ok(Self { calls, dropped })
    }

    /// Puts a call into the queue; whether there was room. Never waits.
    pub fn call(&self, call: Call) -> bool {
        let taken = self.calls.try_send(call).is_ok();
        if !taken {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }
}

fn run(calls: &Receiver<Call>, dropped: &AtomicU64) {
    while let Ok(call) = calls.recv() {
        let before = dropped.swap(0, Ordering::Relaxed);
        let hook = call.program.display().to_string();
        match run_one(&call, before) {
            Ok(Some(status)) if status.success() => tracing::debug!(hook, "the alert hook was told"),
            Ok(Some(status)) => tracing::warn!(hook, %status, "the alert hook failed"),
            Ok(None) => {
                let seconds = call.timeout.as_secs_f64();
                tracing::warn!(hook, seconds, "the alert hook did not end and was killed");
            }
            Err(error) => tracing::warn!(hook, %error, "the alert hook cannot be run"),
        }
    }
}

/// `None`: it had to be killed.
fn run_one(call: &Call, dropped: u64) -> io::Result<Option<ExitStatus>> {
    // A file, not a pipe: a program that does not read its input must not hold up anybody.
    let mut input = File::from(memfd_create(c"varve-alert", MFdFlags::MFD_CLOEXEC)?);
    let mut object = call.object.clone();
    object["dropped"] = dropped.into();
    writeln!(input, "{object}")?;
    input.rewind()?;
    let mut child = Command::new(&call.program)
        .envs(call.environment.iter().map(|(name, value)| (name, value)))
        // It is not the service.
        .env_remove("NOTIFY_SOCKET")
        .env_remove("WATCHDOG_USEC")
        .env_remove("WATCHDOG_PID")
        .stdin(Stdio::from(input))
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()?;
    let end = Instant::now() + call.timeout;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            // The group is the child's own. It may have ended meanwhile.
            let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    fn program(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn call(program: PathBuf, number: u32) -> Call {
        Call {
            program,
            timeout: Duration::from_secs(2),
            object: serde_json::json!({ "n": number }),
            environment: vec![("VARVE_NUMBER".to_owned(), number.to_string())],
        }
    }

    fn wait_for(path: &Path, lines: usize) -> Vec<String> {
        let begin = Instant::now();
        loop {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            if text.lines().count() >= lines {
                return text.lines().map(str::to_owned).collect();
            }
            assert!(begin.elapsed() < Duration::from_secs(30), "{text}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn one_at_a_time_in_order_and_nobody_waits() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let text = format!("sleep 0.05\nread a\necho \"$VARVE_NUMBER $a\" >> {}", out.display());
        let slow = program(dir.path(), "slow", &text);
        let (hook, begin) = (Hook::start().unwrap(), Instant::now());
        let taken = (0..200).filter(|number| hook.call(call(slow.clone(), *number))).count();
        assert!(begin.elapsed() < Duration::from_secs(1) && taken < 100, "{taken}");
        let mut lines = wait_for(&out, taken);
        // The next one is told how many were dropped.
        assert!(hook.call(call(slow, 1000)));
        lines.extend(wait_for(&out, taken + 1).drain(taken..));
        let object =
            |line: &String| -> serde_json::Value { serde_json::from_str(line.split_once(' ').unwrap().1).unwrap() };
        let dropped: u64 = lines.iter().map(|line| object(line)["dropped"].as_u64().unwrap()).sum();
        assert_eq!(dropped, 200 - taken as u64, "{lines:?}");
        let numbers: Vec<u64> = lines.iter().map(|line| object(line)["n"].as_u64().unwrap()).collect();
        assert!(numbers.is_sorted() && numbers[0] == 0, "{numbers:?}");
    }

    #[test]
    fn a_hook_that_fails_or_hangs_does_not_keep_the_next_from_being_told() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let hook = Hook::start().unwrap();
        let (fails, not_there) = (program(dir.path(), "fails", "exit 3"), dir.path().join("not-there"));
        // A child of its own that would live on.
        let pid = dir.path().join("pid");
        let hangs = program(dir.path(), "hangs", &format!("sleep 1000 & echo $! > {}; wait", pid.display()));
        let tells = program(dir.path(), "tells", &format!("cat >> {}", out.display()));
        let big = Call { object: serde_json::json!({ "x": "x".repeat(1 << 20) }), ..call(fails, 1) };
        assert!([big, call(not_there, 2), call(hangs, 3), call(tells, 4)].into_iter().all(|call| hook.call(call)));
        assert_eq!(wait_for(&out, 1), ["{\"dropped\":0,\"n\":4}"]);
        let pid: i32 = std::fs::read_to_string(pid).unwrap().trim().parse().unwrap();
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z "), "what it started lives on: {state}");
    }
}
