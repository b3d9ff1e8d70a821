//! A production host that is played: volumes, a workload, and an agent that goes by the rules of the real one (what it
//! sends again, where it puts marks, when it sends images), with the model of all points beside it.
#![allow(clippy::await_holding_lock, reason = "one task at a time")]

use super::agent::{Agent, Got, hello};
use super::past::{Change, Kind, Past, Step, Volumes};
use super::stream::{Source, record, wire};
use super::{LIMIT, Receiver};
use quinn::SendStream;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::collections::{BTreeSet, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use varve_common::format::{Mark, MarkKind};
use varve_common::record::{RING_HEADER_BYTES, RecordHeader, RecordKind};
use varve_common::state::GapReason;
use varve_common::wire::messages::{Refused, RefusedReason};
use varve_common::wire::{Codec, Frame, FrameKind, Image};
use varve_net::identity::HostIdentity;

const REGION: u64 = 1 << 20;
pub const GROUP: &str = "db";
/// How long marks are waited for after the session has ended.
const ENDED_LIMIT: Duration = Duration::from_secs(10);
/// A frame does not reach over a greater one: the clock was set there.
const CLOCK_STEP_NS: u64 = 5_000_000_000;

pub fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64
}

/// What the reading half of a session has heard.
#[derive(Default)]
struct Heard {
    durable: AtomicU64,
    images: Mutex<HashSet<u64>>,
    ended: AtomicBool,
    refused: Mutex<Option<Refused>>,
}

/// A session.
struct Link {
    connection: quinn::Connection,
    send: SendStream,
    heard: Arc<Heard>,
    reader: tokio::task::JoinHandle<()>,
}

pub struct Host {
    pub rng: StdRng,
    pub receiver: Receiver,
    identity: Option<HostIdentity>,
    pub past: Arc<Mutex<Past>>,
    pub sizes: Vec<u64>,
    /// What the volumes hold.
    pub truth: Volumes,
    stream: usize,
    /// Where the ring ends.
    pub producer: u64,
    sent: u64,
    time_ns: u64,
    /// In the ring, not sent in this session.
    unsent: VecDeque<Step>,
    dirty: BTreeSet<(u16, u64)>,
    /// A gap is open at the source, from this position on.
    gap: Option<u64>,
    remote_consistent: bool,
    /// No mark may follow another without a record between: where the last one stands cannot be asked for then.
    marked_at: Option<u64>,
    link: Option<Link>,
    next_image: u64,
    hot: Vec<(u16, u64)>,
    jitter: bool,
    /// Largest write.
    pub write_max: u64,
    /// How many of twenty writes that could be anything are of whole blocks.
    pub whole_blocks: u32,
}

/// What the workload does next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Deed {
    Records(usize),
    OpenGap,
    CloseGap,
    NewRing,
}

impl Host {
    /// With a receiver of small layers that is not started.
    pub fn new(seed: u64, sizes: &[u64], configuration: &str) -> Self {
        Self::with(Receiver::new(), seed, sizes, configuration)
    }

    /// With all that the receiver has below `dir`.
    pub fn in_dir(dir: tempfile::TempDir, seed: u64, sizes: &[u64], configuration: &str) -> Self {
        Self::with(Receiver::in_dir(dir), seed, sizes, configuration)
    }

