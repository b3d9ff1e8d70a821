//! A worker against a played capture and a played receiver: interleavings that a real kernel shows once a month, at will.

use super::kept::Kept;
use super::shared::GroupShared;
use super::source::{Source, Stream, Track, Troubles};
use super::sync::{FromSync, SyncThread};
use super::worker::{Command, Worker};
use crate::clock;
use crate::journal::Settings;
use crate::link::LinkView;
use crate::misses::Misses;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use varve_bpf::Entry;
use varve_common::format::{Mark, MarkKind};
use varve_common::limits::{REGION_BYTES, SYNC_REGIONS_MAX};
use varve_common::problem::Problem;
use varve_common::record::{RING_DISCARD_BIT, RecordHeader, RecordKind, Records, append_record};
use varve_common::state::{Data, GapReason, Link};
use varve_common::wire::messages::{self, Ack, ImageDone, Probe, ProbeReply, VolumeHello, Welcome};
use varve_common::wire::{FRAME_HEADER_BYTES, Frame, FrameKind, Image, Preamble};
use varve_io::aligned::BufPool;
use varve_io::direct::DirectFile;
use varve_net::endpoint::{self, Server};
use varve_net::hosts::Hosts;
use varve_net::identity::Authority;
use varve_net::token::JoinToken;
use zerocopy::{FromBytes, IntoBytes};

const REGIONS: u64 = 4;
const LIMIT: Duration = Duration::from_secs(60);

/// A ring without end, as strict as the kernel's about positions that were released.
#[derive(Default)]
pub struct PlayedStream {
    bytes: Mutex<Vec<u8>>,
    consumer: AtomicU64,
    /// As it is told; 0: without end. It takes what comes in any case.
    pub capacity: AtomicU64,
}

impl PlayedStream {
    pub fn append(&self, kind: RecordKind, offset: u64, payload: &[u8]) -> u64 {
        self.append_dated(kind, offset, payload, crate::clock::wall_ns())
    }

    pub fn append_dated(&self, kind: RecordKind, offset: u64, payload: &[u8], time_ns: u64) -> u64 {
        let length = payload.len() as u64;
        let header = RecordHeader {
            kind: kind as u8,
            flags: 0,
            volume: 0.into(),
            payload: (length as u32).into(),
            time_ns: time_ns.into(),
            offset: offset.into(),
            length: length.into(),
        };
        let mut bytes = self.bytes.lock().expect("not poisoned");
        let position = bytes.len() as u64;
        append_record(&mut bytes, header, payload);
        position
    }
}

impl Stream for PlayedStream {
    fn producer(&self) -> u64 {
        self.bytes.lock().expect("not poisoned").len() as u64
    }
    fn consumer(&self) -> u64 {
        self.consumer.load(Ordering::Acquire)
    }
    fn capacity(&self) -> u64 {
        match self.capacity.load(Ordering::Relaxed) {
            0 => 1 << 40,
            capacity => capacity,
        }
    }
    fn release(&self, position: u64) {
        assert!(position >= self.consumer() && position <= self.producer(), "release({position})");
        self.consumer.store(position, Ordering::Release);
    }
    fn entry(&self, position: u64) -> Option<Entry> {
        if position >= self.producer() {
            return None;
        }
        assert!(position >= self.consumer(), "position {position} was released");
        let bytes = self.bytes.lock().expect("not poisoned");
        let at = position as usize;
        let word = u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let total = varve_common::record::entry_bytes(word);
        if word & RING_DISCARD_BIT != 0 {
            return Some(Entry::Discarded { bytes: total });
        }
        let (header, _) = RecordHeader::read_from_prefix(&bytes[at + 8..]).expect("a header");
        Some(Entry::Record { bytes: total, header })
    }
    fn copy_out(&self, position: u64, out: &mut [u8]) {
        assert!(position >= self.consumer());
        let at = position as usize;
        out.copy_from_slice(&self.bytes.lock().expect("not poisoned")[at..at + out.len()]);
    }
}

#[derive(Default)]
pub struct PlayedTrack {
    bits: AtomicU64,
    taken: AtomicU64,
    pub in_flight: AtomicBool,
}

impl PlayedTrack {
    /// Nothing is to be sent, and nothing is on its way.
    fn is_at_rest(&self) -> bool {
        self.bits.load(Ordering::SeqCst) == 0 && self.taken.load(Ordering::SeqCst) == 0
    }
}

