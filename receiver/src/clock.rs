//! This host's clock, and what the source's says now without asking it.
//!
//! The agent says its RPO twice a second, and what it says waits on the
//! line behind the data that it speaks of. When writes begin to pile up, the receiver would show for a second or more that
//! all is well. What lands is dated by the source, so how far the newest date is behind tells the rest, once the difference of
//! the two clocks is known: it is the best that was seen lately, when a record was just made and the line was free.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// So long a difference counts, and the same again: a clock that was set is followed within two of these.
const BUCKET: Duration = Duration::from_secs(60);

/// Nanoseconds since 1970.
pub fn wall_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct SourceClock {
    /// The most that the source's dates were ahead of this host's clock, by now and in the stretch before, in nanoseconds.
    ahead_ns: [Option<i128>; 2],
    since: Option<Instant>,
}

impl SourceClock {
    /// What is dated `dated_ns` by the source is here when this host's clock says `here_ns`.
    pub fn note(&mut self, dated_ns: u64, here_ns: u64, now: Instant) {
        if dated_ns == 0 {
            // Nothing came yet.
            return;
        }
        match self.since.map(|since| now.duration_since(since)) {
            Some(passed) if passed < BUCKET => {}
            Some(passed) if passed < 2 * BUCKET => (self.ahead_ns, self.since) = ([None, self.ahead_ns[0]], Some(now)),
            _ => (self.ahead_ns, self.since) = ([None; 2], Some(now)),
        }
        let ahead = i128::from(dated_ns) - i128::from(here_ns);
        self.ahead_ns[0] = self.ahead_ns[0].max(Some(ahead));
    }

    /// How old by the source's clock is what it dated `dated_ns`: rather too little than too much.
    pub fn age(&self, dated_ns: u64, here_ns: u64) -> Duration {
        let Some(ahead) = self.ahead_ns.iter().flatten().max() else { return Duration::ZERO };
        let age = i128::from(here_ns) + ahead - i128::from(dated_ns);
        Duration::from_nanos(u64::try_from(age.max(0)).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn what_piles_up_shows_whatever_the_clocks_say() {
        for difference in [0, 3600 * S] {
            let (source, begin) = (|s: u64| s * S + difference, Instant::now());
            let mut clock = SourceClock::default();
            assert_eq!(clock.age(source(9), 10 * S), Duration::ZERO, "nothing is known yet");
            for second in 100..110 {
                // On its way for half a second, and once for a tenth.
                let way = if second == 104 { S / 10 } else { S / 2 };
                clock.note(source(second), second * S + way, begin);
            }
            assert_eq!(clock.age(source(109), 110 * S), Duration::from_millis(900));
            // From here on it comes later and later.
            clock.note(source(111), 115 * S, begin);
            assert_eq!(clock.age(source(111), 116 * S), Duration::from_millis(4900));
        }
    }

    #[test]
    fn a_clock_that_was_set_back_is_followed() {
        let (begin, mut clock) = (Instant::now(), SourceClock::default());
        clock.note(1000 * S, 100 * S, begin);
        clock.note(101 * S, 101 * S, begin + BUCKET);
        assert_eq!(clock.age(101 * S, 101 * S), Duration::from_secs(900));
        clock.note(170 * S, 170 * S, begin + 2 * BUCKET);
        assert_eq!(clock.age(170 * S, 171 * S), Duration::from_secs(1));
        clock.note(1000 * S, 100 * S, begin + 2 * BUCKET);
        clock.note(300 * S, 300 * S, begin + 9 * BUCKET);
        assert_eq!(clock.age(300 * S, 300 * S), Duration::ZERO);
    }
}
