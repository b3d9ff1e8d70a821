//! Capture outlives the agent: killed, stopped, exchanged, it goes on where it was; unprotected, nothing is left.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

use rand::Rng;
use std::path::{Path, PathBuf};
use std::time::Duration;
use varve_tests::*;

const LIMIT: Duration = Duration::from_secs(60);

/// The ring's name.
fn incarnation(pair: &Pair, group: &str) -> String {
    let status = pair.production.group(group).unwrap();
    let captured = status["captured"].as_str().unwrap().to_owned();
    captured.rsplit_once(':').unwrap().0.to_owned()
}

/// No region was compared or sent, no gap was seen, by any agent since `from` (a length of the log).
#[track_caller]
fn assert_no_gap(pair: &Pair, from: usize) {
    let log = pair.production.log(Role::Agent);
    let bad: Vec<&str> = log[from..]
        .lines()
        .filter(|line| line.contains("a gap begins") || line.contains("resumed=false") || line.contains(" ERROR "))
        .collect();
    assert!(bad.is_empty(), "{bad:#?}");
}

#[track_caller]
fn counter(pair: &Pair, group: &str, name: &str) -> u64 {
    pair.production.group(group).unwrap()["counters"][name].as_u64().unwrap()
}

/// Everything pinned below an installation's root. (The kernel has two files of its own in a new bpffs.)
fn pins(install: &Installation) -> Vec<PathBuf> {
    let (mut found, mut dirs) = (Vec::new(), vec![install.root().join("sys/fs/bpf")]);
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                dirs.push(entry.path());
            }
            if !entry.file_name().to_string_lossy().ends_with(".debug") {
                found.push(entry.path());
            }
        }
    }
    found
}

#[track_caller]
fn assert_equal(pair: &Pair, group: &str, volumes: &[&Path], replicas: &[PathBuf]) {
    pair.wait_protected(group, LIMIT);
    pair.wait_applied(group, LIMIT);
    for (volume, replica) in volumes.iter().zip(replicas) {
        assert_same(volume, replica);
    }
}

/// Killed at random moments under load, two volumes in one order.
#[test]
fn an_agent_killed_again_and_again_loses_nothing_and_compares_nothing() {
    require_root();
    let seed = Seed::new();
    let mut rng = seed.rng();
    let scratch = Scratch::memory();
    let (a, b) = (LoopDevice::new(&scratch, "a", 64 << 20), LoopDevice::new(&scratch, "b", 32 << 20));
    let mut pair = Pair::with_agent_config("ring_mib = 256\n");
    let replicas = pair.protect("db", &[a.path(), b.path()]);
    pair.wait_protected("db", LIMIT);
    let (name, from) = (incarnation(&pair, "db"), pair.production.log(Role::Agent).len());
    let kills: u32 = std::env::var("VARVE_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(12);
    let load = |device: &LoopDevice, number| {
        Fio::new(device.path())
            .block("512-128k")
            .option("blockalign=512")
            .depth(8)
            .seed(number)
            .rate(8 << 20)
            .seconds(600)
    };
    // A full ring is a gap by right, and a machine that is slow may not get the ring empty between two kills.
    let has_room = |pair: &Pair| {
        let group = pair.production.group("db");
        group.and_then(|group| group["ring"]["used_bytes"].as_u64()).is_some_and(|used| used < 128 << 20)
    };
    let loads = [load(&a, seed.number()).start(&scratch), load(&b, seed.number() + 1).start(&scratch)];
    for _ in 0..kills {
        wait_until(LIMIT, "the ring has room", || has_room(&pair));
        std::thread::sleep(Duration::from_millis(rng.random_range(0..700)));
        pair.production.kill(Role::Agent);
        std::thread::sleep(Duration::from_millis(rng.random_range(0..400)));
        pair.production.start(Role::Agent);
    }
    for load in loads {
        load.stop();
    }
    assert_equal(&pair, "db", &[a.path(), b.path()], &replicas);
    assert_eq!(incarnation(&pair, "db"), name, "one ring all the time");
    assert_no_gap(&pair, from);
    assert_eq!(counter(&pair, "db", "image_bytes"), 0);
    // Some build hosts' kernels skip programs in the context of process 1: such regions are compared, and are equal.
    let unseen = pair.production.log(Role::Agent)[from..].contains("completions went unseen");
    assert!(unseen || counter(&pair, "db", "probes") == 0);
}

/// The agent's program.
fn agent_program(pair: &Pair) -> PathBuf {
    std::fs::read_link(format!("/proc/{}/exe", pair.production.pid(Role::Agent))).unwrap()
}

/// Starts an agent and kills it after `life`, wherever it is then. No agent may be running.
fn short_life(pair: &Pair, program: &Path, life: Duration) {
    let log = pair.production.scratch().join("short-lives.log");
    let none: [&str; 0] = [];
    let mut child = Child::start(program, &none, &log, |command| {
        command.env("VARVE_ROOT", pair.production.root());
    });
    std::thread::sleep(life);
    assert_eq!(child.end_with(nix::sys::signal::Signal::SIGKILL, LIMIT), 137, "{}", child.log());
}

/// Killed while it starts: while it proves, takes over, greets the receiver.
#[test]
fn an_agent_killed_while_it_starts_leaves_everything_to_the_next() {
    require_root();
    let seed = Seed::new();
    let mut rng = seed.rng();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 48 << 20);
    let mut pair = Pair::with_agent_config("ring_mib = 256\n");
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let (name, from) = (incarnation(&pair, "db"), pair.production.log(Role::Agent).len());
    let program = agent_program(&pair);
    let load = Fio::new(device.path()).block("512-64k").option("blockalign=512").depth(4).seed(seed.number());
    let load = load.rate(10 << 20).seconds(600).start(&scratch);
    pair.production.kill(Role::Agent);
    for _ in 0..30 {
        short_life(&pair, &program, Duration::from_millis(rng.random_range(0..700)));
    }
    pair.production.start(Role::Agent);
    load.stop();
    assert_equal(&pair, "db", &[device.path()], &replicas);
    assert_eq!(incarnation(&pair, "db"), name);
    assert_no_gap(&pair, from);
    let short = std::fs::read_to_string(pair.production.scratch().join("short-lives.log")).unwrap();
    // The receiver still has the connections of those that were killed, and takes only so many of one host.
    let wrong = |line: &&str| line.contains(" WARN ") && !line.contains(": Busy (") || line.contains("resumed=false");
    let bad: Vec<&str> = short.lines().filter(wrong).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    assert!(short.contains("resumed=true"), "some lived long enough to stream");
}

