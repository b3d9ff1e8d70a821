//! Real files: torn last batches, damage in the middle, recycled segments.

use super::*;
use crate::landing::batch::{Batch, Effect, Entry, Item, total_bytes};
use crate::landing::log::Writer;
use bytes::BytesMut;
use proptest::prelude::*;
use varve_common::format::{BLOCK_BYTES, ENTRY_HEADER_BYTES, Mark, MarkKind};
use varve_common::record::{RecordHeader, append_record};
use varve_common::state::GapReason;
use varve_common::wire::{Codec, FrameKind};

const GROUP: [u8; 16] = [1; 16];
const INCARNATION: [u8; 16] = [2; 16];
const SEGMENT_BYTES: u64 = 256 << 10;
const START: Place = Place { segment: 1, offset: BLOCK_BYTES as u64 };

fn log(dir: &std::path::Path, mark: Place) -> Arc<Log> {
    Arc::new(Log::open(dir, GROUP, SEGMENT_BYTES, 64 << 20, mark).expect("log"))
}

/// What a batch is made of: sizes of payloads, 0 for a mark.
fn batch(state: &mut StreamState, sizes: &[usize]) -> Batch {
    let (mut bytes, mut items) = (BytesMut::new(), Vec::new());
    for size in sizes {
        let mut body = Vec::new();
        let position = state.at.position;
        let (kind, effect) = if *size == 0 {
            let kind = if state.begun() { MarkKind::GapBegin } else { MarkKind::Begin };
            let reason = Some(GapReason::RingFull);
            let mark = Mark { kind, reason, incarnation: INCARNATION, position, time_ns: 1, epoch: 1, height_min: 0 };
            body.extend_from_slice(&mark.encode());
            (FrameKind::Mark, Effect::Mark(mark))
        } else {
            let header = RecordHeader {
                kind: 1,
                flags: 0,
                volume: 0.into(),
                payload: (*size as u32).into(),
                time_ns: 5.into(),
                offset: 0.into(),
                length: (*size as u64).into(),
            };
            append_record(&mut body, header, &vec![position as u8 | 1; *size]);
            (FrameKind::Data, Effect::Data { end: position + body.len() as u64, time_ns: Some(5) })
        };
        let at = bytes.len();
        let crc = crc32fast::hash(&body);
        items.push(Item::Entry(Entry {
            at,
            kind,
            codec: Codec::Plain,
            incarnation: INCARNATION,
            position,
            body_bytes: body.len(),
            plain_bytes: body.len(),
            plain_crc: crc,
            body_crc: crc,
            effect,
        }));
        bytes.resize(at + ENTRY_HEADER_BYTES, 0);
        bytes.extend_from_slice(&body);
        bytes.resize(at + total_bytes(body.len()), 0);
        state.pass(&effect);
    }
    let entry_bytes = bytes.len();
    bytes.resize(entry_bytes.next_multiple_of(BLOCK_BYTES), 0);
    // O_DIRECT wants it aligned, and so does the arena in the daemon.
    let mut aligned = crate::landing::arena::Arenas::new().take().expect("the first one");
    aligned.extend_from_slice(&bytes);
    Batch { bytes: aligned, entry_bytes, items }
}

fn append(writer: &mut Writer, batch: &mut Batch) -> Place {
    let Batch { bytes, items, .. } = batch;
    let entries = items.iter().filter_map(|item| match item {
        Item::Entry(entry) => Some(entry),
        Item::Act(_) => None,
    });
    writer.append(bytes, entries).expect("append")
}

fn read(log: &Arc<Log>) -> Recovered {
    recover(log, START, 0, StreamState::fresh(), &[1 << 30]).expect("recover")
}

