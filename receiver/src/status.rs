//! What `varve status` shows of a receiver.

use crate::clock::wall_ns;
use crate::daemon::Daemon;
use crate::group::live::{Gap, View};
use crate::group::registry::{Board, Slot};
use crate::group::stream::Point;
use crate::limits::{GAPS_SHOWN_MAX, REPORT_AGE_MAX, SOURCE_SILENT_TIME_MAX};
use std::time::Duration;
use varve_common::control::{
    AuthorityStatus, DrillStatus, GapStatus, GroupStatus, HistoryStatus, ResyncStatus, TakeoverStatus, VolumeStatus,
    Window, show_position, show_time,
};
use varve_common::state::{Data, DataFacts, Link, Role};
use varve_common::wire::messages::Report;
use varve_takeover::DrillRecord;
use varve_timeline::chronicle::Times;

/// All groups, or the one of this name.
pub fn groups(daemon: &Daemon, only: Option<&str>) -> Vec<GroupStatus> {
    let wanted = |slot: &&std::sync::Arc<Slot>| only.is_none_or(|name| name == slot.name);
    let show = |slot: &std::sync::Arc<Slot>| group(daemon, slot);
    daemon.registry.all().iter().filter(wanted).map(show).collect()
}

/// One group.
pub fn group(daemon: &Daemon, slot: &Slot) -> GroupStatus {
    let views = daemon.views.count(&slot.name);
    let board = slot.board().clone();
    let view = board.live.as_ref().map(|live| live.view());
    let report = fresh_report(&board);
    let landed = view.as_ref().map(|view| view.landed);
    let durable = landed.filter(|landed| landed.begun()).map(|landed| landed.at);
    let rpo = report.zip(durable).and_then(|(report, durable)| rpo(&board, report, durable));
    let promoted = board.meta.as_ref().is_some_and(|meta| meta.takeover.is_some());
    let facts = DataFacts {
        ever_consistent: landed.is_some_and(|landed| landed.ever_consistent),
        gap: landed.and_then(|landed| landed.gap),
        sync_running: report.is_some_and(|report| report.resync.is_some()),
        // What runs here is not behind anything.
        behind: !promoted
            && board.meta.as_ref().is_none_or(|meta| meta.branch.is_none())
            && report.is_none_or(|report| is_lagging(report, rpo)),
        verifying: report.and_then(|report| report.verify.as_ref()).is_some_and(|verify| !verify.finished),
    };
    let captured = report.map(|report| report.captured);
    let lag = captured.zip(durable).map_or(0, |(captured, durable)| captured.saturating_sub(durable.position));
    let failure = board.live.as_ref().and_then(|live| live.failure()).map(|failure| failure.text.clone());
    let meta = board.meta.as_ref();
    let branch = meta.and_then(|meta| meta.branch.as_ref()).map(|branch| {
        let (of, host, split) = (&branch.of, &branch.host, &branch.split);
        format!("a branch of '{of}': what '{host}' wrote after {split} and never sent; nobody writes to it")
    });
    let volume = |volume: &crate::group::meta::VolumeMeta| VolumeStatus {
        path: volume.path.clone(),
        bytes: volume.bytes,
        replica: Some(volume.replica.display().to_string()),
    };
    GroupStatus {
        name: slot.name.clone(),
        role: if promoted { Role::Promoted } else { Role::Replica },
        link: board.link,
        data: facts.word(),
        reason: failure.or(branch).or(board.refusal.clone()).or(facts.gap.map(|reason| reason.explain().to_owned())),
        gap_reason: facts.gap,
        epoch: meta.map_or(0, |meta| meta.epoch),
        rpo_seconds: rpo.map(|rpo| rpo.as_secs_f64()),
        lag_bytes: lag,
        captured: captured.zip(durable).map(|(captured, durable)| show_position(&durable.incarnation, captured)),
        durable: durable.map(show),
        applied: view.as_ref().filter(|view| view.applied.begun()).map(|view| show(view.applied.at)),
        window: landed.and_then(|landed| landed.good).map_or_else(Window::default, |good| Window {
            from: Some(show_time(oldest_ns(&board).unwrap_or(good.time_ns))),
            to: Some(show_time(good.time_ns)),
        }),
        history: history(daemon, slot, &board, views),
        gaps: gaps(&board, view.as_ref()),
        volumes: meta.map(|meta| meta.volumes.iter().map(volume).collect()).unwrap_or_default(),
        resync: report
            .and_then(|report| report.resync)
            .map(|(done_bytes, total_bytes)| ResyncStatus { done_bytes, total_bytes }),
        verify: board.report.as_ref().and_then(|(report, _)| report.verify.clone()),
        ring: None,
        journal: None,
        alerts: Vec::new(),
        watch: None,
        authority: authority(daemon, slot, &board),
        drill: drill(daemon, slot),
        counters: slot.counters.snapshot(),
    }
}

