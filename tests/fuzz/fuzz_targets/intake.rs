//! A hostile agent's stream against the receiver's intake: any frames in any pieces. What is accepted is exactly what
//! recovery accepts when it reads the same bytes from the landing log, batches are as the lander needs them, and the
//! intake never waits for room that nobody holds.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use tokio::sync::mpsc;
use varve_common::format::{BLOCK_BYTES, ENTRY_HEADER_BYTES, EntryHeader, Mark, MarkKind};
use varve_common::record::{RecordHeader, append_record};
use varve_common::state::GapReason;
use varve_common::wire::messages::{self, Probe};
use varve_common::wire::{Codec, FRAME_HEADER_BYTES, Frame, FrameKind, Image};
use varve_fuzz::{Input, frame_around, known};
use varve_receiver::group::live::Counters;
use varve_receiver::group::stream::{Checker, Point, StreamState};
use varve_receiver::landing::batch::{Batch, Item};
use varve_receiver::session::intake::{Fed, Intake, Rules};

const VOLUMES: [u64; 2] = [3 << 20, (1 << 20) + 512];
const RING: [u8; 16] = [7; 16];
const EPOCH: u64 = 1;
const FRAMES_MAX: usize = 40;

/// The receiver behind the intake: its log as recovery would read it.
struct Behind {
    state: StreamState,
    chain: u32,
    offset: u64,
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let start = input.u8();
    let mut state = StreamState::fresh();
    let resumed = start & 1 != 0;
    if resumed {
        state.at = Point { incarnation: RING, position: 4096, time_ns: 1 };
        state.ever_consistent = start & 2 != 0;
        state.gap = (start & 6 != 6).then_some(GapReason::InitialSync);
    }
    let epochs = EPOCH..=EPOCH + u64::from(start >> 4 & 1);
    let rules = Rules { volumes: VOLUMES.into(), incarnation: RING, epochs, grows: start & 8 != 0 };
    let (answers, _answered) = mpsc::unbounded_channel();
    let mut intake = Intake::new(rules, state, resumed, answers, Arc::new(Counters::default()));
    let mut behind = Behind { state, chain: 0, offset: BLOCK_BYTES as u64 };
    // What an agent that keeps count would send next.
    let mut next = state.at.position;
    // What the receiver has taken and not finished: batches and, in them, probes and images without an answer.
    let mut held: Vec<Batch> = Vec::new();
    for _ in 0..FRAMES_MAX {
        if input.is_empty() {
            break;
        }
        let bytes = frame(&mut input, &mut next);
        if !feed(&mut intake, &mut behind, &mut held, bytes, input.u16()) {
            return;
        }
        match input.u8() % 4 {
            0 => held.extend(land(&mut intake, &mut behind)),
            1 => held.clear(),
            _ => {}
        }
    }
    // At the end everything that was accepted can be landed.
    held.clear();
    while let Some(batch) = land(&mut intake, &mut behind) {
        drop(batch);
    }
});

/// Feeds one frame in pieces; `false` once it was refused.
fn feed(intake: &mut Intake, behind: &mut Behind, held: &mut Vec<Batch>, bytes: Vec<u8>, piece: u16) -> bool {
    let piece = if piece % 3 == 0 { bytes.len().max(1) } else { usize::from(piece).max(1) };
    let bytes = Bytes::from(bytes);
    let mut at = 0;
    while at < bytes.len() {
        let mut chunk = bytes.slice(at..(at + piece).min(bytes.len()));
        at += chunk.len();
        let mut tries = 0;
        loop {
            match intake.feed(&mut chunk) {
                Ok(Fed::All) => break assert!(chunk.is_empty()),
                Ok(Fed::Blocked) => {
                    tries += 1;
                    assert!(tries < 100, "blocked although nothing is held");
                    held.clear();
                    drop(land(intake, behind));
                }
                Err(refused) => {
                    assert!(!refused.text.is_empty() && !refused.next.is_empty(), "{refused:?}");
                    return false;
                }
            }
        }
    }
    true
}

/// Takes a batch as the lander does, and reads it back as recovery does.
fn land(intake: &mut Intake, behind: &mut Behind) -> Option<Batch> {
    let mut batch = intake.next_batch()?;
    assert!(!batch.items.is_empty() && batch.entry_bytes <= batch.bytes.len());
    assert!(batch.bytes.len().is_multiple_of(BLOCK_BYTES) && batch.bytes.len() - batch.entry_bytes < BLOCK_BYTES);
    assert!(batch.bytes.is_empty() || batch.bytes.as_ptr().addr().is_multiple_of(BLOCK_BYTES));
    let (mut at, mut checker) = (0, Checker::new(&VOLUMES));
    let entries = batch.items.iter().filter_map(|item| match item {
        Item::Entry(entry) => Some(entry),
        Item::Act(_) => None,
    });
    for entry in entries {
        assert_eq!(entry.at, at, "entries follow each other");
        assert!(batch.bytes[at..at + ENTRY_HEADER_BYTES].iter().all(|byte| *byte == 0), "the header is blank");
        let offset = behind.offset + at as u64;
        let bytes = entry.header(1, offset, behind.chain).encode();
        batch.bytes[at..at + ENTRY_HEADER_BYTES].copy_from_slice(&bytes);
        let header = EntryHeader::decode(&batch.bytes[at..], 1, offset).expect("just written");
        let body = &batch.bytes[at + ENTRY_HEADER_BYTES..][..entry.body_bytes];
        assert_eq!(crc32fast::hash(body), header.body_crc.get());
        let checked = checker.check(&behind.state, &header, body);
        assert_eq!(checked.map(|checked| checked.effect), Some(entry.effect), "recovery would not take {entry:?}");
        behind.state.pass(&entry.effect);
        behind.chain = header.header_crc.get();
        at += entry.total_bytes();
    }
    assert_eq!(at, batch.entry_bytes);
    behind.offset += batch.bytes.len() as u64;
    Some(batch)
}

