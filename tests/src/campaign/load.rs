//! The load: one thread that writes to several volumes, one deed after the other, and keeps the model.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::model::{self, Deed, Image, Op, SECTOR};
use crate::{Aligned, run};

/// Largest write in sectors: 4 MiB, which is several bios.
const SECTORS_MAX: u64 = 8192;

/// How long a device may refuse to be read.
const UNREADABLE_MAX: Duration = Duration::from_secs(30);

/// A volume that the load writes to.
#[derive(Debug, Clone)]
pub struct LoadVolume {
    /// The device.
    pub path: PathBuf,
    /// Its size at first.
    pub bytes: u64,
    /// So many bytes at the end of that are filled once and never written again.
    pub kept_bytes: u64,
}

impl LoadVolume {
    fn sectors(&self) -> u64 {
        (self.bytes - self.kept_bytes) / SECTOR as u64
    }
}

struct State {
    image: Image,
    base: Image,
    ops: Vec<Op>,
}

struct Shared {
    state: Mutex<State>,
    /// Of the newest deed.
    stamp: AtomicU32,
    bytes_per_s: AtomicU64,
    written: AtomicU64,
    failed: AtomicU64,
    /// The next deed has to wait.
    pause: AtomicBool,
    /// Held during a deed, and by whoever wants none.
    turn: Mutex<()>,
    /// No write reaches over a page of the volumes behind the first.
    small: AtomicBool,
    stop: AtomicBool,
}

/// A running load; `Drop` ends it.
pub struct Load {
    shared: Arc<Shared>,
    volumes: Vec<LoadVolume>,
    thread: Option<std::thread::JoinHandle<()>>,
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64
}

impl Load {
    /// Fills about half of the volumes and then writes at random.
    pub fn start(volumes: Vec<LoadVolume>, seed: u64) -> Self {
        let bytes: Vec<u64> = volumes.iter().map(|volume| volume.bytes).collect();
        let image = Image::zeroes(&bytes);
        let shared = Arc::new(Shared {
            state: Mutex::new(State { base: image.clone(), image, ops: Vec::new() }),
            stamp: AtomicU32::new(0),
            bytes_per_s: AtomicU64::new(8 << 20),
            written: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            pause: AtomicBool::new(false),
            turn: Mutex::new(()),
            small: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let mut writer = Writer::new(volumes.clone(), shared.clone(), seed);
        writer.prefill();
        let thread = std::thread::spawn(move || writer.run());
        Load { shared, volumes, thread: Some(thread) }
    }

    /// From now on about so many bytes a second; 0: as fast as it can.
    pub fn pace(&self, bytes_per_s: u64) {
        self.shared.bytes_per_s.store(bytes_per_s, Ordering::Relaxed);
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// Writes that failed so far.
    pub fn failed(&self) -> u64 {
        self.shared.failed.load(Ordering::Relaxed)
    }

    /// From now on no write reaches over a page of the volumes behind the first, which get more of them. A loop device that has written a part of
    /// what it was given, its file's disk being full, says that it has written all: that is no failure that anybody could
    /// see, so it must not happen here.
    pub fn small(&self, small: bool) {
        self.quiet(|_| self.shared.small.store(small, Ordering::Release));
    }

    /// Changes sectors of a volume by way of the file below its device: no block layer knows of it. `told` is run before anything
    /// else is written.
    #[track_caller]
    pub fn unseen(&self, volume: usize, from: u64, sectors: u64, backing: &Path, told: impl FnOnce()) {
        let mut bytes = Aligned::new(sectors as usize * SECTOR, 0);
        self.quiet(|_| {
            let mut op = Op { unseen: true, ..self.shared.begin(Deed::Write, volume, from, sectors) };
            model::fill_all(&op, &mut bytes);
            let file = File::options().write(true).open(backing).unwrap();
            file.write_all_at(&bytes, from * SECTOR as u64).unwrap();
            op.ended_ns = now_ns();
            told();
            self.shared.end(&op, None);
            // Past the device's own page cache, but not past that of the file: who reads the device reads what was written.
            let mut there = Aligned::new(bytes.len(), 0);
            let device = open(&self.volumes[volume].path);
            device.read_exact_at(&mut there, from * SECTOR as u64).unwrap();
            assert!(there[..] == bytes[..], "what is written to {} is not on its device", backing.display());
        });
    }

    /// A volume becomes larger by `grow`, by so many sectors, which are zeroes. From then on the new part is written, too.
    #[track_caller]
    pub fn grow(&self, volume: usize, sectors: u64, grow: impl FnOnce()) {
        self.quiet(|image| {
            let mut op = self.shared.begin(Deed::Grow, volume, image.sectors(volume), sectors);
            grow();
            op.ended_ns = now_ns();
            self.shared.end(&op, None);
        });
    }

    /// Everybody has noticed by now how large the volumes are.
    pub fn settle(&self) {
        lock(&self.shared.state).image.settle();
    }

    /// Volumes that it writes to.
    pub fn volumes(&self) -> &[LoadVolume] {
        &self.volumes
    }

    /// Runs `inside` with what the volumes hold while nothing is written.
    #[track_caller]
    pub fn quiet<T>(&self, inside: impl FnOnce(&Image) -> T) -> T {
        struct Resume<'a>(&'a AtomicBool);
        impl Drop for Resume<'_> {
            fn drop(&mut self) {
                self.0.store(false, Ordering::Release);
            }
        }
        self.shared.pause.store(true, Ordering::Release);
        let _resume = Resume(&self.shared.pause);
        let _turn = lock(&self.shared.turn);
        assert!(!self.thread.as_ref().unwrap().is_finished(), "the load has ended");
        let image = lock(&self.shared.state).image.clone();
        inside(&image)
    }

    /// What the volumes held at first, and everything that was done to them since.
    pub fn log(&self) -> (Image, Vec<Op>) {
        let state = lock(&self.shared.state);
        (state.base.clone(), state.ops.clone())
    }

    /// What the volumes hold now is where the log begins from here on. Call it from within [`Load::quiet`] or not at all.
    pub fn forget(&self) {
        let mut state = lock(&self.shared.state);
        state.base = state.image.clone();
        state.ops.clear();
    }
}

impl Shared {
    /// From now on the log has it.
    fn begin(&self, deed: Deed, volume: usize, from: u64, sectors: u64) -> Op {
        let stamp = self.stamp.fetch_add(1, Ordering::Relaxed) + 1;
        let (began_ns, ended_ns) = (now_ns(), u64::MAX);
        let op = Op { stamp, deed, volume, from, sectors, began_ns, ended_ns, failed: false, unseen: false };
        lock(&self.state).ops.push(op);
        op
    }

