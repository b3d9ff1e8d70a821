//! Volumes that nobody may write.

use std::time::{Duration, Instant};
use varve_common::problem::Problem;
use varve_io::blockdev::{Claim, in_use, writers};

/// How long a user is waited for who is about to go: a unit that stopped, a lazy unmount, udev.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(50);

/// Claims on all volumes of a group, which are read-only where the device allows it. Dropped, they are free and writable.
#[derive(Debug)]
pub struct Hold {
    claims: Vec<Claim>,
    read_only: bool,
}

impl Hold {
    /// Takes all of them, or none. Waits.
    pub fn take(group: &str, volumes: &[String], limit: Duration) -> Result<Self, Problem> {
        let mut hold = Self { claims: Vec::new(), read_only: false };
        for path in volumes {
            hold.claims.push(claim(group, path, limit.min(LEAVE_LIMIT))?);
        }
        hold.read_only = hold.close().is_ok();
        if !hold.read_only {
            // Part of them may be.
            hold.open();
            tracing::warn!(
                group,
                "a volume cannot be made read-only; it is claimed, and nobody has it open for writing"
            );
        }
        // Who opened it a moment ago may have written a moment ago.
        for (claim, path) in hold.claims.iter().zip(volumes) {
            let failed = |e: varve_io::IoError| Problem::failed(quiet_not(group), e.chain(), "see the kernel's log");
            claim.sync().map_err(failed)?;
            refuse_writers(group, path)?;
        }
        Ok(hold)
    }

    /// Claims them as an agent before us did; they are not read-only yet.
    pub fn again(group: &str, volumes: &[String]) -> Result<Self, Problem> {
        let claims = volumes.iter().map(|path| claim(group, path, Duration::ZERO)).collect::<Result<_, _>>()?;
        // What was made read-only then is made writable if this is dropped.
        Ok(Self { claims, read_only: true })
    }

    /// See [`Hold::close`]; nothing but the claim is needed.
    pub fn close_again(&mut self) {
        self.read_only = self.close().is_ok();
        if !self.read_only {
            self.open();
        }
    }

    /// The volumes are read-only, not only claimed.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Makes them read-only.
    pub fn close(&self) -> Result<(), Problem> {
        for claim in &self.claims {
            claim.set_read_only(true).map_err(|e| Problem::failed("a volume stays writable", e.chain(), ""))?;
        }
        Ok(())
    }

    /// Makes them writable; the claims stay.
    pub fn open(&self) {
        for claim in &self.claims {
            if let Err(error) = claim.set_read_only(false) {
                tracing::error!("a volume stays read-only ('blockdev --setrw' makes it writable): {}", error.chain());
            }
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.read_only {
            self.open();
        }
    }
}

/// What did not come about.
pub fn quiet_not(group: &str) -> String {
    format!("the volumes of '{group}' are not quiet")
}

fn claim(group: &str, path: &str, limit: Duration) -> Result<Claim, Problem> {
    let begin = Instant::now();
    let next = "stop what uses it and unmount it, or let etc/varve/hooks/quiesce do that";
    loop {
        match Claim::take(path) {
            Ok(claim) => {
                let failed =
                    |e: varve_io::IoError| Problem::failed(quiet_not(group), e.chain(), "see the kernel's log");
                claim.sync().map_err(failed)?;
                match refuse_writers(group, path) {
                    Err(problem) if begin.elapsed() >= limit => return Err(problem),
                    Err(_) => {}
                    Ok(()) => return Ok(claim),
                }
            }
            Err(error) if error.is_busy() && begin.elapsed() < limit => {}
            Err(error) if error.is_busy() => {
                let user = in_use(path).unwrap_or_else(|| "somebody has claimed it".to_owned());
                return Err(Problem::refused(quiet_not(group), format!("{path} is in use: {user}"), next));
            }
            Err(error) => return Err(Problem::failed(quiet_not(group), error.chain(), "check the device")),
        }
        std::thread::sleep(LOOK);
    }
}

fn refuse_writers(group: &str, path: &str) -> Result<(), Problem> {
    let writers = writers(path);
    if writers.is_empty() {
        return Ok(());
    }
    let next = "stop it, or let etc/varve/hooks/quiesce do that";
    Err(Problem::refused(quiet_not(group), format!("{path} is open for writing: {}", writers.join(", ")), next))
}
