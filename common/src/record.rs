//! The record: what the capture programs put into the ring, and so what travels, lands and is applied.
//!
//! A group's stream *is* the ring's byte stream: every record starts with the kernel's own 8-byte ring header,
//! followed by [`RecordHeader`], followed by the payload, padded to 8 bytes. Nothing re-encodes it on its way, so a
//! position (the byte offset in the ring since it was made) means the same in the kernel, in a frame, in the landing
//! log and in a layer.
//!
//! `bpf/src/bpf/record.h` is the C side of this layout; both sides assert sizes and offsets.

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of the kernel's header before every record (`BPF_RINGBUF_HDR_SZ`).
pub const RING_HEADER_BYTES: u64 = 8;
/// Set in the ring header's length while the producer is still writing the record.
pub const RING_BUSY_BIT: u32 = 1 << 31;
/// Set in the ring header's length when the producer gave the record up: the bytes stand for nothing.
pub const RING_DISCARD_BIT: u32 = 1 << 30;
/// Largest payload of one record. A longer bio becomes several records: a write is not atomic beyond a sector anyway.
pub const PAYLOAD_BYTES_MAX: u32 = 1 << 20;
/// Largest record with its header and ring header, padded: the least that any buffer of records must hold.
pub const RECORD_BYTES_MAX: u64 = RING_HEADER_BYTES + size_of::<RecordHeader>() as u64 + PAYLOAD_BYTES_MAX as u64;

/// What a record says. The numbers are the format; they are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RecordKind {
    /// `length` bytes of payload were written at `offset`.
    Write = 1,
    /// `length` bytes at `offset` read as zero from here on.
    WriteZeroes = 2,
    /// `length` bytes at `offset` were discarded (or securely erased): their content is undefined to the writer and
    /// zero for us, on both sides of every comparison only where the device says that it reads zeroes.
    Discard = 3,
    /// The writer asked for a cache flush (an empty flush; [`FLAG_PREFLUSH`] on a write is the other form).
    Flush = 4,
    /// A named point; the payload is the name in UTF-8 (at most [`BOOKMARK_BYTES_MAX`]).
    Bookmark = 5,
    /// Nothing but its time: shows that the stream lives when nobody writes.
    Canary = 6,
    /// The volume has `length` bytes from here on.
    Resize = 7,
}

/// Longest bookmark name in bytes.
pub const BOOKMARK_BYTES_MAX: usize = 255;

/// The write was sent with `REQ_FUA`.
pub const FLAG_FUA: u8 = 1;
/// The write was sent with `REQ_PREFLUSH`.
pub const FLAG_PREFLUSH: u8 = 2;
/// The record is not the last of its bio (a bio longer than [`PAYLOAD_BYTES_MAX`]).
pub const FLAG_MORE: u8 = 4;

/// The fixed part of a record, after the ring header. 32 bytes, little endian, no padding.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RecordHeader {
    /// A [`RecordKind`].
    pub kind: u8,
    /// `FLAG_*`.
    pub flags: u8,
    /// The volume's number in its group.
    pub volume: U16,
    /// Bytes of payload that follow this header (0 for every kind but `Write` and `Bookmark`).
    pub payload: U32,
    /// Wall-clock time at the source, nanoseconds since 1970 (boot-time clock plus the group's offset, which the
    /// agent only ever moves so that time does not go back).
    pub time_ns: U64,
    /// First byte in the volume (not in the disk).
    pub offset: U64,
    /// Bytes of the extent in the volume. For `Write` it equals `payload`.
    pub length: U64,
}

const _: () = assert!(size_of::<RecordHeader>() == 32);
const _: () = assert!(core::mem::offset_of!(RecordHeader, volume) == 2);
const _: () = assert!(core::mem::offset_of!(RecordHeader, payload) == 4);
const _: () = assert!(core::mem::offset_of!(RecordHeader, time_ns) == 8);
const _: () = assert!(core::mem::offset_of!(RecordHeader, offset) == 16);
const _: () = assert!(core::mem::offset_of!(RecordHeader, length) == 24);

/// A record with its payload, as it stands in the stream.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// Where the record begins in the stream.
    pub position: u64,
    /// Where the next one begins: the point "after this record".
    pub end: u64,
    /// What it says.
    pub kind: RecordKind,
    /// The fixed part.
    pub header: RecordHeader,
    /// The bytes written (`Write`) or the name (`Bookmark`); empty for all others.
    pub payload: &'a [u8],
}

