//! A pair with a line between that can be cut, a volume with a database, and an operator who brings it home.

use crate::ledger::{self, Rows};
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use varve_tests::*;

pub const LIMIT: Duration = Duration::from_secs(90);
pub const GROUP: &str = "g";
/// What the clock that dates records and the one of the clients may differ by, and a record's order from its time (two CPUs).
pub const SLACK_NS: u64 = 10_000_000;

/// More rows than that are not taken into the next round.
const ROWS_MAX: usize = 20_000;

pub fn soak() -> bool {
    std::env::var_os("VARVE_SOAK").is_some()
}

/// How often a test does it all.
pub fn rounds() -> u32 {
    let wished = std::env::var("VARVE_ROUNDS").ok().and_then(|text| text.parse().ok());
    wished.unwrap_or(if soak() { 8 } else { 1 })
}

/// A running database on a mounted device.
pub struct Database {
    // In the order in which they end.
    pub postgres: Postgres,
    mount: Mount,
}

impl Database {
    #[track_caller]
    pub fn create(scratch: &Scratch, device: &Path) -> Self {
        let mount = Mount::format(scratch, "production", Filesystem::Ext4, device);
        let postgres = Postgres::create(scratch, &mount.path().join("data"));
        ledger::create_tables(&postgres);
        Database { postgres, mount }
    }

    /// What is on a device. It recovers by itself if it was not shut down.
    #[track_caller]
    pub fn open(scratch: &Scratch, name: &str, device: &Path) -> Self {
        let mount = Mount::existing(scratch, name, device, "defaults");
        Database { postgres: Postgres::open(scratch, &mount.path().join("data")), mount }
    }

    pub fn recovered(&self) -> bool {
        self.postgres.log().contains("automatic recovery in progress")
    }

    pub fn mounted_at(&self) -> &Path {
        self.mount.path()
    }

    /// Shuts down, compares every page's checksum, unmounts.
    #[track_caller]
    pub fn stop(self) {
        self.postgres.stop();
        Postgres::check_pages(&self.mount.path().join("data"));
        self.mount.unmount();
    }

    /// Its processes end as if the power failed.
    #[track_caller]
    pub fn kill(self) {
        self.postgres.kill();
        self.mount.unmount();
    }

    /// The operator's hook has stopped and unmounted it.
    #[track_caller]
    pub fn stopped_by_hook(self) {
        self.postgres.wait_stopped();
        self.mount.unmounted_by_others();
    }
}

pub struct Bed {
    // In the order in which they end.
    pub pair: Pair,
    _recovery_disk: Option<(Mount, SlowDevice)>,
    pub line: Impair,
    pub device: LoopDevice,
    pub replica: PathBuf,
    pub rng: StdRng,
    _seed: Seed,
    pub scratch: Scratch,
    era: u32,
    names: u32,
    begun: Instant,
}

impl Bed {
    #[track_caller]
    pub fn new() -> (Self, Database) {
        Self::with_recovery(Scratch::disk(), None, Installation::new())
    }

    /// Writes take their time at the recovery side: what is said to be synced before it is, is lost in a kill.
    #[track_caller]
    pub fn with_slow_recovery() -> (Self, Database) {
        require_root();
        let scratch = Scratch::disk();
        let disk = SlowDevice::new(&scratch, "slow", 2 << 30, Duration::ZERO, Duration::from_millis(3));
        let mount = Mount::format(&scratch, "disk", Filesystem::Ext4, disk.path());
        let recovery = Installation::inside(mount.path());
        Self::with_recovery(scratch, Some((mount, disk)), recovery)
    }

