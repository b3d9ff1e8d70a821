//! Layers of any bytes. Three ways: raw bytes behind a right header; chunks with right checksums that say anything; a good
//! layer with damage in it. What is found lies within the file, reads as it was written or not at all, and what is
//! appended after an opening is found by the next one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex};
use varve_common::format::BLOCK_BYTES;
use varve_common::format::layer::{
    CHUNK_HEADER_BYTES, CHUNK_MAGIC, ChunkHeader, LayerHeader, Point, PointState, Points, Row, RowState, Rows,
};
use varve_fuzz::Input;
use varve_timeline::entry::{Address, Entry, Stored};
use varve_timeline::error::HistoryError;
use varve_timeline::layer::{Before, Chunk, Finding, LayerFile, OpenLayer, Recovered, path_of};
use zerocopy::IntoBytes;

const GROUP: [u8; 16] = [1; 16];
const BLOCKS_MAX: usize = 12;

static DIR: LazyLock<PathBuf> = LazyLock::new(|| varve_fuzz::work_dir("layer"));
/// Made once: to make one costs more than everything else here.
static CHUNK: LazyLock<Mutex<Chunk>> = LazyLock::new(|| Mutex::new(Chunk::new()));

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    for old in std::fs::read_dir(&*DIR).expect("directory").flatten() {
        std::fs::remove_file(old.path()).expect("remove");
    }
    match input.u8() % 4 {
        0 => raw(&mut input),
        1 => crafted(&mut input),
        2 => damaged(&mut input),
        _ => tables(&mut input),
    }
});

/// Opens it both ways and reads everything that was found.
fn open() -> Option<(OpenLayer, Recovered)> {
    let (layer, found) = match OpenLayer::open(&DIR, GROUP, 1) {
        Ok(opened) => opened,
        Err(HistoryError::Io(error)) => panic!("{}", error.chain()),
        Err(_) => return None,
    };
    let bytes = std::fs::metadata(path_of(&DIR, 1)).expect("file").len();
    let mut at = BLOCK_BYTES as u64;
    for chunk in &found.chunks {
        assert!(chunk.offset >= at && chunk.end() <= bytes && chunk.complete_to <= found.complete_to);
        at = chunk.end();
    }
    assert_eq!(layer.bytes(), at.max(layer.bytes()), "nothing behind the end");
    assert_eq!(found.entries.len() as u64, found.chunks.iter().map(|chunk| u64::from(chunk.records)).sum::<u64>());
    let reader = layer.reader();
    for entry in &found.entries {
        assert!(entry.is_possible());
        let end = u64::from(entry.offset) + u64::from(entry.stored_bytes);
        assert!(end <= layer.bytes(), "{entry:?}");
        read(&reader, entry);
    }
    closed(&found);
    Some((layer, found))
}

fn read(layer: &LayerFile, entry: &Entry) -> Option<Vec<u8>> {
    let mut out = vec![0; usize::from(entry.sectors) * 512];
    match layer.read(entry, &mut out) {
        Ok(()) => Some(out),
        Err(HistoryError::Damaged { .. }) => None,
        Err(error) => panic!("{error}"),
    }
}

/// As a closed layer there is at least as much in it, and a scrub agrees with the readers.
fn closed(open: &Recovered) {
    let layer = LayerFile::open(&DIR, GROUP, 1).expect("it was opened before");
    let found = layer.load().expect("load");
    assert!(found.chunks.len() >= open.chunks.len());
    let (mut chunks, mut bad) = (Vec::new(), Vec::new());
    let scanned = layer
        .scan(|finding| {
            match finding {
                Finding::Chunk(chunk) => chunks.push(chunk),
                Finding::Record { entry, .. } => bad.push(entry),
            }
            ControlFlow::Continue(())
        })
        .expect("scan");
    assert_eq!((chunks, &scanned.damage), (found.chunks.clone(), &found.damage));
    for entry in &found.entries {
        assert_eq!(read(&layer, entry).is_none(), bad.contains(entry), "{entry:?}");
    }
    for chunk in &found.chunks {
        assert_eq!(layer.points(chunk).expect("points").len(), chunk.points as usize);
    }
}

