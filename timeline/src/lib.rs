//! The timeline of a group: what its writes replaced, dated, so that any point can be read again.
//!
//! One rule answers every read: a block at point P is the before-image in the *earliest* record after P that covers it;
//! if there is none, it is what the replica holds.

pub mod cache;
pub mod catalogue;
pub mod chronicle;
pub mod entry;
pub mod error;
pub mod layer;
pub mod limits;
pub mod merge;
pub mod open_index;
pub mod points;
pub mod recorder;
pub mod resolve;
pub mod run;
pub mod scrub;

#[cfg(test)]
mod testing;
pub mod timeline;
