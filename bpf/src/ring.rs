//! The consumer's side of a group's ring, over the kernel's own pages.
//!
//! A ring map is mapped as: one page with the consumer's position (ours to write), one page with the producer's
//! position, then the data *twice*, so that a record which wraps around is linear in memory. Positions are byte
//! offsets since the ring was made and never wrap.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use varve_common::record::{RING_BUSY_BIT, RING_DISCARD_BIT, RING_HEADER_BYTES, RecordHeader};
use zerocopy::{FromZeros, IntoBytes};

use crate::memory::{Mapping, PAGE_BYTES};

/// What stands at a position. `bytes` is the way to the next entry: ring header, record and padding.
#[derive(Clone, Copy, Debug)]
pub enum Entry {
    /// The producer is still writing; look again later.
    Busy,
    /// The producer gave it up: the bytes stand for nothing.
    Discarded {
        /// Padded length with the ring header.
        bytes: u64,
    },
    /// A record.
    Record {
        /// Padded length with the ring header.
        bytes: u64,
        /// Its fixed part. The payload follows it: `position + 8 + 32`.
        header: RecordHeader,
    },
}

/// A group's ring. One consumer at a time may call [`Ring::release`]; everything else may be called by anybody.
pub struct Ring {
    consumer: Mapping,
    /// The producer's page, then the data twice.
    producer: Mapping,
    capacity: u64,
}

impl Ring {
    pub(crate) fn new(map: &impl AsFd, capacity: u32) -> io::Result<Self> {
        assert!(capacity.is_power_of_two() && (capacity as usize).is_multiple_of(PAGE_BYTES));
        Ok(Self {
            consumer: Mapping::new(map.as_fd(), 0, PAGE_BYTES, true)?,
            producer: Mapping::new(map.as_fd(), PAGE_BYTES, PAGE_BYTES + 2 * capacity as usize, false)?,
            capacity: u64::from(capacity),
        })
    }

    /// Bytes that the ring holds.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The position behind the newest entry. Entries before it are reserved, not necessarily complete.
    pub fn producer(&self) -> u64 {
        // SAFETY: the first word of the producer's page is its position; the page lives as long as `self`. It is
        // mapped read-only, and a load does not write.
        let position = unsafe { &*self.producer.start().cast::<AtomicU64>() };
        position.load(Ordering::Acquire)
    }

    /// The position up to which the consumer has released.
    pub fn consumer(&self) -> u64 {
        self.consumer_position().load(Ordering::Acquire)
    }

    fn consumer_position(&self) -> &AtomicU64 {
        // SAFETY: the first word of the consumer's page is its position; the page lives as long as `self`.
        unsafe { &*self.consumer.start().cast::<AtomicU64>() }
    }

    /// Gives everything before `position` back to the producer.
    ///
    /// # Panics
    /// If `position` is not between the consumer's and the producer's position.
    pub fn release(&self, position: u64) {
        let from = self.consumer();
        assert!(position >= from, "the ring cannot go back from {from} to {position}");
        let producer = self.producer();
        assert!(position <= producer, "cannot release up to {position}, the producer is at {producer}");
        self.consumer_position().store(position, Ordering::Release);
    }

    /// What stands at `position`, which must be the start of an entry; `None` if nothing does yet.
    ///
    /// # Panics
    /// If `position` is misaligned or was released already.
    pub fn entry(&self, position: u64) -> Option<Entry> {
        if position >= self.producer() {
            return None;
        }
        self.check(position);
        // SAFETY: inside the data (checked), aligned to 8; the producer changes this word only by atomic exchange.
        let length = unsafe { &*self.data(position).cast::<AtomicU32>() }.load(Ordering::Acquire);
        if length & RING_BUSY_BIT != 0 {
            return Some(Entry::Busy);
        }
        let payload = u64::from(length & !RING_DISCARD_BIT);
        let bytes = (payload + RING_HEADER_BYTES).next_multiple_of(8);
        if length & RING_DISCARD_BIT != 0 {
            return Some(Entry::Discarded { bytes });
        }
        assert!(payload >= size_of::<RecordHeader>() as u64, "a record of {payload} bytes at {position}");
        let mut header = RecordHeader::new_zeroed();
        self.copy(position + RING_HEADER_BYTES, header.as_mut_bytes());
        Some(Entry::Record { bytes, header })
    }

    /// Copies committed bytes from `position` on.
    ///
    /// # Panics
    /// If the range is not between the consumer's and the producer's position.
    pub fn copy_out(&self, position: u64, out: &mut [u8]) {
        self.check(position);
        let end = position + out.len() as u64;
        let producer = self.producer();
        assert!(end <= producer, "bytes up to {end} wanted, the producer is at {producer}");
        self.copy(position, out);
    }

    /// Address of the bytes at `position`, linear for [`Ring::capacity`] bytes, for I/O that reads them in place.
    /// They stay unchanged until they are released, if the entries are committed. Valid as long as the ring is.
    pub fn address(&self, position: u64) -> *const u8 {
        self.data(position)
    }

    fn check(&self, position: u64) {
        assert!(position.is_multiple_of(8), "misaligned position {position}");
        let consumer = self.consumer();
        assert!(position >= consumer, "position {position} was released (consumer is at {consumer})");
    }

    fn data(&self, position: u64) -> *const u8 {
        let at = (position & (self.capacity - 1)) as usize;
        debug_assert!(PAGE_BYTES + at < self.producer.bytes());
        // SAFETY: `at` < capacity, and the mapping holds a page and twice the capacity.
        unsafe { self.producer.start().add(PAGE_BYTES + at) }
    }

    fn copy(&self, position: u64, out: &mut [u8]) {
        assert!(out.len() as u64 <= self.capacity);
        // SAFETY: the source is linear for `capacity` bytes (double mapping). Committed bytes do not change until they
        // are released, and the callers hold positions between consumer and producer. `out` is ours alone.
        unsafe { std::ptr::copy_nonoverlapping(self.data(position), out.as_mut_ptr(), out.len()) }
    }
}
