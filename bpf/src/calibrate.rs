//! From a page to its data: `address = data_base + (page - page_base) * (4096 / sizeof(struct page))`.
//!
//! Where the kernel keeps the two bases is not for programs to know: they are in kallsyms only with KALLSYMS_ALL, and
//! they move with KASLR. So we find them, with reads only: an O_DIRECT read into a page of ours shows the program that
//! page's `struct page`, /proc/self/pagemap says which frame it is, and that gives `page_base`. Then the page gets
//! random bytes, and each candidate for `data_base` is tried by reading there. In the end the result is **proved** on
//! fresh pages through the very function that capture uses: a wrong constant would ship wrong bytes, so nothing is
//! believed.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::Ordering;

use libbpf_rs::{MapCore, MapFlags, MapHandle, ProgramHandle, ProgramMut};
use nix::libc;
use tracing::debug;

use crate::error::{CaptureError, CaptureErrorKind};
use crate::layout::{ConfigEntry, PROBE_BYTES, PROBE_HEAD_BYTES};
use crate::memory::{PAGE_BYTES, Page, Table, run_program};

const GIB: u64 = 1 << 30;
/// Fresh pages that the result must hold for.
const PROOFS: usize = 4;
/// The direct map without KASLR, with four and five levels of page tables.
const DEFAULT_BASES: [u64; 2] = [0xffff_8880_0000_0000, 0xff11_0000_0000_0000];
/// A page may be moved by the kernel between two looks at it; then the attempt is repeated.
const ATTEMPTS: usize = 8;

const HINT: &str = "run `varve doctor`; report this with the kernel's version and configuration: nothing is captured \
                    unless the payload is proved to be read right";

/// What the programs have to say, in the layout of `struct probe`.
struct Answer {
    page: u64,
    slab: u64,
    seen: bool,
    offset: u32,
    error: i32,
    page_size: u32,
    bytes: Vec<u8>,
}

struct Prober<'a> {
    device: File,
    pagemap: File,
    random: File,
    map: &'a MapHandle,
    peek: &'a ProgramHandle,
}

/// Finds the constants, proves them, and leaves them in `config`.
pub(crate) fn calibrate(
    probe: &Path,
    config: &Table<ConfigEntry>,
    map: &MapHandle,
    watch: &ProgramMut<'_>,
    peek: &ProgramHandle,
) -> Result<(), CaptureError> {
    let config = &config[0];
    let open = |path: &Path, flags| {
        File::options().read(true).custom_flags(flags).open(path).map_err(|e| {
            CaptureError::new(
                CaptureErrorKind::Calibration,
                format!("open {} to calibrate", path.display()),
                "name a block device that can be read with O_DIRECT",
            )
            .because(e)
        })
    };
    let prober = Prober {
        device: open(probe, libc::O_DIRECT)?,
        pagemap: open(Path::new("/proc/self/pagemap"), 0)?,
        random: open(Path::new("/dev/urandom"), 0)?,
        map,
        peek,
    };
    let link = watch.attach().map_err(|e| CaptureError::kernel("attach the calibration program", e))?;
    let found = prober.find(config);
    let proved = found.and_then(|()| prober.prove());
    drop(link);
    if proved.is_err() {
        config.ratio.store(0, Ordering::Release);
    }
    proved
}

