//! `varve failback`: brings a group that runs on the recovery host home.

use crate::check;
use crate::client::{Daemon, PATIENT, ask, ask_agent, ask_authority};
use crate::confirm::confirm;
use crate::context::{Context, DONE, Outcome, note};
use crate::progress::Meter;
use crate::takeover;
use crate::words;
use serde::Serialize;
use std::io::IsTerminal;
use std::time::{Duration, Instant};
use varve_common::control::{AgentRequest, FailbackReply, FailbackStatus, ProtectReply, ReceiverRequest, VolumeStatus};
use varve_common::problem::{Problem, ProblemKind};
use varve_takeover::{Mode, standing};

/// A cut-over begins when home is less far behind,
const CLOSE_SECONDS: f64 = 1.0;
/// or when this long was waited for it.
const CLOSE_WAIT_MAX: Duration = Duration::from_secs(30);
const CLOSE_PAUSE: Duration = Duration::from_millis(100);

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
    /// Give it back: what the takeover plan started here is stopped; nobody else may use the devices here
    #[arg(long, conflicts_with_all = ["to", "volume", "stop"])]
    cut_over: bool,
    /// Compare only what was sent since the volumes were claimed, not all of them, while nobody can write
    #[arg(long, requires = "cut_over", conflicts_with_all = ["to", "volume", "stop", "keep_branch"])]
    quick: bool,
    /// To this host instead of the one that it had (varve host list)
    #[arg(long, value_name = "HOST", conflicts_with_all = ["volume", "stop"])]
    to: Option<String>,
    /// On the host that shall have it: these are its volumes, in their order
    #[arg(long, value_name = "DEVICE", conflicts_with = "stop")]
    volume: Vec<String>,
    /// Keep what only that host has (what it wrote after the takeover and never sent) as a group of this name, before it is
    /// overwritten: its points can be opened here
    #[arg(long, value_name = "NAME", conflicts_with_all = ["cut_over", "volume", "stop"])]
    keep_branch: Option<String>,
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
        let (host, keep_branch) = (args.to.clone(), args.keep_branch.clone());
        let request = ReceiverRequest::Failback { group: group.clone(), host, keep_branch, dry_run };
        match dry_run {
            true => follow(context, group, "comparing", &request, None),
            false => follow(context, group, "bringing home", &request, Some("what was begun goes on by itself")),
        }
    };
    if !args.dry_run {
        let to = args.to.as_ref().map_or(String::new(), |host| format!(" --to {host}"));
        let keep = args.keep_branch.as_ref().map_or(String::new(), |name| format!(" --keep-branch {name}"));
        let again = context.suggest(&format!("failback {group}{to}{keep}"));
        let mut question = format!("overwrite the volumes of '{group}' at home with what runs here?");
        if !args.yes {
            // What is lost is named before anybody is asked.
            let is_asked = std::io::stdin().is_terminal();
            match go(true) {
                Ok(look) => {
                    if is_asked {
                        note(text_of(&look).trim_end());
                    }
                    question = format!("{question} {}", lost(&look, args.keep_branch.as_deref()));
                }
                // It may be called home all the same: that goes on when its host is there.
                Err(problem) if is_asked && problem.kind == ProblemKind::Unreachable => {
                    question = format!("{question} {}: {}", problem.what, problem.why);
                }
                Err(problem) => return Err(problem),
            }
        }
        confirm(args.yes, &question, &again)?;
    }
    let reply = go(args.dry_run)?;
    context.answer(&reply, text_of);
    Ok(DONE)
}

/// What becomes of what only the old source has.
fn lost(look: &FailbackReply, keep: Option<&str>) -> String {
    let since = look.branch_since.as_deref().map_or("the takeover".to_owned(), words::exact_time);
    match (look.branch_bytes, keep) {
        (Some(0), _) => format!("'{}' has nothing for itself", look.host),
        (Some(bytes), Some(name)) => {
            format!(
                "{} that only '{}' wrote, after {since}, are kept as group '{name}'",
                words::bytes(bytes),
                look.host
            )
        }
        (Some(bytes), None) => format!(
            "{} that only '{}' wrote, after {since}, are lost then (--keep-branch NAME keeps them)",
            words::bytes(bytes),
            look.host
        ),
        (None, _) => format!("what only '{}' wrote after {since} is not known", look.host),
    }
}

/// `then`: what comes after an answer that was lost; `None`: nothing is changed.
fn follow(
    context: &Context,
    group: &str,
    what: &str,
    request: &ReceiverRequest,
    then: Option<&str>,
) -> Result<FailbackReply, Problem> {
    let mut meter = Meter::new(format!("{what} {group}"), context.json);
    let mut show = |step| meter.show(&step);
    let reply = match then {
        Some(then) => ask_authority(context, group, request, then, &mut show),
        None => ask(context, Daemon::Receiver, request, PATIENT, &mut show),
    };
    meter.end();
    reply
}

