//! Attacks on what the receiver says of the past: each test states what must hold; those that fail show how it does not.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]
#![allow(dead_code, reason = "helpers")]

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::Receiver;
use support::agent::{Agent, Got, hello};
use support::host::now_ns;
use support::looker::{Looker, parse_time};
use support::nbd::Nbd;
use support::past::Past;
use support::stream::{Source, record, wire};
use tokio::task::block_in_place;
use varve_common::control::{ExportKind, FailoverReply, ReceiverRequest, RetentionReply, ViewReply};
use varve_common::format::{Mark, MarkKind};
use varve_common::point::PointSpec;
use varve_common::record::{RING_HEADER_BYTES, RecordHeader, RecordKind};
use varve_common::state::GapReason;
use varve_common::wire::{Frame, FrameKind, Image};
use varve_net::identity::HostIdentity;

const GROUP: &str = "db";
const SECOND: u64 = 1_000_000_000;

struct World {
    receiver: Receiver,
    identity: HostIdentity,
    source: Source,
    agent: Option<Agent>,
    looker: Looker,
    time_ns: u64,
    next_image: u64,
    consistent: bool,
}

fn payload(byte: u8, bytes: usize) -> Vec<u8> {
    vec![byte; bytes]
}

impl World {
    async fn new(volumes: &[u64], configuration: &str, dir: Option<&Path>) -> Self {
        let mut receiver = match dir {
            None => Receiver::new(),
            Some(dir) => Receiver::in_dir(tempfile::Builder::new().prefix("varve-").tempdir_in(dir).unwrap()),
        };
        let text = format!(
            "listen = \"127.0.0.1:0\"\nlanding_segment_mib = 8\nlanding_max_mib = 128\nhistory_layer_mib = 1\n{configuration}"
        );
        std::fs::write(receiver.paths.receiver_config(), text).unwrap();
        receiver.start(None);
        let identity = receiver.enrol("production").await;
        let source = Source::new(7, volumes);
        let looker = Looker { paths: receiver.paths.clone(), past: Arc::new(Mutex::new(Past::new(volumes))) };
        let time_ns = now_ns() - 600 * SECOND;
        let mut world =
            Self { receiver, identity, source, agent: None, looker, time_ns, next_image: 1, consistent: false };
        world.connect().await;
        world.mark(MarkKind::Begin, Some(GapReason::InitialSync)).await;
        // The volumes hold zeroes, as the fresh replicas do.
        world.mark(MarkKind::GapEnd, None).await;
        world
    }

    async fn connect(&mut self) -> bool {
        assert!(self.try_connect().await, "refused");
        self.consistent
    }

    /// Whether it was agreed to.
    async fn try_connect(&mut self) -> bool {
        let connection = varve_net::endpoint::connect(&self.identity, &self.receiver.address()).await.unwrap();
        let mut agent = Agent::on(connection).await;
        let welcome = match agent.hello(&hello(GROUP, &self.source, 0)).await {
            Ok(welcome) => welcome,
            Err(refused) => {
                eprintln!("{refused:?}");
                return false;
            }
        };
        eprintln!("welcome {welcome:?}");
        if let Some(position) = welcome.resume {
            agent.durable = position;
            self.source.position = position;
        }
        self.agent = Some(agent);
        self.consistent = welcome.consistent;
        true
    }

    fn disconnect(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.connection.close(0u32.into(), b"");
        }
    }

    async fn raw(&mut self, bytes: &[u8]) {
        self.agent.as_mut().unwrap().raw(bytes).await;
    }

    async fn mark(&mut self, kind: MarkKind, reason: Option<GapReason>) {
        self.time_ns += 1000;
        let mark = Mark {
            kind,
            reason,
            incarnation: self.source.incarnation,
            position: self.source.position,
            time_ns: self.time_ns,
            epoch: 1,
            height_min: 0,
        };
        let body = mark.encode();
        self.raw(&wire(&Frame::plain(FrameKind::Mark, self.source.position, &body), &body)).await;
    }

    fn record(&mut self, kind: RecordKind, offset: u64, length: u64, payload: &[u8]) -> Vec<u8> {
        self.time_ns += 1_000_000;
        let mut plain = record(kind, 0, offset, length, payload);
        let at = RING_HEADER_BYTES as usize + std::mem::offset_of!(RecordHeader, time_ns);
        plain[at..at + 8].copy_from_slice(&self.time_ns.to_le_bytes());
        plain
    }

    fn frame(&mut self, plain: &[u8]) -> Vec<u8> {
        let bytes = wire(&Frame::plain(FrameKind::Data, self.source.position, plain), plain);
        self.source.position += plain.len() as u64;
        bytes
    }

    async fn write(&mut self, offset: u64, content: &[u8]) {
        let plain = self.record(RecordKind::Write, offset, content.len() as u64, content);
        let bytes = self.frame(&plain);
        self.raw(&bytes).await;
    }

    async fn bookmark(&mut self, name: &str) {
        let plain = self.record(RecordKind::Bookmark, 0, 0, name.as_bytes());
        let bytes = self.frame(&plain);
        self.raw(&bytes).await;
    }

    async fn settle(&mut self) {
        let position = self.source.position;
        self.agent.as_mut().unwrap().wait_durable(position, true).await;
    }

    fn image_frame(&mut self, extents: &[(u64, u64, Option<&[u8]>)]) -> Vec<u8> {
        let mut body = Vec::new();
        Image::encode(self.next_image, 0, extents, &mut body);
        self.next_image += 1;
        wire(&Frame::plain(FrameKind::Image, self.source.position, &body), &body)
    }

    fn group_dir(&self) -> std::path::PathBuf {
        self.receiver.paths.receiver_group(GROUP)
    }

    fn open(&self, at: &PointSpec) -> ViewReply {
        block_in_place(|| {
            let start = Instant::now();
            loop {
                match self.looker.open(at) {
                    Some(Ok(view)) => return view,
                    other => assert!(start.elapsed() < Duration::from_secs(20), "{at}: {other:?}"),
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        })
    }

    fn byte_at(&self, at: &PointSpec, offset: u64) -> u8 {
        let view = self.open(at);
        block_in_place(|| {
            let mut nbd = Nbd::open(view.volumes[0].uri.as_ref().unwrap()).unwrap();
            let mut buf = [0xa5; 4096];
            nbd.read(&mut buf, offset).unwrap();
            drop(nbd);
            self.looker.close(&view);
            assert!(buf.iter().all(|byte| *byte == buf[0]));
            buf[0]
        })
    }
}

fn named(name: &str) -> PointSpec {
    PointSpec::Bookmark(name.into())
}

/// In a gap the stream writes what is there already, then an image brings something else, then the receiver crashes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_good_point_survives_an_image_behind_a_write_that_changed_nothing() {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.write(0, &payload(b'o', 4096)).await;
    world.bookmark("good").await;
    world.settle().await;
    assert_eq!(world.byte_at(&named("good"), 0), b'o');
    world.mark(MarkKind::GapBegin, Some(GapReason::RingFull)).await;
    world.bookmark("in-gap").await;
    world.settle().await;
    world.disconnect();
    world.receiver.stop();
    world.receiver.start(Some("apply-after:2"));
    assert!(!world.connect().await);
    let plain = world.record(RecordKind::Write, 0, 4096, &payload(b'o', 4096));
    let mut bytes = world.frame(&plain);
    let image = payload(b'I', 4096);
    bytes.extend(world.image_frame(&[(0, 4096, Some(&image))]));
    world.raw(&bytes).await;
    block_in_place(|| world.receiver.wait());
    world.disconnect();
    world.receiver.start(None);
    world.connect().await;
    assert_eq!(world.byte_at(&named("good"), 0), b'o', "the last good point before the gap");
}

