//! Capture that goes on without the process that began it. "The process ends" is played by forgetting what it held:
//! the kernel cannot tell (its files are what keeps things alive, and the pins do that here).
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use support::*;
use varve_bpf::{Capture, CaptureErrorKind, CaptureOptions, Entry, Group, NOTE_WORDS, Origin, VolumeSpec};

/// A bpffs of its own.
struct Bpffs(tempfile::TempDir);

impl Bpffs {
    fn new() -> Self {
        Self(memory_dir())
    }

    fn pins(&self) -> PathBuf {
        self.0.path().join("bpf/varve")
    }

    /// Everything that is pinned, by its path. (The kernel has two files of its own in a new bpffs.)
    fn walk(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut dirs = vec![self.0.path().join("bpf")];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    dirs.push(entry.path());
                }
                if !entry.file_name().to_string_lossy().ends_with(".debug") {
                    found.push(entry.path());
                }
            }
        }
        found
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0.path().join("bpf"), nix::mount::MntFlags::MNT_DETACH);
    }
}

fn open(device: &Device, bpffs: &Bpffs) -> Capture {
    Capture::open(&CaptureOptions { probe: device.path.clone() }, &bpffs.pins()).unwrap()
}

fn add(capture: &Capture, name: &str, volumes: &[VolumeSpec]) -> Group {
    let group = capture.add_named_group(name, [7; 16], 4 << 20, volumes).unwrap();
    group.set_note(&[1; NOTE_WORDS]);
    group
}

fn write(device: &Device, sector: u64, fill: u8) {
    let mut buffer = aligned::Buffer::new(4096, 0);
    buffer.bytes_mut().fill(fill);
    device.direct().write_all_at(buffer.bytes(), sector * 512).unwrap();
}

/// First bytes of the payloads in the ring.
fn fills(group: &Group) -> Vec<u8> {
    let (ring, mut at, mut fills) = (group.ring(), group.ring().consumer(), Vec::new());
    while let Some(Entry::Record { bytes, header }) = ring.entry(at) {
        let mut payload = vec![0; header.payload.get() as usize];
        ring.copy_out(at + 40, &mut payload);
        fills.extend(payload.first());
        at += bytes;
    }
    fills
}

#[test]
fn capture_goes_on_and_the_next_process_continues() {
    let (bpffs, disk) = (Bpffs::new(), loop_device(8 * MIB));
    let capture = open(&disk, &bpffs);
    assert_eq!((capture.origin(), capture.is_pinned()), (&Origin::New, true));
    let group = add(&capture, "db", &[disk.whole()]);
    write(&disk, 0, 1);
    group.set_time_offset(5);
    group.volumes()[0].set_dirty(3);
    group.volumes()[0].set_dirty(4);
    assert!(group.volumes()[0].take_dirty(4), "in hand");
    group.volumes()[0].set_dirty(6);
    assert!(group.volumes()[0].take_dirty(6));
    group.volumes()[0].set_finished(6);
    let (counters, consumer) = (group.counters(), group.ring().consumer());
    drop(group);
    drop(capture);

    write(&disk, 8, 2);
    let capture = open(&disk, &bpffs);
    assert_eq!(
        capture.origin(),
        &Origin::TakenOver { software: env!("CARGO_PKG_VERSION").into(), same_programs: true }
    );
    assert_eq!(capture.kept(), ["db"]);
    let group = capture.take_over_group("db", &[disk.whole()]).unwrap().unwrap();
    assert_eq!(capture.kept(), Vec::<String>::new());
    write(&disk, 16, 3);
    assert_eq!(fills(&group), [1, 2, 3]);
    assert_eq!((group.ring().consumer(), group.incarnation(), group.time_offset()), (consumer, [7; 16], 5));
    assert_eq!(group.note(), [1; NOTE_WORDS]);
    assert_eq!(group.counters().captured_records, counters.captured_records + 2, "each write once");
    let track = &group.volumes()[0];
    let dirty: Vec<u64> = std::iter::successors(track.next_dirty(0), |r| track.next_dirty(r + 1)).collect();
    assert_eq!(dirty, [3, 4], "what was in hand is dirty again, what was finished is not");
    assert!(!track.in_flight(0), "counted down by programs that nobody watched");

    group.end();
    drop(group);
    capture.unpin().unwrap();
    assert_eq!(bpffs.walk(), Vec::<PathBuf>::new());
    drop(capture);
    assert!(!varve_bpf::unpin_all(&bpffs.pins()).unwrap());
}

