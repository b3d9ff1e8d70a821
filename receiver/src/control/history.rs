//! What `varve` asks of a group's history.

use super::{ProgressOut, no_group};
use crate::daemon::Daemon;
use crate::group::registry::Slot;
use crate::keeper::{bytes_from, bytes_held_by, doomed, doomed_layers, taken_over_at};
use crate::limits::{DAMAGES_TRACED_MAX, DENSITY_PARTS, SCRUB_RATE};
use crate::promote::blocking;
use crate::restore::Target;
use crate::view::views::{Wish, find, history_problem, volumes_at};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use varve_common::control::{
    KeepReply, LayerDamage, PointsReply, RestoreReply, Retention, RetentionReply, ScrubReply, ViewReply, ViewsReply,
    show_time,
};
use varve_common::point::PointSpec;
use varve_common::problem::Problem;
use varve_timeline::chronicle::{Event, Times};
use varve_timeline::error::HistoryError;
use varve_timeline::timeline::Timeline;

/// The group and its timeline.
fn timeline_of(daemon: &Daemon, group: &str) -> Result<(Arc<Slot>, Arc<Timeline>), Problem> {
    let slot = daemon.registry.group(group).ok_or_else(|| no_group(daemon, group))?;
    let timeline = slot.board().timeline.clone();
    let timeline = timeline.ok_or_else(|| {
        let why = slot.board().refusal.clone().unwrap_or_else(|| "its files are not open".to_owned());
        Problem::failed(format!("the history of '{group}' cannot be read"), why, "see the receiver's log")
    })?;
    Ok((slot, timeline))
}

/// Points that views and kept bookmarks hold, but for the one at `but`.
fn held(daemon: &Daemon, slot: &Slot, timeline: &Timeline, but: Option<u64>) -> Vec<u64> {
    let views = daemon.views.heights(&slot.name).into_iter().map(|(_, height)| height);
    let kept: Vec<u64> = timeline.chronicle().kept().map(|bookmark| bookmark.height).collect();
    let mut all: Vec<u64> = views.chain(kept).chain(taken_over_at(slot, timeline)).collect();
    if let Some(at) = but.and_then(|but| all.iter().position(|height| *height == but)) {
        all.swap_remove(at);
    }
    all
}

fn policy(slot: &Slot) -> Retention {
    slot.board().meta.as_ref().map(|meta| meta.retention).unwrap_or_default()
}

pub async fn points(
    daemon: &Arc<Daemon>,
    group: String,
    from_ns: Option<u64>,
    to_ns: Option<u64>,
) -> Result<PointsReply, Problem> {
    let daemon = daemon.clone();
    blocking(move || {
        let (slot, timeline) = timeline_of(&daemon, &group)?;
        let what = format!("the points of '{group}' cannot be read");
        let report = loop {
            let oldest = timeline.begin();
            match timeline.report(&group, from_ns, to_ns, DENSITY_PARTS) {
                // It has expired since it was listed; each time round an older one is gone.
                Err(HistoryError::Missing { .. }) if timeline.begin() != oldest => {}
                report => break report,
            }
        };
        let mut reply = report.map_err(|e| history_problem(&what, &e))?;
        let chronicle = timeline.chronicle();
        let doomed = doomed_layers(&timeline, &policy(&slot));
        for bookmark in reply.bookmarks.iter_mut().filter(|bookmark| bookmark.kept) {
            let Some(height) = chronicle.bookmark(&bookmark.name).map(|bookmark| bookmark.height) else { continue };
            let others = held(&daemon, &slot, &timeline, Some(height));
            bookmark.kept_bytes = Some(bytes_held_by(&doomed, height, &others));
        }
        reply.records = timeline
            .layers()
            .iter()
            .filter(|layer| {
                layer.last_time_ns >= from_ns.unwrap_or(0) && layer.first_time_ns <= to_ns.unwrap_or(u64::MAX)
            })
            .map(|layer| layer.records)
            .sum();
        Ok(reply)
    })
    .await
}

