//! How many events the kernel has skipped, and when that was last looked at.
//!
//! A skipped event is a write that is not in the stream, and this counter alone says so. So the look has a thread of its own,
//! which waits for nothing that can take long: no start or end of a group, no disk. And it has a date: where the last look is
//! too long ago, nobody knows whether the stream is whole, and nothing may be said that depends on it.
//!
//! A look is a handful of system calls of about a microsecond, four times a second.

use crate::clock;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;
use varve_bpf::CaptureError;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// From this age on the last look says nothing.
const AGE_NS_MAX: u64 = 3_000_000_000;

/// Gives the count; `None`: nothing is captured any more.
type Look = Box<dyn Fn() -> Option<Result<u64, CaptureError>> + Send>;

/// See the module's text.
#[derive(Default)]
pub struct Misses {
    count: AtomicU64,
    /// When the last look began, by the boot-time clock; 0: never.
    looked_ns: AtomicU64,
    /// Held while it is looked: nothing of an earlier capture comes after what a later one said.
    look: Mutex<Option<Look>>,
}

impl Misses {
    /// Looks from now on, until nobody has it any more.
    pub fn start() -> std::io::Result<Arc<Self>> {
        let misses = Arc::new(Self::default());
        let watched = Arc::downgrade(&misses);
        std::thread::Builder::new().name("misses".to_owned()).spawn(move || watch(&watched))?;
        Ok(misses)
    }

    /// Has `look` looked with; the first time before this returns: what a worker compares the count with may be from an agent
    /// before.
    pub fn watch(&self, look: impl Fn() -> Option<Result<u64, CaptureError>> + Send + 'static) {
        *self.look.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(look));
        if let Some(Err(error)) = self.look() {
            tell(&error);
        }
    }

    /// Looks now. `None`: nothing is captured.
    pub fn look(&self) -> Option<Result<(), CaptureError>> {
        self.look_since(u64::MAX)
    }

    /// Looks now, unless a look began after `since_ns` by the boot-time clock: those who wait for each other share one.
    pub fn look_since(&self, since_ns: u64) -> Option<Result<(), CaptureError>> {
        let mut look = self.look.lock().unwrap_or_else(PoisonError::into_inner);
        if self.looked_ns() > since_ns {
            return Some(Ok(()));
        }
        let began_ns = clock::boot_ns();
        match look.as_ref()?() {
            Some(outcome) => Some(outcome.map(|count| self.note(began_ns, count + pretended()))),
            None => {
                *look = None;
                None
            }
        }
    }

    /// So many there were when a look that began then ended.
    pub fn note(&self, began_ns: u64, count: u64) {
        // The count first: whoever sees the date sees it, too.
        self.count.store(count, Ordering::Release);
        self.looked_ns.store(began_ns, Ordering::Release);
    }

    /// How many there were at the last look.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// When the last look began, by the boot-time clock. Read before [`Misses::count`], it is not newer than that.
    pub fn looked_ns(&self) -> u64 {
        self.looked_ns.load(Ordering::Acquire)
    }

    /// Whether it is not known any more how many there are.
    pub fn are_unknown(&self) -> bool {
        clock::boot_ns().saturating_sub(self.looked_ns()) > AGE_NS_MAX
    }
}

/// No kernel skips an event because a test wants it to. So an agent that was started with `VARVE_MISSED=FILE` counts as many
/// more as the number in that file; compiled in always, as the receiver's failpoints are, and inert without the variable.
fn pretended() -> u64 {
    static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
    FILE.get_or_init(|| std::env::var_os("VARVE_MISSED").map(PathBuf::from)).as_deref().map_or(0, number_in)
}

fn number_in(file: &Path) -> u64 {
    std::fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

fn tell(error: &CaptureError) {
    tracing::error!(%error, "cannot read how many events the kernel skipped");
}

fn watch(misses: &Weak<Misses>) {
    let mut failed = false;
    loop {
        std::thread::sleep(LOOK_EVERY);
        let Some(misses) = misses.upgrade() else { return };
        match misses.look() {
            Some(Err(error)) if !std::mem::replace(&mut failed, true) => tell(&error),
            Some(Err(_)) => {}
            _ => failed = false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_look_says_nothing() {
        let misses = Misses::default();
        assert!(misses.are_unknown(), "never looked");
        misses.watch(|| Some(Ok(7)));
        assert!(misses.count() == 7 && !misses.are_unknown(), "at once");
        misses.note(clock::boot_ns() - AGE_NS_MAX - 1, 7);
        assert!(misses.are_unknown());
        assert_eq!(pretended(), 0, "nobody asked for it");
        misses.watch(|| None);
        assert!(misses.are_unknown() && misses.look().is_none(), "nothing is captured");
    }
}
