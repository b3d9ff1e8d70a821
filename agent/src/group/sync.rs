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
use varve_io::uring::ReadAhead;

/// Regions that are waited for or read at once.
const READ_REGIONS_MAX: usize = 4;
/// How long a region may have writes in flight before another one is tried first.
const DRAIN_WAIT: Duration = Duration::from_millis(50);
/// Pause between looks at a region's writes in flight.
const DRAIN_POLL: Duration = Duration::from_micros(200);
/// Looks at writes in flight, with nothing to read, between two looks for other regions.
const TAKE_POLLS: u32 = 25;
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
        let reads = ReadAhead::new(READ_REGIONS_MAX)?;
        let cursors = vec![0; volumes.len()];
        let mut reader = Reader {
            source,
            volumes,
            pool,
            out,
            draining: VecDeque::with_capacity(READ_REGIONS_MAX),
            reads,
            shared: shared.clone(),
            cursors,
            first: 0,
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

/// The used part of a buffer of the pool that all groups share. Counted as this group's until it is dropped.
struct RegionBytes {
    buf: PooledBuf,
    used: usize,
    _ours: Arc<()>,
}

impl AsRef<[u8]> for RegionBytes {
    fn as_ref(&self) -> &[u8] {
        &self.buf[..self.used]
    }
}

/// A region that is registered, with a right to a buffer.
struct Taken {
    session: u64,
    id: RegionId,
    purpose: Purpose,
    volume: u16,
    region: u64,
    extent: Extent,
    ours: Arc<()>,
}

/// A region whose writes in flight are waited for, until when, and the buffer that it will be read into.
struct Draining {
    region: Taken,
    until: Instant,
    buf: PooledBuf,
}

struct Reader {
    source: Arc<dyn Source>,
    volumes: Vec<DirectFile>,
    pool: BufPool,
    out: mpsc::Sender<FromSync>,
    draining: VecDeque<Draining>,
    reads: ReadAhead<PooledBuf, Taken>,
    shared: Arc<SyncShared>,
    cursors: Vec<u64>,
    /// The volume whose turn it is: until once round it, or until a region of it is too busy.
    first: usize,
    failed: bool,
    /// As many as the group has buffers, and one.
    ours: Arc<()>,
}

impl Reader {
    fn run(&mut self) {
        while let Some(session) = self.wait_for_work() {
            let (mut worked, mut polls) = (false, 0);
            loop {
                // It looks through whole bitmaps: not each time that writes in flight are looked at.
                if polls % TAKE_POLLS == 0 {
                    self.take(session);
                }
                let put_back = self.drain();
                // While this one is digested the others are read.
                let read = self.next_read();
                worked |= put_back > 0 || read.is_some();
                polls = if read.is_none() && !self.draining.is_empty() { polls + 1 } else { 0 };
                match read {
                    Some(Ok(read)) => self.hand_over(read),
                    Some(Err(())) => std::thread::park_timeout(RETRY_PAUSE),
                    None if !self.draining.is_empty() => std::thread::park_timeout(DRAIN_POLL),
                    None if put_back > 0 => std::thread::park_timeout(RETRY_PAUSE),
                    None => break,
                }
            }
            if !worked {
                // There is something to read, and no buffer for it, or it is in somebody's hands.
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

    /// Takes and registers as many regions as may be read at once.
    fn take(&mut self, session: u64) {
        while self.draining.len() + self.reads.len() < READ_REGIONS_MAX {
            if self.shared.in_hand() as usize >= SYNC_REGIONS_MAX {
                break;
            }
            let Some((buf, ours)) = self.take_buffer() else { break };
            let Some((purpose, volume, region)) = self.take_region(session) else { break };
            let extent = region_extent(region, self.volumes[usize::from(volume)].len());
            let id = {
                let mut tracker = lock(&self.shared.tracker);
                tracker.register(volume, extent, self.source.stream().producer())
            };
            let region = Taken { session, id, purpose, volume, region, extent, ours };
            self.draining.push_back(Draining { region, until: Instant::now() + DRAIN_WAIT, buf });
        }
    }

    /// Not all: a group whose receiver does not listen keeps what it has, and the others go on. (What is read, digested and asked
    /// about at once takes most of them.)
    fn take_buffer(&self) -> Option<(PooledBuf, Arc<()>)> {
        if Arc::strong_count(&self.ours) > (self.pool.count() * 3 / 4).max(1) {
            return None;
        }
        self.pool.take().map(|buf| (buf, self.ours.clone()))
    }

    /// A dirty region (its bit is cleared, `in_hand` counts it) or one to compare.
    fn take_region(&mut self, session: u64) -> Option<(Purpose, u16, u64)> {
        let mut orders = lock(&self.shared.orders);
        if !orders.active || orders.session != session || self.shared.held.load(Ordering::Acquire) {
            return None;
        }
        let volumes = self.source.volumes();
        for number in (self.first..volumes).chain(0..self.first) {
            let Some(region) = self.next_free(number) else { continue };
            let track = self.source.track(number);
            // Counted before the bit goes: between the two nobody may see neither.
            self.shared.takes.fetch_add(1, Ordering::SeqCst);
            self.shared.in_hand.fetch_add(1, Ordering::SeqCst);
            if track.take_dirty(region) {
                if region < self.cursors[number] {
                    self.first = (number + 1) % volumes;
                }
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

    /// Starts reading the regions that have no write in flight any more; those that stay busy for too long go back. Gives how many
    /// did.
    fn drain(&mut self) -> usize {
        let mut put_back = 0;
        for _ in 0..self.draining.len() {
            let Some(Draining { region, until, buf }) = self.draining.pop_front() else { break };
            let volume = usize::from(region.volume);
            if !self.source.track(volume).in_flight(region.region) {
                let read = (volume, region.extent.start, 0..region.extent.len() as usize);
                let files: Vec<&DirectFile> = self.volumes.iter().collect();
                self.reads.start(&files, &[read], buf, region);
            } else if Instant::now() < until {
                self.draining.push_back(Draining { region, until, buf });
            } else {
                if region.purpose == Purpose::Send {
                    self.first = (volume + 1) % self.source.volumes();
                }
                self.put_back(region);
                put_back += 1;
            }
        }
        put_back
    }

    fn put_back(&self, taken: Taken) {
        lock(&self.shared.tracker).forget(taken.id);
        match taken.purpose {
            Purpose::Send => {
                let track = self.source.track(usize::from(taken.volume));
                track.set_dirty(taken.region);
                track.set_finished(taken.region);
                self.shared.done();
            }
            Purpose::Compare => {
                let busy = FromSync::Busy { volume: taken.volume, region: taken.region, session: taken.session };
                // The worker is gone only when the group ends.
                let _ = self.out.blocking_send(busy);
            }
        }
    }

    /// Waits for a region that is being read; `None` if there is none. One that could not be read went back.
    fn next_read(&mut self) -> Option<Result<Read, ()>> {
        let files: Vec<&DirectFile> = self.volumes.iter().collect();
        let (buf, region, result) = self.reads.next(&files)?;
        match result {
            Ok(()) => {
                self.failed = false;
                Some(Ok(Read { read_end: self.source.stream().producer(), region, buf }))
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failed, true) {
                    let _ = self.out.blocking_send(FromSync::Failed { volume: region.volume, error });
                }
                drop(buf);
                self.put_back(region);
                Some(Err(()))
            }
        }
    }

    /// Digests a region and gives it to the worker, which is gone only when the group ends.
    fn hand_over(&self, read: Read) {
        let Read { region: Taken { session, id, purpose, volume, region, extent, ours }, buf, read_end } = read;
        let fresh = lock(&self.shared.orders).fresh.get(usize::from(volume)).copied().unwrap_or(false);
        let used = extent.len() as usize;
        let digests = digests(&buf[..used], purpose == Purpose::Compare || !fresh);
        let bytes = Bytes::from_owner(RegionBytes { buf, used, _ours: ours });
        let read = RegionRead { id, session, purpose, volume, region, extent, bytes, digests, read_end };
        let _ = self.out.blocking_send(FromSync::Read(read));
    }
}

/// A region that was read, not digested yet.
struct Read {
    region: Taken,
    buf: PooledBuf,
    /// See [`RegionRead::read_end`].
    read_end: u64,
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
