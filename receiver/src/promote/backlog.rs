//! What is landed and not in the replicas when a group is taken over: its devices read that from the landing log, so nobody
//! waits for the applier.
//!
//! ```text
//! a read of a promoted volume, the upper one wins:
//!   what was written to it since        (StreamWriter's memory)
//!   this backlog                        (index in memory, bytes in the landing log)
//!   the replica                         or, until it is rolled back to an older point, a view of that point
//! ```
//!
//! The landing log is read once, from the applied mark to its end, while nobody lands anything. Of each byte the index
//! keeps the newest record that counts: up to the point that was taken, and (after a restart) of the promoted stream itself.
//! Records between the two are undone by the rollback and left out. It never changes afterwards.
//!
//! Why a read is right although the applier works beneath it. Let `r` be the newest record of the backlog over a byte:
//! - `r` not applied when the read began: the log's bytes are taken, whatever the replica holds: some older record's, or
//!   `r`'s, half written or written before a crash.
//! - `r` applied: [`Timeline::applied`] is raised after the replica was written and before its segment can be recycled, so
//!   the replica, read after the question, has `r` or something newer. Something newer can only be a promoted write. Such a
//!   one is asked for before (it is pending, and goes on top), or it is applied, too, and then the backlog is
//!   over: a write that is not pending any more when it is asked for is above everything in here.
//! - the segment went while it was read: `r` is applied now, and the read begins again.
//! - the point is older: the applier brings the replica past it, then rolls it back. The view beneath takes what the point
//!   had from the layers as soon as a record above the point is to be applied (it is findable before the replica changes), and
//!   this backlog has what the replica lacks of the point meanwhile.
//!
//! What it does not stand is a replica that falls behind where it was within the daemon's life (the group failed and was
//! opened again under the devices): then reads fail, see [`super::disk`].

use crate::failure::Failure;
use crate::group::live::{Anchor, Live};
use crate::group::stream::{Checker, StreamState};
use crate::landing::fetch::{EntryPlace, Fetcher};
use crate::landing::log::Log;
use crate::landing::reader::{Next, Reader};
use crate::limits::BACKLOG_PIECES_MAX;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use varve_common::record::{RING_HEADER_BYTES, RecordHeader, RecordKind};
use varve_timeline::timeline::Timeline;

/// How often the log may be recycled under whoever reads all of it.
const RETRIES_MAX: usize = 100;

/// Which records count.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Up to this height: the point that was taken.
    pub point: u64,
    /// And above this one: where the promoted stream began.
    pub own_above: u64,
}

