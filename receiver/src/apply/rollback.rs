//! Making the replicas what they were at a point: every block that changed since gets what the earliest record after the
//! point says, and what it holds now becomes history first. So a rollback can itself be rolled back.

use super::applier::{Applier, Unsynced};
use super::history::history_failed;
use super::plan::{BatchPlan, Piece, Source, Stamp};
use crate::failpoint;
use crate::failure::Failure;
use crate::group::stream::{IMAGE_HEIGHT, MARK_HEIGHT};
use crate::limits::{ROLLBACK_BYTES, ROLLBACK_DEPTH, ROLLBACK_READ_BYTES};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::oneshot;
use varve_common::format::BLOCK_BYTES;
use varve_io::{AlignedBuf, DirectFile, IoQueue};
use varve_timeline::chronicle::Event;
use varve_timeline::entry::{Entry, Stored};
use varve_timeline::error::HistoryError;
use varve_timeline::layer::LayerFile;
use varve_timeline::limits::SECTOR_BYTES;
use varve_timeline::merge::all_addresses;
use varve_timeline::resolve::changed;
use varve_timeline::timeline::{Pin, Timeline};

/// What the applier is told.
#[derive(Debug)]
pub struct RollbackOrder {
    /// The point, kept from expiring.
    pin: Pin,
    /// Bytes that are done.
    done_bytes: Arc<AtomicU64>,
    /// Told when all of it is in the replicas and synced; dropped untold if the group failed.
    finished: Mutex<Option<oneshot::Sender<()>>>,
}

impl RollbackOrder {
    /// To the pinned point. Gives the order, and what tells of its end.
    pub fn new(pin: Pin, done_bytes: Arc<AtomicU64>) -> (Self, oneshot::Receiver<()>) {
        let (finished, receiver) = oneshot::channel();
        (Self { pin, done_bytes, finished: Mutex::new(Some(finished)) }, receiver)
    }

    /// All of it is durable.
    pub fn finished(&self) {
        let sender = self.finished.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Whoever waited may have gone.
        sender.map(|sender| sender.send(()));
    }
}

/// What a rollback would do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Bytes that changed since the point.
    pub bytes: u64,
    /// Blocks of 4096 bytes that they are in.
    pub blocks: u64,
}

/// Counts what changed since `height`, without reading any of it.
///
/// # Errors
/// If an index cannot be read.
pub fn measure(timeline: &Timeline, height: u64) -> Result<Extent, HistoryError> {
    let mut extent = Extent::default();
    let mut last = None;
    for entry in changed(&timeline.plan(height)?, all_addresses(), height)? {
        let entry = entry?;
        extent.bytes += u64::from(entry.sectors) * SECTOR_BYTES;
        let per_block = BLOCK_BYTES as u64 / SECTOR_BYTES;
        let first = entry.address.number() / per_block;
        let end = entry.end().number().div_ceil(per_block);
        extent.blocks += end - first - u64::from(last == Some(first));
        last = Some(end - 1);
    }
    Ok(extent)
}

/// Reads records in batches. Memory is only taken for a rollback.
struct RecordReader<'a> {
    timeline: &'a Timeline,
    queue: IoQueue,
    buf: AlignedBuf,
    plain: Vec<u8>,
}

impl RecordReader<'_> {
    /// Fills `plain` with what the entries speak for, one behind the other.
    fn read(&mut self, entries: &[Entry]) -> Result<(), HistoryError> {
        self.plain.clear();
        let total: usize = entries.iter().map(|entry| usize::from(entry.sectors) * SECTOR_BYTES as usize).sum();
        self.plain.resize(total, 0);
        let (mut from, mut at) = (0, 0);
        while from < entries.len() {
            let (taken, bytes) = self.round(&entries[from..], at)?;
            from += taken;
            at += bytes;
        }
        Ok(())
    }

    /// As many as the memory takes; gives how many, and how many plain bytes.
    fn round(&mut self, entries: &[Entry], at: usize) -> Result<(usize, usize), HistoryError> {
        let mut layers: Vec<Arc<LayerFile>> = Vec::new();
        let mut plans = Vec::new();
        let mut room = self.buf.len();
        for entry in entries {
            let known = layers.iter().position(|layer| layer.number() == entry.layer);
            let file = match known {
                Some(known) => known,
                None => {
                    layers.push(self.timeline.layer(entry.layer)?);
                    layers.len() - 1
                }
            };
            let plan = layers[file].plan_read(entry)?;
            if plan.bytes > room {
                break;
            }
            room -= plan.bytes;
            plans.push((file, plan));
        }
        let files: Vec<&DirectFile> = layers.iter().map(|layer| layer.file()).collect();
        let mut rest = &mut self.buf[..];
        let mut reads = Vec::with_capacity(plans.len());
        for (file, plan) in plans.iter().filter(|(_, plan)| plan.bytes > 0) {
            let (here, after) = rest.split_at_mut(plan.bytes);
            reads.push((*file, plan.offset, here));
            rest = after;
        }
        self.queue.read_batch(&files, &mut reads)?;
        let (mut place, mut target) = (0, at);
        for (entry, (file, plan)) in entries.iter().zip(&plans) {
            let bytes = usize::from(entry.sectors) * SECTOR_BYTES as usize;
            let stored = self.buf.get(place + plan.inner..place + plan.inner + entry.stored_bytes as usize);
            layers[*file].finish_read(entry, stored.unwrap_or_default(), &mut self.plain[target..target + bytes])?;
            place += plan.bytes;
            target += bytes;
        }
        Ok((plans.len(), target - at))
    }
}

