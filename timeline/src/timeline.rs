//! What the applier writes and everybody else reads: one group's layers, runs and open index, together.
//!
//! A timeline lives as long as the daemon knows the group, also while its recorder is being opened anew after a failure:
//! views that are open go on with it.

use crate::cache::IndexCache;
use crate::catalogue::{Catalogue, LayerInfo, PlanError, load};
use crate::chronicle::{Chronicle, ChronicleFile, Event, StreamFacts};
use crate::entry::Entry;
use crate::error::HistoryError;
use crate::layer::{self, ChunkInfo, LayerFile};
use crate::limits::{LAYER_BYTES, LAYER_FILES_OPEN_MAX, RUNS_MENDED_MAX, VERSIONS};
use crate::open_index::OpenIndex;
use crate::resolve::{self, Part, Plan};
use crate::run::{Run, RunHead, RunKey, RunWriter};
use quick_cache::sync::Cache;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};
use varve_common::format::directory::{self, DirectoryRow};
use varve_common::limits::REGION_BYTES;
use varve_io::crashsafe;
use zerocopy::IntoBytes;

/// Directory of the layers in that of the history.
pub const LAYERS_NAME: &str = "layers";
/// The chronicle's file.
pub const CHRONICLE_NAME: &str = "chronicle";
/// Directory of the runs.
pub const RUNS_NAME: &str = "runs";

/// See the module's text.
#[derive(Debug)]
pub struct Timeline {
    pub(crate) dir: PathBuf,
    pub(crate) group: [u8; 16],
    cache: Arc<IndexCache>,
    state: RwLock<State>,
    /// By region, hashed: raised after a before-image can be found and before the replica changes.
    versions: Box<[AtomicU64]>,
    applied: Mutex<Applied>,
    /// How often the replicas were found to be behind where they had been: a group that failed applies again.
    setbacks: AtomicU64,
    advanced: Condvar,
    pins: Mutex<Pins>,
    files: Cache<u32, Arc<LayerFile>>,
    chronicle: Mutex<ChronicleFile>,
    layer_bytes: AtomicU64,
}

/// What is kept for somebody.
#[derive(Debug, Default)]
struct Pins {
    /// How often each height.
    heights: BTreeMap<u64, usize>,
    /// See [`Timeline::retire`].
    retired: bool,
}

#[derive(Debug, Default)]
struct State {
    catalogue: Catalogue,
    runs: BTreeMap<RunKey, Arc<Run>>,
    open: Option<OpenPart>,
}

/// The layer that is being appended to.
#[derive(Debug)]
pub(crate) struct OpenPart {
    pub(crate) reader: Arc<LayerFile>,
    pub(crate) index: Arc<OpenIndex>,
    pub(crate) chunks: Vec<ChunkInfo>,
}

/// How far the replicas are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Everything up to this height is in the replicas, and what it replaced is kept.
    pub height: u64,
    /// Time of the newest record or mark in it.
    pub time_ns: u64,
}

/// Sizes, for the status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Layers, the open one included.
    pub layers: u64,
    /// Bytes of their files.
    pub layer_bytes: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes of the runs.
    pub run_bytes: u64,
    /// Bytes of the chronicle.
    pub chronicle_bytes: u64,
}

impl Sizes {
    /// All bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.layer_bytes + self.run_bytes + self.chronicle_bytes
    }
}

/// Keeps a point from expiring.
#[derive(Debug)]
pub struct Pin {
    timeline: Arc<Timeline>,
    height: u64,
}

impl Pin {
    /// The point.
    pub fn height(&self) -> u64 {
        self.height
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let heights = &mut lock(&self.timeline.pins).heights;
        if let Some(count) = heights.get_mut(&self.height) {
            *count -= 1;
            if *count == 0 {
                heights.remove(&self.height);
            }
        }
    }
}

