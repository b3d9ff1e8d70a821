//! The receiver's port, what the kernel grants a socket, and the way to the receiver.

use super::Section;
use crate::client::Daemon;
use crate::context::{Context, net_problem};
use crate::words;
use std::net::{SocketAddr, ToSocketAddrs};
use varve_common::config::{AgentConfig, ReceiverConfig};
use varve_net::transport::{SocketBuffers, Tuning, bind_udp};

pub(super) fn section(context: &Context) -> Section {
    let mut section = Section::new("network");
    if let Some(text) = super::config::text(&context.paths.receiver_config())
        && let Ok(config) = ReceiverConfig::parse("receiver.toml", &text)
    {
        listen_port(&mut section, context, config.listen);
    }
    if let Some(text) = super::config::text(&context.paths.agent_config())
        && let Ok(AgentConfig { receiver: Some(receiver), .. }) = AgentConfig::parse("agent.toml", &text)
    {
        receiver_address(&mut section, &receiver);
    }
    socket_buffers(&mut section);
    section
}

/// A running receiver holds its port itself; otherwise it must be free for it.
fn listen_port(section: &mut Section, context: &Context, listen: SocketAddr) {
    let name = "listen port";
    let running = Daemon::Receiver.status(context, None).ok().and_then(|reply| reply.daemons.into_iter().next());
    if let Some(address) = running.map(|daemon| daemon.address.unwrap_or_default()) {
        if address.is_empty() || address == listen.to_string() {
            return section.ok(name, format!("UDP {listen}, held by varve-receiver"));
        }
        return section.warn(
            name,
            format!("varve-receiver listens on {address}, receiver.toml says {listen}"),
            "the configuration was changed after it was started",
            "restart varve-receiver",
        );
    }
    match bind_udp(listen, &Tuning::default()) {
        Ok(_) => section.ok(name, format!("UDP {listen} is free for varve-receiver")),
        Err(error) => {
            let problem = net_problem(&error);
            section.fail(
                name,
                format!("{}: {}", problem.what, problem.why),
                "varve-receiver could not start",
                problem.next,
            );
        }
    }
}

fn receiver_address(section: &mut Section, receiver: &str) {
    let name = "receiver's address";
    match receiver.to_socket_addrs() {
        Ok(mut addresses) => match addresses.next() {
            Some(first) => section.ok(name, format!("{receiver} ({})", first.ip())),
            None => unresolved(section, receiver, "it has no address"),
        },
        Err(error) => unresolved(section, receiver, &words::sentence(&error)),
    }
}

fn unresolved(section: &mut Section, receiver: &str, why: &str) {
    section.fail(
        "receiver's address",
        format!("{receiver} cannot be found: {why}"),
        "without it nothing can be sent to the recovery host",
        "check DNS and /etc/hosts, or join again with an IP address",
    );
}

fn socket_buffers(section: &mut Section) {
    let name = "socket buffers";
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let (granted, next) = match bind_udp(any, &Tuning::default()) {
        Ok((_, buffers)) => (buffers, "sysctl -w net.core.rmem_max=N net.core.wmem_max=N, and in /etc/sysctl.d"),
        Err(error) => {
            let problem = net_problem(&error);
            return section.fail(
                name,
                format!("{}: {}", problem.what, problem.why),
                "the daemons need UDP sockets",
                problem.next,
            );
        }
    };
    let SocketBuffers { wanted_bytes, receive_bytes, send_bytes } = granted;
    let found = format!(
        "receive {}, send {}, wanted {} each",
        words::bytes(receive_bytes as u64),
        words::bytes(send_bytes as u64),
        words::bytes(wanted_bytes as u64)
    );
    if granted.is_full() {
        return section.ok(name, found);
    }
    section.warn(
        name,
        found,
        "packets are dropped when a busy process comes late to its socket, and everything slows down",
        next.replace('N', &wanted_bytes.to_string()),
    );
}
