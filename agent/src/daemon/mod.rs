//! The agent: groups, capture, the link, the control socket. Changes of the set of groups are made one at a time.
//!
//! - [`start`]: how groups begin
//! - [`protect`]: groups that are made and let go by command
//! - [`tick`]: what needs looking after once a second
//!
//! Here: what all of them share, what others ask of the daemon, and its end.

mod protect;
mod start;
mod tick;

pub use start::remember_identities;

use crate::failback::Returning;
use crate::group::{FRAME_BYTES, GroupHandle, Surroundings};
use crate::journal;
use crate::link::{self, LinkView, Target};
use crate::misses::Misses;
use crate::quiesce::{self, Authorities, Order};
use crate::seal::{Patience, Seal};
use crate::store::{GroupFile, Store};
use crate::volume::{self, Checked};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use varve_bpf::{Capture, CaptureError, CaptureOptions, Origin};
use varve_common::config::{AgentConfig, WatchConfig};
use varve_common::control::{DaemonStatus, GroupStatus, ProtectReply, StatusReply, VolumeStatus, Window};
use varve_common::limits::{GROUPS_MAX, REGION_BYTES, VOLUMES_PER_GROUP_MAX};
use varve_common::paths::Paths;
use varve_common::problem::{Problem, check_name};
use varve_common::record::RECORD_BYTES_MAX;
use varve_common::state::{Data, GapReason, Link, Role};
use varve_io::aligned::BufPool;
use varve_io::blockdev::BlockFacts;
use varve_io::watcher::Watcher;

/// Frames under way to the receiver, over all groups.
const FRAMES_MAX: usize = 20;
/// Regions in memory, over all groups.
const REGIONS_MAX: usize = 16;
/// Between two looks at what needs looking after.
const TICK: Duration = Duration::from_secs(1);
/// Ticks between two tries to start a group that could not be started.
const RETRY_TICKS: u64 = 10;
/// Ticks between two looks at whether the volumes are still what they were. (A volume that is written says so itself.)
const LOOK_TICKS: u64 = 3;

/// How long a stop waits for looks at volumes, over all groups.
const SEAL_LIMIT: Duration = Duration::from_secs(5);
/// The same for a start, before anybody is told that capture runs.
const PATIENCE: Duration = Duration::from_secs(6);

/// How the problem of a volume that shrank ends.
const SHRANK: &str = "shrank";

/// A group that could not be started: tried again, and never called protected.
struct Failed {
    file: GroupFile,
    problem: Problem,
}

