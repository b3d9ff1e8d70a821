//! Filesystems on devices, and one in memory that can be filled.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};

use crate::{Output, Scratch, complain, run, run_ok};

/// A filesystem to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filesystem {
    /// ext4 with its usual features.
    Ext4,
    /// XFS.
    Xfs,
    /// btrfs; small volumes get mixed block groups.
    Btrfs,
}

impl Filesystem {
    /// All of them.
    pub const ALL: [Filesystem; 3] = [Filesystem::Ext4, Filesystem::Xfs, Filesystem::Btrfs];

    /// Smallest volume that every one of them accepts (XFS asks for 300 MiB).
    pub const BYTES_MIN: u64 = 320 << 20;

    /// Makes it on the device.
    #[track_caller]
    pub fn make(self, device: &Path) {
        let (program, force) = match self {
            Filesystem::Ext4 => ("mkfs.ext4", ["-q", "-F"].as_slice()),
            Filesystem::Xfs => ("mkfs.xfs", ["-q", "-f"].as_slice()),
            Filesystem::Btrfs => ("mkfs.btrfs", ["-q", "-f"].as_slice()),
        };
        undisturbed(|| run(Command::new(program).args(force).arg(device))).ok();
    }

    /// Checks an unmounted one without changing it; the tool's complaint, if any.
    pub fn check(self, device: &Path) -> Result<(), String> {
        let (program, words) = match self {
            Filesystem::Ext4 => ("e2fsck", ["-f", "-n"].as_slice()),
            Filesystem::Xfs => ("xfs_repair", ["-n"].as_slice()),
            Filesystem::Btrfs => ("btrfs", ["check", "--readonly"].as_slice()),
        };
        let out = undisturbed(|| run(Command::new(program).args(words).arg(device)));
        if out.code == 0 { Ok(()) } else { Err(format!("{}: {}{}", out.line, out.stdout, out.stderr)) }
    }
}

/// The tools of btrfs ask every mounted loop device for its file and give up at the first that does not answer: tests of
/// daemons that are killed under a mount have such a device for a moment, and they run beside this one.
fn undisturbed(mut tool: impl FnMut() -> Output) -> Output {
    let begin = Instant::now();
    loop {
        let out = tool();
        if !out.stderr.contains("check mount status") || begin.elapsed() > Duration::from_secs(30) {
            return out;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A mounted filesystem; `Drop` unmounts it.
#[derive(Debug)]
pub struct Mount(PathBuf);

impl Mount {
    /// Makes a filesystem on `device` and mounts it on a new directory `name` of `scratch`.
    #[track_caller]
    pub fn format(scratch: &Scratch, name: &str, filesystem: Filesystem, device: &Path) -> Self {
        filesystem.make(device);
        Self::existing(scratch, name, device, "defaults")
    }

    /// Mounts what is on `device`, with mount options such as `ro,noload`.
    #[track_caller]
    pub fn existing(scratch: &Scratch, name: &str, device: &Path, options: &str) -> Self {
        let point = scratch.dir(name);
        run(Command::new("mount").args(["-o", options]).arg(device).arg(&point)).ok();
        Mount(point)
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes out everything (syncfs).
    #[track_caller]
    pub fn sync(&self) {
        run_ok("sync", &[Path::new("--file-system"), &self.0]);
    }

    /// Runs `inside` while the filesystem is frozen: nothing is written to the device meanwhile.
    #[track_caller]
    pub fn frozen<T>(&self, inside: impl FnOnce() -> T) -> T {
        struct Thaw<'a>(&'a Path);
        impl Drop for Thaw<'_> {
            fn drop(&mut self) {
                let _ = run(Command::new("fsfreeze").arg("--unfreeze").arg(self.0));
            }
        }
        run_ok("fsfreeze", &[Path::new("--freeze"), &self.0]);
        let _thaw = Thaw(&self.0);
        inside()
    }

    /// Somebody else has unmounted it: a hook, say.
    #[track_caller]
    pub fn unmounted_by_others(mut self) {
        let point = std::mem::take(&mut self.0);
        assert!(!crate::scratch::mounts_below(&point).contains(&point), "{} is still mounted", point.display());
    }

    /// Unmounts now and panics if it is busy.
    #[track_caller]
    pub fn unmount(self) {
        drop(self);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.0.as_os_str().is_empty() {
            return;
        }
        let gone = umount2(&self.0, MntFlags::empty());
        if let Err(error) = gone {
            let _ = umount2(&self.0, MntFlags::MNT_DETACH);
            complain(&format!("umount {}: {error}", self.0.display()));
        }
    }
}

/// A small filesystem in memory, for what happens when a disk is full. `Drop` unmounts it.
#[derive(Debug)]
pub struct FullTmpfs(Mount);

impl FullTmpfs {
    /// With room for `bytes`, all of it free.
    #[track_caller]
    pub fn new(scratch: &Scratch, name: &str, bytes: u64) -> Self {
        let point = scratch.dir(name);
        let size = format!("size={bytes}");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&point)).ok();
        FullTmpfs(Mount(point))
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Fills it up to the last `leave` bytes (rounded to pages) with a ballast file.
    #[track_caller]
    pub fn fill(&self, leave: u64) {
        use nix::fcntl::{FallocateFlags, fallocate};
        let free = nix::sys::statvfs::statvfs(self.path()).unwrap();
        let free = free.blocks_free() * free.fragment_size();
        let file = File::create(self.path().join("ballast")).unwrap();
        if let Some(bytes) = free.checked_sub(leave).filter(|bytes| *bytes > 0) {
            fallocate(file, FallocateFlags::empty(), 0, bytes.cast_signed()).unwrap();
        }
    }

    /// Takes the ballast away again.
    pub fn free(&self) {
        let _ = std::fs::remove_file(self.path().join("ballast"));
    }
}
