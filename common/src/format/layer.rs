//! The bytes of a layer: a stretch of a group's history, append-only.
//!
//! ```text
//! LayerHeader, padded to 4096
//! chunk: ChunkHeader | stored bytes of its records back to back | table | points | zeroes up to a multiple of 4096
//! chunk: …
//! ```
//!
//! A chunk is what one synced append wrote. Its table has a [`Row`] for each record, in the order of the stored bytes, so
//! where a record's bytes are follows from the rows before. Its points name every record of the stream that it covers,
//! also those that changed nothing. Both are numbers of variable length: a row of a random 4 KiB write takes about 16
//! bytes and its point 5.
//!
//! A chunk counts only where it was written: its header's CRC covers the group, the layer's number and the offset, and
//! each header holds the CRC of the one before (the first: of the layer's header).

use super::{BLOCK_BYTES, FORMAT_VERSION, FormatError};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Longest record, in sectors of 512 bytes.
pub const RECORD_SECTORS_MAX: u16 = 128;
/// Most bytes of one chunk, padding included.
pub const CHUNK_BYTES_MAX: u32 = 8 << 20;
/// Most records of one chunk.
pub const CHUNK_RECORDS_MAX: u32 = 32 << 10;
/// Most points of one chunk.
pub const CHUNK_POINTS_MAX: u32 = 128 << 10;
/// Least bytes of a row.
pub const ROW_BYTES_MIN: usize = 3;
/// Most bytes of a row.
pub const ROW_BYTES_MAX: usize = 2 * VARINT_BYTES_MAX + 2 + 3 + 4;
/// Least bytes of a point.
pub const POINT_BYTES_MIN: usize = 2;
/// Most bytes of a point.
pub const POINT_BYTES_MAX: usize = 2 * VARINT_BYTES_MAX;
/// Heights of points are multiples of this.
pub const POINT_ALIGN: u64 = 8;

const VARINT_BYTES_MAX: usize = 10;
const SECTOR_BYTES: u32 = 512;

/// The first block of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct LayerHeader {
    /// [`LAYER_MAGIC`].
    pub magic: [u8; 8],
    /// [`FORMAT_VERSION`]; stays at this offset in every version.
    pub version: U16,
    /// Zero.
    pub reserved: U16,
    /// The layer's number in its group; from 1.
    pub number: U32,
    /// The group's identity.
    pub group: [u8; 16],
    /// All changes with a stamp up to this one are in earlier layers.
    pub first_height: U64,
    /// When it was begun (the source's clock), nanoseconds since 1970: no point in it is earlier.
    pub time_ns: U64,
    /// Zero.
    pub tail: U32,
    /// CRC-32 of the bytes before.
    pub crc: U32,
}

/// See [`LayerHeader::magic`].
pub const LAYER_MAGIC: [u8; 8] = *b"VARVELAY";
const _: () = assert!(size_of::<LayerHeader>() == 56);
const _: () = assert!(core::mem::offset_of!(LayerHeader, version) == 8);

impl LayerHeader {
    /// A header with its checksum.
    pub fn new(group: [u8; 16], number: u32, first_height: u64, time_ns: u64) -> Self {
        let mut header = Self {
            magic: LAYER_MAGIC,
            version: FORMAT_VERSION.into(),
            reserved: 0.into(),
            number: number.into(),
            group,
            first_height: first_height.into(),
            time_ns: time_ns.into(),
            tail: 0.into(),
            crc: 0.into(),
        };
        header.crc = header.checksum().into();
        header
    }

    fn checksum(&self) -> u32 {
        crc32fast::hash(&self.as_bytes()[..core::mem::offset_of!(LayerHeader, crc)])
    }

    /// The layer's first block.
    pub fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        block[..size_of::<Self>()].copy_from_slice(self.as_bytes());
        block
    }

    /// Reads the header from the start of a layer.
    pub fn decode(block: &[u8]) -> Result<Self, FormatError> {
        let damaged = FormatError::Damaged("layer");
        let (header, _) = Self::read_from_prefix(block).map_err(|_| damaged.clone())?;
        if header.magic != LAYER_MAGIC {
            return Err(damaged);
        }
        if header.version.get() != FORMAT_VERSION {
            return Err(FormatError::Version { what: "a layer", found: header.version.get() });
        }
        if header.crc.get() != header.checksum() {
            return Err(damaged);
        }
        Ok(header)
    }
}

