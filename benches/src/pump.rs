//! Capture without an agent: the programs, a group, and a thread that gives the ring back.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use varve_bpf::{Capture, CaptureOptions, Entry, Group, GroupCounters, Ring};

use crate::volume::whole;

/// As the agent's default.
const RING_BYTES: u32 = 64 << 20;
const TICK: Duration = Duration::from_millis(1);
/// Given back at the latest after so much.
const RELEASE_BYTES: u64 = 1 << 20;

/// What is done with the records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drain {
    /// Walked over and released.
    Release,
    /// Copied out and summed up (CRC-32) before.
    Copy,
}

/// Captures a device until it is dropped.
pub struct Pump {
    capture: Capture,
    group: Arc<Group>,
    stop: Arc<AtomicBool>,
    consumer: Option<JoinHandle<()>>,
}

impl Pump {
    /// Loads the programs, proves them on `probe` (an idle device) and captures `device`.
    #[track_caller]
    pub fn start(device: &Path, probe: &Path, drain: Drain) -> Self {
        let capture = Capture::load(&CaptureOptions { probe: probe.to_owned() }).unwrap();
        let group = Arc::new(capture.add_group(RING_BYTES, &[whole(device)]).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let (ring_of, stopped) = (group.clone(), stop.clone());
        let consumer = std::thread::spawn(move || consume(ring_of.ring(), drain, &stopped));
        Pump { capture, group, stop, consumer: Some(consumer) }
    }

    /// The loaded programs.
    pub fn capture(&self) -> &Capture {
        &self.capture
    }

    /// Waits until writes from before the start are known to have ended.
    pub fn settle(&self) {
        varve_tests::wait_until(Duration::from_secs(40), "capture settles", || self.group.poll_settled().unwrap());
    }

    /// What was captured.
    pub fn counters(&self) -> GroupCounters {
        self.group.counters()
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.consumer.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the consumer of the ring panicked");
    }
}

fn consume(ring: &Ring, drain: Drain, stop: &AtomicBool) {
    let mut buffer = vec![0; 8 << 20];
    while !stop.load(Ordering::Relaxed) {
        let (mut at, until) = (ring.consumer(), ring.producer());
        while at < until {
            let Some(Entry::Record { bytes, .. } | Entry::Discarded { bytes }) = ring.entry(at) else { break };
            if drain == Drain::Copy {
                let bytes = &mut buffer[..bytes as usize];
                ring.copy_out(at, bytes);
                std::hint::black_box(crc32fast::hash(bytes));
            }
            at += bytes;
            if at - ring.consumer() >= RELEASE_BYTES {
                ring.release(at);
            }
        }
        ring.release(at);
        std::thread::sleep(TICK);
    }
}
