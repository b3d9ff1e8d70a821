//! Durable file steps as far as a running system shows them: content, modes, no left-overs, locks.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Mounted, disk_dir};
use varve_io::DirLock;
use varve_io::crashsafe::{
    NewFile, create_dir_all_durable, fsync_dir, remove_durable, remove_temporaries, write_atomic,
};

fn names(dir: &std::path::Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn replaces_content_and_mode_and_leaves_nothing() {
    let dir = disk_dir();
    let path = dir.path().join("state");
    for (bytes, mode) in [(&b"one"[..], 0o644), (b"", 0o600), (b"three", 0o666)] {
        write_atomic(&path, bytes, mode).unwrap();
        assert_eq!(fs::read(&path).unwrap(), bytes);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, mode);
    }
    assert_eq!(names(dir.path()), ["state"]);
}

#[test]
fn a_failed_write_leaves_the_old_content() {
    let dir = disk_dir();
    let path = dir.path().join("is-a-directory");
    fs::create_dir(&path).unwrap();
    let error = write_atomic(&path, b"x", 0o600).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::IsADirectory, "{}", error.chain());
    assert_eq!(names(dir.path()), ["is-a-directory"]);
    assert!(write_atomic(dir.path().join("no/such"), b"x", 0o600).unwrap_err().is_not_found());
    assert_eq!(write_atomic("/", b"x", 0o600).unwrap_err().kind(), ErrorKind::InvalidInput);
}

/// Needs root.
#[test]
fn a_full_disk_is_enospc_and_keeps_the_old_content() {
    let mount = Mounted::new(&["-t", "tmpfs", "-o", "size=64k", "none"]);
    let path = mount.path().join("state");
    write_atomic(&path, b"old", 0o600).unwrap();
    let error = write_atomic(&path, &vec![1; 1 << 20], 0o600).unwrap_err();
    assert!(error.is_no_space(), "{}", error.chain());
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(mount.path()), ["state"]);
}

#[test]
fn a_reader_never_sees_half() {
    let dir = disk_dir();
    let path = dir.path().join("state");
    write_atomic(&path, &[0; 10_000], 0o600).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..60u8 {
                write_atomic(&path, &[n; 10_000], 0o600).unwrap();
            }
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            let bytes = fs::read(&path).unwrap();
            assert!(bytes.len() == 10_000 && bytes.iter().all(|&b| b == bytes[0]));
        }
    });
}

#[test]
fn temporaries_of_a_killed_writer_are_swept() {
    let dir = disk_dir();
    fs::write(dir.path().join(".state.varve-tmp-17-3"), b"half").unwrap();
    fs::write(dir.path().join(".hidden"), b"mine").unwrap();
    fs::write(dir.path().join("state.varve-tmp-1"), b"not hidden, not ours").unwrap();
    assert_eq!(remove_temporaries(dir.path()).unwrap(), 1);
    assert_eq!(names(dir.path()), [".hidden", "state.varve-tmp-1"]);
}

#[test]
fn a_new_file_has_its_name_once_it_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    write_atomic(&path, b"old", 0o600).unwrap();
    let mut dropped = NewFile::create(&path).unwrap();
    dropped.append(b"half").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"old");
    drop(dropped);
    assert_eq!(names(dir.path()), ["run"]);
    let mut whole = NewFile::create(&path).unwrap();
    whole.append(b"all ").unwrap();
    whole.append(b"of it").unwrap();
    whole.commit().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"all of it");
    assert_eq!(names(dir.path()), ["run"]);
}

#[test]
fn directories_and_removal() {
    let dir = disk_dir();
    let deep = dir.path().join("a/b/c");
    create_dir_all_durable(&deep).unwrap();
    create_dir_all_durable(&deep).unwrap();
    assert_eq!(fs::metadata(&deep).unwrap().permissions().mode() & 0o777, 0o700);
    fs::write(deep.join("f"), b"").unwrap();
    assert_eq!(create_dir_all_durable(deep.join("f")).unwrap_err().kind(), ErrorKind::NotADirectory);
    create_dir_all_durable(deep.join("f/g")).unwrap_err();
    // A symbolic link to a directory is one.
    symlink(&deep, dir.path().join("link")).unwrap();
    create_dir_all_durable(dir.path().join("link/d")).unwrap();
    assert!(deep.join("d").is_dir());
    remove_durable(deep.join("f")).unwrap();
    remove_durable(deep.join("f")).unwrap();
    remove_durable(dir.path().join("never/was")).unwrap();
    remove_durable(&deep).unwrap_err();
    fsync_dir(&deep).unwrap();
    assert!(fsync_dir(dir.path().join("none")).unwrap_err().is_not_found());
}

#[test]
fn one_holder_per_directory() {
    let dir = disk_dir();
    let lock = DirLock::acquire(dir.path()).unwrap();
    let error = DirLock::acquire(dir.path()).unwrap_err();
    assert!(error.is_busy());
    let me = format!("process {} (", std::process::id());
    assert!(error.chain().contains(&me), "{}", error.chain());
    let path = lock.path().to_path_buf();
    drop(lock);
    assert!(path.exists());
    // What another program wrote into the file does not matter, nor does a longer old number.
    fs::write(&path, "not a number, and a long one at that, longer than any process number\n").unwrap();
    let lock = DirLock::acquire(dir.path()).unwrap();
    assert_eq!(fs::read_to_string(lock.path()).unwrap(), format!("{}\n", std::process::id()));
    assert!(DirLock::acquire(dir.path().join("none")).unwrap_err().is_not_found());
}

/// The lock ends with its process, however that ends, and is not inherited by programs it starts.
#[test]
fn a_lock_does_not_outlive_its_process() {
    let dir = disk_dir();
    let lock_file = dir.path().join("lock");
    // util-linux's flock(1) takes the same kind of lock.
    let mut child = std::process::Command::new("flock")
        .args(["--no-fork", lock_file.to_str().unwrap(), "sleep", "60"])
        .spawn()
        .unwrap();
    while !DirLock::acquire(dir.path()).is_err_and(|e| e.is_busy()) {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let lock = DirLock::acquire(dir.path()).unwrap();
    let mut bystander = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    drop(lock);
    let again = DirLock::acquire(dir.path());
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    again.unwrap();
}
