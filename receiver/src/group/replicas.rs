//! Finding, making and claiming the files and devices that become replicas.
//!
//! A production host names the path of a replica, and a compromised one must not write to whatever it likes here. So a
//! file is only taken or made if its name says that it is a disk image ([`EXTENSIONS`]) and it is outside the
//! receiver's own directories; a device only if nobody uses it.

use super::meta::VolumeMeta;
use crate::apply::replica::Replica;
use crate::failure::refuse;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;
use varve_common::paths::Paths;
use varve_common::wire::messages::{Refused, RefusedReason};
use varve_io::{DirectFile, IoError, blockdev, crashsafe, sparse};

/// What the name of a replica file ends in.
pub const EXTENSIONS: [&str; 2] = ["img", "raw"];

fn refused(text: impl Into<String>, next: impl Into<String>) -> Refused {
    refuse(RefusedReason::Replica, text, next)
}

fn io_refused(doing: &str, path: &Path, error: &IoError) -> Refused {
    if error.is_no_space() {
        let next = "free space on that file system of the receiver; it is tried again by itself";
        return crate::failure::refuse_for_now(RefusedReason::DiskFull, error.chain(), next);
    }
    let text = format!("{doing} {}: {}", path.display(), error.chain());
    if error.is_busy() {
        let next =
            "a replica has one writer: end the other one, or choose another replica; it is tried again by itself";
        return crate::failure::refuse_for_now(RefusedReason::Replica, text, next);
    }
    refused(text, "check the path on the receiver")
}

/// Where the replica of volume `number` of the group in `group_dir` is to be.
pub fn place(paths: &Paths, group_dir: &Path, number: usize, wish: Option<&str>) -> Result<PathBuf, Refused> {
    let Some(wish) = wish else { return Ok(group_dir.join(format!("replica-{number}.img"))) };
    let path = PathBuf::from(wish);
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !plain || wish.contains('\0') {
        let next = "give an absolute path without '..' to --replica";
        return Err(refused(format!("the replica's path '{}' is not usable", wish.escape_debug()), next));
    }
    let inside = |dir: PathBuf| path.starts_with(&dir) || real(&path).starts_with(real(&dir));
    if inside(paths.receiver_state()) || inside(paths.config_dir()) || inside(paths.run_dir()) {
        let next = "choose a path elsewhere, or give none: the receiver then keeps it in the group's directory";
        return Err(refused(format!("{wish} is inside the receiver's own directories"), next));
    }
    Ok(path)
}

/// With symbolic links resolved as far as it exists.
fn real(path: &Path) -> PathBuf {
    if let Ok(real) = std::fs::canonicalize(path) {
        return real;
    }
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => real(parent).join(name),
        _ => path.to_owned(),
    }
}

/// Makes or checks the replica of a new group's volume. Nothing that exists is changed.
pub fn prepare(volume: &VolumeMeta) -> Result<(), Refused> {
    let path = &volume.replica;
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => make(path, volume.bytes),
        Err(e) => Err(io_refused("cannot look at", path, &IoError::new("look at", path, e))),
        Ok(found) if found.file_type().is_block_device() => open(volume).map(drop),
        Ok(_) => {
            check_extension(path)?;
            open(volume).map(drop)
        }
    }
}

fn check_extension(path: &Path) -> Result<(), Refused> {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    if EXTENSIONS.contains(&extension) {
        return Ok(());
    }
    let text = format!("{} does not look like a replica", path.display());
    Err(refused(text, "a replica file's name ends in .img or .raw, so that nothing else can be overwritten"))
}

fn make(path: &Path, bytes: u64) -> Result<(), Refused> {
    check_extension(path)?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    if !dir.is_dir() {
        let next = format!("make the directory {} on the receiver, or choose another path", dir.display());
        return Err(refused(format!("there is no directory for the replica {}", path.display()), next));
    }
    let made = DirectFile::create_new(path, bytes, 0o600)
        .and_then(|file| file.sync_data())
        .and_then(|()| crashsafe::fsync_dir(dir));
    made.map_err(|e| {
        // Best effort: the first error is the one to report.
        let _ = std::fs::remove_file(path);
        io_refused("cannot make the replica", path, &e)
    })
}

/// Refuses a growth that the replica has no room for.
pub fn check_room(volume: &VolumeMeta, bytes: u64) -> Result<(), Refused> {
    let path = &volume.replica;
    let file = DirectFile::open_read(path).map_err(|e| io_refused("cannot open the replica", path, &e))?;
    if !file.is_block_device() || file.len() >= bytes {
        return Ok(());
    }
    let text = format!(
        "{} grew to {bytes} bytes and its replica, the device {}, has {}",
        volume.path,
        path.display(),
        file.len()
    );
    Err(refused(text, "make that device larger; it is tried again by itself, and until then the gap stays open"))
}

/// A program that is just being started has a copy of every descriptor for a moment, those that were closed here meanwhile, too.
const CLAIM_TRIES: u32 = 10;
const CLAIM_TRY_INTERVAL: Duration = Duration::from_millis(20);

fn claim(path: &Path) -> Result<DirectFile, IoError> {
    for _ in 1..CLAIM_TRIES {
        match DirectFile::open_rw_exclusive(path) {
            Err(error) if error.is_busy() => std::thread::sleep(CLAIM_TRY_INTERVAL),
            other => return other,
        }
    }
    DirectFile::open_rw_exclusive(path)
}

