//! The journal: an outage of the receiver, longer than the ring lasts, leaves no hole in the timeline.
//!
//! The judge of what a point must hold is the volume itself: it is frozen, a bookmark is set, its bytes are digested.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use nix::sys::signal::Signal;
use rand::Rng;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(90);
const GROUP: &str = "spill";
const SMALL_RING: &str = "ring_mib = 32\njournal_max_mib = 1024\n";

struct Host {
    mount: Mount,
    device: LoopDevice,
    scratch: Scratch,
}

impl Host {
    fn new() -> Self {
        require_root();
        let scratch = Scratch::disk();
        let device = LoopDevice::new(&scratch, "volume", 192 << 20);
        let mount = Mount::format(&scratch, "mnt", Filesystem::Ext4, device.path());
        // Laid out beforehand: a load is a steady stream, not a burst.
        std::fs::write(mount.path().join("load"), vec![1; 96 << 20]).unwrap();
        mount.sync();
        Self { scratch, device, mount }
    }

    /// A steady stream of about so many bytes a second that makes up for no pause.
    fn load(&self, rate: u64) -> FioRun {
        Fio::new(&self.mount.path().join("load"))
            .option("size=96m")
            .option("fsync=64")
            .block("4k-124k")
            .option(&format!("thinktime={}", 64_000 * 1_000_000 / rate))
            .seconds(120)
            .start(&self.scratch)
    }

    /// The volume's digest at a bookmark.
    fn moment(&self, pair: &Pair, name: &str) -> String {
        self.mount.frozen(|| {
            pair.production.varve(&["bookmark", GROUP, name]).ok();
            digest_device(self.device.path())
        })
    }
}

fn protect(pair: &Pair, host: &Host) -> PathBuf {
    let replicas = pair.protect(GROUP, &[host.device.path()]);
    pair.wait_protected(GROUP, LIMIT);
    replicas[0].clone()
}

#[track_caller]
fn status(pair: &Pair) -> Value {
    pair.production.group(GROUP).expect("the agent knows the group")
}

#[track_caller]
fn counter(pair: &Pair, name: &str) -> u64 {
    status(pair)["counters"][name].as_u64().unwrap_or_else(|| panic!("no counter {name}"))
}

fn journal_used(pair: &Pair) -> u64 {
    status(pair)["journal"]["used_bytes"].as_u64().unwrap_or(u64::MAX)
}

#[track_caller]
fn wait_spilled(pair: &Pair, bytes: u64) {
    wait_until(LIMIT, "the journal takes over", || journal_used(pair).wrapping_add(1) > bytes);
}

/// Bytes of the files of the journal of the group.
fn on_disk(pair: &Pair) -> u64 {
    let dir = pair.production.root().join("var/lib/varve/agent/journal").join(GROUP);
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files.map(|file| file.metadata().map_or(0, |meta| meta.len())).sum()
}

/// A view at a bookmark equals what the volume was.
#[track_caller]
fn assert_view(pair: &Pair, name: &str, digest: &str) {
    let at = format!("bookmark:{name}");
    let reply = pair.recovery.varve(&["view", "open", GROUP, "--at", &at, "--json"]).ok().json();
    let device: PathBuf = reply["volumes"][0]["device"].as_str().expect("a device").into();
    let found = digest_device(&device);
    pair.recovery.varve(&["view", "close", &reply["id"].to_string()]).ok();
    assert_eq!(found, digest, "the view at {name}");
}

fn assert_whole(pair: &Pair, host: &Host, replica: &Path) {
    pair.wait_protected(GROUP, LIMIT);
    host.mount.frozen(|| {
        pair.wait_applied(GROUP, LIMIT);
        assert_same(host.device.path(), replica);
    });
}

fn gaps_at_receiver(pair: &Pair) -> Vec<Value> {
    let group = pair.recovery.group(GROUP).expect("the receiver knows the group");
    group["gaps"].as_array().cloned().unwrap_or_default()
}

