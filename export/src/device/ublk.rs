//! ublk: the kernel asks this process for each request of a block device, with no file and no second driver between.
//!
//! One thread takes requests and hands over answers, for the kernel wants both from the same; others read and write the disk.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use nix::libc;
use varve_io::ublk::{Answers, DEPTH, Device, Lane, Op, Queue, REQUEST_BYTES_MAX, Request, Shape};
use varve_io::{AlignedBuf, IoError, ublk};

use super::mount::path_hash;
use super::wait;
use crate::disk::Disk;
use crate::limits::{DEVICE_GONE_TIMEOUT, DEVICE_THREADS, UBLK_LAST_WORD, UBLK_QUIET};

/// A device with the threads that answer for it.
#[derive(Debug)]
pub(super) struct Served {
    /// There until it is stopped.
    device: Option<Device>,
    path: PathBuf,
    board: Arc<Board>,
    taker: Option<JoinHandle<()>>,
}

impl Served {
    /// `dir` is the directory of all that is attached.
    pub(super) fn start(disk: Arc<dyn Disk>, dir: &Path, name: &str, read_only: bool) -> Result<Self, IoError> {
        let device = Device::add(Shape { bytes: disk.len(), read_only, mark: mark_of(dir, this_process()) })?;
        let (path, lane) = (device.path(), device.lane());
        let failed = |e| IoError::new("serve", &path, e);
        let ended = || failed(io::Error::other("its thread has ended"));
        let board = Arc::new(Board::new(Arc::new(Answers::new().map_err(failed)?)));
        let server = Server { disk, read_only, lane: lane.ok_or_else(ended)?, board: board.clone() };
        let mut served = Self { device: Some(device), path: path.clone(), board, taker: None };
        let (ready, fetching) = sync_channel(1);
        let builder = thread::Builder::new().name(format!("ublk-{name}"));
        served.taker = Some(builder.spawn(move || server.run(&ready)).map_err(failed)?);
        fetching.recv().map_err(|_| ended())??;
        served.device.as_mut().map_or(Ok(()), Device::start)?;
        Ok(served)
    }

    /// The disk's node.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether nothing is asked, and was not a moment ago: the kernel does not tell who has a disk open. To open it oneself may mean
    /// to wait for what is asked.
    pub(super) fn is_quiet(&self) -> bool {
        self.board.is_quiet()
    }

    /// Takes the disk away, used or not. Whatever is asked gets EIO, so that this waits for no disk; afterwards who has it open
    /// reads its end. After an error it is still there.
    pub(super) fn stop(&mut self) -> Result<(), IoError> {
        let Some(device) = &mut self.device else { return Ok(()) };
        let is_used = !self.board.is_quiet();
        self.board.end();
        if is_used {
            // Rather an error for a program that reads than an end that it takes for the disk's.
            wait(UBLK_LAST_WORD, || self.board.has_refused());
        }
        if self.board.has_refused() {
            tracing::warn!(device = %self.path.display(), "the device goes away while it is used; its users get errors");
        }
        if self.taker.as_ref().is_none_or(JoinHandle::is_finished) {
            device.close();
        }
        if let Err(error) = device.stop() {
            self.board.go_on();
            return Err(error);
        }
        // Its workers may wait for the disk. They have nobody to answer to, and end after that.
        wait(DEVICE_GONE_TIMEOUT, || {
            self.taker.as_ref().is_none_or(JoinHandle::is_finished) || self.board.is_at_disk()
        });
        if self.taker.take_if(|taker| taker.is_finished()).is_some_and(|taker| taker.join().is_err()) {
            tracing::error!(device = %self.path.display(), "the thread of a ublk device panicked");
        }
        // It ends when nothing of ours has it open any more.
        self.device = None;
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::warn!("{}", error.chain());
        }
    }
}

/// Who owes which answer.
#[derive(Debug)]
struct Board {
    answers: Arc<Answers>,
    /// For each tag the number of the request that is not answered; 0: none. Locked while its bytes are moved, so that nothing
    /// is moved for a request that somebody else has answered.
    owed: Vec<Mutex<u64>>,
    begin: Instant,
    /// Milliseconds after `begin`.
    last: AtomicU64,
    under_way: AtomicUsize,
    at_disk: AtomicUsize,
    ending: AtomicBool,
    refused: AtomicBool,
}

impl Board {
    fn new(answers: Arc<Answers>) -> Self {
        Self {
            answers,
            owed: (0..DEPTH).map(|_| Mutex::new(0)).collect(),
            begin: Instant::now(),
            last: AtomicU64::new(0),
            under_way: AtomicUsize::new(0),
            at_disk: AtomicUsize::new(0),
            ending: AtomicBool::new(false),
            refused: AtomicBool::new(false),
        }
    }

