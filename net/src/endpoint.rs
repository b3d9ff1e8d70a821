//! The receiver's listening side (and, re-exported, the agent's connecting side).
//!
//! A connection that [`Server::accept`] hands out is authenticated, on the protocol that its certificate entitles it
//! to, and has been told so: the receiver opens a stream with [`WELCOME`] and [`connect`] waits for it. In TLS 1.3 a
//! client is done before the server has looked at its certificate; without the welcome a refusal would surface later,
//! in the middle of the first exchange.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use quinn::crypto::rustls::HandshakeData;
use quinn::{ConnectionError, VarInt};
use rustls_pki_types::CertificateDer;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;

use crate::error::{Error, ErrorKind, Result};
use crate::hosts::{Fingerprint, Hosts, Standing};
use crate::identity::{Authority, fingerprint, subject_of};
use crate::live::{self, Live, LiveGuard};
use crate::tls::{self, ALPN_JOIN, ALPN_SESSION};
use crate::transport::{SocketBuffers, Tuning, bind_udp, lasting_endpoint_config, transport_config};

pub use crate::connect::{Purpose, connect, connect_tuned, explain};
pub use crate::join::{join, serve_join};

/// The receiver's UDP port.
pub const PORT: u16 = 7443;
/// The longest that a handshake may take, on either side, per address.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes under way at once; one more is refused.
pub const HANDSHAKES_MAX: usize = 64;
/// From this many on, a client must prove its address (QUIC retry) before anything is kept for it, and one address
/// gets only [`HANDSHAKES_PER_ADDRESS`].
pub const HANDSHAKES_CALM: usize = 16;
/// See [`HANDSHAKES_CALM`].
pub const HANDSHAKES_PER_ADDRESS: usize = 8;
/// Live connections in all.
pub const CONNECTIONS_MAX: usize = 1024;
/// Live connections of one host: its session, those before that have not timed out yet, a doctor or two. One more, and the
/// oldest is closed.
pub const CONNECTIONS_PER_HOST: usize = 8;
/// Joining hosts at once.
pub const JOINERS_MAX: usize = 16;
/// Addresses of a host name that are tried.
pub const ADDRESSES_MAX: usize = 8;
/// What the receiver says on its first stream to a peer that it accepts.
pub const WELCOME: [u8; 8] = *b"varve\0\0\x01";

const ACCEPT_QUEUE: usize = 16;
/// Datagrams that wait for the dispatcher: beyond this, new ones are dropped (and sent again by an honest client).
const INCOMING_QUEUE: usize = 256;
const INCOMING_BYTES_MAX: u64 = 4 << 20;

/// Why this crate closes a connection. Codes from 0x100 up belong to the session protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CloseCode {
    /// Nothing is wrong.
    Done = 0,
    /// The certificate does not entitle to the protocol, or the other way round.
    WrongProtocol = 1,
    /// The host was revoked, or its name was taken over by a later join.
    Revoked = 2,
    /// A limit on connections is reached.
    Busy = 3,
    /// The daemon stops.
    Shutdown = 4,
}

impl CloseCode {
    /// Closes the connection with this code and its name as the reason.
    pub fn close(self, connection: &quinn::Connection) {
        connection.close(VarInt::from_u32(self as u32), format!("{self:?}").as_bytes());
    }
}

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// An enrolled host, on `varve/1`.
    Host {
        /// Its name in the registry.
        name: String,
        /// Of its certificate.
        fingerprint: Fingerprint,
    },
    /// Somebody with an open invitation, on `varve-join/1`; to be given to [`serve_join`].
    Joiner {
        /// Its public key: DER of a SubjectPublicKeyInfo, proved in the handshake.
        spki: Vec<u8>,
    },
}

