//! Many reads or writes at queue depth, waited for as one call; or reads waited for one by one ([`ReadAhead`]).
//!
//! Ownership: the slices of a batch are *borrowed* for the call, and the call does not end, neither by
//! return nor by unwinding, before the kernel has completed every request that names one of them. That is what makes
//! these functions safe. A guard (`Run`) holds the count of requests that the kernel may still touch, and its
//! `Drop` waits for them; if even waiting is impossible, it aborts the process, since borrowed memory
//! cannot be leaked in the way that owned memory could.
#![allow(unsafe_code)]

mod read_ahead;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use nix::libc;

use crate::direct::{DirectFile, Route};
use crate::error::IoError;
use crate::fallback;

pub use read_ahead::{OwnedBuf, ReadAhead};

/// The most requests that are in flight at once.
pub const DEPTH_MAX: u32 = 4096;
/// The most bytes of one request; a longer slice becomes several, which also lets them run side by side.
const PART_BYTES_MAX: usize = 1 << 20;
/// How often one part is issued again after EAGAIN or EINTR before that is an error.
const RETRIES_MAX: u16 = 256;

/// An io_uring with a fixed depth.
///
/// Requests of one batch run in any order and side by side: ranges of a batch of writes must not
/// overlap, else either content may win. Use one queue per thread; it may move between threads.
///
/// On a host where io_uring is switched off it does the same requests by threads ([`IoQueue::is_ring`]).
pub struct IoQueue {
    ring: Option<IoUring>,
    depth: usize,
    // Reused from batch to batch, so that a steady load does not allocate. Empty between calls.
    parts: Vec<Part>,
    again: Vec<usize>,
}

/// One request: a piece of one slice of the batch.
#[derive(Clone, Copy)]
struct Part {
    file: usize,
    fd: RawFd,
    unit: usize,
    // Exposed address of the borrowed bytes. A number, so that the queue is `Send` and the table between
    // calls cannot be mistaken for something that may be followed.
    address: usize,
    bytes: usize,
    offset: u64,
    done: usize,
    retries: u16,
}

#[derive(Clone, Copy)]
enum Verb {
    Read,
    Write,
}

impl Verb {
    fn text(self) -> &'static str {
        match self {
            Verb::Read => "read",
            Verb::Write => "write",
        }
    }
}

impl Part {
    /// Books one completion; whether the part is complete.
    fn settle(&mut self, verb: Verb, file: &DirectFile, result: i32) -> Result<bool, IoError> {
        let (left, at) = (self.bytes - self.done, self.offset + self.done as u64);
        match usize::try_from(result) {
            // As in DirectFile: whole units of progress, or it is the end.
            Ok(n) if n >= self.unit && n <= left => {
                self.done += n - n % self.unit;
                Ok(self.done == self.bytes)
            }
            Ok(n) => Err(file.short(verb.text(), left, at, n)),
            Err(_) if matches!(-result, libc::EAGAIN | libc::EINTR) && self.retries < RETRIES_MAX => {
                self.retries += 1;
                Ok(false)
            }
            Err(_) => Err(file.failed(verb.text(), left, at, io::Error::from_raw_os_error(-result))),
        }
    }
}

/// Divides a request into parts.
fn plan(
    verb: Verb,
    files: &[&DirectFile],
    index: usize,
    offset: u64,
    address: usize,
    len: usize,
    mut push: impl FnMut(Part),
) -> Result<(), IoError> {
    let Some(file) = files.get(index) else {
        let why = format!("the batch names file {index} of {}", files.len());
        return Err(IoError::refused("issue", "io_uring", io::ErrorKind::InvalidInput, why));
    };
    let Route { head } = file.route(verb.text(), address, len, offset)?;
    for (tail, from, to) in [(false, 0, head), (true, head, len)] {
        let (fd, unit) = (file.fd(tail).as_raw_fd(), file.unit(tail));
        for start in (from..to).step_by(PART_BYTES_MAX) {
            push(Part {
                file: index,
                fd,
                unit,
                address: address + start,
                bytes: PART_BYTES_MAX.min(to - start),
                offset: offset + start as u64,
                done: 0,
                retries: 0,
            });
        }
    }
    Ok(())
}

/// An io_uring for a thread that only looks at completions when it enters the kernel anyway, so that it need not be interrupted
/// for each of them. Kernels before 5.19 do not know the flag. `None`: this host has no io_uring, or forbids it.
fn ring(depth: u32) -> Result<Option<IoUring>, IoError> {
    let ring = match IoUring::builder().setup_coop_taskrun().build(depth) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::new(depth),
        other => other,
    };
    match ring {
        Ok(ring) => Ok(Some(ring)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EACCES)) => {
            tracing::warn!(error = %e, "no io_uring on this host (sysctl kernel.io_uring_disabled?): slower I/O by threads");
            Ok(None)
        }
        Err(e) => Err(IoError::new(format!("set up (depth {depth})"), "io_uring", e)),
    }
}

