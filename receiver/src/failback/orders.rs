//! What the operator asks: what would be sent, begin, give up. (The cut-over is in [`super::cutover`].)

use super::Looked;
use crate::apply::rollback::measure;
use crate::control::ProgressOut;
use crate::group::meta::{Failback, GroupMeta, unhex};
use crate::group::registry::Slot;
use crate::limits::{HOME_CONNECT_TIME_MAX, HOME_LOOK_INTERVAL};
use crate::promote::{Context, blocking};
use crate::view::views::find;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use varve_common::control::{FailbackReply, VolumeStatus, show_time};
use varve_common::point::PointSpec;
use varve_common::problem::Problem;

fn now() -> String {
    show_time(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64)
}

/// What is known without asking the host.
pub(super) fn bare_reply(slot: &Slot, meta: &GroupMeta, host: &str) -> FailbackReply {
    let takeover = meta.takeover.as_ref();
    let timeline = slot.board().timeline.clone();
    let measured =
        takeover.zip(timeline).and_then(|(takeover, timeline)| measure(&timeline, takeover.before_height).ok());
    let not_here = takeover.zip(slot.failback.heard()).and_then(|(takeover, heard)| {
        let same = heard.incarnation == unhex(&takeover.source_incarnation);
        same.then(|| heard.newest.saturating_sub(takeover.source_position))
    });
    let shown = slot.failback.shown();
    let status = slot.failback.status(Some(meta));
    FailbackReply {
        group: meta.name.clone(),
        host: host.to_owned(),
        epoch: meta.epoch,
        phase: status.as_ref().map_or("none".to_owned(), |status| status.phase.clone()),
        changed_here_bytes: measured.map_or(0, |extent| extent.bytes),
        differing_bytes: None,
        only_there_bytes: None,
        captured_there_bytes: not_here,
        branch_bytes: None,
        branch_since: takeover.map(|takeover| show_time(takeover.before_time_ns)),
        branch_kept: meta.failback.as_ref().filter(|it| it.kept).and_then(|it| it.keep_branch.clone()),
        compared_bytes: shown.total_bytes,
        sent_bytes: shown.sent_bytes,
        lag_seconds: shown.lag.map(|lag| lag.as_secs_f64()),
        pause_seconds: None,
        seconds: 0.0,
        home: false,
        dry_run: false,
        volumes: meta
            .volumes
            .iter()
            .map(|volume| VolumeStatus {
                path: volume.path.clone(),
                bytes: volume.bytes,
                replica: Some(volume.replica.display().to_string()),
            })
            .collect(),
        next: status.map_or_else(String::new, |status| status.next),
    }
}

/// The group runs here for good.
fn refuse_not_committed(slot: &Slot, what: &str) -> Result<GroupMeta, Problem> {
    let name = &slot.name;
    let meta = slot.board().meta.clone();
    match meta.as_ref().and_then(|meta| meta.takeover.as_ref()) {
        Some(takeover) if takeover.committed => {}
        Some(_) => {
            let next =
                format!("'varve failover commit {name}' first; or 'varve failover abort {name}' goes back at once");
            return Err(Problem::refused(
                what,
                "its takeover is not committed: what was written here may still be given up",
                next,
            ));
        }
        None => {
            let next = format!("'varve status {name}' shows where it runs; 'varve failover {name}' takes it over");
            return Err(Problem::refused(what, "it does not run here", next));
        }
    }
    meta.ok_or_else(|| Problem::refused(what, "it is gone", "'varve status' lists the groups"))
}

/// The first pass is over.
pub(super) fn refuse_unready(slot: &Slot, what: &str) -> Result<(GroupMeta, Failback), Problem> {
    let (meta, name) = (refuse_not_committed(slot, what)?, &slot.name);
    let Some(failback) = meta.failback.clone() else {
        let next = format!("'varve failback {name}' first: business goes on here meanwhile");
        return Err(Problem::refused(what, "its volumes at home were not brought up to date", next));
    };
    let shown = slot.failback.shown();
    if let Some((problem, next)) = shown.problem {
        return Err(Problem::refused(what, problem, format!("on '{}': {next}", failback.host)));
    }
    if shown.connected && shown.lag.is_none() {
        let next = format!("'varve status {name}' shows how far it is");
        return Err(Problem::refused(what, "its volumes at home are still being compared and written", next));
    }
    Ok((meta, failback))
}

