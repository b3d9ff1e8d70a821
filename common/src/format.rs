//! Every byte that the receiver keeps on disk: landing log segments, their entries, the marks in the stream and the
//! applied mark. Fixed little-endian layouts, sizes asserted, checksum outside what it covers.
//!
//! A group's directory:
//!
//! ```text
//! group.json            what the group is (owner, volumes, replicas): JSON, written atomically
//! landing/0000…a.seg    segments of the landing log, recycled
//! applied               the applied mark, two slots
//! replica-N.img         replicas, unless the operator put them elsewhere
//! ```
//!
//! A segment is a [`SegmentHeader`] block and then *batches*. A batch is what one synced write appended: entries back
//! to back, each an [`EntryHeader`] and a body as it came over the wire, padded to 8; the batch is padded with zeroes to
//! [`BLOCK_BYTES`]. Segments are recycled, so everything after the newest batch is bytes of an earlier life: an entry
//! counts only if its header's CRC is right *and* it names its segment's sequence number and its own offset. The log
//! ends at the first entry that does not count, does not continue the chain of header CRCs, or whose position does not
//! follow.

pub mod directory;
pub mod journal;
pub mod layer;
pub mod run;

pub mod chronicle;

use crate::state::GapReason;
use crate::wire::messages::Incarnation;
use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Alignment of batches, and the unit of replica I/O.
pub const BLOCK_BYTES: usize = 4096;
/// Version of the layouts in this file. A file of another version is refused by name, never guessed at.
pub const FORMAT_VERSION: u16 = 1;
/// Alignment of entries within a batch.
pub const ENTRY_ALIGN: usize = 8;

/// Why bytes on disk are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FormatError {
    /// Not a file of this kind, or its checksum is wrong.
    #[error("not a {0}, or damaged")]
    Damaged(&'static str),
    /// A version that this build does not know.
    #[error("{what} has format version {found}; this build knows {FORMAT_VERSION}")]
    Version {
        /// Which file.
        what: &'static str,
        /// The version found.
        found: u16,
    },
}

/// The first block of a landing segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SegmentHeader {
    /// [`SEGMENT_MAGIC`].
    pub magic: [u8; 8],
    /// [`FORMAT_VERSION`]; stays at this offset in every version.
    pub version: U16,
    /// Zero.
    pub reserved: [u8; 6],
    /// The group's identity (made at random with its directory): a segment of another group is not taken for ours.
    pub group: [u8; 16],
    /// Rises by one with every segment put to use, recycled or new; from 1.
    pub sequence: U64,
    /// Size of the segment in bytes.
    pub bytes: U64,
    /// CRC-32 of the bytes before.
    pub crc: U32,
    /// Zero.
    pub tail: [u8; 4],
}

/// See [`SegmentHeader::magic`].
pub const SEGMENT_MAGIC: [u8; 8] = *b"VARVELND";
const _: () = assert!(size_of::<SegmentHeader>() == 56);
const _: () = assert!(core::mem::offset_of!(SegmentHeader, version) == 8);

impl SegmentHeader {
    /// A header with its checksum.
    pub fn new(group: [u8; 16], sequence: u64, bytes: u64) -> Self {
        let mut header = Self {
            magic: SEGMENT_MAGIC,
            version: FORMAT_VERSION.into(),
            reserved: [0; 6],
            group,
            sequence: sequence.into(),
            bytes: bytes.into(),
            crc: 0.into(),
            tail: [0; 4],
        };
        header.crc = header.checksum().into();
        header
    }

    fn checksum(&self) -> u32 {
        crc32fast::hash(&self.as_bytes()[..core::mem::offset_of!(SegmentHeader, crc)])
    }

    /// Reads the header from the start of a segment.
    pub fn decode(block: &[u8]) -> Result<Self, FormatError> {
        let damaged = FormatError::Damaged("landing segment");
        let (header, _) = Self::read_from_prefix(block).map_err(|_| damaged.clone())?;
        if header.magic != SEGMENT_MAGIC {
            return Err(damaged);
        }
        if header.version.get() != FORMAT_VERSION {
            return Err(FormatError::Version { what: "a landing segment", found: header.version.get() });
        }
        if header.crc.get() != header.checksum() {
            return Err(damaged);
        }
        Ok(header)
    }
}

