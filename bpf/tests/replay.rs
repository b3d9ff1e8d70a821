//! Every load on every kind of device: the records, replayed, equal the device byte for byte. Needs root.
#![allow(unsafe_code, clippy::unwrap_used)]

mod support;

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use support::aligned::Buffer;
use support::*;
use varve_bpf::Group;

fn checked(device: &Device, load_it: impl FnOnce(&Device, &Arc<Group>)) -> judge::Judge {
    let capture = load(device);
    let group = Arc::new(capture.add_group(64 << 20, &[device.whole()]).unwrap());
    wait_for("settling", || group.poll_settled().unwrap());
    let running = judge::start(&group);
    load_it(device, &group);
    let image = device.read_all();
    let judge = running.finish();
    judge.compare(0, &image);
    let volume = &group.volumes()[0];
    assert_eq!(capture.misses().unwrap(), 0, "programs were skipped");
    for region in 0..volume.regions() {
        assert_eq!(volume.in_flight_bytes(region), 0, "region {region} of an idle device is in flight");
    }
    judge
}

#[test]
fn one_page() {
    let device = loop_device(8 * MIB);
    let judge = checked(&device, |device, _| {
        let mut buffer = Buffer::new(4096, 0);
        buffer.bytes_mut().fill(7);
        device.direct().write_all_at(buffer.bytes(), 4096).unwrap();
    });
    assert_eq!(judge.kinds[1], 1);
}
