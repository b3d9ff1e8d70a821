//! What a group's journal holds after a stop or a crash.

use super::index::{ChunkRef, Index};
use super::segment::Segments;
use varve_common::format::BLOCK_BYTES;
use varve_common::format::journal::{CHUNK_TOTAL_BYTES_MAX, Candidate, End, Verdict, decide, look};
use varve_io::{AlignedBuf, IoError};

/// See the module's text.
#[derive(Debug, Default)]
pub struct Recovered {
    /// What is there.
    pub index: Index,
    /// Behind the newest chunk.
    pub end: Option<End>,
    /// Why the journal ends although more was written.
    pub damage: Option<String>,
}

/// Reads every chunk. What does not belong to the journal any more is not kept as a segment in use by the caller: it
/// recycles what lies before the index, and what is written later goes into a new segment.
///
/// # Errors
/// If a segment cannot be read.
pub fn recover(segments: &Segments) -> Result<Recovered, IoError> {
    let mut found = Recovered::default();
    let mut buf = AlignedBuf::new(CHUNK_TOTAL_BYTES_MAX);
    'segments: for (segment, header) in segments.live() {
        let mut offset = BLOCK_BYTES as u64;
        let mut candidate = Candidate::NextSegment;
        loop {
            let left = segment.bytes().saturating_sub(offset);
            let len = left.min(CHUNK_TOTAL_BYTES_MAX as u64) as usize / BLOCK_BYTES * BLOCK_BYTES;
            if len == 0 {
                break;
            }
            segment.file().read_exact_at(&mut buf[..len], offset)?;
            let (facts, chunk) = look(header, offset, &buf[..len], found.end);
            let (letter, why, verdict) = decide(candidate, facts);
            match (verdict, chunk) {
                (Verdict::Take | Verdict::Restart, Some(chunk)) => {
                    if verdict == Verdict::Restart {
                        found.index.clear();
                    }
                    found.end = Some(End {
                        chain: chunk.header.header_crc.get(),
                        position: chunk.header.end(),
                        incarnation: chunk.header.incarnation,
                    });
                    found.index.push(ChunkRef::from(chunk));
                    offset += chunk.header.total_bytes() as u64;
                    candidate = Candidate::Adjacent;
                }
                (Verdict::Damaged, _) => {
                    let sequence = header.sequence.get();
                    found.damage = Some(format!("case {letter} in segment {sequence} at offset {offset}: {why}"));
                    break 'segments;
                }
                (Verdict::Elsewhere | Verdict::Take | Verdict::Restart, _) => break,
            }
        }
    }
    Ok(found)
}
