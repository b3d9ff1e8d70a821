//! What the old source wrote after the split and never sent, kept as a group of its own before anything of it is overwritten.
//!
//! ```text
//! volumes there claimed → compared with the point of the split → that point copied into new replicas → point one
//!   → what differs is fetched and landed, in a gap → point two, the branch → the group exists → it is kept (durable)
//! ```
//!
//! The group is made in a directory that is nobody's and gets its name when it is whole: whatever ends the receiver before, the
//! next stream begins anew, and nothing is written there before `kept` stands in the group's file.

use super::blocks::Blocks;
use super::feed;
use super::pass::{Wish, unexpected};
use super::stream::{Incoming, Talk};
use crate::failpoint;
use crate::group::live::Counters;
use crate::group::meta::{Branch, GroupMeta, VolumeMeta};
use crate::group::open::{APPLIED_NAME, OpenGroup, Past};
use crate::group::replicas;
use crate::landing::batch::Batch;
use crate::limits::{ANSWER_TIMEOUT, HOME_STUCK_TIME_MAX, PROMOTED_FRAME_BYTES};
use crate::promote::catch_up;
use crate::rollback::land;
use crate::view::views::volumes_at;
use crate::view::volume::ViewVolume;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::time::timeout;
use varve_common::control::show_time;
use varve_common::format::{Mark, MarkKind};
use varve_common::geometry::Extent;
use varve_common::limits::{DIGEST_BLOCK_BYTES, REGION_BYTES};
use varve_common::record::{RecordHeader, RecordKind, append_record};
use varve_common::state::GapReason;
use varve_common::wire::Image;
use varve_common::wire::messages::FailbackTell;
use varve_io::aligned::AlignedBuf;
use varve_io::{DirectFile, crashsafe};
use varve_timeline::timeline::{Pin, Timeline};

/// The bookmark of the branch's first point.
pub const SPLIT: &str = "split";
/// That of its second.
pub const BRANCH: &str = "branch";
/// Blocks that are asked for at once: less than a frame of the landing log.
const FETCHES_MAX: usize = 7;

