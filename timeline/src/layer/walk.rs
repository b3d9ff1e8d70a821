//! Goes through a layer from chunk to chunk, and decides where it ends and what of it is damaged.

use super::{ChunkInfo, Damage, FIRST_CHUNK, LAYER_FILE_RECORDS_MAX, Recovered, data_start, entry_of};
use crate::entry::{Entry, Stored};
use crate::error::HistoryError;
use varve_common::format::BLOCK_BYTES;
use varve_common::format::layer::{CHUNK_HEADER_BYTES, CHUNK_MAGIC, ChunkHeader, LayerHeader, Points, Rows};
use varve_io::{AlignedBuf, DirectFile, sparse};

/// Read at once: many small chunks, and not too much of the data between two headers of large ones.
const WINDOW_BYTES: usize = 128 << 10;

/// What is found where a chunk should begin. Each of the first three is only looked at if the ones before hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// A header that was written for this place of this layer.
    pub header: bool,
    /// Its numbers are possible, and the file is long enough.
    pub sane: bool,
    /// Table and points are as they were written.
    pub tables: bool,
    /// It was written right after the chunk before (or nobody knows, because that one is lost).
    pub chained: bool,
    /// Somewhere behind it another chunk begins: it was durable once, because appends do not overlap.
    pub followed: bool,
    /// The stored bytes are as they were written.
    pub data: bool,
}

/// What is done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the next chunk.
    Take,
    /// The layer ends before it. What is there is of an append that never returned.
    End,
    /// Something is missing that was durable once; it goes on with the next chunk that is there.
    Damaged,
}

/// One row of the table below: `None` stands for either.
struct Case {
    letter: char,
    why: &'static str,
    facts: [Option<bool>; 6],
    verdict: Verdict,
}

const YES: Option<bool> = Some(true);
const NO: Option<bool> = Some(false);
const ANY: Option<bool> = None;

/// Every combination of facts has exactly one row (there is a test).
///
/// A chunk is one write, and the next is begun when it is durable. So a crash can tear the last one only, but anywhere: a
/// tear looks like A, C, E or H. The same with a chunk behind it is damage (B, D, F). The data of a chunk in the middle
/// is not looked at here: a reader checks each record, and so does a scrub.
const CASES: [Case; 10] = [
    Case {
        letter: 'A',
        why: "nothing was written here, or its first block was not",
        facts: [NO, ANY, ANY, ANY, NO, ANY],
        verdict: Verdict::End,
    },
    Case {
        letter: 'B',
        why: "a chunk's header is gone",
        facts: [NO, ANY, ANY, ANY, YES, ANY],
        verdict: Verdict::Damaged,
    },
    Case {
        letter: 'C',
        why: "a header that cannot be ours, or the file was cut",
        facts: [YES, NO, ANY, ANY, NO, ANY],
        verdict: Verdict::End,
    },
    Case {
        letter: 'D',
        why: "a chunk's header says what cannot be",
        facts: [YES, NO, ANY, ANY, YES, ANY],
        verdict: Verdict::Damaged,
    },
    Case {
        letter: 'E',
        why: "the write ended before the table",
        facts: [YES, YES, NO, ANY, NO, ANY],
        verdict: Verdict::End,
    },
    Case {
        letter: 'F',
        why: "a chunk's table is damaged",
        facts: [YES, YES, NO, ANY, YES, ANY],
        verdict: Verdict::Damaged,
    },
    Case {
        letter: 'G',
        why: "the chunk before this one is not here any more",
        facts: [YES, YES, YES, NO, ANY, ANY],
        verdict: Verdict::Damaged,
    },
    Case {
        letter: 'H',
        why: "not all of the data was written",
        facts: [YES, YES, YES, YES, NO, NO],
        verdict: Verdict::End,
    },
    Case { letter: 'I', why: "the last chunk", facts: [YES, YES, YES, YES, NO, YES], verdict: Verdict::Take },
    Case {
        letter: 'J',
        why: "a chunk that others follow",
        facts: [YES, YES, YES, YES, YES, ANY],
        verdict: Verdict::Take,
    },
];