impl Track for PlayedTrack {
    fn set_dirty(&self, region: u64) {
        self.bits.fetch_or(1 << region, Ordering::SeqCst);
    }
    fn set_all_dirty(&self) {
        self.bits.store((1 << REGIONS) - 1, Ordering::SeqCst);
    }
    fn take_dirty(&self, region: u64) -> bool {
        self.taken.fetch_or(1 << region, Ordering::SeqCst);
        self.bits.fetch_and(!(1 << region), Ordering::SeqCst) & 1 << region != 0
    }
    fn set_finished(&self, region: u64) {
        self.taken.fetch_and(!(1 << region), Ordering::SeqCst);
    }
    fn next_dirty(&self, from: u64) -> Option<u64> {
        (from..REGIONS).find(|region| self.bits.load(Ordering::SeqCst) & 1 << region != 0)
    }
    fn dirty_count(&self) -> u64 {
        u64::from(self.bits.load(Ordering::SeqCst).count_ones())
    }
    fn in_flight(&self, _: u64) -> bool {
        self.in_flight.load(Ordering::SeqCst)
    }
}

type Hook = Box<dyn FnMut(&PlayedSource) + Send>;

/// A capture whose events happen when the test says so: `after_look` runs right after the counters were read.
#[derive(Default)]
pub struct PlayedSource {
    pub stream: PlayedStream,
    pub track: PlayedTrack,
    /// That of a second volume, which only some tests have.
    pub second: Option<PlayedTrack>,
    pub troubles: Mutex<Troubles>,
    pub first_drop: AtomicU64,
    pub after_look: Mutex<Option<Hook>>,
    pub note: Mutex<Option<varve_bpf::Note>>,
    /// Until `settled` was asked so often, every look finds another write that could be anywhere.
    pub unsettled: AtomicU64,
}

impl PlayedSource {
    pub fn write(&self, offset: u64, fill: u8) -> u64 {
        self.stream.append(RecordKind::Write, offset, &[fill; 512])
    }

    /// As the capture program does it: bit, counter, position.
    pub fn drop_write(&self, region: u64) -> u64 {
        self.track.set_dirty(region);
        self.troubles.lock().expect("not poisoned").dropped += 1;
        self.note_position()
    }

    /// As the capture program does it at the first write to a device in its new size: position, counter. No bit.
    pub fn resize(&self) -> u64 {
        let position = self.note_position();
        self.troubles.lock().expect("not poisoned").resized += 1;
        position
    }

    fn note_position(&self) -> u64 {
        let position = self.stream.producer();
        let _ = self.first_drop.compare_exchange(0, position + 1, Ordering::SeqCst, Ordering::SeqCst);
        position
    }
}

impl Source for PlayedSource {
    fn stream(&self) -> &dyn Stream {
        &self.stream
    }
    fn track(&self, number: usize) -> &dyn Track {
        self.second.as_ref().filter(|_| number == 1).unwrap_or(&self.track)
    }
    fn volumes(&self) -> usize {
        1 + usize::from(self.second.is_some())
    }
    fn mark(&self, kind: RecordKind, payload: &[u8]) -> Result<(), Problem> {
        self.stream.append(kind, 0, payload);
        Ok(())
    }
    fn troubles(&self) -> Troubles {
        if self.unsettled.load(Ordering::SeqCst) > 0 {
            self.troubles.lock().expect("not poisoned").late_unknown += 1;
        }
        let troubles = *self.troubles.lock().expect("not poisoned");
        let hook = self.after_look.lock().expect("not poisoned").take();
        if let Some(mut hook) = hook {
            hook(self);
        }
        troubles
    }
    fn captured(&self) -> (u64, u64) {
        (0, 0)
    }
    fn take_first_drop(&self) -> Option<u64> {
        self.first_drop.swap(0, Ordering::SeqCst).checked_sub(1)
    }
    fn settled(&self) -> bool {
        self.unsettled.try_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_err()
    }
    fn set_time_offset(&self, _: u64) {}
    fn time_offset(&self) -> u64 {
        clock::wall_ns().saturating_sub(clock::boot_ns())
    }
    fn kept(&self) -> Option<Kept> {
        Kept::decode(self.note.lock().expect("not poisoned").as_ref()?)
    }
    fn keep(&self, kept: &Kept) {
        *self.note.lock().expect("not poisoned") = Some(kept.encode());
    }
}

/// What the played receiver was told, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    Mark(Mark),
    Data(u64, Vec<(u64, RecordKind)>),
    Image(Vec<(u64, u64)>),
    Probe(u64),
}

/// What the played receiver does.
#[derive(Default)]
pub struct Script {
    /// Reads nothing while set.
    pub stalled: AtomicBool,
    /// The blocks of every region that differ from what is probed.
    pub differs: AtomicU16,
    /// Answers no probe while set, and reads nothing behind it.
    pub thinks: AtomicBool,
    pub told: Mutex<Vec<Told>>,
    /// Sessions that it ended because of an image outside a gap, as the real one does.
    pub refused: AtomicU64,
    /// If not zero: with its next data the receiver waits until this is less than the maximum, ends the session, and says in the next
    /// that it has so much of the stream.
    pub claims: AtomicU64,
}

