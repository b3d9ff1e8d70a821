use super::*;
use crate::cache::IndexCache;
use crate::entry::Address;

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
        self.push(Address::new(0, height % 1000), height, Before::Bytes(&[height as u8 | 1; 512])).expect("push");
        self.commit(height).expect("commit");
    }
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
