//! A pair with a bad line between, a volume, a writer that can be held still, and the judge.

use rand::Rng;
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use varve_tests::*;

pub const LIMIT: Duration = Duration::from_secs(90);
pub const GROUP: &str = "line";
/// An answer or a write that waits for the line waits longer; one that does not is done in milliseconds, and the disk of a
/// busy machine takes its share.
pub const ANSWER_MAX: Duration = Duration::from_secs(4);
pub const HELD: Duration = Duration::from_secs(4);
/// Longer than a connection without a sign of life lasts.
pub const SILENCE: Duration = Duration::from_secs(13);

pub fn soak() -> bool {
    std::env::var_os("VARVE_SOAK").is_some()
}

/// Writes at random, at a rate; while it is held, nothing is in flight.
pub struct Writer {
    gate: Arc<Mutex<()>>,
    stop: Arc<AtomicBool>,
    rate: Arc<AtomicU64>,
    slowest: Arc<Mutex<Duration>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Writer {
    pub fn start(path: &Path, bytes: u64, seed: &Seed, rate: u64) -> Self {
        let file = OpenOptions::new().write(true).custom_flags(nix::libc::O_DIRECT).open(path).unwrap();
        let (gate, stop, slowest) = (Arc::<Mutex<()>>::default(), Arc::<AtomicBool>::default(), Arc::default());
        let rate = Arc::new(AtomicU64::new(rate));
        let mut rng = seed.rng();
        let (gates, stops, rates, slow) = (gate.clone(), stop.clone(), rate.clone(), Arc::clone(&slowest));
        let thread = std::thread::spawn(move || {
            let mut buffer = Aligned::new(128 << 10, 0);
            while !stops.load(Ordering::Relaxed) {
                let length = rng.random_range(1..=32usize) * 4096;
                rng.fill(&mut buffer[..length]);
                let at = rng.random_range(0..=(bytes as usize - length) / 4096) * 4096;
                {
                    let _open = gates.lock().unwrap();
                    write(&file, &buffer[..length], at as u64, &slow);
                }
                let rate = rates.load(Ordering::Relaxed).max(1);
                std::thread::sleep(Duration::from_secs_f64(length as f64 / rate as f64));
            }
        });
        Writer { gate, stop, rate, slowest, thread: Some(thread) }
    }

    pub fn set_rate(&self, bytes_per_s: u64) {
        self.rate.store(bytes_per_s, Ordering::Relaxed);
    }

    /// The longest that a write took.
    pub fn slowest(&self) -> Duration {
        *self.slowest.lock().unwrap()
    }

    pub fn held<T>(&self, inside: impl FnOnce() -> T) -> T {
        let _shut = self.gate.lock().unwrap();
        inside()
    }

    pub fn stop(mut self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        self.slowest()
    }
}

fn write(file: &File, bytes: &[u8], at: u64, slowest: &Mutex<Duration>) {
    let begun = Instant::now();
    file.write_all_at(bytes, at).unwrap();
    let mut slowest = slowest.lock().unwrap();
    *slowest = begun.elapsed().max(*slowest);
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub struct Bed {
    // In the order in which they end.
    pub pair: Pair,
    pub line: Impair,
    pub device: LoopDevice,
    pub replica: PathBuf,
    bytes: u64,
    bookmarks: Vec<(String, String)>,
    /// Captured, and sent as stream: before the test began.
    base: (u64, u64),
    /// What may be sent again, by what was not acknowledged when sessions ended.
    allowed: u64,
    gaps: usize,
    pub seed: Seed,
    _scratch: Scratch,
}

impl Bed {
    pub fn new(bytes: u64, agent_config: &str) -> Self {
        Self::with_recovery(bytes, agent_config, Installation::new())
    }

    pub fn with_recovery(bytes: u64, agent_config: &str, mut recovery: Installation) -> Self {
        require_root();
        let (scratch, seed) = (Scratch::memory(), Seed::new());
        let device = LoopDevice::new(&scratch, "volume", bytes);
        let address = format!("127.0.0.1:{}", free_port());
        recovery.varve(&["receiver", "init", "--listen", &address]).ok();
        recovery.start(Role::Receiver);
        let token = recovery.varve(&["host", "invite", "production", "--json"]).ok().json();
        let mut production = Installation::new();
        std::fs::create_dir_all(production.root().join("etc/varve")).unwrap();
        let config = format!("alert_no_ack_seconds = 5\nlagging_seconds = 2\n{agent_config}");
        std::fs::write(production.root().join("etc/varve/agent.toml"), config).unwrap();
        let line = Impair::new(&address, &seed);
        production.varve(&["join", &line.address(), token["token"].as_str().unwrap()]).ok();
        production.start(Role::Agent);
        let pair = Pair { production, recovery, address };
        let replica = pair.protect(GROUP, &[device.path()]).remove(0);
        pair.wait_protected(GROUP, LIMIT);
        pair.wait_applied(GROUP, LIMIT);
        let mut bed = Bed {
            pair,
            line,
            device,
            replica,
            bytes,
            bookmarks: Vec::new(),
            base: (0, 0),
            allowed: 0,
            gaps: 0,
            seed,
            _scratch: scratch,
        };
        bed.gaps = bed.gaps_known().len();
        bed.new_base();
        bed
    }

    pub fn writer(&self, rate: u64) -> Writer {
        Writer::start(self.device.path(), self.bytes, &self.seed, rate)
    }

    #[track_caller]
    pub fn status(&self) -> Value {
        self.pair.production.group(GROUP).expect("the agent answers and knows the group")
    }

    #[track_caller]
    pub fn counter(&self, name: &str) -> u64 {
        self.status()["counters"][name].as_u64().unwrap_or_else(|| panic!("no counter {name}"))
    }

    pub fn sessions(&self) -> u64 {
        self.counter("sessions")
    }

    pub fn rpo(&self) -> f64 {
        self.status()["rpo_seconds"].as_f64().unwrap_or(0.0)
    }

    pub fn alerts(&self, side: &Installation) -> Vec<String> {
        let status = side.group(GROUP).unwrap_or_default();
        let alerts = status["alerts"].as_array().cloned().unwrap_or_default();
        alerts.iter().map(|alert| alert["id"].as_str().unwrap().to_owned()).collect()
    }

    fn gaps_known(&self) -> Vec<Value> {
        let group = self.pair.recovery.group(GROUP).expect("the receiver knows the group");
        group["gaps"].as_array().cloned().unwrap_or_default()
    }

    /// Captured, and sent as stream, by this agent.
    fn sums(&self) -> (u64, u64) {
        let status = self.status();
        let captured = status["captured"].as_str().unwrap().rsplit_once(':').unwrap().1.parse().unwrap();
        (captured, status["counters"]["stream_bytes"].as_u64().unwrap())
    }

    /// A new agent counts from zero.
    pub fn new_base(&mut self) {
        self.base = self.sums();
        self.allowed = 0;
    }

    /// A session ended, or is about to with what it has under way: so much may be sent again.
    pub fn session_lost(&mut self) {
        self.allowed += self.status()["lag_bytes"].as_u64().unwrap();
    }

    /// Sets a bookmark at a moment at which nobody writes, and keeps what the volume is then.
    #[track_caller]
    pub fn bookmark(&mut self, writer: &Writer, name: &str) {
        let digest = writer.held(|| {
            self.pair.production.varve(&["bookmark", GROUP, name]).ok();
            digest_device(self.device.path())
        });
        self.bookmarks.push((name.to_owned(), digest));
    }

    #[track_caller]
    pub fn assert_bookmarks(&self) {
        for (name, digest) in &self.bookmarks {
            let at = format!("bookmark:{name}");
            let reply = self.pair.recovery.varve(&["view", "open", GROUP, "--at", &at, "--json"]).ok().json();
            let device: PathBuf = reply["volumes"][0]["device"].as_str().expect("a device").into();
            let found = digest_device(&device);
            self.pair.recovery.varve(&["view", "close", &reply["id"].to_string()]).ok();
            assert_eq!(&found, digest, "the view at {name}");
        }
    }

    /// Nothing was sent twice but what nobody had acknowledged; nothing was left out.
    #[track_caller]
    pub fn assert_sent_once(&self) {
        let now = self.sums();
        let (captured, sent) = (now.0 - self.base.0, now.1 - self.base.1);
        eprintln!("captured {captured}, sent {sent}, {} were not acknowledged at the ends of sessions", self.allowed);
        // What was captured last may not have been sent yet.
        assert!(sent + (1 << 20) >= captured, "captured {captured}, sent {sent}");
        assert!(sent <= captured + self.allowed, "captured {captured}, sent {sent}, of it again {}", self.allowed);
    }

    /// The replica is the volume, and there was neither a gap nor an image on the way.
    #[track_caller]
    pub fn assert_whole(&self) {
        self.assert_equal();
        let gaps = self.gaps_known();
        assert_eq!(gaps.len(), self.gaps, "{gaps:#?}");
        let status = self.status();
        assert_eq!(status["counters"]["dropped_records"], 0, "{status:#}");
    }

    #[track_caller]
    pub fn assert_equal(&self) {
        self.pair.wait_protected(GROUP, LIMIT);
        self.pair.wait_applied(GROUP, LIMIT);
        assert_same(self.device.path(), &self.replica);
    }

    /// `varve status` on both sides, in time; and neither says protected with an RPO beyond what that word allows.
    #[track_caller]
    pub fn assert_answers(&self) -> (Value, Value) {
        let ask = |side: &Installation| {
            let begun = Instant::now();
            let group = side.group(GROUP);
            let took = begun.elapsed();
            assert!(took < ANSWER_MAX, "varve status took {took:?}");
            group.expect("an answer")
        };
        let (agent, receiver) = (ask(&self.pair.production), ask(&self.pair.recovery));
        for side in [&agent, &receiver] {
            if side["data"] == "protected" {
                assert_eq!(side["link"], "streaming", "{side:#}");
                // Two seconds, and what passes between the two looks of one answer.
                assert!(side["rpo_seconds"].as_f64().unwrap() < 2.5, "{side:#}");
            }
        }
        (agent, receiver)
    }

    /// Waits until a session streams.
    #[track_caller]
    pub fn wait_streaming(&self, limit: Duration) -> Duration {
        wait_until(limit, "it streams", || self.status()["link"] == "streaming")
    }

    /// Waits until nothing much is left to send.
    #[track_caller]
    pub fn wait_caught_up(&self) {
        wait_until(LIMIT, "it has caught up", || {
            let status = self.status();
            status["link"] == "streaming" && status["rpo_seconds"].as_f64().is_some_and(|rpo| rpo < 1.0)
        });
    }

    /// Puts a key into a configuration file, in the place of the one that is there.
    pub fn configure(file: &Path, key: &str, value: &str) {
        let text = std::fs::read_to_string(file).unwrap();
        let others = text.lines().filter(|line| line.split('=').next().unwrap().trim() != key);
        let text = others.fold(format!("{key} = {value}\n"), |text, line| text + line + "\n");
        std::fs::write(file, text).unwrap();
    }
}