/// The same with a discard of what was zeroes already.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_good_point_survives_an_image_behind_a_discard() {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.write(0, &payload(b'o', 4096)).await;
    world.bookmark("good").await;
    world.settle().await;
    assert_eq!(world.byte_at(&named("good"), 8 << 20), 0);
    world.mark(MarkKind::GapBegin, Some(GapReason::RingFull)).await;
    world.bookmark("in-gap").await;
    world.settle().await;
    world.disconnect();
    world.receiver.stop();
    world.receiver.start(Some("apply-after:1"));
    assert!(!world.connect().await);
    let plain = world.record(RecordKind::Discard, 8 << 20, 8 << 20, &[]);
    let mut bytes = world.frame(&plain);
    let image = payload(b'I', 4096);
    bytes.extend(world.image_frame(&[(8 << 20, 4096, Some(&image))]));
    world.raw(&bytes).await;
    block_in_place(|| world.receiver.wait());
    world.disconnect();
    world.receiver.start(None);
    world.connect().await;
    assert_eq!(world.byte_at(&named("good"), 8 << 20), 0, "the last good point before the gap");
}

/// Images of zeroes are a few bytes each, so many are gathered into one write; what they replace is a region each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_images_of_zeroes_replace_more_than_they_are_long() {
    const REGIONS: u64 = 48;
    let mut world = World::new(&[REGIONS << 20], "", None).await;
    let mebibyte = payload(b'o', 1 << 20);
    for region in 0..REGIONS {
        world.write(region << 20, &mebibyte).await;
    }
    world.bookmark("good").await;
    world.settle().await;
    world.mark(MarkKind::GapBegin, Some(GapReason::RingFull)).await;
    // One write for all of them, so that they wait behind the first.
    let mut bytes = Vec::new();
    for region in 0..REGIONS {
        bytes.extend(world.image_frame(&[(region << 20, 1 << 20, None)]));
    }
    world.raw(&bytes).await;
    let mut done = 0;
    while done < REGIONS {
        match world.agent.as_mut().unwrap().next().await {
            Got::ImageDone(_) => done += 1,
            Got::Ack(_) => {}
            other => panic!("{other:?} instead of an image that is done"),
        }
    }
    world.mark(MarkKind::GapEnd, None).await;
    world.bookmark("zeroes").await;
    world.settle().await;
    for region in [0, 1, REGIONS / 2, REGIONS - 1] {
        assert_eq!(world.byte_at(&named("good"), region << 20), b'o', "what the images replaced");
        assert_eq!(world.byte_at(&named("zeroes"), region << 20), 0);
    }
}

/// Retention would let it go, and the gap is not over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_good_point_outlives_retention_in_a_gap() {
    let mut world = World::new(&[16 << 20], "", None).await;
    many_layers(&mut world, 8).await;
    world.bookmark("good").await;
    world.settle().await;
    let good = world.time_ns;
    world.mark(MarkKind::GapBegin, Some(GapReason::RingFull)).await;
    many_layers(&mut world, 4).await;
    let request = ReceiverRequest::Retention { group: GROUP.into(), age_seconds: None, bytes: Some(1), dry_run: false };
    block_in_place(|| world.looker.done::<RetentionReply>(&request));
    let oldest = |world: &World| world.looker.points().window.from.map(|from| parse_time(&from));
    let until = |what: &str, done: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(20), "waited in vain: {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    // Everything before it may go, and goes.
    block_in_place(|| until("the oldest go", &|| oldest(&world).is_none_or(|from| from + 45 * SECOND > good)));
    for _ in 0..2 {
        assert_eq!(world.byte_at(&named("good"), 0), 17, "the last good point before the gap");
        many_layers(&mut world, 4).await;
    }
    world.mark(MarkKind::GapEnd, None).await;
    many_layers(&mut world, 3).await;
    let gone =
        || world.looker.open(&named("good")).is_some_and(|view| view.map(|view| world.looker.close(&view)).is_err());
    block_in_place(|| until("it goes when the gap is over", &gone));
    assert_eq!(world.byte_at(&PointSpec::Latest, 0), 12);
}

