//! How groups begin: at the start, when they are protected, and after something kept them from it.

use super::*;

impl Daemon {
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
    pub(super) async fn start_or_remember_locked(self: &Arc<Self>, mut file: GroupFile) {
        let name = file.name.clone();
        let outcome = self.start_group(&file).await;
        if outcome.is_err() && !file.compare && may_differ_unseen(&file) {
            // Before it has its size again, or is written unseen and then is as it was: it would be gone on with.
            file.compare = true;
            if let Err(problem) = self.store.save(&file) {
                tracing::error!(group = %name, "that all of it must be compared is known until the agent ends: {problem}");
            }
        }
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
        if file.compare {
            let (capture, name) = (self.capture(&volumes[0]).await?, file.name.clone());
            // A panic there was reported by the hook.
            let _ = tokio::task::spawn_blocking(move || capture.give_up(&name)).await;
            drop(self.store.take_seal(&file.name));
            tracing::warn!(group = %file.name, "a volume was not what it is now: a new ring begins, all is compared");
            file.compare = false;
            self.store.save(&file)?;
        }
        self.run_group(file, &volumes).await
    }

    pub(super) async fn run_group(self: &Arc<Self>, file: GroupFile, volumes: &[Checked]) -> Result<(), Problem> {
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

    /// The capture programs, loaded when the first group needs them.
    pub(super) async fn capture(&self, probe: &Checked) -> Result<Arc<Capture>, Problem> {
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

    pub(super) fn check_volumes(&self, group: &str, paths: &[String]) -> Result<Vec<Checked>, Problem> {
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
}

/// Whether a volume that is refused now may have other content when it is taken again, and no record says so. One without a size is
/// not attached yet: what it is then is looked at then.
fn may_differ_unseen(file: &GroupFile) -> bool {
    file.volumes.iter().zip(&file.bytes).any(|(path, bytes)| {
        BlockFacts::of(path).is_ok_and(|facts| {
            let shrank = facts.bytes > 0 && volume::spec(&facts).bytes < *bytes;
            shrank || volume::is_written_unseen(&facts)
        })
    })
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
