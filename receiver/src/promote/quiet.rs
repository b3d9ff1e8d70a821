//! Before a takeover: the source, if it is connected. It is told and sends what it has; for a planned switch-over it makes
//! its volumes quiet first, and nothing is taken over unless everything that was ever written there is here.
//!
//! ```text
//! Quiesce → operator's steps there, volumes claimed and read-only → barrier → landed up to it → compared → epoch rises
//! ```
//!
//! Until the epoch rises everything can be undone, and is by whatever goes wrong: the agent lets its volumes be written again
//! when it hears [`Ask::Resume`], and when a session is agreed to, which cannot be once the group is taken over. So the session
//! in which it said that it was quiet must be the last one: if there was another one, it is not quiet any more.

use super::Context;
use crate::control::ProgressOut;
use crate::group::live::Progress;
use crate::group::registry::{Heard, Slot};
use crate::group::stream::StreamState;
use crate::limits::{DRAIN_TIME_MAX, PLANNED_STUCK_TIME_MAX, SOURCE_SILENT_TIME_MAX};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use varve_common::control::{DrainedReply, PlannedReply, PlannedWish, show_position};
use varve_common::problem::Problem;
use varve_common::wire::messages::{Ask, AskReply, Incarnation, Verify};

/// Between two looks at how far the source is.
const LOOK: Duration = Duration::from_millis(50);
/// How much longer than its limit the agent's answer is waited for.
const ANSWER_GRACE: Duration = Duration::from_secs(2);

/// The source is quiet and everything is here; dropped: it may go on.
#[derive(Debug)]
pub struct Quiet {
    session: u64,
    incarnation: Incarnation,
    barrier: u64,
    read_only: bool,
    hook_ms: Option<u64>,
    compared_bytes: u64,
    begin: Instant,
    resume: Resume,
}

/// Tells the source that it may go on.
#[derive(Debug)]
struct Resume {
    asks: Option<mpsc::Sender<Ask>>,
    id: u64,
}

impl Drop for Resume {
    fn drop(&mut self) {
        if let Some(asks) = &self.asks {
            // If its session has gone, the next one's welcome says the same.
            let _ = asks.try_send(Ask::Resume { id: self.id });
        }
    }
}

/// Something that is asked of the agent in its session.
struct Asked<'a> {
    slot: &'a Slot,
    asks: mpsc::Sender<Ask>,
    heard: watch::Receiver<Option<Heard>>,
    progress: watch::Receiver<Progress>,
    id: u64,
    /// Up to where it is durable, and when that moved.
    moved: (u64, Option<Instant>),
}

impl<'a> Asked<'a> {
    fn new(slot: &'a Slot) -> Option<Self> {
        let board = slot.board();
        let (asks, live) = (board.asks.clone()?, board.live.clone()?);
        drop(board);
        let progress = live.subscribe();
        let moved = (progress.borrow().durable.position, None);
        Some(Self { slot, asks, heard: slot.heard.subscribe(), progress, id: rand::random(), moved })
    }

    /// How long nothing was heard: no report, and nothing of the stream.
    fn silent(&mut self) -> Duration {
        let durable = self.progress.borrow().durable.position;
        if durable != self.moved.0 {
            self.moved = (durable, Some(Instant::now()));
        }
        let reported = self.slot.board().report.as_ref().map(|(_, at)| *at);
        reported.max(self.moved.1).map_or(Duration::MAX, |last| last.elapsed())
    }

    fn heard(&mut self) -> Option<Heard> {
        self.heard.borrow_and_update().clone().filter(|heard| heard.reply.id() == self.id)
    }

    fn has(&self, position: u64) -> bool {
        self.progress.borrow().durable.position >= position
    }

    fn is_over(&self) -> bool {
        self.asks.is_closed()
    }
}

