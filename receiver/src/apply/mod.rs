//! From landed entries to the replica.
//!
//! - [`work`]: what waits for the applier, in order
//! - [`plan`]: a batch of records as sorted writes that do not overlap; pure
//! - [`behind`]: a part on its way to the replicas while the next one's before-images are taken
//! - [`replica`]: the files and devices, written in whole blocks
//! - [`history`]: before-images, taken before the replica changes
//! - [`recent`], [`holes`]: what need not be read for them
//! - [`mark`]: the applied mark
//! - [`collect`]: entries into batches
//! - [`probe`]: digests of what a replica holds
//! - [`rollback`]: making the replicas what they were
//! - [`applier`]: the thread

pub mod applier;
pub mod behind;
pub mod collect;
pub mod history;
pub mod holes;
pub mod mark;
pub mod plan;
pub mod probe;
pub mod recent;
pub mod replica;
pub mod rollback;
pub mod work;