/// Opens, appends one chunk, and opens again: it must be there, behind everything that was there before.
fn open_and_go_on() {
    let Some((mut layer, first)) = open() else { return };
    if first.complete_to > u64::MAX / 2 {
        return;
    }
    let mut chunk = CHUNK.lock().expect("one thread");
    chunk.begin(first.complete_to);
    let height = first.complete_to + 1;
    chunk.push(Address::new(3, 8), height, Before::Bytes(&[5; 512])).expect("push");
    let offset = layer.append(&mut chunk, height).expect("append").offset;
    let entry = chunk.entries(1, offset).next().expect("one");
    drop(layer);
    let (_, second) = open().expect("our own layer");
    assert_eq!(second.entries.split_last(), Some((&entry, &first.entries[..])), "{first:?} then {second:?}");
    assert_eq!(second.damage.len(), first.damage.len(), "{first:?} then {second:?}");
    assert!(!second.torn);
}

fn write(chunks: &[u8]) {
    let mut bytes = LayerHeader::new(GROUP, 1, 8, 9).encode().to_vec();
    bytes.extend_from_slice(&chunks[..chunks.len().min(BLOCKS_MAX * BLOCK_BYTES)]);
    std::fs::write(path_of(&DIR, 1), bytes).expect("write");
}

/// Files of any bytes, with and without a right header.
fn raw(input: &mut Input<'_>) {
    if input.u8() % 4 == 0 {
        std::fs::write(path_of(&DIR, 1), input.take(usize::MAX)).expect("write");
    } else {
        write(input.take(usize::MAX));
    }
    open_and_go_on();
}

/// Chunks that say anything, with the checksums that a fuzzer does not guess.
fn crafted(input: &mut Input<'_>) {
    let mut bytes = Vec::new();
    let mut previous = LayerHeader::new(GROUP, 1, 8, 9).crc.get();
    let mut height = 8u64;
    for _ in 0..1 + input.u8() % 4 {
        let how = input.u8();
        let rise = if how & 1 == 0 { u64::from(input.u8()) } else { input.u64() };
        let (first, complete_to) = (height, height.wrapping_add(rise));
        let (data, table_bytes) = (usize::from(input.u16() % 9000), usize::from(input.u8()));
        let (data, table) = (input.take(data), input.take(table_bytes));
        let points_bytes = usize::from(input.u8() % 32);
        let points = input.take(points_bytes);
        let header = ChunkHeader {
            magic: CHUNK_MAGIC.into(),
            layer: 1.into(),
            offset: ((BLOCK_BYTES + bytes.len()) as u64).into(),
            first_height: first.into(),
            complete_to: complete_to.into(),
            first_time_ns: 10.into(),
            last_time_ns: (10 + u64::from(input.u8())).into(),
            records: u32::from(input.u8() % 20).into(),
            points: u32::from(input.u8() % 8).into(),
            data_bytes: (data.len() as u32 ^ if how & 2 == 0 { 0 } else { u32::from(input.u16()) << 16 }).into(),
            table_bytes: (table.len() as u32).into(),
            points_bytes: (points.len() as u32).into(),
            table_crc: crc32fast::hash(table).into(),
            points_crc: crc32fast::hash(points).into(),
            previous_crc: (previous ^ u32::from(how >> 2 & 1)).into(),
            reserved: 0.into(),
            header_crc: 0.into(),
        }
        .sealed(&GROUP);
        previous = header.header_crc.get();
        height = complete_to;
        for part in [header.as_bytes(), data, table, points] {
            bytes.extend_from_slice(part);
        }
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), how >> 3 & 1);
    }
    write(&bytes);
    open_and_go_on();
}

