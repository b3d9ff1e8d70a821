//! Devices that are to be there and are not: after a start, after a takeover whose devices could not be made, after a cut-over
//! that came to nothing. And how they go.

use super::{Context, Promotions, State, links, lock};
use crate::group::registry::{Desk, Registry};
use crate::view::views::{export_problem, user_of_devices};
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::time::{Duration, Instant};
use varve_common::problem::Problem;
use varve_common::wire::messages::RefusedReason;
use varve_io::blockdev::writers;

/// Between two looks at what is missing.
const LOOK: Duration = Duration::from_secs(1);
/// Between two tries.
const RETRY: Duration = Duration::from_secs(5);

/// What is to be served and is not.
#[derive(Debug, Default)]
pub(super) struct Missing {
    /// Why, as far as it was tried.
    why: Option<String>,
    /// `None`: it is being tried.
    next_try: Option<Instant>,
}

impl Promotions {
    /// Makes devices again wherever they are missing, until the daemon ends.
    pub async fn keep_serving(self: Arc<Self>, registry: Arc<Registry>) {
        let mut closing = self.closing.subscribe();
        loop {
            for slot in registry.groups() {
                let context = Context { registry: registry.clone(), slot };
                if self.begins_try(&context) {
                    let promotions = self.clone();
                    tokio::spawn(async move {
                        let why = promotions.try_again(&context).await.err();
                        promotions.tried(&context, why);
                    });
                }
            }
            if tokio::time::timeout(LOOK, closing.wait_for(|closing| *closing)).await.is_ok() {
                return;
            }
        }
    }

    /// Whether a try begins now. An undone takeover whose undoing was cut off is gone on with in the same way.
    fn begins_try(&self, context: &Context) -> bool {
        let name = &context.slot.name;
        let taken_over = {
            let board = context.slot.board();
            // Nobody knows who is right: then nothing is made.
            board.unsure.is_none() && board.meta.as_ref().is_some_and(|meta| meta.takeover.is_some())
        };
        let well = lock(&self.served).get(name).is_some_and(|served| !matches!(served.state, State::Broken(_)));
        let mut missing = lock(&self.missing);
        if !taken_over || well {
            // What is being tried says itself how it ended.
            if missing.get(name).is_some_and(|missing| missing.next_try.is_some()) {
                missing.remove(name);
            }
            return false;
        }
        match missing.entry(name.clone()) {
            Entry::Vacant(entry) => {
                entry.insert(Missing::default());
                true
            }
            Entry::Occupied(mut entry) => {
                let due = entry.get().next_try.is_some_and(|at| at <= Instant::now());
                if due {
                    entry.get_mut().next_try = None;
                }
                due
            }
        }
    }

    async fn try_again(&self, context: &Context) -> Result<(), String> {
        let name = &context.slot.name;
        let broken = lock(&self.served).get(name).is_some_and(|served| matches!(served.state, State::Broken(_)));
        if broken {
            tokio::task::block_in_place(|| self.stop_serving(name, false, "its devices stay")).map_err(|it| it.why)?;
        }
        match context.registry.seize(&context.slot).await {
            Ok(desk) => self.serve_again(context, &desk).await,
            // Whoever has the desk serves it, or takes it away.
            Err(refused) if refused.reason == RefusedReason::Busy => Ok(()),
            Err(refused) => Err(refused.text),
        }
    }

    fn tried(&self, context: &Context, why: Option<String>) {
        let name = &context.slot.name;
        let mut missing = lock(&self.missing);
        match why {
            None => drop(missing.remove(name)),
            Some(why) => {
                let known = missing.get_mut(name).is_some_and(|missing| missing.why.as_ref() == Some(&why));
                if !known {
                    tracing::error!(group = name, why, "it runs here, and its devices are not all there; tried again");
                }
                missing.insert(name.clone(), Missing { why: Some(why), next_try: Some(Instant::now() + RETRY) });
            }
        }
    }

