//! The FUSE file: one directory, one file in it, which is the disk.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, Request, WriteFlags,
};
use nix::libc;
use varve_io::{AlignedBuf, PAGE_BYTES};

use crate::disk::Disk;
use crate::limits::{FUSE_BACKGROUND_MAX, FUSE_REQUEST_BYTES_MAX};

const ROOT_INODE: INodeNo = INodeNo(1);
const FILE_INODE: INodeNo = INodeNo(2);
/// Nothing about the file ever changes, so the kernel need not ask again.
const FOR_EVER: Duration = Duration::from_secs(3600);

pub(super) struct OneFile {
    disk: Arc<dyn Disk>,
    name: String,
    read_only: bool,
}

impl OneFile {
    /// `name` is the file's in its mount.
    pub(super) fn new(disk: Arc<dyn Disk>, name: String, read_only: bool) -> Self {
        Self { disk, name, read_only }
    }

    fn attr(&self, ino: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match ino {
            ROOT_INODE => (FileType::Directory, 0o500, 0),
            FILE_INODE => (FileType::RegularFile, if self.read_only { 0o400 } else { 0o600 }, self.disk.len()),
            _ => return None,
        };
        let then = SystemTime::UNIX_EPOCH;
        Some(FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: then,
            mtime: then,
            ctime: then,
            crtime: then,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    /// The part of a range that is on the disk.
    fn clip(&self, offset: u64, len: u64) -> u64 {
        self.disk.len().saturating_sub(offset).min(len)
    }

    fn zero(&self, offset: u64, len: u64, mode: i32) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        let may_unmap = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            libc::FALLOC_FL_PUNCH_HOLE => true,
            libc::FALLOC_FL_ZERO_RANGE => false,
            _ => return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        };
        match self.clip(offset, len) {
            0 => Ok(()),
            len => self.disk.zero(offset, len, may_unmap),
        }
    }

    /// `lseek` for SEEK_DATA (`hole` false) and SEEK_HOLE. The end counts as a hole.
    fn seek(&self, from: u64, hole: bool) -> io::Result<u64> {
        let len = self.disk.len();
        if from >= len {
            return Err(io::Error::from_raw_os_error(libc::ENXIO));
        }
        let mut at = from;
        while at < len {
            let stretch = self.disk.stretch(at, len - at)?;
            if stretch.hole == hole {
                return Ok(at);
            }
            if stretch.len == 0 {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            at = at.saturating_add(stretch.len);
        }
        if hole { Ok(len) } else { Err(io::Error::from_raw_os_error(libc::ENXIO)) }
    }
}

/// What a disk does, with a panic in it turned into EIO: a thread of the session that ended would be missed by the next
/// request.
fn guarded<T>(step: impl FnOnce() -> io::Result<T>) -> Result<T, Errno> {
    match catch_unwind(AssertUnwindSafe(step)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(Errno::from_i32(e.raw_os_error().unwrap_or(libc::EIO))),
        Err(_) => {
            tracing::error!("a disk's call panicked; its reader gets EIO");
            Err(Errno::EIO)
        }
    }
}

thread_local! {
    /// Page-aligned, so that a disk can give it to O_DIRECT as it is. One per thread of a session, kept.
    static BUFFER: RefCell<Option<AlignedBuf>> = const { RefCell::new(None) };
}

fn with_buffer<T>(bytes: usize, fill: impl FnOnce(&mut [u8]) -> T) -> T {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.as_ref().is_none_or(|b| b.len() < bytes) {
            *buffer = Some(AlignedBuf::new(bytes.max(1).next_multiple_of(PAGE_BYTES)));
        }
        match buffer {
            Some(buffer) => fill(&mut buffer[..bytes]),
            None => fill(&mut []),
        }
    })
}

impl Filesystem for OneFile {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without it each direct request of the loop device waits for the one before.
        if config.add_capabilities(InitFlags::FUSE_ASYNC_DIO).is_err() {
            tracing::warn!("this kernel's FUSE has no asynchronous direct I/O; the device will be slow");
        }
        // These can only be refused for being zero or above the crate's own maximum.
        let _ = config.set_max_write(FUSE_REQUEST_BYTES_MAX);
        let _ = config.set_max_background(FUSE_BACKGROUND_MAX);
        let _ = config.set_congestion_threshold(FUSE_BACKGROUND_MAX);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attr(FILE_INODE) {
            Some(attr) if parent == ROOT_INODE && *name == *self.name => reply.entry(&FOR_EVER, &attr, Generation(0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino) {
            Some(attr) => reply.attr(&FOR_EVER, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if ino != FILE_INODE {
            return reply.error(Errno::EISDIR);
        }
        if self.read_only && flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        // No page cache below the loop device: the one above it is enough, and the disk has its own.
        let direct = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(0), direct | FopenFlags::FOPEN_NOFLUSH);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        // The kernel does not ask for more; a wrong one would only allocate.
        let len = self.clip(offset, u64::from(size.min(FUSE_REQUEST_BYTES_MAX))) as usize;
        with_buffer(len, |buffer| match guarded(|| self.disk.read_at(buffer, offset)) {
            Ok(()) => reply.data(buffer),
            Err(e) => reply.error(e),
        });
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let len = self.clip(offset, data.len() as u64) as usize;
        if self.read_only {
            return reply.error(Errno::EROFS);
        }
        if len == 0 && !data.is_empty() {
            return reply.error(Errno::ENOSPC);
        }
        match guarded(|| self.disk.write_at(&data[..len], offset)) {
            Ok(()) => reply.written(len as u32),
            Err(e) => reply.error(e),
        }
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        match guarded(|| self.disk.flush()) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e),
        }
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        match guarded(|| self.zero(offset, length, mode)) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e),
        }
    }

    fn lseek(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let hole = match whence {
            libc::SEEK_DATA => false,
            libc::SEEK_HOLE => true,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(from) = u64::try_from(offset) else { return reply.error(Errno::EINVAL) };
        match guarded(|| self.seek(from, hole)) {
            Ok(at) => reply.offset(at.cast_signed()),
            Err(e) => reply.error(e),
        }
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if ino != ROOT_INODE {
            return reply.error(Errno::ENOTDIR);
        }
        let entries = [
            (ROOT_INODE, FileType::Directory, "."),
            (ROOT_INODE, FileType::Directory, ".."),
            (FILE_INODE, FileType::RegularFile, self.name.as_str()),
        ];
        for (next, (ino, kind, name)) in (1u64..).zip(entries).skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            if reply.add(ino, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        // The loop device takes its discard granularity from the block size.
        let blocks = self.disk.len().div_ceil(4096);
        reply.statfs(blocks, 0, 0, 2, 0, 4096, 255, 4096);
    }
}
