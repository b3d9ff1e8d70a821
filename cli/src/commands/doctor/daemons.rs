//! Whether the daemons of this installation answer, and in which version.

use super::Section;
use crate::client::Daemon;
use crate::context::Context;

pub(super) fn section(context: &Context) -> Section {
    let mut section = Section::new("daemons");
    let here: Vec<Daemon> = Daemon::ALL.into_iter().filter(|daemon| daemon.is_here(&context.paths)).collect();
    if here.is_empty() {
        section.warn(
            "set up",
            "neither agent nor receiver",
            "this host does not take part yet",
            "'varve receiver init' on a recovery host, 'varve join ADDR:7443 TOKEN' on a production host",
        );
    }
    for daemon in here {
        one(&mut section, context, daemon);
    }
    section
}

fn one(section: &mut Section, context: &Context, daemon: Daemon) {
    let own = env!("CARGO_PKG_VERSION");
    match daemon.status(context, None) {
        Err(problem) => section.fail(daemon.program(), problem.what, problem.why, problem.next),
        Ok(reply) => match reply.daemons.first() {
            Some(status) if status.version == own => section.ok(daemon.program(), format!("answers, version {own}")),
            Some(status) => section.warn(
                daemon.program(),
                format!("answers, version {}, but varve is {own}", status.version),
                "it was not restarted after an upgrade",
                format!("restart {}", daemon.program()),
            ),
            None => section.ok(daemon.program(), "answers"),
        },
    }
}
