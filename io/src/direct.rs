//! One file or block device, read and written past the page cache.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use nix::libc;

use crate::error::IoError;
use crate::{PAGE_BYTES, sys};

/// What direct I/O on a file demands, in bytes. 1 and 1 where I/O is buffered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DioAlign {
    /// Of a buffer's address.
    pub memory: u32,
    /// Of an offset and of a length.
    pub offset: u32,
}

/// A regular file or block device opened for direct I/O.
///
/// Two descriptors stand behind it. One is O_DIRECT and serves everything up to the last whole page. The
/// bytes after it (a size that is no multiple of 4096 has such a *tail*) always go through a second,
/// buffered one: O_DIRECT can neither write half a block nor read past the end in a defined way, and mixing both
/// on one block would race with write-back. [`DirectFile::sync_data`] makes both durable.
///
/// Offsets and lengths below the tail must be multiples of [`DioAlign::offset`], buffers lie at
/// multiples of [`DioAlign::memory`]; in the tail anything goes. Nothing is read or written past
/// [`DirectFile::len`]. What is read after opening for writing is what the disk has or will get: nothing that only the page
/// cache kept of a write that failed ([`crate::crashsafe::read_back`]). Where the file system has no O_DIRECT, all I/O is buffered and any alignment goes
/// ([`DirectFile::is_direct`] says which); durability is then still by `sync_data`.
///
/// All methods take `&self` and may be called from several threads; ranges that overlap are the callers' concern.
#[derive(Debug)]
pub struct DirectFile {
    path: PathBuf,
    main: File,
    buffered: File,
    is_direct: bool,
    is_block: bool,
    align: DioAlign,
    len: AtomicU64,
    /// errno of the first failed sync, 0 if none failed.
    sync_errno: AtomicI32,
}

/// How a request divides: this many bytes by the main descriptor, the rest by the buffered one.
pub(crate) struct Route {
    pub(crate) head: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    ReadWrite,
    ReadWriteExclusive,
}

impl DirectFile {
    /// Opens a file or block device for reading.
    ///
    /// # Errors
    /// If it is missing, neither file nor block device, or cannot be opened.
    pub fn open_read(path: impl AsRef<Path>) -> Result<Self, IoError> {
        Self::open(path.as_ref(), Access::Read)
    }

    /// Opens a file or block device for reading and writing.
    ///
    /// # Errors
    /// As [`DirectFile::open_read`].
    pub fn open_rw(path: impl AsRef<Path>) -> Result<Self, IoError> {
        Self::open(path.as_ref(), Access::ReadWrite)
    }

    /// As [`DirectFile::open_rw`], and claims it. A block device by O_EXCL: it fails with EBUSY ([`IoError::is_busy`])
    /// while the device is mounted, swapped on, held by dm or md, or claimed, and none of these can begin while
    /// this is open. A regular file by `flock`: it fails (`is_busy` as well) while somebody else has claimed it so, in
    /// this process or another; who does not ask is not kept out. A claim ends with the process, however that ends.
    ///
    /// # Errors
    /// As [`DirectFile::open_read`], and EBUSY or `WouldBlock`.
    pub fn open_rw_exclusive(path: impl AsRef<Path>) -> Result<Self, IoError> {
        Self::open(path.as_ref(), Access::ReadWriteExclusive)
    }

    /// Creates a regular file of `len` bytes, all hole, and opens it for reading and writing. The name is
    /// durable only after [`crate::crashsafe::fsync_dir`].
    ///
    /// # Errors
    /// If it exists, or cannot be created or sized.
    pub fn create_new(path: impl AsRef<Path>, len: u64, mode: u32) -> Result<Self, IoError> {
        let path = path.as_ref();
        let mut options = OpenOptions::new();
        let file =
            options.write(true).create_new(true).mode(mode).open(path).map_err(|e| IoError::new("create", path, e))?;
        file.set_len(len).map_err(|e| IoError::new(format!("size to {len} bytes"), path, e))?;
        Self::open_rw(path)
    }

