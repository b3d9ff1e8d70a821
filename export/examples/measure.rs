//! What the way through FUSE and loop costs: `measure FILE DIR [SECONDS]` reads FILE directly and through a device.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use varve_export::device::{self, Way};
use varve_export::{Disk, Stretch};
use varve_io::{AlignedBuf, DirectFile};

const SEQUENTIAL_BYTES: usize = 64 << 10;
const RANDOM_BYTES: usize = 4 << 10;

/// As a replica is read: O_DIRECT; what the loop device asks for is always aligned.
struct DirectDisk(DirectFile);

impl Disk for DirectDisk {
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn is_read_only(&self) -> bool {
        true
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buf, offset).map_err(|e| io::Error::other(e.chain()))
    }
    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn stretch(&self, _: u64, len: u64) -> io::Result<Stretch> {
        Ok(Stretch { len, hole: false })
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (file, dir) = (args.first().ok_or("FILE")?, args.get(1).ok_or("DIR")?);
    let time = Duration::from_secs_f64(args.get(2).map_or(Ok(3.0), |text| text.parse())?);
    let disk = Arc::new(DirectDisk(DirectFile::open_read(file)?));
    let mut attaching = Vec::new();
    let mut detaching = Vec::new();
    for _ in 0..20 {
        let begin = Instant::now();
        let mut attached = device::attach(disk.clone(), Path::new(dir), "try", true, Way::Fastest)?;
        attaching.push(begin.elapsed());
        let begin = Instant::now();
        attached.detach()?;
        detaching.push(begin.elapsed());
    }
    attaching.sort();
    detaching.sort();
    println!(
        "attach p50 {:?} max {:?}; detach p50 {:?} max {:?}",
        attaching[10], attaching[19], detaching[10], detaching[19]
    );
    let mut attached = device::attach(disk, Path::new(dir), "measured", true, Way::Fastest)?;
    let device = attached.path().to_owned();
    for _ in 0..2 {
        for (name, path) in [("file  ", Path::new(file)), ("device", &device)] {
            let file = DirectFile::open_read(path)?;
            let one = sequential(&file, 1, time)?;
            let four = sequential(&file, 4, time)?;
            let mut waits = random(&file, 1, time)?;
            let of_many = random(&file, 8, time)?.len() as f64 / time.as_secs_f64();
            waits.sort();
            let p = |per_mille: usize| waits[waits.len() * per_mille / 1000];
            println!(
                "{name} 64 KiB sequential {one:.0} MB/s, by 4 threads {four:.0} MB/s; 4 KiB random p50 {:?} p99 {:?}, by 8 threads {of_many:.0}/s",
                p(500),
                p(990)
            );
        }
    }
    attached.detach()?;
    Ok(())
}

fn sequential(file: &DirectFile, threads: u64, time: Duration) -> io::Result<f64> {
    let (done, begin) = (AtomicU64::new(0), Instant::now());
    let share = file.len() / threads / (1 << 20) * (1 << 20);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let done = &done;
            scope.spawn(move || {
                let mut buf = AlignedBuf::new(SEQUENTIAL_BYTES);
                let mut at = 0;
                while begin.elapsed() < time {
                    file.read_exact_at(&mut buf, thread * share + at).expect("it can be read");
                    at = (at + SEQUENTIAL_BYTES as u64) % share;
                    done.fetch_add(SEQUENTIAL_BYTES as u64, Ordering::Relaxed);
                }
            });
        }
    });
    Ok(done.into_inner() as f64 / 1e6 / begin.elapsed().as_secs_f64())
}

fn random(file: &DirectFile, threads: u64, time: Duration) -> io::Result<Vec<Duration>> {
    let (begin, blocks) = (Instant::now(), file.len() / RANDOM_BYTES as u64);
    let all = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    let (mut buf, mut waits, mut state) = (AlignedBuf::new(RANDOM_BYTES), Vec::new(), thread + 1);
                    while begin.elapsed() < time {
                        // xorshift: good enough to miss every cache.
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        let asked = Instant::now();
                        file.read_exact_at(&mut buf, state % blocks * RANDOM_BYTES as u64).expect("it can be read");
                        waits.push(asked.elapsed());
                    }
                    waits
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("it ends")).collect()
    });
    Ok(all)
}
