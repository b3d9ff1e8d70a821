//! Loading the programs, and what all groups share.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{Link, MapCore, MapFlags, MapHandle, MapType, ProgramHandle, libbpf_sys};
use tracing::info;

use crate::calibrate::calibrate;
use crate::doctor;
use crate::error::{CaptureError, CaptureErrorKind};
use crate::group::{Group, VolumeSpec};
use crate::layout::*;
use crate::memory::{Table, program_statistics};
use crate::pins::{self, Pins, sign};
use crate::skeleton::VarveSkelBuilder;
use crate::slots::Slots;
use crate::tend::Stuck;
use crate::verdict;

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

/// Where the capture that runs came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Loaded now, and pinned.
    New,
    /// Pins of an earlier agent: its groups can be taken over.
    TakenOver {
        /// The version that pinned them.
        software: String,
        /// Its programs are those that this version would load. If not they run on all the same, until the pins go.
        same_programs: bool,
    },
    /// There were pins that could not be gone on with, for the reason named. They are gone.
    Replaced(String),
    /// Loaded now, and it ends with this process, for the reason named.
    Unpinned(String),
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::New => write!(f, "new"),
            Self::TakenOver { software, same_programs: true } => write!(f, "taken over from varve {software}"),
            Self::TakenOver { software, same_programs: false } => {
                write!(f, "taken over from varve {software}, whose programs run on until the next boot")
            }
            Self::Replaced(why) => write!(f, "replaced what was pinned: {why}"),
            Self::Unpinned(why) => write!(f, "not pinned: {why}"),
        }
    }
}

/// The loaded and proved capture programs. Dropping it ends capture when its last group is gone, too, unless it is
/// pinned: then capture goes on until [`Capture::unpin`].
pub struct Capture {
    shared: Arc<Shared>,
    origin: Origin,
}

/// What the kernel holds for us, new or found in pins.
pub(crate) struct Objects {
    /// In the order of [`pins::MAPS`].
    pub(crate) maps: Vec<MapHandle>,
    /// In the order of [`pins::PROGRAMS`].
    pub(crate) programs: Vec<ProgramHandle>,
    pub(crate) mark: ProgramHandle,
    /// The attachments of the programs: closing them detaches, unless they are pinned.
    pub(crate) links: Vec<OwnedFd>,
}

pub(crate) struct Shared {
    pub(crate) disks: Table<DiskEntry>,
    pub(crate) volumes: Table<VolumeEntry>,
    pub(crate) groups: Table<GroupEntry>,
    pub(crate) inflight: Table<AtomicU64>,
    pub(crate) ledger: Table<LedgerEntry>,
    config: Table<ConfigEntry>,
    pub(crate) rings: MapHandle,
    pub(crate) dirty: MapHandle,
    pub(crate) bios: MapHandle,
    mark: Mutex<(MapHandle, ProgramHandle)>,
    slots: Mutex<Slots>,
    stuck: Mutex<Stuck>,
    /// The attached programs; those that capture come last.
    programs: Vec<ProgramHandle>,
    links: Mutex<Vec<OwnedFd>>,
    pins: Option<Pins>,
    /// Cleared when the pins are taken away.
    pinned: AtomicBool,
    barrier_map: MapHandle,
}

impl Capture {
    /// Loads the programs, finds and proves the way from pages to data, and attaches. Capture ends with this process.
    ///
    /// # Errors
    /// `Unsupported`, `Permission` or `Calibration` with a hint; nothing stays behind.
    pub fn load(options: &CaptureOptions) -> Result<Capture, CaptureError> {
        Self::start(options, None)
    }

    /// The same, with everything pinned in the directory `pins` of a bpffs (mounted there if need be), so that capture
    /// goes on without this process. What an earlier process pinned there is taken over if it is proved to be whole, of
    /// this boot, of a layout that we know, and to read pages as we found and proved it now; else it is replaced.
    /// [`Capture::origin`] says which.
    ///
    /// # Errors
    /// As [`Capture::load`]; what was pinned before stays then, and goes on capturing.
    pub fn open(options: &CaptureOptions, pins: &Path) -> Result<Capture, CaptureError> {
        Self::start(options, Some(pins))
    }

