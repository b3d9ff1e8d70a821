//! A group: volumes that share one ring and so one write order.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType, libbpf_sys};
use nix::time::{ClockId, clock_gettime};
use varve_common::record::{BOOKMARK_BYTES_MAX, RecordKind};

use crate::capture::{Shared, dirty_map};
use crate::error::{CaptureError, CaptureErrorKind};
use crate::layout::*;
use crate::ledger::Note;
use crate::memory::{PAGE_BYTES, Table};
use crate::pins::disk_identity;
use crate::recover::inner_map;
use crate::ring::Ring;
use crate::slots::{Slots, Watched};
use crate::track::{VolumeCounters, VolumeTrack};

/// After activation, no answer of the disk before this counts: a bio may be between our programs and its accounting.
const SETTLE_MIN: Duration = Duration::from_millis(50);
/// A disk that is never idle has settled by then: writes that old have failed or completed.
const SETTLE_MAX: Duration = Duration::from_secs(30);
const RING_BYTES_MIN: u32 = 64 << 10;
const ENOSPC: u32 = 28;

/// A stretch of a whole disk to be captured as one volume.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VolumeSpec {
    /// Major and minor number of the whole disk, also for a partition.
    pub disk: (u32, u32),
    /// Where the volume begins on the disk, in bytes (multiple of 512).
    pub start_bytes: u64,
    /// Its length in bytes (multiple of 512).
    pub bytes: u64,
    /// Whether the disk's driver uses requests (`/sys/block/<disk>/mq` exists) or takes bios as they are.
    pub request_based: bool,
}

/// The sum of the group's volumes' counters.
pub type GroupCounters = VolumeCounters;

/// A group of volumes being captured. Dropping it ends their capture, unless it is pinned and has a note: then only
/// [`Group::end`] does.
pub struct Group {
    shared: Arc<Shared>,
    ended: AtomicBool,
    slot: u32,
    ring: Ring,
    tracks: Vec<VolumeTrack>,
    /// Since when the disks are asked whether they are idle.
    settle: Mutex<Instant>,
}

impl Group {
    pub(crate) fn new(
        shared: Arc<Shared>,
        name: &str,
        incarnation: [u8; 16],
        ring_bytes: u32,
        specs: &[VolumeSpec],
    ) -> Result<Self, CaptureError> {
        check_ring(ring_bytes)?;
        if specs.is_empty() || specs.len() > usize::from(u16::MAX) {
            return Err(CaptureError::invalid(
                format!("a group of {} volumes", specs.len()),
                "name at least one volume",
            ));
        }
        for spec in specs {
            check_volume(spec)?;
        }
        let ring_map = ring_map(ring_bytes)?;
        let ring = Ring::new(&ring_map, ring_bytes).map_err(|e| CaptureError::kernel("map the ring", e))?;

        let mut slots = shared.slots();
        shared.drain(&mut slots);
        let slot = slots.take_group()?;
        shared.ledger[slot as usize].begin(name, incarnation, specs.len() as u32);
        drop(slots);
        // From here on dropping `group` undoes what is done, also on an early return.
        let mut group = Self {
            slot,
            ended: AtomicBool::new(false),
            ring,
            tracks: Vec::with_capacity(specs.len()),
            settle: Mutex::new(Instant::now()),
            shared,
        };
        let control = &group.shared.groups[slot as usize];
        control.time_offset.store(0, Ordering::Relaxed);
        control.first_drop.store(0, Ordering::Release);
        set_inner(&group.shared.rings, slot, &ring_map)?;
        for (number, spec) in specs.iter().enumerate() {
            let track = group.add_volume(number as u32, spec)?;
            group.tracks.push(track);
        }
        for track in &group.tracks {
            track.entry().flags.store(VOLUME_ACTIVE | VOLUME_SETTLING, Ordering::Release);
        }
        group.settle = Mutex::new(Instant::now());
        Ok(group)
    }

