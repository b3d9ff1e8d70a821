//! All groups, and who may have a session of one.
//!
//! A group's *desk* is a lock that its session holds for as long as it lasts; everything that opens, closes or removes
//! the group takes it, too. A newcomer of the group's host asks the session to leave (its *turn* is over) and waits for
//! the desk: after a silent loss of the network the old session would otherwise sit there until its idle timeout.

use super::live::{Counters, Live};
use super::meta::{Branch, GROWTHS_MAX, GroupMeta, Held, MetaError, VolumeMeta};
use super::open::{APPLIED_NAME, HISTORY_NAME, LANDING_NAME, OpenGroup, Past};
use super::replicas;
use super::stream::Point;
use crate::apply::mark::AppliedFile;
use crate::apply::work::Queue;
use crate::clock::SourceClock;
use crate::failback::Homecoming;
use crate::failback::cutover::begin_at_home;
use crate::failpoint;
use crate::failure::{Failure, refuse, refuse_for_now};
use crate::landing::log::Log;
use crate::limits::{
    DISK_FREE_BYTES_MIN, GROUPS_MAX, INDEX_CACHE_BYTES, INDEX_FILES_OPEN_MAX, RELEASE_TIMEOUT, TAKEOVER_TIMEOUT,
};
use crate::session::hello;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{OwnedMutexGuard, mpsc, watch};
use varve_common::config::ReceiverConfig;
use varve_common::paths::Paths;
use varve_common::state::Link;
use varve_common::wire::messages::{Ask, AskReply, Hello, Refused, RefusedReason, Report};
use varve_io::{IoError, crashsafe};
use varve_timeline::cache::IndexCache;
use varve_timeline::timeline::Timeline;

/// One group, whether it exists already or somebody is about to make it.
#[derive(Debug)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// Count since the daemon started.
    pub counters: Arc<Counters>,
    /// How far its coming home is.
    pub failback: Homecoming,
    desk: Arc<tokio::sync::Mutex<Desk>>,
    /// One change of what the group is at a time.
    changing: tokio::sync::Mutex<()>,
    /// What the agent answered last to something that it was asked.
    pub heard: watch::Sender<Option<Heard>>,
    /// What is kept and what expires is decided by one at a time.
    pub keeping: Mutex<()>,
    turn: watch::Sender<u64>,
    board: Mutex<Board>,
}

/// Where a branch is made, and where it will be.
#[derive(Debug)]
pub struct BranchPlace {
    /// A directory that is no group's.
    pub making: PathBuf,
    /// The group's.
    pub dir: PathBuf,
}

/// See [`Slot::heard`].
#[derive(Clone, Debug)]
pub struct Heard {
    /// The number of the session in which it was said.
    pub session: u64,
    /// What was said.
    pub reply: AskReply,
}

/// What only the holder of the desk may touch.
#[derive(Debug, Default)]
pub struct Desk {
    /// The group, if its files are open.
    pub open: Option<OpenGroup>,
    /// Where the last session of its source left the stream; not known of one before this process.
    pub left_at: Option<Point>,
}

/// What the status shows, and what is known of the group without its desk.
#[derive(Clone, Debug)]
pub struct Board {
    /// `None` until the group exists.
    pub meta: Option<GroupMeta>,
    /// The axis of the connection.
    pub link: Link,
    /// Why the last session was refused or the group cannot be opened.
    pub refusal: Option<String>,
    /// The threads' state, if it is open.
    pub live: Option<Arc<Live>>,
    /// What waits for the applier, if it is open.
    pub queue: Option<Arc<Queue>>,
    /// The landing log, if it is open.
    pub log: Option<Arc<Log>>,
    /// What the replicas were. Stays when the group is closed: views may go on.
    pub timeline: Option<Arc<Timeline>>,
    /// What the agent said last, and when.
    pub report: Option<(Report, Instant)>,
    /// How old what is durable is.
    pub clock: SourceClock,
    /// To the session, if there is one.
    pub asks: Option<mpsc::Sender<Ask>>,
    /// What the operator should know of the history.
    pub notice: Option<String>,
    /// It runs here and a source contradicts that: who is right is not known.
    pub unsure: Option<String>,
    /// It exists, and what it is cannot be read: nobody may make it anew over what is there.
    pub unread: Option<Refused>,
}

