//! A fio at a given pace. Fio's own `rate` burns a third of a core here with waiting (it spins for less than a
//! millisecond), which two cores do not have to spare: so it runs at full speed and is stopped and continued.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use varve_tests::Child;

use crate::status::Agent;
use crate::volume::{Volume, written_bytes};

const TICK: Duration = Duration::from_millis(1);
/// What was not written in time is not made up for later than this.
const CREDIT: Duration = Duration::from_millis(20);

/// What the writer may do at this moment.
pub enum Pace {
    /// At most this many bytes a second.
    Rate(f64),
    /// As fast as it can until told to wait.
    Free,
    /// Not now.
    Wait,
}

/// Random writes.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Of a write.
    pub block: &'static str,
    /// Requests in flight.
    pub depth: u32,
}

/// The usual one.
pub const SMALL: Load = Load { block: "4k", depth: 32 };

/// Runs the load as fast as the replication goes: the writer is stopped from a half full ring to a quarter full one.
#[track_caller]
pub fn as_fast_as_it_holds(volume: &Volume, load: Load, time: Duration, agent: &mut Agent) -> (u64, Duration) {
    let (mut wait, mut next) = (false, Duration::ZERO);
    run(volume, load, time, |at| {
        // Not more often than it takes to stay well within the other half: answers cost the agent time.
        if at >= next {
            let group = agent.group();
            let used = group.ring_used as f64 / group.ring_bytes as f64;
            wait = used > if wait { 0.25 } else { 0.5 };
            next = at + Duration::from_millis(4);
        }
        if wait { Pace::Wait } else { Pace::Free }
    })
}

/// Runs the load for `time`; `pace` is asked every millisecond. Returns the bytes written and the time it took.
#[track_caller]
pub fn run(volume: &Volume, load: Load, time: Duration, mut pace: impl FnMut(Duration) -> Pace) -> (u64, Duration) {
    let mut args: Vec<String> = [
        "--name=job",
        // One process, so that one signal stops all of it.
        "--thread=1",
        "--ioengine=libaio",
        "--direct=1",
        "--rw=randwrite",
        "--norandommap=1",
        // Two writes under way to one place have no order, so nobody could say what the volume holds.
        "--serialize_overlap=1",
        "--randrepeat=0",
        "--time_based=1",
        "--runtime=1h",
    ]
    .map(String::from)
    .into();
    args.push(format!("--filename={}", volume.path().display()));
    args.push(format!("--bs={}", load.block));
    args.push(format!("--iodepth={}", load.depth));
    let mut fio = Child::start("fio", &args, &volume.scratch.join("paced-fio.log"), |command| {
        command.current_dir(volume.scratch.path());
    });
    let before = written_bytes(volume.path());
    let started = Instant::now();
    while written_bytes(volume.path()) == before {
        assert_eq!(fio.exit_code(), None, "fio ended: {}", fio.log());
        assert!(started.elapsed() < Duration::from_secs(20), "fio does not begin to write");
        // Nobody holds it up yet, and in 20 ms it writes as much as a ring has room for.
        std::thread::sleep(TICK / 4);
    }
    fio.signal(Signal::SIGSTOP);
    let mut stopped = true;

    let begun = Instant::now();
    let from = written_bytes(volume.path());
    let mut budget = Budget { at: begun, bytes: 0.0, written: from };
    while begun.elapsed() < time {
        let stop = match pace(begun.elapsed()) {
            Pace::Rate(rate) => budget.spent(rate, written_bytes(volume.path())),
            Pace::Free => false,
            Pace::Wait => true,
        };
        if stop != stopped {
            fio.signal(if stop { Signal::SIGSTOP } else { Signal::SIGCONT });
            stopped = stop;
        }
        std::thread::sleep(TICK);
    }
    let (until, took) = (written_bytes(volume.path()), begun.elapsed());
    fio.signal(Signal::SIGCONT);
    // 128: ended by a signal, which is what was asked for.
    let code = fio.end_with(Signal::SIGINT, Duration::from_secs(20));
    assert!([0, 128].contains(&code), "fio: exit code {code}: {}", fio.log());
    (until - from, took)
}

/// A bucket that fills at the rate and is emptied by what was written.
struct Budget {
    at: Instant,
    bytes: f64,
    written: u64,
}

impl Budget {
    fn spent(&mut self, rate: f64, written: u64) -> bool {
        self.bytes += rate * self.at.elapsed().as_secs_f64() - (written - self.written) as f64;
        self.bytes = self.bytes.min(rate * CREDIT.as_secs_f64());
        (self.at, self.written) = (Instant::now(), written);
        self.bytes <= 0.0
    }
}