    /// See [`crate::Capture::take_over_group`].
    ///
    /// What the process before had taken from the bitmaps to send and not finished becomes dirty again. A write from
    /// before the activation may still be in flight: that the disk is idle is looked for anew.
    pub(crate) fn take_over(shared: Arc<Shared>, name: &str, specs: &[VolumeSpec]) -> Option<Result<Self, String>> {
        let mut slots = shared.slots();
        let slot = shared.find_kept(&slots, name)?;
        let volumes = shared.volumes_of(&slots, slot);
        let checked = shared.check_kept(&slots, slot, &volumes, specs);
        let ring = match checked.and_then(|()| shared.kept_ring(slot)) {
            Ok(ring) => ring,
            Err(why) => return Some(Err(why)),
        };
        slots.take_over_group(slot);
        let watched = volumes.iter().filter_map(|&(_, index)| Some((index, slots.watched_at(index)?)));
        let track = |(index, watched): (u32, &Watched)| {
            VolumeTrack::new(shared.clone(), index, watched.spec.clone(), watched.bits.clone())
        };
        let tracks: Vec<VolumeTrack> = watched.map(track).collect();
        drop(slots);
        for track in &tracks {
            track.take_back();
        }
        let settle = Mutex::new(Instant::now());
        Some(Ok(Self { slot, ended: AtomicBool::new(false), ring, tracks, settle, shared }))
    }

    /// A volume that the programs know of and do not capture yet.
    pub(crate) fn add_volume(&self, number: u32, spec: &VolumeSpec) -> Result<VolumeTrack, CaptureError> {
        let words = bitmap_words(spec.bytes);
        let map = dirty_map(words as u32)?;
        let bits = Table::new(&map, words as usize).map_err(|e| CaptureError::kernel("map a bitmap", e))?;
        let bits = Arc::new(bits);
        let mut slots = self.shared.slots();
        let index = slots.take_volume()?;
        let entry = &self.shared.volumes[index as usize];
        entry.flags.store(0, Ordering::Release);
        entry.group.store(self.slot, Ordering::Relaxed);
        entry.number.store(number, Ordering::Relaxed);
        entry.start.store(spec.start_bytes / 512, Ordering::Relaxed);
        entry.sectors.store(spec.bytes / 512, Ordering::Relaxed);
        entry.identity.store(disk_identity(spec.disk), Ordering::Relaxed);
        entry.device.store(device_sectors(spec), Ordering::Relaxed);
        for counter in [
            &entry.records,
            &entry.bytes,
            &entry.dropped_records,
            &entry.dropped_bytes,
            &entry.unreadable,
            &entry.failed_writes,
            &entry.straddling,
            &entry.late,
            &entry.late_unknown,
            &entry.passthrough,
            &entry.untracked,
            &entry.late_unknown_seen,
            &entry.resized,
        ] {
            counter.store(0, Ordering::Relaxed);
        }
        let watched = set_inner(&self.shared.dirty, index, &map).and_then(|()| self.shared.watch(spec, index));
        if let Err(error) = watched {
            slots.free_volume(index);
            return Err(error);
        }
        slots.own_volume(index, Watched { spec: spec.clone(), bits: bits.clone() });
        drop(slots);
        Ok(VolumeTrack::new(self.shared.clone(), index, spec.clone(), bits))
    }

    /// Ends the capture of the volumes. What is in the ring can still be read.
    pub fn end(&self) {
        if self.ended.swap(true, Ordering::AcqRel) {
            return;
        }
        let volumes: Vec<(u32, VolumeSpec)> = self.tracks.iter().map(|t| (t.index(), t.spec().clone())).collect();
        let mut slots = self.shared.slots();
        self.shared.end_group(&mut slots, self.slot, &volumes);
    }

