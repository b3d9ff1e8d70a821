//! A guest that is a production host, and a receiver outside.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use varve_tests::*;

pub const GROUP: &str = "vm";
/// Everything heals within this time in a guest without KVM, on a machine that is shared.
pub const LIMIT: Duration = Duration::from_secs(300);

/// `/dev/vda` has the agent's state, `/dev/vdb` is the volume.
pub struct Bed {
    pub recovery: Installation,
    pub machine: Machine,
    pub volume: PathBuf,
    pub replica: PathBuf,
    pub scratch: Scratch,
    address: String,
}

impl Bed {
    /// With an ext4 volume of so many bytes, and more disks behind it.
    #[track_caller]
    pub fn new(series: &str, bytes: u64, more: &[(&str, u64)]) -> Self {
        Self::with(series, bytes, more, &["sqlite3", "dmsetup"], "")
    }

    /// The same with other programs and more modules.
    #[track_caller]
    pub fn with(series: &str, bytes: u64, more: &[(&str, u64)], programs: &[&str], modules: &str) -> Self {
        let scratch = Scratch::disk();
        let (state, volume) = (scratch.file("state.img", GIB), scratch.file("volume.img", bytes));
        Filesystem::Ext4.make(&state);
        Filesystem::Ext4.make(&volume);
        let more: Vec<PathBuf> = more.iter().map(|(name, bytes)| scratch.file(name, *bytes)).collect();
        let mut disks = vec![state.as_path(), volume.as_path()];
        disks.extend(more.iter().map(PathBuf::as_path));
        let machine = Machine::with(&scratch, series, programs, &disks, modules, "1G");
        let port = free_port();
        let mut recovery = Installation::new();
        recovery.varve(&["receiver", "init", "--listen", &format!("127.0.0.1:{port}")]).ok();
        recovery.start(Role::Receiver);
        let replica = recovery.scratch().join("replica.img");
        Bed { recovery, machine, volume, replica, scratch, address: format!("10.0.2.2:{port}") }
    }

    /// Power on, state where it belongs, agent running as soon as it is enrolled.
    #[track_caller]
    pub fn boot(&self) -> Guest {
        let mut guest = self.machine.boot();
        self.settle_in(&mut guest);
        guest
    }

    /// The rest of a boot.
    #[track_caller]
    pub fn settle_in(&self, guest: &mut Guest) {
        guest.shell(
            "mkdir /mnt/state /mnt/volume && mount /dev/vda /mnt/state && mkdir -p /mnt/state/etc /mnt/state/lib",
        );
        guest.shell("ln -s /mnt/state/etc /etc/varve && ln -s /mnt/state/lib /var/lib/varve");
        if guest.shell_within(LIMIT, "[ -e /etc/varve/agent.toml ]").code == 0 {
            guest.start_agent();
        }
    }

    /// The first boot: enrols.
    #[track_caller]
    pub fn enrol(&self) -> Guest {
        let mut guest = self.boot();
        let token = self.recovery.varve(&["host", "invite", "guest", "--json"]).ok().json();
        guest.shell(&format!("varve join {} {}", self.address, token["token"].as_str().unwrap()));
        guest.start_agent();
        guest
    }

    #[track_caller]
    pub fn protect(&self, guest: &mut Guest, volume: &str) {
        guest.shell(&format!("varve protect {GROUP} {volume} --replica {}", self.replica.display()));
    }

    /// The last number that was said to be committed.
    pub fn committed(&self) -> u64 {
        let said = self.machine.said("records");
        // The last line may be cut off.
        let lines = said.rsplit_once('\n').map_or("", |(whole, _)| whole).lines();
        lines.filter_map(|line| line.trim().strip_prefix("committed ")?.parse().ok()).max().unwrap_or(0)
    }