impl Timeline {
    /// Opens (or begins) the history in `dir`. Runs that are missing or damaged are told of in the log and made again.
    ///
    /// # Errors
    /// If the directories cannot be read or made.
    pub fn open(dir: &Path, group: [u8; 16], cache: Arc<IndexCache>) -> Result<Arc<Self>, HistoryError> {
        let (layers, runs) = (dir.join(LAYERS_NAME), dir.join(RUNS_NAME));
        crashsafe::create_dir_all_durable(&layers)?;
        crashsafe::create_dir_all_durable(&runs)?;
        crashsafe::remove_temporaries(&runs)?;
        let numbers: BTreeSet<u32> = layer::list(&layers)?.into_iter().collect();
        if let Some(number) = numbers.last() {
            forget_outgrown(&layers, &runs, group, *number, &cache)?;
        }
        let loaded = load(&runs, group, &numbers, &cache)?;
        for path in &loaded.left_over {
            crashsafe::remove_durable(path)?;
        }
        for (path, error) in &loaded.damaged {
            tracing::warn!(%error, "an index of the history is damaged; it is made again");
            // One that the disk cannot read now stays until there is another: the layer may be as unreadable.
            if !matches!(error, HistoryError::Io(_)) {
                crashsafe::remove_durable(path)?;
            }
        }
        let chronicle = open_chronicle(dir, group)?;
        let mut catalogue = loaded.catalogue;
        catalogue.set_begin(chronicle.chronicle().oldest().0);
        let state = State { catalogue, runs: loaded.runs, open: None };
        let timeline = Arc::new(Self {
            dir: dir.to_path_buf(),
            group,
            cache,
            state: RwLock::new(state),
            versions: (0..VERSIONS).map(|_| AtomicU64::new(0)).collect(),
            applied: Mutex::default(),
            setbacks: AtomicU64::new(0),
            advanced: Condvar::new(),
            pins: Mutex::default(),
            files: Cache::new(LAYER_FILES_OPEN_MAX),
            chronicle: Mutex::new(chronicle),
            layer_bytes: AtomicU64::new(LAYER_BYTES),
        });
        let newest = numbers.last().copied();
        let mut lost = Vec::new();
        for number in loaded.unindexed.into_iter().filter(|number| Some(*number) != newest) {
            match timeline.index_again(number) {
                Ok(()) => {}
                // A full disk, or one that does not answer: nothing is known to be lost, and it may pass.
                Err(error @ HistoryError::Io(_)) => return Err(error),
                Err(error) => {
                    tracing::error!(%error, layer = number, "a layer cannot be read: points that need it are lost");
                    lost.push(number);
                }
            }
        }
        timeline.tell_lost(&numbers, &lost)?;
        Ok(timeline)
    }

    /// Layers that are not there, or cannot be read: every older point may need them.
    fn tell_lost(&self, numbers: &BTreeSet<u32>, unreadable: &[u32]) -> Result<(), HistoryError> {
        let mut lost: BTreeSet<u32> = unreadable.iter().copied().collect();
        for (number, next) in numbers.iter().zip(numbers.iter().skip(1)) {
            // One is enough: what is before the next that is there is lost.
            lost.extend((number + 1 != *next).then_some(next - 1));
        }
        for number in lost {
            let next = numbers.range(number + 1..).next().copied();
            let Some(next) = next else { continue };
            let known = self.layer_info(next).map(|info| info.first_height);
            let begins = known.map_or_else(|| self.layer(next).map(|layer| layer.first_height()), Ok);
            let Ok(to) = begins else { continue };
            let what = format!("layer {number} is missing or cannot be read");
            tracing::error!(layer = number, "a layer is missing or cannot be read: points that need it are lost");
            let begin = self.begin().unwrap_or(0);
            match self.after_height(to.saturating_sub(1))? {
                // It was the oldest. When what it held was written nobody knows any more: the window begins with what is known.
                Some(first) if begin >= to => {
                    self.tell(&[Event::Expired { height: first.height, time_ns: first.time_ns }])?;
                }
                _ => self.tell_damage(begin, to, &what)?,
            }
        }
        Ok(())
    }

    /// Layers are closed when they have this many bytes instead of [`LAYER_BYTES`], if that is less.
    pub fn set_layer_bytes(&self, bytes: u64) {
        self.layer_bytes.store(bytes.min(LAYER_BYTES), Ordering::Relaxed);
    }