    fn open(path: &Path, access: Access) -> Result<Self, IoError> {
        let fail = |e: io::Error| IoError::new("open", path, e);
        // Before opening: to open a FIFO would wait for its other end.
        let kind = std::fs::metadata(path).map_err(fail)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let why = "it is neither a regular file nor a block device";
            return Err(IoError::refused("open", path, io::ErrorKind::InvalidInput, why));
        }
        let is_block = kind.is_block_device();
        let exclusive = is_block && access == Access::ReadWriteExclusive;
        let open = |direct: bool| {
            let flags = if direct { libc::O_DIRECT } else { 0 } | if exclusive { libc::O_EXCL } else { 0 };
            OpenOptions::new().read(true).write(access != Access::Read).custom_flags(flags).open(path)
        };
        let (main, direct) = match open(true) {
            Ok(file) => (file, true),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => (open(false).map_err(fail)?, false),
            Err(e) => return Err(fail(e)),
        };
        let opened = main.metadata().map_err(fail)?;
        if opened.file_type() != kind {
            let why = "it was replaced while it was being opened";
            return Err(IoError::refused("open", path, io::ErrorKind::InvalidInput, why));
        }
        if !is_block && access == Access::ReadWriteExclusive {
            lock(&main, path, &opened)?;
        }
        // Through /proc and not by path: certainly the same inode.
        let buffered = OpenOptions::new()
            .read(true)
            .write(access != Access::Read)
            .open(format!("/proc/self/fd/{}", main.as_raw_fd()))
            .map_err(|e| IoError::new("open a second descriptor of", path, e))?;
        let align = if direct { dio_align(&main, &opened, is_block).map_err(fail)? } else { None };
        let len = current_len(&main, is_block).map_err(fail)?;
        let buffers_some =
            align.is_none_or(|align| !len.is_multiple_of(u64::from(align.offset).max(PAGE_BYTES as u64)));
        if access != Access::Read && buffers_some {
            crate::crashsafe::forget_cached(&buffered);
        }
        let (main, is_direct) = match align {
            Some(_) => (main, true),
            // Opened with O_DIRECT, but statx says that no alignment would do. Not opened anew, since
            // that would give up the O_EXCL claim for a moment.
            None => (if direct { without_direct(main).map_err(fail)? } else { main }, false),
        };
        let align = align.unwrap_or(DioAlign { memory: 1, offset: 1 });
        Ok(Self {
            path: path.to_path_buf(),
            main,
            buffered,
            is_direct,
            is_block,
            align,
            len: AtomicU64::new(len),
            sync_errno: AtomicI32::new(0),
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether I/O goes past the page cache.
    pub fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        self.is_block
    }

    /// What buffers, offsets and lengths must be multiples of.
    pub fn align(&self) -> DioAlign {
        self.align
    }

    /// The size in bytes (of a device: its whole logical sectors), as of the opening or of the last [`DirectFile::refresh_len`] or
    /// [`DirectFile::set_len`].
    #[expect(clippy::len_without_is_empty, reason = "a size in bytes, not a collection")]
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Asks for the size again, after somebody resized the file or device; gives it in bytes.
    ///
    /// # Errors
    /// If it cannot be asked, or the old tail cannot be synced.
    pub fn refresh_len(&self) -> Result<u64, IoError> {
        let new = current_len(&self.main, self.is_block).map_err(|e| IoError::new("ask the size of", &self.path, e))?;
        self.move_len(new)?;
        Ok(new)
    }

    /// Resizes a regular file; new bytes are holes. The size is durable after `sync_data`.
    ///
    /// # Errors
    /// If the kernel refuses it (a block device: EINVAL), or the old tail cannot be synced.
    pub fn set_len(&self, len: u64) -> Result<(), IoError> {
        self.buffered.set_len(len).map_err(|e| IoError::new(format!("resize to {len} bytes"), &self.path, e))?;
        self.move_len(len)
    }

    /// Dates a regular file's last change.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub fn set_modified(&self, time: std::time::SystemTime) -> Result<(), IoError> {
        self.buffered.set_modified(time).map_err(|e| IoError::new("set the time of", &self.path, e))
    }

    fn move_len(&self, new: u64) -> Result<(), IoError> {
        let old = self.len();
        // The old tail may now be served directly: nothing of it may wait in the page cache.
        if new != old && self.tail_start(old) < old {
            self.sync_data()?;
        }
        self.len.store(new, Ordering::Release);
        Ok(())
    }

    /// Where the part served by the buffered descriptor begins, for a size of `len`.
    fn tail_start(&self, len: u64) -> u64 {
        if !self.is_direct {
            return len;
        }
        let unit = u64::from(self.align.offset).max(PAGE_BYTES as u64);
        len - len % unit
    }

