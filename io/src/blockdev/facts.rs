//! The facts of one block device.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::mounts::{Mount, block_dev_of, mounts, swaps};
use super::sysfs::{SysDevice, dev_no, list, name_of, number, number_if_there, split, text};
use crate::IoError;

/// (major, minor) of a device.
pub type DevNo = (u32, u32);

/// The unit of `start` and `size` in sysfs, whatever the device's sector.
const SYSFS_SECTOR_BYTES: u64 = 512;
const SYS_BLOCK: &str = "/sys/block";

/// What the kernel says of a block device, at one moment. Sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockFacts {
    /// The path with all symbolic links resolved.
    pub path: PathBuf,
    /// The kernel's name: "sda1".
    pub name: String,
    /// Its number.
    pub dev: DevNo,
    /// The number of the whole disk; the same if it is one.
    pub disk: DevNo,
    /// The kernel's name of the whole disk: "sda".
    pub disk_name: String,
    /// Where the partition begins on the disk; 0 for a whole disk.
    pub start_bytes: u64,
    /// The size in whole logical sectors: what lies behind the last one nobody can read or write.
    pub bytes: u64,
    /// The smallest unit of I/O.
    pub logical_block_bytes: u32,
    /// The unit that the device writes without reading first.
    pub physical_block_bytes: u32,
    /// Whether the device, or its disk, refuses writes.
    pub read_only: bool,
    /// Whether the disk has zones that must be written in sequence (host-aware and host-managed).
    pub zoned: bool,
    /// Whether the driver can map its memory into processes. A file system on it *can* then bypass the
    /// block layer per file, even if no mount option says so (`dax=inode` is the default of ext4 and XFS).
    pub dax_capable: bool,
    /// Whether a file system on the device, or on one of its partitions, is mounted with DAX.
    pub dax_mounted: bool,
    /// Whether requests go through blk-mq (`block_rq_complete` fires); else the driver takes bios as
    /// they are (zram, brd, md, most of dm) and `block_bio_complete` is what tells the end of one.
    pub request_based: bool,
    /// Kernel names of the devices (dm, md, bcache) built on it or on one of its partitions.
    pub holders: Vec<String>,
    /// Devices (dm-multipath, mostly) on it, on one of its partitions or on its disk that pass on requests instead of bios: no bio
    /// of what is written through them is ever seen here.
    pub request_holders: Vec<PathBuf>,
    /// Mounts of it or of one of its partitions, seen from this mount namespace.
    pub mounts: Vec<Mount>,
    /// What of it is swapped on: kernel names of the device or its partitions.
    pub swaps: Vec<String>,
    /// The file or device under a loop device.
    pub loop_backing_file: Option<PathBuf>,
    /// The unit of a discard; 0 if it has none.
    pub discard_granularity_bytes: u64,
    /// The longest discard; 0 if it has none.
    pub discard_max_bytes: u64,
}

impl BlockFacts {
    /// Asks the kernel about the block device at `path` (symbolic links are followed).
    ///
    /// # Errors
    /// It does not exist ([`IoError::is_not_found`]); it is not a block device (kind `InvalidInput`); or
    /// sysfs or procfs cannot be read.
    pub fn of(path: impl AsRef<Path>) -> Result<Self, IoError> {
        let given = path.as_ref();
        let path = fs::canonicalize(given).map_err(|e| IoError::new("find", given, e))?;
        let stat = fs::metadata(&path).map_err(|e| IoError::new("look at", &path, e))?;
        if !stat.file_type().is_block_device() {
            let why = "it is not a block device";
            return Err(IoError::refused("use as a volume", given, io::ErrorKind::InvalidInput, why));
        }
        let dev = split(stat.rdev());
        let device = SysDevice::of(dev)?;
        let (own, disk) = (&device.dir, &device.disk_dir);
        let queue = disk.join("queue");

        let start_sectors: u64 = if device.is_partition() { number(&own.join("start"))? } else { 0 };
        let sectors: u64 = number(&own.join("size"))?;
        let all_bytes = sectors * SYSFS_SECTOR_BYTES;
        let logical_block_bytes: u32 = number(&queue.join("logical_block_size"))?;
        let read_only = number::<u8>(&own.join("ro"))? != 0 || number::<u8>(&disk.join("ro"))? != 0;
        let dax_capable = number_if_there::<u8>(&queue.join("dax"))?.unwrap_or(0) != 0;
        let uses = Uses::of(&device)?;
        Ok(Self {
            path,
            name: device.name(),
            dev,
            disk: dev_no(&disk.join("dev"))?,
            disk_name: name_of(disk),
            start_bytes: start_sectors * SYSFS_SECTOR_BYTES,
            bytes: all_bytes - all_bytes % u64::from(logical_block_bytes.max(1)),
            logical_block_bytes,
            physical_block_bytes: number(&queue.join("physical_block_size"))?,
            read_only,
            zoned: text(&queue.join("zoned"))?.is_some_and(|zoned| zoned != "none"),
            dax_capable,
            dax_mounted: uses.mounts.iter().any(|mount| is_dax(mount, dax_capable)),
            // The directory has one entry per hardware queue; drivers that take bios have none.
            request_based: !list(&disk.join("mq"))?.is_empty(),
            request_holders: request_holders(Path::new(SYS_BLOCK), &uses.holders, &list(&disk.join("holders"))?)?,
            holders: uses.holders,
            mounts: uses.mounts,
            swaps: uses.swaps,
            loop_backing_file: device.loop_backing_file(),
            discard_granularity_bytes: number_if_there(&queue.join("discard_granularity"))?.unwrap_or(0),
            discard_max_bytes: number_if_there(&queue.join("discard_max_bytes"))?.unwrap_or(0),
        })
    }

