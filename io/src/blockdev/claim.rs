//! A block device that nobody else may write for a while.
//!
//! The claim (O_EXCL) keeps it from being mounted, swapped on, or taken by dm and md. Whoever has it open without a claim of
//! his own can write all the same: against him it is made read-only (`BLKROSET`), which the kernel asks about at every write
//! through a descriptor. Not the other way round: a filesystem that is mounted already goes on writing to a device that is
//! made read-only, so the claim comes first and proves that there is none.

use super::facts::BlockFacts;
use crate::{IoError, sys};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;

/// See the module's text. The claim ends when it is dropped; what was made read-only stays so: [`Claim::set_read_only`].
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    file: File,
}

impl Claim {
    /// Claims a block device.
    ///
    /// # Errors
    /// EBUSY ([`IoError::is_busy`]) if it is mounted, swapped on, held or claimed.
    pub fn take(path: impl AsRef<Path>) -> Result<Self, IoError> {
        let path = path.as_ref().to_path_buf();
        // Read-only, so that closing it does not make udev probe the device as after a write.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(&path);
        Ok(Self { file: file.map_err(|e| IoError::new("claim", &path, e))?, path })
    }

    /// What was written through the page cache is on the device.
    ///
    /// # Errors
    /// If it is not.
    pub fn sync(&self) -> Result<(), IoError> {
        self.file.sync_all().map_err(|e| IoError::new("sync", &self.path, e))
    }

    /// Makes it read-only, or writable again.
    ///
    /// # Errors
    /// If the driver refuses that.
    pub fn set_read_only(&self, read_only: bool) -> Result<(), IoError> {
        let what = if read_only { "make read-only" } else { "make writable" };
        sys::block_set_read_only(&self.file, read_only).map_err(|e| IoError::new(what, &self.path, e))
    }
}

/// Processes that have a device open for writing, this one left out: "qemu (1234)". As far as it may be seen: a daemon
/// without the power to look into others' processes sees none.
pub fn writers(path: impl AsRef<Path>) -> Vec<String> {
    let Ok(dev) = BlockFacts::of(path).map(|facts| facts.dev) else { return Vec::new() };
    let own = std::process::id().to_string();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let writes = |pid: &String| {
        let dir = PathBuf::from("/proc").join(pid);
        let Ok(fds) = std::fs::read_dir(dir.join("fd")) else { return false };
        fds.flatten().any(|fd| {
            let is_it = std::fs::metadata(fd.path())
                .is_ok_and(|facts| facts.file_type().is_block_device() && super::sysfs::split(facts.rdev()) == dev);
            is_it && writable(&dir.join("fdinfo").join(fd.file_name()))
        })
    };
    let all = names.filter(|name| *name != own && name.bytes().all(|byte| byte.is_ascii_digit()));
    all.filter(writes).map(|pid| format!("{} ({pid})", name_of(&pid))).collect()
}

/// Whether a descriptor was opened for writing.
fn writable(info: &Path) -> bool {
    let text = std::fs::read_to_string(info).unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:")).map(str::trim);
    let flags = flags.and_then(|flags| i32::from_str_radix(flags, 8).ok());
    flags.is_some_and(|flags| matches!(flags & libc::O_ACCMODE, libc::O_WRONLY | libc::O_RDWR))
}

fn name_of(pid: &str) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}
