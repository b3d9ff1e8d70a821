//! Any point of the past, by the operator's commands: as devices, over NBD, as a file, rolled back and forth.
//!
//! The judge of what a point must hold is the volume itself: it is frozen, a bookmark is set, its bytes are digested.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use rand::Rng;
use serde_json::Value;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(60);

/// A view that is closed when the test is done with it.
struct View<'a> {
    pair: &'a Pair,
    id: String,
    reply: Value,
}

impl<'a> View<'a> {
    #[track_caller]
    fn open(pair: &'a Pair, group: &str, at: &str, more: &[&str]) -> Self {
        let args = [&["view", "open", group, "--at", at, "--json"], more].concat();
        let reply = pair.recovery.varve(&args).ok().json();
        Self { pair, id: reply["id"].to_string(), reply }
    }

    fn device(&self, volume: usize) -> PathBuf {
        self.reply["volumes"][volume]["device"].as_str().expect("a device").into()
    }

    fn uri(&self, volume: usize) -> &str {
        self.reply["volumes"][volume]["uri"].as_str().expect("a URI")
    }
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        let closed = self.pair.recovery.varve(&["view", "close", &self.id]);
        if !std::thread::panicking() {
            closed.ok();
        }
    }
}

/// The volume's digest at a bookmark: nobody writes while both are taken.
fn moment(pair: &Pair, mount: &Mount, device: &Path, name: &str) -> String {
    mount.frozen(|| {
        pair.production.varve(&["bookmark", "past", name]).ok();
        digest_device(device)
    })
}

fn replica_is(pair: &Pair, replica: &Path, digest: &str, what: &str) {
    assert_eq!(digest_device(replica), digest, "{what}: {:#?}", pair.recovery.group("past"));
}

#[test]
fn every_bookmark_is_what_the_volume_was() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 160 << 20);
    let mount = Mount::format(&scratch, "mnt", Filesystem::Ext4, device.path());
    let pair = Pair::new();
    let replicas = pair.protect("past", &[device.path()]);
    pair.wait_protected("past", LIMIT);
    let load = Fio::new(&mount.path().join("load"))
        .option("size=48m")
        .option("direct=0")
        .option("fsync=8")
        .block("512-128k")
        .option("blockalign=512")
        .rate(20 << 20)
        .seconds(60)
        .start(&scratch);
    let mut digests = Vec::new();
    for step in 0..4 {
        std::fs::write(mount.path().join("step"), format!("step {step}")).unwrap();
        mount.sync();
        digests.push(moment(&pair, &mount, device.path(), &format!("s{step}")));
        std::thread::sleep(Duration::from_millis(400));
    }
    // All of them at once, while the load goes on.
    let views: Vec<View<'_>> =
        (0..4).map(|step| View::open(&pair, "past", &format!("bookmark:s{step}"), &[])).collect();
    for (step, view) in views.iter().enumerate() {
        assert_eq!(digest_device(&view.device(0)), digests[step], "view of s{step}");
        assert_eq!(view.reply["point"]["distance_seconds"], 0.0, "{:#?}", view.reply);
    }
    load.stop();
    // The same point by its exact time and by its position.
    let point = &views[1].reply["point"];
    for at in [point["time"].as_str().unwrap().to_owned(), format!("pos:{}", point["position"].as_str().unwrap())] {
        let view = View::open(&pair, "past", &at, &[]);
        assert_eq!(digest_device(&view.device(0)), digests[1], "{at}");
    }
    // Written to, it changes for nobody else.
    let writable = View::open(&pair, "past", "bookmark:s2", &["--writable"]);
    let copy = Mount::existing(&scratch, "copy", &writable.device(0), "rw");
    assert_eq!(std::fs::read_to_string(copy.path().join("step")).unwrap(), "step 2");
    std::fs::write(copy.path().join("step"), "mine").unwrap();
    let busy = pair.recovery.varve(&["view", "close", &writable.id]).expect_code(3);
    assert!(busy.stderr.contains("mounted"), "{}", busy.stderr);
    copy.unmount();
    assert_ne!(digest_device(&writable.device(0)), digests[2]);
    assert_eq!(digest_device(&views[2].device(0)), digests[2], "beside the writable one");
    drop(writable);
    // As a file, and over NBD: the same bytes, says qemu-img.
    let file = scratch.join("restored.img");
    let to = file.to_str().unwrap();
    let restored =
        pair.recovery.varve(&["restore", "past", "--at", "bookmark:s3", "--volume", "0", "--to", to, "--json"]);
    let restored = restored.ok().json_lines().pop().unwrap();
    assert_eq!(restored["verified"], true, "{restored:#?}");
    assert_eq!(digest_device(&file), digests[3]);
    let nbd = View::open(&pair, "past", "bookmark:s3", &["--export", "nbd"]);
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw", nbd.uri(0), to])).ok();
    drop(nbd);
    drop(views);
    // Back, back again, and on.
    pair.wait_applied("past", LIMIT);
    let before = digest_device(&replicas[0]);
    let rollback = |at: &str| {
        let output = pair.recovery.varve(&["rollback", "past", "--at", at, "--yes", "--json"]).ok();
        output.json_lines().pop().unwrap()
    };
    let done = rollback("bookmark:s1");
    replica_is(&pair, &replicas[0], &digests[1], "rolled back to s1");
    let undo = done["from_point"]["time"].as_str().unwrap();
    rollback(undo);
    replica_is(&pair, &replicas[0], &before, "the rollback rolled back");
    pair.recovery.varve(&["rollback", "past", "--release", "--yes"]).ok();
    mount.unmount();
    pair.wait_protected("past", LIMIT);
    pair.wait_applied("past", LIMIT);
    assert_same(device.path(), &replicas[0]);
    // History is only cut by retention: every old point is still there.
    let view = View::open(&pair, "past", "bookmark:s0", &[]);
    assert_eq!(digest_device(&view.device(0)), digests[0], "s0 after two rollbacks and a resync");
    let scrub = pair.recovery.varve(&["scrub", "past", "--json"]).ok().json_lines().pop().unwrap();
    assert_eq!(scrub["damaged"].as_array().map(Vec::len), Some(0), "{scrub:#?}");
}

