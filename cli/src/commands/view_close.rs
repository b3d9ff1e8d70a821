//! `varve view close`: gives a view's devices and the history that it held free.

use crate::client::{PATIENT, SOON, ask_receiver};
use crate::context::{Context, DONE, Outcome};
use crate::words;
use serde::Serialize;
use varve_common::control::{ReceiverRequest, ViewReply, ViewsReply};
use varve_common::problem::Problem;

const EXAMPLE: &str = "Example:
  varve view close 3";

/// Closes a view. What was written to a writable one is gone. Refused while one of its devices is mounted or open.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The view's number (varve view list)
    id: u64,
    /// Close it even while it is in use: programs that have it open get errors
    #[arg(long)]
    force: bool,
}

#[derive(Serialize)]
struct Closed {
    id: u64,
    view: ViewReply,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    let views: ViewsReply = ask_receiver(context, &ReceiverRequest::ViewList, SOON)?;
    let Some(view) = views.views.into_iter().find(|view| view.id == args.id) else {
        return Err(Problem::not_found(
            format!("there is no view {}", args.id),
            "it was closed, or it ended with the receiver",
            format!("'{}' shows the open ones", context.suggest("view list")),
        ));
    };
    let request = ReceiverRequest::ViewClose { id: args.id, force: args.force };
    let () = ask_receiver(context, &request, PATIENT)?;
    context.answer(&Closed { id: args.id, view }, text_of);
    Ok(DONE)
}

fn text_of(closed: &Closed) -> String {
    let view = &closed.view;
    let mut text = format!("view {} of group '{}' is closed\n", closed.id, view.group);
    if let Some(bytes) = view.written_bytes.filter(|bytes| view.writable && *bytes > 0) {
        text.push_str(&format!("  {} that were written to it are gone\n", words::bytes(bytes)));
    }
    text
}
