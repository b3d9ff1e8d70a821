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

/// Adds a connection; `None` if there are already `limit` with this fingerprint.
pub(crate) fn add(live: &Live, entry: Entry, limit: usize) -> Option<LiveGuard> {
    let mut table = lock(live);
    if table.entries.values().filter(|e| e.fingerprint == entry.fingerprint).count() >= limit {
        return None;
    }
    let id = table.next;
    table.next += 1;
    table.entries.insert(id, entry);
    Some(LiveGuard { live: live.clone(), id })
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
