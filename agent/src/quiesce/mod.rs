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
use hold::{Hold, quiet_not};
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
    /// They may be written again, if they were made quiet under this number.
    Resume(String, u64, &'static str),
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
    /// Held while what is remembered is read, changed and written: else one of two changes at once is lost. Before `known`.
    remembering: Mutex<()>,
    /// Making quiet and ending it come one after the other.
    one_at_a_time: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Known {
    file: Authority,
    hold: Option<Hold>,
    problem: Option<String>,
    /// The number under which `quiet_since` came to be; `None`: an agent before us made it quiet. Numbers are random and asked
    /// for in one session, so no two are the same.
    number: Option<u64>,
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

    /// Under which number it was made quiet last.
    fn number(&self, group: &str) -> Option<u64> {
        self.lock().get(group).and_then(|known| known.number)
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
        let _remembering = self.remembering.lock().unwrap_or_else(PoisonError::into_inner);
        self.lock().remove(group);
    }
}

impl Daemon {
    /// Does what the workers want, one after the other; a hook may take its time.
    pub async fn obey(self: Arc<Self>, mut orders: mpsc::Receiver<Order>) {
        while let Some(order) = orders.recv().await {
            self.obey_one(order);
        }
    }

    fn obey_one(self: &Arc<Self>, order: Order) {
        match order {
            Order::Quiesce(group, id, limit) => {
                let daemon = self.clone();
                tokio::spawn(async move {
                    let outcome = daemon.quiesce(&group, id, limit.min(QUIESCE_LIMIT)).await;
                    let answered = match daemon.group(&group) {
                        Ok(handle) => handle.tell(Command::Quiet(id, outcome.clone())).await,
                        Err(_) => false,
                    };
                    if !answered || outcome.is_err() {
                        daemon.resume(&group, Some(id), "refused").await;
                    }
                });
            }
            Order::Resume(group, id, why) => {
                let daemon = self.clone();
                tokio::spawn(async move { daemon.resume(&group, Some(id), why).await });
            }
            Order::Fenced(group, fence) => self.fenced(&group, fence),
            Order::Welcomed(group) => {
                // What is asked for after the welcome is not ended by it, however long its turn takes to come.
                let (daemon, number) = (self.clone(), self.authorities().number(&group));
                // Nor is a refusal that comes after it, so the fence does not wait for that turn.
                self.unfenced(&group);
                tokio::spawn(async move { daemon.resume(&group, number, "aborted").await });
            }
        }
    }

    async fn quiesce(&self, group: &str, id: u64, limit: Duration) -> Result<Quiet, Problem> {
        let begin = Instant::now();
        let handle = self.group(group)?;
        let _one = self.authorities().one_at_a_time.lock().await;
        self.begin_quiet(group, id)?;
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

    /// Before anything is done: whatever ends us, the next one knows that something is to be undone.
    fn begin_quiet(&self, group: &str, id: u64) -> Result<(), Problem> {
        {
            let mut known = self.authorities().lock();
            let known = known.entry(group.to_owned()).or_default();
            if known.hold.is_some() && known.number.is_some() {
                // Somebody was told that nobody can write, and may act on it: that this one fails must not make it untrue.
                let why = "another planned switch-over is under way, the volumes are quiet for it";
                return Err(Problem::refused(quiet_not(group), why, "wait for its end"));
            }
            known.number = Some(id);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let since = show_time(now.as_nanos() as u64);
        self.remember(group, |file| file.quiet_since = Some(since))
    }

    /// The volumes may be written again, unless they were made quiet anew since: who wants an end to the quiet of before may
    /// have waited for the hook of the one that holds now.
    async fn resume(&self, group: &str, number: Option<u64>, why: &'static str) {
        let _one = self.authorities().one_at_a_time.lock().await;
        if self.authorities().file(group).quiet_since.is_none() || self.authorities().number(group) != number {
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
        let volumes = self.volumes_of(group);
        let (dir, name) = (self.hooks(), group.to_owned());
        let run = move || hook::run(&dir, hook::RESUME, &name, &volumes, why, RESUME_LIMIT);
        match tokio::task::spawn_blocking(run).await {
            Ok(Ok(_)) => {}
            Ok(Err(problem)) => tracing::error!(group, "{problem}; {}", problem.next),
            Err(error) => tracing::error!(group, "the hook did not end well: {error}"),
        }
    }

    fn fenced(&self, group: &str, fence: Fence) {
        let change = |file: &mut Authority| {
            // The time is that of the first refusal; the words are the newest.
            let since = file.fenced.take().map_or(fence.since, |known| known.since);
            file.fenced = Some(Fence { since, ..fence });
        };
        if let Err(problem) = self.remember(group, change) {
            tracing::error!(group, "{problem}; {}", problem.next);
        }
    }

    fn unfenced(&self, group: &str) {
        if let Err(problem) = self.remember(group, |file| file.fenced = None) {
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
        let what = format!("the volumes of '{group}' stay as they are");
        let number = self.authorities().number(group);
        let quiet = self.authorities().quiet(group).is_some();
        let (link, fenced) = match self.group(group) {
            Ok(handle) => {
                let facts = handle.shared.facts();
                (facts.link, facts.fenced.clone())
            }
            // It could not be started, and its volumes are held all the same. What comes home holds them for another reason.
            Err(_) if quiet && !self.is_returning(group) => (Link::Disconnected, self.authorities().file(group).fenced),
            Err(problem) => return Err(problem),
        };
        if !quiet {
            let next = format!("'varve status {group}' shows what it does");
            return Err(Problem::refused(what, "no planned switch-over has made them quiet", next));
        }
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
        self.resume(group, number, "by-hand").await;
        Ok(())
    }

    /// Changes what is remembered, durably.
    fn remember(&self, group: &str, change: impl FnOnce(&mut Authority)) -> Result<(), Problem> {
        let _remembering = self.authorities().remembering.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.authorities().file(group);
        let mut file = before.clone();
        change(&mut file);
        if file == before {
            return Ok(());
        }
        self.store().save_authority(group, &file)?;
        self.authorities().lock().entry(group.to_owned()).or_default().file = file;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::GroupFile;
    use std::os::unix::fs::PermissionsExt as _;
    use varve_common::paths::Paths;

    fn daemon(dir: &tempfile::TempDir) -> Arc<Daemon> {
        Daemon::open(Paths::new(dir.path().to_owned())).expect("opens")
    }

    /// Who gave up while the hook ran, and tried again, has two ends of the first quiet on the way: one comes before the second
    /// quiet, the other one after it.
    #[tokio::test]
    async fn what_ends_a_quiet_does_not_end_a_newer_one() {
        let dir = tempfile::tempdir().expect("temp dir");
        let daemon = daemon(&dir);
        let is_quiet = || daemon.authorities().quiet("db").is_some();
        for (id, of) in [(1, Some(1)), (2, Some(1))] {
            daemon.begin_quiet("db", id).expect("written");
            let hold = Hold::take("db", &[], Duration::ZERO).expect("nothing to claim");
            daemon.authorities().lock().get_mut("db").expect("known").hold = Some(hold);
            daemon.resume("db", of, "refused").await;
            assert_eq!((is_quiet(), daemon.authorities().is_held("db")), (id == 2, id == 2));
        }
        // Nor does the welcome of a session before.
        daemon.resume("db", None, "aborted").await;
        assert!(is_quiet());
        daemon.resume("db", Some(2), "refused").await;
        assert!(!is_quiet() && !daemon.authorities().is_held("db"));
        assert!(daemon.store().load_authorities(&["db".to_owned()]).is_empty());
    }

    /// What an agent before us made quiet is ended by the next welcome, and not by what is meant for another one.
    #[tokio::test]
    async fn the_quiet_of_an_agent_before_has_no_number() {
        let dir = tempfile::tempdir().expect("temp dir");
        daemon(&dir).begin_quiet("db", 1).expect("written");
        let daemon = daemon(&dir);
        daemon.authorities().load(daemon.store().load_authorities(&["db".to_owned()]));
        daemon.resume("db", Some(2), "refused").await;
        assert!(daemon.authorities().quiet("db").is_some());
        let number = daemon.authorities().number("db");
        daemon.resume("db", number, "aborted").await;
        assert!(daemon.authorities().quiet("db").is_none());
    }

    /// Two commands at once: the second one is refused, and its end does not reopen what the first one relies on.
    #[tokio::test]
    async fn a_quiet_that_holds_is_not_disturbed_by_another() {
        let dir = tempfile::tempdir().expect("temp dir");
        let daemon = daemon(&dir);
        daemon.begin_quiet("db", 1).expect("written");
        let hold = Hold::take("db", &[], Duration::ZERO).expect("nothing to claim");
        daemon.authorities().lock().get_mut("db").expect("known").hold = Some(hold);
        assert!(daemon.begin_quiet("db", 2).expect_err("refused").why.contains("another planned switch-over"));
        daemon.resume("db", Some(2), "refused").await;
        assert!(daemon.authorities().is_held("db") && daemon.authorities().quiet("db").is_some());
        daemon.resume("db", Some(1), "refused").await;
        assert!(!daemon.authorities().is_held("db"));
        daemon.begin_quiet("db", 2).expect("nobody relies on it any more");
    }
    /// It was quiet and could not be started again.
    #[tokio::test]
    async fn what_is_quiet_and_could_not_be_started_can_be_freed_by_hand() {
        let dir = tempfile::tempdir().expect("temp dir");
        let daemon = daemon(&dir);
        let file = GroupFile::new("db".into(), vec!["/dev/none".into()], vec![1 << 20], Vec::new());
        daemon.start_or_remember(file.clone()).await;
        assert!(daemon.resume_by_hand("db", true).await.expect_err("it is not quiet").why.contains("/dev/none"));
        daemon.begin_quiet("db", 1).expect("written");
        let hold = Hold::take("db", &[], Duration::ZERO).expect("nothing to claim");
        daemon.authorities().lock().get_mut("db").expect("known").hold = Some(hold);
        let hooks = daemon.hooks();
        std::fs::create_dir_all(&hooks).expect("made");
        let (hook, said) = (hooks.join(hook::RESUME), dir.path().join("said"));
        std::fs::write(&hook, format!("#!/bin/sh\necho \"$VARVE_VOLUMES\" >{}\n", said.display())).expect("written");
        std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o700)).expect("may be run");
        let refused = daemon.resume_by_hand("db", false).await.expect_err("it may have been taken over");
        assert!(refused.next.contains("--force") && daemon.authorities().is_held("db"), "{refused:?}");
        let returning = daemon.remember_return(file);
        daemon.resume_by_hand("db", true).await.expect_err("it comes home");
        returning.stop().await;
        assert!(daemon.authorities().is_held("db") && !said.exists());
        daemon.resume_by_hand("db", true).await.expect("free");
        assert!(!daemon.authorities().is_held("db") && daemon.authorities().quiet("db").is_none());
        assert_eq!(std::fs::read_to_string(&said).expect("the hook ran").trim(), "/dev/none");
    }

    fn fence(text: &str) -> Fence {
        Fence { epoch: 1, since: String::new(), text: text.to_owned(), next: String::new() }
    }

    /// The welcome ends a quiet, and waits for its turn behind a hook. The receiver says no again before it comes.
    #[tokio::test]
    async fn a_welcome_does_not_end_the_fence_that_came_after_it() {
        let dir = tempfile::tempdir().expect("temp dir");
        let daemon = daemon(&dir);
        let is_fenced = || daemon.authorities().file("db").fenced.is_some();
        let hook = daemon.authorities().one_at_a_time.lock().await;
        daemon.begin_quiet("db", 1).expect("written");
        daemon.obey_one(Order::Fenced("db".into(), fence("it runs here")));
        assert!(is_fenced());
        daemon.obey_one(Order::Welcomed("db".into()));
        daemon.obey_one(Order::Fenced("db".into(), fence("it runs here")));
        drop(hook);
        while daemon.authorities().quiet("db").is_some() {
            tokio::task::yield_now().await;
        }
        assert!(is_fenced(), "this host would write");
        daemon.obey_one(Order::Welcomed("db".into()));
        assert!(!is_fenced());
        assert!(daemon.store().load_authorities(&["db".to_owned()]).is_empty());
    }

    /// One change comes while another one has read what was before and not written yet.
    #[tokio::test]
    async fn two_changes_at_once_are_both_remembered() {
        let dir = tempfile::tempdir().expect("temp dir");
        let daemon = daemon(&dir);
        let (done, is_done) = std::sync::mpsc::channel();
        let other = daemon.clone();
        let mut thread = None;
        let change = |file: &mut Authority| {
            thread = Some(std::thread::spawn(move || {
                other.fenced("db", fence("it runs here"));
                // Nobody may wait for it any more.
                let _ = done.send(());
            }));
            // It cannot come to its end before this one has.
            is_done.recv_timeout(Duration::from_millis(500)).expect_err("it does not wait");
            file.quiet_since = Some("now".to_owned());
        };
        daemon.remember("db", change).expect("written");
        thread.expect("begun").join().expect("ends");
        let file = daemon.authorities().file("db");
        assert!(file.quiet_since.is_some() && file.fenced.is_some(), "{file:?}");
        let stored = daemon.store().load_authorities(&["db".to_owned()]).pop().expect("stored").1;
        assert_eq!((stored.quiet_since, stored.fenced), (file.quiet_since, file.fenced));
    }
}
