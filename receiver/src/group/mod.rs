//! What a group is at the receiver.
//!
//! - [`stream`]: the state of its stream, and what may become part of it; pure
//! - [`meta`]: the file `group.json`
//! - [`replicas`]: finding or making the files and devices
//! - [`live`]: what its threads, its session and the status share
//! - [`open`]: a group with its files open and its threads running
//! - [`registry`]: all groups, and who may have a session

pub mod live;
pub mod meta;
pub mod open;
pub mod registry;
pub mod replicas;
pub mod stream;
