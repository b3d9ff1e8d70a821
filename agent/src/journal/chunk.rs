//! A chunk in memory, on its way to the receiver.

use varve_common::clock::is_step;
use varve_common::format::BLOCK_BYTES;
use varve_common::format::journal::{CHUNK_HEADER_BYTES, CHUNK_TOTAL_BYTES_MAX};
use varve_common::record::{entry_bytes, entry_time_ns};
use varve_io::AlignedBuf;

/// Memory for any chunk.
pub fn buffer() -> AlignedBuf {
    AlignedBuf::new(CHUNK_TOTAL_BYTES_MAX)
}

/// What a chunk with so many bytes of records takes on disk.
pub fn total_bytes(bytes: u64) -> usize {
    (CHUNK_HEADER_BYTES + bytes as usize).next_multiple_of(BLOCK_BYTES)
}

/// Whole records, checked.
#[derive(Debug)]
pub struct Chunk {
    position: u64,
    end: u64,
    buf: AlignedBuf,
}

impl Chunk {
    /// `buf` holds the chunk as it is on disk.
    pub fn new(position: u64, end: u64, buf: AlignedBuf) -> Self {
        debug_assert!(end - position <= (buf.len() - CHUNK_HEADER_BYTES) as u64);
        Self { position, end, buf }
    }

    /// Behind its last byte.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Whether the byte at `position` is in it.
    pub fn holds(&self, position: u64) -> bool {
        (self.position..self.end).contains(&position)
    }

    /// The bytes from `from` on.
    pub fn bytes(&self, from: u64, end: u64) -> &[u8] {
        let at = CHUNK_HEADER_BYTES + (from - self.position) as usize;
        &self.buf[at..at + (end - from) as usize]
    }

    /// Where a frame that starts at `from` ends: at a record boundary, at most `until`, at most `bytes_max` long unless
    /// its first record alone is longer, and before the clock was set. `None`: no record begins at `from`.
    pub fn cut(&self, from: u64, until: u64, bytes_max: u64) -> Option<u64> {
        let mut at = self.position;
        while at < self.end && at < from {
            at += self.entry(at);
        }
        if at != from {
            return None;
        }
        let until = until.min(self.end);
        let mut before_ns = None;
        while at < until {
            let bytes = self.entry(at);
            let time_ns = entry_time_ns(self.bytes(at, at + bytes));
            let clock_set = before_ns.zip(time_ns).is_some_and(|(before, then)| is_step(before, then));
            if at > from && at + bytes - from > bytes_max || clock_set {
                break;
            }
            before_ns = time_ns.or(before_ns);
            at += bytes;
        }
        Some(at)
    }

    fn entry(&self, at: u64) -> u64 {
        let word = self.bytes(at, at + 4);
        entry_bytes(u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
    }

    /// The memory, to be used again.
    pub fn into_buffer(self) -> AlignedBuf {
        self.buf
    }
}