    fn start(options: &CaptureOptions, dir: Option<&Path>) -> Result<Capture, CaptureError> {
        doctor::refuse_unsupported()?;
        verdict::listen();
        let pins = dir.map(Pins::prepare);
        let mut object = MaybeUninit::uninit();
        let skeleton = VarveSkelBuilder::default()
            .open(&mut object)
            .map_err(|e| CaptureError::kernel("open the capture programs", e))?;
        let skeleton = skeleton.load().map_err(load_error)?;
        let (maps, programs) = (&skeleton.maps, &skeleton.progs);
        let config: Table<ConfigEntry> = table(&maps.bss, 1)?;
        calibrate(
            &options.probe,
            &config,
            &map_handle(&maps.probe)?,
            &programs.calibrate,
            &program_handle(&programs.peek)?,
        )?;

        let mut origin = Origin::New;
        if let Some(Ok(pins)) = pins.as_ref().filter(|pins| pins.as_ref().is_ok_and(Pins::has_set)) {
            let mut fresh = Vec::new();
            for program in attached(programs) {
                fresh.push(program_handle(program)?.tag());
            }
            match Self::take_over(pins, &config[0], &fresh) {
                Ok(capture) => return Ok(capture),
                Err(why) => origin = Origin::Replaced(why),
            }
        }

        let mut objects = Objects {
            maps: vec![
                map_handle(&maps.disks)?,
                map_handle(&maps.volumes)?,
                map_handle(&maps.groups)?,
                map_handle(&maps.inflight)?,
                map_handle(&maps.bss)?,
                map_handle(&maps.rings)?,
                map_handle(&maps.dirty)?,
                map_handle(&maps.bios)?,
                map_handle(&maps.mark_arguments)?,
                shared_map("varve_ledger", size_of::<LedgerEntry>(), GROUPS_MAX)?,
                shared_map("varve_identity", size_of::<IdentityEntry>(), 1)?,
            ],
            programs: Vec::new(),
            mark: program_handle(&programs.mark)?,
            links: Vec::new(),
        };
        sign(&table(&objects.maps[10], 1)?[0])?;
        for watched in attached(programs) {
            objects.programs.push(program_handle(watched)?);
            let link = watched
                .attach()
                .map_err(|e| CaptureError::kernel(format!("attach {}", watched.name().to_string_lossy()), e))?;
            objects.links.push(keep(&link)?);
        }
        let kept = pins.map(|pins| pins.and_then(|pins| pins.keep(&objects).map(|()| pins)));
        let pins = match kept {
            Some(Ok(pins)) => Some(pins),
            Some(Err(error)) => {
                origin = Origin::Unpinned(explain(&error));
                None
            }
            None => {
                origin = Origin::Unpinned("that was not asked for".into());
                None
            }
        };
        let shared = Shared::over(objects, pins)?;
        info!(%origin, "capture programs loaded, proved and attached");
        Ok(Capture { shared: Arc::new(shared), origin })
    }

    /// Goes on with what is pinned; the error says which check failed. `proved` is what was found and proved now, `fresh`
    /// the hashes of the programs that we would load.
    fn take_over(pins: &Pins, proved: &ConfigEntry, fresh: &[[u8; 8]]) -> Result<Self, String> {
        let (objects, software) = pins.open()?;
        let same_programs = objects.programs.iter().map(ProgramHandle::tag).eq(fresh.iter().copied());
        let shared = Shared::over(objects, Some(pins.clone())).map_err(|e| explain(&e))?;
        let constants = |config: &ConfigEntry| {
            [&config.page_base, &config.data_base, &config.ratio].map(|word| word.load(Ordering::Acquire))
        };
        if constants(shared.config()) != constants(proved) {
            return Err("its way from a page to its data is not the one that was proved now".into());
        }
        shared.recover().map_err(|e| explain(&e))?;
        let origin = Origin::TakenOver { software, same_programs };
        info!(%origin, "pinned capture goes on");
        Ok(Capture { shared: Arc::new(shared), origin })
    }

    /// Where it came from.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Whether it goes on without this process.
    pub fn is_pinned(&self) -> bool {
        self.shared.is_pinned()
    }

    /// The names of the groups that an earlier process left in the pins and nobody has taken over yet.
    pub fn kept(&self) -> Vec<String> {
        let slots = self.shared.slots();
        slots.kept().map(|slot| self.shared.ledger[slot as usize].name()).collect()
    }

    /// Starts to capture the volumes into one new ring, of a group that an agent may go on with later, once it has left
    /// a note ([`Group::set_note`]).
    ///
    /// # Errors
    /// As [`Capture::add_group`].
    pub fn add_named_group(
        &self,
        name: &str,
        incarnation: [u8; 16],
        ring_bytes: u32,
        volumes: &[VolumeSpec],
    ) -> Result<Group, CaptureError> {
        Group::new(self.shared.clone(), name, incarnation, ring_bytes, volumes)
    }

    /// Goes on with a group that an earlier process left in the pins (or this one, see [`Group::leave`]), if it captures these
    /// very volumes; they may have grown, then [`Group::grow`] is to be called. `None`: there
    /// is no such group. The error says which check failed; the group is still there then.
    pub fn take_over_group(&self, name: &str, volumes: &[VolumeSpec]) -> Option<Result<Group, String>> {
        Group::take_over(self.shared.clone(), name, volumes)
    }

    /// Ends the capture of a group that an earlier process left in the pins; whether there was one.
    pub fn give_up(&self, name: &str) -> bool {
        self.shared.give_up(name)
    }

    /// Takes the pins away and ends capture, of groups that still exist, too.
    ///
    /// # Errors
    /// `Kernel` if the pins cannot be removed.
    pub fn unpin(&self) -> Result<(), CaptureError> {
        self.shared.pinned.store(false, Ordering::Release);
        if let Some(pins) = &self.shared.pins {
            pins.remove()?;
        }
        self.shared.links.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(())
    }