/// An accepted connection. Keep it as long as the connection is served: dropping it closes the connection.
#[derive(Debug)]
pub struct Accepted {
    /// The connection; handles may be cloned from it.
    pub connection: quinn::Connection,
    /// Who it is.
    pub peer: Peer,
    /// Where from, at the handshake (it may migrate later).
    pub remote: SocketAddr,
    guard: Guard,
}

#[derive(Debug)]
struct Guard {
    _live: Option<LiveGuard>,
    _permits: Vec<OwnedSemaphorePermit>,
}

impl Drop for Accepted {
    fn drop(&mut self) {
        // The guard then frees the places.
        CloseCode::Done.close(&self.connection);
        let _ = &self.guard;
    }
}

/// The receiver's side.
#[derive(Debug)]
pub struct Server {
    endpoint: quinn::Endpoint,
    buffers: SocketBuffers,
    accepted: tokio::sync::Mutex<mpsc::Receiver<Accepted>>,
    shared: Arc<Shared>,
    dispatcher: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    hosts: Arc<Hosts>,
    live: Live,
    handshakes: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    joiners: Arc<Semaphore>,
    per_address: Mutex<HashMap<IpAddr, usize>>,
    refusals: LogGate,
}

impl Server {
    /// Listens on `addr` (UDP). Must be called within a tokio runtime.
    pub fn bind(addr: SocketAddr, authority: &Authority, hosts: Arc<Hosts>) -> Result<Self> {
        Self::bind_tuned(addr, authority, hosts, &Tuning::default())
    }

    /// As [`Server::bind`], with other transport settings (for measurements).
    pub fn bind_tuned(addr: SocketAddr, authority: &Authority, hosts: Arc<Hosts>, tuning: &Tuning) -> Result<Self> {
        let crypto = tls::server_config(authority, hosts.clone())?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config
            .transport_config(transport_config(tuning))
            .migration(true)
            .max_incoming(INCOMING_QUEUE)
            .incoming_buffer_size_total(INCOMING_BYTES_MAX);
        let (socket, buffers) = bind_udp(addr, tuning)?;
        let (_, key) = authority.server_chain();
        let settings = lasting_endpoint_config(tuning, key.secret_der());
        let endpoint = quinn::Endpoint::new(settings, Some(config), socket, Arc::new(quinn::TokioRuntime))
            .map_err(|e| Error::io(format!("cannot use UDP {addr}"), e))?;
        let shared = Arc::new(Shared {
            hosts,
            live: Live::default(),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            joiners: Arc::new(Semaphore::new(JOINERS_MAX)),
            per_address: Mutex::default(),
            refusals: LogGate::default(),
        });
        let (sender, accepted) = mpsc::channel(ACCEPT_QUEUE);
        let dispatcher = tokio::spawn(dispatch(endpoint.clone(), shared.clone(), sender));
        Ok(Self { endpoint, buffers, accepted: tokio::sync::Mutex::new(accepted), shared, dispatcher })
    }

    /// The next authenticated connection; `None` after [`Server::close`]. Cancel-safe.
    pub async fn accept(&self) -> Option<Accepted> {
        self.accepted.lock().await.recv().await
    }

    /// Where it listens (the port, if 0 was asked for).
    pub fn local_addr(&self) -> Result<SocketAddr> {
        self.endpoint.local_addr().map_err(|e| Error::io("cannot read the socket's address", e))
    }

    /// What the kernel granted as socket buffers.
    pub fn buffers(&self) -> SocketBuffers {
        self.buffers
    }

    /// Handshakes under way.
    pub fn handshakes(&self) -> usize {
        HANDSHAKES_MAX - self.shared.handshakes.available_permits()
    }

    /// Live connections of enrolled hosts: name, fingerprint, address.
    pub fn live(&self) -> Vec<(String, Fingerprint, SocketAddr)> {
        let entries = live::entries(&self.shared.live);
        entries.into_iter().map(|e| (e.name, e.fingerprint, e.connection.remote_address())).collect()
    }

