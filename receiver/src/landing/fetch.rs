//! Single entries of the log, read while the applier works: whole, checked, decoded, and kept for a while, because what was
//! written together is often read together.

use super::Place;
use super::log::Log;
use crate::failure::Failure;
use crate::group::stream::frame_of;
use crate::limits::FETCHED_BYTES_MAX;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use varve_common::format::{BLOCK_BYTES, ENTRY_HEADER_BYTES, EntryHeader};
use varve_io::{AlignedBuf, IoError};

/// An entry's place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryPlace {
    /// Of its header.
    pub place: Place,
    /// Bytes of header and body.
    pub bytes: u32,
    /// Position of its first record, to know it by.
    pub position: u64,
}

/// See the module's text.
#[derive(Debug)]
pub struct Fetcher {
    log: Arc<Log>,
    kept: Mutex<Kept>,
}

/// The entries that were read last, the newest in front.
#[derive(Debug, Default)]
struct Kept {
    entries: VecDeque<(Place, Bytes)>,
    bytes: usize,
}

impl Fetcher {
    /// Of this log.
    pub fn new(log: Arc<Log>) -> Self {
        Self { log, kept: Mutex::default() }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The plain body of an entry. `None`: its segment was recycled, so it is applied.
    ///
    /// # Errors
    /// If it cannot be read, or is not what was landed.
    pub fn plain(&self, entry: EntryPlace) -> Result<Option<Bytes>, Failure> {
        if let Some(plain) = self.kept().get(entry.place) {
            return Ok(Some(plain));
        }
        let Some(segment) = self.log.segment(entry.place.segment) else { return Ok(None) };
        let begin = entry.place.offset / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
        let end = (entry.place.offset + u64::from(entry.bytes)).next_multiple_of(BLOCK_BYTES as u64);
        let mut block = AlignedBuf::new((end - begin) as usize);
        let read = segment.file().read_exact_at(&mut block, begin);
        let inner = (entry.place.offset - begin) as usize;
        let plain = read.map(|()| decode(&block[inner..inner + entry.bytes as usize], &entry));
        match plain {
            Ok(Some(plain)) => {
                self.kept().put(entry.place, plain.clone());
                Ok(Some(plain))
            }
            // Recycled while it was read.
            _ if self.log.segment(entry.place.segment).is_none() => Ok(None),
            Ok(None) => Err(Failure::damaged(format!("the landing log's entry at {:?} cannot be read", entry.place))),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Fills `target` from this offset of an entry's plain body. `false`: it is applied.
    ///
    /// # Errors
    /// As above, and if it is shorter.
    pub fn fill(&self, entry: EntryPlace, offset: u32, target: &mut [u8]) -> Result<bool, Failure> {
        let Some(plain) = self.plain(entry)? else { return Ok(false) };
        let content = plain.get(offset as usize..).and_then(|rest| rest.get(..target.len()));
        let content = content.ok_or_else(|| Failure::damaged("an entry of the landing log is shorter than it was"))?;
        target.copy_from_slice(content);
        Ok(true)
    }

    /// What was recycled is not read again: its memory goes.
    pub fn tidy(&self) {
        let mut kept = self.kept();
        kept.entries.retain(|(place, _)| self.log.segment(place.segment).is_some());
        kept.bytes = kept.entries.iter().map(|(_, plain)| plain.len()).sum();
    }
}

fn failed(error: &IoError) -> Failure {
    Failure::io("the landing log", error)
}

/// The plain body, if this is the entry that belongs here and it is as it was landed.
fn decode(bytes: &[u8], entry: &EntryPlace) -> Option<Bytes> {
    let header = EntryHeader::decode(bytes, entry.place.segment, entry.place.offset)?;
    if header.position.get() != entry.position {
        return None;
    }
    let body = bytes.get(ENTRY_HEADER_BYTES..)?.get(..header.body_bytes.get() as usize)?;
    let mut scratch = Vec::new();
    Some(Bytes::copy_from_slice(frame_of(&header)?.open(body, &mut scratch).ok()?))
}

impl Kept {
    fn get(&mut self, place: Place) -> Option<Bytes> {
        let at = self.entries.iter().position(|(have, _)| *have == place)?;
        let found = self.entries.remove(at)?;
        let plain = found.1.clone();
        self.entries.push_front(found);
        Some(plain)
    }

    fn put(&mut self, place: Place, plain: Bytes) {
        if self.entries.iter().any(|(have, _)| *have == place) {
            return;
        }
        self.bytes += plain.len();
        self.entries.push_front((place, plain));
        while self.bytes > FETCHED_BYTES_MAX {
            let Some((_, oldest)) = self.entries.pop_back() else { return };
            self.bytes -= oldest.len();
        }
    }
}
