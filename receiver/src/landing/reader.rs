//! Reads the log's entries in order, and decides where it ends.

use super::Place;
use super::log::Log;
use super::segment::Segment;
use crate::failure::Failure;
use crate::group::stream::Checked;
use crate::limits::WINDOW_BYTES;
use std::sync::Arc;
use varve_common::format::{BLOCK_BYTES, ENTRY_HEADER_BYTES, EntryHeader};
use varve_common::limits::FRAME_PLAIN_BYTES_MAX;
use varve_io::AlignedBuf;

/// Where the next entry may stand, in the order in which it is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Candidate {
    /// Right after the one before: the same batch.
    Adjacent,
    /// At the next block: the next batch.
    NextBatch,
    /// At the start of a later segment.
    NextSegment,
}

/// What is found at a candidate place. Each fact is only looked at if the ones before hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// A header that belongs exactly here, in this life of the segment.
    pub header: bool,
    /// Its lengths are possible and it is of a kind that is landed.
    pub sane: bool,
    /// The body is as it was written.
    pub body: bool,
    /// It was written right after the entry before.
    pub chained: bool,
    /// Its position is where the stream stands, and the body says what a body may say.
    pub follows: bool,
}

/// What is done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the next entry.
    Take,
    /// It is not here; the next candidate is looked at, and after the last one the log ends.
    Elsewhere,
    /// The log ends here although more was written: acknowledged data is lost.
    Damaged,
}

/// One row of the table below: `None` stands for either.
struct Case {
    letter: char,
    why: &'static str,
    last_candidate: Option<bool>,
    facts: [Option<bool>; 5],
    verdict: Verdict,
}

const YES: Option<bool> = Some(true);
const NO: Option<bool> = Some(false);
const ANY: Option<bool> = None;

/// Every combination of facts has exactly one row (there is a test).
///
/// A batch is written while nothing else is under way, so a crash can only tear the last one, and a tear looks like A,
/// B or C. Recovery then writes on in another segment: in this one remains of the torn batch may follow, and were its
/// first entry to come again to the same place, their chain would be whole. As it is, it stays broken (D).
/// In the first place of a later segment the same looks different: it was only begun when everything before was
/// durable (E).
const CASES: [Case; 7] = [
    Case {
        letter: 'A',
        why: "nothing was written here in this life of the segment",
        last_candidate: ANY,
        facts: [NO, ANY, ANY, ANY, ANY],
        verdict: Verdict::Elsewhere,
    },
    Case {
        letter: 'B',
        why: "a header that cannot be ours",
        last_candidate: ANY,
        facts: [YES, NO, ANY, ANY, ANY],
        verdict: Verdict::Elsewhere,
    },
    Case {
        letter: 'C',
        why: "the body was torn",
        last_candidate: ANY,
        facts: [YES, YES, NO, ANY, ANY],
        verdict: Verdict::Elsewhere,
    },
    Case {
        letter: 'D',
        why: "remains of a batch that was torn",
        last_candidate: NO,
        facts: [YES, YES, YES, NO, ANY],
        verdict: Verdict::Elsewhere,
    },
    Case {
        letter: 'E',
        why: "a later segment goes on after an entry that is not here any more",
        last_candidate: YES,
        facts: [YES, YES, YES, NO, ANY],
        verdict: Verdict::Damaged,
    },
    Case {
        letter: 'F',
        why: "whole and in its place, but not a continuation of the stream",
        last_candidate: ANY,
        facts: [YES, YES, YES, YES, NO],
        verdict: Verdict::Damaged,
    },
    Case {
        letter: 'G',
        why: "the next entry",
        last_candidate: ANY,
        facts: [YES, YES, YES, YES, YES],
        verdict: Verdict::Take,
    },
];

/// The row for these facts: its letter, its words, what is done.
pub fn decide(candidate: Candidate, facts: Facts) -> (char, &'static str, Verdict) {
    let last = candidate == Candidate::NextSegment;
    let have = [facts.header, facts.sane, facts.body, facts.chained, facts.follows];
    let fits = |case: &&Case| {
        case.last_candidate.is_none_or(|wanted| wanted == last)
            && case.facts.iter().zip(have).all(|(wanted, have)| wanted.is_none_or(|wanted| wanted == have))
    };
    match CASES.iter().find(fits) {
        Some(case) => (case.letter, case.why, case.verdict),
        // The table is complete (tested); if it were not, ending the log would be the safe side.
        None => ('?', "no case", Verdict::Damaged),
    }
}

