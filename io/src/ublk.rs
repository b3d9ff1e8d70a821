//! A block device whose requests a process answers (`ublk_drv`): the kernel's side of it, as far as a server of this crate needs it.
//!
//! [`Device`] adds, starts, stops and deletes; [`Queue`] takes requests and gives answers, in the one thread that serves it;
//! [`Lane`] moves the bytes of a request, in any thread. Bytes are copied by reading and writing the device's own character
//! device (`UBLK_F_USER_COPY`), so that no address of this process is ever given to the kernel.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::libc;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::error::IoError;
use crate::sys;

/// All devices.
const CLASS: &str = "/sys/class/ublk-char";
/// Where devices are added and deleted.
pub const CONTROL: &str = "/dev/ublk-control";
/// Requests under way at once.
pub const DEPTH: u16 = 64;
/// Largest request.
pub const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// How long the nodes of a new device may take.
const NODE_TIMEOUT: Duration = Duration::from_secs(5);

/// `struct ublksrv_ctrl_cmd`.
const CTRL_BYTES: u32 = 32;
const fn command(dir: u32, number: u32, bytes: u32) -> u32 {
    dir << 30 | bytes << 16 | (b'u' as u32) << 8 | number
}
const GET_DEV_INFO: u32 = command(2, 0x02, CTRL_BYTES);
const ADD_DEV: u32 = command(3, 0x04, CTRL_BYTES);
const START_DEV: u32 = command(3, 0x06, CTRL_BYTES);
const STOP_DEV: u32 = command(3, 0x07, CTRL_BYTES);
const SET_PARAMS: u32 = command(3, 0x08, CTRL_BYTES);
const GET_FEATURES: u32 = command(2, 0x13, CTRL_BYTES);
const DEL_DEV_ASYNC: u32 = command(2, 0x14, CTRL_BYTES);
/// `struct ublksrv_io_cmd`.
const FETCH: u32 = command(3, 0x20, 16);
const COMMIT_AND_FETCH: u32 = command(3, 0x21, 16);

const IOCTL_ENCODE: u64 = 1 << 6;
const USER_COPY: u64 = 1 << 7;
const STATE_DEAD: u16 = 0;
/// `ublksrv_flags` in `struct ublksrv_ctrl_dev_info`: the server's own.
const MARK_AT: usize = 32;
/// `struct ublksrv_io_desc`: op and flags u32, sectors u32, first sector u64, an address that is of no use here.
const DESCRIPTOR_BYTES: usize = 24;
/// Where the bytes of requests begin in the character device; the tag stands above 25 bits.
const BYTES_AT: u64 = 0x8000_0000;
const TAG_SHIFT: u32 = 25;
/// How the kernel gives up a tag: `UBLK_IO_RES_ABORT`.
const GONE: i32 = -libc::ENODEV;
/// What the event's completion is told by.
const EVENT: u64 = u64::MAX;

const ATTR_READ_ONLY: u32 = 1;
const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
const PARAM_BASIC: u32 = 1;
const PARAM_DISCARD: u32 = 1 << 1;

/// What a device shall be.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Its size, a multiple of 512.
    pub bytes: u64,
    /// Whether the kernel refuses writes.
    pub read_only: bool,
    /// Whatever its server wants to know it by later: the kernel keeps it.
    pub mark: u64,
}

/// What is asked of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Give so many bytes.
    Read,
    /// Take so many bytes.
    Write,
    /// Make what was written durable.
    Flush,
    /// Read as zeroes from here on; the space may go.
    Discard,
    /// Read as zeroes from here on.
    Zero {
        /// The space may go.
        may_unmap: bool,
    },
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Names it until it is answered.
    pub tag: u16,
    /// What is asked; `None`: what this server does not know.
    pub op: Option<Op>,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub bytes: u32,
}

/// What the kernel says of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// [`Shape::mark`].
    pub mark: u64,
    /// Whether nobody serves it, not yet or not any more: it has no disk.
    pub is_dead: bool,
}

/// Room for what a command reads or writes.
const BUFFER_BYTES: usize = 64;

