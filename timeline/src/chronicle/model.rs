//! Tests of the whole chronicle: against a model that keeps every height, and of its file against tears and damage.

use super::state::Chronicle;
use super::{Event, HeightTime, PointError, StreamFacts, Times};
use crate::points::TimeEnd;
use proptest::prelude::*;
use varve_common::point::{Consistency, PointSpec};
use varve_common::state::GapReason;
use varve_common::wire::messages::Incarnation;

/// What the applier may see.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// A record of this many eighths.
    Record(u64),
    /// A bookmark with this name.
    Bookmark(u8),
    /// A mark that opens a gap.
    GapBegin(u8),
    /// A new ring, or a jump in one.
    Begin(u8, u64),
    /// The end of a gap.
    GapEnd,
    /// Pin or let go.
    Keep(u8, bool),
    /// To one of the points.
    RollBack(u8),
    /// The oldest part of the points goes.
    Expire(u8),
    /// A stretch of the points is damaged.
    Damage(u8, u8),
}

/// One place of the stream at which the replicas stood.
#[derive(Clone, Copy, Debug)]
struct Stand {
    height: u64,
    time_ns: u64,
    good: bool,
    at: (Incarnation, u64),
    /// A record or mark of its own: what a time finds.
    named: bool,
}

/// Every place, in the plainest way.
#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    stands: Vec<Stand>,
    pub(super) events: Vec<Event>,
    height: u64,
    time_ns: u64,
    at: (Incarnation, u64),
    ever: bool,
    gap: Option<u8>,
    oldest: HeightTime,
    damages: Vec<(u64, u64)>,
    bookmarks: Vec<(u64, u64, String, bool)>,
}

impl Model {
    pub(super) fn run(steps: &[Step]) -> Self {
        let mut model = Self { gap: Some(1), ..Self::default() };
        model.mark(Some(([1; 16], 64)), 1);
        steps.iter().for_each(|step| model.step(step));
        model
    }

    fn good(&self) -> bool {
        self.gap.is_none() && self.ever
    }

    fn stand(&mut self, named: bool) {
        let (height, time_ns, good, at) = (self.height, self.time_ns, self.good(), self.at);
        self.stands.push(Stand { height, time_ns, good, at, named });
    }

    /// As the applier tells of a mark that opens a gap.
    fn mark(&mut self, begin: Option<(Incarnation, u64)>, reason: u8) {
        self.time_ns += 10;
        let reason_word = GapReason::from_number(reason).expect("a reason");
        if self.ever && self.gap != Some(reason) {
            let (height, time_ns) = (self.height, self.time_ns);
            if self.good() {
                self.stand(true);
            }
            self.events.push(Event::GapBegin { height, time_ns, reason: reason_word });
        }
        self.gap = Some(reason);
        self.at = begin.unwrap_or(self.at);
        self.height += 8;
        let ((incarnation, position), height, time_ns) = (self.at, self.height, self.time_ns);
        self.events.push(Event::Begin { height, time_ns, incarnation, position, epoch: 1 });
        self.stand(true);
    }