    /// Closes the live connections of whoever is no longer enrolled. Call it after each [`Hosts::revoke`] and after a
    /// join. Returns how many were closed.
    pub fn enforce(&self) -> usize {
        let entries = live::entries(&self.shared.live);
        let outcasts =
            entries.iter().filter(|e| !matches!(self.shared.hosts.standing(&e.fingerprint), Standing::Enrolled(_)));
        outcasts.map(|e| CloseCode::Revoked.close(&e.connection)).count()
    }

    /// Closes the live connections of the host `name`. Returns how many there were.
    pub fn close_host(&self, name: &str) -> usize {
        let entries = live::entries(&self.shared.live);
        entries.iter().filter(|e| e.name == name).map(|e| CloseCode::Revoked.close(&e.connection)).count()
    }

    /// Closes everything and waits (bounded) until the peers were told.
    pub async fn close(&self) {
        self.endpoint.close(VarInt::from_u32(CloseCode::Shutdown as u32), b"Shutdown");
        let _ = timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.endpoint.close(VarInt::from_u32(CloseCode::Shutdown as u32), b"Shutdown");
        self.dispatcher.abort();
    }
}

/// Takes every first datagram of a connection and decides what it may cost.
async fn dispatch(endpoint: quinn::Endpoint, shared: Arc<Shared>, accepted: mpsc::Sender<Accepted>) {
    while let Some(incoming) = endpoint.accept().await {
        let busy = HANDSHAKES_MAX - shared.handshakes.available_permits();
        let calm = busy < HANDSHAKES_CALM;
        if !calm && !incoming.remote_address_validated() && incoming.may_retry() {
            // Costs us nothing; the client comes back with a proof of its address. (It cannot fail: checked above.)
            let _ = incoming.retry();
            continue;
        }
        let remote = incoming.remote_address();
        let place =
            AddressPlace::take(&shared, remote.ip(), if calm { HANDSHAKES_MAX } else { HANDSHAKES_PER_ADDRESS });
        let (Some(place), Ok(permit)) = (place, shared.handshakes.clone().try_acquire_owned()) else {
            incoming.refuse();
            continue;
        };
        let (shared, accepted) = (shared.clone(), accepted.clone());
        tokio::spawn(async move {
            let outcome = timeout(HANDSHAKE_TIMEOUT, admit(incoming, &shared)).await;
            let refusal = match outcome {
                Ok(Ok(peer)) => {
                    // Whoever waits for the daemon here still holds its handshake's place: the bound covers it.
                    let _ = accepted.send(peer).await;
                    None
                }
                Ok(Err(error)) => Some(error),
                Err(_) => Some(Error::new(ErrorKind::Timeout, "the handshake took too long")),
            };
            if let Some(error) = refusal {
                shared.refusals.warn(remote, &error);
            }
            drop((permit, place));
        });
    }
}

/// From the first datagram to an authenticated, welcomed peer.
async fn admit(incoming: quinn::Incoming, shared: &Arc<Shared>) -> Result<Accepted> {
    let failed = |e: ConnectionError| Error::new(ErrorKind::Closed, "refused in the handshake").because(e);
    let connection = incoming.accept().map_err(failed)?.await.map_err(failed)?;
    let outcome = entitle(&connection, shared);
    let (peer, guard) = match outcome {
        Ok(entitled) => entitled,
        Err((code, error)) => {
            code.close(&connection);
            return Err(error);
        }
    };
    let remote = connection.remote_address();
    let accepted = Accepted { connection, peer, remote, guard };
    // It may have been revoked between the handshake and its place in the live table: now one of the two sees it.
    if let Peer::Host { name, fingerprint } = &accepted.peer
        && !matches!(shared.hosts.standing(fingerprint), Standing::Enrolled(_))
    {
        CloseCode::Revoked.close(&accepted.connection);
        return Err(Error::new(ErrorKind::Revoked, format!("host {name} was revoked")));
    }
    let mut stream = accepted.connection.open_uni().await.map_err(failed)?;
    stream.write_all(&WELCOME).await.map_err(|e| Error::new(ErrorKind::Closed, "left at once").because(e))?;
    let _ = stream.finish();
    Ok(accepted)
}

