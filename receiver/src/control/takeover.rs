//! What `varve` asks of a takeover.

use super::no_group;
use crate::daemon::Daemon;
use crate::promote::{Context, plan};
use std::sync::Arc;
use varve_common::control::FailoverReply;
use varve_common::point::PointSpec;
use varve_common::problem::Problem;

pub fn context(daemon: &Daemon, group: &str) -> Result<Context, Problem> {
    let slot = daemon.registry.group(group).ok_or_else(|| no_group(group))?;
    Ok(Context { registry: daemon.registry.clone(), slot })
}

pub async fn failover(
    daemon: &Arc<Daemon>,
    group: &str,
    at: PointSpec,
    test: bool,
    dry_run: bool,
) -> Result<FailoverReply, Problem> {
    let context = context(daemon, group)?;
    if dry_run {
        let plan = tokio::task::block_in_place(|| plan(&context.slot, &at))?;
        return Ok(FailoverReply { test, ..plan });
    }
    if test {
        return tokio::task::block_in_place(|| daemon.promotions.test(&context, &daemon.views, at));
    }
    daemon.promotions.failover(&context, at).await
}

pub async fn commit(daemon: &Arc<Daemon>, group: &str) -> Result<FailoverReply, Problem> {
    daemon.promotions.commit(&context(daemon, group)?).await
}

pub async fn abort(daemon: &Arc<Daemon>, group: &str, force: bool) -> Result<FailoverReply, Problem> {
    daemon.promotions.abort(&context(daemon, group)?, &daemon.views, force).await
}
