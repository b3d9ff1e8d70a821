//! The two sides, the volumes, the loads: what a cycle of the campaign is made of, and what it has to keep in mind.

use rand::Rng;
use rand::rngs::StdRng;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use varve_tests::campaign::{Client, Commits, Image, Load, LoadVolume, Op, Watcher};
use varve_tests::*;

pub const GROUP: &str = "soak";
/// Everything heals within this time, on a machine that is shared.
pub const LIMIT: Duration = Duration::from_secs(180);
/// Written once, and then only by those who change a replica behind its back.
pub const KEPT_BYTES: u64 = MIB;
const A_BYTES: u64 = 48 * MIB;
const B_BYTES: u64 = 16 * MIB;
const FS_BYTES: u64 = 256 * MIB;
/// The receiver's disk.
const SMALL_BYTES: u64 = 2 * GIB;
const PACE: u64 = 8 << 20;

/// A bookmark, and what the volumes held there.
pub struct Moment {
    pub name: String,
    pub image: Image,
    pub time: String,
    pub durable: bool,
    /// Commits acknowledged before it was asked for, and asked for when it was there.
    pub commits: (u64, u64),
    pub round: u32,
    pub taken: Instant,
}

/// What the faults of a round excuse.
#[derive(Debug, Default)]
pub struct Excuse {
    pub ring_full: bool,
    pub failed_write: bool,
    pub repair: bool,
    pub window: bool,
    /// Verifies look at regions, too.
    pub verify: bool,
    /// Whole-volume comparisons that must have been.
    pub comparisons: u64,
}

/// What is counted over a cycle.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    pub moments: u64,
    pub refused: u64,
    pub points: u64,
    pub cuts: u64,
    pub in_gap: u64,
    pub databases: u64,
    pub comparisons: u64,
    pub expired: u64,
    pub looks: u64,
    pub written: u64,
}

impl Tally {
    pub fn add(&mut self, other: &Tally) {
        self.moments += other.moments;
        self.refused += other.refused;
        self.points += other.points;
        self.cuts += other.cuts;
        self.in_gap += other.in_gap;
        self.databases += other.databases;
        self.comparisons += other.comparisons;
        self.expired += other.expired;
        self.looks += other.looks;
        self.written += other.written;
    }
}

/// From the top to the ground: in this order it is taken down.
pub struct Bench {
    pub watcher: Watcher,
    pub commits: Commits,
    pub load: Load,
    pub mount: Mount,
    pub pair: Pair,
    pub link: Impair,
    pub devices: Vec<LoopDevice>,
    pub full: FullTmpfs,
    pub small: Mount,
    _small_device: LoopDevice,
    pub scratch: Scratch,
    pub replicas: Vec<PathBuf>,
    pub ring_bytes: u64,
    pub journal_bytes: u64,
    pub moments: Vec<Moment>,
    pub excuse: Excuse,
    pub tally: Tally,
    /// Sectors of the first replica that were changed behind its back, and when that was mended.
    pub tainted: Vec<(std::ops::Range<u64>, Instant)>,
    /// Bytes on the volumes when nothing waited to be sent.
    drained_at: u64,
    /// The receiver could not be reached since then.
    away_since: bool,
    pub round: u32,
    pub known_gaps: Vec<Value>,
    pub known_streams: Vec<Value>,
    pub written_before: u64,
}

impl Bench {
    /// Everything stands, and the first sync is done.
    pub fn new(seed: u64, rng: &mut StdRng) -> Self {
        require_root();
        let scratch = Scratch::disk();
        let small_device = LoopDevice::new(&scratch, "small", SMALL_BYTES);
        let small = Mount::format(&scratch, "rfs", Filesystem::Ext4, small_device.path());
        let full = FullTmpfs::new(&scratch, "full", B_BYTES + 8 * MIB);
        let a = LoopDevice::new(&scratch, "a", A_BYTES);
        let backing = full.path().join("b");
        std::fs::File::create(&backing).unwrap().set_len(B_BYTES).unwrap();
        let b = LoopDevice::over(&backing, LoopOptions::default());
        let fs = LoopDevice::new(&scratch, "fs", FS_BYTES);
        let mount = Mount::format(&scratch, "mnt", Filesystem::Ext4, fs.path());
        let volumes = vec![
            LoadVolume { path: a.path().to_owned(), bytes: A_BYTES, kept_bytes: KEPT_BYTES },
            LoadVolume { path: b.path().to_owned(), bytes: B_BYTES, kept_bytes: 0 },
        ];
        let ring_mib = [16, 32, 64][rng.random_range(0..3)];
        let journal_mib = [0, 64, 256][rng.random_range(0..3)];
        let load = Load::start(volumes, seed);
        load.pace(PACE);
        let commits = Commits::start(&scratch, &mount);
        let (pair, link) = pair(&small, ring_mib, journal_mib, &Seed::of(seed));
        let devices = vec![a, b, fs];
        let paths: Vec<&Path> = devices.iter().map(LoopDevice::path).collect();
        let replicas = pair.protect(GROUP, &paths);
        let watcher = Watcher::start(pair.production.client(), GROUP);
        pair.wait_protected(GROUP, LIMIT);
        pair.recovery.varve(&["retention", GROUP, "--bytes", "600MiB", "--yes"]).ok();
        println!("ring {ring_mib} MiB, journal {journal_mib} MiB");
        let mut bench = Bench {
            watcher,
            commits,
            load,
            mount,
            pair,
            link,
            devices,
            full,
            small,
            _small_device: small_device,
            scratch,
            replicas,
            ring_bytes: ring_mib * MIB,
            journal_bytes: journal_mib * MIB,
            moments: Vec::new(),
            excuse: Excuse::default(),
            tally: Tally::default(),
            tainted: Vec::new(),
            drained_at: 0,
            away_since: false,
            round: 0,
            known_gaps: Vec::new(),
            known_streams: Vec::new(),
            written_before: 0,
        };
        bench.written_before = bench.written();
        let points = bench.points();
        bench.known_gaps = points["gaps"].as_array().unwrap().clone();
        bench.known_streams = streams(&points);
        bench.watcher.take();
        bench
    }

