//! What `varve` asks of a takeover.

use super::{ProgressOut, no_group};
use crate::daemon::Daemon;
use crate::promote::{Context, blocking, plan, plan_planned};
use std::sync::Arc;
use std::time::Duration;
use varve_common::control::{FailoverReply, PlannedWish};
use varve_common::point::PointSpec;
use varve_common::problem::Problem;

pub fn context(daemon: &Daemon, group: &str) -> Result<Context, Problem> {
    let slot = daemon.registry.group(group).ok_or_else(|| no_group(daemon, group))?;
    Ok(Context { registry: daemon.registry.clone(), slot })
}

/// How a group is to be taken over.
pub struct Wish {
    pub at: PointSpec,
    pub test: bool,
    pub dry_run: bool,
    pub planned: Option<PlannedWish>,
    pub abort_after: Option<Duration>,
}

pub async fn failover(
    daemon: &Arc<Daemon>,
    group: &str,
    wish: Wish,
    progress: &ProgressOut,
) -> Result<FailoverReply, Problem> {
    let context = context(daemon, group)?;
    let Wish { at, test, dry_run, planned, abort_after } = wish;
    if dry_run {
        let plan = blocking(move || match planned {
            Some(_) => plan_planned(&context.slot, &at),
            None => plan(&context.slot, &at),
        });
        return Ok(FailoverReply { test, ..plan.await? });
    }
    if test {
        let daemon = daemon.clone();
        return blocking(move || daemon.promotions.test(&context, &daemon.views, at)).await;
    }
    daemon.promotions.failover(&context, at, planned, abort_after, progress).await
}

pub async fn commit(daemon: &Arc<Daemon>, group: &str) -> Result<FailoverReply, Problem> {
    daemon.promotions.commit(&context(daemon, group)?).await
}

pub async fn abort(daemon: &Arc<Daemon>, group: &str, force: bool, only_test: bool) -> Result<FailoverReply, Problem> {
    daemon.promotions.abort(&context(daemon, group)?, &daemon.views, force, only_test).await
}