/// Before every chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChunkHeader {
    /// [`CHUNK_MAGIC`].
    pub magic: U32,
    /// Number of the layer that it was written to.
    pub layer: U32,
    /// Offset of this header in the layer.
    pub offset: U64,
    /// All changes with a stamp up to this one are in earlier chunks.
    pub first_height: U64,
    /// All changes with a stamp up to this one are in this or earlier chunks.
    pub complete_to: U64,
    /// Time of the first point, nanoseconds since 1970; without points that of the newest point before.
    pub first_time_ns: U64,
    /// Time of the last point; without points as `first_time_ns`.
    pub last_time_ns: U64,
    /// Rows of the table.
    pub records: U32,
    /// Points.
    pub points: U32,
    /// Stored bytes of all records.
    pub data_bytes: U32,
    /// Bytes of the table.
    pub table_bytes: U32,
    /// Bytes of the points.
    pub points_bytes: U32,
    /// CRC-32 of the table.
    pub table_crc: U32,
    /// CRC-32 of the points.
    pub points_crc: U32,
    /// `header_crc` of the chunk before, of the first one [`LayerHeader::crc`]: a chunk that was lost is missed.
    pub previous_crc: U32,
    /// Zero.
    pub reserved: U32,
    /// CRC-32 of the group's identity and the header's bytes before.
    pub header_crc: U32,
}

/// See [`ChunkHeader::magic`].
pub const CHUNK_MAGIC: u32 = u32::from_le_bytes(*b"VCHK");
/// Bytes of a [`ChunkHeader`].
pub const CHUNK_HEADER_BYTES: usize = size_of::<ChunkHeader>();
const _: () = assert!(CHUNK_HEADER_BYTES == 88);

impl ChunkHeader {
    /// Sets the checksum.
    #[must_use]
    pub fn sealed(mut self, group: &[u8; 16]) -> Self {
        self.header_crc = self.checksum(group).into();
        self
    }

    fn checksum(&self, group: &[u8; 16]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(group);
        hasher.update(&self.as_bytes()[..core::mem::offset_of!(ChunkHeader, header_crc)]);
        hasher.finalize()
    }

    /// Reads a chunk's header; `None` if it is not one that belongs at `offset` of this layer of this group.
    pub fn decode(bytes: &[u8], group: &[u8; 16], layer: u32, offset: u64) -> Option<Self> {
        let (header, _) = Self::read_from_prefix(bytes).ok()?;
        let here = header.magic.get() == CHUNK_MAGIC && header.layer.get() == layer && header.offset.get() == offset;
        (here && header.header_crc.get() == header.checksum(group)).then_some(header)
    }

    /// Whether its numbers agree with each other and with the limits.
    pub fn is_possible(&self) -> bool {
        let (records, points) = (self.records.get(), self.points.get());
        let counts = records <= CHUNK_RECORDS_MAX && points <= CHUNK_POINTS_MAX;
        let within = |bytes: U32, count: u32, least: usize, most: usize| {
            let (bytes, count) = (u64::from(bytes.get()), u64::from(count));
            (count * least as u64..=count * most as u64).contains(&bytes)
        };
        counts
            && within(self.table_bytes, records, ROW_BYTES_MIN, ROW_BYTES_MAX)
            && within(self.points_bytes, points, POINT_BYTES_MIN, POINT_BYTES_MAX)
            && within(self.data_bytes, records, 0, usize::from(RECORD_SECTORS_MAX) * SECTOR_BYTES as usize)
            && self.total_bytes() <= u64::from(CHUNK_BYTES_MAX)
            && self.first_height.get() <= self.complete_to.get()
            && self.first_time_ns.get() <= self.last_time_ns.get()
            && self.reserved.get() == 0
    }

    /// Where in the chunk the table begins.
    pub fn table_start(&self) -> u64 {
        CHUNK_HEADER_BYTES as u64 + u64::from(self.data_bytes.get())
    }

