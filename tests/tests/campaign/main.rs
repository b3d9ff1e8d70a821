//! The campaign that decides: rounds of random load with random faults, each judged by a model that shares no code with the
//! product.
//!
//! A cycle is one pair of hosts with the volumes of one group (three that only the load writes to, one that fio writes to, one with
//! a file system and a database), and some rounds of one to three faults. After each round: the replica is what the volumes are,
//! and those are what the model says; bookmarks, and times at random, are what the model was then; fio finds in the round's last
//! point (and in those of earlier rounds) every block that it had written; the database has every commit that was acknowledged;
//! whole-volume comparisons are as many as faults justify; `varve status` did not say otherwise; nothing is left running.
//!
//! `VARVE_SEED` replays a cycle's choices (not the scheduler's). `VARVE_SOAK_SECONDS` says how long `soak` runs. Left out:
//! - clocks, which cannot be set here without setting the machine's (receiver/tests/clock.rs has a source that sets its own);
//! - pages that the capture program cannot read, and passthrough writes: nothing that writes to a loop device has such pages, and
//!   a loop device takes no passthrough commands (agent/src/group/played_troubles.rs plays both);
//! - an event that the kernel itself skips: the campaign writes past the block layer, and the agent is told of one
//!   (agent/src/misses.rs).
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

mod bench;
mod faults;
mod judge;

use bench::{Bench, Tally};
use faults::Fault;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};
use varve_tests::{Role, Seed};

/// What the whole of it came to.
#[derive(Default)]
struct Sum {
    rounds: u32,
    cycles: u32,
    faults: BTreeMap<String, u32>,
    tally: Tally,
}

/// One cycle: so many rounds, unless the time is over before.
fn cycle(seed: u64, rounds: u32, end: Instant, sum: &mut Sum) {
    println!("cycle {}: VARVE_SEED={seed}", sum.cycles);
    let _named_if_it_fails = Seed::of(seed);
    let mut bench = Bench::new(seed, &mut StdRng::seed_from_u64(seed));
    for round in 0..rounds {
        if round > 0 && Instant::now() >= end {
            break;
        }
        // Each round has numbers of its own: what one took more or less changes nothing for the next.
        let mut rng = StdRng::seed_from_u64(seed ^ ((u64::from(round) + 1) << 32));
        let faults: Vec<Fault> = (0..rng.random_range(1..=3)).map(|_| Fault::any(&mut rng)).collect();
        let began = Instant::now();
        println!("round {round}: {faults:?}");
        bench.begin(round, &mut rng);
        let from = SystemTime::now();
        std::thread::sleep(Duration::from_millis(rng.random_range(100..800)));
        bench.moment("before");
        for (number, fault) in faults.iter().enumerate() {
            fault.inject(&mut bench);
            bench.moment(&format!("after{number}"));
            std::thread::sleep(Duration::from_millis(rng.random_range(0..1200)));
            *sum.faults.entry(fault.name()).or_default() += 1;
        }
        judge::barrier(&mut bench);
        judge::claims(&mut bench);
        judge::times(&mut bench, &mut rng, from);
        judge::bookmarks(&mut bench, &mut rng);
        if rng.random_bool(0.4) {
            judge::database(&mut bench, &mut rng);
        }
        sum.rounds += 1;
        println!("  judged after {:.1} s", began.elapsed().as_secs_f64());
    }
    bench.tally.written = bench.written() - bench.written_before;
    bench.tally.failed_writes = bench.load.failed();
    bench.pair.recovery.varve(&["scrub", bench::GROUP, "--json"]).ok();
    bench.pair.production.stop(Role::Agent);
    bench.pair.recovery.stop(Role::Receiver);
    sum.cycles += 1;
    sum.tally.add(&bench.tally);
}

fn report(sum: &Sum, began: Instant) {
    let Sum { rounds, cycles, faults, tally } = sum;
    println!(
        "{rounds} rounds in {cycles} cycles, {:.0} s; {tally:#?}\nfaults: {faults:#?}",
        began.elapsed().as_secs_f64()
    );
}

#[test]
fn a_short_campaign() {
    let (seed, began, mut sum) = (Seed::new().number(), Instant::now(), Sum::default());
    cycle(seed, 4, began + Duration::from_secs(18), &mut sum);
    report(&sum, began);
}

#[test]
#[ignore = "as long as VARVE_SOAK_SECONDS says"]
fn soak() {
    let seconds = std::env::var("VARVE_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1800);
    let (seed, began, mut sum) = (Seed::new().number(), Instant::now(), Sum::default());
    let end = began + Duration::from_secs(seconds);
    while Instant::now() < end {
        cycle(seed + u64::from(sum.cycles), 8, end, &mut sum);
        report(&sum, began);
    }
}
