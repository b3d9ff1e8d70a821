//! What can go wrong, in the two forms in which others hear of it: a session that is refused, a group that failed.

use varve_common::format::FormatError;
use varve_common::wire::messages::{Refused, RefusedReason};
use varve_io::IoError;

/// Why a group does not take data any more. It is opened anew, from what is really on disk, at the next session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The word for the peer.
    pub reason: RefusedReason,
    /// What happened, with the path in it.
    pub text: String,
    /// What to do next.
    pub next: String,
}

impl Failure {
    /// A failed step of the storage. `what` is the part of the group: "the landing log", "replica 0".
    pub fn io(what: &str, error: &IoError) -> Self {
        let (reason, next) = match error {
            e if e.is_no_space() => (RefusedReason::DiskFull, "free space on that file system; it is tried again then"),
            e if e.is_read_only() => (RefusedReason::Storage, "the file system is read-only: see the kernel's log"),
            _ => (RefusedReason::Storage, "see the receiver's log and the kernel's; it is tried again by itself"),
        };
        Self { reason, text: format!("{what} failed: {}", error.chain()), next: next.to_owned() }
    }

    /// A file of another version, or damaged.
    pub fn format(path: &std::path::Path, error: &FormatError) -> Self {
        Self {
            reason: RefusedReason::Storage,
            text: format!("{}: {error}", path.display()),
            next: "run the version of Varve that wrote it, or forget the group and protect it again".to_owned(),
        }
    }

    /// Something in the group's own files that contradicts itself.
    pub fn damaged(text: impl Into<String>) -> Self {
        Self {
            reason: RefusedReason::Storage,
            text: text.into(),
            next: "see the receiver's log; 'varve forget GROUP' and a new protect start over".to_owned(),
        }
    }

    /// The daemon stops.
    pub fn stopping() -> Self {
        Self {
            reason: RefusedReason::Stopping,
            text: "the receiver is stopping".to_owned(),
            next: "it is tried again by itself".to_owned(),
        }
    }

    /// For the peer: a failure of the storage may pass without the agent's operator doing anything.
    pub fn refused(&self) -> Refused {
        Refused { reason: self.reason, text: self.text.clone(), next: self.next.clone(), retry: true }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// A refusal that somebody has to do something about.
pub fn refuse(reason: RefusedReason, text: impl Into<String>, next: impl Into<String>) -> Refused {
    Refused { reason, text: text.into(), next: next.into(), retry: false }
}

/// A refusal that may pass by itself.
pub fn refuse_for_now(reason: RefusedReason, text: impl Into<String>, next: impl Into<String>) -> Refused {
    Refused { reason, text: text.into(), next: next.into(), retry: true }
}

/// A peer that broke the protocol: it may be damaged in flight, so a new connection may help.
pub fn protocol(text: impl Into<String>) -> Refused {
    let next = "run the same version of Varve on both sides; if it stays, the network or a memory damages data";
    Refused { reason: RefusedReason::Protocol, text: text.into(), next: next.to_owned(), retry: true }
}
