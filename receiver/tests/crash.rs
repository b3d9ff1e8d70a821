//! Ends the real receiver at every durable step, in random places of a random stream, and looks at what is left: nothing
//! that was acknowledged may be missing, and in the end the replica is what the source says, bit for bit.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

mod support;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::time::Duration;
use support::agent::{Agent, Got, hello};
use support::stream::{Model, Sent, Source};
use support::{LIMIT, Receiver, assert_equal, seed};
use varve_common::format::MarkKind;
use varve_common::wire::messages::RefusedReason;
use varve_receiver::failpoint;

const VOLUMES: [u64; 2] = [8 << 20, (2 << 20) + 512];

/// A whole stream, made beforehand: the agent can send any part of it again.
struct Tape {
    source: Source,
    begin: u64,
    frames: Vec<Sent>,
    model: Model,
}

impl Tape {
    fn new(seed: u64, bytes: usize, frame_bytes: usize) -> Self {
        let mut source = Source::new(seed, &VOLUMES);
        let begin = source.position;
        let mut frames = vec![source.mark(MarkKind::Begin)];
        let mut model = Model::new(&VOLUMES);
        let mut made = 0;
        while made < bytes {
            let size = source.rng.random_range(100..2 * frame_bytes);
            let sent =
                if source.rng.random_bool(0.5) { source.blocks(0, size.div_ceil(4096)) } else { source.data(size) };
            model.apply(&sent);
            made += sent.bytes.len();
            frames.push(sent);
            match source.rng.random_range(0..40) {
                0 => frames.push(source.mark(MarkKind::GapBegin)),
                1 => frames.push(source.mark(MarkKind::GapEnd)),
                _ => {}
            }
        }
        frames.push(source.mark(MarkKind::GapEnd));
        Self { source, begin, frames, model }
    }

    /// Everything from `position` on; marks at the position itself are sent again, as an agent would that finds that
    /// the receiver may not have them.
    fn from(&self, resume: Option<u64>) -> &[Sent] {
        match resume {
            None => &self.frames,
            Some(position) => {
                let first = self.frames.iter().skip(1).position(|sent| sent.position >= position);
                &self.frames[first.map_or(self.frames.len(), |first| first + 1)..]
            }
        }
    }
}

/// The next frame, or the end if the process has gone: the connection itself would tell only after its idle timeout.
async fn next(agent: &mut Agent, receiver: &mut Receiver) -> Got {
    let read = agent.next();
    tokio::pin!(read);
    let mut tick = tokio::time::interval(Duration::from_millis(20));
    loop {
        tokio::select! {
            got = &mut read => return got,
            _ = tick.tick() => if !receiver.is_running() {
                return Got::End;
            },
        }
    }
}

/// Sends what comes before `until` and waits until all of it is acknowledged or the receiver is gone; gives the highest
/// acknowledged position.
async fn play(
    tape: &Tape,
    mut agent: Agent,
    receiver: &mut Receiver,
    resume: Option<u64>,
    until: u64,
    applied: bool,
) -> u64 {
    let frames: Vec<Sent> = tape.from(resume).iter().filter(|sent| sent.position < until).cloned().collect();
    let last = until >= tape.source.position;
    let marks: Vec<Sent> = if last { tape.frames.last().cloned().into_iter().collect() } else { Vec::new() };
    let end = frames.last().map_or(resume.unwrap_or(0), |sent| sent.end).max(if last { until } else { 0 });
    let mut send = agent.send;
    let sending = tokio::spawn(async move {
        for sent in frames.into_iter().chain(marks) {
            if send.write_all(&sent.bytes).await.is_err() {
                return None;
            }
        }
        // Kept open: a finished stream is a session that ended.
        Some(send)
    });
    agent.send = agent.connection.open_uni().await.unwrap_or_else(|_| panic!("gone before it began"));
    while agent.durable < end || (applied && agent.applied < end) {
        match next(&mut agent, receiver).await {
            Got::Ack(_) => {}
            Got::End => {
                agent.connection.close(0u32.into(), b"");
                break;
            }
            Got::Refused(refused) => panic!("{refused:?}"),
            other => panic!("{other:?}"),
        }
    }
    let _kept = tokio::time::timeout(LIMIT, sending).await;
    agent.durable
}

/// A step that must come is waited for; one that may come gets a while.
const SURELY: Duration = Duration::from_secs(60);
const PERHAPS: Duration = Duration::from_millis(400);