fn fits(case: &Case, facts: Facts) -> bool {
    let have = [facts.header, facts.sane, facts.tables, facts.chained, facts.followed, facts.data];
    case.facts.iter().zip(have).all(|(wanted, have)| wanted.is_none_or(|wanted| wanted == have))
}

/// The row for these facts: its letter, its words, what is done.
pub fn decide(facts: Facts) -> (char, &'static str, Verdict) {
    match CASES.iter().find(|case| fits(case, facts)) {
        Some(case) => (case.letter, case.why, case.verdict),
        // The table is complete (tested); if it were not, to take nothing would be the safe side.
        None => ('?', "no case", Verdict::End),
    }
}

/// How a layer is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// The end is not known: the last chunk may be torn, so its data is checked. What the device cannot read is an error:
    /// to take it for torn would be to write over it.
    Open,
    /// All chunks were durable once. What the device cannot read counts as damaged, and does not end the walk.
    Closed,
}

/// One step of a [`Walk`].
#[derive(Debug)]
pub(super) enum Step {
    /// A chunk; its records are in [`Walk::entries`].
    Chunk(ChunkInfo),
    Damaged(Damage),
    End {
        case: char,
        why: &'static str,
    },
}

/// A layer's chunks, in order.
#[derive(Debug)]
pub(super) struct Walk<'a> {
    group: [u8; 16],
    number: u32,
    manner: Manner,
    window: Window<'a>,
    at: u64,
    /// Of the header before; `None` after damage.
    chain: Option<u32>,
    last_crc: u32,
    complete_to: u64,
    records: usize,
    entries: Vec<Entry>,
    /// From here on no chunk begins.
    nothing_from: Option<u64>,
    remains: bool,
}

impl<'a> Walk<'a> {
    /// Begins behind `header`, the layer's; nothing from `end` on is looked at.
    pub(super) fn new(file: &'a DirectFile, header: &LayerHeader, end: u64, manner: Manner) -> Self {
        let crc = header.crc.get();
        Self {
            group: header.group,
            number: header.number.get(),
            manner,
            window: Window {
                file,
                end: end.min(file.len()),
                tolerant: manner == Manner::Closed,
                buf: None,
                start: 0,
                len: 0,
            },
            at: FIRST_CHUNK,
            chain: Some(crc),
            last_crc: crc,
            complete_to: header.first_height.get(),
            records: 0,
            entries: Vec::new(),
            nothing_from: None,
            remains: false,
        }
    }

    /// Where the next chunk is looked for.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// What the next chunk to be written names as the one before.
    pub(super) fn last_crc(&self) -> u32 {
        self.last_crc
    }

    /// The records of the chunk that was found last.
    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub(super) fn next(&mut self) -> Result<Step, HistoryError> {
        let (facts, header) = self.look()?;
        let (case, why, verdict) = decide(facts);
        match (verdict, header) {
            (Verdict::Take, Some(header)) => {
                let info = ChunkInfo::new(&header);
                self.at = info.end();
                self.last_crc = header.header_crc.get();
                self.chain = Some(self.last_crc);
                self.complete_to = self.complete_to.max(info.complete_to);
                self.records += self.entries.len();
                Ok(Step::Chunk(info))
            }
            (Verdict::Damaged, header) => {
                let offset = self.at;
                // A whole chunk (G) is looked at again, without the question of what was before.
                if !(facts.tables && self.chain.is_some()) {
                    self.at = self.later(&header)?.unwrap_or(self.window.end);
                }
                self.chain = None;
                let (bytes, first_height) = (self.at - offset, self.complete_to);
                Ok(Step::Damaged(Damage { offset, bytes, first_height, whole_from: None, case, why }))
            }
            (Verdict::End | Verdict::Take, _) => Ok(Step::End { case, why }),
        }
    }

