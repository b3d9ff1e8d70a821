//! Reads the log of dm-log-writes: what a volume was told to do, in order, by the kernel's own word.
//!
//! Sectors of the log: the superblock, then for each entry a sector with its head (and a mark's name) and its data. A write is
//! logged when a flush that came after it is done, or at once if it was told to be durable: what is not in the log, a disk
//! may forget at a loss of power.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
/// Of what replays and comparisons count.
pub const BLOCK: usize = 4096;

/// One entry.
#[derive(Debug)]
pub struct Entry {
    /// Of the volume, in bytes.
    pub offset: usize,
    /// How much changes.
    pub bytes: usize,
    /// `None`: it becomes zero.
    data: Option<u64>,
    pub mark: Option<String>,
    pub flush: bool,
}

/// A log, and its entries up to the last superblock.
#[derive(Debug)]
pub struct Log {
    file: File,
    pub entries: Vec<Entry>,
}

impl Log {
    #[track_caller]
    pub fn read(path: &Path) -> Self {
        let file = File::open(path).unwrap();
        let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let mut head = [0; 32];
        file.read_exact_at(&mut head, 0).unwrap();
        let (magic, version, count) = (word(&head, 0), word(&head, 8), word(&head, 16));
        assert_eq!((magic, version), (MAGIC, 1), "not a log of dm-log-writes");
        let sector = word(&head, 24) & 0xffff_ffff;
        assert!(matches!(sector, 512 | 4096), "a sector of {sector} bytes");
        let (mut at, mut entries) = (sector, Vec::new());
        for _ in 0..count {
            file.read_exact_at(&mut head, at).unwrap();
            let (offset, sectors, flags, inline) = (word(&head, 0), word(&head, 8), word(&head, 16), word(&head, 24));
            let bytes = usize::try_from(sectors * sector).unwrap();
            let mark = (flags & MARK != 0).then(|| {
                let mut name = vec![0; usize::try_from(inline).unwrap()];
                file.read_exact_at(&mut name, at + 32).unwrap();
                String::from_utf8(name).unwrap()
            });
            at += sector;
            let has_data = mark.is_none() && flags & DISCARD == 0;
            entries.push(Entry {
                offset: usize::try_from(offset * sector).unwrap(),
                bytes: if mark.is_none() { bytes } else { 0 },
                data: has_data.then_some(at),
                mark,
                flush: flags & FLUSH != 0,
            });
            at += if has_data { bytes as u64 } else { 0 };
        }
        Log { file, entries }
    }

    /// Where a mark stands.
    #[track_caller]
    pub fn mark(&self, name: &str) -> usize {
        let found = self.entries.iter().position(|entry| entry.mark.as_deref() == Some(name));
        found.unwrap_or_else(|| panic!("the log has no mark '{name}'"))
    }

    /// Does to `image` what entries say.
    pub fn replay(&self, image: &mut [u8], entries: std::ops::Range<usize>) {
        for entry in &self.entries[entries] {
            let part = &mut image[entry.offset..entry.offset + entry.bytes];
            match entry.data {
                Some(at) => self.file.read_exact_at(part, at).unwrap(),
                None => part.fill(0),
            }
        }
    }

    /// Bytes written, entries that discard.
    pub fn tally(&self) -> (usize, usize) {
        let written = self.entries.iter().filter(|entry| entry.data.is_some()).map(|entry| entry.bytes).sum();
        (written, self.entries.iter().filter(|entry| entry.data.is_none() && entry.bytes > 0).count())
    }

    /// After how many entries, `least` or more, `base` has become `wanted`. `None`: never.
    pub fn find(&self, base: &[u8], wanted: &[u8], least: usize) -> Option<usize> {
        let mut image = base.to_vec();
        self.replay(&mut image, 0..least);
        let differ = |image: &[u8], block: usize| {
            let range = block * BLOCK..(block + 1) * BLOCK;
            image[range.clone()] != wanted[range]
        };
        let mut different: Vec<bool> = (0..image.len() / BLOCK).map(|block| differ(&image, block)).collect();
        let mut count = different.iter().filter(|different| **different).count();
        for (number, entry) in self.entries.iter().enumerate().skip(least) {
            if count == 0 {
                return Some(number);
            }
            self.replay(&mut image, number..number + 1);
            let touched = entry.offset / BLOCK..(entry.offset + entry.bytes).div_ceil(BLOCK);
            for (was, block) in different[touched.clone()].iter_mut().zip(touched) {
                let now = differ(&image, block);
                count = count + usize::from(now) - usize::from(std::mem::replace(was, now));
            }
        }
        (count == 0).then_some(self.entries.len())
    }
}
