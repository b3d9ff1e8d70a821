//! Processes and mounts as `/proc` tells of them.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// In the environment of every program that is started, with the run's id: what is left of a step is found by it.
pub(crate) const RUN_MARK: &str = "VARVE_RUN";
/// In the environment of every program that is started, with the step's number.
pub(crate) const STEP_MARK: &str = "VARVE_STEP";
const TICK: Duration = Duration::from_millis(20);

/// Process ids, this one left out.
fn all() -> Vec<i32> {
    let own = std::process::id().cast_signed();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != own).collect()
}

/// A process that a signal can still reach.
fn is_alive(pid: i32) -> bool {
    stat(pid).is_some_and(|stat| stat.state != "Z" && stat.state != "X")
}

struct Stat {
    state: String,
    group: i32,
    started: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may hold anything.
    let mut rest = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let (state, group) = (rest.next()?.to_owned(), rest.nth(1)?.parse().ok()?);
    Some(Stat { state, group, started: rest.nth(16)?.parse().ok()? })
}

/// When a process began, in the kernel's ticks since it booted.
pub(crate) fn started(pid: i32) -> Option<u64> {
    Some(stat(pid)?.started)
}

/// Live processes of a group that a process which began then had made.
pub(crate) fn of_group(group: i32, since: u64) -> Vec<i32> {
    let belongs =
        |pid: &i32| stat(*pid).is_some_and(|stat| stat.group == group && stat.started >= since && stat.state != "Z");
    all().into_iter().filter(belongs).collect()
}

/// Live processes of a run, or of one of its steps.
pub(crate) fn marked(run: &str, step: Option<usize>) -> Vec<i32> {
    let run = format!("{RUN_MARK}={run}");
    let step = step.map(|step| format!("{STEP_MARK}={step}"));
    let has_marks = |pid: &i32| {
        let Ok(environment) = std::fs::read(format!("/proc/{pid}/environ")) else { return false };
        let has = |mark: &str| environment.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes());
        has(&run) && step.as_deref().is_none_or(has)
    };
    all().into_iter().filter(has_marks).filter(|pid| is_alive(*pid)).collect()
}

/// Live processes in a namespace of this kind ("net") with this inode.
pub(crate) fn in_namespace(kind: &str, inode: u64) -> Vec<i32> {
    let wanted = format!("{kind}:[{inode}]");
    let is_in = |pid: &i32| {
        std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).is_ok_and(|link| link.as_os_str() == wanted.as_str())
    };
    all().into_iter().filter(is_in).filter(|pid| is_alive(*pid)).collect()
}

/// Asks all that `find` finds to end, makes them after the grace; those that are still there.
pub(crate) fn end_all(find: impl Fn() -> Vec<i32>, grace: Duration) -> Vec<i32> {
    for (signal, limit) in [(Signal::SIGTERM, grace), (Signal::SIGKILL, Duration::from_secs(5))] {
        let until = Instant::now() + limit;
        let mut first = true;
        loop {
            let left = find();
            if left.is_empty() {
                return left;
            }
            // What was started meanwhile is killed as well; what was asked to end is asked once.
            if first || signal == Signal::SIGKILL {
                for pid in &left {
                    let _ = kill(Pid::from_raw(*pid), signal);
                }
            }
            first = false;
            if Instant::now() >= until {
                break;
            }
            std::thread::sleep(TICK);
        }
    }
    find()
}

/// "postgres (1234)".
pub(crate) fn name(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("{} ({pid})", name.trim())
}

/// Processes that have a file, their directory or a mapping below a path.
pub(crate) fn users_of(path: &Path) -> Vec<i32> {
    let uses = |pid: &i32| {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let below = |link: PathBuf| std::fs::read_link(link).is_ok_and(|target| target.starts_with(path));
        let open = || std::fs::read_dir(dir.join("fd")).is_ok_and(|fds| fds.flatten().any(|fd| below(fd.path())));
        below(dir.join("cwd")) || below(dir.join("root")) || below(dir.join("exe")) || open()
    };
    all().into_iter().filter(uses).collect()
}

