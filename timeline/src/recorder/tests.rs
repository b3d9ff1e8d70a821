use super::*;
use crate::cache::IndexCache;
use crate::chronicle::PointError;
use crate::entry::Address;
use crate::resolve::Origin;
use crate::timeline::RUNS_NAME;
use varve_common::control::show_exact_time;
use varve_common::point::PointSpec;
use varve_common::state::GapReason;

const GROUP: [u8; 16] = [5; 16];
const SECOND: u64 = 1_000_000_000;
/// What a canary takes of the stream.
const CANARY: u64 = 48;

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("directory")
}

fn timeline(dir: &std::path::Path) -> Arc<Timeline> {
    Timeline::open(dir, GROUP, Arc::new(IndexCache::new(1 << 20, 4))).expect("open")
}

fn open(timeline: &Arc<Timeline>) -> Recorder {
    let facts = StreamFacts { height: 0, time_ns: 0, incarnation: [0; 16], position: 0, epoch: 0, gap: None };
    Recorder::open(timeline.clone(), &facts, 0, 0).expect("open")
}

impl Recorder {
    /// A record of the stream that changes a sector.
    fn write(&mut self, height: u64, time_ns: u64) {
        self.points(&[(height, time_ns)]).expect("points");
        self.push(Address::new(0, height % 10_000), height, Before::Bytes(&[height as u8 | 1; 512])).expect("push");
        self.commit(height).expect("commit");
    }
}

/// An append that is on its way counts when it is waited for and not before, whatever comes next, and its layer may be full.
#[test]
fn what_is_committed_behind_is_there_when_it_is_settled() {
    let dir = directory();
    let timeline = timeline(dir.path());
    let mut recorder = open(&timeline);
    let change = |recorder: &mut Recorder, height: u64| {
        recorder.push(Address::new(0, height), height, Before::Bytes(&[height as u8; 512])).expect("push");
    };
    let known = || {
        let parts = timeline.resolve(0, 0, 64 << 10, 0).expect("resolve");
        parts.iter().filter(|part| matches!(part.origin, Origin::Record(_))).count()
    };
    recorder.points(&[(8, SECOND), (16, SECOND), (24, SECOND), (32, SECOND)]).expect("points");
    change(&mut recorder, 8);
    recorder.commit_behind(8).expect("commit");
    assert_eq!((recorder.complete_to(), known()), (0, 0));
    // The next one is collected meanwhile, in the height where that one ends.
    change(&mut recorder, 16);
    assert_eq!((recorder.complete_to(), known()), (0, 0));
    recorder.commit_behind(16).expect("commit");
    assert_eq!((recorder.complete_to(), known()), (8, 1));
    recorder.settle().expect("settle");
    assert_eq!((recorder.complete_to(), known()), (16, 2));
    // From here on a layer ends with its first chunk, and so does the one with the two.
    timeline.set_layer_bytes(1);
    for height in [24, 32] {
        change(&mut recorder, height);
        recorder.commit_behind(height).expect("commit");
    }
    change(&mut recorder, 40);
    recorder.commit(40).expect("commit");
    assert_eq!((recorder.complete_to(), known()), (40, 5));
    assert_eq!(timeline.layers().len(), 4);
    // Dropped, it is waited for: whoever opens the layer anew finds it.
    change(&mut recorder, 48);
    recorder.commit_behind(48).expect("commit");
    drop(recorder);
    let again = open(&timeline);
    assert_eq!((again.complete_to(), known()), (48, 6));
}

