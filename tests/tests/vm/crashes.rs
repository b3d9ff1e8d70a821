//! Panics and lost power under load: nothing that was acknowledged is missing, one comparison for each crash, and equal again.

use crate::bed::{Bed, GROUP, LIMIT};
use rand::Rng;
use serde_json::Value;
use std::time::{Duration, Instant};
use varve_tests::*;

const BYTES: u64 = 128 * MIB;

/// Gaps that are in `points` and not in `known`.
fn new_gaps(points: &Value, known: &Value) -> Vec<Value> {
    let known = known["gaps"].as_array().unwrap();
    points["gaps"].as_array().unwrap().iter().filter(|gap| !known.contains(gap)).cloned().collect()
}

fn regions_looked_at(guest: &mut Guest) -> u64 {
    guest.group(GROUP)["counters"]["probes"].as_u64().unwrap()
}

/// Where the kernel is this time.
fn kernel_base(guest: &mut Guest) -> String {
    guest.shell("grep -E ' (_text|_stext)$' /proc/kallsyms | head -n 1")
}

fn host_that_crashes(series: &str) {
    require_root();
    let seed = Seed::new();
    let mut rng = seed.rng();
    let bed = Bed::new(series, BYTES, &[]);
    let mut guest = bed.enrol();
    eprintln!("{}: up after {:?}", guest.shell("uname -r"), guest.boot_time);
    doctor(&mut guest);
    let mut bases = vec![kernel_base(&mut guest)];

    guest.shell("mount /dev/vdb /mnt/volume && load /mnt/volume");
    bed.protect(&mut guest, "/dev/vdb");
    eprintln!("first sync under load: {:?}", bed.wait_protected(&mut guest));

    for crash in ["power", "panic", "power"] {
        bed.wait_protected(&mut guest);
        let known = bed.points();
        let (from, mut acknowledged) = (Instant::now(), 0);
        let lasts = Duration::from_millis(rng.random_range(1000..5000));
        while from.elapsed() < lasts {
            acknowledged = bed.acknowledged(&mut guest);
        }
        match crash {
            "panic" => guest.panic(),
            _ => guest.cut_power(),
        }
        let committed = bed.committed();

        // What the recovery side has, with no more help from the source.
        let kept = bed.records(&bed.restore("latest"));
        assert!(kept >= acknowledged, "{acknowledged} were acknowledged, the newest point has {kept}");
        let on_disk = bed.records(&bed.volume);
        assert!(on_disk >= committed, "the guest's own disk has lost commits: {on_disk} of {committed}");

        // Load from the first moment on that capture runs.
        guest = bed.boot();
        bases.push(kernel_base(&mut guest));
        guest.shell("mount /dev/vdb /mnt/volume && load /mnt/volume");
        let healed = bed.wait_protected(&mut guest);
        let looked_at = regions_looked_at(&mut guest);
        eprintln!(
            "{crash} at {committed} commits, {acknowledged} acknowledged: {kept} at the receiver, {on_disk} on the disk; \
             protected again after {healed:?}, {looked_at} regions looked at"
        );
        let points = bed.points();
        let gaps = new_gaps(&points, &known);
        assert!(gaps.len() == 1 && gaps[0]["reason"] == "new-ring" && gaps[0]["to"].is_string(), "{gaps:#?}");
        let streams = |points: &Value| points["stretches"].as_array().unwrap().len();
        assert_eq!(streams(&points), streams(&known) + 1, "{points:#}");
        // Writes meanwhile make it look at some twice; twice all of it would be a second comparison.
        let regions = BYTES / MIB;
        assert!((regions..regions * 3 / 2).contains(&looked_at), "{looked_at} of {regions} regions were looked at");
    }

    assert!(bases.iter().any(|base| *base != bases[0]), "KASLR is off, so this proves less: {bases:?}");
    // The disk may have one more than was said before the crash; now the last one is said again.
    bed.acknowledged(&mut guest);
    guest.shell_within(LIMIT, "load /mnt/volume stop").ok();
    guest.shell("umount /mnt/volume");
    let committed = bed.committed();
    bed.shut_down_and_compare(guest);
    assert_eq!(bed.records(&bed.replica), committed);
    let unexpected = bed.recovery.unexpected(Role::Receiver, &["alert=\"gap\""]);
    assert!(unexpected.is_empty(), "{unexpected:#?}");
}
crate::on_kernels!(host_that_crashes);

/// `varve doctor` has nothing to complain of, but what a guest without clock synchronisation is.
#[track_caller]
fn doctor(guest: &mut Guest) {
    let out = guest.shell_within(LIMIT, "varve doctor --json");
    let report = out.json_lines().pop().unwrap();
    for check in report["checks"].as_array().unwrap() {
        eprintln!("doctor: {} {}: {} ({})", check["section"], check["name"], check["result"], check["found"]);
    }
    assert_eq!((out.code, &report["failed"]), (0, &Value::from(0)), "{report:#}");
}
