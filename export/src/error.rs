//! The one error of this crate.

use std::io;

/// What kind of thing went wrong; decides what a caller can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportErrorKind {
    /// The kernel refused a step.
    Io,
    /// A program or a part of the kernel is missing.
    Missing,
    /// Somebody uses it.
    InUse,
    /// There is one of that name.
    Exists,
    /// A name, size or number is beyond what can be served.
    Unfit,
}

/// A step of serving a disk that failed: what, why, and what to do next.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct ExportError {
    kind: ExportErrorKind,
    what: String,
    why: String,
    next: String,
    errno: Option<i32>,
}

impl ExportError {
    /// An error of `kind` that this crate found itself.
    pub fn new(
        kind: ExportErrorKind,
        what: impl Into<String>,
        why: impl Into<String>,
        next: impl Into<String>,
    ) -> Self {
        Self { kind, what: what.into(), why: why.into(), next: next.into(), errno: None }
    }

    /// A step that the kernel refused.
    pub fn io(what: impl Into<String>, source: &io::Error, next: impl Into<String>) -> Self {
        let mut error = Self::new(ExportErrorKind::Io, what, source.to_string(), next);
        error.errno = source.raw_os_error();
        error
    }

    /// The kind.
    pub fn kind(&self) -> ExportErrorKind {
        self.kind
    }

    /// What happened, with the names in it.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Why.
    pub fn why(&self) -> &str {
        &self.why
    }

    /// What to do next.
    pub fn next(&self) -> &str {
        &self.next
    }

    /// The kernel's errno, if it was the kernel.
    pub fn errno(&self) -> Option<i32> {
        self.errno
    }
}
