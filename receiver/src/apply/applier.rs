//! The thread that brings the replicas forward. It alone writes to them, so order is order.

use super::collect::{Batch, Cursor, Ended};
use super::history::History;
use super::mark::AppliedFile;
use super::plan::{BatchPlan, Piece, Source, Stamp};
use super::probe;
use super::replica::Replicas;
use super::work::{Action, Answer, Answered, Given, Queue};
use crate::failpoint;
use crate::failure::Failure;
use crate::group::live::Live;
use crate::landing::log::Log;
use crate::limits::{IMAGE_BYTES_PER_SYNC, STAGE_BYTES, UNSYNCED_BYTES_MAX, UNSYNCED_TIME_MAX};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use varve_common::limits::REGION_BYTES;
use varve_common::wire::Image;
use varve_common::wire::messages::{ImageDone, Probe, ProbeReply};
use varve_io::AlignedBuf;

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
    pub history: Box<dyn History>,
}

/// What was done since the last sync.
#[derive(Default)]
struct Unsynced {
    bytes: usize,
    since: Option<Instant>,
    image_bytes: usize,
    images: Vec<(Answer, ImageDone)>,
}

/// What is used again from batch to batch.
#[derive(Default)]
struct Scratch {
    batch: Batch,
    image: BatchPlan,
    probe: Option<AlignedBuf>,
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
            let deadline = unsynced.since.map_or(Instant::now() + REST_AFTER, |since| since + UNSYNCED_TIME_MAX);
            match self.queue.take(Some(deadline)) {
                Given::Work(work) => match self.cursor.open(work) {
                    Some(action) => self.act(action, unsynced, scratch)?,
                    None => continue,
                },
                Given::Nothing if unsynced.since.is_some() => self.sync(unsynced)?,
                Given::Nothing => self.rest(scratch),
                Given::Closed => return self.sync(unsynced),
            }
            self.sync_if_due(unsynced)?;
        }
    }

    /// Applies what is open, together with what waits behind it.
    fn batch(&mut self, unsynced: &mut Unsynced, scratch: &mut Scratch) -> Result<(), Failure> {
        let batch = &mut scratch.batch;
        batch.clear();
        let mut action = None;
        while self.cursor.fill(batch, &self.volumes)? == Ended::Used {
            match self.queue.take(Some(Instant::now())) {
                Given::Work(work) => action = self.cursor.open(work),
                Given::Nothing => break,
                // What is in the batch is applied; what waits stays in the log. The next take says it again.
                Given::Closed => break,
            }
            if action.is_some() {
                break;
            }
        }
        if !batch.plan.is_empty() {
            self.history.before(&batch.plan, &mut self.replicas)?;
            failpoint::hit(failpoint::APPLY_BEFORE);
            let (pieces, buffers) = batch.resolve();
            let bytes: u64 = pieces.iter().map(Piece::bytes).sum();
            self.replicas.apply(pieces, &buffers)?;
            failpoint::hit(failpoint::APPLY_AFTER);
            self.live.counters.replica_bytes.fetch_add(bytes, Ordering::Relaxed);
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
        if let Some(action) = action {
            self.act(action, unsynced, scratch)?;
        }
        self.sync_if_due(unsynced)
    }

    fn act(&mut self, action: Action, unsynced: &mut Unsynced, scratch: &mut Scratch) -> Result<(), Failure> {
        match action {
            Action::Probe(probe, answer) => self.probe(&probe, answer, scratch),
            Action::Image(body, answer) => self.image(&body, answer, unsynced, scratch),
        }
    }

    fn probe(&mut self, probe: &Probe, answer: Answer, scratch: &mut Scratch) -> Result<(), Failure> {
        let buf = scratch.probe.get_or_insert_with(|| AlignedBuf::new(REGION_BYTES as usize));
        let replica = self.replicas.get(probe.volume).ok_or_else(|| Failure::damaged("a probe of no volume"))?;
        let differs =
            probe::compare(replica, probe, buf).map_err(|e| Failure::io(&format!("replica {}", probe.volume), &e))?;
        answer.send(Answered::Probe(ProbeReply { id: probe.id, differs }));
        self.live.answered();
        Ok(())
    }

    fn image(
        &mut self,
        body: &[u8],
        answer: Answer,
        unsynced: &mut Unsynced,
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let damaged = |why: &str| Failure::damaged(format!("an image that was checked: {why}"));
        let image = Image::decode(body).map_err(|e| damaged(&e.to_string()))?;
        let plan = &mut scratch.image;
        plan.clear();
        let stamp = Stamp { position: self.cursor.state.at.position, time_ns: self.cursor.state.at.time_ns };
        for (start, length, bytes) in image.extents() {
            let source = bytes.map(|bytes| {
                let offset = bytes.as_ptr().addr() - body.as_ptr().addr();
                Source { buffer: 0, offset: offset as u32 }
            });
            plan.push(Piece { volume: image.volume, start, end: start + length, source }, stamp);
        }
        if self.mark.slot().consistent != 0 {
            // An image holds bytes of a later time. The mark on disk must say that a gap is open before they are there.
            self.sync(unsynced)?;
        }
        self.history.before(plan, &mut self.replicas)?;
        self.replicas.apply(plan.resolve(), &[body])?;
        self.live.counters.image_bytes.fetch_add(body.len() as u64, Ordering::Relaxed);
        unsynced.bytes += body.len();
        unsynced.image_bytes += body.len();
        unsynced.since.get_or_insert_with(Instant::now);
        unsynced.images.push((answer, ImageDone { id: image.id }));
        Ok(())
    }

    fn sync_if_due(&mut self, unsynced: &mut Unsynced) -> Result<(), Failure> {
        let late = unsynced.since.is_some_and(|since| since.elapsed() >= UNSYNCED_TIME_MAX);
        let much = unsynced.bytes >= UNSYNCED_BYTES_MAX || (unsynced.since.is_some() && self.log.is_starved());
        if late || much { self.sync(unsynced) } else { Ok(()) }
    }

    /// Replicas first, then the mark, then what the mark makes free: each step only claims what is durable.
    fn sync(&mut self, unsynced: &mut Unsynced) -> Result<(), Failure> {
        self.replicas.sync()?;
        failpoint::hit(failpoint::MARK_BEFORE);
        let place = self.cursor.place();
        let mut slot = *self.mark.slot();
        self.cursor.state.to_slot(&mut slot);
        slot.segment = place.segment.into();
        slot.offset = place.offset.into();
        slot.chain = self.cursor.chain().into();
        if slot != *self.mark.slot() {
            self.mark.write(slot)?;
        }
        failpoint::hit(failpoint::MARK_AFTER);
        self.log.recycle_before(place.segment);
        self.live.applied(self.cursor.state);
        for (answer, done) in unsynced.images.drain(..) {
            answer.send(Answered::Image(done));
        }
        self.live.answered();
        *unsynced = Unsynced { images: std::mem::take(&mut unsynced.images), ..Unsynced::default() };
        Ok(())
    }

    fn rest(&mut self, scratch: &mut Scratch) {
        scratch.batch.rest();
        scratch.probe = None;
        self.cursor.rest();
        self.replicas.rest();
    }
}

const _: () = assert!(STAGE_BYTES as u64 >= REGION_BYTES);
