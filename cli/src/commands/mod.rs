//! One file per subcommand: its words, what it does, what it prints.

pub(crate) mod bookmark;
pub(crate) mod doctor;
pub(crate) mod drill;
pub(crate) mod failback;
pub(crate) mod failover;
mod failover_end;
pub(crate) mod forget;
pub(crate) mod host_invite;
pub(crate) mod host_list;
pub(crate) mod host_revoke;
pub(crate) mod join;
pub(crate) mod metrics;
pub(crate) mod plan;
pub(crate) mod points;
pub(crate) mod protect;
pub(crate) mod receiver_init;
pub(crate) mod restore;
pub(crate) mod retention;
pub(crate) mod rollback;
pub(crate) mod scrub;
pub(crate) mod status;
pub(crate) mod unprotect;
pub(crate) mod verify;
pub(crate) mod version;
pub(crate) mod view_close;
pub(crate) mod view_list;
pub(crate) mod view_open;
