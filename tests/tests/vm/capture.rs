//! The tests of the capture programs (`bpf/tests/`), as they are, on other kernels: their verifiers, their layouts, KASLR.

use crate::binary;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use varve_tests::*;

/// Left out: what needs nbdkit for a device that holds its writes.
const LEFT_OUT: [&str; 2] = ["held_write", "taken_back"];
/// zram, and whatever compression it is built with.
const MODULES: &str =
    "?zsmalloc ?lzo_compress ?lzo ?lzo-rle ?lz4_compress ?lz4hc_compress ?842_compress ?zstd_compress zram";

fn capture_tests(series: &str) {
    require_root();
    let scratch = Scratch::disk();
    let disk = scratch.file("disk.img", 4 * GIB);
    Filesystem::Ext4.make(&disk);
    // Every write to it fails, and QEMU says so in an interrupt, whoever runs just then.
    let (failing, rules) = (scratch.file("failing.img", 64 << 20), scratch.join("failing.conf"));
    std::fs::write(&rules, "[inject-error]\nevent = \"write_aio\"\nerrno = \"5\"\n").unwrap();
    let failing = PathBuf::from(format!("blkdebug:{}:{}", rules.display(), failing.display()));
    let binaries = ["capture_replay", "capture_faults", "capture_pinned"].map(binary);
    let mut programs = vec!["losetup", "sfdisk", "partx", "fio", "mkfs.ext4", "mount", "umount", "blkdiscard"];
    programs.extend(binaries.iter().map(|path| path.to_str().unwrap()));
    let machine = Machine::with(&scratch, series, &programs, &[&disk, &failing], MODULES, "3G");
    let mut guest = machine.boot();
    eprintln!("{}: up after {:?}", guest.shell("uname -r"), guest.boot_time);
    guest.shell("mount /dev/vda /var/tmp");
    // Files that a test copies.
    guest.shell("mkdir -p /usr/share/doc/libc6 && cp /init /bin/load /usr/share/doc/libc6");
    let (mut passed, mut failed) = (0, Vec::new());
    for path in &binaries {
        let program = path.file_name().unwrap().to_str().unwrap();
        for line in run_ok(path.to_str().unwrap(), &["--list"]).lines() {
            let Some(test) = line.strip_suffix(": test") else { continue };
            if LEFT_OUT.iter().any(|words| test.contains(words)) {
                continue;
            }
            let start = Instant::now();
            let line = format!("RUST_BACKTRACE=0 {program} --exact --test-threads 1 --nocapture {test} 2>&1");
            let out = guest.shell_within(Duration::from_secs(400), &line);
            let word = if out.code == 0 { "ok" } else { "FAILED" };
            eprintln!("{program} {test}: {word} ({:.1} s)", start.elapsed().as_secs_f32());
            if out.code == 0 {
                passed += 1;
            } else {
                failed.push(format!("--- {program} {test}\n{}", out.stdout));
            }
        }
    }
    let faults = binaries[1].file_name().unwrap().to_str().unwrap();
    let line = format!(
        "VARVE_FAILING_DEVICE=/dev/vdb VARVE_FAILED_WRITES=50000 {faults} --exact --nocapture every_failed_write_is_seen 2>&1"
    );
    let out = guest.shell_within(Duration::from_secs(400), &line);
    eprintln!("on a virtio disk: {}", out.stdout);
    if out.code != 0 {
        failed.push(format!("--- every_failed_write_is_seen on a virtio disk\n{}", out.stdout));
    }
    guest.shell("umount /var/tmp");
    guest.power_off();
    assert!(failed.is_empty(), "{} failed, {passed} passed:\n{}", failed.len(), failed.join("\n"));
    eprintln!("{passed} passed");
    assert!(passed > 20, "only {passed} tests were found");
}
crate::on_kernels!(capture_tests);
