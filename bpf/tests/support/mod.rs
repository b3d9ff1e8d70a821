//! Devices for the tests: everything made here is taken away again when it is dropped, also on panic.
#![allow(dead_code, unreachable_pub, unsafe_code, clippy::unwrap_used)]

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::libc;
use tempfile::TempDir;
use varve_bpf::{Capture, CaptureOptions, VolumeSpec};

pub mod aligned;
pub mod judge;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// Runs a command and returns what it printed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let out = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(out.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().trim().to_string()
}

/// A device that ends the tests' interest in it when dropped.
pub struct Device {
    pub path: PathBuf,
    pub number: (u32, u32),
    pub request_based: bool,
    kind: Kind,
}

enum Kind {
    Loop,
    Zram(u32),
    /// Somebody else's.
    Given,
}

impl Device {
    fn new(path: PathBuf, kind: Kind) -> Self {
        let number = fs::metadata(&path).unwrap().rdev();
        let number = (libc::major(number), libc::minor(number));
        let request_based = Path::new(&format!("/sys/dev/block/{}:{}/mq", number.0, number.1)).exists();
        Self { path, number, request_based, kind }
    }

    /// A loop device with direct I/O off (so that any sector size works) over `backing`.
    pub fn over(backing: &Path, more: &[&str]) -> Self {
        let mut arguments = vec!["--find", "--show"];
        arguments.extend(more);
        arguments.push(backing.to_str().unwrap());
        // Parallel tests may race for a free device.
        for _ in 0..20 {
            let out = Command::new("losetup").args(&arguments).output().unwrap();
            if out.status.success() {
                let path = PathBuf::from(String::from_utf8(out.stdout).unwrap().trim());
                return Self::new(path, Kind::Loop);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("losetup {arguments:?} failed");
    }

    /// A device that is there.
    pub fn at(path: PathBuf) -> Self {
        Self::new(path, Kind::Given)
    }

    /// A bio-based device: a compressed RAM disk of its own.
    pub fn zram(bytes: u64) -> Self {
        let id: u32 = fs::read_to_string("/sys/class/zram-control/hot_add").unwrap().trim().parse().unwrap();
        fs::write(format!("/sys/block/zram{id}/disksize"), bytes.to_string()).unwrap();
        let device = Self::new(PathBuf::from(format!("/dev/zram{id}")), Kind::Zram(id));
        assert!(!device.request_based);
        device
    }

    pub fn bytes(&self) -> u64 {
        let sys = format!("/sys/dev/block/{}:{}/size", self.number.0, self.number.1);
        fs::read_to_string(sys).unwrap().trim().parse::<u64>().unwrap() * 512
    }

    pub fn whole(&self) -> VolumeSpec {
        self.part(0, self.bytes())
    }

    pub fn part(&self, start_bytes: u64, bytes: u64) -> VolumeSpec {
        VolumeSpec { disk: self.number, start_bytes, bytes, request_based: self.request_based }
    }

    pub fn direct(&self) -> File {
        open(&self.path, libc::O_DIRECT)
    }

    pub fn buffered(&self) -> File {
        open(&self.path, 0)
    }

    /// What the device holds, past the page cache.
    pub fn read_all(&self) -> Vec<u8> {
        self.buffered().sync_all().unwrap();
        let file = self.direct();
        let mut image = vec![0; self.bytes() as usize];
        let mut buffer = aligned::Buffer::new(MIB as usize, 0);
        let mut at = 0;
        while at < image.len() {
            let n = (image.len() - at).min(MIB as usize);
            file.read_exact_at(&mut buffer.bytes_mut()[..n], at as u64).unwrap();
            image[at..at + n].copy_from_slice(&buffer.bytes()[..n]);
            at += n;
        }
        image
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        match self.kind {
            Kind::Loop => drop(Command::new("losetup").arg("-d").arg(&self.path).output()),
            Kind::Zram(id) => {
                let _ = fs::write(format!("/sys/block/zram{id}/reset"), "1");
                let _ = fs::write("/sys/class/zram-control/hot_remove", id.to_string());
            }
            Kind::Given => {}
        }
    }
}

pub fn open(path: &Path, flags: i32) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).unwrap()
}

/// A directory in memory.
pub fn memory_dir() -> TempDir {
    tempfile::Builder::new().prefix("varve-bpf-").tempdir_in("/dev/shm").unwrap()
}

/// A directory on a real disk.
pub fn disk_dir() -> TempDir {
    tempfile::Builder::new().prefix("varve-bpf-").tempdir_in("/var/tmp").unwrap()
}

/// A loop device with the directory of its backing file. The order of the members is the order of their end.
pub struct LoopDevice {
    pub device: Device,
    pub backing: PathBuf,
    _dir: TempDir,
}

impl std::ops::Deref for LoopDevice {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.device
    }
}

pub fn loop_device(bytes: u64) -> LoopDevice {
    loop_device_in(memory_dir(), bytes, &[])
}

pub fn loop_device_in(dir: TempDir, bytes: u64, more: &[&str]) -> LoopDevice {
    let backing = dir.path().join("backing");
    File::create(&backing).unwrap().set_len(bytes).unwrap();
    LoopDevice { device: Device::over(&backing, more), backing, _dir: dir }
}

/// A loop device whose writes take `delay`, through nbdkit and nbdfuse.
pub struct SlowDevice {
    pub device: Option<Device>,
    children: Vec<Child>,
    mount: PathBuf,
    _dir: TempDir,
}

