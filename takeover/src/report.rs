//! What is told: before (dry run), while it goes on (progress) and after (report). The structs are the JSON that scripts
//! read; their `Display` is for people.

use crate::plan::Probe;
use crate::state::{Device, Mode};
use crate::step::Action;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use varve_common::control::PointReply;
use varve_common::problem::Problem;

/// What would happen, exactly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DryRun {
    /// The group.
    pub group: String,
    /// For real, or in a bubble.
    pub mode: Mode,
    /// The exact point.
    pub point: PointReply,
    /// The plan's file.
    pub plan: PathBuf,
    /// The group's volumes on this host.
    pub devices: Vec<Device>,
    /// What each step would do, in order.
    pub steps: Vec<StepPlan>,
    /// What this host lacks.
    pub problems: Vec<Problem>,
}

/// A step of a dry run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepPlan {
    /// From 1.
    pub number: usize,
    /// Its name.
    pub name: String,
    /// As in the plan.
    pub kind: String,
    /// Longer it may not take.
    pub timeout_seconds: f64,
    /// In words.
    pub what: String,
    /// How it would be taken back, in words; `None`: nothing to take back.
    pub undo: Option<String>,
    /// Exactly.
    pub action: Action,
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepOutcome {
    /// It was done.
    Done,
    /// It was there already.
    InPlace,
    /// It is left out in a test.
    Skipped,
    /// It was tried and did not work.
    Failed,
    /// An earlier one failed.
    NotReached,
    /// It was taken back.
    Undone,
    /// It was there before the takeover, and stays.
    LeftAsFound,
    /// It could not be taken back.
    UndoFailed,
}

/// What became of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// From 1.
    pub number: usize,
    /// Its name.
    pub name: String,
    /// As in the plan.
    pub kind: String,
    /// How it ended.
    pub outcome: StepOutcome,
    /// How long it took.
    pub seconds: f64,
    /// What it does, in words.
    pub what: String,
    /// What there is to say about it; empty: nothing.
    pub detail: String,
    /// The end of what a failed program printed.
    pub output: Option<String>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Every step is done.
    Done,
    /// A step failed, or the operator stopped it.
    Stopped,
    /// Everything was taken back.
    Undone,
    /// Something could not be taken back.
    UndoIncomplete,
}

/// What a run did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The group.
    pub group: String,
    /// For real, or in a bubble.
    pub mode: Mode,
    /// The exact point.
    pub point: PointReply,
    /// The plan's file.
    pub plan: PathBuf,
    /// How it ended.
    pub outcome: Outcome,
    /// When the takeover began, RFC 3339.
    pub began: String,
    /// From then until every step was done: the measured recovery time.
    pub rto_seconds: Option<f64>,
    /// How long this command took.
    pub seconds: f64,
    /// Checks that were good.
    pub checks: usize,
    /// Every step, in the order in which it was done or taken back.
    pub steps: Vec<StepReport>,
    /// What is in place on this host because of the plan, in words.
    pub left: Vec<String>,
    /// Why it did not end as hoped, and what to do.
    pub problem: Option<Problem>,
}

/// Told while a run goes on.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Progress {
    /// A step begins.
    Begins {
        /// From 1.
        number: usize,
        /// How many there are.
        total: usize,
        /// Its name.
        name: String,
        /// What it does, in words.
        what: String,
        /// Whether it is taken back.
        undo: bool,
    },
    /// A step ended.
    Ended(StepReport),
}

/// On one line: of a script that has several, the first.
fn words(words: &[String]) -> String {
    let text = match words {
        [shell, dash, script] if shell == "/bin/sh" && dash == "-c" => script.trim().to_owned(),
        words => words.join(" "),
    };
    match text.split_once('\n') {
        Some((first, _)) => format!("{first} …"),
        None => text,
    }
}

/// The lines of a script that has several.
fn script(words: &[String]) -> impl Iterator<Item = &str> {
    let script = words.get(2).map_or("", String::as_str).trim();
    script.lines().filter(move |_| script.contains('\n'))
}

impl Probe {
    fn text(&self) -> String {
        match self {
            Self::Tcp { host, port } => format!("{host}:{port} takes connections"),
            Self::Http { host, port, path, status, text } => {
                let text = text.as_ref().map(|text| format!(" with '{text}'")).unwrap_or_default();
                format!("http://{host}:{port}{path} answers {status}{text}")
            }
            Self::Command { run } => format!("'{}' is content", words(run)),
        }
    }
}

impl Action {
    /// What it does, in words.
    pub fn text(&self) -> String {
        match self {
            Self::Attach { links } => {
                let links: Vec<String> =
                    links.iter().map(|link| format!("{} to {}", link.path.display(), link.device.display())).collect();
                format!("link {}", links.join(", "))
            }
            Self::Lvm { vg, name, .. } if vg != name => {
                format!("give the volume group {vg} new ids and the name {name}, activate it")
            }
            Self::Lvm { name, .. } => format!("activate the volume group {name}"),
            Self::Mount { device, at, fstype, options, .. } => {
                let with = if options.is_empty() { String::new() } else { format!(" with {}", options.join(",")) };
                format!("mount {} ({fstype}) at {}{with}", device.display(), at.display())
            }
            Self::Address { address, prefix, interface, announce, .. } => {
                let tell = if *announce { " and tell the neighbours" } else { "" };
                format!("put {address}/{prefix} on {interface}{tell}")
            }
            Self::Unit { unit } => format!("start {unit}"),
            Self::Command { run, .. } => format!("run {}", words(run)),
            Self::Program { run } => format!("start {} and let it run", words(run)),
            Self::Check { probe, .. } => format!("wait until {}", probe.text()),
            Self::Nothing { why } => format!("nothing: {why}"),
        }
    }

