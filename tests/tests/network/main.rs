//! The line between the two sides: cut, half open, slow, lossy, moved, silent. Whatever it does, the stream goes on where
//! the receiver's disk ends, nothing that was acknowledged is sent again, and no status says what is not so.
//!
//! `VARVE_SOAK=1` makes the outages long and the rounds many.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

mod bed;
mod line;
mod overflow;
mod sessions;
