//! Every load on every kind of device: the records, replayed, equal the device byte for byte. Needs root.
#![allow(unsafe_code, clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::libc;
use nix::sys::uio::pwritev;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use support::aligned::Buffer;
use support::*;
use varve_bpf::Group;
use varve_common::record::RecordKind;

/// Captures the whole device during the load, then compares; every count must be back at zero.
fn checked(device: &Device, load_it: impl FnOnce(&Device)) -> judge::Judge {
    let capture = load(device);
    let group = Arc::new(capture.add_group(256 << 20, &[device.whole()]).unwrap());
    settle(&group);
    let running = judge::start(&group);
    load_it(device);
    let image = device.read_all();
    let judge = running.finish();
    eprintln!("misses: {} {}", capture.misses().unwrap(), capture.completion_misses().unwrap());
    eprintln!("{:?}", group.counters());
    judge.compare(0, &image);
    assert_clean(&capture, &group, &judge);
    judge
}

fn settle(group: &Group) {
    // A bio-based device does not count what is in flight, so it would take its 30 s.
    if group.volumes()[0].spec().request_based {
        wait_for("settling", || group.poll_settled().unwrap());
    }
}

fn assert_clean(capture: &varve_bpf::Capture, group: &Group, judge: &judge::Judge) {
    assert_eq!(capture.misses().unwrap(), 0, "programs were skipped");
    bring_to_zero(capture, group);
    let counters = group.counters();
    eprintln!("{counters:?}");
    assert_eq!((counters.dropped_records, counters.unreadable, counters.late), (0, 0, 0));
    assert_eq!((counters.late_unknown, counters.untracked, counters.passthrough), (0, 0, 0));
    assert_eq!(group.take_first_drop(), None);
    // Loop devices over some filesystems refuse write-zeroes, and the caller writes zeroes instead.
    let failed = counters.failed_writes;
    assert!(failed <= judge.kinds[RecordKind::WriteZeroes as usize], "{failed} writes failed");
    assert!(failed > 0 || group.volumes().iter().all(|volume| volume.dirty_count() == 0));
}

/// Threads that write random extents, each in a stretch of its own (the order of overlapping concurrent writes is
/// nobody's business, not even the disk's).
fn random_writes(device: &Device, seed: u64, sector: u64, bytes_max: u64, flags: i32, count: usize, offset: usize) {
    const THREADS: u64 = 4;
    let stretch = device.bytes() / THREADS;
    std::thread::scope(|scope| {
        for t in 0..THREADS {
            scope.spawn(move || {
                let mut random = StdRng::seed_from_u64(seed + t);
                let file = open(&device.path, flags);
                let mut buffer = Buffer::new(bytes_max as usize, offset);
                for _ in 0..count {
                    // Small writes are common, large ones rare.
                    let limit = bytes_max >> random.random_range(0..8);
                    let bytes = random.random_range(1..=(limit / sector).max(1)) * sector;
                    let at = random.random_range(0..=(stretch - bytes) / sector) * sector;
                    random.fill_bytes(&mut buffer.bytes_mut()[..bytes as usize]);
                    file.write_all_at(&buffer.bytes()[..bytes as usize], t * stretch + at).unwrap();
                }
                if flags & libc::O_DIRECT == 0 {
                    file.sync_all().unwrap();
                }
            });
        }
    });
}

#[test]
fn direct_random_in_memory() {
    let seed = seed();
    checked(&loop_device(64 * MIB), |d| random_writes(d, seed, 512, 4 * MIB, libc::O_DIRECT, 200, 0));
}

#[test]
fn direct_random_on_disk() {
    let seed = seed();
    let device = loop_device_in(disk_dir(), 64 * MIB, &["--direct-io=on"]);
    checked(&device, |d| random_writes(d, seed, 512, 4 * MIB, libc::O_DIRECT, 200, 0));
}

#[test]
fn direct_from_unaligned_memory() {
    let seed = seed();
    checked(&loop_device(64 * MIB), |d| random_writes(d, seed, 512, MIB, libc::O_DIRECT, 200, 512));
}

#[test]
fn sectors_of_4096() {
    let seed = seed();
    let device = loop_device_in(memory_dir(), 64 * MIB, &["--sector-size", "4096"]);
    checked(&device, |d| random_writes(d, seed, 4096, 2 * MIB, libc::O_DIRECT, 200, 0));
}

#[test]
fn buffered() {
    let seed = seed();
    checked(&loop_device(64 * MIB), |d| random_writes(d, seed, 1, MIB, 0, 200, 3));
}

