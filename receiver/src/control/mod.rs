//! The control socket: what `varve` asks of a receiver.
//!
//! - `takeover`: failover, commit, abort
//! - `failback`: calling a group home, the cut-over
//! - `history`: points, views, rollback, restore, retention, scrub
//! - `progress`: what is said until there is an answer

mod failback;
mod history;
mod progress;
mod takeover;

use crate::daemon::Daemon;
use crate::group::registry::ForgetError;
use crate::status;
use crate::view::views::Wish;
pub use progress::ProgressOut;
use progress::{follow, progress, wait_for};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::mpsc;
use varve_common::control::{
    DaemonStatus, HostStatus, HostsReply, InviteReply, InviteStatus, Progress, ReceiverRequest, Reply, StatusReply,
    VerifyReply, show_time,
};
use varve_common::problem::{Problem, ProblemKind};
use varve_common::wire::messages::{Ask, Verify};
use varve_net::local::LocalPeer;
use varve_net::token::JoinToken;
use varve_net::{Error, ErrorKind};

/// How often a running verify is looked at.
const VERIFY_INTERVAL: Duration = Duration::from_millis(200);
/// The longest that an agent may take to begin a verify.
const VERIFY_START_MAX: Duration = Duration::from_secs(30);

/// Serves one client until it leaves.
pub async fn serve(daemon: Arc<Daemon>, mut peer: LocalPeer) {
    loop {
        let served = match peer.read_request::<ReceiverRequest>().await {
            Ok(Some(request)) => answer(&daemon, &mut peer, request).await,
            Ok(None) => return,
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            tracing::debug!(%error, why = error.why(), "a local client was not served");
            return;
        }
    }
}

async fn answer(daemon: &Arc<Daemon>, peer: &mut LocalPeer, request: ReceiverRequest) -> Result<(), Error> {
    match request {
        ReceiverRequest::Status { group } => send(peer, show_status(daemon, group.as_deref())).await,
        ReceiverRequest::Invite { name, ttl_seconds } => send(peer, invite(daemon, name, ttl_seconds).await).await,
        ReceiverRequest::Hosts => send(peer, Ok(hosts(daemon))).await,
        ReceiverRequest::Revoke { name } => send(peer, revoke(daemon, name).await).await,
        ReceiverRequest::Verify { group, repair } => {
            let outcome = verify(daemon, peer, &group, repair).await?;
            send(peer, outcome).await
        }
        ReceiverRequest::Forget { group } => send(peer, forget(daemon, &group).await).await,
        other => answer_history(daemon, peer, other).await,
    }
}