/// Killed while a group is protected and unprotected: what is half made is captured by nobody, and the end is clean.
#[test]
fn an_agent_killed_while_groups_come_and_go_leaves_nothing_half() {
    require_root();
    let seed = Seed::new();
    let mut rng = seed.rng();
    let scratch = Scratch::memory();
    let (a, b) = (LoopDevice::new(&scratch, "a", 16 << 20), LoopDevice::new(&scratch, "b", 16 << 20));
    let mut pair = Pair::new();
    let replicas = pair.protect("stays", &[a.path()]);
    pair.wait_protected("stays", LIMIT);
    let name = incarnation(&pair, "stays");
    let load = Fio::new(a.path()).block("4k").depth(2).seed(seed.number()).rate(2 << 20).seconds(600).start(&scratch);
    for round in 0..12 {
        let pair_ref = &pair;
        let wait = Duration::from_millis(rng.random_range(0..120));
        // The command is told that the agent went away, or that it is done: both are right.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let volume = b.path().to_str().unwrap();
                let replica = pair_ref.recovery.scratch().join("comes.img");
                let args = match round % 2 {
                    0 => vec!["protect", "comes", volume, "--replica", replica.to_str().unwrap()],
                    _ => vec!["unprotect", "comes", "--yes"],
                };
                let _ = pair_ref.production.varve(&args);
            });
            std::thread::sleep(wait);
            let pid = nix::unistd::Pid::from_raw(pair_ref.production.pid(Role::Agent).cast_signed());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        });
        pair.production.reap(Role::Agent);
        pair.production.start(Role::Agent);
    }
    load.stop();
    assert_equal(&pair, "stays", &[a.path()], &replicas);
    assert_eq!(incarnation(&pair, "stays"), name);
    if pair.production.group("comes").is_some() {
        pair.wait_protected("comes", LIMIT);
        pair.production.varve(&["unprotect", "comes", "--yes"]).ok();
    }
    pair.production.varve(&["unprotect", "stays", "--yes"]).ok();
    assert_eq!(pins(&pair.production), Vec::<PathBuf>::new());
}

