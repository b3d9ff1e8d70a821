//! The thread that brings the replicas forward. It alone writes to them, so order is order.

use super::behind::Behind;
use super::collect::{Batch, Cursor, Ended};
use super::history::{History, Kept, Whose, stage_bytes};
use super::mark::AppliedFile;
use super::plan::{BatchPlan, Piece, Source, Stamp};
use super::probe::Probes;
use super::replica::{Reading, Replicas};
use super::work::{Action, Answer, Answered, Given, Queue};
use crate::failpoint;
use crate::failure::Failure;
use crate::group::live::{Anchor, Live};
use crate::group::stream::{IMAGE_HEIGHT, StreamState};
use crate::landing::log::Log;
use crate::limits::{
    BEFORE_STAGE_BYTES, GATHER_TIME_MAX, IMAGE_BYTES_PER_SYNC, IMAGES_AT_ONCE_BYTES, PART_STAGE_BYTES, STAGE_BYTES,
    UNSYNCED_BYTES_MAX, UNSYNCED_TIME_MAX, ZERO_PIECE_BYTES,
};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use varve_common::clock::is_step;
use varve_common::limits::REGION_BYTES;
use varve_common::wire::messages::{ImageDone, Probe};
use varve_common::wire::{IMAGE_BODY_BYTES_MAX, Image};

/// After this long without work, memory that only work needs is freed.
const REST_AFTER: Duration = Duration::from_secs(10);

/// Everything that the thread owns.
pub struct Applier {
    /// Shared with the session and the status.
    pub live: Arc<Live>,
    /// What to do.
    pub queue: Arc<Queue>,
    /// To be recycled.
    pub log: Arc<Log>,
    /// Sizes of the volumes.
    pub volumes: Vec<u64>,
    /// The replicas.
    pub replicas: Replicas,
    /// The applied mark.
    pub mark: AppliedFile,
    /// Where it stands.
    pub cursor: Cursor,
    /// Taken before the replicas change.
    pub history: History,
    /// When memory that is only needed while there is work goes back, unless there is work before. Canaries are none: with
    /// an agent connected they never end.
    pub rest_at: Instant,
    /// What was applied last is not yet said to be: some of it is late.
    pub is_late: bool,
}

/// What was done since the last sync.
#[derive(Default)]
pub(super) struct Unsynced {
    bytes: usize,
    since: Option<Instant>,
    image_bytes: usize,
    images: Vec<(Answer, ImageDone)>,
}

/// What is used again from batch to batch.
#[derive(Default)]
struct Scratch {
    batch: Batch,
    part: BatchPlan,
    probes: Option<Probes>,
}

impl Applier {
    /// Works until the queue is closed or something fails; the reason then stands in the group's state.
    pub fn run(mut self) {
        let (mut unsynced, mut scratch) = (Unsynced::default(), Scratch::default());
        // Whatever ends it: the lander must not wait for a segment that nobody frees, nor the session for an answer.
        let worked = catch_unwind(AssertUnwindSafe(|| self.work(&mut unsynced, &mut scratch)));
        let panicked = || Failure::damaged("the applier panicked; the receiver's log says where");
        if let Err(failure) = worked.unwrap_or_else(|_| Err(panicked())) {
            self.live.fail(failure);
        }
        self.queue.close();
        self.log.close();
    }

    fn work(&mut self, unsynced: &mut Unsynced, scratch: &mut Scratch) -> Result<(), Failure> {
        self.take_over(unsynced, &mut scratch.part)?;
        loop {
            if self.cursor.is_open() {
                self.batch(unsynced, scratch)?;
                continue;
            }
            let images_wait = !unsynced.images.is_empty();
            if images_wait && (self.queue.is_empty() || unsynced.image_bytes >= IMAGE_BYTES_PER_SYNC) {
                self.sync(unsynced)?;
                continue;
            }
            if unsynced.since.is_none() && self.rest_at <= Instant::now() {
                self.rest(scratch)?;
            }
            let deadline = unsynced.since.map_or(self.rest_at, |since| since + UNSYNCED_TIME_MAX);
            match self.queue.take(Some(deadline)) {
                Given::Work(work) => match self.cursor.open(work) {
                    Some(action) => self.act(action, unsynced, scratch)?,
                    None => continue,
                },
                Given::Nothing if unsynced.since.is_some() => self.sync(unsynced)?,
                Given::Nothing => continue,
                Given::Closed => return self.sync(unsynced),
            }
            self.sync_if_due(unsynced)?;
        }
    }