    fn owed(&self, tag: u16) -> MutexGuard<'_, u64> {
        lock(&self.owed[usize::from(tag)])
    }

    /// A request came; whether it is to be worked on.
    fn asked(&self, tag: u16, number: u64) -> bool {
        self.under_way.fetch_add(1, Ordering::SeqCst);
        *self.owed(tag) = number;
        // Behind that: whoever ends it looks at all that is owed afterwards.
        let ending = self.ending.load(Ordering::SeqCst);
        if ending {
            self.refuse(tag);
        }
        !ending
    }

    /// Does a step for a request, and with it nothing else; `None` if somebody else has answered it.
    fn with<T>(&self, tag: u16, number: u64, step: impl FnOnce() -> T) -> Option<T> {
        let owed = self.owed(tag);
        (*owed == number).then(step)
    }

    /// Does the last step for a request, and answers with what it gives.
    fn answer(&self, tag: u16, number: u64, step: impl FnOnce() -> i32) {
        let mut owed = self.owed(tag);
        if *owed == number {
            let result = step();
            self.settle(tag, &mut owed, result);
        }
    }

    fn refuse(&self, tag: u16) {
        let mut owed = self.owed(tag);
        if *owed != 0 {
            self.refused.store(true, Ordering::SeqCst);
            self.settle(tag, &mut owed, -libc::EIO);
        }
    }

    fn settle(&self, tag: u16, owed: &mut u64, result: i32) {
        *owed = 0;
        self.last.store(self.begin.elapsed().as_millis() as u64, Ordering::SeqCst);
        self.under_way.fetch_sub(1, Ordering::SeqCst);
        self.answers.push(tag, result);
    }

    /// From here on everything that is asked, or was and is not answered, gets EIO at once.
    fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
        (0..DEPTH).for_each(|tag| self.refuse(tag));
    }

    /// It did not end.
    fn go_on(&self) {
        self.ending.store(false, Ordering::SeqCst);
    }

    fn has_refused(&self) -> bool {
        self.refused.load(Ordering::SeqCst)
    }

    fn is_at_disk(&self) -> bool {
        self.at_disk.load(Ordering::SeqCst) > 0
    }

    fn is_quiet(&self) -> bool {
        let now = self.begin.elapsed().as_millis() as u64;
        let since = now.saturating_sub(self.last.load(Ordering::SeqCst));
        self.under_way.load(Ordering::SeqCst) == 0 && u128::from(since) >= UBLK_QUIET.as_millis()
    }
}

/// What the kernel keeps with a device: which directory it belongs to, and which life of the daemon.
fn mark_of(dir: &Path, life: u32) -> u64 {
    path_hash(dir) << 32 | u64::from(life)
}

/// Another number in each process: a process number may come again.
fn this_process() -> u32 {
    static LIFE: LazyLock<u32> = LazyLock::new(|| RandomState::new().hash_one(std::process::id()) as u32);
    *LIFE
}

/// Deletes what an earlier life had attached below `dir`: its disks went with it. What was deleted, and what was not and why.
pub(super) fn clean(dir: &Path) -> Result<(Vec<String>, Vec<String>), IoError> {
    let (mut removed, mut left) = (Vec::new(), Vec::new());
    let earlier = |mark: u64| mark >> 32 == mark_of(dir, 0) >> 32 && mark != mark_of(dir, this_process());
    let begin = Instant::now();
    for id in ublk::ids()? {
        let info = || match ublk::info(id) {
            // It has gone meanwhile.
            Err(e) if e.source_io().raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(e) => Err(e),
            Ok(info) => Ok(Some(info).filter(|info| earlier(info.mark))),
        };
        // The kernel takes the disk away some time after its server's end.
        let lives = || info().is_ok_and(|info| info.is_some_and(|info| !info.is_dead));
        wait(DEVICE_GONE_TIMEOUT.saturating_sub(begin.elapsed()), || !lives());
        match info() {
            Ok(None) => {}
            Ok(Some(info)) if !info.is_dead => left.push(format!("/dev/ublkb{id}: its server has not ended")),
            Ok(Some(_)) => match ublk::delete(id) {
                Ok(()) => removed.push(format!("ublk device {id}")),
                Err(error) => left.push(error.chain()),
            },
            Err(error) => left.push(error.chain()),
        }
    }
    Ok((removed, left))
}

/// A request with its number among all.
type Numbered = (u64, Request);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the threads of a device share.
struct Server {
    disk: Arc<dyn Disk>,
    read_only: bool,
    lane: Lane,
    board: Arc<Board>,
}

