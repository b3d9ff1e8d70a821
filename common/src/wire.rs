//! Every byte between agent and receiver. Sans-I/O: these types encode and decode, nothing here reads a socket.
//!
//! One QUIC connection per host; on it one bidirectional stream per group, opened by the agent. On a stream:
//!
//! ```text
//! agent → receiver   Preamble · Hello · ( Data | Mark | Probe | Image | Report | AskReply )*
//! receiver → agent   Preamble · Welcome or Refused · ( Ack | ProbeReply | ImageDone | Ask | Refused )*
//! ```
//!
//! A group that comes home (see [`messages::RefusedReason::Failback`]) has a stream of another kind, in which probes and images
//! go the other way:
//!
//! ```text
//! agent → receiver   Preamble · FailbackHello · ( FailbackSay | ProbeReply | ImageDone )*
//! receiver → agent   Preamble · FailbackWelcome or Refused · ( FailbackTell | Probe | Image | Refused )*
//! ```
//!
//! Every message after the preamble is a [`FrameHeader`] and a body. Data and image bodies have the fixed layouts
//! below; all other bodies are bincode of the structs in [`messages`], limited to
//! [`CONTROL_BYTES_MAX`](crate::limits::CONTROL_BYTES_MAX).
//!
//! Positions: a `Data` frame's position is that of its first byte and must equal the end of the one before (or the
//! position that `Begin` named). `Mark`, `Probe` and `Image` carry the position at which they take effect, which must
//! equal the end of the data sent so far. Anything else is a hole: the receiver refuses the session and names it.

pub mod digest;
pub mod messages;

use crate::limits::{CONTROL_BYTES_MAX, FRAME_PLAIN_BYTES_MAX, IMAGE_EXTENTS_MAX, REGION_BYTES};
use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The protocol's versions. Each adds a line here that says what changed.
///
/// - 1: the first.
pub const VERSION_MAX: u16 = 1;
/// The oldest version that this build speaks.
pub const VERSION_MIN: u16 = 1;

/// First bytes of every stream, in both directions. Its layout never changes: it must be readable by every version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Preamble {
    /// [`PREAMBLE_MAGIC`].
    pub magic: [u8; 8],
    /// Agent: oldest version it speaks. Receiver: the version chosen, 0 if there is none in common.
    pub low: U16,
    /// Newest version that the sender speaks.
    pub high: U16,
    /// Zero.
    pub reserved: U32,
}

/// Not text, survives no newline translation.
pub const PREAMBLE_MAGIC: [u8; 8] = *b"VARVE\r\n\x1a";
const _: () = assert!(size_of::<Preamble>() == 16);

impl Preamble {
    /// What an agent sends.
    pub fn offer() -> Self {
        Self { magic: PREAMBLE_MAGIC, low: VERSION_MIN.into(), high: VERSION_MAX.into(), reserved: 0.into() }
    }

    /// What a receiver answers to `offer`, and the version that both then speak.
    pub fn answer(offer: &Preamble) -> Result<(Self, Option<u16>), WireError> {
        if offer.magic != PREAMBLE_MAGIC || offer.low.get() > offer.high.get() {
            return Err(WireError::Preamble);
        }
        let best = VERSION_MAX.min(offer.high.get());
        let common = (best >= VERSION_MIN.max(offer.low.get())).then_some(best);
        let answer = Self {
            magic: PREAMBLE_MAGIC,
            low: common.unwrap_or(0).into(),
            high: VERSION_MAX.into(),
            reserved: 0.into(),
        };
        Ok((answer, common))
    }

    /// What the agent reads out of the receiver's answer.
    pub fn accepted(&self) -> Result<u16, WireError> {
        if self.magic != PREAMBLE_MAGIC {
            return Err(WireError::Preamble);
        }
        match self.low.get() {
            chosen @ VERSION_MIN..=VERSION_MAX => Ok(chosen),
            _ => Err(WireError::Version { peer_newest: self.high.get() }),
        }
    }
}