/// One write while the source's clock was wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_was_wrong_once_does_not_cost_the_history() {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.write(0, &payload(1, 4096)).await;
    world.bookmark("first").await;
    for round in 0..12u64 {
        for block in 0..8u64 {
            let mut content = payload(0, 64 << 10);
            rand::RngCore::fill_bytes(&mut world.source.rng, &mut content);
            world.write((1 << 20) + block * (64 << 10), &content).await;
        }
        if round == 11 {
            world.write(0, &payload(2, 4096)).await;
        }
    }
    world.settle().await;
    let request = ReceiverRequest::Retention {
        group: GROUP.into(),
        age_seconds: Some(30 * 86_400),
        bytes: Some(0),
        dry_run: false,
    };
    let _: RetentionReply = block_in_place(|| world.looker.done(&request));
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(world.byte_at(&named("first"), 0), 1, "thirty days are kept");
    let right = world.time_ns;
    // The clock jumps a year ahead for one write, and is set right again.
    world.time_ns += 365 * 86_400 * SECOND;
    world.write(4096, &payload(3, 4096)).await;
    world.settle().await;
    world.time_ns = right + SECOND;
    world.write(0, &payload(4, 4096)).await;
    let after = world.time_ns;
    world.time_ns += SECOND;
    world.write(0, &payload(5, 4096)).await;
    world.settle().await;
    let seen = world.byte_at(&PointSpec::Time(after + 1), 0);
    eprintln!("the point of a second after the jump holds {seen}, the source then held 4");
    tokio::time::sleep(Duration::from_secs(4)).await;
    eprintln!("{:#?}", block_in_place(|| world.looker.points()).window);
    assert_eq!(world.byte_at(&named("first"), 0), 1, "thirty days are kept");
}

/// Bookmarks before anything was written, a restart, a write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_bookmark_before_the_first_write_outlives_a_restart() {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.bookmark("kept").await;
    world.bookmark("another").await;
    world.settle().await;
    let keep = ReceiverRequest::Keep { group: GROUP.into(), bookmark: "kept".into(), keep: true, dry_run: false };
    let _: varve_common::control::KeepReply = block_in_place(|| world.looker.done(&keep));
    assert_eq!(world.byte_at(&named("kept"), 0), 0);
    tokio::time::sleep(Duration::from_millis(500)).await;
    world.disconnect();
    world.receiver.stop();
    world.receiver.start(None);
    world.connect().await;
    world.write(0, &payload(1, 4096)).await;
    world.settle().await;
    assert_eq!(world.byte_at(&named("kept"), 0), 0);
}

/// Two restores to one file, at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_says_verified_left_the_point_it_names() {
    const BYTES: u64 = 256 << 20;
    let mut world = World::new(&[BYTES], "", None).await;
    for at in (0..BYTES).step_by(1 << 20) {
        world.write(at, &payload(1, 256 << 10)).await;
    }
    world.bookmark("one").await;
    for at in (0..BYTES).step_by(1 << 20) {
        world.write(at, &payload(2, 256 << 10)).await;
    }
    world.bookmark("two").await;
    world.settle().await;
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let to = dir.path().join("restored");
    let restore = |name: &str| {
        let (looker, to, at) = (world.looker.clone(), to.clone(), named(name));
        tokio::task::spawn_blocking(move || {
            let request = ReceiverRequest::Restore {
                group: GROUP.into(),
                at,
                volume: "0".into(),
                to: to.display().to_string(),
                dry_run: false,
                force: false,
                dir: None,
            };
            let reply = looker.ask::<varve_common::control::RestoreReply>(&request).unwrap();
            let mut first = [0; 16];
            let read = std::fs::File::open(&to).and_then(|mut file| file.read_exact(&mut first));
            (reply, read.map(|()| first[0]), std::fs::read(&to).map(|all| blake3_of(&all)))
        })
    };
    let one = restore("one");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let two = restore("two");
    let (one, two) = (one.await.unwrap(), two.await.unwrap());
    eprintln!("one: {one:?}\ntwo: {two:?}");
    let last = std::fs::read(&to).unwrap();
    for (reply, byte) in [(&one.0, 1), (&two.0, 2)] {
        if let Ok(reply) = reply {
            assert!(reply.verified);
            assert_eq!(last[0], byte, "{reply:?}");
        }
    }
}

fn blake3_of(bytes: &[u8]) -> String {
    // Only to tell contents apart.
    format!("{:08x}", bytes.iter().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte))))
}