/// See the module's text.
pub struct Daemon {
    paths: Paths,
    store: Store,
    config: Mutex<AgentConfig>,
    capture: tokio::sync::Mutex<Option<Arc<Capture>>>,
    groups: RwLock<BTreeMap<String, Arc<GroupHandle>>>,
    failed: Mutex<BTreeMap<String, Failed>>,
    returning: Mutex<BTreeMap<String, Arc<Returning>>>,
    authorities: Authorities,
    /// What the workers want of the daemon, and where that comes out until somebody obeys.
    orders: (mpsc::Sender<Order>, Mutex<Option<mpsc::Receiver<Order>>>),
    /// Held while the set of groups changes.
    changes: tokio::sync::Mutex<()>,
    target: watch::Sender<Target>,
    view: watch::Receiver<LinkView>,
    frames: BufPool,
    regions: BufPool,
    misses: Arc<Misses>,
    patience: Arc<Patience>,
    /// What is wrong, told once.
    pub watcher: Watcher,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Daemon {
    /// Reads the configuration and the groups' files; starts nothing yet but the link.
    pub fn open(paths: Paths) -> Result<Arc<Self>, Problem> {
        let config = read_config(&paths)?;
        let store = Store::open(&paths.agent_state())?;
        let target = Target { receiver: config.receiver.clone(), identity: paths.agent_identity(), generation: 0 };
        let (target, targets) = watch::channel(target);
        let (view_sender, view) = watch::channel(LinkView { connection: None, link: Link::Disconnected, reason: None });
        tokio::spawn(link::run(targets, view_sender));
        // A frame holds the largest record, and LZ4 may make what does not shrink a little longer.
        let (order, ordered) = mpsc::channel(quiesce::ORDERS_MAX);
        let misses = Misses::start().map_err(|error| {
            Problem::failed("a thread cannot be started", error.to_string(), "look at the host's limits")
        })?;
        let frame_bytes = lz4_flex::block::get_maximum_output_size(FRAME_BYTES.max(RECORD_BYTES_MAX) as usize);
        Ok(Arc::new(Self {
            paths,
            store,
            config: Mutex::new(config),
            capture: tokio::sync::Mutex::new(None),
            groups: RwLock::default(),
            failed: Mutex::default(),
            returning: Mutex::default(),
            authorities: Authorities::default(),
            orders: (order, Mutex::new(Some(ordered))),
            changes: tokio::sync::Mutex::new(()),
            target,
            view,
            frames: BufPool::new(FRAMES_MAX, frame_bytes.next_multiple_of(4096)),
            regions: BufPool::new(REGIONS_MAX, REGION_BYTES as usize),
            misses,
            patience: Arc::new(Patience::new(PATIENCE)),
            watcher: Watcher::new("agent"),
        }))
    }

    /// Has it among our groups.
    pub fn adopt(&self, handle: GroupHandle) {
        let name = handle.file.name.clone();
        self.groups.write().unwrap_or_else(PoisonError::into_inner).insert(name, Arc::new(handle));
    }

    /// Has it among our groups no more.
    pub async fn let_go(&self, name: &str) -> Option<Arc<GroupHandle>> {
        let _changes = self.changes.lock().await;
        lock(&self.failed).remove(name);
        self.groups.write().unwrap_or_else(PoisonError::into_inner).remove(name)
    }

    /// Ends what an agent before us left capturing.
    pub async fn end_pinned(&self, file: &GroupFile) -> Result<(), Problem> {
        let volumes = self.check_volumes(&file.name, &file.volumes)?;
        let (capture, name) = (self.capture(&volumes[0]).await?, file.name.clone());
        // A panic there was reported by the hook.
        let _ = tokio::task::spawn_blocking(move || capture.give_up(&name)).await;
        Ok(())
    }

    /// Who may write.
    pub fn authorities(&self) -> &Authorities {
        &self.authorities
    }

    /// The operator's own steps.
    pub fn hooks(&self) -> PathBuf {
        self.paths.config_dir().join("hooks")
    }

    /// The group files.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The connection.
    pub fn link(&self) -> watch::Receiver<LinkView> {
        self.view.clone()
    }

    /// Whether it is coming home, or was called to.
    pub fn is_returning(&self, name: &str) -> bool {
        lock(&self.returning).contains_key(name)
    }

    /// A group comes home, unless it does already.
    pub fn remember_return(self: &Arc<Self>, file: GroupFile) -> Arc<Returning> {
        let mut returning = lock(&self.returning);
        returning.entry(file.name.clone()).or_insert_with(|| Returning::start(self, file)).clone()
    }

    /// One of our groups was called home. Not if it was unprotected meanwhile: its volumes would be overwritten.
    pub async fn called_home(self: &Arc<Self>, handle: &Arc<GroupHandle>) {
        let _changes = self.changes.lock().await;
        if self.group(&handle.file.name).is_ok_and(|there| Arc::ptr_eq(&there, handle)) {
            let mut file = handle.file.clone();
            file.synced_once |= handle.shared.facts().ever_consistent;
            self.remember_return(file);
        }
    }

    /// It does not come home any more, or is there.
    pub fn returned(&self, done: &Arc<Returning>) {
        let mut returning = lock(&self.returning);
        if returning.get(&done.name).is_some_and(|there| Arc::ptr_eq(there, done)) {
            returning.remove(&done.name);
        }
    }

    /// Directories that must not lie on a volume.
    pub fn own_dirs(&self) -> Vec<PathBuf> {
        let own = [self.paths.agent_state(), self.paths.receiver_state()];
        own.into_iter().filter(|dir| dir.exists()).collect()
    }

    /// Where the groups' journals lie.
    fn journals(&self, config: &AgentConfig) -> journal::Settings {
        journal::Settings { dir: self.paths.agent_journals(), bytes_max: config.journal_bytes_max }
    }

    /// Of a group that is not protected any more.
    pub async fn remove_journal(&self, name: &str) {
        let (dir, name) = (self.paths.agent_journals(), name.to_owned());
        // A panic there was reported by the hook.
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || journal::Settings::remove(&dir, &name)).await {
            tracing::error!("the journal of a group that is not protected any more stays: {}", error.chain());
        }
    }

