//! Serves a disk to others: as NBD, or as a local block device.

pub mod disk;
