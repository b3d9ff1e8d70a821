//! Looks after every group's history: merges indexes, lets old layers expire, keeps the disk from filling up.

use crate::group::registry::{Registry, Slot};
use crate::limits::{DISK_FREE_BYTES_MIN, FREE_BYTES_FLOOR, KEEPER_INTERVAL};
use crate::promote::is_rolled;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use varve_common::control::{Retention, show_time};
use varve_timeline::catalogue::LayerInfo;
use varve_timeline::chronicle::Event;
use varve_timeline::error::HistoryError;
use varve_timeline::timeline::Timeline;

const NS_PER_SECOND: u64 = 1_000_000_000;
/// How the notice begins that says so.
pub const SHORTENED: &str = "old points expire early";
/// Stamps of images lie between heights of the stream.
const HEIGHT_STEP: u64 = 8;

/// Works until the registry stops. What expires comes first, and again and again while indexes are merged: a merge may take
/// long, or fail for ever, and without room nobody takes anything in.
pub fn run(registry: &Arc<Registry>) {
    let (mut expiring, mut merging) = (Said::new("old points cannot expire"), Said::new("indexes cannot be merged"));
    while !registry.is_stopping() {
        expire_all(registry, &mut expiring);
        let mut looked = Instant::now();
        for slot in registry.groups() {
            let mut go_on = || {
                if looked.elapsed() >= KEEPER_INTERVAL {
                    expire_all(registry, &mut expiring);
                    looked = Instant::now();
                }
                !registry.is_stopping()
            };
            let merged = merge(&slot, &mut go_on);
            merging.look(&slot.name, merged);
        }
        std::thread::sleep(KEEPER_INTERVAL);
    }
}

/// What went wrong, by group. Said once: a disk that is full or fails does so every second.
struct Said {
    what: &'static str,
    errors: BTreeMap<String, String>,
}

impl Said {
    fn new(what: &'static str) -> Self {
        Self { what, errors: BTreeMap::new() }
    }

    fn look(&mut self, group: &str, done: Result<(), HistoryError>) {
        match done.map_err(|error| error.to_string()) {
            Ok(()) => drop(self.errors.remove(group)),
            Err(error) if self.errors.get(group) == Some(&error) => {}
            Err(error) => {
                tracing::error!(group, error, "{}; it is tried again", self.what);
                self.errors.insert(group.to_owned(), error);
            }
        }
    }
}

fn expire_all(registry: &Registry, said: &mut Said) {
    for slot in registry.groups() {
        if registry.is_stopping() {
            return;
        }
        let looked = look_after(registry, &slot);
        said.look(&slot.name, looked);
    }
}

fn merge(slot: &Slot, go_on: &mut dyn FnMut() -> bool) -> Result<(), HistoryError> {
    let Some(timeline) = slot.board().timeline.clone() else { return Ok(()) };
    while go_on() && timeline.merge_one(&mut *go_on)? {}
    Ok(())
}

fn look_after(registry: &Registry, slot: &Slot) -> Result<(), HistoryError> {
    let Some(timeline) = slot.board().timeline.clone() else { return Ok(()) };
    let policy = slot.board().meta.as_ref().map(|meta| meta.retention).unwrap_or_default();
    // Room also where an old layer's file cannot be removed.
    let mut expired = Ok(());
    while let Some(why) = due(&timeline, &policy) {
        match expire(slot, &timeline, why) {
            Ok(true) => {}
            other => {
                expired = other.map(drop);
                break;
            }
        }
    }
    let dir = registry.group_dir(&slot.name);
    make_room(slot, &timeline, &policy, &dir).and(expired)
}

/// Why the oldest layer is to go, if it is.
fn due(timeline: &Timeline, policy: &Retention) -> Option<&'static str> {
    (doomed(timeline, &timeline.layers(), policy, 1) > 0).then_some("retention")
}

/// The newest time at the source, unless its clock is ahead of ours: a clock that was wrong once must not age everything.
pub fn newest_ns(timeline: &Timeline) -> u64 {
    timeline.applied().time_ns.min(now_ns())
}

