//! A group with its files open and its two threads running.

use super::live::{Anchor, Counters, Live};
use super::meta::GroupMeta;
use super::replicas;
use super::stream::{IMAGE_HEIGHT, MARK_HEIGHT, StreamState};
use crate::apply::applier::Applier;
use crate::apply::collect::Cursor;
use crate::apply::history::{History, history_failed};
use crate::apply::mark::AppliedFile;
use crate::apply::replica::{Replica, Replicas};
use crate::apply::work::{Queue, Work};
use crate::failure::Failure;
use crate::landing::Place;
use crate::landing::batch::Batch;
use crate::landing::lander::Lander;
use crate::landing::log::{Log, Writer};
use crate::landing::reader::Reader;
use crate::landing::recover::{Recovered, recover};
use crate::promote::{is_rolled, wish};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;
use varve_common::config::ReceiverConfig;
use varve_common::format::{Mark, MarkKind};
use varve_common::state::GapReason;
use varve_common::wire::messages::Refused;
use varve_io::{IoError, crashsafe};
use varve_timeline::cache::IndexCache;
use varve_timeline::chronicle::StreamFacts;
use varve_timeline::recorder::Recorder;
use varve_timeline::timeline::Timeline;

/// The applied mark's file in the group's directory.
pub const APPLIED_NAME: &str = "applied";
/// The directory of the landing log in it.
pub const LANDING_NAME: &str = "landing";
/// The directory of the history in it.
pub const HISTORY_NAME: &str = "history";

/// See the module's text.
#[derive(Debug)]
pub struct OpenGroup {
    /// What the threads, the session and the status share.
    pub live: Arc<Live>,
    /// What the replicas were.
    pub timeline: Arc<Timeline>,
    /// Nothing is left to be rolled back for a takeover.
    pub rolled: Arc<AtomicBool>,
    /// Nothing was when the group was opened.
    pub was_rolled: bool,
    /// The rollback of an abort was asked for: asked again while it runs, it would be done once more after what came since.
    pub undoing: AtomicBool,
    /// Sizes of the volumes.
    pub volumes: Arc<[u64]>,
    /// The landing log.
    pub log: Arc<Log>,
    /// To the applier; a session that is short of memory asks it to let go of what waits.
    pub queue: Arc<Queue>,
    /// To the lander. A session has one batch under way at most.
    pub batches: mpsc::Sender<Batch>,
    /// Which replicas were never written. True until the first session begins, whose images may be under way later.
    fresh: Option<Vec<bool>>,
    lander: JoinHandle<()>,
    applier: JoinHandle<()>,
}

impl OpenGroup {
    /// Opens the group in `dir`: claims the replicas, finds the ends of the history and of the landing log, starts to apply
    /// what is there. `timeline` is the group's, if it was open before: views may hold it.
    pub fn open(
        dir: &Path,
        meta: &GroupMeta,
        config: &ReceiverConfig,
        counters: &Arc<Counters>,
        timeline: Past,
    ) -> Result<Self, Refused> {
        let io = |e: IoError| Failure::io("the group's directory", &e).refused();
        crashsafe::remove_temporaries(dir).map_err(io)?;
        let list: Vec<Replica> = meta.volumes.iter().map(replicas::open).collect::<Result<_, _>>()?;
        let hollow: Vec<bool> = list.iter().map(replicas::is_fresh).collect();
        let files = Files::open(dir, meta, config, timeline).map_err(|failure| failure.refused())?;
        let never = files.recovered.entries == 0 && !files.applied.begun();
        let fresh = hollow.into_iter().map(|hollow| hollow && never).collect();
        files.report(&meta.name, counters);
        let replicas = Replicas::new(list).map_err(|e| Failure::io("io_uring", &e).refused())?;
        files.start(meta, replicas, counters, fresh).map_err(|failure| failure.refused())
    }

