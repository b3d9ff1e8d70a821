//! Disks that fail under the receiver: under the landing log, the history, the replicas. What was acknowledged is never lost,
//! what failed is never taken for done, the operator is told which part it was, and when the disk is well again it goes on.
//!
//! (A full disk and the end of the process at each durable step: `crash.rs`.)
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

mod support;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use quinn::SendStream;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use support::agent::{Agent, Got, hello};
use support::stream::{Model, Sent, Source};
use support::{LIMIT, Receiver, assert_equal, seed};
use varve_common::control::GroupStatus;
use varve_common::format::MarkKind;
use varve_common::wire::messages::{Hello, Refused, RefusedReason};
use varve_net::identity::HostIdentity;
use varve_tests::{Scratch, SlowDevice};

const VOLUME: u64 = 8 << 20;

/// A stream in parts, each to be sent under other circumstances.
struct Script {
    source: Source,
    begin: u64,
    parts: Vec<Vec<Sent>>,
    model: Model,
}

impl Script {
    fn new(parts: usize, frames: usize) -> Self {
        let mut source = Source::new(seed(), &[VOLUME]);
        let begin = source.position;
        let mut model = Model::new(&[VOLUME]);
        let parts = (0..parts).map(|_| {
            let mut part = Vec::new();
            for _ in 0..frames {
                let sent = source.blocks(0, 24);
                model.apply(&sent);
                part.push(sent);
            }
            part
        });
        let parts = parts.collect();
        Self { source, begin, parts, model }
    }

    fn hello(&self, replica: Option<&Path>) -> Hello {
        let mut hello = hello("db", &self.source, self.begin);
        hello.volumes[0].replica = replica.map(|path| path.display().to_string());
        hello
    }

    /// The frames of the first `parts` parts from `resume` on, the marks as an agent sets them.
    fn from(&self, resume: Option<u64>, parts: usize) -> Vec<Vec<u8>> {
        let mark = |kind, position| {
            let mut source = Source::new(0, &[VOLUME]);
            (source.incarnation, source.position, source.epoch) =
                (self.source.incarnation, position, self.source.epoch);
            source.mark(kind).bytes
        };
        let mut out = Vec::new();
        if resume.is_none() {
            out.push(mark(MarkKind::Begin, self.begin));
            out.push(mark(MarkKind::GapEnd, self.begin));
        }
        let from = resume.unwrap_or(self.begin);
        out.extend(
            self.parts[..parts].iter().flatten().filter(|sent| sent.position >= from).map(|sent| sent.bytes.clone()),
        );
        out
    }

    fn end(&self, parts: usize) -> u64 {
        self.parts[parts - 1].last().unwrap().end
    }
}

/// One production host, which remembers what was acknowledged.
struct Host {
    receiver: Receiver,
    identity: HostIdentity,
    script: Script,
    replica: Option<PathBuf>,
    acknowledged: u64,
}

impl Host {
    async fn new(script: Script, replica: Option<&Path>) -> Self {
        let mut receiver = Receiver::new();
        receiver.start(None);
        let identity = receiver.enrol("production").await;
        Self { receiver, identity, script, replica: replica.map(Path::to_owned), acknowledged: 0 }
    }

    /// Connects and sends up to the end of the first `parts` parts, until all of it is acknowledged and applied; or why the
    /// receiver refuses.
    async fn session(&mut self, parts: usize) -> Option<Refused> {
        let mut agent = Agent::connect(&self.identity, &self.receiver.address()).await;
        let resume = match agent.hello(&self.script.hello(self.replica.as_deref())).await {
            Ok(welcome) => welcome.resume,
            Err(refused) => return Some(refused),
        };
        match resume {
            Some(resume) => assert!(resume >= self.acknowledged, "{resume}: acknowledged was {}", self.acknowledged),
            None => assert_eq!(self.acknowledged, 0, "what was acknowledged is not known any more"),
        }
        let frames = self.script.from(resume, parts);
        let (mut send, mut agent) = agent.split().await;
        let sending = tokio::spawn(async move {
            for frame in frames {
                if send.write_all(&frame).await.is_err() {
                    return None;
                }
            }
            Some::<SendStream>(send)
        });
        let end = self.script.end(parts);
        let mut refused = None;
        // On a failing disk the last ack may be that of the landing log: then the refusal follows.
        while refused.is_none() && (agent.durable < end || agent.applied < end) {
            match agent.next().await {
                Got::Ack(_) => {}
                Got::Refused(why) => refused = Some(why),
                other => panic!("{other:?}: {}", self.receiver.log()),
            }
        }
        self.acknowledged = self.acknowledged.max(agent.durable);
        agent.connection.close(0u32.into(), b"");
        let _kept = tokio::time::timeout(LIMIT, sending).await;
        refused
    }