/// A worker with everything around it.
pub struct Stage {
    pub source: Arc<PlayedSource>,
    pub script: Arc<Script>,
    pub shared: Arc<GroupShared>,
    pub commands: mpsc::Sender<Command>,
    pub stop: watch::Sender<bool>,
    pub misses: Arc<Misses>,
    pub regions: BufPool,
    pub task: tokio::task::JoinHandle<()>,
    _dir: tempfile::TempDir,
    _link: watch::Sender<LinkView>,
    _volume: tempfile::NamedTempFile,
    _server: Arc<Server>,
}

impl Stage {
    pub async fn set() -> Self {
        Self::with(None).await
    }

    pub async fn with(journal: Option<Settings>) -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        let authority = Arc::new(Authority::create(&dir.path().join("pki"), "recovery").expect("authority"));
        let hosts = Arc::new(Hosts::open(dir.path().join("hosts.json")).expect("hosts"));
        let server = Arc::new(Server::bind(([127, 0, 0, 1], 0).into(), &authority, hosts.clone()).expect("a server"));
        let addr = server.local_addr().expect("an address").to_string();
        let secret = hosts.invite("db1", LIMIT, std::time::SystemTime::now()).expect("an invitation");
        let token = JoinToken { ca_fingerprint: authority.fingerprint(), secret, name: "db1".into() };
        let serving = async {
            let accepted = server.accept().await.expect("a joiner");
            endpoint::serve_join(&accepted, &authority, &hosts).await.expect("served");
        };
        let (identity, ()) = tokio::join!(endpoint::join(&addr, &token), serving);
        let identity = identity.expect("joined");
        let (connection, accepted) = tokio::join!(endpoint::connect(&identity, &addr), server.accept());
        let (connection, accepted) = (connection.expect("connected"), accepted.expect("accepted"));

        let script = Arc::new(Script::default());
        let playing = script.clone();
        tokio::spawn(async move {
            let mut consistent = false;
            let mut resume = None;
            while let Ok((send, recv)) = accepted.connection.accept_bi().await {
                play(&playing, send, recv, &mut consistent, &mut resume).await;
            }
        });

        let volume = tempfile::NamedTempFile::new().expect("a file");
        volume.as_file().set_len(REGIONS * REGION_BYTES).expect("sized");
        let source = Arc::new(PlayedSource::default());
        let dynamic: Arc<dyn Source> = source.clone();
        let bytes = REGIONS * REGION_BYTES;
        let shared = Arc::new(GroupShared::new(
            "played".into(),
            vec![("/dev/played".into(), bytes)],
            [7; 16],
            dynamic.clone(),
            Duration::from_secs(5),
            false,
        ));
        let (to_worker, from_sync) = mpsc::channel(SYNC_REGIONS_MAX);
        let files = vec![DirectFile::open_read(volume.path()).expect("opens")];
        let regions = BufPool::new(REGIONS as usize, REGION_BYTES as usize);
        let sync = SyncThread::start("played", dynamic.clone(), files, regions.clone(), to_worker).expect("a thread");
        let (commands, command_queue) = mpsc::channel(8);
        let (stop, stopped) = watch::channel(false);
        let (link, view) =
            watch::channel(LinkView { connection: Some(connection), link: Link::Handshaking, reason: None });
        let misses = Arc::new(Misses::default());
        misses.note(u64::MAX, 0);
        let worker = Worker {
            shared: shared.clone(),
            source: dynamic,
            sync,
            from_sync,
            commands: command_queue,
            link: view,
            stop: stopped,
            misses: misses.clone(),
            frames: BufPool::new(4, 2 << 20),
            volumes: vec![VolumeHello { path: "/dev/played".into(), bytes, replica: None }],
            compression: false,
            misses_before: 0,
            sealed: None,
            journal,
            orders: mpsc::channel(8).0,
            on_consistent: Box::new(|| ()),
        };
        let task = tokio::spawn(worker.run());
        Self {
            source,
            script,
            shared,
            commands,
            stop,
            misses,
            regions,
            task,
            _dir: dir,
            _link: link,
            _volume: volume,
            _server: server,
        }
    }

    pub async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let began = Instant::now();
        while !condition(self) {
            assert!(!self.task.is_finished(), "the worker has ended while waiting: {what}");
            assert!(began.elapsed() < LIMIT, "never: {what}; told {:?}", self.told());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub async fn protected(&self) {
        self.until("protected", |stage| stage.shared.facts().gap.is_none()).await;
    }

    pub fn told(&self) -> Vec<Told> {
        self.script.told.lock().expect("not poisoned").clone()
    }

    pub fn marks(&self) -> Vec<Mark> {
        let marks = self.told().into_iter().filter_map(|told| match told {
            Told::Mark(mark) => Some(mark),
            _ => None,
        });
        marks.collect()
    }
}

