//! What comes in: the receiver's answers, regions that were read, commands; and the running verify.

use super::*;

impl Worker {
    pub(super) fn command(&mut self, state: &mut State, command: Command, streaming: bool) {
        match command {
            Command::Bookmark(name, answer) => {
                if state.bookmarks.len() >= BOOKMARKS_MAX {
                    let busy = Problem::failed("too many bookmarks at once", "others wait", "try again");
                    let _ = answer.send(Err(busy));
                    return;
                }
                // A point in a gap cannot be opened, so it gets no name. (Before the mark of the gap's end was sent, the
                // receiver counts what comes as part of the gap.)
                let gap = self.shared.facts().gap;
                if let Some(reason) = state.gap.open().or(gap.filter(|_| state.closing.is_none())) {
                    let _ = answer.send(Err(no_bookmark(&self.shared.name, &name, reason)));
                    return;
                }
                if self.misses.are_unknown() {
                    let _ = answer.send(Err(Problem::failed(
                        format!("bookmark '{name}' cannot be set now"),
                        MISSES_UNKNOWN,
                        "try again; if that lasts, look at the log of varve-agent",
                    )));
                    return;
                }
                if let Err(problem) = self.source.mark(RecordKind::Bookmark, name.as_bytes()) {
                    let _ = answer.send(Err(problem));
                    return;
                }
                state.bookmarks.push(Pending { name, met: None, since: Instant::now(), answer });
            }
            Command::Verify(repair, answer) => {
                let begun = if streaming {
                    state.verifies += 1;
                    self.begin_verify(state, state.verifies, repair)
                } else {
                    Err(session::not_streaming(&self.shared.name))
                };
                let _ = answer.send(begun);
            }
            Command::Quiet(id, outcome) => self.quiet(state, id, outcome),
            Command::VolumeChanged(answer) => {
                let position = self.source.stream().producer();
                self.outgrown(state);
                self.gap_begins(state, GapReason::VolumeChanged, position);
                // What is acknowledged after the gap's mark proves that the mark has landed.
                let _ = self.source.mark(RecordKind::Canary, &[]);
                let _ = answer.send(Ok(position));
            }
        }
    }

    pub(super) fn begin_verify(&mut self, state: &mut State, id: u64, repair: bool) -> Result<u64, Problem> {
        let name = &self.shared.name;
        if state.verify.as_ref().is_some_and(|run| !run.outcome().finished) {
            return Err(Problem::failed(
                format!("group '{name}' is being verified already"),
                "one verify at a time",
                "wait for it to end",
            ));
        }
        if let Some(reason) = state.gap.open() {
            return Err(Problem::refused(
                format!("group '{name}' cannot be verified now"),
                reason.explain(),
                format!("wait until 'varve status {name}' says protected"),
            ));
        }
        let sizes = self.shared.volumes.iter().map(|(_, bytes)| *bytes).collect();
        let run = VerifyRun::new(id, repair, sizes, self.source.stream().producer());
        self.shared.facts().verify = Some(run.outcome().clone());
        state.verify = Some(run);
        Ok(id)
    }

    pub(super) fn region_came(&mut self, state: &mut State, session: &mut Session, from_sync: FromSync) {
        match from_sync {
            FromSync::Read(read) if read.session == session.number => {
                if std::mem::replace(&mut state.read_failed, false) {
                    self.shared.facts().read_error = None;
                }
                session.regions.push(read);
            }
            FromSync::Read(read) => self.give_back(&read),
            FromSync::Busy { volume, region, session: number } => {
                if number == session.number
                    && let Some(run) = state.verify.as_mut()
                {
                    run.looked(volume, region, None, session.sent, Instant::now());
                }
            }
            FromSync::Failed { volume, error } => {
                let path = self.shared.volumes.get(usize::from(volume)).map_or("", |(path, _)| path);
                let text = format!("{path} cannot be read: {}", error.chain());
                tracing::error!(group = %self.shared.name, "{text}; tried again until it can");
                self.shared.facts().read_error = Some(text);
                state.read_failed = true;
            }
        }
    }

    /// Does what [`Regions`] says.
    pub(super) async fn region(&mut self, state: &mut State, session: &mut Session, next: Next) -> Result<(), Ended> {
        match next {
            Next::Probe(probe) => {
                if let Some(read) = session.regions.get(probe.id) {
                    // What is touched until the probe's position decides; later writes do not matter to it.
                    let overtaken = lock(&self.sync.shared().tracker).overtaken(probe.id);
                    let touched = touched_blocks(read.extent, &overtaken);
                    session.regions.set_touched(probe.id, touched);
                }
                Counters::add(&self.shared.counters.probes, 1);
                let body = messages::encode(&probe);
                self.push_control(state, session, FrameKind::Probe, body).await
            }
            Next::Image(id, blocks) => self.send_image(state, session, id, blocks).await,
            Next::Done(id) => {
                self.region_done(session, id);
                Ok(())
            }
            Next::Again(id) => {
                self.region_again(session, id);
                Ok(())
            }
            Next::Lacking(id) => {
                self.gap_begins(state, GapReason::LateWrite, session.sent);
                self.region_again(session, id);
                Ok(())
            }
        }
    }

