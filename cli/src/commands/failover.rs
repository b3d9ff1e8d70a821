//! `varve failover`: runs a group on the recovery host. `commit` and `abort` are in [`super::failover_end`].

use super::failover_end::{abort, commit};
use crate::check;
use crate::client::{Daemon, PATIENT, ask, ask_authority};
use crate::confirm::confirm;
use crate::context::{Context, DONE, FAILED, Outcome, explain, note};
use crate::progress::Meter;
use crate::takeover;
use crate::words;
use serde::Serialize;
use std::io::IsTerminal;
use std::time::SystemTime;
use varve_common::control::{FailoverReply, PlannedWish, PointReply, ReceiverRequest, VolumeStatus};
use varve_common::problem::Problem;
use varve_takeover::{DryRun, Mode, Plan, Report, standing};

const EXAMPLE: &str = "Example:
  varve failover db --dry-run
  varve failover db --test --at -10m
  varve failover db --planned
  varve failover db --yes
  varve failover db --abort-after 2h
  varve failover commit db
  varve failover abort db --dry-run
  varve failover abort db";

/// Makes the volumes of a group writable block devices of this host, at a point. The source is fenced off first: from then on
/// nothing that it sends is taken. What is written here is the group's history. Until `varve failover commit GROUP` the
/// takeover can be undone by `varve failover abort GROUP`. If the group has a takeover plan it is run then. With --test replication goes on, and what is written is gone with the
/// test.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The group's name; or `commit` or `abort` and the group's name
    #[arg(value_name = "[commit|abort] GROUP", num_args = 1..=2, required = true)]
    words: Vec<String>,
    /// Which point (varve points); without it the newest
    #[arg(long, value_name = "POINT", allow_hyphen_values = true)]
    at: Option<String>,
    /// Beside the replication, which goes on
    #[arg(long)]
    test: bool,
    /// Lose nothing: the source stops what uses the volumes (its hook `quiesce`), lets nobody write them and sends everything;
    /// both sides are compared. If that does not work nothing is changed
    #[arg(long, conflicts_with = "test")]
    planned: bool,
    /// How long the source may take for that
    #[arg(long, value_name = "SECONDS", default_value_t = 60, requires = "planned", conflicts_with = "test", value_parser = clap::value_parser!(u64).range(1..=3600))]
    limit: u64,
    /// Compare nothing: the source can write while it is compared neither here nor there
    #[arg(long, requires = "planned", conflicts_with = "test")]
    quick: bool,
    /// Go back by itself, as `varve failover abort` does, unless it is committed within so long
    #[arg(long, value_name = "AGE", conflicts_with_all = ["test", "resume"])]
    abort_after: Option<String>,
    /// Only make the devices: do not run the group's takeover plan
    #[arg(long)]
    no_plan: bool,
    /// Go on with the takeover plan where it stopped; run it, if nothing of it is in place
    #[arg(long, conflicts_with_all = ["test", "planned", "dry_run", "no_plan", "at"])]
    resume: bool,
    /// Print the point, what would be left out and lost, and the plan; with commit and abort what would end. Change nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Abort although a device is in use: its users get errors. On the production host: although the group may run on the
    /// recovery host
    #[arg(long)]
    pub(super) force: bool,
    /// Do not ask
    #[arg(long)]
    pub(super) yes: bool,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    match &args.words[..] {
        [word, group] if word == "commit" => {
            refuse_others(args, "commit", &["--dry-run"])?;
            commit(context, args, group)
        }
        [word, group] if word == "abort" => {
            refuse_others(args, "abort", &["--dry-run", "--force"])?;
            abort(context, args, group)
        }
        [word] if word == "commit" || word == "abort" => Err(Problem::usage(
            format!("'{word}' of which group is not said"),
            "the group's name follows it",
            format!("varve failover {word} GROUP"),
        )),
        [group] => {
            if args.force {
                let next = format!("leave it away, or say 'failover abort {group} --force'");
                return Err(Problem::usage("--force does not fit a takeover", "it is for abort", next));
            }
            if args.resume { resume_plan(context, group) } else { begin(context, args, group) }
        }
        _ => Err(Problem::usage(
            format!("'{}' is not understood", args.words.join(" ")),
            "two words are 'commit GROUP' or 'abort GROUP'",
            "varve failover --help",
        )),
    }
}

