//! The next sensible command for a group, when something is wrong or under way.

use varve_common::control::GroupStatus;
use varve_common::state::{Data, Link, Role};

/// The most pressing thing only. `varve` is the program with its options, with a space at the end; `watched` means that
/// the reader is looking at `--watch` already.
pub(crate) fn next_step(group: &GroupStatus, varve: &str, watched: bool) -> Option<String> {
    let name = &group.name;
    let watch = if watched { String::new() } else { format!("; {varve}status {name} --watch") };
    by_role(group)
        .or_else(|| by_link(group, varve))
        .or_else(|| by_verify(group).map(|words| format!("{varve}verify {name}{words}")))
        .or_else(|| by_data(group, varve, &watch))
        .or_else(|| group.alerts.first().map(|alert| alert.next.clone()))
}

fn by_role(group: &GroupStatus) -> Option<String> {
    if let Some(authority) = group.authority.as_ref().filter(|authority| !authority.next.is_empty()) {
        return Some(authority.next.clone());
    }
    (group.role == Role::Fenced).then(|| {
        "stop writing here: the other side was promoted (varve status on the recovery host shows its epoch)".to_owned()
    })
}

fn by_link(group: &GroupStatus, varve: &str) -> Option<String> {
    let other = match group.role {
        Role::Source => "recovery host",
        _ => "production host",
    };
    match group.link {
        Link::Refused => Some("do what the reason says; it is tried again by itself".to_owned()),
        Link::Disconnected => {
            Some(format!("varve status on the {other}; {varve}doctor here (address, firewall, UDP port)"))
        }
        Link::Handshaking | Link::Streaming => None,
    }
}

fn by_verify(group: &GroupStatus) -> Option<&'static str> {
    let verify = group.verify.as_ref()?;
    match (&verify.error, verify.finished, verify.differing_bytes) {
        (Some(_), _, _) => Some(""),
        (None, true, 1..) if !verify.repair => Some(" --repair"),
        _ => None,
    }
}

fn by_data(group: &GroupStatus, varve: &str, watch: &str) -> Option<String> {
    match group.data {
        Data::InitialSync => Some(format!("nothing can be recovered until the first sync is done{watch}")),
        Data::Resync => Some(format!("the last good point before the gap stays{watch}")),
        Data::Gap => Some(format!("a resync begins by itself, the last good point before the gap stays{watch}")),
        Data::Lagging => Some(format!("link or recovery host are slower than the writes: {varve}doctor on both sides")),
        Data::Protected | Data::Verifying => None,
    }
}
