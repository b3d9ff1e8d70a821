//! A group that is taken over while much of it is landed and nothing is applied: its volumes are served at once, every block of
//! them is what it was at the point (or what was written here since), at any moment of the applying, of the rollback, and
//! after every kill.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use nix::fcntl::{FallocateFlags, fallocate};
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(60);
const BYTES: usize = 24 << 20;
const SECTOR: usize = 512;
/// With a debug build, on a machine with other things to do. `make bench` has the figures.
const SERVED_TIME_MAX: Duration = Duration::from_secs(5);

fn open(device: &Path) -> File {
    let flags = nix::libc::O_DIRECT | nix::libc::O_DSYNC;
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(device).unwrap()
}

/// What a volume holds, and the next thing that is written to it.
#[derive(Clone)]
struct Model {
    bytes: Vec<u8>,
    count: u64,
}

impl Model {
    fn new() -> Self {
        Self { bytes: vec![0; BYTES], count: 0 }
    }

    /// So many writes of whole sectors, a few of them long, and zeroes; many of them over each other.
    fn scribble(&mut self, file: &File, rng: &mut StdRng, writes: usize) {
        for _ in 0..writes {
            self.count += 1;
            let most = if rng.random_ratio(1, 20) { 600 } else { 24 };
            let len = rng.random_range(1..=most) * SECTOR;
            let at = match rng.random_ratio(1, 2) {
                // A part of it is written again and again.
                true => rng.random_range(0..2048) * SECTOR,
                false => rng.random_range(0..=(BYTES - len) / SECTOR) * SECTOR,
            };
            if rng.random_ratio(1, 12) {
                let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(file, flags, at as i64, len as i64).unwrap();
                self.bytes[at..at + len].fill(0);
                continue;
            }
            let content = Aligned::filled(len, &(self.count << 8 | 0xa5).to_le_bytes());
            file.write_all_at(&content, at as u64).unwrap();
            self.bytes[at..at + len].copy_from_slice(&content);
        }
        // Zeroes are not written through: whoever is killed next may forget those at the end.
        file.sync_data().unwrap();
    }

    /// Everything is as it should be; read in pieces of different sizes.
    #[track_caller]
    fn check(&self, device: &Path, what: &str) {
        let file = open(device);
        for (from, piece) in [(0, 4096), (4 << 20, 128 << 10), (8 << 20, 1 << 20)] {
            let to = [4 << 20, 8 << 20, BYTES].into_iter().find(|to| *to > from).unwrap();
            let mut read = Aligned::new(piece, 0);
            for at in (from..to).step_by(piece) {
                file.read_exact_at(&mut read, at as u64).unwrap();
                if read[..] != self.bytes[at..at + piece] {
                    let wrong = (0..piece).find(|byte| read[*byte] != self.bytes[at + byte]).unwrap() / SECTOR * SECTOR;
                    let shown = |bytes: &[u8]| u64::from_le_bytes(bytes[wrong..wrong + 8].try_into().unwrap()) >> 8;
                    let (found, wanted) = (shown(&read), shown(&self.bytes[at..]));
                    panic!("{what}: byte {} is of write {found}, not {wanted}", at + wrong);
                }
            }
        }
    }
}

/// A protected volume, and a receiver whose applier can be held.
struct Bed {
    pair: Pair,
    replica: PathBuf,
    source: File,
    rng: StdRng,
    held: PathBuf,
    // They go last.
    _device: LoopDevice,
    _scratch: Scratch,
    _seed: Seed,
}

impl Bed {
    fn new(place: &str) -> Self {
        Self::with(place, "")
    }

    /// With keys in `receiver.toml`.
    fn with(place: &str, config: &str) -> Self {
        require_root();
        let (seed, scratch) = (Seed::new(), Scratch::disk());
        let device = LoopDevice::new(&scratch, "volume", BYTES as u64);
        let mut pair = Pair::new();
        let held = pair.recovery.scratch().join("held");
        pair.recovery.stop(Role::Receiver);
        let file = pair.recovery.root().join("etc/varve/receiver.toml");
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        std::fs::write(&file, format!("{config}{text}")).unwrap();
        pair.recovery.set_env("VARVE_HOLD", &format!("{place}:{}", held.display()));
        pair.recovery.start(Role::Receiver);
        let replica = pair.protect("db", &[device.path()]).remove(0);
        pair.wait_protected("db", LIMIT);
        let (source, rng) = (open(device.path()), seed.rng());
        Self { pair, replica, source, rng, held, _device: device, _scratch: scratch, _seed: seed }
    }