pub async fn view_open(daemon: &Arc<Daemon>, group: String, wish: Wish) -> Result<ViewReply, Problem> {
    let (daemon, runtime) = (daemon.clone(), tokio::runtime::Handle::current());
    blocking(move || {
        let slot = daemon.registry.group(&group).ok_or_else(|| no_group(&daemon, &group))?;
        daemon.views.open(&slot, &daemon.registry.group_dir(&group), &wish, &runtime)
    })
    .await
}

pub fn view_list(daemon: &Daemon) -> ViewsReply {
    let mut views = daemon.views.list();
    for view in &mut views {
        let Ok((slot, timeline)) = timeline_of(daemon, &view.group) else { continue };
        let others = held(daemon, &slot, &timeline, Some(view.point.height));
        view.held_bytes = Some(bytes_held_by(&doomed_layers(&timeline, &policy(&slot)), view.point.height, &others));
    }
    ViewsReply { views }
}

pub async fn view_close(daemon: &Arc<Daemon>, id: u64, force: bool) -> Result<(), Problem> {
    let (daemon, runtime) = (daemon.clone(), tokio::runtime::Handle::current());
    blocking(move || daemon.views.close(id, force, &runtime)).await
}

pub async fn rollback(
    daemon: &Arc<Daemon>,
    group: &str,
    at: PointSpec,
    dry_run: bool,
    progress: &ProgressOut,
) -> Result<varve_common::control::RollbackReply, Problem> {
    let slot = daemon.registry.group(group).ok_or_else(|| no_group(daemon, group))?;
    crate::rollback::rollback(&daemon.registry, &slot, at, dry_run, progress).await
}

pub async fn release(daemon: &Arc<Daemon>, group: &str) -> Result<(), Problem> {
    let slot = releasable(daemon, group)?;
    daemon.registry.release(&slot).await.map_err(|refused| {
        Problem::failed(format!("'{group}' was not released"), refused.text, "see the receiver's log")
    })
}

/// The group, if a rollback holds it.
pub fn releasable(daemon: &Arc<Daemon>, group: &str) -> Result<Arc<Slot>, Problem> {
    let slot = daemon.registry.group(group).ok_or_else(|| no_group(daemon, group))?;
    if slot.board().meta.as_ref().is_none_or(|meta| meta.held.is_none()) {
        let why = "it was not rolled back, or is released already";
        return Err(Problem::refused(
            format!("nothing of '{group}' is held"),
            why,
            "'varve status' shows what it does",
        ));
    }
    Ok(slot)
}

/// What `varve restore` asks for.
#[derive(Debug)]
pub struct RestoreWish {
    pub group: String,
    pub at: PointSpec,
    pub volume: String,
    pub to: String,
    pub dry_run: bool,
    pub force: bool,
    pub dir: Option<(u64, u64)>,
}

pub async fn restore(daemon: &Arc<Daemon>, wish: RestoreWish, progress: &ProgressOut) -> Result<RestoreReply, Problem> {
    let (tell, mut told) = mpsc::channel(1);
    let daemon = daemon.clone();
    let work = blocking(move || {
        // A client that has gone takes the receiving end with it.
        restore_now(&daemon, &wish, |done, of| {
            !matches!(tell.try_send((done, of)), Err(mpsc::error::TrySendError::Closed(_)))
        })
    });
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            Some((done, of)) = told.recv() => {
                progress.tell(done, of);
                if progress.has_gone() {
                    told.close();
                }
            }
        }
    }
}