/// Submits what is queued and waits for at least one completion. Waiting for a quarter or half of the
/// depth was no faster (measured at depth 32 and 128 on virtio; nor were registered files).
fn enter(ring: &mut IoUring, in_flight: usize) {
    match ring.submit_and_wait(1) {
        Ok(_) => {}
        Err(e) => match e.raw_os_error() {
            Some(libc::EINTR) => {}
            // Short of memory, or too many completions not fetched: fetch them, then try again. Without
            // a limit, as a plain write to a disk that hangs also has none.
            Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => std::thread::sleep(Duration::from_millis(1)),
            _ => {
                tracing::error!(error = %e, in_flight, "io_uring cannot be waited for");
                // To return would free memory that the kernel may still write to.
                std::process::abort();
            }
        },
    }
}

impl IoQueue {
    /// A queue that keeps up to `depth` requests in flight (1 to [`DEPTH_MAX`]; others are brought into range).
    /// Where the kernel has no io_uring or forbids it (ENOSYS, EPERM, EACCES: `sysctl
    /// kernel.io_uring_disabled`, a seccomp filter), as [`IoQueue::without_ring`], with a warning in the log.
    ///
    /// # Errors
    /// If the kernel refuses a ring for another reason, as ENOMEM under a memlock limit.
    pub fn new(depth: u32) -> Result<Self, IoError> {
        let depth = depth.clamp(1, DEPTH_MAX);
        Ok(Self { ring: ring(depth)?, ..Self::without_ring(depth) })
    }

    /// A queue that works by threads. Up to 16 requests run at once.
    pub fn without_ring(depth: u32) -> Self {
        let depth = depth.clamp(1, DEPTH_MAX) as usize;
        Self { ring: None, depth, parts: Vec::with_capacity(depth), again: Vec::with_capacity(depth) }
    }

    /// Whether an io_uring does the work (and not threads).
    pub fn is_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// The most requests in flight at once.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Writes every (index into `files`, offset, bytes). Durable after [`DirectFile::sync_data`] of each file.
    ///
    /// # Errors
    /// The first error that was seen, after all requests have ended. The batch is not issued at all if
    /// one of its members is past the end or misaligned (see [`DirectFile`]); after any other
    /// error, which of the writes took place is not known.
    pub fn write_batch(&mut self, files: &[&DirectFile], writes: &[(usize, u64, &[u8])]) -> Result<(), IoError> {
        self.parts.clear();
        for &(file, offset, bytes) in writes {
            self.plan(Verb::Write, files, file, offset, bytes.as_ptr().expose_provenance(), bytes.len())?;
        }
        if self.ring.is_none() {
            return fallback::write_batch(files, writes, self.depth);
        }
        self.run(Verb::Write, files)
    }

    /// Fills every buffer of (index into `files`, offset, buffer).
    ///
    /// # Errors
    /// As [`IoQueue::write_batch`]; the buffers' content is then undefined (but initialised).
    pub fn read_batch(&mut self, files: &[&DirectFile], reads: &mut [(usize, u64, &mut [u8])]) -> Result<(), IoError> {
        self.parts.clear();
        for (file, offset, buf) in reads.iter_mut() {
            let len = buf.len();
            self.plan(Verb::Read, files, *file, *offset, buf.as_mut_ptr().expose_provenance(), len)?;
        }
        if self.ring.is_none() {
            return fallback::read_batch(files, reads, self.depth);
        }
        self.run(Verb::Read, files)
    }

    fn plan(
        &mut self,
        verb: Verb,
        files: &[&DirectFile],
        index: usize,
        offset: u64,
        address: usize,
        len: usize,
    ) -> Result<(), IoError> {
        plan(verb, files, index, offset, address, len, |part| self.parts.push(part))
    }

    /// Issues `self.parts` and waits for all. The memory that they name must stay borrowed by the caller's
    /// caller for the whole call: only `write_batch` and `read_batch` call this, with their arguments alive.
    fn run(&mut self, verb: Verb, files: &[&DirectFile]) -> Result<(), IoError> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        self.again.clear();
        let mut run = Run {
            ring,
            parts: &mut self.parts,
            again: &mut self.again,
            depth: self.depth,
            next: 0,
            in_flight: 0,
            error: None,
        };
        loop {
            while run.error.is_none() && run.issue(verb) {}
            if run.in_flight == 0 {
                break;
            }
            enter(run.ring, run.in_flight);
            run.reap(verb, files);
        }
        let result = run.error.take().map_or(Ok(()), Err);
        drop(run);
        self.parts.clear();
        result
    }
}

