//! The agent watches its groups: once a second, from a thread of its own, so that nothing it watches can hold it up.

use crate::daemon::Daemon;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use varve_common::watch::Facts;
use varve_io::watcher::{LOOK_EVERY, METRICS_EVERY};

/// Watches as long as the process lives.
pub fn start(daemon: &Arc<Daemon>) -> io::Result<()> {
    type Look = fn(&Daemon);
    // Two threads: a disk that does not take the metrics file must not end the watch.
    let threads: [(&str, Duration, Look); 2] = [("watch", LOOK_EVERY, look), ("metrics", METRICS_EVERY, metrics)];
    for (name, every, work) in threads {
        let daemon = daemon.clone();
        let run = move || {
            loop {
                work(&daemon);
                std::thread::sleep(every);
            }
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(run)?;
    }
    Ok(())
}

fn look(daemon: &Daemon) {
    let (config, host) = daemon.watch_config();
    let facts = |(status, started): &(_, bool)| Facts { not_started: !started, ..Facts::of(status) };
    let facts: Vec<Facts> = daemon.watched().iter().map(facts).collect();
    daemon.watcher.look(&config, host.as_deref(), &facts);
}

fn metrics(daemon: &Daemon) {
    let (config, _) = daemon.watch_config();
    if config.metrics_file.is_some() {
        // Without a group to name, the status is never refused.
        daemon.watcher.write_metrics(&config, &daemon.status(None).unwrap_or_default());
    }
}