impl Wanted {
    fn has(&self, height: u64) -> bool {
        height <= self.point || height > self.own_above
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Backlog {
    timeline: Arc<Timeline>,
    fetcher: Arc<Fetcher>,
    /// Gone as soon as everything in it is applied.
    index: Mutex<Option<Arc<Index>>>,
}

/// The newest content of each byte.
#[derive(Debug, Default)]
struct Index {
    /// By volume and first byte; they do not overlap.
    pieces: BTreeMap<(u16, u64), Piece>,
    entries: Vec<EntryPlace>,
    /// The height of the newest record in it.
    until: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    end: u64,
    height: u64,
    /// Entry, and offset in its plain body; `None`: zeroes.
    source: Option<(u32, u32)>,
}

impl Piece {
    /// Without its first bytes.
    fn skip(self, bytes: u64) -> Self {
        Self { source: self.source.map(|(entry, offset)| (entry, offset + bytes as u32)), ..self }
    }
}

/// A stretch of what was asked for.
#[derive(Clone, Debug)]
pub struct Covered {
    /// Bytes of the volume.
    pub range: Range<u64>,
    /// `None`: zeroes.
    source: Option<(EntryPlace, u32)>,
}

/// Why a log was not read to its end.
#[derive(Debug)]
pub enum ScanError {
    /// More pieces than may be in memory: the applier must go on first.
    TooMany,
    /// For the operator.
    Failed(String),
}

impl Backlog {
    /// Reads the log up to `landed`, where nobody lands anything meanwhile. Blocks.
    ///
    /// # Errors
    /// See [`ScanError`].
    pub fn read(
        log: &Arc<Log>,
        fetcher: &Arc<Fetcher>,
        live: &Live,
        timeline: &Arc<Timeline>,
        landed: &StreamState,
        volumes: &[u64],
        wanted: Wanted,
    ) -> Result<Self, ScanError> {
        let lost = || ScanError::Failed("the landing log ends before what is landed".to_owned());
        for _ in 0..RETRIES_MAX {
            let anchor = live.anchor().ok_or_else(lost)?;
            if let Some(index) = scan(log, anchor, timeline.applied().height, landed.height, volumes, wanted)? {
                let index = Mutex::new(Some(Arc::new(index)));
                return Ok(Self { timeline: timeline.clone(), fetcher: fetcher.clone(), index });
            }
            if live.anchor() == Some(anchor) {
                return Err(lost());
            }
        }
        Err(lost())
    }

    /// What may be asked of it; nothing, once all of it is applied.
    fn index(&self, applied: u64) -> Option<Arc<Index>> {
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        if index.as_ref().is_some_and(|index| index.until <= applied) {
            *index = None;
        }
        index.clone()
    }

    /// What of a range is not in the replica yet, each byte at most once. To be asked before the replica is read.
    pub fn covered(&self, volume: u16, start: u64, end: u64) -> Vec<Covered> {
        let applied = self.timeline.applied().height;
        let Some(index) = self.index(applied) else { return Vec::new() };
        index.covered(volume, start, end, applied)
    }

    /// Fills `target` with a stretch of it. `false`: it is applied meanwhile, and whoever reads begins again.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn fill(&self, covered: &Covered, target: &mut [u8]) -> Result<bool, Failure> {
        match covered.source {
            Some((entry, offset)) => self.fetcher.fill(entry, offset, target),
            None => {
                target.fill(0);
                Ok(true)
            }
        }
    }
}

/// `None`: the log went on under it.
fn scan(
    log: &Arc<Log>,
    anchor: Anchor,
    applied: u64,
    landed: u64,
    volumes: &[u64],
    wanted: Wanted,
) -> Result<Option<Index>, ScanError> {
    let mut reader = Reader::new(log.clone(), anchor.place, anchor.chain);
    let (mut checker, mut state, mut index) = (Checker::new(volumes), anchor.state, Index::default());
    // Of one entry: it counts when all of it was found right.
    let mut found: Vec<(u16, u64, Piece)> = Vec::new();
    while state.height < landed {
        found.clear();
        let number = index.entries.len() as u32;
        let next = reader.next(|header, body| {
            let begin = header.position.get();
            checker.check_each(&state, header, body, |record| {
                let height = state.height + (record.end - begin);
                if !record.kind.changes_data() || height <= applied || !wanted.has(height) {
                    return;
                }
                let payload = record.position - begin + RING_HEADER_BYTES + size_of::<RecordHeader>() as u64;
                let source = (record.kind == RecordKind::Write).then_some((number, payload as u32));
                let start = record.header.offset.get();
                let piece = Piece { end: start + record.header.length.get(), height, source };
                found.push((record.header.volume.get(), start, piece));
            })
        });
        let (header, checked) = match next {
            Ok(Next::Entry(header, _, checked)) => (header, checked),
            Ok(Next::End | Next::Damaged(_)) => return Ok(None),
            Err(failure) => return Err(ScanError::Failed(failure.text)),
        };
        let bytes = header.total_bytes() as u32;
        let end = reader.place();
        let place = crate::landing::Place { offset: end.offset - u64::from(bytes), ..end };
        state.pass(&checked.effect);
        if found.is_empty() {
            continue;
        }
        index.entries.push(EntryPlace { place, bytes, position: header.position.get() });
        for (volume, start, piece) in found.drain(..) {
            index.put(volume, start, piece);
        }
        if index.pieces.len().max(index.entries.len()) > BACKLOG_PIECES_MAX {
            return Err(ScanError::TooMany);
        }
    }
    Ok(Some(index))
}

impl Index {
    /// The newest record so far.
    fn put(&mut self, volume: u16, start: u64, piece: Piece) {
        let end = piece.end;
        if start >= end {
            return;
        }
        self.until = self.until.max(piece.height);
        // One may begin before and reach into it, or beyond it.
        let before = self.pieces.range_mut((volume, 0)..(volume, start)).next_back();
        if let Some((&(_, from), older)) = before
            && older.end > start
        {
            let rest = (older.end > end).then(|| older.skip(end - from));
            older.end = start;
            if let Some(rest) = rest {
                self.pieces.insert((volume, end), rest);
            }
        }
        while let Some((&(_, from), &older)) = self.pieces.range((volume, start)..(volume, end)).next() {
            self.pieces.remove(&(volume, from));
            if older.end > end {
                self.pieces.insert((volume, end), older.skip(end - from));
            }
        }
        self.pieces.insert((volume, start), piece);
    }

