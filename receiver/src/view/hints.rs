//! What is on a volume, and what to know before it is mounted beside the one that it was taken from.

use varve_common::control::ExportKind;
use varve_export::disk::Disk;

/// Bytes from the begin of a volume that tell what is on it: the last of them is btrfs's, at 64 KiB.
const HEAD_BYTES: usize = 68 << 10;

/// A signature: its offset, its bytes, and what follows from it.
struct Signature {
    at: usize,
    magic: &'static [u8],
    hint: &'static str,
}

const SIGNATURES: [Signature; 5] = [
    Signature {
        at: 0,
        magic: b"XFSB",
        hint: "XFS: mount with -o nouuid (beside the original), read-only also with -o ro,norecovery",
    },
    Signature {
        at: 1024 + 56,
        magic: &[0x53, 0xef],
        hint: "ext4: a read-only view is mounted with -o ro,noload; a writable one replays its journal by itself",
    },
    Signature {
        at: 0x1_0040,
        magic: b"_BHRfS_M",
        hint: "btrfs: never mount it while the original (or another view of it) is mounted on this machine: the kernel takes \
               the same fsid for the same file system. Mount it elsewhere over NBD, or run 'btrfstune -u' on a writable view",
    },
    Signature {
        at: 512,
        magic: b"LABELONE",
        hint: "LVM: the names and identities are those of the original: 'vgimportclone --basevgname restored DEVICE' on a \
               writable view before it is activated",
    },
    Signature {
        at: 510,
        magic: &[0x55, 0xaa],
        hint: "a partition table: 'partx -a DEVICE' (or 'losetup -P') shows the partitions",
    },
];

/// What to tell of a view with these volumes.
pub fn of(volumes: &[(String, &dyn Disk)], writable: bool, export: ExportKind) -> Vec<String> {
    let mut hints = Vec::new();
    for (path, volume) in volumes {
        let mut head = vec![0; HEAD_BYTES.min(volume.len() as usize)];
        // Hints are no promise: without them the view is as good.
        if volume.read_at(&mut head, 0).is_err() {
            continue;
        }
        let found = SIGNATURES.iter().find(|s| head.get(s.at..s.at + s.magic.len()) == Some(s.magic));
        hints.extend(found.map(|found| format!("{path} holds {}", found.hint)));
    }
    if !writable && export == ExportKind::Device && !hints.is_empty() {
        hints.push(
            "a database or a file system that must recover needs --writable: its writes are gone with the view".into(),
        );
    }
    hints
}