    #[track_caller]
    fn with_recovery(
        scratch: Scratch,
        recovery_disk: Option<(Mount, SlowDevice)>,
        mut recovery: Installation,
    ) -> (Self, Database) {
        require_root();
        let seed = Seed::new();
        eprintln!("VARVE_SEED={}", seed.number());
        let device = LoopDevice::new(&scratch, "volume", 256 << 20);
        let database = Database::create(&scratch, device.path());
        let address = format!("127.0.0.1:{}", free_port());
        let mut production = Installation::new();
        recovery.varve(&["receiver", "init", "--listen", &address]).ok();
        recovery.start(Role::Receiver);
        let token = recovery.varve(&["host", "invite", "production", "--json"]).ok().json();
        let line = Impair::new(&address, &seed);
        production.varve(&["join", &line.address(), token["token"].as_str().unwrap()]).ok();
        production.start(Role::Agent);
        let pair = Pair { production, recovery, address };
        let replica = pair.protect(GROUP, &[device.path()]).remove(0);
        pair.wait_protected(GROUP, LIMIT);
        let rng = seed.rng();
        (
            Bed {
                pair,
                _recovery_disk: recovery_disk,
                line,
                device,
                replica,
                rng,
                _seed: seed,
                scratch,
                era: 0,
                names: 0,
                begun: Instant::now(),
            },
            database,
        )
    }

    /// What happens, and when.
    pub fn say(&self, words: &str) {
        eprintln!("{:7.2} s  {words}", self.begun.elapsed().as_secs_f64());
    }

    /// The next one's number.
    pub fn era(&mut self) -> u32 {
        self.era += 1;
        self.era
    }

    /// A name for a mount point.
    pub fn name(&mut self, word: &str) -> String {
        self.names += 1;
        format!("{word}{}", self.names)
    }

    /// A line that is some way off and not too wide, so that there is something on its way at every moment.
    pub fn some_line(&mut self) -> Conditions {
        let latency = Duration::from_millis(self.rng.random_range(3..25));
        let mbit = self.rng.random_range(40..200);
        let loss = if soak() && self.rng.random_bool(0.3) { 0.005 } else { 0.0 };
        let conditions =
            Conditions { latency, loss, queue_bytes: 512 << 10, ..Conditions::bandwidth(mbit * 1_000_000) };
        self.line.set(conditions);
        self.say(&format!("a line of {mbit} Mbit/s, {latency:?}, loss {loss}"));
        conditions
    }

    /// The line is back. Coming home over a bad one is for long runs.
    pub fn line_back(&mut self) {
        if !soak() || self.rng.random_bool(0.4) {
            self.line.set(Conditions::default());
        }
        self.line.cut(false);
        self.say("the line is back");
    }

    pub fn sleep_up_to(&mut self, milliseconds: u64) {
        std::thread::sleep(Duration::from_millis(self.rng.random_range(0..milliseconds)));
    }

    #[track_caller]
    pub fn on_recovery(&self, args: &[&str]) -> Value {
        let output = self.pair.recovery.varve(&[args, &["--json"]].concat()).ok();
        output.json_lines().pop().unwrap()
    }

    #[track_caller]
    pub fn role(&self, side: &Installation) -> String {
        side.group(GROUP).map_or(String::new(), |status| status["role"].as_str().unwrap().to_owned())
    }

    #[track_caller]
    pub fn wait_fenced(&self) {
        wait_until(LIMIT, "the old source is fenced", || self.role(&self.pair.production) == "fenced");
    }

    /// Takes the group over and opens its database: how long from the command to the first block, and to the first row.
    #[track_caller]
    pub fn take_over(&mut self, args: &[&str]) -> (Database, Value) {
        let name = self.name("recovery");
        let begin = Instant::now();
        let reply = self.on_recovery(&[&["failover", GROUP, "--yes"], args].concat());
        let device = PathBuf::from(reply["volumes"][0]["device"].as_str().expect("a device"));
        let read = std::fs::File::open(&device).and_then(|mut file| {
            use std::io::Read;
            file.read_exact(&mut [0; 4096])
        });
        read.unwrap();
        let first_block = begin.elapsed();
        let database = Database::open(&self.scratch, &name, &device);
        database.postgres.query("SELECT count(*) FROM accounts");
        self.say(&format!(
            "failover: first block after {first_block:.2?}, the database answers after {:.2?} (drained: {})",
            begin.elapsed(),
            reply["drained"]
        ));
        self.pair.recovery.varve(&["failover", "commit", GROUP, "--yes"]).ok();
        (database, reply)
    }

