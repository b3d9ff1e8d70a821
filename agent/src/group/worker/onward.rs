//! A ring that goes on where an earlier one ended, because nobody wrote in between: nothing is compared. Every step says no
//! rather than yes, and a no means that all is compared, as always with a new ring:
//!
//! 1. the seal that the stop left holds ([`Seal::holds_within`](crate::seal::Seal::holds_within)), asked when the ring had begun;
//! 2. the receiver stands where the earlier ring ended, with everything of its journal, and is not in a gap: it says so in a
//!    session under that ring's name ([`Worker::drain`]);
//! 3. capture has seen all since it began: nothing dropped, skipped or unreadable, and what was in flight then has completed;
//! 4. in the session in which the new ring begins the receiver still stands there, in no gap: nothing came since (a rollback, a
//!    takeover) but what this host said.
//!
//! Whoever is killed between two steps leaves no word of them: the next worker compares.

use super::*;
use crate::journal::Detached;

/// How long writes from before capture began may take to complete.
const SETTLE_LIMIT: Duration = Duration::from_secs(40);
/// Between two looks at it.
const SETTLE_LOOK: Duration = Duration::from_millis(50);

/// See the module's text.
pub(super) struct Onward {
    incarnation: Incarnation,
    end: u64,
    /// Where the new ring begins: from there on nothing was acknowledged.
    begin: u64,
    /// Step 2 is done, for the next session only.
    confirmed: bool,
}

impl Onward {
    fn is(&self, ring: Incarnation, position: u64) -> bool {
        (self.incarnation, self.end) == (ring, position)
    }
}

impl Worker {
    /// Step 1 was taken, or not: what came of it.
    pub(super) fn begin_onward(&mut self, state: &mut State) {
        match self.sealed.take() {
            Some(Ok((incarnation, end))) => {
                tracing::info!(group = %self.shared.name, "nobody wrote to its volumes since the agent stopped");
                state.onward =
                    Some(Onward { incarnation, end, begin: self.source.stream().consumer(), confirmed: false });
            }
            Some(Err(why)) => self.compare_all(state, &why),
            None => {}
        }
    }

    /// There is no proof.
    pub(super) fn compare_all(&self, state: &mut State, why: &str) {
        state.onward = None;
        tracing::info!(group = %self.shared.name, "all is compared, because {why}");
        self.shared.facts().origin.push_str(&format!("; all is compared, because {why}"));
    }

    /// What is to be asked of the receiver under an earlier ring's name: the journal of it, or only where it stands.
    pub(super) fn earlier(&self, state: &State) -> Option<Detached> {
        let detached = self.shared.journal().and_then(|journal| journal.detached());
        // Whatever was acknowledged of the new ring, the receiver knows it.
        let is_new = |onward: &&Onward| !state.known_there && self.source.stream().consumer() == onward.begin;
        let onward = state.onward.as_ref().filter(is_new);
        let nothing = |onward: &Onward| Detached {
            incarnation: onward.incarnation,
            start: onward.end,
            end: onward.end,
            gap: None,
        };
        detached.or_else(|| onward.map(nothing))
    }

    /// Step 2: the receiver stands at `position` of an earlier ring.
    pub(super) fn stands(&self, state: &mut State, ring: Incarnation, position: Option<u64>, consistent: bool) {
        let Some(onward) = &mut state.onward else { return };
        if consistent && position.is_some_and(|position| onward.is(ring, position)) {
            onward.confirmed = true;
        } else if state.went_on {
            // The new ring has begun there, which the next session tells.
            state.onward = None;
        } else {
            self.compare_all(state, "the receiver does not stand where the agent stopped");
        }
    }

    /// Waits for what was in flight when capture began.
    pub(super) async fn settle(&mut self, state: &mut State) {
        if state.onward.as_ref().is_none_or(|onward| !onward.confirmed) {
            return;
        }
        let source = self.source.clone();
        let settled = async move {
            while !source.settled() {
                tokio::time::sleep(SETTLE_LOOK).await;
            }
        };
        if let Some(Err(_)) = self.meanwhile(state, None, tokio::time::timeout(SETTLE_LIMIT, settled)).await {
            self.compare_all(state, "writes from before capture began may still be in flight");
        }
    }

    /// Steps 3 and 4.
    pub(super) fn goes_on(&mut self, state: &mut State, consistent: bool) -> bool {
        let Some(begin) = state.onward.as_ref().filter(|onward| onward.confirmed).map(|onward| onward.begin) else {
            return false;
        };
        // What the kernel skipped until now is known only after a look that begins now.
        let looked = matches!(self.misses.look_since(clock::boot_ns()), Some(Ok(())));
        self.look_for_trouble(state, None);
        let seen = looked && self.misses.count() == self.misses_before && self.source.troubles() == Troubles::default();
        let whole = seen && !state.read_failed && !state.journal_lost && !state.outgrown && self.source.settled();
        let first = !state.known_there && self.source.stream().consumer() == begin;
        let why = match () {
            () if !first => "the receiver has lost what it had of the new ring",
            () if !consistent => "the receiver's replica was changed",
            () if !whole || !self.sync.shared().nothing_left(&*self.source) => {
                "capture has not seen all since it began"
            }
            () => return true,
        };
        self.compare_all(state, why);
        false
    }

    /// The new ring begins, and its gap ends where it began.
    pub(super) async fn go_on(&mut self, state: &mut State, session: &mut Session) -> Result<(), Ended> {
        let position = self.shared.forget_journal();
        state.gap.complete(position);
        state.closing = None;
        if let Some(onward) = &mut state.onward {
            onward.confirmed = false;
        }
        state.went_on = true;
        (session.sent, session.remote_consistent) = (position, false);
        self.shared
            .facts()
            .origin
            .push_str("; nothing is compared: nobody wrote to its volumes since the agent stopped");
        tracing::info!(group = %self.shared.name, "the new ring goes on where the last one ended, nothing is compared");
        self.keep(state);
        self.send_mark(state, session, MarkKind::Begin, Some(GapReason::NewRing)).await
    }

    /// Where the stream ends, if the receiver has all of it or will have: what a seal may be pressed for.
    pub(super) fn rest(&self, state: &State) -> Option<Rest> {
        let end = self.source.stream().producer();
        let spilled = self.shared.journal().and_then(|journal| journal.range()).is_some_and(|range| range.1 == end);
        let kept = spilled || self.shared.durable.load(Ordering::Acquire) == end;
        let gap = state.gap.open().is_some() || state.closing.is_some() || self.shared.facts().gap.is_some();
        let known = state.known_there && !state.outgrown && !state.read_failed && !state.journal_lost;
        let nothing_left = self.sync.shared().nothing_left(&*self.source);
        (kept && !gap && known && nothing_left).then_some(Rest { end, misses: state.misses, troubles: state.troubles })
    }
}
