//! An outage under a steady 20 MB/s, and catching up while they go on: how fast the backlog is shipped, whether RPO falls all the
//! while, and what the journal took of the disk for it.

use std::time::{Duration, Instant};

use varve_tests::{MIB, Pair, Role, compare_devices};

use super::GROUP;
use crate::plan::Plan;
use crate::report::{FINE, Report, Target};
use crate::status::Agent;
use crate::volume::{Volume, fio};

const BYTES_PER_S: u64 = 20_000_000;
const LIMIT: Duration = Duration::from_secs(300);
/// Below this it has caught up: what 20 MB/s leave under way.
const CAUGHT_UP_BYTES: u64 = 16 << 20;
const LOOK_EVERY: Duration = Duration::from_millis(250);

pub fn run(plan: &Plan, report: &mut Report) {
    let outage = plan.run(600.0, 20.0);
    let volume = Volume::in_memory(512 * MIB);
    let backlog_mib = ((outage.as_secs() + 60) * BYTES_PER_S * 11 / 10) >> 20;
    let mut pair = Pair::with_agent_config(&format!("journal_max_mib = {}\n", backlog_mib.max(256)));
    let replicas = pair.protect(GROUP, &[volume.path()]);
    pair.wait_protected(GROUP, LIMIT);
    let mut agent = Agent::connect(pair.production.root(), GROUP);
    let options = ["bssplit=4k/70:16k/20:64k/10", "percentage_random=50"];
    let job = fio(volume.path()).depth(8).rate(BYTES_PER_S).seconds(3600);
    let load = options.iter().fold(job, |job, option| job.option(option)).start(&volume.scratch);

    let healthy = plan.run(10.0, 3.0).min(Duration::from_secs(20));
    std::thread::sleep(healthy);
    let before = agent.group();
    let detail = format!("{:.0} s with a healthy link", healthy.as_secs_f64());
    let steady = before.counter("journal_disk_bytes");
    report.row("journal bytes on disk in steady state", "bytes", &[steady as f64], Target::Max(0.0), &detail);

    pair.recovery.kill(Role::Receiver);
    std::thread::sleep(outage);
    let away = agent.group();
    pair.recovery.start(Role::Receiver);
    let durable = |agent: &mut Agent| {
        let group = agent.group();
        (group.counter("captured_bytes"), group.lag_bytes, group.rpo_seconds.unwrap_or(f64::MAX))
    };
    varve_tests::wait_until(LIMIT, "it streams", || agent.group().link == "streaming");
    let begun = Instant::now();
    let (captured, backlog, mut oldest) = durable(&mut agent);
    let (mut looks, mut rises) = (0u32, 0u32);
    let (seconds, shipped, arrived) = loop {
        std::thread::sleep(LOOK_EVERY);
        let (now_captured, lag, rpo) = durable(&mut agent);
        looks += 1;
        rises += u32::from(rpo > oldest);
        oldest = rpo;
        if lag <= CAUGHT_UP_BYTES {
            let arrived = now_captured - captured;
            break (begun.elapsed().as_secs_f64(), backlog + arrived - lag, arrived);
        }
        assert!(begun.elapsed() < LIMIT, "{lag} bytes of backlog are left after {LIMIT:?}");
    };
    load.stop();
    let (rate, arrival) = (shipped as f64 / seconds, arrived as f64 / seconds);
    let detail = format!(
        "{:.0} MB of backlog after {:.0} s, gone after {seconds:.1} s; {:.1} MB/s came in meanwhile",
        backlog as f64 / 1e6,
        outage.as_secs_f64(),
        arrival / 1e6
    );
    report.row("shipped while catching up", "MB/s", &[rate / 1e6], Target::None, &detail);
    let detail = "against the 20 MB/s that were asked for";
    report.row("shipped / arrival", "x", &[rate / BYTES_PER_S as f64], Target::Min(5.0), detail);
    let detail = format!("of {looks} looks, one each {} ms", LOOK_EVERY.as_millis());
    report.row(
        "RPO was higher than at the look before",
        "x",
        &[f64::from(rises) / f64::from(looks)],
        Target::Max(0.1),
        &detail,
    );
    let (stream, disk) = (away.counter("journal_bytes"), away.counter("journal_disk_bytes"));
    let detail = format!("{:.0} MB of the stream", stream as f64 / 1e6);
    report.row(
        "journal bytes on disk for a captured one",
        FINE,
        &[disk as f64 / stream as f64],
        Target::Max(1.05),
        &detail,
    );

    pair.wait_protected(GROUP, LIMIT);
    pair.wait_applied(GROUP, LIMIT);
    let after = agent.group();
    if after.troubles() != before.troubles() || after.counter("image_bytes") != before.counter("image_bytes") {
        report.wrong(&format!("{:?} became {:?}", before.troubles(), after.troubles()));
    }
    match compare_devices(volume.path(), &replicas[0]) {
        Ok(()) => report.note("Volume and replica are equal, bit for bit; no gap, no image."),
        Err(difference) => report.wrong(&format!("volume and replica differ: {difference}")),
    }
}
