//! The two sides, the volumes, the loads: what a cycle of the campaign is made of, and what it has to keep in mind.

use rand::Rng;
use rand::rngs::StdRng;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use varve_tests::campaign::{Checked, Checking, Client, Commits, Image, Load, LoadVolume, Op, SECTOR, Watcher};
use varve_tests::*;

pub const GROUP: &str = "soak";
/// Everything heals within this time, on a machine that is shared.
pub const LIMIT: Duration = Duration::from_secs(180);
/// Written once, and then only by those who change a replica behind its back.
pub const KEPT_BYTES: u64 = MIB;
const A_BYTES: u64 = 48 * MIB;
/// Sectors of the first volume that the load writes to.
pub const WRITTEN_SECTORS: u64 = (A_BYTES - KEPT_BYTES) / SECTOR as u64;
const B_BYTES: u64 = 16 * MIB;
const C_BYTES: u64 = 8 * MIB;
const CHECKED_BYTES: u64 = 32 * MIB;
const FS_BYTES: u64 = 256 * MIB;
/// The receiver's disk.
const SMALL_BYTES: u64 = 2 * GIB;
const PACE: u64 = 8 << 20;

/// Volumes that the load writes to: the first ones.
pub const LOADED: usize = 3;
/// The one that fio writes to.
pub const CHECKED: usize = LOADED;
/// The one with the file system, which is the last.
pub const MOUNTED: usize = CHECKED + 1;
/// A medium that takes writes again fails reads for so long still.
const UNREADABLE_LONGER: Duration = Duration::from_millis(300);
/// So much a volume may grow in a cycle.
const GROWTH_MAX: u64 = 8 * MIB;

/// A bookmark, and what the volumes held there.
pub struct Moment {
    pub name: String,
    pub image: Image,
    /// What fio knows of its volume, which it wrote nothing to at that time.
    pub checked: Option<Checked>,
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
    pub grown: bool,
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
    /// Blocks of points that fio found as it had left them.
    pub checked: u64,
    pub failed_writes: u64,
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
        self.checked += other.checked;
        self.failed_writes += other.failed_writes;
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
    pub checking: Option<Checking>,
    pub mount: Mount,
    pub pair: Pair,
    pub link: Impair,
    /// All volumes.
    pub devices: Vec<PathBuf>,
    /// Those that can grow: the first one and the last.
    growing: [(usize, LoopDevice); 2],
    _steady: [LoopDevice; 2],
    pub failing: Failing,
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
    /// Events that the agent is to believe the kernel has skipped.
    missed: u64,
    /// Bytes on the volumes when nothing waited to be sent.
    drained_at: u64,
    /// How often completions had gone unseen when the round began.
    unseen_before: usize,
    /// The receiver could not be reached since then.
    away_since: bool,
    pub round: u32,
    pub known_gaps: Vec<Value>,
    pub known_streams: Vec<Value>,
    pub written_before: u64,
}

/// A volume whose reads and writes fail while somebody wants it.
pub struct Failing {
    device: SlowDevice,
    writes: PathBuf,
    reads: PathBuf,
}

impl Failing {
    fn new(scratch: &Scratch) -> Self {
        let [writes, reads] = ["writes-fail", "reads-fail"].map(|name| scratch.join(name));
        let mut parameters = Vec::new();
        for (way, trigger) in [("pwrite", &writes), ("zero", &writes), ("trim", &writes), ("pread", &reads)] {
            parameters.push(format!("error-{way}=EIO"));
            parameters.push(format!("error-{way}-rate=100%"));
            parameters.push(format!("error-{way}-file={}", trigger.display()));
        }
        let parameters: Vec<&str> = parameters.iter().map(String::as_str).collect();
        let device = SlowDevice::with_filters(scratch, "c", C_BYTES, &["error"], &parameters);
        Failing { device, writes, reads }
    }

