//! What must not be lost when things go wrong: a full ring, failed and refused writes, slow devices. Needs root.
#![allow(unsafe_code, clippy::unwrap_used)]

mod support;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::libc;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use support::aligned::Buffer;
use support::*;
use varve_bpf::{CaptureErrorKind, Group, REGION_BYTES, VolumeSpec};
use varve_common::record::RecordKind;

fn random_write(device: &Device, random: &mut StdRng, bytes_max: u64) {
    let bytes = random.random_range(1..=bytes_max / 512) * 512;
    let at = random.random_range(0..=(device.bytes() - bytes) / 512) * 512;
    let mut buffer = Buffer::new(bytes as usize, 0);
    random.fill_bytes(buffer.bytes_mut());
    device.direct().write_all_at(buffer.bytes(), at).unwrap();
}

#[test]
fn a_full_ring_leaves_dirty_regions_and_a_whole_prefix() {
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    let device = loop_device(64 * MIB);
    let capture = load(&device);
    let group = Arc::new(capture.add_group(256 << 10, &[device.whole()]).unwrap());
    wait_for("settling", || group.poll_settled().unwrap());
    assert_eq!(group.take_first_drop(), None);

    // One by one, so that the device after each write is known: the first drop must be a point between two writes.
    let volume = &group.volumes()[0];
    let mut before_first_drop = None;
    for _ in 0..60 {
        if before_first_drop.is_none() {
            let image = device.read_all();
            random_write(&device, &mut random, 64 * KIB);
            if volume.counters().dropped_records > 0 {
                before_first_drop = Some(image);
            }
        } else {
            random_write(&device, &mut random, 3 * MIB);
        }
    }
    let first_drop = group.take_first_drop().expect("the ring was full");
    assert_eq!(group.take_first_drop(), None, "it was taken");
    let counters = group.counters();
    assert!(counters.dropped_records > 0 && counters.dropped_bytes > 0);
    assert!(volume.dirty_count() > 0);

    let mut judge = judge::Judge::new(&group);
    judge.take_until(&group, first_drop);
    assert_eq!(judge.position, first_drop, "the first drop is between two entries");
    judge.compare(0, &before_first_drop.unwrap());
    judge.take(&group);

    // What the stream does not hold is in dirty regions.
    let image = device.read_all();
    for (region, (a, b)) in
        judge.images[0].chunks(REGION_BYTES as usize).zip(image.chunks(REGION_BYTES as usize)).enumerate()
    {
        let dirty = volume.take_dirty(region as u64);
        assert!(dirty || a == b, "region {region} differs and is clean");
    }
    assert_eq!(volume.next_dirty(0), None);

    // The ring was released: capture goes on.
    judge.images[0].copy_from_slice(&image);
    for _ in 0..20 {
        random_write(&device, &mut random, 64 * KIB);
        judge.take(&group);
    }
    judge.compare(0, &device.read_all());
    assert_eq!(volume.dirty_count(), 0);
    assert_in_flight_zero(&group);
}

#[test]
fn discards_that_do_not_fit_make_all_their_regions_dirty() {
    let device = loop_device(3 << 30);
    let capture = load(&device);
    let group = capture.add_group(64 << 10, &[device.part(0, 3 << 30)]).unwrap();
    wait_for("settling", || group.poll_settled().unwrap());
    while group.mark(RecordKind::Canary, 0, 0, &[0; 255]).is_ok() {}
    while group.mark(RecordKind::Canary, 0, 0, &[]).is_ok() {}
    let refused = group.mark(RecordKind::Bookmark, 0, 0, b"name").unwrap_err();
    assert_eq!(refused.kind(), CaptureErrorKind::RingFull);
    range_ioctl(&device.buffered(), BLKDISCARD, 5 * MIB, 3 * 1024 * MIB - 10 * MIB);
    let volume = &group.volumes()[0];
    assert_eq!(volume.dirty_count(), 3072 - 10);
    assert_eq!(volume.next_dirty(0), Some(5));
    assert_eq!(volume.next_dirty(3067), None);
    assert_in_flight_zero(&group);
    volume.set_all_dirty();
    assert_eq!(volume.dirty_count(), volume.regions());
}

