//! Reading the kernel's description of a block device.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::sys::stat::{major, minor};

use super::DevNo;
use crate::IoError;

/// One device in sysfs.
#[derive(Debug, Clone)]
pub(super) struct SysDevice {
    /// Its own directory.
    pub(super) dir: PathBuf,
    /// The directory of the whole disk; the same if it is one.
    pub(super) disk_dir: PathBuf,
}

pub(super) fn split(dev: u64) -> DevNo {
    // Both are at most 20 bits wide in Linux.
    (major(dev) as u32, minor(dev) as u32)
}

impl SysDevice {
    pub(super) fn of(dev: DevNo) -> Result<Self, IoError> {
        let link = PathBuf::from(format!("/sys/dev/block/{}:{}", dev.0, dev.1));
        let dir = fs::canonicalize(&link).map_err(|e| IoError::new("find block device", &link, e))?;
        let is_partition = dir.join("partition").exists();
        let disk_dir = match dir.parent() {
            Some(parent) if is_partition => parent.to_path_buf(),
            _ => dir.clone(),
        };
        Ok(Self { dir, disk_dir })
    }

    pub(super) fn is_partition(&self) -> bool {
        self.dir != self.disk_dir
    }

    /// The kernel's name: "sda1".
    pub(super) fn name(&self) -> String {
        name_of(&self.dir)
    }

    /// This device and, if it is a whole disk, its partitions: (name, directory).
    pub(super) fn with_partitions(&self) -> Result<Vec<(String, PathBuf)>, IoError> {
        let mut all = vec![(self.name(), self.dir.clone())];
        if !self.is_partition() {
            for name in list(&self.dir)? {
                let dir = self.dir.join(&name);
                if dir.join("partition").exists() {
                    all.push((name, dir));
                }
            }
        }
        Ok(all)
    }

    /// The file or device under a loop device; `None` for others and for a loop that is not set up.
    pub(super) fn loop_backing_file(&self) -> Option<PathBuf> {
        let text = fs::read_to_string(self.disk_dir.join("loop/backing_file")).ok()?;
        Some(PathBuf::from(text.trim_end_matches('\n')))
    }
}

pub(super) fn name_of(dir: &Path) -> String {
    // The kernel writes "cciss/c0d0" as "cciss!c0d0" in sysfs.
    dir.file_name().map(|name| name.to_string_lossy().replace('!', "/")).unwrap_or_default()
}

/// The trimmed text of an attribute; `None` if the kernel does not have it.
pub(super) fn text(path: &Path) -> Result<Option<String>, IoError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(IoError::new("read", path, e)),
    }
}

/// A number that the kernel may not have.
pub(super) fn number_if_there<T: FromStr>(path: &Path) -> Result<Option<T>, IoError> {
    let Some(text) = text(path)? else { return Ok(None) };
    match text.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => {
            let why = format!("{text:?} is not a number of the kind expected");
            Err(IoError::refused("understand", path, io::ErrorKind::InvalidData, why))
        }
    }
}

/// A number that every block device has.
pub(super) fn number<T: FromStr>(path: &Path) -> Result<T, IoError> {
    let absent = || IoError::refused("read", path, io::ErrorKind::NotFound, "the kernel does not have it");
    number_if_there(path)?.ok_or_else(absent)
}

/// A `dev` attribute: "8:1".
pub(super) fn dev_no(path: &Path) -> Result<DevNo, IoError> {
    let text = text(path)?.unwrap_or_default();
    parse_dev_no(&text).ok_or_else(|| {
        IoError::refused("understand", path, io::ErrorKind::InvalidData, format!("{text:?} is not major:minor"))
    })
}

pub(super) fn parse_dev_no(text: &str) -> Option<DevNo> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The names in a directory, sorted; none if it does not exist.
pub(super) fn list(dir: &Path) -> Result<Vec<String>, IoError> {
    let fail = |e| IoError::new("list", dir, e);
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(fail(e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(fail)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// The logical sector in bytes of the device with this `st_dev`; `None` if it is no block device.
pub(crate) fn logical_block_bytes_of_dev(dev: u64) -> Option<u32> {
    let device = SysDevice::of(split(dev)).ok()?;
    number(&device.disk_dir.join("queue/logical_block_size")).ok()
}