    /// The region's bit first: at no moment does it look as if nothing were left.
    fn region_again(&self, session: &mut Session, id: u64) {
        if let Some(read) = session.regions.get(id) {
            self.source.track(usize::from(read.volume)).set_dirty(read.region);
        }
        self.region_done(session, id);
    }

    pub(super) fn region_done(&self, session: &mut Session, id: u64) {
        lock(&self.sync.shared().tracker).forget(id);
        let Some(read) = session.regions.remove(id) else { return };
        if read.purpose == Purpose::Send {
            self.source.track(usize::from(read.volume)).set_finished(read.region);
            self.sync.shared().done();
            self.sync.shared().nudge();
        }
    }

    pub(super) async fn event(&mut self, state: &mut State, session: &mut Session, event: Event) -> Result<(), Ended> {
        match event {
            Event::Probed(reply) => {
                // What counts is what the receiver was told: a gap that has just begun may have its mark still to come.
                let consistent = session.remote_consistent;
                let Some((purpose, next)) = session.regions.probed(reply.id, reply.differs, consistent) else {
                    return Ok(());
                };
                if purpose == Purpose::Compare
                    && let (Some(run), Some(read)) = (state.verify.as_mut(), session.regions.get(reply.id))
                {
                    let touched = session.regions.touched(reply.id);
                    run.looked(read.volume, read.region, Some((reply.differs, touched)), session.sent, Instant::now());
                }
                self.region(state, session, next).await
            }
            Event::ImageDone(done) => {
                self.region_done(session, done.id);
                Ok(())
            }
            Event::Ask(Ask::Verify { id, repair }) => {
                if let Err(problem) = self.begin_verify(state, id, repair) {
                    let refused = Verify { id, repair, finished: true, error: Some(problem.why), ..Verify::default() };
                    self.shared.facts().verify = Some(refused);
                }
                Ok(())
            }
            Event::Ask(Ask::CancelVerify { id }) => {
                if let Some(run) = state.verify.as_mut().filter(|run| run.outcome().id == id) {
                    run.fail("cancelled");
                }
                Ok(())
            }
            Event::Ask(Ask::Drain { id }) => {
                self.drained(state, id);
                Ok(())
            }
            Event::Ask(Ask::Quiesce { id, limit_ms }) => {
                self.begin_quiet(state, id, Duration::from_millis(limit_ms));
                Ok(())
            }
            Event::Ask(Ask::Resume { id }) => {
                self.end_quiet(state, id);
                Ok(())
            }
            Event::Ended(ended) => Err(ended),
        }
    }

    /// Orders the next looks of a running verify, and ends it.
    pub(super) fn drive_verify(&mut self, state: &mut State) {
        let Some(run) = state.verify.as_mut() else { return };
        if !run.outcome().finished {
            if let Some(reason) = state.gap.open() {
                run.fail(format!("a gap began meanwhile: {}", reason.explain()));
            }
            let order = run.order(Instant::now());
            if !order.is_empty() {
                self.sync.shared().compare(order);
            }
            self.shared.facts().verify = Some(run.outcome().clone());
            if !run.outcome().finished {
                return;
            }
        }
        let Some(run) = state.verify.take() else { return };
        let outcome = run.outcome().clone();
        tracing::info!(
            group = %self.shared.name,
            differing_bytes = outcome.differing_bytes,
            unverified_bytes = outcome.unverified_bytes,
            error = outcome.error,
            "verify ended"
        );
        if outcome.repair && outcome.error.is_none() && !run.differing_regions().is_empty() {
            for &(volume, region) in run.differing_regions() {
                self.source.track(usize::from(volume)).set_dirty(region);
            }
            // Points since the difference arose are wrong; since when is not known.
            if state.gap.begin(GapReason::Repair, 0) {
                state.closing = None;
                self.shared.gap_opened(GapReason::Repair);
            }
            self.update_sync_facts();
            self.sync.shared().nudge();
        }
        self.shared.facts().verify = Some(outcome);
    }
}

/// Why there is no bookmark.
pub(super) fn no_bookmark(group: &str, name: &str, reason: GapReason) -> Problem {
    Problem::refused(
        format!("bookmark '{name}' cannot be set now"),
        format!("what is written now cannot be recovered: {}", reason.explain()),
        format!("wait until 'varve status {group}' says protected"),
    )
}
