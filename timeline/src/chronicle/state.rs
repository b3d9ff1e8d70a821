//! All that a chronicle says, in memory.

use super::HeightTime;
use super::bookmarks::{Bookmark, Bookmarks};
use super::marks::{Gap, Marks, Place, Stretch, Taken};
use crate::limits::{BOOKMARKS_MAX, DAMAGES_MAX, MARKS_MAX};
use varve_common::format::chronicle::{Event, NO_END};
use varve_common::wire::messages::Incarnation;

/// Points that damage took away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The first height that is none.
    pub from: u64,
    /// The first that is one again; [`NO_END`]: not known.
    pub to: u64,
    /// What is damaged.
    pub what: String,
}

/// What an event did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It says something new.
    New,
    /// It was known, or does not matter any more: nothing to write.
    Known,
    /// It is new and contradicts what came later: that is forgotten.
    Diverged,
}

/// See the module's text. Pure: the same events in the same order give the same chronicle.
#[derive(Clone, Debug, Default)]
pub struct Chronicle {
    pub(super) marks: Marks,
    pub(super) bookmarks: Bookmarks,
    pub(super) damages: Vec<Damage>,
    pub(super) oldest: HeightTime,
}

impl Chronicle {
    /// Takes an event.
    pub fn apply(&mut self, event: &Event) -> Applied {
        match event {
            Event::Begin { .. } | Event::GapBegin { .. } | Event::GapEnd { .. } | Event::RolledBack { .. } => {
                self.apply_mark(event)
            }
            Event::Bookmark { height, time_ns, name, consistency } => {
                let name = name.clone();
                let (height, time_ns, consistency) = (*height, *time_ns, *consistency);
                self.apply_bookmark(Bookmark { height, time_ns, name, consistency, kept: false })
            }
            Event::Keep { name } => new_if(self.bookmarks.keep(name)),
            Event::Release { name } => new_if(self.bookmarks.release(name)),
            Event::Damaged { from, to, what } => self.apply_damage(Damage { from: *from, to: *to, what: what.clone() }),
            Event::Expired { height, time_ns } => new_if(self.expire((*height, *time_ns))),
        }
    }

    fn apply_mark(&mut self, event: &Event) -> Applied {
        let taken = self.marks.take(event, self.oldest.0);
        let (Event::Begin { height, .. }
        | Event::GapBegin { height, .. }
        | Event::GapEnd { height, .. }
        | Event::RolledBack { height, .. }) = *event
        else {
            return Applied::Known;
        };
        match taken {
            Taken::Known => return Applied::Known,
            Taken::New => {}
            Taken::Diverged => self.bookmarks.cut_above(height),
        }
        if matches!(event, Event::GapEnd { .. } | Event::RolledBack { .. }) {
            // From here on the state is known again, whatever was lost before.
            for damage in self.damages.iter_mut().filter(|damage| damage.to == NO_END && damage.from < height) {
                damage.to = height;
            }
        }
        if taken == Taken::Diverged { Applied::Diverged } else { Applied::New }
    }

    /// What makes room where there are too many marks: the oldest quarter goes (not one at a time, so that it is not done with
    /// every mark), but nothing that a kept bookmark needs, nor the last point before an open gap. `None`: there is room, or none
    /// can be made.
    pub(super) fn makes_room(&self) -> Option<Event> {
        if self.marks.len() <= MARKS_MAX {
            return None;
        }
        let kept = self.bookmarks.iter().find(|bookmark| bookmark.kept).map(|bookmark| bookmark.height);
        let last_good = self.gap_above(u64::MAX).and_then(|gap| gap.from).map(|from| from.0);
        let needed = kept.into_iter().chain(last_good).min().unwrap_or(u64::MAX);
        let oldest = self.marks.height_to_keep(MARKS_MAX / 4 * 3)?.min(needed);
        let (height, time_ns) = self.marks.at_or_below(oldest)?;
        (height > self.oldest.0).then_some(Event::Expired { height, time_ns })
    }