#[test]
fn bio_based() {
    let seed = seed();
    // Only from whole pages: zram itself (6.18) stores wrong bytes of an unaligned buffer, with or without us.
    let device = Device::zram(64 * MIB);
    let judge = checked(&device, |d| {
        random_writes(d, seed, 4096, MIB, libc::O_DIRECT, 100, 0);
        random_writes(d, seed, 1, MIB, 0, 50, 1);
        range_ioctl(&d.buffered(), BLKDISCARD, MIB, 5 * MIB);
        random_writes(d, seed, 4096, 64 * KIB, libc::O_DIRECT, 100, 0);
    });
    assert!(judge.kinds[RecordKind::Discard as usize] > 0);
}

#[test]
fn synchronous_writes_carry_their_flags() {
    let seed = seed();
    let judge = checked(&loop_device(16 * MIB), |d| {
        random_writes(d, seed, 512, 64 * KIB, libc::O_DIRECT | libc::O_DSYNC, 50, 0);
        random_writes(d, seed, 1, 64 * KIB, libc::O_DSYNC, 20, 0);
    });
    assert!(judge.fua >= 200, "{} writes with FUA", judge.fua);
    assert!(judge.kinds[RecordKind::Flush as usize] > 0);
}

#[test]
fn vectors_of_many_segments() {
    let seed = seed();
    checked(&loop_device(32 * MIB), |d| {
        let mut random = StdRng::seed_from_u64(seed);
        let file = d.direct();
        for _ in 0..100 {
            let mut buffers = Vec::new();
            for _ in 0..random.random_range(1..100) {
                let bytes = random.random_range(1..=20) * 512;
                let mut buffer = Buffer::new(bytes, 512 * random.random_range(0..8));
                random.fill_bytes(buffer.bytes_mut());
                buffers.push(buffer);
            }
            let slices: Vec<IoSlice<'_>> = buffers.iter().map(|b| IoSlice::new(b.bytes())).collect();
            let bytes: u64 = slices.iter().map(|s| s.len() as u64).sum();
            let at = random.random_range(0..(d.bytes() - bytes) / 512) * 512;
            assert_eq!(pwritev(&file, &slices, at as i64).unwrap() as u64, bytes);
        }
    });
}

#[test]
fn bios_of_many_records() {
    let seed = seed();
    let judge = checked(&loop_device(64 * MIB), |d| {
        let mut random = StdRng::seed_from_u64(seed);
        let mut buffer = Buffer::aligned(16 * MIB as usize, 0, 2 * MIB as usize);
        // SAFETY: advice about our own allocation.
        let advised =
            unsafe { libc::madvise(buffer.bytes_mut().as_mut_ptr().cast(), 16 * MIB as usize, libc::MADV_HUGEPAGE) };
        assert_eq!(advised, 0);
        random.fill_bytes(buffer.bytes_mut());
        let file = d.direct();
        for _ in 0..10 {
            let bytes = random.random_range(1..=16 * MIB / 512) * 512;
            let from = random.random_range(0..=(16 * MIB - bytes) / 512) * 512;
            let at = random.random_range(0..=(d.bytes() - bytes) / 512) * 512;
            file.write_all_at(&buffer.bytes()[from as usize..(from + bytes) as usize], at).unwrap();
        }
    });
    assert!(judge.more > 0, "no bio was longer than a record");
}

#[test]
fn zeroes_and_discards() {
    let seed = seed();
    let judge = checked(&loop_device(128 * MIB), |d| {
        let mut random = StdRng::seed_from_u64(seed);
        let file = d.buffered();
        for i in 0..60 {
            random_writes(d, seed + i, 512, 256 * KIB, libc::O_DIRECT, 3, 0);
            let at = random.random_range(0..100 * MIB / 4096) * 4096;
            let bytes = random.random_range(1..=20 * MIB / 4096) * 4096;
            match i % 3 {
                0 => range_ioctl(&file, BLKDISCARD, at, bytes),
                1 => range_ioctl(&file, BLKZEROOUT, at, bytes),
                _ => zero_range(&file, at, bytes),
            }
        }
    });
    assert!(judge.kinds[RecordKind::Discard as usize] > 0);
    assert!(judge.kinds[RecordKind::WriteZeroes as usize] > 0);
}

