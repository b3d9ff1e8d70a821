//! An agent that does what the test says, over real QUIC.

use super::LIMIT;
use super::stream::{Sent, Source, wire};
use quinn::{RecvStream, SendStream};
use std::time::Duration;
use tokio::time::timeout;
use varve_common::wire::messages::{
    Ack, Ask, Hello, ImageDone, ProbeReply, Refused, VolumeHello, Welcome, decode, encode,
};
use varve_common::wire::{FRAME_HEADER_BYTES, Frame, FrameKind, Preamble};
use varve_net::identity::HostIdentity;
use zerocopy::{FromBytes, IntoBytes};

/// A stream of one group.
pub struct Agent {
    pub connection: quinn::Connection,
    pub send: SendStream,
    pub recv: RecvStream,
    pub durable: u64,
    pub applied: u64,
}

/// What comes from the receiver.
#[derive(Debug)]
pub enum Got {
    Welcome(Welcome),
    Refused(Refused),
    Ack(Ack),
    ProbeReply(ProbeReply),
    ImageDone(ImageDone),
    Ask(Ask),
    /// The stream or the connection ended.
    End,
}

pub fn hello(group: &str, source: &Source, oldest: u64) -> Hello {
    let volume =
        |(number, bytes): (usize, &u64)| VolumeHello { path: format!("/dev/v{number}"), bytes: *bytes, replica: None };
    Hello {
        group: group.into(),
        epoch: source.epoch,
        incarnation: source.incarnation,
        oldest,
        newest: u64::MAX / 2,
        volumes: source.volumes.iter().enumerate().map(volume).collect(),
        software: "test".into(),
    }
}

impl Agent {
    /// Opens a stream and exchanges preambles.
    pub async fn connect(identity: &HostIdentity, address: &str) -> Self {
        let connection = varve_net::endpoint::connect(identity, address).await.unwrap();
        Self::on(connection).await
    }

    pub async fn on(connection: quinn::Connection) -> Self {
        Self::try_on(connection).await.expect("the receiver greets")
    }

    /// `None`: the receiver has gone.
    pub async fn try_on(connection: quinn::Connection) -> Option<Self> {
        let (mut send, mut recv) = connection.open_bi().await.ok()?;
        send.write_all(Preamble::offer().as_bytes()).await.ok()?;
        let mut bytes = [0; 16];
        timeout(LIMIT, recv.read_exact(&mut bytes)).await.expect("in time").ok()?;
        Preamble::read_from_bytes(&bytes).unwrap().accepted().unwrap();
        Some(Self { connection, send, recv, durable: 0, applied: 0 })
    }

    /// Says hello and gives the answer.
    pub async fn hello(&mut self, hello: &Hello) -> Result<Welcome, Refused> {
        let body = encode(hello);
        self.raw(&wire(&Frame::plain(FrameKind::Hello, 0, &body), &body)).await;
        match self.next().await {
            Got::Welcome(welcome) => Ok(welcome),
            Got::Refused(refused) => Err(refused),
            other => panic!("{other:?}"),
        }
    }

    /// Sends bytes; that nobody takes them any more is seen when reading.
    pub async fn raw(&mut self, bytes: &[u8]) {
        let _ = timeout(LIMIT, self.send.write_all(bytes)).await.expect("the receiver takes it in time");
    }

    pub async fn control<T: serde::Serialize>(&mut self, kind: FrameKind, position: u64, message: &T) {
        let body = encode(message);
        self.raw(&wire(&Frame::plain(kind, position, &body), &body)).await;
    }

    pub async fn say(&mut self, sent: &Sent) {
        self.raw(&sent.bytes).await;
    }

    /// The next frame.
    pub async fn next(&mut self) -> Got {
        match timeout(LIMIT, self.read()).await.expect("the receiver says something in time") {
            Some(got) => got,
            None => Got::End,
        }
    }

    /// The next frame if it comes soon.
    pub async fn poll(&mut self, limit: Duration) -> Option<Got> {
        // Not cancel-safe within a frame: only for moments in which a lost frame does not matter.
        timeout(limit, self.read()).await.ok().map(|got| got.unwrap_or(Got::End))
    }

    /// The next frame, however long it takes.
    pub async fn next_ever(&mut self) -> Got {
        self.read().await.unwrap_or(Got::End)
    }

    /// The sending half alone, and an agent that only reads.
    pub async fn split(mut self) -> (SendStream, Self) {
        let other = self.connection.open_uni().await.expect("the connection lives");
        let send = std::mem::replace(&mut self.send, other);
        (send, self)
    }

    async fn read(&mut self) -> Option<Got> {
        let mut head = [0; FRAME_HEADER_BYTES];
        self.recv.read_exact(&mut head).await.ok()?;
        let frame = Frame::decode(&head).unwrap();
        let mut body = vec![0; frame.body_bytes];
        self.recv.read_exact(&mut body).await.ok()?;
        let mut scratch = Vec::new();
        let plain = frame.open(&body, &mut scratch).unwrap();
        Some(match frame.kind {
            FrameKind::Welcome => Got::Welcome(decode(frame.kind, plain).unwrap()),
            FrameKind::Refused => Got::Refused(decode(frame.kind, plain).unwrap()),
            FrameKind::Ack => {
                let ack: Ack = decode(frame.kind, plain).unwrap();
                assert!(ack.durable >= self.durable, "acknowledgements never go back");
                assert!(ack.applied <= ack.durable);
                (self.durable, self.applied) = (ack.durable, ack.applied);
                Got::Ack(ack)
            }
            FrameKind::ProbeReply => Got::ProbeReply(decode(frame.kind, plain).unwrap()),
            FrameKind::ImageDone => Got::ImageDone(decode(frame.kind, plain).unwrap()),
            FrameKind::Ask => Got::Ask(decode(frame.kind, plain).unwrap()),
            other => panic!("{other:?}"),
        })
    }

    /// Reads until everything before `position` is acknowledged (and applied, if asked for).
    pub async fn wait_durable(&mut self, position: u64, applied: bool) {
        while self.durable < position || (applied && self.applied < position) {
            match self.next().await {
                Got::Ack(_) | Got::ImageDone(_) | Got::ProbeReply(_) => {}
                other => panic!("{other:?} instead of an acknowledgement of {position}"),
            }
        }
    }

    /// Reads until the session is refused.
    pub async fn wait_refused(&mut self) -> Refused {
        loop {
            match self.next().await {
                Got::Refused(refused) => return refused,
                Got::End => panic!("the stream ended without a refusal"),
                _ => {}
            }
        }
    }
}