/// A ring that is too small, a device whose writes stay in flight for long, and kills: gaps are right, losses are not.
#[test]
fn kills_in_gaps_and_with_slow_writes_in_flight_lose_nothing() {
    require_root();
    let seed = Seed::new();
    let mut rng = seed.rng();
    let scratch = Scratch::memory();
    let slow = SlowDevice::new(&scratch, "slow", 24 << 20, Duration::from_millis(20), Duration::from_millis(200));
    let fast = LoopDevice::new(&scratch, "fast", 64 << 20);
    let load = |path: &Path, number| Fio::new(path).block("4k-128k").depth(16).seed(number).seconds(600);
    let mut pair = Pair::with_agent_config("ring_mib = 4\njournal_max_mib = 0\n");
    let replicas = pair.protect("both", &[slow.path(), fast.path()]);
    let loads = [
        load(slow.path(), seed.number()).start(&scratch),
        load(fast.path(), seed.number() + 1).rate(60 << 20).start(&scratch),
    ];
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(rng.random_range(0..1500)));
        pair.production.kill(Role::Agent);
        std::thread::sleep(Duration::from_millis(rng.random_range(0..300)));
        pair.production.start(Role::Agent);
    }
    for load in loads {
        load.stop();
    }
    assert_equal(&pair, "both", &[slow.path(), fast.path()], &replicas);
    let log = pair.production.log(Role::Agent);
    assert_eq!(log.matches("resumed=false").count(), 1, "one ring, begun once");
}

/// The same in the middle of the first sync, where regions are in hand.
#[test]
fn an_agent_killed_in_its_first_sync_goes_on_with_it() {
    require_root();
    let seed = Seed::new();
    let mut rng = seed.rng();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 192 << 20);
    let mut content = vec![0; 192 << 20];
    rng.fill(&mut content[..]);
    std::fs::write(device.path(), &content).unwrap();
    run_ok("blockdev", &["--flushbufs", device.path().to_str().unwrap()]);
    let mut pair = Pair::with_agent_config("ring_mib = 256\n");
    let load = Fio::new(device.path())
        .block("512-64k")
        .option("blockalign=512")
        .depth(8)
        .seed(seed.number())
        .rate(15 << 20)
        .seconds(600)
        .start(&scratch);
    let replicas = pair.protect("db", &[device.path()]);
    let name = incarnation(&pair, "db");
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(rng.random_range(0..300)));
        pair.production.kill(Role::Agent);
        pair.production.start(Role::Agent);
    }
    pair.wait_protected("db", LIMIT);
    load.stop();
    assert_equal(&pair, "db", &[device.path()], &replicas);
    assert_eq!(incarnation(&pair, "db"), name);
}

#[test]
fn what_is_written_while_the_agent_is_stopped_is_in_the_stream() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 32 << 20);
    let mut pair = Pair::new();
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let status = pair.production.group("db").unwrap();
    assert_eq!((&status["ring"]["pinned"], &status["ring"]["origin"]), (&true.into(), &"new".into()));
    let (name, from) = (incarnation(&pair, "db"), pair.production.log(Role::Agent).len());
    pair.production.stop(Role::Agent);
    Fio::new(device.path()).block("4k").depth(4).rate(4 << 20).seconds(2).start(&scratch).finish();
    pair.production.start(Role::Agent);
    assert_equal(&pair, "db", &[device.path()], &replicas);
    assert_eq!(incarnation(&pair, "db"), name);
    assert_no_gap(&pair, from);
    let status = pair.production.group("db").unwrap();
    assert!(status["ring"]["origin"].as_str().unwrap().starts_with("taken over from varve "), "{status:#}");
    assert!(status["counters"]["stream_bytes"].as_u64().unwrap() > 4 << 20, "it came as records");
}

/// Nobody came back in time: the ring is full, and then there are dirty regions and a gap that heals.
#[test]
fn a_ring_that_ran_full_without_an_agent_is_a_gap_that_heals() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 64 << 20);
    let mut pair = Pair::with_agent_config("ring_mib = 4\n");
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let (name, from) = (incarnation(&pair, "db"), pair.production.log(Role::Agent).len());
    pair.production.kill(Role::Agent);
    Fio::new(device.path()).block("64k").depth(4).rate(16 << 20).seconds(2).start(&scratch).finish();
    pair.production.start(Role::Agent);
    wait_until(LIMIT, "the gap is seen", || pair.production.log(Role::Agent)[from..].contains("a gap begins"));
    assert_equal(&pair, "db", &[device.path()], &replicas);
    assert_eq!(incarnation(&pair, "db"), name, "no new ring");
    assert!(!pair.production.log(Role::Agent)[from..].contains("resumed=false"));
    assert_eq!(pair.production.group("db").unwrap()["gap_reason"], serde_json::Value::Null);
}

