//! A protected group: its capture, its worker, and the handle by which the daemon reaches it.

mod compress;
mod cut;
mod gap;
mod kept;
#[cfg(test)]
mod played;
#[cfg(test)]
mod played_journal;
#[cfg(test)]
mod played_troubles;
mod regions;
mod session;
mod shared;
#[cfg(test)]
mod simulation;
mod source;
mod sync;
mod tape;
mod tracker;
mod verify;
mod worker;

pub use session::send_control;
pub use shared::GroupShared;
pub use worker::{Command, FRAME_BYTES};

use crate::clock;
use crate::link::LinkView;
use crate::misses::Misses;
use crate::quiesce::{Order, Shown};
use crate::seal::{Patience, Seal};
use crate::store::{Fence, GroupFile};
use crate::volume::Checked;
use source::Source as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use varve_bpf::{Capture, Group, Origin, VolumeSpec};
use varve_common::limits::SYNC_REGIONS_MAX;
use varve_common::problem::Problem;
use varve_common::record::RecordKind;
use varve_common::state::{GapReason, Link};
use varve_common::wire::messages::VolumeHello;
use varve_io::aligned::BufPool;
use varve_io::direct::DirectFile;

/// Commands that wait for a worker.
const COMMANDS_MAX: usize = 32;
/// How long it may take to tell the receiver of a gap before the group ends.
const GAP_LIMIT: Duration = Duration::from_secs(3);
/// Between two looks at whether it was told.
const GAP_LOOK: Duration = Duration::from_millis(20);
/// How long a group may take to end.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// The longest that a seal waits for writes that are under way.
const COMPLETE_LIMIT: Duration = Duration::from_secs(1);
const COMPLETE_POLL: Duration = Duration::from_millis(1);

/// What a group needs of the daemon.
pub struct Surroundings {
    /// The programs.
    pub capture: Arc<Capture>,
    /// The connection to the receiver.
    pub link: watch::Receiver<LinkView>,
    /// Buffers for frames.
    pub frames: BufPool,
    /// Buffers for regions.
    pub regions: BufPool,
    /// See [`worker::Worker::misses`].
    pub misses: Arc<Misses>,
    /// Size of the ring.
    pub ring_bytes: u32,
    /// See [`varve_common::config::AgentConfig::lagging_after`].
    pub lagging_after: Duration,
    /// Compress where it pays.
    pub compression: bool,
    /// Where journals lie; `None`: without.
    pub journal: Option<crate::journal::Settings>,
    /// The replicas are equal to the volumes, and the receiver's stream stands where a new ring begins.
    pub equal: bool,
    /// What the last stop left.
    pub seal: Option<Seal>,
    /// For looks at what it says.
    pub patience: Arc<Patience>,
    /// What is remembered of who may write.
    pub authority: (Option<Fence>, Option<Shown>),
    /// To the daemon.
    pub orders: mpsc::Sender<Order>,
}

/// A running group.
pub struct GroupHandle {
    /// What it is made of.
    pub file: GroupFile,
    /// Where its volumes lie.
    pub specs: Vec<VolumeSpec>,
    /// What can be seen of it.
    pub shared: Arc<GroupShared>,
    /// Where its ring stood when this worker began.
    pub began_at: u64,
    group: Arc<Group>,
    /// Closed when the worker has ended, however it did.
    commands: mpsc::Sender<Command>,
    stop: Stop,
}

/// Tells a worker to end; at the latest when nobody has the group any more: nobody could tell it then.
struct Stop(watch::Sender<bool>);

impl Stop {
    fn tell(&self) {
        self.0.send_replace(true);
    }

    fn is_told(&self) -> bool {
        *self.0.borrow()
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.tell();
    }
}