/// The mark cannot be written for a while: the group fails, is opened again, and applies the same once more; a view of a
/// point above the mark is open all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_view_stays_right_while_a_group_that_failed_catches_up() {
    let mut world = World::new(&[4 << 20], "", None).await;
    world.write(0, &payload(1, 4096)).await;
    world.settle().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mark = world.group_dir().join("applied");
    let chattr = |flag: &str| assert!(Command::new("chattr").arg(flag).arg(&mark).status().unwrap().success());
    chattr("+i");
    // Every block again and again, each time something else.
    let mut burst = Vec::new();
    for version in 1..=24u8 {
        let mut plain = Vec::new();
        for piece in 0..16u64 {
            let more = world.record(RecordKind::Write, piece << 16, 64 << 10, &payload(version, 64 << 10));
            plain.extend(more);
            if plain.len() > 400 << 10 {
                burst.extend(world.frame(&plain));
                plain.clear();
            }
        }
        burst.extend(world.frame(&plain));
    }
    world.raw(&burst).await;
    let start = Instant::now();
    while !world.receiver.log().contains("ERROR") && start.elapsed() < Duration::from_secs(10) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    eprintln!("{}", world.receiver.log().lines().filter(|l| l.contains("ERROR")).collect::<Vec<_>>().join("\n"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let view = block_in_place(|| world.looker.open(&PointSpec::Latest)).unwrap();
    let view = view.unwrap_or_else(|problem| panic!("{problem:?}"));
    let uri = view.volumes[0].uri.clone().unwrap();
    let mut truth = vec![0; 1 << 20];
    block_in_place(|| Nbd::open(&uri).unwrap().read(&mut truth, 0).unwrap());
    eprintln!("view of {:?}: first byte {}, last {}", view.point, truth[0], truth[truth.len() - 1]);
    let (stop, wrong, reads) =
        (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let watch = {
        let (stop, wrong, reads, truth) = (stop.clone(), wrong.clone(), reads.clone(), truth.clone());
        std::thread::spawn(move || {
            let mut nbd = Nbd::open(&uri).unwrap();
            let mut buf = vec![0; 64 << 10];
            let mut at = 0;
            let mut first = None;
            while !stop.load(Ordering::Acquire) {
                at = (at + (64 << 10)) % truth.len();
                nbd.read(&mut buf, at as u64).unwrap();
                reads.fetch_add(1, Ordering::Relaxed);
                if buf != truth[at..at + buf.len()] {
                    wrong.fetch_add(1, Ordering::Relaxed);
                    first.get_or_insert((at, buf[0], truth[at]));
                }
            }
            first
        })
    };
    chattr("-i");
    world.disconnect();
    world.connect().await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    stop.store(true, Ordering::Release);
    let first = watch.join().unwrap();
    let (reads, wrong) = (reads.load(Ordering::Relaxed), wrong.load(Ordering::Relaxed));
    assert_eq!(wrong, 0, "of {reads} reads; the first: (at, read, right) {first:?}");
}

/// Writes through NBD.
fn nbd_write(uri: &str, from: u64, bytes: u64) -> std::io::Result<()> {
    let rest = uri.strip_prefix("nbd+unix:///").unwrap();
    let (name, path) = rest.split_once("?socket=").unwrap();
    let mut stream = UnixStream::connect(path)?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    let mut ask = 3u32.to_be_bytes().to_vec();
    ask.extend_from_slice(b"IHAVEOPT");
    ask.extend_from_slice(&1u32.to_be_bytes());
    ask.extend_from_slice(&(name.len() as u32).to_be_bytes());
    ask.extend_from_slice(name.as_bytes());
    stream.write_all(&ask)?;
    stream.read_exact(&mut [0; 10])?;
    let content = vec![0x77; 1 << 20];
    for at in (from..from + bytes).step_by(1 << 20) {
        let mut ask = 0x2560_9513u32.to_be_bytes().to_vec();
        ask.extend_from_slice(&[0, 0, 0, 1]);
        ask.extend_from_slice(&at.to_be_bytes());
        ask.extend_from_slice(&at.to_be_bytes());
        ask.extend_from_slice(&(content.len() as u32).to_be_bytes());
        stream.write_all(&ask)?;
        stream.write_all(&content)?;
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        if error != 0 {
            return Err(std::io::Error::from_raw_os_error(error as i32));
        }
    }
    Ok(())
}

struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

async fn scratch_writes_cost_no_history(mkfs: &[&str]) {
    let outer = tempfile::tempdir_in("/var/tmp").unwrap();
    let (disk, at) = (outer.path().join("disk"), outer.path().join("mnt"));
    std::fs::File::create(&disk).unwrap().set_len(700 << 20).unwrap();
    std::fs::create_dir(&at).unwrap();
    assert!(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&disk).output().unwrap().status.success());
    assert!(Command::new("mount").args(["-o", "loop"]).arg(&disk).arg(&at).status().unwrap().success());
    let _mounted = Mounted(at.clone());
    let mut world = World::new(&[1 << 30], "", Some(&at)).await;
    world.write(0, &payload(1, 4096)).await;
    world.bookmark("first").await;
    for round in 0..20u64 {
        let mut content = payload(0, 512 << 10);
        rand::RngCore::fill_bytes(&mut world.source.rng, &mut content);
        world.write(1 << 20, &content).await;
        world.write(0, &payload(round as u8 + 2, 4096)).await;
        world.settle().await;
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    world.bookmark("last").await;
    world.settle().await;
    assert_eq!(world.byte_at(&named("first"), 0), 1);
    let layers = std::fs::read_dir(world.group_dir().join("history/layers")).unwrap().count();
    let view = block_in_place(|| world.looker.open_as(&named("last"), true, ExportKind::Nbd)).unwrap().unwrap();
    let uri = view.volumes[0].uri.clone().unwrap();
    let free = || {
        let stat = nix::sys::statvfs::statvfs(&at).unwrap();
        (stat.blocks_available() * stat.fragment_size()) >> 20
    };
    // Down to 60 MiB: the floor is 64.
    let bytes = (free() - 60) << 20;
    let wrote = block_in_place(|| nbd_write(&uri, 16 << 20, bytes));
    eprintln!("{} MiB free", free());
    tokio::time::sleep(Duration::from_secs(3)).await;
    let now = std::fs::read_dir(world.group_dir().join("history/layers")).unwrap().count();
    eprintln!("wrote {wrote:?}; layers {layers} before, {now} after; {:?}", world.looker.points().window);
    eprintln!(
        "{}",
        world
            .receiver
            .log()
            .lines()
            .filter(|l| l.contains("WARN") || l.contains("ERROR"))
            .collect::<Vec<_>>()
            .join("\n")
    );
    let opened = block_in_place(|| world.looker.open(&named("first"))).unwrap();
    if let Ok(first) = &opened {
        block_in_place(|| world.looker.close(first));
    }
    world.receiver.stop();
    assert!(opened.is_ok(), "{opened:?}");
}

/// What is written to a view is scratch; no retention is set.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scratch_writes_to_a_view_cost_no_history() {
    scratch_writes_cost_no_history(&["mkfs.ext4", "-q", "-F", "-m", "0"]).await;
}

/// A disk that is a little too full costs a little history, not all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scratch_writes_to_a_view_cost_little_history_on_xfs() {
    scratch_writes_cost_no_history(&["mkfs.xfs", "-q", "-f"]).await;
}

/// Many layers; gives the times at which block 0 held 10, 11, ...
async fn many_layers(world: &mut World, rounds: u8) -> Vec<u64> {
    let mut times = Vec::new();
    for round in 0..rounds {
        for part in 0..3u64 {
            let mut content = payload(0, 512 << 10);
            rand::RngCore::fill_bytes(&mut world.source.rng, &mut content);
            world.write((1 << 20) + (part << 19), &content).await;
        }
        world.write(0, &payload(10 + round, 4096)).await;
        times.push(world.time_ns);
        world.settle().await;
        world.time_ns += 10 * SECOND;
    }
    times
}

fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut all: Vec<_> = std::fs::read_dir(dir).unwrap().map(|item| item.unwrap().path()).collect();
    all.sort();
    all
}

/// One bit of the list of chunks at the end of an index.
fn rot_tail(run: &Path) {
    let mut bytes = std::fs::read(run).unwrap();
    let end = bytes.len() - 4096;
    let tail = bytes[..end].iter().rposition(|byte| *byte != 0).unwrap();
    bytes[tail] ^= 1;
    std::fs::write(run, bytes).unwrap();
}

/// The newest index rots; its layer is whole. The receiver makes the index again, or at least goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotten_index_does_not_end_protection() {
    let mut world = World::new(&[16 << 20], "", None).await;
    let times = many_layers(&mut world, 6).await;
    world.disconnect();
    world.receiver.stop();
    rot_tail(files(&world.group_dir().join("history/runs")).last().unwrap());
    world.receiver.start(None);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let opened = block_in_place(|| world.looker.open(&PointSpec::Time(times[1] + 5))).unwrap();
    eprintln!("{opened:?}");
    eprintln!("{}", world.receiver.group(GROUP).unwrap().reason.unwrap_or_default());
    assert!(opened.is_ok());
}

