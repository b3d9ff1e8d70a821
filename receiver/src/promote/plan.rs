//! What a takeover would take, before anything is done.

use super::point::locate;
use super::quiet;
use crate::clock::wall_ns;
use crate::group::registry::Slot;
use crate::view::views::history_problem;
use std::time::Duration;
use varve_common::control::FailoverReply;
use varve_common::point::{LocatedPoint, PointSpec};
use varve_common::problem::Problem;
use varve_timeline::timeline::Timeline;

/// How long ago by this host's clock; 0 if its clock is behind the source's.
pub(super) fn age_seconds(time_ns: u64) -> f64 {
    Duration::from_nanos(wall_ns().saturating_sub(time_ns)).as_secs_f64()
}

/// What would be taken, and what would be left out.
///
/// # Errors
/// For the operator.
pub fn plan(slot: &Slot, at: &PointSpec) -> Result<FailoverReply, Problem> {
    let (timeline, point) = locate(slot, at)?;
    let (_, newest) = locate(slot, &PointSpec::Latest)?;
    let left_out_bytes = left_out(slot, &timeline, &point, &newest)?;
    let board = slot.board();
    let landed = board.live.as_ref().map(|live| live.view().landed);
    let report = board.report.as_ref();
    let not_here = report.zip(landed).map(|((report, _), landed)| report.captured.saturating_sub(landed.at.position));
    let heard = report.map(|(_, at)| at.elapsed().as_secs_f64());
    let newest_age = age_seconds(newest.time_ns);
    let epoch = board.meta.as_ref().map_or(0, |meta| meta.epoch + 1);
    Ok(FailoverReply {
        group: slot.name.clone(),
        point: point.reply(),
        newest: newest.reply(),
        newest_age_seconds: Some(newest_age),
        left_out_bytes,
        not_here_bytes: not_here,
        source_heard_seconds: heard,
        epoch,
        test: false,
        committed: false,
        abort_at: None,
        aborted: false,
        dry_run: true,
        seconds: 0.0,
        volumes: Vec::new(),
        hints: Vec::new(),
        drained: None,
        planned: None,
    })
}

/// Bytes that changed between the point and the newest one: what is not applied yet is counted as it came.
fn left_out(slot: &Slot, timeline: &Timeline, point: &LocatedPoint, newest: &LocatedPoint) -> Result<u64, Problem> {
    if point.height >= newest.height {
        return Ok(0);
    }
    let what = format!("'{}' cannot be taken over", slot.name);
    let changed = crate::apply::rollback::measure(timeline, point.height).map_err(|e| history_problem(&what, &e))?;
    let landed = newest.height.saturating_sub(timeline.applied().height.max(point.height));
    Ok(changed.bytes + landed)
}

/// The same for a planned switch-over: nothing may be left out, and the source must be there.
///
/// # Errors
/// For the operator.
pub fn plan_planned(slot: &Slot, at: &PointSpec) -> Result<FailoverReply, Problem> {
    if *at != PointSpec::Latest {
        let why = "a planned switch-over loses nothing, so it takes the newest point";
        let next = "leave --at away, or --planned";
        return Err(Problem::usage(format!("'{}' was not switched over", slot.name), why, next));
    }
    quiet::check(slot)?;
    plan(slot, at)
}
