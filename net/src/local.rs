//! The Unix socket between `varve` and a daemon: newline-delimited JSON, one request line, then reply lines.
//!
//! The socket is 0600 in a directory of 0700: whoever may open it may do everything, so there is no further
//! authentication. Both directions are bounded ([`REQUEST_BYTES_MAX`], [`REPLY_BYTES_MAX`]).

use std::fs::{File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::durable::create_private_dir;
use crate::error::{Error, ErrorKind, Result};

/// Longest request line.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;
/// Longest reply line: all bookmarks that a group may have, with their times.
pub const REPLY_BYTES_MAX: usize = 16 << 20;
/// Clients at once; one more is turned away.
pub const CLIENTS_MAX: usize = 64;
/// The longest that a client may take for its first request, and to take a reply line.
pub const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest that a client waits until the daemon takes its call, and until it takes its question. The kernel keeps calls for
/// a daemon that hangs; only when it has no room for more does it come to this.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The daemon's side.
#[derive(Debug)]
pub struct LocalServer {
    listener: UnixListener,
    path: PathBuf,
    places: Arc<Semaphore>,
    /// Held for life: decides between two daemons that start at the same moment.
    _lock: File,
}

/// One client of the daemon.
#[derive(Debug)]
pub struct LocalPeer {
    reader: tokio::io::BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    /// What was read of a line that is not complete. Here and not in the future, so that reading is cancel-safe.
    partial: Vec<u8>,
    had_request: bool,
    _place: OwnedSemaphorePermit,
}

impl LocalServer {
    /// Creates the socket, and its directory if missing. A socket that nobody listens on (a daemon was killed) is
    /// replaced; one that is served is [`ErrorKind::AlreadyRunning`].
    pub fn bind(path: &Path) -> Result<Self> {
        let fail = |e| Error::io(format!("cannot serve {}", path.display()), e);
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        create_private_dir(dir)?;
        let lock = take_lock(path)?;
        remove_stale(path)?;
        let listener = UnixListener::bind(path).map_err(|e| {
            fail(e).with_hint("a socket's path has at most 107 bytes; check that the directory can be written")
        })?;
        std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(fail)?;
        Ok(Self { listener, path: path.to_owned(), places: Arc::new(Semaphore::new(CLIENTS_MAX)), _lock: lock })
    }

    /// The next client. Whoever comes when all places are taken is turned away. Cancel-safe.
    pub async fn accept(&self) -> Result<LocalPeer> {
        loop {
            let (stream, _) = self
                .listener
                .accept()
                .await
                .map_err(|e| Error::io(format!("cannot accept on {}", self.path.display()), e))?;
            match self.places.clone().try_acquire_owned() {
                Ok(place) => return Ok(LocalPeer::new(stream, place)),
                Err(_) => drop(stream),
            }
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LocalServer {
    fn drop(&mut self) {
        // The lock is still held, so this cannot be another daemon's socket.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A lock file beside the socket. It stays: removing it would open a race between two daemons.
fn take_lock(path: &Path) -> Result<File> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".lock");
    let lock_path = path.with_file_name(name);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&lock_path)
        .map_err(|e| Error::io(format!("cannot open {}", lock_path.display()), e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(running(path)),
        Err(std::fs::TryLockError::Error(e)) => Err(Error::io(format!("cannot lock {}", lock_path.display()), e)),
    }
}

fn running(path: &Path) -> Error {
    Error::new(ErrorKind::AlreadyRunning, format!("another daemon serves {}", path.display()))
}

fn remove_stale(path: &Path) -> Result<()> {
    let fail = |e| Error::io(format!("cannot replace {}", path.display()), e);
    let found = match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(fail)?,
    };
    if !found.file_type().is_socket() {
        return Err(Error::new(ErrorKind::Io, format!("{} is in the way: it is not a socket", path.display()))
            .with_hint("move it away; Varve did not make it"));
    }
    match dial(path, CONNECT_TIMEOUT) {
        Ok(_) => Err(running(path)),
        Err(e) if is_late(&e) => Err(running(path)),
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(fail),
        Err(e) => Err(fail(e)),
    }
}

impl LocalPeer {
    fn new(stream: UnixStream, place: OwnedSemaphorePermit) -> Self {
        let (reader, writer) = stream.into_split();
        Self {
            reader: tokio::io::BufReader::new(reader),
            writer,
            partial: Vec::new(),
            had_request: false,
            _place: place,
        }
    }

    /// The next request; `None` when the client is done. The first one must come within [`CLIENT_TIMEOUT`].
    /// Cancel-safe: while replies are sent, waiting for this notices that the client has gone.
    pub async fn read_request<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let line = if self.had_request {
            self.read_line().await?
        } else {
            let late = |_| Error::new(ErrorKind::Timeout, "a local client connected and asked nothing");
            timeout(CLIENT_TIMEOUT, self.read_line()).await.map_err(late)??
        };
        let Some(line) = line else { return Ok(None) };
        self.had_request = true;
        let request = serde_json::from_slice(&line).map_err(|e| {
            Error::new(ErrorKind::Protocol, "a local client sent something else than a request").because(e)
        })?;
        Ok(Some(request))
    }

    async fn read_line(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            let chunk = self.reader.fill_buf().await.map_err(|e| Error::io("cannot read from a local client", e))?;
            if chunk.is_empty() {
                return match self.partial.is_empty() {
                    true => Ok(None),
                    false => Err(Error::new(ErrorKind::Closed, "a local client left in the middle of a request")),
                };
            }
            let end = chunk.iter().position(|&b| b == b'\n');
            let take = end.unwrap_or(chunk.len());
            if self.partial.len() + take > REQUEST_BYTES_MAX {
                return Err(Error::new(
                    ErrorKind::Limit,
                    format!("a local client's request has more than {REQUEST_BYTES_MAX} bytes"),
                )
                .with_hint("ask for less at once"));
            }
            self.partial.extend_from_slice(&chunk[..take]);
            self.reader.consume(take + usize::from(end.is_some()));
            if end.is_some() {
                return Ok(Some(std::mem::take(&mut self.partial)));
            }
        }
    }

    /// Sends one reply line. A client that does not take it within [`CLIENT_TIMEOUT`] is given up: do not send to it
    /// again.
    pub async fn send(&mut self, reply: &impl Serialize) -> Result<()> {
        let line = to_line(reply, REPLY_BYTES_MAX)?;
        match timeout(CLIENT_TIMEOUT, self.writer.write_all(&line)).await {
            Ok(result) => result.map_err(|e| Error::io("cannot answer a local client", e)),
            Err(_) => Err(Error::new(ErrorKind::Timeout, "a local client does not take its answer")),
        }
    }
}

fn to_line(value: &impl Serialize, limit: usize) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)
        .map_err(|e| Error::new(ErrorKind::Protocol, "this cannot be written as JSON").because(e))?;
    if line.len() > limit {
        return Err(Error::new(
            ErrorKind::Limit,
            format!("a line of {} bytes is over the limit of {limit}", line.len()),
        )
        .with_hint("ask for less at once"));
    }
    line.push(b'\n');
    Ok(line)
}

