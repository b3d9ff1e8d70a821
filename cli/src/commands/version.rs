//! `varve version`: of this program and of the daemons that answer.

use crate::client::Daemon;
use crate::context::{Context, DONE, Outcome};
use crate::words;
use serde::Serialize;
use varve_common::problem::Problem;

const EXAMPLE: &str = "Example:
  varve version";

/// Prints the versions of this program and of the daemons that answer. Both sides should have the same.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {}

#[derive(Serialize)]
struct Versions {
    varve: &'static str,
    daemons: Vec<DaemonVersion>,
}

#[derive(Serialize)]
struct DaemonVersion {
    daemon: &'static str,
    /// `None`: it does not answer.
    version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<Problem>,
}

pub(crate) fn run(context: &Context, _: &Args) -> Outcome {
    let daemons = Daemon::ALL.into_iter().filter(|daemon| daemon.is_here(&context.paths)).map(|daemon| {
        let (version, problem) = match daemon.status(context, None) {
            Ok(reply) => (reply.daemons.into_iter().next().map(|status| status.version), None),
            Err(problem) => (None, Some(problem)),
        };
        DaemonVersion { daemon: daemon.word(), version, problem }
    });
    let versions = Versions { varve: env!("CARGO_PKG_VERSION"), daemons: daemons.collect() };
    context.answer(&versions, text_of);
    Ok(DONE)
}

fn text_of(versions: &Versions) -> String {
    let mut rows = vec![vec!["varve".to_owned(), versions.varve.to_owned()]];
    for daemon in &versions.daemons {
        let version = match (&daemon.version, &daemon.problem) {
            (Some(version), _) if version == versions.varve => version.clone(),
            (Some(version), _) => format!("{version}  (another version than varve: restart it after the upgrade)"),
            (None, Some(problem)) => format!("does not answer: {}", problem.why),
            (None, None) => "does not say".to_owned(),
        };
        rows.push(vec![format!("varve-{}", daemon.daemon), version]);
    }
    words::columns(&rows).join("\n") + "\n"
}
