//! `varve failover commit` and `abort`: how a takeover or a test ends.

use super::failover::Args;
use crate::check;
use crate::client::{Daemon, PATIENT, ask_agent, ask_authority};
use crate::confirm::confirm;
use crate::context::{Context, DONE, Outcome, explain, note};
use crate::progress::Meter;
use crate::takeover;
use crate::words;
use serde::Serialize;
use varve_common::control::{AgentRequest, FailoverReply, GroupStatus, ReceiverRequest, TakeoverStatus};
use varve_common::problem::{Problem, ProblemKind};
use varve_common::state::Link;
use varve_takeover::{Mode, standing};

/// What a commit or an abort would end.
#[derive(Serialize)]
struct WouldEnd {
    group: String,
    dry_run: bool,
    test: bool,
    committed: bool,
    epoch: u64,
    since: Option<String>,
    point: Option<String>,
    abort_at: Option<String>,
    /// Of the stream that was written here.
    written_bytes: Option<u64>,
    devices: Vec<String>,
    /// Who uses the devices now.
    users: Vec<String>,
    /// What the plan would take back, in words.
    plan: Vec<String>,
}

impl WouldEnd {
    fn new(status: &GroupStatus, takeover: Option<&TakeoverStatus>, plan: Vec<String>) -> Self {
        let devices = takeover.map(|takeover| takeover.devices.clone()).unwrap_or_default();
        Self {
            group: status.name.clone(),
            dry_run: true,
            test: takeover.is_some_and(|takeover| takeover.test),
            committed: takeover.is_some_and(|takeover| takeover.committed),
            epoch: status.epoch,
            since: takeover.map(|takeover| takeover.since.clone()),
            point: takeover.map(|takeover| takeover.point.clone()),
            abort_at: takeover.and_then(|takeover| takeover.abort_at.clone()),
            written_bytes: status.authority.as_ref().and_then(|authority| authority.not_home_bytes),
            users: devices.iter().filter_map(varve_io::blockdev::in_use).collect(),
            devices,
            plan,
        }
    }

    /// What both have to say, after their first line.
    fn text(&self, head: String) -> String {
        let mut lines = vec![format!("{head}; nothing was changed")];
        if let Some((since, point)) = self.since.as_deref().zip(self.point.as_deref()) {
            let (since, point) = (words::time(since), words::exact_time(point));
            lines.push(format!("  taken over at {since}, at the point {point}"));
        }
        if let Some(bytes) = self.written_bytes {
            lines.push(format!("  written here since: {} of the group's stream", words::bytes(bytes)));
        }
        lines.extend(self.plan.iter().map(|left| format!("  taken back before: {left}")));
        lines.join("\n") + "\n"
    }
}

pub(super) fn commit(context: &Context, args: &Args, group: &str) -> Outcome {
    check::group(group)?;
    if args.dry_run {
        return look_at_commit(context, group);
    }
    let again = context.suggest(&format!("failover commit {group}"));
    confirm(args.yes, &format!("give up the way back to replication of '{group}'?"), &again)?;
    let request = ReceiverRequest::FailoverCommit { group: group.to_owned() };
    let reply: FailoverReply = ask_authority(context, group, &request, "then the same command again", &mut |_| {})?;
    context.answer(&reply, |reply| {
        let next = context.suggest(&format!("failback {}", reply.group));
        format!(
            "group '{}' runs here for good, under epoch {}\nnext: '{next}' when it shall run at the source again\n",
            reply.group, reply.epoch
        )
    });
    // An abort that came too late may have taken it back before it was refused.
    if takeover::plan(context, group)?.is_some() && standing(&context.paths, group, Mode::Live)?.is_none() {
        note(&format!("its takeover plan is not in place: '{}' runs it", takeover::resume_command(context, group)));
    }
    Ok(DONE)
}

