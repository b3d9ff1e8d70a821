//! The receiver's registry: who was invited, who is enrolled, who was revoked.
//!
//! One JSON file, replaced atomically at each change, and the change is durable before anyone is told. It is read by
//! the TLS verifier at every handshake, so a revocation counts from the next handshake on. No clock of its own.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::TryRngCore;
use serde::{Deserialize, Serialize};

use crate::durable::{MODE_SECRET, read_bounded, write_atomic};
use crate::error::{Error, ErrorKind, Result};
use crate::token::SECRET_BYTES;

/// Longest name of a host.
pub const HOST_NAME_BYTES_MAX: usize = 64;
/// Hosts in the registry, revoked ones included (the oldest revoked give way).
pub const HOSTS_MAX: usize = 4096;
/// Invitations in the registry, used and expired ones included (the oldest of these give way).
pub const INVITES_MAX: usize = 4096;
/// Longest time that an invitation may stay open.
pub const INVITE_TTL_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// Largest registry file that is read: both lists full, with room.
pub const HOSTS_FILE_BYTES_MAX: usize = 8 << 20;

const FILE_VERSION: u32 = 1;

/// SHA-256 of a certificate's DER, as `openssl x509 -fingerprint -sha256` prints it.
pub type Fingerprint = [u8; 32];
/// A hash of an invitation's secret: it names the invitation and gives nothing away.
pub type InviteId = [u8; 32];

/// An enrolled host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Of its certificate.
    #[serde(with = "hex32")]
    pub fingerprint: Fingerprint,
    /// Seconds since 1970 (UTC).
    pub joined_at: u64,
    /// Seconds since 1970 (UTC): since then it is refused.
    pub revoked_at: Option<u64>,
}

/// An invitation; the secret itself is not kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Invite {
    /// The name that whoever redeems it will have.
    pub name: String,
    /// See [`invite_id`].
    #[serde(with = "hex32")]
    pub id: InviteId,
    /// Seconds since 1970 (UTC).
    pub expires_at: u64,
    /// Seconds since 1970 (UTC).
    pub used_at: Option<u64>,
}

/// What the registry says of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Enrolled under this name.
    Enrolled(String),
    /// Was enrolled under this name, and no longer is (revoked, or replaced by a later join).
    Revoked(String),
    /// Never heard of.
    Unknown,
}

/// Why a secret is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedeemError {
    /// No invitation has this secret.
    #[error("the receiver did not issue this token")]
    Unknown,
    /// It was redeemed before.
    #[error("the token was already used")]
    Used,
    /// Its time is over, or it was withdrawn.
    #[error("the token has expired or was withdrawn")]
    Expired,
    /// The registry could not be written, so nothing was redeemed.
    #[error("the receiver could not record that the token is used")]
    NotRecorded,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Registry {
    version: u32,
    invites: Vec<Invite>,
    hosts: Vec<Host>,
}

/// The registry. Shared between the daemon's commands and the TLS verifier.
#[derive(Debug)]
pub struct Hosts {
    path: PathBuf,
    registry: Mutex<Registry>,
}

/// Whether `name` may name a host: `[a-z0-9._-]{1,64}`, starting with a letter or digit (so that it is neither a
/// hidden file, nor `..`, nor an option on a command line).
pub fn check_name(name: &str) -> Result<()> {
    let first = name.bytes().next();
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let fits = name.len() <= HOST_NAME_BYTES_MAX
        && first.is_some_and(plain)
        && name.bytes().all(|b| plain(b) || matches!(b, b'.' | b'_' | b'-'));
    if fits {
        return Ok(());
    }
    let shown: String = name.chars().take(HOST_NAME_BYTES_MAX + 1).collect();
    Err(Error::new(ErrorKind::BadName, format!("'{}' cannot be a host's name", shown.escape_debug())))
}

/// The name of an invitation: a one-way hash of its secret (256 random bits, so it cannot be guessed back).
pub fn invite_id(secret: &[u8; SECRET_BYTES]) -> InviteId {
    blake3::derive_key("varve 2026 join secret", secret)
}

