//! What needs looking after once a second: groups that did not start, that ended, whose volumes changed.

use super::*;

impl Daemon {
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
    pub(super) async fn try_failed_again(self: &Arc<Self>) {
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
        self.start_over(handle, file).await;
    }

    /// Starts a group whose worker has ended. Until it runs again, or is remembered with the reason, it stays in the list as it is:
    /// whoever asks meanwhile finds it. The caller holds `changes`.
    async fn start_over(self: &Arc<Self>, ended: &Arc<GroupHandle>, file: GroupFile) {
        let name = file.name.clone();
        self.start_or_remember_locked(file).await;
        let mut groups = self.groups.write().unwrap_or_else(PoisonError::into_inner);
        if groups.get(&name).is_some_and(|there| Arc::ptr_eq(there, ended)) {
            groups.remove(&name);
        }
    }

    /// Ends a group and starts it again; if that cannot be, it is remembered with the reason.
    async fn begin_anew(self: &Arc<Self>, handle: &Arc<GroupHandle>, reason: GapReason) {
        let _changes = self.changes.lock().await;
        let name = &handle.file.name;
        let groups = || self.groups.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        // It may have been unprotected meanwhile, or be another one of the same name.
        if !groups().is_some_and(|there| Arc::ptr_eq(&there, handle)) {
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
        self.start_over(handle, file).await;
    }
}
