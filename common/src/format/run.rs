//! The bytes of a run: a sorted index of what one layer, or 8^level layers, hold.
//!
//! ```text
//! blocks   `blocks` times 4096 bytes: BlockHeader, entries, zeroes; each is read without the others
//! fences   the first address of every block, u64 each; one CRC for all
//! filter   see [`filter_may_have`]; none if the run is large; one CRC
//! tail     bytes that the index does not know (level 0: the layer's chunk directory); one CRC
//! zeroes   up to a multiple of 4096
//! footer   RunFooter in the last 4096 bytes of the file, in every version
//! ```
//!
//! An entry, in this order: flags (u8); address, the difference to the entry before (varint); height above
//! `base_height`, in units of 8 unless [`ODD_HEIGHT`] (3, 4, 5 or 8 bytes); layer above `base_layer` (varint, only if the
//! run is of several layers); offset (u32); CRC (u32, not for zeroes); sectors - 1 (u8, only with [`OTHER_SECTORS`]);
//! skip and record sectors - 1 (u8 each, only with [`PARTIAL`]); stored bytes (varint, only for LZ4).
//! 15 bytes for a random 4 KiB record, and one in the filter.

use super::{BLOCK_BYTES, FORMAT_VERSION, FormatError};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

mod filter;

pub use filter::{FILTER_BLOCK_BYTES, FILTER_UNIT_SECTORS, filter_add, filter_bytes, filter_may_have};

/// See [`RunFooter::magic`].
pub const RUN_MAGIC: [u8; 8] = *b"VARVERUN";
/// Bytes of a block, and of the space that the footer has.
pub const RUN_BLOCK_BYTES: usize = BLOCK_BYTES;
/// Bytes of one fence.
pub const FENCE_BYTES: usize = 8;

/// The low two bits of an entry's flags: how its bytes are stored (0 zeroes, 1 plain, 2 LZ4).
pub const STORED_BITS: u8 = 0b11;
/// The entry has another number of sectors than the one before it in the block (the first: than 8).
pub const OTHER_SECTORS: u8 = 1 << 2;
/// The entry is a part of its record.
pub const PARTIAL: u8 = 1 << 3;
/// The height is not a multiple of 8 above the base: it stands in units of 1.
pub const ODD_HEIGHT: u8 = 1 << 4;
/// Where the code of the height's length is: 3, 4, 5 or 8 bytes.
const HEIGHT_SHIFT: u8 = 5;
const HEIGHT_BYTES: [usize; 4] = [3, 4, 5, 8];
const UNUSED_FLAGS: u8 = 1 << 7;

/// Longest entry: flags, address, height, layer, offset, CRC, sectors, part, stored bytes.
const ENTRY_BYTES_MAX: usize = 1 + 10 + 8 + 5 + 4 + 4 + 1 + 2 + 5;
/// Zeroes at the end of a block, so that a reader may load 8 bytes wherever an entry may begin.
const SLACK_BYTES: usize = 8;
/// Most entries of a block: the shortest (zeroes) has 9 bytes.
pub const BLOCK_ENTRIES_MAX: usize = (RUN_BLOCK_BYTES - BLOCK_HEADER_BYTES - SLACK_BYTES) / 9;

/// One entry as numbers; the timeline's own type checks what they mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunEntry {
    /// Volume and first sector.
    pub address: u64,
    /// Stamp of the change.
    pub height: u64,
    /// Number of the layer that holds the record.
    pub layer: u32,
    /// Where in its file.
    pub offset: u32,
    /// CRC-32 of the stored bytes.
    pub crc: u32,
    /// How many they are.
    pub stored_bytes: u32,
    /// Sectors that the entry speaks for, 1 to 256.
    pub sectors: u16,
    /// Sectors of the record before them, at most 255.
    pub skip: u16,
    /// Sectors of the record, 1 to 256.
    pub record_sectors: u16,
    /// 0 zeroes, 1 plain, 2 LZ4.
    pub stored: u8,
}

