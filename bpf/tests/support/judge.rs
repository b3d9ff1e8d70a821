//! The replay judge: applies every record of a group's ring to images of its volumes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use varve_bpf::{Entry, Group};
use varve_common::record::{FLAG_FUA, FLAG_MORE, FLAG_PREFLUSH, RecordHeader, RecordKind};

/// What the records said.
#[derive(Default)]
pub struct Judge {
    pub images: Vec<Vec<u8>>,
    /// Every mark: its kind, its payload, and how many writes came before it.
    pub marks: Vec<(u8, Vec<u8>, u64)>,
    pub kinds: [u64; 8],
    pub fua: u64,
    pub preflush: u64,
    pub more: u64,
    pub discarded: u64,
    pub position: u64,
    /// Kind, volume, first byte, end, time of every record.
    pub log: Vec<(u8, usize, usize, usize, u64)>,
    payload: Vec<u8>,
    pub last_bytes: u64,
    pub last_length: u64,
    pub last_time_ns: u64,
}

impl Judge {
    pub fn new(group: &Group) -> Self {
        let images = group.volumes().iter().map(|v| vec![0; v.spec().bytes as usize]).collect();
        Self { images, position: group.ring().consumer(), ..Self::default() }
    }

    /// Applies what is complete; returns the number of records.
    pub fn take(&mut self, group: &Group) -> u64 {
        self.take_until(group, u64::MAX)
    }

    pub fn take_until(&mut self, group: &Group, end: u64) -> u64 {
        let ring = group.ring();
        let mut n = 0;
        while self.position < end {
            match ring.entry(self.position) {
                None | Some(Entry::Busy) => break,
                Some(Entry::Discarded { bytes }) => {
                    self.discarded += 1;
                    self.position += bytes;
                }
                Some(Entry::Record { bytes, header }) => {
                    let mut payload = std::mem::take(&mut self.payload);
                    payload.resize(header.payload.get() as usize, 0);
                    ring.copy_out(self.position + 8 + 32, &mut payload);
                    self.apply(&header, &payload);
                    self.payload = payload;
                    self.position += bytes;
                    n += 1;
                }
            }
            ring.release(self.position);
        }
        n
    }

    fn apply(&mut self, header: &RecordHeader, payload: &[u8]) {
        let volume = usize::from(header.volume.get());
        assert!(volume < self.images.len());
        let from = header.offset.get() as usize;
        let to = from + header.length.get() as usize;
        self.kinds[usize::from(header.kind)] += 1;
        self.fua += u64::from(header.flags & FLAG_FUA != 0);
        self.preflush += u64::from(header.flags & FLAG_PREFLUSH != 0);
        self.more += u64::from(header.flags & FLAG_MORE != 0);
        self.log.push((header.kind, volume, from, to, header.time_ns.get()));
        self.last_length = header.length.get();
        self.last_time_ns = header.time_ns.get();
        if header.kind == RecordKind::Write as u8 {
            self.last_bytes = header.length.get();
        }
        let image = &mut self.images[volume];
        match header.kind {
            k if k == RecordKind::Write as u8 => {
                assert_eq!(header.length.get(), u64::from(header.payload.get()));
                image[from..to].copy_from_slice(payload);
            }
            k if k == RecordKind::WriteZeroes as u8 || k == RecordKind::Discard as u8 => {
                assert!(payload.is_empty());
                image[from..to].fill(0);
            }
            k if k == RecordKind::Flush as u8 => assert!(payload.is_empty() && from == 0 && to == 0),
            k => {
                let writes = self.kinds[RecordKind::Write as usize];
                self.marks.push((k, payload.to_vec(), writes));
            }
        }
    }

    /// Compares an image with what the device holds.
    pub fn compare(&self, volume: usize, device: &[u8]) {
        let image = &self.images[volume];
        assert_eq!(image.len(), device.len());
        if let Some(at) = (0..image.len()).find(|&i| image[i] != device[i]) {
            let last = (0..image.len()).rev().find(|&i| image[i] != device[i]).unwrap();
            let bad = (0..image.len()).filter(|&i| image[i] != device[i]).count();
            let zero = |bytes: &[u8]| bytes.iter().all(|&b| b == 0);
            for (i, (a, b)) in
                image.chunks(512).zip(device.chunks(512)).enumerate().filter(|(_, (a, b))| a != b).take(64)
            {
                let n = a.iter().zip(b).filter(|(a, b)| a != b).count();
                eprintln!("sector {i:#x}: {n} bytes differ, stream zero: {}, disk zero: {}", zero(a), zero(b));
            }
            for entry in self.log.iter().filter(|(_, v, from, to, _)| *v == volume && *from <= at && at < *to) {
                eprintln!("first difference was touched by {entry:?}");
            }
            eprintln!("disk there: {:?}", String::from_utf8_lossy(&device[at & !511..(at & !511) + 512]));
            panic!("volume {volume}: {bad} bytes differ, first at {at:#x}, last at {last:#x}");
        }
    }
}

/// A judge that consumes in a thread of its own.
pub struct Running {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Judge>,
}

pub fn start(group: &Arc<Group>) -> Running {
    let stop = Arc::new(AtomicBool::new(false));
    let (flag, group) = (stop.clone(), group.clone());
    let mut judge = Judge::new(&group);
    let thread = std::thread::spawn(move || {
        loop {
            // Read the flag first: what was written before it was set is in the ring by then.
            let last = flag.load(Ordering::Acquire);
            if judge.take(&group) == 0 {
                if last && judge.position == group.ring().producer() {
                    return judge;
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    });
    Running { stop, thread }
}

impl Running {
    pub fn finish(self) -> Judge {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap()
    }
}
