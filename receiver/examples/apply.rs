//! What applying costs without network and landing: records per second and CPU time per 10^6 bytes.
//!
//! `cargo run --release -p varve-receiver --example apply -- [DIRECTORY]`

#![allow(clippy::unwrap_used, reason = "an example that measures")]

use rand::{Rng, RngCore, SeedableRng};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use varve_io::DirectFile;
use varve_io::cpu::process_cpu_time;
use varve_receiver::apply::plan::{BatchPlan, Piece, Source, Stamp};
use varve_receiver::apply::replica::{Replica, Replicas};

const VOLUME_BYTES: u64 = 4 << 30;
const BATCH_BYTES: usize = 16 << 20;

fn main() {
    let dir = std::env::args().nth(1).map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let path = dir.join(format!("varve-apply-{}.img", std::process::id()));
    let file = DirectFile::create_new(&path, VOLUME_BYTES, 0o600).unwrap();
    let mut replicas = Replicas::new(vec![Replica::new(file, VOLUME_BYTES)]).unwrap();
    let mut rng = rand::rngs::StdRng::seed_from_u64(1);
    let mut buffer = vec![0; BATCH_BYTES + (1 << 20)];
    rng.fill_bytes(&mut buffer);
    println!("{:>10} {:>12} {:>12} {:>14} {:>14}", "record", "records/s", "MB/s", "CPU us/MB", "of it planning");
    fill(&mut replicas, &buffer);
    for (bytes, aligned, batches) in [(4096, true, 40), (4096, true, 40), (256 << 10, true, 60), (3000, false, 4)] {
        run(&mut replicas, &buffer, &mut rng, bytes, aligned, batches);
    }
    std::fs::remove_file(&path).unwrap();
}

/// Written once, so that the measured writes find their blocks.
fn fill(replicas: &mut Replicas, buffer: &[u8]) {
    for start in (0..VOLUME_BYTES).step_by(BATCH_BYTES) {
        let source = Some(Source { buffer: 0, offset: 0 });
        let piece = Piece { volume: 0, start, end: start + BATCH_BYTES as u64, source };
        replicas.apply(&[piece], &[buffer]).unwrap();
    }
    replicas.sync().unwrap();
}

fn run(replicas: &mut Replicas, buffer: &[u8], rng: &mut impl Rng, bytes: u64, aligned: bool, batches: usize) {
    let mut plan = BatchPlan::new();
    let per_batch = BATCH_BYTES as u64 / bytes;
    let (mut planning, start, cpu) = (Duration::ZERO, Instant::now(), process_cpu_time());
    for _ in 0..batches {
        let begin = process_cpu_time();
        plan.clear();
        for number in 0..per_batch {
            let unit = if aligned { bytes } else { 8 };
            let at = rng.random_range(0..(VOLUME_BYTES - bytes) / unit) * unit;
            // As in a stream: payloads behind headers, at multiples of eight.
            let source = Some(Source { buffer: 0, offset: (number * bytes) as u32 & !7 });
            plan.push(Piece { volume: 0, start: at, end: at + bytes, source }, Stamp::default());
        }
        let pieces = plan.resolve();
        planning += process_cpu_time() - begin;
        replicas.apply(pieces, &[buffer]).unwrap();
        replicas.sync().unwrap();
    }
    let (took, cpu) = (start.elapsed().as_secs_f64(), process_cpu_time() - cpu);
    let records = per_batch as f64 * batches as f64;
    let megabytes = records * bytes as f64 / 1e6;
    println!(
        "{bytes:>10} {:>12.0} {:>12.0} {:>14.0} {:>14.0}",
        records / took,
        megabytes / took,
        cpu.as_secs_f64() * 1e6 / megabytes,
        planning.as_secs_f64() * 1e6 / megabytes
    );
}
