//! Installations of the product under a `VARVE_ROOT` of their own, and the daemons of one.

use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;

use crate::campaign::Client;
use crate::{Child, Output, Scratch, complain};

/// How long a daemon may take to say that it is ready.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// Which daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `varve-agent`.
    Agent,
    /// `varve-receiver`.
    Receiver,
}

impl Role {
    fn program(self) -> &'static str {
        match self {
            Role::Agent => "varve-agent",
            Role::Receiver => "varve-receiver",
        }
    }
}

/// A `VARVE_ROOT` with the daemons that run in it. `Drop` ends them (only these) and removes all of it, mounts and
/// pins below it included. A failing test gets the end of their logs.
#[derive(Debug)]
pub struct Installation {
    root: PathBuf,
    agent: Option<Child>,
    receiver: Option<Child>,
    environment: Vec<(String, String)>,
    programs: Option<PathBuf>,
    // Last, so that it goes last.
    scratch: Scratch,
}

impl Installation {
    /// An empty one.
    #[expect(clippy::new_without_default, reason = "it makes a directory")]
    pub fn new() -> Self {
        Self::in_scratch(Scratch::disk())
    }

    /// An empty one on another disk than the usual.
    pub fn inside(directory: &Path) -> Self {
        Self::in_scratch(Scratch::inside(directory))
    }

    fn in_scratch(scratch: Scratch) -> Self {
        let root = scratch.dir("r");
        Installation { root, agent: None, receiver: None, environment: Vec::new(), programs: None, scratch }
    }

    /// An empty one whose programs are in `directory` instead of the workspace's target directory.
    pub fn with_programs(directory: &Path) -> Self {
        let mut install = Self::new();
        install.programs = Some(directory.to_owned());
        install
    }

    /// Its `VARVE_ROOT`.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its directory for files beside the root, which goes with it.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// An environment variable for the daemons that are started from now on, and for `varve`.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Runs `varve` in this installation.
    #[track_caller]
    pub fn varve<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Output {
        self.client().varve(args)
    }

    /// `varve` of this installation, for other threads.
    #[track_caller]
    pub fn client(&self) -> Client {
        let program = self.program("varve");
        Client { program, root: self.root.clone(), environment: self.environment.clone() }
    }

    /// Takes an environment variable away again.
    pub fn unset_env(&mut self, name: &str) {
        self.environment.retain(|(known, _)| known != name);
    }

    /// A daemon's program, to be run in another way than as the daemon.
    #[track_caller]
    pub fn command(&self, role: Role) -> Command {
        let mut command = Command::new(self.program(role.program()));
        command.env("VARVE_ROOT", &self.root).envs(self.environment.iter().cloned());
        command
    }

