//! Listeners and the negotiation's sockets.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::{self, JoinHandle};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_rustls::TlsAcceptor;

use super::exports::{Exports, Opened};
use super::negotiation::{Agreed, Negotiation, OPTION_HEADER_BYTES, OptionHeader, Step, Tls, greeting};
use super::session;
use crate::error::{ExportError, ExportErrorKind};
use crate::limits::{NBD_CONNECTIONS_MAX, NBD_HANDSHAKE_TIMEOUT, NBD_OPTIONS_MAX};

/// Between two looks at whether a client may stay.
const STAY_INTERVAL: Duration = Duration::from_secs(1);

/// Who is served over TCP.
#[derive(Clone)]
pub struct Clients {
    /// Decides in the handshake.
    pub tls: Arc<ServerConfig>,
    /// Whether one that was let in may stay, by its certificate. Asked every second.
    pub may_stay: Arc<dyn Fn(&CertificateDer<'_>) -> bool + Send + Sync>,
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clients").finish_non_exhaustive()
    }
}

/// A listener with its connections. Dropping it ends them soon; [`NbdServer::stop`] waits for that.
#[derive(Debug)]
pub struct NbdServer {
    address: Option<SocketAddr>,
    socket: Option<PathBuf>,
    stop: watch::Sender<bool>,
    acceptor: JoinHandle<()>,
}

impl NbdServer {
    /// Serves on a Unix socket of mode 0600: whoever may open it may do everything. A socket that nobody listens on any
    /// more is replaced. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// Somebody serves there, or the kernel refuses the path.
    pub fn unix(path: &Path, exports: Arc<Exports>) -> Result<Self, ExportError> {
        let what = || format!("cannot serve NBD on {}", path.display());
        let io =
            |e: io::Error| ExportError::io(what(), &e, "check the directory; a socket's path has at most 107 bytes");
        if let Ok(found) = fs::symlink_metadata(path) {
            let served = !found.file_type().is_socket() || std::os::unix::net::UnixStream::connect(path).is_ok();
            if served {
                let (kind, why) = (ExportErrorKind::Exists, "it exists and is used");
                return Err(ExportError::new(kind, what(), why, "end its server or choose another path"));
            }
        }
        // Nobody can connect before the mode is right, and a dead socket is replaced in the same step.
        let early = PathBuf::from(format!("{}~", path.display()));
        let _ = fs::remove_file(&early);
        let listener = UnixListener::bind(&early).map_err(io)?;
        let ready = fs::set_permissions(&early, fs::Permissions::from_mode(0o600));
        ready.and_then(|()| fs::rename(&early, path)).map_err(io)?;
        let (stop, stopped) = watch::channel(false);
        let acceptor = task::spawn(accept_unix(listener, exports, stopped));
        Ok(Self { address: None, socket: Some(path.to_owned()), stop, acceptor })
    }

    /// Serves on TCP, with TLS before everything else. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The address is taken or not this machine's.
    pub fn tcp(address: SocketAddr, clients: Clients, exports: Arc<Exports>) -> Result<Self, ExportError> {
        let bind = || {
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok((listener.local_addr()?, TcpListener::from_std(listener)?))
        };
        let (address, listener) = bind().map_err(|e: io::Error| {
            ExportError::io(
                format!("cannot serve NBD on {address}"),
                &e,
                "choose a free port and an address of this host",
            )
        })?;
        let (stop, stopped) = watch::channel(false);
        let acceptor = task::spawn(accept_tcp(listener, clients, exports, stopped));
        Ok(Self { address: Some(address), socket: None, stop, acceptor })
    }

    /// The TCP address, with the port that the kernel chose if it was 0.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Ends all connections and waits until none uses a disk. Requests under way are finished.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        let _ = (&mut self.acceptor).await;
        self.stop.closed().await;
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(socket) = &self.socket {
            let _ = fs::remove_file(socket);
        }
    }
}

async fn accept_unix(listener: UnixListener, exports: Arc<Exports>, mut stop: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(NBD_CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stopped| *stopped) => return,
        };
        let Some((stream, _)) = or_pause(accepted).await else { continue };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!("an NBD client was turned away: {NBD_CONNECTIONS_MAX} are here");
            continue;
        };
        let (exports, stop) = (exports.clone(), stop.clone());
        task::spawn(async move {
            report(unix_client(stream, &exports, stop).await, "a Unix socket");
            drop(place);
        });
    }
}

async fn accept_tcp(listener: TcpListener, clients: Clients, exports: Arc<Exports>, mut stop: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(NBD_CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stopped| *stopped) => return,
        };
        let Some((stream, peer)) = or_pause(accepted).await else { continue };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!(%peer, "an NBD client was turned away: {NBD_CONNECTIONS_MAX} are here");
            continue;
        };
        let (clients, exports, stop) = (clients.clone(), exports.clone(), stop.clone());
        task::spawn(async move {
            report(tcp_client(stream, &clients, &exports, stop).await, &peer.to_string());
            drop(place);
        });
    }
}

