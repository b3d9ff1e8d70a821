//! Taking a group over: from the command to the first block that is read, whatever there is and however much is not applied;
//! writing to what was taken over; the pause when it comes home.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::Rng;
use serde_json::Value;
use varve_common::point::PointSpec;
use varve_io::{AlignedBuf, DirectFile};
use varve_tests::{GIB, MIB, Pair, Role, Scratch};

use super::GROUP;
use super::view::Past;
use crate::feed::{Source, land_only};
use crate::plan::Plan;
use crate::recovery::Recovery;
use crate::report::{Report, Target};
use crate::statistics::{median, ratios};
use crate::volume::{Volume, fill, fio};

const BLOCK: u64 = 4096;
const TIB: u64 = 1024 * GIB;
const RECORDS: u64 = 1_000_000;
/// The promise.
const SERVED: Target = Target::Max(2.0);
const PAUSED: Target = Target::Max(5.0);
/// Volume under the backlog, and the backlog: most of what a landing log may have.
const LAGGING_BYTES: u64 = 2 * GIB;
const BACKLOG_BYTES: u64 = 840 * MIB;
const HOME_BYTES_PER_S: u64 = 20_000_000;
const LIMIT: Duration = Duration::from_secs(300);

pub fn run(plan: &Plan, report: &mut Report) {
    long_past(plan, report);
    lagging(plan, report);
    writing(plan, report);
    coming_home(plan, report);
}

/// One block, past the page cache.
fn read_block(device: &Path, offset: u64) -> [u8; 8] {
    let file = DirectFile::open_read(device).unwrap();
    let mut buffer = AlignedBuf::new(BLOCK as usize);
    file.read_exact_at(&mut buffer, offset).unwrap();
    buffer[..8].try_into().unwrap()
}

/// By the command line: the device, and seconds until its first block is read.
#[track_caller]
fn take_over(recovery: &Recovery, at: &str, block: u64) -> (PathBuf, f64) {
    let begun = Instant::now();
    let (reply, _) = recovery.varve(&["failover", GROUP, "--at", at, "--yes"]);
    let device = reply["volumes"][0]["device"].as_str().unwrap_or_else(|| panic!("no device: {reply}"));
    read_block(Path::new(device), block * BLOCK);
    (device.into(), begun.elapsed().as_secs_f64())
}

fn long_past(plan: &Plan, report: &mut Report) {
    let mut past = Past::new(TIB, RECORDS);
    past.recovery.start();
    let mut random = rand::rng();
    let mut served = Vec::new();
    for _ in 0..plan.pairs(5, 2) {
        served.push(take_over(&past.recovery, "latest", random.random_range(0..TIB / BLOCK)).1);
        past.recovery.varve(&["failover", "abort", GROUP, "--yes"]);
    }
    let what = "1 TiB sparse, 10^6 records";
    report.row(&format!("{what}: newest point, command to first read"), "s", &served, SERVED, "");
    let at = PointSpec::Time(past.first.1 + 1000).to_string();
    let (_, seconds) = take_over(&past.recovery, &at, random.random_range(0..TIB / BLOCK));
    let detail = "all records are behind the point";
    report.row(&format!("{what}: oldest point, command to first read"), "s", &[seconds], SERVED, detail);
    // It is being rolled back; nobody needs that.
    past.recovery.host.kill(Role::Receiver);
}

/// Most of a landing log is not applied: the applier works at full speed beside it, or (held) does nothing at all.
fn lagging(plan: &Plan, report: &mut Report) {
    for held in [false, true] {
        let mut served = Vec::new();
        let (mut landed, mut resident) = (0, 0);
        for _ in 0..plan.pairs(3, 1) {
            let mut recovery = Recovery::new(LAGGING_BYTES);
            let (mut group, mut source) = (recovery.group(), Source::new());
            group.fill(&mut source, LAGGING_BYTES);
            group.begin_history(&source);
            group.close();
            let mut newest = HashMap::new();
            let mut number = source.written;
            let count = BACKLOG_BYTES / (BLOCK + 40);
            landed = land_only(&recovery.dir, &recovery.meta, &mut source, BLOCK as usize, count, |random| {
                let block = random.random_range(0..LAGGING_BYTES / BLOCK);
                number += 1;
                newest.insert(block, number);
                block * BLOCK
            });
            let hold = recovery.host.scratch().join("held");
            if held {
                std::fs::write(&hold, "").unwrap();
                recovery.host.set_env("VARVE_HOLD", &format!("apply-held:{}", hold.display()));
            }
            recovery.start();
            let before = recovery.host.resident_bytes(Role::Receiver);
            let some: Vec<(u64, u64)> = newest.iter().take(2000).map(|(block, number)| (*block, *number)).collect();
            let (device, seconds) = take_over(&recovery, "latest", some[0].0);
            served.push(seconds);
            resident = recovery.host.resident_bytes(Role::Receiver).saturating_sub(before);
            let wrong =
                some.iter().filter(|(block, number)| read_block(&device, block * BLOCK) != number.to_le_bytes());
            match wrong.count() {
                0 => {}
                wrong => report.wrong(&format!("{wrong} of {} blocks are not what was landed", some.len())),
            }
            recovery.host.kill(Role::Receiver);
        }
        let what = if held { "nothing of it is applied all the while" } else { "the applier works beside it" };
        let (landed, resident) = (landed as f64 / 1e6, resident as f64 / MIB as f64);
        let detail = format!("{landed:.0} MB of 4 KiB writes landed and not applied; {resident:.0} MiB of memory more");
        report.row(&format!("newest point, {what}: command to first read"), "s", &served, SERVED, &detail);
    }
}