fn now_ns() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    now.as_nanos() as u64
}

/// How many of the oldest of the timeline's layers retention lets go. Ages are of the source's clock: if the source is silent,
/// its last points do not grow old. They are of the clock here as well: when a source's clock that was days behind is set
/// right, what it wrote meanwhile is not old. The newest layer always stays. `most`: no more are looked at.
pub fn doomed(timeline: &Timeline, layers: &[LayerInfo], policy: &Retention, most: usize) -> usize {
    let written_ns = |layer: &LayerInfo| timeline.written_ns(layer.number);
    let (newest_ns, bytes) = (newest_ns(timeline), timeline.sizes().bytes());
    let closed = layers.iter().take(layers.len().saturating_sub(1)).take_while(|layer| !layer.open).take(most);
    count_doomed(layers, closed.count(), policy, newest_ns, bytes, now_ns(), written_ns)
}

/// The layers that retention lets go if nobody holds them.
pub fn doomed_layers(timeline: &Timeline, policy: &Retention) -> Vec<LayerInfo> {
    let mut layers = timeline.layers();
    layers.truncate(doomed(timeline, &layers, policy, usize::MAX));
    layers
}

/// Of the first `closed` ones.
fn count_doomed(
    layers: &[LayerInfo],
    closed: usize,
    policy: &Retention,
    newest_ns: u64,
    bytes: u64,
    now_ns: u64,
    written_ns: impl Fn(&LayerInfo) -> Option<u64>,
) -> usize {
    let (mut count, mut left) = (0, bytes);
    for (index, layer) in layers.iter().enumerate().take(closed) {
        let age_ns = policy.age_seconds.map(|age| age.saturating_mul(NS_PER_SECOND));
        let old = age_ns.is_some_and(|age_ns| {
            last_time_ns(&layers[index..], newest_ns) < newest_ns.saturating_sub(age_ns)
                // A time that is still to come is that of a clock here that was wrong: it says nothing.
                && written_ns(layer).is_none_or(|at_ns| at_ns > now_ns || at_ns <= now_ns.saturating_sub(age_ns))
        });
        let much = policy.bytes.is_some_and(|most| left > most);
        if !old && !much {
            break;
        }
        count += 1;
        left = left.saturating_sub(layer.bytes);
    }
    count
}

/// When the first of these layers ended, at the latest: if the source's clock was ahead then, the next one of another stretch
/// began when it had been set back. If it was not, a later one says nothing: the clock may have been behind there.
fn last_time_ns(layers: &[LayerInfo], newest_ns: u64) -> u64 {
    let Some(layer) = layers.first().filter(|layer| layer.last_time_ns > newest_ns) else {
        return layers.first().map_or(0, |layer| layer.last_time_ns);
    };
    let began = layers.iter().skip(1).map(|later| later.first_time_ns).find(|first_ns| *first_ns < layer.last_time_ns);
    layer.last_time_ns.min(began.unwrap_or(u64::MAX))
}

/// What a takeover needs: the point that it was begun at until the replicas are there, and what an abort goes back to. When one
/// begins the latter is the newest point, which is kept anyhow.
pub fn taken_over_at(slot: &Slot, timeline: &Timeline) -> Option<u64> {
    let takeover = slot.board().meta.as_ref()?.takeover.clone()?;
    let back = (!takeover.committed).then_some(takeover.before_height);
    let to = takeover.target().1.map(|(height, _)| height).filter(|_| !is_rolled(timeline, &takeover));
    back.into_iter().chain(to).min()
}

