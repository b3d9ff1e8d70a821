//! Which slots of a chronicle count. Pure.

use varve_common::format::chronicle::{ChronicleHeader, ChronicleSlot, Event, SLOT_BYTES};

/// Where a slot is, seen from the newest batch that left anything whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zone {
    /// Something that was appended later is whole.
    Before,
    /// In the newest batch, all of whose slots are whole and in their places.
    Newest,
    /// In the newest batch, which is not complete.
    Torn,
    /// Behind it.
    After,
}

/// What is found in a slot. Each fact is only looked at if the ones before hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Its CRC is right and begins with this file's header.
    pub whole: bool,
    /// It says that it stands here.
    pub in_place: bool,
    /// It is an event.
    pub understood: bool,
}

/// What is done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its event counts.
    Take,
    /// An event was here and is lost.
    Lost,
    /// The file ends at the begin of this batch.
    Cut,
}

/// One row of the table below: `None` stands for either.
struct Case {
    letter: char,
    why: &'static str,
    zones: &'static [Zone],
    facts: [Option<bool>; 3],
    verdict: Verdict,
}

const YES: Option<bool> = Some(true);
const NO: Option<bool> = Some(false);
const ANY: Option<bool> = None;

/// Every combination of zone and facts has exactly one row (there is a test).
///
/// An append returns when it is durable, and the next one begins later: a crash can only tear the newest batch, whose
/// writer was never told that it is there, and it takes all of the batch (C, D). Whatever is wrong before a whole later
/// batch was whole once and was damaged since (A, B).
const CASES: [Case; 7] = [
    Case {
        letter: 'A',
        why: "damaged after it was durable",
        zones: &[Zone::Before],
        facts: [NO, ANY, ANY],
        verdict: Verdict::Lost,
    },
    Case {
        letter: 'B',
        why: "it belongs to another place",
        zones: &[Zone::Before],
        facts: [YES, NO, ANY],
        verdict: Verdict::Lost,
    },
    Case {
        letter: 'C',
        why: "of a batch that was torn",
        zones: &[Zone::Torn],
        facts: [ANY, ANY, ANY],
        verdict: Verdict::Cut,
    },
    Case {
        letter: 'D',
        why: "nothing of a batch is whole",
        zones: &[Zone::After],
        facts: [ANY, ANY, ANY],
        verdict: Verdict::Cut,
    },
    Case {
        letter: 'E',
        why: "the newest batch is not what it was found to be",
        zones: &[Zone::Newest],
        facts: [NO, ANY, ANY],
        verdict: Verdict::Cut,
    },
    Case {
        letter: 'F',
        why: "whole, and no event that this version knows",
        zones: &[Zone::Before, Zone::Newest],
        facts: [YES, YES, NO],
        verdict: Verdict::Lost,
    },
    Case {
        letter: 'G',
        why: "the next event",
        zones: &[Zone::Before, Zone::Newest],
        facts: [YES, YES, YES],
        verdict: Verdict::Take,
    },
];

/// The row for these facts: its letter, its words, what is done.
pub fn decide(zone: Zone, facts: Facts) -> (char, &'static str, Verdict) {
    match CASES.iter().find(|case| fits(case, zone, facts)) {
        Some(case) => (case.letter, case.why, case.verdict),
        // In the newest batch but not in its place: it would not be the newest batch's. Lost is the safe side.
        None => ('?', "no case", Verdict::Lost),
    }
}

fn fits(case: &Case, zone: Zone, facts: Facts) -> bool {
    let have = [facts.whole, facts.in_place, facts.understood];
    case.zones.contains(&zone) && case.facts.iter().zip(have).all(|(wanted, have)| wanted.is_none_or(|w| w == have))
}

/// What counts of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Slots in order; `None`: an event was here and is lost.
    pub events: Vec<Option<Event>>,
    /// What was found, in words for the log.
    pub notes: Vec<String>,
    /// Slots that are lost.
    pub lost: usize,
    /// Slots that are cut off the end, the last one perhaps a part.
    pub cut: usize,
}

