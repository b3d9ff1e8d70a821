//! Which disks are under a path.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;

use super::DevNo;
use super::mounts::{Mount, block_dev_of, mounts};
use super::sysfs::{SysDevice, dev_no, list, split};
use crate::IoError;

/// How many layers (loop on md on dm on loop ...) are followed before giving up.
const LAYERS_MAX: usize = 32;

/// File systems that are on no disk of this host.
const DISKLESS: &[&str] = &[
    "9p",
    "afs",
    "autofs",
    "bpf",
    "ceph",
    "cgroup",
    "cgroup2",
    "cifs",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "lustre",
    "mqueue",
    "nfs",
    "nfs4",
    "proc",
    "pstore",
    "ramfs",
    "rootfs",
    "securityfs",
    "smb3",
    "sysfs",
    "tmpfs",
    "tracefs",
    "virtiofs",
];

/// All disks whose content a write to the file system of `path` changes: the whole disk that holds it, and
/// whatever that stands on (dm, md, the file system of a loop device's file), every layer included. Sorted.
/// If `path` is a block device, the disks under the device itself.
///
/// Empty for file systems without a disk (tmpfs, NFS). Several for btrfs on several devices, RAID, LVM.
///
/// # Errors
/// If `path` does not exist, or if it cannot be told (a file system that Varve does not know, such as ZFS):
/// never an incomplete answer.
pub fn disks_behind(path: impl AsRef<Path>) -> Result<Vec<DevNo>, IoError> {
    let mut walk = Walk { asked: path.as_ref().to_path_buf(), mounts: mounts()?, found: BTreeSet::new() };
    walk.path(path.as_ref(), 0)?;
    Ok(walk.found.into_iter().collect())
}

struct Walk {
    asked: PathBuf,
    mounts: Vec<Mount>,
    found: BTreeSet<DevNo>,
}

impl Walk {
    fn unknown(&self, why: String) -> IoError {
        IoError::refused("tell which disks are under", &self.asked, io::ErrorKind::Unsupported, why)
    }

    fn path(&mut self, path: &Path, layer: usize) -> Result<(), IoError> {
        if layer > LAYERS_MAX {
            return Err(self.unknown(format!("more than {LAYERS_MAX} layers, last {}", path.display())));
        }
        let stat = fs::metadata(path).map_err(|e| IoError::new("look at", path, e))?;
        if stat.file_type().is_block_device() {
            return self.device(split(stat.rdev()), layer);
        }
        let dev = split(stat.dev());
        if dev.0 != 0 { self.device(dev, layer) } else { self.anonymous(path, layer) }
    }

    /// A disk or partition, by number: its disk, then what the disk stands on.
    fn device(&mut self, dev: DevNo, layer: usize) -> Result<(), IoError> {
        if layer > LAYERS_MAX {
            return Err(self.unknown(format!("more than {LAYERS_MAX} layers, last {}:{}", dev.0, dev.1)));
        }
        let device = SysDevice::of(dev)?;
        if !self.found.insert(dev_no(&device.disk_dir.join("dev"))?) {
            return Ok(());
        }
        // Slaves of dm and md are named after partitions as well as disks: each entry is a link to either.
        let slaves = device.disk_dir.join("slaves");
        for name in list(&slaves)? {
            self.device(dev_no(&slaves.join(name).join("dev"))?, layer + 1)?;
        }
        match device.loop_backing_file() {
            // A removed file lives on without a name: its disk cannot be found by name any more.
            Some(file) if file.to_string_lossy().ends_with(" (deleted)") => {
                Err(self.unknown(format!("the file of loop device {} was removed", device.name())))
            }
            Some(file) => self.path(&file, layer + 1),
            None => Ok(()),
        }
    }

    /// A file system whose `st_dev` is no device: its mount tells more.
    fn anonymous(&mut self, path: &Path, layer: usize) -> Result<(), IoError> {
        let id = mount_id(path)?;
        let Some(mount) = self.mounts.iter().find(|mount| mount.id == id).cloned() else {
            return Err(self.unknown(format!("mount {id} is not in this namespace")));
        };
        let kind = mount.fs_type.as_str();
        if DISKLESS.contains(&kind) || kind.starts_with("fuse.") || kind == "fuse" {
            return Ok(());
        }
        if kind == "overlay" {
            return self.overlay(&mount, layer);
        }
        // bcachefs names all of its devices, separated by colons.
        let mut devs = Vec::new();
        for source in mount.source.split(':') {
            match block_dev_of(Path::new(source)) {
                Some(dev) => devs.push(dev),
                None => return Err(self.unknown(format!("{kind} from {} is not on a block device", mount.source))),
            }
        }
        if kind == "btrfs" {
            devs.extend(btrfs_companions(&devs)?);
        }
        devs.into_iter().try_for_each(|dev| self.device(dev, layer + 1))
    }

    /// Writes go to the upper directory; without one to nothing, but the lower ones are what is read.
    fn overlay(&mut self, mount: &Mount, layer: usize) -> Result<(), IoError> {
        let dirs: Vec<PathBuf> = match (mount.option_value("upperdir"), mount.option_value("lowerdir")) {
            (Some(upper), _) => vec![PathBuf::from(upper)],
            (None, Some(lower)) => lower.split(':').filter(|d| !d.is_empty()).map(PathBuf::from).collect(),
            (None, None) => return Err(self.unknown("the overlay does not name its directories".to_owned())),
        };
        for dir in dirs {
            // In a container these are paths of another mount namespace: not guessed at.
            if fs::metadata(&dir).is_err() {
                return Err(self.unknown(format!("the overlay's directory {} is not visible here", dir.display())));
            }
            self.path(&dir, layer + 1)?;
        }
        Ok(())
    }
}

/// The mount that a path lies on. btrfs gives each subvolume an `st_dev` of its own that no mount has, so
/// the number of the mount is what identifies it.
fn mount_id(path: &Path) -> Result<u64, IoError> {
    let fail = |e| IoError::new("find the mount of", path, e);
    let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).map_err(fail)?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).map_err(fail)?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    id.ok_or_else(|| fail(io::Error::new(io::ErrorKind::InvalidData, "no mnt_id in fdinfo")))
}

/// The other devices of the btrfs file systems that these belong to.
fn btrfs_companions(devs: &[DevNo]) -> Result<Vec<DevNo>, IoError> {
    let root = Path::new("/sys/fs/btrfs");
    for uuid in list(root)? {
        let dir = root.join(uuid).join("devices");
        let mut members = Vec::new();
        for name in list(&dir)? {
            members.push(dev_no(&dir.join(name).join("dev"))?);
        }
        if members.iter().any(|member| devs.contains(member)) {
            return Ok(members);
        }
    }
    Ok(Vec::new())
}
