//! Which points there are: heights and times of the stream's records, as the layers tell them.

use crate::catalogue::LayerInfo;
use crate::chronicle::{HeightTime, PointError, Times};
use crate::error::HistoryError;
use crate::layer::ChunkInfo;
use crate::limits::CLOCKS_APART_NS_MAX;
use crate::timeline::Timeline;
use std::ops::RangeInclusive;
use std::time::SystemTime;
use varve_common::clock::is_setback;
use varve_common::control::{DensityStatus, PointsReply, show_time};
use varve_common::point::{LocatedPoint, PointSpec};

/// A record's end: what can be recovered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordPoint {
    /// The height after it.
    pub height: u64,
    /// When it was made, at the source.
    pub time_ns: u64,
}

/// Where a time is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeEnd {
    /// Up to the newest point.
    Newest,
    /// Up to this height.
    Height(u64),
    /// Nowhere. It lies between a stretch in which the source's clock was ahead and the next one that has the right times.
    SetRight {
        /// The height at which what has the right times begins.
        before: u64,
        /// Its first time.
        after_ns: u64,
    },
}

/// Layers between two settings of the source's clock.
struct Stretch<'a> {
    /// Its times.
    times: RangeInclusive<u64>,
    layers: &'a [LayerInfo],
    /// The height at which it ends. `None`: the newest one has none yet.
    end: Option<u64>,
    /// The clock was behind in it, and leapt when it was set right.
    leaps: bool,
}

/// The newest first; that may have marks alone, and no layer yet. `newest_ns`: of the newest point.
fn stretches(layers: &[LayerInfo], newest_ns: u64) -> Vec<Stretch<'_>> {
    let mut newer = Stretch { times: newest_ns..=newest_ns, layers: &[], end: None, leaps: false };
    let mut all = Vec::new();
    let mut to = layers.len();
    for (index, layer) in layers.iter().enumerate().rev() {
        let next = layers.get(index + 1);
        // Points that no layer has yet are no leap.
        let leaps = next.is_some() && is_setback(*newer.times.start(), layer.last_time_ns);
        if leaps || is_setback(layer.last_time_ns, *newer.times.start()) {
            to = index + 1;
            let end = Some(next.map_or(layer.last_height, |next| next.first_height));
            let times = layer.first_time_ns..=layer.last_time_ns;
            all.push(std::mem::replace(&mut newer, Stretch { times, layers: &[], end, leaps }));
        }
        newer.times = layer.first_time_ns.min(*newer.times.start())..=*newer.times.end();
        newer.layers = &layers[index..to];
    }
    all.push(newer);
    all
}

/// Where the source's clock was set back, it showed some times twice. Of the stretches between, the newest that has a time is
/// the one in which it is looked for, and this is the height at which that ends; a time that none has is later than all.
/// A clock that was behind leaps when it is set right: that ends a stretch as well, for what it leaps over is the time of
/// older ones. `newest_ns`: of the newest point.
///
/// `came_ns`: when, by the clock here, the newest point of a layer did, if that can say something. If a stretch was over before
/// that time came, it was shown there because the clock was ahead, and is not the time that is meant. `expired_ns`: the newest
/// time that has expired.
pub(crate) fn end_of_time(
    layers: &[LayerInfo],
    time_ns: u64,
    newest_ns: u64,
    expired_ns: u64,
    came_ns: impl Fn(&LayerInfo) -> Option<u64>,
) -> TimeEnd {
    let over_ns_of = |layer: &LayerInfo| came_ns(layer).map(|came_ns| came_ns.saturating_add(CLOCKS_APART_NS_MAX));
    let stretches = stretches(layers, newest_ns);
    for (newer, stretch) in stretches.iter().enumerate().filter(|(_, stretch)| stretch.times.contains(&time_ns)) {
        let Some(end) = stretch.end else { return TimeEnd::Newest };
        let Some(over_ns) = stretch.layers.last().and_then(&over_ns_of).filter(|over_ns| *over_ns < time_ns) else {
            return TimeEnd::Height(end);
        };
        // Nothing came between it and the next one that has the right times, as the clock here has them. If no time of the
        // stretch itself had come by then, that may be the wrong one.
        let next = (0..newer).min_by_key(|newer| *stretches[*newer].times.start());
        let Some((next, before)) = next.and_then(|next| Some((&stretches[next], stretches[next + 1].end?))) else {
            continue;
        };
        let right = next.layers.first().is_some_and(|first| Some(first.last_time_ns) <= over_ns_of(first));
        let after_ns = *next.times.start();
        if right && time_ns < after_ns && *stretch.times.start() <= over_ns {
            return TimeEnd::SetRight { before, after_ns };
        }
    }
    let leapt_over = stretches
        .windows(2)
        .any(|pair| pair[1].leaps && is_setback(time_ns, *pair[1].times.end()) && time_ns < *pair[0].times.start());
    let oldest = stretches.last().filter(|oldest| !oldest.times.contains(&time_ns));
    // What the clock showed while it was behind is not older than the oldest stretch, nor than one that has expired.
    match (oldest, layers.first()) {
        (Some(oldest), Some(first)) if leapt_over && (time_ns < *oldest.times.start() || time_ns < expired_ns) => {
            TimeEnd::Height(first.first_height)
        }
        _ => TimeEnd::Newest,
    }
}

