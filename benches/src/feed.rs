//! A group of the receiver in this process: its own threads, fed with batches as a session makes them. No network and no
//! agent stand before it, so that what is measured is the disk and the code that uses it.

use bytes::BytesMut;
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use varve_common::config::ReceiverConfig;
use varve_common::format::{BLOCK_BYTES, ENTRY_HEADER_BYTES, Mark, MarkKind};
use varve_common::record::{RecordHeader, RecordKind, append_record};
use varve_common::state::GapReason;
use varve_common::wire::{Codec, FrameKind};
use varve_receiver::apply::applier::Applier;
use varve_receiver::apply::collect::Cursor;
use varve_receiver::apply::history::History;
use varve_receiver::apply::mark::AppliedFile;
use varve_receiver::apply::replica::Replicas;
use varve_receiver::apply::work::{Landed, Queue, Work};
use varve_receiver::group::live::{Counters, Live};
use varve_receiver::group::meta::{GroupMeta, VolumeMeta};
use varve_receiver::group::open::{APPLIED_NAME, HISTORY_NAME, LANDING_NAME, OpenGroup, Past};
use varve_receiver::group::replicas;
use varve_receiver::group::stream::StreamState;
use varve_receiver::landing::Place;
use varve_receiver::landing::arena::Arenas;
use varve_receiver::landing::batch::{Batch, Effect, Entry, Item, total_bytes};
use varve_receiver::landing::lander::Lander;
use varve_receiver::landing::log::{Log, Writer};
use varve_receiver::landing::reader::Reader;
use varve_receiver::landing::recover::recover;
use varve_receiver::limits::{ARENA_BYTES, INDEX_CACHE_BYTES, INDEX_FILES_OPEN_MAX};
use varve_tests::wait_until;
use varve_timeline::cache::IndexCache;
use varve_timeline::chronicle::StreamFacts;
use varve_timeline::recorder::Recorder;
use varve_timeline::timeline::Timeline;

/// Plain bytes of a frame, about, as an agent under load makes them.
const FRAME_BYTES: usize = 512 << 10;
/// Random bytes that payloads are cut from.
const NOISE_BYTES: usize = 16 << 20;
/// Of one write while a volume is filled.
const FILL_BYTES: usize = 256 << 10;
/// A writer that waits for memory looks again after this long.
const PAUSE: Duration = Duration::from_micros(200);
const LIMIT: Duration = Duration::from_secs(180);
const INCARNATION: [u8; 16] = [7; 16];

/// The daemon's cache of indexes.
pub fn index_cache() -> Arc<IndexCache> {
    Arc::new(IndexCache::new(INDEX_CACHE_BYTES, INDEX_FILES_OPEN_MAX))
}

/// Makes what a receiver needs to open the group in `dir`, with one replica.
#[track_caller]
pub fn make_group(dir: &Path, replica: PathBuf, bytes: u64) -> GroupMeta {
    std::fs::create_dir_all(dir).unwrap();
    let volume = VolumeMeta::new("/dev/bench", bytes, replica);
    replicas::prepare(&volume).unwrap();
    let name = dir.file_name().unwrap().to_string_lossy().into_owned();
    let meta = GroupMeta::new(&name, "bench", 1, 1, vec![volume]);
    AppliedFile::create(&dir.join(APPLIED_NAME), meta.id()).unwrap();
    meta.save(dir).unwrap();
    meta
}

/// What the stream of a group brings, batch by batch.
pub struct Source {
    /// For places.
    pub random: StdRng,
    noise: Vec<u8>,
    arenas: Arenas,
    plain: Vec<u8>,
    position: u64,
    time_ns: u64,
    /// Records so far; each says its number in its first bytes.
    pub written: u64,
}

impl Source {
    /// At the stream's begin.
    pub fn new() -> Self {
        let mut random = StdRng::seed_from_u64(rand::random());
        let mut noise = vec![0; NOISE_BYTES];
        random.fill_bytes(&mut noise);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let time_ns = now.as_nanos() as u64;
        Source { random, noise, arenas: Arenas::new(), plain: Vec::new(), position: 0, time_ns, written: 0 }
    }

