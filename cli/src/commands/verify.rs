//! `varve verify`: compares volumes and replicas at one exact position while writes go on.

use crate::check;
use crate::client::{Daemon, PATIENT, ask};
use crate::context::{Context, DONE, FAILED, Outcome, explain};
use crate::progress::Meter;
use crate::words;
use serde::Serialize;
use varve_common::control::{AgentRequest, GroupStatus, Progress, ReceiverRequest, VerifyReply, VolumeStatus};
use varve_common::problem::{Problem, ProblemKind};

const EXAMPLE: &str = "Example:
  varve verify db
  varve verify db --repair";

/// Differing extents that are shown to people; JSON has all that were kept.
const EXTENTS_SHOWN: usize = 8;

/// Compares digests of every volume and its replica. Regions that are written meanwhile are compared again, so a
/// difference is a difference. Exit code 1 if there is one (without --repair).
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The group's name
    group: String,
    /// Send what differs again
    #[arg(long)]
    repair: bool,
    /// Print what would be compared, do nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Plan {
    group: String,
    dry_run: bool,
    repair: bool,
    total_bytes: u64,
    volumes: Vec<VolumeStatus>,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::group(&args.group)?;
    if args.dry_run {
        let group = first_that_knows(context, &args.group, |daemon| daemon.group(context, &args.group))?;
        context.answer(&plan(args, group), plan_text);
        return Ok(DONE);
    }
    let mut meter = Meter::new(format!("verifying {}", args.group), context.json);
    let reply =
        first_that_knows(context, &args.group, |daemon| start(context, daemon, args, &mut |step| meter.show(&step)));
    meter.end();
    let reply = reply?;
    context.answer(&reply, text_of);
    Ok(match verdict(context, &reply) {
        None => DONE,
        Some(problem) => {
            explain(&problem);
            FAILED
        }
    })
}

fn start(
    context: &Context,
    daemon: Daemon,
    args: &Args,
    progress: &mut dyn FnMut(Progress),
) -> Result<VerifyReply, Problem> {
    let (group, repair) = (args.group.clone(), args.repair);
    match daemon {
        Daemon::Agent => ask(context, daemon, &AgentRequest::Verify { group, repair }, PATIENT, progress),
        Daemon::Receiver => ask(context, daemon, &ReceiverRequest::Verify { group, repair }, PATIENT, progress),
    }
}

/// Asks the daemons of this host in turn. Only when every daemon that belongs here answered is a group unknown.
fn first_that_knows<T>(
    context: &Context,
    group: &str,
    mut work: impl FnMut(Daemon) -> Result<T, Problem>,
) -> Result<T, Problem> {
    context.need_root()?;
    let here: Vec<Daemon> = Daemon::ALL.into_iter().filter(|daemon| daemon.is_here(&context.paths)).collect();
    let asked = if here.is_empty() { vec![Daemon::Agent] } else { here };
    let mut worst: Option<Problem> = None;
    for daemon in asked {
        match work(daemon) {
            Err(problem) if problem.kind == ProblemKind::NotFound => worst = worst.or(Some(problem)),
            Err(problem) if problem.kind == ProblemKind::Unreachable => {
                if worst.as_ref().is_none_or(|worst| worst.kind == ProblemKind::NotFound) {
                    worst = Some(problem);
                }
            }
            other => return other,
        }
    }
    Err(worst.unwrap_or_else(|| {
        Problem::not_found(
            format!("there is no group '{group}'"),
            "no daemon of this host knows it",
            context.suggest("status"),
        )
    }))
}

fn plan(args: &Args, group: GroupStatus) -> Plan {
    Plan {
        group: group.name,
        dry_run: true,
        repair: args.repair,
        total_bytes: group.volumes.iter().map(|volume| volume.bytes).sum(),
        volumes: group.volumes,
    }
}

fn plan_text(plan: &Plan) -> String {
    let mut lines = vec![format!(
        "group '{}': {} in {} would be read and compared; nothing was done",
        plan.group,
        words::bytes(plan.total_bytes),
        words::count(plan.volumes.len(), "volume")
    )];
    for volume in &plan.volumes {
        let replica = volume.replica.as_deref().unwrap_or("its replica");
        lines.push(format!("  {} ({}) with {replica}", volume.path, words::bytes(volume.bytes)));
    }
    lines.push(match plan.repair {
        true => "  what differs would be sent again; no new point could be recovered until that is done".to_owned(),
        false => "  nothing would be written".to_owned(),
    });
    lines.join("\n") + "\n"
}

fn text_of(reply: &VerifyReply) -> String {
    let verify = &reply.verify;
    let compared = words::bytes(verify.done_bytes);
    let mut lines = vec![match (verify.differing_bytes, verify.finished && verify.error.is_none()) {
        (0, true) => format!("group '{}': {compared} compared, volumes and replicas are equal", reply.group),
        (0, false) => format!("group '{}': {compared} compared and equal so far, not finished", reply.group),
        (different, _) => {
            format!("group '{}': {compared} compared, {} differ", reply.group, words::bytes(different))
        }
    }];
    for (volume, offset, length) in verify.extents.iter().take(EXTENTS_SHOWN) {
        lines.push(format!("  volume {volume}: {} at byte {offset}", words::bytes(*length)));
    }
    if verify.extents.len() > EXTENTS_SHOWN {
        lines.push(format!("  and {} more (--json has them)", verify.extents.len() - EXTENTS_SHOWN));
    }
    if verify.unverified_bytes > 0 {
        let busy = words::bytes(verify.unverified_bytes);
        lines.push(format!(
            "  {busy} were written all the time and could not be compared: neither a difference nor a proof"
        ));
    }
    if verify.repair && verify.differing_bytes > 0 {
        lines.push("  what differs is being sent again".to_owned());
    }
    lines.join("\n") + "\n"
}

/// Why the exit code is not 0.
fn verdict(context: &Context, reply: &VerifyReply) -> Option<Problem> {
    let (group, verify) = (&reply.group, &reply.verify);
    let again = context.suggest(&format!("verify {group}"));
    if let Some(error) = &verify.error {
        return Some(Problem::failed(format!("verification of '{group}' came to no result"), error, again));
    }
    if !verify.finished {
        return Some(Problem::failed(
            format!("verification of '{group}' came to no result"),
            "it was ended before everything was compared",
            again,
        ));
    }
    if verify.differing_bytes > 0 && !verify.repair {
        return Some(Problem::failed(
            format!("volumes and replicas of '{group}' differ in {}", words::bytes(verify.differing_bytes)),
            "these bytes were written to neither side while they were compared, so it is not a write under way",
            format!(
                "'{again} --repair' sends them again; then look for who writes past the block layer or to the replica"
            ),
        ));
    }
    None
}