/// How many points lie in a stretch of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Density {
    /// From this time,
    pub from_ns: u64,
    /// to this one.
    pub to_ns: u64,
    /// Points.
    pub points: u64,
    /// Bytes of their before-images and what belongs to them, as stored.
    pub bytes: u64,
}

impl Density {
    fn show(&self) -> DensityStatus {
        DensityStatus {
            from: show_time(self.from_ns),
            to: show_time(self.to_ns),
            points: self.points,
            bytes: self.bytes,
        }
    }
}

/// Looks things up, and remembers that it could not: "no record" must not be said of a layer that cannot be read.
struct Lookup<'a> {
    timeline: &'a Timeline,
    failed: std::cell::RefCell<Option<HistoryError>>,
}

impl Lookup<'_> {
    fn found(&self, point: Result<Option<RecordPoint>, HistoryError>) -> Option<HeightTime> {
        let point = point.unwrap_or_else(|error| {
            tracing::error!(%error, "the points of a layer cannot be read");
            self.failed.replace(Some(error));
            None
        });
        point.map(|point| (point.height, point.time_ns))
    }
}

impl Times for Lookup<'_> {
    fn at_or_before(&self, time_ns: u64) -> Option<HeightTime> {
        self.found(self.timeline.at_or_before_time(time_ns))
    }

    fn after(&self, time_ns: u64) -> Option<HeightTime> {
        self.found(self.timeline.after_time(time_ns))
    }

    fn at_height(&self, height: u64) -> Option<HeightTime> {
        self.found(self.timeline.at_or_before_height(height))
    }

    fn end_of(&self, time_ns: u64, newest_ns: u64) -> TimeEnd {
        self.timeline.end_of_time(time_ns, newest_ns)
    }
}

/// For what is only shown.
impl Times for Timeline {
    fn at_or_before(&self, time_ns: u64) -> Option<HeightTime> {
        Lookup { timeline: self, failed: None.into() }.at_or_before(time_ns)
    }

    fn after(&self, time_ns: u64) -> Option<HeightTime> {
        Lookup { timeline: self, failed: None.into() }.after(time_ns)
    }

    fn at_height(&self, height: u64) -> Option<HeightTime> {
        Lookup { timeline: self, failed: None.into() }.at_height(height)
    }
}

impl Timeline {
    /// The exact point that `spec` means among those that the replicas have reached. `now_ns`: the time here, for ages.
    ///
    /// # Errors
    /// There is none, with what is next to it.
    pub fn locate(&self, spec: &PointSpec, now_ns: u64) -> Result<LocatedPoint, PointError> {
        let applied = self.applied();
        let newest = (applied.height, applied.time_ns);
        // Another layer's record would be taken for the one that was meant. A name and a position are exact without.
        let exact = matches!(spec, PointSpec::Bookmark(_) | PointSpec::Position { .. });
        loop {
            let begin = self.begin();
            let lookup = Lookup { timeline: self, failed: None.into() };
            let found = self.chronicle().locate(spec, now_ns, &lookup, begin.unwrap_or(0), newest);
            match lookup.failed.into_inner() {
                // A layer has expired while it was looked at; that happens a layer a time.
                Some(_) if self.begin() != begin => {}
                Some(error) if !exact => {
                    return Err(PointError::Damaged { what: error.to_string(), before: None, after: None });
                }
                _ => return found,
            }
        }
    }

