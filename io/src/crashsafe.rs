//! File steps that survive power loss, each with the reason why it needs what it does.
//!
//! The rules they follow: data reaches the disk with `fsync` of the file; a *name* (create, rename,
//! remove) reaches it with `fsync` of the directory that holds the name.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{Flock, FlockArg, PosixFadviseAdvice, posix_fadvise};

use crate::IoError;

/// Marks the temporary files of [`write_atomic`] and [`NewFile`], so that [`remove_temporaries`] finds them.
const TEMPORARY_MARK: &str = ".varve-tmp-";
/// The name of the file that [`DirLock`] locks.
const LOCK_FILE_NAME: &str = "lock";

/// The directory that holds the name `path`; "." for a bare name.
fn parent_of(path: &Path) -> Result<&Path, IoError> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Ok(Path::new(".")),
        Some(parent) => Ok(parent),
        None => Err(IoError::refused("find the directory of", path, io::ErrorKind::InvalidInput, "it has none")),
    }
}

/// Makes the names in `dir` durable. `fsync` of a file alone does not promise that the file can be
/// found after a crash: its directory entry is data of the directory.
///
/// # Errors
/// If the directory cannot be opened or synced.
pub fn fsync_dir(dir: impl AsRef<Path>) -> Result<(), IoError> {
    let dir = dir.as_ref();
    let file = File::open(dir).map_err(|e| IoError::new("open directory", dir, e))?;
    file.sync_all().map_err(|e| IoError::new("sync directory", dir, e))
}

/// Replaces (or creates) `path` with `bytes`, permission bits `mode`. After a crash at any moment, and for
/// every reader at any moment, the file holds either all of the old or all of the new bytes; once
/// this returns, the new ones.
///
/// # Errors
/// The failed step and its errno; `path` is then unchanged (or, if only the last sync of the
/// directory failed, may be new or old after a crash) and no temporary file is left.
pub fn write_atomic(path: impl AsRef<Path>, bytes: &[u8], mode: u32) -> Result<(), IoError> {
    let path = path.as_ref();
    let temporary = temporary_of(path)?;
    let written = write_synced(&temporary, bytes, mode)
        .and_then(|()| fs::rename(&temporary, path).map_err(|e| IoError::new("rename a new file to", path, e)));
    if let Err(error) = written {
        // Best effort: the first error is the one to report; a left-over is swept at the next start.
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    // Without this the rename may be undone by a crash although the caller was told it happened.
    fsync_dir(parent_of(path)?)
}

/// All bytes of the file as the disk has them, and durable; `None` if there is no file.
///
/// A write that could not reach the disk leaves its pages in the cache, marked clean: whoever reads them takes for written
/// what is lost, and a sync that succeeds later says nothing of them. So what waits is synced, then the cache is let go, then read.
///
/// # Errors
/// If it cannot be opened, synced or read.
pub fn read_back(path: impl AsRef<Path>) -> Result<Option<Vec<u8>>, IoError> {
    let path = path.as_ref();
    let fail = |doing: &'static str| move |e: io::Error| IoError::new(doing, path, e);
    let mut file = match OpenOptions::new().read(true).write(true).open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(fail("open"))?,
    };
    file.sync_all().map_err(fail("sync"))?;
    fsync_dir(parent_of(path)?)?;
    forget_cached(&file);
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(fail("read"))?;
    Ok(Some(bytes))
}

/// Clean pages leave the cache; dirty ones stay. Best effort: a file system that keeps all in memory has no other place.
pub(crate) fn forget_cached(file: &File) {
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

/// A name beside `path` that nobody else uses: a rename is atomic only inside one file system.
fn temporary_of(path: &Path) -> Result<PathBuf, IoError> {
    // Two threads, or two daemons on two directories, never pick the same name.
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let dir = parent_of(path)?;
    let Some(name) = path.file_name() else {
        return Err(IoError::refused("write", path, io::ErrorKind::InvalidInput, "the path does not end in a name"));
    };
    let unique = format!("{TEMPORARY_MARK}{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
    let mut temporary_name = std::ffi::OsString::from(".");
    temporary_name.push(name);
    temporary_name.push(unique);
    Ok(dir.join(temporary_name))
}

/// A file that is written piece by piece and has its name only once it is whole: [`write_atomic`] for what does not fit
/// in memory. Dropped before [`NewFile::commit`], it leaves nothing.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    path: PathBuf,
    /// `None` once it has its name.
    temporary: Option<PathBuf>,
}

impl NewFile {
    /// Begins the file that will be `path`.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, IoError> {
        let path = path.as_ref();
        let temporary = temporary_of(path)?;
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary);
        let file = file.map_err(|e| IoError::new("create", &temporary, e))?;
        Ok(Self { file, path: path.to_path_buf(), temporary: Some(temporary) })
    }

    /// The name that it will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends.
    ///
    /// # Errors
    /// The write's.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), IoError> {
        self.file.write_all(bytes).map_err(|e| IoError::new("write", &self.path, e))
    }

    /// Syncs the bytes, gives the file its name in place of whatever had it, and makes that durable.
    ///
    /// # Errors
    /// As [`write_atomic`].
    pub fn commit(mut self) -> Result<(), IoError> {
        self.file.sync_all().map_err(|e| IoError::new("sync", &self.path, e))?;
        if let Some(temporary) = &self.temporary {
            fs::rename(temporary, &self.path).map_err(|e| IoError::new("rename a new file to", &self.path, e))?;
            self.temporary = None;
        }
        fsync_dir(parent_of(&self.path)?)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // Best effort; a left-over is swept at the next start.
            let _ = fs::remove_file(temporary);
        }
    }
}

