//! More than fits through: the writer runs free, the ring overflows, a gap begins. What the writer keeps, how long it
//! takes until the group is protected again, and that nothing was lost on the way.

use std::time::{Duration, Instant};

use varve_tests::{GIB, MIB, Pair};

use super::GROUP;
use super::path::{LIMIT, check_end, wait_quiet};
use crate::pacer::{self, Pace};
use crate::plan::Plan;
use crate::report::{Report, Target};
use crate::status::Agent;
use crate::volume::Volume;

pub fn run(plan: &Plan, report: &mut Report) {
    let volume = Volume::in_memory(if plan.quick { 256 * MIB } else { GIB });
    let time = plan.run(10.0, 5.0);
    let free = || {
        let (bytes, took) = pacer::run(&volume, pacer::SMALL, time, |_| Pace::Free);
        bytes as f64 / took.as_secs_f64() / 4096.0
    };
    let alone = free();
    let pair = Pair::new();
    let replicas = pair.protect(GROUP, &[volume.path()]);
    pair.wait_protected(GROUP, LIMIT);
    let mut agent = Agent::connect(pair.production.root(), GROUP);
    let before = agent.group();
    let overloaded = free();
    let ended = Instant::now();
    std::thread::sleep(Duration::from_millis(200));
    let after = agent.group();
    let dropped = after.counter("dropped_records") - before.counter("dropped_records");
    let detail = format!("of {alone:.0} alone; {dropped} writes found the ring full");
    report.row("writes while the ring overflows", "/s", &[overloaded], Target::None, &detail);
    wait_quiet(&pair, &mut agent);
    let again = ended.elapsed().as_secs_f64();
    let sent = agent.group().counter("image_bytes") - before.counter("image_bytes");
    let detail = format!("{:.0} MB sent as images", sent as f64 / 1e6);
    report.row("from the last write to protected and applied", "s", &[again], Target::None, &detail);
    check_end(report, &pair, volume.path(), &replicas[0]);
}
