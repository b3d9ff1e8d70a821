//! Reading regions of the volumes: for the first sync, for a resync, for a verify. One thread per group, asleep unless
//! there is something to read.
//!
//! The thread takes a region's dirty bit, registers the region (see [`super::tracker`]), waits until no write to it is in
//! flight, reads it, and hands it to the group's worker. From then on the worker owns it: either it is done, or the
//! region's bit is set again. Whatever is under way is counted, so that nobody calls a replica complete while a region
//! is in somebody's hands.

use super::source::Source;
use super::tracker::{RegionId, Tracker};
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use varve_common::geometry::{Extent, region_extent};
use varve_common::limits::{DIGEST_BLOCK_BYTES, REGION_BYTES, SYNC_REGIONS_MAX};
use varve_common::wire::digest::{block_digest, is_zero};
use varve_common::wire::messages::{Digest, ZERO_DIGEST};
use varve_io::aligned::{BufPool, PooledBuf};
use varve_io::direct::DirectFile;
use varve_io::error::IoError;
use varve_io::uring::IoQueue;

/// Regions read with one call.
const READ_REGIONS_MAX: usize = 4;
/// How long a region may have writes in flight before another one is tried first.
const DRAIN_WAIT: Duration = Duration::from_millis(50);
/// Pause between looks at a region's writes in flight.
const DRAIN_POLL: Duration = Duration::from_micros(200);
/// Pause after a region could not be read, or all regions are busy.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Why a region is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Its dirty bit was set: what differs is to be sent.
    Send,
    /// It is to be compared only.
    Compare,
}

/// A region that was read.
pub struct RegionRead {
    /// Its registration with the tracker.
    pub id: RegionId,
    /// The session in which it was taken: later ones do not want it.
    pub session: u64,
    /// Why it was read.
    pub purpose: Purpose,
    /// The volume's number.
    pub volume: u16,
    /// The region's number.
    pub region: u64,
    /// Where it lies.
    pub extent: Extent,
    /// Its bytes. They hold a buffer of the pool until they are dropped.
    pub bytes: Bytes,
    /// Digest per block of 64 KiB ([`ZERO_DIGEST`]: zeroes). With `digests_wanted` false only zeroes are told apart:
    /// any other digest is meaningless.
    pub digests: Vec<Digest>,
    /// Position of the stream after the read had ended.
    pub read_end: u64,
}

/// What the thread hands to the worker.
pub enum FromSync {
    /// A region was read.
    Read(RegionRead),
    /// A region to compare was busy for too long, or could not be read.
    Busy {
        /// The volume's number.
        volume: u16,
        /// The region's number.
        region: u64,
        /// The session.
        session: u64,
    },
    /// The volume cannot be read; said once until it can.
    Failed {
        /// The volume's number.
        volume: u16,
        /// What happened.
        error: IoError,
    },
}

#[derive(Default)]
struct Orders {
    /// 0: nothing to do. Rises with every session.
    session: u64,
    active: bool,
    stop: bool,
    /// Per volume: no digests wanted, the replica is known to be empty.
    fresh: Vec<bool>,
    compare: VecDeque<(u16, u64)>,
}

