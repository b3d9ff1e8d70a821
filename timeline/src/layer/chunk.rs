//! One append in the making: records and points, in the form in which they are written.

use super::{data_start, entry_of};
use crate::entry::{Address, Entry, Stored};
use crate::error::HistoryError;
use crate::limits::{
    CHUNK_BYTES_MAX, CHUNK_POINTS_MAX, CHUNK_RECORDS_MAX, GRANULE_BYTES, GRANULE_SECTORS, SECTOR_BYTES,
};
use lz4_flex::block::{CompressTable, compress_into_with_table};
use std::fmt;
use varve_common::format::BLOCK_BYTES;
use varve_common::format::layer::{
    CHUNK_HEADER_BYTES, CHUNK_MAGIC, ChunkHeader, POINT_BYTES_MAX, Point, PointState, ROW_BYTES_MAX, Row, RowState,
    Rows,
};
use varve_io::AlignedBuf;
use zerocopy::IntoBytes;

/// Behind the longest chunk, so that the last record has room to be compressed into as well: what LZ4 may need for one
/// granule, in whole blocks.
const SLACK_BYTES: usize = (GRANULE_BYTES as usize * 11 / 10 + 20).next_multiple_of(BLOCK_BYTES);

/// What a stretch of sectors held before a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before<'a> {
    /// Zeroes.
    Zero {
        /// How many sectors of them.
        sectors: u16,
    },
    /// These bytes: whole sectors.
    Bytes(&'a [u8]),
}

/// Whether LZ4 is worth a try: by how the newest tries ended.
#[derive(Debug)]
struct Sampling {
    /// Bit 0: the newest try paid; bit 1: the one before; …
    paid: u16,
    /// Records that were not tried since the last try.
    skipped: u32,
}

impl Sampling {
    /// Fewer than this many of the newest sixteen tries: data that does not compress.
    const PAID_MIN: u32 = 3;
    /// Of such data every so many is tried.
    const STRIDE: u32 = 32;

    fn wants(&mut self) -> bool {
        let wanted = self.paid.count_ones() >= Self::PAID_MIN || self.skipped + 1 >= Self::STRIDE;
        self.skipped = if wanted { 0 } else { self.skipped + 1 };
        wanted
    }

    fn tell(&mut self, paid: bool) {
        self.paid = self.paid << 1 | u16::from(paid);
    }
}

/// Collects what one append writes. Made once and used again: nothing is allocated for a record once its tables have
/// grown.
pub struct Chunk {
    /// Room for the header, then the stored bytes; table and points are put behind them at the end.
    buf: AlignedBuf,
    data_end: usize,
    table: Vec<u8>,
    rows: RowState,
    records: u32,
    points: Vec<u8>,
    newest_point: PointState,
    point_count: u32,
    first_height: u64,
    first_time_ns: u64,
    /// Of the newest point ever.
    last_time_ns: u64,
    sampling: Sampling,
    small: CompressTable,
    large: CompressTable,
    tries: u64,
}

/// What a chunk learns only when it is written.
pub(super) struct Place<'a> {
    pub(super) group: &'a [u8; 16],
    pub(super) layer: u32,
    pub(super) offset: u64,
    pub(super) previous_crc: u32,
    pub(super) complete_to: u64,
    /// Of the newest point before.
    pub(super) last_time_ns: u64,
}

impl Default for Chunk {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chunk({} records, {} points, {} bytes)", self.records, self.point_count, self.data_end)
    }
}

impl Chunk {
    /// An empty one. It takes a little more than [`CHUNK_BYTES_MAX`] of memory.
    pub fn new() -> Self {
        Self {
            buf: AlignedBuf::new(CHUNK_BYTES_MAX + SLACK_BYTES),
            data_end: CHUNK_HEADER_BYTES,
            table: Vec::new(),
            rows: RowState::new(0),
            records: 0,
            points: Vec::new(),
            newest_point: PointState::new(0, 0),
            point_count: 0,
            first_height: 0,
            first_time_ns: 0,
            last_time_ns: 0,
            sampling: Sampling { paid: u16::MAX, skipped: 0 },
            small: CompressTable::small(),
            large: CompressTable::large(),
            tries: 0,
        }
    }