    fn with(receiver: Receiver, seed: u64, sizes: &[u64], configuration: &str) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let text = format!(
            "listen = \"127.0.0.1:0\"\nlanding_segment_mib = 8\nlanding_max_mib = 64\nhistory_layer_mib = 1\n{configuration}"
        );
        std::fs::write(receiver.paths.receiver_config(), text).unwrap();
        let mut truth: Volumes = sizes.iter().map(|bytes| vec![0; *bytes as usize]).collect();
        for volume in &mut truth {
            // What was there before protection: some of it zeroes.
            let len = volume.len();
            for _ in 0..8 {
                let (at, bytes) = (rng.random_range(0..len), rng.random_range(0..len / 4));
                let end = (at + bytes).min(len);
                rng.fill_bytes(&mut volume[at..end]);
            }
        }
        let mut past = Past::new(sizes);
        past.streams.push(rng.random());
        let producer = rng.random_range(0..1000u64) * 8;
        let hot = (0..12)
            .map(|_| {
                let volume = rng.random_range(0..sizes.len());
                (volume as u16, rng.random_range(0..sizes[volume] / 4096) * 4096)
            })
            .collect();
        let mut host = Self {
            rng,
            receiver,
            identity: None,
            past: Arc::new(Mutex::new(past)),
            sizes: sizes.to_vec(),
            truth,
            stream: 0,
            producer,
            sent: producer,
            // Long ago, so that ages can be asked for.
            time_ns: now_ns() - 6 * 3_600_000_000_000,
            unsent: VecDeque::new(),
            dirty: BTreeSet::new(),
            gap: Some(0),
            remote_consistent: false,
            marked_at: None,
            link: None,
            next_image: 1,
            hot,
            jitter: false,
            write_max: 1 << 20,
            whole_blocks: 0,
        };
        host.all_dirty();
        host
    }

    fn all_dirty(&mut self) {
        for (volume, bytes) in self.sizes.iter().enumerate() {
            self.dirty.extend((0..bytes.div_ceil(REGION)).map(|region| (volume as u16, region)));
        }
    }

    pub async fn enrol(&mut self) {
        self.identity = Some(self.receiver.enrol("production").await);
    }

    /// Time goes on; often not at all, sometimes for long.
    fn tick(&mut self) -> u64 {
        self.time_ns += match self.rng.random_range(0..60) {
            0 => 700_000_000,
            1..20 => 0,
            _ => self.rng.random_range(1..400_000),
        };
        self.time_ns
    }

    /// From here on the source's clock shows the real time (after a rollback, whose marks have it).
    pub fn catch_up_time(&mut self) {
        self.time_ns = self.time_ns.max(now_ns());
    }

    /// Somebody sets the source's clock.
    pub fn set_clock_by(&mut self, seconds: i64) {
        self.time_ns = self.time_ns.saturating_add_signed(seconds * 1_000_000_000);
    }

    /// Something is written (or asked for) at the source.
    fn record(&mut self) {
        let volume = self.rng.random_range(0..self.sizes.len()) as u16;
        let size = self.sizes[usize::from(volume)];
        let (unit, most) = match self.rng.random_range(0..40) {
            0..20 => (4096, 4),
            20..40 if self.whole_blocks > 0 && self.rng.random_range(0..20) < self.whole_blocks => (4096, 4),
            20..30 => (512, 24),
            30..33 => (65536, 4),
            33 => (512, 2048),
            34..36 => (1, 3000),
            _ => (512, 1),
        };
        let length = (self.rng.random_range(1..=most) * unit).min(size).min(self.write_max);
        let mut at = (volume, self.rng.random_range(0..=(size - length) / unit) * unit);
        let mut length = length;
        if self.rng.random_bool(0.35) {
            at = self.hot[self.rng.random_range(0..self.hot.len())];
            length = length.min(16384).min(self.sizes[usize::from(at.0)] - at.1);
        }
        let (volume, offset) = at;
        let size = self.sizes[usize::from(volume)];
        let mut time_ns = self.tick();
        let mut payload = Vec::new();
        let (kind, recorded) = match self.rng.random_range(0..60) {
            0 | 1 => (RecordKind::WriteZeroes, Kind::Record),
            2 | 3 => {
                let most = if self.whole_blocks > 0 { 3 } else { 64 };
                length = (length * self.rng.random_range(1..most)).min(size - offset);
                (RecordKind::Discard, Kind::Record)
            }
            4 | 5 => (RecordKind::Flush, Kind::Record),
            6 => {
                // Now and then a name that was used before.
                let name = format!("mark-{}", self.rng.random_range(0..200));
                payload = name.clone().into_bytes();
                (RecordKind::Bookmark, Kind::Bookmark(name))
            }
            7 => (RecordKind::Canary, Kind::Record),
            8..16 => {
                // The same again: nothing changes.
                let range = offset as usize..(offset + length) as usize;
                payload = self.truth[usize::from(volume)][range].to_vec();
                (RecordKind::Write, Kind::Record)
            }
            16..22 => {
                payload = vec![self.rng.random_range(0..3); length as usize];
                (RecordKind::Write, Kind::Record)
            }
            _ => {
                payload = vec![0; length as usize];
                self.rng.fill_bytes(&mut payload);
                if self.jitter {
                    // Two processors, nearly at once.
                    time_ns -= self.rng.random_range(0..300);
                }
                (RecordKind::Write, Kind::Record)
            }
        };
        // Behind what surely changes something: a point that changes nothing may be named by the one before it.
        self.jitter =
            recorded == Kind::Record && kind == RecordKind::Write && payload.len() > 64 && self.rng.random_bool(0.2);
        let changes = matches!(kind, RecordKind::Write | RecordKind::WriteZeroes | RecordKind::Discard);
        let (offset, length) = if changes { (offset, length) } else { (0, 0) };
        let mut plain = record(kind, volume, offset, length, &payload);
        let time_at = RING_HEADER_BYTES as usize + std::mem::offset_of!(RecordHeader, time_ns);
        plain[time_at..time_at + 8].copy_from_slice(&time_ns.to_le_bytes());
        let bytes = (kind == RecordKind::Write).then_some(RING_HEADER_BYTES as usize + size_of::<RecordHeader>());
        let change = changes.then_some(Change { volume, offset, length, bytes });
        if let Some(change) = &change {
            change.apply(&plain, &mut self.truth);
        }
        self.producer += plain.len() as u64;
        let step = Step { stream: self.stream, position: self.producer, time_ns, kind: recorded, plain, change };
        self.unsent.push_back(step);
    }

    /// A write that the ring had no room for.
    fn lost_write(&mut self) {
        let volume = self.rng.random_range(0..self.sizes.len());
        let size = self.sizes[volume];
        let offset = self.rng.random_range(0..size / 512) * 512;
        let length = (self.rng.random_range(1..300) * 512).min(size - offset);
        let range = offset as usize..(offset + length) as usize;
        self.rng.fill_bytes(&mut self.truth[volume][range]);
        self.dirty.extend((offset / REGION..=(offset + length - 1) / REGION).map(|region| (volume as u16, region)));
    }

    /// Whether the session still stands.
    fn alive(&mut self) -> bool {
        self.receiver.is_running() && self.link.as_ref().is_some_and(|link| !link.heard.ended.load(Ordering::Acquire))
    }

    pub fn durable(&self) -> u64 {
        self.link.as_ref().map_or(0, |link| link.heard.durable.load(Ordering::Acquire))
    }

    /// Sends bytes; false: the receiver has gone.
    async fn write(&mut self, bytes: &[u8]) -> bool {
        let Some(link) = &mut self.link else { return false };
        let heard = link.heard.clone();
        let writing = link.send.write_all(bytes);
        tokio::pin!(writing);
        let mut tick = tokio::time::interval(Duration::from_millis(10));
        let start = Instant::now();
        loop {
            tokio::select! {
                done = &mut writing => return done.is_ok(),
                _ = tick.tick() => {
                    if heard.ended.load(Ordering::Acquire) || !self.receiver.is_running() {
                        return false;
                    }
                    assert!(start.elapsed() < LIMIT, "the receiver takes nothing");
                }
            }
        }
    }

    async fn mark(&mut self, kind: MarkKind, reason: Option<GapReason>) -> bool {
        self.time_ns += 1000;
        let time_ns = self.time_ns;
        let incarnation = self.past.lock().unwrap().streams[self.stream];
        let position = self.sent;
        let mark = Mark { kind, reason, incarnation, position, time_ns, epoch: 1, height_min: 0 };
        let body = mark.encode();
        let kind = match kind {
            MarkKind::Begin => Kind::Begin,
            MarkKind::GapBegin => Kind::GapBegin,
            MarkKind::GapEnd => Kind::GapEnd(Arc::new(self.truth.clone())),
        };
        self.remote_consistent = matches!(kind, Kind::GapEnd(_));
        self.marked_at = Some(self.sent);
        self.time_ns += 1000;
        let step = Step { stream: self.stream, position, time_ns, kind, plain: Vec::new(), change: None };
        self.past.lock().unwrap().push(step);
        self.write(&wire(&Frame::plain(FrameKind::Mark, position, &body), &body)).await
    }

    /// Sends all that is in the ring, cut into frames at random, with the marks that are due.
    pub async fn pump(&mut self) -> bool {
        loop {
            if self.remote_consistent && self.gap.is_some_and(|at| self.sent >= at) {
                if !self.mark(MarkKind::GapBegin, Some(GapReason::RingFull)).await {
                    return false;
                }
                continue;
            }
            let limit = self.gap.filter(|_| self.remote_consistent);
            let wanted = match self.rng.random_range(0..10) {
                0 => 1,
                1..8 => self.rng.random_range(1000..40_000),
                _ => self.rng.random_range(40_000..400_000),
            };
            let (position, mut plain, mut steps) = (self.sent, Vec::new(), Vec::new());
            while plain.len() < wanted
                && limit.is_none_or(|limit| self.sent < limit)
                && self.unsent.front().is_some_and(|next| {
                    steps.last().is_none_or(|last: &Step| last.time_ns.abs_diff(next.time_ns) <= CLOCK_STEP_NS)
                })
                && let Some(step) = self.unsent.pop_front()
            {
                plain.extend_from_slice(&step.plain);
                self.sent = step.position;
                steps.push(step);
            }
            if steps.is_empty() {
                break;
            }
            let mut past = self.past.lock().unwrap();
            steps.into_iter().for_each(|step| past.push(step));
            drop(past);
            let bytes = self.frame(position, &plain);
            if !self.write(&bytes).await {
                return false;
            }
        }
        if self.gap.is_none() && !self.remote_consistent {
            return self.mark(MarkKind::GapEnd, None).await;
        }
        true
    }

    fn frame(&mut self, position: u64, plain: &[u8]) -> Vec<u8> {
        let mut frame = Frame::plain(FrameKind::Data, position, plain);
        if self.rng.random_bool(0.3) {
            let compressed = lz4_flex::block::compress(plain);
            if compressed.len() < plain.len() {
                frame.codec = Codec::Lz4;
                frame.body_bytes = compressed.len();
                return wire(&frame, &compressed);
            }
        }
        wire(&frame, plain)
    }

    /// Sends every dirty region as it is, and waits until all are in the replica.
    async fn send_images(&mut self) -> bool {
        let mut wanted: Vec<(u64, (u16, u64))> = Vec::new();
        for (volume, region) in self.dirty.clone() {
            let start = region * REGION;
            let end = (start + REGION).min(self.sizes[usize::from(volume)]);
            let content = self.truth[usize::from(volume)][start as usize..end as usize].to_vec();
            let mut extents: Vec<(u64, u64, Option<&[u8]>)> = Vec::new();
            let mut at = 0;
            while at < content.len() {
                let bytes = (self.rng.random_range(1..=64) * 4096).min(content.len() - at);
                let part = &content[at..at + bytes];
                let zero = part.iter().all(|byte| *byte == 0) && self.rng.random_bool(0.7);
                extents.push((start + at as u64, bytes as u64, (!zero).then_some(part)));
                at += bytes;
            }
            let mut body = Vec::new();
            Image::encode(self.next_image, volume, &extents, &mut body);
            wanted.push((self.next_image, (volume, region)));
            self.next_image += 1;
            let frame = wire(&Frame::plain(FrameKind::Image, self.sent, &body), &body);
            if !self.write(&frame).await {
                return false;
            }
        }
        let start = Instant::now();
        while !wanted.is_empty() {
            assert!(start.elapsed() < LIMIT, "images are not done:\n{}", self.receiver.log());
            let heard = self.link.as_ref().unwrap().heard.clone();
            let dirty = &mut self.dirty;
            let done = heard.images.lock().unwrap();
            wanted.retain(|(id, region)| {
                let done = done.contains(id);
                if done {
                    dirty.remove(region);
                }
                !done
            });
            drop(done);
            if !self.alive() {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        true
    }

    /// One piece of work; false: the receiver has gone.
    pub async fn deed(&mut self, deed: Deed) -> bool {
        match deed {
            Deed::Records(count) => (0..count).for_each(|_| {
                self.record();
                if self.gap.is_some() && self.rng.random_bool(0.2) {
                    self.lost_write();
                }
            }),
            Deed::OpenGap => {
                if self.marked_at.is_none_or(|at| at >= self.producer) {
                    self.record();
                }
                if self.gap.is_none() {
                    self.gap = Some(self.producer);
                    self.lost_write();
                }
            }
            Deed::CloseGap => {
                // Images are read when all before them is sent.
                if self.gap.is_some() {
                    if !(self.pump().await && self.send_images().await) {
                        return false;
                    }
                    self.gap = None;
                }
            }
            Deed::NewRing => {
                if !self.settle().await {
                    return false;
                }
                return self.new_ring().await;
            }
        }
        let going = self.pump().await;
        self.note_durable();
        going
    }

    /// A new ring: what was in the old one and not sent is only known to the volumes.
    pub async fn new_ring(&mut self) -> bool {
        self.disconnect();
        self.unsent.clear();
        let mut past = self.past.lock().unwrap();
        past.streams.push(self.rng.random());
        self.stream = past.streams.len() - 1;
        drop(past);
        self.producer = self.rng.random_range(0..1000u64) * 8;
        self.connect().await
    }

    /// What was acknowledged is a fact from here on.
    pub fn note_durable(&mut self) {
        let durable = self.durable();
        let mut past = self.past.lock().unwrap();
        let mut index = past.durable;
        while index < past.len() {
            let step = past.step(index);
            // A mark is certain when something behind it is.
            if step.stream != self.stream || !step.is_record() {
                let behind = (index + 1..past.len()).map(|next| past.step(next));
                let mut records = behind.filter(|next| next.is_record() && next.stream == self.stream);
                if records.next().is_none_or(|next| next.position > durable) {
                    break;
                }
            } else if step.position > durable {
                break;
            }
            index += 1;
        }
        past.durable = index;
    }

    /// Everything sent, durable and applied; false: the receiver has gone.
    pub async fn settle(&mut self) -> bool {
        if !self.pump().await {
            return false;
        }
        let start = Instant::now();
        loop {
            let heard = self.link.as_ref().unwrap().heard.clone();
            let durable = heard.durable.load(Ordering::Acquire);
            if durable >= self.sent {
                break;
            }
            if !self.alive() {
                return false;
            }
            assert!(start.elapsed() < LIMIT, "not durable: {durable} of {}\n{}", self.sent, self.receiver.log());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // The marks as well: the status shows what is applied.
        let mut ended_at: Option<Instant> = None;
        while self.receiver.is_running() {
            let group = tokio::task::block_in_place(|| self.receiver.try_group(GROUP));
            let there = |group: varve_common::control::GroupStatus| {
                group.applied == group.durable && group.gap_reason.is_none() == self.remote_consistent
            };
            if group.is_some_and(there) {
                let mut past = self.past.lock().unwrap();
                past.durable = past.len();
                return true;
            }
            // A disk without power: what has landed is not applied any more. A session may also end when everything is there.
            if !self.alive() && ended_at.get_or_insert_with(Instant::now).elapsed() > ENDED_LIMIT {
                return false;
            }
            assert!(start.elapsed() < LIMIT, "the mark does not arrive\n{}", self.receiver.log());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        false
    }

    pub fn disconnect(&mut self) {
        if let Some(link) = self.link.take() {
            link.reader.abort();
            link.connection.close(0u32.into(), b"");
        }
    }

    /// Opens a session and agrees with the receiver on where the stream goes on; false: the receiver has gone.
    pub async fn connect(&mut self) -> bool {
        self.disconnect();
        let address = self.receiver.try_address();
        let Some(address) = address else { return false };
        let identity = self.identity.as_ref().unwrap();
        let Ok(connection) = varve_net::endpoint::connect(identity, &address).await else { return false };
        let Some(mut agent) = Agent::try_on(connection).await else { return false };
        let (streams, oldest) = {
            let past = self.past.lock().unwrap();
            (past.streams.clone(), 0)
        };
        let source = Source {
            rng: StdRng::seed_from_u64(0),
            incarnation: streams[self.stream],
            position: self.producer,
            volumes: self.sizes.clone(),
            epoch: 1,
        };
        agent.control(FrameKind::Hello, 0, &hello(GROUP, &source, oldest)).await;
        let answer = {
            let read = agent.next();
            tokio::pin!(read);
            let mut tick = tokio::time::interval(Duration::from_millis(20));
            loop {
                tokio::select! {
                    got = &mut read => break got,
                    _ = tick.tick() => if !self.receiver.is_running() { break Got::End },
                }
            }
        };
        let welcome = match answer {
            Got::Welcome(welcome) => welcome,
            Got::End => return false,
            // Its disk has failed meanwhile.
            Got::Refused(refused) if refused.reason == RefusedReason::Storage => return false,
            other => panic!("{other:?}\n{}", self.receiver.log()),
        };
        let resume = match welcome.resume {
            Some(position) => (self.stream, position),
            None => {
                // Where the stream before ends, as the receiver shows it.
                let Some(group) = self.receiver.try_group(GROUP) else { return false };
                let durable = group.durable.unwrap_or_default();
                let (name, position) = durable.split_once(':').unwrap_or(("", "0"));
                let stream =
                    (0..streams.len()).find(|n| !name.is_empty() && super::past::hex(&streams[*n]).starts_with(name));
                (stream.unwrap_or(usize::MAX), position.parse().unwrap())
            }
        };
        self.take_back(resume, welcome.consistent);
        let heard = Arc::new(Heard::default());
        heard.durable.store(welcome.resume.unwrap_or(0), Ordering::Release);
        let connection = agent.connection.clone();
        let (send, mut agent) = agent.split().await;
        let hears = heard.clone();
        let reader = tokio::spawn(async move {
            loop {
                match agent.next_ever().await {
                    Got::Ack(ack) => {
                        hears.durable.store(ack.durable, Ordering::Release);
                    }
                    Got::ImageDone(done) => drop(hears.images.lock().unwrap().insert(done.id)),
                    Got::Refused(refused) => *hears.refused.lock().unwrap() = Some(refused),
                    Got::End => break,
                    other => panic!("{other:?}"),
                }
            }
            hears.ended.store(true, Ordering::Release);
        });
        self.link = Some(Link { connection, send, heard, reader });
        self.remote_consistent = welcome.consistent;
        match welcome.resume {
            Some(position) => {
                self.sent = position;
                true
            }
            None => {
                self.all_dirty();
                self.sent = self.unsent.front().map_or(self.producer, |step| step.position - step.plain.len() as u64);
                self.gap = Some(self.sent);
                let first = self.past.lock().unwrap().len() == 0;
                let reason = if first { GapReason::InitialSync } else { GapReason::NewRing };
                self.mark(MarkKind::Begin, Some(reason)).await
            }
        }
    }

    /// What the receiver does not have was never sent: records go back into the ring, marks are made again.
    fn take_back(&mut self, (stream, position): (usize, u64), consistent: bool) {
        let mut past = self.past.lock().unwrap();
        // Everything behind the newest step that is landed for certain.
        let beyond = |step: &Step| match step.is_record() {
            true => step.stream != stream || step.position > position,
            false => step.stream != stream,
        };
        let durable = past.durable;
        // Steps of an earlier stream are landed if one of the newest is.
        let begin = (0..past.len()).rev().find(|index| past.step(*index).stream == stream);
        let end = begin.map_or(0, |begin| begin + 1);
        let mut keep = (durable..end).find(|index| past.step(*index).stream == stream && beyond(past.step(*index)));
        if keep.is_none() && end < past.len() {
            keep = Some(end);
        }
        let mut keep = keep.unwrap_or(past.len());
        // Marks at the end: at most the last of them is in doubt.
        while keep > durable && !past.step(keep - 1).is_record() {
            if past.is_point(keep - 1) == consistent {
                break;
            }
            keep -= 1;
        }
        let ours = self.stream;
        for step in past.cut(keep).into_iter().rev().filter(|step| step.is_record() && step.stream == ours) {
            self.unsent.push_front(step);
        }
        drop(past);
        self.marked_at = None;
    }

    /// The receiver has marks of its own: a rollback began (a gap is open), or is done and the replicas are `now`.
    pub fn note_rollback(&mut self, stream: [u8; 16], began_ns: u64, done: Option<(u64, Arc<Volumes>)>) {
        let mut past = self.past.lock().unwrap();
        past.streams.push(stream);
        let stream = past.streams.len() - 1;
        let step = |kind, time_ns| Step { stream, position: 0, time_ns, kind, plain: Vec::new(), change: None };
        let marks =
            std::iter::once((Kind::Begin, began_ns)).chain(done.map(|(time_ns, now)| (Kind::GapEnd(now), time_ns)));
        for (kind, time_ns) in marks {
            let index = past.len();
            past.vague.insert(index);
            past.push(step(kind, time_ns));
        }
        past.durable = past.len();
    }

    /// The session was refused, and how.
    pub fn refused(&self) -> Option<Refused> {
        self.link.as_ref().and_then(|link| link.heard.refused.lock().unwrap().clone())
    }

    pub fn in_gap(&self) -> bool {
        self.gap.is_some()
    }

    /// Anything, at random.
    pub fn any_deed(&mut self) -> Deed {
        match self.rng.random_range(0..100) {
            0..3 => Deed::OpenGap,
            3..20 if self.in_gap() => Deed::CloseGap,
            20 if self.rng.random_bool(0.25) => Deed::NewRing,
            _ => Deed::Records(self.rng.random_range(1..80)),
        }
    }
}
