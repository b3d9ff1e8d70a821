//! The picture for people. Role, link and data are exactly the words of DESIGN.md §5.

use super::advice;
use super::picture::{DaemonProblem, Picture, key};
use crate::words;
use varve_common::control::{AlertStatus, DaemonStatus, DrillStatus, GroupStatus, HistoryStatus};
use varve_common::state::Data;
use varve_common::wire::messages::Verify;

/// The whole screen. `varve` is the program with its options, as it has to be typed, with a space at the end.
pub(crate) fn render(picture: &Picture, varve: &str) -> String {
    let mut lines = daemons(picture);
    if !picture.groups.is_empty() {
        lines.push(String::new());
        lines.extend(groups(picture, varve));
    } else if picture.problems.is_empty() {
        lines.push(String::new());
        lines.push(nothing_protected(picture, varve));
    }
    lines.join("\n") + "\n"
}

fn daemons(picture: &Picture) -> Vec<String> {
    let answered: Vec<Vec<String>> = picture.daemons.iter().map(daemon_row).collect();
    let mut lines = words::columns(&answered);
    for DaemonProblem { daemon, problem } in &picture.problems {
        lines.push(format!("{daemon}  NOT REACHABLE, what it would say is not known: {}", problem.why));
        lines.push(format!("  next  {}", problem.next));
    }
    lines
}

fn daemon_row(daemon: &DaemonStatus) -> Vec<String> {
    let mut facts = Vec::new();
    let address = daemon.address.as_deref();
    if daemon.daemon == "agent" {
        match (address, &daemon.name) {
            (Some(address), Some(name)) => facts.push(format!("receiver {address}, known there as '{name}'")),
            (Some(address), None) => facts.push(format!("receiver {address}")),
            (None, _) => facts.push("not joined".to_owned()),
        }
    } else {
        facts.extend(daemon.name.as_ref().map(|name| format!("'{name}'")));
        facts.extend(address.map(|address| format!("listens on {address}")));
        facts.extend(daemon.hosts_connected.map(|hosts| format!("{} connected", words::count(hosts as usize, "host"))));
    }
    facts.push(format!("memory {}", words::bytes(daemon.rss_bytes)));
    vec![daemon.daemon.clone(), daemon.version.clone(), facts.join(", ")]
}

fn nothing_protected(picture: &Picture, varve: &str) -> String {
    let next = if picture.daemons.iter().any(|daemon| daemon.daemon == "agent") {
        format!("{varve}protect GROUP VOLUME...")
    } else {
        format!("{varve}host invite NAME, and 'varve protect' on that host")
    };
    format!("nothing is protected yet\n  next  {next}")
}

fn groups(picture: &Picture, varve: &str) -> Vec<String> {
    let mut rows = vec![["GROUP", "ROLE", "LINK", "DATA", "RPO", "LAG", "DURABLE"].map(str::to_owned).to_vec()];
    rows.extend(picture.groups.iter().map(group_row));
    let mut table = words::columns(&rows).into_iter();
    let mut lines: Vec<String> = table.next().into_iter().collect();
    for (row, group) in table.zip(&picture.groups) {
        lines.push(row);
        lines.extend(details(group, picture.rates.get(&key(group)).copied()));
        let next = advice::next_step(group, varve, picture.watched);
        lines.extend(next.map(|text| detail("next", &text)));
    }
    lines
}

fn group_row(group: &GroupStatus) -> Vec<String> {
    vec![
        group.name.clone(),
        word(&group.role),
        word(&group.link),
        data(group),
        group.rpo_seconds.map_or_else(|| "unknown".to_owned(), words::seconds),
        words::bytes(group.lag_bytes),
        group.window.to.as_deref().map_or_else(|| "nothing yet".to_owned(), words::time),
    ]
}

/// `protected`, `gap(ring-full)`, `resync(45 %)`.
pub(crate) fn data(group: &GroupStatus) -> String {
    let word_alone = word(&group.data);
    let inside = match (group.data, group.gap_reason, &group.resync) {
        (Data::Gap, Some(reason), _) => Some(word(&reason)),
        (Data::Resync, _, Some(sync)) => Some(format!("{} %", words::per_cent(sync.done_bytes, sync.total_bytes))),
        _ => None,
    };
    inside.map_or(word_alone.clone(), |inside| format!("{word_alone}({inside})"))
}

/// The word that JSON has, so that both can never differ.
pub(crate) fn word<T: serde::Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => "unknown".to_owned(),
    }
}

fn detail(name: &str, text: &str) -> String {
    format!("  {name:<6}  {text}")
}

