//! From what was asked to the exact point, or to why there is none.

use super::marks::{Gap, hex};
use super::state::Chronicle;
use super::{Bookmark, HeightTime};
use crate::points::TimeEnd;
use varve_common::clock::is_setback;
use varve_common::control::{show_exact_time, show_position};
use varve_common::format::chronicle::NO_END;
use varve_common::point::{Consistency, LocatedPoint, PointSpec};
use varve_common::problem::Problem;
use varve_common::state::GapReason;

/// Close names that an error lists.
const NAMES_MAX: usize = 5;

/// When records of the stream ended: known to the layers.
pub trait Times {
    /// The newest record at or before a time.
    fn at_or_before(&self, time_ns: u64) -> Option<HeightTime>;
    /// The oldest record after a time.
    fn after(&self, time_ns: u64) -> Option<HeightTime>;
    /// The newest record that ends at or below a height.
    fn at_height(&self, height: u64) -> Option<HeightTime>;
    /// How far a time is looked for: the source's clock may have shown it twice. `newest_ns`: of the newest point.
    fn end_of(&self, _time_ns: u64, _newest_ns: u64) -> TimeEnd {
        TimeEnd::Newest
    }
}

/// Why a point cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PointError {
    /// It lies in a gap. The points next to it.
    #[error("it lies in a gap: {}", if after.is_some() { reason.explain_closed() } else { reason.explain() })]
    InGap {
        /// Why there is a gap.
        reason: GapReason,
        /// The last point before.
        before: Option<HeightTime>,
        /// Its position, if its time has come again since: the clock was set back.
        before_position: Option<String>,
        /// The first point after.
        after: Option<HeightTime>,
    },
    /// What it needs is damaged. The points next to it.
    #[error("the history that it needs is damaged: {what}")]
    Damaged {
        /// What.
        what: String,
        /// The last point before.
        before: Option<HeightTime>,
        /// The first point after.
        after: Option<HeightTime>,
    },
    /// The source's clock was ahead, and was set right while nothing came.
    #[error("the production host's clock was ahead and was set right, and nothing came from it at that time")]
    ClockSetRight {
        /// The position of the last point before; its time is later than what was asked.
        before: String,
        /// Time of the first point after.
        after_ns: Option<u64>,
    },
    /// It is older than the oldest point.
    #[error("it is older than the oldest point")]
    BeforeWindow {
        /// The oldest point.
        first: HeightTime,
    },
    /// Nothing can be recovered yet.
    #[error("nothing can be recovered yet: {}", .0.explain())]
    NoPoint(GapReason),
    /// No bookmark has this name. Names that are close.
    #[error("there is no bookmark of this name")]
    NoBookmark {
        /// What was asked.
        name: String,
        /// Names that are there.
        close: Vec<String>,
    },
    /// No stream of the window has such an incarnation.
    #[error("no stream that can be recovered has this incarnation")]
    NoIncarnation {
        /// What was asked.
        prefix: String,
        /// The newest stream's position.
        newest: Option<String>,
    },
    /// Several incarnations begin with these digits.
    #[error("several streams begin with these digits")]
    Ambiguous {
        /// Their digits.
        incarnations: Vec<String>,
    },
    /// The stream of that incarnation has nothing at this offset.
    #[error("its stream has no such offset")]
    NoPosition {
        /// The newest position of that stream that can be recovered.
        newest: Option<String>,
    },
}

impl PointError {
    /// As an operator is told.
    pub fn problem(&self, group: &str, asked: &str) -> Problem {
        let what = format!("'{}' is no point of group '{group}'", asked.escape_debug());
        let points = format!("'varve points {group}' shows what can be recovered");
        match self {
            Self::InGap { before_position: Some(before), after, .. } => {
                Problem::refused(what, self.to_string(), beside_position(before, after.map(|after| after.1)))
            }
            Self::InGap { before, after, .. } | Self::Damaged { before, after, .. } => {
                Problem::refused(what, self.to_string(), beside(*before, *after).unwrap_or(points))
            }
            Self::ClockSetRight { before, after_ns } => {
                Problem::refused(what, self.to_string(), beside_position(before, *after_ns))
            }
            Self::BeforeWindow { first } => {
                let next = format!("the oldest point: --at {}; {points}", show_exact_time(first.1));
                Problem::not_found(what, self.to_string(), next)
            }
            Self::NoPoint(_) => {
                Problem::refused(what, self.to_string(), format!("'varve status {group}' shows how far it is"))
            }
            Self::NoBookmark { close, .. } => {
                let next = match &close[..] {
                    [] => points,
                    close => format!("close names: {}; {points}", close.join(", ")),
                };
                Problem::not_found(what, self.to_string(), next)
            }
            Self::Ambiguous { incarnations } => {
                let next = format!("say more digits; there are {}", incarnations.join(", "));
                Problem::usage(what, self.to_string(), next)
            }
            Self::NoIncarnation { newest, .. } | Self::NoPosition { newest } => {
                let next = match newest {
                    Some(newest) => format!("the newest position: pos:{newest}; {points}"),
                    None => points,
                };
                Problem::not_found(what, self.to_string(), next)
            }
        }
    }
}