/// Longer than the ring lasts, with the receiver dead, and the agent killed inside: no gap, no image, and points inside.
#[test]
fn an_outage_is_as_if_it_had_not_been() {
    let host = Host::new();
    let mut pair = Pair::with_agent_config(SMALL_RING);
    let replica = protect(&pair, &host);
    let load = host.load(20 << 20);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(counter(&pair, "journal_disk_bytes"), 0, "nothing is written while the link keeps up");
    assert_eq!(on_disk(&pair), 0);
    let gaps = gaps_at_receiver(&pair).len();
    pair.recovery.kill(Role::Receiver);
    wait_spilled(&pair, 32 << 20);
    let first = host.moment(&pair, "inside");
    wait_spilled(&pair, 64 << 20);
    let spent = (counter(&pair, "journal_bytes"), counter(&pair, "journal_disk_bytes"));
    assert!(spent.1 * 100 <= spent.0 * 105, "at most 1.05 bytes on disk for a byte of the stream: {spent:?}");
    pair.production.kill(Role::Agent);
    pair.production.start(Role::Agent);
    wait_until(LIMIT, "the journal is found again", || {
        status(&pair)["journal"]["used_bytes"].as_u64() >= Some(64 << 20)
    });
    let second = host.moment(&pair, "after-the-kill");
    wait_spilled(&pair, 128 << 20);
    assert!(
        status(&pair)["rpo_seconds"].as_f64().is_none_or(|rpo| rpo > 3.0),
        "journaled bytes count: {:#}",
        status(&pair)
    );
    pair.recovery.start(Role::Receiver);
    let began = Instant::now();
    wait_until(LIMIT, "the journal is drained", || journal_used(&pair) == 0);
    println!("drained in {:?}", began.elapsed());
    load.stop();
    assert_whole(&pair, &host, &replica);
    assert_eq!(counter(&pair, "image_bytes"), 0, "nothing was read from the volume");
    assert_eq!(status(&pair)["gaps"].as_array().map_or(0, Vec::len), 0, "{:#}", status(&pair));
    assert_eq!(gaps_at_receiver(&pair).len(), gaps, "{:#?}", gaps_at_receiver(&pair));
    assert_view(&pair, "inside", &first);
    assert_view(&pair, "after-the-kill", &second);
    wait_until(LIMIT, "the space goes back", || on_disk(&pair) <= 128 << 20);
    let log = pair.production.unexpected(
        Role::Agent,
        &["connection", "session ended", "receiver", "completions went unseen", "notify", "journal-filling"],
    );
    assert!(log.is_empty(), "{log:#?}");
}

/// A receiver that hangs: the connection stands, nothing is taken.
#[test]
fn a_receiver_that_hangs_makes_no_gap() {
    let host = Host::new();
    let mut pair = Pair::with_agent_config(SMALL_RING);
    let replica = protect(&pair, &host);
    let images = counter(&pair, "image_bytes");
    let load = host.load(30 << 20);
    pair.recovery.signal(Role::Receiver, Signal::SIGSTOP);
    wait_spilled(&pair, 48 << 20);
    let inside = host.moment(&pair, "inside");
    wait_spilled(&pair, 96 << 20);
    pair.recovery.signal(Role::Receiver, Signal::SIGCONT);
    wait_until(LIMIT, "the journal is drained", || journal_used(&pair) == 0);
    load.stop();
    assert_whole(&pair, &host, &replica);
    assert_eq!((counter(&pair, "dropped_records"), counter(&pair, "image_bytes")), (0, images));
    assert_view(&pair, "inside", &inside);
}

/// The host is started anew while the receiver is away: the ring is gone, its bytes are not.
#[test]
fn points_outlive_the_ring() {
    let host = Host::new();
    let mut pair = Pair::with_agent_config(SMALL_RING);
    let replica = protect(&pair, &host);
    let load = host.load(20 << 20);
    std::thread::sleep(Duration::from_secs(1));
    pair.recovery.kill(Role::Receiver);
    wait_spilled(&pair, 24 << 20);
    let inside = host.moment(&pair, "inside");
    load.stop();
    let last = host.moment(&pair, "last");
    pair.production.stop(Role::Agent);
    // As a reboot does: nothing of the capture is left.
    let unpinned = std::process::Command::new(
        std::env::var_os("VARVE_BIN_DIR")
            .map_or_else(
                || std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned(),
                std::path::PathBuf::from,
            )
            .join("varve-agent"),
    )
    .arg("--unpin-all")
    .env("VARVE_ROOT", pair.production.root())
    .status()
    .unwrap();
    assert!(unpinned.success());
    std::fs::write(host.mount.path().join("unseen"), vec![9; 3 << 20]).unwrap();
    host.mount.sync();
    pair.production.start(Role::Agent);
    pair.recovery.start(Role::Receiver);
    pair.wait_protected(GROUP, LIMIT);
    assert_whole(&pair, &host, &replica);
    assert_eq!(journal_used(&pair), 0);
    assert_view(&pair, "inside", &inside);
    assert_view(&pair, "last", &last);
    assert_eq!(status(&pair)["gaps"].as_array().map_or(0, Vec::len), 1, "what nobody saw: {:#}", status(&pair));
}

