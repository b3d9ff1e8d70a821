//! A group that ran on the recovery host comes home: nothing that was written there is lost, whatever ends either side at
//! whatever moment; then it is protected from home without comparing anything again.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(90);
const PIECE: usize = 64 << 10;

/// A device of a promoted group, under the name that every start gives it.
fn promoted(pair: &Pair, volume: usize) -> PathBuf {
    pair.recovery.root().join(format!("run/varve/views/g-{volume}"))
}

fn takeover(pair: &Pair) -> Value {
    pair.recovery.group("g").map_or(Value::Null, |status| status["history"]["takeover"].clone())
}

fn role(install: &Installation) -> String {
    install.group("g").map_or(String::new(), |status| status["role"].as_str().unwrap().to_owned())
}

fn pattern(number: u64) -> Aligned {
    Aligned::filled(PIECE, &number.to_le_bytes())
}

/// Fills a volume with something that is nowhere zero.
fn fill(path: &Path, rng: &mut StdRng, bytes: usize) {
    let mut content = vec![0; bytes];
    rng.fill(&mut content[..]);
    std::fs::write(path, &content).unwrap();
    run_ok("blockdev", &["--flushbufs", path.to_str().unwrap()]);
}

/// One after the other, synced; what fails is tried again until it is done. So all that it wrote is known.
struct Writer {
    over: Arc<AtomicBool>,
    thread: JoinHandle<(Vec<u8>, u64)>,
}

impl Writer {
    fn start(path: PathBuf, mut image: Vec<u8>, seed: u64, pause: Duration) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let stop = over.clone();
        let thread = std::thread::spawn(move || {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut number = 0u64;
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                let at = rng.random_range(0..image.len() / PIECE) * PIECE;
                let bytes = match rng.random_range(0..5) {
                    0 => Aligned::new(PIECE, 0),
                    _ => pattern(seed.wrapping_mul(1 << 20) + number),
                };
                let begin = Instant::now();
                let flags = nix::libc::O_DIRECT | nix::libc::O_SYNC;
                let write = || {
                    let file = OpenOptions::new().write(true).custom_flags(flags).open(&path)?;
                    file.write_all_at(&bytes, at as u64)
                };
                while let Err(error) = write() {
                    assert!(begin.elapsed() < LIMIT, "no write for {LIMIT:?}: {error}");
                    std::thread::sleep(Duration::from_millis(20));
                }
                image[at..at + PIECE].copy_from_slice(&bytes);
                std::thread::sleep(pause);
            }
            (image, number)
        });
        Self { over, thread }
    }

    /// What the volume holds, and how many writes that took.
    fn stop(self) -> (Vec<u8>, u64) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

#[track_caller]
fn assert_image(path: &Path, image: &[u8], what: &str) {
    let expected = Scratch::disk();
    let file = expected.join("expected");
    std::fs::write(&file, image).unwrap();
    if let Err(difference) = compare_devices(path, &file) {
        panic!("{what}: {} is not what was written: {difference}", path.display());
    }
}

