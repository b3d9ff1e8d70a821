//! varve-agent: captures the writes of a production host's volumes and ships them to its receiver.

mod clock;
mod control;
mod daemon;
mod failback;
mod group;
mod journal;
mod link;
mod misses;
mod quiesce;
mod seal;
mod store;
mod volume;
mod watch;

use anyhow::{Context, Result};
use clap::Parser;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::signal::unix::{Signal, SignalKind, signal};
use varve_common::paths::Paths;
use varve_common::problem::{Problem, ProblemKind};
use varve_io::crashsafe::{DirLock, create_dir_all_durable};
use varve_io::notify;
use varve_net::local::LocalServer;

/// The daemon of the production host. Everything a person does is done with `varve`.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Directory below which all paths lie.
    #[arg(long, env = "VARVE_ROOT", default_value = "/")]
    root: PathBuf,
    /// Take all pins away and exit: capture ends for every volume, and each is compared as a whole when it is protected
    /// again. For the removal of the package; the agent must not be running.
    #[arg(long)]
    unpin_all: bool,
}

fn main() -> ExitCode {
    varve_io::cpu::free_gives_back();
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_env("VARVE_LOG").unwrap_or_else(|_| "info".into()))
        .init();
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")
        .and_then(|runtime| {
            let paths = Paths::new(arguments.root);
            if arguments.unpin_all { unpin_all(&paths) } else { runtime.block_on(run(paths)) }
        });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let problem = error.downcast_ref::<Problem>();
            match problem {
                Some(problem) => tracing::error!("{problem}; {}", problem.next),
                None => tracing::error!("{error:#}"),
            }
            // 2, a configuration that is not understood: the unit does not start it again and again.
            let usage = problem.is_some_and(|problem| problem.kind == ProblemKind::Usage);
            if usage { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

fn unpin_all(paths: &Paths) -> Result<()> {
    let state = paths.agent_state();
    // Without the directory no agent can be running.
    let _lock = if state.exists() { Some(DirLock::acquire(&state)?) } else { None };
    let dir = paths.bpffs();
    match varve_bpf::unpin_all(&dir)? {
        true => tracing::info!("nothing is captured any more, {} is removed", dir.display()),
        false => tracing::info!("nothing was pinned in {}", dir.display()),
    }
    Ok(())
}

async fn run(paths: Paths) -> Result<()> {
    let mut end = End::listen()?;
    let state = paths.agent_state();
    create_dir_all_durable(&state)?;
    let _lock = DirLock::acquire(&state)?;
    let daemon = daemon::Daemon::open(paths.clone())?;
    daemon.start_groups().await?;
    let server = LocalServer::bind(&paths.agent_socket()).context("cannot serve the control socket")?;
    tokio::spawn(control::serve(daemon.clone(), server));
    tokio::spawn(daemon.clone().tick());
    watch::start(&daemon).context("cannot start the watch")?;
    if let Some(interval) = notify::watchdog_interval() {
        tokio::spawn(async move {
            loop {
                notify::watchdog();
                tokio::time::sleep(interval / 2).await;
            }
        });
    }
    notify::ready();
    tracing::info!(root = %paths.root().display(), version = env!("CARGO_PKG_VERSION"), "varve-agent is ready");
    end.wait().await;
    notify::stopping();
    tracing::info!("stopping");
    daemon.stop().await;
    Ok(())
}

/// The signals that end the daemon. Made before it says that it is ready, so that none can kill it unprepared.
struct End {
    terminate: Signal,
    interrupt: Signal,
}

impl End {
    fn listen() -> Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
