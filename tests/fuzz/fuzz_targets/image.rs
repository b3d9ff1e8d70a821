//! Image bodies: what decodes is exactly its input, written again; extents are within their limits and hand out every
//! byte of the data once.
#![no_main]

use libfuzzer_sys::fuzz_target;
use varve_common::limits::{IMAGE_EXTENTS_MAX, REGION_BYTES};
use varve_common::wire::{Image, ImageExtent, ImageHeader};

fuzz_target!(|data: &[u8]| {
    decode(data);
    // A fuzzer does not guess that the data must be as long as the extents say: cut it to that.
    let count = data.get(12..16).map_or(0, |c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]) as usize % 64);
    let mut bytes = data.to_vec();
    let Some(field) = bytes.get_mut(12..16) else { return };
    field.copy_from_slice(&(count as u32).to_le_bytes());
    bytes[10..12].fill(0);
    let start = size_of::<ImageHeader>() + count * size_of::<ImageExtent>();
    bytes.resize(bytes.len().max(start), 0);
    let mut total = 0u64;
    for extent in bytes[size_of::<ImageHeader>()..start].chunks_exact_mut(size_of::<ImageExtent>()) {
        // Short ones: a long one is only more of the same.
        extent[10..12].fill(0);
        extent[13..].fill(0);
        extent[12] &= 1;
        if extent[12] == 0 {
            total += u64::from(u16::from_le_bytes([extent[8], extent[9]]));
        }
    }
    if total < 1 << 20 {
        bytes.resize(start + total as usize, 0x5A);
        decode(&bytes);
    }
});

fn decode(bytes: &[u8]) {
    let Ok(image) = Image::decode(bytes) else { return };
    let extents: Vec<_> = image.extents().collect();
    assert!(extents.len() <= IMAGE_EXTENTS_MAX);
    for (offset, length, data) in &extents {
        assert!((1..=REGION_BYTES).contains(length) && offset.checked_add(*length).is_some());
        assert!(data.is_none_or(|data| data.len() as u64 == *length));
    }
    let mut again = Vec::new();
    Image::encode(image.id, image.volume, &extents, &mut again);
    assert_eq!(again, bytes);
}
