//! What waits for the applier: landed batches, probes and images in the order of the stream.

use super::rollback::RollbackOrder;
use crate::landing::Place;
use crate::limits::SPARE_IMAGES_MAX;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::mpsc;
use varve_common::wire::IMAGE_BODY_BYTES_MAX;
use varve_common::wire::messages::{ImageDone, Probe, ProbeReply};

/// One piece of work.
#[derive(Debug)]
pub enum Work {
    /// Entries that are still in memory.
    Landed(Landed),
    /// Entries that are only in the log: everything from where the applier stands up to this place.
    Log {
        /// Where the last of them ends.
        until: Place,
    },
    /// A frame that is not landed.
    Act(Action),
}

/// Entries of one batch that follow each other.
#[derive(Debug)]
pub struct Landed {
    /// Where the first one's header stands.
    pub place: Place,
    /// From that header on; the batch's padding may follow the last entry.
    pub bytes: Bytes,
    /// Bytes of the entries.
    pub entry_bytes: usize,
}

impl Landed {
    /// Where the last entry ends.
    pub fn entries_end(&self) -> Place {
        Place { offset: self.place.offset + self.entry_bytes as u64, ..self.place }
    }

    /// Where the next batch, or the rest of this one, begins.
    pub fn end(&self) -> Place {
        Place { offset: self.place.offset + self.bytes.len() as u64, ..self.place }
    }
}

/// A frame that the applier answers.
#[derive(Debug)]
pub enum Action {
    /// To be compared with the replica.
    Probe(Probe, Answer),
    /// The plain body of an image, decoded once already.
    Image(Vec<u8>, Answer),
    /// The replicas are to be made what they were.
    Rollback(Box<RollbackOrder>),
}

/// What the applier answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answered {
    /// To a probe.
    Probe(ProbeReply),
    /// To an image.
    Image(ImageDone),
}

/// What waits for the applier on behalf of one session; frames beyond the limits are not read from the stream.
#[derive(Debug, Default)]
pub struct Waiting {
    /// Memory of images that are not in the replica and synced yet.
    pub image_bytes: AtomicUsize,
    /// Probes not answered.
    pub probes: AtomicUsize,
    /// Memory of images that were written, for those that come: in fresh memory each page costs a fault. Only of large ones for
    /// large ones: what waits is counted by its capacity, and shall not take much more than it needs.
    spare: Mutex<Vec<Vec<u8>>>,
}

/// Whether memory of so many bytes is worth keeping.
fn is_large(bytes: usize) -> bool {
    (IMAGE_BODY_BYTES_MAX / 2..=IMAGE_BODY_BYTES_MAX).contains(&bytes)
}

impl Waiting {
    fn spare(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Empty memory for the body of an image.
    pub fn body(&self, bytes: usize) -> Vec<u8> {
        let spare = if is_large(bytes) { self.spare().pop() } else { None };
        let mut body = spare.filter(|body| body.capacity() >= bytes).unwrap_or_else(|| Vec::with_capacity(bytes));
        body.clear();
        body
    }

    /// Frees what no image has needed, if none waits.
    pub fn rest(&self) {
        if self.image_bytes.load(Ordering::Acquire) == 0 {
            *self.spare() = Vec::new();
        }
    }
}

/// The way back to the session, and its place among what waits. Dropped unanswered when the session has gone or the
/// group failed.
#[derive(Debug)]
pub struct Answer {
    to: mpsc::UnboundedSender<Answered>,
    waiting: Arc<Waiting>,
    image_bytes: usize,
}

impl Answer {
    /// For a probe.
    pub fn for_probe(to: mpsc::UnboundedSender<Answered>, waiting: Arc<Waiting>) -> Self {
        waiting.probes.fetch_add(1, Ordering::AcqRel);
        Self { to, waiting, image_bytes: 0 }
    }

    /// For an image in so much memory.
    pub fn for_image(to: mpsc::UnboundedSender<Answered>, waiting: Arc<Waiting>, image_bytes: usize) -> Self {
        waiting.image_bytes.fetch_add(image_bytes, Ordering::AcqRel);
        Self { to, waiting, image_bytes }
    }

    /// The image is written and its memory can be used for another one.
    pub fn give_back(&self, body: Vec<u8>) {
        let mut spare = self.waiting.spare();
        if is_large(body.capacity()) && spare.len() < SPARE_IMAGES_MAX {
            spare.push(body);
        }
    }

