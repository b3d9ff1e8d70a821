//! A group that comes home: the receiver compares this host's volumes with what runs there and sends what differs; at last
//! it gives the group back (the receiver's `failback` has the table of who may write when).
//!
//! ```text
//! called ─► volumes claimed (O_EXCL) ─► file: returning ─► capture ends ─► compared, written … ─► file: token
//!        ─► captured again ─► compared ─► "home" ─► file: new epoch ─► claim ends, an ordinary session
//! ```
//!
//! Until the claim nothing is touched: what this host wrote and never sent can be mounted and looked at.
//!
//! - [`stream`]: the conversation with the receiver
//! - [`disks`]: reading and writing the volumes
//! - [`steps`]: what is durable when, and what captures when

mod disks;
mod steps;
mod stream;

use crate::daemon::Daemon;
use crate::group::GroupHandle;
use crate::link::LinkView;
use crate::store::GroupFile;
use disks::Claim;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use stream::Ended;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use varve_common::control::{AuthorityStatus, GroupStatus, ResyncStatus, VolumeStatus, Window};
use varve_common::problem::Problem;
use varve_common::state::{Data, Link, Role};

/// Between two tries.
const RETRY: Duration = Duration::from_secs(2);

/// A group that is called home.
pub struct Returning {
    /// Its name.
    pub name: String,
    shown: Mutex<Shown>,
    stop: watch::Sender<bool>,
    task: Mutex<Option<JoinHandle<()>>>,
}

/// What can be seen of it.
#[derive(Clone, Debug)]
pub struct Shown {
    /// What the file says, or will.
    pub file: GroupFile,
    /// The volumes are ours.
    pub claimed: bool,
    /// The connection.
    pub link: Link,
    /// Why it does not go on, or how far it is.
    pub reason: Option<String>,
    /// Bytes compared, and to compare.
    pub progress: Option<(u64, u64)>,
    /// It ended before anything was touched.
    pub ended: Option<Problem>,
}

/// What the task holds from stream to stream. A stream is left at any wait when the task is to stop: what must be ended then is in
/// here before the stream waits for anything.
#[derive(Default)]
struct Held {
    claim: Option<Claim>,
    armed: Option<Armed>,
    /// One of the daemon's, which ends: nobody else has it any more.
    ending: Option<Arc<GroupHandle>>,
}

impl Held {
    /// Ends what captures and is not the daemon's. Whoever is interrupted here may do it again.
    async fn end_capture(&mut self) {
        if let Some(ending) = &self.ending {
            ending.end().await;
        }
        if let Some(armed) = &self.armed {
            armed.handle.end().await;
        }
        (self.ending, self.armed) = (None, None);
    }
}

/// The group captures again, without a session yet.
pub struct Armed {
    /// The group.
    pub handle: GroupHandle,
    /// What it takes for the connection.
    pub link: watch::Sender<LinkView>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Returning {
    /// Starts to come home.
    pub fn start(daemon: &Arc<Daemon>, file: GroupFile) -> Arc<Self> {
        let shown = Shown {
            claimed: file.returning,
            file,
            link: Link::Disconnected,
            reason: None,
            progress: None,
            ended: None,
        };
        let name = shown.file.name.clone();
        let (stop, stopped) = watch::channel(false);
        let returning = Arc::new(Self { name, shown: Mutex::new(shown), stop, task: Mutex::default() });
        let task = tokio::spawn(run(daemon.clone(), returning.clone(), stopped));
        *lock(&returning.task) = Some(task);
        returning
    }

    /// What can be seen of it now.
    pub fn shown(&self) -> Shown {
        lock(&self.shown).clone()
    }

    fn show(&self, change: impl FnOnce(&mut Shown)) {
        change(&mut lock(&self.shown));
    }

    /// Ends it, wherever it is.
    pub async fn stop(&self) {
        let _ = self.stop.send(true);
        let task = lock(&self.task).take();
        if let Some(task) = task {
            // A panic there was reported by the hook.
            let _ = task.await;
        }
    }

    /// As `varve status` shows it.
    pub fn status(&self) -> GroupStatus {
        let shown = self.shown();
        let next = "the group runs on the recovery host and comes home: nothing may use its volumes here";
        let next = shown.reason.as_deref().unwrap_or(next);
        GroupStatus {
            name: self.name.clone(),
            role: Role::Fenced,
            link: shown.link,
            data: Data::Gap,
            reason: Some(shown.reason.clone().unwrap_or_else(|| next.to_owned())),
            gap_reason: None,
            epoch: shown.file.epoch,
            rpo_seconds: None,
            lag_bytes: 0,
            captured: None,
            durable: None,
            applied: None,
            window: Window::default(),
            history: None,
            gaps: Vec::new(),
            volumes: shown
                .file
                .volumes
                .iter()
                .zip(&shown.file.bytes)
                .map(|(path, bytes)| VolumeStatus { path: path.clone(), bytes: *bytes, replica: None })
                .collect(),
            resync: shown.progress.map(|(done_bytes, total_bytes)| ResyncStatus { done_bytes, total_bytes }),
            verify: None,
            ring: None,
            journal: None,
            alerts: Vec::new(),
            watch: None,
            drill: None,
            authority: Some(AuthorityStatus {
                text: "the group runs on the recovery host, and its volumes here are being overwritten with what it holds there"
                    .to_owned(),
                next: next.to_owned(),
                ..AuthorityStatus::default()
            }),
            counters: BTreeMap::new(),
        }
    }
}

async fn run(daemon: Arc<Daemon>, returning: Arc<Returning>, mut stop: watch::Receiver<bool>) {
    let mut held = Held::default();
    loop {
        let ended = tokio::select! {
            ended = stream::run(&daemon, &returning, &mut held) => ended,
            _ = stop.wait_for(|stop| *stop) => Ended::Stopped,
        };
        match ended {
            Ended::Home => {
                break tracing::info!(group = returning.name, "home: it is captured and sent from here again");
            }
            Ended::Looked => {
                break tracing::info!(group = returning.name, "its volumes were compared, nothing was changed");
            }
            Ended::Stopped => break,
            Ended::Lost(problem) => {
                let why = format!("{}. {}", problem.why, problem.next);
                let (claimed, known) = (returning.shown().claimed, returning.shown().reason.as_ref() == Some(&why));
                if !known {
                    tracing::warn!(group = returning.name, "does not come home yet: {why}");
                }
                returning.show(|shown| {
                    (shown.link, shown.reason, shown.progress) = (Link::Disconnected, Some(why), None);
                });
                if !claimed && held.claim.is_none() {
                    returning.show(|shown| shown.ended = Some(problem));
                    break;
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    // Whatever was begun and not given to us ends here.
    held.end_capture().await;
    drop(held);
    daemon.returned(&returning);
}
