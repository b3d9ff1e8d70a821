//! One session of a group with the receiver: the handshake, frames out, frames in. No decisions are made here.

use super::shared::{Counters, GroupShared};
use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::mpsc;
use varve_common::problem::Problem;
use varve_common::wire::messages::{self, Ack, Ask, Hello, ImageDone, ProbeReply, Refused, Welcome};
use varve_common::wire::{FRAME_HEADER_BYTES, Frame, FrameKind, Preamble, WireError};
use zerocopy::{FromBytes, IntoBytes};

/// Longest wait for the receiver's answer to a Hello: it may recover the group's landing log first.
const HELLO_TIMEOUT: Duration = Duration::from_secs(60);
/// Events that wait for the worker.
const EVENTS_MAX: usize = 256;

/// Why a session ended.
#[derive(Debug)]
pub enum Ended {
    /// The receiver said why.
    Refused(Refused),
    /// The connection or the stream is gone.
    Lost(String),
    /// The receiver does not keep to the protocol.
    Protocol(WireError),
    /// The group is being unprotected, or the daemon stops.
    Stopped,
}

impl From<WireError> for Ended {
    fn from(error: WireError) -> Self {
        Self::Protocol(error)
    }
}

fn lost(error: impl std::fmt::Display) -> Ended {
    Ended::Lost(error.to_string())
}

/// What the receiver said, as far as the worker must decide.
#[derive(Debug)]
pub enum Event {
    /// Answer to a probe.
    Probed(ProbeReply),
    /// An image is durable.
    ImageDone(ImageDone),
    /// A wish of the receiver's operator.
    Ask(Ask),
    /// The session is over.
    Ended(Ended),
}

/// Opens the group's stream and agrees with the receiver.
pub async fn open(connection: &quinn::Connection, hello: &Hello) -> Result<(SendStream, RecvStream, Welcome), Ended> {
    let (mut send, mut recv) = connection.open_bi().await.map_err(lost)?;
    send.write_all(Preamble::offer().as_bytes()).await.map_err(lost)?;
    send_control(&mut send, FrameKind::Hello, 0, messages::encode(hello)).await?;
    let answer = async {
        let mut bytes = [0; size_of::<Preamble>()];
        recv.read_exact(&mut bytes).await.map_err(lost)?;
        Preamble::read_from_bytes(&bytes).map_err(|_| WireError::Preamble)?.accepted()?;
        let (frame, body) = read_frame(&mut recv).await?;
        match frame.kind {
            FrameKind::Welcome => Ok(messages::decode::<Welcome>(frame.kind, &body)?),
            FrameKind::Refused => Err(Ended::Refused(messages::decode(frame.kind, &body)?)),
            _ => Err(Ended::Protocol(WireError::Header)),
        }
    };
    let welcome = tokio::time::timeout(HELLO_TIMEOUT, answer)
        .await
        .map_err(|_| Ended::Lost(format!("no answer to the greeting within {} s", HELLO_TIMEOUT.as_secs())))??;
    Ok((send, recv, welcome))
}

/// Sends a control frame.
pub async fn send_control(send: &mut SendStream, kind: FrameKind, position: u64, body: Vec<u8>) -> Result<(), Ended> {
    let header = Frame::plain(kind, position, &body).encode();
    let mut chunks = [Bytes::copy_from_slice(&header), Bytes::from(body)];
    send.write_all_chunks(&mut chunks).await.map_err(lost)
}

/// Sends a frame whose body is ready, in one part or several.
pub async fn send_frame(send: &mut SendStream, frame: Frame, mut body: Vec<Bytes>) -> Result<(), Ended> {
    let mut chunks = vec![Bytes::copy_from_slice(&frame.encode())];
    chunks.append(&mut body);
    send.write_all_chunks(&mut chunks).await.map_err(lost)
}