/// What a frame is. The numbers are the protocol; they are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// Agent's first: [`messages::Hello`].
    Hello = 1,
    /// A contiguous slice of the ring, cut at record boundaries.
    Data = 2,
    /// A change of the stream's state at a position: [`crate::format::MarkBody`] (fixed layout: it is kept on disk).
    Mark = 3,
    /// Digests of a region, to be compared: [`messages::Probe`].
    Probe = 4,
    /// Content of a region: [`ImageHeader`], extents, bytes.
    Image = 5,
    /// What the agent knows of itself, at least every second: [`messages::Report`].
    Report = 6,
    /// Agent's first on the stream of a group that comes home: [`messages::FailbackHello`].
    FailbackHello = 7,
    /// Agent: a step of coming home is done, or cannot be: [`messages::FailbackSay`].
    FailbackSay = 8,
    /// Agent: what became of an ask: [`messages::AskReply`].
    AskReply = 9,
    /// Receiver's first, if it agrees: [`messages::Welcome`].
    Welcome = 64,
    /// Receiver ends the session: [`messages::Refused`].
    Refused = 65,
    /// Receiver: everything before `position` is durable: [`messages::Ack`].
    Ack = 66,
    /// Receiver: what differs: [`messages::ProbeReply`].
    ProbeReply = 67,
    /// Receiver: an image is durable in the replica: [`messages::ImageDone`].
    ImageDone = 68,
    /// Receiver: a command of its operator: [`messages::Ask`].
    Ask = 69,
    /// Receiver's first, if it agrees to a [`FrameKind::FailbackHello`]: [`messages::FailbackWelcome`].
    FailbackWelcome = 70,
    /// Receiver: the next step of coming home: [`messages::FailbackTell`].
    FailbackTell = 71,
}

impl FrameKind {
    /// The kind with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Hello,
            2 => Self::Data,
            3 => Self::Mark,
            4 => Self::Probe,
            5 => Self::Image,
            6 => Self::Report,
            7 => Self::FailbackHello,
            8 => Self::FailbackSay,
            9 => Self::AskReply,
            64 => Self::Welcome,
            65 => Self::Refused,
            66 => Self::Ack,
            67 => Self::ProbeReply,
            68 => Self::ImageDone,
            69 => Self::Ask,
            70 => Self::FailbackWelcome,
            71 => Self::FailbackTell,
            _ => return None,
        })
    }

    /// Most plain bytes that a body of this kind may have.
    pub fn body_bytes_max(self) -> usize {
        match self {
            Self::Data => FRAME_PLAIN_BYTES_MAX,
            Self::Image => IMAGE_BODY_BYTES_MAX,
            _ => CONTROL_BYTES_MAX,
        }
    }
}

/// How a body is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Plain = 0,
    /// LZ4 block, without a length prefix (the header has it).
    Lz4 = 1,
}

/// Before every body. 32 bytes, little endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct FrameHeader {
    /// [`FRAME_MAGIC`].
    pub magic: U32,
    /// A [`FrameKind`].
    pub kind: u8,
    /// A [`Codec`].
    pub codec: u8,
    /// Zero.
    pub reserved: U16,
    /// Bytes of body that follow.
    pub body_bytes: U32,
    /// Bytes of body once decoded.
    pub plain_bytes: U32,
    /// See the module's text.
    pub position: U64,
    /// CRC-32 (IEEE) of the plain body.
    pub plain_crc: U32,
    /// CRC-32 of the header's bytes before this field.
    pub header_crc: U32,
}

/// "VRVF" in the order of the bytes.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"VRVF");
/// Bytes of a [`FrameHeader`].
pub const FRAME_HEADER_BYTES: usize = size_of::<FrameHeader>();
const _: () = assert!(FRAME_HEADER_BYTES == 32);
const _: () = assert!(core::mem::offset_of!(FrameHeader, header_crc) == 28);

/// Why bytes from a peer are not understood. The session ends; nothing else does.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    /// Not our protocol at all.
    #[error("the peer does not speak Varve's protocol")]
    Preamble,
    /// No version in common.
    #[error("no protocol version in common (ours {VERSION_MIN} to {VERSION_MAX}, the peer's newest is {peer_newest})")]
    Version {
        /// The newest that the peer speaks.
        peer_newest: u16,
    },
    /// A header that is damaged.
    #[error("damaged frame header")]
    Header,
    /// A kind or codec that this version does not know.
    #[error("unknown frame kind {kind} or codec {codec}")]
    Kind {
        /// Number of the kind.
        kind: u8,
        /// Number of the codec.
        codec: u8,
    },
    /// A length beyond the limit of its kind.
    #[error("a {kind:?} frame of {bytes} bytes, the limit is {limit}")]
    Oversized {
        /// The frame's kind.
        kind: FrameKind,
        /// The length claimed.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The body does not decompress to what the header says, or its CRC is wrong.
    #[error("damaged body of a {kind:?} frame at position {position}")]
    Body {
        /// The frame's kind.
        kind: FrameKind,
        /// The frame's position.
        position: u64,
    },
    /// A body that is whole but does not decode.
    #[error("a {kind:?} frame that does not decode: {why}")]
    Decode {
        /// The frame's kind.
        kind: FrameKind,
        /// What is wrong with it.
        why: String,
    },
}

