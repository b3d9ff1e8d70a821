//! Runs: sorted index files. Their bytes are in [`varve_common::format::run`].
//!
//! A run of level 0 has every entry of one layer; one of level *l* has, of 8^l layers, for every sector the first entry
//! in time. Entries stand by address, then height, then offset in the layer, which is the order of appending.

pub mod reader;
pub mod scan;
pub mod writer;

pub use reader::Run;
pub use scan::RunScan;
pub use writer::RunWriter;

use crate::entry::{Address, Entry, Stored};
use crate::limits::{LEVELS_MAX, MERGE_FAN};
use varve_common::format::run::{RunEntry, RunFooter};

/// Which layers a run is of: by level, then by layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunKey {
    /// See the module's text.
    pub level: u8,
    /// The first layer's number, a multiple of [`RunKey::layers`].
    pub first: u32,
}

impl RunKey {
    /// The run of one layer.
    pub fn of_layer(number: u32) -> Self {
        Self { level: 0, first: number }
    }

    /// Layers that a run of this level is of.
    pub fn layers(&self) -> u32 {
        MERGE_FAN.pow(u32::from(self.level))
    }

    /// The number after the last layer's.
    pub fn end(&self) -> u32 {
        self.first + self.layers()
    }

    /// The run of the next level that this one is a part of.
    pub fn above(&self) -> Self {
        let layers = self.layers() * MERGE_FAN;
        Self { level: self.level + 1, first: self.first - self.first % layers }
    }

    /// The runs of the level below that this one is made of.
    pub fn below(&self) -> impl Iterator<Item = Self> + use<> {
        let below = Self { level: self.level.saturating_sub(1), ..*self };
        let parts = if self.level == 0 { 0 } else { MERGE_FAN };
        (0..parts).map(move |part| Self { first: below.first + part * below.layers(), ..below })
    }

    /// Its file's name.
    pub fn file_name(&self) -> String {
        format!("L{}-{:010}.run", self.level, self.first)
    }

    /// The key with this file name, which is the only form.
    pub fn from_file_name(name: &str) -> Option<Self> {
        let (level, first) = name.strip_prefix('L')?.strip_suffix(".run")?.split_once('-')?;
        let key = Self { level: level.parse().ok()?, first: first.parse().ok()? };
        (key.is_possible() && key.file_name() == name).then_some(key)
    }

    /// Whether there can be such a run.
    pub fn is_possible(&self) -> bool {
        self.level <= LEVELS_MAX
            && self.first.is_multiple_of(self.layers())
            && self.first.checked_add(self.layers()).is_some()
    }
}

/// What a run says of itself and of its layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunHead {
    /// The group's identity.
    pub group: [u8; 16],
    /// Which layers.
    pub key: RunKey,
    /// All heights are above.
    pub first_height: u64,
    /// No height is above.
    pub last_height: u64,
    /// Time of the first point, nanoseconds since 1970 at the source.
    pub first_time_ns: u64,
    /// Of the last one.
    pub last_time_ns: u64,
    /// Bytes of the layers' files, together.
    pub layer_bytes: u64,
}

impl RunHead {
    fn from_footer(footer: &RunFooter) -> Self {
        Self {
            group: footer.group,
            key: RunKey { level: footer.level, first: footer.first_layer.get() },
            first_height: footer.first_height.get(),
            last_height: footer.last_height.get(),
            first_time_ns: footer.first_time_ns.get(),
            last_time_ns: footer.last_time_ns.get(),
            layer_bytes: footer.layer_bytes.get(),
        }
    }

    /// Whether an entry can be in the run.
    #[inline]
    fn admits(&self, entry: &Entry) -> bool {
        entry.height > self.first_height
            && entry.height <= self.last_height
            && entry.layer >= self.key.first
            && entry.layer - self.key.first < self.key.layers()
    }
}

/// Whether `next` may follow `entry` in a run of `level`.
#[inline]
fn in_order(level: u8, entry: &Entry, next: &Entry) -> bool {
    if level == 0 { entry.order() <= next.order() } else { entry.end() <= next.address }
}

#[inline]
fn to_numbers(entry: &Entry) -> RunEntry {
    RunEntry {
        address: entry.address.number(),
        height: entry.height,
        layer: entry.layer,
        offset: entry.offset,
        crc: entry.crc,
        stored_bytes: entry.stored_bytes,
        sectors: entry.sectors,
        skip: entry.skip,
        record_sectors: entry.record_sectors,
        stored: entry.stored as u8,
    }
}

/// The entry with these numbers; `None` if there cannot be one.
#[inline]
fn from_numbers(numbers: &RunEntry) -> Option<Entry> {
    let entry = Entry {
        address: Address::from_number(numbers.address),
        height: numbers.height,
        layer: numbers.layer,
        offset: numbers.offset,
        crc: numbers.crc,
        stored_bytes: numbers.stored_bytes,
        sectors: numbers.sectors,
        skip: numbers.skip,
        record_sectors: numbers.record_sectors,
        stored: Stored::from_number(numbers.stored)?,
    };
    entry.is_possible().then_some(entry)
}

#[cfg(test)]
mod tests;
