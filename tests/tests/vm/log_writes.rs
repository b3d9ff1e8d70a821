//! dm-log-writes under the volume: the kernel's own record of what was written in which order judges the timeline.

use crate::bed::{Bed, GROUP, LIMIT};
use crate::log::{BLOCK, Log};
use std::path::Path;
use std::time::Duration;
use varve_tests::*;

const BYTES: u64 = 64 * MIB;
const VOLUME: &str = "/dev/mapper/judged";

/// A bed whose volume has a log below it, `/dev/vdc`, and what the volume held when the log began.
fn judged(series: &str) -> (Bed, Vec<u8>) {
    require_root();
    let bed = Bed::new(series, BYTES, &[("log.img", 2 * GIB)]);
    let base = std::fs::read(&bed.volume).unwrap();
    (bed, base)
}

/// A new log begins.
#[track_caller]
fn put_log_below(guest: &mut Guest) {
    guest.shell(&format!("dmsetup create judged --table '0 {} log-writes /dev/vdb /dev/vdc'", BYTES / 512));
}

#[track_caller]
fn log(bed: &Bed) -> Log {
    Log::read(&bed.scratch.join("log.img"))
}

/// Panics with the first block that differs.
#[track_caller]
fn assert_image(is: &[u8], should_be: &[u8], what: &str) {
    assert_eq!(is.len(), should_be.len(), "{what}");
    let differing: Vec<usize> = (0..is.len() / BLOCK)
        .filter(|block| is[block * BLOCK..][..BLOCK] != should_be[block * BLOCK..][..BLOCK])
        .collect();
    assert!(differing.is_empty(), "{what}: {} blocks differ, the first are {:?}", differing.len(), {
        &differing[..differing.len().min(16)]
    });
}

/// The end: off, in order; then the volume, the replica and the log's end are equal.
#[track_caller]
fn close(bed: &Bed, mut guest: Guest, base: &[u8]) -> Log {
    bed.wait_applied(&mut guest);
    // The agent holds the device as long as it is protected.
    guest.stop_agent();
    guest.shell(&format!("sync {VOLUME}; dmsetup message judged 0 mark end"));
    guest.shell("umount /mnt/state");
    guest.power_off();
    assert_same(&bed.volume, &bed.replica);
    let log = log(bed);
    let mut image = base.to_vec();
    log.replay(&mut image, 0..log.mark("end"));
    assert_image(&std::fs::read(&bed.replica).unwrap(), &image, "the replica and the log's end");
    log
}

/// A file system and a database write, are held now and then, and marked on both sides there.
fn marks_are_bookmarks(series: &str) {
    let (bed, base) = judged(series);
    let mut guest = bed.enrol();
    put_log_below(&mut guest);
    guest.shell(&format!("mount -o discard {VOLUME} /mnt/volume && load /mnt/volume"));
    bed.protect(&mut guest, VOLUME);
    let synced = bed.wait_protected(&mut guest);
    // Writes that were under way when capture began, and nothing else (the flushes of a device without requests once were).
    let late = guest.group(GROUP)["counters"]["late_writes"].as_u64().unwrap();
    assert!(late < 100, "{late} late writes after {synced:?}");
    let names: Vec<String> = (0..5).map(|number| format!("held{number}")).collect();
    for name in &names {
        std::thread::sleep(Duration::from_secs(1)); // some load in between
        bed.acknowledged(&mut guest);
        bed.wait_protected(&mut guest);
        guest.shell("fsfreeze --freeze /mnt/volume");
        // Writes are logged when they are flushed.
        guest.shell(&format!("sync {VOLUME}; dmsetup message judged 0 mark {name}; varve bookmark {GROUP} {name}"));
        guest.shell("fsfreeze --unfreeze /mnt/volume");
    }
    guest.shell_within(LIMIT, "load /mnt/volume stop").ok();
    guest.shell("umount /mnt/volume");
    let committed = bed.committed();
    let log = close(&bed, guest, &base);
    let (mut image, mut from) = (base, 0);
    for name in &names {
        let to = log.mark(name);
        log.replay(&mut image, from..to);
        from = to;
        let restored = std::fs::read(bed.restore(&format!("bookmark:{name}"))).unwrap();
        assert_image(&restored, &image, name);
    }
    assert_eq!(bed.records(&bed.replica), committed);
    let (written, discards) = log.tally();
    eprintln!(
        "first sync under load {synced:?}, {late} late writes; {} entries, {written} bytes written, {discards} discards, \
         {committed} commits",
        log.entries.len()
    );
    assert!(discards > 0, "the load was to discard");
}
crate::on_kernels!(marks_are_bookmarks);

