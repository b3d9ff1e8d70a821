//! The one writer of a timeline: owned by the applier.

use crate::catalogue::LayerInfo;
use crate::chronicle::{Event, StreamFacts};
use crate::entry::{Address, Entry};
use crate::error::HistoryError;
use crate::layer::{Before, Chunk, ChunkInfo, OpenLayer, Recovered};
use crate::limits::{CHUNK_POINTS_MAX, GRANULE_SECTORS, LAYER_AGE_MAX, LEAP_NS_MIN};
use crate::open_index::OpenIndex;
use crate::run::RunKey;
use crate::timeline::{Closing, OpenPart, Timeline};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use varve_common::clock::is_setback;
use varve_common::control::show_time;
use varve_io::{AlignedBuf, IoError};

/// Collects before-images and makes them durable. Nothing of a commit is findable before it is durable, and on return of
/// [`Recorder::commit`] all of it is both; after [`Recorder::commit_behind`], on return of whatever is called next but
/// [`Recorder::push`].
#[derive(Debug)]
pub struct Recorder {
    timeline: Arc<Timeline>,
    layer: Option<Current>,
    chunk: Option<Chunk>,
    /// Points that no chunk has yet: (height, time).
    points: Vec<(u64, u64)>,
    /// Of an append that is on its way.
    behind: Option<Behind>,
    /// Memory for the next one.
    spare: Option<AlignedBuf>,
    /// All changes of the stream up to here have their before-images in a layer.
    complete_to: u64,
    /// Height of the newest record, and the stream's time: also of the marks behind it.
    newest_point: (u64, u64),
    /// The latest time that the source's clock has shown, as far as there are layers of it.
    highest_ns: u64,
    /// When the next layer begins: where the one before ended, unless the clock was set in between.
    begins_ns: Option<u64>,
    /// When, by the clock here, the newest point or mark came.
    came: SystemTime,
    next_number: u32,
}

/// What an append brings when it is durable.
#[derive(Debug)]
struct Behind {
    info: ChunkInfo,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Current {
    layer: OpenLayer,
    /// Its highest stamp.
    last_height: u64,
    first_height: u64,
    first_time_ns: u64,
    begun: Instant,
}

impl Recorder {
    /// Goes on where the newest layer ends. `facts`: what the applied mark says; before there is a layer, history begins
    /// there. `history`: the layers were complete to this height when the mark was written; if they are not any more, the
    /// points that need what is lost are told to be, and a new layer is begun. `landed`: the end of the landing log. The
    /// replicas may hold anything up to there, and what that replaced may be in what is lost; no point before it is then good.
    ///
    /// # Errors
    /// If the newest layer or the chronicle cannot be read.
    pub fn open(timeline: Arc<Timeline>, facts: &StreamFacts, history: u64, landed: u64) -> Result<Self, HistoryError> {
        timeline.settle(facts)?;
        // A name that was given when the directory could not be synced, or by a life that was killed, counts from here on.
        varve_io::crashsafe::fsync_dir(timeline.layers_dir())?;
        let reached = history.max(landed);
        let mut recorder = Self {
            timeline,
            layer: None,
            chunk: None,
            points: Vec::new(),
            behind: None,
            spare: None,
            complete_to: facts.height,
            newest_point: (0, 0),
            highest_ns: 0,
            begins_ns: None,
            came: SystemTime::now(),
            next_number: 1,
        };
        let newest = recorder.timeline.newest_layer()?;
        if let Some(written_ns) = newest.and_then(|(number, _)| recorder.timeline.written_ns(number)) {
            recorder.came = SystemTime::UNIX_EPOCH + Duration::from_nanos(written_ns);
        }
        match newest {
            None => recorder.begin_anew(history, reached)?,
            Some((number, true)) => {
                recorder.next_number = number + 1;
                if let Some(info) = recorder.timeline.layer_info(number) {
                    recorder.complete_to = match recorder.timeline.chunks(number) {
                        Ok(chunks) => chunks.last().map_or(info.first_height, |chunk| chunk.complete_to),
                        Err(error @ (HistoryError::Damaged { .. } | HistoryError::Format { .. })) => {
                            recorder.lost_closed(number, history.max(info.last_height), reached, &error)?
                        }
                        Err(other) => return Err(other),
                    };
                    recorder.newest_point = (recorder.complete_to, info.last_time_ns);
                    recorder.begins_ns = Some(info.last_time_ns);
                }
            }
            Some((number, false)) => {
                match recorder.open_layer(number, reached).and_then(|()| recorder.close_if_full(number, reached)) {
                    Err(error @ (HistoryError::Damaged { .. } | HistoryError::Format { .. })) => {
                        recorder.put_aside(number, history, reached, &error)?;
                    }
                    other => other?,
                }
            }
        }
        if recorder.next_number > 1 && recorder.complete_to < history {
            recorder.lost_end(history, reached)?;
        }
        let ends = recorder.timeline.layers();
        recorder.highest_ns = ends.iter().map(|layer| layer.last_time_ns).max().unwrap_or(0);
        if facts.height > recorder.newest_point.0 {
            // Points that were only in memory; a leap was seen when it came.
            if is_setback(recorder.newest_point.1, facts.time_ns) {
                recorder.begin_stretch(facts.time_ns)?;
            }
            recorder.newest_point.1 = recorder.newest_point.1.max(facts.time_ns);
        }
        recorder.timeline.set_applied(facts.height, facts.time_ns);
        Ok(recorder)
    }