/// Finds out what would be sent, and what would be overwritten.
///
/// # Errors
/// For the operator.
pub async fn look(context: &Context, progress: &ProgressOut) -> Result<FailbackReply, Problem> {
    let (begin, slot) = (Instant::now(), &context.slot);
    let what = format!("what '{}' needs at home is not known", slot.name);
    let meta = refuse_not_committed(slot, &what)?;
    let reply = |meta: &GroupMeta, host: &str| {
        let bare = tokio::task::block_in_place(|| bare_reply(slot, meta, host));
        FailbackReply { dry_run: true, seconds: begin.elapsed().as_secs_f64(), ..bare }
    };
    if let Some(failback) = &meta.failback {
        // It is under way, so there is nothing to find out beforehand.
        return Ok(reply(&meta, &failback.host));
    }
    slot.failback.show(|shown| (shown.looked, shown.problem) = (None, None));
    let mut shown = slot.failback.shown();
    while begin.elapsed() < HOME_CONNECT_TIME_MAX || shown.connected {
        slot.failback.want_look(Some(Instant::now() + HOME_CONNECT_TIME_MAX));
        tokio::time::sleep(HOME_LOOK_INTERVAL).await;
        shown = slot.failback.shown();
        if shown.looked.is_some() || shown.problem.is_some() {
            break;
        }
        if shown.connected {
            progress.tell(shown.done_bytes, shown.total_bytes);
        }
    }
    slot.failback.want_look(None);
    let host = &meta.owner;
    match (shown.looked, shown.problem) {
        (Some(Looked { differing, only_there, branch }), _) => Ok(FailbackReply {
            differing_bytes: Some(differing),
            only_there_bytes: Some(only_there),
            branch_bytes: branch,
            next: format!("'varve failback {}' brings it home", slot.name),
            ..reply(&meta, host)
        }),
        (None, Some((problem, next))) => Err(Problem::refused(what, problem, format!("on '{host}': {next}"))),
        (None, None) => {
            let why = format!(
                "the agent of '{host}' did not answer within {} s, or left before the end",
                HOME_CONNECT_TIME_MAX.as_secs()
            );
            let next = format!("start varve-agent on '{host}' and say it again; '--yes' calls it home unseen");
            Err(Problem::unreachable(what, why, next))
        }
    }
}

/// Calls the group home and waits until the volumes there follow what is written here.
///
/// # Errors
/// For the operator; once it has begun it goes on by itself.
pub async fn begin(
    context: &Context,
    host: Option<String>,
    keep_branch: Option<String>,
    progress: &ProgressOut,
) -> Result<FailbackReply, Problem> {
    let (begin, slot, name) = (Instant::now(), &context.slot, &context.slot.name);
    let what = format!("'{name}' was not called home");
    let meta = refuse_not_committed(slot, &what)?;
    let host = host.unwrap_or_else(|| meta.failback.as_ref().map_or(&meta.owner, |failback| &failback.host).clone());
    match &meta.failback {
        Some(failback) if failback.host != host => {
            let why = format!("it is being brought to '{}' since {}", failback.host, failback.since);
            return Err(Problem::refused(what, why, format!("'varve failback {name} --stop' first")));
        }
        Some(failback) if keep_branch.is_some() && keep_branch != failback.keep_branch => {
            let why = "it is being brought home already, and what its host had for itself may be overwritten in part";
            return Err(Problem::refused(what, why, format!("'varve failback {name}' goes on")));
        }
        Some(_) => {}
        None => {
            if let Some(branch) = &keep_branch {
                refuse_overwritten(&meta, &host, &what)?;
                refuse_branch(context, &meta, branch, &what).await?;
            }
            let (kept, since) = (keep_branch.is_some(), now());
            let failback = Failback { host: host.clone(), since, keep_branch, kept: false };
            // Decided where it is written down: another command may have been quicker.
            let mut refused = None;
            let change = |now: &mut GroupMeta| {
                let same = now.failback.is_none() && now.takeover.as_ref().is_some_and(|takeover| takeover.committed);
                refused = match (same, kept) {
                    (false, _) => {
                        let next = format!("'varve status {name}' shows what goes on");
                        Some(Problem::refused(what.clone(), "another command was quicker", next))
                    }
                    (true, true) => refuse_overwritten(now, &host, &what).err(),
                    (true, false) => None,
                };
                if refused.is_none() {
                    now.failback = Some(failback);
                }
            };
            let changed = context.registry.change_meta(&context.slot, change).await;
            changed.map_err(|refused| context.failed(refused.text))?;
            refused.map_or(Ok(()), Err)?;
            tracing::warn!(group = name, host, "it is to come home");
        }
    }
    slot.failback.show(|shown| shown.problem = None);
    loop {
        tokio::time::sleep(HOME_LOOK_INTERVAL).await;
        let Some(meta) = slot.board().meta.clone().filter(|meta| meta.failback.is_some()) else {
            let next = format!("'varve status {name}' shows where it runs");
            return Err(Problem::refused(what, "it was given up, or given back, meanwhile", next));
        };
        let shown = slot.failback.shown();
        if shown.lag.is_some() {
            let reply = tokio::task::block_in_place(|| bare_reply(slot, &meta, &host));
            return Ok(FailbackReply { seconds: begin.elapsed().as_secs_f64(), ..reply });
        }
        let waits = format!("'{name}' is called home and waits");
        if let Some((problem, next)) = shown.problem {
            let next = format!("on '{host}': {next}; it goes on by itself then");
            return Err(Problem::refused(waits, problem, next));
        }
        if !shown.connected && begin.elapsed() > HOME_CONNECT_TIME_MAX {
            let next = match host == meta.owner {
                true => format!("start varve-agent on '{host}'; it goes on by itself then"),
                false => format!("on '{host}': 'varve failback {name} --volume …' says which volumes it shall have"),
            };
            return Err(Problem::unreachable(waits, format!("the agent of '{host}' did not answer"), next));
        }
        if progress.has_gone() {
            return Err(Problem::failed(waits, "nobody waits for it any more", "it goes on by itself"));
        }
        if shown.connected {
            progress.tell(shown.done_bytes, shown.total_bytes);
        }
    }
}