/// A flag of the takeover that is said to its end would be swallowed, and whoever said it meant something.
fn refuse_others(args: &Args, word: &str, fitting: &[&str]) -> Result<(), Problem> {
    let flags = [
        ("--at", args.at.is_some()),
        ("--test", args.test),
        ("--planned", args.planned),
        ("--abort-after", args.abort_after.is_some()),
        ("--no-plan", args.no_plan),
        ("--resume", args.resume),
        ("--force", args.force),
        ("--dry-run", args.dry_run),
    ];
    let Some((flag, _)) = flags.iter().find(|(flag, given)| *given && !fitting.contains(flag)) else { return Ok(()) };
    Err(Problem::usage(
        format!("{flag} does not fit 'failover {word}'"),
        format!("beside --yes it takes {}", fitting.join(" and ")),
        format!("varve failover {word} GROUP, without it"),
    ))
}

/// The answer, and what became of the plan.
#[derive(Serialize)]
struct Answer<'a> {
    #[serde(flatten)]
    reply: &'a FailoverReply,
    #[serde(skip_serializing_if = "Option::is_none")]
    plan: Option<DryRun>,
    #[serde(skip_serializing_if = "Option::is_none")]
    report: Option<Report>,
}

fn begin(context: &Context, args: &Args, group: &str) -> Outcome {
    check::group(group)?;
    let at = check::point(at_of(args))?;
    let abort_after = args.abort_after.as_deref().map(check::abort_after).transpose()?;
    let mode = if args.test { Mode::Test } else { Mode::Live };
    // A plan that cannot be run is found before anything is changed.
    let plan = if args.no_plan { None } else { takeover::plan(context, group)? };
    if let Some(plan) = &plan {
        takeover::fits(context, group, plan)?;
        takeover::none_left(context, group, mode)?;
    }
    let then = match (args.test, &plan) {
        (true, _) => format!("'{}' ends a test", takeover::abort_command(context, group)),
        (false, Some(_)) => {
            format!("once it runs here, '{}' runs its takeover plan", takeover::resume_command(context, group))
        }
        (false, None) => "once it runs here, its devices are shown there".to_owned(),
    };
    let go = |dry_run: bool| -> Result<FailoverReply, Problem> {
        let planned = args.planned.then_some(PlannedWish { limit_seconds: args.limit, quick: args.quick });
        let (at, test) = (at.clone(), args.test);
        let of = group.to_owned();
        let mut meter = Meter::new(format!("switching over {group}"), context.json);
        let request =
            ReceiverRequest::Failover { group: of, at, test, dry_run, planned, abort_after_seconds: abort_after };
        let mut show = |step| meter.show(&step);
        let reply = match dry_run {
            true => ask(context, Daemon::Receiver, &request, PATIENT, &mut show),
            false => ask_authority(context, group, &request, &then, &mut show),
        };
        meter.end();
        reply
    };
    let dry_run = |reply: &FailoverReply, plan: Plan| -> Result<DryRun, Problem> {
        let devices = takeover::to_be(context, group)?;
        let point = reply.point.clone();
        Ok(takeover::runner(context, plan, group, mode, point, devices, SystemTime::now())?.dry_run())
    };
    if args.dry_run {
        let reply = go(true)?;
        let plan = plan.map(|plan| dry_run(&reply, plan)).transpose()?;
        let answer = Answer { reply: &reply, plan, report: None };
        context.answer(&answer, |answer| answer_text(context, answer, true));
        return Ok(DONE);
    }
    if !args.test {
        let again = context.suggest(&again(args, group));
        // What would be lost is shown before anybody is asked.
        if !args.yes && std::io::stdin().is_terminal() {
            note(text_of(context, &go(true)?, true).trim_end());
        }
        let question = match args.planned {
            true => format!("stop what uses '{group}' at its source and run it here?"),
            false => format!("fence off the source of '{group}' and run it here?"),
        };
        confirm(args.yes, &question, &again)?;
    }
    if args.test {
        takeover::claim_test(context, group)?;
    }
    let began = SystemTime::now();
    let reply = go(false)?;
    let Some(plan) = plan else {
        let answer = Answer { reply: &reply, plan: None, report: None };
        context.answer(&answer, |answer| answer_text(context, answer, true));
        return Ok(DONE);
    };
    let devices = takeover::served(&reply.volumes);
    let report = takeover::runner(context, plan, group, mode, reply.point.clone(), devices, began)
        .and_then(|runner| runner.run(&mut takeover::show(context.json)));
    match report {
        Ok(report) => Ok(tell(context, &Answer { reply: &reply, plan: None, report: Some(report) })),
        Err(problem) => {
            // The devices are there all the same.
            let answer = Answer { reply: &reply, plan: None, report: None };
            context.answer(&answer, |answer| answer_text(context, answer, false));
            Err(problem)
        }
    }
}