/// A header that passed every check that needs no body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: FrameKind,
    /// How the body is encoded.
    pub codec: Codec,
    /// Bytes of body that follow.
    pub body_bytes: usize,
    /// Bytes once decoded.
    pub plain_bytes: usize,
    /// See the module's text.
    pub position: u64,
    /// CRC-32 of the plain body.
    pub plain_crc: u32,
}

impl Frame {
    /// A frame around `plain`, not compressed.
    pub fn plain(kind: FrameKind, position: u64, plain: &[u8]) -> Self {
        Self {
            kind,
            codec: Codec::Plain,
            body_bytes: plain.len(),
            plain_bytes: plain.len(),
            position,
            plain_crc: crc32fast::hash(plain),
        }
    }

    /// A frame around the parts of a body that is not in one piece, not compressed.
    pub fn of_parts<'a>(kind: FrameKind, position: u64, parts: impl Iterator<Item = &'a [u8]>) -> Self {
        let (mut crc, mut bytes) = (crc32fast::Hasher::new(), 0);
        for part in parts {
            crc.update(part);
            bytes += part.len();
        }
        let plain_crc = crc.finalize();
        Self { kind, codec: Codec::Plain, body_bytes: bytes, plain_bytes: bytes, position, plain_crc }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let mut header = FrameHeader {
            magic: FRAME_MAGIC.into(),
            kind: self.kind as u8,
            codec: self.codec as u8,
            reserved: 0.into(),
            body_bytes: (self.body_bytes as u32).into(),
            plain_bytes: (self.plain_bytes as u32).into(),
            position: self.position.into(),
            plain_crc: self.plain_crc.into(),
            header_crc: 0.into(),
        };
        let crc = crc32fast::hash(&header.as_bytes()[..FRAME_HEADER_BYTES - 4]);
        header.header_crc = crc.into();
        zerocopy::transmute!(header)
    }

    /// Reads a header and checks everything that can be checked before a byte of the body is allocated.
    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<Self, WireError> {
        let header: FrameHeader = zerocopy::transmute!(*bytes);
        let crc = crc32fast::hash(&bytes[..FRAME_HEADER_BYTES - 4]);
        if header.magic.get() != FRAME_MAGIC || header.header_crc.get() != crc || header.reserved.get() != 0 {
            return Err(WireError::Header);
        }
        let unknown = WireError::Kind { kind: header.kind, codec: header.codec };
        let Some(kind) = FrameKind::from_number(header.kind) else {
            return Err(unknown);
        };
        let codec = match header.codec {
            0 => Codec::Plain,
            1 => Codec::Lz4,
            _ => return Err(unknown),
        };
        let (body, plain) = (header.body_bytes.get() as usize, header.plain_bytes.get() as usize);
        let limit = kind.body_bytes_max();
        if body > limit || plain > limit {
            return Err(WireError::Oversized { kind, bytes: body.max(plain), limit });
        }
        if codec == Codec::Plain && body != plain {
            return Err(WireError::Header);
        }
        Ok(Self {
            kind,
            codec,
            body_bytes: body,
            plain_bytes: plain,
            position: header.position.get(),
            plain_crc: header.plain_crc.get(),
        })
    }

    /// The plain body: `body` itself or decompressed into `scratch`. Checks the CRC.
    pub fn open<'a>(&self, body: &'a [u8], scratch: &'a mut Vec<u8>) -> Result<&'a [u8], WireError> {
        let damaged = WireError::Body { kind: self.kind, position: self.position };
        if body.len() != self.body_bytes {
            return Err(damaged);
        }
        let plain = match self.codec {
            Codec::Plain => body,
            Codec::Lz4 => {
                scratch.resize(self.plain_bytes, 0);
                match lz4_flex::block::decompress_into(body, scratch) {
                    Ok(bytes) if bytes == self.plain_bytes => &scratch[..],
                    _ => return Err(damaged),
                }
            }
        };
        if crc32fast::hash(plain) != self.plain_crc {
            return Err(damaged);
        }
        Ok(plain)
    }
}

