//! The chronicle's file: appended to with one synced write at a time, rewritten when most of it is obsolete.

use super::marks::place_and_time;
use super::recover::{Recovered, recover};
use super::state::{Applied, Chronicle};
use crate::error::HistoryError;
use crate::limits::{CHRONICLE_BYTES_MAX, CHRONICLE_SLOTS_SMALL, KEPT_MAX, MARKS_WITH_KEPT_MAX};
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use varve_common::format::FormatError;
use varve_common::format::chronicle::{BATCH_SLOTS_MAX, ChronicleHeader, ChronicleSlot, Event, NO_END, SLOT_BYTES};
use varve_common::state::GapReason;
use varve_common::wire::messages::Incarnation;
use varve_io::{IoError, crashsafe};
use zerocopy::IntoBytes;

const SLOT: u64 = SLOT_BYTES as u64;
const MODE: u32 = 0o600;
/// Slots that are tried when the header has to be found out again.
const MEND_SLOTS: usize = 16;

/// What an append did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Appended {
    /// Events that were new and are durable now.
    pub new: usize,
    /// A new event contradicted later ones, which are forgotten.
    pub diverged: bool,
}

/// What the applied mark knows of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamFacts {
    /// Its height.
    pub height: u64,
    /// Its time.
    pub time_ns: u64,
    /// The stream's incarnation.
    pub incarnation: Incarnation,
    /// The position in it.
    pub position: u64,
    /// Fencing token.
    pub epoch: u64,
    /// The gap that is open; before the first consistent point [`GapReason::InitialSync`].
    pub gap: Option<GapReason>,
}

/// An open chronicle. One owner appends; others are given [`ChronicleFile::shared`].
#[derive(Debug)]
pub struct ChronicleFile {
    path: PathBuf,
    file: File,
    header: ChronicleHeader,
    /// Slots behind the header.
    slots: u64,
    chronicle: Arc<Chronicle>,
    /// Slots are lost, and it matters below this height: until it has expired the file is not rewritten, because what
    /// is derived from the lost ones' places would be lost as well.
    lost_below: Option<u64>,
    /// A write failed: what the disk has is not known.
    broken: bool,
}

impl ChronicleFile {
    /// Opens the chronicle of a group, or makes an empty one. What was found wrong is told in words for the log; points
    /// whose being is not certain because of it are damaged ones.
    pub fn open(path: impl AsRef<Path>, group: [u8; 16]) -> Result<(Self, Vec<String>), HistoryError> {
        let path = path.as_ref();
        let Some(bytes) = read(path)? else {
            let header = ChronicleHeader::new(group, 1);
            crashsafe::write_atomic(path, header.as_bytes(), MODE)?;
            return Ok((Self::new(path, open(path)?, header), Vec::new()));
        };
        let mut notes = Vec::new();
        let (header, mended) = header_of(path, group, &bytes)?;
        notes.extend(mended.then(|| "the header was damaged; what it said follows from the slots".to_owned()));
        let recovered = recover(&header, &bytes[SLOT_BYTES..]);
        let mut this = Self::new(path, open(path)?, header);
        this.replay(&recovered);
        notes.extend(recovered.notes);
        if mended {
            this.put(header.as_bytes(), 0)?;
        }
        if recovered.cut > 0 {
            this.file.set_len((this.slots + 1) * SLOT).map_err(|e| IoError::new("cut", path, e))?;
            this.sync()?;
        }
        this.rewrite_if_due()?;
        Ok((this, notes))
    }