    /// An abort is written down.
    fn aborting(&self) -> bool {
        let meta = self.pair.recovery.root().join("var/lib/varve/receiver/groups/db/group.json");
        let meta: Value = serde_json::from_slice(&std::fs::read(&meta).unwrap()).unwrap();
        meta["takeover"]["aborting"] == true
    }

    /// Nothing is applied (or rolled back) any more.
    fn hold(&self) {
        std::fs::write(&self.held, "").unwrap();
    }

    fn go_on(&self) {
        std::fs::remove_file(&self.held).unwrap();
    }

    fn scribble(&mut self, model: &mut Model, writes: usize) {
        model.scribble(&self.source, &mut self.rng, writes);
    }

    /// Everything that was written at the source is landed.
    fn wait_landed(&self) {
        let offset =
            |status: &Value, key: &str| -> Option<u64> { status[key].as_str()?.rsplit_once(':')?.1.parse().ok() };
        let captured = offset(&self.pair.production.group("db").unwrap(), "captured").unwrap();
        wait_until(LIMIT, "it is landed", || {
            let status = self.pair.production.group("db");
            status.as_ref().and_then(|status| offset(status, "durable")).is_some_and(|durable| durable >= captured)
        });
    }

    fn bookmark(&self, name: &str) -> String {
        let reply = self.pair.production.varve(&["bookmark", "db", name, "--json"]).ok().json();
        format!("pos:{}", reply["position"].as_str().unwrap())
    }

    /// The applier stands, and something waits for it.
    fn assert_lags(&self) {
        let status = self.pair.recovery.group("db").unwrap();
        assert!(status["applied"].is_string() && status["applied"] != status["durable"], "{status:#?}");
    }

    fn failover(&self, at: &str) -> PathBuf {
        let begin = Instant::now();
        let reply = self.pair.recovery.varve(&["failover", "db", "--at", at, "--yes", "--json"]).ok().json();
        let device: PathBuf = reply["volumes"][0]["device"].as_str().unwrap().into();
        open(&device).read_exact_at(&mut Aligned::new(4096, 0), 0).unwrap();
        assert!(begin.elapsed() < SERVED_TIME_MAX, "served after {:?}", begin.elapsed());
        device
    }

    /// The device of a group that was served again after a start.
    fn served(&self) -> PathBuf {
        let mut device = None;
        wait_until(LIMIT, "it is served again", || {
            let status = self.pair.recovery.group("db");
            device = status.and_then(|status| status["history"]["takeover"]["devices"][0].as_str().map(PathBuf::from));
            device.is_some()
        });
        device.unwrap()
    }

    fn kill_and_start(&mut self) -> PathBuf {
        self.pair.recovery.kill(Role::Receiver);
        self.pair.recovery.start(Role::Receiver);
        self.served()
    }

    /// It ends at its failpoint; the next one has none.
    fn wait_crashed(&mut self) {
        wait_until(LIMIT, "it ends at the failpoint", || !self.pair.recovery.running(Role::Receiver));
        self.pair.recovery.reap(Role::Receiver);
        self.pair.recovery.set_env("VARVE_FAILPOINT", "");
    }

    fn is_applied(&self) -> bool {
        let status = self.pair.recovery.group("db");
        status.is_some_and(|status| status["data"] == "protected" && status["applied"] == status["durable"])
    }

    fn wait_replica(&self) {
        wait_until(LIMIT, "all of it is in the replica", || self.is_applied());
    }

    /// Until the replicas have everything, looking at the volume all the while.
    fn check_until_applied(&self, device: &Path, model: &Model, what: &str) {
        let begin = Instant::now();
        loop {
            let there = self.is_applied();
            model.check(device, what);
            if there {
                return;
            }
            assert!(begin.elapsed() < LIMIT, "not applied: {:#?}", self.pair.recovery.group("db"));
        }
    }

