//! How fast `IoQueue` is here: `queue_speed [DIRECTORY] [MIB] [SECONDS]` (a scratch file is made and removed).
//!
//! Random 4 KiB reads and writes by depth, writes in random and in sorted order of address, and sequential
//! 1 MiB transfers. Printed: rate, and CPU time of this thread per request (io-wq's workers in the
//! kernel are in the second CPU column, which is that of the whole process).

use std::path::PathBuf;
use std::time::{Duration, Instant};

use varve_io::{AlignedBuf, DirectFile, IoError, IoQueue, cpu};

const BLOCK: usize = 4096;
const LARGE: usize = 1 << 20;
const BATCH: usize = 4096;

struct Bench {
    file: DirectFile,
    seconds: f64,
    state: u64,
}

#[derive(Clone, Copy)]
enum Order {
    Random,
    Sorted,
}

impl Bench {
    fn random(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    /// Addresses of one batch, each once.
    fn offsets(&mut self, order: Order) -> Vec<u64> {
        let blocks = self.file.len() / BLOCK as u64;
        let mut all: Vec<u64> = (0..BATCH).map(|_| self.random() % blocks * BLOCK as u64).collect();
        all.sort_unstable();
        all.dedup();
        if matches!(order, Order::Random) {
            for n in (1..all.len()).rev() {
                let other = self.random() as usize % (n + 1);
                all.swap(n, other);
            }
        }
        all
    }

    fn measure(
        &mut self,
        name: &str,
        bytes: usize,
        mut batch: impl FnMut(&mut Self) -> Result<usize, IoError>,
    ) -> Result<(), IoError> {
        let (start, own, process) = (Instant::now(), cpu::thread_cpu_time(), cpu::process_cpu_time());
        let mut requests = 0;
        while start.elapsed() < Duration::from_secs_f64(self.seconds) {
            requests += batch(self)?;
        }
        self.file.sync_data()?;
        let seconds = start.elapsed().as_secs_f64();
        let rate = requests as f64 / seconds;
        let micros = |used: Duration| used.as_secs_f64() * 1e6 / requests as f64;
        println!(
            "{name:<34} {rate:>9.0} /s {:>8.0} MB/s   {:>6.2} us/request own CPU, {:>6.2} process",
            rate * bytes as f64 / 1e6,
            micros(cpu::thread_cpu_time() - own),
            micros(cpu::process_cpu_time() - process),
        );
        Ok(())
    }

    fn small(&mut self, mut queue: IoQueue, kind: &str) -> Result<(), IoError> {
        let depth = queue.depth();
        let mut data = AlignedBuf::new(BATCH * BLOCK);
        data.iter_mut().enumerate().for_each(|(n, b)| *b = (n % 251) as u8);
        for (order, word) in [(Order::Random, "random"), (Order::Sorted, "sorted")] {
            self.measure(&format!("4 KiB writes {word} {kind}depth {depth}"), BLOCK, |bench| {
                let offsets = bench.offsets(order);
                let writes: Vec<_> = offsets.iter().zip(data.chunks(BLOCK)).map(|(&at, d)| (0, at, d)).collect();
                queue.write_batch(&[&bench.file], &writes)?;
                Ok(writes.len())
            })?;
        }
        self.measure(&format!("4 KiB reads sorted {kind}depth {depth}"), BLOCK, |bench| {
            let offsets = bench.offsets(Order::Sorted);
            let mut reads: Vec<_> = offsets.iter().zip(data.chunks_mut(BLOCK)).map(|(&at, d)| (0, at, d)).collect();
            queue.read_batch(&[&bench.file], &mut reads)?;
            Ok(offsets.len())
        })
    }

    fn large(&mut self, depth: u32) -> Result<(), IoError> {
        let mut queue = IoQueue::new(depth)?;
        let mut data = AlignedBuf::new(32 * LARGE);
        data.iter_mut().enumerate().for_each(|(n, b)| *b = (n % 251) as u8);
        let pieces = self.file.len() / LARGE as u64;
        let mut at = 0;
        let mut next = move || {
            at += 1;
            at % pieces * LARGE as u64
        };
        self.measure(&format!("1 MiB writes sequential depth {depth}"), LARGE, |bench| {
            let writes: Vec<_> = data.chunks(LARGE).map(|d| (0, next(), d)).collect();
            queue.write_batch(&[&bench.file], &writes)?;
            Ok(writes.len())
        })?;
        self.measure(&format!("1 MiB reads sequential depth {depth}"), LARGE, |bench| {
            let mut reads: Vec<_> = data.chunks_mut(LARGE).map(|d| (0, next(), d)).collect();
            queue.read_batch(&[&bench.file], &mut reads)?;
            Ok(reads.len())
        })
    }
}

struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn main() -> Result<(), IoError> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().unwrap_or_else(|| "/var/tmp".to_owned());
    let mib: u64 = args.next().and_then(|n| n.parse().ok()).unwrap_or(2048).max(64);
    let seconds = args.next().and_then(|n| n.parse().ok()).unwrap_or(2.0);
    let scratch = Scratch(PathBuf::from(dir).join(format!("varve-queue-speed-{}", std::process::id())));
    let file = DirectFile::create_new(&scratch.0, mib << 20, 0o600)?;
    println!("{mib} MiB at {}, direct: {}, {:?}", scratch.0.display(), file.is_direct(), file.align());
    let mut bench = Bench { file, seconds, state: 88_172_645_463_325_252 };
    // Written once, so that what follows meets neither holes nor unwritten extents.
    let mut queue = IoQueue::new(8)?;
    let data = AlignedBuf::new(8 * LARGE);
    for at in (0..mib).step_by(8) {
        let left = (mib - at).min(8) as usize;
        let writes: Vec<_> =
            data.chunks(LARGE).take(left).enumerate().map(|(n, d)| (0, (at + n as u64) << 20, d)).collect();
        queue.write_batch(&[&bench.file], &writes)?;
    }
    bench.file.sync_data()?;
    for depth in [1, 8, 32, 128] {
        bench.small(IoQueue::new(depth)?, "")?;
    }
    bench.small(IoQueue::without_ring(16), "by threads ")?;
    for depth in [1, 4, 16] {
        bench.large(depth)?;
    }
    Ok(())
}
