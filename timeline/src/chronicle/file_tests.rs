//! The file against tears, damage and loss.

use super::file::ChronicleFile;
use super::model::{Model, Step, chronicle_of, steps};
use super::{Chronicle, Event};
use crate::error::HistoryError;
use crate::limits::KEPT_MAX;
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use varve_common::format::FormatError;
use varve_common::format::chronicle::SLOT_BYTES;
use varve_common::point::Consistency;
use varve_common::state::GapReason;

const GROUP: [u8; 16] = [4; 16];

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory") }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("chronicle")
    }

    fn open(&self) -> (ChronicleFile, Vec<String>) {
        ChronicleFile::open(self.path(), GROUP).expect("opens")
    }

    /// A file of these batches; bytes before the last one.
    fn with(&self, batches: &[&[Event]]) -> u64 {
        let (mut file, _) = self.open();
        let mut before = file.bytes();
        for batch in batches {
            before = file.bytes();
            file.append(batch).expect("written");
        }
        before
    }
}

fn begin(height: u64, position: u64) -> Event {
    Event::Begin { height, time_ns: height, incarnation: [7; 16], position, epoch: 1 }
}

fn few() -> Vec<Event> {
    vec![
        begin(8, 64),
        Event::GapEnd { height: 800, time_ns: 800 },
        Event::Bookmark { height: 1000, time_ns: 1000, name: "b".into(), consistency: Consistency::Crash },
        Event::Keep { name: "b".into() },
        Event::GapBegin { height: 2000, time_ns: 2000, reason: GapReason::RingFull },
        begin(2008, 2056),
        Event::GapEnd { height: 3000, time_ns: 3000 },
    ]
}

fn same(a: &Chronicle, b: &Chronicle) -> bool {
    a.events() == b.events()
}

#[test]
fn what_was_appended_is_there_again() {
    let place = Place::new();
    let (mut file, notes) = place.open();
    assert!(notes.is_empty());
    let events = few();
    assert_eq!(file.append(&events).expect("written").new, events.len());
    assert_eq!(file.append(&events).expect("known").new, 0, "said again after a crash");
    assert_eq!(file.bytes(), std::fs::metadata(place.path()).expect("a file").len());
    let (again, notes) = place.open();
    assert!(notes.is_empty() && same(again.chronicle(), file.chronicle()));
    assert_eq!(again.chronicle().kept().count(), 1);
    assert_eq!(again.chronicle().window(0, 5000), Some((800, 5000)));
    assert_eq!(again.chronicle().neighbours(2500), (Some(2000), Some(3000)));
}

/// Whatever a crash leaves of an append, none of it or all of it counts, and the file goes on.
#[test]
fn a_torn_append_does_not_count() {
    let events = few();
    let (first, last) = events.split_at(4);
    let place = Place::new();
    let before = place.with(&[first, last]) as usize;
    let whole = std::fs::read(place.path()).expect("read");
    let (old, new) = (chronicle_of(first), chronicle_of(&events));
    for length in before..=whole.len() {
        std::fs::write(place.path(), &whole[..length]).expect("written");
        let (mut file, _) = place.open();
        let complete = length == whole.len();
        assert!(same(file.chronicle(), if complete { &new } else { &old }), "{length}");
        assert_eq!(file.append(last).expect("goes on").new, if complete { 0 } else { last.len() });
        assert!(same(place.open().0.chronicle(), &new));
    }
    // Blocks of one write reach the disk in any order.
    for present in 0..7u8 {
        let mut torn = whole.clone();
        for slot in (0..3).filter(|slot| present & 1 << slot == 0) {
            torn[before + slot * SLOT_BYTES..][..SLOT_BYTES].fill(0);
        }
        std::fs::write(place.path(), &torn).expect("written");
        assert!(same(place.open().0.chronicle(), &old), "{present:#b}");
    }
}

#[test]
fn files_that_are_not_ours() {
    let place = Place::new();
    place.with(&[&few()]);
    let whole = std::fs::read(place.path()).expect("read");
    let other = ChronicleFile::open(place.path(), [5; 16]);
    assert!(matches!(other, Err(HistoryError::Damaged { offset: 0, .. })), "{other:?}");
    let mut future = whole.clone();
    future[8] = 2;
    std::fs::write(place.path(), &future).expect("written");
    let newer = ChronicleFile::open(place.path(), GROUP);
    let version = matches!(newer, Err(HistoryError::Format { source: FormatError::Version { found: 2, .. }, .. }));
    assert!(version, "{newer:?}");
    std::fs::write(place.path(), &whole[..100]).expect("written");
    assert!(ChronicleFile::open(place.path(), GROUP).is_err());
    let fresh = ChronicleFile::start_over(place.path(), GROUP).expect("opens");
    assert!(same(fresh.chronicle(), &Chronicle::default()));
    assert_eq!(std::fs::read(place.dir.path().join("chronicle.damaged")).expect("kept").len(), 100);
}