    /// Begins the stream; until [`Source::equal`] nothing is history.
    pub fn begin(&self) -> Batch {
        self.mark(MarkKind::Begin, Some(GapReason::NewRing))
    }

    /// From here on the replicas equal the volumes: what is replaced is kept.
    pub fn equal(&self) -> Batch {
        self.mark(MarkKind::GapEnd, None)
    }

    fn mark(&self, kind: MarkKind, reason: Option<GapReason>) -> Batch {
        let (incarnation, position, time_ns) = (INCARNATION, self.position, self.time_ns);
        Batch::of_mark(&Mark { kind, reason, incarnation, position, time_ns, epoch: 1, height_min: 0 })
    }

    /// One batch of at most `most` writes of `bytes` incompressible bytes each, at the offsets that `place` gives. `None`:
    /// all memory is in use.
    pub fn writes(&mut self, bytes: usize, most: usize, mut place: impl FnMut(&mut StdRng) -> u64) -> Option<Batch> {
        let mut arena = self.arenas.take()?;
        let record = bytes.next_multiple_of(8) + size_of::<RecordHeader>() + 8;
        let frame = total_bytes((FRAME_BYTES / record).max(1) * record);
        let (mut items, mut left) = (Vec::new(), most);
        while left > 0 && arena.len() + frame + BLOCK_BYTES <= ARENA_BYTES {
            let count = (FRAME_BYTES / record).max(1).min(left);
            self.plain.clear();
            for _ in 0..count {
                let at = place(&mut self.random);
                self.record(bytes, at);
            }
            items.push(self.entry(&mut arena));
            left -= count;
        }
        let entry_bytes = arena.len();
        arena.resize(entry_bytes.next_multiple_of(BLOCK_BYTES), 0);
        let bytes = arena.split();
        self.arenas.retire(arena);
        Some(Batch { bytes, entry_bytes, items })
    }

    fn record(&mut self, bytes: usize, offset: u64) {
        self.time_ns += 5_000;
        self.written += 1;
        let header = RecordHeader {
            kind: RecordKind::Write as u8,
            flags: 0,
            volume: 0.into(),
            payload: (bytes as u32).into(),
            time_ns: self.time_ns.into(),
            offset: offset.into(),
            length: (bytes as u64).into(),
        };
        let from = self.random.random_range(0..(NOISE_BYTES - bytes) / 8) * 8;
        append_record(&mut self.plain, header, &self.noise[from..from + bytes]);
        // No two of them are equal.
        let begin = self.plain.len() - bytes.next_multiple_of(8);
        self.plain[begin..begin + 8].copy_from_slice(&self.written.to_le_bytes());
    }

    fn entry(&mut self, arena: &mut BytesMut) -> Item {
        let (at, body) = (arena.len(), self.plain.len());
        arena.resize(at + ENTRY_HEADER_BYTES, 0);
        arena.extend_from_slice(&self.plain);
        arena.resize(at + total_bytes(body), 0);
        let crc = crc32fast::hash(&self.plain);
        let position = self.position;
        self.position += body as u64;
        Item::Entry(Entry {
            at,
            kind: FrameKind::Data,
            codec: Codec::Plain,
            incarnation: INCARNATION,
            position,
            body_bytes: body,
            plain_bytes: body,
            plain_crc: crc,
            body_crc: crc,
            effect: Effect::Data { end: self.position, time_ns: Some(self.time_ns) },
        })
    }
}

/// A group that takes batches.
pub struct Group {
    /// What the replicas were.
    pub timeline: Arc<Timeline>,
    counters: Arc<Counters>,
    live: Arc<Live>,
    queue: Arc<Queue>,
    way: Way,
    keeper: Keeper,
}

enum Way {
    /// The landing log first, as in the daemon.
    Whole(OpenGroup),
    /// Straight to the applier.
    Applier { thread: JoinHandle<()>, place: Place, chain: u32 },
}

impl Group {
    /// With its landing log: everything that the daemon does behind the network. `keep_bytes`: older history goes.
    #[track_caller]
    pub fn whole(dir: &Path, meta: &GroupMeta, keep_bytes: u64) -> Self {
        let config = ReceiverConfig::parse("receiver.toml", "").unwrap();
        let counters = Arc::new(Counters::default());
        let open = OpenGroup::open(dir, meta, &config, &counters, Past::Closed(index_cache())).unwrap();
        let (timeline, live, queue) = (open.timeline.clone(), open.live.clone(), open.queue.clone());
        let keeper = Keeper::start(timeline.clone(), keep_bytes);
        Group { timeline, counters, live, queue, way: Way::Whole(open), keeper }
    }

