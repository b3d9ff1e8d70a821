//! Digests of what a replica holds, compared with those of the source.

use super::replica::Replica;
use super::work::{Answer, Answered};
use crate::failure::Failure;
use crate::limits::PROBES_AT_ONCE;
use varve_common::format::BLOCK_BYTES;
use varve_common::limits::{DIGEST_BLOCK_BYTES, DIGESTS_PER_REGION, REGION_BYTES};
use varve_common::wire::digest::block_digest;
use varve_common::wire::messages::{Probe, ProbeReply, ZERO_DIGEST};
use varve_io::{AlignedBuf, DirectFile, IoError, ReadAhead, sparse};

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

/// Probes that are being compared: the regions of some are read while one is digested and answered.
pub struct Probes {
    reads: ReadAhead<AlignedBuf, Asked>,
    free: Vec<AlignedBuf>,
}

/// A probe that passed [`objection`].
struct Asked {
    probe: Probe,
    answer: Answer,
    /// Bit *i*: digest block *i* is not all hole. Holes are not read.
    data: u16,
}

impl Probes {
    /// None yet.
    pub fn new() -> Result<Self, IoError> {
        let free = (0..PROBES_AT_ONCE).map(|_| AlignedBuf::new(REGION_BYTES as usize)).collect();
        Ok(Self { reads: ReadAhead::new(PROBES_AT_ONCE)?, free })
    }

    /// Whether no more fit.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Begins to read what a probe is about. No write to it may be under way.
    pub fn add(&mut self, list: &[Replica], probe: Probe, answer: Answer) -> Result<(), Failure> {
        debug_assert!(probe.digests.len() <= DIGESTS_PER_REGION);
        let (Some(replica), Some(buf)) = (list.get(usize::from(probe.volume)), self.free.pop()) else {
            return Err(Failure::damaged("a probe of no volume, or one too many"));
        };
        let data = data_blocks(replica.file(), &probe).map_err(|e| failed(probe.volume, &e))?;
        let (len, mut reads, mut number) = (replica.file().len(), Vec::new(), 0);
        while number < probe.digests.len() {
            let first = number;
            while number < probe.digests.len() && data & (1 << number) != 0 {
                number += 1;
            }
            if number > first {
                let (start, stop) = (block(&probe, first).0, block(&probe, number - 1).1);
                // A device may be larger than the volume, in sectors that the volume's end does not fill.
                let stop = stop.next_multiple_of(BLOCK_BYTES as u64).min(len);
                let range = (start - probe.offset) as usize..(stop - probe.offset) as usize;
                reads.push((usize::from(probe.volume), start, range));
            }
            number += 1;
        }
        self.reads.start(&files(list), &reads, buf, Asked { probe, answer, data });
        Ok(())
    }

    /// Waits for one that is read, digests it and answers: bit *i* is set if digest block *i* differs. Gives whether there was one.
    pub fn answer(&mut self, list: &[Replica]) -> Result<bool, Failure> {
        let Some((region, Asked { probe, answer, data }, result)) = self.reads.next(&files(list)) else {
            return Ok(false);
        };
        result.map_err(|e| failed(probe.volume, &e))?;
        let mut differs = 0;
        for (number, theirs) in probe.digests.iter().enumerate() {
            let (start, stop) = block(&probe, number);
            let ours = match data & (1 << number) {
                0 => ZERO_DIGEST,
                _ => block_digest(&region[(start - probe.offset) as usize..(stop - probe.offset) as usize]),
            };
            differs |= u16::from(ours != *theirs) << number;
        }
        self.free.push(region);
        answer.send(Answered::Probe(ProbeReply { id: probe.id, differs }));
        Ok(true)
    }
}

/// Bit *i*: digest block *i* of the probe is not all hole.
fn data_blocks(file: &DirectFile, probe: &Probe) -> Result<u16, IoError> {
    let mut data = 0;
    let mut next = sparse::next_data(file, probe.offset)?;
    for number in 0..probe.digests.len() {
        let (start, stop) = block(probe, number);
        while next.is_some_and(|(_, data_end)| data_end <= start) {
            next = sparse::next_data(file, start)?;
        }
        data |= u16::from(next.is_some_and(|(data_start, _)| data_start < stop)) << number;
    }
    Ok(data)
}