fn at_of(args: &Args) -> &str {
    args.at.as_deref().unwrap_or("latest")
}

/// The command as it was said, so that nothing of it is lost when it is said again.
fn again(args: &Args, group: &str) -> String {
    let mut words = format!("failover {group} --at '{}'", at_of(args));
    if args.planned {
        words.push_str(&format!(" --planned --limit {}", args.limit));
    }
    if args.quick {
        words.push_str(" --quick");
    }
    if args.no_plan {
        words.push_str(" --no-plan");
    }
    if let Some(after) = &args.abort_after {
        words.push_str(&format!(" --abort-after {after}"));
    }
    words
}

/// Prints the answer with the plan's report; gives the exit code.
fn tell(context: &Context, answer: &Answer<'_>) -> u8 {
    context.answer(answer, |answer| answer_text(context, answer, false));
    match answer.report.as_ref().and_then(|report| report.problem.as_ref()) {
        Some(problem) => {
            explain(problem);
            FAILED
        }
        None => DONE,
    }
}

fn answer_text(context: &Context, answer: &Answer<'_>, by_hand: bool) -> String {
    let mut text = text_of(context, answer.reply, by_hand);
    answer.plan.iter().for_each(|plan| text.push_str(&plan.to_string()));
    if let Some(report) = &answer.report {
        text.push_str(&report.to_string());
        let group = &answer.reply.group;
        let abort = takeover::abort_command(context, group);
        let commit = context.suggest(&format!("failover commit {group}"));
        text.push_str(&match (answer.reply.test, &report.problem) {
            (true, _) => format!("next: '{abort}' ends the test\n"),
            (false, None) => format!("next: '{commit}' to stay, '{abort}' to go back\n"),
            (false, Some(_)) => String::new(),
        });
    }
    text
}

/// Goes on with the plan of a takeover that is in place; from its start, if nothing of it is.
fn resume_plan(context: &Context, group: &str) -> Outcome {
    check::group(group)?;
    let plan = Plan::load(context.paths.takeover_plan(group))?;
    let standing = standing(&context.paths, group, Mode::Live)?;
    let status = Daemon::Receiver.group(context, group)?;
    let takeover = status.history.and_then(|history| history.takeover).filter(|takeover| !takeover.test);
    let takeover = takeover.filter(|takeover| takeover.devices.len() == status.volumes.len()).ok_or_else(|| {
        Problem::refused(
            format!("the plan of '{group}' cannot be run"),
            "the group's volumes are not served by this receiver now",
            context.suggest(&format!("status {group}")),
        )
    })?;
    let device = |(volume, device): (VolumeStatus, String)| varve_takeover::Device {
        volume: volume.path,
        device: device.into(),
        bytes: volume.bytes,
    };
    let devices = status.volumes.into_iter().zip(takeover.devices).map(device).collect();
    let goes_on = standing.is_some();
    let point = standing.map_or_else(|| PointReply { time: takeover.point, ..PointReply::default() }, |run| run.point);
    let runner = takeover::runner(context, plan, group, Mode::Live, point, devices, SystemTime::now())?;
    let mut show = takeover::show(context.json);
    let report = if goes_on { runner.resume(&mut show)? } else { runner.run(&mut show)? };
    context.answer(&report, ToString::to_string);
    Ok(report.problem.as_ref().map_or(DONE, |problem| {
        explain(problem);
        FAILED
    }))
}

