//! The connection to the receiver: made, kept, made again. All groups share it.

use quinn::Connection;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::watch;
use varve_common::state::Link;
use varve_net::backoff::Backoff;
use varve_net::endpoint::connect;
use varve_net::error::ErrorKind;
use varve_net::identity::HostIdentity;

/// A connection that lasted this long was a good one: the next wait is short again.
const GOOD_AFTER: Duration = Duration::from_secs(10);

/// The connection as groups see it.
#[derive(Clone, Debug)]
pub struct LinkView {
    /// Set while there is one.
    pub connection: Option<Connection>,
    /// `disconnected`, `handshaking` or `refused`; what follows is the group's own business.
    pub link: Link,
    /// Why there is none, in words.
    pub reason: Option<String>,
}

impl LinkView {
    fn without(link: Link, reason: impl Into<Option<String>>) -> Self {
        Self { connection: None, link, reason: reason.into() }
    }
}

/// Where to connect, as who.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// `host:port`; `None`: this host has not joined a receiver.
    pub receiver: Option<String>,
    /// Directory of the identity.
    pub identity: PathBuf,
    /// Rises with every reload, so that an identity that changed on disk is read again.
    pub generation: u64,
}

/// Connects to whatever `target` says, for ever.
pub async fn run(mut target: watch::Receiver<Target>, view: watch::Sender<LinkView>) {
    loop {
        let now = target.borrow_and_update().clone();
        let changed = target.changed();
        tokio::select! {
            () = serve(&now, &view) => {}
            changed = changed => if changed.is_err() { return },
        }
    }
}

/// Connects, waits for the end of the connection, and again. Returns only if there is nothing to connect to.
async fn serve(target: &Target, view: &watch::Sender<LinkView>) {
    let Some(receiver) = &target.receiver else {
        let reason = "this host has not joined a receiver yet: run 'varve join ADDR:7443 TOKEN'".to_owned();
        view.send_replace(LinkView::without(Link::Disconnected, reason));
        return std::future::pending().await;
    };
    let mut backoff = Backoff::default();
    let mut last_reason = None;
    loop {
        view.send_modify(|view| view.link = Link::Handshaking);
        match attempt(target, receiver).await {
            Ok(connection) => {
                tracing::info!(receiver, remote = %connection.remote_address(), "connected");
                last_reason = None;
                let began = tokio::time::Instant::now();
                view.send_replace(LinkView {
                    connection: Some(connection.clone()),
                    link: Link::Handshaking,
                    reason: None,
                });
                let ended = connection.closed().await;
                let reason = format!("the connection to {receiver} ended: {ended}");
                tracing::warn!("{reason}");
                view.send_replace(LinkView::without(Link::Disconnected, reason));
                if began.elapsed() >= GOOD_AFTER {
                    backoff.reset();
                }
            }
            Err((link, reason)) => {
                // Said once until it changes: an hour's outage is one line in the log.
                if last_reason.as_ref() != Some(&reason) {
                    tracing::warn!("{reason}; trying again");
                    last_reason = Some(reason.clone());
                }
                view.send_replace(LinkView::without(link, reason));
            }
        }
        let pause = backoff.next(&mut rand::rng());
        tokio::time::sleep(pause).await;
    }
}

async fn attempt(target: &Target, receiver: &str) -> Result<Connection, (Link, String)> {
    let identity = HostIdentity::load(&target.identity)
        .map_err(|error| (Link::Disconnected, format!("{error}: {}. {}", error.why(), error.hint())))?;
    connect(&identity, receiver).await.map_err(|error| {
        let refused = matches!(
            error.kind(),
            ErrorKind::Revoked | ErrorKind::UnknownHost | ErrorKind::WrongCa | ErrorKind::WrongProtocol
        );
        let link = if refused { Link::Refused } else { Link::Disconnected };
        (link, format!("{error}: {}. {}", error.why(), error.hint()))
    })
}
