//! From landed entries to the replica.
//!
//! - [`work`]: what waits for the applier, in order
//! - [`plan`]: a batch of records as sorted writes that do not overlap; pure
//! - [`replica`]: the files and devices, written in whole blocks
//! - [`history`]: where before-images will be taken
//! - [`mark`]: the applied mark
//! - [`collect`]: entries into batches
//! - [`probe`]: digests of what a replica holds
//! - [`applier`]: the thread

pub mod applier;
pub mod collect;
pub mod history;
pub mod mark;
pub mod plan;
pub mod probe;
pub mod replica;
pub mod work;
