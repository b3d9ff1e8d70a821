//! `varve join`: enrols this production host at a recovery host.

use crate::check;
use crate::client::{SOON, ask_agent};
use crate::context::{Context, DONE, Outcome, file_problem, net_problem, note, on_terminal};
use crate::words;
use serde::Serialize;
use std::time::Duration;
use varve_common::config::{AgentConfig, AgentFile};
use varve_common::control::AgentRequest;
use varve_common::problem::{Problem, ProblemKind};
use varve_io::crashsafe::{create_dir_all_durable, write_atomic};
use varve_net::identity::HostIdentity;
use varve_net::token::JoinToken;

const EXAMPLE: &str = "Example:
  varve join recovery.example:7443 varve1.abcd…";

/// Readable by everybody: the secrets are in the identity beside it.
const CONFIG_MODE: u32 = 0o644;
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// From here on a person at a terminal is told that it still works.
const QUIET: Duration = Duration::from_secs(2);

/// Exchanges the token for a certificate (mutual TLS from then on) and writes this host's identity and agent.toml.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// Address of the recovery host, HOST[:PORT]
    #[arg(value_name = "ADDR:PORT")]
    address: String,
    /// What `varve host invite` printed there
    token: String,
    /// Replace an earlier enrolment
    #[arg(long)]
    force: bool,
}

#[derive(Serialize)]
struct Joined {
    name: String,
    receiver: String,
    config: String,
    identity: String,
    fingerprint: String,
    /// `reloaded`, `not-running` or `not-reloaded`.
    agent: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    agent_problem: Option<Problem>,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    let receiver = check::peer(&args.address)?;
    let token = JoinToken::decode(&args.token).map_err(|error| net_problem(&error))?;
    let config = context.paths.agent_config();
    let old = read_config(context)?;
    if !args.force {
        refuse_second(context, &old)?;
    }
    let text = with_keys(&old, &receiver, &token.name)?;
    let dir = context.paths.config_dir();
    // Before the token is used up: what can fail here, fails now.
    create_dir_all_durable(&dir).map_err(|error| file_problem(&error))?;
    probe(&dir)?;

    let identity = enrol(&receiver, &token)?;
    let spent = |problem: Problem| Problem {
        next: format!("{}; the token is used up: make a new one with 'varve host invite {}'", problem.next, token.name),
        ..problem
    };
    let place = context.paths.agent_identity();
    identity.save(&place).map_err(|error| spent(net_problem(&error)))?;
    write_atomic(&config, text.as_bytes(), CONFIG_MODE).map_err(|error| spent(file_problem(&error)))?;

    let (agent, agent_problem) = match ask_agent::<()>(context, &AgentRequest::Reload, SOON) {
        Ok(()) => ("reloaded", None),
        Err(problem) if problem.kind == ProblemKind::Unreachable => ("not-running", None),
        Err(problem) => ("not-reloaded", Some(problem)),
    };
    let joined = Joined {
        name: identity.name().to_owned(),
        receiver,
        config: config.display().to_string(),
        identity: place.display().to_string(),
        fingerprint: words::hex(&identity.fingerprint()),
        agent,
        agent_problem,
    };
    context.answer(&joined, |joined| text_of(context, joined));
    Ok(DONE)
}

fn text_of(context: &Context, joined: &Joined) -> String {
    let mut text = format!(
        "joined {} as '{}'
  configuration  {}
  identity       {} (certificate {})
",
        joined.receiver,
        joined.name,
        joined.config,
        joined.identity,
        &joined.fingerprint[..16],
    );
    let protect = context.suggest("protect GROUP VOLUME...");
    match (joined.agent, &joined.agent_problem) {
        ("reloaded", _) => text.push_str(&format!("next: {protect}\n")),
        (_, Some(problem)) => text.push_str(&format!(
            "  the running agent could not load it: {} ({})\nnext: restart varve-agent\n",
            problem.what, problem.why
        )),
        _ => text.push_str(&format!("next:\n  {}\n  {protect}\n", context.suggest_start("varve-agent"))),
    }
    text
}