impl SlowDevice {
    pub fn new(bytes: u64, delay: &str) -> Self {
        let dir = memory_dir();
        let backing = dir.path().join("backing");
        File::create(&backing).unwrap().set_len(bytes).unwrap();
        let socket = dir.path().join("socket");
        let mount = dir.path().join("mount");
        File::create(&mount).unwrap();
        let nbdkit = Command::new("nbdkit")
            .args(["-f", "-U", socket.to_str().unwrap(), "--filter=delay", "file"])
            .arg(&backing)
            .arg(format!("wdelay={delay}"))
            .spawn()
            .unwrap();
        wait_for("nbdkit's socket", || socket.exists());
        let nbdfuse = Command::new("nbdfuse").arg(&mount).arg("--unix").arg(&socket).spawn().unwrap();
        let mut slow = Self { device: None, children: vec![nbdfuse, nbdkit], mount, _dir: dir };
        wait_for("nbdfuse's mount", || fs::metadata(&slow.mount).is_ok_and(|m| m.len() == bytes));
        slow.device = Some(Device::over(&slow.mount, &[]));
        slow
    }

    pub fn device(&self) -> &Device {
        self.device.as_ref().unwrap()
    }
}

impl Drop for SlowDevice {
    fn drop(&mut self) {
        self.device = None;
        for _ in 0..100 {
            let out = Command::new("fusermount3").arg("-u").arg(&self.mount).output();
            if out.is_ok_and(|out| out.status.success()) {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        for child in &mut self.children {
            // SAFETY-free: a signal to a child of ours that was not waited for yet.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Loads the programs; calibrates on the device.
pub fn load(device: &Device) -> Capture {
    Capture::load(&CaptureOptions { probe: device.path.clone() }).unwrap_or_else(|e| {
        panic!("{e}: {:?} (hint: {})", std::error::Error::source(&e).map(ToString::to_string), e.hint())
    })
}

/// An ioctl on a range of a block device: BLKDISCARD, BLKZEROOUT, ...
pub fn range_ioctl(file: &File, request: u64, offset: u64, bytes: u64) {
    let range = [offset, bytes];
    // SAFETY: these requests read two 64-bit words from the pointer.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, range.as_ptr()) };
    assert_eq!(result, 0, "ioctl {request:#x}: {}", std::io::Error::last_os_error());
}

pub const BLKDISCARD: u64 = 0x1277;
pub const BLKZEROOUT: u64 = 0x127f;

/// The seed of this run: from VARVE_SEED, else new; printed so that a failure can be replayed.
pub fn seed() -> u64 {
    let seed = std::env::var("VARVE_SEED").map_or_else(|_| rand::random(), |s| s.parse().unwrap());
    eprintln!("VARVE_SEED={seed}");
    seed
}

/// A mounted filesystem, unmounted when dropped.
pub struct Mount {
    dir: TempDir,
}

impl Mount {
    pub fn ext4(device: &Path) -> Self {
        run("mkfs.ext4", &["-q", device.to_str().unwrap()]);
        Self::new(&[device.to_str().unwrap()])
    }

    /// A file system in memory of limited size.
    pub fn tmpfs(bytes: u64) -> Self {
        Self::new(&["-t", "tmpfs", "-o", &format!("size={bytes}"), "varve-test"])
    }

    fn new(arguments: &[&str]) -> Self {
        let dir = memory_dir();
        let mut all = arguments.to_vec();
        all.push(dir.path().to_str().unwrap());
        run("mount", &all);
        Self { dir }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        for _ in 0..100 {
            if Command::new("umount").arg(self.dir.path()).output().is_ok_and(|out| out.status.success()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The sum of all counts of a group.
pub fn in_flight_total(group: &varve_bpf::Group) -> i64 {
    group.volumes().iter().flat_map(|v| (0..v.regions()).map(|r| v.in_flight_bytes(r))).sum()
}

/// Every count of an idle group is zero.
pub fn assert_in_flight_zero(group: &varve_bpf::Group) {
    for volume in group.volumes() {
        for region in 0..volume.regions() {
            assert_eq!(volume.in_flight_bytes(region), 0, "region {region} of an idle device is in flight");
        }
    }
}

/// Brings the counts of an idle group to zero and returns the regions for which that took `tend`.
///
/// The kernel of some build hosts (`-fc-`) skips tracing programs in the context of process 1, also when an interrupt
/// completes somebody's request there. On any other kernel a count that is left over is an error of ours.
pub fn bring_to_zero(capture: &Capture, group: &varve_bpf::Group) -> Vec<(usize, u64)> {
    let mut stuck = Vec::new();
    for (i, volume) in group.volumes().iter().enumerate() {
        for region in 0..volume.regions() {
            let bytes = volume.in_flight_bytes(region);
            assert!(bytes >= 0, "region {region}: {bytes} bytes in flight");
            if bytes > 0 {
                eprintln!("volume {i} region {region}: {bytes} bytes never completed");
                stuck.push((i, region));
            }
        }
    }
    if !stuck.is_empty() {
        assert!(run("uname", &["-r"]).contains("-fc-"), "completions went unseen: {stuck:?}");
        wait_for("tend", || {
            capture.tend().unwrap();
            in_flight_total(group) == 0
        });
        for &(volume, region) in &stuck {
            assert!(group.volumes()[volume].take_dirty(region), "an unseen completion may have been an error");
        }
    }
    assert_in_flight_zero(group);
    stuck
}