/// The newest layer's first block rots: what is older cannot be read, but what comes can be taken, and now can be read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotten_header_of_the_newest_layer_does_not_end_protection() {
    let mut world = World::new(&[16 << 20], "", None).await;
    many_layers(&mut world, 3).await;
    world.write(0, &payload(99, 4096)).await;
    world.settle().await;
    world.disconnect();
    world.receiver.stop();
    let newest = files(&world.group_dir().join("history/layers")).pop().unwrap();
    let mut bytes = std::fs::read(&newest).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&newest, bytes).unwrap();
    world.receiver.start(None);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let opened = block_in_place(|| world.looker.open(&PointSpec::Latest)).unwrap();
    eprintln!("{opened:?}");
    eprintln!("{}", world.receiver.group(GROUP).unwrap().reason.unwrap_or_default());
    assert!(opened.is_ok(), "the replica is whole, and nobody may read it or write to it");
}

/// An older index rots: a time is answered exactly, or refused; not with a point of long ago.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_time_is_not_answered_with_a_point_of_long_ago() {
    let mut world = World::new(&[16 << 20], "", None).await;
    let times = many_layers(&mut world, 6).await;
    world.bookmark("end").await;
    world.settle().await;
    let at = PointSpec::Time(times[1] + 5);
    assert_eq!(world.byte_at(&at, 0), 11);
    world.disconnect();
    world.receiver.stop();
    let runs = files(&world.group_dir().join("history/runs"));
    rot_tail(&runs[runs.len() - 2]);
    world.receiver.start(None);
    world.connect().await;
    let opened = block_in_place(|| world.looker.open(&at)).unwrap();
    eprintln!(
        "{}",
        world
            .receiver
            .log()
            .lines()
            .filter(|l| l.contains("ERROR") || l.contains("WARN"))
            .collect::<Vec<_>>()
            .join("\n")
    );
    match opened {
        Ok(view) => {
            eprintln!("{:?}", view.point);
            let mut buf = vec![0; 4096];
            block_in_place(|| {
                Nbd::open(view.volumes[0].uri.as_ref().unwrap()).unwrap().read(&mut buf, 0).unwrap();
                world.looker.close(&view);
            });
            assert_eq!(buf[0], 11);
        }
        Err(problem) => eprintln!("refused: {problem:?}"),
    }
}

/// The landing log loses its newest entry, while an image that was read behind it is in the history already.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn points_behind_a_damaged_landing_log_are_right() {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.write(0, &payload(0xee, 64 << 10)).await;
    world.bookmark("good").await;
    world.settle().await;
    world.mark(MarkKind::GapBegin, Some(GapReason::RingFull)).await;
    world.bookmark("in-gap").await;
    world.settle().await;
    world.disconnect();
    world.receiver.stop();
    world.receiver.start(Some("apply-after:2"));
    assert!(!world.connect().await);
    let plain = world.record(RecordKind::Write, 0, 64 << 10, &payload(0xee, 64 << 10));
    let mut bytes = world.frame(&plain);
    let image = payload(b'I', 4096);
    bytes.extend(world.image_frame(&[(0, 4096, Some(&image))]));
    world.raw(&bytes).await;
    block_in_place(|| world.receiver.wait());
    world.disconnect();
    // Every copy of it; what stands before the mark is not read again.
    for segment in files(&world.group_dir().join("landing")) {
        let mut bytes = std::fs::read(&segment).unwrap();
        let hits: Vec<usize> =
            (0..bytes.len() / 4096).filter(|n| bytes[n * 4096..][..4096].iter().all(|byte| *byte == 0xee)).collect();
        hits.iter().for_each(|n| bytes[n * 4096 + 100] ^= 1);
        std::fs::write(&segment, bytes).unwrap();
        eprintln!("damaged {} in {} blocks", segment.display(), hits.len());
    }
    world.receiver.start(None);
    assert!(!world.connect().await);
    eprintln!(
        "{}",
        world
            .receiver
            .log()
            .lines()
            .filter(|l| l.contains("ERROR") || l.contains("WARN"))
            .collect::<Vec<_>>()
            .join("\n")
    );
    // The agent sends what is dirty, ends the gap, and goes on.
    let frame = world.image_frame(&[(0, 4096, Some(&image))]);
    world.raw(&frame).await;
    while !matches!(world.agent.as_mut().unwrap().next().await, Got::ImageDone(_)) {}
    world.mark(MarkKind::GapEnd, None).await;
    world.bookmark("later").await;
    world.write(1 << 20, &payload(9, 4096)).await;
    world.settle().await;
    assert_eq!(world.byte_at(&PointSpec::Latest, 0), b'I', "the newest point");
    assert_eq!(world.byte_at(&named("later"), 0), b'I', "a good point behind the gap");
    assert_eq!(world.byte_at(&named("good"), 0), 0xee, "the last good point before it");
}

/// A record from a host whose clock (or root) is out of its mind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_time_of_a_record_ends_the_group() {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.write(0, &payload(1, 4096)).await;
    world.bookmark("first").await;
    world.settle().await;
    world.time_ns = u64::MAX - 5_000_000;
    world.write(0, &payload(2, 4096)).await;
    world.bookmark("mad").await;
    world.settle().await;
    assert_eq!(world.byte_at(&named("first"), 0), 1);
    assert_eq!(world.byte_at(&named("mad"), 0), 2);
    assert_eq!(world.byte_at(&PointSpec::Latest, 0), 2);
    eprintln!("{:?}", block_in_place(|| world.looker.points()).window);
    world.disconnect();
    world.receiver.stop();
    world.receiver.start(None);
    assert_eq!(world.byte_at(&named("first"), 0), 1);
    let rolled = block_in_place(|| world.looker.rollback(&named("first")));
    eprintln!("{rolled:?}");
    assert!(matches!(rolled, Some(Ok(_))));
    assert_eq!(world.byte_at(&PointSpec::Latest, 0), 1);
}

