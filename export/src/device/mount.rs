//! Mounting and unmounting of a FUSE file, without fusermount and libfuse: whoever sets up loop devices is root anyway.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use fuser::{Config, Session, SessionACL};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::fuse::OneFile;
use crate::disk::Disk;
use crate::error::{ExportError, ExportErrorKind};
use crate::limits::{DEVICE_THREADS, FUSE_REQUEST_BYTES_MAX};

const FUSE_DEVICE: &str = "/dev/fuse";
/// As `/proc/self/mountinfo` has it: how a stale mount of ours is told from others.
pub(super) const FS_TYPE: &str = "fuse.varve";
const MOUNTS: &str = "/proc/self/mountinfo";

/// A mounted FUSE file with the threads that answer for it.
#[derive(Debug)]
pub(super) struct Served {
    dir: PathBuf,
    file: PathBuf,
    session: Option<JoinHandle<io::Result<()>>>,
}

impl Served {
    /// Mounts on `dir`, which exists and is empty.
    pub(super) fn start(disk: Arc<dyn Disk>, dir: &Path, name: &str, read_only: bool) -> Result<Self, ExportError> {
        let device = open_fuse()?;
        mount_fuse(&device, dir, name, read_only)?;
        let file = file_name(dir.parent().unwrap_or(dir));
        let mut served = Self { dir: dir.to_owned(), file: dir.join(&file), session: None };
        let mut config = Config::default();
        config.n_threads = Some(DEVICE_THREADS);
        // A descriptor for each thread: replies do not meet at one lock.
        config.clone_fd = true;
        let failed = |e| ExportError::io(format!("cannot serve {}", dir.display()), &e, "see the kernel's log");
        let session =
            Session::from_fd(OneFile::new(disk, file, read_only), OwnedFd::from(device), SessionACL::Owner, config)
                .map_err(failed)?;
        let builder = thread::Builder::new().name(format!("fuse-{name}"));
        served.session = Some(builder.spawn(move || session.run()).map_err(failed)?);
        Ok(served)
    }

    /// The file that is the disk.
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Unmounts if nobody uses it, and ends the threads.
    pub(super) fn stop(&mut self) -> io::Result<()> {
        umount2(&self.dir, MntFlags::UMOUNT_NOFOLLOW)?;
        self.join();
        Ok(())
    }

    /// Ends it, used or not: who still uses it gets EIO.
    pub(super) fn abort(&mut self) {
        force_off(&self.dir);
        self.join();
    }

    fn join(&mut self) {
        match self.session.take().map(JoinHandle::join) {
            None | Some(Ok(Ok(()))) => {}
            Some(Ok(Err(e))) => tracing::warn!(dir = %self.dir.display(), "the FUSE session ended with an error: {e}"),
            Some(Err(_)) => tracing::error!(dir = %self.dir.display(), "the FUSE session panicked"),
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if self.session.is_some() || is_mounted(&self.dir) {
            self.abort();
        }
    }
}

/// The name of the file in every mount below `dir`, which is without symbolic links. A loop device that outlives its
/// mount (a daemon with a mount namespace of its own was killed; a mount was taken away from under a user) shows
/// nothing but this name, so it tells whose it was.
pub(super) fn file_name(dir: &Path) -> String {
    format!("varve-disk-{:016x}", path_hash(dir))
}

/// FNV-1a: the same in every version, unlike the standard library's.
pub(super) fn path_hash(path: &Path) -> u64 {
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    path.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325, mix)
}

fn open_fuse() -> Result<File, ExportError> {
    File::options().read(true).write(true).open(FUSE_DEVICE).map_err(|e| {
        let mut next = "load the kernel's FUSE (modprobe fuse), or serve the disk as NBD";
        if e.kind() == io::ErrorKind::PermissionDenied {
            next = "root is needed for a local block device; NBD goes without";
        }
        ExportError::new(ExportErrorKind::Missing, format!("cannot open {FUSE_DEVICE}"), e.to_string(), next)
    })
}

