//! The proof that nobody wrote to a group's volumes between a clean stop of the agent and the next begin of its capture. With it
//! nothing has to be compared after a clean reboot.
//!
//! A seal says where the stream ended and what the volumes looked like then. It is pressed when the agent is told to stop, only
//! if everything that was captured is durable or in the journal, and used once, when capture has begun again:
//!
//! | somebody may have written | seen by |
//! |---|---|
//! | while the volumes were looked at, or still | nothing is mounted, held or swapped on; the ring, which must not have moved |
//! | after the stop, through a file system, in this boot or another one, here or elsewhere | the file system's marks ([`varve_io::blockdev::marks`]) |
//! | between this boot (or the stop in the same one) and the begin of capture, through the block layer | the kernel's count of writes to the device, and to the disk around its partitions |
//! | and is not done yet | the count of requests in flight; those that complete later are seen by capture |
//!
//! Not seen: a write to the bare device, beside its file system, between the agent's stop and the end of that boot or in another
//! system, that leaves the superblock as it was; a command that was sent past the block layer before capture began. A volume
//! without such marks is compared.

use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};
use varve_common::wire::messages::Incarnation;
use varve_io::AlignedBuf;
use varve_io::blockdev::{Writes, in_use, marks};
use varve_io::direct::DirectFile;

/// Version of the file. One of another version proves nothing.
const VERSION: u32 = 1;
/// The unit in which a volume is read: every device's sector is a part of it.
const UNIT_BYTES: usize = 64 << 10;
/// How long somebody who reads a volume (udev does) may do so.
const IDLE_LIMIT: Duration = Duration::from_secs(2);
/// How long one look may hold up a start.
const LOOK_LIMIT: Duration = Duration::from_secs(3);
/// Between two looks at it.
const IDLE_LOOK: Duration = Duration::from_millis(20);

/// See the module's text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    version: u32,
    /// The kernel's name for the boot.
    boot: String,
    /// The ring, and where it ended.
    incarnation: String,
    end: u64,
    volumes: Vec<Sealed>,
    /// Why there is no proof.
    #[serde(default)]
    refused: Option<String>,
}

/// One volume as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Sealed {
    bytes: u64,
    /// The file system and its marks.
    marks: String,
    disk_sequence: u64,
    /// Writes that the kernel counted.
    written: u64,
    /// Writes to the disk around a partition.
    beside: u64,
}

/// How long a start may be held up by looks at volumes, over all groups: somebody waits for it with his mounts.
pub struct Patience(Mutex<Duration>);

impl Patience {
    /// So long.
    pub fn new(limit: Duration) -> Self {
        Self(Mutex::new(limit))
    }

    /// Has something done with what is left; what it takes is gone.
    fn spend<T>(&self, what: impl FnOnce(Duration) -> T) -> T {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let began = Instant::now();
        let outcome = what(*left);
        *left = left.saturating_sub(began.elapsed());
        outcome
    }
}

impl Seal {
    /// Looks at volumes (path and size) to which nobody may have written since the ring ended at `end`: that is asked after this.
    ///
    /// # Errors
    /// Why there is no proof.
    pub fn press(volumes: &[(String, u64)], incarnation: Incarnation, end: u64) -> Result<Self, String> {
        for (path, _) in volumes {
            if let Some(user) = in_use(path) {
                return Err(format!("{path} was in use: {user}"));
            }
            // What somebody left in the page cache is in the stream when it has gone out.
            let file = DirectFile::open_read(path).and_then(|file| file.write_back());
            file.map_err(|error| error.chain())?;
        }
        let volumes = look_at(volumes)?;
        Ok(Self { version: VERSION, boot: boot()?, incarnation: name(incarnation), end, volumes, refused: None })
    }

    /// A word for the next start, which has to compare.
    pub fn refused(why: String) -> Self {
        let (boot, incarnation) = (String::new(), String::new());
        Self { version: VERSION, boot, incarnation, end: 0, volumes: Vec::new(), refused: Some(why) }
    }