    fn covered(&self, volume: u16, start: u64, end: u64, applied: u64) -> Vec<Covered> {
        let before = self.pieces.range((volume, 0)..(volume, start)).next_back();
        let inside = self.pieces.range((volume, start)..(volume, end));
        let all = before.into_iter().chain(inside).filter(|(_, piece)| piece.end > start && piece.height > applied);
        let cut = |(&(_, from), piece): (&(u16, u64), &Piece)| {
            let range = from.max(start)..piece.end.min(end);
            let piece = piece.skip(range.start - from);
            let source = piece.source.map(|(entry, offset)| (self.entries[entry as usize], offset));
            Covered { range, source }
        };
        all.map(cut).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::landing::Place;
    use proptest::prelude::*;

    const BYTES: u64 = 3000;

    proptest! {
        /// Of every byte the newest record, as long as that is not applied; older ones never show again.
        #[test]
        fn every_byte_is_of_its_newest_record(
            records in prop::collection::vec((0u16..2, 0..BYTES, 1u64..400, any::<bool>()), 1..80),
            asks in prop::collection::vec((0u16..2, 0..BYTES, 1u64..1000, 0u64..90), 1..20),
        ) {
            let mut index = Index::default();
            // Height and record of each byte.
            let mut model = vec![vec![None; BYTES as usize]; 2];
            for (number, (volume, start, len, zero)) in records.into_iter().enumerate() {
                let (height, end) = (number as u64 + 1, (start + len).min(BYTES));
                index.entries.push(EntryPlace { place: Place { segment: height, offset: 0 }, bytes: 0, position: 0 });
                let source = (!zero).then_some((number as u32, 1000));
                index.put(volume, start, Piece { end, height, source });
                for byte in start..end {
                    let at = (!zero).then_some((height, 1000 + (byte - start) as u32));
                    model[volume as usize][byte as usize] = Some((height, at));
                }
            }
            for (volume, start, len, applied) in asks {
                let end = (start + len).min(BYTES);
                let mut found = vec![None; BYTES as usize];
                for covered in index.covered(volume, start, end, applied) {
                    prop_assert!(covered.range.start >= start && covered.range.end <= end);
                    for byte in covered.range.clone() {
                        let skipped = (byte - covered.range.start) as u32;
                        let at = covered.source.map(|(entry, offset)| (entry.place.segment, offset + skipped));
                        prop_assert!(found[byte as usize].replace(at).is_none(), "byte {} twice", byte);
                    }
                }
                for byte in start..end {
                    let newest = model[volume as usize][byte as usize];
                    let wanted = newest.filter(|(height, _)| *height > applied).map(|(_, at)| at);
                    prop_assert_eq!(found[byte as usize], wanted, "byte {} of {}", byte, volume);
                }
            }
        }
    }
}
