//! The journal on real files, against a model: whatever is spilled, acknowledged, sent, cut off or damaged.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use varve_common::format::BLOCK_BYTES;
use varve_common::record::{RecordHeader, RecordKind, append_record, entry_bytes};

const CAPACITY: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(20);

/// A ring in memory whose bytes tell their position: what is read back can be compared with what was written.
#[derive(Default)]
struct Model {
    bytes: Mutex<Vec<u8>>,
    consumer: AtomicU64,
    durable: AtomicU64,
    held: Mutex<()>,
    capacity: AtomicU64,
}

impl Model {
    fn new(capacity: u64) -> Arc<Self> {
        let model = Self::default();
        model.capacity.store(capacity, Ordering::SeqCst);
        Arc::new(model)
    }

    fn produce(&self, payload: usize) -> u64 {
        let mut bytes = lock(&self.bytes);
        let position = bytes.len() as u64;
        let header = RecordHeader {
            kind: RecordKind::Write as u8,
            flags: 0,
            volume: 0.into(),
            payload: (payload as u32).into(),
            time_ns: (1_000 + position).into(),
            offset: position.into(),
            length: (payload as u64).into(),
        };
        let fill: Vec<u8> = (0..payload).map(|n| (position as usize * 31 + n * 7) as u8).collect();
        append_record(&mut bytes, header, &fill);
        bytes.len() as u64
    }

    fn end(&self) -> u64 {
        lock(&self.bytes).len() as u64
    }

    /// As [`GroupShared::release`](crate::group::GroupShared) does it.
    fn acknowledge(&self, journal: &Journal, position: u64) {
        let _held = lock(&self.held);
        let until = journal.release(position);
        assert!(until <= position);
        self.consumer.fetch_max(until, Ordering::SeqCst);
        self.durable.fetch_max(position, Ordering::SeqCst);
    }

    fn boundaries(&self) -> Vec<u64> {
        let bytes = lock(&self.bytes);
        let (mut at, mut all) = (0, Vec::new());
        while at < bytes.len() {
            all.push(at as u64);
            at += entry_bytes(u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"))) as usize;
        }
        all.push(at as u64);
        all
    }
}

impl Tape for Model {
    fn extent(&self) -> (u64, u64, u64) {
        (self.consumer.load(Ordering::SeqCst), self.end(), self.capacity.load(Ordering::SeqCst))
    }
    fn take(&self, from: Option<u64>, until: u64, out: &mut [u8]) -> Taken {
        let _held = lock(&self.held);
        let consumer = self.consumer.load(Ordering::SeqCst);
        let from = from.unwrap_or(consumer);
        if from < consumer {
            return Taken::Moved;
        }
        let bytes = lock(&self.bytes);
        let mut at = from as usize;
        while at < until as usize {
            let total = entry_bytes(u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"))) as usize;
            if at + total - from as usize > out.len() {
                if at == from as usize {
                    return Taken::NoRoom;
                }
                break;
            }
            at += total;
        }
        if at == from as usize {
            return Taken::Nothing;
        }
        out[..at - from as usize].copy_from_slice(&bytes[from as usize..at]);
        Taken::Bytes { from, end: at as u64, first_write_ns: Some(1_000 + from) }
    }
    fn synced(&self, end: u64, keep: &mut dyn FnMut(u64) -> bool) {
        let _held = lock(&self.held);
        if keep(self.durable.load(Ordering::SeqCst)) {
            self.consumer.fetch_max(end, Ordering::SeqCst);
        }
    }
    fn settle(&self) {
        let _held = lock(&self.held);
        self.consumer.fetch_max(self.durable.load(Ordering::SeqCst), Ordering::SeqCst);
    }
}

fn settings(dir: &Path, mib: u64) -> Settings {
    Settings { dir: dir.to_owned(), bytes_max: mib << 20 }
}

/// On a disk: a memory file system has no O_DIRECT on every kernel.
fn dir() -> tempfile::TempDir {
    tempfile::TempDir::new_in("/var/tmp").expect("temp dir")
}

/// Opened as the worker does it.
fn open(dir: &Path, mib: u64, incarnation: u8, model: &Arc<Model>) -> (Arc<Journal>, Spilling) {
    let journal = Arc::new(Journal::open(&settings(dir, mib), "g", [incarnation; 16], &**model));
    if let Some((start, end)) = journal.range() {
        model.durable.store(start, Ordering::SeqCst);
        model.synced(end, &mut |_| true);
    }
    let spilling = journal.spill(model.clone()).expect("a thread");
    (journal, spilling)
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < LIMIT, "never: {what}\n{}", threads());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Where the threads of this process stand. Once one of a journal did not go on and did not end, for a reason that is not known.
fn threads() -> String {
    let tell = |task: std::fs::DirEntry| {
        let file = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_else(|e| e.to_string());
        let [name, wait, call, stack] = ["comm", "wchan", "syscall", "stack"].map(file);
        format!("{} in {wait}, system call {}\n{stack}", name.trim_end(), call.trim_end())
    };
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    tasks.map(tell).collect::<Vec<_>>().join("\n")
}

/// Everything from `from` on is what the ring had there.
fn assert_reads(journal: &Journal, model: &Model, from: u64, end: u64) {
    let mut at = from;
    while at < end {
        let chunk = journal.read(at, None).expect("whole");
        let next = chunk.cut(at, u64::MAX, 64 << 10).expect("a boundary");
        assert!(next > at);
        assert_eq!(chunk.bytes(at, next), &lock(&model.bytes)[at as usize..next as usize], "bytes at {at}");
        at = next;
    }
    assert_eq!(at, end);
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir.join("g")).expect("a directory");
    // One that goes away meanwhile is gone.
    let read = |entry: std::fs::DirEntry| {
        Some((entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path()).ok()?))
    };
    entries.filter_map(|entry| read(entry.expect("an entry"))).collect()
}