    fn assert_replica(&self, model: &Model) {
        model.check(&self.replica, "the replica");
    }
}

#[test]
fn the_newest_point_is_served_while_nothing_is_applied() {
    let (mut bed, mut model) = (Bed::new("apply-held"), Model::new());
    bed.scribble(&mut model, 200);
    let good = model.clone();
    let at_good = bed.bookmark("good");
    bed.pair.wait_applied("db", LIMIT);
    bed.hold();
    bed.scribble(&mut model, 400);
    bed.wait_landed();
    let device = bed.failover("latest");
    model.check(&device, "nothing is applied");
    let mut rng = bed.rng.clone();
    model.scribble(&open(&device), &mut rng, 200);
    model.check(&device, "written to while nothing is applied");
    // All of it again from the landing log.
    let device = bed.kill_and_start();
    model.check(&device, "killed, nothing is applied");
    bed.assert_lags();
    model.scribble(&open(&device), &mut rng, 200);
    bed.go_on();
    bed.check_until_applied(&device, &model, "while it is applied");
    bed.assert_replica(&model);
    let view = bed.pair.recovery.varve(&["view", "open", "db", "--at", &at_good, "--json"]).ok().json();
    good.check(Path::new(view["volumes"][0]["device"].as_str().unwrap()), "the old point");
    bed.pair.recovery.varve(&["view", "close", &view["id"].to_string()]).ok();
}

#[test]
fn killed_again_and_again_while_it_is_applied() {
    let (mut bed, mut model) = (Bed::new("apply-held"), Model::new());
    bed.hold();
    bed.scribble(&mut model, 300);
    bed.wait_landed();
    let mut device = bed.failover("latest");
    let mut rng = bed.rng.clone();
    for (round, point) in
        ["history-after:1", "apply-before:2", "apply-half:1", "apply-after:1", "mark-before:1", "mark-after:2"]
            .into_iter()
            .enumerate()
    {
        model.scribble(&open(&device), &mut rng, 60);
        // What comes next ends at this place; until then nothing is applied.
        bed.pair.recovery.kill(Role::Receiver);
        bed.pair.recovery.set_env("VARVE_FAILPOINT", point);
        bed.pair.recovery.start(Role::Receiver);
        device = bed.served();
        model.scribble(&open(&device), &mut rng, 60);
        model.check(&device, point);
        bed.go_on();
        let begin = Instant::now();
        while bed.pair.recovery.running(Role::Receiver) && begin.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_millis(10));
        }
        if bed.pair.recovery.running(Role::Receiver) {
            bed.pair.recovery.kill(Role::Receiver);
        } else {
            bed.pair.recovery.reap(Role::Receiver);
        }
        bed.pair.recovery.set_env("VARVE_FAILPOINT", "");
        bed.hold();
        bed.pair.recovery.start(Role::Receiver);
        device = bed.served();
        model.check(&device, &format!("round {round}, after {point}"));
    }
    bed.go_on();
    bed.check_until_applied(&device, &model, "in the end");
    bed.assert_replica(&model);
}

#[test]
fn an_older_point_keeps_what_is_written_here_through_kills() {
    let (mut bed, mut model) = (Bed::new("apply-held"), Model::new());
    bed.scribble(&mut model, 200);
    let at = bed.bookmark("good");
    let mut good = model.clone();
    bed.scribble(&mut model, 200);
    bed.pair.wait_applied("db", LIMIT);
    bed.hold();
    bed.scribble(&mut model, 200);
    bed.wait_landed();
    let device = bed.failover(&at);
    good.check(&device, "an older point");
    let mut rng = bed.rng.clone();
    good.scribble(&open(&device), &mut rng, 200);
    good.check(&device, "written to before it is rolled back");
    bed.pair.recovery.set_env("VARVE_FAILPOINT", "promote-said");
    let device = bed.kill_and_start();
    good.check(&device, "killed before it is rolled back");
    bed.assert_lags();
    good.scribble(&open(&device), &mut rng, 100);
    bed.go_on();
    // What the source wrote must not be applied once more over what was put back.
    bed.wait_crashed();
    bed.pair.recovery.start(Role::Receiver);
    let device = bed.served();
    good.check(&device, "killed when it was rolled back");
    bed.check_until_applied(&device, &good, "after the rollback");
    bed.assert_replica(&good);
    // And home again: what was there before, with what was written here as history.
    bed.pair.recovery.varve(&["failover", "abort", "db", "--yes"]).ok();
    bed.pair.wait_protected("db", LIMIT);
    bed.pair.wait_applied("db", LIMIT);
    bed.assert_replica(&model);
}

