//! Mapped memory of BPF maps, and the few system calls that libbpf-rs has no safe form of.
#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use libbpf_rs::libbpf_sys;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::layout::Shared;

pub(crate) const PAGE_BYTES: usize = 4096;

/// A mapping, unmapped when dropped.
pub(crate) struct Mapping {
    start: NonNull<libc::c_void>,
    bytes: usize,
}

// SAFETY: the mapping is memory of the kernel's map; nothing about it belongs to a thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; what is read and written through it is atomic or immutable, see the users.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn new(fd: BorrowedFd<'_>, offset: usize, bytes: usize, writable: bool) -> io::Result<Self> {
        let bytes_mapped = NonZeroUsize::new(bytes.next_multiple_of(PAGE_BYTES))
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut protection = ProtFlags::PROT_READ;
        if writable {
            protection |= ProtFlags::PROT_WRITE;
        }
        // SAFETY: a new shared mapping at an address that the kernel chooses cannot disturb any memory in use.
        let start = unsafe { mmap(None, bytes_mapped, protection, MapFlags::MAP_SHARED, fd, offset as libc::off_t) }?;
        Ok(Self { start, bytes: bytes_mapped.get() })
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made, and nobody borrows from it any more.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}

/// An array map as a slice of atomics.
pub(crate) struct Table<T: Shared> {
    mapping: Mapping,
    entries: usize,
    entry: PhantomData<T>,
}

impl<T: Shared> Table<T> {
    pub(crate) fn new(map: &impl AsFd, entries: usize) -> io::Result<Self> {
        assert!(align_of::<T>() <= 8 && size_of::<T>().is_multiple_of(8));
        let mapping = Mapping::new(map.as_fd(), 0, entries * size_of::<T>(), true)?;
        Ok(Self { mapping, entries, entry: PhantomData })
    }
}

impl<T: Shared> Deref for Table<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the mapping is at least this long, page-aligned, lives as long as `self`, and `T: Shared` may hold
        // any bytes and is only accessed atomically, also by the kernel's side.
        unsafe { std::slice::from_raw_parts(self.mapping.start().cast(), self.entries) }
    }
}

/// Runs a program of type `syscall` once and returns what it returned.
pub(crate) fn run_program(program: &impl AsFd) -> io::Result<u32> {
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    // SAFETY: the options are initialised, name their own size, and point to no buffers.
    let result = unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_fd().as_raw_fd(), &mut options) };
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    Ok(options.retval)
}

/// Gives an object of the kernel a name in a bpffs, which keeps it alive.
pub(crate) fn pin(object: &impl AsFd, path: &std::path::Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path ends with a zero byte and lives until the call returns.
    let result = unsafe { libbpf_sys::bpf_obj_pin(object.as_fd().as_raw_fd(), path.as_ptr()) };
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
}

/// The kernel's statistics of a program.
pub(crate) struct ProgramStatistics {
    pub(crate) run_count: u64,
    pub(crate) run_time_ns: u64,
    pub(crate) recursion_misses: u64,
}

pub(crate) fn program_statistics(program: &impl AsFd) -> io::Result<ProgramStatistics> {
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut length = size_of::<libbpf_sys::bpf_prog_info>() as u32;
    // SAFETY: `info` is zeroed (so it asks for no arrays) and `length` is its size.
    let result = unsafe { libbpf_sys::bpf_prog_get_info_by_fd(program.as_fd().as_raw_fd(), &mut info, &mut length) };
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    Ok(ProgramStatistics {
        run_count: info.run_cnt,
        run_time_ns: info.run_time_ns,
        recursion_misses: info.recursion_misses,
    })
}

/// A page of anonymous memory of our own, never part of a huge page.
pub(crate) struct Page {
    start: NonNull<libc::c_void>,
}

impl Page {
    pub(crate) fn new() -> Self {
        let bytes = NonZeroUsize::new(PAGE_BYTES).expect("a page has bytes");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private mapping at an address that the kernel chooses cannot disturb any memory in use.
        let start = unsafe { mmap_anonymous(None, bytes, protection, MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE) };
        Self { start: start.expect("a page of memory") }
    }

    pub(crate) fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is one readable page that lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), PAGE_BYTES) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, writable, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), PAGE_BYTES) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made, and nobody borrows from it any more.
        let _ = unsafe { munmap(self.start, PAGE_BYTES) };
    }
}