/// Reads one control frame; its length is checked before it is allocated.
async fn read_frame(recv: &mut RecvStream) -> Result<(Frame, Vec<u8>), Ended> {
    let mut header = [0; FRAME_HEADER_BYTES];
    recv.read_exact(&mut header).await.map_err(lost)?;
    let frame = Frame::decode(&header)?;
    if matches!(frame.kind, FrameKind::Data | FrameKind::Image) {
        return Err(Ended::Protocol(WireError::Kind { kind: frame.kind as u8, codec: frame.codec as u8 }));
    }
    let mut body = vec![0; frame.body_bytes];
    recv.read_exact(&mut body).await.map_err(lost)?;
    let mut scratch = Vec::new();
    let plain = frame.open(&body, &mut scratch)?.to_vec();
    Ok((frame, plain))
}

/// Reads what the receiver says until the session ends. Acknowledgements take effect at once: the ring's space goes back
/// to the kernel without waiting for the worker's turn.
pub fn spawn_reader(
    mut recv: RecvStream,
    shared: Arc<GroupShared>,
    release: impl Fn(u64) -> Result<(), WireError> + Send + Sync + 'static,
) -> (mpsc::Receiver<Event>, tokio::task::JoinHandle<()>) {
    let (events, receiver) = mpsc::channel(EVENTS_MAX);
    let task = tokio::spawn(async move {
        let ended = loop {
            let event = match next_event(&mut recv, &shared, &release).await {
                Ok(None) => continue,
                Ok(Some(event)) => event,
                Err(ended) => break ended,
            };
            if events.send(event).await.is_err() {
                return;
            }
        };
        // The worker may be gone already.
        let _ = events.send(Event::Ended(ended)).await;
    });
    (receiver, task)
}

async fn next_event(
    recv: &mut RecvStream,
    shared: &GroupShared,
    release: &(impl Fn(u64) -> Result<(), WireError> + Send + Sync),
) -> Result<Option<Event>, Ended> {
    let (frame, body) = read_frame(recv).await?;
    let kind = frame.kind;
    Ok(match kind {
        FrameKind::Ack => {
            let ack: Ack = messages::decode(kind, &body)?;
            release(ack.durable)?;
            shared.applied.store(ack.applied, Ordering::Release);
            None
        }
        FrameKind::ProbeReply => Some(Event::Probed(messages::decode(kind, &body)?)),
        FrameKind::ImageDone => Some(Event::ImageDone(messages::decode(kind, &body)?)),
        FrameKind::Ask => Some(Event::Ask(messages::decode(kind, &body)?)),
        FrameKind::Refused => return Err(Ended::Refused(messages::decode(kind, &body)?)),
        _ => return Err(Ended::Protocol(WireError::Kind { kind: kind as u8, codec: 0 })),
    })
}

impl Ended {
    /// In words, for status and log; what to do next is in the text where there is something to do.
    pub fn explain(&self) -> String {
        match self {
            Self::Refused(refused) => format!("the receiver refuses: {}. {}", refused.text, refused.next),
            Self::Lost(why) => format!("the connection to the receiver was lost: {why}"),
            Self::Protocol(WireError::Version { peer_newest }) => format!(
                "the receiver speaks protocol versions up to {peer_newest}, this agent {} to {}. \
                 Install matching versions of varve on both hosts",
                varve_common::wire::VERSION_MIN,
                varve_common::wire::VERSION_MAX
            ),
            Self::Protocol(error) => format!("the receiver does not keep to the protocol: {error}"),
            Self::Stopped => "stopped".to_owned(),
        }
    }
}

/// Counts a finished session in the group's counters.
pub fn count(shared: &GroupShared, ended: &Ended) {
    if matches!(ended, Ended::Refused(_)) {
        Counters::add(&shared.counters.refused_sessions, 1);
    }
}

/// What a caller is told when the group has no session.
pub fn not_streaming(group: &str) -> Problem {
    Problem::unreachable(
        format!("group '{group}' has no session with its receiver"),
        "the receiver cannot be asked now",
        format!("look at 'varve status {group}' for the reason"),
    )
}