/// A line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mounted {
    pub(crate) device: (u64, u64),
    pub(crate) at: PathBuf,
    /// Of this mount, not of the filesystem.
    pub(crate) options: String,
    pub(crate) fstype: String,
    pub(crate) source: String,
}

/// The mounts that this thread sees, lowest first. The process as a whole may be in another namespace.
pub(crate) fn mounts() -> std::io::Result<Vec<Mounted>> {
    let bytes = std::fs::read("/proc/thread-self/mountinfo")?;
    Ok(String::from_utf8_lossy(&bytes).lines().filter_map(mounted).collect())
}

fn mounted(line: &str) -> Option<Mounted> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(2);
    let (major, minor) = left.next()?.split_once(':')?;
    let (at, options) = (left.nth(1)?, left.next()?);
    let mut right = right.split(' ');
    let (fstype, source) = (right.next()?, right.next()?);
    Some(Mounted {
        device: (major.parse().ok()?, minor.parse().ok()?),
        at: PathBuf::from(unescape(at)),
        options: options.to_owned(),
        fstype: fstype.to_owned(),
        source: unescape(source),
    })
}

/// Undoes the kernel's `\040` for a space and the like.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let digits: Vec<u8> = if byte == b'\\' { bytes.clone().take(3).collect() } else { Vec::new() };
        let code = std::str::from_utf8(&digits).ok().filter(|digits| digits.len() == 3);
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(code) => {
                out.push(code);
                bytes.nth(2);
            }
            None => out.push(byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The numbers of a block device.
pub(crate) fn device_numbers(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::FileTypeExt;
    let facts = std::fs::metadata(path).ok().filter(|facts| facts.file_type().is_block_device())?;
    Some((nix::sys::stat::major(facts.rdev()), nix::sys::stat::minor(facts.rdev())))
}

impl Mounted {
    /// Whether it is of this block device; btrfs says so only in its source.
    pub(crate) fn is_of(&self, device: (u64, u64)) -> bool {
        self.device == device || (self.device.0 == 0 && device_numbers(Path::new(&self.source)) == Some(device))
    }
}

/// What the kernel calls this boot.
pub(crate) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo() {
        let line = r"36 35 98:3 /mnt1 /mnt\040two rw,noatime master:1 shared:2 - ext3 /dev/root rw,dax=always";
        let mount = mounted(line).expect("a mount");
        assert_eq!((mount.device, mount.at.as_path()), ((98, 3), Path::new("/mnt two")));
        assert_eq!((mount.options.as_str(), mount.fstype.as_str()), ("rw,noatime", "ext3"));
        for broken in ["", "22 27", "22 27 21 / /proc rw - proc proc rw"] {
            assert_eq!(mounted(broken), None, "{broken}");
        }
        assert_eq!(unescape(r"a\040b\134\9\04"), r"a b\\9\04");
    }

    #[test]
    fn a_process_is_found_by_its_marks_and_its_group() {
        use std::os::unix::process::CommandExt;
        let run = format!("marks-{}", std::process::id());
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .env(RUN_MARK, &run)
            .env(STEP_MARK, "3")
            .process_group(0)
            .spawn()
            .expect("sleep");
        let pid = child.id().cast_signed();
        // The environment shows a moment after the program was started.
        varve_tests::wait_until(Duration::from_secs(5), "the marks", || marked(&run, Some(3)) == [pid]);
        assert_eq!(marked(&run, None), [pid]);
        assert_eq!(marked(&run, Some(33)), [0; 0]);
        assert_eq!(marked(&run[..3], None), [0; 0]);
        assert_eq!(of_group(pid, started(pid).expect("alive")), [pid]);
        assert_eq!(of_group(pid, started(pid).expect("alive") + 1), [0; 0]);
        assert!(end_all(|| marked(&run, None), Duration::from_secs(1)).is_empty());
        child.wait().expect("ended");
    }
}
