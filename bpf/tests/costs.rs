//! What the programs cost per write, by the kernel's own statistics. Run with `--run-ignored`, on a quiet machine.
#![allow(unsafe_code, clippy::unwrap_used)]

mod support;

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::libc;
use support::aligned::Buffer;
use support::*;
use varve_bpf::Capture;

struct Statistics;

impl Statistics {
    fn on() -> Self {
        run("sysctl", &["-q", "kernel.bpf_stats_enabled=1"]);
        Self
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        run("sysctl", &["-q", "kernel.bpf_stats_enabled=0"]);
    }
}

fn costs(capture: &Capture) -> HashMap<String, (u64, u64)> {
    capture.costs().unwrap().into_iter().map(|c| (c.name, (c.run_count, c.run_time_ns))).collect()
}

fn measure(capture: &Capture, what: &str, writes: impl FnOnce()) {
    let before = costs(capture);
    let _statistics = Statistics::on();
    writes();
    let mut line = String::new();
    let mut names: Vec<_> = before.keys().collect();
    names.sort();
    let after = costs(capture);
    for name in names {
        let (n, ns) = (after[name].0 - before[name].0, after[name].1 - before[name].1);
        if n > 100 {
            line += &format!("  {name} {} ns ({n})", ns / n);
        }
    }
    println!("{what:<24}{line}");
}

#[test]
#[ignore = "a measurement"]
fn per_write() {
    let device = loop_device(256 * MIB);
    let other = loop_device(256 * MIB);
    let capture = load(&device);
    let group = Arc::new(capture.add_group(256 << 20, &[device.whole()]).unwrap());
    let write = |device: &Device, bytes: u64, count: u64, offset: usize| {
        let buffer = Buffer::new(bytes as usize, offset);
        let file = open(&device.path, libc::O_DIRECT);
        for i in 0..count {
            file.write_all_at(buffer.bytes(), i * bytes % (128 * MIB)).unwrap();
        }
    };
    write(&device, MIB, 256, 0);
    let running = judge::start(&group);
    measure(&capture, "settling, 4 KiB", || write(&device, 4096, 20_000, 0));
    wait_for("settling", || group.poll_settled().unwrap());
    for (what, bytes, count, offset) in [
        ("512 B", 512, 20_000, 0),
        ("4 KiB", 4096, 100_000, 0),
        ("4 KiB at +512", 4096, 20_000, 512),
        ("8 KiB", 8192, 20_000, 0),
        ("16 KiB", 16384, 20_000, 0),
        ("64 KiB", 64 * KIB, 10_000, 0),
        ("1 MiB", MIB, 1000, 0),
    ] {
        measure(&capture, what, || write(&device, bytes, count, offset));
    }
    measure(&capture, "not watched, 4 KiB", || write(&other, 4096, 100_000, 0));
    drop(running.finish());
}

/// Consumes without looking, as fast as it can be done.
fn drain(group: &Arc<varve_bpf::Group>, stop: &std::sync::atomic::AtomicBool) {
    let ring = group.ring();
    let mut at = ring.consumer();
    let mut out = vec![0; MIB as usize];
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        let mut moved = false;
        while let Some(entry) = ring.entry(at) {
            let (varve_bpf::Entry::Record { bytes, .. } | varve_bpf::Entry::Discarded { bytes }) = entry else { break };
            ring.copy_out(at, &mut out[..(bytes as usize).min(MIB as usize)]);
            at += bytes;
            moved = true;
        }
        ring.release(at);
        if !moved {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

fn iops(device: &Device, job: &str) -> f64 {
    let path = device.path.to_str().unwrap();
    let line = format!(
        "fio --name=x --filename={path} --size=128m --runtime=1 --time_based --rw=randwrite --direct=1 {job} --output-format=terse --terse-version=3"
    );
    let out = run("sh", &["-c", &line]);
    out.lines().last().unwrap().split(';').nth(48).unwrap().parse().unwrap()
}

#[test]
#[ignore = "a measurement"]
fn iops_with_and_without() {
    let device = loop_device(128 * MIB);
    iops(&device, "--ioengine=psync --bs=1m");
    for job in [
        "--ioengine=psync --bs=4k",
        "--ioengine=libaio --iodepth=32 --bs=4k",
        "--ioengine=io_uring --iodepth=32 --bs=4k",
        "--ioengine=libaio --iodepth=8 --bs=64k",
    ] {
        let mut all: [Vec<f64>; 3] = Default::default();
        for _ in 0..7 {
            all[0].push(iops(&device, job));
            let capture = load(&device);
            all[1].push(iops(&device, job));
            let group = Arc::new(capture.add_group(256 << 20, &[device.whole()]).unwrap());
            wait_for("settling", || group.poll_settled().unwrap());
            let stop = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| drain(&group, &stop));
                all[2].push(iops(&device, job));
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
            });
            if group.counters().dropped_records > 0 {
                println!("dropped {}", group.counters().dropped_records);
            }
        }
        for v in &mut all {
            v.sort_by(f64::total_cmp);
        }
        println!(
            "{job}: none {:.0}  attached {:.0}  watched {:.0}   (best {:.0} {:.0} {:.0})",
            all[0][3], all[1][3], all[2][3], all[0][6], all[1][6], all[2][6]
        );
    }
}
