//! What the kernel's verifier said when it refused a program.
//!
//! Its errno is EACCES, which reads like a missing permission and sends the operator looking in the wrong place.

use std::sync::{Mutex, PoisonError};

use libbpf_rs::PrintLevel;

/// Lines of its log that are kept: the reason stands last.
const LINES: usize = 6;

static REFUSAL: Mutex<Option<String>> = Mutex::new(None);

/// libbpf prints to standard error by default; what it says belongs to our log, and errors come back as values anyway.
pub(crate) fn listen() {
    libbpf_rs::set_print(Some((PrintLevel::Info, |level, text| {
        if let Some(refusal) = refusal(&text) {
            *REFUSAL.lock().unwrap_or_else(PoisonError::into_inner) = Some(refusal);
        }
        match level {
            PrintLevel::Warn => tracing::debug!("libbpf: {}", text.trim_end()),
            _ => tracing::trace!("libbpf: {}", text.trim_end()),
        }
    })));
}

/// The last refusal since this was asked.
pub(crate) fn take() -> Option<String> {
    REFUSAL.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// The program and the end of the log, without its statistics.
fn refusal(text: &str) -> Option<String> {
    let (head, rest) = text.split_once("-- BEGIN PROG LOAD LOG --")?;
    let program = head.split('\'').nth(1).unwrap_or("?");
    let log = rest.split("-- END PROG LOAD LOG --").next()?;
    let lines: Vec<&str> = log.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let end = lines.iter().rposition(|line| !line.starts_with("processed ")).map_or(0, |last| last + 1);
    Some(format!("{program}: {}", lines[end.saturating_sub(LINES)..end].join(" | ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_at_the_end_of_the_log() {
        let said = "libbpf: prog 'capture': -- BEGIN PROG LOAD LOG --\nfunc#0 @0\n1\n2\n3\n4\n5\ncombined stack size of 5 calls is \
                    560. Too large\nprocessed 12 insns\n\n-- END PROG LOAD LOG --\n";
        assert_eq!(
            refusal(said).expect("a refusal"),
            "capture: 1 | 2 | 3 | 4 | 5 | combined stack size of 5 calls is 560. Too large"
        );
        assert_eq!(refusal("libbpf: failed to load object 'varve'\n"), None);
        assert!(refusal("-- BEGIN PROG LOAD LOG --").is_some());
    }
}
