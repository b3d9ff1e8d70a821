//! Asking a daemon over its Unix socket: one JSON line there, lines back (see `varve_common::control`).

use crate::context::{Context, is_there, net_problem};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use varve_common::control::{AgentRequest, GroupStatus, Progress, ReceiverRequest, Reply, StatusReply};
use varve_common::paths::Paths;
use varve_common::problem::Problem;
use varve_net::ErrorKind;
use varve_net::local::LocalClient;

/// How long a status may take: it needs nobody but the daemon.
const AT_ONCE: Duration = Duration::from_secs(5);
/// How long a question that needs little work may take.
pub(crate) const SOON: Duration = Duration::from_secs(10);
/// How long a question that needs devices, disks or the other side may take between two lines.
pub(crate) const PATIENT: Duration = Duration::from_secs(120);

/// Which daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Daemon {
    /// `varve-agent`.
    Agent,
    /// `varve-receiver`.
    Receiver,
}

impl Daemon {
    /// Both, in the order in which they are asked and shown.
    pub(crate) const ALL: [Daemon; 2] = [Daemon::Agent, Daemon::Receiver];

    /// The word in `DaemonStatus::daemon`.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Receiver => "receiver",
        }
    }

    /// The program.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Agent => "varve-agent",
            Self::Receiver => "varve-receiver",
        }
    }

    /// Where it listens.
    pub(crate) fn socket(self, paths: &Paths) -> PathBuf {
        match self {
            Self::Agent => paths.agent_socket(),
            Self::Receiver => paths.receiver_socket(),
        }
    }

    /// Its configuration file.
    pub(crate) fn config(self, paths: &Paths) -> PathBuf {
        match self {
            Self::Agent => paths.agent_config(),
            Self::Receiver => paths.receiver_config(),
        }
    }

    /// Whether this installation is meant to have it. A socket without a configuration counts: somebody started it.
    pub(crate) fn is_here(self, paths: &Paths) -> bool {
        is_there(&self.config(paths)) || is_there(&self.socket(paths))
    }

    /// What it says of its groups.
    pub(crate) fn status(self, context: &Context, group: Option<&str>) -> Result<StatusReply, Problem> {
        let group = group.map(str::to_owned);
        match self {
            Self::Agent => ask_agent(context, &AgentRequest::Status { group }, AT_ONCE),
            Self::Receiver => ask_receiver(context, &ReceiverRequest::Status { group }, AT_ONCE),
        }
    }

    /// What it says of one group.
    pub(crate) fn group(self, context: &Context, group: &str) -> Result<GroupStatus, Problem> {
        let reply = self.status(context, Some(group))?;
        reply.groups.into_iter().find(|found| found.name == group).ok_or_else(|| {
            Problem::not_found(
                format!("there is no group '{group}'"),
                format!("the {} of this host does not know it", self.word()),
                format!("'{}' lists the groups", context.suggest("status")),
            )
        })
    }
}

/// Asks the agent something that has one answer.
pub(crate) fn ask_agent<T: DeserializeOwned>(
    context: &Context,
    request: &AgentRequest,
    patience: Duration,
) -> Result<T, Problem> {
    ask(context, Daemon::Agent, request, patience, &mut |_| {})
}

/// Asks the receiver something that has one answer.
pub(crate) fn ask_receiver<T: DeserializeOwned>(
    context: &Context,
    request: &ReceiverRequest,
    patience: Duration,
) -> Result<T, Problem> {
    ask(context, Daemon::Receiver, request, patience, &mut |_| {})
}

/// Asks a daemon; `progress` hears how far it is. `patience` is the longest silence between two lines.
pub(crate) fn ask<Q: Serialize, T: DeserializeOwned>(
    context: &Context,
    daemon: Daemon,
    request: &Q,
    patience: Duration,
    progress: &mut dyn FnMut(Progress),
) -> Result<T, Problem> {
    exchange(context, daemon, request, patience, &look(context, daemon), progress)
}

/// Asks the receiver to change who may write to a group, or what its replicas hold. Without an answer it may be done all the
/// same, or under way, and must not be ended in the middle: then the status tells. `then`: what comes after it.
pub(crate) fn ask_authority<T: DeserializeOwned>(
    context: &Context,
    group: &str,
    request: &ReceiverRequest,
    then: &str,
    progress: &mut dyn FnMut(Progress),
) -> Result<T, Problem> {
    let status = context.suggest(&format!("status {group}"));
    let lost = format!("it may be done or under way, so restart nothing: '{status}' tells; {then}");
    exchange(context, Daemon::Receiver, request, PATIENT, &lost, progress)
}

