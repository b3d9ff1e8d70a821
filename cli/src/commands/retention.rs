//! `varve retention`: how long a group's history is kept.

use crate::check;
use crate::client::{PATIENT, ask_receiver};
use crate::confirm::confirm;
use crate::context::{Context, DONE, Outcome};
use crate::words;
use varve_common::control::{ReceiverRequest, RetentionReply};

const EXAMPLE: &str = "Example:
  varve retention db
  varve retention db --age 7d --bytes 100GiB --dry-run
  varve retention db --age none";

/// Shows the limits of a group's history, or sets those that are given. Beyond a limit the oldest points expire, but none
/// that an open view or a kept bookmark needs.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// The group's name (varve status)
    group: String,
    /// Points may expire when they are older: 36h, 7d, 4w; none: no limit
    #[arg(long, value_name = "AGE")]
    age: Option<String>,
    /// The oldest points expire when the history has more bytes: 100GiB; none: no limit
    #[arg(long, value_name = "SIZE")]
    bytes: Option<String>,
    /// Print what would expire, change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    check::group(&args.group)?;
    let age_seconds = args.age.as_deref().map(check::retention_age).transpose()?;
    let bytes = args.bytes.as_deref().map(check::retention_bytes).transpose()?;
    let go = |dry_run: bool| {
        let request = ReceiverRequest::Retention { group: args.group.clone(), age_seconds, bytes, dry_run };
        ask_receiver::<RetentionReply>(context, &request, PATIENT)
    };
    let changes = age_seconds.is_some() || bytes.is_some();
    let mut reply = go(true)?;
    if changes && !args.dry_run {
        // Points that expire do not come back.
        if reply.expiring_bytes > 0 {
            confirm(args.yes, &question(&reply), &again(context, args))?;
        }
        reply = go(false)?;
    } else if !changes {
        reply.dry_run = false;
    }
    context.answer(&reply, text_of);
    Ok(DONE)
}

fn question(reply: &RetentionReply) -> String {
    let until = reply.expiring_to.as_deref().map(words::time);
    let until = until.map(|until| format!(", all points before {until}")).unwrap_or_default();
    format!("let {} of the history of group '{}' expire{until}?", words::bytes(reply.expiring_bytes), reply.group)
}

fn again(context: &Context, args: &Args) -> String {
    let option = |name: &str, value: &Option<String>| {
        value.as_ref().map(|value| format!(" --{name} {value}")).unwrap_or_default()
    };
    let options = format!("{}{}", option("age", &args.age), option("bytes", &args.bytes));
    context.suggest(&format!("retention {}{options}", args.group))
}

fn text_of(reply: &RetentionReply) -> String {
    let age = match reply.retention.age_seconds {
        Some(age) => format!("points of the last {}", words::seconds(age as f64)),
        None => "points of any age".to_owned(),
    };
    let size = match reply.retention.bytes {
        Some(bytes) => format!("at most {}", words::bytes(bytes)),
        None => "as many bytes as there is room for".to_owned(),
    };
    let mut lines = vec![match reply.dry_run {
        true => format!("group '{}' would keep {age}, {size}; nothing was changed", reply.group),
        false => format!("group '{}' keeps {age}, {size}", reply.group),
    }];
    if let (Some(from), Some(to)) = (&reply.window.from, &reply.window.to) {
        lines.push(format!("  window: {} to {}", words::time(from), words::time(to)));
    }
    lines.push(format!("  history: {}", words::bytes(reply.bytes)));
    if reply.held_bytes > 0 {
        lines.push(format!("  {} of it stay for kept bookmarks and open views", words::bytes(reply.held_bytes)));
    }
    if reply.expiring_bytes > 0 {
        let until = reply.expiring_to.as_deref().map(words::time);
        let until = until.map(|until| format!(": points before {until}")).unwrap_or_default();
        let expire = if reply.dry_run { "would expire" } else { "expire" };
        lines.push(format!("  {} {expire}{until}", words::bytes(reply.expiring_bytes)));
    }
    lines.join("\n") + "\n"
}
