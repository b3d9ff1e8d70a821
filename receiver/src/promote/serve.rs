//! The stream goes where it belongs, and the volumes become devices.

use super::backlog::{Backlog, ScanError, Wanted};
use super::disk::PromotedVolume;
use super::writer::{Start, StreamWriter};
use super::{Context, POLL, Promotions, Served, State, blocking, catch_up, lock};
use crate::clock::wall_ns;
use crate::failpoint;
use crate::group::meta::{Takeover, unhex};
use crate::group::open::OpenGroup;
use crate::group::registry::Slot;
use crate::group::stream::{StreamState, onward_ns};
use crate::landing::fetch::Fetcher;
use crate::rollback::land;
use crate::view::hints;
use crate::view::views::{export_problem, volumes_at};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use varve_common::control::{ExportKind, ViewVolume as VolumeReply};
use varve_common::format::{Mark, MarkKind};
use varve_common::problem::Problem;
use varve_common::state::GapReason;
use varve_export::device::{self, Attached, Way};
use varve_export::disk::Disk;
use varve_io::DirectFile;
use varve_timeline::timeline::Timeline;

impl Promotions {
    /// Puts the stream where it belongs and makes the devices.
    pub(super) async fn serve(
        &self,
        context: &Context,
        open: &OpenGroup,
        takeover: &Takeover,
        epoch: u64,
    ) -> Result<(Vec<VolumeReply>, Vec<String>), Problem> {
        let failed = |why: String| context.failed(why);
        // A device that is made behind the back of `close_all` would outlive the daemon that serves it, and hold it up.
        let _making = self.making.read().await;
        let mut closing = self.closing.subscribe();
        let ends = || failed("the daemon ends; it serves again when it starts".to_owned());
        if *closing.borrow() {
            return Err(ends());
        }
        // Who has the desk may wait long here; an abort that is written down meanwhile waits for it, and nobody may write any more.
        let being_undone = || context.meta().takeover.is_none_or(|now| now.aborting);
        let undone = || {
            let next = format!("'varve failover abort {}' goes on with that", context.slot.name);
            Problem::refused(format!("'{}' is not served", context.slot.name), "its takeover is being undone", next)
        };
        let incarnation = unhex(&takeover.incarnation);
        let rolled = open.rolled.clone();
        let mark = |kind, reason, position, time_ns| Mark {
            kind,
            reason,
            incarnation,
            position,
            time_ns,
            epoch,
            height_min: 0,
        };
        open.log.open_reserve();
        let mut landed = open.live.view().landed;
        let begun = landed.at.incarnation == incarnation;
        // A rollback that came after it, or is still to come, makes the replicas exactly what the log says.
        let lost = landed.gap == Some(GapReason::ReplicaChanged) && !(takeover.rollback && !(begun && open.was_rolled));
        if !begun {
            let time_ns = onward_ns(landed.at.time_ns, wall_ns());
            let reason = if lost { GapReason::ReplicaChanged } else { GapReason::Rollback };
            let begin = mark(MarkKind::Begin, Some(reason), 0, time_ns);
            land(open, &open.live, begin).await.map_err(failed)?;
            landed = open.live.view().landed;
        }
        if lost {
            tracing::error!(
                group = context.slot.name,
                "the disk lost writes to the devices of this takeover that were acknowledged, and part of them may be in the \
                 replica: check what is on the devices before it is used; no point from there on is good until the group is home, or \
                 'varve failover abort'"
            );
        }
        let gap_end = if landed.gap.is_none() || lost {
            None
        } else if takeover.rollback {
            Some(rolled.clone())
        } else {
            let end = mark(MarkKind::GapEnd, None, landed.at.position, landed.at.time_ns);
            land(open, &open.live, end).await.map_err(failed)?;
            landed = open.live.view().landed;
            None
        };
        open.queue.hurry();
        // From here on nobody lands anything until the writer does.
        let fetcher = Arc::new(Fetcher::new(open.log.clone()));
        let backlog = tokio::select! {
            read = read_backlog(open, &fetcher, &landed, takeover) => Arc::new(read.map_err(failed)?),
            _ = closing.wait_for(|closing| *closing) => return Err(ends()),
            () = until(being_undone) => return Err(undone()),
        };
        let (position, height, time_ns) = (landed.at.position, landed.height, landed.at.time_ns);
        let start = Start { incarnation, position, height, time_ns, epoch, gap_end };
        let (live, queue, timeline) = (open.live.clone(), open.queue.clone(), open.timeline.clone());
        let writer = StreamWriter::new(start, live, queue, timeline, fetcher);
        let (runs, batches, runtime) = (writer.clone(), open.batches.clone(), tokio::runtime::Handle::current());
        let thread = std::thread::Builder::new().name(format!("promoted-{}", context.slot.name));
        thread.spawn(move || runs.run(&batches, &runtime)).map_err(|e| failed(e.to_string()))?;
        let (slot, dir) = (context.slot.clone(), self.run_dir.clone());
        let under = Under {
            timeline: open.timeline.clone(),
            height: takeover.height,
            writer: writer.clone(),
            backlog,
            rolled: rolled.clone(),
        };
        let attached = blocking(move || attach(&slot, &under, &dir)).await;
        let (devices, volumes, hints) = attached.inspect_err(|_| writer.end())?;
        if being_undone() {
            blocking(move || {
                drop(devices);
                Ok(())
            })
            .await?;
            writer.end();
            links(&self.run_dir, &context.slot.name).for_each(|link| drop(std::fs::remove_file(link)));
            return Err(undone());
        }
        lock(&self.served).insert(context.slot.name.clone(), Served { devices, writer, rolled, state: State::Whole });
        Ok((volumes, hints))
    }
}

