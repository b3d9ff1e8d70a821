//! The race between image reads and writes, as a model: random interleavings of writes that are captured, dropped, under
//! way, complete, fail unseen; of regions taken, registered, read in two halves, probed, sent; of a stream that is walked and sent in
//! pieces; and of an agent that is killed in between, of which only what is pinned is left. Whatever the order, the replica
//! must equal the disk in the end. Replays by proptest's seed.

use super::regions::{Next, Regions, image_extents, touched_blocks};
use super::sync::{Purpose, RegionRead};
use super::tracker::{RegionId, Tracker};
use proptest::prelude::*;
use varve_common::geometry::{Extent, region_extent};
use varve_common::limits::{DIGEST_BLOCK_BYTES, REGION_BYTES};
use varve_common::wire::digest::block_digest;
use varve_common::wire::messages::Digest;
use varve_io::aligned::{BufPool, PooledBuf};

const REGIONS: u64 = 3;
const SECTOR: u64 = 512;
const SECTORS: usize = (REGIONS * REGION_BYTES / SECTOR) as usize;

#[derive(Clone, Copy, Debug)]
struct Write {
    extent: Extent,
    version: u32,
}

/// Where a region is between its bit and the receiver.
enum Hand {
    Registered,
    HalfRead(PooledBuf),
}

struct World {
    disk: Vec<u32>,
    replica: Vec<u32>,
    in_flight: Vec<Write>,
    stream: Vec<Write>,
    walked: usize,
    sent: usize,
    dirty: [bool; REGIONS as usize],
    /// Taken from `dirty` and not finished: pinned as well.
    taken: [bool; REGIONS as usize],
    tracker: Tracker,
    hands: Vec<(RegionId, u64, Hand)>,
    regions: Regions,
    replies: Vec<(RegionId, u16)>,
    pool: BufPool,
    version: u32,
    fresh: bool,
    /// The receiver knows of no gap.
    consistent: bool,
}

fn sectors(extent: Extent) -> std::ops::Range<usize> {
    (extent.start / SECTOR) as usize..(extent.end / SECTOR) as usize
}

fn bytes_of(content: &[u32], extent: Extent) -> Vec<u8> {
    let mut bytes = vec![0; extent.len() as usize];
    for (sector, chunk) in content[sectors(extent)].iter().zip(bytes.chunks_mut(SECTOR as usize)) {
        chunk[..4].copy_from_slice(&sector.to_le_bytes());
    }
    bytes
}

fn digests_of(bytes: &[u8]) -> Vec<Digest> {
    bytes.chunks(DIGEST_BLOCK_BYTES as usize).map(block_digest).collect()
}

impl World {
    fn new(fresh: bool) -> Self {
        let mut world = Self {
            disk: vec![0; SECTORS],
            replica: vec![0; SECTORS],
            in_flight: Vec::new(),
            stream: Vec::new(),
            walked: 0,
            sent: 0,
            dirty: [true; REGIONS as usize],
            taken: [false; REGIONS as usize],
            tracker: Tracker::default(),
            hands: Vec::new(),
            regions: Regions::default(),
            replies: Vec::new(),
            pool: BufPool::new(REGIONS as usize, REGION_BYTES as usize),
            version: 1,
            fresh,
            consistent: false,
        };
        // Content from before capture began.
        for sector in (0..SECTORS).step_by(3) {
            world.disk[sector] = 1;
        }
        if !fresh {
            world.replica[5..900].fill(77);
        }
        world
    }

    /// Protected: nothing is dirty, and no gap is open.
    fn protected() -> Self {
        let mut world = Self::new(false);
        world.replica.clone_from(&world.disk);
        world.dirty = [false; REGIONS as usize];
        world.consistent = true;
        world
    }

    /// The disk holds what the stream does not, and all that is known of it is the dirty bit, as after a completion that
    /// nobody saw.
    fn change_unseen(&mut self, start: usize, length: usize) {
        let start = start % SECTORS;
        let end = (start + length).min(SECTORS);
        let extent = Extent { start: start as u64 * SECTOR, end: end as u64 * SECTOR };
        if self.in_flight.iter().any(|write| write.extent.intersection(&extent).is_some()) {
            return;
        }
        self.version += 1;
        self.disk[start..end].fill(self.version);
        for region in extent.start / REGION_BYTES..=(extent.end - 1) / REGION_BYTES {
            self.dirty[region as usize] = true;
        }
    }

    fn finish_gap(&mut self) {
        let nothing_left = self.hands.is_empty() && self.regions.is_empty() && self.dirty.iter().all(|dirty| !dirty);
        if nothing_left && self.sent == self.stream.len() {
            self.consistent = true;
            self.fresh = false;
        }
    }

