//! What the agent must remember over restarts: one JSON file per group, written atomically.

use crate::seal::Seal;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use varve_common::problem::Problem;
use varve_io::blockdev::Identity;
use varve_io::crashsafe;

/// Version of the file. A file of another version is refused by name.
const VERSION: u32 = 1;
const MODE: u32 = 0o600;

/// A group as it was protected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupFile {
    /// [`VERSION`].
    pub version: u32,
    /// The group's name.
    pub name: String,
    /// Paths of the volumes as the operator gave them, in the order of their numbers.
    pub volumes: Vec<String>,
    /// Their sizes when they were protected.
    pub bytes: Vec<u64>,
    /// What identifies the volumes beyond their paths: none or one for each. None: it was protected by an agent that did not ask.
    #[serde(default)]
    pub identities: Vec<Identity>,
    /// Replica paths as the operator gave them; none or one per volume.
    pub replicas: Vec<String>,
    /// Whether the replica was complete at least once.
    pub synced_once: bool,
    /// The epoch under which this host writes.
    #[serde(default = "first_epoch")]
    pub epoch: u64,
    /// What the volumes hold is being overwritten by the receiver: nothing is captured.
    #[serde(default)]
    pub returning: bool,
    /// The proof of the last step of that, if it was begun: 32 hex digits. The newest one that the receiver gave; whether it
    /// gave the group back with it is known there.
    #[serde(default)]
    pub armed: Option<String>,
    /// Its volumes were refused in a state in which they may change unseen, or had lost a part: that capture went on meanwhile
    /// proves nothing. The next start begins anew and compares.
    #[serde(default)]
    pub compare: bool,
}

/// What must be remembered of who may write to a group, in a file of its own: it changes at other times than what the group is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authority {
    /// [`VERSION`].
    #[serde(default)]
    pub version: u32,
    /// Its volumes were made quiet for a planned switch-over (RFC 3339).
    #[serde(default)]
    pub quiet_since: Option<String>,
    /// The receiver said that this host may not write.
    #[serde(default)]
    pub fenced: Option<Fence>,
}

/// See [`Authority::fenced`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// The epoch under which this host wrote.
    pub epoch: u64,
    /// When it was said first (RFC 3339).
    pub since: String,
    /// What the receiver said.
    pub text: String,
    /// What it said to do.
    pub next: String,
}

fn first_epoch() -> u64 {
    1
}

/// A group's name and what its file says.
pub type Loaded = (String, Result<GroupFile, Problem>);

impl GroupFile {
    /// A new group.
    pub fn new(name: String, volumes: Vec<String>, bytes: Vec<u64>, replicas: Vec<String>) -> Self {
        Self {
            version: VERSION,
            name,
            volumes,
            bytes,
            identities: Vec::new(),
            replicas,
            synced_once: false,
            epoch: first_epoch(),
            returning: false,
            armed: None,
            compare: false,
        }
    }

    /// See [`GroupFile::armed`]; zeroes: none.
    pub fn token(&self) -> [u8; 16] {
        self.armed.as_ref().and_then(|text| u128::from_str_radix(text, 16).ok()).unwrap_or(0).to_be_bytes()
    }

    /// See [`GroupFile::armed`].
    pub fn set_token(&mut self, token: [u8; 16]) {
        self.armed = Some(format!("{:032x}", u128::from_be_bytes(token)));
    }
}

/// The directory of group files.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    authority: PathBuf,
    seals: PathBuf,
}

impl Store {
    /// Opens (and makes) the directory below `state_dir`.
    pub fn open(state_dir: &Path) -> Result<Self, Problem> {
        let dir = state_dir.join("groups");
        crashsafe::create_dir_all_durable(&dir).map_err(|e| cannot("make", &dir, e))?;
        crashsafe::remove_temporaries(&dir).map_err(|e| cannot("clean", &dir, e))?;
        let authority = state_dir.join("authority");
        crashsafe::create_dir_all_durable(&authority).map_err(|e| cannot("make", &authority, e))?;
        crashsafe::remove_temporaries(&authority).map_err(|e| cannot("clean", &authority, e))?;
        let seals = state_dir.join("seals");
        crashsafe::create_dir_all_durable(&seals).map_err(|e| cannot("make", &seals, e))?;
        crashsafe::remove_temporaries(&seals).map_err(|e| cannot("clean", &seals, e))?;
        Ok(Self { dir, authority, seals })
    }

    fn authority_path(&self, name: &str) -> PathBuf {
        self.authority.join(format!("{name}.json"))
    }

    /// What is remembered of who may write to these groups. A file that is not understood counts as a fence: who does not
    /// know does not write.
    pub fn load_authorities(&self, names: &[String]) -> Vec<(String, Authority)> {
        let load = |name: &String| {
            let path = self.authority_path(name);
            let text = match std::fs::read(&path) {
                Ok(text) => text,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
                Err(e) => return Some((name.clone(), unsure(&path, &e.to_string()))),
            };
            let file = serde_json::from_slice::<Authority>(&text).map_err(|e| e.to_string());
            let file = file.and_then(|file| match file.version {
                VERSION => Ok(file),
                other => Err(format!("it has version {other}")),
            });
            Some((name.clone(), file.unwrap_or_else(|why| unsure(&path, &why))))
        };
        names.iter().filter_map(load).collect()
    }

