//! systemd's notification protocol (`sd_notify(3)`) without its library.
//!
//! The free functions speak to `$NOTIFY_SOCKET` and do nothing when it is unset, so that a daemon calls
//! them always. They log a failure and go on: a service manager that does not listen must not stop
//! replication. [`Notifier`] is the form that returns its errors.

use std::ffi::{OsStr, OsString};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::IoError;

/// The longest status text that is sent, in bytes: systemd keeps one line.
const STATUS_BYTES_MAX: usize = 1024;

/// A service manager's socket, or nobody.
#[derive(Debug, Clone, Default)]
pub struct Notifier {
    socket: Option<OsString>,
}

impl Notifier {
    /// The manager that started this process, by `$NOTIFY_SOCKET`.
    pub fn from_env() -> Self {
        Self { socket: std::env::var_os("NOTIFY_SOCKET").filter(|s| !s.is_empty()) }
    }

    /// A socket by name: a path, or `@name` for one in the abstract namespace.
    pub fn to(socket: impl AsRef<OsStr>) -> Self {
        Self { socket: Some(socket.as_ref().to_os_string()) }
    }

    /// Whether anybody listens.
    pub fn is_active(&self) -> bool {
        self.socket.is_some()
    }

    /// Sends one message: lines `KEY=value`.
    ///
    /// # Errors
    /// If the socket's name is not understood or the datagram is not taken.
    pub fn send(&self, message: &str) -> Result<(), IoError> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let fail = |e| IoError::new("notify the service manager at", socket, e);
        let address = match socket.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            [b'/', ..] => SocketAddr::from_pathname(socket),
            _ => Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "neither a path nor an abstract name")),
        }
        .map_err(fail)?;
        let datagram = UnixDatagram::unbound().map_err(fail)?;
        // A manager that stopped reading must not hang the daemon that tells it so.
        datagram.set_write_timeout(Some(Duration::from_millis(500))).map_err(fail)?;
        datagram.send_to_addr(message.as_bytes(), &address).map_err(fail)?;
        Ok(())
    }

    /// Start-up is complete.
    ///
    /// # Errors
    /// As [`Notifier::send`], here and below.
    pub fn ready(&self) -> Result<(), IoError> {
        self.send("READY=1")
    }

    /// Shutdown has begun.
    ///
    /// # Errors
    /// As [`Notifier::send`].
    pub fn stopping(&self) -> Result<(), IoError> {
        self.send("STOPPING=1")
    }

    /// One line for `systemctl status`; cut at 1024 bytes, line breaks become spaces.
    ///
    /// # Errors
    /// As [`Notifier::send`].
    pub fn status(&self, text: &str) -> Result<(), IoError> {
        let mut line = text.replace(['\n', '\r'], " ");
        let cut = (0..=STATUS_BYTES_MAX.min(line.len())).rev().find(|&at| line.is_char_boundary(at));
        line.truncate(cut.unwrap_or(0));
        self.send(&format!("STATUS={line}"))
    }

    /// The daemon is alive.
    ///
    /// # Errors
    /// As [`Notifier::send`].
    pub fn watchdog(&self) -> Result<(), IoError> {
        self.send("WATCHDOG=1")
    }
}

fn or_log(result: Result<(), IoError>) {
    if let Err(error) = result {
        tracing::warn!(error = %error.chain(), "service manager not notified");
    }
}

/// Tells systemd that start-up is complete.
pub fn ready() {
    or_log(Notifier::from_env().ready());
}

/// Tells systemd that shutdown has begun.
pub fn stopping() {
    or_log(Notifier::from_env().stopping());
}

/// Sets the line that `systemctl status` shows.
pub fn status(text: &str) {
    or_log(Notifier::from_env().status(text));
}

/// Tells systemd that the daemon is alive.
pub fn watchdog() {
    or_log(Notifier::from_env().watchdog());
}

/// How often [`watchdog`] should be called: half of what systemd waits. `None` if it does not wait.
pub fn watchdog_interval() -> Option<Duration> {
    let var = |name| std::env::var(name).ok();
    interval(var("WATCHDOG_USEC").as_deref(), var("WATCHDOG_PID").as_deref(), std::process::id())
}

fn interval(usec: Option<&str>, pid: Option<&str>, own_pid: u32) -> Option<Duration> {
    // The variables are inherited: a process that systemd did not mean must ignore them.
    if pid.is_some_and(|pid| pid.parse() != Ok(own_pid)) {
        return None;
    }
    let usec: u64 = usec?.parse().ok()?;
    (usec > 0).then(|| Duration::from_micros(usec / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 4096];
        let n = socket.recv(&mut bytes).expect("message");
        String::from_utf8(bytes[..n].to_vec()).expect("text")
    }

    #[test]
    fn speaks_to_a_path() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).expect("bind");
        let notifier = Notifier::to(&path);
        notifier.ready().expect("ready");
        assert_eq!(receive(&socket), "READY=1");
        notifier.status("two\nlines").expect("status");
        assert_eq!(receive(&socket), "STATUS=two lines");
        notifier.status(&"ä".repeat(4000)).expect("long status");
        assert_eq!(receive(&socket).len(), "STATUS=".len() + STATUS_BYTES_MAX);
    }

    #[test]
    fn speaks_to_an_abstract_name() {
        let name = format!("varve-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("address");
        let socket = UnixDatagram::bind_addr(&address).expect("bind");
        let notifier = Notifier::to(format!("@{name}"));
        notifier.stopping().expect("stopping");
        notifier.watchdog().expect("watchdog");
        assert_eq!((receive(&socket), receive(&socket)), ("STOPPING=1".into(), "WATCHDOG=1".into()));
    }

    #[test]
    fn silent_without_a_manager_and_clear_with_a_wrong_one() {
        Notifier::default().ready().expect("no manager, no error");
        let error = Notifier::to("vsock:1:2").ready().expect_err("not understood");
        assert!(error.chain().contains("vsock:1:2"));
        assert!(Notifier::to("/nowhere/socket").ready().expect_err("absent").is_not_found());
    }

    #[test]
    fn watchdog_is_half_of_the_limit_and_only_for_us() {
        assert_eq!(interval(Some("30000000"), None, 7), Some(Duration::from_secs(15)));
        assert_eq!(interval(Some("30000000"), Some("7"), 7), Some(Duration::from_secs(15)));
        assert_eq!(interval(Some("30000000"), Some("8"), 7), None);
        assert_eq!(interval(None, None, 7), None);
        assert_eq!(interval(Some("0"), None, 7), None);
        assert_eq!(interval(Some("soon"), None, 7), None);
    }
}
