//! Programs with a time limit. A program and everything it started is a process group; what it prints goes to a file
//! that is kept short, so that a daemon it leaves behind neither blocks the step nor dies of a closed pipe.

use crate::proc;
use crate::step::{StepError, Work};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Of what a program printed, this much is read: its end.
const OUTPUT_READ_BYTES: u64 = 256 << 10;
/// A file of output that takes more than this is shortened.
const OUTPUT_KEPT_BYTES: u64 = 4 << 20;
/// Between asking a program to end and making it.
const GRACE: Duration = Duration::from_secs(2);
/// A killed process that is still there after this hangs in the kernel.
const KILLED: Duration = Duration::from_secs(5);
const TICK_MIN: Duration = Duration::from_millis(1);
const TICK_MAX: Duration = Duration::from_millis(20);

/// What a program did.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    /// The end of what it printed.
    pub(crate) output: String,
}

/// Runs a program to its end, or to the limit.
pub(crate) fn run(work: &Work<'_>, words: &[String]) -> Result<Finished, StepError> {
    let program = words.first().map_or("", String::as_str);
    let mut child = spawn(work, words)?;
    let pid = child.id();
    let mut tick = TICK_MIN;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(Finished { status, output: printed(&work.output) }),
            Ok(None) => {}
            Err(error) => return Err(StepError::new(format!("{program} cannot be waited for: {error}"))),
        }
        let why = if work.cancel.load(Ordering::Relaxed) {
            Some("the operator stopped it".to_owned())
        } else if Instant::now() >= work.deadline {
            Some(format!("{program} took longer than {}", crate::report::span(work.timeout.as_secs_f64())))
        } else {
            None
        };
        if let Some(why) = why {
            let stuck = end(&mut child);
            proc::end_all(|| proc::marked(&work.run, Some(work.number)), GRACE);
            let stuck = match stuck {
                true => format!("; process {pid} cannot be ended, it hangs in the kernel"),
                false => "; it was ended with what it had started".to_owned(),
            };
            return Err(StepError::new(why + &stuck).with_output(printed(&work.output)));
        }
        shorten(&work.output);
        std::thread::sleep(tick);
        tick = (tick * 2).min(TICK_MAX);
    }
}

/// Runs a program that must end with exit code 0.
pub(crate) fn run_ok(work: &Work<'_>, words: &[String]) -> Result<String, StepError> {
    let finished = run(work, words)?;
    if finished.status.success() {
        return Ok(finished.output);
    }
    let how = how_it_ended(finished.status);
    Err(StepError::new(format!("{} {how}", words.join(" "))).with_output(finished.output))
}

/// [`run_ok`] for a program of the system.
pub(crate) fn tool(work: &Work<'_>, words: &[&str]) -> Result<String, StepError> {
    run_ok(work, &words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
}

/// Starts a program that is to stay, and looks whether it does.
pub(crate) fn start(work: &Work<'_>, words: &[String]) -> Result<u32, StepError> {
    const SETTLE: Duration = Duration::from_millis(250);
    let mut child = spawn(work, words)?;
    let pid = child.id();
    let until = Instant::now() + SETTLE;
    while Instant::now() < until {
        match child.try_wait() {
            Ok(None) => std::thread::sleep(TICK_MAX),
            // It may have gone to the background by itself.
            Ok(Some(status)) if status.success() => return Ok(pid),
            Ok(Some(status)) => {
                let why = format!("{} {} at once", words.join(" "), how_it_ended(status));
                return Err(StepError::new(why).with_output(printed(&work.output)));
            }
            Err(error) => return Err(StepError::new(format!("{} cannot be waited for: {error}", words.join(" ")))),
        }
    }
    // It is waited for, so that it is not there as a zombie once it has ended.
    std::thread::spawn(move || child.wait());
    Ok(pid)
}

fn spawn(work: &Work<'_>, words: &[String]) -> Result<Child, StepError> {
    let Some((program, arguments)) = words.split_first() else {
        return Err(StepError::new("there is no program to run"));
    };
    let Some(path) = work.tools.find(program) else {
        return Err(StepError::new(format!("there is no program {program}")).with_next("install it, then go on"));
    };
    let no_output = |error| StepError::new(format!("what {program} prints cannot be kept: {error}"));
    work.output.set_len(0).map_err(no_output)?;
    let output = work.output.try_clone().map_err(no_output)?;
    let errors = work.output.try_clone().map_err(no_output)?;
    let mut command = Command::new(&path);
    command.args(arguments).env_clear().envs(work.environment()).current_dir("/");
    command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0);
    let child = command.spawn();
    let child = child.map_err(|error| StepError::new(format!("{program} cannot be started: {error}")))?;
    work.note_child(child.id());
    Ok(child)
}

/// Ends a program's process group; true if it would not end.
fn end(child: &mut Child) -> bool {
    let group = Pid::from_raw(child.id().cast_signed());
    let mut wait = |limit: Duration| {
        let until = Instant::now() + limit;
        loop {
            // Reaped first: a zombie still counts as a member of its group.
            let ended = child.try_wait().is_ok_and(|status| status.is_some());
            if ended && killpg(group, None) == Err(Errno::ESRCH) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(TICK_MAX);
        }
    };
    let _ = killpg(group, Signal::SIGTERM);
    if wait(GRACE) {
        return false;
    }
    let _ = killpg(group, Signal::SIGKILL);
    !wait(KILLED)
}

/// "ended with exit code 3", "was killed by signal 9".
pub(crate) fn how_it_ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// The end of what was printed.
fn printed(file: &File) -> String {
    let read = || -> std::io::Result<String> {
        let end = file.metadata()?.len();
        let from = end.saturating_sub(OUTPUT_READ_BYTES);
        let mut bytes = vec![0; usize::try_from(end - from).unwrap_or_default()];
        // Whoever still prints may have made it shorter.
        let mut filled = 0;
        while filled < bytes.len() {
            match file.read_at(&mut bytes[filled..], from + filled as u64)? {
                0 => break,
                more => filled += more,
            }
        }
        let text = String::from_utf8_lossy(&bytes[..filled]).into_owned();
        // A line that was cut is not shown.
        Ok(match text.split_once('\n') {
            Some((_, rest)) if from > 0 => rest.to_owned(),
            _ => text,
        })
    };
    read().unwrap_or_default().trim_end().to_owned()
}

/// Gives back the space of all but the end; the places in the file stay, so nothing that is being printed gets lost.
fn shorten(file: &File) {
    let Ok(facts) = file.metadata() else { return };
    if facts.blocks() * 512 <= OUTPUT_KEPT_BYTES {
        return;
    }
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let old = i64::try_from(facts.len().saturating_sub(OUTPUT_READ_BYTES)).unwrap_or(i64::MAX);
    if fallocate(file, flags, 0, old).is_err() {
        // A filesystem without holes.
        let _ = file.set_len(0);
    }
}