async fn answer_history(daemon: &Arc<Daemon>, peer: &mut LocalPeer, request: ReceiverRequest) -> Result<(), Error> {
    match request {
        ReceiverRequest::Points { group, from_ns, to_ns } => {
            wait_for(peer, history::points(daemon, group, from_ns, to_ns)).await
        }
        ReceiverRequest::ViewOpen { group, at, writable, export, listen } => {
            let wish = Wish { at, writable, export, listen };
            wait_for(peer, history::view_open(daemon, group, wish)).await
        }
        ReceiverRequest::ViewList => send(peer, Ok(history::view_list(daemon))).await,
        ReceiverRequest::ViewClose { id, force } => wait_for(peer, history::view_close(daemon, id, force)).await,
        ReceiverRequest::Rollback { group, at, dry_run } => {
            let (progress, told) = progress();
            let work = history::rollback(daemon, &group, at, dry_run, &progress);
            follow(peer, told, work).await
        }
        ReceiverRequest::RollbackRelease { group } => wait_for(peer, history::release(daemon, &group)).await,
        ReceiverRequest::RollbackReleaseLook { group } => {
            send(peer, history::releasable(daemon, &group).map(drop)).await
        }
        ReceiverRequest::Restore { group, at, volume, to, dry_run, force, dir } => {
            let wish = history::RestoreWish { group, at, volume, to, dry_run, force, dir };
            let (progress, told) = progress();
            let work = history::restore(daemon, wish, &progress);
            follow(peer, told, work).await
        }
        ReceiverRequest::Retention { group, age_seconds, bytes, dry_run } => {
            wait_for(peer, history::retention(daemon, &group, age_seconds, bytes, dry_run)).await
        }
        ReceiverRequest::Scrub { group, bytes_per_second } => {
            let (progress, told) = progress();
            let work = history::scrub(daemon, &group, bytes_per_second, &progress);
            follow(peer, told, work).await
        }
        ReceiverRequest::Failover { group, at, test, dry_run, planned, abort_after_seconds } => {
            let (progress, told) = progress();
            let wish = takeover::Wish {
                at,
                test,
                dry_run,
                planned,
                abort_after: abort_after_seconds.map(Duration::from_secs),
            };
            let work = takeover::failover(daemon, &group, wish, &progress);
            follow(peer, told, work).await
        }
        ReceiverRequest::FailoverCommit { group } => wait_for(peer, takeover::commit(daemon, &group)).await,
        ReceiverRequest::FailoverAbort { group, force, only_test } => {
            wait_for(peer, takeover::abort(daemon, &group, force, only_test)).await
        }
        ReceiverRequest::Failback { group, host, keep_branch, dry_run } => {
            let (progress, told) = progress();
            let work = failback::failback(daemon, &group, host, keep_branch, dry_run, &progress);
            follow(peer, told, work).await
        }
        ReceiverRequest::FailbackCutOver { group, quick, dry_run } => {
            let (progress, told) = progress();
            let work = failback::cut_over(daemon, &group, quick, dry_run, &progress);
            follow(peer, told, work).await
        }
        ReceiverRequest::FailbackStop { group } => wait_for(peer, failback::stop(daemon, &group)).await,
        ReceiverRequest::Keep { group, bookmark, keep, dry_run } => {
            wait_for(peer, history::keep(daemon, group, bookmark, keep, dry_run)).await
        }
        other => {
            let why = format!("{other:?} is none of the history's");
            send::<()>(peer, Err(Problem::failed("not understood", why, "run the same version on both ends"))).await
        }
    }
}

async fn send<T: serde::Serialize>(peer: &mut LocalPeer, outcome: Result<T, Problem>) -> Result<(), Error> {
    match peer.send(&outcome.map_or_else(Reply::Problem, Reply::Done)).await {
        // Nothing of it was sent.
        Err(error) if error.kind() == ErrorKind::Limit => {
            tracing::warn!(%error, "an answer is too long to be sent");
            let next = "ask for less: one group, or a part of its time (--from, --to)";
            peer.send(&Reply::<T>::Problem(Problem::failed("the answer is too long", error.to_string(), next))).await
        }
        sent => sent,
    }
}

fn no_group(daemon: &Daemon, name: &str) -> Problem {
    if let Some(why) = daemon.registry.unread(name) {
        return Problem::failed(format!("nothing can be done with '{name}'"), why.text, why.next);
    }
    let what = format!("no group '{}'", name.escape_debug());
    Problem::not_found(what, "this receiver does not have it", "'varve status' lists the groups")
}

fn problem(what: &str, error: &Error) -> Problem {
    let kind = match error.kind() {
        ErrorKind::NoSuchHost => ProblemKind::NotFound,
        ErrorKind::BadName => ProblemKind::Usage,
        ErrorKind::Limit => ProblemKind::Refused,
        _ => ProblemKind::Failed,
    };
    let why = error.why();
    let why = if why.is_empty() { error.to_string() } else { format!("{error}: {why}") };
    Problem::new(kind, what, why, error.hint())
}

/// What the status says.
pub fn show_status(daemon: &Daemon, group: Option<&str>) -> Result<StatusReply, Problem> {
    let mut groups = status::groups(daemon, group);
    daemon.watching.watcher.fill(&mut groups);
    if let Some(name) = group.filter(|_| groups.is_empty()) {
        return Err(no_group(daemon, name));
    }
    let connected: HashSet<String> = daemon.server.live().into_iter().map(|(name, ..)| name).collect();
    let own = DaemonStatus {
        daemon: "receiver".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        address: daemon.address(),
        name: Some(daemon.name.clone()),
        rss_bytes: varve_io::cpu::process_own_bytes().unwrap_or(0),
        hosts_connected: Some(connected.len() as u64),
    };
    Ok(StatusReply { groups, daemons: vec![own] })
}