/// One command to the control device, waited for, by a ring of its own. The kernel reads and writes `buffer`.
fn ask(what: &'static str, number: u32, id: u32, buffer: &mut [u8], data: u64) -> Result<(), IoError> {
    let failed = |e| IoError::new(what, CONTROL, e);
    assert!(buffer.len() <= BUFFER_BYTES, "a buffer of {} bytes", buffer.len());
    let file = File::options().read(true).write(true).open(CONTROL).map_err(|e| IoError::new("open", CONTROL, e))?;
    let mut ring = IoUring::<squeue::Entry128, cqueue::Entry>::builder().build(1).map_err(failed)?;
    let mut memory = Box::new([0; BUFFER_BYTES]);
    memory[..buffer.len()].copy_from_slice(buffer);
    let mut bytes = [0; 80];
    bytes[..4].copy_from_slice(&id.to_ne_bytes());
    bytes[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(buffer.len() as u16).to_ne_bytes());
    bytes[8..16].copy_from_slice(&(memory.as_mut_ptr().expose_provenance() as u64).to_ne_bytes());
    bytes[16..24].copy_from_slice(&data.to_ne_bytes());
    let entry = opcode::UringCmd80::new(types::Fd(file.as_raw_fd()), number).cmd(bytes).build();
    // SAFETY: `memory` is on the heap, and nothing else refers to it before the command is complete: below, or never, and then it
    // is leaked. The file is open as long as the ring.
    unsafe { ring.submission().push(&entry) }.map_err(|e| failed(io::Error::other(e)))?;
    loop {
        if let Err(error) = wait(&mut ring, |ring| ring.submit_and_wait(1)) {
            std::mem::forget(memory);
            return Err(failed(error));
        }
        let done = ring.completion().next();
        match done.map(|done| done.result()) {
            None => {}
            Some(0..) => {
                buffer.copy_from_slice(&memory[..buffer.len()]);
                return Ok(());
            }
            Some(error) => return Err(failed(io::Error::from_raw_os_error(-error))),
        }
    }
}

