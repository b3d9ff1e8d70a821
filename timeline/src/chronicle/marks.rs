//! The marks of the stream in order: where each stretch of an incarnation stands, and where gaps are.

use super::HeightTime;
use varve_common::format::chronicle::Event;
use varve_common::state::GapReason;
use varve_common::wire::messages::Incarnation;

/// What a mark that opens a gap adds to the height and not to the position.
const MARK_HEIGHT: u64 = 8;

/// A place in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Whose stream.
    pub incarnation: Incarnation,
    /// Offset in it.
    pub position: u64,
    /// Fencing token.
    pub epoch: u64,
}

/// A stretch of heights above `from` and below `to` in which no point can be recovered; both ends are points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The last point before. `None`: there is none.
    pub from: Option<HeightTime>,
    /// When it began; as `from`'s time, where there is one.
    pub began_ns: u64,
    /// The first point after. `None`: it is open.
    pub to: Option<HeightTime>,
    /// Why.
    pub reason: GapReason,
}

/// A stretch of one incarnation's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Where and when it begins.
    pub from: HeightTime,
    /// Its place there.
    pub place: Place,
}

/// A gap that is open at a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OpenGap {
    from: Option<HeightTime>,
    began_ns: u64,
    reason: GapReason,
}

/// One mark, and what is true from its height on.
#[derive(Clone, Debug)]
struct Mark {
    height: u64,
    time_ns: u64,
    event: Event,
    /// Open above this height.
    gap: Option<OpenGap>,
    /// Of this height. `None`: the chronicle lost it.
    place: Option<Place>,
    /// The position stays while the height rises, until the next mark.
    still: bool,
}

/// Before anything is known nothing can be recovered.
const NOTHING_YET: OpenGap = OpenGap { from: None, began_ns: 0, reason: GapReason::InitialSync };

/// Whether a mark was new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It was.
    New,
    /// It is there already.
    Known,
    /// It contradicts what came after its height: the stream went another way, and what was above the height is
    /// forgotten.
    Diverged,
}

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub(super) struct Marks {
    marks: Vec<Mark>,
}

/// Height and time of a mark's event; `None` if it is another event.
pub(super) fn place_and_time(event: &Event) -> Option<HeightTime> {
    match event {
        Event::Begin { height, time_ns, .. }
        | Event::GapBegin { height, time_ns, .. }
        | Event::GapEnd { height, time_ns }
        | Event::RolledBack { height, time_ns, .. } => Some((*height, *time_ns)),
        _ => None,
    }
}

impl Marks {
    pub(super) fn len(&self) -> usize {
        self.marks.len()
    }

    /// Height of the newest mark.
    pub(super) fn newest(&self) -> Option<u64> {
        self.marks.last().map(|mark| mark.height)
    }

    /// Number of marks at or below `height`.
    fn up_to(&self, height: u64) -> usize {
        self.marks.partition_point(|mark| mark.height <= height)
    }

    /// Adds a mark. `oldest`: marks below are of no use to anybody.
    pub(super) fn take(&mut self, event: &Event, oldest: u64) -> Taken {
        let Some((height, _)) = place_and_time(event) else { return Taken::Known };
        if height < oldest {
            return Taken::Known;
        }
        let end = self.up_to(height);
        let first = self.marks.partition_point(|mark| mark.height < height);
        if self.marks[first..end].iter().any(|mark| mark.event == *event) {
            return Taken::Known;
        }
        let diverged = end < self.marks.len();
        self.marks.truncate(end);
        self.push(event.clone());
        if diverged { Taken::Diverged } else { Taken::New }
    }

    fn push(&mut self, event: Event) {
        let Some((height, time_ns)) = place_and_time(&event) else { return };
        let before = self.marks.last();
        let open = before.map_or(Some(OpenGap { began_ns: time_ns, ..NOTHING_YET }), |mark| mark.gap);
        let place = self.place_of_next(height, &event);
        let gap = match &event {
            Event::GapBegin { reason, .. } => match open {
                Some(open) => Some(OpenGap { reason: *reason, ..open }),
                None => Some(OpenGap { from: Some((height, time_ns)), began_ns: time_ns, reason: *reason }),
            },
            Event::GapEnd { .. } | Event::RolledBack { .. } => None,
            _ => open,
        };
        let still = matches!(event, Event::GapBegin { .. } | Event::RolledBack { .. });
        self.marks.push(Mark { height, time_ns, event, gap, place, still });
    }

    fn place_of_next(&self, height: u64, event: &Event) -> Option<Place> {
        if let Event::Begin { incarnation, position, epoch, .. } = event {
            return Some(Place { incarnation: *incarnation, position: *position, epoch: *epoch });
        }
        let last = self.marks.last()?;
        let until = match event {
            Event::RolledBack { .. } => height.saturating_sub(MARK_HEIGHT),
            _ => height,
        };
        Self::onward(last, until)
    }

