//! The connecting side: resolving, dialling, and what the end of a connection means.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::ConnectionError;
use quinn::crypto::rustls::QuicClientConfig;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::endpoint::{ADDRESSES_MAX, CloseCode, HANDSHAKE_TIMEOUT, PORT, WELCOME};
use crate::error::{Error, ErrorKind, Result};
use crate::identity::{HostIdentity, SERVER_NAME};
use crate::tls;
use crate::transport::{Tuning, bind_udp, endpoint_config, transport_config};

/// How long an address of a name is tried before the next one is tried as well.
pub(crate) const ADDRESS_HEAD_START: Duration = Duration::from_millis(300);

/// What a client wants; the same refusal means different things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A session of an enrolled host.
    Session,
    /// Enrolment.
    Join,
}

/// A connection and the endpoint that carries it.
#[derive(Debug)]
pub(crate) struct Dialled {
    pub(crate) endpoint: quinn::Endpoint,
    pub(crate) connection: quinn::Connection,
}

/// Connects an enrolled host to the receiver at `addr` (`HOST:PORT`; the port may be left out). The name is resolved
/// each time, and each of its addresses is tried: the receiver may move. When this returns, the receiver has accepted.
pub async fn connect(identity: &HostIdentity, addr: &str) -> Result<quinn::Connection> {
    Ok(dial(addr, tls::session_config(identity)?, Purpose::Session).await?.connection)
}

/// As [`connect`], with other transport settings (for measurements).
pub async fn connect_tuned(identity: &HostIdentity, addr: &str, tuning: &Tuning) -> Result<quinn::Connection> {
    Ok(dial_tuned(addr, tls::session_config(identity)?, Purpose::Session, tuning).await?.connection)
}

pub(crate) async fn dial(addr: &str, crypto: QuicClientConfig, purpose: Purpose) -> Result<Dialled> {
    dial_tuned(addr, crypto, purpose, &Tuning::default()).await
}

async fn dial_tuned(addr: &str, crypto: QuicClientConfig, purpose: Purpose, tuning: &Tuning) -> Result<Dialled> {
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport_config(tuning));
    race(resolve(addr).await?, config, purpose, tuning)
        .await?
        .ok_or_else(|| Error::new(ErrorKind::Resolve, format!("'{}' has no address", addr.escape_debug())))
}

/// Tries the addresses in their order, each [`ADDRESS_HEAD_START`] after the one before: a name whose first address is
/// dead (IPv6 without a route) must not cost a handshake's time limit at every reconnect. `None` without addresses.
async fn race(
    addresses: Vec<SocketAddr>,
    config: quinn::ClientConfig,
    purpose: Purpose,
    tuning: &Tuning,
) -> Result<Option<Dialled>> {
    let mut tries = JoinSet::new();
    for (i, remote) in addresses.into_iter().take(ADDRESSES_MAX).enumerate() {
        let (config, tuning) = (config.clone(), *tuning);
        tries.spawn(async move {
            tokio::time::sleep(ADDRESS_HEAD_START * i as u32).await;
            let dialled = timeout(HANDSHAKE_TIMEOUT, dial_one(remote, config, purpose, &tuning)).await;
            dialled.unwrap_or_else(|_| Err(explain(&ConnectionError::TimedOut, purpose, &remote.to_string())))
        });
    }
    let mut silence = None;
    // Leaving drops the set, and with it the tries that are still under way.
    while let Some(outcome) = tries.join_next().await {
        match outcome {
            Ok(Ok(dialled)) => return Ok(Some(dialled)),
            // An answer is an answer; only silence and load are reasons to wait for another address.
            Ok(Err(error)) if !error.is_transient() => return Err(error),
            Ok(Err(error)) => silence = Some(error),
            Err(panic) => silence = Some(Error::new(ErrorKind::Io, "a connection attempt broke off").because(panic)),
        }
    }
    silence.map_or(Ok(None), Err)
}

async fn dial_one(
    remote: SocketAddr,
    config: quinn::ClientConfig,
    purpose: Purpose,
    tuning: &Tuning,
) -> Result<Dialled> {
    let lost = |e: ConnectionError| explain(&e, purpose, &remote.to_string());
    let any: IpAddr = if remote.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
    let (socket, _) = bind_udp(SocketAddr::new(any, 0), tuning)?;
    let endpoint = quinn::Endpoint::new(endpoint_config(tuning), None, socket, Arc::new(quinn::TokioRuntime))
        .map_err(|e| Error::io("cannot use a UDP socket", e))?;
    let connecting = endpoint
        .connect_with(config, remote, SERVER_NAME)
        .map_err(|e| Error::new(ErrorKind::Unreachable, format!("cannot connect to {remote}")).because(e))?;
    let connection = connecting.await.map_err(lost)?;
    let mut stream = connection.accept_uni().await.map_err(lost)?;
    match stream.read_to_end(WELCOME.len()).await {
        Ok(bytes) if bytes == WELCOME => Ok(Dialled { endpoint, connection }),
        Err(quinn::ReadToEndError::Read(quinn::ReadError::ConnectionLost(e))) => Err(lost(e)),
        _ => Err(Error::new(
            ErrorKind::WrongProtocol,
            format!("what answers at {remote} does not greet as a receiver does"),
        )),
    }
}

