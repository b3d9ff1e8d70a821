//! The conversation with the agent of a group that comes home.

use super::blocks::Blocks;
use super::pass::{Wish, unexpected};
use super::{Armed, At, Looked, Order, Shown};
use crate::failure::{protocol, refuse, refuse_for_now};
use crate::group::meta::{Failback, GroupMeta, Takeover, unhex};
use crate::group::registry::{Registry, Slot};
use crate::limits::{
    ANSWER_TIMEOUT, CATCH_UP_TIME_MAX, HOME_KEPT_TIME_MAX, HOME_LOOK_INTERVAL, HOME_READY_TIME_MAX, HOME_WAITING_MAX,
};
use crate::promote::is_rolled;
use crate::session::{Peer, writer};
use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::time::timeout;
use varve_common::limits::{DIGEST_BLOCK_BYTES, REGION_BYTES};
use varve_common::wire::messages::{
    FailbackHello, FailbackPurpose, FailbackSay, FailbackTell, FailbackWelcome, ImageDone, ProbeReply, Refused,
    RefusedReason, decode,
};
use varve_common::wire::{FRAME_HEADER_BYTES, Frame, FrameKind};
use varve_timeline::error::HistoryError;
use varve_timeline::timeline::Timeline;

/// Why a stream ends that was admitted to write.
const GIVEN_UP: &str = "its return was given up meanwhile";

/// The longest image of one block.
const FETCHED_BYTES_MAX: usize = DIGEST_BLOCK_BYTES as usize + 256;

/// What the agent said.
#[derive(Debug)]
pub(super) enum Incoming {
    Say(FailbackSay),
    Differs(ProbeReply),
    Written(ImageDone),
    Fetched(Vec<u8>),
    Gone(String),
}

/// One stream.
pub(super) struct Talk {
    pub(super) registry: Arc<Registry>,
    pub(super) host: String,
    /// Images that the agent may send: they were asked for.
    pub(super) fetches: Arc<AtomicUsize>,
    pub(super) slot: Arc<Slot>,
    send: SendStream,
    pub(super) incoming: mpsc::Receiver<Incoming>,
    pub(super) sizes: Vec<u64>,
    paths: Vec<String>,
    pub(super) ids: u64,
    pub(super) passes: u32,
    /// Bytes sent by all of them.
    pub(super) sent_bytes: u64,
    /// Of the streams of this group.
    number: u64,
    /// What it writes for; `None`: it writes nothing.
    wish: Option<Failback>,
}

/// Serves the stream to its end.
pub async fn serve(
    registry: &Arc<Registry>,
    peer: &Peer,
    hello: FailbackHello,
    mut send: SendStream,
    recv: RecvStream,
) {
    let (host, group) = (peer.host.as_str(), hello.group.escape_debug().to_string());
    let (slot, meta, purpose) = match admit(registry, host, &hello) {
        Ok(admitted) => admitted,
        Err(refused) => {
            tracing::warn!(host, group, reason = ?refused.reason, why = refused.text, "coming home refused");
            return writer::refuse(send, &refused).await;
        }
    };
    let software = env!("CARGO_PKG_VERSION").to_owned();
    let welcome = FailbackWelcome { purpose, epoch: meta.epoch, software };
    if let Err(error) = writer::send(&mut send, FrameKind::FailbackWelcome, 0, &welcome).await {
        return tracing::info!(host, group, %error, "a stream for coming home ended at once");
    }
    tracing::info!(host, group, ?purpose, software = hello.software, "coming home: stream open");
    let (into, incoming) = mpsc::channel(HOME_WAITING_MAX);
    let fetches = Arc::new(AtomicUsize::new(0));
    let reader = tokio::spawn(read_all(recv, into, fetches.clone()));
    let paths = hello.volumes.iter().map(|volume| volume.path.clone()).collect();
    let sizes = meta.volume_bytes();
    let (registry, host_name) = (registry.clone(), host.to_owned());
    let (orders, mut order) = mpsc::channel(1);
    let number = slot.failback.begin_stream(orders);
    let mut talk = Talk {
        registry,
        host: host_name,
        fetches,
        slot: slot.clone(),
        send,
        incoming,
        sizes,
        paths,
        ids: 0,
        passes: 0,
        sent_bytes: 0,
        number,
        wish: None,
    };
    let ended = match purpose {
        FailbackPurpose::Home => talk.wait_home().await,
        FailbackPurpose::Look => talk.look(&meta).await,
        FailbackPurpose::Write => match &meta.failback {
            Some(wish) => talk.bring_home(wish, &mut order).await,
            None => Err(GIVEN_UP.to_owned()),
        },
    };
    slot.failback.end_stream(number);
    // What is kept for it keeps history from expiring.
    tokio::spawn(async move {
        tokio::time::sleep(HOME_KEPT_TIME_MAX).await;
        slot.failback.forget_kept(number);
    });
    reader.abort();
    match ended {
        Ok(()) => tracing::info!(host, group, ?purpose, "coming home: stream done"),
        Err(why) => {
            tracing::info!(host, group, why, "coming home: stream ended");
            let next = "it is tried again by itself";
            writer::refuse(talk.send, &refuse_for_now(RefusedReason::Busy, why, next)).await;
        }
    }
}

