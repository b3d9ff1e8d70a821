use super::*;
use crate::entry::Address;
use proptest::prelude::*;
use std::fs::OpenOptions;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::time::SystemTime;
use varve_common::format::layer::Point;

const GROUP: [u8; 16] = [3; 16];
const BLOCK: u64 = BLOCK_BYTES as u64;

/// In memory where that is possible: thousands of files are synced.
fn directory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.expect("directory")
}

#[derive(Clone, Copy, Debug)]
enum Content {
    Zero,
    ZeroBytes,
    Text,
    Noise,
}

#[derive(Clone, Debug)]
struct Change {
    address: Address,
    height: u64,
    plain: Vec<u8>,
    as_zero: bool,
}

pub(super) fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..bytes).map(step).collect()
}

fn content(kind: Content, seed: u64, bytes: usize) -> Vec<u8> {
    match kind {
        Content::Zero | Content::ZeroBytes => vec![0; bytes],
        Content::Text => format!("{seed} and again ").into_bytes().into_iter().cycle().take(bytes).collect(),
        Content::Noise => noise(seed, bytes),
    }
}

impl Change {
    fn new(place: (u16, u64, u16, u16), height: u64, kind: Content, seed: u64) -> Self {
        let (volume, granule, sector, sectors) = place;
        let sectors = sectors.min(GRANULE_SECTORS - sector);
        let address = Address::new(volume, granule * u64::from(GRANULE_SECTORS) + u64::from(sector));
        let plain = content(kind, seed, usize::from(sectors) * 512);
        Self { address, height, plain, as_zero: matches!(kind, Content::Zero) }
    }

    fn push(&self, chunk: &mut Chunk) {
        let sectors = (self.plain.len() / 512) as u16;
        assert!(chunk.fits(sectors));
        let before = if self.as_zero { Before::Zero { sectors } } else { Before::Bytes(&self.plain) };
        chunk.push(self.address, self.height, before).expect("push");
    }

    fn is(&self, entry: &Entry) -> bool {
        let sectors = (self.plain.len() / 512) as u16;
        (self.address, self.height, sectors, sectors, 0)
            == (entry.address, entry.height, entry.sectors, entry.record_sectors, entry.skip)
    }
}

fn read(file: &LayerFile, entry: &Entry) -> Result<Vec<u8>, HistoryError> {
    let mut out = vec![0xaa; usize::from(entry.sectors) * 512];
    file.read(entry, &mut out).map(|()| out)
}

fn append(
    layer: &mut OpenLayer,
    chunk: &mut Chunk,
    changes: &[Change],
    points: &[Point],
    complete_to: u64,
) -> Vec<Entry> {
    chunk.begin(layer.complete_to());
    changes.iter().for_each(|change| change.push(chunk));
    points.iter().for_each(|point| chunk.point(point.height, point.time_ns).expect("point"));
    let info = layer.append(chunk, complete_to).expect("append");
    let entries: Vec<Entry> = chunk.entries(layer.number(), info.offset).collect();
    assert_eq!((entries.len(), info.records as usize), (changes.len(), changes.len()));
    entries
}

/// A layer of three small chunks, closed: its changes and entries by chunk.
fn small(dir: &Path) -> (Vec<Vec<Change>>, Vec<Vec<Entry>>, Vec<ChunkInfo>) {
    let mut layer = OpenLayer::create(dir, GROUP, 1, 96, 1000).expect("create");
    let mut chunk = Chunk::new();
    let kinds = [Content::Noise, Content::Text, Content::Zero, Content::Noise, Content::Text];
    let (mut changes, mut entries) = (Vec::new(), Vec::new());
    for number in 0..3u64 {
        let change = |i: usize| {
            let place = (i as u16 % 2, number * 7 + i as u64, i as u16 * 3, 1 + i as u16 * 2);
            Change::new(place, 104 + number * 80 + i as u64 * 8, kinds[i], number * 10 + i as u64)
        };
        let some: Vec<Change> = (0..kinds.len()).map(change).collect();
        let points: Vec<Point> =
            some.iter().map(|change| Point { height: change.height, time_ns: 1000 + change.height * 3 }).collect();
        entries.push(append(&mut layer, &mut chunk, &some, &points, 104 + number * 80 + 72));
        changes.push(some);
    }
    let chunks = layer.chunks().to_vec();
    assert_eq!(layer.close(SystemTime::now()).expect("close").bytes(), chunks[2].end());
    (changes, entries, chunks)
}