impl Board {
    fn shut(&mut self) {
        (self.live, self.queue, self.log) = (None, None, None);
    }
}

impl Slot {
    fn new(name: &str, meta: Option<GroupMeta>) -> Self {
        let link = Link::Disconnected;
        let board = Board {
            meta,
            link,
            refusal: None,
            live: None,
            queue: None,
            log: None,
            timeline: None,
            report: None,
            clock: SourceClock::default(),
            asks: None,
            notice: None,
            unsure: None,
            unread: None,
        };
        Self {
            name: name.to_owned(),
            counters: Arc::default(),
            failback: Homecoming::default(),
            desk: Arc::default(),
            changing: tokio::sync::Mutex::default(),
            heard: watch::Sender::new(None),
            keeping: Mutex::default(),
            turn: watch::Sender::new(0),
            board: Mutex::new(board),
        }
    }

    /// The board, locked for a moment.
    pub fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_unread(&self, why: &Refused) {
        let mut board = self.board();
        (board.refusal, board.unread) = (Some(why.text.clone()), Some(why.clone()));
    }

    /// The session, if there is one, is to end.
    pub fn end_session(&self) -> u64 {
        let mut mine = 0;
        self.turn.send_modify(|turn| {
            *turn += 1;
            mine = *turn;
        });
        mine
    }
}

/// A group's desk, taken for a session.
#[derive(Debug)]
pub struct Claim {
    /// The group.
    pub slot: Arc<Slot>,
    /// Held until the session has ended.
    pub desk: OwnedMutexGuard<Desk>,
    /// Changes when the session is to end.
    pub turn: watch::Receiver<u64>,
    /// What the group is.
    pub meta: GroupMeta,
    /// Whether the daemon stops.
    pub stopping: Arc<AtomicBool>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Registry {
    paths: Paths,
    config: ReceiverConfig,
    slots: Mutex<BTreeMap<String, Arc<Slot>>>,
    /// One group is made at a time: two must not choose the same replica.
    making: tokio::sync::Mutex<()>,
    stopping: Arc<AtomicBool>,
    /// Of all timelines.
    index_cache: Arc<IndexCache>,
}

impl Registry {
    /// Finds all groups. One whose file cannot be read, or is not understood, is named and left alone.
    pub fn load(paths: Paths, config: ReceiverConfig) -> Result<Self, IoError> {
        let dir = groups_dir(&paths);
        crashsafe::create_dir_all_durable(&dir)?;
        let fail = |e| IoError::new("list", &dir, e);
        let mut slots = BTreeMap::new();
        for entry in std::fs::read_dir(&dir).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            if is_half_made(&path) {
                // Whoever keeps a branch begins anew.
                std::fs::remove_dir_all(&path).map_err(|e| IoError::new("remove", &path, e))?;
                continue;
            }
            match GroupMeta::load(&path) {
                Ok(Some(meta)) => {
                    slots.insert(meta.name.clone(), Arc::new(Slot::new(&meta.name.clone(), Some(meta))));
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(group = %path.display(), %error, "this group cannot be used");
                    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    let slot = Slot::new(&name, None);
                    slot.note_unread(&unread(&path, &error));
                    slots.insert(name, Arc::new(slot));
                }
            }
        }
        let (slots, making, stopping) = (Mutex::new(slots), tokio::sync::Mutex::new(()), Arc::default());
        let index_cache = Arc::new(IndexCache::new(INDEX_CACHE_BYTES, INDEX_FILES_OPEN_MAX));
        Ok(Self { paths, config, slots, making, stopping, index_cache })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All groups that exist, by name.
    pub fn groups(&self) -> Vec<Arc<Slot>> {
        self.lock().values().filter(|slot| slot.board().meta.is_some()).cloned().collect()
    }

