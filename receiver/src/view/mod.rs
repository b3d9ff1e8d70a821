//! Views: a group's volumes at a point, as devices or over NBD.
//!
//! - [`volume`]: one volume at one point
//! - [`overlay`]: what is written to a writable one
//! - [`views`]: all that are open
//! - [`hints`]: what to know before one is mounted

pub mod hints;
pub mod overlay;
pub mod views;
pub mod volume;
