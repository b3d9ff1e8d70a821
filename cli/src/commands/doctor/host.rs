//! What capture needs of kernel and machine. A recovery host does not capture: what is missing there is no failure.

use super::{Level, Section};
use crate::client::Daemon;
use crate::context::Context;

pub(super) fn section(context: &Context) -> Section {
    let mut section = Section::new("host");
    let recovery_only = Daemon::Receiver.is_here(&context.paths) && !Daemon::Agent.is_here(&context.paths);
    let pins = varve_bpf::doctor::pins(&context.paths.bpffs());
    for check in varve_bpf::doctor::checks().into_iter().chain([pins]) {
        let level = match (check.ok, recovery_only) {
            (true, _) => Level::Ok,
            (false, false) => Level::Fail,
            (false, true) => Level::Warn,
        };
        let next = match recovery_only {
            true => format!("nothing on a recovery host; to protect volumes of this host: {}", check.next),
            false => check.next.to_string(),
        };
        section.add(level, check.name, check.found, check.why, next);
    }
    section
}
