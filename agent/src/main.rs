//! varve-agent: captures the writes of a production host's volumes and ships them to its receiver.

mod clock;
mod control;
mod daemon;
mod group;
mod link;
mod store;
mod volume;

use anyhow::{Context, Result};
use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use varve_common::paths::Paths;
use varve_common::problem::Problem;
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
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_env("VARVE_LOG").unwrap_or_else(|_| "info".into()))
        .init();
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")
        .and_then(|runtime| runtime.block_on(run(Paths::new(arguments.root))));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            match error.downcast_ref::<Problem>() {
                Some(problem) => tracing::error!("{problem}; {}", problem.next),
                None => tracing::error!("{error:#}"),
            }
            ExitCode::FAILURE
        }
    }
}

async fn run(paths: Paths) -> Result<()> {
    let state = paths.agent_state();
    create_dir_all_durable(&state)?;
    let _lock = DirLock::acquire(&state)?;
    let daemon = daemon::Daemon::open(paths.clone())?;
    daemon.start_groups().await?;
    let server = LocalServer::bind(&paths.agent_socket()).context("cannot serve the control socket")?;
    tokio::spawn(control::serve(daemon.clone(), server));
    tokio::spawn(daemon.clone().tick());
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
    wait_for_end().await?;
    notify::stopping();
    tracing::info!("stopping");
    daemon.stop().await;
    Ok(())
}

async fn wait_for_end() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
