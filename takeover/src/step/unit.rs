//! systemd units.

use super::{Found, StepError, Work};
use crate::process;

pub(super) fn probe(work: &Work<'_>, unit: &str) -> Result<Found, StepError> {
    let words = ["systemctl", "is-active", "--quiet", unit].map(str::to_owned);
    let active = process::run(work, &words)?.status.success();
    Ok(if active { Found::Yes } else { Found::No })
}

pub(super) fn apply(work: &Work<'_>, unit: &str) -> Result<String, StepError> {
    match process::tool(work, &["systemctl", "start", unit]) {
        Ok(_) => Ok(String::new()),
        Err(mut error) => {
            error.next = Some(format!("journalctl -u {unit} says why"));
            Err(error)
        }
    }
}

pub(super) fn undo(work: &Work<'_>, unit: &str) -> Result<String, StepError> {
    process::tool(work, &["systemctl", "stop", unit]).map(|_| String::new())
}
