//! Decides whether the timeline is right: a random workload, with gaps, new rings and crashes of the receiver at every step,
//! and then every kind of point looked at and compared with a model that shares nothing with the product, bit for bit.
//!
//! `VARVE_SEED` replays. `VARVE_SOAK_SECONDS` makes `soak` (ignored otherwise) run as long as that, with larger rounds.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

mod support;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::host::{Deed, GROUP, Host};
use support::looker::{Looker, Seen, parse_time};
use support::past::{Expected, Volumes};
use support::{LIMIT, assert_equal, seed};
use tokio::task::block_in_place;
use varve_common::control::{LayerDamage, ReceiverRequest, RetentionReply, RollbackReply, ScrubReply, ViewReply};
use varve_common::point::PointSpec;
use varve_common::problem::ProblemKind;
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
/// `bursts`: how many records some of the deeds have, if there shall be such.
async fn through_crashes(seed: u64, lives: usize, deeds: usize, points: usize, bursts: Option<Range<usize>>) {
    let mut rng = StdRng::seed_from_u64(seed ^ 1);
    let mut host = synced(seed, "").await;
    if bursts.is_some() {
        (host.write_max, host.whole_blocks) = (8192, 18);
    }
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
            let burst = bursts.clone().filter(|_| rng.random_bool(0.4));
            let deed =
                burst.clone().map_or_else(|| host.any_deed(), |records| Deed::Records(rng.random_range(records)));
            let held = host.receiver.held_path();
            if burst.is_some() && rng.random_bool(0.7) {
                // All of it waits before any is applied; with more the landing log would be full.
                going = host.settle().await;
                std::fs::write(&held, "").unwrap();
            }
            going = going && host.deed(deed).await;
            let _ = std::fs::remove_file(&held);
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
    if let Some(records) = bursts {
        // The last of them surely has batches that follow each other, over blocks that are known.
        let held = host.receiver.held_path();
        std::fs::write(&held, "").unwrap();
        assert!(host.deed(Deed::Records(records.end)).await);
        std::fs::remove_file(&held).unwrap();
        assert!(host.settle().await);
        assert!(host.receiver.group(GROUP).unwrap().counters["late_bytes"] > 0);
    }
    block_in_place(|| {
        look_around(&looker, &mut rng, 6 * points, 40);
        looker.check(&PointSpec::Latest, &mut rng);
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        for _ in 0..2 {
            looker.check_restore(&looker.any(&mut rng).unwrap(), dir.path());
        }
        looker.check_exports(&looker.any(&mut rng).unwrap(), dir.path());
    });
    let group = host.receiver.group(GROUP).unwrap();
    eprintln!("{:?}", group.history);
    let log = host.receiver.log();
    assert!(!log.contains("lost data") && !log.contains("damaged"), "{log}");
    host.receiver.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_point_is_right_after_crashes() {
    through_crashes(seed(), 8, 40, 10, None).await;
}

/// So much at once that batches are full and have several parts: what is replaced is kept while the next part is looked at, and
/// the replicas are written when the last part is kept, or when no batch follows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_point_is_right_after_crashes_in_bursts() {
    through_crashes(seed(), 4, 6, 10, Some(2000..5000)).await;
}

/// Looks at points while data flows, with several views open, until it is told to stop. Gives how many looks were made and
/// how many found their point expired.
fn watch(looker: &Looker, seed: u64, stop: &AtomicBool) -> (usize, usize) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut open: Vec<(ViewReply, usize, Volumes)> = Vec::new();
    let (mut looks, mut expired) = (0, 0);
    while !stop.load(Ordering::Acquire) {
        looks += 1;
        if open.len() < 5 {
            let Some(at) = looker.any(&mut rng) else { continue };
            let Expected::After(index) = looker.expected(&at) else {
                let opened = looker.open(&at).unwrap();
                // Set again meanwhile, behind the gap.
                let again = matches!(looker.expected(&at), Expected::After(_));
                assert!(opened.is_err() || again, "{at} is in a gap");
                opened.iter().for_each(|view| looker.close(view));
                continue;
            };
            match looker.open(&at).expect("the daemon lives") {
                Ok(view) => {
                    let index = looker.opened(&view, &at, index);
                    open.push((view, index, looker.image(index)));
                }
                Err(problem) => {
                    // Asked again only now: the window goes on.
                    let from = parse_time(&looker.points().window.from.expect("a window"));
                    let time_ns = looker.past.lock().unwrap().time_ns(index);
                    assert_eq!(problem.kind, ProblemKind::NotFound, "{at}: {problem:?}");
                    assert!(time_ns <= from + 1000, "{at} is in the window, which begins at {from}: {problem:?}");
                    expired += 1;
                }
            }
            continue;
        }
        let which = rng.random_range(0..open.len());
        let (view, index, model) = &open[which];
        let what = format!("a view of step {index} ({}) while data flows", looker.describe(*index));
        assert_eq!(looker.compare(view, model, &mut rng, &what, false), Seen::Right);
        if rng.random_bool(0.3) {
            looker.close(&open.swap_remove(which).0);
        }
    }
    for (view, index, model) in &open {
        let what = format!("a view of step {index} at the end");
        assert_eq!(looker.compare(view, model, &mut rng, &what, false), Seen::Right);
        looker.close(view);
    }
    (looks, expired)
}

