//! How much was written to a device, by the kernel's own count.

use std::io;
use std::path::Path;

use super::facts::BlockFacts;
use super::sysfs::{SysDevice, number, number_if_there, text};
use crate::IoError;

/// Since the device came into being: a boot, or the making of a loop or device-mapper device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writes {
    /// The disk's number: no other disk has it, or had it in this boot.
    pub disk_sequence: u64,
    /// Writes, write-zeroes and discards that have completed.
    pub completed: u64,
    /// Requests of any kind that have not.
    pub in_flight: u64,
    /// Of a partition: such writes to its disk that went to none of the partitions. What goes to the disk as a whole may lie on any
    /// of them, and is counted for none.
    pub beside: u64,
}

/// Places in `stat` (Documentation/block/stat.rst).
const WRITE_IOS: usize = 4;
const IN_FLIGHT: usize = 8;
const DISCARD_IOS: usize = 11;
/// Tries to see a disk's counters and those of its partitions at one moment.
const TRIES_MAX: u32 = 200;

impl Writes {
    /// Of the device at `path`, which may be a partition. `None`: the kernel does not count them, or not all of them.
    ///
    /// # Errors
    /// If it cannot be read, or is not understood.
    pub fn of(path: impl AsRef<Path>) -> Result<Option<Self>, IoError> {
        let device = SysDevice::of(BlockFacts::of(path)?.dev)?;
        let counted = device.disk_dir.join("queue/iostats");
        let sequence = number_if_there(&device.disk_dir.join("diskseq"))?;
        let Some(disk_sequence) = sequence.filter(|_| number::<u8>(&counted).is_ok_and(|is| is == 1)) else {
            return Ok(None);
        };
        let (completed, in_flight) = counted_in(&device.dir)?;
        let beside = if device.is_partition() { beside(&device)? } else { Some(0) };
        Ok(beside.map(|beside| Self { disk_sequence, completed, in_flight, beside }))
    }
}

/// `None`: the disk is written to all the time, so that its counters and those of its partitions are never of one moment.
fn beside(device: &SysDevice) -> Result<Option<u64>, IoError> {
    let disk = SysDevice { dir: device.disk_dir.clone(), disk_dir: device.disk_dir.clone() };
    for _ in 0..TRIES_MAX {
        let before = counted_in(&disk.dir)?.0;
        let mut parts = 0;
        for (_, dir) in disk.with_partitions()?.iter().skip(1) {
            parts += counted_in(dir)?.0;
        }
        if counted_in(&disk.dir)?.0 == before {
            return Ok(Some(before.saturating_sub(parts)));
        }
    }
    Ok(None)
}

/// Completed writes and requests in flight of a device with this directory.
fn counted_in(dir: &Path) -> Result<(u64, u64), IoError> {
    let stat = dir.join("stat");
    let line = text(&stat)?.unwrap_or_default();
    parse(&line).ok_or_else(|| {
        let why = format!("{line:?} is not what a block device's counters look like");
        IoError::refused("understand", &stat, io::ErrorKind::InvalidData, why)
    })
}

fn parse(line: &str) -> Option<(u64, u64)> {
    let numbers: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    let at = |place: usize| numbers.get(place).copied();
    Some((at(WRITE_IOS)?.checked_add(at(DISCARD_IOS)?)?, at(IN_FLIGHT)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_counters() {
        let line = "3179 0 55812 506 90 6 16727 88 2 224 671 7 0 0 0 47 76";
        assert_eq!(parse(line), Some((97, 2)));
        for bad in ["", "1 2 3", "3179 0 55812 506 x 6 16727 88 2 224 671 7 0 0 0 47 76", "-1"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
