//! The applied mark: two slots in one small file, written in turn.

use crate::failure::Failure;
use std::path::Path;
use varve_common::format::{AppliedSlot, BLOCK_BYTES};
use varve_io::{AlignedBuf, DirectFile, IoError, crashsafe};

const FILE_BYTES: usize = 2 * BLOCK_BYTES;

/// The file and what it says.
#[derive(Debug)]
pub struct AppliedFile {
    file: DirectFile,
    block: AlignedBuf,
    slot: AppliedSlot,
}

impl AppliedFile {
    /// Makes the file of a new group. Durable on return.
    pub fn create(path: &Path, group: [u8; 16]) -> Result<(), IoError> {
        let mut bytes = AppliedSlot::fresh(group).encode().to_vec();
        bytes.resize(FILE_BYTES, 0);
        crashsafe::write_atomic(path, &bytes, 0o600)
    }

    /// Reads it.
    pub fn open(path: &Path, group: [u8; 16]) -> Result<Self, Failure> {
        let failed = |e: IoError| Failure::io("the applied mark", &e);
        let file = DirectFile::open_rw(path).map_err(failed)?;
        if file.len() != FILE_BYTES as u64 {
            return Err(Failure::damaged(format!("{} has {} bytes, not {FILE_BYTES}", path.display(), file.len())));
        }
        // What a write left whose sync failed, or was killed, can be read here, and segments are used again because of it.
        file.sync_data().map_err(failed)?;
        let mut both = AlignedBuf::new(FILE_BYTES);
        file.read_exact_at(&mut both, 0).map_err(failed)?;
        let slot = AppliedSlot::newest(&both).map_err(|e| Failure::format(path, &e))?;
        if slot.group != group {
            return Err(Failure::damaged(format!("{} belongs to another group", path.display())));
        }
        Ok(Self { file, block: AlignedBuf::new(BLOCK_BYTES), slot })
    }

    /// The newest slot.
    pub fn slot(&self) -> &AppliedSlot {
        &self.slot
    }

    /// Writes the next slot; durable on return. Only after everything that it claims is synced.
    pub fn write(&mut self, mut slot: AppliedSlot) -> Result<(), Failure> {
        slot.sequence = (self.slot.sequence.get() + 1).into();
        self.block.copy_from_slice(&slot.encode());
        let offset = (slot.sequence.get() % 2) * BLOCK_BYTES as u64;
        self.file.write_all_at_durable(&self.block, offset).map_err(|e| Failure::io("the applied mark", &e))?;
        self.slot = slot;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_written_is_read_and_a_torn_one_leaves_the_one_before() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("applied");
        AppliedFile::create(&path, [1; 16]).expect("create");
        assert!(AppliedFile::open(&path, [2; 16]).is_err(), "another group's");
        for round in 1..=5u64 {
            let mut file = AppliedFile::open(&path, [1; 16]).expect("open");
            assert_eq!(file.slot().position.get(), (round - 1) * 8);
            let mut slot = *file.slot();
            slot.position = (round * 8).into();
            file.write(slot).expect("write");
        }
        let mut bytes = std::fs::read(&path).expect("read");
        // Sequence 5 is in the second block.
        bytes[BLOCK_BYTES + 50] ^= 1;
        std::fs::write(&path, &bytes).expect("damage");
        assert_eq!(AppliedFile::open(&path, [1; 16]).expect("the other slot").slot().position.get(), 32);
        bytes[50] ^= 1;
        std::fs::write(&path, &bytes).expect("damage");
        assert!(AppliedFile::open(&path, [1; 16]).is_err());
    }
}
