//! A volume that fio writes and fio judges: each block says which job wrote it and where it belongs, and a job that is stopped
//! leaves a state of what it had written. Any copy is then read by fio itself, which shares no code with the product nor with us.
//!
//! Not one of fio's checksums: to those a block of an earlier job is as good as the one that should have replaced it (tried with
//! 3.33: a job that only writes, or only reads, takes the seed from the header that it finds). So it is a strict pattern.
//!
//! Its limits: it says nothing of a moment while it writes, and nothing of blocks that its last job had not come to.

use std::path::{Path, PathBuf};

use crate::{Fio, FioRun, Scratch};

/// Each with its own offsets, so that fio may have several under way.
const DEPTH: u32 = 4;
/// Slow enough to be a part of what is written only, and not to be done long before a round is.
const BYTES_PER_S: u64 = 2 << 20;
/// Of what it complains of.
const LINES_MAX: usize = 12;
/// A block of one round has the place of several of another one.
const BLOCKS: [&str; 4] = ["4k", "8k", "16k", "64k"];

/// One job of fio that was, and what it had written when it ended.
#[derive(Debug, Clone)]
pub struct Checked {
    state: PathBuf,
    bytes: u64,
    seed: u64,
    writes: u64,
}

/// A job that writes.
#[derive(Debug)]
pub struct Checking {
    job: Checked,
    run: FioRun,
}

impl Checked {
    /// Begins to write a device from end to end, each block once, in an order and with contents that follow from `seed`. What is
    /// known in the end is kept in a directory of its own below `scratch`.
    #[track_caller]
    pub fn start(scratch: &Scratch, device: &Path, bytes: u64, seed: u64) -> Checking {
        let state = scratch.dir(&format!("checked-{seed}"));
        let job = Checked { state, bytes, seed, writes: 0 };
        let run = job.fio(device).option("do_verify=0").option("verify_state_save=1").rate(BYTES_PER_S).start(scratch);
        Checking { job, run }
    }

    fn fio(&self, target: &Path) -> Fio {
        let block = BLOCKS[self.seed as usize % BLOCKS.len()];
        let fio = Fio::each_block_once(target).block(block).depth(DEPTH).seed(self.seed);
        // %o: where the block is.
        let fio = fio.option("verify=pattern").option(&format!("verify_pattern=0x{:016x}%o", self.seed));
        let fio = fio.option(&format!("size={}", self.bytes)).option("verify_dump=0");
        // A thread, not a process of its own that would outlive the first one's sudden end.
        fio.option("thread=1").option(&format!("aux-path={}", self.state.display()))
    }

    /// Has fio read a copy, without writing to it: `Ok` with how many blocks it found as it had left them, else its words.
    ///
    /// # Errors
    /// If a block is not what was written.
    #[track_caller]
    pub fn verify(&self, scratch: &Scratch, copy: &Path) -> Result<u64, String> {
        let fio = self.fio(copy).option("readonly").option("rw=randread").option("verify_state_save=0");
        let (result, words) = fio.option("verify_state_load=1").option("verify_fatal=1").run_with_words(scratch);
        if result.fatal_errno != 0 {
            let first: Vec<&str> = words.lines().take(LINES_MAX).collect();
            return Err(format!("fio (seed {}) after {} blocks: {}", self.seed, result.reads, first.join("\n")));
        }
        // One that reads nothing finds nothing.
        if result.reads < self.writes {
            return Err(format!("fio had written {} blocks and looked at {}: {words}", self.writes, result.reads));
        }
        Ok(result.reads)
    }
}

impl Checking {
    /// Stops it. Every write that it began has completed then, and is in its state.
    #[track_caller]
    pub fn stop(self) -> Checked {
        let Checking { mut job, run } = self;
        job.writes = run.stop().writes;
        assert!(job.writes > 0, "fio wrote nothing");
        job
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KIB, MIB};
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    /// What a judge is for: a block that was altered, that is lost (zeroes, or what was there before), that is in a wrong place.
    #[test]
    fn fio_finds_what_is_not_what_it_wrote() {
        let scratch = Scratch::disk();
        let file = scratch.file("disk", 8 * MIB);
        let job = |seed| {
            let job = Checked::start(&scratch, &file, 8 * MIB, seed);
            std::thread::sleep(Duration::from_millis(1500));
            job.stop()
        };
        // Both with blocks of 8 KiB.
        let first = job(1);
        let old = std::fs::read(&file).unwrap();
        let second = job(5);
        let disk = std::fs::read(&file).unwrap();
        assert_eq!(second.verify(&scratch, &file), Ok(second.writes));
        assert!(first.verify(&scratch, &file).is_err(), "the second has written over it");
        assert!(second.writes < 1024, "it was stopped in the middle");

        let block = 8 * KIB as usize;
        let blocks = || (0..disk.len()).step_by(block);
        let of = |image: &[u8], at: usize| image[at..at + block].to_vec();
        let written: Vec<usize> = blocks().filter(|at| of(&disk, *at) != of(&old, *at)).collect();
        assert_eq!(written.len() as u64, second.writes);
        let over = *written.iter().find(|at| of(&old, **at).iter().any(|byte| *byte != 0)).unwrap();
        let copy = scratch.file("copy", 8 * MIB);
        let mut altered = of(&disk, over);
        altered[block - 1] ^= 1;
        for (what, at, bytes) in [
            ("one bit", over, altered),
            ("zeroes", written[written.len() / 2], vec![0; block]),
            ("what was there before", over, of(&old, over)),
            ("another block", written[0], of(&disk, written[1])),
        ] {
            std::fs::write(&copy, &disk).unwrap();
            assert_eq!(second.verify(&scratch, &copy), Ok(second.writes));
            std::fs::File::options().write(true).open(&copy).unwrap().write_all_at(&bytes, at as u64).unwrap();
            assert!(second.verify(&scratch, &copy).is_err(), "{what} at {at}");
        }
    }
}