fn put(dir: &Path, files: &BTreeMap<String, Vec<u8>>) {
    let dir = dir.join("g");
    // Nobody may have had it.
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("made");
    for (name, bytes) in files {
        std::fs::write(dir.join(name), bytes).expect("written");
    }
}

#[test]
fn a_ring_that_is_less_than_half_full_is_not_written() {
    let (dir, model) = (dir(), Model::new(CAPACITY));
    let (journal, _spilling) = open(dir.path(), 64, 1, &model);
    for _ in 0..200 {
        let end = model.produce(100 << 10);
        journal.offer(end, None, false, model.extent());
        model.acknowledge(&journal, end);
    }
    model.produce(400 << 10);
    journal.offer(model.end(), None, false, model.extent());
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((journal.spent(), journal.range()), ((0, 0), None));
    assert!(files(dir.path()).is_empty(), "no file, no byte");
}

#[test]
fn what_is_spilled_is_read_back_and_released_and_the_space_goes_back() {
    let (dir, model) = (dir(), Model::new(CAPACITY));
    let (journal, _spilling) = open(dir.path(), 256, 1, &model);
    for round in 0..3 {
        let start = model.consumer.load(Ordering::SeqCst);
        for _ in 0..800 {
            let end = model.produce(100 << 10);
            journal.offer(end, None, false, model.extent());
            until("there is room in the ring", || {
                let (consumer, producer, capacity) = model.extent();
                producer - consumer <= capacity
            });
        }
        let (from, end) = journal.range().expect("spilled");
        assert_eq!((from, end), (start, model.consumer.load(Ordering::SeqCst)), "no byte in neither");
        assert_eq!(journal.oldest_write_ns(from), Some(1_000 + from));
        assert_reads(&journal, &model, from, end);
        for at in model.boundaries().into_iter().filter(|at| *at > from).step_by(50) {
            model.acknowledge(&journal, at);
            assert!(journal.range().is_none_or(|(from, _)| from == at), "round {round}");
        }
        model.acknowledge(&journal, model.end());
        until("the files go", || files(dir.path()).len() <= 2);
        assert_eq!(journal.status().used_bytes, 0);
    }
    let (stream, disk) = journal.spent();
    assert!(stream > 200 << 20 && disk * 100 <= stream * 105, "{stream} bytes took {disk}");
}