    /// Where the stream ended.
    pub fn end(&self) -> (Incarnation, u64) {
        let incarnation = u128::from_str_radix(&self.incarnation, 16).unwrap_or(0);
        (incarnation.to_be_bytes(), self.end)
    }

    /// Whether the volumes are as they were. To be asked when capture has begun: who writes later is in the stream. Nothing is
    /// claimed for it: at this time of a boot somebody may be about to mount them.
    ///
    /// # Errors
    /// Why there is no proof.
    fn holds(&self, volumes: &[(String, u64)]) -> Result<(), String> {
        if let Some(why) = &self.refused {
            return Err(format!("when the agent stopped, {why}"));
        }
        if self.version != VERSION || self.end().0 == [0; 16] {
            return Err("another version of the agent stopped".to_owned());
        }
        let now = look_at(volumes)?;
        self.compare(&boot()?, volumes, &now)
    }

    /// The same, as long as there is patience: volumes that do not answer hold nothing up.
    ///
    /// # Errors
    /// Why there is no proof.
    pub fn holds_within(&self, volumes: &[(String, u64)], patience: &Patience) -> Result<(), String> {
        let (seal, volumes, (answer, answered)) = (self.clone(), volumes.to_vec(), mpsc::channel());
        // Whoever asked may have gone.
        let look = move || drop(answer.send(seal.holds(&volumes)));
        let thread = std::thread::Builder::new().name("seal".to_owned()).spawn(look);
        thread.map_err(|error| format!("a thread cannot be started: {error}"))?;
        let answer = patience.spend(|left| answered.recv_timeout(left.min(LOOK_LIMIT)));
        answer.unwrap_or_else(|_| Err("its volumes did not answer in time".to_owned()))
    }

    fn compare(&self, boot: &str, volumes: &[(String, u64)], now: &[Sealed]) -> Result<(), String> {
        if volumes.len() != self.volumes.len() || now.len() != self.volumes.len() {
            return Err("the group had other volumes".to_owned());
        }
        for (((path, _), then), now) in volumes.iter().zip(&self.volumes).zip(now) {
            let same_boot = boot == self.boot;
            if now.bytes != then.bytes {
                return Err(format!("{path} has another size"));
            }
            if same_boot && now.disk_sequence != then.disk_sequence {
                return Err(format!("{path} is another disk"));
            }
            let (before, beside) = if same_boot { (then.written, then.beside) } else { (0, 0) };
            if now.beside != beside {
                return Err(format!("the disk of {path} was written to around its partitions before capture began"));
            }
            if now.written != before {
                let count = now.written.wrapping_sub(before);
                return Err(format!("{path} was written to before capture began ({count} writes)"));
            }
            if now.marks != then.marks {
                return Err(format!("the file system on {path} was mounted or mended since"));
            }
        }
        Ok(())
    }
}

fn name(incarnation: Incarnation) -> String {
    format!("{:032x}", u128::from_be_bytes(incarnation))
}

fn boot() -> Result<String, String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).map_err(|error| format!("{path} cannot be read: {error}"))?;
    Ok(text.trim().to_owned())
}

fn look_at(volumes: &[(String, u64)]) -> Result<Vec<Sealed>, String> {
    volumes.iter().map(|(path, bytes)| Sealed::of(Path::new(path), *bytes)).collect()
}

impl Sealed {
    fn of(path: &Path, bytes: u64) -> Result<Self, String> {
        let shown = path.display();
        let before = idle(path)?;
        let file = DirectFile::open_read(path).map_err(|error| error.chain())?;
        if file.len() != bytes {
            return Err(format!("{shown} has another size"));
        }
        let (mut unit, mut holds) = (AlignedBuf::new(UNIT_BYTES), None);
        let found = marks(bytes, |offset, out| read(&file, &mut unit, &mut holds, offset, out));
        let found = found.map_err(|why| format!("{shown}: {why}"))?;
        if idle(path)? != before {
            return Err(format!("{shown} was written to while it was looked at"));
        }
        let digest = blake3::Hash::from(found.digest).to_hex();
        let Writes { disk_sequence, completed: written, beside, .. } = before;
        Ok(Self { bytes, marks: format!("{} {digest}", found.kind), disk_sequence, written, beside })
    }
}