/// The begin of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BlockHeader {
    /// CRC-32 of the other 4092 bytes.
    pub crc: U32,
    /// Number of this block in its run, from 0: a block in the wrong place is seen.
    pub index: U32,
    /// Entries in it, at least 1.
    pub entries: U16,
    /// 1: every entry says its layer.
    pub layers: u8,
    /// Zero.
    pub reserved: u8,
    /// Added to every entry's layer.
    pub base_layer: U32,
    /// Added to every entry's height; a multiple of 8.
    pub base_height: U64,
    /// The first entry's address.
    pub first_address: U64,
}

/// Bytes of a [`BlockHeader`].
pub const BLOCK_HEADER_BYTES: usize = size_of::<BlockHeader>();
const _: () = assert!(BLOCK_HEADER_BYTES == 32);

/// Fills one block after the other.
#[derive(Debug)]
pub struct BlockBuilder {
    bytes: Box<[u8; RUN_BLOCK_BYTES]>,
    used: usize,
    entries: u16,
    index: u32,
    several_layers: bool,
    base_layer: u32,
    base_height: u64,
    first_address: u64,
    address: u64,
    sectors: u16,
}

/// What a block of entries needs before any entry.
const FIRST_SECTORS: u16 = 8;

impl BlockBuilder {
    /// For a run of `layers` layers from `first_layer` on, with heights from `first_height` on.
    pub fn new(first_layer: u32, layers: u32, first_height: u64) -> Self {
        Self {
            bytes: Box::new([0; RUN_BLOCK_BYTES]),
            used: BLOCK_HEADER_BYTES,
            entries: 0,
            index: 0,
            several_layers: layers > 1,
            base_layer: first_layer,
            base_height: first_height & !7,
            first_address: 0,
            address: 0,
            sectors: FIRST_SECTORS,
        }
    }

    /// Adds an entry; false if the block is full: [`BlockBuilder::finish`] it and push again. Addresses do not fall,
    /// heights and layers are not below those given to `new`, sectors are within [`RunEntry`]'s.
    #[inline]
    pub fn push(&mut self, entry: &RunEntry) -> bool {
        if self.used + ENTRY_BYTES_MAX + SLACK_BYTES > RUN_BLOCK_BYTES {
            return false;
        }
        if self.entries == 0 {
            self.first_address = entry.address;
            self.address = entry.address;
        }
        let mut at = self.used + 1;
        let bytes = &mut *self.bytes;
        put_varint(bytes, &mut at, entry.address - self.address);
        let above = entry.height - self.base_height;
        let (odd, number) = if above.is_multiple_of(8) { (0, above >> 3) } else { (ODD_HEIGHT, above) };
        let code = match number {
            0..0x100_0000 => 0,
            0x100_0000..0x1_0000_0000 => 1,
            0x1_0000_0000..0x100_0000_0000 => 2,
            _ => 3,
        };
        put(bytes, &mut at, &number.to_le_bytes());
        at -= 8 - HEIGHT_BYTES[usize::from(code)];
        if self.several_layers {
            put_varint(bytes, &mut at, u64::from(entry.layer - self.base_layer));
        }
        put(bytes, &mut at, &entry.offset.to_le_bytes());
        if entry.stored != 0 {
            put(bytes, &mut at, &entry.crc.to_le_bytes());
        }
        let mut flags = entry.stored | odd | code << HEIGHT_SHIFT;
        if entry.sectors != self.sectors {
            flags |= OTHER_SECTORS;
            put(bytes, &mut at, &[(entry.sectors - 1) as u8]);
        }
        if entry.sectors != entry.record_sectors {
            flags |= PARTIAL;
            put(bytes, &mut at, &[entry.skip as u8, (entry.record_sectors - 1) as u8]);
        }
        if entry.stored == 2 {
            put_varint(bytes, &mut at, u64::from(entry.stored_bytes));
        }
        bytes[self.used] = flags;
        self.used = at;
        self.entries += 1;
        self.address = entry.address;
        self.sectors = entry.sectors;
        true
    }

