//! Loading the programs, and what all groups share.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{Link, MapCore, MapFlags, MapHandle, MapType, PrintLevel, ProgramHandle, libbpf_sys};
use tracing::info;

use crate::calibrate::calibrate;
use crate::doctor;
use crate::error::{CaptureError, CaptureErrorKind};
use crate::group::{Group, VolumeSpec};
use crate::layout::*;
use crate::memory::{Table, program_statistics};
use crate::skeleton::VarveSkelBuilder;
use crate::slots::Slots;
use crate::tend::Stuck;

/// How to load.
#[derive(Clone, Debug)]
pub struct CaptureOptions {
    /// Any block device that can be read with O_DIRECT: calibration reads its first 4 KiB a few times.
    pub probe: PathBuf,
}

/// What one program cost so far. Zero unless statistics are enabled (`sysctl kernel.bpf_stats_enabled=1`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramCost {
    /// The program's name.
    pub name: String,
    /// How often it ran.
    pub run_count: u64,
    /// Nanoseconds in all.
    pub run_time_ns: u64,
}

/// How many of the attached programs watch completions: two pairs.
const COMPLETION_PROGRAMS: usize = 4;

/// The loaded and proved capture programs. Dropping it ends capture when its last group is gone, too.
pub struct Capture {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) disks: Table<DiskEntry>,
    pub(crate) volumes: Table<VolumeEntry>,
    pub(crate) groups: Table<GroupEntry>,
    pub(crate) inflight: Table<AtomicU64>,
    config: Table<ConfigEntry>,
    pub(crate) rings: MapHandle,
    pub(crate) dirty: MapHandle,
    pub(crate) bios: MapHandle,
    mark: Mutex<(MapHandle, ProgramHandle)>,
    slots: Mutex<Slots>,
    stuck: Mutex<Stuck>,
    /// The attached programs; those that capture come last.
    programs: Vec<ProgramHandle>,
    /// The attachments: closing them detaches.
    _links: Vec<OwnedFd>,
    barrier_map: MapHandle,
}

