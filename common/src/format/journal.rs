//! The agent's journal: the ring's byte stream on disk. A group's directory holds segments, recycled:
//!
//! ```text
//! journal/GROUP/0000…a.seg   a SegmentHeader block, then chunks, each beginning at a block
//! ```
//!
//! A chunk is a [`ChunkHeader`] and whole records right behind it, padded with zeroes to [`BLOCK_BYTES`]. Chunks of a
//! *run* follow each other without a hole and form a chain; a run begins when the journal was empty, always in a new
//! segment, and says so ([`FLAG_FIRST`]): everything older was acknowledged before. Segments are recycled, so a chunk
//! counts only if it names its segment's sequence number and its own offset.
//!
//! [`decide`] is the table by which recovery says where the journal ends; [`look`] finds the facts for it.

use super::{BLOCK_BYTES, FORMAT_VERSION, FormatError};
use crate::limits::NAME_BYTES_MAX;
use crate::record::{RECORD_BYTES_MAX, RING_HEADER_BYTES, RecordError, RecordHeader, Records};
use crate::state::GapReason;
use crate::wire::messages::Incarnation;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first block of a segment of the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct JournalSegmentHeader {
    /// [`JOURNAL_MAGIC`].
    pub magic: [u8; 8],
    /// [`FORMAT_VERSION`]; stays at this offset in every version.
    pub version: U16,
    /// Bytes of the group's name.
    pub name_bytes: u8,
    /// Zero.
    pub reserved: [u8; 5],
    /// The ring whose bytes are here: random, so no other group's and no other boot's.
    pub incarnation: Incarnation,
    /// Rises by one with every segment put to use, recycled or new; from 1.
    pub sequence: U64,
    /// Size of the segment in bytes.
    pub bytes: U64,
    /// The group's name, padded with zeroes.
    pub name: [u8; NAME_BYTES_MAX],
    /// CRC-32 of the bytes before.
    pub crc: U32,
    /// Zero.
    pub tail: [u8; 4],
}

/// See [`JournalSegmentHeader::magic`].
pub const JOURNAL_MAGIC: [u8; 8] = *b"VARVEJNL";
const _: () = assert!(size_of::<JournalSegmentHeader>() == 120);
const _: () = assert!(core::mem::offset_of!(JournalSegmentHeader, version) == 8);
const _: () = assert!(core::mem::offset_of!(JournalSegmentHeader, crc) == 112);
/// Sequence numbers stay below: one a microsecond lasts for nine years.
const SEQUENCE_MAX: u64 = 1 << 48;

impl JournalSegmentHeader {
    /// A header with its checksum. `group` has at most [`NAME_BYTES_MAX`] bytes (longer ones are cut: names are checked).
    pub fn new(group: &str, incarnation: Incarnation, sequence: u64, bytes: u64) -> Self {
        let mut name = [0; NAME_BYTES_MAX];
        let name_bytes = group.len().min(NAME_BYTES_MAX);
        name[..name_bytes].copy_from_slice(&group.as_bytes()[..name_bytes]);
        let mut header = Self {
            magic: JOURNAL_MAGIC,
            version: FORMAT_VERSION.into(),
            name_bytes: name_bytes as u8,
            reserved: [0; 5],
            incarnation,
            sequence: sequence.into(),
            bytes: bytes.into(),
            name,
            crc: 0.into(),
            tail: [0; 4],
        };
        header.crc = header.checksum().into();
        header
    }

    fn checksum(&self) -> u32 {
        crc32fast::hash(&self.as_bytes()[..core::mem::offset_of!(JournalSegmentHeader, crc)])
    }

    /// Reads the header from the start of a segment.
    pub fn decode(block: &[u8]) -> Result<Self, FormatError> {
        let damaged = FormatError::Damaged("segment of the journal");
        let (header, _) = Self::read_from_prefix(block).map_err(|_| damaged.clone())?;
        if header.magic != JOURNAL_MAGIC {
            return Err(damaged);
        }
        if header.version.get() != FORMAT_VERSION {
            return Err(FormatError::Version { what: "a segment of the journal", found: header.version.get() });
        }
        if header.crc.get() != header.checksum() || !(1..SEQUENCE_MAX).contains(&header.sequence.get()) {
            return Err(damaged);
        }
        Ok(header)
    }

    /// Whether it belongs to the group of this name.
    pub fn is_of(&self, group: &str) -> bool {
        self.name.get(..usize::from(self.name_bytes)) == Some(group.as_bytes())
    }
}