fn mount_fuse(device: &File, dir: &Path, name: &str, read_only: bool) -> Result<(), ExportError> {
    let mut flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    if read_only {
        flags |= MsFlags::MS_RDONLY;
    }
    // Only root may look into it: without allow_other the kernel keeps everybody else out.
    let options =
        format!("fd={},rootmode=40000,user_id=0,group_id=0,max_read={FUSE_REQUEST_BYTES_MAX}", device.as_raw_fd());
    mount(Some(name), dir, Some(FS_TYPE), flags, Some(options.as_str())).map_err(|e| {
        let next = "root (CAP_SYS_ADMIN) and a kernel with FUSE are needed; NBD goes without";
        ExportError::io(format!("cannot mount on {}", dir.display()), &e.into(), next)
    })
}

/// Aborts the connection of a mount: whatever waits for it gets an error, and so does everything after. Takes the mount
/// away, too, if nobody uses it.
pub(super) fn abort(dir: &Path) {
    let _ = umount2(dir, MntFlags::MNT_FORCE | MntFlags::UMOUNT_NOFOLLOW);
}

/// Takes a mount away, alive or dead, used or not: [`abort`] first, so that nothing hangs.
pub(super) fn force_off(dir: &Path) {
    for flags in [MntFlags::MNT_FORCE, MntFlags::MNT_DETACH] {
        if umount2(dir, flags | MntFlags::UMOUNT_NOFOLLOW).is_ok() {
            return;
        }
    }
}

fn is_mounted(dir: &Path) -> bool {
    ours_below(dir.parent().unwrap_or(dir)).is_ok_and(|all| all.iter().any(|mounted| mounted == dir))
}

/// The mounts of this crate's kind directly below `dir`, which must be a path without symbolic links.
pub(super) fn ours_below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let text = fs::read(MOUNTS)?;
    Ok(parse_mounts(&String::from_utf8_lossy(&text), dir))
}

fn parse_mounts(text: &str, dir: &Path) -> Vec<PathBuf> {
    let ours = text.lines().filter_map(|line| {
        // 36 35 98:0 /root /target rw,noatime master:1 - ext3 /dev/root rw,errors=continue
        let (left, right) = line.split_once(" - ")?;
        if right.split(' ').next()? != FS_TYPE {
            return None;
        }
        let target = PathBuf::from(unescape(left.split(' ').nth(4)?));
        (target.parent() == Some(dir)).then_some(target)
    });
    ours.collect()
}

/// Undoes the kernel's `\040` for a space and the like.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let octal = |d: &[u8]| {
            let text = std::str::from_utf8(d).ok()?;
            u8::from_str_radix(text, 8).ok()
        };
        match (byte == b'\\').then(|| after.get(..3).and_then(octal)).flatten() {
            Some(code) => {
                out.push(code);
                rest = &after[3..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_mounts_directly_below_are_found() {
        let text = "30 1 254:0 / / rw - ext4 /dev/vda rw\n\
            40 30 0:50 / /run/v\\040x/a rw,nodev - fuse.varve a rw,user_id=0\n\
            41 30 0:51 / /run/v\\040x/b rw - fuse.other b rw\n\
            42 30 0:52 / /run/v\\040x/c/d rw shared:3 - fuse.varve d rw\n\
            torn line\n";
        assert_eq!(parse_mounts(text, Path::new("/run/v x")), [PathBuf::from("/run/v x/a")]);
        assert_eq!(parse_mounts(text, Path::new("/run/v x/c")), [PathBuf::from("/run/v x/c/d")]);
        assert!(parse_mounts("", Path::new("/")).is_empty());
    }

    #[test]
    fn escapes_of_the_kernel() {
        assert_eq!(unescape(r"a\040b\134c"), r"a b\c");
        assert_eq!(unescape(r"a\9"), r"a\9");
        assert_eq!(unescape(r"a\777"), r"a\777");
    }
}
