//! The transmission phase of one connection.
//!
//! The reader takes requests and gives each to a blocking thread; the thread puts its reply into the writer's queue. A
//! request holds a place and its buffer's bytes until its reply is written, so a client that does not take replies stops
//! being read, and the queue (as long as there are places) is never full.

use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use bytes::Buf;
use nix::libc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task;
use tokio::time::timeout;
use varve_io::{AlignedBuf, PAGE_BYTES};

use super::exports::Opened;
use super::negotiation::Agreed;
use super::request::{
    Action, Allowed, REQUEST_BYTES, Refused, Request, chunk_header, error_reply, simple_reply, status_reply,
};
use super::wire::{CHUNK_DATA, CHUNK_HOLE, CHUNK_NONE, CMD_DISC};
use crate::disk::Disk;
use crate::limits::{
    NBD_END_TIMEOUT, NBD_EXTENTS_MAX, NBD_IN_FLIGHT_BYTES_MAX, NBD_IN_FLIGHT_MAX, NBD_READ_CHUNKS_MAX,
    NBD_READ_HOLE_BYTES_MIN, NBD_REPLY_TIMEOUT, NBD_STRETCHES_MAX,
};

/// The unit of the semaphore over buffers.
const PERMIT_BYTES: u32 = 1024;

/// A reply, and the places that it holds until it is written.
struct Reply {
    parts: Vec<(Vec<u8>, Range<usize>)>,
    body: Option<AlignedBuf>,
    _places: Places,
}

struct Places {
    _slot: OwnedSemaphorePermit,
    _bytes: Option<OwnedSemaphorePermit>,
    /// Released before the others: given back when the disk's call is done.
    call: Option<OwnedSemaphorePermit>,
}

/// Serves requests until the client leaves, is cut off, or the export or the server closes.
pub(super) async fn serve<S>(stream: S, export: Opened, agreed: &Agreed, mut stop: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    // Held to the end: who closes the export waits for it.
    let Opened { disk, facts, calls, mut closing } = export;
    let (read, write) = tokio::io::split(stream);
    let (replies, queue) = mpsc::channel(NBD_IN_FLIGHT_MAX);
    let slots = Arc::new(Semaphore::new(NBD_IN_FLIGHT_MAX));
    let allowed = Allowed {
        size: facts.size,
        read_only: facts.read_only,
        allocation: agreed.allocation,
        structured: agreed.structured,
    };
    let mut writer = task::spawn(write_replies(write, queue));
    let bytes = Arc::new(Semaphore::new((NBD_IN_FLIGHT_BYTES_MAX / PERMIT_BYTES) as usize));
    let reader = Reader { read, allowed, disk, calls, slots: slots.clone(), bytes, replies };
    let mut written = false;
    // The reader, and with it its sender of replies, ends with this.
    let ended = tokio::select! {
        ended = reader.run() => ended,
        _ = closing.wait_for(|closed| *closed) => Ok(()),
        _ = stop.wait_for(|stopped| *stopped) => Ok(()),
        _ = &mut writer => { written = true; Ok(()) }
    };
    if let Err(e) = ended {
        tracing::debug!(export = facts.name, "an NBD client was cut off: {e}");
    }
    if !written && timeout(NBD_END_TIMEOUT, &mut writer).await.is_err() {
        writer.abort();
        let _ = writer.await;
    }
    // The disk is let go of only when no call of it is under way.
    let _ = slots.acquire_many(NBD_IN_FLIGHT_MAX as u32).await;
}

struct Reader<S> {
    read: ReadHalf<S>,
    allowed: Allowed,
    disk: Arc<dyn Disk>,
    calls: Arc<Semaphore>,
    slots: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    replies: mpsc::Sender<Reply>,
}

