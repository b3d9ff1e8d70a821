//! Views by ublk, where the kernel has it (Debian's 6.1 has not), and without: disks by themselves, and a receiver's.

use crate::bed::{GROUP, LIMIT};
use crate::binary;
use serde_json::Value;
use varve_tests::*;

const UBLK: &str = "6.12";

/// The tests of attached disks (`export/tests/`), as they are, by each way that the kernel has.
fn attached_disks(series: &str) {
    require_root();
    let (scratch, tests) = (Scratch::disk(), binary("device"));
    let programs = ["losetup", "mkfs.ext4", "mount", "umount", "blkdiscard", "unshare", tests.to_str().unwrap()];
    let machine = Machine::with(&scratch, series, &programs, &[], "?fuse ?ublk_drv", "3G");
    let mut guest = machine.boot();
    eprintln!("{}: up after {:?}", guest.shell("uname -r"), guest.boot_time);
    let program = tests.file_name().unwrap().to_str().unwrap();
    // Two need ublk; those of loop devices alone run with both.
    for (way, filter, ignored) in
        [("ublk", "--include-ignored", 0), ("fuse+loop", "", 2)].iter().filter(|way| way.0 != "ublk" || series == UBLK)
    {
        let line = format!("VARVE_TEST_DEVICE={way} {program} --test-threads 2 {filter} 2>&1; echo {way} $?");
        let out = guest.shell_within(LIMIT, &line);
        eprintln!("{}", out.stdout);
        assert!(
            out.stdout.contains(&format!("\n{way} 0")) && out.stdout.contains(&format!(" 0 failed; {ignored} ignored")),
            "{way}"
        );
        assert_eq!(guest.shell("ls /sys/class/ublk-char 2>/dev/null || true"), "", "devices are left");
    }
    guest.power_off();
}
crate::on_kernels!(attached_disks);

/// The device of an open view.
#[track_caller]
fn open(guest: &mut Guest, at: &str, more: &str) -> (String, u64) {
    let line = format!("varve view open {GROUP} --at {at} {more} --json");
    let view = guest.shell_within(LIMIT, &line).ok().json();
    (view["volumes"][0]["device"].as_str().unwrap().to_owned(), view["id"].as_u64().unwrap())
}

#[track_caller]
fn start_receiver(guest: &mut Guest) {
    guest.shell("varve-receiver >/dev/ttyS2 2>&1 & echo $! >/run/receiver.pid");
    wait_until(LIMIT, "the receiver answers", || guest.shell_within(LIMIT, "varve view list --json").code == 0);
}

/// The first 16 hex digits of what is on a device.
#[track_caller]
fn digest(guest: &mut Guest, device: &str) -> String {
    guest.shell(&format!("dd if={device} bs=1M iflag=direct 2>/dev/null | sha256sum"))
}

