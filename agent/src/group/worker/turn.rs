//! What every turn looks at, with or without a session: the clock, the ring, the events of the capture, the end of a gap.

use super::*;

impl Worker {
    /// Cheap work of every turn, with or without a session (`sent`: how far it got): the clock, canaries, the ring, then
    /// the events of the capture. In this order: a write that followed a dropped one is seen in the ring only together
    /// with the drop, so nothing behind the drop is sent before the gap is known.
    pub(super) fn every_turn(&mut self, state: &mut State, sent: Option<u64>) {
        let now = Instant::now();
        let set_back = state.offset.follow(clock::wall_ns(), clock::boot_ns());
        self.source.set_time_offset(state.offset.ns());
        self.shared.set_time_offset(state.offset.ns());
        if let Some(ns) = set_back {
            self.clock_set_back(ns);
        }
        if now.duration_since(state.last_canary) >= CANARY_EVERY {
            state.last_canary = now;
            // Whose stream nobody wants needs no sign of life, which would count as something that only this host has.
            let fenced = sent.is_none() && self.shared.facts().fenced.is_some();
            if !fenced {
                // A full ring has no room for a canary; that it is full is told by the counters below.
                let _ = self.source.mark(RecordKind::Canary, &[]);
            }
        }
        self.walk(state);
        if let Some(sent) = sent {
            // What the ring does not have any more is in the journal.
            self.sync.shared().hold(sent < self.source.stream().consumer());
        }
        self.look_for_trouble(state, sent);
        self.note_unknown();
        if state.closing.is_some_and(|position| self.shared.durable.load(Ordering::Acquire) > position) {
            self.gap_is_closed(state);
        }
        self.keep(state);
        self.offer(state, sent);
        self.answer_bookmarks(state);
    }

    /// This host's clock was ahead, and what is in the stream up to here is dated too late.
    fn clock_set_back(&self, ns: u64) {
        let seconds = ns as f64 / 1e9;
        tracing::warn!(
            group = %self.shared.name,
            seconds,
            "this host's clock was set back: points from before have times that come only later"
        );
        self.shared.clock_set_back(self.source.stream().producer(), ns);
    }

    /// The receiver has the `GapEnd`: only now may anybody be told.
    pub(super) fn gap_is_closed(&self, state: &mut State) {
        (state.closing, state.onward) = (None, None);
        state.known_there = true;
        self.shared.gap_closed();
        (self.on_consistent)();
        tracing::info!(group = %self.shared.name, "protected");
    }

    /// Whatever put something outside the stream opens a gap; its regions are dirty already. Whether there was something.
    pub(super) fn look_for_trouble(&mut self, state: &mut State, sent: Option<u64>) -> bool {
        let troubles = self.source.troubles();
        let looked_ns = self.misses.looked_ns();
        let misses = self.misses.count();
        if misses == state.misses {
            Self::looked(state, looked_ns);
        }
        if troubles == state.troubles && misses == state.misses {
            return false;
        }
        let before = std::mem::replace(&mut state.troubles, troubles);
        let missed = std::mem::replace(&mut state.misses, misses) < misses;
        let unknown_place =
            missed || troubles.passthrough > before.passthrough || troubles.late_unknown > before.late_unknown;
        if unknown_place {
            set_all_dirty(&*self.source);
        }
        let reason = if missed {
            GapReason::MissedEvents
        } else if troubles.passthrough > before.passthrough {
            GapReason::Passthrough
        } else if troubles.resized > before.resized {
            GapReason::VolumeChanged
        } else if troubles.dropped > before.dropped {
            GapReason::RingFull
        } else if troubles.unreadable > before.unreadable || troubles.untracked > before.untracked {
            GapReason::UnreadablePage
        } else if troubles.straddling > before.straddling {
            GapReason::StraddlingWrite
        } else if troubles.failed > before.failed {
            GapReason::FailedWrite
        } else {
            GapReason::LateWrite
        };
        // What was sent or spilled was seen before by a look that found nothing. Of skipped events one hears later than they happen,
        // but not later than the next look.
        let here = sent.unwrap_or(0).max(self.source.stream().consumer());
        let here = if missed { here.max(state.looked_to) } else { here };
        let first_drop = self.source.take_first_drop();
        // Only of a write that found no room or another size is the place in the stream known, so it counts only if that
        // was all. The look before may have taken it, together with that of the gap that is open since.
        let Troubles { dropped, unreadable, resized, .. } = before;
        let drops_alone = Troubles { dropped, unreadable, resized, ..troubles } == before;
        let place = first_drop.or(state.gap.open().map(|_| state.gap.parts().1));
        let position = place.filter(|_| drops_alone && !missed).unwrap_or(here).max(here);
        if troubles.resized > before.resized {
            self.outgrown(state);
        }
        if missed {
            // Which side of them it happened on is not known, and the gap may begin behind them.
            for pending in state.bookmarks.drain(..) {
                // Whoever asked may be gone.
                let _ = pending.answer.send(Err(receive::no_bookmark(&self.shared.name, &pending.name, reason)));
            }
        }
        self.gap_begins(state, reason, position);
        self.sync.shared().nudge();
        true
    }

