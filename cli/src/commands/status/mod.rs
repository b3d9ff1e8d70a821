//! `varve status`: groups, links and how far the replicas are.
//!
//! - [`picture`]: what the daemons of this host say, and which of them say nothing
//! - [`table`]: the picture for people
//! - [`advice`]: the next sensible command
//! - [`watch`]: the picture again and again

mod advice;
#[cfg(test)]
mod golden;
pub(crate) mod picture;
mod table;
mod watch;

use crate::check;
use crate::context::{Context, DONE, Outcome, print, print_json};
use crate::words;
use picture::Picture;

const EXAMPLE: &str = "Example:
  varve status
  varve status db --watch

Exit codes: 0 a daemon answered (what it says may be bad news), 4 none did, 5 no such group";

/// Shows the groups of this host. What is wrong is said, with the next sensible command.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// Only this group
    group: Option<String>,
    /// Show it again every second
    #[arg(long)]
    watch: bool,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    if let Some(group) = &args.group {
        check::group(group)?;
    }
    let picture = Picture::take(context, args.group.as_deref())?;
    if args.watch {
        return watch::run(context, args.group.as_deref(), picture);
    }
    if picture.daemons.is_empty() {
        return Err(picture.into_problem());
    }
    show(context, &picture);
    Ok(DONE)
}

/// As [`print`].
fn show(context: &Context, picture: &Picture) -> bool {
    if context.json {
        print_json(picture)
    } else {
        print(&words::visible(&table::render(picture, &context.suggest(""))))
    }
}
