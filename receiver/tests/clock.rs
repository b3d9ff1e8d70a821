//! A source whose clock is wrong for a while: what it writes then has wrong times, and what it writes later has not.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]
#![allow(dead_code, reason = "the support modules are shared with other tests")]

mod support;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::os::unix::fs::FileExt;
use std::time::Duration;
use support::host::{Deed, GROUP, Host, now_ns};
use support::looker::{Looker, parse_time};
use support::seed;
use tokio::task::block_in_place;
use varve_common::control::{ExportKind, FailoverReply, ReceiverRequest};
use varve_common::point::PointSpec;

const DAY: i64 = 86_400;

/// Points of each stretch by position and by time, and a few at random.
fn look(looker: &Looker, rng: &mut StdRng, ends: &[usize]) {
    for end in ends {
        for index in end - 3..=*end {
            let (position, time_ns) = {
                let past = looker.past.lock().unwrap();
                (past.spec_of_position(index), past.time_ns(index))
            };
            looker.check(&position, rng);
            looker.check(&PointSpec::Time(time_ns), rng);
            looker.check(&PointSpec::Time(time_ns + 1_000_000), rng);
        }
    }
    for _ in 0..10 {
        looker.check(&looker.any(rng).unwrap(), rng);
    }
}

/// By how many seconds it is wrong: behind if that is below 0.
async fn a_clock_that_was_wrong(seed: u64, wrong: i64, killed: bool) {
    let mut rng = StdRng::seed_from_u64(seed ^ 1);
    let mut host = Host::new(seed, &[4 << 20, 300 << 10], "");
    host.receiver.start(None);
    host.enrol().await;
    assert!(host.connect().await);
    assert!(host.deed(Deed::Records(20)).await);
    assert!(host.deed(Deed::CloseGap).await);
    let looker = Looker { paths: host.receiver.paths.clone(), past: host.past.clone() };
    let mut ends = Vec::new();
    for wrong_by in [0, wrong, -wrong] {
        host.set_clock_by(wrong_by);
        // An outage while it is wrong: its mark is as wrong.
        if wrong_by != 0 && rng.random_bool(0.5) {
            assert!(host.deed(Deed::OpenGap).await && host.deed(Deed::Records(5)).await);
            assert!(host.deed(Deed::CloseGap).await);
        }
        for _ in 0..4 {
            assert!(host.deed(Deed::Records(20)).await);
        }
        assert!(host.settle().await);
        ends.push(host.past.lock().unwrap().len() - 2);
        block_in_place(|| look(&looker, &mut rng, &ends));
        if killed {
            host.disconnect();
            host.receiver.kill();
            host.receiver.start(None);
            assert!(host.connect().await);
        }
    }
    // Every point since has its own time, as before: not the one that the clock once showed.
    let (first, last) = {
        let past = host.past.lock().unwrap();
        (past.time_ns(0), past.time_ns(past.len() - 1))
    };
    let newest = parse_time(&host.receiver.group(GROUP).unwrap().window.to.unwrap());
    assert!(newest <= last && newest > first, "{newest} is not between {first} and {last}");
    assert!(host.deed(Deed::OpenGap).await && host.deed(Deed::Records(5)).await && host.deed(Deed::CloseGap).await);
    assert!(host.deed(Deed::Records(20)).await && host.settle().await);
    block_in_place(|| {
        look(&looker, &mut rng, &ends);
        looker.check(&PointSpec::Latest, &mut rng);
    });
    let log = host.receiver.log();
    assert!(log.contains("clock was set back"), "{log}");
    assert_eq!(log.contains("clock was behind and has been set right"), wrong < 0, "{log}");
    assert!(!log.contains("lost data") && !log.contains("damaged"), "{log}");
    host.receiver.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_day_ahead_and_set_right() {
    a_clock_that_was_wrong(seed(), DAY, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minute_ahead_set_right_and_the_receiver_killed() {
    a_clock_that_was_wrong(seed(), 60, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_day_behind_and_set_right() {
    a_clock_that_was_wrong(seed(), -DAY, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_year_behind_set_right_and_the_receiver_killed() {
    a_clock_that_was_wrong(seed(), -365 * DAY, true).await;
}

/// What one clock dated and what the next one did arrives at once, and is applied at once: no point is dated by both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_set_between_two_records() {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed ^ 2);
    let mut host = Host::new(seed, &[4 << 20, 300 << 10], "");
    host.receiver.start(None);
    host.enrol().await;
    assert!(host.connect().await);
    assert!(host.deed(Deed::Records(20)).await && host.deed(Deed::CloseGap).await);
    let looker = Looker { paths: host.receiver.paths.clone(), past: host.past.clone() };
    for away in [false, true] {
        let wrong = [60, 3600, DAY][rng.random_range(0..3)] * if rng.random_bool(0.5) { 1 } else { -1 };
        if away {
            host.disconnect();
        }
        for wrong_by in [0, wrong, -wrong] {
            host.set_clock_by(wrong_by);
            // All of it waits for the link while there is none.
            assert_eq!(host.deed(Deed::Records(20)).await, !away);
        }
        assert!(!away || host.connect().await);
        assert!(host.settle().await);
        let len = host.past.lock().unwrap().len();
        let ends: Vec<usize> = (1..=3).map(|stretch| len - 1 - 20 * (3 - stretch)).collect();
        block_in_place(|| look(&looker, &mut rng, &ends));
    }
    let log = host.receiver.log();
    assert!(log.contains("clock was set back"), "{log}");
    host.receiver.stop();
}

/// The source that is lost was an hour ahead: what is written here since then has the time of this machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_stream_is_not_dated_by_a_clock_that_was_ahead() {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed ^ 1);
    let mut host = Host::new(seed, &[4 << 20], "");
    host.receiver.start(None);
    host.enrol().await;
    assert!(host.connect().await);
    assert!(host.deed(Deed::Records(20)).await && host.deed(Deed::CloseGap).await);
    host.catch_up_time();
    host.set_clock_by(3600);
    assert!(host.deed(Deed::Records(20)).await && host.settle().await);
    let looker = Looker { paths: host.receiver.paths.clone(), past: host.past.clone() };
    let newest = host.past.lock().unwrap().len() - 1;
    let source_ns = host.past.lock().unwrap().time_ns(newest);
    host.disconnect();
    let request = ReceiverRequest::Failover {
        group: GROUP.into(),
        at: PointSpec::Latest,
        test: false,
        dry_run: false,
        planned: None,
        abort_after_seconds: None,
    };
    let reply: FailoverReply = block_in_place(|| looker.done(&request));
    let device = reply.volumes[0].device.clone().unwrap();
    // Two versions of a block, some seconds apart.
    let mut between_ns = 0;
    for version in [0xa5, 0x5a] {
        let file = std::fs::OpenOptions::new().write(true).open(&device).unwrap();
        file.write_all_at(&[version; 4096], 8192).unwrap();
        file.sync_all().unwrap();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        between_ns = if version == 0xa5 { now_ns() - 500_000_000 } else { between_ns };
    }
    let look = |at: PointSpec| {
        let view = block_in_place(|| looker.open_as(&at, false, ExportKind::Device)).unwrap().unwrap();
        let bytes = std::fs::read(view.volumes[0].device.as_ref().unwrap()).unwrap();
        block_in_place(|| looker.close(&view));
        (bytes[8192], view.point)
    };
    assert_eq!(look(PointSpec::Latest).0, 0x5a);
    let (byte, point) = look(PointSpec::Age(Duration::from_millis(100)));
    assert_eq!(byte, 0x5a, "a moment ago: {point:?}");
    assert!(parse_time(&point.time) < source_ns, "{point:?}");
    let (byte, point) = look(PointSpec::Time(between_ns));
    assert_eq!(byte, 0xa5, "between the two: {point:?}");
    // As the source showed it.
    block_in_place(|| looker.check(&PointSpec::Time(source_ns), &mut rng));
    let abort = ReceiverRequest::FailoverAbort { group: GROUP.into(), force: true, only_test: false };
    let _: FailoverReply = block_in_place(|| looker.done(&abort));
    host.receiver.stop();
}