    /// As [`Registry::groups`], and those of which nothing is known but that they are there.
    pub fn all(&self) -> Vec<Arc<Slot>> {
        let is_there = |board: &Board| board.meta.is_some() || board.unread.is_some();
        self.lock().values().filter(|slot| is_there(&slot.board())).cloned().collect()
    }

    /// Why nothing can be done with the group of this name, if it is there and cannot be read.
    pub fn unread(&self, name: &str) -> Option<Refused> {
        self.lock().get(name).and_then(|slot| slot.board().unread.clone())
    }

    /// The group of this name, if it exists.
    pub fn group(&self, name: &str) -> Option<Arc<Slot>> {
        self.lock().get(name).filter(|slot| slot.board().meta.is_some()).cloned()
    }

    /// Whether the daemon stops.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Opens every group, so that what is landed is applied without waiting for an agent.
    pub async fn open_all(self: &Arc<Self>) {
        for slot in self.groups() {
            let registry = self.clone();
            tokio::spawn(async move {
                let mut desk = slot.desk.clone().lock_owned().await;
                let meta = slot.board().meta.clone();
                if let (Some(meta), false) = (meta, registry.is_stopping())
                    && let Err(refused) = registry.ensure_open(&slot, &mut desk, &meta).await
                {
                    tracing::error!(group = slot.name, why = refused.text, next = refused.next, "cannot be opened");
                }
            });
        }
    }

    /// Ends all sessions and closes all groups.
    pub async fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let slots: Vec<Arc<Slot>> = self.lock().values().cloned().collect();
        for slot in &slots {
            slot.end_session();
        }
        for slot in slots {
            let mut desk = slot.desk.lock().await;
            close(&slot, &mut desk).await;
        }
    }

    /// Gives `host` the desk of the group that it asks for, with the group open. Makes the group if it is new.
    pub async fn claim(self: &Arc<Self>, host: &str, hello: &Hello) -> Result<Claim, Refused> {
        hello::check(hello)?;
        let slot = self.slot_for(hello)?;
        let result = self.claim_slot(&slot, host, hello).await;
        if result.is_err() {
            let mut slots = self.lock();
            // Nobody else waits for it and it never came to be.
            let nothing = slot.board().meta.is_none() && slot.board().unread.is_none();
            if nothing && Arc::strong_count(&slot) <= 2 {
                slots.remove(&slot.name);
            }
        }
        result
    }

    async fn claim_slot(self: &Arc<Self>, slot: &Arc<Slot>, host: &str, hello: &Hello) -> Result<Claim, Refused> {
        check_owner(slot, host)?;
        let mine = slot.end_session();
        let turn = slot.turn.subscribe();
        let busy = |text: &str| refuse_for_now(RefusedReason::Busy, text, "it is tried again by itself");
        let desk = tokio::time::timeout(TAKEOVER_TIMEOUT, slot.desk.clone().lock_owned()).await;
        let mut desk = desk.map_err(|_| busy("another session of this group does not end"))?;
        if *turn.borrow() != mine {
            return Err(busy("a newer session of this group was opened"));
        }
        if self.is_stopping() {
            return Err(Failure::stopping().refused());
        }
        // Who waited for the desk may have waited while the group was forgotten: then this slot is nobody's any more.
        if !self.lock().get(&slot.name).is_some_and(|now| Arc::ptr_eq(now, slot)) {
            return Err(busy("the group was forgotten a moment ago"));
        }
        self.read_again(slot).await?;
        // Again: another host may have made the group meanwhile.
        check_owner(slot, host)?;
        let known = slot.board().meta.clone();
        let mut meta = match known {
            Some(meta) => meta,
            None => self.make(slot, host, hello).await?,
        };
        slot.failback.call_home(&meta, hello)?;
        if let Some(text) = hello::unsure(&meta, hello)
            && slot.board().unsure.replace(text.clone()).is_none()
        {
            tracing::error!(group = slot.name, host, "{text}; its devices go away as soon as nobody uses them");
        }
        hello::check_against(&meta, hello, &self.config.name)?;
        check_held(&meta)?;
        check_space(&self.dir(&slot.name))?;
        if hello.epoch > meta.epoch {
            let raise = |meta: &mut GroupMeta| {
                meta.epoch = hello.epoch;
                meta.source_epoch_min = hello.epoch;
            };
            self.change_meta(slot, raise).await?;
            meta = slot.board().meta.clone().ok_or_else(|| storage("the group is gone"))?;
        }
        self.ensure_open(slot, &mut desk, &meta).await?;
        if hello::grows(&meta, hello) {
            meta = self.grow(slot, &mut desk, meta, hello).await?;
        }
        if let Some(open) = &desk.open {
            begin_at_home(self, slot, open).await.map_err(|why| storage(&why))?;
        }
        Ok(Claim { slot: slot.clone(), desk, turn, meta, stopping: self.stopping.clone() })
    }

