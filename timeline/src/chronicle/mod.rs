//! What happened to a group's history beside its data: streams, gaps, bookmarks, what is kept, rollbacks, damage, and
//! where the window begins. From this and the layers' times follows which points there are.
//!
//! - [`file`]: the file, appended to and rewritten; [`recover`] decides what of it counts after a crash or damage
//! - [`marks`], [`bookmarks`]: the two parts of a [`Chronicle`]
//! - [`locate`]: from what was asked to the exact point; [`report`]: the words of `varve points`

mod bookmarks;
pub mod file;
#[cfg(test)]
mod file_tests;
pub mod locate;
mod marks;
#[cfg(test)]
mod model;
pub mod recover;
pub mod report;
mod state;

pub use bookmarks::Bookmark;
pub use file::{Appended, ChronicleFile, StreamFacts};
pub use locate::{PointError, Times};
pub use marks::{Gap, Place, Stretch};
pub use state::{Applied, Chronicle, Damage};
pub use varve_common::format::chronicle::Event;

/// A height and its time at the source.
pub type HeightTime = (u64, u64);
