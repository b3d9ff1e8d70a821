//! A command that an administrator's tool sends to a disk past the block layer (`SG_IO`): no write was submitted, so nothing is in
//! the stream, and what it wrote nobody knows. It is noticed, all is compared, and what it wrote is in the replica.

use crate::bed::{Bed, GROUP, LIMIT};
use varve_tests::*;

/// What `scsi_debug` has by default.
const BYTES: u64 = 8 * MIB;
const MODULES: &str = "scsi_common scsi_mod ?crc-t10dif ?crct10dif_common sd_mod scsi_debug";

fn host_with_a_scsi_disk(series: &str) {
    require_root();
    let bed = Bed::with(series, 16 * MIB, &[], &["sg_raw"], MODULES);
    let mut guest = bed.enrol();
    guest.shell_within(LIMIT, "until [ -b /dev/sda ]; do sleep 0.1; done").ok();
    guest.shell("dd if=/dev/urandom of=/dev/sda bs=64k count=40 oflag=direct");
    bed.protect(&mut guest, "/dev/sda");
    bed.wait_protected(&mut guest);
    let counter = |guest: &mut Guest, name: &str| guest.group(GROUP)["counters"][name].as_u64().unwrap();
    // What only asks is no reason for anything: INQUIRY, READ CAPACITY(10).
    guest.shell("sg_raw -r 96 /dev/sda 12 00 00 00 60 00 && sg_raw -r 8 /dev/sda 25 00 00 00 00 00 00 00 00 00");
    bed.wait_applied(&mut guest);
    let looked_at = counter(&mut guest, "probes");
    assert_eq!(counter(&mut guest, "passthrough_commands"), 0);
    let same = |guest: &mut Guest, replica: &std::path::Path| {
        let there = guest.shell("dd if=/dev/sda bs=64k iflag=direct 2>/dev/null | md5sum");
        let here = run_ok("md5sum", &[replica]);
        there.split_whitespace().next() == here.split_whitespace().next()
    };
    assert!(same(&mut guest, &bed.replica));

    // WRITE(10): eight sectors from 0x1000 on.
    guest.shell("dd if=/dev/urandom of=/tmp/payload bs=4096 count=1");
    guest.shell("sg_raw -s 4096 -i /tmp/payload /dev/sda 2a 00 00 00 10 00 00 00 08 00");
    wait_until(LIMIT, "the gap is known at the receiver", || {
        let points = bed.points();
        points["gaps"].as_array().unwrap().iter().any(|gap| gap["reason"] == "passthrough")
    });
    bed.wait_applied(&mut guest);
    assert_eq!(counter(&mut guest, "passthrough_commands"), 1);
    let regions = counter(&mut guest, "probes") - looked_at;
    assert!(regions >= BYTES / MIB, "{regions} regions were looked at");
    assert!(same(&mut guest, &bed.replica), "what it wrote is not in the replica");
    guest.stop_agent();
    guest.shell("umount /mnt/state");
    guest.power_off();
}
crate::on_kernels!(host_with_a_scsi_disk);
