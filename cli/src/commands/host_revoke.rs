//! `varve host revoke`: a host is refused from now on.

use crate::check;
use crate::client::{SOON, ask_receiver};
use crate::confirm::confirm;
use crate::context::{Context, DONE, Outcome};
use crate::words;
use serde::Serialize;
use varve_common::control::{HostStatus, HostsReply, InviteStatus, ReceiverRequest};
use varve_common::problem::Problem;

const EXAMPLE: &str = "Example:
  varve host revoke db1 --dry-run
  varve host revoke db1";

/// Closes a host's connections, refuses its certificate from now on and withdraws its open invitations. Replicas and
/// their points stay. The host comes back with a new invitation only.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The host's name (varve host list)
    name: String,
    /// Print what would happen, change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

#[derive(Serialize)]
struct Revoked {
    name: String,
    dry_run: bool,
    hosts: Vec<HostStatus>,
    invites: Vec<InviteStatus>,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::host(&args.name)?;
    let all: HostsReply = ask_receiver(context, &ReceiverRequest::Hosts, SOON)?;
    let plan = Revoked {
        name: args.name.clone(),
        dry_run: args.dry_run,
        hosts: all.hosts.into_iter().filter(|host| host.name == args.name).collect(),
        invites: all.invites.into_iter().filter(|invite| invite.name == args.name).collect(),
    };
    if plan.hosts.is_empty() && plan.invites.is_empty() {
        return Err(Problem::not_found(
            format!("there is no host '{}'", args.name),
            "it neither joined this recovery host nor is it invited",
            format!("'{}' shows the names", context.suggest("host list")),
        ));
    }
    if !args.dry_run {
        let again = context.suggest(&format!("host revoke {}", args.name));
        confirm(args.yes, &format!("refuse host '{}' from now on?", args.name), &again)?;
        let request = ReceiverRequest::Revoke { name: args.name.clone() };
        let () = ask_receiver(context, &request, SOON)?;
    }
    context.answer(&plan, |plan| text_of(context, plan));
    Ok(DONE)
}

fn text_of(context: &Context, plan: &Revoked) -> String {
    let mut lines = Vec::new();
    match plan.dry_run {
        true => lines.push(format!("host '{}' would be refused from now on; nothing was changed", plan.name)),
        false => lines.push(format!("host '{}' is refused from now on", plan.name)),
    }
    for host in &plan.hosts {
        let state = match (host.revoked, host.connected) {
            (true, _) => "was revoked before",
            (false, true) => "connected, the connection is closed",
            (false, false) => "not connected",
        };
        let short: String = host.fingerprint.chars().take(16).collect();
        lines.push(format!("  certificate {short}, joined {}: {state}", words::time(&host.joined)));
    }
    for invite in &plan.invites {
        lines.push(format!("  invitation until {}: withdrawn", words::time(&invite.expires)));
    }
    lines.push("  its replicas and their points stay".to_owned());
    lines.push(format!("next: {} lets it come back", context.suggest(&format!("host invite {}", plan.name))));
    lines.join("\n") + "\n"
}