    /// The applier alone: what is landed comes from memory, as in a daemon that keeps up.
    #[track_caller]
    pub fn applier(dir: &Path, meta: &GroupMeta, keep_bytes: u64) -> Self {
        let place = Place { segment: 1, offset: BLOCK_BYTES as u64 };
        let mark = AppliedFile::open(&dir.join(APPLIED_NAME), meta.id()).unwrap();
        let log = Arc::new(Log::open(&dir.join(LANDING_NAME), meta.id(), 64 << 20, 1 << 30, place).unwrap());
        let timeline = Timeline::open(&dir.join(HISTORY_NAME), meta.id(), index_cache()).unwrap();
        let recorder = Recorder::open(timeline.clone(), &facts(&StreamState::fresh()), 0, 0).unwrap();
        let list = meta.volumes.iter().map(|volume| replicas::open(volume).unwrap()).collect();
        let counters = Arc::new(Counters::default());
        let live = Arc::new(Live::new(counters.clone(), StreamState::fresh(), StreamState::fresh()));
        let queue = Arc::new(Queue::default());
        let applier = Applier {
            live: live.clone(),
            queue: queue.clone(),
            log: log.clone(),
            volumes: meta.volume_bytes(),
            replicas: Replicas::new(list).unwrap(),
            mark,
            cursor: Cursor::new(Reader::new(log, place, 0), StreamState::fresh()),
            history: History::new(recorder, counters.clone()),
            rest_at: Instant::now(),
            is_late: false,
        };
        let thread = std::thread::Builder::new().name("apply".into()).spawn(move || applier.run()).unwrap();
        let keeper = Keeper::start(timeline.clone(), keep_bytes);
        Group { timeline, counters, live, queue, way: Way::Applier { thread, place, chain: 0 }, keeper }
    }

    /// Hands a batch on.
    #[track_caller]
    pub fn push(&mut self, mut batch: Batch) {
        let (place, chain) = match &mut self.way {
            Way::Whole(open) => return open.batches.send(batch).unwrap(),
            Way::Applier { place, chain, .. } => (place, chain),
        };
        for item in &batch.items {
            let Item::Entry(entry) = item else { continue };
            let header = entry.header(place.segment, place.offset + entry.at as u64, *chain);
            let bytes = header.encode();
            batch.bytes[entry.at..entry.at + bytes.len()].copy_from_slice(&bytes);
            *chain = u32::from_le_bytes(bytes[68..72].try_into().unwrap());
        }
        let landed = Landed { place: *place, entry_bytes: batch.entry_bytes, bytes: batch.bytes.freeze() };
        *place = landed.end();
        self.queue.push(Work::Landed(landed));
    }

