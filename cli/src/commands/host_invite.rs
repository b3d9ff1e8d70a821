//! `varve host invite`: a single-use token with which one production host can join.

use crate::check;
use crate::client::{SOON, ask_receiver};
use crate::context::{Context, DONE, Outcome, note, print, print_json};
use crate::words;
use std::net::SocketAddr;
use varve_common::control::{InviteReply, ReceiverRequest};

const EXAMPLE: &str = "Example:
  varve host invite db1 --ttl 30m
  TOKEN=$(varve host invite db1 2>/dev/null)";

/// Prints one join token. It works once, until it expires.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The name that the host will have here
    name: String,
    /// How long the token is good: 90s, 15m, 1h, 2d; at most 30d
    #[arg(long, default_value = "1h", allow_hyphen_values = true)]
    ttl: String,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::host(&args.name)?;
    let ttl = check::ttl(&args.ttl)?;
    let request = ReceiverRequest::Invite { name: args.name.clone(), ttl_seconds: ttl.as_secs() };
    let invite: InviteReply = ask_receiver(context, &request, SOON)?;
    if context.json {
        print_json(&invite);
        return Ok(DONE);
    }
    // The token alone on standard output, so that `$(varve host invite …)` is the token.
    note(&format!(
        "token for '{}', good once, until {}; on that host: varve join {} TOKEN",
        invite.name,
        words::time(&invite.expires),
        reachable(&invite.address)
    ));
    if invite.replaces {
        note(&format!(
            "'{}' has joined already: whoever uses the token takes its place, and that host is refused from then on",
            invite.name
        ));
    }
    print(&format!("{}\n", invite.token));
    Ok(DONE)
}

/// A receiver that listens everywhere cannot know by which address it is reached.
fn reachable(address: &str) -> String {
    match address.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_unspecified() => format!("THIS-HOST:{}", address.port()),
        _ => address.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_wildcard_is_no_address_to_join() {
        assert_eq!(super::reachable("[::]:7443"), "THIS-HOST:7443");
        assert_eq!(super::reachable("10.0.0.2:7443"), "10.0.0.2:7443");
    }
}
