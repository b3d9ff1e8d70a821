//! `varve drill`: does the newest point come up by the group's takeover plan? Now, or again and again.

use crate::check;
use crate::client::{Daemon, PATIENT, ask_authority, ask_receiver};
use crate::context::{Context, DONE, FAILED, Outcome, explain};
use crate::takeover;
use serde::Serialize;
use std::process::Command;
use std::time::{Duration, SystemTime};
use varve_common::control::{FailoverReply, ReceiverRequest};
use varve_common::problem::{Problem, ProblemKind};
use varve_takeover::drill::timer_drop_in;
use varve_takeover::{DrillMark, DrillRecord, Mode, Outcome as Ended, Plan, Report, standing};

const EXAMPLE: &str = "Example:
  varve drill db
  varve drill db --at -1h
  varve drill db --every 24h
  varve drill show db";

/// Tests the takeover of a group: the point comes up in a bubble by the group's plan, is checked, and goes away again, while
/// replication goes on. Exit code 1 if a step failed. With --every it is done by a timer of systemd.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The group's name; `show` and the group's name prints what the last drill showed
    #[arg(value_name = "[run|show] GROUP", num_args = 1..=2, required = true)]
    words: Vec<String>,
    /// Which point (varve points); without it the newest
    #[arg(long, value_name = "POINT", allow_hyphen_values = true)]
    at: Option<String>,
    /// Again and again, so often: 24h, 7d
    #[arg(long, value_name = "AGE", conflicts_with = "at")]
    every: Option<String>,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    match &args.words[..] {
        [word, group] if word == "show" => {
            if args.at.is_some() || args.every.is_some() {
                let (why, next) = ("it shows the last drill and begins none", "leave --at and --every away");
                return Err(Problem::usage("'show' takes no other flags", why, next));
            }
            show(context, group)
        }
        [word, group] if word == "run" => begin(context, args, group),
        [group] => begin(context, args, group),
        _ => Err(Problem::usage(
            format!("'{}' is not understood", args.words.join(" ")),
            "two words are 'run GROUP' or 'show GROUP'",
            "varve drill --help",
        )),
    }
}

fn begin(context: &Context, args: &Args, group: &str) -> Outcome {
    check::group(group)?;
    let plan = Plan::load(context.paths.takeover_plan(group))?;
    if let Some(every) = &args.every {
        return schedule(context, group, check::interval(every)?);
    }
    let at = check::point(args.at.as_deref().unwrap_or("latest"))?;
    takeover::fits(context, group, &plan)?;
    let mark = DrillMark::open(&context.paths, group)?;
    match mark.is_set() {
        // It was killed.
        true => take_away(context, group)?,
        false => no_test(context, group)?,
    }
    mark.set()?;
    let began = SystemTime::now();
    let request = ReceiverRequest::Failover {
        group: group.to_owned(),
        at,
        test: true,
        dry_run: false,
        planned: None,
        abort_after_seconds: None,
    };
    let then = "the next drill takes away what this one made";
    let reply: FailoverReply = ask_authority(context, group, &request, then, &mut |_| {}).or_else(|problem| {
        // Nothing was made. After another problem something may have been: then the next drill takes it away.
        if matches!(problem.kind, ProblemKind::Refused | ProblemKind::NotFound) {
            mark.clear()?;
        }
        Err(problem)
    })?;
    let devices = takeover::served(&reply.volumes);
    let report = takeover::runner(context, plan, group, Mode::Test, reply.point, devices, began)
        .and_then(|runner| runner.run(&mut takeover::show(context.json)));
    let gone = take_away(context, group).and_then(|()| mark.clear());
    let report = report?;
    let remembered = DrillRecord::remember(&context.paths, &report);
    context.answer(&report, ToString::to_string);
    if let Err(problem) = remembered {
        explain(&problem);
    }
    gone?;
    Ok(end(&report))
}

fn end(report: &Report) -> u8 {
    match (report.outcome, &report.problem) {
        (Ended::Done, _) => DONE,
        (_, problem) => {
            problem.iter().for_each(explain);
            FAILED
        }
    }
}

/// An operator who tests the group is not disturbed.
fn no_test(context: &Context, group: &str) -> Result<(), Problem> {
    let takeover = Daemon::Receiver.group(context, group)?.history.and_then(|history| history.takeover);
    let is_tested = takeover.is_some_and(|takeover| takeover.test);
    if !is_tested && standing(&context.paths, group, Mode::Test)?.is_none() {
        return Ok(());
    }
    Err(Problem::refused(
        format!("the drill of group '{group}' was not begun"),
        "a test is in place that no drill made",
        format!("'{}' ends it", takeover::abort_command(context, group)),
    ))
}