#[test]
fn failed_writes_leave_a_dirty_region() {
    let mount = Mount::tmpfs(2 * MIB);
    let backing = mount.path().join("backing");
    std::fs::File::create(&backing).unwrap().set_len(16 * MIB).unwrap();
    {
        let device = Device::over(&backing, &[]);
        let capture = load(&device);
        let group = capture.add_group(16 << 20, &[device.whole()]).unwrap();
        wait_for("settling", || group.poll_settled().unwrap());
        let buffer = Buffer::new(MIB as usize, 0);
        let file = device.direct();
        let mut failed = 0;
        for i in 0..8 {
            failed += u64::from(file.write_all_at(buffer.bytes(), i * MIB).is_err());
        }
        assert!(failed >= 5, "{failed} of 8 writes failed");
        let volume = &group.volumes()[0];
        assert!(volume.counters().failed_writes >= failed);
        assert_eq!(volume.dirty_count(), failed);
        assert_in_flight_zero(&group);
    }
}

/// A failed write whose completion goes unseen leaves its payload in the replica: there must be none, and if this kernel has some
/// (see `bring_to_zero`), each must still be in flight. `VARVE_FAILED_WRITES` says how many to try, `VARVE_FAILING_DEVICE` on what:
/// a device of 64 MiB that fails every write, by itself one whose failures come at once and never in an interrupt.
#[test]
fn every_failed_write_is_seen() {
    let wanted: u64 = std::env::var("VARVE_FAILED_WRITES").map_or(20_000, |count| count.parse().unwrap());
    let mount = Mount::tmpfs(2 * MIB);
    let backing = mount.path().join("backing");
    std::fs::File::create(&backing).unwrap().set_len(64 * MIB).unwrap();
    let device = match std::env::var_os("VARVE_FAILING_DEVICE") {
        Some(path) => Device::at(path.into()),
        None => Device::over(&backing, &[]),
    };
    // No room is left for any write, so that none is ever half done.
    std::fs::write(mount.path().join("ballast"), vec![1; 3 << 20]).unwrap_err();
    let healthy = loop_device(MIB);
    let capture = load(&healthy);
    let group = capture.add_group(64 << 20, &[device.whole()]).unwrap();
    wait_for("settling", || group.poll_settled().unwrap());

    let writers = 4;
    std::thread::scope(|scope| {
        for writer in 0..writers {
            let device = &device;
            scope.spawn(move || {
                let buffer = Buffer::new(4096, 0);
                let file = device.direct();
                for i in 0..wanted / writers {
                    let at = (i * writers + writer) % (64 * 256) * 4096;
                    let error = file.write_all_at(buffer.bytes(), at).unwrap_err();
                    assert_ne!(error.raw_os_error(), Some(libc::EINVAL), "refused, not failed");
                }
            });
        }
        scope.spawn(|| {
            let mut judge = judge::Judge::new(&group);
            while group.counters().captured_records < wanted / writers * writers {
                judge.take(&group);
                std::thread::yield_now();
            }
        });
    });
    let failed = wanted / writers * writers;
    let unseen = in_flight_total(&group) as u64 / 4096;
    eprintln!("{failed} writes failed, {unseen} completions went unseen");
    assert_eq!(group.counters().failed_writes + unseen, failed);
    assert_eq!(group.volumes()[0].dirty_count(), 64, "every region saw failures");
    bring_to_zero(&capture, &group);
}