    /// What the group is could not be read; perhaps it can be now.
    async fn read_again(&self, slot: &Slot) -> Result<(), Refused> {
        if slot.board().unread.is_none() {
            return Ok(());
        }
        let dir = self.dir(&slot.name);
        let read = tokio::task::spawn_blocking(move || GroupMeta::load(&dir).map_err(|e| unread(&dir, &e))).await;
        match read.map_err(|e| storage(&e.to_string()))? {
            Ok(meta) => {
                let mut board = slot.board();
                (board.meta, board.refusal, board.unread) = (meta, None, None);
                Ok(())
            }
            Err(why) => {
                slot.note_unread(&why);
                Err(why)
            }
        }
    }

    /// The volumes grew. In a gap the replicas and the timeline follow; before it they have the old size still, and the
    /// session ends when the gap begins ([`crate::session::intake::Rules::grows`]).
    async fn grow(
        &self,
        slot: &Arc<Slot>,
        desk: &mut Desk,
        mut meta: GroupMeta,
        hello: &Hello,
    ) -> Result<GroupMeta, Refused> {
        let Some(open) = &desk.open else { return Ok(meta) };
        let landed = open.live.view().landed;
        if landed.gap.is_none() {
            return Ok(meta);
        }
        let oldest = open.timeline.begin().unwrap_or(0);
        for (volume, theirs) in meta.volumes.iter_mut().zip(&hello.volumes).filter(|(a, b)| a.bytes < b.bytes) {
            replicas::check_room(volume, theirs.bytes)?;
            let (path, from) = (theirs.path.clone(), volume.bytes);
            if !volume.grow(theirs.bytes, landed.height, oldest) {
                let text = format!("{path} has grown {GROWTHS_MAX} times within this history");
                return Err(refuse(RefusedReason::Volumes, text, "a shorter retention forgets the older sizes"));
            }
            tracing::info!(group = slot.name, from, to = volume.bytes, "{path} grew, its replica follows");
        }
        close(slot, desk).await;
        // The sizes first: a replica that is smaller than its volume and was not always so is extended when it is opened.
        let volumes = meta.volumes.clone();
        self.change_meta(slot, |meta| meta.volumes = volumes).await?;
        failpoint::hit(failpoint::GROWN);
        self.ensure_open(slot, desk, &meta).await?;
        Ok(meta)
    }

    fn slot_for(&self, hello: &Hello) -> Result<Arc<Slot>, Refused> {
        let mut slots = self.lock();
        if let Some(slot) = slots.get(&hello.group) {
            return Ok(slot.clone());
        }
        if slots.len() >= GROUPS_MAX {
            let text = format!("this receiver has {GROUPS_MAX} groups already");
            return Err(refuse(RefusedReason::Limit, text, "'varve forget GROUP' on the receiver makes room"));
        }
        let slot = Arc::new(Slot::new(&hello.group, None));
        slots.insert(hello.group.clone(), slot.clone());
        Ok(slot)
    }

    fn dir(&self, group: &str) -> PathBuf {
        self.paths.receiver_group(group)
    }