async fn play(
    script: &Script,
    mut send: quinn::SendStream,
    mut recv: quinn::RecvStream,
    consistent: &mut bool,
    resume: &mut Option<u64>,
) {
    let mut bytes = [0; size_of::<Preamble>()];
    if recv.read_exact(&mut bytes).await.is_err() {
        return;
    }
    let offer = Preamble::read_from_bytes(&bytes).expect("a preamble");
    let (answer, _) = Preamble::answer(&offer).expect("our protocol");
    send.write_all(answer.as_bytes()).await.expect("sent");
    let mut gap = !*consistent;
    loop {
        while script.stalled.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut head = [0; FRAME_HEADER_BYTES];
        if recv.read_exact(&mut head).await.is_err() {
            return;
        }
        let frame = Frame::decode(&head).expect("a frame");
        let mut body = vec![0; frame.body_bytes];
        if recv.read_exact(&mut body).await.is_err() {
            return;
        }
        let mut scratch = Vec::new();
        let plain = frame.open(&body, &mut scratch).expect("whole").to_vec();
        let tell = |told| script.told.lock().expect("not poisoned").push(told);
        let (kind, reply) = match frame.kind {
            FrameKind::Hello => {
                let welcome = Welcome {
                    resume: *resume,
                    epoch: 1,
                    consistent: *consistent,
                    fresh: vec![false],
                    replicas: vec!["/replica".into()],
                    software: "played".into(),
                };
                (FrameKind::Welcome, messages::encode(&welcome))
            }
            FrameKind::Mark => {
                let mark = Mark::decode(&plain).expect("a mark");
                gap = mark.reason.is_some();
                *consistent = !gap;
                *resume = Some(mark.position);
                tell(Told::Mark(mark));
                continue;
            }
            FrameKind::Data => {
                let records = Records::new(frame.position, &plain).map(|record| record.expect("a record"));
                let records = records.map(|record| (record.position, record.kind)).collect();
                tell(Told::Data(frame.position, records));
                if script.claims.load(Ordering::SeqCst) > 0 {
                    while script.claims.load(Ordering::SeqCst) == u64::MAX {
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                    *resume = Some(script.claims.swap(0, Ordering::SeqCst));
                    return;
                }
                let durable = frame.position + plain.len() as u64;
                *resume = Some(durable);
                (FrameKind::Ack, messages::encode(&Ack { durable, applied: durable }))
            }
            FrameKind::Probe => {
                let probe: Probe = messages::decode(frame.kind, &plain).expect("a probe");
                tell(Told::Probe(probe.offset));
                while script.thinks.load(Ordering::SeqCst) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                let differs = script.differs.load(Ordering::SeqCst);
                (FrameKind::ProbeReply, messages::encode(&ProbeReply { id: probe.id, differs }))
            }
            FrameKind::Image => {
                if !gap {
                    // As the receiver does it: an image outside a gap ends the session.
                    script.refused.fetch_add(1, Ordering::SeqCst);
                    return;
                }
                let image = Image::decode(&plain).expect("an image");
                tell(Told::Image(image.extents().map(|(offset, length, _)| (offset, length)).collect()));
                (FrameKind::ImageDone, messages::encode(&ImageDone { id: image.id }))
            }
            _ => continue,
        };
        let header = Frame::plain(kind, 0, &reply).encode();
        if send.write_all(&header).await.is_err() || send.write_all(&reply).await.is_err() {
            return;
        }
    }
}

/// A write is dropped, and a later one captured, between the worker's look at the counters and its look at the ring. No
/// point after the dropped write may be called good: the gap's mark stands before the later write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_begins_before_what_followed_the_dropped_write() {
    let stage = Stage::set().await;
    stage.protected().await;
    let dropped = Arc::new(AtomicU64::new(u64::MAX));
    let position = dropped.clone();
    *stage.source.after_look.lock().expect("not poisoned") = Some(Box::new(move |source| {
        source.write(0, 1);
        position.store(source.drop_write(2), Ordering::SeqCst);
        // The second depends on the first: whoever holds it without the first holds nonsense.
        source.write(512, 2);
    }));
    stage.until("the gap is marked", |stage| stage.marks().len() > 2).await;
    let marks = stage.marks();
    assert_eq!(marks[2].position, dropped.load(Ordering::SeqCst), "{marks:?}");
    stage.protected().await;
}

/// Two things go wrong between two looks, and only one of them tells where: the gap begins before both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drop_does_not_move_the_begin_of_another_trouble() {
    let stage = Stage::set().await;
    stage.protected().await;
    let straddled = Arc::new(AtomicU64::new(u64::MAX));
    let position = straddled.clone();
    *stage.source.after_look.lock().expect("not poisoned") = Some(Box::new(move |source| {
        position.store(source.stream.producer(), Ordering::SeqCst);
        source.track.set_dirty(1);
        source.troubles.lock().expect("not poisoned").straddling += 1;
        source.write(512, 2);
        source.drop_write(2);
    }));
    stage.until("the gap is marked", |stage| stage.marks().len() > 2).await;
    assert!(stage.marks()[2].position <= straddled.load(Ordering::SeqCst), "{:?}", stage.marks());
}