#[test]
fn a_write_that_the_driver_refuses_is_captured_and_its_region_dirty() {
    let seed = seed();
    let device = loop_device(16 * MIB);
    let capture = load(&device);
    let group = capture.add_group(16 << 20, &[device.whole()]).unwrap();
    wait_for("settling", || group.poll_settled().unwrap());
    // Odd segments in memory of odd alignment: the payload is read right, whatever the driver says to it afterwards.
    let mut random = StdRng::seed_from_u64(seed);
    let file = device.direct();
    let mut judge = judge::Judge::new(&group);
    let mut refused = 0;
    for i in 0..50u64 {
        let mut left = 128 * KIB as usize;
        let mut buffers = Vec::new();
        while left > 0 {
            let bytes = if buffers.len() > 100 { left } else { random.random_range(1..=left.min(9000)) };
            let mut buffer = Buffer::new(bytes, random.random_range(0..1000) * 4);
            random.fill_bytes(buffer.bytes_mut());
            buffers.push(buffer);
            left -= bytes;
        }
        let slices: Vec<_> = buffers.iter().map(|b| std::io::IoSlice::new(b.bytes())).collect();
        let before = judge.kinds[RecordKind::Write as usize];
        let written = nix::sys::uio::pwritev(&file, &slices, (i % 16 * MIB) as i64);
        refused += u64::from(written.is_err());
        judge.take(&group);
        if judge.kinds[RecordKind::Write as usize] > before {
            let whole: Vec<u8> = slices.iter().flat_map(|s| s.iter().copied()).collect();
            let at = (i % 16 * MIB) as usize;
            let seen = judge.last_bytes as usize;
            assert_eq!(&judge.images[0][at..at + seen], &whole[..seen], "write {i}");
        }
    }
    let volume = &group.volumes()[0];
    eprintln!("{refused} refused, {} captured, {:?}", judge.kinds[1], volume.counters());
    if judge.kinds[RecordKind::Write as usize] == 0 {
        // Older kernels refuse before there is a bio.
        return;
    }
    assert!(refused > 0 && volume.counters().failed_writes > 0);
    assert!(volume.dirty_count() > 0);
    assert_eq!(volume.counters().unreadable, 0);
    assert_in_flight_zero(&group);
}

#[test]
fn a_held_write_is_in_flight_and_a_late_one_is_found() {
    let slow = SlowDevice::new(16 * MIB, "400ms");
    let device = slow.device();
    let fast = loop_device(MIB);
    let capture = load(&fast);
    let mut buffer = Buffer::new(4096, 0);
    buffer.bytes_mut().fill(1);
    std::thread::scope(|scope| {
        let path = &device.path;
        let write = move |at: u64| {
            let mut buffer = Buffer::new(4096, 0);
            buffer.bytes_mut().fill(at as u8 | 1);
            open(path, libc::O_DIRECT).write_all_at(buffer.bytes(), at).unwrap();
        };
        // In flight before the activation: never captured.
        let late = scope.spawn(move || write(2 * MIB));
        std::thread::sleep(Duration::from_millis(100));
        let group = capture.add_group(4 << 20, &[device.whole()]).unwrap();
        let volume = &group.volumes()[0];
        // After it: captured, and in flight until it completes.
        let held = scope.spawn(move || write(5 * MIB));
        wait_for("the write", || volume.in_flight(5));
        assert!(!group.poll_settled().unwrap());
        assert!(!volume.in_flight(6) && !volume.in_flight(4));
        held.join().unwrap();
        late.join().unwrap();
        wait_for("settling", || group.poll_settled().unwrap());
        assert!(!volume.in_flight(5));
        assert_eq!(volume.counters().late, 1);
        assert_eq!((volume.dirty_count(), volume.next_dirty(0)), (1, Some(2)));
        assert_in_flight_zero(&group);
        let mut judge = judge::Judge::new(&group);
        assert_eq!(judge.take(&group), 1);

        // A write in flight when the group goes leaves nothing in the counts of the next.
        let across = scope.spawn(move || write(7 * MIB));
        wait_for("the write", || volume.in_flight(7));
        drop(group);
        let group = capture.add_group(4 << 20, &[device.whole()]).unwrap();
        let next = scope.spawn(move || write(7 * MIB));
        across.join().unwrap();
        next.join().unwrap();
        wait_for("settling", || group.poll_settled().unwrap());
        assert_in_flight_zero(&group);
        assert_eq!(group.volumes()[0].counters().late, 1, "the write across is late for the new group");
        assert_eq!(group.volumes()[0].next_dirty(0), Some(7));
    });
}