    /// Where this installation lies.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Where all groups are.
    pub fn groups_dir(&self) -> PathBuf {
        groups_dir(&self.paths)
    }

    /// Ends the group's session and keeps every other one off until [`Registry::release`]; durable on return. Gives the desk,
    /// with the group open.
    pub async fn hold(&self, slot: &Arc<Slot>, held: Held) -> Result<OwnedMutexGuard<Desk>, Refused> {
        let mut desk = self.take_desk(slot).await?;
        // What is written to its devices continues another stream than the one that the holder is about to begin.
        if slot.board().meta.as_ref().is_some_and(|meta| meta.takeover.is_some()) {
            let next = format!("'varve status {}' says what goes on", slot.name);
            return Err(refuse(
                RefusedReason::Epoch,
                "it runs here: what is written to its devices would be lost",
                next,
            ));
        }
        self.change_meta(slot, |meta| meta.held = Some(held)).await?;
        let meta = slot.board().meta.clone().ok_or_else(|| storage("the group is gone"))?;
        self.ensure_open(slot, &mut desk, &meta).await?;
        Ok(desk)
    }

    /// Ends the group's session and gives the desk, with the group open.
    pub async fn seize(&self, slot: &Arc<Slot>) -> Result<OwnedMutexGuard<Desk>, Refused> {
        let mut desk = self.take_desk(slot).await?;
        let meta = slot.board().meta.clone().ok_or_else(|| storage("the group is gone"))?;
        self.ensure_open(slot, &mut desk, &meta).await?;
        Ok(desk)
    }

    /// Sources may write again.
    pub async fn release(&self, slot: &Arc<Slot>) -> Result<(), Refused> {
        // A rollback that is under way has the desk; a source that asks in vain has it for a moment.
        let desk = tokio::time::timeout(RELEASE_TIMEOUT, slot.desk.lock()).await;
        let _desk = desk.map_err(|_| {
            refuse_for_now(RefusedReason::Busy, "the rollback has not finished", "wait for it, then say it again")
        })?;
        self.change_meta(slot, |meta| meta.held = None).await
    }

    /// Ends the session, if there is one, and takes the desk.
    async fn take_desk(&self, slot: &Arc<Slot>) -> Result<OwnedMutexGuard<Desk>, Refused> {
        slot.end_session();
        let desk = tokio::time::timeout(TAKEOVER_TIMEOUT, slot.desk.clone().lock_owned()).await;
        let busy = "its session does not end";
        desk.map_err(|_| refuse_for_now(RefusedReason::Busy, busy, "see the receiver's log"))
    }

    /// Changes what a group is, while it may have a session; durable on return.
    pub async fn change_meta(&self, slot: &Arc<Slot>, change: impl FnOnce(&mut GroupMeta)) -> Result<(), Refused> {
        // Two changes at once would lose one. Groups do not wait for each other: a new one's replica may lie on a disk that hangs.
        let _one_at_a_time = slot.changing.lock().await;
        let old = slot.board().meta.clone().ok_or_else(|| storage("the group is gone"))?;
        let mut meta = old.clone();
        change(&mut meta);
        let dir = self.dir(&slot.name);
        if let Err(error) = meta.save(&dir) {
            // It may have its name and only that is not certain to last: the next start must not find what was refused now.
            if let Err(again) = old.save(&dir) {
                let text = "a change that was refused may be found at the next start";
                tracing::error!(group = slot.name, error = %again, "{text}");
            }
            return Err(storage(&error.to_string()));
        }
        slot.board().meta = Some(meta);
        Ok(())
    }

    /// Where everything of a group is.
    pub fn group_dir(&self, group: &str) -> PathBuf {
        self.dir(group)
    }

    /// The configuration.
    pub fn config(&self) -> &ReceiverConfig {
        &self.config
    }

    /// Of all timelines.
    pub fn index_cache(&self) -> Arc<IndexCache> {
        self.index_cache.clone()
    }

