//! `varve restore`: one volume as it was, written to a file or a device, read again and compared.

use crate::failpoint;
use crate::limits::RESTORE_BYTES;
use crate::view::views::history_problem;
use crate::view::volume::ViewVolume;
use std::path::{Path, PathBuf};
use varve_common::problem::Problem;
use varve_export::disk::Disk;
use varve_io::{AlignedBuf, DirectFile, IoError, blockdev, crashsafe, sparse};

/// Behind the name of a file that is not whole yet.
const PARTIAL: &str = "varve-partial";
/// Where systemd looks for what an operator adds to the unit.
const DROP_IN: &str = "/etc/systemd/system/varve-receiver.service.d";

/// What a restore has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Bytes that are not holes.
    pub written_bytes: u64,
    /// BLAKE3 of all bytes.
    pub digest: blake3::Hash,
}

/// Where a restore goes.
#[derive(Debug)]
pub struct Target {
    path: PathBuf,
    /// A file is written under this name and renamed when it is whole and verified.
    partial: Option<PathBuf>,
    /// It was there before, and may be replaced.
    replaces: bool,
}

fn refused(path: &Path, why: impl Into<String>, next: &str) -> Problem {
    Problem::refused(format!("nothing was restored to {}", path.display()), why, next)
}

fn failed(path: &Path, error: &IoError) -> Problem {
    let next = if error.is_no_space() { "free space there, or choose another place" } else { "check the path" };
    Problem::failed(format!("the restore to {} failed", path.display()), error.chain(), next)
}

/// Device and inode.
fn identity(dir: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(dir).ok().map(|dir| (dir.dev(), dir.ino()))
}

/// Whether a file can be made in `dir`: asked before, so that a dry run tells, too.
fn may_write(path: &Path, dir: &Path) -> Result<(), Problem> {
    use nix::errno::Errno;
    use nix::unistd::{AccessFlags, access};
    let Err(errno) = access(dir, AccessFlags::W_OK | AccessFlags::X_OK) else { return Ok(()) };
    let why = IoError::new("write to", dir, errno).chain();
    let dir = dir.display();
    let next = match errno {
        Errno::EROFS => format!(
            "unless {dir} is mounted read-only, the receiver's unit keeps it out: mkdir -p {DROP_IN} && printf \
             '[Service]\\nReadWritePaths={dir}\\n' >{DROP_IN}/restore.conf && systemctl daemon-reload && systemctl \
             restart varve-receiver (which closes open views), then try again"
        ),
        Errno::EACCES => {
            "choose a directory that belongs to root: the receiver's unit gives it no power over the permissions of others"
                .to_owned()
        }
        _ => "check the path".to_owned(),
    };
    Err(Problem::failed(format!("nothing was restored to {}", path.display()), why, next))
}

/// Another name for every restore: two to the same place must not verify one file and name the other.
fn partial_of(path: &Path) -> PathBuf {
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{PARTIAL}-{:08x}", rand::random::<u32>()));
    partial.into()
}