/// Before every body in the landing log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct EntryHeader {
    /// [`ENTRY_MAGIC`].
    pub magic: U32,
    /// A [`crate::wire::FrameKind`] (`Data` or `Mark`).
    pub kind: u8,
    /// A [`crate::wire::Codec`].
    pub codec: u8,
    /// Zero.
    pub reserved: U16,
    /// Sequence number of the segment that the entry was written to.
    pub segment: U64,
    /// Offset of this header in the segment.
    pub offset: U64,
    /// The stream's incarnation.
    pub incarnation: [u8; 16],
    /// As in the frame.
    pub position: U64,
    /// Bytes of body that follow, without padding.
    pub body_bytes: U32,
    /// Bytes once decoded.
    pub plain_bytes: U32,
    /// CRC-32 of the plain body.
    pub plain_crc: U32,
    /// CRC-32 of the body as stored, so that recovery need not decompress.
    pub body_crc: U32,
    /// `header_crc` of the entry before this one in the log, 0 for the very first: a mark moves no position, so without
    /// this chain one that was lost could not be missed.
    pub previous_crc: U32,
    /// CRC-32 of the header's bytes before.
    pub header_crc: U32,
}

/// See [`EntryHeader::magic`].
pub const ENTRY_MAGIC: u32 = u32::from_le_bytes(*b"VRVE");
/// Bytes of an [`EntryHeader`].
pub const ENTRY_HEADER_BYTES: usize = size_of::<EntryHeader>();
const _: () = assert!(ENTRY_HEADER_BYTES == 72);
const _: () = assert!(ENTRY_HEADER_BYTES.is_multiple_of(ENTRY_ALIGN));

impl EntryHeader {
    /// Sets the checksum and gives the bytes.
    pub fn encode(mut self) -> [u8; ENTRY_HEADER_BYTES] {
        self.header_crc = self.checksum().into();
        zerocopy::transmute!(self)
    }

    fn checksum(&self) -> u32 {
        crc32fast::hash(&self.as_bytes()[..core::mem::offset_of!(EntryHeader, header_crc)])
    }

    /// Reads an entry's header; `None` if it is not an entry that belongs at `offset` of segment `segment`.
    pub fn decode(bytes: &[u8], segment: u64, offset: u64) -> Option<Self> {
        let (header, _) = Self::read_from_prefix(bytes).ok()?;
        let here = header.segment.get() == segment && header.offset.get() == offset;
        (header.magic.get() == ENTRY_MAGIC && here && header.header_crc.get() == header.checksum()).then_some(header)
    }

    /// Bytes that the entry takes with its body and padding.
    pub fn total_bytes(&self) -> usize {
        ENTRY_HEADER_BYTES + (self.body_bytes.get() as usize).next_multiple_of(ENTRY_ALIGN)
    }
}

/// What a mark says. The numbers are the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum MarkKind {
    /// The stream goes on in another incarnation, at `position` of it. Opens a gap with `reason`.
    Begin = 1,
    /// From `position` on no point can be recovered.
    GapBegin = 2,
    /// At `position` the replicas equal the volumes again.
    GapEnd = 3,
}

/// The body of a mark: in a frame and in the landing log alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MarkBody {
    /// A [`MarkKind`].
    pub kind: u8,
    /// A [`GapReason`] for `Begin` and `GapBegin`, else 0.
    pub reason: u8,
    /// Zero.
    pub reserved: [u8; 6],
    /// The incarnation in which `position` counts.
    pub incarnation: Incarnation,
    /// Where it takes effect.
    pub position: U64,
    /// Wall-clock time at the source, nanoseconds since 1970.
    pub time_ns: U64,
    /// The source's epoch.
    pub epoch: U64,
    /// The timeline's height is at least this from here on. 0 from a source: only a receiver that found its landing log
    /// damaged sets it, in the mark that it lands itself, so that what its history already holds stays older.
    pub height_min: U64,
}

const _: () = assert!(size_of::<MarkBody>() == 56);

