//! The volumes at home: claimed, compared, written. One thread for each stream.

use crate::store::GroupFile;
use crate::volume;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;
use varve_common::limits::{DIGEST_BLOCK_BYTES, REGION_BYTES};
use varve_common::problem::Problem;
use varve_common::wire::Image;
use varve_common::wire::digest::block_digest;
use varve_common::wire::messages::{ImageDone, Probe, ProbeReply};
use varve_io::aligned::AlignedBuf;
use varve_io::blockdev::{in_use, writers};
use varve_io::direct::DirectFile;
use varve_io::{IoError, sparse};

/// Images that share one sync.
const IMAGES_PER_SYNC: usize = 16;
/// How long the thread waits for another image before it syncs.
const SYNC_WAIT: Duration = Duration::from_millis(2);

/// The volumes, and nobody else's.
pub struct Claim {
    /// Names it.
    pub id: u64,
    /// In the order of their numbers.
    pub files: Arc<Vec<DirectFile>>,
}

/// Opens the volumes so that nobody can mount or claim them; nothing is written.
pub fn claim(file: &GroupFile, own: &[PathBuf]) -> Result<Claim, Problem> {
    let what = format!("'{}' cannot come home", file.name);
    let open = |path: &str| {
        DirectFile::open_rw_exclusive(path).map_err(|error| {
            if !error.is_busy() {
                return Problem::failed(&what, error.chain(), "check the device");
            }
            let user = in_use(path).unwrap_or_else(|| "somebody has claimed it".to_owned());
            let next = "stop what uses it and unmount it: what it holds is going to be overwritten";
            Problem::refused(&what, format!("{path} is in use: {user}"), next)
        })
    };
    check(file, own)?;
    let files = file.volumes.iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?;
    // A database on the bare device claims nothing, and would go on writing to what is being overwritten.
    for path in &file.volumes {
        let writers = writers(path);
        if !writers.is_empty() {
            let why = format!("{path} is open for writing: {}", writers.join(", "));
            return Err(Problem::refused(&what, why, "stop it: what the volume holds is going to be overwritten"));
        }
    }
    // 0 means none.
    Ok(Claim { id: rand::random::<u64>() | 1, files: Arc::new(files) })
}

/// Opens the volumes only to read them.
pub fn look(file: &GroupFile) -> Result<Arc<Vec<DirectFile>>, Problem> {
    let failed =
        |e: IoError| Problem::failed(format!("'{}' cannot be compared", file.name), e.chain(), "check the device");
    Ok(Arc::new(file.volumes.iter().map(DirectFile::open_read).collect::<Result<Vec<_>, _>>().map_err(failed)?))
}

fn check(file: &GroupFile, own: &[PathBuf]) -> Result<(), Problem> {
    let known = file.identities.iter().map(Some).chain(std::iter::repeat(None));
    for ((path, bytes), known) in file.volumes.iter().zip(&file.bytes).zip(known) {
        let checked = volume::check(path, own)?;
        if let Some(known) = known {
            let next = format!(
                "if it was exchanged and may be overwritten, 'varve unprotect {0}' here, then 'varve failback {0} --volume PATH'",
                file.name
            );
            volume::refuse_another(&checked, known, &next).map_err(|other| Problem {
                what: format!("'{}' cannot come home", file.name),
                why: format!("{}: {}", other.what, other.why),
                ..other
            })?;
        }
        if checked.spec.bytes != *bytes {
            let why = format!("{path} had {bytes} bytes and has {} now", checked.spec.bytes);
            let next = "give a device of exactly that size";
            return Err(Problem::refused(format!("'{}' cannot come home", file.name), why, next));
        }
    }
    Ok(())
}

/// What the thread is to do.
pub enum Job {
    /// Say which blocks differ.
    Compare(Probe),
    /// Write the plain body of an image.
    Write(Vec<u8>),
    /// Read a stretch for the receiver, which keeps it: number, volume, offset, length.
    Read(u64, u16, u64, u32),
}

/// What it has done.
pub enum Did {
    /// These blocks differ.
    Compared(ProbeReply, u64),
    /// It is durable.
    Written(ImageDone),
    /// What was read, as the body of an image.
    Read(Vec<u8>),
    /// A disk failed, or the receiver is wrong.
    Failed(String),
}

/// The thread's handle: dropping it ends the thread, and waits until nothing is written any more.
pub struct Disks {
    jobs: Option<Sender<Job>>,
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Disks {
    /// Starts it.
    pub fn start(files: Arc<Vec<DirectFile>>, write: bool, did: UnboundedSender<Did>) -> Result<Self, Problem> {
        let (jobs, todo) = channel();
        let over = Arc::new(AtomicBool::new(false));
        let worker = Worker {
            files,
            write,
            did,
            over: over.clone(),
            buf: AlignedBuf::new(REGION_BYTES as usize),
            written: Vec::new(),
            touched: BTreeSet::new(),
        };
        let thread = std::thread::Builder::new().name("failback".to_owned()).spawn(move || worker.run(&todo));
        let thread = thread.map_err(|e| Problem::failed("no thread can be started", e.to_string(), "see ulimit -u"))?;
        Ok(Self { jobs: Some(jobs), over, thread: Some(thread) })
    }

    /// Gives it something to do. The receiver's window bounds how much waits.
    pub fn order(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // If it has ended, it has said why.
            let _ = jobs.send(job);
        }
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by the hook.
            let _ = thread.join();
        }
    }
}

