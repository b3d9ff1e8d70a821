//! What a file system changes on its device whenever it is mounted for writing or mended: who finds all of it as it was knows
//! that nobody wrote through a file system in between. Pure: somebody else reads.
//!
//! | file system | what is looked at | who changes it |
//! |---|---|---|
//! | ext2, ext3, ext4 | the superblock | every mount for writing (count, time, state), `e2fsck`, `tune2fs`, `resize2fs`, `debugfs -w` (time) |
//! | XFS, version 5 | the headers of all allocation groups; the log around its head | every mount (unmount record, counters), what is logged before an unmount that never came, `xfs_repair` |
//! | btrfs | the superblock | every transaction and every fsync (generation, roots), `btrfs check --repair` |
//!
//! A write to the device beside the file system changes none of it. Whoever relies on the marks needs something else against that.

use std::io;

/// Most allocation groups that are looked at.
const XFS_GROUPS_MAX: u64 = 8192;
/// The log's unit.
const XFS_LOG_BLOCK_BYTES: u64 = 512;
/// Of the log, before its head and behind it.
const XFS_LOG_AROUND_BYTES: [u64; 2] = [8 << 10, 56 << 10];
/// Longest piece that is read at once.
const PIECE_BYTES_MAX: usize = 32 << 10;

/// The marks of one volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Of which file system.
    pub kind: &'static str,
    /// Over all that was looked at.
    pub digest: [u8; 32],
}

/// Why a volume has no marks.
#[derive(Debug, thiserror::Error)]
pub enum NoMarks {
    /// Nothing that we know.
    #[error("it has no file system of its own that leaves marks (ext4, XFS, btrfs)")]
    Unknown,
    /// It was not unmounted cleanly, or is of a kind that does not say.
    #[error("its {kind} {why}")]
    Unclean {
        /// Of which file system.
        kind: &'static str,
        /// In words.
        why: &'static str,
    },
    /// Its own numbers contradict each other.
    #[error("the superblock of its {0} makes no sense")]
    Damaged(&'static str),
    /// The device.
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
}

/// Looks at a volume of `bytes` bytes; `read` fills the buffer from an offset inside of it.
///
/// # Errors
/// See [`NoMarks`].
pub fn marks(bytes: u64, read: impl FnMut(u64, &mut [u8]) -> io::Result<()>) -> Result<Marks, NoMarks> {
    let mut look = Look { bytes, read, hasher: blake3::Hasher::new() };
    let kind = match () {
        () if look.is(0, b"XFSB")? => look.xfs()?,
        () if look.is(1024 + 56, &[0x53, 0xef])? => look.ext()?,
        () if look.is(0x1_0040, b"_BHRfS_M")? => look.btrfs()?,
        () => return Err(NoMarks::Unknown),
    };
    Ok(Marks { kind, digest: *look.hasher.finalize().as_bytes() })
}

struct Look<R> {
    bytes: u64,
    read: R,
    hasher: blake3::Hasher,
}

impl<R: FnMut(u64, &mut [u8]) -> io::Result<()>> Look<R> {
    /// `None`: not inside of the volume.
    fn fetch<const N: usize>(&mut self, offset: u64) -> Result<Option<[u8; N]>, NoMarks> {
        let mut found = [0; N];
        if offset.checked_add(N as u64).is_none_or(|end| end > self.bytes) {
            return Ok(None);
        }
        (self.read)(offset, &mut found)?;
        Ok(Some(found))
    }

    fn is<const N: usize>(&mut self, offset: u64, magic: &[u8; N]) -> Result<bool, NoMarks> {
        Ok(self.fetch::<N>(offset)?.as_ref() == Some(magic))
    }

    /// Has it count; `kind` for the error where the volume ends before.
    fn take(&mut self, kind: &'static str, offset: u64, len: u64) -> Result<(), NoMarks> {
        let end = offset.checked_add(len).filter(|end| *end <= self.bytes).ok_or(NoMarks::Damaged(kind))?;
        let (mut at, mut piece) = (offset, vec![0; PIECE_BYTES_MAX.min(len as usize)]);
        while at < end {
            let part = (end - at).min(piece.len() as u64) as usize;
            (self.read)(at, &mut piece[..part])?;
            self.hasher.update(&piece[..part]);
            at += part as u64;
        }
        Ok(())
    }