    /// Applies what is open, together with what waits behind it and what comes soon.
    fn batch(&mut self, unsynced: &mut Unsynced, scratch: &mut Scratch) -> Result<(), Failure> {
        failpoint::hold(failpoint::APPLY_HELD, || self.queue.is_closed());
        let batch = &mut scratch.batch;
        batch.clear();
        let (before, mut action) = (self.cursor.state, None);
        // A mark ends the batch, so this holds for all of it.
        let past_counts = self.cursor.state.ever_consistent;
        let gather_until = Instant::now() + GATHER_TIME_MAX;
        let ended = loop {
            let ended = self.cursor.fill(batch, &self.volumes)?;
            if ended != Ended::Used {
                break ended;
            }
            // Somebody waits for images to be done, or for a segment, or what is late for this batch.
            let pressed = !unsynced.images.is_empty() || self.log.is_starved() || self.is_late;
            let deadline = if pressed { Instant::now() } else { gather_until };
            match self.queue.take(Some(deadline)) {
                Given::Work(work) => action = self.cursor.open(work),
                Given::Nothing => break ended,
                // What is in the batch is applied; what waits stays in the log. The next take says it again.
                Given::Closed => break ended,
            }
            if action.is_some() {
                break ended;
            }
        };
        if batch.points.first().is_some_and(|(_, time_ns)| is_step(before.at.time_ns, *time_ns)) {
            // Times are looked for from here on by another clock, and must find what was before.
            self.bring_late(&before)?;
        }
        if past_counts {
            self.history.points(&batch.points)?;
        }
        if !batch.plan.is_empty() {
            self.worked();
        }
        // It ends without a mark, and the next one follows at once: nobody need see where.
        let goes_on = ended == Ended::Full && self.cursor.is_open() && action.is_none();
        self.is_late = true;
        self.changes(batch, &mut scratch.part, past_counts, goes_on)?;
        let batch = &mut scratch.batch;
        // Before anything that comes after them: a gap must be known when its first image is there.
        self.history.events(&batch.events)?;
        if !goes_on {
            let state = self.cursor.state;
            self.bring_late(&state)?;
        }
        let counters = &self.live.counters;
        counters.applied_bytes.fetch_add(batch.plain_bytes as u64, Ordering::Relaxed);
        counters.applied_batches.fetch_add(1, Ordering::Relaxed);
        counters.applied_records.fetch_add(batch.plan.len() as u64, Ordering::Relaxed);
        unsynced.bytes += batch.plain_bytes;
        unsynced.since.get_or_insert_with(Instant::now);
        // The memory of arenas goes back at once, not with the next batch.
        batch.clear();
        self.live.answered();
        self.take_over(unsynced, &mut scratch.part)?;
        if let Some(action) = action {
            self.act(action, unsynced, scratch)?;
        }
        self.sync_if_due(unsynced)
    }

    /// The replicas have what is applied, which is all up to this state, and everybody may know.
    fn bring_late(&mut self, applied: &StreamState) -> Result<(), Failure> {
        if !self.is_late {
            return Ok(());
        }
        self.history.bring_late(&mut self.replicas)?;
        self.history.applied(applied)?;
        self.is_late = false;
        Ok(())
    }

