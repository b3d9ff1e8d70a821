//! Opens points of the timeline as an operator does and compares what is there with the model, bit for bit.

use super::host::GROUP;
use super::nbd::Nbd;
use super::past::{Expected, Kind, Past, Volumes};
use super::{LIMIT, assert_equal};
use rand::Rng;
use rand::rngs::StdRng;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use varve_common::control::{
    ExportKind, PointsReply, ReceiverRequest, Reply, RestoreReply, RollbackReply, ScrubReply, ViewReply,
};
use varve_common::paths::Paths;
use varve_common::point::PointSpec;
use varve_common::problem::Problem;
use varve_net::local::LocalClient;

/// What came of looking at a point.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    /// Every byte of the model's.
    Right,
    /// There is no such point, in these words.
    Refused(Problem),
    /// Some reads failed; what could be read was right.
    Errors(usize),
    /// The daemon has gone.
    Gone,
}

#[derive(Clone)]
pub struct Looker {
    pub paths: Paths,
    pub past: Arc<Mutex<Past>>,
}

impl Looker {
    /// `None`: the daemon does not answer.
    pub fn ask<T: serde::de::DeserializeOwned>(&self, request: &ReceiverRequest) -> Option<Result<T, Problem>> {
        let mut client = LocalClient::connect(&self.paths.receiver_socket()).ok()?;
        client.set_timeout(Some(2 * LIMIT)).ok()?;
        client.request(request).ok()?;
        loop {
            match client.reply::<Reply<T>>().ok()?? {
                Reply::Progress(_) => {}
                Reply::Done(done) => return Some(Ok(done)),
                Reply::Problem(problem) => return Some(Err(problem)),
            }
        }
    }

    pub fn done<T: serde::de::DeserializeOwned>(&self, request: &ReceiverRequest) -> T {
        match self.ask(request) {
            Some(Ok(done)) => done,
            Some(Err(problem)) => panic!("{request:?}: {problem:?}"),
            None => panic!("no answer to {request:?}"),
        }
    }

    pub fn open_as(&self, at: &PointSpec, writable: bool, export: ExportKind) -> Option<Result<ViewReply, Problem>> {
        self.ask(&ReceiverRequest::ViewOpen { group: GROUP.into(), at: at.clone(), writable, export, listen: None })
    }

    pub fn open(&self, at: &PointSpec) -> Option<Result<ViewReply, Problem>> {
        self.open_as(at, false, ExportKind::Nbd)
    }

