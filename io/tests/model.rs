//! `DirectFile`, `IoQueue` and `sparse` against a byte vector, on every kind of storage they claim to serve.
//! proptest prints the failing case and keeps its seed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;

use common::{Loop, Mounted, Zram, disk_dir, pattern, sparse_file, tmpfs_dir};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use varve_io::{AlignedBuf, DirectFile, IoQueue, PAGE_BYTES, sparse};

/// The longest single request, in bytes.
const REQUEST_BYTES_MAX: u64 = 128 << 10;

/// A step on raw numbers, brought into the range and alignment of the file when it is done.
#[derive(Debug, Clone)]
enum Step {
    Write { at: u64, len: u64, seed: u64, durable: bool },
    Read { at: u64, len: u64 },
    WriteBatch { seed: u64, count: u64 },
    ReadBatch { seed: u64, count: u64 },
    Punch { at: u64, len: u64 },
    Zero { at: u64, len: u64 },
    Sync,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let (at, len, seed) = (any::<u64>(), any::<u64>(), any::<u64>());
    prop_oneof![
        4 => (at, len, seed, any::<bool>()).prop_map(|(at, len, seed, durable)| Step::Write { at, len, seed, durable }),
        3 => (at, len).prop_map(|(at, len)| Step::Read { at, len }),
        4 => (seed, 1..40u64).prop_map(|(seed, count)| Step::WriteBatch { seed, count }),
        3 => (seed, 1..40u64).prop_map(|(seed, count)| Step::ReadBatch { seed, count }),
        1 => (at, len).prop_map(|(at, len)| Step::Punch { at, len }),
        1 => (at, len).prop_map(|(at, len)| Step::Zero { at, len }),
        1 => Just(Step::Sync),
        1 => Just(Step::Reopen),
    ]
}

struct Pair {
    file: DirectFile,
    queue: IoQueue,
    model: Vec<u8>,
    sector: u64,
}

impl Pair {
    fn open(path: &Path, sector: u64) -> Self {
        let queue = IoQueue::new(8).unwrap();
        assert!(queue.is_ring(), "this host has no io_uring");
        Self::with(path, sector, queue)
    }

    fn with(path: &Path, sector: u64, queue: IoQueue) -> Self {
        let file = DirectFile::open_rw(path).unwrap();
        let mut model = vec![0; file.len() as usize];
        read_all(&file, &mut model);
        Self { file, queue, model, sector }
    }

    /// A legal range: begins at a sector, ends at one or at the end of the file.
    fn range(&self, at: u64, len: u64) -> (u64, usize) {
        let file_len = self.model.len() as u64;
        let start = at % file_len.div_ceil(self.sector) * self.sector;
        let len = (len % (REQUEST_BYTES_MAX / self.sector) + 1) * self.sector;
        (start, len.min(file_len - start) as usize)
    }

    /// `count` ranges that do not overlap, in an order that is not sorted.
    fn ranges(&self, seed: u64, count: u64) -> Vec<(u64, usize)> {
        let file_len = self.model.len() as u64;
        let sectors = file_len.div_ceil(self.sector);
        let slot = sectors.div_ceil(count);
        let mut ranges = Vec::new();
        for n in 0..count {
            let random = u64::from_le_bytes(pattern(seed ^ n, 8).try_into().unwrap());
            let first = n * slot + random % slot;
            let start = first * self.sector;
            let end = ((first + 1 + (random >> 32) % slot).min((n + 1) * slot) * self.sector).min(file_len);
            if start < end {
                ranges.push((start, (end - start) as usize));
            }
        }
        let rotate = (seed % count) as usize % ranges.len().max(1);
        ranges.rotate_left(rotate);
        ranges
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Write { at, len, seed, durable } => {
                let (start, len) = self.range(at, len);
                let bytes = aligned(&pattern(seed, len));
                if durable {
                    self.file.write_all_at_durable(&bytes[..len], start).unwrap();
                } else {
                    self.file.write_all_at(&bytes[..len], start).unwrap();
                }
                self.model[start as usize..][..len].copy_from_slice(&bytes[..len]);
            }
            Step::Read { at, len } => {
                let (start, len) = self.range(at, len);
                let mut bytes = aligned(&vec![0xEE; len]);
                self.file.read_exact_at(&mut bytes[..len], start).unwrap();
                assert!(bytes[..len] == self.model[start as usize..][..len], "read {len} at {start} differs");
            }
            Step::WriteBatch { seed, count } => {
                let ranges = self.ranges(seed, count);
                let data: Vec<AlignedBuf> = ranges.iter().map(|r| aligned(&pattern(seed ^ r.0, r.1))).collect();
                let writes: Vec<_> = ranges.iter().zip(&data).map(|(r, d)| (0, r.0, &d[..r.1])).collect();
                self.queue.write_batch(&[&self.file], &writes).unwrap();
                for (start, bytes) in writes.iter().map(|w| (w.1 as usize, w.2)) {
                    self.model[start..][..bytes.len()].copy_from_slice(bytes);
                }
            }
            Step::ReadBatch { seed, count } => {
                let ranges = self.ranges(seed, count);
                let mut data: Vec<AlignedBuf> = ranges.iter().map(|r| aligned(&vec![0xEE; r.1])).collect();
                let mut reads: Vec<_> = ranges.iter().zip(&mut data).map(|(r, d)| (0, r.0, &mut d[..r.1])).collect();
                self.queue.read_batch(&[&self.file], &mut reads).unwrap();
                for (_, start, bytes) in reads {
                    let want = &self.model[start as usize..][..bytes.len()];
                    assert!(*bytes == *want, "batch read {} at {start} differs", want.len());
                }
            }
            Step::Punch { at, len } => {
                let (start, len) = self.range(at, len);
                sparse::punch_hole(&self.file, start, len as u64).unwrap();
                self.model[start as usize..][..len].fill(0);
            }
            Step::Zero { at, len } => {
                let (start, len) = self.range(at, len);
                sparse::zero_range(&self.file, start, len as u64).unwrap();
                self.model[start as usize..][..len].fill(0);
            }
            Step::Sync => self.file.sync_data().unwrap(),
            Step::Reopen => self.file = DirectFile::open_rw(self.file.path()).unwrap(),
        }
    }

    fn check(&self) {
        let mut bytes = vec![0; self.model.len()];
        read_all(&self.file, &mut bytes);
        assert!(bytes == self.model, "content differs at the end");
        // Holes hold zeroes only.
        let mut at = 0;
        while let Some((start, end)) = sparse::next_data(&self.file, at).unwrap() {
            assert!(start >= at && end > start && end <= self.file.len(), "{at}: {start}..{end}");
            assert!(self.model[at as usize..start as usize].iter().all(|&b| b == 0), "a hole with data");
            at = end;
        }
        assert!(self.model[at as usize..].iter().all(|&b| b == 0), "a last hole with data");
        assert!(sparse::allocated_bytes(&self.file).unwrap() <= self.file.len() + (64 << 10));
    }
}