    /// Brings a batch's changes to the replicas in parts that fit the stage. `goes_on`: another batch follows, so some may be late.
    fn changes(
        &mut self,
        batch: &Batch,
        part: &mut BatchPlan,
        past_counts: bool,
        goes_on: bool,
    ) -> Result<(), Failure> {
        let is_long = |piece: &Piece| piece.source.is_none() && piece.bytes() > ZERO_PIECE_BYTES;
        let any_long = batch.plan.as_pushed().iter().any(is_long);
        if any_long {
            // They are not written where the replicas have holes.
            self.history.bring_late(&mut self.replicas)?;
        }
        let buffers = batch.buffers();
        part.clear();
        self.in_parts(&buffers, past_counts, |parts| {
            parts.late = goes_on && !any_long;
            let (mut staged, mut complete_to) = (0, 0);
            for (piece, stamp) in batch.plan.changes() {
                let long = is_long(piece);
                if long || staged + stage_bytes(piece) > PART_STAGE_BYTES {
                    parts.next(part, Some(complete_to), true)?;
                    staged = 0;
                }
                if long {
                    parts.long_zeroes(piece, *stamp, part, complete_to)?;
                } else {
                    part.push(*piece, *stamp);
                    staged += stage_bytes(piece);
                }
                complete_to = stamp.height;
            }
            // Records behind the last change changed nothing: they are points as well.
            let complete_to = batch.points.last().map_or(complete_to, |(height, _)| complete_to.max(*height));
            parts.next(part, Some(complete_to), parts.late)?;
            parts.finish()
        })
    }