/// With nothing written for days, canaries are all that comes, and nothing commits.
#[test]
fn a_write_after_days_of_canaries_has_its_time() {
    let dir = directory();
    let timeline = timeline(dir.path());
    let mut recorder = open(&timeline);
    let start = 1_000_000 * SECOND;
    let mut height = 0;
    let mut canaries = |recorder: &mut Recorder, from: u64, count: u64| {
        for second in from..from + count {
            height += CANARY;
            recorder.points(&[(height, start + second * SECOND)]).expect("points");
        }
        height
    };
    let idle = 140_000;
    let height = canaries(&mut recorder, 0, idle) + 560;
    let written = start + idle * SECOND;
    recorder.write(height, written);
    let at = |time_ns| timeline.at_or_before_time(time_ns).expect("read").map(|point| point.height);
    assert_eq!(at(written), Some(height));
    assert_eq!(at(written + 3 * SECOND), Some(height));
    assert_eq!(at(written - 1), Some(idle * CANARY), "the last canary before it");
    assert_eq!(at(start + 100_000 * SECOND), Some(100_001 * CANARY));
    assert_eq!(recorder.complete_to(), height);
    // As many as one batch has, when nearly as many wait as are told at once.
    let waiting = CHUNK_POINTS_MAX as u64 / 2 - 1;
    let second = |number: u64| (height + number * CANARY, written + number * SECOND);
    for number in 1..=waiting {
        recorder.points(&[second(number)]).expect("points");
    }
    let burst: Vec<_> = (1..=100_000).map(|number| second(waiting + number)).collect();
    recorder.points(&burst).expect("points");
    let (height, time_ns) = burst[burst.len() - 1];
    recorder.push(Address::new(0, 8), height, Before::Bytes(&[9; 512])).expect("push");
    recorder.commit(height).expect("commit");
    assert_eq!(at(time_ns), Some(height));
    // The directory of the layer says so as well.
    recorder.close_layer().expect("close");
    assert_eq!(at(time_ns), Some(height));
}

/// A machine whose clock was lost boots years ago, and minutes later the network sets it right.
#[test]
fn a_clock_that_was_behind_takes_no_time_from_what_came_before() {
    let dir = directory();
    let timeline = timeline(dir.path());
    let mut recorder = open(&timeline);
    let at = |second: u64| timeline.at_or_before_time(second * SECOND).expect("read").map(|point| point.height);
    recorder.write(80, 1000 * SECOND);
    recorder.write(160, 1100 * SECOND);
    // The mark of its new stream comes first, and images behind it.
    recorder.applied(168, 10 * SECOND).expect("applied");
    recorder.push(Address::new(0, 1), 169, Before::Bytes(&[1; 512])).expect("push");
    recorder.commit(168).expect("commit");
    let end = crate::points::end_of_time(&timeline.layers(), 1050 * SECOND, 10 * SECOND, 0, |_| None);
    assert_eq!(end, crate::points::TimeEnd::Height(160), "not over the mark");
    recorder.write(240, 11 * SECOND);
    recorder.write(320, 20 * SECOND);
    recorder.applied(320, 20 * SECOND).expect("applied");
    assert_eq!([at(1000), at(1050), at(1100), at(15)], [Some(80), Some(80), Some(160), Some(240)]);
    // Set right in the middle of a batch, and then only canaries come.
    recorder.points(&[(368, 21 * SECOND), (416, 1120 * SECOND)]).expect("points");
    recorder.applied(416, 1120 * SECOND).expect("applied");
    for second in 1121..1200 {
        recorder.points(&[(416 + (second - 1120) * CANARY, second * SECOND)]).expect("points");
    }
    recorder.applied(416 + 79 * CANARY, 1199 * SECOND).expect("applied");
    let check = |what: &str| {
        assert_eq!([at(1000), at(1050), at(1100), at(15)], [Some(80), Some(80), Some(160), Some(240)], "{what}");
        assert_eq!((at(500), at(30)), (None, None), "{what}: the clock showed no such time");
    };
    check("right again");
    recorder.write(8000, 1200 * SECOND);
    recorder.applied(8000, 1200 * SECOND).expect("applied");
    check("and written");
    assert_eq!((at(1150), at(1200)), (Some(416 + 30 * CANARY), Some(8000)));
    assert_eq!(at(21), Some(416), "of that batch, what came later");
    recorder.close_layer().expect("close");
    check("closed");
}

/// A host without a clock begins with the time of its build, then with what it saved last, and hears the right one in the end.
#[test]
fn a_clock_that_is_set_right_in_steps_takes_no_time_either() {
    let dir = directory();
    let timeline = timeline(dir.path());
    let mut recorder = open(&timeline);
    let at = |second: u64| timeline.at_or_before_time(second * SECOND).expect("read").map(|point| point.height);
    recorder.write(80, 1000 * SECOND);
    recorder.write(160, 1100 * SECOND);
    for (height, second) in [(240, 11), (320, 12), (400, 1050), (480, 1051), (560, 1120)] {
        recorder.write(height, second * SECOND);
        recorder.applied(height, second * SECOND).expect("applied");
    }
    assert_eq!([at(1000), at(1040), at(1049), at(1080), at(1100)], [80, 80, 80, 80, 160].map(Some));
    assert_eq!([at(11), at(1120)], [240, 560].map(Some));
}

