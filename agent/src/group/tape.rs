//! The group's ring as the journal and the sender see it, while acknowledgements and the journal give its space back.

use super::shared::GroupShared;
use crate::journal::{Journal, Taken, Tape};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use varve_bpf::Entry;
use varve_common::record::RecordKind;

impl GroupShared {
    /// Until this is dropped, nobody gives the ring's space back.
    pub fn hold_ring(&self) -> MutexGuard<'_, ()> {
        self.releasing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The group's journal, if it has one.
    pub fn journal(&self) -> Option<&Arc<Journal>> {
        self.journal.get()
    }

    /// The journal was opened. What is in it is not known to be durable at the receiver.
    pub fn set_journal(&self, journal: Arc<Journal>) {
        if let Some((start, _)) = journal.range() {
            self.durable.store(start, Ordering::Release);
        }
        // There is one worker, and it sets it once.
        let _ = self.journal.set(journal);
    }

    /// Oldest position that can still be sent.
    pub fn oldest(&self) -> u64 {
        let _held = self.hold_ring();
        let journaled = self.journal().and_then(|journal| journal.range());
        journaled.map_or_else(|| self.source.stream().consumer(), |(start, _)| start)
    }

    /// Whatever the journal holds is of no use; gives the position at which the ring begins.
    pub fn forget_journal(&self) -> u64 {
        let _held = self.hold_ring();
        if let Some(journal) = self.journal() {
            journal.discard();
        }
        self.source.stream().consumer()
    }
}

impl Tape for GroupShared {
    fn extent(&self) -> (u64, u64, u64) {
        let stream = self.source.stream();
        // The consumer first: it never passes a producer that is read later.
        let consumer = stream.consumer();
        (consumer, stream.producer(), stream.capacity())
    }

    fn take(&self, from: Option<u64>, until: u64, out: &mut [u8]) -> Taken {
        let _held = self.hold_ring();
        let stream = self.source.stream();
        let consumer = stream.consumer();
        let from = from.unwrap_or(consumer);
        if from < consumer {
            return Taken::Moved;
        }
        let (mut at, mut first_write_ns) = (from, None);
        while at < until {
            let (bytes, time_ns) = match stream.entry(at) {
                Some(Entry::Record { bytes, header }) => {
                    let changes = RecordKind::from_number(header.kind).is_some_and(RecordKind::changes_data);
                    (bytes, changes.then(|| header.time_ns.get()))
                }
                Some(Entry::Discarded { bytes }) => (bytes, None),
                Some(Entry::Busy) | None => break,
            };
            if at + bytes - from > out.len() as u64 {
                if at == from {
                    return Taken::NoRoom;
                }
                break;
            }
            first_write_ns = first_write_ns.or(time_ns);
            at += bytes;
        }
        if at == from {
            return Taken::Nothing;
        }
        stream.copy_out(from, &mut out[..(at - from) as usize]);
        Taken::Bytes { from, end: at, first_write_ns }
    }

    fn synced(&self, end: u64, keep: &mut dyn FnMut(u64) -> bool) {
        let _held = self.hold_ring();
        let stream = self.source.stream();
        if keep(self.durable.load(Ordering::Acquire)) && end > stream.consumer() {
            stream.release(end);
        }
    }

    fn settle(&self) {
        self.release(self.durable.load(Ordering::Acquire));
    }
}
