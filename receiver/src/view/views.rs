//! All open views.

use super::hints;
use super::overlay::Overlay;
use super::volume::ViewVolume;
use crate::group::registry::Slot;
use crate::limits::{CATCH_UP_TIME_MAX, OPEN_TIME_MAX, VIEWS_MAX};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use varve_common::control::{ExportKind, ViewReply, ViewVolume as VolumeReply, show_time};
use varve_common::point::{LocatedPoint, PointSpec};
use varve_common::problem::{Problem, ProblemKind};
use varve_export::device::{self, Attached, Way};
use varve_export::disk::Disk;
use varve_export::error::{ExportError, ExportErrorKind};
use varve_export::nbd::{Clients, Exports, NbdServer};
use varve_io::{DirectFile, IoError, crashsafe};
use varve_timeline::error::HistoryError;
use varve_timeline::timeline::{Pin, Timeline};

/// See the module's text.
#[derive(Debug)]
pub struct Views {
    /// Mounts and sockets.
    run_dir: PathBuf,
    /// For NBD over TCP.
    clients: Clients,
    next: AtomicU64,
    open: Mutex<BTreeMap<u64, View>>,
}

/// One view.
#[derive(Debug)]
struct View {
    reply: ViewReply,
    volumes: Vec<Arc<ViewVolume>>,
    served: Served,
    /// Keeps the point from expiring for as long as the view lives.
    pin: Pin,
}

#[derive(Debug)]
enum Served {
    Devices(Vec<Attached>),
    Nbd { server: NbdServer, exports: Arc<Exports>, names: Vec<String> },
}

/// What `varve view open` asks for.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Which point.
    pub at: PointSpec,
    /// Writes are taken.
    pub writable: bool,
    /// How it is served.
    pub export: ExportKind,
    /// NBD over TCP.
    pub listen: Option<String>,
}