    /// Checks a request against size and alignment and divides it at the tail.
    pub(crate) fn route(&self, verb: &str, address: usize, len: usize, offset: u64) -> Result<Route, IoError> {
        let refuse = |kind, why: String| {
            Err(IoError::refused(format!("{verb} {len} bytes at {offset} of"), &self.path, kind, why))
        };
        let file_len = self.len();
        if offset.checked_add(len as u64).is_none_or(|end| end > file_len) {
            return refuse(io::ErrorKind::UnexpectedEof, format!("it ends at {file_len}"));
        }
        let below_tail = self.tail_start(file_len).saturating_sub(offset);
        let head = usize::try_from(below_tail).map_or(len, |below| below.min(len));
        let DioAlign { memory, offset: unit } = self.align;
        if head > 0 && !(offset.is_multiple_of(u64::from(unit)) && head.is_multiple_of(unit as usize)) {
            let why = format!("direct I/O here needs offset and length in multiples of {unit} bytes");
            return refuse(io::ErrorKind::InvalidInput, why);
        }
        if head > 0 && !address.is_multiple_of(memory as usize) {
            let why = format!("direct I/O here needs memory aligned to {memory} bytes, this is at {address:#x}");
            return refuse(io::ErrorKind::InvalidInput, why);
        }
        Ok(Route { head })
    }

    /// The descriptor for the tail (`true`) or for everything below it.
    pub(crate) fn fd(&self, tail: bool) -> BorrowedFd<'_> {
        self.file(tail).as_fd()
    }

    fn file(&self, tail: bool) -> &File {
        if tail { &self.buffered } else { &self.main }
    }

    /// By how much a short transfer may be continued.
    pub(crate) fn unit(&self, tail: bool) -> usize {
        if tail { 1 } else { self.align.offset as usize }
    }

    /// The buffered descriptor, for steps that the page cache must know of.
    pub(crate) fn buffered(&self) -> &File {
        &self.buffered
    }

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// Past the end: kind `UnexpectedEof`; misaligned: kind `InvalidInput`; else the kernel's errno.
    pub fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), IoError> {
        let Route { head } = self.route("read", buf.as_ptr().addr(), buf.len(), offset)?;
        let (direct, tail) = buf.split_at_mut(head);
        self.read_part(false, direct, offset)?;
        self.read_part(true, tail, offset + head as u64)
    }

    fn read_part(&self, tail: bool, buf: &mut [u8], offset: u64) -> Result<(), IoError> {
        let unit = self.unit(tail);
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            match self.file(tail).read_at(&mut buf[done..], at) {
                // Progress in whole units, or the end is there: a loop on it would never end.
                Ok(n) if n >= unit => done += n - n % unit,
                Ok(n) => return Err(self.short("read", buf.len() - done, at, n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed("read", buf.len() - done, at, e)),
            }
        }
        Ok(())
    }

    /// Writes all of `buf` from `offset` on. Durable after [`DirectFile::sync_data`].
    ///
    /// # Errors
    /// As [`DirectFile::read_exact_at`]; what was written before the error is not told.
    pub fn write_all_at(&self, buf: &[u8], offset: u64) -> Result<(), IoError> {
        let Route { head } = self.route("write", buf.as_ptr().addr(), buf.len(), offset)?;
        let write = |file: &File, bytes: &[u8], at| file.write_at(bytes, at);
        self.write_part(false, &buf[..head], offset, write)?;
        self.write_part(true, &buf[head..], offset + head as u64, write)
    }

    /// Writes all of `buf` from `offset` on; durable (data and what is needed to find it) on return.
    /// One system call per part, which on a device with FUA is cheaper than a write and a sync.
    ///
    /// # Errors
    /// As [`DirectFile::write_all_at`].
    pub fn write_all_at_durable(&self, buf: &[u8], offset: u64) -> Result<(), IoError> {
        self.sync_still_trusted()?;
        let Route { head } = self.route("write", buf.as_ptr().addr(), buf.len(), offset)?;
        for (tail, part, at) in [(false, &buf[..head], offset), (true, &buf[head..], offset + head as u64)] {
            let written = self.write_part(tail, part, at, sys::pwrite_dsync);
            match written {
                Err(e) if matches!(e.errno(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                    self.write_part(tail, part, at, |file, bytes, at| file.write_at(bytes, at))?;
                    self.sync_data()?;
                }
                Err(e) => {
                    if tail || !self.is_direct {
                        // The kernel has told this descriptor of the write-back error and will not again.
                        self.distrust_sync(&e);
                    }
                    return Err(e);
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn write_part(
        &self,
        tail: bool,
        buf: &[u8],
        offset: u64,
        write: impl Fn(&File, &[u8], u64) -> io::Result<usize>,
    ) -> Result<(), IoError> {
        let unit = self.unit(tail);
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            match write(self.file(tail), &buf[done..], at) {
                Ok(n) if n >= unit => done += n - n % unit,
                Ok(n) => return Err(self.short("write", buf.len() - done, at, n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed("write", buf.len() - done, at, e)),
            }
        }
        Ok(())
    }

    /// What the page cache holds of it is written. Its own cache is not flushed, which on a block device would be one more request
    /// that capture sees.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn write_back(&self) -> Result<(), IoError> {
        sys::write_back(&self.buffered).map_err(|e| IoError::new("write back", &self.path, e))
    }

    /// Makes everything written before durable, tail and size included.
    ///
    /// Once it has failed it fails for ever: the kernel reports a write-back error once and then
    /// calls the lost pages clean, so a second sync that succeeds would mean nothing. Open the file anew and
    /// write again what was not acknowledged.
    ///
    /// # Errors
    /// The errno of this or of the first failed sync.
    pub fn sync_data(&self) -> Result<(), IoError> {
        self.sync_still_trusted()?;
        // One descriptor is enough: pages belong to the inode, and each descriptor is told of every error since its opening.
        self.main.sync_data().map_err(|e| {
            let error = IoError::new("sync", &self.path, e);
            self.distrust_sync(&error);
            error
        })
    }

    fn sync_still_trusted(&self) -> Result<(), IoError> {
        match self.sync_errno.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(IoError::new(
                "sync (failed before, so data may be lost)",
                &self.path,
                io::Error::from_raw_os_error(errno),
            )),
        }
    }

    fn distrust_sync(&self, error: &IoError) {
        self.sync_errno.store(error.errno().unwrap_or(libc::EIO), Ordering::Release);
    }

    pub(crate) fn short(&self, verb: &str, len: usize, offset: u64, got: usize) -> IoError {
        let kind = if verb == "read" { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::WriteZero };
        let why = format!("the kernel stopped after {got} bytes; the size was {} when asked last", self.len());
        IoError::refused(format!("{verb} {len} bytes at {offset} of"), &self.path, kind, why)
    }

    pub(crate) fn failed(&self, verb: &str, len: usize, offset: u64, error: io::Error) -> IoError {
        IoError::new(format!("{verb} {len} bytes at {offset} of"), &self.path, error)
    }
}

impl AsFd for DirectFile {
    /// The main (direct) descriptor, for calls that this crate does not have.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.main.as_fd()
    }
}

/// Held by the descriptor, which outlives every use of the file.
fn lock(file: &File, path: &Path, meta: &std::fs::Metadata) -> Result<(), IoError> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            let why = format!("{} has claimed it", lock_holder(meta));
            Err(IoError::refused("claim", path, io::ErrorKind::WouldBlock, why))
        }
        Err(TryLockError::Error(e)) => Err(IoError::new("claim", path, e)),
    }
}

