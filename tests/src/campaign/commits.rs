//! A database that commits one row after the other, and the list of what it acknowledged, which is not on its volume.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::{Mount, Postgres, Scratch};

struct Shared {
    issued: AtomicU64,
    acknowledged: AtomicU64,
    stop: AtomicBool,
    failed: Mutex<Option<String>>,
}

/// Commits 1, 2, 3, … in a thread of its own; `Drop` ends it and the database.
pub struct Commits {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
    _postgres: Postgres,
}

/// The cluster's directory on its volume.
const CLUSTER: &str = "pg";

impl Commits {
    /// Makes a database on the mounted volume and begins.
    #[track_caller]
    pub fn start(scratch: &Scratch, mount: &Mount) -> Self {
        let postgres = Postgres::create(scratch, &mount.path().join(CLUSTER));
        // Its own log must not fill the volume.
        for (name, value) in [("max_wal_size", "64MB"), ("min_wal_size", "32MB"), ("checkpoint_timeout", "30s")] {
            postgres.query(&format!("ALTER SYSTEM SET {name} = '{value}'"));
        }
        postgres.query("SELECT pg_reload_conf()");
        postgres.query("CREATE TABLE commits (n bigint PRIMARY KEY, pad text NOT NULL)");
        let shared = Arc::new(Shared {
            issued: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            failed: Mutex::new(None),
        });
        let (theirs, mut session) = (shared.clone(), postgres.session());
        let thread = std::thread::spawn(move || {
            for number in 1u64.. {
                if theirs.stop.load(Ordering::Acquire) {
                    return;
                }
                theirs.issued.store(number, Ordering::Release);
                let pad = number % 700;
                let sql = format!("INSERT INTO commits VALUES ({number}, repeat('x', {pad}));");
                if let Err(error) = session.execute(&sql) {
                    *theirs.failed.lock().unwrap() = Some(error);
                    return;
                }
                theirs.acknowledged.store(number, Ordering::Release);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Commits { shared, thread: Some(thread), _postgres: postgres }
    }

    /// The newest commit that was acknowledged. Panics if the database has failed: nothing that the product does may do that.
    #[track_caller]
    pub fn acknowledged(&self) -> u64 {
        let failed = self.shared.failed.lock().unwrap().clone();
        assert!(failed.is_none(), "the database failed on a healthy volume: {}", failed.unwrap_or_default());
        self.shared.acknowledged.load(Ordering::Acquire)
    }

    /// The newest commit that was asked for.
    pub fn issued(&self) -> u64 {
        self.shared.issued.load(Ordering::Acquire)
    }

    /// Opens the database of a volume's copy and looks: every commit up to `acknowledged` is there, none is missing in
    /// between, none is above `issued`. Gives how many there are.
    #[track_caller]
    pub fn judge(scratch: &Scratch, mount: &Mount, acknowledged: u64, issued: u64) -> u64 {
        let postgres = Postgres::open(scratch, &mount.path().join(CLUSTER));
        let row = postgres
            .query("SELECT count(*), coalesce(max(n), 0), count(*) FILTER (WHERE length(pad) <> n % 700) FROM commits");
        postgres.stop();
        let numbers: Vec<u64> = row.split('|').map(|number| number.parse().unwrap()).collect();
        let [count, newest, broken] = numbers[..] else { panic!("three numbers, not {row}") };
        assert_eq!(broken, 0, "rows are not what was committed");
        assert_eq!(count, newest, "of {newest} commits {} are missing in between", newest - count);
        assert!(newest >= acknowledged, "commit {acknowledged} was acknowledged, the newest there is {newest}");
        assert!(newest <= issued, "commit {newest} is there, and {issued} was the newest that was ever asked for");
        count
    }

    /// Whether a directory holds its cluster.
    pub fn is_in(path: &Path) -> bool {
        path.join(CLUSTER).join("PG_VERSION").exists()
    }
}

impl Drop for Commits {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