impl Capture {
    /// Loads the programs, finds and proves the way from pages to data, and attaches.
    ///
    /// # Errors
    /// `Unsupported`, `Permission` or `Calibration` with a hint; nothing stays behind.
    pub fn load(options: &CaptureOptions) -> Result<Capture, CaptureError> {
        doctor::refuse_unsupported()?;
        libbpf_speaks_through_tracing();
        let mut object = MaybeUninit::uninit();
        let skeleton = VarveSkelBuilder::default()
            .open(&mut object)
            .map_err(|e| CaptureError::kernel("open the capture programs", e))?;
        let skeleton = skeleton.load().map_err(load_error)?;

        let maps = &skeleton.maps;
        let handle = |map: &libbpf_rs::MapMut<'_>| {
            MapHandle::try_from(map).map_err(|e| CaptureError::kernel("keep a map of the capture programs", e))
        };
        let program = |program: &libbpf_rs::ProgramMut<'_>| {
            ProgramHandle::try_from(program).map_err(|e| CaptureError::kernel("keep a capture program", e))
        };
        let config = table(&maps.bss, 1)?;

        let programs = &skeleton.progs;
        calibrate(&options.probe, &config, &handle(&maps.probe)?, &programs.calibrate, &program(&programs.peek)?)?;

        assert_eq!(maps.bios.value_size() as usize, TRACKED_BYTES);
        assert_eq!(maps.mark_arguments.value_size() as usize, MARK_BYTES);
        assert_eq!(maps.probe.value_size() as usize, PROBE_BYTES);
        let barrier_map = dirty_map(1)?;
        let mut shared = Shared {
            disks: table(&maps.disks, DISKS_MAX)?,
            volumes: table(&maps.volumes, VOLUMES_MAX)?,
            groups: table(&maps.groups, GROUPS_MAX)?,
            inflight: table(&maps.inflight, INFLIGHT_SLOTS)?,
            config,
            rings: handle(&maps.rings)?,
            dirty: handle(&maps.dirty)?,
            bios: handle(&maps.bios)?,
            mark: Mutex::new((handle(&maps.mark_arguments)?, program(&programs.mark)?)),
            slots: Mutex::default(),
            stuck: Mutex::default(),
            programs: Vec::new(),
            _links: Vec::new(),
            barrier_map,
        };
        // Completions first: a write that is captured must not complete unseen.
        // And of each pair, the second one after the first: they run in this order.
        for watched in [
            &programs.request_done,
            &programs.request_again,
            &programs.bio_done,
            &programs.bio_again,
            &programs.capture_getrq,
            &programs.capture_back,
            &programs.capture_front,
            &programs.capture,
        ] {
            shared.programs.push(program(watched)?);
            let link = watched
                .attach()
                .map_err(|e| CaptureError::kernel(format!("attach {}", watched.name().to_string_lossy()), e))?;
            shared._links.push(keep(&link)?);
        }
        info!("capture programs loaded, proved and attached");
        Ok(Capture { shared: Arc::new(shared) })
    }

    /// Starts to capture the volumes into one new ring of `ring_bytes`.
    ///
    /// # Errors
    /// `Invalid` for a bad size or extent, `Unsupported` for a device that cannot be captured, `Limit`, `Kernel`.
    pub fn add_group(&self, ring_bytes: u32, volumes: &[VolumeSpec]) -> Result<Group, CaptureError> {
        Group::new(self.shared.clone(), ring_bytes, volumes)
    }

    /// How often the kernel skipped a capturing program because it interrupted itself on its CPU. Any rise is loss:
    /// which writes were missed is not known.
    ///
    /// # Errors
    /// `Kernel` if the statistics cannot be read.
    pub fn misses(&self) -> Result<u64, CaptureError> {
        let mut sum = 0;
        for program in &self.shared.programs[COMPLETION_PROGRAMS..] {
            sum += statistics(program)?.recursion_misses;
        }
        Ok(sum)
    }

    /// How many completions went unseen. Not loss: their writes are in the stream, and what would be missed is that a
    /// write failed. Their regions stay in flight until [`Capture::tend`] finds the disk idle, and get dirty then.
    ///
    /// # Errors
    /// `Kernel` if the statistics cannot be read.
    pub fn completion_misses(&self) -> Result<u64, CaptureError> {
        let mut skipped = 0;
        for program in [0, 2].map(|first| &self.shared.programs[first]) {
            skipped += statistics(program)?.recursion_misses;
        }
        Ok(skipped.saturating_sub(self.shared.config().rescued.load(Ordering::Acquire)))
    }

    /// Housekeeping, to be called about once a second: frees what dropped groups left behind, and takes back the
    /// counts of writes whose completion was not seen (their regions get dirty). Returns how many regions got dirty.
    ///
    /// # Errors
    /// `Kernel` if the state of a disk cannot be read.
    pub fn tend(&self) -> Result<u64, CaptureError> {
        self.shared.tend()
    }

    /// What the attached programs cost so far.
    ///
    /// # Errors
    /// `Kernel` if the statistics cannot be read.
    pub fn costs(&self) -> Result<Vec<ProgramCost>, CaptureError> {
        let cost = |program: &ProgramHandle| {
            let statistics = statistics(program)?;
            Ok(ProgramCost {
                name: program.name().to_string_lossy().into_owned(),
                run_count: statistics.run_count,
                run_time_ns: statistics.run_time_ns,
            })
        };
        self.shared.programs.iter().map(cost).collect()
    }
}

fn statistics(program: &ProgramHandle) -> Result<crate::memory::ProgramStatistics, CaptureError> {
    program_statistics(program).map_err(|e| CaptureError::kernel("read the statistics of a program", e))
}

