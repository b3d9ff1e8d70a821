//! What a group's threads, its session and the status share.

use super::stream::{Point, StreamState};
use crate::failure::Failure;
use crate::landing::Place;
use crate::limits::GAPS_SHOWN_MAX;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;
use varve_common::state::GapReason;
use varve_timeline::timeline::Pin;

/// How far the threads are. The session waits for changes of it.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Batches that the lander is done with.
    pub landed_batches: u64,
    /// Where the newest of them that has entries stands in the landing log.
    pub newest_batch: Option<Place>,
    /// Everything before is durable.
    pub durable: Point,
    /// Everything before is durable in the replicas.
    pub applied: Point,
    /// Rises when a probe or an image was answered.
    pub answered: u64,
    /// Nothing goes on any more.
    pub failure: Option<Arc<Failure>>,
}

/// Counters since the daemon started; docs/json.md lists them.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames received.
    pub frames: AtomicU64,
    /// Bytes of their bodies, as they came.
    pub bytes: AtomicU64,
    /// Sessions that were agreed to.
    pub sessions: AtomicU64,
    /// Sessions that were refused or ended by a refusal.
    pub refused_sessions: AtomicU64,
    /// Acknowledgements sent.
    pub acks: AtomicU64,
    /// Batches written to the landing log.
    pub landed_batches: AtomicU64,
    /// Bytes of them.
    pub landed_bytes: AtomicU64,
    /// Batches applied.
    pub applied_batches: AtomicU64,
    /// Records applied that changed data.
    pub applied_records: AtomicU64,
    /// Plain bytes of the stream applied.
    pub applied_bytes: AtomicU64,
    /// Bytes changed in the replicas: what was replaced before it was written there is not counted.
    pub replica_bytes: AtomicU64,
    /// Of these: written with what came in the batches behind.
    pub late_bytes: AtomicU64,
    /// Plain bytes of images applied.
    pub image_bytes: AtomicU64,
    /// Bytes that were going to be replaced and had to be read.
    pub before_read_bytes: AtomicU64,
    /// Bytes that were going to be replaced and were known: holes, recently written blocks.
    pub before_known_bytes: AtomicU64,
    /// Bytes of before-images kept.
    pub before_kept_bytes: AtomicU64,
    /// Bytes that were replaced by the same bytes: nothing is kept.
    pub before_same_bytes: AtomicU64,
    /// Times that the landing log was found to have lost something acknowledged.
    pub log_damages: AtomicU64,
}

impl Counters {
    /// By name.
    pub fn snapshot(&self) -> BTreeMap<String, u64> {
        let all = [
            ("frames", &self.frames),
            ("bytes", &self.bytes),
            ("sessions", &self.sessions),
            ("refused_sessions", &self.refused_sessions),
            ("acks", &self.acks),
            ("batches", &self.landed_batches),
            ("landed_bytes", &self.landed_bytes),
            ("applied_batches", &self.applied_batches),
            ("applied_records", &self.applied_records),
            ("applied_bytes", &self.applied_bytes),
            ("replica_bytes", &self.replica_bytes),
            ("late_bytes", &self.late_bytes),
            ("image_bytes", &self.image_bytes),
            ("before_read_bytes", &self.before_read_bytes),
            ("before_known_bytes", &self.before_known_bytes),
            ("before_kept_bytes", &self.before_kept_bytes),
            ("before_same_bytes", &self.before_same_bytes),
            ("log_damages", &self.log_damages),
        ];
        all.into_iter().map(|(name, value)| (name.to_owned(), value.load(Ordering::Relaxed))).collect()
    }
}

/// A gap that was seen since the group was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Time of its begin at the source.
    pub from_ns: u64,
    /// Of its end.
    pub to_ns: Option<u64>,
    /// Why.
    pub reason: GapReason,
}

/// The states at both ends of the landing log.
#[derive(Clone, Debug)]
pub struct View {
    /// After everything landed.
    pub landed: StreamState,
    /// After everything applied.
    pub applied: StreamState,
    /// The newest ones.
    pub gaps: VecDeque<Gap>,
}

/// Where the landing log can be read from on: what stands before may be gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Anchor {
    /// Of the next entry, or the padding before it.
    pub place: Place,
    /// CRC of the header before it.
    pub chain: u32,
    /// The stream's state there.
    pub state: StreamState,
}