    /// Bytes that it takes, padding included.
    pub fn total_bytes(&self) -> u64 {
        let end = self.table_start() + u64::from(self.table_bytes.get()) + u64::from(self.points_bytes.get());
        end.next_multiple_of(BLOCK_BYTES as u64)
    }
}

/// What a chunk's table says of one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Number of the first sector: the volume in the upper 16 bits, the sector in the lower 48.
    pub address: u64,
    /// Height after the change that replaced the bytes.
    pub stamp: u64,
    /// Length, 1 to [`RECORD_SECTORS_MAX`].
    pub sectors: u16,
    /// 0: zeroes, nothing stored; 1: as they were; 2: one LZ4 block.
    pub kind: u8,
    /// Bytes stored.
    pub stored_bytes: u32,
    /// CRC-32 of them; 0 for zeroes.
    pub crc: u32,
}

const KIND_ZERO: u8 = 0;
const KIND_PLAIN: u8 = 1;
const KIND_LZ4: u8 = 2;

/// What rows are told relative to: the end and the stamp of the row before.
#[derive(Clone, Copy, Debug)]
pub struct RowState {
    address: u64,
    stamp: u64,
}

impl RowState {
    /// Before the first row of a chunk.
    pub fn new(first_height: u64) -> Self {
        Self { address: 0, stamp: first_height }
    }

    fn pass(&mut self, row: &Row) {
        *self = Self { address: row.address.wrapping_add(u64::from(row.sectors)), stamp: row.stamp };
    }

    /// Appends `row` to a table.
    pub fn put(&mut self, table: &mut Vec<u8>, row: &Row) {
        put_varint(table, zigzag(row.address.wrapping_sub(self.address)));
        put_varint(table, zigzag(row.stamp.wrapping_sub(self.stamp)));
        put_varint(table, u64::from(row.sectors) << 2 | u64::from(row.kind));
        if row.kind == KIND_LZ4 {
            put_varint(table, u64::from(row.stored_bytes));
        }
        if row.kind != KIND_ZERO {
            table.extend_from_slice(&row.crc.to_le_bytes());
        }
        self.pass(row);
    }

    fn take(&mut self, table: &mut &[u8]) -> Option<Row> {
        let address = self.address.wrapping_add(unzigzag(take_varint(table)?));
        let stamp = self.stamp.wrapping_add(unzigzag(take_varint(table)?));
        let length = take_varint(table)?;
        let (sectors, kind) = (u16::try_from(length >> 2).ok()?, (length & 3) as u8);
        if !(1..=RECORD_SECTORS_MAX).contains(&sectors) {
            return None;
        }
        let plain_bytes = u32::from(sectors) * SECTOR_BYTES;
        let stored_bytes = match kind {
            KIND_ZERO => 0,
            KIND_PLAIN => plain_bytes,
            KIND_LZ4 => u32::try_from(take_varint(table)?).ok().filter(|bytes| (1..plain_bytes).contains(bytes))?,
            _ => return None,
        };
        let crc = if kind == KIND_ZERO { 0 } else { u32::from_le_bytes(take_array(table)?) };
        let row = Row { address, stamp, sectors, kind, stored_bytes, crc };
        self.pass(&row);
        Some(row)
    }
}

/// The rows of a table, in order. `None` in place of a row that is none; nothing follows it.
#[derive(Clone, Debug)]
pub struct Rows<'a> {
    table: &'a [u8],
    left: u32,
    state: RowState,
}

impl<'a> Rows<'a> {
    /// Of a table that should hold exactly `records` rows.
    pub fn new(table: &'a [u8], records: u32, first_height: u64) -> Self {
        Self { table, left: records, state: RowState::new(first_height) }
    }
}

impl Iterator for Rows<'_> {
    type Item = Option<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            // Bytes behind the last row: not a table of this many.
            return (!std::mem::take(&mut self.table).is_empty()).then_some(None);
        }
        self.left -= 1;
        let row = self.state.take(&mut self.table);
        if row.is_none() {
            (self.left, self.table) = (0, &[]);
        }
        Some(row)
    }
}

