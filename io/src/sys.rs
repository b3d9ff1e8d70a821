//! The few system calls that neither `std` nor `nix` offers as safe functions.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use nix::libc;

/// `BLKZEROOUT`, `_IO(0x12, 127)`.
const BLKZEROOUT: libc::Ioctl = nix::request_code_none!(0x12, 127) as libc::Ioctl;
/// `BLKGETSIZE64`, `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: libc::Ioctl = nix::request_code_read!(0x12, 114, size_of::<usize>()) as libc::Ioctl;
/// `BLKROSET`, `_IO(0x12, 93)`.
const BLKROSET: libc::Ioctl = nix::request_code_none!(0x12, 93) as libc::Ioctl;

/// `PR_SET_IO_FLUSHER`, since Linux 5.6.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

fn check(result: i64) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// `pwritev2` with `RWF_DSYNC`: the bytes that it says were written are on stable storage.
pub(crate) fn pwrite_dsync(file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
    let offset = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    let iov = libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() };
    // SAFETY: one iovec that describes `buf`, which outlives the call; the kernel only reads it.
    check(unsafe { libc::pwritev2(file.as_raw_fd(), &raw const iov, 1, offset, libc::RWF_DSYNC) } as i64)
}

/// What `statx` says of direct I/O: `None` if the kernel or the file system does not say,
/// `Some((0, 0))` if the file cannot do direct I/O, else (memory, offset) alignment in bytes.
pub(crate) fn dio_align(file: &File) -> io::Result<Option<(u32, u32)>> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor itself; the kernel fills `stat`,
    // which is large enough by type and valid when all zeroes.
    let stat = unsafe {
        check(i64::from(libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            stat.as_mut_ptr(),
        )))?;
        stat.assume_init()
    };
    let known = stat.stx_mask & libc::STATX_DIOALIGN != 0;
    Ok(known.then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align)))
}

/// The size of a block device in bytes.
pub(crate) fn block_bytes(file: &File) -> io::Result<u64> {
    let mut bytes: u64 = 0;
    // SAFETY: BLKGETSIZE64 writes eight bytes (Varve is built for 64-bit only) to the pointer.
    check(i64::from(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) }))?;
    Ok(bytes)
}

/// The logical sector size of a block device in bytes.
pub(crate) fn logical_block_bytes(file: &File) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int to the pointer.
    check(i64::from(unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut bytes) }))?;
    u32::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))
}

/// Makes a block device read-only, or writable again.
pub(crate) fn block_set_read_only(file: &File, read_only: bool) -> io::Result<()> {
    let value = libc::c_int::from(read_only);
    // SAFETY: BLKROSET reads one int from the pointer.
    check(i64::from(unsafe { libc::ioctl(file.as_raw_fd(), BLKROSET, &raw const value) })).map(drop)
}

/// Makes a range of a block device read as zeroes, by writing them if the device has no better way.
pub(crate) fn block_zero_out(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKZEROOUT reads two 64-bit numbers from the pointer.
    check(i64::from(unsafe { libc::ioctl(file.as_raw_fd(), BLKZEROOUT, range.as_ptr()) })).map(drop)
}

/// Writes what the page cache holds of a file or device, and waits for it; the device's own cache is not flushed.
pub(crate) fn write_back(file: &File) -> io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the descriptor is open as long as `file` is borrowed; there is no memory among the arguments.
    check(i64::from(unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) })).map(drop)
}

const _: () = assert!(size_of::<usize>() == 8, "the ioctls above are written for 64-bit kernels");

/// Memory that this thread, and those it starts from here on, ask for is not waited for on the disks that they serve.
pub(crate) fn set_io_flusher() -> io::Result<()> {
    // SAFETY: two flags of the calling thread; no memory is involved.
    check(i64::from(unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) })).map(drop)
}

/// Blocks from `whole` bytes on get pages of their own, and of a heap's end `top` bytes that are free are kept.
pub(crate) fn set_heap_limits(whole: i32, top: i32) {
    // SAFETY: both only set a number of the allocator; it is said before threads are started.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, whole);
        libc::mallopt(libc::M_TRIM_THRESHOLD, top);
    }
}

/// The calling thread, and those it starts from here on, go on without CAP_SYS_ADMIN in their effective set.
pub(crate) fn put_down_sys_admin() -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    const SYS_ADMIN: u32 = 21;
    // Version, thread; then effective, permitted, inheritable of 0 to 31, and the same of 32 to 63.
    let (mut header, mut sets) = ([VERSION_3, 0], [[0_u32; 3]; 2]);
    // SAFETY: both calls take a header of two words and sets of six, which are ours for their time; capget writes to them.
    check(unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) })?;
    sets[0][0] &= !(1 << SYS_ADMIN);
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()) }).map(drop)
}