    /// A look for skipped events that began then found no new one.
    fn looked(state: &mut State, began_ns: u64) {
        let (place, walked_ns) = state.to_look;
        if began_ns > walked_ns {
            state.looked_to = state.looked_to.max(place);
            state.to_look = (state.walked, clock::boot_ns());
        }
    }

    /// Looks for skipped events now, if something was walked since the last look that counts. A write that the kernel skipped
    /// is not in the stream and nothing in the stream tells: so what is behind it goes out only after a look that began later, and
    /// no point behind it is ever called good. If the look fails nothing goes out; whoever looks says so.
    pub(super) fn look_ahead(&mut self, state: &mut State, sent: Option<u64>) {
        if state.looked_to >= state.walked {
            return;
        }
        state.to_look = (state.walked, clock::boot_ns());
        let _ = self.misses.look_since(state.to_look.1);
        self.look_for_trouble(state, sent);
    }

    /// Where nobody has looked whether events were skipped, nobody may be told that all is well.
    fn note_unknown(&self) {
        let unknown = self.misses.are_unknown();
        let before = std::mem::replace(&mut self.shared.facts().misses_unknown, unknown);
        if unknown && !before {
            tracing::warn!(group = %self.shared.name, "{MISSES_UNKNOWN}");
        }
    }

    /// A volume has another size than it is captured in: what is written to its new part is in no bitmap, so this worker
    /// ends no gap any more. The daemon ends it and starts one that captures all of it, or says why that cannot be.
    pub(super) fn outgrown(&self, state: &mut State) {
        state.outgrown = true;
        self.shared.facts().outgrown = true;
    }

    /// Something that the stream does not hold is dirty from `position` on.
    pub(super) fn gap_begins(&self, state: &mut State, reason: GapReason, position: u64) {
        if state.gap.begin(reason, position) {
            state.closing = None;
            tracing::warn!(group = %self.shared.name, position, "a gap begins: {}", reason.explain());
            self.shared.gap_opened(reason);
        }
        self.update_sync_facts();
    }

    pub(super) fn update_sync_facts(&self) {
        let left = dirty_regions(&*self.source) + self.sync.shared().in_hand();
        let mut facts = self.shared.facts();
        facts.sync_left = left;
        facts.sync_total = facts.sync_total.max(left);
    }

