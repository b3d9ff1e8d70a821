//! Taking back without the plan, cleaning up, where a takeover stands.

use super::engine::{Engine, Trap};
use crate::bubble::{self, Bubble};
use crate::report::{Progress, Report};
use crate::state::{Mode, Phase, State, Status, StepState, Store, load, store_dir};
use crate::tools::Tools;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use varve_common::control::PointReply;
use varve_common::paths::Paths;
use varve_common::problem::{Problem, ProblemKind, check_name};

/// What is to be taken back, without the plan: its file may be gone.
#[derive(Clone, Debug)]
pub struct Undo {
    /// Where everything is.
    pub paths: Paths,
    /// The group.
    pub group: String,
    /// The takeover or the test.
    pub mode: Mode,
    /// Where the system's programs are.
    pub tools: Tools,
    /// The command that does this, to suggest again.
    pub command: String,
}

/// Takes back what a run did, as it was done; neither the plan nor the devices are needed. See
/// [`super::Runner::undo`].
///
/// # Errors
/// As [`super::Runner::undo`]; kind `NotFound` if there is nothing to take back.
pub fn undo(undo: &Undo, progress: &mut dyn FnMut(&Progress)) -> Result<Report, Problem> {
    undo_with(undo, Arc::default(), None, progress)
}

/// Takes away what an earlier test of the group left, however it ended: steps, processes, mounts, namespaces, links.
/// `None`: there was nothing.
///
/// # Errors
/// Something cannot be taken away, or a test is being run.
pub fn clean(paths: &Paths, group: &str, tools: &Tools) -> Result<Option<Report>, Problem> {
    check_name("group", group)?;
    let undoing = Undo {
        paths: paths.clone(),
        group: group.to_owned(),
        mode: Mode::Test,
        tools: tools.clone(),
        command: "try again".to_owned(),
    };
    match undo(&undoing, &mut |_| {}) {
        Ok(report) => match report.problem.clone() {
            Some(problem) => Err(problem),
            None => Ok(Some(report)),
        },
        Err(problem) if problem.kind == ProblemKind::NotFound => {
            // Killed before it could be noted, or between the last note and the last removal.
            let _store = Store::open(paths, group, Mode::Test)?;
            match bubble::destroy(&paths.takeover_bubble(group), &[]) {
                Ok(_) => Ok(None),
                Err(why) => Err(bubble_stays(group, why)),
            }
        }
        Err(problem) => Err(problem),
    }
}

pub(super) fn bubble_stays(group: &str, why: String) -> Problem {
    let what = format!("the bubble of a test of group '{group}' cannot be taken away");
    Problem::failed(what, why, "see to that, then try again")
}

/// Where a takeover or test of a group stands, for status; `None`: there is none. Nothing is locked or touched.
///
/// # Errors
/// The state is there and cannot be read.
pub fn standing(paths: &Paths, group: &str, mode: Mode) -> Result<Option<Standing>, Problem> {
    let Some(state) = load(&store_dir(paths, group, mode).join("state.json"))? else { return Ok(None) };
    Ok(Some(Standing {
        phase: state.phase,
        began: state.began.clone(),
        point: state.point.clone(),
        done: state.steps.iter().filter(|step| step.status == Status::Done).count(),
        total: state.steps.len(),
        left: left(&state),
    }))
}

/// Where a takeover stands.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Standing {
    /// How far it is.
    pub phase: Phase,
    /// When it began, RFC 3339.
    pub began: String,
    /// The point.
    pub point: PointReply,
    /// Steps that are done.
    pub done: usize,
    /// Steps of the plan.
    pub total: usize,
    /// What is in place because of it, in words.
    pub left: Vec<String>,
}

/// What is in place because of the run.
pub(super) fn left(state: &State) -> Vec<String> {
    let there = |step: &&StepState| matches!(step.status, Status::Begun | Status::Done) && !step.found;
    let words = |step: &StepState| {
        let words = step.action.left_text()?;
        Some(if step.status == Status::Begun { format!("{words} (perhaps: the step did not end)") } else { words })
    };
    state.steps.iter().filter(there).filter_map(words).collect()
}

pub(super) fn undo_with(
    undoing: &Undo,
    cancel: Arc<AtomicBool>,
    trap: Option<&Trap>,
    progress: &mut dyn FnMut(&Progress),
) -> Result<Report, Problem> {
    let store = Store::open(&undoing.paths, &undoing.group, undoing.mode)?;
    let Some(state) = store.load()? else {
        let what = format!("there is no takeover of group '{}' to take back", undoing.group);
        return Err(Problem::not_found(what, "nothing of it is in place on this host", "nothing is to be done"));
    };
    let dir = undoing.paths.takeover_bubble(&undoing.group);
    let bubble = Some(undoing.mode).filter(|mode| *mode == Mode::Test).and_then(|_| Bubble::open(&dir));
    let mut engine = Engine {
        store,
        state,
        bubble,
        tools: &undoing.tools,
        cancel: &cancel,
        trap,
        resume: &undoing.command,
        undo: &undoing.command,
    };
    engine.backwards(&dir, progress)
}