    /// Why devices are missing that should be there.
    pub(super) fn missing_why(&self, name: &str) -> Option<String> {
        if let Some(State::Broken(why)) = lock(&self.served).get(name).map(|served| &served.state) {
            return Some(why.clone());
        }
        lock(&self.missing).get(name).and_then(|missing| missing.why.clone())
    }

    /// Serves what is taken over, if nothing serves it. If that fails, it is tried again later.
    pub async fn resume(&self, context: &Context) {
        let failed = match context.registry.seize(&context.slot).await {
            Ok(desk) => self.serve_again(context, &desk).await.err(),
            Err(refused) => Some(refused.text),
        };
        if let Some(why) = failed {
            tracing::error!(group = context.slot.name, why, "its volumes cannot be served; it is tried again");
        }
    }

    async fn serve_again(&self, context: &Context, desk: &Desk) -> Result<(), String> {
        let name = &context.slot.name;
        let Some(open) = &desk.open else { return Err("its files are not open".to_owned()) };
        // Looked at with the desk in hand: it may have been undone, or its undoing begun, or it is served meanwhile, or
        // nobody knows any more who is right.
        let meta = context.meta();
        let Some(takeover) = meta.takeover else { return Ok(()) };
        let unsure = context.slot.board().unsure.is_some();
        if unsure || lock(&self.served).contains_key(name) {
            return Ok(());
        }
        if takeover.aborting {
            return self.undo(context, open, &takeover).await.map_err(|problem| problem.why);
        }
        let (volumes, _) =
            self.serve(context, open, &takeover, meta.epoch).await.map_err(|it| format!("{}: {}", it.what, it.why))?;
        let devices: Vec<_> = volumes.iter().filter_map(|volume| volume.device.clone()).collect();
        tracing::info!(group = name, devices = devices.join(" "), "taken over before: served again");
        Ok(())
    }

    /// Who uses its devices.
    pub fn user(&self, name: &str) -> Option<String> {
        lock(&self.served).get(name).and_then(|served| user_of_devices(&served.devices))
    }

    /// Takes the devices away; `what` is what the operator is told otherwise. Nothing is served when this returns without an
    /// error.
    ///
    /// # Errors
    /// If one is in use: all are there then. If one does not go although nobody seemed to use it: see [`State::Broken`].
    pub fn stop_serving(&self, name: &str, force: bool, what: &str) -> Result<(), Problem> {
        let mut devices = {
            let mut all = lock(&self.served);
            let Some(served) = all.get_mut(name) else { return Ok(()) };
            if served.state == State::Going {
                let next = "run the same command again in some seconds";
                return Err(Problem::refused(what, "its devices are being taken away by another command", next));
            }
            let user = user_of_devices(&served.devices).or_else(|| writer_of(&served.devices)).filter(|_| !force);
            if let Some(user) = user {
                let next = "stop what uses it and unmount it, or --force: its users then get errors";
                return Err(Problem::refused(what, format!("it is in use: {user}"), next));
            }
            served.state = State::Going;
            std::mem::take(&mut served.devices)
        };
        // Takes seconds if somebody has one open, so nobody else waits for it.
        let failed = devices.iter_mut().find_map(|device| device.detach().err()).filter(|_| !force);
        if let Some(error) = failed {
            let problem = Problem { what: what.to_owned(), ..export_problem(&error) };
            if let Some(served) = lock(&self.served).get_mut(name) {
                (served.devices, served.state) = (devices, State::Broken(problem.why.clone()));
            }
            return Err(problem);
        }
        // A device that is taken away by force goes here.
        drop(devices);
        if let Some(served) = lock(&self.served).remove(name) {
            served.writer.end();
        }
        links(&self.run_dir, name).for_each(|link| drop(std::fs::remove_file(link)));
        Ok(())
    }
}

/// A program that could write although it does not have the device for itself alone.
fn writer_of(devices: &[varve_export::device::Attached]) -> Option<String> {
    let of = |device: &varve_export::device::Attached| {
        let who = writers(device.path()).into_iter().next()?;
        Some(format!("{who} has {} open for writing", device.path().display()))
    };
    devices.iter().find_map(of)
}