    fn open_layer(&mut self, number: u32, reached: u64) -> Result<(), HistoryError> {
        let (layer, found) = OpenLayer::open(&self.timeline.layers_dir(), self.timeline.group, number)?;
        // Its closing may have failed after the run had its name. Found by the next start, the run would hide what is appended.
        let run = self.timeline.runs_dir().join(RunKey::of_layer(number).file_name());
        varve_io::crashsafe::remove_durable(run)?;
        if found.torn {
            tracing::info!(
                layer = number,
                "the newest layer ends with an append that was cut off: it was not used yet"
            );
        }
        for damage in &found.damage {
            let (offset, bytes) = (damage.offset, damage.bytes);
            tracing::error!(layer = number, offset, bytes, why = damage.why, "the newest layer is damaged");
            let from = self.timeline.begin().unwrap_or(0);
            let to = damage.whole_from.unwrap_or(found.complete_to.max(reached));
            let what = format!("layer {number} is damaged at byte {offset}: {}", damage.why);
            self.timeline.tell_damage(from, to, &what)?;
        }
        self.next_number = number + 1;
        self.complete_to = found.complete_to;
        let newest = self.newest_point_of(&layer, &found)?;
        self.newest_point = newest;
        let first_height = layer.reader().first_height();
        let last_height = found.entries.iter().map(|entry| entry.height).fold(found.complete_to, u64::max);
        let index = OpenIndex::new();
        let reader = Arc::new(layer.reader());
        let first_time_ns = reader.time_ns();
        index.append(found.entries)?;
        let current = Current { layer, last_height, first_height, first_time_ns, begun: Instant::now() };
        let part = OpenPart { reader, index: Arc::new(index), chunks: found.chunks };
        self.timeline.set_open(part, current.info())?;
        self.layer = Some(current);
        Ok(())
    }

    /// The newest layer may be full already: the daemon ended before its run was there. On a full disk it stays open, its index
    /// in memory: a group that does not open lets nothing expire.
    fn close_if_full(&mut self, number: u32, reached: u64) -> Result<(), HistoryError> {
        if !self.layer.as_ref().is_some_and(|current| current.is_full(&self.timeline)) {
            return Ok(());
        }
        match self.close_layer() {
            Err(HistoryError::Io(error)) if error.is_no_space() => {
                tracing::error!(%error, layer = number, "no room for the newest layer's index: it is closed with the next change");
                self.open_layer(number, reached)
            }
            other => other,
        }
    }

    /// There is no layer. Either nothing was ever replaced: then history begins at the first point; or the layers are gone.
    fn begin_anew(&mut self, history: u64, reached: u64) -> Result<(), HistoryError> {
        let Some(first) = self.timeline.chronicle().point_at_or_above(0) else { return Ok(()) };
        if history <= first {
            self.complete_to = first.min(self.complete_to);
            return Ok(());
        }
        tracing::error!(history, "all layers are gone: the points that need them are lost");
        self.complete_to = history;
        self.timeline.tell(&[Event::damaged(0, reached, "all layers are gone")])
    }