/// What recovery found is a beginning of what was written, and nothing reads wrong. With damage in it: a part of it.
fn check(dir: &Path, changes: &[Change], entries: &[Entry], what: &str) -> Recovered {
    let (layer, found) = match OpenLayer::open(dir, GROUP, 1) {
        Ok(opened) => opened,
        Err(HistoryError::Format { .. } | HistoryError::Damaged { .. }) => return Recovered::default(),
        Err(e) => panic!("{what}: {e}"),
    };
    let reader = layer.reader();
    if found.damage.is_empty() {
        assert_eq!(found.entries, entries[..found.entries.len()], "{what}");
    }
    for entry in &found.entries {
        let index = entries.iter().position(|written| written == entry).unwrap_or_else(|| panic!("{what}: {entry:?}"));
        match read(&reader, entry) {
            Ok(plain) => assert!(plain == changes[index].plain, "{what}: {entry:?}"),
            Err(HistoryError::Damaged { .. }) => assert!(found.chunks.len() > 1, "{what}: the last chunk was checked"),
            Err(e) => panic!("{what}: {e}"),
        }
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn what_was_appended_comes_back(
        raw in prop::collection::vec(
            ((0u16..3, 0u64..1 << 30, 0u16..128, 1u16..=128), 0u64..5, prop::sample::select(vec![Content::Zero, Content::ZeroBytes, Content::Text, Content::Noise]), any::<bool>(), 0u64..4),
            1..120,
        ),
        reopen in any::<bool>(),
    ) {
        let dir = directory();
        let mut layer = OpenLayer::create(dir.path(), GROUP, 4, 40, 100).expect("create");
        let mut chunk = Chunk::new();
        let (mut changes, mut entries, mut points, mut all_points) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut pending, mut height, mut time_ns) = (Vec::new(), 40u64, 100u64);
        for (index, (place, rise, kind, cut, later)) in raw.iter().enumerate() {
            height += rise * 8;
            time_ns += later * 1_000_000;
            if *rise > 0 { points.push(Point { height, time_ns }); }
            // A stamp that its neighbour has as well, or that is out of order, is as good.
            let stamp = (height + 1).max(41);
            pending.push(Change::new(*place, stamp, *kind, index as u64));
            if *cut || index + 1 == raw.len() {
                height += 8;
                let complete_to = height;
                let got = append(&mut layer, &mut chunk, &pending, &points, complete_to);
                all_points.push(std::mem::take(&mut points));
                entries.extend(got);
                changes.append(&mut pending);
                if reopen && *cut {
                    let (again, found) = OpenLayer::open(dir.path(), GROUP, 4).expect("open");
                    prop_assert_eq!(&found.chunks[..], layer.chunks());
                    prop_assert!(!found.torn && found.damage.is_empty());
                    layer = again;
                }
            }
        }
        let (chunks, complete_to) = (layer.chunks().to_vec(), layer.complete_to());
        let reader = layer.reader();
        let (again, found) = OpenLayer::open(dir.path(), GROUP, 4).expect("open");
        prop_assert_eq!((again.complete_to(), again.bytes(), again.records()), (complete_to, layer.bytes(), entries.len()));
        prop_assert_eq!((&found.entries, &found.chunks, found.complete_to), (&entries, &chunks, complete_to));
        prop_assert_eq!(found.points as usize, all_points.iter().map(Vec::len).sum::<usize>());
        let closed = layer.close(SystemTime::now()).expect("close");
        let opened = LayerFile::open(dir.path(), GROUP, 4).expect("open");
        prop_assert_eq!(opened.load().expect("load"), found);
        prop_assert_eq!(opened.chunks().expect("chunks"), (chunks.clone(), vec![]));
        prop_assert_eq!((opened.first_height(), opened.time_ns(), opened.number()), (40, 100, 4));
        for (index, (change, entry)) in changes.iter().zip(&entries).enumerate() {
            prop_assert!(change.is(entry), "{:?}", entry);
            prop_assert!(!change.as_zero || entry.stored == Stored::Zero);
            for file in [&reader, &closed, &opened] {
                prop_assert!(read(file, entry).expect("read") == change.plain);
            }
            // A part of it, as a merge leaves it, and by way of a caller's own reads.
            let skip = index as u16 % entry.sectors;
            let part = entry.part(entry.address.in_granule() + skip, (entry.sectors - skip).div_ceil(2));
            let wanted = &change.plain[usize::from(skip) * 512..][..usize::from(part.sectors) * 512];
            prop_assert!(read(&opened, &part).expect("read") == wanted);
            let plan = opened.plan_read(&part).expect("plan");
            let mut buf = vec![0; plan.bytes + 4096];
            let aligned = buf.as_ptr().align_offset(4096);
            let block = &mut buf[aligned..aligned + plan.bytes];
            if plan.bytes > 0 { opened.file().read_exact_at(block, plan.offset).expect("read"); }
            let mut out = vec![1; wanted.len()];
            let stored = block.get(plan.inner..plan.inner + part.stored_bytes as usize).unwrap_or_default();
            opened.finish_read(&part, stored, &mut out).expect("finish");
            prop_assert!(out == wanted);
        }
        for (info, points) in chunks.iter().zip(&all_points) {
            prop_assert_eq!(&opened.points(info).expect("points"), points);
            if let (Some(first), Some(last)) = (points.first(), points.last()) {
                prop_assert_eq!((info.first_time_ns, info.last_time_ns), (first.time_ns, last.time_ns));
            }
        }
        let scanned = opened.scan(|_| ControlFlow::Continue(())).expect("scan");
        prop_assert_eq!((scanned.records, scanned.damaged_records, scanned.bytes), (entries.len() as u64, 0, opened.bytes()));
        prop_assert!(scanned.damage.is_empty() && scanned.complete_to == complete_to);
    }
}