    /// Sends the answer. The place is free before the peer can know.
    pub fn send(self, answered: Answered) {
        let to = self.to.clone();
        drop(self);
        // The session may have ended: then nobody waits for it.
        let _ = to.send(answered);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        match self.image_bytes {
            0 => self.waiting.probes.fetch_sub(1, Ordering::AcqRel),
            bytes => self.waiting.image_bytes.fetch_sub(bytes, Ordering::AcqRel),
        };
    }
}

/// What the applier is told next.
#[derive(Debug)]
pub enum Given {
    /// Work.
    Work(Work),
    /// There is none.
    Nothing,
    /// Stop; what waits stays in the log.
    Closed,
}

/// The queue between lander and applier. Bounded by what is put in: memory by the arenas and the limits on images and
/// probes, entries without memory melt into one.
#[derive(Debug, Default)]
pub struct Queue {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    items: VecDeque<Work>,
    hurry: bool,
    closed: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts work at the end.
    pub fn push(&self, work: Work) {
        self.lock().items.push_back(work);
        self.changed.notify_one();
    }

    /// Frees the memory of everything that waits; the applier will read it from the log.
    pub fn spill(&self) {
        let mut inner = self.lock();
        let mut kept: VecDeque<Work> = VecDeque::with_capacity(inner.items.len());
        for work in std::mem::take(&mut inner.items) {
            let work = match work {
                Work::Landed(landed) => Work::Log { until: landed.entries_end() },
                other => other,
            };
            match (kept.back_mut(), work) {
                (Some(Work::Log { until }), Work::Log { until: later }) => *until = later,
                (_, work) => kept.push_back(work),
            }
        }
        inner.items = kept;
    }

    /// The next piece of work. Waits until `deadline` (`None`: for ever) if there is none.
    pub fn take(&self, deadline: Option<Instant>) -> Given {
        let mut inner = self.lock();
        loop {
            if inner.closed {
                return Given::Closed;
            }
            if let Some(work) = inner.items.pop_front() {
                return Given::Work(work);
            }
            if std::mem::take(&mut inner.hurry) {
                return Given::Nothing;
            }
            inner = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(left) if left.is_zero() => return Given::Nothing,
                Some(left) => self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// The image that comes next, if it is an image that does.
    pub fn take_image(&self) -> Option<(Vec<u8>, Answer)> {
        let mut inner = self.lock();
        match inner.items.pop_front() {
            Some(Work::Act(Action::Image(body, answer))) => Some((body, answer)),
            Some(other) => {
                inner.items.push_front(other);
                None
            }
            None => None,
        }
    }

    /// The probe that comes next, if it is a probe that does.
    pub fn take_probe(&self) -> Option<(Probe, Answer)> {
        let mut inner = self.lock();
        match inner.items.pop_front() {
            Some(Work::Act(Action::Probe(probe, answer))) => Some((probe, answer)),
            Some(other) => {
                inner.items.push_front(other);
                None
            }
            None => None,
        }
    }

    /// Somebody waits for what is here to be applied: the next take that finds nothing does not wait for more.
    pub fn hurry(&self) {
        self.lock().hurry = true;
        self.changed.notify_one();
    }

    /// Whether the applier is to stop.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.lock().items.is_empty()
    }

    /// The applier is to stop.
    pub fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        // Answers go with them: their sessions must not wait.
        inner.items.clear();
        drop(inner);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spilled_work_melts_and_keeps_its_order() {
        let queue = Queue::default();
        let landed = |offset| {
            Work::Landed(Landed {
                place: Place { segment: 1, offset },
                bytes: Bytes::from_static(&[0; 4096]),
                entry_bytes: 80,
            })
        };
        let (to, _answers) = mpsc::unbounded_channel();
        let waiting = Arc::new(Waiting::default());
        queue.push(landed(4096));
        queue.push(landed(8192));
        let probe = Probe { id: 1, volume: 0, offset: 0, length: 0, digests: Vec::new() };
        queue.push(Work::Act(Action::Probe(probe, Answer::for_probe(to, waiting.clone()))));
        queue.push(landed(12288));
        queue.spill();
        queue.push(landed(16384));
        let take = || queue.take(Some(Instant::now()));
        assert!(matches!(take(), Given::Work(Work::Log { until: Place { segment: 1, offset: 8272 } })));
        assert!(matches!(take(), Given::Work(Work::Act(Action::Probe(..)))));
        assert_eq!(waiting.probes.load(Ordering::Acquire), 0, "dropping it frees its place");
        assert!(matches!(take(), Given::Work(Work::Log { until: Place { segment: 1, offset: 12368 } })));
        assert!(matches!(take(), Given::Work(Work::Landed(_))));
        assert!(matches!(take(), Given::Nothing));
        queue.close();
        assert!(matches!(queue.take(None), Given::Closed));
    }
}
