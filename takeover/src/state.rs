//! What a takeover has done, on disk before and after every step, so that it can go on or be taken back after a kill or
//! a reboot. There is a file as long as there is something to take back.

use crate::report::StepOutcome;
use crate::step::Action;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use varve_common::control::PointReply;
use varve_common::paths::Paths;
use varve_common::problem::Problem;
use varve_io::crashsafe::{create_dir_all_durable, remove_durable, remove_temporaries, write_atomic};
use varve_io::{DirLock, IoError};

const VERSION: u32 = 1;
/// Most bytes of a state that is read: a plan's text several times over.
const STATE_BYTES_MAX: u64 = 16 << 20;

/// A volume of the group as it is on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its path at the source: what the plan calls it.
    pub volume: String,
    /// The block device here.
    pub device: PathBuf,
    /// Size.
    pub bytes: u64,
}

/// Whether it is for real.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The takeover.
    Live,
    /// A test in a bubble; the host and its network stay as they are.
    Test,
}

impl Mode {
    /// As in file names.
    pub fn word(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Test => "test",
        }
    }
}

/// How far a takeover is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Steps are being done; if nobody is at it, it was killed.
    Running,
    /// A step failed, or the operator stopped it.
    Stopped,
    /// Every step is done.
    Done,
    /// Steps are being taken back; if nobody is at it, it was killed, or one could not be taken back.
    Undoing,
}

/// A step's part of the state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StepState {
    pub(crate) name: String,
    pub(crate) kind: String,
    /// As in the plan: a step that was done must be the same when the run goes on.
    pub(crate) written: serde_json::Value,
    /// What was done, or is to be done.
    pub(crate) action: Action,
    /// What is to be done instead: the devices or the plan have changed since.
    pub(crate) wanted: Option<Action>,
    pub(crate) timeout_ms: u64,
    pub(crate) status: Status,
    /// The kernel's name of the boot in which it was done; empty in the files of versions that noted it for all steps
    /// together, when every step was done: see [`State::boot`].
    #[serde(default)]
    pub(crate) boot: String,
    /// It was there before: not ours to take back.
    pub(crate) found: bool,
    /// Directories that were made for it.
    pub(crate) made: Vec<PathBuf>,
    pub(crate) outcome: Option<StepOutcome>,
    pub(crate) seconds: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Status {
    /// Not begun.
    Pending,
    /// Begun: there may be something of it.
    Begun,
    Done,
    /// Taken back.
    Undone,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) version: u32,
    pub(crate) group: String,
    pub(crate) mode: Mode,
    /// Marks what this run started.
    pub(crate) run: String,
    /// The kernel's name of the boot in which every step was last done, or the run began. For steps without one of their own.
    pub(crate) boot: String,
    pub(crate) phase: Phase,
    pub(crate) point: PointReply,
    /// When it began, RFC 3339.
    pub(crate) began: String,
    /// The plan's file.
    pub(crate) plan: PathBuf,
    pub(crate) devices: Vec<Device>,
    pub(crate) variables: BTreeMap<String, String>,
    pub(crate) steps: Vec<StepState>,
}

/// The directory of one group and mode, locked.
pub(crate) struct Store {
    dir: PathBuf,
    _lock: DirLock,
}

pub(crate) fn store_dir(paths: &Paths, group: &str, mode: Mode) -> PathBuf {
    paths.takeover_state(group).join(mode.word())
}

impl Store {
    /// Locks it: two runs of one plan would take each other's steps back.
    pub(crate) fn open(paths: &Paths, group: &str, mode: Mode) -> Result<Self, Problem> {
        let dir = store_dir(paths, group, mode);
        let what = format!("the takeover plan of group '{group}' cannot be run");
        let failed = |error: IoError| {
            if error.is_busy() {
                let why = format!("another command is at it: {}", error.source_io());
                return Problem::refused(what.clone(), why, "wait for it, or end it, then try again");
            }
            Problem::failed(what.clone(), error.chain(), "see to that, then try again")
        };
        create_dir_all_durable(&dir).map_err(failed)?;
        let lock = DirLock::acquire(&dir).map_err(failed)?;
        remove_temporaries(&dir).map_err(failed)?;
        Ok(Self { dir, _lock: lock })
    }

    /// What is there, if anything is.
    pub(crate) fn load(&self) -> Result<Option<State>, Problem> {
        load(&self.dir.join("state.json"))
    }

    pub(crate) fn save(&self, state: &State) -> Result<(), Problem> {
        let file = self.dir.join("state.json");
        let failed = |why: String| {
            let what = format!("the state of the takeover of group '{}' cannot be kept", state.group);
            let next = format!("make room for {}, then go on", file.display());
            Problem::failed(what, why, next)
        };
        let text = serde_json::to_vec_pretty(state).map_err(|error| failed(error.to_string()))?;
        write_atomic(&file, &text, 0o600).map_err(|error| failed(error.chain()))
    }

    /// Nothing is left to take back.
    pub(crate) fn forget(&self) -> Result<(), Problem> {
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name == CHILD || name.starts_with(OUTPUT) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        let file = self.dir.join("state.json");
        remove_durable(&file).map_err(|error| {
            Problem::failed("the state of the takeover cannot be removed", error.chain(), "see to that, then try again")
        })
    }

    /// For what a step's programs print.
    pub(crate) fn output(&self, number: usize) -> std::io::Result<File> {
        File::options().create(true).read(true).append(true).open(self.dir.join(format!("{OUTPUT}{number}")))
    }

    /// For which child runs.
    pub(crate) fn child(&self) -> std::io::Result<File> {
        File::options().create(true).read(true).write(true).truncate(false).open(self.dir.join(CHILD))
    }
}

const OUTPUT: &str = "output-";
const CHILD: &str = "child.json";

/// Reads a state without locking it.
pub(crate) fn load(file: &Path) -> Result<Option<State>, Problem> {
    let bad = |why: String| {
        Problem::failed(
            format!("the state of a takeover, {}, cannot be read", file.display()),
            why,
            "what it has done has to be taken back by hand (mounts, addresses, units); then remove the file",
        )
    };
    match std::fs::metadata(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(bad(error.to_string())),
        Ok(facts) if facts.len() > STATE_BYTES_MAX => return Err(bad("it is too large".to_owned())),
        Ok(_) => {}
    }
    let text = match std::fs::read(file) {
        // It went between the two looks.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(|error| bad(error.to_string()))?,
    };
    /// The version is readable without knowing the rest.
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let version: Version = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    if version.version != VERSION {
        let why = format!("it has version {}, this program knows {VERSION}", version.version);
        return Err(Problem { next: "use the version of varve that wrote it".to_owned(), ..bad(why) });
    }
    serde_json::from_slice(&text).map(Some).map_err(|error| bad(error.to_string()))
}

impl State {
    pub(crate) const VERSION: u32 = VERSION;

    /// The boot in which a step was done.
    pub(crate) fn boot_of(&self, place: usize) -> &str {
        let own = &self.steps[place].boot;
        if own.is_empty() { &self.boot } else { own }
    }
}
