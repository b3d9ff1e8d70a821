//! Opening a landing log whose files hold anything. Three ways: raw bytes behind a right segment header; entries that
//! are whole but say anything; a good log with damage in it. Recovery takes only what was written, in order, and what is
//! written after a recovery is found by the next one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use varve_common::format::{BLOCK_BYTES, ENTRY_HEADER_BYTES, ENTRY_MAGIC, EntryHeader, Mark, MarkKind, SegmentHeader};
use varve_common::record::{RecordHeader, append_record};
use varve_common::state::GapReason;
use varve_common::wire::{Codec, FrameKind};
use varve_fuzz::{Input, known};
use varve_receiver::group::stream::StreamState;
use varve_receiver::landing::Place;
use varve_receiver::landing::batch::{Effect, Entry, total_bytes};
use varve_receiver::landing::log::{Log, Writer};
use varve_receiver::landing::recover::{Recovered, recover};
use zerocopy::IntoBytes;

const GROUP: [u8; 16] = [1; 16];
const RING: [u8; 16] = [7; 16];
const VOLUMES: [u64; 2] = [1 << 20, (1 << 20) + 512];
const SEGMENT_BYTES: usize = 8 * BLOCK_BYTES;
const SEGMENTS_MAX: usize = 4;

static DIR: LazyLock<PathBuf> = LazyLock::new(|| varve_fuzz::work_dir("recovery"));

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    for old in std::fs::read_dir(&*DIR).expect("directory").flatten() {
        std::fs::remove_file(old.path()).expect("remove");
    }
    match input.u8() % 4 {
        0 => raw(&mut input),
        1 => crafted(&mut input),
        2 => damaged(&mut input),
        _ => foreign_mark(&mut input),
    }
});

fn open(dir: &Path) -> Option<(Arc<Log>, Recovered)> {
    let mark = Place { segment: 1, offset: BLOCK_BYTES as u64 };
    let most = (SEGMENT_BYTES * SEGMENTS_MAX) as u64;
    let log = Arc::new(Log::open(dir, GROUP, SEGMENT_BYTES as u64, most, mark).ok()?);
    let recovered = recover(&log, mark, 0, StreamState::fresh(), &VOLUMES).ok()?;
    let Recovered { end, state, entries, bytes, damage, .. } = &recovered;
    assert!((end.segment, end.offset) >= (1, BLOCK_BYTES as u64) && end.offset <= SEGMENT_BYTES as u64);
    assert!(*bytes <= most && *entries * ENTRY_HEADER_BYTES as u64 <= *bytes);
    assert_eq!(state.begun(), *entries > 0, "the first entry is a begin");
    assert!(damage.is_none() || log.segment_after(end.segment).is_none(), "nothing is kept behind damage");
    Some((log, recovered))
}

/// Opens, writes one entry more, and opens again: it must be there, after everything that was there before.
fn open_and_go_on() {
    let Some((log, first)) = open(&DIR) else { return };
    let begin = begin(0x5000);
    let mut batch = Batch::default();
    batch.add(FrameKind::Mark, 0x5000, &begin.encode(), Effect::Mark(begin));
    let mut writer = Writer::new(log, first.end, first.chain);
    let Ok(place) = batch.write(&mut writer) else { return };
    drop(writer);
    let (_, second) = open(&DIR).expect("our own log");
    assert_eq!(second.entries, first.entries + 1, "{first:?} then {place:?} then {second:?}");
    assert!(second.damage.is_none(), "{second:?}");
    let mut state = first.state;
    state.pass(&Effect::Mark(begin));
    assert_eq!(second.state, state);
}

fn begin(position: u64) -> Mark {
    let reason = Some(GapReason::NewRing);
    Mark { kind: MarkKind::Begin, reason, incarnation: RING, position, time_ns: 5, epoch: 1, height_min: 0 }
}