    /// Entries in the block that is being filled.
    pub fn entries(&self) -> usize {
        usize::from(self.entries)
    }

    /// The first entry's address.
    pub fn first_address(&self) -> u64 {
        self.first_address
    }

    /// Appends the finished block to `out` and begins the next one.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        // A number that was put with 8 bytes may have left some behind the end.
        self.bytes[self.used..].fill(0);
        let mut header = BlockHeader {
            crc: 0.into(),
            index: self.index.into(),
            entries: self.entries.into(),
            layers: u8::from(self.several_layers),
            reserved: 0,
            base_layer: self.base_layer.into(),
            base_height: self.base_height.into(),
            first_address: self.first_address.into(),
        };
        self.bytes[..BLOCK_HEADER_BYTES].copy_from_slice(header.as_bytes());
        header.crc = crc32fast::hash(&self.bytes[4..]).into();
        self.bytes[..4].copy_from_slice(header.crc.as_bytes());
        out.extend_from_slice(&self.bytes[..]);
        self.index += 1;
        self.used = BLOCK_HEADER_BYTES;
        self.entries = 0;
        self.sectors = FIRST_SECTORS;
    }
}

#[inline]
fn put(bytes: &mut [u8; RUN_BLOCK_BYTES], at: &mut usize, what: &[u8]) {
    bytes[*at..*at + what.len()].copy_from_slice(what);
    *at += what.len();
}

#[inline]
fn put_varint(bytes: &mut [u8; RUN_BLOCK_BYTES], at: &mut usize, mut number: u64) {
    while number >= 0x80 {
        bytes[*at] = number as u8 | 0x80;
        *at += 1;
        number >>= 7;
    }
    bytes[*at] = number as u8;
    *at += 1;
}

/// Reads block `index` of a run and gives its entries in order. Whoever takes them checks what they say: this finds
/// only bytes that are not what was written.
pub fn decode_block(block: &[u8], index: u32, mut each: impl FnMut(RunEntry)) -> Result<BlockHeader, FormatError> {
    let damaged = || FormatError::Damaged("index block");
    let block: &[u8; RUN_BLOCK_BYTES] = block.try_into().map_err(|_| damaged())?;
    let (header, _) = BlockHeader::read_from_prefix(block).map_err(|_| damaged())?;
    let entries = usize::from(header.entries.get());
    let sane = header.layers <= 1 && header.reserved == 0 && (1..=BLOCK_ENTRIES_MAX).contains(&entries);
    if header.crc.get() != crc32fast::hash(&block[4..]) || header.index.get() != index || !sane {
        return Err(damaged());
    }
    let mut reader = BlockReader {
        block,
        at: BLOCK_HEADER_BYTES,
        several_layers: header.layers == 1,
        base_layer: header.base_layer.get(),
        base_height: header.base_height.get(),
        address: header.first_address.get(),
        sectors: FIRST_SECTORS,
    };
    for _ in 0..entries {
        each(reader.entry().ok_or_else(damaged)?);
    }
    if block[reader.at..].iter().any(|byte| *byte != 0) {
        return Err(damaged());
    }
    Ok(header)
}

struct BlockReader<'a> {
    block: &'a [u8; RUN_BLOCK_BYTES],
    at: usize,
    several_layers: bool,
    base_layer: u32,
    base_height: u64,
    address: u64,
    sectors: u16,
}