/// Opens the replica of a volume and claims it.
pub fn open(volume: &VolumeMeta) -> Result<Replica, Refused> {
    let (path, bytes) = (&volume.replica, volume.bytes);
    if !path.exists() {
        let next = "put it back, or 'varve forget GROUP' here and protect again; it is not replaced by an empty one";
        return Err(refused(format!("the replica {} is not there", path.display()), next));
    }
    if let Some(user) = blockdev::in_use(path) {
        let next = "free it (unmount, swapoff, losetup -d, …), or choose another replica";
        return Err(refused(format!("the replica {} is in use: {user}", path.display()), next));
    }
    let file = claim(path).map_err(|e| io_refused("cannot open the replica", path, &e))?;
    // The sizes are written down before the file is extended, and this may be after a crash in between.
    if !file.is_block_device() && volume.grown.last().is_some_and(|before| file.len() == before.bytes) {
        let grown = file.set_len(bytes).and_then(|()| file.sync_data());
        grown.map_err(|e| io_refused("cannot make the replica larger", path, &e))?;
    }
    let have = file.len();
    if have < bytes {
        let text = format!("the replica {} is too small: it has {have} bytes, the volume {bytes}", path.display());
        return Err(refused(text, "choose a larger device, or a file that does not exist yet"));
    }
    if have > bytes && !file.is_block_device() {
        let text = format!("the file {} is larger than the volume: {have} bytes, not {bytes}", path.display());
        return Err(refused(text, "a replica file has exactly the volume's size: choose one that does not exist yet"));
    }
    Ok(Replica::new(file, bytes))
}

/// Whether nothing was ever written to it. A device is never fresh: what it held before is unknown.
pub fn is_fresh(replica: &Replica) -> bool {
    let file = replica.file();
    !file.is_block_device() && sparse::next_data(file, 0).is_ok_and(|data| data.is_none())
}

/// Whether both name the same file or device.
pub fn same(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    if a == b {
        return true;
    }
    let (Ok(a), Ok(b)) = (std::fs::metadata(a), std::fs::metadata(b)) else { return false };
    if a.file_type().is_block_device() && b.file_type().is_block_device() {
        return a.rdev() == b.rdev();
    }
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(replica: PathBuf, bytes: u64) -> VolumeMeta {
        VolumeMeta::new("/dev/x", bytes, replica)
    }

    #[test]
    fn made_sparse_and_found_again_fresh() {
        let dir = tempfile::tempdir().expect("directory");
        let volume = volume(dir.path().join("a.img"), 10 << 20 | 512);
        prepare(&volume).expect("made");
        let replica = open(&volume).expect("opened");
        assert_eq!(replica.file().len(), 10 << 20 | 512);
        assert!(is_fresh(&replica));
        drop(replica);
        prepare(&volume).expect("an existing one of the right size is taken");
        let mut bytes = std::fs::read(&volume.replica).expect("read");
        bytes[5 << 20] = 1;
        std::fs::write(&volume.replica, bytes).expect("write");
        assert!(!is_fresh(&open(&volume).expect("opened")));
    }

    /// Another receiver, or another group that got there by another name: two writers would both be right in their own view.
    #[test]
    fn a_file_has_one_writer() {
        let dir = tempfile::tempdir().expect("directory");
        let volume = volume(dir.path().join("a.img"), 1 << 20);
        prepare(&volume).expect("made");
        let first = open(&volume).expect("opened");
        let link = dir.path().join("b.img");
        std::fs::hard_link(&volume.replica, &link).expect("link");
        for replica in [volume.replica.clone(), link] {
            let refused = open(&VolumeMeta { replica, ..volume.clone() }).expect_err("claimed");
            assert!(refused.text.contains("has claimed it"), "{refused:?}");
            let us = format!("process {} (", std::process::id());
            assert!(refused.text.contains(&us) && refused.next.contains("one writer"), "{refused:?}");
            assert!(refused.retry, "the other one may end");
        }
        drop(first);
        open(&volume).expect("free again");
    }

    #[test]
    fn wrong_ones_are_refused_with_words() {
        let dir = tempfile::tempdir().expect("directory");
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("small.img"), [0; 4096]).expect("write");
        std::fs::write(path("secrets"), [0; 8192]).expect("write");
        for (path, word) in [
            (path("small.img"), "too small"),
            (path("secrets"), "does not look like"),
            (path("new.conf"), "does not look like"),
            (path("none/new.img"), "no directory"),
            (PathBuf::from("/dev/null"), "does not look like"),
        ] {
            let refused = prepare(&volume(path, 8192)).expect_err(word);
            assert!(refused.text.contains(word), "{refused:?}");
            assert_eq!(refused.reason, RefusedReason::Replica);
        }
        let refused = prepare(&volume(path("small.img"), 512)).expect_err("larger");
        assert!(refused.text.contains("larger"), "{refused:?}");
        assert!(!path("new.conf").exists());
    }

    #[test]
    fn our_own_directories_are_not_for_replicas() {
        let root = tempfile::tempdir().expect("directory");
        let paths = Paths::new(root.path());
        std::fs::create_dir_all(paths.receiver_state()).expect("state");
        let link = root.path().join("link");
        std::os::unix::fs::symlink(paths.receiver_state(), &link).expect("link");
        let dir = paths.receiver_group("db");
        let at = |wish: &str| place(&paths, &dir, 1, Some(wish));
        let inside = paths.receiver_state().join("x.img");
        assert!(at(inside.to_str().expect("text")).is_err());
        assert!(at(link.join("x.img").to_str().expect("text")).is_err(), "through a link");
        assert!(at("relative.img").is_err());
        assert!(at("/srv/../etc/x.img").is_err());
        assert_eq!(at("/srv/x.img").expect("elsewhere"), PathBuf::from("/srv/x.img"));
        assert_eq!(place(&paths, &dir, 1, None).expect("default"), dir.join("replica-1.img"));
    }
}