fn look_at_commit(context: &Context, group: &str) -> Outcome {
    let status = Daemon::Receiver.group(context, group)?;
    let takeover = status.history.as_ref().and_then(|history| history.takeover.as_ref());
    let Some(takeover) = takeover.filter(|takeover| !takeover.test) else { return Err(nothing(context, group)) };
    if takeover.aborting {
        let next = format!("'{}' goes on with that", takeover::abort_command(context, group));
        return Err(Problem::refused(format!("'{group}' cannot be committed"), "it is being undone", next));
    }
    context.answer(&WouldEnd::new(&status, Some(takeover), Vec::new()), |would| {
        if would.committed {
            return would.text(format!("group '{group}' runs here for good already, under epoch {}", would.epoch));
        }
        let mut text = would.text(format!("group '{group}' would run here for good, under epoch {}", would.epoch));
        if let Some(at) = &would.abort_at {
            text.push_str(&format!("  it would not go back by itself at {} any more\n", words::exact_time(at)));
        }
        text + "  'varve failover abort' would be refused: the way back is 'varve failback'\n"
    });
    Ok(DONE)
}

fn nothing(context: &Context, group: &str) -> Problem {
    let next = format!("'{}' shows what it does", context.suggest(&format!("status {group}")));
    Problem::refused(format!("nothing of '{group}' to commit or abort"), "it is not taken over", next)
}