/// A source that is connected and not silent is told, and is given a moment to send what it has. `None`: there is none. Whether
/// it is still there shows only in what it sends, long before its session ends: whoever takes over after a power cut does not
/// wait for more than a silence.
pub(super) async fn drain(slot: &Slot) -> Option<DrainedReply> {
    let mut asked = Asked::new(slot)?;
    if asked.silent() > SOURCE_SILENT_TIME_MAX {
        return None;
    }
    asked.asks.try_send(Ask::Drain { id: asked.id }).ok()?;
    let (begin, mut complete) = (Instant::now(), false);
    let log = slot.board().log.clone();
    // If the landing log is full, the applier decides how much more comes in, and that may be for long.
    let stuck = || log.as_ref().is_some_and(|log| log.is_starved());
    let end = begin + DRAIN_TIME_MAX;
    while !complete && Instant::now() < end && !asked.is_over() && asked.silent() <= SOURCE_SILENT_TIME_MAX && !stuck()
    {
        tokio::time::sleep(LOOK.min(begin.elapsed() + Duration::from_millis(2))).await;
        complete = match asked.heard() {
            Some(Heard { reply: AskReply::Drained { position, .. }, .. }) => asked.has(position),
            _ => false,
        };
    }
    tracing::info!(group = slot.name, complete, waited = ?begin.elapsed(), "the source was told that it is taken over");
    Some(DrainedReply { complete, seconds: begin.elapsed().as_secs_f64() })
}

/// What a planned switch-over needs to begin.
pub(super) fn check(slot: &Slot) -> Result<(), Problem> {
    let name = &slot.name;
    let what = format!("'{name}' was not switched over");
    let board = slot.board();
    if board.asks.is_none() {
        let next = format!(
            "start varve-agent there; if that host is lost: 'varve failover {name}' takes over what is here, and says what is not"
        );
        return Err(Problem::unreachable(what, "the agent of its source is not connected", next));
    }
    let landed = board.live.as_ref().map(|live| live.view().landed);
    if !landed.is_some_and(|landed| landed.is_consistent()) {
        let next = format!("wait until 'varve status {name}' says protected");
        return Err(Problem::refused(what, "its newest point is in a gap", next));
    }
    Ok(())
}

/// Makes the source quiet and waits until everything is here. Whatever goes wrong, the source goes on.
pub(super) async fn quiesce(context: &Context, wish: &PlannedWish, progress: &ProgressOut) -> Result<Quiet, Problem> {
    let slot = &context.slot;
    let what = format!("'{}' was not switched over", slot.name);
    check(slot)?;
    let next = "nothing has changed, the source goes on; see 'varve status' there, then run the same command again";
    let failed = |why: String| Problem::failed(&what, why, next);
    let gone = || Problem::unreachable(&what, "the session with its agent ended", next);
    let mut asked = Asked::new(slot).ok_or_else(gone)?;
    let (begin, limit) = (Instant::now(), Duration::from_secs(wish.limit_seconds));
    let ask = Ask::Quiesce { id: asked.id, limit_ms: limit.as_millis() as u64 };
    let resume = Resume { asks: Some(asked.asks.clone()), id: asked.id };
    asked.asks.send(ask).await.map_err(|_| gone())?;
    tracing::warn!(group = slot.name, "a planned switch-over begins: the source is to be made quiet");
    let mut quiet = None;
    loop {
        if quiet.is_none() {
            match asked.heard() {
                Some(Heard { session, reply: AskReply::Quiesced { position, read_only, hook_ms, .. } }) => {
                    quiet = Some((session, position, read_only, hook_ms));
                }
                Some(Heard { reply: AskReply::NotQuiesced { text, next, .. }, .. }) => {
                    return Err(Problem::refused(&what, format!("the source cannot be made quiet: {text}"), next));
                }
                _ => {}
            }
        }
        if quiet.is_some_and(|(_, position, ..)| asked.has(position)) {
            break;
        }
        if asked.is_over() {
            return Err(gone());
        }
        // The agent's own word is better, and it has the same limit.
        if begin.elapsed() > limit + ANSWER_GRACE {
            let why = match quiet {
                Some(_) => "the source is quiet, but did not send everything",
                None => "the source did not become quiet",
            };
            return Err(failed(format!("{why} within {} s", limit.as_secs())));
        }
        if progress.has_gone() {
            return Err(failed("nobody waits for it any more".to_owned()));
        }
        tokio::time::sleep(LOOK).await;
    }
    let (session, barrier, read_only, hook_ms) = quiet.ok_or_else(gone)?;
    let incarnation = asked.progress.borrow().durable.incarnation;
    let mut quiet = Quiet { session, incarnation, barrier, read_only, hook_ms, compared_bytes: 0, begin, resume };
    if !wish.quick {
        quiet.compared_bytes = compare(&asked, progress).await.map_err(|why| match why {
            Some(why) => failed(why),
            None => gone(),
        })?;
    }
    Ok(quiet)
}