/// A good layer of some chunks, and then some bytes of it changed, and its end cut off.
fn damaged(input: &mut Input<'_>) {
    let mut layer = OpenLayer::create(&DIR, GROUP, 1, 8, 9).expect("create");
    let mut chunk = CHUNK.lock().expect("one thread");
    let mut written: Vec<(Entry, Vec<u8>)> = Vec::new();
    for _ in 0..1 + input.u8() % 3 {
        let first = layer.complete_to();
        chunk.begin(first);
        let mut plains = Vec::new();
        for number in 0..input.u8() % 4 {
            let (volume, sector, sectors) = (input.u8(), input.u16(), 1 + u64::from(input.u8() % 12));
            let address = Address::new(volume.into(), u64::from(sector));
            let sectors = sectors.min(128 - u64::from(address.in_granule()));
            let seed = input.u8();
            let plain: Vec<u8> = match seed % 3 {
                0 => vec![0; sectors as usize * 512],
                1 => (0..sectors * 512).map(|i| (i * i * 31 + i * u64::from(seed) >> 3) as u8).collect(),
                _ => vec![seed; sectors as usize * 512],
            };
            chunk.push(address, first + 1 + u64::from(number), Before::Bytes(&plain)).expect("push");
            chunk.point((first / 8 + 1 + u64::from(number)) * 8, u64::from(seed)).expect("point");
            plains.push(plain);
        }
        let offset = layer.append(&mut chunk, first + 64).expect("append").offset;
        written.extend(chunk.entries(1, offset).zip(plains));
    }
    let last = *layer.chunks().last().expect("one");
    let end = layer.close(std::time::SystemTime::now()).expect("close").bytes();
    let path = path_of(&DIR, 1);
    let mut bytes = std::fs::read(&path).expect("read");
    let mut only_last = true;
    for _ in 0..input.u8() % 4 {
        let (at, flip) = (usize::from(input.u16()) % bytes.len(), input.u8());
        bytes[at] ^= flip;
        only_last &= flip == 0 || at as u64 >= last.offset;
    }
    if input.u8() % 4 == 0 {
        bytes.truncate(bytes.len() - usize::from(input.u16()) % bytes.len());
        only_last &= bytes.len() as u64 >= last.offset;
    }
    std::fs::write(&path, &bytes).expect("write");
    drop(chunk);
    if let Some((layer, found)) = open() {
        let reader = layer.reader();
        for entry in &found.entries {
            let plain = written.iter().find_map(|(written, plain)| (written == entry).then_some(plain));
            let plain = plain.expect("what was never written");
            assert!(read(&reader, entry).is_none_or(|read| read == *plain), "{entry:?}");
        }
        if only_last {
            assert!(found.damage.is_empty() && found.complete_to >= last.first_height, "a torn last write: {found:?}");
        }
        assert!(layer.bytes() <= end);
        drop(layer);
        open_and_go_on();
    }
}

/// Tables and points out of any bytes: what decodes comes out the same when it is written again.
fn tables(input: &mut Input<'_>) {
    let (first, count) = (input.u64(), u32::from(input.u8()));
    let bytes = input.take(usize::MAX);
    let rows: Vec<Row> = Rows::new(bytes, count, first).map_while(|row| row).collect();
    let (mut again, mut state) = (Vec::new(), RowState::new(first));
    for row in &rows {
        assert!((1..=128).contains(&row.sectors) && row.stored_bytes <= u32::from(row.sectors) * 512);
        assert!(Stored::from_number(row.kind).is_some());
        state.put(&mut again, row);
    }
    assert_eq!(Rows::new(&again, rows.len() as u32, first).collect::<Option<Vec<_>>>(), Some(rows));
    let points: Vec<Point> = Points::new(bytes, count, first, 5).map_while(|point| point).collect();
    let (mut again, mut state) = (Vec::new(), PointState::new(first, 5));
    for point in &points {
        assert!(state.admits(*point));
        state.put(&mut again, *point);
    }
    assert_eq!(Points::new(&again, points.len() as u32, first, 5).collect::<Option<Vec<_>>>(), Some(points));
    if let Some(header) = ChunkHeader::decode(bytes, &GROUP, 1, 4096) {
        assert!(!header.is_possible() || header.table_start() >= CHUNK_HEADER_BYTES as u64);
    }
}