/// The replicas are to be rolled back as soon as the stream is in this incarnation, and above this height: an abort goes back
/// to the source's incarnation, in which the stream may still be while much is to be applied.
#[derive(Debug)]
pub struct RollbackWish {
    /// The receiver's own, or the source's.
    pub incarnation: [u8; 16],
    /// The height at which the takeover began.
    pub above: u64,
    /// To this point, kept from expiring.
    pub pin: Pin,
    /// Its time.
    pub time_ns: u64,
    /// It lies in a gap: what the replicas hold then is no point.
    pub in_gap: bool,
    /// They are.
    pub rolled: Arc<AtomicBool>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Live {
    /// Outlive the group's being opened anew.
    pub counters: Arc<Counters>,
    progress: watch::Sender<Progress>,
    view: Mutex<View>,
    wish: Mutex<Option<RollbackWish>>,
    anchor: Mutex<Option<Anchor>>,
}

impl Live {
    /// For a group that was recovered to these states.
    pub fn new(counters: Arc<Counters>, landed: StreamState, applied: StreamState) -> Self {
        let progress = Progress { durable: landed.at, applied: applied.at, ..Progress::default() };
        let mut view = View { landed, applied, gaps: VecDeque::new() };
        if let Some(reason) = landed.gap.filter(|_| landed.begun()) {
            let from_ns = landed.good.map_or(landed.at.time_ns, |good| good.time_ns);
            view.gaps.push_back(Gap { from_ns, to_ns: None, reason });
        }
        let (progress, view) = (watch::Sender::new(progress), Mutex::new(view));
        Self { counters, progress, view, wish: Mutex::default(), anchor: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Said before the stream's `Begin` is landed (or the applier starts): so it is done before anything that follows.
    pub fn wish_rollback(&self, wish: Option<RollbackWish>) {
        *self.wish.lock().unwrap_or_else(PoisonError::into_inner) = wish;
    }

    /// What is to be done where the stream is in this state, once.
    pub fn take_wish(&self, state: &StreamState) -> Option<RollbackWish> {
        let mut wish = self.wish.lock().unwrap_or_else(PoisonError::into_inner);
        wish.take_if(|wish| wish.incarnation == state.at.incarnation && state.height > wish.above)
    }

    /// Said before what stands in front of it is recycled.
    pub fn set_anchor(&self, anchor: Anchor) {
        *self.anchor.lock().unwrap_or_else(PoisonError::into_inner) = Some(anchor);
    }

    /// Where the landing log can be read from on. It moves, and then segments go: who reads looks again when it fails.
    pub fn anchor(&self) -> Option<Anchor> {
        *self.anchor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Both states.
    pub fn view(&self) -> View {
        self.lock().clone()
    }

    /// Changes from here on.
    pub fn subscribe(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Why nothing goes on.
    pub fn failure(&self) -> Option<Arc<Failure>> {
        self.progress.borrow().failure.clone()
    }

    /// One more batch is durable, at `place` if it has entries; the stream stands here.
    pub fn landed(&self, state: StreamState, place: Option<Place>) {
        let mut view = self.lock();
        let before = std::mem::replace(&mut view.landed, state);
        if before.gap != state.gap {
            if let Some(open) = view.gaps.back_mut().filter(|gap| gap.to_ns.is_none()) {
                open.to_ns = Some(state.at.time_ns);
            }
            if let Some(reason) = state.gap {
                view.gaps.push_back(Gap { from_ns: state.at.time_ns, to_ns: None, reason });
            }
            while view.gaps.len() > GAPS_SHOWN_MAX {
                view.gaps.pop_front();
            }
        }
        drop(view);
        self.progress.send_modify(|progress| {
            progress.landed_batches += 1;
            progress.newest_batch = place.or(progress.newest_batch);
            progress.durable = state.at;
        });
    }

    /// Everything before is in the replicas, synced and marked.
    pub fn applied(&self, state: StreamState) {
        self.lock().applied = state;
        self.progress.send_modify(|progress| progress.applied = state.at);
    }

    /// There may be room again for images or probes.
    pub fn answered(&self) {
        self.progress.send_modify(|progress| progress.answered += 1);
    }

    /// The group stops. The first reason counts.
    pub fn fail(&self, failure: Failure) {
        self.progress.send_modify(|progress| {
            progress.failure.get_or_insert_with(|| Arc::new(failure));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// The page and the table say the same names.
    #[test]
    fn the_counters_are_documented() {
        let page = include_str!("../../../docs/json.md");
        let table = page.split("### Counters of a receiver").nth(1).and_then(|rest| rest.split("\n## ").next());
        let rows = table.expect("a table").lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
        let told: BTreeSet<&str> = rows.flat_map(|row| row.split(['`', ' '])).collect();
        let counted = Counters::default().snapshot();
        let counted: BTreeSet<&str> = counted.keys().map(String::as_str).collect();
        assert_eq!(told.into_iter().filter(|name| !name.is_empty()).collect::<BTreeSet<_>>(), counted);
    }
}
