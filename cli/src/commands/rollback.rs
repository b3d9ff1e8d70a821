//! `varve rollback`: makes the replica what it was at a point, as new history.

use crate::check;
use crate::client::{Daemon, PATIENT, ask, ask_authority, ask_receiver};
use crate::confirm::confirm;
use crate::context::{Context, DONE, Outcome, note};
use crate::progress::Meter;
use crate::words;
use serde::Serialize;
use std::io::IsTerminal;
use varve_common::control::{ReceiverRequest, RollbackReply};
use varve_common::problem::Problem;

const EXAMPLE: &str = "Example:
  varve rollback db --at '2026-11-20 14:03:22.5' --dry-run
  varve rollback db --at bookmark:before-upgrade --yes
  varve rollback db --release";

/// Writes to the replica only what differs from the point. What it was stays in the history, so a rollback can itself be
/// rolled back. Replication waits until --release; then the replica is made equal to the volumes again.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The group's name (varve status)
    group: String,
    /// Which point (varve points)
    #[arg(long, value_name = "POINT", allow_hyphen_values = true, required_unless_present = "release")]
    at: Option<String>,
    /// Print which points, how many bytes and how long; change nothing
    #[arg(long)]
    dry_run: bool,
    /// Let replication go on after a rollback
    #[arg(long, conflicts_with = "at")]
    release: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

#[derive(Serialize)]
struct Released {
    group: String,
    dry_run: bool,
    released: bool,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::group(&args.group)?;
    let Some(at) = args.at.as_deref() else { return release(context, args) };
    let spec = check::point(at)?;
    let go = |dry_run: bool| {
        let what = if dry_run { "comparing" } else { "rolling back" };
        let mut meter = Meter::new(format!("{what} {}", args.group), context.json);
        let request = ReceiverRequest::Rollback { group: args.group.clone(), at: spec.clone(), dry_run };
        let mut show = |step| meter.show(&step);
        let reply: Result<RollbackReply, Problem> = match dry_run {
            true => ask(context, Daemon::Receiver, &request, PATIENT, &mut show),
            false => ask_authority(context, &args.group, &request, "the same command finishes it", &mut show),
        };
        meter.end();
        reply
    };
    if !args.dry_run {
        let again = context.suggest(&format!("rollback {} --at '{at}'", args.group));
        // Who is asked must know what it is about.
        if !args.yes && std::io::stdin().is_terminal() {
            note(text_of(context, &go(true)?).trim_end());
        }
        confirm(args.yes, &format!("roll the replica of group '{}' back to '{at}'?", args.group), &again)?;
    }
    let reply = go(args.dry_run)?;
    context.answer(&reply, |reply| text_of(context, reply));
    Ok(DONE)
}

fn release(context: &Context, args: &Args) -> Outcome {
    let group = &args.group;
    if !args.dry_run {
        let question = format!("make the replica of group '{group}' equal to its volumes again?");
        confirm(args.yes, &question, &context.suggest(&format!("rollback {group} --release")))?;
    }
    let name = group.clone();
    let () = match args.dry_run {
        true => ask_receiver(context, &ReceiverRequest::RollbackReleaseLook { group: name }, PATIENT)?,
        false => {
            let request = ReceiverRequest::RollbackRelease { group: name };
            ask_authority(context, group, &request, "then the same command again", &mut |_| {})?
        }
    };
    let released = Released { group: group.clone(), dry_run: args.dry_run, released: !args.dry_run };
    context.answer(&released, |released| match released.dry_run {
        true => format!(
            "group '{group}': replication would go on and the replica be made equal to its volumes; nothing was changed\n"
        ),
        false => format!(
            "group '{group}': replication goes on, the replica is being made equal to its volumes\nnext: {}\n",
            context.suggest(&format!("status {group} --watch"))
        ),
    });
    Ok(DONE)
}

fn text_of(context: &Context, reply: &RollbackReply) -> String {
    let group = &reply.group;
    let (head, written) = match reply.dry_run {
        true => (format!("group '{group}' would be rolled back; nothing was changed"), "would be written"),
        false => (format!("group '{group}' is rolled back"), "written"),
    };
    let about = if reply.dry_run { "about " } else { "" };
    let blocks = words::count(reply.blocks as usize, "block");
    let mut lines = vec![head];
    lines.push(format!("  to:   {}", words::point(&reply.to_point)));
    let from = &reply.from_point;
    lines.push(format!("  from: {} (position {})", words::exact_time(&from.time), from.position));
    let (bytes, time) = (words::bytes(reply.bytes), words::seconds(reply.seconds));
    lines.push(format!("  {written}: {bytes} that differ, in {blocks}, {about}{time}"));
    if !reply.dry_run {
        let undo = context.suggest(&format!("rollback {group} --at {}", from.time));
        lines.push(format!("  to undo it: {undo}"));
    }
    if reply.held {
        let release = context.suggest(&format!("rollback {group} --release"));
        let (waits, what) = match reply.dry_run {
            true => ("would wait", "then"),
            false => ("waits", "next:"),
        };
        lines.push(format!("  replication {waits}, so that the replica stays what it is"));
        lines.push(format!("{what} '{release}' lets it go on: the replica becomes equal to the volumes again"));
    }
    lines.join("\n") + "\n"
}