impl Hosts {
    /// Opens the registry; a missing file is an empty one.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let registry = match path.try_exists() {
            Ok(false) => Registry { version: FILE_VERSION, ..Registry::default() },
            Ok(true) => read_registry(&path)?,
            Err(e) => return Err(Error::io(format!("cannot read {}", path.display()), e)),
        };
        Ok(Self { path, registry: Mutex::new(registry) })
    }

    /// Where it is kept.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Issues an invitation for `name` and returns its secret, which is kept nowhere.
    pub fn invite(&self, name: &str, ttl: Duration, now: SystemTime) -> Result<[u8; SECRET_BYTES]> {
        check_name(name)?;
        if ttl.as_secs() == 0 || ttl > INVITE_TTL_MAX {
            return Err(Error::new(ErrorKind::Limit, format!("an invitation cannot be open for {ttl:?}"))
                .with_hint("choose a time between one second and 30 days"));
        }
        let now_s = seconds(now);
        let mut secret = [0; SECRET_BYTES];
        rand::rngs::OsRng.try_fill_bytes(&mut secret).map_err(|e| {
            Error::new(ErrorKind::Crypto, "the system has no random numbers").because(std::io::Error::other(e))
        })?;
        self.change(|registry| {
            let spent = |i: &Invite| i.used_at.is_some() || i.expires_at <= now_s;
            if !make_room(&mut registry.invites, INVITES_MAX, spent, |i| i.used_at.unwrap_or(i.expires_at)) {
                return Err(Error::new(ErrorKind::Limit, format!("{INVITES_MAX} invitations are open"))
                    .with_hint("wait until some are used or expire, or withdraw one with 'varve host revoke NAME'"));
            }
            let expires_at = now_s.saturating_add(ttl.as_secs());
            registry.invites.push(Invite { name: name.to_owned(), id: invite_id(&secret), expires_at, used_at: None });
            Ok(())
        })?;
        Ok(secret)
    }

    /// Uses up the invitation that `secret` belongs to: durable when this returns, and it works once.
    pub fn redeem(&self, secret: &[u8; SECRET_BYTES], now: SystemTime) -> Result<String, RedeemError> {
        let (id, now_s) = (invite_id(secret), seconds(now));
        let mut refusal = RedeemError::NotRecorded;
        let redeemed = self.change(|registry| {
            let invite = registry.invites.iter_mut().find(|i| i.id == id);
            match judge(invite.as_deref(), now_s) {
                Ok(()) => {}
                Err(why) => refusal = why,
            }
            match invite {
                Some(invite) if refusal == RedeemError::NotRecorded => {
                    invite.used_at = Some(now_s);
                    Ok(invite.name.clone())
                }
                _ => Err(Error::new(ErrorKind::UnknownToken, "refused")),
            }
        });
        redeemed.map_err(|error| {
            if refusal == RedeemError::NotRecorded {
                tracing::error!(error = %error, why = %error.why(), "a token could not be redeemed");
            }
            refusal
        })
    }

    /// What redeeming would say, without doing it. The TLS verifier asks this.
    pub fn invite_standing(&self, id: &InviteId, now: SystemTime) -> Result<(), RedeemError> {
        judge(self.lock().invites.iter().find(|i| i.id == *id), seconds(now))
    }

    /// Enrols a certificate under `name`. A certificate that had the name before is revoked by it.
    pub fn enrol(&self, name: &str, fingerprint: Fingerprint, now: SystemTime) -> Result<()> {
        check_name(name)?;
        let now_s = seconds(now);
        self.change(|registry| {
            for host in registry.hosts.iter_mut().filter(|h| h.name == name && h.revoked_at.is_none()) {
                host.revoked_at = Some(now_s);
            }
            if !make_room(&mut registry.hosts, HOSTS_MAX, |h| h.revoked_at.is_some(), |h| h.revoked_at.unwrap_or(0)) {
                return Err(Error::new(ErrorKind::Limit, format!("{HOSTS_MAX} hosts are enrolled")));
            }
            registry.hosts.push(Host { name: name.to_owned(), fingerprint, joined_at: now_s, revoked_at: None });
            Ok(())
        })
    }

    /// Refuses the host from now on and withdraws its open invitations. Returns the fingerprints that were revoked
    /// now: close their live connections ([`crate::endpoint::Server::close_host`]). Doing it twice is not an error.
    pub fn revoke(&self, name: &str, now: SystemTime) -> Result<Vec<Fingerprint>> {
        let now_s = seconds(now);
        self.change(|registry| {
            let mut found = false;
            for invite in registry.invites.iter_mut().filter(|i| i.name == name && i.used_at.is_none()) {
                invite.expires_at = invite.expires_at.min(now_s);
                found = true;
            }
            let mut revoked = Vec::new();
            for host in registry.hosts.iter_mut().filter(|h| h.name == name) {
                found = true;
                if host.revoked_at.is_none() {
                    host.revoked_at = Some(now_s);
                    revoked.push(host.fingerprint);
                }
            }
            if !found {
                return Err(Error::new(
                    ErrorKind::NoSuchHost,
                    format!("no host '{}' is enrolled or invited", name.escape_debug()),
                ));
            }
            Ok(revoked)
        })
    }

    /// All hosts, revoked ones included, oldest first.
    pub fn list(&self) -> Vec<Host> {
        self.lock().hosts.clone()
    }

    /// Whether a host of this name is enrolled: the next one that joins under it takes its place.
    pub fn is_enrolled(&self, name: &str) -> bool {
        self.lock().hosts.iter().any(|host| host.name == name && host.revoked_at.is_none())
    }

    /// All invitations, spent ones included, oldest first.
    pub fn invites(&self) -> Vec<Invite> {
        self.lock().invites.clone()
    }

    /// Whose certificate this is.
    pub fn standing(&self, fingerprint: &Fingerprint) -> Standing {
        match self.lock().hosts.iter().find(|h| h.fingerprint == *fingerprint) {
            None => Standing::Unknown,
            Some(Host { name, revoked_at: None, .. }) => Standing::Enrolled(name.clone()),
            Some(Host { name, .. }) => Standing::Revoked(name.clone()),
        }
    }

    /// Works on a copy, writes it, and only then lets it count: memory never says more than the disk.
    fn change<T>(&self, work: impl FnOnce(&mut Registry) -> Result<T>) -> Result<T> {
        let mut registry = self.lock();
        let mut next = registry.clone();
        let answer = work(&mut next)?;
        let text = serde_json::to_vec_pretty(&next)
            .map_err(|e| Error::new(ErrorKind::Io, format!("cannot write {}", self.path.display())).because(e))?;
        write_atomic(&self.path, &text, MODE_SECRET)?;
        *registry = next;
        Ok(answer)
    }

    /// A panic elsewhere while it was held cannot have left it half changed (see [`Self::change`]).
    fn lock(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn judge(invite: Option<&Invite>, now_s: u64) -> Result<(), RedeemError> {
    match invite {
        None => Err(RedeemError::Unknown),
        Some(Invite { used_at: Some(_), .. }) => Err(RedeemError::Used),
        Some(invite) if invite.expires_at <= now_s => Err(RedeemError::Expired),
        Some(_) => Ok(()),
    }
}

/// Makes room for one more: drops the spent entry with the smallest `age` when the list is full.
fn make_room<T>(list: &mut Vec<T>, limit: usize, spent: impl Fn(&T) -> bool, age: impl Fn(&T) -> u64) -> bool {
    while list.len() >= limit {
        let oldest = list.iter().enumerate().filter(|(_, x)| spent(x)).min_by_key(|(_, x)| age(x)).map(|(i, _)| i);
        let Some(oldest) = oldest else { return false };
        list.remove(oldest);
    }
    true
}

fn read_registry(path: &Path) -> Result<Registry> {
    let damaged = || {
        Error::new(ErrorKind::Identity, format!("{} is not a host registry", path.display()))
            .with_hint("restore this file from a backup; without it no host can connect until it joins again")
    };
    let bytes = read_bounded(path, HOSTS_FILE_BYTES_MAX)?;
    let registry: Registry = serde_json::from_slice(&bytes).map_err(|e| damaged().because(e))?;
    if registry.version != FILE_VERSION {
        return Err(Error::new(
            ErrorKind::Identity,
            format!("{} has version {}, this program knows {FILE_VERSION}", path.display(), registry.version),
        )
        .with_hint("run the version of Varve that wrote it, or a newer one"));
    }
    if registry.hosts.len() > HOSTS_MAX || registry.invites.len() > INVITES_MAX {
        return Err(damaged());
    }
    for name in registry.hosts.iter().map(|h| &h.name).chain(registry.invites.iter().map(|i| &i.name)) {
        check_name(name).map_err(|e| damaged().because(e))?;
    }
    Ok(registry)
}

/// A clock before 1970 counts as 1970.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// 32 bytes as 64 hexadecimal digits.
mod hex32 {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&super::hex(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(deserializer)?;
        blake3::Hash::from_hex(&text).map(|h| *h.as_bytes()).map_err(D::Error::custom)
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
#[path = "hosts_tests.rs"]
mod tests;
