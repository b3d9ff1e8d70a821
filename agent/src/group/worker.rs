//! The owner of a group: one loop that walks the ring, cuts frames, sends, and decides what is told to the receiver.
//! Nothing else changes the group's state; others send commands or read [`GroupShared`].

use super::compress::Compression;
use super::cut::{Met, cut, walk};
use super::gap::GapState;
use super::regions::{Next, Regions, image_extents, touched_blocks};
use super::session::{self, Ended, Event};
use super::shared::{Counters, GroupShared};
use super::source::{Source, Troubles, dirty_regions, set_all_dirty};
use super::sync::{FromSync, Purpose, RegionRead, SyncThread};
use super::verify::VerifyRun;
use crate::clock;
use crate::link::LinkView;
use bytes::Bytes;
use quinn::SendStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use varve_common::format::{Mark, MarkKind};
use varve_common::geometry::Extent;
use varve_common::problem::Problem;
use varve_common::record::RecordKind;
use varve_common::state::{GapReason, Link};
use varve_common::wire::messages::{self, Ask, Hello, Report, Verify, VolumeHello, Welcome};
use varve_common::wire::{Codec, Frame, FrameKind, Image, WireError};
use varve_io::aligned::{BufPool, PooledBuf};

/// Plain bytes of a data frame, unless one record alone is larger.
pub const FRAME_BYTES: u64 = 512 << 10;
/// Bytes of records walked or sent before anything else gets its turn.
const TURN_BYTES: u64 = 4 << 20;
/// Pause between looks at the ring while writes come in.
const POLL_MIN: Duration = Duration::from_millis(1);
/// Longest pause: what an idle group costs (100 looks a second, far below 0.5 % of a core) and what its first write waits.
const POLL_MAX: Duration = Duration::from_millis(10);
/// Between two canaries.
const CANARY_EVERY: Duration = Duration::from_secs(1);
/// Between two reports to the receiver.
const REPORT_EVERY: Duration = Duration::from_millis(500);
/// Pause after a session ended, growing with the failures in a row.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest such pause.
const RETRY_MAX: Duration = Duration::from_secs(10);
/// How long a bookmark waits for the receiver before it is answered as not durable yet.
const BOOKMARK_WAIT: Duration = Duration::from_secs(5);
/// Bookmarks that may wait at once.
const BOOKMARKS_MAX: usize = 64;

/// What others want of the worker.
pub enum Command {
    /// Set a bookmark; answered with its position, its time, and whether it is durable.
    Bookmark(String, oneshot::Sender<Result<(u64, u64, bool), Problem>>),
    /// Begin a verify; answered with its number.
    Verify(bool, oneshot::Sender<Result<u64, Problem>>),
}

/// A bookmark on its way.
struct Pending {
    name: String,
    met: Option<(u64, u64)>,
    since: Instant,
    answer: oneshot::Sender<Result<(u64, u64, bool), Problem>>,
}

/// What a worker is made of.
pub struct Worker {
    /// Shared with status.
    pub shared: Arc<GroupShared>,
    /// Capture.
    pub source: Arc<dyn Source>,
    /// Reads the volumes.
    pub sync: SyncThread,
    /// What it read.
    pub from_sync: mpsc::Receiver<FromSync>,
    /// Wishes.
    pub commands: mpsc::Receiver<Command>,
    /// The connection.
    pub link: watch::Receiver<LinkView>,
    /// `true`: the group ends.
    pub stop: watch::Receiver<bool>,
    /// `recursion_misses` of the capture programs, kept up to date by the daemon.
    pub misses: Arc<AtomicU64>,
    /// Buffers for frames, shared by all groups.
    pub frames: BufPool,
    /// What is said in every Hello.
    pub volumes: Vec<VolumeHello>,
    /// Compress where it pays.
    pub compression: bool,
    /// Told when the group is consistent for the first time.
    pub on_consistent: Box<dyn Fn() + Send + Sync>,
}

/// What lasts over sessions.
struct State {
    gap: GapState,
    troubles: Troubles,
    misses: u64,
    /// Records before were walked.
    walked: u64,
    sessions: u64,
    /// The receiver has known this ring.
    known_there: bool,
    bookmarks: Vec<Pending>,
    verify: Option<VerifyRun>,
    verifies: u64,
    /// A `GapEnd` was sent at this position and is not known to have landed.
    closing: Option<u64>,
    offset: clock::Offset,
    last_canary: Instant,
    read_failed: bool,
}