    /// The newest layer cannot be read at all. It stays beside the others under another name.
    fn put_aside(&mut self, number: u32, history: u64, reached: u64, error: &HistoryError) -> Result<(), HistoryError> {
        let path = crate::layer::path_of(&self.timeline.layers_dir(), number);
        tracing::error!(%error, layer = number, "the newest layer cannot be read and is put aside: points are lost");
        let mut aside = path.clone().into_os_string();
        aside.push(".damaged");
        std::fs::rename(&path, &aside).map_err(|e| varve_io::IoError::new("put aside", &path, e))?;
        varve_io::crashsafe::fsync_dir(self.timeline.layers_dir())?;
        self.next_number = number + 1;
        let last = self.timeline.layers().last().map_or(0, |layer| layer.last_height);
        self.complete_to = history.max(last);
        let what = format!("layer {number} cannot be read");
        let to = self.complete_to.max(reached);
        self.timeline.tell(&[Event::damaged(self.timeline.begin().unwrap_or(0), to, &what)])
    }

    /// The newest layer was closed, and neither it nor its index can be read. It stays where it is: no point that is good
    /// needs it. Gives how far the history is complete nevertheless.
    fn lost_closed(&self, number: u32, end: u64, reached: u64, error: &HistoryError) -> Result<u64, HistoryError> {
        tracing::error!(%error, layer = number, "the newest closed layer and its index cannot be read: points are lost");
        let what = format!("layer {number} and its index cannot be read");
        self.timeline.tell_damage(self.timeline.begin().unwrap_or(0), end.max(reached), &what)?;
        Ok(end)
    }

    /// The newest layer does not reach as far as it did: what was torn off looks like an append that was never finished, but
    /// the replicas were changed after it.
    fn lost_end(&mut self, history: u64, reached: u64) -> Result<(), HistoryError> {
        let (found, from) = (self.complete_to, self.timeline.begin().unwrap_or(0));
        tracing::error!(found, history, "the newest layer has lost its end: points that need it are lost");
        let what = format!("layer {} has lost its end", self.next_number - 1);
        self.timeline.tell_damage(from, reached, &what)?;
        self.close_layer()?;
        self.complete_to = history;
        Ok(())
    }

    fn newest_point_of(&self, layer: &OpenLayer, found: &Recovered) -> Result<(u64, u64), HistoryError> {
        let Some(chunk) = found.chunks.iter().rev().find(|chunk| chunk.points > 0) else {
            return Ok((found.complete_to, found.last_time_ns));
        };
        let points = layer.reader().points(chunk)?;
        Ok(points.last().map_or((found.complete_to, found.last_time_ns), |point| (point.height, point.time_ns)))
    }

    /// The timeline that it writes.
    pub fn timeline(&self) -> &Arc<Timeline> {
        &self.timeline
    }

    /// Before-images of all changes of the stream up to here are durable: they need not be taken again.
    pub fn complete_to(&self) -> u64 {
        self.complete_to
    }

    /// The highest stamp of all records: an image may stand above [`Recorder::complete_to`].
    pub fn highest_stamp(&self) -> u64 {
        self.timeline.layers().iter().map(|layer| layer.last_height).max().unwrap_or(0).max(self.complete_to)
    }

    /// Before the first layer there is no past: history begins at `height`.
    fn begin_at(&mut self, height: u64) {
        if self.layer.is_none() && self.next_number == 1 {
            self.complete_to = height;
        }
    }

    /// Records of the stream: where they end, and when they were made. Those that were seen before are passed over. Nothing
    /// that was pushed waits to be committed.
    ///
    /// # Errors
    /// If the source's clock was set back, which begins a new layer, or too many points wait for a chunk, and that fails.
    pub fn points(&mut self, points: &[(u64, u64)]) -> Result<(), HistoryError> {
        if let Some((height, time_ns)) = points.iter().copied().find(|point| point.0 > self.newest_point.0) {
            self.look_at_clock(height, time_ns)?;
        }
        // Where nobody writes nothing commits, and canaries never end: what comes with the next write needs room.
        let waiting = self.points.len();
        if waiting >= CHUNK_POINTS_MAX / 2 || (waiting > 0 && waiting + points.len() > CHUNK_POINTS_MAX) {
            self.append_points()?;
        }
        if points.iter().any(|point| point.0 > self.newest_point.0) {
            self.came = SystemTime::now();
        }
        for (height, time_ns) in points {
            if *height > self.newest_point.0 && self.points.len() < CHUNK_POINTS_MAX {
                // Set in the middle of these, it is seen with the next ones: see `begin_stretch`.
                let time_ns = if self.leaps(*time_ns) { 0 } else { *time_ns };
                self.newest_point = (*height, time_ns.max(self.newest_point.1));
                self.points.push(self.newest_point);
            }
        }
        self.highest_ns = self.highest_ns.max(self.newest_point.1);
        Ok(())
    }

