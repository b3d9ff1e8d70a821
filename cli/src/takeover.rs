//! The takeover plan of a group as the commands run it that take over, test and drill.

use crate::client::Daemon;
use crate::context::{Context, note, print_json_meanwhile};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use varve_common::control::{PointReply, ViewVolume};
use varve_common::problem::{Problem, ProblemKind};
use varve_takeover::{
    Commands, Context as PlanContext, Device, DrillMark, Mode, Outcome, Plan, Progress, Report, Runner, Tools, Undo,
    standing,
};

/// The plan of a group, if it has one.
pub(crate) fn plan(context: &Context, group: &str) -> Result<Option<Plan>, Problem> {
    match Plan::load(context.paths.takeover_plan(group)) {
        Err(problem) if problem.kind == ProblemKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// Whether the plan can be meant for the group: before anything is changed.
pub(crate) fn fits(context: &Context, group: &str, plan: &Plan) -> Result<(), Problem> {
    let volumes: Vec<String> = to_be(context, group)?.into_iter().map(|device| device.volume).collect();
    plan.check(&volumes).into_iter().next().map_or(Ok(()), Err)
}

/// The group's volumes where a takeover will serve them: links that are the same after every start.
pub(crate) fn to_be(context: &Context, group: &str) -> Result<Vec<Device>, Problem> {
    let link = |number: usize| context.paths.run_dir().join("views").join(format!("{group}-{number}"));
    let volumes = Daemon::Receiver.group(context, group)?.volumes;
    let device = |(number, volume): (usize, varve_common::control::VolumeStatus)| Device {
        volume: volume.path,
        device: link(number),
        bytes: volume.bytes,
    };
    Ok(volumes.into_iter().enumerate().map(device).collect())
}

/// The devices that are served.
pub(crate) fn served(volumes: &[ViewVolume]) -> Vec<Device> {
    let device = |volume: &ViewVolume| {
        let device = volume.device.as_ref().map(PathBuf::from)?;
        Some(Device { volume: volume.path.clone(), device, bytes: volume.bytes })
    };
    volumes.iter().filter_map(device).collect()
}

/// What runs the plan on these devices.
pub(crate) fn runner(
    context: &Context,
    plan: Plan,
    group: &str,
    mode: Mode,
    point: PointReply,
    devices: Vec<Device>,
    began: SystemTime,
) -> Result<Runner, Problem> {
    let commands = Commands {
        resume: resume_command(context, group),
        undo: abort_command(context, group),
        undo_plan: undo_plan_command(context, group),
    };
    let (group, paths, tools) = (group.to_owned(), context.paths.clone(), Tools::default());
    Runner::new(plan, PlanContext { group, point, devices, mode, paths, began, tools, commands })
}

pub(crate) fn resume_command(context: &Context, group: &str) -> String {
    context.suggest(&format!("failover {group} --resume"))
}

pub(crate) fn abort_command(context: &Context, group: &str) -> String {
    context.suggest(&format!("failover abort {group}"))
}

pub(crate) fn undo_plan_command(context: &Context, group: &str) -> String {
    context.suggest(&format!("plan undo {group}"))
}

/// Refuses to begin while something of an earlier run of the plan is in place: the run would refuse as well, but only when
/// the takeover is made and the source fenced off.
pub(crate) fn none_left(context: &Context, group: &str, mode: Mode) -> Result<(), Problem> {
    let Some(run) = standing(&context.paths, group, mode)? else { return Ok(()) };
    let takeover = Daemon::Receiver.group(context, group)?.history.and_then(|history| history.takeover);
    let its_own = takeover.filter(|takeover| takeover.test == (mode == Mode::Test));
    let (resume, abort) = (resume_command(context, group), abort_command(context, group));
    let undo_plan = undo_plan_command(context, group);
    let (why, next) = match (mode, its_own) {
        (Mode::Test, _) => {
            let why = format!("a test of it, of {}, is in place", run.began);
            (why, format!("'{abort}' ends it; then try again"))
        }
        (Mode::Live, Some(takeover)) => {
            let why = format!("one that began at {} is in place", run.began);
            let back = if takeover.committed { undo_plan } else { abort };
            (why, format!("'{resume}' goes on with its plan, '{back}' takes it back"))
        }
        (Mode::Live, None) => {
            let why = format!("what the plan did for an earlier one, of {}, is not taken back", run.began);
            (why, format!("'{undo_plan}' takes it back; then try again"))
        }
    };
    Err(Problem::refused(format!("the takeover of group '{group}' was not begun"), why, next))
}

/// A test that is begun now is an operator's, whatever a killed drill noted. While one is in place nothing is changed: it
/// may be that drill's, and the receiver refuses a second one.
pub(crate) fn claim_test(context: &Context, group: &str) -> Result<(), Problem> {
    let takeover = Daemon::Receiver.group(context, group)?.history.and_then(|history| history.takeover);
    match takeover {
        Some(_) => Ok(()),
        None => DrillMark::forget(&context.paths, group),
    }
}

/// Shows each step when it has ended: on standard error for people, as a line of JSON for scripts.
pub(crate) fn show(json: bool) -> impl FnMut(&Progress) {
    move |progress| match progress {
        _ if json => print_json_meanwhile(&serde_json::json!({ "step": progress })),
        Progress::Ended(step) => note(&format!("  {step}")),
        Progress::Begins { .. } => {}
    }
}

/// Takes back what a plan has done; `None`: there is nothing.
pub(crate) fn take_back(context: &Context, group: &str, mode: Mode) -> Result<Option<Report>, Problem> {
    if standing(&context.paths, group, mode)?.is_none() {
        return Ok(None);
    }
    let undo = Undo {
        paths: context.paths.clone(),
        group: group.to_owned(),
        mode,
        tools: Tools::default(),
        command: abort_command(context, group),
    };
    varve_takeover::undo(&undo, &mut show(context.json)).map(Some)
}

/// What keeps an abort from going on.
pub(crate) fn not_taken_back(report: Report) -> Option<Problem> {
    (report.outcome == Outcome::UndoIncomplete).then(|| {
        let why = format!("the plan could not be taken back: {}", report.left.join(", "));
        let other = "see to what is left, then say it again; --force leaves it as it is".to_owned();
        report.problem.unwrap_or_else(|| Problem::failed("the takeover was not undone", why, other))
    })
}

/// The file that is meant: of a group, or a path.
pub(crate) fn plan_file(context: &Context, what: &str) -> PathBuf {
    if what.contains('/') || what.ends_with(".toml") {
        Path::new(what).to_owned()
    } else {
        context.paths.takeover_plan(what)
    }
}