/// Somebody changes the retention while somebody else rolls back: the source stays held off.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_holds_whatever_else_is_asked() {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.write(0, &payload(1, 4096)).await;
    world.bookmark("first").await;
    world.write(0, &payload(2, 4096)).await;
    world.settle().await;
    world.disconnect();
    let stop = Arc::new(AtomicBool::new(false));
    let others: Vec<_> = (0..3u64)
        .map(|number| {
            let (looker, stop) = (world.looker.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut round = 0;
                while !stop.load(Ordering::Acquire) {
                    round += 1;
                    let request = ReceiverRequest::Retention {
                        group: GROUP.into(),
                        age_seconds: Some(1_000_000 + 1000 * number + round % 1000),
                        bytes: None,
                        dry_run: false,
                    };
                    let _ = looker.ask::<RetentionReply>(&request);
                }
            })
        })
        .collect();
    let mut lost = None;
    for round in 0..30 {
        let rolled = block_in_place(|| world.looker.rollback(&named("first"))).unwrap();
        assert!(rolled.unwrap().held);
        std::thread::sleep(Duration::from_millis(20));
        let released =
            block_in_place(|| world.looker.ask::<()>(&ReceiverRequest::RollbackRelease { group: GROUP.into() }));
        if let Some(Err(problem)) = released {
            lost = Some((round, problem));
            break;
        }
    }
    stop.store(true, Ordering::Release);
    others.into_iter().for_each(|other| other.join().unwrap());
    assert!(lost.is_none(), "rolled back and told 'held', and nothing is held: {lost:?}");
}

/// The clock is set back by a quarter of an hour, and then a gap begins and ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_time_is_not_answered_with_what_was_written_after_it() {
    let mut world = World::new(&[16 << 20], "", None).await;
    let begin = world.time_ns;
    for minute in [1, 10, 20] {
        world.time_ns = begin + minute * 60 * SECOND;
        world.write(0, &payload(minute as u8, 4096)).await;
    }
    world.settle().await;
    let at = PointSpec::Time(begin + 12 * 60 * SECOND);
    assert_eq!(world.byte_at(&at, 0), 10);
    world.time_ns = begin + 5 * 60 * SECOND;
    world.mark(MarkKind::GapBegin, Some(GapReason::RingFull)).await;
    world.time_ns += SECOND;
    world.mark(MarkKind::GapEnd, None).await;
    world.write(4096, &payload(4, 4096)).await;
    world.settle().await;
    assert_eq!(world.byte_at(&at, 0), 10, "what was written at minute 20 is not of minute 12");
}

/// All layers are lost, or somebody removed them to make room; the chronicle is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_layers_no_old_point_is_handed_out() {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.write(0, &payload(1, 4096)).await;
    world.bookmark("old").await;
    world.write(0, &payload(2, 4096)).await;
    world.settle().await;
    assert_eq!(world.byte_at(&named("old"), 0), 1);
    world.disconnect();
    world.receiver.stop();
    for dir in ["layers", "runs"] {
        for file in files(&world.group_dir().join("history").join(dir)) {
            std::fs::remove_file(file).unwrap();
        }
    }
    world.receiver.start(None);
    world.connect().await;
    let opened = block_in_place(|| world.looker.open(&named("old"))).unwrap();
    if let Ok(view) = opened {
        let mut buf = vec![0; 4096];
        let uri = view.volumes[0].uri.clone().unwrap();
        let read = block_in_place(|| Nbd::open(&uri).unwrap().read(&mut buf, 0));
        block_in_place(|| world.looker.close(&view));
        let points = block_in_place(|| world.looker.points());
        eprintln!("window {:?}, damaged {:?}, bookmarks {:?}", points.window, points.damaged, points.bookmarks);
        assert!(read.is_ok() && buf[0] == 1, "a view at {:?} holds {} instead of 1 ({read:?})", view.point, buf[0]);
    }
}

/// A source whose ring is new asks where the stream of its old one stands, a rollback comes and goes, and the new ring begins: it may
/// not go on as if nothing had come between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_ring_hears_of_a_rollback_that_came_and_went() {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.write(0, &payload(1, 4096)).await;
    world.bookmark("first").await;
    world.write(0, &payload(2, 4096)).await;
    world.settle().await;
    for rolled in [false, true] {
        world.disconnect();
        assert!(world.connect().await, "under the old ring's name");
        world.disconnect();
        if rolled {
            block_in_place(|| world.looker.rollback(&named("first"))).unwrap().unwrap();
            let _: () = block_in_place(|| world.looker.done(&ReceiverRequest::RollbackRelease { group: GROUP.into() }));
        }
        let old = std::mem::replace(&mut world.source.incarnation, [9; 16]);
        assert_eq!(world.connect().await, !rolled, "consistent, to a new ring");
        world.source.incarnation = old;
    }
}

/// The receiver's clock is ten minutes ahead of the source's, and gave the marks of a rollback.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_time_means_what_has_landed_also_after_a_rollback() {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.write(0, &payload(1, 4096)).await;
    world.bookmark("first").await;
    world.write(0, &payload(2, 4096)).await;
    world.settle().await;
    world.disconnect();
    block_in_place(|| world.looker.rollback(&named("first"))).unwrap().unwrap();
    let _: () = block_in_place(|| world.looker.done(&ReceiverRequest::RollbackRelease { group: GROUP.into() }));
    world.connect().await;
    world.mark(MarkKind::Begin, Some(GapReason::NewRing)).await;
    let content = payload(2, 4096);
    let frame = world.image_frame(&[(0, 4096, Some(&content))]);
    world.raw(&frame).await;
    while !matches!(world.agent.as_mut().unwrap().next().await, Got::ImageDone(_)) {}
    world.mark(MarkKind::GapEnd, None).await;
    world.write(0, &payload(3, 4096)).await;
    world.settle().await;
    world.time_ns += SECOND;
    world.write(0, &payload(4, 4096)).await;
    let position = world.source.position;
    world.agent.as_mut().unwrap().wait_durable(position, false).await;
    assert_eq!(world.byte_at(&PointSpec::Time(world.time_ns), 0), 4, "acknowledged before it was asked for");
}

