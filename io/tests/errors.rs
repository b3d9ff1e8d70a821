//! What goes wrong is told apart: full, past the end, misaligned, read-only, device failure.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::OpenOptions;
use std::io::ErrorKind;

use common::{Detach, Loop, Mounted, disk_dir, need_root, run, sparse_file};
use varve_io::{AlignedBuf, DirectFile, IoError, IoQueue, sparse};

fn buf(bytes: usize) -> AlignedBuf {
    let mut buf = AlignedBuf::new(bytes);
    buf.fill(7);
    buf
}

#[test]
fn opening_what_is_no_storage() {
    let dir = disk_dir();
    assert!(DirectFile::open_read(dir.path().join("none")).unwrap_err().is_not_found());
    let error = DirectFile::open_read(dir.path()).unwrap_err();
    assert!(error.chain().contains("neither a regular file nor a block device"), "{}", error.chain());
    // Must not wait for the FIFO's other end.
    let fifo = dir.path().join("fifo");
    run("mkfifo", &[fifo.to_str().unwrap()]);
    assert_eq!(DirectFile::open_rw(&fifo).unwrap_err().kind(), ErrorKind::InvalidInput);
    let file = DirectFile::create_new(dir.path().join("f"), 4096, 0o600).unwrap();
    assert_eq!(DirectFile::create_new(file.path(), 1, 0o600).unwrap_err().kind(), ErrorKind::AlreadyExists);
}

#[test]
fn misaligned_requests_are_refused_with_the_unit() {
    let dir = disk_dir();
    let file = DirectFile::create_new(dir.path().join("f"), 1 << 20, 0o600).unwrap();
    let mut memory = buf(8192);
    let mut queue = IoQueue::new(4).unwrap();
    let refused = |what: &str, error: IoError| {
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{what}: {}", error.chain());
        assert_eq!(error.errno(), None);
        assert!(error.chain().contains("multiples of 512") || error.chain().contains("aligned to 512"), "{error}");
    };
    assert_eq!(file.align().offset, 512, "the disk under the checkout has other sectors: adapt this test");
    refused("offset", file.read_exact_at(&mut memory[..4096], 100).unwrap_err());
    refused("length", file.write_all_at(&memory[..100], 0).unwrap_err());
    refused("memory", file.write_all_at_durable(&memory[1..4097], 0).unwrap_err());
    refused("batch offset", queue.write_batch(&[&file], &[(0, 100, &memory[..4096])]).unwrap_err());
    refused("batch memory", queue.read_batch(&[&file], &mut [(0, 0, &mut memory[8..520])]).unwrap_err());
    let error = queue.write_batch(&[&file], &[(1, 0, &memory[..4096])]).unwrap_err();
    assert!(error.chain().contains("file 1 of 1"), "{}", error.chain());
    // Nothing of a refused batch was issued, and the queue still works.
    assert_eq!(sparse::next_data(&file, 0).unwrap(), None);
    queue.write_batch(&[&file], &[(0, 0, &memory[..4096])]).unwrap();
}

#[test]
fn past_the_end_is_told_and_never_extends() {
    let dir = disk_dir();
    let file = DirectFile::create_new(dir.path().join("f"), 10_000, 0o600).unwrap();
    let mut queue = IoQueue::new(4).unwrap();
    let mut memory = buf(16384);
    let past = |error: IoError| {
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        assert!(error.chain().contains("it ends at 10000"), "{}", error.chain());
    };
    past(file.read_exact_at(&mut memory[..4096], 8192).unwrap_err());
    past(file.write_all_at(&memory[..12288], 0).unwrap_err());
    past(file.write_all_at(&memory[..1], 10_000).unwrap_err());
    past(file.read_exact_at(&mut memory[..4096], u64::MAX - 100).unwrap_err());
    past(queue.write_batch(&[&file], &[(0, 0, &memory[..4096]), (0, 8192, &memory[..4096])]).unwrap_err());
    past(sparse::punch_hole(&file, 8192, 4096).unwrap_err());
    past(sparse::zero_range(&file, u64::MAX, 2).unwrap_err());
    assert_eq!(file.refresh_len().unwrap(), 10_000);
    file.read_exact_at(&mut memory[..10_000], 0).unwrap();
    assert_eq!(sparse::next_data(&file, 10_000).unwrap(), None);
}

