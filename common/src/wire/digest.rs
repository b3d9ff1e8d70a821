//! The digest of a block: what agent and receiver compare instead of bytes.

use super::messages::{Digest, ZERO_DIGEST};

/// 128 bits of BLAKE3; [`ZERO_DIGEST`] if every byte is zero, so that a hole needs neither reading nor hashing.
pub fn block_digest(block: &[u8]) -> Digest {
    if is_zero(block) {
        return ZERO_DIGEST;
    }
    let mut digest = ZERO_DIGEST;
    digest.copy_from_slice(&blake3::hash(block).as_bytes()[..ZERO_DIGEST.len()]);
    digest
}

/// Whether every byte is zero; ends at the first that is not.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(256).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_have_one_digest_whatever_their_length() {
        assert_eq!(block_digest(&[0; 65536]), ZERO_DIGEST);
        assert_eq!(block_digest(&[0; 512]), ZERO_DIGEST);
        let mut block = [0; 65536];
        block[65535] = 1;
        assert_ne!(block_digest(&block), ZERO_DIGEST);
        assert_eq!(block_digest(b"varve")[..4], [0xb6, 0xc5, 0x3d, 0xc6], "as b3sum says");
    }
}