#[test]
fn what_was_given_up_or_never_noted_is_not_gone_on_with() {
    let (bpffs, disk) = (Bpffs::new(), loop_device(8 * MIB));
    let part = |number: u64| disk.part(number * MIB, MIB);
    let capture = open(&disk, &bpffs);
    let ended = add(&capture, "ended", &[part(0)]);
    let kept = add(&capture, "kept", &[part(1), part(2)]);
    let fresh = capture.add_named_group("fresh", [0; 16], 1 << 20, &[part(3)]).unwrap();
    ended.end();
    // Killed: no destructor runs.
    std::mem::forget((ended, kept, fresh, capture));

    let capture = open(&disk, &bpffs);
    assert_eq!(capture.kept(), ["kept"]);
    // What nobody takes over is not captured, its slots can be used.
    assert!(capture.take_over_group("fresh", &[part(3)]).is_none());
    let again = add(&capture, "fresh", &[part(3)]);
    write(&disk, 3 * 2048, 9);
    assert_eq!(fills(&again), [9]);
    // The same volumes, in the same order, or nothing.
    let refused = |specs: &[VolumeSpec]| capture.take_over_group("kept", specs).unwrap().err().unwrap();
    assert!(refused(&[part(1)]).contains("captures 2"), "{}", refused(&[part(1)]));
    assert!(refused(&[part(2), part(1)]).contains("volume 0"));
    assert!(refused(&[part(1), disk.part(2 * MIB, MIB / 2)]).contains("volume 1"));
    assert_eq!(capture.kept(), ["kept"], "a refusal changes nothing");
    let kept = capture.take_over_group("kept", &[part(1), part(2)]).unwrap().unwrap();
    write(&disk, 2 * 2048, 5);
    assert_eq!(fills(&kept), [5]);
    std::mem::forget((kept, again, capture));

    let capture = open(&disk, &bpffs);
    let mut names = capture.kept();
    names.sort();
    assert_eq!(names, ["fresh", "kept"]);
    assert!(capture.give_up("kept") && !capture.give_up("kept"));
    assert!(capture.take_over_group("kept", &[part(1), part(2)]).is_none());
    capture.unpin().unwrap();
    assert_eq!(bpffs.walk(), Vec::<PathBuf>::new());
}

/// The number is the same, the disk behind it is not.
#[test]
fn another_disk_of_the_same_number_is_not_gone_on_with() {
    let (bpffs, disk) = (Bpffs::new(), loop_device(8 * MIB));
    let capture = open(&disk, &bpffs);
    std::mem::forget(add(&capture, "db", &[disk.whole()]));
    let path = disk.path.to_str().unwrap();
    run("losetup", &["-d", path]);
    run("losetup", &[path, disk.backing.to_str().unwrap()]);
    drop(capture);
    let capture = open(&disk, &bpffs);
    let why = capture.take_over_group("db", &[disk.whole()]).unwrap().err().unwrap();
    assert!(why.contains("is not the disk"), "{why}");
    assert!(capture.give_up("db"));
    capture.unpin().unwrap();
}

