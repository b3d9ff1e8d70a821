//! Asking an agent over its socket, many times a second.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A connection to an agent's control socket. The agent hangs up on whoever is silent for long, so it is renewed.
pub struct Agent {
    socket: PathBuf,
    group: String,
    lines: BufReader<UnixStream>,
    asked: Instant,
}

const SILENCE_MAX: Duration = Duration::from_secs(2);

/// The facts of a group that the benches look at.
#[derive(Debug, Clone, Default)]
pub struct Group {
    /// The word of the data axis.
    pub data: String,
    /// The word of the link axis.
    pub link: String,
    /// Captured and not durable at the receiver.
    pub lag_bytes: u64,
    /// `None` before the first sync.
    pub rpo_seconds: Option<f64>,
    /// Bytes in the ring.
    pub ring_used: u64,
    /// Its size.
    pub ring_bytes: u64,
    counters: serde_json::Map<String, Value>,
    gaps: Vec<String>,
}

impl Group {
    /// A counter by its name.
    #[track_caller]
    pub fn counter(&self, name: &str) -> u64 {
        self.counters.get(name).and_then(Value::as_u64).unwrap_or_else(|| panic!("status has no counter {name}"))
    }

    /// Why the newest gaps began.
    pub fn gaps(&self, count: u64) -> &[String] {
        &self.gaps[self.gaps.len().saturating_sub(count as usize)..]
    }

    /// What must not change while everything goes well: any rise means dirty regions.
    pub fn troubles(&self) -> Vec<(&'static str, u64)> {
        ["dropped_records", "unreadable_writes", "failed_writes", "straddling_writes", "late_writes", "gaps"]
            .map(|name| (name, self.counter(name)))
            .into()
    }
}

impl Agent {
    /// Connects to the agent of the installation at `root`, for one of its groups.
    #[track_caller]
    pub fn connect(root: &Path, group: &str) -> Self {
        let socket = root.join("run/varve/agent.sock");
        let lines = open(&socket);
        Agent { socket, group: group.to_owned(), lines, asked: Instant::now() }
    }

    /// The group now.
    #[track_caller]
    pub fn group(&mut self) -> Group {
        if self.asked.elapsed() > SILENCE_MAX {
            self.lines = open(&self.socket);
        }
        self.asked = Instant::now();
        let request = json!({"command": "status", "group": self.group}).to_string() + "\n";
        self.lines.get_mut().write_all(request.as_bytes()).unwrap();
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        let mut reply: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("status ({error}): {line}"));
        let group = reply["done"]["groups"][0].take();
        assert!(group.is_object(), "no group in the answer: {line}");
        let gaps = group["gaps"].as_array().into_iter().flatten();
        Group {
            data: group["data"].as_str().unwrap().to_owned(),
            link: group["link"].as_str().unwrap().to_owned(),
            lag_bytes: group["lag_bytes"].as_u64().unwrap_or(0),
            rpo_seconds: group["rpo_seconds"].as_f64(),
            ring_used: group["ring"]["used_bytes"].as_u64().unwrap_or(0),
            ring_bytes: group["ring"]["total_bytes"].as_u64().unwrap_or(0),
            counters: group["counters"].as_object().unwrap().clone(),
            gaps: gaps.filter_map(|gap| gap["reason"].as_str().map(str::to_owned)).collect(),
        }
    }
}

#[track_caller]
fn open(socket: &Path) -> BufReader<UnixStream> {
    let stream = UnixStream::connect(socket).unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
    BufReader::new(stream)
}
