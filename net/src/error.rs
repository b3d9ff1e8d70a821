//! One error type: kind + context + source, and a hint that tells the operator what to do next.

use std::error::Error as StdError;

/// Shorthand for this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

type Source = Box<dyn StdError + Send + Sync>;

/// What went wrong, as far as a program needs to tell cases apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Nothing answers at the address or socket.
    Unreachable,
    /// The host name could not be turned into an address.
    Resolve,
    /// The peer is there but did not answer in time.
    Timeout,
    /// The receiver's certificate is not signed by the CA that the token or the enrolment names.
    WrongCa,
    /// The string is not a token (mistyped or cut off): it never reached the receiver.
    MalformedToken,
    /// A well-formed token that the receiver did not issue.
    UnknownToken,
    /// The token was already used.
    UsedToken,
    /// The token's time is over.
    ExpiredToken,
    /// This host's certificate was revoked at the receiver, or replaced by a later join.
    Revoked,
    /// The receiver does not know this host's certificate.
    UnknownHost,
    /// The peer does not speak this protocol.
    WrongProtocol,
    /// The receiver has as many connections or handshakes as it takes.
    Busy,
    /// The connection ended.
    Closed,
    /// The peer sent something that is not allowed.
    Protocol,
    /// A file of an identity or registry is missing, damaged, or would be overwritten.
    Identity,
    /// A certificate or key could not be made or used.
    Crypto,
    /// The operating system refused a file or socket operation.
    Io,
    /// A limit of this crate would be exceeded.
    Limit,
    /// Not a usable host name (`[a-z0-9._-]{1,64}`).
    BadName,
    /// There is no host or invitation of that name.
    NoSuchHost,
    /// Another daemon already serves this socket.
    AlreadyRunning,
}

/// An error of this crate. `Display` says what was tried; [`StdError::source`] says why it failed;
/// [`Error::hint`] says what to do next.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct Error {
    kind: ErrorKind,
    context: String,
    #[source]
    source: Option<Source>,
    hint: Option<String>,
}

impl Error {
    /// An error of `kind` without a deeper cause.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None, hint: None }
    }

    /// Adds the cause.
    pub fn because(mut self, source: impl Into<Source>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Replaces the kind's general hint by one that knows more.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// An error of the operating system, with what was being done to what.
    pub fn io(context: impl Into<String>, source: std::io::Error) -> Self {
        Self::new(ErrorKind::Io, context).because(source)
    }

    /// The kind, for programs.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What was tried, without the cause.
    pub fn context(&self) -> &str {
        &self.context
    }

    /// Why it failed: the chain of causes in one line; empty if the context says it all.
    pub fn why(&self) -> String {
        let mut parts: Vec<String> = Vec::new();
        let mut next = StdError::source(self);
        while let Some(cause) = next {
            let text = cause.to_string();
            // Some causes (quinn's) print their own cause as well: say it once.
            if !parts.last().is_some_and(|last| last.contains(&text)) {
                parts.push(text);
            }
            next = cause.source();
        }
        parts.join(": ")
    }

    /// What the operator can do next.
    pub fn hint(&self) -> &str {
        match &self.hint {
            Some(hint) => hint,
            None => self.kind.hint(),
        }
    }

    /// Whether trying the same again later can help without an operator doing something first.
    pub fn is_transient(&self) -> bool {
        use ErrorKind::*;
        matches!(self.kind, Unreachable | Resolve | Timeout | Busy | Closed | Io | Limit)
    }
}

impl ErrorKind {
    /// What the operator can do next, where nothing more specific is known.
    pub fn hint(self) -> &'static str {
        use ErrorKind::*;
        match self {
            Unreachable => {
                "check that varve-receiver runs there, that the address and UDP port are right and that no firewall drops UDP"
            }
            Resolve => "check the host name and this machine's DNS, or use an IP address",
            Timeout => "check the load of the other side and the network between the two (packet loss, MTU, firewall)",
            WrongCa => {
                "this is not the receiver that issued the token or enrolled this host: check the address; if the receiver was set up anew, make a new token there with 'varve host invite' and join again"
            }
            MalformedToken => {
                "copy the whole token, from 'varve1.' to its last character, as 'varve host invite' printed it"
            }
            UnknownToken => {
                "check that the token comes from this receiver; make a new one there with 'varve host invite NAME'"
            }
            UsedToken => {
                "a token works once: make a new one on the recovery host with 'varve host invite NAME'; if nobody here used it, revoke that host with 'varve host revoke NAME'"
            }
            ExpiredToken => {
                "make a new token on the recovery host with 'varve host invite NAME' (--ttl sets how long it works)"
            }
            Revoked => {
                "if this host should come back, make a token on the recovery host with 'varve host invite NAME' and run 'varve join' here again"
            }
            UnknownHost => "enrol this host: 'varve host invite NAME' on the recovery host, then 'varve join' here",
            WrongProtocol => {
                "run the same version of Varve on both sides ('varve version'), and check that the port belongs to varve-receiver"
            }
            Busy => "it is tried again by itself; if it stays, see 'varve status' on the recovery host",
            Closed => "it is tried again by itself; the other side's log says why it closed",
            Protocol => "run the same version of Varve on both sides ('varve version'); the log names the peer",
            Identity => {
                "restore the directory from a backup, or set it up anew ('varve receiver init' on the recovery host, 'varve join' on a production host)"
            }
            Crypto => "restore the identity files from a backup, or set them up anew",
            Io => "check the path, its permissions and free space",
            Limit => "remove what is no longer needed ('varve host list', 'varve host revoke NAME')",
            BadName => "use 1 to 64 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit",
            NoSuchHost => "'varve host list' on the recovery host shows the names",
            AlreadyRunning => "stop the other daemon first, or give this one its own VARVE_ROOT",
        }
    }
}