/// The CLI's side: blocking, without a runtime.
#[derive(Debug)]
pub struct LocalClient {
    stream: BufReader<BlockingStream>,
    path: PathBuf,
    had_reply: bool,
}

impl LocalClient {
    /// Connects to the daemon at `path`, within [`CONNECT_TIMEOUT`]. If it cannot be reached, the error names the socket and
    /// the daemon to start (by the socket's name: `receiver…` is varve-receiver's).
    pub fn connect(path: &Path) -> Result<Self> {
        Self::connect_within(path, CONNECT_TIMEOUT)
    }

    fn connect_within(path: &Path, limit: Duration) -> Result<Self> {
        let stream = dial(path, limit).map_err(|e| match is_late(&e) {
            true => {
                Error::new(ErrorKind::Timeout, format!("{} does not take calls on {}", daemon_of(path), path.display()))
                    .because(format!(
                        "it runs and hangs, or is stopped: as many wait as may, and none was taken in {limit:?}"
                    ))
                    .with_hint(format!(
                        "look at its log ('journalctl -u {0}'), then 'systemctl restart {0}'",
                        daemon_of(path)
                    ))
            }
            false => unreachable(path, e),
        })?;
        Ok(Self { stream: BufReader::new(stream), path: path.to_owned(), had_reply: false })
    }

