//! The model: which write each sector holds, and what that write put there.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::Aligned;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
const MAGIC: u64 = 0x6b61_6f73_6576_7276;
/// Sectors that a complaint names one by one.
const NAMED_MAX: usize = 12;
const CHUNK: usize = 1 << 20;

/// What a sector holds: 0 for zeroes, else the number of the write that it came with.
pub type Stamp = u32;
/// Neither zeroes nor anything that was ever written there.
const GARBAGE: Stamp = Stamp::MAX;

/// What a sector holds after write `stamp`: every byte depends on the write and on the place.
pub(super) fn fill(volume: usize, sector: u64, stamp: Stamp, out: &mut [u8]) {
    let head = [MAGIC, u64::from(stamp), sector, volume as u64];
    let mut word = 0x9e37_79b9_7f4a_7c15u64 ^ (u64::from(stamp) << 32) ^ (sector << 3) ^ volume as u64;
    for (index, bytes) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        // An ordinary linear generator: what is in the sector is its own checksum.
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *bytes = head.get(index).copied().unwrap_or(word).to_le_bytes();
    }
}

/// What a write puts there.
pub(super) fn fill_all(op: &Op, out: &mut [u8]) {
    for (sector, out) in (op.from..).zip(out.chunks_mut(SECTOR)) {
        fill(op.volume, sector, op.stamp, out);
    }
}

/// Which write a sector's bytes came with.
pub(super) fn stamp_of(volume: usize, sector: u64, bytes: &[u8]) -> Stamp {
    if bytes.iter().all(|byte| *byte == 0) {
        return 0;
    }
    let stamp = Stamp::from_le_bytes(bytes[8..12].try_into().unwrap());
    let mut expected = [0; SECTOR];
    fill(volume, sector, stamp, &mut expected);
    if expected == bytes && stamp != 0 { stamp } else { GARBAGE }
}

/// What was done to a stretch of sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// Written.
    Write,
    /// Written with zeroes (`BLKZEROOUT`).
    Zero,
    /// Discarded.
    Discard,
    /// The volume got these sectors at its end.
    Grow,
}

/// One deed of the load. They are done one after the other, so they have one order over all volumes.
#[derive(Debug, Clone, Copy)]
pub struct Op {
    /// Its number, from 1.
    pub stamp: Stamp,
    /// What.
    pub deed: Deed,
    /// Of which volume.
    pub volume: usize,
    /// First sector.
    pub from: u64,
    /// How many.
    pub sectors: u64,
    /// When it began and when it had ended, nanoseconds since 1970; `u64::MAX`: not yet.
    pub began_ns: u64,
    /// See above.
    pub ended_ns: u64,
    /// The device refused it: nobody knows what it left.
    pub failed: bool,
    /// It went past the block layer: no capture can have seen it.
    pub unseen: bool,
}

impl Op {
    pub(super) fn leaves(&self) -> Stamp {
        if self.deed == Deed::Write { self.stamp } else { 0 }
    }

    fn range(&self) -> std::ops::Range<usize> {
        self.from as usize..(self.from + self.sectors) as usize
    }
}

/// What all sectors of all volumes hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    volumes: Vec<Vec<Stamp>>,
    /// Sectors that each has at least: fewer than above if it grew and nothing was written to it since. Until somebody writes,
    /// nobody need have noticed.
    least: Vec<usize>,
}

impl Image {
    /// Zeroes.
    pub fn zeroes(bytes: &[u64]) -> Self {
        Self::of(bytes.iter().map(|bytes| vec![0; *bytes as usize / SECTOR]).collect())
    }

    /// What devices or files hold, in the order of the volumes.
    #[track_caller]
    pub fn read<P: AsRef<Path>>(paths: &[P]) -> Self {
        Self::of(paths.iter().enumerate().map(|(volume, path)| read_volume(volume, path.as_ref())).collect())
    }

    fn of(volumes: Vec<Vec<Stamp>>) -> Self {
        Image { least: volumes.iter().map(Vec::len).collect(), volumes }
    }

    /// The same after `op` was done.
    pub fn apply(&mut self, op: &Op) {
        let volume = &mut self.volumes[op.volume];
        if op.deed == Deed::Grow {
            return volume.resize(op.range().end, 0);
        }
        volume[op.range()].fill(op.leaves());
        if !op.unseen {
            self.least[op.volume] = volume.len();
        }
    }

    /// Everybody has noticed by now how large the volumes are.
    pub fn settle(&mut self) {
        self.least = self.volumes.iter().map(Vec::len).collect();
    }

    /// Sectors of a volume.
    pub(super) fn sectors(&self, volume: usize) -> u64 {
        self.volumes[volume].len() as u64
    }