fn image_of(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[track_caller]
fn take_over(pair: &Pair) {
    pair.recovery.varve(&["failover", "g", "--yes"]).ok();
    pair.recovery.varve(&["failover", "commit", "g", "--yes"]).ok();
}

/// At home, nothing was compared by an ordinary session, and what is written now arrives.
#[track_caller]
fn assert_at_home(pair: &Pair, volumes: &[&Path], replicas: &[PathBuf], from: usize) {
    let protected = |status: &Value| status["role"] == "source" && status["data"] == "protected";
    wait_until(LIMIT, "protected at home", || pair.production.group("g").as_ref().is_some_and(protected));
    for volume in volumes {
        let flags = nix::libc::O_DIRECT | nix::libc::O_SYNC;
        let file = OpenOptions::new().write(true).custom_flags(flags).open(volume).unwrap();
        file.write_all_at(&pattern(0x1234_5678), 3 * PIECE as u64).unwrap();
    }
    pair.wait_applied("g", LIMIT);
    for (volume, replica) in volumes.iter().zip(replicas) {
        assert_same(volume, replica);
    }
    let status = pair.production.group("g").unwrap();
    let count = |name: &str| status["counters"][name].as_u64().unwrap();
    assert_eq!(count("image_bytes") + count("probes"), 0, "{status:#}");
    let log = pair.production.log(Role::Agent);
    let bad: Vec<&str> = log[from..].lines().filter(|line| line.contains("resumed=false")).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    assert_eq!(role(&pair.recovery), "replica");
}

#[test]
fn home_again_under_load_and_back_and_home_again() {
    require_root();
    let seed = Seed::new();
    let mut rng = seed.rng();
    let scratch = Scratch::disk();
    let (a, b) = (LoopDevice::new(&scratch, "a", 96 << 20), LoopDevice::new(&scratch, "b", (24 << 20) + 512 * 3));
    fill(a.path(), &mut rng, 96 << 20);
    let pair = Pair::new();
    let replicas = pair.protect("g", &[a.path(), b.path()]);
    pair.wait_protected("g", LIMIT);
    fill(b.path(), &mut rng, 1 << 20);
    pair.production.varve(&["bookmark", "g", "before"]).ok();
    pair.wait_applied("g", LIMIT);
    let before = digest_device(a.path());
    let mut bookmarked = Vec::new();
    for round in 0..2u64 {
        take_over(&pair);
        // What the old source writes now is its own branch.
        let branch = OpenOptions::new().write(true).custom_flags(nix::libc::O_DIRECT).open(a.path()).unwrap();
        for number in 0..8 {
            branch.write_all_at(&pattern(u64::MAX - number), (64 << 20) + number * PIECE as u64).unwrap();
        }
        drop(branch);
        if round == 0 {
            let look = pair.recovery.varve(&["failback", "g", "--dry-run", "--json"]).ok().json_lines().pop().unwrap();
            assert_eq!(look["only_there_bytes"], 8 * PIECE, "{look:#}");
            assert!(look["captured_there_bytes"].as_u64().unwrap() >= 8 * PIECE as u64, "{look:#}");
            assert_eq!(role(&pair.production), "fenced");
        }
        let writer = Writer::start(promoted(&pair, 0), image_of(&promoted(&pair, 0)), rng.random(), Duration::ZERO);
        let small =
            Writer::start(promoted(&pair, 1), image_of(&promoted(&pair, 1)), rng.random(), Duration::from_millis(7));
        let done = pair.recovery.varve(&["failback", "g", "--yes", "--json"]).ok().json_lines().pop().unwrap();
        assert!(done["lag_seconds"].as_f64().unwrap() < 5.0, "{done:#}");
        std::thread::sleep(Duration::from_secs(2));
        let status = takeover(&pair);
        assert_eq!(status["failback"]["phase"], "following", "{status:#}");
        let ((image, writes), (image_b, _)) = (writer.stop(), small.stop());
        let from = pair.production.log(Role::Agent).len();
        let quick: &[&str] = if round == 0 { &[] } else { &["--quick"] };
        let args = [&["failback", "g", "--cut-over", "--yes", "--json"], quick].concat();
        let home = pair.recovery.varve(&args).ok().json_lines().pop().unwrap();
        eprintln!("{writes} writes, pause {} s, sent {} B at the barrier", home["pause_seconds"], home["sent_bytes"]);
        assert!(home["pause_seconds"].as_f64().unwrap() < 5.0 && home["home"] == true, "{home:#}");
        assert_eq!(home["epoch"], 3 + 2 * round);
        assert_image(a.path(), &image, "volume a");
        assert_image(b.path(), &image_b, "volume b");
        assert_at_home(&pair, &[a.path(), b.path()], &replicas, from);
        bookmarked.push((format!("home{round}"), digest_device(a.path())));
        pair.production.varve(&["bookmark", "g", &format!("home{round}")]).ok();
        pair.wait_applied("g", LIMIT);
    }
    // The whole past is there.
    bookmarked.push(("before".to_owned(), before));
    for (name, digest) in bookmarked {
        let view =
            pair.recovery.varve(&["view", "open", "g", "--at", &format!("bookmark:{name}"), "--json"]).ok().json();
        let device = PathBuf::from(view["volumes"][0]["device"].as_str().unwrap());
        assert_eq!(digest_device(&device), digest, "{name}");
        pair.recovery.varve(&["view", "close", &view["id"].to_string()]).ok();
    }
    // The agent knows the epoch after a restart.
    let mut pair = pair;
    let from = pair.production.log(Role::Agent).len();
    pair.production.restart(Role::Agent);
    assert_at_home(&pair, &[a.path(), b.path()], &replicas, from);
}

/// Kills either daemon in the passes, in the comparison, in the cut-over.
#[test]
fn killed_at_random_moments_it_comes_home_with_everything() {
    require_root();
    let seed = Seed::new();
    let mut rng = seed.rng();
    eprintln!("seed {}", seed.number());
    let rounds: u32 = std::env::var("VARVE_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(4);
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 48 << 20);
    let mut pair = Pair::new();
    let replicas = pair.protect("g", &[device.path()]);
    pair.wait_protected("g", LIMIT);
    for round in 0..rounds {
        take_over(&pair);
        if rng.random_bool(0.5) {
            fill(device.path(), &mut rng, 48 << 20);
        }
        let writer =
            Writer::start(promoted(&pair, 0), image_of(&promoted(&pair, 0)), rng.random(), Duration::from_millis(2));
        let kill = |pair: &mut Pair, rng: &mut StdRng| {
            let receiver = rng.random_bool(0.5);
            let (install, role) = match receiver {
                true => (&mut pair.recovery, Role::Receiver),
                false => (&mut pair.production, Role::Agent),
            };
            install.kill(role);
            std::thread::sleep(Duration::from_millis(rng.random_range(0..300)));
            install.start(role);
        };
        wait_until(LIMIT, "called home", || start_failback(&pair));
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(rng.random_range(0..1500)));
            kill(&mut pair, &mut rng);
        }
        wait_following(&pair);
        let (image, writes) = writer.stop();
        let from = pair.production.log(Role::Agent).len();
        // The cut-over, killed somewhere; if it runs here still, again.
        let begin = Instant::now();
        let mut tries = 0;
        while role(&pair.recovery) != "replica" {
            assert!(begin.elapsed() < LIMIT, "{:#?}\n{:#?}", pair.recovery.group("g"), pair.production.group("g"));
            if !following(&pair) {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
            tries += 1;
            let order = cut_over_in_the_background(&pair);
            if tries < 3 {
                std::thread::sleep(Duration::from_millis(rng.random_range(0..500)));
                kill(&mut pair, &mut rng);
            }
            let _ = order.join();
        }
        eprintln!("round {round}: {writes} writes, home after {tries} tries");
        let at_home = |status: &Value| status["role"] == "source" && status["data"] == "protected";
        wait_until(LIMIT, "protected at home", || pair.production.group("g").as_ref().is_some_and(at_home));
        assert_image(device.path(), &image, "the volume at home");
        assert_at_home(&pair, &[device.path()], &replicas, from);
    }
    pair.recovery.varve(&["scrub", "g"]).ok();
}

