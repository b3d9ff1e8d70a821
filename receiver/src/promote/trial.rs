//! Tests of a takeover, beside the replication: writable views.

use super::plan::plan;
use super::{Context, Promotions, lock, nothing};
use crate::view::views::{Views, Wish};
use std::time::Instant;
use varve_common::control::{ExportKind, FailoverReply, TakeoverStatus};
use varve_common::point::PointSpec;
use varve_common::problem::Problem;

impl Promotions {
    /// Makes one.
    ///
    /// # Errors
    /// For the operator.
    pub fn test(&self, context: &Context, views: &Views, at: PointSpec) -> Result<FailoverReply, Problem> {
        let begin = Instant::now();
        let name = &context.slot.name;
        let refused = |why: String, next: String| Err(Problem::refused(format!("'{name}' is not tested"), why, next));
        if let Some(view) = self.test_of(name, views) {
            return refused(
                format!("view {view} is its test already"),
                format!("'varve failover abort {name}' ends it"),
            );
        }
        if context.meta().takeover.is_some() {
            let next = format!("'varve view open {name} --writable' opens a point beside it");
            return refused("it runs here in earnest".to_owned(), next);
        }
        let plan = plan(&context.slot, &at)?;
        let wish = Wish { at, writable: true, export: ExportKind::Device, listen: None };
        let runtime = tokio::runtime::Handle::current();
        let view = views.open(&context.slot, &context.registry.group_dir(name), &wish, &runtime)?;
        lock(&self.tests).insert(name.clone(), view.id);
        Ok(FailoverReply {
            point: view.point,
            volumes: view.volumes,
            hints: view.hints,
            test: true,
            dry_run: false,
            epoch: plan.epoch - 1,
            seconds: begin.elapsed().as_secs_f64(),
            ..plan
        })
    }

    /// The view of the group's test. One that was closed as a view is none any more.
    pub(super) fn test_of(&self, name: &str, views: &Views) -> Option<u64> {
        let view = lock(&self.tests).get(name).copied();
        view.filter(|view| views.has(*view))
    }

    pub(super) fn end_test(
        &self,
        context: &Context,
        views: &Views,
        view: u64,
        force: bool,
    ) -> Result<FailoverReply, Problem> {
        let runtime = tokio::runtime::Handle::current();
        tokio::task::block_in_place(|| views.close(view, force, &runtime))?;
        lock(&self.tests).remove(&context.slot.name);
        Ok(FailoverReply { test: true, aborted: true, ..self.reply(context, &nothing()) })
    }

    pub(super) fn test_status(&self, name: &str, views: &Views) -> Option<TakeoverStatus> {
        let id = self.test_of(name, views)?;
        let view = views.list().into_iter().find(|view| view.id == id)?;
        Some(TakeoverStatus {
            since: view.opened.unwrap_or_default(),
            point: view.point.time,
            committed: false,
            test: true,
            abort_at: None,
            aborting: false,
            devices: Vec::new(),
            failback: None,
            next: format!("view {id} is its test: 'varve failover abort {name}' ends it"),
        })
    }
}