/// The journal is full, then the ring: a gap with its reason, the points before it stay, and all is well in the end.
#[test]
fn a_full_journal_is_a_gap_and_what_came_before_is_kept() {
    let host = Host::new();
    let mut pair = Pair::with_agent_config("ring_mib = 16\njournal_max_mib = 64\n");
    let replica = protect(&pair, &host);
    let load = host.load(20 << 20);
    pair.recovery.kill(Role::Receiver);
    wait_spilled(&pair, 16 << 20);
    let inside = host.moment(&pair, "inside");
    wait_until(LIMIT, "a gap begins", || status(&pair)["gap_reason"] == "ring-full");
    assert!(on_disk(&pair) <= 64 << 20);
    pair.production.varve(&["bookmark", GROUP, "too-late"]).expect_code(3);
    pair.recovery.start(Role::Receiver);
    load.stop();
    assert_whole(&pair, &host, &replica);
    assert_view(&pair, "inside", &inside);
}

/// Killed at any moment of an outage, again and again, with and without the receiver: no gap, no image.
#[test]
fn kills_at_any_moment_lose_nothing() {
    let seed = Seed::new();
    let mut rng = seed.rng();
    let host = Host::new();
    let mut pair = Pair::with_agent_config("ring_mib = 64\njournal_max_mib = 1024\n");
    let replica = protect(&pair, &host);
    let mut load = host.load(20 << 20);
    let mut digests = Vec::new();
    for round in 0..3 {
        pair.recovery.kill(Role::Receiver);
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(rng.random_range(50..1500)));
            pair.production.kill(Role::Agent);
            std::thread::sleep(Duration::from_millis(rng.random_range(0..150)));
            // The ring holds what comes in for 3 s; on a busy machine the start of a process takes longer.
            load.held(|| pair.production.start(Role::Agent));
        }
        let name = format!("round-{round}");
        digests.push((host.moment(&pair, &name), name));
        pair.recovery.start(Role::Receiver);
        // While it drains.
        std::thread::sleep(Duration::from_millis(rng.random_range(50..900)));
        pair.production.kill(Role::Agent);
        load.held(|| pair.production.start(Role::Agent));
        wait_until(LIMIT, "the journal is drained", || journal_used(&pair) == 0);
    }
    load.stop();
    assert_whole(&pair, &host, &replica);
    for (digest, name) in &digests {
        assert_view(&pair, name, digest);
    }
    assert_eq!((counter(&pair, "dropped_records"), counter(&pair, "image_bytes")), (0, 0));
    assert_eq!(status(&pair)["gaps"].as_array().map_or(0, Vec::len), 0, "{:#}", status(&pair));
}

/// A backlog of many rings is shipped faster than new writes come in.
#[test]
fn catching_up_is_faster_than_what_comes_in() {
    const ARRIVAL: u64 = 20 << 20;
    let host = Host::new();
    let mut pair = Pair::with_agent_config("ring_mib = 32\njournal_max_mib = 2048\n");
    let replica = protect(&pair, &host);
    let images = counter(&pair, "image_bytes");
    pair.recovery.kill(Role::Receiver);
    let fast = host.load(150 << 20);
    wait_spilled(&pair, 600 << 20);
    fast.stop();
    let load = host.load(ARRIVAL);
    std::thread::sleep(Duration::from_secs(1));
    pair.recovery.start(Role::Receiver);
    let lag = || status(&pair)["lag_bytes"].as_u64().unwrap();
    let rpo = || status(&pair)["rpo_seconds"].as_f64().unwrap_or(f64::MAX);
    wait_until(LIMIT, "it streams", || status(&pair)["link"] == "streaming");
    let (began, backlog, mut oldest, mut rises) = (Instant::now(), lag(), rpo(), 0);
    while lag() > 64 << 20 {
        std::thread::sleep(Duration::from_millis(250));
        let now = rpo();
        rises += u32::from(now > oldest + 0.3);
        oldest = now;
        assert!(began.elapsed() < LIMIT);
    }
    // What came in meanwhile was shipped, too.
    let seconds = began.elapsed().as_secs_f64();
    let shipped = (backlog - lag()) as f64 / seconds + ARRIVAL as f64;
    println!("{} MiB of backlog at {:.0} MB/s, RPO rose {rises} times", backlog >> 20, shipped / 1e6);
    load.stop();
    assert_whole(&pair, &host, &replica);
    assert_eq!(counter(&pair, "image_bytes"), images);
    // How fast is what the bench `backlog` shows.
    assert!(shipped >= 1.5 * ARRIVAL as f64, "{shipped} bytes a second");
    let (stream, disk) = (counter(&pair, "journal_bytes"), counter(&pair, "journal_disk_bytes"));
    println!("{:.4} bytes on disk for a byte of the stream", disk as f64 / stream as f64);
    assert!(disk * 100 <= stream * 105);
}