#[test]
fn every_length_gives_a_beginning() {
    let dir = directory();
    let (changes, entries, chunks) = small(dir.path());
    let (changes, entries) = (changes.concat(), entries.concat());
    let path = path_of(dir.path(), 1);
    let file = OpenOptions::new().write(true).open(&path).expect("open");
    let length = chunks[2].end();
    for cut in (0..length).rev() {
        if cut % 3 != 0 && !(cut + 2..=cut + 4).contains(&length) {
            continue;
        }
        file.set_len(cut).expect("cut");
        let found = check(dir.path(), &changes, &entries, &format!("cut at {cut}"));
        let whole = chunks.iter().filter(|chunk| chunk.end() <= cut).count();
        assert_eq!(found.chunks, chunks[..whole], "cut at {cut}");
        assert!(found.damage.is_empty());
        let Ok(layer) = LayerFile::open(dir.path(), GROUP, 1) else {
            assert!(cut < BLOCK);
            continue;
        };
        let scanned = layer.scan(|_| ControlFlow::Continue(())).expect("scan");
        let end = chunks[..whole].last().map_or(BLOCK, ChunkInfo::end);
        assert_eq!(scanned.damage.is_empty(), cut == end, "cut at {cut}: {scanned:?}");
        assert!(scanned.complete_to < chunks[2].complete_to, "the next layer begins later");
        for (change, entry) in changes.iter().zip(&entries) {
            let there = entry.stored == Stored::Zero || u64::from(entry.offset) + u64::from(entry.stored_bytes) <= cut;
            match read(&layer, entry) {
                Ok(plain) => assert!(there && plain == change.plain),
                Err(HistoryError::Damaged { .. }) => assert!(!there),
                Err(e) => panic!("{e}"),
            }
        }
    }
}