/// What only passes by is waited out.
fn wait<R>(ring: &mut R, enter: impl Fn(&mut R) -> io::Result<usize>) -> io::Result<()> {
    match enter(ring) {
        Ok(_) => Ok(()),
        Err(e) => match e.raw_os_error() {
            Some(libc::EINTR) => Ok(()),
            Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => {
                std::thread::sleep(Duration::from_millis(1));
                Ok(())
            }
            _ => Err(e),
        },
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Whether this kernel has what is needed, loaded and for us. Before Linux 6.9 a device could only be deleted by waiting for
/// everybody who has it open.
pub fn is_offered() -> bool {
    let mut features = [0; 8];
    let asked = kernel() >= (6, 9) && ask("ask the features of", GET_FEATURES, u32::MAX, &mut features, 0).is_ok();
    let wanted = IOCTL_ENCODE | USER_COPY;
    asked && u64::from_ne_bytes(features) & wanted == wanted
}

fn kernel() -> (u32, u32) {
    let name = nix::sys::utsname::uname();
    let release = name.as_ref().ok().and_then(|name| name.release().to_str()).unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map(|word| word.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// What is known of device `id`.
///
/// # Errors
/// ENODEV if there is none.
pub fn info(id: u32) -> Result<Info, IoError> {
    let mut info = [0; BUFFER_BYTES];
    ask("ask of a device of", GET_DEV_INFO, id, &mut info, 0)?;
    let mark = u64::from_ne_bytes(std::array::from_fn(|index| info[MARK_AT + index]));
    Ok(Info { mark, is_dead: u16_at(&info, 4) == STATE_DEAD })
}

/// The numbers of all devices.
///
/// # Errors
/// If the list cannot be read.
pub fn ids() -> Result<Vec<u32>, IoError> {
    let failed = |e| IoError::new("list", CLASS, e);
    let entries = match std::fs::read_dir(CLASS) {
        // The driver is not there.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let id = |name: std::ffi::OsString| name.to_str()?.strip_prefix("ublkc")?.parse().ok();
    Ok(entries.filter_map(|entry| id(entry.ok()?.file_name())).collect())
}

/// Deletes a device, at once: it ends when nobody has it open any more.
///
/// # Errors
/// If the kernel refuses.
pub fn delete(id: u32) -> Result<(), IoError> {
    ask("delete a device of", DEL_DEV_ASYNC, id, &mut [], 0)
}

/// A device of this process. Its disk is there from [`Device::start`] to [`Device::stop`]; dropped, it is deleted.
#[derive(Debug)]
pub struct Device {
    id: u32,
    lane: Option<Lane>,
}

impl Device {
    /// Adds a device of one queue. Its disk is not there yet.
    ///
    /// # Errors
    /// If the kernel refuses a step, or its nodes do not appear.
    pub fn add(shape: Shape) -> Result<Self, IoError> {
        let mut info = [0; BUFFER_BYTES];
        info[..2].copy_from_slice(&1_u16.to_ne_bytes());
        info[2..4].copy_from_slice(&DEPTH.to_ne_bytes());
        info[8..12].copy_from_slice(&REQUEST_BYTES_MAX.to_ne_bytes());
        info[12..16].copy_from_slice(&u32::MAX.to_ne_bytes());
        info[16..20].copy_from_slice(&std::process::id().to_ne_bytes());
        info[24..32].copy_from_slice(&(IOCTL_ENCODE | USER_COPY).to_ne_bytes());
        info[MARK_AT..][..8].copy_from_slice(&shape.mark.to_ne_bytes());
        ask("add a device to", ADD_DEV, u32::MAX, &mut info, 0)?;
        let mut device = Self { id: u32_at(&info, 12), lane: None };
        device.lane = Some(Self::open(device.id, shape, u16_at(&info, 2))?);
        Ok(device)
    }

    fn open(id: u32, shape: Shape, depth: u16) -> Result<Lane, IoError> {
        let path = PathBuf::from(format!("/dev/ublkc{id}"));
        if depth != DEPTH {
            let why = format!("{depth} requests instead of {DEPTH}");
            return Err(IoError::refused("serve", path, io::ErrorKind::Unsupported, why));
        }
        ask("shape a device of", SET_PARAMS, id, &mut params(shape), 0)?;
        let begin = Instant::now();
        loop {
            match File::options().read(true).write(true).open(&path) {
                Ok(file) => return Ok(Lane { file: Arc::new(file) }),
                Err(e) if e.kind() == io::ErrorKind::NotFound && begin.elapsed() < NODE_TIMEOUT => {
                    std::thread::sleep(Duration::from_millis(1).max(begin.elapsed() / 8));
                }
                Err(e) => return Err(IoError::new("open", path, e)),
            }
        }
    }

    /// The kernel's number for it.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The disk's node.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkb{}", self.id))
    }

    /// Nothing of it holds the device open any more: newer kernels give up what a dead queue owes only then.
    pub fn close(&mut self) {
        self.lane = None;
    }

    /// For the bytes of its requests.
    pub fn lane(&self) -> Option<Lane> {
        self.lane.clone()
    }

    /// Makes the disk. A queue must be fetching: this waits for it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn start(&mut self) -> Result<(), IoError> {
        ask("start a device of", START_DEV, self.id, &mut [], u64::from(std::process::id()))
    }

    /// Takes the disk away: who has it open reads its end from here on, and cannot write. Waits until all that is asked is
    /// answered: the queue must be served until it ends, and quickly: if the process is killed meanwhile, nobody answers any more, and the
    /// kernel's thread that waits keeps the process.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn stop(&mut self) -> Result<(), IoError> {
        ask("stop a device of", STOP_DEV, self.id, &mut [], 0)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.lane = None;
        // It ends when the last lane is closed.
        let _ = delete(self.id);
    }
}

/// `struct ublk_params`, with what a disk in blocks of 512 bytes has that likes 4096.
fn params(shape: Shape) -> [u8; 60] {
    let mut out = [0; 60];
    let attributes = if shape.read_only { ATTR_READ_ONLY } else { ATTR_VOLATILE_CACHE };
    // As much at once as the kernel can say in whole 4096 bytes.
    let most = (u32::MAX >> 9) & !7;
    let words: [(usize, u32); 8] = [
        (0, 60),
        (4, PARAM_BASIC | if shape.read_only { 0 } else { PARAM_DISCARD }),
        (8, attributes),
        (12, u32::from_ne_bytes([9, 12, 12, 12])),
        (16, REQUEST_BYTES_MAX >> 9),
        (44, 4096),
        (48, most),
        (52, most),
    ];
    for (at, word) in words {
        out[at..at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    out[24..32].copy_from_slice(&(shape.bytes >> 9).to_ne_bytes());
    out[56..58].copy_from_slice(&1_u16.to_ne_bytes());
    out
}

/// The way of the bytes of requests.
#[derive(Clone, Debug)]
pub struct Lane {
    file: Arc<File>,
}

impl Lane {
    /// Gives a read its bytes.
    ///
    /// # Errors
    /// If the kernel does not take them.
    pub fn give(&self, request: &Request, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, place_of(request))
    }

    /// Takes the bytes of a write.
    ///
    /// # Errors
    /// If the kernel does not give them.
    pub fn take(&self, request: &Request, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, place_of(request))
    }
}

fn place_of(request: &Request) -> u64 {
    BYTES_AT + (u64::from(request.tag) << TAG_SHIFT)
}

/// Answers that no queue has taken yet.
#[derive(Debug)]
pub struct Answers {
    waiting: Mutex<Vec<(u16, i32)>>,
    event: EventFd,
}

impl Answers {
    /// None.
    ///
    /// # Errors
    /// If there is no event to be had.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { waiting: Mutex::default(), event })
    }

    /// Answers a request: bytes read or written, 0 for the others, or an errno below zero.
    pub fn push(&self, tag: u16, result: i32) {
        let first = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.push((tag, result));
            waiting.len() == 1
        };
        if first {
            // It can only fail by being full, and then it wakes as well.
            let _ = self.event.write(1);
        }
    }

    fn swap(&self, into: &mut Vec<(u16, i32)>) {
        into.clear();
        std::mem::swap(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner), into);
    }
}