#[test]
fn pins_that_cannot_be_used_are_replaced_with_the_reason() {
    let (bpffs, disk) = (Bpffs::new(), loop_device(8 * MIB));
    let change = |name: &str, at: usize, value: u8| {
        use libbpf_rs::{MapCore, MapFlags, MapHandle};
        let map = MapHandle::from_pinned_path(bpffs.pins().join("set").join(name)).unwrap();
        let mut bytes = map.lookup(&0u32.to_ne_bytes(), MapFlags::ANY).unwrap().unwrap();
        bytes[at] ^= value;
        map.update(&0u32.to_ne_bytes(), &bytes, MapFlags::ANY).unwrap();
    };
    // Identity: magic, layout, boot id. Then the constants that were proved, then a set that is not whole.
    let cases: [(&dyn Fn(), &str); 5] = [
        (&|| change("map_identity", 0, 1), "not one of Varve"),
        (&|| change("map_identity", 8, 0x40), "layout is 65"),
        (&|| change("map_identity", 17, 1), "another boot"),
        (&|| change("map_config", 8, 1), "from a page to its data"),
        (&|| std::fs::remove_file(bpffs.pins().join("set/link_capture")).unwrap(), "link capture"),
    ];
    let mut capture = open(&disk, &bpffs);
    for (damage, word) in cases {
        std::mem::forget(add(&capture, "db", &[disk.whole()]));
        damage();
        drop(capture);
        capture = open(&disk, &bpffs);
        assert!(matches!(capture.origin(), Origin::Replaced(why) if why.contains(word)), "{:?}", capture.origin());
        assert_eq!(capture.kept(), Vec::<String>::new());
        let group = add(&capture, "new", &[disk.whole()]);
        write(&disk, 0, 4);
        assert_eq!(fills(&group), [4], "captured once: the old programs are gone");
        group.end();
    }
    capture.unpin().unwrap();
    assert_eq!(bpffs.walk(), Vec::<PathBuf>::new());
}

/// What a process leaves that was killed while it pinned.
#[test]
fn half_a_set_is_taken_away() {
    let (bpffs, disk) = (Bpffs::new(), loop_device(8 * MIB));
    drop(open(&disk, &bpffs));
    std::fs::rename(bpffs.pins().join("set"), bpffs.pins().join("new")).unwrap();
    let capture = open(&disk, &bpffs);
    assert_eq!(capture.origin(), &Origin::New);
    assert!(!bpffs.pins().join("new").exists());
    capture.unpin().unwrap();
}

/// Where the machine's own installation pins: nothing is mounted, and nobody but root may look.
#[test]
fn the_systems_own_bpffs_is_used_as_it_is() {
    use std::os::unix::fs::MetadataExt;
    let disk = loop_device(8 * MIB);
    let pins = PathBuf::from(format!("/sys/fs/bpf/varve-test-{}", std::process::id()));
    let mounts = || std::fs::read_to_string("/proc/self/mounts").unwrap().matches("/sys/fs/bpf").count();
    if mounts() == 0 {
        // As a service manager does at boot; a build host may have none.
        let mounted = std::process::Command::new("mount").args(["-t", "bpf", "bpf", "/sys/fs/bpf"]).status();
        assert!(mounted.unwrap().success());
    }
    let before = mounts();
    let options = CaptureOptions { probe: disk.path.clone() };
    let capture = Capture::open(&options, &pins).unwrap();
    assert!(capture.is_pinned() && varve_bpf::is_pinned(&pins));
    assert_eq!((mounts(), std::fs::metadata(&pins).unwrap().mode() & 0o777), (before, 0o700));
    drop(capture);
    assert!(varve_bpf::unpin_all(&pins).unwrap());
    assert!(!pins.exists());
}

/// Without a consumer the ring gets full: bits and the place of the first drop are there for whoever comes.
#[test]
fn a_ring_that_ran_full_alone_has_its_dirty_regions() {
    let (bpffs, disk) = (Bpffs::new(), loop_device(8 * MIB));
    let capture = open(&disk, &bpffs);
    let group = capture.add_named_group("db", [7; 16], 64 << 10, &[disk.whole()]).unwrap();
    group.set_note(&[1; NOTE_WORDS]);
    drop((group, capture));
    for page in 0..64 {
        write(&disk, page * 8, page as u8);
    }
    let capture = open(&disk, &bpffs);
    let group = capture.take_over_group("db", &[disk.whole()]).unwrap().unwrap();
    let got = fills(&group);
    assert_eq!(got, (0..got.len() as u8).collect::<Vec<_>>());
    assert_eq!(group.counters().dropped_records, 64 - got.len() as u64);
    assert_eq!(group.take_first_drop(), Some(group.ring().producer()));
    assert_eq!(group.volumes()[0].next_dirty(0), Some(0));
    group.end();
    capture.unpin().unwrap();
}

