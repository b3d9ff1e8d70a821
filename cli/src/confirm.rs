//! Before something is destroyed or authority moves.

use crate::context::note;
use std::io::{BufRead, IsTerminal, Write};
use varve_common::problem::Problem;

/// Passes with `--yes`, or when a person at a terminal says yes. A script without `--yes` is refused and told to look first,
/// so every command that asks takes `--dry-run` (tests/asked.rs says them all).
pub(crate) fn confirm(yes: bool, question: &str, again: &str) -> Result<(), Problem> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Problem::refused(
            format!("not done, nothing was changed: {question}"),
            "nobody can be asked, because standard input is not a terminal",
            format!("look with '{again} --dry-run', then say '{again} --yes'"),
        ));
    }
    // On standard error, so that it is seen even if the answer goes to a file.
    let _ = write!(std::io::stderr(), "{question} [y/N] ");
    let _ = std::io::stderr().flush();
    let mut line = String::new();
    let read = std::io::stdin().lock().read_line(&mut line);
    if read.is_ok() && matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        return Ok(());
    }
    if !line.ends_with('\n') {
        note("");
    }
    Err(Problem::refused("not done, nothing was changed", "the question was not answered with yes", again))
}
