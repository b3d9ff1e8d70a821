//! Running a group here: its volumes at a point as writable devices, what is written to them is the group's stream.
//!
//! ```text
//! epoch and takeover in group.json (durable: no source may write from here on)
//!   → the receiver's own stream begins (a mark in the landing log)
//!   → devices: at once, whatever is landed and not applied; until the replicas are rolled back to an older point, a view of the
//!     point is under them
//! ```
//!
//! Each step is durable before the next, and a receiver that starts again finds where it was and serves on. An abort rolls
//! back to the point before, as new history, and puts the stream where the source's was.
//!
//! - [`writer`]: the stream
//! - [`disk`]: a volume as a disk
//! - [`backlog`]: what was landed before and is not applied
//! - [`plan`]: what would be taken
//! - [`point`]: which point is taken
//! - [`serve`]: stream and devices
//! - [`again`]: devices that are to be there and are not, or are to go
//! - [`trial`]: a test beside the replication
//! - [`quiet`]: the source before it is taken over
//! - [`deadline`]: back by itself, if nobody commits

mod again;
pub mod backlog;
mod deadline;
pub mod disk;
mod plan;
mod point;
mod quiet;
mod serve;
mod trial;
pub mod writer;

use crate::clock::wall_ns;
use crate::control::ProgressOut;
use crate::group::live::RollbackWish;
use crate::group::meta::{GroupMeta, Takeover, hex, unhex};
use crate::group::open::OpenGroup;
use crate::group::registry::{Registry, Slot};
use crate::group::stream::{IMAGE_HEIGHT, StreamState, onward_ns};
use crate::rollback::land;
use crate::view::views::Views;
use again::Missing;
use deadline::Deadlines;
use plan::age_seconds;
pub use plan::{plan, plan_planned};
use point::locate;
use serve::links;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use varve_common::control::{FailoverReply, PlannedWish, PointReply, TakeoverStatus, show_time};
use varve_common::format::{Mark, MarkKind};
use varve_common::paths::Paths;
use varve_common::point::PointSpec;
use varve_common::problem::Problem;
use varve_common::state::GapReason;
use varve_export::device::Attached;
use varve_timeline::error::HistoryError;
use varve_timeline::timeline::Timeline;
use writer::StreamWriter;

/// The longest that the replicas may take to reach what is landed, or an abort to roll back.
const CATCH_UP_MAX: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(50);

/// Everything that is taken over or tested.
#[derive(Debug)]
pub struct Promotions {
    run_dir: PathBuf,
    served: Mutex<BTreeMap<String, Served>>,
    /// What is to be served and is not.
    missing: Mutex<BTreeMap<String, Missing>>,
    /// Views of tests, by group.
    tests: Mutex<BTreeMap<String, u64>>,
    /// Takeovers that go back by themselves.
    deadlines: Mutex<Deadlines>,
    /// Whether the daemon ends: then nothing is served any more.
    closing: tokio::sync::watch::Sender<bool>,
    /// Held for reading by whoever is making devices.
    making: tokio::sync::RwLock<()>,
}

/// A group that runs here.
#[derive(Debug)]
struct Served {
    devices: Vec<Attached>,
    writer: Arc<StreamWriter>,
    rolled: Arc<AtomicBool>,
    state: State,
}

/// Whether its devices can be used.
#[derive(Debug, Default, PartialEq, Eq)]
enum State {
    /// All of them.
    #[default]
    Whole,
    /// Somebody is taking them away, and has them.
    Going,
    /// Some went and one did not: the rest goes when nobody uses it, and then all are made again.
    Broken(String),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What all steps of one command need.
#[derive(Clone, Debug)]
pub struct Context {
    /// The groups.
    pub registry: Arc<Registry>,
    /// The group.
    pub slot: Arc<Slot>,
}

impl Context {
    fn meta(&self) -> GroupMeta {
        self.slot.board().meta.clone().unwrap_or_else(|| GroupMeta::new(&self.slot.name, "", 0, 0, Vec::new()))
    }