/// `lost`: what to do if it was asked and the answer does not come.
fn exchange<Q: Serialize, T: DeserializeOwned>(
    context: &Context,
    daemon: Daemon,
    request: &Q,
    patience: Duration,
    lost: &str,
    progress: &mut dyn FnMut(Progress),
) -> Result<T, Problem> {
    context.need_root()?;
    let trouble = |error: varve_net::Error| trouble(context, daemon, &error, patience, lost);
    let mut client = LocalClient::connect(&daemon.socket(&context.paths)).map_err(|error| match error.kind() {
        // It was not even asked.
        ErrorKind::Timeout => Problem::unreachable(error.to_string(), error.why(), look(context, daemon)),
        _ => trouble(error),
    })?;
    client.set_timeout(Some(patience)).map_err(trouble)?;
    client.request(request).map_err(trouble)?;
    loop {
        match client.reply().map_err(trouble)? {
            Some(Reply::Progress(step)) => progress(step),
            Some(Reply::Done(answer)) => return Ok(answer),
            Some(Reply::Problem(problem)) => return Err(problem),
            None => return Err(unfinished(daemon, lost)),
        }
    }
}

/// An error of the socket, in this installation's words.
fn trouble(context: &Context, daemon: Daemon, error: &varve_net::Error, patience: Duration, lost: &str) -> Problem {
    let (word, program) = (daemon.word(), daemon.program());
    match error.kind() {
        ErrorKind::Unreachable => absent(context, daemon, error),
        ErrorKind::Timeout => Problem::unreachable(
            format!("the {word} of this host does not answer"),
            format!("{program} took the question and said nothing for {} s", patience.as_secs()),
            lost,
        ),
        ErrorKind::Closed | ErrorKind::Busy => unfinished(daemon, lost),
        ErrorKind::Protocol => Problem::failed(
            format!("the answer of the {word} is not understood"),
            format!("{program} is probably of another version than this varve ({})", env!("CARGO_PKG_VERSION")),
            format!("restart {program} after an upgrade; '{}' compares", context.suggest("version")),
        ),
        ErrorKind::Limit => net_problem(error),
        _ => Problem::unreachable(
            format!("the {word} of this host cannot be asked"),
            net_problem(error).why,
            look(context, daemon),
        ),
    }
}

fn unfinished(daemon: Daemon, lost: &str) -> Problem {
    Problem::unreachable(
        format!("the {} of this host did not finish its answer", daemon.word()),
        format!("{} closed the connection: it is stopping, it failed, or it serves too many at once", daemon.program()),
        lost,
    )
}

/// Nobody took the call.
fn absent(context: &Context, daemon: Daemon, error: &varve_net::Error) -> Problem {
    let socket = daemon.socket(&context.paths);
    let what = format!("the {} of this host is not reachable", daemon.word());
    let cause = std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
    match cause.map(io::Error::kind) {
        Some(io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            if !is_there(&daemon.config(&context.paths)) {
                return not_set_up(context, daemon, what);
            }
            let why = format!("{} does not run: nothing listens at {}", daemon.program(), socket.display());
            Problem::unreachable(what, why, start(context, daemon))
        }
        Some(io::ErrorKind::PermissionDenied) => {
            Problem::unreachable(what, format!("{} may only be used by root", socket.display()), "run it as root")
        }
        _ => Problem::unreachable(what, net_problem(error).why, look(context, daemon)),
    }
}

fn not_set_up(context: &Context, daemon: Daemon, what: String) -> Problem {
    let config = daemon.config(&context.paths);
    let (why, next) = match daemon {
        Daemon::Agent => (
            format!("this host has not joined a recovery host ({} does not exist)", config.display()),
            "varve host invite NAME on the recovery host, then varve join ADDR:7443 TOKEN here",
        ),
        Daemon::Receiver => (
            format!("this host is not set up as a recovery host ({} does not exist)", config.display()),
            "run this on the recovery host; 'varve receiver init' makes this host one",
        ),
    };
    Problem::unreachable(what, why, next)
}

fn start(context: &Context, daemon: Daemon) -> String {
    let start = format!("start it: {}", context.suggest_start(daemon.program()));
    if context.paths.is_system() {
        format!("{start}; journalctl -u {} says why it ended", daemon.program())
    } else {
        start
    }
}

fn look(context: &Context, daemon: Daemon) -> String {
    if context.paths.is_system() {
        format!("journalctl -u {0} says more; systemctl restart {0} starts it again", daemon.program())
    } else {
        format!("the log of {} says more; then start it again", daemon.program())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use varve_common::problem::ProblemKind;

    /// A daemon that is started again in the middle of a takeover makes it no better.
    #[test]
    fn who_hears_nothing_of_a_takeover_is_not_told_to_restart() {
        let context = Context::new(std::path::Path::new("/"), false).expect("a root");
        let told = |next: &str| {
            let silent = varve_net::Error::new(ErrorKind::Timeout, "nothing came");
            trouble(&context, Daemon::Receiver, &silent, PATIENT, next)
        };
        let problem = told("see 'varve status db'");
        assert_eq!(problem.kind, ProblemKind::Unreachable);
        assert_eq!(problem.next, "see 'varve status db'");
        assert!(told(&look(&context, Daemon::Receiver)).next.contains("systemctl restart varve-receiver"));
    }
}
