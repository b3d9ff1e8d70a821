//! This host's clock, and what the source's says now without asking it.
//!
//! The agent says its RPO twice a second, and what it says waits on the
//! line behind the data that it speaks of. When writes begin to pile up, the receiver would show for a second or more that
//! all is well. What lands is dated by the source, so how far the newest date is behind tells the rest, once the difference of
//! the two clocks is known: it is the best that was seen lately, when a record was just made and the line was free.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// So long a difference counts, and the same again: a clock that was set is followed within two of these.
const BUCKET: Duration = Duration::from_secs(60);

/// By this much this host's clock may go its own way between two looks before it counts as set.
const SET_MIN: Duration = Duration::from_millis(500);

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
    /// What this host's clock said at the last look.
    looked: Option<(u64, Instant)>,
}

impl SourceClock {
    /// What is dated `dated_ns` by the source is here when this host's clock says `here_ns`.
    pub fn note(&mut self, dated_ns: u64, here_ns: u64, now: Instant) {
        if dated_ns == 0 {
            // Nothing came yet.
            return;
        }
        let expected = self
            .looked
            .replace((here_ns, now))
            .map_or(here_ns, |(then_ns, then)| then_ns.saturating_add(now.duration_since(then).as_nanos() as u64));
        if u128::from(expected.abs_diff(here_ns)) > SET_MIN.as_nanos() {
            // What was ahead of the clock that this host had says nothing of the one that it has.
            (self.ahead_ns, self.since) = ([None; 2], None);
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
            let source = |s: u64| s * S + difference;
            let begin = Instant::now();
            let at = |ns: u64| begin + Duration::from_nanos(ns - 100 * S);
            let mut clock = SourceClock::default();
            assert_eq!(clock.age(source(9), 10 * S), Duration::ZERO, "nothing is known yet");
            for second in 100..110 {
                // On its way for half a second, and once for a tenth.
                let here = second * S + if second == 104 { S / 10 } else { S / 2 };
                clock.note(source(second), here, at(here));
            }
            assert_eq!(clock.age(source(109), 110 * S), Duration::from_millis(900));
            // From here on it comes later and later.
            clock.note(source(111), 115 * S, at(115 * S));
            assert_eq!(clock.age(source(111), 116 * S), Duration::from_millis(4900));
        }
    }

    #[test]
    fn this_hosts_clock_may_be_set() {
        let (begin, mut clock) = (Instant::now(), SourceClock::default());
        clock.note(100 * S, 100 * S, begin);
        clock.note(101 * S, 101 * S + S / 10, begin + Duration::from_millis(1100));
        assert_eq!(clock.age(101 * S, 102 * S), Duration::from_secs(1));
        for set in [1000, 1] {
            // An hour of lag is not seen in it.
            clock.note(102 * S, set * S, begin + Duration::from_secs(2));
            assert_eq!(clock.age(102 * S, set * S + S / 2), Duration::from_millis(500));
        }
    }

    #[test]
    fn a_source_whose_clock_was_set_back_is_followed() {
        let (begin, mut clock) = (Instant::now(), SourceClock::default());
        let mut note = |source, here: u64| {
            clock.note(source * S, here * S, begin + Duration::from_secs(here));
            clock.clone()
        };
        note(1000, 100);
        assert_eq!(note(160, 160).age(160 * S, 160 * S), Duration::from_secs(900));
        assert_eq!(note(220, 220).age(220 * S, 221 * S), Duration::from_secs(1));
        note(1120, 220);
        assert_eq!(note(700, 700).age(700 * S, 700 * S), Duration::ZERO);
    }
}
