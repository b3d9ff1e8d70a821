//! Mounts and swaps of this mount namespace.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::DevNo;
use super::sysfs::{parse_dev_no, split};
use crate::IoError;

const MOUNTINFO: &str = "/proc/self/mountinfo";
const SWAPS: &str = "/proc/swaps";

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The kernel's number of the mount.
    pub id: u64,
    /// `st_dev` of the file system; its major number is 0 where it is not a device (btrfs, tmpfs, ...).
    pub dev: DevNo,
    /// Where it is mounted.
    pub target: PathBuf,
    /// The type: "ext4".
    pub fs_type: String,
    /// What was mounted: "/dev/sda1", "tmpfs".
    pub source: String,
    /// Options of the mount and of the file system, comma separated.
    pub options: String,
}

impl Mount {
    /// Whether an option is there: by itself ("dax") or with a value ("dax=always").
    pub fn has_option(&self, option: &str) -> bool {
        self.options.split(',').any(|o| o == option)
    }

    /// The value of an option ("upperdir").
    pub fn option_value(&self, name: &str) -> Option<&str> {
        self.options.split(',').find_map(|o| o.strip_prefix(name)?.strip_prefix('='))
    }

    /// The block device that `source` names, if it names one.
    pub(super) fn source_dev(&self) -> Option<DevNo> {
        block_dev_of(Path::new(&self.source))
    }

    /// Whether this file system is on the device, by `st_dev` or (btrfs) by its source.
    pub(super) fn is_on(&self, dev: DevNo) -> bool {
        self.dev == dev || (self.dev.0 == 0 && self.source_dev() == Some(dev))
    }

    fn parse(line: &str) -> Option<Self> {
        // 36 35 98:0 /root /target rw,noatime master:1 - ext3 /dev/root rw,errors=continue
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ');
        let (id, dev) = (left.next()?.parse().ok()?, parse_dev_no(left.nth(1)?)?);
        let (target, options) = (left.nth(1)?, left.next()?);
        let mut right = right.split(' ');
        let (fs_type, source) = (right.next()?, right.next()?);
        let super_options = right.next().unwrap_or_default();
        Some(Self {
            id,
            dev,
            target: PathBuf::from(unescape(target)),
            fs_type: fs_type.to_owned(),
            source: unescape(source),
            options: format!("{options},{}", unescape(super_options)),
        })
    }
}

/// The number of a block device by path; `None` if the path is anything else.
pub(super) fn block_dev_of(path: &Path) -> Option<DevNo> {
    let stat = fs::metadata(path).ok()?;
    stat.file_type().is_block_device().then(|| split(stat.rdev()))
}

/// All mounts that this process sees.
pub(super) fn mounts() -> Result<Vec<Mount>, IoError> {
    let bytes = fs::read(MOUNTINFO).map_err(|e| IoError::new("read", MOUNTINFO, e))?;
    Ok(String::from_utf8_lossy(&bytes).lines().filter_map(Mount::parse).collect())
}

/// The files and devices that are swapped on.
pub(super) fn swaps() -> Result<Vec<PathBuf>, IoError> {
    let bytes = match fs::read(SWAPS) {
        Ok(bytes) => bytes,
        // A kernel without swap.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(IoError::new("read", SWAPS, e)),
    };
    let text = String::from_utf8_lossy(&bytes);
    let names = text.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next());
    Ok(names.map(|name| PathBuf::from(unescape(name))).collect())
}

/// Undoes the kernel's `\040` for a space and the like.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = (first == b'\\').then(|| after.get(..3)).flatten().and_then(octal);
        match code {
            Some(byte) => {
                out.push(byte);
                rest = &after[3..];
            }
            None => {
                out.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn octal(digits: &[u8]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo() {
        let line = r"36 35 98:3 /mnt1 /mnt\040two rw,noatime master:1 shared:2 - ext3 /dev/root rw,dax=always";
        let mount = Mount::parse(line).expect("a mount");
        assert_eq!(mount.id, 36);
        assert_eq!(mount.dev, (98, 3));
        assert_eq!(mount.target, Path::new("/mnt two"));
        assert_eq!((mount.fs_type.as_str(), mount.source.as_str()), ("ext3", "/dev/root"));
        assert!(mount.has_option("noatime") && mount.has_option("dax=always") && !mount.has_option("dax"));
        assert_eq!(mount.option_value("dax"), Some("always"));
        assert_eq!(mount.option_value("da"), None);
    }

    #[test]
    fn lines_without_optional_fields_and_broken_ones() {
        let line = "22 27 0:21 / /proc rw,relatime - proc proc rw";
        assert_eq!(Mount::parse(line).expect("a mount").dev, (0, 21));
        for broken in ["", "22 27", "x 27 0:21 / /proc rw - proc proc rw", "22 27 21 / /proc rw - proc proc rw"] {
            assert_eq!(Mount::parse(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn escapes() {
        assert_eq!(unescape(r"a\040b\134\011"), "a b\\\t");
        assert_eq!(unescape(r"\9\04"), r"\9\04");
        assert_eq!(unescape(r"\777"), r"\777");
    }
}
