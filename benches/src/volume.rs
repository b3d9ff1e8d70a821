//! Volumes to measure on.

use rand::{RngCore, SeedableRng};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use varve_bpf::VolumeSpec;
use varve_tests::{Fio, LoopDevice, MIB, Scratch, size_bytes};

/// A loop device over a file in memory, filled with random bytes: nothing is sparse, nothing has to be allocated.
pub struct Volume {
    // The order of the fields is the order of their end.
    device: LoopDevice,
    /// In memory; files of the bench may go there, too.
    pub scratch: Scratch,
}

impl Volume {
    /// Of this size.
    #[track_caller]
    pub fn in_memory(bytes: u64) -> Self {
        let scratch = Scratch::memory();
        let path = scratch.file("volume", bytes);
        fill(&File::options().write(true).open(path).unwrap(), bytes, |_| true);
        let device = LoopDevice::over(&scratch.join("volume"), varve_tests::LoopOptions::default());
        Volume { device, scratch }
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        self.device.path()
    }
}

/// A fio job on a device, without fresh contents for each write. One process, so that it dies with this one.
pub fn fio(device: &Path) -> Fio {
    let options = ["thread=1", "refill_buffers=0", "randrepeat=0", "serialize_overlap=1"];
    options.iter().fold(Fio::new(device), |job, option| job.option(option))
}

/// Writes a second of 4 KiB at random on a file, while so many percent of all requests are reads: what a disk gives to whoever
/// has to read before he writes.
pub fn writes_beside_reads(file: &Path, percent: u32, depth: u32, time: Duration, scratch: &Scratch) -> f64 {
    let job = fio(file).depth(depth).option("rw=randrw").option(&format!("rwmixread={percent}"));
    job.option("time_based=1").option(&format!("runtime={}ms", time.as_millis())).run(scratch).write_iops
}

/// Writes a second of 4 KiB at random on a file, until as many bytes are written in sequence to another one beside it and synced
/// every 2 MiB: what a disk gives to whoever keeps what he replaces, and knows it without reading.
pub fn writes_beside_log(file: &Path, log: &Path, writes: u64, depth: u32, scratch: &Scratch) -> f64 {
    let size = format!("io_size={}", writes * 4096);
    let in_sequence = fio(log).block("1m").depth(2).option("rw=write").option("fdatasync=2").option(&size);
    let beside = in_sequence.start(scratch);
    let at_random = fio(file).depth(depth).option(&size).run(scratch).write_iops;
    at_random.min(beside.finish().write_bytes_per_s / 4096.0)
}

/// Writes random bytes, MiB by MiB, where `wanted` says so.
pub fn fill(file: &File, bytes: u64, wanted: impl Fn(u64) -> bool) {
    let mut random = rand::rngs::StdRng::seed_from_u64(rand::random());
    let mut buffer = vec![0; MIB as usize];
    for mib in (0..bytes / MIB).filter(|mib| wanted(*mib)) {
        random.fill_bytes(&mut buffer);
        file.write_all_at(&buffer, mib * MIB).unwrap();
    }
}

/// The whole of a device, as the capture programs want it.
#[track_caller]
pub fn whole(device: &Path) -> VolumeSpec {
    let number = std::fs::metadata(device).unwrap().rdev();
    let disk = (nix::sys::stat::major(number) as u32, nix::sys::stat::minor(number) as u32);
    let name = device.file_name().unwrap().to_string_lossy().into_owned();
    let request_based = Path::new("/sys/block").join(name).join("mq").exists();
    VolumeSpec { disk, start_bytes: 0, bytes: size_bytes(device), request_based }
}

/// Bytes that have been written to a device since it was made.
#[track_caller]
pub fn written_bytes(device: &Path) -> u64 {
    let name = device.file_name().unwrap().to_string_lossy().into_owned();
    let text = std::fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
    text.split_whitespace().nth(6).unwrap().parse::<u64>().unwrap() * 512
}
