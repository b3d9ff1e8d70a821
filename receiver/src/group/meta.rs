//! `group.json`: what a group is. Its presence means that the group exists.

use crate::limits::GROUP_FILE_BYTES_MAX;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::Read;
use std::path::{Path, PathBuf};
use varve_common::control::Retention;
use varve_common::limits::{VOLUME_BYTES_MAX, VOLUMES_PER_GROUP_MAX};
use varve_common::problem::check_name;
use varve_io::{IoError, crashsafe};

/// The version of a file in which nothing newer is in use: receivers from the first one on read it.
const VERSION_FIRST: u32 = 1;
/// Of one with a volume that grew: who does not know of that would give points of before the new size.
const VERSION_GROWN: u32 = 2;
/// The newest that this program knows.
const VERSION_NEWEST: u32 = VERSION_GROWN;
/// Its name in the group's directory.
pub const FILE_NAME: &str = "group.json";

/// What a group is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMeta {
    /// Readable without knowing the rest. The lowest that says all of it, so that an older receiver refuses only what it would
    /// get wrong.
    pub version: u32,
    /// Made at random with the group, so that files of another one are not taken for ours: 32 hex digits.
    id: String,
    /// Its name.
    pub name: String,
    /// The host that writes to it.
    pub owner: String,
    /// Fencing token: an older source is refused.
    pub epoch: u64,
    /// When it was made, nanoseconds since 1970.
    pub created_ns: u64,
    /// In the order of their numbers.
    pub volumes: Vec<VolumeMeta>,
    /// How long history is kept.
    #[serde(default)]
    pub retention: Retention,
    /// The replicas were rolled back: no source may write to them until somebody lets it.
    #[serde(default)]
    pub held: Option<Held>,
    /// The group runs here.
    #[serde(default)]
    pub takeover: Option<Takeover>,
    /// It is to come home.
    #[serde(default)]
    pub failback: Option<Failback>,
    /// It came home.
    #[serde(default)]
    pub home: Option<Home>,
    /// A source of an older epoch is refused. After a failover that was aborted it is older than `epoch`.
    #[serde(default)]
    pub source_epoch_min: u64,
    /// It is a branch.
    #[serde(default)]
    pub branch: Option<Branch>,
}

/// A group that runs here is to come home, to be agreed to by this host's agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failback {
    /// The host; it need not be the one that the group had.
    pub host: String,
    /// When it was asked for here (RFC 3339).
    pub since: String,
    /// What only the old source has is to be kept as this group before it is overwritten.
    #[serde(default)]
    pub keep_branch: Option<String>,
    /// It is: from here on it may be overwritten.
    #[serde(default)]
    pub kept: bool,
}

impl Failback {
    /// Whether it was asked for by the same command.
    pub fn is(&self, other: &Failback) -> bool {
        (&self.host, &self.since) == (&other.host, &other.since)
    }
}

/// The group is what an old source wrote after a split: nobody writes to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    /// The group that it branched off.
    pub of: String,
    /// The host that wrote it.
    pub host: String,
    /// Time of the split (RFC 3339).
    pub split: String,
    /// The stream of the takeover that it was split by.
    pub takeover: String,
    /// Bytes of it, in blocks of 64 KiB.
    pub bytes: u64,
}

/// The group was given back: no writing here from then on. Stays until the next takeover, for an agent that did not hear of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Home {
    /// To whom.
    pub host: String,
    /// Which attempt it was: 32 hex digits. Only the agent has it.
    pub token: String,
    /// The stream that follows: 32 hex digits.
    pub incarnation: String,
    /// Where it begins.
    pub position: u64,
    /// The landing log has its begin.
    pub landed: bool,
}

