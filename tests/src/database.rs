//! PostgreSQL on a given directory, reachable over a Unix socket only.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::{Child, Output, Scratch, run, run_ok, wait_until};

const USER: &str = "postgres";

/// A running server; `Drop` stops it.
#[derive(Debug)]
pub struct Postgres {
    bin: PathBuf,
    sockets: PathBuf,
    directory: PathBuf,
    server: Child,
}

/// Of `/proc/PID/stat`: the state's letter and the parent.
fn state_and_parent(pid: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

fn lives(pid: u32) -> bool {
    state_and_parent(pid).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
}

fn children(parent: u32) -> Vec<u32> {
    let numbers = std::fs::read_dir("/proc").unwrap().flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers.filter(|pid| state_and_parent(*pid).is_some_and(|(_, of)| of == parent)).collect()
}

/// The newest installed version's programs (Debian keeps them out of PATH, Fedora does not).
fn programs() -> PathBuf {
    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|dir| dir.flatten().map(|entry| entry.path().join("bin")).collect())
        .unwrap_or_default();
    found.retain(|bin| bin.join("initdb").exists());
    found.sort();
    found.pop().unwrap_or_else(|| {
        assert!(Path::new("/usr/bin/initdb").exists(), "no PostgreSQL here: scripts/install-deps test");
        "/usr/bin".into()
    })
}

fn as_postgres(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", USER, "--regid", USER, "--init-groups", "--"]).arg(program);
    command.current_dir("/");
    command
}

impl Postgres {
    /// Makes a new database cluster in `directory` (which must not exist yet) and starts it. Logs and sockets go
    /// to `scratch`, so that they are not on the volume under test.
    #[track_caller]
    pub fn create(scratch: &Scratch, directory: &Path) -> Self {
        std::fs::create_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        run_ok("chown", &[Path::new(USER), directory]);
        run(as_postgres(&programs().join("initdb"))
            .args([
                "--auth=trust",
                "--username=postgres",
                "--no-locale",
                "--encoding=UTF8",
                "--data-checksums",
                "--pgdata",
            ])
            .arg(directory))
        .ok();
        Self::open(scratch, directory)
    }