#[test]
fn a_damaged_header_follows_from_the_slots() {
    let place = Place::new();
    place.with(&[&few()]);
    let mut bytes = std::fs::read(place.path()).expect("read");
    bytes[20] ^= 1;
    std::fs::write(place.path(), &bytes).expect("written");
    let (file, notes) = place.open();
    assert_eq!(notes.len(), 1);
    assert!(same(file.chronicle(), &chronicle_of(&few())));
    assert!(place.open().1.is_empty(), "mended");
}

#[test]
fn rewriting_says_the_same_in_less() {
    let place = Place::new();
    let (mut file, _) = place.open();
    file.append(&few()).expect("written");
    for round in 0..6000u64 {
        let name = format!("n{}", round % 10);
        file.append(&[Event::Keep { name: "b".into() }, Event::Release { name: "b".into() }]).expect("written");
        let (height, consistency) = (4000 + 48 * round, Consistency::Crash);
        file.append(&[Event::Bookmark { height, time_ns: height, name, consistency }]).expect("written");
        if round % 50 == 49 {
            file.append(&[Event::Expired { height, time_ns: height }]).expect("written");
        }
    }
    assert!(file.bytes() < 5000 * SLOT_BYTES as u64, "{}", file.bytes());
    let (again, notes) = place.open();
    assert!(notes.is_empty() && same(again.chronicle(), file.chronicle()));
    assert_eq!(again.chronicle().position_of(400_000), Some(([7; 16], 2056 + 400_000 - 2008)));
    assert!(again.chronicle().is_point(400_000));
}

#[test]
fn limits_hold() {
    let place = Place::new();
    let (mut file, _) = place.open();
    let bookmark = |number: u64| {
        let (height, name) = (8 + 48 * number, format!("b{number}"));
        Event::Bookmark { height, time_ns: height, name, consistency: Consistency::Crash }
    };
    let many: Vec<Event> = (0..=KEPT_MAX as u64).map(bookmark).collect();
    file.append(&many).expect("written");
    let keeps: Vec<Event> = (0..=KEPT_MAX).map(|number| Event::Keep { name: format!("b{number}") }).collect();
    assert!(matches!(file.append(&keeps), Err(HistoryError::Limit { .. })));
    assert_eq!(file.chronicle().kept_count(), 0, "refused as a whole");
    file.append(&keeps[1..]).expect("written");
    let more: Vec<Event> = (KEPT_MAX as u64 + 1..(crate::limits::BOOKMARKS_MAX + 5) as u64).map(bookmark).collect();
    file.append(&more).expect("written");
    assert_eq!(file.chronicle().bookmarks().count(), crate::limits::BOOKMARKS_MAX);
    assert!(file.chronicle().bookmark("b0").is_none() && file.chronicle().bookmark("b1").is_some(), "kept ones stay");
    let odd = Event::Bookmark { height: 1, time_ns: 1, name: "a\nb".into(), consistency: Consistency::Crash };
    assert_eq!(file.append(&[odd]).expect("passed over").new, 0);
}

/// A line that flaps for a month, or a source that means ill: what is kept stays whatever comes.
#[test]
fn marks_without_end_take_no_kept_bookmark_away() {
    let place = Place::new();
    let (mut file, _) = place.open();
    let begin = Event::Begin { height: 8, time_ns: 8, incarnation: [7; 16], position: 0, epoch: 1 };
    let bookmark = |height, name: &str| Event::Bookmark {
        height,
        time_ns: height,
        name: name.into(),
        consistency: Consistency::Crash,
    };
    let keep = Event::Keep { name: "kept".into() };
    file.append(&[begin, Event::GapEnd { height: 8, time_ns: 8 }, bookmark(16, "kept"), keep]).expect("written");
    let mut height = 24;
    let mut flap = |file: &mut ChronicleFile| {
        let mut events = Vec::new();
        for _ in 0..4096 {
            events.push(Event::GapBegin { height, time_ns: height, reason: GapReason::RingFull });
            events.push(Event::GapEnd { height: height + 8, time_ns: height + 8 });
            height += 16;
        }
        file.append(&events)
    };
    let refused = loop {
        if let Err(error) = flap(&mut file) {
            break error;
        }
        assert!(file.chronicle().is_point(16) && file.chronicle().bookmark("kept").is_some());
    };
    assert!(refused.to_string().contains("varve bookmark --release"), "{refused}");
    let (mut file, _) = place.open();
    assert!(file.chronicle().is_point(16) && file.chronicle().bookmark("kept").is_some());
    // Released it goes with the oldest, and there is room.
    file.append(&[Event::Release { name: "kept".into() }]).expect("written");
    flap(&mut file).expect("written");
    assert!(!file.chronicle().is_point(16) && file.chronicle().marks() <= crate::limits::MARKS_MAX);
    let (again, _) = place.open();
    assert!(same(again.chronicle(), file.chronicle()));
}

