//! What was measured, as a table for people and as JSON.

use serde::Serialize;
use std::fmt::Write as _;
use std::time::Instant;

use crate::machine::Facts;
use crate::plan::Plan;
use crate::statistics::median;

/// Everything of one run of the program.
#[derive(Serialize)]
pub struct Report {
    machine: Facts,
    quick: bool,
    seconds: Option<u64>,
    pairs: Option<usize>,
    benches: Vec<Bench>,
    #[serde(skip)]
    started: Instant,
}

#[derive(Serialize)]
struct Bench {
    name: &'static str,
    title: &'static str,
    /// How busy the machine was just before, with other things.
    busy_percent_before: f64,
    /// How much of the machine other things used meanwhile.
    others_percent: f64,
    rows: Vec<Row>,
    notes: Vec<String>,
    /// Something is wrong, not slow.
    wrong: Vec<String>,
}

/// What a figure is held against.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// No target: shown beside others.
    None,
    /// At least this much.
    Min(f64),
    /// At most this much.
    Max(f64),
}

/// A line of the table.
#[derive(Serialize)]
struct Row {
    what: String,
    unit: &'static str,
    /// The median.
    value: f64,
    target: Target,
    met: Option<bool>,
    samples: Vec<f64>,
    detail: String,
}

impl Report {
    /// An empty one.
    pub fn new(machine: Facts, plan: &Plan) -> Self {
        let Plan { quick, seconds, pairs } = *plan;
        Report { machine, quick, seconds, pairs, benches: Vec::new(), started: Instant::now() }
    }

    /// Rows belong to this bench from now on.
    pub fn begin(&mut self, name: &'static str, title: &'static str, busy_percent_before: f64) {
        let second = self.started.elapsed().as_secs();
        eprintln!("[{second:>3} s] {name}: {title} (machine {busy_percent_before:.0} % busy before)");
        let (rows, notes, wrong) = (Vec::new(), Vec::new(), Vec::new());
        self.benches.push(Bench { name, title, busy_percent_before, others_percent: 0.0, rows, notes, wrong });
    }

    /// The bench is over.
    pub fn end(&mut self, others_percent: f64) {
        eprintln!("        (others used {others_percent:.0} % of the machine meanwhile)");
        self.bench().others_percent = others_percent;
    }

    fn bench(&mut self) -> &mut Bench {
        self.benches.last_mut().expect("a bench has begun")
    }

    /// A figure: the median of the samples. `unit` is `"x"` (or [`FINE`]) for a ratio.
    pub fn row(&mut self, what: &str, unit: &'static str, samples: &[f64], target: Target, detail: &str) {
        let value = median(samples);
        let met = match target {
            Target::None => None,
            Target::Min(least) => Some(value >= least),
            Target::Max(most) => Some(value <= most),
        };
        let row =
            Row { what: what.into(), unit, value, target, met, samples: samples.to_vec(), detail: detail.to_owned() };
        eprintln!("        {}", row.line().replace("**", ""));
        self.bench().rows.push(row);
    }

    /// Words below the bench's table.
    pub fn note(&mut self, words: &str) {
        eprintln!("        {words}");
        self.bench().notes.push(words.to_owned());
    }

    /// Something is wrong: the run fails in the end.
    pub fn wrong(&mut self, words: &str) {
        eprintln!("        WRONG: {words}");
        self.bench().wrong.push(words.to_owned());
    }

    /// Whether anything was wrong.
    pub fn is_wrong(&self) -> bool {
        self.benches.iter().any(|bench| !bench.wrong.is_empty())
    }

    /// The table.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        writeln!(text, "{}", self.machine.markdown()).unwrap();
        if self.quick || self.seconds.is_some() || self.pairs.is_some() {
            let words = if self.quick { "A quick look" } else { "Not the usual lengths" };
            writeln!(text, "{words} (quick {}, seconds {:?}, pairs {:?}).\n", self.quick, self.seconds, self.pairs)
                .unwrap();
        }
        for bench in &self.benches {
            writeln!(text, "### {} (`{}`)\n", bench.title, bench.name).unwrap();
            if !bench.rows.is_empty() {
                writeln!(text, "| what | result | target | | samples |\n|---|---|---|---|---|").unwrap();
            }
            for row in &bench.rows {
                writeln!(text, "{}", row.line()).unwrap();
            }
            writeln!(text).unwrap();
            for words in &bench.wrong {
                writeln!(text, "**WRONG: {}**\n", words.replace('\n', " ")).unwrap();
            }
            for words in &bench.notes {
                writeln!(text, "{words}\n").unwrap();
            }
            writeln!(text, "Others used {:.0} % of the machine meanwhile.\n", bench.others_percent).unwrap();
        }
        let seconds = self.started.elapsed().as_secs();
        writeln!(text, "{seconds} s in all. {}", self.summary()).unwrap();
        text
    }

    fn summary(&self) -> String {
        let met: Vec<bool> = self.benches.iter().flat_map(|bench| &bench.rows).filter_map(|row| row.met).collect();
        let wrong: usize = self.benches.iter().map(|bench| bench.wrong.len()).sum();
        let good = met.iter().filter(|met| **met).count();
        let wrong = if wrong == 0 { "nothing is wrong".into() } else { format!("**{wrong} things are wrong**") };
        format!("{good} of {} targets met; {wrong}.", met.len())
    }
}

impl Row {
    fn line(&self) -> String {
        let show = |value: f64| show(value, self.unit);
        let target = match self.target {
            Target::None => String::new(),
            Target::Min(least) => format!("≥ {}", show(least)),
            Target::Max(most) => format!("≤ {}", show(most)),
        };
        let verdict = match self.met {
            None => "",
            Some(true) => "met",
            Some(false) => "**not met**",
        };
        let mut spread = String::new();
        if self.samples.len() > 1 {
            let least = self.samples.iter().copied().fold(f64::INFINITY, f64::min);
            let most = self.samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            spread = format!("{} runs, {} to {}", self.samples.len(), show(least), show(most));
        }
        let details: Vec<&str> = [self.detail.as_str(), &spread].into_iter().filter(|text| !text.is_empty()).collect();
        format!("| {} | {} | {target} | {verdict} | {} |", self.what, show(self.value), details.join("; "))
    }
}

/// The unit of a ratio whose third digit matters.
pub const FINE: &str = "x.xxx";

/// A figure with its unit, as many digits as mean something.
pub fn show(value: f64, unit: &str) -> String {
    let digits = match value.abs() {
        _ if unit == "x" => 2,
        _ if unit == FINE => 3,
        v if v >= 100.0 || v == 0.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 0.1 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    let (whole, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let mut grouped = String::new();
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at).is_multiple_of(3) && whole.as_bytes()[at - 1].is_ascii_digit() {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    if !fraction.is_empty() {
        grouped = format!("{grouped}.{fraction}");
    }
    if unit == "x" || unit == FINE { grouped } else { format!("{grouped} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_readable() {
        assert_eq!(show(1_234_567.8, "/s"), "1,234,568 /s");
        assert_eq!(show(999.6, "ns"), "1,000 ns");
        assert_eq!(show(0.954, "x"), "0.95");
        assert_eq!(show(1.0234, FINE), "1.023");
        assert_eq!(show(-12.34, "ms"), "-12.3 ms");
        assert_eq!(show(0.0123, "%"), "0.012 %");
    }
}