#[test]
fn the_last_good_point_before_a_gap_that_is_not_applied() {
    let (mut bed, mut model) = (Bed::new("apply-held"), Model::new());
    bed.scribble(&mut model, 200);
    bed.pair.wait_applied("db", LIMIT);
    bed.hold();
    bed.scribble(&mut model, 200);
    bed.wait_landed();
    // As a boot does it: a gap begins, and what comes in it is no point.
    bed.pair.production.stop(Role::Agent);
    run(bed.pair.production.command(Role::Agent).arg("--unpin-all")).ok();
    let mut later = model.clone();
    bed.scribble(&mut later, 50);
    bed.pair.production.start(Role::Agent);
    wait_until(LIMIT, "a gap is open at the receiver", || {
        bed.pair
            .recovery
            .group("db")
            .is_some_and(|status| status["link"] == "streaming" && status["data"] != "protected")
    });
    bed.scribble(&mut later, 200);
    let device = bed.failover("latest");
    model.check(&device, "the last good point");
    let mut rng = bed.rng.clone();
    model.scribble(&open(&device), &mut rng, 100);
    let device = bed.kill_and_start();
    model.check(&device, "killed");
    bed.go_on();
    bed.check_until_applied(&device, &model, "while it is applied and rolled back");
    bed.assert_replica(&model);
}

#[test]
fn an_abort_while_nothing_is_applied_leaves_the_source_as_it_was() {
    for failpoint in ["", "promote-aborting"] {
        let (mut bed, mut model) = (Bed::new("apply-held"), Model::new());
        bed.scribble(&mut model, 100);
        bed.pair.wait_applied("db", LIMIT);
        bed.pair.recovery.set_env("VARVE_FAILPOINT", failpoint);
        bed.pair.recovery.restart(Role::Receiver);
        bed.pair.wait_protected("db", LIMIT);
        bed.hold();
        bed.scribble(&mut model, 200);
        bed.wait_landed();
        let device = bed.failover("latest");
        let (mut promoted, mut rng) = (model.clone(), bed.rng.clone());
        promoted.scribble(&open(&device), &mut rng, 200);
        promoted.check(&device, "promoted");
        bed.assert_lags();
        if failpoint.is_empty() {
            bed.go_on();
        }
        bed.pair.recovery.varve(&["failover", "abort", "db", "--yes"]);
        if !failpoint.is_empty() {
            bed.wait_crashed();
            bed.pair.recovery.start(Role::Receiver);
            bed.go_on();
        }
        wait_until(LIMIT, "it is a replica again", || {
            bed.pair.recovery.group("db").is_some_and(|status| status["role"] == "replica")
        });
        bed.pair.wait_protected("db", LIMIT);
        bed.pair.wait_applied("db", LIMIT);
        bed.assert_replica(&model);
    }
}

/// The landing log takes no more, the source's last writes are still under way to it.
#[test]
fn a_landing_log_that_is_full_holds_nobody_up() {
    let config = "landing_segment_mib = 8\nlanding_max_mib = 32\n";
    let (mut bed, mut model) = (Bed::with("apply-held", config), Model::new());
    bed.scribble(&mut model, 100);
    bed.pair.wait_applied("db", LIMIT);
    bed.hold();
    let full = |bed: &Bed| {
        let lag = bed.pair.production.group("db").and_then(|status| status["lag_bytes"].as_u64());
        lag.is_some_and(|lag| lag > 6 << 20)
    };
    while !full(&bed) {
        bed.scribble(&mut model, 40);
    }
    let device = bed.failover("latest");
    // How much of that came is not known. What is there now stays.
    let file = open(&device);
    for at in 0..8 {
        file.write_all_at(&Aligned::new(4096, 9), at * 4096).unwrap();
    }
    drop(file);
    let newest = digest_device(&device);
    let device = bed.kill_and_start();
    assert_eq!(digest_device(&device), newest);
    bed.go_on();
    bed.wait_replica();
    assert_eq!(digest_device(&device), newest);
    assert_eq!(digest_device(&bed.replica), newest);
}