    /// Whether it is a partition of a disk.
    pub fn is_partition(&self) -> bool {
        self.dev != self.disk
    }
}

/// `dax` and `dax=always` are DAX for all files; `dax=inode` for some, where the device can.
fn is_dax(mount: &Mount, dax_capable: bool) -> bool {
    mount.has_option("dax") || mount.has_option("dax=always") || (dax_capable && mount.has_option("dax=inode"))
}

/// Those of the holders that have hardware queues of their own; see [`BlockFacts::request_holders`].
fn request_holders(sys_block: &Path, holders: &[String], of_disk: &[String]) -> Result<Vec<PathBuf>, IoError> {
    let mut found = Vec::new();
    for name in holders.iter().chain(of_disk.iter().filter(|name| !holders.contains(name))) {
        let dir = sys_block.join(name);
        if !list(&dir.join("mq"))?.is_empty() {
            let mapped = text(&dir.join("dm/name"))?.filter(|mapped| !mapped.is_empty());
            found.push(
                mapped.map_or_else(|| Path::new("/dev").join(name), |mapped| Path::new("/dev/mapper").join(mapped)),
            );
        }
    }
    Ok(found)
}

/// Who uses a device or, for a whole disk, one of its partitions.
struct Uses {
    holders: Vec<String>,
    mounts: Vec<Mount>,
    swaps: Vec<String>,
}

impl Uses {
    fn of(device: &SysDevice) -> Result<Self, IoError> {
        let (mut holders, mut devs) = (Vec::new(), Vec::new());
        for (name, dir) in device.with_partitions()? {
            holders.extend(list(&dir.join("holders"))?);
            devs.push((dev_no(&dir.join("dev"))?, name));
        }
        let on_it = |mount: &Mount| devs.iter().any(|(dev, _)| mount.is_on(*dev));
        let mounts = mounts()?.into_iter().filter(on_it).collect();
        let swap_devs: Vec<DevNo> = swaps()?.iter().filter_map(|path| block_dev_of(path)).collect();
        let swaps = devs.into_iter().filter(|(dev, _)| swap_devs.contains(dev)).map(|(_, name)| name).collect();
        Ok(Self { holders, mounts, swaps })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Test machines have no multipath: two targets that take bios (one of a kernel without the directory) and a path's.
    #[test]
    fn holders_that_pass_on_requests() {
        let sys = tempfile::tempdir().expect("temp dir");
        for dir in ["dm-0/mq", "dm-1/dm", "dm-2/mq/0", "dm-2/dm", "dm-3/mq/0"] {
            fs::create_dir_all(sys.path().join(dir)).expect("made");
        }
        fs::write(sys.path().join("dm-2/dm/name"), "mpatha\n").expect("written");
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let found = |holders: &[&str], of_disk: &[&str]| request_holders(sys.path(), &names(holders), &names(of_disk));
        assert_eq!(found(&["dm-0", "dm-1"], &["dm-0"]).expect("read"), Vec::<PathBuf>::new());
        assert_eq!(found(&["dm-1", "dm-2"], &["dm-2"]).expect("read"), [PathBuf::from("/dev/mapper/mpatha")]);
        assert_eq!(found(&[], &["dm-3"]).expect("read"), [PathBuf::from("/dev/dm-3")], "a partition of a path");
    }
}
