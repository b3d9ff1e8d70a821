//! Named places in the durable steps where tests end the process as a crash would, or hold it. Compiled in always, so that the
//! program under test is the program; inert (one relaxed load) unless `VARVE_FAILPOINT=NAME[:COUNT]` or `VARVE_HOLD=NAME:FILE` was
//! set at start.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Before the batch is written.
pub const LAND_BEFORE: &str = "land-before";
/// When only the first half of a batch was written.
pub const LAND_TORN: &str = "land-torn";
/// After the batch was written and synced, before anybody knows.
pub const LAND_AFTER: &str = "land-after";
/// A segment was made under its temporary name.
pub const SEGMENT_MADE: &str = "segment-made";
/// A segment was put to use; nothing is in it.
pub const SEGMENT_BEGUN: &str = "segment-begun";
/// What will be replaced is known, nothing of it is durable.
pub const HISTORY_BEFORE: &str = "history-before";
/// What will be replaced is durable, or on its way to be if more follows, the replica is as it was.
pub const HISTORY_AFTER: &str = "history-after";
/// Before the replica is written.
pub const APPLY_BEFORE: &str = "apply-before";
/// Some of a batch is in the replica.
pub const APPLY_HALF: &str = "apply-half";
/// All of a batch is in the replica, not synced.
pub const APPLY_AFTER: &str = "apply-after";
/// The replicas are synced, the mark is old.
pub const MARK_BEFORE: &str = "mark-before";
/// The mark is new, nothing is recycled.
pub const MARK_AFTER: &str = "mark-after";
/// A new group's replicas exist, the group does not. To hold as well: a disk that hangs looks like it.
pub const GROUP_BEFORE: &str = "group-before";
/// A new group exists, nobody knows.
pub const GROUP_AFTER: &str = "group-after";

/// The source is quiet and everything is here, the takeover is not durable.
pub const PLANNED_QUIET: &str = "planned-quiet";

/// The volumes' new sizes are written down, the replicas have the old ones.
pub const GROWN: &str = "grown";

/// A takeover is durable, its stream has not begun.
pub const PROMOTE_MARKED: &str = "promote-marked";

/// An abort is durable, nothing was rolled back.
pub const PROMOTE_ABORTING: &str = "promote-aborting";
/// An abort has rolled back, the gap is open.
pub const PROMOTE_ROLLED: &str = "promote-rolled";

/// A takeover or an abort has rolled back and the chronicle says so; the applied mark is where the rollback began.
pub const PROMOTE_SAID: &str = "promote-said";

/// A branch is whole, it is no group yet.
pub const BRANCH_WHOLE: &str = "branch-whole";
/// A branch is a group, that it is kept is not durable.
pub const BRANCH_MADE: &str = "branch-made";

/// A place to hold: the devices are away, the agent has not been told that the group is given back.
pub const HOME_HELD: &str = "home-held";
/// A place to hold: regions are about to be compared with those at home.
pub const HOME_PASS_HELD: &str = "home-pass-held";
/// The agent captures again, the group still runs here. To hold as well.
pub const HOME_ARMED: &str = "home-armed";
/// The group is given back, its new stream has not begun.
pub const HOME_GIVEN: &str = "home-given";
/// The new stream has begun, the agent has not been told.
pub const HOME_BEGUN: &str = "home-begun";

/// A place to hold: nothing of the next batch is applied. A replica that is too slow looks like it.
pub const APPLY_HELD: &str = "apply-held";
/// A place to hold: some of a rollback is in the replicas, the rest is not.
pub const ROLLBACK_HELD: &str = "rollback-held";

/// A place to hold: some of a volume was restored.
pub const RESTORE_HELD: &str = "restore-held";

/// A place to hold: a takeover is written down, and what waits for the replicas is being read.
pub const BACKLOG_HELD: &str = "backlog-held";

/// Between two looks at whether a place is still held.
const HELD_LOOK: Duration = Duration::from_millis(5);

/// All of them that replication passes, for tests that try each.
pub const ALL: [&str; 14] = [
    LAND_BEFORE,
    LAND_TORN,
    LAND_AFTER,
    SEGMENT_MADE,
    SEGMENT_BEGUN,
    HISTORY_BEFORE,
    HISTORY_AFTER,
    APPLY_BEFORE,
    APPLY_HALF,
    APPLY_AFTER,
    MARK_BEFORE,
    MARK_AFTER,
    GROUP_BEFORE,
    GROUP_AFTER,
];

struct Armed {
    name: String,
    left: AtomicU64,
}

static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

fn armed() -> Option<&'static Armed> {
    let read = || {
        let text = std::env::var("VARVE_FAILPOINT").ok().filter(|text| !text.is_empty())?;
        let (name, count) = text.split_once(':').unwrap_or((&text, "1"));
        Some(Armed { name: name.to_owned(), left: AtomicU64::new(count.parse().unwrap_or(1)) })
    };
    ARMED.get_or_init(read).as_ref()
}

/// Whether the process is to end here, the configured number of visits having been made. For the places that must do
/// something half before.
pub fn due(name: &str) -> bool {
    armed().is_some_and(|armed| armed.name == name && armed.left.fetch_sub(1, Ordering::Relaxed) == 1)
}

/// Ends the process here if it is due.
pub fn hit(name: &str) {
    if due(name) {
        crash(name);
    }
}

static HELD: OnceLock<Option<(String, PathBuf)>> = OnceLock::new();

/// Waits here as long as this place is held and the file that was named is there; `over`: no longer, whatever the file says.
pub fn hold(name: &str, over: impl Fn() -> bool) {
    let read = || {
        let text = std::env::var("VARVE_HOLD").ok()?;
        let (name, file) = text.split_once(':')?;
        Some((name.to_owned(), PathBuf::from(file)))
    };
    let Some((held, file)) = HELD.get_or_init(read) else { return };
    let is_held = || held == name && file.exists() && !over();
    if is_held() {
        tracing::warn!(failpoint = name, "the process waits here on request");
    }
    while is_held() {
        std::thread::sleep(HELD_LOOK);
    }
}

/// Ends the process without unwinding, flushing or telling anybody.
pub fn crash(name: &str) -> ! {
    tracing::error!(failpoint = name, "the process ends here on request");
    std::process::abort();
}
