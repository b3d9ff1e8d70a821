//! A disk as a local block device: a FUSE file under a loop device.
//!
//! ```text
//! reader → /dev/loopN → loop (direct I/O) → FUSE file DIR/NAME/varve-disk-* → threads of this process → Disk
//! ```
//!
//! It works on every kernel that has FUSE and loop devices, without modules of others. ublk would save the way through
//! two drivers; its place is here, beside [`attach`], behind the same [`Attached`]: where `/dev/ublk-control` exists
//! `attach` would use it and [`Attached::how`] would say so.
//!
//! **Nothing hangs.** The threads of a session never touch their own mount: everything that enters it from this process
//! (losetup, unmounting) happens in the thread of the caller. If this process dies, the kernel closes its `/dev/fuse` and every
//! request, waiting or new, fails with EIO; the dead mount and its loop device stay until [`clean`] finds them.
//!
//! Not solved: a *writable* device with much dirty memory on a machine that is out of memory. The threads here may then
//! wait for memory that is freed only by writing to this device. The kernel's remedy is `PR_SET_IO_FLUSHER`.

mod clean;
mod fuse;
mod losetup;
mod mount;

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use varve_io::blockdev::in_use;

pub use clean::{Cleaned, clean};

use crate::disk::Disk;
use crate::error::{ExportError, ExportErrorKind};
use crate::limits::{DISK_BYTES_MAX, LOOP_GONE_TIMEOUT, NAME_BYTES_MAX};
use mount::Served;

/// The mounts of this process that are alive: [`clean`] leaves them alone.
static ALIVE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// A disk that is attached as a local block device. Dropping it takes the device away even if it is used: its users get
/// EIO. [`Attached::detach`] refuses that.
#[derive(Debug)]
pub struct Attached {
    device: PathBuf,
    dir: PathBuf,
    served: Served,
    /// The loop device was told to go.
    told: bool,
    gone: bool,
}

/// Attaches `disk` as a local block device. `dir` is a directory of this daemon alone (made 0700 if missing); the mount
/// is `dir/name`. Blocks for some milliseconds.
///
/// # Errors
/// A name that is no file name, a size that is no multiple of 512, an attached disk of that name, no FUSE, no
/// loop devices, no losetup, no permission.
pub fn attach(disk: Arc<dyn Disk>, dir: &Path, name: &str, read_only: bool) -> Result<Attached, ExportError> {
    check(disk.as_ref(), name)?;
    let read_only = read_only || disk.is_read_only();
    let dir = private_dir(dir)?;
    let place = Place::make(dir.join(name))?;
    let served = Served::start(disk, &place.0, name, read_only)?;
    let device = losetup::set_up(served.file(), read_only)?;
    if !losetup::is_direct(&device) {
        tracing::warn!(device = %device.display(), "the loop device reads through the page cache; it will be slow");
    }
    let dir = place.keep();
    Ok(Attached { device, dir, served, told: false, gone: false })
}

