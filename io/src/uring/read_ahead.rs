//! Reads that are waited for one by one, so that the disk always has something to do while the caller works on what came.
//!
//! Ownership: a buffer *belongs* to the queue from the start of its reads until [`ReadAhead::next`] gives it back, and no reference
//! to its bytes exists meanwhile. The queue does not end before the kernel has completed every request; if the queue is leaked,
//! so are its buffers.

use std::collections::VecDeque;
use std::ops::{DerefMut, Range};

use io_uring::IoUring;

use super::{Part, Verb, enter, entry, plan, ring};
use crate::aligned::{AlignedBuf, PooledBuf};
use crate::direct::DirectFile;
use crate::error::IoError;

mod sealed {
    /// Its bytes stay where they are when it is moved, and nobody else can reach them.
    pub trait Stable {}
}

/// A buffer that can be given to the kernel for a while.
pub trait OwnedBuf: DerefMut<Target = [u8]> + sealed::Stable {}

impl sealed::Stable for AlignedBuf {}
impl sealed::Stable for PooledBuf {}
impl OwnedBuf for AlignedBuf {}
impl OwnedBuf for PooledBuf {}

/// A file (an index into `files`), an offset in it, and the part of the buffer to fill from there.
pub type ReadInto = (usize, u64, Range<usize>);

/// Up to a fixed number of buffers that are being filled. `T` comes back with its buffer.
///
/// Everywhere `files` must be the same list. On a host without io_uring each read is done where it is started.
pub struct ReadAhead<B: OwnedBuf, T> {
    ring: Option<IoUring>,
    slots: Vec<Option<Slot<B, T>>>,
    /// Requests by the number that the kernel knows them by, with their slots.
    parts: Vec<Option<(usize, Part)>>,
    /// Numbers of requests that the kernel is to be given.
    queued: Vec<usize>,
    /// Requests that stand in the submission ring or in the kernel.
    in_flight: usize,
    /// Slots whose requests have all ended.
    ended: VecDeque<usize>,
}

struct Slot<B, T> {
    buf: B,
    tag: T,
    /// Requests that have not ended.
    left: usize,
    error: Option<IoError>,
}

impl<B: OwnedBuf, T> ReadAhead<B, T> {
    /// For up to `depth` buffers at once.
    ///
    /// # Errors
    /// As [`IoQueue::new`](super::IoQueue::new).
    pub fn new(depth: usize) -> Result<Self, IoError> {
        let mut new = Self::without_ring(depth);
        new.ring = ring(new.slots.len() as u32)?;
        Ok(new)
    }

    /// Each read is done where it is started.
    pub fn without_ring(depth: usize) -> Self {
        let slots = (0..depth.max(1)).map(|_| None).collect();
        let (parts, queued, ended) = Default::default();
        Self { ring: None, slots, parts, queued, in_flight: 0, ended }
    }