/// Before the records of every chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChunkHeader {
    /// [`CHUNK_MAGIC`].
    pub magic: U32,
    /// [`FLAG_FIRST`].
    pub flags: u8,
    /// The [`GapReason`] of the gap that was open at the source when this was written, else 0.
    pub gap_reason: u8,
    /// Zero.
    pub reserved: U16,
    /// Sequence number of the segment that the chunk was written to.
    pub segment: U64,
    /// Offset of this header in the segment.
    pub offset: U64,
    /// The ring whose bytes follow.
    pub incarnation: Incarnation,
    /// Of the first byte behind this header.
    pub position: U64,
    /// Where that gap began; it may be before or behind this chunk.
    pub gap_position: U64,
    /// Bytes of records; 0 in a chunk that only says that a gap began.
    pub bytes: U32,
    /// CRC-32 of them.
    pub crc: U32,
    /// `header_crc` of the chunk before this one in its run, 0 in the first.
    pub previous_crc: U32,
    /// CRC-32 of the header's bytes before.
    pub header_crc: U32,
}

/// See [`ChunkHeader::magic`].
pub const CHUNK_MAGIC: u32 = u32::from_le_bytes(*b"VRVJ");
/// The first chunk of a run: nothing before it belongs to the journal.
pub const FLAG_FIRST: u8 = 1;
/// Bytes of a [`ChunkHeader`].
pub const CHUNK_HEADER_BYTES: usize = size_of::<ChunkHeader>();
/// Most bytes of a chunk with its header and padding: whole blocks, and any record fits.
pub const CHUNK_TOTAL_BYTES_MAX: usize = (1 << 20) + BLOCK_BYTES;
/// Most bytes of records in a chunk.
pub const CHUNK_BYTES_MAX: usize = CHUNK_TOTAL_BYTES_MAX - CHUNK_HEADER_BYTES;
const _: () = assert!(CHUNK_HEADER_BYTES == 72);
const _: () = assert!(CHUNK_BYTES_MAX as u64 >= RECORD_BYTES_MAX && CHUNK_BYTES_MAX.is_multiple_of(8));

impl ChunkHeader {
    /// Sets the checksum and gives the bytes.
    pub fn encode(mut self) -> [u8; CHUNK_HEADER_BYTES] {
        self.header_crc = self.checksum().into();
        zerocopy::transmute!(self)
    }

    /// The CRC that [`ChunkHeader::encode`] puts into the header.
    pub fn checksum(&self) -> u32 {
        crc32fast::hash(&self.as_bytes()[..core::mem::offset_of!(ChunkHeader, header_crc)])
    }

    /// Reads a chunk's header; `None` if it is not a chunk that belongs at `offset` of segment `segment`.
    pub fn decode(bytes: &[u8], segment: u64, offset: u64) -> Option<Self> {
        let (header, _) = Self::read_from_prefix(bytes).ok()?;
        let here = header.segment.get() == segment && header.offset.get() == offset;
        (header.magic.get() == CHUNK_MAGIC && here && header.header_crc.get() == header.checksum()).then_some(header)
    }

    /// Bytes on disk, padding included.
    pub fn total_bytes(&self) -> usize {
        (CHUNK_HEADER_BYTES + self.bytes.get() as usize).next_multiple_of(BLOCK_BYTES)
    }

    /// Where the next chunk's records begin.
    pub fn end(&self) -> u64 {
        self.position.get().saturating_add(u64::from(self.bytes.get()))
    }

    /// The gap that was open when it was written.
    pub fn gap(&self) -> Option<(GapReason, u64)> {
        GapReason::from_number(self.gap_reason).map(|reason| (reason, self.gap_position.get()))
    }

    fn is_sane(&self) -> bool {
        let bytes = self.bytes.get() as usize;
        let gap = self.gap_reason == 0 || self.gap().is_some();
        let positions = self.position.get().is_multiple_of(8) && self.position.get() < 1 << 62;
        bytes <= CHUNK_BYTES_MAX && bytes.is_multiple_of(8) && gap && positions && self.flags & !FLAG_FIRST == 0
    }
}

/// Where the next chunk may stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Candidate {
    /// Right behind the one before.
    Adjacent,
    /// At the start of a later segment (or of the oldest).
    NextSegment,
}