fn zero_range(file: &File, at: u64, bytes: u64) {
    let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: no memory is passed.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, at as i64, bytes as i64) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn two_partitions_are_two_volumes_of_one_order() {
    let seed = seed();
    let device = loop_device(64 * MIB);
    let script = "label: gpt\nstart=2048, size=40960\nstart=43008, size=81920\n";
    let path = device.path.to_str().unwrap();
    let shell = format!("printf '{script}' | sfdisk -q --no-reread {path} && partx -u {path}");
    run("sh", &["-c", &shell]);
    let name = device.path.file_name().unwrap().to_str().unwrap();
    wait_for("partitions", || std::path::Path::new(&format!("/sys/block/{name}/{name}p2")).exists());
    let capture = load(&device);
    let parts = [(MIB, 20 * MIB), (21 * MIB, 40 * MIB)];
    let specs = parts.map(|(start, bytes)| device.part(start, bytes));
    let group = Arc::new(capture.add_group(64 << 20, &specs).unwrap());
    settle(&group);
    let running = judge::start(&group);
    std::thread::scope(|scope| {
        for p in 1..=2 {
            scope.spawn(move || {
                let file = partition(name, p);
                let mut random = StdRng::seed_from_u64(seed + p);
                let mut buffer = Buffer::new(MIB as usize, 0);
                for _ in 0..100 {
                    let bytes = random.random_range(1..=2 * KIB) * 512;
                    let at = random.random_range(0..=(20 * MIB - bytes) / 512) * 512;
                    random.fill_bytes(&mut buffer.bytes_mut()[..bytes as usize]);
                    file.write_all_at(&buffer.bytes()[..bytes as usize], at).unwrap();
                }
                file.sync_all().unwrap();
            });
        }
    });
    // Through the whole disk, inside the second partition; and outside of both.
    let mut buffer = Buffer::new(4096, 0);
    buffer.bytes_mut().fill(9);
    device.direct().write_all_at(buffer.bytes(), 22 * MIB).unwrap();
    device.direct().write_all_at(buffer.bytes(), 62 * MIB).unwrap();
    let image = device.read_all();
    let judge = running.finish();
    for (volume, (start, bytes)) in parts.into_iter().enumerate() {
        judge.compare(volume, &image[start as usize..(start + bytes) as usize]);
    }
    assert!(judge.kinds[RecordKind::Flush as usize] >= 4, "a flush is for each volume");
    assert_clean(&capture, &group, &judge);

    // A write across the edge: the parts inside are dirty, and nothing stays in flight.
    let buffer = Buffer::new(2 * MIB as usize, 0);
    device.direct().write_all_at(&buffer.bytes()[..MIB as usize], 20 * MIB + 512 * KIB).unwrap();
    assert_eq!(group.volumes()[0].counters().straddling, 1);
    assert_eq!(group.volumes()[0].next_dirty(0), Some(19));
    assert_eq!(group.volumes()[1].next_dirty(0), Some(0));
    assert_in_flight_zero(&group);
}

fn partition(disk: &str, number: u64) -> File {
    // Without udev nobody makes the node.
    let dev = std::fs::read_to_string(format!("/sys/block/{disk}/{disk}p{number}/dev")).unwrap();
    let (major, minor) = dev.trim().split_once(':').unwrap();
    let dir = memory_dir();
    let node = dir.path().join("node");
    run("mknod", &[node.to_str().unwrap(), "b", major, minor]);
    open(&node, libc::O_DIRECT)
}

#[test]
fn a_filesystem_at_work() {
    let device = loop_device(256 * MIB);
    checked(&device, |d| {
        let mount = Mount::ext4(&d.path);
        let inside = mount.path().to_str().unwrap().to_string();
        let job = format!(
            "--directory={inside} --size=8m --bsrange=512-128k --runtime=4 --time_based --numjobs=2 \
             --group_reporting --name=a --rw=randwrite --fsync=20 --rate_iops=2000 --name=b --rw=randrw --ioengine=io_uring \
             --iodepth=16 --direct=1 --bs=4k --rate_iops=4000"
        );
        run(
            "sh",
            &[
                "-c",
                &format!("fio {job} && cp -r /usr/share/doc/libc6 {inside}/x && rm -r {inside}/x && fstrim {inside}"),
            ],
        );
    });
}

#[test]
fn io_uring_at_depth() {
    let device = loop_device(128 * MIB);
    checked(&device, |d| {
        let path = d.path.to_str().unwrap();
        run(
            "fio",
            &[
                "--name=a",
                &format!("--filename={path}"),
                "--ioengine=io_uring",
                "--direct=1",
                "--rw=randwrite",
                "--iodepth=64",
                "--bssplit=4k/60:64k/20:8k/10:1m/10",
                "--size=128m",
                "--fixedbufs=1",
            ],
        );
    });
}
