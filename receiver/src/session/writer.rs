//! Everything that goes back to the agent, written by one task, so that answers never wait for what is read.

use crate::apply::work::Answered;
use crate::group::live::{Counters, Progress};
use crate::limits::{ANSWER_TIMEOUT, REFUSED_TIMEOUT};
use quinn::{SendStream, WriteError};
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use varve_common::wire::messages::{Ack, Ask, Incarnation, Refused, encode};
use varve_common::wire::{Frame, FrameKind};

/// What the session has to say.
#[derive(Debug)]
pub enum Out {
    /// A wish of the operator.
    Ask(Ask),
    /// The last word.
    Refused(Box<Refused>),
}

/// From when on positions mean something to the agent: once the log is in its incarnation by this session's doing.
#[derive(Debug)]
pub struct AckRule {
    incarnation: Incarnation,
    from_batch: AtomicU64,
}

impl AckRule {
    /// From the start if the session was resumed.
    pub fn new(incarnation: Incarnation, resumed: bool) -> Self {
        Self { incarnation, from_batch: AtomicU64::new(if resumed { 0 } else { u64::MAX }) }
    }

    /// The batch with this number holds a begin.
    pub fn begun_at(&self, batch: u64) {
        self.from_batch.fetch_min(batch, Ordering::AcqRel);
    }

    fn ack(&self, progress: &Progress) -> Option<Ack> {
        let known = progress.landed_batches >= self.from_batch.load(Ordering::Acquire);
        let durable = progress.durable;
        let same = durable.incarnation == self.incarnation;
        let applied = if progress.applied.incarnation == self.incarnation { progress.applied.position } else { 0 };
        (known && same).then_some(Ack { durable: durable.position, applied: applied.min(durable.position) })
    }
}

/// The task.
#[derive(Debug)]
pub struct Writer {
    /// To the agent.
    pub send: SendStream,
    /// From the session; its end is the writer's end.
    pub outgoing: mpsc::Receiver<Out>,
    /// From the applier.
    pub answers: mpsc::UnboundedReceiver<Answered>,
    /// From both threads.
    pub progress: watch::Receiver<Progress>,
    /// When to acknowledge.
    pub rule: Arc<AckRule>,
    /// Of the group.
    pub counters: Arc<Counters>,
}

impl Writer {
    /// Writes until the session ends, the stream breaks, or the agent does not read (the session sees each of them).
    /// Answers wait in memory without a limit of their own: a place among the probes is free before its answer is read.
    pub async fn run(mut self) {
        let mut acked = None;
        loop {
            let written = tokio::select! {
                biased;
                out = self.outgoing.recv() => match out {
                    Some(Out::Ask(ask)) => patiently(&mut self.send, FrameKind::Ask, 0, &ask).await,
                    Some(Out::Refused(refused)) => return refuse(self.send, &refused).await,
                    None => {
                        let _ = self.send.finish();
                        return;
                    }
                },
                Some(answered) = self.answers.recv() => match answered {
                    Answered::Probe(reply) => patiently(&mut self.send, FrameKind::ProbeReply, 0, &reply).await,
                    Answered::Image(done) => patiently(&mut self.send, FrameKind::ImageDone, 0, &done).await,
                },
                Ok(()) = self.progress.changed() => {
                    let ack = self.rule.ack(&self.progress.borrow_and_update());
                    match ack.filter(|ack| acked != Some(*ack)) {
                        Some(ack) => {
                            acked = Some(ack);
                            self.counters.acks.fetch_add(1, Ordering::Relaxed);
                            patiently(&mut self.send, FrameKind::Ack, ack.durable, &ack).await
                        }
                        None => true,
                    }
                }
            };
            if !written {
                return;
            }
        }
    }
}

/// Writes one control frame; whether the agent took it in time. It has a window of megabytes before this waits at all.
async fn patiently<T: Serialize>(to: &mut SendStream, kind: FrameKind, position: u64, message: &T) -> bool {
    timeout(ANSWER_TIMEOUT, send(to, kind, position, message)).await.is_ok_and(|sent| sent.is_ok())
}

/// Writes one control frame.
pub async fn send<T: Serialize>(
    send: &mut SendStream,
    kind: FrameKind,
    position: u64,
    message: &T,
) -> Result<(), WriteError> {
    let body = encode(message);
    let head = Frame::plain(kind, position, &body).encode();
    let mut bytes = Vec::with_capacity(head.len() + body.len());
    bytes.extend_from_slice(&head);
    bytes.extend_from_slice(&body);
    send.write_all(&bytes).await
}

/// Writes a refusal as the last frame and gives the peer a moment to read it.
pub async fn refuse(mut to: SendStream, refused: &Refused) {
    let said = async {
        send(&mut to, FrameKind::Refused, 0, refused).await.ok()?;
        to.finish().ok()?;
        to.stopped().await.ok()
    };
    // If it does not read it, it will see the stream end.
    let _ = timeout(REFUSED_TIMEOUT, said).await;
}