impl Server {
    /// The thread that takes requests: until the device is stopped.
    fn run(&self, ready: &SyncSender<Result<(), IoError>>) {
        let queue = match Queue::new(self.lane.clone(), self.board.answers.clone()) {
            Ok(queue) => queue,
            Err(error) => return drop(ready.send(Err(error))),
        };
        let (give, take) = sync_channel::<Numbered>(usize::from(DEPTH));
        let take = Mutex::new(take);
        thread::scope(|scope| {
            let worker = |_: &usize| {
                let builder = thread::Builder::new().name("ublk-worker".to_owned());
                builder.spawn_scoped(scope, || self.work(&take)).is_ok()
            };
            let workers = (0..DEVICE_THREADS).filter(worker).count();
            let none = || IoError::new("serve", ublk::CONTROL, io::Error::other("no thread can be had"));
            let _ = ready.send(if workers > 0 { Ok(()) } else { Err(none()) });
            if workers > 0
                && let Err(error) = self.hand_out(queue, give)
            {
                tracing::error!("a ublk device is dead, its view gives errors until it is closed: {}", error.chain());
                self.board.end();
            }
        });
    }

    fn hand_out(&self, mut queue: Queue, give: SyncSender<Numbered>) -> Result<(), IoError> {
        let mut requests = Vec::with_capacity(usize::from(DEPTH));
        let mut number = 0;
        while queue.next(&mut requests)? {
            for request in requests.drain(..) {
                number += 1;
                if self.board.asked(request.tag, number) {
                    // There is room: no more are under way than the queue is deep, and a worker takes what was refused, too.
                    let _ = give.send((number, request));
                }
            }
        }
        Ok(())
    }

    fn work(&self, take: &Mutex<Receiver<Numbered>>) {
        let mut buffer = None;
        loop {
            let next = lock(take).recv();
            let Ok((number, request)) = next else { return };
            if self.board.with(request.tag, number, || ()).is_none() {
                continue;
            }
            self.board.at_disk.fetch_add(1, Ordering::SeqCst);
            // A thread that ended would be missed by the next request.
            let done = catch_unwind(AssertUnwindSafe(|| self.act(number, &request, &mut buffer)));
            self.board.at_disk.fetch_sub(1, Ordering::SeqCst);
            self.board.answer(request.tag, number, || match (done, request.op) {
                (Ok(Ok(bytes)), Some(Op::Read)) => {
                    let given = self.lane.give(&request, part(&mut buffer, bytes));
                    given.map_or_else(|e| errno(&e), |()| bytes.cast_signed())
                }
                (Ok(Ok(bytes)), _) => bytes.cast_signed(),
                (Ok(Err(error)), _) => errno(&error),
                (Err(_), _) => {
                    tracing::error!("a disk's call panicked; its reader gets EIO");
                    -libc::EIO
                }
            });
        }
    }

    /// The bytes that were read or written. Of the others none are told: what is zeroed at once may be more than an answer can
    /// say.
    fn act(&self, number: u64, request: &Request, buffer: &mut Option<AlignedBuf>) -> io::Result<u32> {
        let (disk, offset, bytes) = (self.disk.as_ref(), request.offset, request.bytes);
        let refused = |errno| Err(io::Error::from_raw_os_error(errno));
        if request.op == Some(Op::Flush) {
            // Without a place.
            return disk.flush().map(|()| 0);
        }
        if (self.read_only || disk.is_read_only()) && request.op != Some(Op::Read) {
            return refused(libc::EROFS);
        }
        let inside = offset.checked_add(u64::from(bytes)).is_some_and(|end| end <= disk.len());
        if !inside || (matches!(request.op, Some(Op::Read | Op::Write)) && bytes > REQUEST_BYTES_MAX) {
            return refused(libc::EINVAL);
        }
        match request.op {
            Some(Op::Read) => disk.read_at(part(buffer, bytes), offset).map(|()| bytes),
            Some(Op::Write) => {
                let buffer = part(buffer, bytes);
                let taken = self.board.with(request.tag, number, || self.lane.take(request, buffer));
                taken.unwrap_or(Err(io::ErrorKind::Interrupted.into()))?;
                disk.write_at(buffer, offset).map(|()| bytes)
            }
            Some(Op::Discard) => disk.zero(offset, u64::from(bytes), true).map(|()| 0),
            Some(Op::Zero { may_unmap }) => disk.zero(offset, u64::from(bytes), may_unmap).map(|()| 0),
            Some(Op::Flush) | None => refused(libc::EOPNOTSUPP),
        }
    }
}

fn errno(error: &io::Error) -> i32 {
    -error.raw_os_error().unwrap_or(libc::EIO)
}

/// Page-aligned, so that a disk can give it to O_DIRECT as it is. Kept.
fn part(buffer: &mut Option<AlignedBuf>, bytes: u32) -> &mut [u8] {
    &mut buffer.get_or_insert_with(|| AlignedBuf::new(REQUEST_BYTES_MAX as usize))[..bytes as usize]
}
