//! Space below the state directories.

use super::Section;
use crate::client::Daemon;
use crate::context::Context;
use crate::words;
use nix::sys::statvfs::statvfs;
use std::fs::DirEntry;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use varve_common::config::{AgentConfig, ReceiverConfig};
use varve_common::limits::journal_floor;

/// What the agent keeps beside its journals is little: its groups and marks.
const AGENT_BYTES_WANTED: u64 = 64 << 20;
/// Below this nothing can be relied on.
const BYTES_MIN: u64 = 16 << 20;
/// Without a readable configuration: the default size of one group's landing log.
const LANDING_BYTES_DEFAULT: u64 = 1 << 30;
const STATE_WHY: &str =
    "what arrives is kept on disk before it is acknowledged: without space nothing is protected any more";
const JOURNAL_WHY: &str = "an outage that is longer than the rings and what the journals can take becomes a gap";

pub(super) fn section(context: &Context) -> Section {
    let mut section = Section::new("disk");
    let paths = &context.paths;
    if Daemon::Agent.is_here(paths) {
        let dir = paths.agent_state();
        if let Some(room) = room(&mut section, "agent's state", &dir) {
            state(&mut section, "agent's state", &dir, &room, AGENT_BYTES_WANTED);
        }
        let config = super::config::text(&paths.agent_config()).unwrap_or_default();
        let journal_max = AgentConfig::parse("agent.toml", &config).map_or(0, |config| config.journal_bytes_max);
        let journals = paths.agent_journals();
        if journal_max > 0
            && let Some(room) = room(&mut section, "agent's journals", &journals)
        {
            let groups = entries(&dir.join("groups")).filter(|entry| entry.path().extension() == Some("json".as_ref()));
            journal(&mut section, &journals, &room, journal_max, groups.count());
        }
    }
    if Daemon::Receiver.is_here(paths) {
        let config = super::config::text(&paths.receiver_config());
        let landing = config
            .and_then(|text| ReceiverConfig::parse("receiver.toml", &text).ok())
            .map_or(LANDING_BYTES_DEFAULT, |config| config.landing_bytes_max);
        let dir = paths.receiver_state();
        if let Some(room) = room(&mut section, "receiver's state", &dir) {
            state(&mut section, "receiver's state", &dir, &room, landing);
        }
    }
    section
}

/// Bytes of a file system.
struct Room {
    free: u64,
    total: u64,
}

fn room(section: &mut Section, name: &str, dir: &Path) -> Option<Room> {
    // A daemon makes its directory at its first start: until then the one above tells.
    let there = dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(dir);
    match statvfs(there) {
        Err(error) => {
            let found = format!("{} cannot be looked at: {}", dir.display(), words::sentence(&error.into()));
            section.fail(name, found, STATE_WHY, "check the mount");
            None
        }
        Ok(facts) => {
            let unit = facts.fragment_size();
            Some(Room { free: facts.blocks_available() * unit, total: facts.blocks() * unit })
        }
    }
}

fn state(section: &mut Section, name: &str, dir: &Path, room: &Room, wanted: u64) {
    let found = format!("{} free in {}", words::bytes(room.free), dir.display());
    let next = format!("free some space, or give {} a larger filesystem", dir.display());
    match room.free {
        free if free < BYTES_MIN => section.fail(name, found, STATE_WHY, next),
        free if free < wanted => {
            section.warn(name, format!("{found}, wanted {}", words::bytes(wanted)), STATE_WHY, next);
        }
        _ => section.ok(name, found),
    }
}

/// Whether every group's journal can have what it may have, beside what it has.
fn journal(section: &mut Section, dir: &Path, room: &Room, most: u64, groups: usize) {
    let taken: u64 = entries(dir)
        .flat_map(|group| entries(&group.path()))
        .filter_map(|segment| segment.metadata().ok())
        .map(|segment| segment.blocks() * 512)
        .sum();
    let floor = journal_floor(room.total);
    // Before the first group: whether there will be room for it.
    let groups = groups.max(1);
    let wanted = floor + (most * groups as u64).saturating_sub(taken);
    let found = format!("{} free in {}", words::bytes(room.free), dir.display());
    if room.free >= wanted {
        return section.ok("agent's journals", found);
    }
    let found = format!(
        "{found}, wanted {}: {} are always left free, and {} may take up to {} each",
        words::bytes(wanted),
        words::bytes(floor),
        words::count(groups, "group"),
        words::bytes(most)
    );
    let next = format!(
        "free some space, give {} a larger filesystem, or lower journal_max_mib in agent.toml to what there is room for",
        dir.display()
    );
    section.warn("agent's journals", found, JOURNAL_WHY, next);
}

fn entries(dir: &Path) -> impl Iterator<Item = DirEntry> + use<> {
    std::fs::read_dir(dir).into_iter().flatten().flatten()
}

#[cfg(test)]
mod tests {
    use super::super::{Check, Level};
    use super::*;

    const GIB: u64 = 1 << 30;

    fn judged(free: u64, total: u64, groups: usize, taken: u64) -> Check {
        let dir = tempfile::tempdir().expect("temp dir");
        if taken > 0 {
            std::fs::create_dir(dir.path().join("db")).expect("made");
            std::fs::write(dir.path().join("db/1.seg"), vec![1; taken as usize]).expect("written");
        }
        let mut section = Section::new("disk");
        journal(&mut section, dir.path(), &Room { free, total }, 4 * GIB, groups);
        section.checks.remove(0)
    }

    /// 100 MiB of 20 GiB were called well, while the journal left 1 GiB free and took nothing.
    #[test]
    fn a_disk_on_which_a_journal_cannot_grow_is_not_well() {
        let none = judged(100 << 20, 20 * GIB, 1, 0);
        assert_eq!(none.result, Level::Warn);
        assert!(none.why.contains("gap") && none.found.contains("wanted 5.0 GiB"), "{} {}", none.found, none.why);
        assert_eq!(judged(5 * GIB, 20 * GIB, 1, 0).result, Level::Ok);
        assert_eq!(judged(5 * GIB, 20 * GIB, 0, 0).result, Level::Ok, "as for one");
        assert_eq!(judged(5 * GIB, 20 * GIB, 2, 0).result, Level::Warn, "each group has a journal");
        assert_eq!(judged(6 * GIB, 1000 * GIB, 1, 0).result, Level::Ok, "never more than 2 GiB are left free");
        // What is in a journal is not wanted once more.
        assert_eq!(judged(5 * GIB - (1 << 20), 20 * GIB, 1, 0).result, Level::Warn);
        assert_eq!(judged(5 * GIB - (1 << 20), 20 * GIB, 1, 1 << 20).result, Level::Ok);
    }
}
