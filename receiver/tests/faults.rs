//! Disks that fail under the receiver: under the landing log, the history, the replicas. What was acknowledged is never lost,
//! what failed is never taken for done, the operator is told which part it was, and when the disk is well again it goes on.
//!
//! (A full disk and the end of the process at each durable step: `crash.rs`. The power of the receiver's host: `power.rs`.)
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

mod support;

use quinn::SendStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use support::agent::{Agent, Got, hello};
use support::media::{Faults, Media, Mounted};
use support::stream::{Model, Sent, Source, record};
use support::{LIMIT, Receiver, assert_equal, seed};
use varve_common::control::{GroupStatus, PointsReply, ReceiverRequest, RetentionReply, ScrubReply};
use varve_common::format::MarkKind;
use varve_common::record::RecordKind;
use varve_common::wire::messages::{Hello, Refused, RefusedReason};
use varve_export::device::Attached;
use varve_net::identity::HostIdentity;
use varve_tests::Scratch;

const VOLUME: u64 = 8 << 20;

/// A stream in parts, each to be sent under other circumstances.
struct Script {
    source: Source,
    begin: u64,
    parts: Vec<Vec<Sent>>,
    model: Model,
}

/// With which a part begins.
fn bookmark(part: usize) -> String {
    format!("part-{part}")
}

