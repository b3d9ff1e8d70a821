//! Facts of real devices: loops, their partitions, zram, file systems on them. All of it needs root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use common::{Detach, Loop, Mounted, Zram, disk_dir, mkfs_btrfs, need_root, run, sparse_file, tmpfs_dir};
use nix::sys::stat::{major, minor};
use varve_io::DirectFile;
use varve_io::blockdev::{BlockFacts, DevNo, disks_behind, in_use, is_another};

fn dev_of(path: &Path) -> DevNo {
    let dev = fs::metadata(path).unwrap().rdev();
    (major(dev) as u32, minor(dev) as u32)
}

#[test]
fn what_is_no_block_device() {
    let dir = tmpfs_dir();
    assert!(BlockFacts::of(dir.path().join("none")).unwrap_err().is_not_found());
    for path in [sparse_file(dir.path(), "f", 1), dir.path().to_path_buf(), "/dev/null".into()] {
        let error = BlockFacts::of(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.chain().ends_with("it is not a block device"), "{}", error.chain());
    }
}

#[test]
fn a_loop_device_by_a_symbolic_link() {
    let device = Loop::new((10 << 20) + 512, 512);
    let dir = tmpfs_dir();
    let link = dir.path().join("link");
    symlink(&device.path, &link).unwrap();
    let facts = BlockFacts::of(&link).unwrap();
    assert_eq!(facts.path, device.path);
    assert_eq!((facts.name.as_str(), facts.disk_name.as_str()), (device.name().as_str(), device.name().as_str()));
    assert_eq!((facts.dev, facts.disk), (dev_of(&device.path), dev_of(&device.path)));
    assert_eq!((facts.start_bytes, facts.bytes), (0, (10 << 20) + 512));
    assert_eq!(facts.logical_block_bytes, 512);
    assert!(facts.request_based && !facts.read_only && !facts.zoned && !facts.dax_mounted && !facts.is_partition());
    assert_eq!(facts.loop_backing_file.as_deref(), Some(device.backing.as_path()));
    let identity = facts.identity().unwrap();
    let file = device.backing.to_str().unwrap();
    assert_eq!((identity.len(), identity["loop-file"].as_str()), (1, file));
    assert!(facts.holders.is_empty() && facts.mounts.is_empty() && facts.swaps.is_empty());
    assert!(facts.discard_max_bytes > 0 && facts.discard_granularity_bytes > 0);
    assert_eq!(in_use(&device.path), None);
    let user = in_use(&device.backing).unwrap();
    assert!(user.contains(device.path.to_str().unwrap()), "{user}");
}

#[test]
fn sectors_of_4096_and_an_end_that_cannot_be_reached() {
    let device = Loop::new((10 << 20) + 512, 4096);
    let facts = BlockFacts::of(&device.path).unwrap();
    assert_eq!((facts.logical_block_bytes, facts.bytes), (4096, 10 << 20));
    assert_eq!(DirectFile::open_read(&device.path).unwrap().len(), facts.bytes);
}

#[test]
fn partitions_and_who_mounts_them() {
    let device = Loop::with(64 << 20, &["--partscan"]);
    let parts = device.partition("label: gpt\nstart=2048, size=32768\nsize=16384\n", 2);
    let facts = BlockFacts::of(&parts[0]).unwrap();
    assert_eq!(facts.disk_name, device.name());
    assert_eq!(facts.name, format!("{}p1", device.name()));
    assert_eq!((facts.dev, facts.disk), (dev_of(&parts[0]), dev_of(&device.path)));
    assert_eq!((facts.start_bytes, facts.bytes), (1 << 20, 16 << 20));
    assert!(facts.is_partition() && facts.request_based);
    let identity = facts.identity().unwrap();
    assert_eq!(identity["partition-place"], "1 at 1048576");
    let second = BlockFacts::of(&parts[1]).unwrap();
    assert_eq!((second.start_bytes, second.bytes), (17 << 20, 8 << 20));
    assert!(is_another(&identity, &identity).is_none());
    assert!(is_another(&identity, &second.identity().unwrap()).is_some());

    run("mkfs.ext4", &["-q", parts[0].to_str().unwrap()]);
    let mount = Mounted::new(&[parts[0].to_str().unwrap()]);
    for path in [&parts[0], &device.path] {
        let facts = BlockFacts::of(path).unwrap();
        assert_eq!(facts.mounts.len(), 1);
        assert_eq!((facts.mounts[0].target.as_path(), facts.mounts[0].fs_type.as_str()), (mount.path(), "ext4"));
        let user = in_use(path).unwrap();
        assert!(user.contains(mount.path().to_str().unwrap()), "{user}");
    }
    assert!(BlockFacts::of(&parts[1]).unwrap().mounts.is_empty());
    assert_eq!(in_use(&parts[1]), None);
    assert_eq!(disks_behind(mount.path()).unwrap(), [dev_of(&device.path)]);
    assert_eq!(disks_behind(&parts[1]).unwrap(), [dev_of(&device.path)]);
}

