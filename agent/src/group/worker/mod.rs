//! The owner of a group: one loop that walks the ring, cuts frames, sends, and decides what is told to the receiver.
//! Nothing else changes the group's state; others send commands or read [`GroupShared`].

mod backlog;
mod onward;
mod quiet;
mod receive;
mod send;
mod turn;

use super::compress::Compression;
use super::cut::{Met, cut, walk};
use super::gap::GapState;
use super::kept::Kept;
use super::regions::{Next, Regions, image_extents, touched_blocks};
use super::session::{self, Ended, Event};
use super::shared::{Counters, GroupShared, MISSES_UNKNOWN, Rest};
use super::source::{Source, Troubles, dirty_regions, set_all_dirty};
use super::sync::{FromSync, Purpose, RegionRead, SyncThread};
use super::verify::VerifyRun;
use crate::clock;
use crate::journal::{Settings, Tape as _};
use crate::link::LinkView;
use crate::misses::Misses;
use crate::quiesce::{Order, Quiet};
use crate::store::Fence;
use backlog::Backlog;
use bytes::Bytes;
use onward::Onward;
use quinn::SendStream;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use varve_common::format::{Mark, MarkKind};
use varve_common::geometry::Extent;
use varve_common::problem::Problem;
use varve_common::record::{RING_HEADER_BYTES, RecordHeader, RecordKind};
use varve_common::state::{GapReason, Link};
use varve_common::wire::messages::{
    self, Ask, AskReply, Hello, Incarnation, Refused, RefusedReason, Report, Verify, VolumeHello, Welcome,
};
use varve_common::wire::{Codec, Frame, FrameKind, Image, ImageExtent, ImageHeader, WireError};
use varve_io::aligned::{BufPool, PooledBuf};

/// Plain bytes of a data frame, unless one record alone is larger.
pub const FRAME_BYTES: u64 = 512 << 10;
/// Frames up to this size have memory of their own.
const SMALL_FRAME_BYTES: usize = 32 << 10;
/// Bytes of records walked or sent before anything else gets its turn.
const TURN_BYTES: u64 = 4 << 20;
/// Pause between looks at the ring while writes come in.
const POLL_MIN: Duration = Duration::from_millis(1);
/// Longest pause: what an idle group costs (50 looks a second, below 0.5 % of a core) and what its first write waits.
const POLL_MAX: Duration = Duration::from_millis(20);
/// What a canary takes of the stream: where no more than that came, nobody writes.
const CANARY_BYTES: u64 = RING_HEADER_BYTES + size_of::<RecordHeader>() as u64;
/// Between two canaries.
const CANARY_EVERY: Duration = Duration::from_secs(1);
/// Between two reports to the receiver.
const REPORT_EVERY: Duration = Duration::from_millis(500);
/// Between two looks at what is left outside a gap.
const LEFT_LOOK_EVERY: Duration = Duration::from_secs(1);
/// So many of them in a row may find a region dirty that was not even read. One that is free is compared at once: that another one never is
/// means that writes to it are not seen to complete, or that its disk cannot be read.
const LEFT_LOOKS_MAX: u32 = 30;
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
    /// A volume is not what it was: a gap begins, which this worker will not end (the next one may). Answered with its position.
    VolumeChanged(oneshot::Sender<Result<u64, Problem>>),
    /// What became of an [`Order::Quiesce`].
    Quiet(u64, Result<Quiet, Problem>),
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
    /// What the sync thread read. Before the thread: dropping it frees the thread if it waits to hand something over.
    pub from_sync: mpsc::Receiver<FromSync>,
    /// Reads the volumes.
    pub sync: SyncThread,
    /// Wishes.
    pub commands: mpsc::Receiver<Command>,
    /// The connection.
    pub link: watch::Receiver<LinkView>,
    /// `true`: the group ends.
    pub stop: watch::Receiver<bool>,
    /// Events that the kernel skipped.
    pub misses: Arc<Misses>,
    /// Buffers for frames, shared by all groups.
    pub frames: BufPool,
    /// What is said in every Hello.
    pub volumes: Vec<VolumeHello>,
    /// Compress where it pays.
    pub compression: bool,
    /// Skipped events before its capture began.
    pub misses_before: u64,
    /// Where an earlier ring ended, if nobody wrote since; or why that is not known. `None`: the ring is not new, or there was none.
    pub sealed: Option<Result<(Incarnation, u64), String>>,
    /// Where the journal lies; `None`: there is none.
    pub journal: Option<Settings>,
    /// To the daemon.
    pub orders: mpsc::Sender<Order>,
    /// Told when the group is consistent for the first time.
    pub on_consistent: Box<dyn Fn() + Send + Sync>,
}