    /// Process ids of everything that runs in this installation, found by its environment: the daemons, and what they or
    /// `varve` have left behind.
    pub fn processes(&self) -> Vec<u32> {
        let mark = [b"VARVE_ROOT=", self.root.as_os_str().as_encoded_bytes()].concat();
        let numbers = std::fs::read_dir("/proc").unwrap().flatten();
        let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let mine = |pid: &u32| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == mark)
        };
        numbers.filter(mine).collect()
    }

    /// Starts a daemon and waits until it says that it is ready.
    #[track_caller]
    pub fn start(&mut self, role: Role) {
        if let Err(code) = self.try_start(role) {
            panic!("{} ended with exit code {code} before it was ready:\n{}", role.program(), self.log(role));
        }
    }

    /// Starts a daemon by way of another program (`setpriv …`), which gets it as its last argument.
    #[track_caller]
    pub fn start_with(&mut self, role: Role, wrapper: &[&str]) {
        if let Err(code) = self.try_start_with(role, wrapper) {
            panic!("{} ended with exit code {code} before it was ready:\n{}", role.program(), self.log(role));
        }
    }

    /// Starts a daemon and waits until it is ready (`Ok`) or has ended (`Err` with its exit code).
    #[track_caller]
    pub fn try_start(&mut self, role: Role) -> Result<(), i32> {
        self.try_start_with(role, &[])
    }

    #[track_caller]
    fn try_start_with(&mut self, role: Role, wrapper: &[&str]) -> Result<(), i32> {
        assert!(!self.running(role), "{} runs already", role.program());
        let socket = self.scratch.join(&format!("{}.notify", role.program()));
        let _ = std::fs::remove_file(&socket);
        let notify = UnixDatagram::bind(&socket).unwrap();
        notify.set_read_timeout(Some(Duration::from_millis(50))).unwrap();

        let daemon = self.program(role.program());
        let (program, args) = match wrapper {
            [] => (daemon, Vec::new()),
            [first, rest @ ..] => {
                let args: Vec<std::ffi::OsString> = rest.iter().map(Into::into).chain([daemon.into()]).collect();
                (PathBuf::from(first), args)
            }
        };
        let mut child = Child::start(program, &args, &self.log_path(role), |command| {
            command.env("VARVE_ROOT", &self.root).env("NOTIFY_SOCKET", &socket).envs(self.environment.iter().cloned());
        });
        let start = Instant::now();
        let mut buffer = [0u8; 4096];
        loop {
            if let Ok(length) = notify.recv(&mut buffer)
                && buffer[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1")
            {
                break;
            }
            if let Some(code) = child.exit_code() {
                return Err(code);
            }
            assert!(
                start.elapsed() < READY_LIMIT,
                "{} was not ready after {READY_LIMIT:?}. It said:\n{}",
                role.program(),
                child.log()
            );
        }
        // The socket stays bound to nobody: later notifications (watchdog, status) go nowhere, as with no systemd.
        *self.slot(role) = Some(child);
        Ok(())
    }

    /// Stops a daemon as systemd does; it must exit with 0.
    #[track_caller]
    pub fn stop(&mut self, role: Role) {
        let mut child = self.slot(role).take().unwrap_or_else(|| panic!("{} does not run", role.program()));
        let code = child.end_with(Signal::SIGTERM, STOP_LIMIT);
        assert_eq!(code, 0, "{} stopped with exit code {code}:\n{}", role.program(), child.log());
    }

    /// Kills a daemon (SIGKILL): a crash.
    #[track_caller]
    pub fn kill(&mut self, role: Role) {
        let mut child = self.slot(role).take().unwrap_or_else(|| panic!("{} does not run", role.program()));
        let code = child.end_with(Signal::SIGKILL, STOP_LIMIT);
        assert_eq!(code, 128 + 9, "{} had ended by itself:\n{}", role.program(), child.log());
    }

    /// After somebody else killed it: waits for its end, so that it can be started again.
    #[track_caller]
    pub fn reap(&mut self, role: Role) {
        let mut child = self.slot(role).take().unwrap_or_else(|| panic!("{} does not run", role.program()));
        assert!(child.wait(STOP_LIMIT).is_some(), "{} runs on", role.program());
    }

    /// Any other signal (SIGSTOP makes a daemon that hangs).
    pub fn signal(&mut self, role: Role, signal: Signal) {
        self.slot(role).as_mut().unwrap().signal(signal);
    }

    /// Stops and starts it.
    #[track_caller]
    pub fn restart(&mut self, role: Role) {
        self.stop(role);
        self.start(role);
    }

    /// Does it run?
    pub fn running(&mut self, role: Role) -> bool {
        self.slot(role).as_mut().is_some_and(|child| child.exit_code().is_none())
    }

    /// Its process id, for `/proc`.
    #[track_caller]
    pub fn pid(&self, role: Role) -> u32 {
        self.child(role).unwrap_or_else(|| panic!("{} does not run", role.program())).pid()
    }

    /// Everything that this role's daemons have logged, over restarts.
    pub fn log(&self, role: Role) -> String {
        std::fs::read_to_string(self.log_path(role)).unwrap_or_default()
    }

    /// Lines logged as WARN or ERROR that hold none of `expected`: a test that ends well has none.
    pub fn unexpected(&self, role: Role, expected: &[&str]) -> Vec<String> {
        let log = self.log(role);
        let bad =
            log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ") || line.contains("panicked"));
        bad.filter(|line| !expected.iter().any(|words| line.contains(words))).map(str::to_owned).collect()
    }

    /// Resident memory in bytes.
    #[track_caller]
    pub fn resident_bytes(&self, role: Role) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid(role))).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// CPU time used so far, user and system.
    #[track_caller]
    pub fn cpu_time(&self, role: Role) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid(role))).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        // USER_HZ is 100 on every architecture that this runs on.
        Duration::from_millis(ticks * 10)
    }

    /// One group of `varve status --json`, if the daemon answers and knows it.
    pub fn group(&self, name: &str) -> Option<serde_json::Value> {
        let out = self.varve(&["status", "--json"]);
        if out.code != 0 {
            return None;
        }
        out.json()["groups"].as_array()?.iter().find(|group| group["name"] == name).cloned()
    }

    #[track_caller]
    fn program(&self, name: &str) -> PathBuf {
        self.programs.as_ref().map_or_else(|| built(name), |dir| dir.join(name))
    }

    fn log_path(&self, role: Role) -> PathBuf {
        self.scratch.join(&format!("{}.log", role.program()))
    }

    fn slot(&mut self, role: Role) -> &mut Option<Child> {
        match role {
            Role::Agent => &mut self.agent,
            Role::Receiver => &mut self.receiver,
        }
    }

    fn child(&self, role: Role) -> Option<&Child> {
        match role {
            Role::Agent => self.agent.as_ref(),
            Role::Receiver => self.receiver.as_ref(),
        }
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        for role in [Role::Agent, Role::Receiver] {
            if let Some(mut child) = self.slot(role).take() {
                child.signal(Signal::SIGTERM);
                if child.wait(STOP_LIMIT).is_none() {
                    child.signal(Signal::SIGKILL);
                    complain(&format!("{} did not stop within {STOP_LIMIT:?}", role.program()));
                }
            }
            if std::thread::panicking() {
                let log = self.log(role);
                let lines: Vec<&str> = log.lines().collect();
                if !lines.is_empty() {
                    let from = lines.len().saturating_sub(60);
                    eprintln!("--- end of {}'s log\n{}", role.program(), lines[from..].join("\n"));
                }
            }
        }
        // Pins below the root vanish with the bpffs that is mounted there: `Scratch` unmounts it.
    }
}

