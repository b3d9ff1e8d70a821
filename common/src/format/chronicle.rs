//! The chronicle of a group: the small file of everything about its history that is neither data nor index.
//!
//! A [`ChronicleHeader`] and then slots of [`SLOT_BYTES`], one [`Event`] each, only ever appended. What one append wrote
//! is a *batch*: each slot says where in its batch it stands, so that a reader can tell a batch that a crash tore from
//! a slot that was damaged later. A slot's CRC begins with the header's: a slot of another group's file does not count.

use super::{FORMAT_VERSION, FormatError};
use crate::point::Consistency;
use crate::problem::check_name;
use crate::state::GapReason;
use crate::wire::messages::Incarnation;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of the header and of every slot.
pub const SLOT_BYTES: usize = 128;
/// Longest text in a slot.
pub const TEXT_BYTES_MAX: usize = 76;
/// Most slots of one batch.
pub const BATCH_SLOTS_MAX: usize = 4096;
/// The end of a stretch of damage whose end is not known.
pub const NO_END: u64 = u64::MAX;

/// Something that happened to a group's history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// From this height on the stream is at this position. Follows every mark that opens a gap, because such a mark adds
    /// to the height and not to the position.
    Begin {
        /// After the mark.
        height: u64,
        /// At the source.
        time_ns: u64,
        /// The stream's incarnation from here on.
        incarnation: Incarnation,
        /// Where in it the stream goes on.
        position: u64,
        /// Fencing token.
        epoch: u64,
    },
    /// Above this height the replica is not what the volume is. This height itself is good: the state before the mark.
    GapBegin {
        /// Before the mark.
        height: u64,
        /// At the source.
        time_ns: u64,
        /// Why.
        reason: GapReason,
    },
    /// The state at this height is good again.
    GapEnd {
        /// Of the stream.
        height: u64,
        /// At the source.
        time_ns: u64,
    },
    /// A name for a point.
    Bookmark {
        /// After the record.
        height: u64,
        /// At the source.
        time_ns: u64,
        /// The name.
        name: String,
        /// What it promises.
        consistency: Consistency,
    },
    /// The newest bookmark of this name may not expire.
    Keep {
        /// The name.
        name: String,
    },
    /// Bookmarks of this name may expire.
    Release {
        /// The name.
        name: String,
    },
    /// At this height the replica was made equal to what it was at `to_height`. It adds 8 to the height like a mark; its
    /// changes are stamped above the height before and not above this one. It ends a gap; before the stream goes on
    /// there must be another.
    RolledBack {
        /// After it.
        height: u64,
        /// The receiver's time.
        time_ns: u64,
        /// The point that it went back to.
        to_height: u64,
        /// Its time.
        to_time_ns: u64,
    },
    /// Points from height `from` on and below `to` cannot be read any more. With [`NO_END`] it ends where the next gap
    /// or rollback ends.
    Damaged {
        /// The first.
        from: u64,
        /// The first that can be read again.
        to: u64,
        /// What was damaged.
        what: String,
    },
    /// The window begins here now.
    Expired {
        /// The oldest height that can be read.
        height: u64,
        /// Its time.
        time_ns: u64,
    },
}

impl Event {
    /// Damage, its text cut to what a slot holds.
    pub fn damaged(from: u64, to: u64, what: &str) -> Self {
        let mut end = what.len().min(TEXT_BYTES_MAX);
        while !what.is_char_boundary(end) {
            end -= 1;
        }
        Self::Damaged { from, to, what: what[..end].to_owned() }
    }

    /// Whether it can be written: what a slot cannot hold, or no reader would take, is not.
    pub fn is_possible(&self) -> bool {
        match self {
            Self::Begin { incarnation, .. } => *incarnation != [0; 16],
            Self::GapBegin { .. } | Self::GapEnd { .. } | Self::Expired { .. } => true,
            Self::Bookmark { name, .. } | Self::Keep { name } | Self::Release { name } => {
                check_name("bookmark", name).is_ok()
            }
            Self::RolledBack { height, to_height, .. } => to_height < height,
            Self::Damaged { from, to, what } => from < to && !what.is_empty() && what.len() <= TEXT_BYTES_MAX,
        }
    }
}