    fn submit(&mut self, start: usize, length: usize, dropped: bool) {
        let start = start % SECTORS;
        let end = (start + length).min(SECTORS);
        let extent = Extent { start: start as u64 * SECTOR, end: end as u64 * SECTOR };
        // Writers that overlap while under way have no order that anybody could keep.
        if self.in_flight.iter().any(|write| write.extent.intersection(&extent).is_some()) {
            return;
        }
        self.version += 1;
        let write = Write { extent, version: self.version };
        self.in_flight.push(write);
        if dropped {
            self.consistent = false;
            for region in extent.start / REGION_BYTES..=(extent.end - 1) / REGION_BYTES {
                self.dirty[region as usize] = true;
            }
        } else {
            self.stream.push(write);
        }
    }

    fn complete(&mut self, index: usize) {
        if !self.in_flight.is_empty() {
            let write = self.in_flight.swap_remove(index % self.in_flight.len());
            self.disk[sectors(write.extent)].fill(write.version);
        }
    }

    fn walk(&mut self) {
        for (index, write) in self.stream.iter().enumerate().skip(self.walked) {
            self.tracker.note(index as u64, 0, write.extent);
        }
        self.walked = self.stream.len();
    }

    fn take(&mut self, region: usize) {
        let region = region % REGIONS as usize;
        let extent = region_extent(region as u64, REGIONS * REGION_BYTES);
        if !self.tracker.is_active(0, extent.start) && std::mem::take(&mut self.dirty[region]) {
            self.taken[region] = true;
            let id = self.tracker.register(0, extent, self.stream.len() as u64);
            self.hands.push((id, region as u64, Hand::Registered));
        }
    }

    fn read(&mut self, index: usize) {
        if self.hands.is_empty() {
            return;
        }
        let index = index % self.hands.len();
        let (id, region, _) = self.hands[index];
        let extent = region_extent(region, REGIONS * REGION_BYTES);
        let half = (extent.len() / 2) as usize;
        let now = bytes_of(&self.disk, extent);
        match &mut self.hands[index].2 {
            hand @ Hand::Registered => {
                // The reader waits until nothing is in flight.
                if self.in_flight.iter().any(|write| write.extent.intersection(&extent).is_some()) {
                    return;
                }
                let Some(mut bytes) = self.pool.take() else { return };
                bytes[..half].copy_from_slice(&now[..half]);
                *hand = Hand::HalfRead(bytes);
            }
            Hand::HalfRead(_) => {
                let (_, _, Hand::HalfRead(mut bytes)) = self.hands.swap_remove(index) else { return };
                bytes[half..].copy_from_slice(&now[half..]);
                let bytes = bytes::Bytes::copy_from_slice(&bytes);
                let digests = digests_of(&bytes);
                let (purpose, read_end) = (Purpose::Send, self.stream.len() as u64);
                self.regions.push(RegionRead {
                    id,
                    session: 1,
                    purpose,
                    volume: 0,
                    region,
                    extent,
                    bytes,
                    digests,
                    read_end,
                });
            }
        }
    }

    fn send(&mut self, count: usize) {
        // The worker walks before it cuts.
        let until = (self.sent + count).min(self.walked);
        for write in &self.stream[self.sent..until] {
            self.replica[sectors(write.extent)].fill(write.version);
        }
        self.sent = until;
        let fresh = self.fresh;
        while let Some(next) = self.regions.next(self.sent as u64, |_| fresh) {
            self.act(next);
        }
    }

    fn act(&mut self, next: Next) {
        match next {
            Next::Probe(probe) => {
                let extent = Extent { start: probe.offset, end: probe.offset + u64::from(probe.length) };
                self.regions.set_touched(probe.id, touched_blocks(extent, &self.tracker.overtaken(probe.id)));
                let here = digests_of(&bytes_of(&self.replica, extent));
                let differs = here.iter().zip(&probe.digests).enumerate();
                let differs = differs.fold(0, |bits, (i, (a, b))| bits | u16::from(a != b) << i);
                self.replies.push((probe.id, differs));
            }
            Next::Image(id, blocks) => {
                assert!(!self.consistent, "the receiver takes no image outside a gap");
                let read = self.regions.get(id).expect("under way");
                for (offset, length, range) in image_extents(read, blocks, &self.tracker.overtaken(id)) {
                    let first = (offset / SECTOR) as usize;
                    for index in 0..(length / SECTOR) as usize {
                        let version = range.map_or(0, |(from, _)| {
                            let at = from + index * SECTOR as usize;
                            u32::from_le_bytes(read.bytes[at..at + 4].try_into().expect("four bytes"))
                        });
                        self.replica[first + index] = version;
                    }
                }
                self.act(Next::Done(id));
            }
            Next::Done(id) => {
                self.tracker.forget(id);
                if let Some(read) = self.regions.remove(id) {
                    self.taken[read.region as usize] = false;
                }
            }
            Next::Again(id) | Next::Lacking(id) => {
                self.consistent &= matches!(next, Next::Again(_));
                let region = self.regions.get(id).expect("under way").region;
                self.dirty[region as usize] = true;
                self.act(Next::Done(id));
            }
        }
    }

