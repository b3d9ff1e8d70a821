//! The regions under way between the sync thread and the receiver: what to send for each, and when. Pure.
//!
//! ```text
//!  read ──► (stream reaches the read's end) ──► probe ──► differs? ──► image ──► done
//!                     │ replica is empty ─────────────────────▲    no ──────▲
//! ```

use super::sync::{Purpose, RegionRead};
use super::tracker::RegionId;
use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};
use varve_common::geometry::{Extent, ExtentSet};
use varve_common::limits::DIGEST_BLOCK_BYTES;
use varve_common::wire::messages::{Probe, ZERO_DIGEST};

/// How often a region is compared outside a gap before what is written to it all the time counts as a difference. In the gap
/// that begins then it is compared by the sector.
const LOOKS_MAX: u32 = 5;
/// Regions whose looks are counted; one more is not looked at again.
const RESTLESS_MAX: usize = 64;

/// One bit per digest block of a region.
pub type Blocks = u16;

/// What to do with a region now.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Ask the receiver which blocks differ.
    Probe(Probe),
    /// Send these blocks.
    Image(RegionId, Blocks),
    /// Nothing is left to do for it.
    Done(RegionId),
    /// What differs there may be what was written meanwhile, or more: it is dirty still.
    Again(RegionId),
    /// The replica lacks something there, and no gap says so: it is dirty still, and a gap begins.
    Lacking(RegionId),
}

/// Regions by what they wait for.
#[derive(Default)]
pub struct Regions {
    /// Read, waiting for the stream to reach the end of the read. In the order of those ends.
    waiting: VecDeque<RegionRead>,
    /// Probe sent, or image sent.
    under_way: BTreeMap<RegionId, RegionRead>,
    /// Of probes under way: blocks written between the read and the probe's position.
    touched: BTreeMap<RegionId, Blocks>,
    /// Looks at regions, by volume and number, outside a gap that said nothing: all that differed was also written to.
    restless: BTreeMap<(u16, u64), u32>,
}

/// Blocks of `read` that `overtaken` touches.
pub fn touched_blocks(extent: Extent, overtaken: &ExtentSet) -> Blocks {
    let mut blocks = 0;
    for (index, start) in (extent.start..extent.end).step_by(DIGEST_BLOCK_BYTES as usize).enumerate() {
        let block = Extent { start, end: (start + DIGEST_BLOCK_BYTES).min(extent.end) };
        if overtaken.intersects(block) {
            blocks |= 1 << index;
        }
    }
    blocks
}

/// All blocks of a region of `blocks` digests.
pub fn all_blocks(blocks: usize) -> Blocks {
    ((1u32 << blocks) - 1) as Blocks
}

impl Regions {
    /// A region was read.
    pub fn push(&mut self, read: RegionRead) {
        self.waiting.push_back(read);
    }