#[test]
fn a_full_journal_says_so_and_goes_on_when_there_is_room() {
    let (dir, model) = (dir(), Model::new(CAPACITY));
    let (journal, _spilling) = open(dir.path(), 64, 1, &model);
    let offer = |n: usize| {
        for _ in 0..n {
            let (consumer, producer, capacity) = model.extent();
            if producer - consumer < capacity {
                model.produce(300 << 10);
            }
            journal.offer(model.end(), None, false, model.extent());
            std::thread::sleep(Duration::from_micros(500));
        }
    };
    until("it is full", || {
        offer(50);
        journal.status().error.is_some()
    });
    let (start, end) = journal.range().expect("there");
    assert!(end - start > 55 << 20 && end - start <= 64 << 20, "{}", end - start);
    assert!(files(dir.path()).values().map(Vec::len).sum::<usize>() <= 64 << 20);
    let half = model.boundaries().into_iter().find(|at| *at > (start + end) / 2).expect("one");
    model.acknowledge(&journal, half);
    until("it goes on", || {
        offer(10);
        journal.range().is_some_and(|(_, now)| now > end)
    });
    let (from, end) = journal.range().expect("there");
    assert_reads(&journal, &model, from, end);
}

/// Killed at any byte of the last batch, in any order of its blocks: what was synced before is all there, and the ring
/// goes on where the journal ends; what is written later is found, too.
#[test]
fn a_kill_at_any_write_loses_nothing() {
    let (dir, model) = (dir(), Model::new(1 << 40));
    let (journal, spilling) = open(dir.path(), 64, 1, &model);
    for _ in 0..40 {
        model.produce(9000);
    }
    assert!(journal.flush(model.end(), None, LIMIT));
    let (synced, before) = (model.end(), files(dir.path()));
    for _ in 0..3 {
        model.produce(70_000);
    }
    assert!(journal.flush(model.end(), None, LIMIT));
    let after = files(dir.path());
    drop(spilling);
    let (name, old) = before.first_key_value().expect("a segment");
    let new = &after[name];
    let first = old.iter().zip(new).position(|(a, b)| a != b).expect("they differ");
    let last = old.len() - old.iter().rev().zip(new.iter().rev()).position(|(a, b)| a != b).expect("they differ");
    let (from, to) = (first / BLOCK_BYTES, last.div_ceil(BLOCK_BYTES));
    let mut seed = 7u64;
    for round in 0..60 {
        // A prefix, then any subset of the blocks.
        let mut torn = old.clone();
        for block in from..to {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let written = if round < to - from { block < from + round } else { seed >> 33 & 1 == 0 };
            let range = block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES;
            if written {
                torn[range.clone()].copy_from_slice(&new[range]);
            }
        }
        put(dir.path(), &BTreeMap::from([(name.clone(), torn)]));
        for consumer in [synced, 0] {
            model.consumer.store(consumer, Ordering::SeqCst);
            model.durable.store(0, Ordering::SeqCst);
            let (journal, spilling) = open(dir.path(), 64, 1, &model);
            let (start, end) = journal.range().expect("attached");
            assert!(start == 0 && (end == synced || end == model.end()), "{end}");
            assert_eq!(model.consumer.load(Ordering::SeqCst), end);
            assert!(end == model.end() || journal.flush(model.end(), None, LIMIT));
            assert_reads(&journal, &model, 0, model.end());
            drop((journal, spilling));
            let (journal, _spilling) = open(dir.path(), 64, 1, &model);
            assert_eq!(journal.range(), Some((0, model.end())), "found again");
            assert_reads(&journal, &model, 0, model.end());
        }
    }
}