/// Returns once it is so.
async fn until(so: impl Fn() -> bool) {
    while !so() {
        tokio::time::sleep(POLL).await;
    }
}

/// What is landed and not in the replicas. If that is more than may be in memory, the applier goes on first.
async fn read_backlog(
    open: &OpenGroup,
    fetcher: &Arc<Fetcher>,
    landed: &StreamState,
    takeover: &Takeover,
) -> Result<Backlog, String> {
    let wanted = Wanted { point: takeover.height, own_above: takeover.before_height };
    let read = || {
        let (log, live, timeline) = (open.log.clone(), open.live.clone(), open.timeline.clone());
        let (landed, volumes, fetcher) = (*landed, open.volumes.clone(), fetcher.clone());
        tokio::task::spawn_blocking(move || {
            failpoint::hold(failpoint::BACKLOG_HELD, || live.failure().is_some());
            Backlog::read(&log, &fetcher, &live, &timeline, &landed, &volumes, wanted)
        })
    };
    let failed = |e: tokio::task::JoinError| e.to_string();
    match read().await.map_err(failed)? {
        Ok(backlog) => return Ok(backlog),
        Err(ScanError::Failed(why)) => return Err(why),
        Err(ScanError::TooMany) => {
            tracing::warn!("too much is landed and not applied: the devices wait for the replicas")
        }
    }
    catch_up(open, landed.height).await?;
    read().await.map_err(failed)?.map_err(|error| match error {
        ScanError::Failed(why) => why,
        ScanError::TooMany => "too much is landed and not applied".to_owned(),
    })
}

fn link(run_dir: &Path, name: &str, number: usize) -> PathBuf {
    run_dir.join(format!("{name}-{number}"))
}

/// All that are there.
pub(super) fn links(run_dir: &Path, name: &str) -> impl Iterator<Item = PathBuf> {
    let (dir, name) = (run_dir.to_path_buf(), name.to_owned());
    (0..varve_common::limits::VOLUMES_PER_GROUP_MAX)
        .map(move |number| link(&dir, &name, number))
        .filter(|link| link.is_symlink())
}

type Devices = (Vec<Attached>, Vec<VolumeReply>, Vec<String>);

/// What promoted volumes are made of.
struct Under {
    timeline: Arc<Timeline>,
    /// Of the point that was taken.
    height: u64,
    writer: Arc<StreamWriter>,
    backlog: Arc<Backlog>,
    rolled: Arc<AtomicBool>,
}

/// Makes the devices, and links to them that are the same after every start.
fn attach(slot: &Slot, under: &Under, run_dir: &Path) -> Result<Devices, Problem> {
    let failed =
        |e: varve_io::IoError| Problem::failed("the replica cannot be read", e.chain(), "see the receiver's log");
    let meta = slot.board().meta.clone();
    let Under { timeline, height, writer, backlog, rolled } = under;
    let points = volumes_at(slot, timeline, *height, None)?;
    let (mut devices, mut volumes, mut disks) = (Vec::new(), Vec::new(), Vec::new());
    let replicas = meta.map(|meta| meta.volumes).unwrap_or_default();
    for (number, ((path, point), volume)) in points.iter().zip(replicas).enumerate() {
        let replica = DirectFile::open_read(&volume.replica).map_err(failed)?;
        let (writer, backlog, timeline) = (writer.clone(), backlog.clone(), timeline.clone());
        let (point, rolled) = (point.clone(), rolled.clone());
        let disk = PromotedVolume::new(writer, backlog, timeline, point, replica, number as u16, rolled);
        let (bytes, disk) = (disk.len(), Arc::new(disk));
        disks.push((path.clone(), disk.clone()));
        // Not ublk: whoever writes to it and is still is not taken it away from.
        let attached = device::attach(disk, run_dir, &format!("promoted-{}-{number}", slot.name), false, Way::Loop);
        let attached = attached.map_err(|e| export_problem(&e))?;
        let link = link(run_dir, &slot.name, number);
        let _ = std::fs::remove_file(&link);
        if let Err(error) = std::os::unix::fs::symlink(attached.path(), &link) {
            tracing::warn!(link = %link.display(), %error, "no link to a device of the group");
        }
        let device = Some(attached.path().display().to_string());
        volumes.push(VolumeReply { path: path.clone(), bytes, device, uri: None });
        devices.push(attached);
    }
    let named: Vec<(String, &dyn Disk)> =
        disks.iter().map(|(path, disk)| (path.clone(), &**disk as &dyn Disk)).collect();
    let hints = hints::of(&named, true, ExportKind::Device);
    Ok((devices, volumes, hints))
}
