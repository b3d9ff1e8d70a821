//! `varve failover`: runs a group on the recovery host; `commit` and `abort` end it one way or the other.

use crate::check;
use crate::client::{Daemon, PATIENT, ask, ask_agent, ask_receiver};
use crate::confirm::confirm;
use crate::context::{Context, DONE, Outcome, note};
use crate::progress::Meter;
use crate::words;
use std::io::IsTerminal;
use varve_common::control::{AgentRequest, FailoverReply, PlannedWish, ReceiverRequest};
use varve_common::problem::Problem;

const EXAMPLE: &str = "Example:
  varve failover db --dry-run
  varve failover db --test --at -10m
  varve failover db --planned
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
    /// Lose nothing: the source stops what uses the volumes (its hook `quiesce`), lets nobody write them and sends everything;
    /// both sides are compared. If that does not work nothing is changed
    #[arg(long, conflicts_with = "test")]
    planned: bool,
    /// How long the source may take for that
    #[arg(long, value_name = "SECONDS", default_value_t = 60, requires = "planned", value_parser = clap::value_parser!(u64).range(1..=3600))]
    limit: u64,
    /// Compare nothing: the source can write while it is compared neither here nor there
    #[arg(long, requires = "planned")]
    quick: bool,
    /// Print the point, what would be left out and lost; change nothing
    #[arg(long)]
    dry_run: bool,
    /// Abort although a device is in use: its users get errors. On the production host: although the group may run on the
    /// recovery host
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
        let planned = args.planned.then_some(PlannedWish { limit_seconds: args.limit, quick: args.quick });
        let (group, at, test) = (group.to_owned(), at.clone(), args.test);
        let mut meter = Meter::new(format!("switching over {group}"), context.json);
        let request = ReceiverRequest::Failover { group, at, test, dry_run, planned };
        let reply = ask(context, Daemon::Receiver, &request, PATIENT, &mut |step| meter.show(&step));
        meter.end();
        reply
    };
    if !args.dry_run && !args.test {
        let again = context.suggest(&format!("failover {group} --at '{}'", args.at));
        // What would be lost is shown before anybody is asked.
        if !args.yes && std::io::stdin().is_terminal() {
            note(text_of(context, &go(true)?).trim_end());
        }
        let question = match args.planned {
            true => format!("stop what uses '{group}' at its source and run it here?"),
            false => format!("fence off the source of '{group}' and run it here?"),
        };
        confirm(args.yes, &question, &again)?;
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

/// On the production host: the quiet of a planned switch-over.
fn resume(context: &Context, args: &Args, group: &str) -> Outcome {
    let again = context.suggest(&format!("failover abort {group}"));
    confirm(args.yes, &format!("let the volumes of '{group}' be written here again?"), &again)?;
    let () = ask_agent(context, &AgentRequest::Resume { group: group.to_owned(), force: args.force }, PATIENT)?;
    context.answer(&(), |()| format!("the volumes of group '{group}' may be written here again\n"));
    Ok(DONE)
}

fn abort(context: &Context, args: &Args, group: &str) -> Outcome {
    check::group(group)?;
    if !Daemon::Receiver.is_here(&context.paths) && Daemon::Agent.is_here(&context.paths) {
        return resume(context, args, group);
    }
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
    if let Some(drained) = &reply.drained {
        let seconds = words::fine_seconds(drained.seconds);
        lines.push(match drained.complete {
            true => format!("  source: told, and sent all that it had captured, within {seconds}"),
            false => format!("  source: told, but did not send all that it had captured within {seconds}"),
        });
    }
    if let Some(planned) = &reply.planned {
        let compared = match planned.compared_bytes {
            0 => "not compared".to_owned(),
            bytes => format!("{} compared and equal", words::bytes(bytes)),
        };
        let quiet = if planned.read_only { "read-only" } else { "claimed" };
        let pause = words::fine_seconds(planned.pause_seconds);
        lines.push(format!("  nothing is lost: the source is {quiet} since {}, {compared}", planned.barrier));
        lines.push(format!("  nobody could write for {pause}"));
    }
    lines.push(match (reply.not_here_bytes, reply.source_heard_seconds) {
        (Some(0), _) if reply.planned.is_some() => "  not here: nothing".to_owned(),
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