/// "process 1234 (varve-receiver)", as far as it can be told.
fn lock_holder(meta: &std::fs::Metadata) -> String {
    let (major, minor) = (libc::major(meta.dev()), libc::minor(meta.dev()));
    let wanted = format!("{major:02x}:{minor:02x}:{}", meta.ino());
    // "3: FLOCK  ADVISORY  WRITE 1234 fe:01:5678 0 EOF"
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let held = locks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let pid = held.into_iter().find_map(|words| match words[..] {
        [_, "FLOCK", _, _, pid, place, ..] if place == wanted => Some(pid.to_owned()),
        _ => None,
    });
    let Some(pid) = pid else { return "somebody".to_owned() };
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("process {pid} ({})", name.trim()),
        Err(_) => format!("process {pid}"),
    }
}

fn current_len(file: &File, is_block: bool) -> io::Result<u64> {
    if !is_block {
        return Ok(file.metadata()?.len());
    }
    // A device whose size is no multiple of its sector has an end that nobody can read or write (EIO).
    let sector = u64::from(sys::logical_block_bytes(file)?.max(1));
    let bytes = sys::block_bytes(file)?;
    Ok(bytes - bytes % sector)
}

/// The alignment for direct I/O, `None` if the file cannot do it.
fn dio_align(file: &File, stat: &std::fs::Metadata, is_block: bool) -> io::Result<Option<DioAlign>> {
    match sys::dio_align(file)? {
        Some((0, _) | (_, 0)) => return Ok(None),
        Some((memory, offset)) => return Ok(Some(DioAlign { memory, offset })),
        None => {}
    }
    // Kernels before 6.1, and file systems that do not tell: the sector of the device below is enough
    // everywhere; a page where even that is unknown.
    let sector = if is_block {
        sys::logical_block_bytes(file)?
    } else {
        crate::blockdev::logical_block_bytes_of_dev(stat.dev()).unwrap_or(PAGE_BYTES as u32)
    };
    Ok(Some(DioAlign { memory: sector, offset: sector }))
}

fn without_direct(file: File) -> io::Result<File> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(flags - OFlag::O_DIRECT))?;
    Ok(file)
}
