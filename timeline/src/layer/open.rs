//! The newest layer of a group: chunks are appended to it.

use super::walk::{Manner, Walk};
use super::{
    Chunk, ChunkInfo, FIRST_CHUNK, LAYER_FILE_BYTES_MAX, LayerFile, Recovered, chunk, file, path_of, temporary_path_of,
};
use crate::error::HistoryError;
use crate::limits::{LAYER_BYTES, LAYER_RECORDS};
use std::io;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};
use std::time::SystemTime;
use varve_common::format::BLOCK_BYTES;
use varve_common::format::layer::{ChunkHeader, LayerHeader};
use varve_io::{AlignedBuf, DirectFile, IoError, crashsafe, sparse};

/// Space is reserved ahead in steps as long as the layer is already, within these bounds: an append then neither meets a
/// full disk nor waits for the file system to find room.
const STEP_BYTES_MIN: u64 = 1 << 20;
const STEP_BYTES_MAX: u64 = 64 << 20;

/// See the module's text. One owner writes; readers ([`OpenLayer::reader`]) may be many.
#[derive(Debug)]
pub struct OpenLayer {
    file: Arc<DirectFile>,
    header: LayerHeader,
    /// Behind the last whole chunk. Shared with the readers.
    end: Arc<AtomicU64>,
    /// `header_crc` of the last chunk.
    chain: u32,
    chunks: Vec<ChunkInfo>,
    records: usize,
    complete_to: u64,
    last_time_ns: u64,
    /// Behind the end may be what is left of an append that was torn.
    remains: bool,
    /// An append failed: what is on disk behind the end is not known.
    failed: bool,
    /// See [`OpenLayer::append_behind`].
    behind: Option<Behind>,
}

/// An append that is on its way to the disk, or was.
#[derive(Debug)]
struct Behind {
    header: ChunkHeader,
    writing: Writing,
}

#[derive(Debug)]
enum Writing {
    /// By a thread, which gives the memory back.
    Thread(Option<JoinHandle<Option<Written>>>),
    /// There could be no thread.
    Done(Result<(), IoError>),
}

type Written = (AlignedBuf, Result<(), IoError>);

impl Drop for Writing {
    /// Nobody may open a layer anew that is still being written. How it ended is found then.
    fn drop(&mut self) {
        if let Self::Thread(thread) = self {
            thread.take().map(JoinHandle::join);
        }
    }
}

impl OpenLayer {
    /// Makes layer `number` in `dir`; its name is durable on return. All changes with a stamp up to `first_height` are in
    /// earlier layers, no point before `time_ns` is in it.
    ///
    /// # Errors
    /// If it exists, or the disk refuses: then it does not exist.
    pub fn create(
        dir: &Path,
        group: [u8; 16],
        number: u32,
        first_height: u64,
        time_ns: u64,
    ) -> Result<Self, HistoryError> {
        let (path, temporary) = (path_of(dir, number), temporary_path_of(dir, number));
        if path.exists() {
            return Err(IoError::new("create", &path, io::Error::from(io::ErrorKind::AlreadyExists)).into());
        }
        crashsafe::remove_durable(&temporary)?;
        let header = LayerHeader::new(group, number, first_height, time_ns);
        // Under another name until the header is durable: a layer without one is always damage.
        let made = begin(&temporary, &header).and_then(|()| {
            std::fs::rename(&temporary, &path).map_err(|e| IoError::new("rename a new layer to", &path, e))?;
            crashsafe::fsync_dir(dir)
        });
        if let Err(error) = made {
            // Best effort: the first error is the one to report.
            let _ = std::fs::remove_file(&temporary);
            return Err(error.into());
        }
        let file = Arc::new(DirectFile::open_rw(&path)?);
        Ok(Self {
            file,
            header,
            end: Arc::new(AtomicU64::new(FIRST_CHUNK)),
            chain: header.crc.get(),
            chunks: Vec::new(),
            records: 0,
            complete_to: first_height,
            last_time_ns: time_ns,
            remains: false,
            failed: false,
            behind: None,
        })
    }