/// Maps a table of the programs. The layouts of both sides are asserted when they are compiled; that they are the same is
/// asserted here.
fn table<T: crate::layout::Shared>(map: &impl MapCore, entries: usize) -> Result<Table<T>, CaptureError> {
    assert_eq!(map.value_size() as usize, size_of::<T>(), "layout of {:?}", map.name());
    Table::new(map, entries).map_err(|e| CaptureError::kernel("map a table of the capture programs", e))
}

/// The attachment without libbpf's object, so that it does not depend on the skeleton's life.
pub(crate) fn keep(link: &Link) -> Result<OwnedFd, CaptureError> {
    link.as_fd().try_clone_to_owned().map_err(|e| CaptureError::kernel("keep an attachment", e))
}

/// libbpf prints to standard error by default; what it says belongs to our log, and errors come back as values anyway.
fn libbpf_speaks_through_tracing() {
    libbpf_rs::set_print(Some((PrintLevel::Info, |level, text| match level {
        PrintLevel::Warn => tracing::debug!("libbpf: {}", text.trim_end()),
        _ => tracing::trace!("libbpf: {}", text.trim_end()),
    })));
}

/// Whether the kernel takes the programs; nothing stays loaded.
pub(crate) fn try_load() -> Result<(), CaptureError> {
    libbpf_speaks_through_tracing();
    let mut object = MaybeUninit::uninit();
    let skeleton = VarveSkelBuilder::default()
        .open(&mut object)
        .map_err(|e| CaptureError::kernel("open the capture programs", e))?;
    skeleton.load().map_err(load_error).map(drop)
}

fn load_error(error: libbpf_rs::Error) -> CaptureError {
    use libbpf_rs::ErrorKind::PermissionDenied;
    if error.kind() == PermissionDenied {
        return CaptureError::new(
            CaptureErrorKind::Permission,
            "load the capture programs",
            "run as root, or with CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN; in a container, also look at seccomp",
        )
        .because(error);
    }
    CaptureError::kernel("load the capture programs", error)
}

/// A bitmap of `words` 64-bit words.
pub(crate) fn dirty_map(words: u32) -> Result<MapHandle, CaptureError> {
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
        map_flags: libbpf_sys::BPF_F_MMAPABLE | libbpf_sys::BPF_F_INNER_MAP,
        ..Default::default()
    };
    MapHandle::create(MapType::Array, Some("varve_dirty"), 4, 8, words, &options)
        .map_err(|e| CaptureError::kernel(format!("make a bitmap of {words} words"), e))
}

impl Shared {
    pub(crate) fn config(&self) -> &ConfigEntry {
        &self.config[0]
    }

    pub(crate) fn slots(&self) -> MutexGuard<'_, Slots> {
        // A panic while the lock was held leaves slots taken, never given twice.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stuck(&self) -> MutexGuard<'_, Stuck> {
        self.stuck.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when every program that was running at the call has ended: the kernel waits for them whenever a map in
    /// a map is replaced.
    pub(crate) fn barrier(&self) {
        use std::os::fd::AsRawFd;
        let fd = self.barrier_map.as_fd().as_raw_fd();
        let updated = self.dirty.update(&BARRIER_VOLUME.to_ne_bytes(), &fd.to_ne_bytes(), MapFlags::ANY);
        if let Err(error) = updated {
            // Cannot happen with a valid map; a wait of many scheduler ticks is the next best.
            tracing::error!(%error, "cannot wait for running programs");
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
    }

    /// Runs the `mark` program with these arguments; returns what it returned.
    pub(crate) fn mark(&self, arguments: &[u8; MARK_BYTES]) -> Result<u32, CaptureError> {
        let mark = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        let (map, program) = &*mark;
        map.update(&0u32.to_ne_bytes(), arguments, MapFlags::ANY)
            .map_err(|e| CaptureError::kernel("pass a mark to its program", e))?;
        crate::memory::run_program(program).map_err(|e| CaptureError::kernel("run the mark program", e))
    }
}