/// What lasts as long as one session.
struct Session {
    send: SendStream,
    number: u64,
    /// Everything before was sent.
    sent: u64,
    /// What the receiver believes after the marks sent so far.
    remote_consistent: bool,
    fresh: Vec<bool>,
    regions: Regions,
    last_report: Option<Instant>,
    compression: Compression,
    image_body: Vec<u8>,
}

/// A frame's bytes in a pooled buffer, as `bytes` wants them.
struct PooledBody {
    buf: PooledBuf,
    length: usize,
}

impl AsRef<[u8]> for PooledBody {
    fn as_ref(&self) -> &[u8] {
        &self.buf[..self.length]
    }
}

impl Worker {
    /// Runs until the group ends.
    pub async fn run(mut self) {
        let now = Instant::now();
        let mut state = State {
            gap: GapState::new(if self.shared.facts().ever_consistent {
                GapReason::NewRing
            } else {
                GapReason::InitialSync
            }),
            troubles: self.source.troubles(),
            misses: self.misses.load(Ordering::Acquire),
            walked: self.source.stream().consumer(),
            sessions: 0,
            known_there: false,
            bookmarks: Vec::new(),
            verify: None,
            verifies: 0,
            closing: None,
            offset: clock::Offset::new(clock::wall_ns(), clock::boot_ns()),
            last_canary: now,
            read_failed: false,
        };
        if self.shared.facts().ever_consistent {
            state.gap.note_ever_consistent();
        }
        let mut retry = RETRY_MIN;
        while !*self.stop.borrow() {
            let Some(connection) = self.wait_for_connection(&mut state).await else { break };
            let began = Instant::now();
            let ended = self.session(&mut state, connection).await;
            session::count(&self.shared, &ended);
            if matches!(ended, Ended::Stopped) {
                break;
            }
            retry = if began.elapsed() > RETRY_MAX { RETRY_MIN } else { (retry * 2).min(RETRY_MAX) };
            self.note_ended(&ended);
            self.idle(&mut state, retry).await;
        }
        // Frees the sync thread if it waits to hand something over.
        self.from_sync.close();
        for pending in state.bookmarks {
            let _ = pending.answer.send(Err(session::not_streaming(&self.shared.name)));
        }
    }

    fn note_ended(&self, ended: &Ended) {
        let why = ended.explain();
        let mut facts = self.shared.facts();
        facts.link =
            if matches!(ended, Ended::Refused(_) | Ended::Protocol(_)) { Link::Refused } else { Link::Disconnected };
        if facts.link_reason.as_ref() != Some(&why) {
            tracing::warn!(group = %self.shared.name, "session ended: {why}");
        }
        facts.link_reason = Some(why);
    }

    /// `None`: the group ends.
    async fn wait_for_connection(&mut self, state: &mut State) -> Option<quinn::Connection> {
        loop {
            if *self.stop.borrow() {
                return None;
            }
            {
                let view = self.link.borrow_and_update();
                if let Some(connection) = view.connection.clone().filter(|c| c.close_reason().is_none()) {
                    return Some(connection);
                }
                let mut facts = self.shared.facts();
                facts.link = view.link;
                facts.link_reason.clone_from(&view.reason);
            }
            self.idle(state, Duration::from_millis(500)).await;
        }
    }

    /// What must go on without a session, for `pause` or until the connection changes.
    async fn idle(&mut self, state: &mut State, pause: Duration) {
        let until = Instant::now() + pause;
        while Instant::now() < until && !*self.stop.borrow() {
            self.every_turn(state, None);
            self.walk(state);
            let left = until.saturating_duration_since(Instant::now()).min(Duration::from_millis(100));
            tokio::select! {
                () = tokio::time::sleep(left) => {}
                changed = self.link.changed() => { if changed.is_err() || self.link.borrow().connection.is_some() { return } }
                _ = self.stop.changed() => return,
                Some(command) = self.commands.recv() => self.command(state, command, false),
                Some(from_sync) = self.from_sync.recv() => self.return_region(from_sync),
            }
        }
    }

    /// A region that was read for a session that is over.
    fn return_region(&self, from_sync: FromSync) {
        if let FromSync::Read(read) = from_sync {
            self.give_back(&read);
        }
    }

