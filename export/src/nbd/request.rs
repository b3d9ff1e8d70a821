//! Requests and their replies: decoding, what is allowed, encoding. Pure.

use std::io;

use nix::libc;

use super::wire::*;
use crate::limits::NBD_REQUEST_BYTES_MAX;

/// Bytes of a request, without the data of a write.
pub const REQUEST_BYTES: usize = 28;
/// Bytes before the data of a simple reply.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes before the payload of a chunk.
pub const CHUNK_HEADER_BYTES: usize = 20;

/// A request as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// Command.
    pub command: u16,
    /// Comes back in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

/// What a request asks for, once it was found good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read.
    Read {
        /// In one chunk.
        one_chunk: bool,
    },
    /// Write what follows the request.
    Write,
    /// Make durable.
    Flush,
    /// Make it zeroes.
    Zero {
        /// It need not stay allocated.
        may_unmap: bool,
    },
    /// Nothing to do.
    Nothing,
    /// Tell which parts are holes.
    Status {
        /// One extent.
        one: bool,
    },
}

/// What the disk and the negotiation allow.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// Bytes of the disk.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// `base:allocation` was chosen.
    pub allocation: bool,
    /// Replies in chunks were agreed on.
    pub structured: bool,
}

/// An error of a reply. The numbers are the protocol's, which are Linux's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// EPERM, EIO, ENOMEM, EINVAL, ENOSPC or ENOTSUP.
    pub errno: u32,
    /// For people.
    pub text: String,
}

impl Refused {
    fn new(errno: i32, text: impl Into<String>) -> Self {
        Self { errno: errno.unsigned_abs(), text: text.into() }
    }

    /// The protocol's error for one of a disk.
    pub fn from_io(e: &io::Error) -> Self {
        let errno = match e.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => libc::ENOSPC,
            Some(libc::EPERM | libc::EROFS | libc::EACCES) => libc::EPERM,
            Some(errno @ (libc::ENOMEM | libc::EINVAL)) => errno,
            Some(libc::EOPNOTSUPP) => libc::EOPNOTSUPP,
            _ => libc::EIO,
        };
        Self::new(errno, e.to_string())
    }
}

