//! One error type: what was attempted, why it failed, and what the operator does next.

use std::error::Error;
use std::io;

/// What went wrong, for a caller that decides by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaptureErrorKind {
    /// This machine cannot capture (architecture, kernel, lockdown): retrying is pointless.
    Unsupported,
    /// The process lacks a capability.
    Permission,
    /// No way from a page to its data could be found and proved.
    Calibration,
    /// The caller asked for something that makes no sense.
    Invalid,
    /// A fixed limit (groups, volumes, volumes of one disk) is reached.
    Limit,
    /// The ring has no room for the record.
    RingFull,
    /// The kernel refused an operation that should have worked.
    Kernel,
}

/// An error of the capture side. `Display` is what was attempted; `source` is why it failed; [`CaptureError::hint`]
/// is what to do.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct CaptureError {
    kind: CaptureErrorKind,
    context: String,
    hint: &'static str,
    #[source]
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl CaptureError {
    /// The kind of failure.
    pub fn kind(&self) -> CaptureErrorKind {
        self.kind
    }

    /// What the operator should do next.
    pub fn hint(&self) -> &'static str {
        self.hint
    }

    /// The error number of the system call behind this error, if there was one.
    pub fn errno(&self) -> Option<i32> {
        let mut next = self.source();
        while let Some(error) = next {
            if let Some(error) = error.downcast_ref::<io::Error>() {
                return error.raw_os_error();
            }
            if let Some(errno) = error.downcast_ref::<nix::errno::Errno>() {
                return Some(*errno as i32);
            }
            next = error.source();
        }
        None
    }

    pub(crate) fn new(kind: CaptureErrorKind, context: impl Into<String>, hint: &'static str) -> Self {
        Self { kind, context: context.into(), hint, source: None }
    }

    pub(crate) fn because(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    pub(crate) fn invalid(context: impl Into<String>, hint: &'static str) -> Self {
        Self::new(CaptureErrorKind::Invalid, context, hint)
    }

    pub(crate) fn limit(context: impl Into<String>, hint: &'static str) -> Self {
        Self::new(CaptureErrorKind::Limit, context, hint)
    }

    /// An operation that the kernel refused.
    pub(crate) fn kernel(context: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(
            CaptureErrorKind::Kernel,
            context,
            "run `varve doctor`; if it finds nothing, report this with `dmesg` and the kernel version",
        )
        .because(source)
    }
}