/// A path that was gone for a while: its disk says that it is idle, and then the writes complete after all.
#[test]
fn what_completes_after_it_was_taken_back_leaves_a_dirty_region_and_no_debt() {
    let slow = SlowDevice::new(16 * MIB, "400ms");
    let device = slow.device();
    let capture = load(device);
    let group = capture.add_group(4 << 20, &[device.whole()]).unwrap();
    wait_for("settling", || group.poll_settled().unwrap());
    let volume = &group.volumes()[0];
    std::thread::scope(|scope| {
        let path = &device.path;
        let write = move |at: u64| {
            let buffer = Buffer::new(4096, 0);
            open(path, libc::O_DIRECT).write_all_at(buffer.bytes(), at).unwrap();
        };
        let held = scope.spawn(move || write(5 * MIB));
        wait_for("the write", || volume.in_flight(5));
        volume.forgive_in_flight(5);
        held.join().unwrap();
        wait_for("its completion", || volume.take_dirty(5));
        assert_eq!(volume.in_flight_bytes(5), 0, "who reads the region next waits for ever");
        // And the next one counts as ever.
        let held = scope.spawn(move || write(5 * MIB));
        wait_for("the write", || volume.in_flight(5));
        held.join().unwrap();
    });
    assert_in_flight_zero(&group);
    assert_eq!(volume.dirty_count(), 0);
}

/// Two writers that take turns: the region has a write in flight at any time, and a completion that went unseen would look the
/// same. On a kernel that never lost one nothing comes of it.
#[test]
fn a_held_write_after_the_other_is_suspect_where_completions_were_lost() {
    let slow = SlowDevice::new(16 * MIB, "400ms");
    let device = slow.device();
    let fast = loop_device(MIB);
    let capture = load(&fast);
    let group = capture.add_group(4 << 20, &[device.whole()]).unwrap();
    wait_for("settling", || group.poll_settled().unwrap());
    let volume = &group.volumes()[0];
    let under_way = |time: Duration| {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for at in [5 * MIB, 5 * MIB + 4096] {
                let (path, done) = (&device.path, &done);
                scope.spawn(move || {
                    let buffer = Buffer::new(4096, 0);
                    let file = open(path, libc::O_DIRECT);
                    // Half a write's time apart.
                    std::thread::sleep(Duration::from_millis(if at == 5 * MIB { 0 } else { 200 }));
                    while !done.load(Ordering::Relaxed) {
                        file.write_all_at(buffer.bytes(), at).unwrap();
                    }
                });
            }
            let begun = Instant::now();
            let mut found = 0;
            while found == 0 && begun.elapsed() < time {
                std::thread::sleep(Duration::from_millis(100));
                found = capture.tend().unwrap();
            }
            assert!(found == 0 || volume.in_flight(5), "its writes are still counted");
            done.store(true, Ordering::Relaxed);
            (found, begun.elapsed())
        })
    };
    let (found, _) = under_way(Duration::from_secs(13));
    assert_eq!((found, volume.dirty_count()), (0, 0), "healthy");
    assert_in_flight_zero(&group);

    volume.lose_completion(9, 4096);
    wait_for("tend", || capture.tend().unwrap() == 1);
    assert!(volume.take_dirty(9));
    assert_in_flight_zero(&group);
    let (found, after) = under_way(Duration::from_secs(60));
    assert_eq!((found, volume.next_dirty(0)), (1, Some(5)), "after {after:?}");
    assert!(after > Duration::from_secs(9), "after {after:?}");
    assert_in_flight_zero(&group);
}

#[test]
fn groups_come_and_go_under_load() {
    let device = loop_device(32 * MIB);
    let capture = load(&device);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for t in 0..2 {
            let (device, stop) = (&device, &stop);
            scope.spawn(move || {
                let mut random = StdRng::seed_from_u64(t);
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    random_write(device, &mut random, 256 * KIB);
                }
            });
        }
        let end = Instant::now() + Duration::from_secs(3);
        while Instant::now() < end {
            let group =
                capture.add_group(1 << 20, &[device.part(0, 16 * MIB), device.part(16 * MIB, 16 * MIB)]).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            drop(group);
        }
        let group = capture.add_group(64 << 20, &[device.whole()]).unwrap();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        wait_for("settling", || group.poll_settled().unwrap());
        wait_for("the last writes", || {
            in_flight_total(&group) == 0 || {
                capture.tend().unwrap();
                false
            }
        });
        assert_eq!(capture.misses().unwrap(), 0);
    });
}