/// Why bytes are not a stream of records. The sender is broken or hostile, or the bytes are damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RecordError {
    /// The bytes end inside a record.
    #[error("the stream ends inside the record at position {position}")]
    Truncated {
        /// Start of the record.
        position: u64,
    },
    /// A record that the producer had not finished was sent.
    #[error("the record at position {position} was cut before it was complete")]
    Busy {
        /// Start of the record.
        position: u64,
    },
    /// A kind that this version does not know.
    #[error("unknown record kind {kind} at position {position}")]
    Kind {
        /// Start of the record.
        position: u64,
        /// The number found.
        kind: u8,
    },
    /// Lengths that contradict each other or a limit.
    #[error("impossible lengths in the record at position {position}")]
    Length {
        /// Start of the record.
        position: u64,
    },
    /// The stream does not start on a record boundary.
    #[error("position {position} is not a multiple of 8")]
    Alignment {
        /// The position.
        position: u64,
    },
}

impl RecordKind {
    /// The kind with this number, if this version knows it.
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Write,
            2 => Self::WriteZeroes,
            3 => Self::Discard,
            4 => Self::Flush,
            5 => Self::Bookmark,
            6 => Self::Canary,
            7 => Self::Resize,
            _ => return None,
        })
    }

    /// Whether the record changes bytes of a volume.
    pub fn changes_data(self) -> bool {
        matches!(self, Self::Write | Self::WriteZeroes | Self::Discard)
    }
}

/// Padded size in the stream of a record whose ring header holds `length_word`, ring header included.
pub fn entry_bytes(length_word: u32) -> u64 {
    let length = length_word & !(RING_BUSY_BIT | RING_DISCARD_BIT);
    (RING_HEADER_BYTES + u64::from(length)).next_multiple_of(8)
}

/// Time of the record that begins here, its ring header included. `None`: it was given up, or is not whole.
pub fn entry_time_ns(entry: &[u8]) -> Option<u64> {
    let (word, rest) = U32::read_from_prefix(entry).ok()?;
    if word.get() & (RING_BUSY_BIT | RING_DISCARD_BIT) != 0 {
        return None;
    }
    let (header, _) = RecordHeader::ref_from_prefix(rest.get(RING_HEADER_BYTES as usize - size_of::<U32>()..)?).ok()?;
    Some(header.time_ns.get())
}

/// Walks the records of a slice of the stream. Records that were given up (`RING_DISCARD_BIT`) are passed over.
/// Never panics, whatever the bytes; ends at the first error.
pub struct Records<'a> {
    bytes: &'a [u8],
    position: u64,
}

impl<'a> Records<'a> {
    /// `bytes` start at `position`, which is a record boundary.
    pub fn new(position: u64, bytes: &'a [u8]) -> Self {
        Self { bytes, position }
    }

    fn step(&mut self) -> Result<Option<Record<'a>>, RecordError> {
        let position = self.position;
        if !position.is_multiple_of(8) {
            return Err(RecordError::Alignment { position });
        }
        let Some(word) = self.bytes.get(..4) else {
            return Err(RecordError::Truncated { position });
        };
        let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        if word & RING_BUSY_BIT != 0 {
            return Err(RecordError::Busy { position });
        }
        let total = entry_bytes(word);
        if total > RECORD_BYTES_MAX {
            return Err(RecordError::Length { position });
        }
        let Some(entry) = self.bytes.get(..total as usize) else {
            return Err(RecordError::Truncated { position });
        };
        let Some(end) = position.checked_add(total) else {
            return Err(RecordError::Length { position });
        };
        self.bytes = &self.bytes[total as usize..];
        self.position = end;
        if word & RING_DISCARD_BIT != 0 {
            return Ok(None);
        }
        let body = &entry[RING_HEADER_BYTES as usize..(RING_HEADER_BYTES as usize + word as usize)];
        let (header, payload) = RecordHeader::read_from_prefix(body).map_err(|_| RecordError::Length { position })?;
        check(position, end, header, payload).map(Some)
    }
}

