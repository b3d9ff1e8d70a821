//! What a group's journal holds after a stop or a crash.

use super::index::{ChunkRef, Index};
use super::segment::{Segment, Segments};
use std::sync::Arc;
use varve_common::format::BLOCK_BYTES;
use varve_common::format::journal::{
    CHUNK_TOTAL_BYTES_MAX, Candidate, ChunkHeader, End, Facts, Found, JournalSegmentHeader, Verdict, decide, look, peek,
};
use varve_common::wire::messages::Incarnation;
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
    /// Headers of chunks that were torn: to be wiped before anything is written.
    pub torn: Vec<(Arc<Segment>, u64)>,
}

impl Recovered {
    fn take(&mut self, chunk: Found, verdict: Verdict) {
        if verdict == Verdict::Restart {
            self.index.clear();
        }
        self.end = Some(End {
            chain: chunk.header.header_crc.get(),
            position: chunk.header.end(),
            incarnation: chunk.header.incarnation,
        });
        self.index.push(ChunkRef::from(chunk));
    }
}

/// Looks at every chunk. `synced`: a ring and where it begins; of its chunks before that position only the headers are
/// read, because the ring is released after the sync. What is there is checked again when it is sent.
///
/// # Errors
/// If a segment cannot be read.
pub fn recover(segments: &Segments, synced: (Incarnation, u64)) -> Result<Recovered, IoError> {
    let mut found = Recovered::default();
    let mut buf = AlignedBuf::new(CHUNK_TOTAL_BYTES_MAX);
    'segments: for (segment, header) in segments.live() {
        let mut offset = BLOCK_BYTES as u64;
        let mut candidate = Candidate::NextSegment;
        while segment.bytes().saturating_sub(offset) >= BLOCK_BYTES as u64 {
            let (facts, chunk) = see(segment, header, offset, &mut buf, found.end, synced)?;
            let (letter, why, verdict) = decide(candidate, facts);
            match (verdict, chunk) {
                (Verdict::Take | Verdict::Restart, Some(chunk)) => {
                    found.take(chunk, verdict);
                    offset += chunk.header.total_bytes() as u64;
                    candidate = Candidate::Adjacent;
                }
                (Verdict::Damaged, _) => {
                    let sequence = header.sequence.get();
                    found.damage = Some(format!("case {letter} in segment {sequence} at offset {offset}: {why}"));
                    break 'segments;
                }
                (Verdict::Elsewhere | Verdict::Take | Verdict::Restart, _) => {
                    if facts.header {
                        found.torn.push((segment.clone(), offset));
                    }
                    break;
                }
            }
        }
    }
    Ok(found)
}

/// The facts about one place.
fn see(
    segment: &Segment,
    header: &JournalSegmentHeader,
    offset: u64,
    buf: &mut AlignedBuf,
    before: Option<End>,
    (incarnation, begin): (Incarnation, u64),
) -> Result<(Facts, Option<Found>), IoError> {
    let left = segment.bytes() - offset;
    segment.file().read_exact_at(&mut buf[..BLOCK_BYTES], offset)?;
    let Some(chunk) = ChunkHeader::decode(&buf[..BLOCK_BYTES], header.sequence.get(), offset) else {
        return Ok((Facts::default(), None));
    };
    if chunk.incarnation == incarnation && chunk.end() <= begin {
        return Ok(peek(header, offset, &buf[..BLOCK_BYTES], left, before));
    }
    let len = left.min(CHUNK_TOTAL_BYTES_MAX as u64) as usize / BLOCK_BYTES * BLOCK_BYTES;
    segment.file().read_exact_at(&mut buf[..len], offset)?;
    Ok(look(header, offset, &buf[..len], before))
}
