//! Entries into batches: bodies decoded, records turned into changes.

use super::plan::{BatchPlan, Piece, Source, Stamp};
use super::work::{Landed, Work};
use crate::failure::Failure;
use crate::group::stream::{Checked, StreamState, check_record, frame_of, onward_ns};
use crate::landing::Place;
use crate::landing::batch::Effect;
use crate::landing::reader::{Next, Reader, in_memory};
use crate::limits::{APPLY_BYTES_MAX, APPLY_RECORDS_MAX, APPLY_STORED_BYTES_MAX};
use bytes::Bytes;
use varve_common::clock::is_step;
use varve_common::format::{ENTRY_HEADER_BYTES, EntryHeader, Mark, MarkKind};
use varve_common::limits::FRAME_PLAIN_BYTES_MAX;
use varve_common::point::Consistency;
use varve_common::record::{RING_HEADER_BYTES, RecordHeader, RecordKind, Records};
use varve_common::wire::{Codec, FrameKind};
use varve_timeline::chronicle::Event;

/// One batch: changes and the memory that they refer to. Used again for the next one.
#[derive(Debug, Default)]
pub struct Batch {
    /// The changes.
    pub plan: BatchPlan,
    /// Decompressed bodies, and bodies read from the log.
    plain: Vec<u8>,
    plain_used: usize,
    /// Parts of arenas that hold bodies as they came.
    shared: Vec<Bytes>,
    /// Height and time of every record of the stream, whether it changed anything or not.
    pub points: Vec<(u64, u64)>,
    /// What happened to the stream in it, in order.
    pub events: Vec<Event>,
    /// Plain bytes in it.
    pub plain_bytes: usize,
    stored_bytes: usize,
}

impl Batch {
    /// Forgets the last one; memory of arenas is free from here on.
    pub fn clear(&mut self) {
        self.plan.clear();
        self.plain_used = 0;
        self.shared.clear();
        self.points.clear();
        self.events.clear();
        self.plain_bytes = 0;
        self.stored_bytes = 0;
    }

    /// Frees what is only needed while there is work.
    pub fn rest(&mut self) {
        *self = Self::default();
    }

    /// Whether another frame of any size may be too much.
    fn is_full(&self) -> bool {
        self.plain_bytes + FRAME_PLAIN_BYTES_MAX > APPLY_BYTES_MAX
            || self.stored_bytes + FRAME_PLAIN_BYTES_MAX > APPLY_STORED_BYTES_MAX
            || self.points.len() >= APPLY_RECORDS_MAX
    }

    /// The memory that the changes' sources name.
    pub fn buffers(&self) -> Vec<&[u8]> {
        let mut buffers: Vec<&[u8]> = Vec::with_capacity(1 + self.shared.len());
        buffers.push(&self.plain[..self.plain_used]);
        buffers.extend(self.shared.iter().map(|part| &part[..]));
        buffers
    }

