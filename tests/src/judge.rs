//! Says whether two devices or files hold the same bytes. Reads on its own, with none of the product's code.

use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

const CHUNK: usize = 1 << 20;
const BLOCK: usize = 4096;
const PAGE: usize = 4096;

/// Where two images differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// First differing byte (or the shorter one's length).
    pub first_offset: u64,
    /// How many 4 KiB blocks differ.
    pub blocks: u64,
    /// Offsets of the first differing blocks, at most 16.
    pub block_offsets: Vec<u64>,
    /// Lengths of both.
    pub bytes: (u64, u64),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference { first_offset, blocks, block_offsets, bytes } = self;
        write!(f, "{blocks} blocks of 4 KiB differ, first byte {first_offset}, blocks at {block_offsets:?}, ")?;
        write!(f, "lengths {} and {}", bytes.0, bytes.1)
    }
}

/// Reads from the medium: a device with O_DIRECT (the page cache of a block device does not see what a filesystem on
/// it writes), a file through the page cache, which is coherent.
struct Reader {
    file: File,
    buffer: Vec<u8>,
    start: usize,
}

impl Reader {
    #[track_caller]
    fn open(path: &Path) -> Self {
        let fail = |error| -> ! { panic!("{}: {error}", path.display()) };
        let device = match std::fs::metadata(path) {
            Ok(meta) => meta.file_type().is_block_device(),
            Err(error) => fail(error),
        };
        let flags = if device { nix::libc::O_DIRECT } else { 0 };
        let file = match File::options().read(true).custom_flags(flags).open(path) {
            Ok(file) => file,
            Err(error) => fail(error),
        };
        let buffer = vec![0; CHUNK + PAGE];
        let start = buffer.as_ptr().align_offset(PAGE);
        Reader { file, buffer, start }
    }

    /// The next chunk; shorter only at the end.
    #[track_caller]
    fn next(&mut self) -> &[u8] {
        let chunk = &mut self.buffer[self.start..self.start + CHUNK];
        let mut filled = 0;
        while filled < CHUNK {
            match self.file.read(&mut chunk[filled..]).expect("read") {
                0 => break,
                n => filled += n,
            }
        }
        &chunk[..filled]
    }
}

/// Compares two devices or files, to the end of both.
#[track_caller]
pub fn compare_devices(left: &Path, right: &Path) -> Result<(), Difference> {
    let (mut left, mut right) = (Reader::open(left), Reader::open(right));
    let mut found = Difference { first_offset: u64::MAX, blocks: 0, block_offsets: Vec::new(), bytes: (0, 0) };
    let mut at = 0u64;
    loop {
        let (a, b) = (left.next(), right.next());
        if a.is_empty() && b.is_empty() {
            break;
        }
        found.bytes.0 += a.len() as u64;
        found.bytes.1 += b.len() as u64;
        if a != b {
            for from in (0..a.len().max(b.len())).step_by(BLOCK) {
                let part = |side: &[u8]| side.get(from..side.len().min(from + BLOCK)).unwrap_or(&[]).to_vec();
                let (x, y) = (part(a), part(b));
                if x == y {
                    continue;
                }
                let same = x.iter().zip(&y).take_while(|(p, q)| p == q).count();
                found.first_offset = found.first_offset.min(at + (from + same) as u64);
                found.blocks += 1;
                if found.block_offsets.len() < 16 {
                    found.block_offsets.push(at + from as u64);
                }
            }
        }
        at += CHUNK as u64;
    }
    if found.blocks == 0 { Ok(()) } else { Err(found) }
}

/// Panics with what differs unless both hold the same bytes.
#[track_caller]
pub fn assert_same(left: &Path, right: &Path) {
    if let Err(difference) = compare_devices(left, right) {
        panic!("{} and {} are not equal: {difference}", left.display(), right.display());
    }
}

/// SHA-256 of a device or file, by `sha256sum`, read from the medium.
#[track_caller]
pub fn digest_device(path: &Path) -> String {
    let mut reader = Reader::open(path);
    let mut sum = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sha256sum");
    let mut pipe = sum.stdin.take().unwrap();
    loop {
        let chunk = reader.next();
        if chunk.is_empty() {
            break;
        }
        pipe.write_all(chunk).unwrap();
    }
    drop(pipe);
    let out = sum.wait_with_output().unwrap();
    String::from_utf8(out.stdout).unwrap().split(' ').next().unwrap().to_owned()
}
