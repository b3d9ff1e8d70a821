//! Which point is taken, found without waiting for the replicas where that is certain: what is landed counts, applied or not.

use crate::clock::wall_ns;
use crate::group::live::Live;
use crate::group::registry::Slot;
use crate::view::views::find;
use std::sync::Arc;
use varve_common::control::show_position;
use varve_common::point::{Consistency, LocatedPoint, PointSpec};
use varve_common::problem::Problem;
use varve_timeline::timeline::Timeline;

/// The exact point that is meant. Blocks; waits for the replicas only for a bookmark or a time that what is not applied yet may
/// hold.
///
/// # Errors
/// For the operator.
pub(super) fn locate(slot: &Slot, at: &PointSpec) -> Result<(Arc<Timeline>, LocatedPoint), Problem> {
    let board = slot.board().clone();
    if let (Some(timeline), Some(live)) = (board.timeline, board.live)
        && let Some(point) = certain(&timeline, &live, at)
    {
        return Ok((timeline, point));
    }
    find(slot, at)
}

/// `None`: there is none, or what is not applied yet may have a say in it.
fn certain(timeline: &Timeline, live: &Live, at: &PointSpec) -> Option<LocatedPoint> {
    let landed = live.view().landed;
    let (applied, now_ns) = (timeline.applied(), wall_ns());
    let located = || timeline.locate(at, now_ns).ok();
    match at {
        _ if applied.height >= landed.height => None,
        PointSpec::Latest => match landed.good.zip(landed.good_height) {
            Some((good, height)) if height > applied.height => Some(LocatedPoint {
                height,
                time_ns: good.time_ns,
                position: show_position(&good.incarnation, good.position),
                consistency: Consistency::default(),
                asked: at.to_string(),
                distance_ns: -i64::try_from(landed.at.time_ns.saturating_sub(good.time_ns)).unwrap_or(i64::MAX),
            }),
            // The newest good one is in the replicas, or before.
            _ => located(),
        },
        PointSpec::Time(_) | PointSpec::Age(_) => {
            let time_ns = at.time_ns(now_ns)?;
            // A clock that was set back shows a time twice, and the newer one is meant.
            let settled = landed.set_back_height <= applied.height && time_ns < applied.time_ns;
            settled.then(located).flatten()
        }
        PointSpec::Position { .. } => located(),
        // A newer one may have the same name.
        PointSpec::Bookmark(_) => None,
    }
}