    /// Waits until more numbers are committed and what is captured by then is acknowledged; returns the last number before that.
    #[track_caller]
    pub fn acknowledged(&self, guest: &mut Guest) -> u64 {
        let before = self.committed();
        wait_until(LIMIT, "the database commits", || self.committed() > before + 3);
        let committed = self.committed();
        let captured = position(&guest.group(GROUP)["captured"]);
        wait_until(LIMIT, "the receiver acknowledges", || {
            let group = self.recovery.group(GROUP).unwrap();
            let durable = position(&group["durable"]);
            durable.0 == captured.0 && durable.1 >= captured.1
        });
        committed
    }

    /// Waits until the agent calls the group protected; returns how long it took.
    #[track_caller]
    pub fn wait_protected(&self, guest: &mut Guest) -> Duration {
        let start = Instant::now();
        loop {
            let group = guest.group(GROUP);
            if group["data"] == "protected" {
                return start.elapsed();
            }
            assert!(start.elapsed() < LIMIT, "not protected after {LIMIT:?}: {group:#}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Waits until all that was captured is in the replica. Nobody may be writing.
    #[track_caller]
    pub fn wait_applied(&self, guest: &mut Guest) {
        self.wait_protected(guest);
        let captured = position(&guest.group(GROUP)["captured"]);
        wait_until(LIMIT, "the replica catches up", || {
            let applied = position(&self.recovery.group(GROUP).unwrap()["applied"]);
            applied.0 == captured.0 && applied.1 >= captured.1
        });
    }

    /// A barrier, and the machine is off. The volume's file must be equal to the replica.
    #[track_caller]
    pub fn shut_down_and_compare(&self, mut guest: Guest) {
        self.wait_applied(&mut guest);
        guest.stop_agent();
        guest.shell("umount /mnt/state");
        guest.power_off();
        assert_same(&self.volume, &self.replica);
    }

    /// A point, as a file.
    #[track_caller]
    pub fn restore(&self, at: &str) -> PathBuf {
        let to = self.scratch.join("restored.img");
        let _ = std::fs::remove_file(&to);
        let path = to.to_str().unwrap();
        let out =
            self.recovery.varve(&["restore", GROUP, "--at", at, "--volume", "0", "--to", path, "--yes", "--json"]);
        let reply = out.ok().json_lines().pop().unwrap();
        assert_eq!(reply["verified"], true, "{reply:#}");
        to
    }

    #[track_caller]
    pub fn points(&self) -> Value {
        self.recovery.varve(&["points", GROUP, "--json"]).ok().json()
    }

    /// Mounts an image as a host would after a crash, and looks into the database: whole, all numbers up to the largest,
    /// which is returned.
    #[track_caller]
    pub fn records(&self, image: &Path) -> u64 {
        let copy = self.scratch.join("looked-into.img");
        run_ok("cp", &[Path::new("--sparse=always"), image, &copy]);
        let device = LoopDevice::over(&copy, LoopOptions::default());
        let mount = Mount::existing(&self.scratch, "look", device.path(), "defaults");
        let sql = "PRAGMA integrity_check; SELECT count(*), min(number), max(number) FROM record";
        let out = run_ok("sqlite3", &[mount.path().join("db").to_str().unwrap(), sql]);
        mount.unmount();
        Filesystem::Ext4.check(device.path()).unwrap();
        let (check, numbers) = out.split_once('\n').unwrap_or_else(|| panic!("sqlite3 says: {out}"));
        let numbers: Vec<u64> = numbers.split('|').map(|number| number.parse().unwrap()).collect();
        assert_eq!((check, numbers[0], numbers[1]), ("ok", numbers[2], 1), "count, least, largest: {numbers:?}");
        numbers[2]
    }
}

/// `incarnation:offset`.
#[track_caller]
pub fn position(value: &Value) -> (String, u64) {
    let (incarnation, offset) = value.as_str().unwrap_or("-:0").rsplit_once(':').unwrap();
    (incarnation.to_owned(), offset.parse().unwrap())
}