impl Attached {
    /// The block device: `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.device
    }

    /// The directory that the FUSE file is mounted on.
    pub fn mount_dir(&self) -> &Path {
        &self.dir
    }

    /// The FUSE file under the loop device: for tests, and for whoever wants to seek its holes.
    pub fn file(&self) -> &Path {
        self.served.file()
    }

    /// How it is attached, for the operator.
    pub fn how(&self) -> &'static str {
        "fuse+loop"
    }

    /// Who uses the device (a mount, a swap, dm, md, an exclusive open), as text; `None` if nobody does.
    pub fn in_use(&self) -> Option<String> {
        if self.gone || losetup::backing_file(&self.device)? != self.served.file() {
            return None;
        }
        in_use(&self.device)
    }

    /// Takes the device away if nobody uses it. After an error it is still there and this can be tried again. Blocks for
    /// some milliseconds, or up to 5 s while somebody has the device open.
    ///
    /// # Errors
    /// It is in use, with who uses it; or the kernel refuses a step.
    pub fn detach(&mut self) -> Result<(), ExportError> {
        if self.gone {
            return Ok(());
        }
        if let Some(user) = self.in_use() {
            return Err(self.used(user));
        }
        if !self.told {
            losetup::take_down(&self.device)?;
            self.told = true;
        }
        wait(|| losetup::backing_file(&self.device).as_deref() != Some(self.served.file()))
            .then_some(())
            .ok_or_else(|| self.used("a program has it open; it goes away when that closes it".to_owned()))?;
        // The kernel lets go of the file a moment after the device is gone.
        let mut last = Ok(());
        if !wait(|| {
            last = self.served.stop();
            !matches!(&last, Err(e) if e.kind() == io::ErrorKind::ResourceBusy)
        }) {
            return Err(self.used(format!("a program uses {}", self.dir.display())));
        }
        last.map_err(|e| {
            ExportError::io(format!("cannot unmount {}", self.dir.display()), &e, "unmount it by hand (umount -f)")
        })?;
        self.forget();
        Ok(())
    }

    fn used(&self, why: String) -> ExportError {
        let next = format!("end that (fuser -vm {0}, umount {0}) and try again", self.device.display());
        ExportError::new(ExportErrorKind::InUse, format!("cannot detach {}", self.device.display()), why, next)
    }

    fn forget(&mut self) {
        self.gone = true;
        release(&self.dir);
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if self.gone {
            return;
        }
        if self.in_use().is_none() && self.detach().is_ok() {
            return;
        }
        tracing::warn!(device = %self.device.display(), "the device goes away while it is used; its users get EIO");
        let ours = losetup::backing_file(&self.device).as_deref() == Some(self.served.file());
        if !self.told
            && ours
            && let Err(e) = losetup::take_down(&self.device)
        {
            tracing::warn!("{e}");
        }
        self.served.abort();
        self.forget();
    }
}

fn check(disk: &dyn Disk, name: &str) -> Result<(), ExportError> {
    let unfit = |why: String, next: &str| {
        Err(ExportError::new(ExportErrorKind::Unfit, format!("cannot attach {name:?}"), why, next))
    };
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.starts_with('.') || name.contains(['/', '\0']) {
        return unfit("that is no name for a file".to_owned(), "choose letters, digits, dashes");
    }
    let len = disk.len();
    if len == 0 || !len.is_multiple_of(512) || len > DISK_BYTES_MAX {
        return unfit(format!("a block device cannot have {len} bytes"), "only multiples of 512 can be attached");
    }
    Ok(())
}

/// Makes the directory if it is missing; its path without symbolic links, as the kernel will tell it.
fn private_dir(dir: &Path) -> Result<PathBuf, ExportError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir).and_then(|()| fs::canonicalize(dir));
    made.map_err(|e| ExportError::io(format!("cannot make {}", dir.display()), &e, "check the directory above it"))
}

/// Polls for [`LOOP_GONE_TIMEOUT`]: there is no event for a loop device that goes away.
fn wait(mut done: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    loop {
        if done() {
            return true;
        }
        if begin.elapsed() > LOOP_GONE_TIMEOUT {
            return false;
        }
        thread::sleep(Duration::from_millis(1).max(begin.elapsed() / 8));
    }
}

/// The directory of one mount, taken away again unless it is kept.
struct Place(PathBuf);

impl Place {
    fn make(dir: PathBuf) -> Result<Self, ExportError> {
        let mut alive = ALIVE.lock().unwrap_or_else(PoisonError::into_inner);
        match DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => {
                alive.insert(dir.clone());
                Ok(Self(dir))
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(ExportError::new(
                ExportErrorKind::Exists,
                format!("cannot attach at {}", dir.display()),
                "it exists",
                "detach what is there; what an earlier life left is cleaned at the daemon's start",
            )),
            Err(e) => Err(ExportError::io(format!("cannot make {}", dir.display()), &e, "check the directory")),
        }
    }

    fn keep(mut self) -> PathBuf {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            release(&self.0);
        }
    }
}

/// The directory goes and its name is free again.
fn release(dir: &Path) {
    let mut alive = ALIVE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(e) = fs::remove_dir(dir) {
        tracing::warn!(dir = %dir.display(), "cannot remove the directory of a mount: {e}");
    }
    alive.remove(dir);
}
