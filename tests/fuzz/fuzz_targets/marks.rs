//! What a volume's superblock says, which any guest, container or attached disk may have written: nothing outside of the volume
//! is read, the look ends, and looking twice gives the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use varve_io::blockdev::marks;

/// Where superblocks begin: XFS, ext4, btrfs.
const PLACES: [usize; 3] = [0, 1024, 0x1_0000];

fuzz_target!(|data: &[u8]| {
    let [kind, size, superblock @ ..] = data else { return };
    let place = usize::from(*kind) % PLACES.len();
    let mut image = vec![0; (usize::from(*size) + 1) << 12];
    let magics: [(usize, &[u8]); 3] = [(0, b"XFSB"), (1024 + 56, &[0x53, 0xef]), (0x1_0040, b"_BHRfS_M")];
    let magic = magics[place];
    let len = superblock.len().min(image.len().saturating_sub(PLACES[place]));
    if len > 0 {
        image[PLACES[place]..][..len].copy_from_slice(&superblock[..len]);
    }
    if let Some(there) = image.get_mut(magic.0..magic.0 + magic.1.len()) {
        there.copy_from_slice(magic.1);
    }
    let look = || {
        marks(image.len() as u64, |offset, buf| {
            buf.copy_from_slice(&image[offset as usize..][..buf.len()]);
            Ok(())
        })
        .ok()
    };
    assert_eq!(look(), look());
});
