//! Where one before-image is, and which sectors of which volume at which height it speaks for.

use crate::limits::{GRANULE_SECTORS, SECTOR_BYTES};

const SECTOR_BITS: u32 = 48;

/// A sector of a volume of the group, ordered by volume, then by sector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(u64);

impl Address {
    /// Of sector `sector` of `volume`. Volumes have less than 2^48 sectors ([`varve_common::limits::VOLUME_BYTES_MAX`]).
    pub fn new(volume: u16, sector: u64) -> Self {
        debug_assert!(sector < 1 << SECTOR_BITS);
        Self(u64::from(volume) << SECTOR_BITS | sector & ((1 << SECTOR_BITS) - 1))
    }

    /// From the number that stands on disk.
    pub fn from_number(number: u64) -> Self {
        Self(number)
    }

    /// The number that stands on disk.
    pub fn number(self) -> u64 {
        self.0
    }

    /// The volume's number in its group.
    pub fn volume(self) -> u16 {
        (self.0 >> SECTOR_BITS) as u16
    }

    /// The sector in it.
    pub fn sector(self) -> u64 {
        self.0 & ((1 << SECTOR_BITS) - 1)
    }

    /// The byte in it.
    pub fn byte(self) -> u64 {
        self.sector() * SECTOR_BYTES
    }

    /// The first sector of its granule.
    pub fn granule(self) -> Self {
        Self(self.0 - self.0 % u64::from(GRANULE_SECTORS))
    }

    /// Sectors from its granule's begin.
    pub fn in_granule(self) -> u16 {
        (self.0 % u64::from(GRANULE_SECTORS)) as u16
    }

    /// `sectors` further on in the same volume.
    pub fn plus(self, sectors: u64) -> Self {
        Self(self.0 + sectors)
    }
}

/// How a record's bytes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Stored {
    /// Nothing is kept: all zeroes.
    Zero = 0,
    /// As they were.
    Plain = 1,
    /// One LZ4 block.
    Lz4 = 2,
}

impl Stored {
    /// The kind with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Zero),
            1 => Some(Self::Plain),
            2 => Some(Self::Lz4),
            _ => None,
        }
    }
}

/// A stretch of sectors within one granule and the record that holds what they were before `height`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First sector that this entry speaks for.
    pub address: Address,
    /// Stamp of the change that replaced the bytes: the height after it.
    pub height: u64,
    /// Number of the layer that holds them.
    pub layer: u32,
    /// Offset of the stored bytes in the layer's file.
    pub offset: u32,
    /// CRC-32 of the stored bytes (0 for [`Stored::Zero`]).
    pub crc: u32,
    /// Stored bytes.
    pub stored_bytes: u32,
    /// Sectors from `address` on, 1 to [`GRANULE_SECTORS`].
    pub sectors: u16,
    /// Sectors of the record before `address`: a merge keeps only the parts of a record that nothing covers.
    pub skip: u16,
    /// Sectors of the whole record: its plain bytes.
    pub record_sectors: u16,
    /// How the bytes are kept.
    pub stored: Stored,
}

impl Entry {
    /// The sector after the last.
    pub fn end(&self) -> Address {
        self.address.plus(u64::from(self.sectors))
    }

    /// How a layer's entries stand in its index: by address, those of one address in the order of appending. Records of
    /// one stamp that overlap differ in their offset, which never falls within a layer (a record of zeroes has the offset
    /// that its bytes would have).
    #[inline]
    pub fn order(&self) -> (Address, u64, u32, u32) {
        (self.address, self.height, self.offset, self.stored_bytes)
    }

    /// The order of appending within a layer.
    #[inline]
    pub fn age(&self) -> (u64, u32, u32) {
        (self.height, self.offset, self.stored_bytes)
    }

    /// Bit *i* is sector *i* of the entry's granule.
    pub fn mask(&self) -> u128 {
        sector_mask(self.address.in_granule(), self.sectors)
    }

    /// The part of it from `sector` (of the granule) on, `sectors` long; it lies within the entry.
    pub fn part(&self, sector: u16, sectors: u16) -> Self {
        let skipped = sector - self.address.in_granule();
        Self { address: self.address.granule().plus(u64::from(sector)), sectors, skip: self.skip + skipped, ..*self }
    }

    /// Whether the numbers agree with each other and with the limits.
    pub fn is_possible(&self) -> bool {
        let inside = u32::from(self.address.in_granule()) + u32::from(self.sectors) <= u32::from(GRANULE_SECTORS);
        let part =
            self.sectors >= 1 && u32::from(self.skip) + u32::from(self.sectors) <= u32::from(self.record_sectors);
        let plain = u32::from(self.record_sectors) * SECTOR_BYTES as u32;
        let stored = match self.stored {
            Stored::Zero => self.stored_bytes == 0,
            Stored::Plain => self.stored_bytes == plain,
            Stored::Lz4 => (1..plain).contains(&self.stored_bytes),
        };
        inside && part && self.record_sectors <= GRANULE_SECTORS && stored
    }
}

/// The mask of `sectors` sectors from `first` on in a granule.
pub fn sector_mask(first: u16, sectors: u16) -> u128 {
    debug_assert!(u32::from(first) + u32::from(sectors) <= u32::from(GRANULE_SECTORS));
    let ones = if sectors >= GRANULE_SECTORS { u128::MAX } else { (1u128 << sectors) - 1 };
    ones << first
}