/// A volume grew, and the first write to it in its new size comes between a turn's look and the last one before the gap ends: no
/// bit says so, and what is written to the new part is nowhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_does_not_end_over_a_growth_that_the_last_look_finds() {
    let stage = Stage::set().await;
    stage.protected().await;
    // Everything but the word about skipped writes is there for the gap to end.
    stage.misses.note(1, 0);
    stage.source.drop_write(1);
    stage.until("the gap is marked", |stage| stage.marks().len() == 3).await;
    stage.until("the region is done", |stage| stage.source.track.is_at_rest()).await;
    let misses = stage.misses.clone();
    *stage.source.after_look.lock().expect("not poisoned") = Some(Box::new(move |source| {
        source.resize();
        misses.note(u64::MAX, 0);
    }));
    stage.until("the growth is seen", |stage| stage.shared.facts().outgrown).await;
    let frames = stage.shared.counters.frames.load(Ordering::SeqCst);
    stage.until("two canaries", |stage| stage.shared.counters.frames.load(Ordering::SeqCst) > frames + 1).await;
    assert_eq!(stage.marks().len(), 3, "{:?}", stage.marks());
    assert!(stage.shared.facts().gap.is_some());
}

/// A write is dropped far ahead of what was sent, and then the replica is found to lack something: what is between is no
/// good point.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_ahead_begins_earlier_when_the_replica_lacks_something() {
    let stage = Stage::set().await;
    stage.protected().await;
    let asked = |stage: &Stage| stage.told().iter().filter(|told| matches!(told, Told::Probe(_))).count();
    let before = asked(&stage);
    stage.script.thinks.store(true, Ordering::SeqCst);
    stage.script.differs.store(0xffff, Ordering::SeqCst);
    stage.source.track.set_dirty(3);
    stage.until("the region is asked about", |stage| asked(stage) > before).await;
    for _ in 0..64 {
        stage.source.stream.append(RecordKind::Write, 0, &vec![3; 1 << 20]);
    }
    let dropped = stage.source.drop_write(1);
    stage.until("the gap is seen", |stage| stage.shared.facts().gap.is_some()).await;
    stage.script.thinks.store(false, Ordering::SeqCst);
    stage.until("the gap is marked", |stage| stage.marks().len() > 2).await;
    let marks = stage.marks();
    assert!(marks[2].reason.is_some() && marks[2].position < dropped, "dropped at {dropped}: {marks:?}");
    stage.protected().await;
}

/// The same drop is counted by one look and its place was taken by the look before: what was sent meanwhile stays good.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drop_whose_place_is_known_already_moves_no_gap() {
    let stage = Stage::set().await;
    stage.protected().await;
    stage.script.stalled.store(true, Ordering::SeqCst);
    for _ in 0..64 {
        stage.source.stream.append(RecordKind::Write, 0, &vec![3; 1 << 20]);
    }
    let dropped = Arc::new(AtomicU64::new(u64::MAX));
    let position = dropped.clone();
    *stage.source.after_look.lock().expect("not poisoned") = Some(Box::new(move |source| {
        position.store(source.drop_write(1), Ordering::SeqCst);
        // Right after the first is seen, and before its place is taken, which is that of both.
        let again: Hook = Box::new(|source| _ = source.drop_write(1));
        *source.after_look.lock().expect("not poisoned") = Some(again);
    }));
    stage.until("the gap is seen", |stage| stage.shared.facts().gap.is_some()).await;
    // Both looks are over.
    tokio::time::sleep(Duration::from_millis(200)).await;
    stage.script.stalled.store(false, Ordering::SeqCst);
    stage.until("the gap is marked", |stage| stage.marks().len() > 2).await;
    assert_eq!(stage.marks()[2].position, dropped.load(Ordering::SeqCst), "{:?}", stage.marks());
    stage.protected().await;
}

/// A region gets dirty and no counter says so (a count below zero, `tend`; or the counter was seen before the bit):
/// the receiver takes no image outside a gap, so there must be one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dirty_region_without_a_reason_opens_a_gap() {
    let stage = Stage::set().await;
    stage.protected().await;
    stage.script.differs.store(0xffff, Ordering::SeqCst);
    stage.source.track.set_dirty(3);
    let image = |stage: &Stage| stage.told().iter().any(|told| matches!(told, Told::Image(_)));
    stage.until("the region is sent", image).await;
    assert_eq!(stage.script.refused.load(Ordering::SeqCst), 0, "no image outside a gap");
    stage.until("protected again", |stage| stage.marks().len() == 4 && stage.shared.facts().gap.is_none()).await;
}

