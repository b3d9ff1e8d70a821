//! What every point of the timeline holds, known from what was sent and from nothing else: the steps of the stream in the
//! order in which they landed, played again from the last snapshot.

use std::collections::BTreeMap;
use std::sync::Arc;
use varve_common::point::PointSpec;

pub type Volumes = Vec<Vec<u8>>;
/// Bytes of changes between two snapshots that the model takes by itself.
const SNAPSHOT_BYTES: usize = 24 << 20;

#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    Record,
    Bookmark(String),
    Begin,
    GapBegin,
    /// The replicas equal the volumes as they are then.
    GapEnd(Arc<Volumes>),
}

/// What a record does; `bytes`: where in the record's plain bytes its payload is, `None`: zeroes.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    pub volume: u16,
    pub offset: u64,
    pub length: u64,
    pub bytes: Option<usize>,
}

/// A record or a mark.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Number of the stream.
    pub stream: usize,
    /// After it.
    pub position: u64,
    pub time_ns: u64,
    pub kind: Kind,
    /// As it goes over the wire; empty for marks.
    pub plain: Vec<u8>,
    pub change: Option<Change>,
}

impl Step {
    pub fn is_record(&self) -> bool {
        matches!(self.kind, Kind::Record | Kind::Bookmark(_))
    }
}

impl Change {
    pub fn apply(&self, plain: &[u8], volumes: &mut Volumes) {
        let range = self.offset as usize..(self.offset + self.length) as usize;
        let target = &mut volumes[usize::from(self.volume)][range];
        match self.bytes {
            Some(at) => target.copy_from_slice(&plain[at..at + self.length as usize]),
            None => target.fill(0),
        }
    }
}

/// A step in the timeline.
#[derive(Clone, Debug)]
struct Landed {
    step: Step,
    /// The timeline's time: it does not go back.
    time_ns: u64,
    /// Whether the state after it is a point.
    point: bool,
    /// Bytes of changes so far.
    bytes: usize,
}

/// See the module's text.
#[derive(Default)]
pub struct Past {
    steps: Vec<Landed>,
    snapshots: BTreeMap<usize, Arc<Volumes>>,
    /// Names of streams, by number.
    pub streams: Vec<[u8; 16]>,
    /// Steps known to be durable at the receiver.
    pub durable: usize,
    pub sizes: Vec<u64>,
    /// Steps of which the time is only known to the microsecond: the receiver's own marks.
    pub vague: std::collections::BTreeSet<usize>,
}

/// What the timeline must say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The state after this step.
    After(usize),
    /// It lies in a gap.
    Gap,
}

