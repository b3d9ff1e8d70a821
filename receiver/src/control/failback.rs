//! What `varve` asks of a group that is to come home.

use super::ProgressOut;
use super::takeover::context;
use crate::daemon::Daemon;
use crate::failback::{cutover, orders};
use crate::limits::HOME_LOOK_INTERVAL;
use std::pin::pin;
use std::sync::Arc;
use varve_common::control::FailbackReply;
use varve_common::problem::Problem;

pub async fn failback(
    daemon: &Arc<Daemon>,
    group: &str,
    host: Option<String>,
    keep_branch: Option<String>,
    dry_run: bool,
    progress: &ProgressOut,
) -> Result<FailbackReply, Problem> {
    let context = context(daemon, group)?;
    if let Some(host) = &host
        && !daemon.hosts.list().iter().any(|known| &known.name == host && known.revoked_at.is_none())
    {
        let next = format!("'varve host list' shows the hosts; 'varve host invite {host}' enrols one");
        return Err(Problem::not_found(
            format!("'{group}' was not called home"),
            format!("there is no host '{host}'"),
            next,
        ));
    }
    if dry_run {
        return orders::look(&context, progress).await;
    }
    orders::begin(&context, host, keep_branch, progress).await
}

pub async fn cut_over(
    daemon: &Arc<Daemon>,
    group: &str,
    quick: bool,
    dry_run: bool,
    progress: &ProgressOut,
) -> Result<FailbackReply, Problem> {
    let context = context(daemon, group)?;
    let mut work = pin!(cutover::cut_over(&daemon.promotions, &context, quick, dry_run));
    loop {
        tokio::select! {
            outcome = &mut work => return outcome,
            () = tokio::time::sleep(HOME_LOOK_INTERVAL) => {
                let shown = context.slot.failback.shown();
                progress.tell(shown.done_bytes, shown.total_bytes);
            }
        }
    }
}

pub async fn stop(daemon: &Arc<Daemon>, group: &str) -> Result<FailbackReply, Problem> {
    orders::stop(&context(daemon, group)?).await
}