    /// Does what goes to the replicas part by part. The replicas are as they shall be when it returns without an error.
    pub(super) fn in_parts<T>(
        &mut self,
        buffers: &[&[u8]],
        past_counts: bool,
        work: impl FnOnce(&mut Parts<'_, '_, '_>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let (replicas, writer) = self.replicas.split();
        let (history, height) = (&mut self.history, self.cursor.state.height);
        std::thread::scope(|scope| {
            let behind = Behind::new(scope, replicas.all(), writer, buffers);
            work(&mut Parts { history, replicas, behind, buffers, past_counts, height, late: false })
        })
    }

    /// A single part, which is no part of the stream: see [`Parts::next`].
    pub(super) fn part(&mut self, part: &mut BatchPlan, buffers: &[&[u8]], past_counts: bool) -> Result<(), Failure> {
        self.in_parts(buffers, past_counts, |parts| parts.next(part, None, false))
    }

    fn act(&mut self, action: Action, unsynced: &mut Unsynced, scratch: &mut Scratch) -> Result<(), Failure> {
        self.worked();
        match action {
            Action::Probe(probe, answer) => self.probes(probe, answer, unsynced, scratch),
            Action::Image(body, answer) => self.images(body, answer, unsynced, scratch),
            Action::Rollback(order) => {
                self.rollback(&order, &mut scratch.part)?;
                self.sync(unsynced)?;
                order.finished();
                Ok(())
            }
        }
    }

    /// A probe, and those that wait behind it: some are read while the ones before are digested.
    fn probes(
        &mut self,
        probe: Probe,
        answer: Answer,
        unsynced: &Unsynced,
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let probes = match &mut scratch.probes {
            Some(probes) => probes,
            none => none.insert(Probes::new().map_err(|e| Failure::io("io_uring", &e))?),
        };
        let list = self.replicas.all();
        let mut first = Some((probe, answer));
        loop {
            // What is written and not synced does not wait for all of them.
            let next = || (!self.is_sync_due(unsynced)).then(|| self.queue.take_probe()).flatten();
            while !probes.is_full()
                && let Some((probe, answer)) = first.take().or_else(next)
            {
                probes.add(list, probe, answer)?;
            }
            if !probes.answer(list)? {
                return Ok(());
            }
            self.live.answered();
        }
    }

    /// An image, and those that wait behind it: one write of several is much faster than as many writes.
    fn images(
        &mut self,
        body: Vec<u8>,
        answer: Answer,
        unsynced: &mut Unsynced,
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let damaged = |why: &str| Failure::damaged(format!("an image that was checked: {why}"));
        let stamp = Stamp { height: self.cursor.state.height + IMAGE_HEIGHT };
        let mut bytes = body.len();
        let (mut bodies, mut answers) = (vec![body], vec![answer]);
        while bytes + IMAGE_BODY_BYTES_MAX <= IMAGES_AT_ONCE_BYTES
            && let Some((body, answer)) = self.queue.take_image()
        {
            bytes += body.len();
            bodies.push(body);
            answers.push(answer);
        }
        if self.mark.slot().consistent != 0 {
            // An image holds bytes of a later time. The mark on disk must say that a gap is open before they are there.
            self.sync(unsynced)?;
        }
        let buffers: Vec<&[u8]> = bodies.iter().map(|body| &body[..]).collect();
        let past_counts = self.cursor.state.ever_consistent;
        let part = &mut scratch.part;
        part.clear();
        let mut staged = 0;
        let mut ids = Vec::with_capacity(bodies.len());
        for (buffer, body) in bodies.iter().enumerate() {
            let image = Image::decode(body).map_err(|e| damaged(&e.to_string()))?;
            for (start, length, bytes) in image.extents() {
                let source = bytes.map(|bytes| {
                    let offset = bytes.as_ptr().addr() - body.as_ptr().addr();
                    Source { buffer: buffer as u32, offset: offset as u32 }
                });
                let piece = Piece { volume: image.volume, start, end: start + length, source };
                // Zeroes are short in an image, and what they replace is as long as the region.
                if staged + stage_bytes(&piece) > BEFORE_STAGE_BYTES as u64 {
                    self.part(part, &buffers, past_counts)?;
                    staged = 0;
                }
                staged += stage_bytes(&piece);
                part.push(piece, stamp);
            }
            ids.push(image.id);
        }
        self.part(part, &buffers, past_counts)?;
        answers.iter().zip(bodies).for_each(|(answer, body)| answer.give_back(body));
        self.live.counters.image_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        unsynced.bytes += bytes;
        unsynced.image_bytes += bytes;
        unsynced.since.get_or_insert_with(Instant::now);
        let done = answers.into_iter().zip(ids).map(|(answer, id)| (answer, ImageDone { id }));
        unsynced.images.extend(done);
        Ok(())
    }

    fn sync_if_due(&mut self, unsynced: &mut Unsynced) -> Result<(), Failure> {
        if self.is_sync_due(unsynced) { self.sync(unsynced) } else { Ok(()) }
    }

    fn is_sync_due(&self, unsynced: &Unsynced) -> bool {
        let late = unsynced.since.is_some_and(|since| since.elapsed() >= UNSYNCED_TIME_MAX);
        let much = unsynced.bytes >= UNSYNCED_BYTES_MAX || (unsynced.since.is_some() && self.log.is_starved());
        late || much
    }

    /// Replicas first, then the mark, then what the mark makes free: each step only claims what is durable.
    pub(super) fn sync(&mut self, unsynced: &mut Unsynced) -> Result<(), Failure> {
        let state = self.cursor.state;
        self.bring_late(&state)?;
        self.replicas.sync()?;
        failpoint::hit(failpoint::MARK_BEFORE);
        let place = self.cursor.place();
        let mut slot = *self.mark.slot();
        self.cursor.state.to_slot(&mut slot);
        slot.segment = place.segment.into();
        slot.offset = place.offset.into();
        slot.chain = self.cursor.chain().into();
        slot.history = self.history.complete_to().into();
        if slot != *self.mark.slot() {
            self.mark.write(slot)?;
        }
        failpoint::hit(failpoint::MARK_AFTER);
        self.live.set_anchor(Anchor { place, chain: self.cursor.chain(), state: self.cursor.state });
        self.log.recycle_before(place.segment);
        self.log.give_back(Instant::now());
        self.live.applied(self.cursor.state);
        for (answer, done) in unsynced.images.drain(..) {
            answer.send(Answered::Image(done));
        }
        self.live.answered();
        *unsynced = Unsynced { images: std::mem::take(&mut unsynced.images), ..Unsynced::default() };
        Ok(())
    }

    fn worked(&mut self) {
        self.rest_at = Instant::now() + REST_AFTER;
    }

    fn rest(&mut self, scratch: &mut Scratch) -> Result<(), Failure> {
        self.rest_at = Instant::now() + REST_AFTER;
        *scratch = Scratch::default();
        self.cursor.rest();
        self.log.give_back(Instant::now());
        self.replicas.rest();
        self.history.rest()
    }
}

/// Parts of one batch on their way to the replicas.
pub(super) struct Parts<'a, 'scope, 'env> {
    history: &'a mut History,
    replicas: Reading<'a>,
    behind: Behind<'scope, 'env>,
    buffers: &'a [&'a [u8]],
    past_counts: bool,
    /// Of the stream, for what is no part of it.
    height: u64,
    /// What is known well may be late: see [`History::remember_late`].
    late: bool,
}

