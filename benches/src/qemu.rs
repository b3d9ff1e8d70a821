//! The peer: `qemu-storage-daemon` (Debian: qemu-system-common). It serves an image over NBD on a Unix socket, nbdfuse
//! makes that a file, a loop device makes that a block device, and a mirror job copies what is written to the image of
//! a second daemon, over NBD on TCP. (Its own FUSE export would save a step, but what it exports cannot be mirrored: it
//! wants to be able to resize.)

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use varve_tests::{Child, LoopDevice, LoopOptions, Scratch, free_port, wait_until};

const PROGRAM: &str = "qemu-storage-daemon";
const LIMIT: Duration = Duration::from_secs(20);
const JOB: &str = "mirror";

/// Whether it is installed.
pub fn is_there() -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(PROGRAM).exists()))
}

/// When a mirror copies.
#[derive(Clone, Copy)]
pub enum Mode {
    /// Before the write is answered.
    WriteBlocking,
    /// Later, what was dirtied, each block once.
    Background,
}

/// How a mirror reaches its target.
#[derive(Clone, Copy)]
pub enum Way {
    /// As to another machine.
    Tcp,
    /// On this machine only.
    Unix,
}

/// A running daemon with its control connection.
struct Daemon {
    child: Child,
    control: BufReader<UnixStream>,
}

impl Daemon {
    #[track_caller]
    fn start(dir: &Path, image: &Path, exports: &[String]) -> Self {
        let socket = dir.join("qmp");
        let mut args: Vec<String> = ["--chardev", "--monitor", "--blockdev"].map(String::from).into();
        args.insert(1, format!("socket,id=control,path={},server=on,wait=off", socket.display()));
        args.insert(3, "chardev=control".into());
        args.push(format!("driver=raw,node-name=disk,file.driver=file,file.filename={}", image.display()));
        args.extend_from_slice(exports);
        let mut child = Child::start(PROGRAM, &args, &dir.join("qemu.log"), |_| {});
        wait_until(LIMIT, "qemu-storage-daemon listens", || {
            assert_eq!(child.exit_code(), None, "{PROGRAM} ended: {}", child.log());
            UnixStream::connect(&socket).is_ok()
        });
        let mut daemon = Daemon { child, control: BufReader::new(UnixStream::connect(&socket).unwrap()) };
        daemon.line();
        daemon.ask("qmp_capabilities", &json!({}));
        daemon
    }

    #[track_caller]
    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.control.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{PROGRAM} said ({error}): {line}"))
    }

    #[track_caller]
    fn ask(&mut self, command: &str, arguments: &Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        self.control.get_mut().write_all(request.as_bytes()).unwrap();
        loop {
            // Events may come in between.
            let mut reply = self.line();
            assert!(reply.get("error").is_none(), "{PROGRAM}: {command}: {reply}");
            if reply.get("return").is_some() {
                return reply["return"].take();
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.signal(Signal::SIGTERM);
        self.child.wait(LIMIT);
    }
}

/// A block device that is an image served by a daemon, perhaps with a mirror.
pub struct Device {
    // The order of the fields is the order of their end; see `Drop`.
    device: Option<LoopDevice>,
    fuse: Child,
    point: PathBuf,
    source: Daemon,
    target: Option<Daemon>,
    image: PathBuf,
    replica: PathBuf,
    _memory: Scratch,
    disk: Scratch,
}

impl Device {
    /// Over an image in memory made by `fill`.
    #[track_caller]
    pub fn new(bytes: u64, fill: impl FnOnce(&Path)) -> Self {
        let (memory, disk) = (Scratch::memory(), Scratch::disk());
        let image = memory.file("image", bytes);
        fill(&image);
        let (socket, point) = (memory.join("nbd"), memory.dir("fuse"));
        let exports = [
            "--nbd-server".into(),
            format!("addr.type=unix,addr.path={}", socket.display()),
            "--export".into(),
            "type=nbd,id=export,node-name=disk,name=disk,writable=on".into(),
        ];
        let source = Daemon::start(memory.path(), &image, &exports);
        let file = point.join("disk");
        let uri = format!("nbd+unix:///disk?socket={}", socket.display());
        let args = [file.as_os_str(), uri.as_ref()];
        let mut fuse = Child::start("nbdfuse", &args, &memory.join("nbdfuse.log"), |_| {});
        wait_until(LIMIT, "nbdfuse serves its file", || {
            assert_eq!(fuse.exit_code(), None, "nbdfuse ended: {}", fuse.log());
            file.exists()
        });
        let device = Some(LoopDevice::over(&file, LoopOptions { direct_io: true, ..LoopOptions::default() }));
        let replica = disk.join("replica");
        Device { device, fuse, point, source, target: None, image, replica, _memory: memory, disk }
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        self.device.as_ref().unwrap().path()
    }

    /// The image below it.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Mirrors to an image on the disk and waits until that has caught up.
    #[track_caller]
    pub fn mirror(&mut self, mode: Mode, way: Way) {
        let bytes = std::fs::metadata(&self.image).unwrap().len();
        let replica = self.disk.file("replica", bytes);
        let (address, server) = match way {
            Way::Tcp => {
                let (host, port) = ("127.0.0.1", free_port().to_string());
                let server = json!({"type": "inet", "host": host, "port": port});
                (format!("addr.type=inet,addr.host={host},addr.port={port}"), server)
            }
            Way::Unix => {
                let path = self.disk.join("nbd");
                (format!("addr.type=unix,addr.path={}", path.display()), json!({"type": "unix", "path": path}))
            }
        };
        let export = "type=nbd,id=export,node-name=disk,name=disk,writable=on";
        let exports = ["--nbd-server", &address, "--export", export].map(String::from);
        self.target = Some(Daemon::start(self.disk.path(), &replica, &exports));
        let mode = match mode {
            Mode::WriteBlocking => "write-blocking",
            Mode::Background => "background",
        };
        let node = json!({"driver": "nbd", "node-name": "target", "server": server, "export": "disk"});
        self.source.ask("blockdev-add", &node);
        let job = json!({"job-id": JOB, "device": "disk", "target": "target", "sync": "full", "copy-mode": mode});
        self.source.ask("blockdev-mirror", &job);
        self.wait_equal(Duration::from_secs(120));
    }

    /// Waits until the mirror has nothing left to copy.
    #[track_caller]
    pub fn wait_equal(&mut self, limit: Duration) {
        wait_until(limit, "the mirror has caught up", || {
            let jobs = self.source.ask("query-block-jobs", &json!({}));
            let job = &jobs[0];
            assert!(job.is_object(), "the mirror has ended: {}", self.source.child.log());
            job["ready"] == true && job["offset"] == job["len"]
        });
    }

    /// Ends the mirror and returns the replica: as equal as it claims to be.
    #[track_caller]
    pub fn end_mirror(&mut self) -> PathBuf {
        self.source.ask("block-job-cancel", &json!({"device": JOB}));
        wait_until(LIMIT, "the mirror ends", || {
            self.source.ask("query-block-jobs", &json!({})).as_array().is_some_and(Vec::is_empty)
        });
        self.target = None;
        self.replica.clone()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.device = None;
        // What is still mounted in the end, the scratch directory unmounts.
        let _ = nix::mount::umount2(&self.point, nix::mount::MntFlags::empty());
        self.fuse.wait(LIMIT);
    }
}