    /// Writes what is remembered of a group, durably; nothing to remember is no file.
    pub fn save_authority(&self, name: &str, file: &Authority) -> Result<(), Problem> {
        let path = self.authority_path(name);
        if file.quiet_since.is_none() && file.fenced.is_none() {
            return crashsafe::remove_durable(&path).map_err(|e| cannot("remove", &path, e));
        }
        let file = Authority { version: VERSION, ..file.clone() };
        let text = serde_json::to_vec_pretty(&file).unwrap_or_default();
        crashsafe::write_atomic(&path, &text, MODE).map_err(|e| cannot("write", &path, e))
    }

    fn seal_path(&self, name: &str) -> PathBuf {
        self.seals.join(format!("{name}.json"))
    }

    /// Writes a group's seal, durably.
    pub fn save_seal(&self, name: &str, seal: &Seal) -> Result<(), Problem> {
        let (path, text) = (self.seal_path(name), serde_json::to_vec_pretty(seal).unwrap_or_default());
        crashsafe::write_atomic(&path, &text, MODE).map_err(|e| cannot("write", &path, e))
    }

    /// Breaks a group's seal: what it says counts once. One that cannot be taken away is none, nor is one that is not understood.
    pub fn take_seal(&self, name: &str) -> Option<Seal> {
        let path = self.seal_path(name);
        let text = std::fs::read(&path).ok()?;
        if let Err(error) = crashsafe::remove_durable(&path) {
            tracing::warn!(group = %name, "its seal is not used: {}", error.chain());
            return None;
        }
        serde_json::from_slice(&text).ok()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.json"))
    }

    /// All groups with their names, in their order. A file that is not understood is a problem of its own, not of the
    /// others.
    pub fn load(&self) -> Result<Vec<Loaded>, Problem> {
        let entries = std::fs::read_dir(&self.dir)
            .map_err(|e| cannot("read", &self.dir, varve_io::IoError::new("read", &self.dir, e)))?;
        let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
        paths.sort();
        let name = |path: &Path| path.file_stem().map_or(String::new(), |name| name.to_string_lossy().into_owned());
        Ok(paths.iter().map(|path| (name(path), read(path))).collect())
    }

    /// Writes a group's file, durably.
    pub fn save(&self, file: &GroupFile) -> Result<(), Problem> {
        let path = self.path(&file.name);
        let text = serde_json::to_vec_pretty(file).map_err(|e| {
            Problem::failed(format!("{} cannot be written", path.display()), e.to_string(), "report this as a defect")
        })?;
        crashsafe::write_atomic(&path, &text, MODE).map_err(|e| cannot("write", &path, e))
    }

    /// Removes a group's file, durably.
    pub fn remove(&self, name: &str) -> Result<(), Problem> {
        // First what would be nobody's.
        self.save_authority(name, &Authority::default())?;
        let seal = self.seal_path(name);
        crashsafe::remove_durable(&seal).map_err(|e| cannot("remove", &seal, e))?;
        let path = self.path(name);
        crashsafe::remove_durable(&path).map_err(|e| cannot("remove", &path, e))
    }
}

fn unsure(path: &Path, why: &str) -> Authority {
    let text = format!("{} is not understood ({why}): whether this host may write is not known", path.display());
    tracing::error!("{text}");
    let next = "see 'varve status' on the recovery host; the receiver's word decides at the next session".to_owned();
    Authority { fenced: Some(Fence { epoch: 0, since: String::new(), text, next }), ..Authority::default() }
}

fn cannot(verb: &str, path: &Path, error: varve_io::IoError) -> Problem {
    let next = if error.is_no_space() {
        "free space on that file system"
    } else {
        "check the file system and its permissions"
    };
    Problem::failed(format!("cannot {verb} {}", path.display()), error.chain(), next)
}

fn read(path: &Path) -> Result<GroupFile, Problem> {
    let damaged = |why: String| {
        Problem::failed(
            format!("{} is not understood", path.display()),
            why,
            "restore the file, or remove it and protect the group again",
        )
    };
    let text = std::fs::read(path).map_err(|e| damaged(e.to_string()))?;
    let file: GroupFile = serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
    if file.version != VERSION {
        return Err(damaged(format!("it has version {}, this agent knows version {VERSION}", file.version)));
    }
    let named = path.file_stem().is_some_and(|stem| stem == file.name.as_str());
    let whole = file.volumes.len() == file.bytes.len() && !file.volumes.is_empty();
    let whole = whole && (file.identities.is_empty() || file.identities.len() == file.volumes.len());
    if !named || !whole || !(file.replicas.is_empty() || file.replicas.len() == file.volumes.len()) {
        return Err(damaged("its parts contradict each other".to_owned()));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_damage() {
        let dir = tempfile::tempdir().expect("temp dir");
        let store = Store::open(dir.path()).expect("empty directory");
        let file = GroupFile::new("db".into(), vec!["/dev/vdb".into()], vec![1 << 30], vec![]);
        store.save(&file).expect("save");
        assert_eq!(store.load().expect("list"), [("db".to_owned(), Ok(file.clone()))]);
        let mut text: serde_json::Value = serde_json::to_value(&file).expect("JSON");
        text.as_object_mut().expect("an object").remove("identities").expect("it has them");
        std::fs::write(store.path("db"), text.to_string()).expect("write");
        assert_eq!(store.load().expect("list"), [("db".to_owned(), Ok(file))], "an agent's before there were any");
        std::fs::write(store.path("bad"), b"{\"version\": 7}").expect("write");
        let loaded = store.load().expect("list");
        assert!(
            loaded[0].0 == "bad" && loaded[0].1.is_err() && loaded[1].1.is_ok(),
            "one bad file does not hide the others: {loaded:?}"
        );
        store.remove("db").expect("remove");
        assert_eq!(store.load().expect("list").len(), 1);
    }
}
