//! The gap of a group: what is true at the source, what the receiver was told, and so which mark comes next and where.
//! Pure.
//!
//! | source | receiver believes | next mark | where |
//! |---|---|---|---|
//! | gap open | consistent | `GapBegin` | as soon as the stream stands at the gap's position (frames are cut there) |
//! | gap open | in a gap | none | |
//! | no gap | consistent | none | |
//! | no gap | in a gap | `GapEnd` | as soon as the stream stands at or after the position where the replica was complete |

use varve_common::format::MarkKind;
use varve_common::state::GapReason;

/// See the module's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GapState {
    open: Option<(GapReason, u64)>,
    complete_at: u64,
    ever_consistent: bool,
}

/// A mark to send now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextMark {
    /// `GapBegin` or `GapEnd`.
    pub kind: MarkKind,
    /// For `GapBegin`.
    pub reason: Option<GapReason>,
}

impl GapState {
    /// A new group or a new ring: nothing is known of the replica.
    pub fn new(reason: GapReason) -> Self {
        Self { open: Some((reason, 0)), complete_at: 0, ever_consistent: false }
    }

    /// As it was kept: the open gap's reason and its position (any without one), the position at which the last one was
    /// complete.
    pub fn of_parts(open: Option<GapReason>, position: u64, complete_at: u64, ever_consistent: bool) -> Self {
        Self { open: open.map(|reason| (reason, position)), complete_at, ever_consistent }
    }

    /// To be kept: see [`GapState::of_parts`].
    pub fn parts(&self) -> (Option<GapReason>, u64, u64) {
        (self.open(), self.open.map_or(0, |(_, position)| position), self.complete_at)
    }

    /// The open gap's reason.
    pub fn open(&self) -> Option<GapReason> {
        self.open.map(|(reason, _)| reason)
    }

    /// Whether a record at `position` stands in the open gap.
    pub fn covers(&self, position: u64) -> bool {
        self.open.is_some_and(|(_, begin)| position > begin)
    }

    /// Whether there was no gap at some time.
    pub fn ever_consistent(&self) -> bool {
        self.ever_consistent
    }

    /// The receiver knows of a consistent time before this process.
    pub fn note_ever_consistent(&mut self) {
        self.ever_consistent = true;
    }

    /// Something is missing from the stream after `position`. An open gap begins there if it began later: its mark may still be
    /// to come, and until it is sent what is before counts as good. Returns whether a gap was opened.
    pub fn begin(&mut self, reason: GapReason, position: u64) -> bool {
        if let Some((_, begin)) = &mut self.open {
            *begin = position.min(*begin);
            return false;
        }
        self.open = Some((reason, position));
        true
    }

    /// The gap's reason is another one from here on (the whole volume must be compared instead of regions).
    pub fn restart(&mut self, reason: GapReason, position: u64) {
        self.open = Some((reason, position));
    }

    /// Nothing is missing at `position` or after it.
    pub fn complete(&mut self, position: u64) {
        self.open = None;
        self.complete_at = position;
        self.ever_consistent = true;
    }

    /// The mark to send when everything before `sent` was sent and the receiver believes `remote_consistent`.
    pub fn next_mark(&self, remote_consistent: bool, sent: u64) -> Option<NextMark> {
        match (self.open, remote_consistent) {
            (Some((reason, position)), true) if sent >= position => {
                Some(NextMark { kind: MarkKind::GapBegin, reason: Some(reason) })
            }
            (None, false) if sent >= self.complete_at => Some(NextMark { kind: MarkKind::GapEnd, reason: None }),
            _ => None,
        }
    }

    /// Position that no frame may cross before the next mark was sent.
    pub fn cut_limit(&self, remote_consistent: bool) -> Option<u64> {
        match self.open {
            Some((_, position)) if remote_consistent => Some(position),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(state: &GapState, remote: bool, sent: u64) -> Option<MarkKind> {
        state.next_mark(remote, sent).map(|mark| mark.kind)
    }

    #[test]
    fn every_row_of_the_table() {
        let mut state = GapState::new(GapReason::InitialSync);
        assert_eq!(kind(&state, false, 100), None, "first sync runs");
        state.complete(200);
        assert_eq!(kind(&state, false, 199), None, "the stream is not there yet");
        assert_eq!(kind(&state, false, 200), Some(MarkKind::GapEnd));
        assert_eq!(kind(&state, true, 300), None);
        assert!(state.begin(GapReason::RingFull, 500));
        assert!(!state.begin(GapReason::FailedWrite, 600), "it is open, and began before");
        assert_eq!((state.open(), state.cut_limit(true)), (Some(GapReason::RingFull), Some(500)));
        assert_eq!(kind(&state, true, 480), None, "points before the gap stay good");
        assert!(!state.begin(GapReason::LateWrite, 450), "it is open");
        assert_eq!((state.open(), state.cut_limit(true)), (Some(GapReason::RingFull), Some(450)), "and begins earlier");
        assert_eq!(kind(&state, true, 449), None);
        assert!(state.covers(451) && !state.covers(450));
        assert_eq!(
            state.next_mark(true, 480),
            Some(NextMark { kind: MarkKind::GapBegin, reason: Some(GapReason::RingFull) })
        );
        assert_eq!((kind(&state, false, 600), state.cut_limit(false)), (None, None));
    }

    /// A mark that was lost with the connection is sent again, whatever the agent believed.
    #[test]
    fn the_receivers_word_counts() {
        let mut state = GapState::new(GapReason::InitialSync);
        state.complete(100);
        assert_eq!(kind(&state, false, 900), Some(MarkKind::GapEnd), "the first GapEnd never landed");
        state.begin(GapReason::RingFull, 950);
        assert_eq!(kind(&state, true, 960), Some(MarkKind::GapBegin), "resumed behind the gap's position");
    }
}
