//! Configuration files and identities: whether the daemons could use them.

use super::Section;
use crate::context::{Context, is_there, net_problem};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use varve_common::config::{AgentConfig, ReceiverConfig};
use varve_common::problem::Problem;
use varve_net::identity::{Authority, HostIdentity};

/// Larger than any file that belongs there.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
const CONFIG_WHY: &str = "the daemon does not start with a configuration that it does not understand";

pub(super) fn section(context: &Context) -> Section {
    let mut section = Section::new("configuration");
    let paths = &context.paths;
    let name = paths.agent_config().display().to_string();
    file(&mut section, &paths.agent_config(), &mut |text| AgentConfig::parse(&name, text).map(|_| ()));
    if is_there(&paths.agent_config()) {
        let loaded = HostIdentity::load(&paths.agent_identity()).map(|identity| format!("host '{}'", identity.name()));
        identity(&mut section, "agent's identity", &paths.agent_identity(), loaded);
    }
    let name = paths.receiver_config().display().to_string();
    file(&mut section, &paths.receiver_config(), &mut |text| ReceiverConfig::parse(&name, text).map(|_| ()));
    if is_there(&paths.receiver_config()) {
        let opened = Authority::open(&paths.receiver_identity()).map(|_| "authority and server key".to_owned());
        identity(&mut section, "receiver's identity", &paths.receiver_identity(), opened);
    }
    section
}

/// The text of a file that is there and can be read.
pub(super) fn text(path: &Path) -> Option<String> {
    let small = std::fs::metadata(path).is_ok_and(|facts| facts.is_file() && facts.len() <= CONFIG_BYTES_MAX);
    if small { std::fs::read_to_string(path).ok() } else { None }
}

fn file(section: &mut Section, path: &Path, check: &mut dyn FnMut(&str) -> Result<(), Problem>) {
    if !is_there(path) {
        return;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match text(path).as_deref().map(check) {
        Some(Ok(())) => section.ok(&name, path.display().to_string()),
        Some(Err(problem)) => {
            section.fail(&name, format!("{}: {}", problem.what, problem.why), CONFIG_WHY, problem.next)
        }
        None => section.fail(
            &name,
            format!("{} cannot be read as text", path.display()),
            CONFIG_WHY,
            "run this as root, or restore it",
        ),
    }
}

fn identity(section: &mut Section, name: &str, dir: &Path, loaded: Result<String, varve_net::Error>) {
    match loaded {
        Err(error) => {
            let problem = net_problem(&error);
            let why = "without it the two sides cannot know each other";
            section.fail(name, format!("{}: {}", problem.what, problem.why), why, problem.next);
        }
        Ok(found) => match open_to_others(dir) {
            Some(path) => section.fail(
                name,
                format!("{path} can be read by others than its owner"),
                "whoever has the key can take this host's place",
                format!("chmod 600 {path}; if somebody may have read it, set this identity up anew"),
            ),
            None => section.ok(name, format!("{found}, in {}", dir.display())),
        },
    }
}

/// A key file that not only its owner can read.
fn open_to_others(dir: &Path) -> Option<String> {
    let keys = std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path());
    keys.filter(|path| path.extension().is_some_and(|extension| extension == "key"))
        .find(|path| std::fs::metadata(path).is_ok_and(|facts| facts.permissions().mode() & 0o077 != 0))
        .map(|path| path.display().to_string())
}
