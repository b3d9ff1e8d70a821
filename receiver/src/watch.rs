//! The receiver watches its groups and their sources, by its own clock: nobody has to tell it that nobody tells it anything.
//!
//! Two threads. One looks once a second at what is in memory, so that no disk can hold it up. The other looks at the
//! disks for it, remembers proofs (`watch.json` beside `group.json`), and writes the metrics file.

use crate::control;
use crate::daemon::Daemon;
use crate::group::registry::Slot;
use crate::keeper::{SHORTENED, free_space};
use crate::status;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use varve_common::config::WatchConfig;
use varve_common::watch::Facts;
use varve_common::wire::messages::Verify;
use varve_io::crashsafe;
use varve_io::watcher::{LOOK_EVERY, METRICS_EVERY, Watcher};

/// When a verify last proved volume and replica equal; in the group's directory.
pub const FILE_NAME: &str = "watch.json";
/// Bytes that were written so often that a verify came to no end there may be this part of a proof: one in so many.
const UNVERIFIED_PART_MAX: u64 = 100;

/// What a receiver watches with.
#[derive(Debug)]
pub struct Watching {
    /// What is wrong, told once.
    pub watcher: Watcher,
    config: WatchConfig,
    disks: Mutex<BTreeMap<String, Disk>>,
}

