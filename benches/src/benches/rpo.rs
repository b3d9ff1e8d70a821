//! How old the oldest write is that would be lost now, asked hundreds of times a second.

use std::time::{Duration, Instant};

use rand::Rng;
use varve_tests::{MIB, Pair, assert_same};

use super::GROUP;
use crate::plan::Plan;
use crate::report::{Report, Target};
use crate::statistics::percentile;
use crate::status::Agent;
use crate::volume::{Volume, fio};

const BYTES_PER_S: u64 = 20_000_000;

pub fn run(plan: &Plan, report: &mut Report) {
    let volume = Volume::in_memory(512 * MIB);
    let pair = Pair::new();
    let replicas = pair.protect(GROUP, &[volume.path()]);
    pair.wait_protected(GROUP, Duration::from_secs(120));
    let mut agent = Agent::connect(pair.production.root(), GROUP);
    let loads = [
        ("4 KiB random", vec!["bs=4k"]),
        ("4 to 64 KiB, half of it random", vec!["bssplit=4k/70:16k/20:64k/10", "percentage_random=50"]),
    ];
    for (what, options) in loads {
        let time = plan.run(20.0, 5.0);
        let job = fio(volume.path()).depth(8).rate(BYTES_PER_S).seconds(time.as_secs() + 10);
        let job = options.iter().fold(job, |job, option| job.option(option));
        let load = job.start(&volume.scratch);
        std::thread::sleep(Duration::from_secs(1));
        let before = agent.group();
        let (mut samples, mut random, begun) = (Vec::new(), rand::rng(), Instant::now());
        while begun.elapsed() < time {
            samples.push(agent.group().rpo_seconds.expect("protected, so it has an RPO") * 1e3);
            // Not in step with anybody's timer.
            std::thread::sleep(Duration::from_micros(random.random_range(500..4500)));
        }
        let seconds = begun.elapsed().as_secs_f64();
        let after = agent.group();
        load.stop();
        let rate = (after.counter("captured_bytes") - before.counter("captured_bytes")) as f64 / seconds / 1e6;
        let detail = format!("{:.0} samples/s, {rate:.1} MB/s captured", samples.len() as f64 / seconds);
        for (name, share, target) in
            [("p50", 0.5, Target::None), ("p99", 0.99, Target::Max(20.0)), ("max", 1.0, Target::None)]
        {
            report.row(&format!("{what}: {name}"), "ms", &[percentile(&samples, share)], target, &detail);
        }
        if after.troubles() != before.troubles() {
            report.wrong(&format!("{what}: {:?} became {:?}", before.troubles(), after.troubles()));
        }
    }
    pair.wait_applied(GROUP, Duration::from_secs(60));
    assert_same(volume.path(), &replicas[0]);
}
