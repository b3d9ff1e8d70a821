//! What the last drill of a group showed: which point came up, and how long it took. Kept for status and metrics. And
//! whose the test is that is in place: a killed drill's, or an operator's.

use crate::report::{Outcome, Report, StepReport};
use crate::state::Mode;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;
use varve_common::control::{DrillStatus, DrillVerified, PointReply};
use varve_common::paths::Paths;
use varve_common::problem::Problem;
use varve_io::crashsafe::{create_dir_all_durable, remove_durable, write_atomic};
use varve_io::{DirLock, IoError};

const VERSION: u32 = 1;
const RECORD_BYTES_MAX: u64 = 16 << 20;

/// What is remembered of a group's drills.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrillRecord {
    /// Of this format.
    pub version: u32,
    /// The group.
    pub group: String,
    /// Drills that were run.
    pub runs: u64,
    /// Drills that failed.
    pub failures: u64,
    /// The last one.
    pub last: Drill,
    /// The last one in which every step was done and at least one check was good.
    pub verified: Option<Verified>,
}

/// One drill.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drill {
    /// When it began, RFC 3339.
    pub began: String,
    /// The exact point.
    pub point: PointReply,
    /// How it ended.
    pub outcome: Outcome,
    /// From its begin until every step was done.
    pub rto_seconds: Option<f64>,
    /// Checks that were good.
    pub checks: usize,
    /// Every step.
    pub steps: Vec<StepReport>,
    /// Why it failed.
    pub problem: Option<Problem>,
}

/// The newest proof that a point comes up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verified {
    /// When that was, RFC 3339.
    pub at: String,
    /// The exact point.
    pub point: PointReply,
    /// How long it took.
    pub rto_seconds: f64,
}

fn file(paths: &Paths, group: &str) -> PathBuf {
    paths.takeover_state(group).join("drill.json")
}

impl DrillRecord {
    /// What is remembered; `None` if there was no drill.
    ///
    /// # Errors
    /// It is there and cannot be read.
    pub fn load(paths: &Paths, group: &str) -> Result<Option<Self>, Problem> {
        let file = file(paths, group);
        let bad = |why: String| {
            let what = format!("the record of drills {} cannot be read", file.display());
            Problem::failed(what, why, "remove the file; the next drill begins a new one")
        };
        match std::fs::metadata(&file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(bad(error.to_string())),
            Ok(facts) if facts.len() > RECORD_BYTES_MAX => return Err(bad("it is too large".to_owned())),
            Ok(_) => {}
        }
        let text = std::fs::read(&file).map_err(|error| bad(error.to_string()))?;
        let record: Self = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
        if record.version != VERSION {
            return Err(bad(format!("it has version {}, this program knows {VERSION}", record.version)));
        }
        Ok(Some(record))
    }

    /// As `varve status` shows it.
    pub fn status(&self) -> DrillStatus {
        let verified = |verified: &Verified| DrillVerified {
            at: verified.at.clone(),
            point: verified.point.time.clone(),
            rto_seconds: verified.rto_seconds,
        };
        DrillStatus {
            began: self.last.began.clone(),
            good: self.last.outcome == Outcome::Done,
            runs: self.runs,
            failures: self.failures,
            verified: self.verified.as_ref().map(verified),
        }
    }

    /// Remembers a drill: the report of a test's run. A record that cannot be read is begun anew: a drill must not fail
    /// for it.
    ///
    /// # Errors
    /// It cannot be written, or the report is none of a test.
    pub fn remember(paths: &Paths, report: &Report) -> Result<Self, Problem> {
        if report.mode != Mode::Test || !matches!(report.outcome, Outcome::Done | Outcome::Stopped) {
            let what = format!("a run for group '{}' is no drill", report.group);
            return Err(Problem::usage(
                what,
                "only the run of a test proves something",
                "hand in the report of a test",
            ));
        }
        let old = Self::load(paths, &report.group).ok().flatten();
        let (runs, failures) = old.as_ref().map_or((0, 0), |old| (old.runs, old.failures));
        let verified = match report.rto_seconds {
            Some(rto_seconds) if report.outcome == Outcome::Done && report.checks > 0 => {
                Some(Verified { at: report.began.clone(), point: report.point.clone(), rto_seconds })
            }
            _ => old.and_then(|old| old.verified),
        };
        let record = Self {
            version: VERSION,
            group: report.group.clone(),
            runs: runs + 1,
            failures: failures + u64::from(report.outcome != Outcome::Done),
            last: Drill {
                began: report.began.clone(),
                point: report.point.clone(),
                outcome: report.outcome,
                rto_seconds: report.rto_seconds,
                checks: report.checks,
                steps: report.steps.clone(),
                problem: report.problem.clone(),
            },
            verified,
        };
        record.save(paths)?;
        Ok(record)
    }

