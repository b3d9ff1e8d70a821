//! Regions as the volumes held them at a point, with their digests. For a thread of its own.

use super::blocks::Blocks;
use crate::failpoint;
use crate::view::volume::ViewVolume;
use bytes::Bytes;
use std::sync::Arc;
use tokio::sync::mpsc;
use varve_common::geometry::Extent;
use varve_common::limits::DIGEST_BLOCK_BYTES;
use varve_common::wire::Image;
use varve_common::wire::digest::block_digest;
use varve_common::wire::messages::{Digest, ZERO_DIGEST};
use varve_export::disk::Disk;
use varve_timeline::timeline::Pin;

/// A region.
#[derive(Debug)]
pub struct Region {
    /// The volume's number.
    pub volume: u16,
    /// Where it lies.
    pub extent: Extent,
    /// Its bytes; empty: zeroes.
    pub bytes: Bytes,
    /// One for each digest block.
    pub digests: Vec<Digest>,
}

impl Region {
    /// What block *i* covers.
    pub fn block(&self, number: usize) -> Extent {
        let start = self.extent.start + number as u64 * DIGEST_BLOCK_BYTES;
        Extent { start, end: (start + DIGEST_BLOCK_BYTES).min(self.extent.end) }
    }

    /// The numbers of these blocks.
    pub fn blocks(&self, differs: u16) -> impl Iterator<Item = usize> + '_ {
        (0..self.digests.len()).filter(move |number| differs & (1 << number) != 0)
    }

    /// An image of these blocks; and its bytes of the volume.
    pub fn image(&self, id: u64, differs: u16) -> (Vec<u8>, u64) {
        let mut extents: Vec<(u64, u64, Option<&[u8]>)> = Vec::new();
        let mut total = 0;
        for number in self.blocks(differs) {
            let block = self.block(number);
            total += block.len();
            let from = (block.start - self.extent.start) as usize;
            let zero = self.digests[number] == ZERO_DIGEST;
            let bytes = (!zero).then(|| &self.bytes[from..from + block.len() as usize]);
            extents.push((block.start, block.len(), bytes));
        }
        let mut body = Vec::with_capacity(total as usize + 512);
        Image::encode(id, self.volume, &extents, &mut body);
        (body, total)
    }
}

/// Reads all of `set`, in order, until nobody takes it any more. The pin keeps the volumes' point from expiring.
pub fn run(volumes: &[Arc<ViewVolume>], set: &Blocks, _pin: &Pin, out: &mpsc::Sender<Result<Region, String>>) {
    for (volume, extent) in set.iter() {
        failpoint::hold(failpoint::HOME_PASS_HELD, || out.is_closed());
        let region = read(&volumes[usize::from(volume)], volume, extent);
        let failed = region.is_err();
        if out.blocking_send(region).is_err() || failed {
            return;
        }
    }
}

/// One region.
pub(super) fn read(view: &ViewVolume, volume: u16, extent: Extent) -> Result<Region, String> {
    let count = extent.len().div_ceil(DIGEST_BLOCK_BYTES) as usize;
    let stretch = view.stretch(extent.start, extent.len()).map_err(|e| e.to_string())?;
    if stretch.hole && stretch.len >= extent.len() {
        return Ok(Region { volume, extent, bytes: Bytes::new(), digests: vec![ZERO_DIGEST; count] });
    }
    let mut bytes = vec![0; extent.len() as usize];
    view.read_point(&mut bytes, extent.start).map_err(|e| e.to_string())?;
    let digests = bytes.chunks(DIGEST_BLOCK_BYTES as usize).map(block_digest).collect();
    Ok(Region { volume, extent, bytes: bytes.into(), digests })
}
