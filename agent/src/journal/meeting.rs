//! How a journal that was found and a ring meet, and what a receiver's position means for a journal that does not go on
//! in the ring. Pure: two tables, a letter for every case.

/// Where the ring's oldest byte stands, seen from a journal that ends at `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// Another ring: the host was started anew, or capture was.
    Other,
    /// The ring still holds everything, from before the journal's begin.
    Before,
    /// The ring still holds the journal's end: killed between the sync and the release.
    Inside,
    /// It begins where the journal ends.
    AtEnd,
    /// It begins later.
    After,
    /// It ends before the journal does.
    Short,
}

impl Ring {
    /// `journal`: start and end; `ring`: consumer and producer of the same incarnation, else `None`.
    pub fn seen_from(journal: (u64, u64), ring: Option<(u64, u64)>) -> Self {
        let (start, end) = journal;
        match ring {
            None => Self::Other,
            Some((_, producer)) if producer < end => Self::Short,
            Some((consumer, _)) if consumer > end => Self::After,
            Some((consumer, _)) if consumer == end => Self::AtEnd,
            Some((consumer, _)) if consumer >= start => Self::Inside,
            Some(_) => Self::Before,
        }
    }
}

/// What is done with a journal that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// The ring goes on where the journal ends, once it was released up to there.
    Attached,
    /// The journal's bytes are sent first, then the ring begins anew.
    Detached,
    /// It is of no use.
    Discard,
}

/// Letter, words, and what is done.
pub fn meet(ring: Ring) -> (char, &'static str, Meeting) {
    match ring {
        Ring::AtEnd => ('A', "the ring goes on where the journal ends", Meeting::Attached),
        Ring::Inside => ('B', "the ring was not released up to the journal's end", Meeting::Attached),
        Ring::Before => ('C', "the ring holds all that the journal holds", Meeting::Discard),
        Ring::Other => ('D', "the journal is of an earlier ring", Meeting::Detached),
        // Acknowledged, or lost with a damaged end: the receiver's position tells.
        Ring::After => ('E', "the ring begins after the journal's end", Meeting::Detached),
        Ring::Short => ('F', "the ring ends before the journal does, so it is not its ring", Meeting::Detached),
    }
}

/// What the receiver's position means for a detached journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// Send from here on.
    From(u64),
    /// There is nothing to send: why.
    Nothing(char, &'static str),
}

/// `resume`: where the receiver stands in the journal's incarnation.
pub fn drain(journal: (u64, u64), resume: Option<u64>) -> Drain {
    let (start, end) = journal;
    match resume {
        None => Drain::Nothing('G', "the receiver does not know its ring"),
        Some(at) if at >= end => Drain::Nothing('H', "the receiver has all of it"),
        Some(at) if at < start => Drain::Nothing('I', "the receiver stands before it"),
        Some(at) => Drain::From(at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every relation of four numbers: what is attached has no hole, what is discarded is held elsewhere.
    #[test]
    fn every_meeting() {
        for (start, end) in [(8, 16), (8, 24), (16, 24)] {
            assert_eq!(meet(Ring::seen_from((start, end), None)).2, Meeting::Detached);
            for consumer in (0..=40).step_by(8) {
                for producer in (consumer..=40).step_by(8) {
                    let (letter, _, meeting) = meet(Ring::seen_from((start, end), Some((consumer, producer))));
                    let touches = consumer >= start && consumer <= end && end <= producer;
                    assert_eq!(meeting == Meeting::Attached, touches, "{letter} {start}..{end} {consumer}..{producer}");
                    let held = consumer < start && producer >= end;
                    assert_eq!(meeting == Meeting::Discard, held, "{letter} {start}..{end} {consumer}..{producer}");
                }
            }
        }
    }

    #[test]
    fn every_drain() {
        assert_eq!(drain((8, 24), None), Drain::Nothing('G', "the receiver does not know its ring"));
        assert!(matches!(drain((8, 24), Some(0)), Drain::Nothing('I', _)));
        assert_eq!(drain((8, 24), Some(8)), Drain::From(8));
        assert_eq!(drain((8, 24), Some(16)), Drain::From(16));
        assert!(matches!(drain((8, 24), Some(24)), Drain::Nothing('H', _)));
        assert!(matches!(drain((8, 24), Some(32)), Drain::Nothing('H', _)));
    }
}
