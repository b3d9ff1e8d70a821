//! Whether a block device can be protected, and if not, why and what to do.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use varve_bpf::VolumeSpec;
use varve_common::limits::VOLUME_BYTES_MAX;
use varve_common::problem::Problem;
use varve_io::IoError;
use varve_io::blockdev::{BlockFacts, Identity, disks_behind, is_another};

/// A volume that can be captured.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The path as the operator gave it.
    pub path: String,
    /// Where it lies.
    pub spec: VolumeSpec,
    /// What identifies it.
    pub identity: Identity,
    /// Things to know that are not errors.
    pub notes: Vec<String>,
}

/// Looks at `path` and decides. `own` are directories that must not lie on the volume (see [`refuse_own_state`]).
pub fn check(path: &str, own: &[PathBuf]) -> Result<Checked, Problem> {
    if !Path::new(path).is_absolute() {
        return Err(Problem::usage(
            format!("volume '{path}' is not an absolute path"),
            "the agent does not share your working directory",
            "give the whole path",
        ));
    }
    let facts = BlockFacts::of(path).map_err(|error| not_usable(path, &error))?;
    refuse_uncapturable(path, &facts)?;
    refuse_multipath_head(path, &facts.disk_name)?;
    refuse_own_state(path, &facts, own)?;
    let mut notes = Vec::new();
    if is_kernel_name(path) {
        notes.push(format!(
            "{path} may name another disk after a reboot, which would then be copied: protect it by a name of its own \
             ('ls -l /dev/disk/by-id'), or a logical volume"
        ));
    }
    if !facts.swaps.is_empty() {
        notes.push(format!(
            "{path} is swapped on: pages may change while they are written, so that verify can find differences there"
        ));
    }
    let identity = facts.identity().map_err(|error| not_usable(path, &error))?;
    Ok(Checked { path: path.to_owned(), spec: spec(&facts), identity, notes })
}

/// Whether the kernel gives the name to whichever disk it finds first.
fn is_kernel_name(path: &str) -> bool {
    let Some(name) = path.strip_prefix("/dev/") else { return false };
    let after = |prefix: &str, first: fn(&char) -> bool| {
        name.strip_prefix(prefix).is_some_and(|rest| rest.chars().next().is_some_and(|c| first(&c)))
    };
    !name.contains('/')
        && (["sd", "vd", "xvd"].iter().any(|prefix| after(prefix, char::is_ascii_lowercase))
            || after("nvme", char::is_ascii_digit))
}

/// Where the volume lies.
pub fn spec(facts: &BlockFacts) -> VolumeSpec {
    VolumeSpec {
        disk: facts.disk,
        start_bytes: facts.start_bytes,
        bytes: facts.bytes,
        request_based: facts.request_based,
    }
}

fn not_usable(path: &str, error: &IoError) -> Problem {
    if error.is_not_found() {
        return Problem::not_found(
            format!("there is no volume {path}"),
            error.chain(),
            "look at the output of 'lsblk' for the devices of this host",
        );
    }
    if error.kind() == std::io::ErrorKind::InvalidInput {
        return Problem::usage(
            format!("{path} cannot be protected"),
            "it is not a block device",
            "give a disk, partition, logical volume, loop or md device; 'lsblk' lists them",
        );
    }
    Problem::failed(format!("{path} cannot be looked at"), error.chain(), "check the device and try again")
}

/// Whether writes may go to it now that the capture programs cannot see.
pub fn is_written_unseen(facts: &BlockFacts) -> bool {
    facts.dax_mounted || facts.holders.iter().any(|name| is_remapping(name)) || !facts.request_holders.is_empty()
}

/// md and bcache change a bio's device in place and pass it on: the tracepoint has already fired for the upper device and does not
/// fire again for this one, so writes through them would be missed.
fn is_remapping(holder: &str) -> bool {
    holder.starts_with("md") || holder.starts_with("bcache")
}