    /// Puts a chronicle that cannot be opened aside (its name gets `.damaged`) and begins an empty one. Old points
    /// cannot be found without it: [`ChronicleFile::settle`] says from where on there are points again.
    pub fn start_over(path: impl AsRef<Path>, group: [u8; 16]) -> Result<Self, HistoryError> {
        let path = path.as_ref();
        let mut aside = path.as_os_str().to_owned();
        aside.push(".damaged");
        match std::fs::rename(path, &aside) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(IoError::new("put aside", path, e).into());
            }
            _ => {}
        }
        Ok(Self::open(path, group)?.0)
    }

    fn new(path: &Path, file: File, header: ChronicleHeader) -> Self {
        let chronicle = Arc::default();
        Self { path: path.to_owned(), file, header, slots: 0, chronicle, lost_below: None, broken: false }
    }

    fn replay(&mut self, recovered: &Recovered) {
        let mut lost = false;
        for (number, event) in recovered.events.iter().enumerate() {
            match event {
                Some(event) => {
                    Arc::make_mut(&mut self.chronicle).apply(event);
                    if let (true, Event::Begin { height, .. }) = (lost, event) {
                        // From here on positions are known again.
                        lost = false;
                        self.lost_below = Some(*height);
                    }
                }
                None => {
                    lost = true;
                    // It may have been the begin of a gap: until the next end of one nothing is certain.
                    let from = self.chronicle.newest_height().saturating_add(1);
                    let what = format!("slot {number} of the chronicle");
                    Arc::make_mut(&mut self.chronicle).apply(&Event::damaged(from, NO_END, &what));
                    Arc::make_mut(&mut self.chronicle).marks.lose_place();
                }
            }
        }
        if lost {
            self.lost_below = Some(u64::MAX);
        }
        self.slots = recovered.events.len() as u64;
    }

    /// What it says.
    pub fn chronicle(&self) -> &Chronicle {
        &self.chronicle
    }

    /// What it says now, for a reader that does not hold the file: later events do not change it.
    pub fn shared(&self) -> Arc<Chronicle> {
        self.chronicle.clone()
    }

    /// A write failed: it is to be opened anew.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Its bytes on disk.
    pub fn bytes(&self) -> u64 {
        (self.slots + 1) * SLOT
    }

    /// Appends what is new of `events`; durable on return. After an error the chronicle takes nothing more until it is
    /// opened again.
    pub fn append(&mut self, events: &[Event]) -> Result<Appended, HistoryError> {
        self.check(events)?;
        self.take(events)
    }

    /// See [`ChronicleFile::append`].
    fn take(&mut self, events: &[Event]) -> Result<Appended, HistoryError> {
        if self.broken {
            let broken = std::io::Error::other("a write failed before; it has to be opened again");
            return Err(IoError::new("append to", &self.path, broken).into());
        }
        let mut appended = Appended::default();
        let mut new = Vec::new();
        for event in events {
            if !event.is_possible() {
                // Only the name of a bookmark comes from the other side, unchecked.
                tracing::warn!(path = %self.path.display(), ?event, "not written: it cannot be a bookmark's name");
                continue;
            }
            match Arc::make_mut(&mut self.chronicle).apply(event) {
                Applied::Known => continue,
                Applied::New => {}
                Applied::Diverged => appended.diverged = true,
            }
            new.push(event);
        }
        appended.new = new.len();
        let room = self.chronicle.makes_room();
        if let Some(expired) = &room {
            Arc::make_mut(&mut self.chronicle).apply(expired);
            new.push(expired);
        }
        if let Err(error) = self.write(&new) {
            self.broken = true;
            return Err(error);
        }
        self.rewrite_if_due()?;
        Ok(appended)
    }

    /// Before anything is changed.
    fn check(&self, events: &[Event]) -> Result<(), HistoryError> {
        let named =
            |event: &&Event| matches!(event, Event::Bookmark { .. } | Event::Keep { .. } | Event::Release { .. });
        if let Some(event) = events.iter().find(|event| !event.is_possible() && !named(event)) {
            // Passing over the begin of a gap would make points up.
            let what = format!("an event that cannot be: {event:?}");
            return Err(HistoryError::Damaged { path: self.path.clone(), offset: self.bytes(), what });
        }
        let is_new = |event: &&Event| match event {
            Event::Keep { name } => self.chronicle.bookmark(name).is_none_or(|bookmark| !bookmark.kept),
            _ => false,
        };
        if self.chronicle.kept_count() + events.iter().filter(is_new).count() > KEPT_MAX {
            return Err(HistoryError::Limit { what: "kept bookmarks", limit: KEPT_MAX as u64 });
        }
        let marks = events.iter().filter(|event| place_and_time(event).is_some()).count();
        if marks > 0 && self.chronicle.marks() + marks > MARKS_WITH_KEPT_MAX {
            // Only where a kept bookmark is older than all of them.
            let what = "gaps and restarts since the oldest kept bookmark ('varve bookmark --release' lets it go)";
            return Err(HistoryError::Limit { what, limit: MARKS_WITH_KEPT_MAX as u64 });
        }
        Ok(())
    }

    fn write(&mut self, events: &[&Event]) -> Result<(), HistoryError> {
        for batch in events.chunks(BATCH_SLOTS_MAX) {
            if self.bytes() + batch.len() as u64 * SLOT > CHRONICLE_BYTES_MAX {
                return Err(HistoryError::Limit { what: "bytes of the chronicle", limit: CHRONICLE_BYTES_MAX });
            }
            let bytes = encode(&self.header, self.slots, batch);
            self.put(&bytes, (self.slots + 1) * SLOT)?;
            self.slots += batch.len() as u64;
        }
        Ok(())
    }

    fn put(&self, bytes: &[u8], offset: u64) -> Result<(), HistoryError> {
        self.file.write_all_at(bytes, offset).map_err(|e| IoError::new("append to", &self.path, e))?;
        self.sync()
    }

    fn sync(&self) -> Result<(), HistoryError> {
        Ok(self.file.sync_data().map_err(|e| IoError::new("sync", &self.path, e))?)
    }

    /// Makes the chronicle agree with the applied mark, which is written after it and knows better: a damaged chronicle
    /// may have lost its end. Not while a rolled back replica is held. Says what was wrong.
    pub fn settle(&mut self, facts: &StreamFacts) -> Result<Vec<String>, HistoryError> {
        let StreamFacts { height, time_ns, incarnation, position, epoch, gap } = *facts;
        let (mut notes, mut events) = (Vec::new(), Vec::new());
        let mut says = |what: &str| {
            notes.push(format!("at height {height} the chronicle {what}; the applied mark knows better"));
        };
        let newest = self.chronicle.marks.at_or_below(height).map_or(0, |mark| mark.0);
        let open = self.chronicle.gap_above(height).is_some();
        let moved = self.chronicle.position_of(height) != Some((incarnation, position));
        match gap {
            Some(reason) if !open => {
                says("does not know of the open gap");
                events.push(Event::GapBegin { height: newest, time_ns, reason });
            }
            None if open || self.chronicle.damage_at(height).is_some() => {
                says("does not know that it is a point");
                events.push(Event::GapEnd { height, time_ns });
            }
            // Every mark that opens a gap moves the position against the height: one that is lost shows here. Behind a rollback
            // the position stands still until the next mark, so that nothing shows; but the stream only goes on behind one.
            None if (moved || self.chronicle.marks.stands_still(height)) && newest.saturating_add(1) < height => {
                events.push(Event::damaged(newest + 1, height, "the end of the chronicle"));
            }
            _ => {}
        }
        if moved {
            says("has another position");
        }
        if moved || gap.is_some() && !open {
            events.push(Event::Begin { height, time_ns, incarnation, position, epoch });
        }
        // Whatever the limits say: a group that cannot be opened cannot be mended.
        self.take(&events)?;
        Ok(notes)
    }

    fn rewrite_if_due(&mut self) -> Result<(), HistoryError> {
        let live = self.chronicle.live_events() as u64;
        if self.slots < CHRONICLE_SLOTS_SMALL || self.slots < live * 2 {
            return Ok(());
        }
        self.rewrite()
    }

    /// Writes the fewest slots that say the same, in place of the file.
    pub fn rewrite(&mut self) -> Result<(), HistoryError> {
        if self.lost_below.is_some_and(|height| self.chronicle.oldest().0 < height) {
            return Ok(());
        }
        let header = ChronicleHeader::new(self.header.group, self.header.first_sequence.get() + self.slots);
        let events = self.chronicle.events();
        let mut bytes = Vec::with_capacity((events.len() + 1) * SLOT_BYTES);
        bytes.extend_from_slice(header.as_bytes());
        let mut slots = 0;
        // Batches of one: a file that is replaced as a whole is never torn, and what is damaged later should be one slot.
        for event in &events {
            bytes.extend(encode(&header, slots, &[event]));
            slots += 1;
        }
        // From here on the old file may be gone while it is the one that is open.
        self.broken = true;
        crashsafe::write_atomic(&self.path, &bytes, MODE)?;
        self.file = open(&self.path)?;
        (self.header, self.slots, self.lost_below, self.broken) = (header, slots, None, false);
        Ok(())
    }
}