#[test]
fn bookmarks_stand_in_the_order_of_the_writes() {
    let device = loop_device(8 * MIB);
    let capture = load(&device);
    let group = Arc::new(capture.add_group(4 << 20, &[device.whole()]).unwrap());
    let wall = 1_700_000_000_000_000_000;
    group.set_time_offset(wall - Group::boot_ns());
    let buffer = Buffer::new(4096, 0);
    let file = device.direct();
    for i in 0..50u64 {
        group.mark(RecordKind::Bookmark, 0, 0, format!("before {i}").as_bytes()).unwrap();
        file.write_all_at(buffer.bytes(), i * 4096).unwrap();
    }
    group.mark(RecordKind::Canary, 0, 0, b"").unwrap();
    group.mark(RecordKind::Resize, 0, 16 * MIB, b"").unwrap();
    group.mark(RecordKind::Bookmark, 0, 0, &[b'x'; 255]).unwrap();
    let mut judge = judge::Judge::new(&group);
    judge.take(&group);
    assert_eq!(judge.marks.len(), 53);
    for (i, (kind, name, writes)) in judge.marks.iter().take(50).enumerate() {
        assert_eq!((*kind, *writes), (RecordKind::Bookmark as u8, i as u64));
        assert_eq!(name, format!("before {i}").as_bytes());
    }
    assert_eq!(judge.marks[50].0, RecordKind::Canary as u8);
    assert_eq!(judge.marks[51].0, RecordKind::Resize as u8);
    assert_eq!(judge.last_length, 0);
    assert_eq!(judge.marks[52].1.len(), 255);
    assert!(judge.last_time_ns >= wall && judge.last_time_ns < wall + 60_000_000_000);
    assert_eq!(group.mark(RecordKind::Bookmark, 0, 0, &[0; 256]).unwrap_err().kind(), CaptureErrorKind::Invalid);
    assert_eq!(group.mark(RecordKind::Canary, 1, 0, b"").unwrap_err().kind(), CaptureErrorKind::Invalid);
}

#[test]
fn nonsense_is_refused() {
    let device = loop_device(MIB);
    let capture = load(&device);
    let good = device.whole();
    let refused = |ring, volumes: &[VolumeSpec]| capture.add_group(ring, volumes).err().unwrap().kind();
    assert_eq!(refused(65536 + 4096, std::slice::from_ref(&good)), CaptureErrorKind::Invalid);
    assert_eq!(refused(4096, std::slice::from_ref(&good)), CaptureErrorKind::Invalid);
    assert_eq!(refused(65536, &[]), CaptureErrorKind::Invalid);
    for bad in [
        VolumeSpec { bytes: 0, ..good.clone() },
        VolumeSpec { bytes: 100, ..good.clone() },
        VolumeSpec { start_bytes: u64::MAX - 511, ..good.clone() },
        VolumeSpec { disk: (0, 0), ..good.clone() },
    ] {
        assert_eq!(refused(65536, &[bad]), CaptureErrorKind::Invalid);
    }
    let many = vec![good; 25];
    assert_eq!(refused(65536, &many), CaptureErrorKind::Limit);
    // And nothing stays behind.
    for _ in 0..20 {
        capture.add_group(65536, &many[..1]).unwrap();
    }
}

#[test]
fn calibration_refuses_what_is_no_device() {
    let dir = memory_dir();
    let path = dir.path().join("file");
    std::fs::write(&path, [0; 8192]).unwrap();
    let error = varve_bpf::Capture::load(&varve_bpf::CaptureOptions { probe: path }).err().unwrap();
    assert_eq!(error.kind(), CaptureErrorKind::Calibration);
    assert!(!error.hint().is_empty());
}
