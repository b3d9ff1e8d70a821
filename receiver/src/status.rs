//! What `varve status` shows of a receiver.

use crate::group::live::Gap;
use crate::group::registry::{Board, Registry, Slot};
use crate::group::stream::Point;
use crate::limits::REPORT_AGE_MAX;
use varve_common::control::{GapStatus, GroupStatus, ResyncStatus, VolumeStatus, Window, show_position, show_time};
use varve_common::state::{DataFacts, Link, Role};
use varve_common::wire::messages::Report;

/// All groups, or the one of this name.
pub fn groups(registry: &Registry, only: Option<&str>) -> Vec<GroupStatus> {
    let wanted = |slot: &&std::sync::Arc<Slot>| only.is_none_or(|name| name == slot.name);
    registry.groups().iter().filter(wanted).map(|slot| group(slot)).collect()
}

/// One group.
pub fn group(slot: &Slot) -> GroupStatus {
    let board = slot.board().clone();
    let view = board.live.as_ref().map(|live| live.view());
    let report = fresh_report(&board);
    let landed = view.as_ref().map(|view| view.landed);
    let facts = DataFacts {
        ever_consistent: landed.is_some_and(|landed| landed.ever_consistent),
        gap: landed.and_then(|landed| landed.gap),
        sync_running: report.is_some_and(|report| report.resync.is_some()),
        behind: report.is_none_or(|report| report.data == varve_common::state::Data::Lagging),
        verifying: report.and_then(|report| report.verify.as_ref()).is_some_and(|verify| !verify.finished),
    };
    let durable = landed.filter(|landed| landed.begun()).map(|landed| landed.at);
    let captured = report.map(|report| report.captured);
    let lag = captured.zip(durable).map_or(0, |(captured, durable)| captured.saturating_sub(durable.position));
    let failure = board.live.as_ref().and_then(|live| live.failure()).map(|failure| failure.text.clone());
    let meta = board.meta.as_ref();
    let volume = |volume: &crate::group::meta::VolumeMeta| VolumeStatus {
        path: volume.path.clone(),
        bytes: volume.bytes,
        replica: Some(volume.replica.display().to_string()),
    };
    GroupStatus {
        name: slot.name.clone(),
        role: Role::Replica,
        link: board.link,
        data: facts.word(),
        reason: failure.or(board.refusal.clone()).or(facts.gap.map(|reason| reason.explain().to_owned())),
        gap_reason: facts.gap,
        epoch: meta.map_or(0, |meta| meta.epoch),
        rpo_seconds: report.and_then(|report| report.rpo_ms).map(|ms| ms as f64 / 1000.0),
        lag_bytes: lag,
        captured: captured.zip(durable).map(|(captured, durable)| show_position(&durable.incarnation, captured)),
        durable: durable.map(show),
        applied: view.as_ref().filter(|view| view.applied.begun()).map(|view| show(view.applied.at)),
        window: landed.and_then(|landed| landed.good).map_or_else(Window::default, |good| Window {
            from: Some(show_time(good.time_ns)),
            to: Some(show_time(good.time_ns)),
        }),
        gaps: view.as_ref().map(|view| view.gaps.iter().map(gap).collect()).unwrap_or_default(),
        volumes: meta.map(|meta| meta.volumes.iter().map(volume).collect()).unwrap_or_default(),
        resync: report
            .and_then(|report| report.resync)
            .map(|(done_bytes, total_bytes)| ResyncStatus { done_bytes, total_bytes }),
        verify: board.report.as_ref().and_then(|(report, _)| report.verify.clone()),
        ring: None,
        counters: slot.counters.snapshot(),
    }
}

/// What the agent said, if it is connected and said it lately.
fn fresh_report(board: &Board) -> Option<&Report> {
    let (report, at) = board.report.as_ref()?;
    (board.link == Link::Streaming && at.elapsed() < REPORT_AGE_MAX).then_some(report)
}

fn show(point: Point) -> String {
    show_position(&point.incarnation, point.position)
}

fn gap(gap: &Gap) -> GapStatus {
    GapStatus { from: show_time(gap.from_ns), to: gap.to_ns.map(show_time), reason: gap.reason }
}
