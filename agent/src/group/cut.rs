//! Walking the ring: where records end, where a frame may end, how old the oldest unsent write is.

use super::source::Stream;
use varve_bpf::Entry;
use varve_common::clock::is_step;
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
/// first record alone is longer, and before the clock was set. `[from, until)` was walked before, so everything in it is
/// committed.
pub fn cut(stream: &dyn Stream, from: u64, until: u64, bytes_max: u64) -> u64 {
    let (mut at, mut before_ns) = (from, None);
    while at < until {
        let (bytes, time_ns) = match stream.entry(at) {
            Some(Entry::Record { bytes, header }) => (bytes, Some(header.time_ns.get())),
            Some(Entry::Discarded { bytes }) => (bytes, None),
            Some(Entry::Busy) | None => break,
        };
        let clock_set = before_ns.zip(time_ns).is_some_and(|(before, then)| is_step(before, then));
        if at > from && at + bytes - from > bytes_max || clock_set {
            break;
        }
        before_ns = time_ns.or(before_ns);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::played::PlayedStream;
    use crate::journal::Chunk;
    use varve_common::format::journal::CHUNK_HEADER_BYTES;
    use varve_io::AlignedBuf;

    /// Out of the ring as out of the journal: a frame ends before the clock was set, back or on, and at no smaller step.
    #[test]
    fn a_frame_ends_where_the_clock_was_set() {
        let stream = PlayedStream::default();
        let times = [100, 101, 96, 3600, 3601, 3606, 40, 40, 3600];
        let mut starts = Vec::new();
        for (index, second) in times.iter().enumerate() {
            let payload = vec![1; 8 + index];
            starts.push(stream.append_dated(RecordKind::Write, 0, &payload, second * 1_000_000_000));
        }
        let end = stream.producer();
        let mut buf = AlignedBuf::new((CHUNK_HEADER_BYTES + end as usize).next_multiple_of(4096));
        stream.copy_out(0, &mut buf[CHUNK_HEADER_BYTES..][..end as usize]);
        let chunk = Chunk::new(0, end, buf);
        let (mut at, mut ends) = (0, Vec::new());
        while at < end {
            let next = cut(&stream, at, end, 1 << 20);
            assert_eq!(chunk.cut(at, end, 1 << 20), Some(next));
            ends.push(next);
            at = next;
        }
        assert_eq!(ends, [starts[3], starts[6], starts[8], end]);
        assert_eq!(cut(&stream, 0, end, 1), starts[1], "a record at least");
        assert_eq!(cut(&stream, starts[3], starts[5], 1 << 20), starts[5], "no further than was asked");
    }
}
