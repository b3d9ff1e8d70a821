//! The directory of pins: what keeps capture going while no agent runs.
//!
//! ```text
//!   DIR/set/map_*   the tables, rings and bitmaps (those of the groups hang on the outer maps)
//!   DIR/set/prog_*  the programs, for their statistics
//!   DIR/set/link_*  the attachments: what is behind them runs until they are gone
//! ```
//!
//! A set is made under another name and renamed when it is complete, so whatever is called `set` is whole. bpffs lives
//! in memory: a set is never older than the boot, and its identity says so all the same.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use libbpf_rs::{Link, MapHandle, ProgramHandle};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::statfs;

use crate::capture::{Objects, keep};
use crate::error::CaptureError;
use crate::layout::{IdentityEntry, PIN_LAYOUT};
use crate::memory::{Table, pin};

/// "VARVEPIN".
const MAGIC: u64 = u64::from_le_bytes(*b"VARVEPIN");
const BPFFS_MAGIC: i64 = 0xcafe_4a11;
const SET: &str = "set";
const NEW: &str = "new";

/// The maps of a set, in the order of [`Objects::maps`].
pub(crate) const MAPS: [&str; 11] = [
    "disks",
    "volumes",
    "groups",
    "inflight",
    "config",
    "rings",
    "dirty",
    "bios",
    "mark_arguments",
    "ledger",
    "identity",
];
/// The attached programs, in the order in which they are attached: completions first, because a write that is captured
/// must not complete unseen; and of each pair the second one after the first, because they run in this order.
pub(crate) const PROGRAMS: [&str; 8] = [
    "request_done",
    "request_again",
    "bio_done",
    "bio_again",
    "capture_getrq",
    "capture_back",
    "capture_front",
    "capture",
];
const MARK: &str = "mark";

/// A directory in a bpffs, for one installation's pins.
#[derive(Clone, Debug)]
pub(crate) struct Pins {
    dir: PathBuf,
}

fn cannot(verb: &str, path: &Path, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> CaptureError {
    CaptureError::new(
        crate::CaptureErrorKind::Kernel,
        format!("{verb} {}", path.display()),
        "mount a bpf file system there ('mount -t bpf bpf /sys/fs/bpf'), writable for the agent",
    )
    .because(error)
}

pub(crate) fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|statfs| statfs.filesystem_type().0 == BPFFS_MAGIC)
}