    fn step(&mut self, step: &Step) {
        let name = |number: &u8| format!("b{}", number % 4);
        match step {
            Step::Record(_) | Step::Bookmark(_) => {
                let bytes = if let Step::Record(eighths) = step { 8 * (1 + eighths % 600) } else { 48 };
                self.time_ns += 10;
                self.height += bytes;
                self.at.1 += bytes;
                self.stand(true);
                if let Step::Bookmark(number) = step {
                    let (height, time_ns, name) = (self.height, self.time_ns, name(number));
                    self.bookmarks.push((height, time_ns, name.clone(), false));
                    let consistency = Consistency::Crash;
                    self.events.push(Event::Bookmark { height, time_ns, name, consistency });
                }
            }
            Step::GapBegin(reason) => self.mark(None, 1 + reason % 12),
            Step::Begin(number, position) => self.mark(Some(([1 + number % 3; 16], position % 4096 * 8)), 2),
            Step::GapEnd if self.gap.is_some() => {
                self.time_ns += 10;
                (self.gap, self.ever) = (None, true);
                let (height, time_ns) = (self.height, self.time_ns);
                self.events.push(Event::GapEnd { height, time_ns });
                self.stand(true);
            }
            Step::Keep(number, keep) => self.keep(&name(number), *keep),
            Step::RollBack(which) => self.roll_back(usize::from(*which)),
            Step::Expire(which) => {
                let stand = self.stands[usize::from(*which) % self.stands.len()];
                if stand.height > self.oldest.0 {
                    self.oldest = (stand.height, stand.time_ns);
                    self.bookmarks.retain(|bookmark| bookmark.0 >= stand.height);
                    self.events.push(Event::Expired { height: stand.height, time_ns: stand.time_ns });
                }
            }
            Step::Damage(from, length) => {
                let from = usize::from(*from) % self.stands.len();
                let to = (from + 1 + usize::from(*length) % 4).min(self.stands.len() - 1);
                let (from, to) = (self.stands[from].height, self.stands[to].height);
                if from < to {
                    self.damages.push((from, to));
                    self.events.push(Event::damaged(from, to, "layer 1"));
                }
            }
            _ => {}
        }
    }

    fn keep(&mut self, name: &str, keep: bool) {
        if keep {
            if let Some(newest) = self.bookmarks.iter_mut().rev().find(|bookmark| bookmark.2 == name) {
                newest.3 = true;
            }
            self.events.push(Event::Keep { name: name.to_owned() });
        } else {
            self.bookmarks.iter_mut().filter(|bookmark| bookmark.2 == name).for_each(|bookmark| bookmark.3 = false);
            self.events.push(Event::Release { name: name.to_owned() });
        }
    }

    fn roll_back(&mut self, which: usize) {
        let points: Vec<Stand> = self.stands.iter().copied().filter(|stand| self.is_point(stand)).collect();
        if points.is_empty() {
            return;
        }
        let to = points[which % points.len()];
        self.time_ns += 10;
        self.height += 8;
        self.gap = None;
        let (height, time_ns) = (self.height, self.time_ns);
        self.events.push(Event::RolledBack { height, time_ns, to_height: to.height, to_time_ns: to.time_ns });
        self.stand(true);
        // The stream only goes on behind a mark.
        self.mark(None, 11);
    }

    fn is_point(&self, stand: &Stand) -> bool {
        let damaged = self.damages.iter().any(|(from, to)| (*from..*to).contains(&stand.height));
        stand.good && stand.height >= self.oldest.0 && !damaged
    }

    /// What an applied mark says at the end.
    pub(super) fn facts(&self) -> StreamFacts {
        let (height, time_ns) = self.newest();
        let gap = if self.good() { None } else { GapReason::from_number(self.gap.unwrap_or(1)) };
        StreamFacts { height, time_ns, incarnation: self.at.0, position: self.at.1, epoch: 1, gap }
    }

    /// Every height at which the stream stood, and its place.
    pub(super) fn places(&self) -> impl Iterator<Item = (u64, (Incarnation, u64))> {
        self.stands.iter().map(|stand| (stand.height, stand.at))
    }

    fn newest(&self) -> HeightTime {
        (self.height, self.time_ns)
    }
}

impl Times for Model {
    fn at_or_before(&self, time_ns: u64) -> Option<HeightTime> {
        let found = self.stands.iter().rev().find(|stand| stand.named && stand.time_ns <= time_ns)?;
        Some((found.height, found.time_ns))
    }

    fn after(&self, time_ns: u64) -> Option<HeightTime> {
        let found = self.stands.iter().find(|stand| stand.named && stand.time_ns > time_ns)?;
        Some((found.height, found.time_ns))
    }

    fn at_height(&self, height: u64) -> Option<HeightTime> {
        let found = self.stands.iter().rev().find(|stand| stand.named && stand.height <= height)?;
        Some((found.height, found.time_ns))
    }
}