impl BlockReader<'_> {
    #[inline]
    fn entry(&mut self) -> Option<RunEntry> {
        let flags = self.byte()?;
        if flags & UNUSED_FLAGS != 0 || flags & STORED_BITS == 3 {
            return None;
        }
        let stored = flags & STORED_BITS;
        self.address = self.address.checked_add(self.varint()?)?;
        let height_bytes = HEIGHT_BYTES[usize::from(flags >> HEIGHT_SHIFT & 3)];
        let number = u64::from_le_bytes(self.load()?) & (u64::MAX >> (64 - 8 * height_bytes));
        self.at += height_bytes;
        let above = if flags & ODD_HEIGHT != 0 { number } else { number.checked_mul(8)? };
        let height = self.base_height.checked_add(above)?;
        let layer = if self.several_layers { u32::try_from(self.varint()?).ok()? } else { 0 };
        let layer = self.base_layer.checked_add(layer)?;
        let offset = u32::from_le_bytes(self.load()?);
        self.at += 4;
        let mut crc = 0;
        if stored != 0 {
            crc = u32::from_le_bytes(self.load()?);
            self.at += 4;
        }
        if flags & OTHER_SECTORS != 0 {
            self.sectors = u16::from(self.byte()?) + 1;
        }
        let sectors = self.sectors;
        let (mut skip, mut record_sectors) = (0, sectors);
        if flags & PARTIAL != 0 {
            skip = u16::from(self.byte()?);
            record_sectors = u16::from(self.byte()?) + 1;
        }
        let stored_bytes = match stored {
            0 => 0,
            1 => u32::from(record_sectors) * 512,
            _ => u32::try_from(self.varint()?).ok()?,
        };
        Some(RunEntry {
            address: self.address,
            height,
            layer,
            offset,
            crc,
            stored_bytes,
            sectors,
            skip,
            record_sectors,
            stored,
        })
    }

    #[inline]
    fn load<const BYTES: usize>(&self) -> Option<[u8; BYTES]> {
        self.block.get(self.at..)?.first_chunk().copied()
    }

    #[inline]
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.block.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    #[inline]
    fn varint(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7F);
            if bits << shift >> shift != bits {
                return None;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }
}

/// The fences' bytes.
pub fn encode_fences(fences: &[u64]) -> Vec<u8> {
    fences.iter().flat_map(|address| address.to_le_bytes()).collect()
}

/// Reads the fences, of which the footer has the checksum.
pub fn decode_fences(bytes: &[u8], footer: &RunFooter) -> Result<Vec<u64>, FormatError> {
    let damaged = || FormatError::Damaged("run's fences");
    let right_size = bytes.len() == footer.fences_bytes();
    if !right_size || crc32fast::hash(bytes) != footer.fences_crc.get() {
        return Err(damaged());
    }
    let (numbers, _) = bytes.as_chunks::<FENCE_BYTES>();
    let fences: Vec<u64> = numbers.iter().map(|number| u64::from_le_bytes(*number)).collect();
    if fences.is_sorted() { Ok(fences) } else { Err(damaged()) }
}

/// The last 4096 bytes of a run's file begin with it; the rest of them is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RunFooter {
    /// [`RUN_MAGIC`].
    pub magic: [u8; 8],
    /// [`FORMAT_VERSION`]; stays at this offset in every version.
    pub version: U16,
    /// 0: every entry of one layer. More: of 8^level layers, for every sector the first in time.
    pub level: u8,
    /// Zero.
    pub reserved: [u8; 5],
    /// The group's identity.
    pub group: [u8; 16],
    /// The first layer's number, a multiple of 8^level.
    pub first_layer: U32,
    /// 8^level.
    pub layers: U32,
    /// All heights are above.
    pub first_height: U64,
    /// No height is above.
    pub last_height: U64,
    /// Time of the first point, nanoseconds since 1970 at the source.
    pub first_time_ns: U64,
    /// Of the last one.
    pub last_time_ns: U64,
    /// Bytes of the layers' files, together.
    pub layer_bytes: U64,
    /// Entries in all blocks.
    pub entries: U64,
    /// Where the fences begin: the blocks' end.
    pub fences_offset: U64,
    /// Where the tail begins.
    pub tail_offset: U64,
    /// Bytes of the whole file, this footer's block included.
    pub file_bytes: U64,
    /// Blocks of entries.
    pub blocks: U32,
    /// Bytes of the tail.
    pub tail_bytes: U32,
    /// CRC-32 of the fences.
    pub fences_crc: U32,
    /// CRC-32 of the tail.
    pub tail_crc: U32,
    /// Bytes of the filter, which begins where the fences end; 0: there is none.
    pub filter_bytes: U32,
    /// CRC-32 of the filter.
    pub filter_crc: U32,
    /// Zero.
    pub reserved_2: U32,
    /// CRC-32 of the bytes before.
    pub crc: U32,
}

