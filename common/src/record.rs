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
pub const RECORD_BYTES_MAX: u64 =
    RING_HEADER_BYTES + size_of::<RecordHeader>() as u64 + PAYLOAD_BYTES_MAX as u64;

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
