//! Words, formats, wire and states of Varve. Pure: no I/O, no clock, no randomness but what is passed in.
//!
//! - [`record`]: what the ring, the frames, the landing log and the layers carry
//! - [`wire`]: every byte between agent and receiver
//! - [`format`]: every byte that the receiver keeps on disk
//! - [`state`]: the three axes of a group and their transitions
//! - [`geometry`]: extents, regions, masks
//! - [`limits`]: every limit in one place
//! - [`config`], [`paths`]: configuration files and where everything lives below a root
//! - [`control`]: the words between `varve` and the daemons (JSON lines over a Unix socket)
//! - [`point`]: points in time as people ask for them, and as they are answered; [`clock`]: where a source's clock was set
//! - [`watch`]: alerts, from what a daemon knows of its groups; [`metrics`]: the same as numbers
//! - [`problem`]: what an operator is told when something is refused or fails

pub mod clock;
pub mod config;
pub mod control;
pub mod format;
pub mod geometry;
pub mod limits;
pub mod metrics;
pub mod paths;
pub mod point;
pub mod problem;
pub mod record;
pub mod state;
pub mod watch;
pub mod wire;