pub(super) fn abort(context: &Context, args: &Args, group: &str) -> Outcome {
    check::group(group)?;
    if is_sources(context, group) {
        return resume(context, args, group);
    }
    if args.dry_run {
        return look_at_abort(context, args, group);
    }
    let again = context.suggest(&format!("failover abort {group}{}", force(args)));
    let question = format!("undo the takeover of '{group}'? What was written here since stays in the history only");
    confirm(args.yes, &question, &again)?;
    undo_plan(context, args, group)?;
    let request = ReceiverRequest::FailoverAbort { group: group.to_owned(), force: args.force, only_test: false };
    let mut meter = Meter::new(format!("undoing the takeover of {group}"), context.json);
    let then = "the same command goes on with it";
    let reply: Result<FailoverReply, Problem> =
        ask_authority(context, group, &request, then, &mut |step| meter.show(&step));
    meter.end();
    context.answer(&reply?, |reply| match reply.test {
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

/// Whether what is to be aborted is the quiet of a group of this host, which its agent ends. A host may have both roles.
fn is_sources(context: &Context, group: &str) -> bool {
    if !Daemon::Agent.is_here(&context.paths) {
        return false;
    }
    if !Daemon::Receiver.is_here(&context.paths) {
        return true;
    }
    let received = Daemon::Receiver.group(context, group);
    let taken_over = |status: GroupStatus| status.history.is_some_and(|history| history.takeover.is_some());
    let unknown = matches!(&received, Err(problem) if problem.kind == ProblemKind::NotFound);
    if received.is_ok_and(taken_over) {
        return false;
    }
    let own = Daemon::Agent.group(context, group);
    own.is_ok_and(|own| unknown || own.authority.is_some_and(|authority| authority.quiet.is_some()))
}

fn force(args: &Args) -> &'static str {
    if args.force { " --force" } else { "" }
}

fn look_at_abort(context: &Context, args: &Args, group: &str) -> Outcome {
    let status = Daemon::Receiver.group(context, group)?;
    let takeover = status.history.as_ref().and_then(|history| history.takeover.as_ref());
    if takeover.is_some_and(|takeover| takeover.committed) {
        let next = context.suggest(&format!("failback {group}"));
        let next = format!("'{next}' brings it home with everything that was written here");
        return Err(Problem::refused(format!("'{group}' cannot be aborted"), "the takeover is committed", next));
    }
    let mut plan = Vec::new();
    let mut stands = false;
    for mode in modes(takeover) {
        let Some(run) = standing(&context.paths, group, *mode)? else { continue };
        stands = true;
        plan.extend(run.left);
    }
    if takeover.is_none() && !stands {
        return Err(nothing(context, group));
    }
    context.answer(&WouldEnd::new(&status, takeover, plan), |would| {
        let mut text = would.text(match (&would.since, would.test) {
            (None, _) => format!("group '{group}' is not taken over; what its plan left would be taken back"),
            (_, true) => format!("the test of group '{group}' would be over, what was written to it gone"),
            (_, false) => format!(
                "the takeover of group '{group}' would be undone: what was written here would stay in the history only, \
                 the replica would be what it was before, and the source might go on"
            ),
        });
        would.devices.iter().for_each(|device| text.push_str(&format!("  goes away: {device}\n")));
        let then = match args.force {
            true => "its users would get errors",
            false => "what is not in the plan has to be stopped first, or the abort is refused",
        };
        would.users.iter().for_each(|user| text.push_str(&format!("  in use: {user}; {then}\n")));
        text
    });
    Ok(DONE)
}

/// On the production host: the quiet of a planned switch-over.
fn resume(context: &Context, args: &Args, group: &str) -> Outcome {
    if args.dry_run {
        return look_at_resume(context, args, group);
    }
    let again = context.suggest(&format!("failover abort {group}{}", force(args)));
    confirm(args.yes, &format!("let the volumes of '{group}' be written here again?"), &again)?;
    let () = ask_agent(context, &AgentRequest::Resume { group: group.to_owned(), force: args.force }, PATIENT)?;
    context.answer(&(), |()| format!("the volumes of group '{group}' may be written here again\n"));
    Ok(DONE)
}

/// As the agent decides.
fn look_at_resume(context: &Context, args: &Args, group: &str) -> Outcome {
    #[derive(Serialize)]
    struct WouldResume {
        group: String,
        dry_run: bool,
        quiet: Option<String>,
        authority: String,
        volumes: Vec<String>,
    }
    let status = Daemon::Agent.group(context, group)?;
    let what = format!("the volumes of '{group}' would stay as they are");
    let Some(authority) = status.authority.filter(|authority| authority.quiet.is_some()) else {
        let next = format!("'{}' shows what it does", context.suggest(&format!("status {group}")));
        return Err(Problem::refused(what, "no planned switch-over has made them quiet", next));
    };
    if status.link == Link::Streaming {
        let next = "stop the command on the recovery host; they are writable again by themselves then";
        return Err(Problem::refused(what, "a planned switch-over is under way", next));
    }
    if !args.force {
        let next = format!("{}; --force makes them writable here: what is written then is a branch", authority.next);
        return Err(Problem::refused(what, authority.text, next));
    }
    let would = WouldResume {
        group: group.to_owned(),
        dry_run: true,
        quiet: authority.quiet,
        authority: authority.text,
        volumes: status.volumes.into_iter().map(|volume| volume.path).collect(),
    };
    context.answer(&would, |would| {
        let volumes = would.volumes.join(", ");
        format!(
            "the volumes of group '{group}' ({volumes}) might be written here again; nothing was changed\n  {}\n  if it runs \
             on the recovery host, what is written here is a branch\n",
            would.authority
        )
    });
    Ok(DONE)
}

/// Whose steps an abort takes back. None for a takeover that will not be undone.
fn modes(takeover: Option<&TakeoverStatus>) -> &'static [Mode] {
    match takeover {
        Some(takeover) if takeover.committed => &[],
        Some(takeover) if takeover.test => &[Mode::Test],
        Some(_) => &[Mode::Live],
        None => &[Mode::Test, Mode::Live],
    }
}

/// What the plan has done goes first: it uses the devices.
fn undo_plan(context: &Context, args: &Args, group: &str) -> Result<(), Problem> {
    let status = Daemon::Receiver.group(context, group)?.history.and_then(|history| history.takeover);
    let modes = modes(status.as_ref());
    for mode in modes {
        let Some(report) = takeover::take_back(context, group, *mode)? else { continue };
        if !context.json {
            note(report.to_string().trim_end());
        }
        match takeover::not_taken_back(report) {
            Some(problem) if !args.force => return Err(problem),
            Some(problem) => explain(&problem),
            None => {}
        }
    }
    if modes.contains(&Mode::Test) {
        varve_takeover::clean(&context.paths, group, &varve_takeover::Tools::default())?;
    }
    Ok(())
}