/// Captures volumes that grew in their new size. The gap is noted before: whoever comes after a kill must not take what
/// the new part's bitmap says for less than that.
fn follow_sizes(mut group: Group, specs: &[VolumeSpec]) -> Result<Group, String> {
    let Some(mut kept) = group.kept() else { return Ok(group) };
    let resized = group.troubles().resized;
    if !group.is_outgrown(specs) && resized == kept.troubles.resized {
        return Ok(group);
    }
    // Where the first write met the new size, if one has; a place before it does no harm.
    let producer = group.ring().producer();
    let position = group.take_first_drop().map_or(producer, |first| first.min(producer));
    kept.gap.begin(GapReason::VolumeChanged, position);
    kept.shown = kept.shown.or(Some(GapReason::VolumeChanged));
    kept.troubles.resized = resized;
    group.keep(&kept);
    if let Err(error) = group.grow(specs) {
        group.end();
        return Err(format!("a volume that grew cannot be captured in its new size: {error}"));
    }
    // Counters are what they were, and a little more where both entries of a volume saw a write.
    let position = kept.gap.parts().1;
    tracing::info!(position, "volumes that changed their size are captured in the new one");
    Ok(group)
}

/// Goes on with what an agent before left of the group, if it did and if that is proved to be this group; else begins
/// anew. Says which, in words.
fn begin_capture(
    name: &str,
    specs: &[VolumeSpec],
    synced_once: bool,
    surroundings: &Surroundings,
) -> Result<(Group, String), Problem> {
    let capture = &surroundings.capture;
    let understood = |group: Group| match group.kept() {
        Some(_) => Ok(group),
        None => {
            group.end();
            Err("the note about it is not understood".to_owned())
        }
    };
    let taken = capture.take_over_group(name, specs);
    let taken = taken.map(|taken| taken.and_then(understood).and_then(|group| follow_sizes(group, specs)));
    let origin = match taken {
        Some(Ok(group)) => {
            let capacity = group.ring().capacity();
            let waiting = group.ring().producer() - group.ring().consumer();
            tracing::info!(group = %name, waiting_bytes = waiting, "capture went on, its ring is taken over");
            if capacity != u64::from(surroundings.ring_bytes) {
                tracing::info!(group = %name, "its ring has {capacity} bytes; another size needs a new ring");
            }
            return Ok((group, capture.origin().to_string()));
        }
        Some(Err(why)) => {
            // What it saw is not lost: the whole volume is compared.
            tracing::warn!(group = %name, "what was pinned cannot be gone on with, a new ring begins: {why}");
            capture.give_up(name);
            format!("new, because what was pinned cannot be gone on with: {why}")
        }
        None if matches!(capture.origin(), Origin::TakenOver { .. }) => "new".to_owned(),
        // The file is from before: a boot takes all pins with it, and who wrote in between is not known.
        None if synced_once && *capture.origin() == Origin::New => {
            "new, because nothing was pinned: the host was booted, or capture was ended by hand".to_owned()
        }
        None => capture.origin().to_string(),
    };
    let group = capture.add_named_group(name, rand::random(), surroundings.ring_bytes, specs).map_err(|error| {
        let source = std::error::Error::source(&error).map_or(String::new(), |source| format!(": {source}"));
        Problem::failed(format!("group '{name}' cannot be captured"), format!("{error}{source}"), error.hint())
    })?;
    group.set_time_offset(clock::Offset::new(clock::wall_ns(), clock::boot_ns()).ns());
    if surroundings.equal {
        let misses = surroundings.misses.count();
        group.set_note(&kept::Kept::equal(&group, misses).encode());
    }
    Ok((group, origin))
}