fn restore_now(
    daemon: &Daemon,
    wish: &RestoreWish,
    tell: impl FnMut(u64, u64) -> bool,
) -> Result<RestoreReply, Problem> {
    let begin = Instant::now();
    let (slot, _) = timeline_of(daemon, &wish.group)?;
    let meta = slot.board().meta.clone();
    let metas = meta.map(|meta| meta.volumes).unwrap_or_default();
    let number = metas.iter().position(|volume| volume.path == wish.volume);
    let number = number.or_else(|| wish.volume.parse().ok().filter(|number| *number < metas.len()));
    let Some(number) = number else {
        let paths: Vec<&str> = metas.iter().map(|volume| volume.path.as_str()).collect();
        let what = format!("no volume '{}' in '{}'", wish.volume.escape_debug(), wish.group);
        return Err(Problem::not_found(
            what,
            format!("it has {}", paths.join(", ")),
            "give one of them, or its number",
        ));
    };
    let taken: Vec<PathBuf> = daemon
        .registry
        .groups()
        .iter()
        .filter_map(|slot| slot.board().meta.clone())
        .flat_map(|meta| meta.volumes.into_iter().map(|volume| volume.replica))
        .collect();
    let bytes = metas[number].bytes;
    let own = daemon.registry.groups_dir();
    let target = Target::check(Path::new(&wish.to), bytes, wish.force, wish.dir, &own, &taken)?;
    let (timeline, point) = find(&slot, &wish.at)?;
    let what = format!("nothing was restored to {}", wish.to);
    let _pin = timeline.pin(point.height).map_err(|e| history_problem(&what, &e))?;
    let mut reply = RestoreReply {
        group: wish.group.clone(),
        volume: metas[number].path.clone(),
        to: wish.to.clone(),
        point: point.reply(),
        bytes,
        written_bytes: 0,
        seconds: 0.0,
        digest: None,
        verified: false,
        dry_run: wish.dry_run,
    };
    if !wish.dry_run {
        let (_, volume) = volumes_at(&slot, &timeline, point.height, None)?.swap_remove(number);
        let restored = target.restore(&volume, tell)?;
        reply.written_bytes = restored.written_bytes;
        reply.digest = Some(restored.digest.to_hex().to_string());
        reply.verified = true;
        tracing::info!(group = wish.group, at = reply.point.time, to = wish.to, "restored");
    }
    reply.seconds = begin.elapsed().as_secs_f64();
    Ok(reply)
}

pub async fn retention(
    daemon: &Arc<Daemon>,
    group: &str,
    age_seconds: Option<u64>,
    bytes: Option<u64>,
    dry_run: bool,
) -> Result<RetentionReply, Problem> {
    let (slot, timeline) = timeline_of(daemon, group)?;
    let set = |now: Option<u64>, wish: Option<u64>| match wish {
        None => now,
        Some(0) => None,
        some => some,
    };
    let change = |retention: &mut Retention| {
        retention.age_seconds = set(retention.age_seconds, age_seconds);
        retention.bytes = set(retention.bytes, bytes);
    };
    let mut wished = policy(&slot);
    change(&mut wished);
    if !dry_run && wished != policy(&slot) {
        let changed = daemon.registry.change_meta(&slot, |meta| change(&mut meta.retention)).await;
        changed.map_err(|refused| {
            Problem::failed(
                format!("the retention of '{group}' was not changed"),
                refused.text,
                "see the receiver's log",
            )
        })?;
    }
    let daemon = daemon.clone();
    let group = group.to_owned();
    blocking(move || {
        let retention = wished;
        let layers = timeline.layers();
        let size = timeline.sizes().bytes();
        let count = doomed(&timeline, &layers, &retention, usize::MAX);
        let held = held(&daemon, &slot, &timeline, None).into_iter().min();
        let free = |layer: &&varve_timeline::catalogue::LayerInfo| held.is_none_or(|held| layer.last_height <= held);
        let expiring: Vec<_> = layers[..count].iter().take_while(free).collect();
        let report = timeline.report(&group, None, None, 0);
        let report = report.map_err(|e| history_problem("the window cannot be read", &e))?;
        Ok(RetentionReply {
            group,
            retention,
            window: report.window,
            bytes: size,
            expiring_bytes: expiring.iter().map(|layer| layer.bytes).sum(),
            expiring_to: expiring.last().map(|layer| show_time(layer.last_time_ns)),
            held_bytes: layers[expiring.len()..count].iter().map(|layer| layer.bytes).sum(),
            dry_run,
        })
    })
    .await
}