/// Reads everything behind the header.
pub fn recover(header: &ChronicleHeader, bytes: &[u8]) -> Recovered {
    let slots: Vec<(Facts, Option<ChronicleSlot>)> =
        bytes.chunks_exact(SLOT_BYTES).enumerate().map(|(number, bytes)| look(header, number as u64, bytes)).collect();
    let good = |number: usize| slots.get(number).filter(|(facts, _)| facts.whole && facts.in_place);
    // The newest batch is the one that begins last among those that left anything.
    let first_of = |number: usize| good(number)?.1.map(|slot| (number - usize::from(slot.index.get()), slot));
    let newest = (0..slots.len()).filter_map(first_of).max_by_key(|(first, _)| *first);
    let (first, end, complete) = match newest {
        Some((first, slot)) => {
            let end = first + usize::from(slot.count.get());
            let same = |number| first_of(number).is_some_and(|(of, other)| of == first && other.count == slot.count);
            (first, end, (first..end).all(same))
        }
        None => (0, 0, false),
    };
    let mut recovered = Recovered::default();
    for (number, (facts, slot)) in slots.iter().enumerate() {
        let zone = match number {
            _ if number < first => Zone::Before,
            _ if number >= end => Zone::After,
            _ if complete => Zone::Newest,
            _ => Zone::Torn,
        };
        let (letter, why, verdict) = decide(zone, *facts);
        let note = || format!("case {letter} in slot {number}: {why}");
        match verdict {
            Verdict::Take => recovered.events.push(slot.and_then(|slot| slot.event())),
            Verdict::Lost => {
                recovered.events.push(None);
                recovered.notes.push(note());
            }
            Verdict::Cut => {
                recovered.notes.push(note());
                break;
            }
        }
    }
    recovered.lost = recovered.events.iter().filter(|event| event.is_none()).count();
    recovered.cut = bytes.len().div_ceil(SLOT_BYTES) - recovered.events.len();
    recovered
}

fn look(header: &ChronicleHeader, number: u64, bytes: &[u8]) -> (Facts, Option<ChronicleSlot>) {
    let mut facts = Facts::default();
    let Some(slot) = ChronicleSlot::decode(header, bytes) else { return (facts, None) };
    facts.whole = true;
    facts.in_place = slot.is_in_place(header, number);
    facts.understood = facts.in_place && slot.event().is_some();
    (facts, Some(slot))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZONES: [Zone; 4] = [Zone::Before, Zone::Newest, Zone::Torn, Zone::After];

    /// Over all combinations: one row each; only a whole event in its place is taken; nothing is called torn that has a
    /// whole batch behind it.
    #[test]
    fn the_table_is_complete_and_without_overlap() {
        for zone in ZONES {
            for bits in 0..8u8 {
                let facts = Facts { whole: bits & 1 != 0, in_place: bits & 2 != 0, understood: bits & 4 != 0 };
                if zone == Zone::Newest && facts.whole && !facts.in_place {
                    continue; // By definition of the zone.
                }
                assert_eq!(CASES.iter().filter(|case| fits(case, zone, facts)).count(), 1, "{zone:?} {facts:?}");
                let (letter, _, verdict) = decide(zone, facts);
                let all = facts.whole && facts.in_place && facts.understood;
                let counts = matches!(zone, Zone::Before | Zone::Newest);
                assert_eq!(verdict == Verdict::Take, all && counts, "{letter} {zone:?} {facts:?}");
                assert!(zone != Zone::Before || verdict != Verdict::Cut, "{letter} {facts:?}");
            }
        }
    }

    #[test]
    fn letters_are_unique() {
        let letters: Vec<char> = CASES.iter().map(|case| case.letter).collect();
        assert_eq!(letters, ['A', 'B', 'C', 'D', 'E', 'F', 'G']);
    }
}