/// An hour that was shown too early is not that of the stretch in which it was, when it really comes and nobody writes.
#[test]
fn a_clock_that_was_ahead_keeps_no_time_that_comes_again() {
    let dir = directory();
    let timeline = timeline(dir.path());
    let facts =
        |height, time_ns| StreamFacts { height, time_ns, incarnation: [0; 16], position: 0, epoch: 0, gap: None };
    let mut recorder = open(&timeline);
    recorder.write(80, 5000 * SECOND);
    recorder.write(160, 1100 * SECOND);
    let mut height = 160;
    for second in 1101..6000 {
        height += CANARY;
        recorder.points(&[(height, second * SECOND)]).expect("points");
        recorder.applied(height, second * SECOND).expect("applied");
    }
    let at = |second: u64| timeline.at_or_before_time(second * SECOND).expect("read").map(|point| point.height);
    assert_eq!([at(4999), at(5000), at(5500)], [Some(160); 3]);
    // What was only in memory is gone with the daemon.
    drop(recorder);
    let mut recorder = Recorder::open(timeline.clone(), &facts(height, 5999 * SECOND), 160, height).expect("open");
    recorder.write(height + 80, 6001 * SECOND);
    recorder.applied(height + 80, 6001 * SECOND).expect("applied");
    assert_eq!([at(4999), at(5000), at(5500)], [Some(160); 3]);
    assert_eq!(at(6001), Some(height + 80));
}

const MINUTE: u64 = 60 * SECOND;

/// Minutes of a day, as a clock shows them that is right.
fn right(minutes: u64) -> u64 {
    1_700_000_000 * SECOND + minutes * MINUTE
}

/// The same by one that is an hour ahead.
fn ahead(minutes: u64) -> u64 {
    right(60 + minutes)
}

/// The stream begins at ten to nine and has a write at nine, both by the right clock.
fn begun_right(timeline: &Arc<Timeline>) -> Recorder {
    let mut recorder = open(timeline);
    let time_ns = right(530);
    let begin = Event::Begin { height: 8, time_ns, incarnation: [7; 16], position: 8, epoch: 1 };
    recorder.events(&[begin, Event::GapEnd { height: 16, time_ns }]).expect("events");
    recorder.write(80, right(540));
    recorder
}

/// The newest point of the first layer came at this time.
fn first_layer_came(timeline: &Timeline, minutes: u64) {
    let file = std::fs::File::options().write(true).open(crate::layer::path_of(&timeline.layers_dir(), 1));
    let came = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(right(minutes));
    file.and_then(|file| file.set_modified(came)).expect("its time");
}

/// The source was an hour ahead until 10:00 and is lost at 10:20: half past ten is later than all, not what it once called so.
#[test]
fn a_time_that_came_after_a_clock_was_set_back_is_none_of_before() {
    let dir = directory();
    let timeline = timeline(dir.path());
    let mut recorder = begun_right(&timeline);
    recorder.write(160, ahead(550));
    recorder.write(240, ahead(600));
    recorder.write(320, right(600));
    recorder.write(400, right(620));
    recorder.applied(400, right(620)).expect("applied");
    let at = |at: u64| timeline.at_or_before_time(right(at)).expect("read").map(|point| point.height);
    let located = |at: u64| timeline.locate(&PointSpec::Time(right(at)), 0).map(|point| point.height);
    first_layer_came(&timeline, 600);
    assert_eq!([at(545), at(605), at(619), at(620)], [Some(80), Some(320), Some(320), Some(400)]);
    assert_eq!([at(630), at(655), at(700)], [Some(400); 3], "later than all that was");
    assert_eq!(located(630).ok(), Some(400));
    // Were that stretch the right one, and this one behind: what it shows is what it was.
    first_layer_came(&timeline, 660);
    assert_eq!([at(630), at(655)], [Some(160); 2]);
    assert_eq!(located(630).ok(), Some(160));
}

/// The source was an hour ahead from 9:40 on, and went down at 10:00; the receiver was started anew since.
fn ahead_and_down(dir: &std::path::Path) -> (Arc<Timeline>, Recorder) {
    let timeline = timeline(dir);
    let mut recorder = begun_right(&timeline);
    recorder.write(160, ahead(580));
    recorder.write(240, ahead(600));
    drop(recorder);
    first_layer_came(&timeline, 600);
    let facts =
        StreamFacts { height: 240, time_ns: ahead(600), incarnation: [7; 16], position: 240, epoch: 1, gap: None };
    let recorder = Recorder::open(timeline.clone(), &facts, 240, 240).expect("open");
    let found = timeline.locate(&PointSpec::Time(right(630)), 0);
    assert_eq!(found.expect("as it was shown").height, 80, "nobody knows better yet");
    (timeline, recorder)
}

