//! What clients committed, kept outside of the database, and what a database holds of it.
//!
//! A row of table `ledger` is named by (era, client, number): an era is a stretch in which one side's database is written, a
//! client's numbers count. Its transaction also moves an account's balance, so a transaction that is there in part is found.

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use varve_tests::*;

const ACCOUNTS: u32 = 400;
const BODY_BYTES_MAX: usize = 3000;
/// Between two transactions of a client, at most: fast disks do not fill the volume.
const PAUSE_MS_MAX: u64 = 8;

/// Era, client, number.
pub type Name = (u32, u32, u64);
/// What a database holds: a digest of each row's content.
pub type Rows = BTreeMap<Name, blake3::Hash>;

pub fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64
}

#[derive(Clone, Debug)]
pub struct Commit {
    pub digest: blake3::Hash,
    /// When it was asked for, and when it was acknowledged: never, if the connection ended before.
    pub sent_ns: u64,
    pub acked_ns: Option<u64>,
}

/// The tables, in a new database.
pub fn create_tables(postgres: &Postgres) {
    // Its own log must not fill the volume; many checkpoints.
    for (name, value) in [("max_wal_size", "48MB"), ("min_wal_size", "32MB"), ("checkpoint_timeout", "30s")] {
        postgres.query(&format!("ALTER SYSTEM SET {name} = '{value}'"));
    }
    postgres.query("SELECT pg_reload_conf()");
    postgres.query("CREATE EXTENSION amcheck");
    postgres.query(&format!(
        "CREATE TABLE ledger (era int, client int, number bigint, account int NOT NULL, delta int NOT NULL, body text NOT NULL,
             PRIMARY KEY (era, client, number));
         CREATE INDEX ON ledger (account); CREATE INDEX ON ledger (md5(body));
         CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL);
         INSERT INTO accounts SELECT id, 0 FROM generate_series(1, {ACCOUNTS}) AS id"
    ));
    postgres.pgbench_init(1);
}

/// As it was when it was new.
pub fn empty(postgres: &Postgres) {
    postgres.query("TRUNCATE ledger");
    postgres.query("UPDATE accounts SET balance = 0");
    postgres.query("VACUUM FULL accounts");
}

fn digest(account: u32, delta: i32, body: &str) -> blake3::Hash {
    blake3::hash(format!("{account}|{delta}|{body}").as_bytes())
}

/// Everything that a database holds; that it is whole in itself (no half of a transaction, indexes and tables agree).
#[track_caller]
pub fn read(postgres: &Postgres) -> Rows {
    let halves = postgres.query(
        "SELECT count(*) FROM accounts WHERE balance <> coalesce((SELECT sum(delta) FROM ledger WHERE account = accounts.id), 0)",
    );
    assert_eq!(halves, "0", "accounts whose balance is not the sum of their rows");
    let sums = postgres.query(
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
                (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)",
    );
    assert!(sums.split('|').all(|sum| Some(sum) == sums.split('|').next()), "pgbench's sums differ: {sums}");
    let text = postgres.query("SELECT era, client, number, account, delta, body FROM ledger");
    let row = |line: &str| {
        let fields: Vec<&str> = line.splitn(6, '|').collect();
        let name = (fields[0].parse().unwrap(), fields[1].parse().unwrap(), fields[2].parse().unwrap());
        (name, digest(fields[3].parse().unwrap(), fields[4].parse().unwrap(), fields[5]))
    };
    text.lines().map(row).collect()
}

/// Clients at work. Each ends when it is told to, or when its database goes away.
pub struct Load {
    era: u32,
    stop: Arc<AtomicBool>,
    hurry: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    commits: Arc<Mutex<BTreeMap<Name, Commit>>>,
    threads: Vec<JoinHandle<()>>,
    bench: Option<Pgbench>,
}