fn start_failback(pair: &Pair) -> bool {
    // It goes on by itself: the answer is not waited for.
    let (root, program) = (pair.recovery.root().to_owned(), varve());
    std::thread::spawn(move || {
        let args = ["failback", "g", "--yes"];
        std::process::Command::new(program).args(args).env("VARVE_ROOT", root).output().unwrap()
    });
    std::thread::sleep(Duration::from_millis(300));
    !takeover(pair)["failback"].is_null()
}

fn cut_over_in_the_background(pair: &Pair) -> JoinHandle<std::process::Output> {
    in_the_background(pair, &["failback", "g", "--cut-over", "--yes"])
}

fn in_the_background(pair: &Pair, args: &'static [&str]) -> JoinHandle<std::process::Output> {
    let (root, program) = (pair.recovery.root().to_owned(), varve());
    std::thread::spawn(move || std::process::Command::new(program).args(args).env("VARVE_ROOT", root).output().unwrap())
}

fn varve() -> PathBuf {
    match std::env::var_os("VARVE_BIN_DIR") {
        Some(dir) => PathBuf::from(dir).join("varve"),
        None => std::env::current_exe().unwrap().parent().and_then(Path::parent).unwrap().join("varve"),
    }
}

fn following(pair: &Pair) -> bool {
    takeover(pair)["failback"]["phase"] == "following"
}