    /// What `varve points` shows, but for what points cost. `parts`: how many stretches the density is shown in.
    ///
    /// # Errors
    /// If a layer cannot be read.
    pub fn report(
        &self,
        group: &str,
        from_ns: Option<u64>,
        to_ns: Option<u64>,
        parts: usize,
    ) -> Result<PointsReply, HistoryError> {
        let applied = self.applied();
        let newest = (applied.height, applied.time_ns);
        let chronicle = self.chronicle();
        let mut reply = chronicle.report(group, (from_ns, to_ns), self, self.begin().unwrap_or(0), newest);
        // Not that of the oldest layer: the source's clock may have been set back since.
        let oldest = self.layers().iter().map(|layer| layer.first_time_ns).min().unwrap_or(applied.time_ns);
        let from = from_ns.unwrap_or(0).max(oldest);
        let to = to_ns.unwrap_or(u64::MAX).min(applied.time_ns.saturating_add(1));
        for density in self.density(from, to, parts)? {
            reply.points += density.points;
            reply.bytes += density.bytes;
            reply.density.push(density.show());
        }
        Ok(reply)
    }

    /// The newest record not after `time_ns`; `None`: history begins later.
    ///
    /// # Errors
    /// If a layer cannot be read.
    pub fn at_or_before_time(&self, time_ns: u64) -> Result<Option<RecordPoint>, HistoryError> {
        let until = match self.end_of_time(time_ns, self.applied().time_ns) {
            TimeEnd::Height(height) => height,
            TimeEnd::Newest | TimeEnd::SetRight { .. } => u64::MAX,
        };
        let layers: Vec<LayerInfo> = self.layers().into_iter().filter(|layer| layer.first_height < until).collect();
        // Where the clock was set back to this time or an earlier one: what came before is older, whatever its times.
        let begins = |pair: &&[LayerInfo]| {
            is_setback(pair[0].last_time_ns, pair[1].first_time_ns) && pair[1].first_time_ns <= time_ns
        };
        let begin = layers.windows(2).rev().find(begins).map(|pair| pair[1]);
        let from = begin.map_or(0, |begin| begin.number);
        let stretch = layers.iter().rev().filter(|layer| layer.number >= from);
        let has = |chunk: &ChunkInfo| chunk.first_time_ns <= time_ns;
        let found = self.last(stretch, |point| point.time_ns <= time_ns, has)?;
        // Its first points may be in memory yet. They change nothing: else there were a record.
        Ok(found.or(begin.map(|begin| RecordPoint { height: begin.first_height, time_ns: begin.first_time_ns })))
    }

    /// See [`end_of_time`].
    fn end_of_time(&self, time_ns: u64, newest_ns: u64) -> TimeEnd {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        // A time that is still to come can only be meant as the source showed it.
        let came_ns = |layer: &LayerInfo| self.written_ns(layer.number).filter(|_| time_ns <= now);
        end_of_time(&self.layers(), time_ns, newest_ns, self.expired_ns(), came_ns)
    }

