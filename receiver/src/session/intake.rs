//! A stream's bytes into batches for the lander. Sans-I/O: chunks go in, batches, reports and refusals come out. Every
//! frame is checked completely here: nothing that a peer may not say goes any further.

use crate::apply::probe;
use crate::apply::work::{Action, Answer, Answered, Waiting};
use crate::failure::{protocol, refuse, refuse_for_now};
use crate::group::live::Counters;
use crate::group::stream::{ContentError, StreamState, check_content};
use crate::landing::arena::Arenas;
use crate::landing::batch::{Batch, Effect, Entry, Item, total_bytes};
use crate::limits::{CUT_COPY_BYTES_MAX, IMAGE_BYTES_WAITING_MAX, PROBES_WAITING_MAX};
use bytes::{Buf, Bytes, BytesMut};
use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use tokio::sync::mpsc;
use varve_common::control::show_position;
use varve_common::format::{BLOCK_BYTES, ENTRY_ALIGN, ENTRY_HEADER_BYTES, Mark, MarkKind};
use varve_common::wire::messages::{AskReply, Incarnation, Probe, Refused, RefusedReason, Report, decode};
use varve_common::wire::{Codec, FRAME_HEADER_BYTES, Frame, FrameKind, Image, WireError};

/// What a session is allowed to say.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Sizes of the volumes.
    pub volumes: Arc<[u64]>,
    /// The ring that the agent holds.
    pub incarnation: Incarnation,
    /// The epochs under which it may write: that of its hello, and that of the welcome.
    pub epochs: RangeInclusive<u64>,
    /// The agent's volumes are larger than ours. They grow in a gap and between two sessions: this one ends with the mark
    /// that opens it, so nothing of the new part can stand before a gap.
    pub grows: bool,
}

/// What became of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fed {
    /// It is used up.
    All,
    /// There is no room for what comes next: feed the rest again when a batch was landed or an answer given.
    Blocked,
}

/// See the module's text.
#[derive(Debug)]
pub struct Intake {
    rules: Rules,
    /// After everything that was received.
    state: StreamState,
    /// The stream is in the agent's incarnation, at a position that both agreed on.
    begun: bool,
    head: [u8; FRAME_HEADER_BYTES],
    head_bytes: usize,
    partial: Option<Partial>,
    arenas: Arenas,
    arena: Option<BytesMut>,
    items: Vec<Item>,
    full: VecDeque<Batch>,
    body: Vec<u8>,
    scratch: Vec<u8>,
    answers: mpsc::UnboundedSender<Answered>,
    waiting: Arc<Waiting>,
    counters: Arc<Counters>,
    /// The newest report, for the session to take.
    pub report: Option<Report>,
    /// The newest answer to an ask, for the session to take.
    pub reply: Option<AskReply>,
    /// An arena was wanted and all were held.
    pub starved: bool,
    /// A gap was opened in which the volumes can grow: nothing more is taken.
    pub can_grow: bool,
}

/// A frame whose body is coming.
#[derive(Clone, Copy, Debug)]
enum Partial {
    /// Into the arena; its entry begins at this offset.
    Landed(Frame, usize),
    /// Into `body`.
    Loose(Frame),
}

