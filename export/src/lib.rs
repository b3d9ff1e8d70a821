//! Serves a disk to others: as NBD ([`nbd`]), or as a local block device ([`device`]).
//!
//! Whatever implements [`Disk`] can be served either way, by both at once, and to several clients at once.

pub mod device;
pub mod disk;
pub mod disks;
pub mod error;
pub mod limits;
pub mod nbd;

pub use device::Attached;
pub use disk::{Disk, Stretch};
pub use error::{ExportError, ExportErrorKind};
