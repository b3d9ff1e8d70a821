//! `varve failback`: brings a group that runs on the recovery host home.

use crate::check;
use crate::client::{Daemon, PATIENT, ask, ask_agent, ask_receiver};
use crate::confirm::confirm;
use crate::context::{Context, DONE, Outcome, note};
use crate::progress::Meter;
use crate::words;
use std::io::IsTerminal;
use varve_common::control::{AgentRequest, FailbackReply, ProtectReply, ReceiverRequest};
use varve_common::problem::Problem;

const EXAMPLE: &str = "Example, recovery host:
  varve failback db --dry-run
  varve failback db --yes
  varve failback db --cut-over --yes
Example, another host that shall have the group:
  varve failback db --volume /dev/vdb --volume /dev/vdc --yes";

/// On the recovery host: compares the volumes of the group's host with what runs here and writes there what differs, again
/// and again, while business goes on here. What that host wrote and never sent is overwritten: look with --dry-run, or mount
/// its volumes there before. With --cut-over, when nobody uses the devices here any more, it is given back: both sides are
/// compared, from then on it runs and is protected there, under a new epoch. Broken off anywhere, it goes on by itself.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The group's name (varve status)
    group: String,
    /// Give it back: nobody may use the devices here
    #[arg(long, conflicts_with_all = ["to", "volume", "stop"])]
    cut_over: bool,
    /// Compare only what was sent since the volumes were claimed, not all of them, while nobody can write
    #[arg(long, requires = "cut_over")]
    quick: bool,
    /// To this host instead of the one that it had (varve host list)
    #[arg(long, value_name = "HOST", conflicts_with_all = ["volume", "stop"])]
    to: Option<String>,
    /// On the host that shall have it: these are its volumes, in their order
    #[arg(long, value_name = "DEVICE", conflicts_with = "stop")]
    volume: Vec<String>,
    /// It stays here
    #[arg(long)]
    stop: bool,
    /// Print what would be sent and what would be overwritten; change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::group(&args.group)?;
    if !args.volume.is_empty() {
        return take(context, args);
    }
    if args.stop {
        return stop(context, args);
    }
    if args.cut_over {
        return cut_over(context, args);
    }
    let group = &args.group;
    let go = |dry_run: bool| -> Result<FailbackReply, Problem> {
        let what = if dry_run { "comparing" } else { "bringing home" };
        let request = ReceiverRequest::Failback { group: group.clone(), host: args.to.clone(), dry_run };
        follow(context, &format!("{what} {group}"), &request)
    };
    if !args.dry_run {
        let to = args.to.as_ref().map_or(String::new(), |host| format!(" --to {host}"));
        let again = context.suggest(&format!("failback {group}{to}"));
        if !args.yes && std::io::stdin().is_terminal() {
            note(text_of(&go(true)?).trim_end());
        }
        confirm(args.yes, &format!("overwrite the volumes of '{group}' at home with what runs here?"), &again)?;
    }
    let reply = go(args.dry_run)?;
    context.answer(&reply, text_of);
    Ok(DONE)
}

fn follow(context: &Context, what: &str, request: &ReceiverRequest) -> Result<FailbackReply, Problem> {
    let mut meter = Meter::new(what.to_owned(), context.json);
    let reply = ask(context, Daemon::Receiver, request, PATIENT, &mut |step| meter.show(&step));
    meter.end();
    reply
}

fn cut_over(context: &Context, args: &Args) -> Outcome {
    let group = &args.group;
    if !args.dry_run {
        let again = context.suggest(&format!("failback {group} --cut-over"));
        confirm(args.yes, &format!("give '{group}' back? Its devices here go away"), &again)?;
    }
    let (quick, dry_run) = (args.quick, args.dry_run);
    let request = ReceiverRequest::FailbackCutOver { group: group.clone(), quick, dry_run };
    let reply = follow(context, &format!("giving back {group}"), &request)?;
    context.answer(&reply, text_of);
    Ok(DONE)
}