/// Start of an image frame's body: `extents` × [`ImageExtent`], then the bytes of the data extents in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ImageHeader {
    /// The sender's number for this region's work; comes back in `ImageDone`.
    pub id: U64,
    /// The volume's number.
    pub volume: U16,
    /// Zero.
    pub reserved: U16,
    /// Number of extents.
    pub extents: U32,
}

/// One extent of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ImageExtent {
    /// First byte in the volume.
    pub offset: U64,
    /// Bytes.
    pub length: U32,
    /// 0: the bytes follow; 1: zeroes, no bytes.
    pub zero: U32,
}

const _: () = assert!(size_of::<ImageHeader>() == 16);
const _: () = assert!(size_of::<ImageExtent>() == 16);
/// Largest image body: a region in which every other sector is left out.
pub const IMAGE_BODY_BYTES_MAX: usize =
    size_of::<ImageHeader>() + IMAGE_EXTENTS_MAX * size_of::<ImageExtent>() + REGION_BYTES as usize;

/// A decoded image: its extents with their bytes (`None`: zeroes).
#[derive(Clone, Debug)]
pub struct Image<'a> {
    /// See [`ImageHeader::id`].
    pub id: u64,
    /// The volume's number.
    pub volume: u16,
    extents: &'a [ImageExtent],
    data: &'a [u8],
}

impl<'a> Image<'a> {
    /// Reads a plain image body; every length is checked.
    pub fn decode(plain: &'a [u8]) -> Result<Self, WireError> {
        let wrong = |why: &str| WireError::Decode { kind: FrameKind::Image, why: why.to_owned() };
        let (header, rest) = ImageHeader::read_from_prefix(plain).map_err(|_| wrong("too short"))?;
        let count = header.extents.get() as usize;
        if count > IMAGE_EXTENTS_MAX || header.reserved.get() != 0 {
            return Err(wrong("too many extents"));
        }
        let (extents, data) =
            <[ImageExtent]>::ref_from_prefix_with_elems(rest, count).map_err(|_| wrong("extents are cut off"))?;
        let mut bytes = 0u64;
        for extent in extents {
            let length = u64::from(extent.length.get());
            let ends = extent.offset.get().checked_add(length);
            if length == 0 || length > REGION_BYTES || ends.is_none() || extent.zero.get() > 1 {
                return Err(wrong("impossible extent"));
            }
            bytes += if extent.zero.get() == 0 { length } else { 0 };
        }
        if bytes != data.len() as u64 {
            return Err(wrong("the data is not as long as the extents say"));
        }
        Ok(Self { id: header.id.get(), volume: header.volume.get(), extents, data })
    }

