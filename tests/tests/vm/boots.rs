//! Clean reboots, with the kernel's own counters beginning anew: what nobody wrote to is not compared, what somebody did is.

use crate::bed::{Bed, GROUP, LIMIT};
use varve_tests::*;

const BYTES: u64 = 128 * MIB;

/// Regions looked at since the boot, and where the ring came from, in words.
fn looked_at(guest: &mut Guest) -> (u64, String) {
    let group = guest.group(GROUP);
    (group["counters"]["probes"].as_u64().unwrap(), group["ring"]["origin"].as_str().unwrap().to_owned())
}

/// A service's day: mounted after the agent has begun, written to, unmounted before it stops.
fn day(bed: &Bed, guest: &mut Guest, number: u32) {
    guest.shell("mount /dev/vdb /mnt/volume");
    guest.shell(&format!("dd if=/dev/urandom of=/mnt/volume/day-{number} bs=64k count=50 conv=fsync"));
    guest.shell("umount /mnt/volume");
    bed.wait_applied(guest);
}

fn night(mut guest: Guest) {
    guest.stop_agent();
    guest.shell("umount /mnt/state");
    guest.power_off();
}

fn host_that_reboots(series: &str) {
    require_root();
    let bed = Bed::new(series, BYTES, &[]);
    let mut guest = bed.enrol();
    bed.protect(&mut guest, "/dev/vdb");
    bed.wait_protected(&mut guest);
    for number in 0..2 {
        day(&bed, &mut guest, number);
        night(guest);
        assert_same(&bed.volume, &bed.replica);
        guest = bed.boot();
        let healed = bed.wait_protected(&mut guest);
        let (regions, origin) = looked_at(&mut guest);
        eprintln!("a clean reboot: protected after {healed:?}, {regions} regions looked at: {origin}");
        assert!(regions == 0 && origin.contains("nothing is compared"), "{regions}: {origin}");
    }

    // Between the agent's end and that of the boot: through the file system.
    day(&bed, &mut guest, 2);
    guest.stop_agent();
    guest.shell("mount /dev/vdb /mnt/volume && echo late > /mnt/volume/late && umount /mnt/volume");
    guest.shell("umount /mnt/state");
    guest.power_off();
    guest = bed.boot();
    bed.wait_protected(&mut guest);
    let (regions, origin) = looked_at(&mut guest);
    assert!(regions >= BYTES / MIB && origin.contains("was mounted or mended since"), "{regions}: {origin}");

    // After the boot, before capture, beside the file system: the kernel has counted it.
    night(guest);
    guest = bed.machine.boot();
    guest.shell("dd if=/dev/urandom of=/dev/vdb bs=4k seek=32000 count=1 oflag=direct conv=notrunc");
    bed.settle_in(&mut guest);
    bed.wait_protected(&mut guest);
    let (regions, origin) = looked_at(&mut guest);
    assert!(regions >= BYTES / MIB && origin.contains("was written to before capture began"), "{regions}: {origin}");

    // Power that is lost with an agent that had not stopped.
    day(&bed, &mut guest, 3);
    guest.cut_power();
    guest = bed.boot();
    bed.wait_protected(&mut guest);
    assert!(looked_at(&mut guest).0 >= BYTES / MIB, "nobody stopped it");
    wait_until(LIMIT, "it says so at the other side", || bed.recovery.group(GROUP).unwrap()["data"] == "protected");
    bed.shut_down_and_compare(guest);
}
crate::on_kernels!(host_that_reboots);
