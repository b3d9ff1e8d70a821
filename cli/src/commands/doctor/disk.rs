//! Space below the state directories.

use super::Section;
use crate::client::Daemon;
use crate::context::Context;
use crate::words;
use nix::sys::statvfs::statvfs;
use std::path::Path;
use varve_common::config::ReceiverConfig;

/// The agent keeps little: its groups and marks.
const AGENT_BYTES_WANTED: u64 = 64 << 20;
/// Below this nothing can be relied on.
const BYTES_MIN: u64 = 16 << 20;
/// Without a readable configuration: the default size of one group's landing log.
const LANDING_BYTES_DEFAULT: u64 = 1 << 30;

pub(super) fn section(context: &Context) -> Section {
    let mut section = Section::new("disk");
    if Daemon::Agent.is_here(&context.paths) {
        space(&mut section, "agent's state", &context.paths.agent_state(), AGENT_BYTES_WANTED);
    }
    if Daemon::Receiver.is_here(&context.paths) {
        let config = super::config::text(&context.paths.receiver_config());
        let landing = config
            .and_then(|text| ReceiverConfig::parse("receiver.toml", &text).ok())
            .map_or(LANDING_BYTES_DEFAULT, |config| config.landing_bytes_max);
        space(&mut section, "receiver's state", &context.paths.receiver_state(), landing);
    }
    section
}

fn space(section: &mut Section, name: &str, dir: &Path, wanted: u64) {
    // A daemon makes its directory at its first start: until then the one above tells.
    let there = dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(dir);
    let why = "what arrives is kept on disk before it is acknowledged: without space nothing is protected any more";
    match statvfs(there) {
        Err(error) => section.fail(
            name,
            format!("{} cannot be looked at: {}", dir.display(), words::sentence(&error.into())),
            why,
            "check the mount",
        ),
        Ok(facts) => {
            let free = facts.blocks_available() * facts.fragment_size();
            let found = format!("{} free in {}", words::bytes(free), dir.display());
            let next = format!("free some space, or give {} a larger filesystem", dir.display());
            match free {
                _ if free < BYTES_MIN => section.fail(name, found, why, next),
                _ if free < wanted => {
                    section.warn(name, format!("{found}, wanted {}", words::bytes(wanted)), why, next)
                }
                _ => section.ok(name, found),
            }
        }
    }
}
