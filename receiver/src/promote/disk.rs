//! A volume of a promoted group as a disk.

use super::writer::StreamWriter;
use crate::limits::{PROMOTED_READERS_MAX, VIEW_READ_BYTES};
use crate::view::volume::ViewVolume;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use varve_common::format::BLOCK_BYTES;
use varve_export::disk::{Disk, Stretch};
use varve_io::{AlignedBuf, DirectFile, IoError};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Read at once.
const PIECE_BYTES: usize = VIEW_READ_BYTES - 2 * BLOCK_BYTES;

/// What is pending, over the replica; while the replica is being rolled back to the point, over a view of the point.
#[derive(Debug)]
pub struct PromotedVolume {
    writer: Arc<StreamWriter>,
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
        point: Arc<ViewVolume>,
        replica: DirectFile,
        volume: u16,
        rolled: Arc<AtomicBool>,
    ) -> Self {
        let bytes = point.len();
        Self { writer, point, replica, volume, bytes, rolled, bufs: Mutex::default() }
    }

    fn read_piece(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        // In this order: what is not pending any more when it is asked for is in the replica, and then the replica is rolled.
        let patches = self.writer.patches(self.volume, offset, end);
        if self.rolled.load(Ordering::SeqCst) {
            self.read_replica(buf, offset).map_err(|e| failed(&e.chain()))?;
        } else {
            self.point.read_point(buf, offset).map_err(|e| failed(&e.to_string()))?;
        }
        for patch in patches {
            let target = &mut buf[(patch.start - offset) as usize..(patch.end - offset) as usize];
            match patch.bytes {
                Some(bytes) => target.copy_from_slice(&bytes),
                None => target.fill(0),
            }
        }
        Ok(())
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