fn encode(header: &ChronicleHeader, slots: u64, batch: &[&Event]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(batch.len() * SLOT_BYTES);
    for (index, event) in batch.iter().enumerate() {
        let sequence = header.first_sequence.get() + slots + index as u64;
        let slot = ChronicleSlot::new(header, sequence, index as u16, batch.len() as u16, event);
        bytes.extend_from_slice(slot.as_bytes());
    }
    bytes
}

fn open(path: &Path) -> Result<File, HistoryError> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    Ok(file.map_err(|e| IoError::new("open", path, e))?)
}

/// The file's bytes; `None`: there is no file.
fn read(path: &Path) -> Result<Option<Vec<u8>>, HistoryError> {
    let len = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(IoError::new("look at", path, e).into()),
    };
    if len > CHRONICLE_BYTES_MAX {
        return Err(HistoryError::Limit { what: "bytes of the chronicle", limit: CHRONICLE_BYTES_MAX });
    }
    // What is known is not said again: it must be on the disk, not only in memory after a sync that failed.
    Ok(crashsafe::read_back(path)?)
}

/// The header, and whether it had to be found out from the slots: it says nothing that they do not.
fn header_of(path: &Path, group: [u8; 16], bytes: &[u8]) -> Result<(ChronicleHeader, bool), HistoryError> {
    let source = match ChronicleHeader::decode(bytes) {
        Ok(header) if header.group == group => return Ok((header, false)),
        Ok(_) => {
            let what = "it belongs to another group".to_owned();
            return Err(HistoryError::Damaged { path: path.to_owned(), offset: 0, what });
        }
        Err(error) => error,
    };
    let slots = bytes.get(SLOT_BYTES..).unwrap_or_default().chunks_exact(SLOT_BYTES).take(MEND_SLOTS);
    let found = slots.enumerate().find_map(|(number, slot)| {
        let sequence = u64::from_le_bytes(*slot.first_chunk()?);
        let header = ChronicleHeader::new(group, sequence.checked_sub(number as u64)?);
        ChronicleHeader::decode(header.as_bytes()).ok()?;
        ChronicleSlot::decode(&header, slot)?.is_in_place(&header, number as u64).then_some(header)
    });
    match (found, source) {
        (Some(header), FormatError::Damaged(_)) => Ok((header, true)),
        (_, source) => Err(HistoryError::Format { path: path.to_owned(), source }),
    }
}
