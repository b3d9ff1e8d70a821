//! Does a plan fit the group's volumes, and this host?

use super::{InTest, Kind, Plan, Probe, Step};
use crate::names::{Names, expand};
use crate::step::interface_is_there;
use crate::tools::Tools;
use varve_common::problem::Problem;

impl Plan {
    /// Whether the plan fits a group with these volumes (their paths at the source): every volume that it names is
    /// there, and every `{name}` is given by an earlier step. Nothing is touched.
    pub fn check(&self, volumes: &[String]) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut names: Names = (0..volumes.len()).map(|number| (format!("volume{number}"), String::new())).collect();
        for step in &self.steps {
            for text in texts(step) {
                if let Err(unknown) = expand(text, &names) {
                    let known: Vec<String> = names.keys().map(|name| format!("{{{name}}}")).collect();
                    let why = format!("nothing before it gives that name; there are {}", known.join(", "));
                    let next = "correct the name; a brace of a program's own is written {{ or }}";
                    problems.push(self.problem(step, &format!("{{{unknown}}} stands for nothing"), &why, next));
                }
            }
            match &step.kind {
                Kind::Attach { volumes: wanted } => {
                    for (name, volume) in wanted {
                        if !volumes.contains(volume) {
                            let what = format!("the group has no volume {volume}");
                            let why = format!("its volumes are {}", volumes.join(", "));
                            problems.push(self.problem(step, &what, &why, "name volumes by their path at the source"));
                        }
                        if name.strip_prefix("volume").is_some_and(|rest| rest.parse::<u32>().is_ok()) {
                            let what = format!("'{name}' is the name of a volume by its number");
                            let why = "two things of one name would be mixed up";
                            problems.push(self.problem(step, &what, why, "choose another name"));
                        } else if names.insert(name.clone(), String::new()).is_some() {
                            let what = format!("the name '{name}' is taken");
                            let why = "an earlier step gives it";
                            problems.push(self.problem(step, &what, why, "choose another name"));
                        }
                    }
                }
                Kind::Lvm { vg, .. } if names.insert(vg.clone(), String::new()).is_some() => {
                    let what = format!("the name '{vg}' is taken");
                    problems.push(self.problem(step, &what, "an earlier step gives it", "choose another name"));
                }
                _ => {}
            }
        }
        problems
    }

    /// What this host lacks that the plan will need: directories, interfaces, programs. Nothing is touched. A plan can
    /// be started all the same: somebody may see to it while it runs.
    pub fn check_host(&self, tools: &Tools) -> Vec<Problem> {
        let mut problems = Vec::new();
        for step in &self.steps {
            for program in programs(step) {
                if !program.contains('{') && tools.find(program).is_none() {
                    let why = "the step needs it on this host";
                    problems.push(self.problem(step, &format!("there is no program {program}"), why, "install it"));
                }
            }
            match &step.kind {
                Kind::Mount { at, .. } if !at.is_dir() => {
                    let why = "a failover makes it, a test cannot: in a bubble this host is read-only";
                    let next = format!("mkdir -p {}", at.display());
                    problems.push(self.problem(step, &format!("there is no directory {}", at.display()), why, &next));
                }
                Kind::Address { interface, .. } if !interface_is_there(interface) => {
                    let what = format!("there is no network interface {interface}");
                    problems.push(self.problem(step, &what, "the address is to be put there", "ip -brief link"));
                }
                _ => {}
            }
        }
        problems
    }

    fn problem(&self, step: &Step, what: &str, why: &str, next: &str) -> Problem {
        let place = format!("{} line {}: step '{}'", self.file.display(), step.line, step.name);
        Problem::usage(format!("{place}: {what}"), why, next)
    }
}

/// Every text of a step in which names may be.
fn texts(step: &Step) -> Vec<&str> {
    fn of(words: &[String]) -> impl Iterator<Item = &str> {
        words.iter().map(String::as_str)
    }
    match &step.kind {
        Kind::Attach { .. } | Kind::Address { .. } => Vec::new(),
        Kind::Lvm { devices, .. } => of(devices).collect(),
        Kind::Mount { device, .. } => vec![device],
        Kind::Unit { test_run, .. } => test_run.iter().flat_map(|words| of(words)).collect(),
        Kind::Command { run, undo, done_if, test_run, test_undo } => {
            let more = [done_if, test_run, test_undo].into_iter().flatten().flat_map(|words| of(words));
            of(run).chain(of(undo)).chain(more).collect()
        }
        Kind::Check { probe: Probe::Command { run }, .. } => of(run).collect(),
        Kind::Check { .. } => Vec::new(),
    }
}

/// Every program that a step starts.
fn programs(step: &Step) -> Vec<&str> {
    match &step.kind {
        Kind::Attach { .. } => Vec::new(),
        Kind::Lvm { .. } if step.in_test == InTest::Run => vec!["vgs", "vgchange", "vgimportclone"],
        Kind::Lvm { .. } => vec!["vgs", "vgchange"],
        Kind::Mount { .. } => vec!["mount", "umount"],
        Kind::Address { .. } => vec!["ip"],
        Kind::Unit { test_run, .. } => {
            std::iter::once("systemctl").chain(test_run.iter().filter_map(|w| w.first().map(String::as_str))).collect()
        }
        Kind::Command { run, undo, done_if, test_run, test_undo } => {
            let more = [done_if, test_run, test_undo].into_iter().flatten();
            [run, undo].into_iter().chain(more).filter_map(|words| words.first().map(String::as_str)).collect()
        }
        Kind::Check { probe: Probe::Command { run }, .. } => run.first().map(String::as_str).into_iter().collect(),
        Kind::Check { .. } => Vec::new(),
    }
}