    /// Whether something stands behind the end: what is left of an append that was torn.
    pub(super) fn is_torn(&mut self) -> Result<bool, HistoryError> {
        if self.nothing_from.is_none_or(|from| from > self.at) {
            self.search(self.at)?;
        }
        Ok(self.remains)
    }

    /// What is found at the place of the next chunk.
    fn look(&mut self) -> Result<(Facts, Option<ChunkHeader>), HistoryError> {
        let mut facts = Facts::default();
        self.entries.clear();
        let (at, group, number) = (self.at, self.group, self.number);
        let bytes = self.window.bytes(at, CHUNK_HEADER_BYTES)?;
        let header = bytes.and_then(|bytes| ChunkHeader::decode(bytes, &group, number, at));
        facts.header = header.is_some();
        if let Some(header) = &header {
            let records = self.records + header.records.get() as usize;
            let inside = header.is_possible() && at + header.total_bytes() <= self.window.end;
            facts.sane = inside && records <= LAYER_FILE_RECORDS_MAX;
            facts.tables = facts.sane && self.tables(header)?;
            // Whoever wrote it knew everything up to its first height to be in the chunks before.
            let follows = header.first_height.get() <= self.complete_to;
            facts.chained =
                facts.tables && self.chain.is_none_or(|chain| follows && chain == header.previous_crc.get());
        }
        if facts.chained && self.manner == Manner::Closed {
            // A closed layer's last chunk was durable, as all others.
            facts.followed = true;
        } else {
            facts.followed = self.later(&header)?.is_some();
        }
        if let (true, false, Some(header)) = (facts.chained, facts.followed, &header) {
            facts.data = self.data(header)?;
        }
        Ok((facts, header))
    }

    /// Reads table and points into `entries`; whether they are as they were written.
    fn tables(&mut self, header: &ChunkHeader) -> Result<bool, HistoryError> {
        let (table_bytes, points_bytes) = (header.table_bytes.get() as usize, header.points_bytes.get() as usize);
        let start = self.at + header.table_start();
        let Some(bytes) = self.window.bytes(start, table_bytes + points_bytes)? else { return Ok(false) };
        let (table, points) = bytes.split_at(table_bytes);
        let whole = crc32fast::hash(table) == header.table_crc.get() && points_of(header, points).is_some();
        if !whole {
            return Ok(false);
        }
        let (mut offset, first_height) = (data_start(self.at), header.first_height.get());
        for row in Rows::new(table, header.records.get(), first_height) {
            let entry = row.and_then(|row| entry_of(&row, self.number, offset));
            match entry.filter(|entry| entry.height > first_height) {
                Some(entry) => {
                    offset += u64::from(entry.stored_bytes);
                    self.entries.push(entry);
                }
                None => {
                    self.entries.clear();
                    return Ok(false);
                }
            }
        }
        let whole = offset == start;
        if !whole {
            self.entries.clear();
        }
        Ok(whole)
    }

    /// Whether the stored bytes of all records are as they were written.
    fn data(&mut self, header: &ChunkHeader) -> Result<bool, HistoryError> {
        let start = data_start(self.at);
        let Some(data) = self.window.bytes(start, header.data_bytes.get() as usize)? else { return Ok(false) };
        let whole = |entry: &Entry| {
            let from = (u64::from(entry.offset) - start) as usize;
            let stored = data.get(from..from + entry.stored_bytes as usize);
            entry.stored == Stored::Zero || stored.is_some_and(|stored| crc32fast::hash(stored) == entry.crc)
        };
        Ok(self.entries.iter().all(whole))
    }

    /// Where the first chunk behind this place begins, as far as there is one.
    fn later(&mut self, header: &Option<ChunkHeader>) -> Result<Option<u64>, HistoryError> {
        let sane = header.filter(|header| header.is_possible()).map(|header| self.at + header.total_bytes());
        let from = sane.unwrap_or(self.at + BLOCK_BYTES as u64);
        // The usual case costs nothing: it is in the window, or will be asked for next.
        if self.is_chunk(from)? {
            return Ok(Some(from));
        }
        self.search(from)
    }

