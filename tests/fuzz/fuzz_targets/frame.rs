//! Frame headers and bodies: limits hold before and after decompressing, a header has one form, a body opens exactly if
//! its lengths and CRC are right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use varve_common::wire::{Codec, FRAME_HEADER_BYTES, Frame};
use varve_fuzz::{decompress, frame_around};

fuzz_target!(|data: &[u8]| {
    let Some((head, body)) = data.split_first_chunk::<FRAME_HEADER_BYTES>() else { return };
    header(head);
    // The same once more with what a fuzzer does not guess: magic, zeroes and CRC.
    let mut head = *head;
    head[..4].copy_from_slice(b"VRVF");
    head[6..8].fill(0);
    let crc = crc32fast::hash(&head[..FRAME_HEADER_BYTES - 4]);
    head[FRAME_HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    let Some(frame) = header(&head) else { return };
    let mut scratch = Vec::new();
    if body.len() != frame.body_bytes {
        assert!(frame.open(body, &mut scratch).is_err(), "a body of another length than the header says");
        assert!(scratch.is_empty(), "and nothing is allocated for it");
    }
    let fits = |frame: &Frame| Frame::decode(&frame.encode()).is_ok();
    let plain_bytes = if frame.codec == Codec::Plain { body.len() } else { frame.plain_bytes };
    let mut frame = frame_around(frame.kind, frame.codec, frame.position, body, plain_bytes);
    if !fits(&frame) {
        return;
    }
    let expected = match frame.codec {
        Codec::Plain => Some(body.to_vec()),
        Codec::Lz4 => decompress(body, plain_bytes),
    };
    // Full of an earlier frame, as the receiver's is.
    let mut scratch = vec![0xAA; 100];
    assert_eq!(frame.open(body, &mut scratch).ok().map(<[u8]>::to_vec), expected);
    assert!(scratch.len() <= 100.max(frame.kind.body_bytes_max()));
    frame.plain_crc = frame.plain_crc.wrapping_add(1);
    if expected.is_some() {
        assert!(frame.open(body, &mut scratch).is_err(), "a wrong CRC");
    }
});

fn header(head: &[u8; FRAME_HEADER_BYTES]) -> Option<Frame> {
    let frame = Frame::decode(head).ok()?;
    assert!(frame.body_bytes.max(frame.plain_bytes) <= frame.kind.body_bytes_max());
    assert_eq!(frame.encode(), *head, "one form");
    Some(frame)
}