#[test]
fn every_flipped_bit_is_seen() {
    let dir = directory();
    let (changes, entries, chunks) = small(dir.path());
    let (by_chunk, changes, entries) = (entries.clone(), changes.concat(), entries.concat());
    let path = path_of(dir.path(), 1);
    let file = OpenOptions::new().read(true).write(true).open(&path).expect("open");
    let good = std::fs::read(&path).expect("read");
    let data_end =
        |chunk: usize| by_chunk[chunk].iter().map(|e| u64::from(e.offset + e.stored_bytes)).max().expect("one");
    for at in 0..good.len() as u64 {
        let chunk = chunks.iter().position(|chunk| (chunk.offset..chunk.end()).contains(&at));
        // All bits of what steers, one of each byte of data.
        let steers = chunk.is_none_or(|chunk| at < data_start(chunks[chunk].offset) || at >= data_end(chunk));
        let bits = if steers && good[at as usize] != 0 { 0..8 } else { (at % 8) as u32..(at % 8) as u32 + 1 };
        for bit in bits {
            file.write_all_at(&[good[at as usize] ^ 1 << bit], at).expect("write");
            let what = format!("bit {bit} of byte {at} in {chunk:?}");
            let found = check(dir.path(), &changes, &entries, &what);
            let mut damaged = 0;
            let whole;
            if let Ok(layer) = LayerFile::open(dir.path(), GROUP, 1) {
                let scanned = layer
                    .scan(|finding| {
                        damaged += u64::from(matches!(finding, Finding::Record { .. }));
                        ControlFlow::Continue(())
                    })
                    .expect("scan");
                assert_eq!(scanned.damaged_records, damaged, "{what}");
                whole = scanned.damage.is_empty();
                assert!(scanned.complete_to == chunks[2].complete_to || chunk == Some(2), "{what}: it goes on behind");
                if !whole {
                    assert_eq!(scanned.damage.len(), 1, "{what}: {:?}", scanned.damage);
                    let damage = scanned.damage[0];
                    let lost = chunk.expect("a chunk");
                    assert_eq!(
                        (damage.offset, damage.bytes),
                        (chunks[lost].offset, u64::from(chunks[lost].bytes)),
                        "{what}"
                    );
                    assert_eq!(damage.first_height, chunks[lost].first_height, "{what}");
                    let next = by_chunk.get(lost + 1).map(|entries| entries[0].height);
                    assert_eq!(damage.whole_from, next, "{what}");
                }
                let expected = match chunk {
                    Some(2) if found.chunks.len() < 3 => (2, 0),
                    Some(lost) if !whole => (2, usize::from(lost < 2)),
                    _ => (3, 0),
                };
                assert_eq!((found.chunks.len(), found.damage.len()), expected, "{what}");
            } else {
                assert!(chunk.is_none(), "{what}");
                continue;
            }
            let padding = match chunk {
                None => at >= size_of::<varve_common::format::layer::LayerHeader>() as u64,
                Some(_) => good[at as usize..].iter().take((BLOCK - at % BLOCK) as usize).all(|&byte| byte == 0),
            };
            assert!(padding || damaged > 0 || !whole, "{what} was not seen");
            assert!(damaged == 0 || whole, "{what}");
        }
        file.write_all_at(&good[at as usize..=at as usize], at).expect("write");
    }
}

#[test]
fn an_append_may_be_torn_anywhere() {
    let dir = directory();
    let (changes, entries, chunks) = small(dir.path());
    let path = path_of(dir.path(), 1);
    let good = std::fs::read(&path).expect("read");
    let (from, blocks) = (chunks[2].offset as usize, chunks[2].bytes as usize / BLOCK_BYTES);
    assert!(blocks >= 2);
    let (kept, kept_entries) = (changes[..2].concat(), entries[..2].concat());
    for written in 0..(1u32 << blocks) - 1 {
        let mut bytes = good.clone();
        bytes.extend_from_slice(&[0; 4 * BLOCK_BYTES]);
        for block in (0..blocks).filter(|block| written & 1 << block == 0) {
            bytes[from + block * BLOCK_BYTES..][..BLOCK_BYTES].fill(0);
        }
        std::fs::write(&path, &bytes).expect("write");
        let (mut layer, found) = OpenLayer::open(dir.path(), GROUP, 1).expect("open");
        assert_eq!((&found.entries, found.complete_to), (&kept_entries, chunks[1].complete_to), "{written:b}");
        assert!(found.damage.is_empty() && found.torn == (written != 0), "{written:b}: {found:?}");
        assert_eq!(std::fs::read(&path).expect("read"), bytes, "to open it changes nothing");
        // What comes next is shorter than what was torn: nothing of that is left behind it.
        let mut chunk = Chunk::new();
        let next = Change::new((1, 5, 0, 1), 200_001, Content::Text, 1);
        let more = append(&mut layer, &mut chunk, std::slice::from_ref(&next), &[], 200_008);
        assert!(layer.bytes() < from as u64 + u64::from(chunks[2].bytes));
        let rest = std::fs::read(&path).expect("read").split_off(layer.bytes() as usize);
        assert!(rest.iter().all(|&byte| byte == 0), "{written:b}");
        drop(layer);
        let (layer, again) = OpenLayer::open(dir.path(), GROUP, 1).expect("open");
        assert_eq!(again.entries, [&kept_entries[..], &more].concat());
        assert!(again.damage.is_empty() && again.complete_to == 200_008);
        let closed = layer.close(SystemTime::now()).expect("close");
        assert!(closed.load().expect("load").damage.is_empty());
        for (change, entry) in kept.iter().chain([&next]).zip(&again.entries) {
            assert_eq!(read(&closed, entry).expect("read"), change.plain);
        }
    }
}

