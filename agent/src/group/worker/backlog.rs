//! The group's journal: opened at the start, offered what the ring holds, read back, drained, flushed at the end.

use super::*;
use crate::journal::{Chunk, Detached, Drain, Journal, Spilling, drain};
use std::future::Future;
use tokio::task::JoinHandle;
use varve_io::AlignedBuf;

/// How long a clean stop waits for the ring to be spilled.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);
/// How long the receiver may take to end the session of a drained journal before the next one begins.
const END_LIMIT: Duration = Duration::from_secs(2);
/// More than this part of the ring is not left without a look for skipped events.
const LOOK_PARTS: u64 = 16;
/// Between two looks at what was acknowledged of a drained journal.
const DRAIN_LOOK: Duration = Duration::from_millis(5);

/// The journal as a session reads it: one chunk in hand, the next one under way.
#[derive(Default)]
pub(super) struct Backlog {
    chunk: Option<Chunk>,
    next: Option<(u64, JoinHandle<Result<Chunk, String>>)>,
    spare: Option<AlignedBuf>,
}

/// What comes next in the stream.
pub(super) enum Stretch {
    /// Bytes up to this position.
    Bytes(u64, Body),
    /// Nothing for now.
    End,
    /// There is something, but all buffers are under way.
    NoBuffer,
}

impl Worker {
    /// Opens the journal: that reads all of it, so the ring is looked after meanwhile.
    pub(super) async fn open_journal(&mut self, state: &mut State) -> Option<Spilling> {
        let settings = self.journal.clone()?;
        if settings.bytes_max == 0 && !settings.exists(&self.shared.name) {
            return None;
        }
        let (shared, known) = (self.shared.clone(), state.known_there);
        let open = move || Journal::open(&settings, &shared.name, shared.incarnation, &*shared);
        let journal = match self.meanwhile(state, None, tokio::task::spawn_blocking(open)).await? {
            Ok(journal) => Arc::new(journal),
            Err(error) => {
                tracing::error!(group = %self.shared.name, "the journal could not be opened: {error}");
                return None;
            }
        };
        // Nothing could be read, or the ring went on after the journal's end: bytes are lost, unless the receiver has them.
        let hole = journal.detached().is_some_and(|it| it.incarnation == self.shared.incarnation);
        state.journal_lost = known && (hole || journal.status().error.is_some());
        if let (Some(_), Some((reason, position))) = (journal.range(), journal.gap())
            && !known
        {
            // Nobody else left word of it.
            state.gap.begin(reason, position);
        }
        self.shared.set_journal(journal.clone());
        if let Some((_, end)) = journal.range() {
            // It was synced before; the one before us was killed before he could release the ring up to there.
            self.shared.synced(end, &mut |_| true);
        }
        state.walked = state.walked.max(self.source.stream().consumer());
        match journal.spill(self.shared.clone()) {
            Ok(spilling) => Some(spilling),
            Err(error) => {
                tracing::error!(group = %self.shared.name, "nothing is spilled: {}", error.chain());
                None
            }
        }
    }

    /// What was looked at may be spilled: every gap before it is known.
    pub(super) fn offer(&mut self, state: &mut State, sent: Option<u64>) {
        let Some(journal) = self.shared.journal().cloned() else { return };
        let extent = self.shared.extent();
        if state.walked.saturating_sub(state.looked_to) > extent.2 / LOOK_PARTS {
            self.look_ahead(state, sent);
        }
        // A receiver that has never known this ring will be told of its begin, and that is where the ring begins then.
        if sent.is_some() || extent.0 > 0 {
            journal.offer(state.looked_to, open_gap(state), sent.is_none(), extent);
        }
    }

    /// The ring may not outlive a clean stop: what is in it goes to the disk.
    pub(super) async fn flush_journal(&mut self, state: &mut State, spilling: Option<Spilling>) {
        let Some(spilling) = spilling else { return };
        for _ in 0..self.source.stream().capacity() / TURN_BYTES + 1 {
            self.every_turn(state, None);
        }
        self.look_ahead(state, None);
        let (until, gap) = (state.looked_to, open_gap(state));
        let (consumer, _, _) = self.shared.extent();
        let journal = self.shared.journal().filter(|_| until > consumer && consumer > 0).cloned();
        let flush = move || {
            let flushed = journal.is_none_or(|journal| journal.flush(until, gap, FLUSH_LIMIT));
            drop(spilling);
            flushed
        };
        match tokio::task::spawn_blocking(flush).await {
            Ok(true) => {}
            Ok(false) => {
                tracing::warn!(group = %self.shared.name, "part of the ring was not spilled before the end");
            }
            Err(error) => tracing::error!(group = %self.shared.name, "the journal was not flushed: {error}"),
        }
    }

