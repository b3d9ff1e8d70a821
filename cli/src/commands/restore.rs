//! `varve restore`: a whole volume as it was at a point, into a file or device.

use crate::check;
use crate::client::{Daemon, PATIENT, ask};
use crate::confirm::confirm;
use crate::context::{Context, DONE, FAILED, Outcome, explain, is_there};
use crate::progress::Meter;
use crate::words;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use varve_common::control::{ReceiverRequest, RestoreReply};
use varve_common::problem::Problem;

const EXAMPLE: &str = "Example:
  varve restore db --at -5m --volume /dev/vdb --to /srv/vdb.img
  varve restore db --at bookmark:before-upgrade --volume /dev/vdb --to /dev/vdx --force --yes

For single files open a view instead: varve view open db --at -5m";

/// Writes the volume's image (zeroes as holes), reads it again and compares. Over something that exists only with --force.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The group's name (varve status)
    group: String,
    /// Which point (varve points)
    #[arg(long, value_name = "POINT", allow_hyphen_values = true)]
    at: String,
    /// Which volume: its path on the production host, or its number in the group from 0
    #[arg(long)]
    volume: String,
    /// File or block device of this host to write to
    #[arg(long, value_name = "PATH")]
    to: String,
    /// Print what would be written, write nothing
    #[arg(long)]
    dry_run: bool,
    /// Overwrite what is there
    #[arg(long)]
    force: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::group(&args.group)?;
    let at = check::point(&args.at)?;
    let to = std::path::absolute(&args.to).map_err(|error| {
        Problem::usage(format!("'{}' cannot be written to", args.to), words::sentence(&error), "give a path with --to")
    })?;
    if !args.dry_run {
        may_be_overwritten(context, args, &to)?;
    }
    let request = ReceiverRequest::Restore {
        group: args.group.clone(),
        at,
        volume: args.volume.clone(),
        to: to.to_string_lossy().into_owned(),
        dry_run: args.dry_run,
        force: args.force,
        dir: to.parent().and_then(|dir| dir.metadata().ok()).map(|dir| (dir.dev(), dir.ino())),
    };
    let mut meter = Meter::new(format!("restoring {}", args.volume), context.json);
    let reply: Result<RestoreReply, Problem> =
        ask(context, Daemon::Receiver, &request, PATIENT, &mut |step| meter.show(&step));
    meter.end();
    let reply = reply?;
    context.answer(&reply, text_of);
    if !reply.dry_run && !reply.verified {
        explain(&Problem::failed(
            format!("{} is not known to be what was restored", reply.to),
            "reading it again gave something else than was written",
            "restore to another disk; the kernel's log may say what is wrong with this one",
        ));
        return Ok(FAILED);
    }
    Ok(DONE)
}

fn may_be_overwritten(context: &Context, args: &Args, to: &Path) -> Result<(), Problem> {
    if !is_there(to) {
        return Ok(());
    }
    if !args.force {
        return Err(Problem::refused(
            format!("{} was not written to", to.display()),
            "it exists, and what it holds would be lost",
            "give another path, or --force",
        ));
    }
    let (group, at, volume) = (&args.group, &args.at, &args.volume);
    let again = format!("restore {group} --at '{at}' --volume {volume} --to {} --force", to.display());
    confirm(
        args.yes,
        &format!("overwrite {} with {volume} as it was at '{at}'?", to.display()),
        &context.suggest(&again),
    )
}

fn text_of(reply: &RestoreReply) -> String {
    let (volume, to) = (&reply.volume, &reply.to);
    let mut lines = vec![match reply.dry_run {
        true => format!("{volume} of group '{}' could be restored to {to}; nothing was written", reply.group),
        false => format!("{volume} of group '{}' is restored to {to}", reply.group),
    }];
    lines.push(format!("  point: {}", words::point(&reply.point)));
    let (bytes, written) = (words::bytes(reply.bytes), words::bytes(reply.written_bytes));
    match reply.dry_run {
        true => lines.push(format!("  size: {bytes}")),
        false => {
            let time = words::seconds(reply.seconds);
            lines.push(format!("  size: {bytes}, of which {written} were written and the rest is zeroes, {time}"));
        }
    }
    if let Some(digest) = &reply.digest {
        let checked = if reply.verified { "read again, the same" } else { "NOT verified" };
        lines.push(format!("  blake3: {digest} ({checked})"));
    }
    lines.join("\n") + "\n"
}