impl Parts<'_, '_, '_> {
    /// What a part replaces becomes history, then it goes to the replicas. Empties the part. `complete_to`: see
    /// [`Whose::Stream`]; `None`: it is no part of the stream. `more`: another one follows, or [`Parts::finish`], so it may still be
    /// on its way.
    pub(super) fn next(&mut self, part: &mut BatchPlan, complete_to: Option<u64>, more: bool) -> Result<(), Failure> {
        if part.is_empty() {
            return Ok(());
        }
        let mut kept = Kept::Durably;
        if self.past_counts {
            let whose = match complete_to {
                Some(complete_to) => Whose::Stream { complete_to },
                None => Whose::Image { height: self.height },
            };
            kept = self.history.before(part, self.buffers, &mut self.replicas, &mut self.behind, whose, more)?;
        }
        failpoint::hit(failpoint::APPLY_BEFORE);
        let pieces = part.resolve();
        // What is no part of the stream is seldom written again soon, and without a past nobody asks what was there.
        let keep = self.past_counts && complete_to.is_some();
        match kept {
            Kept::Soon if self.late => self.behind.wait_for_more(self.history.remember_late(pieces, self.buffers)),
            kept => {
                self.history.remember(pieces, self.buffers, keep);
                match kept {
                    Kept::Durably => self.history.write(&mut self.behind, pieces, more)?,
                    Kept::Soon => self.behind.wait_for_more(pieces),
                }
            }
        }
        part.clear();
        Ok(())
    }

    /// A long stretch of zeroes, as a discard of a whole device: piece by piece, without what is a hole already.
    fn long_zeroes(
        &mut self,
        piece: &Piece,
        stamp: Stamp,
        part: &mut BatchPlan,
        complete_to: u64,
    ) -> Result<(), Failure> {
        let mut at = piece.start;
        self.finish()?;
        while at < piece.end {
            let Some(data) = self.replicas.next_data(piece.volume, at)? else { break };
            let start = data.max(at);
            let end = (start + ZERO_PIECE_BYTES).min(piece.end);
            if start >= end {
                break;
            }
            part.push(Piece { start, end, ..*piece }, stamp);
            // Not complete before its last piece: after a crash all of it is looked at again.
            self.next(part, Some(complete_to), false)?;
            at = end;
        }
        Ok(())
    }

    /// Everything is in the replicas, but for what is late.
    pub(super) fn finish(&mut self) -> Result<(), Failure> {
        self.history.finish(&mut self.behind)
    }
}

const _: () = assert!(STAGE_BYTES as u64 >= REGION_BYTES);
// A record of the longest payload and an image of a region fit, whatever their alignment.
const _: () = assert!(BEFORE_STAGE_BYTES as u64 >= ZERO_PIECE_BYTES + 2 * 4096 && ZERO_PIECE_BYTES > REGION_BYTES);
