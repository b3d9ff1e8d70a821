//! `varve points`: which points of a group can be recovered.

use crate::check;
use crate::client::{PATIENT, ask_receiver};
use crate::context::{Context, DONE, Outcome};
use crate::words;
use varve_common::control::{PointsReply, ReceiverRequest};

const EXAMPLE: &str = "Example:
  varve points db
  varve points db --from -2h
  varve points db --from '2026-11-20 13:00' --to '2026-11-20 14:30'";

/// Bookmarks that are shown to people; JSON has all of them.
const BOOKMARKS_SHOWN: usize = 40;
/// As many of the other lists.
const OTHERS_SHOWN: usize = 20;

/// Shows the window of points, gaps with their reasons, bookmarks, and how dense the points are. Every write that came is
/// a point; ask this recovery host.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The group's name (varve status)
    group: String,
    /// Only what is not older: a time or an age
    #[arg(long, value_name = "T", allow_hyphen_values = true)]
    from: Option<String>,
    /// Only what is not younger: a time or an age
    #[arg(long, value_name = "T", allow_hyphen_values = true)]
    to: Option<String>,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::group(&args.group)?;
    let from_ns = args.from.as_deref().map(check::time_ns).transpose()?;
    let to_ns = args.to.as_deref().map(check::time_ns).transpose()?;
    let request = ReceiverRequest::Points { group: args.group.clone(), from_ns, to_ns };
    let reply: PointsReply = ask_receiver(context, &request, PATIENT)?;
    context.answer(&reply, |reply| text_of(context, reply));
    Ok(DONE)
}

fn text_of(context: &Context, reply: &PointsReply) -> String {
    let group = &reply.group;
    let mut lines = vec![match (&reply.window.from, &reply.window.to) {
        (Some(from), Some(to)) => format!(
            "group '{group}': {} from {} to {}{}",
            words::count(reply.points as usize, "point"),
            words::exact_time(from),
            words::exact_time(to),
            words::span(from, to).map(|span| format!(" ({span})")).unwrap_or_default(),
        ),
        _ => {
            format!("group '{group}': nothing can be recovered yet ('{}')", context.suggest(&format!("status {group}")))
        }
    }];
    let images = words::count(reply.records as usize, "before-image");
    lines.push(format!("  history: {} in {images}", words::bytes(reply.bytes)));
    gaps(reply, &mut lines);
    bookmarks(reply, &mut lines);
    if reply.stretches.len() > 1 {
        let row = |stretch: &varve_common::control::StretchStatus| {
            let short: String = stretch.incarnation.chars().take(8).collect();
            let to = stretch.to.as_deref().map_or_else(|| "now".to_owned(), words::time);
            vec![format!("    {short}"), words::time(&stretch.from), to, format!("epoch {}", stretch.epoch)]
        };
        section(&mut lines, "streams", &["    STREAM", "FROM", "TO", "EPOCH"], &reply.stretches, OTHERS_SHOWN, row);
    }
    for rollback in &reply.rollbacks {
        let (time, to) = (words::exact_time(&rollback.time), words::exact_time(&rollback.to));
        lines.push(format!("  rolled back at {time} to {to}"));
    }
    let row = |part: &varve_common::control::DensityStatus| {
        let (points, bytes) = (part.points.to_string(), words::bytes(part.bytes));
        vec![format!("    {}", words::time(&part.from)), words::time(&part.to), points, bytes]
    };
    section(&mut lines, "density", &["    FROM", "TO", "POINTS", "HISTORY"], &reply.density, usize::MAX, row);
    lines.join("\n") + "\n"
}

fn gaps(reply: &PointsReply, lines: &mut Vec<String>) {
    if reply.gaps.is_empty() {
        lines.push("  gaps: none".to_owned());
    } else {
        lines.push(format!("  gaps: {}, points inside cannot be recovered", reply.gaps.len()));
    }
    let hidden = reply.gaps.len().saturating_sub(OTHERS_SHOWN);
    if hidden > 0 {
        lines.push(format!("    and {hidden} older ones (--json has them)"));
    }
    for gap in reply.gaps.iter().skip(hidden) {
        let from = words::exact_time(&gap.from);
        let (to, span, why) = match &gap.to {
            Some(to) => {
                (words::exact_time(to), words::span(&gap.from, to).unwrap_or_default(), gap.reason.explain_closed())
            }
            None => ("now".to_owned(), "open".to_owned(), gap.reason.explain()),
        };
        lines.push(format!("    {from} to {to} ({span}): {why}"));
    }
    for damage in &reply.damaged {
        let from = damage.from.as_deref().map_or_else(|| "the oldest point".to_owned(), words::exact_time);
        let to = damage.to.as_deref().map_or_else(|| "the newest point".to_owned(), words::exact_time);
        lines.push(format!("  damaged: no points between {from} and {to}: {}", damage.what));
    }
}

fn bookmarks(reply: &PointsReply, lines: &mut Vec<String>) {
    if reply.bookmarks.is_empty() {
        lines.push("  bookmarks: none".to_owned());
        return;
    }
    let row = |bookmark: &varve_common::control::BookmarkStatus| {
        let kept = match (bookmark.kept, bookmark.kept_bytes) {
            (true, Some(bytes)) => format!("kept ({})", words::bytes(bytes)),
            (true, None) => "kept".to_owned(),
            (false, _) => "-".to_owned(),
        };
        let note = if bookmark.recoverable { "" } else { "cannot be recovered (gap or damage)" };
        vec![
            format!("    {}", bookmark.name),
            words::exact_time(&bookmark.time),
            bookmark.position.clone(),
            bookmark.consistency.word().to_owned(),
            kept,
            note.to_owned(),
        ]
    };
    let head = ["    NAME", "TIME", "POSITION", "CONSISTENCY", "KEPT"];
    section(lines, "bookmarks", &head, &reply.bookmarks, BOOKMARKS_SHOWN, row);
}

/// A table of the newest `most` of what is listed.
fn section<T>(
    lines: &mut Vec<String>,
    name: &str,
    head: &[&str],
    list: &[T],
    most: usize,
    row: impl Fn(&T) -> Vec<String>,
) {
    if list.is_empty() {
        return;
    }
    let hidden = list.len().saturating_sub(most);
    lines.push(format!("  {name}:"));
    let head = vec![head.iter().map(|cell| (*cell).to_owned()).collect()];
    let rows: Vec<Vec<String>> = head.into_iter().chain(list.iter().skip(hidden).map(row)).collect();
    lines.extend(words::columns(&rows));
    if hidden > 0 {
        lines.push(format!("    and {hidden} older ones (--json has them)"));
    }
}