    fn reply(&mut self) {
        if let Some((id, differs)) = self.replies.pop() {
            // The worker's turn begins with a walk, so everything sent was noted.
            let (_, next) = self.regions.probed(id, differs, self.consistent).expect("under way");
            self.act(next);
        }
    }

    /// The agent is killed, and the next one takes over. The disk, the writes under way, the stream and the bitmaps are the
    /// kernel's; how far the stream came is the receiver's; all else is gone.
    fn kill(&mut self) {
        self.tracker = Tracker::default();
        self.hands.clear();
        self.regions = Regions::default();
        self.replies.clear();
        self.walked = self.sent;
        for (dirty, taken) in self.dirty.iter_mut().zip(&mut self.taken) {
            *dirty |= std::mem::take(taken);
        }
        // Told in the welcome: what the stream brought is in the replica, and images perhaps.
        self.fresh &= self.sent == 0;
    }

    /// One look at a region, with a captured write to `busy` between its read and the receiver's comparison.
    fn look(&mut self, region: usize, busy: usize) {
        self.take(region);
        self.read(0);
        self.read(0);
        self.submit(busy, 1, false);
        self.complete(0);
        self.walk();
        self.send(usize::MAX / 2);
        self.reply();
    }

    fn finish(&mut self) {
        while !self.in_flight.is_empty() {
            self.complete(0);
        }
        for _ in 0..100 {
            (0..REGIONS as usize).for_each(|region| self.take(region));
            (0..2 * self.hands.len()).for_each(|index| self.read(index));
            self.walk();
            self.send(usize::MAX / 2);
            while !self.replies.is_empty() {
                self.reply();
            }
        }
        assert!(self.hands.is_empty() && self.regions.is_empty() && self.dirty.iter().all(|dirty| !dirty));
    }
}

/// A long run: `PROPTEST_CASES=20000`.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(64)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_replica_equals_the_disk(
        fresh in any::<bool>(),
        protected in any::<bool>(),
        steps in prop::collection::vec((0u8..19, any::<u16>(), 1usize..300), 50..400),
    ) {
        let mut world = if protected { World::protected() } else { World::new(fresh) };
        for (step, number, length) in steps {
            let number = usize::from(number);
            match step {
                0..=3 => world.submit(number, length, false),
                4 => world.submit(number, length, true),
                5..=7 => world.complete(number),
                8 | 9 => world.walk(),
                10 => world.take(number),
                11 | 12 => world.read(number),
                13 | 14 => world.send(number % 5),
                15 if number % 8 == 0 => world.kill(),
                16 => world.change_unseen(number, length),
                17 => world.finish_gap(),
                _ => world.reply(),
            }
        }
        world.finish();
        for (sector, (disk, replica)) in world.disk.iter().zip(&world.replica).enumerate() {
            prop_assert_eq!(disk, replica, "sector {}", sector);
        }
    }
}

/// One sector is lost without a word, another one of its block is written all the time: whether the block differs for that
/// alone is not known until it was compared by the sector.
#[test]
fn a_busy_sector_does_not_hide_a_lost_one() {
    for looks in 1..20 {
        let mut world = World::protected();
        world.change_unseen(10, 1);
        for _ in 0..looks {
            world.look(0, 20);
        }
        assert!(world.dirty[0] || world.replica[10] == world.disk[10], "forgotten after {looks} looks");
        assert!(looks < 6 || world.replica[10] == world.disk[10], "sent although the other never rests");
        world.finish();
        assert!(world.replica == world.disk, "after {looks} looks");
    }
}

/// The same if nothing was lost: what is written all the time is no reason to look for ever.
#[test]
fn a_busy_sector_alone_holds_still_for_a_look() {
    let mut world = World::protected();
    world.dirty[0] = true;
    world.look(0, 20);
    assert!(world.consistent && world.dirty[0], "nothing is known yet");
    world.finish();
    assert!(world.consistent && world.replica == world.disk, "no gap");
}
