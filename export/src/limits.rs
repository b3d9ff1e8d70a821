//! Every limit of this crate in one place. Each is checked before anything is allocated.

use std::time::Duration;

/// Longest name of an export or of an attached device in bytes; what a client may send is limited by
/// [`NBD_STRING_BYTES_MAX`].
pub const NAME_BYTES_MAX: usize = 255;
/// Exports of one NBD server.
pub const EXPORTS_MAX: usize = 1024;
/// Largest disk: the file of a FUSE mount and the offsets of NBD replies are signed 64-bit numbers.
pub const DISK_BYTES_MAX: u64 = i64::MAX as u64;

/// Clients of one NBD listener at once; one more is turned away.
pub const NBD_CONNECTIONS_MAX: usize = 64;
/// A client that has not reached the transmission phase after this long loses its connection.
pub const NBD_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(20);
/// A client that does not take a reply for this long loses its connection, and with it its buffers.
pub const NBD_REPLY_TIMEOUT: Duration = Duration::from_secs(600);
/// Options that a client may send in one negotiation.
pub const NBD_OPTIONS_MAX: u32 = 256;
/// Longest string in the NBD protocol (its own limit).
pub const NBD_STRING_BYTES_MAX: usize = 4096;
/// Data of an option that is looked at: a name and several queries. More is read over and refused with an answer...
pub const NBD_OPTION_BYTES_MAX: u32 = 32 << 10;
/// ...up to here; a client that announces more loses its connection.
pub const NBD_OPTION_SKIP_MAX: u32 = 1 << 20;
/// Queries in one option about metadata contexts.
pub const NBD_QUERIES_MAX: u32 = 64;
/// Information types in one INFO or GO.
pub const NBD_INFO_REQUESTS_MAX: u16 = 64;
/// Largest read and write; told to clients, so that they split what is larger.
pub const NBD_REQUEST_BYTES_MAX: u32 = 32 << 20;
/// Requests of one connection under way at once.
pub const NBD_IN_FLIGHT_MAX: usize = 16;
/// Buffers of one connection: one of the largest requests, or all of [`NBD_IN_FLIGHT_MAX`] at 2 MiB.
pub const NBD_IN_FLIGHT_BYTES_MAX: u32 = NBD_REQUEST_BYTES_MAX;
/// Calls of one export's disk under way at once, over all its connections. A disk that hangs holds this many threads and no
/// more, so the others go on.
pub const NBD_DISK_CALLS_MAX: usize = 32;
/// The longest that a connection may take to end after its export was closed; then its unsent replies are dropped.
pub const NBD_END_TIMEOUT: Duration = Duration::from_secs(5);
/// Chunks of a structured read reply; what follows is sent as data, holes and all.
pub const NBD_READ_CHUNKS_MAX: usize = 128;
/// A hole that is shorter than this is sent as zeroes: two chunk headers and a system call cost more.
pub const NBD_READ_HOLE_BYTES_MIN: u64 = 4096;
/// Extents in one block status reply.
pub const NBD_EXTENTS_MAX: usize = 2048;
/// Questions to the disk for one block status reply: neighbours of one kind are merged, so they may outnumber the extents.
pub const NBD_STRETCHES_MAX: usize = 16_384;

/// Largest request of the kernel to a FUSE file; 1 MiB is what `fs.fuse.max_pages_limit` allows by default.
pub const FUSE_REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Threads that answer for one attached disk; each keeps up to 2 MiB once it has seen the largest read and write. Measured on two
/// cores: with 8 threads 50 000 random reads/s, with 4 40 000, with 2 21 000; one reader alone sees no difference.
pub const DEVICE_THREADS: usize = 8;
/// Requests that the kernel may have under way at once for one attached disk (asynchronous direct I/O).
pub const FUSE_BACKGROUND_MAX: u16 = 64;
/// The longest that a program of util-linux may take.
pub const LOSETUP_TIMEOUT: Duration = Duration::from_secs(15);
/// The longest to wait until a loop device is gone after it was told to, or until a ublk device is not used.
pub const DEVICE_GONE_TIMEOUT: Duration = Duration::from_secs(5);
/// A ublk device of which nothing was asked for so long is not used, as far as can be told: the kernel does not say who has it
/// open.
pub const UBLK_QUIET: Duration = Duration::from_secs(1);
/// A ublk device that is used and is taken away answers with errors for so long, unless somebody has seen one: of a device that is
/// gone a program only reads the end.
pub const UBLK_LAST_WORD: Duration = Duration::from_millis(300);

const _: () = assert!(NBD_OPTION_BYTES_MAX as usize > 2 * NBD_STRING_BYTES_MAX);
const _: () = assert!(NBD_IN_FLIGHT_BYTES_MAX >= NBD_REQUEST_BYTES_MAX);
