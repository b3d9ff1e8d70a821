//! What a step does, with every name put in: done, recognised, and taken back. One file a kind.
//!
//! An [`Action`] is what the plan's step became for this point, these devices and this mode. It is kept with the state,
//! so that it can be taken back as it was done, whatever became of the plan's file.

mod address;
mod announce;
mod attach;
mod check;
mod command;
mod lvm;
mod mount;
mod unit;

pub(crate) use address::is_there as interface_is_there;
pub(crate) use attach::links_dir;
pub(crate) use command::end_leftovers;

use crate::plan::Probe;
use crate::proc::{RUN_MARK, STEP_MARK};
use crate::tools::Tools;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Of what a failed program printed, this much is kept: its end.
const OUTPUT_SHOWN_BYTES: usize = 8 << 10;

const NOTE_BYTES_MAX: usize = 4096;

/// A link to a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Where the link is.
    pub path: PathBuf,
    /// What it shows to.
    pub device: PathBuf,
}

/// What a step does, exactly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Action {
    /// Makes links.
    Attach {
        /// Each.
        links: Vec<Link>,
    },
    /// Activates a volume group.
    Lvm {
        /// As it is called on the devices.
        vg: String,
        /// As it is called here; another one in a test, with new ids.
        name: String,
        /// Its physical volumes. Others are not looked at.
        devices: Vec<PathBuf>,
    },
    /// Mounts.
    Mount {
        /// The block device, or a link to it.
        device: PathBuf,
        /// The device itself: when the mount is taken back, the link may be gone or show to another one.
        real: PathBuf,
        /// The directory.
        #[serde(rename = "where")]
        at: PathBuf,
        /// The filesystem.
        fstype: String,
        /// Its options.
        options: Vec<String>,
    },
    /// Puts an address on an interface.
    Address {
        /// The address.
        address: IpAddr,
        /// Bits of its network.
        prefix: u8,
        /// The interface.
        interface: String,
        /// Tell the neighbours.
        announce: bool,
        /// Even when somebody else answers for it.
        take_from_others: bool,
    },
    /// Starts a systemd unit.
    Unit {
        /// Its name.
        unit: String,
    },
    /// Runs a program to its end.
    Command {
        /// The words.
        run: Vec<String>,
        /// Takes it back; empty: nothing to take back.
        undo: Vec<String>,
        /// Exit code 0: it need not run.
        done_if: Option<Vec<String>>,
    },
    /// Starts a program and lets it run; in a test, in place of a unit.
    Program {
        /// The words.
        run: Vec<String>,
    },
    /// Asks until the answer is good.
    Check {
        /// What is asked.
        probe: Probe,
        /// Milliseconds between two tries.
        every_ms: u64,
    },
    /// Nothing: the step is left out.
    Nothing {
        /// Why.
        why: String,
    },
}

/// Whether what a step makes is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Yes,
    No,
    /// It cannot be seen from outside (a command without `done_if`).
    Unknown,
}

/// Why a step failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StepError {
    pub(crate) why: String,
    /// What to do about it, where that is known.
    pub(crate) next: Option<String>,
    /// The end of what the failed program printed.
    pub(crate) output: Option<String>,
}

impl StepError {
    pub(crate) fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), next: None, output: None }
    }

    pub(crate) fn with_next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    pub(crate) fn with_output(mut self, output: String) -> Self {
        let mut from = output.len().saturating_sub(OUTPUT_SHOWN_BYTES);
        while !output.is_char_boundary(from) {
            from += 1;
        }
        self.output = Some(output[from..].to_owned()).filter(|output| !output.is_empty());
        self
    }
}

/// What a step is done with.
pub(crate) struct Work<'a> {
    /// From 1.
    pub(crate) number: usize,
    /// The run's id.
    pub(crate) run: String,
    /// Whether it is done inside a bubble.
    pub(crate) test: bool,
    pub(crate) deadline: Instant,
    pub(crate) timeout: Duration,
    pub(crate) cancel: &'a AtomicBool,
    pub(crate) tools: &'a Tools,
    /// What its programs print. Opened outside the bubble, as the next; appending, so that emptying it moves the end for
    /// everybody who has it open.
    pub(crate) output: File,
    /// Which child runs, for whoever comes after a kill.
    pub(crate) child: File,
    /// What programs are told: the group, the point, the devices.
    pub(crate) variables: &'a BTreeMap<String, String>,
}

/// The child that a step runs, as noted for whoever comes after a kill.
#[derive(Serialize, Deserialize)]
pub(crate) struct ChildNote {
    pub(crate) run: String,
    pub(crate) step: usize,
    pub(crate) boot: String,
    pub(crate) pid: u32,
    pub(crate) started: u64,
}