/// As before, while a sector of the only block that differs is written without a pause: that it was written to explains the
/// difference only perhaps, so the region is not forgotten.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_dirty_region_that_is_written_to_is_not_forgotten() {
    let stage = Stage::set().await;
    stage.protected().await;
    let (source, end) = (stage.source.clone(), Arc::new(AtomicBool::new(false)));
    let ended = end.clone();
    let writer = std::thread::spawn(move || {
        while !ended.load(Ordering::SeqCst) {
            // Never more than the worker can take.
            if source.stream.producer().saturating_sub(source.stream.consumer()) < 256 << 10 {
                source.write(3 * REGION_BYTES, 1);
            }
        }
    });
    stage.script.differs.store(1, Ordering::SeqCst);
    stage.source.track.set_dirty(3);
    // The image leaves out what is written to; what counts is that there was a gap in which it was sent.
    stage.until("protected again", |stage| stage.marks().len() == 4 && stage.shared.facts().gap.is_none()).await;
    end.store(true, Ordering::SeqCst);
    writer.join().expect("ends");
    assert_eq!(stage.marks()[2].reason, Some(GapReason::LateWrite));
    assert_eq!(stage.script.refused.load(Ordering::SeqCst), 0, "no image outside a gap");
}

/// A completion that nobody saw is no loss if the region is equal: no gap, no image, no alarm.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dirty_region_that_is_equal_is_no_gap() {
    let stage = Stage::set().await;
    stage.protected().await;
    let marks = stage.marks().len();
    stage.source.track.set_dirty(3);
    stage.until("the region is done", |stage| stage.source.track.dirty_count() == 0).await;
    let probes = |stage: &Stage| stage.shared.counters.probes.load(Ordering::SeqCst) > 0;
    stage.until("it was compared", probes).await;
    assert_eq!(stage.marks().len(), marks, "nobody was told of a gap");
    assert!(stage.shared.facts().gap.is_none());
}

/// A region is dirty and its writes never complete, as far as anybody can see: what was written there is in no stream perhaps, so it
/// does not stay protected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dirty_region_that_nobody_can_read_opens_a_gap() {
    let stage = Stage::set().await;
    stage.protected().await;
    stage.source.track.in_flight.store(true, Ordering::SeqCst);
    stage.source.track.set_dirty(3);
    stage.until("the gap is marked", |stage| stage.marks().len() == 3).await;
    assert_eq!(stage.marks()[2].reason, Some(GapReason::LateWrite));
    stage.source.track.in_flight.store(false, Ordering::SeqCst);
    stage.until("protected again", |stage| stage.marks().len() == 4 && stage.shared.facts().gap.is_none()).await;
}

/// As many regions of the first volume as are waited for at once are never free to be read: the second one gets its turn.
#[tokio::test]
async fn a_busy_volume_leaves_the_others_their_turn() {
    let source = PlayedSource { second: Some(PlayedTrack::default()), ..PlayedSource::default() };
    source.track.in_flight.store(true, Ordering::SeqCst);
    source.track.set_all_dirty();
    source.track(1).set_dirty(2);
    let files: Vec<_> = (0..2).map(|_| tempfile::NamedTempFile::new().expect("a file")).collect();
    let open = |file: &tempfile::NamedTempFile| {
        file.as_file().set_len(REGIONS * REGION_BYTES).expect("sized");
        DirectFile::open_read(file.path()).expect("opens")
    };
    let volumes = files.iter().map(open).collect();
    let (out, mut from_sync) = mpsc::channel(SYNC_REGIONS_MAX);
    let pool = BufPool::new(8, REGION_BYTES as usize);
    let sync = SyncThread::start("played", Arc::new(source), volumes, pool, out).expect("a thread");
    sync.shared().start(1, Vec::new());
    let read = tokio::time::timeout(Duration::from_secs(10), from_sync.recv()).await.expect("it has its turn");
    assert!(matches!(read, Some(FromSync::Read(read)) if (read.volume, read.region) == (1, 2)));
    from_sync.close();
}

/// Completions that could be anywhere make everything dirty only until capture has settled, so it is asked for that although
/// something is left: else neither ends (a volume of LVM under a database that syncs).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_ends_although_old_writes_complete_all_the_time() {
    let stage = Stage::set().await;
    stage.protected().await;
    stage.source.unsettled.store(50, Ordering::SeqCst);
    stage.until("capture settles", |stage| stage.source.unsettled.load(Ordering::SeqCst) == 0).await;
    stage.until("protected again", |stage| stage.marks().len() == 4 && stage.shared.facts().gap.is_none()).await;
}

