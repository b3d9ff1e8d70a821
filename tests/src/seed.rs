//! Randomness that can be replayed.

use rand::SeedableRng;
use rand::rngs::StdRng;

/// A test's random seed: `VARVE_SEED` from the environment, else a new one. A failing test prints it.
#[derive(Debug)]
pub struct Seed(u64);

impl Seed {
    /// The seed of this test.
    #[expect(clippy::new_without_default, reason = "a default that differs every time would mislead")]
    pub fn new() -> Self {
        match std::env::var("VARVE_SEED") {
            Ok(text) => Seed(text.parse().unwrap_or_else(|_| panic!("VARVE_SEED={text} is not a number"))),
            // Short enough to type, and for the tools that take a seed.
            Err(_) => Seed(rand::random::<u32>().into()),
        }
    }

    /// A seed that follows from another one.
    pub fn of(number: u64) -> Self {
        Seed(number)
    }

    /// The number, for tools that take one (fio's `randseed`).
    pub fn number(&self) -> u64 {
        self.0
    }

    /// A generator that starts at this seed.
    pub fn rng(&self) -> StdRng {
        StdRng::seed_from_u64(self.0)
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay this test with VARVE_SEED={}", self.0);
        }
    }
}
