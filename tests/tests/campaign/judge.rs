//! What must be true after a round.

use crate::bench::{Bench, CHECKED, GROUP, LIMIT, LOADED, Moment, streams};
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::Value;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use varve_tests::campaign::{Client, Commits, Image, Op, locate};
use varve_tests::*;

/// Reasons of gaps that make an agent compare the whole of all volumes.
const WHOLE: [&str; 5] = ["new-ring", "replica-changed", "missed-events", "passthrough", "journal-lost"];
/// From a completion that went unseen until the agent notices.
const UNSEEN_LIMIT: Duration = Duration::from_secs(20);
/// Between the clock that the load reads and the one that the records get.
const CLOCK_SLACK_NS: u64 = 30_000_000;
/// From an event that the kernel skipped until the gap begins: the agent looks every 250 ms, on a machine that is shared.
const MISS_SEEN_NS: u64 = 750_000_000;

/// What a point holds, opened in one way or another.
struct Opened {
    client: Client,
    paths: Vec<PathBuf>,
    view: Option<String>,
    point: Value,
}

/// The point's time is too old; it lies in a gap; anything else is a failure.
enum No {
    Old,
    Gap(String),
}

impl Opened {
    #[track_caller]
    fn view(bench: &Bench, at: &str, writable: bool) -> Result<Self, No> {
        let mut args = vec!["view", "open", GROUP, "--at", at, "--json"];
        args.extend(writable.then_some("--writable"));
        let out = bench.pair.recovery.varve(&args);
        refused(&out)?;
        let reply = out.ok().json();
        let volumes = reply["volumes"].as_array().unwrap().iter();
        let paths = volumes.map(|volume| volume["device"].as_str().unwrap().into()).collect();
        let client = bench.pair.recovery.client();
        Ok(Opened { client, paths, view: Some(reply["id"].to_string()), point: reply["point"].clone() })
    }

    /// The volumes of the load and fio's, to files.
    #[track_caller]
    fn restored(bench: &Bench, at: &str) -> Result<Self, No> {
        let (mut paths, mut point) = (Vec::new(), Value::Null);
        for number in 0..=CHECKED {
            let to = bench.scratch.join(&format!("restored-{number}.img"));
            let (number, path) = (number.to_string(), to.to_str().unwrap().to_owned());
            let _ = std::fs::remove_file(&to);
            let out = bench
                .pair
                .recovery
                .varve(&["restore", GROUP, "--at", at, "--volume", &number, "--to", &path, "--yes", "--json"]);
            refused(&out)?;
            let reply = out.ok().json_lines().pop().unwrap();
            assert_eq!(reply["verified"], true, "{reply:#}");
            point = reply["point"].clone();
            paths.push(to);
        }
        Ok(Opened { client: bench.pair.recovery.client(), paths, view: None, point })
    }

    fn image(&self) -> Image {
        Image::read(&self.paths[..LOADED])
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(id) = &self.view {
            let out = self.client.varve(&["view", "close", id]);
            if !std::thread::panicking() {
                out.ok();
            }
        }
    }
}

fn refused(out: &Output) -> Result<(), No> {
    match out.code {
        5 => Err(No::Old),
        3 => Err(No::Gap(out.stderr.clone())),
        _ => Ok(()),
    }
}

/// Everything is healed, nobody writes: the replica is what the volumes are, and both are what the model says.
pub fn barrier(bench: &mut Bench) {
    bench.link.cut(false);
    bench.link.set(Conditions::default());
    bench.pair.wait_protected(GROUP, LIMIT);
    // Nobody writes to a volume that grew, and it is noticed all the same.
    for (device, replica) in bench.devices.iter().zip(&bench.replicas) {
        wait_until(LIMIT, "the replica is as large as its volume", || size_bytes(device) == size_bytes(replica));
    }
    bench.pair.wait_protected(GROUP, LIMIT);
    bench.receiver_is_back();
    let checked = bench.checking.take().unwrap().stop();
    let acknowledged = bench.commits.acknowledged();
    let name = format!("r{}-end", bench.round);
    let (out, image) = bench.load.quiet(|image| {
        bench.mount.frozen(|| {
            bench.pair.wait_protected(GROUP, LIMIT);
            bench.pair.wait_applied(GROUP, LIMIT);
            if let Some(words) = image.differs(&Image::read(&bench.devices[..LOADED]), |_, _| false) {
                let ops = bench.log().1;
                panic!(
                    "the model is not what the volumes hold, so it judges nothing: {words}\nin this round: {ops:#?}"
                );
            }
            let differs = || image.differs(&Image::read(&bench.replicas[..LOADED]), |_, _| false);
            if bench.excuse.failed_write && differs().is_some() {
                // A write failed, and this host's kernel ran no program when it completed (ARCHITECTURE.md): noticed when its
                // disk is idle, within seconds. Then the agent must say so, and mend it by itself.
                wait_until(UNSEEN_LIMIT, "a completion that went unseen is noticed", || bench.unseen_completions());
                wait_until(LIMIT, "what it hid is sent", || differs().is_none());
                bench.pair.wait_protected(GROUP, LIMIT);
                bench.pair.wait_applied(GROUP, LIMIT);
            }
            if let Some(words) = differs() {
                panic!("the replicas are not what was written: {words}");
            }
            for (device, replica) in bench.devices.iter().zip(&bench.replicas) {
                assert_same(device, replica);
            }
            let found = checked.verify(&bench.scratch, &bench.replicas[CHECKED]);
            found.unwrap_or_else(|words| panic!("fio says of the replica: {words}"));
            // In that size they are seen from here on.
            bench.load.settle();
            let mut image = image.clone();
            image.settle();
            (bench.pair.production.varve(&["bookmark", GROUP, &name, "--json"]).ok(), image)
        })
    });
    assert!(bench.note_moment(name, &out, image, Some(checked), acknowledged), "{out:?}");
    assert!(bench.moments.last().unwrap().durable, "nothing is in the way of a bookmark: {out:?}");
}