/// Two installations on this machine, enrolled: the recovery side first.
#[derive(Debug)]
pub struct Pair {
    /// The production side, with a running agent.
    pub production: Installation,
    /// The recovery side, with a running receiver.
    pub recovery: Installation,
    /// Where the receiver listens.
    pub address: String,
}

impl Pair {
    /// Does what an operator does, from `receiver init` to a started agent.
    #[track_caller]
    #[expect(clippy::new_without_default, reason = "it starts daemons")]
    pub fn new() -> Self {
        Self::with_agent_config("")
    }

    /// The same with keys in `agent.toml` from the beginning.
    #[track_caller]
    pub fn with_agent_config(config: &str) -> Self {
        let address = format!("127.0.0.1:{}", free_port());
        let mut recovery = Installation::new();
        recovery.varve(&["receiver", "init", "--listen", &address]).ok();
        recovery.start(Role::Receiver);
        let token = recovery.varve(&["host", "invite", "production", "--json"]).ok().json();
        let token = token["token"].as_str().expect("host invite --json has a token").to_owned();
        let mut production = Installation::new();
        if !config.is_empty() {
            std::fs::create_dir_all(production.root().join("etc/varve")).unwrap();
            std::fs::write(production.root().join("etc/varve/agent.toml"), config).unwrap();
        }
        production.varve(&["join", &address, &token]).ok();
        production.start(Role::Agent);
        Pair { production, recovery, address }
    }

