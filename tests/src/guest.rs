//! Whole machines that may panic and lose power: QEMU guests without KVM on Debian's kernels (`tests/vm/` has the scripts).
//!
//! A guest runs from an initramfs; what has to outlive it is on disks, which are files of the host and can be read there
//! when it is off. The host's loopback is 10.0.2.2 for it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::{Child, Output, Scratch, built, run, wait_until};

/// From power-on to the first command, on a machine that is shared.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// From the command that ends it to the end.
const END_LIMIT: Duration = Duration::from_secs(60);

/// A machine that is off: a kernel, programs, disks (`/dev/vda`, `/dev/vdb`, …).
#[derive(Debug)]
pub struct Machine {
    kernel: PathBuf,
    initramfs: PathBuf,
    disks: Vec<PathBuf>,
    memory: String,
    /// More words for the kernel.
    append: &'static str,
    directory: PathBuf,
}

fn script(name: &str) -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("vm").join(name))
}

impl Machine {
    /// With Debian's cloud kernel of a series (`6.1`), the product's programs of a production host, and more from the PATH.
    ///
    /// No kernel, no QEMU: a panic that says so. A test that cannot test must not pass.
    #[track_caller]
    pub fn new(scratch: &Scratch, series: &str, programs: &[&str], disks: &[&Path]) -> Self {
        Self::with(scratch, series, programs, disks, "", "1G")
    }

    /// The same with more modules (`?name`: if the kernel has it), and so much memory.
    #[track_caller]
    pub fn with(
        scratch: &Scratch,
        series: &str,
        programs: &[&str],
        disks: &[&Path],
        modules: &str,
        memory: &str,
    ) -> Self {
        crate::require_root();
        let kernel = run(script("kernel").arg(series)).ok().stdout.trim().into();
        let directory = scratch.dir("machine");
        let initramfs = directory.join("initramfs");
        let load = Path::new(env!("CARGO_MANIFEST_DIR")).join("vm/load");
        run(script("initramfs")
            .args([&kernel, &initramfs, &built("varve"), &built("varve-agent"), &load])
            .args(programs)
            .env("VARVE_VM_MODULES", modules))
        .ok();
        let disks = disks.iter().map(|disk| disk.to_path_buf()).collect();
        Machine { kernel, initramfs, disks, memory: memory.to_owned(), append: "", directory }
    }

    /// A small Debian with systemd on its first disk, with this tree installed.
    #[track_caller]
    pub fn system(scratch: &Scratch, series: &str, disks: &[&Path]) -> Self {
        let root = scratch.join("root.img");
        run(script("root").arg(&root)).ok();
        let mut all = vec![root.as_path()];
        all.extend(disks);
        let machine = Self::with(scratch, series, &[], &all, "?fuse ?autofs4 ?ublk_drv", "2G");
        Machine { append: " varve.system", ..machine }
    }

    /// Power on, until it takes commands.
    #[track_caller]
    pub fn boot(&self) -> Guest {
        let socket = self.directory.join("commands");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        // One thread for both processors: with two, a guest on QEMU 7.2 once died (int3) on code that the kernel had just
        // patched, as it does when a tracepoint is switched on.
        let mut args: Vec<String> = [
            "-accel",
            "tcg,thread=single",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            &self.memory,
            "-display",
            "none",
            "-no-reboot",
            "-nodefaults",
            "-rtc",
            "base=utc",
            "-netdev",
            "user,id=net",
            "-device",
            "virtio-net-pci,netdev=net,romfile=",
        ]
        .map(str::to_owned)
        .into();
        args.extend(["-append".to_owned(), format!("console=ttyS0 loglevel=4 panic=-1{}", self.append)]);
        args.extend(["-kernel".into(), self.kernel.join("vmlinuz").display().to_string()]);
        args.extend(["-initrd".into(), self.initramfs.display().to_string()]);
        for (number, disk) in self.disks.iter().enumerate() {
            // writeback: what the guest was told is written is in the host's page cache, and outlives the guest.
            let drive =
                format!("file={},format=raw,if=none,id=d{number},cache=writeback,discard=unmap", disk.display());
            args.extend(["-drive".into(), drive, "-device".into(), format!("virtio-blk-pci,drive=d{number}")]);
        }
        let serial = |args: &mut Vec<String>, chardev: String| args.extend(["-serial".into(), chardev]);
        args.extend(["-chardev".into(), format!("socket,id=commands,path={}", socket.display())]);
        for name in ["console", "records", "agent"] {
            let path = self.serial(name);
            args.extend(["-chardev".into(), format!("file,id={name},path={},append=on", path.display())]);
        }
        for name in ["console", "commands", "records", "agent"] {
            serial(&mut args, format!("chardev:{name}"));
        }
        let start = Instant::now();
        let mut qemu = Child::start("qemu-system-x86_64", &args, &self.directory.join("qemu.log"), |_| {});
        let mut accepted = None;
        wait_until(BOOT_LIMIT, "QEMU opens its sockets", || {
            assert_eq!(qemu.exit_code(), None, "QEMU ended: {}", qemu.log());
            accepted = listener.accept().ok();
            accepted.is_some()
        });
        let stream = accepted.unwrap().0;
        stream.set_nonblocking(false).unwrap();
        let mut guest = Guest {
            qemu,
            commands: BufReader::new(stream),
            console: self.serial("console"),
            agent: self.serial("agent"),
            boot_time: Duration::ZERO,
        };
        let first = guest.line(BOOT_LIMIT);
        assert_eq!(first.as_deref(), Some("ready"), "the guest did not boot:\n{}", guest.end_of_console());
        guest.boot_time = start.elapsed();
        guest
    }