impl Prober<'_> {
    fn find(&self, config: &ConfigEntry) -> Result<(), CaptureError> {
        for _ in 0..ATTEMPTS {
            let mut page = Page::new();
            let Some((answer, frame)) = self.read_into(&mut page)? else { continue };
            let size = u64::from(self.peek_at(0)?.page_size);
            if size == 0 || !4096u64.is_multiple_of(size) {
                return Err(refused(format!("struct page has {size} bytes")));
            }
            // The segment may name the first page of a larger folio, with an offset into it.
            let first = frame - u64::from(answer.offset / 4096);
            let page_base = answer.page.wrapping_sub(first.wrapping_mul(size));
            self.fill(&mut page)?;
            for base in self.candidates(frame)? {
                let there = self.peek_at(base.wrapping_add(frame << 12))?;
                if there.error == 0 && there.bytes == page.bytes() {
                    debug!("calibrated: page_base {page_base:#x}, data_base {base:#x}, struct page {size} bytes");
                    config.page_base.store(page_base, Ordering::Relaxed);
                    config.data_base.store(base, Ordering::Relaxed);
                    config.ratio.store(4096 / size, Ordering::Release);
                    return Ok(());
                }
            }
            if self.frame(&page)? == frame {
                return Err(refused("no candidate for the base of the direct map fits".into()));
            }
        }
        Err(refused(format!("no stable page in {ATTEMPTS} attempts")))
    }

    /// The real thing: what the capture code reads during a bio must be what the page held.
    fn prove(&self) -> Result<(), CaptureError> {
        let mut pages: Vec<Page> = (0..PROOFS).map(|_| Page::new()).collect();
        for page in &mut pages {
            let mut proved = false;
            for _ in 0..ATTEMPTS {
                self.fill(page)?;
                let written = page.bytes().to_vec();
                let Some((answer, _)) = self.read_into(page)? else { continue };
                if answer.error != 0 || answer.bytes != written {
                    return Err(refused("a page read through the constants found is not what was written".into()));
                }
                proved = true;
                break;
            }
            if !proved {
                return Err(refused(format!("no stable page in {ATTEMPTS} attempts")));
            }
        }
        Ok(())
    }

    /// Reads the device's first page into `page` while the calibration program watches. `None` if the page moved.
    fn read_into(&self, page: &mut Page) -> Result<Option<(Answer, u64)>, CaptureError> {
        let before = self.frame(page)?;
        let mut question = [0; PROBE_BYTES];
        question[24..28].copy_from_slice(&std::process::id().to_ne_bytes());
        self.put(&question)?;
        let read = self.device.read_at(page.bytes_mut(), 0);
        let answer = self.get()?;
        match read {
            Ok(PAGE_BYTES) => {}
            Ok(n) => return Err(refused(format!("the probe device gave only {n} bytes"))),
            Err(e) => return Err(refused("read the probe device".into()).because(e)),
        }
        if !answer.seen {
            return Err(refused("the calibration program did not see the read: is the probe a block device?".into()));
        }
        Ok((before == self.frame(page)?).then_some((answer, before)))
    }

    /// Frame number of the page, from the kernel.
    fn frame(&self, page: &Page) -> Result<u64, CaptureError> {
        let mut entry = [0; 8];
        let at = page.address() as u64 / 4096 * 8;
        self.pagemap.read_exact_at(&mut entry, at).map_err(|e| refused("read /proc/self/pagemap".into()).because(e))?;
        let entry = u64::from_ne_bytes(entry);
        let frame = entry & ((1 << 55) - 1);
        if entry >> 63 == 0 || frame == 0 {
            return Err(CaptureError::new(
                CaptureErrorKind::Permission,
                "/proc/self/pagemap does not show frame numbers",
                "run with CAP_SYS_ADMIN",
            ));
        }
        Ok(frame)
    }

    fn fill(&self, page: &mut Page) -> Result<(), CaptureError> {
        (&self.random).read_exact(page.bytes_mut()).map_err(|e| refused("read /dev/urandom".into()).because(e))
    }

    /// Reads a page of kernel memory at an address that may be anything.
    fn peek_at(&self, address: u64) -> Result<Answer, CaptureError> {
        let mut question = [0; PROBE_BYTES];
        question[16..24].copy_from_slice(&address.to_ne_bytes());
        self.put(&question)?;
        run_program(self.peek).map_err(|e| CaptureError::kernel("run the calibration program", e))?;
        self.get()
    }

    fn candidates(&self, frame: u64) -> Result<Vec<u64>, CaptureError> {
        let mut candidates = Vec::new();
        if let Some(symbol) = kernel_symbol("page_offset_base") {
            let there = self.peek_at(symbol)?;
            if there.error == 0 {
                candidates.push(word(&there.bytes, 0));
            }
        }
        candidates.extend(DEFAULT_BASES);
        // The direct map begins at a multiple of 1 GiB, below any object of a slab, no farther than memory reaches.
        let slab = self.peek_at(0)?.slab;
        let top = slab & !(GIB - 1);
        let span = memory_end().max(frame << 12).div_ceil(GIB) + 1;
        candidates.extend((0..=span).map_while(|i| top.checked_sub(i * GIB)));
        Ok(candidates)
    }

    fn put(&self, question: &[u8; PROBE_BYTES]) -> Result<(), CaptureError> {
        self.map
            .update(&0u32.to_ne_bytes(), question, MapFlags::ANY)
            .map_err(|e| CaptureError::kernel("ask the calibration program", e))
    }

    fn get(&self) -> Result<Answer, CaptureError> {
        let value = self
            .map
            .lookup(&0u32.to_ne_bytes(), MapFlags::ANY)
            .map_err(|e| CaptureError::kernel("hear the calibration program", e))?
            .filter(|value| value.len() == PROBE_BYTES)
            .ok_or_else(|| refused("the calibration program left no answer".into()))?;
        let half = |at| word(&value, at) as u32;
        Ok(Answer {
            page: word(&value, 0),
            slab: word(&value, 8),
            seen: half(28) != 0,
            offset: half(32),
            error: half(40) as i32,
            page_size: (word(&value, 40) >> 32) as u32,
            bytes: value[PROBE_HEAD_BYTES..].to_vec(),
        })
    }
}

fn refused(why: String) -> CaptureError {
    CaptureError::new(CaptureErrorKind::Calibration, "the way from a page to its data could not be proved", HINT)
        .because(why)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(word)
}

/// Address of a data symbol, if the kernel lists it and shows addresses.
fn kernel_symbol(name: &str) -> Option<u64> {
    let symbols = fs::read_to_string("/proc/kallsyms").ok()?;
    let line = symbols.lines().find(|line| line.split(' ').nth(2) == Some(name))?;
    u64::from_str_radix(line.split(' ').next()?, 16).ok().filter(|&address| address != 0)
}

/// Where physical memory ends, as far as /proc/iomem tells.
fn memory_end() -> u64 {
    let read = || -> io::Result<u64> {
        let text = fs::read_to_string("/proc/iomem")?;
        let ends = text.lines().filter(|line| line.ends_with(": System RAM")).filter_map(|line| {
            let range = line.split(" : ").next()?;
            u64::from_str_radix(range.trim().split('-').nth(1)?, 16).ok()
        });
        Ok(ends.max().unwrap_or(0))
    };
    read().unwrap_or(0)
}