/// More is written while the replica is being rolled back than is kept in memory.
#[test]
fn writers_go_on_while_much_is_pending() {
    let (mut bed, mut model) = (Bed::new("rollback-held"), Model::new());
    bed.scribble(&mut model, 100);
    let at = bed.bookmark("good");
    let mut good = model.clone();
    bed.scribble(&mut model, 900);
    bed.pair.wait_applied("db", LIMIT);
    bed.hold();
    let device = bed.failover(&at);
    let mut file = open(&device);
    for round in 0..12 {
        let content = Aligned::filled(1 << 20, &(good.count << 8 | 0xa5).to_le_bytes());
        for at in 0..BYTES >> 20 {
            file.write_all_at(&content, (at << 20) as u64).unwrap();
        }
        good.bytes.chunks_mut(1 << 20).for_each(|part| part.copy_from_slice(&content));
        good.scribble(&file, &mut bed.rng, 20);
        if round == 5 {
            good.check(&device, "much is pending");
        }
    }
    good.check(&device, "even more is pending");
    file = open(&device);
    bed.go_on();
    bed.check_until_applied(&device, &good, "while it is rolled back and applied");
    drop(file);
    bed.assert_replica(&good);
}

#[test]
fn killed_in_the_middle_of_a_rollback() {
    let (mut bed, mut model) = (Bed::new("rollback-held"), Model::new());
    bed.scribble(&mut model, 300);
    let at = bed.bookmark("good");
    let mut good = model.clone();
    for _ in 0..4 {
        bed.scribble(&mut model, 300);
    }
    bed.pair.wait_applied("db", LIMIT);
    bed.hold();
    let mut device = bed.failover(&at);
    let mut rng = bed.rng.clone();
    for _ in 0..2 {
        good.scribble(&open(&device), &mut rng, 100);
        good.check(&device, "some of it is rolled back");
        device = bed.kill_and_start();
        good.check(&device, "killed while it is rolled back");
    }
    bed.go_on();
    bed.check_until_applied(&device, &good, "while it is rolled back");
    bed.assert_replica(&good);
}

/// Whoever is told that it runs here for good is not rolled back afterwards.
#[test]
fn what_is_being_undone_is_not_committed() {
    let (mut bed, mut model) = (Bed::new("rollback-held"), Model::new());
    bed.scribble(&mut model, 200);
    let before = model.clone();
    bed.pair.wait_applied("db", LIMIT);
    let device = bed.failover("latest");
    let mut rng = bed.rng.clone();
    let file = open(&device);
    for at in 0..BYTES >> 20 {
        file.write_all_at(&Aligned::new(1 << 20, at as u8 + 1), (at << 20) as u64).unwrap();
    }
    model.scribble(&file, &mut rng, 50);
    drop(file);
    bed.wait_replica();
    bed.hold();
    std::thread::scope(|scope| {
        let abort = scope.spawn(|| bed.pair.recovery.varve(&["failover", "abort", "db", "--yes"]));
        wait_until(LIMIT, "the abort is written down", || bed.aborting());
        let commit = bed.pair.recovery.varve(&["failover", "commit", "db", "--yes"]);
        // A second one does not wait for ever, and does not call off the first.
        let second = bed.pair.recovery.varve(&["failover", "abort", "db", "--yes"]);
        let still = bed.aborting();
        bed.go_on();
        assert_eq!((second.code, still), (1, true), "{second:?}");
        assert!(commit.expect_code(3).stderr.contains("being undone"));
        abort.join().unwrap().ok();
    });
    bed.pair.wait_protected("db", LIMIT);
    bed.pair.wait_applied("db", LIMIT);
    bed.assert_replica(&before);
    bed.pair.recovery.varve(&["failover", "commit", "db", "--yes"]).expect_code(3);
}

