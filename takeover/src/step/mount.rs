//! Filesystems, with mount(8): it knows every filesystem's ways, and can be ended when a device hangs.

use super::{Found, StepError, Work};
use crate::proc::{self, Mounted};
use crate::process;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const BUSY_PAUSE: Duration = Duration::from_millis(200);
const TEST_PATIENCE: Duration = Duration::from_millis(500);
/// Of those who keep a filesystem busy, so many are named.
const NAMED_MAX: usize = 5;

/// `at` and the directories above it that are not there, the highest first.
pub(super) fn missing_dirs(at: &Path) -> Vec<PathBuf> {
    let mut missing: Vec<PathBuf> = at.ancestors().take_while(|dir| !dir.exists()).map(Path::to_path_buf).collect();
    missing.reverse();
    missing
}

/// What is on top at a directory.
fn top(at: &Path) -> Result<Option<Mounted>, StepError> {
    // mountinfo has no symbolic links in its paths.
    let real = at.canonicalize().unwrap_or_else(|_| at.to_owned());
    let mounts = proc::mounts().map_err(|error| StepError::new(format!("the mounts cannot be listed: {error}")))?;
    Ok(mounts.into_iter().rfind(|mount| mount.at == real))
}

fn is_ours(mount: &Mounted, device: &Path) -> bool {
    // The device may be gone: then its name is what is left to compare.
    match proc::device_numbers(device) {
        Some(numbers) => mount.is_of(numbers),
        None => Path::new(&mount.source) == device,
    }
}

pub(super) fn probe(device: &Path, at: &Path) -> Result<Found, StepError> {
    Ok(match top(at)? {
        Some(mount) if is_ours(&mount, device) => Found::Yes,
        _ => Found::No,
    })
}

pub(super) fn apply(
    work: &Work<'_>,
    (device, real): (&Path, &Path),
    at: &Path,
    fstype: &str,
    options: &[String],
) -> Result<String, StepError> {
    if proc::device_numbers(device).is_none() {
        return Err(StepError::new(format!("{} is no block device of this host", device.display())));
    }
    if let Some(other) = top(at)? {
        let why = format!("{} is mounted at {} already", other.source, at.display());
        return Err(StepError::new(why).with_next(format!("unmount it if it is not needed: umount {}", at.display())));
    }
    std::fs::create_dir_all(at).map_err(|error| {
        let error = StepError::new(format!("the directory {} cannot be made: {error}", at.display()));
        // In a bubble this host is read-only.
        if work.test { error.with_next(format!("mkdir -p {}", at.display())) } else { error }
    })?;
    let (device_text, at_text) = (device.to_string_lossy(), at.to_string_lossy());
    let mut words = vec!["mount", "-t", fstype];
    let options = options.join(",");
    if !options.is_empty() {
        words.extend(["-o", options.as_str()]);
    }
    words.extend(["--source", &device_text, "--target", &at_text]);
    process::tool(work, &words)?;
    match probe(real, at)? {
        Found::Yes => Ok(String::new()),
        _ => Err(StepError::new(format!("mount said it is done, but {device_text} is not at {at_text}"))),
    }
}

pub(super) fn undo(work: &Work<'_>, device: &Path, at: &Path, made: &[PathBuf]) -> Result<String, StepError> {
    // In a bubble nobody waits for who uses it: they are ended with the bubble, and then it is free.
    let patience = Instant::now() + if work.test { TEST_PATIENCE } else { work.time_left() };
    while let Some(mount) = top(at)? {
        if !is_ours(&mount, device) {
            // Only what is on top can be unmounted.
            let below = proc::mounts().unwrap_or_default();
            if below.iter().any(|below| below.at == mount.at && is_ours(below, device)) {
                return Err(StepError::new(format!("{} was mounted over it at {}", mount.source, at.display()))
                    .with_next(format!("umount {}", at.display())));
            }
            break;
        }
        if let Err(error) = process::tool(work, &["umount", "--", &at.to_string_lossy()])
            && (!work.pause(BUSY_PAUSE) || Instant::now() >= patience)
        {
            return Err(busy(error, at));
        }
    }
    super::attach::remove_dirs(made);
    Ok(String::new())
}

fn busy(error: StepError, at: &Path) -> StepError {
    let users = proc::users_of(at);
    if users.is_empty() {
        return error.with_next(format!("find out what uses it: findmnt -R {0}; fuser -vm {0}", at.display()));
    }
    let mut names: Vec<String> = users.iter().take(NAMED_MAX).map(|pid| proc::name(*pid)).collect();
    if users.len() > NAMED_MAX {
        names.push(format!("{} more", users.len() - NAMED_MAX));
    }
    let why = format!("{} is in use by {}", at.display(), names.join(", "));
    StepError { why, next: Some("end what uses it, then try again".to_owned()), output: error.output }
}
