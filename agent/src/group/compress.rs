//! Whether to compress the next frame. LZ4 costs about 1 ms per MB, so it pays only where the link is the bottleneck
//! and the data gives way.

use std::time::{Duration, Instant};

/// A link that carries less than this while data waits is worth compressing for.
const SLOW_LINK_BYTES_PER_SECOND: f64 = 60e6;
/// Data that shrinks by less is sent as it is.
const RATIO_MAX: f64 = 0.85;
/// Frames sent plain after one that did not shrink.
const SKIP_AFTER_MISS: u32 = 32;
/// Span over which the link's rate is measured.
const WINDOW: Duration = Duration::from_millis(500);

/// See the module's text.
#[derive(Debug)]
pub struct Compression {
    enabled: bool,
    slow: bool,
    skip: u32,
    window_began: Instant,
    blocked: Duration,
    bytes: u64,
}

impl Compression {
    /// `enabled`: the operator allows it.
    pub fn new(enabled: bool, now: Instant) -> Self {
        Self { enabled, slow: false, skip: 0, window_began: now, blocked: Duration::ZERO, bytes: 0 }
    }

    /// Whether to try with the next frame.
    pub fn wanted(&mut self) -> bool {
        if !self.enabled || !self.slow {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        true
    }

    /// A frame was compressed from `plain` to `packed` bytes; whether that is worth sending.
    pub fn worth(&mut self, plain: usize, packed: usize) -> bool {
        let worth = (packed as f64) < plain as f64 * RATIO_MAX;
        if !worth {
            self.skip = SKIP_AFTER_MISS;
        }
        worth
    }

    /// `bytes` went out, and the stream made us wait for `blocked`.
    pub fn sent(&mut self, bytes: u64, blocked: Duration, now: Instant) {
        self.bytes += bytes;
        self.blocked += blocked;
        let span = now.saturating_duration_since(self.window_began);
        if span >= WINDOW {
            let rate = self.bytes as f64 / span.as_secs_f64();
            // Waiting for half of the time means that there was more to send than the link took.
            self.slow = self.blocked * 2 > span && rate < SLOW_LINK_BYTES_PER_SECOND;
            (self.window_began, self.blocked, self.bytes) = (now, Duration::ZERO, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_slow_link_that_holds_us_up_is_compressed_for() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut compression = Compression::new(true, start);
        assert!(!compression.wanted());
        compression.sent(500_000_000, second * 9 / 10, start + second);
        assert!(!compression.wanted(), "fast link, CPU is scarcer");
        compression.sent(1_000_000, second * 9 / 10, start + second * 2);
        assert!(compression.wanted(), "1 MB/s and always waiting");
        assert!(!compression.worth(1000, 990));
        assert!((0..SKIP_AFTER_MISS).all(|_| !compression.wanted()));
        assert!(compression.wanted());
        compression.sent(1_000_000, Duration::ZERO, start + second * 3);
        assert!(!compression.wanted(), "nothing waits");
        let mut off = Compression::new(false, start);
        off.sent(1_000_000, second, start + second);
        assert!(!off.wanted());
    }
}
