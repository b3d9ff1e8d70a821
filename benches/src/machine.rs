//! On what was measured.

use serde::Serialize;
use std::fmt::Write as _;
use std::process::Command;
use std::time::Duration;

use varve_tests::run;

/// Facts that decide what the figures mean.
#[derive(Serialize)]
pub struct Facts {
    date: String,
    commit: String,
    kernel: String,
    cpu: String,
    cores: usize,
    memory_gib: u64,
    load_at_start: String,
    socket_buffers_kib: String,
    fio: String,
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

fn say(program: &str, args: &[&str]) -> String {
    run(Command::new(program).args(args)).stdout.trim().to_owned()
}

fn field(text: &str, key: &str) -> String {
    let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
    line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
}

impl Facts {
    /// Asks the system.
    pub fn gather() -> Self {
        let source = env!("CARGO_MANIFEST_DIR");
        let mut commit = say("git", &["-C", source, "rev-parse", "--short=10", "HEAD"]);
        if !say("git", &["-C", source, "status", "--porcelain", "--untracked-files=no"]).is_empty() {
            commit += " with uncommitted changes";
        }
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kib: u64 = memory.split(' ').next().and_then(|kib| kib.parse().ok()).unwrap_or(0);
        let buffers = ["rmem_max", "wmem_max"].map(|name| {
            let bytes: u64 = read(&format!("/proc/sys/net/core/{name}")).parse().unwrap_or(0);
            format!("{name} {}", bytes >> 10)
        });
        Facts {
            date: say("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
            commit,
            kernel: say("uname", &["-r"]),
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_gib: kib.div_ceil(1 << 20),
            load_at_start: read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" "),
            socket_buffers_kib: buffers.join(", "),
            fio: say("fio", &["--version"]),
        }
    }

    /// For the head of the table.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        writeln!(
            text,
            "{} · commit {} · kernel {} · {} cores of {} · {} GiB · load at start {} · socket buffers (KiB): {} · {}",
            self.date,
            self.commit,
            self.kernel,
            self.cores,
            self.cpu,
            self.memory_gib,
            self.load_at_start,
            self.socket_buffers_kib,
            self.fio
        )
        .unwrap();
        text
    }
}

/// What all cores have done so far.
pub struct Usage {
    all: u64,
    idle: u64,
}

impl Usage {
    /// Now.
    pub fn now() -> Self {
        let line = read("/proc/stat").lines().next().unwrap_or_default().to_owned();
        let ticks: Vec<u64> = line.split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
        // user nice system idle iowait irq softirq steal; guest time is in user's already.
        Usage { all: ticks.iter().take(8).sum(), idle: ticks[3] + ticks[4] }
    }

    /// How much of all cores was used since.
    pub fn busy_percent(&self) -> f64 {
        let now = Usage::now();
        100.0 * (1.0 - (now.idle - self.idle) as f64 / (now.all - self.all).max(1) as f64)
    }
}

/// How much of all cores is used during a second in which this program does nothing.
pub fn busy_percent() -> f64 {
    let before = Usage::now();
    std::thread::sleep(Duration::from_secs(1));
    before.busy_percent()
}