/// The bubble and the test's devices.
fn take_away(context: &Context, group: &str) -> Result<(), Problem> {
    varve_takeover::clean(&context.paths, group, &varve_takeover::Tools::default())?;
    let status = Daemon::Receiver.group(context, group)?;
    if status.history.and_then(|history| history.takeover).is_some_and(|takeover| takeover.test) {
        let request = ReceiverRequest::FailoverAbort { group: group.to_owned(), force: true, only_test: true };
        ask_receiver::<FailoverReply>(context, &request, PATIENT)?;
    }
    Ok(())
}

fn schedule(context: &Context, group: &str, every: Duration) -> Outcome {
    let command = context.suggest(&format!("drill run {group}"));
    if !context.paths.is_system() || !std::path::Path::new("/run/systemd/system").is_dir() {
        return Err(Problem::refused(
            format!("no timer was made for the drills of '{group}'"),
            "systemd does not run here, or this is not the machine's own installation",
            format!("let whatever runs things at times here run '{command}' every {} s", every.as_secs()),
        ));
    }
    let timer = format!("varve-drill@{group}.timer");
    let dir = std::path::PathBuf::from("/etc/systemd/system").join(format!("{timer}.d"));
    let failed = |why: String| {
        Problem::failed(format!("no timer was made for the drills of '{group}'"), why, "see 'systemctl status'")
    };
    let file = dir.join("every.conf");
    let written = std::fs::create_dir_all(&dir).and_then(|()| std::fs::write(&file, timer_drop_in(every)));
    written.map_err(|error| failed(format!("{}: {}", file.display(), crate::words::sentence(&error))))?;
    for words in [&["daemon-reload"][..], &["enable", &timer], &["restart", &timer]] {
        let out = Command::new("systemctl").args(words).output();
        let out = out.map_err(|error| failed(crate::words::sentence(&error)))?;
        if !out.status.success() {
            let said = String::from_utf8_lossy(&out.stderr).trim().to_owned();
            return Err(failed(format!("systemctl {}: {said}", words.join(" "))));
        }
    }
    context
        .answer(&Scheduled { group: group.to_owned(), timer, command, every_seconds: every.as_secs() }, scheduled_text);
    Ok(DONE)
}

/// What runs the drills from now on.
#[derive(Serialize)]
struct Scheduled {
    group: String,
    timer: String,
    command: String,
    every_seconds: u64,
}

fn scheduled_text(scheduled: &Scheduled) -> String {
    let every = crate::words::seconds(scheduled.every_seconds as f64);
    format!("{} runs '{}' every {every}\n", scheduled.timer, scheduled.command)
}

fn show(context: &Context, group: &str) -> Outcome {
    check::group(group)?;
    let Some(record) = DrillRecord::load(&context.paths, group)? else {
        return Err(Problem::not_found(
            format!("there was no drill of group '{group}'"),
            "nothing is remembered of one on this host",
            context.suggest(&format!("drill {group}")),
        ));
    };
    context.answer(&record, |record| {
        let last = &record.last;
        let how = if last.outcome == Ended::Done { "good" } else { "FAILED" };
        let mut text = format!("group '{group}': {} drills, {} failed\n", record.runs, record.failures);
        text.push_str(&format!("  last: {how}, began {}, point {}\n", last.began, last.point.time));
        match &record.verified {
            Some(verified) => text.push_str(&format!(
                "  last point that came up: {}, on {}, within {}\n",
                verified.point.time,
                verified.at,
                crate::words::fine_seconds(verified.rto_seconds)
            )),
            None => text.push_str("  no point was ever verified\n"),
        }
        last.steps.iter().for_each(|step| text.push_str(&format!("  {step}\n")));
        text
    });
    Ok(DONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// docs/json.md; the timer itself needs systemd and this machine's own installation.
    #[test]
    fn a_timer_is_told_as_json_and_in_words() {
        let (timer, command) = ("varve-drill@db.timer".to_owned(), "varve drill run db".to_owned());
        let scheduled = Scheduled { group: "db".to_owned(), timer, command, every_seconds: 86_400 };
        let expected = serde_json::json!({ "group": "db", "timer": "varve-drill@db.timer",
            "command": "varve drill run db", "every_seconds": 86_400 });
        assert_eq!(serde_json::to_value(&scheduled).expect("JSON"), expected);
        assert_eq!(scheduled_text(&scheduled), "varve-drill@db.timer runs 'varve drill run db' every 1 d 0 h\n");
    }
}
