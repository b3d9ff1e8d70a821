//! A group whose volumes nobody may write, because it is taken over as planned; and what is remembered of who may write.
//!
//! ```text
//! Ask::Quiesce ─► file: quiet ─► hook "quiesce" ─► claimed, read-only, synced ─► barrier in the stream ─► AskReply
//!                   ends with Ask::Resume, a welcome, or the operator ─► writable ─► hook "resume" ─► file: not quiet
//! ```
//!
//! The one rule: a receiver that agrees to an ordinary session has not taken the group over, so its welcome ends the quiet. As long
//! as nobody has said so the volumes stay as they are, also over restarts of this agent: what is written there might be lost.
//!
//! - [`hold`]: the volumes
//! - [`hook`]: the operator's steps

pub mod hold;
pub mod hook;

use crate::daemon::Daemon;
use crate::group::Command;
use crate::store::{Authority, Fence};
use hold::Hold;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;
use varve_common::control::show_time;
use varve_common::problem::Problem;
use varve_common::state::Link;

/// Orders of the workers that wait.
pub const ORDERS_MAX: usize = 64;
/// The longest that a hook may take after which nothing is waited for.
const RESUME_LIMIT: Duration = Duration::from_secs(60);
/// No quiet takes longer, whatever the receiver says.
const QUIESCE_LIMIT: Duration = Duration::from_secs(3600);

/// What a worker wants of the daemon.
#[derive(Debug)]
pub enum Order {
    /// Make a group's volumes quiet; answered by [`Command::Quiet`].
    Quiesce(String, u64, Duration),
    /// They may be written again.
    Resume(String, &'static str),
    /// The receiver has said that this host may not write.
    Fenced(String, Fence),
    /// It has agreed to a session: it runs here.
    Welcomed(String),
}

/// What was done to make a group quiet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quiet {
    /// The volumes are read-only; else only claimed.
    pub read_only: bool,
    /// How long the operator's steps took.
    pub hook: Option<Duration>,
}

/// What the daemon knows of who may write.
#[derive(Debug, Default)]
pub struct Authorities {
    known: Mutex<BTreeMap<String, Known>>,
    /// Making quiet and ending it come one after the other.
    one_at_a_time: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Known {
    file: Authority,
    hold: Option<Hold>,
    problem: Option<String>,
}

/// Of a group that is quiet, for status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Since when.
    pub since: String,
    /// The volumes are read-only.
    pub read_only: bool,
    /// Why they are not held.
    pub problem: Option<String>,
}

impl Authorities {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was remembered.
    pub fn load(&self, all: Vec<(String, Authority)>) {
        self.lock().extend(all.into_iter().map(|(name, file)| (name, Known { file, ..Known::default() })));
    }

    /// What a worker that begins is to know.
    pub fn known(&self, group: &str) -> (Option<Fence>, Option<Shown>) {
        (self.file(group).fenced, self.quiet(group))
    }

    /// What is remembered of a group.
    pub fn file(&self, group: &str) -> Authority {
        self.lock().get(group).map(|known| known.file.clone()).unwrap_or_default()
    }

    /// Whether its volumes are held.
    pub fn is_held(&self, group: &str) -> bool {
        self.lock().get(group).is_some_and(|known| known.hold.is_some())
    }

    /// For status; `None`: it is not quiet.
    pub fn quiet(&self, group: &str) -> Option<Shown> {
        let known = self.lock();
        let known = known.get(group)?;
        let since = known.file.quiet_since.clone()?;
        let read_only = known.hold.as_ref().is_some_and(Hold::is_read_only);
        Some(Shown { since, read_only, problem: known.problem.clone() })
    }

