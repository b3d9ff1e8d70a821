//! What is written to the log at once, and what the applier must do in between.

use crate::apply::work::Action;
use bytes::BytesMut;
use varve_common::format::{BLOCK_BYTES, ENTRY_HEADER_BYTES, ENTRY_MAGIC, EntryHeader, Mark, MarkKind};
use varve_common::wire::messages::Incarnation;
use varve_common::wire::{Codec, FrameKind};

/// Frames in the order in which they came. `bytes` starts block-aligned in memory; each entry's header is left blank,
/// since only the lander knows where it will stand.
#[derive(Debug)]
pub struct Batch {
    /// Entries back to back, padded with zeroes to a block; nothing if there is no entry.
    pub bytes: BytesMut,
    /// Bytes of the entries.
    pub entry_bytes: usize,
    /// What is in it.
    pub items: Vec<Item>,
}

/// One frame.
#[derive(Debug)]
pub enum Item {
    /// Is landed.
    Entry(Entry),
    /// Is done by the applier after everything before, and not landed.
    Act(Action),
}

/// A frame that is landed: checked, its body copied.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where its header is in the batch.
    pub at: usize,
    /// `Data` or `Mark`.
    pub kind: FrameKind,
    /// How the body is encoded.
    pub codec: Codec,
    /// The stream's incarnation; of a `Begin`, the new one.
    pub incarnation: Incarnation,
    /// The frame's position.
    pub position: u64,
    /// Bytes of body, without padding.
    pub body_bytes: usize,
    /// Bytes once decoded.
    pub plain_bytes: usize,
    /// CRC of the plain body.
    pub plain_crc: u32,
    /// CRC of the body as it came.
    pub body_crc: u32,
    /// What it does to the stream.
    pub effect: Effect,
}

/// What an entry does to the stream's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The stream now ends at `end`; the newest record has this time (`None`: there was no record).
    Data {
        /// Position after it.
        end: u64,
        /// Of the newest record.
        time_ns: Option<u64>,
    },
    /// See [`Mark`].
    Mark(Mark),
}

impl Entry {
    /// Bytes in the batch, header and padding included.
    pub fn total_bytes(&self) -> usize {
        total_bytes(self.body_bytes)
    }

    /// The header for the place where it is written, after an entry whose header has the CRC `previous_crc`.
    pub fn header(&self, segment: u64, offset: u64, previous_crc: u32) -> EntryHeader {
        EntryHeader {
            magic: ENTRY_MAGIC.into(),
            kind: self.kind as u8,
            codec: self.codec as u8,
            reserved: 0.into(),
            segment: segment.into(),
            offset: offset.into(),
            incarnation: self.incarnation,
            position: self.position.into(),
            body_bytes: (self.body_bytes as u32).into(),
            plain_bytes: (self.plain_bytes as u32).into(),
            plain_crc: self.plain_crc.into(),
            body_crc: self.body_crc.into(),
            previous_crc: previous_crc.into(),
            header_crc: 0.into(),
        }
    }
}

/// Bytes that a body takes in the log, header and padding included.
pub fn total_bytes(body_bytes: usize) -> usize {
    ENTRY_HEADER_BYTES + body_bytes.next_multiple_of(varve_common::format::ENTRY_ALIGN)
}

impl Batch {
    /// Nothing but a mark that the receiver lands itself.
    pub fn of_mark(mark: &Mark) -> Self {
        let body = mark.encode();
        let entry_bytes = total_bytes(body.len());
        let mut bytes = super::arena::zeroes(BLOCK_BYTES);
        bytes[ENTRY_HEADER_BYTES..ENTRY_HEADER_BYTES + body.len()].copy_from_slice(&body);
        let crc = crc32fast::hash(&body);
        let entry = Entry {
            at: 0,
            kind: FrameKind::Mark,
            codec: Codec::Plain,
            incarnation: mark.incarnation,
            position: mark.position,
            body_bytes: body.len(),
            plain_bytes: body.len(),
            plain_crc: crc,
            body_crc: crc,
            effect: Effect::Mark(*mark),
        };
        Self { bytes, entry_bytes, items: vec![Item::Entry(entry)] }
    }

    /// Whole records from `position` on, of a stream that the receiver writes itself.
    pub fn of_records(incarnation: Incarnation, position: u64, records: &[u8], time_ns: u64) -> Self {
        let entry_bytes = total_bytes(records.len());
        let mut bytes = super::arena::zeroes(entry_bytes.next_multiple_of(BLOCK_BYTES));
        bytes[ENTRY_HEADER_BYTES..ENTRY_HEADER_BYTES + records.len()].copy_from_slice(records);
        let crc = crc32fast::hash(records);
        let entry = Entry {
            at: 0,
            kind: FrameKind::Data,
            codec: Codec::Plain,
            incarnation,
            position,
            body_bytes: records.len(),
            plain_bytes: records.len(),
            plain_crc: crc,
            body_crc: crc,
            effect: Effect::Data { end: position + records.len() as u64, time_ns: Some(time_ns) },
        };
        Self { bytes, entry_bytes, items: vec![Item::Entry(entry)] }
    }

    /// The entries.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.items.iter().filter_map(|item| match item {
            Item::Entry(entry) => Some(entry),
            Item::Act(_) => None,
        })
    }

    /// Whether the stream's position is one of this session's incarnation from here on.
    pub fn has_begin(&self) -> bool {
        let begins = |entry: &Entry| matches!(&entry.effect, Effect::Mark(mark) if mark.kind == MarkKind::Begin);
        self.entries().any(begins)
    }
}

const _: () = assert!(ENTRY_HEADER_BYTES + size_of::<varve_common::format::MarkBody>() <= BLOCK_BYTES);
