//! One file per subcommand: its words, what it does, what it prints.

pub(crate) mod bookmark;
pub(crate) mod doctor;
pub(crate) mod forget;
pub(crate) mod host_invite;
pub(crate) mod host_list;
pub(crate) mod host_revoke;
pub(crate) mod join;
pub(crate) mod protect;
pub(crate) mod receiver_init;
pub(crate) mod status;
pub(crate) mod unprotect;
pub(crate) mod verify;
pub(crate) mod version;