    /// Which replicas are known to hold only zeroes. Only the first session is told: later ones may meet images of
    /// earlier ones.
    pub fn take_fresh(&mut self) -> Vec<bool> {
        self.fresh.take().unwrap_or_else(|| vec![false; self.volumes.len()])
    }

    /// Ends both threads. What is being written is finished and synced, what waits stays in the landing log.
    pub fn close(self) {
        let Self { queue, batches, lander, applier, .. } = self;
        drop(batches);
        queue.close();
        for thread in [lander, applier] {
            // A panic was caught and told by the thread's guard.
            let _ = thread.join();
        }
    }
}

/// Turns a panic of a thread into a failed group: without it nobody would wait for the other one in vain.
struct Guard {
    live: Arc<Live>,
    queue: Arc<Queue>,
    log: Arc<Log>,
}

impl Guard {
    fn over(&self, work: impl FnOnce()) {
        // What the thread owned is gone with it; what is shared is queues and numbers that are whole at any moment.
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
            self.live.fail(Failure::damaged("a thread of the group panicked; the receiver's log says where"));
            self.queue.close();
            self.log.close();
        }
    }
}

/// What a group keeps beside the replicas.
struct Files {
    log: Arc<Log>,
    mark: AppliedFile,
    applied: StreamState,
    recovered: Recovered,
    recorder: Recorder,
}

/// The group's timeline, or what is needed to open it.
#[derive(Debug)]
pub enum Past {
    /// It is open.
    Open(Arc<Timeline>),
    /// With this cache.
    Closed(Arc<IndexCache>),
}

impl Files {
    fn open(dir: &Path, meta: &GroupMeta, config: &ReceiverConfig, past: Past) -> Result<Self, Failure> {
        let mark = AppliedFile::open(&dir.join(APPLIED_NAME), meta.id())?;
        let slot = *mark.slot();
        let applied = StreamState::from_slot(&slot);
        let place = Place { segment: slot.segment.get(), offset: slot.offset.get() };
        let (bytes, most) = (config.landing_segment_bytes, config.landing_bytes_max);
        let log = Arc::new(Log::open(&dir.join(LANDING_NAME), meta.id(), bytes, most, place)?);
        let recovered = recover(&log, place, slot.chain.get(), applied, &meta.volume_bytes())?;
        let timeline = match past {
            Past::Open(timeline) => timeline,
            Past::Closed(cache) => {
                Timeline::open(&dir.join(HISTORY_NAME), meta.id(), cache).map_err(|e| history_failed(&e))?
            }
        };
        timeline.set_layer_bytes(config.history_layer_bytes);
        let facts = StreamFacts {
            height: applied.height,
            time_ns: applied.at.time_ns,
            incarnation: applied.at.incarnation,
            position: applied.at.position,
            epoch: meta.epoch,
            // A rollback of a takeover ends the gap before its mark does.
            gap: applied.gap.filter(|_| !meta.takeover.as_ref().is_some_and(|takeover| is_rolled(&timeline, takeover))),
        };
        let landed = recovered.state.height;
        let recorder = Recorder::open(timeline, &facts, slot.history.get(), landed).map_err(|e| history_failed(&e))?;
        Ok(Self { log, mark, applied, recovered, recorder })
    }

    /// The replicas may hold what stood behind the log's new end, and the history what that replaced: from here on no point
    /// is good until the agent has sent that again (it is told so in the welcome), and what comes is younger than that. Also
    /// when nothing in the log says so: a newest entry that rotted looks like one that was never finished, but its height
    /// stands in the history.
    fn damage_mark(&self) -> Option<Mark> {
        let (state, highest) = (&self.recovered.state, self.recorder.highest_stamp());
        let lost = self.recovered.damage.is_some() || highest > state.height + IMAGE_HEIGHT;
        let height = highest.next_multiple_of(MARK_HEIGHT) + MARK_HEIGHT;
        (lost && state.begun()).then_some(Mark {
            kind: MarkKind::GapBegin,
            reason: Some(GapReason::ReplicaChanged),
            incarnation: state.at.incarnation,
            position: state.at.position,
            time_ns: state.at.time_ns,
            epoch: 0,
            height_min: height.max(state.height + MARK_HEIGHT),
        })
    }