/// The group was taken over: its volumes are served here, and what is written to them is its stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Takeover {
    /// Of the stream: 32 hex digits.
    pub incarnation: String,
    /// The point that was taken.
    pub height: u64,
    /// Its time at the source, nanoseconds since 1970.
    pub time_ns: u64,
    /// It was not the newest: the replicas are rolled back to it.
    pub rollback: bool,
    /// The newest point before: an abort goes back to it.
    pub before_height: u64,
    /// Its time.
    pub before_time_ns: u64,
    /// The source's stream there: after an abort it goes on where it was. 32 hex digits.
    pub source_incarnation: String,
    /// See above.
    pub source_position: u64,
    /// Whether there was no gap then.
    pub source_consistent: bool,
    /// The epoch that the source had.
    pub source_epoch: u64,
    /// When it was done here (RFC 3339).
    pub since: String,
    /// There is no way back but failback.
    pub committed: bool,
    /// It is being undone.
    #[serde(default)]
    pub aborting: bool,
    /// The source was quiet: it has nothing that is not here.
    #[serde(default)]
    pub planned: bool,
    /// It goes back by itself then, nanoseconds since 1970 by this host's clock, unless it is committed.
    #[serde(default)]
    pub abort_at_ns: Option<u64>,
    /// Hosts whose volumes were begun to be overwritten: what they had for themselves is not whole any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overwritten: Vec<String>,
}

impl Takeover {
    /// The stream that is to be, and the point to which the replicas are to be rolled back at its begin, if they are.
    pub fn target(&self) -> ([u8; 16], Option<(u64, u64)>) {
        match self.aborting {
            true => (unhex(&self.source_incarnation), Some((self.before_height, self.before_time_ns))),
            false => (unhex(&self.incarnation), self.rollback.then_some((self.height, self.time_ns))),
        }
    }
}

/// A stream's incarnation as text.
pub fn hex(incarnation: &[u8; 16]) -> String {
    incarnation.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// From text; zeroes if it is none.
pub fn unhex(text: &str) -> [u8; 16] {
    u128::from_str_radix(text, 16).unwrap_or(0).to_be_bytes()
}

/// A rollback that holds replication.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Time of the point that the replicas went back to (RFC 3339).
    pub to: String,
    /// When it was done here.
    pub since: String,
}

/// One volume and its replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMeta {
    /// Path at the source.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// Where the replica is.
    pub replica: PathBuf,
    /// The sizes that it had before it grew, oldest first.
    #[serde(default)]
    pub grown: Vec<SizeBefore>,
}

/// A size that a volume had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SizeBefore {
    /// The size.
    pub bytes: u64,
    /// The last height at which it had it. No point there can be recovered: a volume grows inside a gap.
    pub until: u64,
}

/// A volume grows so often at most. What is older than the first point of the timeline is forgotten.
pub const GROWTHS_MAX: usize = 64;

impl VolumeMeta {
    /// A volume that has had one size.
    pub fn new(path: impl Into<String>, bytes: u64, replica: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), bytes, replica: replica.into(), grown: Vec::new() }
    }

    /// Its size at a point of the timeline.
    pub fn bytes_at(&self, height: u64) -> u64 {
        self.grown.iter().find(|before| height <= before.until).map_or(self.bytes, |before| before.bytes)
    }

    /// It grew inside the gap that is open at `height`; the timeline begins at `oldest`. Whether there is room to note that.
    pub fn grow(&mut self, bytes: u64, height: u64, oldest: u64) -> bool {
        self.grown.retain(|before| before.until >= oldest);
        if self.grown.len() >= GROWTHS_MAX {
            return false;
        }
        // Of several in one gap the oldest is found first: nobody can ask for the sizes in between.
        self.grown.push(SizeBefore { bytes: self.bytes, until: height });
        self.bytes = bytes;
        true
    }
}

