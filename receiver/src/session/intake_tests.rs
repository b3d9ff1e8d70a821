//! Whatever the chunks and whenever batches are taken: what comes out is what went in, and nothing panics.

use super::*;
use crate::group::stream::Point;
use proptest::prelude::*;
use varve_common::record::{RecordHeader, append_record};
use varve_common::state::GapReason;

const VOLUME_BYTES: u64 = 1 << 30;
const INCARNATION: Incarnation = [9; 16];

fn rules() -> Rules {
    Rules { volumes: Arc::new([VOLUME_BYTES]), incarnation: INCARNATION, epochs: 3..=3, grows: false }
}

fn begun_at(position: u64) -> StreamState {
    let at = Point { incarnation: INCARNATION, position, time_ns: 0 };
    StreamState { at, gap: Some(GapReason::InitialSync), ..StreamState::fresh() }
}

fn intake(position: u64) -> (Intake, mpsc::UnboundedReceiver<Answered>) {
    let (answers, received) = mpsc::unbounded_channel();
    (Intake::new(rules(), begun_at(position), true, answers, Arc::default()), received)
}

fn wire(frame: Frame, body: &[u8]) -> Vec<u8> {
    [&frame.encode()[..], body].concat()
}

/// One frame of the stream: its bytes, its body if it is landed, and where the stream then ends.
fn frame(kind: u8, size: usize, position: u64) -> (Vec<u8>, Option<Vec<u8>>, u64) {
    match kind {
        0..5 => {
            let mut plain = Vec::new();
            let header = RecordHeader {
                kind: 1,
                flags: 0,
                volume: 0.into(),
                payload: (size as u32).into(),
                time_ns: 5.into(),
                offset: 77.into(),
                length: (size as u64).into(),
            };
            append_record(&mut plain, header, &vec![kind | 1; size]);
            let end = position + plain.len() as u64;
            if kind < 2 {
                let body = lz4_flex::block::compress(&plain);
                let mut frame = Frame::plain(FrameKind::Data, position, &plain);
                (frame.codec, frame.body_bytes) = (Codec::Lz4, body.len());
                return (wire(frame, &body), Some(body), end);
            }
            (wire(Frame::plain(FrameKind::Data, position, &plain), &plain), Some(plain), end)
        }
        5 => {
            let (kind, reason) = (MarkKind::GapBegin, Some(GapReason::RingFull));
            let mark =
                Mark { kind, reason, incarnation: INCARNATION, position, time_ns: 1, epoch: 3, height_min: 0 }.encode();
            (wire(Frame::plain(FrameKind::Mark, position, &mark), &mark), Some(mark.to_vec()), position)
        }
        _ => {
            let mut body = Vec::new();
            Image::encode(size as u64, 0, &[(4096, 512, Some(&[7; 512])), (0, 100, None)], &mut body);
            (wire(Frame::plain(FrameKind::Image, position, &body), &body), None, position)
        }
    }
}

