//! When to try again: exponential, bounded, with jitter. No clock and no random source of its own.
//!
//! Every agent of a site loses the receiver at the same moment (it restarts, the line drops). Without jitter they all
//! come back at the same moment too, again and again; so each delay is drawn from the upper half of its step.

use std::time::Duration;

use rand::Rng;

/// The shortest first step.
pub const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// The longest step: a receiver that comes back is found within this time.
pub const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// Delays that double from `min` to `max`.
#[derive(Clone, Debug)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    step: Duration,
}

impl Backoff {
    /// Starts at `min`. A `max` below `min` counts as `min`.
    pub fn new(min: Duration, max: Duration) -> Self {
        Self { min, max: max.max(min), step: min }
    }

    /// The delay before the next try: uniform in `[step/2, step]`; the step then doubles up to the maximum.
    pub fn next(&mut self, rng: &mut impl Rng) -> Duration {
        let step = self.step;
        self.step = step.saturating_mul(2).min(self.max);
        let half = step / 2;
        half + half.mul_f64(rng.random::<f64>())
    }

    /// Starts over after a success that lasted (not merely after a connect, or a receiver that accepts and drops
    /// at once would be hammered).
    pub fn reset(&mut self) {
        self.step = self.min;
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new(BACKOFF_MIN, BACKOFF_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{SeedableRng, rngs::StdRng};

    #[test]
    fn doubles_up_to_the_maximum_and_starts_over() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut backoff = Backoff::default();
        let mut step = BACKOFF_MIN;
        for _ in 0..20 {
            let delay = backoff.next(&mut rng);
            assert!(delay >= step / 2 && delay <= step, "{delay:?} is outside of half to whole {step:?}");
            step = (step * 2).min(BACKOFF_MAX);
        }
        assert_eq!(step, BACKOFF_MAX);
        backoff.reset();
        assert!(backoff.next(&mut rng) <= BACKOFF_MIN);
    }

    #[test]
    fn two_agents_do_not_come_back_together() {
        let (mut a, mut b) = (Backoff::default(), Backoff::default());
        let (mut rng_a, mut rng_b) = (StdRng::seed_from_u64(1), StdRng::seed_from_u64(2));
        let same = (0..50).filter(|_| a.next(&mut rng_a) == b.next(&mut rng_b)).count();
        assert_eq!(same, 0);
    }

    #[test]
    fn extreme_limits_do_not_overflow() {
        let mut rng = StdRng::seed_from_u64(3);
        let mut backoff = Backoff::new(Duration::from_secs(u64::MAX / 4), Duration::MAX);
        for _ in 0..5 {
            let _ = backoff.next(&mut rng);
        }
        let mut swapped = Backoff::new(Duration::from_secs(5), Duration::from_secs(1));
        assert!(swapped.next(&mut rng) <= Duration::from_secs(5));
    }
}
