//! The operator's own steps: programs in `etc/varve/hooks`. A file of that name is run, a missing one is nothing to do.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use varve_common::problem::Problem;

/// Before the volumes are made quiet: stops what writes to them, unmounts them.
pub const QUIESCE: &str = "quiesce";
/// When they may be written again: mounts and starts it.
pub const RESUME: &str = "resume";

/// Between two looks at whether it has ended.
const LOOK: Duration = Duration::from_millis(20);
/// What it says is kept for the operator up to here.
const SAID_BYTES_MAX: u64 = 4096;

/// Runs a hook to its end; how long it took, or `None` if there is none. `why`: what it is run for, in one word. Waits.
pub fn run(
    dir: &Path,
    name: &str,
    group: &str,
    volumes: &[String],
    why: &str,
    limit: Duration,
) -> Result<Option<Duration>, Problem> {
    let path = dir.join(name);
    let shown = path.display();
    let what = format!("the hook {shown} was not run to its end");
    let failed = |text: String, next: &str| Problem::failed(&what, text, next);
    let facts = match std::fs::metadata(&path) {
        Ok(facts) => facts,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(format!("{shown}: {e}"), "check its permissions")),
    };
    // It runs as root: nobody else may be able to change it.
    let own = nix::unistd::geteuid().as_raw();
    if facts.uid() != own || facts.mode() & 0o022 != 0 {
        return Err(Problem::refused(
            what,
            format!("others than root may change {shown}"),
            format!("chown root {shown}; chmod 700 {shown}"),
        ));
    }
    let mut said = match tempfile_like() {
        Ok(file) => file,
        Err(e) => return Err(failed(format!("no memory for what it says: {e}"), "see the log")),
    };
    let clone = || said.try_clone().map(Stdio::from);
    let (out, err) = match (clone(), clone()) {
        (Ok(out), Ok(err)) => (out, err),
        (Err(e), _) | (_, Err(e)) => return Err(failed(e.to_string(), "see the log")),
    };
    let begin = Instant::now();
    let mut command = Command::new(&path);
    command.arg(group).env("VARVE_GROUP", group).env("VARVE_VOLUMES", volumes.join(" ")).env("VARVE_WHY", why);
    command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
    let child = command.spawn();
    let mut child = child.map_err(|e| failed(format!("{shown} cannot be started: {e}"), "make it executable"))?;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if begin.elapsed() < limit => std::thread::sleep(LOOK),
            Ok(None) => break None,
            Err(e) => return Err(failed(e.to_string(), "see the log")),
        }
    };
    let Some(status) = status else {
        // The whole group of processes: a shell's children would go on.
        let group = nix::unistd::Pid::from_raw(child.id().cast_signed());
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        let _ = child.wait();
        return Err(failed(
            format!("it was killed after {} s", limit.as_secs()),
            "make it quicker, or raise the limit",
        ));
    };
    if status.success() {
        return Ok(Some(begin.elapsed()));
    }
    let mut text = String::new();
    use std::io::{Seek, SeekFrom};
    let _ = said.seek(SeekFrom::Start(0)).and_then(|_| said.take(SAID_BYTES_MAX).read_to_string(&mut text));
    let text = text.trim().replace('\n', "; ");
    Err(failed(format!("it ended with {status}: {text}"), "mend what it says"))
}

/// A file without a name.
fn tempfile_like() -> std::io::Result<std::fs::File> {
    let name = std::ffi::CString::new("varve-hook").unwrap_or_default();
    let fd = nix::sys::memfd::memfd_create(name.as_c_str(), nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn none_good_bad_slow_and_not_ours() {
        let dir = tempfile::tempdir().expect("temp dir");
        let volumes = ["/dev/a".to_owned(), "/dev/b".to_owned()];
        let go = |limit| run(dir.path(), QUIESCE, "db", &volumes, "planned", limit);
        let second = Duration::from_secs(1);
        assert_eq!(go(second).expect("none"), None);
        let path = dir.path().join(QUIESCE);
        let script = |text: &str, mode: u32| {
            std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("mode");
        };
        let out = dir.path().join("out");
        script(&format!("echo $1 $VARVE_GROUP $VARVE_VOLUMES $VARVE_WHY >{}", out.display()), 0o700);
        assert!(go(second * 5).expect("it runs").is_some());
        assert_eq!(std::fs::read_to_string(&out).expect("said"), "db db /dev/a /dev/b planned\n");
        script("echo no such mount >&2; exit 3", 0o700);
        let failed = go(second * 5).expect_err("it failed");
        assert!(failed.why.contains("no such mount") && failed.why.contains('3'), "{failed:?}");
        script("sleep 100 & wait", 0o700);
        let begin = Instant::now();
        assert!(go(Duration::from_millis(200)).expect_err("too slow").why.contains("killed"));
        assert!(begin.elapsed() < second * 5);
        script("true", 0o722);
        assert!(go(second).expect_err("not ours").why.contains("others"));
    }
}
