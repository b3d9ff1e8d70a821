//! Where the system's programs are, and the environment that programs are given.

use std::path::{Path, PathBuf};

/// A timer, a terminal and sudo have different search paths; a plan must not depend on who runs it.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where programs such as `mount`, `ip` and `systemctl` are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tools {
    path: String,
}

impl Default for Tools {
    fn default() -> Self {
        Self { path: PATH.to_owned() }
    }
}

impl Tools {
    /// Looks in `dir` before the system's own directories; for tests.
    pub fn before(dir: impl AsRef<Path>) -> Self {
        Self { path: format!("{}:{PATH}", dir.as_ref().display()) }
    }

    /// The search path that programs are given.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Where a program is: as it says, or in the search path.
    pub fn find(&self, program: &str) -> Option<PathBuf> {
        let is_there = |path: &PathBuf| path.is_file();
        if program.contains('/') {
            return Some(PathBuf::from(program)).filter(is_there);
        }
        self.path.split(':').map(|dir| Path::new(dir).join(program)).find(is_there)
    }
}