/// The source counts an image that was acknowledged as done. A takeover in the middle of the gap that is undone leaves it there,
/// and what the replica holds until the gap ends is no point.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_undone_takeover_keeps_the_images_of_the_gap() {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.write(0, &payload(1, 4096)).await;
    world.write(8192, &payload(1, 4096)).await;
    world.settle().await;
    world.mark(MarkKind::GapBegin, Some(GapReason::RingFull)).await;
    let content = payload(2, 4096);
    let frame = world.image_frame(&[(0, 4096, Some(&content))]);
    world.raw(&frame).await;
    while !matches!(world.agent.as_mut().unwrap().next().await, Got::ImageDone(_)) {}
    world.disconnect();
    let failover = ReceiverRequest::Failover {
        group: GROUP.into(),
        at: PointSpec::Latest,
        test: false,
        dry_run: false,
        planned: None,
        abort_after_seconds: None,
    };
    let abort = ReceiverRequest::FailoverAbort { group: GROUP.into(), force: false, only_test: false };
    for request in [failover, abort] {
        let reply: FailoverReply = block_in_place(|| world.looker.done(&request));
        eprintln!("{reply:?}");
    }
    let replica = world.receiver.replica(GROUP, 0);
    assert_eq!((replica[0], replica[8192]), (2, 1), "the image is there");
    assert!(!world.connect().await, "its gap is open");
    assert_eq!(world.byte_at(&PointSpec::Latest, 0), 1, "a point of before the gap");
    // As its agent does, which has a gap open of the same stream: no mark is sent, records go on.
    world.write(8192, &payload(3, 4096)).await;
    let position = world.source.position;
    world.agent.as_mut().unwrap().wait_durable(position, false).await;
    assert_eq!(world.byte_at(&PointSpec::Latest, 8192), 1, "still before the gap");
    world.mark(MarkKind::GapEnd, None).await;
    world.write(16384, &payload(4, 4096)).await;
    world.settle().await;
    for (offset, wanted) in [(0, 2), (8192, 3), (16384, 4)] {
        assert_eq!(world.byte_at(&PointSpec::Latest, offset), wanted, "at {offset}");
    }
}

/// The oldest layer rots together with its index: points that need it are past, and everything else goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_oldest_layer_and_its_index_rot() {
    let mut world = World::new(&[16 << 20], "", None).await;
    let times = many_layers(&mut world, 6).await;
    world.disconnect();
    world.receiver.stop();
    let history = world.group_dir().join("history");
    let (layers, runs) = (files(&history.join("layers")), files(&history.join("runs")));
    eprintln!("{layers:?}\n{runs:?}");
    std::fs::remove_file(&runs[0]).unwrap();
    let mut bytes = std::fs::read(&layers[0]).unwrap();
    bytes[..4096].fill(0x5a);
    std::fs::write(&layers[0], bytes).unwrap();
    world.receiver.start(None);
    world.connect().await;
    world.write(0, &payload(7, 4096)).await;
    world.settle().await;
    assert_eq!(world.byte_at(&PointSpec::Latest, 0), 7);
    assert_eq!(world.byte_at(&PointSpec::Time(*times.last().unwrap() + 5), 0), 15);
    // It may need nothing of that layer any more.
    if let Ok(view) = block_in_place(|| world.looker.open(&PointSpec::Time(times[0] + 5))).unwrap() {
        block_in_place(|| world.looker.close(&view));
        assert_eq!(world.byte_at(&PointSpec::Time(times[0] + 5), 0), 10);
    }
}

/// A layer's file is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_point_whose_layer_is_lost_is_not_handed_out() {
    let mut world = World::new(&[16 << 20], "", None).await;
    let times = many_layers(&mut world, 6).await;
    world.disconnect();
    world.receiver.stop();
    let layers = files(&world.group_dir().join("history/layers"));
    eprintln!("{layers:?}");
    std::fs::remove_file(&layers[layers.len() / 2]).unwrap();
    world.receiver.start(None);
    world.connect().await;
    let points = block_in_place(|| world.looker.points());
    eprintln!("window {:?}, damaged {:?}", points.window, points.damaged);
    let status = world.receiver.group(GROUP).unwrap();
    eprintln!("status: {:?} {:?}", status.data, status.history);
    let at = PointSpec::Time(times[0] + 5);
    eprintln!("scrub: {:?}", block_in_place(|| world.looker.scrub()));
    let opened = block_in_place(|| world.looker.open(&at)).unwrap();
    if let Ok(view) = opened {
        let mut buf = vec![0; 4096];
        let uri = view.volumes[0].uri.clone().unwrap();
        let read = block_in_place(|| Nbd::open(&uri).unwrap().read(&mut buf, 0));
        block_in_place(|| world.looker.close(&view));
        assert!(read.is_ok() && buf[0] == 10, "a view was opened at {:?}; reading it: {read:?} {}", view.point, buf[0]);
    }
}

/// The agent comes back while the operator forgets the group.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_was_forgotten_while_its_agent_came_is_not_invisible() {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.write(0, &payload(1, 4096)).await;
    world.settle().await;
    world.disconnect();
    world.receiver.wait_for(GROUP, "disconnected", |group| group.link != varve_common::state::Link::Streaming);
    // Much to remove.
    let many = world.group_dir().join("history/many");
    std::fs::create_dir(&many).unwrap();
    for number in 0..60_000 {
        std::fs::File::create(many.join(number.to_string())).unwrap();
    }
    let looker = world.looker.clone();
    let forget = tokio::task::spawn_blocking(move || {
        let begin = Instant::now();
        let done = looker.ask::<()>(&ReceiverRequest::Forget { group: GROUP.into() });
        eprintln!("forget: {done:?} after {:?}", begin.elapsed());
    });
    tokio::time::sleep(Duration::from_millis(60)).await;
    // As the agent does: refused for now, it asks again.
    let begin = Instant::now();
    while !world.try_connect().await {
        assert!(begin.elapsed() < Duration::from_secs(20), "it is refused for ever");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    forget.await.unwrap();
    world.mark(MarkKind::Begin, Some(GapReason::InitialSync)).await;
    world.mark(MarkKind::GapEnd, None).await;
    world.write(0, &payload(2, 4096)).await;
    world.settle().await;
    let seen = world.receiver.group(GROUP);
    // And what comes of it when the session ends.
    let durable = world.agent.as_ref().unwrap().durable;
    world.disconnect();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let connection = varve_net::endpoint::connect(&world.identity, &world.receiver.address()).await.unwrap();
    let mut agent = Agent::on(connection).await;
    eprintln!("again: {:?}", agent.hello(&hello(GROUP, &world.source, 0)).await);
    agent.durable = durable;
    world.agent = Some(agent);
    assert!(
        seen.is_some(),
        "the agent streams, acknowledged to {}, and the receiver has no such group",
        world.agent.as_ref().unwrap().durable
    );
}