fn write_synced(path: &Path, bytes: &[u8], mode: u32) -> Result<(), IoError> {
    let fail = |doing: &'static str| move |e: io::Error| IoError::new(doing, path, e);
    // create_new: never follow a symlink that somebody put there, never write into a foreign file.
    // Created closed (0600) and opened up after the content: key files are never readable in between.
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(fail("create"))?;
    file.write_all(bytes).map_err(fail("write"))?;
    // Explicit, because the umask cuts the mode of open(2).
    file.set_permissions(Permissions::from_mode(mode)).map_err(fail("set the mode of"))?;
    // Before the rename: else a crash can leave the new name with no bytes behind it.
    file.sync_all().map_err(fail("sync"))
}

/// Removes what [`write_atomic`] and [`NewFile`] left in `dir` when it was killed. Call it while holding the directory's
/// [`DirLock`]; gives the number of files removed.
///
/// # Errors
/// If the directory cannot be listed or a file not removed.
pub fn remove_temporaries(dir: impl AsRef<Path>) -> Result<usize, IoError> {
    let dir = dir.as_ref();
    let mut removed = 0;
    for entry in fs::read_dir(dir).map_err(|e| IoError::new("list", dir, e))? {
        let entry = entry.map_err(|e| IoError::new("list", dir, e))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') && name.contains(TEMPORARY_MARK) {
            fs::remove_file(entry.path()).map_err(|e| IoError::new("remove", entry.path(), e))?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Creates `dir` and its missing parents with permission bits `0o700`, durably.
///
/// # Errors
/// If a component exists and is no directory, or cannot be created or synced.
pub fn create_dir_all_durable(dir: impl AsRef<Path>) -> Result<(), IoError> {
    let dir = dir.as_ref();
    let mut missing = Vec::new();
    let mut at = dir;
    loop {
        match fs::metadata(at) {
            Ok(found) if found.is_dir() => break,
            Ok(_) => {
                let why = "it exists and is not a directory";
                return Err(IoError::refused("create directory", at, io::ErrorKind::NotADirectory, why));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => missing.push(at),
            Err(e) => return Err(IoError::new("look at", at, e)),
        }
        at = parent_of(at)?;
    }
    for new in missing.iter().rev() {
        match DirBuilder::new().mode(0o700).create(new) {
            Ok(()) => {}
            // Somebody else was faster; its name is synced below all the same.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && new.is_dir() => {}
            Err(e) => return Err(IoError::new("create directory", new, e)),
        }
        // The name of each new directory lives in its parent, so each parent is synced, top down: a
        // crash leaves a shorter path, never a hole in it.
        fsync_dir(parent_of(new)?)?;
    }
    Ok(())
}

/// Removes a file and makes the removal durable, so that it does not come back after a crash (a
/// landing segment that came back would be applied twice). A file that is not there is no error.
///
/// # Errors
/// If it cannot be removed, or its directory not synced.
pub fn remove_durable(path: impl AsRef<Path>) -> Result<(), IoError> {
    let path = path.as_ref();
    match fs::remove_file(path) {
        Ok(()) => {}
        // Still synced: an earlier remove may have been cut off between its two steps.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(IoError::new("remove", path, e)),
    }
    let dir = parent_of(path)?;
    if dir.is_dir() { fsync_dir(dir) } else { Ok(()) }
}

/// A directory that belongs to this process until dropped: a `flock` on its file `lock`.
///
/// The kernel frees it when the process ends in any way, so a stale lock cannot exist. The file itself is
/// never removed: removing it would let two processes lock two different files of the same name.
#[derive(Debug)]
pub struct DirLock {
    _file: Flock<File>,
    path: PathBuf,
}

impl DirLock {
    /// Locks `dir`, which must exist.
    ///
    /// # Errors
    /// Kind `WouldBlock` (see [`IoError::is_busy`]) with the holder's process id if it is locked;
    /// else the step that failed.
    pub fn acquire(dir: impl AsRef<Path>) -> Result<Self, IoError> {
        let path = dir.as_ref().join(LOCK_FILE_NAME);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| IoError::new("open lock file", &path, e))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut file) => {
                // The number is for people and for the text below; the lock itself is the flock.
                let pid = format!("{}\n", std::process::id());
                file.set_len(0)
                    .and_then(|()| file.rewind())
                    .and_then(|()| file.write_all(pid.as_bytes()))
                    .map_err(|e| IoError::new("write lock file", &path, e))?;
                Ok(Self { _file: file, path })
            }
            Err((file, nix::errno::Errno::EWOULDBLOCK)) => {
                let why = format!("{} works on this directory", holder(&file));
                Err(IoError::refused("lock", &path, io::ErrorKind::WouldBlock, why))
            }
            Err((_, errno)) => Err(IoError::new("lock", &path, errno)),
        }
    }

    /// The lock file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// "process 1234 (varve-agent)", as far as it can be told.
fn holder(file: &File) -> String {
    let mut text = String::new();
    // A lock file is a few bytes; whatever else it may be is not read to the end.
    let _ = file.take(32).read_to_string(&mut text);
    match text.trim().parse::<u32>() {
        Ok(pid) => match fs::read_to_string(format!("/proc/{pid}/comm")) {
            Ok(name) => format!("process {pid} ({})", name.trim()),
            Err(_) => format!("process {pid}"),
        },
        Err(_) => "another process".to_owned(),
    }
}