/// Refuses what the capture programs cannot see whole.
pub fn refuse_uncapturable(path: &str, facts: &BlockFacts) -> Result<(), Problem> {
    let refuse = |why: String, next: &str| Err(Problem::refused(format!("{path} cannot be protected"), why, next));
    if facts.bytes == 0 {
        return refuse("it has no size".into(), "attach a disk or a backing file to it first");
    }
    if facts.bytes > VOLUME_BYTES_MAX {
        return refuse(
            format!("it is larger than {VOLUME_BYTES_MAX} bytes"),
            "protect its partitions or volumes instead",
        );
    }
    if facts.read_only {
        return refuse(
            "it is read-only, so there is nothing to capture".into(),
            "make it writable first ('blockdev --setrw')",
        );
    }
    if facts.zoned {
        return refuse(
            "it is a zoned device: its zones are written by append, and where the data went is known only afterwards"
                .into(),
            "protect a volume on a conventional device",
        );
    }
    if facts.dax_mounted {
        return refuse(
            "a file system on it is mounted with DAX: such writes are stores to memory and never pass the block layer"
                .into(),
            "mount it without dax (option dax=never), then protect it",
        );
    }
    let remapping = facts.holders.iter().find(|name| is_remapping(name));
    if let Some(holder) = remapping {
        return refuse(
            format!("it is a part of /dev/{holder}, which passes writes on in a way that cannot be seen here"),
            &format!("protect /dev/{holder} instead"),
        );
    }
    if let Some(holder) = facts.request_holders.first().map(|holder| holder.display()) {
        return refuse(
            format!(
                "it is a path of {holder}, which passes requests on to it: no write is seen here before it is done"
            ),
            &format!("protect {holder} instead, or what lies on it"),
        );
    }
    Ok(())
}

/// An NVMe multipath head passes each bio on in place: its end is traced at neither device, so what is in flight would
/// never be known to have completed.
fn refuse_multipath_head(path: &str, disk_name: &str) -> Result<(), Problem> {
    let device = std::fs::canonicalize(Path::new("/sys/block").join(disk_name)).unwrap_or_default();
    if !device.to_string_lossy().contains("/nvme-subsystem/") {
        return Ok(());
    }
    Err(Problem::refused(
        format!("{path} cannot be protected yet"),
        "it is an NVMe multipath device, whose completed writes cannot be told from those under way",
        "protect a device-mapper volume on it (LVM, for example), or boot with nvme_core.multipath=N",
    ))
}

/// How the problem of a volume ends that was exchanged.
pub const EXCHANGED: &str = "is another disk than the one protected";

/// A path may name another disk after a reboot: with that disk's content the replica would go on as if nothing were, and what comes
/// home would overwrite it. `next`: what to do if it is meant.
pub fn refuse_another(volume: &Checked, known: &Identity, next: &str) -> Result<(), Problem> {
    let Some(why) = is_another(known, &volume.identity) else { return Ok(()) };
    Err(Problem::refused(
        format!("{} {EXCHANGED}", volume.path),
        why,
        format!(
            "if the names were dealt anew, have {} name its disk again (a path below /dev/disk/by-id always does); {next}",
            volume.path
        ),
    ))
}

/// The agent's own files must not lie on a volume that it captures: what it writes there while the receiver is away
/// would be captured, and so cause more to be written. The same holds for a receiver on this host.
fn refuse_own_state(path: &str, facts: &BlockFacts, own: &[PathBuf]) -> Result<(), Problem> {
    for dir in own {
        let existing = dir.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(dir);
        let unknown = |error: IoError| {
            Problem::failed(format!("cannot tell which disk holds {}", dir.display()), error.chain(), "check the path")
        };
        let on_it = if facts.is_partition() {
            let device = std::fs::metadata(existing)
                .map(|meta| meta.dev())
                .map_err(|e| unknown(IoError::new("look at", existing, e)))?;
            let (major, minor) = (nix::sys::stat::major(device) as u32, nix::sys::stat::minor(device) as u32);
            (major, minor) == facts.dev || is_held_by(facts, (major, minor))
        } else {
            disks_behind(existing).map_err(unknown)?.contains(&facts.disk)
        };
        if on_it {
            return Err(Problem::refused(
                format!("{path} cannot be protected"),
                format!(
                    "{} lies on it: what Varve writes there would be captured, and so cause more writing",
                    dir.display()
                ),
                format!(
                    "protect the partitions or volumes without {0}, or move {0} to another disk (stop the daemon, move it, \
                     and mount or bind-mount it at the same place)",
                    dir.display()
                ),
            ));
        }
    }
    Ok(())
}

/// Whether the device `dev` is one of the partition's holders (LVM, LUKS, … on it).
fn is_held_by(facts: &BlockFacts, dev: (u32, u32)) -> bool {
    let target = std::fs::canonicalize(format!("/sys/dev/block/{}:{}", dev.0, dev.1));
    let name = target.ok().and_then(|path| path.file_name().map(|name| name.to_string_lossy().into_owned()));
    name.is_some_and(|name| facts.holders.contains(&name))
}

