//! `varve doctor`: what can be wrong with this host, and what to do about it.
//!
//! - [`host`]: kernel, BPF, memory (as `varve_bpf::doctor` sees them)
//! - [`clock`], [`network`], [`daemons`], [`disk`], [`config`]: one section each

mod clock;
mod config;
mod daemons;
mod disk;
mod host;
mod network;

use crate::context::{Context, DONE, FAILED, Outcome};
use serde::Serialize;

const EXAMPLE: &str = "Example:
  varve doctor
  varve doctor --json | jq '.checks[] | select(.result != \"ok\")'

Exit codes: 0 nothing failed (there may be warnings), 1 something failed";

/// Looks at kernel, clock, ports, daemons, disks and configuration. Changes nothing.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Check {
    section: &'static str,
    name: String,
    result: Level,
    /// What was found.
    found: String,
    /// Why it matters.
    why: String,
    /// What to do; empty if there is nothing to do.
    next: String,
}

#[derive(Serialize)]
struct Report {
    checks: Vec<Check>,
    warned: usize,
    failed: usize,
}

/// Makes the checks of one section.
struct Section {
    name: &'static str,
    checks: Vec<Check>,
}

impl Section {
    fn new(name: &'static str) -> Self {
        Self { name, checks: Vec::new() }
    }

    fn ok(&mut self, name: &str, found: impl Into<String>) {
        self.add(Level::Ok, name, found, "", "");
    }

    fn warn(&mut self, name: &str, found: impl Into<String>, why: impl Into<String>, next: impl Into<String>) {
        self.add(Level::Warn, name, found, why, next);
    }

    fn fail(&mut self, name: &str, found: impl Into<String>, why: impl Into<String>, next: impl Into<String>) {
        self.add(Level::Fail, name, found, why, next);
    }

    fn add(
        &mut self,
        result: Level,
        name: &str,
        found: impl Into<String>,
        why: impl Into<String>,
        next: impl Into<String>,
    ) {
        self.checks.push(Check {
            section: self.name,
            name: name.to_owned(),
            result,
            found: found.into(),
            why: why.into(),
            next: next.into(),
        });
    }
}

pub(crate) fn run(context: &Context, _: &Args) -> Outcome {
    context.need_root()?;
    let sections = [
        host::section(context),
        clock::section(),
        network::section(context),
        daemons::section(context),
        disk::section(context),
        config::section(context),
    ];
    let checks: Vec<Check> = sections.into_iter().flat_map(|section| section.checks).collect();
    let count = |level| checks.iter().filter(|check| check.result == level).count();
    let report = Report { warned: count(Level::Warn), failed: count(Level::Fail), checks };
    context.answer(&report, text_of);
    Ok(if report.failed == 0 { DONE } else { FAILED })
}

fn text_of(report: &Report) -> String {
    let mut lines = Vec::new();
    let mut section = "";
    for check in &report.checks {
        if section != check.section {
            section = check.section;
            lines.push(section.to_owned());
        }
        let result = match check.result {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        lines.push(format!("  {result:<4}  {}: {}", check.name, check.found));
        if check.result != Level::Ok {
            lines.push(format!("        why:  {}", check.why));
            lines.push(format!("        next: {}", check.next));
        }
    }
    lines.push(match (report.failed, report.warned) {
        (0, 0) => "everything that was looked at is well".to_owned(),
        (failed, warned) => format!("{failed} failed, {warned} to look at"),
    });
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_says_why_and_what_to_do() {
        let mut section = Section::new("clock");
        section.ok("time", "2026");
        section.fail("kernel", "4.19", "it has no ring buffer", "use 5.19 or newer");
        let report = Report { checks: section.checks, warned: 0, failed: 1 };
        let expected = "clock
  ok    time: 2026
  FAIL  kernel: 4.19
        why:  it has no ring buffer
        next: use 5.19 or newer
1 failed, 0 to look at
";
        assert_eq!(text_of(&report), expected);
    }
}