    /// How it is taken back, in words.
    pub fn undo_text(&self) -> Option<String> {
        Some(match self {
            Self::Attach { .. } => "remove the links".to_owned(),
            Self::Lvm { name, .. } => format!("deactivate {name}"),
            Self::Mount { at, .. } => format!("unmount {}", at.display()),
            Self::Address { address, interface, .. } => format!("take {address} from {interface}"),
            Self::Unit { unit } => format!("stop {unit}"),
            Self::Command { undo, .. } if undo.is_empty() => return None,
            Self::Command { undo, .. } => format!("run {}", words(undo)),
            Self::Program { .. } => "end it".to_owned(),
            Self::Check { .. } | Self::Nothing { .. } => return None,
        })
    }

    /// What it leaves, in words.
    pub(crate) fn left_text(&self) -> Option<String> {
        Some(match self {
            Self::Attach { links } => {
                let links: Vec<String> = links.iter().map(|link| link.path.display().to_string()).collect();
                format!("links: {}", links.join(", "))
            }
            Self::Lvm { name, .. } => format!("the volume group {name} is active"),
            Self::Mount { device, at, .. } => format!("{} is mounted at {}", device.display(), at.display()),
            Self::Address { address, interface, .. } => format!("{address} is on {interface}"),
            Self::Unit { unit } => format!("{unit} runs"),
            Self::Command { run, .. } => format!("ran: {}", words(run)),
            Self::Program { run } => format!("runs: {}", words(run)),
            Self::Check { .. } | Self::Nothing { .. } => return None,
        })
    }
}

/// `3.2 s`, `2 min 10 s`.
pub(crate) fn span(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => {
            let text = format!("{s:.1}");
            format!("{} s", text.trim_end_matches(".0"))
        }
        s if s < 60.0 => format!("{s:.0} s"),
        s => format!("{} min {} s", s.round() as u64 / 60, s.round() as u64 % 60),
    }
}

impl StepOutcome {
    fn word(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::InPlace => "in place",
            Self::Skipped => "skipped",
            Self::Failed => "FAILED",
            Self::NotReached => "not reached",
            Self::Undone => "undone",
            Self::LeftAsFound => "left as found",
            Self::UndoFailed => "NOT UNDONE",
        }
    }
}

impl fmt::Display for DryRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.mode {
            Mode::Live => "would be taken over",
            Mode::Test => "would be tested in a bubble",
        };
        writeln!(f, "group '{}' {how}; nothing was changed", self.group)?;
        writeln!(f, "  point: {} (position {})", self.point.time, self.point.position)?;
        writeln!(f, "  plan:  {}", self.plan.display())?;
        for device in &self.devices {
            writeln!(f, "  {} is {} ({} bytes)", device.device.display(), device.volume, device.bytes)?;
        }
        for step in &self.steps {
            let limit = span(step.timeout_seconds);
            writeln!(f, "  {:>2}. {} ({}, up to {limit}): {}", step.number, step.name, step.kind, step.what)?;
            if let Action::Command { run, .. } | Action::Program { run } = &step.action {
                script(run).try_for_each(|line| writeln!(f, "        | {line}"))?;
            }
            if let Some(undo) = &step.undo {
                writeln!(f, "      undo: {undo}")?;
            }
            if let Action::Command { undo, .. } = &step.action {
                script(undo).try_for_each(|line| writeln!(f, "        | {line}"))?;
            }
        }
        for problem in &self.problems {
            writeln!(f, "  note: {problem}; next: {}", problem.next)?;
        }
        Ok(())
    }
}

impl fmt::Display for StepReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, time) = (self.outcome.word(), span(self.seconds));
        write!(f, "{:>2}. {:<13} {:>7}  {}: {}", self.number, word, time, self.name, self.what)?;
        if !self.detail.is_empty() {
            write!(f, "; {}", self.detail)?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let test = if self.mode == Mode::Test { "test of the " } else { "" };
        let how = match self.outcome {
            Outcome::Done => "every step is done",
            Outcome::Stopped => "stopped",
            Outcome::Undone => "everything was taken back",
            Outcome::UndoIncomplete => "not everything could be taken back",
        };
        writeln!(f, "{test}takeover of group '{}': {how} ({})", self.group, span(self.seconds))?;
        writeln!(f, "  point: {} (position {})", self.point.time, self.point.position)?;
        for step in &self.steps {
            writeln!(f, "  {step}")?;
            for line in step.output.iter().flat_map(|output| output.lines()) {
                writeln!(f, "        | {line}")?;
            }
        }
        if let Some(rto) = self.rto_seconds {
            let checks = match self.checks {
                0 => "nothing was checked: the plan has no check".to_owned(),
                1 => "1 check was good".to_owned(),
                checks => format!("{checks} checks were good"),
            };
            writeln!(f, "  recovery time: {}; {checks}", span(rto))?;
        }
        if matches!(self.outcome, Outcome::Stopped | Outcome::UndoIncomplete) {
            for left in &self.left {
                writeln!(f, "  left: {left}")?;
            }
        }
        Ok(())
    }
}