    /// Fails all writes for a while; the second half of it reads, too.
    pub fn fail(&self, reads: bool, time: Duration) {
        std::fs::write(&self.writes, "").unwrap();
        std::thread::sleep(time / 2);
        if reads {
            std::fs::write(&self.reads, "").unwrap();
        }
        std::thread::sleep(time / 2);
        std::fs::remove_file(&self.writes).unwrap();
        if reads {
            // Last: what has failed cannot be read for a moment yet.
            std::thread::sleep(UNREADABLE_LONGER);
            std::fs::remove_file(&self.reads).unwrap();
        }
    }
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
        let failing = Failing::new(&scratch);
        let checked = LoopDevice::new(&scratch, "checked", CHECKED_BYTES);
        let fs = LoopDevice::new(&scratch, "fs", FS_BYTES);
        let mount = Mount::format(&scratch, "mnt", Filesystem::Ext4, fs.path());
        let volumes = vec![
            LoadVolume { path: a.path().to_owned(), bytes: A_BYTES, kept_bytes: KEPT_BYTES },
            LoadVolume { path: b.path().to_owned(), bytes: B_BYTES, kept_bytes: 0 },
            LoadVolume { path: failing.device.path().to_owned(), bytes: C_BYTES, kept_bytes: 0 },
        ];
        let ring_mib = [16, 32, 64][rng.random_range(0..3)];
        let journal_mib = [0, 64, 256][rng.random_range(0..3)];
        let load = Load::start(volumes, seed);
        load.pace(PACE);
        let commits = Commits::start(&scratch, &mount);
        let (pair, link) = pair(&small, ring_mib, journal_mib, &Seed::of(seed), &missed_file(&scratch));
        let paths = [a.path(), b.path(), failing.device.path(), checked.path(), fs.path()];
        let devices = paths.map(Path::to_owned).into();
        let replicas = pair.protect(GROUP, &paths);
        let watcher = Watcher::start(pair.production.client(), GROUP);
        pair.wait_protected(GROUP, LIMIT);
        pair.recovery.varve(&["retention", GROUP, "--bytes", "600MiB", "--yes"]).ok();
        println!("ring {ring_mib} MiB, journal {journal_mib} MiB");
        let mut bench = Bench {
            watcher,
            commits,
            load,
            checking: None,
            mount,
            pair,
            link,
            devices,
            growing: [(0, a), (MOUNTED, fs)],
            _steady: [b, checked],
            failing,
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
            missed: 0,
            drained_at: 0,
            unseen_before: 0,
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
        self.unseen_before = self.unseen_count();
        self.note_drained();
        let device = &self.devices[CHECKED];
        self.checking = Some(Checked::start(&self.scratch, device, CHECKED_BYTES, rng.random::<u32>().into()));
    }

    fn unseen_count(&self) -> usize {
        self.pair.production.log(Role::Agent).matches("completions went unseen").count()
    }

    /// Whether the agent has said in this round that it missed the end of writes.
    pub fn unseen_completions(&self) -> bool {
        self.unseen_count() > self.unseen_before
    }

    /// Bytes that the kernel says were written to the volumes: by the load, the database, the file system.
    pub fn written(&self) -> u64 {
        let sectors = |device: &PathBuf| -> u64 {
            let name = device.file_name().unwrap().to_string_lossy().into_owned();
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
    pub fn agent_away(&mut self, kill: bool, away: Duration, between: impl FnOnce(&mut Bench)) {
        let before = self.written();
        match kill {
            true => self.pair.production.kill(Role::Agent),
            false => self.pair.production.stop(Role::Agent),
        }
        between(self);
        std::thread::sleep(away);
        self.pair.production.start(Role::Agent);
        self.excuse.ring_full |= (self.written() - before) * 100 >= self.ring_bytes * 45;
        self.receiver_was_away();
    }

    /// A write to the first volume that no capture can have seen, and the agent hears that there was one.
    pub fn unseen(&mut self, from: u64, sectors: u64) {
        self.missed += 1;
        let file = missed_file(&self.scratch);
        self.load.unseen(0, from, sectors, self.growing[0].1.backing(), || {
            let new = file.with_extension("new");
            std::fs::write(&new, self.missed.to_string()).unwrap();
            std::fs::rename(new, file).unwrap();
        });
    }

    /// So many unseen writes were there up to now.
    pub fn missed(&self) -> u64 {
        self.missed
    }

    /// The first volume or the last becomes larger; `false`: it has become large enough.
    pub fn grow(&mut self, last: bool, sectors: u64) -> bool {
        let (volume, device) = &self.growing[usize::from(last)];
        let (then, now) = (if last { FS_BYTES } else { A_BYTES }, size_bytes(device.path()));
        let bytes = now + sectors * SECTOR as u64;
        if bytes > then + GROWTH_MAX {
            return false;
        }
        self.excuse.grown = true;
        if last {
            // Its file system stays as it is: to enlarge it while it is mounted takes CAP_SYS_RESOURCE, which root of a container
            // has not.
            device.resize(bytes);
        } else {
            self.load.grow(*volume, sectors, || device.resize(bytes));
        }
        true
    }

    /// A bookmark, with what the volumes hold at it. `None`: the product refused to promise it.
    pub fn moment(&mut self, name: &str) -> bool {
        let name = format!("r{}-{name}", self.round);
        let (client, acknowledged): (Client, u64) = (self.pair.production.client(), self.commits.acknowledged());
        let (out, image) =
            self.load.quiet(|image| (client.varve(&["bookmark", GROUP, &name, "--json"]), image.clone()));
        self.note_moment(name, &out, image, None, acknowledged)
    }

    pub fn note_moment(
        &mut self,
        name: String,
        out: &Output,
        image: Image,
        checked: Option<Checked>,
        acknowledged: u64,
    ) -> bool {
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
            checked,
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

/// Where the agent looks for how many events were skipped (agent/src/misses.rs).
fn missed_file(scratch: &Scratch) -> PathBuf {
    scratch.join("missed")
}

/// A pair whose receiver has a small disk, and whose link can be cut.
fn pair(small: &Mount, ring_mib: u64, journal_mib: u64, seed: &Seed, missed: &Path) -> (Pair, Impair) {
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
    production.set_env("VARVE_MISSED", missed.to_str().unwrap());
    production.start(Role::Agent);
    (Pair { production, recovery, address }, link)
}
