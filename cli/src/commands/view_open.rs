//! `varve view open`: every volume of a group at a point, as a block device or over NBD.

use crate::check;
use crate::client::{Daemon, PATIENT, ask};
use crate::context::{Context, DONE, Outcome};
use crate::progress::Meter;
use crate::words;
use varve_common::control::{ExportKind, ReceiverRequest, ViewReply};
use varve_common::problem::Problem;

const EXAMPLE: &str = "Example:
  varve view open db --at -5m
  varve view open db --at bookmark:before-upgrade --writable
  varve view open db --at '2026-11-20 14:03:22.5' --export nbd --listen 10.0.0.2:10809
  mount -o ro DEVICE /mnt; cp /mnt/lost-file .; umount /mnt; varve view close ID

A POINT is latest, bookmark:NAME, a local time '2026-11-20 14:03:22.5', an RFC 3339 time, an age -5m, or pos:STREAM:OFFSET";

/// Opens a point without copying anything. Replication goes on; the history that the view needs stays until it is closed.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The group's name (varve status)
    group: String,
    /// Which point (varve points)
    #[arg(long, value_name = "POINT", allow_hyphen_values = true)]
    at: String,
    /// Take writes; they are kept beside the history, and gone when the view is closed
    #[arg(long)]
    writable: bool,
    /// How it is served: device is a block device of this host
    #[arg(long, default_value = "device", value_name = "device|nbd")]
    export: String,
    /// With --export nbd: serve it at this address with TLS instead of a Unix socket
    #[arg(long, value_name = "ADDR[:PORT]")]
    listen: Option<String>,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::group(&args.group)?;
    let at = check::point(&args.at)?;
    let export = export_kind(&args.export)?;
    let listen = args.listen.as_deref().map(check::nbd_listen).transpose()?;
    if listen.is_some() && export != ExportKind::Nbd {
        return Err(Problem::usage(
            "--listen does not fit --export device",
            "a block device of this host has no address",
            "say --export nbd --listen ADDR:PORT, or leave --listen away",
        ));
    }
    let (group, writable) = (args.group.clone(), args.writable);
    let request = ReceiverRequest::ViewOpen { group, at, writable, export, listen };
    // A point that is landed and not applied is waited for.
    let mut meter = Meter::new(format!("opening a view of {}", args.group), context.json);
    let reply: Result<ViewReply, Problem> =
        ask(context, Daemon::Receiver, &request, PATIENT, &mut |step| meter.show(&step));
    meter.end();
    let reply = reply?;
    context.answer(&reply, |reply| {
        let close = context.suggest(&format!("view close {}", reply.id));
        format!("{}next: '{close}' when you are done\n", text_of(reply))
    });
    Ok(DONE)
}

fn export_kind(word: &str) -> Result<ExportKind, Problem> {
    match word {
        "device" => Ok(ExportKind::Device),
        "nbd" => Ok(ExportKind::Nbd),
        _ => Err(Problem::usage(
            format!("'{}' is no way to serve a view", word.escape_debug()),
            "there are device (a block device of this host) and nbd (the network block device protocol)",
            "use --export device or --export nbd",
        )),
    }
}

/// What and where it is.
pub(super) fn text_of(view: &ViewReply) -> String {
    let writable = if view.writable { "writable, writes are gone when it is closed" } else { "read-only" };
    let mut lines = vec![format!("view {} of group '{}', {writable}", view.id, view.group)];
    lines.push(format!("  point: {}", words::point(&view.point)));
    for volume in &view.volumes {
        let place = volume.device.as_deref().or(volume.uri.as_deref()).unwrap_or("nowhere");
        lines.push(format!("  {place} is {} ({})", volume.path, words::bytes(volume.bytes)));
    }
    lines.extend(view.hints.iter().map(|hint| format!("  note: {hint}")));
    lines.join("\n") + "\n"
}
