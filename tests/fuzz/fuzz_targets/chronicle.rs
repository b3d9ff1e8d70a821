//! The chronicle. Any slots behind a right header give what a slot can say or nothing; a file with damage gives only what
//! was written, where it was written. Any events in any order give a chronicle that answers every question without
//! contradicting itself, and that is the same when it is written with the fewest events.
#![no_main]

use libfuzzer_sys::fuzz_target;
use varve_common::format::chronicle::{ChronicleHeader, ChronicleSlot, Event, SLOT_BYTES};
use varve_common::point::{Consistency, PointSpec};
use varve_common::state::GapReason;
use varve_fuzz::Input;
use varve_timeline::chronicle::recover::recover;
use varve_timeline::chronicle::{Chronicle, HeightTime, PointError, Times};
use zerocopy::IntoBytes;

const GROUP: [u8; 16] = [4; 16];
const EVENTS_MAX: usize = 64;

/// As if every multiple of 8 were a record, with its height for a time.
struct EveryHeight;

impl Times for EveryHeight {
    fn at_or_before(&self, time_ns: u64) -> Option<HeightTime> {
        Some((time_ns & !7, time_ns & !7))
    }

    fn after(&self, time_ns: u64) -> Option<HeightTime> {
        let height = (time_ns & !7).checked_add(8)?;
        Some((height, height))
    }

    fn at_height(&self, height: u64) -> Option<HeightTime> {
        Some((height & !7, height & !7))
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    match input.u8() % 3 {
        0 => raw(input.0),
        1 => damaged(&mut input),
        _ => {
            let events = events(&mut input);
            answers(&events);
        }
    }
});