    fn report(&self, group: &str, counters: &Counters) {
        let Recovered { entries, bytes, end, damage, .. } = &self.recovered;
        if let Some(why) = damage {
            counters.log_damages.fetch_add(1, Ordering::Relaxed);
            tracing::error!(
                group,
                why,
                "the landing log lost data that was acknowledged; the agent sends it again if it still has it, else a gap \
                 begins and the volumes are compared"
            );
        }
        if *entries > 0 {
            tracing::info!(group, entries, bytes, segment = end.segment, "landed entries to apply");
        }
    }

    fn start(
        self,
        meta: &GroupMeta,
        replicas: Replicas,
        counters: &Arc<Counters>,
        fresh: Vec<bool>,
    ) -> Result<OpenGroup, Failure> {
        let damage_mark = self.damage_mark();
        let Self { log, mark, applied, recovered, recorder } = self;
        let timeline = recorder.timeline().clone();
        let live = Arc::new(Live::new(counters.clone(), recovered.state, applied));
        let rolled = Arc::new(AtomicBool::new(true));
        if let Some(takeover) = &meta.takeover {
            let landed = &recovered.state;
            live.wish_rollback(wish(&timeline, takeover, landed, &rolled).map_err(|e| history_failed(&e))?);
        }
        let was_rolled = rolled.load(Ordering::SeqCst);
        let queue = Arc::new(Queue::default());
        let slot = *mark.slot();
        let place = Place { segment: slot.segment.get(), offset: slot.offset.get() };
        live.set_anchor(Anchor { place, chain: slot.chain.get(), state: applied });
        if recovered.entries > 0 {
            queue.push(Work::Log { until: recovered.end });
        }
        let applier = Applier {
            live: live.clone(),
            queue: queue.clone(),
            log: log.clone(),
            volumes: meta.volume_bytes(),
            replicas,
            mark,
            cursor: Cursor::new(Reader::new(log.clone(), place, slot.chain.get()), applied),
            history: History::new(recorder, counters.clone()),
            rest_at: Instant::now(),
            is_late: false,
        };
        let writer = Writer::new(log.clone(), recovered.end, recovered.chain);
        let mut lander = Lander { live: live.clone(), queue: queue.clone(), writer, state: recovered.state };
        if let Some(mark) = damage_mark {
            // Durable before anybody hears where the stream ends.
            lander.land(Batch::of_mark(&mark))?;
        }
        let (batches, received) = mpsc::channel();
        let thread = |role: &str| Builder::new().name(format!("{role}-{}", meta.name));
        let failed = |e: std::io::Error| Failure::io("a thread", &IoError::new("start", PathBuf::from("thread"), e));
        let guard = || Guard { live: live.clone(), queue: queue.clone(), log: log.clone() };
        let (applying, landing) = (guard(), guard());
        let applier = thread("apply").spawn(move || applying.over(|| applier.run())).map_err(failed)?;
        let lander = match thread("land").spawn(move || landing.over(|| lander.run(received))) {
            Ok(lander) => lander,
            Err(error) => {
                queue.close();
                let _ = applier.join();
                return Err(failed(error));
            }
        };
        let volumes = meta.volume_bytes().into();
        let fresh = Some(fresh);
        let undoing = AtomicBool::new(meta.takeover.as_ref().is_some_and(|takeover| takeover.aborting));
        Ok(OpenGroup {
            live,
            timeline,
            rolled,
            was_rolled,
            undoing,
            volumes,
            log,
            queue,
            batches,
            fresh,
            lander,
            applier,
        })
    }
}
