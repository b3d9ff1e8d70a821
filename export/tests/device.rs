//! Attached disks, with the real kernel: needs root, and /dev/fuse, loop devices and losetup, or ublk. What is there is taken, but
//! for what says `ublk_` or `loop_`; `make vm` runs all of it in guests, by each way (`VARVE_TEST_DEVICE`: nothing else will do).
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;
use varve_export::device::{self, Attached, Way, clean};
use varve_export::disks::{FileDisk, MemoryDisk};
use varve_export::{Disk, ExportError, ExportErrorKind, Stretch};
use varve_io::{AlignedBuf, DirectFile, sparse};

const MIB: usize = 1 << 20;

/// A directory that is looked at again at the end, panic or not: nothing of it may still be mounted or under a loop device.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
    fn dir(&self) -> PathBuf {
        self.0.path().join("attached")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let left = leftovers(self.0.path());
        let _ = clean(&self.dir());
        if !thread::panicking() {
            assert_eq!(left, Vec::<String>::new());
        }
    }
}

fn leftovers(dir: &Path) -> Vec<String> {
    let dir = fs::canonicalize(dir).unwrap();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut left: Vec<_> = mounts.lines().filter(|l| l.contains(dir.to_str().unwrap())).map(str::to_owned).collect();
    for entry in fs::read_dir("/sys/block").unwrap() {
        // The name of the file has the directory in it, as a number.
        let file = fs::read_to_string(entry.unwrap().path().join("loop/backing_file")).unwrap_or_default();
        if file.trim_end().ends_with(&file_name(&dir.join("attached"))) {
            left.push(file);
        }
    }
    left.extend(fs::read_dir(dir.join("attached")).into_iter().flatten().map(|e| format!("{e:?}")));
    left
}

fn file_name(dir: &Path) -> String {
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    format!("varve-disk-{:016x}", dir.to_str().unwrap().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, mix))
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(next).collect()
}

fn aligned(bytes: &[u8]) -> AlignedBuf {
    let mut buf = AlignedBuf::new(bytes.len());
    buf.copy_from_slice(bytes);
    buf
}

fn read_direct(device: &Path, offset: u64, len: usize) -> Result<Vec<u8>, varve_io::IoError> {
    let mut buf = AlignedBuf::new(len);
    DirectFile::open_read(device)?.read_exact_at(&mut buf, offset)?;
    Ok(buf.to_vec())
}

/// How disks have to be attached here.
fn expected_how() -> String {
    let offered = if varve_io::ublk::is_offered() { "ublk" } else { "fuse+loop" };
    std::env::var("VARVE_TEST_DEVICE").unwrap_or_else(|_| offered.to_owned())
}

fn by_ublk() -> bool {
    expected_how() == "ublk"
}

fn attach(disk: Arc<dyn Disk>, dir: &Path, name: &str, read_only: bool) -> Result<Attached, ExportError> {
    device::attach(disk, dir, name, read_only, if by_ublk() { Way::Fastest } else { Way::Loop })
}