struct Worker {
    files: Arc<Vec<DirectFile>>,
    write: bool,
    did: UnboundedSender<Did>,
    over: Arc<AtomicBool>,
    buf: AlignedBuf,
    written: Vec<u64>,
    touched: BTreeSet<usize>,
}

impl Worker {
    fn run(mut self, todo: &Receiver<Job>) {
        loop {
            let wait = if self.written.is_empty() { Duration::from_secs(3600) } else { SYNC_WAIT };
            let job = match todo.recv_timeout(wait) {
                Ok(job) => Some(job),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            // What waits is of a stream that has ended: the next one compares anew.
            if self.over.load(Ordering::Acquire) {
                return;
            }
            if let Err(why) = self.turn(job) {
                // If nobody listens, the stream has ended.
                let _ = self.did.send(Did::Failed(why));
                return;
            }
        }
    }

    fn turn(&mut self, job: Option<Job>) -> Result<(), String> {
        match job {
            Some(Job::Compare(probe)) => {
                let differs = self.compare(&probe)?;
                let reply = ProbeReply { id: probe.id, differs };
                let _ = self.did.send(Did::Compared(reply, probe.length.into()));
            }
            Some(Job::Write(body)) => self.write(&body)?,
            Some(Job::Read(id, volume, offset, length)) => {
                let body = self.read(id, volume, offset, length)?;
                let _ = self.did.send(Did::Read(body));
            }
            None => self.sync()?,
        }
        if self.written.len() >= IMAGES_PER_SYNC { self.sync() } else { Ok(()) }
    }

    fn compare(&mut self, probe: &Probe) -> Result<u16, String> {
        let file = self.files.get(usize::from(probe.volume)).ok_or("a volume that the group does not have")?;
        let length = u64::from(probe.length);
        let inside = probe.offset.checked_add(length).is_some_and(|end| end <= file.len());
        let count = length.div_ceil(DIGEST_BLOCK_BYTES) as usize;
        if !inside || length > REGION_BYTES || probe.digests.len() != count {
            return Err("a comparison outside the volume".to_owned());
        }
        let bytes = &mut self.buf[..length as usize];
        file.read_exact_at(bytes, probe.offset).map_err(|e| e.chain())?;
        let ours = bytes.chunks(DIGEST_BLOCK_BYTES as usize).map(block_digest);
        let differs = ours.zip(&probe.digests).enumerate();
        Ok(differs.fold(0, |all, (number, (ours, theirs))| all | u16::from(ours != *theirs) << number))
    }

    fn read(&mut self, id: u64, volume: u16, offset: u64, length: u32) -> Result<Vec<u8>, String> {
        let file = self.files.get(usize::from(volume)).ok_or("a volume that the group does not have")?;
        let length = u64::from(length);
        let inside = offset.checked_add(length).is_some_and(|end| end <= file.len());
        if !inside || length == 0 || length > REGION_BYTES {
            return Err("a stretch outside the volume".to_owned());
        }
        let bytes = &mut self.buf[..length as usize];
        file.read_exact_at(bytes, offset).map_err(|e| e.chain())?;
        let mut body = Vec::with_capacity(bytes.len() + 64);
        let zero = bytes.iter().all(|byte| *byte == 0);
        Image::encode(id, volume, &[(offset, length, (!zero).then_some(&*bytes))], &mut body);
        Ok(body)
    }

    fn write(&mut self, body: &[u8]) -> Result<(), String> {
        if !self.write {
            return Err("the receiver writes although it only looks".to_owned());
        }
        let image = Image::decode(body).map_err(|e| e.to_string())?;
        let number = usize::from(image.volume);
        let file = self.files.get(number).ok_or("a volume that the group does not have")?;
        for (offset, length, bytes) in image.extents() {
            if offset.checked_add(length).is_none_or(|end| end > file.len()) || length > REGION_BYTES {
                return Err("an image outside the volume".to_owned());
            }
            let done = match bytes {
                Some(bytes) => {
                    let aligned = &mut self.buf[..bytes.len()];
                    aligned.copy_from_slice(bytes);
                    file.write_all_at(aligned, offset)
                }
                None => sparse::zero_range(file, offset, length),
            };
            done.map_err(|e| e.chain())?;
        }
        self.touched.insert(number);
        self.written.push(image.id);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), String> {
        for number in std::mem::take(&mut self.touched) {
            self.files[number].sync_data().map_err(|e| e.chain())?;
        }
        for id in self.written.drain(..) {
            let _ = self.did.send(Did::Written(ImageDone { id }));
        }
        Ok(())
    }
}