    /// Buffers that are here.
    pub fn len(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Whether no buffer is here.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether no other buffer can be taken.
    pub fn is_full(&self) -> bool {
        self.len() == self.slots.len()
    }

    /// Starts filling `buf`. What cannot be read is told when it is given back.
    ///
    /// # Panics
    /// If the queue [is full](Self::is_full), or a part is not within the buffer, or of no file.
    pub fn start(&mut self, files: &[&DirectFile], reads: &[ReadInto], mut buf: B, tag: T) {
        let number = self.slots.iter().position(Option::is_none).expect("asked to read ahead beyond the depth");
        // Before anything names its memory: a panic would take it away.
        assert!(reads.iter().all(|(file, _, range)| *file < files.len() && buf.get(range.clone()).is_some()));
        let (mut left, mut error) = (0, None);
        for (file, offset, range) in reads {
            let target = &mut buf[range.clone()];
            let result = if self.ring.is_none() {
                files[*file].read_exact_at(target, *offset)
            } else {
                let (address, len) = (target.as_mut_ptr().expose_provenance(), target.len());
                let (parts, queued) = (&mut self.parts, &mut self.queued);
                plan(Verb::Read, files, *file, *offset, address, len, |part| {
                    let free = parts.iter().position(Option::is_none);
                    let index = free.unwrap_or_else(|| {
                        parts.push(None);
                        parts.len() - 1
                    });
                    parts[index] = Some((number, part));
                    queued.push(index);
                    left += 1;
                })
            };
            error = error.or(result.err());
        }
        self.slots[number] = Some(Slot { buf, tag, left, error });
        if left == 0 {
            self.ended.push_back(number);
        }
        self.issue();
        if let Some(ring) = &mut self.ring {
            // From here on the kernel holds the files. What it does not take now is submitted again by `enter`, which looks at errors.
            let _ = ring.submit();
        }
    }

    /// Waits for one buffer; `None` if there is none. After an error its content is undefined (but initialised).
    pub fn next(&mut self, files: &[&DirectFile]) -> Option<(B, T, Result<(), IoError>)> {
        loop {
            if let Some(slot) = self.ended.pop_front().and_then(|number| self.slots[number].take()) {
                let Slot { buf, tag, error, .. } = slot;
                return Some((buf, tag, error.map_or(Ok(()), Err)));
            }
            self.issue();
            let ring = self.ring.as_mut().filter(|_| self.in_flight > 0)?;
            enter(ring, self.in_flight);
            self.reap(files);
        }
    }

    /// Gives the kernel as much as it takes.
    fn issue(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        while self.in_flight < self.slots.len()
            && let Some(index) = self.queued.pop()
        {
            let Some((_, part)) = &self.parts[index] else { continue };
            let entry = entry(Verb::Read, part).user_data(index as u64);
            // SAFETY: `entry` names bytes of a buffer in a slot (`start` took address and length from it, `done` never passes
            // `bytes`), whose memory does not move with it (`Stable`) and which nobody touches before its slot has ended, that
            // is before this request has; `Drop` waits for all. A descriptor that was closed meanwhile is an error, or reads
            // something else into memory that is ours.
            let pushed = unsafe { ring.submission().push(&entry) };
            // The ring has at least as many entries as there are slots and holds no more than `in_flight` of them.
            assert!(pushed.is_ok(), "the submission ring is full below its depth");
            self.in_flight += 1;
        }
    }

    /// Takes all completions that are there.
    fn reap(&mut self, files: &[&DirectFile]) {
        loop {
            let Some(completion) = self.ring.as_mut().and_then(|ring| ring.completion().next()) else { return };
            self.in_flight -= 1;
            let index = completion.user_data() as usize;
            let Some((number, part)) = &mut self.parts[index] else { continue };
            let (number, settled) = (*number, part.settle(Verb::Read, files[part.file], completion.result()));
            if let Ok(false) = settled {
                self.queued.push(index);
                continue;
            }
            self.parts[index] = None;
            let Some(slot) = &mut self.slots[number] else { continue };
            slot.left -= 1;
            slot.error = slot.error.take().or(settled.err());
            if slot.left == 0 {
                self.ended.push_back(number);
            }
        }
    }
}

impl<B: OwnedBuf, T> Drop for ReadAhead<B, T> {
    fn drop(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        // What stands in the submission ring cannot be taken back: it is submitted and waited for like the rest.
        while self.in_flight > 0 {
            enter(ring, self.in_flight);
            while ring.completion().next().is_some() {
                self.in_flight -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BufPool;

    const MIB: usize = 1 << 20;

    fn file(dir: &tempfile::TempDir, len: usize) -> (DirectFile, AlignedBuf) {
        let file = DirectFile::create_new(dir.path().join("f"), len as u64, 0o600).expect("file");
        let mut data = AlignedBuf::new(len.next_multiple_of(4096));
        for (n, piece) in data.chunks_mut(512).enumerate() {
            piece.fill((n * 7 + n / 100) as u8);
        }
        file.write_all_at(&data[..len], 0).expect("write");
        (file, data)
    }

    /// Whole and in pieces, up to an odd end: each buffer comes back once, with its tag and what the file holds.
    #[test]
    fn every_buffer_comes_back_with_its_bytes() {
        let dir = tempfile::TempDir::new_in("/var/tmp").expect("dir");
        let len = 8 * MIB + 3 * 4096 + 700;
        let (file, data) = file(&dir, len);
        for ring in [true, false] {
            let mut reads = if ring { ReadAhead::new(3).expect("ring") } else { ReadAhead::without_ring(3) };
            let pool = BufPool::new(3, 2 * MIB);
            let mut expected = std::collections::BTreeMap::new();
            let check = |reads: &mut ReadAhead<PooledBuf, usize>, expected: &mut std::collections::BTreeMap<_, _>| {
                let (buf, tag, result) = reads.next(&[&file]).expect("one is here");
                result.expect("read");
                let wanted: Vec<(u64, Range<usize>)> = expected.remove(&tag).expect("once");
                for (offset, range) in wanted {
                    let from = offset as usize;
                    assert!(buf[range.clone()] == data[from..from + range.len()], "tag {tag}, {range:?} from {offset}");
                }
            };
            for tag in 0..30 {
                while reads.is_full() {
                    check(&mut reads, &mut expected);
                }
                let at = (tag * 331 * 4096) % (7 * MIB) / 4096 * 4096;
                // Parts of a region with a hole between them, or up to the end; and sometimes nothing at all.
                let wanted: Vec<(u64, Range<usize>)> = match tag % 3 {
                    0 => vec![(at as u64, 0..4096), (at as u64 + 65536, 65536..65536 + MIB)],
                    1 => vec![((8 * MIB) as u64, 0..3 * 4096 + 700)],
                    _ => Vec::new(),
                };
                let parts: Vec<_> = wanted.iter().map(|(offset, range)| (0, *offset, range.clone())).collect();
                reads.start(&[&file], &parts, pool.take().expect("a buffer"), tag);
                expected.insert(tag, wanted);
            }
            while !reads.is_empty() {
                check(&mut reads, &mut expected);
            }
            assert!(expected.is_empty() && reads.next(&[&file]).is_none());
            assert_eq!(pool.available(), 3);
        }
    }

    #[test]
    fn what_cannot_be_read_comes_back_with_the_reason() {
        let dir = tempfile::TempDir::new_in("/var/tmp").expect("dir");
        let (file, data) = file(&dir, MIB);
        for ring in [true, false] {
            let mut reads = if ring { ReadAhead::new(2).expect("ring") } else { ReadAhead::without_ring(2) };
            reads.start(&[&file], &[(0, 0, 0..4096), (0, MIB as u64, 4096..8192)], AlignedBuf::new(2 * MIB), 1);
            reads.start(&[&file], &[(0, 0, 0..MIB)], AlignedBuf::new(MIB), 2);
            let mut seen = 0;
            while let Some((buf, tag, result)) = reads.next(&[&file]) {
                assert_eq!(result.is_err(), tag == 1, "{result:?}");
                assert!(tag == 1 || buf[..] == data[..]);
                seen += tag;
            }
            assert_eq!(seen, 3);
        }
    }

    /// What the kernel writes to has ended when the queue is gone: a pool's next user finds its bytes alone.
    #[test]
    fn dropped_it_waits_for_what_is_in_flight() {
        let dir = tempfile::TempDir::new_in("/var/tmp").expect("dir");
        let (file, _) = file(&dir, 8 * MIB);
        let pool = BufPool::new(8, MIB);
        let mut reads = ReadAhead::new(8).expect("ring");
        for n in 0..8 {
            reads.start(&[&file], &[(0, (n * MIB) as u64, 0..MIB)], pool.take().expect("a buffer"), ());
        }
        drop(reads);
        assert_eq!(pool.available(), 8);
        let mut all: Vec<_> = (0..8).map(|_| pool.take().expect("a buffer")).collect();
        all.iter_mut().for_each(|buf| buf.fill(9));
        assert!(all.iter().all(|buf| buf.iter().all(|byte| *byte == 9)));
    }
}