fn aligned(bytes: &[u8]) -> AlignedBuf {
    let mut buf = AlignedBuf::new(bytes.len().next_multiple_of(PAGE_BYTES).max(PAGE_BYTES));
    buf[..bytes.len()].copy_from_slice(bytes);
    buf
}

fn read_all(file: &DirectFile, out: &mut [u8]) {
    let mut buf = AlignedBuf::new(out.len().next_multiple_of(PAGE_BYTES).max(PAGE_BYTES));
    file.read_exact_at(&mut buf[..out.len()], 0).unwrap();
    out.copy_from_slice(&buf[..out.len()]);
}

/// Random steps on what `open` opens; every case goes on with what the last one left.
fn random_steps(cases: u32, open: impl Fn() -> Pair) {
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let steps = prop::collection::vec(step(), 1..30);
    let result = runner.run(&steps, |steps| {
        let mut pair = open();
        steps.iter().for_each(|step| pair.apply(step));
        pair.check();
        Ok(())
    });
    result.unwrap_or_else(|e| panic!("{e}"));
}

fn against_model(path: &Path, sector: u64, cases: u32) {
    random_steps(cases, || Pair::open(path, sector));
    // The other way to the same bytes: no stale page may be in the cache.
    let pair = Pair::open(path, sector);
    assert!(std::fs::read(path).unwrap() == pair.model, "the buffered view of {} differs", path.display());
}

#[test]
fn file_on_disk() {
    let dir = disk_dir();
    for len in [1 << 20, (1 << 20) + 512, (600 << 10) + 1000, 4095, 512, 1] {
        let path = sparse_file(dir.path(), &format!("f{len}"), len);
        let file = DirectFile::open_rw(&path).unwrap();
        assert!(file.is_direct(), "the disk under the checkout must have O_DIRECT for this test");
        against_model(&path, u64::from(file.align().offset), 24);
    }
}

#[test]
fn file_on_tmpfs() {
    let dir = tmpfs_dir();
    for len in [1 << 20, (600 << 10) + 1000, 100] {
        let path = sparse_file(dir.path(), &format!("f{len}"), len);
        against_model(&path, u64::from(DirectFile::open_rw(&path).unwrap().align().offset), 24);
    }
}

/// Needs root. ramfs has no O_DIRECT: the open fails with EINVAL.
#[test]
fn file_without_direct_io() {
    let mount = Mounted::new(&["-t", "ramfs", "none"]);
    let path = sparse_file(mount.path(), "f", (300 << 10) + 77);
    let file = DirectFile::open_rw(&path).unwrap();
    assert!(!file.is_direct());
    assert_eq!((file.align().memory, file.align().offset), (1, 1));
    against_model(&path, 1, 24);
    against_model(&path, 512, 24);
}

/// Needs root. ext4 with data=journal opens O_DIRECT, but statx says that it cannot do it.
#[test]
fn file_that_says_no_to_direct_io() {
    let device = Loop::new(32 << 20, 512);
    common::run("mkfs.ext4", &["-q", device.path.to_str().unwrap()]);
    let mount = Mounted::new(&["-o", "data=journal", device.path.to_str().unwrap()]);
    let path = sparse_file(mount.path(), "f", (300 << 10) + 77);
    let file = DirectFile::open_rw(&path).unwrap();
    assert!(!file.is_direct());
    against_model(&path, 1, 12);
}

