//! The power of the receiver's host goes, at any flush of its disk and between: what was acknowledged is there, every point is
//! what the model says, and what the disk had only in its cache is as if it had never been.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

mod support;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::process::Command;
use support::host::{Deed, GROUP, Host};
use support::looker::Looker;
use support::media::{Faults, Media, Mounted};
use support::seed;
use tokio::task::block_in_place;
use varve_common::point::PointSpec;
use varve_tests::Scratch;

const VOLUMES: [u64; 2] = [6 << 20, (1 << 20) + 512 * 3];

async fn through_power_cuts(seed: u64, lives: usize, deeds: usize, points: usize) {
    let mut rng = StdRng::seed_from_u64(seed ^ 2);
    let scratch = Scratch::disk();
    let media = Media::pair(700 << 20, seed);
    let points_of = ["state", "history"].map(|name| scratch.dir(name));
    let devices = ["device-1", "device-2"].map(|name| scratch.dir(name));
    let mut disks = [0, 1].map(|at| Mounted::ext4(&media[at], &devices[at], &points_of[at]));
    let inside = tempfile::tempdir_in(&points_of[0]).unwrap();
    let mut host = Host::in_dir(inside, seed, &VOLUMES, "");
    let looker = Looker { paths: host.receiver.paths.clone(), past: host.past.clone() };
    host.receiver.start(None);
    host.enrol().await;
    assert!(host.connect().await);
    assert!(host.deed(Deed::Records(20)).await);
    assert!(host.settle().await);
    host.disconnect();
    host.receiver.stop();
    // The history on a disk of its own: no other part's flush makes it last.
    let (history, moved) = (host.receiver.paths.receiver_group(GROUP).join("history"), points_of[1].join("history"));
    let copied = Command::new("cp").args(["-a", "--"]).args([&history, &moved]).status().unwrap();
    assert!(copied.success());
    std::fs::remove_dir_all(&history).unwrap();
    std::os::unix::fs::symlink(&moved, &history).unwrap();
    // The operator's part is done for good.
    nix::unistd::sync();
    let (mut cuts, mut lived) = (0, 0);
    for life in 0..lives {
        if !host.receiver.is_running() {
            host.receiver.start(None);
        }
        // Most of the flushes are the landing log's; some lives end in their recovery, some between two flushes.
        let at = [rng.random_range(1..12), rng.random_range(1..300)][rng.random_range(0..2)];
        let cut_at_flush = rng.random_bool(0.8).then_some(at);
        media[usize::from(rng.random_bool(0.3))].fail(Faults { cut_at_flush, ..Faults::default() });
        let mut going = host.connect().await;
        for _ in 0..deeds {
            if !going || !media[0].has_power() {
                break;
            }
            let deed = host.any_deed();
            going = host.deed(deed).await;
        }
        assert!(going || !media[0].has_power(), "life {life}: it ended with the power on\n{}", host.receiver.log());
        lived += u32::from(going && media[0].has_power());
        // Now, if it was not before.
        media[0].cut_power();
        host.note_durable();
        host.disconnect();
        host.receiver.kill();
        disks.iter_mut().for_each(Mounted::power_cycle);
        cuts += 1;
        host.receiver.start(None);
        assert!(host.connect().await, "life {life}:\n{}", host.receiver.log());
        assert!(host.settle().await);
        block_in_place(|| {
            for _ in 0..points {
                if let Some(at) = looker.any(&mut rng) {
                    looker.check(&at, &mut rng);
                }
            }
        });
    }
    if host.in_gap() {
        assert!(host.deed(Deed::CloseGap).await);
    }
    assert!(host.deed(Deed::Records(50)).await);
    assert!(host.settle().await);
    block_in_place(|| {
        for _ in 0..5 * points {
            if let Some(at) = looker.any(&mut rng) {
                looker.check(&at, &mut rng);
            }
        }
        looker.check(&PointSpec::Latest, &mut rng);
    });
    let log = host.receiver.log();
    eprintln!("{cuts} cuts, {lived} of them between two deeds; {} steps", looker.past.lock().unwrap().len());
    assert!(!log.contains("lost data") && !log.contains("damaged"), "{log}");
    host.receiver.stop();
    drop(host);
    drop(disks);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_point_is_right_after_the_power_has_gone() {
    through_power_cuts(seed(), 8, 30, 6).await;
}

/// As long as `VARVE_SOAK_SECONDS` says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "make soak"]
async fn soak() {
    let seconds = std::env::var("VARVE_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(120);
    let (start, mut seed) = (std::time::Instant::now(), seed());
    while start.elapsed().as_secs() < seconds {
        eprintln!("round with seed {seed}");
        through_power_cuts(seed, 10, 30, 8).await;
        seed = seed.wrapping_add(1);
    }
}
