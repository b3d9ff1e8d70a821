//! `varve metrics`: what `varve status` says, as numbers.

use super::status::picture::Picture;
use crate::context::{Context, DONE, Outcome, print, print_json};
use serde::Serialize;
use std::collections::BTreeMap;
use varve_common::control::StatusReply;
use varve_common::metrics::{TABLE, exposition};

const EXAMPLE: &str = "Example:
  varve metrics
  varve metrics > /var/lib/node_exporter/varve.prom.tmp && mv /var/lib/node_exporter/varve.prom.tmp \\
      /var/lib/node_exporter/varve.prom

docs/monitor.md says which value means trouble. Exit codes: 0 a daemon answered, 4 none did (varve_daemon_up is 0)";

/// Prints metrics of the daemons of this host in Prometheus' text format.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {}

#[derive(Serialize)]
struct Metrics {
    metrics: Vec<Sample>,
    /// Daemons that did not answer.
    silent: Vec<&'static str>,
}

#[derive(Serialize)]
struct Sample {
    name: &'static str,
    labels: BTreeMap<&'static str, String>,
    value: f64,
}

pub(crate) fn run(context: &Context, _: &Args) -> Outcome {
    let picture = Picture::take(context, None)?;
    let silent: Vec<&'static str> = picture.problems.iter().map(|problem| problem.daemon).collect();
    let status = StatusReply { groups: picture.groups.clone(), daemons: picture.daemons.clone() };
    if context.json {
        let samples = TABLE.iter().flat_map(|metric| {
            let sample = |value: varve_common::metrics::Value| Sample {
                name: metric.name,
                labels: value.labels.into_iter().collect(),
                value: value.value,
            };
            metric.values(&status).into_iter().map(sample)
        });
        let metrics = Metrics { metrics: samples.collect(), silent };
        if !picture.daemons.is_empty() {
            print_json(&metrics);
        }
    } else {
        // Even if nobody answered: a scraper is to see the 0.
        print(&exposition(&status, &silent));
    }
    if picture.daemons.is_empty() { Err(picture.into_problem()) } else { Ok(DONE) }
}