fn mounted(attached: &Attached, at: &Path) -> Mounted {
    fs::create_dir_all(at).unwrap();
    assert!(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(attached.path()).status().unwrap().success());
    assert!(Command::new("mount").arg(attached.path()).arg(at).status().unwrap().success());
    Mounted(at.to_owned())
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: the device may be dead, and then there is nothing left to write.
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn what_is_written_is_on_the_disk() {
    let place = Place::new();
    let disk = Arc::new(MemoryDisk::new(8 * MIB));
    let mut attached = attach(disk.clone(), &place.dir(), "one", false).unwrap();
    assert_eq!(attached.how(), expected_how());
    let device = DirectFile::open_rw(attached.path()).unwrap();
    assert_eq!(device.len(), 8 << 20);
    let mut model = vec![0; 8 * MIB];
    // 3 MiB at once is more than one request of the kernel.
    for (offset, len, seed) in [(0, 4096, 1), (512, 512, 2), (4 * MIB, 3 * MIB, 3), (8 * MIB - 4096, 4096, 4)] {
        let bytes = noise(len, seed);
        if len % 4096 == 0 {
            device.write_all_at(&aligned(&bytes), offset as u64).unwrap();
        } else {
            let mut whole = aligned(&[0; 4096]);
            whole[..len].copy_from_slice(&bytes);
            device.write_all_at(&whole[..len], offset as u64).unwrap();
        }
        model[offset..offset + len].copy_from_slice(&bytes);
    }
    device.sync_data().unwrap();
    assert!(disk.snapshot() == model);
    drop(device);
    // Through the page cache as well.
    let mut buffered = File::options().read(true).write(true).open(attached.path()).unwrap();
    buffered.seek(SeekFrom::Start(1_000_001)).unwrap();
    buffered.write_all(b"between sectors").unwrap();
    buffered.sync_all().unwrap();
    model[1_000_001..1_000_016].copy_from_slice(b"between sectors");
    assert!(disk.snapshot() == model);
    let mut all = Vec::new();
    File::open(attached.path()).unwrap().read_to_end(&mut all).unwrap();
    assert!(all == model);
    drop(buffered);
    attached.detach().unwrap();
    assert!(!attached.mount_dir().exists());
    attached.detach().unwrap();
}

#[test]
fn discards_and_zeroes_reach_the_disk() {
    let place = Place::new();
    let disk = Arc::new(MemoryDisk::new(4 * MIB));
    let mut attached = attach(disk.clone(), &place.dir(), "one", false).unwrap();
    let device = DirectFile::open_rw(attached.path()).unwrap();
    device.write_all_at(&aligned(&noise(4 * MIB, 7)), 0).unwrap();
    sparse::punch_hole(&device, 1 << 20, 1 << 20).unwrap();
    let holes = |at: u64| disk.stretch(at, 4 << 20).unwrap();
    assert_eq!(holes(1 << 20), Stretch { len: 1 << 20, hole: true });
    sparse::zero_range(&device, 2 << 20, 64 << 10).unwrap();
    assert!(!holes(2 << 20).hole, "zeroes that shall stay allocated");
    let now = disk.snapshot();
    assert!(now[MIB..2 * MIB + (64 << 10)].iter().all(|&b| b == 0) && now[MIB - 1] != 0);
    drop(device);
    assert!(Command::new("blkdiscard").arg(attached.path()).status().unwrap().success());
    assert_eq!(holes(0), Stretch { len: 4 << 20, hole: true });
    attached.detach().unwrap();
}

/// Of ublk there is no file, and a block device's holes are not to be seen.
#[test]
fn loop_holes_are_seen_by_seek() {
    let place = Place::new();
    let disk = Arc::new(MemoryDisk::new(MIB));
    disk.write_at(&[1; 8192], 64 << 10).unwrap();
    disk.write_at(&[1; 4096], (1 << 20) - 4096).unwrap();
    let mut attached = device::attach(disk.clone(), &place.dir(), "one", true, Way::Loop).unwrap();
    let through = FileDisk::open(attached.file().unwrap(), true).unwrap();
    let mut at = 0;
    while at < 1 << 20 {
        let expected = disk.stretch(at, (1 << 20) - at).unwrap();
        assert_eq!(through.stretch(at, (1 << 20) - at).unwrap(), expected, "at {at}");
        at += expected.len;
    }
    drop(through);
    attached.detach().unwrap();
}

#[test]
fn read_only_is_read_only_all_the_way() {
    let place = Place::new();
    let bytes = noise(MIB, 5);
    // By the disk's word, without being asked for.
    let disk = Arc::new(MemoryDisk::read_only(bytes.clone()));
    let mut attached = attach(disk, &place.dir(), "ro", false).unwrap();
    assert!(read_direct(attached.path(), 0, MIB).unwrap() == bytes);
    let written = File::options().write(true).open(attached.path()).and_then(|mut f| {
        f.write_all(&[1; 512])?;
        f.sync_all()
    });
    assert!(written.is_err());
    if let Some(file) = attached.file() {
        assert!(File::options().write(true).open(file).is_err());
    }
    attached.detach().unwrap();
}

#[test]
fn a_mounted_device_is_not_taken_away() {
    let place = Place::new();
    let disk = Arc::new(MemoryDisk::new(32 * MIB));
    let mut attached = attach(disk, &place.dir(), "one", false).unwrap();
    let mount = mounted(&attached, &place.0.path().join("mnt"));
    fs::write(mount.0.join("file"), noise(MIB, 9)).unwrap();
    let error = attached.detach().unwrap_err();
    assert_eq!(error.kind(), ExportErrorKind::InUse);
    assert!(error.why().contains(mount.0.to_str().unwrap()), "{error}");
    assert!(fs::read(mount.0.join("file")).unwrap() == noise(MIB, 9), "still there");
    nix::mount::umount(&mount.0).unwrap();
    attached.detach().unwrap();
}

#[test]
fn a_device_that_is_read_is_told_and_goes_after() {
    let place = Place::new();
    let mut attached = attach(Arc::new(MemoryDisk::new(MIB)), &place.dir(), "one", false).unwrap();
    let path = attached.path().to_owned();
    let (end, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            // One open file.
            let (device, mut buf) = (DirectFile::open_read(&path).unwrap(), AlignedBuf::new(4096));
            while !end.load(Ordering::Relaxed) {
                device.read_exact_at(&mut buf, 0).unwrap();
                reads.fetch_add(1, Ordering::Relaxed);
            }
        });
        let error = attached.detach().unwrap_err();
        end.store(true, Ordering::Relaxed);
        assert_eq!(error.kind(), ExportErrorKind::InUse);
    });
    assert!(reads.into_inner() > 0);
    attached.detach().unwrap();
    assert!(!path.exists() || !by_ublk());
}