    /// It is done; `found`: what it left is not what it should have.
    fn end(&self, op: &Op, found: Option<&[model::Stamp]>) {
        let mut state = lock(&self.state);
        *state.ops.last_mut().unwrap() = *op;
        match found {
            Some(stamps) => state.image.set(op.volume, op.from, stamps),
            None => state.image.apply(op),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the load panicked");
        }
    }
}

struct Writer {
    volumes: Vec<LoadVolume>,
    files: Vec<File>,
    shared: Arc<Shared>,
    rng: StdRng,
    buffer: Aligned,
}

fn open(path: &Path) -> File {
    let file = OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_DIRECT).open(path);
    file.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

impl Writer {
    fn new(volumes: Vec<LoadVolume>, shared: Arc<Shared>, seed: u64) -> Self {
        let files = volumes.iter().map(|volume| open(&volume.path)).collect();
        let buffer = Aligned::new(SECTORS_MAX as usize * SECTOR, 0);
        Writer { volumes, files, shared, rng: StdRng::seed_from_u64(seed), buffer }
    }

    fn prefill(&mut self) {
        for volume in 0..self.volumes.len() {
            let (all, kept) = (self.volumes[volume].bytes / SECTOR as u64, self.volumes[volume].sectors());
            for from in (0..kept / 2).step_by(SECTORS_MAX as usize) {
                self.done(Deed::Write, volume, from, SECTORS_MAX.min(kept / 2 - from));
            }
            // A device that cannot fill with zeroes by itself says so once, by failing; then the kernel writes them for it.
            self.done(Deed::Zero, volume, kept / 2, 8);
            for from in (kept..all).step_by(SECTORS_MAX as usize) {
                self.done(Deed::Write, volume, from, SECTORS_MAX.min(all - from));
            }
        }
    }