/// The file of the segment that `place` is in.
fn path(log: &Log, place: Place) -> std::path::PathBuf {
    log.segment(place.segment).expect("in use").file().path().to_owned()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Any blocks of the last batch did not reach the disk; the same data comes again, in other batches.
    #[test]
    fn the_last_batch_may_be_torn(
        batches in prop::collection::vec(prop::collection::vec(prop_oneof![1 => Just(0usize), 4 => 1usize..20_000], 1..6), 1..8),
        lost in prop::collection::vec(any::<bool>(), 1..40),
        again in 1usize..5,
    ) {
        let dir = tempfile::tempdir_in("/var/tmp").expect("directory");
        let first = log(dir.path(), START);
        let mut writer = Writer::new(first.clone(), START, 0);
        let mut state = StreamState::fresh();
        let mut states = vec![state];
        let mut sizes: Vec<usize> = vec![0];
        append(&mut writer, &mut batch(&mut state, &[0]));
        states.push(state);
        let mut last = None;
        for parts in &batches {
            let before = (state, sizes.len());
            for size in parts {
                let mut one = states[states.len() - 1];
                batch(&mut one, &[*size]);
                states.push(one);
            }
            sizes.extend(parts);
            let mut made = batch(&mut state, parts);
            let place = append(&mut writer, &mut made);
            last = Some((place, made.bytes.len(), before));
        }
        let (place, bytes, (_, safe)) = last.expect("at least one");
        let file = path(&first, place);
        drop((writer, first));
        let mut content = std::fs::read(&file).expect("segment");
        for (block, lost) in content[place.offset as usize..][..bytes].chunks_mut(BLOCK_BYTES).zip(lost.iter().cycle()) {
            if *lost {
                block.fill(0);
            }
        }
        std::fs::write(&file, content).expect("tear");

        let second = log(dir.path(), START);
        let found = read(&second);
        prop_assert_eq!(&found.damage, &None);
        let count = found.entries as usize;
        prop_assert!(count >= safe, "{} entries were durable, {} are found", safe, count);
        prop_assert_eq!(found.state, states[count]);
        let mut writer = Writer::new(second.clone(), found.end, found.chain);
        let mut state = found.state;
        for parts in sizes[count..].chunks(again) {
            append(&mut writer, &mut batch(&mut state, parts));
        }
        drop((writer, second));
        let found = read(&log(dir.path(), START));
        prop_assert_eq!(&found.damage, &None);
        prop_assert_eq!(found.entries as usize, sizes.len());
        prop_assert_eq!(found.state, state);
    }
}

/// Three segments, something in the first is damaged: the log ends there, what comes later is never read again.
#[test]
fn damage_in_the_middle_is_named_and_cut_off() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("directory");
    let first = log(dir.path(), START);
    let mut writer = Writer::new(first.clone(), START, 0);
    let mut state = StreamState::fresh();
    append(&mut writer, &mut batch(&mut state, &[0]));
    let mut places = Vec::new();
    for _ in 0..20 {
        places.push((append(&mut writer, &mut batch(&mut state.clone(), &[30_000])), state));
        batch(&mut state, &[30_000]);
    }
    assert!(places[19].0.segment >= places[0].0.segment + 2);
    // Also when it is a mark: it moves no position, only the chain tells.
    let (victim, before) = places[2];
    let file = path(&first, victim);
    drop((writer, first));
    let clean = std::fs::read(&file).expect("segment");
    let mut content = clean.clone();
    content[victim.offset as usize + ENTRY_HEADER_BYTES + 500] ^= 4;
    std::fs::write(&file, &content).expect("damage");
    let second = log(dir.path(), START);
    let found = read(&second);
    assert!(found.damage.as_ref().is_some_and(|why| why.contains("case E")), "{:?}", found.damage);
    assert_eq!((found.entries, found.state), (3, before));
    // Written anew from there; even with the bit turned back nothing old is taken.
    let mut writer = Writer::new(second.clone(), found.end, found.chain);
    let mut state = found.state;
    append(&mut writer, &mut batch(&mut state, &[0, 100]));
    drop((writer, second));
    let found = read(&log(dir.path(), START));
    assert_eq!((found.damage, found.entries, found.state), (None, 5, state));
}

