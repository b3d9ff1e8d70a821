//! What the tests of this crate share: real loop devices, zram and mounts, all taken down by `Drop`.
#![allow(dead_code, clippy::unwrap_used, reason = "shared by several test binaries; a failed set-up fails the test")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Tests that use it need root. They fail without it: a test that silently passes tests nothing.
pub(crate) fn need_root() {
    assert!(nix::unistd::geteuid().is_root(), "this test sets up block devices and mounts: run it as root");
}

/// Runs a program and gives its output, trimmed; fails the test if it fails.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}{errors}");
    text
}

/// `mkfs.btrfs`, which asks every mounted loop device for its file and gives up at the first that does not answer: tests of
/// daemons that are killed under a mount have such a device for a moment, and they run beside this one.
pub(crate) fn mkfs_btrfs(args: &[&str]) {
    let begin = Instant::now();
    loop {
        let output = Command::new("mkfs.btrfs").args(args).output().unwrap();
        if output.status.success() {
            return;
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        let others = errors.contains("cannot check mount status") && begin.elapsed() < Duration::from_secs(20);
        assert!(others, "mkfs.btrfs {args:?}: {errors}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A directory on the disk that the checkout is on (real O_DIRECT).
pub(crate) fn disk_dir() -> TempDir {
    TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A directory on tmpfs.
pub(crate) fn tmpfs_dir() -> TempDir {
    TempDir::new_in("/dev/shm").unwrap()
}

/// A file of `len` zero bytes, all hole.
pub(crate) fn sparse_file(dir: &Path, name: &str, len: u64) -> PathBuf {
    let path = dir.join(name);
    File::create(&path).unwrap().set_len(len).unwrap();
    path
}

/// A loop device over a file on tmpfs.
pub(crate) struct Loop {
    pub(crate) path: PathBuf,
    pub(crate) backing: PathBuf,
    dir: TempDir,
}

impl Loop {
    pub(crate) fn new(bytes: u64, sector: u32) -> Self {
        Self::with(bytes, &["--sector-size", &sector.to_string()])
    }

    pub(crate) fn with(bytes: u64, options: &[&str]) -> Self {
        need_root();
        let dir = tmpfs_dir();
        let backing = sparse_file(dir.path(), "backing", bytes);
        let mut args = vec!["--find", "--show"];
        args.extend(options);
        args.push(backing.to_str().unwrap());
        let path = PathBuf::from(run("losetup", &args));
        Self { path, backing, dir }
    }

    pub(crate) fn name(&self) -> String {
        self.path.file_name().unwrap().to_str().unwrap().to_owned()
    }

    /// Writes a partition table by sfdisk's script language and waits for the nodes.
    pub(crate) fn partition(&self, script: &str, count: u32) -> Vec<PathBuf> {
        let file = self.dir.path().join("script");
        fs::write(&file, script).unwrap();
        let device = self.path.to_str().unwrap();
        run("sh", &["-c", &format!("sfdisk --quiet {device} < {}", file.display())]);
        let parts: Vec<PathBuf> = (1..=count).map(|n| PathBuf::from(format!("{device}p{n}"))).collect();
        if !parts.iter().all(|part| part.exists()) {
            // A kernel built without partition tables: partx reads them and tells it.
            run("partx", &["--add", device]);
        }
        let limit = Instant::now() + Duration::from_secs(10);
        while !parts.iter().all(|part| part.exists()) {
            assert!(Instant::now() < limit, "no partition nodes for {device}");
            std::thread::sleep(Duration::from_millis(10));
        }
        parts
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        detach(&self.path);
    }
}

/// Detaches a loop device and its partitions, and waits until the kernel has done it: a detach is put off
/// while anybody (a scan of all devices in another test) has the device open, and holds up the unmount
/// of the file system that the backing file is on.
pub(crate) fn detach(device: &Path) {
    let name = device.to_str().unwrap_or_default();
    let attribute = format!("/sys/block/{}/loop/backing_file", name.trim_start_matches("/dev/"));
    let Ok(ours) = fs::read_to_string(&attribute) else { return };
    // Fails where there are none, which is the rule.
    let _ = Command::new("partx").args(["--delete", name]).output();
    // Once: a second try could hit a device of somebody else, who was given the freed number.
    let _ = Command::new("losetup").args(["--detach", name]).status();
    let limit = Instant::now() + Duration::from_secs(5);
    while fs::read_to_string(&attribute).is_ok_and(|now| now == ours) && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A loop device by its node, detached when dropped.
pub(crate) struct Detach(pub(crate) String);

impl Drop for Detach {
    fn drop(&mut self) {
        detach(Path::new(&self.0));
    }
}

/// A mount, unmounted when dropped. Declare it after what it stands on.
pub(crate) struct Mounted {
    pub(crate) target: TempDir,
}

impl Mounted {
    pub(crate) fn new(args: &[&str]) -> Self {
        need_root();
        let target = tmpfs_dir();
        let mut all = args.to_vec();
        all.push(target.path().to_str().unwrap());
        run("mount", &all);
        Self { target }
    }

    pub(crate) fn path(&self) -> &Path {
        self.target.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for _ in 0..100 {
            match Command::new("umount").arg(self.target.path()).output() {
                Ok(output) if output.status.success() => return,
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        // No panic: this runs while a test fails.
        eprintln!("LEFT BEHIND: {} is still mounted after two seconds", self.target.path().display());
    }
}

/// A zram device of its own: bio-based, 4096-byte sectors.
pub(crate) struct Zram {
    number: u32,
}

impl Zram {
    pub(crate) fn new(bytes: u64) -> Self {
        need_root();
        let number = fs::read_to_string("/sys/class/zram-control/hot_add").expect("a kernel with zram");
        let zram = Self { number: number.trim().parse().unwrap() };
        fs::write(format!("/sys/block/zram{}/disksize", zram.number), bytes.to_string()).unwrap();
        zram
    }

    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/zram{}", self.number))
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let _ = fs::write(format!("/sys/block/zram{}/reset", self.number), "1");
        let _ = fs::write("/sys/class/zram-control/hot_remove", self.number.to_string());
    }
}

/// `len` bytes that differ for different seeds.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}