/// Writes that never pause do not starve whoever wants a bookmark.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_bookmark_is_set_while_writes_never_pause() {
    let stage = Stage::set().await;
    stage.protected().await;
    let (source, end) = (stage.source.clone(), Arc::new(AtomicBool::new(false)));
    let ended = end.clone();
    let writer = std::thread::spawn(move || {
        while !ended.load(Ordering::SeqCst) {
            // Never more than the worker can take, never less.
            if source.stream.producer().saturating_sub(source.stream.consumer()) < 256 << 10 {
                source.write(0, 1);
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (answer, answered) = tokio::sync::oneshot::channel();
    stage.commands.send(Command::Bookmark("now".into(), answer)).await.expect("taken");
    let outcome = tokio::time::timeout(Duration::from_secs(8), answered).await;
    end.store(true, Ordering::SeqCst);
    writer.join().expect("ends");
    let (_, _, durable) = outcome.expect("answered in time").expect("answered").expect("set");
    assert!(durable);
}

/// A point that cannot be opened gets no name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_is_no_bookmark_in_a_gap() {
    let stage = Stage::set().await;
    let ask = async |name: &str| {
        let (answer, answered) = tokio::sync::oneshot::channel();
        stage.commands.send(Command::Bookmark(name.into(), answer)).await.expect("taken");
        answered.await.expect("answered")
    };
    stage.protected().await;
    assert!(ask("now").await.is_ok_and(|(_, _, durable)| durable));
    stage.script.stalled.store(true, Ordering::SeqCst);
    stage.source.track.in_flight.store(true, Ordering::SeqCst);
    stage.source.drop_write(1);
    stage.until("the gap is seen", |stage| stage.shared.facts().gap.is_some()).await;
    assert!(ask("late").await.is_err());
}

/// A write is skipped by the kernel, later ones are captured, and it takes a while until somebody looks: they are not sent before,
/// so that the gap begins before them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_sent_behind_a_write_that_may_have_been_skipped() {
    let stage = Stage::set().await;
    stage.protected().await;
    // From here on nobody looks but the test.
    stage.misses.note(clock::boot_ns(), 0);
    let skipped = stage.source.stream.producer();
    stage.source.write(512, 2);
    // The worker looks at the counters in each turn.
    for _ in 0..5 {
        let turned = Arc::new(AtomicBool::new(false));
        let seen = turned.clone();
        *stage.source.after_look.lock().expect("not poisoned") =
            Some(Box::new(move |_| seen.store(true, Ordering::SeqCst)));
        stage.until("a turn", |_| turned.load(Ordering::SeqCst)).await;
    }
    assert_eq!(stage.marks().len(), 2);
    assert!(stage.shared.durable.load(Ordering::SeqCst) <= skipped, "what is behind it was sent");
    stage.misses.note(clock::boot_ns(), 1);
    stage.until("the gap is marked", |stage| stage.marks().len() > 2).await;
    let marks = stage.marks();
    assert!(marks[2].reason == Some(GapReason::MissedEvents) && marks[2].position <= skipped, "{marks:?}");
}

/// A virtual machine was set back to a snapshot with its memory, and the receiver has what its other life sent: as many bytes of a
/// stream of the same name, and others. Before the agent hears of it its stream has grown past them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_has_more_than_was_sent_is_not_believed() {
    let stage = Stage::set().await;
    stage.protected().await;
    let (told, marks) = (stage.told().len(), stage.marks().len());
    stage.script.claims.store(u64::MAX, Ordering::SeqCst);
    stage.source.write(512, 2);
    stage.until("it is sent", |stage| stage.told().len() > told).await;
    // From here on nothing is sent.
    stage.misses.note(clock::boot_ns(), 0);
    stage.source.write(1024, 3);
    let claimed = stage.source.stream.producer();
    stage.source.write(2048, 4);
    stage.script.claims.store(claimed, Ordering::SeqCst);
    stage.until("all is compared", |stage| stage.marks().len() > marks).await;
    let marks = stage.marks();
    assert!(marks[2].reason.is_some() && stage.shared.facts().gap.is_some(), "{marks:?}");
    stage.misses.note(u64::MAX, 0);
    stage.protected().await;
}

/// A write before a bookmark was skipped by the kernel, which is found a moment after the bookmark is in the ring: nobody was told
/// that it is good.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bookmark_waits_for_a_look_for_skipped_writes() {
    let stage = Stage::set().await;
    stage.protected().await;
    stage.misses.note(clock::boot_ns(), 0);
    for (name, skipped) in [("before", 0), ("after", 1)] {
        let before = stage.source.stream.producer();
        let (answer, answered) = tokio::sync::oneshot::channel();
        stage.commands.send(Command::Bookmark(name.into(), answer)).await.expect("taken");
        stage.until("it is in the ring", |stage| stage.source.stream.producer() > before).await;
        stage.misses.note(clock::boot_ns(), skipped);
        let outcome = answered.await.expect("answered");
        assert_eq!(outcome.is_ok_and(|(_, _, durable)| durable), skipped == 0, "{name}");
    }
}

