//! The agent's journal made of any bytes. Three ways: raw bytes behind a right segment header; chunks with right
//! checksums that say anything; a good journal with damage in it. What is taken is whole records that follow each other;
//! of a good journal, it is what was put into it, from its begin.
#![no_main]

use libfuzzer_sys::fuzz_target;
use varve_common::format::BLOCK_BYTES;
use varve_common::format::journal::{
    CHUNK_BYTES_MAX, CHUNK_HEADER_BYTES, CHUNK_MAGIC, CHUNK_TOTAL_BYTES_MAX, Candidate, ChunkHeader, End, FLAG_FIRST,
    JournalSegmentHeader, Verdict, decide, look, peek,
};
use varve_common::record::{RecordHeader, RecordKind, Records, append_record};
use varve_fuzz::Input;
use zerocopy::IntoBytes;

const RING: [u8; 16] = [1; 16];
const SEGMENT_BYTES: usize = 24 * BLOCK_BYTES;

struct Segment {
    header: JournalSegmentHeader,
    bytes: Vec<u8>,
}

impl Segment {
    fn new(sequence: u64, ring: [u8; 16]) -> Self {
        let header = JournalSegmentHeader::new("g", ring, sequence, SEGMENT_BYTES as u64);
        let mut bytes = vec![0; SEGMENT_BYTES];
        bytes[..size_of::<JournalSegmentHeader>()].copy_from_slice(header.as_bytes());
        Self { header, bytes }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let _ = JournalSegmentHeader::decode(data);
    match input.u8() % 3 {
        0 => {
            let mut segment = Segment::new(1, RING);
            let raw = input.take(SEGMENT_BYTES - BLOCK_BYTES);
            segment.bytes[BLOCK_BYTES..][..raw.len()].copy_from_slice(raw);
            walk(&[segment]);
        }
        1 => crafted(&mut input),
        _ => damaged(&mut input),
    }
});

/// As the agent's recovery goes through its segments; the chunks that it takes.
fn walk(segments: &[Segment]) -> Vec<(u64, Vec<u8>)> {
    let (mut taken, mut before): (Vec<(u64, Vec<u8>)>, Option<End>) = (Vec::new(), None);
    'segments: for segment in segments {
        let (mut offset, mut candidate) = (BLOCK_BYTES, Candidate::NextSegment);
        while offset < segment.bytes.len() {
            let end = segment.bytes.len().min(offset + CHUNK_TOTAL_BYTES_MAX);
            let bytes = &segment.bytes[offset..end];
            let (facts, found) = look(&segment.header, offset as u64, bytes, before);
            let (peeked, _) = peek(&segment.header, offset as u64, &bytes[..BLOCK_BYTES], bytes.len() as u64, before);
            assert_eq!((peeked.header, peeked.sane), (facts.header, facts.sane));
            match (decide(candidate, facts).2, found) {
                (verdict @ (Verdict::Take | Verdict::Restart), Some(found)) => {
                    if verdict == Verdict::Restart {
                        taken.clear();
                    }
                    let header = found.header;
                    let body = bytes[CHUNK_HEADER_BYTES..][..header.bytes.get() as usize].to_vec();
                    assert!(Records::new(header.position.get(), &body).all(|record| record.is_ok()));
                    if let Some((position, body)) = taken.last() {
                        assert_eq!(position + body.len() as u64, header.position.get(), "a hole");
                    }
                    before = Some(End {
                        chain: header.header_crc.get(),
                        position: header.end(),
                        incarnation: header.incarnation,
                    });
                    taken.push((header.position.get(), body));
                    offset += header.total_bytes();
                    candidate = Candidate::Adjacent;
                }
                (Verdict::Take | Verdict::Restart, None) => panic!("taken without having been found"),
                (Verdict::Damaged, _) => break 'segments,
                (Verdict::Elsewhere, _) => break,
            }
        }
    }
    taken
}

fn records(count: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for number in 0..count {
        let payload = vec![number as u8; 1 + number * 97];
        let header = RecordHeader {
            kind: RecordKind::Write as u8,
            flags: 0,
            volume: 0.into(),
            payload: (payload.len() as u32).into(),
            time_ns: 5.into(),
            offset: 0.into(),
            length: (payload.len() as u64).into(),
        };
        append_record(&mut out, header, &payload);
    }
    out
}

