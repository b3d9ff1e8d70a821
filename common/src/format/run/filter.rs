//! A run's filter: whether a unit of 8 sectors may have entries. It saves a small read the look into most runs.
//!
//! A split-block Bloom filter: blocks of 32 bytes, as many as there are bytes for one byte per unit; a unit sets one bit
//! in each of the eight u32 of one block. Some 3 of 100 units that have no entries seem to have some.

/// Sectors of a unit: 4 KiB, aligned.
pub const FILTER_UNIT_SECTORS: u64 = 8;
/// Bytes of a block of the filter.
pub const FILTER_BLOCK_BYTES: usize = 32;

const SALTS: [u32; 8] =
    [0x47B6_137B, 0x4497_4D91, 0x8824_AD5B, 0xA2B7_289D, 0x7054_95C7, 0x2DF1_424B, 0x9EFC_4947, 0x5C6B_FB31];

/// Bytes of the filter of a run with so many units.
pub fn filter_bytes(units: usize) -> usize {
    units.next_multiple_of(FILTER_BLOCK_BYTES)
}

/// The unit's block of a filter, and its hash.
fn place(bytes: usize, unit: u64) -> (usize, u32) {
    // SplitMix64's last steps: neighbours go to blocks that are far from each other.
    let mut hash = unit.wrapping_add(0x9E37_79B9_7F4A_7C15);
    hash = (hash ^ hash >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    hash = (hash ^ hash >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    hash ^= hash >> 31;
    let blocks = (bytes / FILTER_BLOCK_BYTES) as u64;
    ((((hash >> 32) * blocks) >> 32) as usize * FILTER_BLOCK_BYTES, hash as u32)
}

fn bit(hash: u32, salt: u32) -> u32 {
    1 << (hash.wrapping_mul(salt) >> 27)
}

/// Adds a unit (an address divided by [`FILTER_UNIT_SECTORS`]).
pub fn filter_add(filter: &mut [u8], unit: u64) {
    let (at, hash) = place(filter.len(), unit);
    let Some(block) = filter.get_mut(at..at + FILTER_BLOCK_BYTES) else { return };
    for (word, salt) in block.as_chunks_mut::<4>().0.iter_mut().zip(SALTS) {
        *word = (u32::from_le_bytes(*word) | bit(hash, salt)).to_le_bytes();
    }
}

/// Whether a unit may have been added; one that was always may.
pub fn filter_may_have(filter: &[u8], unit: u64) -> bool {
    let (at, hash) = place(filter.len(), unit);
    let Some(block) = filter.get(at..at + FILTER_BLOCK_BYTES) else { return true };
    block.as_chunks::<4>().0.iter().zip(SALTS).all(|(word, salt)| u32::from_le_bytes(*word) & bit(hash, salt) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Filters written by this version must be readable by every later one.
    #[test]
    fn golden_bytes() {
        let mut filter = vec![0; 64];
        filter_add(&mut filter, 0x0001_0000_0000_1234);
        assert_eq!(crc32fast::hash(&filter), GOLDEN_CRC);
    }

    const GOLDEN_CRC: u32 = 0xDF53_531D;

    #[test]
    fn what_is_in_it_is_found_and_little_else() {
        let mut filter = vec![0; filter_bytes(10_000)];
        (0..10_000).for_each(|unit| filter_add(&mut filter, unit * 7));
        assert!((0..10_000).all(|unit| filter_may_have(&filter, unit * 7)));
        let wrong = (0..70_000).filter(|unit| unit % 7 != 0 && filter_may_have(&filter, *unit)).count();
        assert!((500..3000).contains(&wrong), "{wrong} of 60000");
        assert!(filter_may_have(&[], 5), "without a filter anything may be there");
    }
}
