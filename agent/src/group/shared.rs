//! What the rest of the daemon may see of a group while its worker runs.

use super::cut::oldest_write_ns;
use super::source::{Source, Troubles};
use crate::clock;
use crate::journal::Journal;
use crate::quiesce::Shown;
use crate::store::Fence;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use varve_common::control::{
    AuthorityStatus, GapStatus, GroupStatus, ResyncStatus, RingStatus, VolumeStatus, Window, show_position, show_time,
};
use varve_common::limits::REGION_BYTES;
use varve_common::state::{Data, DataFacts, GapReason, Link, Role};
use varve_common::wire::messages::{Incarnation, RefusedReason, Verify};

/// Times that the clock was set back that are remembered: more at once only make ages too small.
const SETBACKS_MAX: usize = 64;
/// Gaps that are remembered for status.
const GAPS_MAX: usize = 32;

/// Why nothing is called good although nothing is known to be wrong.
pub const MISSES_UNKNOWN: &str =
    "whether the kernel has skipped writes is not known at the moment: it was not looked for some seconds";

/// Facts that the worker writes and status reads.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The axis of the connection.
    pub link: Link,
    /// Why the link is not streaming, in words.
    pub link_reason: Option<String>,
    /// The word with which the receiver refused the last session, unless there was another one since.
    pub refused: Option<RefusedReason>,
    /// What keeps the volume from being read, in words.
    pub read_error: Option<String>,
    /// See [`super::gap::GapState::open`].
    pub gap: Option<GapReason>,
    /// When it began, by the stream's clock. `None`: before this process, nobody knows when.
    pub gap_since_ns: Option<u64>,
    /// See [`DataFacts::ever_consistent`].
    pub ever_consistent: bool,
    /// Regions that a sync began with.
    pub sync_total: u64,
    /// Regions dirty or in hand at the last look.
    pub sync_left: u64,
    /// The newest verify.
    pub verify: Option<Verify>,
    /// Where the replicas are.
    pub replicas: Vec<String>,
    /// The newest gaps.
    pub gaps: Vec<GapStatus>,
    /// The receiver's epoch for this group.
    pub epoch: u64,
    /// Capture goes on without this process.
    pub pinned: bool,
    /// Where the ring came from, in words.
    pub origin: String,
    /// The receiver has said that this host may not write, and nothing to the contrary since.
    pub fenced: Option<Fence>,
    /// Its volumes are quiet for a planned switch-over.
    pub quiet: Option<Shown>,
    /// A volume has another size than it is captured in.
    pub outgrown: bool,
    /// See [`crate::misses::Misses::are_unknown`].
    pub misses_unknown: bool,
}

/// See the module's text.
pub struct GroupShared {
    /// The group's name.
    pub name: String,
    /// In the order of their numbers: path and size.
    pub volumes: Vec<(String, u64)>,
    /// Names the ring.
    pub incarnation: Incarnation,
    /// Everything before is durable at the receiver.
    pub durable: AtomicU64,
    /// Everything before is in the replica.
    pub applied: AtomicU64,
    /// Counters by name, for status and metrics.
    pub counters: Counters,
    pub(super) lagging_after: Duration,
    pub(super) source: Arc<dyn Source>,
    facts: Mutex<Facts>,
    pub(super) journal: OnceLock<Arc<Journal>>,
    /// Held while space is given back, and by others than the worker while they look at what may be given back.
    pub(super) releasing: Mutex<()>,
    /// What the stream adds to the boot-time clock.
    time_offset: AtomicU64,
    /// Where records end that are dated too late, and by how much: this host's clock was set back there.
    setbacks: Mutex<Vec<(u64, u64)>>,
    rest: Mutex<Option<Rest>>,
}

/// How a worker that has ended left its group, with nothing missing at the receiver or in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rest {
    /// Where the stream ends.
    pub end: u64,
    /// Events skipped until then.
    pub misses: u64,
    /// The other events until then.
    pub troubles: Troubles,
}

/// Counted since the daemon started; docs/json.md says what each is.
#[derive(Default)]

pub struct Counters {
    pub frames: AtomicU64,
    pub stream_bytes: AtomicU64,
    pub wire_bytes: AtomicU64,
    pub frames_compressed: AtomicU64,
    pub image_bytes: AtomicU64,
    pub probes: AtomicU64,
    pub sessions: AtomicU64,
    pub refused_sessions: AtomicU64,
    pub gaps: AtomicU64,
}

