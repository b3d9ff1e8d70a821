//! The version handshake: any sixteen bytes are an error or lead both sides to the same version.
#![no_main]

use libfuzzer_sys::fuzz_target;
use varve_common::wire::{PREAMBLE_MAGIC, Preamble, VERSION_MAX, VERSION_MIN, WireError};
use zerocopy::FromBytes;

fuzz_target!(|data: &[u8]| {
    let Some(bytes) = data.first_chunk::<16>() else { return };
    let mut with_magic = *bytes;
    with_magic[..8].copy_from_slice(&PREAMBLE_MAGIC);
    for bytes in [*bytes, with_magic] {
        let offer = Preamble::read_from_bytes(&bytes).expect("sixteen bytes");
        if let Ok((answer, version)) = Preamble::answer(&offer) {
            assert_eq!(offer.magic, PREAMBLE_MAGIC);
            assert_eq!(answer.high.get(), VERSION_MAX);
            match version {
                Some(version) => {
                    assert!((VERSION_MIN..=VERSION_MAX).contains(&version), "we speak it");
                    assert!((offer.low.get()..=offer.high.get()).contains(&version), "the peer speaks it");
                    assert_eq!(answer.low.get(), version);
                }
                None => {
                    assert_eq!(answer.low.get(), 0);
                    assert_eq!(answer.accepted(), Err(WireError::Version { peer_newest: VERSION_MAX }));
                }
            }
        }
        // As a receiver's answer.
        if let Ok(version) = offer.accepted() {
            assert!(offer.magic == PREAMBLE_MAGIC && (VERSION_MIN..=VERSION_MAX).contains(&version));
        }
    }
});