    /// How long [`LocalClient::reply`] waits; `None` (as at first) is without limit.
    pub fn set_timeout(&mut self, limit: Option<Duration>) -> Result<()> {
        let set = self.stream.get_ref().set_read_timeout(limit);
        set.map_err(|e| Error::io(format!("cannot set up {}", self.path.display()), e))
    }

    /// Sends one request.
    pub fn request(&mut self, request: &impl Serialize) -> Result<()> {
        let line = to_line(request, REQUEST_BYTES_MAX)?;
        // Not an error yet: a daemon that turned us away has closed; reading says so better.
        match self.stream.get_mut().write_all(&line) {
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            Err(e) if is_late(&e) => Err(self.late(e)),
            other => other
                .map_err(|e| Error::io(format!("cannot ask {} on {}", daemon_of(&self.path), self.path.display()), e)),
        }
    }

    /// The next reply line; `None` when the daemon is done.
    pub fn reply<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let (daemon, socket) = (daemon_of(&self.path), self.path.display());
        let mut line = Vec::new();
        let mut limited = (&mut self.stream).take(REPLY_BYTES_MAX as u64 + 1);
        let read = limited.read_until(b'\n', &mut line);
        match read {
            Err(e) if is_late(&e) => return Err(self.late(e)),
            // Turned away with our request unread.
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => line.clear(),
            other => drop(other.map_err(|e| Error::io(format!("cannot read from {daemon} on {socket}"), e))?),
        }
        if line.pop() == Some(b'\n') {
            self.had_reply = true;
            return serde_json::from_slice(&line).map(Some).map_err(|e| {
                Error::new(ErrorKind::Protocol, format!("{daemon} answered on {socket} with something unknown"))
                    .because(e)
                    .with_hint("the daemon is of another version than this program: restart it")
            });
        }
        if line.len() >= REPLY_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("{daemon} sent a line of more than {REPLY_BYTES_MAX} bytes"),
            ));
        }
        if !line.is_empty() {
            return Err(Error::new(ErrorKind::Closed, format!("{daemon} stopped in the middle of an answer"))
                .with_hint("see its log: journalctl -u varve-*"));
        }
        if !self.had_reply {
            return Err(Error::new(ErrorKind::Busy, format!("{daemon} closed {socket} without an answer")).with_hint(
                format!("it serves {CLIENTS_MAX} clients at once, or it is stopping: try again; its log says more"),
            ));
        }
        Ok(None)
    }

    fn late(&self, source: std::io::Error) -> Error {
        let text = format!("{} does not answer on {}", daemon_of(&self.path), self.path.display());
        Error::new(ErrorKind::Timeout, text).because(source)
    }

    /// All reply lines, until the daemon is done or the first error.
    pub fn replies<T: DeserializeOwned>(&mut self) -> impl Iterator<Item = Result<T>> + '_ {
        let mut failed = false;
        std::iter::from_fn(move || {
            if failed {
                return None;
            }
            let next = self.reply().transpose();
            failed = matches!(next, Some(Err(_)));
            next
        })
    }
}

/// The kernel limits `connect` by the send timeout. (A connect without blocking would not do: it fails at once when there is no
/// room, and cannot be waited for.)
fn dial(path: &Path, limit: Duration) -> std::io::Result<BlockingStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_write_timeout(Some(limit))?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(OwnedFd::from(socket).into())
}

fn is_late(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

fn daemon_of(path: &Path) -> &'static str {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if name.contains("receiver") { "varve-receiver" } else { "varve-agent" }
}

fn unreachable(path: &Path, source: std::io::Error) -> Error {
    let daemon = daemon_of(path);
    let hint = match source.kind() {
        std::io::ErrorKind::PermissionDenied => "run this command as root ('sudo varve …')".to_owned(),
        _ => format!("start it with 'systemctl start {daemon}', or set VARVE_ROOT to the installation that you mean"),
    };
    Error::new(ErrorKind::Unreachable, format!("{daemon} does not answer on {}", path.display()))
        .because(source)
        .with_hint(hint)
}

#[cfg(test)]
#[path = "local_tests.rs"]
mod tests;