/// What the drills have shown, if there were any. Of a record that cannot be read nothing is said here: `varve drill show` says why.
fn drill(daemon: &Daemon, slot: &Slot) -> Option<DrillStatus> {
    let record = DrillRecord::load(daemon.registry.paths(), &slot.name).ok()??;
    Some(record.status())
}

/// What runs where, if it runs here.
fn authority(daemon: &Daemon, slot: &Slot, board: &Board) -> Option<AuthorityStatus> {
    let meta = board.meta.as_ref()?;
    let takeover = meta.takeover.as_ref()?;
    let name = &meta.name;
    let written = board.live.as_ref().map(|live| live.view().landed);
    let written = written.filter(|landed| landed.at.incarnation == crate::group::meta::unhex(&takeover.incarnation));
    let how = if takeover.planned { "planned, nothing is missing" } else { "unplanned" };
    let next = match (&board.unsure, slot.failback.status(Some(meta))) {
        (Some(_), _) => format!(
            "find out who has the newest data: if '{0}' has, 'varve unprotect {name}' there and protect under another name; if \
             this host has, 'varve failback {name} --keep-branch NAME' here (a restart of varve-receiver serves the devices again)",
            meta.owner
        ),
        (None, Some(failback)) => failback.next,
        (None, None) => daemon.promotions.status(Some(meta), &daemon.views).map(|it| it.next).unwrap_or_default(),
    };
    let place = format!("runs here, on '{}', under epoch {} ({how}); not on '{}'", daemon.name, meta.epoch, meta.owner);
    Some(AuthorityStatus {
        text: board.unsure.clone().unwrap_or(place),
        since: Some(takeover.since.clone()),
        not_home_bytes: written.map(|landed| landed.at.position),
        quiet: None,
        unsure: board.unsure.is_some(),
        next,
    })
}

/// Time of the oldest point.
fn oldest_ns(board: &Board) -> Option<u64> {
    let timeline = board.timeline.as_ref()?;
    let chronicle = timeline.chronicle();
    let oldest = timeline.begin().unwrap_or(0).max(chronicle.oldest().0);
    let (first, _) = chronicle.window(oldest, timeline.applied().height)?;
    Times::at_height(&**timeline, first).map(|(_, time_ns)| time_ns).or_else(|| {
        let first_layer = timeline.layers().first().map(|layer| layer.first_time_ns);
        let expired = chronicle.oldest();
        if expired.0 >= first { Some(expired.1) } else { first_layer }
    })
}