/// Why a `group.json` is not used.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// It cannot be read or written.
    #[error("{}", .0.chain())]
    Io(#[from] IoError),
    /// It is not what it should be.
    #[error("{} is not understood: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl GroupMeta {
    /// A new group.
    pub fn new(name: &str, owner: &str, epoch: u64, created_ns: u64, volumes: Vec<VolumeMeta>) -> Self {
        let id: [u8; 16] = rand::random();
        let id = hex(&id);
        let (name, owner) = (name.to_owned(), owner.to_owned());
        let (version, retention, source_epoch_min) = (VERSION_FIRST, Retention::default(), epoch);
        let (held, takeover, failback, home, branch) = Default::default();
        Self {
            version,
            id,
            name,
            owner,
            epoch,
            created_ns,
            volumes,
            retention,
            held,
            takeover,
            failback,
            home,
            source_epoch_min,
            branch,
        }
    }

    /// The random identity.
    pub fn id(&self) -> [u8; 16] {
        unhex(&self.id)
    }

    /// Sizes of the volumes.
    pub fn volume_bytes(&self) -> Vec<u64> {
        self.volumes.iter().map(|volume| volume.bytes).collect()
    }

    fn version_needed(&self) -> u32 {
        let grown = self.volumes.iter().any(|volume| !volume.grown.is_empty());
        if grown { VERSION_GROWN } else { VERSION_FIRST }
    }

    /// Writes the file of the group in `dir`; durable on return.
    pub fn save(&self, dir: &Path) -> Result<(), MetaError> {
        let path = dir.join(FILE_NAME);
        let damaged = |e: serde_json::Error| MetaError::Damaged { path: path.clone(), why: e.to_string() };
        let written = Self { version: self.version_needed(), ..self.clone() };
        let text = serde_json::to_vec_pretty(&written).map_err(damaged)?;
        Ok(crashsafe::write_atomic(&path, &text, 0o600)?)
    }

    /// Reads the file of the group in `dir`; `None` if there is none.
    pub fn load(dir: &Path) -> Result<Option<Self>, MetaError> {
        let path = dir.join(FILE_NAME);
        let file = match std::fs::File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(IoError::new("open", &path, e).into()),
        };
        let mut text = String::new();
        file.take(GROUP_FILE_BYTES_MAX).read_to_string(&mut text).map_err(|e| IoError::new("read", &path, e))?;
        let damaged = |why: String| MetaError::Damaged { path: path.clone(), why };
        let read: Value = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
        let known = u64::from(VERSION_FIRST)..=u64::from(VERSION_NEWEST);
        if let Some(other) = read["version"].as_u64().filter(|version| !known.contains(version)) {
            return Err(damaged(format!("it has version {other}, this program knows versions up to {VERSION_NEWEST}")));
        }
        let meta: Self = serde_json::from_value(read.clone()).map_err(|e| damaged(e.to_string()))?;
        // A field that is passed over may be the one that says who writes, or what a point looks like.
        let again = serde_json::to_value(&meta).map_err(|e| damaged(e.to_string()))?;
        if let Some(field) = unknown_field(&read, &again) {
            return Err(damaged(format!("it says '{field}', which this version of Varve does not know")));
        }
        match meta.objection(dir) {
            Some(why) => Err(damaged(why)),
            None => Ok(Some(meta)),
        }
    }

    fn objection(&self, dir: &Path) -> Option<String> {
        let named = dir.file_name().is_some_and(|name| name == self.name.as_str());
        let id_ok = self.id.len() == 32 && self.id.bytes().all(|b| b.is_ascii_hexdigit());
        let sizes = self.volumes.iter().all(|volume| {
            let all = volume.grown.iter().map(|before| before.bytes).chain([volume.bytes]);
            let until = volume.grown.iter().map(|before| before.until);
            all.clone().all(|bytes| (1..=VOLUME_BYTES_MAX).contains(&bytes)) && all.is_sorted() && until.is_sorted()
        });
        let count = (1..=VOLUMES_PER_GROUP_MAX).contains(&self.volumes.len());
        if check_name("group", &self.name).is_err() || !named {
            return Some(format!("its name is '{}'", self.name.escape_debug()));
        }
        (!(id_ok && sizes && count)).then(|| "its identity or its volumes are impossible".to_owned())
    }
}