/// One record of the stream: the height after it and its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Multiple of [`POINT_ALIGN`].
    pub height: u64,
    /// Nanoseconds since 1970, the source's clock, never less than that of the point before.
    pub time_ns: u64,
}

/// What points are told relative to: the one before.
#[derive(Clone, Copy, Debug)]
pub struct PointState(Point);

impl PointState {
    /// Before the first point of a chunk.
    pub fn new(first_height: u64, first_time_ns: u64) -> Self {
        Self(Point { height: first_height - first_height % POINT_ALIGN, time_ns: first_time_ns })
    }

    /// The newest.
    pub fn newest(&self) -> Point {
        self.0
    }

    /// Whether `point` may come next.
    pub fn admits(&self, point: Point) -> bool {
        point.height > self.0.height && point.height.is_multiple_of(POINT_ALIGN) && point.time_ns >= self.0.time_ns
    }

    /// Appends a point that [`PointState::admits`].
    pub fn put(&mut self, points: &mut Vec<u8>, point: Point) {
        debug_assert!(self.admits(point));
        put_varint(points, point.height.wrapping_sub(self.0.height) / POINT_ALIGN);
        put_varint(points, point.time_ns.wrapping_sub(self.0.time_ns));
        self.0 = point;
    }

    fn take(&mut self, points: &mut &[u8]) -> Option<Point> {
        let height = take_varint(points)?.checked_mul(POINT_ALIGN)?.checked_add(self.0.height)?;
        let time_ns = take_varint(points)?.checked_add(self.0.time_ns)?;
        let point = Point { height, time_ns };
        self.admits(point).then(|| {
            self.0 = point;
            point
        })
    }
}

/// The points of a chunk, in order. `None` in place of a point that is none; nothing follows it.
#[derive(Clone, Debug)]
pub struct Points<'a> {
    points: &'a [u8],
    left: u32,
    state: PointState,
}

impl<'a> Points<'a> {
    /// Of bytes that should hold exactly `count` points.
    pub fn new(points: &'a [u8], count: u32, first_height: u64, first_time_ns: u64) -> Self {
        Self { points, left: count, state: PointState::new(first_height, first_time_ns) }
    }
}

impl Iterator for Points<'_> {
    type Item = Option<Point>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return (!std::mem::take(&mut self.points).is_empty()).then_some(None);
        }
        self.left -= 1;
        let point = self.state.take(&mut self.points);
        if point.is_none() {
            (self.left, self.points) = (0, &[]);
        }
        Some(point)
    }
}

fn zigzag(difference: u64) -> u64 {
    let signed = difference as i64;
    (signed << 1 ^ signed >> 63) as u64
}

fn unzigzag(number: u64) -> u64 {
    number >> 1 ^ (number & 1).wrapping_neg()
}

/// Seven bits a byte, lowest first; the top bit says that more follow.
fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for (index, &byte) in bytes.iter().enumerate().take(VARINT_BYTES_MAX) {
        let (shift, bits) = (7 * index as u32, u64::from(byte & 0x7f));
        // The tenth byte has room for one bit only.
        if bits << shift >> shift != bits {
            return None;
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            *bytes = &bytes[index + 1..];
            return Some(number);
        }
    }
    None
}

