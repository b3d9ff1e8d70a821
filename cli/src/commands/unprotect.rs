//! `varve unprotect`: stops protecting a group.

use crate::check;
use crate::client::{Daemon, PATIENT, ask_agent};
use crate::confirm::confirm;
use crate::context::{Context, DONE, Outcome};
use crate::words;
use serde::Serialize;
use varve_common::control::{AgentRequest, VolumeStatus};

const EXAMPLE: &str = "Example:
  varve unprotect db --dry-run
  varve unprotect db";

/// Stops capturing the group's writes. The recovery host keeps the replicas and every point that it has.
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
struct Unprotected {
    group: String,
    dry_run: bool,
    volumes: Vec<VolumeStatus>,
    /// Captured and not at the recovery host: dropped with the capture.
    lag_bytes: u64,
    /// The newest point that the recovery host keeps.
    newest_point: Option<String>,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::group(&args.group)?;
    let group = Daemon::Agent.group(context, &args.group)?;
    let plan = Unprotected {
        group: args.group.clone(),
        dry_run: args.dry_run,
        volumes: group.volumes,
        lag_bytes: group.lag_bytes,
        newest_point: group.window.to,
    };
    if !args.dry_run {
        let again = context.suggest(&format!("unprotect {}", args.group));
        let volumes: Vec<&str> = plan.volumes.iter().map(|volume| volume.path.as_str()).collect();
        let question = format!("stop protecting group '{}' ({})?", args.group, volumes.join(", "));
        confirm(args.yes, &question, &again)?;
        let () = ask_agent(context, &AgentRequest::Unprotect { group: args.group.clone() }, PATIENT)?;
    }
    context.answer(&plan, text_of);
    Ok(DONE)
}

fn text_of(plan: &Unprotected) -> String {
    let mut lines = Vec::new();
    match plan.dry_run {
        true => lines.push(format!("group '{}' would no longer be protected; nothing was changed", plan.group)),
        false => lines.push(format!("group '{}' is no longer protected", plan.group)),
    }
    for volume in &plan.volumes {
        let replica = volume.replica.as_deref().map(|path| format!(", its replica {path} stays")).unwrap_or_default();
        lines.push(format!("  {} ({}): capture ends{replica}", volume.path, words::bytes(volume.bytes)));
    }
    match &plan.newest_point {
        Some(time) => lines.push(format!("  newest point that stays: {}", words::time(time))),
        None => lines.push("  no point of it can be recovered yet".to_owned()),
    }
    if plan.lag_bytes > 0 {
        lines.push(format!(
            "  captured and not yet at the recovery host: {}, not sent any more",
            words::bytes(plan.lag_bytes)
        ));
    }
    lines.push("  protecting it again compares all of it with the replica".to_owned());
    if !plan.dry_run {
        lines.push(format!(
            "next: 'varve forget {}' on the recovery host, if its points are not wanted any more",
            plan.group
        ));
    }
    lines.join("\n") + "\n"
}