/// A takeover that has not served anything yet and is undone meanwhile serves nothing any more.
#[test]
fn undone_before_it_is_served() {
    let (mut bed, mut model) = (Bed::new("backlog-held"), Model::new());
    bed.scribble(&mut model, 200);
    bed.pair.wait_applied("db", LIMIT);
    let takeover = |bed: &Bed| bed.pair.recovery.group("db").unwrap()["history"]["takeover"].clone();
    bed.hold();
    std::thread::scope(|scope| {
        let begins = scope.spawn(|| bed.pair.recovery.varve(&["failover", "db", "--yes"]));
        wait_until(LIMIT, "the takeover is written down", || !takeover(&bed).is_null());
        bed.pair.recovery.varve(&["failover", "abort", "db", "--yes"]).ok();
        let refused = begins.join().unwrap().expect_code(3);
        assert!(refused.stderr.contains("being undone"), "{refused:?}");
    });
    bed.go_on();
    assert!(takeover(&bed).is_null());
    assert!(std::fs::symlink_metadata(bed.pair.recovery.root().join("run/varve/views/db-0")).is_err());
    bed.pair.wait_protected("db", LIMIT);
    bed.pair.wait_applied("db", LIMIT);
    bed.assert_replica(&model);
}

/// Retention lets older points go while it runs here, and not the one that an abort needs.
#[test]
fn what_an_abort_goes_back_to_does_not_expire() {
    let (bed, mut model) = (Bed::with("apply-held", "history_layer_mib = 1\n"), Model::new());
    // More than a layer, and nothing that compresses.
    let fill = |file: &File, bytes: &mut [u8], rng: &mut StdRng| {
        let mut content = Aligned::new(1 << 20, 0);
        for (number, part) in bytes.chunks_mut(1 << 20).enumerate() {
            rng.fill(&mut content[..]);
            file.write_all_at(&content, (number << 20) as u64).unwrap();
            part.copy_from_slice(&content);
        }
    };
    let mut rng = bed.rng.clone();
    for _ in 0..2 {
        fill(&bed.source, &mut model.bytes, &mut rng);
    }
    bed.bookmark("old");
    fill(&bed.source, &mut model.bytes, &mut rng);
    bed.pair.wait_applied("db", LIMIT);
    bed.pair.recovery.varve(&["retention", "db", "--bytes", "1MiB", "--yes"]).ok();
    let before = model.clone();
    let device = bed.failover("latest");
    let file = open(&device);
    for _ in 0..2 {
        fill(&file, &mut model.bytes, &mut rng);
    }
    drop(file);
    bed.wait_replica();
    wait_until(LIMIT, "what may expire has expired", || {
        let points = bed.pair.recovery.varve(&["points", "db", "--json"]).ok().json();
        let old = points["bookmarks"].as_array().unwrap().iter().find(|bookmark| bookmark["name"] == "old").cloned();
        old.is_none_or(|old| old["recoverable"] == false)
    });
    bed.pair.recovery.varve(&["failover", "abort", "db", "--yes"]).ok();
    bed.pair.wait_protected("db", LIMIT);
    bed.pair.wait_applied("db", LIMIT);
    bed.assert_replica(&before);
}

/// An abort that meets a receiver that is just serving it again leaves no device behind.
#[test]
fn undone_while_it_is_served_again() {
    let (mut bed, mut model) = (Bed::new("apply-held"), Model::new());
    bed.scribble(&mut model, 200);
    bed.pair.wait_applied("db", LIMIT);
    let link = bed.pair.recovery.root().join("run/varve/views/db-0");
    for _ in 0..3 {
        bed.failover("latest");
        assert!(std::fs::symlink_metadata(&link).is_ok());
        bed.pair.recovery.kill(Role::Receiver);
        bed.pair.recovery.start(Role::Receiver);
        bed.pair.recovery.varve(&["failover", "abort", "db", "--yes"]).ok();
        assert!(std::fs::symlink_metadata(&link).is_err(), "a device is still there");
        let group = bed.pair.recovery.group("db").unwrap();
        assert_eq!((&group["role"], &group["history"]["takeover"]), (&"replica".into(), &Value::Null), "{group:#}");
        bed.pair.wait_protected("db", LIMIT);
    }
    bed.pair.wait_applied("db", LIMIT);
    bed.assert_replica(&model);
}