impl Views {
    /// None yet. Removes what an earlier life of the daemon left below `run_dir`.
    pub fn new(run_dir: PathBuf, clients: Clients) -> Self {
        match device::clean(&run_dir) {
            Ok(cleaned) => {
                for left in &cleaned.left {
                    tracing::warn!(left, "a device of an earlier life stays");
                }
            }
            Err(error) => tracing::warn!(%error, "devices of an earlier life were not looked for"),
        }
        Self { run_dir, clients, next: AtomicU64::new(1), open: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, View>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a view. Blocks: it reads, and may wait for the replicas to catch up.
    ///
    /// # Errors
    /// For the operator.
    pub fn open(
        &self,
        slot: &Slot,
        group_dir: &Path,
        wish: &Wish,
        runtime: &tokio::runtime::Handle,
    ) -> Result<ViewReply, Problem> {
        if self.lock().len() >= VIEWS_MAX {
            let why = format!("{VIEWS_MAX} views are open, which is the most");
            return Err(Problem::refused("no view was opened", why, "'varve view list', then 'varve view close ID'"));
        }
        let (timeline, point) = find(slot, &wish.at)?;
        let pin = timeline.pin(point.height).map_err(|e| history_problem("the view cannot be opened", &e))?;
        let volumes = volumes_at(slot, &timeline, point.height, wish.writable.then_some(group_dir))?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (served, places) = self.serve(id, &volumes, wish, runtime)?;
        let named: Vec<(String, &dyn Disk)> =
            volumes.iter().map(|(path, volume)| (path.clone(), &**volume as &dyn Disk)).collect();
        let reply = ViewReply {
            id,
            group: slot.name.clone(),
            point: point.reply(),
            volumes: places,
            writable: wish.writable,
            export: wish.export,
            hints: hints::of(&named, wish.writable, wish.export),
            opened: Some(now()),
            held_bytes: None,
            written_bytes: None,
        };
        tracing::info!(view = id, group = slot.name, at = reply.point.time, "view opened");
        let volumes = volumes.into_iter().map(|(_, volume)| volume).collect();
        self.lock().insert(id, View { reply: reply.clone(), volumes, served, pin });
        Ok(reply)
    }

    fn serve(
        &self,
        id: u64,
        volumes: &[(String, Arc<ViewVolume>)],
        wish: &Wish,
        runtime: &tokio::runtime::Handle,
    ) -> Result<(Served, Vec<VolumeReply>), Problem> {
        let reply = |path: &str, volume: &ViewVolume| VolumeReply {
            path: path.to_owned(),
            bytes: varve_export::disk::Disk::len(volume),
            device: None,
            uri: None,
        };
        if wish.export == ExportKind::Device {
            let (mut devices, mut places) = (Vec::new(), Vec::new());
            for (number, (path, volume)) in volumes.iter().enumerate() {
                let name = format!("view{id}-{number}");
                let attached = device::attach(volume.clone(), &self.run_dir, &name, !wish.writable, Way::Fastest);
                let attached = attached.map_err(|e| export_problem(&e))?;
                let device = Some(attached.path().display().to_string());
                places.push(VolumeReply { device, ..reply(path, volume) });
                devices.push(attached);
            }
            return Ok((Served::Devices(devices), places));
        }
        let exports = Exports::new();
        let mut names = Vec::new();
        for (number, (path, volume)) in volumes.iter().enumerate() {
            let name = format!("volume{number}");
            exports.add(&name, volume.clone(), path).map_err(|e| export_problem(&e))?;
            names.push(name);
        }
        let _inside = runtime.enter();
        let (server, base) = match &wish.listen {
            None => {
                let io = |e: IoError| Problem::failed("no view was opened", e.chain(), "check the directory");
                crashsafe::create_dir_all_durable(&self.run_dir).map_err(io)?;
                let socket = self.run_dir.join(format!("view{id}.nbd"));
                let server = NbdServer::unix(&socket, exports.clone()).map_err(|e| export_problem(&e))?;
                (server, Base::Unix(socket))
            }
            Some(listen) => {
                let address: SocketAddr = listen.parse().map_err(|_| {
                    let why = format!("'{}' is no address with a port", listen.escape_debug());
                    Problem::usage("no view was opened", why, "for example --listen 192.0.2.7:10809")
                })?;
                let server = NbdServer::tcp(address, self.clients.clone(), exports.clone());
                let server = server.map_err(|e| export_problem(&e))?;
                let address = server.address().unwrap_or(address);
                (server, Base::Tls(address))
            }
        };
        let places = volumes
            .iter()
            .zip(&names)
            .map(|((path, volume), name)| VolumeReply { uri: Some(base.uri(name)), ..reply(path, volume) });
        let places = places.collect();
        Ok((Served::Nbd { server, exports, names }, places))
    }

    /// All open views.
    pub fn list(&self) -> Vec<ViewReply> {
        let show = |view: &View| ViewReply {
            written_bytes: view.reply.writable.then(|| view.volumes.iter().map(|volume| volume.overlay_bytes()).sum()),
            ..view.reply.clone()
        };
        self.lock().values().map(show).collect()
    }

    /// Whether it is open.
    pub fn has(&self, id: u64) -> bool {
        self.lock().contains_key(&id)
    }

    /// How many views of a group are open.
    pub fn count(&self, group: &str) -> u64 {
        self.lock().values().filter(|view| view.reply.group == group).count() as u64
    }

    /// The points that views of a group hold, with the views' numbers.
    pub fn heights(&self, group: &str) -> Vec<(u64, u64)> {
        let open = self.lock();
        let of_group = open.values().filter(|view| view.reply.group == group);
        of_group.map(|view| (view.reply.id, view.pin.height())).collect()
    }

    /// Closes a view. Blocks.
    ///
    /// # Errors
    /// For the operator; the view then stays open.
    pub fn close(&self, id: u64, force: bool, runtime: &tokio::runtime::Handle) -> Result<(), Problem> {
        let what = format!("view {id} was not closed");
        let view = self.lock().remove(&id);
        let Some(mut view) = view else {
            let why = "there is none of this number";
            return Err(Problem::not_found(what, why, "'varve view list' shows the open ones"));
        };
        if !force && let Some(user) = user_of(&view.served) {
            self.lock().insert(id, view);
            let next = "end that (umount, vgchange -an, disconnect), or --force: its users then get errors";
            return Err(Problem::refused(what, format!("it is in use: {user}"), next));
        }
        match &mut view.served {
            Served::Devices(devices) if force => devices.iter_mut().for_each(Attached::take_away),
            Served::Devices(devices) => {
                // All or none, as far as it can be told before.
                let free = devices.iter().try_for_each(Attached::is_free);
                if let Err(error) = free.and_then(|()| devices.iter_mut().try_for_each(Attached::detach)) {
                    for (attached, volume) in devices.iter().zip(&mut view.reply.volumes) {
                        // Its number may soon be another one's.
                        volume.device = volume.device.take().filter(|_| !attached.is_gone());
                    }
                    let problem = export_problem(&error);
                    self.lock().insert(id, view);
                    return Err(Problem { what, ..problem });
                }
            }
            Served::Nbd { .. } => {}
        }
        if let Served::Nbd { server, .. } = view.served {
            runtime.block_on(server.stop());
        }
        tracing::info!(view = id, group = view.reply.group, "view closed");
        Ok(())
    }

    /// The daemon ends: every device and server goes.
    pub fn close_all(&self, runtime: &tokio::runtime::Handle) {
        let ids: Vec<u64> = self.lock().keys().copied().collect();
        for id in ids {
            if let Err(problem) = self.close(id, true, runtime) {
                tracing::warn!(view = id, why = problem.why, "a view stays behind");
            }
        }
    }
}

enum Base {
    Unix(PathBuf),
    Tls(SocketAddr),
}

impl Base {
    fn uri(&self, name: &str) -> String {
        match self {
            Self::Unix(path) => format!("nbd+unix:///{name}?socket={}", path.display()),
            Self::Tls(address) => format!("nbds://{address}/{name}"),
        }
    }
}

/// Who uses one of the devices.
pub fn user_of_devices(devices: &[Attached]) -> Option<String> {
    devices.iter().find_map(Attached::in_use)
}

fn user_of(served: &Served) -> Option<String> {
    match served {
        Served::Devices(devices) => user_of_devices(devices),
        Served::Nbd { exports, names, .. } => {
            let clients: usize = names.iter().filter_map(|name| exports.connections(name)).sum();
            (clients > 0).then(|| format!("{clients} NBD connections"))
        }
    }
}

fn now() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    show_time(since.as_nanos() as u64)
}

/// The exact point that is meant, once the replicas have reached it.
///
/// # Errors
/// For the operator.
pub fn find(slot: &Slot, at: &PointSpec) -> Result<(Arc<Timeline>, LocatedPoint), Problem> {
    // The daemon may have started a moment ago.
    let begin = Instant::now();
    while slot.board().live.is_none() && slot.board().refusal.is_none() && begin.elapsed() < OPEN_TIME_MAX {
        std::thread::sleep(Duration::from_millis(10));
    }
    let board = slot.board().clone();
    let (Some(timeline), Some(live), Some(queue)) = (board.timeline, board.live, board.queue) else {
        let why = board.refusal.unwrap_or_else(|| "its files are not open".to_owned());
        let what = format!("the history of '{}' cannot be read", slot.name);
        return Err(Problem::failed(what, why, "see the receiver's log; it is tried again by itself"));
    };
    let now_ns = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    let landed = live.view().landed;
    if timeline.applied().height < landed.height {
        // What is landed counts, whatever its times say: the replicas are brought there first.
        queue.hurry();
        let there = timeline.wait_applied(landed.height, CATCH_UP_TIME_MAX);
        // A name and a position mean the same point then as now; the newest, or that of a time, may not be there yet.
        let certain = matches!(at, PointSpec::Bookmark(_) | PointSpec::Position { .. });
        if !there && !certain {
            let why = match live.failure() {
                Some(failure) => failure.text.clone(),
                None => format!("the replicas did not catch up within {} s", CATCH_UP_TIME_MAX.as_secs()),
            };
            let what = format!("'{at}' of '{}' cannot be read yet", slot.name);
            let next = "try again, or take an older point by its position or bookmark ('varve points')";
            return Err(Problem::failed(what, why, next));
        }
    }
    let point = timeline.locate(at, now_ns).map_err(|error| error.problem(&slot.name, &at.to_string()))?;
    Ok((timeline, point))
}

/// Every volume of a group at a height, with its path at the source. `overlay_in`: writable, with what is written there.
///
/// # Errors
/// For the operator.
pub fn volumes_at(
    slot: &Slot,
    timeline: &Arc<Timeline>,
    height: u64,
    overlay_in: Option<&Path>,
) -> Result<Vec<(String, Arc<ViewVolume>)>, Problem> {
    let meta = slot.board().meta.clone();
    let volumes = meta.map(|meta| meta.volumes).unwrap_or_default();
    let failed = |e: IoError| Problem::failed("the replica cannot be read", e.chain(), "see the receiver's log");
    let mut opened = Vec::with_capacity(volumes.len());
    for (number, volume) in volumes.into_iter().enumerate() {
        let replica = DirectFile::open_read(&volume.replica).map_err(failed)?;
        let bytes = volume.bytes_at(height);
        let overlay = overlay_in.map(|dir| Overlay::create(dir, bytes)).transpose().map_err(failed)?;
        let view = ViewVolume::new(timeline.clone(), replica, number as u16, bytes, height, overlay);
        opened.push((volume.path, Arc::new(view)));
    }
    Ok(opened)
}

/// As an operator is told.
pub fn history_problem(what: &str, error: &HistoryError) -> Problem {
    match error {
        HistoryError::Expired { .. } => {
            Problem::not_found(what, "the point has expired", "'varve points GROUP' shows what can be recovered")
        }
        HistoryError::Retired => Problem::not_found(what, error.to_string(), "'varve status' shows the groups"),
        HistoryError::Damaged { .. } | HistoryError::Missing { .. } | HistoryError::Format { .. } => Problem::failed(
            what,
            error.to_string(),
            "'varve scrub GROUP' shows which points are lost; take another one",
        ),
        other => Problem::failed(what, other.to_string(), "see the receiver's log"),
    }
}

/// As an operator is told.
pub fn export_problem(error: &ExportError) -> Problem {
    let kind = match error.kind() {
        ExportErrorKind::InUse | ExportErrorKind::Exists => ProblemKind::Refused,
        ExportErrorKind::Unfit => ProblemKind::Usage,
        ExportErrorKind::Io | ExportErrorKind::Missing => ProblemKind::Failed,
    };
    Problem::new(kind, error.what(), error.why(), error.next())
}

/// The views' directory in the run directory.
pub fn run_dir(paths: &varve_common::paths::Paths) -> PathBuf {
    paths.run_dir().join("views")
}
