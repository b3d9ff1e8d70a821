//! Bringing a group that runs here home: to its host, or to another one that shall have it.
//!
//! ```text
//! pass 1: every region is compared, what differs is sent       the promoted devices are written all the time
//! pass n: what changed here since the pass before
//! cut-over: devices away · last pass · the agent captures · every region compared · given back (durable) · stream begins there
//! ```
//!
//! Who may write, at every step:
//!
//! | killed or cut … | the receiver's file | the agent's file | goes on |
//! |---|---|---|---|
//! | in a pass | taken over, comes home | returning | here; the agent compares again |
//! | after the agent captures | the same | returning, token | here: the receiver serves again, the agent ends its capture |
//! | given back | home: token, new epoch | returning, token | there: the agent shows the token and hears it |
//! | after the agent knows | home | new epoch | there: an ordinary session |
//!
//! Only the receiver's file decides. Until it says *home* nothing but the promoted devices is written; from then on they
//! cannot be served any more. The agent lets nobody write its volumes until it has heard it.
//!
//! - [`blocks`]: sets of regions
//! - [`branch`]: what only the old source has
//! - [`feed`]: regions as they were at a point, with their digests
//! - [`stream`]: the conversation with the agent
//! - [`pass`]: comparing and sending
//! - [`cutover`]: the order of the last steps
//! - [`orders`]: what the operator asks

pub mod blocks;
mod branch;
pub mod cutover;
pub mod feed;
pub mod orders;
pub mod pass;
pub mod stream;

use crate::failure::refuse_for_now;
use crate::group::meta::GroupMeta;
use blocks::Blocks;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use varve_common::control::FailbackStatus;
use varve_common::wire::messages::{Hello, Incarnation, Refused, RefusedReason};
use varve_timeline::timeline::Pin;

/// What is known of a group's coming home, beside its file.
#[derive(Debug, Default)]
pub struct Homecoming {
    inner: Mutex<Inner>,
    shown: watch::Sender<Shown>,
}

#[derive(Debug, Default)]
struct Inner {
    heard: Option<Heard>,
    /// Somebody wants to know what differs, until then.
    look_until: Option<Instant>,
    orders: Option<mpsc::Sender<Order>>,
    streams: u64,
    kept: Option<Kept>,
}

/// What the old source said of itself when it was refused.
#[derive(Clone, Copy, Debug)]
pub struct Heard {
    /// Its ring.
    pub incarnation: Incarnation,
    /// Its newest position.
    pub newest: u64,
}

/// Both sides are equal at a point, as long as the agent's claim lasts.
#[derive(Debug)]
struct Kept {
    claim: u64,
    at: At,
}

/// Up to where the volumes at home are what they were here.
#[derive(Debug)]
pub struct At {
    /// The point, kept from expiring.
    pub pin: Pin,
    /// Regions that were sent since the volumes were claimed.
    pub sent: Blocks,
}

/// The operator wants the cut-over. The devices are away, everything is in the replicas.
#[derive(Debug)]
pub struct Order {
    /// The last height.
    pub height: u64,
    /// The epoch at home.
    pub epoch: u64,
    /// Names this attempt.
    pub token: [u8; 16],
    /// Compare only what was sent since the volumes were claimed.
    pub quick: bool,
    /// Both sides are equal and the agent captures, or why not.
    pub answer: oneshot::Sender<Result<Armed, String>>,
    /// The group is given back. Dropped: it is not.
    pub given: oneshot::Receiver<()>,
    /// The agent has heard it. Dropped: it went before.
    pub told: oneshot::Sender<()>,
}

/// What the agent has after the last steps.
#[derive(Clone, Debug)]
pub struct Armed {
    /// Its new ring.
    pub incarnation: Incarnation,
    /// Where its stream begins.
    pub position: u64,
    /// Paths of its volumes.
    pub paths: Vec<String>,
    /// Bytes compared at the barrier.
    pub compared_bytes: u64,
    /// Bytes of the last pass.
    pub sent_bytes: u64,
}

/// How far it is.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    /// An agent is there.
    pub connected: bool,
    /// Its volumes cannot be had: what is in the way, and what to do.
    pub problem: Option<(String, String)>,
    /// The number of the pass.
    pub pass: u32,
    /// Bytes compared in it.
    pub done_bytes: u64,
    /// Bytes to compare in it.
    pub total_bytes: u64,
    /// Bytes sent by all passes of this stream.
    pub sent_bytes: u64,
    /// The longest that a write waits for being sent; `None`: pass 1 is not over.
    pub lag: Option<Duration>,
    /// The cut-over is under way.
    pub cutting_over: bool,
    /// What only the old source has is being kept.
    pub keeping: bool,
    /// Of the newest look.
    pub looked: Option<Looked>,
}

/// What differs at the old source.
#[derive(Clone, Copy, Debug)]
pub struct Looked {
    /// Bytes that differ from what runs here.
    pub differing: u64,
    /// Those of them that did not change here.
    pub only_there: u64,
    /// Bytes that differ from the point of the split: its branch. `None`: that point has expired.
    pub branch: Option<u64>,
}