/// What the product says of the round, against what was done to it.
pub fn claims(bench: &mut Bench) {
    let seen = bench.watcher.take();
    bench.tally.looks += seen.looks;
    assert!(seen.lies.is_empty(), "status lied:\n{}", seen.lies.join("\n"));
    let points = bench.points();
    let gaps = points["gaps"].as_array().unwrap().clone();
    let new: Vec<&Value> = gaps.iter().filter(|gap| !bench.known_gaps.contains(gap)).collect();
    let streams = streams(&points);
    let reason = |gap: &&&Value, reasons: &[&str]| gap["reason"].as_str().is_some_and(|word| reasons.contains(&word));
    // A new ring is a new stretch. Inside of another gap it is no gap of its own.
    let begun = streams.iter().filter(|stream| !bench.known_streams.contains(stream)).count();
    let compared = begun + new.iter().filter(|gap| reason(gap, &WHOLE[1..])).count();
    assert_eq!(
        compared as u64, bench.excuse.comparisons,
        "whole-volume comparisons, against those that a fault justifies: {new:#?}"
    );
    let excuse = &bench.excuse;
    for gap in &new {
        let excused = match gap["reason"].as_str().unwrap() {
            "ring-full" => excuse.ring_full,
            "failed-write" => excuse.failed_write,
            "repair" => excuse.repair,
            "volume-changed" => excuse.grown,
            "new-ring" | "missed-events" => excuse.comparisons > 0,
            _ => false,
        };
        assert!(excused, "a gap that nothing excuses: {gap:#}, all new ones: {new:#?}, {excuse:?}");
        assert!(gap["to"].is_string(), "it is closed: {gap:#}");
    }
    let regions: u64 = bench.devices.iter().map(|device| size_bytes(device) / MIB).sum();
    if excuse.comparisons == 0 && !excuse.verify {
        assert!(seen.probes < regions, "{} regions of {regions} were compared, and no fault justifies it", seen.probes);
    }
    bench.tally.comparisons += excuse.comparisons;
    bench.known_streams = streams;
    bench.known_gaps = gaps;
    for role in [Role::Agent, Role::Receiver] {
        let side = if role == Role::Agent { &bench.pair.production } else { &bench.pair.recovery };
        let log = side.log(role);
        let panicked: Vec<&str> = log.lines().filter(|line| line.contains("panicked")).collect();
        assert!(panicked.is_empty(), "{panicked:#?}");
        // `varve` comes and goes.
        let expected = vec![side.pid(role)];
        wait_until(Duration::from_secs(10), "nothing is left running but the daemons", || side.processes() == expected);
    }
}

/// Bookmarks of this round, and one of an earlier one, are what the model was.
pub fn bookmarks(bench: &mut Bench, rng: &mut StdRng) {
    let here: Vec<usize> = (0..bench.moments.len()).filter(|n| bench.moments[*n].round == bench.round).collect();
    let earlier = bench.moments.len() - here.len();
    let mut chosen = here;
    // The last one is that of the barrier, which is fio's, too.
    while chosen.len() > 3 {
        chosen.remove(rng.random_range(0..chosen.len() - 1));
    }
    if earlier > 0 {
        chosen.push(rng.random_range(0..earlier));
    }
    for number in chosen {
        let by_restore = rng.random_bool(0.4);
        let moment = &bench.moments[number];
        let at = format!("bookmark:{}", moment.name);
        let opened = match by_restore {
            true => Opened::restored(bench, &at),
            false => Opened::view(bench, &at, false),
        };
        match opened {
            Ok(opened) => {
                same_as(bench, moment, &opened.image());
                let checked = moment.checked.as_ref();
                let found = checked.map(|checked| checked.verify(&bench.scratch, &opened.paths[CHECKED]));
                let found = found.transpose().unwrap_or_else(|words| panic!("fio says of {at}: {words}"));
                drop(opened);
                bench.tally.checked += found.unwrap_or(0);
                bench.tally.points += 1;
            }
            // What the receiver had not yet when the capture was lost, and no journal kept.
            Err(No::Old) if !moment.durable && bench.excuse.comparisons > 0 => bench.tally.expired += 1,
            Err(No::Old) => {
                // Looked at now: it may have expired a moment ago.
                let window = bench.points()["window"]["from"].as_str().unwrap().to_owned();
                assert!(moment.time < window, "{at} of {} is gone, the window begins at {window}", moment.time);
                bench.tally.expired += 1;
            }
            // Set while a gap ended, whose end then had to be said again, later.
            Err(No::Gap(_)) if !moment.durable && bench.excuse.ring_full => bench.tally.expired += 1,
            Err(No::Gap(words)) => panic!("{at} was promised, and is refused: {words}"),
        }
    }
}

