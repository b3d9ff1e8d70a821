//! The one error of this crate.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use nix::libc;

/// An I/O step that failed: what was being done, on which path, and the cause.
///
/// The text does not repeat the cause: print the chain (`{:#}` of `anyhow`, or [`IoError::chain`]).
/// The errno of the kernel is kept in [`IoError::source_io`], so that a full disk, a dying disk and
/// a read-only file system stay three different things to the caller.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {}", path.display())]
pub struct IoError {
    doing: Cow<'static, str>,
    path: PathBuf,
    source: io::Error,
}

impl IoError {
    /// An error of the step `doing` (an imperative: "open", "write 4096 bytes at 8192 of") on `path`.
    pub fn new(doing: impl Into<Cow<'static, str>>, path: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        Self { doing: doing.into(), path: path.as_ref().to_path_buf(), source: source.into() }
    }

    /// An error that this crate found itself, before or after asking the kernel. It has no errno.
    pub(crate) fn refused(
        doing: impl Into<Cow<'static, str>>,
        path: impl AsRef<Path>,
        kind: io::ErrorKind,
        why: impl Into<String>,
    ) -> Self {
        Self::new(doing, path, io::Error::new(kind, why.into()))
    }

    /// What was being done.
    pub fn doing(&self) -> &str {
        &self.doing
    }

    /// The file, directory or device it was done to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The cause, with its errno.
    pub fn source_io(&self) -> &io::Error {
        &self.source
    }

    /// The kind of the cause.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }

    /// The errno of the kernel; `None` if this crate refused the step itself.
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// The file system, the quota or the thin pool is full (ENOSPC, EDQUOT): free space and retry.
    pub fn is_no_space(&self) -> bool {
        matches!(self.errno(), Some(libc::ENOSPC | libc::EDQUOT))
    }

    /// The device failed (EIO and what block drivers return beside it): retrying is not a cure.
    pub fn is_device_failure(&self) -> bool {
        matches!(
            self.errno(),
            Some(
                libc::EIO | libc::ENODATA | libc::EREMOTEIO | libc::EILSEQ | libc::ENXIO | libc::ENODEV | libc::ENOLINK
            )
        )
    }

    /// The file system or the device is read-only (EROFS).
    pub fn is_read_only(&self) -> bool {
        self.errno() == Some(libc::EROFS)
    }

    /// It does not exist.
    pub fn is_not_found(&self) -> bool {
        self.kind() == io::ErrorKind::NotFound
    }

    /// Somebody else has it (EBUSY, or a lock that is held).
    pub fn is_busy(&self) -> bool {
        matches!(self.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::WouldBlock)
    }

    /// The error and its cause on one line.
    pub fn chain(&self) -> String {
        format!("{self}: {}", self.source)
    }
}

impl From<IoError> for io::Error {
    /// Keeps kind and text; the errno stays reachable through the inner [`IoError`].
    fn from(error: IoError) -> Self {
        io::Error::new(error.kind(), error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_names_step_and_path_once_and_keeps_errno() {
        let error = IoError::new("open", "/dev/none", io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(error.to_string(), "cannot open /dev/none");
        assert!(error.chain().starts_with("cannot open /dev/none: No space left"));
        assert!(error.is_no_space());
        assert!(!error.is_device_failure());
        assert!(!error.is_read_only());
        let outer = io::Error::from(error);
        let inner = outer.get_ref().and_then(|e| e.downcast_ref::<IoError>()).expect("inner error kept");
        assert_eq!(inner.errno(), Some(libc::ENOSPC));
    }
}