#[test]
fn an_open_layer_goes_on_behind_damage() {
    let dir = directory();
    let (changes, entries, chunks) = small(dir.path());
    let file = OpenOptions::new().write(true).open(path_of(dir.path(), 1)).expect("open");
    file.write_all_at(&[0xff; 16], chunks[1].offset).expect("write");
    let (mut layer, found) = OpenLayer::open(dir.path(), GROUP, 1).expect("open");
    let damage = Damage {
        offset: chunks[1].offset,
        bytes: u64::from(chunks[1].bytes),
        first_height: chunks[0].complete_to,
        whole_from: Some(changes[2][0].height),
        case: 'B',
        why: "a chunk's header is gone",
    };
    assert_eq!((&found.damage[..], found.complete_to, found.torn), (&[damage][..], chunks[2].complete_to, false));
    assert_eq!(found.entries, [&entries[0][..], &entries[2]].concat());
    let next = Change::new((0, 1, 0, 8), 5001, Content::Noise, 1);
    append(&mut layer, &mut Chunk::new(), &[next], &[], 5008);
    let (_, again) = OpenLayer::open(dir.path(), GROUP, 1).expect("open");
    assert_eq!((again.damage, again.chunks.len(), again.complete_to), (vec![damage], 3, 5008));
}

#[test]
fn a_chunk_that_was_cut_out_is_missed() {
    let dir = directory();
    let mut layer = OpenLayer::create(dir.path(), GROUP, 1, 0, 0).expect("create");
    let mut chunk = Chunk::new();
    let change = |height| [Change::new((0, height, 0, 8), height, Content::Noise, height)];
    append(&mut layer, &mut chunk, &change(8), &[], 8);
    append(&mut layer, &mut chunk, &change(16), &[], 16);
    let before = std::fs::read(path_of(dir.path(), 1)).expect("read");
    let chunks = layer.chunks().to_vec();
    drop(layer);
    // The same place written by another life of the layer: whole, but it does not continue what is before it.
    std::fs::remove_file(path_of(dir.path(), 1)).expect("remove");
    let mut layer = OpenLayer::create(dir.path(), GROUP, 1, 0, 0).expect("create");
    append(&mut layer, &mut chunk, &change(7), &[], 8);
    assert_eq!(layer.bytes(), chunks[0].end());
    drop(layer);
    let file = OpenOptions::new().write(true).open(path_of(dir.path(), 1)).expect("open");
    let (from, to) = (chunks[1].offset as usize, chunks[1].end() as usize);
    file.write_all_at(&before[from..to], from as u64).expect("write");
    let (_, found) = OpenLayer::open(dir.path(), GROUP, 1).expect("open");
    assert_eq!((found.chunks.len(), found.damage.len()), (2, 1));
    assert_eq!((found.damage[0].case, found.damage[0].bytes, found.damage[0].whole_from), ('G', 0, Some(16)));
}