    /// Writes until `go_on` says no; it is asked before each batch with the number of writes so far. Gives that number.
    #[track_caller]
    pub fn write(
        &mut self,
        source: &mut Source,
        bytes: usize,
        mut place: impl FnMut(&mut StdRng) -> u64,
        mut go_on: impl FnMut(u64) -> usize,
    ) -> u64 {
        let mut written = 0;
        loop {
            let most = go_on(written);
            if most == 0 {
                return written;
            }
            match source.writes(bytes, most, &mut place) {
                Some(batch) => {
                    written += records(&batch, bytes);
                    self.push(batch);
                }
                None => {
                    self.check();
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    /// Fills the first `bytes` of the volume, from the stream's begin. Nothing of this is history, nor of what follows until
    /// the replicas are said to be equal.
    #[track_caller]
    pub fn fill(&mut self, source: &mut Source, bytes: u64) {
        self.push(source.begin());
        let mut places = (0..).step_by(FILL_BYTES);
        let next = |_: &mut StdRng| places.next().unwrap();
        let count = bytes / FILL_BYTES as u64;
        self.write(source, FILL_BYTES, next, |written| (count - written) as usize);
        self.finish(source);
    }

    /// From here on the replicas equal the volumes: what is replaced is kept.
    #[track_caller]
    pub fn begin_history(&mut self, source: &Source) {
        self.push(source.equal());
        self.finish(source);
        wait_until(LIMIT, "the gap's end is applied", || self.live.view().applied.is_consistent());
    }

    #[track_caller]
    fn check(&self) {
        if let Some(failure) = self.live.failure() {
            panic!("the group failed: {}", failure.text);
        }
    }

    /// Until all of the source is in the replica, synced and marked.
    #[track_caller]
    pub fn finish(&self, source: &Source) {
        self.queue.hurry();
        wait_until(LIMIT, "everything is applied", || {
            self.check();
            let applied = self.live.view().applied;
            applied.at.incarnation == INCARNATION && applied.at.position >= source.position
        });
    }

    /// Height and time of what is applied.
    pub fn height(&self) -> (u64, u64) {
        let applied = self.live.view().applied;
        (applied.height, applied.at.time_ns)
    }

    /// A counter of the receiver.
    pub fn counter(&self, name: &str) -> u64 {
        self.counters.snapshot()[name]
    }

    /// Ends its threads; what waits is not applied.
    pub fn close(self) {
        let Group { queue, way, keeper, .. } = self;
        keeper.end();
        match way {
            Way::Whole(open) => open.close(),
            Way::Applier { thread, .. } => {
                queue.close();
                thread.join().unwrap();
            }
        }
    }
}

/// Lands writes of `bytes` bytes each, `count` of them, with nobody who applies them: what a receiver has whose replica is too
/// slow. Gives the bytes landed. The group must not be open.
#[track_caller]
pub fn land_only(
    dir: &Path,
    meta: &GroupMeta,
    source: &mut Source,
    bytes: usize,
    count: u64,
    mut place: impl FnMut(&mut StdRng) -> u64,
) -> u64 {
    let config = ReceiverConfig::parse("receiver.toml", "").unwrap();
    let slot = *AppliedFile::open(&dir.join(APPLIED_NAME), meta.id()).unwrap().slot();
    let (mark, state) =
        (Place { segment: slot.segment.get(), offset: slot.offset.get() }, StreamState::from_slot(&slot));
    let (segment, most) = (config.landing_segment_bytes, config.landing_bytes_max);
    let log = Arc::new(Log::open(&dir.join(LANDING_NAME), meta.id(), segment, most, mark).unwrap());
    let recovered = recover(&log, mark, slot.chain.get(), state, &meta.volume_bytes()).unwrap();
    let live = Arc::new(Live::new(Arc::default(), recovered.state, state));
    let queue = Arc::new(Queue::default());
    let writer = Writer::new(log, recovered.end, recovered.chain);
    let mut lander = Lander { live: live.clone(), queue: queue.clone(), writer, state: recovered.state };
    let (mut written, mut landed) = (0, 0);
    while written < count {
        let batch = source.writes(bytes, (count - written) as usize, &mut place).expect("memory");
        written += records(&batch, bytes);
        landed += batch.entry_bytes as u64;
        lander.land(batch).unwrap();
        queue.spill();
    }
    landed
}

fn records(batch: &Batch, bytes: usize) -> u64 {
    let record = bytes.next_multiple_of(8) + size_of::<RecordHeader>() + 8;
    batch.entries().map(|entry| (entry.plain_bytes / record) as u64).sum()
}

/// What the applied mark says, for a recorder.
pub fn facts(state: &StreamState) -> StreamFacts {
    StreamFacts {
        height: state.height,
        time_ns: state.at.time_ns,
        incarnation: state.at.incarnation,
        position: state.at.position,
        epoch: 1,
        gap: state.gap,
    }
}

/// Merges and lets history expire, as the daemon's keeper does.
struct Keeper {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Keeper {
    fn start(timeline: Arc<Timeline>, keep_bytes: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                while timeline.merge_one(|| !stopped.load(Ordering::Relaxed)).unwrap() {}
                while timeline.sizes().bytes() > keep_bytes && timeline.drop_oldest(None).unwrap().is_some() {}
                std::thread::sleep(Duration::from_millis(250));
            }
        });
        Keeper { stop, thread }
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}