    /// Adds the records of a data entry that begins at `state`. `shared` is the memory in which `body` lies at an offset,
    /// if it may be kept. Gives the newest record's time; or `Later`, and nothing is added.
    fn add(
        &mut self,
        state: &StreamState,
        header: &EntryHeader,
        body: &[u8],
        shared: Option<(&Bytes, usize)>,
        volumes: &[u64],
    ) -> Result<Added, Failure> {
        let damaged = |why: String| Failure::damaged(format!("an entry of the landing log that was checked: {why}"));
        let frame = frame_of(header).ok_or_else(|| damaged("unknown codec".to_owned()))?;
        let used = self.plain_used;
        let (buffer, base) = match (frame.codec, shared) {
            (Codec::Plain, Some((part, offset))) => (self.keep(part), offset),
            (Codec::Plain, None) => {
                let base = self.reserve(body.len());
                self.plain[base..base + body.len()].copy_from_slice(body);
                (0, base)
            }
            (Codec::Lz4, _) => {
                let base = self.reserve(frame.plain_bytes);
                let target = &mut self.plain[base..base + frame.plain_bytes];
                match lz4_flex::block::decompress_into(body, target) {
                    Ok(bytes) if bytes == frame.plain_bytes => (0, base),
                    _ => return Err(damaged("it does not decompress".to_owned())),
                }
            }
        };
        let plain = match (buffer, frame.codec) {
            (0, _) => &self.plain[base..base + frame.plain_bytes],
            _ => body,
        };
        if let Some(Ok(first)) = Records::new(frame.position, plain).next()
            && !self.points.is_empty()
            && is_step(state.at.time_ns, first.header.time_ns.get())
        {
            self.plain_used = used;
            return Ok(Added::Later);
        }
        self.stored_bytes += body.len();
        self.plain_bytes += frame.plain_bytes;
        let mut time_ns = None;
        for record in Records::new(frame.position, plain) {
            let record = record.map_err(|e| damaged(e.to_string()))?;
            check_record(&record, volumes).map_err(|e| damaged(e.to_string()))?;
            // As the stream's state has it: a time that is not older than any before. Only the first one of a frame may say
            // that the clock was set right: it decides for all of the frame here as it does there.
            let now_ns = match time_ns {
                None => onward_ns(state.at.time_ns, record.header.time_ns.get()),
                Some(before_ns) => record.header.time_ns.get().max(before_ns),
            };
            time_ns = Some(now_ns);
            let height = state.height + (record.end - frame.position);
            self.points.push((height, now_ns));
            if record.kind == RecordKind::Bookmark {
                let name = String::from_utf8_lossy(record.payload).into_owned();
                let (time_ns, consistency) = (now_ns, Consistency::Crash);
                let event = Event::Bookmark { height, time_ns, name, consistency };
                // The agent checks names. One that gets past it must not stop the group.
                match event.is_possible() {
                    true => self.events.push(event),
                    false => tracing::warn!(?event, "a bookmark whose name cannot be is passed over"),
                }
            }
            if !record.kind.changes_data() {
                continue;
            }
            let payload = record.position - frame.position + RING_HEADER_BYTES + size_of::<RecordHeader>() as u64;
            let source = Source { buffer, offset: base as u32 + payload as u32 };
            let start = record.header.offset.get();
            let piece = Piece {
                volume: record.header.volume.get(),
                start,
                end: start + record.header.length.get(),
                source: (record.kind == RecordKind::Write).then_some(source),
            };
            self.plan.push(piece, Stamp { height });
        }
        Ok(Added::All { time_ns })
    }

    /// The number of this memory among the batch's buffers.
    fn keep(&mut self, part: &Bytes) -> u32 {
        let same = |last: &Bytes| last.as_ptr() == part.as_ptr() && last.len() == part.len();
        if !self.shared.last().is_some_and(same) {
            self.shared.push(part.clone());
        }
        self.shared.len() as u32
    }

    /// Room for `bytes` in `plain`; gives where. What is there already is not cleared: it is overwritten.
    fn reserve(&mut self, bytes: usize) -> usize {
        let base = self.plain_used;
        self.plain_used += bytes;
        if self.plain.len() < self.plain_used {
            self.plain.resize(self.plain_used, 0);
        }
        base
    }
}

/// What the timeline is told of a mark that was passed. A gap's begin is the last good point, in height and in time: the mark
/// was made when the agent got there, which after an outage is long after the first write that is missing. What the stream says
/// after it stands higher.
fn events_of(mark: &Mark, before: &StreamState, after: &StreamState) -> Vec<Event> {
    let time_ns = after.at.time_ns;
    let began_ns = if before.is_consistent() { before.at.time_ns } else { time_ns };
    let opens = |reason| Event::GapBegin { height: before.height, time_ns: began_ns, reason };
    let rebase = Event::Begin {
        height: after.height,
        time_ns,
        incarnation: mark.incarnation,
        position: mark.position,
        epoch: mark.epoch,
    };
    match mark.kind {
        MarkKind::GapEnd => vec![Event::GapEnd { height: after.height, time_ns }, rebase],
        MarkKind::Begin | MarkKind::GapBegin => match after.gap {
            // A mark of our own may stand where a gap's end was lost: the chronicle has heard of that end.
            Some(reason) if before.ever_consistent && (before.gap != after.gap || mark.height_min > 0) => {
                vec![opens(reason), rebase]
            }
            _ => vec![rebase],
        },
    }
}

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Added {
    /// All its records are in the batch.
    All {
        /// Of the newest one.
        time_ns: Option<u64>,
    },
    /// The source's clock was set before it. A batch is dated as a whole: this is for the next one.
    Later,
}

