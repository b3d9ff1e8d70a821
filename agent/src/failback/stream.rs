//! The conversation with the receiver about a group that comes home.

use super::disks::{self, Did, Disks, Job};
use super::{Held, Returning};
use crate::daemon::Daemon;
use crate::group::send_control;
use crate::store::GroupFile;
use quinn::{RecvStream, SendStream};
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use varve_common::problem::{Problem, ProblemKind};
use varve_common::state::Link;
use varve_common::wire::messages::{
    self, FailbackHello, FailbackPurpose, FailbackSay, FailbackTell, FailbackWelcome, Probe, Refused, VolumeHello,
};
use varve_common::wire::{FRAME_HEADER_BYTES, Frame, FrameKind, Preamble};
use varve_io::direct::DirectFile;
use zerocopy::{FromBytes, IntoBytes};

/// Longest wait for the receiver's answer.
const HELLO_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait for a connection.
const CONNECT_WAIT: Duration = Duration::from_secs(10);
/// Frames that wait: each may hold a region.
const FRAMES_WAITING_MAX: usize = 8;

/// How a stream ended.
pub(super) enum Ended {
    /// The group is ours.
    Home,
    /// Compared, not touched.
    Looked,
    /// The daemon ends, or the group.
    Stopped,
    /// Tried again.
    Lost(Problem),
}

enum Incoming {
    Compare(Probe),
    Write(Vec<u8>),
    Tell(FailbackTell),
    Gone(Problem),
}

fn lost(why: impl std::fmt::Display) -> Problem {
    Problem::unreachable("not home yet", why.to_string(), "it goes on by itself")
}

/// One stream, from its begin to its end.
pub(super) async fn run(daemon: &Arc<Daemon>, returning: &Arc<Returning>, held: &mut Held) -> Ended {
    match converse(daemon, returning, held).await {
        Ok(ended) => ended,
        Err(problem) => Ended::Lost(problem),
    }
}

