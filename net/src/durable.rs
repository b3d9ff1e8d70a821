//! Files that must be whole after a crash, and private: `varve_io::crashsafe` in this crate's words.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use varve_io::{IoError, crashsafe};

use crate::error::{Error, ErrorKind, Result};

/// Readable by the owner only.
pub(crate) const MODE_SECRET: u32 = 0o600;
/// Readable by everybody.
pub(crate) const MODE_PUBLIC: u32 = 0o644;

/// Creates `dir` and what is missing above it, for its owner only.
pub(crate) fn create_private_dir(dir: &Path) -> Result<()> {
    crashsafe::create_dir_all_durable(dir).map_err(failed)
}

/// Replaces `path` by `bytes`: afterwards, and after a crash at any moment, it holds the old content or the new.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    crashsafe::write_atomic(path, bytes, mode).map_err(failed)
}

/// Removes `path`; a missing file is no error.
pub(crate) fn remove(path: &Path) -> Result<()> {
    crashsafe::remove_durable(path).map_err(failed)
}

/// The errno is kept: a full disk and a read-only one are different things to the operator.
fn failed(error: IoError) -> Error {
    let cause = match error.errno() {
        Some(errno) => std::io::Error::from_raw_os_error(errno),
        None => std::io::Error::new(error.kind(), error.source_io().to_string()),
    };
    Error::new(ErrorKind::Io, format!("cannot {} {}", error.doing(), error.path().display())).because(cause)
}

/// Reads a whole file of at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: usize) -> Result<Vec<u8>> {
    let fail = |e| Error::io(format!("cannot read {}", path.display()), e);
    let file = File::open(path).map_err(fail)?;
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() > limit {
        return Err(Error::new(ErrorKind::Limit, format!("{} has more than {limit} bytes", path.display()))
            .with_hint("this file was not written by Varve: restore it from a backup"));
    }
    Ok(bytes)
}
