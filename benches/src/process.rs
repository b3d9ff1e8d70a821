//! What a process uses, from `/proc`.

use std::collections::HashMap;
use std::time::Duration;

/// CPU time of every living thread, exact to the nanosecond; keep one from before and ask it for the difference.
#[derive(Debug)]
pub struct Threads {
    pid: u32,
    /// Nanoseconds by thread id.
    used: HashMap<String, u64>,
}

impl Threads {
    /// Now.
    #[track_caller]
    pub fn of(pid: u32) -> Self {
        let dir = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let time = |name: &str| -> Option<u64> {
            let text = std::fs::read_to_string(format!("/proc/{pid}/task/{name}/schedstat")).ok()?;
            text.split(' ').next()?.parse().ok()
        };
        let names = dir.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        Threads { pid, used: names.filter_map(|name| time(&name).map(|used| (name, used))).collect() }
    }

    /// What was used since. A thread that ended meanwhile does not count: for processes that do little.
    pub fn since(&self) -> Duration {
        let now = Threads::of(self.pid).used;
        let more = |(name, used): (&String, &u64)| used - self.used.get(name).copied().unwrap_or(0).min(*used);
        Duration::from_nanos(now.iter().map(more).sum())
    }
}

/// Resident memory of a process: the part in mapped rings, and all the rest, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    /// Pages of BPF maps: they belong to the kernel, whoever maps them.
    pub rings: u64,
    /// Everything else.
    pub beside: u64,
    /// Of that: pages of the program and its libraries, which other processes may share.
    pub files: u64,
}

impl Memory {
    /// Now.
    #[track_caller]
    pub fn of(pid: u32) -> Self {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        let mut memory = Memory::default();
        let (mut of_map, mut of_file) = (false, false);
        for line in text.lines() {
            // The head of a mapping is "from-to rights offset device inode path", its facts are "Key: value".
            let first = line.split(' ').next().unwrap_or_default();
            if first.contains('-') && !first.ends_with(':') {
                of_map = line.contains("bpf-map");
                of_file = line.contains(" /");
            } else if let Some(value) = line.strip_prefix("Rss:") {
                let bytes = value.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10;
                *(if of_map { &mut memory.rings } else { &mut memory.beside }) += bytes;
                memory.files += if of_file { bytes } else { 0 };
            } else if let Some(value) = line.strip_prefix("Anonymous:").filter(|_| of_file) {
                // Its own copies of a file's pages (relocations, data).
                memory.files -= value.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10;
            }
        }
        memory
    }
}
