//! The thread that writes the landing log. One batch at a time, so durable means everything before, too; while one is
//! written the next one fills.

use super::batch::{Batch, Effect, Item};
use super::log::Writer;
use crate::apply::work::{Landed, Queue, Work};
use crate::failure::Failure;
use crate::group::live::Live;
use crate::group::stream::StreamState;
use crate::limits::SEGMENTS_PREPARED;
use bytes::Bytes;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};

/// Everything that the thread owns.
pub struct Lander {
    /// Shared with the session and the status.
    pub live: Arc<Live>,
    /// To the applier.
    pub queue: Arc<Queue>,
    /// The end of the log.
    pub writer: Writer,
    /// The stream's state there.
    pub state: StreamState,
}

impl Lander {
    /// Works until the sender is gone or something fails; the reason then stands in the group's state. Nothing is
    /// written after a failure: what is on disk then is only known after the log was opened anew.
    pub fn run(mut self, batches: mpsc::Receiver<Batch>) {
        self.writer.log().prepare(SEGMENTS_PREPARED);
        for batch in batches {
            if let Err(failure) = self.land(batch) {
                self.live.fail(failure);
                return;
            }
        }
    }

    /// Makes a batch durable and hands it on.
    pub fn land(&mut self, mut batch: Batch) -> Result<(), Failure> {
        let stored = batch.entry_bytes;
        let state = self.state_after(&batch)?;
        let place = match stored {
            0 => None,
            _ => {
                let entries = batch.items.iter().filter_map(|item| match item {
                    Item::Entry(entry) => Some(entry),
                    Item::Act(_) => None,
                });
                Some(self.writer.append(&mut batch.bytes, entries)?)
            }
        };
        self.state = state;
        let counters = &self.live.counters;
        counters.landed_batches.fetch_add(1, Ordering::Relaxed);
        counters.landed_bytes.fetch_add(stored as u64, Ordering::Relaxed);
        self.hand_on(place, batch.bytes.freeze(), batch.items, stored);
        self.live.landed(self.state, place);
        Ok(())
    }

    /// Whoever writes to the stream checks what it adds. What does not continue it all the same must not be acknowledged: after a
    /// restart the log would end before it.
    fn state_after(&self, batch: &Batch) -> Result<StreamState, Failure> {
        let mut state = self.state;
        for entry in batch.entries() {
            let follows = match &entry.effect {
                Effect::Data { .. } => entry.incarnation == state.at.incarnation && entry.position == state.at.position,
                Effect::Mark(mark) => state.admits(mark),
            };
            if !follows {
                let at = state.at.position;
                return Err(Failure::damaged(format!(
                    "an entry at position {} does not continue the stream, which is at {at}: it was not landed",
                    entry.position
                )));
            }
            state.pass(&entry.effect);
        }
        Ok(state)
    }

    /// Gives the applier everything in the order in which it came: entries in pieces between the actions.
    fn hand_on(&self, place: Option<super::Place>, bytes: Bytes, items: Vec<Item>, stored: usize) {
        let mut from = 0;
        let piece = |from: usize, to: usize, last: bool| {
            let Some(place) = place.filter(|_| from < to) else { return };
            let end = if last { bytes.len() } else { to };
            self.queue.push(Work::Landed(Landed {
                place: super::Place { offset: place.offset + from as u64, ..place },
                bytes: bytes.slice(from..end),
                entry_bytes: to - from,
            }));
        };
        let mut seen = 0;
        for item in items {
            match item {
                Item::Entry(entry) => seen = entry.at + entry.total_bytes(),
                Item::Act(action) => {
                    piece(from, seen, false);
                    from = seen;
                    self.queue.push(Work::Act(action));
                }
            }
        }
        piece(from, stored, true);
    }
}