/// Whether this host may have the group, and what for.
fn admit(
    registry: &Registry,
    host: &str,
    hello: &FailbackHello,
) -> Result<(Arc<Slot>, GroupMeta, FailbackPurpose), Refused> {
    let none =
        || refuse(RefusedReason::Owner, "there is no such group for this host", "'varve status' on the receiver");
    let slot = registry.group(&hello.group).ok_or_else(none)?;
    let meta = slot.board().meta.clone().ok_or_else(none)?;
    let home = meta.home.as_ref().filter(|home| home.host == host && unhex(&home.token) == hello.token);
    if home.is_some() && hello.token != [0; 16] && meta.takeover.is_none() {
        return Ok((slot, meta, FailbackPurpose::Home));
    }
    let comes = meta.failback.as_ref().is_some_and(|failback| failback.host == host);
    let purpose = match &meta.takeover {
        Some(takeover) if takeover.committed && comes => FailbackPurpose::Write,
        Some(takeover) if takeover.committed && meta.owner == host && slot.failback.wants_look() => {
            FailbackPurpose::Look
        }
        _ if meta.owner != host => return Err(none()),
        Some(_) => {
            let text = format!("the group '{}' runs on the recovery host and is not to come home now", meta.name);
            let next = format!("leave this host's volumes as they are; 'varve failback {}' on the receiver", meta.name);
            return Err(Refused { reason: RefusedReason::Epoch, text, next, retry: true });
        }
        None => {
            let text = format!("the group '{}' does not run on the recovery host", meta.name);
            let next = format!("'varve unprotect {0}' here gives up the return that was under way", meta.name);
            return Err(refuse(RefusedReason::Epoch, text, next));
        }
    };
    let theirs: Vec<u64> = hello.volumes.iter().map(|volume| volume.bytes).collect();
    if theirs != meta.volume_bytes() {
        let text = format!("the group has volumes of {:?} bytes, this host offers {theirs:?}", meta.volume_bytes());
        let next = "give volumes of exactly these sizes, in this order (partitions or logical volumes)";
        slot.failback.show(|shown| shown.problem = Some((text.clone(), next.to_owned())));
        return Err(refuse(RefusedReason::Volumes, text, next));
    }
    Ok((slot, meta, purpose))
}

async fn read_all(mut recv: RecvStream, into: mpsc::Sender<Incoming>, fetches: Arc<AtomicUsize>) {
    loop {
        let incoming = match read_one(&mut recv, &fetches).await {
            Ok(incoming) => incoming,
            Err(why) => Incoming::Gone(why),
        };
        let ends = matches!(incoming, Incoming::Gone(_));
        if into.send(incoming).await.is_err() || ends {
            return;
        }
    }
}

async fn read_one(recv: &mut RecvStream, fetches: &AtomicUsize) -> Result<Incoming, String> {
    let mut head = [0; FRAME_HEADER_BYTES];
    recv.read_exact(&mut head).await.map_err(|e| format!("the agent is gone: {e}"))?;
    let frame = Frame::decode(&head).map_err(|e| e.to_string())?;
    // Only what was asked for, and no more of it than that.
    let fetched = frame.kind == FrameKind::Image
        && frame.body_bytes.max(frame.plain_bytes) <= FETCHED_BYTES_MAX
        && fetches.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1)).is_ok();
    if !fetched && !matches!(frame.kind, FrameKind::FailbackSay | FrameKind::ProbeReply | FrameKind::ImageDone) {
        return Err(protocol(format!("a {:?} frame, which does not belong here", frame.kind)).text);
    }
    let mut body = vec![0; frame.body_bytes];
    recv.read_exact(&mut body).await.map_err(|e| format!("the agent is gone: {e}"))?;
    let mut scratch = Vec::new();
    let plain = frame.open(&body, &mut scratch).map_err(|e| e.to_string())?;
    let decoded = match frame.kind {
        FrameKind::Image => Ok(Incoming::Fetched(plain.to_vec())),
        FrameKind::FailbackSay => decode(frame.kind, plain).map(Incoming::Say),
        FrameKind::ProbeReply => decode(frame.kind, plain).map(Incoming::Differs),
        _ => decode(frame.kind, plain).map(Incoming::Written),
    };
    decoded.map_err(|e| e.to_string())
}

