//! Start, accept loops, stop.

use crate::group::registry::Registry;
use crate::promote::Promotions;
use crate::view::views::{Views, run_dir};
use crate::watch::Watching;
use crate::{control, keeper, session, watch};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use varve_common::config::ReceiverConfig;
use varve_common::paths::Paths;
use varve_common::problem::Problem;
use varve_export::nbd::Clients;
use varve_io::{DirLock, IoError, crashsafe, notify};

use varve_net::endpoint::{Accepted, CloseCode, Peer, Server, serve_join};
use varve_net::hosts::{Hosts, Standing};
use varve_net::identity::{Authority, fingerprint};
use varve_net::local::LocalServer;
use varve_net::tls::nbd_config;

/// The registry of hosts, beside the keys.
pub const HOSTS_NAME: &str = "hosts.json";

/// What all parts of the running daemon share.
#[derive(Debug)]
pub struct Daemon {
    /// This receiver's name, for people.
    pub name: String,
    /// Signs hosts.
    pub authority: Arc<Authority>,
    /// Knows hosts.
    pub hosts: Arc<Hosts>,
    /// Listens.
    pub server: Server,
    /// Has the groups.
    pub registry: Arc<Registry>,
    /// Has the views.
    pub views: Views,
    /// Has what runs here.
    pub promotions: Arc<Promotions>,
    /// Watches all of it.
    pub watching: Watching,
}

impl Daemon {
    /// Where it listens.
    pub fn address(&self) -> Option<String> {
        self.server.local_addr().ok().map(|address| address.to_string())
    }
}

/// The whole program.
pub fn main(root: &Path) -> ExitCode {
    varve_io::cpu::free_gives_back();
    init_log();
    if let Err(error) = varve_io::cpu::serve_block_devices() {
        // Of interest to whoever runs a group here, not to everybody who has one replicated.
        let next = "CAP_SYS_RESOURCE, if groups are to run here";
        tracing::info!(why = error.chain(), next, "when memory runs out, promoted volumes may stand still");
    }
    match run(&Paths::new(root)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            tracing::error!(why = problem.why, next = problem.next, "{}", problem.what);
            ExitCode::from(problem.kind.exit_code())
        }
    }
}

fn init_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
}

fn io_problem(what: &str, error: &IoError) -> Problem {
    Problem::failed(what, error.chain(), "check the path, its permissions and free space")
}

fn net_problem(what: &str, error: &varve_net::Error) -> Problem {
    let why = error.why();
    let why = if why.is_empty() { error.to_string() } else { format!("{error}: {why}") };
    Problem::failed(what, why, error.hint())
}

fn read_config(paths: &Paths) -> Result<ReceiverConfig, Problem> {
    let path = paths.receiver_config();
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => {
            let error = IoError::new("read", &path, e);
            return Err(io_problem("the configuration cannot be read", &error));
        }
    };
    ReceiverConfig::parse(&path.display().to_string(), &text)
}

fn run(paths: &Paths) -> Result<(), Problem> {
    let config = read_config(paths)?;
    let identity = paths.receiver_identity();
    if !identity.join("ca.pem").exists() {
        return Err(Problem::refused(
            "this machine is not set up as a receiver",
            format!("there is no identity in {}", identity.display()),
            "run 'varve receiver init' once",
        ));
    }
    let authority = Authority::open(&identity).map_err(|e| net_problem("the identity cannot be used", &e))?;
    let hosts = Hosts::open(identity.join(HOSTS_NAME));
    let hosts = Arc::new(hosts.map_err(|e| net_problem("the registry of hosts cannot be used", &e))?);
    let state = paths.receiver_state();
    let failed = |e: IoError| io_problem("the state directory cannot be used", &e);
    crashsafe::create_dir_all_durable(&state).map_err(failed)?;
    let _lock = DirLock::acquire(&state).map_err(failed)?;
    crashsafe::remove_temporaries(&state).map_err(failed)?;
    let registry = Registry::load(paths.clone(), config.clone()).map_err(failed)?;

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Problem::failed("the runtime cannot start", e.to_string(), "see ulimit -u"))?;
    runtime.block_on(serve(paths, config, Arc::new(authority), hosts, Arc::new(registry)))
}