    /// The place at `height`, no other mark being between.
    fn onward(mark: &Mark, height: u64) -> Option<Place> {
        let place = mark.place?;
        let further = if mark.still { 0 } else { height.saturating_sub(mark.height) };
        Some(Place { position: place.position.checked_add(further)?, ..place })
    }

    /// What comes after the newest mark stands nobody knows where, until the next `Begin`.
    pub(super) fn lose_place(&mut self) {
        if let Some(last) = self.marks.last_mut() {
            last.place = None;
        }
    }

    /// The highest height at which the position of mark `index` still runs on.
    fn runs_to(&self, index: usize) -> u64 {
        let mark = &self.marks[index];
        let Some(next) = self.marks.get(index + 1) else { return u64::MAX };
        match next.event {
            // The next mark raised the height by itself.
            Event::Begin { .. } | Event::RolledBack { .. } => next.height.saturating_sub(MARK_HEIGHT).max(mark.height),
            _ => next.height,
        }
    }

    /// Whether `height` is above a mark behind which the position stands still, and no other mark is between.
    pub(super) fn stands_still(&self, height: u64) -> bool {
        let mark = self.up_to(height).checked_sub(1).map(|index| &self.marks[index]);
        mark.is_some_and(|mark| mark.still && mark.height < height)
    }

    /// Where the stream stood at `height`.
    pub(super) fn place(&self, height: u64) -> Option<Place> {
        let index = self.up_to(height).checked_sub(1)?;
        Self::onward(&self.marks[index], height.min(self.runs_to(index)))
    }

    /// Incarnations whose hex digits begin with `prefix`.
    pub(super) fn incarnations(&self, prefix: &str) -> Vec<Incarnation> {
        let mut found: Vec<Incarnation> = Vec::new();
        for place in self.marks.iter().filter_map(|mark| mark.place) {
            if !found.contains(&place.incarnation) && hex(&place.incarnation).starts_with(prefix) {
                found.push(place.incarnation);
            }
        }
        found
    }

    /// Heights at which the stream of `incarnation` stood at `position`, the highest first.
    pub(super) fn heights(&self, incarnation: &Incarnation, position: u64) -> Vec<u64> {
        let mut heights = Vec::new();
        for (index, mark) in self.marks.iter().enumerate() {
            let Some(place) = mark.place.filter(|place| place.incarnation == *incarnation) else { continue };
            let Some(further) = position.checked_sub(place.position) else { continue };
            let room = if mark.still { 0 } else { self.runs_to(index) - mark.height };
            if further <= room {
                heights.extend(mark.height.checked_add(further));
            }
        }
        heights.sort_unstable();
        heights.dedup();
        heights.reverse();
        heights
    }

    /// Whether a gap takes the point at `height` away.
    pub(super) fn gap_at(&self, height: u64) -> Option<Gap> {
        let end = self.up_to(height);
        let first = self.marks.partition_point(|mark| mark.height < height);
        let here = &self.marks[first..end];
        let ended = here.iter().any(|mark| matches!(mark.event, Event::GapEnd { .. } | Event::RolledBack { .. }));
        // What a mark at this height opens begins above it.
        let open = match first.checked_sub(1) {
            Some(before) => self.marks[before].gap,
            None => Some(NOTHING_YET),
        };
        match open {
            // The reason that counts is the newest.
            Some(open) if !ended => {
                let open = here.last().and_then(|mark| mark.gap).unwrap_or(open);
                Some(self.closed(open, end))
            }
            _ => None,
        }
    }

    /// The gap that is open just above `height`.
    pub(super) fn gap_above(&self, height: u64) -> Option<Gap> {
        let end = self.up_to(height);
        let open = end.checked_sub(1).map_or(Some(NOTHING_YET), |index| self.marks[index].gap)?;
        Some(self.closed(open, end))
    }

    /// The gap that was open at a time, as far as marks up to a height say.
    pub(super) fn gap_at_time(&self, time_ns: u64, until: u64) -> Option<Gap> {
        let index = self.marks.iter().rposition(|mark| mark.time_ns <= time_ns && mark.height <= until)?;
        Some(self.closed(self.marks[index].gap?, index + 1))
    }

    /// A gap with the end that it has at mark `from` or later.
    fn closed(&self, open: OpenGap, from: usize) -> Gap {
        let to = self.marks[from..].iter().find(|mark| mark.gap.is_none()).map(|mark| (mark.height, mark.time_ns));
        Gap { from: open.from, began_ns: open.began_ns, to, reason: open.reason }
    }

