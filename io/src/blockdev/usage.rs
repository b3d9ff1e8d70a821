//! Who uses a file or device that an operator wants to give away.

use std::fs::{self, Metadata, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;

use super::facts::BlockFacts;
use super::mounts::swaps;
use super::sysfs::{SysDevice, list, split};

/// Who uses a file or device that shall become a replica, as text for the operator; `None` if nobody does, or
/// if it does not exist. What cannot be told counts as in use, with the reason.
///
/// A device: mounted, swapped on, held by dm or md, under a loop device, claimed by anybody with O_EXCL
/// (mounts in other namespaces, too); its partitions count. A file: swapped on, or under a loop device.
pub fn in_use(path: impl AsRef<Path>) -> Option<String> {
    let path = path.as_ref();
    let stat = match fs::metadata(path) {
        Ok(stat) => stat,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
        Err(e) => return Some(format!("it cannot be looked at: {e}")),
    };
    let user = if stat.file_type().is_block_device() { device_user(path) } else { Ok(None) };
    match user.and_then(|user| if user.is_some() { Ok(user) } else { anybody_above(&stat) }) {
        Ok(Some(user)) => Some(user),
        Ok(None) if stat.file_type().is_block_device() => claimed(path),
        Ok(None) => None,
        Err(e) => Some(format!("it cannot be told who uses it: {}", e.chain())),
    }
}

/// The same without opening it: what mounts, swaps, and devices above it tell. An open may wait for the device.
pub fn known_user(path: impl AsRef<Path>) -> Option<String> {
    device_user(path.as_ref()).ok().flatten()
}

fn device_user(path: &Path) -> Result<Option<String>, crate::IoError> {
    let facts = BlockFacts::of(path)?;
    if let Some(mount) = facts.mounts.first() {
        return Ok(Some(format!("{} ({}) is mounted on {}", mount.source, mount.fs_type, mount.target.display())));
    }
    if let Some(swap) = facts.swaps.first() {
        return Ok(Some(format!("{swap} is swapped on")));
    }
    Ok(facts.holders.first().map(|holder| format!("it is part of {holder}")))
}

/// A loop device over it, or a swap file.
fn anybody_above(stat: &Metadata) -> Result<Option<String>, crate::IoError> {
    for name in list(Path::new("/sys/block"))?.iter().filter(|name| name.starts_with("loop")) {
        let dir = PathBuf::from("/sys/block").join(name);
        let device = SysDevice { disk_dir: dir.clone(), dir };
        if device.loop_backing_file().is_some_and(|file| same(&file, stat)) {
            return Ok(Some(format!("it is under the loop device /dev/{name}")));
        }
    }
    let swapped = swaps()?.into_iter().find(|swap| same(swap, stat));
    Ok(swapped.map(|swap| format!("it is swapped on as {}", swap.display())))
}

fn same(path: &Path, stat: &Metadata) -> bool {
    let Ok(other) = fs::metadata(path) else { return false };
    if stat.file_type().is_block_device() {
        // By number: one device may have several nodes.
        return other.file_type().is_block_device() && split(other.rdev()) == split(stat.rdev());
    }
    (other.dev(), other.ino()) == (stat.dev(), stat.ino())
}

/// The kernel's own word: a claim by anybody else makes this open fail.
fn claimed(path: &Path) -> Option<String> {
    // Read-only, so that closing it does not make udev probe the device as after a write.
    match OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path) {
        Ok(_) => None,
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            Some("another program or the kernel has claimed it (O_EXCL)".to_owned())
        }
        Err(e) => Some(format!("it cannot be opened: {e}")),
    }
}