/// `by_hand`: whether it is said what there is to do now.
fn text_of(context: &Context, reply: &FailoverReply, by_hand: bool) -> String {
    let group = &reply.group;
    let head = match (reply.dry_run, reply.test) {
        (true, true) => format!("group '{group}' would be tested; nothing was changed"),
        (true, false) => format!("group '{group}' would run here under epoch {}; nothing was changed", reply.epoch),
        (false, true) => format!("group '{group}' is being tested, replication goes on"),
        (false, false) => format!("group '{group}' runs here, under epoch {}", reply.epoch),
    };
    let mut lines = vec![head, format!("  point: {}", words::point(&reply.point))];
    if reply.left_out_bytes > 0 {
        let newest = words::exact_time(&reply.newest.time);
        let bytes = words::bytes(reply.left_out_bytes);
        lines.push(format!(
            "  left out: {bytes} that changed until {newest}, the newest point (they stay in the history)"
        ));
    }
    if let Some(drained) = &reply.drained {
        let seconds = words::fine_seconds(drained.seconds);
        lines.push(match drained.complete {
            true => format!("  source: told, and sent all that it had captured, within {seconds}"),
            false => format!("  source: told, but did not send all that it had captured within {seconds}"),
        });
    }
    if let Some(planned) = &reply.planned {
        let compared = match planned.compared_bytes {
            0 => "not compared".to_owned(),
            bytes => format!("{} compared and equal", words::bytes(bytes)),
        };
        let quiet = if planned.read_only { "read-only" } else { "claimed" };
        let pause = words::fine_seconds(planned.pause_seconds);
        lines.push(format!("  nothing is lost: the source is {quiet} since {}, {compared}", planned.barrier));
        lines.push(format!("  nobody could write for {pause}"));
    }
    let since = reply.newest_age_seconds.map_or_else(String::new, |age| {
        format!("what was written since the newest point, {} ago", words::fine_seconds(age))
    });
    lines.push(match (reply.not_here_bytes, reply.source_heard_seconds) {
        (Some(0), _) if reply.planned.is_some() => "  not here: nothing".to_owned(),
        (Some(bytes), Some(seconds)) => format!(
            "  not here: {since}: {} of it the source had captured when it was heard of last, {} ago",
            words::bytes(bytes),
            words::fine_seconds(seconds)
        ),
        _ => format!(
            "  not here: {since}: how much is not known, nothing was heard of the source since this receiver started"
        ),
    });
    for volume in &reply.volumes {
        let place = volume.device.as_deref().or(volume.uri.as_deref()).unwrap_or("-");
        lines.push(format!("  {place} is {} ({})", volume.path, words::bytes(volume.bytes)));
    }
    lines.extend(reply.hints.iter().map(|hint| format!("  note: {hint}")));
    if reply.dry_run {
        return lines.join("\n") + "\n";
    }
    lines.push(format!("  ready after {}", words::seconds(reply.seconds)));
    lines.extend(
        reply
            .abort_at
            .iter()
            .map(|at| format!("  goes back by itself at {}, unless it is committed", words::exact_time(at))),
    );
    if !by_hand {
        return lines.join("\n") + "\n";
    }
    let abort = context.suggest(&format!("failover abort {group}"));
    lines.push(match reply.test {
        true => format!("next: '{abort}' ends the test"),
        false => {
            let commit = context.suggest(&format!("failover commit {group}"));
            format!("next: mount and start what uses it; then '{commit}' to stay, '{abort}' to go back")
        }
    });
    lines.join("\n") + "\n"
}