    /// Whether the source's clock was set between the newest point and what stands at `height`. Nothing that was pushed waits.
    fn look_at_clock(&mut self, height: u64, time_ns: u64) -> Result<(), HistoryError> {
        let before_ns = self.newest_point.1;
        let (before, now) = (show_time(before_ns), show_time(time_ns));
        if is_setback(before_ns, time_ns) {
            tracing::warn!(height, before, now, "the source's clock was set back: times before and after it overlap");
            return self.begin_stretch(time_ns);
        }
        if self.leaps(time_ns) {
            tracing::warn!(height, before, now, "the source's clock was behind and has been set right");
            self.begin_stretch(time_ns)?;
        }
        Ok(())
    }

    /// Whether a clock that was behind what it had shown before is set right by this time, or nearer to it: a host without a clock
    /// begins with the time that it saved last, and hears the right one later. Time that only went on is no leap, for
    /// canaries come every second; a source that is away until the hour that its clock once showed too early is taken for one.
    fn leaps(&self, time_ns: u64) -> bool {
        let before_ns = self.newest_point.1;
        let is_right = !is_setback(self.highest_ns, time_ns) || time_ns.saturating_sub(before_ns) >= LEAP_NS_MIN;
        let was_behind = is_setback(self.highest_ns, before_ns);
        was_behind && is_right && is_setback(time_ns, before_ns) && self.next_number > 1
    }

    /// Within a layer times do not fall, nor leap over what the clock had shown before: what is known so far goes to this one,
    /// what comes to the next.
    fn begin_stretch(&mut self, time_ns: u64) -> Result<(), HistoryError> {
        if !self.points.is_empty() {
            self.append_points()?;
        }
        self.close_layer()?;
        self.chunk = None;
        // What is left found no room.
        self.points.clear();
        self.newest_point.1 = time_ns;
        self.begins_ns = self.begins_ns.and(Some(time_ns));
        if self.next_number > 1 {
            // At once, for that is how a reader sees it: points alone are only in memory.
            self.layer = match self.begin_layer() {
                Err(HistoryError::Io(error)) if error.is_no_space() => {
                    tracing::error!(%error, "no room for the layer of another clock: it begins with the next change");
                    None
                }
                begun => Some(begun?),
            };
        }
        Ok(())
    }

    /// Makes the points so far durable. Every change of the stream up to them was committed: nothing waits between batches.
    fn append_points(&mut self) -> Result<(), HistoryError> {
        self.append(self.newest_point.0.max(self.begun_to()))
    }

    /// What `height`'s change replaces: whole sectors of one granule.
    ///
    /// # Errors
    /// If a chunk was full and could not be appended, or the numbers are impossible.
    pub fn push(&mut self, address: Address, height: u64, before: Before<'_>) -> Result<(), HistoryError> {
        if self.chunk().fits(GRANULE_SECTORS) {
            return self.chunk().push(address, height, before);
        }
        self.append(self.begun_to())?;
        self.chunk().push(address, height, before)
    }

    /// Makes everything that was pushed durable and findable. All changes of the stream up to `complete_to` were pushed, or
    /// need not be.
    ///
    /// # Errors
    /// If the disk refuses. Nothing may be written to the replicas then; the recorder is to be opened anew.
    pub fn commit(&mut self, complete_to: u64) -> Result<(), HistoryError> {
        if self.wants_append() {
            self.append(complete_to.max(self.begun_to()))?;
        }
        self.settle()?;
        if self.layer.as_ref().is_some_and(|current| current.is_full(&self.timeline) || current.is_old()) {
            self.close_layer()?;
        }
        Ok(())
    }

