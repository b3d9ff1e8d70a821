//! The bubble that a test runs in: network, mounts and System V IPC of its own.
//!
//! Inside, there is a loopback and nothing else of a network. The host's filesystems are read-only; `/run`, `/tmp` and
//! the like are empty, so that systemd, D-Bus and the sockets of live services cannot be reached. What the plan mounts
//! is mounted at its real place, and only there.
//!
//! The namespaces are held by three files that are bound to them (as `ip netns` does it), so that the bubble outlives
//! the command that made it and can be entered again; without the files the kernel would take it away with its last
//! process. [`destroy`] finds everything by those files, so it also works after a kill.

use crate::proc;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, CpuSet, sched_getaffinity, sched_setaffinity, setns, unshare};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const NONE: Option<&str> = None;
/// Entered in this order: the others' files are outside.
const KINDS: [(&str, CloneFlags); 3] =
    [("net", CloneFlags::CLONE_NEWNET), ("ipc", CloneFlags::CLONE_NEWIPC), ("mnt", CloneFlags::CLONE_NEWNS)];
/// Empty and writable inside.
const PRIVATE: [&str; 4] = ["/run", "/tmp", "/var/tmp", "/dev/shm"];
/// Interfaces to the kernel that programs write to and that are per process, or that mount by themselves.
const LEFT_WRITABLE: [&str; 5] = ["proc", "devpts", "mqueue", "autofs", "binfmt_misc"];
/// Of an empty directory's memory.
const PRIVATE_OPTIONS: &str = "size=256m,mode=1777";
const RUN_OPTIONS: &str = "size=64m,mode=0755";
const GRACE: Duration = Duration::from_secs(5);
const BUSY_MAX: Duration = Duration::from_secs(10);
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// A bubble that is there.
#[derive(Clone, Debug)]
pub(crate) struct Bubble {
    dir: PathBuf,
}

/// What one is made from.
pub(crate) struct Wishes<'a> {
    /// Further directories that are empty inside.
    pub(crate) private: &'a [PathBuf],
    /// What must stay visible inside although it may be below a directory that is emptied.
    pub(crate) visible: &'a Path,
    /// Below it nothing stays mounted inside: Varve's own views of other points must be free to go.
    pub(crate) own: &'a Path,
    /// The program `ip`.
    pub(crate) ip: &'a Path,
}

fn named(doing: &str, path: &Path, error: impl std::fmt::Display) -> String {
    format!("cannot {doing} {}: {error}", path.display())
}

impl Bubble {
    /// Makes one, held by files in `dir`.
    pub(crate) fn create(dir: &Path, wishes: &Wishes<'_>) -> Result<Self, String> {
        fs::create_dir_all(dir).map_err(|error| named("make", dir, error))?;
        // A mount of its own that is not passed on: the kernel refuses to hold a mount namespace in one that is.
        mount(Some(dir), dir, NONE, MsFlags::MS_BIND, NONE).map_err(|error| named("bind", dir, error))?;
        mount(NONE, dir, NONE, MsFlags::MS_PRIVATE, NONE).map_err(|error| named("make private", dir, error))?;
        let bubble = Self { dir: dir.to_owned() };
        let (tell, told) = mpsc::channel();
        let (order, orders) = mpsc::channel();
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || first_thread(wishes, &tell, &orders));
            let made = bubble.hold_all(&told, &order);
            drop(order);
            let _ = inside.join();
            made
        })?;
        Ok(bubble)
    }

    /// Holds the namespaces of the bubble's first thread. The mounts come first and the rest when they are set up: what
    /// a kill leaves in between is not taken for a whole bubble.
    fn hold_all(&self, told: &mpsc::Receiver<Told>, order: &mpsc::Sender<Order>) -> Result<(), String> {
        let ended = || "the bubble's first thread ended".to_owned();
        let mut cpus = 0..CpuSet::count();
        let thread = loop {
            let thread = told.recv().map_err(|_| ended())??;
            match self.hold("mnt", thread) {
                Ok(()) => break thread,
                // Since 6.18 the ids of namespaces come in batches, one for each CPU, and the kernel takes a namespace
                // with a smaller id than our own for an older one, which might hold itself. One that is made on the CPU
                // where ours was made has a greater id; which that was, nobody says.
                Err(Errno::EINVAL) => {
                    let cpu = cpus.next().ok_or("the kernel refuses to hold the bubble's mounts")?;
                    order.send(Order::Again { cpu }).map_err(|_| ended())?;
                }
                Err(error) => return Err(named("hold the namespace with", &self.dir.join("mnt"), error)),
            }
        };
        order.send(Order::SetUp).map_err(|_| ended())?;
        told.recv().map_err(|_| ended())??;
        for (kind, _) in KINDS.iter().filter(|(kind, _)| *kind != "mnt") {
            self.hold(kind, thread).map_err(|error| named("hold the namespace with", &self.dir.join(kind), error))?;
        }
        Ok(())
    }

    fn hold(&self, kind: &str, thread: i32) -> Result<(), Errno> {
        let file = self.dir.join(kind);
        File::create(&file).map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
        let namespace = PathBuf::from(format!("/proc/self/task/{thread}/ns/{kind}"));
        mount(Some(&namespace), &file, NONE, MsFlags::MS_BIND, NONE)
    }

    /// The one that `dir` holds, if it is whole.
    pub(crate) fn open(dir: &Path) -> Option<Self> {
        let bubble = Self { dir: dir.to_owned() };
        KINDS.iter().all(|(kind, _)| bubble.inode(kind).is_some()).then_some(bubble)
    }

    /// The inode of a namespace, if its file holds one.
    fn inode(&self, kind: &str) -> Option<u64> {
        let mounts = proc::mounts().ok()?;
        let file = self.dir.join(kind);
        let real = self.dir.canonicalize().ok()?.join(kind);
        let held = mounts.iter().any(|mount| mount.at == real && mount.fstype == "nsfs");
        held.then(|| fs::metadata(file).ok().map(|facts| facts.ino()))?
    }

    /// Runs `work` inside, on a thread of its own.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, String> {
        let mut files = Vec::new();
        for (kind, flag) in KINDS {
            let path = self.dir.join(kind);
            files.push((File::open(&path).map_err(|error| named("open", &path, error))?, flag));
        }
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || {
                // The root and the directory of this thread alone change with its mounts.
                unshare(CloneFlags::CLONE_FS).map_err(|error| format!("cannot leave the host's root: {error}"))?;
                for (file, flag) in files {
                    setns(&file, flag).map_err(|error| format!("cannot enter the bubble: {error}"))?;
                }
                Ok(work())
            });
            inside.join().unwrap_or_else(|_| Err("the work inside the bubble panicked".to_owned()))
        })
    }

    fn processes(&self) -> Vec<i32> {
        let mut pids: Vec<i32> =
            KINDS.iter().filter_map(|(kind, _)| Some(proc::in_namespace(kind, self.inode(kind)?))).flatten().collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }
}