#[test]
fn what_is_not_ours_is_refused() {
    let dir = directory();
    let (_, entries, _) = small(dir.path());
    let text = |result: Result<LayerFile, HistoryError>| result.expect_err("refused").to_string();
    assert!(text(LayerFile::open(dir.path(), [9; 16], 1)).ends_with("it is a layer of another group"));
    assert!(matches!(LayerFile::open(dir.path(), GROUP, 2), Err(HistoryError::Missing { .. })));
    assert!(matches!(OpenLayer::open(dir.path(), GROUP, 2), Err(HistoryError::Missing { .. })));
    assert!(OpenLayer::create(dir.path(), GROUP, 1, 0, 0).is_err(), "it exists");
    std::fs::copy(path_of(dir.path(), 1), path_of(dir.path(), 2)).expect("copy");
    assert!(text(LayerFile::open(dir.path(), GROUP, 2)).ends_with("it is layer 1"));
    std::fs::write(dir.path().join("0000000007.new"), b"half made").expect("write");
    std::fs::write(dir.path().join("7.layer"), b"not a name of ours").expect("write");
    assert_eq!(list(dir.path()).expect("list"), [1, 2]);
    assert!(!dir.path().join("0000000007.new").exists());

    let file = LayerFile::open(dir.path(), GROUP, 1).expect("open");
    let entry = entries[0][0];
    let impossible = [
        Entry { layer: 2, ..entry },
        Entry { offset: 4096, ..entry },
        Entry { offset: u32::MAX, ..entry },
        Entry { sectors: 2, ..entry },
        Entry { crc: entry.crc ^ 1, ..entry },
        Entry { offset: entry.offset + 1, ..entry },
    ];
    for entry in impossible {
        assert!(matches!(read(&file, &entry), Err(HistoryError::Damaged { .. })), "{entry:?}");
    }
}

#[test]
fn what_does_not_fit_is_not_added() {
    let mut chunk = Chunk::new();
    chunk.begin(80);
    let bytes = vec![1; 65536];
    let mut push = |sector, height, bytes: &[u8]| chunk.push(Address::new(0, sector), height, Before::Bytes(bytes));
    assert!(matches!(push(0, 88, &bytes[..100]), Err(HistoryError::Limit { .. })), "not whole sectors");
    assert!(matches!(push(0, 88, &[]), Err(HistoryError::Limit { .. })));
    assert!(matches!(push(1, 88, &bytes), Err(HistoryError::Limit { .. })), "crosses a granule");
    assert!(matches!(push(0, 80, &bytes), Err(HistoryError::Order { .. })), "older than the chunk");
    assert!(matches!(chunk.point(80, 1), Err(HistoryError::Order { .. })));
    assert!(matches!(chunk.point(89, 1), Err(HistoryError::Order { .. })));
    assert!(chunk.is_empty());
    chunk.point(88, 10).expect("point");
    chunk.point(96, 5).expect("a time that went back counts as the one before");
    assert!(matches!(chunk.point(96, 5), Err(HistoryError::Order { .. })));

    // Filled to the brim, the chunk is as long as it may be, and not longer.
    let dir = directory();
    let mut layer = OpenLayer::create(dir.path(), GROUP, 1, 80, 0).expect("create");
    let mut count = 0u64;
    for sectors in [128u16, 1] {
        while chunk.fits(sectors) {
            let change = Change::new((0, count, 0, sectors), 89 + count, Content::Noise, count);
            change.push(&mut chunk);
            count += 1;
        }
    }
    let over = chunk.push(Address::new(0, 0), 1 << 30, Before::Bytes(&bytes[..512]));
    assert!(matches!(over, Err(HistoryError::Limit { what: "a chunk", .. })));
    let info = layer.append(&mut chunk, 1 << 20).expect("append");
    assert!(info.bytes as usize <= CHUNK_BYTES_MAX && info.bytes as usize > CHUNK_BYTES_MAX - 8192, "{info:?}");
    assert!(matches!(layer.append(&mut chunk, 2 << 20), Err(HistoryError::Order { .. })), "not begun anew");
    let (_, found) = OpenLayer::open(dir.path(), GROUP, 1).expect("open");
    assert_eq!(found.entries.len() as u64, count);
}