impl Counters {
    /// Adds to a counter.
    pub fn add(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }
}

impl GroupShared {
    /// A group whose worker has not begun.
    pub fn new(
        name: String,
        volumes: Vec<(String, u64)>,
        incarnation: Incarnation,
        source: Arc<dyn Source>,
        lagging_after: Duration,
        ever_consistent: bool,
    ) -> Self {
        let consumer = source.stream().consumer();
        let gap = if ever_consistent { GapReason::NewRing } else { GapReason::InitialSync };
        let kept = source.kept();
        let ever_consistent = ever_consistent || kept.as_ref().is_some_and(|kept| kept.gap.ever_consistent());
        let (gap, gap_since_ns) = kept.map_or((Some(gap), None), |kept| (kept.shown, kept.shown_since_ns));
        let facts = Facts {
            outgrown: false,
            misses_unknown: false,
            link: Link::Disconnected,
            link_reason: None,
            refused: None,
            read_error: None,
            gap,
            gap_since_ns,
            ever_consistent,
            sync_total: 0,
            sync_left: 0,
            verify: None,
            replicas: Vec::new(),
            gaps: Vec::new(),
            epoch: 1,
            pinned: false,
            origin: String::new(),
            fenced: None,
            quiet: None,
        };
        let time_offset = AtomicU64::new(source.time_offset());
        Self {
            name,
            volumes,
            incarnation,
            durable: AtomicU64::new(consumer),
            applied: AtomicU64::new(consumer),
            counters: Counters::default(),
            lagging_after,
            source,
            facts: Mutex::new(facts),
            releasing: Mutex::new(()),
            journal: OnceLock::new(),
            time_offset,
            setbacks: Mutex::default(),
            rest: Mutex::default(),
        }
    }

    /// See [`Rest`].
    pub fn rest(&self) -> MutexGuard<'_, Option<Rest>> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything before `position` is durable at the receiver: its space goes back to the kernel.
    pub fn release(&self, position: u64) {
        let _held = self.hold_ring();
        let until = self.journal().map_or(position, |journal| journal.release(position));
        if until > self.source.stream().consumer() {
            self.source.stream().release(until);
        }
        self.durable.fetch_max(position, Ordering::AcqRel);
    }

    /// See [`Source::set_time_offset`].
    pub fn set_time_offset(&self, ns: u64) {
        self.time_offset.store(ns, Ordering::Release);
    }

    /// The wall clock was set back by so much at once; records before `position` are dated by what it was.
    pub fn clock_set_back(&self, position: u64, ns: u64) {
        let mut setbacks = self.setbacks.lock().unwrap_or_else(PoisonError::into_inner);
        if setbacks.len() < SETBACKS_MAX {
            setbacks.push((position, ns));
        }
        let mut facts = self.facts();
        facts.gap_since_ns = facts.gap_since_ns.map(|since| since.saturating_sub(ns));
    }

    /// By how much the oldest record that is not durable may be dated too late.
    fn dated_late_ns(&self, durable: u64) -> u64 {
        let mut setbacks = self.setbacks.lock().unwrap_or_else(PoisonError::into_inner);
        setbacks.retain(|(position, _)| *position > durable);
        setbacks.iter().map(|(_, ns)| ns).sum()
    }

    /// The clock of the records. A wall clock that was set back is met slowly, so ages by it would be too small.
    pub fn stream_ns(&self) -> u64 {
        clock::boot_ns().saturating_add(self.time_offset.load(Ordering::Acquire))
    }

    /// The facts, locked: never hold this across an await.
    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The receiver wants the group to come home.
    pub fn is_called_home(&self) -> bool {
        self.facts().refused == Some(RefusedReason::Failback)
    }

    /// Opens a gap in the facts.
    pub fn gap_opened(&self, reason: GapReason) {
        let mut facts = self.facts();
        let now = self.stream_ns();
        if facts.gap.is_some() {
            if let Some(last) = facts.gaps.last_mut() {
                last.to.get_or_insert_with(|| show_time(now));
            }
        } else {
            facts.gap_since_ns = Some(now);
        }
        facts.gap = Some(reason);
        if facts.gaps.len() == GAPS_MAX {
            facts.gaps.remove(0);
        }
        facts.gaps.push(GapStatus { from: show_time(now), to: None, reason });
        Counters::add(&self.counters.gaps, 1);
    }