impl Talk {
    /// See the module's text. Nothing was written there yet, and nobody else can.
    pub(super) async fn keep_branch(&mut self, timeline: &Arc<Timeline>, name: &str) -> Result<(), String> {
        let gone = "the group does not run here any more";
        let meta = self.slot.board().meta.clone().ok_or(gone)?;
        let takeover = meta.takeover.clone().ok_or(gone)?;
        let (split, split_ns) = (takeover.before_height, takeover.before_time_ns);
        let of = Branch {
            of: meta.name.clone(),
            host: self.host.clone(),
            split: show_time(split_ns),
            takeover: takeover.incarnation.clone(),
            bytes: 0,
        };
        if self.registry.has_branch(name, &of) {
            // We were ended between its last step and ours.
            return self.branch_is_kept().await;
        }
        let place = self.registry.place_branch(name)?;
        self.show(|shown| shown.keeping = true);
        tracing::info!(group = meta.name, name, "what the old source has for itself is kept as a group");
        let pin = timeline.pin(split).map_err(|e| e.to_string())?;
        let all = Blocks::all(&self.sizes, REGION_BYTES);
        let passed = self.pass(timeline, Wish { set: all, height: split, write: false, here: None }).await?;
        let blocks = passed.blocks;
        let volumes = volumes_at(&self.slot, timeline, split, None).map_err(|problem| problem.to_string())?;
        let views: Vec<_> = volumes.into_iter().map(|(_, volume)| volume).collect();
        let replica = |number: usize| place.making.join(format!("replica-{number}.img"));
        let made = meta.volumes.iter().enumerate().map(|(number, volume)| {
            // Its history begins here: it has had one size.
            VolumeMeta::new(volume.path.clone(), volume.bytes, replica(number))
        });
        let mut branch = GroupMeta::new(name, &self.host, meta.epoch, split_ns, made.collect());
        branch.retention = meta.retention;
        branch.branch = Some(Branch { bytes: blocks.bytes(), ..of });
        let (dir, made) = (place.making.clone(), branch.clone());
        let based = tokio::task::spawn_blocking(move || base(&dir, &made, &views, &pin)).await;
        based.map_err(|e| e.to_string())??;
        let (dir, made, config) = (place.making.clone(), branch.clone(), self.registry.config().clone());
        let past = Past::Closed(self.registry.index_cache());
        let work = move || OpenGroup::open(&dir, &made, &config, &Arc::<Counters>::default(), past);
        let open = tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())?.map_err(|e| e.text)?;
        let landed = self.land_branch(&open, split_ns, branch.epoch, &blocks).await;
        let _ = tokio::task::spawn_blocking(move || open.close()).await;
        landed?;
        failpoint::hit(failpoint::BRANCH_WHOLE);
        self.registry.adopt_branch(place, branch).await?;
        failpoint::hit(failpoint::BRANCH_MADE);
        let bytes = blocks.bytes();
        tracing::warn!(group = meta.name, name, bytes, "what the old source has for itself is kept");
        self.branch_is_kept().await
    }

    async fn branch_is_kept(&mut self) -> Result<(), String> {
        let kept = |meta: &mut GroupMeta| {
            if let Some(failback) = &mut meta.failback {
                failback.kept = true;
            }
        };
        self.registry.change_meta(&self.slot, kept).await.map_err(|refused| refused.text)?;
        self.show(|shown| shown.keeping = false);
        Ok(())
    }

    /// Two points: the split, and the split with what differs.
    async fn land_branch(
        &mut self,
        open: &OpenGroup,
        split_ns: u64,
        epoch: u64,
        blocks: &Blocks,
    ) -> Result<(), String> {
        let incarnation = rand::random();
        let now_ns = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        let branch_ns = now_ns.max(split_ns + 1);
        let mark = |kind, reason, position, time_ns| Mark {
            kind,
            reason,
            incarnation,
            position,
            time_ns,
            epoch,
            height_min: 0,
        };
        land(open, &open.live, mark(MarkKind::Begin, Some(GapReason::InitialSync), 0, split_ns)).await?;
        land(open, &open.live, mark(MarkKind::GapEnd, None, 0, split_ns)).await?;
        let mut position = 0;
        let named = |name: &str, time_ns| {
            record(RecordKind::Bookmark, 0, Extent { start: 0, end: 0 }, time_ns, name.as_bytes())
        };
        land_records(open, incarnation, &mut position, &named(SPLIT, split_ns), split_ns).await?;
        land(open, &open.live, mark(MarkKind::GapBegin, Some(GapReason::Failback), position, branch_ns)).await?;
        let list: Vec<(u16, Extent)> = blocks.iter().collect();
        for some in list.chunks(FETCHES_MAX) {
            let mut frame = Vec::with_capacity(PROMOTED_FRAME_BYTES);
            for (number, body) in self.fetch(some).await?.into_iter().enumerate() {
                let (volume, block) = some[number];
                let image = Image::decode(&body).map_err(|e| e.to_string())?;
                let whole = image.volume == volume
                    && image.extents().count() == 1
                    && image.extents().all(|(start, length, _)| (start, length) == (block.start, block.len()));
                if !whole {
                    return Err("the agent sent another stretch than it was asked for".to_owned());
                }
                for (_, _, bytes) in image.extents() {
                    frame.extend(match bytes {
                        Some(bytes) => record(RecordKind::Write, volume, block, branch_ns, bytes),
                        None => record(RecordKind::WriteZeroes, volume, block, branch_ns, &[]),
                    });
                }
            }
            land_records(open, incarnation, &mut position, &frame, branch_ns).await?;
            let bytes = some.iter().map(|(_, block)| block.len()).sum::<u64>();
            self.show(|shown| shown.done_bytes = (shown.done_bytes + bytes).min(shown.total_bytes));
        }
        land(open, &open.live, mark(MarkKind::GapEnd, None, position, branch_ns)).await?;
        land_records(open, incarnation, &mut position, &named(BRANCH, branch_ns), branch_ns).await?;
        catch_up(open, open.live.view().landed.height).await
    }

    /// What the volumes there hold, in order.
    async fn fetch(&mut self, blocks: &[(u16, Extent)]) -> Result<Vec<Vec<u8>>, String> {
        self.fetches.store(blocks.len(), Ordering::Release);
        let first = self.ids + 1;
        for &(volume, block) in blocks {
            self.ids += 1;
            let (id, length) = (self.ids, block.len() as u32);
            self.tell(&FailbackTell::Fetch { id, volume, offset: block.start, length }).await?;
        }
        let mut bodies = Vec::with_capacity(blocks.len());
        while bodies.len() < blocks.len() {
            let incoming = timeout(HOME_STUCK_TIME_MAX, self.incoming.recv()).await;
            match incoming.map_err(|_| format!("nothing came for {} s", HOME_STUCK_TIME_MAX.as_secs()))? {
                Some(Incoming::Fetched(body)) => {
                    let id = Image::decode(&body).map_err(|e| e.to_string())?.id;
                    if id != first + bodies.len() as u64 {
                        return Err("the agent answered out of order".to_owned());
                    }
                    bodies.push(body);
                }
                other => return Err(unexpected(other)),
            }
        }
        Ok(bodies)
    }
}