/// A step through what is open.
enum Stepped {
    /// Past an entry.
    Past(Effect),
    /// There was none left.
    Used,
    /// See [`Added::Later`].
    Later,
}

/// What ended a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The work that was open is used up.
    Used,
    /// The batch is full.
    Full,
    /// A mark was passed: what comes after is another batch.
    Mark,
    /// So is what the source dated after its clock was set.
    ClockSet,
}

/// Where the applier stands in the log, and the work it has open.
#[derive(Debug)]
pub struct Cursor {
    reader: Reader,
    open: Option<Open>,
    /// The stream's state there.
    pub state: StreamState,
}

#[derive(Debug)]
enum Open {
    Memory { landed: Landed, at: usize },
    Log { until: Place },
}

impl Cursor {
    /// Begins where the reader is.
    pub fn new(reader: Reader, state: StreamState) -> Self {
        Self { reader, open: None, state }
    }

    /// Takes entries that come next; an action is not entries.
    pub fn open(&mut self, work: Work) -> Option<super::work::Action> {
        debug_assert!(self.open.is_none());
        match work {
            Work::Landed(landed) => self.open = Some(Open::Memory { landed, at: 0 }),
            Work::Log { until } => self.open = Some(Open::Log { until }),
            Work::Act(action) => return Some(action),
        }
        None
    }

    /// Whether there are entries left of what was opened.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Where the next entry stands (or the padding before it).
    pub fn place(&self) -> Place {
        self.reader.place()
    }

    /// CRC of the header before it.
    pub fn chain(&self) -> u32 {
        self.reader.chain()
    }

    /// Frees what is only needed while there is work.
    pub fn rest(&mut self) {
        self.reader.rest();
    }

    /// Moves entries into the batch until it is full, a mark was passed, or none are left.
    pub fn fill(&mut self, batch: &mut Batch, volumes: &[u64]) -> Result<Ended, Failure> {
        loop {
            if batch.is_full() {
                return Ok(Ended::Full);
            }
            let stepped = match self.open.take() {
                None => return Ok(Ended::Used),
                Some(Open::Memory { landed, at }) => self.step_in_memory(landed, at, batch, volumes)?,
                Some(Open::Log { until }) => self.step_in_log(until, batch, volumes)?,
            };
            let effect = match stepped {
                Stepped::Past(effect) => effect,
                Stepped::Used => return Ok(Ended::Used),
                Stepped::Later => return Ok(Ended::ClockSet),
            };
            let before = self.state;
            self.state.pass(&effect);
            if let Effect::Mark(mark) = effect {
                batch.events.extend(events_of(&mark, &before, &self.state));
                return Ok(Ended::Mark);
            }
        }
    }

    fn step_in_memory(
        &mut self,
        landed: Landed,
        at: usize,
        batch: &mut Batch,
        volumes: &[u64],
    ) -> Result<Stepped, Failure> {
        if at >= landed.entry_bytes {
            self.reader.jump(landed.end(), self.reader.chain());
            return Ok(Stepped::Used);
        }
        let place = Place { offset: landed.place.offset + at as u64, ..landed.place };
        let lost = || Failure::damaged(format!("no entry in memory at {place:?}"));
        let (header, body) = in_memory(&landed.bytes, at, place).ok_or_else(lost)?;
        let effect = check_place(&self.state, &header, body).ok_or_else(lost)?.effect;
        let effect = match effect {
            Effect::Data { end, .. } => {
                let shared = Some((&landed.bytes, at + ENTRY_HEADER_BYTES));
                match batch.add(&self.state, &header, body, shared, volumes)? {
                    Added::All { time_ns } => Effect::Data { end, time_ns },
                    Added::Later => {
                        self.open = Some(Open::Memory { landed, at });
                        return Ok(Stepped::Later);
                    }
                }
            }
            mark => mark,
        };
        let next = at + header.total_bytes();
        self.reader.jump(Place { offset: landed.place.offset + next as u64, ..place }, header.header_crc.get());
        self.open = Some(Open::Memory { landed, at: next });
        Ok(Stepped::Past(effect))
    }

