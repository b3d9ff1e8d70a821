//! Control messages: what decodes is bounded by its input, encodes within the limit and decodes to the same. A hello
//! and a probe that pass the receiver's checks are what those checks promise.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde::{Serialize, de::DeserializeOwned};
use std::fmt::Debug;
use varve_common::limits::{
    CONTROL_BYTES_MAX, DIGESTS_PER_REGION, NAME_BYTES_MAX, REGION_BYTES, VOLUMES_PER_GROUP_MAX,
};
use varve_common::wire::FrameKind;
use varve_common::wire::messages::{
    Ack, Ask, Hello, ImageDone, Probe, ProbeReply, Refused, Report, Welcome, decode, encode,
};
use varve_receiver::apply::probe::objection;
use varve_receiver::session::hello;

fn round_trip<T: Serialize + DeserializeOwned + PartialEq + Debug>(kind: FrameKind, bytes: &[u8]) -> Option<T> {
    let message: T = decode(kind, bytes).ok()?;
    let again = encode(&message);
    assert!(
        !again.is_empty() && again.len() <= bytes.len().min(CONTROL_BYTES_MAX),
        "the shortest form is what is sent"
    );
    assert_eq!(decode::<T>(kind, &again).expect("our own bytes"), message);
    Some(message)
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, bytes)) = data.split_first() else { return };
    match kind % 10 {
        0 => {
            let Some(found) = round_trip::<Hello>(FrameKind::Hello, bytes) else { return };
            if hello::check(&found).is_ok() {
                assert!((1..=NAME_BYTES_MAX).contains(&found.group.len()) && !found.group.contains(['/', '\0', '\n']));
                assert!(!found.group.starts_with(['.', '-']), "a directory of that name is made");
                assert!((1..=VOLUMES_PER_GROUP_MAX).contains(&found.volumes.len()));
            }
        }
        1 => drop(round_trip::<Welcome>(FrameKind::Welcome, bytes)),
        2 => drop(round_trip::<Refused>(FrameKind::Refused, bytes)),
        3 => drop(round_trip::<Ack>(FrameKind::Ack, bytes)),
        4 => {
            let Some(probe) = round_trip::<Probe>(FrameKind::Probe, bytes) else { return };
            let volumes = [5 << 20, (1 << 20) + 512, 100];
            if objection(&probe, &volumes).is_none() {
                assert!((1..=DIGESTS_PER_REGION).contains(&probe.digests.len()));
                assert!(u64::from(probe.length) <= REGION_BYTES);
                assert!(probe.offset + u64::from(probe.length) <= volumes[usize::from(probe.volume)]);
            }
        }
        5 => drop(round_trip::<ProbeReply>(FrameKind::ProbeReply, bytes)),
        6 => drop(round_trip::<ImageDone>(FrameKind::ImageDone, bytes)),
        7 => drop(round_trip::<Report>(FrameKind::Report, bytes)),
        8 => drop(round_trip::<Ask>(FrameKind::Ask, bytes)),
        _ => drop(round_trip::<varve_common::wire::messages::Verify>(FrameKind::Report, bytes)),
    }
});