#[track_caller]
fn wait_following(pair: &Pair) {
    let start = Instant::now();
    while !following(pair) {
        assert!(start.elapsed() < LIMIT, "{:#?}\n{:#?}", pair.recovery.group("g"), pair.production.group("g"));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The agent opens another stream after the cut-over has begun: that one has the order, and the status is of it.
#[test]
fn an_agent_that_comes_again_in_the_cut_over_gets_the_group() {
    require_root();
    let seed = Seed::new();
    let mut rng = seed.rng();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 16 << 20);
    let mut pair = Pair::new();
    let replicas = pair.protect("g", &[device.path()]);
    pair.wait_protected("g", LIMIT);
    let held = scratch.path().join("held");
    pair.recovery.set_env("VARVE_HOLD", &format!("home-held:{}", held.display()));
    pair.recovery.restart(Role::Receiver);
    take_over(&pair);
    fill(&promoted(&pair, 0), &mut rng, 16 << 20);
    let image = image_of(&promoted(&pair, 0));
    pair.recovery.varve(&["failback", "g", "--yes"]).ok();
    std::fs::write(&held, "").unwrap();
    let order = cut_over_in_the_background(&pair);
    wait_until(LIMIT, "the devices are away", || !promoted(&pair, 0).is_symlink());
    let streams = |pair: &Pair| pair.recovery.log(Role::Receiver).matches("coming home: stream open").count();
    let before = streams(&pair);
    pair.production.kill(Role::Agent);
    pair.production.start(Role::Agent);
    wait_until(LIMIT, "another stream", || streams(&pair) > before && following(&pair));
    let from = pair.production.log(Role::Agent).len();
    std::fs::remove_file(&held).unwrap();
    let done = order.join().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_image(device.path(), &image, "the volume at home");
    assert_at_home(&pair, &[device.path()], &replicas, from);
}

/// A group that runs on the recovery host, with content of its own, and a receiver that waits at a place.
fn held_bed(scratch: &Scratch, device: &LoopDevice, place: &str) -> (Pair, Vec<PathBuf>, PathBuf) {
    let mut pair = Pair::new();
    let replicas = pair.protect("g", &[device.path()]);
    pair.wait_protected("g", LIMIT);
    let held = scratch.path().join("held");
    pair.recovery.set_env("VARVE_HOLD", &format!("{place}:{}", held.display()));
    pair.recovery.restart(Role::Receiver);
    take_over(&pair);
    fill(&promoted(&pair, 0), &mut Seed::new().rng(), 16 << 20);
    (pair, replicas, held)
}

/// Whoever gives up the return is told that the group stays, so it stays; and what was begun to be overwritten is no branch.
#[test]
fn given_up_in_a_pass() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 16 << 20);
    let (pair, _, held) = held_bed(&scratch, &device, "home-pass-held");
    let before = digest_device(device.path());
    std::fs::write(&held, "").unwrap();
    let call = in_the_background(&pair, &["failback", "g", "--yes"]);
    wait_until(LIMIT, "it is being compared", || takeover(&pair)["failback"]["phase"] == "comparing");
    let comparing = |status: &Value| status["resync"].is_object();
    wait_until(LIMIT, "the agent has its volume", || pair.production.group("g").as_ref().is_some_and(comparing));
    pair.recovery.varve(&["failback", "g", "--stop", "--yes"]).ok();
    std::fs::remove_file(&held).unwrap();
    assert!(!call.join().unwrap().status.success());
    let log = || pair.recovery.log(Role::Receiver);
    wait_until(LIMIT, "the stream ends", || log().contains("stream ended") && log().contains("given up meanwhile"));
    assert_eq!(digest_device(device.path()), before, "nothing was overwritten");
    let branch = pair.recovery.varve(&["failback", "g", "--keep-branch", "old", "--yes"]).expect_code(3);
    assert!(branch.stderr.contains("not whole"), "{branch:?}");
    assert_eq!(role(&pair.recovery), "promoted");
    pair.recovery.varve(&["failback", "g", "--yes"]).ok();
}