    /// Whether this branch exists as a group of this name.
    pub fn has_branch(&self, name: &str, of: &Branch) -> bool {
        let meta = self.group(name).and_then(|slot| slot.board().meta.clone());
        let same = |branch: &Branch| (&branch.of, &branch.takeover) == (&of.of, &of.takeover);
        meta.and_then(|meta| meta.branch).is_some_and(|branch| same(&branch))
    }

    /// Where a branch of this name can be made, if the name is free.
    pub fn place_branch(&self, name: &str) -> Result<BranchPlace, String> {
        let (making, dir) = (self.groups_dir().join(format!(".{name}.branch")), self.dir(name));
        if self.lock().contains_key(name) || dir.exists() {
            return Err(format!("there is a group '{name}' already, or what was left of one in {}", dir.display()));
        }
        if self.lock().len() >= GROUPS_MAX {
            return Err(format!("this receiver has {GROUPS_MAX} groups already"));
        }
        Ok(BranchPlace { making, dir })
    }

    /// A branch that is whole becomes a group.
    pub async fn adopt_branch(self: &Arc<Self>, place: BranchPlace, mut meta: GroupMeta) -> Result<(), String> {
        let _one_at_a_time = self.making.lock().await;
        for volume in &mut meta.volumes {
            if let Some(file) = volume.replica.file_name() {
                volume.replica = place.dir.join(file);
            }
        }
        if self.lock().contains_key(&meta.name) || place.dir.exists() {
            return Err(format!("a group '{}' was made meanwhile", meta.name));
        }
        let at = |e| IoError::new("rename", &place.making, e).chain();
        std::fs::rename(&place.making, &place.dir).map_err(at)?;
        crashsafe::fsync_dir(self.groups_dir()).map_err(|e| e.chain())?;
        meta.save(&place.dir).map_err(|e| e.to_string())?;
        let name = meta.name.clone();
        self.lock().insert(name.clone(), Arc::new(Slot::new(&name, Some(meta.clone()))));
        if let Some(slot) = self.group(&name) {
            let mut desk = slot.desk.clone().lock_owned().await;
            self.ensure_open(&slot, &mut desk, &meta).await.map_err(|refused| refused.text)?;
        }
        Ok(())
    }

    /// Makes a new group: directory, replicas, mark, and last `group.json`, which makes it exist.
    async fn make(self: &Arc<Self>, slot: &Arc<Slot>, host: &str, hello: &Hello) -> Result<GroupMeta, Refused> {
        let _one_at_a_time = self.making.lock().await;
        let owned = |slot: &&Arc<Slot>| slot.board().meta.as_ref().is_some_and(|meta| meta.owner == host);
        if self.groups().iter().filter(owned).count() >= varve_common::limits::GROUPS_MAX {
            let text = format!("the host '{host}' has {} groups already", varve_common::limits::GROUPS_MAX);
            return Err(refuse(RefusedReason::Limit, text, "'varve forget GROUP' on the receiver makes room"));
        }
        let taken: Vec<(String, PathBuf)> = self
            .groups()
            .iter()
            .filter_map(|slot| slot.board().meta.clone())
            .flat_map(|meta| meta.volumes.into_iter().map(move |volume| (meta.name.clone(), volume.replica)))
            .collect();
        let (paths, dir) = (self.paths.clone(), self.dir(&slot.name));
        let (host, hello) = (host.to_owned(), hello.clone());
        let made = tokio::task::spawn_blocking(move || make_group(&paths, &dir, &host, &hello, &taken)).await;
        let meta = made.map_err(|e| storage(&e.to_string()))??;
        tracing::info!(group = meta.name, owner = meta.owner, volumes = meta.volumes.len(), "a new group");
        slot.board().meta = Some(meta.clone());
        Ok(meta)
    }