fn history(daemon: &Daemon, slot: &Slot, board: &Board, views: u64) -> Option<HistoryStatus> {
    let timeline = board.timeline.as_ref()?;
    let (sizes, chronicle) = (timeline.sizes(), timeline.chronicle());
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    let known = count(&slot.counters.before_known_bytes);
    let all = known + count(&slot.counters.before_read_bytes);
    let held = board.meta.as_ref().and_then(|meta| meta.held.as_ref());
    let held = held.map(|held| {
        format!("rolled back to {}; 'varve rollback {} --release' lets replication go on", held.to, slot.name)
    });
    Some(HistoryStatus {
        layers: sizes.layers,
        bytes: sizes.bytes(),
        records: sizes.records,
        views,
        bookmarks: chronicle.bookmarks().count() as u64,
        kept: chronicle.kept_count() as u64,
        avoided_reads: (all > 0).then(|| known as f64 / all as f64),
        damaged: chronicle.damages().len() as u64,
        retention: board.meta.as_ref().map(|meta| meta.retention).unwrap_or_default(),
        notice: held.or(board.notice.clone()),
        takeover: daemon.promotions.status(board.meta.as_ref(), &daemon.views).map(|takeover| {
            let failback = slot.failback.status(board.meta.as_ref());
            let next = failback.as_ref().map_or(takeover.next, |failback| failback.next.clone());
            TakeoverStatus { failback, next, ..takeover }
        }),
    })
}

/// What the agent said last; and if something was not durable then, or its signs of life (one a second) are overdue, at least
/// the age of what is durable: what the agent says comes late when it matters.
fn rpo(board: &Board, report: &Report, durable: Point) -> Option<Duration> {
    let said = Duration::from_millis(report.rpo_ms?);
    let seen = board.clock.age(durable.time_ns, wall_ns());
    let behind = report.captured > durable.position || seen > SOURCE_SILENT_TIME_MAX;
    Some(if behind { said.max(seen) } else { said })
}

/// By the source's own limit, whether the source said so or it shows here: on a slow line its word is as late as its data. What
/// is not known counts as late. Below the time between two signs of life only the source can tell.
fn is_lagging(report: &Report, rpo: Option<Duration>) -> bool {
    let limit = Duration::from_millis(report.lagging_after_ms).max(SOURCE_SILENT_TIME_MAX);
    report.data == Data::Lagging || rpo.is_none_or(|rpo| rpo > limit)
}

/// What the agent said, if it is connected and said it lately.
fn fresh_report(board: &Board) -> Option<&Report> {
    let (report, at) = board.report.as_ref()?;
    (board.link == Link::Streaming && at.elapsed() < REPORT_AGE_MAX).then_some(report)
}

fn show(point: Point) -> String {
    show_position(&point.incarnation, point.position)
}

/// What was seen since the group was opened, and what the chronicle has from before.
fn gaps(board: &Board, view: Option<&View>) -> Vec<GapStatus> {
    let mut all: Vec<Gap> = view.map(|view| view.gaps.iter().copied().collect()).unwrap_or_default();
    let seen = all.clone();
    let is_open = view.is_none_or(|view| view.landed.gap.is_some());
    let end = |to_ns: Option<u64>| to_ns.unwrap_or(u64::MAX);
    let chronicle = board.timeline.as_ref().map(|timeline| timeline.chronicle().gaps()).unwrap_or_default();
    for gap in chronicle {
        let gap = Gap { from_ns: gap.began_ns, to_ns: gap.to.map(|to| to.1), reason: gap.reason };
        let known = |seen: &Gap| seen.from_ns <= end(gap.to_ns) && gap.from_ns <= end(seen.to_ns);
        // Open there and closed in what is landed: it is known again once that is applied.
        if !seen.iter().any(known) && (gap.to_ns.is_some() || is_open) {
            all.push(gap);
        }
    }
    all.sort_by_key(|gap| gap.from_ns);
    let older = all.len().saturating_sub(GAPS_SHOWN_MAX);
    all.drain(..older);
    all.iter().map(show_gap).collect()
}

fn show_gap(gap: &Gap) -> GapStatus {
    GapStatus { from: show_time(gap.from_ns), to: gap.to_ns.map(show_time), reason: gap.reason }
}