    /// Offset, length and bytes (`None`: zeroes) of each extent.
    pub fn extents(&self) -> impl Iterator<Item = (u64, u64, Option<&'a [u8]>)> + '_ {
        let mut rest = self.data;
        self.extents.iter().map(move |extent| {
            let length = extent.length.get() as usize;
            let bytes = (extent.zero.get() == 0).then(|| {
                let (bytes, after) = rest.split_at(length);
                rest = after;
                bytes
            });
            (extent.offset.get(), length as u64, bytes)
        })
    }

    /// Writes the part of an image body before the bytes. `extents` are (offset, length, zeroes).
    pub fn encode_head(
        id: u64,
        volume: u16,
        extents: impl ExactSizeIterator<Item = (u64, u64, bool)>,
        out: &mut Vec<u8>,
    ) {
        let header = ImageHeader {
            id: id.into(),
            volume: volume.into(),
            reserved: 0.into(),
            extents: (extents.len() as u32).into(),
        };
        out.extend_from_slice(header.as_bytes());
        for (offset, length, zero) in extents {
            let extent =
                ImageExtent { offset: offset.into(), length: (length as u32).into(), zero: u32::from(zero).into() };
            out.extend_from_slice(extent.as_bytes());
        }
    }

    /// Writes an image body. `extents` are (offset, length, bytes or zeroes).
    pub fn encode(id: u64, volume: u16, extents: &[(u64, u64, Option<&[u8]>)], out: &mut Vec<u8>) {
        let head = extents.iter().map(|(offset, length, bytes)| (*offset, *length, bytes.is_none()));
        Self::encode_head(id, volume, head, out);
        for (_, _, bytes) in extents {
            out.extend_from_slice(bytes.unwrap_or_default());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every version must be able to read these bytes: they are frozen.
    #[test]
    fn preamble_is_frozen() {
        assert_eq!(Preamble::offer().as_bytes(), b"VARVE\r\n\x1a\x01\x00\x01\x00\x00\x00\x00\x00");
        let (answer, version) = Preamble::answer(&Preamble::offer()).expect("same version");
        assert_eq!(answer.as_bytes(), b"VARVE\r\n\x1a\x01\x00\x01\x00\x00\x00\x00\x00");
        assert_eq!((version, answer.accepted()), (Some(1), Ok(1)));
    }

    #[test]
    fn versions_without_overlap_are_named() {
        let mut newer = Preamble::offer();
        newer.low = 7.into();
        newer.high = 9.into();
        let (answer, version) = Preamble::answer(&newer).expect("well-formed");
        assert_eq!(version, None);
        assert_eq!(answer.accepted(), Err(WireError::Version { peer_newest: VERSION_MAX }));
        newer.magic = *b"GET / HT";
        assert_eq!(Preamble::answer(&newer).err(), Some(WireError::Preamble));
    }

    #[test]
    fn frame_header_is_frozen() {
        let frame = Frame::plain(FrameKind::Data, 0x1000, b"hello");
        let golden = [
            b'V', b'R', b'V', b'F', 2, 0, 0, 0, 5, 0, 0, 0, 5, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0x86, 0xa6, 0x10,
            0x36,
        ];
        assert_eq!(frame.encode()[..28], golden);
        assert_eq!(Frame::decode(&frame.encode()), Ok(frame));
    }

    #[test]
    fn lengths_are_checked_before_anything_is_allocated() {
        let mut frame = Frame::plain(FrameKind::Data, 0, b"");
        frame.body_bytes = FRAME_PLAIN_BYTES_MAX + 1;
        frame.plain_bytes = FRAME_PLAIN_BYTES_MAX + 1;
        assert!(matches!(Frame::decode(&frame.encode()), Err(WireError::Oversized { .. })));
        let mut bomb = Frame::plain(FrameKind::Hello, 0, b"x");
        bomb.codec = Codec::Lz4;
        bomb.plain_bytes = CONTROL_BYTES_MAX + 1;
        assert!(matches!(Frame::decode(&bomb.encode()), Err(WireError::Oversized { .. })));
    }

    proptest! {
        #[test]
        fn any_damage_to_a_header_is_seen(position in any::<u64>(), bit in 0usize..256) {
            let mut bytes = Frame::plain(FrameKind::Data, position, b"abc").encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Frame::decode(&bytes).is_err());
        }

        #[test]
        fn headers_never_panic(bytes in any::<[u8; 32]>()) {
            let _ = Frame::decode(&bytes);
        }

        #[test]
        fn bodies_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), plain in 0usize..5000) {
            let frame = Frame { kind: FrameKind::Data, codec: Codec::Lz4, body_bytes: bytes.len(), plain_bytes: plain, position: 0, plain_crc: 0 };
            let mut scratch = Vec::new();
            let _ = frame.open(&bytes, &mut scratch);
            let _ = Image::decode(&bytes);
        }

        #[test]
        fn images_round_trip(extents in prop::collection::vec((0u64..1 << 40, 1usize..3000, any::<bool>()), 0..20)) {
            let data: Vec<Vec<u8>> = extents.iter().map(|(offset, length, _)| vec![*offset as u8; *length]).collect();
            let extents: Vec<_> = extents
                .iter()
                .zip(&data)
                .map(|((offset, length, zero), bytes)| (*offset, *length as u64, (!zero).then_some(&bytes[..])))
                .collect();
            let mut body = Vec::new();
            Image::encode(9, 3, &extents, &mut body);
            let image = Image::decode(&body).expect("own encoding");
            prop_assert_eq!((image.id, image.volume), (9, 3));
            prop_assert_eq!(image.extents().collect::<Vec<_>>(), extents);
        }
    }
}
