//! Numbers and layouts of the NBD protocol. Everything is big endian.

/// "NBDMAGIC", the first bytes of a server.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": fixed newstyle, and before every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flag, both sides: fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag, both sides: no 124 zeroes after EXPORT_NAME.
pub const FLAG_NO_ZEROES: u16 = 2;

/// Option: choose an export, with no way to refuse but closing.
pub const OPT_EXPORT_NAME: u32 = 1;
/// Option: end the negotiation.
pub const OPT_ABORT: u32 = 2;
/// Option: list exports.
pub const OPT_LIST: u32 = 3;
/// Option: turn to TLS.
pub const OPT_STARTTLS: u32 = 5;
/// Option: tell about an export.
pub const OPT_INFO: u32 = 6;
/// Option: tell about an export and begin.
pub const OPT_GO: u32 = 7;
/// Option: replies in chunks.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: which metadata contexts there are.
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// Option: choose metadata contexts.
pub const OPT_SET_META_CONTEXT: u32 = 10;

/// Reply: done.
pub const REP_ACK: u32 = 1;
/// Reply: an export.
pub const REP_SERVER: u32 = 2;
/// Reply: information about an export.
pub const REP_INFO: u32 = 3;
/// Reply: a metadata context.
pub const REP_META_CONTEXT: u32 = 4;
/// Reply: unknown option.
pub const REP_ERR_UNSUP: u32 = 0x8000_0001;
/// Reply: malformed, or not at this time.
pub const REP_ERR_INVALID: u32 = 0x8000_0003;
/// Reply: TLS first.
pub const REP_ERR_TLS_REQD: u32 = 0x8000_0005;
/// Reply: no such export.
pub const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
/// Reply: too long.
pub const REP_ERR_TOO_BIG: u32 = 0x8000_0009;

/// Information: size and flags.
pub const INFO_EXPORT: u16 = 0;
/// Information: the name.
pub const INFO_NAME: u16 = 1;
/// Information: a description.
pub const INFO_DESCRIPTION: u16 = 2;
/// Information: block sizes.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flags: always set.
pub const TRANSMIT_HAS_FLAGS: u16 = 1;
/// Writes are refused.
pub const TRANSMIT_READ_ONLY: u16 = 1 << 1;
/// FLUSH.
pub const TRANSMIT_FLUSH: u16 = 1 << 2;
/// FUA.
pub const TRANSMIT_FUA: u16 = 1 << 3;
/// TRIM.
pub const TRANSMIT_TRIM: u16 = 1 << 5;
/// WRITE_ZEROES.
pub const TRANSMIT_WRITE_ZEROES: u16 = 1 << 6;
/// DF on reads.
pub const TRANSMIT_DF: u16 = 1 << 7;
/// A flush on one connection covers all.
pub const TRANSMIT_MULTI_CONN: u16 = 1 << 8;
/// CACHE.
pub const TRANSMIT_CACHE: u16 = 1 << 10;
/// FAST_ZERO.
pub const TRANSMIT_FAST_ZERO: u16 = 1 << 11;

/// Command: read.
pub const CMD_READ: u16 = 0;
/// Command: write.
pub const CMD_WRITE: u16 = 1;
/// Command: disconnect.
pub const CMD_DISC: u16 = 2;
/// Command: make durable.
pub const CMD_FLUSH: u16 = 3;
/// Command: what is there is not needed.
pub const CMD_TRIM: u16 = 4;
/// Command: it will be read soon.
pub const CMD_CACHE: u16 = 5;
/// Command: make it zeroes.
pub const CMD_WRITE_ZEROES: u16 = 6;
/// Command: which parts are holes.
pub const CMD_BLOCK_STATUS: u16 = 7;

/// Flag: durable before the reply.
pub const CMD_FLAG_FUA: u16 = 1;
/// Flag of WRITE_ZEROES: keep it allocated.
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Flag of READ: one chunk.
pub const CMD_FLAG_DF: u16 = 1 << 2;
/// Flag of BLOCK_STATUS: one extent.
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Flag of WRITE_ZEROES: fail rather than write zeroes out.
pub const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;

/// Chunk flag: the last one of its reply.
pub const CHUNK_DONE: u16 = 1;
/// Chunk: nothing.
pub const CHUNK_NONE: u16 = 0;
/// Chunk: offset and bytes.
pub const CHUNK_DATA: u16 = 1;
/// Chunk: offset and length of zeroes.
pub const CHUNK_HOLE: u16 = 2;
/// Chunk: extents.
pub const CHUNK_BLOCK_STATUS: u16 = 5;
/// Chunk: error and text.
pub const CHUNK_ERROR: u16 = 0x8001;

/// Extent state of `base:allocation`: not allocated, reads as zeroes.
pub const STATE_HOLE_ZERO: u32 = 3;
/// The one metadata context.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Its number on every connection.
pub const BASE_ALLOCATION_ID: u32 = 1;

/// The peer does not speak the protocol; it loses its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Fewer bytes than the thing has.
    #[error("it ends too early")]
    Short,
    /// Bytes after its end.
    #[error("it has {0} bytes too many")]
    Trailing(usize),
    /// A magic number is wrong.
    #[error("a magic number is wrong ({0:#x})")]
    Magic(u64),
    /// Client flags that this server did not offer.
    #[error("unknown handshake flags ({0:#x})")]
    Flags(u32),
    /// A length or count is above its limit.
    #[error("a length or count of {0} is above the limit")]
    TooLong(u64),
    /// A string that is not UTF-8.
    #[error("a string is not UTF-8")]
    Text,
}

/// Reads big endian values off the front of some bytes.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// From the first byte on.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(WireError::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    /// The next number.
    pub fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next number.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next number.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_be_bytes)
    }

    /// The next string, behind its length.
    pub fn string(&mut self, max: usize) -> Result<&'a str, WireError> {
        let len = self.u32()? as usize;
        if len > max {
            return Err(WireError::TooLong(len as u64));
        }
        let (text, rest) = self.0.split_at_checked(len).ok_or(WireError::Short)?;
        self.0 = rest;
        std::str::from_utf8(text).map_err(|_| WireError::Text)
    }

    /// Everything must have been read.
    pub fn end(self) -> Result<(), WireError> {
        if self.0.is_empty() { Ok(()) } else { Err(WireError::Trailing(self.0.len())) }
    }
}