/// A new group whose replica lies on a disk that hangs is nobody else's business.
#[test]
fn a_takeover_does_not_wait_for_a_new_group() {
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "other", 8 << 20);
    let (mut bed, mut model) = (Bed::new("group-before"), Model::new());
    bed.scribble(&mut model, 100);
    bed.pair.wait_applied("db", LIMIT);
    bed.hold();
    let production = &bed.pair.production;
    std::thread::scope(|scope| {
        let path = device.path().to_str().unwrap();
        let protect = scope.spawn(move || production.varve(&["protect", "other", path]));
        wait_until(LIMIT, "the group is being made", || bed.pair.recovery.log(Role::Receiver).contains("waits here"));
        let served = bed.failover("latest");
        model.check(&served, "taken over while another group is made");
        bed.go_on();
        protect.join().unwrap().ok();
    });
    bed.pair.wait_protected("other", LIMIT);
}

/// Whoever waits for the replicas hears that the receiver is alive: `varve` takes two minutes of silence for a daemon that hangs,
/// and then its operator would start it again in the middle of a takeover.
#[test]
fn whoever_waits_for_the_replicas_hears_a_sign_of_life() {
    let (mut bed, mut model) = (Bed::new("apply-held"), Model::new());
    bed.bookmark("held");
    bed.pair.wait_applied("db", LIMIT);
    bed.hold();
    bed.scribble(&mut model, 100);
    bed.wait_landed();
    let socket = bed.pair.recovery.root().join("run/varve/receiver.sock");
    let to = bed.pair.recovery.scratch().join("restored").display().to_string();
    // Only the replicas tell whether there is a newer point of that name.
    let failover = |test: bool, dry_run: bool| json!({"command": "failover", "group": "db", "at": {"bookmark": "held"}, "test": test, "dry_run": dry_run});
    let waiting = [
        json!({"command": "rollback", "group": "db", "at": "latest", "dry_run": true}),
        json!({"command": "restore", "group": "db", "at": "latest", "volume": "0", "to": to, "dry_run": true,
            "force": false}),
        failover(false, true),
        json!({"command": "view-open", "group": "db", "at": "latest", "writable": false, "export": "device"}),
        failover(true, false),
    ];
    let mut open: Vec<_> = waiting.iter().map(|request| (request, ask(&socket, request))).collect();
    for (request, lines) in &mut open {
        for _ in 0..2 {
            let line = lines.next().unwrap();
            assert!(line["progress"].is_object(), "{request}: {line}");
        }
    }
    bed.go_on();
    for (request, lines) in &mut open {
        let answer = lines.find(|line| line["progress"].is_null()).unwrap();
        assert!(answer["done"].is_object(), "{request}: {answer}");
    }
    bed.pair.recovery.varve(&["failover", "abort", "db", "--yes"]).ok();
    // The takeover itself, and its end.
    bed.hold();
    bed.scribble(&mut model, 100);
    bed.wait_landed();
    let mut takeover = ask(&socket, &failover(false, false));
    assert!(takeover.next().unwrap()["progress"].is_object());
    bed.go_on();
    let taken = takeover.find(|line| line["progress"].is_null()).unwrap();
    assert!(taken["done"]["volumes"][0]["device"].is_string(), "{taken}");
    bed.pair.recovery.varve(&["failover", "abort", "db", "--yes"]).ok();
}

/// The lines of an answer, each of which comes within seconds.
fn ask(socket: &Path, request: &Value) -> impl Iterator<Item = Value> + use<> {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    BufReader::new(stream).lines().map(|line| serde_json::from_str(&line.expect("a line in time")).unwrap())
}
