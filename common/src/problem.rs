//! What an operator is told when something is refused or fails: what happened, why, and what to do next.

use serde::{Deserialize, Serialize};

/// The kind of a problem; it fixes the exit code of `varve` (docs/json.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemKind {
    /// It was tried and did not work.
    Failed,
    /// The command was not understood.
    Usage,
    /// It would endanger data or authority, so it was not tried.
    Refused,
    /// A daemon or peer does not answer.
    Unreachable,
    /// There is no such group, volume, host, point.
    NotFound,
}

impl ProblemKind {
    /// The exit code of `varve`.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Refused => 3,
            Self::Unreachable => 4,
            Self::NotFound => 5,
        }
    }
}

/// An answer that is not the one hoped for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{what}: {why}")]
pub struct Problem {
    /// Fixes the exit code.
    pub kind: ProblemKind,
    /// What happened, with the names in it.
    pub what: String,
    /// Why.
    pub why: String,
    /// What to do next; a command where there is one.
    pub next: String,
}

impl Problem {
    /// A problem of `kind`.
    pub fn new(kind: ProblemKind, what: impl Into<String>, why: impl Into<String>, next: impl Into<String>) -> Self {
        Self { kind, what: what.into(), why: why.into(), next: next.into() }
    }

    /// Tried, did not work.
    pub fn failed(what: impl Into<String>, why: impl Into<String>, next: impl Into<String>) -> Self {
        Self::new(ProblemKind::Failed, what, why, next)
    }

    /// Not tried, for safety.
    pub fn refused(what: impl Into<String>, why: impl Into<String>, next: impl Into<String>) -> Self {
        Self::new(ProblemKind::Refused, what, why, next)
    }

    /// No such thing.
    pub fn not_found(what: impl Into<String>, why: impl Into<String>, next: impl Into<String>) -> Self {
        Self::new(ProblemKind::NotFound, what, why, next)
    }

    /// Words that were not understood.
    pub fn usage(what: impl Into<String>, why: impl Into<String>, next: impl Into<String>) -> Self {
        Self::new(ProblemKind::Usage, what, why, next)
    }

    /// A daemon or peer that does not answer.
    pub fn unreachable(what: impl Into<String>, why: impl Into<String>, next: impl Into<String>) -> Self {
        Self::new(ProblemKind::Unreachable, what, why, next)
    }
}

/// Whether `name` may name a group, host or bookmark: letters, digits, `.`, `_`, `-`, not starting with `.` or `-`.
pub fn check_name(what: &str, name: &str) -> Result<(), Problem> {
    let fits = !name.is_empty() && name.len() <= crate::limits::NAME_BYTES_MAX;
    let first_ok = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    let all_ok = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    if fits && first_ok && all_ok {
        return Ok(());
    }
    Err(Problem::usage(
        format!("'{}' cannot name a {what}", name.escape_debug()),
        format!(
            "a name has 1 to {} letters, digits, '.', '_' or '-', and starts with a letter, a digit or '_'",
            crate::limits::NAME_BYTES_MAX
        ),
        "choose another name",
    ))
}