async fn converse(daemon: &Arc<Daemon>, returning: &Arc<Returning>, held: &mut Held) -> Result<Ended, Problem> {
    let connection = daemon.connection(CONNECT_WAIT).await?;
    returning.show(|shown| shown.link = Link::Handshaking);
    let file = returning.shown().file;
    let volume = |(path, bytes): (&String, &u64)| VolumeHello { path: path.clone(), bytes: *bytes, replica: None };
    let hello = FailbackHello {
        group: file.name.clone(),
        volumes: file.volumes.iter().zip(&file.bytes).map(volume).collect(),
        claim: held.claim.as_ref().map_or(0, |claim| claim.id),
        token: file.token(),
        software: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let opened = tokio::time::timeout(HELLO_TIMEOUT, open(&connection, &hello)).await;
    let (send, recv, welcome) = opened.map_err(|_| lost("the receiver does not answer"))??;
    returning.show(|shown| (shown.link, shown.reason) = (Link::Streaming, None));
    let (into, incoming) = mpsc::channel(FRAMES_WAITING_MAX);
    let reader = Aborted(tokio::spawn(read_all(recv, into)));
    let mut talk = Talk { daemon, returning, send, incoming };
    let ended = match welcome.purpose {
        FailbackPurpose::Home => talk.arrive(held, welcome.epoch).await,
        FailbackPurpose::Look => talk.look(&file).await,
        FailbackPurpose::Write => talk.come_home(held).await,
    };
    drop(reader);
    ended
}

/// A task that ends with this.
struct Aborted(tokio::task::JoinHandle<()>);

impl Drop for Aborted {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn open(
    connection: &quinn::Connection,
    hello: &FailbackHello,
) -> Result<(SendStream, RecvStream, FailbackWelcome), Problem> {
    let (mut send, mut recv) = connection.open_bi().await.map_err(lost)?;
    send.write_all(Preamble::offer().as_bytes()).await.map_err(lost)?;
    let hello = messages::encode(hello);
    send_control(&mut send, FrameKind::FailbackHello, 0, hello).await.map_err(|ended| lost(ended.explain()))?;
    let mut bytes = [0; size_of::<Preamble>()];
    recv.read_exact(&mut bytes).await.map_err(lost)?;
    let answer = Preamble::read_from_bytes(&bytes).map_err(|_| lost("no preamble"))?;
    answer.accepted().map_err(lost)?;
    let (frame, body) = read_frame(&mut recv).await?;
    match frame.kind {
        FrameKind::FailbackWelcome => Ok((send, recv, messages::decode(frame.kind, &body).map_err(lost)?)),
        FrameKind::Refused => Err(refused(&body)),
        kind => Err(lost(format!("the receiver answered with a {kind:?} frame"))),
    }
}

fn refused(body: &[u8]) -> Problem {
    match messages::decode::<Refused>(FrameKind::Refused, body) {
        Ok(refused) => Problem::refused("not home yet", refused.text, refused.next),
        Err(error) => lost(error),
    }
}

/// Reads one frame; its length is checked before it is allocated.
async fn read_frame(recv: &mut RecvStream) -> Result<(Frame, Vec<u8>), Problem> {
    let mut head = [0; FRAME_HEADER_BYTES];
    recv.read_exact(&mut head).await.map_err(|e| lost(format!("the receiver is gone: {e}")))?;
    let frame = Frame::decode(&head).map_err(lost)?;
    let mut body = vec![0; frame.body_bytes];
    recv.read_exact(&mut body).await.map_err(|e| lost(format!("the receiver is gone: {e}")))?;
    let mut scratch = Vec::new();
    // Images are never compressed on this stream.
    if frame.plain_bytes != frame.body_bytes {
        return Err(lost("a compressed frame"));
    }
    frame.open(&body, &mut scratch).map_err(lost)?;
    Ok((frame, body))
}

async fn read_all(mut recv: RecvStream, into: mpsc::Sender<Incoming>) {
    loop {
        let incoming = match read_frame(&mut recv).await {
            Ok((frame, body)) => match frame.kind {
                FrameKind::Image => Incoming::Write(body),
                FrameKind::Probe => decoded(frame.kind, &body, Incoming::Compare),
                FrameKind::FailbackTell => decoded(frame.kind, &body, Incoming::Tell),
                FrameKind::Refused => Incoming::Gone(refused(&body)),
                kind => Incoming::Gone(lost(format!("a {kind:?} frame, which does not belong here"))),
            },
            Err(problem) => Incoming::Gone(problem),
        };
        let ends = matches!(incoming, Incoming::Gone(_));
        if into.send(incoming).await.is_err() || ends {
            return;
        }
    }
}

fn decoded<T: for<'de> serde::Deserialize<'de>>(kind: FrameKind, body: &[u8], make: fn(T) -> Incoming) -> Incoming {
    messages::decode(kind, body).map_or_else(|error| Incoming::Gone(lost(error)), make)
}

struct Talk<'a> {
    daemon: &'a Arc<Daemon>,
    returning: &'a Arc<Returning>,
    send: SendStream,
    incoming: mpsc::Receiver<Incoming>,
}

impl Talk<'_> {
    async fn send<T: Serialize>(&mut self, kind: FrameKind, message: &T) -> Result<(), Problem> {
        let sent = send_control(&mut self.send, kind, 0, messages::encode(message)).await;
        sent.map_err(|ended| lost(ended.explain()))
    }

    async fn say(&mut self, say: &FailbackSay) -> Result<(), Problem> {
        self.send(FrameKind::FailbackSay, say).await
    }

    /// Tells the receiver what is in the way, and gives it back.
    async fn not_ready(&mut self, problem: Problem) -> Problem {
        let (text, next) = (problem.why.clone(), problem.next.clone());
        // If it cannot be said, the stream's end says that we are not ready.
        let _ = self.say(&FailbackSay::NotReady { text, next }).await;
        let _ = self.send.finish();
        let _ = tokio::time::timeout(Duration::from_secs(1), self.send.stopped()).await;
        problem
    }

    async fn look(&mut self, file: &GroupFile) -> Result<Ended, Problem> {
        let files = match disks::look(file) {
            Ok(files) => files,
            Err(problem) => return Err(self.not_ready(problem).await),
        };
        self.say(&FailbackSay::Ready { claim: 0 }).await?;
        match self.serve(files, false, &mut Held::default()).await {
            // The receiver ends the stream when it has seen enough.
            Err(problem) if problem.kind == ProblemKind::Unreachable => Ok(Ended::Looked),
            other => other,
        }
    }

    async fn come_home(&mut self, held: &mut Held) -> Result<Ended, Problem> {
        // Whatever was begun at the last try: the group still runs there.
        held.end_capture().await;
        if held.claim.is_none() {
            let file = self.returning.shown().file;
            match self.daemon.claim_for_return(&file).await {
                Ok(claim) => held.claim = Some(claim),
                Err(problem) => return Err(self.not_ready(problem).await),
            }
        }
        let Some(claim) = &held.claim else { return Err(lost("the volumes are not claimed")) };
        let (id, files) = (claim.id, claim.files.clone());
        let mut file = self.returning.shown().file;
        if let Err(problem) = self.daemon.begin_return(&mut file, held).await {
            return Err(self.not_ready(problem).await);
        }
        self.returning.show(|shown| (shown.file, shown.claimed) = (file, true));
        self.say(&FailbackSay::Ready { claim: id }).await?;
        self.serve(files, true, held).await
    }

    /// Does what the receiver says, until it says that the group is home.
    async fn serve(&mut self, files: Arc<Vec<DirectFile>>, write: bool, held: &mut Held) -> Result<Ended, Problem> {
        let (did, mut done) = mpsc::unbounded_channel();
        let disks = Disks::start(files, write, did)?;
        let outcome = loop {
            tokio::select! {
                did = done.recv() => {
                    let sent = match did {
                        Some(Did::Compared(reply, bytes)) => {
                            self.returning.show(|shown| {
                                shown.progress = shown.progress.map(|(done, total)| ((done + bytes).min(total), total));
                            });
                            self.send(FrameKind::ProbeReply, &reply).await
                        }
                        Some(Did::Written(done)) => self.send(FrameKind::ImageDone, &done).await,
                        Some(Did::Read(body)) => {
                            let sent = send_control(&mut self.send, FrameKind::Image, 0, body).await;
                            sent.map_err(|ended| lost(ended.explain()))
                        }
                        Some(Did::Failed(why)) => {
                            let problem = Problem::failed("not home yet", why, "see the kernel's log; it is tried again");
                            Err(self.not_ready(problem).await)
                        }
                        None => Err(lost("the disks' thread ended")),
                    };
                    if let Err(problem) = sent {
                        break Err(problem);
                    }
                }
                incoming = self.incoming.recv() => match incoming {
                    Some(Incoming::Compare(probe)) => disks.order(Job::Compare(probe)),
                    Some(Incoming::Write(body)) => disks.order(Job::Write(body)),
                    Some(Incoming::Tell(FailbackTell::Fetch { id, volume, offset, length })) if write => {
                        disks.order(Job::Read(id, volume, offset, length));
                    }
                    Some(Incoming::Tell(FailbackTell::Arm { epoch, token })) if write => {
                        if let Err(problem) = self.arm(held, epoch, token).await {
                            break Err(problem);
                        }
                    }
                    Some(Incoming::Tell(FailbackTell::Home)) if held.armed.is_some() => break Ok(()),
                    Some(Incoming::Tell(tell)) => self.heard(&tell),
                    Some(Incoming::Gone(problem)) => break Err(problem),
                    None => break Err(lost("the stream ended")),
                },
            }
        };
        // Nothing is written any more when it has ended.
        let _ = tokio::task::spawn_blocking(move || drop(disks)).await;
        outcome?;
        let epoch = held.armed.as_ref().map_or(0, |armed| armed.handle.file.epoch);
        self.arrive(held, epoch).await
    }

    fn heard(&self, tell: &FailbackTell) {
        self.returning.show(|shown| match tell {
            FailbackTell::Pass { number, total_bytes } => {
                shown.progress = Some((0, *total_bytes));
                shown.reason = Some(format!("the group runs on the recovery host and comes home: pass {number}"));
            }
            FailbackTell::Following { lag_ms } => {
                let lag = *lag_ms as f64 / 1000.0;
                shown.progress = None;
                shown.reason = Some(format!(
                    "the group runs on the recovery host; the volumes here follow it by {lag:.1} s: \
                     'varve failback {} --cut-over' there gives it back",
                    shown.file.name
                ));
            }
            FailbackTell::Arm { .. } | FailbackTell::Home | FailbackTell::Fetch { .. } => {}
        });
    }

    /// Captures again, so that whatever is written from here on is known.
    async fn arm(&mut self, held: &mut Held, epoch: u64, token: [u8; 16]) -> Result<(), Problem> {
        let mut file = self.returning.shown().file;
        let armed = self.daemon.arm(&mut file, epoch, token, held).await;
        self.returning.show(|shown| shown.file = file);
        let (incarnation, position) = match armed {
            Ok(begin_of_stream) => begin_of_stream,
            Err(problem) => return Err(self.not_ready(problem).await),
        };
        self.say(&FailbackSay::Armed { incarnation, position }).await
    }

    /// The group is ours: durably first, then the claim ends.
    async fn arrive(&mut self, held: &mut Held, epoch: u64) -> Result<Ended, Problem> {
        let file = self.returning.shown().file;
        self.daemon.arrive(file, epoch, held).await?;
        // If it cannot be said, the ordinary session says it.
        let _ = self.say(&FailbackSay::Home).await;
        let _ = self.send.finish();
        let _ = tokio::time::timeout(Duration::from_secs(1), self.send.stopped()).await;
        Ok(Ended::Home)
    }
}