/// Cut off at any removal while an acknowledged journal is recycled, and the ring went on meanwhile: it is empty, not detached,
/// so that the next outage can be spilled before the receiver is heard of.
#[test]
fn a_recycling_that_is_cut_off_is_finished() {
    let (dir, model) = (dir(), Model::new(CAPACITY));
    let (journal, spilling) = open(dir.path(), 64, 1, &model);
    for _ in 0..400 {
        let end = model.produce(100 << 10);
        journal.offer(end, None, true, model.extent());
        until("there is room in the ring", || {
            let (consumer, producer, capacity) = model.extent();
            producer - consumer <= capacity
        });
    }
    drop(spilling);
    for _ in 0..4 {
        model.produce(100 << 10);
    }
    let whole = files(dir.path());
    assert!(whole.len() > 2, "{:?}", whole.keys());
    // Everything was acknowledged, the ring a little further than the journal reaches.
    let (_, end) = journal.range().expect("spilled");
    let beyond = model.boundaries().into_iter().find(|at| *at > end).expect("more in the ring");
    model.acknowledge(&journal, beyond);
    drop(journal);
    let names: Vec<String> = whole.keys().cloned().collect();
    for left in 1..=names.len() {
        // Newest first.
        let mut cut: BTreeMap<String, Vec<u8>> =
            names[..left].iter().map(|name| (name.clone(), whole[name].clone())).collect();
        cut.insert("empty".to_owned(), Vec::new());
        put(dir.path(), &cut);
        let (journal, _spilling) = open(dir.path(), 64, 1, &model);
        assert_eq!((journal.detached(), journal.range()), (None, None), "{left} left");
        assert!(!files(dir.path()).contains_key("empty"));
        assert!(journal.flush(model.end(), None, LIMIT), "{left} left: nothing can be spilled: {:?}", journal.status());
        let (from, end) = journal.range().expect("spilled");
        assert_eq!((from, end), (beyond, model.end()));
        assert_reads(&journal, &model, from, end);
        model.consumer.store(beyond, Ordering::SeqCst);
    }
}

/// Segments that were recycled one by one still hold what they held; once the journal is empty nothing of it comes back.
#[test]
fn what_was_recycled_does_not_come_back() {
    let (dir, model) = (dir(), Model::new(CAPACITY));
    let (journal, spilling) = open(dir.path(), 64, 1, &model);
    for _ in 0..400 {
        let end = model.produce(100 << 10);
        journal.offer(end, None, true, model.extent());
        until("there is room in the ring", || {
            let (consumer, producer, capacity) = model.extent();
            producer - consumer <= capacity
        });
    }
    let segments = || lock(&journal.segments).as_ref().map_or(0, |segments| segments.live().count());
    assert!(segments() > 2);
    for at in model.boundaries() {
        let before = segments();
        model.acknowledge(&journal, at);
        // Each is recycled before the next is acknowledged.
        if lock(&journal.inner).index.oldest_segment().is_some_and(|oldest| oldest > journal_oldest(&journal)) {
            until("a segment is recycled", || segments() < before);
        }
    }
    until("it is empty", || segments() == 0);
    // Ends when that is done.
    drop((spilling, journal));
    model.produce(100);
    let (journal, _spilling) = open(dir.path(), 64, 1, &model);
    assert_eq!((journal.detached(), journal.range()), (None, None));
}

/// Oldest segment in use.
fn journal_oldest(journal: &Journal) -> u64 {
    let segments = lock(&journal.segments);
    let oldest = segments.as_ref().and_then(|segments| segments.live().next().map(|(_, header)| header.sequence.get()));
    oldest.unwrap_or(u64::MAX)
}

