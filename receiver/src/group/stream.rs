//! The state of a group's stream at a position, and the checks that everything must pass before it may become part
//! of it. Pure; the session, recovery and the applier use the same.

use crate::landing::batch::Effect;
use varve_common::clock::is_setback;
use varve_common::format::{AppliedSlot, EntryHeader, Mark, MarkKind};
use varve_common::record::{Record, RecordError, Records};
use varve_common::state::GapReason;
use varve_common::wire::messages::Incarnation;
use varve_common::wire::{Codec, Frame, FrameKind};

/// A position with its incarnation and time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Point {
    /// All zero: nowhere yet.
    pub incarnation: Incarnation,
    /// In it.
    pub position: u64,
    /// At the source, nanoseconds since 1970.
    pub time_ns: u64,
}

/// What is true of the replicas once everything before the position is in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamState {
    /// The position, and the time of the newest record or mark before it.
    pub at: Point,
    /// The open gap. `None` with `ever_consistent`: they equal the volumes.
    pub gap: Option<GapReason>,
    /// They did at least once.
    pub ever_consistent: bool,
    /// The newest point at which they did.
    pub good: Option<Point>,
    /// Orders the points of all incarnations: bytes of the stream so far, and [`MARK_HEIGHT`] for each mark. The same
    /// entries always give the same heights.
    pub height: u64,
    /// The height of `good`, as far as it was passed since the state was read from a mark: that does not hold it.
    pub good_height: Option<u64>,
    /// Where the source's clock was set back last, as far as that was passed; else 0.
    pub set_back_height: u64,
}

/// What a mark adds to the height. Images are stamped with the height of the stream at their place and one: so they are
/// younger than the last good point before them and older than the end of their gap.
pub const MARK_HEIGHT: u64 = 8;
/// See [`MARK_HEIGHT`].
pub const IMAGE_HEIGHT: u64 = 1;

/// The timeline's time after something that the source dates `then`: it does not go back, unless the source's clock was
/// wrong and was set right. `before`: its time so far.
pub fn onward_ns(before_ns: u64, then_ns: u64) -> u64 {
    if is_setback(before_ns, then_ns) { then_ns } else { before_ns.max(then_ns) }
}

impl StreamState {
    /// Before anything came.
    pub fn fresh() -> Self {
        Self {
            at: Point::default(),
            gap: Some(GapReason::InitialSync),
            ever_consistent: false,
            good: None,
            height: 0,
            good_height: None,
            set_back_height: 0,
        }
    }

    /// As an applied mark has it.
    pub fn from_slot(slot: &AppliedSlot) -> Self {
        let at = Point { incarnation: slot.incarnation, position: slot.position.get(), time_ns: slot.time_ns.get() };
        let good = Point {
            incarnation: slot.good_incarnation,
            position: slot.good_position.get(),
            time_ns: slot.good_time_ns.get(),
        };
        let ever_consistent = slot.ever_consistent != 0;
        let gap = match slot.consistent {
            0 => Some(GapReason::from_number(slot.gap_reason).unwrap_or(GapReason::InitialSync)),
            _ => None,
        };
        let height = slot.height.get();
        let good_height = (gap.is_none() && ever_consistent).then_some(height);
        let good = ever_consistent.then_some(good);
        Self { at, gap, ever_consistent, good, height, good_height, set_back_height: 0 }
    }

    /// Writes it into an applied mark.
    pub fn to_slot(&self, slot: &mut AppliedSlot) {
        slot.consistent = u8::from(self.is_consistent());
        slot.ever_consistent = u8::from(self.ever_consistent);
        slot.gap_reason = self.gap.map_or(0, |reason| reason as u8);
        slot.incarnation = self.at.incarnation;
        slot.position = self.at.position.into();
        slot.time_ns = self.at.time_ns.into();
        let good = self.good.unwrap_or_default();
        slot.good_position = good.position.into();
        slot.good_incarnation = good.incarnation;
        slot.good_time_ns = good.time_ns.into();
        slot.height = self.height.into();
    }

    /// Whether the replicas equal the volumes here.
    pub fn is_consistent(&self) -> bool {
        self.gap.is_none() && self.ever_consistent
    }

