//! The words of the command line. What each subcommand does is in its own file.

use crate::commands::{
    bookmark, doctor, drill, failback, failover, forget, host_invite, host_list, host_revoke, join, metrics, plan,
    points, protect, receiver_init, restore, retention, rollback, scrub, status, unprotect, verify, version,
    view_close, view_list, view_open,
};
use crate::context::{Context, Outcome, report};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use varve_common::problem::Problem;

const EXAMPLE: &str = "\
Example, recovery host:
  varve receiver init --listen 0.0.0.0:7443
  varve host invite db1
Example, production host:
  varve join recovery.example:7443 TOKEN
  varve protect db /dev/vdb /dev/vdc
  varve status --watch

Exit codes: 0 done, 1 failed, 2 usage, 3 refused for safety, 4 daemon or peer not reachable, 5 no such thing";

/// Disaster recovery for block devices: a live replica of each volume on another host.
#[derive(Parser)]
#[command(name = "varve", version, after_help = EXAMPLE, disable_help_subcommand = true)]
struct Cli {
    /// Directory that holds the whole installation (etc, var, run)
    #[arg(long, global = true, env = "VARVE_ROOT", value_name = "DIR", default_value = "/", hide_env_values = true)]
    root: PathBuf,
    /// Print JSON (docs/json.md)
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Set this host up as a recovery host
    #[command(subcommand)]
    Receiver(Receiver),
    /// The production hosts that may connect to this recovery host
    #[command(subcommand)]
    Host(Host),
    /// Enrol this production host at a recovery host
    Join(join::Args),
    /// Protect volumes as one group and start the first sync
    Protect(protect::Args),
    /// Stop protecting a group; the recovery host keeps what it has
    Unprotect(unprotect::Args),
    /// Name the present point of a group; on the recovery host: keep a named point, or let it go
    Bookmark(bookmark::Args),
    /// Show which points of a group can be recovered
    Points(points::Args),
    /// Open a point of a group as block devices
    #[command(subcommand)]
    View(View),
    /// Make the replica what it was at a point; can itself be rolled back
    Rollback(rollback::Args),
    /// Run a group on this recovery host, or test that it would; commit or abort that
    Failover(failover::Args),
    /// Test the takeover of a group by its plan, now or again and again
    Drill(drill::Args),
    /// The takeover plan of a group
    #[command(subcommand)]
    Plan(Plan),
    /// Bring a group that runs on this recovery host home, or take it (on the host that shall have it)
    Failback(failback::Args),
    /// Write a volume as it was at a point to a file or device
    Restore(restore::Args),
    /// Show or set how long the history of a group is kept
    Retention(retention::Args),
    /// Read all of a group's history and check it
    Scrub(scrub::Args),
    /// Show groups, links and how far the replicas are
    Status(status::Args),
    /// Print metrics in Prometheus' text format
    Metrics(metrics::Args),
    /// Compare volumes and replicas at one exact point while writes go on
    Verify(verify::Args),
    /// Make the recovery host forget a group that is no longer protected
    Forget(forget::Args),
    /// Check kernel, clock, ports, disks, configuration, and say what to do
    Doctor(doctor::Args),
    /// Versions of this program and of the daemons that answer
    Version(version::Args),
}

#[derive(Subcommand)]
enum Receiver {
    /// Make identity, configuration and directories of a receiver
    Init(receiver_init::Args),
}

#[derive(Subcommand)]
enum Host {
    /// Make a single-use token with which a production host can join
    Invite(host_invite::Args),
    /// List enrolled hosts and open invitations
    List(host_list::Args),
    /// Refuse a host from now on
    Revoke(host_revoke::Args),
}

#[derive(Subcommand)]
enum Plan {
    /// Look whether a plan is right
    Check(plan::CheckArgs),
    /// Take back what the plan of a takeover has done
    Undo(plan::UndoArgs),
}

#[derive(Subcommand)]
enum View {
    /// Open every volume of a group at a point
    Open(view_open::Args),
    /// List the open views
    List(view_list::Args),
    /// Close a view; what was written to it is gone
    Close(view_close::Args),
}

/// Runs the command line and gives the exit code.
pub(crate) fn run(args: Vec<OsString>) -> u8 {
    let json = args.iter().any(|arg| arg == "--json");
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return not_understood(&error, json),
    };
    let outcome = Context::new(&cli.root, cli.json).and_then(|context| dispatch(&context, cli.command));
    outcome.unwrap_or_else(|problem| report(&problem, json))
}