    /// Its volumes can be written for a moment, by us only: their capture begins.
    pub fn open_for_start(&self, group: &str, volumes: &[String]) {
        let mut known = self.lock();
        let Some(known) = known.get_mut(group).filter(|known| known.file.quiet_since.is_some()) else { return };
        if known.hold.is_none() {
            match Hold::again(group, volumes) {
                Ok(hold) => (known.hold, known.problem) = (Some(hold), None),
                Err(problem) => {
                    let why = format!("{}: what is written there is lost unless it is kept at the return", problem.why);
                    if known.problem.as_ref() != Some(&why) {
                        tracing::error!(group, "its volumes were quiet and cannot be held: {why}");
                    }
                    known.problem = Some(why);
                }
            }
        }
        if let Some(hold) = &known.hold {
            hold.open();
        }
    }

    /// After that.
    pub fn close_after_start(&self, group: &str) {
        if let Some(hold) = self.lock().get_mut(group).and_then(|known| known.hold.as_mut()) {
            hold.close_again();
        }
    }

    /// Somebody else of us claims them.
    pub fn let_go(&self, group: &str) {
        if let Some(known) = self.lock().get_mut(group) {
            known.hold = None;
        }
    }

    /// Nothing is known any more.
    pub fn forget(&self, group: &str) {
        self.lock().remove(group);
    }
}

impl Daemon {
    /// Does what the workers want, one after the other; a hook may take its time.
    pub async fn obey(self: Arc<Self>, mut orders: mpsc::Receiver<Order>) {
        while let Some(order) = orders.recv().await {
            match order {
                Order::Quiesce(group, id, limit) => {
                    let daemon = self.clone();
                    tokio::spawn(async move {
                        let outcome = daemon.quiesce(&group, limit.min(QUIESCE_LIMIT)).await;
                        let answered = match daemon.group(&group) {
                            Ok(handle) => handle.tell(Command::Quiet(id, outcome.clone())).await,
                            Err(_) => false,
                        };
                        if !answered || outcome.is_err() {
                            daemon.resume(&group, "refused").await;
                        }
                    });
                }
                Order::Resume(group, why) => {
                    let daemon = self.clone();
                    tokio::spawn(async move { daemon.resume(&group, why).await });
                }
                Order::Fenced(group, fence) => self.fenced(&group, fence),
                Order::Welcomed(group) => {
                    let daemon = self.clone();
                    tokio::spawn(async move { daemon.welcomed(&group).await });
                }
            }
        }
    }

    async fn quiesce(&self, group: &str, limit: Duration) -> Result<Quiet, Problem> {
        let begin = Instant::now();
        let handle = self.group(group)?;
        let _one = self.authorities().one_at_a_time.lock().await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let since = show_time(now.as_nanos() as u64);
        // Before anything is done: whatever ends us, the next one knows that something is to be undone.
        self.remember(group, |file| file.quiet_since = Some(since))?;
        tracing::warn!(group, "a planned switch-over: the volumes are made quiet");
        let (dir, name, volumes) = (self.hooks(), group.to_owned(), handle.file.volumes.clone());
        let work = move || {
            let hook = hook::run(&dir, hook::QUIESCE, &name, &volumes, "planned", limit)?;
            let hold = Hold::take(&name, &volumes, limit.saturating_sub(begin.elapsed()))?;
            Ok((hook, hold))
        };
        let done = tokio::task::spawn_blocking(work).await;
        let done = done.map_err(|e| Problem::failed("the volumes are not quiet", e.to_string(), "see the log"))?;
        let (hook, hold) = done?;
        let quiet = Quiet { read_only: hold.is_read_only(), hook };
        if let Some(known) = self.authorities().lock().get_mut(group) {
            (known.hold, known.problem) = (Some(hold), None);
        }
        handle.shared.facts().quiet = self.authorities().quiet(group);
        tracing::warn!(group, read_only = quiet.read_only, "quiet: nobody can write its volumes");
        Ok(quiet)
    }

