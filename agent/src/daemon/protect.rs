//! Groups that are made and let go by command.

use super::*;

impl Daemon {
    /// Checks volumes for a group that this host does not have.
    pub fn check_protect_volumes(&self, group: &str, volumes: &[String]) -> Result<Vec<Checked>, Problem> {
        self.check_protect(group, volumes, &[])?;
        self.check_volumes(group, volumes)
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
    pub(super) async fn give_up(&self, name: &str) {
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
}
