//! A takeover that goes back by itself unless it is committed in time.
//!
//! What the takeover plan did goes back first, and only `varve` can do that: mounts, addresses and units are none of this
//! daemon's. So at the deadline it starts `varve failover abort`: under systemd as a unit of its own, outside this daemon's
//! sandbox.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use varve_common::paths::Paths;

/// After an attempt that failed (a device is in use) it is tried again so much later.
const AGAIN_AFTER: Duration = Duration::from_secs(60);
/// So long after its start the receiver believes its clock: after a boot it may be set first.
const START_GRACE: Duration = Duration::from_secs(30);

/// All deadlines, and what was started for them.
#[derive(Debug)]
pub(super) struct Deadlines {
    command: Vec<String>,
    groups: BTreeMap<String, Deadline>,
    /// Whether they were looked at: what is found then is older than this start.
    looked: bool,
}

#[derive(Debug)]
struct Deadline {
    /// Which takeover of the group.
    incarnation: String,
    /// By the monotonic clock: a wall clock that is set does not end a takeover.
    at: Instant,
    /// From before this start: the wall clock must have come there as well.
    wall_ns: Option<u64>,
    running: Option<Child>,
    failed: Option<String>,
}

impl Deadlines {
    pub(super) fn new(paths: &Paths) -> Self {
        Self { command: command(paths), groups: BTreeMap::new(), looked: false }
    }

    /// Why the last attempt did not do it.
    pub(super) fn failed(&self, group: &str) -> Option<String> {
        self.groups.get(group)?.failed.clone()
    }

    /// `pending`: group, incarnation and deadline (by the wall clock) of every takeover that has one and is not committed.
    pub(super) fn look<'a>(
        &mut self,
        pending: impl Iterator<Item = (&'a str, &'a str, u64)>,
        wall_ns: u64,
        now: Instant,
    ) {
        let mut before = std::mem::take(&mut self.groups);
        for (group, incarnation, at_ns) in pending {
            // One that still runs for the takeover before is waited for.
            let same = |known: &Deadline| known.incarnation == incarnation || known.running.is_some();
            let left = Duration::from_nanos(at_ns.saturating_sub(wall_ns));
            let mut deadline = before.remove(group).filter(same).unwrap_or_else(|| Deadline {
                incarnation: incarnation.to_owned(),
                at: now + if self.looked { left } else { left.max(START_GRACE) },
                wall_ns: (!self.looked).then_some(at_ns),
                running: None,
                failed: None,
            });
            match deadline.incarnation == incarnation {
                true => deadline.look(group, &self.command, wall_ns, now),
                false => deadline.reap(),
            }
            self.groups.insert(group.to_owned(), deadline);
        }
        self.looked = true;
        // It is done, or was committed, and what was started ends by itself.
        for (group, mut done) in before {
            done.reap();
            if done.running.is_some() {
                self.groups.insert(group, done);
            }
        }
    }
}

impl Deadline {
    /// Takes note if what was started has ended.
    fn reap(&mut self) {
        self.running.take_if(|child| !matches!(child.try_wait(), Ok(None)));
    }

    fn look(&mut self, group: &str, command: &[String], wall_ns: u64, now: Instant) {
        if let Some(child) = &mut self.running {
            let why = match child.try_wait() {
                Ok(None) => return,
                Ok(Some(status)) => format!("'varve failover abort' ended with {status}"),
                Err(error) => error.to_string(),
            };
            self.running = None;
            // Still pending: it did not do it.
            self.not_done(group, why, now);
        }
        if now < self.at || self.wall_ns.is_some_and(|at_ns| wall_ns < at_ns) {
            return;
        }
        tracing::warn!(group, "nobody committed the takeover in time: it goes back");
        match start(command, group) {
            Ok(child) => self.running = Some(child),
            Err(error) => self.not_done(group, format!("'varve' cannot be started: {error}"), now),
        }
    }

    fn not_done(&mut self, group: &str, why: String, now: Instant) {
        let next = format!("'varve failover abort {group}' says what is in the way; it is tried again in a minute");
        tracing::error!(group, why, next, "the takeover did not go back");
        self.failed = Some(why);
        self.at = now + AGAIN_AFTER;
    }
}