/// Points of both, at every height that anything stood at.
fn points<'a>(model: &'a Model, chronicle: &'a Chronicle) -> impl Iterator<Item = u64> + 'a {
    model.places().map(|(height, _)| height).filter(|height| chronicle.is_point(*height))
}

fn write_in_batches(path: &Path, events: &[Event], sizes: &[usize]) {
    let (mut file, _) = ChronicleFile::open(path, GROUP).expect("opens");
    let mut rest = events;
    let mut sizes = sizes.iter().cycle();
    while !rest.is_empty() {
        let (batch, after) = rest.split_at((*sizes.next().unwrap_or(&1)).min(rest.len()));
        file.append(batch).expect("written");
        rest = after;
    }
}

/// Without what takes points away for good: then fewer events could mean more points.
fn stream_only(steps: &[Step]) -> Vec<Step> {
    steps.iter().filter(|step| !matches!(step, Step::Expire(_) | Step::Damage(..))).cloned().collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Damage in any slot that something was appended after: no point is made up, no position is wrong, and once the
    /// applied mark has been heard the newest state is what it is.
    #[test]
    fn damage_makes_nothing_up(steps in steps(), sizes in prop::collection::vec(1usize..5, 1..6), at in any::<prop::sample::Index>()) {
        let model = Model::run(&stream_only(&steps));
        let place = Place::new();
        write_in_batches(&place.path(), &model.events, &sizes);
        let mut bytes = std::fs::read(place.path()).expect("read");
        let slots = bytes.len() / SLOT_BYTES - 1;
        let spot = SLOT_BYTES + at.index(slots * SLOT_BYTES);
        bytes[spot] ^= 0x10;
        std::fs::write(place.path(), &bytes).expect("written");
        let (mut file, notes) = place.open();
        prop_assert!(!notes.is_empty());
        let whole = chronicle_of(&model.events);
        let cut = file.bytes() < bytes.len() as u64;
        let settled = file.settle(&model.facts()).expect("written");
        prop_assert!(!cut || slots > 0 || settled.is_empty());
        for height in points(&model, file.chronicle()) {
            prop_assert!(whole.is_point(height), "{height} {notes:?} {settled:?}");
        }
        for (height, at) in model.places() {
            let found = file.chronicle().position_of(height);
            if file.chronicle().is_point(height) {
                prop_assert!(found.is_none_or(|found| found == at), "{height} {found:?} {at:?} {notes:?} {settled:?}");
            }
        }
        let facts = model.facts();
        prop_assert_eq!(file.chronicle().position_of(facts.height), Some((facts.incarnation, facts.position)));
        prop_assert_eq!(file.chronicle().is_point(facts.height), whole.is_point(facts.height));
        let again = place.open().0;
        for (height, _) in model.places() {
            prop_assert_eq!(again.chronicle().is_point(height), file.chronicle().is_point(height));
            prop_assert_eq!(again.chronicle().position_of(height), file.chronicle().position_of(height));
        }
    }

    /// A file that lost its end: the same.
    #[test]
    fn a_lost_end_makes_nothing_up(steps in steps(), keep in any::<prop::sample::Index>()) {
        let model = Model::run(&stream_only(&steps));
        let place = Place::new();
        write_in_batches(&place.path(), &model.events, &[1]);
        let bytes = std::fs::read(place.path()).expect("read");
        let keep = keep.index(bytes.len() / SLOT_BYTES);
        std::fs::write(place.path(), &bytes[..(keep + 1) * SLOT_BYTES]).expect("written");
        let (mut file, _) = place.open();
        let settled = file.settle(&model.facts()).expect("written");
        let whole = chronicle_of(&model.events);
        for height in points(&model, file.chronicle()) {
            prop_assert!(whole.is_point(height), "{height} {settled:?}");
        }
        let facts = model.facts();
        prop_assert_eq!(file.chronicle().position_of(facts.height), Some((facts.incarnation, facts.position)));
        prop_assert_eq!(file.chronicle().is_point(facts.height), whole.is_point(facts.height));
    }

    #[test]
    fn any_file_opens_or_is_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..2000), header in any::<bool>()) {
        let place = Place::new();
        if header {
            let (file, _) = place.open();
            drop(file);
            bytes.splice(0..0, std::fs::read(place.path()).expect("read"));
        }
        std::fs::write(place.path(), &bytes).expect("written");
        if let Ok((mut file, _)) = ChronicleFile::open(place.path(), GROUP) {
            file.append(&few()).expect("goes on");
            prop_assert!(same(place.open().0.chronicle(), file.chronicle()));
        }
    }
}