    /// Opens the layer that was open when the receiver ended, and finds its end. Damage in the middle is told of and does not
    /// end it: what follows is still there. A tear and a last chunk that rotted look alike: only who knows what was once
    /// complete (the applied mark) can tell them apart by [`Recovered::complete_to`].
    ///
    /// # Errors
    /// If it is missing, not a layer of this group with this number, or the device cannot read all of what is needed.
    /// [`LayerFile::load`] then still gives what is readable.
    pub fn open(dir: &Path, group: [u8; 16], number: u32) -> Result<(Self, Recovered), HistoryError> {
        let path = path_of(dir, number);
        let file = DirectFile::open_rw(&path).map_err(|e| file::missing(&path, e))?;
        // What an append left whose sync failed, or was killed, can be read here: it counts from here on.
        file.sync_data()?;
        let header = file::read_header(&file, &group, number)?;
        let end = file.len().min(LAYER_FILE_BYTES_MAX);
        let walk = Walk::new(&file, &header, end, Manner::Open);
        let (found, walk) = walk.collect(header.time_ns.get())?;
        let (end, chain) = (walk.at(), walk.last_crc());
        let layer = Self {
            file: Arc::new(file),
            header,
            end: Arc::new(AtomicU64::new(end)),
            chain,
            chunks: found.chunks.clone(),
            records: found.entries.len(),
            complete_to: found.complete_to,
            last_time_ns: found.last_time_ns,
            remains: found.torn,
            failed: false,
            behind: None,
        };
        Ok((layer, found))
    }

    /// Writes `chunk` behind the last one: one write, durable on return. With it, all changes with a stamp up to
    /// `complete_to` are in the layer or in earlier ones. Its entries are [`Chunk::entries`] at the offset that is given.
    ///
    /// # Errors
    /// If the layer is full, or the chunk does not begin where the layer is complete to, or there is no room: nothing has
    /// changed then. If the write fails, nothing is appended any more: the layer must be opened anew, which finds
    /// out what of it is there.
    pub fn append(&mut self, chunk: &mut Chunk, complete_to: u64) -> Result<ChunkInfo, HistoryError> {
        let header = self.seal(chunk, complete_to)?;
        let written = self.file.write_all_at_durable(chunk.sealed(&header), self.bytes());
        self.written(&header, written)
    }

    /// As [`OpenLayer::append`], while the caller goes on: nothing of it is durable, or counts, before [`OpenLayer::settle`], which
    /// must come before anything else is done to the layer. The chunk gets `spare` for its memory, or new.
    ///
    /// # Errors
    /// As for [`OpenLayer::append`]; that the write failed is said by [`OpenLayer::settle`].
    pub fn append_behind(
        &mut self,
        chunk: &mut Chunk,
        complete_to: u64,
        spare: Option<AlignedBuf>,
    ) -> Result<ChunkInfo, HistoryError> {
        let header = self.seal(chunk, complete_to)?;
        let (info, file) = (ChunkInfo::new(&header), self.file.clone());
        let (give, take) = sync_channel::<AlignedBuf>(1);
        let bytes = chunk.sealed(&header).len();
        let work = move || {
            let memory = take.recv().ok()?;
            let written = file.write_all_at_durable(&memory[..bytes], info.offset);
            Some((memory, written))
        };
        let writing = match Builder::new().name("history".to_owned()).spawn(work) {
            Ok(thread) => {
                // It takes nothing else, so it is there; if it has died, settling says so.
                let _ = give.send(chunk.exchange(spare));
                Writing::Thread(Some(thread))
            }
            Err(error) => {
                tracing::debug!(%error, "no thread: the layer is written without");
                Writing::Done(self.file.write_all_at_durable(chunk.sealed(&header), info.offset))
            }
        };
        self.behind = Some(Behind { header, writing });
        Ok(info)
    }