    /// The receiver is killed under a database that it serves; it serves again when it starts, and the database recovers. The
    /// device's link is there when the device is, and not before.
    #[track_caller]
    pub fn receiver_killed(&mut self, database: Database) -> Database {
        self.pair.recovery.kill(Role::Receiver);
        database.kill();
        self.pair.recovery.start(Role::Receiver);
        let link = self.pair.recovery.root().join(format!("run/varve/views/{GROUP}-0"));
        wait_until(LIMIT, "it is served again", || link.exists());
        let name = self.name("recovery");
        Database::open(&self.scratch, &name, &link)
    }

    /// What a database at a point of a group holds.
    #[track_caller]
    pub fn view(&mut self, group: &str, at: &str) -> Rows {
        let reply = self.on_recovery(&["view", "open", group, "--at", at, "--writable"]);
        let name = self.name("view");
        let device = PathBuf::from(reply["volumes"][0]["device"].as_str().unwrap());
        let database = Database::open(&self.scratch, &name, &device);
        let rows = ledger::read(&database.postgres);
        database.postgres.amcheck();
        database.stop();
        self.pair.recovery.varve(&["view", "close", &reply["id"].to_string()]).ok();
        rows
    }

    /// Brings home what runs at the recovery side until `quiet` has stopped it, and opens the database there.
    #[track_caller]
    pub fn go_home<T>(&mut self, args: &[&str], quiet: impl FnOnce(&mut Self) -> T) -> (Database, T) {
        let begin = Instant::now();
        let done = self.on_recovery(&[&["failback", GROUP, "--yes"], args].concat());
        let follows = begin.elapsed();
        let kept = quiet(self);
        let mut cut_over = vec!["failback", GROUP, "--cut-over", "--yes"];
        if soak() && self.rng.random_bool(0.3) {
            cut_over.push("--quick");
        }
        let home = self.on_recovery(&cut_over);
        self.say(&format!(
            "failback: {} B sent, followed after {follows:.2?}; cut-over: {} B sent, nobody could write for {} s",
            done["sent_bytes"], home["sent_bytes"], home["pause_seconds"]
        ));
        assert_eq!(home["home"], true, "{home:#}");
        // Over a bad line it takes as long as what changed since the last pass needs.
        assert!(soak() || home["pause_seconds"].as_f64().unwrap() < 15.0, "{home:#}");
        wait_until(LIMIT, "protected at home", || {
            let status = self.pair.production.group(GROUP).unwrap_or_default();
            status["role"] == "source" && status["data"] == "protected"
        });
        let name = self.name("home");
        (Database::open(&self.scratch, &name, self.device.path()), kept)
    }

    /// The database at home is protected: what it commits arrives. Ends it; the volume and the replica are equal.
    #[track_caller]
    pub fn works_at_home(&mut self, database: Database) -> ledger::Era {
        let era = self.era();
        let load = ledger::Load::start(&database.postgres, era, 2, &mut self.rng);
        load.wait_more(30);
        let era = load.finish();
        database.stop();
        self.pair.wait_applied(GROUP, LIMIT);
        assert_same(self.device.path(), &self.replica);
        era
    }

    /// Opens the database at home again, as it was left. When it becomes large it begins anew.
    #[track_caller]
    pub fn next_round(&mut self, eras: &mut Vec<ledger::Era>) -> Database {
        let name = self.name("again");
        let database = Database::open(&self.scratch, &name, self.device.path());
        let rows = ledger::read(&database.postgres);
        ledger::assert_exactly(&rows, &eras.iter().collect::<Vec<_>>(), "at home, later");
        if rows.len() > ROWS_MAX {
            ledger::empty(&database.postgres);
            eras.clear();
        }
        database
    }
}
