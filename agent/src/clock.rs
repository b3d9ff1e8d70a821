//! The wall clock as the stream sees it: close to the machine's, and going back by no more than milliseconds at a time, unless
//! it was far ahead: a machine that was started with a clock in local time, say, which the network then corrects.

use nix::time::{ClockId, clock_gettime};
use varve_common::limits::CLOCK_SETBACK_NS_MIN;

/// Most of the elapsed time by which the stream's clock may fall behind to meet a wall clock that was set back:
/// half, so that it always advances.
const SLEW_DIVISOR: u64 = 2;
/// Most of a single step back: records just before it and just after it seem out of order by so much, which two CPUs
/// that write at once can be, too.
const STEP_BACK_MAX_NS: u64 = 5_000_000;

/// Nanoseconds since 1970.
pub fn wall_ns() -> u64 {
    read(ClockId::CLOCK_REALTIME)
}

/// Nanoseconds since boot, suspend included: what the capture programs read.
pub fn boot_ns() -> u64 {
    read(ClockId::CLOCK_BOOTTIME)
}

fn read(clock: ClockId) -> u64 {
    // Both clocks exist on every kernel that has BPF; a clock before 1970 counts as 1970.
    clock_gettime(clock).map_or(0, |t| t.tv_sec().max(0) as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

/// Wall clock minus boot-time clock. A wall clock that was set back a little is met in steps of a few milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Offset {
    offset_ns: u64,
    boot_ns: u64,
}

impl Offset {
    /// From one reading of both clocks.
    pub fn new(wall_ns: u64, boot_ns: u64) -> Self {
        Self { offset_ns: wall_ns.saturating_sub(boot_ns), boot_ns }
    }

    /// Goes on from what was added before.
    pub fn going_on(ns: u64, boot_ns: u64) -> Self {
        Self { offset_ns: ns, boot_ns }
    }

    /// What to add to the boot-time clock.
    pub fn ns(&self) -> u64 {
        self.offset_ns
    }

    /// Follows the wall clock: forward at once, back no faster than half the time that passed, in small steps. Call it
    /// often. Gives by how much it went back at once, because the clock had been wrong.
    pub fn follow(&mut self, wall_ns: u64, boot_ns: u64) -> Option<u64> {
        let wanted = wall_ns.saturating_sub(boot_ns);
        let ahead = self.offset_ns.saturating_sub(wanted);
        if ahead > CLOCK_SETBACK_NS_MIN {
            *self = Self { offset_ns: wanted, boot_ns };
            return Some(ahead);
        }
        let elapsed = boot_ns.saturating_sub(self.boot_ns);
        let back = (elapsed / SLEW_DIVISOR).min(STEP_BACK_MAX_NS);
        self.offset_ns = wanted.max(self.offset_ns.saturating_sub(back));
        self.boot_ns = boot_ns;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_set_back_is_met_without_going_back() {
        let second = 1_000_000_000;
        let mut offset = Offset::new(1_000 * second, 10 * second);
        let mut last = 0;
        let mut met_after = None;
        // Every 10 ms, as an idle group does it.
        for step in 0..10_000 {
            let boot = 10 * second + step * second / 100;
            let wall = boot + 990 * second - 8 * second;
            // A record that was captured just before the offset changes.
            let before = boot + offset.ns();
            assert_eq!(offset.follow(wall, boot), None);
            let now = boot + offset.ns();
            assert!(now >= last && now + STEP_BACK_MAX_NS >= before, "{before} then {now}");
            last = now;
            if now == wall && met_after.is_none() {
                met_after = Some(step / 100);
            }
        }
        assert_eq!(met_after, Some(16), "8 s are met in 16 s");
        // After a minute in which nobody looked, the step is as small.
        let mut offset = Offset::new(1_000 * second, 10 * second);
        offset.follow(1_055 * second, 70 * second);
        assert_eq!(offset.ns(), 990 * second - STEP_BACK_MAX_NS);
        offset.follow(5_000 * second, 200 * second);
        assert_eq!(200 * second + offset.ns(), 5_000 * second, "forward at once");
        assert_eq!(offset.follow(1_300 * second, 210 * second), Some(3_710 * second), "it was far ahead");
        assert_eq!(210 * second + offset.ns(), 1_300 * second, "back at once");
        assert_eq!(offset.follow(1_301 * second, 211 * second), None);
    }
}