    /// Closes the gap in the facts.
    pub fn gap_closed(&self) {
        let mut facts = self.facts();
        facts.gap = None;
        facts.ever_consistent = true;
        (facts.sync_total, facts.sync_left) = (0, 0);
        let now = show_time(clock::wall_ns());
        if let Some(last) = facts.gaps.last_mut() {
            last.to.get_or_insert(now);
        }
    }

    /// RPO: age of the oldest captured write that is not durable; within a gap at least the gap's age; `None` before the
    /// first sync, when there is nothing to recover, and while it is not known (a gap from before this process; events that may
    /// have been skipped).
    pub fn rpo(&self) -> Option<Duration> {
        let facts = self.facts();
        if !facts.ever_consistent || facts.misses_unknown {
            return None;
        }
        let gap_since = match facts.gap {
            Some(_) => Some(facts.gap_since_ns?),
            None => None,
        };
        drop(facts);
        let oldest = {
            let _held = self.hold_ring();
            let durable = self.durable.load(Ordering::Acquire);
            let journaled = self.journal().and_then(|journal| journal.oldest_write_ns(durable));
            let dated = journaled.or_else(|| oldest_write_ns(self.source.stream(), durable));
            // Rather too old than too young, until all of what was dated too late is durable.
            dated.map(|ns| ns.saturating_sub(self.dated_late_ns(durable)))
        };
        let since = [oldest, gap_since].into_iter().flatten().min();
        Some(since.map_or(Duration::ZERO, |since| Duration::from_nanos(self.stream_ns().saturating_sub(since))))
    }

    /// The word of the data axis at this moment.
    pub fn data(&self) -> Data {
        let rpo = self.rpo();
        self.word(&self.facts(), rpo)
    }

    /// The word for these facts: with [`Shared::status`], one look is behind everything that one answer says.
    fn word(&self, facts: &Facts, rpo: Option<Duration>) -> Data {
        let behind = facts.link != Link::Streaming || rpo.is_none_or(|rpo| rpo > self.lagging_after);
        DataFacts {
            ever_consistent: facts.ever_consistent,
            gap: facts.gap,
            sync_running: facts.link == Link::Streaming && facts.sync_left > 0,
            behind,
            verifying: facts.verify.as_ref().is_some_and(|verify| !verify.finished),
        }
        .word()
    }

    /// Done and total bytes of a running sync.
    pub fn resync(&self) -> Option<(u64, u64)> {
        let facts = self.facts();
        let total = facts.sync_total.max(facts.sync_left);
        (facts.gap.is_some() && total > 0).then(|| ((total - facts.sync_left) * REGION_BYTES, total * REGION_BYTES))
    }

    /// Bytes captured and not durable.
    pub fn lag_bytes(&self) -> u64 {
        let detached = self.journal().map_or(0, |journal| journal.detached_bytes());
        detached + self.source.stream().producer().saturating_sub(self.durable.load(Ordering::Acquire))
    }

