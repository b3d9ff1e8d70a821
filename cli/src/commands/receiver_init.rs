//! `varve receiver init`: identity, configuration and directories of a recovery host.

use crate::check;
use crate::context::{Context, DONE, Outcome, file_problem, net_problem};
use crate::words;
use serde::Serialize;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use varve_common::config::{DEFAULT_PORT, ReceiverConfig};
use varve_common::problem::Problem;
use varve_io::crashsafe::{create_dir_all_durable, write_atomic};
use varve_net::identity::Authority;

const EXAMPLE: &str = "Example:
  varve receiver init --listen 0.0.0.0:7443 --name backup";

/// Readable by everybody: there is no secret in it.
const CONFIG_MODE: u32 = 0o644;

/// Makes the private certificate authority, the configuration file and the directories of a receiver. What exists is
/// never overwritten.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// UDP address to listen on [default: every address, port 7443]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<String>,
    /// Name of this receiver, for people [default: the host's name]
    #[arg(long)]
    name: Option<String>,
}

#[derive(Serialize)]
struct Made {
    name: String,
    listen: String,
    config: String,
    identity: String,
    state: String,
    ca_fingerprint: String,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    let listen = match &args.listen {
        Some(text) => check::listen(text)?,
        None => every_address(),
    };
    let name = args.name.clone().unwrap_or_else(own_name);
    check::host(&name)?;
    let paths = &context.paths;
    let config = paths.receiver_config();
    match config.try_exists() {
        Ok(false) => {}
        Ok(true) => return Err(exists(context)),
        Err(error) => return Err(file_problem(&varve_io::IoError::new("look at", &config, error))),
    }
    for dir in [paths.config_dir(), paths.receiver_state()] {
        create_dir_all_durable(&dir).map_err(|error| file_problem(&error))?;
    }
    let identity = paths.receiver_identity();
    // The configuration is written last: an init that was cut off between the two goes on with its authority.
    let authority = match identity.join("ca.pem").exists() {
        true => Authority::open(&identity),
        false => Authority::create(&identity, &name),
    }
    .map_err(|error| net_problem(&error))?;
    let text = config_text(&name, listen);
    ReceiverConfig::parse("receiver.toml", &text)?;
    write_atomic(&config, text.as_bytes(), CONFIG_MODE).map_err(|error| file_problem(&error))?;
    let made = Made {
        name,
        listen: listen.to_string(),
        config: config.display().to_string(),
        identity: identity.display().to_string(),
        state: paths.receiver_state().display().to_string(),
        ca_fingerprint: words::hex(&authority.fingerprint()),
    };
    context.answer(&made, |made| text_of(context, made));
    Ok(DONE)
}

fn text_of(context: &Context, made: &Made) -> String {
    format!(
        "receiver '{}' is set up
  listens on     UDP {}
  configuration  {}
  identity       {} (back this up; CA {})
  state          {}
next:
  {}
  {}
",
        made.name,
        made.listen,
        made.config,
        made.identity,
        &made.ca_fingerprint[..16],
        made.state,
        context.suggest_start("varve-receiver"),
        context.suggest("host invite NAME"),
    )
}

fn exists(context: &Context) -> Problem {
    let (config, identity) = (context.paths.receiver_config(), context.paths.receiver_identity());
    Problem::refused(
        "this host is set up as a receiver already",
        format!("{} exists; a new authority would lock out every host that joined", config.display()),
        format!(
            "change {} and restart varve-receiver; to start over, move it and {} away first",
            config.display(),
            identity.display()
        ),
    )
}

fn config_text(name: &str, listen: SocketAddr) -> String {
    format!(
        "# Written by `varve receiver init`. Keys and their meaning: docs/install.md.
name = \"{name}\"
listen = \"{listen}\"
"
    )
}

/// `[::]` takes IPv4 as well, where the kernel has IPv6.
fn every_address() -> SocketAddr {
    if std::path::Path::new("/proc/net/if_inet6").exists() {
        (Ipv6Addr::UNSPECIFIED, DEFAULT_PORT).into()
    } else {
        (Ipv4Addr::UNSPECIFIED, DEFAULT_PORT).into()
    }
}

/// The host's name as far as it can be a name here.
fn own_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().to_ascii_lowercase();
    let name: String = host.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')).collect();
    let name: String = name.trim_start_matches(['.', '_', '-']).chars().take(64).collect();
    if name.is_empty() { "receiver".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_what_the_daemon_reads() {
        let text = config_text("backup", "[::]:99".parse().expect("an address"));
        let config = ReceiverConfig::parse("receiver.toml", &text).expect("our own words");
        assert_eq!((config.name.as_str(), config.listen.port()), ("backup", 99));
    }

    #[test]
    fn the_default_name_can_be_a_name() {
        check::host(&own_name()).expect("a name");
    }
}
