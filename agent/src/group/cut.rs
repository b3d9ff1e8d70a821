//! Walking the ring: where records end, where a frame may end, how old the oldest unsent write is.

use super::source::Stream;
use varve_bpf::Entry;
use varve_common::record::{RecordHeader, RecordKind};

/// What [`walk`] met.
pub enum Met {
    /// A record, with the position after it.
    Record {
        /// Start of the record, its ring header included.
        position: u64,
        /// Start of the next.
        end: u64,
        /// Its fixed part.
        header: RecordHeader,
    },
}

/// Calls `met` for every committed record in `[from, until)`, at most `bytes_max` bytes of them (at least one record).
/// Returns the position reached: before `until` if a record there is not committed yet.
pub fn walk(stream: &dyn Stream, from: u64, until: u64, bytes_max: u64, mut met: impl FnMut(Met)) -> u64 {
    let mut at = from;
    while at < until && at - from < bytes_max {
        match stream.entry(at) {
            Some(Entry::Record { bytes, header }) => {
                met(Met::Record { position: at, end: at + bytes, header });
                at += bytes;
            }
            Some(Entry::Discarded { bytes }) => at += bytes,
            Some(Entry::Busy) | None => break,
        }
    }
    at
}

/// Where a frame that starts at `from` ends: at a record boundary, at most `until`, at most `bytes_max` long unless its
/// first record alone is longer. `[from, until)` was walked before, so everything in it is committed.
pub fn cut(stream: &dyn Stream, from: u64, until: u64, bytes_max: u64) -> u64 {
    let mut at = from;
    while at < until {
        let bytes = match stream.entry(at) {
            Some(Entry::Record { bytes, .. } | Entry::Discarded { bytes }) => bytes,
            Some(Entry::Busy) | None => break,
        };
        if at > from && at + bytes - from > bytes_max {
            break;
        }
        at += bytes;
    }
    at
}

/// Records that the search for the oldest write looks at: a day of canaries.
const OLDEST_RECORDS_MAX: usize = 100_000;

/// Time of the oldest record at or after `durable` that a writer caused. `None`: there is none, the group is idle.
pub fn oldest_write_ns(stream: &dyn Stream, durable: u64) -> Option<u64> {
    let until = stream.producer();
    let mut at = durable.max(stream.consumer());
    for _ in 0..OLDEST_RECORDS_MAX {
        if at >= until {
            return None;
        }
        match stream.entry(at) {
            Some(Entry::Record { bytes, header }) => {
                if RecordKind::from_number(header.kind).is_some_and(RecordKind::changes_data) {
                    return Some(header.time_ns.get());
                }
                at += bytes;
            }
            Some(Entry::Discarded { bytes }) => at += bytes,
            Some(Entry::Busy) | None => return None,
        }
    }
    None
}