fn segment(slot: usize, sequence: u64, content: &[u8]) {
    let mut bytes = vec![0; SEGMENT_BYTES];
    let header = SegmentHeader::new(GROUP, sequence, SEGMENT_BYTES as u64);
    bytes[..size_of::<SegmentHeader>()].copy_from_slice(header.as_bytes());
    let length = content.len().min(SEGMENT_BYTES - BLOCK_BYTES);
    bytes[BLOCK_BYTES..][..length].copy_from_slice(&content[..length]);
    std::fs::write(DIR.join(format!("{slot:016x}.seg")), bytes).expect("write");
}

/// Files of any bytes, with and without a right header.
fn raw(input: &mut Input<'_>) {
    for slot in 1..=1 + usize::from(input.u8() % 3) {
        let (how, sequence, length) = (input.u8(), input.u8(), input.u16());
        let content = input.take(usize::from(length));
        match how % 4 {
            0 => std::fs::write(DIR.join(format!("{slot:016x}.seg")), content).expect("write"),
            _ => segment(slot, u64::from(sequence % 4), content),
        }
    }
    open_and_go_on();
}

/// An applied mark that names a place where nothing can be: an error or an empty log, and nothing else.
fn foreign_mark(input: &mut Input<'_>) {
    segment(1, 1, &[]);
    let far = !known::IMPOSSIBLE_SLOTS_ARE_TAKEN;
    let place = if far {
        Place { segment: input.u64(), offset: input.u64() }
    } else {
        Place { segment: u64::from(input.u16()), offset: u64::from(input.u16()) * 64 }
    };
    let most = (SEGMENT_BYTES * SEGMENTS_MAX) as u64;
    let Ok(log) = Log::open(&DIR, GROUP, SEGMENT_BYTES as u64, most, place) else { return };
    let log = Arc::new(log);
    let found = recover(&log, place, input.u8().into(), StreamState::fresh(), &VOLUMES);
    let Ok(found) = found else { return };
    assert_eq!((found.entries, found.state), (0, StreamState::fresh()));
    let mut batch = Batch::default();
    let begin = begin(64);
    batch.add(FrameKind::Mark, 64, &begin.encode(), Effect::Mark(begin));
    let _ = batch.write(&mut Writer::new(log, found.end, found.chain));
}

/// Entries whose checksums and places are right and that may say anything else.
fn crafted(input: &mut Input<'_>) {
    let mut chain = 0;
    for slot in 1..=1 + input.u8() % 2 {
        let sequence = u64::from(slot);
        let mut content = Vec::new();
        for _ in 0..input.u8() % 8 {
            let twist = input.u8();
            let kind = if twist & 1 == 0 { input.u8() } else { 2 + (twist >> 1) % 2 };
            let codec = (twist >> 3) % 4;
            let position = u64::from(input.u8()) * 8;
            let body = if kind == 3 {
                begin(position).encode().to_vec()
            } else {
                let count = usize::from(input.u8());
                input.take(count).to_vec()
            };
            let plain_bytes = if codec == 0 { body.len() as u32 } else { u32::from(input.u16()) };
            let claimed = if twist & 0xE0 == 0xE0 { input.u64() as u32 } else { body.len() as u32 };
            let header = EntryHeader {
                magic: ENTRY_MAGIC.into(),
                kind,
                codec,
                reserved: 0.into(),
                segment: sequence.into(),
                offset: (BLOCK_BYTES as u64 + content.len() as u64).into(),
                incarnation: RING,
                position: position.into(),
                body_bytes: claimed.into(),
                plain_bytes: plain_bytes.into(),
                plain_crc: crc32fast::hash(&body).into(),
                body_crc: crc32fast::hash(&body).into(),
                previous_crc: if twist == 0xFF { 1 } else { chain }.into(),
                header_crc: 0.into(),
            };
            let encoded = header.encode();
            chain = u32::from_le_bytes([encoded[68], encoded[69], encoded[70], encoded[71]]);
            content.extend(encoded);
            content.extend(&body);
            content.resize(content.len().next_multiple_of(if twist & 0x10 == 0 { 8 } else { BLOCK_BYTES }), 0);
        }
        segment(usize::from(slot), sequence, &content);
    }
    open_and_go_on();
}