/// Needs root.
#[test]
fn files_on_xfs_and_btrfs() {
    for (xfs, bytes) in [(true, 320u64 << 20), (false, 128 << 20)] {
        let device = Loop::new(bytes, 512);
        let args = ["-q", device.path.to_str().unwrap()];
        match xfs {
            true => drop(common::run("mkfs.xfs", &args)),
            false => common::mkfs_btrfs(&args),
        }
        let mount = Mounted::new(&[device.path.to_str().unwrap()]);
        let path = sparse_file(mount.path(), "f", (1 << 20) + 1000);
        against_model(&path, u64::from(DirectFile::open_rw(&path).unwrap().align().offset), 16);
    }
}

/// Needs root.
#[test]
fn loop_device_of_512_byte_sectors_and_odd_size() {
    let device = Loop::new((10 << 20) + 512, 512);
    assert_eq!(DirectFile::open_rw(&device.path).unwrap().len(), (10 << 20) + 512);
    against_model(&device.path, 512, 24);
}

/// Needs root. The kernel itself cannot reach the 512 bytes behind the last sector.
#[test]
fn loop_device_of_4096_byte_sectors_and_odd_size() {
    let device = Loop::new((10 << 20) + 512, 4096);
    assert_eq!(DirectFile::open_rw(&device.path).unwrap().len(), 10 << 20);
    random_steps(24, || Pair::open(&device.path, 4096));
}

/// Needs root. Bio-based, sectors of 4096 bytes.
#[test]
fn zram_device() {
    let zram = Zram::new(4 << 20);
    against_model(&zram.path(), 4096, 16);
}

/// What a host without io_uring gets.
#[test]
fn file_by_threads() {
    let dir = disk_dir();
    let path = sparse_file(dir.path(), "f", (1 << 20) + 1000);
    random_steps(24, || Pair::with(&path, 512, IoQueue::without_ring(8)));
    let mut queue = IoQueue::without_ring(8);
    assert!(!queue.is_ring());
    let file = DirectFile::open_read(&path).unwrap();
    let buf = AlignedBuf::new(4096);
    let writes: Vec<_> = (0..50).map(|n| (0, n * 4096, &buf[..])).collect();
    assert_eq!(queue.write_batch(&[&file], &writes).unwrap_err().errno(), Some(nix::libc::EBADF));
    assert!(queue.write_batch(&[&file], &[(0, 1 << 30, &buf)]).unwrap_err().chain().contains("it ends at"));
}

/// Several files in one batch, more parts than the depth, slices longer than one request.
#[test]
fn one_batch_over_several_files() {
    let dir = disk_dir();
    let long = 3 << 20;
    let files: Vec<DirectFile> =
        (0..3).map(|n| DirectFile::create_new(dir.path().join(format!("f{n}")), long + 700, 0o600).unwrap()).collect();
    let files: Vec<&DirectFile> = files.iter().collect();
    let data: Vec<AlignedBuf> = (0..3).map(|n| aligned(&pattern(n, long as usize + 700))).collect();
    let mut queue = IoQueue::new(4).unwrap();
    let all = long as usize + 700;
    let writes: Vec<_> = data.iter().enumerate().map(|(n, d)| (n, 0, &d[..all])).collect();
    queue.write_batch(&files, &writes).unwrap();
    files.iter().for_each(|file| file.sync_data().unwrap());
    let mut back: Vec<AlignedBuf> = (0..3).map(|_| aligned(&vec![0; all])).collect();
    let mut reads: Vec<_> = back.iter_mut().enumerate().map(|(n, d)| (n, 0, &mut d[..all])).collect();
    queue.read_batch(&files, &mut reads).unwrap();
    assert!(back.iter().zip(&data).all(|(b, d)| b[..all] == d[..all]));
    queue.write_batch(&files, &[]).unwrap();
    queue.read_batch(&files, &mut []).unwrap();
}

/// A queue may move between threads, and serves them one after the other.
#[test]
fn a_queue_moves_between_threads() {
    let dir = disk_dir();
    let file = DirectFile::create_new(dir.path().join("f"), 1 << 20, 0o600).unwrap();
    let mut queue = IoQueue::new(16).unwrap();
    for round in 0..4u8 {
        let file = &file;
        queue = std::thread::scope(|scope| {
            let work = move || {
                let mut buf = AlignedBuf::new(4096);
                buf.fill(round);
                let writes: Vec<_> = (0..256).map(|n| (0, n * 4096, &buf[..])).collect();
                queue.write_batch(&[file], &writes).unwrap();
                queue
            };
            scope.spawn(work).join().unwrap()
        });
        let mut buf = AlignedBuf::new(1 << 20);
        file.read_exact_at(&mut buf, 0).unwrap();
        assert!(buf.iter().all(|&b| b == round));
    }
}
