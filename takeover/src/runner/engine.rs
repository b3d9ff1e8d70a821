//! A run that has the lock: forwards and backwards.

use super::back::{bubble_stays, left};
use crate::bubble::{self, Bubble};
use crate::proc;
use crate::report::{Outcome, Progress, Report, StepOutcome, StepReport};
use crate::state::{Mode, Phase, State, Status, Store};
use crate::step::{Action, Found, StepError, Work, end_leftovers};
use crate::tools::Tools;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use varve_common::problem::Problem;

/// A moment of a step; for tests that end the process there.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Nothing is noted, nothing done.
    Before,
    /// Noted as begun.
    Noted,
    /// Done, and not noted.
    Acted,
    /// Noted as done.
    After,
}

pub(super) type Trap = Box<dyn Fn(usize, Moment)>;

/// A run that has the lock.
pub(super) struct Engine<'a> {
    pub(super) store: Store,
    pub(super) state: State,
    /// Of a test.
    pub(super) bubble: Option<Bubble>,
    pub(super) tools: &'a Tools,
    pub(super) cancel: &'a AtomicBool,
    pub(super) trap: Option<&'a Trap>,
    pub(super) resume: &'a str,
    pub(super) undo: &'a str,
}

impl Engine<'_> {
    pub(super) fn save(&self) -> Result<(), Problem> {
        self.store.save(&self.state)
    }

    fn moment(&self, place: usize, moment: Moment) {
        if let Some(trap) = self.trap {
            trap(place + 1, moment);
        }
    }

    fn work(&self, place: usize) -> Result<Work<'_>, StepError> {
        let timeout = Duration::from_millis(self.state.steps[place].timeout_ms);
        let no_file = |error| StepError::new(format!("what its programs print cannot be kept: {error}"));
        Ok(Work {
            number: place + 1,
            run: self.state.run.clone(),
            test: self.state.mode == Mode::Test,
            deadline: Instant::now() + timeout,
            timeout,
            cancel: self.cancel,
            tools: self.tools,
            output: self.store.output(place + 1).map_err(no_file)?,
            child: self.store.child().map_err(no_file)?,
            variables: &self.state.variables,
        })
    }

    /// Does something for a step where it belongs: inside the bubble or not.
    fn at<T: Send>(
        &self,
        action: &Action,
        place: usize,
        what: impl FnOnce(&Work<'_>) -> Result<T, StepError> + Send,
    ) -> Result<T, StepError> {
        let work = self.work(place)?;
        match &self.bubble {
            Some(bubble) if action.is_inside() => {
                bubble.enter(|| what(&work)).unwrap_or_else(|why| Err(StepError::new(why)))
            }
            _ => what(&work),
        }
    }

    pub(super) fn forwards(&mut self, progress: &mut dyn FnMut(&Progress)) -> Result<Report, Problem> {
        let began = Instant::now();
        let total = self.state.steps.len();
        let mut steps: Vec<StepReport> = Vec::new();
        let mut problem = None;
        for place in 0..total {
            if problem.is_some() {
                steps.push(self.told(place, StepOutcome::NotReached, 0.0, String::new(), None));
                continue;
            }
            let (name, what) = (self.state.steps[place].name.clone(), self.wanted(place).text());
            progress(&Progress::Begins { number: place + 1, total, name, what, undo: false });
            let at = Instant::now();
            let result = match self.cancel.load(Ordering::Relaxed) {
                true => Err(StepError::new("the operator stopped it")),
                false => self.forward(place),
            };
            let seconds = at.elapsed().as_secs_f64();
            let report = match result {
                Ok((outcome, detail)) => self.told(place, outcome, seconds, detail, None),
                Err(error) => {
                    problem = Some(self.stopped(place, &error));
                    self.told(place, StepOutcome::Failed, seconds, error.why, error.output)
                }
            };
            self.state.steps[place].outcome = Some(report.outcome);
            self.state.steps[place].seconds = seconds;
            self.state.phase = if problem.is_some() { Phase::Stopped } else { Phase::Running };
            self.save()?;
            if problem.is_none() {
                self.moment(place, Moment::After);
            }
            progress(&Progress::Ended(report.clone()));
            steps.push(report);
        }
        if problem.is_none() {
            self.state.phase = Phase::Done;
            self.state.boot = proc::boot_id();
            self.save()?;
        }
        Ok(self.report(steps, began, problem))
    }

    /// What the step is to become. While it is in doubt, the state has what it was when it was done.
    fn wanted(&self, place: usize) -> &Action {
        let step = &self.state.steps[place];
        step.wanted.as_ref().unwrap_or(&step.action)
    }

    fn forward(&mut self, place: usize) -> Result<(StepOutcome, String), StepError> {
        self.moment(place, Moment::Before);
        let wanted = self.wanted(place).clone();
        if let Action::Nothing { why } = &wanted {
            self.done(place);
            return Ok((StepOutcome::Skipped, why.clone()));
        }
        if let Some(in_place) = self.already(place, &wanted)? {
            self.done(place);
            return Ok((StepOutcome::InPlace, in_place));
        }
        let made = wanted.to_make();
        let step = &mut self.state.steps[place];
        (step.action, step.wanted, step.status) = (wanted.clone(), None, Status::Begun);
        // It may have been there once and be gone since: what is made now is ours to take back.
        step.found = false;
        // What an earlier try made stays ours.
        step.made.extend(made);
        self.save().map_err(|problem| StepError::new(format!("{problem}")))?;
        self.moment(place, Moment::Noted);
        let detail = self.at(&wanted, place, |work| wanted.apply(work))?;
        self.moment(place, Moment::Acted);
        self.done(place);
        Ok((StepOutcome::Done, detail))
    }

    /// With the boot of its own: a later step may fail, and this one is not to be done again in the same boot.
    fn done(&mut self, place: usize) {
        let step = &mut self.state.steps[place];
        (step.status, step.boot) = (Status::Done, proc::boot_id());
    }

    /// Whether the step need not be done; if it must, nothing of an earlier try is in its way any more.
    fn already(&mut self, place: usize, wanted: &Action) -> Result<Option<String>, StepError> {
        let (status, old) = (self.state.steps[place].status, self.state.steps[place].action.clone());
        if status == Status::Begun {
            end_leftovers(&self.work(place)?)?;
        }
        let touched = matches!(status, Status::Begun | Status::Done);
        if touched && old != *wanted {
            // The devices have other numbers, or a step that failed was corrected.
            self.take_back(place)?;
        }
        match (self.at(wanted, place, |work| wanted.probe(work))?, status) {
            (Found::Yes, Status::Begun | Status::Done) if old == *wanted => {
                self.at(wanted, place, |work| {
                    wanted.refresh(work);
                    Ok(())
                })?;
                Ok(Some("still there".to_owned()))
            }
            (Found::Yes, _) => {
                self.state.steps[place].found = true;
                Ok(Some("it was there before".to_owned()))
            }
            (Found::Unknown, Status::Done) if old == *wanted && self.state.boot_of(place) == proc::boot_id() => {
                Ok(Some("it was run".to_owned()))
            }
            (Found::Unknown, Status::Begun) if old == *wanted => {
                // Nobody knows how far it got.
                self.take_back(place)?;
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    /// Takes a step back as it was done.
    fn take_back(&mut self, place: usize) -> Result<String, StepError> {
        let step = &self.state.steps[place];
        let (action, made) = (step.action.clone(), step.made.clone());
        if step.found {
            return Ok(String::new());
        }
        self.at(&action, place, |work| action.undo(work, &made))
    }

    fn stopped(&self, place: usize, error: &StepError) -> Problem {
        let (name, number) = (&self.state.steps[place].name, place + 1);
        let what = format!("step {number} '{name}' of the takeover of group '{}' failed", self.state.group);
        let first = error.next.as_ref().map(|next| format!("{next}; then ")).unwrap_or_default();
        let next = match self.state.mode {
            Mode::Live => {
                format!("{first}'{}' goes on with this step, '{}' takes everything back", self.resume, self.undo)
            }
            Mode::Test => format!("{first}'{}' takes the test back", self.undo),
        };
        Problem::failed(what, error.why.clone(), next)
    }

    fn told(
        &self,
        place: usize,
        outcome: StepOutcome,
        seconds: f64,
        detail: String,
        output: Option<String>,
    ) -> StepReport {
        let step = &self.state.steps[place];
        let (name, kind, what) = (step.name.clone(), step.kind.clone(), self.wanted(place).text());
        StepReport { number: place + 1, name, kind, outcome, seconds, what, detail, output }
    }

    fn report(&self, steps: Vec<StepReport>, began: Instant, problem: Option<Problem>) -> Report {
        let outcome = if problem.is_none() { Outcome::Done } else { Outcome::Stopped };
        let good = |step: &&StepReport| step.kind == "check" && step.outcome == StepOutcome::Done;
        let checks = steps.iter().filter(good).count();
        let since: Option<jiff::Timestamp> = self.state.began.parse().ok();
        let rto = since.map(|since| jiff::Timestamp::now().duration_since(since).as_secs_f64().max(0.0));
        Report {
            group: self.state.group.clone(),
            mode: self.state.mode,
            point: self.state.point.clone(),
            plan: self.state.plan.clone(),
            outcome,
            began: self.state.began.clone(),
            rto_seconds: rto.filter(|_| outcome == Outcome::Done),
            seconds: began.elapsed().as_secs_f64(),
            checks,
            steps,
            left: left(&self.state),
            problem,
        }
    }

    pub(super) fn backwards(&mut self, dir: &Path, progress: &mut dyn FnMut(&Progress)) -> Result<Report, Problem> {
        let began = Instant::now();
        self.state.phase = Phase::Undoing;
        self.save()?;
        let mut steps = self.pass_back(progress)?;
        if self.state.mode == Mode::Test {
            let numbers: Vec<_> =
                self.state.devices.iter().filter_map(|device| proc::device_numbers(&device.device)).collect();
            let run = self.state.run.clone();
            proc::end_all(|| proc::marked(&run, None), Duration::from_secs(2));
            bubble::destroy(dir, &numbers).map_err(|why| bubble_stays(&self.state.group, why))?;
            self.bubble = None;
            if steps.iter().any(|step| step.outcome == StepOutcome::UndoFailed) {
                // What was in the bubble's way is gone with it.
                steps = self.pass_back(progress)?;
            }
            let _ = std::fs::remove_dir(dir.parent().unwrap_or(dir));
        }
        let failed: Vec<&StepReport> = steps.iter().filter(|step| step.outcome == StepOutcome::UndoFailed).collect();
        let problem = (!failed.is_empty()).then(|| {
            let what: Vec<String> = failed.iter().map(|step| format!("step {} '{}'", step.number, step.name)).collect();
            let why: Vec<String> = failed.iter().map(|step| format!("'{}': {}", step.name, step.detail)).collect();
            let what = format!("of the takeover of group '{}', not taken back: {}", self.state.group, what.join(", "));
            Problem::failed(what, why.join("; "), format!("see to that, then '{}' again", self.undo))
        });
        match &problem {
            None => self.store.forget()?,
            Some(_) => self.save()?,
        }
        let outcome = if problem.is_none() { Outcome::Undone } else { Outcome::UndoIncomplete };
        let report = self.report(steps, began, problem);
        Ok(Report { outcome, rto_seconds: None, ..report })
    }

    /// Takes back every step that is not taken back yet, the last first.
    fn pass_back(&mut self, progress: &mut dyn FnMut(&Progress)) -> Result<Vec<StepReport>, Problem> {
        let total = self.state.steps.len();
        let mut steps = Vec::new();
        for place in (0..total).rev() {
            let step = &self.state.steps[place];
            let action = step.action.clone();
            if !matches!(step.status, Status::Begun | Status::Done) || matches!(action, Action::Nothing { .. }) {
                continue;
            }
            let at = Instant::now();
            let (outcome, detail, output) = if step.found {
                (StepOutcome::LeftAsFound, "it was there before".to_owned(), None)
            } else {
                let (name, what) = (step.name.clone(), action.undo_text().unwrap_or_default());
                if action.has_undo() {
                    progress(&Progress::Begins { number: place + 1, total, name, what, undo: true });
                }
                self.moment(place, Moment::Before);
                match self.back(place, &action) {
                    Ok(detail) => (StepOutcome::Undone, detail, None),
                    Err(error) => (StepOutcome::UndoFailed, error.why, error.output),
                }
            };
            self.moment(place, Moment::Acted);
            if outcome != StepOutcome::UndoFailed {
                self.state.steps[place].status = Status::Undone;
            }
            self.save()?;
            self.moment(place, Moment::After);
            let what = action.undo_text().unwrap_or_else(|| "nothing to take back".to_owned());
            let report = self.told(place, outcome, at.elapsed().as_secs_f64(), detail, output);
            let report = StepReport { what, ..report };
            if action.has_undo() || outcome == StepOutcome::UndoFailed {
                progress(&Progress::Ended(report.clone()));
                steps.push(report);
            }
        }
        Ok(steps)
    }

    fn back(&mut self, place: usize, action: &Action) -> Result<String, StepError> {
        // Of a step that was killed, or whose undo was.
        end_leftovers_unless_program(action, &self.work(place)?, self.state.steps[place].status)?;
        if self.state.mode == Mode::Test && self.bubble.is_none() && action.is_inside() {
            return Ok("gone with the bubble".to_owned());
        }
        self.take_back(place)
    }
}

/// A program that a test runs is ended by its own undo; daemons that a finished command left are ended by the command's.
fn end_leftovers_unless_program(action: &Action, work: &Work<'_>, status: Status) -> Result<(), StepError> {
    if status != Status::Begun || matches!(action, Action::Program { .. }) {
        return Ok(());
    }
    end_leftovers(work).map(drop)
}