#[test]
fn a_journal_of_another_ring_is_detached_and_of_another_group_is_nobodys() {
    let (dir, model) = (dir(), Model::new(1 << 40));
    let gap = Some((GapReason::RingFull, 96));
    {
        let (journal, _spilling) = open(dir.path(), 64, 1, &model);
        model.produce(50);
        assert!(journal.flush(model.end(), None, LIMIT));
        let end = model.produce(50);
        assert!(journal.flush(end, gap, LIMIT));
    }
    let ring = Model::new(CAPACITY);
    let (journal, _spilling) = open(dir.path(), 64, 2, &ring);
    let detached = journal.detached().expect("of an earlier ring");
    assert_eq!((detached.incarnation, detached.start, detached.end, detached.gap), ([1; 16], 0, model.end(), gap));
    assert_eq!((journal.range(), journal.detached_bytes()), (None, model.end()));
    assert_reads(&journal, &model, 0, model.end());
    // The new ring's positions mean nothing to it, and nothing is put behind it.
    ring.produce(900 << 10);
    ring.acknowledge(&journal, 0);
    assert!(!journal.flush(ring.end(), None, Duration::from_millis(50)));
    journal.release(1 << 40);
    assert!(journal.detached().is_some());
    journal.release_detached(model.end());
    assert!(journal.detached().is_none());
    journal.discard();
    assert!(journal.flush(ring.end(), None, LIMIT));
    assert_eq!(journal.range(), Some((0, ring.end())));
    assert_reads(&journal, &ring, 0, ring.end());

    std::fs::rename(dir.path().join("g"), dir.path().join("h")).expect("moved");
    let other = Journal::open(&settings(dir.path(), 64), "h", [2; 16], &*ring);
    assert_eq!((other.range(), other.detached()), (None, None));
}

/// A gap that is found after the bytes around it were spilled is said in a chunk of its own.
#[test]
fn a_gap_is_written_down() {
    let (dir, model) = (dir(), Model::new(1 << 40));
    let (journal, spilling) = open(dir.path(), 64, 1, &model);
    let end = model.produce(5000);
    assert!(journal.flush(end, None, LIMIT));
    let before = journal.spent().1;
    journal.offer(end, Some((GapReason::MissedEvents, 8)), false, model.extent());
    until("it is noted", || journal.spent().1 > before);
    journal.offer(end, Some((GapReason::MissedEvents, 8)), false, model.extent());
    drop((journal, spilling));
    let (journal, _spilling) = open(dir.path(), 64, 1, &model);
    assert_eq!((journal.gap(), journal.range()), (Some((GapReason::MissedEvents, 8)), Some((0, end))));
    assert_eq!(journal.spent().1, 0);
}

/// Bytes that change on disk are never sent.
#[test]
fn damage_is_not_read() {
    let (dir, model) = (dir(), Model::new(1 << 40));
    let (journal, _spilling) = open(dir.path(), 64, 1, &model);
    for _ in 0..60 {
        model.produce(100_000);
    }
    assert!(journal.flush(model.end(), None, LIMIT));
    let whole = files(dir.path());
    let name = whole.keys().next().expect("a segment").clone();
    for at in [BLOCK_BYTES, BLOCK_BYTES + 300, 1_200_000, 3_000_001] {
        let mut files = whole.clone();
        files.get_mut(&name).expect("there")[at] ^= 0x10;
        std::fs::write(dir.path().join("g").join(&name), &files[&name]).expect("written");
        let mut refused = 0;
        for position in model.boundaries().into_iter().filter(|at| *at < model.end()).step_by(5) {
            match journal.read(position, None) {
                Ok(chunk) => {
                    let end = chunk.end();
                    let bytes = lock(&model.bytes);
                    assert_eq!(chunk.bytes(position, end), &bytes[position as usize..end as usize]);
                }
                Err(_) => refused += 1,
            }
        }
        assert!(refused > 0, "at {at}");
        // Found so at the start by whoever knows nothing of it: what is whole is sent, and then there is a hole. The ring's
        // own agent believes what was synced once, and finds out when it reads.
        let found = Journal::open(&settings(dir.path(), 64), "g", [2; 16], &*model);
        assert_eq!(found.range(), None, "the ring does not go on from there");
        let end = found.detached().map_or(0, |detached| detached.end);
        assert!(end < model.end());
        assert_reads(&found, &model, 0, end);
    }
}