    /// Empties it. Everything with a stamp up to `first_height` is in earlier chunks.
    pub fn begin(&mut self, first_height: u64) {
        self.data_end = CHUNK_HEADER_BYTES;
        self.table.clear();
        self.rows = RowState::new(first_height);
        self.records = 0;
        self.points.clear();
        self.newest_point = PointState::new(first_height, self.last_time_ns);
        self.point_count = 0;
        self.first_height = first_height;
    }

    /// No later point is before `time_ns`: what [`super::Recovered::last_time_ns`] says, at a start.
    pub fn not_before(&mut self, time_ns: u64) {
        self.last_time_ns = self.last_time_ns.max(time_ns);
    }

    /// Whether a record of `sectors` and one point more find room, however badly they compress.
    pub fn fits(&self, sectors: u16) -> bool {
        let record = usize::from(sectors) * SECTOR_BYTES as usize + ROW_BYTES_MAX;
        let counts = (self.records as usize) < CHUNK_RECORDS_MAX && (self.point_count as usize) < CHUNK_POINTS_MAX;
        counts && (self.end() + record + POINT_BYTES_MAX).next_multiple_of(BLOCK_BYTES) <= CHUNK_BYTES_MAX
    }

    /// Bytes so far, without padding.
    fn end(&self) -> usize {
        self.data_end + self.table.len() + self.points.len()
    }

    /// Adds a record: `before` stood at `address` until the change whose height is `height`. It lies within one granule.
    ///
    /// # Errors
    /// If it does not fit ([`Chunk::fits`]), crosses a granule, is not of whole sectors, or if its height is not above the
    /// chunk's first. Nothing is added then.
    pub fn push(&mut self, address: Address, height: u64, before: Before<'_>) -> Result<(), HistoryError> {
        let bytes = match before {
            Before::Zero { sectors } => usize::from(sectors) * SECTOR_BYTES as usize,
            Before::Bytes(bytes) => bytes.len(),
        };
        let most = usize::from(GRANULE_SECTORS - address.in_granule()) * SECTOR_BYTES as usize;
        if bytes == 0 || bytes > most || !bytes.is_multiple_of(SECTOR_BYTES as usize) {
            return Err(HistoryError::Limit { what: "a record", limit: most as u64 });
        }
        let sectors = (bytes / SECTOR_BYTES as usize) as u16;
        if !self.fits(sectors) {
            return Err(HistoryError::Limit { what: "a chunk", limit: CHUNK_BYTES_MAX as u64 });
        }
        if height <= self.first_height {
            return Err(HistoryError::Order { what: "the stamp", found: height, after: self.first_height });
        }
        let (stored, stored_bytes) = match before {
            Before::Bytes(bytes) if !is_zero(bytes) => self.store(bytes),
            Before::Zero { .. } | Before::Bytes(_) => (Stored::Zero, 0),
        };
        let data = &self.buf[self.data_end..self.data_end + stored_bytes];
        let crc = if stored == Stored::Zero { 0 } else { crc32fast::hash(data) };
        let (address, kind, stored_bytes) = (address.number(), stored as u8, stored_bytes as u32);
        self.rows.put(&mut self.table, &Row { address, stamp: height, sectors, kind, stored_bytes, crc });
        self.data_end += stored_bytes as usize;
        self.records += 1;
        Ok(())
    }

    /// Puts the bytes behind those that are there: compressed if that pays.
    fn store(&mut self, bytes: &[u8]) -> (Stored, usize) {
        let room = &mut self.buf[self.data_end..];
        if self.sampling.wants() {
            self.tries += 1;
            // A table of 16-bit numbers is cleared in half the time, but does not reach over a whole granule.
            let table = if bytes.len() < usize::from(u16::MAX) { &mut self.small } else { &mut self.large };
            let paid = compress_into_with_table(bytes, room, table).ok().filter(|&got| got <= bytes.len() / 8 * 7);
            self.sampling.tell(paid.is_some());
            if let Some(got) = paid {
                return (Stored::Lz4, got);
            }
        }
        room[..bytes.len()].copy_from_slice(bytes);
        (Stored::Plain, bytes.len())
    }