    /// Our groups.
    pub fn handles(&self) -> Vec<Arc<GroupHandle>> {
        self.groups.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// The group of this name.
    pub fn group(&self, name: &str) -> Result<Arc<GroupHandle>, Problem> {
        let found = self.groups.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        found.ok_or_else(|| match lock(&self.failed).get(name) {
            Some(failed) => failed.problem.clone(),
            None => no_group(name),
        })
    }

    /// The volumes of a group, also of one that could not be started.
    pub fn volumes_of(&self, name: &str) -> Vec<String> {
        match self.group(name) {
            Ok(handle) => handle.file.volumes.clone(),
            Err(_) => lock(&self.failed).get(name).map(|failed| failed.file.volumes.clone()).unwrap_or_default(),
        }
    }

    /// The configuration or the identity changed on disk.
    pub fn reload(&self) -> Result<(), Problem> {
        let config = read_config(&self.paths)?;
        self.target.send_modify(|target| {
            target.receiver.clone_from(&config.receiver);
            target.generation += 1;
        });
        *lock(&self.config) = config;
        tracing::info!("configuration read again");
        Ok(())
    }

    /// All groups, and whether each could be started.
    pub fn watched(&self) -> Vec<(GroupStatus, bool)> {
        let returning: Vec<Arc<Returning>> = lock(&self.returning).values().cloned().collect();
        let mut groups: Vec<_> = self.handles().iter().map(|handle| (handle.shared.status(), true)).collect();
        // One that was only called is still as it was.
        let claimed = returning.iter().filter(|returning| returning.shown().claimed);
        let claimed: Vec<GroupStatus> = claimed.map(|returning| returning.status()).collect();
        groups.retain(|(group, _)| claimed.iter().all(|claimed| claimed.name != group.name));
        groups.extend(claimed.into_iter().map(|status| (status, true)));
        // While it is started over itself it is still the one that it was.
        let failed: Vec<GroupStatus> = lock(&self.failed).values().map(Failed::status).collect();
        let known: Vec<String> = groups.iter().map(|(group, _)| group.name.clone()).collect();
        let failed = failed.into_iter().filter(|failed| !known.contains(&failed.name));
        groups.extend(failed.map(|status| (status, false)));
        for called in returning.iter().filter(|returning| !returning.shown().claimed) {
            match (groups.iter_mut().find(|(group, _)| group.name == called.name), called.shown().reason) {
                (Some((group, _)), Some(reason)) => group.reason = Some(reason),
                (Some(_), None) => {}
                // Its capture has ended a moment ago.
                (None, _) => groups.push((called.status(), true)),
            }
        }
        groups
    }

    /// What is watched, and this host's name.
    pub fn watch_config(&self) -> (WatchConfig, Option<String>) {
        let config = lock(&self.config);
        (config.watch.clone(), config.name.clone())
    }

    /// `varve status`.
    pub fn status(&self, only: Option<&str>) -> Result<StatusReply, Problem> {
        let mut groups: Vec<GroupStatus> = self.watched().into_iter().map(|(status, _)| status).collect();
        self.watcher.fill(&mut groups);
        groups.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(only) = only {
            groups.retain(|group| group.name == only);
            if groups.is_empty() {
                return Err(no_group(only));
            }
        }
        let config = lock(&self.config);
        let daemon = DaemonStatus {
            daemon: "agent".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            address: config.receiver.clone(),
            name: config.name.clone(),
            rss_bytes: varve_io::cpu::process_own_bytes().unwrap_or(0),
            hosts_connected: None,
        };
        Ok(StatusReply { groups, daemons: vec![daemon] })
    }

    /// Ends all groups' workers. Capture goes on if it is pinned.
    pub async fn stop(&self) {
        let returning: Vec<Arc<Returning>> = std::mem::take(&mut *lock(&self.returning)).into_values().collect();
        for returning in returning {
            returning.stop().await;
        }
        let _changes = self.changes.lock().await;
        let groups = std::mem::take(&mut *self.groups.write().unwrap_or_else(PoisonError::into_inner));
        // Everything is safe before anything is looked at.
        let mut rested = Vec::with_capacity(groups.len());
        for handle in groups.values() {
            if handle.stop().await {
                rested.push(handle.clone());
            }
        }
        self.seal(rested).await;
    }

    /// What spares a comparison if nobody writes before the next start.
    async fn seal(&self, groups: Vec<Arc<GroupHandle>>) {
        let (answer, mut answered) = mpsc::channel(groups.len().max(1));
        for handle in groups {
            let (answer, misses) = (answer.clone(), self.misses.clone());
            let press = move || {
                let outcome = handle.seal(&misses);
                // Whoever asked may have gone.
                let _ = answer.blocking_send((handle.file.name.clone(), outcome));
            };
            // Not one of the runtime's threads, for which it waits at its end: a volume may not answer.
            if let Err(error) = std::thread::Builder::new().name("seal".to_owned()).spawn(press) {
                tracing::warn!(%error, "a thread cannot be started; a boot means a comparison");
            }
        }
        drop(answer);
        let until = tokio::time::Instant::now() + SEAL_LIMIT;
        while let Ok(Some((name, outcome))) = tokio::time::timeout_at(until, answered.recv()).await {
            match &outcome {
                Ok(_) => {
                    tracing::info!(group = %name, "sealed: if nobody writes before the next start, nothing is compared")
                }
                Err(why) => tracing::info!(group = %name, "not sealed, a boot means a comparison: {why}"),
            }
            if let Err(problem) = self.store.save_seal(&name, &outcome.unwrap_or_else(Seal::refused)) {
                tracing::warn!(group = %name, "its seal could not be left, a boot means a comparison: {problem}");
            }
        }
    }
}

impl Failed {
    fn status(&self) -> GroupStatus {
        GroupStatus {
            name: self.file.name.clone(),
            role: Role::Source,
            link: Link::Disconnected,
            data: if self.file.synced_once { Data::Gap } else { Data::InitialSync },
            reason: Some(format!("not protected: {}. {}", self.problem, self.problem.next)),
            gap_reason: [SHRANK, volume::EXCHANGED]
                .iter()
                .any(|end| self.problem.what.ends_with(end))
                .then_some(GapReason::VolumeChanged),
            epoch: 1,
            rpo_seconds: None,
            lag_bytes: 0,
            captured: None,
            durable: None,
            applied: None,
            window: Window::default(),
            history: None,
            gaps: Vec::new(),
            volumes: self
                .file
                .volumes
                .iter()
                .zip(&self.file.bytes)
                .map(|(path, bytes)| VolumeStatus { path: path.clone(), bytes: *bytes, replica: None })
                .collect(),
            resync: None,
            verify: None,
            ring: None,
            journal: None,
            alerts: Vec::new(),
            watch: None,
            drill: None,
            authority: None,
            counters: BTreeMap::new(),
        }
    }
}

fn no_group(name: &str) -> Problem {
    Problem::not_found(
        format!("there is no group '{name}' on this host"),
        "it is not protected here",
        "'varve status' lists the groups; 'varve protect GROUP VOLUME...' makes one",
    )
}

fn read_config(paths: &Paths) -> Result<AgentConfig, Problem> {
    let path = paths.agent_config();
    let name = path.display().to_string();
    match std::fs::read_to_string(&path) {
        Ok(text) => AgentConfig::parse(&name, &text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => AgentConfig::parse(&name, ""),
        Err(error) => {
            Err(Problem::failed(format!("{name} cannot be read"), error.to_string(), "check its permissions"))
        }
    }
}

#[cfg(test)]
mod tests;