    fn run(&mut self) {
        let mut due = Instant::now();
        while !self.shared.stop.load(Ordering::Acquire) {
            if self.shared.pause.load(Ordering::Acquire) {
                // A mutex alone is not fair: a load without a pace would keep others out.
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            let bytes = self.one();
            let rate = self.shared.bytes_per_s.load(Ordering::Relaxed);
            if rate > 0 {
                due += Duration::from_secs_f64(bytes as f64 / rate as f64);
            }
            let now = Instant::now();
            // What was missed is not made up for: a load, not a flood.
            due = due.max(now - Duration::from_millis(50)).min(now + Duration::from_millis(500));
            std::thread::sleep(due.saturating_duration_since(now));
        }
    }

    fn one(&mut self) -> u64 {
        let shared = self.shared.clone();
        let _turn = lock(&shared.turn);
        self.any()
    }

    /// One deed at random; how many bytes it had.
    fn any(&mut self) -> u64 {
        let small = self.shared.small.load(Ordering::Acquire);
        let first = self.rng.random_bool(if small { 0.2 } else { 0.7 });
        let volume = if first { 0 } else { self.rng.random_range(0..self.volumes.len()) };
        let (first, room) = self.part(volume);
        let order = self.rng.random_range(0..=13);
        let mut sectors = self.rng.random_range(1u64 << order..=(2u64 << order).min(SECTORS_MAX)).min(room / 2);
        let near = if self.rng.random_bool(0.4) { room / 8 } else { room };
        let mut from = self.rng.random_range(0..near.max(sectors + 1) - sectors);
        let deed = match self.rng.random_range(0..100) {
            0..=2 => Deed::Discard,
            3..=5 => Deed::Zero,
            _ => Deed::Write,
        };
        // Discards of parts of a block are a device's own business.
        if deed == Deed::Discard || self.rng.random_bool(0.6) {
            (from, sectors) = (from / 8 * 8, sectors.next_multiple_of(8));
            sectors = sectors.min(room / 8 * 8 - from);
        }
        if volume > 0 && small {
            sectors = (sectors - 1) % (8 - from % 8) + 1;
        }
        self.done(deed, volume, first + from, sectors);
        if self.rng.random_bool(0.05) {
            self.files[volume].sync_data().unwrap();
        }
        sectors * SECTOR as u64
    }

    /// Where to write: first sector and how many. Mostly what was always there, sometimes what the volume has got since.
    fn part(&mut self, volume: usize) -> (u64, u64) {
        let then = self.volumes[volume].bytes / SECTOR as u64;
        let now = lock(&self.shared.state).image.sectors(volume);
        let new = (now - then) / 8 * 8;
        if new >= 16 && self.rng.random_bool(0.2) { (then, new) } else { (0, self.volumes[volume].sectors()) }
    }

    fn done(&mut self, deed: Deed, volume: usize, from: u64, sectors: u64) {
        let mut op = self.shared.begin(deed, volume, from, sectors);
        op.failed = !self.act(&op);
        op.ended_ns = now_ns();
        let seen = op.failed.then(|| self.look(&op));
        if let Some(stamps) = &seen {
            let left = stamps.iter().filter(|stamp| **stamp == op.leaves()).count();
            println!("  {op:?} failed: {left} of {sectors} sectors are what it would have left");
        }
        self.shared.end(&op, seen.as_deref());
        self.shared.written.fetch_add(sectors * SECTOR as u64, Ordering::Relaxed);
        self.shared.failed.fetch_add(op.failed.into(), Ordering::Relaxed);
    }

    /// Whether the device did all of it.
    fn act(&mut self, op: &Op) -> bool {
        let (at, bytes) = (op.from * SECTOR as u64, op.sectors as usize * SECTOR);
        if op.deed == Deed::Write {
            model::fill_all(op, &mut self.buffer[..bytes]);
            return self.files[op.volume].write_at(&self.buffer[..bytes], at).is_ok_and(|written| written == bytes);
        }
        let mut command = Command::new("blkdiscard");
        command.args(["-f", "-o", &at.to_string(), "-l", &bytes.to_string()]).arg(&self.volumes[op.volume].path);
        if op.deed == Deed::Zero {
            command.arg("-z");
        }
        run(&mut command).code == 0
    }

    /// What is there now.
    fn look(&mut self, op: &Op) -> Vec<model::Stamp> {
        let bytes = op.sectors as usize * SECTOR;
        let (file, at, began) = (&self.files[op.volume], op.from * SECTOR as u64, Instant::now());
        while let Err(error) = file.read_exact_at(&mut self.buffer[..bytes], at) {
            // What cannot be read now will tell later what it holds.
            assert!(began.elapsed() < UNREADABLE_MAX, "volume {} cannot be read: {error}", op.volume);
            std::thread::sleep(Duration::from_millis(20));
        }
        let sectors = self.buffer[..bytes].chunks(SECTOR).enumerate();
        sectors.map(|(index, bytes)| model::stamp_of(op.volume, op.from + index as u64, bytes)).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
