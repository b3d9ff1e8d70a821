//! How long and how often.

use std::time::Duration;

/// What the command line asked for.
#[derive(Debug)]
pub struct Plan {
    /// A look, not a measurement.
    pub quick: bool,
    /// Length of a run, instead of each bench's own.
    pub seconds: Option<u64>,
    /// Number of pairs, instead of each bench's own.
    pub pairs: Option<usize>,
}

impl Plan {
    /// Length of a run: as asked, else `usual`, else (quick) `quick`.
    pub fn run(&self, usual: f64, quick: f64) -> Duration {
        let own = if self.quick { quick } else { usual };
        Duration::from_secs_f64(self.seconds.map_or(own, |seconds| seconds as f64))
    }

    /// Number of pairs.
    pub fn pairs(&self, usual: usize, quick: usize) -> usize {
        self.pairs.unwrap_or(if self.quick { quick } else { usual }).max(1)
    }
}
