//! Digests of what a replica holds, compared with those of the source.

use super::replica::{Reading, Replica};
use super::work::{Answer, Answered};
use crate::failure::Failure;
use crate::limits::PROBES_AT_ONCE;
use varve_common::format::BLOCK_BYTES;
use varve_common::limits::{DIGEST_BLOCK_BYTES, DIGESTS_PER_REGION, REGION_BYTES};
use varve_common::wire::digest::block_digest;
use varve_common::wire::messages::{Probe, ProbeReply, ZERO_DIGEST};
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

/// Probes that are compared together: first their regions are read, then they are digested and answered.
pub struct Round {
    asked: Vec<Asked>,
    buf: AlignedBuf,
}

/// A probe that passed [`objection`].
struct Asked {
    probe: Probe,
    answer: Answer,
    /// Bit *i*: digest block *i* is not all hole. Holes are not read.
    data: u16,
}

impl Default for Round {
    fn default() -> Self {
        let asked = Vec::with_capacity(PROBES_AT_ONCE);
        Self { asked, buf: AlignedBuf::new(PROBES_AT_ONCE * REGION_BYTES as usize) }
    }
}

impl Round {
    /// Whether nothing is to be compared.
    pub fn is_empty(&self) -> bool {
        self.asked.is_empty()
    }

    /// Whether no more fit.
    pub fn is_full(&self) -> bool {
        self.asked.len() == PROBES_AT_ONCE
    }

    /// Takes a probe of this replica's volume.
    pub fn add(&mut self, replica: &Replica, probe: Probe, answer: Answer) -> Result<(), IoError> {
        debug_assert!(!self.is_full() && probe.digests.len() <= DIGESTS_PER_REGION);
        let (file, mut data) = (replica.file(), 0);
        let mut next = sparse::next_data(file, probe.offset)?;
        for number in 0..probe.digests.len() {
            let (start, stop) = block(&probe, number);
            while next.is_some_and(|(_, data_end)| data_end <= start) {
                next = sparse::next_data(file, start)?;
            }
            data |= u16::from(next.is_some_and(|(data_start, _)| data_start < stop)) << number;
        }
        self.asked.push(Asked { probe, answer, data });
        Ok(())
    }

    /// Reads what is to be compared; `meanwhile` is done while the disk is at work.
    pub fn read(&mut self, replicas: &mut Reading<'_>, meanwhile: impl FnOnce()) -> Result<(), Failure> {
        let mut reads = Vec::with_capacity(self.asked.len() * 2);
        for (Asked { probe, data, .. }, region) in self.asked.iter().zip(self.buf.chunks_mut(REGION_BYTES as usize)) {
            let len = replicas.get(probe.volume).map_or(0, |replica| replica.file().len());
            let (mut rest, mut at, mut number) = (region, probe.offset, 0);
            while number < probe.digests.len() {
                let first = number;
                while number < probe.digests.len() && data & (1 << number) != 0 {
                    number += 1;
                }
                if number > first {
                    let (start, stop) = (block(probe, first).0, block(probe, number - 1).1);
                    // A device may be larger than the volume, in sectors that the volume's end does not fill.
                    let stop = stop.next_multiple_of(BLOCK_BYTES as u64).min(len);
                    let (here, after) =
                        rest.split_at_mut((start - at) as usize).1.split_at_mut((stop - start) as usize);
                    (rest, at) = (after, stop);
                    reads.push((probe.volume, start, here));
                }
                number += 1;
            }
        }
        replicas.read_while(&mut reads, meanwhile)
    }

    /// Digests what was read and answers: bit *i* is set if digest block *i* differs.
    pub fn answer(&mut self) {
        for (Asked { probe, answer, data }, region) in self.asked.drain(..).zip(self.buf.chunks(REGION_BYTES as usize))
        {
            let mut differs = 0;
            for (number, theirs) in probe.digests.iter().enumerate() {
                let (start, stop) = block(&probe, number);
                let ours = match data & (1 << number) {
                    0 => ZERO_DIGEST,
                    _ => block_digest(&region[(start - probe.offset) as usize..(stop - probe.offset) as usize]),
                };
                differs |= u16::from(ours != *theirs) << number;
            }
            answer.send(Answered::Probe(ProbeReply { id: probe.id, differs }));
        }
    }
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
    use crate::apply::replica::Replicas;
    use crate::apply::work::Waiting;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use tokio::sync::mpsc;
    use varve_io::DirectFile;

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
        let mut replicas = Replicas::new(vec![replica]).unwrap();
        let (to, mut answers) = mpsc::unbounded_channel();
        let waiting = Arc::new(Waiting::default());
        let [mut ahead, mut before] = <[Round; 2]>::default();
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
            ahead.add(replicas.get(0).unwrap(), probe, Answer::for_probe(to.clone(), waiting.clone())).unwrap();
            if ahead.is_full() || rng.random_bool(0.3) {
                ahead.read(&mut replicas.split().0, || before.answer()).unwrap();
                std::mem::swap(&mut ahead, &mut before);
            }
        }
        ahead.read(&mut replicas.split().0, || before.answer()).unwrap();
        ahead.answer();
        let answered: Vec<_> = std::iter::from_fn(|| answers.try_recv().ok()).collect();
        assert_eq!(answered, expected, "seed {seed}");
        assert_eq!(waiting.probes.load(std::sync::atomic::Ordering::Acquire), 0);
    }
}
