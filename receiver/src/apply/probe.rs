//! Digests of what a replica holds, compared with those of the source.

use super::replica::Replica;
use varve_common::format::BLOCK_BYTES;
use varve_common::limits::{DIGEST_BLOCK_BYTES, DIGESTS_PER_REGION, REGION_BYTES};
use varve_common::wire::digest::block_digest;
use varve_common::wire::messages::{Digest, Probe, ZERO_DIGEST};
use varve_io::{AlignedBuf, IoError, sparse};

/// Why a probe cannot be about these volumes; `None` if it can.
pub fn objection(probe: &Probe, volumes: &[u64]) -> Option<String> {
    let Some(&bytes) = volumes.get(usize::from(probe.volume)) else {
        return Some(format!("a probe of volume {}, and the group has {}", probe.volume, volumes.len()));
    };
    let length = u64::from(probe.length);
    let ends = probe.offset.checked_add(length).filter(|end| *end <= bytes);
    let whole = ends.is_some_and(|end| end == bytes || length.is_multiple_of(DIGEST_BLOCK_BYTES));
    let fits = length > 0 && length <= REGION_BYTES && probe.offset.is_multiple_of(DIGEST_BLOCK_BYTES);
    if !fits || !whole || probe.digests.len() as u64 != length.div_ceil(DIGEST_BLOCK_BYTES) {
        return Some(format!(
            "a probe of {length} bytes at {} of volume {} ({bytes} bytes) with {} digests",
            probe.offset,
            probe.volume,
            probe.digests.len()
        ));
    }
    None
}

/// Compares a probe that passed [`objection`]: bit *i* is set if digest block *i* differs. Holes are not read.
pub fn compare(replica: &Replica, probe: &Probe, buf: &mut AlignedBuf) -> Result<u16, IoError> {
    debug_assert!(probe.digests.len() <= DIGESTS_PER_REGION && buf.len() as u64 >= REGION_BYTES);
    let (file, end) = (replica.file(), probe.offset + u64::from(probe.length));
    let mut differs = 0;
    let mut data = sparse::next_data(file, probe.offset)?;
    for (number, theirs) in probe.digests.iter().enumerate() {
        let start = probe.offset + number as u64 * DIGEST_BLOCK_BYTES;
        let stop = (start + DIGEST_BLOCK_BYTES).min(end);
        while data.is_some_and(|(_, data_end)| data_end <= start) {
            data = sparse::next_data(file, start)?;
        }
        let ours: Digest = if data.is_none_or(|(data_start, _)| data_start >= stop) {
            ZERO_DIGEST
        } else {
            // A device may be larger than the volume, in sectors that the volume's end does not fill.
            let read_end = stop.next_multiple_of(BLOCK_BYTES as u64).min(file.len());
            file.read_exact_at(&mut buf[..(read_end - start) as usize], start)?;
            block_digest(&buf[..(stop - start) as usize])
        };
        differs |= u16::from(ours != *theirs) << number;
    }
    Ok(differs)
}

const _: () = assert!(DIGESTS_PER_REGION <= u16::BITS as usize);