    /// Whether nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.under_way.is_empty()
    }

    /// Whether a region that is to be sent is under way.
    pub fn is_sending(&self) -> bool {
        self.waiting.iter().chain(self.under_way.values()).any(|read| read.purpose == Purpose::Send)
    }

    /// The next region that may go, now that everything before `sent` was sent. `fresh(volume)`: its replica is empty
    /// but for what the stream wrote.
    pub fn next(&mut self, sent: u64, fresh: impl Fn(u16) -> bool) -> Option<Next> {
        if self.waiting.front()?.read_end > sent {
            return None;
        }
        let read = self.waiting.pop_front()?;
        let id = read.id;
        let next = if read.purpose == Purpose::Send && fresh(read.volume) {
            // Zeroes too, although they cost no more than an extent: the stream may have written there what the volume
            // does not hold (a write that failed, or one that was followed by a dropped one).
            Next::Image(id, all_blocks(read.digests.len()))
        } else {
            Next::Probe(Probe {
                id,
                volume: read.volume,
                offset: read.extent.start,
                length: read.extent.len() as u32,
                digests: read.digests.clone(),
            })
        };
        self.under_way.insert(id, read);
        Some(next)
    }

    /// The receiver answered a probe: what to do with that region. `consistent`: it knows of no gap. `None`: not one of ours.
    pub fn probed(&mut self, id: RegionId, differs: Blocks, consistent: bool) -> Option<(Purpose, Next)> {
        let read = self.under_way.get(&id)?;
        let differs = differs & all_blocks(read.digests.len());
        let place = (read.volume, read.region);
        let purpose = read.purpose;
        let next = match purpose {
            Purpose::Compare => Next::Done(id),
            Purpose::Send if consistent => self.compared(id, place, differs),
            Purpose::Send => {
                self.restless.remove(&place);
                if differs != 0 { Next::Image(id, differs) } else { Next::Done(id) }
            }
        };
        Some((purpose, next))
    }

    /// Some bits are set without a loss that is known: a completion that nobody saw may have been that of a failed write.
    /// If the region is equal nothing was lost, and nobody need be told. If not it is sent, in a gap: the receiver takes
    /// no image outside one, and rightly so.
    ///
    /// A block that was written to meanwhile differs in any case, and nothing is known of the rest of it. Its region is looked
    /// at until it holds still, but not for ever.
    fn compared(&mut self, id: RegionId, place: (u16, u64), differs: Blocks) -> Next {
        let looks = self.restless.remove(&place).unwrap_or(0) + 1;
        if differs == 0 {
            return Next::Done(id);
        }
        if differs & !self.touched(id) != 0 || looks >= LOOKS_MAX || self.restless.len() >= RESTLESS_MAX {
            return Next::Lacking(id);
        }
        self.restless.insert(place, looks);
        Next::Again(id)
    }

    /// The region with this number, if it is under way.
    pub fn get(&self, id: RegionId) -> Option<&RegionRead> {
        self.under_way.get(&id)
    }

    /// Takes a region's bytes to send them; its buffer is free as soon as they are gone.
    pub fn take_bytes(&mut self, id: RegionId) -> Bytes {
        self.under_way.get_mut(&id).map(|read| std::mem::take(&mut read.bytes)).unwrap_or_default()
    }

    /// A probe was sent: these blocks were written between the read and its position.
    pub fn set_touched(&mut self, id: RegionId, blocks: Blocks) {
        self.touched.insert(id, blocks);
    }

    /// See [`Regions::set_touched`]; all blocks if that was never said.
    pub fn touched(&self, id: RegionId) -> Blocks {
        self.touched.get(&id).copied().unwrap_or(Blocks::MAX)
    }

    /// A region is done.
    pub fn remove(&mut self, id: RegionId) -> Option<RegionRead> {
        self.touched.remove(&id);
        self.under_way.remove(&id)
    }

    /// Everything that is under way, because the session ended.
    pub fn drain(&mut self) -> Vec<RegionRead> {
        let mut all: Vec<RegionRead> = self.waiting.drain(..).collect();
        all.extend(std::mem::take(&mut self.under_way).into_values());
        all
    }
}

/// Offset in the volume, length, range of bytes in the region's buffer, or `None` for zeroes.
pub type ImagePart = (u64, u64, Option<(usize, usize)>);

