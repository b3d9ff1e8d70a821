//! Which granules of the replicas are known to be holes: what a write replaces there is zeroes, without reading.

use super::replica::Reading;
use std::collections::HashMap;
use varve_io::{IoError, sparse};
use varve_timeline::limits::GRANULE_BYTES;

/// Granules that are looked up at once: a word of bits.
const SPAN_BYTES: u64 = GRANULE_BYTES * 64;
/// Spans of which something is known, at most: 16 bytes each for 4 MiB of volume. Beyond, all are forgotten.
const SPANS_MAX: usize = 1 << 18;

/// Looked up when it is asked for, forgotten when it is written.
#[derive(Debug, Default)]
pub struct Holes {
    /// By volume and span: a bit for each granule that is a hole for certain.
    spans: HashMap<(u16, u64), u64>,
}

impl Holes {
    /// Whether the granule around `offset` is a hole for certain.
    pub fn contains(&mut self, replicas: &Reading<'_>, volume: u16, offset: u64) -> Result<bool, IoError> {
        let (span, bit) = (offset / SPAN_BYTES, offset % SPAN_BYTES / GRANULE_BYTES);
        if let Some(bits) = self.spans.get(&(volume, span)) {
            return Ok(bits & 1 << bit != 0);
        }
        let Some(replica) = replicas.get(volume) else { return Ok(false) };
        if replica.file().is_block_device() {
            return Ok(false);
        }
        let (start, end) = (span * SPAN_BYTES, (span + 1) * SPAN_BYTES);
        let mut bits = u64::MAX;
        let mut at = start;
        while at < end {
            let Some((from, to)) = sparse::next_data(replica.file(), at)? else { break };
            if from >= end {
                break;
            }
            // A hole may be punched between the two questions of `next_data`: then its answer is empty.
            let to = to.max(from + 1);
            let (first, last) = ((from - start) / GRANULE_BYTES, (to.min(end) - 1 - start) / GRANULE_BYTES);
            (first..=last).for_each(|granule| bits &= !(1 << granule));
            at = to;
        }
        if self.spans.len() >= SPANS_MAX {
            self.spans.clear();
        }
        self.spans.insert((volume, span), bits);
        Ok(bits & 1 << bit != 0)
    }

    /// Something will be written there.
    pub fn filled(&mut self, volume: u16, start: u64, end: u64) {
        let mut at = start;
        while at < end {
            let (span, bit) = (at / SPAN_BYTES, at % SPAN_BYTES / GRANULE_BYTES);
            if let Some(bits) = self.spans.get_mut(&(volume, span)) {
                *bits &= !(1 << bit);
            }
            at = (at / GRANULE_BYTES + 1) * GRANULE_BYTES;
        }
    }
}