/// One batch under way. Dropping it waits for every request that the kernel was given.
struct Run<'a> {
    ring: &'a mut IoUring,
    parts: &'a mut Vec<Part>,
    again: &'a mut Vec<usize>,
    depth: usize,
    next: usize,
    /// Requests that stand in the submission ring or in the kernel.
    in_flight: usize,
    error: Option<IoError>,
}

impl Run<'_> {
    /// Queues one more request; `false` if there is none or the depth is reached.
    fn issue(&mut self, verb: Verb) -> bool {
        if self.in_flight == self.depth {
            return false;
        }
        let index = match self.again.pop() {
            Some(index) => index,
            None if self.next < self.parts.len() => {
                self.next += 1;
                self.next - 1
            }
            None => return false,
        };
        let entry = entry(verb, &self.parts[index]).user_data(index as u64);
        // SAFETY: `entry` names bytes inside a slice that `write_batch` (shared) or `read_batch`
        // (exclusive) has borrowed until it ends (`plan` took address and length from the slice, `done` never
        // passes `bytes`). It ends only after `in_flight` is back at zero: `run` loops until then, and
        // `Drop` does if `run` unwinds. The descriptor is open as long: `files` is borrowed, too.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // The ring has at least `depth` entries and holds no more than `in_flight` of them.
        assert!(pushed.is_ok(), "the submission ring is full below its depth");
        self.in_flight += 1;
        true
    }

    /// Takes all completions that are there.
    fn reap(&mut self, verb: Verb, files: &[&DirectFile]) {
        loop {
            let Some(completion) = self.ring.completion().next() else { return };
            self.in_flight -= 1;
            let index = completion.user_data() as usize;
            let part = &mut self.parts[index];
            match part.settle(verb, files[part.file], completion.result()) {
                Ok(true) => {}
                Ok(false) => self.again.push(index),
                Err(error) => {
                    self.error.get_or_insert(error);
                }
            }
        }
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        // Only when `run` unwinds: else nothing is in flight. Queued entries that were not submitted
        // yet are submitted and waited for like the others; they cannot be taken back.
        while self.in_flight > 0 {
            enter(self.ring, self.in_flight);
            while self.ring.completion().next().is_some() {
                self.in_flight -= 1;
            }
        }
        self.parts.clear();
    }
}

fn entry(verb: Verb, part: &Part) -> squeue::Entry {
    let fd = types::Fd(part.fd);
    let address = part.address + part.done;
    // At most PART_BYTES_MAX, so it fits.
    let bytes = (part.bytes - part.done) as u32;
    let offset = part.offset + part.done as u64;
    match verb {
        Verb::Read => {
            opcode::Read::new(fd, std::ptr::with_exposed_provenance_mut(address), bytes).offset(offset).build()
        }
        Verb::Write => opcode::Write::new(fd, std::ptr::with_exposed_provenance(address), bytes).offset(offset).build(),
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::AlignedBuf;

    /// The early way out: what was handed to the ring, submitted or not, has ended when the guard is gone.
    #[test]
    fn unwinding_waits_for_what_is_in_flight() {
        let dir = tempfile::TempDir::new_in("/var/tmp").expect("dir");
        let file = DirectFile::create_new(dir.path().join("f"), 8 << 20, 0o600).expect("file");
        let mut data = AlignedBuf::new(8 << 20);
        data.fill(7);
        let mut queue = IoQueue::new(16).expect("ring");
        for submitted in [false, true] {
            for (n, piece) in data.chunks(1 << 20).enumerate() {
                let (address, offset) = (piece.as_ptr().expose_provenance(), (n << 20) as u64);
                queue.plan(Verb::Write, &[&file], 0, offset, address, piece.len()).expect("plan");
            }
            let IoQueue { ring, parts, again, depth } = &mut queue;
            let ring = ring.as_mut().expect("ring");
            let unwound = catch_unwind(AssertUnwindSafe(|| {
                let mut run = Run { ring, parts, again, depth: *depth, next: 0, in_flight: 0, error: None };
                while run.issue(Verb::Write) {}
                assert_eq!(run.in_flight, 8);
                if submitted {
                    run.ring.submit().expect("submit");
                }
                panic!("on purpose");
            }));
            assert!(unwound.is_err());
            let mut back = AlignedBuf::new(8 << 20);
            file.read_exact_at(&mut back, 0).expect("read");
            assert!(back[..] == data[..], "a write had not ended");
            data.fill(9);
        }
        // And the queue is as good as new.
        queue.write_batch(&[&file], &[(0, 0, &data[..4096])]).expect("batch");
    }
}