impl Homecoming {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells an agent that asks for an ordinary session to come home instead, if that is wanted.
    ///
    /// # Errors
    /// That.
    pub fn call_home(&self, meta: &GroupMeta, hello: &Hello) -> Result<(), Refused> {
        let Some(takeover) = &meta.takeover else { return Ok(()) };
        let mut inner = self.lock();
        inner.heard = Some(Heard { incarnation: hello.incarnation, newest: hello.newest });
        let looks = inner.look_until.is_some_and(|until| until > Instant::now());
        let comes = meta.failback.as_ref().is_some_and(|failback| failback.host == meta.owner);
        if !takeover.committed || !(looks || comes) {
            return Ok(());
        }
        let text = format!(
            "the group '{}' runs on the recovery host under epoch {} and is to come home",
            meta.name, meta.epoch
        );
        let next =
            format!("unmount its volumes here; 'varve status {}' on the receiver shows how far it is", meta.name);
        Err(refuse_for_now(RefusedReason::Failback, text, next))
    }

    /// What the old source said last.
    pub fn heard(&self) -> Option<Heard> {
        self.lock().heard
    }

    /// Whether somebody waits for a look.
    pub fn wants_look(&self) -> bool {
        self.lock().look_until.is_some_and(|until| until > Instant::now())
    }

    fn want_look(&self, until: Option<Instant>) {
        self.lock().look_until = until;
    }

    /// A stream began: an older one of the group ends.
    fn begin_stream(&self, orders: mpsc::Sender<Order>) -> u64 {
        let mut inner = self.lock();
        inner.streams += 1;
        inner.orders = Some(orders);
        self.shown.send_modify(|shown| {
            *shown = Shown { connected: true, looked: shown.looked, ..Shown::default() };
        });
        inner.streams
    }

    /// Whether no other stream began after this one.
    fn is_newest(&self, number: u64) -> bool {
        self.lock().streams == number
    }

    /// Shows what a stream says of itself. An older one, which may end late, says nothing of the one that goes on.
    fn show_of(&self, number: u64, change: impl FnOnce(&mut Shown)) {
        let inner = self.lock();
        if inner.streams == number {
            self.shown.send_modify(change);
        }
    }

    fn end_stream(&self, number: u64) {
        let mut inner = self.lock();
        if inner.streams == number {
            inner.orders = None;
            self.shown.send_modify(|shown| (shown.connected, shown.lag, shown.cutting_over) = (false, None, false));
        }
    }

    /// The way to the newest stream, and its number.
    fn orders(&self) -> Option<(u64, mpsc::Sender<Order>)> {
        let inner = self.lock();
        inner.orders.clone().map(|orders| (inner.streams, orders))
    }

    /// The agent of this stream, the newest, did not come again for long: it compares everything if it does.
    fn forget_kept(&self, number: u64) {
        let mut inner = self.lock();
        if inner.streams == number {
            inner.kept = None;
        }
    }

    /// Nobody comes home any more.
    fn end_all(&self) {
        let mut inner = self.lock();
        (inner.orders, inner.kept) = (None, None);
        self.shown.send_modify(|shown| *shown = Shown::default());
    }

    fn take_kept(&self, claim: u64) -> Option<At> {
        self.lock().kept.take().filter(|kept| kept.claim == claim).map(|kept| kept.at)
    }

    fn keep(&self, claim: u64, at: At) {
        self.lock().kept = Some(Kept { claim, at });
    }

    fn show(&self, change: impl FnOnce(&mut Shown)) {
        self.shown.send_modify(change);
    }

    /// How far it is.
    pub fn shown(&self) -> Shown {
        self.shown.borrow().clone()
    }

    /// For the status.
    pub fn status(&self, meta: Option<&GroupMeta>) -> Option<FailbackStatus> {
        let failback = meta.and_then(|meta| meta.failback.as_ref())?;
        let (shown, name) = (self.shown(), meta.map_or("", |meta| meta.name.as_str()));
        let (phase, next) = match &shown {
            Shown { problem: Some((_, next)), .. } => ("blocked", format!("on '{}': {next}", failback.host)),
            Shown { connected: false, .. } => {
                ("waiting", format!("start varve-agent on '{}' and see that it is connected", failback.host))
            }
            Shown { cutting_over: true, .. } => ("cutting-over", "wait".to_owned()),
            Shown { keeping: true, .. } => ("keeping-branch", "wait: business goes on here meanwhile".to_owned()),
            Shown { lag: None, .. } => ("comparing", "wait: business goes on meanwhile".to_owned()),
            Shown { .. } => {
                ("following", format!("stop what uses the devices, then 'varve failback {name} --cut-over'"))
            }
        };
        Some(FailbackStatus {
            host: failback.host.clone(),
            since: failback.since.clone(),
            phase: phase.to_owned(),
            pass: shown.pass,
            done_bytes: shown.done_bytes,
            total_bytes: shown.total_bytes,
            sent_bytes: shown.sent_bytes,
            lag_seconds: shown.lag.map(|lag| lag.as_secs_f64()),
            problem: shown.problem.map(|(problem, _)| problem),
            next,
        })
    }
}
