//! What a file system changes on its device whenever it is mounted for writing or mended: who finds all of it as it was knows
//! that nobody wrote through a file system in between. Pure: somebody else reads.
//!
//! | file system | what is looked at | who changes it |
//! |---|---|---|
//! | ext2, ext3, ext4 | the superblock | every mount for writing (count, time, state), `e2fsck`, `tune2fs`, `resize2fs`, `debugfs -w` (time) |
//! | XFS, version 5 | the headers of all allocation groups; the log around its head | every mount (unmount record, counters), what is logged before an unmount that never came, `xfs_repair` |
//! | btrfs | the superblock | every transaction and every fsync (generation, roots), `btrfs check --repair` |
//!
//! A volume on which something else may live (a partition table, LVM, LUKS, md, ZFS, swap, a second file system) has none: what is
//! left of a file system that was there before never changes.
//!
//! A write to the device beside the file system changes none of it. Whoever relies on the marks needs something else against that.

use std::io;

/// Most allocation groups that are looked at.
const XFS_GROUPS_MAX: u64 = 8192;
/// The log's unit.
const XFS_LOG_BLOCK_BYTES: u64 = 512;
/// Of the log, before its head and behind it.
const XFS_LOG_AROUND_BYTES: [u64; 2] = [8 << 10, 56 << 10];
/// How far before its head the record of an unmount may begin: a stripe unit of the log, and its header.
const XFS_UNMOUNT_BLOCKS_MAX: u64 = 1024;
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
    /// It may not be what the volume is used for.
    #[error("it holds {0} as well, and which of the two is in use is not known")]
    Other(&'static str),
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
    let there = [look.is(0, b"XFSB")?, look.is(1024 + 56, &[0x53, 0xef])?, look.is(0x1_0040, b"_BHRfS_M")?];
    if let Some(other) = look.other()? {
        return Err(NoMarks::Other(other));
    }
    let kind = match there {
        [true, false, false] => look.xfs()?,
        [false, true, false] => look.ext()?,
        [false, false, true] => look.btrfs()?,
        [false, false, false] => return Err(NoMarks::Unknown),
        _ => return Err(NoMarks::Other("a second file system")),
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

    /// Whether these bytes, eight at most, are there.
    fn is(&mut self, offset: u64, magic: &[u8]) -> Result<bool, NoMarks> {
        Ok(self.fetch::<8>(offset)?.is_some_and(|found| found.starts_with(magic)))
    }

    /// What else the volume may be used for, or was once.
    fn other(&mut self) -> Result<Option<&'static str>, NoMarks> {
        const PARTITIONS: &str = "a partition table";
        const LVM: &str = "an LVM label";
        let others: [(u64, &[u8], &str); 11] = [
            (510, &[0x55, 0xaa], PARTITIONS),
            (512, b"EFI PART", PARTITIONS),
            (4096, b"EFI PART", PARTITIONS),
            (0, b"LABELONE", LVM),
            (512, b"LABELONE", LVM),
            (1024, b"LABELONE", LVM),
            (1536, b"LABELONE", LVM),
            (0, b"LUKS", "LUKS"),
            (4096, &[0xfc, 0x4e, 0x2b, 0xa9], "an md superblock"),
            (4096 - 10, b"SWAPSPAC", "swap space"),
            (8192 - 10, b"SWAPSPAC", "swap space"),
        ];
        for (at, magic, what) in others {
            if self.is(at, magic)? {
                return Ok(Some(what));
            }
        }
        self.zfs()
    }

    /// ZFS leaves what is before its labels' lists alone; its ring of uberblocks tells.
    fn zfs(&mut self) -> Result<Option<&'static str>, NoMarks> {
        for slot in 0..128 {
            if let Some(magic) = self.fetch::<8>((128 << 10) + (slot << 10))?
                && [u64::from_le_bytes(magic), u64::from_be_bytes(magic)].contains(&0x00ba_b10c)
            {
                return Ok(Some("ZFS"));
            }
        }
        Ok(None)
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
        if !self.xfs_is_unmounted(log, blocks, head)? {
            return Err(NoMarks::Unclean { kind, why: "was not unmounted cleanly" });
        }
        let [before, behind] = XFS_LOG_AROUND_BYTES.map(|bytes| (bytes / XFS_LOG_BLOCK_BYTES).min(blocks / 2));
        let from = (head + blocks - before) % blocks;
        let first = (before + behind).min(blocks - from);
        self.take(kind, log + from * XFS_LOG_BLOCK_BYTES, first * XFS_LOG_BLOCK_BYTES)?;
        self.take(kind, log, (before + behind - first) * XFS_LOG_BLOCK_BYTES)?;
        Ok(kind)
    }

    /// Whether the log's last record is that of an unmount.
    fn xfs_is_unmounted(&mut self, log: u64, blocks: u64, head: u64) -> Result<bool, NoMarks> {
        const OF_A_TRANSACTION: u8 = 0xaa; // oh_clientid: the log's own
        const UNMOUNT: u8 = 0x20; // oh_flags
        const HEADER_BYTES_MAX: u32 = 32 << 10; // of a record, for each block of its header
        for back in 1..=XFS_UNMOUNT_BLOCKS_MAX.min(blocks) {
            let at = |block: u64| log + block % blocks * XFS_LOG_BLOCK_BYTES;
            let begin = head + blocks - back;
            let Some(header) = self.fetch::<324>(at(begin))? else { return Ok(false) };
            let u32_at = |place: usize| u32::from_be_bytes(std::array::from_fn(|byte| header[place + byte]));
            if u32_at(0) != 0xfeed_babe {
                continue;
            }
            let (version, data, operations, size) = (u32_at(8), u32_at(12), u32_at(40), u32_at(320));
            let headers = if version & 2 != 0 { u64::from(size.div_ceil(HEADER_BYTES_MAX).clamp(1, 8)) } else { 1 };
            let ends = u64::from(data).div_ceil(XFS_LOG_BLOCK_BYTES) + headers == back;
            let Some(operation) = self.fetch::<12>(at(begin + headers))? else { return Ok(false) };
            let is_one = operation[8] == OF_A_TRANSACTION && operation[9] & UNMOUNT != 0;
            return Ok(ends && operations == 1 && is_one);
        }
        Ok(false)
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
        unmounted(&mut image, 100);
        image
    }

    /// Where the log of [`xfs`] begins: in the second group, at its block 8.
    const LOG: usize = (128 + 8) * 4096;

    /// The log's blocks up to `head` are of the first round, and the last two are the record of an unmount.
    fn unmounted(image: &mut [u8], head: usize) {
        for block in 0..head {
            image[LOG + block * 512 + 3] = 1;
        }
        let record = LOG + (head - 2) * 512;
        image[record..record + 4].copy_from_slice(&0xfeed_babe_u32.to_be_bytes());
        for (at, value) in [(4, 1_u32), (8, 2), (12, 512), (40, 1), (320, 32 << 10)] {
            image[record + at..record + at + 4].copy_from_slice(&value.to_be_bytes());
        }
        image[record + 512 + 8..record + 512 + 10].copy_from_slice(&[0xaa, 0x20]);
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
        let head = LOG + 100 * 512;
        let cases = [
            (130, true),
            (2047, true),
            (2048, false),
            (128 * 4096, true),
            (head - 9, true),
            (head + 9, true),
            (LOG + 9, false),
        ];
        for (at, changes) in cases {
            let mut image = xfs();
            image[at] ^= 1;
            assert_eq!(of(&image).expect("marks") != before, changes, "byte {at}");
        }
        // Another record behind that of the unmount: somebody has mounted it since.
        for bytes in [[0xaa, 0], [0, 0x20]] {
            let mut image = xfs();
            image[head - 512 + 8..head - 512 + 10].copy_from_slice(&bytes);
            assert!(matches!(of(&image), Err(NoMarks::Unclean { .. })), "{bytes:?}");
        }
        let mut image = xfs();
        image[head + 3] = 1;
        assert!(matches!(of(&image), Err(NoMarks::Unclean { .. })));
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
        // What may be in use instead.
        for (at, bytes) in
            [(510, &[0x55, 0xaa][..]), (512, b"EFI PART"), (512, b"LABELONE"), (4086, b"SWAPSPACE2"), (0, b"LUKS")]
        {
            let mut image = ext();
            image.resize(1 << 18, 0);
            image[at..at + bytes.len()].copy_from_slice(bytes);
            assert!(matches!(of(&image), Err(NoMarks::Other(_))), "{at}");
        }
        let mut image = ext();
        image.resize(1 << 18, 0);
        image[0x1_0040..0x1_0048].copy_from_slice(b"_BHRfS_M");
        assert!(matches!(of(&image), Err(NoMarks::Other(_))), "two file systems");
        image[0x1_0040..0x1_0048].fill(0);
        image[(128 << 10) + (5 << 10)..][..8].copy_from_slice(&0x00ba_b10c_u64.to_le_bytes());
        assert!(matches!(of(&image), Err(NoMarks::Other("ZFS"))));
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