/// What worker and thread share.
pub struct SyncShared {
    orders: Mutex<Orders>,
    wake: Condvar,
    /// Regions taken from the bitmaps and not done yet.
    in_hand: AtomicU64,
    /// Regions ever taken: see [`SyncShared::nothing_left`].
    takes: AtomicU64,
    /// See [`SyncShared::hold`].
    held: AtomicBool,
    /// See [`Tracker`].
    pub tracker: Mutex<Tracker>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SyncShared {
    fn new() -> Self {
        Self {
            orders: Mutex::default(),
            wake: Condvar::new(),
            in_hand: AtomicU64::new(0),
            takes: AtomicU64::new(0),
            held: AtomicBool::new(false),
            tracker: Mutex::default(),
        }
    }

    /// A session begins; regions may be taken. `fresh`: see [`varve_common::wire::messages::Welcome`].
    pub fn start(&self, session: u64, fresh: Vec<bool>) {
        let mut orders = lock(&self.orders);
        orders.session = session;
        orders.active = true;
        orders.fresh = fresh;
        orders.compare.clear();
        self.wake.notify_all();
    }

    /// The replicas are not empty any more: digests are wanted.
    pub fn not_fresh(&self) {
        lock(&self.orders).fresh.clear();
    }

    /// The session ended: nothing more is taken.
    pub fn pause(&self) {
        let mut orders = lock(&self.orders);
        orders.active = false;
        orders.compare.clear();
    }

    /// Nothing is taken while this is set: what is read waits until all that came before it was sent, in a buffer that other
    /// groups want, and of a journal that may be hours.
    pub fn hold(&self, hold: bool) {
        if self.held.swap(hold, Ordering::AcqRel) && !hold {
            self.nudge();
        }
    }

    /// Dirty bits were set.
    pub fn nudge(&self) {
        self.wake.notify_all();
    }

    /// Wants regions compared.
    pub fn compare(&self, regions: impl IntoIterator<Item = (u16, u64)>) {
        lock(&self.orders).compare.extend(regions);
        self.wake.notify_all();
    }

    /// Regions taken from the bitmaps and not done yet.
    pub fn in_hand(&self) -> u64 {
        self.in_hand.load(Ordering::Acquire)
    }

    /// A region taken with [`Purpose::Send`] is durable at the receiver, or its bit is set again.
    pub fn done(&self) {
        self.in_hand.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether no region is dirty and none is in somebody's hands, at one moment during the call: with nothing in hand
    /// and nothing taken since, no bit can have been on its way back into a bitmap that was already looked at.
    pub fn nothing_left(&self, source: &dyn Source) -> bool {
        let takes = self.takes.load(Ordering::SeqCst);
        let idle = self.in_hand.load(Ordering::SeqCst) == 0;
        let clean = || (0..source.volumes()).all(|number| source.track(number).next_dirty(0).is_none());
        idle && clean() && self.takes.load(Ordering::SeqCst) == takes
    }

    fn stop(&self) {
        let mut orders = lock(&self.orders);
        orders.stop = true;
        orders.active = false;
        self.wake.notify_all();
    }
}

/// The thread; ends with this handle.
pub struct SyncThread {
    shared: Arc<SyncShared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl SyncThread {
    /// Starts the thread of group `name`. `volumes` are read through their own files; `pool` bounds the memory.
    pub fn start(
        name: &str,
        source: Arc<dyn Source>,
        volumes: Vec<DirectFile>,
        pool: BufPool,
        out: mpsc::Sender<FromSync>,
    ) -> Result<Self, IoError> {
        let shared = Arc::new(SyncShared::new());
        let queue = IoQueue::new(READ_REGIONS_MAX as u32)?;
        let cursors = vec![0; volumes.len()];
        let mut reader = Reader {
            source,
            volumes,
            pool,
            out,
            queue,
            shared: shared.clone(),
            cursors,
            failed: false,
            ours: Arc::default(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("sync-{name}"))
            .spawn(move || reader.run())
            .map_err(|error| IoError::new("start the sync thread of", name, error))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// What worker and thread share.
    pub fn shared(&self) -> &Arc<SyncShared> {
        &self.shared
    }
}

impl Drop for SyncThread {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by the hook; there is nobody to hand it to here.
            let _ = thread.join();
        }
    }
}

/// A buffer of the pool that all groups share, counted as this group's until it is dropped.
struct GroupBuf {
    buf: PooledBuf,
    _ours: Arc<()>,
}

/// The used part of a buffer.
struct RegionBytes(GroupBuf, usize);

impl AsRef<[u8]> for RegionBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0.buf[..self.1]
    }
}

struct Taken {
    id: RegionId,
    purpose: Purpose,
    volume: u16,
    region: u64,
    extent: Extent,
    buf: GroupBuf,
}

struct Reader {
    source: Arc<dyn Source>,
    volumes: Vec<DirectFile>,
    pool: BufPool,
    out: mpsc::Sender<FromSync>,
    queue: IoQueue,
    shared: Arc<SyncShared>,
    cursors: Vec<u64>,
    failed: bool,
    /// As many as the group has buffers, and one.
    ours: Arc<()>,
}

impl Reader {
    fn run(&mut self) {
        while let Some(session) = self.wait_for_work() {
            // The next regions are read while the ones before are digested.
            let mut before = None;
            loop {
                let taken = self.take(session);
                if taken.is_empty() {
                    break;
                }
                if taken.iter().any(|region| self.source.track(usize::from(region.volume)).in_flight(region.region)) {
                    // That may take a while.
                    self.hand_over(before.take());
                }
                let drained = self.wait_drained(session, taken);
                if drained.is_empty() {
                    self.hand_over(before.take());
                    std::thread::park_timeout(RETRY_PAUSE);
                    continue;
                }
                match self.read(session, drained, before.take()) {
                    Some(read) => before = Some(read),
                    None => std::thread::park_timeout(RETRY_PAUSE),
                }
            }
            if !self.hand_over(before) {
                std::thread::park_timeout(DRAIN_POLL);
            }
        }
    }