/// Somebody cuts the file while it is open: the kernel's short read must end the loop.
#[test]
fn a_file_cut_underneath_ends_the_read() {
    let dir = disk_dir();
    for cut in [6000, 4096, 0] {
        let path = sparse_file(dir.path(), &format!("f{cut}"), 64 << 10);
        let file = DirectFile::open_rw(&path).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
        let mut memory = buf(64 << 10);
        let error = file.read_exact_at(&mut memory, 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{}", error.chain());
        assert!(error.chain().contains("stopped after"), "{}", error.chain());
        let mut queue = IoQueue::new(4).unwrap();
        // One slice: the first, short completion must be continued and then meet the end.
        let error = queue.read_batch(&[&file], &mut [(0, 0, &mut memory[..])]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{}", error.chain());
        let (low, high) = memory.split_at_mut(32 << 10);
        let error = queue.read_batch(&[&file], &mut [(0, 0, low), (0, 32 << 10, high)]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{}", error.chain());
        assert_eq!(file.refresh_len().unwrap(), cut);
    }
}

#[test]
fn resizing_moves_the_tail() {
    let dir = disk_dir();
    let file = DirectFile::create_new(dir.path().join("f"), 5000, 0o600).unwrap();
    let mut memory = buf(16384);
    file.write_all_at(&memory[..5000], 0).unwrap();
    file.set_len(9000).unwrap();
    file.write_all_at(&memory[..904], 8096).unwrap_err();
    file.write_all_at(&memory[..4096], 4096).unwrap();
    file.write_all_at(&memory[..808], 8192).unwrap();
    file.read_exact_at(&mut memory[..9000], 0).unwrap();
    assert!(memory[..9000].iter().all(|&b| b == 7));
    file.set_len(4100).unwrap();
    assert_eq!(file.len(), 4100);
    file.read_exact_at(&mut memory[..4100], 0).unwrap();
    file.sync_data().unwrap();
}

/// Needs root.
#[test]
fn a_full_file_system_is_enospc() {
    need_root();
    let device = Loop::new(32 << 20, 512);
    run("mkfs.ext4", &["-q", device.path.to_str().unwrap()]);
    let ext4 = Mounted::new(&[device.path.to_str().unwrap()]);
    let tmpfs = Mounted::new(&["-t", "tmpfs", "-o", "size=1m", "none"]);
    let memory = buf(64 << 10);
    let mut queue = IoQueue::new(8).unwrap();
    for mount in [&ext4, &tmpfs] {
        let file = DirectFile::create_new(mount.path().join("f"), 64 << 20, 0o600).unwrap();
        let offsets = (0..file.len()).step_by(memory.len());
        let full = offsets.clone().find_map(|at| file.write_all_at(&memory, at).err()).expect("it fills up");
        assert!(full.is_no_space() && !full.is_device_failure(), "{}", full.chain());
        let writes: Vec<_> = offsets.map(|at| (0, at, &memory[..])).collect();
        let full = queue.write_batch(&[&file], &writes).unwrap_err();
        assert!(full.is_no_space(), "{}", full.chain());
        assert!(sparse::preallocate(&file, 0, file.len()).unwrap_err().is_no_space());
        // Room again, and all of it works again.
        sparse::punch_hole(&file, 0, file.len()).unwrap();
        queue.write_batch(&[&file], &writes[..4]).unwrap();
        file.sync_data().unwrap();
    }
}

/// Needs root. The kernel writes what has room and says how much: the rest must be tried again, fail,
/// and be told.
#[test]
fn a_short_write_is_continued_to_its_error() {
    let tmpfs = Mounted::new(&["-t", "tmpfs", "-o", "size=256k", "none"]);
    let file = DirectFile::create_new(tmpfs.path().join("f"), 1 << 20, 0o600).unwrap();
    let memory = buf(1 << 20);
    let error = IoQueue::new(8).unwrap().write_batch(&[&file], &[(0, 0, &memory[..])]).unwrap_err();
    assert!(error.is_no_space(), "{}", error.chain());
    assert!(!error.doing().contains("1048576 bytes at 0 "), "the first part was written: {error}");
    sparse::punch_hole(&file, 0, 1 << 20).unwrap();
    assert!(file.write_all_at(&memory, 0).unwrap_err().is_no_space());
    sparse::punch_hole(&file, 0, 1 << 20).unwrap();
    assert!(file.write_all_at_durable(&memory, 0).unwrap_err().is_no_space());
}

/// Needs root. A loop file on a full tmpfs: the block device takes the write and fails it.
#[test]
fn a_failing_device_is_told_from_a_full_one() {
    need_root();
    let tmpfs = Mounted::new(&["-t", "tmpfs", "-o", "size=1m", "none"]);
    let backing = sparse_file(tmpfs.path(), "backing", 16 << 20);
    let device = Detach(run("losetup", &["--find", "--show", backing.to_str().unwrap()]));
    let file = DirectFile::open_rw(&device.0).unwrap();
    let memory = buf(1 << 20);
    let mut queue = IoQueue::new(8).unwrap();
    let writes: Vec<_> = (0..16u64).map(|n| (0, n << 20, &memory[..])).collect();
    // Which errno the loop driver gives for a full file below is the kernel's affair; that it is told
    // with its errno is ours.
    let error = queue.write_batch(&[&file], &writes).unwrap_err();
    assert!(error.is_device_failure() || error.is_no_space(), "{}", error.chain());
    let error = (0..16u64).find_map(|n| file.write_all_at(&memory, n << 20).err()).expect("it fails");
    assert!(error.errno().is_some(), "{}", error.chain());
    drop(file);
    drop(device);
}

/// Needs root.
#[test]
fn read_only_device() {
    let device = Loop::with(1 << 20, &["--read-only"]);
    DirectFile::open_read(&device.path).unwrap().read_exact_at(&mut buf(4096), 0).unwrap();
    // The kernel refuses at the opening (EACCES or EROFS) or at the write (EPERM).
    let failed = DirectFile::open_rw(&device.path).and_then(|file| file.write_all_at(&buf(4096), 0));
    assert!(failed.is_err());
    let mount = Mounted::new(&["-t", "tmpfs", "none"]);
    let path = sparse_file(mount.path(), "f", 4096);
    run("mount", &["-o", "remount,ro", mount.path().to_str().unwrap()]);
    assert!(DirectFile::open_rw(&path).unwrap_err().is_read_only());
}

/// Needs root.
#[test]
fn an_exclusive_claim_is_exclusive() {
    let device = Loop::new(1 << 20, 512);
    let first = DirectFile::open_rw_exclusive(&device.path).unwrap();
    let error = DirectFile::open_rw_exclusive(&device.path).unwrap_err();
    assert!(error.is_busy(), "{}", error.chain());
    drop(first);
    DirectFile::open_rw_exclusive(&device.path).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = sparse_file(dir.path(), "f", 4096);
    let first = DirectFile::open_rw_exclusive(&path).unwrap();
    let error = DirectFile::open_rw_exclusive(&path).unwrap_err();
    let us = format!("process {} (", std::process::id());
    assert!(error.is_busy() && error.chain().contains(&us), "{}", error.chain());
    DirectFile::open_rw(&path).expect("who does not ask is not kept out");
    drop(first);
    DirectFile::open_rw_exclusive(&path).unwrap();
}

/// Needs root: dm error targets are not on every kernel, so a file system that is shut down under an open
/// file stands for a disk that dies: XFS answers EIO from then on.
#[test]
fn a_sync_that_failed_stays_failed() {
    let device = Loop::new(320 << 20, 512);
    run("mkfs.xfs", &["-q", device.path.to_str().unwrap()]);
    let mount = Mounted::new(&[device.path.to_str().unwrap()]);
    let file = DirectFile::create_new(mount.path().join("f"), 1 << 20, 0o600).unwrap();
    file.write_all_at(&buf(4096), 0).unwrap();
    run("xfs_io", &["-x", "-c", "shutdown", mount.path().to_str().unwrap()]);
    let first = file.sync_data().unwrap_err();
    assert!(first.is_device_failure(), "{}", first.chain());
    let again = file.sync_data().unwrap_err();
    assert_eq!(again.errno(), first.errno());
    assert!(again.chain().contains("failed before"), "{}", again.chain());
    assert!(file.write_all_at_durable(&buf(4096), 0).unwrap_err().chain().contains("failed before"));
    let mut queue = IoQueue::new(4).unwrap();
    assert!(queue.write_batch(&[&file], &[(0, 0, &buf(4096))]).unwrap_err().is_device_failure());
}