    /// Number of marks.
    pub(super) fn marks(&self) -> usize {
        self.marks.len()
    }

    fn apply_bookmark(&mut self, bookmark: Bookmark) -> Applied {
        if bookmark.height < self.oldest.0 || self.bookmarks.has(bookmark.height, &bookmark.name) {
            return Applied::Known;
        }
        self.bookmarks.add(bookmark);
        if self.bookmarks.len() > BOOKMARKS_MAX {
            self.bookmarks.drop_oldest();
        }
        Applied::New
    }

    fn apply_damage(&mut self, damage: Damage) -> Applied {
        let covered = |have: &Damage| have.from <= damage.from && damage.to <= have.to;
        if damage.to <= self.oldest.0 || self.damages.iter().any(covered) {
            return Applied::Known;
        }
        if self.damages.len() >= DAMAGES_MAX {
            // Too many to tell apart: the newest grows over it. Points are lost, none is made up.
            if let Some(last) = self.damages.last_mut() {
                last.from = last.from.min(damage.from);
                last.to = last.to.max(damage.to);
            }
            return Applied::New;
        }
        let at = self.damages.partition_point(|have| have.from <= damage.from);
        self.damages.insert(at, damage);
        Applied::New
    }

    fn expire(&mut self, oldest: HeightTime) -> bool {
        if oldest.0 <= self.oldest.0 {
            return false;
        }
        self.oldest = oldest;
        self.bookmarks.cut_below(oldest.0);
        self.damages.retain(|damage| damage.to > oldest.0);
        self.marks.cut(oldest.0);
        true
    }

    /// The fewest events that give this chronicle again.
    pub fn events(&self) -> Vec<Event> {
        let mut events = self.marks.events(self.oldest.0);
        for damage in &self.damages {
            events.push(Event::Damaged { from: damage.from, to: damage.to, what: damage.what.clone() });
        }
        for bookmark in self.bookmarks.iter() {
            let Bookmark { height, time_ns, name, consistency, kept } = bookmark.clone();
            events.push(Event::Bookmark { height, time_ns, name: name.clone(), consistency });
            // At once: a name means the newest bookmark of it so far.
            events.extend(kept.then_some(Event::Keep { name }));
        }
        if self.oldest.0 > 0 {
            events.push(Event::Expired { height: self.oldest.0, time_ns: self.oldest.1 });
        }
        events
    }

    /// About how many events [`Chronicle::events`] gives.
    pub(super) fn live_events(&self) -> usize {
        self.marks.len() + self.bookmarks.len() + self.bookmarks.kept() + self.damages.len() + 3
    }

    /// Height of the newest mark: new marks of a stream that went another way must stand above.
    pub fn newest_mark(&self) -> u64 {
        self.marks.newest().unwrap_or(0)
    }

    /// The newest height that anything but an expiry names.
    pub(super) fn newest_height(&self) -> u64 {
        let bookmark = self.bookmarks.iter().next_back().map_or(0, |bookmark| bookmark.height);
        self.newest_mark().max(bookmark).max(self.oldest.0)
    }

    /// Where the window begins, as far as the chronicle knows: 0 if nothing has expired.
    pub fn oldest(&self) -> HeightTime {
        self.oldest
    }

    /// The newest mark that is not above `height`, or the window's begin: the records before that are gone.
    pub(super) fn known_at_or_below(&self, height: u64) -> Option<HeightTime> {
        let begin = Some(self.oldest).filter(|begin| begin.0 > 0 && begin.0 <= height);
        self.marks.at_or_below(height).into_iter().chain(begin).max()
    }

    /// Where the stream stood at `height`. `None`: before the first stream, or lost.
    pub fn position_of(&self, height: u64) -> Option<(Incarnation, u64)> {
        self.marks.place(height).map(|place| (place.incarnation, place.position))
    }

