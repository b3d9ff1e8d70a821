//! Which layers and runs a group has, which of them answer for a point, what is to be merged and what may go. No I/O but
//! in [`load`].

use crate::cache::IndexCache;
use crate::error::HistoryError;
use crate::limits::{LAYERS_MAX, LEVELS_MAX};
use crate::run::{Run, RunHead, RunKey};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use varve_io::IoError;

/// A layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerInfo {
    /// Rises by one from layer to layer.
    pub number: u32,
    /// The height at its begin: its stamps are above.
    pub first_height: u64,
    /// Its highest stamp, or its begin if it has none.
    pub last_height: u64,
    /// Time of its first point, nanoseconds since 1970 at the source.
    pub first_time_ns: u64,
    /// Of its last one.
    pub last_time_ns: u64,
    /// Bytes of its file.
    pub bytes: u64,
    /// Records in it.
    pub records: u64,
    /// It is being appended to or closed: its index is in memory.
    pub open: bool,
}

impl LayerInfo {
    /// What a level-0 run says of its layer.
    pub fn from_run(head: &RunHead, entries: u64) -> Self {
        Self {
            number: head.key.first,
            first_height: head.first_height,
            last_height: head.last_height,
            first_time_ns: head.first_time_ns,
            last_time_ns: head.last_time_ns,
            bytes: head.layer_bytes,
            records: entries,
            open: false,
        }
    }
}

/// Why a point cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Its layers were dropped.
    #[error("history begins at height {begin}")]
    Expired {
        /// The oldest height that can be read.
        begin: u64,
    },
    /// A layer between the point and now is not there.
    #[error("layer {0} is missing")]
    MissingLayer(u32),
    /// A layer has no index.
    #[error("layer {0} has no index")]
    MissingRun(u32),
}

/// What [`Catalogue::drop_oldest`] took out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// The layer, whose file is to be removed.
    pub layer: LayerInfo,
    /// Runs that answer for no point any more, whose files are to be removed.
    pub runs: Vec<RunKey>,
}

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Catalogue {
    layers: BTreeMap<u32, LayerInfo>,
    runs: BTreeSet<RunKey>,
    /// See [`Catalogue::begin`].
    begin: u64,
}

impl Catalogue {
    /// Of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a layer, or tells what it has become.
    pub fn set_layer(&mut self, mut layer: LayerInfo) -> Result<(), HistoryError> {
        if self.layers.len() >= LAYERS_MAX && !self.layers.contains_key(&layer.number) {
            return Err(HistoryError::Limit { what: "a group's layers", limit: LAYERS_MAX as u64 });
        }
        // A layer may be begun in the middle of a change whose first pieces closed the one before: what its stamps begin with is
        // not complete then. Highest stamps never fall: `first_needed` rests on that.
        if let Some((_, before)) = self.layers.range(..layer.number).next_back() {
            layer.last_height = layer.last_height.max(before.last_height);
        }
        self.layers.insert(layer.number, layer);
        Ok(())
    }

    /// Adds a run whose file is whole. One of level 0 closes its layer.
    pub fn add_run(&mut self, key: RunKey) {
        self.runs.insert(key);
        if key.level == 0
            && let Some(layer) = self.layers.get_mut(&key.first)
        {
            layer.open = false;
        }
    }

    /// A run that turned out to be damaged: plans go without it, and if it is above level 0, it is due again.
    pub fn forget_run(&mut self, key: RunKey) {
        self.runs.remove(&key);
    }

    /// The oldest height that can be read: where the oldest layer begins, or, if a stamp went over into it from a layer
    /// that was dropped, that stamp.
    pub fn begin(&self) -> u64 {
        let oldest = self.layers.first_key_value().map_or(0, |(_, layer)| layer.first_height);
        oldest.max(self.begin)
    }

    /// Tells of layers that were dropped in an earlier life: the highest stamp in them.
    pub fn set_begin(&mut self, height: u64) {
        self.begin = self.begin.max(height);
    }

    /// All layers, the oldest first.
    pub fn layers(&self) -> impl DoubleEndedIterator<Item = &LayerInfo> + ExactSizeIterator {
        self.layers.values()
    }

    /// The layer with this number.
    pub fn layer(&self, number: u32) -> Option<&LayerInfo> {
        self.layers.get(&number)
    }

    /// All runs, by level.
    pub fn runs(&self) -> impl Iterator<Item = RunKey> {
        self.runs.iter().copied()
    }

    /// Whether there is such a run.
    pub fn has_run(&self, key: RunKey) -> bool {
        self.runs.contains(&key)
    }

    /// Bytes of all layers' files.
    pub fn layer_bytes(&self) -> u64 {
        self.layers.values().map(|layer| layer.bytes).sum()
    }