/// What the certificate entitles to must be what the peer asks for, and there must be room.
fn entitle(connection: &quinn::Connection, shared: &Shared) -> Result<(Peer, Guard), (CloseCode, Error)> {
    let wrong = |why: &str| (CloseCode::WrongProtocol, Error::new(ErrorKind::WrongProtocol, why.to_owned()));
    let busy = |why: &str| (CloseCode::Busy, Error::new(ErrorKind::Busy, why.to_owned()));
    let protocol =
        connection.handshake_data().and_then(|d| d.downcast::<HandshakeData>().ok()).and_then(|d| d.protocol);
    let chain = connection.peer_identity().and_then(|i| i.downcast::<Vec<CertificateDer<'static>>>().ok());
    let certificate = chain.as_ref().and_then(|c| c.first()).ok_or_else(|| wrong("no client certificate"))?;
    let joining = tls::invite_of(certificate).is_some();
    let place = |pool: &Arc<Semaphore>, why: &str| pool.clone().try_acquire_owned().map_err(|_| busy(why));
    let mut permits = vec![place(&shared.connections, "the receiver has as many connections as it takes")?];
    match (protocol.as_deref(), joining) {
        (Some(ALPN_JOIN), true) => {
            let spki = subject_of(certificate).map_err(|e| (CloseCode::WrongProtocol, e))?.spki;
            permits.push(place(&shared.joiners, "too many hosts join at once")?);
            Ok((Peer::Joiner { spki }, Guard { _live: None, _permits: permits }))
        }
        (Some(ALPN_SESSION), false) => {
            let fingerprint = fingerprint(certificate);
            let Standing::Enrolled(name) = shared.hosts.standing(&fingerprint) else {
                return Err((CloseCode::Revoked, Error::new(ErrorKind::Revoked, "the host is not enrolled any more")));
            };
            let entry = live::Entry { name: name.clone(), fingerprint, connection: connection.clone() };
            let live = live::add(&shared.live, entry, CONNECTIONS_PER_HOST);
            Ok((Peer::Host { name, fingerprint }, Guard { _live: Some(live), _permits: permits }))
        }
        (Some(ALPN_SESSION), true) => Err(wrong("a join certificate on the session protocol")),
        (Some(ALPN_JOIN), false) => Err(wrong("a host certificate on the join protocol")),
        _ => Err(wrong("no protocol of ours")),
    }
}

/// A place among the handshakes of one address (an IPv6 site counts as one).
struct AddressPlace {
    shared: Arc<Shared>,
    key: IpAddr,
}

impl AddressPlace {
    fn take(shared: &Arc<Shared>, ip: IpAddr, limit: usize) -> Option<Self> {
        let key = match ip.to_canonical() {
            IpAddr::V4(v4) => IpAddr::V4(v4),
            IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) & !u128::from(u64::MAX)).into()),
        };
        let mut counts = shared.per_address.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(key).or_insert(0);
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(Self { shared: shared.clone(), key })
    }
}

impl Drop for AddressPlace {
    fn drop(&mut self) {
        let mut counts = self.shared.per_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.key);
            }
        }
    }
}

/// One line a second about refused peers, however many there are: the log must not be their weapon.
#[derive(Debug, Default)]
struct LogGate {
    last: Mutex<(Option<Instant>, u64)>,
}

impl LogGate {
    fn warn(&self, remote: SocketAddr, error: &Error) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.0.is_some_and(|at| at.elapsed() < Duration::from_secs(1)) {
            last.1 += 1;
            return;
        }
        tracing::warn!(%remote, why = %error.why(), since_last = last.1, "refused a peer: {error}");
        *last = (Some(Instant::now()), 0);
    }
}