/// Checks the batch's layout as the lander relies on it; gives the bodies of its entries.
fn bodies(batch: &Batch) -> Vec<Option<Vec<u8>>> {
    assert!(batch.bytes.len().is_multiple_of(BLOCK_BYTES) && batch.entry_bytes <= batch.bytes.len());
    assert!(batch.bytes.is_empty() || batch.bytes.as_ptr().addr().is_multiple_of(BLOCK_BYTES));
    assert!(batch.bytes[batch.entry_bytes..].iter().all(|byte| *byte == 0), "padding");
    let mut at = 0;
    let mut bodies = Vec::new();
    for item in &batch.items {
        let Item::Entry(entry) = item else {
            bodies.push(None);
            continue;
        };
        assert_eq!(entry.at, at, "back to back");
        let body = &batch.bytes[at + ENTRY_HEADER_BYTES..][..entry.body_bytes];
        assert_eq!(crc32fast::hash(body), entry.body_crc);
        bodies.push(Some(body.to_vec()));
        at += entry.total_bytes();
    }
    assert_eq!(at, batch.entry_bytes);
    bodies
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_chunks_any_moment_the_same_entries(
        frames in prop::collection::vec((0u8..7, prop_oneof![4 => 1usize..5000, 1 => 1usize..1_000_000]), 1..40),
        chunk_bytes in prop::collection::vec(1usize..200_000, 1..20),
        taken in prop::collection::vec(any::<bool>(), 1..20),
        held in 0usize..3,
    ) {
        let (mut intake, _answers) = intake(64);
        let (mut stream, mut expected, mut position) = (Vec::new(), Vec::new(), 64);
        for (kind, size) in frames {
            let (bytes, body, end) = frame(kind, size, position);
            stream.extend_from_slice(&bytes);
            expected.push(body);
            position = end;
        }
        let (mut got, mut kept) = (Vec::new(), VecDeque::new());
        let (mut rest, mut sizes, mut taken) = (Bytes::from(stream), chunk_bytes.iter().cycle(), taken.iter().cycle());
        while !rest.is_empty() {
            let mut chunk = rest.split_to((*sizes.next().expect("cycle")).min(rest.len()));
            loop {
                let fed = intake.feed(&mut chunk).expect("all frames are right");
                if fed == Fed::All && !taken.next().expect("cycle") {
                    break;
                }
                // As the lander and the applier do: a few batches are held for a while.
                if let Some(batch) = intake.next_batch() {
                    got.extend(bodies(&batch));
                    kept.push_back(batch);
                }
                while kept.len() > held {
                    kept.pop_front();
                }
                if fed == Fed::All {
                    break;
                }
                prop_assert!(intake.starved || !kept.is_empty() || !chunk.is_empty());
            }
        }
        while let Some(batch) = intake.next_batch() {
            got.extend(bodies(&batch));
        }
        prop_assert_eq!(got.len(), expected.len());
        for (number, (got, expected)) in got.iter().zip(&expected).enumerate() {
            prop_assert!(got == expected, "frame {}", number);
        }
    }

    /// Damage anywhere: a refusal or nothing, never a panic, never an entry that was not sent.
    #[test]
    fn damage_is_refused(kind in 0u8..7, size in 1usize..3000, at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let (mut intake, _answers) = intake(64);
        let (mut bytes, ..) = frame(kind, size, 64);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        match intake.feed(&mut Bytes::from(bytes)) {
            Err(_) => {}
            // A match in LZ4 may come from elsewhere and be the same: then the content is right, as its CRC says.
            Ok(_) => prop_assert!(kind < 2 && at >= FRAME_HEADER_BYTES, "byte {} of a frame of kind {}", at, kind),
        }
    }

    #[test]
    fn anything_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let (mut intake, _answers) = intake(64);
        let _ = intake.feed(&mut Bytes::from(bytes));
        let _ = intake.next_batch();
    }
}

#[test]
fn images_wait_within_their_bound() {
    let (mut intake, _answers) = intake(64);
    let zeroes = vec![1; 1 << 20];
    let mut body = Vec::new();
    Image::encode(1, 0, &[(0, 1 << 20, Some(&zeroes))], &mut body);
    let bytes = Bytes::from(wire(Frame::plain(FrameKind::Image, 64, &body), &body));
    let mut batches = Vec::new();
    for _ in 0..IMAGE_BYTES_WAITING_MAX / body.len() {
        assert!(matches!(intake.feed(&mut bytes.clone()), Ok(Fed::All)));
        batches.extend(intake.next_batch());
    }
    let mut one_more = bytes.clone();
    assert!(matches!(intake.feed(&mut one_more), Ok(Fed::Blocked)));
    assert!(matches!(intake.feed(&mut one_more), Ok(Fed::Blocked)), "asking again changes nothing");
    batches.pop();
    assert!(matches!(intake.feed(&mut one_more), Ok(Fed::All)), "one is done, one has room");
}

/// It would be acknowledged, and then neither the applier nor recovery could read it.
#[test]
fn a_compressed_mark_is_refused() {
    let (mut intake, _answers) = intake(64);
    let (kind, reason) = (MarkKind::GapBegin, Some(GapReason::RingFull));
    let mark =
        Mark { kind, reason, incarnation: INCARNATION, position: 64, time_ns: 1, epoch: 3, height_min: 0 }.encode();
    let body = lz4_flex::block::compress(&mark);
    let mut frame = Frame::plain(FrameKind::Mark, 64, &mark);
    (frame.codec, frame.body_bytes) = (Codec::Lz4, body.len());
    let refused = intake.feed(&mut Bytes::from(wire(frame, &body))).expect_err("marks are plain");
    assert_eq!(refused.reason, RefusedReason::Protocol);
    assert!(intake.next_batch().is_none());
}