/// A write fails: nothing is put into it any more, what is in it can still be read, the ring keeps the rest.
#[test]
fn a_disk_that_fails_is_given_up() {
    let (dir, model) = (dir(), Model::new(CAPACITY));
    let (journal, _spilling) = open(dir.path(), 64, 1, &model);
    let end = model.produce(600 << 10);
    assert!(journal.flush(end, None, LIMIT));
    // The end of the file is gone: a write behind it is refused, as a disk's would be.
    for entry in std::fs::read_dir(dir.path().join("g")).expect("there").flatten() {
        std::fs::remove_file(entry.path()).expect("removed");
    }
    std::fs::remove_dir(dir.path().join("g")).expect("removed");
    until("it is given up", || {
        for _ in 0..20 {
            if model.end() - model.consumer.load(Ordering::SeqCst) < CAPACITY {
                model.produce(100 << 10);
            }
            journal.offer(model.end(), None, false, model.extent());
        }
        journal.status().error.is_some()
    });
    let (from, end) = journal.range().expect("still there");
    assert_reads(&journal, &model, from, end);
    let held = model.consumer.load(Ordering::SeqCst);
    assert_eq!(held, end, "the ring keeps what is not in it");
}

#[test]
fn what_another_version_wrote_is_left_alone() {
    let (dir, model) = (dir(), Model::new(1 << 40));
    {
        let (journal, _spilling) = open(dir.path(), 64, 1, &model);
        assert!(journal.flush(model.produce(50), None, LIMIT));
    }
    let mut all = files(dir.path());
    let (_, bytes) = all.iter_mut().next().expect("a segment");
    bytes[8] = 9;
    put(dir.path(), &all);
    let (journal, _spilling) = open(dir.path(), 64, 1, &model);
    assert!(journal.status().error.is_some_and(|error| error.contains("version 9")), "{:?}", journal.status());
    assert!(!journal.flush(model.produce(50), None, Duration::from_millis(200)));
    assert_eq!(files(dir.path()), all);
}

/// Spilling, acknowledging and reading at once, as fast as they can.
#[test]
fn three_at_once() {
    let (dir, model) = (dir(), Model::new(CAPACITY));
    let (journal, _spilling) = open(dir.path(), 64, 1, &model);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..4000 {
                until("there is room", || {
                    let (consumer, producer, capacity) = model.extent();
                    journal.offer(producer, None, false, (consumer, producer, capacity));
                    producer - consumer < capacity
                });
                model.produce(1000 + n * 37 % 120_000);
            }
            stop.store(true, Ordering::SeqCst);
        });
        // The receiver: now fast, now slow.
        let (mut at, mut spare) = (0, None);
        let mut slow = 0;
        while !stop.load(Ordering::SeqCst) || at < model.end() {
            let held = lock(&model.held);
            let (consumer, producer, _) = model.extent();
            if at >= consumer {
                drop(held);
                model.acknowledge(&journal, producer);
                at = producer;
            } else {
                drop(held);
                let chunk = journal.read(at, spare.take()).expect("neither in the ring nor in the journal");
                let end = chunk.end();
                assert_eq!(chunk.bytes(at, end), &lock(&model.bytes)[at as usize..end as usize]);
                model.acknowledge(&journal, end);
                at = end;
                spare = Some(chunk.into_buffer());
            }
            slow = (slow + 1) % 97;
            std::thread::sleep(Duration::from_micros(if slow < 40 { 3000 } else { 0 }));
        }
        assert_eq!(at, model.end());
    });
    assert!(journal.spent().0 > 0, "it was used");
    until("it is empty", || journal.range().is_none());
}