impl<S: AsyncRead + AsyncWrite + Send + 'static> Reader<S> {
    async fn run(mut self) -> io::Result<()> {
        loop {
            let mut head = [0; REQUEST_BYTES];
            match self.read.read_exact(&mut head).await {
                Ok(_) => {}
                // Gone without a word between two requests: as good as DISC.
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(e) => return Err(e),
            }
            let request = Request::decode(&head).map_err(io::Error::other)?;
            if request.command == CMD_DISC {
                return Ok(());
            }
            let slot = place(&self.slots, 1).await?;
            match request.check(&self.allowed) {
                Ok(action) => self.start(request, action, slot).await?,
                Err(refused) => {
                    self.read_over(request.payload_bytes()).await?;
                    let places = Places { _slot: slot, _bytes: None, call: None };
                    let head = error_reply(self.allowed.structured, request.cookie, &refused);
                    send(&self.replies, Reply { parts: vec![(head, 0..0)], body: None, _places: places });
                }
            }
        }
    }

    async fn start(&mut self, request: Request, action: Action, slot: OwnedSemaphorePermit) -> io::Result<()> {
        let buffered = matches!(action, Action::Read { .. } | Action::Write) && request.len > 0;
        let mut places = Places { _slot: slot, _bytes: None, call: None };
        let mut body = None;
        if buffered {
            places._bytes = Some(place(&self.bytes, request.len.div_ceil(PERMIT_BYTES)).await?);
            let mut buffer = AlignedBuf::new((request.len as usize).next_multiple_of(PAGE_BYTES));
            if action == Action::Write {
                self.read.read_exact(&mut buffer[..request.len as usize]).await?;
            }
            body = Some(buffer);
        }
        places.call = Some(place(&self.calls, 1).await?);
        let (disk, replies, structured) = (self.disk.clone(), self.replies.clone(), self.allowed.structured);
        task::spawn_blocking(move || {
            let reply = answer(disk.as_ref(), &request, action, structured, body);
            drop(disk);
            let (parts, body) = reply;
            places.call = None;
            send(&replies, Reply { parts, body, _places: places });
        });
        Ok(())
    }

    async fn read_over(&mut self, len: u32) -> io::Result<()> {
        let mut piece = vec![0; (len as usize).min(64 << 10)];
        let mut left = len as usize;
        while left > 0 {
            let now = left.min(piece.len());
            self.read.read_exact(&mut piece[..now]).await?;
            left -= now;
        }
        Ok(())
    }
}

async fn place(of: &Arc<Semaphore>, count: u32) -> io::Result<OwnedSemaphorePermit> {
    of.clone().acquire_many_owned(count).await.map_err(io::Error::other)
}

fn send(replies: &mpsc::Sender<Reply>, reply: Reply) {
    // Never full: every reply holds one of as many slots. Closed: the connection is gone, and nobody waits.
    let _ = replies.try_send(reply);
}

async fn write_replies<S: AsyncWrite>(mut write: WriteHalf<S>, mut queue: mpsc::Receiver<Reply>) {
    while let Some(reply) = queue.recv().await {
        let done = timeout(NBD_REPLY_TIMEOUT, write_reply(&mut write, &reply, queue.is_empty())).await;
        if !matches!(done, Ok(Ok(()))) {
            return;
        }
    }
    let _ = timeout(Duration::from_secs(1), write.shutdown()).await;
}

async fn write_reply<S: AsyncWrite>(write: &mut WriteHalf<S>, reply: &Reply, flush: bool) -> io::Result<()> {
    let body: &[u8] = reply.body.as_deref().unwrap_or_default();
    for (head, data) in &reply.parts {
        // In one system call: two would wake the client twice.
        write.write_all_buf(&mut Buf::chain(head.as_slice(), &body[data.clone()])).await?;
    }
    if flush { write.flush().await } else { Ok(()) }
}

type Answer = (Vec<(Vec<u8>, Range<usize>)>, Option<AlignedBuf>);

/// Does what was asked for. A panic of the disk is an error of this request.
fn answer(
    disk: &dyn Disk,
    request: &Request,
    action: Action,
    structured: bool,
    mut body: Option<AlignedBuf>,
) -> Answer {
    let buffer = body.as_deref_mut().map(|all| &mut all[..request.len as usize]).unwrap_or_default();
    let done = catch_unwind(AssertUnwindSafe(|| act(disk, request, action, structured, buffer)))
        .unwrap_or_else(|_| Err(io::Error::from_raw_os_error(libc::EIO)));
    match done {
        Ok(parts) => (parts, body.filter(|_| matches!(action, Action::Read { .. }))),
        Err(e) => {
            let refused = Refused::from_io(&e);
            (vec![(error_reply(structured, request.cookie, &refused), 0..0)], None)
        }
    }
}

