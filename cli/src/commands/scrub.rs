//! `varve scrub`: reads all of a group's history and checks every checksum.

use crate::check;
use crate::client::{Daemon, PATIENT, ask};
use crate::context::{Context, DONE, FAILED, Outcome, explain};
use crate::progress::Meter;
use crate::words;
use varve_common::control::{LayerDamage, ReceiverRequest, ScrubReply};
use varve_common::problem::Problem;

const EXAMPLE: &str = "Example:
  varve scrub db
  varve scrub db --rate 50MiB";

/// Says which layers are damaged and exactly which points that takes away; all others can still be recovered. Exit code 1
/// if there is damage.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The group's name (varve status)
    group: String,
    /// Read at most this much a second
    #[arg(long, value_name = "SIZE")]
    rate: Option<String>,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::group(&args.group)?;
    let bytes_per_second = args.rate.as_deref().map(check::size).transpose()?;
    let request = ReceiverRequest::Scrub { group: args.group.clone(), bytes_per_second };
    let mut meter = Meter::new(format!("scrubbing {}", args.group), context.json);
    let reply: Result<ScrubReply, Problem> =
        ask(context, Daemon::Receiver, &request, PATIENT, &mut |step| meter.show(&step));
    meter.end();
    let reply = reply?;
    context.answer(&reply, text_of);
    if reply.damaged.is_empty() {
        return Ok(DONE);
    }
    explain(&Problem::failed(
        format!("the history of group '{}' is damaged", reply.group),
        "what was read is not what was written; the disk or something on the way to it fails",
        format!(
            "'{}' shows what is left; look into the disk's health",
            context.suggest(&format!("points {}", args.group))
        ),
    ));
    Ok(FAILED)
}

fn text_of(reply: &ScrubReply) -> String {
    let read = format!("{} in {} read", words::bytes(reply.bytes), words::count(reply.layers as usize, "layer"));
    let mut lines = vec![match reply.damaged.len() {
        0 => format!("group '{}': {read}, all whole", reply.group),
        1 => format!("group '{}': {read}, 1 place is damaged", reply.group),
        many => format!("group '{}': {read}, {many} places are damaged", reply.group),
    }];
    lines.extend(reply.damaged.iter().map(damage));
    lines.join("\n") + "\n"
}

fn damage(damage: &LayerDamage) -> String {
    let lost = match (&damage.from, &damage.to) {
        (Some(from), Some(to)) => {
            format!("points from {} to {} are lost", words::exact_time(from), words::exact_time(to))
        }
        (Some(from), None) => format!("points from {} on are lost", words::exact_time(from)),
        (None, Some(to)) => format!("points up to {} are lost", words::exact_time(to)),
        (None, None) => "no point is lost".to_owned(),
    };
    format!("  layer {}: {}; {lost}", damage.layer, damage.what)
}