/// Puts a chunk at `offset`; where the next one goes, if this one fits.
fn put(segment: &mut Segment, offset: usize, mut header: ChunkHeader, body: &[u8]) -> Option<(usize, u32)> {
    header.crc = crc32(body).into();
    let bytes = header.encode();
    let end = offset + CHUNK_HEADER_BYTES + body.len();
    segment.bytes.get_mut(offset..end)?;
    segment.bytes[offset..offset + CHUNK_HEADER_BYTES].copy_from_slice(&bytes);
    segment.bytes[offset + CHUNK_HEADER_BYTES..end].copy_from_slice(body);
    let crc = u32::from_le_bytes(bytes[CHUNK_HEADER_BYTES - 4..].try_into().expect("four bytes"));
    Some((end.next_multiple_of(BLOCK_BYTES), crc))
}

fn crc32(bytes: &[u8]) -> u32 {
    // The frame's checksum is the same one.
    varve_common::wire::Frame::plain(varve_common::wire::FrameKind::Data, 0, bytes).plain_crc
}

fn chunk(segment: &Segment, offset: usize, position: u64, bytes: usize, chain: u32, flags: u8) -> ChunkHeader {
    ChunkHeader {
        magic: CHUNK_MAGIC.into(),
        flags,
        gap_reason: 0,
        reserved: 0.into(),
        segment: segment.header.sequence,
        offset: (offset as u64).into(),
        incarnation: segment.header.incarnation,
        position: position.into(),
        gap_position: 0.into(),
        bytes: (bytes as u32).into(),
        crc: 0.into(),
        previous_crc: chain.into(),
        header_crc: 0.into(),
    }
}

fn crafted(input: &mut Input<'_>) {
    let mut segments = Vec::new();
    let (mut position, mut chain) = (0, 0);
    for sequence in 1..=3 {
        let ring = if input.u8() % 4 == 0 { [2; 16] } else { RING };
        let mut segment = Segment::new(sequence, ring);
        let mut offset = BLOCK_BYTES;
        for _ in 0..input.u8() % 5 {
            let body = match input.u8() % 3 {
                0 => input.take(64).to_vec(),
                _ => records(usize::from(input.u8() % 12)),
            };
            let mut header = chunk(&segment, offset, position, body.len(), chain, input.u8() % 3);
            match input.u8() % 8 {
                0 => header.position = input.u64().into(),
                1 => header.bytes = (input.u64() as u32 % (2 * CHUNK_BYTES_MAX as u32)).into(),
                2 => header.segment = input.u64().into(),
                3 => header.gap_reason = input.u8(),
                4 => header.previous_crc = 7.into(),
                5 => header.incarnation = [3; 16],
                _ => {}
            }
            let Some((next, crc)) = put(&mut segment, offset, header, &body) else { break };
            (offset, chain) = (next, crc);
            position = header.end();
        }
        segments.push(segment);
    }
    walk(&segments);
}

fn damaged(input: &mut Input<'_>) {
    let (mut segments, mut good) = (Vec::new(), Vec::new());
    let (mut position, mut chain) = (64, 0);
    for sequence in 1..=2 {
        let mut segment = Segment::new(sequence, RING);
        let mut offset = BLOCK_BYTES;
        for _ in 0..1 + input.u8() % 4 {
            let body = records(usize::from(input.u8() % 12));
            let first = if good.is_empty() { FLAG_FIRST } else { 0 };
            let header = chunk(&segment, offset, position, body.len(), chain, first);
            let Some((next, crc)) = put(&mut segment, offset, header, &body) else { break };
            good.push((position, body));
            position = header.end();
            (offset, chain) = (next, crc);
        }
        segments.push(segment);
    }
    assert_eq!(walk(&segments), good, "undamaged");
    for _ in 0..1 + input.u8() % 3 {
        let segment = usize::from(input.u8()) % segments.len();
        let at = BLOCK_BYTES + usize::from(input.u16()) % (SEGMENT_BYTES - BLOCK_BYTES);
        segments[segment].bytes[at] ^= input.u8();
    }
    let found = walk(&segments);
    // From the begin, or (with the first chunk gone) what nothing is missing before it can tell: a later segment alone.
    assert!((0..good.len()).any(|from| good[from..].starts_with(&found)), "not what was written");
}