/// Both sides are equal at the barrier: bytes compared. `None`: the session ended.
async fn compare(asked: &Asked<'_>, progress: &ProgressOut) -> Result<u64, Option<String>> {
    let id: u64 = rand::random();
    asked.asks.send(Ask::Verify { id, repair: false }).await.map_err(|_| None)?;
    let (mut moved, mut done) = (Instant::now(), 0);
    loop {
        tokio::time::sleep(LOOK).await;
        let report = asked.slot.board().report.as_ref().and_then(|(report, _)| report.verify.clone());
        match report.filter(|report| report.id == id) {
            Some(Verify { finished: true, error: Some(why), .. }) => {
                return Err(Some(format!("the comparison at the barrier came to no result: {why}")));
            }
            Some(verify) if verify.finished => {
                let wrong = verify.differing_bytes + verify.unverified_bytes;
                return match wrong {
                    0 => Ok(verify.done_bytes),
                    wrong => Err(Some(format!(
                        "{wrong} bytes differ at the barrier ('varve verify --repair' there finds and sends them)"
                    ))),
                };
            }
            Some(verify) if verify.done_bytes > done => {
                (moved, done) = (Instant::now(), verify.done_bytes);
                progress.tell(done, verify.total_bytes);
            }
            _ => {}
        }
        if asked.is_over() {
            return Err(None);
        }
        if moved.elapsed() > PLANNED_STUCK_TIME_MAX || progress.has_gone() {
            // Whoever waits next is not to meet it.
            let _ = asked.asks.try_send(Ask::CancelVerify { id });
            return Err(Some("the comparison at the barrier does not go on, or nobody waits for it".to_owned()));
        }
    }
}

impl Quiet {
    /// With the desk in hand: whether the source is still quiet, and all of it is here.
    pub(super) fn holds(&self, slot: &Slot, landed: &StreamState) -> Result<(), String> {
        if slot.counters.sessions.load(Ordering::Acquire) != self.session {
            return Err("the source had another session meanwhile, so it is not quiet any more".to_owned());
        }
        let whole = landed.at.incarnation == self.incarnation && landed.at.position >= self.barrier;
        match whole && landed.is_consistent() {
            true => Ok(()),
            false => Err("what is landed does not reach the barrier".to_owned()),
        }
    }

    /// The group is taken over, or is about to be: the source stays quiet.
    pub(super) fn keep(&mut self) {
        self.resume.asks = None;
    }

    /// For the operator, now that the devices are there.
    pub(super) fn reply(&self) -> PlannedReply {
        PlannedReply {
            barrier: show_position(&self.incarnation, self.barrier),
            read_only: self.read_only,
            hook_seconds: self.hook_ms.map(|ms| ms as f64 / 1000.0),
            compared_bytes: self.compared_bytes,
            pause_seconds: self.begin.elapsed().as_secs_f64(),
        }
    }
}
