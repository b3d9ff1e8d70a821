//! `varve protect`: volumes become a group, and its first sync begins.

use crate::check;
use crate::client::{PATIENT, ask_agent};
use crate::context::{Context, DONE, Outcome};
use crate::words;
use std::path::Path;
use varve_common::control::{AgentRequest, ProtectReply};
use varve_common::limits::{PATH_BYTES_MAX, VOLUMES_PER_GROUP_MAX};
use varve_common::problem::Problem;

const EXAMPLE: &str = "Example:
  varve protect db /dev/vdb /dev/vdc
  varve protect web /dev/vg0/web --replica /srv/replicas/web.img --dry-run";

/// Begins to capture the volumes' writes, in one order, and starts the first sync. The volumes stay in use meanwhile.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// Name of the group: the unit of points and failover
    group: String,
    /// Block devices: disks, partitions, logical volumes
    #[arg(required = true, value_name = "VOLUME")]
    volumes: Vec<String>,
    /// Where the recovery host keeps the replica, a file or a block device there; none, or one per volume, in their order
    #[arg(long = "replica", value_name = "PATH")]
    replicas: Vec<String>,
    /// Check everything, change nothing
    #[arg(long)]
    dry_run: bool,
}

/// Words that come before a group's name: `varve failover abort`, `varve drill show`.
const WORDS: [&str; 4] = ["commit", "abort", "run", "show"];

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::group(&args.group)?;
    if WORDS.contains(&args.group.as_str()) {
        return Err(Problem::usage(
            format!("'{}' cannot name a group", args.group),
            "it is a word of commands (varve failover commit|abort, varve drill run|show), which would take it for that",
            "choose another name",
        ));
    }
    let volumes = volume_paths(&args.volumes)?;
    check_replicas(&args.replicas, volumes.len())?;
    let request = AgentRequest::Protect {
        group: args.group.clone(),
        volumes,
        replicas: args.replicas.clone(),
        dry_run: args.dry_run,
    };
    let reply: ProtectReply = ask_agent(context, &request, PATIENT)?;
    context.answer(&reply, |reply| text_of(context, reply, args.dry_run));
    Ok(DONE)
}

/// The agent has another working directory.
fn volume_paths(given: &[String]) -> Result<Vec<String>, Problem> {
    if given.len() > VOLUMES_PER_GROUP_MAX {
        return Err(Problem::usage(
            format!("{} volumes are too many for one group", given.len()),
            format!("a group has at most {VOLUMES_PER_GROUP_MAX}"),
            "make several groups; only volumes whose writes depend on each other need the same one",
        ));
    }
    let mut volumes: Vec<String> = Vec::new();
    for volume in given {
        let absolute = std::path::absolute(volume).map(|path| path.display().to_string()).unwrap_or_default();
        check_length("volume", volume, &absolute)?;
        if volumes.contains(&absolute) {
            return Err(Problem::usage(
                format!("volume '{volume}' is given twice"),
                "a volume is in a group once",
                "leave one away",
            ));
        }
        volumes.push(absolute);
    }
    Ok(volumes)
}

fn check_replicas(replicas: &[String], volumes: usize) -> Result<(), Problem> {
    if !replicas.is_empty() && replicas.len() != volumes {
        return Err(Problem::usage(
            format!("{} for {}", words::count(replicas.len(), "--replica"), words::count(volumes, "volume")),
            "replicas belong to volumes in their order: give none, or one per volume",
            "repeat --replica PATH for each volume, or leave it away: the recovery host then chooses",
        ));
    }
    for (at, replica) in replicas.iter().enumerate() {
        check_length("replica", replica, replica)?;
        if !Path::new(replica).is_absolute() {
            return Err(Problem::usage(
                format!("replica '{replica}' is not an absolute path"),
                "it is a path on the recovery host, which knows nothing of this directory",
                "begin it with '/'",
            ));
        }
        if replicas[..at].contains(replica) {
            return Err(Problem::usage(
                format!("replica '{replica}' is given twice"),
                "two volumes cannot share a replica",
                "give each volume its own",
            ));
        }
    }
    Ok(())
}

fn check_length(what: &str, given: &str, path: &str) -> Result<(), Problem> {
    if !path.is_empty() && path.len() <= PATH_BYTES_MAX && !path.contains('\0') {
        return Ok(());
    }
    let start: String = given.chars().take(40).collect();
    Err(Problem::usage(
        format!("'{}' cannot be a {what}", start.escape_debug()),
        format!("a path has 1 to {PATH_BYTES_MAX} bytes"),
        "correct the path",
    ))
}

fn text_of(context: &Context, reply: &ProtectReply, dry_run: bool) -> String {
    let mut lines = Vec::new();
    match dry_run {
        true => lines.push(format!("group '{}' could be protected; nothing was changed", reply.group)),
        false => lines.push(format!("group '{}' is being captured, the first sync has begun", reply.group)),
    }
    let rows: Vec<Vec<String>> = reply
        .volumes
        .iter()
        .map(|volume| {
            let replica = volume.replica.as_deref().unwrap_or("chosen by the recovery host");
            vec![format!("  {}", volume.path), words::bytes(volume.bytes), format!("-> {replica}")]
        })
        .collect();
    lines.extend(words::columns(&rows));
    lines.extend(reply.notes.iter().map(|text| format!("  note: {text}")));
    if !dry_run {
        lines.push(format!("next: {}", context.suggest(&format!("status {} --watch", reply.group))));
    }
    lines.join("\n") + "\n"
}
