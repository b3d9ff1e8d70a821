//! A disk with a cache that loses its content with the power, and that fails on request; and a file system on it.
//!
//! What was written lasts when it was flushed, not before: of what lies in the cache any part may be gone when the power is.
//! Served by this process as a loop device, so the test decides with a flag what the next request gets.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use varve_export::device::{Attached, Way, attach};
use varve_export::{Disk, Stretch};

const BLOCK: usize = 4096;

/// Which requests fail with EIO.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Faults {
    pub reads: bool,
    pub writes: bool,
    /// Writes of blocks that hold these bytes.
    pub writes_of: Option<Vec<u8>>,
    /// What was written stays in the cache.
    pub flushes: bool,
    /// The next flush fails, once, and nothing of what was in the cache is there any more.
    pub next_flush_loses: bool,
    /// The power goes instead of this flush, counted from now.
    pub cut_at_flush: Option<u64>,
}

#[derive(Default)]
struct Inner {
    kept: HashMap<u64, Box<[u8; BLOCK]>>,
    cache: HashMap<u64, Box<[u8; BLOCK]>>,
    faults: Faults,
    /// There is no power: nothing is answered.
    dead: bool,
    /// Requests that failed on request.
    failed: u64,
    seed: u64,
}

/// See the module's text.
pub struct Media {
    bytes: u64,
    inner: Mutex<Inner>,
    /// Loses its power with this one.
    peer: Mutex<Weak<Media>>,
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::EIO)
}

impl Inner {
    fn check(&mut self, fails: bool) -> io::Result<()> {
        if self.dead || fails {
            self.failed += 1;
            return Err(eio());
        }
        Ok(())
    }

    fn block(&self, number: u64) -> Option<&[u8; BLOCK]> {
        self.cache.get(&number).or_else(|| self.kept.get(&number)).map(|block| &**block)
    }

    /// Of the cache some blocks are kept, or all, or none.
    fn lose_power(&mut self) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let part = [0.0, 0.5, 0.95][rng.random_range(0..3)];
        let mut cached: Vec<_> = self.cache.drain().collect();
        cached.sort_by_key(|(number, _)| *number);
        for (number, block) in cached {
            if rng.random_bool(part) {
                self.kept.insert(number, block);
            }
        }
        self.dead = true;
        self.seed += 1;
    }
}

impl Media {
    pub fn new(bytes: u64, seed: u64) -> Arc<Self> {
        let inner = Mutex::new(Inner { seed, ..Inner::default() });
        Arc::new(Self { bytes, inner, peer: Mutex::default() })
    }

    /// Two disks of one host: a flush of one says nothing of the other, and their power goes together.
    pub fn pair(bytes: u64, seed: u64) -> [Arc<Self>; 2] {
        let pair = [Self::new(bytes, seed), Self::new(bytes, seed ^ 1)];
        for (one, other) in [(0, 1), (1, 0)] {
            *pair[one].peer.lock().unwrap() = Arc::downgrade(&pair[other]);
        }
        pair
    }

    pub fn fail(&self, faults: Faults) {
        let mut inner = self.inner.lock().unwrap();
        (inner.faults, inner.failed) = (faults, 0);
    }

    /// Requests that failed since the faults were set.
    pub fn failed(&self) -> u64 {
        self.inner.lock().unwrap().failed
    }

    pub fn cut_power(&self) {
        let mut inner = self.inner.lock().unwrap();
        if inner.dead {
            return;
        }
        inner.lose_power();
        drop(inner);
        let peer = self.peer.lock().unwrap().upgrade();
        if let Some(peer) = peer {
            peer.cut_power();
        }
    }

    pub fn has_power(&self) -> bool {
        !self.inner.lock().unwrap().dead
    }

    /// What lasts.
    pub fn kept(&self) -> Vec<u8> {
        let inner = self.inner.lock().unwrap();
        let mut bytes = vec![0; self.bytes as usize];
        for (number, block) in &inner.kept {
            let at = *number as usize * BLOCK;
            bytes[at..at + BLOCK].copy_from_slice(&**block);
        }
        bytes
    }

    /// As a device; `dir` is for its own files.
    pub fn attach(self: &Arc<Self>, dir: &Path) -> Attached {
        let disk: Arc<dyn Disk> = self.clone();
        attach(disk, dir, "disk", false, Way::Loop).unwrap()
    }

    fn power_on(&self) {
        let mut inner = self.inner.lock().unwrap();
        inner.dead = false;
        inner.faults = Faults::default();
        inner.cache.clear();
    }
}