    /// Blocks until a session is open and a region wants reading; `None`: the group ends.
    fn wait_for_work(&mut self) -> Option<u64> {
        let mut rested = false;
        let mut orders = lock(&self.shared.orders);
        loop {
            if orders.stop {
                return None;
            }
            let dirty = (0..self.source.volumes()).any(|number| self.source.track(number).next_dirty(0).is_some());
            if orders.active && !self.shared.held.load(Ordering::Acquire) && (dirty || !orders.compare.is_empty()) {
                return Some(orders.session);
            }
            // The kernel sets bits without telling: the worker sees its counters and nudges; this is the second look.
            let pause = Duration::from_secs(1);
            let (locked, waited) = self.shared.wake.wait_timeout(orders, pause).unwrap_or_else(PoisonError::into_inner);
            orders = locked;
            if waited.timed_out() && !std::mem::replace(&mut rested, true) {
                // A sync is over and the next may be a month away.
                self.pool.rest();
            }
        }
    }

    fn take(&mut self, session: u64) -> Vec<Taken> {
        let mut taken = Vec::with_capacity(READ_REGIONS_MAX);
        while taken.len() < READ_REGIONS_MAX {
            let in_hand = self.shared.in_hand() as usize;
            if in_hand >= SYNC_REGIONS_MAX {
                break;
            }
            let Some(buf) = self.take_buffer() else { break };
            let Some((purpose, volume, region)) = self.take_region(session) else { break };
            let extent = region_extent(region, self.volumes[usize::from(volume)].len());
            let id = {
                let mut tracker = lock(&self.shared.tracker);
                tracker.register(volume, extent, self.source.stream().producer())
            };
            taken.push(Taken { id, purpose, volume, region, extent, buf });
        }
        taken
    }

    /// Not all: a group whose receiver does not listen keeps what it has, and the others go on. (What is read, digested and asked
    /// about at once takes most of them.)
    fn take_buffer(&self) -> Option<GroupBuf> {
        if Arc::strong_count(&self.ours) > (self.pool.count() * 3 / 4).max(1) {
            return None;
        }
        self.pool.take().map(|buf| GroupBuf { buf, _ours: self.ours.clone() })
    }

    /// A dirty region (its bit is cleared, `in_hand` counts it) or one to compare.
    fn take_region(&mut self, session: u64) -> Option<(Purpose, u16, u64)> {
        let mut orders = lock(&self.shared.orders);
        if !orders.active || orders.session != session || self.shared.held.load(Ordering::Acquire) {
            return None;
        }
        for number in 0..self.source.volumes() {
            let Some(region) = self.next_free(number) else { continue };
            let track = self.source.track(number);
            // Counted before the bit goes: between the two nobody may see neither.
            self.shared.takes.fetch_add(1, Ordering::SeqCst);
            self.shared.in_hand.fetch_add(1, Ordering::SeqCst);
            if track.take_dirty(region) {
                self.cursors[number] = region + 1;
                return Some((Purpose::Send, number as u16, region));
            }
            self.shared.in_hand.fetch_sub(1, Ordering::AcqRel);
        }
        orders.compare.pop_front().map(|(volume, region)| (Purpose::Compare, volume, region))
    }

    /// The next dirty region of a volume that is in nobody's hands, going round from where the last one was.
    fn next_free(&self, number: usize) -> Option<u64> {
        let track = self.source.track(number);
        let tracker = lock(&self.shared.tracker);
        let free = |region: &u64| !tracker.is_active(number as u16, region * REGION_BYTES);
        let from = |start| std::iter::successors(track.next_dirty(start), |region| track.next_dirty(region + 1));
        // At most SYNC_REGIONS_MAX regions are active, so few steps are taken in vain.
        from(self.cursors[number]).find(free).or_else(|| from(0).find(free))
    }

