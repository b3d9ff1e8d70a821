//! Programs: those that end, and (in a test) those that stay.

use super::{Found, StepError, Work};
use crate::{proc, process};
use std::time::Duration;

const GRACE: Duration = Duration::from_secs(5);

pub(super) fn probe(work: &Work<'_>, done_if: Option<&[String]>) -> Result<Found, StepError> {
    let Some(words) = done_if else { return Ok(Found::Unknown) };
    Ok(if process::run(work, words)?.status.success() { Found::Yes } else { Found::No })
}

pub(super) fn apply(work: &Work<'_>, run: &[String]) -> Result<String, StepError> {
    process::run_ok(work, run).map(|_| String::new())
}

pub(super) fn undo(work: &Work<'_>, undo: &[String]) -> Result<String, StepError> {
    if undo.is_empty() {
        return Ok("the plan says that there is nothing to take back".to_owned());
    }
    process::run_ok(work, undo).map(|_| String::new())
}

pub(super) fn probe_program(work: &Work<'_>) -> Found {
    if proc::marked(&work.run, Some(work.number)).is_empty() { Found::No } else { Found::Yes }
}

pub(super) fn apply_program(work: &Work<'_>, run: &[String]) -> Result<String, StepError> {
    process::start(work, run).map(|pid| format!("process {pid}"))
}

pub(super) fn undo_program(work: &Work<'_>) -> Result<String, StepError> {
    end_leftovers(work)
}

/// Ends what a step started and a killed run left.
pub(crate) fn end_leftovers(work: &Work<'_>) -> Result<String, StepError> {
    let note = work.noted_child();
    let find = || {
        let mut pids = proc::marked(&work.run, Some(work.number));
        // A program may have thrown its environment away; its group is still the one it was started in.
        if let Some(note) = &note {
            pids.extend(proc::of_group(note.pid.cast_signed(), note.started));
        }
        pids
    };
    let left = proc::end_all(find, GRACE.min(work.time_left()));
    match left.first() {
        None => Ok(String::new()),
        Some(pid) => Err(StepError::new(format!("{} cannot be ended", proc::name(*pid)))),
    }
}