    /// The first layer with a stamp above `point`; `None` if nothing changed since. No layer before it is needed for
    /// `point`. (Layers are some ten thousand at most, and in order of height.)
    pub fn first_needed(&self, point: u64) -> Option<&LayerInfo> {
        let (first, _) = self.layers.first_key_value()?;
        let (last, _) = self.layers.last_key_value()?;
        // Numbers are nearly without holes, so that halving them finds it in a few steps.
        let (mut low, mut high) = (*first, last + 1);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.layers.range(middle..high).next() {
                Some((_, layer)) if layer.last_height <= point => low = layer.number + 1,
                _ => high = middle,
            }
        }
        self.layers.range(low..).next().map(|(_, layer)| layer)
    }

    /// The runs that have every record of closed layers after `point`, the oldest first: O(8 log8 n). The open layers'
    /// indexes in memory follow them. The runs are to be asked for heights above `point` only.
    pub fn plan(&self, point: u64) -> Result<Vec<RunKey>, PlanError> {
        let mut plan = Vec::new();
        if point < self.begin() {
            return Err(PlanError::Expired { begin: self.begin() });
        }
        let Some(start) = self.first_needed(point) else { return Ok(plan) };
        // The layer before it may be lost while it would hold stamps up to this one's begin.
        if point < start.first_height && !self.layers.contains_key(&start.number.wrapping_sub(1)) {
            return Err(PlanError::MissingLayer(start.number.wrapping_sub(1)));
        }
        let end = self.layers.last_key_value().map_or(0, |(number, _)| number + 1);
        let mut number = start.number;
        while number < end {
            let Some(layer) = self.layers.get(&number) else { return Err(PlanError::MissingLayer(number)) };
            if layer.open && !self.has_run(RunKey::of_layer(number)) {
                number += 1;
                continue;
            }
            // A run of several layers has only the first entry of each sector: of use only if all its heights count. No
            // later layer has stamps up to the point, as the highest stamps of layers never fall.
            let highest = if layer.first_height < point { 0 } else { LEVELS_MAX };
            let key = (0..=highest).rev().map(|level| RunKey { level, first: number });
            let mut key = key.filter(|key| key.is_possible() && self.has_run(*key));
            let key = key.next().ok_or(PlanError::MissingRun(number))?;
            plan.push(key);
            number = key.end();
        }
        Ok(plan)
    }

    /// Runs that can be made, lowest level first: all eight of the level below are there.
    pub fn due_merges(&self) -> Vec<RunKey> {
        let candidates = self.runs.iter().filter(|key| key.level < LEVELS_MAX && key.first == key.above().first);
        let whole = |key: &RunKey| key.below().all(|below| self.has_run(below));
        candidates.map(RunKey::above).filter(|key| !self.has_run(*key) && whole(key)).collect()
    }

    /// What a merged run says of its layers; `None` if one of them is missing.
    pub fn head_of(&self, group: [u8; 16], key: RunKey) -> Option<RunHead> {
        let layers: Option<Vec<_>> = (key.first..key.end()).map(|number| self.layers.get(&number)).collect();
        let layers = layers?;
        let last = layers.last()?;
        Some(RunHead {
            group,
            key,
            // One stamp may go over from layer to layer, even over one without records.
            first_height: layers.iter().map(|layer| layer.first_height).min()?,
            last_height: last.last_height,
            // The source's clock may have been set back from one layer to the next.
            first_time_ns: layers.iter().map(|layer| layer.first_time_ns).min()?,
            last_time_ns: layers.iter().map(|layer| layer.last_time_ns).max()?,
            layer_bytes: layers.iter().map(|layer| layer.bytes).sum(),
        })
    }

    /// Takes out the oldest layer, unless it is open. A run goes with its first layer: any point that it could answer
    /// for needs that layer too.
    pub fn drop_oldest(&mut self) -> Option<Dropped> {
        let (number, layer) = self.layers.first_key_value().map(|(number, layer)| (*number, *layer))?;
        if layer.open {
            return None;
        }
        self.layers.remove(&number);
        self.set_begin(layer.last_height);
        let gone = (0..=LEVELS_MAX).flat_map(|level| {
            let first = RunKey { level, first: 0 };
            let range = first..=RunKey { level, first: number };
            self.runs.range(range).copied().collect::<Vec<_>>()
        });
        let runs: Vec<RunKey> = gone.collect();
        for key in &runs {
            self.runs.remove(key);
        }
        Some(Dropped { layer, runs })
    }
}

/// What [`load`] found in the directory of runs.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Closed layers with whole level-0 runs, and the runs above them.
    pub catalogue: Catalogue,
    /// The runs of the catalogue.
    pub runs: BTreeMap<RunKey, Arc<Run>>,
    /// Layers without a whole level-0 run: closed ones are to be read and indexed again; the newest may be the open one.
    pub unindexed: Vec<u32>,
    /// Files that are not whole, and why. They are to be replaced (level 0: see `unindexed`; above: merged again).
    pub damaged: Vec<(PathBuf, HistoryError)>,
    /// Runs of layers that are not there, left by a drop that was cut off: to be removed.
    pub left_over: Vec<PathBuf>,
    /// Files that are not ours: left alone.
    pub unknown: Vec<PathBuf>,
}

/// Reads the footers of all runs in `dir`. `layers` are the numbers of the layer files that are there.
///
/// # Errors
/// Only if the directory cannot be read: one bad file takes away nothing but itself.
pub fn load(
    dir: &Path,
    group: [u8; 16],
    layers: &BTreeSet<u32>,
    cache: &Arc<IndexCache>,
) -> Result<Loaded, HistoryError> {
    let mut loaded = Loaded::default();
    for item in std::fs::read_dir(dir).map_err(|e| IoError::new("list", dir, e))? {
        let path = item.map_err(|e| IoError::new("list", dir, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(key) = RunKey::from_file_name(&name) else {
            loaded.unknown.push(path);
            continue;
        };
        if !layers.contains(&key.first) {
            loaded.left_over.push(path);
            continue;
        }
        match Run::open(&path, group, cache) {
            Ok(run) => drop(loaded.runs.insert(key, Arc::new(run))),
            Err(error) => loaded.damaged.push((path, error)),
        }
    }
    for number in layers {
        match loaded.runs.get(&RunKey::of_layer(*number)) {
            Some(run) => loaded.catalogue.set_layer(LayerInfo::from_run(run.head(), run.entries()))?,
            None => loaded.unindexed.push(*number),
        }
    }
    for key in loaded.runs.keys() {
        loaded.catalogue.add_run(*key);
    }
    Ok(loaded)
}

#[cfg(test)]
mod tests;
