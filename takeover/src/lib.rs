//! The takeover plan: ordered steps that bring the business up on the recovery host, and what runs them.
//!
//! | module | for |
//! |---|---|
//! | [`plan`] | the operator's file, read and checked |
//! | [`step`] | what a step does: done, recognised, taken back |
//! | [`runner`] | a plan forwards, onwards after a stop, and back |
//! | [`report`] | dry run, progress, report |
//! | [`drill`] | what the last drill showed, and that one is under way |
//! | [`tools`] | where the system's programs are |
//! | `state` | what was done, on disk before and after every step |
//! | `bubble` | the namespaces of a test |
//! | `process`, `proc` | programs with a time limit; what `/proc` tells |
//!
//! It runs in the operator's context (root, the host's namespaces): the daemon is sandboxed and can neither mount nor
//! configure the network. Every wait has a limit.

mod bubble;
pub mod drill;
mod names;
pub mod plan;
mod proc;
mod process;
pub mod report;
pub mod runner;
mod state;
pub mod step;
pub mod tools;

pub use drill::{Drill, DrillMark, DrillRecord, Verified};
pub use plan::Plan;
pub use report::{DryRun, Outcome, Progress, Report, StepOutcome, StepPlan, StepReport};
pub use runner::{Commands, Context, Runner, Standing, Undo, clean, standing, undo};
pub use state::{Device, Mode, Phase};
pub use tools::Tools;
