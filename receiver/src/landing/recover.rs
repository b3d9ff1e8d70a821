//! Opening a log after a stop or a crash: where it ends, and what the stream's state is there.

use super::Place;
use super::log::Log;
use super::reader::{Next, Reader};
use crate::failure::Failure;
use crate::group::stream::{Checker, StreamState};
use std::sync::Arc;

/// What a log holds after the applied mark.
#[derive(Debug)]
pub struct Recovered {
    /// Where the next batch goes (or the block after).
    pub end: Place,
    /// CRC of the newest entry's header.
    pub chain: u32,
    /// The stream's state after the newest entry.
    pub state: StreamState,
    /// Entries found.
    pub entries: u64,
    /// Bytes of them, as stored.
    pub bytes: u64,
    /// What the log says of data that it should hold and does not.
    pub damage: Option<String>,
}

/// Reads everything from `mark` on and checks it as if it came from a peer. Segments that turn out to be no part of the
/// log are freed or, if they must never be read again, removed.
pub fn recover(
    log: &Arc<Log>,
    mark: Place,
    chain: u32,
    mut state: StreamState,
    volumes: &[u64],
) -> Result<Recovered, Failure> {
    let mut reader = Reader::new(log.clone(), mark, chain);
    let mut checker = Checker::new(volumes);
    let (mut entries, mut bytes) = (0, 0);
    let damage = loop {
        match reader.next(|header, body| checker.check(&state, header, body))? {
            Next::Entry(header, _, checked) => {
                state.pass(&checked.effect);
                entries += 1;
                bytes += header.total_bytes() as u64;
            }
            Next::End => break None,
            Next::Damaged(why) => break Some(why),
        }
    };
    let end = reader.place();
    if damage.is_some() {
        log.discard_after(end.segment)?;
        log.cut(end)?;
    } else {
        log.free_after(end.segment);
    }
    Ok(Recovered { end, chain: reader.chain(), state, entries, bytes, damage })
}

#[cfg(test)]
#[path = "recover_tests.rs"]
mod tests;