async fn invite(daemon: &Arc<Daemon>, name: String, ttl_seconds: u64) -> Result<InviteReply, Problem> {
    let (hosts, now, ttl) = (daemon.hosts.clone(), SystemTime::now(), Duration::from_secs(ttl_seconds));
    let host = name.clone();
    let invited = tokio::task::spawn_blocking(move || hosts.invite(&host, ttl, now)).await;
    let what = format!("cannot invite '{}'", name.escape_debug());
    let secret = joined(invited)?.map_err(|e| problem(&what, &e))?;
    let token = JoinToken { ca_fingerprint: daemon.authority.fingerprint(), secret, name: name.clone() }.encode();
    let expires = show_time(seconds_ns(now).saturating_add(ttl_seconds.saturating_mul(1_000_000_000)));
    let replaces = daemon.hosts.is_enrolled(&name);
    tracing::info!(host = name, expires, replaces, "invited");
    Ok(InviteReply { name, token, expires, address: daemon.address().unwrap_or_default(), replaces })
}

fn joined<T>(result: Result<T, tokio::task::JoinError>) -> Result<T, Problem> {
    result.map_err(|e| Problem::failed("the receiver could not work on it", e.to_string(), "see the receiver's log"))
}

fn seconds_ns(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

fn hosts(daemon: &Daemon) -> HostsReply {
    let live = daemon.server.live();
    let now = seconds_ns(SystemTime::now()) / 1_000_000_000;
    let time = |seconds: u64| show_time(seconds.saturating_mul(1_000_000_000));
    let hosts = daemon.hosts.list().into_iter().map(|host| {
        let connection = live.iter().find(|(_, fingerprint, _)| *fingerprint == host.fingerprint);
        HostStatus {
            name: host.name,
            revoked: host.revoked_at.is_some(),
            connected: connection.is_some(),
            joined: time(host.joined_at),
            fingerprint: host.fingerprint.iter().map(|byte| format!("{byte:02x}")).collect(),
            address: connection.map(|(.., address)| address.to_string()),
        }
    });
    let open = daemon.hosts.invites().into_iter().filter(|invite| invite.used_at.is_none() && invite.expires_at > now);
    let invites = open.map(|invite| InviteStatus { name: invite.name, expires: time(invite.expires_at) });
    HostsReply { hosts: hosts.collect(), invites: invites.collect() }
}

async fn revoke(daemon: &Arc<Daemon>, name: String) -> Result<(), Problem> {
    let (hosts, host) = (daemon.hosts.clone(), name.clone());
    let revoked = tokio::task::spawn_blocking(move || hosts.revoke(&host, SystemTime::now())).await;
    let what = format!("cannot revoke '{}'", name.escape_debug());
    joined(revoked)?.map_err(|e| problem(&what, &e))?;
    let closed = daemon.server.enforce();
    tracing::info!(host = name, closed, "revoked");
    Ok(())
}

async fn forget(daemon: &Arc<Daemon>, name: &str) -> Result<(), Problem> {
    let slot = daemon.registry.group(name).ok_or_else(|| no_group(daemon, name))?;
    let views = daemon.views.count(name);
    if views > 0 {
        let next = "'varve view list', then 'varve view close ID'";
        return Err(Problem::refused(
            format!("'{name}' was not forgotten"),
            format!("{views} views of it are open"),
            next,
        ));
    }
    if slot.board().meta.as_ref().is_some_and(|meta| meta.takeover.is_some()) {
        let next = format!("'varve failover abort {name}' or a failback first");
        return Err(Problem::refused(format!("'{name}' was not forgotten"), "it runs here", next));
    }
    match daemon.registry.forget(&slot).await {
        Ok(replicas) => {
            let kept: Vec<String> = replicas.iter().map(|path| path.display().to_string()).collect();
            tracing::info!(group = name, kept = kept.join(" "), "forgotten; its replicas stay");
            Ok(())
        }
        Err(ForgetError::InUse) => Err(Problem::refused(
            format!("'{name}' was not forgotten"),
            "its agent is connected",
            format!("run 'varve unprotect {name}' on the production host first, or revoke that host"),
        )),
        Err(ForgetError::Read) => Err(Problem::refused(
            format!("'{name}' was not forgotten"),
            "a point of it is being read: a restore is under way, or a view is being opened",
            "wait for it, or end it; then say it again",
        )),
        Err(ForgetError::Failed(why)) => {
            Err(Problem::failed(format!("'{name}' was not forgotten"), why, "see the receiver's log, then try again"))
        }
    }
}

/// Asks the agent and follows its reports. The outer error is the client's, who has gone.
async fn verify(
    daemon: &Arc<Daemon>,
    peer: &mut LocalPeer,
    name: &str,
    repair: bool,
) -> Result<Result<VerifyReply, Problem>, Error> {
    let Some(slot) = daemon.registry.group(name) else { return Ok(Err(no_group(daemon, name))) };
    let what = format!("'{name}' was not verified");
    let next = "see 'varve status' here and on the production host; start the agent";
    let gone = |why: &str| Ok(Err(Problem::unreachable(&what, why, next)));
    let asks = slot.board().asks.clone();
    let Some(asks) = asks else { return gone("its agent is not connected") };
    let id: u64 = rand::random();
    if asks.send(Ask::Verify { id, repair }).await.is_err() {
        return gone("its agent has just left");
    }
    let cancel = CancelOnDrop { asks: asks.clone(), id };
    let (start, mut tick) = (Instant::now(), tokio::time::interval(VERIFY_INTERVAL));
    let mut last = (Instant::now(), 0);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = asks.closed() => return gone("its agent left before the end"),
            left = peer.read_request::<ReceiverRequest>() => {
                // A client waits for one answer at a time; this one has left, and `cancel` tells the agent.
                left?;
                return Err(Error::new(ErrorKind::Closed, "the local client left during a verify"));
            }
        }
        let report = slot.board().report.as_ref().and_then(|(report, _)| report.verify.clone());
        match report.filter(|verify| verify.id == id) {
            Some(verify) if verify.finished => {
                cancel.forget();
                return Ok(verdict(name, verify));
            }
            Some(verify) => {
                let rate = verify.done_bytes.saturating_sub(last.1) as f64 / last.0.elapsed().as_secs_f64().max(1e-3);
                last = (Instant::now(), verify.done_bytes);
                let left = verify.total_bytes.saturating_sub(verify.done_bytes) as f64;
                let progress = Progress {
                    done_bytes: verify.done_bytes,
                    total_bytes: verify.total_bytes,
                    bytes_per_second: rate,
                    seconds_left: (rate > 0.0).then(|| left / rate),
                };
                peer.send(&Reply::<VerifyReply>::Progress(progress)).await?;
            }
            None if start.elapsed() > VERIFY_START_MAX => return gone("its agent does not begin"),
            None => {}
        }
    }
}

fn verdict(group: &str, verify: Verify) -> Result<VerifyReply, Problem> {
    match &verify.error {
        Some(why) => {
            let next = "see 'varve status', then verify again";
            Err(Problem::failed(format!("the verify of '{group}' came to no result"), why.clone(), next))
        }
        None => Ok(VerifyReply { group: group.to_owned(), verify }),
    }
}

/// A verify that nobody waits for is not wanted.
struct CancelOnDrop {
    asks: mpsc::Sender<Ask>,
    id: u64,
}

impl CancelOnDrop {
    fn forget(mut self) {
        self.asks = mpsc::channel(1).0;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        // If the agent has gone, so has the verify.
        let _ = self.asks.try_send(Ask::CancelVerify { id: self.id });
    }
}
