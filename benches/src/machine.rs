//! On what was measured.

use serde::Serialize;
use std::collections::HashMap;
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

/// CPU time of everything on this machine that is neither a part of this bench nor of the kernel.
pub struct Others {
    ticks: u64,
    usage: Usage,
}

impl Others {
    /// So far.
    pub fn now() -> Self {
        let all: HashMap<u32, Process> = processes().map(|process| (process.pid, process)).collect();
        let supervisor = std::os::unix::process::parent_id();
        let is_ours = |process: &Process| {
            let mut chain = std::iter::successors(Some(process), |process| all.get(&process.parent));
            chain.any(|process| process.pid == supervisor)
        };
        // The kernel's threads are children of number 2.
        let foreign = all.values().filter(|process| process.pid != 2 && process.parent != 2 && !is_ours(process));
        Others { ticks: foreign.map(|process| process.ticks).sum(), usage: Usage::now() }
    }

    /// Their share of all cores since.
    pub fn percent(&self) -> f64 {
        let now = Others::now();
        100.0 * now.ticks.saturating_sub(self.ticks) as f64 / (now.usage.all - self.usage.all).max(1) as f64
    }
}

struct Process {
    pid: u32,
    parent: u32,
    /// Its own time and that of its children that have ended: so nothing is lost at an end, and nothing counted twice.
    ticks: u64,
}

fn processes() -> impl Iterator<Item = Process> {
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let ticks = fields.get(11..15)?.iter().filter_map(|field| field.parse::<u64>().ok()).sum();
        Some(Process { pid, parent: fields.get(1)?.parse().ok()?, ticks })
    })
}