fn cut_over(context: &Context, args: &Args) -> Outcome {
    let group = &args.group;
    if !args.dry_run {
        let quick = if args.quick { " --quick" } else { "" };
        let again = context.suggest(&format!("failback {group} --cut-over{quick}"));
        confirm(args.yes, &format!("give '{group}' back? Its devices here go away"), &again)?;
    }
    let (quick, dry_run) = (args.quick, args.dry_run);
    let request = |dry_run| ReceiverRequest::FailbackCutOver { group: group.clone(), quick, dry_run };
    if dry_run {
        let reply: FailbackReply = follow(context, group, "giving back", &request(true), None)?;
        context.answer(&reply, text_of);
        return Ok(DONE);
    }
    wait_close(context, group)?;
    // What cannot be done is found while business still runs here.
    if standing(&context.paths, group, Mode::Live)?.is_some() {
        let _: FailbackReply = follow(context, group, "looking at", &request(true), None)?;
    }
    let taken_back = take_back_plan(context, group)?;
    let then = Some("if it runs here still, the same command again");
    let reply = follow(context, group, "giving back", &request(false), then).map_err(|mut problem| {
        if taken_back {
            let again = takeover::resume_command(context, group);
            problem.next = format!("{}; '{again}' starts here again what the plan had started", problem.next);
        }
        problem
    })?;
    context.answer(&reply, text_of);
    Ok(DONE)
}

/// Waits until home is close behind, since the rest is sent while nobody can write. A line that does not let it come that close
/// is no reason to stay.
fn wait_close(context: &Context, group: &str) -> Result<(), Problem> {
    let begin = Instant::now();
    let mut told = false;
    loop {
        let status = Daemon::Receiver.group(context, group)?;
        let failback = status.history.and_then(|history| history.takeover).and_then(|takeover| takeover.failback);
        // One that is not under way, or not that far, is refused by the command itself.
        let lag = failback.and_then(|failback| failback.lag_seconds).filter(|lag| *lag >= CLOSE_SECONDS);
        let Some(lag) = lag.filter(|_| begin.elapsed() < CLOSE_WAIT_MAX) else { return Ok(()) };
        if !told {
            note(&format!("home is {} behind: waiting for less than a second", words::fine_seconds(lag)));
            told = true;
        }
        std::thread::sleep(CLOSE_PAUSE);
    }
}

/// What the takeover plan has started here uses the devices. Whether there was something.
fn take_back_plan(context: &Context, group: &str) -> Result<bool, Problem> {
    let Some(report) = takeover::take_back(context, group, Mode::Live)? else { return Ok(false) };
    if !context.json {
        note(report.to_string().trim_end());
    }
    takeover::not_taken_back(report).map_or(Ok(true), Err)
}

/// What `--stop` would end.
#[derive(Serialize)]
struct WouldStop {
    group: String,
    dry_run: bool,
    #[serde(flatten)]
    failback: FailbackStatus,
}

fn stop(context: &Context, args: &Args) -> Outcome {
    let group = &args.group;
    if args.dry_run {
        let takeover = Daemon::Receiver.group(context, group)?.history.and_then(|history| history.takeover);
        let failback = takeover.and_then(|takeover| takeover.failback).ok_or_else(|| {
            let next = format!("'{}' calls it home", context.suggest(&format!("failback {group}")));
            Problem::refused(format!("nothing of '{group}' to stop"), "it was not called home", next)
        })?;
        context.answer(&WouldStop { group: group.clone(), dry_run: true, failback }, |would| {
            let (host, sent) = (&would.failback.host, words::bytes(would.failback.sent_bytes));
            format!(
                "group '{group}' would stay here; nothing was changed\n  the volumes on '{host}' would be left as they are: partly overwritten, {sent} were sent\n"
            )
        });
        return Ok(DONE);
    }
    confirm(args.yes, &format!("keep '{group}' here?"), &context.suggest(&format!("failback {group} --stop")))?;
    let request = ReceiverRequest::FailbackStop { group: group.clone() };
    let reply: FailbackReply = ask_authority(context, group, &request, "then the same command again", &mut |_| {})?;
    context.answer(&reply, text_of);
    Ok(DONE)
}

/// What `--volume` would overwrite.
#[derive(Serialize)]
struct WouldTake {
    group: String,
    dry_run: bool,
    volumes: Vec<VolumeStatus>,
}

/// On the host that shall have it.
fn take(context: &Context, args: &Args) -> Outcome {
    let (group, volumes) = (&args.group, &args.volume);
    if args.dry_run {
        // The agent looks at the volumes of a group that comes as at those of a new one.
        let (group, volumes) = (group.clone(), volumes.clone());
        let request = AgentRequest::Protect { group, volumes, replicas: Vec::new(), dry_run: true };
        let reply: ProtectReply = ask_agent(context, &request, PATIENT)?;
        context.answer(&WouldTake { group: reply.group, dry_run: true, volumes: reply.volumes }, |would| {
            let head = format!("group '{}' would come here; nothing was changed", would.group);
            let volume = |it: &VolumeStatus| format!("  overwritten: {} ({})", it.path, words::bytes(it.bytes));
            let lines: Vec<String> = std::iter::once(head).chain(would.volumes.iter().map(volume)).collect();
            lines.join("\n") + "\n"
        });
        return Ok(DONE);
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
        if reply.branch_bytes.is_some() {
            lines.push(format!("  branch: {}", lost(reply, None)));
        }
    } else if reply.sent_bytes > 0 || reply.home {
        let compared = words::bytes(reply.compared_bytes);
        lines.push(format!("  sent: {}, compared: {compared}", words::bytes(reply.sent_bytes)));
    }
    if let Some(name) = &reply.branch_kept {
        lines.push(format!(
            "  what only '{host}' had is kept: group '{name}', bookmarks split and branch (varve points {name})"
        ));
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