#[test]
fn given_up_in_the_cut_over() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 16 << 20);
    let (pair, _, held) = held_bed(&scratch, &device, "home-armed");
    let image = image_of(&promoted(&pair, 0));
    pair.recovery.varve(&["failback", "g", "--yes"]).ok();
    std::fs::write(&held, "").unwrap();
    let order = cut_over_in_the_background(&pair);
    wait_until(LIMIT, "the devices are away", || !promoted(&pair, 0).is_symlink());
    pair.recovery.varve(&["failback", "g", "--stop", "--yes"]).ok();
    std::fs::remove_file(&held).unwrap();
    let refused = order.join().unwrap();
    assert!(!refused.status.success(), "it was told that it stays");
    wait_until(LIMIT, "served again", || promoted(&pair, 0).is_symlink());
    assert_eq!(role(&pair.recovery), "promoted");
    assert_image(&promoted(&pair, 0), &image, "what runs here");
}

/// Whether the group was given back is not known, since its file cannot be written: nobody serves it until a start has read it.
#[test]
fn a_cut_over_that_cannot_be_written_down_serves_nothing() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 16 << 20);
    let (mut pair, _, held) = held_bed(&scratch, &device, "home-armed");
    let image = image_of(&promoted(&pair, 0));
    pair.recovery.varve(&["failback", "g", "--yes"]).ok();
    std::fs::write(&held, "").unwrap();
    let order = cut_over_in_the_background(&pair);
    wait_until(LIMIT, "all but the last word", || pair.recovery.log(Role::Receiver).contains("waits here on request"));
    let files = pair.recovery.root().join("var/lib/varve/receiver/groups/g");
    // Longer than the receiver waits between two looks at what is missing: one of them waits for the desk now.
    std::thread::sleep(Duration::from_secs(2));
    // No file can be made there any more; those that are there can be written.
    let immutable = Immutable::new(&files);
    std::fs::remove_file(&held).unwrap();
    let failed = order.join().unwrap();
    let text = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(failed.status.code() == Some(1) && text.contains("restart it"), "{text}");
    // And longer than the next looks take.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        assert!(!promoted(&pair, 0).is_symlink(), "it is served");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(pair.recovery.group("g").unwrap()["authority"]["unsure"], true);
    drop(immutable);
    pair.recovery.restart(Role::Receiver);
    wait_until(LIMIT, "served again", || promoted(&pair, 0).is_symlink());
    assert_image(&promoted(&pair, 0), &image, "what runs here");
}

/// Nothing can be made or renamed in a directory, as on a disk that takes no more.
struct Immutable<'a>(&'a Path);

impl<'a> Immutable<'a> {
    fn new(dir: &'a Path) -> Self {
        run_ok("chattr", &["+i", dir.to_str().unwrap()]);
        Self(dir)
    }
}

impl Drop for Immutable<'_> {
    fn drop(&mut self) {
        run_ok("chattr", &["-i", self.0.to_str().unwrap()]);
    }
}