impl Load {
    #[track_caller]
    pub fn start(postgres: &Postgres, era: u32, clients: u32, rng: &mut StdRng) -> Self {
        let (stop, hurry) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let (acknowledged, commits) = (Arc::<AtomicU64>::default(), Arc::default());
        let start = |client: u32| {
            let client = Client {
                session: postgres.session(),
                rng: StdRng::seed_from_u64(rng.random()),
                era,
                client,
                stop: stop.clone(),
                hurry: hurry.clone(),
                acknowledged: acknowledged.clone(),
                commits: Arc::clone(&commits),
            };
            std::thread::spawn(move || client.run())
        };
        let threads = (0..clients).map(start).collect();
        let bench = Some(postgres.pgbench_paced(2, 100));
        Load { era, stop, hurry, acknowledged, commits, threads, bench }
    }

    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Acquire)
    }

    /// No pauses from now on: at every moment something was acknowledged just before.
    pub fn hurry(&self) {
        self.hurry.store(true, Ordering::Release);
    }

    /// Waits for so many more.
    #[track_caller]
    pub fn wait_more(&self, commits: u64) {
        let from = self.acknowledged();
        wait_until(Duration::from_secs(60), "commits are acknowledged", || self.acknowledged() >= from + commits);
    }

    /// Lets everyone end what he has begun.
    pub fn finish(mut self) -> Era {
        if let Some(bench) = self.bench.take() {
            bench.stop();
        }
        self.stop.store(true, Ordering::Release);
        self.gone()
    }

    /// Its database has gone.
    pub fn gone(mut self) -> Era {
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
        Era { number: self.era, commits: std::mem::take(&mut *self.commits.lock().unwrap()) }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

struct Client {
    session: Session,
    rng: StdRng,
    era: u32,
    client: u32,
    stop: Arc<AtomicBool>,
    hurry: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    commits: Arc<Mutex<BTreeMap<Name, Commit>>>,
}

impl Client {
    fn run(mut self) {
        for number in 1u64.. {
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            // Where the database begins anew with its log, now and then.
            if self.rng.random_ratio(1, 400) && self.session.execute("CHECKPOINT;").is_err() {
                return;
            }
            let mut bytes = vec![0; self.rng.random_range(8..BODY_BYTES_MAX / 2)];
            self.rng.fill_bytes(&mut bytes);
            let body: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            let (account, delta) = (self.rng.random_range(1..=ACCOUNTS), self.rng.random_range(-999..=999));
            let (era, client) = (self.era, self.client);
            let sql = format!(
                "BEGIN; UPDATE accounts SET balance = balance + {delta} WHERE id = {account}; \
                 INSERT INTO ledger VALUES ({era}, {client}, {number}, {account}, {delta}, '{body}'); COMMIT;"
            );
            let sent_ns = now_ns();
            let done = self.session.execute(&sql).is_ok();
            let acked_ns = done.then(now_ns);
            let commit = Commit { digest: digest(account, delta, &body), sent_ns, acked_ns };
            self.commits.lock().unwrap().insert((era, client, number), commit);
            if !done {
                return;
            }
            self.acknowledged.fetch_add(1, Ordering::AcqRel);
            let pause = self.rng.random_range(0..=PAUSE_MS_MAX);
            if !self.hurry.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(pause));
            }
        }
    }
}

/// What clients did in one era.
#[derive(Clone, Debug)]
pub struct Era {
    pub number: u32,
    pub commits: BTreeMap<Name, Commit>,
}

impl Era {
    pub fn acknowledged(&self) -> usize {
        self.commits.values().filter(|commit| commit.acked_ns.is_some()).count()
    }

    /// Rows of this era in a database.
    pub fn rows_in(&self, rows: &Rows) -> Rows {
        rows.iter().filter(|((era, ..), _)| *era == self.number).map(|(name, digest)| (*name, *digest)).collect()
    }

    /// All that was acknowledged is there, as it was committed; nothing is there that was never asked for.
    #[track_caller]
    pub fn assert_whole(&self, rows: &Rows, what: &str) {
        let missing = self.missing(rows);
        assert!(missing.is_empty(), "{what}: {} acknowledged commits are missing: {missing:?}", missing.len());
    }

    /// What was acknowledged and is not there. All that is there was asked for, and is what was asked for.
    #[track_caller]
    pub fn missing(&self, rows: &Rows) -> Vec<(Name, Commit)> {
        let rows = self.rows_in(rows);
        for (name, digest) in &rows {
            let commit = self.commits.get(name).unwrap_or_else(|| panic!("row {name:?} was never committed"));
            assert_eq!(commit.digest, *digest, "row {name:?} has another content than was committed");
        }
        let missing =
            self.commits.iter().filter(|(name, commit)| commit.acked_ns.is_some() && !rows.contains_key(name));
        missing.map(|(name, commit)| (*name, commit.clone())).collect()
    }

    /// A database as of a point in the middle of the era: it has all that was acknowledged before the point, nothing that was
    /// asked for after it, and what is missing is a suffix: nobody had asked for anything that is there when the first one of
    /// those that are missing was acknowledged. Gives these.
    #[track_caller]
    pub fn assert_cut_at(&self, rows: &Rows, point_ns: u64, slack_ns: u64) -> Vec<(Name, Commit)> {
        let missing = self.missing(rows);
        let first = missing.iter().filter_map(|(_, commit)| commit.acked_ns).min().unwrap_or(u64::MAX);
        assert!(
            first.saturating_add(slack_ns) > point_ns,
            "a commit that was acknowledged {} us before the point is missing",
            (point_ns - first) / 1000
        );
        for name in self.rows_in(rows).keys() {
            let sent = self.commits[name].sent_ns;
            assert!(sent <= first, "{name:?} is there, but was asked for after one that is missing was acknowledged");
            assert!(
                sent <= point_ns + slack_ns,
                "{name:?} is there, but was asked for {} ns after the point",
                sent - point_ns
            );
        }
        missing
    }

    /// From now on nobody expects what is not in `rows`: it was declared lost.
    pub fn settle(&mut self, rows: &Rows) {
        let rows = self.rows_in(rows);
        self.commits.retain(|name, _| rows.contains_key(name));
        for commit in self.commits.values_mut() {
            // Asked for and not acknowledged, but there: it has to stay.
            commit.acked_ns.get_or_insert(commit.sent_ns);
        }
    }
}

/// A database has exactly these eras.
#[track_caller]
pub fn assert_exactly(rows: &Rows, eras: &[&Era], what: &str) {
    for era in eras {
        era.assert_whole(rows, what);
    }
    let known = |name: &Name| eras.iter().any(|era| era.number == name.0);
    let strange: Vec<&Name> = rows.keys().filter(|name| !known(name)).collect();
    assert!(strange.is_empty(), "{what}: rows that do not belong here: {strange:?}");
}