impl Pins {
    /// The directory, made if need be; a bpffs is mounted on its parent unless it lies in one already.
    pub(crate) fn prepare(dir: &Path) -> Result<Self, CaptureError> {
        let parent = dir.parent().unwrap_or(Path::new("/"));
        if !is_bpffs(parent) {
            fs::create_dir_all(parent).map_err(|e| cannot("make", parent, e))?;
            // Nobody but root may reach what is pinned here: it holds what was written to the volumes.
            mount(Some("bpf"), parent, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
                .map_err(|e| cannot("mount a bpf file system on", parent, e))?;
        }
        match fs::create_dir(dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(cannot("make", dir, e)),
            _ => {}
        }
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(|e| cannot("protect", dir, e))?;
        let pins = Self { dir: dir.to_owned() };
        pins.clean()?;
        Ok(pins)
    }

    fn set(&self) -> PathBuf {
        self.dir.join(SET)
    }

    /// Takes away everything but a whole set.
    fn clean(&self) -> Result<(), CaptureError> {
        let entries = fs::read_dir(&self.dir).map_err(|e| cannot("read", &self.dir, e))?;
        for entry in entries.flatten().filter(|entry| entry.file_name() != SET) {
            fs::remove_dir_all(entry.path()).map_err(|e| cannot("remove", &entry.path(), e))?;
        }
        Ok(())
    }

    pub(crate) fn has_set(&self) -> bool {
        self.set().exists()
    }

    /// Pins a set; one that is there is replaced.
    pub(crate) fn keep(&self, objects: &Objects) -> Result<(), CaptureError> {
        let new = self.dir.join(NEW);
        fs::create_dir(&new).map_err(|e| cannot("make", &new, e))?;
        for (name, map) in MAPS.iter().zip(&objects.maps) {
            pin_as(map, &new.join(format!("map_{name}")))?;
        }
        pin_as(&objects.mark, &new.join(format!("prog_{MARK}")))?;
        for ((name, program), link) in PROGRAMS.iter().zip(&objects.programs).zip(&objects.links) {
            pin_as(program, &new.join(format!("prog_{name}")))?;
            pin_as(link, &new.join(format!("link_{name}")))?;
        }
        // Nothing is captured by the new programs yet, and nobody can go on with the old ones.
        remove(&self.set())?;
        fs::rename(&new, self.set()).map_err(|e| cannot("rename", &new, e))
    }

    /// Opens the set that is there. The error says which check failed.
    pub(crate) fn open(&self) -> Result<(Objects, String), String> {
        let identity = self.map("identity")?;
        let identity: Table<IdentityEntry> = Table::new(&identity, 1).map_err(|e| format!("its identity: {e}"))?;
        let identity = &identity[0];
        if identity.magic.load(Ordering::Acquire) != MAGIC {
            return Err("its identity is not one of Varve".into());
        }
        let software = software_of(identity);
        let layout = identity.layout.load(Ordering::Acquire);
        if layout != PIN_LAYOUT {
            return Err(format!("its layout is {layout} (varve {software}), this agent knows layout {PIN_LAYOUT}"));
        }
        if identity.boot.each_ref().map(|word| word.load(Ordering::Acquire)) != boot_id().map_err(|e| e.to_string())? {
            return Err("it is of another boot".into());
        }
        let maps: Result<Vec<MapHandle>, String> = MAPS.iter().map(|name| self.map(name)).collect();
        let programs: Result<Vec<ProgramHandle>, String> = PROGRAMS.iter().map(|name| self.program(name)).collect();
        let links: Result<Vec<OwnedFd>, String> = PROGRAMS.iter().map(|name| self.link(name)).collect();
        Ok((Objects { maps: maps?, programs: programs?, mark: self.program(MARK)?, links: links? }, software))
    }

    fn map(&self, name: &str) -> Result<MapHandle, String> {
        MapHandle::from_pinned_path(self.set().join(format!("map_{name}"))).map_err(|e| format!("map {name}: {e}"))
    }

    fn program(&self, name: &str) -> Result<ProgramHandle, String> {
        let path = self.set().join(format!("prog_{name}"));
        ProgramHandle::from_pinned_path(path).map_err(|e| format!("program {name}: {e}"))
    }

    fn link(&self, name: &str) -> Result<OwnedFd, String> {
        let link = Link::open(self.set().join(format!("link_{name}"))).map_err(|e| format!("link {name}: {e}"))?;
        keep(&link).map_err(|e| e.to_string())
    }

    /// Takes all pins away.
    pub(crate) fn remove(&self) -> Result<(), CaptureError> {
        remove(&self.dir)
    }
}

fn pin_as(object: &impl AsFd, path: &Path) -> Result<(), CaptureError> {
    pin(object, path).map_err(|e| cannot("pin", path, e))
}

fn remove(dir: &Path) -> Result<(), CaptureError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(cannot("remove", dir, e)),
        _ => Ok(()),
    }
}

/// Takes all pins of an installation away: what they captured ends. Whether there were any.
///
/// # Errors
/// `Kernel` if they cannot be removed.
pub fn unpin_all(dir: &Path) -> Result<bool, CaptureError> {
    let there = is_bpffs(dir);
    if there {
        remove(dir)?;
    }
    Ok(there)
}

/// Whether a whole set is pinned in this directory.
pub fn is_pinned(dir: &Path) -> bool {
    is_bpffs(dir) && dir.join(SET).exists()
}

/// Says who made a set.
pub(crate) fn sign(identity: &IdentityEntry) -> Result<(), CaptureError> {
    let boot = boot_id().map_err(|e| CaptureError::kernel("read the boot id", e))?;
    for (word, value) in identity.boot.iter().zip(boot) {
        word.store(value, Ordering::Relaxed);
    }
    let mut software = [0; 32];
    let version = env!("CARGO_PKG_VERSION").as_bytes();
    let length = version.len().min(software.len());
    software[..length].copy_from_slice(&version[..length]);
    for (word, bytes) in identity.software.iter().zip(software.chunks(8)) {
        word.store(u64::from_le_bytes(std::array::from_fn(|i| bytes[i])), Ordering::Relaxed);
    }
    identity.layout.store(PIN_LAYOUT, Ordering::Relaxed);
    identity.magic.store(MAGIC, Ordering::Release);
    Ok(())
}

fn software_of(identity: &IdentityEntry) -> String {
    let words = identity.software.each_ref().map(|word| word.load(Ordering::Relaxed).to_le_bytes());
    String::from_utf8_lossy(words.as_flattened()).trim_end_matches('\0').to_owned()
}

fn boot_id() -> io::Result<[u64; 2]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16).map_err(io::Error::other)?;
    Ok([(number >> 64) as u64, number as u64])
}

/// Which disk a number names: the kernel counts every disk that appears and every medium that is exchanged. A loop
/// device that got another file has another one. 0: the kernel does not say (before 5.15).
pub fn disk_identity((major, minor): (u32, u32)) -> u64 {
    let text = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/diskseq"));
    text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}