/// One life with a failpoint after another, and at last one without. `patience`: how long each waits for its failpoint.
async fn crash_at(names: &[String], seed: u64, bytes: usize, patience: Duration) -> usize {
    let tape = Tape::new(seed, bytes, 30_000);
    let mut receiver = Receiver::new();
    receiver.start(None);
    let identity = receiver.enrol("production").await;
    receiver.stop();
    let mut acknowledged = 0;
    let mut crashes = 0;
    let lives = names.len() as u64 + 1;
    for (life, name) in (1..).zip(names.iter().map(String::as_str).map(Some).chain([None])) {
        let until = tape.begin + (tape.source.position - tape.begin) / lives * life;
        let until = if name.is_none() { tape.source.position } else { until };
        receiver.start(name);
        if !receiver.is_running() {
            crashes += 1;
            continue;
        }
        let Ok(connection) = varve_net::endpoint::connect(&identity, &receiver.address()).await else {
            assert!(name.is_some());
            receiver.wait();
            continue;
        };
        let greeted = match Agent::try_on(connection).await {
            Some(mut agent) => greet(&mut agent, &mut receiver, &tape).await.map(|answer| (agent, answer)),
            None => None,
        };
        let Some((agent, answer)) = greeted else {
            assert!(name.is_some(), "the receiver ended without a failpoint");
            assert!(!receiver.wait().success());
            crashes += 1;
            continue;
        };
        if let Some(resume) = answer {
            assert!(resume >= acknowledged, "{name:?}: goes on at {resume}, acknowledged was {acknowledged}");
        } else {
            assert_eq!(acknowledged, 0, "{name:?}: what was acknowledged is not known any more");
        }
        acknowledged = acknowledged.max(play(&tape, agent, &mut receiver, answer, until, name.is_none()).await);
        if name.is_none() {
            break;
        }
        // The failpoint may lie in what goes on afterwards; if not, this life ends in another way.
        let start = std::time::Instant::now();
        while receiver.is_running() && start.elapsed() < patience {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if receiver.is_running() {
            receiver.kill();
        } else {
            assert!(!receiver.wait().success());
            crashes += 1;
        }
    }
    let group = receiver.wait_for("db", "applied", |group| group.applied == group.durable);
    assert_eq!(group.gap_reason, None, "the last mark of the stream");
    for (number, model) in tape.model.volumes.iter().enumerate() {
        assert_equal(&receiver.replica("db", number), model, &format!("volume {number}"));
    }
    let log = receiver.log();
    assert!(!log.contains("lost data"), "{log}");
    crashes
}

/// `None`: the receiver died before it answered.
async fn greet(agent: &mut Agent, receiver: &mut Receiver, tape: &Tape) -> Option<Option<u64>> {
    let hail = hello("db", &tape.source, tape.begin);
    agent.control(varve_common::wire::FrameKind::Hello, 0, &hail).await;
    match next(agent, receiver).await {
        Got::Welcome(welcome) => Some(welcome.resume),
        Got::End => None,
        other => panic!("{other:?}"),
    }
}

/// Every failpoint alone, early and late.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_step_in_turn() {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    for name in failpoint::ALL {
        eprintln!("{name}");
        // A tape may have nothing to replace in its first half; not all of them.
        let mut reached = 0;
        for patience in [PERHAPS, SURELY / 20, SURELY / 4, SURELY] {
            reached = crash_at(&[format!("{name}:1")], rng.random(), 4 << 20, patience).await;
            if reached > 0 {
                break;
            }
        }
        assert_eq!(reached, 1, "{name} was not reached");
        // How many batches there are is a matter of timing: the later visit may not come.
        crash_at(&[format!("{name}:{}", rng.random_range(2..10))], rng.random(), 12 << 20, PERHAPS).await;
    }
}

/// One crash after another, also while the one before is being recovered from.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_upon_crash() {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    for round in 0..2 {
        // Steps that every life comes to again and again.
        let often: Vec<&str> = failpoint::ALL.into_iter().filter(|name| !name.starts_with("group")).collect();
        let any = |_| format!("{}:{}", often[rng.random_range(0..often.len())], rng.random_range(1..5));
        let names: Vec<String> = (0..10).map(any).chain(["land-torn:1".to_owned()]).collect();
        eprintln!("round {round}: {names:?}");
        assert!(crash_at(&names, rng.random(), 40 << 20, PERHAPS).await > 0, "no failpoint was reached");
    }
}