fn beside(before: Option<HeightTime>, after: Option<HeightTime>) -> Option<String> {
    let before = before.map(|(_, time)| format!("the nearest before: --at {}", show_exact_time(time)));
    let after = after.map(|(_, time)| format!("the nearest after: --at {}", show_exact_time(time)));
    let both: Vec<String> = before.into_iter().chain(after).collect();
    (!both.is_empty()).then(|| both.join("; "))
}

fn beside_position(before: &str, after_ns: Option<u64>) -> String {
    let after = after_ns.map(|after_ns| format!("; the nearest after: --at {}", show_exact_time(after_ns)));
    format!("the nearest before: --at pos:{before}{}", after.unwrap_or_default())
}

impl Chronicle {
    /// The point that `spec` means. `now_ns` is the receiver's time, for ages; `oldest` the lowest height that layers can
    /// read; `newest` the newest height and time that there is.
    pub fn locate(
        &self,
        spec: &PointSpec,
        now_ns: u64,
        times: &dyn Times,
        oldest: u64,
        newest: HeightTime,
    ) -> Result<LocatedPoint, PointError> {
        let look = Look { chronicle: self, times, oldest: oldest.max(self.oldest.0), newest };
        let (found, distance_ns) = match spec {
            PointSpec::Latest => {
                let found = look.at_or_below(newest.0).ok_or_else(|| look.nothing())?;
                (found, distance(found.1, newest.1))
            }
            PointSpec::Bookmark(name) => (look.bookmark(name)?, 0),
            PointSpec::Position { incarnation_prefix, offset } => (look.position(incarnation_prefix, *offset)?, 0),
            PointSpec::Time(_) | PointSpec::Age(_) => {
                let time_ns = spec.time_ns(now_ns).unwrap_or(now_ns);
                let found = look.time(time_ns)?;
                (found, distance(found.1, time_ns))
            }
        };
        Ok(LocatedPoint {
            height: found.0,
            time_ns: found.1,
            position: self.show_position(found.0),
            consistency: self.consistency(found.0),
            asked: spec.to_string(),
            distance_ns,
        })
    }

    /// The position at `height` as people see it.
    pub fn show_position(&self, height: u64) -> String {
        match self.position_of(height) {
            Some((incarnation, position)) => show_position(&incarnation, position),
            None => "unknown".to_owned(),
        }
    }

    /// What the point at `height` promises: the most that a bookmark there says.
    pub fn consistency(&self, height: u64) -> Consistency {
        let said = self.bookmarks.at(height).map(|bookmark: &Bookmark| bookmark.consistency);
        said.max_by_key(|consistency| *consistency as u8).unwrap_or_default()
    }

    /// The height of a position in the one stream whose incarnation begins with `prefix`: of those with the same state
    /// before it, the newest that is a point.
    pub fn height_of(&self, prefix: &str, position: u64) -> Result<u64, PointError> {
        let prefix = prefix.to_ascii_lowercase();
        let incarnation = match &self.marks.incarnations(&prefix)[..] {
            [one] => *one,
            [] => {
                let newest = self.marks.newest().and_then(|height| self.position_of(height));
                let newest = newest.map(|(incarnation, position)| show_position(&incarnation, position));
                return Err(PointError::NoIncarnation { prefix, newest });
            }
            several => return Err(PointError::Ambiguous { incarnations: several.iter().map(hex).collect() }),
        };
        // A mark that opens a gap raises the height and not the position: the same position on both sides of it.
        let heights = self.marks.heights(&incarnation, position);
        let good = heights.iter().find(|height| self.is_point(**height));
        good.or(heights.first()).copied().ok_or(PointError::NoPosition { newest: None })
    }
}