/// The first field of `read` that is not in `known`, with the way to it.
fn unknown_field(read: &Value, known: &Value) -> Option<String> {
    let below = |name: &str, read: &Value, known: &Value| {
        unknown_field(read, known).map(|rest| if rest.is_empty() { name.to_owned() } else { format!("{name}.{rest}") })
    };
    match (read, known) {
        (Value::Object(read), Value::Object(known)) => read.iter().find_map(|(name, value)| match known.get(name) {
            Some(known) => below(name, value, known),
            None => Some(name.clone()),
        }),
        (Value::Array(read), Value::Array(known)) => {
            let mut both = read.iter().zip(known).enumerate();
            both.find_map(|(number, (read, known))| below(&number.to_string(), read, known))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_has_the_size_of_its_time() {
        let mut volume = VolumeMeta::new("/dev/vdb", 8, "/r.img");
        assert!(volume.grow(12, 100, 0) && volume.grow(14, 100, 0) && volume.grow(20, 300, 0));
        let sizes = [0, 100, 101, 300, 301].map(|height| volume.bytes_at(height));
        assert_eq!(sizes, [8, 8, 14, 14, 20]);
        assert!(volume.grow(30, 400, 101));
        assert_eq!(volume.grown.len(), 2, "what cannot be asked for is forgotten");
        assert_eq!([101, 301, 401].map(|height| volume.bytes_at(height)), [14, 20, 30]);
        let mut many = VolumeMeta::new("/dev/vdb", 8, "/r.img");
        let grown = (1..=65u64).filter(|n| many.grow(8 + n, 10 * n, 0)).count();
        assert_eq!((grown, many.bytes), (GROWTHS_MAX, 8 + 64));
    }

    #[test]
    fn round_trip_and_refusals() {
        let base = tempfile::tempdir().expect("directory");
        let dir = base.path().join("db");
        std::fs::create_dir(&dir).expect("group's directory");
        assert!(GroupMeta::load(&dir).expect("nothing there").is_none());
        let volume = VolumeMeta::new("/dev/vdb", 1 << 20, "/r.img");
        let meta = GroupMeta::new("db", "production", 3, 7, vec![volume]);
        meta.save(&dir).expect("save");
        assert_eq!(GroupMeta::load(&dir).expect("load"), Some(meta.clone()));
        assert_ne!(meta.id(), [0; 16]);
        let text = std::fs::read_to_string(dir.join(FILE_NAME)).expect("text");
        for (from, to, word) in [
            ("\"version\": 1", "\"version\": 9", "version 9"),
            ("\"db\"", "\"other\"", "name"),
            ("1048576", "0", "volumes"),
            ("{", "", "expected"),
            ("\"epoch\"", "\"quorum\": 2, \"epoch\"", "'quorum'"),
            ("\"grown\"", "\"shrunk\": [], \"grown\"", "'volumes.0.shrunk'"),
            ("\"age_seconds\"", "\"thinned\": 3, \"age_seconds\"", "'retention.thinned'"),
        ] {
            std::fs::write(dir.join(FILE_NAME), text.replacen(from, to, 1)).expect("damage");
            let error = GroupMeta::load(&dir).expect_err(word).to_string();
            assert!(error.contains(FILE_NAME), "{error}");
            assert!(word == "expected" || error.contains(word), "{error}");
        }
    }

    /// A receiver of before volumes could grow reads version 1 and passes over what it does not know: it has to refuse a file in
    /// which one did, and only that.
    #[test]
    fn an_older_receiver_refuses_what_it_would_get_wrong() {
        let base = tempfile::tempdir().expect("directory");
        let dir = base.path().join("db");
        std::fs::create_dir(&dir).expect("group's directory");
        let mut meta = GroupMeta::new("db", "production", 3, 7, vec![VolumeMeta::new("/dev/vdb", 8, "/r.img")]);
        let version = |meta: &GroupMeta| {
            meta.save(&dir).expect("save");
            let read = GroupMeta::load(&dir).expect("load").expect("there");
            assert_eq!(GroupMeta { version: meta.version, ..read.clone() }, *meta);
            read.version
        };
        assert_eq!(version(&meta), 1);
        assert!(meta.volumes[0].grow(12, 100, 0));
        assert_eq!(version(&meta), 2);
        // What has expired is not said any more.
        meta.volumes[0].grown.clear();
        assert_eq!(version(&meta), 1);
    }
}