impl Disk for Media {
    fn len(&self) -> u64 {
        self.bytes
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut inner = self.inner.lock().unwrap();
        let fails = inner.faults.reads;
        inner.check(fails)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let inside = (at % BLOCK as u64) as usize;
            let take = (BLOCK - inside).min(buf.len() - done);
            match inner.block(at / BLOCK as u64) {
                Some(block) => buf[done..done + take].copy_from_slice(&block[inside..inside + take]),
                None => buf[done..done + take].fill(0),
            }
            done += take;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut inner = self.inner.lock().unwrap();
        let of = inner.faults.writes_of.as_ref();
        let fails = inner.faults.writes || of.is_some_and(|of| buf.windows(of.len()).any(|part| part == of));
        inner.check(fails)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (number, inside) = (at / BLOCK as u64, (at % BLOCK as u64) as usize);
            let take = (BLOCK - inside).min(buf.len() - done);
            let mut block = inner.block(number).map_or_else(|| Box::new([0; BLOCK]), |block| Box::new(*block));
            block[inside..inside + take].copy_from_slice(&buf[done..done + take]);
            inner.cache.insert(number, block);
            done += take;
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        let zeroes = vec![0; 1 << 20];
        let mut at = offset;
        while at < offset + len {
            let take = (offset + len - at).min(zeroes.len() as u64);
            self.write_at(&zeroes[..take as usize], at)?;
            at += take;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut inner = self.inner.lock().unwrap();
        if let Some(left) = inner.faults.cut_at_flush.take() {
            if left == 1 {
                drop(inner);
                self.cut_power();
                return Err(eio());
            }
            inner.faults.cut_at_flush = Some(left - 1);
        }
        if std::mem::take(&mut inner.faults.next_flush_loses) {
            inner.cache.clear();
            return inner.check(true);
        }
        let fails = inner.faults.flushes;
        inner.check(fails)?;
        let cached = std::mem::take(&mut inner.cache);
        inner.kept.extend(cached);
        Ok(())
    }

    fn stretch(&self, _offset: u64, len: u64) -> io::Result<Stretch> {
        Ok(Stretch { len, hole: false })
    }
}

/// A file system on a [`Media`], mounted.
pub struct Mounted {
    pub media: Arc<Media>,
    pub point: PathBuf,
    attached: Option<Attached>,
    dir: PathBuf,
    is_mounted: bool,
}

impl Mounted {
    /// A new ext4, mounted at `point`; `dir` is for the device's own files.
    pub fn ext4(media: &Arc<Media>, dir: &Path, point: &Path) -> Self {
        let mut this = Self {
            media: media.clone(),
            point: point.to_owned(),
            attached: None,
            dir: dir.to_owned(),
            is_mounted: false,
        };
        this.attach();
        let options = ["-q", "-F", "-m", "0", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0"];
        let made = Command::new("mkfs.ext4").args(options).arg(this.device()).status().unwrap();
        assert!(made.success());
        this.mount();
        this
    }

    fn device(&self) -> &Path {
        self.attached.as_ref().unwrap().path()
    }

    fn attach(&mut self) {
        self.attached = Some(self.media.attach(&self.dir));
    }

    fn mount(&mut self) {
        mount(Some(self.device()), &self.point, Some("ext4"), MsFlags::empty(), None::<&str>).expect("root is needed");
        self.is_mounted = true;
    }

    pub fn unmount(&mut self) -> Result<(), nix::errno::Errno> {
        let start = Instant::now();
        while self.is_mounted {
            match umount2(&self.point, MntFlags::empty()) {
                Ok(()) => self.is_mounted = false,
                Err(error) if start.elapsed() > Duration::from_secs(10) => return Err(error),
                // Whoever was killed is still closing its files.
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        self.attached = None;
        Ok(())
    }

    /// As the host does when it starts again. Nobody uses the file system. What was in the cache of a disk that has lost its
    /// power is gone; of one that has not, it is kept.
    pub fn power_cycle(&mut self) {
        self.unmount().unwrap();
        if self.media.has_power() {
            self.media.fail(Faults::default());
            self.media.flush().unwrap();
        }
        self.media.power_on();
        self.attach();
        // What the file system promises its users is not what is tested here.
        let checked = Command::new("fsck.ext4").args(["-p"]).arg(self.device()).output().unwrap();
        let said = String::from_utf8_lossy(&checked.stdout).into_owned();
        assert!(checked.status.code().is_some_and(|code| code <= 1), "{said}");
        self.mount();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.is_mounted
            && let Err(error) = self.unmount()
        {
            let _ = umount2(&self.point, MntFlags::MNT_DETACH);
            assert!(std::thread::panicking(), "{}: {error}", self.point.display());
        }
    }
}
