//! A disk as a local block device: by ublk where the kernel offers it, else a FUSE file under a loop device.
//!
//! ```text
//! reader → /dev/ublkbN → threads of this process → Disk
//! reader → /dev/loopN → loop (direct I/O) → FUSE file DIR/NAME/varve-disk-* → threads of this process → Disk
//! ```
//!
//! The second works on every kernel that has FUSE and loop devices; [`Attached::how`] says which it is. It is taken if ublk fails,
//! and for what must not be taken away from a program that has it open and is still: of a ublk disk the kernel tells who has
//! claimed it (a mount, dm, an exclusive open), and nobody else. What is seen here is whether something is asked ([`Way`]).
//!
//! **Nothing hangs.** The threads of a session never touch their own mount: everything that enters it from this process
//! (losetup, unmounting) happens in the thread of the caller. If this process dies, the kernel closes its `/dev/fuse` and every
//! request, waiting or new, fails with EIO; the dead mount and its loop device stay until [`clean`] finds them. A ublk disk goes
//! with its process, and what [`clean`] finds is the kernel's number of it. What the kernel does for a ublk disk on behalf of this
//! process (making it, taking it away) keeps the process until it is done, killed or not, so no disk is waited for in it: nothing is
//! read in the making, and from the first step of taking it away on, all that is asked fails at once.
//!
//! Not solved: a *writable* device with much dirty memory on a machine that is out of memory. The threads here may then
//! wait for memory that is freed only by writing to this device. The kernel's remedy is `PR_SET_IO_FLUSHER`.

mod clean;
mod fuse;
mod losetup;
mod mount;
mod ublk;

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use varve_io::blockdev::{in_use, known_user};

pub use clean::{Cleaned, clean};

use crate::disk::Disk;
use crate::error::{ExportError, ExportErrorKind};
use crate::limits::{DEVICE_GONE_TIMEOUT, DISK_BYTES_MAX, NAME_BYTES_MAX};
use mount::Served;

/// The mounts of this process that are alive: [`clean`] leaves them alone.
static ALIVE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// A disk that is attached as a local block device. Dropping it takes the device away even if it is used
/// ([`Attached::take_away`]). [`Attached::detach`] refuses that.
#[derive(Debug)]
pub struct Attached {
    device: PathBuf,
    dir: PathBuf,
    by: By,
    gone: bool,
}

#[derive(Debug)]
enum By {
    Ublk(Box<ublk::Served>),
    Loop {
        served: Served,
        /// The loop device was told to go.
        told: bool,
    },
}

/// By what a disk is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// ublk if the kernel offers it, else the other.
    Fastest,
    /// A loop device: the kernel knows who has it open, so that it is not taken away from anybody.
    Loop,
}

/// Attaches `disk` as a local block device. `dir` is a directory of this daemon alone (made 0700 if missing); the mount
/// is `dir/name`. Blocks for some milliseconds.
///
/// # Errors
/// A name that is no file name, a size that is no multiple of 512, an attached disk of that name, no FUSE, no
/// loop devices, no losetup, no permission.
pub fn attach(disk: Arc<dyn Disk>, dir: &Path, name: &str, read_only: bool, way: Way) -> Result<Attached, ExportError> {
    check(disk.as_ref(), name)?;
    let read_only = read_only || disk.is_read_only();
    let dir = private_dir(dir)?;
    let place = Place::make(dir.join(name))?;
    if way == Way::Fastest && varve_io::ublk::is_offered() {
        match ublk::Served::start(disk.clone(), &dir, name, read_only) {
            Ok(served) => {
                let device = served.path().to_owned();
                return Ok(Attached { device, dir: place.keep(), by: By::Ublk(Box::new(served)), gone: false });
            }
            Err(error) => tracing::warn!("ublk is there and cannot be used: {}", error.chain()),
        }
    }
    let served = Served::start(disk, &place.0, name, read_only)?;
    let device = losetup::set_up(served.file(), read_only)?;
    if !losetup::is_direct(&device) {
        tracing::warn!(device = %device.display(), "the loop device reads through the page cache; it will be slow");
    }
    let dir = place.keep();
    Ok(Attached { device, dir, by: By::Loop { served, told: false }, gone: false })
}