pub(super) fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => any::<u64>().prop_map(Step::Record),
        2 => any::<u8>().prop_map(Step::Bookmark),
        2 => any::<u8>().prop_map(Step::GapBegin),
        1 => (any::<u8>(), any::<u64>()).prop_map(|(a, b)| Step::Begin(a, b)),
        4 => Just(Step::GapEnd),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(a, b)| Step::Keep(a, b)),
        1 => any::<u8>().prop_map(Step::RollBack),
        1 => (0u8..16).prop_map(Step::Expire),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(a, b)| Step::Damage(a, b)),
    ];
    prop::collection::vec(step, 0..60)
}

pub(super) fn chronicle_of(events: &[Event]) -> Chronicle {
    let mut chronicle = Chronicle::default();
    for event in events {
        chronicle.apply(event);
    }
    chronicle
}

/// Every question, against the model.
fn check(model: &Model, chronicle: &Chronicle) -> Result<(), TestCaseError> {
    let oldest = model.oldest.0;
    for stand in &model.stands {
        let height = stand.height;
        // The same height can be good for one reason and bad for another: a gap that ends where it began.
        let good = model.stands.iter().filter(|other| other.height == height).any(|other| model.is_point(other));
        prop_assert_eq!(chronicle.is_point(height), good, "{} {:?}", height, stand);
        if height >= oldest {
            prop_assert_eq!(chronicle.position_of(height), Some(stand.at), "{}", height);
            let hex = super::marks::hex(&stand.at.0);
            let found = chronicle.height_of(&hex[..8], stand.at.1);
            let found = found.map_err(|e| TestCaseError::fail(format!("{e} {stand:?}")))?;
            prop_assert_eq!(chronicle.position_of(found), Some(stand.at));
            prop_assert!(!good || chronicle.is_point(found), "{} {}", height, found);
        }
        let (below, above) = chronicle.neighbours(height);
        for neighbour in [below, above].into_iter().flatten() {
            prop_assert!(chronicle.is_point(neighbour));
        }
        prop_assert!(below.is_none_or(|below| below <= height) && above.is_none_or(|above| above >= height));
        let points = || model.stands.iter().filter(|stand| model.is_point(stand)).map(|stand| stand.height);
        prop_assert!(points().filter(|point| *point <= height).max() <= below, "{} {:?}", height, below);
        let nearest = points().filter(|point| *point >= height).min();
        prop_assert!(nearest.is_none_or(|nearest| above.is_some_and(|above| above <= nearest)));
    }
    let bookmarks: Vec<_> = chronicle.bookmarks().map(|b| (b.height, b.time_ns, b.name.clone(), b.kept)).collect();
    prop_assert_eq!(&bookmarks, &model.bookmarks);
    Ok(())
}

/// What a time gives: the newest stand at or before it, if nothing was open then.
fn check_time(model: &Model, chronicle: &Chronicle, time_ns: u64) -> Result<(), TestCaseError> {
    let found = chronicle.locate(&PointSpec::Time(time_ns), 0, model, model.oldest.0, model.newest());
    let index = model.stands.iter().rposition(|stand| stand.time_ns <= time_ns);
    match found {
        Ok(point) => {
            let stand = index.map(|index| model.stands[index]);
            prop_assert!(chronicle.is_point(point.height));
            let began = model.stands.iter().any(|s| s.height == point.height && s.time_ns == time_ns && s.good);
            prop_assert!(began || stand.is_some_and(|stand| stand.height == point.height), "{point:?} {stand:?}");
            prop_assert_eq!(point.distance_ns, point.time_ns as i64 - time_ns as i64);
            prop_assert!(point.time_ns <= time_ns);
            // What is shown gives the same point again.
            let again = chronicle.locate(&PointSpec::Time(point.time_ns), 0, model, model.oldest.0, model.newest());
            prop_assert_eq!(again.map(|again| again.height), Ok(point.height));
        }
        Err(error) => {
            // At the gap's very begin both answers are right; this one asks for what came before.
            let stand = index.map(|index| model.stands[index]);
            prop_assert!(stand.is_none_or(|stand| !model.is_point(&stand)), "{error:?} {stand:?}");
            for (height, time_ns) in neighbours_of(&error) {
                prop_assert!(chronicle.is_point(height), "{error:?}");
                let there = chronicle.locate(&PointSpec::Time(time_ns), 0, model, model.oldest.0, model.newest());
                prop_assert!(there.is_ok(), "{error:?}: {time_ns}: {there:?}");
            }
        }
    }
    Ok(())
}