/// Frames of one synced write.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

impl Batch {
    fn add(&mut self, kind: FrameKind, position: u64, body: &[u8], effect: Effect) {
        let at = self.bytes.len();
        self.bytes.resize(at + ENTRY_HEADER_BYTES, 0);
        self.bytes.extend(body);
        self.bytes.resize(at + total_bytes(body.len()), 0);
        let crc = crc32fast::hash(body);
        self.entries.push(Entry {
            at,
            kind,
            codec: Codec::Plain,
            incarnation: RING,
            position,
            body_bytes: body.len(),
            plain_bytes: body.len(),
            plain_crc: crc,
            body_crc: crc,
            effect,
        });
    }

    fn write(&mut self, writer: &mut Writer) -> Result<Place, varve_receiver::failure::Failure> {
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        writer.append(&mut self.bytes, self.entries.iter())
    }
}

/// A good log of some batches, and then some bytes of it changed.
fn damaged(input: &mut Input<'_>) {
    let (log, fresh) = open(&DIR).expect("an empty directory");
    let mut writer = Writer::new(log.clone(), fresh.end, fresh.chain);
    // The state after every entry, and where the newest batch begins.
    let (mut states, mut newest, mut before_newest) = (vec![StreamState::fresh()], fresh.end, 0);
    for number in 0..1 + input.u8() % 6 {
        let (mut batch, first) = (Batch::default(), states.len());
        for _ in 0..1 + input.u8() % 4 {
            let mut state = states[states.len() - 1];
            let effect = if number == 0 && states.len() == 1 {
                let begin = begin(64);
                batch.add(FrameKind::Mark, 64, &begin.encode(), Effect::Mark(begin));
                Effect::Mark(begin)
            } else {
                let (position, body) = (state.at.position, record(input));
                let effect = Effect::Data { end: position + body.len() as u64, time_ns: Some(9) };
                batch.add(FrameKind::Data, position, &body, effect);
                effect
            };
            state.pass(&effect);
            states.push(state);
        }
        match batch.write(&mut writer) {
            Ok(place) => (newest, before_newest) = (place, first - 1),
            Err(_) => {
                states.truncate(first);
                break;
            }
        }
    }
    drop(writer);
    let mut only_newest = true;
    for _ in 0..input.u8() % 4 {
        let (slot, block, at, flip) = (1 + u64::from(input.u8() % 3), input.u8() % 8, input.u16() % 4096, input.u8());
        let path = DIR.join(format!("{slot:016x}.seg"));
        let Ok(mut bytes) = std::fs::read(&path) else { continue };
        let offset = usize::from(block) * BLOCK_BYTES + usize::from(at);
        bytes[offset] ^= flip;
        // Slots are made in the order in which they are used, so slot and sequence are the same here.
        only_newest &= flip == 0 || (slot, offset as u64) >= (newest.segment, newest.offset);
        std::fs::write(&path, bytes).expect("write");
    }
    let Some((_, found)) = open(&DIR) else { return };
    let count = found.entries as usize;
    assert!(count < states.len(), "more than was written: {found:?}");
    assert_eq!(found.state, states[count], "a beginning of what was written, and nothing else");
    if only_newest {
        assert!(count >= before_newest && found.damage.is_none(), "a torn last write is not damage: {found:?}");
    }
    open_and_go_on();
}

fn record(input: &mut Input<'_>) -> Vec<u8> {
    let payload = vec![input.u8(); 1 + usize::from(input.u16() % 9000)];
    let header = RecordHeader {
        kind: 1,
        flags: 0,
        volume: 0.into(),
        payload: (payload.len() as u32).into(),
        time_ns: 9.into(),
        offset: 512.into(),
        length: (payload.len() as u64).into(),
    };
    let mut out = Vec::new();
    append_record(&mut out, header, &payload);
    out
}