/// A then B, one after the other, durable: at every point of the past B is never ahead of A, and never more than one behind.
#[test]
fn every_point_keeps_the_order_of_two_volumes() {
    require_root();
    let seed = Seed::new();
    let scratch = Scratch::memory();
    let a = LoopDevice::new(&scratch, "a", 8 << 20);
    let b = LoopDevice::new(&scratch, "b", 8 << 20);
    let pair = Pair::new();
    pair.protect("past", &[a.path(), b.path()]);
    pair.wait_protected("past", LIMIT);
    let open = |path: &Path| OpenOptions::new().write(true).custom_flags(nix::libc::O_SYNC).open(path).unwrap();
    let (file_a, file_b) = (open(a.path()), open(b.path()));
    let begin = std::time::SystemTime::now();
    for number in 1u64..=3000 {
        file_a.write_all_at(&number.to_le_bytes().repeat(512), 0).unwrap();
        file_b.write_all_at(&number.to_le_bytes().repeat(512), 0).unwrap();
    }
    let took = begin.elapsed().unwrap();
    pair.wait_applied("past", LIMIT);
    let (mut seen, mut rng) = (std::collections::BTreeSet::new(), seed.rng());
    for _ in 0..25 {
        let at = begin + took.mul_f64(rng.random_range(0.05..1.0));
        let at = jiff::Timestamp::try_from(at).unwrap().to_string();
        let view = View::open(&pair, "past", &at, &[]);
        let number_of = |volume: usize| {
            let mut bytes = [0; 4096];
            std::fs::File::open(view.device(volume)).unwrap().read_exact_at(&mut bytes, 0).unwrap();
            let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            assert!(bytes.chunks(8).all(|part| part == number.to_le_bytes()), "a torn block at {at}");
            number
        };
        let (now_a, now_b) = (number_of(0), number_of(1));
        assert!(now_b == now_a || now_b + 1 == now_a, "at {at}: A has {now_a}, B has {now_b}");
        seen.insert(now_a);
    }
    assert!(seen.len() > 3, "the points differ: {seen:?}");
}

#[test]
fn wrong_points_and_places_are_refused_with_words() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 8 << 20);
    let pair = Pair::new();
    pair.protect("past", &[device.path()]);
    pair.wait_protected("past", LIMIT);
    pair.production.varve(&["bookmark", "past", "known"]).ok();
    pair.wait_applied("past", LIMIT);
    let existing = scratch.join("existing");
    std::fs::write(&existing, "mine").unwrap();
    let existing = existing.to_str().unwrap();
    let device = device.path().to_str().unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["view", "open", "past", "--at", "yesterday"], 2, "bookmark:"),
        (&["view", "open", "past", "--at", "bookmark:nown"], 5, "known"),
        (&["view", "open", "none", "--at", "latest"], 5, "none"),
        (&["view", "open", "past", "--at", "2020-01-01T00:00:00Z"], 5, "oldest"),
        (&["view", "open", "past", "--at", "pos:ffffffff:8"], 5, "ffffffff"),
        (&["view", "close", "77"], 5, "77"),
        (&["points", "none"], 5, "none"),
        (&["restore", "past", "--at", "latest", "--volume", "7", "--to", "/nowhere"], 5, "7"),
        (&["restore", "past", "--at", "latest", "--volume", device, "--to", existing], 3, "exists"),
        (&["rollback", "past", "--at", "bookmark:known"], 3, "--yes"),
        (&["rollback", "past", "--release", "--yes"], 3, "held"),
        (&["bookmark", "past", "nown", "--keep"], 5, "nown"),
        (&["scrub", "none"], 5, "none"),
        (&["retention", "past", "--age", "soon"], 2, "7d"),
    ];
    for (args, code, word) in cases {
        let output = pair.recovery.varve(args).expect_code(*code);
        assert!(output.stderr.contains(word), "{args:?}: no '{word}' in:\n{}", output.stderr);
    }
    assert_eq!(std::fs::read_to_string(existing).unwrap(), "mine");
}