#[track_caller]
fn same_as(bench: &Bench, moment: &Moment, seen: &Image) {
    let tainted = |volume: usize, sector: u64| {
        let hit = |(range, mended): &(std::ops::Range<u64>, Instant)| range.contains(&sector) && *mended > moment.taken;
        volume == 0 && bench.tainted.iter().any(hit)
    };
    if let Some(words) = moment.image.differs(seen, tainted) {
        panic!("bookmark {} ({}) is not what the volumes were then: {words}", moment.name, moment.time);
    }
}

/// Times at random: each is a state that the volumes had, the right one, or refused because of a gap.
pub fn times(bench: &mut Bench, rng: &mut StdRng, from: SystemTime) {
    let to = SystemTime::now();
    let (base, ops) = bench.log();
    // What a failed write leaves before anybody has noticed is nobody's promise.
    let failed = |volume| ops.iter().any(|op| op.failed && op.volume == volume);
    let volumes: Vec<usize> = (0..LOADED).filter(|volume| !failed(*volume)).collect();
    let ns = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    for _ in 0..2 {
        let asked = rng.random_range(ns(from)..ns(to));
        let at = jiff::Timestamp::from_nanosecond(asked.into()).unwrap().to_string();
        let opened = match Opened::view(bench, &at, false) {
            Ok(opened) => opened,
            Err(No::Gap(words)) => {
                let excuse = &bench.excuse;
                let gaps = [excuse.ring_full, excuse.failed_write, excuse.repair, excuse.grown, excuse.comparisons > 0];
                assert!(gaps.contains(&true), "{at} is refused, and nothing excuses it: {words}");
                bench.tally.in_gap += 1;
                continue;
            }
            Err(No::Old) if bench.excuse.window => {
                bench.tally.expired += 1;
                continue;
            }
            Err(No::Old) => panic!("{at} is in the window and was not found"),
        };
        let image = opened.image();
        let seen = |ops: &[Op]| match locate(&base, ops, &image, &volumes) {
            Ok(found) => is_of_time(ops, &found, &volumes, asked),
            // The sectors that were changed behind the replica's back are in no log.
            Err(_) if bench.excuse.repair => Ok(()),
            Err(words) => Err(words),
        };
        // Before it is known that an event was skipped, its write may be lacking.
        let unknown = |op: &Op| {
            let until = op.ended_ns.saturating_add(MISS_SEEN_NS);
            op.unseen && (op.began_ns..until).contains(&(asked + CLOCK_SLACK_NS))
        };
        let known: Vec<Op> = ops.iter().filter(|op| !unknown(op)).copied().collect();
        if let Err(words) = seen(&ops).or_else(|words| if known.len() < ops.len() { seen(&known) } else { Err(words) })
        {
            panic!("the volumes at {at} ({:#}): {words}", opened.point);
        }
        drop(opened);
        bench.tally.cuts += 1;
    }
}

/// Whether a state with so many ops can be that of a time.
fn is_of_time(ops: &[Op], found: &[usize], volumes: &[usize], asked: u64) -> Result<(), String> {
    let least = ops.iter().take_while(|op| op.ended_ns.saturating_add(CLOCK_SLACK_NS) < asked).count();
    let most = ops.iter().take_while(|op| op.began_ns < asked + CLOCK_SLACK_NS).count();
    let mine = |op: usize| volumes.len() == LOADED || ops.get(op).is_some_and(|op| volumes.contains(&op.volume));
    if found.iter().any(|count| (least..=most).contains(count)) || !mine(least) {
        return Ok(());
    }
    Err(format!("they are those after {found:?} ops, and between {least} and {most} had been done"))
}

/// The database at a bookmark of this round has every commit that was acknowledged before.
pub fn database(bench: &mut Bench, rng: &mut StdRng) {
    let here: Vec<usize> = (0..bench.moments.len()).filter(|n| bench.moments[*n].round == bench.round).collect();
    let moment = &bench.moments[here[rng.random_range(0..here.len())]];
    let opened = match Opened::view(bench, &format!("bookmark:{}", moment.name), true) {
        Ok(opened) => opened,
        Err(_) if bench.excuse.window || !moment.durable => return,
        Err(_) => panic!("bookmark {} cannot be opened", moment.name),
    };
    let mount = Mount::existing(&bench.scratch, "copy", opened.paths.last().unwrap(), "defaults");
    assert!(Commits::is_in(mount.path()));
    Commits::judge(&bench.scratch, &mount, moment.commits.0, moment.commits.1);
    mount.unmount();
    drop(opened);
    bench.tally.databases += 1;
}