/// Data lies in the log, nothing of it is applied; then a byte of it changes on the disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_log_is_named_and_what_the_agent_still_has_comes_again() {
    let seed = seed();
    let tape = Tape::new(seed, 6 << 20, 30_000);
    let mut receiver = Receiver::new();
    receiver.configure(8, 64);
    receiver.start(Some("apply-before:1"));
    let identity = receiver.enrol("production").await;
    let mut agent = Agent::connect(&identity, &receiver.address()).await;
    assert_eq!(greet(&mut agent, &mut receiver, &tape).await, Some(None));
    let reached = play(&tape, agent, &mut receiver, None, tape.source.position, false).await;
    receiver.wait();
    // Lands more, by lives that die when they begin to apply.
    for _ in 0..3 {
        receiver.start(Some("apply-before:1"));
        if receiver.is_running() {
            receiver.wait();
        }
    }
    let landing = receiver.paths.receiver_group("db").join("landing");
    // The others are empty: made in advance.
    let used = |path: &std::path::PathBuf| std::fs::read(path).unwrap().iter().any(|byte| *byte != 0);
    let path = std::fs::read_dir(&landing).unwrap().map(|entry| entry.unwrap().path()).find(used).unwrap();
    let clean = std::fs::read(&path).unwrap();
    let used = clean.chunks(4096).rposition(|block| block.iter().any(|byte| *byte != 0)).unwrap() * 4096;
    assert!(used > 8192, "something is landed");
    let mut rng = StdRng::seed_from_u64(seed);
    for round in 0..6 {
        let mut bytes = clean.clone();
        let at = rng.random_range(4096..used);
        bytes[at] ^= 1 << rng.random_range(0..8);
        std::fs::write(&path, &bytes).unwrap();
        receiver.start(None);
        let mut agent = Agent::connect(&identity, &receiver.address()).await;
        let resume = greet(&mut agent, &mut receiver, &tape).await.unwrap();
        // Padding and what was torn may change as it likes.
        assert!(resume.is_none_or(|resume| resume <= tape.source.position), "round {round}");
        eprintln!("round {round}: byte {at} of {used}, reached {reached}, resumes at {resume:?}");
        play(&tape, agent, &mut receiver, resume, tape.source.position, true).await;
        receiver.wait_for("db", "applied", |group| group.applied == group.durable && group.gap_reason.is_none());
        for (number, model) in tape.model.volumes.iter().enumerate() {
            assert_equal(&receiver.replica("db", number), model, &format!("round {round}, volume {number}"));
        }
        receiver.kill();
        // As it was before: the mark and the replicas go back as well.
        reset(&receiver, &clean, &path);
    }
}

fn reset(receiver: &Receiver, clean: &[u8], path: &std::path::Path) {
    let dir = receiver.paths.receiver_group("db");
    let text = std::fs::read_to_string(dir.join("group.json")).unwrap();
    let id = text.split("\"id\": \"").nth(1).unwrap()[..32].to_owned();
    let id = u128::from_str_radix(&id, 16).unwrap().to_be_bytes();
    varve_receiver::apply::mark::AppliedFile::create(&dir.join("applied"), id).unwrap();
    for entry in std::fs::read_dir(path.parent().unwrap()).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    std::fs::write(path, clean).unwrap();
    for (number, bytes) in VOLUMES.iter().enumerate() {
        let replica = std::fs::File::create(dir.join(format!("replica-{number}.img"))).unwrap();
        replica.set_len(*bytes).unwrap();
    }
}

/// A small file system is filled up under the landing log, and emptied again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_a_refusal_and_passes() {
    use nix::mount::{MsFlags, mount, umount2};
    let dir = tempfile::Builder::new().prefix("varve-full-").tempdir_in("/var/tmp").unwrap();
    mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some("size=240m")).expect("root is needed");
    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
        }
    }
    let _unmount = Unmount(dir.path().to_owned());
    let tape = Tape::new(seed(), 40 << 20, 30_000);
    let inside = tempfile::tempdir_in(dir.path()).unwrap();
    let mut receiver = Receiver::in_dir(inside);
    receiver.start(None);
    let identity = receiver.enrol("production").await;
    let mut agent = Agent::connect(&identity, &receiver.address()).await;
    assert_eq!(greet(&mut agent, &mut receiver, &tape).await, Some(None));
    let filler = dir.path().join("filler");
    std::fs::write(&filler, vec![1; 256 << 20]).expect_err("the file system is full");
    for sent in &tape.frames {
        agent.say(sent).await;
    }
    let refused = agent.wait_refused().await;
    assert_eq!((refused.reason, refused.retry), (RefusedReason::DiskFull, true), "{refused:?}");
    assert!(receiver.group("db").unwrap().reason.unwrap().contains("No space left"));
    let mut agent = Agent::on(agent.connection.clone()).await;
    let refused = agent.hello(&hello("db", &tape.source, tape.begin)).await.unwrap_err();
    assert_eq!((refused.reason, refused.retry), (RefusedReason::DiskFull, true), "{refused:?}");
    std::fs::remove_file(&filler).unwrap();
    let mut agent = Agent::on(agent.connection.clone()).await;
    let resume = greet(&mut agent, &mut receiver, &tape).await.unwrap();
    play(&tape, agent, &mut receiver, resume, tape.source.position, true).await;
    for (number, model) in tape.model.volumes.iter().enumerate() {
        assert_equal(&receiver.replica("db", number), model, &format!("volume {number}"));
    }
    receiver.stop();
}