impl Applier {
    /// Everything in front of it is applied, a gap is open, and nobody but this thread changes anything meanwhile.
    pub(super) fn rollback(&mut self, order: &RollbackOrder, part: &mut BatchPlan) -> Result<(), Failure> {
        self.roll_back_to(order.pin.height(), &order.done_bytes, part)
    }

    fn roll_back_to(&mut self, height: u64, done_bytes: &AtomicU64, part: &mut BatchPlan) -> Result<(), Failure> {
        let timeline = self.history.timeline().clone();
        let failed = |e: HistoryError| history_failed(&e);
        let stamp = Stamp { height: self.cursor.state.height + IMAGE_HEIGHT };
        // What is recorded meanwhile is younger than this plan and not in it.
        let plan = timeline.plan(height).map_err(failed)?;
        let mut reader = RecordReader {
            timeline: &timeline,
            queue: IoQueue::new(ROLLBACK_DEPTH).map_err(|e| Failure::io("io_uring", &e))?,
            buf: AlignedBuf::new(ROLLBACK_READ_BYTES),
            plain: Vec::new(),
        };
        let mut entries: Vec<Entry> = Vec::new();
        let (mut bytes, mut staged) = (0, 0);
        for entry in changed(&plan, all_addresses(), height).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            bytes += u64::from(entry.sectors) * SECTOR_BYTES;
            // What it may take of the stage: its blocks.
            let block = BLOCK_BYTES as u64;
            staged += entry.end().byte().next_multiple_of(block) - entry.address.byte() / block * block;
            entries.push(entry);
            if staged >= ROLLBACK_BYTES {
                self.put_back(&mut reader, &entries, stamp, part)?;
                failpoint::hold(failpoint::ROLLBACK_HELD, || self.queue.is_closed());
                if self.queue.is_closed() {
                    // As after a crash here: the next start finds it undone. All of it may take longer than a stop may.
                    return Err(Failure::stopping());
                }
                done_bytes.fetch_add(bytes, Ordering::Relaxed);
                entries.clear();
                (bytes, staged) = (0, 0);
            }
        }
        self.put_back(&mut reader, &entries, stamp, part)?;
        done_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// If the stream has just gone over to the receiver's own and that begins at an older point: the replicas go there before
    /// anything of the new stream is applied. Found undone after a crash, it is done again.
    pub(super) fn take_over(&mut self, unsynced: &mut Unsynced, part: &mut BatchPlan) -> Result<(), Failure> {
        let Some(wish) = self.live.take_wish(&self.cursor.state) else { return Ok(()) };
        // The mark is past the stream before: after a crash nothing of that is applied again over what was put back, when
        // the chronicle says already that it was.
        self.sync(unsynced)?;
        self.roll_back_to(wish.pin.height(), &AtomicU64::new(0), part)?;
        self.replicas.sync()?;
        let (height, time_ns) = (self.cursor.state.height + MARK_HEIGHT, self.cursor.state.at.time_ns);
        let (to_height, to_time_ns) = (wish.pin.height(), wish.time_ns);
        // Below the first record's end: no point of the stream is in between.
        self.history.events(&[Event::RolledBack { height, time_ns, to_height, to_time_ns }])?;
        failpoint::hit(failpoint::PROMOTE_SAID);
        // Before anything else of the stream is applied and so leaves the memory of what is pending.
        wish.rolled.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn put_back(
        &mut self,
        reader: &mut RecordReader<'_>,
        entries: &[Entry],
        stamp: Stamp,
        part: &mut BatchPlan,
    ) -> Result<(), Failure> {
        reader.read(entries).map_err(|e| history_failed(&e))?;
        part.clear();
        let mut offset = 0;
        for entry in entries {
            let volume = entry.address.volume();
            let volume_bytes = self.volumes.get(usize::from(volume)).copied().unwrap_or(0);
            let (start, end) = (entry.address.byte(), entry.end().byte().min(volume_bytes));
            let source = (entry.stored != Stored::Zero).then_some(Source { buffer: 0, offset });
            offset += u32::from(entry.sectors) * SECTOR_BYTES as u32;
            if start < end {
                part.push(Piece { volume, start, end, source }, stamp);
            }
        }
        let plain = std::mem::take(&mut reader.plain);
        self.part(part, &[&plain], true)?;
        reader.plain = plain;
        Ok(())
    }
}

const _: () = assert!(ROLLBACK_BYTES as usize + (72 << 10) <= crate::limits::BEFORE_STAGE_BYTES);