    /// What is at a place; behind the end of a volume are zeroes.
    fn at(&self, volume: usize, sector: usize) -> Stamp {
        self.volumes[volume].get(sector).copied().unwrap_or(0)
    }

    /// Whether `other` may show this volume in the size that it has there.
    fn may_have_size_of(&self, other: &Image, volume: usize) -> bool {
        (self.least[volume]..=self.volumes[volume].len()).contains(&other.volumes[volume].len())
    }

    /// What sectors hold that somebody looked at.
    pub(super) fn set(&mut self, volume: usize, from: u64, stamps: &[Stamp]) {
        self.volumes[volume][from as usize..from as usize + stamps.len()].copy_from_slice(stamps);
        self.least[volume] = self.volumes[volume].len();
    }

    /// `None` if `other` holds the same, but for sectors that `ignore` names; else in words what it holds instead.
    pub fn differs(&self, other: &Image, ignore: impl Fn(usize, u64) -> bool) -> Option<String> {
        let (mut count, mut named) = (0u64, String::new());
        for (volume, (mine, theirs)) in self.volumes.iter().zip(&other.volumes).enumerate() {
            if !self.may_have_size_of(other, volume) {
                return Some(format!("volume {volume} has {} sectors instead of {}", theirs.len(), mine.len()));
            }
            let both = mine.iter().zip(theirs).enumerate();
            for (sector, (mine, theirs)) in both.filter(|(sector, (a, b))| a != b && !ignore(volume, *sector as u64)) {
                count += 1;
                if count <= NAMED_MAX as u64 {
                    let (mine, theirs) = (name(*mine), name(*theirs));
                    let _ = write!(named, "\n  volume {volume} sector {sector}: {theirs} instead of {mine}");
                }
            }
        }
        (count > 0).then(|| format!("{count} sectors differ:{named}"))
    }
}

fn name(stamp: Stamp) -> String {
    match stamp {
        0 => "zeroes".to_owned(),
        GARBAGE => "garbage".to_owned(),
        stamp => format!("write {stamp}"),
    }
}

#[track_caller]
fn read_volume(volume: usize, path: &Path) -> Vec<Stamp> {
    let fail = |error| -> ! { panic!("{}: {error}", path.display()) };
    let device = std::fs::metadata(path).unwrap_or_else(|error| fail(error)).file_type().is_block_device();
    // A device's own page cache may be older than what is on it.
    let flags = if device { nix::libc::O_DIRECT } else { 0 };
    let mut file = File::options().read(true).custom_flags(flags).open(path).unwrap_or_else(|error| fail(error));
    let mut buffer = Aligned::new(CHUNK, 0);
    let mut stamps = Vec::new();
    loop {
        let mut filled = 0;
        while filled < CHUNK {
            match file.read(&mut buffer[filled..]).unwrap_or_else(|error| fail(error)) {
                0 => break,
                more => filled += more,
            }
        }
        for sector in buffer[..filled].chunks(SECTOR) {
            stamps.push(stamp_of(volume, stamps.len() as u64, sector));
        }
        if filled < CHUNK {
            return stamps;
        }
    }
}