/// What lasts over sessions.
struct State {
    gap: GapState,
    troubles: Troubles,
    misses: u64,
    /// No event was skipped before this place: a look that began after it was walked found nothing. Nothing behind it is sent or spilled.
    looked_to: u64,
    /// A place that was walked, and when: what the next look says counts up to there.
    to_look: (u64, u64),
    /// What was left for the next worker.
    kept: Option<Kept>,
    /// Records before were walked.
    walked: u64,
    /// No record behind it was ever sent: by this worker, or by those before, which sent nothing that was not there when it began. A
    /// receiver that claims more has heard of another life of this ring: of a machine that was set back with its memory.
    sent_ever: u64,
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
    last_left_look: Instant,
    left_looks: u32,
    read_failed: bool,
    /// Part of the journal could not be read: there is a hole in the stream.
    journal_lost: bool,
    /// The receiver wants the group quiet, under this number: until it was told that it is.
    quiescing: Option<u64>,
    /// What it is to be told.
    replies: Vec<AskReply>,
    /// See [`Worker::outgrown`].
    outgrown: bool,
    /// See [`onward`].
    onward: Option<Onward>,
    /// A new ring was begun without a comparison.
    went_on: bool,
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
    /// The sync thread was told of the session.
    reading: bool,
    last_report: Option<Instant>,
    compression: Compression,
    backlog: Backlog,
    /// The session is for a journal of this ring, which is not the group's ring.
    earlier: Option<Incarnation>,
}

/// How long is waited between two looks at the ring: shortly while writes come in.
struct Pace(Duration);

impl Default for Pace {
    fn default() -> Self {
        Self(POLL_MIN)
    }
}

impl Pace {
    fn next(&mut self, busy: bool) -> Duration {
        self.0 = if busy { POLL_MIN } else { (self.0 * 5 / 4).min(POLL_MAX) };
        self.0
    }
}

/// A frame's bytes, as `bytes` wants them. A small frame must not hold a large buffer until the peer's transport has
/// acknowledged it: on a long path an idle group would have all of them.
enum Body {
    Pooled(PooledBuf, usize),
    Small(Vec<u8>),
}

impl Body {
    /// Room for `length` bytes; `None`: all buffers are under way.
    fn new(pool: &BufPool, length: usize) -> Option<Self> {
        if length <= SMALL_FRAME_BYTES {
            return Some(Self::Small(vec![0; length]));
        }
        pool.take().map(|buf| Self::Pooled(buf, length))
    }
}

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Pooled(buf, length) => &buf[..*length],
            Self::Small(bytes) => bytes,
        }
    }
}

impl AsMut<[u8]> for Body {
    fn as_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Pooled(buf, length) => &mut buf[..*length],
            Self::Small(bytes) => bytes,
        }
    }
}