    /// The state after an entry that was checked against it.
    pub fn pass(&mut self, effect: &Effect) {
        let before_ns = self.at.time_ns;
        match *effect {
            Effect::Data { end, time_ns } => {
                self.height += end - self.at.position;
                self.at.position = end;
                self.at.time_ns = time_ns.map_or(self.at.time_ns, |time_ns| onward_ns(self.at.time_ns, time_ns));
            }
            Effect::Mark(mark) => self.pass_mark(&mark),
        }
        if self.is_consistent() {
            (self.good, self.good_height) = (Some(self.at), Some(self.height));
        }
        if self.at.time_ns < before_ns {
            self.set_back_height = self.height;
        }
    }

    fn pass_mark(&mut self, mark: &Mark) {
        let time_ns = onward_ns(self.at.time_ns, mark.time_ns);
        self.at = Point { incarnation: mark.incarnation, position: mark.position, time_ns };
        self.height = (self.height + MARK_HEIGHT).max(mark.height_min);
        match mark.kind {
            MarkKind::Begin | MarkKind::GapBegin => self.gap = mark.reason,
            MarkKind::GapEnd => {
                self.gap = None;
                self.ever_consistent = true;
            }
        }
    }

    /// Whether the mark may stand here: everything but a begin belongs to the stream as it is.
    pub fn admits(&self, mark: &Mark) -> bool {
        let here = mark.incarnation == self.at.incarnation && mark.position == self.at.position;
        match mark.kind {
            MarkKind::Begin => mark.incarnation != [0; 16] && mark.position.is_multiple_of(8),
            MarkKind::GapBegin | MarkKind::GapEnd => self.begun() && here,
        }
    }

    /// Whether there is a stream at all.
    pub fn begun(&self) -> bool {
        self.at.incarnation != [0; 16]
    }
}

/// What a check found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checked {
    /// What the entry does.
    pub effect: Effect,
}

/// Why plain bytes may not become part of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContentError {
    /// Not records.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A volume that the group does not have.
    #[error("the record at position {position} is for volume {volume}, and the group has {count}")]
    Volume {
        /// Of the record.
        position: u64,
        /// Its number.
        volume: u16,
        /// Volumes of the group.
        count: usize,
    },
    /// Beyond the end of the volume.
    #[error("the record at position {position} ends at byte {end} of volume {volume}, which has {bytes}")]
    Bounds {
        /// Of the record.
        position: u64,
        /// Its volume.
        volume: u16,
        /// Where its extent ends.
        end: u64,
        /// Size of the volume.
        bytes: u64,
    },
}

/// Checks one record against the group's volumes. A resize changes nothing here: volumes grow between two sessions.
pub fn check_record(record: &Record<'_>, volumes: &[u64]) -> Result<(), ContentError> {
    if !record.kind.changes_data() {
        return Ok(());
    }
    let (position, volume) = (record.position, record.header.volume.get());
    let Some(&bytes) = volumes.get(usize::from(volume)) else {
        return Err(ContentError::Volume { position, volume, count: volumes.len() });
    };
    // The sum was checked by the record itself.
    let end = record.header.offset.get().saturating_add(record.header.length.get());
    if end > bytes {
        return Err(ContentError::Bounds { position, volume, end, bytes });
    }
    Ok(())
}

/// Checks that plain bytes at `position` are whole records of the group's volumes; gives the time of the newest.
pub fn check_content(position: u64, plain: &[u8], volumes: &[u64]) -> Result<Option<u64>, ContentError> {
    check_each(position, plain, volumes, |_| ())
}

/// The same; `each` is told every record that was checked, in order.
fn check_each(
    position: u64,
    plain: &[u8],
    volumes: &[u64],
    mut each: impl FnMut(&Record<'_>),
) -> Result<Option<u64>, ContentError> {
    let mut time_ns = None;
    for record in Records::new(position, plain) {
        let record = record?;
        check_record(&record, volumes)?;
        time_ns = time_ns.max(Some(record.header.time_ns.get()));
        each(&record);
    }
    Ok(time_ns)
}

/// Checks entries read from the log as if they came from a peer.
#[derive(Debug)]
pub struct Checker<'a> {
    volumes: &'a [u64],
    scratch: Vec<u8>,
}