impl Script {
    fn new(parts: usize, frames: usize) -> Self {
        let mut source = Source::new(seed(), &[VOLUME]);
        let begin = source.position;
        let mut model = Model::new(&[VOLUME]);
        let parts = (0..parts).map(|number| {
            let mut part =
                vec![source.frame(&record(RecordKind::Bookmark, 0, 0, 0, bookmark(number).as_bytes()), Vec::new())];
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

/// Layers are closed when they have so many MiB.
fn layers_of(receiver: &Receiver, mib: u32) {
    receiver.configure(8, 32);
    let config = receiver.paths.receiver_config();
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("{text}history_layer_mib = {mib}\n")).unwrap();
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
        layers_of(&receiver, 1);
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
        if frames.is_empty() && resume.is_some_and(|resume| resume >= self.script.end(parts)) {
            // Everything was landed before: there is nothing to acknowledge any more.
            let applied = |group: &GroupStatus| group.durable.is_some() && group.applied == group.durable;
            self.receiver.wait_for("db", "applied", applied);
            agent.connection.close(0u32.into(), b"");
            return None;
        }
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
        self.receiver.wait_for("db", "applied", |group| group.durable.is_some() && group.applied == group.durable);
        assert_equal(replica, &self.script.model.volumes[0], "the replica");
    }
}

/// A device as the replica, with which the script begins.
async fn device(parts: usize, frames: usize) -> (Scratch, Arc<Media>, Attached, Host) {
    let scratch = Scratch::disk();
    let media = Media::new(VOLUME, seed());
    let device = media.attach(&scratch.dir("device"));
    let mut host = Host::new(Script::new(parts, frames), Some(device.path())).await;
    host.goes_well(1).await;
    (scratch, media, device, host)
}

/// Everything is applied, and lasts.
fn device_is_right(host: &mut Host, media: &Media) {
    host.receiver.wait_for("db", "applied", |group| group.durable.is_some() && group.applied == group.durable);
    host.receiver.stop();
    assert_equal(&media.kept(), &host.script.model.volumes[0], "what the disk holds");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_cannot_be_written() {
    let (_scratch, media, _device, mut host) = device(4, 20).await;
    media.fail(WRITES);
    let failed = host.fails(2, "replica").await;
    assert_ne!(failed.applied, failed.durable, "what failed is not taken for applied");
    // Again, from what is really there: still not.
    host.fails(3, "replica").await;
    media.fail(NONE);
    host.goes_well(4).await;
    let cleared = |group: &GroupStatus| group.alerts.iter().all(|alert| alert.id != "storage-failed");
    host.receiver.wait_for("db", "cleared", cleared);
    device_is_right(&mut host, &media);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_cannot_be_read() {
    let (_scratch, media, _device, mut host) = device(3, 40).await;
    // What was just written is remembered; after a restart it has to be read before it is replaced.
    host.receiver.stop();
    host.receiver.start(None);
    media.fail(READS);
    let failed = host.fails(2, "replica").await;
    assert_ne!(failed.applied, failed.durable);
    media.fail(NONE);
    host.goes_well(3).await;
    device_is_right(&mut host, &media);
}

/// A sync that failed may have lost what was written before it: it must be written again, not only synced again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sync_that_fails_once_and_loses_what_was_written() {
    let (_scratch, media, _device, mut host) = device(5, 10).await;
    for parts in 2..=5 {
        media.fail(Faults { next_flush_loses: true, ..NONE });
        let Some(refused) = host.session(parts).await else { panic!("a failed sync was taken for a good one") };
        assert_eq!(media.failed(), 1, "the disk was synced, and nothing else failed");
        assert_eq!((refused.reason, refused.retry), (RefusedReason::Storage, true), "{refused:?}");
        assert!(refused.text.contains("replica"), "{refused:?}");
        host.goes_well(parts).await;
    }
    device_is_right(&mut host, &media);
}

/// A part of the group's files on a disk of its own. The others stay where they are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Landing,
    Layers,
    Indexes,
    Chronicle,
    /// The applied mark, and `group.json`.
    Mark,
    Replica,
}

/// What a refusal names: the part, and what of it is in the path.
fn words(part: Part) -> [&'static str; 2] {
    match part {
        Part::Landing => ["the landing log", "/landing/"],
        Part::Layers => ["the history", "/layers/"],
        Part::Indexes => ["the history", "/runs/"],
        Part::Chronicle => ["the history", "/chronicle"],
        Part::Mark => ["the applied mark", "/applied"],
        Part::Replica => ["replica", "r.img"],
    }
}

struct Bed {
    host: Host,
    disk: Mounted,
    scratch: Scratch,
}

impl Bed {
    /// The first part of the script is done, then `part` moves to its own disk, and the second part is done there.
    async fn new(part: Part) -> Self {
        let scratch = Scratch::disk();
        let media = Media::new(192 << 20, seed());
        let (dir, elsewhere) = (scratch.dir("device"), scratch.dir("elsewhere"));
        let replica_dir = scratch.dir("replica");
        if part == Part::Replica {
            let disk = Mounted::ext4(&media, &dir, &replica_dir);
            let mut host = Host::new(Script::new(6, 60), Some(&replica_dir.join("r.img"))).await;
            host.goes_well(2).await;
            return Self { host, disk, scratch };
        }
        let mut host = Host::new(Script::new(6, 60), Some(&replica_dir.join("r.img"))).await;
        host.goes_well(1).await;
        host.receiver.stop();
        let group = host.receiver.paths.receiver_group("db");
        let (point, away): (PathBuf, &[&str]) = match part {
            Part::Landing => (group.join("landing"), &[]),
            Part::Layers => (group.join("history/layers"), &[]),
            Part::Indexes => (group.join("history/runs"), &[]),
            Part::Chronicle => (group.join("history"), &["layers", "runs"]),
            Part::Mark | Part::Replica => (group.clone(), &["landing", "history"]),
        };
        for name in away {
            std::fs::rename(point.join(name), elsewhere.join(name)).unwrap();
            std::os::unix::fs::symlink(elsewhere.join(name), point.join(name)).unwrap();
        }
        let old = point.with_extension("old");
        std::fs::rename(&point, &old).unwrap();
        std::fs::create_dir(&point).unwrap();
        let disk = Mounted::ext4(&media, &dir, &point);
        let copied = Command::new("cp").args(["-a", "--"]).arg(old.join(".")).arg(&point).status().unwrap();
        assert!(copied.success());
        std::fs::remove_dir_all(&old).unwrap();
        // What a copy has in memory only would be lost by the copy, not by the receiver.
        nix::unistd::sync();
        // The newest layer is open when the disk under it fails; the newest index is one of a layer that was closed.
        layers_of(&host.receiver, if part == Part::Layers { 64 } else { 1 });
        host.receiver.start(None);
        host.goes_well(2).await;
        Self { host, disk, scratch }
    }

    /// Nothing that was said is missing.
    fn is_whole(&self) {
        self.host.replica_is_right(&std::fs::read(self.scratch.path().join("replica/r.img")).unwrap());
        let points = ReceiverRequest::Points { group: "db".into(), from_ns: None, to_ns: None };
        let points: PointsReply = self.host.receiver.done(&points);
        assert!(points.damaged.is_empty(), "{:?}", points.damaged);
        let there: Vec<&str> =
            points.bookmarks.iter().filter(|mark| mark.recoverable).map(|mark| mark.name.as_str()).collect();
        assert_eq!(there, (0..6).map(bookmark).collect::<Vec<_>>());
        let scrub = ReceiverRequest::Scrub { group: "db".into(), bytes_per_second: Some(1 << 30) };
        let scrubbed: ScrubReply = self.host.receiver.done(&scrub);
        assert!(scrubbed.damaged.is_empty() && scrubbed.layers > 0, "{scrubbed:?}");
        let log = self.host.receiver.log();
        assert!(!log.contains("lost data") && !log.contains("panicked") && !log.contains("are lost"), "{log}");
    }
}

/// The mount is inside what the receiver leaves behind.
impl Drop for Bed {
    fn drop(&mut self) {
        if self.host.receiver.is_running() {
            self.host.receiver.kill();
        }
        let unmounted = self.disk.unmount();
        assert!(unmounted.is_ok() || std::thread::panicking(), "{unmounted:?}");
    }
}

impl Bed {
    /// While the group runs: it stops, says which part of it failed, and nothing that it said before is missing when what the
    /// disk had in its cache is gone.
    async fn fails_while_it_runs(&mut self, part: Part, faults: Faults, parts: usize) {
        eprintln!("{part:?}: {faults:?}");
        self.disk.media.fail(faults);
        let [name, path] = words(part);
        let failed = self.host.fails(parts, name).await;
        assert!(self.disk.media.failed() > 0);
        assert!(failed.reason.is_some_and(|reason| reason.contains(path)), "{path}");
        // The host that has such a disk is started again: the power goes first.
        self.host.receiver.stop();
        self.disk.media.cut_power();
        self.disk.power_cycle();
        self.host.receiver.start(None);
        self.host.goes_well(parts).await;
    }

    /// At the start: the group is not opened, says why, and goes on when the disk answers again.
    async fn cannot_be_read(&mut self, part: Part, parts: usize) {
        eprintln!("{part:?}: it cannot be read");
        self.host.receiver.stop();
        self.disk.media.fail(READS);
        self.host.receiver.start(None);
        let [name, path] = words(part);
        let failed = self.host.fails(parts, name).await;
        assert!(failed.reason.is_some_and(|reason| reason.contains(path)), "{path}");
        self.disk.media.fail(NONE);
        self.host.goes_well(parts).await;
    }
}

const NONE: Faults = Faults {
    reads: false,
    writes: false,
    writes_of: None,
    flushes: false,
    next_flush_loses: false,
    cut_at_flush: None,
};
const READS: Faults = Faults { reads: true, ..NONE };
const WRITES: Faults = Faults { writes: true, ..NONE };
const SYNCS: Faults = Faults { flushes: true, ..NONE };

async fn each_fault(part: Part) {
    let mut bed = Bed::new(part).await;
    // What is made anew is needed in each part; what is only read when there is work, is read at the start.
    if part != Part::Indexes && part != Part::Replica {
        bed.cannot_be_read(part, 3).await;
    }
    bed.fails_while_it_runs(part, WRITES, 4).await;
    bed.fails_while_it_runs(part, SYNCS, 5).await;
    bed.host.goes_well(6).await;
    bed.is_whole();
    bed.host.receiver.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_landing_log_that_fails() {
    each_fault(Part::Landing).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_that_fail() {
    each_fault(Part::Layers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn indexes_that_fail() {
    each_fault(Part::Indexes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chronicle_that_fails() {
    each_fault(Part::Chronicle).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_applied_mark_that_fails() {
    each_fault(Part::Mark).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_file_that_fails() {
    each_fault(Part::Replica).await;
}

/// The disk under a part is full: that is what is said, and with room again it goes on by itself.
async fn is_full(part: Part) {
    let mut bed = Bed::new(part).await;
    let path = bed.disk.point.join("filler");
    let filler = std::fs::File::create(&path).unwrap();
    for bytes in [16 << 20, 1 << 20, 64 << 10, 4 << 10] {
        let mut at = filler.metadata().unwrap().len() as i64;
        while nix::fcntl::posix_fallocate(&filler, at, bytes).is_ok() {
            at += bytes;
        }
    }
    let refused = bed.host.session(4).await.expect("the disk is full");
    assert_eq!((refused.reason, refused.retry), (RefusedReason::DiskFull, true), "{refused:?}");
    let [name, path_part] = words(part);
    assert!(refused.text.contains(name) && refused.text.contains(path_part), "{refused:?}");
    assert!(refused.next.contains("free space"), "{refused:?}");
    let alerted = |group: &GroupStatus| group.alerts.iter().any(|alert| alert.id == "storage-failed");
    bed.host.receiver.wait_for("db", "alerted", alerted);
    std::fs::remove_file(path).unwrap();
    drop(filler);
    // The file system gives its room back with the next commit.
    nix::unistd::sync();
    bed.host.goes_well(6).await;
    bed.is_whole();
    bed.host.receiver.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_under_the_history() {
    is_full(Part::Layers).await;
    is_full(Part::Indexes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_under_the_replica() {
    is_full(Part::Replica).await;
}

/// Indexes that the disk does not give: they are made again from their layers, and none is thrown away for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn indexes_that_cannot_be_read() {
    let mut bed = Bed::new(Part::Indexes).await;
    bed.host.receiver.stop();
    let runs = bed.disk.point.clone();
    let names = || {
        let list = std::fs::read_dir(&runs).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = list.filter(|name| name != "lost+found").collect();
        names.sort();
        names
    };
    let before = names();
    assert!(before.len() > 1, "{before:?}");
    // Else they are read from memory.
    bed.disk.power_cycle();
    assert_eq!(names(), before);
    bed.disk.media.fail(READS);
    bed.host.receiver.start(None);
    let group =
        bed.host.receiver.wait_for("db", "opened or not", |group| group.reason.is_some() || group.durable.is_some());
    assert!(bed.disk.media.failed() > 0, "{group:#?}");
    bed.disk.media.fail(NONE);
    for name in &before {
        assert!(names().contains(name), "{name:?} is gone");
    }
    bed.host.goes_well(6).await;
    bed.is_whole();
    bed.host.receiver.stop();
}

/// A write that fails leaves its pages in memory, marked as if they were written. What is only there is not known: it has to be
/// said again, and really be on the disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_failed_sync_left_in_memory_is_not_believed() {
    let mut bed = Bed::new(Part::Chronicle).await;
    let name = bookmark(5).into_bytes();
    bed.disk.media.fail(Faults { writes_of: Some(name), ..NONE });
    let refused = bed.host.session(6).await.expect("the chronicle cannot be written");
    assert!(refused.text.contains("/chronicle"), "{refused:?}");
    bed.disk.media.fail(NONE);
    // The same process goes on, and then nothing is left in any memory.
    bed.host.goes_well(6).await;
    bed.is_whole();
    bed.host.receiver.stop();
    bed.disk.power_cycle();
    bed.host.receiver.start(None);
    bed.is_whole();
    bed.host.receiver.stop();
}

/// An index that cannot be merged, nor made again: what is old goes nevertheless, else the disk fills up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_merge_that_fails_for_ever_keeps_nothing_from_expiring() {
    let mut host = Host::new(Script::new(1, 700), None).await;
    host.goes_well(1).await;
    let layers = host.receiver.group("db").unwrap().history.unwrap().layers;
    assert!(layers > 17, "{layers}");
    host.receiver.stop();
    let history = host.receiver.paths.receiver_group("db").join("history");
    for run in std::fs::read_dir(history.join("runs")).unwrap() {
        let path = run.unwrap().path();
        if !path.file_name().unwrap().to_string_lossy().starts_with("L0-") {
            std::fs::remove_file(path).unwrap();
        }
    }
    // The first block of one that is to be merged, and the first chunk of its layer.
    for (name, at) in [("runs/L0-0000000011.run", 10), ("layers/0000000011.layer", 4096 + 10)] {
        let path = history.join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    host.receiver.start(None);
    let request =
        ReceiverRequest::Retention { group: "db".into(), age_seconds: None, bytes: Some(8 << 20), dry_run: false };
    host.receiver.wait_for("db", "open", |group| group.history.is_some());
    let _: RetentionReply = host.receiver.done(&request);
    let few = |group: &GroupStatus| group.history.as_ref().is_some_and(|history| history.layers < 10);
    host.receiver.wait_for("db", "expired", few);
    let said = host.receiver.log().matches("indexes cannot be merged").count();
    assert!(said <= 1, "said {said} times");
    host.receiver.stop();
}
