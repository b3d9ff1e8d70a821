//! One pass: the regions of a set are compared, what differs is sent. A window of regions is under way at once.

use super::blocks::Blocks;
use super::feed::{self, Region};
use super::stream::{Incoming, Talk};
use crate::limits::{HOME_REGIONS_AHEAD, HOME_REGIONS_MAX, HOME_STUCK_TIME_MAX};
use crate::view::views::volumes_at;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::mpsc;
use varve_common::limits::{DIGEST_BLOCK_BYTES, REGION_BYTES};
use varve_common::wire::FrameKind;
use varve_common::wire::messages::{FailbackTell, Probe};
use varve_timeline::timeline::{Pin, Timeline};

/// What a pass is for.
#[derive(Debug)]
pub struct Wish<'a> {
    /// Regions.
    pub set: Blocks,
    /// The point at which they are read.
    pub height: u64,
    /// Send what differs.
    pub write: bool,
    /// Digest blocks that changed here, to tell apart what differs without that.
    pub here: Option<&'a Blocks>,
}

/// What it found.
#[derive(Debug)]
pub struct Passed {
    /// The point, kept from expiring.
    pub pin: Pin,
    /// Bytes compared.
    pub compared_bytes: u64,
    /// Bytes that differed, in digest blocks.
    pub differing_bytes: u64,
    /// Those of them that did not change here.
    pub only_there_bytes: u64,
    /// Regions that differed.
    pub differing: Blocks,
    /// Digest blocks that differed.
    pub blocks: Blocks,
}

impl Talk {
    /// See the module's text.
    pub(super) async fn pass(&mut self, timeline: &Arc<Timeline>, wish: Wish<'_>) -> Result<Passed, String> {
        let total_bytes = wish.set.bytes();
        let sizes = self.sizes.clone();
        let (pin, feed_pin) = (timeline.pin(wish.height), timeline.pin(wish.height));
        let pin = pin.map_err(|e| e.to_string())?;
        let feed_pin = feed_pin.map_err(|e| e.to_string())?;
        let volumes = volumes_at(&self.slot, timeline, wish.height, None).map_err(|problem| problem.to_string())?;
        let volumes: Vec<_> = volumes.into_iter().map(|(_, volume)| volume).collect();
        let mut passed = Passed {
            pin,
            compared_bytes: 0,
            differing_bytes: 0,
            only_there_bytes: 0,
            differing: Blocks::none(&sizes, REGION_BYTES),
            blocks: Blocks::none(&sizes, DIGEST_BLOCK_BYTES),
        };
        self.passes += 1;
        let number = self.passes;
        self.show(|shown| (shown.pass, shown.done_bytes, shown.total_bytes) = (number, 0, total_bytes));
        self.tell(&FailbackTell::Pass { number, total_bytes }).await?;
        let (out, mut regions) = mpsc::channel(HOME_REGIONS_AHEAD);
        let set = wish.set;
        // It ends when nobody takes its regions any more.
        tokio::task::spawn_blocking(move || feed::run(&volumes, &set, &feed_pin, &out));
        let (mut under_way, mut fed) = (BTreeMap::<u64, Region>::new(), false);
        while !fed || !under_way.is_empty() {
            tokio::select! {
                incoming = self.incoming.recv() => match incoming {
                    Some(Incoming::Differs(reply)) => {
                        let region = under_way.get(&reply.id).ok_or("an answer to nothing that was asked")?;
                        let differs = reply.differs & all(region.digests.len());
                        note(&mut passed, region, differs, wish.here);
                        if differs != 0 && wish.write {
                            self.check_wanted()?;
                            let (body, bytes) = region.image(reply.id, differs);
                            self.send_image(body).await?;
                            self.sent_bytes += bytes;
                            self.show(|shown| shown.sent_bytes = self.sent_bytes);
                        } else {
                            self.done(&mut passed, under_way.remove(&reply.id));
                        }
                    }
                    Some(Incoming::Written(done)) => {
                        let region = under_way.remove(&done.id).ok_or("a write of nothing that was sent")?;
                        self.done(&mut passed, Some(region));
                    }
                    other => return Err(unexpected(other)),
                },
                () = tokio::time::sleep(HOME_STUCK_TIME_MAX) => {
                    return Err(format!("nothing went on for {} s", HOME_STUCK_TIME_MAX.as_secs()));
                }
                region = regions.recv(), if !fed && under_way.len() < HOME_REGIONS_MAX => match region {
                    Some(region) => {
                        let region = region?;
                        self.check_wanted()?;
                        self.ids += 1;
                        let probe = Probe {
                            id: self.ids,
                            volume: region.volume,
                            offset: region.extent.start,
                            length: region.extent.len() as u32,
                            digests: region.digests.clone(),
                        };
                        self.send(FrameKind::Probe, &probe).await?;
                        under_way.insert(self.ids, region);
                    }
                    None => fed = true,
                },
            }
        }
        if passed.compared_bytes != total_bytes {
            return Err("the regions were not all read".to_owned());
        }
        Ok(passed)
    }

    fn done(&self, passed: &mut Passed, region: Option<Region>) {
        let bytes = region.map_or(0, |region| region.extent.len());
        passed.compared_bytes += bytes;
        self.show(|shown| shown.done_bytes += bytes);
    }
}

fn all(blocks: usize) -> u16 {
    ((1u32 << blocks) - 1) as u16
}

fn note(passed: &mut Passed, region: &Region, differs: u16, here: Option<&Blocks>) {
    for number in region.blocks(differs) {
        let block = region.block(number);
        passed.differing_bytes += block.len();
        passed.differing.insert(region.volume, block.start, block.end);
        passed.blocks.insert(region.volume, block.start, block.end);
        if here.is_some_and(|here| !here.contains(region.volume, block.start)) {
            passed.only_there_bytes += block.len();
        }
    }
}

/// What came although nothing like it was waited for.
pub(super) fn unexpected(incoming: Option<Incoming>) -> String {
    match incoming {
        Some(Incoming::Gone(why)) => why,
        None => "the stream ended".to_owned(),
        Some(other) => format!("{other:?} was not waited for"),
    }
}