    /// For the operator.
    pub fn failed(&self, why: impl Into<String>) -> Problem {
        let next = "see the receiver's log and 'varve status', then run the same command again";
        Problem::failed(format!("'{}' was not taken over", self.slot.name), why, next)
    }
}

impl Promotions {
    /// None yet. `run_dir`: of mounts and links. A link that an earlier life left there may name a device that is somebody
    /// else's by now.
    pub fn new(run_dir: PathBuf, paths: &Paths) -> Self {
        let entries = std::fs::read_dir(&run_dir).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_symlink())) {
            if let Err(error) = std::fs::remove_file(entry.path()) {
                tracing::warn!(link = %entry.path().display(), %error, "a link of an earlier life stays");
            }
        }
        Self {
            run_dir,
            served: Mutex::default(),
            missing: Mutex::default(),
            tests: Mutex::default(),
            deadlines: Mutex::new(Deadlines::new(paths)),
            closing: tokio::sync::watch::Sender::new(false),
            making: tokio::sync::RwLock::default(),
        }
    }

    /// Takes a group over.
    ///
    /// # Errors
    /// For the operator. Once the epoch has risen the same command goes on where this one ended.
    pub async fn failover(
        &self,
        context: &Context,
        at: PointSpec,
        planned: Option<PlannedWish>,
        abort_after: Option<Duration>,
        progress: &ProgressOut,
    ) -> Result<FailoverReply, Problem> {
        let begin = Instant::now();
        let name = context.slot.name.clone();
        if let Some(takeover) = context.meta().takeover {
            let why = format!("it runs here since {}", takeover.since);
            let next = format!("'varve status {name}' shows its devices; 'varve failover abort {name}' goes back");
            return Err(Problem::refused(format!("'{name}' is taken over already"), why, next));
        }
        let (slot, spec, is_planned) = (context.slot.clone(), at.clone(), planned.is_some());
        let plan = blocking(move || if is_planned { plan_planned(&slot, &spec) } else { plan(&slot, &spec) }).await?;
        let mut source = match &planned {
            Some(wish) => Some(quiet::quiesce(context, wish, progress).await?),
            None => None,
        };
        let drained = match at == PointSpec::Latest && source.is_none() {
            true => quiet::drain(&context.slot).await,
            false => None,
        };
        let log = context.slot.board().log.clone();
        log.inspect(|log| log.open_reserve());
        let desk = context.registry.seize(&context.slot).await.map_err(|refused| context.failed(refused.text))?;
        let Some(open) = &desk.open else { return Err(context.failed("its files are not open")) };
        if context.meta().takeover.is_some() {
            // Whoever took the source away meanwhile has the group.
            return Err(context.failed("another takeover of it was quicker"));
        }
        // Everything that came before the session ended counts.
        let landed = open.live.view().landed;
        if let Some(quiet) = &mut source {
            quiet.holds(&context.slot, &landed).map_err(|why| context.failed(why))?;
            crate::failpoint::hit(crate::failpoint::PLANNED_QUIET);
        }
        let slot = context.slot.clone();
        let (point, newest) =
            blocking(move || Ok((locate(&slot, &at)?.1, locate(&slot, &PointSpec::Latest)?.1))).await?;
        // What was found must be there until the wish holds it itself.
        let _kept = open.timeline.pin(point.height).map_err(|e| context.failed(e.to_string()))?;
        let newest_age = age_seconds(newest.time_ns);
        let rollback = point.height < landed.height;
        if source.is_some() && rollback {
            return Err(context.failed("the newest point is not the newest position"));
        }
        let takeover = Takeover {
            incarnation: hex(&rand::random()),
            height: point.height,
            time_ns: point.time_ns,
            rollback,
            // Images of a gap stand above the stream's end, and the source counts them as done.
            before_height: landed.height + if landed.is_consistent() { 0 } else { IMAGE_HEIGHT },
            before_time_ns: landed.at.time_ns,
            source_incarnation: hex(&landed.at.incarnation),
            source_position: landed.at.position,
            source_consistent: landed.is_consistent(),
            source_epoch: context.meta().epoch,
            since: show_time(wall_ns()),
            committed: false,
            aborting: false,
            planned: is_planned,
            abort_at_ns: abort_after.map(|after| wall_ns().saturating_add(after.as_nanos() as u64)),
            overwritten: Vec::new(),
        };
        let epoch = takeover.source_epoch + 1;
        let change = |meta: &mut GroupMeta| {
            meta.epoch = epoch;
            meta.source_epoch_min = epoch;
            // What it needs to come home stays: an abort leaves the group there.
            meta.takeover = Some(takeover.clone());
        };
        if let Err(refused) = context.registry.change_meta(&context.slot, change).await {
            // It may be on the disk all the same: what was is written again, before a source is agreed to.
            let _ = context.registry.change_meta(&context.slot, |_| {}).await;
            return Err(context.failed(refused.text));
        }
        if let Some(quiet) = &mut source {
            quiet.keep();
        }
        crate::failpoint::hit(crate::failpoint::PROMOTE_MARKED);
        tracing::warn!(group = name, at = show_time(point.time_ns), epoch, "taken over: no source may write any more");
        let wished = wish(&open.timeline, &takeover, &landed, &open.rolled);
        open.live.wish_rollback(wished.map_err(|e| context.failed(e.to_string()))?);
        let (volumes, hints) = self.serve(context, open, &takeover, epoch).await.map_err(|problem| {
            if context.meta().takeover.is_none_or(|now| now.aborting) {
                return problem;
            }
            let next =
                format!("it is tried again by itself; 'varve status {name}' shows the devices once they are there");
            let what = format!("'{name}' is taken over and its devices are not there yet");
            Problem::failed(what, format!("{}: {}", problem.what, problem.why), next)
        })?;
        let said = context.slot.board().report.as_ref().map(|(report, _)| report.captured);
        let not_here_bytes = match source {
            Some(_) => Some(0),
            None => said.map(|captured| captured.saturating_sub(landed.at.position)),
        };
        Ok(FailoverReply {
            not_here_bytes,
            drained,
            planned: source.map(|quiet| quiet.reply()),
            point: point.reply(),
            newest: newest.reply(),
            newest_age_seconds: Some(newest_age),
            epoch,
            abort_at: takeover.abort_at_ns.map(show_time),
            dry_run: false,
            seconds: begin.elapsed().as_secs_f64(),
            volumes,
            hints,
            ..plan
        })
    }

    /// From here on there is no way back but failback.
    ///
    /// # Errors
    /// For the operator.
    pub async fn commit(&self, context: &Context) -> Result<FailoverReply, Problem> {
        let name = context.slot.name.clone();
        let Some(takeover) = context.meta().takeover else { return Err(not_taken_over(&name)) };
        // Decided where it is written down: an abort may have begun, or be done, since it was looked at.
        let mut refused = None;
        let commit = |meta: &mut GroupMeta| match &mut meta.takeover {
            None => refused = Some(not_taken_over(&name)),
            Some(takeover) if takeover.aborting => {
                let next = format!("'varve failover abort {name}' goes on with that");
                refused = Some(Problem::refused(format!("'{name}' was not committed"), "it is being undone", next));
            }
            Some(takeover) => {
                takeover.committed = true;
                takeover.abort_at_ns = None;
                meta.home = None;
            }
        };
        let changed = context.registry.change_meta(&context.slot, commit).await;
        changed.map_err(|refused| context.failed(refused.text))?;
        if let Some(problem) = refused {
            return Err(problem);
        }
        tracing::warn!(group = name, "the takeover is committed");
        Ok(FailoverReply { committed: true, ..self.reply(context, &takeover) })
    }

    fn reply(&self, context: &Context, takeover: &Takeover) -> FailoverReply {
        let timeline = context.slot.board().timeline.clone();
        let position = |height| timeline.as_ref().map_or_else(String::new, |t| t.chronicle().show_position(height));
        let point = |height, time_ns| PointReply {
            time: varve_common::control::show_exact_time(time_ns),
            position: position(height),
            height,
            ..PointReply::default()
        };
        FailoverReply {
            group: context.slot.name.clone(),
            point: point(takeover.height, takeover.time_ns),
            newest: point(takeover.before_height, takeover.before_time_ns),
            newest_age_seconds: None,
            left_out_bytes: 0,
            not_here_bytes: None,
            source_heard_seconds: None,
            epoch: context.meta().epoch,
            test: false,
            committed: takeover.committed,
            abort_at: None,
            aborted: false,
            dry_run: false,
            seconds: 0.0,
            volumes: Vec::new(),
            hints: Vec::new(),
            drained: None,
            planned: None,
        }
    }

    /// Back to replication: what was written here becomes history, the replicas are what they were, the source may go on.
    ///
    /// # Errors
    /// For the operator; the same command goes on.
    pub async fn abort(
        &self,
        context: &Context,
        views: &Views,
        force: bool,
        only_test: bool,
    ) -> Result<FailoverReply, Problem> {
        let begin = Instant::now();
        let name = context.slot.name.clone();
        let taken_over = context.meta().takeover.filter(|_| !only_test);
        // Whoever has both wants back what runs in earnest, unless it is there to stay.
        if taken_over.as_ref().is_none_or(|takeover| takeover.committed)
            && let Some(test) = self.test_of(&name, views)
        {
            return self.end_test(context, views, test, force);
        }
        let Some(takeover) = taken_over else { return Err(not_taken_over(&name)) };
        let what = format!("'{name}' was not aborted");
        let committed = || {
            let next = format!("'varve failback {name}' brings it home with everything that was written here");
            Problem::refused(what.clone(), "the takeover is committed", next)
        };
        if takeover.committed {
            return Err(committed());
        }
        self.stop_serving(&name, force, &what)?;
        // Committed meanwhile, or it cannot be written down: its devices are wanted.
        match self.set_aborting(context, &takeover, true).await {
            Ok(true) => {}
            Ok(false) => {
                self.resume(context).await;
                return Err(committed());
            }
            Err(problem) => {
                self.resume(context).await;
                return Err(problem);
            }
        }
        let aborting = Takeover { aborting: true, ..takeover.clone() };
        crate::failpoint::hit(crate::failpoint::PROMOTE_ABORTING);
        // If that fails it stays written down: whoever has the desk may be at it.
        let desk = context.registry.seize(&context.slot).await.map_err(|refused| context.failed(refused.text))?;
        // A start of the receiver goes on with what it finds, and may have had the desk before: once more would undo what came since.
        if context.meta().takeover.is_none_or(|now| now.incarnation != takeover.incarnation) {
            let reply = self.reply(context, &takeover);
            return Ok(FailoverReply { aborted: true, seconds: begin.elapsed().as_secs_f64(), ..reply });
        }
        // Another abort may have called it off, and then a commit may have come.
        if !self.set_aborting(context, &takeover, true).await? {
            return Err(committed());
        }
        // Or it was making its devices, as the takeover itself does. While they are served nothing was undone yet, so it can be
        // called off.
        if let Err(problem) = self.stop_serving(&name, force, &what) {
            self.set_aborting(context, &takeover, false).await?;
            return Err(problem);
        }
        let Some(open) = &desk.open else { return Err(context.failed("its files are not open")) };
        self.undo(context, open, &aborting).await?;
        let reply = self.reply(context, &takeover);
        Ok(FailoverReply { aborted: true, seconds: begin.elapsed().as_secs_f64(), ..reply })
    }

    /// Whether it is this takeover still, and not committed: only then it is changed.
    async fn set_aborting(&self, context: &Context, takeover: &Takeover, aborting: bool) -> Result<bool, Problem> {
        let mut is_ours = false;
        let change = |meta: &mut GroupMeta| {
            let ours = |now: &&mut Takeover| now.incarnation == takeover.incarnation && !now.committed;
            if let Some(now) = meta.takeover.as_mut().filter(ours) {
                (is_ours, now.aborting) = (true, aborting);
            }
        };
        let changed = context.registry.change_meta(&context.slot, change).await;
        changed.map_err(|refused| context.failed(refused.text))?;
        Ok(is_ours)
    }

    /// Undoes a takeover that is written down as being undone. The group may have been opened before that was.
    async fn undo(&self, context: &Context, open: &OpenGroup, takeover: &Takeover) -> Result<(), Problem> {
        if !open.undoing.load(Ordering::SeqCst) {
            let landed = open.live.view().landed;
            catch_up(open, landed.height).await.map_err(|why| context.failed(why))?;
            if landed.at.incarnation == unhex(&takeover.incarnation) {
                // The takeover's own may run still. Its end must not be taken for the abort's.
                rolled_back(context, open).await?;
            }
            let wished = wish(&open.timeline, takeover, &landed, &open.rolled);
            open.live.wish_rollback(wished.map_err(|e| context.failed(e.to_string()))?);
            open.undoing.store(true, Ordering::SeqCst);
        }
        self.finish_abort(context, open, takeover).await?;
        open.undoing.store(false, Ordering::SeqCst);
        Ok(())
    }

    async fn finish_abort(&self, context: &Context, open: &OpenGroup, takeover: &Takeover) -> Result<(), Problem> {
        self.go_back(context, open, takeover).await?;
        let back = |meta: &mut GroupMeta| {
            meta.takeover = None;
            meta.source_epoch_min = takeover.source_epoch;
        };
        let changed = context.registry.change_meta(&context.slot, back).await;
        changed.map_err(|refused| context.failed(refused.text))?;
        context.slot.board().unsure = None;
        tracing::warn!(group = context.slot.name, "the takeover is aborted: replication goes on");
        Ok(())
    }

    /// The replicas as they were before, the stream where the source's was.
    async fn go_back(&self, context: &Context, open: &OpenGroup, takeover: &Takeover) -> Result<(), Problem> {
        let failed = |why: String| context.failed(why);
        let landed = open.live.view().landed;
        let incarnation = unhex(&takeover.source_incarnation);
        let epoch = context.meta().epoch;
        let time_ns = onward_ns(landed.at.time_ns, wall_ns());
        let mark = |kind, reason| Mark {
            kind,
            reason,
            incarnation,
            position: takeover.source_position,
            time_ns,
            epoch,
            height_min: 0,
        };
        if landed.at.incarnation != incarnation {
            land(open, &open.live, mark(MarkKind::Begin, Some(GapReason::Rollback))).await.map_err(failed)?;
        }
        rolled_back(context, open).await?;
        crate::failpoint::hit(crate::failpoint::PROMOTE_ROLLED);
        if takeover.source_consistent && open.live.view().landed.gap.is_some() {
            land(open, &open.live, mark(MarkKind::GapEnd, None)).await.map_err(failed)?;
        }
        catch_up(open, open.live.view().landed.height).await.map_err(failed)
    }

    /// The daemon ends: devices go, what was written is durable, the next start serves again.
    pub fn close_all(&self) {
        self.closing.send_replace(true);
        let _made = self.making.blocking_write();
        let names: Vec<String> = lock(&self.served).keys().cloned().collect();
        for name in names {
            if let Err(problem) = self.stop_serving(&name, true, "a device stays") {
                tracing::warn!(group = name, why = problem.why, "a device stays behind");
            }
        }
    }

    /// Takes back what nobody committed in time. To be called about once a second; never waits.
    pub fn look_at_deadlines<'m>(&self, metas: impl Iterator<Item = &'m GroupMeta>) {
        let pending = metas.filter_map(|meta| {
            let takeover = meta.takeover.as_ref().filter(|takeover| !takeover.committed)?;
            takeover.abort_at_ns.map(|at_ns| (meta.name.as_str(), takeover.incarnation.as_str(), at_ns))
        });
        lock(&self.deadlines).look(pending, wall_ns(), Instant::now());
    }

    /// For the status.
    pub fn status(&self, meta: Option<&GroupMeta>, views: &Views) -> Option<TakeoverStatus> {
        let meta = meta?;
        if meta.takeover.is_none() {
            return self.test_status(&meta.name, views);
        }
        let takeover = meta.takeover.as_ref()?;
        let missing = self.missing_why(&meta.name);
        let served = lock(&self.served);
        let whole = served.get(&meta.name).filter(|served| served.state == State::Whole);
        let devices = whole.map(|served| &served.devices[..]).unwrap_or_default();
        let rolling = served.get(&meta.name).is_some_and(|served| !served.rolled.load(Ordering::SeqCst));
        let name = &meta.name;
        let abort_at = takeover.abort_at_ns.filter(|_| !takeover.committed);
        let next = match (takeover.committed, abort_at) {
            _ if takeover.aborting => {
                format!(
                    "it is being undone; if that ended with an error, 'varve failover abort {name}' goes on with it"
                )
            }
            (true, _) => format!("'varve failback {name}' when it shall run at the source again"),
            (false, None) => {
                format!("'varve failover commit {name}' to stay, 'varve failover abort {name}' to go back")
            }
            (false, Some(at_ns)) => match lock(&self.deadlines).failed(name) {
                None => {
                    format!("'varve failover commit {name}' to stay; at {} it goes back by itself", show_time(at_ns))
                }
                Some(why) => format!(
                    "it was to go back at {} and did not ({why}): 'varve failover abort {name}' says more, 'varve failover \
                     commit {name}' to stay",
                    show_time(at_ns)
                ),
            },
        };
        Some(TakeoverStatus {
            since: takeover.since.clone(),
            point: show_time(takeover.time_ns),
            committed: takeover.committed,
            test: false,
            abort_at: abort_at.map(show_time),
            aborting: takeover.aborting,
            devices: devices.iter().map(|device| device.path().display().to_string()).collect(),
            failback: None,
            next: match missing {
                Some(why) => format!("its devices are not all there ({why}); it is tried again by itself; {next}"),
                None if rolling => format!("the replicas are being rolled back; {next}"),
                None => next,
            },
        })
    }
}