/// Takes a bubble away: its processes, its mounts, the files that hold it. `devices` are those whose filesystems must be
/// free afterwards. Nothing there is no error. Gives what it ended.
pub(crate) fn destroy(dir: &Path, devices: &[(u64, u64)]) -> Result<Vec<String>, String> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let bubble = Bubble { dir: dir.to_owned() };
    let ended: Vec<String> = bubble.processes().into_iter().map(proc::name).collect();
    if let Some(left) = proc::end_all(|| bubble.processes(), GRACE).first() {
        return Err(format!("{} inside the bubble cannot be ended", proc::name(*left)));
    }
    // Unmounted while somebody can wait for it: with the namespace they would go at some time later.
    if bubble.inode("mnt").is_some() {
        let files = KINDS.iter().find(|(kind, _)| *kind == "mnt");
        if let Some((_, flag)) = files {
            bubble.unmount_inside(*flag, devices)?;
        }
    }
    for (kind, _) in KINDS.iter().rev() {
        let file = dir.join(kind);
        while bubble.inode(kind).is_some() {
            umount2(&file, MntFlags::MNT_DETACH).map_err(|error| named("let go", &file, error))?;
        }
        remove_file(&file)?;
    }
    // Killed between bind and unmount, or made twice: as often as it is there.
    loop {
        match umount2(dir, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(error) => return Err(named("unmount", dir, error)),
        }
    }
    // The files may be in the directory below.
    for (kind, _) in KINDS {
        remove_file(&dir.join(kind))?;
    }
    fs::remove_dir(dir).map_err(|error| named("remove", dir, error))?;
    Ok(ended)
}

fn remove_file(file: &Path) -> Result<(), String> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(named("remove", file, error)),
        _ => Ok(()),
    }
}

impl Bubble {
    /// A bubble of which only the mounts are left is enough.
    fn unmount_inside(&self, flag: CloneFlags, devices: &[(u64, u64)]) -> Result<(), String> {
        let path = self.dir.join("mnt");
        let file = File::open(&path).map_err(|error| named("open", &path, error))?;
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || {
                unshare(CloneFlags::CLONE_FS).map_err(|error| format!("cannot leave the host's root: {error}"))?;
                setns(&file, flag).map_err(|error| format!("cannot enter the bubble: {error}"))?;
                let mounts = proc::mounts().map_err(|error| format!("the mounts cannot be listed: {error}"))?;
                let ours = |mount: &&proc::Mounted| devices.iter().any(|device| mount.is_of(*device));
                mounts.iter().rev().filter(ours).try_for_each(|mount| unmount(&mount.at))
            });
            inside.join().unwrap_or_else(|_| Err("unmounting inside the bubble panicked".to_owned()))
        })
    }
}