fn writing(plan: &Plan, report: &mut Report) {
    let bytes = if plan.quick { GIB } else { 2 * GIB };
    let mut recovery = Recovery::new(bytes);
    let (mut group, mut source) = (recovery.group(), Source::new());
    group.fill(&mut source, bytes);
    group.begin_history(&source);
    group.close();
    recovery.start();
    let scratch = Scratch::disk();
    let plain = scratch.file("plain", bytes);
    fill(&std::fs::File::options().write(true).open(&plain).unwrap(), bytes, |_| true);
    let (device, _) = take_over(&recovery, "latest", 0);
    let time = plan.run(10.0, 4.0).as_secs();
    for (what, block, depth) in [("4 KiB, depth 32", "4k", 32), ("64 KiB, depth 8", "64k", 8)] {
        let (mut here, mut direct) = (Vec::new(), Vec::new());
        let rate =
            |path: &Path| fio(path).block(block).depth(depth).seconds(time).run(&scratch).write_bytes_per_s / 1e6;
        for _ in 0..plan.pairs(3, 1) {
            direct.push(rate(&plain));
            here.push(rate(&device));
            // What waits is applied before the next turn.
            varve_tests::wait_until(LIMIT, "all of it is applied", || {
                recovery.host.group(GROUP).is_some_and(|group| group["applied"] == group["durable"])
            });
        }
        let detail = format!("{:.0} of {:.0} MB/s", median(&here), median(&direct));
        let what = format!("random writes to a promoted volume, {what} / a file on the replica's disk");
        report.row(&what, "x", &ratios(&here, &direct), Target::None, &detail);
    }
}

fn coming_home(plan: &Plan, report: &mut Report) {
    let volume = Volume::in_memory(512 * MIB);
    let pair = Pair::new();
    pair.protect(GROUP, &[volume.path()]);
    pair.wait_protected(GROUP, LIMIT);
    let said = |args: &[&str]| -> Value {
        let out = pair.recovery.varve(&[args, &["--json"]].concat()).ok();
        out.json_lines().pop().unwrap_or(Value::Null)
    };
    let time = plan.run(20.0, 5.0);
    for (what, quick) in [("all of it compared", &[][..]), ("--quick: what was sent is compared", &["--quick"])] {
        let reply = said(&["failover", GROUP, "--yes"]);
        let device = PathBuf::from(reply["volumes"][0]["device"].as_str().unwrap());
        said(&["failover", "commit", GROUP, "--yes"]);
        let load = fio(&device).depth(8).rate(HOME_BYTES_PER_S).seconds(3600).start(&volume.scratch);
        said(&["failback", GROUP, "--yes"]);
        std::thread::sleep(time);
        let written = load.stop();
        let home = said(&[&["failback", GROUP, "--cut-over", "--yes"], quick].concat());
        let detail = format!(
            "512 MiB, {:.1} MB/s of 4 KiB writes up to the cut-over; {:.1} MB sent at the barrier, {:.0} MB compared",
            written.write_bytes_per_s / 1e6,
            home["sent_bytes"].as_f64().unwrap_or(f64::NAN) / 1e6,
            home["compared_bytes"].as_f64().unwrap_or(f64::NAN) / 1e6
        );
        let pause = home["pause_seconds"].as_f64().unwrap_or(f64::NAN);
        report.row(&format!("cut-over pause of a failback, {what}"), "s", &[pause], PAUSED, &detail);
        let begun = Instant::now();
        while pair.production.group(GROUP).is_none_or(|group| group["data"] != "protected" || group["role"] != "source")
        {
            assert!(begun.elapsed() < LIMIT, "not protected at home: {:?}", pair.production.group(GROUP));
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