#[test]
fn counts_have_limits() {
    let mut chunk = Chunk::new();
    chunk.begin(0);
    for number in 1.. {
        if !chunk.fits(1) {
            break;
        }
        chunk.push(Address::new(0, number), number, Before::Zero { sectors: 1 }).expect("push");
    }
    assert_eq!(chunk.records(), CHUNK_RECORDS_MAX);
    for number in 1..=CHUNK_POINTS_MAX as u64 {
        chunk.point(number * 8, number).expect("point");
    }
    assert!(matches!(chunk.point(u64::MAX - 7, 1), Err(HistoryError::Limit { .. })));
    assert!(!chunk.fits(0));
    let dir = directory();
    let mut layer = OpenLayer::create(dir.path(), GROUP, 1, 0, 0).expect("create");
    let mut height = 0;
    while !layer.is_full() {
        height += 1 << 30;
        append(&mut layer, &mut chunk, &[], &[], height);
        chunk.begin(height);
        for sector in 0..CHUNK_RECORDS_MAX as u64 {
            chunk.push(Address::new(0, sector), height + 1, Before::Zero { sectors: 1 }).expect("push");
        }
        height += 1 << 30;
        layer.append(&mut chunk, height).expect("append");
    }
    assert_eq!(layer.records(), LAYER_RECORDS);
    chunk.begin(height);
    assert!(matches!(layer.append(&mut chunk, height), Err(HistoryError::Limit { what: "a layer", .. })));
    let (layer, found) = OpenLayer::open(dir.path(), GROUP, 1).expect("open");
    assert!(layer.is_full() && found.entries.len() == LAYER_RECORDS);
}

/// Header, table, points and padding, for random 4 KiB writes on 1 TiB, in the order of the stream and sorted.
#[test]
fn a_record_costs_little_beside_its_bytes() {
    for sorted in [false, true] {
        let records = 2000u64;
        let mut chunk = Chunk::new();
        let first = 1 << 44;
        chunk.begin(first);
        let mut changes: Vec<(u64, u64)> =
            (0..records).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33 & !7, first + (i + 1) * 4136)).collect();
        changes.iter().enumerate().for_each(|(i, change)| {
            chunk.point(change.1, 1_800_000_000_000_000_000 + i as u64 * 20_000 + change.0 % 9_000).expect("point");
        });
        if sorted {
            changes.sort_unstable();
        }
        let plain = noise(5, 4096);
        for (sector, height) in changes {
            chunk.push(Address::new(1, sector), height, Before::Bytes(&plain)).expect("push");
        }
        let dir = directory();
        let mut layer = OpenLayer::create(dir.path(), GROUP, 1, first, 0).expect("create");
        let bytes = u64::from(layer.append(&mut chunk, first + records * 4136).expect("append").bytes);
        let each = (bytes - records * 4096) as f64 / records as f64;
        assert!(each <= 24.0, "{each} bytes a record, sorted: {sorted}");
    }
}

#[test]
fn bytes_that_do_not_compress_are_not_tried_for_ever() {
    let mut chunk = Chunk::new();
    let mut push = |count: u64, kind| {
        let before = chunk.tries();
        for number in 0..count {
            if number % 1000 == 0 {
                chunk.begin(0);
            }
            Change::new((0, number, 0, 8), 1, kind, number).push(&mut chunk);
        }
        chunk.tries() - before
    };
    assert_eq!(push(1000, Content::Text), 1000);
    let tries = push(3200, Content::Noise);
    assert!((100..=120).contains(&tries), "{tries}");
    assert_eq!(push(3200, Content::Zero), 0, "zeroes are not tried at all");
    assert_eq!(push(3200, Content::ZeroBytes), 0);
    let tries = push(1000, Content::Text);
    assert!(tries >= 900, "it comes back after three samples: {tries}");
}

#[test]
fn a_time_names_its_chunk() {
    let dir = directory();
    let mut layer = OpenLayer::create(dir.path(), GROUP, 1, 0, 50).expect("create");
    let mut chunk = Chunk::new();
    let point = |height, time_ns| Point { height, time_ns };
    append(&mut layer, &mut chunk, &[], &[point(8, 100), point(16, 200)], 16);
    append(&mut layer, &mut chunk, &[Change::new((0, 0, 0, 1), 17, Content::Zero, 0)], &[], 17);
    append(&mut layer, &mut chunk, &[], &[point(24, 200), point(32, 300)], 32);
    let chunks = layer.chunks();
    assert_eq!((chunks[1].first_time_ns, chunks[1].last_time_ns), (200, 200), "that of the newest point before");
    assert_eq!(find_time(chunks, 99), None);
    assert_eq!(find_time(chunks, 150), Some(0));
    assert_eq!(find_time(chunks, 199), Some(0));
    assert_eq!(find_time(chunks, 200), Some(2));
    assert_eq!(find_time(chunks, u64::MAX), Some(2));
    assert_eq!(layer.reader().points(&chunks[2]).expect("points"), [point(24, 200), point(32, 300)]);
}