/// The first [`SLOT_BYTES`] of a chronicle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChronicleHeader {
    /// [`CHRONICLE_MAGIC`].
    pub magic: [u8; 8],
    /// [`FORMAT_VERSION`]; stays at this offset in every version.
    pub version: U16,
    /// Zero.
    pub reserved: [u8; 6],
    /// The group's identity.
    pub group: [u8; 16],
    /// Sequence number of the first slot: they rise over all rewritings of the file.
    pub first_sequence: U64,
    /// Zero.
    pub tail: [u8; 84],
    /// CRC-32 of the bytes before.
    pub crc: U32,
}

/// See [`ChronicleHeader::magic`].
pub const CHRONICLE_MAGIC: [u8; 8] = *b"VARVECHR";
const _: () = assert!(size_of::<ChronicleHeader>() == SLOT_BYTES);
const _: () = assert!(core::mem::offset_of!(ChronicleHeader, version) == 8);

impl ChronicleHeader {
    /// A header with its checksum.
    pub fn new(group: [u8; 16], first_sequence: u64) -> Self {
        let mut header = Self {
            magic: CHRONICLE_MAGIC,
            version: FORMAT_VERSION.into(),
            reserved: [0; 6],
            group,
            first_sequence: first_sequence.into(),
            tail: [0; 84],
            crc: 0.into(),
        };
        header.crc = header.checksum().into();
        header
    }

    fn checksum(&self) -> u32 {
        crc32fast::hash(&self.as_bytes()[..core::mem::offset_of!(Self, crc)])
    }

    /// Reads the header from the start of a file.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let damaged = FormatError::Damaged("chronicle");
        let (header, _) = Self::read_from_prefix(bytes).map_err(|_| damaged.clone())?;
        if header.magic != CHRONICLE_MAGIC {
            return Err(damaged);
        }
        if header.version.get() != FORMAT_VERSION {
            return Err(FormatError::Version { what: "a chronicle", found: header.version.get() });
        }
        // Room for sequence numbers: one a nanosecond lasts for a century.
        let possible = header.reserved == [0; 6] && header.tail == [0; 84] && header.first_sequence.get() < 1 << 62;
        if header.crc.get() != header.checksum() || !possible {
            return Err(damaged);
        }
        Ok(header)
    }
}

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChronicleSlot {
    /// [`ChronicleHeader::first_sequence`] and the slot's number.
    pub sequence: U64,
    /// The event's height; of damage, the first one.
    pub height: U64,
    /// Its time.
    pub time_ns: U64,
    /// `Begin`: position. `RolledBack`: height of the point. `Damaged`: its end. Else zero.
    pub other: U64,
    /// `Begin`: epoch. `RolledBack`: time of the point. Else zero.
    pub more: U64,
    /// Which event.
    pub kind: u8,
    /// `GapBegin`: a [`GapReason`]. `Bookmark`: a [`Consistency`]. Else zero.
    pub detail: u8,
    /// Bytes of `text` in use.
    pub text_bytes: u8,
    /// Zero.
    pub reserved: u8,
    /// Number of the slot in its batch, from 0.
    pub index: U16,
    /// Slots of its batch.
    pub count: U16,
    /// `Begin`: the incarnation. `Bookmark`, `Keep`, `Release`: the name. `Damaged`: what. Zeroes behind.
    pub text: [u8; TEXT_BYTES_MAX],
    /// CRC-32 of the header's CRC and the bytes before.
    pub crc: U32,
}

const _: () = assert!(size_of::<ChronicleSlot>() == SLOT_BYTES);

const BEGIN: u8 = 1;
const GAP_BEGIN: u8 = 2;
const GAP_END: u8 = 3;
const BOOKMARK: u8 = 4;
const KEEP: u8 = 5;
const RELEASE: u8 = 6;
const ROLLED_BACK: u8 = 7;
const DAMAGED: u8 = 8;
const EXPIRED: u8 = 9;

impl ChronicleSlot {
    /// The slot of an event that is possible ([`Event::is_possible`]); `index` of `count` in its batch.
    pub fn new(header: &ChronicleHeader, sequence: u64, index: u16, count: u16, event: &Event) -> Self {
        let mut slot = Self::fields(event);
        slot.sequence = sequence.into();
        slot.index = index.into();
        slot.count = count.into();
        slot.crc = slot.checksum(header).into();
        slot
    }

