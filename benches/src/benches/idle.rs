//! What the daemons use while nothing is written.

use std::time::{Duration, Instant};

use varve_tests::{MIB, Pair, Role};

use super::GROUP;
use crate::plan::Plan;
use crate::process::Threads;
use crate::report::{Report, Target};
use crate::volume::Volume;

pub fn run(plan: &Plan, report: &mut Report) {
    let volume = Volume::in_memory(64 * MIB);
    let pair = Pair::new();
    pair.protect(GROUP, &[volume.path()]);
    pair.wait_protected(GROUP, Duration::from_secs(60));
    std::thread::sleep(Duration::from_secs(2));
    let pids = [pair.production.pid(Role::Agent), pair.recovery.pid(Role::Receiver)];
    let mut percent = [Vec::new(), Vec::new()];
    for _ in 0..plan.pairs(4, 2) {
        let (before, begun) = (pids.map(Threads::of), Instant::now());
        std::thread::sleep(plan.run(5.0, 2.0));
        for (percent, before) in percent.iter_mut().zip(&before) {
            percent.push(100.0 * before.since().as_secs_f64() / begun.elapsed().as_secs_f64());
        }
    }
    report.row("agent, one idle group", "%", &percent[0], Target::Max(0.5), "of one core");
    report.row("receiver, the same", "%", &percent[1], Target::None, "of one core");
}