    /// What guests have said on a serial line, over all boots: `console`, `records` (ttyS2), `agent` (ttyS3).
    pub fn said(&self, name: &str) -> String {
        std::fs::read(self.serial(name)).map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into())
    }

    fn serial(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.log"))
    }
}

/// A machine that runs. `Drop` takes its power away.
#[derive(Debug)]
pub struct Guest {
    qemu: Child,
    commands: BufReader<UnixStream>,
    console: PathBuf,
    agent: PathBuf,
    /// From power-on to the first command.
    pub boot_time: Duration,
}

impl Guest {
    /// Runs a line of shell, at most this long.
    #[track_caller]
    pub fn shell_within(&mut self, limit: Duration, line: &str) -> Output {
        assert!(!line.contains('\n'), "one line a command");
        writeln!(self.commands.get_mut(), "{line}").expect("the guest takes commands");
        let head = self.line(limit).unwrap_or_else(|| {
            panic!("the guest did not answer within {limit:?}: {line}\n{}", self.end_of_console());
        });
        let mut numbers = head.split(' ').map(|number| number.parse::<usize>().expect("three numbers"));
        let mut next = || numbers.next().unwrap();
        let (code, stdout, stderr) = (next(), next(), next());
        let mut bytes = |count: usize| {
            let mut bytes = vec![0; count];
            self.commands.read_exact(&mut bytes).expect("the guest's answer");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Output { line: line.to_owned(), code: code as i32, stdout: bytes(stdout), stderr: bytes(stderr) }
    }

    /// Runs a line of shell that must exit with 0; returns its trimmed standard output.
    #[track_caller]
    pub fn shell(&mut self, line: &str) -> String {
        self.shell_within(Duration::from_secs(120), line).ok().stdout.trim().to_owned()
    }

    /// Starts the agent and waits until it answers.
    #[track_caller]
    pub fn start_agent(&mut self) {
        self.shell("varve-agent >/dev/ttyS3 2>&1 & echo $! >/run/agent.pid");
        wait_until(Duration::from_secs(60), "the agent answers", || {
            let out =
                self.shell_within(Duration::from_secs(60), "kill -0 $(cat /run/agent.pid) && varve status --json");
            out.code == 0
        });
    }

    /// Stops the agent as systemd does.
    #[track_caller]
    pub fn stop_agent(&mut self) {
        self.shell("kill $(cat /run/agent.pid)");
        wait_until(Duration::from_secs(60), "the agent ends", || {
            self.shell_within(Duration::from_secs(60), "kill -0 $(cat /run/agent.pid)").code != 0
        });
    }

    /// A group of the agent's status.
    #[track_caller]
    pub fn group(&mut self, name: &str) -> serde_json::Value {
        self.shell_within(Duration::from_secs(60), &format!("varve status {name} --json")).ok().json()["groups"][0]
            .clone()
    }

    /// The power goes, now. Nothing is written any more, by nobody.
    #[track_caller]
    pub fn cut_power(mut self) {
        self.qemu.end_with(Signal::SIGKILL, END_LIMIT);
    }

    /// The kernel panics, now (it is told to reboot at once, and the machine to stay off then).
    #[track_caller]
    pub fn panic(mut self) {
        writeln!(self.commands.get_mut(), "echo c >/proc/sysrq-trigger").unwrap();
        self.await_end("panicked");
        let console = std::fs::read(&self.console).unwrap();
        let console = String::from_utf8_lossy(&console).into_owned();
        assert!(console.contains("Kernel panic"), "it did not panic:\n{}", self.end_of_console());
    }

    /// Power off in an orderly way; what is mounted is the caller's.
    #[track_caller]
    pub fn power_off(mut self) {
        writeln!(self.commands.get_mut(), "sync; poweroff -f").unwrap();
        self.await_end("was told to power off");
    }

    /// A reboot by systemd, up to the moment where the machine would start again: it stays off.
    #[track_caller]
    pub fn reboot(mut self) {
        writeln!(self.commands.get_mut(), "systemctl reboot").unwrap();
        self.await_end("was told to reboot");
    }

    #[track_caller]
    fn await_end(&mut self, what: &str) {
        let code = self.qemu.wait(END_LIMIT);
        assert_eq!(code, Some(0), "the guest {what}, and QEMU runs on:\n{}", self.end_of_console());
    }

    /// The next line on the command line, without its end. `None`: not within this time.
    fn line(&mut self, limit: Duration) -> Option<String> {
        self.commands.get_ref().set_read_timeout(Some(limit)).unwrap();
        let mut line = String::new();
        let read = self.commands.read_line(&mut line).ok()?;
        (read > 0).then(|| line.trim_end().to_owned())
    }

    fn end_of_console(&self) -> String {
        let console = std::fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&console).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        format!("--- end of the guest's console\n{}", lines[lines.len().saturating_sub(40)..].join("\n"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let agent = std::fs::read(&self.agent).unwrap_or_default();
            let text = String::from_utf8_lossy(&agent).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("{}", self.end_of_console());
            eprintln!("--- end of its agent's log\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        }
    }
}