fn nothing() -> Takeover {
    Takeover {
        incarnation: String::new(),
        height: 0,
        time_ns: 0,
        rollback: false,
        before_height: 0,
        before_time_ns: 0,
        source_incarnation: String::new(),
        source_position: 0,
        source_consistent: false,
        source_epoch: 0,
        since: String::new(),
        committed: false,
        aborting: false,
        planned: false,
        abort_at_ns: None,
        overwritten: Vec::new(),
    }
}

fn not_taken_over(name: &str) -> Problem {
    let next = format!("'varve status {name}' shows what it does; 'varve failover {name}' takes it over");
    Problem::refused(format!("nothing of '{name}' to commit or abort"), "it is not taken over", next)
}

/// Whether the replicas need no rollback any more: the chronicle says so before anything of the stream is applied.
pub fn is_rolled(timeline: &Timeline, takeover: &Takeover) -> bool {
    let Some((to_height, _)) = takeover.target().1 else { return true };
    // Heights only rise: what was rolled back to the same point before this takeover stands below.
    timeline.chronicle().rollbacks().any(|(at, to)| to.0 == to_height && at.0 > takeover.before_height)
}

/// What the applier must do before it applies anything of the takeover's stream; `rolled` is told when it is done. To be
/// wished before the applier starts, or before the stream's begin is landed.
///
/// # Errors
/// If the point cannot be read any more.
pub fn wish(
    timeline: &Arc<Timeline>,
    takeover: &Takeover,
    landed: &StreamState,
    rolled: &Arc<AtomicBool>,
) -> Result<Option<RollbackWish>, HistoryError> {
    // An abort of what never began: there is nothing to undo.
    let never = takeover.aborting && landed.height <= takeover.before_height;
    let done = never || is_rolled(timeline, takeover);
    rolled.store(done, Ordering::SeqCst);
    let (incarnation, to) = takeover.target();
    let Some((height, time_ns)) = to.filter(|_| !done) else { return Ok(None) };
    let (pin, above) = (timeline.pin(height)?, takeover.before_height);
    let in_gap = takeover.aborting && !takeover.source_consistent;
    Ok(Some(RollbackWish { incarnation, above, pin, time_ns, in_gap, rolled: rolled.clone() }))
}

/// Waits until the applier has done what was wished of it last.
async fn rolled_back(context: &Context, open: &OpenGroup) -> Result<(), Problem> {
    open.queue.hurry();
    let begin = Instant::now();
    while !open.rolled.load(Ordering::SeqCst) {
        if let Some(failure) = open.live.failure() {
            return Err(context.failed(failure.text.clone()));
        }
        if begin.elapsed() > CATCH_UP_MAX {
            return Err(context.failed("the replicas are still being rolled back".to_owned()));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Runs what blocks.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Problem::failed("the receiver could not work on it", e.to_string(), "see the receiver's log"))?
}

/// Waits until the replicas have everything up to a height.
///
/// # Errors
/// Why they do not.
pub async fn catch_up(open: &OpenGroup, height: u64) -> Result<(), String> {
    open.queue.hurry();
    let timeline = open.timeline.clone();
    let there = tokio::task::spawn_blocking(move || timeline.wait_applied(height, CATCH_UP_MAX)).await;
    match (there, open.live.failure()) {
        (Ok(true), _) => Ok(()),
        (_, Some(failure)) => Err(failure.text.clone()),
        _ => Err("the replicas did not catch up with what is landed".to_owned()),
    }
}
