//! What the receiver wants before it takes the group over; and whether it is to be believed that it has not.

use super::*;
use varve_common::control::show_time;

impl Worker {
    pub(super) fn order(&self, order: Order) {
        if let Err(error) = self.orders.try_send(order) {
            tracing::error!(group = %self.shared.name, "the daemon does not take an order: {error}");
        }
    }

    /// Everything that was captured up to now stands before a mark that is set now.
    fn barrier(&self) -> u64 {
        // A full ring takes no mark. Then the position is that of the newest write.
        let _ = self.source.mark(RecordKind::Canary, &[]);
        self.source.stream().producer()
    }

    pub(super) fn drained(&self, state: &mut State, id: u64) {
        tracing::warn!(group = %self.shared.name, "the receiver is about to take it over: what was captured is sent");
        state.replies.push(AskReply::Drained { id, position: self.barrier() });
    }

    pub(super) fn begin_quiet(&self, state: &mut State, id: u64, limit: Duration) {
        if let Some(reason) = state.gap.open() {
            let (text, next) = (reason.explain().to_owned(), "wait until it is protected".to_owned());
            return state.replies.push(AskReply::NotQuiesced { id, text, next });
        }
        if self.misses.are_unknown() {
            let (text, next) = (MISSES_UNKNOWN.to_owned(), "wait until it is protected".to_owned());
            return state.replies.push(AskReply::NotQuiesced { id, text, next });
        }
        tracing::info!(group = %self.shared.name, "it is to be made quiet for a planned switch-over");
        state.quiescing = Some(id);
        self.order(Order::Quiesce(self.shared.name.clone(), id, limit));
    }

    /// It is not taken over. What is asked for under another number stays asked for.
    pub(super) fn end_quiet(&self, state: &mut State, id: u64) {
        tracing::info!(group = %self.shared.name, "the planned switch-over was given up");
        state.quiescing.take_if(|wanted| *wanted == id);
        self.order(Order::Resume(self.shared.name.clone(), id, "refused"));
    }

    /// Nobody can write any more: what is in the stream now is all that there will be.
    pub(super) fn quiet(&mut self, state: &mut State, id: u64, outcome: Result<Quiet, Problem>) {
        if state.quiescing != Some(id) {
            // Whoever wanted it has gone, and nobody heard that it was done.
            return self.order(Order::Resume(self.shared.name.clone(), id, "refused"));
        }
        let reply = match outcome {
            Ok(Quiet { read_only, hook }) => {
                // Of a write that the kernel skipped one hears only by a look that begins after it; if it fails, whoever looks
                // says so. A gap's mark goes before the answer.
                let _ = self.misses.look();
                self.look_for_trouble(state, None);
                let hook_ms = hook.map(|hook| hook.as_millis() as u64);
                AskReply::Quiesced { id, position: self.barrier(), read_only, hook_ms }
            }
            Err(problem) => {
                state.quiescing = None;
                AskReply::NotQuiesced { id, text: problem.why, next: problem.next }
            }
        };
        state.replies.push(reply);
    }

    pub(super) async fn send_replies(&mut self, state: &mut State, session: &mut Session) -> Result<(), Ended> {
        while let Some(reply) = state.replies.pop() {
            if let AskReply::Quiesced { id, .. } = reply {
                // From here on the receiver may take the group over without another word.
                state.quiescing.take_if(|wanted| *wanted == id);
            }
            self.push_control(state, session, FrameKind::AskReply, messages::encode(&reply)).await?;
        }
        Ok(())
    }

    /// What was asked in a session that is over is not wanted any more. If the receiver was told that the group is quiet, it
    /// stays so until the receiver says what became of it.
    pub(super) fn quiet_session_ended(&self, state: &mut State) {
        state.replies.clear();
        if let Some(id) = state.quiescing.take() {
            self.order(Order::Resume(self.shared.name.clone(), id, "refused"));
        }
    }

    /// Remembers that this host may not write.
    pub(super) fn note_refused(&self, refused: &Refused) {
        if refused.reason != RefusedReason::Epoch {
            return;
        }
        let mut facts = self.shared.facts();
        let before = facts.fenced.take();
        // A receiver that contradicts itself is not believed more when it does so again.
        let epoch = before.as_ref().map_or(facts.epoch, |before| before.epoch);
        let since = before.map_or_else(|| show_time(clock::wall_ns()), |before| before.since);
        let fence = Fence { epoch, since, text: refused.text.clone(), next: refused.next.clone() };
        facts.fenced = Some(fence.clone());
        drop(facts);
        self.order(Order::Fenced(self.shared.name.clone(), fence));
    }

    /// A receiver that has refused this host because the group was taken over, and agrees now under the epoch of before, has
    /// lost its state, or has an older one: it does not know what happened, and this host must not go on as if nothing had.
    pub(super) fn believe(&self, welcome: &Welcome) -> Result<(), Ended> {
        let mut facts = self.shared.facts();
        if let Some(fence) = facts.fenced.as_ref().filter(|fence| welcome.epoch <= fence.epoch) {
            let name = &self.shared.name;
            let text = format!(
                "who is right is not known: at {} the receiver said that this host may not write any more, now it agrees under \
                 epoch {}: it has lost its state, or has an old one",
                fence.since, welcome.epoch
            );
            let next = format!(
                "nobody knows here who is right: make sure that '{name}' runs nowhere else, then 'varve unprotect {name}' here \
                 and protect it again"
            );
            let fence = Fence { text: text.clone(), next: next.clone(), ..fence.clone() };
            facts.fenced = Some(fence.clone());
            drop(facts);
            self.order(Order::Fenced(name.clone(), fence));
            return Err(Ended::Refused(Refused { reason: RefusedReason::Owner, text, next, retry: false }));
        }
        let was = facts.fenced.take().is_some() || facts.quiet.is_some();
        drop(facts);
        if was {
            self.order(Order::Welcomed(self.shared.name.clone()));
        }
        Ok(())
    }
}