    fn ext(&mut self) -> Result<&'static str, NoMarks> {
        const VALID: u16 = 1;
        const ERROR: u16 = 2;
        const RECOVER: u32 = 4;
        const JOURNAL_DEVICE: u32 = 8;
        let kind = "ext4";
        let superblock: [u8; 1024] = self.fetch(1024)?.ok_or(NoMarks::Damaged(kind))?;
        let state = u16::from_le_bytes([superblock[58], superblock[59]]);
        let features = u32::from_le_bytes([superblock[96], superblock[97], superblock[98], superblock[99]]);
        if features & JOURNAL_DEVICE != 0 {
            return Err(NoMarks::Unclean { kind, why: "is the journal of another file system" });
        }
        if features & RECOVER != 0 || state & (VALID | ERROR) != VALID {
            return Err(NoMarks::Unclean { kind, why: "was not unmounted cleanly, or has errors" });
        }
        self.hasher.update(&superblock);
        Ok(kind)
    }

    fn btrfs(&mut self) -> Result<&'static str, NoMarks> {
        let kind = "btrfs";
        let superblock: [u8; 4096] = self.fetch(0x1_0000)?.ok_or(NoMarks::Damaged(kind))?;
        if superblock[96..104] != [0; 8] {
            return Err(NoMarks::Unclean { kind, why: "was not unmounted cleanly: it has a log tree" });
        }
        self.hasher.update(&superblock);
        Ok(kind)
    }

    fn xfs(&mut self) -> Result<&'static str, NoMarks> {
        let kind = "XFS";
        let damaged = || NoMarks::Damaged(kind);
        let superblock: [u8; 256] = self.fetch(0)?.ok_or_else(damaged)?;
        let u16_at = |at: usize| u16::from_be_bytes([superblock[at], superblock[at + 1]]);
        let u32_at = |at: usize| u32::from_be_bytes(std::array::from_fn(|byte| superblock[at + byte]));
        let (block, group_blocks, groups) = (u64::from(u32_at(4)), u64::from(u32_at(84)), u64::from(u32_at(88)));
        let (log_blocks, sector, group_shift) = (u64::from(u32_at(96)), u64::from(u16_at(102)), superblock[124]);
        let log_start = u64::from_be_bytes(std::array::from_fn(|byte| superblock[48 + byte]));
        if u16_at(100) & 0xf != 5 {
            return Err(NoMarks::Unclean { kind, why: "is older than version 5" });
        }
        if superblock[126] != 0 {
            return Err(NoMarks::Unclean { kind, why: "is being made" });
        }
        if log_start == 0 {
            return Err(NoMarks::Unclean { kind, why: "has its log on another device" });
        }
        let sane = (512..=65536).contains(&block) && (512..=32768).contains(&sector) && group_shift < 32;
        if !sane || groups > XFS_GROUPS_MAX || group_blocks == 0 {
            return Err(damaged());
        }
        for group in 0..groups {
            // Superblock, free space, inodes, free list.
            self.take(kind, group * group_blocks * block, 4 * sector)?;
        }
        let (group, in_group) = (log_start >> group_shift, log_start & ((1 << group_shift) - 1));
        let log = group.checked_mul(group_blocks).and_then(|at| at.checked_add(in_group)?.checked_mul(block));
        let (log, blocks) = (log.ok_or_else(damaged)?, log_blocks * block / XFS_LOG_BLOCK_BYTES);
        let head = self.xfs_log_head(log, blocks)?;
        let [before, behind] = XFS_LOG_AROUND_BYTES.map(|bytes| (bytes / XFS_LOG_BLOCK_BYTES).min(blocks / 2));
        let from = (head + blocks - before) % blocks;
        let first = (before + behind).min(blocks - from);
        self.take(kind, log + from * XFS_LOG_BLOCK_BYTES, first * XFS_LOG_BLOCK_BYTES)?;
        self.take(kind, log, (before + behind - first) * XFS_LOG_BLOCK_BYTES)?;
        Ok(kind)
    }

    /// The block at which the log goes on: where the number of its round changes. Wherever it is wrong, it is so both times.
    fn xfs_log_head(&mut self, log: u64, blocks: u64) -> Result<u64, NoMarks> {
        let damaged = || NoMarks::Damaged("XFS");
        log.checked_add(blocks * XFS_LOG_BLOCK_BYTES).filter(|end| *end <= self.bytes).ok_or_else(damaged)?;
        let mut round = |block: u64| -> Result<[u8; 4], NoMarks> {
            let head: [u8; 8] = self.fetch(log + block * XFS_LOG_BLOCK_BYTES)?.ok_or_else(damaged)?;
            let is_record = head[..4] == 0xfeed_babe_u32.to_be_bytes();
            Ok(std::array::from_fn(|byte| head[if is_record { 4 + byte } else { byte }]))
        };
        let (mut same, mut other) = (0, blocks.checked_sub(1).ok_or_else(damaged)?);
        let first = round(same)?;
        if round(other)? == first {
            return Ok(0);
        }
        while other - same > 1 {
            let middle = same.midpoint(other);
            *(if round(middle)? == first { &mut same } else { &mut other }) = middle;
        }
        Ok(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(image: &[u8]) -> Result<Marks, NoMarks> {
        marks(image.len() as u64, |offset, buf| {
            buf.copy_from_slice(&image[offset as usize..][..buf.len()]);
            Ok(())
        })
    }

    fn ext() -> Vec<u8> {
        let mut image = vec![0; 4096];
        image[1024 + 56..1024 + 60].copy_from_slice(&[0x53, 0xef, 1, 0]);
        image
    }

    fn xfs() -> Vec<u8> {
        let mut image = vec![0; 1 << 20];
        image[..4].copy_from_slice(b"XFSB");
        image[4..8].copy_from_slice(&4096_u32.to_be_bytes());
        image[48..56].copy_from_slice(&((1_u64 << 7) | 8).to_be_bytes());
        image[84..88].copy_from_slice(&128_u32.to_be_bytes());
        image[88..92].copy_from_slice(&2_u32.to_be_bytes());
        image[96..100].copy_from_slice(&64_u32.to_be_bytes());
        image[100..104].copy_from_slice(&[0, 5, 2, 0]);
        image[124] = 7;
        image
    }

    #[test]
    fn what_changes_and_what_does_not() {
        let before = of(&ext()).expect("marks");
        assert_eq!(before.kind, "ext4");
        for (at, changes) in [(1024 + 52, true), (2047, true), (2048, false), (1023, false)] {
            let mut image = ext();
            image[at] ^= 1;
            assert_eq!(of(&image).expect("marks") != before, changes, "byte {at}");
        }
        let before = of(&xfs()).expect("marks");
        assert_eq!(before.kind, "XFS");
        // The log is in the second group, at its block 8, and has not begun: its head is its begin.
        let log = (128 + 8) * 4096;
        for (at, changes) in
            [(130, true), (2047, true), (2048, false), (128 * 4096, true), (log, true), (log - 1, false)]
        {
            let mut image = xfs();
            image[at] ^= 1;
            assert_eq!(of(&image).expect("marks") != before, changes, "byte {at}");
        }
        // What is written where the log goes on is seen, far from its begin, too.
        let mut image = xfs();
        for block in 0..100 {
            image[log + block * 512 + 3] = 1;
        }
        let half = of(&image).expect("marks");
        for at in [99, 100, 101, 150] {
            let mut image = image.clone();
            image[log + at * 512 + 9] = 1;
            assert_ne!(of(&image).expect("marks"), half, "block {at}");
        }
        image[log + 40 * 512 + 9] = 1;
        assert_eq!(of(&image).expect("marks"), half, "far from where it goes on");
    }

    #[test]
    fn what_has_none() {
        assert!(matches!(of(&[]), Err(NoMarks::Unknown)));
        assert!(matches!(of(&[0; 1 << 20]), Err(NoMarks::Unknown)));
        let unclean = |at: usize, byte: u8, mut image: Vec<u8>| {
            image[at] = byte;
            matches!(of(&image), Err(NoMarks::Unclean { .. }))
        };
        assert!(unclean(1024 + 58, 0, ext()) && unclean(1024 + 58, 3, ext()));
        assert!(unclean(1024 + 96, 4, ext()) && unclean(1024 + 96, 8, ext()));
        assert!(unclean(101, 4, xfs()) && unclean(126, 1, xfs()));
        let mut image = vec![0; 1 << 17];
        image[0x1_0040..0x1_0048].copy_from_slice(b"_BHRfS_M");
        assert_eq!(of(&image).expect("marks").kind, "btrfs");
        assert!(unclean(0x1_0060, 1, image));
    }

    proptest! {
        /// Whatever the superblock says: nothing outside of the volume is read, and it ends.
        #[test]
        fn any_superblock(seed in proptest::collection::vec(any::<u8>(), 256), kind in 0..3) {
            let mut image = if kind == 0 { xfs() } else { ext() };
            let at = if kind == 0 { 4 } else { 1024 + 60 };
            let len = seed.len().min(image.len() - at);
            image[at..at + len].copy_from_slice(&seed[..len]);
            let _ = of(&image);
        }
    }
}