    /// Adds a point: a record of the stream ends at `height`, a multiple of 8, and was made at `time_ns`. A time before
    /// that of the newest point counts as that one.
    ///
    /// # Errors
    /// If there are [`CHUNK_POINTS_MAX`], or the height is not above that of the point before.
    pub fn point(&mut self, height: u64, time_ns: u64) -> Result<(), HistoryError> {
        let room = (self.end() + POINT_BYTES_MAX).next_multiple_of(BLOCK_BYTES) <= CHUNK_BYTES_MAX;
        if self.point_count as usize >= CHUNK_POINTS_MAX || !room {
            return Err(HistoryError::Limit { what: "points of a chunk", limit: CHUNK_POINTS_MAX as u64 });
        }
        let point = Point { height, time_ns: time_ns.max(self.last_time_ns) };
        if self.point_count == 0 {
            self.first_time_ns = point.time_ns;
            self.newest_point = PointState::new(self.first_height, point.time_ns);
        }
        if !self.newest_point.admits(point) {
            let after = self.newest_point.newest().height;
            return Err(HistoryError::Order { what: "the height of a point", found: height, after });
        }
        self.newest_point.put(&mut self.points, point);
        self.last_time_ns = point.time_ns;
        self.point_count += 1;
        Ok(())
    }

    /// Whether there is neither a record nor a point.
    pub fn is_empty(&self) -> bool {
        self.records == 0 && self.point_count == 0
    }

    /// Records so far.
    pub fn records(&self) -> usize {
        self.records as usize
    }

    /// Points so far.
    pub fn points(&self) -> usize {
        self.point_count as usize
    }

    /// See [`Chunk::begin`].
    pub fn first_height(&self) -> u64 {
        self.first_height
    }

    /// How many records were given to LZ4, ever: the rest cost no time.
    pub fn tries(&self) -> u64 {
        self.tries
    }

    /// The records as entries of the chunk at `offset` of layer `layer`.
    pub fn entries(&self, layer: u32, offset: u64) -> impl Iterator<Item = Entry> + '_ {
        let mut at = data_start(offset);
        Rows::new(&self.table, self.records, self.first_height).map_while(move |row| {
            let entry = entry_of(&row?, layer, at)?;
            at += u64::from(entry.stored_bytes);
            Some(entry)
        })
    }

    /// Puts it together for its place: see [`Chunk::sealed`].
    pub(super) fn seal(&mut self, place: &Place<'_>) -> ChunkHeader {
        let table = self.data_end..self.data_end + self.table.len();
        let points = table.end..table.end + self.points.len();
        let end = points.end.next_multiple_of(BLOCK_BYTES);
        let (first_time_ns, last_time_ns) = match self.point_count {
            0 => (place.last_time_ns, place.last_time_ns),
            _ => (self.first_time_ns, self.last_time_ns),
        };
        let header = ChunkHeader {
            magic: CHUNK_MAGIC.into(),
            layer: place.layer.into(),
            offset: place.offset.into(),
            first_height: self.first_height.into(),
            complete_to: place.complete_to.into(),
            first_time_ns: first_time_ns.into(),
            last_time_ns: last_time_ns.into(),
            records: self.records.into(),
            points: self.point_count.into(),
            data_bytes: ((self.data_end - CHUNK_HEADER_BYTES) as u32).into(),
            table_bytes: (self.table.len() as u32).into(),
            points_bytes: (self.points.len() as u32).into(),
            table_crc: crc32fast::hash(&self.table).into(),
            points_crc: crc32fast::hash(&self.points).into(),
            previous_crc: place.previous_crc.into(),
            reserved: 0.into(),
            header_crc: 0.into(),
        }
        .sealed(place.group);
        self.buf[..CHUNK_HEADER_BYTES].copy_from_slice(header.as_bytes());
        self.buf[table].copy_from_slice(&self.table);
        self.buf[points.clone()].copy_from_slice(&self.points);
        self.buf[points.end..end].fill(0);
        header
    }

    /// What is to be written, once it is put together.
    pub(super) fn sealed(&self, header: &ChunkHeader) -> &[u8] {
        &self.buf[..header.total_bytes() as usize]
    }

    /// Its memory, for somebody else to write, against other: of as many bytes, or new.
    pub(super) fn exchange(&mut self, spare: Option<AlignedBuf>) -> AlignedBuf {
        let spare = spare.filter(|spare| spare.len() == self.buf.len());
        std::mem::replace(&mut self.buf, spare.unwrap_or_else(|| AlignedBuf::new(CHUNK_BYTES_MAX + SLACK_BYTES)))
    }
}

/// Most bytes that are not zero show it at once.
fn is_zero(bytes: &[u8]) -> bool {
    let any = |part: &[u8]| part.iter().fold(0, |any, byte| any | byte) != 0;
    bytes.chunks(256).all(|part| !any(part))
}
