//! Decides whether the timeline is right: a random workload, with gaps, new rings and crashes of the receiver at every step,
//! and then every kind of point looked at and compared with a model that shares nothing with the product, bit for bit.
//!
//! `VARVE_SEED` replays. `VARVE_SOAK_SECONDS` makes `soak` (ignored otherwise) run as long as that, with larger rounds.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

mod support;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::time::{Duration, Instant};
use support::host::{Deed, Host};
use support::looker::Looker;
use support::seed;
use tokio::task::block_in_place;
use varve_common::point::PointSpec;
use varve_receiver::failpoint;

/// One that is longer than the applier's largest piece of zeroes, odd sectors, less than a region.
const VOLUMES: [u64; 3] = [6 << 20, (1 << 20) + 512 * 3, 200 << 10];

fn looker(host: &Host) -> Looker {
    Looker { paths: host.receiver.paths.clone(), past: host.past.clone() }
}

/// A host whose first sync is done.
async fn synced(seed: u64, configuration: &str) -> Host {
    let mut host = Host::new(seed, &VOLUMES, configuration);
    host.receiver.start(None);
    host.enrol().await;
    assert!(host.connect().await);
    for _ in 0..5 {
        assert!(host.deed(Deed::Records(20)).await);
    }
    assert!(host.deed(Deed::CloseGap).await);
    assert!(host.settle().await);
    host
}

/// Looks at points at random, at both sides of gaps, and at the newest.
fn look_around(looker: &Looker, rng: &mut StdRng, points: usize, edges: usize) {
    for _ in 0..points {
        if let Some(at) = looker.any(rng) {
            looker.check(&at, rng);
        }
    }
    let all = looker.edges();
    for _ in 0..edges.min(all.len()) {
        looker.check(&all[rng.random_range(0..all.len())], rng);
    }
}

/// One life after another, each ended in another way, and points looked at in between.
async fn through_crashes(seed: u64, lives: usize, deeds: usize, points: usize) {
    let mut rng = StdRng::seed_from_u64(seed ^ 1);
    let mut host = synced(seed, "").await;
    let looker = looker(&host);
    for life in 0..lives {
        // The failpoint is hit by the next life, while it recovers from this one.
        let name = failpoint::ALL[rng.random_range(0..failpoint::ALL.len())];
        let armed = format!("{name}:{}", rng.random_range(1..12));
        let failpoint = rng.random_bool(0.6).then_some(armed.as_str());
        eprintln!("life {life}: {failpoint:?}, {} steps", looker.past.lock().unwrap().len());
        if host.receiver.is_running() {
            if rng.random_bool(0.5) { host.receiver.kill() } else { host.receiver.stop() }
        }
        host.receiver.start(failpoint);
        let mut going = host.receiver.is_running() && host.connect().await;
        let kill_at = Instant::now() + Duration::from_millis(rng.random_range(50..700));
        let kill = failpoint.is_none() && rng.random_bool(0.6);
        for _ in 0..deeds {
            if !going || (kill && Instant::now() > kill_at) {
                break;
            }
            let deed = host.any_deed();
            going = host.deed(deed).await;
        }
        if kill && host.receiver.is_running() {
            host.receiver.kill();
        }
        if going && host.receiver.is_running() {
            host.settle().await;
        }
        if !host.receiver.is_running() || failpoint.is_some() {
            host.disconnect();
            if host.receiver.is_running() {
                host.receiver.kill();
            }
            host.receiver.reap();
            host.receiver.start(None);
            assert!(host.connect().await, "{}", host.receiver.log());
            assert!(host.settle().await);
        }
        block_in_place(|| look_around(&looker, &mut rng, points, 3));
    }
    if host.in_gap() {
        assert!(host.deed(Deed::CloseGap).await);
    }
    assert!(host.deed(Deed::Records(50)).await);
    assert!(host.settle().await);
    block_in_place(|| {
        look_around(&looker, &mut rng, 6 * points, 40);
        looker.check(&PointSpec::Latest, &mut rng);
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        for _ in 0..2 {
            looker.check_restore(&looker.any(&mut rng).unwrap(), dir.path());
        }
        looker.check_exports(&looker.any(&mut rng).unwrap(), dir.path());
    });
    let group = host.receiver.group(support::host::GROUP).unwrap();
    eprintln!("{:?}", group.history);
    let log = host.receiver.log();
    assert!(!log.contains("lost data") && !log.contains("damaged"), "{log}");
    host.receiver.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_point_is_right_after_crashes() {
    through_crashes(seed(), 8, 40, 10).await;
}