    fn save(&self, paths: &Paths) -> Result<(), Problem> {
        let file = file(paths, &self.group);
        let failed = |why: String| {
            let what = format!("the drill of group '{}' cannot be remembered", self.group);
            Problem::failed(what, why, format!("make room for {}", file.display()))
        };
        let text = serde_json::to_vec_pretty(self).map_err(|error| failed(error.to_string()))?;
        create_dir_all_durable(paths.takeover_state(&self.group)).map_err(|error| failed(error.chain()))?;
        write_atomic(&file, &text, 0o600).map_err(|error| failed(error.chain()))
    }
}

/// A drill that is under way: a lock, which ends with the process in any way, and a file, which stays until the drill has
/// cleaned up. So a test that is in place without the file is nobody's but an operator's, and is left alone.
#[derive(Debug)]
pub struct DrillMark {
    file: PathBuf,
    _lock: DirLock,
}

fn mark_dir(paths: &Paths, group: &str) -> PathBuf {
    paths.takeover_state(group).join("drill")
}

const MARK: &str = "begun";

impl DrillMark {
    /// Only one drill of a group at a time.
    ///
    /// # Errors
    /// Kind `Refused`: another one is being run. Else the lock cannot be made.
    pub fn open(paths: &Paths, group: &str) -> Result<Self, Problem> {
        let what = format!("the drill of group '{group}' was not begun");
        let failed = |error: IoError| {
            if error.is_busy() {
                let why = format!("another one is being run: {}", error.source_io());
                return Problem::refused(what.clone(), why, "wait for it, or end it, then try again");
            }
            Problem::failed(what.clone(), error.chain(), "see to that, then try again")
        };
        let dir = mark_dir(paths, group);
        create_dir_all_durable(&dir).map_err(failed)?;
        let lock = DirLock::acquire(&dir).map_err(failed)?;
        Ok(Self { file: dir.join(MARK), _lock: lock })
    }

    /// Whether an earlier drill did not clean up: what is in place may be its own.
    pub fn is_set(&self) -> bool {
        // What cannot be looked at is taken for an operator's.
        self.file.try_exists().unwrap_or(false)
    }

    /// Durably, before the drill makes anything.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn set(&self) -> Result<(), Problem> {
        write_atomic(&self.file, b"", 0o600).map_err(|error| unmarked(&error))
    }

    /// Nothing of the drill is left.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn clear(&self) -> Result<(), Problem> {
        remove_durable(&self.file).map_err(|error| unmarked(&error))
    }

    /// An operator's test begins, and nothing of a drill is in place: what a killed one noted must not make it a drill's.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn forget(paths: &Paths, group: &str) -> Result<(), Problem> {
        remove_durable(mark_dir(paths, group).join(MARK)).map_err(|error| unmarked(&error))
    }
}

fn unmarked(error: &IoError) -> Problem {
    let what = "whose a test is cannot be noted";
    Problem::failed(what, error.chain(), "see to that, then try again")
}

/// A drop-in for `varve-drill@GROUP.timer` that runs a drill so often, in place of daily:
/// `/etc/systemd/system/varve-drill@GROUP.timer.d/every.conf`.
pub fn timer_drop_in(every: Duration) -> String {
    let seconds = every.as_secs().max(60);
    format!("[Timer]\nOnCalendar=\nOnActiveSec=15min\nOnUnitActiveSec={seconds}s\n")
}
