//! `--watch`: the picture every second. A terminal is redrawn; with `--json` there is one line per second; else the
//! picture is printed again when its words change. A daemon that goes away is shown, and watched on. It ends when its
//! reader does.

use super::picture::{Picture, key};
use super::{show, table};
use crate::context::{Context, DONE, Outcome, on_terminal, print, print_json};
use crate::words;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};
use varve_common::problem::ProblemKind;

const EVERY: Duration = Duration::from_secs(1);
/// Seconds over which the rate of a sync is measured.
const SAMPLES: usize = 10;

pub(crate) fn run(context: &Context, group: Option<&str>, first: Picture) -> Outcome {
    let mut rates = Rates::default();
    let mut last_words = String::new();
    let mut picture = first;
    let mut next = Instant::now();
    loop {
        picture.rates = rates.of(&picture, Instant::now());
        picture.watched = true;
        let read = if context.json {
            print_json(&picture)
        } else if on_terminal() {
            redraw(context, &picture)
        } else {
            let words = words_of(&picture);
            let read = words == last_words || show(context, &picture);
            last_words = words;
            read
        };
        if !read {
            return Ok(DONE);
        }
        next = (next + EVERY).max(Instant::now());
        std::thread::sleep(next - Instant::now());
        picture = match Picture::take(context, group) {
            Ok(picture) => picture,
            // The group was unprotected meanwhile: there is nothing left to watch.
            Err(problem) if problem.kind == ProblemKind::NotFound => return Err(problem),
            Err(problem) => Picture {
                problems: vec![super::picture::DaemonProblem { daemon: "host", problem }],
                ..Picture::default()
            },
        };
    }
}

/// Home, then line over line: no flicker, nothing left of a longer line or a longer screen.
fn redraw(context: &Context, picture: &Picture) -> bool {
    let now = jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M:%SZ").to_string();
    let mut screen = format!("\x1b[H{now}  (Ctrl-C ends)\x1b[K\n\x1b[K\n");
    for line in table::render(picture, &context.suggest("")).lines() {
        screen.push_str(&words::visible(line));
        screen.push_str("\x1b[K\n");
    }
    screen.push_str("\x1b[J");
    print(&screen)
}

/// What is worth a new line in a log: not the numbers.
fn words_of(picture: &Picture) -> String {
    let groups =
        picture.groups.iter().map(|g| format!("{} {:?} {:?} {:?} {:?};", g.name, g.role, g.link, g.data, g.reason));
    let silent = picture.problems.iter().map(|silent| format!("{} {};", silent.daemon, silent.problem.why));
    groups.chain(silent).collect()
}

/// Bytes per second of running syncs, from one picture to the next.
#[derive(Default)]
struct Rates {
    samples: BTreeMap<String, VecDeque<(Instant, u64)>>,
}

impl Rates {
    fn of(&mut self, picture: &Picture, now: Instant) -> BTreeMap<String, f64> {
        let running: BTreeMap<String, u64> =
            picture.groups.iter().filter_map(|g| Some((key(g), g.resync.as_ref()?.done_bytes))).collect();
        self.samples.retain(|name, _| running.contains_key(name));
        running.into_iter().filter_map(|(name, done)| Some((name.clone(), self.add(name, done, now)?))).collect()
    }

    fn add(&mut self, name: String, done: u64, now: Instant) -> Option<f64> {
        let samples = self.samples.entry(name).or_default();
        // A new sync began.
        if samples.back().is_some_and(|&(_, before)| before > done) {
            samples.clear();
        }
        samples.push_back((now, done));
        if samples.len() > SAMPLES {
            samples.pop_front();
        }
        let &(first, before) = samples.front()?;
        let seconds = (now - first).as_secs_f64();
        (seconds > 0.0).then(|| (done - before) as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let mut rates = Rates::default();
        let begin = Instant::now();
        let at = |second| begin + Duration::from_secs(second);
        assert_eq!(rates.add("g".into(), 100, at(0)), None);
        assert_eq!(rates.add("g".into(), 300, at(1)), Some(200.0));
        for second in 2..20 {
            rates.add("g".into(), 300 + (second - 1) * 1000, at(second));
        }
        assert_eq!(rates.add("g".into(), 300 + 19_000, at(20)), Some(1000.0));
        assert_eq!(rates.add("g".into(), 50, at(21)), None, "another sync");
    }
}
