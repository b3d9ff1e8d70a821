//! How far long work is: a line that is redrawn on a terminal, JSON lines with `--json`, now and then a plain line
//! otherwise. Nothing in the first two seconds: most work is done by then.

use crate::context::{on_terminal, print_json_meanwhile, print_meanwhile};
use crate::words;
use std::time::{Duration, Instant};
use varve_common::control::Progress;

const QUIET: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Terminal,
    Json,
    Plain,
}

/// Shows [`Progress`].
pub(crate) struct Meter {
    what: String,
    kind: Kind,
    began: Instant,
    shown: Option<Instant>,
}

impl Meter {
    /// For work named `what` that begins now.
    pub(crate) fn new(what: String, json: bool) -> Self {
        let kind = match (json, on_terminal()) {
            (true, _) => Kind::Json,
            (false, true) => Kind::Terminal,
            (false, false) => Kind::Plain,
        };
        Self { what, kind, began: Instant::now(), shown: None }
    }

    /// Shows a step, unless it is too early for it.
    pub(crate) fn show(&mut self, step: &Progress) {
        let now = Instant::now();
        let pause = match self.kind {
            Kind::Terminal => Duration::from_millis(100),
            Kind::Json => Duration::from_millis(900),
            Kind::Plain => Duration::from_secs(10),
        };
        if now - self.began < QUIET || self.shown.is_some_and(|last| now - last < pause) {
            return;
        }
        self.shown = Some(now);
        match self.kind {
            Kind::Json => print_json_meanwhile(&serde_json::json!({ "progress": step })),
            Kind::Plain => print_meanwhile(&format!("{}\n", line(&self.what, step))),
            // Back to the line's begin, the text, and away with what is left of a longer one.
            Kind::Terminal => print_meanwhile(&format!("\r{}\x1b[K", line(&self.what, step))),
        }
    }

    /// Removes the line from a terminal, so that the answer takes its place.
    pub(crate) fn end(&self) {
        if self.kind == Kind::Terminal && self.shown.is_some() {
            print_meanwhile("\r\x1b[K");
        }
    }
}

fn line(what: &str, step: &Progress) -> String {
    if step.total_bytes == 0 {
        return format!("{what}  …");
    }
    let mut text = format!(
        "{what}  {} of {} ({} %)  {}",
        words::bytes(step.done_bytes),
        words::bytes(step.total_bytes),
        words::per_cent(step.done_bytes, step.total_bytes),
        words::rate(step.bytes_per_second),
    );
    if let Some(left) = step.seconds_left {
        text.push_str(&format!("  {} left", words::seconds(left)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_bytes_rate_and_time_left() {
        let mut step = Progress {
            done_bytes: 4 << 30,
            total_bytes: 20 << 30,
            bytes_per_second: 412.0 * 1048576.0,
            seconds_left: Some(39.7),
        };
        assert_eq!(line("verifying db", &step), "verifying db  4.0 GiB of 20.0 GiB (20 %)  412.0 MiB/s  40 s left");
        step.seconds_left = None;
        assert_eq!(line("verifying db", &step), "verifying db  4.0 GiB of 20.0 GiB (20 %)  412.0 MiB/s");
    }
}
