//! A volume of a promoted group as a disk.

use super::backlog::Backlog;
use super::writer::StreamWriter;
use crate::limits::{PROMOTED_READERS_MAX, PROMOTED_RETRIES_MAX, VIEW_READ_BYTES};
use crate::view::volume::ViewVolume;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use varve_common::format::BLOCK_BYTES;
use varve_export::disk::{Disk, Stretch};
use varve_io::{AlignedBuf, DirectFile, IoError};
use varve_timeline::timeline::Timeline;

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Read at once.
const PIECE_BYTES: usize = VIEW_READ_BYTES - 2 * BLOCK_BYTES;

/// What is pending, over what was landed before and is not applied, over the replica; until the replica is rolled back to the
/// point, over a view of the point.
#[derive(Debug)]
pub struct PromotedVolume {
    writer: Arc<StreamWriter>,
    backlog: Arc<Backlog>,
    timeline: Arc<Timeline>,
    /// As it was when the volume was made. Changes if the group failed and was opened again: what is pending is not known
    /// any more then, and the replica is older than it was.
    setbacks: u64,
    point: Arc<ViewVolume>,
    replica: DirectFile,
    volume: u16,
    bytes: u64,
    /// The replica is at the point or beyond.
    rolled: Arc<AtomicBool>,
    bufs: Mutex<Vec<AlignedBuf>>,
}

impl PromotedVolume {
    /// `point` is the same volume at the point that was taken.
    pub fn new(
        writer: Arc<StreamWriter>,
        backlog: Arc<Backlog>,
        timeline: Arc<Timeline>,
        point: Arc<ViewVolume>,
        replica: DirectFile,
        volume: u16,
        rolled: Arc<AtomicBool>,
    ) -> Self {
        let (bytes, setbacks) = (point.len(), timeline.setbacks());
        Self { writer, backlog, timeline, setbacks, point, replica, volume, bytes, rolled, bufs: Mutex::default() }
    }

    fn read_piece(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        for _ in 0..PROMOTED_RETRIES_MAX {
            if self.read_once(buf, offset)? {
                return Ok(());
            }
        }
        Err(failed("what it is about to read from the landing log is applied, again and again"))
    }

    /// `false`: something that was to be read from the landing log is in the replica now.
    fn read_once(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        let end = offset + buf.len() as u64;
        // In this order: what is not pending any more when it is asked for is in the replica, then the backlog is over and the
        // replica is rolled; and what of the backlog is applied when that is asked for is in the replica.
        let patches = self.writer.patches(self.volume, offset, end);
        let covered = self.backlog.covered(self.volume, offset, end);
        if self.rolled.load(Ordering::SeqCst) {
            self.read_replica(buf, offset).map_err(|e| failed(&e.chain()))?;
        } else {
            self.point.read_beneath(buf, offset).map_err(|e| failed(&e.to_string()))?;
        }
        for part in covered {
            let target = &mut buf[(part.range.start - offset) as usize..(part.range.end - offset) as usize];
            if !self.backlog.fill(&part, target).map_err(|failure| failed(&failure.text))? {
                return Ok(false);
            }
        }
        for patch in patches {
            let target = &mut buf[(patch.start - offset) as usize..(patch.end - offset) as usize];
            if !self.writer.fill(&patch.content, target).map_err(|failure| failed(&failure.text))? {
                return Ok(false);
            }
        }
        if self.timeline.setbacks() != self.setbacks {
            return Err(failed("the group failed and was opened again: its volumes are to be served anew"));
        }
        Ok(true)
    }

    fn read_replica(&self, buf: &mut [u8], offset: u64) -> Result<(), IoError> {
        let kept = self.bufs.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut memory = kept.unwrap_or_else(|| AlignedBuf::new(VIEW_READ_BYTES));
        let start = offset / BLOCK * BLOCK;
        let end = (offset + buf.len() as u64).next_multiple_of(BLOCK).min(self.replica.len());
        let bytes = &mut memory[..(end - start) as usize];
        self.replica.read_exact_at(bytes, start)?;
        let from = (offset - start) as usize;
        buf.copy_from_slice(&bytes[from..from + buf.len()]);
        let mut bufs = self.bufs.lock().unwrap_or_else(PoisonError::into_inner);
        if bufs.len() < PROMOTED_READERS_MAX {
            bufs.push(memory);
        }
        Ok(())
    }
}

fn failed(why: &str) -> io::Error {
    tracing::error!(why, "a read of a promoted volume failed");
    io::Error::from_raw_os_error(nix::libc::EIO)
}

impl Disk for PromotedVolume {
    fn len(&self) -> u64 {
        self.bytes
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for piece in buf.chunks_mut(PIECE_BYTES) {
            self.read_piece(piece, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.writer.write(self.volume, offset, buf)
    }

    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.writer.zero(self.volume, offset, len, may_unmap)
    }

    fn flush(&self) -> io::Result<()> {
        self.writer.flush()
    }

    fn stretch(&self, offset: u64, len: u64) -> io::Result<Stretch> {
        Ok(Stretch { len: len.min(self.bytes - offset), hole: false })
    }
}
