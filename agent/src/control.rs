//! The agent's side of the control socket.

use crate::daemon::Daemon;
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant};
use varve_common::control::{AgentRequest, BookmarkReply, Progress, Reply, VerifyReply, show_position, show_time};
use varve_common::problem::{Problem, check_name};
use varve_common::wire::messages::Verify;
use varve_net::local::{LocalPeer, LocalServer};

/// Between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// Serves clients, for ever.
pub async fn serve(daemon: Arc<Daemon>, server: LocalServer) {
    loop {
        match server.accept().await {
            Ok(peer) => {
                tokio::spawn(client(daemon.clone(), peer));
            }
            Err(error) => {
                tracing::error!("{error}: {}", error.why());
                tokio::time::sleep(PROGRESS_EVERY).await;
            }
        }
    }
}

async fn client(daemon: Arc<Daemon>, mut peer: LocalPeer) {
    loop {
        match peer.read_request::<AgentRequest>().await {
            Ok(Some(request)) => {
                if let Err(error) = answer(&daemon, &mut peer, request).await {
                    tracing::debug!("{error}: {}", error.why());
                    return;
                }
            }
            Ok(None) => return,
            Err(error) => {
                let problem = Problem::usage(error.to_string(), error.why(), "use a varve of the same version");
                // The client may be gone.
                let _ = peer.send(&Reply::<()>::Problem(problem)).await;
                return;
            }
        }
    }
}

fn reply<T: Serialize>(outcome: Result<T, Problem>) -> Reply<T> {
    match outcome {
        Ok(done) => Reply::Done(done),
        Err(problem) => Reply::Problem(problem),
    }
}

async fn answer(daemon: &Arc<Daemon>, peer: &mut LocalPeer, request: AgentRequest) -> varve_net::error::Result<()> {
    match request {
        AgentRequest::Status { group } => peer.send(&reply(daemon.status(group.as_deref()))).await,
        AgentRequest::Reload => peer.send(&reply(daemon.reload())).await,
        AgentRequest::Protect { group, volumes, replicas, dry_run } => {
            let outcome = daemon.protect(group, volumes, replicas, dry_run).await;
            peer.send(&reply(outcome)).await
        }
        AgentRequest::ComeHome { group, volumes } => peer.send(&reply(daemon.come_home(group, volumes).await)).await,
        AgentRequest::Resume { group, force } => peer.send(&reply(daemon.resume_by_hand(&group, force).await)).await,
        AgentRequest::Unprotect { group } => peer.send(&reply(daemon.unprotect(&group).await)).await,
        AgentRequest::Bookmark { group, name } => peer.send(&reply(bookmark(daemon, &group, name).await)).await,
        AgentRequest::Verify { group, repair } => verify(daemon, peer, &group, repair).await,
    }
}

async fn bookmark(daemon: &Daemon, group: &str, name: String) -> Result<BookmarkReply, Problem> {
    check_name("bookmark", &name)?;
    let handle = daemon.group(group)?;
    let (position, time_ns, durable) = handle.bookmark(name.clone()).await?;
    Ok(BookmarkReply {
        group: group.to_owned(),
        name,
        position: show_position(&handle.shared.incarnation, position),
        time: show_time(time_ns),
        consistency: "crash".to_owned(),
        durable,
    })
}

async fn verify(daemon: &Daemon, peer: &mut LocalPeer, group: &str, repair: bool) -> varve_net::error::Result<()> {
    let begun = match daemon.group(group) {
        Ok(handle) => handle.verify(repair).await.map(|id| (handle, id)),
        Err(problem) => Err(problem),
    };
    let (handle, id) = match begun {
        Ok(begun) => begun,
        Err(problem) => return peer.send(&Reply::<VerifyReply>::Problem(problem)).await,
    };
    let began = Instant::now();
    loop {
        tokio::time::sleep(PROGRESS_EVERY.min(began.elapsed() + Duration::from_millis(10))).await;
        let Some(verify) = handle.shared.facts().verify.clone().filter(|verify| verify.id == id) else { continue };
        if verify.finished {
            return peer.send(&outcome(group, verify)).await;
        }
        let rate = verify.done_bytes as f64 / began.elapsed().as_secs_f64();
        let left = (verify.total_bytes - verify.done_bytes) as f64;
        let progress = Progress {
            done_bytes: verify.done_bytes,
            total_bytes: verify.total_bytes,
            bytes_per_second: rate,
            seconds_left: (rate > 0.0).then(|| left / rate),
        };
        peer.send(&Reply::<VerifyReply>::Progress(progress)).await?;
    }
}

fn outcome(group: &str, verify: Verify) -> Reply<VerifyReply> {
    match &verify.error {
        Some(error) => Reply::Problem(Problem::failed(
            format!("the verify of group '{group}' came to no result"),
            error.clone(),
            format!("look at 'varve status {group}' and run it again"),
        )),
        None => Reply::Done(VerifyReply { group: group.to_owned(), verify }),
    }
}