    /// Opens the group's files unless they are open and well. A group that failed is closed first.
    async fn ensure_open(&self, slot: &Arc<Slot>, desk: &mut Desk, meta: &GroupMeta) -> Result<(), Refused> {
        let well = desk.open.as_ref().is_some_and(|open| open.live.failure().is_none());
        if well {
            return Ok(());
        }
        close(slot, desk).await;
        let (dir, meta, config) = (self.dir(&slot.name), meta.clone(), self.config.clone());
        let counters = slot.counters.clone();
        let known = slot.board().timeline.clone();
        let past = known.map_or_else(|| Past::Closed(self.index_cache.clone()), Past::Open);
        let work = move || OpenGroup::open(&dir, &meta, &config, &counters, past);
        let opened = tokio::task::spawn_blocking(work).await.map_err(|e| storage(&e.to_string())).and_then(|open| open);
        let mut board = slot.board();
        match opened {
            Ok(open) => {
                board.live = Some(open.live.clone());
                board.queue = Some(open.queue.clone());
                board.log = Some(open.log.clone());
                board.timeline = Some(open.timeline.clone());
                board.refusal = None;
                drop(board);
                desk.open = Some(open);
                Ok(())
            }
            Err(refused) => {
                board.refusal = Some(refused.text.clone());
                Err(refused)
            }
        }
    }

    /// Removes everything of a group but its replicas; gives where they are.
    pub async fn forget(&self, slot: &Arc<Slot>) -> Result<Vec<PathBuf>, ForgetError> {
        let mut desk = slot.desk.try_lock().map_err(|_| ForgetError::InUse)?;
        // The replicas stay and may be another group's in a moment: nobody may go on reading a point from them.
        let timeline = slot.board().timeline.clone();
        if timeline.as_ref().is_some_and(|timeline| !timeline.retire()) {
            return Err(ForgetError::Read);
        }
        close(slot, &mut desk).await;
        let dir = self.dir(&slot.name);
        let removed = tokio::task::spawn_blocking(move || remove_group(&dir)).await;
        let removed = removed.map_err(|e| e.to_string()).and_then(|removed| removed.map_err(|e| e.chain()));
        if let Err(why) = removed {
            timeline.inspect(|timeline| timeline.revive());
            return Err(ForgetError::Failed(why));
        }
        self.lock().remove(&slot.name);
        let mut board = slot.board();
        board.timeline = None;
        let meta = board.meta.take();
        Ok(meta.map(|meta| meta.volumes.into_iter().map(|volume| volume.replica).collect()).unwrap_or_default())
    }
}

/// Why a group was not forgotten.
#[derive(Debug)]
pub enum ForgetError {
    /// A session is open.
    InUse,
    /// Somebody reads a point of it: a restore, or a view that is being opened.
    Read,
    /// It was tried.
    Failed(String),
}

/// A branch that was not whole when the daemon ended: no group's name begins with a dot.
fn is_half_made(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with('.') && name.ends_with(".branch")
}

fn groups_dir(paths: &Paths) -> PathBuf {
    paths.receiver_state().join("groups")
}

async fn close(slot: &Slot, desk: &mut Desk) {
    slot.board().shut();
    if let Some(open) = desk.open.take() {
        // It waits for writes and syncs. It can only fail by a panic, which the threads' own end has told already.
        let _ = tokio::task::spawn_blocking(move || open.close()).await;
    }
}

fn storage(text: &str) -> Refused {
    refuse_for_now(RefusedReason::Storage, text, "see the receiver's log")
}

/// A group that is there and may be as good as ever is never taken for a new one.
fn unread(dir: &Path, error: &MetaError) -> Refused {
    let next = format!(
        "start the version of Varve that wrote it, or mend its disk; to begin anew move {} away on the receiver",
        dir.display()
    );
    refuse_for_now(RefusedReason::Storage, format!("the group cannot be used: {error}"), next)
}

fn check_owner(slot: &Slot, host: &str) -> Result<(), Refused> {
    match &slot.board().meta {
        Some(meta) if meta.owner != host => Err(refuse(
            RefusedReason::Owner,
            format!("the group '{}' belongs to the host '{}', this is '{host}'", slot.name, meta.owner),
            "protect under another name, or 'varve forget' the group on the receiver if the other host is gone",
        )),
        _ => Ok(()),
    }
}