/// The agent that was given the group never heard of it, and a takeover came and went: it comes home all the same.
#[test]
fn given_back_and_taken_over_before_it_was_heard() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 16 << 20);
    let (mut pair, replicas, held) = held_bed(&scratch, &device, "home-armed");
    let image = image_of(&promoted(&pair, 0));
    pair.recovery.varve(&["failback", "g", "--yes"]).ok();
    std::fs::write(&held, "").unwrap();
    let order = cut_over_in_the_background(&pair);
    wait_until(LIMIT, "all but the last word", || pair.recovery.log(Role::Receiver).contains("waits here on request"));
    pair.production.kill(Role::Agent);
    std::fs::remove_file(&held).unwrap();
    let done = order.join().unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(
        done.status.success() && text.contains("did not answer"),
        "{text}\n{}",
        String::from_utf8_lossy(&done.stderr)
    );
    pair.recovery.varve(&["failover", "g", "--yes"]).ok();
    pair.recovery.varve(&["failover", "abort", "g", "--yes"]).ok();
    let from = pair.production.log(Role::Agent).len();
    pair.production.start(Role::Agent);
    let at_home = |status: &Value| status["role"] == "source" && status["data"] == "protected";
    wait_until(LIMIT, "protected at home", || pair.production.group("g").as_ref().is_some_and(at_home));
    assert_image(device.path(), &image, "the volume at home");
    assert_at_home(&pair, &[device.path()], &replicas, from);
}

/// Each durable step of giving it back, once.
#[test]
fn each_step_of_the_cut_over_killed_once() {
    require_root();
    let seed = Seed::new();
    let mut rng = seed.rng();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 32 << 20);
    let mut pair = Pair::new();
    let replicas = pair.protect("g", &[device.path()]);
    pair.wait_protected("g", LIMIT);
    for (point, given) in [("home-armed", false), ("home-given", true), ("home-begun", true)] {
        eprintln!("{point}");
        take_over(&pair);
        fill(&promoted(&pair, 0), &mut rng, 32 << 20);
        // The failpoint is armed at the start.
        pair.recovery.set_env("VARVE_FAILPOINT", point);
        pair.recovery.restart(Role::Receiver);
        pair.recovery.set_env("VARVE_FAILPOINT", "");
        wait_until(LIMIT, "served again", || {
            takeover(&pair)["devices"].as_array().is_some_and(|them| !them.is_empty())
        });
        let image = image_of(&promoted(&pair, 0));
        pair.recovery.varve(&["failback", "g", "--yes"]).ok();
        let from = pair.production.log(Role::Agent).len();
        pair.recovery.varve(&["failback", "g", "--cut-over", "--yes"]).expect_code(4);
        wait_until(LIMIT, "it ends there", || !pair.recovery.running(Role::Receiver));
        // Nobody writes at home before it is home.
        let busy = run(std::process::Command::new("mkfs.ext4").arg("-q").arg(device.path()));
        assert_ne!(busy.code, 0, "{point}: {}", busy.stderr);
        pair.recovery.start(Role::Receiver);
        if !given {
            wait_until(LIMIT, "served here again", || {
                takeover(&pair)["devices"].as_array().is_some_and(|them| !them.is_empty())
            });
            assert_image(&promoted(&pair, 0), &image, "here");
            assert_eq!(role(&pair.recovery), "promoted");
            wait_following(&pair);
            pair.recovery.varve(&["failback", "g", "--cut-over", "--yes"]).ok();
        }
        let at_home = |status: &Value| status["role"] == "source" && status["data"] == "protected";
        wait_until(LIMIT, "protected at home", || pair.production.group("g").as_ref().is_some_and(at_home));
        assert_image(device.path(), &image, point);
        assert_at_home(&pair, &[device.path()], &replicas, from);
    }
}

