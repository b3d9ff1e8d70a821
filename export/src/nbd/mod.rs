//! NBD: disks by name over a Unix socket, or over TCP with TLS.
//!
//! ```text
//! accept → negotiate (options, one at a time; on TCP nothing but STARTTLS before TLS)
//!        → session: reader ─► up to 16 requests, each on a blocking thread ─► writer (replies in any order)
//! ```
//!
//! [`wire`], [`negotiation`] and [`request`] are the protocol: no sockets, no clock, fuzzed. [`server`] and `session`
//! are the sockets. The protocol is that of <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>:
//! fixed newstyle, structured replies, `base:allocation`; extended headers are not offered.

pub mod exports;
pub mod negotiation;
pub mod request;
pub mod server;
mod session;
pub mod wire;

pub use exports::Exports;
pub use server::{Clients, NbdServer};