    fn step_in_log(&mut self, until: Place, batch: &mut Batch, volumes: &[u64]) -> Result<Stepped, Failure> {
        // Exactly: more entries may begin in the block in which the last one ends.
        let (place, chain) = (self.reader.place(), self.reader.chain());
        if place >= until {
            return Ok(Stepped::Used);
        }
        let state = self.state;
        self.reader.allow(until);
        let effect = match self.reader.next(|header, body| check_place(&state, header, body))? {
            Next::Entry(header, body, checked) => match checked.effect {
                Effect::Data { end, .. } => match batch.add(&state, &header, body, None, volumes)? {
                    Added::All { time_ns } => Effect::Data { end, time_ns },
                    Added::Later => {
                        self.reader.jump(place, chain);
                        self.open = Some(Open::Log { until });
                        return Ok(Stepped::Later);
                    }
                },
                mark => mark,
            },
            Next::End => return Err(Failure::damaged(format!("the landing log ends before {until:?}"))),
            Next::Damaged(why) => return Err(Failure::damaged(format!("the landing log before {until:?}: {why}"))),
        };
        self.open = Some(Open::Log { until });
        Ok(Stepped::Past(effect))
    }
}

/// Whether an entry continues the stream, by its header; the records are checked as they become changes.
fn check_place(state: &StreamState, header: &EntryHeader, body: &[u8]) -> Option<Checked> {
    let position = header.position.get();
    let effect = match FrameKind::from_number(header.kind)? {
        FrameKind::Data => {
            let follows = header.incarnation == state.at.incarnation && position == state.at.position;
            let end = position.checked_add(u64::from(header.plain_bytes.get()))?;
            follows.then_some(Effect::Data { end, time_ns: None })?
        }
        FrameKind::Mark => Effect::Mark(Mark::decode(body).filter(|mark| state.admits(mark))?),
        _ => return None,
    };
    Some(Checked { effect })
}

#[cfg(test)]
mod tests {
    use super::*;
    use varve_common::state::GapReason;

    /// After an outage the mark of a gap is made minutes after the first write that is missing: none of the times between is
    /// a point.
    #[test]
    fn a_gap_begins_with_the_last_good_point_in_time_too() {
        let mut state = StreamState::fresh();
        let mark = |kind, reason, time_ns| {
            Effect::Mark(Mark { kind, reason, incarnation: [1; 16], position: 64, time_ns, epoch: 1, height_min: 0 })
        };
        let mut pass = |effect: Effect| {
            let before = state;
            state.pass(&effect);
            match effect {
                Effect::Mark(mark) => events_of(&mark, &before, &state),
                Effect::Data { .. } => Vec::new(),
            }
        };
        pass(mark(MarkKind::Begin, Some(GapReason::InitialSync), 10));
        pass(mark(MarkKind::GapEnd, None, 20));
        let events = pass(mark(MarkKind::GapBegin, Some(GapReason::RingFull), 1000));
        assert!(matches!(events[0], Event::GapBegin { time_ns: 20, .. }), "{events:?}");
        // Another reason for the gap that is open is of its own time.
        let events = pass(mark(MarkKind::Begin, Some(GapReason::NewRing), 2000));
        assert!(matches!(events[0], Event::GapBegin { time_ns: 2000, .. }), "{events:?}");
    }
}
