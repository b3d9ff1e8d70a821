//! `varve rollback`: the session ends and is held off, a gap opens in a stream of the receiver's own, the applier puts back
//! what changed, the gap ends. Each step is durable before the next, so a rollback that was cut off leaves a gap that says
//! so, and the same command finishes it.

use crate::apply::rollback::{Extent, RollbackOrder, measure};
use crate::apply::work::{Action, Work};
use crate::clock::wall_ns;
use crate::control::ProgressOut;
use crate::group::live::Live;
use crate::group::meta::Held;
use crate::group::open::OpenGroup;
use crate::group::registry::{Desk, Registry, Slot};
use crate::landing::batch::Batch;
use crate::view::views::{find, history_problem};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use varve_common::control::{PointReply, RollbackReply, show_time};
use varve_common::format::{Mark, MarkKind};
use varve_common::point::{LocatedPoint, PointSpec};
use varve_common::problem::Problem;
use varve_common::state::GapReason;
use varve_timeline::chronicle::Event;
use varve_timeline::timeline::{Pin, Timeline};

/// The longest that one durable step may take before the operator is told that it hangs.
const STEP_TIME_MAX: Duration = Duration::from_secs(60);
/// Between two looks at how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// Blocks a second that a dry run reckons with: measured, see benches/README.md.
const BLOCKS_PER_SECOND: f64 = 40_000.0;

/// What is to be done, and from where.
struct Plan {
    timeline: Arc<Timeline>,
    pin: Pin,
    from: PointReply,
    to: LocatedPoint,
    extent: Extent,
}

fn plan(slot: &Slot, at: &PointSpec) -> Result<Plan, Problem> {
    let what = format!("'{}' was not rolled back", slot.name);
    let (timeline, to) = find(slot, at)?;
    let pin = timeline.pin(to.height).map_err(|e| history_problem(&what, &e))?;
    let extent = measure(&timeline, to.height).map_err(|e| history_problem(&what, &e))?;
    // In a gap there is no point to come back to but the last good one.
    let from = timeline.locate(&PointSpec::Latest, wall_ns()).map(|point| point.reply()).unwrap_or_default();
    Ok(Plan { timeline, pin, from, to, extent })
}

/// Rolls the replicas of a group back.
///
/// # Errors
/// For the operator.
pub async fn rollback(
    registry: &Arc<Registry>,
    slot: &Arc<Slot>,
    at: PointSpec,
    dry_run: bool,
    progress: &ProgressOut,
) -> Result<RollbackReply, Problem> {
    let begin = Instant::now();
    refuse_promoted(slot)?;
    let (of, spec) = (slot.clone(), at.clone());
    let planned = tokio::task::spawn_blocking(move || plan(&of, &spec)).await;
    let failed = |why: String| Problem::failed(format!("'{}' was not rolled back", slot.name), why, "see the log");
    let planned = planned.map_err(|e| failed(e.to_string()))??;
    let reply = RollbackReply {
        group: slot.name.clone(),
        from_point: planned.from.clone(),
        to_point: planned.to.reply(),
        bytes: planned.extent.bytes,
        blocks: planned.extent.blocks,
        seconds: planned.extent.blocks as f64 / BLOCKS_PER_SECOND,
        dry_run,
        held: slot.board().meta.as_ref().is_some_and(|meta| meta.held.is_some()),
    };
    if dry_run {
        return Ok(reply);
    }
    let held = Held { to: reply.to_point.time.clone(), since: show_time(wall_ns()) };
    let mut desk = registry.hold(slot, held).await.map_err(|refused| failed(refused.text))?;
    let done = run(slot, &mut desk, planned, progress).await?;
    Ok(RollbackReply { bytes: done.0, seconds: begin.elapsed().as_secs_f64(), held: true, from_point: done.1, ..reply })
}

/// A group that runs here is written to all the while: only a takeover of the older point puts it back.
fn refuse_promoted(slot: &Slot) -> Result<(), Problem> {
    let (name, board) = (&slot.name, slot.board());
    let Some(takeover) = board.meta.as_ref().and_then(|meta| meta.takeover.as_ref()) else { return Ok(()) };
    let next = match takeover.committed {
        false => format!(
            "'varve failover abort {name}' gives up what was written here, then 'varve failover {name} --at' that point; or 'varve \
             view open {name} --at' it and copy what is wanted"
        ),
        true => format!("'varve view open {name} --at' that point and copy what is wanted to its devices"),
    };
    Err(Problem::refused(format!("'{name}' was not rolled back"), "it runs here, and its devices are in use", next))
}