/// The old host is gone; another one with a blank disk gets the group.
#[test]
fn another_host_with_a_blank_disk_gets_it() {
    require_root();
    let seed = Seed::new();
    let mut rng = seed.rng();
    let scratch = Scratch::disk();
    let (old, blank) = (LoopDevice::new(&scratch, "old", 32 << 20), LoopDevice::new(&scratch, "blank", 32 << 20));
    let wrong = LoopDevice::new(&scratch, "wrong", 31 << 20);
    fill(old.path(), &mut rng, 32 << 20);
    let mut pair = Pair::new();
    let replicas = pair.protect("g", &[old.path()]);
    pair.wait_protected("g", LIMIT);
    pair.wait_applied("g", LIMIT);
    take_over(&pair);
    pair.production.kill(Role::Agent);
    // What it has cannot be looked at.
    for args in [&["failback", "g", "--dry-run"] as &[&str], &["failback", "g"]] {
        let unknown = pair.recovery.varve(args).expect_code(4);
        assert!(unknown.stderr.contains("did not answer within 30 s"), "{}", unknown.stderr);
    }
    let before = digest_device(old.path());
    let file =
        OpenOptions::new().write(true).custom_flags(nix::libc::O_DIRECT | nix::libc::O_SYNC).open(promoted(&pair, 0));
    file.unwrap().write_all_at(&pattern(7), 0).unwrap();
    let token = pair.recovery.varve(&["host", "invite", "spare", "--json"]).ok().json();
    let mut spare = Installation::new();
    spare.varve(&["join", &pair.address, token["token"].as_str().unwrap()]).ok();
    spare.start(Role::Agent);
    let volume = |device: &LoopDevice| device.path().to_str().unwrap().to_owned();
    let take = |device: &LoopDevice| spare.varve(&["failback", "g", "--volume", &volume(device), "--yes"]);
    // Nobody named it yet.
    let refused = take(&blank).expect_code(3);
    assert!(refused.stderr.contains("--to"), "{}", refused.stderr);
    pair.recovery.varve(&["failback", "g", "--to", "nobody", "--yes"]).expect_code(5);
    let (root, program) = (pair.recovery.root().to_owned(), varve());
    let call = std::thread::spawn(move || {
        let args = ["failback", "g", "--to", "spare", "--yes"];
        std::process::Command::new(program).args(args).env("VARVE_ROOT", root).output().unwrap()
    });
    wait_until(LIMIT, "called", || takeover(&pair)["failback"]["host"] == "spare");
    let refused = take(&wrong).expect_code(3);
    assert!(refused.stderr.contains("33554432"), "{}", refused.stderr);
    // The one of the wrong size was told to whoever called it.
    call.join().unwrap();
    let look = ["failback", "g", "--volume", &volume(&blank), "--dry-run", "--json"];
    let look = spare.varve(&look).ok().json();
    assert!(look["dry_run"] == true && look["volumes"][0]["bytes"].is_number(), "{look:#}");
    take(&blank).ok();
    wait_following(&pair);
    let image = image_of(&promoted(&pair, 0));
    pair.recovery.varve(&["failback", "g", "--cut-over", "--yes"]).ok();
    let at_home = |status: &Value| status["role"] == "source" && status["data"] == "protected";
    wait_until(LIMIT, "protected at its new home", || spare.group("g").as_ref().is_some_and(at_home));
    assert_image(blank.path(), &image, "the new volume");
    // The old host comes back: refused, and its volume is as it was.
    pair.production.start(Role::Agent);
    let refused = |status: Value| status["link"] == "refused";
    wait_until(LIMIT, "the old host is refused", || pair.production.group("g").is_some_and(refused));
    assert_eq!(digest_device(old.path()), before);
    let pair = Pair { production: spare, recovery: pair.recovery, address: pair.address };
    assert_at_home(&pair, &[blank.path()], &replicas, 0);
}

/// The host was booted while the group comes home, and the names of two disks were swapped: the other one is not overwritten.
#[test]
fn another_disk_under_the_name_of_ours_is_not_overwritten() {
    require_root();
    let scratch = Scratch::disk();
    let (mine, other) = (LoopDevice::new(&scratch, "mine", 16 << 20), LoopDevice::new(&scratch, "other", 16 << 20));
    std::fs::write(other.path(), vec![9; 16 << 20]).unwrap();
    let link = scratch.join("disk");
    let name = |device: &LoopDevice| {
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(device.path(), &link).unwrap();
    };
    name(&mine);
    let mut pair = Pair::new();
    pair.protect("g", &[&link]);
    pair.wait_protected("g", LIMIT);
    take_over(&pair);
    pair.recovery.varve(&["failback", "g", "--yes"]).ok();
    wait_following(&pair);
    let before = digest_device(other.path());
    pair.production.stop(Role::Agent);
    name(&other);
    pair.production.start(Role::Agent);
    wait_until(LIMIT, "the other disk is refused", || {
        let status = pair.production.group("g").unwrap();
        status["reason"].as_str().is_some_and(|why| why.contains("another disk than the one protected"))
    });
    assert_eq!(digest_device(other.path()), before);
    name(&mine);
    wait_following(&pair);
    pair.recovery.varve(&["failback", "g", "--cut-over", "--yes"]).ok();
    pair.wait_protected("g", LIMIT);
    assert_eq!(digest_device(other.path()), before);
}

