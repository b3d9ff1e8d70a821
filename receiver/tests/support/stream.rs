//! A group's stream made up at random, and what the volumes hold at each position of it.

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use varve_common::format::{Mark, MarkKind};
use varve_common::record::{RecordHeader, RecordKind, append_record};
use varve_common::state::GapReason;
use varve_common::wire::{Codec, Frame, FrameKind};

/// What one frame does to the volumes: volume, offset, bytes (`None`: zeroes) and length.
pub type Change = (u16, u64, u64, Option<Vec<u8>>);

/// A frame as it goes over the wire.
#[derive(Clone)]
pub struct Sent {
    pub position: u64,
    pub end: u64,
    pub bytes: Vec<u8>,
    pub changes: Vec<Change>,
}

/// Makes frames.
pub struct Source {
    pub rng: StdRng,
    pub incarnation: [u8; 16],
    pub position: u64,
    pub volumes: Vec<u64>,
    pub epoch: u64,
}

pub fn wire(frame: &Frame, body: &[u8]) -> Vec<u8> {
    let mut bytes = frame.encode().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

pub fn record(kind: RecordKind, volume: u16, offset: u64, length: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let header = RecordHeader {
        kind: kind as u8,
        flags: 0,
        volume: volume.into(),
        payload: (payload.len() as u32).into(),
        time_ns: 1_700_000_000_000_000_000.into(),
        offset: offset.into(),
        length: length.into(),
    };
    append_record(&mut out, header, payload);
    out
}

impl Source {
    pub fn new(seed: u64, volumes: &[u64]) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let incarnation = rng.random();
        let position = rng.random_range(0..1000u64) * 8;
        Self { rng, incarnation, position, volumes: volumes.to_vec(), epoch: 1 }
    }

    pub fn mark(&self, kind: MarkKind) -> Sent {
        let mark = Mark {
            kind,
            reason: (kind != MarkKind::GapEnd).then_some(GapReason::NewRing),
            incarnation: self.incarnation,
            position: self.position,
            time_ns: 1_700_000_000_000_000_000,
            epoch: self.epoch,
            height_min: 0,
        };
        let body = mark.encode();
        let bytes = wire(&Frame::plain(FrameKind::Mark, self.position, &body), &body);
        Sent { position: self.position, end: self.position, bytes, changes: Vec::new() }
    }

    /// Records of any kind, size and alignment, in one frame of about `bytes`, compressed now and then.
    pub fn data(&mut self, bytes: usize) -> Sent {
        let mut plain = Vec::new();
        let mut changes = Vec::new();
        while plain.len() < bytes {
            let (record, change) = self.any_record(bytes);
            plain.extend_from_slice(&record);
            changes.extend(change);
        }
        self.frame(&plain, changes)
    }

    /// A frame of whole blocks.
    pub fn blocks(&mut self, volume: u16, count: usize) -> Sent {
        let (mut plain, mut changes) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let block = self.rng.random_range(0..self.volumes[usize::from(volume)] / 4096);
            let mut payload = vec![0; 4096];
            self.rng.fill_bytes(&mut payload);
            plain.extend_from_slice(&record(RecordKind::Write, volume, block * 4096, 4096, &payload));
            changes.push((volume, block * 4096, 4096, Some(payload)));
        }
        self.frame(&plain, changes)
    }

    pub fn frame(&mut self, plain: &[u8], changes: Vec<Change>) -> Sent {
        let mut frame = Frame::plain(FrameKind::Data, self.position, plain);
        let compressed;
        let mut body = plain;
        if self.rng.random_bool(0.3) {
            compressed = lz4_flex::block::compress(plain);
            if compressed.len() < plain.len() {
                frame.codec = Codec::Lz4;
                frame.body_bytes = compressed.len();
                body = &compressed;
            }
        }
        let position = self.position;
        self.position += plain.len() as u64;
        Sent { position, end: self.position, bytes: wire(&frame, body), changes }
    }

    fn any_record(&mut self, budget: usize) -> (Vec<u8>, Option<Change>) {
        let volume = self.rng.random_range(0..self.volumes.len()) as u16;
        let size = self.volumes[usize::from(volume)];
        let (unit, most) = match self.rng.random_range(0..10) {
            0..6 => (4096, 4),
            6..8 => (512, 20),
            8 => (4096, (budget as u64 / 4096).clamp(1, 250)),
            _ => (1, 3000),
        };
        let length = (self.rng.random_range(1..=most) * unit).min(size);
        let offset = self.rng.random_range(0..=(size - length) / unit) * unit;
        match self.rng.random_range(0..20) {
            0 => (record(RecordKind::WriteZeroes, volume, offset, length, &[]), Some((volume, offset, length, None))),
            1 => {
                let length = (length * 64).min(size - offset);
                (record(RecordKind::Discard, volume, offset, length, &[]), Some((volume, offset, length, None)))
            }
            2 => (record(RecordKind::Flush, volume, 0, 0, &[]), None),
            3 => (record(RecordKind::Bookmark, volume, 0, 0, b"here"), None),
            kind => {
                let mut payload = vec![self.rng.random(); length as usize];
                if kind > 8 {
                    self.rng.fill_bytes(&mut payload);
                }
                let bytes = record(RecordKind::Write, volume, offset, length, &payload);
                (bytes, Some((volume, offset, length, Some(payload))))
            }
        }
    }
}

/// What the volumes hold.
#[derive(Clone, PartialEq)]
pub struct Model {
    pub volumes: Vec<Vec<u8>>,
}

impl Model {
    pub fn new(volumes: &[u64]) -> Self {
        Self { volumes: volumes.iter().map(|bytes| vec![0; *bytes as usize]).collect() }
    }

    pub fn apply(&mut self, sent: &Sent) {
        for (volume, offset, length, bytes) in &sent.changes {
            let target = &mut self.volumes[usize::from(*volume)][*offset as usize..(*offset + *length) as usize];
            match bytes {
                Some(bytes) => target.copy_from_slice(bytes),
                None => target.fill(0),
            }
        }
    }
}
