//! What a group's worker leaves for the next one, beside the ring and the bitmaps that outlive it.
//!
//! The worker may be killed at any moment. What it knew and where it is found again:
//!
//! | what | where it is found | why that is enough |
//! |---|---|---|
//! | records not acknowledged | the ring: space is given back only for what is durable | they are sent again from the receiver's durable position |
//! | regions dirty | the bitmap | |
//! | regions taken and not done | the second bitmap: set before the dirty bit goes, cleared when the receiver has the image or the dirty bit is back | they are made dirty again; an image that the receiver has already is harmless |
//! | what was overtaken since a region was registered | lost | the region is registered anew, as after a lost session |
//! | bytes in flight | the programs' counts | programs count on while nobody looks |
//! | events not acted upon | the programs' counters, against those in the note | the note holds the counters *and* the gap that was opened because of them, in one; killed before it is left, the events are seen again |
//! | `first_drop` | taken before the note is left | if it is lost, the gap begins at the durable position: earlier, so safe |
//! | the open gap | the note | killed before: see the events; a bit without a gap is compared like any other and opens one if the region differs |
//! | marks sent or not | the receiver's word at the handshake | as after a lost session |
//! | that a gap was completed | the note, left before the next mark goes out | killed before: the gap is completed again, at a later position |
//! | the stream's clock | the programs' offset | it goes on from there, so that records' times do not go back |
//! | bookmarks that were waited for, a running verify | lost | whoever asked is told so by his broken connection |

use super::gap::GapState;
use super::source::{Source, Troubles};
use varve_bpf::{NOTE_WORDS, Note};
use varve_common::state::GapReason;

/// Version of the note's words. A note of another version is not gone on with.
const VERSION: u64 = 1;
const EVER_CONSISTENT: u64 = 1;
const KNOWN_THERE: u64 = 2;

/// See the module's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// What is true at the source.
    pub gap: GapState,
    /// The gap that status shows: it lasts until the receiver has the mark of its end.
    pub shown: Option<GapReason>,
    /// See [`super::shared::Facts::gap_since_ns`].
    pub shown_since_ns: Option<u64>,
    /// The receiver has known this ring.
    pub known_there: bool,
    /// Events that have become part of `gap`.
    pub troubles: Troubles,
    /// The same for events that the kernel skipped.
    pub misses: u64,
}

fn reason_number(reason: Option<GapReason>) -> u64 {
    reason.map_or(0, |reason| reason as u64)
}

/// `None`: a reason that we do not know.
fn reason_of(number: u64) -> Option<Option<GapReason>> {
    if number == 0 {
        return Some(None);
    }
    GapReason::from_number(u8::try_from(number).ok()?).map(Some)
}

impl Kept {
    /// Of a ring that begins where the replicas are equal to the volumes and the receiver's stream stands.
    pub fn equal(source: &dyn Source, misses: u64) -> Self {
        let gap = GapState::of_parts(None, 0, 0, true);
        Self { gap, shown: None, shown_since_ns: None, known_there: true, troubles: source.troubles(), misses }
    }

    /// As words.
    pub fn encode(&self) -> Note {
        let (open, position, complete_at) = self.gap.parts();
        let t = &self.troubles;
        let flag = |is: bool, bit: u64| if is { bit } else { 0 };
        let mut note = [0; NOTE_WORDS];
        note[..17].copy_from_slice(&[
            VERSION,
            reason_number(open),
            position,
            complete_at,
            flag(self.gap.ever_consistent(), EVER_CONSISTENT) | flag(self.known_there, KNOWN_THERE),
            reason_number(self.shown),
            self.shown_since_ns.unwrap_or(0),
            t.dropped,
            t.unreadable,
            t.untracked,
            t.failed,
            t.straddling,
            t.late,
            t.late_unknown,
            t.passthrough,
            self.misses,
            t.resized,
        ]);
        note
    }

    /// From words. `None`: there is no note, or one that we do not understand.
    pub fn decode(note: &Note) -> Option<Self> {
        if note[0] != VERSION {
            return None;
        }
        let flags = note[4];
        Some(Self {
            gap: GapState::of_parts(reason_of(note[1])?, note[2], note[3], flags & EVER_CONSISTENT != 0),
            shown: reason_of(note[5])?,
            shown_since_ns: Some(note[6]).filter(|since| *since != 0),
            known_there: flags & KNOWN_THERE != 0,
            troubles: Troubles {
                dropped: note[7],
                unreadable: note[8],
                untracked: note[9],
                failed: note[10],
                straddling: note[11],
                late: note[12],
                late_unknown: note[13],
                passthrough: note[14],
                // Notes of agents that did not look for it have a zero here, and so do their programs' counters.
                resized: note[16],
            },
            misses: note[15],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_what_is_not_understood() {
        let mut gap = GapState::new(GapReason::InitialSync);
        gap.complete(4096);
        gap.begin(GapReason::RingFull, 1 << 40);
        let troubles = Troubles {
            dropped: 1,
            unreadable: 2,
            untracked: 3,
            failed: 4,
            straddling: 5,
            late: 6,
            late_unknown: 7,
            passthrough: 8,
            resized: 10,
        };
        let kept = Kept {
            gap,
            shown: Some(GapReason::LateWrite),
            shown_since_ns: Some(77),
            known_there: true,
            troubles,
            misses: 9,
        };
        assert_eq!(Kept::decode(&kept.encode()), Some(kept.clone()));
        let closed =
            Kept { gap: GapState::of_parts(None, 0, 8, true), shown: None, shown_since_ns: None, ..kept.clone() };
        assert_eq!(Kept::decode(&closed.encode()), Some(closed));
        assert_eq!(Kept::decode(&[0; NOTE_WORDS]), None, "never left");
        for (word, value) in [(0, VERSION + 1), (1, 200), (5, u64::MAX)] {
            let mut note = kept.encode();
            note[word] = value;
            assert_eq!(Kept::decode(&note), None, "word {word}");
        }
    }
}