/// Lets the oldest layer go; whether it did. What is lost is said before it is gone.
fn expire(slot: &Slot, timeline: &Timeline, why: &str) -> Result<bool, HistoryError> {
    let taken_over_at = taken_over_at(slot, timeline);
    // Nobody hears that a bookmark is kept between the question and the answer.
    let _deciding = slot.keeping.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let chronicle = timeline.chronicle();
    // In a gap it is the last point before: until the gap ends it is all there is to go back to. Else it needs no layer.
    let newest = chronicle.point_at_or_below(timeline.applied().height);
    let kept = chronicle.kept().map(|bookmark| bookmark.height).chain(newest).chain(taken_over_at).min();
    let Some(oldest) = timeline.droppable(kept) else { return Ok(false) };
    let height = oldest.last_height.next_multiple_of(HEIGHT_STEP);
    let time_ns = last_time_ns(&timeline.layers(), newest_ns(timeline)).min(oldest.last_time_ns);
    timeline.tell(&[Event::Expired { height, time_ns }])?;
    let Some(gone) = timeline.drop_oldest(kept)? else { return Ok(false) };
    let (from, to) = (show_time(gone.first_time_ns), show_time(gone.last_time_ns));
    tracing::info!(group = slot.name, why, from, to, bytes = gone.bytes, "the oldest points have expired");
    Ok(true)
}

/// Free bytes where `dir` is, and how many there should be at least.
pub fn free_space(dir: &Path) -> Option<(u64, u64)> {
    let stat = nix::sys::statvfs::statvfs(dir).ok()?;
    let unit = stat.fragment_size();
    let floor = FREE_BYTES_FLOOR.min(stat.blocks() * unit / 20);
    Some((stat.blocks_available() * unit, floor.max(DISK_FREE_BYTES_MIN)))
}

/// On a disk that is nearly full the oldest layers go early; if that does not help, nothing more is taken in.
fn make_room(slot: &Slot, timeline: &Timeline, policy: &Retention, dir: &Path) -> Result<(), HistoryError> {
    let Some((free, floor)) = free_space(dir) else { return Ok(()) };
    if free >= floor {
        slot.board().notice = None;
        return Ok(());
    }
    // One at a time: some file systems show the room that it makes only later.
    if expire(slot, timeline, "the disk is nearly full")? {
        tracing::warn!(group = slot.name, free, floor, "old points expired early to keep the disk from filling up");
        slot.board().notice = Some(shortened(policy, free, floor));
        return Ok(());
    }
    let text = format!("{free} bytes are free on the disk, {floor} are kept free, and nothing may expire");
    if free < floor / 2 && slot.board().asks.is_some() {
        tracing::error!(group = slot.name, free, floor, "the disk is nearly full: nothing more is taken in");
        slot.end_session();
    }
    slot.board().notice = Some(text);
    Ok(())
}

fn shortened(policy: &Retention, free: u64, floor: u64) -> String {
    let against = match *policy == Retention::default() {
        true => "no retention was set, so history grew until the disk was nearly full",
        false => "the window is shorter than retention says",
    };
    format!("{SHORTENED}: {against}: {free} bytes are free on the disk, {floor} are kept free")
}

/// Bytes of history that are only there for the point at `height`: of layers that retention would let go, where no older point is
/// held. `held`: the other points that are.
pub fn bytes_held_by(doomed: &[LayerInfo], height: u64, held: &[u64]) -> u64 {
    let needed = |layer: &&LayerInfo| layer.last_height > height;
    let by_others = |layer: &LayerInfo| held.iter().any(|other| layer.last_height > *other);
    doomed.iter().filter(needed).filter(|layer| !by_others(layer)).map(|layer| layer.bytes).sum()
}