#[derive(Clone, Debug)]
enum Step {
    Produce(usize),
    Flush,
    /// Up to this part of what is not acknowledged.
    Acknowledge(u8),
    Forget,
    /// Killed: after this many blocks of the newest segment were taken back to what they were at the last step.
    Kill(u8),
    Read,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1usize..200_000).prop_map(Step::Produce),
        4 => Just(Step::Flush),
        3 => any::<u8>().prop_map(Step::Acknowledge),
        1 => Just(Step::Forget),
        3 => any::<u8>().prop_map(Step::Kill),
        2 => Just(Step::Read),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Whatever happens in whatever order: every byte that is not acknowledged is in the journal or in the ring, as it
    /// was, and no other is.
    #[test]
    fn no_byte_is_lost(steps in prop::collection::vec(step(), 1..40)) {
        let (dir, model) = (dir(), Model::new(1 << 40));
        let mut opened = open(dir.path(), 64, 1, &model);
        for step in steps {
            let (journal, _) = &opened;
            match step {
                Step::Produce(bytes) => {
                    model.produce(bytes);
                }
                Step::Flush => {
                    if model.end() > model.consumer.load(Ordering::SeqCst) {
                        // Each kill begins a segment, and there are four: then the rest stays in the ring.
                        let full = || journal.status().error.is_some_and(|error| error.contains("reached its limit"));
                        prop_assert!(journal.flush(model.end(), None, LIMIT) || full());
                    }
                }
                Step::Acknowledge(part) => {
                    let from = model.durable.load(Ordering::SeqCst);
                    let wanted = from + (model.end() - from) * u64::from(part) / 255;
                    let at = model.boundaries().into_iter().rfind(|at| *at <= wanted).unwrap_or(0);
                    model.acknowledge(journal, at.max(from));
                }
                Step::Forget => {
                    // As a receiver that knows nothing makes it: the ring begins where it begins.
                    journal.discard();
                    let consumer = model.consumer.load(Ordering::SeqCst);
                    model.durable.store(consumer, Ordering::SeqCst);
                }
                Step::Kill(unsynced) => {
                    let durable = model.durable.load(Ordering::SeqCst);
                    drop(opened);
                    // A batch that was written and not synced: garbage behind the end of the newest segment's chunks.
                    let newest = std::fs::read_dir(dir.path().join("g")).expect("there").flatten().max_by_key(|e| e.file_name());
                    if let Some(newest) = newest.filter(|_| unsynced % 3 == 0) {
                        let mut bytes = std::fs::read(newest.path()).expect("readable");
                        let at = bytes.len() - BLOCK_BYTES * (1 + usize::from(unsynced));
                        bytes[at..].fill(unsynced);
                        std::fs::write(newest.path(), bytes).expect("written");
                    }
                    opened = open(dir.path(), 64, 1, &model);
                    // Found again may be what was acknowledged meanwhile; the receiver says so.
                    if opened.0.detached().is_some() {
                        opened.0.discard();
                    }
                    model.acknowledge(&opened.0, durable);
                }
                Step::Read => {}
            }
            let (journal, _) = &opened;
            // What was acknowledged beyond the journal's end goes back when the journal is known to be empty.
            until("the ring is released", || journal.range().is_some() || {
                model.durable.load(Ordering::SeqCst) == model.consumer.load(Ordering::SeqCst)
            });
            let (durable, consumer) = (model.durable.load(Ordering::SeqCst), model.consumer.load(Ordering::SeqCst));
            match journal.range() {
                None => prop_assert_eq!(durable, consumer),
                Some((start, end)) => {
                    prop_assert_eq!((start, end), (durable, consumer));
                    assert_reads(journal, &model, start, end);
                }
            }
        }
    }
}
