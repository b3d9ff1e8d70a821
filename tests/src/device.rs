//! Loop devices over files.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::{Scratch, complain, run, run_ok};

/// How a loop device is set up.
#[derive(Debug, Clone, Copy)]
pub struct LoopOptions {
    /// Logical sector in bytes: 512, 1024, 2048 or 4096.
    pub sector_bytes: u32,
    /// Partitions show up as devices of their own.
    pub partscan: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// The backing file is read and written with O_DIRECT.
    pub direct_io: bool,
}

impl Default for LoopOptions {
    fn default() -> Self {
        LoopOptions { sector_bytes: 512, partscan: false, read_only: false, direct_io: false }
    }
}

/// A loop device; `Drop` detaches it. The backing file belongs to whoever made it.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    backing: PathBuf,
    partitioned: std::sync::atomic::AtomicBool,
}

impl LoopDevice {
    /// A device of `bytes` over a new sparse file in `scratch`.
    #[track_caller]
    pub fn new(scratch: &Scratch, name: &str, bytes: u64) -> Self {
        Self::over(&scratch.file(name, bytes), LoopOptions::default())
    }

    /// A device over an existing file.
    #[track_caller]
    pub fn over(backing: &Path, options: LoopOptions) -> Self {
        let mut command = Command::new("losetup");
        command.args(["--find", "--show", "--sector-size", &options.sector_bytes.to_string()]);
        command.arg(format!("--direct-io={}", if options.direct_io { "on" } else { "off" }));
        if options.partscan {
            command.arg("--partscan");
        }
        if options.read_only {
            command.arg("--read-only");
        }
        let path = run(command.arg(backing)).ok().stdout.trim().into();
        LoopDevice { path, backing: backing.to_owned(), partitioned: false.into() }
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file below it.
    pub fn backing(&self) -> &Path {
        &self.backing
    }

    /// Writes a partition table (an `sfdisk` script such as `size=100MiB\nsize=+`) and returns the partitions' devices.
    /// Needs `partscan`.
    #[track_caller]
    pub fn partition(&self, script: &str) -> Vec<PathBuf> {
        let file = self.backing.with_extension("sfdisk");
        std::fs::write(&file, format!("label: gpt\n{script}\n")).unwrap();
        let command =
            format!("exec sfdisk --quiet --wipe always --no-tell-kernel {} <{}", self.path.display(), file.display());
        run_ok("sh", &["-c", &command]);
        std::fs::remove_file(file).unwrap();
        // Some kernels are built without any partition parser: partx reads the table itself and adds what it finds.
        self.partitioned.store(true, std::sync::atomic::Ordering::Relaxed);
        run_ok("partx", &[Path::new("--update"), &self.path]);
        let wanted = script.lines().filter(|line| !line.trim().is_empty()).count();
        let parts: Vec<PathBuf> =
            (1..=wanted).map(|number| format!("{}p{number}", self.path.display()).into()).collect();
        crate::wait_until(Duration::from_secs(10), "the partitions' devices show up", || {
            parts.iter().all(|part| part.exists())
        });
        parts
    }

    /// Makes the device see that its file has grown or shrunk.
    #[track_caller]
    pub fn resize(&self, bytes: u64) {
        std::fs::File::options().write(true).open(&self.backing).unwrap().set_len(bytes).unwrap();
        run_ok("losetup", &[Path::new("--set-capacity"), &self.path]);
    }

    fn attached(&self) -> bool {
        let name = self.path.file_name().unwrap().to_string_lossy().into_owned();
        // The number may already belong to somebody else's file.
        std::fs::read_to_string(format!("/sys/block/{name}/loop/backing_file"))
            .is_ok_and(|file| file.trim().trim_end_matches(" (deleted)") == self.backing.to_string_lossy())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if self.partitioned.load(std::sync::atomic::Ordering::Relaxed) {
            // Partitions that partx added outlive the loop device, and would turn up on the next file that gets its number.
            run(Command::new("partx").arg("--delete").arg(&self.path));
        }
        // What somebody made read-only stays so for the next file that gets its number.
        run(Command::new("blockdev").arg("--setrw").arg(&self.path));
        let out = run(Command::new("losetup").arg("--detach").arg(&self.path));
        // Detaching a device in use is put off until its last user closes it.
        let start = Instant::now();
        while self.attached() && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(20));
        }
        if self.attached() {
            complain(&format!("{} is still in use by somebody: {}", self.path.display(), out.stderr));
        }
    }
}

/// Bytes of a device or file.
#[track_caller]
pub fn size_bytes(path: &Path) -> u64 {
    use std::io::{Seek, SeekFrom};
    let open = std::fs::File::open(path).and_then(|mut file| file.seek(SeekFrom::End(0)));
    open.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Logical sector of a device.
#[track_caller]
pub fn logical_sector_bytes(device: &Path) -> u32 {
    run_ok("blockdev", &[Path::new("--getss"), device]).parse().unwrap()
}
