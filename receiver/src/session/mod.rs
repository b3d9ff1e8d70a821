//! One group's stream: handshake, then frames in and answers out, until either side ends it.
//!
//! - [`hello`]: what a hello must be
//! - [`intake`]: bytes into batches
//! - [`writer`]: answers and acknowledgements

pub mod hello;
pub mod intake;
pub mod writer;

use crate::clock::wall_ns;
use crate::failback;
use crate::failure::{Failure, protocol, refuse_for_now};
use crate::group::live::Progress;
use crate::group::registry::{Claim, Heard, Registry, Slot};
use crate::group::stream::StreamState;
use crate::limits::{ANSWERS_WAITING_MAX, CHUNKS_AT_ONCE, HELLO_TIMEOUT, TAKEOVER_TIMEOUT};
use bytes::Bytes;
use intake::{Fed, Intake, Rules};
use quinn::{ReadError, RecvStream, SendStream};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use varve_common::control::show_position;
use varve_common::state::Link;
use varve_common::wire::messages::{Ask, FailbackHello, Hello, Refused, RefusedReason, Welcome, decode};
use varve_common::wire::{FRAME_HEADER_BYTES, Frame, FrameKind, Preamble};
use writer::{AckRule, Out, Writer};
use zerocopy::{FromBytes, IntoBytes};

/// Who is at the other end of the connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its name in the registry of hosts.
    pub host: String,
    /// Where from.
    pub remote: SocketAddr,
}

/// How a session ended.
enum End {
    /// The peer or the network ended it.
    Gone(String),
    /// We did.
    Refused(Refused),
}

impl From<Refused> for End {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

/// Serves one stream to its end. Logs how it ended, once.
pub async fn serve(registry: Arc<Registry>, peer: Peer, mut send: SendStream, mut recv: RecvStream) {
    let (host, remote) = (peer.host.as_str(), peer.remote);
    let hello = match timeout(HELLO_TIMEOUT, greet(&mut send, &mut recv)).await {
        Ok(Ok(Greeting::Source(hello))) => hello,
        Ok(Ok(Greeting::Homecoming(hello))) => {
            return failback::stream::serve(&registry, &peer, hello, send, recv).await;
        }
        Ok(Err(End::Refused(refused))) => {
            tracing::warn!(host, %remote, why = refused.text, "a stream was refused before it named its group");
            match refused.reason {
                RefusedReason::Version => drop(send.finish()),
                _ => writer::refuse(send, &refused).await,
            }
            return;
        }
        Ok(Err(End::Gone(why))) => {
            tracing::info!(host, %remote, why, "a stream ended before it named its group");
            return;
        }
        Err(_) => {
            tracing::warn!(host, %remote, "a stream was opened and no hello came");
            return;
        }
    };
    let group = hello.group.escape_debug().to_string();
    match registry.claim(host, &hello).await {
        Ok(claim) => Session::open(claim, hello, &peer, send, recv).await,
        Err(refused) => {
            tracing::warn!(host, %remote, group, reason = ?refused.reason, why = refused.text, "session refused");
            if let Some(slot) = registry.group(&hello.group)
                && slot.belongs_to(host)
            {
                slot.counters.refused_sessions.fetch_add(1, Ordering::Relaxed);
                let mut board = slot.board();
                board.refusal = Some(refused.text.clone());
                if board.asks.is_none() {
                    board.link = Link::Refused;
                }
            }
            writer::refuse(send, &refused).await;
        }
    }
}

/// What a stream is for.
enum Greeting {
    Source(Hello),
    Homecoming(FailbackHello),
}

/// Preamble and hello.
async fn greet(send: &mut SendStream, recv: &mut RecvStream) -> Result<Greeting, End> {
    let gone = |e: &dyn std::fmt::Display| End::Gone(e.to_string());
    let mut bytes = [0; size_of::<Preamble>()];
    recv.read_exact(&mut bytes).await.map_err(|e| gone(&e))?;
    let offer = Preamble::read_from_bytes(&bytes).map_err(|_| protocol("no preamble"))?;
    let (answer, version) = Preamble::answer(&offer).map_err(|e| protocol(e.to_string()))?;
    send.write_all(answer.as_bytes()).await.map_err(|e| gone(&e))?;
    if version.is_none() {
        // Nothing that we could say would be understood: the answer itself says it.
        let text = format!("protocol versions {} to {} only", offer.low.get(), offer.high.get());
        return Err(End::Refused(Refused { reason: RefusedReason::Version, text, next: String::new(), retry: false }));
    }
    let mut head = [0; FRAME_HEADER_BYTES];
    recv.read_exact(&mut head).await.map_err(|e| gone(&e))?;
    let frame = Frame::decode(&head).map_err(|e| protocol(e.to_string()))?;
    if !matches!(frame.kind, FrameKind::Hello | FrameKind::FailbackHello) {
        return Err(protocol(format!("a {:?} frame instead of a hello", frame.kind)).into());
    }
    let mut body = vec![0; frame.body_bytes];
    recv.read_exact(&mut body).await.map_err(|e| gone(&e))?;
    let mut scratch = Vec::new();
    let plain = frame.open(&body, &mut scratch).map_err(|e| protocol(e.to_string()))?;
    let greeting = match frame.kind {
        FrameKind::Hello => decode(frame.kind, plain).map(Greeting::Source),
        _ => decode(frame.kind, plain).map(Greeting::Homecoming),
    };
    Ok(greeting.map_err(|e| protocol(e.to_string()))?)
}

impl Slot {
    /// Whether this host writes to it: what others ask for is not shown as this group's state.
    fn belongs_to(&self, host: &str) -> bool {
        self.board().meta.as_ref().is_some_and(|meta| meta.owner == host)
    }

