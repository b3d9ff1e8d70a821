//! Direct I/O, io_uring, durable file steps and block device facts.
//!
//! This is the one crate outside `bpf/` where `unsafe` is allowed, and inside it only the modules
//! [`aligned`], [`ublk`], [`uring`] and the private `sys` use it. Everything above works on safe types.
//!
//! | module | for |
//! |---|---|
//! | [`aligned`] | memory that O_DIRECT accepts, and a bounded pool of it |
//! | [`direct`] | one file or block device, read and written past the page cache |
//! | [`uring`] | many reads or writes at queue depth, waited for as one call; reads waited for one by one |
//! | [`ublk`] | a block device that this process answers for |
//! | [`sparse`] | holes, zeroes, allocation |
//! | [`crashsafe`] | file steps that survive power loss; one daemon per directory |
//! | [`blockdev`] | what a block device is, who uses it, which disks are under a path |
//! | [`notify`] | systemd's readiness and watchdog protocol |
//! | [`cpu`] | CPU time and resident memory of this process |
//! | [`watcher`], [`hook`] | a daemon's watch tells the log, the operator's program and a metrics file |

pub mod aligned;
pub mod blockdev;
pub mod cpu;
pub mod crashsafe;
pub mod direct;
pub mod error;
mod fallback;
pub mod hook;
pub mod notify;
pub mod sparse;
mod sys;
pub mod ublk;
pub mod uring;
pub mod watcher;

pub use aligned::{AlignedBuf, BufPool, PooledBuf};

pub use blockdev::BlockFacts;
pub use crashsafe::DirLock;
pub use direct::DirectFile;
pub use error::IoError;
pub use uring::{IoQueue, ReadAhead};

/// The page size that all buffers and the tail rule of [`DirectFile`] use, in bytes.
pub const PAGE_BYTES: usize = 4096;
