//! The last steps: nobody writes here, both sides are compared, the group is given back, its new stream begins.

use super::orders::{bare_reply, refuse_unready};
use super::{Armed, Order};
use crate::clock::wall_ns;
use crate::failpoint;
use crate::group::meta::{Failback, GroupMeta, Home, hex, unhex};
use crate::group::open::OpenGroup;
use crate::group::registry::{Registry, Slot};
use crate::group::stream::onward_ns;
use crate::limits::{HOME_CUT_OVER_TIME_MAX, HOME_TOLD_TIME_MAX};
use crate::promote::{Context, Promotions, catch_up};
use crate::rollback::land;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::oneshot;
use tokio::time::timeout;
use varve_common::control::FailbackReply;
use varve_common::format::{Mark, MarkKind};
use varve_common::problem::Problem;
use varve_common::state::GapReason;

/// Gives the group back.
///
/// # Errors
/// For the operator: it runs here as before then, unless the text says otherwise.
pub async fn cut_over(
    promotions: &Promotions,
    context: &Context,
    quick: bool,
    dry_run: bool,
) -> Result<FailbackReply, Problem> {
    let begin = Instant::now();
    let name = context.slot.name.clone();
    let what = format!("'{name}' was not given back");
    let (meta, failback) = refuse_unready(&context.slot, &what)?;
    if context.slot.failback.orders().is_none() {
        let why = format!("the agent of '{}' is not connected", failback.host);
        return Err(Problem::unreachable(what, why, format!("'varve status {name}' says when it is")));
    }
    let reply = bare_reply(&context.slot, &meta, &failback.host);
    let user = promotions.user(&name);
    if dry_run {
        // What the takeover plan has started is stopped by the command itself.
        let next = user.map_or(reply.next.clone(), |user| format!("in use here: {user}; stop what is not in the plan"));
        return Ok(FailbackReply { dry_run, next, ..reply });
    }
    if let Some(user) = user {
        let next = "stop what uses the devices and unmount them; then run the same command again";
        return Err(Problem::refused(what, format!("it is in use here: {user}"), next));
    }
    let stopped = tokio::task::block_in_place(|| promotions.stop_serving(&name, false, &what));
    stopped?;
    let paused = Instant::now();
    let given = give_back(promotions, context, &meta, &failback, quick).await;
    match given {
        Ok((armed, epoch, told)) => {
            tracing::warn!(group = name, host = failback.host, epoch, "given back: it runs at home");
            context.slot.failback.end_all();
            context.slot.board().unsure = None;
            let next = match told {
                true => {
                    format!("mount and start what uses it on '{}'; '{name}' is protected from there", failback.host)
                }
                false => {
                    format!("'{}' did not answer any more: it goes on by itself when it is connected", failback.host)
                }
            };
            let (sent_bytes, compared_bytes) = (armed.sent_bytes, armed.compared_bytes);
            let (pause_seconds, seconds) = (Some(paused.elapsed().as_secs_f64()), begin.elapsed().as_secs_f64());
            let home = true;
            let phase = "home".to_owned();
            Ok(FailbackReply { home, phase, epoch, sent_bytes, compared_bytes, pause_seconds, seconds, next, ..reply })
        }
        Err(Failed { why, unsure: true }) => {
            let next = "put the disk of the receiver's state right and restart it: then it runs here or at home, and says which";
            Err(Problem::failed(what, why, next))
        }
        Err(Failed { why, .. }) => {
            let still_here = context.slot.board().meta.as_ref().is_some_and(|meta| meta.takeover.is_some());
            if still_here {
                promotions.resume(context).await;
            }
            let next = match still_here {
                true => "it runs here as before; when 'varve status' says that it follows, run the same command again",
                false => "it does not run here any more: 'varve status' on both hosts shows how it goes on",
            };
            Err(Problem::failed(what, why, next))
        }
    }
}

/// It was not given back.
struct Failed {
    why: String,
    /// It may have been: the files could not be written. Then nobody may write here.
    unsure: bool,
}

impl<T: Into<String>> From<T> for Failed {
    fn from(why: T) -> Self {
        Self { why: why.into(), unsure: false }
    }
}

