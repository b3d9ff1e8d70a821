//! The plan as an operator writes it: its words, and which are good.
//!
//! - [`parse`]: from TOML, every finding with its line
//! - [`fields`]: a TOML table read key by key, so that a key nobody asked for is named
//! - [`check`]: does it fit the group's volumes, and this host?

mod check;
mod fields;
mod parse;

use serde::Serialize;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use varve_common::problem::Problem;

/// The version of the file's format that is written and read.
pub const VERSION: i64 = 1;
/// Most bytes of a plan's file.
pub const PLAN_BYTES_MAX: u64 = 256 << 10;
/// Most steps.
pub const STEPS_MAX: usize = 200;
/// Longest text of one value, bytes.
pub const TEXT_BYTES_MAX: usize = 4096;
/// Most words of a command.
pub const WORDS_MAX: usize = 128;
/// A step's time limit is within these.
pub const TIMEOUT_MIN: Duration = Duration::from_millis(100);
/// See [`TIMEOUT_MIN`].
pub const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);

/// A takeover plan: what brings the business up, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Where it was read from; for messages.
    pub file: PathBuf,
    /// Directories that are empty and writable in a test (beside `/tmp`, `/run` and the like).
    pub private: Vec<PathBuf>,
    /// In order. Undo goes the other way.
    pub steps: Vec<Step>,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// Unique in the plan.
    pub name: String,
    /// Line of the plan's file where it begins, from 1.
    #[serde(skip)]
    pub line: usize,
    /// Longer than this it may not take.
    pub timeout: Duration,
    /// Whether it runs in a test.
    pub in_test: InTest,
    /// What it does.
    #[serde(flatten)]
    pub kind: Kind,
}

/// What a test does with a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum InTest {
    /// Runs it inside the bubble.
    Run,
    /// Leaves it out.
    Skip,
}

/// What a step does. Texts may hold `{names}` of volumes and volume groups.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Kind {
    /// Stable links to the group's volumes.
    Attach {
        /// The link's name and the volume's path at the source; empty: all, as `volume0`…
        volumes: Vec<(String, String)>,
    },
    /// Activates a volume group.
    Lvm {
        /// Its name at the source.
        vg: String,
        /// Its physical volumes; empty: all volumes of the group.
        devices: Vec<String>,
    },
    /// Mounts a filesystem.
    Mount {
        /// A block device.
        device: String,
        /// An existing or new directory.
        #[serde(rename = "where")]
        at: PathBuf,
        /// `ext4`, `xfs`, …
        fstype: String,
        /// As in fstab.
        options: Vec<String>,
    },
    /// Takes over an IP address.
    Address {
        /// The address.
        address: IpAddr,
        /// Bits of its network.
        prefix: u8,
        /// Where it is put.
        interface: String,
        /// Tell the neighbours (gratuitous ARP, unsolicited neighbour advertisement).
        announce: bool,
        /// Take it even when somebody else on the link answers for it.
        take_from_others: bool,
    },
    /// Starts a systemd unit.
    Unit {
        /// With its suffix.
        unit: String,
        /// A program that stands for it inside the bubble, where systemd is not.
        test_run: Option<Vec<String>>,
    },
    /// Runs a program until it ends.
    Command {
        /// The words.
        run: Vec<String>,
        /// Takes it back; empty: there is nothing to take back.
        undo: Vec<String>,
        /// Says (with exit code 0) that it need not run.
        done_if: Option<Vec<String>>,
        /// Instead of `run` in a test.
        test_run: Option<Vec<String>>,
        /// Instead of `undo` in a test.
        test_undo: Option<Vec<String>>,
    },
    /// Waits until something answers as it should.
    Check {
        /// What is asked.
        probe: Probe,
        /// Pause between two tries.
        every: Duration,
    },
}

/// What a check asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Probe {
    /// A connection can be made.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// A page is answered.
    Http {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
        /// With its query.
        path: String,
        /// The expected status.
        status: u16,
        /// What the answer must contain.
        text: Option<String>,
    },
    /// A program ends with exit code 0.
    Command {
        /// The words.
        run: Vec<String>,
    },
}

impl Kind {
    /// As in the plan.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Attach { .. } => "attach",
            Self::Lvm { .. } => "lvm",
            Self::Mount { .. } => "mount",
            Self::Address { .. } => "address",
            Self::Unit { .. } => "unit",
            Self::Command { .. } => "command",
            Self::Check { .. } => "check",
        }
    }
}

impl Plan {
    /// Reads and checks a plan's file.
    ///
    /// # Errors
    /// It is not there, cannot be read, or is not understood; then every finding is named with its line.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Problem> {
        let path = path.as_ref();
        let unreadable = |why: String| {
            let next = format!("make {} readable for root", path.display());
            Problem::failed(format!("the takeover plan {} cannot be read", path.display()), why, next)
        };
        match std::fs::metadata(path) {
            Ok(facts) if facts.len() > PLAN_BYTES_MAX => {
                return Err(unreadable(format!("it has more than {PLAN_BYTES_MAX} bytes")));
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Problem::not_found(
                    format!("there is no takeover plan {}", path.display()),
                    "nobody has written down how the business comes up on this host",
                    "write it; docs/takeover.md has an example",
                ));
            }
            Err(error) => return Err(unreadable(error.to_string())),
        }
        let text = std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
        Self::parse(path, &text)
    }

    /// Reads and checks a plan's text; `file` is for messages.
    ///
    /// # Errors
    /// Every finding is named with its line.
    pub fn parse(file: impl AsRef<Path>, text: &str) -> Result<Self, Problem> {
        let file = file.as_ref();
        parse::plan(file, text).map_err(|findings| {
            let lines: Vec<String> = findings.iter().map(ToString::to_string).collect();
            Problem::usage(
                format!("the takeover plan {} is not understood", file.display()),
                lines.join("; "),
                format!("correct {}; docs/takeover.md lists its keys", file.display()),
            )
        })
    }
}
