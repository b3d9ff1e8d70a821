//! A receiver under test (the real program, below a root of its own) and an agent that is played by the test.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod agent;
pub mod host;
pub mod looker;
pub mod media;
pub mod nbd;
pub mod past;
pub mod stream;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use varve_common::control::{GroupStatus, InviteReply, ReceiverRequest, Reply, StatusReply};
use varve_common::paths::Paths;
use varve_net::identity::{Authority, HostIdentity};
use varve_net::local::LocalClient;
use varve_net::token::JoinToken;
use varve_receiver::failpoint;

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A receiver and its root. Dropping it ends the process (only this one) and removes everything.
pub struct Receiver {
    pub dir: tempfile::TempDir,
    pub paths: Paths,
    child: Option<Child>,
}

impl Receiver {
    /// Set up with small landing segments, not started.
    pub fn new() -> Self {
        Self::in_dir(tempfile::Builder::new().prefix("varve-receiver-").tempdir_in("/var/tmp").unwrap())
    }

    pub fn in_dir(dir: tempfile::TempDir) -> Self {
        let paths = Paths::new(dir.path().join("r"));
        Authority::create(&paths.receiver_identity(), "test").unwrap();
        let receiver = Self { dir, paths, child: None };
        receiver.configure(8, 32);
        receiver
    }

    pub fn configure(&self, segment_mib: u32, max_mib: u32) {
        let text =
            format!("listen = \"127.0.0.1:0\"\nlanding_segment_mib = {segment_mib}\nlanding_max_mib = {max_mib}\n");
        std::fs::write(self.paths.receiver_config(), text).unwrap();
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// While it is there nothing is applied.
    pub fn held_path(&self) -> PathBuf {
        self.dir.path().join("held")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Starts it, with a failpoint if one is named, and waits until it answers.
    pub fn start(&mut self, failpoint: Option<&str>) {
        assert!(self.child.is_none());
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_varve-receiver"));
        command.arg("--root").arg(self.paths.root()).env("VARVE_FAILPOINT", failpoint.unwrap_or_default());
        command.env("VARVE_HOLD", format!("{}:{}", failpoint::APPLY_HELD, self.held_path().display()));
        command.env_remove("NOTIFY_SOCKET").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().unwrap());
        let start = Instant::now();
        while self.try_status().is_none() {
            if let Some(code) = self.child.as_mut().unwrap().try_wait().unwrap() {
                self.child = None;
                assert!(failpoint.is_some(), "the receiver ended with {code}:\n{}", self.log());
                return;
            }
            assert!(start.elapsed() < LIMIT, "the receiver does not answer:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends it as systemd does; it must exit with 0.
    pub fn stop(&mut self) {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        let code = self.wait();
        assert!(code.success(), "{code}:\n{}", self.log());
    }

    pub fn kill(&mut self) {
        self.signal(nix::sys::signal::Signal::SIGKILL);
        self.wait();
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = self.child.as_ref().unwrap().id();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal).unwrap();
    }

    /// Waits for its end, however it comes.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(code) = self.child.as_mut().unwrap().try_wait().unwrap() {
                self.child = None;
                return code;
            }
            if start.elapsed() > LIMIT {
                panic!("the receiver does not end:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Forgets a process that has ended by itself.
    pub fn reap(&mut self) {
        if self.child.is_some() {
            self.wait();
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    fn ask<T: serde::de::DeserializeOwned>(&self, request: &ReceiverRequest) -> Option<Reply<T>> {
        let mut client = LocalClient::connect(&self.paths.receiver_socket()).ok()?;
        client.request(request).ok()?;
        loop {
            match client.reply().ok().flatten()? {
                Reply::Progress(_) => {}
                last => return Some(last),
            }
        }
    }

    pub fn request<T: serde::de::DeserializeOwned>(&self, request: &ReceiverRequest) -> Reply<T> {
        self.ask(request).unwrap_or_else(|| panic!("no answer to {request:?}:\n{}", self.log()))
    }

    pub fn done<T: serde::de::DeserializeOwned + std::fmt::Debug>(&self, request: &ReceiverRequest) -> T {
        match self.request(request) {
            Reply::Done(answer) => answer,
            other => panic!("{request:?}: {other:?}"),
        }
    }

    fn try_status(&self) -> Option<StatusReply> {
        match self.ask(&ReceiverRequest::Status { group: None })? {
            Reply::Done(status) => Some(status),
            _ => None,
        }
    }

    pub fn address(&self) -> String {
        self.try_status().unwrap().daemons[0].address.clone().unwrap()
    }

    /// `None`: it does not answer.
    pub fn try_address(&self) -> Option<String> {
        self.try_status()?.daemons[0].address.clone()
    }

    /// `None`: it does not answer, or has no such group.
    pub fn try_group(&self, name: &str) -> Option<GroupStatus> {
        self.group(name)
    }

    pub fn group(&self, name: &str) -> Option<GroupStatus> {
        self.try_status()?.groups.into_iter().find(|group| group.name == name)
    }

    /// Waits until the group's status is as wanted.
    pub fn wait_for(&self, name: &str, what: &str, wanted: impl Fn(&GroupStatus) -> bool) -> GroupStatus {
        let start = Instant::now();
        loop {
            let group = self.group(name);
            if let Some(group) = group.as_ref().filter(|group| wanted(group)) {
                return group.clone();
            }
            assert!(start.elapsed() < LIMIT, "not {what}: {group:#?}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Enrols a host as an operator does.
    pub async fn enrol(&self, name: &str) -> HostIdentity {
        let invite: InviteReply = self.done(&ReceiverRequest::Invite { name: name.into(), ttl_seconds: 60 });
        let token = JoinToken::decode(&invite.token).unwrap();
        varve_net::endpoint::join(&self.address(), &token).await.unwrap()
    }

    pub fn replica(&self, group: &str, number: usize) -> Vec<u8> {
        std::fs::read(self.paths.receiver_group(group).join(format!("replica-{number}.img"))).unwrap()
    }

    /// Lines of WARN or ERROR that hold none of the words.
    pub fn unexpected(&self, expected: &[&str]) -> Vec<String> {
        let log = self.log();
        // What the watch tells depends on how long a test takes; tests/tests/watch.rs judges it.
        let told = |line: &&str| !line.contains("varve_io::watcher");
        let bad = log
            .lines()
            .filter(told)
            .filter(|line| line.contains(" WARN ") || line.contains(" ERROR ") || line.contains("panicked"));
        bad.filter(|line| !expected.iter().any(|word| line.contains(word))).map(str::to_owned).collect()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- the receiver's log\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        }
    }
}

/// A seed from `VARVE_SEED` or at random, printed so that a failure can be replayed.
pub fn seed() -> u64 {
    let seed = std::env::var("VARVE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    eprintln!("replay this test with VARVE_SEED={seed}");
    seed
}

/// First difference of two images, in words.
#[track_caller]
pub fn assert_equal(replica: &[u8], model: &[u8], what: &str) {
    assert_eq!(replica.len(), model.len(), "{what}: size");
    if let Some(at) = replica.iter().zip(model).position(|(a, b)| a != b) {
        panic!("{what}: differs at byte {at} (block {}): {:#x} instead of {:#x}", at / 4096, replica[at], model[at]);
    }
}

pub fn file(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}
