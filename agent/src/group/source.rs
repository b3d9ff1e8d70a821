//! What the group's logic needs of a ring and of a volume's bitmaps: the kernel's in production, memory in tests.

use super::kept::Kept;
use varve_bpf::{Entry, Group, Ring, VolumeTrack};
use varve_common::problem::Problem;
use varve_common::record::RecordKind;

/// The stream of a group: the mapped ring.
pub trait Stream: Send + Sync {
    /// Position after the newest reserved record.
    fn producer(&self) -> u64;
    /// Position up to which space was given back.
    fn consumer(&self) -> u64;
    /// Size of the ring in bytes.
    fn capacity(&self) -> u64;
    /// Gives the space before `position` back to the kernel.
    fn release(&self, position: u64);
    /// The record at `position`; `None` if nothing was reserved there yet.
    fn entry(&self, position: u64) -> Option<Entry>;
    /// Copies committed bytes.
    fn copy_out(&self, position: u64, out: &mut [u8]);
}

/// The dirty regions of a volume and the writes under way to it.
pub trait Track: Send + Sync {
    /// Marks a region to be sent.
    fn set_dirty(&self, region: u64);
    /// Marks every region to be sent.
    fn set_all_dirty(&self);
    /// Takes the mark from a region; whether there was one.
    fn take_dirty(&self, region: u64) -> bool;
    /// A region whose mark was taken is equal in the replica, or marked again.
    fn set_finished(&self, region: u64);
    /// First marked region from `from` on.
    fn next_dirty(&self, from: u64) -> Option<u64>;
    /// Number of marked regions.
    fn dirty_count(&self) -> u64;
    /// Whether a write to the region (or to one that shares its counter) has not completed.
    fn in_flight(&self, region: u64) -> bool;
}

impl Stream for Ring {
    fn producer(&self) -> u64 {
        Ring::producer(self)
    }
    fn consumer(&self) -> u64 {
        Ring::consumer(self)
    }
    fn capacity(&self) -> u64 {
        Ring::capacity(self)
    }
    fn release(&self, position: u64) {
        Ring::release(self, position);
    }
    fn entry(&self, position: u64) -> Option<Entry> {
        Ring::entry(self, position)
    }
    fn copy_out(&self, position: u64, out: &mut [u8]) {
        Ring::copy_out(self, position, out);
    }
}

impl Track for VolumeTrack {
    fn set_dirty(&self, region: u64) {
        VolumeTrack::set_dirty(self, region);
    }
    fn set_all_dirty(&self) {
        VolumeTrack::set_all_dirty(self);
    }
    fn take_dirty(&self, region: u64) -> bool {
        VolumeTrack::take_dirty(self, region)
    }
    fn set_finished(&self, region: u64) {
        VolumeTrack::set_finished(self, region);
    }
    fn next_dirty(&self, from: u64) -> Option<u64> {
        VolumeTrack::next_dirty(self, from)
    }
    fn dirty_count(&self) -> u64 {
        VolumeTrack::dirty_count(self)
    }
    fn in_flight(&self, region: u64) -> bool {
        VolumeTrack::in_flight(self, region)
    }
}

/// Events that put something outside the stream: counters that only rise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Troubles {
    /// Writes that found the ring full.
    pub dropped: u64,
    /// Writes with a page that could not be read.
    pub unreadable: u64,
    /// Writes with no place to be tracked.
    pub untracked: u64,
    /// Writes that failed.
    pub failed: u64,
    /// Writes across the volume's boundary.
    pub straddling: u64,
    /// Writes from before capture began that completed since.
    pub late: u64,
    /// Such writes whose place is not known.
    pub late_unknown: u64,
    /// Passthrough commands.
    pub passthrough: u64,
    /// Writes that found a volume's device in another size.
    pub resized: u64,
}

/// What capture gives for a group: its stream, its volumes' bitmaps, its events.
pub trait Source: Send + Sync {
    /// The ring.
    fn stream(&self) -> &dyn Stream;
    /// The bitmaps of volume `number`.
    fn track(&self, number: usize) -> &dyn Track;
    /// Number of volumes.
    fn volumes(&self) -> usize;
    /// Puts a record that is no write into the stream.
    fn mark(&self, kind: RecordKind, payload: &[u8]) -> Result<(), Problem>;
    /// The counters of trouble.
    fn troubles(&self) -> Troubles;
    /// Captured records and bytes.
    fn captured(&self) -> (u64, u64);
    /// Position before the first write since the last call that is not in the stream.
    fn take_first_drop(&self) -> Option<u64>;
    /// Whether writes from before capture began are known to have completed.
    fn settled(&self) -> bool;
    /// Sets what is added to the boot-time clock.
    fn set_time_offset(&self, ns: u64);
    /// What is added to it.
    fn time_offset(&self) -> u64;
    /// What an earlier worker of this ring left; `None`: it is new.
    fn kept(&self) -> Option<Kept>;
    /// Leaves it for the next one.
    fn keep(&self, kept: &Kept);
}

impl Source for Group {
    fn stream(&self) -> &dyn Stream {
        self.ring()
    }
    fn track(&self, number: usize) -> &dyn Track {
        &self.volumes()[number]
    }
    fn volumes(&self) -> usize {
        Group::volumes(self).len()
    }
    fn mark(&self, kind: RecordKind, payload: &[u8]) -> Result<(), Problem> {
        Group::mark(self, kind, 0, 0, payload).map_err(|error| {
            Problem::failed("no mark could be put into the stream", error.to_string(), error.hint().to_owned())
        })
    }
    fn troubles(&self) -> Troubles {
        let counters = self.counters();
        Troubles {
            dropped: counters.dropped_records,
            unreadable: counters.unreadable,
            untracked: counters.untracked,
            failed: counters.failed_writes,
            straddling: counters.straddling,
            late: counters.late,
            late_unknown: counters.late_unknown,
            passthrough: counters.passthrough,
            resized: counters.resized,
        }
    }
    fn captured(&self) -> (u64, u64) {
        let counters = self.counters();
        (counters.captured_records, counters.captured_bytes)
    }
    fn take_first_drop(&self) -> Option<u64> {
        Group::take_first_drop(self)
    }
    fn settled(&self) -> bool {
        match self.poll_settled() {
            Ok(settled) => settled,
            Err(error) => {
                tracing::error!(%error, "cannot tell whether old writes have completed");
                false
            }
        }
    }
    fn set_time_offset(&self, ns: u64) {
        Group::set_time_offset(self, ns);
    }
    fn time_offset(&self) -> u64 {
        Group::time_offset(self)
    }
    fn kept(&self) -> Option<Kept> {
        Kept::decode(&self.note())
    }
    fn keep(&self, kept: &Kept) {
        self.set_note(&kept.encode());
    }
}

/// Regions that wait to be sent, over all volumes.
pub fn dirty_regions(source: &dyn Source) -> u64 {
    (0..source.volumes()).map(|number| source.track(number).dirty_count()).sum()
}

/// Marks everything to be sent.
pub fn set_all_dirty(source: &dyn Source) {
    for number in 0..source.volumes() {
        source.track(number).set_all_dirty();
    }
}