    /// Protects volumes as one group; returns the replicas' paths, in the same order.
    #[track_caller]
    pub fn protect(&self, group: &str, volumes: &[&Path]) -> Vec<PathBuf> {
        self.protect_into(group, volumes, self.recovery.scratch())
    }

    /// The same, with the replicas in a place of their own.
    #[track_caller]
    pub fn protect_into(&self, group: &str, volumes: &[&Path], place: &Scratch) -> Vec<PathBuf> {
        let replica = |number| place.join(&format!("{group}-{number}.img"));
        self.protect_onto(group, volumes, (0..volumes.len()).map(replica).collect())
    }

    /// The same, with these replicas: files or devices.
    #[track_caller]
    pub fn protect_onto(&self, group: &str, volumes: &[&Path], replicas: Vec<PathBuf>) -> Vec<PathBuf> {
        let mut args = vec!["protect".into(), group.into()];
        args.extend(volumes.iter().map(|volume| volume.as_os_str().to_owned()));
        for replica in &replicas {
            args.extend(["--replica".into(), replica.clone().into_os_string()]);
        }
        self.production.varve(&args).ok();
        replicas
    }

    /// Waits until everything that was captured up to now is in the replica. Nobody may be writing.
    #[track_caller]
    pub fn wait_applied(&self, group: &str, limit: Duration) {
        let offset = |status: &serde_json::Value, key: &str| -> Option<u64> {
            status[key].as_str()?.rsplit_once(':')?.1.parse().ok()
        };
        let captured = self.production.group(group).and_then(|status| offset(&status, "captured"));
        let captured = captured.unwrap_or_else(|| panic!("{group} has no captured position"));
        let start = Instant::now();
        loop {
            let status = self.production.group(group);
            if status.as_ref().and_then(|status| offset(status, "applied")).is_some_and(|applied| applied >= captured) {
                return;
            }
            assert!(start.elapsed() < limit, "{group}: {captured} is not applied after {limit:?}: {status:#?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until the group is `protected`; panics with the last status when `limit` passes.
    #[track_caller]
    pub fn wait_protected(&self, group: &str, limit: Duration) -> Duration {
        let start = Instant::now();
        loop {
            let status = self.production.group(group);
            if status.as_ref().is_some_and(|group| group["data"] == "protected") {
                return start.elapsed();
            }
            assert!(start.elapsed() < limit, "{group} is not protected after {limit:?}: {status:#?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// A UDP port of loopback that was free a moment ago.
pub fn free_port() -> u16 {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A program of the workspace: in `VARVE_BIN_DIR`, else beside the running test (`target/debug`).
///
/// Cargo does not build other packages' programs for a test, so one that is older than its sources is refused: a
/// test of yesterday's program proves nothing.
#[track_caller]
pub fn built(name: &str) -> PathBuf {
    if let Some(dir) = std::env::var_os("VARVE_BIN_DIR") {
        return PathBuf::from(dir).join(name);
    }
    // target/debug/deps/test-0123 → target/debug
    let own = std::env::current_exe().unwrap();
    let path = own.parent().and_then(Path::parent).unwrap().join(name);
    let hint = "build them first: `cargo build --workspace --bins`, or run `make test`";
    let made = std::fs::metadata(&path)
        .and_then(|meta| meta.modified())
        .unwrap_or_else(|error| panic!("{}: {error}; {hint}", path.display()));
    if let Some(newer) = newer_source(&path, made) {
        panic!("{} is older than {newer}; {hint}", path.display());
    }
    path
}

/// A source of the program (from cargo's dep-info beside it) that changed after it was built.
fn newer_source(program: &Path, built: SystemTime) -> Option<String> {
    let info = std::fs::read_to_string(program.with_extension("d")).ok()?;
    let sources = info.split_once(": ")?.1.replace("\\ ", "\u{0}");
    let changed = |source: &str| {
        let modified = std::fs::metadata(source).and_then(|meta| meta.modified());
        modified.is_ok_and(|modified| modified > built)
    };
    sources.split_whitespace().map(|source| source.replace('\u{0}', " ")).find(|source| changed(source))
}