impl Target {
    /// Checks that a volume of `bytes` can go there; nothing is changed. `seen`: device and inode of the directory for whoever
    /// asks. `own`: our own directory, `taken`: replicas.
    ///
    /// # Errors
    /// For the operator.
    pub fn check(
        path: &Path,
        bytes: u64,
        force: bool,
        seen: Option<(u64, u64)>,
        own: &Path,
        taken: &[PathBuf],
    ) -> Result<Self, Problem> {
        if !path.is_absolute() {
            let why = "the receiver writes it, and does not know your directory";
            return Err(Problem::usage(
                format!("'{}' is no absolute path", path.display()),
                why,
                "give a path from / on",
            ));
        }
        let dir = path.parent().unwrap_or(Path::new("/"));
        // Under a unit with PrivateTmp= a file in /tmp would be whole, verified, and nowhere to be found.
        if seen.is_some_and(|seen| identity(dir) != Some(seen)) {
            let dir = dir.display();
            let why = format!(
                "the receiver does not see the {dir} that you see: its unit hides /tmp, /var/tmp, /home and /root from it"
            );
            return Err(refused(path, why, "choose another directory, such as one below /srv"));
        }
        let Ok(real) = std::fs::canonicalize(dir) else {
            return Err(refused(
                path,
                format!("there is no directory {}", dir.display()),
                "make it, or choose another",
            ));
        };
        if std::fs::canonicalize(own).is_ok_and(|own| real.starts_with(own)) {
            return Err(refused(path, "that is Varve's own directory", "choose another place"));
        }
        if taken.iter().any(|replica| crate::group::replicas::same(replica, path)) {
            return Err(refused(path, "it is a replica", "choose another place; 'varve rollback' changes replicas"));
        }
        let target = match std::fs::metadata(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                Self { path: path.to_path_buf(), partial: Some(partial_of(path)), replaces: false }
            }
            Err(e) => return Err(failed(path, &IoError::new("look at", path, e))),
            Ok(_) if !force => {
                return Err(refused(path, "it exists", "choose another place, or --force to overwrite it"));
            }
            Ok(have) => Self::over(path, &have, bytes)?,
        };
        match target.partial {
            Some(_) => may_write(path, &real).map(|()| target),
            None => Ok(target),
        }
    }

    fn over(path: &Path, have: &std::fs::Metadata, bytes: u64) -> Result<Self, Problem> {
        use std::os::unix::fs::FileTypeExt;
        if !have.is_file() && !have.file_type().is_block_device() {
            return Err(refused(path, "it is neither a file nor a block device", "choose another place"));
        }
        if let Some(user) = blockdev::in_use(path) {
            return Err(refused(path, format!("it is in use: {user}"), "free it (unmount, swapoff, losetup -d, …)"));
        }
        if have.file_type().is_block_device() {
            let len = DirectFile::open_read(path).map_err(|e| failed(path, &e))?.len();
            if len < bytes {
                let why = format!("it has {len} bytes, the volume {bytes}");
                return Err(refused(path, why, "choose a larger device"));
            }
            return Ok(Self { path: path.to_path_buf(), partial: None, replaces: true });
        }
        Ok(Self { path: path.to_path_buf(), partial: Some(partial_of(path)), replaces: true })
    }

    /// Writes and verifies. `tell(done, of)` says whether to go on; both passes count.
    ///
    /// # Errors
    /// For the operator; a file of this name is then what it was before.
    pub fn restore(&self, volume: &ViewVolume, mut tell: impl FnMut(u64, u64) -> bool) -> Result<Restored, Problem> {
        let written = self.write_and_verify(volume, &mut tell);
        match (&written, &self.partial) {
            (Err(_), Some(partial)) => {
                // Best effort: the first error is the one to report.
                let _ = std::fs::remove_file(partial);
            }
            (Ok(_), Some(partial)) => {
                self.name(partial)?;
                let dir = self.path.parent().unwrap_or(Path::new("/"));
                crashsafe::fsync_dir(dir).map_err(|e| failed(&self.path, &e))?;
            }
            _ => {}
        }
        written
    }

    /// Gives the file its name; one that somebody else made meanwhile is not replaced.
    fn name(&self, partial: &Path) -> Result<(), Problem> {
        use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
        let flags = if self.replaces { RenameFlags::empty() } else { RenameFlags::RENAME_NOREPLACE };
        renameat2(AT_FDCWD, partial, AT_FDCWD, &self.path, flags).map_err(|e| {
            // Best effort: the first error is the one to report.
            let _ = std::fs::remove_file(partial);
            failed(&self.path, &IoError::new("rename to", &self.path, e))
        })
    }

    fn write_and_verify(
        &self,
        volume: &ViewVolume,
        tell: &mut impl FnMut(u64, u64) -> bool,
    ) -> Result<Restored, Problem> {
        let io = |e: IoError| failed(&self.path, &e);
        let len = volume.len();
        let file = match &self.partial {
            Some(partial) => DirectFile::create_new(partial, len, 0o600).map_err(io)?,
            None => DirectFile::open_rw_exclusive(&self.path).map_err(io)?,
        };
        let ended = || Problem::failed(format!("nothing was restored to {}", self.path.display()), "it was ended", "");
        let mut buf = AlignedBuf::new(RESTORE_BYTES);
        let (mut at, mut written_bytes, mut hasher) = (0, 0, blake3::Hasher::new());
        while at < len {
            let bytes = (len - at).min(RESTORE_BYTES as u64) as usize;
            let piece = &mut buf[..bytes];
            let what = format!("the restore to {} failed", self.path.display());
            volume.read_point(piece, at).map_err(|e| history_problem(&what, &e))?;
            hasher.update(piece);
            if piece.iter().any(|byte| *byte != 0) {
                file.write_all_at(piece, at).map_err(io)?;
                written_bytes += bytes as u64;
            } else if self.partial.is_none() {
                sparse::zero_range(&file, at, bytes as u64).map_err(io)?;
            }
            at += bytes as u64;
            failpoint::hold(failpoint::RESTORE_HELD, || false);
            if !tell(at, 2 * len) {
                return Err(ended());
            }
        }
        file.sync_data().map_err(io)?;
        let digest = hasher.finalize();
        let (mut at, mut hasher) = (0, blake3::Hasher::new());
        while at < len {
            let bytes = (len - at).min(RESTORE_BYTES as u64) as usize;
            file.read_exact_at(&mut buf[..bytes], at).map_err(io)?;
            hasher.update(&buf[..bytes]);
            at += bytes as u64;
            if !tell(len + at, 2 * len) {
                return Err(ended());
            }
        }
        if hasher.finalize() != digest {
            let why = "what was written is not what is read back";
            let next = "the disk or the memory is damaged: see the kernel's log, restore to another disk";
            return Err(Problem::failed(format!("the restore to {} is wrong", self.path.display()), why, next));
        }
        Ok(Restored { written_bytes, digest })
    }
}