/// Of ublk the kernel does not tell who has it open; who asks for something is told by the test above.
#[test]
fn loop_an_open_device_is_told_and_goes_when_closed() {
    let place = Place::new();
    let mut attached = device::attach(Arc::new(MemoryDisk::new(MIB)), &place.dir(), "one", false, Way::Loop).unwrap();
    let open = File::open(attached.path()).unwrap();
    let error = attached.detach().unwrap_err();
    assert_eq!(error.kind(), ExportErrorKind::InUse);
    assert!(error.why().contains("open"), "{error}");
    drop(open);
    attached.detach().unwrap();
}

#[test]
fn dropping_a_used_device_hangs_nobody() {
    let place = Place::new();
    let disk = Arc::new(MemoryDisk::new(32 * MIB));
    let attached = attach(disk, &place.dir(), "one", false).unwrap();
    let mount = mounted(&attached, &place.0.path().join("mnt"));
    fs::write(mount.0.join("file"), noise(MIB, 9)).unwrap();
    let begin = Instant::now();
    drop(attached);
    let written =
        File::options().write(true).create(true).truncate(true).open(mount.0.join("more")).and_then(|mut f| {
            f.write_all(&noise(MIB, 1))?;
            f.sync_all()
        });
    assert!(written.is_err(), "the disk is gone");
    let cleaned = clean(&place.dir()).unwrap();
    if by_ublk() {
        assert_eq!(cleaned, Default::default());
    } else {
        assert!(cleaned.removed.is_empty() && cleaned.left.len() == 1, "{cleaned:?}");
        assert!(cleaned.left[0].contains(mount.0.to_str().unwrap()), "{cleaned:?}");
    }
    drop(mount);
    assert!(begin.elapsed() < Duration::from_secs(10));
    // The last mount is gone in the background.
    let begin = Instant::now();
    while !leftovers(place.0.path()).is_empty() && begin.elapsed() < Duration::from_secs(5) {
        thread::sleep(Duration::from_millis(10));
    }
}

/// A disk whose reads can be told to fail, panic, wait.
#[derive(Default)]
struct Moody {
    asked: AtomicU64,
    errno: AtomicU64,
    panic: AtomicBool,
    wait: Mutex<Duration>,
}

impl Disk for Moody {
    fn len(&self) -> u64 {
        1 << 20
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], _: u64) -> io::Result<()> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let wait = *self.wait.lock().unwrap();
        thread::sleep(wait);
        assert!(!self.panic.load(Ordering::Relaxed), "this test wants a panic");
        match self.errno.load(Ordering::Relaxed) {
            0 => buf.fill(7),
            errno => return Err(io::Error::from_raw_os_error(errno as i32)),
        }
        Ok(())
    }
    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    }
    fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn stretch(&self, _: u64, len: u64) -> io::Result<Stretch> {
        Ok(Stretch { len, hole: false })
    }
}

#[test]
fn errors_and_panics_of_a_disk_are_errors_of_a_request() {
    let place = Place::new();
    let disk = Arc::new(Moody::default());
    let mut attached = attach(disk.clone(), &place.dir(), "moody", false).unwrap();
    let read = || read_direct(attached.path(), 0, 4096);
    assert!(read().unwrap() == [7; 4096]);
    disk.errno.store(libc::ENODATA as u64, Ordering::Relaxed);
    assert!(read().unwrap_err().is_device_failure());
    disk.errno.store(0, Ordering::Relaxed);
    disk.panic.store(true, Ordering::Relaxed);
    for _ in 0..20 {
        assert_eq!(read().unwrap_err().errno(), Some(libc::EIO));
    }
    disk.panic.store(false, Ordering::Relaxed);
    assert!(read().unwrap() == [7; 4096]);
    let device = DirectFile::open_rw(attached.path()).unwrap();
    assert!(device.write_all_at(&aligned(&[1; 4096]), 0).is_err());
    drop(device);
    attached.detach().unwrap();
}