/// The newest point that is here, once it is in the replicas.
async fn moment(slot: &Slot) -> Result<(Arc<Timeline>, u64), String> {
    let board = slot.board().clone();
    let closed = "the group's files are not open";
    let (timeline, live) = (board.timeline.ok_or(closed)?, board.live.ok_or(closed)?);
    let (queue, meta) = (board.queue.ok_or(closed)?, board.meta.ok_or(closed)?);
    let takeover: Takeover = meta.takeover.ok_or("the group does not run here any more")?;
    while !is_rolled(&timeline, &takeover) {
        tokio::time::sleep(HOME_LOOK_INTERVAL).await;
        if let Some(failure) = live.failure() {
            return Err(failure.text.clone());
        }
    }
    let height = live.view().landed.height;
    if timeline.applied().height < height {
        queue.hurry();
        let waits = timeline.clone();
        let there = tokio::task::spawn_blocking(move || waits.wait_applied(height, CATCH_UP_TIME_MAX)).await;
        if !there.unwrap_or(false) {
            return Err("the replicas did not catch up with what is landed".to_owned());
        }
    }
    Ok((timeline, height))
}

/// What changed since a height, read by a thread that may wait for disks.
async fn changed_since(timeline: &Arc<Timeline>, height: u64, sizes: &[u64], unit: u64) -> Result<Blocks, String> {
    let (timeline, sizes) = (timeline.clone(), sizes.to_vec());
    let work = move || Blocks::changed_since(&timeline, height, &sizes, unit);
    let changed: Result<Blocks, HistoryError> = tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())?;
    changed.map_err(|e| e.to_string())
}

impl Talk {
    pub(super) async fn send<T: Serialize>(&mut self, kind: FrameKind, message: &T) -> Result<(), String> {
        let sent = timeout(ANSWER_TIMEOUT, writer::send(&mut self.send, kind, 0, message)).await;
        sent.map_err(|_| "the agent takes nothing".to_owned())?.map_err(|e| format!("the agent is gone: {e}"))
    }

    pub(super) fn show(&self, change: impl FnOnce(&mut Shown)) {
        self.slot.failback.show_of(self.number, change);
    }

    pub(super) async fn tell(&mut self, tell: &FailbackTell) -> Result<(), String> {
        self.send(FrameKind::FailbackTell, tell).await
    }

    pub(super) async fn send_image(&mut self, body: Vec<u8>) -> Result<(), String> {
        let head = Frame::plain(FrameKind::Image, 0, &body).encode();
        let mut chunks = [Bytes::copy_from_slice(&head), Bytes::from(body)];
        let sent = timeout(ANSWER_TIMEOUT, self.send.write_all_chunks(&mut chunks)).await;
        sent.map_err(|_| "the agent takes nothing".to_owned())?.map_err(|e| format!("the agent is gone: {e}"))
    }

    async fn say(&mut self, limit: Duration) -> Result<FailbackSay, String> {
        match timeout(limit, self.incoming.recv()).await {
            Err(_) => Err(format!("the agent said nothing for {} s", limit.as_secs())),
            Ok(Some(Incoming::Say(say))) => Ok(say),
            Ok(other) => Err(unexpected(other)),
        }
    }

    /// The agent's claim.
    async fn ready(&mut self) -> Result<u64, String> {
        match self.say(HOME_READY_TIME_MAX).await? {
            FailbackSay::Ready { claim } => Ok(claim),
            FailbackSay::NotReady { text, next } => {
                self.show(|shown| shown.problem = Some((text.clone(), next)));
                Err(text)
            }
            other => Err(format!("{other:?} was not waited for")),
        }
    }