    async fn goes_well(&mut self, parts: usize) {
        let start = std::time::Instant::now();
        loop {
            match self.session(parts).await {
                None => return,
                // The session before has not left its desk yet.
                Some(refused) if refused.reason == RefusedReason::Busy => {}
                Some(refused) => panic!("{refused:?}"),
            }
            assert!(start.elapsed() < LIMIT);
        }
    }

    /// Sends while the disk fails: refused for its storage, which may pass; named in the status and by an alert.
    async fn fails(&mut self, parts: usize, part_of_group: &str) -> GroupStatus {
        let refused = self.session(parts).await.expect("the disk fails");
        assert_eq!((refused.reason, refused.retry), (RefusedReason::Storage, true), "{refused:?}");
        assert!(refused.text.contains(part_of_group), "'{part_of_group}' in: {}", refused.text);
        assert!(!refused.next.is_empty());
        let alerted = |group: &GroupStatus| group.alerts.iter().any(|alert| alert.id == "storage-failed");
        let group = self.receiver.wait_for("db", "alerted", alerted);
        assert!(group.reason.as_ref().is_some_and(|reason| reason.contains(part_of_group)), "{group:#?}");
        group
    }

    fn replica_is_right(&self, replica: &[u8]) {
        self.receiver.wait_for("db", "applied", |group| group.applied == group.durable);
        assert_equal(replica, &self.script.model.volumes[0], "the replica");
    }
}

/// A file that makes a disk fail while it is there.
struct Trigger(PathBuf);

impl Trigger {
    fn new(scratch: &Scratch) -> Self {
        Self(scratch.join("fail"))
    }

    fn on(&self) {
        std::fs::write(&self.0, "").unwrap();
    }

    fn off(&self) {
        std::fs::remove_file(&self.0).unwrap();
    }

    /// A disk on which requests of a kind (`pread`, `pwrite`) fail.
    fn disk(&self, scratch: &Scratch, bytes: u64, kind: &str) -> SlowDevice {
        let file = self.0.display();
        let parameters =
            [format!("error-{kind}=EIO"), format!("error-{kind}-rate=100%"), format!("error-{kind}-file={file}")];
        SlowDevice::with_filters(scratch, "disk", bytes, &["error"], &parameters.each_ref().map(String::as_str))
    }
}

