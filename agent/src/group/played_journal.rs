//! A worker with a journal against the played capture and receiver: what the receiver is told is what the ring was.

use super::played::{Stage, Told};
use crate::journal::Settings;
use std::sync::atomic::Ordering;
use std::time::Duration;
use varve_common::format::MarkKind;
use varve_common::record::RecordKind;
use varve_common::state::GapReason;

const CAPACITY: u64 = 1 << 20;

/// On a disk, like a journal.
fn journals() -> (tempfile::TempDir, Settings) {
    let dir = tempfile::TempDir::new_in("/var/tmp").expect("temp dir");
    let settings = Settings { dir: dir.path().to_owned(), bytes_max: 64 << 20 };
    (dir, settings)
}

async fn stalled(settings: Settings) -> Stage {
    let stage = Stage::with(Some(settings)).await;
    stage.source.stream.capacity.store(CAPACITY, Ordering::SeqCst);
    stage.protected().await;
    stage.script.stalled.store(true, Ordering::SeqCst);
    stage
}

/// Writes more than any buffer between here and the receiver takes.
async fn spill(stage: &Stage, bytes: u64) -> Vec<u64> {
    let goal = stage.source.stream_end() + bytes;
    let mut written = Vec::new();
    while stage.source.stream_end() < goal {
        written.push(stage.source.stream.append(RecordKind::Write, 0, &vec![3; 100 << 10]));
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
    stage.until("it is in the journal", |stage| stage.journal_used() > 0 && stage.ring_used() <= CAPACITY / 2).await;
    written
}

/// Every record came once, in its order, and all of `written` did.
fn assert_all_came(stage: &Stage, written: &[u64]) {
    let records = stage.told().into_iter().filter_map(|told| match told {
        Told::Data(position, records) => {
            assert!(records.first().is_none_or(|(first, _)| *first == position));
            Some(records.into_iter().map(|(position, _)| position))
        }
        _ => None,
    });
    let came: Vec<u64> = records.flatten().collect();
    assert!(came.is_sorted_by(|a, b| a < b), "in order, and nothing twice");
    assert!(written.iter().all(|position| came.binary_search(position).is_ok()), "nothing is missing");
}

impl Stage {
    fn journal_used(&self) -> u64 {
        self.shared.status().journal.map_or(0, |journal| journal.used_bytes)
    }

    fn ring_used(&self) -> u64 {
        self.shared.status().ring.map_or(0, |ring| ring.used_bytes)
    }
}

impl super::played::PlayedSource {
    fn stream_end(&self) -> u64 {
        super::source::Stream::producer(&self.stream)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_keeps_up_writes_nothing() {
    let (_dir, settings) = journals();
    let stage = Stage::with(Some(settings)).await;
    stage.source.stream.capacity.store(64 << 20, Ordering::SeqCst);
    stage.protected().await;
    for _ in 0..300 {
        stage.source.stream.append(RecordKind::Write, 0, &vec![3; 64 << 10]);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    stage.until("all is acknowledged", |stage| stage.shared.lag_bytes() == 0).await;
    assert_eq!(stage.shared.journal().expect("a journal").spent(), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_receiver_gets_everything_in_order_and_once() {
    let (_dir, settings) = journals();
    let stage = stalled(settings).await;
    let written = spill(&stage, 30 << 20).await;
    assert!(stage.shared.lag_bytes() > 15 << 20, "journaled bytes count: {}", stage.shared.lag_bytes());
    stage.script.stalled.store(false, Ordering::SeqCst);
    stage.until("the journal is empty", |stage| stage.journal_used() == 0 && stage.shared.lag_bytes() == 0).await;
    assert_all_came(&stage, &written);
    assert_eq!(stage.marks().len(), 2, "no gap: {:?}", stage.marks());
}

/// What goes past a full ring while the receiver is far behind begins a gap where it happened, not where sending stands.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_begins_in_its_place_behind_the_journal() {
    let (_dir, settings) = journals();
    let stage = stalled(settings).await;
    let mut written = spill(&stage, 20 << 20).await;
    let dropped = stage.source.drop_write(1);
    stage.source.write(512, 2);
    stage.until("the gap is seen", |stage| stage.shared.facts().gap.is_some()).await;
    written.extend(spill(&stage, 5 << 20).await);
    stage.script.stalled.store(false, Ordering::SeqCst);
    stage.protected().await;
    stage.until("all is acknowledged", |stage| stage.shared.lag_bytes() == 0).await;
    let marks = stage.marks();
    assert_eq!((marks[2].kind, marks[2].reason), (MarkKind::GapBegin, Some(GapReason::RingFull)));
    assert_eq!(marks[2].position, dropped, "{marks:?}");
    assert_eq!(marks.last().map(|mark| mark.kind), Some(MarkKind::GapEnd));
    assert_all_came(&stage, &written);
}

/// What is read while most of what came before it is in the journal would wait for all of that, in buffers that other groups
/// want: nothing is read before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_read_while_the_journal_is_to_be_sent() {
    let (_dir, settings) = journals();
    let stage = stalled(settings).await;
    spill(&stage, 20 << 20).await;
    let probes = stage.shared.counters.probes.load(Ordering::SeqCst);
    stage.source.drop_write(1);
    stage.until("the gap is seen", |stage| stage.shared.facts().gap.is_some()).await;
    spill(&stage, 5 << 20).await;
    assert_eq!(stage.regions.available(), stage.regions.count(), "no buffer is taken");
    stage.script.stalled.store(false, Ordering::SeqCst);
    stage.protected().await;
    assert!(stage.shared.counters.probes.load(Ordering::SeqCst) > probes, "it was read in the end");
}

/// A disk that gives back something else than it was given: nothing of it is sent, the volume is compared.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_that_cannot_be_read_is_a_gap_with_its_reason() {
    let (dir, settings) = journals();
    let stage = stalled(settings).await;
    spill(&stage, 30 << 20).await;
    for entry in std::fs::read_dir(dir.path().join("played")).expect("segments").flatten() {
        let mut bytes = std::fs::read(entry.path()).expect("readable");
        let end = bytes.len();
        // Behind what is in hand and under way already.
        bytes[(8 << 20).min(end)..].fill(0x55);
        std::fs::write(entry.path(), bytes).expect("written");
    }
    stage.script.stalled.store(false, Ordering::SeqCst);
    let lost = |stage: &Stage| stage.marks().iter().any(|mark| mark.reason == Some(GapReason::JournalLost));
    stage.until("the loss is told", lost).await;
    stage.protected().await;
    let error = stage.shared.status().journal.and_then(|journal| journal.error);
    assert!(error.is_some_and(|error| error.contains("segment")), "status says why");
    // Without it everything goes on.
    stage.source.write(0, 1);
    stage.until("all is acknowledged", |stage| stage.shared.lag_bytes() == 0).await;
}

/// A boot takes the ring with it; what is in it at a clean end is on the disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clean_end_spills_the_ring() {
    let (dir, settings) = journals();
    let stage = stalled(settings).await;
    spill(&stage, 10 << 20).await;
    for _ in 0..3 {
        stage.source.write(0, 1);
    }
    let end = stage.source.stream_end();
    stage.stop.send(true).expect("it lives");
    let Stage { task, source, .. } = stage;
    tokio::time::timeout(Duration::from_secs(8), task).await.expect("ends").expect("without a panic");
    assert!(super::source::Stream::consumer(&source.stream) >= end, "nothing is left in the ring alone");
    assert!(std::fs::read_dir(dir.path().join("played")).expect("segments").count() > 0);
}