    /// Waits for `what`; meanwhile whatever does not need it goes on. `None`: the group ends.
    pub(super) async fn meanwhile<T>(
        &mut self,
        state: &mut State,
        sent: Option<u64>,
        what: impl Future<Output = T>,
    ) -> Option<T> {
        let mut what = pin!(what);
        let mut stop = self.stop.clone();
        let mut pace = Pace::default();
        let mut pause = POLL_MIN;
        loop {
            tokio::select! {
                biased;
                outcome = &mut what => return Some(outcome),
                _ = stop.wait_for(|stop| *stop) => return None,
                Some(command) = self.commands.recv() => self.command(state, command, sent.is_some()),
                () = tokio::time::sleep(pause) => {
                    let walked = state.walked;
                    self.every_turn(state, sent);
                    pause = pace.next(state.walked > walked);
                }
            }
        }
    }

    /// The next frame's bytes, from the journal or the ring, up to `until`.
    pub(super) async fn next_stretch(
        &mut self,
        state: &mut State,
        session: &mut Session,
        until: u64,
    ) -> Result<Stretch, Ended> {
        if session.earlier.is_none() {
            // Held while it is copied: else the journal could take the bytes over and the kernel write into them.
            let _held = self.shared.hold_ring();
            let stream = self.source.stream();
            if session.sent >= stream.consumer() {
                let end = cut(stream, session.sent, until, FRAME_BYTES);
                if end == session.sent {
                    return Ok(Stretch::End);
                }
                let Some(mut body) = Body::new(&self.frames, (end - session.sent) as usize) else {
                    return Ok(Stretch::NoBuffer);
                };
                stream.copy_out(session.sent, body.as_mut());
                return Ok(Stretch::Bytes(end, body));
            }
        }
        if until <= session.sent {
            return Ok(Stretch::End);
        }
        self.load_chunk(state, session).await?;
        let Some(chunk) = &session.backlog.chunk else { return Ok(Stretch::End) };
        let Some(end) = chunk.cut(session.sent, until, FRAME_BYTES) else {
            return Err(Ended::Lost(format!("the receiver stands inside a record, at {}", session.sent)));
        };
        if end == session.sent {
            return Ok(Stretch::End);
        }
        let Some(mut body) = Body::new(&self.frames, (end - session.sent) as usize) else {
            return Ok(Stretch::NoBuffer);
        };
        body.as_mut().copy_from_slice(chunk.bytes(session.sent, end));
        Ok(Stretch::Bytes(end, body))
    }

    /// Has the chunk with the next byte in hand, and orders the one after it.
    async fn load_chunk(&mut self, state: &mut State, session: &mut Session) -> Result<(), Ended> {
        let position = session.sent;
        if session.backlog.chunk.as_ref().is_some_and(|chunk| chunk.holds(position)) {
            return Ok(());
        }
        let Some(journal) = self.shared.journal().cloned() else {
            return Err(Ended::Lost(format!("position {position} is neither in the ring nor in a journal")));
        };
        if let Some(done) = session.backlog.chunk.take() {
            session.backlog.spare = Some(done.into_buffer());
        }
        let reading = match session.backlog.next.take() {
            Some((at, reading)) if at == position => reading,
            _ => read_ahead(&journal, position, session.backlog.spare.take()),
        };
        let sent = session.earlier.is_none().then_some(position);
        let read = match self.meanwhile(state, sent, reading).await {
            Some(Ok(read)) => read,
            Some(Err(error)) => Err(error.to_string()),
            None => return Err(Ended::Stopped),
        };
        match read {
            Ok(chunk) => {
                let next = chunk.end();
                session.backlog.next =
                    journal.holds(next).then(|| (next, read_ahead(&journal, next, session.backlog.spare.take())));
                session.backlog.chunk = Some(chunk);
                Ok(())
            }
            Err(why) => {
                state.journal_lost |= session.earlier.is_none();
                journal.give_up_reading(&why);
                Err(Ended::Lost(format!("the journal cannot be read: {why}")))
            }
        }
    }