/// From what was asked to what was taken; what does not fit is as far as can be said.
fn distance(taken_ns: u64, asked_ns: u64) -> i64 {
    let distance = i128::from(taken_ns) - i128::from(asked_ns);
    distance.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
}

struct Look<'a> {
    chronicle: &'a Chronicle,
    times: &'a dyn Times,
    oldest: u64,
    newest: HeightTime,
}

impl Look<'_> {
    /// Why there is no point at all.
    fn nothing(&self) -> PointError {
        let gap = self.chronicle.gap_at(self.newest.0);
        match (gap, self.chronicle.damage_at(self.newest.0)) {
            (None, Some(damage)) => PointError::Damaged { what: damage.what.clone(), before: None, after: None },
            (gap, _) => PointError::NoPoint(gap.map_or(GapReason::InitialSync, |gap| gap.reason)),
        }
    }

    /// The newest record or mark that is not above; behind the window's begin there is none.
    fn nearest(&self, height: u64) -> Option<HeightTime> {
        let known = self.chronicle.known_at_or_below(height);
        let record = self.times.at_height(height).filter(|record| record.0 <= height);
        known.into_iter().chain(record).max()
    }

    /// A height with a time: of the newest record or mark that is not above.
    fn timed(&self, height: u64) -> HeightTime {
        // Nothing changed between: the state is the same, unless what is found is no point.
        match self.nearest(height) {
            Some(nearest) if nearest.0 >= self.oldest && self.chronicle.is_point(nearest.0) => nearest,
            Some((_, time_ns)) => (height, time_ns),
            None => (height, self.chronicle.oldest.1),
        }
    }

    /// The newest point not above `height`.
    fn at_or_below(&self, height: u64) -> Option<HeightTime> {
        let height = self.chronicle.point_at_or_below(height).filter(|height| *height >= self.oldest)?;
        if height == self.newest.0 {
            return Some(self.newest);
        }
        Some(self.timed(height))
    }

    /// The oldest point not below `height`.
    fn at_or_above(&self, height: u64) -> Option<HeightTime> {
        let height = self.chronicle.point_at_or_above(height.max(self.oldest))?;
        (height <= self.newest.0).then(|| self.exact(height))
    }

    /// A height that is a mark, a record's end or the newest, with its own time.
    fn exact(&self, height: u64) -> HeightTime {
        if height == self.newest.0 { self.newest } else { (height, self.timed(height).1) }
    }

    /// The oldest point not below `height` that a time gives: damage may end between two records.
    fn named_from(&self, height: u64) -> Option<HeightTime> {
        let at = self.at_or_above(height)?;
        if at.0 == self.newest.0 || self.nearest(at.0).is_some_and(|nearest| nearest.0 == at.0) {
            return Some(at);
        }
        let next = self.times.after(at.1).filter(|next| next.0 >= at.0 && self.chronicle.is_point(next.0))?;
        (next.0 <= self.newest.0).then_some(next)
    }

    fn first(&self) -> PointError {
        match self.at_or_above(self.oldest) {
            Some(first) => PointError::BeforeWindow { first },
            None => self.nothing(),
        }
    }

    fn in_gap(&self, gap: &Gap) -> PointError {
        let before = gap.from.and_then(|from| self.at_or_below(from.0));
        let after = gap.to.and_then(|to| self.at_or_above(to.0));
        if before.is_none() && after.is_none() {
            return PointError::NoPoint(gap.reason);
        }
        let came_again = before.filter(|before| after.unwrap_or(self.newest).1 < before.1);
        let before_position = came_again.map(|before| self.chronicle.show_position(before.0));
        PointError::InGap { reason: gap.reason, before, before_position, after }
    }

    /// The point at `height`, if it is one.
    fn checked(&self, height: u64) -> Result<HeightTime, PointError> {
        if let Some(gap) = self.chronicle.gap_at(height) {
            // Neither end is there any more: then it is only old.
            let ended = gap.to.is_some_and(|to| to.0 <= self.oldest);
            return Err(if ended { self.first() } else { self.in_gap(&gap) });
        }
        if height < self.oldest {
            return Err(self.first());
        }
        if let Some(damage) = self.chronicle.damage_at(height) {
            let before = damage.from.checked_sub(1).and_then(|height| self.at_or_below(height));
            let after = Some(damage.to).filter(|to| *to != NO_END).and_then(|to| self.named_from(to));
            return Err(PointError::Damaged { what: damage.what.clone(), before, after });
        }
        Ok(self.exact(height))
    }

    fn bookmark(&self, name: &str) -> Result<HeightTime, PointError> {
        let Some(bookmark) = self.chronicle.bookmark(name) else {
            let close = self.chronicle.bookmarks.close_names(name, NAMES_MAX);
            return Err(PointError::NoBookmark { name: name.to_owned(), close });
        };
        self.checked(bookmark.height)?;
        Ok((bookmark.height, bookmark.time_ns))
    }

    fn position(&self, prefix: &str, offset: u64) -> Result<HeightTime, PointError> {
        let newest = || {
            let (incarnation, position) = self.chronicle.position_of(self.newest.0)?;
            Some(show_position(&incarnation, position))
        };
        let height = match self.chronicle.height_of(prefix, offset) {
            Err(PointError::NoPosition { .. }) => return Err(PointError::NoPosition { newest: newest() }),
            Err(PointError::NoIncarnation { prefix, .. }) => {
                return Err(PointError::NoIncarnation { prefix, newest: newest() });
            }
            found => found?,
        };
        if height > self.newest.0 {
            return Err(PointError::NoPosition { newest: newest() });
        }
        self.checked(height)?;
        // The height stays: what is found below it may be another state, where records cannot be read.
        Ok(self.exact(height))
    }

    /// The newest point at or before a time, unless a gap was open then.
    fn time(&self, time_ns: u64) -> Result<HeightTime, PointError> {
        let until = match self.times.end_of(time_ns, self.newest.1) {
            TimeEnd::Newest => self.newest.0,
            TimeEnd::Height(height) => height.min(self.newest.0),
            TimeEnd::SetRight { before, after_ns } => {
                // A host that comes again with another ring begins with a gap.
                let after_ns = match self.chronicle.gap_above(before) {
                    Some(gap) => gap.to.and_then(|to| self.at_or_above(to.0)).map(|after| after.1),
                    None => Some(after_ns),
                };
                let Some(before) = self.at_or_below(before) else { return Err(self.first()) };
                let before = self.chronicle.show_position(before.0);
                return Err(PointError::ClockSetRight { before, after_ns });
            }
        };
        let beyond = until == self.newest.0 && time_ns >= self.newest.1;
        let record = if beyond { Some(self.newest) } else { self.times.at_or_before(time_ns) };
        let mark = self.chronicle.marks.at_or_before(time_ns, until);
        // The window's begin may be a record whose layer is gone.
        let begin = Some(self.chronicle.oldest).filter(|begin| begin.0 > 0 && begin.1 <= time_ns);
        let candidates = record.into_iter().chain(mark).chain(begin).filter(|at| at.0 <= until);
        let Some(mut at) = candidates.max() else { return Err(self.first()) };
        if at.0 < self.oldest && self.nearest(self.oldest).is_some_and(|nearest| nearest.0 <= at.0) {
            // Nothing changed between: the state is the same.
            at.0 = self.oldest;
        }
        // Asked of the marks by time: the height at which a gap ends can be the one at which it began, and then the time
        // says which is meant.
        // One that is over below what was found is of the time before the clock was set back.
        let over = |gap: &Gap| gap.to.is_some_and(|to| to.0 < at.0);
        if let Some(gap) = self.chronicle.marks.gap_at_time(time_ns, until).filter(|gap| !over(gap)) {
            return match gap.from {
                // A gap's own begin is a point; what came after it in time is not, nor what came after the clock was set back.
                Some(from) if time_ns <= from.1 && !is_setback(from.1, time_ns) => self.checked(from.0).map(|_| from),
                _ if gap.to.is_some_and(|to| to.0 <= self.oldest) => Err(self.first()),
                _ => Err(self.in_gap(&gap)),
            };
        }
        self.checked(at.0)?;
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_with_points_behind_it_is_told_as_past() {
        let told = |after| {
            PointError::InGap { reason: GapReason::Rollback, before: None, before_position: None, after }.to_string()
        };
        assert_eq!(told(Some((8, 1))), "it lies in a gap: the replicas were rolled back or taken over");
        assert!(told(None).contains("run the same command again"));
    }
}