impl GroupHandle {
    /// Begins to capture the group's volumes and starts its worker.
    pub fn start(
        file: GroupFile,
        volumes: &[Checked],
        surroundings: &Surroundings,
        on_consistent: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, Problem> {
        let name = file.name.clone();
        let cannot = |why: String| {
            Problem::failed(format!("group '{name}' cannot be captured"), why, "run 'varve doctor' and try again")
        };
        let files: Result<Vec<DirectFile>, _> =
            volumes.iter().map(|volume| DirectFile::open_read(&volume.path)).collect();
        let files = files.map_err(|error| cannot(error.chain()))?;
        let specs: Vec<_> = volumes.iter().map(|volume| volume.spec.clone()).collect();
        let misses_before = surroundings.misses.count();
        let (group, origin) = begin_capture(&name, &specs, file.synced_once, surroundings)?;
        let source: Arc<Group> = Arc::new(group);
        let paths: Vec<_> = volumes.iter().map(|volume| (volume.path.clone(), volume.spec.bytes)).collect();
        // Before anybody is told that capture runs: then volumes are mounted, and are not as they were any more.
        let seal = surroundings.seal.clone().filter(|_| source.kept().is_none());
        let sealed = seal.map(|seal| seal.holds_within(&paths, &surroundings.patience).map(|()| seal.end()));
        let shared = Arc::new(GroupShared::new(
            name.clone(),
            paths,
            source.incarnation(),
            source.clone(),
            surroundings.lagging_after,
            file.synced_once,
        ));
        {
            let mut facts = shared.facts();
            facts.pinned = source.is_pinned();
            facts.origin = origin;
            facts.epoch = file.epoch;
            (facts.fenced, facts.quiet) = surroundings.authority.clone();
        }
        let group = source.clone();
        let began_at = group.ring().consumer();
        let (to_worker, from_sync) = mpsc::channel(SYNC_REGIONS_MAX);
        let sync = sync::SyncThread::start(&name, source.clone(), files, surroundings.regions.clone(), to_worker)
            .map_err(|error| cannot(error.chain()))?;
        let (commands, command_queue) = mpsc::channel(COMMANDS_MAX);
        let (stop, stopped) = watch::channel(false);
        let hello = volumes.iter().zip(file.replicas.iter().map(Some).chain(std::iter::repeat(None)));
        let worker = worker::Worker {
            shared: shared.clone(),
            source,
            sync,
            from_sync,
            commands: command_queue,
            link: surroundings.link.clone(),
            stop: stopped,
            misses: surroundings.misses.clone(),
            frames: surroundings.frames.clone(),
            volumes: hello
                .map(|(volume, replica)| VolumeHello {
                    path: volume.path.clone(),
                    bytes: volume.spec.bytes,
                    replica: replica.cloned(),
                })
                .collect(),
            compression: surroundings.compression,
            misses_before,
            sealed,
            journal: surroundings.journal.clone(),
            orders: surroundings.orders.clone(),
            on_consistent: Box::new(on_consistent),
        };
        tokio::spawn(worker.run());
        Ok(Self { file, specs, shared, began_at, group, commands, stop: Stop(stop) })
    }

    /// Ends the group's worker, and its capture for good: nobody goes on with it.
    pub async fn end(&self) {
        self.stop().await;
        let group = self.group.clone();
        // It waits for the kernel. A panic there was reported by the hook.
        let _ = tokio::task::spawn_blocking(move || group.end()).await;
    }

    /// Ends the group's worker so that another one can go on with its capture, in this process; whether one can.
    pub async fn leave(&self) -> bool {
        self.stop().await && self.group.leave()
    }

    /// Whether writes from before its capture began have completed.
    pub fn settled(&self) -> bool {
        source::Source::settled(&*self.group)
    }

    /// Whether its volumes are still on the disks that they were on.
    pub fn disks_are_the_same(&self) -> bool {
        self.group.disks_are_the_same()
    }

    /// Ends the group's worker. Capture goes on if it is pinned. Whether all of it has ended. Who is interrupted while he waits
    /// may ask again.
    pub async fn stop(&self) -> bool {
        self.stop.tell();
        if tokio::time::timeout(STOP_LIMIT, self.commands.closed()).await.is_err() {
            tracing::error!(group = %self.file.name, "did not end within {} s", STOP_LIMIT.as_secs());
            return false;
        }
        true
    }

    /// Whether every write that was in flight has completed, as far as it was seen: what an unseen one has left is not known, and a
    /// boot would take its count with it. Each count was at zero once; it may be another volume's, too.
    fn all_complete(&self) -> bool {
        let until = Instant::now() + COMPLETE_LIMIT;
        self.group.volumes().iter().all(|track| {
            let mut left: Vec<u64> = track.counted_regions().collect();
            loop {
                left.retain(|region| track.in_flight(*region));
                if left.is_empty() || Instant::now() >= until {
                    break left.is_empty();
                }
                std::thread::sleep(COMPLETE_POLL);
            }
        })
    }

    /// After a stop: what proves at the next start that nobody wrote in between. It looks at the volumes, and may wait for them.
    pub fn seal(&self, misses: &Misses) -> Result<Seal, String> {
        let rest = *self.shared.rest();
        let rest = rest.ok_or("the receiver did not have everything, nor the journal")?;
        if !self.all_complete() {
            return Err("a write was not seen to complete".to_owned());
        }
        let seal = Seal::press(&self.shared.volumes, self.shared.incarnation, rest.end)?;
        // Who wrote while the volumes were looked at is in the stream, or among the events.
        let looked = matches!(misses.look(), Some(Ok(()))) && misses.count() == rest.misses;
        // A flush of another partition of its disk stands there, too, and changes nothing.
        let (ring, mut changed) = (self.group.ring(), false);
        let until = ring.producer();
        let reached = cut::walk(ring, rest.end, until, ring.capacity(), |cut::Met::Record { header, .. }| {
            changed |= RecordKind::from_number(header.kind).is_none_or(RecordKind::changes_data);
        });
        let still = reached == until && !changed && self.group.troubles() == rest.troubles;
        if looked && still { Ok(seal) } else { Err("something was written meanwhile".to_owned()) }
    }

    /// Whether somebody has told it to end.
    pub fn is_told_to_end(&self) -> bool {
        self.stop.is_told()
    }

    /// Whether the worker ended without being told.
    pub fn has_ended(&self) -> bool {
        !self.stop.is_told() && self.commands.is_closed()
    }

    /// Tells the worker; whether it is there.
    pub async fn tell(&self, command: Command) -> bool {
        self.commands.send(command).await.is_ok()
    }

    /// Sets a bookmark: position, time, durable.
    pub async fn bookmark(&self, name: String) -> Result<(u64, u64, bool), Problem> {
        self.ask(|answer| Command::Bookmark(name, answer)).await
    }

    /// Begins a verify: its number.
    pub async fn verify(&self, repair: bool) -> Result<u64, Problem> {
        self.ask(|answer| Command::Verify(repair, answer)).await
    }

    /// A volume is not what it was: tells the receiver, if there is one that listens, that from here on no point can be
    /// recovered.
    pub async fn volume_changed(&self) {
        let asked = tokio::time::timeout(GAP_LIMIT, self.ask(Command::VolumeChanged)).await;
        let Ok(Ok(position)) = asked else { return };
        let told = async {
            let streaming = || self.shared.facts().link == Link::Streaming;
            while streaming() && self.shared.durable.load(Ordering::Acquire) <= position {
                tokio::time::sleep(GAP_LOOK).await;
            }
        };
        if tokio::time::timeout(GAP_LIMIT, told).await.is_err() {
            tracing::warn!(group = %self.file.name, "the receiver was not told of the gap in time");
        }
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<Result<T, Problem>>) -> Command) -> Result<T, Problem> {
        let gone = || {
            Problem::failed(
                format!("group '{}' is ending", self.file.name),
                "its worker does not answer",
                "look at the log of varve-agent",
            )
        };
        let (answer, answered) = oneshot::channel();
        self.commands.send(command(answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_whose_group_nobody_has_any_more_is_told_to_end() {
        let (stop, stopped) = watch::channel(false);
        let stop = Stop(stop);
        assert!(!stop.is_told() && !*stopped.borrow());
        drop(stop);
        assert!(*stopped.borrow(), "it would run for ever");
    }
}