/// What is found there. Each fact is only looked at if the ones before hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// A header that belongs exactly here, in this life of the segment, and to the segment's ring.
    pub header: bool,
    /// Its numbers are possible and it lies inside the segment.
    pub sane: bool,
    /// The records are as they were written.
    pub body: bool,
    /// It says that it begins a run.
    pub first: bool,
    /// It was written right after the chunk before; or there is none before, because what was there was recycled.
    pub chained: bool,
    /// It goes on where the one before ended, in the same ring.
    pub follows: bool,
    /// Its bytes are whole records.
    pub records: bool,
}

/// What is done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the next chunk.
    Take,
    /// It is the next chunk, and everything before it is none of the journal's any more.
    Restart,
    /// It is not here; the next segment is looked at, and after the last one the journal ends.
    Elsewhere,
    /// The journal ends here although more was written: captured bytes are lost.
    Damaged,
}

struct Case {
    letter: char,
    why: &'static str,
    candidate: Option<Candidate>,
    /// In the order of [`Facts`].
    facts: [Option<bool>; 7],
    verdict: Verdict,
}

const YES: Option<bool> = Some(true);
const NO: Option<bool> = Some(false);
const ANY: Option<bool> = None;

/// Every combination has exactly one row (there is a test).
///
/// A batch of chunks is written while nothing else is under way and lies in one segment, so a crash tears only the last
/// batch, and the ring still holds what was in it. A tear looks like A, B or C. What is written after a recovery goes
/// into another segment: behind a tear may stand chunks of the torn batch, and were the torn ones to come again to the
/// same place, the chain would run into them. As it is, none of them is ever reached. The header of a torn one is wiped
/// before anything else is written: whoever believes headers ([`peek`]) must not meet it.
const CASES: [Case; 10] = [
    Case {
        letter: 'A',
        why: "nothing was written here in this life of the segment",
        candidate: None,
        facts: [NO, ANY, ANY, ANY, ANY, ANY, ANY],
        verdict: Verdict::Elsewhere,
    },
    Case {
        letter: 'B',
        why: "a header that cannot be ours",
        candidate: None,
        facts: [YES, NO, ANY, ANY, ANY, ANY, ANY],
        verdict: Verdict::Elsewhere,
    },
    Case {
        letter: 'C',
        why: "the records were torn",
        candidate: None,
        facts: [YES, YES, NO, ANY, ANY, ANY, ANY],
        verdict: Verdict::Elsewhere,
    },
    Case {
        letter: 'D',
        why: "a run begins, so everything before was acknowledged",
        candidate: Some(Candidate::NextSegment),
        facts: [YES, YES, YES, YES, ANY, ANY, YES],
        verdict: Verdict::Restart,
    },
    Case {
        letter: 'E',
        why: "a run begins where no run can begin",
        candidate: Some(Candidate::Adjacent),
        facts: [YES, YES, YES, YES, ANY, ANY, YES],
        verdict: Verdict::Damaged,
    },
    Case {
        letter: 'F',
        why: "remains of a batch that was torn",
        candidate: Some(Candidate::Adjacent),
        facts: [YES, YES, YES, NO, NO, ANY, ANY],
        verdict: Verdict::Elsewhere,
    },
    Case {
        letter: 'G',
        why: "a later segment goes on after a chunk that is not here any more",
        candidate: Some(Candidate::NextSegment),
        facts: [YES, YES, YES, NO, NO, ANY, ANY],
        verdict: Verdict::Damaged,
    },
    Case {
        letter: 'H',
        why: "whole and in its place, but not a continuation of the stream",
        candidate: None,
        facts: [YES, YES, YES, NO, YES, NO, ANY],
        verdict: Verdict::Damaged,
    },
    Case {
        letter: 'I',
        why: "whole and in its place, but not records",
        candidate: None,
        facts: [YES, YES, YES, NO, YES, YES, NO],
        verdict: Verdict::Damaged,
    },
    Case {
        letter: 'J',
        why: "the next chunk",
        candidate: None,
        facts: [YES, YES, YES, NO, YES, YES, YES],
        verdict: Verdict::Take,
    },
];

/// A run that begins with what are no records: an own row, since D and E ask for records.
const NO_RUN: Case = Case {
    letter: 'K',
    why: "a run begins with what are not records",
    candidate: None,
    facts: [YES, YES, YES, YES, ANY, ANY, NO],
    verdict: Verdict::Damaged,
};