#[test]
#[ignore = "needs ublk: make vm"]
fn ublk_a_disk_that_hangs_keeps_no_device() {
    assert!(by_ublk());
    let place = Place::new();
    let disk = Arc::new(Moody::default());
    let attached = attach(disk.clone(), &place.dir(), "hangs", false).unwrap();
    *disk.wait.lock().unwrap() = Duration::from_secs(60);
    let (path, asked) = (attached.path().to_owned(), disk.asked.load(Ordering::Relaxed));
    thread::scope(|scope| {
        // More than there are threads to answer.
        let read = |at: u64| read_direct(&path, at * 65536, 4096).unwrap_err().errno();
        let readers: Vec<_> = (0..12).map(|at| scope.spawn(move || read(at))).collect();
        while disk.asked.load(Ordering::Relaxed) < asked + 8 {
            thread::sleep(Duration::from_millis(1));
        }
        let begin = Instant::now();
        drop(attached);
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
        for reader in readers {
            assert_eq!(reader.join().unwrap(), Some(libc::EIO));
        }
        assert!(!path.exists());
        // The next one is another device: late answers are nobody's.
        let bytes = noise(MIB, 3);
        let mut next = attach(Arc::new(MemoryDisk::read_only(bytes.clone())), &place.dir(), "hangs", true).unwrap();
        assert!(read_direct(next.path(), 0, MIB).unwrap() == bytes);
        next.detach().unwrap();
    });
}

#[test]
fn who_reads_a_device_that_is_taken_away_gets_an_error_and_no_end() {
    for _ in 0..5 {
        let place = Place::new();
        let attached = attach(Arc::new(MemoryDisk::new(MIB)), &place.dir(), "one", true).unwrap();
        let path = attached.path().to_owned();
        let reads = AtomicU64::new(0);
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut device = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
                let mut buf = AlignedBuf::new(4096);
                loop {
                    reads.fetch_add(1, Ordering::Relaxed);
                    device.rewind().unwrap();
                    match device.read(&mut buf) {
                        Ok(4096) => {}
                        other => return other.map_err(|e| e.raw_os_error()),
                    }
                }
            });
            while reads.load(Ordering::Relaxed) < 10 {
                thread::sleep(Duration::from_millis(1));
            }
            drop(attached);
            assert_eq!(reader.join().unwrap(), Err(Some(libc::EIO)));
        });
        let _ = clean(&place.dir());
    }
}

#[test]
fn readers_do_not_wait_for_one_another() {
    let place = Place::new();
    let disk = Arc::new(Moody::default());
    let mut attached = attach(disk.clone(), &place.dir(), "slow", false).unwrap();
    *disk.wait.lock().unwrap() = Duration::from_millis(700);
    let begin = Instant::now();
    thread::scope(|scope| {
        for at in 0..8 {
            let path = attached.path();
            scope.spawn(move || read_direct(path, at * 65536, 4096).unwrap());
        }
    });
    // One after another it were 5.6 s.
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    *disk.wait.lock().unwrap() = Duration::ZERO;
    attached.detach().unwrap();
}

#[test]
fn names_and_sizes() {
    let place = Place::new();
    let try_it = |len: usize, name: &str| attach(Arc::new(MemoryDisk::new(len)), &place.dir(), name, false);
    for name in ["", ".", "..", ".x", "a/b", "a\0b", &"x".repeat(256)] {
        assert_eq!(try_it(MIB, name).unwrap_err().kind(), ExportErrorKind::Unfit, "{name:?}");
    }
    for len in [0, 511, 513] {
        assert_eq!(try_it(len, "size").unwrap_err().kind(), ExportErrorKind::Unfit, "{len}");
    }
    let mut odd = try_it(512 * 3, "a name with spaces, ünd more").unwrap();
    assert_eq!(try_it(MIB, "a name with spaces, ünd more").unwrap_err().kind(), ExportErrorKind::Exists);
    assert_eq!(fs::read(odd.path()).unwrap().len(), 1536);
    // What lives is not cleaned.
    let cleaned = clean(&place.dir()).unwrap();
    assert!(cleaned.removed.is_empty() && cleaned.left.is_empty(), "{cleaned:?}");
    assert_eq!(fs::read(odd.path()).unwrap().len(), 1536);
    odd.detach().unwrap();
}

