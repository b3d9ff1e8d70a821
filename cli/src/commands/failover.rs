//! `varve failover`: runs a group on the recovery host; `commit` and `abort` end it one way or the other.

use crate::check;
use crate::client::{PATIENT, ask_receiver};
use crate::confirm::confirm;
use crate::context::{Context, DONE, Outcome, note};
use crate::words;
use std::io::IsTerminal;
use varve_common::control::{FailoverReply, ReceiverRequest};
use varve_common::problem::Problem;

const EXAMPLE: &str = "Example:
  varve failover db --dry-run
  varve failover db --test --at -10m
  varve failover db --yes
  varve failover commit db
  varve failover abort db";

/// Makes the volumes of a group writable block devices of this host, at a point. The source is fenced off first: from then on
/// nothing that it sends is taken. What is written here is the group's history. Until `varve failover commit GROUP` the
/// takeover can be undone by `varve failover abort GROUP`. With --test replication goes on, and what is written is gone with the
/// test.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The group's name; or `commit` or `abort` and the group's name
    #[arg(value_name = "[commit|abort] GROUP", num_args = 1..=2, required = true)]
    words: Vec<String>,
    /// Which point (varve points)
    #[arg(long, value_name = "POINT", allow_hyphen_values = true, default_value = "latest")]
    at: String,
    /// Beside the replication, which goes on
    #[arg(long)]
    test: bool,
    /// Print the point, what would be left out and lost; change nothing
    #[arg(long)]
    dry_run: bool,
    /// Abort although a device is in use: its users get errors
    #[arg(long)]
    force: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    match &args.words[..] {
        [word, group] if word == "commit" => commit(context, args, group),
        [word, group] if word == "abort" => abort(context, args, group),
        [group] => begin(context, args, group),
        _ => Err(Problem::usage(
            format!("'{}' is not understood", args.words.join(" ")),
            "two words are 'commit GROUP' or 'abort GROUP'",
            "varve failover --help",
        )),
    }
}

fn begin(context: &Context, args: &Args, group: &str) -> Outcome {
    check::group(group)?;
    let at = check::point(&args.at)?;
    let go = |dry_run: bool| -> Result<FailoverReply, Problem> {
        let request = ReceiverRequest::Failover { group: group.to_owned(), at: at.clone(), test: args.test, dry_run };
        ask_receiver(context, &request, PATIENT)
    };
    if !args.dry_run && !args.test {
        let again = context.suggest(&format!("failover {group} --at '{}'", args.at));
        // What would be lost is shown before anybody is asked.
        if !args.yes && std::io::stdin().is_terminal() {
            note(text_of(context, &go(true)?).trim_end());
        }
        confirm(args.yes, &format!("fence off the source of '{group}' and run it here?"), &again)?;
    }
    let reply = go(args.dry_run)?;
    context.answer(&reply, |reply| text_of(context, reply));
    Ok(DONE)
}

fn commit(context: &Context, args: &Args, group: &str) -> Outcome {
    check::group(group)?;
    let again = context.suggest(&format!("failover commit {group}"));
    confirm(args.yes, &format!("give up the way back to replication of '{group}'?"), &again)?;
    let reply: FailoverReply =
        ask_receiver(context, &ReceiverRequest::FailoverCommit { group: group.to_owned() }, PATIENT)?;
    context.answer(&reply, |reply| {
        let next = context.suggest(&format!("failback {}", reply.group));
        format!(
            "group '{}' runs here for good, under epoch {}\nnext: '{next}' when it shall run at the source again\n",
            reply.group, reply.epoch
        )
    });
    Ok(DONE)
}

fn abort(context: &Context, args: &Args, group: &str) -> Outcome {
    check::group(group)?;
    let again = context.suggest(&format!("failover abort {group}"));
    let question = format!("undo the takeover of '{group}'? What was written here since stays in the history only");
    confirm(args.yes, &question, &again)?;
    let request = ReceiverRequest::FailoverAbort { group: group.to_owned(), force: args.force };
    let reply: FailoverReply = ask_receiver(context, &request, PATIENT)?;
    context.answer(&reply, |reply| match reply.test {
        true => format!("the test of group '{}' is over, what was written to it is gone\n", reply.group),
        false => format!(
            "the takeover of group '{}' is undone: the replica is what it was at {}, the source may go on\nnext: {}\n",
            reply.group,
            words::exact_time(&reply.newest.time),
            context.suggest(&format!("status {}", reply.group))
        ),
    });
    Ok(DONE)
}

fn text_of(context: &Context, reply: &FailoverReply) -> String {
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
    lines.push(match (reply.not_here_bytes, reply.source_heard_seconds) {
        (Some(bytes), Some(seconds)) => format!(
            "  not here: {} that the source had captured when it was heard of last, {} ago",
            words::bytes(bytes),
            words::seconds(seconds)
        ),
        _ => "  not here: unknown, nothing was heard of the source since this receiver started".to_owned(),
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