async fn serve(
    paths: &Paths,
    config: ReceiverConfig,
    authority: Arc<Authority>,
    hosts: Arc<Hosts>,
    registry: Arc<Registry>,
) -> Result<(), Problem> {
    let signal_problem = |e: std::io::Error| Problem::failed("signals cannot be watched", e.to_string(), "");
    let mut terminate = signal(SignalKind::terminate()).map_err(signal_problem)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(signal_problem)?;
    let local = LocalServer::bind(&paths.receiver_socket());
    let local = local.map_err(|e| net_problem("the control socket cannot be served", &e))?;
    let server = Server::bind(config.listen, &authority, hosts.clone());
    let server = server.map_err(|e| net_problem("cannot listen", &e))?;
    if !server.buffers().is_full() {
        let (wanted, got) = (server.buffers().wanted_bytes, server.buffers().receive_bytes);
        tracing::warn!(wanted, got, "small socket buffers: give CAP_NET_ADMIN, or raise net.core.rmem_max");
    }
    let tls = nbd_config(&authority, hosts.clone()).map_err(|e| net_problem("NBD cannot be served", &e))?;
    let known = hosts.clone();
    let may_stay = Arc::new(move |certificate: &rustls::pki_types::CertificateDer<'_>| {
        matches!(known.standing(&fingerprint(certificate)), Standing::Enrolled(_))
    });
    let views = Views::new(run_dir(paths), Clients { tls: Arc::new(tls), may_stay });
    let promotions = Arc::new(Promotions::new(run_dir(paths), paths));
    let watching = Watching::new(config.watch);
    let daemon =
        Arc::new(Daemon { name: config.name, authority, hosts, server, registry, views, promotions, watching });
    daemon.registry.open_all().await;
    // What ran here before the daemon ended runs here again.
    tokio::spawn(daemon.promotions.clone().keep_serving(daemon.registry.clone()));
    let keeper = daemon.registry.clone();
    let keeper = std::thread::Builder::new().name("keeper".to_owned()).spawn(move || keeper::run(&keeper));
    let keeper = keeper.map_err(|e| Problem::failed("the keeper cannot start", e.to_string(), "see ulimit -u"))?;
    let address = daemon.address().unwrap_or_default();
    tracing::info!(address, name = daemon.name, groups = daemon.registry.groups().len(), "ready");
    watch::start(&daemon).map_err(|e| Problem::failed("the watch cannot start", e.to_string(), "see ulimit -u"))?;
    notify::ready();

    let mut watchdog = notify::watchdog_interval().map(tokio::time::interval);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = alive(&mut watchdog) => notify::watchdog(),
            accepted = daemon.server.accept() => match accepted {
                Some(accepted) => drop(tokio::spawn(connection(daemon.clone(), accepted))),
                None => break,
            },
            client = local.accept() => match client {
                Ok(peer) => drop(tokio::spawn(control::serve(daemon.clone(), peer))),
                Err(error) => tracing::warn!(%error, why = error.why(), "control socket"),
            },
        }
    }
    notify::stopping();
    tracing::info!("stopping");
    let (views, runtime) = (daemon.clone(), tokio::runtime::Handle::current());
    // A panic was told by the thread's own end.
    let _ = tokio::task::spawn_blocking(move || {
        views.views.close_all(&runtime);
        views.promotions.close_all();
    })
    .await;
    daemon.registry.stop().await;
    daemon.server.close().await;
    let _ = tokio::task::spawn_blocking(move || keeper.join()).await;
    tracing::info!("stopped");
    Ok(())
}

async fn alive(watchdog: &mut Option<tokio::time::Interval>) {
    match watchdog {
        Some(interval) => drop(interval.tick().await),
        None => std::future::pending().await,
    }
}

/// One connection: a host that joins, or the streams of one that did.
async fn connection(daemon: Arc<Daemon>, accepted: Accepted) {
    let remote = accepted.remote;
    let host = match &accepted.peer {
        Peer::Host { name, .. } => name.clone(),
        Peer::Joiner { .. } => {
            match serve_join(&accepted, &daemon.authority, &daemon.hosts).await {
                Ok(host) => {
                    let closed = daemon.server.enforce();
                    tracing::info!(host, %remote, closed, "joined");
                }
                Err(error) => tracing::warn!(%remote, %error, why = error.why(), "not joined"),
            }
            return;
        }
    };
    tracing::debug!(host, %remote, "connected");
    let peer = session::Peer { host, remote };
    while let Ok((send, recv)) = accepted.connection.accept_bi().await {
        if daemon.registry.is_stopping() {
            CloseCode::Shutdown.close(&accepted.connection);
            break;
        }
        tokio::spawn(session::serve(daemon.registry.clone(), peer.clone(), send, recv));
    }
    tracing::debug!(host = peer.host, %remote, "disconnected");
}