fn details(group: &GroupStatus, rate: Option<f64>) -> Vec<String> {
    let mut rows: Vec<(&str, String)> = group.alerts.iter().map(|alert| ("ALERT", alert_text(alert))).collect();
    let explained = group.gap_reason.map(|reason| reason.explain().to_owned());
    if let Some(reason) = &group.reason {
        rows.push(("why", reason.clone()));
    }
    if let Some(authority) = &group.authority {
        let since = authority.since.as_deref().map_or(String::new(), |since| format!(", since {}", words::time(since)));
        let not_home = authority.not_home_bytes.filter(|bytes| *bytes > 0);
        let not_home =
            not_home.map_or(String::new(), |bytes| format!("; {} written there are not home", words::bytes(bytes)));
        let quiet = authority.quiet.as_ref().map_or(String::new(), |quiet| format!("; the volumes here: {quiet}"));
        rows.push(("runs", format!("{}{since}{not_home}{quiet}", authority.text)));
    }
    rows.extend(explained.filter(|text| group.reason.as_ref() != Some(text)).map(|text| ("why", text)));
    rows.extend(sync_text(group, rate).map(|text| ("sync", text)));
    rows.extend(group.verify.as_ref().map(|verify| ("verify", verify_text(verify))));
    rows.extend(gaps_text(group).map(|text| ("gaps", text)));
    rows.extend(window_text(group).map(|text| ("points", text)));
    rows.extend(group.drill.as_ref().map(|drill| ("drill", drill_text(drill))));
    if let Some(history) = &group.history {
        rows.push(("past", history_text(history)));
        rows.extend(history.notice.clone().map(|notice| ("past", notice)));
    }
    if group.epoch > 1 {
        rows.push(("epoch", group.epoch.to_string()));
    }
    for volume in &group.volumes {
        let replica = volume.replica.as_deref().map(|path| format!(" -> {path}")).unwrap_or_default();
        rows.push(("volume", format!("{} ({}){replica}", volume.path, words::bytes(volume.bytes))));
    }
    rows.into_iter().map(|(name, text)| detail(name, &text)).collect()
}

/// `no-ack (critical since 2026-11-20 14:03:22.512Z): the receiver has acknowledged nothing for 40 s`.
fn alert_text(alert: &AlertStatus) -> String {
    let AlertStatus { id, severity, since, text, .. } = alert;
    format!("{id} ({} since {}): {text}", severity.word(), words::time(since))
}

fn sync_text(group: &GroupStatus, rate: Option<f64>) -> Option<String> {
    let sync = group.resync.as_ref()?;
    let mut text = format!(
        "{} of {} ({} %)",
        words::bytes(sync.done_bytes),
        words::bytes(sync.total_bytes),
        words::per_cent(sync.done_bytes, sync.total_bytes)
    );
    if let Some(rate) = rate.filter(|rate| *rate >= 1.0) {
        let left = sync.total_bytes.saturating_sub(sync.done_bytes) as f64 / rate;
        text.push_str(&format!(", {}, {} left", words::rate(rate), words::seconds(left)));
    }
    Some(text)
}

fn verify_text(verify: &Verify) -> String {
    let (done, total) = (words::bytes(verify.done_bytes), words::bytes(verify.total_bytes));
    let mut text = match (&verify.error, verify.finished, verify.differing_bytes) {
        (Some(error), _, _) => format!("no result: {error}"),
        (None, false, 0) => format!("{done} of {total} compared, equal so far"),
        (None, false, different) => format!("{done} of {total} compared, {} differ", words::bytes(different)),
        (None, true, 0) => format!("{done} compared, equal"),
        (None, true, different) => format!("{done} compared, {} differ", words::bytes(different)),
    };
    if verify.differing_bytes > 0 && verify.repair {
        text.push_str(" and are sent again");
    }
    text
}

/// Only if there is more than one.
fn window_text(group: &GroupStatus) -> Option<String> {
    let (from, to) = (group.window.from.as_ref()?, group.window.to.as_ref()?);
    if from == to {
        return None;
    }
    let span = words::span(from, to).map(|span| format!(" ({span})")).unwrap_or_default();
    Some(format!("{} to {}{span}", words::time(from), words::time(to)))
}

fn drill_text(drill: &DrillStatus) -> String {
    let how = if drill.good { "good" } else { "FAILED" };
    let mut text = format!("the last one {how} ({}), ", words::time(&drill.began));
    text.push_str(&match &drill.verified {
        Some(good) => {
            format!("point {} came up in {}", words::time(&good.point), words::fine_seconds(good.rto_seconds))
        }
        None => "no point was shown to come up yet".to_owned(),
    });
    text
}

fn history_text(history: &HistoryStatus) -> String {
    let mut text = format!(
        "{} in {}, {}",
        words::bytes(history.bytes),
        words::count(history.layers as usize, "layer"),
        words::count(history.records as usize, "before-image")
    );
    if history.views > 0 {
        text.push_str(&format!(", {} open", words::count(history.views as usize, "view")));
    }
    if history.bookmarks > 0 {
        text.push_str(&format!(", {}", words::count(history.bookmarks as usize, "bookmark")));
    }
    if history.kept > 0 {
        text.push_str(&format!(" ({} kept)", history.kept));
    }
    if history.damaged > 0 {
        text.push_str(&format!(", damaged in {}", words::count(history.damaged as usize, "place")));
    }
    text
}

fn gaps_text(group: &GroupStatus) -> Option<String> {
    let newest = group.gaps.iter().max_by_key(|gap| &gap.from)?;
    let until = newest.to.as_deref().map_or_else(|| "now".to_owned(), words::time);
    Some(format!(
        "{} seen, the newest from {} to {until} ({})",
        group.gaps.len(),
        words::time(&newest.from),
        word(&newest.reason)
    ))
}