/// It has the right time at 10:40, when it comes again: nobody can say what half past ten was by its clock.
#[test]
fn a_time_between_a_clock_that_was_ahead_and_the_right_one_is_refused() {
    let dir = directory();
    let (timeline, mut recorder) = ahead_and_down(dir.path());
    let located = |at: u64| timeline.locate(&PointSpec::Time(right(at)), 0);
    // Canaries alone, then a write.
    for (height, time_ns) in [(248, right(640)), (296, right(640) + 20 * SECOND)] {
        recorder.points(&[(height, time_ns)]).expect("points");
        recorder.applied(height, time_ns).expect("applied");
    }
    for write in [false, true] {
        if write {
            recorder.write(328, right(650));
            recorder.applied(328, right(650)).expect("applied");
        }
        let refused = located(630).expect_err("between");
        assert!(
            matches!(&refused, PointError::ClockSetRight { after_ns, .. } if *after_ns == Some(right(640))),
            "{refused:?}"
        );
        let problem = refused.problem("db", "half past ten");
        assert!(problem.next.contains(&format!("--at pos:{}:240;", "07".repeat(4))), "{problem:?}");
        // Nothing changed before the canaries, which are only in memory at first.
        let canary = timeline.locate(&PointSpec::Time(right(640) + 10 * SECOND), 0).expect("as the one before it");
        assert_eq!((canary.height, canary.time_ns), (if write { 248 } else { 240 }, right(640)));
        assert_eq!(located(640).expect("what it names").time_ns, right(640));
        assert_eq!(located(545).expect("right then").height, 80);
    }
    assert_eq!(located(650).expect("right now").height, 328);
}

/// The same with another ring, as after a boot: a mark that opens a gap is the first that comes.
#[test]
fn a_time_between_two_boots_of_which_the_first_was_ahead_is_refused() {
    let dir = directory();
    let (timeline, mut recorder) = ahead_and_down(dir.path());
    let located = |at: u64| timeline.locate(&PointSpec::Time(right(at)), 0);
    let opens = Event::GapBegin { height: 240, time_ns: right(660), reason: GapReason::NewRing };
    let begin = Event::Begin { height: 248, time_ns: right(640), incarnation: [8; 16], position: 0, epoch: 1 };
    recorder.points(&[]).expect("none");
    recorder.events(&[opens, begin]).expect("events");
    recorder.applied(248, right(640)).expect("applied");
    let before = format!("the nearest before: --at pos:{}:240", "07".repeat(4));
    let next_of = |at| located(at).expect_err("refused").problem("db", "half past ten").next;
    assert_eq!(next_of(630), before);
    recorder.points(&[]).expect("none");
    recorder.events(&[Event::GapEnd { height: 256, time_ns: right(642) }]).expect("events");
    recorder.applied(256, right(642)).expect("applied");
    recorder.write(336, right(642) + SECOND);
    recorder.applied(336, right(642) + SECOND).expect("applied");
    let after = format!("the nearest after: --at {}", show_exact_time(right(642)));
    assert_eq!(next_of(630), format!("{before}; {after}"));
    assert_eq!(located(642).expect("what it names").height, 256);
    // In the gap itself. What it names before is no time: the clock has shown that again since, or will.
    assert_eq!(next_of(641), format!("{before}; {after}"));
}