/// The count of writes when no request is under way.
fn idle(path: &Path) -> Result<Writes, String> {
    let until = Instant::now() + IDLE_LIMIT;
    loop {
        let writes = Writes::of(path).map_err(|error| error.chain())?;
        let writes =
            writes.ok_or_else(|| format!("the kernel does not count what is written to {}", path.display()))?;
        if writes.in_flight == 0 {
            return Ok(writes);
        }
        if Instant::now() >= until {
            return Err(format!("{} is busy", path.display()));
        }
        std::thread::sleep(IDLE_LOOK);
    }
}

/// Fills `out`, wherever it begins. `holds`: where the unit that was read last begins.
fn read(
    file: &DirectFile,
    unit: &mut AlignedBuf,
    holds: &mut Option<u64>,
    mut offset: u64,
    mut out: &mut [u8],
) -> std::io::Result<()> {
    while !out.is_empty() {
        let begin = offset - offset % UNIT_BYTES as u64;
        let len = (file.len() - begin).min(UNIT_BYTES as u64) as usize;
        if holds.take_if(|held| *held == begin).is_none() {
            file.read_exact_at(&mut unit[..len], begin).map_err(|error| std::io::Error::other(error.chain()))?;
        }
        *holds = Some(begin);
        let skip = (offset - begin) as usize;
        let part = out.len().min(len.saturating_sub(skip));
        if part == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let (now, later) = out.split_at_mut(part);
        now.copy_from_slice(&unit[skip..skip + part]);
        (offset, out) = (offset + part as u64, later);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed() -> Sealed {
        Sealed { bytes: 4096, marks: "ext4 1".to_owned(), disk_sequence: 7, written: 30, beside: 2 }
    }

    #[test]
    fn what_breaks_a_seal() {
        let seal = Seal {
            version: VERSION,
            boot: "a".to_owned(),
            incarnation: name([1; 16]),
            end: 64,
            volumes: vec![sealed()],
            refused: None,
        };
        assert_eq!(seal.end(), ([1; 16], 64));
        let volumes = [("/dev/vdb".to_owned(), 4096)];
        let holds = |boot: &str, change: &dyn Fn(&mut Sealed)| {
            let mut now = sealed();
            change(&mut now);
            seal.compare(boot, &volumes, &[now]).is_ok()
        };
        let booted = |now: &mut Sealed| (now.disk_sequence, now.written, now.beside) = (3, 0, 0);
        assert!(holds("a", &|_| ()) && holds("b", &booted));
        assert!(!holds("b", &|_| ()), "written to since the boot");
        assert!(!holds("a", &booted), "another disk under its name");
        assert!(!holds("a", &|now| now.written += 1));
        assert!(!holds("a", &|now| now.written = 0), "it cannot become less");
        for boot in ["a", "b"] {
            let change = |more: fn(&mut Sealed)| {
                holds(boot, &move |now| {
                    if boot == "b" {
                        booted(now);
                    }
                    more(now);
                })
            };
            assert!(change(|_| ()));
            assert!(!change(|now| now.marks.push('2')) && !change(|now| now.bytes += 512));
            assert!(!change(|now| now.written += 1) && !change(|now| now.beside += 1));
        }
        assert!(seal.compare("a", &volumes, &[]).is_err() && seal.compare("a", &[], &[sealed()]).is_err());
    }

    /// On a file: it cannot be claimed as a device is, so it has no seal.
    #[test]
    fn what_is_no_device_has_none() {
        let file = tempfile::NamedTempFile::new().expect("temp file");
        let path = file.path().display().to_string();
        assert!(Seal::press(&[(path, 0)], [1; 16], 0).is_err());
    }
}