impl Worker {
    /// Runs until the group ends.
    pub async fn run(mut self) {
        let now = Instant::now();
        let kept = self.source.kept().unwrap_or_else(|| self.first_kept());
        let mut state = State {
            gap: kept.gap,
            troubles: kept.troubles,
            misses: kept.misses,
            looked_to: self.source.stream().consumer(),
            to_look: (0, 0),
            kept: None,
            walked: self.source.stream().consumer(),
            sent_ever: self.source.stream().producer(),
            sessions: 0,
            known_there: kept.known_there,
            bookmarks: Vec::new(),
            verify: None,
            verifies: 0,
            closing: None,
            offset: clock::Offset::going_on(self.source.time_offset(), clock::boot_ns()),
            last_canary: now,
            last_left_look: now,
            left_looks: 0,
            read_failed: false,
            journal_lost: false,
            quiescing: None,
            replies: Vec::new(),
            outgrown: false,
            onward: None,
            went_on: false,
        };
        if self.shared.facts().ever_consistent {
            state.gap.note_ever_consistent();
        }
        let spilling = self.open_journal(&mut state).await;
        self.begin_onward(&mut state);
        let mut retry = RETRY_MIN;
        while !*self.stop.borrow() {
            let Some(connection) = self.wait_for_connection(&mut state).await else { break };
            let began = Instant::now();
            let ended = match self.drain(&mut state, &connection).await {
                Some(ended) => ended,
                None => self.session(&mut state, connection).await,
            };
            session::count(&self.shared, &ended);
            if matches!(ended, Ended::Stopped) {
                break;
            }
            retry = if began.elapsed() > RETRY_MAX { RETRY_MIN } else { (retry * 2).min(RETRY_MAX) };
            self.note_ended(&ended);
            self.idle(&mut state, retry).await;
        }
        self.flush_journal(&mut state, spilling).await;
        *self.shared.rest() = self.rest(&state);
        if let Some(run) = state.verify.as_mut().filter(|run| !run.outcome().finished) {
            run.fail("the group ended");
            self.shared.facts().verify = Some(run.outcome().clone());
        }
        // Frees the sync thread if it waits to hand something over. It may be in a read that takes long.
        self.from_sync.close();
        let sync = self.sync;
        let ended = tokio::task::spawn_blocking(move || drop(sync)).await;
        if ended.is_err() {
            tracing::error!(group = %self.shared.name, "the sync thread did not end well");
        }
        for pending in state.bookmarks {
            let _ = pending.answer.send(Err(session::not_streaming(&self.shared.name)));
        }
    }

    /// What is true of a new ring: nothing is known of the replica.
    fn first_kept(&self) -> Kept {
        let reason = match self.shared.facts().ever_consistent {
            true => GapReason::NewRing,
            false => GapReason::InitialSync,
        };
        Kept {
            gap: GapState::new(reason),
            shown: Some(reason),
            shown_since_ns: None,
            known_there: false,
            troubles: self.source.troubles(),
            misses: self.misses.count(),
        }
    }

    /// Leaves what the next worker must know, if it changed. To be called before anything is sent that depends on it.
    fn keep(&self, state: &mut State) {
        let (shown, shown_since_ns) = {
            let facts = self.shared.facts();
            (facts.gap, facts.gap_since_ns)
        };
        let kept = Kept {
            gap: state.gap.clone(),
            shown,
            shown_since_ns,
            known_there: state.known_there,
            troubles: state.troubles,
            misses: state.misses,
        };
        if state.kept.as_ref() != Some(&kept) {
            self.source.keep(&kept);
            state.kept = Some(kept);
        }
    }