/// The run has its name, and then the directory cannot be synced, or there is no file descriptor to open it with.
#[test]
fn a_run_of_half_a_layer_hides_nothing() {
    let begun = || {
        let dir = directory();
        let timeline = timeline(dir.path());
        let mut recorder = open(&timeline);
        (1..=3).for_each(|number| recorder.write(number * 80, number * SECOND));
        (dir, timeline, recorder)
    };
    let (dir, _closed, mut recorder) = begun();
    recorder.close_layer().expect("close");
    let name = format!("{RUNS_NAME}/{}", RunKey::of_layer(1).file_name());
    let run = std::fs::read(dir.path().join(&name)).expect("its run");
    let facts =
        |height| StreamFacts { height, time_ns: SECOND, incarnation: [0; 16], position: 0, epoch: 0, gap: None };
    // The run is there when the group is opened anew, and when the daemon starts.
    for daemon_ends in [false, true] {
        let (dir, timeline, mut recorder) = begun();
        if daemon_ends {
            (4..=6).for_each(|number| recorder.write(number * 80, number * SECOND));
        }
        drop(recorder);
        std::fs::write(dir.path().join(&name), &run).expect("write");
        let timeline = if daemon_ends { self::timeline(dir.path()) } else { timeline };
        let end = if daemon_ends { 480 } else { 240 };
        let mut recorder = Recorder::open(timeline.clone(), &facts(end), end, end).expect("open");
        assert!(!dir.path().join(&name).exists(), "it would hide what is appended");
        assert_eq!(recorder.complete_to(), end);
        (end / 80 + 1..=9).for_each(|number| recorder.write(number * 80, number * SECOND));
        drop(recorder);
        let timeline = self::timeline(dir.path());
        let recorder = Recorder::open(timeline.clone(), &facts(720), 720, 720).expect("open");
        assert_eq!(recorder.complete_to(), 720);
        assert!(timeline.chronicle().damages().is_empty(), "{:?}", timeline.chronicle().damages());
        for number in 1..=9 {
            let found = timeline.at_or_before_time(number * SECOND).expect("read");
            assert_eq!(found.map(|point| point.height), Some(number * 80));
            let parts = timeline.resolve(0, number * 80 * 512, 512, number * 80 - 1).expect("resolve");
            assert!(matches!(parts[0].origin, Origin::Record(entry) if entry.height == number * 80), "{parts:?}");
        }
    }
}

/// With a full disk the last run may not be written. The group must open nevertheless, so that something can expire.
#[test]
fn a_full_layer_that_cannot_be_closed_stays_open() {
    let dir = tempfile::tempdir().expect("directory");
    let mount = ["-t", "tmpfs", "-o", "size=24m", "tmpfs"];
    if !std::process::Command::new("mount").args(mount).arg(dir.path()).status().is_ok_and(|done| done.success()) {
        eprintln!("skipped: no file system can be mounted here");
        return;
    }
    let _mounted = Mounted(dir.path());
    let timeline = timeline(dir.path());
    let mut recorder = open(&timeline);
    (1..=3).for_each(|number| recorder.write(number * 80, number * SECOND));
    drop(recorder);
    // What is only reserved would be room.
    let layer = std::fs::File::options().write(true).open(crate::layer::path_of(&timeline.layers_dir(), 1));
    layer.and_then(|layer| layer.set_len(timeline.layers()[0].bytes)).expect("cut");
    let ballast = dir.path().join("ballast");
    let mut file = std::fs::File::create(&ballast).expect("create");
    while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
    drop(file);
    timeline.set_layer_bytes(1);
    let facts = StreamFacts { height: 240, time_ns: SECOND, incarnation: [0; 16], position: 0, epoch: 0, gap: None };
    let mut recorder = Recorder::open(timeline.clone(), &facts, 240, 240).expect("it opens");
    assert!(timeline.layers()[0].open);
    std::fs::remove_file(&ballast).expect("remove");
    (4..=6).for_each(|number| recorder.write(number * 80, number * SECOND));
    for number in 1..=6 {
        let parts = timeline.resolve(0, number * 80 * 512, 512, number * 80 - 1).expect("resolve");
        assert!(matches!(parts[0].origin, Origin::Record(entry) if entry.height == number * 80), "{parts:?}");
    }
}

struct Mounted<'a>(&'a std::path::Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

/// Indexes that a merge needs are made again; no merge waits for them for ever.
#[test]
fn a_damaged_run_that_is_due_for_a_merge_is_made_again() {
    let dir = directory();
    let timeline = timeline(dir.path());
    let mut recorder = open(&timeline);
    for number in 1..=17 {
        recorder.write(number * 80, number * SECOND);
        recorder.close_layer().expect("close");
    }
    let run = dir.path().join(RUNS_NAME).join(RunKey::of_layer(11).file_name());
    let mut bytes = std::fs::read(&run).expect("read");
    bytes[10] ^= 1;
    std::fs::write(&run, bytes).expect("write");
    while timeline.merge_one(|| true).expect("merge") {}
    let merged: Vec<_> = timeline.runs().iter().map(|run| run.head().key).filter(|key| key.level == 1).collect();
    assert!(merged.contains(&RunKey { level: 1, first: 8 }), "{merged:?}");
    for number in 1..=17 {
        let parts = timeline.resolve(0, number * 80 * 512, 512, number * 80 - 1).expect("resolve");
        assert!(matches!(parts[0].origin, Origin::Record(entry) if entry.height == number * 80), "{parts:?}");
    }
}
