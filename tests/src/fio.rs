//! Loads by fio.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Child, Scratch};

/// One fio job, by default 4 KiB random writes with O_DIRECT and libaio.
#[derive(Debug, Clone)]
pub struct Fio {
    args: Vec<String>,
}

/// What a job reached.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FioResult {
    /// Writes a second.
    pub write_iops: f64,
    /// Bytes written a second.
    pub write_bytes_per_s: f64,
    /// Writes finished.
    pub writes: u64,
    /// Median of the time from submission to completion.
    pub write_p50: Duration,
    /// 99th percentile of it.
    pub write_p99: Duration,
    /// Reads a second.
    pub read_iops: f64,
    /// Reads finished.
    pub reads: u64,
    /// Errors that the job went on after (see [`Fio::ignore_errors`]).
    pub errors: u64,
    /// The errno that ended the job early, or 0.
    pub fatal_errno: u64,
}

impl Fio {
    /// A job on a device or file.
    pub fn new(target: &Path) -> Self {
        // Overlapping writes that are under way together have no order: neither a disk nor a replica owes one.
        Self::each_block_once(target).option("norandommap=1").option("serialize_overlap=1")
    }

    /// A job that ends when it has come to every block, none of them twice.
    pub fn each_block_once(target: &Path) -> Self {
        let args = [
            "--name=job",
            "--ioengine=libaio",
            "--direct=1",
            "--rw=randwrite",
            "--bs=4k",
            "--group_reporting",
            "--output-format=json",
            "--refill_buffers=1",
        ];
        let mut args: Vec<String> = args.map(String::from).into();
        args.push(format!("--filename={}", target.display()));
        Fio { args }
    }

    /// Any option of fio, `key=value`; a later one wins.
    pub fn option(mut self, option: &str) -> Self {
        self.args.push(format!("--{option}"));
        self
    }

    /// Block size: `4k`, or a range such as `512-4m`.
    pub fn block(self, size: &str) -> Self {
        if size.contains('-') { self.option(&format!("bsrange={size}")) } else { self.option(&format!("bs={size}")) }
    }

    /// Requests in flight.
    pub fn depth(self, depth: u32) -> Self {
        self.option(&format!("iodepth={depth}"))
    }

    /// Ends after this time, however far it came.
    pub fn seconds(self, seconds: u64) -> Self {
        self.option("time_based=1").option(&format!("runtime={seconds}"))
    }

    /// At most this many bytes a second.
    pub fn rate(self, bytes_per_s: u64) -> Self {
        self.option(&format!("rate={bytes_per_s}"))
    }

    /// Offsets and contents follow from this number.
    pub fn seed(self, seed: u64) -> Self {
        self.option(&format!("randseed={seed}"))
    }

    /// Runs to the end; panics with fio's words if it fails.
    #[track_caller]
    pub fn run(&self, scratch: &Scratch) -> FioResult {
        self.start(scratch).finish()
    }

    /// Goes on after writes that fail for want of space or by the medium.
    pub fn ignore_errors(self) -> Self {
        self.option("continue_on_error=all").option("ignore_error=,ENOSPC:EIO")
    }

    /// As [`Fio::run`] for a job whose writes are expected to fail.
    #[track_caller]
    pub fn run_failing(&self, scratch: &Scratch) -> FioResult {
        self.start(scratch).collect(&[0, 1])
    }

    /// As [`Fio::run_failing`], with what fio complains of.
    #[track_caller]
    pub fn run_with_words(&self, scratch: &Scratch) -> (FioResult, String) {
        let mut run = self.start(scratch);
        (run.collect(&[0, 1]), run.child.log())
    }

    /// Starts it in the background.
    #[track_caller]
    pub fn start(&self, scratch: &Scratch) -> FioRun {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let result = scratch.join(&format!("fio-{number}.json"));
        let log = scratch.join(&format!("fio-{number}.log"));
        let mut args = self.args.clone();
        args.push(format!("--output={}", result.display()));
        let child = Child::start("fio", &args, &log, |command| {
            // fio leaves a state file in its working directory when it is interrupted.
            command.current_dir(scratch.path());
        });
        FioRun { child, result }
    }
}

/// A job in the background; `Drop` kills it.
#[derive(Debug)]
pub struct FioRun {
    child: Child,
    result: PathBuf,
}

impl FioRun {
    /// Still running?
    pub fn running(&mut self) -> bool {
        self.child.exit_code().is_none()
    }

    /// Stands still meanwhile.
    pub fn held<T>(&mut self, inside: impl FnOnce() -> T) -> T {
        self.child.signal(nix::sys::signal::Signal::SIGSTOP);
        let done = inside();
        self.child.signal(nix::sys::signal::Signal::SIGCONT);
        done
    }

    /// Asks it to end early and returns what it reached: every write that it counts has completed.
    #[track_caller]
    pub fn stop(mut self) -> FioResult {
        self.child.signal(nix::sys::signal::Signal::SIGINT);
        // 128: ended by a signal, which is what was asked for.
        self.collect(&[0, 128])
    }

    /// Waits for its end.
    #[track_caller]
    pub fn finish(mut self) -> FioResult {
        self.collect(&[0])
    }

    #[track_caller]
    fn collect(&mut self, codes: &[i32]) -> FioResult {
        let code = self.child.wait(Duration::from_secs(600)).expect("fio ran for more than ten minutes");
        let text = std::fs::read_to_string(&self.result).unwrap_or_default();
        assert!(codes.contains(&code), "fio: exit code {code}\n{text}\n{}", self.child.log());
        // Words of warning may stand before the JSON.
        let json = text.find('{').map_or("", |at| &text[at..]);
        let all: serde_json::Value =
            serde_json::from_str(json).unwrap_or_else(|error| panic!("fio's output ({error}): {text}"));
        let job = &all["jobs"][0];
        let (write, read) = (&job["write"], &job["read"]);
        let percentile = |name: &str| Duration::from_nanos(write["clat_ns"]["percentile"][name].as_u64().unwrap_or(0));
        FioResult {
            write_iops: write["iops"].as_f64().unwrap(),
            write_bytes_per_s: write["bw_bytes"].as_f64().unwrap(),
            writes: write["total_ios"].as_u64().unwrap(),
            write_p50: percentile("50.000000"),
            write_p99: percentile("99.000000"),
            read_iops: read["iops"].as_f64().unwrap(),
            reads: read["total_ios"].as_u64().unwrap(),
            errors: job["total_err"].as_u64().unwrap_or(0),
            fatal_errno: job["error"].as_u64().unwrap_or(0),
        }
    }
}
