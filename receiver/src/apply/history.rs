//! Where the past is kept: called before the replica changes. This is the place for layers of before-images; until
//! they exist the past is only what the replica was.

use super::plan::BatchPlan;
use super::replica::Replicas;
use crate::failure::Failure;

/// Takes what a batch will replace.
pub trait History: Send {
    /// Called with every batch before anything of it reaches the replicas. What it keeps must be durable on return: the
    /// replica is overwritten next. After a crash it is called again with changes that it has seen before.
    fn before(&mut self, plan: &BatchPlan, replicas: &mut Replicas) -> Result<(), Failure>;
}

/// Keeps nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHistory;

impl History for NoHistory {
    fn before(&mut self, _plan: &BatchPlan, _replicas: &mut Replicas) -> Result<(), Failure> {
        Ok(())
    }
}