/// What was accepted; on an error (no descriptors left, an aborted connection) a pause, so that it does not spin.
async fn or_pause<T>(accepted: io::Result<T>) -> Option<T> {
    match accepted {
        Ok(accepted) => Some(accepted),
        Err(e) => {
            tracing::warn!("cannot accept an NBD client: {e}");
            sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

fn report(ended: io::Result<()>, peer: &str) {
    if let Err(e) = ended {
        tracing::debug!(peer, "an NBD client did not get through its negotiation: {e}");
    }
}

async fn unix_client(
    mut stream: tokio::net::UnixStream,
    exports: &Exports,
    mut stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let deadline = Instant::now() + NBD_HANDSHAKE_TIMEOUT;
    let agreed = tokio::select! {
        agreed = timeout_at(deadline, begin(&mut stream, Tls::None, exports)) => agreed??,
        _ = stop.wait_for(|stopped| *stopped) => return Ok(()),
    };
    match agreed {
        Outcome::Begin(agreed, export) => session::serve(stream, export, &agreed, stop).await,
        Outcome::StartTls(_) | Outcome::Close => {}
    }
    Ok(())
}

async fn tcp_client(
    mut stream: TcpStream,
    clients: &Clients,
    exports: &Exports,
    mut stop: watch::Receiver<bool>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // A client whose machine is gone frees its place after some minutes.
    let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(15));
    SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    let deadline = Instant::now() + NBD_HANDSHAKE_TIMEOUT;
    let negotiated = async {
        // Nothing is read ahead in here: bytes sent in plain text must not count behind TLS.
        let Outcome::StartTls(negotiation) = begin(&mut stream, Tls::Required, exports).await? else {
            return Ok(None);
        };
        let mut stream = TlsAcceptor::from(clients.tls.clone()).accept(stream).await?;
        let outcome = options(&mut stream, negotiation.behind_tls(), exports).await?;
        io::Result::Ok(Some((stream, outcome)))
    };
    let negotiated = tokio::select! {
        negotiated = timeout_at(deadline, negotiated) => negotiated??,
        _ = stop.wait_for(|stopped| *stopped) => return Ok(()),
    };
    if let Some((stream, Outcome::Begin(agreed, export))) = negotiated {
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()).cloned();
        let (end, ended) = watch::channel(false);
        let session = session::serve(stream, export, &agreed, ended);
        tokio::pin!(session);
        tokio::select! {
            () = &mut session => return Ok(()),
            _ = stop.wait_for(|stopped| *stopped) => {}
            () = not_wanted(clients, certificate) => {}
        }
        end.send_replace(true);
        session.await;
    }
    Ok(())
}

/// Returns once this client may not stay.
async fn not_wanted(clients: &Clients, certificate: Option<CertificateDer<'static>>) {
    while certificate.as_ref().is_some_and(|certificate| (clients.may_stay)(certificate)) {
        sleep(STAY_INTERVAL).await;
    }
    tracing::warn!("an NBD client is sent away: its host is not enrolled any more");
}

enum Outcome {
    Begin(Agreed, Opened),
    StartTls(Negotiation),
    Close,
}

async fn begin<S>(stream: &mut S, tls: Tls, exports: &Exports) -> io::Result<Outcome>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(&greeting()).await?;
    stream.flush().await?;
    let negotiation = Negotiation::new(tls, stream.read_u32().await?).map_err(io::Error::other)?;
    options(stream, negotiation, exports).await
}

async fn options<S>(stream: &mut S, mut negotiation: Negotiation, exports: &Exports) -> io::Result<Outcome>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut data, mut out) = (Vec::new(), Vec::new());
    for _ in 0..NBD_OPTIONS_MAX {
        let mut head = [0; OPTION_HEADER_BYTES];
        stream.read_exact(&mut head).await?;
        let header = OptionHeader::decode(&head).map_err(io::Error::other)?;
        out.clear();
        let step = if header.is_too_big() {
            read_over(stream, header.len).await?;
            negotiation.too_big(header.option, &mut out)
        } else {
            data.resize(header.len as usize, 0);
            stream.read_exact(&mut data).await?;
            negotiation.option(header.option, &data, exports, &mut out)
        };
        // Opened before the answer: after it the client counts on it.
        let opened = match &step {
            Step::Begin(agreed) => match exports.open(&agreed.export) {
                Some(opened) => Some(opened),
                None => return Ok(Outcome::Close),
            },
            _ => None,
        };
        stream.write_all(&out).await?;
        stream.flush().await?;
        match (step, opened) {
            (Step::Begin(agreed), Some(opened)) => return Ok(Outcome::Begin(agreed, opened)),
            (Step::StartTls, _) => return Ok(Outcome::StartTls(negotiation)),
            (Step::Next, _) => {}
            (Step::Close | Step::Begin(_), _) => return Ok(Outcome::Close),
        }
    }
    Err(io::Error::other(format!("more than {NBD_OPTIONS_MAX} options")))
}

async fn read_over<S: AsyncRead + Unpin>(stream: &mut S, len: u32) -> io::Result<()> {
    let mut left = len as usize;
    let mut piece = [0; 4096];
    while left > 0 {
        let now = left.min(piece.len());
        stream.read_exact(&mut piece[..now]).await?;
        left -= now;
    }
    Ok(())
}
