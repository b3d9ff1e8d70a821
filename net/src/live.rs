//! Which connections are live, so that a revocation can close them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::endpoint::CloseCode;
use crate::hosts::Fingerprint;

/// One live connection of an enrolled host.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) connection: quinn::Connection,
}

/// All of them, by a number of our own.
#[derive(Debug, Default)]
pub(crate) struct LiveTable {
    next: u64,
    entries: HashMap<u64, Entry>,
}

/// Shared between the server and the guards.
pub(crate) type Live = Arc<Mutex<LiveTable>>;

/// Takes the connection out of the table, and closes it, when its owner drops it. Without this the table's own handle
/// would keep a connection open that nobody serves.
#[derive(Debug)]
pub(crate) struct LiveGuard {
    live: Live,
    id: u64,
}

fn lock(live: &Live) -> MutexGuard<'_, LiveTable> {
    live.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds a connection. If there are `limit` with this fingerprint already, the oldest one goes: an agent that is started again
/// and again leaves connections that are dead and look alive until they time out, and they must not keep it out. Two hosts
/// with one identity cannot both be right either way.
pub(crate) fn add(live: &Live, entry: Entry, limit: usize) -> LiveGuard {
    let mut table = lock(live);
    let own = table.entries.iter().filter(|(_, e)| e.fingerprint == entry.fingerprint);
    let (count, oldest) = own.fold((0, u64::MAX), |(count, oldest), (id, _)| (count + 1, oldest.min(*id)));
    if count >= limit
        && let Some(oldest) = table.entries.remove(&oldest)
    {
        tracing::info!(host = oldest.name, remote = %oldest.connection.remote_address(), "its oldest connection makes room");
        CloseCode::Busy.close(&oldest.connection);
    }
    let id = table.next;
    table.next += 1;
    table.entries.insert(id, entry);
    LiveGuard { live: live.clone(), id }
}

/// All live connections.
pub(crate) fn entries(live: &Live) -> Vec<Entry> {
    lock(live).entries.values().cloned().collect()
}

impl Drop for LiveGuard {
    fn drop(&mut self) {
        let entry = lock(&self.live).entries.remove(&self.id);
        if let Some(entry) = entry {
            CloseCode::Done.close(&entry.connection);
        }
    }
}