/// The descriptors of a queue, in memory that the kernel writes.
struct Descriptors {
    at: NonNull<libc::c_void>,
    bytes: NonZeroUsize,
}

impl Descriptors {
    fn map(file: &File) -> io::Result<Self> {
        let bytes = (usize::from(DEPTH) * DESCRIPTOR_BYTES).next_multiple_of(crate::PAGE_BYTES);
        let bytes = NonZeroUsize::new(bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing else is changed.
        let at = unsafe { mmap(None, bytes, ProtFlags::PROT_READ, flags, file.as_fd(), 0) }?;
        Ok(Self { at, bytes })
    }

    /// That of a request which was delivered and not answered: the kernel does not change it meanwhile.
    fn get(&self, tag: u16) -> [u8; DESCRIPTOR_BYTES] {
        assert!(tag < DEPTH, "tag {tag}");
        // SAFETY: inside the mapping (asserted), which lives as long as `self`; bytes of any value are fine.
        unsafe { self.at.byte_add(usize::from(tag) * DESCRIPTOR_BYTES).cast().read_unaligned() }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made; nothing refers to it.
        let _ = unsafe { munmap(self.at, self.bytes.get()) };
    }
}

/// The requests of a device. The kernel wants all of it from one thread: make it there. That thread goes on without
/// CAP_SYS_ADMIN: of a server that has it the kernel reads partitions while it makes the disk, and if the process is killed just
/// then, nobody answers any more, and the kernel's thread that waits keeps the process.
pub struct Queue {
    ring: IoUring,
    lane: Lane,
    answers: Arc<Answers>,
    descriptors: Descriptors,
    /// Tags that the kernel has not given up.
    alive: u16,
    /// Where the event is read to: it belongs to the queue, and outlives the ring's use of it.
    counter: Box<u64>,
    /// The ring has been given `counter`.
    is_listening: bool,
    taken: Vec<(u16, i32)>,
}

impl Queue {
    /// Fetches: the device may be started from here on.
    ///
    /// # Errors
    /// If the kernel refuses a step.
    pub fn new(lane: Lane, answers: Arc<Answers>) -> Result<Self, IoError> {
        let failed = |e| IoError::new("serve a device of", Path::new(CONTROL), e);
        sys::put_down_sys_admin().map_err(failed)?;
        let descriptors = Descriptors::map(&lane.file).map_err(failed)?;
        let ring = IoUring::new(u32::from(DEPTH) * 2).map_err(failed)?;
        let (counter, taken) = (Box::new(0), Vec::new());
        let mut queue = Self { ring, lane, answers, descriptors, alive: DEPTH, counter, is_listening: false, taken };
        (0..DEPTH).try_for_each(|tag| queue.command(FETCH, tag, 0)).map_err(failed)?;
        queue.listen().map_err(failed)?;
        queue.ring.submit().map_err(failed)?;
        let refused = queue.ring.completion().next().map(|refused| refused.result());
        match refused {
            None => Ok(queue),
            Some(result) => Err(failed(io::Error::from_raw_os_error(-result.min(-1)))),
        }
    }