    /// Waits for what [`OpenLayer::append_behind`] began: on return it is durable and counts. Gives memory to use again.
    ///
    /// # Errors
    /// If the write failed: see [`OpenLayer::append`].
    pub fn settle(&mut self) -> Result<Option<AlignedBuf>, HistoryError> {
        let Some(Behind { header, mut writing }) = self.behind.take() else { return Ok(None) };
        let (memory, written) = match &mut writing {
            Writing::Thread(thread) => match thread.take().map(JoinHandle::join) {
                Some(Ok(Some((memory, written)))) => (Some(memory), written),
                Some(Err(panic)) => resume_unwind(panic),
                Some(Ok(None)) | None => (None, Err(self.refused("nothing was given to be appended"))),
            },
            Writing::Done(written) => (None, std::mem::replace(written, Ok(()))),
        };
        self.written(&header, written)?;
        Ok(memory)
    }

    fn refused(&self, why: &'static str) -> IoError {
        IoError::new("append to", self.file.path(), io::Error::other(why))
    }

    /// Puts the chunk together for its place behind the last one, where there is room then.
    fn seal(&mut self, chunk: &mut Chunk, complete_to: u64) -> Result<ChunkHeader, HistoryError> {
        if self.failed {
            return Err(self.refused("an append failed before: the layer has to be opened anew").into());
        }
        if self.behind.is_some() {
            return Err(self.refused("the append before is still on its way").into());
        }
        if self.is_full() {
            return Err(HistoryError::Limit { what: "a layer", limit: LAYER_BYTES });
        }
        let first = chunk.first_height();
        if first != self.complete_to || complete_to < first {
            let (found, after) = (first.min(complete_to), self.complete_to);
            return Err(HistoryError::Order { what: "the chunk's height", found, after });
        }
        let (layer, offset) = (self.number(), self.bytes());
        if self.remains {
            // Only now, so that a caller that finds too little here can still leave it as it is. A new chunk alone would
            // do, but might be shorter, and what is behind it should not have to be told from a chunk.
            self.file.set_len(offset)?;
            self.file.sync_data()?;
            self.remains = false;
        }
        let place = chunk::Place {
            group: &self.header.group,
            layer,
            offset,
            previous_crc: self.chain,
            complete_to,
            last_time_ns: self.last_time_ns,
        };
        let header = chunk.seal(&place);
        reserve(&self.file, offset + header.total_bytes())?;
        Ok(header)
    }

    /// The write behind the end has ended.
    fn written(&mut self, header: &ChunkHeader, written: Result<(), IoError>) -> Result<ChunkInfo, HistoryError> {
        if let Err(error) = written {
            self.failed = true;
            return Err(error.into());
        }
        let info = ChunkInfo::new(header);
        self.chain = header.header_crc.get();
        self.records += info.records as usize;
        self.complete_to = info.complete_to;
        self.last_time_ns = self.last_time_ns.max(info.last_time_ns);
        self.chunks.push(info);
        self.end.store(info.end(), Ordering::Release);
        Ok(info)
    }

    /// Whether it is time for the next layer.
    pub fn is_full(&self) -> bool {
        self.bytes() >= LAYER_BYTES || self.records >= LAYER_RECORDS
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.header.number.get()
    }

