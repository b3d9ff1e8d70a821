//! A host to take over on: a network and mounts of its own (the test's thread has left the machine's), a volume with a
//! filesystem, a stand-in for systemd.
#![allow(dead_code, reason = "every test uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test's broken assumption is a panic with a line number")]

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;
use varve_common::control::PointReply;
use varve_common::paths::Paths;
use varve_takeover::{Commands, Context, Device, Mode, Plan, Progress, Report, Runner, Tools, Undo};
use varve_tests::{LoopDevice, Scratch, run_ok};

/// The address that is taken over.
pub const ADDRESS: &str = "192.0.2.10";
/// Of the volume at the source.
pub const VOLUME: &str = "/dev/source";

/// Runs a test on a thread with a network and mounts of its own: what the runner does "live" stays in there.
pub fn on_a_host_of_its_own(test: impl FnOnce() + Send + 'static) {
    varve_tests::require_root();
    let inside = move || {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).unwrap();
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        // What other tests have mounted must be free to go.
        for point in mount_points().into_iter().rev() {
            if ["/var/tmp", "/dev/shm/"].iter().any(|dir| point.starts_with(dir)) {
                umount2(point.as_str(), MntFlags::MNT_DETACH).unwrap();
            }
        }
        run_ok("ip", &["link", "set", "lo", "up"]);
        run_ok("ip", &["link", "add", "v0", "type", "veth", "peer", "name", "v1"]);
        run_ok("ip", &["link", "set", "v0", "up"]);
        run_ok("ip", &["link", "set", "v1", "up"]);
        test();
    };
    if let Err(panic) = std::thread::Builder::new().name("host".to_owned()).spawn(inside).unwrap().join() {
        std::panic::resume_unwind(panic);
    }
}

fn mount_points() -> Vec<String> {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    table.lines().map(|line| line.split(' ').nth(4).unwrap().to_owned()).collect()
}

/// A recovery host with one volume.
pub struct Host {
    pub group: String,
    pub tools: Tools,
    pub paths: Paths,
    pub device: LoopDevice,
    pub scratch: Scratch,
}

impl Host {
    pub fn new(group: &str) -> Self {
        let scratch = Scratch::disk();
        let device = LoopDevice::new(&scratch, "volume", 16 << 20);
        run_ok("mkfs.ext4", &["-q", "-F", &device.path().to_string_lossy()]);
        let bin = scratch.dir("bin");
        let host = Self {
            // Processes are found by it: no other test may have the same.
            group: format!("{group}-{}", std::process::id()),
            tools: Tools::before(&bin),
            paths: Paths::new(scratch.dir("root")),
            device,
            scratch,
        };
        host.scratch.dir("mnt");
        host.scratch.dir("units");
        host.scratch.dir("root/run/varve");
        host.scratch.dir("root/dev");
        host.tool("systemctl", SYSTEMCTL);
        host
    }

    /// The same host, as a killed process had it.
    pub fn dir(&self) -> &Path {
        self.scratch.path()
    }

    /// A program that is found before the system's.
    pub fn tool(&self, name: &str, script: &str) {
        let text = script.replace("@DIR@", &self.scratch.path().to_string_lossy());
        let file = self.scratch.join("bin").join(name);
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    pub fn mnt(&self) -> PathBuf {
        self.scratch.join("mnt")
    }

    /// The plan's text with this host's paths.
    pub fn text(&self, plan: &str) -> String {
        plan.replace("@DIR@", &self.scratch.path().to_string_lossy())
    }

    pub fn runner(&self, plan: &str, mode: Mode) -> Runner {
        runner(self.dir(), &self.group, self.device.path(), plan, mode)
    }

    pub fn undoing(&self, mode: Mode) -> Undo {
        Undo {
            paths: self.paths.clone(),
            group: self.group.clone(),
            mode,
            tools: self.tools.clone(),
            command: "varve failover abort".to_owned(),
        }
    }

    /// Takes everything back, and says if that does not work.
    #[track_caller]
    pub fn undo(&self, mode: Mode) -> Report {
        let report = varve_takeover::undo(&self.undoing(mode), &mut quiet).unwrap();
        assert_eq!(report.outcome, varve_takeover::Outcome::Undone, "{report}");
        assert_eq!(report.left, [""; 0], "{report}");
        report
    }

    /// Everything is as it was before.
    #[track_caller]
    pub fn assert_as(&self, before: &Seen) {
        let now = self.seen();
        let (gone, new) = (before.without(&now), now.without(before));
        assert!(gone.is_empty() && new.is_empty(), "gone: {gone:#?}\nleft: {new:#?}");
    }

    pub fn seen(&self) -> Seen {
        Seen::of(&self.group, &[self.dir(), &self.paths.takeover_links("x")])
    }
}

impl Drop for Host {
    /// A test that failed leaves nothing either.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let _ = varve_takeover::undo(&self.undoing(Mode::Live), &mut quiet);
        let _ = varve_takeover::clean(&self.paths, &self.group, &self.tools);
        try_run(&self.scratch.join("bin/systemctl").to_string_lossy(), &["stop", "web.service"]);
        try_run("umount", &[&self.mnt().to_string_lossy()]);
    }
}