impl Intake {
    /// For a session that goes on at `state` if `resumed`, else waits for a begin.
    pub fn new(
        rules: Rules,
        state: StreamState,
        resumed: bool,
        answers: mpsc::UnboundedSender<Answered>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            rules,
            state,
            begun: resumed,
            head: [0; FRAME_HEADER_BYTES],
            head_bytes: 0,
            partial: None,
            arenas: Arenas::new(),
            arena: None,
            items: Vec::new(),
            full: VecDeque::new(),
            body: Vec::new(),
            scratch: Vec::new(),
            answers,
            waiting: Arc::default(),
            counters,
            report: None,
            reply: None,
            starved: false,
            can_grow: false,
        }
    }

    /// Takes a chunk of the stream from its front. Copies each byte of a body once.
    pub fn feed(&mut self, chunk: &mut Bytes) -> Result<Fed, Refused> {
        loop {
            if self.can_grow {
                return Ok(Fed::Blocked);
            }
            let Some(partial) = self.partial else {
                let wanted = FRAME_HEADER_BYTES - self.head_bytes;
                let take = wanted.min(chunk.len());
                self.head[self.head_bytes..self.head_bytes + take].copy_from_slice(&chunk[..take]);
                self.head_bytes += take;
                chunk.advance(take);
                if self.head_bytes < FRAME_HEADER_BYTES {
                    return Ok(Fed::All);
                }
                let frame = Frame::decode(&self.head).map_err(|e| self.damaged(&e))?;
                if !self.begin(frame)? {
                    return Ok(Fed::Blocked);
                }
                self.head_bytes = 0;
                continue;
            };
            let (frame, target, have) = match partial {
                Partial::Landed(frame, at) => {
                    let Some(arena) = &mut self.arena else { return Err(protocol("a frame without memory")) };
                    let have = arena.len() - at - ENTRY_HEADER_BYTES;
                    (frame, Target::Arena(arena), have)
                }
                Partial::Loose(frame) => {
                    let have = self.body.len();
                    (frame, Target::Body(&mut self.body), have)
                }
            };
            let take = (frame.body_bytes - have).min(chunk.len());
            target.extend(&chunk[..take]);
            chunk.advance(take);
            if have + take < frame.body_bytes {
                return Ok(Fed::All);
            }
            self.partial = None;
            self.counters.frames.fetch_add(1, Ordering::Relaxed);
            self.counters.bytes.fetch_add(frame.body_bytes as u64, Ordering::Relaxed);
            match partial {
                Partial::Landed(frame, at) => self.finish_landed(frame, at)?,
                Partial::Loose(frame) => self.finish_loose(frame)?,
            }
        }
    }

    /// Checks what can be checked before the body; `false` if there is no room for it yet.
    fn begin(&mut self, frame: Frame) -> Result<bool, Refused> {
        match frame.kind {
            FrameKind::Data | FrameKind::Mark => {
                if frame.kind == FrameKind::Data {
                    self.check_position(&frame)?;
                    if frame.plain_bytes == 0 {
                        return Err(protocol("a data frame without data"));
                    }
                } else if frame.codec != Codec::Plain {
                    // It is landed as it came, and marks are read from the log as they stand there.
                    return Err(protocol("a compressed mark"));
                }
                let Some(at) = self.room(total_bytes(frame.body_bytes)) else { return Ok(false) };
                self.partial = Some(Partial::Landed(frame, at));
            }
            FrameKind::Probe | FrameKind::Image => {
                self.check_position(&frame)?;
                let images = self.waiting.image_bytes.load(Ordering::Acquire);
                let room = match frame.kind {
                    FrameKind::Probe => self.waiting.probes.load(Ordering::Acquire) < PROBES_WAITING_MAX,
                    _ => images + frame.plain_bytes.max(frame.body_bytes) <= IMAGE_BYTES_WAITING_MAX,
                };
                if !room {
                    return Ok(false);
                }
                self.loose(frame);
            }
            FrameKind::Report | FrameKind::AskReply => self.loose(frame),
            kind => return Err(protocol(format!("a {kind:?} frame, which does not belong here"))),
        }
        Ok(true)
    }

    fn loose(&mut self, frame: Frame) {
        self.body = match frame.kind {
            FrameKind::Image => self.waiting.body(frame.body_bytes),
            _ => Vec::with_capacity(frame.body_bytes),
        };
        self.partial = Some(Partial::Loose(frame));
    }

    /// Data, probes and images stand exactly where the stream ends.
    fn check_position(&self, frame: &Frame) -> Result<(), Refused> {
        if !self.begun {
            return Err(hole(format!(
                "a {:?} frame at position {} before the begin of the new stream {}",
                frame.kind,
                frame.position,
                show_position(&self.rules.incarnation, 0)
            )));
        }
        if frame.position != self.state.at.position {
            return Err(hole(format!(
                "the stream ends at position {} and a {:?} frame came for position {}",
                self.state.at.position, frame.kind, frame.position
            )));
        }
        Ok(())
    }

    /// Room for an entry of `bytes`: its offset in the current batch, with the header left blank. Closes the batch if it
    /// is full; `None` while all memory is held by others.
    fn room(&mut self, bytes: usize) -> Option<usize> {
        let fits = |arena: &BytesMut| (arena.len() + bytes).next_multiple_of(BLOCK_BYTES) <= arena.capacity();
        if !self.arena.as_ref().is_some_and(fits) {
            if let Some(mut arena) = self.arena.take() {
                let items = std::mem::take(&mut self.items);
                self.full.extend(batch_of(&mut arena, items));
                self.arenas.retire(arena);
            }
            self.arena = self.arenas.take();
            self.starved = self.arena.is_none();
        }
        let arena = self.arena.as_mut()?;
        let at = arena.len();
        arena.resize(at + ENTRY_HEADER_BYTES, 0);
        Some(at)
    }

    /// Frees memory that was not needed for some time.
    pub fn trim(&mut self) {
        self.arenas.trim(Instant::now());
        self.waiting.rest();
    }

    /// What can be landed now, if there is anything. At most one batch may be under way.
    pub fn next_batch(&mut self) -> Option<Batch> {
        if let Some(batch) = self.full.pop_front() {
            return Some(batch);
        }
        if self.items.is_empty() {
            return None;
        }
        match self.partial {
            Some(Partial::Landed(frame, at)) if at > 0 => self.cut(frame, at),
            Some(Partial::Landed(..)) => {
                // Only actions: the entry that is coming stays where it is.
                let items = std::mem::take(&mut self.items);
                Some(Batch { bytes: BytesMut::new(), entry_bytes: 0, items })
            }
            _ => {
                let mut none = BytesMut::new();
                let arena = self.arena.as_mut().unwrap_or(&mut none);
                batch_of(arena, std::mem::take(&mut self.items))
            }
        }
    }

    /// Cuts the batch before the entry that is still coming, if that can be moved cheaply; else it is waited for.
    fn cut(&mut self, frame: Frame, at: usize) -> Option<Batch> {
        let arena = self.arena.as_mut()?;
        let coming = arena.len() - at;
        if coming > CUT_COPY_BYTES_MAX {
            return None;
        }
        let needed = total_bytes(frame.body_bytes).next_multiple_of(BLOCK_BYTES);
        let stays = at.next_multiple_of(BLOCK_BYTES) + needed <= arena.capacity();
        let fresh = if stays { None } else { Some(self.arenas.take()?) };
        self.scratch.clear();
        self.scratch.extend_from_slice(&arena[at..]);
        arena.truncate(at);
        let batch = batch_of(arena, std::mem::take(&mut self.items));
        if let (Some(fresh), Some(old)) = (fresh, self.arena.take_if(|_| !stays)) {
            self.arenas.retire(old);
            self.arena = Some(fresh);
        }
        self.arena.as_mut()?.extend_from_slice(&self.scratch);
        self.partial = Some(Partial::Landed(frame, 0));
        batch
    }

    fn finish_landed(&mut self, frame: Frame, at: usize) -> Result<(), Refused> {
        let Some(arena) = &mut self.arena else { return Err(protocol("a frame without memory")) };
        let body = &arena[at + ENTRY_HEADER_BYTES..];
        let plain = frame.open(body, &mut self.scratch);
        let body_crc = match frame.codec {
            Codec::Plain => frame.plain_crc,
            Codec::Lz4 => crc32fast::hash(body),
        };
        let plain = match plain {
            Ok(plain) => plain,
            Err(error) => return Err(self.damaged(&error)),
        };
        let effect = match frame.kind {
            FrameKind::Data => {
                let end = frame.position.checked_add(plain.len() as u64);
                let end = end.ok_or_else(|| protocol("a position beyond all numbers"))?;
                let time_ns = check_content(frame.position, plain, &self.rules.volumes).map_err(content)?;
                Effect::Data { end, time_ns }
            }
            _ => {
                let mark = Mark::decode(plain).ok_or_else(|| protocol("a mark that is none"))?;
                check_mark(&mark, &frame, &self.rules, &self.state, self.begun, &self.waiting)?;
                self.begun = true;
                Effect::Mark(mark)
            }
        };
        let padded = arena.len().next_multiple_of(ENTRY_ALIGN);
        arena.resize(padded, 0);
        self.state.pass(&effect);
        self.can_grow = self.rules.grows && self.state.gap.is_some();
        self.items.push(Item::Entry(Entry {
            at,
            kind: frame.kind,
            codec: frame.codec,
            incarnation: self.rules.incarnation,
            position: frame.position,
            body_bytes: frame.body_bytes,
            plain_bytes: frame.plain_bytes,
            plain_crc: frame.plain_crc,
            body_crc,
            effect,
        }));
        Ok(())
    }

    fn finish_loose(&mut self, frame: Frame) -> Result<(), Refused> {
        let body = std::mem::take(&mut self.body);
        let mut scratch = std::mem::take(&mut self.scratch);
        let opened = frame.open(&body, &mut scratch).map(drop);
        opened.map_err(|e| self.damaged(&e))?;
        let plain = match frame.codec {
            Codec::Plain => {
                self.scratch = scratch;
                body
            }
            Codec::Lz4 => scratch,
        };
        let wrong = |e: WireError| protocol(e.to_string());
        match frame.kind {
            FrameKind::Report => self.report = Some(decode(frame.kind, &plain).map_err(wrong)?),
            FrameKind::AskReply => self.reply = Some(decode(frame.kind, &plain).map_err(wrong)?),
            FrameKind::Probe => {
                let probe: Probe = decode(frame.kind, &plain).map_err(wrong)?;
                if let Some(why) = probe::objection(&probe, &self.rules.volumes) {
                    return Err(protocol(why));
                }
                let answer = Answer::for_probe(self.answers.clone(), self.waiting.clone());
                self.items.push(Item::Act(Action::Probe(probe, answer)));
            }
            _ => {
                self.check_image(&Image::decode(&plain).map_err(wrong)?)?;
                let answer = Answer::for_image(self.answers.clone(), self.waiting.clone(), plain.capacity());
                self.items.push(Item::Act(Action::Image(plain, answer)));
            }
        }
        Ok(())
    }

    /// An image may hold what was written later than its position, so it would make a lie of a consistent replica.
    fn check_image(&self, image: &Image<'_>) -> Result<(), Refused> {
        if self.state.gap.is_none() {
            return Err(protocol(format!(
                "an image of volume {} at position {} while no gap is open",
                image.volume, self.state.at.position
            )));
        }
        let bytes = self.rules.volumes.get(usize::from(image.volume)).copied();
        let Some(bytes) = bytes else { return Err(protocol(format!("an image of volume {}", image.volume))) };
        // The sum was checked by the image itself.
        match image.extents().find(|(offset, length, _)| offset.saturating_add(*length) > bytes) {
            Some((offset, length, _)) => Err(protocol(format!(
                "an image of {length} bytes at {offset} of volume {}, which has {bytes}",
                image.volume
            ))),
            None => Ok(()),
        }
    }

    fn damaged(&self, error: &WireError) -> Refused {
        protocol(format!("{error} (the stream stood at position {})", self.state.at.position))
    }
}