/// The checks that a record must pass beyond its framing.
fn check(position: u64, end: u64, header: RecordHeader, payload: &[u8]) -> Result<Record<'_>, RecordError> {
    let Some(kind) = RecordKind::from_number(header.kind) else {
        return Err(RecordError::Kind { position, kind: header.kind });
    };
    let claimed = header.payload.get() as usize;
    let fits = header.offset.get().checked_add(header.length.get()).is_some();
    let lengths_agree = match kind {
        RecordKind::Write => {
            claimed > 0 && claimed <= PAYLOAD_BYTES_MAX as usize && header.length.get() == claimed as u64
        }
        RecordKind::Bookmark => claimed > 0 && claimed <= BOOKMARK_BYTES_MAX,
        _ => claimed == 0,
    };
    if !fits || !lengths_agree || payload.len() < claimed {
        return Err(RecordError::Length { position });
    }
    Ok(Record { position, end, kind, header, payload: &payload[..claimed] })
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.bytes.is_empty() {
            match self.step() {
                Ok(None) => {}
                Ok(Some(record)) => return Some(Ok(record)),
                Err(error) => {
                    self.bytes = &[];
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

/// Appends a record as the kernel would write it. For tests, benches and the receiver's own tools: the product's
/// records come from the ring.
pub fn append_record(out: &mut Vec<u8>, header: RecordHeader, payload: &[u8]) {
    let length = size_of::<RecordHeader>() + payload.len();
    out.extend_from_slice(&(length as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(payload);
    out.resize(out.len().next_multiple_of(8), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(volume: u16, offset: u64, payload: &[u8]) -> RecordHeader {
        RecordHeader {
            kind: RecordKind::Write as u8,
            flags: 0,
            volume: volume.into(),
            payload: (payload.len() as u32).into(),
            time_ns: 1_700_000_000_000_000_000.into(),
            offset: offset.into(),
            length: (payload.len() as u64).into(),
        }
    }

    /// The bytes of a record are a contract with the kernel side and with every stored landing log and layer.
    #[test]
    fn golden_bytes() {
        let mut out = Vec::new();
        append_record(&mut out, write(2, 0x1122_3344_5566, b"abc"), b"abc");
        let golden: [u8; 48] = [
            35, 0, 0, 0, 0, 0, 0, 0, // ring header: length 32 + 3, page offset
            1, 0, 2, 0, 3, 0, 0, 0, // kind, flags, volume, payload
            0x00, 0x00, 0x2a, 0x36, 0xfe, 0x9c, 0x97, 0x17, // time
            0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0, 0, // offset
            3, 0, 0, 0, 0, 0, 0, 0, // length
            b'a', b'b', b'c', 0, 0, 0, 0, 0, // payload, padding
        ];
        assert_eq!(out, golden);
        assert_eq!(entry_time_ns(&out), Some(1_700_000_000_000_000_000));
        assert_eq!(entry_time_ns(&out[..39]), None, "not whole");
        out[3] = (RING_DISCARD_BIT >> 24) as u8;
        assert_eq!(entry_time_ns(&out), None, "given up");
    }

    proptest! {
        #[test]
        fn round_trip(writes in prop::collection::vec((0u16..4, 0u64..1 << 40, prop::collection::vec(any::<u8>(), 1..2000)), 0..20)) {
            let mut stream = Vec::new();
            for (volume, offset, payload) in &writes {
                append_record(&mut stream, write(*volume, *offset, payload), payload);
            }
            let records: Result<Vec<_>, _> = Records::new(4096, &stream).collect();
            let records = records.expect("well-formed");
            prop_assert_eq!(records.len(), writes.len());
            let mut expected = 4096;
            for (record, (volume, offset, payload)) in records.iter().zip(&writes) {
                prop_assert_eq!(record.position, expected);
                prop_assert_eq!(record.header.volume.get(), *volume);
                prop_assert_eq!(record.header.offset.get(), *offset);
                prop_assert_eq!(record.payload, &payload[..]);
                expected = record.end;
            }
            prop_assert_eq!(expected, 4096 + stream.len() as u64);
        }

        /// Any bytes, and any damage to good bytes: an error or records, never a panic, and never beyond the input.
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), position in any::<u64>()) {
            let time_ns = entry_time_ns(&bytes);
            for (index, record) in Records::new(position & !7, &bytes).enumerate() {
                let Ok(record) = record else { continue };
                prop_assert!(record.payload.len() <= bytes.len());
                prop_assert!(index > 0 || time_ns.is_none_or(|time_ns| time_ns == record.header.time_ns.get()));
            }
        }
    }

    #[test]
    fn lies_are_refused() {
        let mut header = write(0, 0, b"abcd");
        header.payload = 400.into();
        header.length = 400.into();
        let mut stream = Vec::new();
        append_record(&mut stream, header, b"abcd");
        let first = Records::new(0, &stream).next();
        assert!(matches!(first, Some(Err(RecordError::Length { position: 0 }))), "{first:?}");

        let mut header = write(0, u64::MAX - 1, b"abcd");
        let mut stream = Vec::new();
        append_record(&mut stream, header, b"abcd");
        assert!(matches!(Records::new(0, &stream).next(), Some(Err(RecordError::Length { .. }))));
        header.kind = 99;
        let mut stream = Vec::new();
        append_record(&mut stream, header, b"abcd");
        assert!(matches!(Records::new(0, &stream).next(), Some(Err(RecordError::Kind { kind: 99, .. }))));
    }
}
