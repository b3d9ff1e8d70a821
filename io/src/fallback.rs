//! Batches without io_uring, for hosts where it is switched off: the same requests by a few threads.
//!
//! Threads are started per batch. That is slower than a pool, and simpler: it is the exception, the
//! daemon says so in its log, and a batch of the receiver takes milliseconds.

use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::direct::DirectFile;
use crate::error::IoError;

/// The most threads of one batch: beyond it a disk gains little and the host pays for stacks.
const THREADS_MAX: usize = 16;

pub(crate) fn write_batch(files: &[&DirectFile], writes: &[(usize, u64, &[u8])], depth: usize) -> Result<(), IoError> {
    spread(writes.iter(), depth, |&(file, offset, bytes)| files[file].write_all_at(bytes, offset))
}

pub(crate) fn read_batch(
    files: &[&DirectFile],
    reads: &mut [(usize, u64, &mut [u8])],
    depth: usize,
) -> Result<(), IoError> {
    spread(reads.iter_mut(), depth, |(file, offset, buf)| files[*file].read_exact_at(buf, *offset))
}

/// Does every item, several at a time; stops taking new ones after the first error and gives that.
fn spread<T: Send>(
    items: impl ExactSizeIterator<Item = T> + Send,
    depth: usize,
    work: impl Fn(T) -> Result<(), IoError> + Sync,
) -> Result<(), IoError> {
    let threads = items.len().min(depth).min(THREADS_MAX);
    let state = Mutex::new((items, None));
    let lock = || state.lock().unwrap_or_else(PoisonError::into_inner);
    let worker = || loop {
        let item = {
            let mut state = lock();
            if state.1.is_some() { None } else { state.0.next() }
        };
        let Some(item) = item else { return };
        if let Err(error) = work(item) {
            lock().1.get_or_insert(error);
        }
    };
    thread::scope(|scope| {
        // This thread is one of them, so it works even where no other can be started.
        for _ in 1..threads {
            if thread::Builder::new().spawn_scoped(scope, worker).is_err() {
                break;
            }
        }
        worker();
    });
    let (_, error) = state.into_inner().unwrap_or_else(PoisonError::into_inner);
    error.map_or(Ok(()), Err)
}