/// Nobody has looked for some seconds whether the kernel skipped writes: until somebody does, no gap ends, no point gets a
/// name, and status does not say that all is well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_good_while_it_is_not_known_whether_writes_were_skipped() {
    let stage = Stage::set().await;
    stage.protected().await;
    stage.until("good", |stage| stage.shared.data() == Data::Protected).await;
    stage.misses.note(1, 0);
    stage.until("not protected", |stage| stage.shared.data() == Data::Lagging).await;
    let status = stage.shared.status();
    assert!(status.rpo_seconds.is_none() && status.window.to.is_none() && status.reason.is_some(), "{status:?}");
    let (answer, answered) = tokio::sync::oneshot::channel();
    stage.commands.send(Command::Bookmark("now".into(), answer)).await.expect("taken");
    assert!(answered.await.expect("answered").is_err());

    stage.source.drop_write(1);
    stage.until("a gap", |stage| stage.shared.facts().gap.is_some()).await;
    // Everything but the look is there, and the worker has turned often since.
    let producer = stage.source.stream.producer();
    stage.until("two canaries", |stage| stage.source.stream.producer() > producer + 100).await;
    assert!(stage.marks()[2..].iter().all(|mark| mark.kind != MarkKind::GapEnd), "the gap does not end");
    stage.misses.note(u64::MAX, 0);
    stage.protected().await;
    stage.until("good", |stage| stage.shared.data() == Data::Protected).await;
}

/// The receiver reads nothing, and regions are dirty: some of the buffers for regions stay for other groups.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_is_stuck_leaves_others_some_of_the_buffers() {
    let stage = Stage::set().await;
    stage.protected().await;
    stage.script.stalled.store(true, Ordering::SeqCst);
    for region in 0..REGIONS {
        stage.source.drop_write(region);
    }
    let left = stage.regions.count() / 4;
    stage.until("regions are read", |stage| stage.regions.available() <= left).await;
    stage.until("the gap is shown", |stage| stage.shared.facts().gap.is_some()).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(stage.regions.available(), left);
    stage.script.stalled.store(false, Ordering::SeqCst);
    stage.protected().await;
    stage.until("all are back", |stage| stage.regions.available() == stage.regions.count()).await;
}

/// The receiver reads nothing: the group ends all the same, at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_ends_while_its_receiver_is_stuck() {
    let stage = Stage::set().await;
    stage.protected().await;
    stage.script.stalled.store(true, Ordering::SeqCst);
    for _ in 0..64 {
        stage.source.stream.append(RecordKind::Write, 0, &vec![3; 1 << 20]);
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    stage.stop.send(true).expect("it lives");
    tokio::time::timeout(Duration::from_secs(5), stage.task).await.expect("ends").expect("without a panic");
}

/// The receiver reads nothing, and writes go past the ring meanwhile: status says so without waiting for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_is_seen_while_the_receiver_is_stuck() {
    let stage = Stage::set().await;
    stage.protected().await;
    stage.script.stalled.store(true, Ordering::SeqCst);
    for _ in 0..64 {
        stage.source.stream.append(RecordKind::Write, 0, &vec![3; 1 << 20]);
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    stage.source.drop_write(1);
    stage.until("the gap is seen", |stage| stage.shared.facts().gap.is_some()).await;
}

/// Status is asked while acknowledgements take the ring away under it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_and_acknowledgements_do_not_meet() {
    let stage = Stage::set().await;
    stage.protected().await;
    let began = Instant::now();
    let (shared, source) = (stage.shared.clone(), stage.source.clone());
    let asker = std::thread::spawn(move || {
        while began.elapsed() < Duration::from_secs(3) {
            let _ = shared.status();
        }
    });
    while began.elapsed() < Duration::from_secs(3) {
        if source.stream.producer().saturating_sub(source.stream.consumer()) < 64 << 10 {
            source.write(0, 1);
        }
        tokio::task::yield_now().await;
    }
    asker.join().expect("status never panics");
    assert!(!stage.task.is_finished(), "the worker lives");
}

/// The page and the table say the same names.
#[test]
fn the_counters_are_documented() {
    let page = include_str!("../../../docs/json.md");
    let table = page.split("### Counters of an agent").nth(1).and_then(|rest| rest.split("\n###").next());
    let rows = table.expect("a table").lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    let told: BTreeSet<&str> = rows.flat_map(|row| row.split(['`', ' '])).collect();
    let (source, volumes) = (Arc::new(PlayedSource::default()), vec![("/dev/played".to_owned(), REGION_BYTES)]);
    let shared = GroupShared::new("played".into(), volumes, [7; 16], source, Duration::from_secs(5), false);
    let counted = shared.status().counters;
    let counted: BTreeSet<&str> = counted.keys().map(String::as_str).collect();
    assert_eq!(told.into_iter().filter(|name| !name.is_empty()).collect::<BTreeSet<_>>(), counted);
}