/// The extents of an image: the blocks to send without what the stream has overtaken.
pub fn image_extents(read: &RegionRead, blocks: Blocks, overtaken: &ExtentSet) -> Vec<ImagePart> {
    let mut extents: Vec<ImagePart> = Vec::new();
    for (index, digest) in read.digests.iter().enumerate().filter(|(index, _)| blocks & (1 << index) != 0) {
        let start = read.extent.start + index as u64 * DIGEST_BLOCK_BYTES;
        let block = Extent { start, end: (start + DIGEST_BLOCK_BYTES).min(read.extent.end) };
        overtaken.for_each_missing(block, |part| {
            let from = (part.start - read.extent.start) as usize;
            let data = (*digest != ZERO_DIGEST).then_some((from, from + part.len() as usize));
            match extents.last_mut() {
                Some((offset, length, Some((_, to)))) if *offset + *length == part.start && data.is_some() => {
                    *length += part.len();
                    *to += part.len() as usize;
                }
                Some((offset, length, None)) if *offset + *length == part.start && data.is_none() => {
                    *length += part.len();
                }
                _ => extents.push((part.start, part.len(), data)),
            }
        });
    }
    extents
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(id: u64, read_end: u64, zero_blocks: &[usize]) -> RegionRead {
        let mut digests = vec![[1; 16]; 16];
        for &block in zero_blocks {
            digests[block] = ZERO_DIGEST;
        }
        RegionRead {
            id,
            session: 1,
            purpose: Purpose::Send,
            volume: 0,
            region: 1,
            extent: Extent { start: 1 << 20, end: 2 << 20 },
            bytes: Bytes::new(),
            digests,
            read_end,
        }
    }

    #[test]
    fn nothing_goes_before_the_stream_reached_the_read() {
        let mut regions = Regions::default();
        regions.push(read(1, 500, &[]));
        assert_eq!(regions.next(499, |_| false), None);
        assert!(matches!(regions.next(500, |_| false), Some(Next::Probe(probe)) if probe.id == 1));
        assert_eq!(regions.probed(1, 0b101, false), Some((Purpose::Send, Next::Image(1, 0b101))));
        assert_eq!(regions.probed(1, 0, false), Some((Purpose::Send, Next::Done(1))));
        assert_eq!(regions.probed(7, 0, false), None, "a number that was never sent");
    }

    /// Outside a gap: what differs and was written to meanwhile says nothing, neither at the first look nor for ever.
    #[test]
    fn a_block_that_is_written_to_is_no_proof() {
        let mut regions = Regions::default();
        let mut look = |id: u64, differs, touched| {
            regions.push(read(id, 0, &[]));
            assert!(matches!(regions.next(0, |_| false), Some(Next::Probe(_))));
            regions.set_touched(id, touched);
            let next = regions.probed(id, differs, true).expect("under way").1;
            regions.remove(id);
            next
        };
        assert_eq!(look(1, 0, 0b11), Next::Done(1), "equal is equal");
        assert_eq!(look(2, 0b11, 0b01), Next::Lacking(2));
        for id in 3..3 + u64::from(LOOKS_MAX) - 1 {
            assert_eq!(look(id, 0b01, 0b01), Next::Again(id));
        }
        assert_eq!(look(8, 0b01, 0b01), Next::Lacking(8), "often enough");
        assert_eq!(look(9, 0b01, 0b01), Next::Again(9), "counted anew");
        assert_eq!(look(10, 0, 0b01), Next::Done(10));
    }

    #[test]
    fn an_empty_replica_needs_no_probe() {
        let mut regions = Regions::default();
        regions.push(read(1, 0, &[0, 1, 2]));
        assert_eq!(regions.next(0, |_| true), Some(Next::Image(1, 0xffff)));
        let extents = image_extents(regions.get(1).expect("under way"), 0xffff, &ExtentSet::new());
        assert_eq!(extents, [(1 << 20, 3 << 16, None), ((1 << 20) + (3 << 16), 13 << 16, Some((3 << 16, 1 << 20)))]);
    }

    #[test]
    fn overtaken_sectors_are_left_out() {
        let region = read(1, 0, &[1]);
        let base = 1u64 << 20;
        let mut overtaken = ExtentSet::new();
        overtaken.insert(Extent { start: base + 512, end: base + 1024 });
        overtaken.insert(Extent { start: base + 65536, end: base + 65536 + 4096 });
        let extents = image_extents(&region, 0b11, &overtaken);
        assert_eq!(
            extents,
            [
                (base, 512, Some((0, 512))),
                (base + 1024, 65536 - 1024, Some((1024, 65536))),
                (base + 65536 + 4096, 65536 - 4096, None),
            ]
        );
        assert_eq!(touched_blocks(region.extent, &overtaken), 0b11);
    }
}