    /// A round begins: nothing is excused yet, the log of what is written begins anew.
    pub fn begin(&mut self, round: u32, rng: &mut StdRng) {
        self.round = round;
        self.excuse = Excuse::default();
        self.load.pace(PACE + rng.random_range(0..8 << 20));
        let load = &self.load;
        load.quiet(|_| load.forget());
        self.note_drained();
    }

    /// Bytes that the kernel says were written to the volumes: by the load, the database, the file system.
    pub fn written(&self) -> u64 {
        let sectors = |device: &LoopDevice| -> u64 {
            let name = device.path().file_name().unwrap().to_string_lossy().into_owned();
            let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
            stat.split_whitespace().nth(6).unwrap().parse().unwrap()
        };
        self.devices.iter().map(sectors).sum::<u64>() * 512
    }

    /// Remembers how much was written when nothing waits to be sent.
    pub fn note_drained(&mut self) {
        let written = self.written();
        let group = self.pair.production.group(GROUP);
        if group.is_some_and(|group| group["lag_bytes"].as_u64().is_some_and(|lag| lag < MIB)) {
            (self.drained_at, self.away_since) = (written, false);
        }
    }

    /// The receiver was not there for a while: is a full ring excused?
    pub fn receiver_was_away(&mut self) {
        self.away_since = true;
        let waiting = self.written() - self.drained_at;
        self.excuse.ring_full |= match self.journal_bytes {
            0 => waiting * 100 >= self.ring_bytes * 45,
            journal => waiting * 100 >= journal * 70,
        };
    }

    /// It is there again and has everything: what was written until then counts.
    pub fn receiver_is_back(&mut self) {
        if self.away_since {
            self.receiver_was_away();
        }
    }

    /// Kills or stops the agent, waits, starts it: a ring that half of it would fill is not excused.
    pub fn agent_away(&mut self, kill: bool, away: Duration, between: impl FnOnce(&mut Pair)) {
        let before = self.written();
        match kill {
            true => self.pair.production.kill(Role::Agent),
            false => self.pair.production.stop(Role::Agent),
        }
        between(&mut self.pair);
        std::thread::sleep(away);
        self.pair.production.start(Role::Agent);
        self.excuse.ring_full |= (self.written() - before) * 100 >= self.ring_bytes * 45;
        self.receiver_was_away();
    }

    /// A bookmark, with what the volumes hold at it. `None`: the product refused to promise it.
    pub fn moment(&mut self, name: &str) -> bool {
        let name = format!("r{}-{name}", self.round);
        let (client, acknowledged): (Client, u64) = (self.pair.production.client(), self.commits.acknowledged());
        let (out, image) =
            self.load.quiet(|image| (client.varve(&["bookmark", GROUP, &name, "--json"]), image.clone()));
        self.note_moment(name, &out, image, acknowledged)
    }

    pub fn note_moment(&mut self, name: String, out: &Output, image: Image, acknowledged: u64) -> bool {
        match out.code {
            0 => {}
            // In a gap; or nobody is there to set it; or the ring is full.
            1 | 3 | 4 => {
                self.tally.refused += 1;
                return false;
            }
            _ => panic!("bookmark {name}: {out:?}"),
        }
        let reply = out.json();
        self.tally.moments += 1;
        self.moments.push(Moment {
            name,
            image,
            time: reply["time"].as_str().unwrap().to_owned(),
            durable: reply["durable"] == true,
            commits: (acknowledged, self.commits.issued()),
            round: self.round,
            taken: Instant::now(),
        });
        true
    }

    /// What the receiver knows of the timeline.
    #[track_caller]
    pub fn points(&self) -> Value {
        self.pair.recovery.varve(&["points", GROUP, "--json"]).ok().json()
    }

    /// The log of this round.
    pub fn log(&self) -> (Image, Vec<Op>) {
        self.load.log()
    }
}

/// The names of the streams that reach into the window.
pub fn streams(points: &Value) -> Vec<Value> {
    points["stretches"].as_array().unwrap().iter().map(|stretch| stretch["incarnation"].clone()).collect()
}

/// A pair whose receiver has a small disk, and whose link can be cut.
fn pair(small: &Mount, ring_mib: u64, journal_mib: u64, seed: &Seed) -> (Pair, Impair) {
    let address = format!("127.0.0.1:{}", free_port());
    let mut recovery = Installation::inside(small.path());
    recovery.varve(&["receiver", "init", "--listen", &address]).ok();
    let file = recovery.root().join("etc/varve/receiver.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("landing_segment_mib = 8\nlanding_max_mib = 64\nhistory_layer_mib = 8\n{text}"))
        .unwrap();
    recovery.start(Role::Receiver);
    let token = recovery.varve(&["host", "invite", "production", "--json"]).ok().json();
    let mut production = Installation::new();
    std::fs::create_dir_all(production.root().join("etc/varve")).unwrap();
    let config = format!("ring_mib = {ring_mib}\njournal_max_mib = {journal_mib}\nlagging_seconds = 2\n");
    std::fs::write(production.root().join("etc/varve/agent.toml"), config).unwrap();
    let link = Impair::new(&address, seed);
    production.varve(&["join", &link.address(), token["token"].as_str().unwrap()]).ok();
    production.start(Role::Agent);
    (Pair { production, recovery, address }, link)
}