impl<'a> Checker<'a> {
    /// For a group with volumes of these sizes.
    pub fn new(volumes: &'a [u64]) -> Self {
        Self { volumes, scratch: Vec::new() }
    }

    /// What the entry does, if it continues the stream.
    pub fn check(&mut self, state: &StreamState, header: &EntryHeader, body: &[u8]) -> Option<Checked> {
        self.check_each(state, header, body, |_| ())
    }

    /// The same; `each` is told its records, in order. If it turns out not to continue the stream, some may have been told.
    pub fn check_each(
        &mut self,
        state: &StreamState,
        header: &EntryHeader,
        body: &[u8],
        each: impl FnMut(&Record<'_>),
    ) -> Option<Checked> {
        let effect = match FrameKind::from_number(header.kind)? {
            FrameKind::Data => {
                let position = header.position.get();
                if !state.begun() || header.incarnation != state.at.incarnation || position != state.at.position {
                    return None;
                }
                let plain = frame_of(header)?.open(body, &mut self.scratch).ok()?;
                let time_ns = check_each(position, plain, self.volumes, each).ok()?;
                Effect::Data { end: position.checked_add(plain.len() as u64)?, time_ns }
            }
            FrameKind::Mark => {
                let mark = Mark::decode(body)?;
                let here = mark.position == header.position.get() && mark.incarnation == header.incarnation;
                (here && state.admits(&mark)).then_some(Effect::Mark(mark))?
            }
            _ => return None,
        };
        Some(Checked { effect })
    }
}

/// The frame as which the entry came.
pub fn frame_of(header: &EntryHeader) -> Option<Frame> {
    let codec = match header.codec {
        0 => Codec::Plain,
        1 => Codec::Lz4,
        _ => return None,
    };
    Some(Frame {
        kind: FrameKind::from_number(header.kind)?,
        codec,
        body_bytes: header.body_bytes.get() as usize,
        plain_bytes: header.plain_bytes.get() as usize,
        position: header.position.get(),
        plain_crc: header.plain_crc.get(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(kind: MarkKind, incarnation: u8, position: u64) -> Mark {
        let reason = (kind != MarkKind::GapEnd).then_some(GapReason::RingFull);
        Mark { kind, reason, incarnation: [incarnation; 16], position, time_ns: 5, epoch: 1, height_min: 0 }
    }

    #[test]
    fn good_points_stop_at_a_gap_and_survive_it() {
        let mut state = StreamState::fresh();
        assert!(!state.admits(&mark(MarkKind::GapEnd, 0, 0)), "nothing has begun");
        for (effect, consistent, good) in [
            (Effect::Mark(mark(MarkKind::Begin, 1, 64)), false, None),
            (Effect::Data { end: 128, time_ns: Some(6) }, false, None),
            (Effect::Mark(mark(MarkKind::GapEnd, 1, 128)), true, Some(128)),
            (Effect::Data { end: 256, time_ns: Some(7) }, true, Some(256)),
            (Effect::Mark(mark(MarkKind::GapBegin, 1, 256)), false, Some(256)),
            (Effect::Data { end: 512, time_ns: Some(8) }, false, Some(256)),
            (Effect::Mark(mark(MarkKind::Begin, 2, 0)), false, Some(256)),
        ] {
            if let Effect::Mark(mark) = &effect {
                assert!(state.admits(mark), "{mark:?}");
            }
            state.pass(&effect);
            assert_eq!(state.is_consistent(), consistent, "{effect:?}");
            assert_eq!(state.good.map(|point| point.position), good, "{effect:?}");
            let mut slot = AppliedSlot::fresh([1; 16]);
            state.to_slot(&mut slot);
            let kept = StreamState { good_height: state.good_height.filter(|_| consistent), ..state };
            assert_eq!(StreamState::from_slot(&slot), kept, "{effect:?}");
            assert_eq!(state.good_height.is_some(), good.is_some(), "{effect:?}");
        }
        assert_eq!(state.good.map(|point| point.incarnation), Some([1; 16]));
        assert!(!state.admits(&mark(MarkKind::GapEnd, 1, 0)), "an old incarnation");
        assert!(!state.admits(&mark(MarkKind::GapEnd, 2, 8)), "not here");
    }
}