#[test]
fn wrong_orders_are_refused_with_words() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 32 << 20);
    let mount = Mount::format(&scratch, "mnt", Filesystem::Ext4, device.path());
    let pair = Pair::new();
    pair.protect("g", &[device.path()]);
    pair.wait_protected("g", LIMIT);
    let refused = |args: &[&str], code: i32, word: &str| {
        let output = pair.recovery.varve(args).expect_code(code);
        assert!(output.stderr.contains(word), "{args:?}: no '{word}' in:\n{}", output.stderr);
    };
    refused(&["failback", "g", "--yes"], 3, "does not run here");
    refused(&["failback", "none", "--yes"], 5, "none");
    refused(&["failback", "g", "--cut-over", "--yes"], 3, "does not run here");
    pair.recovery.varve(&["failover", "g", "--yes"]).ok();
    refused(&["failback", "g", "--yes"], 3, "commit");
    pair.recovery.varve(&["failover", "commit", "g", "--yes"]).ok();
    refused(&["failback", "g"], 3, "--yes");
    refused(&["failback", "g", "--cut-over", "--yes"], 3, "varve failback g");
    refused(&["failback", "g", "--stop", "--yes"], 3, "not called home");
    // Mounted at home: nothing is touched.
    std::fs::write(mount.path().join("mine"), "branch").unwrap();
    mount.sync();
    refused(&["failback", "g", "--yes"], 3, "mounted");
    assert_eq!(takeover(&pair)["failback"]["phase"], "blocked");
    refused(&["failback", "g", "--cut-over", "--yes"], 3, "mounted");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(std::fs::read_to_string(mount.path().join("mine")).unwrap(), "branch");
    assert_eq!(role(&pair.production), "fenced");
    pair.recovery.varve(&["failback", "g", "--stop", "--yes"]).ok();
    mount.unmount();
    std::thread::sleep(Duration::from_secs(3));
    let copy = Mount::existing(&scratch, "look", device.path(), "ro,noload");
    assert_eq!(std::fs::read_to_string(copy.path().join("mine")).unwrap(), "branch", "it can be looked at");
    copy.unmount();
    // Open in a program that claims nothing.
    let mut program =
        std::process::Command::new("sh").args(["-c", "exec sleep 600 3<>$0"]).arg(device.path()).spawn().unwrap();
    wait_until(LIMIT, "it has the volume open", || {
        std::fs::read_link(format!("/proc/{}/fd/3", program.id())).is_ok_and(|path| path == device.path())
    });
    refused(&["failback", "g", "--yes"], 3, "open for writing: sleep");
    pair.recovery.varve(&["failback", "g", "--stop", "--yes"]).ok();
    program.kill().unwrap();
    program.wait().unwrap();
    // And then it comes home, but not while it is in use here.
    pair.recovery.varve(&["failback", "g", "--yes"]).ok();
    let here = Mount::existing(&scratch, "here", &promoted(&pair, 0), "rw");
    refused(&["failback", "g", "--cut-over", "--yes"], 3, "mounted");
    std::fs::write(here.path().join("theirs"), "kept").unwrap();
    here.unmount();
    pair.recovery.varve(&["failback", "g", "--cut-over", "--yes"]).ok();
    let copy = Mount::existing(&scratch, "home", device.path(), "rw");
    assert_eq!(std::fs::read_to_string(copy.path().join("theirs")).unwrap(), "kept");
    assert!(!copy.path().join("mine").exists());
    refused(&["failback", "g", "--cut-over", "--yes"], 3, "does not run here");
}