/// Bytes of history from the point at `height` on: what keeping it keeps.
pub fn bytes_from(timeline: &Timeline, height: u64) -> u64 {
    timeline.layers().iter().filter(|layer| layer.last_height > height).map(|layer| layer.bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(number: u32, last_time_s: u64, bytes: u64, open: bool) -> LayerInfo {
        LayerInfo {
            number,
            first_height: u64::from(number) * 100,
            last_height: u64::from(number) * 100 + 99,
            first_time_ns: last_time_s * NS_PER_SECOND,
            last_time_ns: last_time_s * NS_PER_SECOND,
            bytes,
            records: 1,
            open,
        }
    }

    /// As if nobody knew when a layer was written.
    fn count(layers: &[LayerInfo], policy: &Retention, newest_ns: u64, bytes: u64) -> usize {
        let closed = layers.iter().take(layers.len() - 1).take_while(|layer| !layer.open).count();
        count_doomed(layers, closed, policy, newest_ns, bytes, newest_ns, |_| None)
    }

    #[test]
    fn what_a_clock_that_was_behind_wrote_is_not_old_when_it_is_set_right() {
        let day = 86_400 * NS_PER_SECOND;
        // Ten days behind, for three days.
        let layers: Vec<_> = (1..=5).map(|n| layer(n, u64::from(n) * 43_200, 1000, n == 5)).collect();
        let policy = |age: u64| Retention { age_seconds: Some(age * 86_400), bytes: None };
        let written = |layer: &LayerInfo| Some(layer.last_time_ns + 10 * day);
        let count = |age, now, written_ns: &dyn Fn(&LayerInfo) -> Option<u64>| {
            count_doomed(&layers, 4, &policy(age), now, 5000, now, written_ns)
        };
        assert_eq!(count(7, 13 * day, &written), 0);
        assert_eq!(count(2, 13 * day, &written), 2, "those that were written here two days ago");
        assert_eq!(count(7, 30 * day, &written), 4);
        assert_eq!(count(7, 13 * day, &|_| None), 4, "where nobody knows");
        assert_eq!(count(7, 30 * day, &|_| Some(400 * day)), 4, "nor by a clock here that was ahead");
    }

    #[test]
    fn a_disk_that_is_full_breaks_no_promise_that_nobody_made() {
        let (unset, set) = (Retention::default(), Retention { age_seconds: Some(60), bytes: None });
        assert!(shortened(&unset, 1, 2).contains("no retention was set") && !shortened(&unset, 1, 2).contains("says"));
        assert!(shortened(&set, 1, 2).contains("shorter than retention says"));
        assert!(
            [unset, set].iter().all(|policy| shortened(policy, 1, 2).starts_with(SHORTENED)),
            "the alert sees both"
        );
    }

    #[test]
    fn the_oldest_go_by_age_and_by_bytes_and_the_newest_stays() {
        let layers: Vec<_> = (1..=5).map(|n| layer(n, u64::from(n) * 10, 1000, n == 5)).collect();
        let now = 50 * NS_PER_SECOND;
        let doomed = |age_seconds, bytes| count(&layers, &Retention { age_seconds, bytes }, now, 5000);
        assert_eq!(doomed(None, None), 0, "no limit");
        assert_eq!(doomed(Some(30), None), 1, "20 s is not older than 30 s ago");
        assert_eq!(doomed(Some(0), None), 4, "all but the open one");
        assert_eq!(doomed(None, Some(3000)), 2);
        assert_eq!(doomed(None, Some(3001)), 2);
        assert_eq!(doomed(None, Some(0)), 4);
        assert_eq!(doomed(Some(1000), Some(4999)), 1);
        // A clock that was a year ahead for a while.
        let mut ahead = layers.clone();
        ahead[1].last_time_ns += 365 * 86_400 * NS_PER_SECOND;
        assert_eq!(count(&ahead, &Retention { age_seconds: Some(0), bytes: None }, now, 5000), 4);
        // One that was behind for a while, and set right within a layer. Before that, what came before ended in the future.
        let mut behind = layers.clone();
        behind[3].first_time_ns = 1;
        let doomed = |now_s, age| {
            let policy = Retention { age_seconds: Some(age), bytes: None };
            count(&behind, &policy, now_s * NS_PER_SECOND, 5000)
        };
        assert_eq!(doomed(50, 45), 0, "none of them is old");
        assert_eq!(doomed(50, 30), 1, "as without it");
        behind.truncate(4);
        (behind[3].last_time_ns, behind[3].open) = (2, true);
        let policy = Retention { age_seconds: Some(5), bytes: None };
        assert_eq!(count(&behind, &policy, 2, 4000), 0, "nor while it is");
        let closed: Vec<_> = (1..=3).map(|n| layer(n, 1, 10, false)).collect();
        let policy = Retention { age_seconds: Some(0), bytes: None };
        assert_eq!(count(&closed, &policy, now, 30), 2, "the newest stays");
    }
}
