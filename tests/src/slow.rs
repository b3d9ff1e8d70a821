//! A device on which every read and write takes its time.

use std::path::Path;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};

use crate::{Child, LoopDevice, LoopOptions, Scratch, complain, wait_until};

/// A loop device over a FUSE file over an NBD server that waits before it answers: requests stay in flight for as long
/// as asked, about five at a time, which no local disk does. `Drop` takes all of it down, top first.
#[derive(Debug)]
pub struct SlowDevice {
    // The order of the fields is the order of their end; see `Drop`.
    device: Option<LoopDevice>,
    fuse: Child,
    server: Child,
    point: std::path::PathBuf,
}

impl SlowDevice {
    /// In memory, zeros at first.
    #[track_caller]
    pub fn new(scratch: &Scratch, name: &str, bytes: u64, read: Duration, write: Duration) -> Self {
        let [read, write] =
            [("rdelay", read), ("wdelay", write)].map(|(key, time)| format!("{key}={}ms", time.as_millis()));
        Self::with_filters(scratch, name, bytes, &["delay"], &[&read, &write])
    }

    /// With nbdkit's filters and their parameters: `error` with `error-pwrite-rate=1%`, `rate` with `rate=10M`, …
    #[track_caller]
    pub fn with_filters(scratch: &Scratch, name: &str, bytes: u64, filters: &[&str], parameters: &[&str]) -> Self {
        let mut args = vec!["--threads=64".to_owned()];
        args.extend(filters.iter().map(|filter| format!("--filter={filter}")));
        args.extend(["memory".to_owned(), bytes.to_string()]);
        args.extend(parameters.iter().map(ToString::to_string));
        Self::with_server(scratch, name, &args)
    }

    #[track_caller]
    fn with_server(scratch: &Scratch, name: &str, more: &[String]) -> Self {
        let limit = Duration::from_secs(20);
        let dir = scratch.dir(name);
        let (socket, point) = (dir.join("nbd"), dir.join("fuse"));
        std::fs::create_dir(&point).unwrap();

        let mut args = vec!["--foreground".to_owned(), format!("--unix={}", socket.display())];
        args.extend(more.iter().cloned());
        let mut server = Child::start("nbdkit", &args, &dir.join("nbdkit.log"), |_| {});
        wait_until(limit, "nbdkit listens", || {
            assert_eq!(server.exit_code(), None, "nbdkit ended: {}", server.log());
            socket.exists()
        });

        let file = point.join("disk");
        let args = [file.as_os_str(), "--unix".as_ref(), socket.as_os_str()];
        let mut fuse = Child::start("nbdfuse", &args, &dir.join("nbdfuse.log"), |_| {});
        wait_until(limit, "nbdfuse serves its file", || {
            assert_eq!(fuse.exit_code(), None, "nbdfuse ended: {}", fuse.log());
            file.exists()
        });

        let options = LoopOptions { direct_io: true, ..LoopOptions::default() };
        let device = LoopDevice::over(&file, options);
        SlowDevice { device: Some(device), fuse, server, point }
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        self.device.as_ref().unwrap().path()
    }
}

impl Drop for SlowDevice {
    fn drop(&mut self) {
        self.device = None;
        if let Err(error) = umount2(&self.point, MntFlags::empty()) {
            let _ = umount2(&self.point, MntFlags::MNT_DETACH);
            complain(&format!("umount {}: {error}", self.point.display()));
        }
        self.fuse.wait(Duration::from_secs(10));
        self.server.signal(nix::sys::signal::Signal::SIGTERM);
        self.server.wait(Duration::from_secs(10));
    }
}
