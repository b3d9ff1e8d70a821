//! The landing log: what arrived and is durable but not yet applied ([`varve_common::format`] has the bytes).
//!
//! - [`arena`]: the memory into which frames are copied, once
//! - [`batch`]: what is written at once
//! - [`segment`]: one preallocated file
//! - [`log`]: all segments of a group, and the writer at its end
//! - [`reader`]: entries in order, and the decision table that says where the log ends
//! - [`fetch`]: single entries, for whoever reads what is not applied yet
//! - [`recover`]: opening a log after a stop or a crash
//! - [`lander`]: the thread that writes

pub mod arena;
pub mod batch;
pub mod fetch;
pub mod lander;
pub mod log;
pub mod reader;
pub mod recover;
pub mod segment;

/// A place in the log: of an entry's header, or where the next one will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Sequence number of the segment.
    pub segment: u64,
    /// Offset in it.
    pub offset: u64,
}

impl Place {
    /// The block boundary at or after it: where the next batch may begin.
    pub fn next_block(self) -> Self {
        Self { offset: self.offset.next_multiple_of(varve_common::format::BLOCK_BYTES as u64), ..self }
    }
}