/// What the second thread found.
#[derive(Clone, Debug, Default)]
struct Disk {
    free: Option<(u64, u64)>,
    proof: Proof,
    /// Of the newest verify that was looked at.
    verify: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Proof {
    /// Nanoseconds since 1970, by this host's clock.
    verified_ns: Option<u64>,
}

impl Watching {
    /// Nothing was looked at yet.
    pub fn new(config: WatchConfig) -> Self {
        Self { watcher: Watcher::new("receiver"), config, disks: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Disk>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Watches until the registry stops.
pub fn start(daemon: &Arc<Daemon>) -> io::Result<()> {
    type Look = fn(&Daemon);
    let threads: [(&str, Duration, Look); 3] =
        [("watch", LOOK_EVERY, look), ("watch-disks", LOOK_EVERY, look_at_disks), ("metrics", METRICS_EVERY, metrics)];
    for (name, every, work) in threads {
        if name == "metrics" && daemon.watching.config.metrics_file.is_none() {
            continue;
        }
        let daemon = daemon.clone();
        let run = move || {
            while !daemon.registry.is_stopping() {
                work(&daemon);
                std::thread::sleep(every);
            }
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(run)?;
    }
    Ok(())
}

fn look(daemon: &Daemon) {
    for slot in daemon.registry.groups().iter().filter(|slot| slot.board().unsure.is_some()) {
        // Whoever does not know who is right serves nothing writable. A word of the source alone takes nothing from its users: it
        // may be the source that lies.
        if let Err(problem) = daemon.promotions.stop_serving(&slot.name, false, "its devices stay") {
            tracing::debug!(group = slot.name, why = problem.why, "its devices stay");
        }
    }
    let metas: Vec<_> = daemon.registry.groups().iter().filter_map(|slot| slot.board().meta.clone()).collect();
    daemon.promotions.look_at_deadlines(metas.iter());
    // A branch has no source to be silent.
    let is_branch = |slot: &Slot| slot.board().meta.as_ref().is_some_and(|meta| meta.branch.is_some());
    let groups = daemon.registry.all();
    let watched = groups.iter().filter(|slot| !is_branch(slot));
    let facts: Vec<Facts> = watched.map(|slot| facts(daemon, slot)).collect();
    daemon.watching.watcher.look(&daemon.watching.config, Some(&daemon.name), &facts);
}

fn facts(daemon: &Daemon, slot: &Slot) -> Facts {
    let known = Facts::of(&status::group(daemon, slot));
    let disk = daemon.watching.lock().get(&slot.name).cloned().unwrap_or_default();
    let board = slot.board();
    let failed = board.live.as_ref().and_then(|live| live.failure());
    let failed = failed.map(|failure| (failure.text.clone(), failure.next.clone()));
    // Not open, and nobody was refused since: it is the group itself that is refused.
    let refused = board.refusal.clone().filter(|_| board.live.is_none());
    let again = || "see the receiver's log; it is tried again when the agent asks".to_owned();
    let refused = refused.map(|text| (text, board.unread.as_ref().map_or_else(again, |why| why.next.clone())));
    let meta = board.meta.as_ref();
    let born_ns = meta.map(|meta| meta.created_ns);
    Facts {
        free: disk.free,
        shortened: board.notice.clone().filter(|notice| notice.starts_with(SHORTENED)),
        held: meta.and_then(|meta| meta.held.as_ref()).map(|held| held.to.clone()),
        failure: failed.or(refused),
        born_ns,
        // What a group of the same name proved before this one was made proves nothing.
        verified_ns: disk.proof.verified_ns.filter(|at| born_ns.is_none_or(|born| *at > born)),
        ..known
    }
}

fn metrics(daemon: &Daemon) {
    let status = control::show_status(daemon, None);
    daemon.watching.watcher.write_metrics(&daemon.watching.config, &status.unwrap_or_default());
}

fn look_at_disks(daemon: &Daemon) {
    for slot in daemon.registry.groups() {
        let dir = daemon.registry.group_dir(&slot.name);
        let known = daemon.watching.lock().get(&slot.name).cloned();
        let mut disk = known.unwrap_or_else(|| Disk { proof: load(&dir), ..Disk::default() });
        disk.free = free_space(&dir);
        let verify = slot.board().report.as_ref().and_then(|(report, _)| report.verify.clone());
        if let Some(verify) = verify.filter(|verify| verify.finished && disk.verify != Some(verify.id)) {
            disk.verify = Some(verify.id);
            if is_proof(&verify) {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                disk.proof = Proof { verified_ns: Some(now.as_nanos() as u64) };
                if let Err(error) = save(&dir, disk.proof) {
                    tracing::warn!(
                        group = slot.name,
                        error,
                        "that the replica was verified is forgotten at the next start"
                    );
                }
            }
        }
        daemon.watching.lock().insert(slot.name.clone(), disk);
    }
    let names: Vec<String> = daemon.registry.groups().iter().map(|slot| slot.name.clone()).collect();
    daemon.watching.lock().retain(|name, _| names.contains(name));
}

fn is_proof(verify: &Verify) -> bool {
    let rest_is_small = verify.unverified_bytes <= verify.total_bytes / UNVERIFIED_PART_MAX;
    verify.finished && verify.error.is_none() && verify.differing_bytes == 0 && rest_is_small
}

/// A file that is not there or is damaged is no proof.
fn load(dir: &Path) -> Proof {
    let text = std::fs::read_to_string(dir.join(FILE_NAME)).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

fn save(dir: &Path, proof: Proof) -> Result<(), String> {
    let text = serde_json::to_vec(&proof).map_err(|error| error.to_string())?;
    crashsafe::write_atomic(dir.join(FILE_NAME), &text, 0o600).map_err(|error| error.chain())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_survives_and_damage_is_none() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(load(dir.path()), Proof::default());
        let proof = Proof { verified_ns: Some(7) };
        save(dir.path(), proof).expect("saved");
        assert_eq!(load(dir.path()), proof);
        std::fs::write(dir.path().join(FILE_NAME), b"{\"verified_ns\":").expect("written");
        assert_eq!(load(dir.path()), Proof::default());
    }

    #[test]
    fn what_is_a_proof() {
        let good = Verify { total_bytes: 1000, finished: true, ..Verify::default() };
        assert!(is_proof(&good) && is_proof(&Verify { unverified_bytes: 10, ..good.clone() }));
        let bad = [
            Verify { unverified_bytes: 11, ..good.clone() },
            Verify { differing_bytes: 1, repair: true, ..good.clone() },
            Verify { finished: false, ..good.clone() },
            Verify { error: Some("cut short".into()), ..good },
        ];
        assert!(!bad.iter().any(is_proof));
    }
}
