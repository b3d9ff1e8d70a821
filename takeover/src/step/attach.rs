//! Links to the devices, under names that stay when the devices' numbers change.

use super::{Found, Link, StepError};
use std::fs;
use std::path::{Path, PathBuf};
use varve_common::paths::Paths;

/// Where a group's links are. A test has its own: the group may be promoted at the same time. No group's name begins
/// with a dot.
pub(crate) fn links_dir(paths: &Paths, group: &str, test: bool) -> PathBuf {
    if test { paths.takeover_links(".test").join(group) } else { paths.takeover_links(group) }
}

pub(super) fn to_make(links: &[Link]) -> Vec<PathBuf> {
    let dir = links.first().and_then(|link| link.path.parent());
    // All of them are Varve's own, whoever made them: another takeover or a test. The last one out removes them.
    let own = |dir: &Path| {
        let mut above = dir.ancestors().skip(1).take_while(|dir| dir.file_name().is_some_and(|name| name != "dev"));
        above.by_ref().map(Path::to_path_buf).chain([dir.to_path_buf()]).collect()
    };
    dir.map(own).unwrap_or_default()
}

pub(super) fn probe(links: &[Link]) -> Found {
    let shows = |link: &Link| fs::read_link(&link.path).is_ok_and(|device| device == link.device);
    if links.iter().all(shows) { Found::Yes } else { Found::No }
}

pub(super) fn apply(links: &[Link]) -> Result<String, StepError> {
    for link in links {
        let failed = |error| StepError::new(format!("the link {} cannot be made: {error}", link.path.display()));
        if crate::proc::device_numbers(&link.device).is_none() {
            return Err(StepError::new(format!("{} is no block device of this host", link.device.display())));
        }
        if let Some(dir) = link.path.parent() {
            fs::create_dir_all(dir).map_err(failed)?;
        }
        // Made beside and renamed: whoever opens the link meanwhile finds the old or the new device.
        let new = link.path.with_extension("new");
        match fs::remove_file(&new) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        std::os::unix::fs::symlink(&link.device, &new).map_err(failed)?;
        fs::rename(&new, &link.path).map_err(failed)?;
    }
    Ok(String::new())
}

pub(super) fn undo(links: &[Link], made: &[PathBuf]) -> Result<String, StepError> {
    for link in links {
        for path in [link.path.with_extension("new"), link.path.clone()] {
            // Somebody else's file of that name is not ours to remove.
            if fs::symlink_metadata(&path).is_ok_and(|facts| facts.file_type().is_symlink())
                && let Err(error) = fs::remove_file(&path)
            {
                return Err(StepError::new(format!("the link {} cannot be removed: {error}", path.display())));
            }
        }
    }
    remove_dirs(made);
    Ok(String::new())
}

/// Removes directories that were made, the deepest first, as long as they are empty.
pub(super) fn remove_dirs(made: &[PathBuf]) {
    let mut made: Vec<&Path> = made.iter().map(PathBuf::as_path).collect();
    made.sort_by_key(|dir| std::cmp::Reverse(dir.components().count()));
    for dir in made {
        let _ = fs::remove_dir(dir);
    }
}