    /// Notes and logs how a session ended.
    fn end(&self, end: &End, stopping: bool, peer: &Peer) {
        let (group, host, remote) = (self.name.as_str(), peer.host.as_str(), peer.remote);
        let mut board = self.board();
        board.asks = None;
        match end {
            End::Gone(why) => {
                board.link = Link::Disconnected;
                tracing::info!(group, host, %remote, why, "session ended");
            }
            End::Refused(refused) if stopping || refused.reason == RefusedReason::Busy => {
                board.link = Link::Disconnected;
                tracing::info!(group, host, %remote, why = refused.text, "session ended");
            }
            End::Refused(refused) => {
                board.link = Link::Refused;
                board.refusal = Some(refused.text.clone());
                self.counters.refused_sessions.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(group, host, %remote, reason = ?refused.reason, why = refused.text, "session refused");
            }
        }
    }
}

/// A session that was agreed to.
struct Session {
    claim: Claim,
    intake: Intake,
    progress: watch::Receiver<Progress>,
    acks: Arc<AckRule>,
    outbox: mpsc::Sender<Out>,
    asks: mpsc::Receiver<Ask>,
    /// Batches given to the lander, counted as it counts.
    submitted: u64,
    pending: VecDeque<Bytes>,
    blocked: bool,
}

impl Session {
    /// Welcomes the agent, serves it, and gives back the desk when nothing is under way any more.
    async fn open(mut claim: Claim, hello: Hello, peer: &Peer, mut send: SendStream, mut recv: RecvStream) {
        let left_at = claim.desk.left_at;
        let Some(open) = claim.desk.open.as_mut() else {
            return writer::refuse(send, &Failure::stopping().refused()).await;
        };
        let fresh = open.take_fresh();
        let progress = open.live.subscribe();
        let landed = open.live.view().landed;
        let resume = resume_at(&landed, &hello, &claim.slot.name);
        // A ring that begins may go on from the one before only if nothing came after that but this.
        let untouched = resume.is_some() || left_at == Some(landed.at);
        let replicas = claim.meta.volumes.iter().map(|volume| volume.replica.display().to_string()).collect();
        let welcome = Welcome {
            resume,
            epoch: claim.meta.epoch,
            consistent: landed.is_consistent() && untouched,
            fresh,
            replicas,
            software: env!("CARGO_PKG_VERSION").to_owned(),
        };
        if let Err(error) = writer::send(&mut send, FrameKind::Welcome, 0, &welcome).await {
            claim.slot.end(&End::Gone(error.to_string()), false, peer);
            return;
        }
        let (group, host, remote) = (claim.slot.name.as_str(), peer.host.as_str(), peer.remote);
        let newest = show_position(&landed.at.incarnation, landed.at.position);
        let resumed = resume.is_some();
        tracing::info!(group, host, %remote, software = hello.software, newest, resumed, "session open");
        claim.slot.counters.sessions.fetch_add(1, Ordering::Relaxed);

        let epochs = hello.epoch..=claim.meta.epoch;
        let grows = hello::grows(&claim.meta, &hello);
        let rules = Rules { volumes: open.volumes.clone(), incarnation: hello.incarnation, epochs, grows };
        let (to_writer, answers) = mpsc::unbounded_channel();
        let intake = Intake::new(rules, landed, resumed, to_writer, claim.slot.counters.clone());
        let acks = Arc::new(AckRule::new(hello.incarnation, resumed));
        let (outbox, outgoing) = mpsc::channel(ANSWERS_WAITING_MAX);
        let (ask, asks) = mpsc::channel(4);
        {
            let mut board = claim.slot.board();
            (board.link, board.refusal, board.asks) = (Link::Streaming, None, Some(ask));
        }
        let counters = claim.slot.counters.clone();
        let writer = Writer { send, outgoing, answers, progress: progress.clone(), rule: acks.clone(), counters };
        let writing = tokio::spawn(writer.run());
        let submitted = progress.borrow().landed_batches;
        let mut session = Session {
            claim,
            intake,
            progress,
            acks,
            outbox,
            asks,
            submitted,
            pending: VecDeque::new(),
            blocked: false,
        };
        let end = session.run(&mut recv).await;
        session.settle().await;
        let left_at = session.claim.desk.open.as_ref().map(|open| open.live.view().landed.at);
        session.claim.desk.left_at = left_at.filter(|at| at.incarnation == hello.incarnation);
        // Said and shown before the peer hears of it, and before another session can begin.
        let stopping = session.claim.stopping.load(Ordering::Acquire);
        session.claim.slot.end(&end, stopping, peer);
        if let End::Refused(refused) = &end {
            // Nothing more is read, so the writer is told first and the peer's data is not waited for.
            let _ = session.outbox.try_send(Out::Refused(Box::new(refused.clone())));
            let _ = recv.stop(0u32.into());
        }
        drop(session);
        // It ends by itself: it has written the refusal (bounded) or sees that the session has gone.
        let _ = writing.await;
    }