/// What stands at the place that was asked for.
pub enum Next<'a> {
    /// The next entry; the reader has moved behind it.
    Entry(EntryHeader, &'a [u8], Checked),
    /// Nothing: the log ends here.
    End,
    /// Nothing, although something was written after it: why.
    Damaged(String),
}

/// Walks the log. Reads past the page cache through one window.
#[derive(Debug)]
pub struct Reader {
    log: Arc<Log>,
    at: Place,
    chain: u32,
    /// Nothing from here on is looked at: the lander may be writing it, and the window would keep what was there before.
    limit: Option<Place>,
    window: Option<Window>,
}

#[derive(Debug)]
struct Window {
    buf: AlignedBuf,
    segment: u64,
    start: u64,
    len: usize,
}

impl Reader {
    /// Begins at `at`, after the entry whose header has the CRC `chain`.
    pub fn new(log: Arc<Log>, at: Place, chain: u32) -> Self {
        Self { log, at, chain, limit: None, window: None }
    }

    /// Where the next entry is looked for.
    pub fn place(&self) -> Place {
        self.at
    }

    /// CRC of the header before that place.
    pub fn chain(&self) -> u32 {
        self.chain
    }

    /// Goes to another place, entries in between having been read from memory.
    pub fn jump(&mut self, at: Place, chain: u32) {
        (self.at, self.chain) = (at, chain);
    }

    /// Everything before `until` (and its block) is written, what comes after may not be.
    pub fn allow(&mut self, until: Place) {
        self.limit = Some(until);
    }

    /// How much of a segment may be read.
    fn readable(&self, segment: &Segment) -> u64 {
        match self.limit {
            Some(limit) if limit.segment < segment.sequence() => 0,
            Some(limit) if limit.segment == segment.sequence() => limit.offset.min(segment.bytes()),
            _ => segment.bytes(),
        }
    }

    /// Frees the window's memory until it is needed again.
    pub fn rest(&mut self) {
        self.window = None;
    }

    /// The next entry. `check` says whether a body of that header continues the stream.
    pub fn next<'s>(
        &'s mut self,
        mut check: impl FnMut(&EntryHeader, &[u8]) -> Option<Checked>,
    ) -> Result<Next<'s>, Failure> {
        let mut candidate = Candidate::Adjacent;
        let mut at = self.at;
        loop {
            let (facts, found) = match self.log.segment(at.segment) {
                Some(segment) => self.look(&segment, at.offset, &mut check)?,
                None => (Facts::default(), None),
            };
            let (letter, why, verdict) = decide(candidate, facts);
            match (verdict, found) {
                (Verdict::Take, Some((header, checked))) => {
                    self.at = Place { offset: at.offset + header.total_bytes() as u64, ..at };
                    self.chain = header.header_crc.get();
                    let body = self.body(at.offset, &header);
                    return Ok(Next::Entry(header, body, checked));
                }
                (Verdict::Damaged, _) => {
                    let text = format!("case {letter} in segment {} at offset {}: {why}", at.segment, at.offset);
                    return Ok(Next::Damaged(text));
                }
                (Verdict::Elsewhere | Verdict::Take, _) => {}
            }
            (candidate, at) = match candidate {
                Candidate::Adjacent => (Candidate::NextBatch, self.at.next_block()),
                Candidate::NextBatch | Candidate::NextSegment => match self.log.segment_after(at.segment) {
                    Some(later) => {
                        let at = Place { segment: later.sequence(), offset: BLOCK_BYTES as u64 };
                        (Candidate::NextSegment, at)
                    }
                    None => return Ok(Next::End),
                },
            };
        }
    }

    /// Looks at one candidate place.
    fn look(
        &mut self,
        segment: &Arc<Segment>,
        offset: u64,
        check: &mut impl FnMut(&EntryHeader, &[u8]) -> Option<Checked>,
    ) -> Result<(Facts, Option<(EntryHeader, Checked)>), Failure> {
        let mut facts = Facts::default();
        let readable = self.readable(segment);
        if offset + ENTRY_HEADER_BYTES as u64 > readable {
            return Ok((facts, None));
        }
        let bytes = self.bytes(segment, offset, ENTRY_HEADER_BYTES)?;
        let Some(header) = EntryHeader::decode(bytes, segment.sequence(), offset) else {
            return Ok((facts, None));
        };
        facts.header = true;
        let lengths = header.body_bytes.get().max(header.plain_bytes.get()) as usize;
        let total = header.total_bytes();
        facts.sane = lengths <= FRAME_PLAIN_BYTES_MAX && offset + total as u64 <= readable;
        if !facts.sane {
            return Ok((facts, None));
        }
        let chain = self.chain;
        let body_bytes = header.body_bytes.get() as usize;
        let body = &self.bytes(segment, offset, total)?[ENTRY_HEADER_BYTES..][..body_bytes];
        facts.body = crc32fast::hash(body) == header.body_crc.get();
        facts.chained = header.previous_crc.get() == chain;
        if !facts.body || !facts.chained {
            return Ok((facts, None));
        }
        let checked = check(&header, body);
        facts.follows = checked.is_some();
        Ok((facts, checked.map(|checked| (header, checked))))
    }

    /// `len` bytes at `offset`, from the window or the disk.
    fn bytes(&mut self, segment: &Arc<Segment>, offset: u64, len: usize) -> Result<&[u8], Failure> {
        let (sequence, readable) = (segment.sequence(), self.readable(segment));
        let window = self.window.get_or_insert_with(|| Window {
            buf: AlignedBuf::new(WINDOW_BYTES),
            segment: 0,
            start: 0,
            len: 0,
        });
        let inside = window.segment == sequence
            && offset >= window.start
            && offset + len as u64 <= window.start + window.len as u64;
        if !inside {
            let start = offset - offset % BLOCK_BYTES as u64;
            let wanted = (readable.next_multiple_of(BLOCK_BYTES as u64) - start).min(WINDOW_BYTES as u64) as usize;
            // Not valid while it is being read: an error must not leave a window that lies.
            window.segment = 0;
            let read = segment.file().read_exact_at(&mut window.buf[..wanted], start);
            read.map_err(|e| Failure::io("the landing log", &e))?;
            (window.segment, window.start, window.len) = (sequence, start, wanted);
        }
        let from = (offset - window.start) as usize;
        Ok(&window.buf[from..from + len])
    }

    /// The body of the entry that was looked at last: it is in the window.
    fn body(&self, offset: u64, header: &EntryHeader) -> &[u8] {
        let Some(window) = &self.window else { return &[] };
        let from = (offset - window.start) as usize + ENTRY_HEADER_BYTES;
        &window.buf[from..from + header.body_bytes.get() as usize]
    }
}