/// How many of the ops an image has, when it may be cut anywhere: all before are in it completely, the next one may be in it
/// in part, and nothing of those after. Several answers are possible when an op changed nothing. `base`: before the first
/// op; `volumes`: those that are looked at.
///
/// # Errors
/// If it is no such cut, with the nearest one.
pub fn locate(base: &Image, ops: &[Op], seen: &Image, volumes: &[usize]) -> Result<Vec<usize>, String> {
    let mut now = base.clone();
    let differing = |now: &Image, volume: usize, range: std::ops::Range<usize>| {
        range.filter(|sector| now.at(volume, *sector) != seen.at(volume, *sector)).count()
    };
    let whole = |v: usize| 0..now.volumes[v].len().max(seen.volumes[v].len());
    let mut wrong: usize = volumes.iter().map(|v| differing(&now, *v, whole(*v))).sum();
    let (mut found, mut nearest) = (Vec::new(), (usize::MAX, 0));
    for count in 0..=ops.len() {
        let next = ops.get(count).filter(|op| volumes.contains(&op.volume));
        // Of what differs, this much is the next op, begun.
        let begun = next.map_or(0, |op| {
            let both = op.range().map(|sector| (now.at(op.volume, sector), seen.at(op.volume, sector)));
            both.filter(|(now, seen)| now != seen && *seen == op.leaves()).count()
        });
        // Done completely, it is the next state.
        let done = |op: &Op| op.range().all(|sector| seen.at(op.volume, sector) == op.leaves());
        let sizes = volumes.iter().all(|volume| now.may_have_size_of(seen, *volume));
        if wrong == begun && sizes && !(begun > 0 && next.is_some_and(done)) {
            found.push(count);
        }
        nearest = nearest.min((wrong - begun, count));
        if let Some(op) = next {
            wrong -= differing(&now, op.volume, op.range());
            now.apply(op);
            wrong += differing(&now, op.volume, op.range());
        }
    }
    if !found.is_empty() {
        return Ok(found);
    }
    let mut there = base.clone();
    ops[..nearest.1].iter().for_each(|op| there.apply(op));
    let words = there.differs(seen, |volume, _| !volumes.contains(&volume)).unwrap_or_default();
    Err(format!("it is no state that the volumes ever had; nearest to that after {} ops: {words}", nearest.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(stamp: Stamp, deed: Deed, volume: usize, from: u64, sectors: u64) -> Op {
        Op { stamp, deed, volume, from, sectors, began_ns: 0, ended_ns: 0, failed: false, unseen: false }
    }

    #[test]
    fn sectors_say_where_they_are_from() {
        let mut bytes = [0; SECTOR];
        assert_eq!(stamp_of(0, 7, &bytes), 0);
        fill(1, 7, 99, &mut bytes);
        assert_eq!(stamp_of(1, 7, &bytes), 99);
        assert_eq!(stamp_of(0, 7, &bytes), GARBAGE, "another volume's");
        assert_eq!(stamp_of(1, 8, &bytes), GARBAGE, "another place's");
        bytes[511] ^= 1;
        assert_eq!(stamp_of(1, 7, &bytes), GARBAGE);
    }

    #[test]
    fn a_cut_is_found_and_everything_else_is_refused() {
        let base = Image::zeroes(&[64 * 512, 16 * 512]);
        let ops = [
            op(1, Deed::Write, 0, 0, 8),
            op(2, Deed::Write, 1, 0, 4),
            op(3, Deed::Write, 0, 4, 8),
            op(4, Deed::Discard, 0, 0, 6),
            op(5, Deed::Write, 1, 2, 2),
        ];
        let mut now = base.clone();
        for count in 0..=ops.len() {
            assert_eq!(locate(&base, &ops, &now, &[0, 1]), Ok(vec![count]));
            if let Some(op) = ops.get(count) {
                let mut begun = now.clone();
                begun.set(op.volume, op.from, &[op.leaves()]);
                assert!(locate(&base, &ops, &begun, &[0, 1]).unwrap().contains(&count), "the first sector of {op:?}");
                now.apply(op);
            }
        }
        // A write that is missing although a later one is there; one volume ahead of the other.
        let mut without = base.clone();
        [ops[0], ops[2]].iter().for_each(|op| without.apply(op));
        let error = locate(&base, &ops, &without, &[0, 1]).unwrap_err();
        assert!(error.contains("volume 1 sector 0: zeroes instead of write 2"), "{error}");
        assert_eq!(locate(&base, &ops, &without, &[0]), Ok(vec![3]), "of this volume nothing is missing");
        assert!(now.differs(&without, |_, _| false).is_some());
        assert_eq!(without.differs(&without.clone(), |_, _| false), None);
    }
    #[test]
    fn a_volume_that_grew_has_its_old_size_until_it_is_written() {
        let base = Image::zeroes(&[16 * 512, 16 * 512]);
        let mut unseen = op(3, Deed::Write, 0, 2, 1);
        unseen.unseen = true;
        let ops = [
            op(1, Deed::Grow, 0, 16, 8),
            op(2, Deed::Write, 1, 0, 4),
            unseen,
            op(4, Deed::Write, 0, 0, 1),
            op(5, Deed::Write, 0, 20, 4),
        ];
        let after = |ops: &[Op]| {
            let mut image = base.clone();
            ops.iter().for_each(|op| image.apply(op));
            image
        };
        let in_old_size = |mut image: Image| {
            image.volumes[0].truncate(16);
            image
        };
        assert_eq!(locate(&base, &ops, &base, &[0, 1]), Ok(vec![0, 1]));
        assert_eq!(locate(&base, &ops, &after(&ops[..1]), &[0, 1]), Ok(vec![1]), "the new size is not there before");
        assert_eq!(locate(&base, &ops, &in_old_size(after(&ops[..3])), &[0, 1]), Ok(vec![3]));
        assert!(locate(&base, &ops, &in_old_size(after(&ops[..4])), &[0, 1]).is_err(), "it was written");
        assert_eq!(locate(&base, &ops, &after(&ops), &[0, 1]), Ok(vec![5]));
        let mut followed = after(&ops[..3]);
        assert_eq!(followed.differs(&in_old_size(followed.clone()), |_, _| false), None);
        followed.settle();
        assert!(followed.differs(&in_old_size(followed.clone()), |_, _| false).is_some());
        assert!(after(&ops).differs(&in_old_size(after(&ops)), |_, _| false).is_some());
    }
}
