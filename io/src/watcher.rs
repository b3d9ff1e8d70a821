//! A daemon's watch with hands: what [`varve_common::watch`] finds goes to the log and to the hook, and into status and
//! metrics.

use crate::hook::{Call, Hook};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use varve_common::config::WatchConfig;
use varve_common::control::{GroupStatus, StatusReply, show_time};
use varve_common::metrics::exposition;
use varve_common::watch::{Event, Facts, Now, Severity, Watch};

/// Between two looks.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Between two metrics files.
pub const METRICS_EVERY: Duration = Duration::from_secs(15);

/// See the module's text.
#[derive(Debug)]
pub struct Watcher {
    daemon: &'static str,
    watch: Mutex<Watch>,
    /// A clock that nobody sets.
    began: Instant,
    hook: Mutex<Option<Hook>>,
    looks: Mutex<Looks>,
}

#[derive(Debug, Default)]
struct Looks {
    /// Said once until it changes.
    metrics_error: Option<String>,
    hook_full: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watcher {
    /// Of `agent` or `receiver`.
    pub fn new(daemon: &'static str) -> Self {
        let (watch, hook, looks) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { daemon, watch, began: Instant::now(), hook, looks }
    }

    /// Looks, and tells. `host` is the name of this one.
    pub fn look(&self, config: &WatchConfig, host: Option<&str>, groups: &[Facts]) {
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let now = Now { steady_ns: self.began.elapsed().as_nanos() as u64, wall_ns: wall.as_nanos() as u64 };
        let events = lock(&self.watch).look(&config.limits, now, groups);
        for event in &events {
            log(event);
            if let Some(program) = &config.hook {
                self.tell(program, config.hook_timeout, host, event);
            }
        }
    }

    /// Adds to the status what the watch knows.
    pub fn fill(&self, groups: &mut [GroupStatus]) {
        let watch = lock(&self.watch);
        for group in groups {
            (group.alerts, group.watch) = (watch.alerts(&group.name), watch.status(&group.name));
        }
    }

    /// Writes the metrics file, if there is to be one. It may wait for a disk, so not from the thread that looks.
    pub fn write_metrics(&self, config: &WatchConfig, status: &StatusReply) {
        let Some(path) = config.metrics_file.as_deref() else { return };
        let error = replace(path, &exposition(status, &[])).err().map(|error| error.to_string());
        let mut looks = lock(&self.looks);
        if let Some(error) = error.as_ref().filter(|error| looks.metrics_error.as_ref() != Some(error)) {
            tracing::warn!(path = %path.display(), error, "the metrics file cannot be written");
        }
        looks.metrics_error = error;
    }

    fn tell(&self, program: &Path, timeout: Duration, host: Option<&str>, event: &Event) {
        let mut hook = lock(&self.hook);
        if hook.is_none() {
            match Hook::start() {
                Ok(started) => *hook = Some(started),
                Err(error) => return tracing::error!(%error, "the alert hook has no thread"),
            }
        }
        let Some(hook) = hook.as_ref() else { return };
        let call = call(self.daemon, program.to_owned(), timeout, host, event);
        let full = !hook.call(call);
        let mut looks = lock(&self.looks);
        if full && !looks.hook_full {
            tracing::warn!(hook = %program.display(), "the alert hook is too slow: it is not told of everything");
        }
        looks.hook_full = full;
    }
}

fn log(event: &Event) {
    let Event { group, alert, .. } = event;
    let (id, text, next) = (alert.id.as_str(), alert.text.as_str(), alert.next.as_str());
    match (event.raised, alert.severity) {
        (true, Severity::Critical) => tracing::error!(group, alert = id, next, "{text}"),
        (true, Severity::Warning) => tracing::warn!(group, alert = id, next, "{text}"),
        (false, _) => tracing::info!(group, alert = id, since = alert.since, "the alert is cleared"),
    }
}

fn call(daemon: &str, program: PathBuf, timeout: Duration, host: Option<&str>, event: &Event) -> Call {
    let word = if event.raised { "raised" } else { "cleared" };
    let alert = &event.alert;
    let object = serde_json::json!({
        "event": word, "daemon": daemon, "host": host, "time": show_time(event.at_ns), "dropped": 0,
        "group": event.group, "id": alert.id, "severity": alert.severity, "text": alert.text, "since": alert.since,
        "next": alert.next,
    });
    let environment = [
        ("VARVE_EVENT", word),
        ("VARVE_DAEMON", daemon),
        ("VARVE_GROUP", &event.group),
        ("VARVE_ALERT", &alert.id),
        ("VARVE_SEVERITY", alert.severity.word()),
        ("VARVE_TEXT", &alert.text),
        ("VARVE_SINCE", &alert.since),
        ("VARVE_NEXT", &alert.next),
    ];
    // A NUL in words that came from a peer would make the whole environment impossible.
    let plain = |text: &str| text.replace('\0', " ");
    let environment = environment.map(|(name, value)| (name.to_owned(), plain(value))).to_vec();
    Call { program, timeout, object, environment }
}

/// Readers see all of the old or all of the new. Not synced: it is old in 15 seconds.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    // The collector reads only names that end in .prom.
    temporary.push(format!(".tmp-{}", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = std::fs::write(&temporary, text)
        .and_then(|()| {
            let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
            std::fs::set_permissions(&temporary, readable)
        })
        .and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}