/// What was written there after the split is whole.
fn refuse_overwritten(meta: &GroupMeta, host: &str, what: &str) -> Result<(), Problem> {
    let overwritten = meta.takeover.as_ref().is_some_and(|takeover| takeover.overwritten.iter().any(|it| it == host));
    if !overwritten {
        return Ok(());
    }
    let why =
        format!("the volumes on '{host}' were begun to be overwritten: what they had for themselves is not whole");
    Err(Problem::refused(what, why, format!("'varve failback {}' without --keep-branch goes on", meta.name)))
}

/// The branch can be kept under this name, as far as is known here.
async fn refuse_branch(context: &Context, meta: &GroupMeta, branch: &str, what: &str) -> Result<(), Problem> {
    let next = "give another name";
    context.registry.place_branch(branch).map_err(|why| Problem::refused(what, why, next))?;
    let split = meta.takeover.as_ref().map_or(0, |takeover| takeover.before_height);
    // It may be opened at this moment.
    let slot = context.slot.clone();
    let (timeline, _) = blocking(move || find(&slot, &PointSpec::Latest)).await?;
    if timeline.pin(split).is_err() {
        let next = format!("copy the volumes at their host, or 'varve failback {}' without --keep-branch", meta.name);
        return Err(Problem::refused(what, "the point of the split has expired, so the branch has no ground", next));
    }
    Ok(())
}

/// The group stays here.
///
/// # Errors
/// For the operator.
pub async fn stop(context: &Context) -> Result<FailbackReply, Problem> {
    let (slot, name) = (&context.slot, &context.slot.name);
    let what = format!("'{name}' was not kept here");
    let meta = refuse_not_committed(slot, &what)?;
    let Some(failback) = &meta.failback else {
        let next = format!("'varve failback {name}' calls it home");
        return Err(Problem::refused(what, "it was not called home", next));
    };
    let changed = context.registry.change_meta(&context.slot, |meta| meta.failback = None).await;
    changed.map_err(|refused| context.failed(refused.text))?;
    slot.failback.end_all();
    tracing::warn!(group = name, "it is not to come home any more");
    let reply = tokio::task::block_in_place(|| bare_reply(slot, &meta, &failback.host));
    let next = format!("the volumes on '{}' are partly overwritten; 'varve failback {name}' goes on", failback.host);
    Ok(FailbackReply { phase: "stopped".to_owned(), next, ..reply })
}
