//! `varve forget`: the recovery host forgets a group that is no longer protected.

use crate::check;
use crate::client::{Daemon, PATIENT, ask_receiver};
use crate::confirm::confirm;
use crate::context::{Context, DONE, Outcome};
use crate::words;
use serde::Serialize;
use varve_common::control::{ReceiverRequest, VolumeStatus, Window};

const EXAMPLE: &str = "Example:
  varve forget db --dry-run
  varve forget db --yes";

/// Removes a group and its history from this recovery host. The replicas stay where they are, for you to keep or
/// delete. `varve unprotect` on the production host comes first.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The group's name (varve status)
    group: String,
    /// Print what would happen, change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

#[derive(Serialize)]
struct Forgotten {
    group: String,
    dry_run: bool,
    volumes: Vec<VolumeStatus>,
    window: Window,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::group(&args.group)?;
    let group = Daemon::Receiver.group(context, &args.group)?;
    let plan =
        Forgotten { group: args.group.clone(), dry_run: args.dry_run, volumes: group.volumes, window: group.window };
    if !args.dry_run {
        let again = context.suggest(&format!("forget {}", args.group));
        let question = format!("forget group '{}' and every point of it?", args.group);
        confirm(args.yes, &question, &again)?;
        let () = ask_receiver(context, &ReceiverRequest::Forget { group: args.group.clone() }, PATIENT)?;
    }
    context.answer(&plan, text_of);
    Ok(DONE)
}

fn text_of(plan: &Forgotten) -> String {
    let mut lines = vec![match plan.dry_run {
        true => format!("group '{}' would be forgotten; nothing was changed", plan.group),
        false => format!("group '{}' is forgotten", plan.group),
    }];
    match (&plan.window.from, &plan.window.to) {
        (Some(from), Some(to)) => {
            lines.push(format!("  points lost: from {} to {}", words::time(from), words::time(to)));
        }
        (None, Some(to)) => lines.push(format!("  points lost: the newest, {}", words::time(to))),
        _ => lines.push("  points lost: none, nothing of it could be recovered".to_owned()),
    }
    for volume in &plan.volumes {
        let replica = volume.replica.as_deref().unwrap_or("none was made");
        lines.push(format!("  replica of {} ({}) stays: {replica}", volume.path, words::bytes(volume.bytes)));
    }
    lines.join("\n") + "\n"
}
