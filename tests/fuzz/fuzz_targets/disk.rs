//! The fixed layouts on disk: as they come, and with magic and checksum put right (a fuzzer guesses neither). What
//! decodes is what was there; a slot of another version is never passed over in silence.
#![no_main]

use libfuzzer_sys::fuzz_target;
use varve_common::format::{
    APPLIED_MAGIC, AppliedSlot, BLOCK_BYTES, ENTRY_HEADER_BYTES, ENTRY_MAGIC, EntryHeader, FORMAT_VERSION, FormatError,
    Mark, MarkKind, SEGMENT_MAGIC, SegmentHeader,
};
use varve_fuzz::known;
use varve_receiver::group::stream::{StreamState, frame_of};
use zerocopy::{FromBytes, IntoBytes};

fuzz_target!(|data: &[u8]| {
    let Some((&what, bytes)) = data.split_first() else { return };
    match what % 4 {
        0 => segment(bytes),
        1 => entry(bytes),
        2 => mark(bytes),
        _ => applied(bytes),
    }
});

fn mend(bytes: &mut [u8], crc_at: usize) {
    let crc = crc32fast::hash(&bytes[..crc_at]);
    bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
}

fn segment(bytes: &[u8]) {
    let _ = SegmentHeader::decode(bytes);
    let Some(head) = bytes.first_chunk::<56>() else { return };
    let mut head = *head;
    head[..8].copy_from_slice(&SEGMENT_MAGIC);
    mend(&mut head, 48);
    match SegmentHeader::decode(&head) {
        Ok(header) => assert_eq!((header.as_bytes(), header.version.get()), (&head[..], FORMAT_VERSION)),
        Err(error) => assert!(matches!(error, FormatError::Version { found, .. } if found != FORMAT_VERSION)),
    }
    head[20] ^= 1;
    assert!(SegmentHeader::decode(&head).is_err(), "damage is seen");
}

fn entry(bytes: &[u8]) {
    let _ = EntryHeader::decode(bytes, 1, 4096);
    let Some(head) = bytes.first_chunk::<ENTRY_HEADER_BYTES>() else { return };
    let mut head = *head;
    head[..4].copy_from_slice(&ENTRY_MAGIC.to_le_bytes());
    mend(&mut head, 68);
    let header = EntryHeader::read_from_bytes(&head).expect("its size");
    let (segment, offset) = (header.segment.get(), header.offset.get());
    assert_eq!(EntryHeader::decode(&head, segment, offset), Some(header));
    assert_eq!(header.encode(), head);
    assert!(EntryHeader::decode(&head, segment.wrapping_add(1), offset).is_none());
    assert!(EntryHeader::decode(&head, segment, offset.wrapping_add(4096)).is_none());
    assert!(header.total_bytes() >= ENTRY_HEADER_BYTES + header.body_bytes.get() as usize);
    let _ = frame_of(&header);
}

fn mark(bytes: &[u8]) {
    let Some(mark) = Mark::decode(bytes) else { return };
    if !(known::GAP_ENDS_WITH_UNKNOWN_REASONS_ARE_TAKEN && mark.kind == MarkKind::GapEnd) {
        assert_eq!(mark.encode(), bytes, "one form");
    }
    let mut state = StreamState::fresh();
    if state.admits(&mark) {
        state.pass(&varve_receiver::landing::batch::Effect::Mark(mark));
        assert!(state.begun() && !state.is_consistent(), "a begin opens a gap, and nothing else begins a stream");
    }
}

fn applied(bytes: &[u8]) {
    let _ = AppliedSlot::newest(bytes);
    let mut slots = [0u8; 256];
    let taken = bytes.len().min(slots.len());
    slots[..taken].copy_from_slice(&bytes[..taken]);
    let mut file = vec![0; 2 * BLOCK_BYTES];
    // The last byte says which of the two are whole.
    let whole = bytes.last().copied().unwrap_or(3);
    for (index, slot) in slots.chunks_exact_mut(128).enumerate() {
        slot[..8].copy_from_slice(&APPLIED_MAGIC);
        mend(slot, 124);
        if whole & (1 << index) == 0 {
            slot[100] ^= 0xFF;
        }
        file[index * BLOCK_BYTES..][..128].copy_from_slice(slot);
    }
    let read = [AppliedSlot::decode(&file[..BLOCK_BYTES]), AppliedSlot::decode(&file[BLOCK_BYTES..])];
    let foreign = |slot: &Result<AppliedSlot, FormatError>| matches!(slot, Err(FormatError::Version { .. }));
    match AppliedSlot::newest(&file) {
        Ok(slot) => {
            assert!(read.iter().flatten().all(|other| other.sequence.get() <= slot.sequence.get()));
            let passed_over = read.iter().any(foreign) && !known::A_NEWER_SLOT_IS_PASSED_OVER;
            assert!(!passed_over, "a newer program's slot was passed over");
            let possible = slot.consistent <= slot.ever_consistent && slot.ever_consistent <= 1;
            if known::IMPOSSIBLE_SLOTS_ARE_TAKEN && !possible {
                return;
            }
            assert!(possible, "consistent now and never");
            let state = StreamState::from_slot(&slot);
            let mut again = slot;
            state.to_slot(&mut again);
            assert_eq!(StreamState::from_slot(&again), state, "from_slot and to_slot agree");
        }
        Err(FormatError::Version { .. }) => assert!(read.iter().any(foreign)),
        Err(FormatError::Damaged(_)) => assert!(read.iter().all(Result::is_err)),
    }
}