pub async fn scrub(
    daemon: &Arc<Daemon>,
    group: &str,
    bytes_per_second: Option<u64>,
    progress: &ProgressOut,
) -> Result<ScrubReply, Problem> {
    let (_, timeline) = timeline_of(daemon, group)?;
    let (tell, mut told) = mpsc::channel(1);
    let rate = bytes_per_second.unwrap_or(SCRUB_RATE).max(1);
    let what = format!("the scrub of '{group}' came to no end");
    let group = group.to_owned();
    let work = blocking(move || {
        let total = timeline.sizes().bytes();
        let (begin, mut done) = (Instant::now(), 0u64);
        let scrubbed = timeline.scrub(DAMAGES_TRACED_MAX, |bytes| {
            done += bytes;
            let due = Duration::from_secs_f64(done as f64 / rate as f64);
            std::thread::sleep(due.saturating_sub(begin.elapsed()));
            match tell.try_send((done, total)) {
                Err(mpsc::error::TrySendError::Closed(_)) => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        });
        let scrubbed = scrubbed.map_err(|e| history_problem(&what, &e))?;
        let begin_ns = timeline.layers().first().map_or(0, |layer| layer.first_time_ns);
        // Before the first record there is the point at which history begins.
        let from = |height: u64| Times::at_height(&*timeline, height).map_or(begin_ns, |(_, time_ns)| time_ns);
        // Up to the first record that can be had again: those before may be gone with their layer.
        let to = |height: u64| {
            let next = match timeline.after_height(height.saturating_sub(1)) {
                Ok(next) => next.map(|next| next.time_ns),
                Err(_) => timeline.layers().iter().find(|layer| layer.first_height >= height).map(|l| l.first_time_ns),
            };
            next.map_or_else(|| timeline.applied().time_ns, |time_ns| time_ns.saturating_sub(1))
        };
        let damaged = scrubbed.lost.iter().map(|lost| {
            let times = (lost.from < lost.to).then(|| (from(lost.from), to(lost.to).max(from(lost.from))));
            let (from, to) = times.map(|(from, to)| (show_time(from), show_time(to))).unzip();
            LayerDamage { layer: u64::from(lost.layer), what: lost.what.clone(), from, to }
        });
        Ok(ScrubReply { group, layers: scrubbed.layers, bytes: scrubbed.bytes, damaged: damaged.collect() })
    });
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            Some((done, of)) = told.recv() => {
                progress.tell(done, of);
                if progress.has_gone() {
                    told.close();
                }
            }
        }
    }
}

pub async fn keep(
    daemon: &Arc<Daemon>,
    group: String,
    name: String,
    keep: bool,
    dry_run: bool,
) -> Result<KeepReply, Problem> {
    let daemon = daemon.clone();
    blocking(move || {
        let (slot, timeline) = timeline_of(&daemon, &group)?;
        // Nothing expires between the look and the word.
        let _deciding = slot.keeping.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let chronicle = timeline.chronicle();
        let Some(bookmark) = chronicle.bookmark(&name) else {
            let what = format!("no bookmark '{}' in '{group}'", name.escape_debug());
            let why = "it was not set, has not arrived yet, or has expired";
            return Err(Problem::not_found(what, why, format!("'varve points {group}' lists them")));
        };
        let event = if keep { Event::Keep { name: name.clone() } } else { Event::Release { name: name.clone() } };
        let what = format!("the bookmark '{name}' was not changed");
        if !dry_run {
            timeline.tell(&[event]).map_err(|e| history_problem(&what, &e))?;
        }
        let is_kept = if dry_run { bookmark.kept } else { keep };
        let others = held(&daemon, &slot, &timeline, is_kept.then_some(bookmark.height));
        if dry_run && !keep && !is_kept {
            // Nothing stays because of it.
            return Ok(KeepReply { group, name, time: show_time(bookmark.time_ns), kept: false, bytes: 0 });
        }
        let bytes = match bytes_held_by(&doomed_layers(&timeline, &policy(&slot)), bookmark.height, &others) {
            0 if keep => bytes_from(&timeline, bookmark.height),
            bytes => bytes,
        };
        Ok(KeepReply { group, name, time: show_time(bookmark.time_ns), kept: is_kept, bytes })
    })
    .await
}