/// With the desk in hand. Gives the bytes put back, and the point before, which may be newer than when it was planned.
async fn run(
    slot: &Arc<Slot>,
    desk: &mut Desk,
    planned: Plan,
    progress: &ProgressOut,
) -> Result<(u64, PointReply), Problem> {
    let what = || format!("'{}' was not rolled back", slot.name);
    let failed = |why: String| Problem::failed(what(), why, "see the receiver's log, then run the same command again");
    let closed = || failed("its files are not open".to_owned());
    let Some(open) = &desk.open else { return Err(closed()) };
    let (live, timeline) = (open.live.clone(), planned.timeline);
    // Everything that came before the session ended counts.
    let landed = live.view().landed;
    open.queue.hurry();
    let (waits, height) = (timeline.clone(), landed.height);
    let caught_up = tokio::task::spawn_blocking(move || waits.wait_applied(height, STEP_TIME_MAX)).await;
    if !caught_up.unwrap_or(false) {
        return Err(failed("the replicas did not catch up with what is landed".to_owned()));
    }
    let from = timeline.locate(&PointSpec::Latest, wall_ns()).map(|point| point.reply()).unwrap_or_default();
    let epoch = slot.board().meta.as_ref().map_or(0, |meta| meta.epoch);
    let mark = |kind, reason, incarnation, time_ns| Mark {
        kind,
        reason,
        incarnation,
        position: 0,
        time_ns,
        epoch,
        height_min: 0,
    };
    let incarnation: [u8; 16] = rand::random();
    // Later than all before, so that a time names one point; and no later, so that the source's next record is later still:
    // times are of its clock, not of ours.
    let time_ns = landed.at.time_ns + 1;
    land(open, &live, mark(MarkKind::Begin, Some(GapReason::Rollback), incarnation, time_ns)).await.map_err(failed)?;
    let done_bytes = Arc::new(AtomicU64::new(0));
    let total = measure_again(&timeline, planned.pin.height()).await.unwrap_or(planned.extent.bytes);
    let (order, mut finished) = RollbackOrder::new(planned.pin, done_bytes.clone());
    open.queue.push(Work::Act(Action::Rollback(Box::new(order))));
    loop {
        tokio::select! {
            ended = &mut finished => match ended {
                Ok(()) => break,
                Err(_) => {
                    let why = live.failure().map_or_else(|| "the applier ended".to_owned(), |failure| failure.text.clone());
                    return Err(failed(why));
                }
            },
            () = tokio::time::sleep(PROGRESS_INTERVAL) => progress.tell(done_bytes.load(Ordering::Relaxed), total),
        }
    }
    let time_ns = time_ns + 1;
    land(open, &live, mark(MarkKind::GapEnd, None, incarnation, time_ns)).await.map_err(failed)?;
    let height = live.view().landed.height;
    open.queue.hurry();
    let waits = timeline.clone();
    let there = tokio::task::spawn_blocking(move || waits.wait_applied(height, STEP_TIME_MAX)).await;
    if !there.unwrap_or(false) {
        return Err(failed("the end of the rollback did not become durable".to_owned()));
    }
    let (to_height, to_time_ns) = (planned.to.height, planned.to.time_ns);
    let event = Event::RolledBack { height, time_ns, to_height, to_time_ns };
    timeline.tell(&[event]).map_err(|e| failed(e.to_string()))?;
    tracing::info!(
        group = slot.name,
        to = show_time(to_time_ns),
        bytes = done_bytes.load(Ordering::Relaxed),
        "rolled back"
    );
    Ok((done_bytes.load(Ordering::Relaxed), from))
}

async fn measure_again(timeline: &Arc<Timeline>, height: u64) -> Option<u64> {
    let timeline = timeline.clone();
    let measured = tokio::task::spawn_blocking(move || measure(&timeline, height)).await.ok()?;
    measured.ok().map(|extent| extent.bytes)
}

/// Lands a mark of our own and waits until it is durable.
pub async fn land(open: &OpenGroup, live: &Live, mark: Mark) -> Result<(), String> {
    let mut progress = live.subscribe();
    let before = progress.borrow_and_update().landed_batches;
    open.batches.send(Batch::of_mark(&mark)).map_err(|_| "the landing log is closed".to_owned())?;
    let landed = progress.wait_for(|now| now.landed_batches > before || now.failure.is_some());
    let landed = tokio::time::timeout(STEP_TIME_MAX, landed).await.map_err(|_| "the landing log hangs".to_owned())?;
    let landed = landed.map_err(|e| e.to_string())?;
    landed.failure.as_ref().map_or(Ok(()), |failure| Err(failure.text.clone()))
}