    /// The newest mark at or below `height`.
    pub(super) fn at_or_below(&self, height: u64) -> Option<HeightTime> {
        let mark = &self.marks[self.up_to(height).checked_sub(1)?];
        Some((mark.height, mark.time_ns))
    }

    /// The newest mark at or before `time_ns`, up to a height.
    pub(super) fn at_or_before(&self, time_ns: u64, until: u64) -> Option<HeightTime> {
        // Times may fall, where the source's clock was set back or a receiver took over: the highest counts.
        let mark = self.marks.iter().rev().find(|mark| mark.time_ns <= time_ns && mark.height <= until)?;
        Some((mark.height, mark.time_ns))
    }

    /// Gaps, from old to new.
    pub(super) fn gaps(&self) -> Vec<Gap> {
        let mut gaps = Vec::new();
        let nothing = |first: &Mark| first.gap.unwrap_or(OpenGap { began_ns: first.time_ns, ..NOTHING_YET });
        let mut open = self.marks.first().map(nothing);
        for mark in &self.marks {
            match (open, mark.gap) {
                (Some(was), None) => {
                    gaps.push(Gap {
                        from: was.from,
                        began_ns: was.began_ns,
                        to: Some((mark.height, mark.time_ns)),
                        reason: was.reason,
                    });
                    open = None;
                }
                (None, now) => open = now,
                // The first reason is the one that cost the points.
                (Some(_), Some(_)) => {}
            }
        }
        gaps.extend(open.map(|open| Gap { from: open.from, began_ns: open.began_ns, to: None, reason: open.reason }));
        gaps
    }

    /// Streams, from old to new.
    pub(super) fn stretches(&self) -> Vec<Stretch> {
        let mut stretches: Vec<Stretch> = Vec::new();
        for mark in &self.marks {
            let Event::Begin { incarnation, position, epoch, .. } = mark.event else { continue };
            let same = |last: &Stretch| last.place.incarnation == incarnation && last.place.epoch == epoch;
            if !stretches.last().is_some_and(same) {
                let place = Place { incarnation, position, epoch };
                stretches.push(Stretch { from: (mark.height, mark.time_ns), place });
            }
        }
        stretches
    }

    /// Rollbacks, from old to new: the point that one made, and the one that it went back to.
    pub(super) fn rollbacks(&self) -> impl Iterator<Item = (HeightTime, HeightTime)> {
        self.marks.iter().filter_map(|mark| match mark.event {
            Event::RolledBack { height, time_ns, to_height, to_time_ns } => {
                Some(((height, time_ns), (to_height, to_time_ns)))
            }
            _ => None,
        })
    }

    /// The fewest events that say the same of `oldest` and above.
    pub(super) fn events(&self, oldest: u64) -> Vec<Event> {
        let end = self.up_to(oldest);
        let newest_below = end.checked_sub(1).map(|index| self.marks[index].height);
        // All marks at that height stay as they are, and one before stands for the rest.
        let first = newest_below.map_or(0, |height| self.marks.partition_point(|mark| mark.height < height));
        let mut events = Vec::with_capacity(self.marks.len() - first + 2);
        let begin = |height, time_ns, place: Place| {
            let Place { incarnation, position, epoch } = place;
            Event::Begin { height, time_ns, incarnation, position, epoch }
        };
        if let Some(mark) = first.checked_sub(1).map(|index| &self.marks[index]) {
            let (height, time_ns) = (mark.height, mark.time_ns);
            events.push(match mark.gap {
                Some(gap) => Event::GapBegin { height, time_ns: gap.began_ns, reason: gap.reason },
                None => Event::GapEnd { height, time_ns },
            });
            events.extend(mark.place.map(|place| begin(height, time_ns, place)));
            // The position of the next marks must not run on from there if it did not.
            if let Some(next) = self.marks.get(first).filter(|_| mark.still) {
                events.extend(next.place.map(|place| begin(next.height, next.time_ns, place)));
            }
        }
        events.extend(self.marks[first..].iter().map(|mark| mark.event.clone()));
        events
    }

    /// Forgets what only matters below `oldest`.
    pub(super) fn cut(&mut self, oldest: u64) {
        // Looked at first: most of the time there is nothing.
        if self.marks.len() < 8 || self.up_to(oldest) < 4 {
            return;
        }
        let mut marks = Self::default();
        for event in self.events(oldest) {
            marks.push(event);
        }
        *self = marks;
    }

    /// The lowest height such that at most `count` marks remain when everything only needed below is forgotten.
    pub(super) fn height_to_keep(&self, count: usize) -> Option<u64> {
        let index = self.marks.len().checked_sub(count)?;
        self.marks.get(index).map(|mark| mark.height)
    }
}

/// All digits of an incarnation.
pub(super) fn hex(incarnation: &Incarnation) -> String {
    incarnation.iter().map(|byte| format!("{byte:02x}")).collect()
}