/// What a block device holds, past every cache.
fn content(device: &Path) -> Vec<u8> {
    let path = device.display();
    let output =
        Command::new("dd").args([&format!("if={path}"), "bs=1M", "iflag=direct", "status=none"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_cannot_be_written() {
    let scratch = Scratch::disk();
    let trigger = Trigger::new(&scratch);
    let disk = trigger.disk(&scratch, VOLUME, "pwrite");
    let mut host = Host::new(Script::new(4, 20), Some(disk.path())).await;
    host.goes_well(1).await;
    trigger.on();
    let failed = host.fails(2, "replica").await;
    assert_ne!(failed.applied, failed.durable, "what failed is not taken for applied");
    // Again, from what is really there: still not.
    host.fails(3, "replica").await;
    trigger.off();
    host.goes_well(4).await;
    host.replica_is_right(&content(disk.path()));
    let cleared = |group: &GroupStatus| group.alerts.iter().all(|alert| alert.id != "storage-failed");
    host.receiver.wait_for("db", "cleared", cleared);
    host.receiver.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_cannot_be_read() {
    let scratch = Scratch::disk();
    let trigger = Trigger::new(&scratch);
    let disk = trigger.disk(&scratch, VOLUME, "pread");
    let mut host = Host::new(Script::new(3, 40), Some(disk.path())).await;
    host.goes_well(1).await;
    // What was just written is remembered; after a restart it has to be read before it is replaced.
    host.receiver.stop();
    host.receiver.start(None);
    trigger.on();
    let failed = host.fails(2, "replica").await;
    assert_ne!(failed.applied, failed.durable);
    trigger.off();
    host.goes_well(3).await;
    host.replica_is_right(&content(disk.path()));
    host.receiver.stop();
}

/// A sync that failed may have lost what was written before it: it must be written again, not only synced again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sync_that_fails_once_and_loses_what_was_written() {
    let scratch = Scratch::disk();
    let trigger = Trigger::new(&scratch);
    let (disk, held) = SlowDevice::forgetful(&scratch, "disk", VOLUME, &trigger.0);
    let mut host = Host::new(Script::new(4, 10), Some(disk.path())).await;
    host.goes_well(1).await;
    for parts in 2..=4 {
        trigger.on();
        let failed = host.session(parts).await;
        assert!(!trigger.0.exists(), "the disk was synced");
        if let Some(refused) = failed {
            assert_eq!((refused.reason, refused.retry), (RefusedReason::Storage, true), "{refused:?}");
            assert!(refused.text.contains("replica"), "{refused:?}");
        } else {
            panic!("a failed sync was taken for a good one");
        }
        host.goes_well(parts).await;
    }
    host.receiver.stop();
    assert_equal(&std::fs::read(held).unwrap(), &host.script.model.volumes[0], "what the disk holds");
}

/// A directory of the group on a disk of its own, which fails while the group runs.
async fn a_directory_that_cannot_be_written(name: &str, part_of_group: &str) {
    let scratch = Scratch::disk();
    let trigger = Trigger::new(&scratch);
    let disk = trigger.disk(&scratch, 160 << 20, "pwrite");
    let mut host = Host::new(Script::new(4, 60), None).await;
    host.goes_well(1).await;
    host.receiver.stop();
    let dir = host.receiver.paths.receiver_group("db").join(name);
    let made = Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(disk.path()).status().unwrap();
    assert!(made.success());
    let old = dir.with_extension("old");
    std::fs::rename(&dir, &old).unwrap();
    std::fs::create_dir(&dir).unwrap();
    let mounted = Mounted::new(disk.path(), &dir);
    let copied = Command::new("cp").args(["-a", "--"]).arg(old.join(".")).arg(&dir).status().unwrap();
    assert!(copied.success());
    // What a copy has in memory only would be lost by the copy, not by the receiver.
    nix::unistd::sync();
    host.receiver.start(None);
    host.goes_well(2).await;
    trigger.on();
    host.fails(3, part_of_group).await;
    trigger.off();
    // The file system has given up as well; its operator mends it.
    host.receiver.stop();
    drop(mounted);
    let checked = Command::new("fsck.ext4").args(["-p", "-f"]).arg(disk.path()).output().unwrap();
    assert!(checked.status.code().is_some_and(|code| code <= 1), "{}", String::from_utf8_lossy(&checked.stdout));
    let mounted = Mounted::new(disk.path(), &dir);
    host.receiver.start(None);
    host.goes_well(4).await;
    host.replica_is_right(&host.receiver.replica("db", 0));
    let log = host.receiver.log();
    assert!(!log.contains("lost data") && !log.contains("panicked"), "{log}");
    host.receiver.stop();
    drop(mounted);
}

/// A mount, and its device.
struct Mounted(PathBuf, PathBuf);

impl Mounted {
    fn new(device: &Path, at: &Path) -> Self {
        mount(Some(device), at, Some("ext4"), MsFlags::empty(), None::<&str>).expect("root is needed");
        Self(at.to_owned(), device.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let start = std::time::Instant::now();
        while let Err(error) = umount2(&self.0, MntFlags::empty()) {
            if start.elapsed() > Duration::from_secs(5) {
                let _ = umount2(&self.0, MntFlags::MNT_DETACH);
                assert!(std::thread::panicking(), "{}: {error}", self.0.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        // A mount namespace that was made meanwhile (other tests make some) has it mounted until it goes.
        let exclusive = || OpenOptions::new().read(true).custom_flags(nix::libc::O_EXCL).open(&self.1);
        while exclusive().is_err() && start.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_landing_log_that_cannot_be_written() {
    a_directory_that_cannot_be_written("landing", "landing log").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_history_that_cannot_be_written() {
    a_directory_that_cannot_be_written("history", "history").await;
}