    /// As [`Chronicle::position_of`], with the epoch.
    pub fn place_of(&self, height: u64) -> Option<Place> {
        self.marks.place(height)
    }

    /// The gap that takes the point at `height` away.
    pub fn gap_at(&self, height: u64) -> Option<Gap> {
        self.marks.gap_at(height)
    }

    /// The gap that is open just above `height`: what comes next is no point.
    pub fn gap_above(&self, height: u64) -> Option<Gap> {
        self.marks.gap_above(height)
    }

    /// The damage that takes the point at `height` away.
    pub fn damage_at(&self, height: u64) -> Option<&Damage> {
        self.damages.iter().find(|damage| (damage.from..damage.to).contains(&height))
    }

    /// Whether the state at `height` can be recovered, as far as the chronicle knows.
    pub fn is_point(&self, height: u64) -> bool {
        height >= self.oldest.0 && self.gap_at(height).is_none() && self.damage_at(height).is_none()
    }

    /// The oldest and the newest point among heights from `oldest` to `newest`.
    pub fn window(&self, oldest: u64, newest: u64) -> Option<(u64, u64)> {
        let first = self.point_at_or_above(oldest)?;
        let last = self.point_at_or_below(newest)?;
        (first <= last).then_some((first, last))
    }

    /// The highest point that is not above `height`.
    pub fn point_at_or_below(&self, mut height: u64) -> Option<u64> {
        loop {
            if height < self.oldest.0 {
                return None;
            }
            if let Some(damage) = self.damage_at(height) {
                height = damage.from.checked_sub(1)?;
            } else if let Some(gap) = self.gap_at(height) {
                height = gap.from?.0;
            } else {
                return Some(height);
            }
        }
    }

    /// The lowest point that is not below `height`.
    pub fn point_at_or_above(&self, height: u64) -> Option<u64> {
        let mut height = height.max(self.oldest.0);
        loop {
            if let Some(damage) = self.damage_at(height) {
                height = Some(damage.to).filter(|to| *to != NO_END)?;
            } else if let Some(gap) = self.gap_at(height) {
                height = gap.to?.0;
            } else {
                return Some(height);
            }
        }
    }

    /// The points next to `height` on both sides.
    pub fn neighbours(&self, height: u64) -> (Option<u64>, Option<u64>) {
        (self.point_at_or_below(height), self.point_at_or_above(height))
    }

    /// Gaps that reach into the window, from old to new.
    pub fn gaps(&self) -> Vec<Gap> {
        let mut gaps = self.marks.gaps();
        gaps.retain(|gap| gap.to.is_none_or(|to| to.0 > self.oldest.0));
        gaps
    }

    /// Streams that reach into the window, from old to new.
    pub fn stretches(&self) -> Vec<Stretch> {
        self.marks.stretches()
    }

    /// Rollbacks, from old to new: the point that one made, and the one that it went back to.
    pub fn rollbacks(&self) -> impl Iterator<Item = (HeightTime, HeightTime)> {
        self.marks.rollbacks()
    }

    /// From old to new.
    pub fn damages(&self) -> &[Damage] {
        &self.damages
    }

    /// From old to new.
    pub fn bookmarks(&self) -> impl DoubleEndedIterator<Item = &Bookmark> {
        self.bookmarks.iter()
    }

    /// The newest bookmark of this name.
    pub fn bookmark(&self, name: &str) -> Option<&Bookmark> {
        self.bookmarks.newest(name)
    }

    /// Pinned ones, from old to new.
    pub fn kept(&self) -> impl Iterator<Item = &Bookmark> {
        self.bookmarks.iter().filter(|bookmark| bookmark.kept)
    }

    /// How many are pinned.
    pub fn kept_count(&self) -> usize {
        self.bookmarks.kept()
    }
}

fn new_if(new: bool) -> Applied {
    if new { Applied::New } else { Applied::Known }
}
