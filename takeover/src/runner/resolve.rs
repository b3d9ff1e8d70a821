//! The plan's steps for this point, these devices and this mode: every name put in.

use super::Context;
use crate::names::{Names, expand};
use crate::plan::{InTest, Kind, Plan, Probe, Step};
use crate::state::{Device, Mode};
use crate::step::{Action, Link, links_dir};
use std::collections::BTreeMap;
use std::path::PathBuf;
use varve_common::problem::Problem;

/// What programs are told.
pub(super) fn variables(context: &Context) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::from([
        ("VARVE_GROUP".to_owned(), context.group.clone()),
        ("VARVE_POINT".to_owned(), context.point.time.clone()),
        ("VARVE_TEST".to_owned(), u8::from(context.mode == Mode::Test).to_string()),
    ]);
    for (number, device) in context.devices.iter().enumerate() {
        variables.insert(format!("VARVE_VOLUME{number}"), device.device.display().to_string());
    }
    variables
}

/// What each step becomes for these devices.
pub(super) fn actions(plan: &Plan, context: &Context) -> Result<Vec<Action>, Problem> {
    let device_name =
        |(number, device): (usize, &Device)| (format!("volume{number}"), device.device.display().to_string());
    let mut names: Names = context.devices.iter().enumerate().map(device_name).collect();
    let (mut actions, mut known) = (Vec::new(), Vec::new());
    for step in &plan.steps {
        let action = action(step, context, &mut names, &mut known).map_err(|unknown| {
            let what = format!("{}: {{{unknown}}} stands for nothing in step '{}'", plan.file.display(), step.name);
            Problem::usage(what, "no earlier step gives that name", "correct the plan")
        })?;
        actions.push(action);
    }
    Ok(actions)
}

fn action(step: &Step, context: &Context, names: &mut Names, known: &mut Vec<Link>) -> Result<Action, String> {
    let test = context.mode == Mode::Test;
    let skip = test && step.in_test == InTest::Skip;
    let all = |words: &[String], names: &Names| words.iter().map(|word| expand(word, names)).collect();
    let action = match &step.kind {
        Kind::Attach { volumes } => {
            let links = links_of(volumes, context, test);
            for (link, name) in &links {
                // A step left out makes no links, but what comes later still finds its devices.
                let path = if skip { &link.device } else { &link.path };
                names.insert(name.clone(), path.display().to_string());
            }
            known.extend(links.iter().map(|(link, _)| link.clone()));
            Action::Attach { links: links.into_iter().map(|(link, _)| link).collect() }
        }
        Kind::Lvm { vg, devices } => {
            let devices: Vec<String> = match devices.is_empty() {
                true => context.devices.iter().map(|device| device.device.display().to_string()).collect(),
                false => all(devices, names)?,
            };
            let name = if test && !skip { format!("varve-test-{}-{vg}", context.group) } else { vg.clone() };
            names.insert(vg.clone(), name.clone());
            Action::Lvm { vg: vg.clone(), name, devices: devices.into_iter().map(PathBuf::from).collect() }
        }
        Kind::Mount { device, at, fstype, options } => {
            let mut options = options.clone();
            // XFS refuses an id that is mounted already, and the original may be on this host.
            if test && fstype == "xfs" && !options.iter().any(|option| option == "nouuid") {
                options.push("nouuid".to_owned());
            }
            let device = PathBuf::from(expand(device, names)?);
            let linked = known.iter().find(|link| link.path == device).map(|link| link.device.clone());
            let real = linked.unwrap_or_else(|| device.clone());
            Action::Mount { device, real, at: at.clone(), fstype: fstype.clone(), options }
        }
        Kind::Address { address, prefix, interface, announce, take_from_others } => Action::Address {
            address: *address,
            prefix: *prefix,
            interface: interface.clone(),
            announce: *announce,
            take_from_others: *take_from_others,
        },
        Kind::Unit { unit, test_run } => match test_run {
            Some(run) if test => Action::Program { run: all(run, names)? },
            _ => Action::Unit { unit: unit.clone() },
        },
        Kind::Command { run, undo, done_if, test_run, test_undo } => {
            let pick = |live: &Vec<String>, in_test: &Option<Vec<String>>| match in_test {
                Some(words) if test => words.clone(),
                _ => live.clone(),
            };
            let done_if = done_if.as_ref().map(|words| all(words, names)).transpose()?;
            Action::Command {
                run: all(&pick(run, test_run), names)?,
                undo: all(&pick(undo, test_undo), names)?,
                done_if,
            }
        }
        Kind::Check { probe, every } => {
            let probe = match probe {
                Probe::Command { run } => Probe::Command { run: all(run, names)? },
                other => other.clone(),
            };
            Action::Check { probe, every_ms: u64::try_from(every.as_millis()).unwrap_or(u64::MAX) }
        }
    };
    if !skip {
        return Ok(action);
    }
    let why = match &action {
        Action::Unit { unit } => format!("{unit} is not started in a test: the bubble has no systemd"),
        _ => "the plan leaves it out in a test".to_owned(),
    };
    Ok(Action::Nothing { why })
}

fn links_of(volumes: &[(String, String)], context: &Context, test: bool) -> Vec<(Link, String)> {
    let dir = links_dir(&context.paths, &context.group, test);
    let link = |name: String, device: &Device| (Link { path: dir.join(&name), device: device.device.clone() }, name);
    if volumes.is_empty() {
        let all = context.devices.iter().enumerate();
        return all.map(|(number, device)| link(format!("volume{number}"), device)).collect();
    }
    let find = |volume: &String| context.devices.iter().find(|device| device.volume == *volume);
    volumes.iter().filter_map(|(name, volume)| Some(link(name.clone(), find(volume)?))).collect()
}