    /// The agent has heard already, or will now.
    async fn wait_home(&mut self) -> Result<(), String> {
        match self.say(HOME_READY_TIME_MAX).await? {
            FailbackSay::Home => Ok(()),
            other => Err(format!("{other:?} was not waited for")),
        }
    }

    /// Only finds out what differs.
    async fn look(&mut self, meta: &GroupMeta) -> Result<(), String> {
        self.ready().await?;
        let (timeline, height) = moment(&self.slot).await?;
        let split = meta.takeover.as_ref().map_or(0, |takeover| takeover.before_height);
        let here = changed_since(&timeline, split, &self.sizes, DIGEST_BLOCK_BYTES).await?;
        let set = Blocks::all(&self.sizes, REGION_BYTES);
        let passed = self.pass(&timeline, Wish { set, height, write: false, here: Some(&here) }).await?;
        let (differing, only_there) = (passed.differing_bytes, passed.only_there_bytes);
        // Where nothing changed here, what differs from now differs from the split; where something did, it is compared with that.
        let changed = changed_since(&timeline, split, &self.sizes, REGION_BYTES).await;
        let branch = match changed.ok().filter(|_| timeline.pin(split).is_ok()) {
            None => None,
            Some(set) => {
                let passed = self.pass(&timeline, Wish { set, height: split, write: false, here: Some(&here) }).await?;
                Some(only_there + passed.differing_bytes - passed.only_there_bytes)
            }
        };
        let looked = Some(Looked { differing, only_there, branch });
        self.show(|shown| shown.looked = looked);
        Ok(())
    }

    /// Passes until the cut-over.
    async fn bring_home(&mut self, wish: &Failback, orders: &mut mpsc::Receiver<Order>) -> Result<(), String> {
        self.wish = Some(wish.clone());
        let claim = self.ready().await?;
        if let Some(name) = wish.keep_branch.clone().filter(|_| !wish.kept) {
            let (timeline, _) = moment(&self.slot).await?;
            if let Err(why) = self.keep_branch(&timeline, &name).await {
                let next = format!(
                    "see the receiver's log; it is tried again; 'varve failback {} --stop' gives it up",
                    self.slot.name
                );
                let problem = Some((format!("its branch was not kept as '{name}': {why}"), next));
                self.show(|shown| (shown.keeping, shown.problem) = (false, problem));
                return Err(why);
            }
        }
        self.begin_overwriting(wish).await?;
        let mut at = self.slot.failback.take_kept(claim);
        loop {
            let began = Instant::now();
            let outcome = self.next_pass(&mut at).await;
            if let Err(why) = outcome {
                // The point before still holds: what changed since is compared again.
                self.keep(claim, at);
                return Err(why);
            }
            let lag = began.elapsed() + HOME_LOOK_INTERVAL;
            self.show(|shown| shown.lag = Some(lag));
            let waits = tokio::select! {
                order = orders.recv() => match order {
                    // Whoever gives it may have asked for this stream before the agent opened another.
                    Some(_) if !self.slot.failback.is_newest(self.number) => Err("another stream was opened".to_owned()),
                    Some(order) => return self.cut_over(order, claim, at).await,
                    None => Err("another stream was opened, or the return was given up".to_owned()),
                },
                incoming = self.incoming.recv() => Err(unexpected(incoming)),
                () = tokio::time::sleep(HOME_LOOK_INTERVAL) => Ok(()),
            };
            let told = self.tell(&FailbackTell::Following { lag_ms: lag.as_millis() as u64 }).await;
            if let Err(why) = waits.and(told) {
                self.keep(claim, at);
                return Err(why);
            }
        }
    }

    /// Whether the operator still wants what this stream was admitted for, and no other stream has it.
    pub(super) fn check_wanted(&self) -> Result<(), String> {
        let Some(wish) = &self.wish else { return Ok(()) };
        if !self.slot.failback.is_newest(self.number) {
            return Err("another stream was opened".to_owned());
        }
        let board = self.slot.board();
        let now = board.meta.as_ref().and_then(|meta| meta.failback.as_ref());
        if now.is_some_and(|now| now.is(wish)) { Ok(()) } else { Err(GIVEN_UP.to_owned()) }
    }

