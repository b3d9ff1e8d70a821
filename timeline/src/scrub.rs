//! Reading everything again: which bytes are not what was written, and which points that takes away.

use crate::catalogue::LayerInfo;
use crate::chronicle::Event;
use crate::entry::Entry;
use crate::error::HistoryError;
use crate::layer::{Damage, Finding, LayerFile};
use crate::merge::EntrySource;
use crate::run::{RunKey, RunScan};
use crate::timeline::Timeline;
use std::ops::ControlFlow;

/// Damage, and the points from `from` to below `to` that need what is damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The layer; 0: it was found earlier, and which one is not known any more.
    pub layer: u32,
    /// The oldest height that cannot be read.
    pub from: u64,
    /// The first that can be read again.
    pub to: u64,
    /// What was found.
    pub what: String,
}

/// What a scrub found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Layers read.
    pub layers: u64,
    /// Bytes read.
    pub bytes: u64,
    /// From old to new.
    pub lost: Vec<Lost>,
    /// Damaged records beyond those that were traced: their whole layers count as lost.
    pub untraced: u64,
}

impl Timeline {
    /// Reads all layers and runs. `tell(bytes)` is called after each piece and may wait (the rate) or end it. What is lost is
    /// told to the chronicle, so that no such point is handed out. `traced_max` records are traced back exactly.
    ///
    /// # Errors
    /// If a disk fails in a way that is not damage.
    pub fn scrub(
        &self,
        traced_max: usize,
        mut tell: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Scrubbed, HistoryError> {
        let mut found = Scrubbed::default();
        let layers = self.layers();
        for (index, info) in layers.iter().enumerate() {
            let before = found.bytes;
            let previous = index.checked_sub(1).map(|index| layers[index].number);
            if let Some(missing) = previous.map(|number| number + 1).filter(|number| *number < info.number) {
                let (from, to) = (self.begin().unwrap_or(0), info.first_height);
                found.lost.push(Lost { layer: missing, from, to, what: "it is missing".to_owned() });
            }
            let stopped = self.scrub_layer(info, layers.get(index + 1), traced_max, &mut found, &mut tell)?;
            found.layers += 1;
            found.bytes = found.bytes.max(before + info.bytes);
            if stopped {
                break;
            }
        }
        let mut damaged_runs = Vec::new();
        for run in self.runs() {
            found.bytes += run.file_bytes();
            if let Err(error) = run.verify() {
                tracing::error!(%error, "an index is damaged: it is made again");
                damaged_runs.push(run.head().key);
            }
            if tell(run.file_bytes()).is_break() {
                break;
            }
        }
        for key in damaged_runs {
            self.replace_run(key)?;
        }
        let events: Vec<Event> = found
            .lost
            .iter()
            .filter(|lost| lost.from < lost.to)
            .map(|lost| Event::damaged(lost.from, lost.to, &lost.what))
            .collect();
        self.tell(&events)?;
        self.add_known(&mut found);
        Ok(found)
    }

    /// What was lost earlier and cannot be found any more: a layer that was begun anew, a chronicle's end.
    fn add_known(&self, found: &mut Scrubbed) {
        let begin = self.begin().unwrap_or(0);
        for damage in self.chronicle().damages().iter().filter(|damage| damage.to > begin) {
            let covered = |lost: &Lost| lost.from <= damage.from.max(begin) && damage.to <= lost.to;
            if !found.lost.iter().any(covered) {
                let (from, to, what) = (damage.from, damage.to, damage.what.clone());
                found.lost.push(Lost { layer: 0, from, to, what });
            }
        }
    }

    /// Whether it was ended.
    fn scrub_layer(
        &self,
        info: &LayerInfo,
        next: Option<&LayerInfo>,
        traced_max: usize,
        found: &mut Scrubbed,
        tell: &mut impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<bool, HistoryError> {
        // By its name: what is held open may have been removed, or be another file by now.
        let file = match self.layer_anew(info) {
            Ok(file) => file,
            Err(HistoryError::Io(error)) if !error.is_not_found() => return Err(error.into()),
            // It expired meanwhile: that is no damage.
            Err(_) if self.layer_info(info.number).is_none() => return Ok(false),
            Err(error) => {
                found.lost.push(self.whole_layer(info, error.to_string()));
                return Ok(false);
            }
        };
        let mut records: Vec<(Entry, String)> = Vec::new();
        let mut untraced = 0;
        let mut scan = |file: &LayerFile| {
            file.scan(|finding| match finding {
                Finding::Chunk(chunk) => tell(u64::from(chunk.bytes)),
                Finding::Record { entry, what } => {
                    match records.len() < traced_max {
                        true => records.push((entry, what)),
                        false => untraced += 1,
                    }
                    ControlFlow::Continue(())
                }
            })
        };
        let scanned = match scan(&file) {
            // It was the open one and was closed meanwhile: what was reserved behind its end is gone.
            Err(HistoryError::Io(error)) if info.open && error.kind() == std::io::ErrorKind::UnexpectedEof => {
                scan(&*self.layer(info.number)?)?
            }
            other => other?,
        };
        found.bytes += scanned.bytes;
        if untraced > 0 {
            found.untraced += untraced;
            found.lost.push(self.whole_layer(info, format!("{untraced} more records are damaged")));
        }
        for (entry, what) in records {
            let from = self.needed_from(&entry)?;
            found.lost.push(Lost { layer: info.number, from, to: entry.height, what });
        }
        for damage in &scanned.damage {
            found.lost.push(self.lost_chunks(info, damage));
        }
        // Whole chunks that are missing at the end are known by the layer that follows.
        if let Some(next) = next.filter(|next| !info.open && scanned.complete_to < next.first_height) {
            let what = "its end is missing".to_owned();
            found.lost.push(Lost { layer: info.number, from: scanned.complete_to, to: next.first_height, what });
        }
        Ok(scanned.stopped)
    }

    /// Every point that may need something of a layer.
    fn whole_layer(&self, info: &LayerInfo, what: String) -> Lost {
        Lost { layer: info.number, from: self.begin().unwrap_or(0), to: info.last_height, what }
    }

    /// Chunks whose records are not known: any older point may need them.
    fn lost_chunks(&self, info: &LayerInfo, damage: &Damage) -> Lost {
        let to = damage.whole_from.unwrap_or(info.last_height);
        let what = format!("{} bytes at {}: {} (case {})", damage.bytes, damage.offset, damage.why, damage.case);
        Lost { layer: info.number, from: self.begin().unwrap_or(0), to, what }
    }

    /// The oldest point that needs a record: the newest stamp below its own that covers all of it; an older point finds what
    /// it looks for in that one.
    fn needed_from(&self, damaged: &Entry) -> Result<u64, HistoryError> {
        let begin = self.begin().unwrap_or(0);
        let mut missing = damaged.mask();
        let mut older: Vec<Entry> = Vec::new();
        for info in self.layers().iter().rev().filter(|info| info.first_height < damaged.height) {
            older.clear();
            older.extend(
                self.entries_of_granule(info, damaged)?.into_iter().filter(|entry| entry.height < damaged.height),
            );
            older.sort_by_key(|entry| std::cmp::Reverse(entry.age()));
            for entry in &older {
                missing &= !entry.mask();
                if missing == 0 {
                    return Ok(entry.height);
                }
            }
        }
        Ok(begin)
    }

    /// All entries of one layer in the granule of `like`.
    fn entries_of_granule(&self, info: &LayerInfo, like: &Entry) -> Result<Vec<Entry>, HistoryError> {
        let granule = like.address.granule();
        let end = granule.plus(u64::from(crate::limits::GRANULE_SECTORS));
        let mut entries = Vec::new();
        let run = self.runs().into_iter().find(|run| run.head().key == RunKey::of_layer(info.number));
        match run {
            Some(run) => {
                let mut scan = RunScan::new(run, granule..end)?;
                loop {
                    let before = entries.len();
                    scan.next_batch(&mut entries)?;
                    if entries.len() == before {
                        break;
                    }
                }
            }
            None => entries.extend(self.open_entries(info.number)),
        }
        entries.retain(|entry| entry.address >= granule && entry.address < end);
        Ok(entries)
    }
}
