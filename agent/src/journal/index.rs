//! Which chunk holds which bytes of the stream. Pure.

use std::collections::VecDeque;
use varve_common::format::journal::Found;
use varve_common::state::GapReason;

/// A chunk on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRef {
    /// Of its first byte.
    pub position: u64,
    /// Behind its last one.
    pub end: u64,
    /// Sequence number of its segment.
    pub segment: u64,
    /// Of its header in there.
    pub offset: u64,
    /// Time of its first record that changes data.
    pub first_write_ns: Option<u64>,
    /// The gap that was open when it was written.
    pub gap: Option<(GapReason, u64)>,
}

impl From<Found> for ChunkRef {
    fn from(found: Found) -> Self {
        Self {
            position: found.header.position.get(),
            end: found.header.end(),
            segment: found.header.segment.get(),
            offset: found.header.offset.get(),
            first_write_ns: found.first_write_ns,
            gap: found.header.gap(),
        }
    }
}

/// The chunks that are not released, each going on where the one before ends.
#[derive(Clone, Debug, Default)]
pub struct Index {
    chunks: VecDeque<ChunkRef>,
    /// Everything before is durable elsewhere.
    released: u64,
}

impl Index {
    /// First byte that is still wanted, and the end; `None`: nothing is.
    pub fn range(&self) -> Option<(u64, u64)> {
        let (first, last) = (self.chunks.front()?, self.chunks.back()?);
        Some((first.position.max(self.released).min(last.end), last.end))
    }

    /// Bytes that are still wanted.
    pub fn bytes(&self) -> u64 {
        self.range().map_or(0, |(start, end)| end - start)
    }

    /// Oldest segment that is still wanted.
    pub fn oldest_segment(&self) -> Option<u64> {
        self.chunks.front().map(|chunk| chunk.segment)
    }

    /// Appends a chunk.
    ///
    /// # Panics
    /// If it does not follow: what would be sent then would have a hole.
    pub fn push(&mut self, chunk: ChunkRef) {
        if let Some(last) = self.chunks.back() {
            assert_eq!(last.end, chunk.position, "a hole in the journal");
        }
        self.chunks.push_back(chunk);
    }

    /// Everything before `position` is durable at the receiver.
    pub fn release(&mut self, position: u64) {
        self.released = self.released.max(position);
        while self.chunks.front().is_some_and(|chunk| chunk.end <= position) {
            self.chunks.pop_front();
        }
    }

    /// Nothing is wanted any more.
    pub fn clear(&mut self) {
        self.chunks.clear();
        self.released = 0;
    }

    /// The chunk with the byte at `position`.
    pub fn find(&self, position: u64) -> Option<ChunkRef> {
        let at = self.chunks.partition_point(|chunk| chunk.end <= position);
        self.chunks.get(at).copied().filter(|chunk| chunk.position <= position)
    }

    /// Time of the oldest record at or after `durable` that changes data, or (in the chunk that holds `durable`) of one
    /// that is at most a chunk older.
    pub fn oldest_write_ns(&self, durable: u64) -> Option<u64> {
        let at = self.chunks.partition_point(|chunk| chunk.end <= durable);
        self.chunks.range(at..).find_map(|chunk| chunk.first_write_ns)
    }

    /// The earliest begin of a gap that any chunk knows of.
    pub fn gap(&self) -> Option<(GapReason, u64)> {
        self.chunks.iter().filter_map(|chunk| chunk.gap).min_by_key(|(_, position)| *position)
    }
}