#[test]
fn unprotect_and_unpin_all_leave_no_pin() {
    require_root();
    let scratch = Scratch::memory();
    let (a, b) = (LoopDevice::new(&scratch, "a", 8 << 20), LoopDevice::new(&scratch, "b", 8 << 20));
    let mut pair = Pair::new();
    assert_eq!(pins(&pair.production), Vec::<PathBuf>::new(), "nothing before something is protected");
    pair.protect("a", &[a.path()]);
    let replicas = pair.protect("b", &[b.path()]);
    pair.wait_protected("b", LIMIT);
    assert!(pins(&pair.production).len() > 20);
    pair.production.varve(&["unprotect", "a", "--yes"]).ok();
    // The other one is as it was, over a kill, too.
    pair.production.kill(Role::Agent);
    Fio::new(b.path()).block("4k").depth(1).rate(1 << 20).seconds(1).start(&scratch).finish();
    pair.production.start(Role::Agent);
    assert_equal(&pair, "b", &[b.path()], &replicas);
    pair.production.varve(&["unprotect", "b", "--yes"]).ok();
    assert_eq!(pins(&pair.production), Vec::<PathBuf>::new());

    // And again from the beginning, ended by hand.
    let replicas = pair.protect("again", &[a.path()]);
    pair.wait_protected("again", LIMIT);
    let (exe, root) = (agent_program(&pair), pair.production.root().to_owned());
    let unpin = || run(std::process::Command::new(&exe).arg("--unpin-all").env("VARVE_ROOT", &root));
    unpin().expect_code(1);
    assert!(!pins(&pair.production).is_empty(), "not while the agent runs");
    pair.production.stop(Role::Agent);
    assert!(!pins(&pair.production).is_empty(), "a stopped agent leaves them");
    unpin().ok();
    assert_eq!(pins(&pair.production), Vec::<PathBuf>::new());
    unpin().ok();
    // Nobody captured from then on, so the whole volume is compared.
    std::fs::write(a.path(), vec![3; 1 << 20]).unwrap();
    run_ok("blockdev", &["--flushbufs", a.path().to_str().unwrap()]);
    let from = pair.production.log(Role::Agent).len();
    pair.production.start(Role::Agent);
    wait_until(LIMIT, "a new ring", || pair.production.log(Role::Agent)[from..].contains("resumed=false"));
    assert_equal(&pair, "again", &[a.path()], &replicas);
}

/// What a map of one entry holds, changed: the test plays an agent of another version.
#[allow(unsafe_code, reason = "bpf(2) has no other form, and the product is not linked here")]
fn change_pinned(map: &Path, change: impl FnOnce(&mut [u8])) {
    const BPF_MAP_LOOKUP_ELEM: i64 = 1;
    const BPF_MAP_UPDATE_ELEM: i64 = 2;
    const BPF_OBJ_GET: i64 = 7;
    let bpf = |command: i64, attributes: &[u64; 8]| {
        // SAFETY: the attributes are longer than any that these commands read, and the pointers in them are valid.
        let result = unsafe { nix::libc::syscall(nix::libc::SYS_bpf, command, attributes, size_of_val(attributes)) };
        assert!(result >= 0, "bpf {command}: {}", std::io::Error::last_os_error());
        result
    };
    let path = std::ffi::CString::new(map.to_str().unwrap()).unwrap();
    let fd = bpf(BPF_OBJ_GET, &[path.as_ptr() as u64, 0, 0, 0, 0, 0, 0, 0]);
    let (key, mut value) = (0u32, vec![0u8; 256]);
    let element = |value: &mut Vec<u8>| [fd as u64, &raw const key as u64, value.as_mut_ptr() as u64, 0, 0, 0, 0, 0];
    bpf(BPF_MAP_LOOKUP_ELEM, &element(&mut value));
    change(&mut value);
    bpf(BPF_MAP_UPDATE_ELEM, &element(&mut value));
    nix::unistd::close(fd as i32).unwrap();
}