    fn is_chunk(&mut self, at: u64) -> Result<bool, HistoryError> {
        let (group, number) = (self.group, self.number);
        let bytes = self.window.bytes(at, CHUNK_HEADER_BYTES)?;
        Ok(bytes.is_some_and(|bytes| ChunkHeader::decode(bytes, &group, number, at).is_some()))
    }

    /// The first block from `from` on in which a chunk begins. Holes are passed over: behind the end of an open layer is
    /// much space that is only reserved.
    fn search(&mut self, from: u64) -> Result<Option<u64>, HistoryError> {
        if self.nothing_from.is_some_and(|nothing| from >= nothing) {
            return Ok(None);
        }
        let mut at = from;
        let mut remains = false;
        while at < self.window.end {
            let Some((start, stop)) = sparse::next_data(self.window.file, at)? else { break };
            at = at.max(start - start % BLOCK_BYTES as u64);
            while at < stop.min(self.window.end) {
                let here = self.window.bytes(at, CHUNK_HEADER_BYTES)?;
                let magic = here.and_then(|bytes| bytes.first_chunk::<4>().map(|magic| u32::from_le_bytes(*magic)));
                remains |= here.is_some_and(|bytes| bytes.iter().any(|&byte| byte != 0));
                if magic == Some(CHUNK_MAGIC) && self.is_chunk(at)? {
                    return Ok(Some(at));
                }
                at += BLOCK_BYTES as u64;
            }
        }
        self.nothing_from = Some(from);
        self.remains |= remains;
        Ok(None)
    }

    /// Goes to the end and keeps everything. A closed layer has nothing behind its last chunk: what is there is damage.
    pub(super) fn collect(mut self, time_ns: u64) -> Result<(Recovered, Self), HistoryError> {
        let mut found = Recovered { complete_to: self.complete_to, last_time_ns: time_ns, ..Recovered::default() };
        loop {
            match self.next()? {
                Step::Chunk(info) => {
                    settle(&mut found.damage, &self.entries);
                    found.entries.extend_from_slice(&self.entries);
                    found.points += u64::from(info.points);
                    found.last_time_ns = found.last_time_ns.max(info.last_time_ns);
                    found.chunks.push(info);
                }
                Step::Damaged(damage) => found.damage.push(damage),
                Step::End { case, why } => {
                    if self.manner == Manner::Open {
                        found.torn = case != 'A' || self.is_torn()?;
                    } else {
                        found.damage.extend(self.cut(case, why));
                    }
                    break;
                }
            }
        }
        found.complete_to = self.complete_to;
        Ok((found, self))
    }

    /// The damage that a closed layer has if the walk ended here.
    pub(super) fn cut(&self, case: char, why: &'static str) -> Option<Damage> {
        let (offset, end) = (self.at, self.window.end);
        let first_height = self.complete_to;
        (offset < end).then(|| Damage { offset, bytes: end - offset, first_height, whole_from: None, case, why })
    }

    pub(super) fn complete_to(&self) -> u64 {
        self.complete_to
    }
}

/// The first records behind damage tell from which height on it is not felt.
pub(super) fn settle(damage: &mut [Damage], entries: &[Entry]) {
    let Some(lowest) = entries.iter().map(|entry| entry.height).min() else { return };
    damage.iter_mut().rev().take_while(|damage| damage.whole_from.is_none()).for_each(|damage| {
        damage.whole_from = Some(lowest);
    });
}

/// The points of a chunk, if the bytes are theirs.
pub(super) fn points_of(header: &ChunkHeader, bytes: &[u8]) -> Option<u64> {
    if crc32fast::hash(bytes) != header.points_crc.get() {
        return None;
    }
    let (count, first_time) = (header.points.get(), header.first_time_ns.get());
    let mut newest = header.last_time_ns.get();
    for point in Points::new(bytes, count, header.first_height.get(), first_time) {
        newest = point?.time_ns;
    }
    (newest == header.last_time_ns.get()).then_some(newest)
}