    /// Its bytes so far, without what is only reserved.
    pub fn bytes(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Its records so far.
    pub fn records(&self) -> usize {
        self.records
    }

    /// Its chunks so far.
    pub fn chunks(&self) -> &[ChunkInfo] {
        &self.chunks
    }

    /// All changes with a stamp up to this one are in it or in earlier layers.
    pub fn complete_to(&self) -> u64 {
        self.complete_to
    }

    /// Time of the newest point; that of the layer's begin if there is none.
    pub fn last_time_ns(&self) -> u64 {
        self.last_time_ns
    }

    /// For reading what is in it, also what is appended later.
    pub fn reader(&self) -> LayerFile {
        LayerFile::of_open(Arc::clone(&self.file), self.header, Arc::clone(&self.end))
    }

    /// Gives back the space that was only reserved. Nothing is appended any more; the file's length is the layer's. `came`: when,
    /// by the clock here, its newest point did: the file is dated so, for it may be closed long after.
    ///
    /// # Errors
    /// If an append failed, or the disk refuses.
    pub fn close(self, came: SystemTime) -> Result<LayerFile, HistoryError> {
        if self.failed || self.behind.is_some() {
            let why = "an append failed, or was not waited for: the layer has to be opened anew";
            return Err(IoError::new("close", self.file.path(), io::Error::other(why)).into());
        }
        let (end, shorter) = (self.bytes(), self.file.len() != self.bytes());
        if shorter {
            self.file.set_len(end)?;
        }
        // Best effort: with a later date, a time between is found as the source showed it.
        let _ = self.file.set_modified(came);
        if shorter {
            self.file.sync_data()?;
        }
        Ok(self.reader())
    }
}

fn begin(path: &Path, header: &LayerHeader) -> Result<(), IoError> {
    let file = DirectFile::create_new(path, FIRST_CHUNK, 0o600)?;
    let mut block = AlignedBuf::new(BLOCK_BYTES);
    block.copy_from_slice(&header.encode());
    file.write_all_at_durable(&block, 0)?;
    file.sync_data()
}

/// Makes the file at least `bytes` long, with room on the disk, and some more if there is.
fn reserve(file: &DirectFile, bytes: u64) -> Result<(), IoError> {
    let have = file.len();
    if bytes <= have {
        return Ok(());
    }
    let step = have.clamp(STEP_BYTES_MIN, STEP_BYTES_MAX);
    let ahead = (have + step).next_multiple_of(STEP_BYTES_MIN).min(LAYER_FILE_BYTES_MAX).max(bytes);
    match lengthen(file, ahead) {
        // The last bytes of a disk are still good for what has to be written now.
        Err(e) if e.is_no_space() && ahead > bytes => lengthen(file, bytes),
        other => other,
    }
}

fn lengthen(file: &DirectFile, bytes: u64) -> Result<(), IoError> {
    let have = file.len();
    file.set_len(bytes)?;
    match sparse::preallocate(file, have, bytes - have) {
        // A file system without it.
        Err(e) if e.kind() == io::ErrorKind::Unsupported => {}
        Err(e) => {
            // Best effort: a hole behind the end does no harm, only the space is not certain.
            let _ = file.set_len(have);
            return Err(e);
        }
        Ok(()) => {}
    }
    // Once for many appends: their own sync then has nothing but data to write.
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Address;
    use crate::layer::Before;

    /// A write that failed may be on the disk, in part or whole: nothing may be put behind it as if it were not.
    #[test]
    fn after_a_failed_append_nothing_is_appended() {
        let dir = tempfile::tempdir().expect("directory");
        let mut layer = OpenLayer::create(dir.path(), [1; 16], 1, 0, 5).expect("create");
        let mut chunk = Chunk::new();
        chunk.begin(0);
        chunk.push(Address::new(0, 8), 8, Before::Bytes(&[7; 512])).expect("push");
        layer.append(&mut chunk, 8).expect("append");

        let good =
            std::mem::replace(&mut layer.file, Arc::new(DirectFile::open_read(path_of(dir.path(), 1)).expect("open")));
        chunk.begin(8);
        chunk.point(16, 9).expect("point");
        let error = layer.append(&mut chunk, 16).expect_err("not writable");
        assert!(matches!(error, HistoryError::Io(_)), "{error:?}");
        layer.file = good;
        let error = layer.append(&mut chunk, 16).expect_err("poisoned");
        assert!(error.to_string().contains("opened anew"), "{error}");
        assert_eq!((layer.complete_to(), layer.chunks().len()), (8, 1));
        assert!(layer.close(SystemTime::now()).is_err());

        let (mut layer, found) = OpenLayer::open(dir.path(), [1; 16], 1).expect("open");
        assert_eq!((found.complete_to, found.torn), (8, false));
        layer.append(&mut chunk, 16).expect("append");
    }

    /// By a thread: what comes before it is waited for is refused, and that it failed is said then.
    #[test]
    fn an_append_behind_that_fails_is_told_of() {
        let dir = tempfile::tempdir().expect("directory");
        let mut layer = OpenLayer::create(dir.path(), [1; 16], 1, 0, 5).expect("create");
        let mut chunk = Chunk::new();
        let mut behind = |layer: &mut OpenLayer, height: u64| {
            chunk.begin(height);
            chunk.push(Address::new(0, 8), height + 8, Before::Bytes(&[7; 512])).expect("push");
            layer.append_behind(&mut chunk, height + 8, None).map(drop)
        };
        behind(&mut layer, 0).expect("begin");
        let error = behind(&mut layer, 8).expect_err("one at a time");
        assert!(error.to_string().contains("on its way"), "{error}");
        assert_eq!((layer.complete_to(), layer.chunks().len()), (0, 0));
        assert!(layer.settle().expect("settle").is_some(), "the memory comes back");
        assert_eq!((layer.complete_to(), layer.chunks().len()), (8, 1));
        assert!(layer.settle().expect("settle").is_none());

        let read_only = DirectFile::open_read(path_of(dir.path(), 1)).expect("open");
        let good = std::mem::replace(&mut layer.file, Arc::new(read_only));
        behind(&mut layer, 8).expect("begin");
        assert!(matches!(layer.settle().expect_err("not writable"), HistoryError::Io(_)));
        layer.file = good;
        let error = behind(&mut layer, 8).expect_err("poisoned");
        assert!(error.to_string().contains("opened anew"), "{error}");
        assert_eq!((layer.complete_to(), layer.chunks().len()), (8, 1));
    }

    /// A full disk is not a failed append: with room again, it goes on. Needs root for the small file system.
    #[test]
    fn a_full_disk_changes_nothing() {
        let dir = tempfile::tempdir().expect("directory");
        let mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs"];
        if !run(&mount, dir.path()) {
            eprintln!("skipped: no file system can be mounted here");
            return;
        }
        let _mounted = Mounted(dir.path());
        let ballast = dir.path().join("ballast");
        std::fs::write(&ballast, vec![1; 4 << 20]).expect("write");
        let mut layer = OpenLayer::create(dir.path(), [1; 16], 1, 0, 5).expect("create");
        let mut chunk = Chunk::new();
        let mut append = |layer: &mut OpenLayer| {
            let height = layer.complete_to();
            chunk.begin(height);
            for sector in (0..1024).step_by(128) {
                let noise = crate::layer::tests::noise(sector, 65536);
                chunk.push(Address::new(0, sector), height + 1, Before::Bytes(&noise)).expect("push");
            }
            layer.append(&mut chunk, height + 8).map(|_| ())
        };
        let error = (0..100).find_map(|_| append(&mut layer).err()).expect("full");
        assert!(matches!(&error, HistoryError::Io(e) if e.is_no_space()), "{error}");
        let (bytes, chunks) = (layer.bytes(), layer.chunks().len());
        assert!(chunks > 20, "the last bytes were used as well: {chunks}");
        std::fs::remove_file(&ballast).expect("remove");
        append(&mut layer).expect("append");
        assert!(layer.bytes() > bytes);
        drop(layer);
        let (_, found) = OpenLayer::open(dir.path(), [1; 16], 1).expect("open");
        assert_eq!((found.chunks.len(), found.torn), (chunks + 1, false));
    }

    fn run(command: &[&str], path: &Path) -> bool {
        std::process::Command::new(command[0]).args(&command[1..]).arg(path).status().is_ok_and(|done| done.success())
    }

    struct Mounted<'a>(&'a Path);

    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            run(&["umount", "--lazy"], self.0);
        }
    }

    #[test]
    fn a_file_system_without_preallocation_is_recognised() {
        let error = |errno| io::Error::from_raw_os_error(errno).kind();
        // EOPNOTSUPP, ENOSYS
        assert_eq!([error(95), error(38)], [io::ErrorKind::Unsupported; 2]);
    }
}
