//! Directories for a test's files, and the sweep of what killed tests left.

use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::mount::{MntFlags, umount2};

use crate::{complain, run_ok};

const PREFIX: &str = "varve-test-";

/// A directory that goes away with everything mounted below it.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// On a real disk: `VARVE_TEST_DIR`, else `/var/tmp`.
    pub fn disk() -> Self {
        Self::below(&std::env::var_os("VARVE_TEST_DIR").map_or_else(|| "/var/tmp".into(), PathBuf::from))
    }

    /// In memory.
    pub fn memory() -> Self {
        Self::below(Path::new("/dev/shm"))
    }

    /// In a directory of another one, on a filesystem of its own, say.
    pub fn inside(base: &Path) -> Self {
        Self::below(base)
    }

    fn below(base: &Path) -> Self {
        static SWEEP: Once = Once::new();
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        crate::require_root();
        SWEEP.call_once(|| {
            sweep(Path::new("/dev/shm"));
            sweep(base);
        });
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // Short, because paths of Unix sockets below it end at 107 bytes; with the process id, for the sweep.
        let path = base.join(format!("{PREFIX}{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Scratch(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A path in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A sparse file in it.
    pub fn file(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.join(name);
        std::fs::File::create_new(&path)
            .and_then(|file| file.set_len(bytes))
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        path
    }

    /// A directory in it.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            complain(&format!("{}: {error}", self.0.display()));
        }
    }
}

/// Mount points at or below `path`, in the order in which they were mounted.
pub(crate) fn mounts_below(path: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    points.filter(|point| point.starts_with(path)).collect()
}

fn remove(path: &Path) -> std::io::Result<()> {
    for point in mounts_below(path).iter().rev() {
        umount2(point, MntFlags::empty()).or_else(|_| umount2(point, MntFlags::MNT_DETACH))?;
    }
    std::fs::remove_dir_all(path)
}

/// Takes away what tests left that were killed: their mounts, loop devices and directories.
fn sweep(base: &Path) {
    // A zombie that nobody reaps still has its /proc entry, but no command line.
    let alive = |pid: u32| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty());
    let mine = |name: &str| -> Option<u32> { name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok() };
    let Ok(entries) = std::fs::read_dir(base) else {
        return;
    };
    let dead: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| {
            let pid = entry.file_name().to_str().and_then(mine);
            pid.is_some_and(|pid| !alive(pid))
        })
        .map(|entry| entry.path())
        .collect();
    for dir in dead {
        for point in mounts_below(&dir).iter().rev() {
            let _ = umount2(point, MntFlags::MNT_DETACH);
        }
        for line in run_ok("losetup", &["--list", "--noheadings", "--raw", "--output", "NAME,BACK-FILE"]).lines() {
            if let Some((device, file)) = line.split_once(' ')
                && Path::new(file).starts_with(&dir)
            {
                let _ = crate::run(std::process::Command::new("losetup").args(["--detach", device]));
            }
        }
        eprintln!("swept {}, left by a test that was killed", dir.display());
        let _ = std::fs::remove_dir_all(dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LoopDevice, MIB, Mount};

    #[test]
    fn sweep_takes_what_a_killed_test_left_and_nothing_else() {
        let scratch = Scratch::memory();
        let mut dead = std::process::Command::new("true").spawn().unwrap();
        let pid = dead.id();
        dead.wait().unwrap();
        let left = Scratch(scratch.dir(&format!("{PREFIX}{pid}-0")));
        let alive = scratch.dir(&format!("{PREFIX}{}-999", std::process::id()));
        let device = LoopDevice::new(&left, "disk", 16 * MIB);
        let mount = Mount::format(&left, "mount", crate::Filesystem::Ext4, device.path());
        let name = device.path().to_string_lossy().into_owned();
        std::mem::forget((mount, device));
        let path = left.path().to_owned();
        std::mem::forget(left);

        sweep(scratch.path());
        assert!(!path.exists() && alive.exists());
        assert!(mounts_below(&path).is_empty());
        crate::wait_until(std::time::Duration::from_secs(5), "the loop device is free", || {
            !run_ok("losetup", &["--list", "--noheadings", "--output", "NAME,BACK-FILE"])
                .lines()
                .any(|line| line.contains(&name) && line.contains(&*path.to_string_lossy()))
        });
    }
}
