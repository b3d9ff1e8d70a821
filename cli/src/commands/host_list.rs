//! `varve host list`: who may connect, who may not any more, who is invited.

use crate::client::{SOON, ask_receiver};
use crate::context::{Context, DONE, Outcome};
use crate::words;
use varve_common::control::{HostStatus, HostsReply, ReceiverRequest};

const EXAMPLE: &str = "Example:
  varve host list";

/// Lists enrolled and revoked hosts and open invitations.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {}

pub(crate) fn run(context: &Context, _: &Args) -> Outcome {
    let reply: HostsReply = ask_receiver(context, &ReceiverRequest::Hosts, SOON)?;
    context.answer(&reply, |reply| text_of(context, reply));
    Ok(DONE)
}

fn text_of(context: &Context, reply: &HostsReply) -> String {
    if reply.hosts.is_empty() && reply.invites.is_empty() {
        return format!("no host has joined and none is invited\nnext: {}\n", context.suggest("host invite NAME"));
    }
    let mut rows = vec![["NAME", "STATE", "SINCE / UNTIL", "FROM", "CERTIFICATE"].map(str::to_owned).to_vec()];
    for host in &reply.hosts {
        let from = host.address.clone().unwrap_or_else(|| "-".to_owned());
        let short = host.fingerprint.chars().take(16).collect();
        rows.push(vec![host.name.clone(), state(host).to_owned(), words::time(&host.joined), from, short]);
    }
    for invite in &reply.invites {
        let until = words::time(&invite.expires);
        rows.push(vec![invite.name.clone(), "invited".to_owned(), until, "-".to_owned(), "-".to_owned()]);
    }
    words::columns(&rows).join("\n") + "\n"
}

fn state(host: &HostStatus) -> &'static str {
    match (host.revoked, host.connected) {
        (true, _) => "revoked",
        (false, true) => "connected",
        (false, false) => "enrolled",
    }
}