/// No bpffs can be mounted there: capture works, and says that it ends with the process.
#[test]
fn without_a_place_for_pins_capture_says_so() {
    let disk = loop_device(8 * MIB);
    let options = CaptureOptions { probe: disk.path.clone() };
    let capture = Capture::open(&options, &PathBuf::from("/proc/nowhere/varve")).unwrap();
    assert!(matches!(capture.origin(), Origin::Unpinned(why) if why.contains("/proc/nowhere")), "{}", capture.origin());
    assert!(!capture.is_pinned());
    let group = capture.add_named_group("db", [7; 16], 64 << 10, &[disk.whole()]).unwrap();
    group.set_note(&[1; NOTE_WORDS]);
    write(&disk, 0, 1);
    assert_eq!(fills(&group), [1]);
    let full = capture.add_group(1000, &[disk.whole()]).err().unwrap();
    assert_eq!(full.kind(), CaptureErrorKind::Invalid);
}

/// Grown twice while writes go on, by the process that has it and by one that takes it over: no hole, no bit lost, what is
/// new is dirty, and the first write that meets the new size says so at its place.
#[test]
fn a_volume_that_grew_is_captured_on() {
    let (bpffs, disk) = (Bpffs::new(), loop_device(100 * MIB));
    let capture = open(&disk, &bpffs);
    let spec = |bytes| varve_bpf::VolumeSpec { bytes, ..disk.whole() };
    let mut group = add(&capture, "db", &[disk.whole()]);
    let noted = group.note();
    write(&disk, 2048, 1);
    assert_eq!(fills(&group), [1]);
    let track = &group.volumes()[0];
    track.set_dirty(3);
    assert!(track.take_dirty(3));
    track.set_dirty(99);
    let resize = |bytes: u64| {
        std::fs::File::options().write(true).open(&disk.backing).unwrap().set_len(bytes).unwrap();
        run("losetup", &["-c", disk.path.to_str().unwrap()]);
    };
    resize(300 * MIB);
    let before = group.ring().producer();
    write(&disk, 250 * 2048, 2);
    assert_eq!(group.counters().resized, 1);
    assert_eq!(group.take_first_drop(), Some(before));
    write(&disk, 4096, 3);
    assert_eq!((group.counters().resized, group.take_first_drop()), (1, None), "said once");
    assert_eq!(fills(&group), [1, 3], "beyond the old end nothing is captured");
    assert!(group.is_outgrown(&[spec(300 * MIB)]) && !group.is_outgrown(&[spec(100 * MIB)]));
    group.grow(&[spec(300 * MIB)]).unwrap();
    let dirty = |group: &varve_bpf::Group| {
        let track = &group.volumes()[0];
        std::iter::successors(track.next_dirty(0), |at| track.next_dirty(at + 1)).collect::<Vec<u64>>()
    };
    let mut wanted = vec![3, 99];
    wanted.extend(100..300);
    assert_eq!(dirty(&group), wanted);
    write(&disk, 299 * 2048, 4);
    assert_eq!(fills(&group), [1, 3, 4]);
    assert_eq!(group.counters().captured_records, 3);
    group.set_note(&noted);
    // In this process, then in the next one.
    assert!(group.leave() && !group.leave());
    drop(group);
    resize(301 * MIB);
    let group = capture.take_over_group("db", &[spec(301 * MIB)]).unwrap().unwrap();
    assert!(group.is_outgrown(&[spec(301 * MIB)]));
    group.set_note(&noted);
    std::mem::forget((group, capture));
    let capture = open(&disk, &bpffs);
    let mut group = capture.take_over_group("db", &[spec(301 * MIB)]).unwrap().unwrap();
    write(&disk, 7 * 2048, 5);
    group.grow(&[spec(301 * MIB)]).unwrap();
    write(&disk, 300 * 2048, 6);
    assert_eq!(fills(&group), [1, 3, 4, 5, 6]);
    assert_eq!(group.counters().resized, 2);
    wanted.push(300);
    assert_eq!(dirty(&group), wanted);
    wait_for("old writes have completed", || group.poll_settled().unwrap());
    assert!((0..301).all(|region| !group.volumes()[0].in_flight(region)));
    drop(group);
    capture.unpin().unwrap();
}
