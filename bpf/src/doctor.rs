//! What this machine must have for capture, checked one by one, for `varve doctor` and before loading.

use crate::error::{CaptureError, CaptureErrorKind};

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// Whether capture can work with it.
    pub ok: bool,
    /// What was found.
    pub found: String,
    /// Why it matters.
    pub why: &'static str,
    /// What to do if it is not ok.
    pub next: &'static str,
}

/// Everything, in the order in which it would stop us.
pub fn checks() -> Vec<Check> {
    vec![architecture()]
}

fn architecture() -> Check {
    Check {
        name: "architecture",
        ok: cfg!(target_arch = "x86_64"),
        found: std::env::consts::ARCH.into(),
        why: "the way from a page to its data is known for x86_64 only",
        next: "protect this host from a guest or hypervisor that is x86_64",
    }
}

/// The first check that fails, as an error.
pub(crate) fn refuse_unsupported() -> Result<(), CaptureError> {
    match checks().into_iter().find(|check| !check.ok) {
        None => Ok(()),
        Some(check) => Err(CaptureError::new(
            CaptureErrorKind::Unsupported,
            format!("this machine cannot capture ({}: {})", check.name, check.found),
            check.next,
        )
        .because(check.why)),
    }
}