const _: () = assert!(size_of::<RunFooter>() == 144);
const _: () = assert!(core::mem::offset_of!(RunFooter, version) == 8);

impl RunFooter {
    /// Sets the places of the sections from their sizes, the checksum, and gives the footer's block.
    pub fn encode(&mut self) -> [u8; RUN_BLOCK_BYTES] {
        let fences = u64::from(self.blocks.get()) * RUN_BLOCK_BYTES as u64;
        let tail = fences + self.fences_bytes() as u64 + u64::from(self.filter_bytes.get());
        let end = (tail + u64::from(self.tail_bytes.get())).next_multiple_of(RUN_BLOCK_BYTES as u64);
        self.magic = RUN_MAGIC;
        self.version = FORMAT_VERSION.into();
        self.fences_offset = fences.into();
        self.tail_offset = tail.into();
        self.file_bytes = (end + RUN_BLOCK_BYTES as u64).into();
        self.crc = self.checksum().into();
        let mut block = [0; RUN_BLOCK_BYTES];
        block[..size_of::<Self>()].copy_from_slice(self.as_bytes());
        block
    }

    /// Bytes of all fences.
    pub fn fences_bytes(&self) -> usize {
        self.blocks.get() as usize * FENCE_BYTES
    }

    /// Where the filter begins.
    pub fn filter_offset(&self) -> u64 {
        self.fences_offset.get() + self.fences_bytes() as u64
    }

    fn checksum(&self) -> u32 {
        crc32fast::hash(&self.as_bytes()[..core::mem::offset_of!(RunFooter, crc)])
    }

    /// Reads the last block of a file of `file_bytes` bytes.
    pub fn decode(block: &[u8], file_bytes: u64) -> Result<Self, FormatError> {
        let damaged = || FormatError::Damaged("run");
        let (footer, _) = Self::read_from_prefix(block).map_err(|_| damaged())?;
        if footer.magic != RUN_MAGIC {
            return Err(damaged());
        }
        if footer.version.get() != FORMAT_VERSION {
            return Err(FormatError::Version { what: "a run", found: footer.version.get() });
        }
        let whole = footer.crc.get() == footer.checksum() && footer.file_bytes.get() == file_bytes;
        if whole && footer.is_possible() { Ok(footer) } else { Err(damaged()) }
    }

    /// Whether the numbers agree with each other: the checksum says only that they are what was written.
    fn is_possible(&self) -> bool {
        let mut again = *self;
        again.encode();
        let layers = 8u32.checked_pow(u32::from(self.level));
        let (first, last) = (self.first_height.get(), self.last_height.get());
        let entries = (u64::from(self.blocks.get()), self.entries.get());
        again == *self
            && self.reserved == [0; 5]
            && self.reserved_2.get() == 0
            && (self.filter_bytes.get() as usize).is_multiple_of(FILTER_BLOCK_BYTES)
            && layers == Some(self.layers.get())
            && self.first_layer.get().is_multiple_of(self.layers.get())
            && self.first_layer.get().checked_add(self.layers.get()).is_some()
            && first <= last
            && self.first_time_ns.get() <= self.last_time_ns.get()
            && entries.0 <= entries.1
            && entries.1 <= entries.0 * BLOCK_ENTRIES_MAX as u64
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