/// The row for these facts: its letter, its words, what is done.
pub fn decide(candidate: Candidate, facts: Facts) -> (char, &'static str, Verdict) {
    match CASES.iter().chain([&NO_RUN]).find(|case| case.fits(candidate, facts)) {
        Some(case) => (case.letter, case.why, case.verdict),
        // The table is complete (tested); if it were not, ending the journal would be the safe side.
        None => ('?', "no case", Verdict::Damaged),
    }
}

impl Case {
    fn fits(&self, candidate: Candidate, facts: Facts) -> bool {
        let have = [facts.header, facts.sane, facts.body, facts.first, facts.chained, facts.follows, facts.records];
        self.candidate.is_none_or(|wanted| wanted == candidate)
            && self.facts.iter().zip(have).all(|(wanted, have)| wanted.is_none_or(|wanted| wanted == have))
    }
}

/// Where a journal stands after a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// `header_crc` of the chunk.
    pub chain: u32,
    /// Position behind it.
    pub position: u64,
    /// Its ring.
    pub incarnation: Incarnation,
}

/// What [`look`] found in a chunk that is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its header.
    pub header: ChunkHeader,
    /// Time of its first record that changes data.
    pub first_write_ns: Option<u64>,
}

/// Looks for a chunk at the start of `bytes`, which begin at `offset` of the segment with this header and reach to the
/// segment's end or for [`CHUNK_TOTAL_BYTES_MAX`]. `before`: the chunk before; `None` if there is none in the journal.
pub fn look(segment: &JournalSegmentHeader, offset: u64, bytes: &[u8], before: Option<End>) -> (Facts, Option<Found>) {
    let (mut facts, header) = head(segment, offset, bytes, bytes.len() as u64, before);
    let Some(header) = header else { return (facts, None) };
    let body = &bytes[CHUNK_HEADER_BYTES..][..header.bytes.get() as usize];
    facts.body = crc32fast::hash(body) == header.crc.get();
    if !facts.body {
        return (facts, None);
    }
    match first_write(header.position.get(), body) {
        Ok(first_write_ns) => {
            facts.records = true;
            (facts, Some(Found { header, first_write_ns }))
        }
        Err(_) => (facts, None),
    }
}

/// The same for a chunk that is known to have been synced: its records are believed (they are checked when they are
/// read), so its first block is enough. `left`: bytes to the segment's end. The time is that of the first record,
/// whatever it says.
pub fn peek(
    segment: &JournalSegmentHeader,
    offset: u64,
    block: &[u8],
    left: u64,
    before: Option<End>,
) -> (Facts, Option<Found>) {
    let (mut facts, header) = head(segment, offset, block, left, before);
    let Some(header) = header else { return (facts, None) };
    (facts.body, facts.records) = (true, true);
    let record = block.get(CHUNK_HEADER_BYTES + RING_HEADER_BYTES as usize..).unwrap_or_default();
    let record = RecordHeader::read_from_prefix(record).ok().filter(|_| header.bytes.get() > 0);
    (facts, Some(Found { header, first_write_ns: record.map(|(record, _)| record.time_ns.get()) }))
}

/// What a chunk's header alone says.
fn head(
    segment: &JournalSegmentHeader,
    offset: u64,
    bytes: &[u8],
    left: u64,
    before: Option<End>,
) -> (Facts, Option<ChunkHeader>) {
    let mut facts = Facts::default();
    let Some(header) = ChunkHeader::decode(bytes, segment.sequence.get(), offset) else { return (facts, None) };
    facts.header = header.incarnation == segment.incarnation;
    facts.sane = header.is_sane() && header.total_bytes() as u64 <= left;
    if !facts.header || !facts.sane {
        return (facts, None);
    }
    facts.first = header.flags & FLAG_FIRST != 0;
    facts.chained = before.is_none_or(|before| before.chain == header.previous_crc.get());
    facts.follows = before
        .is_none_or(|before| before.position == header.position.get() && before.incarnation == header.incarnation);
    (facts, Some(header))
}