/// Feeds for a while with watchers beside.
async fn flow(host: &mut Host, looker: &Looker, seed: u64, time: Duration) -> (usize, usize) {
    let stop = Arc::new(AtomicBool::new(false));
    let watcher = |seed| {
        let (looker, stop) = (looker.clone(), stop.clone());
        tokio::task::spawn_blocking(move || watch(&looker, seed, &stop))
    };
    let watchers = [watcher(seed), watcher(seed ^ 7)];
    let start = Instant::now();
    while start.elapsed() < time && !watchers.iter().all(|watcher| watcher.is_finished()) {
        let deed = host.any_deed();
        assert!(host.deed(deed).await, "{}", host.receiver.log());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stop.store(true, Ordering::Release);
    let mut all = (0, 0);
    for watcher in watchers {
        let (looks, expired) = watcher.await.unwrap();
        all = (all.0 + looks, all.1 + expired);
    }
    all
}

async fn while_data_flows(seed: u64, time: Duration) {
    let mut rng = StdRng::seed_from_u64(seed ^ 2);
    let mut host = synced(seed, "").await;
    let looker = looker(&host);
    assert!(host.deed(Deed::Records(40)).await && host.settle().await);
    let first = loop {
        let first = looker.any(&mut rng).unwrap();
        if matches!(looker.expected(&first), Expected::After(_)) {
            break first;
        }
    };
    let Expected::After(index) = looker.expected(&first) else { panic!("{first}") };
    // By its time: the words about a stream that has gone altogether are others.
    let first = PointSpec::Time(looker.past.lock().unwrap().time_ns(index));
    let Expected::After(index) = looker.expected(&first) else { panic!("{first}") };
    let held = looker.open(&first).unwrap().unwrap();
    // Held: whatever retention says, nothing of it may go.
    let retention = |bytes| ReceiverRequest::Retention {
        group: GROUP.into(),
        age_seconds: None,
        bytes: Some(bytes),
        dry_run: false,
    };
    let _: RetentionReply = looker.done(&retention(12 << 20));
    let (looks, expired) = flow(&mut host, &looker, seed, time / 2).await;
    assert!(host.settle().await);
    block_in_place(|| {
        let reply: RetentionReply = looker.done(&retention(12 << 20));
        assert!(reply.held_bytes > 0, "{reply:?}");
        let model = looker.image(index);
        assert_eq!(looker.compare(&held, &model, &mut rng, "the oldest view", false), Seen::Right);
        // What is older than it may have gone, nothing younger.
        let view = looker.open(&first).unwrap().unwrap();
        looker.close(&view);
        looker.close(&held);
    });
    let (more, gone) = flow(&mut host, &looker, seed ^ 3, time / 2).await;
    eprintln!("{} looks, {} found their point expired", looks + more, expired + gone);
    assert!(host.settle().await);
    block_in_place(|| {
        // The oldest point that is shown is one, what is before it is none, and says where to look.
        let start = Instant::now();
        while looker.open(&first).unwrap().map(|view| looker.close(&view)).is_ok() {
            assert!(start.elapsed() < LIMIT, "nothing expires");
            std::thread::sleep(Duration::from_millis(50));
        }
        loop {
            let problem = looker.open(&first).unwrap().unwrap_err();
            assert_eq!(problem.kind, ProblemKind::NotFound, "{problem:?}");
            let next = problem.next.split("the oldest point: --at ").nth(1).unwrap_or_else(|| panic!("{problem:?}"));
            let oldest = PointSpec::Time(parse_time(next.split(';').next().unwrap()));
            let Expected::After(index) = looker.expected(&oldest) else { panic!("{oldest} is in a gap") };
            match looker.look(&oldest, index, &mut rng, false) {
                Seen::Right => break,
                // It was the oldest when it was named, and has expired since; what is left there may be a gap.
                Seen::Refused(_) if start.elapsed() < LIMIT => {}
                other => panic!("{oldest}: {other:?}"),
            }
        }
        // Until nothing expires any more.
        let (start, mut points) = (Instant::now(), looker.points());
        loop {
            std::thread::sleep(Duration::from_millis(2500));
            let now = looker.points();
            let before = std::mem::replace(&mut points, now).window.from;
            if points.window.from == before {
                break;
            }
            assert!(start.elapsed() < LIMIT, "it expires for ever");
        }
        let from = parse_time(points.window.from.as_ref().unwrap());
        for _ in 0..40 {
            let at = looker.any(&mut rng).unwrap();
            let Expected::After(index) = looker.expected(&at) else { continue };
            let time_ns = looker.past.lock().unwrap().time_ns(index);
            match looker.look(&at, index, &mut rng, false) {
                Seen::Right => {}
                Seen::Refused(problem) => {
                    assert!(time_ns <= from + 1000, "{at}, the window begins at {from}: {problem:?}")
                }
                other => panic!("{at}: {other:?}"),
            }
        }
    });
    host.receiver.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn views_stay_right_while_data_flows_and_layers_expire() {
    while_data_flows(seed(), Duration::from_secs(8)).await;
}

/// What the chronicle says of the newest rollback: its stream, and when it began.
fn newest_stream(looker: &Looker) -> ([u8; 16], u64, Option<u64>) {
    let points = looker.points();
    let stretch = points.stretches.last().unwrap();
    let number = u128::from_str_radix(&stretch.incarnation, 16).unwrap();
    let ended = points.rollbacks.last().map(|rollback| parse_time(&rollback.time));
    (number.to_be_bytes(), parse_time(&stretch.from), ended)
}

/// Rolls back to `at`, which must succeed, and compares the replicas.
fn roll_back(host: &mut Host, looker: &Looker, at: &PointSpec, index: usize) -> RollbackReply {
    let model = Arc::new(looker.image(index));
    let reply = looker.rollback(at).unwrap().unwrap_or_else(|problem| panic!("{at}: {problem:?}"));
    assert!(reply.held);
    eprintln!("rolled back to {at}, step {index}: {reply:?}");
    let (stream, began, ended) = newest_stream(looker);
    host.note_rollback(stream, began, Some((ended.unwrap(), model.clone())));
    for (number, model) in model.iter().enumerate() {
        let what = format!("after a rollback to {at} (step {index}), volume {number}");
        assert_equal(&host.receiver.replica(GROUP, number)[..model.len()], model, &what);
    }
    reply
}

async fn back_and_forth(seed: u64, rounds: usize) {
    let mut rng = StdRng::seed_from_u64(seed ^ 4);
    let mut host = synced(seed, "").await;
    let looker = looker(&host);
    for round in 0..rounds {
        for _ in 0..12 {
            let deed = host.any_deed();
            assert!(host.deed(deed).await, "{}", host.receiver.log());
        }
        if host.in_gap() {
            assert!(host.deed(Deed::CloseGap).await);
        }
        assert!(host.deed(Deed::Records(30)).await && host.settle().await);
        let point = |rng: &mut StdRng| loop {
            let at = looker.any(rng).unwrap();
            if let Expected::After(index) = looker.expected(&at) {
                break (at, index);
            }
        };
        let (at, index) = point(&mut rng);
        let before = looker.past.lock().unwrap().len() - 1;
        // A crash in the middle of it, then the same again.
        let steps = [
            "history-before",
            "history-after",
            "apply-before",
            "apply-half",
            "apply-after",
            "mark-before",
            "land-after",
        ];
        let failpoint = format!("{}:{}", steps[rng.random_range(0..steps.len())], rng.random_range(1..3));
        eprintln!("round {round}: from step {before} to step {index} ({at}), {failpoint}");
        host.disconnect();
        host.receiver.stop();
        host.receiver.start(Some(&failpoint));
        block_in_place(|| {
            let known = newest_stream(&looker);
            match looker.rollback(&at) {
                None => {
                    host.receiver.reap();
                    host.receiver.start(None);
                    let (stream, began, _) = newest_stream(&looker);
                    if stream != known.0 {
                        host.note_rollback(stream, began, None);
                    }
                    // What was before it is still there.
                    look_around(&looker, &mut rng, 5, 2);
                    let reply = roll_back(&mut host, &looker, &at, index);
                    assert_eq!(reply.to_point.height, looker.rollback_plan(&at).to_point.height);
                }
                Some(Ok(_)) => {
                    let (stream, began, ended) = newest_stream(&looker);
                    let now = Arc::new(looker.image(index));
                    host.note_rollback(stream, began, Some((ended.unwrap(), now)));
                    host.receiver.kill();
                    host.receiver.start(None);
                    looker.points();
                }
                Some(Err(problem)) => panic!("{problem:?}"),
            }
            look_around(&looker, &mut rng, 10, 4);
            // And back to what was before.
            let was = looker.past.lock().unwrap().spec_of_position(before);
            let reply = roll_back(&mut host, &looker, &was, before);
            assert!(looker.expected(&PointSpec::Latest) != Expected::After(before), "a rollback is a point of its own");
            // That one can be undone by the words that it answers with.
            let undo = PointSpec::Time(parse_time(&reply.from_point.time));
            roll_back(&mut host, &looker, &undo, index);
            let (other, elsewhere) = point(&mut rng);
            roll_back(&mut host, &looker, &other, elsewhere);
            look_around(&looker, &mut rng, 10, 4);
            looker.check(&PointSpec::Latest, &mut rng);
        });
        // Replication goes on: the volumes are compared, and what differs is sent.
        let _: () = looker.done(&ReceiverRequest::RollbackRelease { group: GROUP.into() });
        host.catch_up_time();
        assert!(host.connect().await);
        assert!(host.deed(Deed::CloseGap).await && host.settle().await);
        block_in_place(|| {
            look_around(&looker, &mut rng, 5, 4);
            looker.check(&PointSpec::Latest, &mut rng);
        });
    }
    host.receiver.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_is_exact_and_can_be_undone() {
    back_and_forth(seed(), 3).await;
}

/// Something that happens to a file.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Harm {
    Flip,
    Truncate,
    Remove,
    Swap,
}

/// Does it to a file of a directory, at random; `newest`: to the last one. Says what was done.
fn harm(dir: &Path, harm: Harm, newest: bool, rng: &mut StdRng) -> String {
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let which = if newest { files.len() - 1 } else { rng.random_range(0..files.len() - 1) };
    let path = &files[which];
    let mut bytes = std::fs::read(path).unwrap();
    // The newest layer has room reserved behind its end.
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(1, |last| last + 1);
    let at = rng.random_range(0..used);
    match harm {
        Harm::Flip => {
            bytes[at] ^= 1 << rng.random_range(0..8);
            std::fs::write(path, &bytes).unwrap();
        }
        Harm::Truncate => std::fs::write(path, &bytes[..at]).unwrap(),
        Harm::Remove => std::fs::remove_file(path).unwrap(),
        Harm::Swap => drop(std::fs::copy(&files[(which + 1) % files.len()], path).unwrap()),
    }
    format!("{harm:?} of {} at {at} of {used}", path.file_name().unwrap().display())
}

fn copy_tree(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    let done = std::process::Command::new("cp").args(["-a", "--sparse=always"]).arg(from).arg(to).status().unwrap();
    assert!(done.success());
}

/// Whether a look at a point of a damaged history gave what may be given: what was there, or no answer.
fn is_honest(seen: &Seen) -> bool {
    match seen {
        Seen::Right | Seen::Errors(_) => true,
        Seen::Refused(problem) => {
            matches!(problem.kind, ProblemKind::Failed | ProblemKind::Refused | ProblemKind::NotFound)
        }
        Seen::Gone => false,
    }
}

/// After a scrub: what it names as lost is refused, everything else is right.
fn check_lost(looker: &Looker, scrubbed: &ScrubReply, rng: &mut StdRng, points: usize, what: &str) -> (usize, usize) {
    let range = |damage: &LayerDamage| {
        let from = parse_time(damage.from.as_ref()?);
        Some((from, damage.to.as_ref().map_or(u64::MAX, |to| parse_time(to))))
    };
    let lost: Vec<(u64, u64)> = scrubbed.damaged.iter().filter_map(range).collect();
    let (mut right, mut refused) = (0, 0);
    for _ in 0..points {
        let at = looker.any(rng).unwrap();
        let Expected::After(index) = looker.expected(&at) else { continue };
        let time_ns = looker.past.lock().unwrap().time_ns(index);
        let seen = looker.look(&at, index, rng, true);
        let context = || format!("{what}: {at} (step {index}): {seen:?}; lost are {lost:?}; {scrubbed:?}");
        // Records may share a time, and times are shown to the microsecond.
        let inside = lost.iter().any(|(from, to)| (from + 2000..to.saturating_sub(2000)).contains(&time_ns));
        let outside =
            !lost.iter().any(|(from, to)| (from.saturating_sub(2000)..=to.saturating_add(2000)).contains(&time_ns));
        if outside {
            assert_eq!(seen, Seen::Right, "{}", context());
            right += 1;
        } else if inside {
            assert!(matches!(&seen, Seen::Refused(_)), "{}", context());
            refused += 1;
        } else {
            assert!(is_honest(&seen), "{}", context());
        }
    }
    (right, refused)
}

async fn damage(seed: u64, cases: usize, points: usize) {
    let mut rng = StdRng::seed_from_u64(seed ^ 5);
    let mut host = synced(seed, "").await;
    let looker = looker(&host);
    while host.receiver.group(GROUP).unwrap().history.unwrap().layers < 20 {
        let deed = host.any_deed();
        assert!(host.deed(deed).await, "{}", host.receiver.log());
    }
    if host.in_gap() {
        assert!(host.deed(Deed::CloseGap).await);
    }
    assert!(host.deed(Deed::Records(30)).await && host.settle().await);
    // For the merges.
    std::thread::sleep(Duration::from_millis(1500));
    host.disconnect();
    host.receiver.stop();
    let group = host.receiver.paths.receiver_group(GROUP);
    let history = group.join("history");
    let backup = host.receiver.dir.path().join("backup");
    copy_tree(&group, &backup);
    let harms = [Harm::Flip, Harm::Truncate, Harm::Remove, Harm::Swap];
    for case in 0..cases {
        let (newest, run) = (case % 7 == 5, case % 3 == 2);
        let dir = history.join(if run { "runs" } else { "layers" });
        let kind = harms[if case % 2 == 0 { 0 } else { rng.random_range(0..4) }];
        let online = !newest && rng.random_bool(0.3);
        if online {
            host.receiver.start(None);
            looker.points();
            // Whatever is remembered of files.
            look_around(&looker, &mut rng, 3, 0);
        }
        let what = harm(&dir, kind, newest && !run, &mut rng);
        if !online {
            host.receiver.start(None);
        }
        eprintln!("case {case}: {what}{}", if online { ", online" } else { "" });
        let opened = host.receiver.try_group(GROUP).is_some();
        assert!(opened, "{what}: {}", host.receiver.log());
        looker.points();
        for _ in 0..points {
            let at = looker.any(&mut rng).unwrap();
            let Expected::After(index) = looker.expected(&at) else { continue };
            let seen = looker.look(&at, index, &mut rng, true);
            assert!(is_honest(&seen), "{what}: {at}: {seen:?}");
            if run {
                assert_eq!(seen, Seen::Right, "{what}: {at}: runs can be made again");
            }
        }
        let scrubbed = looker.scrub();
        if run {
            assert!(scrubbed.damaged.is_empty(), "{what}: {scrubbed:?}");
        }
        let before = check_lost(&looker, &scrubbed, &mut rng, points, &what);
        // And in another life.
        host.receiver.stop();
        host.receiver.start(None);
        looker.points();
        let after = check_lost(&looker, &scrubbed, &mut rng, points, &format!("{what}, restarted"));
        let words: Vec<&str> = scrubbed.damaged.iter().map(|damage| damage.what.as_str()).collect();
        eprintln!("  {} lost: {words:?}; right and refused: {before:?}, {after:?}", scrubbed.damaged.len());
        if case + 1 == cases {
            break;
        }
        host.receiver.kill();
        copy_tree(&backup, &group);
    }
    // It goes on all the same.
    assert!(host.connect().await);
    assert!(host.deed(Deed::Records(200)).await && host.settle().await);
    block_in_place(|| looker.check(&PointSpec::Latest, &mut rng));
    host.receiver.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_never_gives_wrong_bytes_and_takes_no_more_than_it_must() {
    damage(seed(), 8, 8).await;
}

/// As long as `VARVE_SOAK_SECONDS` says, one round after another, each with a seed of its own: `make soak`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "as long as VARVE_SOAK_SECONDS says"]
async fn soak() {
    let seconds = std::env::var("VARVE_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(600);
    let start = Instant::now();
    let mut next = seed();
    for round in 0.. {
        eprintln!("soak round {round}: VARVE_SEED={next}, {:?} of {seconds} s", start.elapsed());
        match round % 5 {
            0 => through_crashes(next, 16, 60, 20, None).await,
            1 => while_data_flows(next, Duration::from_secs(30)).await,
            2 => back_and_forth(next, 6).await,
            3 => through_crashes(next, 12, 20, 20, Some(2000..6000)).await,
            _ => damage(next, 24, 20).await,
        }
        if start.elapsed() > Duration::from_secs(seconds) {
            break;
        }
        next = StdRng::seed_from_u64(next).random();
    }
}