fn command(paths: &Paths) -> Vec<String> {
    // Beside this program: the same version.
    let beside = std::env::current_exe().ok().map(|path| path.with_file_name("varve")).filter(|path| path.is_file());
    let varve = beside.unwrap_or_else(|| PathBuf::from("varve")).display().to_string();
    if paths.is_system() && Path::new("/run/systemd/system").is_dir() {
        let systemd = ["systemd-run", "--quiet", "--collect", "--wait", "--description=Varve: back from a takeover"];
        return systemd.map(str::to_owned).into_iter().chain([varve]).collect();
    }
    vec![varve, "--root".to_owned(), paths.root().display().to_string()]
}

fn start(command: &[String], group: &str) -> io::Result<Child> {
    let [program, words @ ..] = command else { return Err(io::ErrorKind::NotFound.into()) };
    Command::new(program)
        .args(words)
        .args(["failover", "abort", group, "--yes"])
        // It is not the service.
        .env_remove("NOTIFY_SOCKET")
        .env_remove("WATCHDOG_USEC")
        .env_remove("WATCHDOG_PID")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn deadlines(program: &str) -> Deadlines {
        Deadlines { command: vec![program.to_owned()], groups: BTreeMap::new(), looked: true }
    }

    /// Looks until what was started has ended, or nothing is left.
    fn look_until(deadlines: &mut Deadlines, now: Instant, done: impl Fn(&Deadlines) -> bool) {
        let begin = Instant::now();
        while !done(deadlines) {
            assert!(begin.elapsed() < Duration::from_secs(20));
            deadlines.look([("db", "1", 60 * SECOND)].into_iter(), 50 * SECOND, now);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn begun_once_at_its_time_and_tried_again() {
        let (mut deadlines, begin) = (deadlines("false"), Instant::now());
        let pending = || [("db", "1", 60 * SECOND)].into_iter();
        deadlines.look(pending(), 50 * SECOND, begin);
        assert!(deadlines.groups["db"].running.is_none());
        // A wall clock that was set forward changes nothing.
        deadlines.look(pending(), 500 * SECOND, begin + Duration::from_secs(9));
        assert!(deadlines.groups["db"].running.is_none());
        let due = begin + Duration::from_secs(10);
        deadlines.look(pending(), 60 * SECOND, due);
        assert!(deadlines.groups["db"].running.is_some());
        look_until(&mut deadlines, due, |deadlines| deadlines.failed("db").is_some());
        assert!(deadlines.groups["db"].running.is_none(), "not at once again");
        deadlines.look(pending(), 60 * SECOND, due + AGAIN_AFTER);
        assert!(deadlines.groups["db"].running.is_some());
    }

    #[test]
    fn what_is_committed_or_done_is_forgotten() {
        let (mut deadlines, begin) = (deadlines("true"), Instant::now());
        deadlines.look([("db", "1", 60 * SECOND)].into_iter(), 70 * SECOND, begin);
        assert!(deadlines.groups["db"].running.is_some());
        let gone = Instant::now();
        while !deadlines.groups.is_empty() {
            assert!(gone.elapsed() < Duration::from_secs(20));
            deadlines.look([].into_iter(), 70 * SECOND, begin);
        }
        // Another takeover of the group has its own time.
        deadlines.look([("db", "1", 60 * SECOND)].into_iter(), 50 * SECOND, begin);
        deadlines.look([("db", "2", 90 * SECOND)].into_iter(), 50 * SECOND, begin + Duration::from_secs(10));
        assert!(deadlines.groups["db"].running.is_none());
    }

    #[test]
    fn a_clock_that_is_wrong_at_the_start_does_not_end_it() {
        let (mut deadlines, begin) = (Deadlines { looked: false, ..deadlines("false") }, Instant::now());
        let pending = || [("db", "1", 60 * SECOND)].into_iter();
        deadlines.look(pending(), 9000 * SECOND, begin);
        assert!(deadlines.groups["db"].running.is_none(), "overdue, as it seems");
        // It was set meanwhile.
        deadlines.look(pending(), 50 * SECOND, begin + START_GRACE);
        assert!(deadlines.groups["db"].running.is_none());
        deadlines.look(pending(), 60 * SECOND, begin + START_GRACE + Duration::from_secs(10));
        assert!(deadlines.groups["db"].running.is_some());
    }

    #[test]
    fn a_program_that_is_not_there_is_said() {
        let mut deadlines = deadlines("/nowhere/varve");
        deadlines.look([("db", "1", 1)].into_iter(), 2, Instant::now());
        assert!(deadlines.failed("db").unwrap().contains("cannot be started"));
    }
}