    pub(crate) fn layer_bytes(&self) -> u64 {
        self.layer_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn layers_dir(&self) -> PathBuf {
        self.dir.join(LAYERS_NAME)
    }

    pub(crate) fn runs_dir(&self) -> PathBuf {
        self.dir.join(RUNS_NAME)
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the level-0 run of a closed layer from the layer itself.
    fn index_again(&self, number: u32) -> Result<(), HistoryError> {
        let file = LayerFile::open(&self.layers_dir(), self.group, number)?;
        let found = file.load()?;
        if let Some(damage) = found.damage.first() {
            let what = format!("{} ({})", damage.why, damage.case);
            return Err(HistoryError::Damaged { path: file.file().path().to_path_buf(), offset: damage.offset, what });
        }
        let mut entries = found.entries;
        entries.sort_by_key(Entry::order);
        let closing = Closing {
            number,
            first_height: file.first_height(),
            complete_to: found.complete_to,
            first_time_ns: file.time_ns(),
            last_time_ns: found.last_time_ns,
            bytes: file.bytes(),
        };
        self.add_closed(&closing, &entries, &found.chunks)
    }

    /// Writes a layer's level-0 run; from then on the layer is closed.
    pub(crate) fn add_closed(
        &self,
        closing: &Closing,
        entries: &[Entry],
        chunks: &[ChunkInfo],
    ) -> Result<(), HistoryError> {
        let key = RunKey::of_layer(closing.number);
        let newest = entries.iter().map(|entry| entry.height).max().unwrap_or(0);
        let head = RunHead {
            group: self.group,
            key,
            first_height: closing.first_height,
            last_height: newest.max(closing.complete_to).max(closing.first_height),
            first_time_ns: closing.first_time_ns.min(closing.last_time_ns),
            last_time_ns: closing.last_time_ns,
            layer_bytes: closing.bytes,
        };
        let mut writer = RunWriter::create(&self.runs_dir(), head)?;
        entries.iter().try_for_each(|entry| writer.push(entry))?;
        let rows: Vec<DirectoryRow> = chunks.iter().map(directory_row).collect();
        writer.finish(rows.as_bytes())?;
        let run = Arc::new(Run::open(&self.runs_dir().join(key.file_name()), self.group, &self.cache)?);
        let mut state = self.write();
        state.catalogue.set_layer(LayerInfo::from_run(run.head(), run.entries()))?;
        state.catalogue.add_run(key);
        state.runs.insert(key, run);
        // In the same moment: a reader finds its records in the one or in the other.
        if state.open.as_ref().is_some_and(|open| open.reader.number() == closing.number) {
            state.open = None;
        }
        Ok(())
    }

    /// The open layer's entries in the order of a run.
    pub(crate) fn open_entries(&self, number: u32) -> Vec<Entry> {
        let state = self.read();
        let open = state.open.as_ref().filter(|open| open.reader.number() == number);
        let view = open.map(|open| open.index.view());
        drop(state);
        view.map(|view| view.sorted()).unwrap_or_default()
    }

    /// The number of the newest layer, and whether it has a run.
    pub(crate) fn newest_layer(&self) -> Result<Option<(u32, bool)>, HistoryError> {
        let Some(number) = layer::list(&self.layers_dir())?.last().copied() else { return Ok(None) };
        Ok(Some((number, self.read().catalogue.has_run(RunKey::of_layer(number)))))
    }

    /// What a closed layer says of itself.
    pub(crate) fn layer_info(&self, number: u32) -> Option<LayerInfo> {
        self.read().catalogue.layer(number).copied()
    }

    /// There is another open layer, or the same after it was opened anew.
    pub(crate) fn set_open(&self, open: OpenPart, info: LayerInfo) -> Result<(), HistoryError> {
        let mut state = self.write();
        state.catalogue.set_layer(info)?;
        state.open = Some(open);
        drop(state);
        // Whoever resolved something before must ask again.
        for version in &self.versions {
            version.fetch_add(1, Ordering::Release);
        }
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// A chunk was appended to the open layer and is durable: its records can be found from here on.
    pub(crate) fn publish(&self, entries: Vec<Entry>, chunk: ChunkInfo, info: LayerInfo) -> Result<(), HistoryError> {
        let regions: BTreeSet<(u16, u64)> =
            entries.iter().map(|entry| (entry.address.volume(), entry.address.byte() / REGION_BYTES)).collect();
        let mut state = self.write();
        state.catalogue.set_layer(info)?;
        if let Some(open) = &mut state.open {
            open.index.append(entries)?;
            open.chunks.push(chunk);
        }
        drop(state);
        for (volume, region) in regions {
            self.version_of(volume, region * REGION_BYTES).fetch_add(1, Ordering::Release);
        }
        // The replica is changed after this, by a system call: who sees that change sees the versions as well.
        fence(Ordering::SeqCst);
        Ok(())
    }

    fn version_of(&self, volume: u16, offset: u64) -> &AtomicU64 {
        let region = (offset / REGION_BYTES) ^ (u64::from(volume) << 40);
        let mixed = region.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        &self.versions[(mixed % VERSIONS as u64) as usize]
    }

    /// Changes when a record of the region (1 MiB) around `offset` is published, before the replica changes there. Other
    /// regions may share it.
    pub fn version(&self, volume: u16, offset: u64) -> u64 {
        fence(Ordering::SeqCst);
        self.version_of(volume, offset).load(Ordering::Acquire)
    }

    /// Everything that has records after `height`.
    ///
    /// # Errors
    /// If a layer that is needed is gone or cannot be read.
    pub fn plan(&self, height: u64) -> Result<Plan, HistoryError> {
        let state = self.read();
        let keys = state.catalogue.plan(height).map_err(|e| self.plan_failed(&e))?;
        // Without one of them older content would be passed over in silence.
        let missing = |key: &RunKey| HistoryError::Missing { path: self.runs_dir().join(key.file_name()) };
        let runs: Vec<_> = keys
            .iter()
            .map(|key| state.runs.get(key).cloned().ok_or_else(|| missing(key)))
            .collect::<Result<_, _>>()?;
        let runs = runs.into();
        let open = state.open.iter().map(|open| open.index.view()).collect();
        Ok(Plan { runs, open })
    }

    fn plan_failed(&self, error: &PlanError) -> HistoryError {
        let path = match error {
            PlanError::MissingLayer(number) => layer::path_of(&self.layers_dir(), *number),
            PlanError::MissingRun(number) => self.runs_dir().join(RunKey::of_layer(*number).file_name()),
            PlanError::Expired { begin } => return HistoryError::Expired { begin: *begin },
        };
        HistoryError::Missing { path }
    }

    /// What a stretch of a volume was at `height`: see [`resolve::resolve`]. Whole sectors, 1 MiB at most.
    ///
    /// # Errors
    /// As [`Timeline::plan`], and a damaged index.
    pub fn resolve(&self, volume: u16, start: u64, bytes: u64, height: u64) -> Result<Vec<Part>, HistoryError> {
        for _ in 0..RUNS_MENDED_MAX {
            let resolved = resolve::resolve(&self.plan(height)?, volume, start, bytes, height);
            match resolved {
                Err(HistoryError::Damaged { path, offset, what }) if self.mend(&path)? => {
                    tracing::warn!(path = %path.display(), offset, what, "an index of the history is damaged; it is made again");
                }
                other => return other,
            }
        }
        resolve::resolve(&self.plan(height)?, volume, start, bytes, height)
    }

    /// Makes a run again, if the file is one; whether it is.
    fn mend(&self, path: &Path) -> Result<bool, HistoryError> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let key = RunKey::from_file_name(name).filter(|_| path.parent() == Some(&self.runs_dir()));
        let Some(key) = key else { return Ok(false) };
        self.replace_run(key)?;
        Ok(true)
    }

    /// The file of a layer.
    ///
    /// # Errors
    /// If it is missing or not ours.
    pub fn layer(&self, number: u32) -> Result<Arc<LayerFile>, HistoryError> {
        if let Some(open) = self.read().open.as_ref().filter(|open| open.reader.number() == number) {
            return Ok(open.reader.clone());
        }
        self.files.get_or_insert_with(&number, || LayerFile::open(&self.layers_dir(), self.group, number).map(Arc::new))
    }

    /// As [`Timeline::layer`], from the directory.
    pub(crate) fn layer_anew(&self, info: &LayerInfo) -> Result<Arc<LayerFile>, HistoryError> {
        if info.open {
            return self.layer(info.number);
        }
        LayerFile::open(&self.layers_dir(), self.group, info.number).map(Arc::new)
    }

    /// What happened beside the data. The lock is short: readers clone what they need.
    pub fn chronicle(&self) -> Chronicle {
        lock(&self.chronicle).chronicle().clone()
    }

    /// The newest time that has expired.
    pub(crate) fn expired_ns(&self) -> u64 {
        lock(&self.chronicle).chronicle().oldest().1
    }

    /// Makes events durable.
    ///
    /// # Errors
    /// If the disk refuses. What was told before it did is read again from the disk before anything more is taken; whoever
    /// was refused says again what is still true.
    pub fn tell(&self, events: &[Event]) -> Result<(), HistoryError> {
        if events.is_empty() {
            return Ok(());
        }
        let mut chronicle = lock(&self.chronicle);
        if chronicle.is_broken() {
            *chronicle = open_chronicle(&self.dir, self.group)?;
        }
        chronicle.append(events).map(drop)
    }

    /// Makes known that the points from `from` to below `to` are lost, if there are any.
    pub(crate) fn tell_damage(&self, from: u64, to: u64, what: &str) -> Result<(), HistoryError> {
        if from < to { self.tell(&[Event::damaged(from, to, what)]) } else { Ok(()) }
    }

    /// Reads the chronicle again, and mends what damage took from its end.
    pub(crate) fn settle(&self, facts: &StreamFacts) -> Result<(), HistoryError> {
        let mut chronicle = lock(&self.chronicle);
        *chronicle = open_chronicle(&self.dir, self.group)?;
        // What is newer than the mark will be said again by the landing log.
        if chronicle.chronicle().newest_mark() <= facts.height && facts.incarnation != [0; 16] {
            for note in chronicle.settle(facts)? {
                tracing::warn!(note, "the chronicle was mended");
            }
        }
        Ok(())
    }

    /// The replicas are there.
    pub(crate) fn set_applied(&self, height: u64, time_ns: u64) {
        let mut applied = lock(&self.applied);
        if height < applied.height {
            self.setbacks.fetch_add(1, Ordering::SeqCst);
        }
        // Between the same two heights there may be an image and a mark of different clocks.
        let falls = varve_common::clock::is_setback(applied.time_ns, time_ns);
        *applied = Applied { height, time_ns: if falls { time_ns } else { time_ns.max(applied.time_ns) } };
        drop(applied);
        self.advanced.notify_all();
    }

    /// How far the replicas are.
    pub fn applied(&self) -> Applied {
        *lock(&self.applied)
    }

    /// Changes when the replicas fall behind where they were. Only what is read while they are at a point's height or above, and
    /// this stays the same, is what the point says: while changes are applied again, a block may be older than it was.
    pub fn setbacks(&self) -> u64 {
        self.setbacks.load(Ordering::SeqCst)
    }

    /// Waits until the replicas are at `height`; whether they are.
    pub fn wait_applied(&self, height: u64, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut applied = lock(&self.applied);
        while applied.height < height {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            applied = self.advanced.wait_timeout(applied, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Keeps what `height` needs.
    ///
    /// # Errors
    /// If it is gone already.
    pub fn pin(self: &Arc<Self>, height: u64) -> Result<Pin, HistoryError> {
        let state = self.read();
        let mut pins = lock(&self.pins);
        let begin = state.catalogue.begin().max(lock(&self.chronicle).chronicle().oldest().0);
        if height < begin {
            return Err(HistoryError::Expired { begin });
        }
        // What cannot be read is not promised.
        state.catalogue.plan(height).map_err(|e| self.plan_failed(&e))?;
        if pins.retired {
            return Err(HistoryError::Retired);
        }
        *pins.heights.entry(height).or_default() += 1;
        Ok(Pin { timeline: self.clone(), height })
    }

    /// If nothing is kept for anybody: from now on nothing will be ([`Timeline::revive`] undoes that), and what the replicas hold
    /// may change unseen. Gives whether it is so.
    #[must_use]
    pub fn retire(&self) -> bool {
        let mut pins = lock(&self.pins);
        pins.retired = pins.heights.is_empty();
        pins.retired
    }

    /// It is needed after all.
    pub fn revive(&self) {
        lock(&self.pins).retired = false;
    }

    /// The oldest point that is kept for somebody.
    pub(crate) fn oldest_pin(&self) -> Option<u64> {
        lock(&self.pins).heights.first_key_value().map(|(height, _)| *height)
    }

    /// The height at which history begins; `None`: there is none yet.
    pub fn begin(&self) -> Option<u64> {
        let state = self.read();
        let some = state.catalogue.layers().len() > 0;
        some.then(|| state.catalogue.begin())
    }

    /// All layers, the oldest first.
    pub fn layers(&self) -> Vec<LayerInfo> {
        self.read().catalogue.layers().copied().collect()
    }

    /// All runs.
    pub fn runs(&self) -> Vec<Arc<Run>> {
        self.read().runs.values().cloned().collect()
    }

    /// Sizes.
    pub fn sizes(&self) -> Sizes {
        let state = self.read();
        let mut sizes = Sizes::default();
        for layer in state.catalogue.layers() {
            sizes.layers += 1;
            sizes.layer_bytes += layer.bytes;
            sizes.records += layer.records;
        }
        sizes.chronicle_bytes = lock(&self.chronicle).bytes();
        sizes.run_bytes = state.runs.values().map(|run| run.file_bytes()).sum();
        sizes
    }

    /// The chunks of a layer, the oldest first.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn chunks(&self, number: u32) -> Result<Vec<ChunkInfo>, HistoryError> {
        let state = self.read();
        if let Some(open) = state.open.as_ref().filter(|open| open.reader.number() == number) {
            return Ok(open.chunks.clone());
        }
        let run = state.runs.get(&RunKey::of_layer(number)).cloned();
        drop(state);
        let Some(run) = run else { return Ok(self.layer(number)?.chunks()?.0) };
        let tail = run.tail();
        match tail.as_ref().ok().and_then(|tail| directory::decode(tail)) {
            Some(rows) => Ok(rows.iter().map(chunk_info).collect()),
            // The layer knows it, too; its index is made again.
            None => {
                tracing::warn!(layer = number, "an index of the history is damaged; it is made again");
                self.index_again(number)?;
                Ok(self.layer(number)?.chunks()?.0)
            }
        }
    }

    /// Makes one run of the next level, if one is due; whether it did. `go_on` is asked now and then. A lower one that is
    /// damaged is made again first.
    ///
    /// # Errors
    /// If a run cannot be read or written: the lower ones go on to answer.
    pub fn merge_one(&self, mut go_on: impl FnMut() -> bool) -> Result<bool, HistoryError> {
        for _ in 0..RUNS_MENDED_MAX {
            match self.merge_next(&mut go_on) {
                Err(HistoryError::Damaged { path, offset, what }) if self.mend(&path)? => {
                    tracing::warn!(path = %path.display(), offset, what, "an index of the history is damaged; it is made again");
                }
                other => return other,
            }
        }
        self.merge_next(&mut go_on)
    }

    fn merge_next(&self, go_on: &mut dyn FnMut() -> bool) -> Result<bool, HistoryError> {
        let state = self.read();
        let Some(key) = state.catalogue.due_merges().first().copied() else { return Ok(false) };
        let Some(head) = state.catalogue.head_of(self.group, key) else { return Ok(false) };
        let below: Option<Vec<Arc<Run>>> = key.below().map(|key| state.runs.get(&key).cloned()).collect();
        drop(state);
        let Some(below) = below else { return Ok(false) };
        let mut writer = RunWriter::create(&self.runs_dir(), head)?;
        if !crate::merge::merge(crate::merge::run_inputs(&below)?, &mut writer, go_on)? {
            return Ok(false);
        }
        writer.finish(&[])?;
        let path = self.runs_dir().join(key.file_name());
        let run = Arc::new(Run::open(&path, self.group, &self.cache)?);
        let mut state = self.write();
        // Its layers may have expired meanwhile.
        if state.catalogue.head_of(self.group, key).is_none() {
            drop(state);
            crashsafe::remove_durable(&path)?;
            return Ok(true);
        }
        state.catalogue.add_run(key);
        state.runs.insert(key, run);
        Ok(true)
    }

    /// Makes a damaged run again: level 0 from its layer, others by a merge that is then due.
    pub(crate) fn replace_run(&self, key: RunKey) -> Result<(), HistoryError> {
        if key.level == 0 {
            return self.index_again(key.first);
        }
        let mut state = self.write();
        state.catalogue.forget_run(key);
        let run = state.runs.remove(&key);
        drop(state);
        run.map_or(Ok(()), |run| Ok(crashsafe::remove_durable(run.path())?))
    }

    /// The layer that may go next; `kept`: the oldest point that an operator keeps. `None`: there is none, or somebody
    /// needs it.
    pub fn droppable(&self, kept: Option<u64>) -> Option<LayerInfo> {
        let state = self.read();
        // The newest stays: it says how far history is complete, and what number comes next.
        let oldest = state.catalogue.layers().next().copied().filter(|_| state.catalogue.layers().len() > 1)?;
        let pinned = self.oldest_pin().into_iter().chain(kept).min();
        // A point at the layer's last height does not need it.
        let needed = pinned.is_some_and(|pinned| pinned < oldest.last_height);
        (!needed && !oldest.open).then_some(oldest)
    }

    /// Takes the oldest layer out, if it may go. It was told ([`Event::Expired`]) before: nobody can ask for its points any
    /// more. Its files are gone on return.
    ///
    /// # Errors
    /// If a file cannot be removed: the layer is out of the timeline nevertheless.
    pub fn drop_oldest(&self, kept: Option<u64>) -> Result<Option<LayerInfo>, HistoryError> {
        let Some(oldest) = self.droppable(kept) else { return Ok(None) };
        let mut state = self.write();
        let Some(dropped) = state.catalogue.drop_oldest() else { return Ok(None) };
        let runs: Vec<Arc<Run>> = dropped.runs.iter().filter_map(|key| state.runs.remove(key)).collect();
        drop(state);
        self.files.remove(&oldest.number);
        // The layer first: its runs without it are removed at the next start, it without them would be read again.
        crashsafe::remove_durable(layer::path_of(&self.layers_dir(), oldest.number))?;
        runs.iter().try_for_each(|run| crashsafe::remove_durable(run.path()))?;
        Ok(Some(oldest))
    }
}

/// Removes the run of the newest layer if the layer has grown since: its closing failed after the run had its name, so more
/// was appended, and what the run says of the layer is not all of it.
fn forget_outgrown(
    layers: &Path,
    runs: &Path,
    group: [u8; 16],
    number: u32,
    cache: &Arc<IndexCache>,
) -> Result<(), HistoryError> {
    let path = runs.join(RunKey::of_layer(number).file_name());
    let layer = layer::path_of(layers, number);
    // One that cannot be read is looked at later, and so is the layer.
    let Ok(run) = Run::open(&path, group, cache) else { return Ok(()) };
    if !std::fs::metadata(&layer).is_ok_and(|layer| layer.len() > run.head().layer_bytes) {
        return Ok(());
    }
    tracing::warn!(layer = number, "the newest layer is longer than its index says: it is still open");
    Ok(crashsafe::remove_durable(&path)?)
}

fn open_chronicle(dir: &Path, group: [u8; 16]) -> Result<ChronicleFile, HistoryError> {
    let path = dir.join(CHRONICLE_NAME);
    let (file, notes) = match ChronicleFile::open(&path, group) {
        Err(error @ HistoryError::Damaged { .. }) => {
            tracing::error!(%error, "the chronicle cannot be used and is put aside: old points cannot be named any more");
            (ChronicleFile::start_over(&path, group)?, Vec::new())
        }
        other => other?,
    };
    for note in notes {
        tracing::warn!(note, path = %path.display(), "the chronicle was damaged");
    }
    Ok(file)
}

/// A layer that is being closed.
pub(crate) struct Closing {
    pub(crate) number: u32,
    pub(crate) first_height: u64,
    pub(crate) complete_to: u64,
    pub(crate) first_time_ns: u64,
    pub(crate) last_time_ns: u64,
    pub(crate) bytes: u64,
}

fn directory_row(chunk: &ChunkInfo) -> DirectoryRow {
    DirectoryRow {
        offset: chunk.offset.into(),
        first_height: chunk.first_height.into(),
        complete_to: chunk.complete_to.into(),
        first_time_ns: chunk.first_time_ns.into(),
        last_time_ns: chunk.last_time_ns.into(),
        bytes: chunk.bytes.into(),
        records: chunk.records.into(),
        points: chunk.points.into(),
        reserved: 0.into(),
    }
}

fn chunk_info(row: &DirectoryRow) -> ChunkInfo {
    ChunkInfo {
        offset: row.offset.get(),
        bytes: row.bytes.get(),
        first_height: row.first_height.get(),
        complete_to: row.complete_to.get(),
        first_time_ns: row.first_time_ns.get(),
        last_time_ns: row.last_time_ns.get(),
        records: row.records.get(),
        points: row.points.get(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
