//! What a server serves: disks by name. Shared by all listeners; changes while they run.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::{Semaphore, watch};

use super::negotiation::{Catalog, Facts};
use crate::disk::Disk;
use crate::error::{ExportError, ExportErrorKind};
use crate::limits::{DISK_BYTES_MAX, EXPORTS_MAX, NAME_BYTES_MAX, NBD_DISK_CALLS_MAX, NBD_STRING_BYTES_MAX};

/// Disks by name.
#[derive(Debug, Default)]
pub struct Exports {
    by_name: RwLock<BTreeMap<String, Export>>,
}

struct Export {
    disk: Arc<dyn Disk>,
    facts: Facts,
    calls: Arc<Semaphore>,
    /// True: connections end. Each of them holds a receiver for as long as it holds the disk.
    closing: watch::Sender<bool>,
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").field("facts", &self.facts).finish_non_exhaustive()
    }
}

/// An export that a connection uses.
pub(super) struct Opened {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) facts: Facts,
    pub(super) calls: Arc<Semaphore>,
    pub(super) closing: watch::Receiver<bool>,
}

impl Exports {
    /// None yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Serves `disk` as `name` from now on. An only export is also the default one, with the empty name.
    ///
    /// # Errors
    /// The name is empty, too long or taken; too many exports; a disk that is too large.
    pub fn add(&self, name: &str, disk: Arc<dyn Disk>, description: &str) -> Result<(), ExportError> {
        let fail =
            |kind, why: String, next: &str| Err(ExportError::new(kind, format!("cannot export {name:?}"), why, next));
        let unfit = ExportErrorKind::Unfit;
        if name.is_empty() || name.len() > NAME_BYTES_MAX || description.len() > NBD_STRING_BYTES_MAX {
            let why = format!("a name has 1 to {NAME_BYTES_MAX} bytes, a description up to {NBD_STRING_BYTES_MAX}");
            return fail(unfit, why, "choose a shorter one");
        }
        if disk.len() > DISK_BYTES_MAX {
            return fail(unfit, format!("{} bytes cannot be addressed", disk.len()), "export a smaller disk");
        }
        let mut all = self.by_name.write().unwrap_or_else(PoisonError::into_inner);
        if all.contains_key(name) {
            return fail(
                ExportErrorKind::Exists,
                "there is one of that name".to_owned(),
                "close it or choose another name",
            );
        }
        if all.len() >= EXPORTS_MAX {
            return fail(unfit, format!("there are {EXPORTS_MAX} exports"), "close one");
        }
        let facts = Facts {
            name: name.to_owned(),
            description: description.to_owned(),
            size: disk.len(),
            read_only: disk.is_read_only(),
        };
        let calls = Arc::new(Semaphore::new(NBD_DISK_CALLS_MAX));
        all.insert(name.to_owned(), Export { disk, facts, calls, closing: watch::Sender::new(false) });
        Ok(())
    }

    /// Ends the connections of an export and lets go of its disk; nobody uses it when this returns. False if there is no
    /// such export. Requests under way are finished first.
    pub async fn remove(&self, name: &str) -> bool {
        let export = self.by_name.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        let Some(export) = export else { return false };
        export.closing.send_replace(true);
        export.closing.closed().await;
        true
    }

    /// How many connections use an export; `None` if there is no such one.
    pub fn connections(&self, name: &str) -> Option<usize> {
        let all = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        all.get(name).map(|export| export.closing.receiver_count())
    }

    /// For a connection that has agreed on it.
    pub(super) fn open(&self, name: &str) -> Option<Opened> {
        let all = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        all.get(name).map(|export| Opened {
            disk: export.disk.clone(),
            facts: export.facts.clone(),
            calls: export.calls.clone(),
            closing: export.closing.subscribe(),
        })
    }
}

impl Catalog for Exports {
    fn find(&self, name: &str) -> Option<Facts> {
        let all = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        let export = match name {
            "" if all.len() == 1 => all.values().next(),
            name => all.get(name),
        };
        export.map(|export| export.facts.clone())
    }

    fn list(&self) -> Vec<Facts> {
        let all = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        all.values().map(|export| export.facts.clone()).collect()
    }
}