fn take_array<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (array, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*array)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GROUP: [u8; 16] = [6; 16];

    fn chunk() -> ChunkHeader {
        ChunkHeader {
            magic: CHUNK_MAGIC.into(),
            layer: 7.into(),
            offset: 4096.into(),
            first_height: 0x100.into(),
            complete_to: 0x200.into(),
            first_time_ns: 0x30.into(),
            last_time_ns: 0x40.into(),
            records: 2.into(),
            points: 1.into(),
            data_bytes: 512.into(),
            table_bytes: 20.into(),
            points_bytes: 3.into(),
            table_crc: 1.into(),
            points_crc: 2.into(),
            previous_crc: 3.into(),
            reserved: 0.into(),
            header_crc: 0.into(),
        }
    }

    fn rows() -> [Row; 4] {
        let row =
            |address, stamp, sectors, kind, stored_bytes, crc| Row { address, stamp, sectors, kind, stored_bytes, crc };
        [
            row(0x1000, 0x108, 8, 1, 4096, 0x0403_0201),
            row(0x1008, 0x108, 128, 0, 0, 0),
            row(0x0800, 0x101, 16, 2, 300, 0xffff_ffff),
            row(u64::MAX - 4, u64::MAX, 1, 1, 512, 0),
        ]
    }

    /// Files written by this version must be readable by every later one: these bytes are frozen.
    #[test]
    fn golden_bytes() {
        let header = LayerHeader::new([1; 16], 9, 0x1234, 0x5678);
        let mut golden = b"VARVELAY\x01\0\0\0\x09\0\0\0".to_vec();
        golden.extend([1; 16]);
        golden.extend([0x34, 0x12, 0, 0, 0, 0, 0, 0, 0x78, 0x56, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend(crc32fast::hash(&golden).to_le_bytes());
        assert_eq!(header.as_bytes(), golden);
        assert_eq!(LayerHeader::decode(&header.encode()), Ok(header));

        let sealed = chunk().sealed(&GROUP);
        let mut golden = b"VCHK\x07\0\0\0\0\x10\0\0\0\0\0\0".to_vec();
        golden.extend([
            0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0x30, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0,
        ]);
        golden.extend([2, 0, 0, 0, 1, 0, 0, 0, 0, 2, 0, 0, 20, 0, 0, 0, 3, 0, 0, 0]);
        golden.extend([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend(crc32fast::hash(&[&GROUP[..], &golden].concat()).to_le_bytes());
        assert_eq!(sealed.as_bytes(), golden);
        assert_eq!(ChunkHeader::decode(&golden, &GROUP, 7, 4096), Some(sealed));
        assert!(sealed.is_possible());

        let (mut table, mut state) = (Vec::new(), RowState::new(0x100));
        rows().iter().for_each(|row| state.put(&mut table, row));
        let mut golden = vec![0x80, 0x40, 0x10, 0x21, 1, 2, 3, 4];
        golden.extend([0, 0, 0x80, 4]);
        golden.extend([0x8f, 0x22, 0x0d, 0x42, 0xac, 2, 0xff, 0xff, 0xff, 0xff]);
        golden.extend([0xa9, 0x20, 0x83, 4, 5, 0, 0, 0, 0]);
        assert_eq!(table, golden);
        assert_eq!(Rows::new(&table, 4, 0x100).collect::<Option<Vec<_>>>(), Some(rows().to_vec()));

        let (mut bytes, mut state) = (Vec::new(), PointState::new(0x101, 0x30));
        let points = [Point { height: 0x108, time_ns: 0x30 }, Point { height: 0x1108, time_ns: 0x130 }];
        points.iter().for_each(|&point| state.put(&mut bytes, point));
        assert_eq!(bytes, [1, 0, 0x80, 4, 0x80, 2]);
        assert_eq!(Points::new(&bytes, 2, 0x101, 0x30).collect::<Option<Vec<_>>>(), Some(points.to_vec()));
    }

    #[test]
    fn a_chunk_counts_only_where_it_was_written() {
        let bytes = chunk().sealed(&GROUP);
        let decode = |group: &[u8; 16], layer, offset| ChunkHeader::decode(bytes.as_bytes(), group, layer, offset);
        assert!(decode(&GROUP, 7, 4096).is_some());
        assert!(decode(&[5; 16], 7, 4096).is_none(), "another group");
        assert!(decode(&GROUP, 8, 4096).is_none(), "another layer");
        assert!(decode(&GROUP, 7, 8192).is_none(), "another place");
    }

    #[test]
    fn impossible_numbers_are_refused() {
        let changes: [fn(&mut ChunkHeader); 9] = [
            |chunk| chunk.records = (CHUNK_RECORDS_MAX + 1).into(),
            |chunk| chunk.records = 7.into(),
            |chunk| chunk.points = 2.into(),
            |chunk| chunk.points = u32::MAX.into(),
            |chunk| chunk.data_bytes = (2 * 65536 + 1).into(),
            |chunk| chunk.table_bytes = u32::MAX.into(),
            |chunk| chunk.complete_to = 0xff.into(),
            |chunk| chunk.first_time_ns = 0x41.into(),
            |chunk| chunk.reserved = 1.into(),
        ];
        for change in changes {
            let mut header = chunk();
            change(&mut header);
            assert!(!header.is_possible(), "{header:?}");
        }
        let mut most = chunk();
        (most.records, most.data_bytes) = (200.into(), (8 << 20).into());
        most.table_bytes = 1000.into();
        assert!(!most.is_possible(), "longer than a chunk");
    }

    #[test]
    fn rows_and_points_that_cannot_be_end_the_list() {
        let short = [0x80, 0x40, 0x10, 0x21, 1, 2, 3];
        assert_eq!(Rows::new(&short, 1, 0).collect::<Vec<_>>(), [None]);
        assert_eq!(Rows::new(&[], 2, 0).collect::<Vec<_>>(), [None]);
        assert_eq!(Rows::new(&[0, 0, 4, 0, 0, 4, 9], 2, 0).last(), Some(None), "bytes behind the last");
        assert_eq!(Rows::new(&[0, 0, 0], 1, 0).collect::<Vec<_>>(), [None], "no sectors");
        assert_eq!(Rows::new(&[0, 0, 0x84, 4], 1, 0).collect::<Vec<_>>(), [None], "129 sectors");
        assert_eq!(Rows::new(&[0, 0, 7, 0, 0, 0, 0], 1, 0).collect::<Vec<_>>(), [None], "kind 3");
        assert_eq!(Rows::new(&[0, 0, 6, 0x80, 4, 0, 0, 0, 0], 1, 0).collect::<Vec<_>>(), [None], "LZ4 of 512 in 512");
        assert_eq!(Points::new(&[0, 5], 1, 0, 0).collect::<Vec<_>>(), [None], "no higher than the one before");
        assert_eq!(Points::new(&[1, 5, 9], 1, 0, 0).last(), Some(None), "bytes behind the last");
        let far = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0];
        assert_eq!(Points::new(&far, 1, 0, 0).collect::<Vec<_>>(), [None], "beyond every height");
        let mut varint = &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2][..];
        assert_eq!(take_varint(&mut varint), None, "65 bits");
    }

    proptest! {
        #[test]
        fn rows_come_back(raw in prop::collection::vec((any::<u64>(), any::<u64>(), 1u16..=128, 0u8..3, any::<u32>(), any::<u32>()), 0..50), first: u64) {
            let rows: Vec<Row> = raw.into_iter().map(|(address, stamp, sectors, kind, stored, crc)| {
                let plain = u32::from(sectors) * SECTOR_BYTES;
                let stored_bytes = match kind { 0 => 0, 1 => plain, _ => 1 + stored % (plain - 1) };
                Row { address, stamp, sectors, kind, stored_bytes, crc: if kind == 0 { 0 } else { crc } }
            }).collect();
            let (mut table, mut state) = (Vec::new(), RowState::new(first));
            rows.iter().for_each(|row| state.put(&mut table, row));
            prop_assert!(table.len() <= rows.len() * ROW_BYTES_MAX && table.len() >= rows.len() * ROW_BYTES_MIN);
            prop_assert_eq!(Rows::new(&table, rows.len() as u32, first).collect::<Option<Vec<_>>>(), Some(rows));
        }

        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), count: u32, first: u64, time: u64, bit in 0usize..88 * 8) {
            let _ = LayerHeader::decode(&bytes);
            if let Some(header) = ChunkHeader::decode(&bytes, &GROUP, 1, 2) { let _ = header.is_possible(); }
            if let Ok((header, _)) = ChunkHeader::read_from_prefix(&bytes) {
                let _ = (header.is_possible(), header.total_bytes());
            }
            prop_assert!(Rows::new(&bytes, count, first).count() <= bytes.len() + 1);
            prop_assert!(Points::new(&bytes, count, first, time).count() <= bytes.len() + 1);
            let mut damaged = chunk().sealed(&GROUP);
            damaged.as_mut_bytes()[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(ChunkHeader::decode(damaged.as_bytes(), &GROUP, 7, 4096).is_none(), "any flipped bit is seen");
        }
    }
}
