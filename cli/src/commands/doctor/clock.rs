//! Points are asked for by time, so the clocks must be right. The order of writes never depends on them.

use super::Section;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Before this program was written, or when nobody needs it any more: the clock is not set.
const SANE_FROM_S: u64 = 1_750_000_000;
const SANE_TO_S: u64 = 4_102_444_800;

pub(super) fn section() -> Section {
    let mut section = Section::new("clock");
    time(&mut section, SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
    synchronised(&mut section, asked());
    section
}

fn time(section: &mut Section, now: Duration) {
    let shown = varve_common::control::show_time(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX));
    if (SANE_FROM_S..SANE_TO_S).contains(&now.as_secs()) {
        section.ok("time", shown);
    } else {
        section.fail(
            "time",
            format!("{shown}, which cannot be"),
            "points are found by time, and join tokens expire by it",
            "set the clock (timedatectl set-time, or start a time service)",
        );
    }
}

/// What the kernel says of its clock (`adjtimex`), through systemd: this crate has no unsafe code. `None`: nobody said.
fn asked() -> Option<bool> {
    let output = Command::new("timedatectl").args(["show", "--property=NTPSynchronized", "--value"]).output().ok()?;
    match String::from_utf8_lossy(&output.stdout).trim() {
        "yes" => Some(true),
        "no" => Some(false),
        _ => None,
    }
}

fn synchronised(section: &mut Section, answer: Option<bool>) {
    let why = "points are found by the time at the production host: a clock that drifts finds others than meant";
    match answer {
        Some(true) => section.ok("synchronised", "yes"),
        Some(false) => {
            section.warn("synchronised", "no time service keeps it right", why, "start chrony or systemd-timesyncd")
        }
        None => section.warn(
            "synchronised",
            "not known: timedatectl does not say",
            why,
            "check that chrony or another time service runs",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn a_clock_that_was_never_set_fails() {
        let mut section = Section::new("clock");
        time(&mut section, Duration::from_secs(12));
        time(&mut section, Duration::from_secs(1_800_000_000));
        synchronised(&mut section, Some(false));
        synchronised(&mut section, Some(true));
        synchronised(&mut section, None);
        let levels: Vec<Level> = section.checks.iter().map(|check| check.result).collect();
        assert_eq!(levels, [Level::Fail, Level::Ok, Level::Warn, Level::Ok, Level::Warn]);
    }
}