/// Case F right behind the last good entry, in the same block. What is acknowledged afterwards must be found again.
#[test]
fn what_is_written_after_damage_in_a_block_is_found() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("directory");
    let first = log(dir.path(), START);
    let mut writer = Writer::new(first.clone(), START, 0);
    let mut state = StreamState::fresh();
    let mut made = batch(&mut state, &[0, 100, 100]);
    for item in &mut made.items[2..] {
        let Item::Entry(entry) = item else { continue };
        entry.position += 8;
    }
    append(&mut writer, &mut made);
    drop((writer, first));
    let second = log(dir.path(), START);
    let found = read(&second);
    assert!(found.damage.as_ref().is_some_and(|why| why.contains("case F")), "{:?}", found.damage);
    assert_eq!(found.entries, 2);
    let mut writer = Writer::new(second.clone(), found.end, found.chain);
    let mut state = found.state;
    append(&mut writer, &mut batch(&mut state, &[100, 0, 300]));
    drop((writer, second));
    let found = read(&log(dir.path(), START));
    assert_eq!((found.damage, found.entries, found.state), (None, 5, state));
}

/// The first entry of a batch was torn, the mark behind it was not. The entry comes again, alone: the mark of the session
/// before, which nobody has sent again, must not come back with it.
#[test]
fn remains_of_a_torn_batch_stay_dead() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("directory");
    let first = log(dir.path(), START);
    let mut writer = Writer::new(first.clone(), START, 0);
    let mut state = StreamState::fresh();
    append(&mut writer, &mut batch(&mut state, &[0]));
    let whole_block = BLOCK_BYTES - ENTRY_HEADER_BYTES - 40;
    let mut expected = state;
    let place = append(&mut writer, &mut batch(&mut state, &[whole_block, 0]));
    let file = path(&first, place);
    drop((writer, first));
    let mut content = std::fs::read(&file).expect("segment");
    content[place.offset as usize..][..BLOCK_BYTES].fill(0);
    std::fs::write(&file, content).expect("tear");
    let second = log(dir.path(), START);
    let found = read(&second);
    assert_eq!((&found.damage, found.entries, found.state), (&None, 1, expected));
    let mut writer = Writer::new(second.clone(), found.end, found.chain);
    append(&mut writer, &mut batch(&mut expected, &[whole_block]));
    drop((writer, second));
    let found = read(&log(dir.path(), START));
    assert_eq!((found.damage, found.entries, found.state), (None, 2, expected));
}

#[test]
fn a_lost_mark_between_segments_is_missed() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("directory");
    let first = log(dir.path(), START);
    let mut writer = Writer::new(first.clone(), START, 0);
    let mut state = StreamState::fresh();
    append(&mut writer, &mut batch(&mut state, &[0, 200_000]));
    let mark = append(&mut writer, &mut batch(&mut state, &[0]));
    let data = append(&mut writer, &mut batch(&mut state, &[200_000]));
    assert_eq!((mark.segment + 1, data.offset), (data.segment, BLOCK_BYTES as u64));
    let file = path(&first, mark);
    drop((writer, first));
    let mut content = std::fs::read(&file).expect("segment");
    content[mark.offset as usize..][..BLOCK_BYTES].fill(0);
    std::fs::write(&file, content).expect("damage");
    let found = read(&log(dir.path(), START));
    assert!(found.damage.is_some(), "positions alone would not tell");
    assert_eq!(found.entries, 2);
}

#[test]
fn entries_of_an_earlier_life_are_void() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("directory");
    let log = log(dir.path(), START);
    let mut writer = Writer::new(log.clone(), START, 0);
    let mut state = StreamState::fresh();
    append(&mut writer, &mut batch(&mut state, &[0, 50_000, 60_000, 70_000]));
    let before = read(&log);
    let second = append(&mut writer, &mut batch(&mut state, &[200_000]));
    let files = std::fs::read_dir(dir.path()).expect("list").count();
    log.recycle_before(second.segment);
    let third = append(&mut writer, &mut batch(&mut state, &[60_000]));
    assert!(third.segment > second.segment);
    assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), files, "used again");
    drop((writer, log));
    // Right behind the third batch there are whole entries: of the life before.
    let log = self::log(dir.path(), second);
    let found = recover(&log, second, before.chain, before.state, &[1 << 30]).expect("recover");
    assert_eq!((found.entries, found.damage, found.state), (2, None, state));
    assert_eq!(found.end.segment, third.segment);
}