/// Where a body goes.
enum Target<'a> {
    Arena(&'a mut BytesMut),
    Body(&'a mut Vec<u8>),
}

impl Target<'_> {
    fn extend(self, bytes: &[u8]) {
        match self {
            Target::Arena(arena) => arena.extend_from_slice(bytes),
            Target::Body(body) => body.extend_from_slice(bytes),
        }
    }
}

/// The front of the arena as a batch; the rest of it stays block-aligned. `None` if there is nothing in it.
fn batch_of(arena: &mut BytesMut, items: Vec<Item>) -> Option<Batch> {
    if items.is_empty() {
        return None;
    }
    let entry_bytes = arena.len();
    arena.resize(entry_bytes.next_multiple_of(BLOCK_BYTES), 0);
    Some(Batch { bytes: arena.split(), entry_bytes, items })
}

fn check_mark(
    mark: &Mark,
    frame: &Frame,
    rules: &Rules,
    state: &StreamState,
    begun: bool,
    waiting: &Waiting,
) -> Result<(), Refused> {
    if mark.position != frame.position || mark.incarnation != rules.incarnation {
        return Err(protocol("a mark of another position or ring than its frame"));
    }
    if !rules.epochs.contains(&mark.epoch) {
        let text = format!("a mark of epoch {} in a session of epoch {}", mark.epoch, rules.epochs.end());
        return Err(refuse(RefusedReason::Epoch, text, "restart the agent"));
    }
    if mark.height_min != 0 {
        return Err(protocol("a mark with a height: only the receiver gives those"));
    }
    if mark.kind != MarkKind::Begin && (!begun || mark.position != state.at.position) {
        return Err(hole(format!(
            "the stream ends at position {} and a {:?} mark came for position {}",
            state.at.position, mark.kind, mark.position
        )));
    }
    if !state.admits(mark) {
        return Err(protocol(format!("a {:?} mark that cannot stand at position {}", mark.kind, mark.position)));
    }
    if mark.kind == MarkKind::GapEnd && waiting.image_bytes.load(Ordering::Acquire) > 0 {
        return Err(protocol("a gap's end before all images are done"));
    }
    Ok(())
}

fn hole(text: String) -> Refused {
    refuse_for_now(RefusedReason::Hole, text, "the agent connects again and goes on where both agree")
}

fn content(error: ContentError) -> Refused {
    match error {
        ContentError::Bounds { .. } | ContentError::Volume { .. } => {
            let next = "an agent whose volume grew comes again with its new size; if this stays, restart the agent";
            refuse(RefusedReason::Volumes, error.to_string(), next)
        }
        ContentError::Record(_) => protocol(error.to_string()),
    }
}

#[cfg(test)]
#[path = "intake_tests.rs"]
mod tests;