/// A mark whose numbers are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// What it says.
    pub kind: MarkKind,
    /// Why, for `Begin` and `GapBegin`.
    pub reason: Option<GapReason>,
    /// See [`MarkBody::incarnation`].
    pub incarnation: Incarnation,
    /// See [`MarkBody::position`].
    pub position: u64,
    /// See [`MarkBody::time_ns`].
    pub time_ns: u64,
    /// See [`MarkBody::epoch`].
    pub epoch: u64,
    /// See [`MarkBody::height_min`].
    pub height_min: u64,
}

impl Mark {
    /// The mark's bytes.
    pub fn encode(&self) -> [u8; size_of::<MarkBody>()] {
        let body = MarkBody {
            kind: self.kind as u8,
            reason: self.reason.map_or(0, |reason| reason as u8),
            reserved: [0; 6],
            incarnation: self.incarnation,
            position: self.position.into(),
            time_ns: self.time_ns.into(),
            epoch: self.epoch.into(),
            height_min: self.height_min.into(),
        };
        zerocopy::transmute!(body)
    }

    /// Reads a mark; `None` if the length or a number is not known.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let body = MarkBody::read_from_bytes(bytes).ok()?;
        let kind = match body.kind {
            1 => MarkKind::Begin,
            2 => MarkKind::GapBegin,
            3 => MarkKind::GapEnd,
            _ => return None,
        };
        let reason = GapReason::from_number(body.reason);
        let agree = match kind {
            MarkKind::GapEnd => body.reason == 0,
            MarkKind::Begin | MarkKind::GapBegin => reason.is_some(),
        };
        if !agree || body.reserved != [0; 6] {
            return None;
        }
        Some(Self {
            kind,
            reason,
            incarnation: body.incarnation,
            position: body.position.get(),
            time_ns: body.time_ns.get(),
            epoch: body.epoch.get(),
            height_min: body.height_min.get(),
        })
    }
}

/// One slot of the `applied` file: two blocks of [`BLOCK_BYTES`], written in turn, so that one is always whole. The slot
/// with the higher sequence and a right CRC counts. It is written only after everything that it claims is synced in the
/// replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct AppliedSlot {
    /// [`APPLIED_MAGIC`].
    pub magic: [u8; 8],
    /// [`FORMAT_VERSION`]; stays at this offset in every version.
    pub version: U16,
    /// 1: no gap is open at `position`.
    pub consistent: u8,
    /// 1: the group was consistent at least once.
    pub ever_consistent: u8,
    /// The open gap's [`GapReason`], else 0.
    pub gap_reason: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// The group's identity.
    pub group: [u8; 16],
    /// Rises by one with every write of the file.
    pub sequence: U64,
    /// The stream's incarnation at `position`; all zero before the first `Begin`.
    pub incarnation: Incarnation,
    /// Everything before is in the replicas.
    pub position: U64,
    /// Landing segment in which the next entry stands.
    pub segment: U64,
    /// Its offset there.
    pub offset: U64,
    /// Time of the newest applied record or mark.
    pub time_ns: U64,
    /// Position of the newest consistent point, in `good_incarnation`; 0 if there was none.
    pub good_position: U64,
    /// See `good_position`.
    pub good_incarnation: Incarnation,
    /// Its time.
    pub good_time_ns: U64,
    /// The timeline's height at `position`: bytes of the stream and 8 for each mark, over all incarnations.
    pub height: U64,
    /// What every change up to this height replaced is in the history: if a layer ends earlier, it has lost something.
    pub history: U64,
    /// `header_crc` of the newest applied entry: the next one's `previous_crc`.
    pub chain: U32,
    /// CRC-32 of the bytes before.
    pub crc: U32,
}

/// Sequence numbers of segments stay below: one a microsecond lasts for nine years.
const SEGMENT_SEQUENCE_MAX: u64 = 1 << 48;
/// No segment is longer.
const SEGMENT_OFFSET_MAX: u64 = 2 << 30;

/// See [`AppliedSlot::magic`].
pub const APPLIED_MAGIC: [u8; 8] = *b"VARVEAPP";
const _: () = assert!(size_of::<AppliedSlot>() == 144);
const _: () = assert!(core::mem::offset_of!(AppliedSlot, version) == 8);

