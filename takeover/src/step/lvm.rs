//! Volume groups of LVM. Only the step's own devices are looked at: the replica on this host, and other views of it,
//! carry the same ids.

use super::{Found, StepError, Work};
use crate::process;
use std::path::{Path, PathBuf};

/// `--config` that hides every other device.
fn only(devices: &[PathBuf]) -> String {
    let accept: Vec<String> = devices.iter().map(|device| format!("\"a|^{}$|\"", real(device).display())).collect();
    format!("devices {{ use_devicesfile=0 filter=[{}, \"r|.*|\"] }}", accept.join(", "))
}

/// LVM filters by the device's own name, not by links to it.
fn real(device: &Path) -> PathBuf {
    device.canonicalize().unwrap_or_else(|_| device.to_owned())
}

/// The volume groups on the devices: name and id.
fn groups(work: &Work<'_>, config: Option<&str>) -> Result<Vec<(String, String)>, StepError> {
    let mut words = vec!["vgs", "--noheadings", "--separator", " ", "-o", "vg_name,vg_uuid"];
    if let Some(config) = config {
        words.extend(["--config", config]);
    }
    let lines = process::tool(work, &words)?;
    let pair = |line: &str| {
        let mut words = line.split_whitespace();
        let (name, id) = (words.next()?.to_owned(), words.next()?.to_owned());
        // Warnings share the output with the answer.
        (words.next().is_none() && id.len() == 38 && id.matches('-').count() == 6).then_some((name, id))
    };
    Ok(lines.lines().filter_map(pair).collect())
}

pub(super) fn probe(work: &Work<'_>, name: &str, devices: &[PathBuf]) -> Result<Found, StepError> {
    let config = only(devices);
    if !groups(work, Some(&config))?.iter().any(|(there, _)| there == name) {
        return Ok(Found::No);
    }
    let words = ["lvs", "--config", &config, "--noheadings", "-o", "lv_active", name];
    let lines = process::tool(work, &words)?;
    let states: Vec<&str> = lines.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let active = !states.is_empty() && states.iter().all(|state| *state == "active");
    Ok(if active { Found::Yes } else { Found::No })
}

pub(super) fn apply(work: &Work<'_>, vg: &str, name: &str, devices: &[PathBuf]) -> Result<String, StepError> {
    let config = only(devices);
    let here = groups(work, Some(&config))?;
    let has = |wanted: &str| here.iter().any(|(there, _)| there == wanted);
    if !has(vg) && !has(name) {
        let found: Vec<&str> = here.iter().map(|(there, _)| there.as_str()).collect();
        let found = if found.is_empty() { "none".to_owned() } else { found.join(", ") };
        return Err(StepError::new(format!("the devices hold no volume group {vg}; there is {found}")));
    }
    if vg != name && !has(name) {
        // A copy with ids of its own, so that the original and it can be on one host.
        let devices: Vec<String> = devices.iter().map(|device| real(device).display().to_string()).collect();
        let mut words = vec!["vgimportclone", "--basevgname", name];
        words.extend(devices.iter().map(String::as_str));
        process::tool(work, &words)?;
    } else if let Some((_, id)) = here.iter().find(|(there, _)| there == name) {
        let others = groups(work, None)?;
        if others.iter().any(|(there, other)| there == name && other != id) {
            return Err(StepError::new(format!("this host has another volume group of the name {name}"))
                .with_next(format!("rename that one: vgrename {name} NEWNAME")));
        }
    }
    process::tool(work, &["vgchange", "--config", &config, "--activate", "y", name])?;
    Ok(String::new())
}

pub(super) fn undo(work: &Work<'_>, name: &str, devices: &[PathBuf]) -> Result<String, StepError> {
    if devices.iter().all(|device| crate::proc::device_numbers(device).is_none()) {
        return Ok("its devices are gone".to_owned());
    }
    let config = only(devices);
    if !groups(work, Some(&config))?.iter().any(|(there, _)| there == name) {
        return Ok("the devices do not hold it".to_owned());
    }
    process::tool(work, &["vgchange", "--config", &config, "--activate", "n", name]).map(|_| String::new())
}
