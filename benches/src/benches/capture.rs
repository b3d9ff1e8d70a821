//! What a writer keeps of its speed while its writes are captured.
//!
//! One fio runs through; capture is switched on and off under it, slice by slice, and the device's own statistics say
//! what was written in each. Without means that no program is loaded.

use std::path::Path;
use std::time::{Duration, Instant};

use varve_tests::{LoopDevice, MIB, Scratch};

use crate::plan::Plan;
use crate::pump::{Drain, Pump};
use crate::report::{Report, Target};
use crate::statistics::{median, ratios};
use crate::volume::{Volume, fio, written_bytes};

/// Between a switch and the slice.
const SETTLE: Duration = Duration::from_millis(200);

const JOBS: [(&str, &str, u32); 4] = [
    ("4 KiB, depth 1", "4k", 1),
    ("4 KiB, depth 32", "4k", 32),
    ("64 KiB, depth 8", "64k", 8),
    ("1 MiB, depth 4", "1m", 4),
];

/// What is loaded during a slice.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    /// Nothing.
    Without,
    /// Capture of another device.
    Beside,
    /// Capture of this one.
    With(Drain),
}

const MODES: [Mode; 4] = [Mode::Without, Mode::Beside, Mode::With(Drain::Release), Mode::With(Drain::Copy)];

impl Mode {
    fn start(self, device: &Path, other: &Path) -> Option<Pump> {
        match self {
            Mode::Without => None,
            Mode::Beside => Some(Pump::start(other, other, Drain::Release)),
            Mode::With(drain) => Some(Pump::start(device, other, drain)),
        }
    }
}

pub fn run(plan: &Plan, report: &mut Report) {
    let volume = Volume::in_memory(512 * MIB);
    let scratch = Scratch::memory();
    let other = LoopDevice::new(&scratch, "other", MIB);
    for (what, block, depth) in JOBS {
        let bytes = block_bytes(block);
        // The contents do not matter to capture, and fresh ones would cost the writer time in both modes.
        let load = fio(volume.path()).block(block).depth(depth).seconds(3600);
        let load = load.start(&volume.scratch);
        std::thread::sleep(Duration::from_secs(1));
        let mut iops = MODES.map(|_| Vec::new());
        let mut lost = 0;
        for round in 0..plan.pairs(9, 3) {
            let mut order: Vec<usize> = (0..MODES.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for mode in order {
                let pump = MODES[mode].start(volume.path(), other.path());
                std::thread::sleep(SETTLE);
                let (from, begun) = (written_bytes(volume.path()), Instant::now());
                std::thread::sleep(plan.run(1.0, 0.5));
                let written = written_bytes(volume.path()) - from;
                iops[mode].push(written as f64 / bytes / begun.elapsed().as_secs_f64());
                lost += pump.as_ref().map_or(0, |pump| pump.counters().dropped_records);
            }
        }
        load.stop();
        let without = &iops[0];
        let lines = [
            ("ring released", Target::Min(0.95)),
            ("copied out + CRC", Target::None),
            ("another device captured", Target::None),
        ];
        for (iops, (name, target)) in [&iops[2], &iops[3], &iops[1]].into_iter().zip(lines) {
            let detail = format!("{:.0} of {:.0} IOPS", median(iops), median(without));
            report.row(&format!("{what}, {name}"), "x", &ratios(iops, without), target, &detail);
        }
        if lost > 0 {
            // A dropped record is cheaper than a kept one: the ratio would flatter.
            report.note(&format!("{what}: {lost} records found the ring full."));
        }
    }
}

fn block_bytes(block: &str) -> f64 {
    let (number, unit) = block.split_at(block.len() - 1);
    let unit = if unit == "m" { MIB } else { 1024 };
    number.parse::<f64>().unwrap() * unit as f64
}