/// Refuses a volume that overlaps one that is protected already.
pub fn refuse_overlap(new: &Checked, group: &str, existing: &VolumeSpec, existing_path: &str) -> Result<(), Problem> {
    let (a, b) = (&new.spec, existing);
    let overlap =
        a.disk == b.disk && a.start_bytes < b.start_bytes + b.bytes && b.start_bytes < a.start_bytes + a.bytes;
    if !overlap {
        return Ok(());
    }
    Err(Problem::refused(
        format!("{} is already protected", new.path),
        format!("group '{group}' protects {existing_path}, which is or overlaps the same part of the disk"),
        format!("look at 'varve status {group}', or run 'varve unprotect {group}' first"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> BlockFacts {
        BlockFacts {
            path: "/dev/vdb".into(),
            name: "vdb".into(),
            dev: (254, 16),
            disk: (254, 16),
            disk_name: "vdb".into(),
            start_bytes: 0,
            bytes: 1 << 30,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            read_only: false,
            zoned: false,
            dax_capable: false,
            dax_mounted: false,
            request_based: true,
            holders: Vec::new(),
            request_holders: Vec::new(),
            mounts: Vec::new(),
            swaps: Vec::new(),
            loop_backing_file: None,
            discard_granularity_bytes: 0,
            discard_max_bytes: 0,
        }
    }

    /// Devices that this project's test machines do not have: the decision is tested on the facts.
    #[test]
    fn what_cannot_be_captured_is_refused_with_the_reason() {
        type Change = fn(&mut BlockFacts);
        let cases: [(Change, &str); 7] = [
            (|facts| facts.zoned = true, "zoned"),
            (|facts| facts.dax_mounted = true, "DAX"),
            (|facts| facts.read_only = true, "read-only"),
            (|facts| facts.bytes = 0, "no size"),
            (|facts| facts.holders = vec!["md127".into()], "protect /dev/md127 instead"),
            (|facts| facts.holders = vec!["bcache0".into()], "/dev/bcache0"),
            (|facts| facts.request_holders = vec!["/dev/mapper/mpatha".into()], "protect /dev/mapper/mpatha instead"),
        ];
        for (change, word) in cases {
            let mut facts = facts();
            change(&mut facts);
            let problem = refuse_uncapturable("/dev/vdb", &facts).expect_err(word);
            assert!(format!("{problem} {}", problem.next).contains(word), "{problem:?}");
            assert_eq!(problem.kind.exit_code(), 3);
        }
        let mut lvm = facts();
        lvm.holders = vec!["dm-0".into()];
        assert_eq!(
            refuse_uncapturable("/dev/vdb", &lvm),
            Ok(()),
            "most of device-mapper clones its bios: they are seen"
        );
    }

    #[test]
    fn names_that_a_reboot_may_give_to_another_disk_are_known() {
        for path in ["/dev/sda", "/dev/sdab3", "/dev/vdb", "/dev/xvda1", "/dev/nvme0n1", "/dev/nvme1n1p2"] {
            assert!(is_kernel_name(path), "{path}");
        }
        for path in
            ["/dev/disk/by-id/nvme-eui.1", "/dev/vg0/sdb", "/dev/mapper/vdb", "/dev/md0", "/dev/loop0", "/dev/dm-3"]
        {
            assert!(!is_kernel_name(path), "{path}");
        }
    }

    #[test]
    fn overlapping_volumes_are_one_too_many() {
        let volume = |start_bytes, bytes| Checked {
            path: "/dev/vdb".into(),
            spec: VolumeSpec { disk: (254, 16), start_bytes, bytes, request_based: true },
            identity: Identity::new(),
            notes: Vec::new(),
        };
        let existing = volume(1 << 20, 1 << 20).spec;
        let refused = |new: Checked| refuse_overlap(&new, "db", &existing, "/dev/vdb1").is_err();
        assert!(refused(volume(0, 1 << 30)), "the whole disk");
        assert!(refused(volume((2 << 20) - 512, 512)));
        assert!(!refused(volume(2 << 20, 1 << 20)), "the next partition");
    }

    #[test]
    fn another_disk_is_refused_with_what_to_do() {
        let serial = |serial: &str| Identity::from([("serial".to_owned(), serial.to_owned())]);
        let spec = VolumeSpec { disk: (254, 16), start_bytes: 0, bytes: 1 << 30, request_based: true };
        let volume = Checked { path: "/dev/vdb".into(), spec, identity: serial("b"), notes: Vec::new() };
        assert_eq!(refuse_another(&volume, &serial("b"), ""), Ok(()));
        assert_eq!(refuse_another(&volume, &Identity::new(), ""), Ok(()), "nothing was known");
        let problem = refuse_another(&volume, &serial("a"), "or leave it").expect_err("another");
        assert_eq!(problem.what, "/dev/vdb is another disk than the one protected");
        assert!(problem.why.contains("'a'") && problem.next.contains("by-id"), "{problem:?}");
    }
}
