//! The causes of a gap that no real kernel shows on demand: each is named, and what it may have hidden is sent.

use super::played::{PlayedSource, Stage, Told};
use super::source::{Stream, Track};
use std::sync::atomic::Ordering;
use varve_common::format::MarkKind;
use varve_common::limits::REGION_BYTES;
use varve_common::state::{Data, GapReason};

const REGIONS: u64 = 4;
/// What differs in each region: its second block of 64 KiB.
const DIFFERS: u16 = 0b10;

/// `trouble` happens to a group that is protected and whose replica differs. It is named before a later write is there, exactly
/// what differs in `regions` is sent inside the gap, and the gap closes.
async fn repaired(trouble: impl FnOnce(&Stage), reason: GapReason, regions: impl IntoIterator<Item = u64>) {
    let stage = Stage::set().await;
    stage.protected().await;
    let told_before = stage.told().len();
    stage.script.differs.store(DIFFERS, Ordering::SeqCst);
    // Nothing is read as long as a write is under way, so the gap stays open.
    stage.source.track.in_flight.store(true, Ordering::SeqCst);
    let producer = stage.source.stream.producer();
    trouble(&stage);
    stage.until("a gap", |stage| stage.shared.facts().gap.is_some()).await;
    let status = stage.shared.status();
    assert_eq!((status.gap_reason, status.reason.as_deref()), (Some(reason), Some(reason.explain())));
    assert!(!status.data.is_consistent(), "{:?}", status.data);
    stage.source.write(0, 1);
    stage.source.track.in_flight.store(false, Ordering::SeqCst);
    stage.protected().await;
    stage.until("good", |stage| stage.shared.data() == Data::Protected).await;

    let marks = stage.marks();
    assert_eq!(marks.len(), 4, "{marks:?}");
    assert_eq!((marks[2].kind, marks[2].reason), (MarkKind::GapBegin, Some(reason)));
    assert!(marks[2].position <= producer, "what came after the trouble is in the gap: {marks:?}");
    assert_eq!(marks[3].kind, MarkKind::GapEnd);
    let told = stage.told().split_off(told_before);
    let begin = told.iter().position(|told| *told == Told::Mark(marks[2])).expect("told");
    let end = told.iter().position(|told| *told == Told::Mark(marks[3])).expect("told");
    let sent = |told: &[Told]| {
        let images = told.iter().filter_map(|told| match told {
            Told::Image(extents) => Some(extents.clone()),
            _ => None,
        });
        let mut sent: Vec<_> = images.flatten().collect();
        sent.sort_unstable();
        sent
    };
    let wanted: Vec<_> = regions.into_iter().map(|region| (region * REGION_BYTES + (64 << 10), 64 << 10)).collect();
    assert_eq!(sent(&told[begin..end]), wanted, "inside the gap");
    assert_eq!(sent(&told), wanted, "nowhere else");
    assert_eq!(stage.script.refused.load(Ordering::SeqCst), 0);
}

/// As the capture program does it: bit, counter, position.
fn unreadable(source: &PlayedSource, region: u64) {
    source.track.set_dirty(region);
    source.troubles.lock().expect("not poisoned").unreadable += 1;
    let position = source.stream.producer();
    let _ = source.first_drop.compare_exchange(0, position + 1, Ordering::SeqCst, Ordering::SeqCst);
}

/// The kernel skipped the program, and nobody knows for which writes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_missed_events_the_whole_volume_is_compared() {
    repaired(|stage| stage.misses.note(u64::MAX, 1), GapReason::MissedEvents, 0..REGIONS).await;
}

/// A passthrough command says nothing of what it writes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_passthrough_command_the_whole_volume_is_compared() {
    let trouble = |stage: &Stage| stage.source.troubles.lock().expect("not poisoned").passthrough += 1;
    repaired(trouble, GapReason::Passthrough, 0..REGIONS).await;
}

/// Of a write that cannot be read one knows where it went: nothing else is compared.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_unreadable_page_its_region_is_compared() {
    repaired(|stage| unreadable(&stage.source, 2), GapReason::UnreadablePage, [2]).await;
}

/// Both together: what is known of one place does not hide that others may be wrong, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missed_events_are_not_hidden_by_an_unreadable_page() {
    let trouble = |stage: &Stage| {
        // The worker looks at this count last.
        stage.misses.note(u64::MAX, 1);
        unreadable(&stage.source, 2);
    };
    repaired(trouble, GapReason::MissedEvents, 0..REGIONS).await;
}