/// One writer, one write at a time, never held: every bookmark is a place in the log, and they come in the same order.
fn order_is_the_logs_order(series: &str) {
    let (bed, base) = judged(series);
    let mut guest = bed.enrol();
    put_log_below(&mut guest);
    bed.protect(&mut guest, VOLUME);
    bed.wait_protected(&mut guest);
    guest.shell(&format!("load {VOLUME} one-by-one"));
    let names: Vec<String> = (0..12).map(|number| format!("flying{number}")).collect();
    for name in &names {
        guest.shell(&format!("varve bookmark {GROUP} {name}"));
        std::thread::sleep(Duration::from_millis(300)); // some load in between
    }
    guest.shell_within(LIMIT, &format!("load {VOLUME} stop")).ok();
    let log = close(&bed, guest, &base);
    let mut places = Vec::new();
    for name in &names {
        let restored = std::fs::read(bed.restore(&format!("bookmark:{name}"))).unwrap();
        let least = places.last().copied().unwrap_or(0);
        let place = log.find(&base, &restored, least);
        places.push(place.unwrap_or_else(|| panic!("{name} is no place in the log after {places:?}")));
    }
    let (written, discards) = log.tally();
    eprintln!("{} entries, {written} bytes written, {discards} discards, bookmarks at {places:?}", log.entries.len());
    assert!(places[11] > places[0] + 20 && discards > 0, "too little was written between them: {places:?}");
}
crate::on_kernels!(order_is_the_logs_order);

/// The power goes, and with it what the disk had not made durable: the replica has more than the volume, and follows it back.
fn disk_that_forgets_its_cache(series: &str) {
    let (bed, base) = judged(series);
    let mut guest = bed.enrol();
    put_log_below(&mut guest);
    guest.shell(&format!("mount {VOLUME} /mnt/volume && load /mnt/volume"));
    bed.protect(&mut guest, VOLUME);
    bed.wait_protected(&mut guest);
    // Not synced by anybody: the cache's own. Then what the receiver has is more than what the disk keeps.
    let acknowledged = bed.acknowledged(&mut guest);
    guest.shell("dd if=/dev/urandom of=/mnt/volume/unsynced bs=1M count=8 oflag=direct 2>/dev/null");
    bed.acknowledged(&mut guest);
    guest.cut_power();
    let log = log(&bed);
    let mut image = base;
    log.replay(&mut image, 0..log.entries.len());
    let had = std::fs::read(&bed.volume).unwrap();
    let forgotten =
        (0..had.len() / BLOCK).filter(|block| had[block * BLOCK..][..BLOCK] != image[block * BLOCK..][..BLOCK]);
    eprintln!("the disk forgets {} blocks", forgotten.count());
    std::fs::write(&bed.volume, &image).unwrap();
    assert!(bed.records(&bed.restore("latest")) >= acknowledged);

    let mut guest = bed.boot();
    put_log_below(&mut guest);
    restart(&mut guest);
    guest.shell(&format!("mount {VOLUME} /mnt/volume && umount /mnt/volume"));
    close(&bed, guest, &image);
}
crate::on_kernels!(disk_that_forgets_its_cache);

/// The volume was not there when the agent started.
#[track_caller]
fn restart(guest: &mut Guest) {
    guest.stop_agent();
    guest.start_agent();
}

/// The judge itself, on a log made by hand.
#[test]
fn a_log_is_read_and_replayed() {
    let scratch = Scratch::memory();
    let path = scratch.join("log");
    write_log(&path);
    let log = Log::read(&path);
    assert_eq!((log.entries.len(), log.mark("half"), log.tally()), (4, 1, (1024, 1)));
    assert!(log.entries[3].flush);
    let base = vec![9; 2 * BLOCK];
    let mut image = base.clone();
    log.replay(&mut image, 0..log.mark("half"));
    assert!(image[..512] == [9; 512] && image[512..1024] == [1; 512] && image[1024..] == base[1024..]);
    assert_eq!(log.find(&base, &image, 0), Some(1));
    log.replay(&mut image, 2..4);
    assert!(image[512..1024] == [0; 512] && image[BLOCK..BLOCK + 512] == [2; 512]);
    assert_eq!((log.find(&base, &image, 0), log.find(&base, &image, 4)), (Some(4), Some(4)));
    image[0] = 1;
    assert_eq!(log.find(&base, &image, 0), None);
}

/// Writes a sector, a mark, a discard of it, and a sector of the second block with a flush.
fn write_log(path: &Path) {
    let sector = |words: &[u64], tail: &[u8]| {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).chain(tail.iter().copied()).collect();
        bytes.resize(512, 0);
        bytes
    };
    let parts = [
        sector(&[0x006a_7366_7773_6872, 1, 4, 512], &[]),
        sector(&[1, 1, 0, 0], &[]),
        vec![1; 512],
        sector(&[0, 0, 8, 4], b"half"),
        sector(&[1, 1, 4, 0], &[]),
        sector(&[8, 1, 1, 0], &[]),
        vec![2; 512],
    ];
    std::fs::write(path, parts.concat()).unwrap();
}
