//! A source whose clock is wrong for a while: what it writes then has wrong times, and what it writes later has not.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]
#![allow(dead_code, reason = "the support modules are shared with other tests")]

mod support;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::host::{Deed, GROUP, Host};
use support::looker::{Looker, parse_time};
use support::seed;
use tokio::task::block_in_place;
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