    /// Starts to capture the volumes into one new ring of `ring_bytes`.
    ///
    /// # Errors
    /// `Invalid` for a bad size or extent, `Unsupported` for a device that cannot be captured, `Limit`, `Kernel`.
    pub fn add_group(&self, ring_bytes: u32, volumes: &[VolumeSpec]) -> Result<Group, CaptureError> {
        Group::new(self.shared.clone(), "", [0; 16], ring_bytes, volumes)
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
    /// counts of writes whose completion was not seen (their regions get dirty). Where that has happened, a count
    /// that is never zero for long makes its regions dirty, too, on disks that are never idle. Returns how many regions got dirty.
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

/// The programs that are attached, in the order of [`pins::PROGRAMS`], see there.
fn attached<'a, 'o>(programs: &'a crate::skeleton::VarveProgs<'o>) -> [&'a libbpf_rs::ProgramMut<'o>; 8] {
    [
        &programs.request_done,
        &programs.request_again,
        &programs.bio_done,
        &programs.bio_again,
        &programs.capture_getrq,
        &programs.capture_back,
        &programs.capture_front,
        &programs.capture,
    ]
}

fn map_handle(map: &libbpf_rs::MapMut<'_>) -> Result<MapHandle, CaptureError> {
    MapHandle::try_from(map).map_err(|e| CaptureError::kernel("keep a map of the capture programs", e))
}

fn program_handle(program: &libbpf_rs::ProgramMut<'_>) -> Result<ProgramHandle, CaptureError> {
    ProgramHandle::try_from(program).map_err(|e| CaptureError::kernel("keep a capture program", e))
}

fn explain(error: &CaptureError) -> String {
    let source = std::error::Error::source(error).map_or(String::new(), |source| format!(": {source}"));
    format!("{error}{source}")
}

/// Whether the kernel takes the programs; nothing stays loaded.
pub(crate) fn try_load() -> Result<(), CaptureError> {
    verdict::listen();
    let mut object = MaybeUninit::uninit();
    let skeleton = VarveSkelBuilder::default()
        .open(&mut object)
        .map_err(|e| CaptureError::kernel("open the capture programs", e))?;
    skeleton.load().map_err(load_error).map(drop)
}

fn load_error(error: libbpf_rs::Error) -> CaptureError {
    use libbpf_rs::ErrorKind::PermissionDenied;
    if let Some(refusal) = verdict::take() {
        return CaptureError::new(
            CaptureErrorKind::Unsupported,
            format!("this kernel's verifier refused the capture program {refusal}"),
            "report this with the kernel's version (`uname -r`); meanwhile, boot another kernel",
        )
        .because(error);
    }
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

/// An array that is mapped.
fn mapped_array(name: &str, value_bytes: usize, entries: usize, flags: u32) -> Result<MapHandle, CaptureError> {
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
        map_flags: libbpf_sys::BPF_F_MMAPABLE | flags,
        ..Default::default()
    };
    MapHandle::create(MapType::Array, Some(name), 4, value_bytes as u32, entries as u32, &options)
        .map_err(|e| CaptureError::kernel(format!("make the map {name} of {entries} times {value_bytes} bytes"), e))
}

/// A table that only agents use, in memory that can be pinned.
fn shared_map(name: &str, value_bytes: usize, entries: usize) -> Result<MapHandle, CaptureError> {
    mapped_array(name, value_bytes, entries, 0)
}

/// A bitmap of `words` 64-bit words.
pub(crate) fn dirty_map(words: u32) -> Result<MapHandle, CaptureError> {
    mapped_array("varve_dirty", 8, words as usize, libbpf_sys::BPF_F_INNER_MAP)
}

impl Shared {
    fn over(objects: Objects, pins: Option<Pins>) -> Result<Self, CaptureError> {
        let Objects { maps, programs, mark, links } = objects;
        let maps: [MapHandle; pins::MAPS.len()] = maps.try_into().expect("as many maps as names");
        let [disks, volumes, groups, inflight, config, rings, dirty, bios, mark_arguments, ledger, _identity] = maps;
        assert_eq!(bios.value_size() as usize, TRACKED_BYTES);
        assert_eq!(mark_arguments.value_size() as usize, MARK_BYTES);
        Ok(Self {
            disks: table(&disks, DISKS_MAX)?,
            volumes: table(&volumes, VOLUMES_MAX)?,
            groups: table(&groups, GROUPS_MAX)?,
            inflight: table(&inflight, INFLIGHT_SLOTS)?,
            ledger: table(&ledger, GROUPS_MAX)?,
            config: table(&config, 1)?,
            rings,
            dirty,
            bios,
            mark: Mutex::new((mark_arguments, mark)),
            slots: Mutex::default(),
            stuck: Mutex::default(),
            programs,
            links: Mutex::new(links),
            pinned: AtomicBool::new(pins.is_some()),
            pins,
            barrier_map: dirty_map(1)?,
        })
    }

    pub(crate) fn is_pinned(&self) -> bool {
        self.pinned.load(Ordering::Acquire)
    }

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
