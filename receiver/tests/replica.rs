//! Replicas against a model: any pieces, any alignment, files with odd tails and devices that are larger than the volume.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

mod support;

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::path::{Path, PathBuf};
use std::process::Command;
use support::{assert_equal, seed};
use varve_io::DirectFile;
use varve_receiver::apply::plan::{BatchPlan, Piece, Source, Stamp};
use varve_receiver::apply::replica::{Replica, Replicas};

/// Random batches on these files; `volumes` are the parts of them that are ours.
fn exercise(paths: &[PathBuf], volumes: &[u64], rng: &mut StdRng) {
    let mut model: Vec<Vec<u8>> = paths.iter().map(|path| support::file(path)).collect();
    let open = |(path, bytes): (&PathBuf, &u64)| Replica::new(DirectFile::open_rw(path).unwrap(), *bytes);
    let mut replicas = Replicas::new(paths.iter().zip(volumes).map(open).collect()).unwrap();
    let mut plan = BatchPlan::new();
    for _ in 0..40 {
        plan.clear();
        let mut buffer = vec![0; 8 << 20];
        rng.fill_bytes(&mut buffer[..1 << 20]);
        let mut used = 0;
        for _ in 0..rng.random_range(1..60) {
            let volume = rng.random_range(0..volumes.len());
            let unit = [1, 8, 512, 4096][rng.random_range(0..4)];
            let most = [3, 40, 300][rng.random_range(0..3)];
            let size = volumes[volume];
            let length = (rng.random_range(1..=most) * unit).min(size);
            let mut start = rng.random_range(0..=(size - length) / unit) * unit;
            if rng.random_range(0..8) == 0 {
                start = size - length;
            }
            let zero = rng.random_range(0..5) == 0;
            if used + length as usize > buffer.len() {
                break;
            }
            let source = (!zero).then_some(Source { buffer: 0, offset: used as u32 });
            let range = start as usize..(start + length) as usize;
            match zero {
                true => model[volume][range].fill(0),
                false => model[volume][range].copy_from_slice(&buffer[used..used + length as usize]),
            }
            used += length as usize;
            plan.push(Piece { volume: volume as u16, start, end: start + length, source }, Stamp::default());
        }
        replicas.apply(plan.resolve(), &[&buffer]).unwrap();
        replicas.sync().unwrap();
    }
    for (path, model) in paths.iter().zip(&model) {
        assert_equal(&support::file(path), model, &path.display().to_string());
    }
}

fn filled(dir: &Path, name: &str, bytes: u64) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, vec![0xd5; bytes as usize]).unwrap();
    path
}

#[test]
fn files_with_and_without_a_tail() {
    let mut rng = StdRng::seed_from_u64(seed());
    for base in ["/var/tmp", "/dev/shm"] {
        let dir = tempfile::tempdir_in(base).unwrap();
        let sizes = [3 << 20, (1 << 20) + 512, 700, 4096 + 3584];
        let paths: Vec<PathBuf> =
            sizes.iter().enumerate().map(|(number, bytes)| filled(dir.path(), &number.to_string(), *bytes)).collect();
        exercise(&paths, &sizes, &mut rng);
    }
}

/// One batch larger than the stage, at every offset within a block: runs that are cut in the middle.
#[test]
fn long_runs_at_odd_offsets() {
    let mut rng = StdRng::seed_from_u64(seed());
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let bytes = (24 << 20) + 1536;
    let path = filled(dir.path(), "long", bytes);
    let mut buffer = vec![0; 20 << 20];
    rng.fill_bytes(&mut buffer);
    let mut replicas = Replicas::new(vec![Replica::new(DirectFile::open_rw(&path).unwrap(), bytes)]).unwrap();
    let mut plan = BatchPlan::new();
    let mut model = support::file(&path);
    let (mut at, mut used) = (513, 0);
    while used + (1 << 20) < buffer.len() {
        let length = rng.random_range(1..1 << 20);
        model[at..at + length].copy_from_slice(&buffer[used..used + length]);
        let source = Some(Source { buffer: 0, offset: used as u32 });
        plan.push(Piece { volume: 0, start: at as u64, end: (at + length) as u64, source }, Stamp::default());
        at += length + [0, 0, 0, 1, 100, 5000][rng.random_range(0..6)];
        used += length;
    }
    replicas.apply(plan.resolve(), &[&buffer]).unwrap();
    replicas.sync().unwrap();
    assert_equal(&support::file(&path), &model, "long runs");
}

struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path, sector: &str) -> Self {
        let out =
            Command::new("losetup").args(["--find", "--show", "--sector-size", sector]).arg(file).output().unwrap();
        assert!(out.status.success(), "root is needed: {out:?}");
        Self(PathBuf::from(String::from_utf8(out.stdout).unwrap().trim()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// What lies behind the volume's end is not ours and stays as it is.
#[test]
fn devices_larger_than_the_volume() {
    let mut rng = StdRng::seed_from_u64(seed());
    for sector in ["512", "4096"] {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let device = Loop::over(&filled(dir.path(), "backing", 4 << 20), sector);
        exercise(std::slice::from_ref(&device.0), &[(3 << 20) + 512], &mut rng);
    }
}
