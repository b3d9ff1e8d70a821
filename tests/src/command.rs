//! Running other programs: to their end with their words kept, or in the background.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What a finished program said.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line, for messages.
    pub line: String,
    /// Exit code; 128 + signal when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{}: stdout is not JSON ({error}):\n{}", self.line, self.stdout))
    }

    /// Standard output as JSON lines.
    #[track_caller]
    pub fn json_lines(&self) -> Vec<serde_json::Value> {
        let parse = |line: &str| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{}: not JSON ({error}): {line}", self.line))
        };
        self.stdout.lines().filter(|line| !line.trim().is_empty()).map(parse).collect()
    }

    /// Panics with everything it said unless it exited with `code`.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(
            self.code, code,
            "{}: exit code {} instead of {code}\nstdout: {}\nstderr: {}",
            self.line, self.code, self.stdout, self.stderr
        );
        self
    }

    /// Panics unless it exited with 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.expect_code(0)
    }
}

fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Runs to the end and keeps what was said. Panics only if the program cannot be started.
#[track_caller]
pub fn run(command: &mut Command) -> Output {
    let line = describe(command);
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{line}: {error}"));
    Output {
        line,
        code: code(output.status),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs `program arguments`, panics unless it exits with 0, returns its trimmed standard output.
#[track_caller]
pub fn run_ok<S: AsRef<std::ffi::OsStr>>(program: &str, args: &[S]) -> String {
    run(Command::new(program).args(args)).ok().stdout.trim().to_owned()
}

/// A program in the background. Its output goes to a file; `Drop` kills it.
///
/// It also dies with the thread that started it (`setpriv --pdeathsig`), so that a test runner that is killed leaves
/// no daemons. Hence: start it from a thread that outlives it.
#[derive(Debug)]
pub struct Child {
    line: String,
    log: PathBuf,
    process: std::process::Child,
    ended: Option<i32>,
}

impl Child {
    /// Starts `program arguments` with more settings by `adjust` (environment, directory), output appended to `log`.
    #[track_caller]
    pub fn start<S: AsRef<std::ffi::OsStr>>(
        program: impl AsRef<std::ffi::OsStr>,
        args: &[S],
        log: &Path,
        adjust: impl FnOnce(&mut Command),
    ) -> Self {
        Self::start_as(None, program, args, log, adjust)
    }

    /// As [`Child::start`], as another user.
    #[track_caller]
    pub fn start_as<S: AsRef<std::ffi::OsStr>>(
        user: Option<&str>,
        program: impl AsRef<std::ffi::OsStr>,
        args: &[S],
        log: &Path,
        adjust: impl FnOnce(&mut Command),
    ) -> Self {
        let mut command = Command::new("setpriv");
        if let Some(user) = user {
            command.args(["--reuid", user, "--regid", user, "--init-groups"]);
        }
        command.args(["--pdeathsig", "KILL", "--"]).arg(program).args(args);
        let line = describe(&command);
        let file = File::options().create(true).append(true).open(log).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        adjust(&mut command);
        let process = command.spawn().unwrap_or_else(|error| panic!("{line}: {error}"));
        Child { line, log: log.to_owned(), process, ended: None }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Everything that it has said so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Its exit code once it has ended (128 + signal for a signal).
    pub fn exit_code(&mut self) -> Option<i32> {
        if self.ended.is_none() {
            self.ended = self.process.try_wait().unwrap().map(code);
        }
        self.ended
    }

    /// Sends a signal; nothing happens if it has ended.
    pub fn signal(&mut self, signal: Signal) {
        if self.exit_code().is_none() {
            // It is our child and not reaped, so the number is still its own.
            kill(Pid::from_raw(self.pid().cast_signed()), signal).unwrap();
        }
    }

    /// Waits for its end; `None` when `limit` passes first.
    pub fn wait(&mut self, limit: Duration) -> Option<i32> {
        let start = Instant::now();
        while self.exit_code().is_none() && start.elapsed() < limit {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.ended
    }

    /// Sends a signal and waits for the end. Panics when `limit` passes first.
    #[track_caller]
    pub fn end_with(&mut self, signal: Signal, limit: Duration) -> i32 {
        self.signal(signal);
        self.wait(limit)
            .unwrap_or_else(|| panic!("{} did not end {limit:?} after {signal}. It said:\n{}", self.line, self.log()))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.exit_code().is_none() {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}
