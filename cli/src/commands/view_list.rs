//! `varve view list`: the open views and what they hold.

use crate::client::{SOON, ask_receiver};
use crate::context::{Context, DONE, Outcome};
use crate::words;
use varve_common::control::{ReceiverRequest, ViewReply, ViewsReply};

const EXAMPLE: &str = "Example:
  varve view list";

/// Lists the open views: their points, where they are, and the history that stays because of them.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {}

pub(crate) fn run(context: &Context, _: &Args) -> Outcome {
    let reply: ViewsReply = ask_receiver(context, &ReceiverRequest::ViewList, SOON)?;
    context.answer(&reply, |reply| text_of(context, reply));
    Ok(DONE)
}

fn text_of(context: &Context, reply: &ViewsReply) -> String {
    if reply.views.is_empty() {
        let open = context.suggest("view open GROUP --at POINT");
        return format!("no view is open\nnext: {open}\n");
    }
    let mut rows = vec![["VIEW", "GROUP", "POINT", "MODE", "HOLDS", "VOLUME", "WHERE"].map(str::to_owned).to_vec()];
    for view in &reply.views {
        let head = head(view);
        for (number, volume) in view.volumes.iter().enumerate() {
            let mut row = if number == 0 { head.clone() } else { vec![String::new(); head.len()] };
            let place = volume.device.clone().or(volume.uri.clone());
            row.extend([volume.path.clone(), place.unwrap_or_else(|| "-".to_owned())]);
            rows.push(row);
        }
    }
    words::columns(&rows).join("\n") + "\n"
}

fn head(view: &ViewReply) -> Vec<String> {
    let mode = match (view.writable, view.written_bytes) {
        (true, Some(bytes)) => format!("writable ({})", words::bytes(bytes)),
        (true, None) => "writable".to_owned(),
        (false, _) => "read-only".to_owned(),
    };
    let holds = view.held_bytes.map_or_else(|| "-".to_owned(), words::bytes);
    vec![view.id.to_string(), view.group.clone(), words::time(&view.point.time), mode, holds]
}
