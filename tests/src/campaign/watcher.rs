//! What `varve status` claims, looked at several times a second, and whether it may.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{Output, run};

/// Between two looks.
const EVERY: Duration = Duration::from_millis(250);
/// How long a status may take to say what has happened.
const GRACE: Duration = Duration::from_secs(4);

/// `varve` in an installation, for threads that do not own it.
#[derive(Debug, Clone)]
pub struct Client {
    pub(crate) program: PathBuf,
    pub(crate) root: PathBuf,
    pub(crate) environment: Vec<(String, String)>,
}

impl Client {
    /// Runs `varve`.
    #[track_caller]
    pub fn varve<S: AsRef<OsStr>>(&self, args: &[S]) -> Output {
        let mut command = Command::new(&self.program);
        command.args(args).env("VARVE_ROOT", &self.root).envs(self.environment.iter().cloned());
        run(&mut command)
    }
}

/// What was seen of one agent's life.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Looks that were answered.
    pub looks: u64,
    /// Regions that were compared by digests, over all lives.
    pub probes: u64,
    /// Claims that were false.
    pub lies: Vec<String>,
}

#[derive(Default)]
struct State {
    seen: Seen,
    /// Of the life that is under way.
    probes: u64,
    /// Since when it is known that something was lost that only a gap can tell of.
    loss_since: Option<Instant>,
    /// Since when nothing can reach the receiver.
    away_since: Option<Instant>,
}

/// Looks until it is dropped.
pub struct Watcher {
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watcher {
    /// Looks at one group of the production side.
    pub fn start(client: Client, group: &str) -> Self {
        let (state, stop) = (Arc::new(Mutex::new(State::default())), Arc::new(AtomicBool::new(false)));
        let (theirs, ends, group) = (state.clone(), stop.clone(), group.to_owned());
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::Acquire) {
                let asked = Instant::now();
                let out = client.varve(&["status", &group, "--json"]);
                if out.code == 0 {
                    look(&mut theirs.lock().unwrap_or_else(PoisonError::into_inner), asked, &out.json()["groups"][0]);
                }
                std::thread::sleep(EVERY);
            }
        });
        Watcher { state, stop, thread: Some(thread) }
    }

    /// From now on the status must tell of a gap; `false`: not any more.
    pub fn loss_is_known(&self, known: bool) {
        let since = known.then(Instant::now);
        self.state.lock().unwrap_or_else(PoisonError::into_inner).loss_since = since;
    }

    /// From now on the receiver cannot be reached while things are written; `false`: it can again.
    pub fn receiver_is_away(&self, away: bool) {
        let since = away.then(Instant::now);
        self.state.lock().unwrap_or_else(PoisonError::into_inner).away_since = since;
    }

    /// What was seen since the last call.
    pub fn take(&self) -> Seen {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut state.seen)
    }
}

fn look(state: &mut State, asked: Instant, group: &Value) {
    state.seen.looks += 1;
    let probes = group["counters"]["probes"].as_u64().unwrap_or(0);
    // A count that falls belongs to another life.
    state.seen.probes += probes.checked_sub(state.probes).unwrap_or(probes);
    state.probes = probes;
    let (data, gap) = (group["data"].as_str().unwrap_or(""), group["gap_reason"].as_str());
    let since = |since: Option<Instant>| since.map_or(Duration::ZERO, |since| asked.saturating_duration_since(since));
    let whole = matches!(data, "protected" | "verifying");
    let lost = since(state.loss_since);
    if lost > GRACE && gap.is_none() && (whole || data == "lagging") {
        state.seen.lies.push(format!("{data}, no gap, {lost:?} after something was lost: {group:#}"));
    }
    let away = since(state.away_since);
    if away > GRACE && data == "protected" {
        state.seen.lies.push(format!("protected, {away:?} after the receiver went away: {group:#}"));
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