fn record(kind: RecordKind, volume: u16, extent: Extent, time_ns: u64, payload: &[u8]) -> Vec<u8> {
    let header = RecordHeader {
        kind: kind as u8,
        flags: 0,
        volume: volume.into(),
        payload: (payload.len() as u32).into(),
        time_ns: time_ns.into(),
        offset: extent.start.into(),
        length: extent.len().into(),
    };
    let mut out = Vec::with_capacity(payload.len() + 64);
    append_record(&mut out, header, payload);
    out
}

async fn land_records(
    open: &OpenGroup,
    incarnation: [u8; 16],
    position: &mut u64,
    records: &[u8],
    time_ns: u64,
) -> Result<(), String> {
    let mut progress = open.live.subscribe();
    let before = progress.borrow_and_update().landed_batches;
    let batch = Batch::of_records(incarnation, *position, records, time_ns);
    open.batches.send(batch).map_err(|_| "the landing log is closed".to_owned())?;
    let landed = progress.wait_for(|now| now.landed_batches > before || now.failure.is_some());
    let landed = timeout(HOME_STUCK_TIME_MAX.max(ANSWER_TIMEOUT), landed).await;
    let landed = landed.map_err(|_| "the landing log hangs".to_owned())?.map_err(|e| e.to_string())?;
    if let Some(failure) = &landed.failure {
        return Err(failure.text.clone());
    }
    *position += records.len() as u64;
    Ok(())
}

/// The new replicas hold what the volumes held at the split.
fn base(dir: &Path, meta: &GroupMeta, views: &[Arc<ViewVolume>], _pin: &Pin) -> Result<(), String> {
    // What an attempt before left.
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(format!("{}: {e}", dir.display())),
        _ => {}
    }
    crashsafe::create_dir_all_durable(dir).map_err(|e| e.chain())?;
    let mut aligned = AlignedBuf::new(REGION_BYTES as usize);
    for (number, volume) in meta.volumes.iter().enumerate() {
        replicas::prepare(volume).map_err(|refused| refused.text)?;
        let file = DirectFile::open_rw(&volume.replica).map_err(|e| e.chain())?;
        for (_, extent) in Blocks::all(&[volume.bytes], REGION_BYTES).iter() {
            let region = feed::read(&views[number], number as u16, extent)?;
            let zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
            for (start, block) in (extent.start..)
                .step_by(DIGEST_BLOCK_BYTES as usize)
                .zip(region.bytes.chunks(DIGEST_BLOCK_BYTES as usize))
            {
                if !zero(block) {
                    aligned[..block.len()].copy_from_slice(block);
                    file.write_all_at(&aligned[..block.len()], start).map_err(|e| e.chain())?;
                }
            }
        }
        file.sync_data().map_err(|e| e.chain())?;
    }
    crate::apply::mark::AppliedFile::create(&dir.join(APPLIED_NAME), meta.id()).map_err(|e| e.chain())
}
