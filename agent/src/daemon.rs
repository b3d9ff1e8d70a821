//! The agent: groups, capture, the link, the control socket. Changes of the set of groups are made one at a time.

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

    /// Starts the groups that were protected before.
    pub async fn start_groups(self: &Arc<Self>) -> Result<(), Problem> {
        let files = self.store.load()?;
        let names: Vec<String> = files.iter().map(|(name, _)| name.clone()).collect();
        self.authorities.load(self.store.load_authorities(&names));
        if let Some(orders) = lock(&self.orders.1).take() {
            tokio::spawn(self.clone().obey(orders));
        }
        if files.is_empty() {
            // What an agent left that was killed while its last group was unprotected.
            self.give_up("").await;
        }
        for (name, file) in files {
            match file {
                Ok(file) if file.returning => drop(self.remember_return(file)),
                Ok(file) => self.start_or_remember(file).await,
                Err(problem) => {
                    tracing::error!(group = %name, "not protected: {problem}; {}", problem.next);
                    // Of what was protected only the name is known, but that it is not any more must be seen.
                    let file = GroupFile::new(name.clone(), Vec::new(), Vec::new(), Vec::new());
                    lock(&self.failed).insert(name, Failed { file, problem });
                }
            }
        }
        Ok(())
    }

    /// Starts a group, or says what is wrong with it.
    pub async fn start_or_remember(self: &Arc<Self>, file: GroupFile) {
        let _changes = self.changes.lock().await;
        self.start_or_remember_locked(file).await;
    }

    /// The caller holds `changes`.
    async fn start_or_remember_locked(self: &Arc<Self>, file: GroupFile) {
        let name = file.name.clone();
        let outcome = self.start_group(&file).await;
        let mut failed = lock(&self.failed);
        match outcome {
            Ok(()) => {
                failed.remove(&name);
            }
            Err(problem) => {
                let known = failed.get(&name).is_some_and(|before| before.problem == problem);
                if !known {
                    tracing::error!(group = %name, "not protected: {problem}; {}", problem.next);
                }
                failed.insert(name, Failed { file, problem });
            }
        }
    }

    async fn start_group(self: &Arc<Self>, file: &GroupFile) -> Result<(), Problem> {
        self.authorities.open_for_start(&file.name, &file.volumes);
        let started = self.start_open_group(file).await;
        self.authorities.close_after_start(&file.name);
        if let Ok(handle) = self.group(&file.name) {
            handle.shared.facts().quiet = self.authorities.quiet(&file.name);
        }
        started
    }

    async fn start_open_group(self: &Arc<Self>, file: &GroupFile) -> Result<(), Problem> {
        let volumes = self.check_volumes(&file.name, &file.volumes)?;
        refuse_exchanged(file, &volumes)?;
        let mut file = file.clone();
        let asked = remember_identities(&mut file, &volumes);
        let mut changed = false;
        for (volume, bytes) in volumes.iter().zip(&mut file.bytes) {
            if volume.spec.bytes < *bytes {
                return Err(Problem::refused(
                    format!("{} {SHRANK}", volume.path),
                    format!(
                        "it had {bytes} bytes and has {} now: what is behind the new end may be gone, and only growth is \
                         followed",
                        volume.spec.bytes
                    ),
                    format!(
                        "if that was a mistake, give it its size again; else 'varve unprotect {0}', then 'varve protect' it \
                         under another name: the history of '{0}' stays at the recovery host until 'varve forget {0}' there",
                        file.name
                    ),
                ));
            }
            if volume.spec.bytes > *bytes {
                tracing::info!(group = %file.name, "{} grew from {bytes} to {} bytes", volume.path, volume.spec.bytes);
                *bytes = volume.spec.bytes;
                changed = true;
            }
        }
        if changed {
            self.store.save(&file)?;
        } else if asked && let Err(problem) = self.store.save(&file) {
            // The group ran without it until now.
            tracing::warn!(group = %file.name, "what identifies its volumes was not written down: {}", problem.why);
        }
        self.run_group(file, &volumes).await
    }

    async fn run_group(self: &Arc<Self>, file: GroupFile, volumes: &[Checked]) -> Result<(), Problem> {
        let handle = self.group_of(file, volumes, None).await?;
        self.adopt(handle);
        Ok(())
    }

    /// A group that captures and is not one of ours yet. `link`: not the daemon's; the replicas are equal to the volumes.
    pub async fn make_group(
        &self,
        file: GroupFile,
        link: Option<watch::Receiver<LinkView>>,
    ) -> Result<GroupHandle, Problem> {
        let volumes = self.check_volumes(&file.name, &file.volumes)?;
        refuse_exchanged(&file, &volumes)?;
        self.group_of(file, &volumes, link).await
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

    /// Checks volumes for a group that this host does not have.
    pub fn check_protect_volumes(&self, group: &str, volumes: &[String]) -> Result<Vec<Checked>, Problem> {
        self.check_protect(group, volumes, &[])?;
        self.check_volumes(group, volumes)
    }

    async fn group_of(
        &self,
        file: GroupFile,
        volumes: &[Checked],
        link: Option<watch::Receiver<LinkView>>,
    ) -> Result<GroupHandle, Problem> {
        // Two of one name would share a journal, and nobody would look after the ring of the one that is replaced. One that
        // was told to end is started over itself.
        if self.group(&file.name).is_ok_and(|there| !there.is_told_to_end()) {
            return Err(Problem::refused(
                format!("group '{}' cannot be started", file.name),
                "it runs already",
                "report this as a defect",
            ));
        }
        let capture = self.capture(&volumes[0]).await?;
        let config = lock(&self.config).clone();
        let surroundings = Surroundings {
            capture,
            equal: link.is_some(),
            link: link.unwrap_or_else(|| self.view.clone()),
            frames: self.frames.clone(),
            regions: self.regions.clone(),
            misses: self.misses.clone(),
            ring_bytes: config.ring_bytes,
            lagging_after: config.lagging_after,
            compression: config.compression,
            journal: Some(self.journals(&config)),
            patience: self.patience.clone(),
            seal: self.store.take_seal(&file.name).filter(|_| !config.compare_after_boot),
            authority: self.authorities.known(&file.name),
            orders: self.orders.0.clone(),
        };
        let (store, mut synced) = (self.store.clone(), file.clone());
        synced.synced_once = true;
        let was_synced = AtomicU64::new(u64::from(file.synced_once));
        let on_consistent = move || {
            if was_synced.swap(1, Ordering::AcqRel) == 0
                && let Err(problem) = store.save(&synced)
            {
                tracing::error!("{problem}; {}", problem.next);
            }
        };
        GroupHandle::start(file, volumes, &surroundings, on_consistent)
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

    /// The capture programs, loaded when the first group needs them.
    async fn capture(&self, probe: &Checked) -> Result<Arc<Capture>, Problem> {
        let mut loaded = self.capture.lock().await;
        if let Some(capture) = loaded.as_ref() {
            return Ok(capture.clone());
        }
        let options = CaptureOptions { probe: PathBuf::from(&probe.path) };
        let (pins, store) = (self.paths.bpffs(), self.store.clone());
        let capture = tokio::task::spawn_blocking(move || open_capture(&options, &pins, &store)).await;
        let capture = capture
            .map_err(|e| Problem::failed("the capture programs cannot be loaded", e.to_string(), "look at the log"))?
            .map_err(|error| {
                let source = std::error::Error::source(&error).map_or(String::new(), |source| format!(": {source}"));
                Problem::failed("the capture programs cannot be loaded", format!("{error}{source}"), error.hint())
            })?;
        let capture = Arc::new(capture);
        // Not held by it: capture ends with the last group.
        let watched = Arc::downgrade(&capture);
        self.misses.watch(move || watched.upgrade().map(|capture| capture.misses()));
        *loaded = Some(capture.clone());
        Ok(capture)
    }

    fn check_volumes(&self, group: &str, paths: &[String]) -> Result<Vec<Checked>, Problem> {
        let own = self.own_dirs();
        let mut checked: Vec<Checked> = Vec::with_capacity(paths.len());
        for path in paths {
            let volume = volume::check(path, &own)?;
            for before in &checked {
                volume::refuse_overlap(&volume, group, &before.spec, &before.path)?;
            }
            // A group may be started over itself.
            for handle in self.handles().into_iter().filter(|handle| handle.file.name != group) {
                for (path, spec) in handle.file.volumes.iter().zip(&handle.specs) {
                    volume::refuse_overlap(&volume, &handle.file.name, spec, path)?;
                }
            }
            checked.push(volume);
        }
        Ok(checked)
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

    /// `varve protect`.
    pub async fn protect(
        self: &Arc<Self>,
        group: String,
        volumes: Vec<String>,
        replicas: Vec<String>,
        dry_run: bool,
    ) -> Result<ProtectReply, Problem> {
        let _changes = self.changes.lock().await;
        self.check_protect(&group, &volumes, &replicas)?;
        let checked = self.check_volumes(&group, &volumes)?;
        let mut notes: Vec<String> = checked.iter().flat_map(|volume| volume.notes.clone()).collect();
        if lock(&self.config).receiver.is_none() {
            return Err(Problem::refused(
                format!("group '{group}' cannot be protected yet"),
                "this host has not joined a receiver",
                "run 'varve host invite NAME' on the recovery host, then 'varve join ADDR:7443 TOKEN' here",
            ));
        }
        if self.view.borrow().connection.is_none() {
            let why = self.view.borrow().reason.clone().unwrap_or_default();
            notes.push(format!("the receiver is not connected now; the first sync begins when it is. {why}"));
        }
        notes.push(format!(
            "history is kept until the recovery host's disk is nearly full, unless 'varve retention {group} --age 7d --bytes \
             100GiB' (or the like) says there how much"
        ));
        let reply = ProtectReply {
            group: group.clone(),
            volumes: checked
                .iter()
                .enumerate()
                .map(|(number, volume)| VolumeStatus {
                    path: volume.path.clone(),
                    bytes: volume.spec.bytes,
                    replica: replicas.get(number).cloned(),
                })
                .collect(),
            notes,
        };
        if dry_run {
            return Ok(reply);
        }
        let bytes = checked.iter().map(|volume| volume.spec.bytes).collect();
        let mut file = GroupFile::new(group, volumes, bytes, replicas);
        remember_identities(&mut file, &checked);
        // The file first: a group that is captured is a group that is remembered.
        self.store.save(&file)?;
        if let Err(problem) = self.run_group(file.clone(), &checked).await {
            self.store.remove(&file.name)?;
            return Err(problem);
        }
        tracing::info!(group = %file.name, volumes = ?file.volumes, "protected");
        Ok(reply)
    }

    fn check_protect(&self, group: &str, volumes: &[String], replicas: &[String]) -> Result<(), Problem> {
        check_name("group", group)?;
        let known = self.groups.read().unwrap_or_else(PoisonError::into_inner).contains_key(group)
            || lock(&self.failed).contains_key(group)
            || self.is_returning(group);
        if known {
            return Err(Problem::refused(
                format!("group '{group}' exists already"),
                "a group's volumes are fixed when it is made, because they share one history",
                format!("choose another name, or 'varve unprotect {group}' first"),
            ));
        }
        if volumes.is_empty() || volumes.len() > VOLUMES_PER_GROUP_MAX {
            return Err(Problem::usage(
                format!("a group cannot have {} volumes", volumes.len()),
                format!("it has 1 to {VOLUMES_PER_GROUP_MAX}"),
                "protect them as several groups",
            ));
        }
        if !replicas.is_empty() && replicas.len() != volumes.len() {
            return Err(Problem::usage(
                format!("{} replicas for {} volumes", replicas.len(), volumes.len()),
                "there is none, or one for each volume in the same order",
                "repeat --replica for every volume",
            ));
        }
        if let Some(relative) = replicas.iter().find(|path| !path.starts_with('/')) {
            return Err(Problem::usage(
                format!("replica '{relative}' is not an absolute path"),
                "it is a path on the recovery host",
                "give the whole path",
            ));
        }
        let count = self.groups.read().unwrap_or_else(PoisonError::into_inner).len() + lock(&self.failed).len();
        if count >= GROUPS_MAX {
            return Err(Problem::failed(
                format!("group '{group}' would be one too many"),
                format!("an agent has at most {GROUPS_MAX} groups"),
                "put volumes that belong together into one group",
            ));
        }
        Ok(())
    }

    /// `varve unprotect`: capture ends; the receiver keeps what it has.
    pub async fn unprotect(&self, name: &str) -> Result<(), Problem> {
        // It may take its time to end, and others need not wait for that.
        let returning = self.stop_return(name).await;
        let _changes = self.changes.lock().await;
        // It may have been found called once more, and may have come home, until the lock was had; from here on it cannot.
        let returning = self.stop_return(name).await || returning;
        let handle = self.groups.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        let failed = lock(&self.failed).remove(name);
        if handle.is_none() && failed.is_none() && !returning {
            return Err(no_group(name));
        }
        if let Some(handle) = handle {
            handle.end().await;
        }
        // From here on it stays ended, whatever happens: a group without a file is given up at the next start.
        self.store.remove(name)?;
        self.authorities.forget(name);
        self.give_up(name).await;
        self.remove_journal(name).await;
        tracing::info!(group = %name, "no longer protected");
        Ok(())
    }

    /// Ends its coming home, if it does that. The caller may hold `changes`: what comes home does not wait for it any more when
    /// it is to stop.
    async fn stop_return(&self, name: &str) -> bool {
        let returning = lock(&self.returning).remove(name);
        if let Some(returning) = &returning {
            returning.stop().await;
        }
        returning.is_some()
    }

    /// Nothing of a group that was unprotected stays pinned; after the last one nothing at all.
    async fn give_up(&self, name: &str) {
        let mut loaded = self.capture.lock().await;
        let last = self.handles().is_empty() && lock(&self.failed).is_empty() && lock(&self.returning).is_empty();
        let (capture, pins, name) = (loaded.clone(), self.paths.bpffs(), name.to_owned());
        if last {
            *loaded = None;
        }
        let give_up = move || match (capture, last) {
            (Some(capture), true) => capture.unpin(),
            (Some(capture), false) => {
                capture.give_up(&name);
                Ok(())
            }
            (None, true) => varve_bpf::unpin_all(&pins).map(drop),
            // Given up when the pins are opened.
            (None, false) => Ok(()),
        };
        if let Ok(Err(error)) = tokio::task::spawn_blocking(give_up).await {
            tracing::error!("pins are left behind, stop the agent and run 'varve-agent --unpin-all': {error}");
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
        groups.extend(lock(&self.failed).values().map(|failed| (failed.status(), false)));
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

    /// Looks after what needs looking after, for ever.
    pub async fn tick(self: Arc<Self>) {
        for tick in 1u64.. {
            tokio::time::sleep(TICK).await;
            if let Some(capture) = self.capture.lock().await.clone() {
                // It may wait for the kernel. What it makes dirty is found by the groups' sync threads.
                match tokio::task::spawn_blocking(move || capture.tend()).await {
                    Ok(Ok(0)) | Err(_) => {}
                    Ok(Ok(regions)) => {
                        tracing::warn!(regions, "completions went unseen, or do not come: their regions are sent again")
                    }
                    Ok(Err(error)) => tracing::error!(%error, "cannot look after writes in flight"),
                }
            }
            self.restart_ended().await;
            self.look_for_calls().await;
            self.look_at_volumes(tick.is_multiple_of(LOOK_TICKS)).await;
            if tick.is_multiple_of(RETRY_TICKS) {
                self.try_failed_again().await;
            }
        }
    }

    /// Tries once more to start what could not be started.
    async fn try_failed_again(self: &Arc<Self>) {
        let again: Vec<GroupFile> = lock(&self.failed).values().map(|failed| failed.file.clone()).collect();
        for file in again.into_iter().filter(|file| !file.volumes.is_empty()) {
            let _changes = self.changes.lock().await;
            // While we waited for our turn it may have been unprotected, protected anew with other volumes, or called home.
            let still = lock(&self.failed).get(&file.name).is_some_and(|failed| failed.file == file);
            if still && !self.is_returning(&file.name) && self.group(&file.name).is_err() {
                self.start_or_remember_locked(file).await;
            }
        }
    }

    /// A group whose worker ended by itself has a defect, and nobody looks after its ring: it begins anew.
    async fn restart_ended(self: &Arc<Self>) {
        for handle in self.handles().into_iter().filter(|handle| handle.has_ended()) {
            tracing::error!(group = %handle.file.name, "its worker failed; the group begins anew");
            self.begin_anew(&handle, GapReason::MissedEvents).await;
        }
    }

    /// A volume that grew has a part that is not captured: its group is started over itself, and goes on in the new size.
    /// One that shrank or was exchanged may not be called protected: its group is ended and started again, which says
    /// what is wrong.
    async fn look_at_volumes(self: &Arc<Self>, all: bool) {
        for handle in self.handles().into_iter().filter(|handle| all || handle.shared.facts().outgrown) {
            // A volume is made read-only some time before all are held: from the begin of the quiet on that is our doing. It
            // may begin or end while we look.
            let quiet = || self.authorities.quiet(&handle.file.name).is_some();
            let was_quiet = quiet();
            let mut grew = handle.shared.facts().outgrown;
            let changed = handle.file.volumes.iter().zip(&handle.specs).any(|(path, spec)| {
                // One that is not there is not written, and its link may come back.
                BlockFacts::of(path).is_ok_and(|mut facts| {
                    facts.read_only &= !(was_quiet || quiet());
                    let now = volume::spec(&facts);
                    grew |= now.bytes > spec.bytes;
                    let same = varve_bpf::VolumeSpec { bytes: now.bytes.max(spec.bytes), ..spec.clone() } == now;
                    !same || volume::refuse_uncapturable(path, &facts).is_err()
                })
            });
            let changed = changed || !handle.disks_are_the_same();
            if grew && !changed && self.authorities.is_held(&handle.file.name) {
                // Nobody writes to what is new either; it is followed when writing is allowed again.
                continue;
            }
            if grew && !changed {
                self.grow(&handle).await;
            } else if changed {
                tracing::error!(group = %handle.file.name, "a volume changed its size or its place; the group begins anew");
                self.begin_anew(&handle, GapReason::VolumeChanged).await;
            }
        }
    }

    /// Starts a group over itself in its volumes' new sizes. Capture goes on.
    async fn grow(self: &Arc<Self>, handle: &Arc<GroupHandle>) {
        let locked = self.changes.lock().await;
        let name = &handle.file.name;
        let ours = || self.groups.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        if !ours().is_some_and(|there| Arc::ptr_eq(&there, handle)) {
            return;
        }
        // Before anything else: what is written from here on is behind a gap.
        handle.volume_changed().await;
        if !handle.leave().await {
            drop(locked);
            tracing::error!(group = %name, "a volume grew and its capture cannot be gone on with; the group begins anew");
            return self.begin_anew(handle, GapReason::VolumeChanged).await;
        }
        let mut file = handle.file.clone();
        file.synced_once |= handle.shared.facts().ever_consistent;
        self.start_or_remember_locked(file).await;
        if ours().is_some_and(|there| Arc::ptr_eq(&there, handle)) {
            // It could not be started.
            self.groups.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        }
    }

    /// Ends a group and starts it again; if that cannot be, it is remembered with the reason.
    async fn begin_anew(self: &Arc<Self>, handle: &Arc<GroupHandle>, reason: GapReason) {
        let _changes = self.changes.lock().await;
        let name = &handle.file.name;
        let groups = || self.groups.write().unwrap_or_else(PoisonError::into_inner);
        // It may have been unprotected meanwhile, or be another one of the same name.
        if !groups().get(name).is_some_and(|there| Arc::ptr_eq(there, handle)) {
            return;
        }
        let mut file = handle.file.clone();
        file.synced_once |= handle.shared.facts().ever_consistent;
        // From now on nobody may read that it is protected, however long its end takes.
        if reason == GapReason::VolumeChanged {
            handle.volume_changed().await;
        }
        if handle.shared.facts().gap != Some(reason) {
            handle.shared.gap_opened(reason);
        }
        handle.end().await;
        groups().remove(name);
        self.start_or_remember_locked(file).await;
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

fn refuse_exchanged(file: &GroupFile, volumes: &[Checked]) -> Result<(), Problem> {
    let next = format!(
        "if it was exchanged, 'varve unprotect {0}' and protect it again: then '{0}' gets the content of the new one",
        file.name
    );
    volumes.iter().zip(&file.identities).try_for_each(|(volume, known)| volume::refuse_another(volume, known, &next))
}

/// What identifies the volumes, if nobody asked yet; whether there was something. A disk that had nothing then is not told from
/// the one that stands under its name now.
pub fn remember_identities(file: &mut GroupFile, volumes: &[Checked]) -> bool {
    if file.identities.len() == volumes.len() {
        return false;
    }
    file.identities = volumes.iter().map(|volume| volume.identity.clone()).collect();
    true
}

/// Takes over what is pinned, or loads anew.
fn open_capture(options: &CaptureOptions, pins: &Path, store: &Store) -> Result<Capture, CaptureError> {
    let capture = Capture::open(options, pins)?;
    match capture.origin() {
        Origin::New | Origin::TakenOver { same_programs: true, .. } => {}
        origin @ Origin::TakenOver { .. } => tracing::info!("capture is {origin}; nothing is lost by that"),
        Origin::Replaced(why) => tracing::warn!("the pinned capture was replaced, all volumes are compared: {why}"),
        Origin::Unpinned(why) => tracing::warn!("capture is not pinned, it ends with the agent: {why}"),
    }
    // An agent before may have been killed between the removal of a group's file and the end of its capture. If the
    // files cannot be read now, nothing is given up.
    if let Ok(files) = store.load() {
        for name in capture.kept().iter().filter(|name| !files.iter().any(|(file, _)| file == *name)) {
            tracing::info!(group = %name, "it is not protected any more, its capture ends");
            capture.give_up(name);
        }
    }
    Ok(capture)
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
mod tests {
    use super::*;

    /// A group whose file is damaged is not protected any more, and nobody may have to find that out in a log.
    #[tokio::test]
    async fn a_damaged_file_is_seen_in_the_status_and_can_be_let_go_of() {
        let dir = tempfile::tempdir().expect("temp dir");
        let paths = Paths::new(dir.path().to_owned());
        let groups = paths.agent_state().join("groups");
        std::fs::create_dir_all(&groups).expect("made");
        std::fs::write(groups.join("db.json"), b"{").expect("written");
        let daemon = Daemon::open(paths).expect("opens");
        daemon.start_groups().await.expect("starts");
        let status = daemon.status(Some("db")).expect("it is there");
        let reason = status.groups[0].reason.clone().expect("a reason");
        assert!(reason.contains("not protected") && reason.contains("db.json"), "{reason}");
        assert!(!status.groups[0].data.is_consistent());
        daemon.unprotect("db").await.expect("let go of");
        assert!(daemon.status(Some("db")).is_err() && !groups.join("db.json").exists());
    }

    /// Whether events were skipped is looked at although a group takes its time to start, or to end.
    #[tokio::test]
    async fn skipped_events_are_seen_while_the_daemon_is_busy() {
        let dir = tempfile::tempdir().expect("temp dir");
        let daemon = Daemon::open(Paths::new(dir.path().to_owned())).expect("opens");
        let tick = tokio::spawn(daemon.clone().tick());
        let (_capture, _changes) = (daemon.capture.lock().await, daemon.changes.lock().await);
        let skipped = Arc::new(AtomicU64::new(0));
        let counter = skipped.clone();
        daemon.misses.watch(move || Some(Ok(counter.load(Ordering::SeqCst))));
        skipped.store(5, Ordering::SeqCst);
        let seen = async {
            while daemon.misses.count() != 5 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), seen).await.expect("seen");
        tick.abort();
    }

    /// The group was called home. Its return is stopped, and the tick finds it called once more before it is gone.
    #[tokio::test]
    async fn what_is_unprotected_does_not_begin_to_come_home_again() {
        let dir = tempfile::tempdir().expect("temp dir");
        let daemon = Daemon::open(Paths::new(dir.path().to_owned())).expect("opens");
        let file = GroupFile::new("db".into(), vec!["/dev/none".into()], vec![1 << 20], Vec::new());
        daemon.store.save(&file).expect("saved");
        let first = daemon.remember_return(file.clone());
        let changes = daemon.changes.lock().await;
        let (unprotecting, name) = (daemon.clone(), file.name.clone());
        let unprotect = tokio::spawn(async move { unprotecting.unprotect(&name).await });
        while daemon.is_returning("db") {
            tokio::task::yield_now().await;
        }
        let again = daemon.remember_return(file);
        assert!(!Arc::ptr_eq(&first, &again));
        drop(changes);
        unprotect.await.expect("ends").expect("unprotected");
        assert!(!daemon.is_returning("db"), "its volumes would be overwritten");
        assert!(daemon.store.load().expect("list").is_empty());
    }

    /// What the tick found in the list of failed groups is not what is there when its turn to change something comes: `change` came
    /// before it.
    async fn failed_and_changed<F: Future<Output = ()>>(
        change: impl FnOnce(Arc<Daemon>) -> F,
    ) -> (tempfile::TempDir, Arc<Daemon>) {
        let dir = tempfile::tempdir().expect("temp dir");
        let daemon = Daemon::open(Paths::new(dir.path().to_owned())).expect("opens");
        let file = GroupFile::new("db".into(), vec!["/dev/none".into()], vec![1 << 20], Vec::new());
        daemon.store.save(&file).expect("saved");
        daemon.start_or_remember(file).await;
        let changes = daemon.changes.lock().await;
        // Each waits for its turn when the other one has begun to wait.
        let mut changed = std::pin::pin!(change(daemon.clone()));
        let ticking = daemon.clone();
        let mut tried = std::pin::pin!(ticking.try_failed_again());
        assert!(!begins(&mut changed).await && !begins(&mut tried).await, "both wait");
        drop(changes);
        changed.await;
        tried.await;
        (dir, daemon)
    }

    /// Has it go as far as it can; whether that was to its end.
    async fn begins<F: Future + Unpin>(future: &mut F) -> bool {
        std::future::poll_fn(|context| {
            std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(context).is_ready())
        })
        .await
    }

    #[tokio::test]
    async fn what_was_unprotected_is_not_started_by_a_tick_that_waited() {
        let unprotect = async |daemon: Arc<Daemon>| daemon.unprotect("db").await.expect("unprotected");
        let (_dir, daemon) = failed_and_changed(unprotect).await;
        assert!(daemon.status(Some("db")).is_err(), "it would be captured and sent again");
    }

    #[tokio::test]
    async fn what_has_other_volumes_now_is_not_started_in_its_old_ones() {
        let change = async |daemon: Arc<Daemon>| {
            let _changes = daemon.changes.lock().await;
            let file = GroupFile::new("db".into(), vec!["/dev/other".into()], vec![1 << 20], Vec::new());
            lock(&daemon.failed).insert("db".into(), Failed { file, problem: no_group("db") });
        };
        let (_dir, daemon) = failed_and_changed(change).await;
        let status = daemon.status(Some("db")).expect("it is there");
        assert_eq!(status.groups[0].volumes[0].path, "/dev/other");
    }

    #[tokio::test]
    async fn what_was_called_home_is_not_started_by_a_tick_that_waited() {
        let called = async |daemon: Arc<Daemon>| {
            let _changes = daemon.changes.lock().await;
            let file = lock(&daemon.failed)["db"].file.clone();
            lock(&daemon.failed).insert("db".into(), Failed { file: file.clone(), problem: no_group("db") });
            daemon.remember_return(file);
        };
        let (_dir, daemon) = failed_and_changed(called).await;
        assert_eq!(lock(&daemon.failed)["db"].problem, no_group("db"), "it was tried");
    }
}