fn act(
    disk: &dyn Disk,
    request: &Request,
    action: Action,
    structured: bool,
    buffer: &mut [u8],
) -> io::Result<Vec<(Vec<u8>, Range<usize>)>> {
    let (offset, cookie) = (request.offset, request.cookie);
    match action {
        Action::Read { one_chunk } if structured => return read_chunks(disk, request, one_chunk, buffer),
        Action::Read { .. } => {
            if !buffer.is_empty() {
                disk.read_at(buffer, offset)?;
            }
            return Ok(vec![(simple_reply(0, cookie).to_vec(), 0..buffer.len())]);
        }
        Action::Status { one } => {
            let extents = extents(disk, offset, request.len, one)?;
            return Ok(vec![(status_reply(cookie, &extents), 0..0)]);
        }
        Action::Write => disk.write_at(buffer, offset)?,
        Action::Zero { may_unmap } => disk.zero(offset, u64::from(request.len), may_unmap)?,
        Action::Flush => disk.flush()?,
        Action::Nothing => {}
    }
    if request.is_fua() && matches!(action, Action::Write | Action::Zero { .. }) {
        disk.flush()?;
    }
    Ok(vec![(simple_reply(0, cookie).to_vec(), 0..0)])
}

/// Reads what is stored; holes are told and not sent.
fn read_chunks(
    disk: &dyn Disk,
    request: &Request,
    one_chunk: bool,
    buffer: &mut [u8],
) -> io::Result<Vec<(Vec<u8>, Range<usize>)>> {
    let mut pieces: Vec<(Range<usize>, bool)> = Vec::new();
    let mut at = 0;
    while at < buffer.len() {
        let (left, mut len, mut hole) = ((buffer.len() - at) as u64, buffer.len() - at, false);
        if !one_chunk && pieces.len() < NBD_READ_CHUNKS_MAX {
            let stretch = disk.stretch(request.offset + at as u64, left)?;
            len = stretch_len(stretch.len, left)? as usize;
            hole = stretch.hole && len as u64 >= NBD_READ_HOLE_BYTES_MIN;
        }
        match pieces.last_mut() {
            Some((range, of_hole)) if *of_hole == hole => range.end += len,
            _ => pieces.push((at..at + len, hole)),
        }
        at += len;
    }
    let mut parts = Vec::with_capacity(pieces.len().max(1));
    let last = pieces.len().wrapping_sub(1);
    for (index, (range, hole)) in pieces.into_iter().enumerate() {
        let (at, len, done) = (request.offset + range.start as u64, range.len() as u32, index == last);
        let mut head = Vec::with_capacity(32);
        if hole {
            chunk_header(&mut head, done, CHUNK_HOLE, request.cookie, 12);
            head.extend(at.to_be_bytes());
            head.extend(len.to_be_bytes());
            parts.push((head, 0..0));
        } else {
            disk.read_at(&mut buffer[range.clone()], at)?;
            chunk_header(&mut head, done, CHUNK_DATA, request.cookie, 8 + len);
            head.extend(at.to_be_bytes());
            parts.push((head, range));
        }
    }
    if parts.is_empty() {
        let mut head = Vec::new();
        chunk_header(&mut head, true, CHUNK_NONE, request.cookie, 0);
        parts.push((head, 0..0));
    }
    Ok(parts)
}

fn extents(disk: &dyn Disk, offset: u64, len: u32, one: bool) -> io::Result<Vec<(u32, bool)>> {
    let mut extents: Vec<(u32, bool)> = Vec::new();
    let mut at = 0;
    for _ in 0..NBD_STRETCHES_MAX {
        if at == len {
            break;
        }
        let left = u64::from(len - at);
        let stretch = disk.stretch(offset + u64::from(at), left)?;
        let piece = stretch_len(stretch.len, left)? as u32;
        let full = extents.len() == if one { 1 } else { NBD_EXTENTS_MAX };
        match extents.last_mut() {
            Some((len, hole)) if *hole == stretch.hole => *len += piece,
            _ if full => break,
            _ => extents.push((piece, stretch.hole)),
        }
        at += piece;
    }
    Ok(extents)
}

/// A stretch without bytes would never end, one that is too long would be past the end.
fn stretch_len(len: u64, asked: u64) -> io::Result<u64> {
    if len == 0 {
        return Err(io::Error::from_raw_os_error(libc::EIO));
    }
    Ok(len.min(asked))
}