    fn note_ended(&self, ended: &Ended) {
        let why = ended.explain();
        if let Ended::Refused(refused) = ended {
            self.note_refused(refused);
        }
        let mut facts = self.shared.facts();
        facts.refused = match ended {
            Ended::Refused(refused) => Some(refused.reason),
            // Nothing was said to the contrary.
            _ => facts.refused,
        };
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
        let mut pace = Pace::default();
        while Instant::now() < until && !*self.stop.borrow() {
            let walked = state.walked;
            self.every_turn(state, None);
            let left = until.saturating_duration_since(Instant::now()).min(pace.next(state.walked > walked));
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
            let track = self.source.track(usize::from(read.volume));
            track.set_dirty(read.region);
            track.set_finished(read.region);
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
            oldest: self.shared.oldest(),
            newest: stream.producer(),
            volumes: self.volumes.clone(),
            software: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let mut stop = self.stop.clone();
        let (send, recv, welcome) = match self.meanwhile(state, None, session::open(&connection, &hello)).await {
            Some(Ok(opened)) => opened,
            Some(Err(ended)) => return ended,
            None => return Ended::Stopped,
        };
        let stream = self.source.stream();
        // What earlier sessions sent may be acknowledged at once.
        let resume = welcome.resume.filter(|at| *at <= stream.producer());
        let sent_max = Arc::new(AtomicU64::new(resume.unwrap_or(0).max(stream.consumer())));
        let (mut events, reader) = self.spawn_reader(recv, sent_max.clone());
        let outcome = tokio::select! {
            outcome = self.converse(state, send, welcome, &mut events, &sent_max) => outcome,
            // The receiver may be stuck with a frame half sent: the end does not wait for it.
            _ = stop.wait_for(|stop| *stop) => Ended::Stopped,
        };
        reader.abort();
        self.sync.shared().pause();
        outcome
    }

    fn spawn_reader(
        &self,
        recv: quinn::RecvStream,
        sent_max: Arc<AtomicU64>,
    ) -> (mpsc::Receiver<Event>, tokio::task::JoinHandle<()>) {
        let shared = self.shared.clone();
        session::spawn_reader(recv, self.shared.clone(), move |durable| {
            // A receiver that acknowledges what was never sent is broken: releasing it would lose writes.
            if durable > sent_max.load(Ordering::Acquire) {
                return Err(WireError::Decode {
                    kind: FrameKind::Ack,
                    why: format!("position {durable} was not sent"),
                });
            }
            shared.release(durable);
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
            reading: false,
            last_report: None,
            compression: Compression::new(self.compression, Instant::now()),
            backlog: Backlog::default(),
            earlier: None,
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
        self.quiet_session_ended(state);
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
        self.believe(&welcome)?;
        let producer = self.source.stream().producer();
        let resumable = welcome.resume.filter(|at| (self.shared.oldest()..=producer).contains(at));
        if resumable.is_some_and(|at| at > state.sent_ever) {
            tracing::error!(
                group = %self.shared.name,
                claimed = resumable,
                sent = state.sent_ever,
                "the receiver has more of this stream than was ever sent: this machine was set back, all is compared"
            );
        }
        let resumable = resumable.filter(|at| *at <= state.sent_ever);
        let stream = self.source.stream();
        match resumable {
            Some(position) => {
                self.shared.release(position);
                session.sent = position;
                state.walked = state.walked.max(position);
                (state.closing, state.journal_lost) = (None, false);
                if !session.remote_consistent && state.gap.open().is_none() {
                    // The GapEnd never landed, or the receiver lost what it had: the replica is whole again only when all
                    // that was sent before has been sent again.
                    state.gap.complete(stream.producer());
                    // The end of the gap will stand behind the bookmarks that wait, so they are no points.
                    let reason = self.shared.facts().gap.unwrap_or(GapReason::ReplicaChanged);
                    for pending in state.bookmarks.drain(..) {
                        // Whoever asked may be gone.
                        let _ =
                            pending.answer.send(Err(receive::no_bookmark(&self.shared.name, &pending.name, reason)));
                    }
                }
                if session.remote_consistent && state.gap.open().is_none() && self.shared.facts().gap.is_some() {
                    // The GapEnd landed in the last session, which ended before we heard of it.
                    self.gap_is_closed(state);
                }
            }
            None => self.begin(state, session).await?,
        }
        state.sent_ever = state.sent_ever.max(session.sent);
        // That a begin was sent does not mean that it came there.
        state.known_there |= resumable.is_some();
        state.onward.take_if(|_| state.known_there);
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
            (facts.link_reason, facts.refused) = (None, None);
            facts.replicas = welcome.replicas;
            facts.epoch = welcome.epoch;
        }
        Ok(())
    }

    /// Has regions read from when the receiver may be sent what differs: a gap that it has not heard of yet may be that of a
    /// volume that grew, and it does not know of the new part before.
    fn begin_reading(&self, state: &State, session: &mut Session) {
        if !session.reading && (state.gap.open().is_none() || !session.remote_consistent) {
            session.reading = true;
            self.sync.shared().start(session.number, session.fresh.clone());
        }
    }

    /// The receiver does not know this ring (or cannot go on with it): everything is compared.
    async fn begin(&mut self, state: &mut State, session: &mut Session) -> Result<(), Ended> {
        if self.goes_on(state, session.remote_consistent) {
            return self.go_on(state, session).await;
        }
        if std::mem::take(&mut state.went_on) {
            self.compare_all(state, "the receiver has lost what it had of the new ring");
        }
        let reason = match (state.known_there, state.gap.ever_consistent()) {
            _ if std::mem::take(&mut state.journal_lost) => GapReason::JournalLost,
            (true, _) => GapReason::ReplicaChanged,
            (false, true) => GapReason::NewRing,
            (false, false) => GapReason::InitialSync,
        };
        let position = self.shared.forget_journal();
        set_all_dirty(&*self.source);
        state.gap.restart(reason, position);
        state.closing = None;
        self.shared.gap_opened(reason);
        session.sent = position;
        session.remote_consistent = false;
        self.keep(state);
        self.send_mark(state, session, MarkKind::Begin, Some(reason)).await
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
            self.every_turn(state, Some(session.sent));
            self.begin_reading(state, session);
            let sent = session.sent;
            let busy = match self.send_turn(state, session, sent_max).await {
                Ok(busy) => busy,
                Err(ended) => {
                    let better = Self::better_reason(events);
                    let better = self.meanwhile(state, Some(session.sent), better).await;
                    return better.flatten().unwrap_or(ended);
                }
            };
            if busy {
                if session.sent - sent > CANARY_BYTES {
                    pause = POLL_MIN;
                }
                // Whatever came in meanwhile gets its turn, without waiting for it.
                while let Ok(event) = events.try_recv() {
                    if let Err(ended) = self.event(state, session, event).await {
                        return ended;
                    }
                }
                while let Ok(from_sync) = self.from_sync.try_recv() {
                    self.region_came(state, session, from_sync);
                }
                while let Ok(command) = self.commands.try_recv() {
                    self.command(state, command, true);
                }
                tokio::task::yield_now().await;
                continue;
            }
            if state.closing.is_some() || state.gap.open().is_some() {
                // What ends a gap waits for nothing but the next look.
                pause = POLL_MIN;
            }
            tokio::select! {
                biased;
                event = events.recv() => {
                    let event = event.unwrap_or(Event::Ended(Ended::Lost("the reader stopped".to_owned())));
                    if let Err(ended) = self.event(state, session, event).await {
                        return ended;
                    }
                }
                Some(from_sync) = self.from_sync.recv() => self.region_came(state, session, from_sync),
                Some(command) = self.commands.recv() => { self.command(state, command, true); pause = POLL_MIN }
                _ = self.stop.changed() => {}
                () = tokio::time::sleep(pause) => pause = (pause * 5 / 4).min(POLL_MAX),
            }
        }
    }

    /// A write that fails often has its reason waiting in the other direction.
    async fn better_reason(events: &mut mpsc::Receiver<Event>) -> Option<Ended> {
        let wait = async {
            while let Some(event) = events.recv().await {
                if let Event::Ended(better @ (Ended::Refused(_) | Ended::Protocol(_))) = event {
                    return Some(better);
                }
            }
            None
        };
        tokio::time::timeout(Duration::from_secs(1), wait).await.ok().flatten()
    }
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