/// An agent of another version left pins of a layout that this one does not know.
#[test]
fn pins_of_another_layout_are_replaced_and_named() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 16 << 20);
    let mut pair = Pair::new();
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let (name, from) = (incarnation(&pair, "db"), pair.production.log(Role::Agent).len());
    pair.production.stop(Role::Agent);
    change_pinned(&pair.production.root().join("sys/fs/bpf/varve/set/map_identity"), |bytes| {
        bytes[8..12].copy_from_slice(&77u32.to_ne_bytes());
    });
    Fio::new(device.path()).block("4k").depth(4).rate(4 << 20).seconds(1).start(&scratch).finish();
    pair.production.start(Role::Agent);
    let why = "its layout is 77";
    let log = pair.production.log(Role::Agent)[from..].to_owned();
    assert!(log.lines().any(|line| line.contains(" WARN ") && line.contains(why)), "{log}");
    let status = pair.production.group("db").unwrap();
    assert!(status["ring"]["origin"].as_str().unwrap().contains(why), "{status:#}");
    assert_equal(&pair, "db", &[device.path()], &replicas);
    assert_ne!(incarnation(&pair, "db"), name);
    let doctor = pair.production.varve(&["doctor", "--json"]).json();
    let check = doctor["checks"].as_array().unwrap().iter().find(|check| check["name"] == "pinned capture").unwrap();
    assert!(check["result"] == "ok" && check["found"].as_str().unwrap().contains("running capture"), "{check:#}");
    pair.production.varve(&["unprotect", "db", "--yes"]).ok();
    assert_eq!(pins(&pair.production), Vec::<PathBuf>::new(), "the older ones, too");
}

/// A volume whose number names another disk now, and nothing tells it from the one before (most virtual disks have no serial).
#[test]
fn another_disk_behind_the_same_number_begins_a_new_ring() {
    require_root();
    let scratch = Scratch::memory();
    let device = LoopDevice::new(&scratch, "volume", 8 << 20);
    let mut pair = Pair::new();
    let replicas = pair.protect("db", &[device.path()]);
    pair.wait_protected("db", LIMIT);
    let (name, from) = (incarnation(&pair, "db"), pair.production.log(Role::Agent).len());
    pair.production.stop(Role::Agent);
    let path = device.path().to_str().unwrap();
    let other = scratch.file("other", 8 << 20);
    std::fs::write(&other, vec![9; 8 << 20]).unwrap();
    run_ok("losetup", &["--detach", path]);
    std::fs::rename(&other, device.backing()).unwrap();
    run_ok("losetup", &[path, device.backing().to_str().unwrap()]);
    pair.production.start(Role::Agent);
    let status = pair.production.group("db").unwrap();
    assert!(status["ring"]["origin"].as_str().unwrap().contains("is not the disk that it was"), "{status:#}");
    wait_until(LIMIT, "a new ring", || pair.production.log(Role::Agent)[from..].contains("resumed=false"));
    assert_equal(&pair, "db", &[device.path()], &replicas);
    assert_ne!(incarnation(&pair, "db"), name);
}

/// The names of two disks of one size are swapped, over a boot or while the agent runs: the replica does not become the other one's.
#[test]
fn a_path_that_names_another_disk_is_refused_until_it_names_its_own() {
    require_root();
    let scratch = Scratch::memory();
    let (mine, other) = (LoopDevice::new(&scratch, "mine", 8 << 20), LoopDevice::new(&scratch, "other", 8 << 20));
    std::fs::write(other.path(), vec![9; 8 << 20]).unwrap();
    let link = scratch.join("disk");
    let name = |device: &LoopDevice| {
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(device.path(), &link).unwrap();
    };
    name(&mine);
    let mut pair = Pair::new();
    let replicas = pair.protect("db", &[&link]);
    pair.wait_protected("db", LIMIT);
    let refused = |pair: &Pair| {
        // While it begins anew it is in no list for a moment.
        wait_until(LIMIT, "the other disk is refused", || {
            pair.production.group("db").is_some_and(|status| {
                let why = status["reason"].as_str().unwrap_or_default();
                let gap = status["data"] == "gap" && status["gap_reason"] == "volume-changed";
                why.contains("another disk than the one protected") && gap
            })
        });
    };
    pair.production.stop(Role::Agent);
    run(pair.production.command(Role::Agent).arg("--unpin-all")).ok();
    name(&other);
    pair.production.start(Role::Agent);
    refused(&pair);
    name(&mine);
    pair.wait_protected("db", LIMIT);
    name(&other);
    refused(&pair);
    name(&mine);
    pair.wait_protected("db", LIMIT);
    assert_equal(&pair, "db", &[mine.path()], &replicas);
}