impl Request {
    /// Decodes it.
    ///
    /// # Errors
    /// A wrong magic: the stream cannot be followed any more.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        match reader.u32()? {
            REQUEST_MAGIC => {}
            other => return Err(WireError::Magic(u64::from(other))),
        }
        Ok(Self {
            flags: reader.u16()?,
            command: reader.u16()?,
            cookie: reader.u64()?,
            offset: reader.u64()?,
            len: reader.u32()?,
        })
    }

    /// Bytes that follow it, whether it is allowed or not.
    pub fn payload_bytes(&self) -> u32 {
        if self.command == CMD_WRITE { self.len } else { 0 }
    }

    /// Whether it is durable before its reply.
    pub fn is_fua(&self) -> bool {
        self.flags & CMD_FLAG_FUA != 0
    }

    /// What is to be done, or the reply that refuses it.
    ///
    /// # Errors
    /// The error of the reply.
    pub fn check(&self, allowed: &Allowed) -> Result<Action, Refused> {
        let (action, flags) = self.action()?;
        // FUA means nothing on what does not write, and is ignored there.
        if self.flags & !(flags | CMD_FLAG_FUA) != 0 {
            return Err(Refused::new(libc::EINVAL, format!("flags {:#x} do not go with this command", self.flags)));
        }
        let writes = matches!(self.command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
        if writes && allowed.read_only {
            return Err(Refused::new(libc::EPERM, "this export is read-only"));
        }
        if matches!(self.command, CMD_READ | CMD_WRITE) && self.len > NBD_REQUEST_BYTES_MAX {
            return Err(Refused::new(libc::EINVAL, format!("more than {NBD_REQUEST_BYTES_MAX} bytes")));
        }
        let ranged = self.command != CMD_FLUSH;
        if ranged && self.offset.checked_add(u64::from(self.len)).is_none_or(|end| end > allowed.size) {
            let grows = matches!(self.command, CMD_WRITE | CMD_WRITE_ZEROES);
            let errno = if grows { libc::ENOSPC } else { libc::EINVAL };
            return Err(Refused::new(errno, format!("beyond the end at {}", allowed.size)));
        }
        if let Action::Status { .. } = action {
            if !(allowed.allocation && allowed.structured) {
                return Err(Refused::new(libc::EINVAL, "no metadata context was chosen"));
            }
            if self.len == 0 {
                return Err(Refused::new(libc::EINVAL, "no bytes to tell about"));
            }
        }
        if self.flags & CMD_FLAG_DF != 0 && !allowed.structured {
            return Err(Refused::new(libc::EINVAL, "DF needs structured replies"));
        }
        // A disk is never asked about nothing.
        let empty = self.len == 0 && matches!(action, Action::Zero { .. } | Action::Write);
        Ok(if empty { Action::Nothing } else { action })
    }

    fn action(&self) -> Result<(Action, u16), Refused> {
        let has = |flag: u16| self.flags & flag != 0;
        Ok(match self.command {
            CMD_READ => (Action::Read { one_chunk: has(CMD_FLAG_DF) }, CMD_FLAG_DF),
            CMD_WRITE => (Action::Write, 0),
            CMD_FLUSH => (Action::Flush, 0),
            CMD_TRIM => (Action::Zero { may_unmap: true }, 0),
            CMD_CACHE => (Action::Nothing, 0),
            CMD_WRITE_ZEROES => {
                // Every zeroing of a disk is fast or refuses with EOPNOTSUPP, so FAST_ZERO asks for nothing more.
                (Action::Zero { may_unmap: !has(CMD_FLAG_NO_HOLE) }, CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO)
            }
            CMD_BLOCK_STATUS => (Action::Status { one: has(CMD_FLAG_REQ_ONE) }, CMD_FLAG_REQ_ONE),
            other => return Err(Refused::new(libc::EINVAL, format!("command {other} is not supported"))),
        })
    }
}

/// A simple reply's head.
pub fn simple_reply(errno: u32, cookie: u64) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut out = [0; SIMPLE_REPLY_BYTES];
    out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&errno.to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// Appends a chunk's head; `len` is the payload's.
pub fn chunk_header(out: &mut Vec<u8>, done: bool, kind: u16, cookie: u64, len: u32) {
    out.extend(CHUNK_MAGIC.to_be_bytes());
    out.extend((if done { CHUNK_DONE } else { 0 }).to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend(len.to_be_bytes());
}

/// The whole reply that refuses a request.
pub fn error_reply(structured: bool, cookie: u64, refused: &Refused) -> Vec<u8> {
    if !structured {
        return simple_reply(refused.errno, cookie).to_vec();
    }
    let mut end = refused.text.len().min(1024);
    while !refused.text.is_char_boundary(end) {
        end -= 1;
    }
    let text = &refused.text[..end];
    let mut out = Vec::with_capacity(CHUNK_HEADER_BYTES + 6 + text.len());
    chunk_header(&mut out, true, CHUNK_ERROR, cookie, 6 + text.len() as u32);
    out.extend(refused.errno.to_be_bytes());
    out.extend((text.len() as u16).to_be_bytes());
    out.extend(text.as_bytes());
    out
}

/// The whole reply of a block status; extents are (bytes, hole).
pub fn status_reply(cookie: u64, extents: &[(u32, bool)]) -> Vec<u8> {
    let len = 4 + 8 * extents.len();
    let mut out = Vec::with_capacity(CHUNK_HEADER_BYTES + len);
    chunk_header(&mut out, true, CHUNK_BLOCK_STATUS, cookie, len as u32);
    out.extend(BASE_ALLOCATION_ID.to_be_bytes());
    for &(len, hole) in extents {
        out.extend(len.to_be_bytes());
        out.extend((if hole { STATE_HOLE_ZERO } else { 0 }).to_be_bytes());
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "request_tests.rs"]
mod tests;