    fn fields(event: &Event) -> Self {
        // height, time, other, more, detail, text
        let (kind, numbers, detail, text): (u8, [u64; 4], u8, &[u8]) = match event {
            Event::Begin { height, time_ns, incarnation, position, epoch } => {
                (BEGIN, [*height, *time_ns, *position, *epoch], 0, incarnation)
            }
            Event::GapBegin { height, time_ns, reason } => (GAP_BEGIN, [*height, *time_ns, 0, 0], *reason as u8, &[]),
            Event::GapEnd { height, time_ns } => (GAP_END, [*height, *time_ns, 0, 0], 0, &[]),
            Event::Bookmark { height, time_ns, name, consistency } => {
                (BOOKMARK, [*height, *time_ns, 0, 0], *consistency as u8, name.as_bytes())
            }
            Event::Keep { name } => (KEEP, [0; 4], 0, name.as_bytes()),
            Event::Release { name } => (RELEASE, [0; 4], 0, name.as_bytes()),
            Event::RolledBack { height, time_ns, to_height, to_time_ns } => {
                (ROLLED_BACK, [*height, *time_ns, *to_height, *to_time_ns], 0, &[])
            }
            Event::Damaged { from, to, what } => (DAMAGED, [*from, 0, *to, 0], 0, what.as_bytes()),
            Event::Expired { height, time_ns } => (EXPIRED, [*height, *time_ns, 0, 0], 0, &[]),
        };
        let bytes = text.len().min(TEXT_BYTES_MAX);
        let mut padded = [0; TEXT_BYTES_MAX];
        padded[..bytes].copy_from_slice(&text[..bytes]);
        let [height, time_ns, other, more] = numbers.map(U64::from);
        Self {
            sequence: 0.into(),
            height,
            time_ns,
            other,
            more,
            kind,
            detail,
            text_bytes: bytes as u8,
            reserved: 0,
            index: 0.into(),
            count: 0.into(),
            text: padded,
            crc: 0.into(),
        }
    }