impl AppliedSlot {
    /// The slot before anything was applied.
    pub fn fresh(group: [u8; 16]) -> Self {
        Self {
            magic: APPLIED_MAGIC,
            version: FORMAT_VERSION.into(),
            consistent: 0,
            ever_consistent: 0,
            gap_reason: GapReason::InitialSync as u8,
            reserved: [0; 3],
            group,
            sequence: 0.into(),
            incarnation: [0; 16],
            position: 0.into(),
            segment: 1.into(),
            offset: (BLOCK_BYTES as u64).into(),
            time_ns: 0.into(),
            good_position: 0.into(),
            good_incarnation: [0; 16],
            good_time_ns: 0.into(),
            height: 0.into(),
            history: 0.into(),
            chain: 0.into(),
            crc: 0.into(),
        }
    }

    /// Sets the checksum and gives one block.
    pub fn encode(mut self) -> [u8; BLOCK_BYTES] {
        self.crc = self.checksum().into();
        let mut block = [0; BLOCK_BYTES];
        block[..size_of::<Self>()].copy_from_slice(self.as_bytes());
        block
    }

    fn checksum(&self) -> u32 {
        crc32fast::hash(&self.as_bytes()[..core::mem::offset_of!(AppliedSlot, crc)])
    }

    /// Reads one slot.
    pub fn decode(block: &[u8]) -> Result<Self, FormatError> {
        let damaged = FormatError::Damaged("applied mark");
        let (slot, _) = Self::read_from_prefix(block).map_err(|_| damaged.clone())?;
        if slot.magic != APPLIED_MAGIC {
            return Err(damaged);
        }
        if slot.version.get() != FORMAT_VERSION {
            return Err(FormatError::Version { what: "the applied mark", found: slot.version.get() });
        }
        if slot.crc.get() != slot.checksum() || !slot.is_possible() {
            return Err(damaged);
        }
        Ok(slot)
    }

    /// Whether the fields agree with each other: a right checksum says that they are what was written, not that whoever
    /// wrote them was sane.
    fn is_possible(&self) -> bool {
        let flags = self.consistent <= 1 && self.ever_consistent <= 1 && self.consistent <= self.ever_consistent;
        let reason = match self.consistent {
            0 => GapReason::from_number(self.gap_reason).is_some(),
            _ => self.gap_reason == 0,
        };
        let segment = (1..SEGMENT_SEQUENCE_MAX).contains(&self.segment.get());
        let offset = self.offset.get();
        let place =
            (BLOCK_BYTES as u64..=SEGMENT_OFFSET_MAX).contains(&offset) && offset.is_multiple_of(ENTRY_ALIGN as u64);
        flags && reason && segment && place && self.reserved == [0; 3]
    }