    /// As `varve status` shows it.
    pub fn status(&self) -> GroupStatus {
        let (rpo, resync, lag_bytes) = (self.rpo(), self.resync(), self.lag_bytes());
        // The consumer first: it never passes a producer that is read later.
        let consumer = self.source.stream().consumer();
        let producer = self.source.stream().producer();
        let durable = self.durable.load(Ordering::Acquire);
        let now = self.stream_ns();
        let facts = self.facts().clone();
        let data = self.word(&facts, rpo);
        let position = |offset| Some(show_position(&self.incarnation, offset));
        // Of what is not known there is no newest point.
        let known = rpo.filter(|_| data.is_consistent());
        let newest = known.map(|rpo| show_time(now.saturating_sub(rpo.as_nanos() as u64)));
        // What was said before a restart still holds.
        let fenced = facts.fenced.as_ref().map(|fence| format!("the receiver refuses: {}. {}", fence.text, fence.next));
        let link_reason =
            facts.link_reason.filter(|_| facts.fenced.is_none() || facts.link == Link::Refused).or(fenced);
        let unknown = facts.misses_unknown.then(|| MISSES_UNKNOWN.to_owned());
        let reason = [facts.read_error, link_reason, facts.gap.map(|gap| gap.explain().to_owned()), unknown];
        GroupStatus {
            name: self.name.clone(),
            role: match (facts.refused, &facts.fenced) {
                (Some(RefusedReason::Epoch | RefusedReason::Failback), _) | (_, Some(_)) => Role::Fenced,
                _ => Role::Source,
            },
            link: facts.link,
            data,
            reason: reason.into_iter().flatten().next(),
            gap_reason: facts.gap,
            epoch: facts.epoch,
            rpo_seconds: rpo.map(|rpo| rpo.as_secs_f64()),
            lag_bytes,
            captured: position(producer),
            durable: position(durable),
            applied: position(self.applied.load(Ordering::Acquire)),
            window: Window { from: newest.clone(), to: newest },
            history: None,
            gaps: facts.gaps,
            volumes: self
                .volumes
                .iter()
                .enumerate()
                .map(|(number, (path, bytes))| VolumeStatus {
                    path: path.clone(),
                    bytes: *bytes,
                    replica: facts.replicas.get(number).cloned(),
                })
                .collect(),
            resync: resync.map(|(done_bytes, total_bytes)| ResyncStatus { done_bytes, total_bytes }),
            verify: facts.verify,
            ring: Some(RingStatus {
                used_bytes: producer - consumer,
                total_bytes: self.source.stream().capacity(),
                pinned: facts.pinned,
                origin: facts.origin,
            }),
            journal: self.journal().map(|journal| journal.status()),
            alerts: Vec::new(),
            watch: None,
            drill: None,
            authority: authority(&self.name, facts.fenced.as_ref(), facts.quiet.as_ref()),
            counters: self.counter_table(),
        }
    }

    fn counter_table(&self) -> BTreeMap<String, u64> {
        let own = &self.counters;
        let troubles = self.source.troubles();
        let (captured_records, captured_bytes) = self.source.captured();
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (journal_bytes, journal_disk_bytes) = self.journal().map_or((0, 0), |journal| journal.spent());
        [
            ("journal_bytes", journal_bytes),
            ("journal_disk_bytes", journal_disk_bytes),
            ("captured_records", captured_records),
            ("captured_bytes", captured_bytes),
            ("dropped_records", troubles.dropped),
            ("unreadable_writes", troubles.unreadable + troubles.untracked),
            ("failed_writes", troubles.failed),
            ("straddling_writes", troubles.straddling),
            ("late_writes", troubles.late + troubles.late_unknown),
            ("passthrough_commands", troubles.passthrough),
            ("frames", value(&own.frames)),
            ("frames_compressed", value(&own.frames_compressed)),
            ("stream_bytes", value(&own.stream_bytes)),
            ("wire_bytes", value(&own.wire_bytes)),
            ("image_bytes", value(&own.image_bytes)),
            ("probes", value(&own.probes)),
            ("sessions", value(&own.sessions)),
            ("refused_sessions", value(&own.refused_sessions)),
            ("gaps", value(&own.gaps)),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }
}

/// Who may write, as far as this host knows; `None`: it may.
fn authority(group: &str, fence: Option<&Fence>, quiet: Option<&Shown>) -> Option<AuthorityStatus> {
    let held = quiet.map(|quiet| match (&quiet.problem, quiet.read_only) {
        (Some(_), _) => "not-held",
        (None, true) => "read-only",
        (None, false) => "claimed",
    });
    let problem =
        quiet.and_then(|quiet| quiet.problem.clone()).map_or(String::new(), |why| format!("; NOT quiet: {why}"));
    let (text, since, next) = match (fence, quiet) {
        (Some(fence), _) => (fence.text.clone(), fence.since.clone(), fence.next.clone()),
        (None, Some(quiet)) => (
            format!(
                "a planned switch-over made the volumes of '{group}' quiet, and what became of it is not known yet"
            ),
            quiet.since.clone(),
            format!(
                "wait for the receiver, or see 'varve status {group}' there; if it does not run there: \
                 'varve failover abort {group} --force' here"
            ),
        ),
        (None, None) => return None,
    };
    Some(AuthorityStatus {
        text: format!("{text}{problem}"),
        since: Some(since).filter(|since| !since.is_empty()),
        not_home_bytes: None,
        quiet: held.map(str::to_owned),
        unsure: fence.is_none() || fence.is_some_and(|fence| fence.text.starts_with("who is right is not known")),
        next,
    })
}