/// The time of the first record that changes data, if `bytes` are whole records.
pub fn first_write(position: u64, bytes: &[u8]) -> Result<Option<u64>, RecordError> {
    let mut first = None;
    for record in Records::new(position, bytes) {
        let record = record?;
        if record.kind.changes_data() {
            first.get_or_insert(record.header.time_ns.get());
        }
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_table_is_complete_and_without_overlap() {
        for candidate in [Candidate::Adjacent, Candidate::NextSegment] {
            for bits in 0..128u8 {
                let bit = |n: u8| bits & (1 << n) != 0;
                let facts = Facts {
                    header: bit(0),
                    sane: bit(1),
                    body: bit(2),
                    first: bit(3),
                    chained: bit(4),
                    follows: bit(5),
                    records: bit(6),
                };
                let rows = CASES.iter().chain([&NO_RUN]).filter(|case| case.fits(candidate, facts)).count();
                assert_eq!(rows, 1, "{candidate:?} {facts:?}");
                let (letter, _, verdict) = decide(candidate, facts);
                let whole = facts.header && facts.sane && facts.body;
                let taken = whole && facts.records && !facts.first && facts.chained && facts.follows;
                assert_eq!(verdict == Verdict::Take, taken, "{letter} {candidate:?} {facts:?}");
                let begun = whole && facts.records && facts.first && candidate == Candidate::NextSegment;
                assert_eq!(verdict == Verdict::Restart, begun, "{letter} {candidate:?} {facts:?}");
                assert!(whole || verdict == Verdict::Elsewhere, "a tear is no damage: {letter} {facts:?}");
            }
        }
    }

    #[test]
    fn letters_are_unique() {
        let letters: String = CASES.iter().chain([&NO_RUN]).map(|case| case.letter).collect();
        assert_eq!(letters, "ABCDEFGHIJK");
    }

    fn chunk() -> ChunkHeader {
        ChunkHeader {
            magic: CHUNK_MAGIC.into(),
            flags: FLAG_FIRST,
            gap_reason: GapReason::RingFull as u8,
            reserved: 0.into(),
            segment: 3.into(),
            offset: 4096.into(),
            incarnation: [7; 16],
            position: 800.into(),
            gap_position: 900.into(),
            bytes: 40.into(),
            crc: 0.into(),
            previous_crc: 5.into(),
            header_crc: 0.into(),
        }
    }

    /// Frozen: every later version must read these.
    #[test]
    fn golden_bytes() {
        let segment = JournalSegmentHeader::new("db", [7; 16], 3, 8 << 20);
        let mut golden = b"VARVEJNL\x01\x00\x02\x00\x00\x00\x00\x00".to_vec();
        golden.extend([7; 16]);
        golden.extend([3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, b'd', b'b']);
        assert_eq!(segment.as_bytes()[..golden.len()], golden);
        assert_eq!(JournalSegmentHeader::decode(segment.as_bytes()), Ok(segment));
        assert!(segment.is_of("db") && !segment.is_of("d") && !segment.is_of("db\0"));
        let mut golden =
            b"VRVJ\x01\x03\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00".to_vec();
        golden.extend([7; 16]);
        golden.extend([0x20, 3, 0, 0, 0, 0, 0, 0, 0x84, 3, 0, 0, 0, 0, 0, 0, 40, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0]);
        let bytes = chunk().encode();
        assert_eq!(bytes[..68], golden);
        let read = ChunkHeader::decode(&bytes, 3, 4096).expect("own encoding");
        assert_eq!((read.end(), read.gap(), read.total_bytes()), (840, Some((GapReason::RingFull, 900)), 4096));
        assert!(ChunkHeader::decode(&bytes, 4, 4096).is_none(), "of another life");
        assert!(ChunkHeader::decode(&bytes, 3, 8192).is_none(), "moved");
    }

    proptest! {
        #[test]
        fn any_damage_to_a_header_is_seen(bit in 0usize..CHUNK_HEADER_BYTES * 8) {
            let mut bytes = chunk().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(ChunkHeader::decode(&bytes, 3, 4096).is_none());
        }

        #[test]
        fn looking_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..400), flags in 0u8..4, length in 0u32..300) {
            let segment = JournalSegmentHeader::new("db", [7; 16], 3, 8 << 20);
            let _ = JournalSegmentHeader::decode(&bytes);
            let _ = look(&segment, 4096, &bytes, None);
            let _ = peek(&segment, 4096, &bytes, 1 << 20, None);
            let mut header = chunk();
            (header.flags, header.bytes, header.crc) = (flags, length.into(), crc32fast::hash(&bytes).into());
            let mut all = header.encode().to_vec();
            all.extend(&bytes);
            let _ = look(&segment, 4096, &all, Some(End { chain: 5, position: 800, incarnation: [7; 16] }));
            let _ = peek(&segment, 4096, &all, 1 << 20, None);
        }
    }
}