/// One frame: mostly one that may be sent, sometimes with something wrong in it.
fn frame(input: &mut Input<'_>, next: &mut u64) -> Vec<u8> {
    let (what, twist) = (input.u8(), input.u8());
    let position = if twist % 16 == 1 { next.wrapping_add(u64::from(input.u16())) } else { *next };
    let compressed = twist & 0x20 != 0;
    let (kind, plain) = match what % 8 {
        0 | 1 => (FrameKind::Data, records(input)),
        2 => {
            let mark = mark(input, position);
            if mark.kind == MarkKind::Begin {
                *next = mark.position;
            }
            if known::COMPRESSED_MARKS_ARE_LANDED || !compressed {
                return send(Frame::plain(FrameKind::Mark, mark.position, &mark.encode()), mark.encode().to_vec());
            }
            let body = lz4_flex::block::compress(&mark.encode());
            return send(frame_around(FrameKind::Mark, Codec::Lz4, mark.position, &body, mark.encode().len()), body);
        }
        3 => (FrameKind::Image, image(input)),
        4 => (FrameKind::Probe, probe(input)),
        5 => {
            let count = usize::from(input.u8());
            (FrameKind::Report, input.take(count).to_vec())
        }
        6 => {
            // Any kind, any body; compressed to whatever it claims.
            let kind = FrameKind::from_number(input.u8()).unwrap_or(FrameKind::Data);
            let count = usize::from(input.u16());
            let body = input.take(count);
            let codec = if compressed { Codec::Lz4 } else { Codec::Plain };
            let spared = kind == FrameKind::Mark && known::COMPRESSED_MARKS_ARE_LANDED;
            let codec = if spared { Codec::Plain } else { codec };
            let frame = frame_around(kind, codec, position, body, usize::from(input.u16()));
            return send(frame, body.to_vec());
        }
        _ => {
            let count = FRAME_HEADER_BYTES + usize::from(input.u8());
            return input.take(count).to_vec();
        }
    };
    if kind == FrameKind::Data {
        *next = position.wrapping_add(plain.len() as u64);
    }
    let body = if compressed { lz4_flex::block::compress(&plain) } else { plain.clone() };
    let codec = if compressed { Codec::Lz4 } else { Codec::Plain };
    let mut frame = frame_around(kind, codec, position, &body, plain.len());
    if twist % 32 == 2 {
        frame.plain_crc ^= 1;
    }
    send(frame, body)
}

fn send(frame: Frame, body: Vec<u8>) -> Vec<u8> {
    let mut bytes = frame.encode().to_vec();
    bytes.extend(body);
    bytes
}

fn records(input: &mut Input<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..1 + input.u8() % 8 {
        let (kind, flags, volume) = (input.u8(), input.u8(), input.u8());
        let (offset, length) = (u64::from(input.u16()) * 512, u64::from(input.u16()));
        let length = if kind & 0x40 != 0 { length * 16 } else { length };
        let payload = if kind % 8 == 1 || kind % 8 == 5 { vec![flags; length as usize] } else { Vec::new() };
        let header = RecordHeader {
            kind: kind % 8,
            flags,
            volume: u16::from(volume % 3).into(),
            payload: (payload.len() as u32).into(),
            time_ns: input.u64().into(),
            offset: offset.into(),
            length: length.into(),
        };
        let from = out.len();
        append_record(&mut out, header, &payload);
        if kind & 0x80 != 0 {
            // Given up by its producer.
            out[from + 3] |= 0x40;
        }
    }
    out
}

fn mark(input: &mut Input<'_>, position: u64) -> Mark {
    let (kind, reason, twist) = (input.u8(), input.u8(), input.u8());
    let kind = [MarkKind::Begin, MarkKind::GapBegin, MarkKind::GapEnd][usize::from(kind % 3)];
    let position = if kind == MarkKind::Begin { u64::from(input.u16()) * 8 } else { position };
    Mark {
        kind,
        reason: (kind != MarkKind::GapEnd).then(|| GapReason::ALL[usize::from(reason % 12)]),
        incarnation: if twist % 16 == 1 { [9; 16] } else { RING },
        position,
        time_ns: input.u64(),
        epoch: EPOCH + u64::from(twist % 32 == 2),
        height_min: if twist % 8 == 3 { input.u64() } else { 0 },
    }
}

fn image(input: &mut Input<'_>) -> Vec<u8> {
    let data = vec![input.u8(); 1 << 16];
    let extents: Vec<(u64, u64, Option<&[u8]>)> = (0..input.u8() % 20)
        .map(|_| {
            let (offset, length) = (u64::from(input.u16()) * 64, input.u16());
            let zero = length % 2 == 0;
            (offset, u64::from(length), (!zero).then(|| &data[..usize::from(length)]))
        })
        .collect();
    let mut body = Vec::new();
    Image::encode(input.u64(), u16::from(input.u8() % 3), &extents, &mut body);
    body
}

fn probe(input: &mut Input<'_>) -> Vec<u8> {
    let length = u32::from(input.u8() % 20) * 65536 + u32::from(input.u8() % 2) * 512;
    let probe = Probe {
        id: input.u64(),
        volume: u16::from(input.u8() % 3),
        offset: u64::from(input.u8()) * 65536,
        length,
        digests: vec![[input.u8(); 16]; length.div_ceil(65536) as usize + usize::from(input.u8() % 16 == 1)],
    };
    messages::encode(&probe)
}