    /// Waits until none of the regions has a write in flight; those that stay busy go back.
    fn wait_drained(&mut self, session: u64, taken: Vec<Taken>) -> Vec<Taken> {
        let deadline = Instant::now() + DRAIN_WAIT;
        let mut drained = Vec::with_capacity(taken.len());
        for region in taken {
            let track = self.source.track(usize::from(region.volume));
            while track.in_flight(region.region) && Instant::now() < deadline {
                std::thread::park_timeout(DRAIN_POLL);
            }
            if track.in_flight(region.region) {
                self.put_back(session, region);
            } else {
                drained.push(region);
            }
        }
        drained
    }

    fn put_back(&self, session: u64, taken: Taken) {
        lock(&self.shared.tracker).forget(taken.id);
        match taken.purpose {
            Purpose::Send => {
                let track = self.source.track(usize::from(taken.volume));
                track.set_dirty(taken.region);
                track.set_finished(taken.region);
                self.shared.done();
            }
            Purpose::Compare => {
                let busy = FromSync::Busy { volume: taken.volume, region: taken.region, session };
                // The worker is gone only when the group ends.
                let _ = self.out.blocking_send(busy);
            }
        }
    }

    /// Reads the regions, and hands over the ones that were read before. `None`: they could not be read and went back.
    fn read(&mut self, session: u64, mut taken: Vec<Taken>, before: Option<Batch>) -> Option<Batch> {
        let Self { queue, volumes, out, shared, .. } = self;
        let files: Vec<&DirectFile> = volumes.iter().collect();
        let mut reads: Vec<(usize, u64, &mut [u8])> = taken
            .iter_mut()
            .map(|region| {
                let bytes = region.extent.len() as usize;
                (usize::from(region.volume), region.extent.start, &mut region.buf.buf[..bytes])
            })
            .collect();
        let outcome = queue.read_batch_while(&files, &mut reads, || {
            if let Some(before) = before {
                before.hand_over(shared, out);
            }
        });
        drop(reads);
        if let Err(error) = outcome {
            let volume = taken.first().map_or(0, |region| region.volume);
            if !std::mem::replace(&mut self.failed, true) {
                let _ = self.out.blocking_send(FromSync::Failed { volume, error });
            }
            for region in taken {
                self.put_back(session, region);
            }
            return None;
        }
        self.failed = false;
        Some(Batch { session, regions: taken, read_end: self.source.stream().producer() })
    }

    /// Whether there was something to hand over.
    fn hand_over(&self, batch: Option<Batch>) -> bool {
        let Some(batch) = batch else { return false };
        batch.hand_over(&self.shared, &self.out);
        true
    }
}

/// Regions that were read together, not digested yet.
struct Batch {
    session: u64,
    regions: Vec<Taken>,
    /// See [`RegionRead::read_end`].
    read_end: u64,
}

impl Batch {
    /// Digests the regions and gives them to the worker, which is gone only when the group ends.
    fn hand_over(self, shared: &SyncShared, out: &mpsc::Sender<FromSync>) {
        let Self { session, regions, read_end } = self;
        for region in regions {
            let fresh = lock(&shared.orders).fresh.get(usize::from(region.volume)).copied().unwrap_or(false);
            let wanted = region.purpose == Purpose::Compare || !fresh;
            let digests = digests(&region.buf.buf[..region.extent.len() as usize], wanted);
            let Taken { id, purpose, volume, region, extent, buf } = region;
            let bytes = Bytes::from_owner(RegionBytes(buf, extent.len() as usize));
            let read = RegionRead { id, session, purpose, volume, region, extent, bytes, digests, read_end };
            if out.blocking_send(FromSync::Read(read)).is_err() {
                return;
            }
        }
    }
}

/// A digest per block. Without `wanted` only zeroes are told apart.
fn digests(bytes: &[u8], wanted: bool) -> Vec<Digest> {
    let blocks = bytes.chunks(DIGEST_BLOCK_BYTES as usize);
    blocks
        .map(|block| match wanted {
            true => block_digest(block),
            false if is_zero(block) => ZERO_DIGEST,
            false => [0xff; 16],
        })
        .collect()
}