    /// As [`Recorder::commit`], while the caller goes on: it is durable and findable after [`Recorder::settle`]. What was committed
    /// so before is on return.
    ///
    /// # Errors
    /// As [`Recorder::commit`].
    pub fn commit_behind(&mut self, complete_to: u64) -> Result<(), HistoryError> {
        if !self.wants_append() {
            return Ok(());
        }
        let complete_to = complete_to.max(self.begun_to());
        let current = self.begin_append(complete_to)?;
        let current = self.layer.insert(current);
        let Some(chunk) = &mut self.chunk else { return Ok(()) };
        let info = current.layer.append_behind(chunk, complete_to, self.spare.take())?;
        let entries = chunk.entries(current.layer.number(), info.offset).collect();
        chunk.begin(complete_to);
        self.behind = Some(Behind { info, entries });
        Ok(())
    }

    /// Waits for what [`Recorder::commit_behind`] began: on return it is durable and findable.
    ///
    /// # Errors
    /// As [`Recorder::commit`].
    pub fn settle(&mut self) -> Result<(), HistoryError> {
        let Some(Behind { info, entries }) = self.behind.take() else { return Ok(()) };
        let Some(mut current) = self.layer.take() else {
            let why = "the layer that was appended to is not open any more";
            return Err(
                IoError::new("append to a layer in", self.timeline.layers_dir(), std::io::Error::other(why)).into()
            );
        };
        self.spare = current.layer.settle()?;
        self.appended(current, entries, info)
    }

    fn wants_append(&self) -> bool {
        let records = self.chunk.as_ref().is_some_and(|chunk| chunk.records() > 0);
        records || self.points.len() >= CHUNK_POINTS_MAX / 2
    }

    /// All changes of the stream up to here have their before-images in a layer, or on their way there.
    fn begun_to(&self) -> u64 {
        self.behind.as_ref().map_or(self.complete_to, |behind| behind.info.complete_to)
    }

    /// Makes what happened to the stream durable.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn events(&mut self, events: &[Event]) -> Result<(), HistoryError> {
        // The first point of all; later ends of gaps are not where history begins, though nothing was replaced yet.
        let first = self.timeline.chronicle().point_at_or_above(0).is_none();
        let end = events.iter().find_map(|event| match event {
            Event::GapEnd { height, .. } if first => Some(*height),
            _ => None,
        });
        if let Some(height) = end {
            self.begin_at(height);
        }
        self.timeline.tell(events)
    }

    /// The replicas are there. A mark may be the first that the source's clock, set meanwhile, dates: what images replace behind
    /// it must not go to a layer of the time before, nor that layer reach over the mark.
    ///
    /// # Errors
    /// As [`Recorder::points`].
    pub fn applied(&mut self, height: u64, time_ns: u64) -> Result<(), HistoryError> {
        self.settle()?;
        if height > self.newest_point.0 {
            self.look_at_clock(height, time_ns)?;
            self.newest_point.1 = self.newest_point.1.max(time_ns);
            self.came = SystemTime::now();
        }
        self.timeline.set_applied(height, time_ns);
        Ok(())
    }

    /// There is nothing to do for a while: an old layer is closed, memory goes.
    ///
    /// # Errors
    /// If the layer cannot be closed.
    pub fn rest(&mut self) -> Result<(), HistoryError> {
        self.settle()?;
        (self.chunk, self.spare) = (None, None);
        match self.layer.as_ref().is_some_and(Current::is_old) {
            true => self.close_layer(),
            false => Ok(()),
        }
    }

    fn chunk(&mut self) -> &mut Chunk {
        let begun_to = self.begun_to();
        self.chunk.get_or_insert_with(|| {
            let mut chunk = Chunk::new();
            chunk.begin(begun_to);
            chunk
        })
    }

    fn append(&mut self, complete_to: u64) -> Result<(), HistoryError> {
        let mut current = self.begin_append(complete_to)?;
        let Some(chunk) = &mut self.chunk else { return Ok(()) };
        let info = current.layer.append(chunk, complete_to)?;
        let entries = chunk.entries(current.layer.number(), info.offset).collect();
        chunk.begin(complete_to);
        self.appended(current, entries, info)
    }