#[test]
fn read_only_loop() {
    let device = Loop::with(1 << 20, &["--read-only"]);
    assert!(BlockFacts::of(&device.path).unwrap().read_only);
}

#[test]
fn zram_takes_bios_and_swap_is_seen() {
    let zram = Zram::new(16 << 20);
    let facts = BlockFacts::of(zram.path()).unwrap();
    assert!(!facts.request_based, "zram has no blk-mq");
    assert_eq!((facts.bytes, facts.loop_backing_file.as_ref()), (16 << 20, None));
    assert_eq!(in_use(zram.path()), None);
    let path = zram.path();
    struct SwapOff<'a>(&'a Path);
    impl Drop for SwapOff<'_> {
        fn drop(&mut self) {
            let _ = std::process::Command::new("swapoff").arg(self.0).status();
        }
    }
    run("mkswap", &[path.to_str().unwrap()]);
    let _off = SwapOff(&path);
    run("swapon", &[path.to_str().unwrap()]);
    assert_eq!(BlockFacts::of(&path).unwrap().swaps.len(), 1);
    assert!(in_use(&path).unwrap().contains("swapped on"));
}

#[test]
fn a_claim_counts_as_use() {
    let device = Loop::new(1 << 20, 512);
    let claim = DirectFile::open_rw_exclusive(&device.path).unwrap();
    assert!(in_use(&device.path).unwrap().contains("claimed"));
    drop(claim);
    assert_eq!(in_use(&device.path), None);
    assert_eq!(in_use("/dev/varve-none"), None);
}

#[test]
fn disks_under_plain_paths() {
    need_root();
    let shm = tmpfs_dir();
    assert_eq!(disks_behind(shm.path()).unwrap(), []);
    assert_eq!(disks_behind("/proc/self").unwrap(), []);
    assert!(disks_behind("/none/such").unwrap_err().is_not_found());
    let disk = disk_dir();
    let found = disks_behind(disk.path()).unwrap();
    assert!(!found.is_empty());
    assert!(found.iter().all(|d| Path::new(&format!("/sys/dev/block/{}:{}", d.0, d.1)).exists()));
}

/// A loop's file on ext4 on a loop on the disk: every layer is named.
#[test]
fn disks_under_stacked_loops() {
    let outer = Loop::new(64 << 20, 512);
    run("mkfs.ext4", &["-q", outer.path.to_str().unwrap()]);
    let mount = Mounted::new(&[outer.path.to_str().unwrap()]);
    let file = sparse_file(mount.path(), "inner", 16 << 20);
    let inner = Detach(run("losetup", &["--find", "--show", file.to_str().unwrap()]));
    let mut both = vec![dev_of(&outer.path), dev_of(Path::new(&inner.0))];
    both.sort();
    assert_eq!(disks_behind(&inner.0).unwrap(), both);
    fs::remove_file(&file).unwrap();
    assert!(BlockFacts::of(&inner.0).unwrap().identity().unwrap().is_empty());
    let error = disks_behind(&inner.0).unwrap_err();
    assert!(error.chain().contains("was removed"), "{}", error.chain());
    drop(inner);
}

/// btrfs has an `st_dev` of its own, subvolumes have more, and one file system may have several disks.
#[test]
fn disks_under_btrfs_of_two_devices() {
    let (a, b) = (Loop::new(128 << 20, 512), Loop::new(128 << 20, 512));
    mkfs_btrfs(&["-q", "-d", "single", a.path.to_str().unwrap(), b.path.to_str().unwrap()]);
    let mount = Mounted::new(&[a.path.to_str().unwrap()]);
    let sub = mount.path().join("sub");
    run("btrfs", &["-q", "subvolume", "create", sub.to_str().unwrap()]);
    let mut both = vec![dev_of(&a.path), dev_of(&b.path)];
    both.sort();
    assert_eq!(disks_behind(mount.path()).unwrap(), both);
    assert_eq!(disks_behind(&sub).unwrap(), both);
    assert!(in_use(&a.path).unwrap().contains("mounted"));
    // The second device is in no line of mountinfo: the kernel's claim tells.
    assert!(in_use(&b.path).unwrap().contains("claimed"));
}

#[test]
fn disks_under_an_overlay() {
    let device = Loop::new(64 << 20, 512);
    run("mkfs.ext4", &["-q", device.path.to_str().unwrap()]);
    let disk = Mounted::new(&[device.path.to_str().unwrap()]);
    for name in ["lower", "upper", "work"] {
        fs::create_dir(disk.path().join(name)).unwrap();
    }
    let at = disk.path().display();
    let options = format!("lowerdir={at}/lower,upperdir={at}/upper,workdir={at}/work");
    let overlay = Mounted::new(&["-t", "overlay", "overlay", "-o", &options]);
    assert_eq!(disks_behind(overlay.path()).unwrap(), [dev_of(&device.path)]);
}
