//! The network side of Varve: who may talk, over what, and how the daemons are reached locally.
//!
//! - [`identity`]: the receiver's private CA, its certificates, and a host's own key and certificate
//! - [`token`]: the one string an operator copies from the receiver to a production host
//! - [`hosts`]: the receiver's registry of invitations and enrolled hosts
//! - [`tls`]: what is checked in the handshake, on both sides
//! - [`transport`]: every QUIC setting and socket option, with its reason
//! - [`endpoint`]: the receiver's listening side and the agent's connecting side
//! - [`join`]: enrolment, both sides
//! - [`backoff`]: when to try again
//! - [`local`]: the Unix socket between `varve` and a daemon
//! - [`error`]: what went wrong, and what to do about it

pub mod backoff;
pub mod endpoint;
pub mod error;
pub mod hosts;
pub mod identity;
pub mod join;
pub mod local;
pub mod tls;
pub mod token;
pub mod transport;

mod connect;
mod durable;
mod live;

pub use error::{Error, ErrorKind, Result};