    async fn run(&mut self, recv: &mut RecvStream) -> End {
        let mut chunks: [Bytes; CHUNKS_AT_ONCE] = std::array::from_fn(|_| Bytes::new());
        loop {
            if let Err(end) = self.advance() {
                return end;
            }
            tokio::select! {
                changed = self.claim.turn.changed() => return self.turn_over(changed.is_ok()),
                changed = self.progress.changed() => {
                    if changed.is_err() {
                        return End::Refused(Failure::stopping().refused());
                    }
                    self.blocked = false;
                }
                // The writer has given up: the stream broke, or nobody reads what it writes.
                () = self.outbox.closed() => {}
                ask = self.asks.recv() => {
                    if let Some(ask) = ask && self.outbox.try_send(Out::Ask(ask)).is_err() {
                        return End::Gone("the agent does not read its answers".to_owned());
                    }
                }
                read = recv.read_chunks(&mut chunks), if self.pending.is_empty() => match read {
                    Ok(Some(count)) => self.pending.extend(chunks[..count].iter_mut().map(std::mem::take)),
                    Ok(None) => return End::Gone("the agent closed the stream".to_owned()),
                    Err(error) => return End::Gone(explain(&error)),
                },
            }
        }
    }

    /// Takes what was read, and gives the lander a batch if it has none.
    fn advance(&mut self) -> Result<(), End> {
        if let Some(failure) = self.progress.borrow_and_update().failure.clone() {
            return Err(End::Refused(failure.refused()));
        }
        if self.outbox.is_closed() {
            return Err(End::Gone("the agent does not take its answers any more".to_owned()));
        }
        let mut spilled = false;
        loop {
            while !self.blocked
                && let Some(chunk) = self.pending.front_mut()
            {
                match self.intake.feed(chunk)? {
                    Fed::All => drop(self.pending.pop_front()),
                    Fed::Blocked => self.blocked = true,
                }
            }
            if let Some(report) = self.intake.report.take() {
                self.intake.trim();
                let durable = self.progress.borrow().durable;
                let mut board = self.claim.slot.board();
                board.report = Some((report, Instant::now()));
                board.clock.note(durable.time_ns, wall_ns(), Instant::now());
            }
            if let Some(reply) = self.intake.reply.take() {
                let session = self.claim.slot.counters.sessions.load(Ordering::Acquire);
                self.claim.slot.heard.send_replace(Some(Heard { session, reply }));
            }
            let Some(open) = &self.claim.desk.open else {
                return Err(End::Refused(Failure::stopping().refused()));
            };
            if std::mem::take(&mut self.intake.starved) && !spilled {
                // The applier's queue holds all memory: what waits there is read from the log instead.
                open.queue.spill();
                (spilled, self.blocked) = (true, false);
                continue;
            }
            let idle = self.progress.borrow().landed_batches == self.submitted;
            let Some(batch) = idle.then(|| self.intake.next_batch()).flatten() else {
                if idle && self.intake.can_grow {
                    let text = "the volumes grew and the gap in which their replicas follow has begun";
                    return Err(refuse_for_now(RefusedReason::Busy, text, "the agent connects again by itself").into());
                }
                return Ok(());
            };
            self.submitted += 1;
            if batch.has_begin() {
                self.acks.begun_at(self.submitted);
            }
            if open.batches.send(batch).is_err() {
                // The lander has ended; the next change of the progress says why.
                return Ok(());
            }
        }
    }

