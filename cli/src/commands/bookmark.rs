//! `varve bookmark`: names the present point of a group; on the recovery host keeps a named point or lets it go.

use crate::check;
use crate::client::{PATIENT, ask_agent, ask_receiver};
use crate::confirm::confirm;
use crate::context::{Context, DONE, Outcome};
use crate::words;
use serde::Serialize;
use varve_common::control::{AgentRequest, BookmarkReply, KeepReply, ReceiverRequest};
use varve_common::problem::{Problem, check_name};

const EXAMPLE: &str = "Example, production host:
  varve bookmark db before-upgrade
Example, recovery host:
  varve bookmark db before-upgrade --keep --dry-run
  varve bookmark db before-upgrade --keep
  varve bookmark db before-upgrade --release --dry-run
  varve bookmark db before-upgrade --release";

/// Sets a bookmark at an exact place in the order of the group's writes. With --keep or --release it is about a bookmark
/// that is there, and asks this recovery host: a kept one does not expire.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The group's name
    group: String,
    /// The bookmark's name
    name: String,
    /// What the point promises: crash (as after a power cut), fs and app
    #[arg(long, default_value = "crash", value_name = "crash|fs|app", conflicts_with_all = ["keep", "release"])]
    consistency: String,
    /// Pin the point against expiry; says how many bytes that costs
    #[arg(long, conflicts_with = "release")]
    keep: bool,
    /// Let the point expire like any other
    #[arg(long)]
    release: bool,
    /// With --keep or --release: print what it would cost, or what could expire then; change nothing
    #[arg(long)]
    dry_run: bool,
    /// With --release: do not ask
    #[arg(long)]
    yes: bool,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::group(&args.group)?;
    check_name("bookmark", &args.name)?;
    let (group, name) = (args.group.clone(), args.name.clone());
    if args.release {
        return release(context, args);
    }
    // Not by clap's `requires`: that is silent where the flag that it asks for is excluded by one that is there.
    let alone = [("--dry-run", args.dry_run && !args.keep), ("--yes", args.yes)];
    if let Some((flag, _)) = alone.into_iter().find(|(_, said)| *said) {
        let why = if flag == "--yes" { "only --release asks" } else { "it is for --keep and --release" };
        return Err(Problem::usage(format!("{flag} does not fit"), why, "leave it away"));
    }
    if args.keep {
        let request = ReceiverRequest::Keep { group, bookmark: name, keep: true, dry_run: args.dry_run };
        let reply: KeepReply = ask_receiver(context, &request, PATIENT)?;
        let changed = Changed { reply, dry_run: args.dry_run };
        context.answer(&changed, |changed| match changed.dry_run {
            false => kept_text(&changed.reply),
            true => format!(
                "bookmark '{}' of group '{}' at {} would be kept; nothing was changed\n  {} of history would stay because of \
                 it, and more as it gets older\n",
                changed.reply.name,
                changed.reply.group,
                words::exact_time(&changed.reply.time),
                words::bytes(changed.reply.bytes)
            ),
        });
        return Ok(DONE);
    }
    check_consistency(&args.consistency)?;
    let reply: BookmarkReply = ask_agent(context, &AgentRequest::Bookmark { group, name }, PATIENT)?;
    context.answer(&reply, text_of);
    Ok(DONE)
}

#[derive(Serialize)]
struct Changed {
    #[serde(flatten)]
    reply: KeepReply,
    dry_run: bool,
}

/// Points that are only there because of it may expire at once, and do not come back.
fn release(context: &Context, args: &Args) -> Outcome {
    let (group, name) = (&args.group, &args.name);
    let request =
        |dry_run| ReceiverRequest::Keep { group: group.clone(), bookmark: name.clone(), keep: false, dry_run };
    let reply: KeepReply = ask_receiver(context, &request(true), PATIENT)?;
    let bytes = reply.bytes;
    let mut released = Changed { reply, dry_run: true };
    if !args.dry_run {
        if bytes > 0 {
            let bytes = words::bytes(bytes);
            let question = format!("let {bytes} of the history of group '{group}' expire, kept for '{name}'?");
            confirm(args.yes, &question, &context.suggest(&format!("bookmark {group} {name} --release")))?;
        }
        released = Changed { reply: ask_receiver(context, &request(false), PATIENT)?, dry_run: false };
    }
    context.answer(&released, |released| match released.dry_run {
        false => kept_text(&released.reply),
        true => format!(
            "bookmark '{name}' of group '{group}' at {} would no longer be kept; nothing was changed\n  {} of history could \
             expire at once\n",
            words::exact_time(&released.reply.time),
            words::bytes(bytes)
        ),
    });
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

fn kept_text(reply: &KeepReply) -> String {
    let head = format!("bookmark '{}' of group '{}' at {}", reply.name, reply.group, words::exact_time(&reply.time));
    let bytes = words::bytes(reply.bytes);
    match reply.kept {
        true => format!("{head} is kept\n  {bytes} of history stay because of it, and more as it gets older\n"),
        false => format!("{head} is no longer kept\n  {bytes} of history may expire now\n"),
    }
}
