//! Making the replicas what they were at a point: every block that changed since gets what the earliest record after the
//! point says, and what it holds now becomes history first. So a rollback can itself be rolled back.

use super::applier::{Applier, Unsynced};
use super::history::history_failed;
use super::plan::{BatchPlan, Piece, Source, Stamp};
use crate::failpoint;
use crate::failure::Failure;
use crate::group::stream::{IMAGE_HEIGHT, MARK_HEIGHT};
use crate::limits::{ROLLBACK_BYTES, ROLLBACK_DEPTH, ROLLBACK_GAP_BYTES, ROLLBACK_READ_BYTES, ROLLBACK_ROUND_BYTES};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::oneshot;
use varve_common::format::BLOCK_BYTES;
use varve_common::format::chronicle::NO_END;
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

/// A stretch of a layer that is read with one request.
struct Stretch {
    file: usize,
    offset: u64,
    bytes: usize,
    /// Where it is in the buffer.
    at: usize,
}

impl RecordReader<'_> {
    /// Fills `plain` with what the entries speak for, one behind the other.
    ///
    /// They come in the order of their addresses, and neighbours there were often replaced one after the other: in the order of
    /// the layers many records are read with one request.
    fn read(&mut self, entries: &[Entry]) -> Result<(), HistoryError> {
        self.plain.clear();
        let mut total = 0;
        let mut order: Vec<(&Entry, usize)> = Vec::with_capacity(entries.len());
        for entry in entries {
            order.push((entry, total));
            total += usize::from(entry.sectors) * SECTOR_BYTES as usize;
        }
        self.plain.resize(total, 0);
        order.sort_unstable_by_key(|(entry, _)| (entry.layer, entry.offset));
        let mut rest = &order[..];
        while !rest.is_empty() {
            // What lies between two records may be damaged where they are not.
            let taken = self.round(rest, ROLLBACK_GAP_BYTES).or_else(|_| self.round(rest, 0))?;
            rest = &rest[taken..];
        }
        Ok(())
    }

    /// As many as the memory takes, each with its place in `plain`; gives how many. Reads on over a `gap` up to the next one.
    fn round(&mut self, order: &[(&Entry, usize)], gap: u64) -> Result<usize, HistoryError> {
        let mut layers: Vec<Arc<LayerFile>> = Vec::new();
        let mut stretches: Vec<Stretch> = Vec::new();
        // Where each one's bytes begin in the buffer.
        let mut places = Vec::with_capacity(order.len());
        let mut used = 0;
        for (entry, _) in order {
            if layers.last().is_none_or(|layer| layer.number() != entry.layer) {
                layers.push(self.timeline.layer(entry.layer)?);
            }
            let file = layers.len() - 1;
            let plan = layers[file].plan_read(entry)?;
            let end = plan.offset + plan.bytes as u64;
            let last = stretches.last_mut().filter(|last| {
                let last_end = last.offset + last.bytes as u64;
                last.file == file && plan.bytes > 0 && (last.offset..=last_end + gap).contains(&plan.offset)
            });
            if let Some(last) = last {
                let bytes = last.bytes.max((end - last.offset) as usize);
                if last.at + bytes > self.buf.len() {
                    break;
                }
                places.push(last.at + (plan.offset - last.offset) as usize + plan.inner);
                last.bytes = bytes;
                used = last.at + bytes;
            } else {
                // A layer that was cut may end within a block.
                let at = used.next_multiple_of(BLOCK_BYTES);
                if at + plan.bytes > self.buf.len() {
                    break;
                }
                places.push(at + plan.inner);
                stretches.push(Stretch { file, offset: plan.offset, bytes: plan.bytes, at });
                used = at + plan.bytes;
            }
        }
        let files: Vec<&DirectFile> = layers.iter().map(|layer| layer.file()).collect();
        let (mut rest, mut at) = (&mut self.buf[..], 0);
        let mut reads = Vec::with_capacity(stretches.len());
        for stretch in stretches.iter().filter(|stretch| stretch.bytes > 0) {
            let (here, after) = rest.split_at_mut(stretch.at - at).1.split_at_mut(stretch.bytes);
            reads.push((stretch.file, stretch.offset, here));
            (rest, at) = (after, stretch.at + stretch.bytes);
        }
        self.queue.read_batch(&files, &mut reads)?;
        let mut layers = layers.iter();
        let mut layer = layers.next();
        for ((entry, target), place) in order.iter().zip(&places) {
            while layer.is_some_and(|layer| layer.number() != entry.layer) {
                layer = layers.next();
            }
            let Some(layer) = layer else { break };
            let bytes = usize::from(entry.sectors) * SECTOR_BYTES as usize;
            let stored = self.buf.get(*place..*place + entry.stored_bytes as usize).unwrap_or_default();
            layer.finish_read(entry, stored, &mut self.plain[*target..*target + bytes])?;
        }
        Ok(places.len())
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
        let mut bytes = 0;
        for entry in changed(&plan, all_addresses(), height).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            bytes += u64::from(entry.sectors) * SECTOR_BYTES;
            entries.push(entry);
            if bytes >= ROLLBACK_ROUND_BYTES {
                self.put_back(&mut reader, &entries, stamp, part, done_bytes)?;
                entries.clear();
                bytes = 0;
            }
        }
        self.put_back(&mut reader, &entries, stamp, part, done_bytes)
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
        let rolled = Event::RolledBack { height, time_ns, to_height, to_time_ns };
        // A rollback ends the gap for the chronicle; this lasts until the stream's own gap ends.
        let no_point = || Event::damaged(height, NO_END, "a takeover was undone that began in a gap");
        let events: Vec<Event> = std::iter::once(rolled).chain(wish.in_gap.then(no_point)).collect();
        self.history.events(&events)?;
        failpoint::hit(failpoint::PROMOTE_SAID);
        // Before anything else of the stream is applied and so leaves the memory of what is pending.
        wish.rolled.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Reads what the entries say and brings it to the replicas, part by part.
    fn put_back(
        &mut self,
        reader: &mut RecordReader<'_>,
        entries: &[Entry],
        stamp: Stamp,
        part: &mut BatchPlan,
        done_bytes: &AtomicU64,
    ) -> Result<(), Failure> {
        reader.read(entries).map_err(|e| history_failed(&e))?;
        let plain = std::mem::take(&mut reader.plain);
        let (volumes, queue) = (self.volumes.clone(), self.queue.clone());
        part.clear();
        self.in_parts(&[&plain], true, |parts| {
            let (mut offset, mut bytes, mut staged) = (0, 0, 0);
            for entry in entries {
                let block = BLOCK_BYTES as u64;
                // What it may take of the stage: its blocks.
                let stage = entry.end().byte().next_multiple_of(block) - entry.address.byte() / block * block;
                if staged + stage > ROLLBACK_BYTES {
                    parts.next(part, None, true)?;
                    done_bytes.fetch_add(bytes, Ordering::Relaxed);
                    (bytes, staged) = (0, 0);
                    failpoint::hold(failpoint::ROLLBACK_HELD, || queue.is_closed());
                    if queue.is_closed() {
                        // As after a crash here: the next start finds it undone. All of it may take longer than a stop may.
                        return Err(Failure::stopping());
                    }
                }
                let volume = entry.address.volume();
                let volume_bytes = volumes.get(usize::from(volume)).copied().unwrap_or(0);
                let (start, end) = (entry.address.byte(), entry.end().byte().min(volume_bytes));
                let source = (entry.stored != Stored::Zero).then_some(Source { buffer: 0, offset });
                offset += u32::from(entry.sectors) * SECTOR_BYTES as u32;
                bytes += u64::from(entry.sectors) * SECTOR_BYTES;
                staged += stage;
                if start < end {
                    part.push(Piece { volume, start, end, source }, stamp);
                }
            }
            parts.next(part, None, false)?;
            parts.finish()?;
            done_bytes.fetch_add(bytes, Ordering::Relaxed);
            Ok(())
        })?;
        reader.plain = plain;
        Ok(())
    }
}

// A part's last entry is a granule at most, in whole blocks; places in a round's bytes are 32 bits wide.
const _: () = assert!(ROLLBACK_BYTES as usize + (72 << 10) <= crate::limits::BEFORE_STAGE_BYTES);
const _: () = assert!(ROLLBACK_ROUND_BYTES < 1 << 31);