pub fn hex(stream: &[u8; 16]) -> String {
    stream.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Times do not fall, unless by so much that the source's clock must have been wrong.
fn onward(before_ns: u64, then_ns: u64) -> u64 {
    if then_ns + 5_000_000_000 < before_ns { then_ns } else { before_ns.max(then_ns) }
}

impl Past {
    pub fn new(sizes: &[u64]) -> Self {
        Self { sizes: sizes.to_vec(), ..Self::default() }
    }

    pub fn len(&self) -> usize {
        self.steps.len()
    }

    pub fn step(&self, index: usize) -> &Step {
        &self.steps[index].step
    }

    pub fn time_ns(&self, index: usize) -> u64 {
        self.steps[index].time_ns
    }

    pub fn is_point(&self, index: usize) -> bool {
        self.steps[index].point
    }

    pub fn push(&mut self, step: Step) {
        let last = self.steps.last();
        let point = match step.kind {
            Kind::GapEnd(_) => true,
            Kind::Begin | Kind::GapBegin => false,
            _ => last.is_some_and(|last| last.point),
        };
        // That of records does not go back; a mark has its own.
        let newest = self.steps.iter().rev().find(|landed| landed.step.is_record()).map_or(0, |landed| landed.time_ns);
        // A gap begins with the last point before it: the mark tells of it when the agent gets there.
        let opens = !point && last.is_some_and(|last| last.point);
        let time_ns = match step.is_record() {
            true => onward(newest, step.time_ns),
            false if opens => self.steps.iter().fold(0, |now, landed| onward(now, landed.time_ns)),
            false => step.time_ns,
        };
        let bytes = last.map_or(0, |last| last.bytes) + step.change.as_ref().map_or(0, |change| change.length as usize);
        let index = self.steps.len();
        if let Kind::GapEnd(volumes) = &step.kind {
            self.snapshots.insert(index, volumes.clone());
        }
        self.steps.push(Landed { step, time_ns, point, bytes });
        let before = self.snapshots.last_key_value().map(|(index, _)| self.steps[*index].bytes);
        if point && before.is_some_and(|before| bytes - before > SNAPSHOT_BYTES) {
            let image = self.image(index);
            self.snapshots.insert(index, Arc::new(image));
        }
    }

    /// Forgets that the steps from `index` on were ever sent.
    pub fn cut(&mut self, index: usize) -> Vec<Step> {
        self.snapshots.split_off(&index);
        assert!(self.durable <= index, "step {index} was acknowledged, as {} were", self.durable);
        self.steps.split_off(index).into_iter().map(|landed| landed.step).collect()
    }

    /// What the volumes hold after a step that is a point.
    pub fn image(&self, index: usize) -> Volumes {
        assert!(self.steps[index].point);
        let (first, volumes) = self.snapshots.range(..=index).next_back().expect("every gap's end has one");
        let mut volumes = Volumes::clone(volumes);
        for landed in &self.steps[first + 1..=index] {
            if let Some(change) = &landed.step.change {
                change.apply(&landed.step.plain, &mut volumes);
            }
        }
        volumes
    }

    pub fn at(&self, spec: &PointSpec) -> Expected {
        match spec {
            PointSpec::Time(time_ns) => self.expect_time(*time_ns),
            PointSpec::Position { incarnation_prefix, offset } => {
                let stream = self.streams.iter().position(|name| hex(name).starts_with(incarnation_prefix.as_str()));
                self.expect_position(stream.expect("a stream of the test"), *offset)
            }
            PointSpec::Bookmark(name) => {
                let set = |landed: &Landed| matches!(&landed.step.kind, Kind::Bookmark(other) if other == name);
                let index = self.steps.iter().rposition(set).expect("a bookmark of the test");
                if self.steps[index].point { Expected::After(index) } else { Expected::Gap }
            }
            PointSpec::Latest => match self.steps.iter().rposition(|landed| landed.point) {
                Some(index) => Expected::After(index),
                None => Expected::Gap,
            },
            PointSpec::Age(_) => panic!("give its time"),
        }
    }

    /// A record in a gap may be older than the mark that opens it, which was made when the agent got there.
    fn expect_time(&self, time_ns: u64) -> Expected {
        let steps = &self.steps[..self.end_of_time(time_ns)];
        let newest = |records: bool| {
            steps.iter().rposition(|landed| landed.step.is_record() == records && landed.time_ns <= time_ns)
        };
        let (record, mark) = (newest(true), newest(false));
        let Some(mark) = mark else {
            // A clock that was behind: all marks have later times.
            return record.filter(|index| self.steps[*index].point).map_or(Expected::Gap, Expected::After);
        };
        // That mark is of a clock that was wrong, and its gap was over before the record.
        if let Some(record) = record.filter(|record| mark < *record && self.steps[*record].point) {
            let ends = |landed: &Landed| matches!(landed.step.kind, Kind::GapEnd(_));
            if self.steps[mark..record].iter().any(ends) {
                return Expected::After(record);
            }
        }
        // A gap's own begin is a point.
        if self.steps[mark].time_ns == time_ns && mark > 0 && self.steps[mark - 1].point && !self.steps[mark].point {
            return Expected::After(mark - 1);
        }
        let index = record.map_or(mark, |record| record.max(mark));
        if self.steps[mark].point && self.steps[index].point { Expected::After(index) } else { Expected::Gap }
    }

    /// Of the stretches between settings of the clock the newest counts that has the time.
    fn end_of_time(&self, time_ns: u64) -> usize {
        let (mut stretches, mut now): (Vec<(usize, u64, u64)>, u64) = (Vec::new(), 0);
        let (mut highest, mut leapt_over) = (0, false);
        for (index, landed) in self.steps.iter().enumerate() {
            let then = landed.time_ns;
            // It was behind what it had shown, and no more, or a minute less at once.
            let right = onward(highest, then) >= highest || then.saturating_sub(now) >= 60_000_000_000;
            let leaps = onward(highest, now) < highest && right && onward(then, now) < then;
            leapt_over |= leaps && onward(time_ns, now) < time_ns && time_ns < then;
            if onward(now, then) < now || leaps || index == 0 {
                stretches.push((index, then, then));
            }
            now = onward(now, then);
            highest = highest.max(now);
            let last = stretches.last_mut().unwrap();
            (last.0, last.2) = (index + 1, last.2.max(then));
        }
        let has = |stretch: &&(usize, u64, u64)| (stretch.1..=stretch.2).contains(&time_ns);
        let none = if leapt_over && time_ns < stretches[0].1 { 0 } else { self.steps.len() };
        stretches.iter().rev().find(has).map_or(none, |stretch| stretch.0)
    }

    fn expect_position(&self, stream: usize, offset: u64) -> Expected {
        let of = |landed: &Landed| landed.step.stream == stream && landed.step.position <= offset;
        let last = self.steps.iter().rposition(of).expect("a position of the test");
        let position = self.steps[last].step.position;
        if position < offset {
            return if self.steps[last].point { Expected::After(last) } else { Expected::Gap };
        }
        let here = |landed: &Landed| landed.step.stream == stream && landed.step.position == position && landed.point;
        self.steps.iter().rposition(here).map_or(Expected::Gap, Expected::After)
    }

    pub fn spec_of_position(&self, index: usize) -> PointSpec {
        let step = self.step(index);
        let prefix = hex(&self.streams[step.stream])[..12].to_owned();
        PointSpec::Position { incarnation_prefix: prefix, offset: step.position }
    }

    /// The last good step before the gap in which a step stands, and the first after it.
    pub fn beside(&self, index: usize) -> (Option<usize>, Option<usize>) {
        let before = self.steps[..index].iter().rposition(|landed| landed.point);
        let after = self.steps[index..].iter().position(|landed| landed.point).map(|after| index + after);
        (before, after)
    }

    /// Steps that open a gap and those that end one.
    pub fn edges(&self) -> Vec<usize> {
        let edge = |index: &usize| {
            let before = index.checked_sub(1).is_some_and(|before| self.steps[before].point);
            before != self.steps[*index].point
        };
        let vague = |index: &usize| (index.saturating_sub(1)..=index + 1).any(|near| self.vague.contains(&near));
        (0..self.steps.len()).filter(edge).filter(|index| !vague(index)).collect()
    }

    pub fn bookmarks(&self) -> Vec<String> {
        let name = |landed: &Landed| match &landed.step.kind {
            Kind::Bookmark(name) => Some(name.clone()),
            _ => None,
        };
        self.steps.iter().filter_map(name).collect()
    }
}