/// A part of the file in memory.
#[derive(Debug)]
pub(super) struct Window<'a> {
    file: &'a DirectFile,
    end: u64,
    tolerant: bool,
    buf: Option<AlignedBuf>,
    start: u64,
    len: usize,
}

impl<'a> Window<'a> {
    /// A window of its own over everything up to `end`.
    pub(super) fn new(file: &'a DirectFile, end: u64) -> Self {
        Self { file, end: end.min(file.len()), tolerant: false, buf: None, start: 0, len: 0 }
    }

    /// `len` bytes at `offset`; `None` past the end, or where the device cannot read and the walk is tolerant.
    /// `len` has been checked: it is at most a chunk's.
    pub(super) fn bytes(&mut self, offset: u64, len: usize) -> Result<Option<&[u8]>, HistoryError> {
        if offset.checked_add(len as u64).is_none_or(|end| end > self.end) {
            return Ok(None);
        }
        let held = self.start..self.start + self.len as u64;
        if !(held.contains(&offset) && offset + len as u64 <= held.end) {
            let start = offset - offset % BLOCK_BYTES as u64;
            let needed = ((offset + len as u64).next_multiple_of(BLOCK_BYTES as u64) - start) as usize;
            let room = needed.max(WINDOW_BYTES);
            if self.buf.as_ref().is_none_or(|buf| buf.len() < room) {
                self.buf = Some(AlignedBuf::new(room));
            }
            // Not valid while it is being read: an error must not leave a window that lies.
            self.len = 0;
            let Some(buf) = &mut self.buf else { return Ok(None) };
            let mut wanted =
                (self.file.len().min(self.end.next_multiple_of(BLOCK_BYTES as u64)) - start).min(room as u64);
            let mut read = self.file.read_exact_at(&mut buf[..wanted as usize], start);
            if read.is_err() && wanted > needed as u64 {
                // What lies behind is not needed now; it may be all that cannot be read.
                wanted = needed as u64;
                read = self.file.read_exact_at(&mut buf[..needed], start);
            }
            match read {
                Err(e) if self.tolerant && super::file::cannot_be_read(&e) => return Ok(None),
                other => other?,
            }
            (self.start, self.len) = (start, wanted as usize);
        }
        let from = (offset - self.start) as usize;
        Ok(self.buf.as_ref().map(|buf| &buf[from..from + len]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Over all combinations: one row each; only a chunk that is whole and chained is taken, and damage is only called
    /// damage where a crash cannot be the reason.
    #[test]
    fn the_table_is_complete_and_without_overlap() {
        for bits in 0..64u8 {
            let bit = |n: u8| bits & (1 << n) != 0;
            let facts =
                Facts { header: bit(0), sane: bit(1), tables: bit(2), chained: bit(3), followed: bit(4), data: bit(5) };
            assert_eq!(CASES.iter().filter(|case| fits(case, facts)).count(), 1, "{facts:?}");
            let (letter, _, verdict) = decide(facts);
            let whole = facts.header && facts.sane && facts.tables;
            let good = whole && facts.chained && (facts.data || facts.followed);
            assert_eq!(verdict == Verdict::Take, good, "{letter} {facts:?}");
            let impossible = (!whole && facts.followed) || (whole && !facts.chained);
            assert_eq!(verdict == Verdict::Damaged, impossible, "{letter} {facts:?}");
        }
    }

    #[test]
    fn letters_are_unique() {
        let mut letters: Vec<char> = CASES.iter().map(|case| case.letter).collect();
        letters.dedup();
        assert_eq!(letters, ['A', 'B', 'C', 'D', 'E', 'F', 'G', 'H', 'I', 'J']);
    }
}