/// What was found about an entry in memory that is known to be whole: only its own fields are read.
pub fn in_memory(bytes: &[u8], at: usize, place: Place) -> Option<(EntryHeader, &[u8])> {
    let header = EntryHeader::decode(bytes.get(at..)?, place.segment, place.offset)?;
    let body = bytes.get(at + ENTRY_HEADER_BYTES..)?.get(..header.body_bytes.get() as usize)?;
    Some((header, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Over all combinations: one row each, nothing but a whole, chained, contiguous entry is taken, and damage is
    /// only called damage where a crash cannot be the reason.
    #[test]
    fn the_table_is_complete_and_without_overlap() {
        for candidate in [Candidate::Adjacent, Candidate::NextBatch, Candidate::NextSegment] {
            for bits in 0..32u8 {
                let bit = |n: u8| bits & (1 << n) != 0;
                let facts = Facts { header: bit(0), sane: bit(1), body: bit(2), chained: bit(3), follows: bit(4) };
                let last = candidate == Candidate::NextSegment;
                let have = [facts.header, facts.sane, facts.body, facts.chained, facts.follows];
                let rows = CASES.iter().filter(|case| {
                    case.last_candidate.is_none_or(|wanted| wanted == last)
                        && case.facts.iter().zip(have).all(|(wanted, have)| wanted.is_none_or(|w| w == have))
                });
                assert_eq!(rows.count(), 1, "{candidate:?} {facts:?}");
                let (letter, _, verdict) = decide(candidate, facts);
                let whole = facts.header && facts.sane && facts.body;
                assert_eq!(verdict == Verdict::Take, have.iter().all(|have| *have), "{letter} {facts:?}");
                let impossible = whole && ((facts.chained && !facts.follows) || (!facts.chained && last));
                assert_eq!(verdict == Verdict::Damaged, impossible, "{letter} {candidate:?} {facts:?}");
            }
        }
    }

    #[test]
    fn letters_are_unique() {
        let mut letters: Vec<char> = CASES.iter().map(|case| case.letter).collect();
        letters.dedup();
        assert_eq!(letters, ['A', 'B', 'C', 'D', 'E', 'F', 'G']);
    }
}