/// The addresses of `HOST:PORT`, `HOST`, `[v6]:PORT` or a bare address.
async fn resolve(addr: &str) -> Result<Vec<SocketAddr>> {
    let addr = addr.trim();
    let bare = addr.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(addr);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, PORT)]);
    }
    let has_port = addr.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let full = if has_port { addr.to_owned() } else { format!("{addr}:{PORT}") };
    let found = timeout(HANDSHAKE_TIMEOUT, tokio::net::lookup_host(full.as_str())).await;
    let fail = || Error::new(ErrorKind::Resolve, format!("cannot find the address of '{}'", addr.escape_debug()));
    match found {
        Ok(Ok(addresses)) => Ok(addresses.take(ADDRESSES_MAX).collect()),
        Ok(Err(e)) => Err(fail().because(e)),
        Err(late) => Err(fail().because(late)),
    }
}

/// TLS alerts that tell cases apart (RFC 8446, section 6), within QUIC's crypto error codes.
mod alert {
    pub(super) const BAD_CERTIFICATE: u64 = 0x100 + 42;
    pub(super) const REVOKED: u64 = 0x100 + 44;
    pub(super) const EXPIRED: u64 = 0x100 + 45;
    pub(super) const UNKNOWN_CA: u64 = 0x100 + 48;
    pub(super) const ACCESS_DENIED: u64 = 0x100 + 49;
    /// Also: signed by a CA that has our CA's name and another key.
    pub(super) const DECRYPT_ERROR: u64 = 0x100 + 51;
    pub(super) const NO_APPLICATION_PROTOCOL: u64 = 0x100 + 120;
}
const CONNECTION_REFUSED: u64 = 2;

/// Turns the end of a connection to `peer` into an error that says what it means. For sessions as well.
pub fn explain(error: &ConnectionError, purpose: Purpose, peer: &str) -> Error {
    let join = purpose == Purpose::Join;
    let new = |kind, what: String| Error::new(kind, what).because(error.clone());
    match error {
        ConnectionError::TimedOut => new(ErrorKind::Unreachable, format!("nothing answers at {peer}")),
        ConnectionError::VersionMismatch => {
            new(ErrorKind::WrongProtocol, format!("{peer} speaks another QUIC version"))
        }
        ConnectionError::TransportError(local) => match u64::from(local.code) {
            alert::UNKNOWN_CA | alert::BAD_CERTIFICATE | alert::DECRYPT_ERROR if join => {
                new(ErrorKind::WrongCa, format!("the receiver at {peer} is not the one that issued this token"))
            }
            alert::UNKNOWN_CA | alert::BAD_CERTIFICATE | alert::DECRYPT_ERROR => {
                new(ErrorKind::WrongCa, format!("the receiver at {peer} is not the one that this host joined"))
            }
            _ => new(ErrorKind::Protocol, format!("{peer} broke the rules of QUIC")),
        },
        ConnectionError::ConnectionClosed(frame) => match (u64::from(frame.error_code), join) {
            (alert::REVOKED, true) => {
                new(ErrorKind::UsedToken, format!("the receiver at {peer} says that this token was already used"))
            }
            (alert::REVOKED, false) => new(ErrorKind::Revoked, format!("the receiver at {peer} has revoked this host")),
            (alert::EXPIRED, true) => new(
                ErrorKind::ExpiredToken,
                format!("the receiver at {peer} says that this token has expired or was withdrawn"),
            ),
            (alert::EXPIRED, false) => new(
                ErrorKind::UnknownHost,
                format!("the receiver at {peer} says that this host's certificate has expired"),
            ),
            (alert::ACCESS_DENIED, true) => {
                new(ErrorKind::UnknownToken, format!("the receiver at {peer} did not issue this token"))
            }
            (alert::ACCESS_DENIED | alert::UNKNOWN_CA | alert::DECRYPT_ERROR, false) => {
                new(ErrorKind::UnknownHost, format!("the receiver at {peer} does not know this host"))
            }
            (alert::NO_APPLICATION_PROTOCOL, _) => {
                new(ErrorKind::WrongProtocol, format!("{peer} does not speak our protocol"))
            }
            (CONNECTION_REFUSED, _) => new(ErrorKind::Busy, format!("{peer} takes no more connections now")),
            _ => new(ErrorKind::Closed, format!("{peer} ended the connection")),
        },
        ConnectionError::ApplicationClosed(close) => {
            let kind = match close.error_code.into_inner() {
                c if c == CloseCode::Revoked as u64 => ErrorKind::Revoked,
                c if c == CloseCode::WrongProtocol as u64 => ErrorKind::WrongProtocol,
                c if c == CloseCode::Busy as u64 => ErrorKind::Busy,
                _ => ErrorKind::Closed,
            };
            new(kind, format!("{peer} closed the connection"))
        }
        ConnectionError::Reset => new(ErrorKind::Closed, format!("{peer} has forgotten the connection (it restarted)")),
        ConnectionError::LocallyClosed => new(ErrorKind::Closed, format!("the connection to {peer} was closed here")),
        ConnectionError::CidsExhausted => new(ErrorKind::Limit, format!("no connection to {peer} can be numbered")),
    }
}

#[cfg(test)]
#[path = "connect_tests.rs"]
mod tests;