    /// Ends nothing: [`crate::Capture::take_over_group`] goes on with it, in this process or the next. Whether that can
    /// be, that is, whether it has a note.
    pub fn leave(&self) -> bool {
        let noted = self.shared.ledger[self.slot as usize].state.load(Ordering::Acquire) == LEDGER_KEPT;
        if !noted || self.ended.swap(true, Ordering::AcqRel) {
            return false;
        }
        self.shared.slots().leave_group(self.slot);
        true
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn settle(&self) -> &Mutex<Instant> {
        &self.settle
    }

    /// Gives the one before.
    pub(crate) fn replace_track(&mut self, number: usize, track: VolumeTrack) -> VolumeTrack {
        std::mem::replace(&mut self.tracks[number], track)
    }

    /// What names the ring.
    pub fn incarnation(&self) -> [u8; 16] {
        self.shared.ledger[self.slot as usize].incarnation()
    }

    /// Whether capture goes on without this process.
    pub fn is_pinned(&self) -> bool {
        self.shared.is_pinned()
    }

    /// Leaves a note for the next process, in place of the last one. From the first one on it can go on with the group.
    pub fn set_note(&self, note: &Note) {
        if !self.ended.load(Ordering::Acquire) {
            self.shared.ledger[self.slot as usize].set_note(note);
        }
    }

    /// The note.
    pub fn note(&self) -> Note {
        self.shared.ledger[self.slot as usize].note()
    }

    /// Whether each volume is still on the disk that it was on when its capture began: a number may name another one.
    pub fn disks_are_the_same(&self) -> bool {
        let same =
            |track: &VolumeTrack| track.entry().identity.load(Ordering::Acquire) == disk_identity(track.spec().disk);
        self.tracks.iter().all(same)
    }

    /// What is added to the boot-time clock now, see [`Group::set_time_offset`].
    pub fn time_offset(&self) -> u64 {
        self.shared.groups[self.slot as usize].time_offset.load(Ordering::Acquire)
    }

    /// The group's ring.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The volumes, in the order of the numbers in the records.
    pub fn volumes(&self) -> &[VolumeTrack] {
        &self.tracks
    }

    /// Puts a record that is no write into the ring, in order with the writes: a bookmark, a canary, a resize.
    ///
    /// # Errors
    /// `RingFull` if there is no room; `Invalid` for a payload that is too long or a volume that is not there.
    pub fn mark(&self, kind: RecordKind, volume: u16, length: u64, payload: &[u8]) -> Result<(), CaptureError> {
        if payload.len() > BOOKMARK_BYTES_MAX {
            return Err(CaptureError::invalid(
                format!("a mark with {} bytes", payload.len()),
                "use a name of at most 255 bytes",
            ));
        }
        if usize::from(volume) >= self.tracks.len() {
            return Err(CaptureError::invalid(
                format!("a mark for volume {volume} of {}", self.tracks.len()),
                "this is a defect of the caller",
            ));
        }
        let mut arguments = [0; MARK_BYTES];
        arguments[0..4].copy_from_slice(&self.slot.to_ne_bytes());
        arguments[4..8].copy_from_slice(&u32::from(kind as u8).to_ne_bytes());
        arguments[8..12].copy_from_slice(&u32::from(volume).to_ne_bytes());
        arguments[12..16].copy_from_slice(&(payload.len() as u32).to_ne_bytes());
        arguments[16..24].copy_from_slice(&length.to_ne_bytes());
        arguments[24..24 + payload.len()].copy_from_slice(payload);
        match self.shared.mark(&arguments)? {
            0 => Ok(()),
            ENOSPC => Err(CaptureError::new(
                CaptureErrorKind::RingFull,
                "no room for a mark in the ring",
                "wait until the group has caught up, then try again",
            )),
            other => Err(CaptureError::kernel(format!("the mark program returned {other}"), "unexpected result")),
        }
    }

    /// Sets what is added to the boot-time clock for the records' times: wall clock minus [`Group::boot_ns`].
    pub fn set_time_offset(&self, ns: u64) {
        self.shared.groups[self.slot as usize].time_offset.store(ns, Ordering::Release);
    }

    /// The boot-time clock, as the programs read it.
    pub fn boot_ns() -> u64 {
        clock_gettime(ClockId::CLOCK_BOOTTIME)
            .map(|t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
            .expect("CLOCK_BOOTTIME is always there")
    }

    /// The sum over the volumes.
    pub fn counters(&self) -> GroupCounters {
        let mut sum = GroupCounters::default();
        for track in &self.tracks {
            sum += track.counters();
        }
        sum
    }

    /// The ring's position before the first write since the last call that did not get into the ring: every point up
    /// to it is whole. `None` if there was none. Re-arms.
    pub fn take_first_drop(&self) -> Option<u64> {
        self.shared.groups[self.slot as usize].first_drop.swap(0, Ordering::AcqRel).checked_sub(1)
    }

    /// Whether every write that was in flight at the activation has completed (and left its dirty bit). Call it now
    /// and then until it says true. Late writes of unknown extent make their whole volume dirty here.
    ///
    /// # Errors
    /// `Kernel` if the state of a disk cannot be read.
    pub fn poll_settled(&self) -> Result<bool, CaptureError> {
        let since = self.settle.lock().unwrap_or_else(PoisonError::into_inner);
        let age = since.elapsed();
        let mut idle: HashMap<(u32, u32), bool> = HashMap::new();
        let mut settled = true;
        for track in &self.tracks {
            if track.entry().flags.load(Ordering::Acquire) & VOLUME_SETTLING != 0 {
                let disk = track.spec().disk;
                let idle = match idle.get(&disk) {
                    Some(&idle) => idle,
                    None => *idle.entry(disk).or_insert(disk_is_idle(disk)?),
                };
                if age >= SETTLE_MAX || age >= SETTLE_MIN && idle {
                    self.end_settling(track);
                } else {
                    settled = false;
                }
            }
            // After the flag went: what was counted before it, is there.
            let unknown = track.entry().late_unknown.load(Ordering::Acquire);
            if unknown != track.entry().late_unknown_seen.load(Ordering::Acquire) {
                // Dirty first: whoever comes after a kill in between does it again.
                track.set_all_dirty();
                track.entry().late_unknown_seen.store(unknown, Ordering::Release);
            }
        }
        Ok(settled)
    }

    fn end_settling(&self, track: &VolumeTrack) {
        let _slots = self.shared.slots();
        track.entry().flags.fetch_and(!VOLUME_SETTLING, Ordering::AcqRel);
        self.shared.barrier();
        if track.spec().request_based {
            let mask = self.shared.mask_of(track.spec(), track.index());
            self.shared.forget_marks(disk_number(track.spec().disk), mask);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let noted = self.shared.ledger[self.slot as usize].state.load(Ordering::Acquire) == LEDGER_KEPT;
        if !(self.shared.is_pinned() && noted) {
            self.end();
        }
    }
}

/// Words of a volume's bitmaps: the dirty regions, then as many for those taken and not finished.
pub(crate) fn bitmap_words(bytes: u64) -> u64 {
    2 * bytes.div_ceil(crate::REGION_BYTES).div_ceil(64)
}

impl Shared {
    /// Whether the group in `slot` captures these very volumes, which may have grown since.
    fn check_kept(&self, slots: &Slots, slot: u32, volumes: &[(u32, u32)], specs: &[VolumeSpec]) -> Result<(), String> {
        let there = self.ledger[slot as usize].volumes.load(Ordering::Acquire) as usize;
        if there != specs.len() || volumes.len() != specs.len() {
            return Err(format!("it captures {} of {there} volumes instead of {}", volumes.len(), specs.len()));
        }
        for ((number, spec), &(kept_number, index)) in specs.iter().enumerate().zip(volumes) {
            let kept = slots.watched_at(index).map(|watched| &watched.spec);
            let same = |kept: &VolumeSpec| VolumeSpec { bytes: kept.bytes.max(spec.bytes), ..kept.clone() } == *spec;
            if kept_number as usize != number || !kept.is_some_and(same) {
                return Err(format!("volume {number} is {spec:?} and was {kept:?}"));
            }
            let (was, is) = (self.volumes[index as usize].identity.load(Ordering::Acquire), disk_identity(spec.disk));
            if was != is {
                let (major, minor) = spec.disk;
                return Err(format!("{major}:{minor} is not the disk that it was (sequence number {was}, now {is})"));
            }
        }
        Ok(())
    }

    fn kept_ring(&self, slot: u32) -> Result<Ring, String> {
        let map = inner_map(&self.rings, slot).map_err(|e| e.to_string())?.ok_or("its ring is gone")?;
        Ring::new(&map, map.max_entries()).map_err(|e| format!("its ring cannot be mapped: {e}"))
    }
}

pub(crate) fn ring_map(bytes: u32) -> Result<MapHandle, CaptureError> {
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    MapHandle::create(MapType::RingBuf, Some("varve_ring"), 0, 0, bytes, &options).map_err(|e| {
        CaptureError::new(
            CaptureErrorKind::Kernel,
            format!("make a ring of {bytes} bytes"),
            "give the group a smaller ring, or the host more memory",
        )
        .because(e)
    })
}

pub(crate) fn set_inner(outer: &MapHandle, slot: u32, inner: &MapHandle) -> Result<(), CaptureError> {
    let fd = inner.as_fd().as_raw_fd();
    outer
        .update(&slot.to_ne_bytes(), &fd.to_ne_bytes(), MapFlags::ANY)
        .map_err(|e| CaptureError::kernel("hand a map to the programs", e))
}

/// The size of the device that a volume is, so that the programs see when it changes; 0 if the volume is a part of it only.
fn device_sectors(spec: &VolumeSpec) -> u64 {
    let sectors = spec.bytes / 512;
    let (major, minor) = spec.disk;
    let whole = || std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size")).ok()?.trim().parse().ok();
    match spec.start_bytes {
        0 if whole() != Some(sectors) => 0,
        _ => sectors,
    }
}

fn check_ring(bytes: u32) -> Result<(), CaptureError> {
    if bytes.is_power_of_two() && bytes >= RING_BYTES_MIN && (bytes as usize).is_multiple_of(PAGE_BYTES) {
        return Ok(());
    }
    Err(CaptureError::invalid(
        format!("a ring of {bytes} bytes"),
        "use a power of two from 64 KiB on; 4 MiB or more holds the largest writes",
    ))
}

pub(crate) fn check_volume(spec: &VolumeSpec) -> Result<(), CaptureError> {
    let (major, minor) = spec.disk;
    let end = spec.start_bytes.checked_add(spec.bytes);
    if spec.bytes == 0 || !spec.start_bytes.is_multiple_of(512) || !spec.bytes.is_multiple_of(512) || end.is_none() {
        return Err(CaptureError::invalid(
            format!("volume of {} bytes at {} of disk {major}:{minor}", spec.bytes, spec.start_bytes),
            "sizes and offsets are multiples of 512 and not zero",
        ));
    }
    if major >= 1 << 12 || minor >= 1 << 20 || (major, minor) == (0, 0) {
        return Err(CaptureError::invalid(format!("disk {major}:{minor}"), "name an existing block device"));
    }
    let zoned = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/queue/zoned"));
    if zoned.is_ok_and(|zoned| zoned.trim() != "none") {
        return Err(CaptureError::new(
            CaptureErrorKind::Unsupported,
            format!("disk {major}:{minor} is zoned"),
            "zoned devices cannot be captured; protect what is built on top of it",
        ));
    }
    Ok(())
}

/// Whether no write is in flight on the disk. A disk that does not count is never idle in our eyes.
pub(crate) fn disk_is_idle((major, minor): (u32, u32)) -> Result<bool, CaptureError> {
    let sys = format!("/sys/dev/block/{major}:{minor}");
    if std::fs::read_to_string(format!("{sys}/queue/iostats")).is_ok_and(|on| on.trim() == "0") {
        return Ok(false);
    }
    let path = format!("{sys}/inflight");
    let text = std::fs::read_to_string(&path).map_err(|e| CaptureError::kernel(format!("read {path}"), e))?;
    Ok(text.split_whitespace().nth(1) == Some("0"))
}