fn neighbours_of(error: &PointError) -> Vec<HeightTime> {
    match error {
        PointError::InGap { before, after, .. } | PointError::Damaged { before, after, .. } => {
            before.iter().chain(after).copied().collect()
        }
        PointError::BeforeWindow { first } => vec![*first],
        _ => Vec::new(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_is_the_models(steps in steps(), replay in 0usize..60) {
        let model = Model::run(&steps);
        let chronicle = chronicle_of(&model.events);
        check(&model, &chronicle)?;
        // Written anew with the fewest events.
        check(&model, &chronicle_of(&chronicle.events()))?;
        // What a receiver says again after a crash is known.
        let mut again = chronicle.clone();
        for event in &model.events[replay.min(model.events.len())..] {
            let of_stream = !matches!(event, Event::Keep { .. } | Event::Release { .. } | Event::Damaged { .. });
            if of_stream {
                prop_assert_eq!(again.apply(event), super::Applied::Known, "{:?}", event);
            }
        }
        check(&model, &again)?;
    }

    #[test]
    fn every_time_is_the_models(steps in steps(), times in prop::collection::vec(0u64..700, 20)) {
        let model = Model::run(&steps);
        let chronicle = chronicle_of(&model.events);
        for time_ns in times {
            check_time(&model, &chronicle, time_ns)?;
        }
        let rewritten = chronicle_of(&chronicle.events());
        for stand in &model.stands {
            check_time(&model, &chronicle, stand.time_ns)?;
            check_time(&model, &rewritten, stand.time_ns + 5)?;
        }
    }
}

/// A table of what is asked and answered: a gap from 2000 to 3000, a damaged stretch from 4000 to 4500, nothing before 800.
#[test]
fn points_and_refusals() {
    let second = 1_000_000_000;
    let begin = |height, incarnation, position| Event::Begin {
        height,
        time_ns: height * second,
        incarnation,
        position,
        epoch: 1,
    };
    let bookmark = |height, name: &str| {
        let consistency = Consistency::App;
        Event::Bookmark { height, time_ns: height * second, name: name.into(), consistency }
    };
    let chronicle = chronicle_of(&[
        begin(8, [0xab; 16], 64),
        Event::GapEnd { height: 800, time_ns: 800 * second },
        bookmark(1000, "before-upgrade"),
        Event::GapBegin { height: 2000, time_ns: 2000 * second, reason: GapReason::RingFull },
        begin(2008, [0xab; 16], 2056),
        bookmark(2400, "in-gap"),
        Event::GapEnd { height: 3000, time_ns: 3000 * second },
        Event::damaged(4000, 4500, "layer 3"),
        begin(8000, [0xac; 16], 0),
    ]);
    let times = Every(second);
    let ask = |text: &str| {
        let number = |text: &str| text.parse::<u64>().expect("a number");
        let spec = match text.split_at(1) {
            ("@", seconds) => PointSpec::Time(number(seconds) * second),
            ("-", seconds) => PointSpec::Age(std::time::Duration::from_secs(number(seconds))),
            ("b", _) => PointSpec::Bookmark(text[9..].to_owned()),
            ("p", _) => {
                let (prefix, offset) = text[4..].split_once(':').expect("a position");
                PointSpec::Position { incarnation_prefix: prefix.to_owned(), offset: number(offset) }
            }
            _ => PointSpec::Latest,
        };
        let found = chronicle.locate(&spec, 5000 * second, &times, 0, (6000, 6000 * second));
        found.map(|point| (point.height, point.distance_ns / second as i64)).map_err(|e| e.problem("db", text))
    };
    let good = [
        ("latest", 6000, 0),
        ("bookmark:before-upgrade", 1000, 0),
        ("@1001", 1000, -1),
        ("@2000", 2000, 0),
        ("@3000", 3000, 0),
        ("@315532800", 6000, 6000 - 315_532_800),
        ("pos:abab:1056", 1000, 0),
        ("pos:abababab:3048", 3000, 0),
        // On both sides of the mark: the state before it.
        ("pos:abababab:2056", 2000, 0),
    ];
    for (text, height, distance) in good {
        assert_eq!(ask(text), Ok((height, distance)), "{text}");
    }
    let refused = [
        (
            "@2400",
            3,
            "the ring was full",
            "before: --at 1970-01-01T00:33:20Z; the nearest after: --at 1970-01-01T00:50:00Z",
        ),
        ("bookmark:in-gap", 3, "lies in a gap", "--at 1970-01-01T00:33:20Z"),
        (
            "-1000",
            3,
            "damaged: layer 3",
            "the nearest before: --at 1970-01-01T01:06:32Z; the nearest after: --at 1970-01-01T01:15:04Z",
        ),
        ("pos:abababab:2064", 3, "lies in a gap", "--at"),
        ("@1", 3, "first sync had not finished", "--at 1970-01-01T00:13:20Z"),
        ("bookmark:before-upgrad", 5, "no bookmark", "close names: before-upgrade"),
        ("pos:dddd:8", 5, "has this incarnation", "newest position: pos:abababab:6048"),
        ("pos:abababab:999999", 5, "no such offset", "newest position: pos:abababab:6048"),
        ("pos:acacacac:8", 5, "no such offset", "newest position"),
    ];
    for (text, code, why, next) in refused {
        match ask(text) {
            Ok(found) => panic!("{text}: {found:?}"),
            Err(problem) => {
                assert_eq!(problem.kind.exit_code(), code, "{text}: {problem:?}");
                assert!(problem.why.contains(why) && problem.next.contains(next), "{text}: {problem:?}");
                assert!(problem.what.contains(text), "{problem:?}");
            }
        }
    }
    let height_of = |prefix| chronicle.height_of(prefix, 8);
    assert!(matches!(height_of("a"), Err(PointError::Ambiguous { incarnations }) if incarnations.len() == 2));
    assert_eq!(chronicle.consistency(1000), Consistency::App);
    assert_eq!(chronicle.consistency(1008), Consistency::Crash);

    let report = chronicle.report("db", (None, None), &times, 0, (6000, 6000 * second));
    assert_eq!(report.window.from.as_deref(), Some("1970-01-01T00:13:20Z"));
    assert_eq!(report.window.to.as_deref(), Some("1970-01-01T01:40:00Z"));
    let recoverable: Vec<bool> = report.bookmarks.iter().map(|bookmark| bookmark.recoverable).collect();
    assert_eq!(recoverable, [true, false]);
    assert_eq!(
        report.gaps.iter().map(|gap| gap.reason).collect::<Vec<_>>(),
        [GapReason::InitialSync, GapReason::RingFull]
    );
    let damage = (report.damaged[0].from.as_deref(), report.damaged[0].to.as_deref());
    assert_eq!(damage, (Some("1970-01-01T01:06:32Z"), Some("1970-01-01T01:14:56Z")));
    let late = chronicle.report("db", (Some(3500 * second), None), &times, 0, (6000, 6000 * second));
    assert!(late.gaps.is_empty() && late.bookmarks.is_empty() && late.damaged.len() == 1);
}

/// A record at every multiple of 8, its height in units of time for a time.
struct Every(u64);

impl Times for Every {
    fn at_or_before(&self, time_ns: u64) -> Option<HeightTime> {
        self.at_height(time_ns / self.0)
    }

    fn after(&self, time_ns: u64) -> Option<HeightTime> {
        self.at_height(time_ns / self.0 + 8)
    }

    fn at_height(&self, height: u64) -> Option<HeightTime> {
        Some((height / 8 * 8, height / 8 * 8 * self.0))
    }
}

fn begin_at(height: u64, time_ns: u64) -> Event {
    Event::Begin { height, time_ns, incarnation: [7; 16], position: height, epoch: 1 }
}

/// The source's clock was a day ahead, and was set right while a gap was open: from 2000 to 3000.
#[test]
fn a_gap_in_which_the_clock_was_set_right() {
    let (second, ahead) = (1_000_000_000, 86_400);
    let chronicle = chronicle_of(&[
        begin_at(8, (ahead + 8) * second),
        Event::GapEnd { height: 800, time_ns: (ahead + 800) * second },
        Event::GapBegin { height: 2000, time_ns: (ahead + 2000) * second, reason: GapReason::RingFull },
        begin_at(2008, 2008 * second),
        Event::GapEnd { height: 3000, time_ns: 3000 * second },
    ]);
    let ask = |time: u64| {
        let spec = PointSpec::Time(time * second);
        let found =
            chronicle.locate(&spec, 0, &SetRight { second, ahead, at: 2000, to: 6000 }, 0, (6000, 6000 * second));
        found.map(|point| point.height)
    };
    let in_gap = PointError::InGap {
        reason: GapReason::RingFull,
        before: Some((2000, (ahead + 2000) * second)),
        before_position: Some(format!("{}:2000", "07".repeat(4))),
        after: Some((3000, 3000 * second)),
    };
    for time in [2008, 2100, 2992] {
        assert_eq!(ask(time), Err(in_gap.clone()), "{time}");
    }
    for (time, height) in [(3000, 3000), (3100, 3096), (ahead + 1000, 1000), (ahead + 2000, 2000)] {
        assert_eq!(ask(time), Ok(height), "{time}");
    }
}

/// A record at every multiple of 8; those up to `at` are dated too late by `ahead`.
struct SetRight {
    second: u64,
    ahead: u64,
    at: u64,
    /// The newest time since.
    to: u64,
}

impl Times for SetRight {
    fn at_or_before(&self, time_ns: u64) -> Option<HeightTime> {
        let time = time_ns / self.second;
        self.at_height(if self.end_of(time_ns, 0) != TimeEnd::Newest { (time - self.ahead).min(self.at) } else { time })
    }

    fn after(&self, _time_ns: u64) -> Option<HeightTime> {
        None
    }

    fn at_height(&self, height: u64) -> Option<HeightTime> {
        let height = height / 8 * 8;
        Some((height, (height + if height <= self.at { self.ahead } else { 0 }) * self.second))
    }

    fn end_of(&self, time_ns: u64, _newest_ns: u64) -> TimeEnd {
        let time = time_ns / self.second;
        if time >= self.ahead && time > self.to { TimeEnd::Height(self.at) } else { TimeEnd::Newest }
    }
}

/// A gap while the source's clock was an hour ahead, from 1000 to 1200, is none when the hour that it showed comes again.
#[test]
fn a_gap_of_an_hour_that_came_again() {
    let (second, ahead) = (1_000_000_000, 3600);
    let chronicle = chronicle_of(&[
        begin_at(8, 500 * second),
        Event::GapEnd { height: 800, time_ns: 600 * second },
        Event::GapBegin { height: 1000, time_ns: (ahead + 1000) * second, reason: GapReason::RingFull },
        begin_at(1008, (ahead + 1008) * second),
        Event::GapEnd { height: 1200, time_ns: (ahead + 1200) * second },
    ]);
    let ask = |time: u64| {
        let times = SetRight { second, ahead, at: 2000, to: 8000 };
        chronicle.locate(&PointSpec::Time(time * second), 0, &times, 0, (8000, 8000 * second)).map(|point| point.height)
    };
    // The stretch that is asked is the newer one.
    for time in [ahead + 1000, ahead + 1100, ahead + 1200] {
        assert_eq!(ask(time), Ok(time / 8 * 8), "{time}");
    }
}