/// A runner without a [`Host`], for a process that is to be killed.
pub fn runner(dir: &Path, group: &str, device: &Path, plan: &str, mode: Mode) -> Runner {
    let text = plan.replace("@DIR@", &dir.to_string_lossy());
    let plan = Plan::parse("plan.toml", &text).unwrap_or_else(|problem| panic!("{problem}"));
    let devices = vec![Device { volume: VOLUME.to_owned(), device: device.to_owned(), bytes: 16 << 20 }];
    let point = PointReply {
        time: "2026-11-20T14:03:22.512345678Z".to_owned(),
        position: "abababab:4096".to_owned(),
        asked: "latest".to_owned(),
        ..PointReply::default()
    };
    let commands = Commands {
        resume: "varve failover --resume".to_owned(),
        undo: "varve failover abort".to_owned(),
        undo_plan: "varve plan undo".to_owned(),
    };
    let context = Context {
        group: group.to_owned(),
        point,
        devices,
        mode,
        paths: Paths::new(dir.join("root")),
        began: SystemTime::now(),
        tools: Tools::before(dir.join("bin")),
        commands,
    };
    Runner::new(plan, context).unwrap_or_else(|problem| panic!("{problem}: {}", problem.next))
}

/// For those who do not look.
pub fn quiet(_: &Progress) {}

/// What can be seen of a takeover on a host.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    mounts: Vec<String>,
    addresses: Vec<String>,
    processes: BTreeSet<String>,
    files: BTreeSet<PathBuf>,
}

impl Seen {
    fn lines(&self) -> BTreeSet<String> {
        let files = self.files.iter().map(|file| file.display().to_string());
        self.mounts.iter().chain(&self.addresses).chain(&self.processes).cloned().chain(files).collect()
    }

    fn without(&self, other: &Self) -> Vec<String> {
        self.lines().difference(&other.lines()).cloned().collect()
    }

    fn of(group: &str, dirs: &[&Path]) -> Self {
        let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        // Without the numbers of the mounts.
        let mounts = table.lines().map(|line| line.split(' ').skip(2).collect::<Vec<_>>().join(" ")).collect();
        let addresses = run_ok("ip", &["-oneline", "address", "show"]);
        let addresses = addresses
            .lines()
            .filter(|line| !line.contains("inet6 fe80"))
            .map(|line| line.split("valid_lft").next().unwrap().to_owned())
            .collect();
        let mut files = BTreeSet::new();
        for dir in dirs {
            walk(dir, &mut files);
        }
        // The directories, the lock and a drill's record stay.
        let state = Path::new("root/var");
        files.retain(|file| !file.starts_with(dirs[0].join(state)) || !(file.is_dir() || file.ends_with("lock")));
        Self { mounts, addresses, processes: processes(group), files }
    }
}

fn walk(dir: &Path, files: &mut BTreeSet<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        files.insert(entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), files);
        }
    }
}

/// Live processes that were started for a group.
pub fn processes(group: &str) -> BTreeSet<String> {
    let mark = format!("VARVE_GROUP={group}");
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let dir = entry.path();
        let Ok(environment) = std::fs::read(dir.join("environ")) else { continue };
        if environment.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes()) {
            let line = std::fs::read(dir.join("cmdline")).unwrap_or_default();
            found.insert(format!("{} {}", dir.display(), String::from_utf8_lossy(&line).replace('\0', " ")));
        }
    }
    found
}

/// "unit done", for each step.
pub fn outcomes(report: &Report) -> Vec<String> {
    let outcome = |outcome| serde_json::to_value(outcome).unwrap().as_str().unwrap().to_owned();
    report.steps.iter().map(|step| format!("{} {}", step.name, outcome(step.outcome))).collect()
}

/// Runs a command and does not care.
pub fn try_run(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
}

/// The part of systemctl that is needed: a unit is a web server on the address, of what is mounted.
const SYSTEMCTL: &str = r#"#!/bin/sh
pid=@DIR@/units/$2
[ "$1" = is-active ] && pid=@DIR@/units/$3
case "$1" in
start)
    [ -e "$pid" ] && exit 0
    [ -e @DIR@/units/broken ] && { echo "unit $2 is broken" >&2; exit 1; }
    # Like a daemon of systemd it is nobody's child.
    env -i setsid python3 -m http.server 8080 --bind 192.0.2.10 --directory @DIR@/mnt >/dev/null 2>&1 &
    echo $! >"$pid" ;;
stop)
    [ -e "$pid" ] || exit 0
    kill "$(cat "$pid")"
    while kill -0 "$(cat "$pid")" 2>/dev/null; do sleep 0.02; done
    rm "$pid" ;;
is-active) [ -e "$pid" ] && kill -0 "$(cat "$pid")" 2>/dev/null ;;
esac
"#;

/// One step of each kind that a kernel without device mapper can do.
pub const PLAN: &str = r#"
version = 1

[[step]]
name = "volumes"
kind = "attach"
volumes = { data = "/dev/source" }

[[step]]
name = "data"
kind = "mount"
device = "{data}"
where = "@DIR@/mnt"
fstype = "ext4"
options = "noatime"

[[step]]
name = "page"
kind = "command"
run = "echo \"point $VARVE_POINT test $VARVE_TEST of $VARVE_GROUP on $VARVE_VOLUME0\" >@DIR@/mnt/index.html"
undo = ["/bin/rm", "-f", "@DIR@/mnt/index.html"]

[[step]]
name = "address"
kind = "address"
address = "192.0.2.10/24"
interface = "v0"
announce = false
if_taken = "take"

[[step]]
name = "server"
kind = "unit"
unit = "web"
test_run = ["/usr/bin/python3", "-m", "http.server", "8080", "--bind", "192.0.2.10", "--directory", "@DIR@/mnt"]

[[step]]
name = "port"
kind = "check"
tcp = "192.0.2.10:8080"
every = "50ms"
timeout = "20s"

[[step]]
name = "answer"
kind = "check"
http = "http://192.0.2.10:8080/index.html"
text = "point 2026-11-20"
timeout = "20s"
"#;
