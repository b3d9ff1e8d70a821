//! Files that must be whole after a crash: write a temporary file, sync it, rename, sync the directory.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};

/// Readable by the owner only.
pub(crate) const MODE_SECRET: u32 = 0o600;
/// Readable by everybody.
pub(crate) const MODE_PUBLIC: u32 = 0o644;
const MODE_DIR: u32 = 0o700;

/// Creates `dir` and what is missing above it, for its owner only.
pub(crate) fn create_private_dir(dir: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(MODE_DIR)
        .create(dir)
        .map_err(|e| Error::io(format!("cannot create {}", dir.display()), e))
}

/// Replaces `path` by `bytes`: afterwards, and after a crash at any moment, it holds the old content or the new.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let result = write_and_rename(path, &temporary, bytes, mode);
    result.map_err(|e| Error::io(format!("cannot write {}", path.display()), e))
}

fn write_and_rename(path: &Path, temporary: &Path, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    // A temporary file that a crash left behind may have another mode or owner: never write a secret into it.
    match std::fs::remove_file(temporary) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(temporary)?;
    file.write_all(bytes)?;
    // The bytes before the name: a rename that survives a crash must not point at an empty file.
    file.sync_all()?;
    std::fs::rename(temporary, path)?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The name itself.
    File::open(parent)?.sync_all()
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