#[test]
fn many_come_and_go_at_once() {
    let place = Place::new();
    let begin = Instant::now();
    thread::scope(|scope| {
        for thread in 0..4 {
            let dir = place.dir();
            scope.spawn(move || {
                for round in 0..5 {
                    let bytes = noise(MIB, thread * 100 + round);
                    let disk = Arc::new(MemoryDisk::read_only(bytes.clone()));
                    let mut attached = attach(disk, &dir, &format!("{thread}-{round}"), true).unwrap();
                    assert!(read_direct(attached.path(), 0, MIB).unwrap() == bytes);
                    attached.detach().unwrap();
                }
            });
        }
    });
    // Nobody hangs; an emulated machine takes half a minute.
    assert!(begin.elapsed() < Duration::from_secs(120), "{:?}", begin.elapsed());
}

const CHILD_DIR: &str = "VARVE_TEST_CHILD_DIR";

/// What waits for the disk in the kernel while it makes the device would keep a process that is killed.
#[test]
#[ignore = "needs ublk: make vm"]
fn ublk_a_device_is_made_and_taken_away_without_its_disk() {
    assert!(by_ublk());
    let place = Place::new();
    let disk = Arc::new(Moody::default());
    *disk.wait.lock().unwrap() = Duration::from_secs(600);
    drop(attach(disk.clone(), &place.dir(), "one", false).unwrap());
    assert_eq!(disk.asked.load(Ordering::Relaxed), 0);
}

/// Not a test: the process that is killed by the next one.
#[test]
fn child_that_is_killed() {
    let Ok(dir) = std::env::var(CHILD_DIR) else { return };
    let disk = Arc::new(Moody::default());
    let attached = attach(disk.clone(), Path::new(&dir), "killed", false).unwrap();
    *disk.wait.lock().unwrap() = Duration::from_secs(600);
    println!("device {}", attached.path().display());
    thread::sleep(Duration::from_secs(600));
}

#[test]
fn a_killed_daemon_hangs_nobody_and_is_cleaned_up() {
    killed(Command::new(std::env::current_exe().unwrap()), 2);
}

#[test]
fn a_killed_daemon_with_its_own_mounts_is_cleaned_up() {
    // Its mounts die with it; the loop device stays and has no path any more.
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--propagation", "private"]).arg(std::env::current_exe().unwrap());
    killed(unshare, 1);
}

/// `removed` counts what is cleaned up: the loop device, and the mount where it outlives the daemon. A ublk disk goes by itself
/// and leaves its number.
fn killed(mut program: Command, removed: usize) {
    let place = Place::new();
    let mut child = program
        .args(["--exact", "child_that_is_killed", "--nocapture"])
        .env(CHILD_DIR, place.dir())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = lines.map_while(Result::ok).find_map(|l| l.split_once("device ").map(|(_, d)| d.to_owned())).unwrap();
    let device = PathBuf::from(line);
    let waiting = thread::spawn({
        let device = device.clone();
        move || read_direct(&device, 0, 4096).unwrap_err().errno()
    });
    thread::sleep(Duration::from_millis(200));
    assert!(!waiting.is_finished(), "its disk does not answer");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(waiting.join().unwrap(), Some(libc::EIO));
    let after = read_direct(&device, 8192, 4096).unwrap_err().errno();
    if by_ublk() {
        assert!([libc::EIO, libc::ENOENT, libc::ENXIO].map(Some).contains(&after), "{after:?}");
    } else {
        assert_eq!(after, Some(libc::EIO));
    }
    let removed = if by_ublk() { 1 } else { removed };
    assert_eq!(leftovers(place.0.path()).len(), removed + usize::from(!by_ublk()), "and a directory");
    let cleaned = clean(&place.dir()).unwrap();
    assert_eq!((cleaned.removed.len(), cleaned.left.len()), (removed, 0), "{cleaned:?}");
    assert!(!device.exists() || !by_ublk());
    assert_eq!(leftovers(place.0.path()), Vec::<String>::new());
    assert_eq!(clean(&place.dir()).unwrap(), Default::default());
}