    fn checksum(&self, header: &ChronicleHeader) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(header.crc.as_bytes());
        hasher.update(&self.as_bytes()[..core::mem::offset_of!(Self, crc)]);
        hasher.finalize()
    }

    /// The slot, if it is whole and of this file.
    pub fn decode(header: &ChronicleHeader, bytes: &[u8]) -> Option<Self> {
        let slot = Self::read_from_bytes(bytes).ok()?;
        (slot.crc.get() == slot.checksum(header)).then_some(slot)
    }

    /// Whether it says that it stands where it does: slot `number` of the file, in a batch that is possible.
    pub fn is_in_place(&self, header: &ChronicleHeader, number: u64) -> bool {
        let (index, count) = (u64::from(self.index.get()), u64::from(self.count.get()));
        let batch = index < count && count <= BATCH_SLOTS_MAX as u64 && index <= number;
        batch && header.first_sequence.get().checked_add(number) == Some(self.sequence.get())
    }

    /// Its event. `None`: no version of this layout says that.
    pub fn event(&self) -> Option<Event> {
        let [height, time_ns, other, more] = [self.height, self.time_ns, self.other, self.more].map(U64::get);
        let text = self.text.get(..usize::from(self.text_bytes))?;
        let string = || std::str::from_utf8(text).ok().map(str::to_owned);
        let event = match self.kind {
            BEGIN => Event::Begin { height, time_ns, incarnation: text.try_into().ok()?, position: other, epoch: more },
            GAP_BEGIN => Event::GapBegin { height, time_ns, reason: GapReason::from_number(self.detail)? },
            GAP_END => Event::GapEnd { height, time_ns },
            BOOKMARK => {
                let consistency = Consistency::from_number(self.detail)?;
                Event::Bookmark { height, time_ns, name: string()?, consistency }
            }
            KEEP => Event::Keep { name: string()? },
            RELEASE => Event::Release { name: string()? },
            ROLLED_BACK => Event::RolledBack { height, time_ns, to_height: other, to_time_ns: more },
            DAMAGED => Event::Damaged { from: height, to: other, what: string()? },
            EXPIRED => Event::Expired { height, time_ns },
            _ => return None,
        };
        // One form for each event: whatever a field says beyond it, no writer wrote.
        let mut same = Self::fields(&event);
        (same.sequence, same.index, same.count, same.crc) = (self.sequence, self.index, self.count, self.crc);
        (same == *self && event.is_possible()).then_some(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GROUP: [u8; 16] = [4; 16];

    fn events() -> Vec<Event> {
        vec![
            Event::Begin { height: 8, time_ns: 1, incarnation: [9; 16], position: 4096, epoch: 2 },
            Event::GapBegin { height: 8, time_ns: 1, reason: GapReason::InitialSync },
            Event::GapEnd { height: 16, time_ns: 2 },
            Event::Bookmark { height: 72, time_ns: 3, name: "b1".into(), consistency: Consistency::Crash },
            Event::Keep { name: "b1".into() },
            Event::Release { name: "b1".into() },
            Event::RolledBack { height: 80, time_ns: 4, to_height: 72, to_time_ns: 3 },
            Event::damaged(16, NO_END, "layer 3"),
            Event::Expired { height: 24, time_ns: 5 },
        ]
    }

    /// Files written by this version must be readable by every later one: these bytes are frozen.
    #[test]
    fn golden_bytes() {
        let header = ChronicleHeader::new(GROUP, 7);
        let mut golden = b"VARVECHR\x01\0\0\0\0\0\0\0".to_vec();
        golden.extend([4; 16]);
        golden.extend([7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(header.as_bytes()[..40], golden);
        assert_eq!(ChronicleHeader::decode(header.as_bytes()), Ok(header));

        let mut all = header.as_bytes().to_vec();
        for (number, event) in events().iter().enumerate() {
            let slot = ChronicleSlot::new(&header, 7 + number as u64, number as u16, 9, event);
            assert!(event.is_possible());
            assert_eq!(slot.kind, number as u8 + 1);
            assert_eq!(slot.event().as_ref(), Some(event));
            assert_eq!(ChronicleSlot::decode(&header, slot.as_bytes()), Some(slot));
            all.extend(slot.as_bytes());
        }
        let mut golden = vec![10, 0, 0, 0, 0, 0, 0, 0, 72, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0];
        golden.extend([0; 16]);
        golden.extend([4, 1, 2, 0, 3, 0, 9, 0, b'b', b'1', 0]);
        assert_eq!(all[4 * SLOT_BYTES..][..golden.len()], golden);
        assert_eq!(crc32fast::hash(&all), GOLDEN_CRC, "{:#x}", crc32fast::hash(&all));
    }

    const GOLDEN_CRC: u32 = 0x1d0e_e7db;

    #[test]
    fn lies_are_refused() {
        let header = ChronicleHeader::new(GROUP, 7);
        let other = ChronicleHeader::new([5; 16], 7);
        let slot = ChronicleSlot::new(&header, 9, 0, 1, &events()[2]);
        assert!(ChronicleSlot::decode(&other, slot.as_bytes()).is_none(), "of another group");
        assert!(slot.is_in_place(&header, 2) && !slot.is_in_place(&header, 3));
        let changes: [fn(&mut ChronicleSlot); 6] = [
            |slot| slot.kind = 10,
            |slot| slot.detail = 1,
            |slot| slot.other = 1.into(),
            |slot| slot.text_bytes = 77,
            |slot| slot.text[0] = 1,
            |slot| slot.reserved = 1,
        ];
        for change in changes {
            let mut changed = slot;
            change(&mut changed);
            assert_eq!(changed.event(), None, "{changed:?}");
        }
        let mut future = header;
        future.version = 2.into();
        assert!(matches!(ChronicleHeader::decode(future.as_bytes()), Err(FormatError::Version { found: 2, .. })));
        assert!(!Event::Damaged { from: 1, to: 1, what: "x".into() }.is_possible());
        assert!(!Event::Keep { name: "a b".into() }.is_possible());
        let long = Event::damaged(0, 1, &"ü".repeat(60));
        assert!(long.is_possible(), "{long:?}");
    }

    proptest! {
        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), bit in 0usize..1024) {
            let header = ChronicleHeader::new(GROUP, 1);
            let _ = ChronicleHeader::decode(&bytes);
            let _ = ChronicleSlot::decode(&header, &bytes);
            if let Ok(slot) = ChronicleSlot::read_from_bytes(&bytes[..bytes.len().min(SLOT_BYTES)]) {
                let _ = (slot.is_in_place(&header, 0), slot.event());
            }
            let mut damaged = ChronicleSlot::new(&header, 1, 0, 1, &events()[3]);
            damaged.as_mut_bytes()[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(ChronicleSlot::decode(&header, damaged.as_bytes()).is_none(), "any flipped bit is seen");
        }
    }
}
