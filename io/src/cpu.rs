//! CPU time and resident memory of this process: for status and benches, and how much of it is kept.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use nix::unistd::{SysconfVar, sysconf};

use crate::{IoError, sys};

/// Buffers from this size on go back to the kernel when they are freed.
const WHOLE_BYTES: i32 = 1 << 20;
/// Of smaller ones the heap keeps this much.
const HEAP_KEPT_BYTES: i32 = 4 << 20;

/// Has memory given back when it is freed; to be said before threads are started. By itself glibc learns from the first
/// large buffer that is freed to keep such buffers, and thirty groups' journals stay in memory (measured: 560 MiB, else 90).
pub fn free_gives_back() {
    sys::set_heap_limits(WHOLE_BYTES, HEAP_KEPT_BYTES);
}

/// Says that this thread, and those it starts from here on, serve block devices: when memory is short the kernel must not wait for
/// such a device to give them some, or both wait for ever.
///
/// # Errors
/// Without CAP_SYS_RESOURCE.
pub fn serve_block_devices() -> Result<(), IoError> {
    sys::set_io_flusher().map_err(|e| IoError::new("set PR_SET_IO_FLUSHER of", "this process", e))
}

fn clock(id: ClockId) -> Duration {
    // Fails only for a clock that does not exist; these two always do.
    clock_gettime(id).map(Duration::from).unwrap_or_default()
}

/// CPU time that the calling thread has used, user and system together.
pub fn thread_cpu_time() -> Duration {
    clock(ClockId::CLOCK_THREAD_CPUTIME_ID)
}

/// CPU time that all threads of this process have used, user and system together.
pub fn process_cpu_time() -> Duration {
    clock(ClockId::CLOCK_PROCESS_CPUTIME_ID)
}

/// Resident memory of this process in bytes, shared pages included.
///
/// # Errors
/// If `/proc/self/statm` cannot be read.
pub fn process_rss_bytes() -> Result<u64, IoError> {
    statm().map(|(resident, _)| resident)
}

/// Resident memory of this process in bytes without shared pages: neither the programs' text nor the kernel's rings,
/// which are mapped twice and belong to the kernel.
///
/// # Errors
/// If `/proc/self/statm` cannot be read.
pub fn process_own_bytes() -> Result<u64, IoError> {
    statm().map(|(resident, shared)| resident.saturating_sub(shared))
}

/// Resident and shared bytes.
fn statm() -> Result<(u64, u64), IoError> {
    let path = "/proc/self/statm";
    let text = std::fs::read_to_string(path).map_err(|e| IoError::new("read", path, e))?;
    let mut pages = text.split_ascii_whitespace().skip(1).map(|field| field.parse::<u64>().ok());
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|n| u64::try_from(n).ok());
    match (pages.next().flatten(), pages.next().flatten(), page) {
        (Some(resident), Some(shared), Some(page)) => Ok((resident * page, shared * page)),
        _ => Err(IoError::refused("understand", path, std::io::ErrorKind::InvalidData, format!("text is {text:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_costs_time_and_memory_counts() {
        let before = thread_cpu_time();
        while thread_cpu_time() < before + Duration::from_millis(5) {
            std::hint::black_box(0u64);
        }
        assert!(process_cpu_time() >= Duration::from_millis(5));
        let rss = process_rss_bytes().expect("rss");
        let held = std::hint::black_box(vec![1u8; 32 << 20]);
        let more = process_rss_bytes().expect("rss");
        assert!(more >= rss + (30 << 20), "{rss} then {more} while holding {} bytes", held.len());
    }
}