/// What a restore reads from the replica is another group's as soon as its own is forgotten.
#[test]
fn a_group_is_not_forgotten_under_a_restore() {
    require_root();
    let (_seed, scratch) = (Seed::new(), Scratch::disk());
    let device = LoopDevice::new(&scratch, "volume", 16 << 20);
    std::fs::write(device.path(), vec![7; 16 << 20]).unwrap();
    let mut pair = Pair::new();
    let held = pair.recovery.scratch().join("held");
    pair.recovery.stop(Role::Receiver);
    pair.recovery.set_env("VARVE_HOLD", &format!("restore-held:{}", held.display()));
    pair.recovery.start(Role::Receiver);
    pair.protect("past", &[device.path()]);
    pair.wait_protected("past", LIMIT);
    let digest = digest_device(device.path());
    pair.production.stop(Role::Agent);
    wait_until(LIMIT, "the session's end", || {
        pair.recovery.group("past").is_some_and(|group| group["link"] == "disconnected")
    });
    std::fs::write(&held, "").unwrap();
    let to = scratch.join("restored.img");
    let args = ["restore", "past", "--at", "latest", "--volume", "0", "--to", to.to_str().unwrap()];
    std::thread::scope(|scope| {
        let restored = scope.spawn(|| pair.recovery.varve(&args));
        let partial = || {
            std::fs::read_dir(scratch.path()).unwrap().flatten().any(|entry| {
                let name = entry.file_name();
                name.to_string_lossy().contains("varve-partial") && entry.metadata().is_ok_and(|meta| meta.len() > 0)
            })
        };
        wait_until(LIMIT, "the restore to begin", partial);
        let refused = pair.recovery.varve(&["forget", "past", "--yes"]);
        std::fs::remove_file(&held).unwrap();
        let refused = refused.expect_code(3);
        assert!(refused.stderr.contains("a restore is under way"), "{}", refused.stderr);
        restored.join().unwrap().ok();
    });
    assert_eq!(digest_device(&to), digest);
    pair.recovery.varve(&["forget", "past", "--yes"]).ok();
}

/// A service manager shows the receiver another file system than the operator: nothing is called restored that nobody can find.
#[test]
fn a_restore_goes_where_the_operator_finds_it_or_nowhere() {
    require_root();
    let scratch = Scratch::disk();
    let device = LoopDevice::new(&scratch, "volume", 8 << 20);
    let mut pair = Pair::new();
    pair.protect("past", &[device.path()]);
    pair.wait_protected("past", LIMIT);
    pair.production.varve(&["bookmark", "past", "known"]).ok();
    pair.wait_applied("past", LIMIT);
    let [hidden, closed, open] = ["hidden", "closed", "open"].map(|name| {
        std::fs::create_dir(scratch.join(name)).unwrap();
        scratch.join(name).display().to_string()
    });
    pair.recovery.stop(Role::Receiver);
    // As PrivateTmp= and ProtectSystem=strict do it.
    let namespace = format!(
        "mount -t tmpfs none {hidden} && mount --bind {closed} {closed} && mount -o remount,ro,bind {closed} && exec $0"
    );
    pair.recovery.start_with(Role::Receiver, &["unshare", "--mount", "sh", "-c", &namespace]);
    pair.wait_protected("past", LIMIT);
    let restore = |to: &str, more: &[&str]| {
        let args = ["restore", "past", "--at", "bookmark:known", "--volume", "0", "--to", to];
        pair.recovery.varve(&[&args, more].concat())
    };
    for more in [&[][..], &["--dry-run"]] {
        let output = restore(&format!("{hidden}/volume.img"), more).expect_code(3);
        assert!(output.stderr.contains("does not see") && output.stderr.contains(&hidden), "{}", output.stderr);
        let output = restore(&format!("{closed}/volume.img"), more).expect_code(1);
        assert!(output.stderr.contains(&format!("ReadWritePaths={closed}")), "{}", output.stderr);
    }
    let to = format!("{open}/volume.img");
    restore(&to, &[]).ok();
    assert_eq!(std::fs::metadata(to).unwrap().len(), 8 << 20);
}