fn files(list: &[Replica]) -> Vec<&DirectFile> {
    list.iter().map(Replica::file).collect()
}

fn failed(volume: u16, error: &IoError) -> Failure {
    Failure::io(&format!("replica {volume}"), error)
}

/// Where a probe's digest block begins and ends.
fn block(probe: &Probe, number: usize) -> (u64, u64) {
    let start = probe.offset + number as u64 * DIGEST_BLOCK_BYTES;
    (start, (start + DIGEST_BLOCK_BYTES).min(probe.offset + u64::from(probe.length)))
}

const _: () = assert!(DIGESTS_PER_REGION <= u16::BITS as usize);

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::apply::work::Waiting;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use tokio::sync::mpsc;

    const VOLUME_BYTES: u64 = (7 << 20) + 68 * 1024 + 512;

    /// Data and holes of any shape, in a file that is larger than its volume: each block is told right.
    #[test]
    fn as_reading_it_all_would_tell() {
        let seed = rand::random();
        eprintln!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let dir = tempfile::TempDir::new_in("/var/tmp").unwrap();
        let path = dir.path().join("replica");
        let file = File::create_new(&path).unwrap();
        file.set_len(VOLUME_BYTES.next_multiple_of(4096)).unwrap();
        for _ in 0..40 {
            let mut bytes = vec![0; rng.random_range(1..100_000)];
            if rng.random_bool(0.8) {
                rng.fill(&mut bytes[..]);
            }
            let at = rng.random_range(0..VOLUME_BYTES - bytes.len() as u64);
            file.write_all_at(&bytes, at).unwrap();
        }
        let bytes = std::fs::read(&path).unwrap();
        let replica = Replica::new(DirectFile::open_rw(&path).unwrap(), VOLUME_BYTES);
        let list = &[replica];
        let (to, mut answers) = mpsc::unbounded_channel();
        let waiting = Arc::new(Waiting::default());
        let mut probes = Probes::new().unwrap();
        let mut expected = Vec::new();
        for id in 0..60 {
            let offset = rng.random_range(0..VOLUME_BYTES / REGION_BYTES + 1) * REGION_BYTES;
            let length = (VOLUME_BYTES - offset).min(REGION_BYTES);
            let blocks = bytes[offset as usize..][..length as usize].chunks(DIGEST_BLOCK_BYTES as usize);
            let mut digests: Vec<_> = blocks.map(block_digest).collect();
            let mut differs = 0;
            for (number, digest) in digests.iter_mut().enumerate() {
                if rng.random_bool(0.2) {
                    // Zeroes there, or something else: whichever is not here.
                    *digest = if *digest == ZERO_DIGEST || rng.random_bool(0.5) { [1; 16] } else { ZERO_DIGEST };
                    differs |= 1 << number;
                }
            }
            expected.push(Answered::Probe(ProbeReply { id, differs }));
            let probe = Probe { id, volume: 0, offset, length: length as u32, digests };
            assert_eq!(objection(&probe, &[VOLUME_BYTES]), None);
            while probes.is_full() || rng.random_bool(0.3) {
                if !probes.answer(list).unwrap() {
                    break;
                }
            }
            probes.add(list, probe, Answer::for_probe(to.clone(), waiting.clone())).unwrap();
        }
        while probes.answer(list).unwrap() {}
        // In the order in which the disk answers.
        let mut answered: Vec<_> = std::iter::from_fn(|| answers.try_recv().ok()).collect();
        answered.sort_by_key(|answered| match answered {
            Answered::Probe(reply) => reply.id,
            Answered::Image(done) => done.id,
        });
        assert_eq!(answered, expected, "seed {seed}");
        assert_eq!(waiting.probes.load(std::sync::atomic::Ordering::Acquire), 0);
    }
}