    /// A region that was not sent: its bit is set again.
    fn give_back(&self, read: &RegionRead) {
        lock(&self.sync.shared().tracker).forget(read.id);
        if read.purpose == Purpose::Send {
            self.source.track(usize::from(read.volume)).set_dirty(read.region);
            self.sync.shared().done();
        }
    }

    async fn session(&mut self, state: &mut State, connection: quinn::Connection) -> Ended {
        self.shared.facts().link = Link::Handshaking;
        let stream = self.source.stream();
        let hello = Hello {
            group: self.shared.name.clone(),
            epoch: self.shared.facts().epoch,
            incarnation: self.shared.incarnation,
            oldest: stream.consumer(),
            newest: stream.producer(),
            volumes: self.volumes.clone(),
            software: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let mut stop = self.stop.clone();
        let (send, recv, welcome) = tokio::select! {
            opened = session::open(&connection, &hello) => match opened {
                Ok(opened) => opened,
                Err(ended) => return ended,
            },
            _ = stop.wait_for(|stop| *stop) => return Ended::Stopped,
        };
        let sent_max = Arc::new(AtomicU64::new(stream.consumer()));
        let (mut events, reader) = self.spawn_reader(recv, sent_max.clone());
        let outcome = self.converse(state, send, welcome, &mut events, &sent_max).await;
        reader.abort();
        self.sync.shared().pause();
        outcome
    }

    fn spawn_reader(
        &self,
        recv: quinn::RecvStream,
        sent_max: Arc<AtomicU64>,
    ) -> (mpsc::Receiver<Event>, tokio::task::JoinHandle<()>) {
        let (source, shared) = (self.source.clone(), self.shared.clone());
        session::spawn_reader(recv, self.shared.clone(), move |durable| {
            // A receiver that acknowledges what was never sent is broken: releasing it would lose writes.
            if durable > sent_max.load(Ordering::Acquire) {
                return Err(WireError::Decode {
                    kind: FrameKind::Ack,
                    why: format!("position {durable} was not sent"),
                });
            }
            if durable > source.stream().consumer() {
                source.stream().release(durable);
                shared.durable.store(durable, Ordering::Release);
            }
            Ok(())
        })
    }

    /// The session proper: returns why it ended.
    async fn converse(
        &mut self,
        state: &mut State,
        send: SendStream,
        welcome: Welcome,
        events: &mut mpsc::Receiver<Event>,
        sent_max: &AtomicU64,
    ) -> Ended {
        state.sessions += 1;
        Counters::add(&self.shared.counters.sessions, 1);
        let mut session = Session {
            send,
            number: state.sessions,
            sent: self.source.stream().consumer(),
            remote_consistent: welcome.consistent,
            fresh: welcome.fresh.clone(),
            regions: Regions::default(),
            last_report: None,
            compression: Compression::new(self.compression, Instant::now()),
            image_body: Vec::new(),
        };
        let ended = match self.agree(state, &mut session, welcome).await {
            Ok(()) => {
                sent_max.store(session.sent, Ordering::Release);
                self.turns(state, &mut session, events, sent_max).await
            }
            Err(ended) => ended,
        };
        for read in session.regions.drain() {
            self.give_back(&read);
        }
        if let Some(run) = state.verify.as_mut().filter(|run| !run.outcome().finished) {
            run.fail(format!("the session ended: {}", ended.explain()));
            self.shared.facts().verify = Some(run.outcome().clone());
        }
        if matches!(ended, Ended::Stopped) {
            // Polite, so that the receiver does not report a loss; it does not matter if it cannot be said.
            let _ = session.send.finish();
        }
        ended
    }

    /// Where the stream goes on, and what must be compared first.
    async fn agree(&mut self, state: &mut State, session: &mut Session, welcome: Welcome) -> Result<(), Ended> {
        let stream = self.source.stream();
        let resumable = welcome.resume.filter(|at| (stream.consumer()..=stream.producer()).contains(at));
        match resumable {
            Some(position) => {
                stream.release(position);
                self.shared.durable.store(position, Ordering::Release);
                session.sent = position;
                state.walked = state.walked.max(position);
                state.closing = None;
                if session.remote_consistent && state.gap.open().is_none() && self.shared.facts().gap.is_some() {
                    // The GapEnd landed in the last session, which ended before we heard of it.
                    self.gap_is_closed(state);
                }
            }
            None => self.begin(state, session).await?,
        }
        state.known_there = true;
        tracing::info!(
            group = %self.shared.name,
            position = session.sent,
            resumed = resumable.is_some(),
            consistent = session.remote_consistent,
            "streaming"
        );
        {
            let mut facts = self.shared.facts();
            facts.link = Link::Streaming;
            facts.link_reason = None;
            facts.replicas = welcome.replicas;
            facts.epoch = welcome.epoch;
        }
        self.sync.shared().start(session.number, session.fresh.clone());
        Ok(())
    }

    /// The receiver does not know this ring (or cannot go on with it): everything is compared.
    async fn begin(&mut self, state: &mut State, session: &mut Session) -> Result<(), Ended> {
        let reason = match (state.known_there, state.gap.ever_consistent()) {
            (true, _) => GapReason::ReplicaChanged,
            (false, true) => GapReason::NewRing,
            (false, false) => GapReason::InitialSync,
        };
        let position = self.source.stream().consumer();
        set_all_dirty(&*self.source);
        state.gap.restart(reason, position);
        state.closing = None;
        self.shared.gap_opened(reason);
        session.sent = position;
        session.remote_consistent = false;
        self.send_mark(session, MarkKind::Begin, Some(reason)).await
    }

    async fn turns(
        &mut self,
        state: &mut State,
        session: &mut Session,
        events: &mut mpsc::Receiver<Event>,
        sent_max: &AtomicU64,
    ) -> Ended {
        let mut pause = POLL_MIN;
        loop {
            if *self.stop.borrow() {
                return Ended::Stopped;
            }
            self.every_turn(state, Some(session));
            self.walk(state);
            let busy = match self.send_turn(state, session, sent_max).await {
                Ok(busy) => busy,
                Err(ended) => return self.better_reason(events, ended).await,
            };
            if busy {
                pause = POLL_MIN;
                // Whatever came in meanwhile gets its turn, without waiting for it.
                while let Ok(event) = events.try_recv() {
                    if let Err(ended) = self.event(state, session, event).await {
                        return ended;
                    }
                }
                while let Ok(from_sync) = self.from_sync.try_recv() {
                    self.from_sync(state, session, from_sync);
                }
                tokio::task::yield_now().await;
                continue;
            }
            tokio::select! {
                biased;
                event = events.recv() => {
                    let event = event.unwrap_or(Event::Ended(Ended::Lost("the reader stopped".to_owned())));
                    if let Err(ended) = self.event(state, session, event).await {
                        return ended;
                    }
                    pause = POLL_MIN;
                }
                Some(from_sync) = self.from_sync.recv() => { self.from_sync(state, session, from_sync); pause = POLL_MIN }
                Some(command) = self.commands.recv() => { self.command(state, command, true); pause = POLL_MIN }
                _ = self.stop.changed() => {}
                () = tokio::time::sleep(pause) => pause = (pause * 5 / 4).min(POLL_MAX),
            }
        }
    }

    /// A write that fails often has its reason waiting in the other direction.
    async fn better_reason(&self, events: &mut mpsc::Receiver<Event>, ended: Ended) -> Ended {
        let wait = async {
            while let Some(event) = events.recv().await {
                if let Event::Ended(better @ (Ended::Refused(_) | Ended::Protocol(_))) = event {
                    return Some(better);
                }
            }
            None
        };
        tokio::time::timeout(Duration::from_secs(1), wait).await.ok().flatten().unwrap_or(ended)
    }

    /// Cheap work of every turn: the clock, canaries, events of the capture.
    fn every_turn(&mut self, state: &mut State, session: Option<&mut Session>) {
        let now = Instant::now();
        if now.duration_since(state.last_canary) >= CANARY_EVERY {
            state.last_canary = now;
            state.offset.follow(clock::wall_ns(), clock::boot_ns());
            self.source.set_time_offset(state.offset.ns());
            // A full ring has no room for a canary; that it is full is told by the counters below.
            let _ = self.source.mark(RecordKind::Canary, &[]);
        }
        self.look_for_trouble(state, session.as_ref().map(|session| session.sent));
        if state.closing.is_some_and(|position| self.shared.durable.load(Ordering::Acquire) > position) {
            self.gap_is_closed(state);
        }
        self.answer_bookmarks(state);
    }

    /// The receiver has the `GapEnd`: only now may anybody be told.
    fn gap_is_closed(&self, state: &mut State) {
        state.closing = None;
        self.shared.gap_closed();
        (self.on_consistent)();
        tracing::info!(group = %self.shared.name, "protected");
    }

    /// Whatever put something outside the stream opens a gap; its regions are dirty already.
    fn look_for_trouble(&mut self, state: &mut State, sent: Option<u64>) {
        let troubles = self.source.troubles();
        let misses = self.misses.load(Ordering::Acquire);
        if troubles == state.troubles && misses == state.misses {
            return;
        }
        let before = std::mem::replace(&mut state.troubles, troubles);
        let missed = std::mem::replace(&mut state.misses, misses) < misses;
        let unknown_place =
            missed || troubles.passthrough > before.passthrough || troubles.late_unknown > before.late_unknown;
        if unknown_place {
            set_all_dirty(&*self.source);
        }
        let reason = if missed {
            GapReason::MissedEvents
        } else if troubles.passthrough > before.passthrough {
            GapReason::Passthrough
        } else if troubles.dropped > before.dropped {
            GapReason::RingFull
        } else if troubles.unreadable > before.unreadable {
            GapReason::UnreadablePage
        } else if troubles.straddling > before.straddling {
            GapReason::StraddlingWrite
        } else if troubles.failed > before.failed {
            GapReason::FailedWrite
        } else {
            GapReason::LateWrite
        };
        // Without a session nothing after the durable position was promised to anybody.
        let here = sent.unwrap_or_else(|| self.source.stream().consumer());
        let position = self.source.take_first_drop().unwrap_or(here).max(here);
        if state.gap.begin(reason, position) {
            state.closing = None;
            tracing::warn!(group = %self.shared.name, position, "a gap begins: {}", reason.explain());
            self.shared.gap_opened(reason);
        }
        self.update_sync_facts();
        self.sync.shared().nudge();
    }

    fn update_sync_facts(&self) {
        let left = dirty_regions(&*self.source) + self.sync.shared().in_hand();
        let mut facts = self.shared.facts();
        facts.sync_left = left;
        facts.sync_total = facts.sync_total.max(left);
    }

    /// Looks at the records that were committed since the last walk.
    fn walk(&mut self, state: &mut State) {
        let stream = self.source.stream();
        let mut tracker = lock(&self.sync.shared().tracker);
        let (noting, bookmarks) = (!tracker.is_empty(), &mut state.bookmarks);
        let until = stream.producer();
        if !noting && bookmarks.is_empty() {
            // Nobody wants to know what the records say, only where they end; frames are cut later.
            state.walked = walk(stream, state.walked, until, TURN_BYTES, |_| {});
            return;
        }
        state.walked = walk(stream, state.walked, until, TURN_BYTES, |Met::Record { position, end, header }| {
            match RecordKind::from_number(header.kind) {
                Some(kind) if kind.changes_data() => {
                    if let Some(extent) = Extent::at(header.offset.get(), header.length.get()) {
                        tracker.note(header.volume.get(), extent);
                    }
                }
                Some(RecordKind::Bookmark) => {
                    let mut name = vec![0; header.payload.get() as usize];
                    stream.copy_out(position + 8 + size_of_val(&header) as u64, &mut name);
                    let waiting = bookmarks.iter_mut().find(|p| p.met.is_none() && p.name.as_bytes() == name);
                    if let Some(pending) = waiting {
                        pending.met = Some((end, header.time_ns.get()));
                    }
                }
                _ => {}
            }
        });
    }

    fn answer_bookmarks(&self, state: &mut State) {
        let durable = self.shared.durable.load(Ordering::Acquire);
        let mut index = 0;
        while index < state.bookmarks.len() {
            let pending = &state.bookmarks[index];
            let is_durable = pending.met.is_some_and(|(position, _)| position <= durable);
            if !is_durable && pending.since.elapsed() < BOOKMARK_WAIT {
                index += 1;
                continue;
            }
            let pending = state.bookmarks.swap_remove(index);
            let answer = pending.met.map(|(position, time)| (position, time, is_durable)).ok_or_else(|| {
                Problem::failed(
                    format!("bookmark '{}' was not seen in the stream", pending.name),
                    "the stream does not advance",
                    format!("look at 'varve status {}'", self.shared.name),
                )
            });
            // Whoever asked may be gone.
            let _ = pending.answer.send(answer);
        }
    }

    fn command(&mut self, state: &mut State, command: Command, streaming: bool) {
        match command {
            Command::Bookmark(name, answer) => {
                if state.bookmarks.len() >= BOOKMARKS_MAX {
                    let busy = Problem::failed("too many bookmarks at once", "others wait", "try again");
                    let _ = answer.send(Err(busy));
                    return;
                }
                if let Err(problem) = self.source.mark(RecordKind::Bookmark, name.as_bytes()) {
                    let _ = answer.send(Err(problem));
                    return;
                }
                state.bookmarks.push(Pending { name, met: None, since: Instant::now(), answer });
            }
            Command::Verify(repair, answer) => {
                let begun = if streaming {
                    state.verifies += 1;
                    self.begin_verify(state, state.verifies, repair)
                } else {
                    Err(session::not_streaming(&self.shared.name))
                };
                let _ = answer.send(begun);
            }
        }
    }

    fn begin_verify(&mut self, state: &mut State, id: u64, repair: bool) -> Result<u64, Problem> {
        let name = &self.shared.name;
        if state.verify.as_ref().is_some_and(|run| !run.outcome().finished) {
            return Err(Problem::failed(
                format!("group '{name}' is being verified already"),
                "one verify at a time",
                "wait for it to end",
            ));
        }
        if let Some(reason) = state.gap.open() {
            return Err(Problem::refused(
                format!("group '{name}' cannot be verified now"),
                reason.explain(),
                format!("wait until 'varve status {name}' says protected"),
            ));
        }
        let sizes = self.shared.volumes.iter().map(|(_, bytes)| *bytes).collect();
        let run = VerifyRun::new(id, repair, sizes, self.source.stream().producer());
        self.shared.facts().verify = Some(run.outcome().clone());
        state.verify = Some(run);
        Ok(id)
    }

    /// Sends what there is to send; whether there was something.
    async fn send_turn(
        &mut self,
        state: &mut State,
        session: &mut Session,
        sent_max: &AtomicU64,
    ) -> Result<bool, Ended> {
        let mut busy = self.send_data(state, session, sent_max).await?;
        if let Some(mark) = state.gap.next_mark(session.remote_consistent, session.sent) {
            self.send_mark(session, mark.kind, mark.reason).await?;
            session.remote_consistent = mark.kind == MarkKind::GapEnd;
            if session.remote_consistent {
                state.closing = Some(session.sent);
                // What is acknowledged after the mark proves that the mark has landed: do not wait for the next write.
                let _ = self.source.mark(RecordKind::Canary, &[]);
            }
            busy = true;
        }
        while let Some(next) = {
            let fresh = &session.fresh;
            session.regions.next(session.sent, |volume| fresh.get(usize::from(volume)).copied().unwrap_or(false))
        } {
            self.region(session, next).await?;
            busy = true;
        }
        self.drive_verify(state);
        self.finish_gap(state, session);
        self.report(session).await?;
        Ok(busy)
    }

    async fn send_data(&mut self, state: &State, session: &mut Session, sent_max: &AtomicU64) -> Result<bool, Ended> {
        let limit = state.gap.cut_limit(session.remote_consistent);
        let until = limit.map_or(state.walked, |limit| state.walked.min(limit.max(session.sent)));
        let turn_end = session.sent + TURN_BYTES;
        let mut busy = false;
        while session.sent < until && session.sent < turn_end {
            let end = cut(self.source.stream(), session.sent, until, FRAME_BYTES);
            if end == session.sent {
                break;
            }
            // All buffers are on their way: whatever else there is to do goes first.
            let Some(mut buf) = self.frames.take() else { return Ok(busy) };
            let length = (end - session.sent) as usize;
            self.source.stream().copy_out(session.sent, &mut buf[..length]);
            let mut frame = Frame::plain(FrameKind::Data, session.sent, &buf[..length]);
            let mut body = PooledBody { buf, length };
            if session.compression.wanted() {
                self.compress(session, &mut frame, &mut body);
            }
            sent_max.store(end, Ordering::Release);
            let wire_bytes = body.length as u64;
            let before = Instant::now();
            session::send_frame(&mut session.send, frame, Bytes::from_owner(body)).await?;
            let now = Instant::now();
            session.compression.sent(wire_bytes, now - before, now);
            Counters::add(&self.shared.counters.frames, 1);
            Counters::add(&self.shared.counters.stream_bytes, length as u64);
            Counters::add(&self.shared.counters.wire_bytes, wire_bytes);
            session.sent = end;
            busy = true;
        }
        Ok(busy)
    }

    fn compress(&self, session: &mut Session, frame: &mut Frame, body: &mut PooledBody) {
        let Some(mut packed) = self.frames.take() else { return };
        let Ok(length) = lz4_flex::block::compress_into(body.as_ref(), &mut packed) else { return };
        if session.compression.worth(body.length, length) {
            frame.codec = Codec::Lz4;
            frame.body_bytes = length;
            *body = PooledBody { buf: packed, length };
            Counters::add(&self.shared.counters.frames_compressed, 1);
        }
    }

    async fn send_mark(&self, session: &mut Session, kind: MarkKind, reason: Option<GapReason>) -> Result<(), Ended> {
        let mark = Mark {
            kind,
            reason,
            incarnation: self.shared.incarnation,
            position: session.sent,
            time_ns: clock::wall_ns(),
            epoch: self.shared.facts().epoch,
        };
        session::send_control(&mut session.send, FrameKind::Mark, session.sent, mark.encode().to_vec()).await
    }

    fn from_sync(&mut self, state: &mut State, session: &mut Session, from_sync: FromSync) {
        match from_sync {
            FromSync::Read(read) if read.session == session.number => {
                if std::mem::replace(&mut state.read_failed, false) {
                    self.shared.facts().read_error = None;
                }
                session.regions.push(read);
            }
            FromSync::Read(read) => self.give_back(&read),
            FromSync::Busy { volume, region, session: number } => {
                if number == session.number
                    && let Some(run) = state.verify.as_mut()
                {
                    run.looked(volume, region, None, session.sent, Instant::now());
                }
            }
            FromSync::Failed { volume, error } => {
                let path = self.shared.volumes.get(usize::from(volume)).map_or("", |(path, _)| path);
                let text = format!("{path} cannot be read: {}", error.chain());
                tracing::error!(group = %self.shared.name, "{text}; tried again until it can");
                self.shared.facts().read_error = Some(text);
                state.read_failed = true;
            }
        }
    }

    /// Does what [`Regions`] says.
    async fn region(&self, session: &mut Session, next: Next) -> Result<(), Ended> {
        match next {
            Next::Probe(probe) => {
                if let Some(read) = session.regions.get(probe.id)
                    && read.purpose == Purpose::Compare
                {
                    // What is touched until the probe's position decides; later writes do not matter to it.
                    let overtaken = lock(&self.sync.shared().tracker).overtaken(probe.id);
                    let touched = touched_blocks(read.extent, &overtaken);
                    session.regions.set_touched(probe.id, touched);
                }
                Counters::add(&self.shared.counters.probes, 1);
                let body = messages::encode(&probe);
                session::send_control(&mut session.send, FrameKind::Probe, session.sent, body).await
            }
            Next::Image(id, blocks) => self.send_image(session, id, blocks).await,
            Next::Done(id) => {
                self.region_done(session, id);
                Ok(())
            }
        }
    }

    async fn send_image(&self, session: &mut Session, id: u64, blocks: u16) -> Result<(), Ended> {
        let Some(read) = session.regions.get(id) else { return Ok(()) };
        let overtaken = lock(&self.sync.shared().tracker).overtaken(id);
        let extents = image_extents(read, blocks, &overtaken);
        if extents.is_empty() {
            self.region_done(session, id);
            return Ok(());
        }
        let slices: Vec<(u64, u64, Option<&[u8]>)> = extents
            .iter()
            .map(|(offset, length, range)| (*offset, *length, range.map(|(from, to)| &read.bytes[from..to])))
            .collect();
        session.image_body.clear();
        Image::encode(id, read.volume, &slices, &mut session.image_body);
        let frame = Frame::plain(FrameKind::Image, session.sent, &session.image_body);
        Counters::add(&self.shared.counters.image_bytes, session.image_body.len() as u64);
        let body = Bytes::from(std::mem::take(&mut session.image_body));
        session::send_frame(&mut session.send, frame, body).await
    }

    fn region_done(&self, session: &mut Session, id: u64) {
        lock(&self.sync.shared().tracker).forget(id);
        let Some(read) = session.regions.remove(id) else { return };
        if read.purpose == Purpose::Send {
            self.sync.shared().done();
            self.sync.shared().nudge();
        }
    }

    async fn event(&mut self, state: &mut State, session: &mut Session, event: Event) -> Result<(), Ended> {
        match event {
            Event::Probed(reply) => {
                let Some((purpose, next)) = session.regions.probed(reply.id, reply.differs) else { return Ok(()) };
                if purpose == Purpose::Compare
                    && let (Some(run), Some(read)) = (state.verify.as_mut(), session.regions.get(reply.id))
                {
                    let touched = session.regions.touched(reply.id);
                    run.looked(read.volume, read.region, Some((reply.differs, touched)), session.sent, Instant::now());
                }
                self.region(session, next).await
            }
            Event::ImageDone(done) => {
                self.region_done(session, done.id);
                Ok(())
            }
            Event::Ask(Ask::Verify { id, repair }) => {
                if let Err(problem) = self.begin_verify(state, id, repair) {
                    let refused = Verify { id, repair, finished: true, error: Some(problem.why), ..Verify::default() };
                    self.shared.facts().verify = Some(refused);
                }
                Ok(())
            }
            Event::Ask(Ask::CancelVerify { id }) => {
                if let Some(run) = state.verify.as_mut().filter(|run| run.outcome().id == id) {
                    run.fail("cancelled");
                }
                Ok(())
            }
            Event::Ended(ended) => Err(ended),
        }
    }

    /// Orders the next looks of a running verify, and ends it.
    fn drive_verify(&mut self, state: &mut State) {
        let Some(run) = state.verify.as_mut() else { return };
        if !run.outcome().finished {
            if let Some(reason) = state.gap.open() {
                run.fail(format!("a gap began meanwhile: {}", reason.explain()));
            }
            let order = run.order(Instant::now());
            if !order.is_empty() {
                self.sync.shared().compare(order);
            }
            self.shared.facts().verify = Some(run.outcome().clone());
            if !run.outcome().finished {
                return;
            }
        }
        let Some(run) = state.verify.take() else { return };
        let outcome = run.outcome().clone();
        tracing::info!(
            group = %self.shared.name,
            differing_bytes = outcome.differing_bytes,
            unverified_bytes = outcome.unverified_bytes,
            error = outcome.error,
            "verify ended"
        );
        if outcome.repair && outcome.error.is_none() && !run.differing_regions().is_empty() {
            for &(volume, region) in run.differing_regions() {
                self.source.track(usize::from(volume)).set_dirty(region);
            }
            // Points since the difference arose are wrong; since when is not known.
            if state.gap.begin(GapReason::Repair, 0) {
                state.closing = None;
                self.shared.gap_opened(GapReason::Repair);
            }
            self.update_sync_facts();
            self.sync.shared().nudge();
        }
        self.shared.facts().verify = Some(outcome);
    }

    /// Ends the gap if nothing is missing any more.
    fn finish_gap(&mut self, state: &mut State, session: &Session) {
        if state.gap.open().is_none() || !session.regions.is_empty() {
            return;
        }
        if !self.sync.shared().nothing_left(&*self.source) || !self.source.settled() {
            return;
        }
        // Taken after the bitmaps were seen clean: a write that is dropped later stands behind this position.
        let position = self.source.stream().producer();
        self.look_for_trouble(state, Some(session.sent));
        if !self.sync.shared().nothing_left(&*self.source) {
            return;
        }
        state.gap.complete(position);
        tracing::debug!(group = %self.shared.name, position, "the replica is complete");
    }

    async fn report(&mut self, session: &mut Session) -> Result<(), Ended> {
        let now = Instant::now();
        if session.last_report.is_some_and(|last| now.duration_since(last) < REPORT_EVERY) {
            return Ok(());
        }
        session.last_report = Some(now);
        if self.shared.facts().gap.is_some() {
            self.update_sync_facts();
        }
        let report = Report {
            captured: self.source.stream().producer(),
            data: self.shared.data(),
            rpo_ms: self.shared.rpo().map_or(0, |rpo| rpo.as_millis() as u64),
            reason: self.shared.facts().gap,
            resync: self.shared.resync(),
            verify: self.shared.facts().verify.clone(),
        };
        session::send_control(&mut session.send, FrameKind::Report, session.sent, messages::encode(&report)).await
    }
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