fn dispatch(context: &Context, command: Command) -> Outcome {
    match command {
        Command::Receiver(Receiver::Init(args)) => receiver_init::run(context, &args),
        Command::Host(Host::Invite(args)) => host_invite::run(context, &args),
        Command::Host(Host::List(args)) => host_list::run(context, &args),
        Command::Host(Host::Revoke(args)) => host_revoke::run(context, &args),
        Command::Join(args) => join::run(context, &args),
        Command::Protect(args) => protect::run(context, &args),
        Command::Unprotect(args) => unprotect::run(context, &args),
        Command::Bookmark(args) => bookmark::run(context, &args),
        Command::Points(args) => points::run(context, &args),
        Command::View(View::Open(args)) => view_open::run(context, &args),
        Command::View(View::List(args)) => view_list::run(context, &args),
        Command::View(View::Close(args)) => view_close::run(context, &args),
        Command::Rollback(args) => rollback::run(context, &args),
        Command::Failover(args) => failover::run(context, &args),
        Command::Drill(args) => drill::run(context, &args),
        Command::Plan(Plan::Check(args)) => plan::check(context, &args),
        Command::Plan(Plan::Undo(args)) => plan::undo(context, &args),
        Command::Failback(args) => failback::run(context, &args),
        Command::Restore(args) => restore::run(context, &args),
        Command::Retention(args) => retention::run(context, &args),
        Command::Scrub(args) => scrub::run(context, &args),
        Command::Status(args) => status::run(context, &args),
        Command::Metrics(args) => metrics::run(context, &args),
        Command::Verify(args) => verify::run(context, &args),
        Command::Forget(args) => forget::run(context, &args),
        Command::Doctor(args) => doctor::run(context, &args),
        Command::Version(args) => version::run(context, &args),
    }
}

/// Words that clap refused, in the same three lines as every other problem. Help and version are not refusals.
fn not_understood(error: &clap::Error, json: bool) -> u8 {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A reader that went away is no failure.
            let _ = error.print();
            return 0;
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand if !json => {
            let _ = error.print();
            return 2;
        }
        _ => {}
    }
    let rendered = error.render().to_string();
    let head: Vec<&str> = rendered.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
    let what = head.join(" ").trim_start_matches("error: ").to_owned();
    let usage = rendered.lines().find_map(|line| line.strip_prefix("Usage: ")).unwrap_or("varve [OPTIONS] <COMMAND>");
    let tip = match error.get(ContextKind::SuggestedSubcommand).or_else(|| error.get(ContextKind::SuggestedArg)) {
        Some(ContextValue::String(word)) => format!("; did you mean '{word}'?"),
        Some(ContextValue::Strings(words)) if !words.is_empty() => {
            format!("; did you mean '{}'?", words.join("' or '"))
        }
        _ => String::new(),
    };
    let command: Vec<&str> = usage.split(' ').take_while(|word| !word.starts_with(['[', '<', '-'])).collect();
    let what = if what.is_empty() || what.starts_with("Usage") { "a subcommand is missing".to_owned() } else { what };
    report(&Problem::usage(what, format!("the usage is: {usage}{tip}"), format!("{} --help", command.join(" "))), json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn each(command: &clap::Command, path: &str, visit: &mut impl FnMut(&clap::Command, &str)) {
        visit(command, path);
        for sub in command.get_subcommands() {
            each(sub, &format!("{path} {}", sub.get_name()), visit);
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// Whoever is asked can look first. What writes nothing that is there is not asked about.
    #[test]
    fn what_takes_a_yes_takes_a_dry_run() {
        each(&Cli::command(), "varve", &mut |command, path| {
            let takes = |name: &str| command.get_arguments().any(|arg| arg.get_id() == name);
            assert!(!takes("yes") || takes("dry_run"), "{path} has --yes and no --dry-run");
        });
    }

    /// CLI.md: every command has `--help` with an example.
    #[test]
    fn every_help_ends_with_an_example() {
        each(&Cli::command(), "varve", &mut |command, path| {
            let group = command.get_subcommands().next().is_some();
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(group || help.contains("Example"), "{path} has no example");
            assert!(group || help.contains(path), "the example of {path} shows something else: {help}");
        });
    }
}