    /// A layer with room, and the chunk with the points that belong to it.
    fn begin_append(&mut self, complete_to: u64) -> Result<Current, HistoryError> {
        self.settle()?;
        // A full one could not be closed when it was opened.
        if self.layer.as_ref().is_some_and(|current| current.is_full(&self.timeline) || current.is_old()) {
            self.close_layer()?;
        }
        let current = match self.layer.take() {
            Some(current) => current,
            None => self.begin_layer()?,
        };
        self.chunk();
        if let Some(chunk) = &mut self.chunk {
            put_points(&mut self.points, chunk, complete_to)?;
        }
        Ok(current)
    }

    /// It is durable: now it can be found.
    fn appended(&mut self, mut current: Current, entries: Vec<Entry>, info: ChunkInfo) -> Result<(), HistoryError> {
        current.last_height = entries.iter().map(|entry| entry.height).fold(current.last_height, u64::max);
        current.last_height = current.last_height.max(info.complete_to);
        self.complete_to = info.complete_to;
        self.timeline.publish(entries, info, current.info())?;
        let full = current.is_full(&self.timeline);
        self.layer = Some(current);
        if full { self.close_layer() } else { Ok(()) }
    }

    fn begin_layer(&mut self) -> Result<Current, HistoryError> {
        let (number, first_height) = (self.next_number, self.complete_to);
        let first_ns = self.points.first().map_or(self.newest_point.1, |point| point.1);
        let time_ns = self.begins_ns.map_or(first_ns, |begins_ns| begins_ns.min(first_ns));
        let dir = self.timeline.layers_dir();
        let layer = OpenLayer::create(&dir, self.timeline.group, number, first_height, time_ns)?;
        self.next_number += 1;
        let reader = Arc::new(layer.reader());
        let begun = Instant::now();
        let current = Current { layer, last_height: first_height, first_height, first_time_ns: time_ns, begun };
        let part = OpenPart { reader, index: Arc::default(), chunks: Vec::new() };
        self.timeline.set_open(part, current.info())?;
        Ok(current)
    }

    /// Ends the open layer: its index becomes a run.
    ///
    /// # Errors
    /// If the run cannot be written; the layer is read again at the next start.
    pub fn close_layer(&mut self) -> Result<(), HistoryError> {
        self.settle()?;
        let Some(current) = self.layer.take() else { return Ok(()) };
        let info = current.info();
        self.begins_ns = Some(info.last_time_ns);
        let complete_to = current.layer.complete_to();
        let chunks = current.layer.chunks().to_vec();
        let file = current.layer.close(self.came)?;
        let entries = self.timeline.open_entries(info.number);
        let closing = Closing {
            number: info.number,
            first_height: info.first_height,
            complete_to,
            first_time_ns: info.first_time_ns,
            last_time_ns: info.last_time_ns,
            bytes: file.bytes(),
        };
        self.timeline.add_closed(&closing, &entries, &chunks)
    }
}

/// The points that lie within what the chunk completes, as far as there is room. Those that the layer is past already stay
/// out: for want of room they were passed over before.
fn put_points(points: &mut Vec<(u64, u64)>, chunk: &mut Chunk, complete_to: u64) -> Result<(), HistoryError> {
    let first = chunk.first_height();
    let mut taken = 0;
    for (height, time_ns) in points.iter().take_while(|point| point.0 <= complete_to) {
        if !chunk.fits(0) {
            break;
        }
        taken += 1;
        if *height > first {
            chunk.point(*height, *time_ns)?;
        }
    }
    points.drain(..taken);
    Ok(())
}

impl Current {
    fn is_full(&self, timeline: &Timeline) -> bool {
        self.layer.is_full() || self.layer.bytes() >= timeline.layer_bytes()
    }

    fn is_old(&self) -> bool {
        self.begun.elapsed() >= LAYER_AGE_MAX
    }

    fn info(&self) -> LayerInfo {
        LayerInfo {
            number: self.layer.number(),
            first_height: self.first_height,
            last_height: self.last_height,
            first_time_ns: self.first_time_ns,
            last_time_ns: self.layer.last_time_ns(),
            bytes: self.layer.bytes(),
            records: self.layer.records() as u64,
            open: true,
        }
    }
}

#[cfg(test)]
mod tests;
