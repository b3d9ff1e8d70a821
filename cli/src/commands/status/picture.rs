//! What the daemons of this host say, and which of them say nothing.

use crate::client::Daemon;
use crate::context::Context;
use serde::Serialize;
use std::collections::BTreeMap;
use varve_common::control::{DaemonStatus, GroupStatus};
use varve_common::problem::{Problem, ProblemKind};

/// `varve status --json`: a `StatusReply` of all daemons, and the daemons that did not answer.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Picture {
    /// In the order of their names; a host with both roles may have a group twice, once in each role.
    pub(crate) groups: Vec<GroupStatus>,
    /// The daemons that answered.
    pub(crate) daemons: Vec<DaemonStatus>,
    /// The daemons that belong to this installation and did not answer.
    pub(crate) problems: Vec<DaemonProblem>,
    /// Bytes per second of running syncs, where they are known (see [`key`]).
    #[serde(skip)]
    pub(crate) rates: BTreeMap<String, f64>,
    /// It is on the screen of `--watch`, which needs not be suggested.
    #[serde(skip)]
    pub(crate) watched: bool,
}

/// A daemon that did not answer.
#[derive(Debug, Serialize)]
pub(crate) struct DaemonProblem {
    /// `agent` or `receiver`; `host` if neither is set up any more.
    pub(crate) daemon: &'static str,
    /// Why not, and what to do.
    #[serde(flatten)]
    pub(crate) problem: Problem,
}

impl Picture {
    /// Asks every daemon that belongs to this installation. An error if there is none, or if the group is unknown.
    pub(crate) fn take(context: &Context, group: Option<&str>) -> Result<Self, Problem> {
        context.need_root()?;
        let here: Vec<Daemon> = Daemon::ALL.into_iter().filter(|daemon| daemon.is_here(&context.paths)).collect();
        if here.is_empty() {
            return Err(nothing_here(context));
        }
        let mut picture = Self::default();
        let mut unknown = None;
        for daemon in here {
            match daemon.status(context, group) {
                Ok(reply) => {
                    picture.groups.extend(reply.groups);
                    picture.daemons.extend(reply.daemons);
                }
                Err(problem) if problem.kind == ProblemKind::NotFound => unknown = Some(problem),
                Err(problem) => picture.problems.push(DaemonProblem { daemon: daemon.word(), problem }),
            }
        }
        picture.groups.sort_by(|a, b| (&a.name, a.role as u8).cmp(&(&b.name, b.role as u8)));
        picture.check_group(context, group, unknown)
    }

    /// A group that nobody knows, although all were asked, does not exist. If a daemon is silent, that is the news.
    fn check_group(
        mut self,
        context: &Context,
        group: Option<&str>,
        unknown: Option<Problem>,
    ) -> Result<Self, Problem> {
        let Some(group) = group else { return Ok(self) };
        self.groups.retain(|found| found.name == group);
        if !self.groups.is_empty() {
            return Ok(self);
        }
        if let Some(silent) = self.problems.into_iter().next() {
            return Err(silent.problem);
        }
        Err(unknown.unwrap_or_else(|| {
            Problem::not_found(
                format!("there is no group '{group}'"),
                "no daemon of this host knows it",
                format!("'{}' lists the groups", context.suggest("status")),
            )
        }))
    }

    /// What to say when no daemon answered.
    pub(crate) fn into_problem(self) -> Problem {
        let first = self.problems.into_iter().next().map(|silent| silent.problem);
        first.unwrap_or_else(|| {
            Problem::unreachable("no daemon answered", "none said who it is", "restart varve-agent or varve-receiver")
        })
    }
}

/// A group in one role.
pub(crate) fn key(group: &GroupStatus) -> String {
    format!("{} {}", group.name, group.role as u8)
}

fn nothing_here(context: &Context) -> Problem {
    Problem::unreachable(
        "no daemon of Varve is set up on this host",
        format!("there is neither an agent.toml nor a receiver.toml in {}", context.paths.config_dir().display()),
        format!(
            "'{}' on a recovery host, 'varve join ADDR:7443 TOKEN' on a production host; --root names another installation",
            context.suggest("receiver init")
        ),
    )
}