    /// The slot that counts in an `applied` file of two blocks.
    pub fn newest(file: &[u8]) -> Result<Self, FormatError> {
        let slot = |index: usize| {
            let block = file.get(index * BLOCK_BYTES..(index + 1) * BLOCK_BYTES);
            block.map_or(Err(FormatError::Damaged("applied mark")), Self::decode)
        };
        match (slot(0), slot(1)) {
            // A newer version may have written it last: going back to the older slot would undo what that one did.
            (Err(version @ FormatError::Version { .. }), _) | (_, Err(version @ FormatError::Version { .. })) => {
                Err(version)
            }
            (Ok(a), Ok(b)) if b.sequence.get() > a.sequence.get() => Ok(b),
            (Ok(a), _) => Ok(a),
            (Err(_), other) => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry() -> EntryHeader {
        EntryHeader {
            magic: ENTRY_MAGIC.into(),
            kind: 2,
            codec: 0,
            reserved: 0.into(),
            segment: 5.into(),
            offset: 4096.into(),
            incarnation: [9; 16],
            position: 0x1234.into(),
            body_bytes: 100.into(),
            plain_bytes: 100.into(),
            plain_crc: 1.into(),
            body_crc: 2.into(),
            previous_crc: 0.into(),
            header_crc: 0.into(),
        }
    }

    /// Files written by this version must be readable by every later one: these bytes are frozen.
    #[test]
    fn golden_bytes() {
        let header = SegmentHeader::new([1; 16], 7, 64 << 20);
        let mut golden = b"VARVELND\x01\0\0\0\0\0\0\0".to_vec();
        golden.extend([1; 16]);
        golden.extend([7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0]);
        assert_eq!(header.as_bytes()[..48], golden);
        assert_eq!(SegmentHeader::decode(header.as_bytes()), Ok(header));

        let bytes = entry().encode();
        let mut golden = b"VRVE\x02\0\0\0\x05\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0".to_vec();
        golden.extend([9; 16]);
        golden.extend([0x34, 0x12, 0, 0, 0, 0, 0, 0, 100, 0, 0, 0, 100, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[..68], golden);

        let mark = Mark {
            kind: MarkKind::GapBegin,
            reason: Some(GapReason::RingFull),
            incarnation: [3; 16],
            position: 0x10,
            time_ns: 0x20,
            epoch: 1,
            height_min: 0,
        };
        let mut golden = vec![2, 3, 0, 0, 0, 0, 0, 0];
        golden.extend([3; 16]);
        golden.extend([0x10, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend([0; 8]);
        assert_eq!(mark.encode(), golden[..]);
        assert_eq!(Mark::decode(&golden), Some(mark));

        let slot = AppliedSlot::fresh([4; 16]).encode();
        assert_eq!(slot[..16], *b"VARVEAPP\x01\0\0\0\x01\0\0\0");
        assert_eq!(slot[16..32], [4; 16]);
    }

    #[test]
    fn an_entry_of_an_earlier_life_does_not_count() {
        let bytes = entry().encode();
        assert!(EntryHeader::decode(&bytes, 5, 4096).is_some());
        assert!(EntryHeader::decode(&bytes, 6, 4096).is_none(), "segment was recycled");
        assert!(EntryHeader::decode(&bytes, 5, 8192).is_none(), "not where it was written");
    }

    #[test]
    fn the_newest_whole_slot_counts() {
        let mut old = AppliedSlot::fresh([4; 16]);
        old.sequence = 8.into();
        old.position = 800.into();
        let mut new = old;
        new.sequence = 9.into();
        new.position = 900.into();
        let mut file = [old.encode(), new.encode()].concat();
        assert_eq!(AppliedSlot::newest(&file).map(|slot| slot.position.get()), Ok(900));
        file[BLOCK_BYTES + 60] ^= 1;
        assert_eq!(AppliedSlot::newest(&file).map(|slot| slot.position.get()), Ok(800), "torn slot is passed over");
        file[60] ^= 1;
        assert!(AppliedSlot::newest(&file).is_err());
        let mut future = AppliedSlot::fresh([4; 16]).encode();
        future[8] = 2;
        assert!(matches!(AppliedSlot::newest(&[future, future].concat()), Err(FormatError::Version { found: 2, .. })));
        let ours = AppliedSlot::fresh([4; 16]).encode();
        for file in [[ours, future].concat(), [future, ours].concat()] {
            assert!(matches!(AppliedSlot::newest(&file), Err(FormatError::Version { found: 2, .. })), "not undone");
        }
    }

    #[test]
    fn impossible_slots_are_damaged() {
        let changes: [fn(&mut AppliedSlot); 5] = [
            |slot| slot.consistent = 1,
            |slot| slot.gap_reason = 0,
            |slot| slot.segment = u64::MAX.into(),
            |slot| slot.offset = 4097.into(),
            |slot| slot.ever_consistent = 2,
        ];
        for change in changes {
            let mut slot = AppliedSlot::fresh([4; 16]);
            change(&mut slot);
            assert!(AppliedSlot::decode(&slot.encode()).is_err(), "{slot:?}");
        }
        let mut mark = vec![3, 184, 0, 0, 0, 0, 0, 0];
        mark.extend([0; 48]);
        assert_eq!(Mark::decode(&mark), None, "a GapEnd has no reason");
    }

    proptest! {
        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), bit in 0usize..576) {
            let _ = SegmentHeader::decode(&bytes);
            let _ = EntryHeader::decode(&bytes, 1, 2);
            let _ = Mark::decode(&bytes);
            let _ = AppliedSlot::decode(&bytes);
            let _ = AppliedSlot::newest(&bytes);
            let mut damaged = entry().encode();
            damaged[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(EntryHeader::decode(&damaged, 5, 4096).is_none(), "any flipped bit is seen");
        }
    }
}