    fn command(&mut self, number: u32, tag: u16, result: i32) -> io::Result<()> {
        let mut bytes = [0; 16];
        bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
        bytes[4..8].copy_from_slice(&result.to_ne_bytes());
        let file = types::Fd(self.lane.file.as_raw_fd());
        let entry = opcode::UringCmd16::new(file, number).cmd(bytes).build().user_data(u64::from(tag));
        // SAFETY: the command names no memory of ours; the file is open as long as the ring.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)
    }

    fn listen(&mut self) -> io::Result<()> {
        let event = types::Fd(self.answers.event.as_fd().as_raw_fd());
        let to = (&raw mut *self.counter).cast();
        let entry = opcode::Read::new(event, to, 8).build().user_data(EVENT);
        // SAFETY: `counter` is on the heap and lives until the ring is closed, which `Drop` sees to; one read at a time.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
        self.is_listening = true;
        Ok(())
    }

    /// Hands over answers, waits, and gives what is asked for next. `false`: the device was stopped, and nothing will be asked
    /// any more.
    ///
    /// # Errors
    /// If the ring fails: then the device is dead.
    pub fn next(&mut self, requests: &mut Vec<Request>) -> Result<bool, IoError> {
        let failed = |e| IoError::new("serve a device of", Path::new(CONTROL), e);
        requests.clear();
        let mut taken = std::mem::take(&mut self.taken);
        self.answers.swap(&mut taken);
        for (tag, result) in &taken {
            self.command(COMMIT_AND_FETCH, *tag, *result).map_err(failed)?;
        }
        self.taken = taken;
        wait(&mut self.ring, |ring| ring.submit_and_wait(1)).map_err(failed)?;
        for done in self.ring.completion() {
            match (done.user_data(), done.result()) {
                (EVENT, _) => self.is_listening = false,
                (tag, 0) => {
                    let tag = tag as u16;
                    requests.push(request(tag, &self.descriptors.get(tag)));
                }
                (_, GONE) => self.alive -= 1,
                // Its request would never be answered.
                (_, error) => return Err(failed(io::Error::from_raw_os_error(-error))),
            }
        }
        if !self.is_listening {
            self.listen().map_err(failed)?;
        }
        Ok(self.alive > 0)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // The read of the event ends before its memory goes: it is woken once, and waited for.
        let _ = self.answers.event.write(1);
        while self.is_listening {
            if wait(&mut self.ring, |ring| ring.submit_and_wait(1)).is_err() {
                break;
            }
            self.is_listening = !self.ring.completion().any(|done| done.user_data() == EVENT);
        }
        if self.is_listening {
            // Rather a leak of eight bytes than a write of the kernel to memory of somebody else.
            std::mem::forget(std::mem::take(&mut self.counter));
        }
    }
}

fn request(tag: u16, descriptor: &[u8; DESCRIPTOR_BYTES]) -> Request {
    let (word, sectors) = (u32_at(descriptor, 0), u32_at(descriptor, 4));
    let no_unmap = word & 1 << 15 != 0;
    let op = match word & 0xff {
        0 => Some(Op::Read),
        1 => Some(Op::Write),
        2 => Some(Op::Flush),
        3 => Some(Op::Discard),
        5 => Some(Op::Zero { may_unmap: !no_unmap }),
        _ => None,
    };
    let first = u64::from_ne_bytes(std::array::from_fn(|index| descriptor[8 + index]));
    Request { tag, op, offset: first << 9, bytes: sectors.saturating_mul(512) }
}