fn stop(context: &Context, args: &Args) -> Outcome {
    let group = &args.group;
    if args.dry_run {
        return Err(Problem::usage("nothing to print", "--stop changes nothing but that", "varve failback --help"));
    }
    confirm(args.yes, &format!("keep '{group}' here?"), &context.suggest(&format!("failback {group} --stop")))?;
    let reply: FailbackReply = ask_receiver(context, &ReceiverRequest::FailbackStop { group: group.clone() }, PATIENT)?;
    context.answer(&reply, text_of);
    Ok(DONE)
}

/// On the host that shall have it.
fn take(context: &Context, args: &Args) -> Outcome {
    let (group, volumes) = (&args.group, &args.volume);
    if args.dry_run {
        let next = format!("'varve failback {group} --dry-run' on the recovery host");
        return Err(Problem::usage("nothing to print", "what would be sent is known there", next));
    }
    let again = context.suggest(&format!("failback {group} --volume {}", volumes.join(" --volume ")));
    let question = format!("overwrite {} with the volumes of '{group}'?", volumes.join(", "));
    confirm(args.yes, &question, &again)?;
    let request = AgentRequest::ComeHome { group: group.clone(), volumes: volumes.clone() };
    let reply: ProtectReply = ask_agent(context, &request, PATIENT)?;
    context.answer(&reply, |reply| {
        let mut lines = vec![format!("group '{}' comes here: its volumes are being written", reply.group)];
        lines.extend(reply.volumes.iter().map(|volume| format!("  {} ({})", volume.path, words::bytes(volume.bytes))));
        lines.push(format!(
            "next: on the recovery host '{}'",
            format_args!("varve failback {} --cut-over", reply.group)
        ));
        lines.join("\n") + "\n"
    });
    Ok(DONE)
}

fn text_of(reply: &FailbackReply) -> String {
    let (group, host) = (&reply.group, &reply.host);
    let head = match (reply.dry_run, reply.home, reply.phase.as_str()) {
        (true, ..) => format!("group '{group}' would come home to '{host}'; nothing was changed"),
        (_, true, _) => format!("group '{group}' runs on '{host}' again, under epoch {}", reply.epoch),
        (_, _, "stopped") => format!("group '{group}' stays here"),
        _ => format!("group '{group}' comes home to '{host}': its volumes there follow what is written here"),
    };
    let mut lines = vec![head];
    if !reply.home {
        lines.push(format!("  changed here since it was taken over: {}", words::bytes(reply.changed_here_bytes)));
    }
    if reply.dry_run && reply.phase == "none" {
        lines.push(match (reply.differing_bytes, reply.only_there_bytes) {
            (Some(differ), Some(there)) => format!(
                "  to be sent: {}; of that {} did not change here: '{host}' wrote it and never sent it, and it would be \
                 overwritten there",
                words::bytes(differ),
                words::bytes(there)
            ),
            _ => format!("  to be sent: not known, '{host}' was not compared"),
        });
        lines.push(match reply.captured_there_bytes {
            Some(bytes) => format!("  captured on '{host}' and never here: {} of its stream", words::bytes(bytes)),
            None => format!("  captured on '{host}' and never here: not known (it began anew, or was not heard of)"),
        });
    } else if reply.sent_bytes > 0 || reply.home {
        let compared = words::bytes(reply.compared_bytes);
        lines.push(format!("  sent: {}, compared: {compared}", words::bytes(reply.sent_bytes)));
    }
    if let Some(pause) = reply.pause_seconds {
        lines.push(format!("  nobody could write for {}", words::seconds(pause)));
    }
    if let Some(lag) = reply.lag_seconds {
        lines.push(format!("  it is {} behind", words::fine_seconds(lag)));
    }
    if !reply.next.is_empty() {
        lines.push(format!("next: {}", reply.next));
    }
    lines.join("\n") + "\n"
}
