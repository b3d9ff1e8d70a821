//! What this machine must have for capture, checked one by one, for `varve doctor` and before loading.

use std::error::Error;
use std::fs;
use std::path::Path;

use libbpf_rs::{MapHandle, MapType, libbpf_sys};
use nix::sys::utsname::uname;

use crate::error::{CaptureError, CaptureErrorKind};

/// The first kernel with variable-size ring records (dynptr), `bpf_loop` and all else that the programs use.
const KERNEL_MIN: (u32, u32) = (5, 19);
/// The smallest ring that makes sense, tried for real.
const RING_BYTES_TRIED: u32 = 4 << 20;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// Whether capture can work with it.
    pub ok: bool,
    /// What was found.
    pub found: String,
    /// Why it matters.
    pub why: &'static str,
    /// What to do if it is not ok.
    pub next: &'static str,
}

/// Everything, in the order in which it would stop us.
pub fn checks() -> Vec<Check> {
    let mut checks = quick();
    checks.extend([programs(), ring()]);
    checks
}

/// Whether capture can go on without the agent. `pins` is where it would be pinned.
pub fn pins(pins: &Path) -> Check {
    let parent = pins.parent().unwrap_or(Path::new("/"));
    let (pinned, place) = (crate::is_pinned(pins), crate::pins::is_bpffs(parent));
    // Below another root than / the agent mounts a bpffs itself, so its absence is no failure before the first start.
    let system = parent == Path::new("/sys/fs/bpf");
    Check {
        name: "pinned capture",
        ok: place || !system,
        found: match (pinned, place) {
            (true, _) => format!("{} holds a running capture", pins.display()),
            (false, true) => "nothing is pinned".into(),
            (false, false) => format!("no bpf file system on {}", parent.display()),
        },
        why: "what is pinned there goes on capturing while the agent is stopped, killed or upgraded",
        next: "mount -t bpf bpf /sys/fs/bpf, then restart the agent",
    }
}

/// What explains most failures, without loading anything.
fn quick() -> Vec<Check> {
    vec![architecture(), kernel(), types(), lockdown(), permission(), compiler()]
}

fn architecture() -> Check {
    Check {
        name: "architecture",
        ok: cfg!(target_arch = "x86_64"),
        found: std::env::consts::ARCH.into(),
        why: "the way from a page to its data is known for x86_64 only",
        next: "run the agent on an x86_64 host",
    }
}

fn kernel() -> Check {
    let release = uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    Check {
        name: "kernel",
        ok: version(&release).is_some_and(|version| version >= KERNEL_MIN),
        found: release,
        why: "capture needs ring records of variable size, which came with Linux 5.19",
        next: "boot a kernel from 5.19 on",
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn types() -> Check {
    let path = Path::new("/sys/kernel/btf/vmlinux");
    Check {
        name: "kernel types (BTF)",
        ok: path.exists(),
        found: format!("{} {}", path.display(), if path.exists() { "exists" } else { "does not exist" }),
        why: "the programs find the kernel's structures by its type information",
        next: "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y (every major distribution's is); mount /sys",
    }
}

fn lockdown() -> Check {
    let text = fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_else(|_| "[none]".into());
    let mode = text.split(['[', ']']).nth(1).unwrap_or("none").to_string();
    Check {
        name: "kernel lockdown",
        ok: mode != "confidentiality",
        found: mode,
        why: "lockdown=confidentiality forbids programs to read data, so no payload can be captured",
        next: "boot with lockdown=integrity (Secure Boot's usual mode) or none",
    }
}

fn permission() -> Check {
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    let made = MapHandle::create(MapType::Array, Some("varve_doctor"), 4, 8, 1, &options);
    Check {
        name: "bpf system call",
        ok: made.is_ok(),
        found: made.map_or_else(|e| e.to_string(), |_| "allowed".into()),
        why: "the programs and their maps are made with it",
        next: "run as root or with CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN; in a container also allow bpf in seccomp",
    }
}

const BUILD_AND_RIGHTS: &str =
    "boot a kernel built with CONFIG_BPF_SYSCALL=y and CONFIG_BPF_EVENTS=y; run with CAP_BPF and CAP_PERFMON";

/// The programs themselves: whether the kernel's verifier takes them is nothing to guess about. (libbpf's probe of the
/// tracing type tries fentry, which hardened kernels refuse although tracepoints work.)
fn programs() -> Check {
    let loaded = crate::capture::try_load();
    Check {
        name: "capture programs",
        ok: loaded.is_ok(),
        found: match &loaded {
            Ok(()) => "loadable".into(),
            Err(e) => format!("{e}: {}", e.source().map(ToString::to_string).unwrap_or_default()),
        },
        why: "writes are seen by programs on the block layer's tracepoints",
        next: match &loaded {
            // The verifier refused them: what it says is in the error.
            Err(e) if e.kind() == CaptureErrorKind::Unsupported => e.hint(),
            _ => BUILD_AND_RIGHTS,
        },
    }
}

fn compiler() -> Check {
    let on = fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").map_or("1".into(), |on| on.trim().to_string());
    Check {
        name: "bpf compiler",
        ok: on != "0",
        found: if on == "0" { "off".into() } else { "on".into() },
        why: "interpreted programs would slow every write down by an order of magnitude",
        next: "sysctl net.core.bpf_jit_enable=1",
    }
}

fn ring() -> Check {
    let made = crate::group::ring_map(RING_BYTES_TRIED);
    Check {
        name: "ring memory",
        ok: made.is_ok(),
        found: match &made {
            Ok(_) => format!("a ring of {RING_BYTES_TRIED} bytes can be made"),
            Err(e) => e.to_string(),
        },
        why: "a group's writes wait in kernel memory until they are sent or journaled",
        next: "raise the memory limit of the agent's service (MemoryMax=), or give the host more memory",
    }
}

/// The first check that fails, as an error.
pub(crate) fn refuse_unsupported() -> Result<(), CaptureError> {
    let Some(check) = quick().into_iter().find(|check| !check.ok) else { return Ok(()) };
    let kind = match check.name {
        "bpf system call" => CaptureErrorKind::Permission,
        _ => CaptureErrorKind::Unsupported,
    };
    Err(CaptureError::new(kind, format!("capture cannot work here: {} is {}", check.name, check.found), check.next)
        .because(check.why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases() {
        assert_eq!(version("6.1.0-13-amd64"), Some((6, 1)));
        assert_eq!(version("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(version("5.15.0"), Some((5, 15)));
        assert!(version("5.19-rc1") >= Some(KERNEL_MIN));
        assert!(version("5.18.3") < Some(KERNEL_MIN));
        assert_eq!(version("strange"), None);
    }

    #[test]
    fn a_place_for_pins() {
        // A service manager mounts it at boot; a build host may have none.
        let there = || std::fs::read_to_string("/proc/self/mounts").expect("mounts").contains(" /sys/fs/bpf bpf ");
        let before = there();
        let system = pins(Path::new("/sys/fs/bpf/varve"));
        // Another test may have mounted it in between.
        assert!(system.ok >= before && system.ok <= there(), "{system:?}");
        let elsewhere = pins(Path::new("/nowhere/sys/fs/bpf/varve"));
        assert!(elsewhere.ok && elsewhere.found.contains("no bpf file system"), "{elsewhere:?}");
    }

    #[test]
    fn a_fit_machine_passes() {
        for check in checks() {
            assert!(check.ok, "{check:?}");
        }
    }
}
