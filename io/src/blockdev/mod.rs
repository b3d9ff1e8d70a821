//! What a block device is, who uses it, and which disks are under a path. From sysfs and procfs only.

mod claim;
mod disks;
mod facts;
mod identity;
mod marks;
mod mounts;
mod sysfs;
mod usage;
mod writes;

pub use claim::{Claim, writers};
pub use disks::disks_behind;
pub use facts::{BlockFacts, DevNo};
pub use identity::{Identity, is_another};
pub use marks::{Marks, NoMarks, marks};
pub use mounts::Mount;
pub(crate) use sysfs::logical_block_bytes_of_dev;
pub use usage::{in_use, known_user};
pub use writes::Writes;