/// Those who were ended let go of a filesystem a moment later.
fn unmount(at: &Path) -> Result<(), String> {
    let until = Instant::now() + BUSY_MAX;
    loop {
        match umount2(at, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(Errno::EBUSY) if Instant::now() < until => std::thread::sleep(BUSY_PAUSE),
            Err(error) => return Err(named("unmount, inside the bubble,", at, error)),
        }
    }
}

/// What the bubble's first thread says: its id when its namespaces are new, and again when they are set up.
type Told = Result<i32, String>;

enum Order {
    /// Make the mounts' namespace anew, on this CPU.
    Again { cpu: usize },
    /// It is held: set it up.
    SetUp,
}

/// The namespaces are this thread's until the files hold them: it stays until there are no more orders.
fn first_thread(wishes: &Wishes<'_>, tell: &mpsc::Sender<Told>, orders: &mpsc::Receiver<Order>) {
    let id = nix::unistd::gettid().as_raw();
    let me = Pid::from_raw(0);
    let anywhere = sched_getaffinity(me);
    let flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC;
    let refused = |error| format!("this host does not allow new namespaces: {error}");
    let _ = tell.send(unshare(flags).map_err(refused).map(|()| id));
    while let Ok(order) = orders.recv() {
        let made = match order {
            Order::Again { cpu } => {
                let mut only = CpuSet::new();
                let moved = only.set(cpu).and_then(|()| sched_setaffinity(me, &only));
                // A CPU that is not ours to use: the next one.
                if moved.is_ok() { unshare(CloneFlags::CLONE_NEWNS).map_err(refused) } else { Ok(()) }
            }
            Order::SetUp => {
                if let Ok(anywhere) = &anywhere {
                    let _ = sched_setaffinity(me, anywhere);
                }
                set_up(wishes)
            }
        };
        let _ = tell.send(made.map(|()| id));
    }
}

fn set_up(wishes: &Wishes<'_>) -> Result<(), String> {
    // What the host unmounts goes from here as well; nothing goes the other way.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)
        .map_err(|error| format!("the host's mounts cannot be detached: {error}"))?;
    let listed = || proc::mounts().map_err(|error| format!("the mounts cannot be listed: {error}"));
    for mounted in listed()?.iter().rev().filter(|mounted| mounted.at.starts_with(wishes.own)) {
        umount2(&mounted.at, MntFlags::MNT_DETACH).map_err(|error| named("leave out", &mounted.at, error))?;
    }
    for mounted in listed()? {
        if !LEFT_WRITABLE.contains(&mounted.fstype.as_str()) {
            read_only(&mounted)?;
        }
    }
    for dir in PRIVATE.iter().map(Path::new).filter(|dir| dir.is_dir()) {
        let real = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        if wishes.visible == Path::new("/") || !wishes.visible.starts_with(&real) {
            empty(&real, if dir == Path::new("/run") { RUN_OPTIONS } else { PRIVATE_OPTIONS })?;
        }
    }
    for dir in wishes.private {
        empty(dir, PRIVATE_OPTIONS)?;
    }
    let up = Command::new(wishes.ip).args(["link", "set", "dev", "lo", "up"]).stdin(Stdio::null()).output();
    match up {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            Err(format!("the bubble's loopback does not come up: {}", String::from_utf8_lossy(&output.stderr).trim()))
        }
        Err(error) => Err(named("start", wishes.ip, error)),
    }
}

fn read_only(mounted: &proc::Mounted) -> Result<(), String> {
    let known = [
        ("nosuid", MsFlags::MS_NOSUID),
        ("nodev", MsFlags::MS_NODEV),
        ("noexec", MsFlags::MS_NOEXEC),
        ("noatime", MsFlags::MS_NOATIME),
        ("nodiratime", MsFlags::MS_NODIRATIME),
        ("relatime", MsFlags::MS_RELATIME),
    ];
    let has = |option: &str| mounted.options.split(',').any(|there| there == option);
    let kept = known.iter().filter(|(option, _)| has(option)).map(|(_, flag)| *flag);
    let flags = kept.fold(MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, |all, flag| all | flag);
    match mount(NONE, &mounted.at, NONE, flags, NONE) {
        // Under another mount: nobody reaches it.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT | Errno::ENOTDIR) => Ok(()),
        Err(error) => Err(named("make read-only, inside the bubble,", &mounted.at, error)),
    }
}

fn empty(dir: &Path, options: &str) -> Result<(), String> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("varve"), dir, Some("tmpfs"), flags, Some(options)).map_err(|error| named("empty", dir, error))
}