/// With the devices away. Gives what was compared, the epoch at home, and whether the agent has heard it.
async fn give_back(
    promotions: &Promotions,
    context: &Context,
    meta: &GroupMeta,
    failback: &Failback,
    quick: bool,
) -> Result<(Armed, u64, bool), Failed> {
    let desk = context.registry.seize(&context.slot).await.map_err(|refused| refused.text)?;
    // While the desk was waited for, an abort may have had it.
    let same_takeover = |now: &GroupMeta| match (&now.takeover, &meta.takeover) {
        (Some(now), Some(before)) => {
            now.incarnation == before.incarnation && !now.aborting && now.committed == before.committed
        }
        _ => false,
    };
    let same = |now: &GroupMeta| same_takeover(now) && now.failback.as_ref().is_some_and(|now| now.is(failback));
    if !context.slot.board().meta.as_ref().is_some_and(same) {
        return Err("its takeover is not what it was a moment ago: another command was quicker".into());
    }
    // An earlier cut-over that came to nothing may have made the devices again.
    let what = "its devices were made again meanwhile";
    let gone = tokio::task::block_in_place(|| promotions.stop_serving(&context.slot.name, false, what));
    gone.map_err(|problem| format!("{}: {}", problem.what, problem.why))?;
    let Some(open) = &desk.open else { return Err("its files are not open".into()) };
    tokio::task::block_in_place(|| failpoint::hold(failpoint::HOME_HELD, || open.live.failure().is_some()));
    let height = open.live.view().landed.height;
    catch_up(open, height).await?;
    let (epoch, token): (u64, [u8; 16]) = (meta.epoch + 1, rand::random());
    let ((answer, answered), (give, given), (told, heard)) =
        (oneshot::channel(), oneshot::channel(), oneshot::channel());
    let order = Order { height, epoch, token, quick, answer, given, told };
    // The newest stream: the agent may have opened another while the devices went.
    let (number, orders) = context.slot.failback.orders().ok_or("the agent has just gone")?;
    orders.send(order).await.map_err(|_| "the agent has just gone".to_owned())?;
    let armed = timeout(HOME_CUT_OVER_TIME_MAX, answered).await.map_err(|_| "the agent hangs".to_owned())?;
    let armed = armed.map_err(|_| "the agent has gone".to_owned())??;
    if open.live.view().landed.height != height {
        return Err("something was written here meanwhile".into());
    }
    failpoint::hit(failpoint::HOME_ARMED);
    tokio::task::block_in_place(|| failpoint::hold(failpoint::HOME_ARMED, || open.live.failure().is_some()));
    if !context.slot.failback.is_newest(number) {
        return Err("its agent came again a moment ago and begins anew".into());
    }
    let home = Home {
        host: failback.host.clone(),
        token: hex(&token),
        incarnation: hex(&armed.incarnation),
        position: armed.position,
        landed: false,
    };
    // Decided where it is written down: the operator may have given it up meanwhile.
    let mut wanted = false;
    let change = |meta: &mut GroupMeta| {
        wanted = same(meta);
        if !wanted {
            return;
        }
        (meta.epoch, meta.source_epoch_min) = (epoch, epoch);
        (meta.takeover, meta.failback, meta.home) = (None, None, Some(home));
        meta.owner = failback.host.clone();
        // It has a source again.
        meta.branch = None;
        for (volume, path) in meta.volumes.iter_mut().zip(&armed.paths) {
            volume.path.clone_from(path);
        }
    };
    if let Err(refused) = context.registry.change_meta(&context.slot, change).await {
        // Whether it is on the disk all the same is not known: what was is written again, before anybody writes here.
        let undone = context.registry.change_meta(&context.slot, |_| {}).await;
        let unsure = undone.is_err();
        if unsure {
            // With the desk in hand: whoever waits for it serves nothing any more, until a start has read what is on the disk.
            context.slot.board().unsure = Some(format!("it runs here or at home: {}", refused.text));
        }
        return Err(Failed { why: refused.text, unsure });
    }
    if !wanted {
        return Err("its return was given up meanwhile".into());
    }
    failpoint::hit(failpoint::HOME_GIVEN);
    // It runs at home from here on, whatever becomes of this: the agent's next session does it then.
    if let Err(why) = begin_at_home(&context.registry, &context.slot, open).await {
        tracing::error!(group = context.slot.name, why, "given back, and its stream from there has not begun here yet");
    }
    failpoint::hit(failpoint::HOME_BEGUN);
    drop(desk);
    let told = give.send(()).is_ok() && timeout(HOME_TOLD_TIME_MAX, heard).await.is_ok_and(|heard| heard.is_ok());
    Ok((armed, epoch, told))
}

/// Puts the stream where the one at home begins: both were equal there, so no gap stays open. Needed once after the
/// group was given back, by whoever has the desk first; an ordinary session would find it unknown else and compare all.
///
/// # Errors
/// If it cannot be made durable.
pub async fn begin_at_home(registry: &Registry, slot: &Arc<Slot>, open: &OpenGroup) -> Result<(), String> {
    let Some(meta) = slot.board().meta.clone() else { return Ok(()) };
    let Some(home) = meta.home.filter(|home| !home.landed) else { return Ok(()) };
    let incarnation = unhex(&home.incarnation);
    let landed = open.live.view().landed;
    let mark = |kind, reason| Mark {
        kind,
        reason,
        incarnation,
        position: home.position,
        time_ns: onward_ns(landed.at.time_ns, wall_ns()),
        epoch: meta.epoch,
        height_min: 0,
    };
    if landed.at.incarnation != incarnation {
        land(open, &open.live, mark(MarkKind::Begin, Some(GapReason::Failback))).await?;
    }
    if open.live.view().landed.gap.is_some() {
        land(open, &open.live, mark(MarkKind::GapEnd, None)).await?;
    }
    let landed = |meta: &mut GroupMeta| {
        if let Some(home) = &mut meta.home {
            home.landed = true;
        }
    };
    registry.change_meta(slot, landed).await.map_err(|refused| refused.text)
}