    /// The volumes may be written again.
    pub async fn resume(&self, group: &str, why: &'static str) {
        let _one = self.authorities().one_at_a_time.lock().await;
        if self.authorities().file(group).quiet_since.is_none() {
            return;
        }
        self.authorities().let_go(group);
        tracing::warn!(group, why, "its volumes may be written again");
        self.run_resume_hook(group, why).await;
        if let Err(problem) = self.remember(group, |file| file.quiet_since = None) {
            tracing::error!(group, "{problem}; {}", problem.next);
        }
        if let Ok(handle) = self.group(group) {
            handle.shared.facts().quiet = None;
        }
    }

    /// Whatever uses the volumes may start.
    pub async fn run_resume_hook(&self, group: &str, why: &'static str) {
        let volumes = self.group(group).map(|handle| handle.file.volumes.clone()).unwrap_or_default();
        let (dir, name) = (self.hooks(), group.to_owned());
        let run = move || hook::run(&dir, hook::RESUME, &name, &volumes, why, RESUME_LIMIT);
        match tokio::task::spawn_blocking(run).await {
            Ok(Ok(_)) => {}
            Ok(Err(problem)) => tracing::error!(group, "{problem}; {}", problem.next),
            Err(error) => tracing::error!(group, "the hook did not end well: {error}"),
        }
    }

    fn fenced(&self, group: &str, fence: Fence) {
        let known = self.authorities().file(group).fenced;
        // The time is that of the first refusal; the words are the newest.
        let fence = Fence { since: known.as_ref().map_or(fence.since, |known| known.since.clone()), ..fence };
        if known.as_ref() == Some(&fence) {
            return;
        }
        if let Err(problem) = self.remember(group, |file| file.fenced = Some(fence.clone())) {
            tracing::error!(group, "{problem}; {}", problem.next);
        }
    }

    async fn welcomed(&self, group: &str) {
        self.resume(group, "aborted").await;
        if self.authorities().file(group).fenced.is_some()
            && let Err(problem) = self.remember(group, |file| file.fenced = None)
        {
            tracing::error!(group, "{problem}; {}", problem.next);
        }
    }

    /// It came home: nothing of before holds.
    pub async fn forget_quiet(&self, group: &str) {
        let _one = self.authorities().one_at_a_time.lock().await;
        self.authorities().let_go(group);
        if let Err(problem) = self.remember(group, |file| *file = Authority::default()) {
            tracing::error!(group, "{problem}; {}", problem.next);
        }
    }

    /// `varve failover abort` on this host: the operator ends the quiet.
    pub async fn resume_by_hand(&self, group: &str, force: bool) -> Result<(), Problem> {
        let handle = self.group(group)?;
        let what = format!("the volumes of '{group}' stay as they are");
        if self.authorities().quiet(group).is_none() {
            let next = format!("'varve status {group}' shows what it does");
            return Err(Problem::refused(what, "no planned switch-over has made them quiet", next));
        }
        let (link, fenced) = {
            let facts = handle.shared.facts();
            (facts.link, facts.fenced.clone())
        };
        if link == Link::Streaming {
            let next = "stop the command on the recovery host; they are writable again by themselves then";
            return Err(Problem::refused(what, "a planned switch-over is under way", next));
        }
        if let Some(fence) = fenced.filter(|_| !force) {
            let next = format!("{}; --force makes them writable here: what is written then is a branch", fence.next);
            return Err(Problem::refused(what, fence.text, next));
        }
        if !force {
            let why = "the receiver is not connected: it may have taken the group over";
            let next = "ask there ('varve status'); --force makes them writable here: if it runs there, what is written is a branch";
            return Err(Problem::refused(what, why, next));
        }
        self.resume(group, "by-hand").await;
        Ok(())
    }

    /// Changes what is remembered, durably.
    fn remember(&self, group: &str, change: impl FnOnce(&mut Authority)) -> Result<(), Problem> {
        let mut file = self.authorities().file(group);
        change(&mut file);
        self.store().save_authority(group, &file)?;
        self.authorities().lock().entry(group.to_owned()).or_default().file = file;
        Ok(())
    }
}
