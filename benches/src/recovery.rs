//! A recovery host for benches of the past: an installation whose group was filled in this process, and the daemon on it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use varve_common::paths::Paths;
use varve_common::point::Consistency;
use varve_receiver::group::meta::GroupMeta;
use varve_tests::{Installation, Role, free_port};
use varve_timeline::chronicle::Event;

use crate::benches::GROUP;
use crate::feed::{Group, make_group};

/// History is not what runs out here.
const KEEP_BYTES: u64 = u64::MAX;

/// See the module's text.
pub struct Recovery {
    /// The installation.
    pub host: Installation,
    /// Directory of the group.
    pub dir: PathBuf,
    /// What the group is.
    pub meta: GroupMeta,
}

impl Recovery {
    /// One with a group of one volume that nothing was written to.
    #[track_caller]
    pub fn new(volume_bytes: u64) -> Self {
        let host = Installation::new();
        host.varve(&["receiver", "init", "--listen", &format!("127.0.0.1:{}", free_port())]).ok();
        let dir = Paths::new(host.root()).receiver_group(GROUP);
        std::fs::create_dir_all(&dir).unwrap();
        let meta = make_group(&dir, dir.join("replica-0.img"), volume_bytes);
        Recovery { host, dir, meta }
    }

    /// The group in this process. The daemon must not run.
    #[track_caller]
    pub fn group(&self) -> Group {
        Group::whole(&self.dir, &self.meta, KEEP_BYTES)
    }

    /// The replica.
    pub fn replica(&self) -> &Path {
        &self.meta.volumes[0].replica
    }

    /// Starts the daemon and waits until it has opened the group.
    #[track_caller]
    pub fn start(&mut self) {
        self.host.start(Role::Receiver);
        varve_tests::wait_until(Duration::from_secs(60), "the group is open", || {
            self.host.group(GROUP).is_some_and(|group| group["history"].is_object())
        });
    }

    /// Runs a command of `varve` to its end; what it says as JSON, and how long it took.
    #[track_caller]
    pub fn varve(&self, args: &[&str]) -> (Value, Duration) {
        let begun = Instant::now();
        let out = self.host.varve(&[args, &["--json"]].concat()).ok();
        let took = begun.elapsed();
        let line = out.stdout.lines().next_back().unwrap_or_default();
        let value = serde_json::from_str(line).or_else(|_| serde_json::from_str(&out.stdout));
        (value.unwrap_or(Value::Null), took)
    }
}

/// Sets a bookmark at what is applied.
#[track_caller]
pub fn bookmark(group: &Group, name: &str) {
    let (height, time_ns) = group.height();
    let event = Event::Bookmark { height, time_ns, name: name.to_owned(), consistency: Consistency::Crash };
    group.timeline.tell(&[event]).unwrap();
}