    pub fn close(&self, view: &ViewReply) {
        // In use for as long as the server has not seen that its client went.
        let start = std::time::Instant::now();
        while let Some(Err(problem)) = self.ask::<()>(&ReceiverRequest::ViewClose { id: view.id, force: false }) {
            assert!(start.elapsed() < LIMIT, "{problem:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn image(&self, index: usize) -> Volumes {
        self.past.lock().unwrap().image(index)
    }

    pub fn expected(&self, at: &PointSpec) -> Expected {
        self.past.lock().unwrap().at(at)
    }

    /// Reads all of a view in pieces of any size, and some places again. `errors`: whether reads may fail.
    pub fn compare(&self, view: &ViewReply, model: &Volumes, rng: &mut StdRng, what: &str, errors: bool) -> Seen {
        let mut failed = 0;
        for (number, (volume, model)) in view.volumes.iter().zip(model).enumerate() {
            let what = format!("{what}, volume {number} of view {}", view.id);
            assert_eq!(volume.bytes, model.len() as u64, "{what}");
            let Ok(mut nbd) = Nbd::open(volume.uri.as_ref().expect("NBD")) else { return Seen::Gone };
            assert_eq!(nbd.bytes, model.len() as u64, "{what}");
            let (mut at, mut again) = (0, 3);
            while at < model.len() || again > 0 {
                let (start, most) = match at < model.len() {
                    true => (at, if rng.random_bool(0.2) { 70_000 } else { 2 << 20 }),
                    false => (rng.random_range(0..model.len()), 9000),
                };
                let bytes = rng.random_range(1..=most).min(model.len() - start);
                let mut buf = vec![0xa5; bytes];
                match nbd.read(&mut buf, start as u64) {
                    Ok(()) => {
                        let right = &model[start..start + bytes];
                        if buf != right {
                            let off = buf.iter().zip(right).position(|(a, b)| a != b).unwrap();
                            let wrong = buf.iter().zip(right).filter(|(a, b)| a != b).count();
                            panic!(
                                "{what}: wrong from byte {} (sector {}) on, {wrong} bytes of a read of {bytes} at {start}: \
                                 {:#x} instead of {:#x}; the point is {:?}",
                                start + off,
                                (start + off) / 512,
                                buf[off],
                                right[off],
                                view.point
                            );
                        }
                    }
                    Err(error) if error.raw_os_error() == Some(5) => {
                        assert!(errors, "{what}: a read of {bytes} at {start} failed");
                        failed += 1;
                    }
                    Err(_) => return Seen::Gone,
                }
                if at < model.len() { at += bytes } else { again -= 1 }
            }
        }
        if failed == 0 { Seen::Right } else { Seen::Errors(failed) }
    }

    /// The step that a view shows: `index`, unless the bookmark was set again under its name while it was looked up. Then
    /// either of the two is right.
    pub fn opened(&self, view: &ViewReply, at: &PointSpec, index: usize) -> usize {
        let Expected::After(newer) = self.expected(at) else { return index };
        let end = format!(":{}", self.past.lock().unwrap().step(newer).position);
        if matches!(at, PointSpec::Bookmark(_)) && view.point.position.ends_with(&end) { newer } else { index }
    }

    /// Opens a point and compares it with the state after step `index`.
    pub fn look(&self, at: &PointSpec, index: usize, rng: &mut StdRng, errors: bool) -> Seen {
        match self.open(at) {
            None => Seen::Gone,
            Some(Err(problem)) => Seen::Refused(problem),
            Some(Ok(view)) => {
                let index = self.opened(&view, at, index);
                let model = self.image(index);
                let what = format!("{at} (step {index}, {:?})", self.describe(index));
                let seen = self.compare(&view, &model, rng, &what, errors);
                if seen != Seen::Gone {
                    self.close(&view);
                }
                seen
            }
        }
    }

    pub fn describe(&self, index: usize) -> String {
        let past = self.past.lock().unwrap();
        let step = past.step(index);
        let kind = match &step.kind {
            Kind::GapEnd(_) => "GapEnd".to_owned(),
            other => format!("{other:?}"),
        };
        format!("{kind} at {}:{}, change {:?}", step.stream, step.position, step.change)
    }

    /// Whether the point is as the model says: right, or refused with its neighbours.
    pub fn check(&self, at: &PointSpec, rng: &mut StdRng) {
        match self.expected(at) {
            Expected::After(index) => {
                let seen = self.look(at, index, rng, false);
                assert_eq!(seen, Seen::Right, "{at}: step {index}: {}", self.describe(index));
            }
            Expected::Gap => self.check_gap(at, rng),
        }
    }

    fn check_gap(&self, at: &PointSpec, rng: &mut StdRng) {
        let problem = match self.open(at) {
            Some(Err(problem)) => problem,
            Some(Ok(view)) => panic!("{at} is in a gap, and a view is open at {:?}", view.point),
            None => panic!("{at}: no answer"),
        };
        let (before, after) = {
            let past = self.past.lock().unwrap();
            let index = match at {
                PointSpec::Time(time_ns) => (0..past.len()).rev().find(|index| past.time_ns(*index) <= *time_ns),
                PointSpec::Position { .. } => None,
                _ => return,
            };
            match index {
                // In a gap whose first record is older than its mark: as any other of it.
                Some(index) if !past.is_point(index) => past.beside(index),
                _ => return,
            }
        };
        for (word, index) in [("before", before), ("after", after)] {
            // Before the first point there is only one side: of a gap, or of all there is.
            let names: &[&str] = match (word, before) {
                ("after", None) => &["the oldest point", "the nearest after"],
                ("after", _) => &["the nearest after"],
                _ => &["the nearest before"],
            };
            let said = names.iter().find_map(|name| problem.next.split(&format!("{name}: --at ")).nth(1));
            let said = said.map(|rest| rest.split([';', ' ']).next().unwrap().to_owned());
            match (said, index) {
                (Some(text), Some(index)) => {
                    // A position where the clock has shown that time again since.
                    let near = match text.strip_prefix("pos:").and_then(|position| position.split_once(':')) {
                        Some((prefix, offset)) => PointSpec::Position {
                            incarnation_prefix: prefix.to_owned(),
                            offset: offset.parse().unwrap(),
                        },
                        None => PointSpec::Time(parse_time(&text)),
                    };
                    assert_eq!(self.look(&near, index, rng, false), Seen::Right, "{at}: {word}: {near}: {problem:?}");
                }
                (None, None) => {}
                (said, index) => panic!("{at}: {word}: said {said:?}, the model has {index:?}: {problem:?}"),
            }
        }
    }

    /// A point at random among what is durable for certain, asked for in any way.
    pub fn any(&self, rng: &mut StdRng) -> Option<PointSpec> {
        let past = self.past.lock().unwrap();
        // The newest that is surely followed by a record.
        let end = (0..past.durable).rev().find(|index| past.step(*index).is_record())?;
        let first = (0..end).find(|index| past.is_point(*index))?;
        let index = rng.random_range(first..end.max(first + 1));
        let (next, here) = (past.step(index + 1), past.step(index));
        let vague = past.vague.contains(&index) || past.vague.contains(&(index + 1)) || past.vague.contains(&end);
        Some(match rng.random_range(0..if vague { 4 } else { 10 }) {
            0..4 => past.spec_of_position(index),
            4 if next.is_record() && next.stream == here.stream => {
                // Inside a record: the state before it.
                let PointSpec::Position { incarnation_prefix, offset } = past.spec_of_position(index) else { panic!() };
                let inside = rng.random_range(0..next.plain.len() as u64);
                PointSpec::Position { incarnation_prefix, offset: offset + inside }
            }
            5 => match past.bookmarks() {
                names if names.is_empty() => PointSpec::Time(past.time_ns(index)),
                names => {
                    let name = names[rng.random_range(0..names.len())].clone();
                    // Its newest must be one that has arrived.
                    let newest = (0..past.len()).rev().find(|n| past.step(*n).kind == Kind::Bookmark(name.clone()));
                    if newest.is_some_and(|newest| newest < end) {
                        PointSpec::Bookmark(name)
                    } else {
                        past.spec_of_position(index)
                    }
                }
            },
            _ => {
                let (from, to) = (past.time_ns(index), past.time_ns(end));
                let time_ns = from + [0, 0, 1, 500, 100_000][rng.random_range(0..5)];
                PointSpec::Time(time_ns.min(to.saturating_sub(1)).max(from.min(to.saturating_sub(1))))
            }
        })
    }

    /// Both sides of every gap, in every form.
    pub fn edges(&self) -> Vec<PointSpec> {
        let past = self.past.lock().unwrap();
        let mut specs = Vec::new();
        let Some(end) = (0..past.durable).rev().find(|index| past.step(*index).is_record()) else { return specs };
        for edge in past.edges().into_iter().filter(|edge| *edge < end) {
            let time_ns = past.time_ns(edge);
            specs.extend([time_ns - 1, time_ns, time_ns + 1].map(PointSpec::Time));
            specs.push(past.spec_of_position(edge));
            if edge > 0 {
                specs.push(past.spec_of_position(edge - 1));
            }
            specs.push(past.spec_of_position(edge + 1));
        }
        specs
    }

    /// Once the group's files are open.
    pub fn points(&self) -> PointsReply {
        let request = ReceiverRequest::Points { group: GROUP.into(), from_ns: None, to_ns: None };
        let start = std::time::Instant::now();
        while !matches!(self.ask::<PointsReply>(&request), Some(Ok(_))) && start.elapsed() < LIMIT / 6 {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.done(&ReceiverRequest::Points { group: GROUP.into(), from_ns: None, to_ns: None })
    }

    pub fn rollback(&self, at: &PointSpec) -> Option<Result<RollbackReply, Problem>> {
        self.ask(&ReceiverRequest::Rollback { group: GROUP.into(), at: at.clone(), dry_run: false })
    }

    pub fn rollback_plan(&self, at: &PointSpec) -> RollbackReply {
        self.done(&ReceiverRequest::Rollback { group: GROUP.into(), at: at.clone(), dry_run: true })
    }

    pub fn scrub(&self) -> ScrubReply {
        self.done(&ReceiverRequest::Scrub { group: GROUP.into(), bytes_per_second: Some(1 << 40) })
    }

    pub fn restore(&self, at: &PointSpec, volume: usize, to: &std::path::Path) -> RestoreReply {
        self.done(&ReceiverRequest::Restore {
            group: GROUP.into(),
            at: at.clone(),
            volume: volume.to_string(),
            to: to.display().to_string(),
            dry_run: false,
            force: false,
            dir: None,
        })
    }

    /// Restores every volume to files and compares them.
    pub fn check_restore(&self, at: &PointSpec, dir: &std::path::Path) {
        let Expected::After(index) = self.expected(at) else { return };
        for (number, model) in self.image(index).iter().enumerate() {
            let path = dir.join(format!("restored-{number}"));
            let reply = self.restore(at, number, &path);
            assert!(reply.verified && reply.digest.is_some(), "{reply:?}");
            assert_equal(&std::fs::read(&path).unwrap(), model, &format!("restore of {at}, volume {number}"));
            std::fs::remove_file(&path).unwrap();
        }
    }

    /// Through a real client, and as a block device.
    pub fn check_exports(&self, at: &PointSpec, dir: &std::path::Path) {
        let Expected::After(index) = self.expected(at) else { return };
        let model = self.image(index);
        let view = self.open(at).unwrap().unwrap();
        let device = self.open_as(at, false, ExportKind::Device).unwrap().unwrap();
        for (number, model) in model.iter().enumerate() {
            let path = dir.join(format!("copied-{number}"));
            let uri = view.volumes[number].uri.as_ref().unwrap();
            let done =
                Command::new("nbdcopy").arg(uri).arg(&path).status().expect("nbdcopy: scripts/install-deps test");
            assert!(done.success());
            assert_equal(&std::fs::read(&path).unwrap(), model, &format!("nbdcopy of {at}, volume {number}"));
            std::fs::remove_file(&path).unwrap();
            let device = device.volumes[number].device.as_ref().unwrap();
            assert_equal(&std::fs::read(device).unwrap(), model, &format!("{device} of {at}, volume {number}"));
        }
        self.close(&device);
        self.close(&view);
    }
}

/// Nanoseconds since 1970 of `2026-11-20T10:11:12.123456789Z`.
pub fn parse_time(text: &str) -> u64 {
    let digits = |range: std::ops::Range<usize>| text[range].parse::<i64>().unwrap_or_else(|_| panic!("{text}"));
    let (year, month, day) = (digits(0..4), digits(5..7), digits(8..10));
    // Howard Hinnant's days from civil.
    let year = if month <= 2 { year - 1 } else { year };
    let era = year / 400;
    let of_era = year - era * 400;
    let of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    let seconds = days * 86_400 + digits(11..13) * 3600 + digits(14..16) * 60 + digits(17..19);
    let fraction = text[19..].trim_start_matches('.').trim_end_matches('Z');
    let nanos: u64 = format!("{fraction:0<9}").parse().unwrap_or_else(|_| panic!("{text}"));
    seconds as u64 * 1_000_000_000 + nanos
}