    /// Durable before the first byte goes: from here on what the host had for itself is not whole.
    async fn begin_overwriting(&mut self, wish: &Failback) -> Result<(), String> {
        self.check_wanted()?;
        let mut wanted = false;
        let begins = |meta: &mut GroupMeta| {
            let GroupMeta { takeover: Some(takeover), failback: Some(now), .. } = meta else { return };
            wanted = now.is(wish);
            if wanted && !takeover.overwritten.contains(&wish.host) {
                takeover.overwritten.push(wish.host.clone());
            }
        };
        self.registry.change_meta(&self.slot, begins).await.map_err(|refused| refused.text)?;
        if wanted { Ok(()) } else { Err(GIVEN_UP.to_owned()) }
    }

    fn keep(&self, claim: u64, at: Option<At>) {
        if let Some(at) = at {
            self.slot.failback.keep(claim, at);
        }
    }

    /// Brings what changed since the last pass.
    async fn next_pass(&mut self, at: &mut Option<At>) -> Result<(), String> {
        let (timeline, height) = moment(&self.slot).await?;
        let set = match at {
            None => Blocks::all(&self.sizes, REGION_BYTES),
            Some(at) if at.pin.height() == height => return Ok(()),
            Some(at) => changed_since(&timeline, at.pin.height(), &self.sizes, REGION_BYTES).await?,
        };
        if set.is_empty()
            && let Some(at) = at
        {
            at.pin = timeline.pin(height).map_err(|e| e.to_string())?;
            return Ok(());
        }
        let passed = self.pass(&timeline, Wish { set, height, write: true, here: None }).await?;
        let mut sent = passed.differing;
        if let Some(before) = at.take() {
            sent.add(&before.sent);
        }
        *at = Some(At { pin: passed.pin, sent });
        Ok(())
    }

    async fn cut_over(&mut self, order: Order, claim: u64, at: Option<At>) -> Result<(), String> {
        let Order { height, epoch, token, quick, answer, given, told } = order;
        self.show(|shown| shown.cutting_over = true);
        let mut at = at;
        let armed = self.last_steps(height, epoch, token, quick, &mut at).await;
        self.keep(claim, at);
        let failed = armed.as_ref().err().cloned();
        // Whoever ordered it may have given up; then it is not given back.
        let _ = answer.send(armed);
        if let Some(why) = failed {
            return Err(why);
        }
        given.await.map_err(|_| "the group still runs on the recovery host".to_owned())?;
        self.tell(&FailbackTell::Home).await?;
        self.wait_home().await?;
        // Nobody may wait for it any more.
        let _ = told.send(());
        Ok(())
    }

    /// Until both are equal and the agent captures.
    async fn last_steps(
        &mut self,
        height: u64,
        epoch: u64,
        token: [u8; 16],
        quick: bool,
        at: &mut Option<At>,
    ) -> Result<Armed, String> {
        let sent_before = self.sent_bytes;
        self.next_pass(at).await?;
        let Some(reached) = at.as_ref().filter(|at| at.pin.height() >= height) else {
            return Err("the last pass did not reach the last write".to_owned());
        };
        self.tell(&FailbackTell::Arm { epoch, token }).await?;
        let (incarnation, position) = match self.say(HOME_READY_TIME_MAX).await? {
            FailbackSay::Armed { incarnation, position } if incarnation != [0; 16] && position % 8 == 0 => {
                (incarnation, position)
            }
            FailbackSay::NotReady { text, .. } => return Err(text),
            other => return Err(format!("{other:?} was not waited for")),
        };
        // From here on whatever anybody writes there is in the new stream. So what is found equal now stays equal.
        let mut set = if quick { reached.sent.clone() } else { Blocks::all(&self.sizes, REGION_BYTES) };
        let compared_bytes = set.bytes();
        let (timeline, height) = moment(&self.slot).await?;
        for _ in 0..VERIFIES_MAX {
            let passed = self.pass(&timeline, Wish { set, height, write: true, here: None }).await?;
            if passed.differing_bytes == 0 {
                let sent_bytes = self.sent_bytes - sent_before;
                let paths = self.paths.clone();
                return Ok(Armed { incarnation, position, paths, compared_bytes, sent_bytes });
            }
            let bytes = passed.differing_bytes;
            tracing::warn!(group = self.slot.name, bytes, "somebody else wrote the volumes at home; sent again");
            set = passed.differing;
        }
        Err("the volumes at home are being written by somebody else".to_owned())
    }
}

/// How often what differs at the barrier is sent again before the cut-over is given up.
const VERIFIES_MAX: usize = 4;