    /// Looks at the records that were committed since the last walk.
    pub(super) fn walk(&mut self, state: &mut State) {
        let stream = self.source.stream();
        let mut tracker = lock(&self.sync.shared().tracker);
        let (noting, bookmarks) = (!tracker.is_empty(), &mut state.bookmarks);
        let until = stream.producer();
        if !noting && bookmarks.is_empty() {
            // Nobody wants to know what the records say, only where they end; frames are cut later.
            state.walked = walk(stream, state.walked, until, TURN_BYTES, |_| {});
            return;
        }
        state.walked = walk(stream, state.walked, until, TURN_BYTES, |Met::Record { position, end, header }| {
            match RecordKind::from_number(header.kind) {
                Some(kind) if kind.changes_data() => {
                    if let Some(extent) = Extent::at(header.offset.get(), header.length.get()) {
                        tracker.note(position, header.volume.get(), extent);
                    }
                }
                Some(RecordKind::Bookmark) => {
                    let mut name = vec![0; header.payload.get() as usize];
                    stream.copy_out(position + 8 + size_of_val(&header) as u64, &mut name);
                    let waiting = bookmarks.iter_mut().find(|p| p.met.is_none() && p.name.as_bytes() == name);
                    if let Some(pending) = waiting {
                        pending.met = Some((end, header.time_ns.get()));
                    }
                }
                _ => {}
            }
        });
    }

    pub(super) fn answer_bookmarks(&self, state: &mut State) {
        let durable = self.shared.durable.load(Ordering::Acquire);
        let mut index = 0;
        while index < state.bookmarks.len() {
            let pending = &state.bookmarks[index];
            let is_durable = pending.met.is_some_and(|(position, _)| position <= durable);
            if !is_durable && pending.since.elapsed() < BOOKMARK_WAIT {
                index += 1;
                continue;
            }
            let pending = state.bookmarks.swap_remove(index);
            if let Some(reason) = state.gap.open().filter(|_| pending.met.is_some_and(|(end, _)| state.gap.covers(end)))
            {
                // Whoever asked may be gone.
                let _ = pending.answer.send(Err(receive::no_bookmark(&self.shared.name, &pending.name, reason)));
                continue;
            }
            let answer = pending.met.map(|(position, time)| (position, time, is_durable)).ok_or_else(|| {
                Problem::failed(
                    format!("bookmark '{}' was not seen in the stream", pending.name),
                    "the stream does not advance",
                    format!("look at 'varve status {}'", self.shared.name),
                )
            });
            // Whoever asked may be gone.
            let _ = pending.answer.send(answer);
        }
    }

    /// Ends the gap if nothing is missing any more.
    pub(super) fn finish_gap(&mut self, state: &mut State, session: &Session) {
        if state.gap.open().is_none() || state.outgrown || self.misses.are_unknown() {
            return;
        }
        // Asked first, whatever is left: what came from before capture can make regions dirty only until this says true, and
        // nobody else asks. If it waited for nothing to be left, each could wait for the other.
        if !self.source.settled() {
            return;
        }
        if !session.regions.is_empty() || !self.sync.shared().nothing_left(&*self.source) {
            return;
        }
        // Taken after the bitmaps were seen clean: a write that is dropped later stands behind this position.
        let position = self.source.stream().producer();
        // What the kernel skipped while regions were read leaves neither a bit nor a record.
        let _ = self.misses.look_since(clock::boot_ns());
        // Not all of it leaves a dirty bit: what is written to the new part of a volume that grew is in no bitmap.
        if self.look_for_trouble(state, Some(session.sent)) || !self.sync.shared().nothing_left(&*self.source) {
            return;
        }
        state.gap.complete(position);
        tracing::debug!(group = %self.shared.name, position, "the replica is complete");
    }

    /// A region that stays dirty outside a gap opens one: whoever looks must not read for ever that all is well.
    pub(super) fn look_for_left(&self, state: &mut State, session: &Session) {
        let now = Instant::now();
        // What waits for the receiver is not stuck, only late, which is told as such.
        if now.duration_since(state.last_left_look) < LEFT_LOOK_EVERY || session.regions.is_sending() {
            return;
        }
        state.last_left_look = now;
        let held = session.sent < self.source.stream().consumer();
        if held || state.gap.open().is_some() || self.sync.shared().nothing_left(&*self.source) {
            state.left_looks = 0;
            return;
        }
        state.left_looks += 1;
        if state.left_looks > LEFT_LOOKS_MAX {
            self.gap_begins(state, GapReason::LateWrite, session.sent);
        }
    }
}