    /// Starts the server on an existing cluster: a replica's, say. It recovers first if it was not shut down.
    #[track_caller]
    pub fn open(scratch: &Scratch, directory: &Path) -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let bin = programs();
        let sockets = scratch.dir(&format!("pg{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        run_ok("chown", &[Path::new(USER), &sockets]);
        // A copy of a running cluster carries its lock file; the process that it names lives on another volume.
        let _ = std::fs::remove_file(directory.join("postmaster.pid"));
        let setting = |name: &str, value: &str| ["-c".to_owned(), format!("{name}={value}")];
        let mut args = vec!["-D".to_owned(), directory.display().to_string()];
        args.extend(setting("listen_addresses", ""));
        args.extend(setting("unix_socket_directories", &sockets.display().to_string()));
        args.extend(setting("shared_buffers", "64MB"));
        // In the cluster's directory, where the next start finds what a killed one left; else it stays in /dev/shm.
        args.extend(setting("dynamic_shared_memory_type", "mmap"));
        let log = sockets.join("server.log");
        let mut server = Child::start_as(Some(USER), bin.join("postgres"), &args, &log, |command| {
            command.current_dir("/");
        });
        wait_until(Duration::from_secs(60), "PostgreSQL accepts connections", || {
            assert_eq!(server.exit_code(), None, "PostgreSQL ended:\n{}", server.log());
            run(Command::new(bin.join("pg_isready")).arg("-q").arg("-h").arg(&sockets)).code == 0
        });
        Postgres { bin, sockets, directory: directory.to_owned(), server }
    }

    fn client(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.arg("-h").arg(&self.sockets).args(["-U", USER]);
        command
    }

    /// Runs SQL and returns the rows as text, `|` between columns.
    #[track_caller]
    pub fn query(&self, sql: &str) -> String {
        run(self.client("psql").args(["-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql, USER]))
            .ok()
            .stdout
            .trim()
            .to_owned()
    }

    /// A connection that stays: one statement after the other, without a program's start for each.
    #[track_caller]
    pub fn session(&self) -> Session {
        let mut command = self.client("psql");
        command.args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", USER]);
        let log = std::fs::File::create(self.sockets.join("session.log")).unwrap();
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).spawn().expect("psql");
        let (input, output) = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
        Session { process, input, output }
    }

    /// Makes pgbench's tables: 16 MB a scale.
    #[track_caller]
    pub fn pgbench_init(&self, scale: u32) -> Output {
        run(self.client("pgbench").args(["-i", "-q", "-s", &scale.to_string(), USER])).ok()
    }

    /// Starts pgbench's transactions in the background.
    #[track_caller]
    pub fn pgbench_start(&self, clients: u32, seconds: u64) -> Pgbench {
        let mut command = self.client("pgbench");
        command.args(["-n", "-c", &clients.to_string(), "-T", &seconds.to_string(), USER]);
        let args: Vec<_> = command.get_args().map(std::ffi::OsStr::to_owned).collect();
        Pgbench(Child::start(command.get_program(), &args, &self.sockets.join("pgbench.log"), |_| {}))
    }

    /// The same at so many transactions a second, until it is stopped.
    #[track_caller]
    pub fn pgbench_paced(&self, clients: u32, rate: u32) -> Pgbench {
        let mut command = self.client("pgbench");
        command.args(["-n", "-c", &clients.to_string(), "-R", &rate.to_string(), "-T", "3600", USER]);
        let args: Vec<_> = command.get_args().map(std::ffi::OsStr::to_owned).collect();
        Pgbench(Child::start(command.get_program(), &args, &self.sockets.join("pgbench.log"), |_| {}))
    }

    /// Reads every table and index and compares them with each other (`pg_amcheck`; the extension amcheck must be there).
    #[track_caller]
    pub fn amcheck(&self) {
        let mut command = self.client("pg_amcheck");
        let output = run(command.args(["--heapallindexed", "--rootdescend", "-d", USER])).ok();
        assert_eq!(output.stdout.trim(), "", "{}", output.line);
    }

    /// Compares the checksum of every page of a cluster that was shut down.
    #[track_caller]
    pub fn check_pages(directory: &Path) {
        run(as_postgres(&programs().join("pg_checksums")).args(["--check", "--pgdata"]).arg(directory)).ok();
    }

    /// Somebody else shuts it down: waits for the end.
    #[track_caller]
    pub fn wait_stopped(mut self) {
        let code = self.server.wait(Duration::from_secs(60));
        assert_eq!(code, Some(0), "PostgreSQL:\n{}", self.server.log());
    }

    /// As when the power fails: every process of it at once, none of them gets to do anything more.
    #[track_caller]
    pub fn kill(mut self) {
        let pid = self.server.pid();
        // It starts no more of them.
        self.server.signal(Signal::SIGSTOP);
        let workers = children(pid);
        for worker in &workers {
            // Not reaped by their stopped parent, so the numbers are theirs.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker.cast_signed()), Signal::SIGKILL);
        }
        self.server.end_with(Signal::SIGKILL, Duration::from_secs(20));
        wait_until(Duration::from_secs(20), "all of PostgreSQL has ended", || workers.iter().all(|pid| !lives(*pid)));
        // What a killed server leaves in the kernel: 56 bytes, of which line 7 of its lock file has the number.
        let lock = std::fs::read_to_string(self.directory.join("postmaster.pid")).unwrap_or_default();
        if let Some(segment) = lock.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)) {
            run(Command::new("ipcrm").args(["--shmem-id", segment]));
        }
    }

    /// Shuts down in an orderly way.
    #[track_caller]
    pub fn stop(mut self) {
        self.server.end_with(Signal::SIGINT, Duration::from_secs(60));
    }

    /// What the server has said.
    pub fn log(&self) -> String {
        self.server.log()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Immediate shutdown: the postmaster takes its children with it, which SIGKILL would leave behind for a while.
        self.server.signal(Signal::SIGQUIT);
        self.server.wait(Duration::from_secs(20));
    }
}

/// See [`Postgres::session`]. `Drop` ends it.
#[derive(Debug)]
pub struct Session {
    process: std::process::Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Session {
    /// Runs a statement (with its semicolon) that gives no rows: committed when this returns.
    ///
    /// # Errors
    /// If the server refuses it or is gone.
    pub fn execute(&mut self, sql: &str) -> Result<(), String> {
        writeln!(self.input, "{sql}\n\\echo done").and_then(|()| self.input.flush()).map_err(|e| e.to_string())?;
        let mut line = String::new();
        self.output.read_line(&mut line).map_err(|e| e.to_string())?;
        if line.trim() == "done" { Ok(()) } else { Err(format!("'{sql}' was answered with '{}'", line.trim())) }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A pgbench run in the background; `Drop` kills it.
#[derive(Debug)]
pub struct Pgbench(Child);

impl Pgbench {
    /// Still running?
    pub fn running(&mut self) -> bool {
        self.0.exit_code().is_none()
    }

    /// Waits for its end and returns its report.
    #[track_caller]
    pub fn finish(mut self) -> String {
        let code = self.0.wait(Duration::from_secs(600)).expect("pgbench ran for more than ten minutes");
        assert_eq!(code, 0, "pgbench: {}", self.0.log());
        self.0.log()
    }

    /// Ends it now.
    pub fn stop(mut self) {
        self.0.signal(Signal::SIGTERM);
        self.0.wait(Duration::from_secs(20));
    }
}