/// Bytes as they come, and with the checksums put right.
fn raw(bytes: &[u8]) {
    let _ = ChronicleHeader::decode(bytes);
    let header = ChronicleHeader::new(GROUP, 1);
    let mut bytes = bytes.to_vec();
    for mended in [false, true] {
        if mended {
            for slot in bytes.chunks_exact_mut(SLOT_BYTES) {
                let mut hasher = crc32fast::Hasher::new();
                hasher.update(header.crc.as_bytes());
                hasher.update(&slot[..SLOT_BYTES - 4]);
                let crc = hasher.finalize();
                slot[SLOT_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
            }
        }
        let recovered = recover(&header, &bytes);
        let slots = bytes.len().div_ceil(SLOT_BYTES);
        assert_eq!(recovered.events.len() + recovered.cut, slots);
        assert_eq!(recovered.lost, recovered.events.iter().filter(|event| event.is_none()).count());
        let found: Vec<Event> = recovered.events.into_iter().flatten().collect();
        assert!(found.iter().all(Event::is_possible));
        answers(&found);
    }
}

fn damaged(input: &mut Input<'_>) {
    let (place, bit, batch) = (usize::from(input.u16()), input.u8() % 8, 1 + usize::from(input.u8() % 5));
    let events = events(input);
    if events.is_empty() {
        return;
    }
    let header = ChronicleHeader::new(GROUP, 7);
    let mut bytes = Vec::new();
    for (number, part) in events.chunks(batch).enumerate() {
        for (index, event) in part.iter().enumerate() {
            let sequence = 7 + (number * batch + index) as u64;
            bytes.extend(ChronicleSlot::new(&header, sequence, index as u16, part.len() as u16, event).as_bytes());
        }
    }
    let place = place % bytes.len();
    bytes[place] ^= 1 << bit;
    let recovered = recover(&header, &bytes);
    for (number, (found, written)) in recovered.events.iter().zip(&events).enumerate() {
        match found {
            Some(found) => assert_eq!(found, written),
            None => assert_eq!(number, place / SLOT_BYTES, "only what was damaged is lost"),
        }
    }
    let newest = (events.len() - 1) / batch * batch;
    let in_newest = place / SLOT_BYTES >= newest;
    let expected = if in_newest { newest } else { events.len() };
    assert_eq!(recovered.events.len(), expected, "only a batch that may have been torn is cut, and all of it");
}

/// Events whose heights mostly rise, as they do.
fn events(input: &mut Input<'_>) -> Vec<Event> {
    let (mut events, mut height) = (Vec::new(), 0u64);
    while !input.is_empty() && events.len() < EVENTS_MAX {
        let (kind, step) = (input.u8(), input.u8());
        height = if step == 255 { input.u64() } else { height.saturating_add(u64::from(step) * 8) };
        let (time_ns, name) = (height, format!("b{}", kind >> 4 & 3));
        events.push(match kind & 15 {
            0..=2 => {
                let (incarnation, position) = ([1 + (kind >> 4 & 3); 16], u64::from(input.u16()) * 8);
                Event::Begin { height, time_ns, incarnation, position, epoch: 1 }
            }
            3..=5 => {
                let reason = GapReason::from_number(1 + (kind >> 4) % 12).expect("a reason");
                Event::GapBegin { height, time_ns, reason }
            }
            6..=8 => Event::GapEnd { height, time_ns },
            9 | 10 => Event::Bookmark { height, time_ns, name, consistency: Consistency::Crash },
            11 => Event::Keep { name },
            12 => Event::Release { name },
            13 if height > 0 => Event::RolledBack { height, time_ns, to_height: height - 1, to_time_ns: 0 },
            14 if height < u64::MAX => Event::damaged(height, height.saturating_add(1 + u64::from(input.u16())), "x"),
            _ => Event::Expired { height, time_ns },
        });
    }
    events
}

fn answers(events: &[Event]) {
    let mut chronicle = Chronicle::default();
    for event in events {
        chronicle.apply(event);
    }
    let fewest = chronicle.events();
    assert!(fewest.iter().all(Event::is_possible));
    let mut again = Chronicle::default();
    for event in &fewest {
        again.apply(event);
    }
    let named = events.iter().filter_map(|event| match event {
        Event::Begin { height, .. }
        | Event::GapBegin { height, .. }
        | Event::GapEnd { height, .. }
        | Event::Bookmark { height, .. }
        | Event::RolledBack { height, .. }
        | Event::Expired { height, .. }
        | Event::Damaged { from: height, .. } => Some(*height),
        Event::Keep { .. } | Event::Release { .. } => None,
    });
    let heights: Vec<u64> = named
        .flat_map(|height| [height.saturating_sub(8), height, height.saturating_add(1), height.saturating_add(8)])
        .collect();
    for &height in &heights {
        assert_eq!(chronicle.is_point(height), again.is_point(height), "{height}");
        if height >= chronicle.oldest().0 {
            assert_eq!(chronicle.position_of(height), again.position_of(height), "{height}");
        }
        let (below, above) = chronicle.neighbours(height);
        assert!(below.is_none_or(|below| below <= height && chronicle.is_point(below)));
        assert!(above.is_none_or(|above| above >= height && chronicle.is_point(above)));
        assert_eq!(chronicle.is_point(height), below == Some(height));
        assert_eq!(chronicle.is_point(height), above == Some(height));
        let newest = heights.iter().copied().max().unwrap_or(0);
        located(&chronicle, &PointSpec::Time(height), newest);
        if let Some((incarnation, offset)) = chronicle.position_of(height) {
            let incarnation_prefix = format!("{:02x}", incarnation[0]).repeat(4);
            located(&chronicle, &PointSpec::Position { incarnation_prefix, offset }, newest);
        }
    }
    for name in ["b0", "b1", "b2", "b3", "b4"] {
        located(&chronicle, &PointSpec::Bookmark(name.to_owned()), u64::MAX);
    }
    located(&chronicle, &PointSpec::Latest, u64::MAX);
    let _ = chronicle.report("db", (None, None), &EveryHeight, 0, (u64::MAX, u64::MAX));
}

fn located(chronicle: &Chronicle, spec: &PointSpec, newest: u64) {
    match chronicle.locate(spec, 0, &EveryHeight, 0, (newest, newest)) {
        Ok(point) => assert!(chronicle.is_point(point.height) && point.height <= newest, "{spec:?} {point:?}"),
        Err(error) => {
            let sides = match &error {
                PointError::InGap { before, after, .. } | PointError::Damaged { before, after, .. } => {
                    [*before, *after]
                }
                PointError::BeforeWindow { first } => [Some(*first), None],
                _ => [None, None],
            };
            assert!(sides.iter().flatten().all(|side| chronicle.is_point(side.0)), "{spec:?} {error:?}");
            let problem = error.problem("db", &spec.to_string());
            assert!(!problem.what.is_empty() && !problem.why.is_empty() && !problem.next.is_empty());
        }
    }
}