impl Work<'_> {
    /// The whole environment of a program. Nothing comes from the operator's own: a timer has another one.
    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        let mut all = self.variables.clone();
        let own = [
            ("PATH", self.tools.path().to_owned()),
            ("HOME", "/root".to_owned()),
            ("LANG", "C.UTF-8".to_owned()),
            (RUN_MARK, self.run.clone()),
            (STEP_MARK, self.number.to_string()),
        ];
        all.extend(own.map(|(name, value)| (name.to_owned(), value)));
        all
    }

    /// Not synced: it is of use only while the machine has not booted anew.
    pub(crate) fn note_child(&self, pid: u32) {
        let Some(started) = crate::proc::started(pid.cast_signed()) else { return };
        let (run, boot) = (self.run.clone(), crate::proc::boot_id());
        let note = ChildNote { run, step: self.number, boot, pid, started };
        if let Ok(text) = serde_json::to_string(&note) {
            let _ = self.child.set_len(0).and_then(|()| self.child.write_all_at(text.as_bytes(), 0));
        }
    }

    /// Which child an earlier try of this step left.
    pub(crate) fn noted_child(&self) -> Option<ChildNote> {
        let mut text = vec![0; usize::try_from(self.child.metadata().ok()?.len()).ok()?.min(NOTE_BYTES_MAX)];
        self.child.read_exact_at(&mut text, 0).ok()?;
        let note: ChildNote = serde_json::from_slice(&text).ok()?;
        (note.run == self.run && note.step == self.number && note.boot == crate::proc::boot_id()).then_some(note)
    }

    pub(crate) fn time_left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Sleeps, but not beyond the limit; false when it is reached or the operator stopped it.
    pub(crate) fn pause(&self, time: Duration) -> bool {
        let until = Instant::now() + time.min(self.time_left());
        while Instant::now() < until && !self.is_cancelled() {
            std::thread::sleep(Duration::from_millis(20).min(until.saturating_duration_since(Instant::now())));
        }
        !self.is_cancelled() && Instant::now() < self.deadline
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.load(std::sync::atomic::Ordering::Relaxed)
    }
}

impl Action {
    /// Whether it belongs into the bubble in a test. Links and volume groups are made beside it: devices have no
    /// namespaces.
    pub(crate) fn is_inside(&self) -> bool {
        !matches!(self, Self::Attach { .. } | Self::Lvm { .. } | Self::Nothing { .. })
    }

    /// Directories that it will have to make.
    pub(crate) fn to_make(&self) -> Vec<PathBuf> {
        match self {
            Self::Attach { links } => attach::to_make(links),
            Self::Mount { at, .. } => mount::missing_dirs(at),
            _ => Vec::new(),
        }
    }

    /// Whether what it makes is there.
    pub(crate) fn probe(&self, work: &Work<'_>) -> Result<Found, StepError> {
        match self {
            Self::Attach { links } => Ok(attach::probe(links)),
            Self::Lvm { name, devices, .. } => lvm::probe(work, name, devices),
            Self::Mount { real, at, .. } => mount::probe(real, at),
            Self::Address { address, prefix, interface, .. } => {
                address::probe(work, *address, *prefix, address::place(work, interface))
            }
            Self::Unit { unit } => unit::probe(work, unit),
            Self::Command { done_if, .. } => command::probe(work, done_if.as_deref()),
            Self::Program { .. } => Ok(command::probe_program(work)),
            // Asked anew each time.
            Self::Check { .. } => Ok(Found::No),
            Self::Nothing { .. } => Ok(Found::Yes),
        }
    }

    /// Does it; gives what there is to say about it.
    pub(crate) fn apply(&self, work: &Work<'_>) -> Result<String, StepError> {
        match self {
            Self::Attach { links } => attach::apply(links),
            Self::Lvm { vg, name, devices } => lvm::apply(work, vg, name, devices),
            Self::Mount { device, real, at, fstype, options } => {
                mount::apply(work, (device, real), at, fstype, options)
            }
            Self::Address { address, prefix, interface, announce, take_from_others } => {
                address::apply(work, *address, *prefix, interface, *announce, *take_from_others)
            }
            Self::Unit { unit } => unit::apply(work, unit),
            Self::Command { run, .. } => command::apply(work, run),
            Self::Program { run } => command::apply_program(work, run),
            Self::Check { probe, every_ms } => check::apply(work, probe, Duration::from_millis(*every_ms)),
            Self::Nothing { why } => Ok(why.clone()),
        }
    }

    /// What to do again although it is there: neighbours may have forgotten.
    pub(crate) fn refresh(&self, work: &Work<'_>) {
        if let Self::Address { address, interface, announce: true, .. } = self
            && !work.test
        {
            let _ = announce::announce(interface, *address);
        }
    }

    /// Takes it back; gives what there is to say about it. What is not there any more is no error.
    pub(crate) fn undo(&self, work: &Work<'_>, made: &[PathBuf]) -> Result<String, StepError> {
        match self {
            Self::Attach { links } => attach::undo(links, made),
            Self::Lvm { name, devices, .. } => lvm::undo(work, name, devices),
            Self::Mount { real, at, .. } => mount::undo(work, real, at, made),
            Self::Address { address, prefix, interface, .. } => address::undo(work, *address, *prefix, interface),
            Self::Unit { unit } => unit::undo(work, unit),
            Self::Command { undo, .. } => command::undo(work, undo),
            Self::Program { .. } => command::undo_program(work),
            Self::Check { .. } | Self::Nothing { .. } => Ok(String::new()),
        }
    }

    /// Whether there can be something to take back.
    pub(crate) fn has_undo(&self) -> bool {
        !matches!(self, Self::Check { .. } | Self::Nothing { .. })
            && !matches!(self, Self::Command { undo, .. } if undo.is_empty())
    }
}
