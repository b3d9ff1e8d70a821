//! What an earlier life of the daemon left: it was killed, so its mounts are dead and their loop devices give EIO.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::PoisonError;

use varve_io::blockdev::in_use;

use super::{ALIVE, losetup, mount, ublk};
use crate::error::ExportError;

/// What [`clean`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// Mounts, loop and ublk devices that are gone now.
    pub removed: Vec<String>,
    /// Devices that are still there, with why: a loop device that somebody uses goes away when that ends. All they give is EIO.
    pub left: Vec<String>,
}

/// Removes the dead mounts and devices below `dir`. What this process has attached stays. `dir` must belong to this
/// daemon alone: whatever else of this kind is below it is taken for dead.
///
/// # Errors
/// If the kernel's lists cannot be read. A step that fails is told in [`Cleaned::left`].
pub fn clean(dir: &Path) -> Result<Cleaned, ExportError> {
    let mut cleaned = Cleaned::default();
    let dir = match fs::canonicalize(dir) {
        Ok(dir) => dir,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(cleaned),
        Err(e) => return Err(ExportError::io(format!("cannot look at {}", dir.display()), &e, "check the directory")),
    };
    let alive = ALIVE.lock().unwrap_or_else(PoisonError::into_inner);
    let failed = |what: &str, e: &io::Error| ExportError::io(what, e, "is /proc and /sys mounted?");
    let mounts = mount::ours_below(&dir).map_err(|e| failed("cannot read the mounts", &e))?;
    let dead = |place: &Path| !alive.contains(place);
    // First, so that nothing below waits for an answer: the connection is dead or dies here. What lives is told by the
    // paths of the loop devices' files, which end with their mounts, so the mounts go last.
    for place in mounts.iter().filter(|place| dead(place)) {
        mount::abort(place);
    }
    for (device, file) in
        losetup::over(&mount::file_name(&dir)).map_err(|e| failed("cannot list the loop devices", &e))?
    {
        if file.parent().is_some_and(dead) {
            remove_loop(&device, &file, &mut cleaned);
        }
    }
    for place in mounts.iter().filter(|place| dead(place)) {
        mount::force_off(place);
        cleaned.removed.push(format!("mount {}", place.display()));
    }
    match ublk::clean(&dir) {
        Ok((removed, left)) => {
            cleaned.removed.extend(removed);
            cleaned.left.extend(left);
        }
        Err(e) => cleaned.left.push(e.chain()),
    }
    for entry in fs::read_dir(&dir).map_err(|e| failed("cannot list what was attached", &e))?.flatten() {
        let place = entry.path();
        if dead(&place) && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // Not empty means not ours.
            let _ = fs::remove_dir(&place);
        }
    }
    Ok(cleaned)
}

fn remove_loop(device: &Path, file: &Path, cleaned: &mut Cleaned) {
    let user = in_use(device);
    let told = losetup::take_down(device);
    let still = || losetup::backing_file(device).as_deref() == Some(file);
    match (user, told) {
        (Some(user), _) if still() => cleaned.left.push(format!("{}: {user}", device.display())),
        (_, Err(e)) if still() => cleaned.left.push(e.to_string()),
        (None, Ok(())) if still() => cleaned.left.push(format!("{}: a program has it open", device.display())),
        _ => cleaned.removed.push(format!("loop device {}", device.display())),
    }
}
