//! What `varve points` says of a chronicle.

use super::marks::hex;
use super::state::Chronicle;
use super::{HeightTime, Times};
use varve_common::control::{
    BookmarkStatus, DamageStatus, GapStatus, PointsReply, RollbackStatus, StretchStatus, Window, show_exact_time,
};
use varve_common::format::chronicle::NO_END;

impl Chronicle {
    /// The reply without what only layers know: numbers, density, what kept bookmarks cost. `from_ns`, `to_ns`: only what
    /// reaches into that time.
    pub fn report(
        &self,
        group: &str,
        (from_ns, to_ns): (Option<u64>, Option<u64>),
        times: &dyn Times,
        oldest: u64,
        newest: HeightTime,
    ) -> PointsReply {
        let (from_ns, to_ns) = (from_ns.unwrap_or(0), to_ns.unwrap_or(u64::MAX));
        let inside = |begin: u64, end: Option<u64>| begin <= to_ns && end.is_none_or(|end| end >= from_ns);
        let oldest = oldest.max(self.oldest.0);
        let time_of = |height: u64| match height {
            _ if height >= newest.0 => newest.1,
            _ => {
                let known = self.known_at_or_below(height);
                known.into_iter().chain(times.at_height(height)).max().map_or(self.oldest.1, |at| at.1)
            }
        };
        let show = |time_ns: u64| show_exact_time(time_ns);
        let gaps = self
            .marks
            .gaps()
            .into_iter()
            .filter(|gap| gap.to.is_none_or(|to| to.0 > oldest) && inside(gap.began_ns, gap.to.map(|to| to.1)));
        let stretches = self.stretches();
        let ends = stretches.iter().skip(1).map(|next| Some(next.from)).chain([None]);
        let stretches = stretches.iter().zip(ends).filter(|(stretch, end)| {
            end.is_none_or(|end| end.0 > oldest) && inside(stretch.from.1, end.map(|end| end.1))
        });
        let damaged = self.damages.iter().filter(|damage| damage.to > oldest).filter_map(|damage| {
            let from = damage.from.checked_sub(1).filter(|height| *height >= oldest).map(&time_of);
            let to = (damage.to != NO_END && damage.to <= newest.0).then(|| time_of(damage.to));
            let status = DamageStatus { from: from.map(show), to: to.map(show), what: damage.what.clone() };
            inside(from.unwrap_or(0), to).then_some(status)
        });
        let bookmarks = self.bookmarks.iter().filter(|b| b.height >= oldest && inside(b.time_ns, Some(b.time_ns)));
        let window = self.window(oldest, newest.0);
        PointsReply {
            group: group.to_owned(),
            window: Window {
                from: window.map(|(first, _)| show(time_of(first))),
                to: window.map(|(_, last)| show(time_of(last))),
            },
            bookmarks: bookmarks
                .map(|bookmark| BookmarkStatus {
                    name: bookmark.name.clone(),
                    time: show(bookmark.time_ns),
                    position: self.show_position(bookmark.height),
                    consistency: bookmark.consistency,
                    recoverable: self.is_point(bookmark.height),
                    kept: bookmark.kept,
                    kept_bytes: None,
                })
                .collect(),
            gaps: gaps
                .map(|gap| GapStatus { from: show(gap.began_ns), to: gap.to.map(|to| show(to.1)), reason: gap.reason })
                .collect(),
            damaged: damaged.collect(),
            stretches: stretches
                .map(|(stretch, end)| StretchStatus {
                    incarnation: hex(&stretch.place.incarnation),
                    from: show(stretch.from.1),
                    to: end.map(|end| show(end.1)),
                    epoch: stretch.place.epoch,
                })
                .collect(),
            rollbacks: self
                .rollbacks()
                .filter(|(made, _)| made.0 > oldest && inside(made.1, Some(made.1)))
                .map(|(made, to)| RollbackStatus { time: show(made.1), to: show(to.1) })
                .collect(),
            ..PointsReply::default()
        }
    }
}
