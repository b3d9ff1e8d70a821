//! `varve plan`: looks at a takeover plan, or takes back what one has done.

use crate::check;
use crate::confirm::confirm;
use crate::context::{Context, DONE, FAILED, Outcome, explain};
use crate::takeover;
use serde::Serialize;
use varve_common::problem::Problem;
use varve_takeover::{Mode, Plan, Standing, Tools, standing};

const CHECK_EXAMPLE: &str = "Example:
  varve plan check db
  varve plan check ./db.toml";

const UNDO_EXAMPLE: &str = "Example:
  varve plan undo db --dry-run
  varve plan undo db";

/// Reads a takeover plan and says what is wrong with it, or missing on this host. Nothing is touched.
#[derive(clap::Args)]
#[command(after_help = CHECK_EXAMPLE)]
pub(crate) struct CheckArgs {
    /// The group's name, or the file
    #[arg(value_name = "GROUP|FILE")]
    what: String,
}

/// Takes back what the plan of a takeover has done, the last step first; the takeover itself stays. For a group that was committed
/// and is to go home.
#[derive(clap::Args)]
#[command(after_help = UNDO_EXAMPLE)]
pub(crate) struct UndoArgs {
    /// The group's name
    group: String,
    /// Print what would be taken back, change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

#[derive(Serialize)]
struct Checked {
    plan: std::path::PathBuf,
    steps: Vec<Step>,
    problems: Vec<Problem>,
}

#[derive(Serialize)]
struct Step {
    number: usize,
    name: String,
    kind: &'static str,
    timeout_seconds: f64,
}

pub(crate) fn check(context: &Context, args: &CheckArgs) -> Outcome {
    let file = takeover::plan_file(context, &args.what);
    if file == context.paths.takeover_plan(&args.what) {
        check::group(&args.what)?;
    }
    let plan = Plan::load(&file)?;
    let step = |(place, step): (usize, &varve_takeover::plan::Step)| Step {
        number: place + 1,
        name: step.name.clone(),
        kind: step.kind.word(),
        timeout_seconds: step.timeout.as_secs_f64(),
    };
    let steps = plan.steps.iter().enumerate().map(step).collect();
    let checked = Checked { plan: file, steps, problems: plan.check_host(&Tools::default()) };
    context.answer(&checked, |checked| {
        let mut text = format!("the plan {} is understood\n", checked.plan.display());
        for step in &checked.steps {
            let limit = crate::words::seconds(step.timeout_seconds);
            text.push_str(&format!("  {:>2}. {} ({}, up to {limit})\n", step.number, step.name, step.kind));
        }
        text
    });
    checked.problems.iter().for_each(explain);
    Ok(if checked.problems.is_empty() { DONE } else { FAILED })
}

#[derive(Serialize)]
struct WouldUndo {
    group: String,
    dry_run: bool,
    #[serde(flatten)]
    run: Standing,
}

pub(crate) fn undo(context: &Context, args: &UndoArgs) -> Outcome {
    check::group(&args.group)?;
    if args.dry_run {
        let run = standing(&context.paths, &args.group, Mode::Live)?.ok_or_else(|| nothing(context, &args.group))?;
        context.answer(&WouldUndo { group: args.group.clone(), dry_run: true, run }, |would| {
            let (group, run) = (&would.group, &would.run);
            let mut text =
                format!("the plan of '{group}', of {}, would be taken back; nothing was changed\n", run.began);
            run.left.iter().rev().for_each(|left| text.push_str(&format!("  taken back: {left}\n")));
            text + "  the takeover itself would stay\n"
        });
        return Ok(DONE);
    }
    let again = context.suggest(&format!("plan undo {}", args.group));
    confirm(args.yes, &format!("stop what the plan of '{}' has started here?", args.group), &again)?;
    let Some(report) = takeover::take_back(context, &args.group, Mode::Live)? else {
        return Err(nothing(context, &args.group));
    };
    context.answer(&report, ToString::to_string);
    takeover::not_taken_back(report).map_or(Ok(DONE), Err)
}

fn nothing(context: &Context, group: &str) -> Problem {
    Problem::not_found(
        format!("there is nothing of the plan of '{group}' to take back"),
        "nothing of it is in place on this host",
        context.suggest(&format!("status {group}")),
    )
}