impl Attached {
    /// The block device: `/dev/ublkbN` or `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.device
    }

    /// The directory that the FUSE file is mounted on.
    pub fn mount_dir(&self) -> &Path {
        &self.dir
    }

    /// The FUSE file under the loop device, if that is how: for tests, and for whoever wants to seek its holes.
    pub fn file(&self) -> Option<&Path> {
        match &self.by {
            By::Ublk(_) => None,
            By::Loop { served, .. } => Some(served.file()),
        }
    }

    /// How it is attached, for the operator.
    pub fn how(&self) -> &'static str {
        match &self.by {
            By::Ublk(_) => "ublk",
            By::Loop { .. } => "fuse+loop",
        }
    }

    /// Who uses the device (a mount, a swap, dm, md, an exclusive open), as text; `None` if nobody does.
    pub fn in_use(&self) -> Option<String> {
        match &self.by {
            _ if self.gone || !self.is_ours() => None,
            By::Ublk(served) if !served.is_quiet() => known_user(&self.device),
            _ => in_use(&self.device),
        }
    }

    /// Whether [`Attached::detach`] would be refused, as far as can be told: then with who uses it. Blocks for some seconds while it
    /// is read or written.
    ///
    /// # Errors
    /// It is in use.
    pub fn is_free(&self) -> Result<(), ExportError> {
        if let By::Ublk(served) = &self.by
            && !self.gone
            && !wait(DEVICE_GONE_TIMEOUT, || served.is_quiet())
        {
            let user = known_user(&self.device);
            return Err(self.used(user.unwrap_or_else(|| "a program reads or writes it".to_owned())));
        }
        self.in_use().map_or(Ok(()), |user| Err(self.used(user)))
    }

    /// Whether it was detached or taken away.
    pub fn is_gone(&self) -> bool {
        self.gone
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
        self.is_free()?;
        match self.by {
            By::Ublk(_) => self.detach_ublk()?,
            By::Loop { .. } => self.detach_loop()?,
        }
        self.forget();
        Ok(())
    }

    /// Takes the device away, used or not: whatever its users ask for gets EIO. Of a ublk device that is gone, who still has it
    /// open reads the end.
    pub fn take_away(&mut self) {
        if self.gone {
            return;
        }
        // A ublk device is not asked about: that may mean to wait for what it is asked.
        if matches!(self.by, By::Loop { .. }) {
            if self.in_use().is_none() && self.detach().is_ok() {
                return;
            }
            tracing::warn!(device = %self.device.display(), "the device goes away while it is used; its users get EIO");
        }
        let ours = self.is_ours();
        match &mut self.by {
            By::Ublk(served) => {
                if let Err(e) = served.stop() {
                    tracing::warn!("{}", e.chain());
                }
            }
            By::Loop { served, told } => {
                if !*told
                    && ours
                    && let Err(e) = losetup::take_down(&self.device)
                {
                    tracing::warn!("{e}");
                }
                served.abort();
            }
        }
        self.forget();
    }

    fn detach_ublk(&mut self) -> Result<(), ExportError> {
        let By::Ublk(served) = &mut self.by else { return Ok(()) };
        served.stop().map_err(|e| {
            let next = "try again; a ublk device goes away with the daemon";
            ExportError::io(format!("cannot stop {}", self.device.display()), e.source_io(), next)
        })
    }

    fn detach_loop(&mut self) -> Result<(), ExportError> {
        let By::Loop { served, told } = &mut self.by else { return Ok(()) };
        if !*told {
            losetup::take_down(&self.device)?;
            *told = true;
        }
        if !wait(DEVICE_GONE_TIMEOUT, || losetup::backing_file(&self.device).as_deref() != Some(served.file())) {
            return Err(self.used("a program has it open; it goes away when that closes it".to_owned()));
        }
        // The kernel lets go of the file a moment after the device is gone.
        let mut last = Ok(());
        if !wait(DEVICE_GONE_TIMEOUT, || {
            last = served.stop();
            !matches!(&last, Err(e) if e.kind() == io::ErrorKind::ResourceBusy)
        }) {
            return Err(self.used(format!("a program uses {}", self.dir.display())));
        }
        last.map_err(|e| {
            ExportError::io(format!("cannot unmount {}", self.dir.display()), &e, "unmount it by hand (umount -f)")
        })
    }

    /// Whether the device of that name is the one that was attached.
    fn is_ours(&self) -> bool {
        match &self.by {
            By::Ublk(_) => true,
            By::Loop { served, .. } => losetup::backing_file(&self.device).as_deref() == Some(served.file()),
        }
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
        self.take_away();
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

/// Polls for so long: there is no event for a device that goes away.
fn wait(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    loop {
        if done() {
            return true;
        }
        if begin.elapsed() > limit {
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