/// The text of agent.toml, checked; empty if there is none.
fn read_config(context: &Context) -> Result<String, Problem> {
    use std::io::Read;
    let path = context.paths.agent_config();
    let failed = |error: std::io::Error| file_problem(&varve_io::IoError::new("read", &path, error));
    let file = match std::fs::File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut text = String::new();
    file.take(CONFIG_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    AgentConfig::parse(&path.display().to_string(), &text)?;
    Ok(text)
}

fn refuse_second(context: &Context, config: &str) -> Result<(), Problem> {
    let place = context.paths.agent_identity();
    let file: AgentFile = parse(config)?;
    let identity = place.join("host.pem").exists().then(|| HostIdentity::load(&place));
    let (name, receiver) = match (identity, file) {
        (None, AgentFile { receiver: None, .. }) => return Ok(()),
        (Some(Ok(identity)), file) => (Some(identity.name().to_owned()), file.receiver),
        (_, file) => (file.name, file.receiver),
    };
    let name = name.map(|name| format!(" as '{name}'")).unwrap_or_default();
    let receiver = receiver.unwrap_or_else(|| "a recovery host".to_owned());
    Err(Problem::refused(
        "this host has joined already",
        format!("it is enrolled at {receiver}{name} ({})", place.display()),
        "nothing, if that is right; --force replaces this enrolment (groups stay configured)",
    ))
}

fn parse(text: &str) -> Result<AgentFile, Problem> {
    toml::from_str(text).map_err(|error| {
        Problem::usage(
            "agent.toml is not understood",
            error.message(),
            "correct agent.toml; docs/install.md lists its keys",
        )
    })
}

/// The configuration with two keys set; everything else, comments included, stays as the operator wrote it. The file
/// is flat, so lines are enough; the result is read again and compared with what is meant.
fn with_keys(old: &str, receiver: &str, name: &str) -> Result<String, Problem> {
    let ours = |line: &&str| {
        let key = line.split('=').next().unwrap_or_default().trim();
        line.contains('=') && (key == "receiver" || key == "name")
    };
    let mut text = String::new();
    if old.is_empty() {
        text.push_str("# Keys and their meaning: docs/install.md.\n");
    }
    for line in old.lines().filter(|line| !ours(line)) {
        text.push_str(line);
        text.push('\n');
    }
    text.push_str(&format!("receiver = \"{receiver}\"\nname = \"{name}\"\n"));
    let meant = AgentFile { receiver: Some(receiver.to_owned()), name: Some(name.to_owned()), ..parse(old)? };
    if parse(&text).is_ok_and(|file| file == meant) {
        return Ok(text);
    }
    // Written in an unusual way (a text over several lines, quoted keys): right is more than pretty.
    toml::to_string(&meant)
        .map_err(|error| Problem::failed("agent.toml cannot be written", error.to_string(), "correct agent.toml"))
}

/// Whether files can be made in `dir`: better known before the single-use token is spent.
fn probe(dir: &std::path::Path) -> Result<(), Problem> {
    let file = dir.join(format!(".varve-join-{}", std::process::id()));
    write_atomic(&file, b"probe", 0o600).map_err(|error| file_problem(&error))?;
    varve_io::crashsafe::remove_durable(&file).map_err(|error| file_problem(&error))
}

fn enrol(receiver: &str, token: &JoinToken) -> Result<HostIdentity, Problem> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
        Problem::failed(
            "the network cannot be used",
            words::sentence(&error),
            "check this machine's limits (ulimit -n)",
        )
    })?;
    let joined = runtime.block_on(async {
        let join = varve_net::endpoint::join(receiver, token);
        tokio::pin!(join);
        if let Ok(done) = tokio::time::timeout(QUIET, &mut join).await {
            return done;
        }
        if on_terminal() {
            note(&format!("{receiver} has not answered yet, still trying"));
        }
        join.await
    });
    joined.map_err(|error| net_problem(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_keys_and_comments_stay() {
        let old = "# mine\nring_mib = 128 # more\nreceiver = \"old:1\"\n\nname=\"x\"\ncompression = false\n";
        let text = with_keys(old, "new:2", "db1").expect("a good file");
        assert_eq!(
            text,
            "# mine\nring_mib = 128 # more\n\ncompression = false\nreceiver = \"new:2\"\nname = \"db1\"\n"
        );
    }

    #[test]
    fn unusual_ways_to_write_keys_are_understood() {
        for old in
            ["\"receiver\" = \"old:1\"", "receiver = \"\"\"\nold:1\"\"\"", "lagging_seconds = 3.5 # receiver = 4"]
        {
            let file = parse(&with_keys(old, "new:2", "db1").expect(old)).expect(old);
            assert_eq!(file.receiver.as_deref(), Some("new:2"), "{old}");
            assert_eq!(file.lagging_seconds, parse(old).expect(old).lagging_seconds);
        }
    }
}
