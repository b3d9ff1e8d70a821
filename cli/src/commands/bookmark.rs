//! `varve bookmark`: names the present point of a group.

use crate::check;
use crate::client::{PATIENT, ask_agent};
use crate::context::{Context, DONE, Outcome};
use crate::words;
use varve_common::control::{AgentRequest, BookmarkReply};
use varve_common::problem::{Problem, check_name};

const EXAMPLE: &str = "Example:
  varve bookmark db before-upgrade";

/// Sets a bookmark at an exact place in the order of the group's writes.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The group's name
    group: String,
    /// The bookmark's name
    name: String,
    /// What the point promises: crash (as after a power cut), fs and app
    #[arg(long, default_value = "crash", value_name = "crash|fs|app")]
    consistency: String,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::group(&args.group)?;
    check_name("bookmark", &args.name)?;
    check_consistency(&args.consistency)?;
    let request = AgentRequest::Bookmark { group: args.group.clone(), name: args.name.clone() };
    let reply: BookmarkReply = ask_agent(context, &request, PATIENT)?;
    context.answer(&reply, text_of);
    Ok(DONE)
}

fn check_consistency(word: &str) -> Result<(), Problem> {
    match word {
        "crash" => Ok(()),
        "fs" | "app" => Err(Problem::refused(
            format!("a bookmark with consistency '{word}' was not set"),
            "this version cannot set it yet, and a weaker one under the same name would promise too much",
            "use --consistency crash: journaling filesystems and databases recover from it as from a power cut",
        )),
        _ => Err(Problem::usage(
            format!("'{}' is not a consistency", word.escape_debug()),
            "there are crash, fs and app",
            "use --consistency crash",
        )),
    }
}

fn text_of(reply: &BookmarkReply) -> String {
    let safe = if reply.durable { "durable at the recovery host" } else { "on its way to the recovery host" };
    format!(
        "bookmark '{}' of group '{}' at {} (position {}, {}-consistent), {safe}\n",
        reply.name,
        reply.group,
        words::time(&reply.time),
        reply.position,
        reply.consistency,
    )
}
