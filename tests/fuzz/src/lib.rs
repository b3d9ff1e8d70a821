//! What several targets need: taking structure from a fuzzer's bytes, and a place for files.

use std::path::PathBuf;
use varve_common::wire::{Codec, Frame, FrameKind};

/// A fuzzer's input, taken apart from its front. Past its end everything is zero.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// One byte.
    pub fn u8(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// Two bytes, little endian.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    /// Eight bytes, little endian.
    pub fn u64(&mut self) -> u64 {
        let mut bytes = [0; 8];
        let taken = self.take(8);
        bytes[..taken.len()].copy_from_slice(taken);
        u64::from_le_bytes(bytes)
    }

    /// The next `count` bytes, or what is left.
    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A frame around a body that may be compressed, with the right lengths and CRC where they can be right: a fuzzer does
/// not guess checksums. `plain_bytes` is what a compressed body claims to become.
pub fn frame_around(kind: FrameKind, codec: Codec, position: u64, body: &[u8], plain_bytes: usize) -> Frame {
    let mut frame = Frame::plain(kind, position, body);
    if codec == Codec::Lz4 {
        frame.codec = codec;
        frame.plain_bytes = plain_bytes;
        frame.plain_crc = decompress(body, plain_bytes).map_or(0, |plain| crc32fast::hash(&plain));
    }
    frame
}

/// What a compressed body holds, if it holds exactly `plain_bytes`.
pub fn decompress(body: &[u8], plain_bytes: usize) -> Option<Vec<u8>> {
    let mut plain = vec![0; plain_bytes];
    let bytes = lz4_flex::block::decompress_into(body, &mut plain).ok()?;
    (bytes == plain_bytes).then_some(plain)
}

/// An empty directory for the files of `target`. libFuzzer ends without cleaning up, so `tests/fuzz/run` removes what
/// is left, by setting TMPDIR.
pub fn work_dir(target: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("varve-fuzz-{target}-{}", std::process::id()));
    // It may be there from an earlier process of that number.
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("a directory for files");
    dir
}

/// Findings whose fix is under way in another crate: while one is `true` its target looks away there. Set it to `false`
/// with the fix; the list should be empty.
pub mod known {
    /// `AppliedSlot::newest` takes the older slot when the other one is of a version that it does not know, so an older
    /// program goes back to before the newer one ran instead of refusing.
    pub const A_NEWER_SLOT_IS_PASSED_OVER: bool = false;
    /// `AppliedSlot::decode` takes whatever has a right CRC: flags that contradict each other, a place in the log that no
    /// log has (offsets beyond every segment overflow when blocks are rounded up).
    pub const IMPOSSIBLE_SLOTS_ARE_TAKEN: bool = false;
    /// The intake lands a mark whose body is LZ4; recovery and the applier read the stored body as a mark and find none,
    /// so the log counts as damaged there.
    pub const COMPRESSED_MARKS_ARE_LANDED: bool = false;
    /// `Mark::decode` takes a `GapEnd` whose reason is a number that no reason has, where only 0 may stand.
    pub const GAP_ENDS_WITH_UNKNOWN_REASONS_ARE_TAKEN: bool = false;
}