fn check_held(meta: &GroupMeta) -> Result<(), Refused> {
    let Some(held) = &meta.held else { return Ok(()) };
    let text = format!("the replicas of '{}' were rolled back to {} and wait", meta.name, held.to);
    let next = format!("on the receiver: 'varve rollback {} --release' lets replication go on", meta.name);
    Err(refuse_for_now(RefusedReason::Held, text, next))
}

/// A session on a disk that is about to be full would end at once.
fn check_space(dir: &Path) -> Result<(), Refused> {
    let space = crate::keeper::free_space(dir);
    let (free, floor) = space.ok_or_else(|| storage(&format!("{} cannot be looked at", dir.display())))?;
    let least = (floor / 2).max(DISK_FREE_BYTES_MIN);
    if free < least {
        let text = format!("the receiver has {free} bytes free at {}, it needs {least}", dir.display());
        return Err(refuse_for_now(RefusedReason::DiskFull, text, "free space there; it is tried again by itself"));
    }
    Ok(())
}

fn make_group(
    paths: &Paths,
    dir: &Path,
    host: &str,
    hello: &Hello,
    taken: &[(String, PathBuf)],
) -> Result<GroupMeta, Refused> {
    hello::check_first(hello)?;
    let io = |e: IoError| Failure::io("the group's directory", &e).refused();
    let mut volumes: Vec<VolumeMeta> = Vec::with_capacity(hello.volumes.len());
    for (number, volume) in hello.volumes.iter().enumerate() {
        let replica = replicas::place(paths, dir, number, volume.replica.as_deref())?;
        let own = volumes.iter().map(|volume| (&hello.group, &volume.replica));
        let other = taken
            .iter()
            .map(|(group, replica)| (group, replica))
            .chain(own)
            .find(|(_, path)| replicas::same(path, &replica));
        if let Some((group, path)) = other {
            let text = format!("{} is already a replica of the group '{group}'", path.display());
            return Err(refuse(RefusedReason::Replica, text, "choose another replica"));
        }
        volumes.push(VolumeMeta::new(volume.path.clone(), volume.bytes, replica));
    }
    crashsafe::create_dir_all_durable(dir).map_err(io)?;
    // What is cleared away below is only what is nobody's.
    let path = dir.join(super::meta::FILE_NAME);
    if path.symlink_metadata().is_ok() {
        let text = format!("{} is there, and no group of that name was known", path.display());
        return Err(refuse_for_now(
            RefusedReason::Storage,
            text,
            "start varve-receiver again; its log says what it is",
        ));
    }
    check_space(dir)?;
    volumes.iter().try_for_each(replicas::prepare)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let meta = GroupMeta::new(&hello.group, host, hello.epoch, now.as_nanos() as u64, volumes);
    // What a group of this name left behind when it was half made or half forgotten.
    remove_group(dir).map_err(io)?;
    AppliedFile::create(&dir.join(APPLIED_NAME), meta.id()).map_err(io)?;
    failpoint::hold(failpoint::GROUP_BEFORE, || false);
    failpoint::hit(failpoint::GROUP_BEFORE);
    meta.save(dir).map_err(|e| storage(&e.to_string()))?;
    failpoint::hit(failpoint::GROUP_AFTER);
    Ok(meta)
}

/// `group.json` first: from then on the rest is nobody's.
fn remove_group(dir: &Path) -> Result<(), IoError> {
    crashsafe::remove_durable(dir.join(super::meta::FILE_NAME))?;
    crashsafe::remove_durable(dir.join(APPLIED_NAME))?;
    crashsafe::remove_durable(dir.join(crate::watch::FILE_NAME))?;
    for name in [LANDING_NAME, HISTORY_NAME] {
        let path = dir.join(name);
        match std::fs::remove_dir_all(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(IoError::new("remove", &path, e)),
            _ => {}
        }
    }
    crashsafe::fsync_dir(dir)
}
