//! A closed layer's chunks, as they stand in the tail of its level-0 run: so that the chunk of a time is found without
//! reading the layer.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// One chunk. See `ChunkHeader` in [`super::layer`] for the fields of the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DirectoryRow {
    /// Where it begins in the layer.
    pub offset: U64,
    /// Its stamps are above.
    pub first_height: U64,
    /// What it completes.
    pub complete_to: U64,
    /// Of its first point.
    pub first_time_ns: U64,
    /// Of its last point.
    pub last_time_ns: U64,
    /// Its bytes.
    pub bytes: U32,
    /// Its records.
    pub records: U32,
    /// Its points.
    pub points: U32,
    /// Zero.
    pub reserved: U32,
}

const _: () = assert!(size_of::<DirectoryRow>() == 56);

/// The rows of a tail; `None` if it is not a whole number of rows.
pub fn decode(tail: &[u8]) -> Option<&[DirectoryRow]> {
    <[DirectoryRow]>::ref_from_bytes(tail).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let row = DirectoryRow {
            offset: 4096.into(),
            first_height: 8.into(),
            complete_to: 16.into(),
            first_time_ns: 1.into(),
            last_time_ns: 2.into(),
            bytes: 8192.into(),
            records: 3.into(),
            points: 4.into(),
            reserved: 0.into(),
        };
        let mut golden = vec![0, 16, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0];
        golden
            .extend([1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(row.as_bytes(), golden);
        assert_eq!(decode(&golden), Some(&[row][..]));
        assert_eq!(decode(&golden[1..]), None);
    }
}