/// Both daemons on one host. The volume is `/dev/vdb`, with two partitions.
fn a_receivers_views(series: &str) {
    require_root();
    let scratch = Scratch::disk();
    let (state, volume) = (scratch.file("state.img", GIB), scratch.file("volume.img", 64 * MIB));
    Filesystem::Ext4.make(&state);
    run_ok("sh", &["-c", &format!("printf 'start=2048,size=65536\\nstart=67584\\n' | sfdisk -q {}", volume.display())]);
    let receiver = built("varve-receiver");
    let programs = ["losetup", "mkfs.ext4", "mount", "umount", "blkdiscard", "partx", receiver.to_str().unwrap()];
    let machine = Machine::with(&scratch, series, &programs, &[&state, &volume], "?fuse ?ublk_drv", "2G");
    let mut guest = machine.boot();
    guest.shell("mkdir /mnt/state /mnt/then && mount /dev/vda /mnt/state && mkdir -p /mnt/state/etc /mnt/state/lib");
    guest.shell("ln -s /mnt/state/etc /etc/varve && ln -s /mnt/state/lib /var/lib/varve");
    guest.shell("varve receiver init --listen 127.0.0.1:4433");
    start_receiver(&mut guest);
    let token = guest.shell_within(LIMIT, "varve host invite production --json").ok().json();
    guest.shell(&format!("varve join 127.0.0.1:4433 {}", token["token"].as_str().unwrap()));
    guest.start_agent();
    guest.shell("mkfs.ext4 -q /dev/vdb1 && mount /dev/vdb1 /mnt/then && echo then >/mnt/then/file && umount /mnt/then");
    guest.shell("dd if=/dev/urandom of=/dev/vdb2 bs=1M count=8 oflag=direct 2>/dev/null");
    let then = digest(&mut guest, "/dev/vdb");
    guest.shell(&format!("varve protect {GROUP} /dev/vdb"));
    let bookmark = |guest: &mut Guest, name: &str| {
        wait_until(LIMIT, "it is protected", || {
            let out = guest.shell_within(LIMIT, &format!("varve status {GROUP} --json"));
            let all: Value = serde_json::from_str(&out.stdout).unwrap_or_default();
            let groups = all["groups"].as_array().cloned().unwrap_or_default();
            groups.len() == 2 && groups.iter().all(|group| group["data"] == "protected")
        });
        guest.shell(&format!("varve bookmark {GROUP} {name}"));
    };
    bookmark(&mut guest, "then");
    guest.shell("dd if=/dev/urandom of=/dev/vdb bs=1M seek=20 count=30 oflag=direct 2>/dev/null");
    let later = digest(&mut guest, "/dev/vdb");
    bookmark(&mut guest, "later");

    // Two points at once; a writable one beside them.
    let (first, first_id) = open(&mut guest, "bookmark:then", "");
    let (second, second_id) = open(&mut guest, "bookmark:later", "");
    eprintln!("{series}: {first}, {second}");
    for device in [&first, &second] {
        assert_eq!(device.starts_with("/dev/ublkb"), series == UBLK, "{device}");
    }
    assert_eq!((digest(&mut guest, &first), digest(&mut guest, &second)), (then.clone(), later));
    assert_ne!(guest.shell_within(LIMIT, &format!("dd if=/dev/zero of={first} bs=4k count=1 oflag=direct")).code, 0);
    let (own, own_id) = open(&mut guest, "bookmark:then", "--writable");
    guest.shell(&format!("dd if=/dev/urandom of={own} bs=64k count=100 seek=700 oflag=direct conv=fsync"));
    guest.shell(&format!("blkdiscard -o 1048576 -l 4194304 {own}"));
    assert_ne!(digest(&mut guest, &own), then);
    assert_eq!(digest(&mut guest, &first), then);
    guest.shell(&format!("varve view close {own_id}"));
    // A mount of a partition holds the view.
    guest.shell(&format!("partx -a {first} && mount -o ro,noload {first}p1 /mnt/then && grep -q then /mnt/then/file"));
    let refused = guest.shell_within(LIMIT, &format!("varve view close {first_id}")).expect_code(3);
    assert!(refused.stderr.contains("in use"), "{}", refused.stderr);
    guest.shell(&format!("umount /mnt/then && partx -d {first}"));
    guest.shell(&format!("varve view close {first_id}"));
    assert_eq!(
        guest.shell_within(LIMIT, &format!("dd if={first} bs=4k count=1 iflag=direct | wc -c")).stdout.trim(),
        "0"
    );

    // The receiver is killed with a view that is read: its reader gets an error, nothing is left, all can be opened again.
    guest.shell(&format!(
        "sh -c 'while dd if={second} of=/dev/null bs=64k iflag=direct; do :; done' 2>/dev/null & echo $! >/run/reader"
    ));
    guest.shell("kill -9 $(cat /run/receiver.pid)");
    wait_until(LIMIT, "the reader is told", || guest.shell_within(LIMIT, "kill -0 $(cat /run/reader)").code != 0);
    start_receiver(&mut guest);
    let list = guest.shell_within(LIMIT, "varve view list --json").ok().json();
    assert_eq!(list["views"].as_array().map(Vec::len), Some(0), "view {second_id} went with its receiver: {list:#}");
    assert_eq!(guest.shell("ls /sys/class/ublk-char 2>/dev/null || true"), "");
    let (again, again_id) = open(&mut guest, "bookmark:then", "");
    assert_eq!(digest(&mut guest, &again), then);
    guest.shell(&format!("varve view close {again_id}"));

    // It ends in an orderly way with an open view.
    open(&mut guest, "bookmark:then", "");
    guest.shell("kill $(cat /run/receiver.pid)");
    wait_until(LIMIT, "the receiver ends", || guest.shell_within(LIMIT, "kill -0 $(cat /run/receiver.pid)").code != 0);
    assert_eq!(guest.shell("ls /sys/class/ublk-char 2>/dev/null || true"), "");
    guest.stop_agent();
    guest.shell("umount /mnt/state");
    guest.power_off();
}
crate::on_kernels!(a_receivers_views);
