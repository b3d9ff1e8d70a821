//! Loop devices, by `losetup` of util-linux and by sysfs.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{ExportError, ExportErrorKind};
use crate::limits::LOSETUP_TIMEOUT;

const SYS_BLOCK: &str = "/sys/block";

/// Two `losetup --find` at once may choose the same device; the loser sleeps 200 ms and tries again. Not within one process.
static FINDING: Mutex<()> = Mutex::new(());

/// Puts a loop device over `file` and returns its path.
pub(super) fn set_up(file: &Path, read_only: bool) -> Result<PathBuf, ExportError> {
    let mut command = losetup();
    command.args(["--find", "--show", "--direct-io=on", "--sector-size", "512"]);
    if read_only {
        command.arg("--read-only");
    }
    let _one = FINDING.lock().unwrap_or_else(PoisonError::into_inner);
    let out = run(command.arg(file), &format!("cannot put a loop device over {}", file.display()))?;
    let path = PathBuf::from(out.trim());
    if number_name(&path).is_none() {
        let what = format!("cannot tell which loop device is over {}", file.display());
        return Err(ExportError::new(ExportErrorKind::Io, what, format!("losetup said {out:?}"), "see losetup --list"));
    }
    Ok(path)
}

/// Takes a loop device away: at once if nobody has it open, else when the last one closes it.
pub(super) fn take_down(device: &Path) -> Result<(), ExportError> {
    run(losetup().arg("--detach").arg(device), &format!("cannot detach {}", device.display())).map(drop)
}

/// The file under a loop device; `None` if it has none.
pub(super) fn backing_file(device: &Path) -> Option<PathBuf> {
    backing_of(number_name(device)?)
}

/// Whether the kernel reads the file under it without the page cache.
pub(super) fn is_direct(device: &Path) -> bool {
    let path = number_name(device).map(|name| Path::new(SYS_BLOCK).join(name).join("loop/dio"));
    path.and_then(|path| fs::read_to_string(path).ok()).is_some_and(|text| text.trim() == "1")
}

/// All loop devices whose file has that name, with the file's path.
pub(super) fn over(file_name: &str) -> io::Result<Vec<(PathBuf, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(SYS_BLOCK)? {
        let name = entry?.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with("loop")) else { continue };
        if let Some(file) = backing_of(name).filter(|file| file.ends_with(file_name)) {
            found.push((Path::new("/dev").join(name), file));
        }
    }
    Ok(found)
}

fn number_name(device: &Path) -> Option<&str> {
    let name = device.file_name()?.to_str()?;
    let number = name.strip_prefix("loop")?;
    (!number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())).then_some(name)
}

fn backing_of(name: &str) -> Option<PathBuf> {
    let text = fs::read_to_string(Path::new(SYS_BLOCK).join(name).join("loop/backing_file")).ok()?;
    Some(PathBuf::from(text.trim_end_matches('\n')))
}

fn losetup() -> Command {
    let mut command = Command::new(program());
    command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Where losetup is. A daemon's PATH may lack it. And it is looked for here, not in the child: with a path that has a
/// directory the child is started without copying the page tables of a process that may hold gigabytes.
fn program() -> PathBuf {
    const NAME: &str = "losetup";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    let places = usual.into_iter().chain(std::env::split_paths(&path));
    places.map(|dir| dir.join(NAME)).find(|file| file.is_file()).unwrap_or_else(|| PathBuf::from(NAME))
}

/// Runs it with a deadline: a disk that does not answer must not hold its caller for ever.
fn run(command: &mut Command, what: &str) -> Result<String, ExportError> {
    let missing = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => ExportError::new(
            ExportErrorKind::Missing,
            what,
            "there is no losetup on this machine",
            "install util-linux (Debian: the package mount), or serve the disk as NBD",
        ),
        _ => ExportError::io(what, &e, "see whether losetup can be run by hand"),
    };
    let mut child = command.spawn().map_err(missing)?;
    let begin = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if begin.elapsed() < LOSETUP_TIMEOUT => thread::sleep(Duration::from_micros(500)),
            ended => {
                // Killed or not, it is not waited for beyond this: it may be in an uninterruptible sleep.
                let _ = child.kill();
                let _ = child.try_wait();
                let why = match ended {
                    Err(e) => e.to_string(),
                    Ok(_) => format!("losetup did not end within {} s", LOSETUP_TIMEOUT.as_secs()),
                };
                return Err(ExportError::new(ExportErrorKind::Io, what, why, "see the kernel's log"));
            }
        }
    };
    let (mut out, mut err) = (String::new(), String::new());
    if let Some(mut pipe) = child.stdout.take() {
        let _ = pipe.read_to_string(&mut out);
    }
    if let Some(mut pipe) = child.stderr.take() {
        let _ = pipe.read_to_string(&mut err);
    }
    if status.success() {
        return Ok(out);
    }
    let why = if err.trim().is_empty() { format!("losetup ended with {status}") } else { err.trim().to_owned() };
    let next = "root is needed, and a kernel with loop devices (modprobe loop); NBD goes without";
    Err(ExportError::new(ExportErrorKind::Io, what, why, next))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_of_loop_devices() {
        assert_eq!(number_name(Path::new("/dev/loop12")), Some("loop12"));
        for other in ["/dev/loop", "/dev/loop1p1", "/dev/sda", "/", "/dev/loop-control"] {
            assert_eq!(number_name(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn a_program_that_fails_is_told_with_its_words() {
        let error = run(losetup().args(["--detach", "/dev/null"]), "cannot do it").unwrap_err();
        assert_eq!((error.kind(), error.what()), (ExportErrorKind::Io, "cannot do it"));
        assert!(error.why().contains("/dev/null"), "{error}");
        let error = run(&mut Command::new("no-such-losetup"), "cannot do it").unwrap_err();
        assert_eq!(error.kind(), ExportErrorKind::Missing);
    }
}