/// A rollback that is cut off leaves every older point as it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_that_is_cut_off_costs_no_point() {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.write(0, &payload(1, 4096)).await;
    world.bookmark("one").await;
    world.write(0, &payload(2, 4096)).await;
    world.bookmark("two").await;
    world.settle().await;
    assert_eq!(world.byte_at(&named("two"), 0), 2);
    world.disconnect();
    world.receiver.stop();
    world.receiver.start(Some("apply-after:2"));
    world.connect().await;
    // The same again: it changes nothing.
    world.write(0, &payload(2, 4096)).await;
    let position = world.source.position;
    let looker = world.looker.clone();
    world.agent.as_mut().unwrap().wait_durable(position, false).await;
    let rolled = tokio::task::spawn_blocking(move || looker.rollback(&named("one"))).await.unwrap();
    eprintln!("{rolled:?}");
    block_in_place(|| world.receiver.wait());
    world.disconnect();
    world.receiver.start(None);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(world.byte_at(&named("one"), 0), 1);
    assert_eq!(world.byte_at(&named("two"), 0), 2);
}

/// The receiver is killed between the replica and the applied mark, and the layers are gone when it starts: the replica holds
/// what is newer than the mark, and what that replaced is lost.
async fn killed_before_the_mark(lose: impl Fn(&Path)) {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.write(0, &payload(b'0', 4096)).await;
    world.write(0, &payload(b'a', 4096)).await;
    world.bookmark("before").await;
    world.settle().await;
    assert_eq!(world.byte_at(&named("before"), 0), b'a');
    world.disconnect();
    world.receiver.stop();
    world.receiver.start(Some("apply-after:1"));
    assert!(world.connect().await);
    let mut plain = world.record(RecordKind::Write, 0, 4096, &payload(b'b', 4096));
    plain.extend(world.record(RecordKind::Write, 0, 4096, &payload(b'c', 4096)));
    let bytes = world.frame(&plain);
    world.raw(&bytes).await;
    block_in_place(|| world.receiver.wait());
    world.disconnect();
    lose(&world.group_dir().join("history"));
    world.receiver.start(None);
    world.connect().await;
    world.bookmark("after").await;
    world.settle().await;
    if let Some(byte) = byte_if_open(&world, &named("before")) {
        assert_eq!(byte, b'a', "refused, or what it was");
    }
    assert_eq!(world.byte_at(&named("after"), 0), b'c', "what comes is a point again");
    world.write(0, &payload(b'd', 4096)).await;
    world.settle().await;
    assert_eq!(world.byte_at(&named("after"), 0), b'c', "and stays one");
}

/// What block 0 holds at a point, if that is handed out.
fn byte_if_open(world: &World, at: &PointSpec) -> Option<u8> {
    block_in_place(|| {
        let view = match world.looker.open(at).unwrap() {
            Ok(view) => view,
            Err(problem) => {
                eprintln!("{at} is refused: {problem:?}");
                return None;
            }
        };
        let mut buf = vec![0; 4096];
        Nbd::open(view.volumes[0].uri.as_ref().unwrap()).unwrap().read(&mut buf, 0).unwrap();
        world.looker.close(&view);
        Some(buf[0])
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_that_also_costs_the_layers_makes_no_wrong_point() {
    killed_before_the_mark(|history| {
        files(&history.join("layers")).iter().chain(&files(&history.join("runs"))).for_each(|file| {
            std::fs::remove_file(file).unwrap();
        });
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_that_also_costs_the_newest_header_makes_no_wrong_point() {
    killed_before_the_mark(|history| {
        let newest = files(&history.join("layers")).pop().unwrap();
        let mut bytes = std::fs::read(&newest).unwrap();
        bytes[20] ^= 1;
        std::fs::write(&newest, bytes).unwrap();
    })
    .await;
}

/// The newest closed layer and its index rot both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_and_its_layer_that_rot_do_not_end_protection() {
    let mut world = World::new(&[16 << 20], "", None).await;
    many_layers(&mut world, 6).await;
    world.disconnect();
    world.receiver.stop();
    let history = world.group_dir().join("history");
    let run = files(&history.join("runs")).into_iter().rfind(|run| run.display().to_string().contains("/L0-")).unwrap();
    rot_tail(&run);
    let number = run.file_stem().unwrap().to_str().unwrap()[3..].to_owned();
    let layer = history.join(format!("layers/{number}.layer"));
    for newer in files(&history.join("layers")).iter().filter(|file| **file > layer) {
        std::fs::remove_file(newer).unwrap();
    }
    let mut bytes = std::fs::read(&layer).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&layer, bytes).unwrap();
    world.receiver.start(None);
    assert!(world.connect().await, "the replica is whole");
    world.bookmark("after").await;
    world.write(0, &payload(77, 4096)).await;
    world.settle().await;
    assert_eq!(world.byte_at(&PointSpec::Latest, 0), 77);
    assert_eq!(world.byte_at(&named("after"), 0), 15);
}

/// A position, where the list of records that says which points there are cannot be read: not another point.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_position_is_not_answered_with_a_point_of_long_ago() {
    let mut world = World::new(&[16 << 20], "", None).await;
    world.write(0, &payload(10, 4096)).await;
    world.settle().await;
    let old = world.source.position;
    many_layers(&mut world, 3).await;
    world.disconnect();
    world.receiver.stop();
    let history = world.group_dir().join("history");
    let layers = files(&history.join("layers"));
    rot_tail(&files(&history.join("runs"))[0]);
    let mut bytes = std::fs::read(&layers[0]).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&layers[0], bytes).unwrap();
    world.receiver.start(None);
    world.connect().await;
    let digits = world.source.incarnation.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let at = PointSpec::Position { incarnation_prefix: digits, offset: old };
    let opened = block_in_place(|| world.looker.open(&at)).unwrap();
    eprintln!("{opened:?}");
    if let Ok(view) = opened {
        let right = view.point.position.ends_with(&format!("{old}"));
        block_in_place(|| world.looker.close(&view));
        assert!(right, "position {old} was answered with {:?}", view.point);
    }
}