    /// Sends a journal that the ring does not go on from, under its own ring's name. `None`: there is none (any more).
    pub(super) async fn drain(&mut self, state: &mut State, connection: &quinn::Connection) -> Option<Ended> {
        let detached = self.earlier(state)?;
        let journal = self.shared.journal().cloned();
        self.shared.facts().link = Link::Handshaking;
        let hello = Hello {
            group: self.shared.name.clone(),
            epoch: self.shared.facts().epoch,
            incarnation: detached.incarnation,
            oldest: detached.start,
            // Nobody knows how far that ring went; what the receiver has of it decides.
            newest: u64::MAX,
            volumes: self.volumes.clone(),
            software: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let (mut send, recv, welcome) = match self.meanwhile(state, None, session::open(connection, &hello)).await {
            Some(Ok(opened)) => opened,
            Some(Err(ended)) => return Some(ended),
            None => return Some(Ended::Stopped),
        };
        let name = self.shared.name.clone();
        let ended = match drain((detached.start, detached.end), welcome.resume) {
            Drain::Nothing(letter, why) => {
                tracing::info!(group = %name, "nothing is sent of the journal: case {letter}, {why}");
                // Its end is what a session with it would have led to.
                let _ = send.finish();
                let mut recv = recv;
                let end = tokio::time::timeout(END_LIMIT, recv.read_to_end(1 << 16));
                let _ = self.meanwhile(state, None, end).await;
                self.stands(state, detached.incarnation, welcome.resume, welcome.consistent);
                None
            }
            Drain::From(position) => {
                tracing::info!(group = %name, position, end = detached.end, "the journal of an earlier ring is sent");
                let journal = journal.clone()?;
                // A gap that only what is there already knows of was told long ago.
                journal.release_detached(position);
                let detached = journal.detached()?;
                let sent_max = Arc::new(AtomicU64::new(position));
                let (bound, acked) = (sent_max.clone(), journal.clone());
                let (mut events, reader) = session::spawn_reader(recv, self.shared.clone(), move |durable| {
                    if durable > bound.load(Ordering::Acquire) {
                        let why = format!("position {durable} was not sent");
                        return Err(WireError::Decode { kind: FrameKind::Ack, why });
                    }
                    acked.release_detached(durable);
                    Ok(())
                });
                let mut session = Session {
                    send,
                    number: state.sessions,
                    sent: position,
                    remote_consistent: welcome.consistent,
                    fresh: Vec::new(),
                    regions: Regions::default(),
                    reading: false,
                    last_report: None,
                    compression: Compression::new(self.compression, Instant::now()),
                    backlog: Backlog::default(),
                    earlier: Some(detached.incarnation),
                };
                let mut stop = self.stop.clone();
                let drained = tokio::select! {
                    drained = self.send_detached(state, &mut session, detached, &mut events, &sent_max) => drained,
                    // The receiver may be stuck with a frame half sent: the end does not wait for it.
                    _ = stop.wait_for(|stop| *stop) => Err(Ended::Stopped),
                };
                if let Err(ended) = drained {
                    reader.abort();
                    return Some(ended);
                }
                let _ = session.send.finish();
                // The next session of this group is refused as long as the receiver has this one.
                let _ = self.meanwhile(state, None, tokio::time::timeout(END_LIMIT, reader)).await;
                tracing::info!(group = %name, "the journal of an earlier ring was sent");
                self.stands(state, detached.incarnation, Some(detached.end), session.remote_consistent);
                None
            }
        };
        // One that the ring goes on from is not the one that this was about.
        if let Some(journal) = journal.filter(|journal| journal.detached().is_some()) {
            journal.discard();
        }
        self.settle(state).await;
        ended
    }

    /// Everything of a detached journal, with the mark of the gap that it knows of; returns when it is durable.
    async fn send_detached(
        &mut self,
        state: &mut State,
        session: &mut Session,
        detached: Detached,
        events: &mut mpsc::Receiver<Event>,
        sent_max: &AtomicU64,
    ) -> Result<(), Ended> {
        {
            let mut facts = self.shared.facts();
            (facts.link, facts.link_reason) = (Link::Streaming, None);
        }
        loop {
            while let Ok(event) = events.try_recv() {
                if let Event::Ended(ended) = event {
                    return Err(ended);
                }
            }
            self.report(state, session).await?;
            if session.sent < detached.end {
                let gap = detached.gap.filter(|_| session.remote_consistent);
                if let Some((reason, _)) = gap.filter(|(_, position)| *position <= session.sent) {
                    self.send_mark(state, session, MarkKind::GapBegin, Some(reason)).await?;
                    session.remote_consistent = false;
                    continue;
                }
                let until = gap.map_or(detached.end, |(_, position)| position.min(detached.end));
                match self.next_stretch(state, session, until).await? {
                    Stretch::Bytes(end, body) => self.send_frame(state, session, end, body, sent_max).await?,
                    Stretch::End => return Err(Ended::Lost("the journal ended early".to_owned())),
                    Stretch::NoBuffer => tokio::time::sleep(DRAIN_LOOK).await,
                }
                tokio::task::yield_now().await;
                continue;
            }
            if self.shared.journal().is_none_or(|journal| journal.detached().is_none()) {
                return Ok(());
            }
            self.every_turn(state, None);
            tokio::time::sleep(DRAIN_LOOK).await;
        }
    }
}

/// The open gap and where it began.
fn open_gap(state: &State) -> Option<(GapReason, u64)> {
    let (reason, position, _) = state.gap.parts();
    reason.map(|reason| (reason, position))
}

fn read_ahead(journal: &Arc<Journal>, position: u64, buf: Option<AlignedBuf>) -> JoinHandle<Result<Chunk, String>> {
    let journal = journal.clone();
    tokio::task::spawn_blocking(move || journal.read(position, buf))
}