    /// When, by the clock here, a layer's newest point came; of the open one, when it was written to last. `None`: there is none. One that cannot be asked counts as
    /// written now: nothing is taken for old because of an error.
    pub fn written_ns(&self, layer: u32) -> Option<u64> {
        let path = crate::layer::path_of(&self.layers_dir(), layer);
        let written = match std::fs::metadata(path).and_then(|file| file.modified()) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            written => written.unwrap_or_else(|_| SystemTime::now()),
        };
        Some(written.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos() as u64)
    }

    /// The newest record that ends at `height` or before.
    ///
    /// # Errors
    /// As above.
    pub fn at_or_before_height(&self, height: u64) -> Result<Option<RecordPoint>, HistoryError> {
        let layers = self.layers();
        self.last(layers.iter().rev(), |point| point.height <= height, |chunk| chunk.first_height < height)
    }

    /// The oldest record after `time_ns`.
    ///
    /// # Errors
    /// As above.
    pub fn after_time(&self, time_ns: u64) -> Result<Option<RecordPoint>, HistoryError> {
        self.first(|point| point.time_ns > time_ns, |chunk| chunk.last_time_ns > time_ns)
    }

    /// The oldest record that ends after `height`.
    ///
    /// # Errors
    /// As above.
    pub fn after_height(&self, height: u64) -> Result<Option<RecordPoint>, HistoryError> {
        self.first(|point| point.height > height, |chunk| chunk.complete_to > height)
    }

    /// The last point of these layers, the newest first, for which `wanted` holds. `wanted` and `chunk_has` hold up to some place
    /// and not behind it; a chunk for which `chunk_has` does not hold has no such point.
    fn last<'a>(
        &self,
        layers: impl Iterator<Item = &'a LayerInfo>,
        wanted: impl Fn(&RecordPoint) -> bool,
        chunk_has: impl Fn(&ChunkInfo) -> bool,
    ) -> Result<Option<RecordPoint>, HistoryError> {
        for layer in layers {
            let chunks = self.chunks(layer.number)?;
            let end = chunks.partition_point(&chunk_has);
            for chunk in chunks[..end].iter().rev().filter(|chunk| chunk.points > 0) {
                let points = self.points_of(layer.number, chunk)?;
                if let Some(found) = points[..points.partition_point(&wanted)].last() {
                    return Ok(Some(*found));
                }
            }
        }
        Ok(None)
    }

    fn first(
        &self,
        wanted: impl Fn(&RecordPoint) -> bool,
        chunk_has: impl Fn(&ChunkInfo) -> bool,
    ) -> Result<Option<RecordPoint>, HistoryError> {
        for layer in self.layers() {
            let chunks = self.chunks(layer.number)?;
            if !chunks.last().is_some_and(&chunk_has) {
                continue;
            }
            let begin = chunks.partition_point(|chunk| !chunk_has(chunk));
            for chunk in chunks[begin..].iter().filter(|chunk| chunk.points > 0) {
                let points = self.points_of(layer.number, chunk)?;
                if let Some(found) = points.get(points.partition_point(|point| !wanted(point))) {
                    return Ok(Some(*found));
                }
            }
        }
        Ok(None)
    }

    fn points_of(&self, layer: u32, chunk: &ChunkInfo) -> Result<Vec<RecordPoint>, HistoryError> {
        let points = self.layer(layer)?.points(chunk)?;
        Ok(points.iter().map(|point| RecordPoint { height: point.height, time_ns: point.time_ns }).collect())
    }

    /// Points between two times in `parts` stretches of equal length, as exactly as chunks tell.
    ///
    /// # Errors
    /// As above.
    pub fn density(&self, from_ns: u64, to_ns: u64, parts: usize) -> Result<Vec<Density>, HistoryError> {
        if to_ns <= from_ns || parts == 0 {
            return Ok(Vec::new());
        }
        let step = ((to_ns - from_ns) / parts as u64).max(1);
        let mut all: Vec<Density> = (0..parts as u64)
            .map(|part| Density {
                from_ns: from_ns + part * step,
                to_ns: (from_ns + (part + 1) * step).min(to_ns),
                points: 0,
                bytes: 0,
            })
            .collect();
        for layer in self.layers() {
            if layer.last_time_ns < from_ns || layer.first_time_ns > to_ns {
                continue;
            }
            for chunk in
                self.chunks(layer.number)?.iter().filter(|chunk| (from_ns..=to_ns).contains(&chunk.last_time_ns))
            {
                let part = ((chunk.last_time_ns - from_ns) / step).min(parts as u64 - 1);
                all[part as usize].points += u64::from(chunk.points);
                all[part as usize].bytes += u64::from(chunk.bytes);
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_that_was_shown_twice_is_that_of_the_newest_stretch_that_has_it() {
        let second = 1_000_000_000;
        let layer = |number: u32, first: u64, last: u64| LayerInfo {
            number,
            first_height: u64::from(number) * 100,
            last_height: u64::from(number) * 100 + 101,
            first_time_ns: first * second,
            last_time_ns: last * second,
            bytes: 1,
            records: 1,
            open: false,
        };
        // Right, then an hour ahead, then right again.
        let layers = [layer(1, 1000, 1100), layer(2, 1100, 4800), layer(3, 1200, 1300), layer(4, 1300, 1400)];
        let height = |end: TimeEnd| match end {
            TimeEnd::Newest => None,
            TimeEnd::Height(height) => Some(height),
            TimeEnd::SetRight { .. } => panic!("{end:?}"),
        };
        let end = |time, newest| height(end_of_time(&layers, time * second, newest * second, 0, |_| None));
        assert_eq!(end(1350, 1450), None);
        assert_eq!(end(1250, 1450), None, "the newest stretch");
        assert_eq!(end(1150, 1450), Some(300), "only the one before has it");
        assert_eq!(end(4700, 1450), Some(300), "as it was shown then");
        assert_eq!(end(4900, 1450), None, "later than all");
        assert_eq!(end(900, 1450), None, "earlier than all");
        // Set back once more, and nothing but a mark came since.
        assert_eq!(end(1390, 1010), Some(501));
        assert_eq!(end(1010, 1010), None);
        assert_eq!(height(end_of_time(&[], 5, 9, 0, |_| None)), None);
        // The same, where the hour ahead was over here at 1190, and that time came later.
        let end_if = |over: u64, time: u64, newest| {
            let came = |layer: &LayerInfo| Some(second * if layer.number == 2 { over } else { 1500 });
            end_of_time(&layers, time * second, newest * second, 0, came)
        };
        let end = |time: u64, newest| height(end_if(1190, time, newest));
        assert_eq!(end(4700, 1450), None, "later than all that is");
        assert_eq!(end(1150, 1450), Some(300), "it was that time then");
        assert_eq!(end(1250, 1450), None, "the newest stretch, as before");
        // The same, where it was over at 1100: nothing came for a while, and then the clock was right.
        let between = TimeEnd::SetRight { before: 300, after_ns: 1200 * second };
        assert_eq!([end_if(1100, 1161, 1450), end_if(1100, 1199, 1450)], [between; 2]);
        assert_eq!(end_if(1100, 1160, 1450), TimeEnd::Height(300), "the clocks may be a minute apart");
        assert_eq!(end_if(1100, 1200, 1450), TimeEnd::Newest);
        assert_eq!(end_if(1100, 4700, 1450), TimeEnd::Newest, "later than all that is");
        assert_eq!(
            end_if(900, 1190, 1450),
            TimeEnd::Newest,
            "by no time of it: it may be the clock here that was wrong"
        );
        // As little as if it were behind by an hour, and the source had been set back by 20 s alone.
        let one_set_back = [layer(1, 1000, 9000), layer(2, 8980, 9500)];
        let end = |behind: u64| {
            let came =
                |layer: &LayerInfo| Some(layer.last_time_ns - if layer.number == 1 { 3600 } else { behind } * second);
            end_of_time(&one_set_back, 7000 * second, 9600 * second, 0, came)
        };
        assert_eq!(end(3600), TimeEnd::Newest);
        assert_eq!(end(0), TimeEnd::SetRight { before: 200, after_ns: 8980 * second }, "it was right at least since");
        // Set right in two steps: only the last one's times are right.
        let twice = [layer(1, 1000, 8000), layer(2, 4000, 4600), layer(3, 3500, 3700)];
        let end = |time: u64| {
            let came = |layer: &LayerInfo| Some([1100, 1700, 3700][layer.number as usize - 1] * second);
            end_of_time(&twice, time * second, 3750 * second, 0, came)
        };
        assert_eq!([end(1700), end(3499)], [TimeEnd::SetRight { before: 300, after_ns: 3500 * second }; 2]);
        assert_eq!([end(3500), end(3750), end(3900), end(4100)], [TimeEnd::Newest; 4], "later than all is no refusal");
        // Right, with a rest of which layers know nothing, then far behind, then right again.
        let layers = [layer(1, 1000, 1100), layer(2, 1100, 1200), layer(3, 10, 20), layer(4, 1210, 1220)];
        let end = |time| height(end_of_time(&layers, time * second, 1300 * second, 0, |_| None));
        assert_eq!([end(1000), end(1150), end(1200)], [Some(300); 3], "not the last one of those that were behind");
        assert_eq!(end(15), Some(400), "as it was shown then");
        assert_eq!([end(1210), end(1250), end(1300)], [None; 3]);
        assert_eq!(end(1205), None, "while it was behind");
        assert_eq!(end(500), Some(100), "earlier than all but what was behind: there is none");
        assert_eq!(end(5), None, "earlier than all");
        // The same when what was right before has expired.
        let end =
            |time, expired| height(end_of_time(&layers[2..], time * second, 1300 * second, expired * second, |_| None));
        assert_eq!(
            [end(1000, 1200), end(1190, 1200)],
            [Some(300); 2],
            "before the window: not the end of what was behind"
        );
        assert_eq!(end(15, 1200), Some(400), "as it was shown then");
        assert_eq!([end(1205, 1200), end(1250, 1200)], [None; 2], "while it was behind, and since");
    }
}