/// A burst while the applier was away: segments that nobody needs any more go, but not between two bursts that need them.
#[test]
fn what_a_burst_took_is_given_back() {
    use crate::limits::{SEGMENTS_FREE_KEPT, SEGMENTS_FREE_TIME};
    let dir = tempfile::tempdir_in("/var/tmp").expect("directory");
    let log = log(dir.path(), START);
    let mut writer = Writer::new(log.clone(), START, 0);
    let mut state = StreamState::fresh();
    let mut burst = |count: usize| {
        let places: Vec<Place> = (0..count).map(|_| append(&mut writer, &mut batch(&mut state, &[200_000]))).collect();
        log.recycle_before(places[count - 1].segment);
        places[count - 1]
    };
    let files = || std::fs::read_dir(dir.path()).expect("list").count();
    let bytes = || files() as u64 * SEGMENT_BYTES;
    let mut now = std::time::Instant::now();
    assert_eq!(log.give_back(now), 0);
    burst(10);
    assert_eq!(files(), 10, "one batch a segment");
    for _ in 0..5 {
        now += SEGMENTS_FREE_TIME;
        burst(9);
        assert_eq!((log.give_back(now), files()), (0, 10), "each burst needs what the last one left");
    }
    now += SEGMENTS_FREE_TIME / 2;
    assert_eq!(log.give_back(now), 0, "not yet");
    now += SEGMENTS_FREE_TIME / 2;
    burst(3);
    // The first look only begins to count: what was needed since the last one was needed.
    let given = log.give_back(now);
    now += SEGMENTS_FREE_TIME;
    let given = given + log.give_back(now);
    assert_eq!((given, files()), (10 - 1 - SEGMENTS_FREE_KEPT, 1 + SEGMENTS_FREE_KEPT));
    assert_eq!(log.bytes(), bytes(), "and counted");
    now += SEGMENTS_FREE_TIME;
    assert_eq!(log.give_back(now), 0, "the rest stays");
    // It goes on, and everything is found again.
    let mark = burst(6);
    assert_eq!((files(), log.bytes()), (7, bytes()));
    drop((writer, log));
    let log = self::log(dir.path(), mark);
    assert_eq!(log.bytes(), bytes());
    now += SEGMENTS_FREE_TIME;
    assert_eq!(log.give_back(now), 0);
    now += SEGMENTS_FREE_TIME;
    // As many as were found free at the start, without those that stay.
    assert_eq!((log.give_back(now), files()), (6 - SEGMENTS_FREE_KEPT, 1 + SEGMENTS_FREE_KEPT));
}

/// Read back by the applier: also the small entries in the block in which the last one ends.
#[test]
fn the_applier_reads_exactly_what_is_there() {
    use crate::apply::collect::{Batch as Collected, Cursor, Ended};
    use crate::apply::work::Work;
    let dir = tempfile::tempdir_in("/var/tmp").expect("directory");
    let log = log(dir.path(), START);
    let mut writer = Writer::new(log.clone(), START, 0);
    let mut state = StreamState::fresh();
    let mut states = Vec::new();
    for sizes in [&[0, 100, 0, 50][..], &[0], &[4096 - 72 - 40, 8], &[3, 9000, 0, 0], &[200_000], &[0, 1]] {
        append(&mut writer, &mut batch(&mut state, sizes));
        states.push((read(&log).end, state));
    }
    let volumes = [1 << 30];
    let mut cursor = Cursor::new(Reader::new(log.clone(), START, 0), StreamState::fresh());
    for (until, state) in states {
        assert!(cursor.open(Work::Log { until }).is_none());
        while cursor.fill(&mut Collected::default(), &volumes).expect("whole") != Ended::Used {}
        assert_eq!((cursor.place(), cursor.state), (until, state));
    }
}

#[test]
fn another_version_is_refused_by_name() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("directory");
    let first = log(dir.path(), START);
    let mut writer = Writer::new(first.clone(), START, 0);
    let place = append(&mut writer, &mut batch(&mut StreamState::fresh(), &[0]));
    let file = path(&first, place);
    drop((writer, first));
    let mut content = std::fs::read(&file).expect("segment");
    content[8] = 2;
    std::fs::write(&file, content).expect("another version");
    let failure = Log::open(dir.path(), GROUP, SEGMENT_BYTES, 64 << 20, START).expect_err("refused");
    assert!(failure.text.contains("format version 2") && failure.text.contains(".seg"), "{failure}");
}