    fn turn_over(&self, registry_lives: bool) -> End {
        let stopping = !registry_lives || self.claim.stopping.load(Ordering::Acquire);
        End::Refused(if stopping {
            Failure::stopping().refused()
        } else {
            let next = "it is tried again by itself; if it stays, two agents run with the same identity";
            refuse_for_now(RefusedReason::Busy, "a newer session of this group was opened", next)
        })
    }

    /// Waits until the lander has nothing of this session: the next one must see where the log really ends.
    async fn settle(&mut self) {
        let submitted = self.submitted;
        let done = |progress: &Progress| progress.landed_batches >= submitted || progress.failure.is_some();
        let waited = timeout(TAKEOVER_TIMEOUT / 2, self.progress.wait_for(done)).await;
        if waited.is_err()
            && let Some(open) = &self.claim.desk.open
        {
            open.live.fail(Failure::damaged("the landing log did not take a batch in time"));
        }
    }
}

/// Where the agent goes on in its ring; `None` if it must begin anew.
fn resume_at(landed: &StreamState, hello: &Hello, group: &str) -> Option<u64> {
    if !landed.begun() || landed.at.incarnation != hello.incarnation {
        return None;
    }
    let end = landed.at.position;
    if (hello.oldest..=hello.newest).contains(&end) {
        return Some(end);
    }
    tracing::error!(
        group,
        landed = end,
        oldest = hello.oldest,
        newest = hello.newest,
        "the agent cannot go on where the landing log ends: a gap begins"
    );
    None
}

fn explain(error: &ReadError) -> String {
    match error {
        ReadError::Reset(_) => "the agent reset the stream".to_owned(),
        ReadError::ConnectionLost(lost) => lost.to_string(),
        other => other.to_string(),
    }
}
