//! Layers: the files that hold what changes replaced. One is open and appended to; the others never change again.
//!
//! | part | for |
//! |---|---|
//! | [`Chunk`] | collects records and points for one append, in the form in which they are written |
//! | [`OpenLayer`] | the newest layer: appends chunks, finds its end again after a crash |
//! | [`LayerFile`] | any layer, for reading: single records, points, everything (scrub) |
//! | [`walk`] | goes from chunk to chunk and decides where a layer ends and what is damage |
//!
//! What belongs where on disk is in [`varve_common::format::layer`].
//!
//! A closed layer that lost whole chunks at its end looks like a shorter one. Its neighbour knows: a layer's
//! [`LayerFile::first_height`] is what the one before was complete to.

mod chunk;
mod file;
mod open;
pub mod walk;

#[cfg(test)]
mod tests;

pub use chunk::{Before, Chunk};
pub use file::{Finding, LayerFile, ReadPlan, Scanned};
pub use open::OpenLayer;

use crate::entry::{Entry, Stored};
use crate::error::HistoryError;
use crate::limits::{
    CHUNK_BYTES_MAX, CHUNK_POINTS_MAX, CHUNK_RECORDS_MAX, GRANULE_SECTORS, LAYER_BYTES, LAYER_RECORDS, SECTOR_BYTES,
};
use std::path::{Path, PathBuf};
use varve_common::format::BLOCK_BYTES;
use varve_common::format::layer::{self as bytes, CHUNK_HEADER_BYTES, ChunkHeader, Row};
use varve_common::limits::VOLUME_BYTES_MAX;
use varve_io::IoError;

/// Most bytes of a layer: one chunk is put behind the last byte below [`LAYER_BYTES`].
pub const LAYER_FILE_BYTES_MAX: u64 = LAYER_BYTES + CHUNK_BYTES_MAX as u64;
/// Most records of a layer, likewise.
pub const LAYER_FILE_RECORDS_MAX: usize = LAYER_RECORDS + CHUNK_RECORDS_MAX;

const _: () = assert!(LAYER_FILE_BYTES_MAX <= u32::MAX as u64, "offsets in entries");
const _: () = assert!(bytes::CHUNK_BYTES_MAX as usize == CHUNK_BYTES_MAX);
const _: () = assert!(bytes::CHUNK_RECORDS_MAX as usize == CHUNK_RECORDS_MAX);
const _: () = assert!(bytes::CHUNK_POINTS_MAX as usize == CHUNK_POINTS_MAX);
const _: () = assert!(bytes::RECORD_SECTORS_MAX == GRANULE_SECTORS);

/// Where the first chunk stands.
const FIRST_CHUNK: u64 = BLOCK_BYTES as u64;
const SUFFIX: &str = "layer";
/// How a layer is called while it is being made.
const TEMPORARY_SUFFIX: &str = "new";

/// What is known of a chunk without its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkInfo {
    /// Where it begins in the layer.
    pub offset: u64,
    /// Its bytes, header and padding included.
    pub bytes: u32,
    /// All changes with a stamp up to this one are in earlier chunks.
    pub first_height: u64,
    /// All changes with a stamp up to this one are in this or earlier chunks.
    pub complete_to: u64,
    /// Time of its first point; without points that of the newest point before.
    pub first_time_ns: u64,
    /// Time of its last point, likewise.
    pub last_time_ns: u64,
    /// Records in it.
    pub records: u32,
    /// Points in it.
    pub points: u32,
}

impl ChunkInfo {
    fn new(header: &ChunkHeader) -> Self {
        Self {
            offset: header.offset.get(),
            bytes: header.total_bytes() as u32,
            first_height: header.first_height.get(),
            complete_to: header.complete_to.get(),
            first_time_ns: header.first_time_ns.get(),
            last_time_ns: header.last_time_ns.get(),
            records: header.records.get(),
            points: header.points.get(),
        }
    }

    /// The byte after its last.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.bytes)
    }
}

/// The chunk that holds the newest point that is not later than `time_ns`, if the layer holds it. `chunks` are in order.
pub fn find_time(chunks: &[ChunkInfo], time_ns: u64) -> Option<usize> {
    let before = chunks.partition_point(|chunk| chunk.first_time_ns <= time_ns);
    chunks[..before].iter().rposition(|chunk| chunk.points > 0)
}

/// A stretch of a layer that was whole once and is not any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Where in the layer it begins.
    pub offset: u64,
    /// Bytes up to the next chunk, or to the layer's end.
    pub bytes: u64,
    /// The last height that the chunks before are complete to: older before-images are not affected.
    pub first_height: u64,
    /// Points from this height on do not need what is lost: it is the lowest stamp of the records that follow. `None`:
    /// no record follows in this layer.
    pub whole_from: Option<u64>,
    /// The case in the table of [`walk`].
    pub case: char,
    /// Its words.
    pub why: &'static str,
}

/// What reading a layer from its begin to its end has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// All records, in the order in which they were appended.
    pub entries: Vec<Entry>,
    /// All chunks.
    pub chunks: Vec<ChunkInfo>,
    /// All changes with a stamp up to this one are in the layer or in earlier ones.
    pub complete_to: u64,
    /// Time of the newest point; that of the layer's begin if there is none.
    pub last_time_ns: u64,
    /// Points in all chunks.
    pub points: u64,
    /// Bytes of an append that a crash cut off stand behind the end. The next append overwrites them.
    pub torn: bool,
    /// What is missing in between.
    pub damage: Vec<Damage>,
}

/// The file of layer `number` in the directory `dir` of layers.
pub fn path_of(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number:010}.{SUFFIX}"))
}

fn temporary_path_of(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number:010}.{TEMPORARY_SUFFIX}"))
}

/// The numbers of all layers in `dir`, in order. What was left half made is removed.
///
/// # Errors
/// If the directory cannot be listed.
pub fn list(dir: &Path) -> Result<Vec<u32>, HistoryError> {
    let fail = |e| IoError::new("list", dir, e);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let number = path.file_stem().and_then(|stem| stem.to_str()?.parse::<u32>().ok());
        match (number, path.extension().and_then(|extension| extension.to_str())) {
            (Some(number), Some(SUFFIX)) if path == path_of(dir, number) => found.push(number),
            (Some(_), Some(TEMPORARY_SUFFIX)) => varve_io::crashsafe::remove_durable(&path)?,
            _ => {}
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// A row as an entry of layer `layer`, its bytes at `offset`; `None` if the numbers cannot be.
fn entry_of(row: &Row, layer: u32, offset: u64) -> Option<Entry> {
    let entry = Entry {
        address: crate::entry::Address::from_number(row.address),
        height: row.stamp,
        layer,
        offset: u32::try_from(offset).ok()?,
        crc: row.crc,
        stored_bytes: row.stored_bytes,
        sectors: row.sectors,
        skip: 0,
        record_sectors: row.sectors,
        stored: Stored::from_number(row.kind)?,
    };
    let inside = entry.address.sector() + u64::from(row.sectors) <= VOLUME_BYTES_MAX / SECTOR_BYTES;
    (inside && entry.is_possible()).then_some(entry)
}

/// Where the first stored byte of the chunk at `offset` is.
fn data_start(offset: u64) -> u64 {
    offset + CHUNK_HEADER_BYTES as u64
}
