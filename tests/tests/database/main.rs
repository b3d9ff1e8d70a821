//! The tests that decide: a PostgreSQL under load, and a list outside of it of every commit that it acknowledged. After a
//! power cut, a planned switch-over, a partition with both sides at work, and the way home, the database has what it has to
//! have, row by row, and nothing else.
//!
//! `VARVE_SOAK=1` does each many times (`VARVE_ROUNDS`), with other choices (lines, moments, loads) every time; `VARVE_SEED`
//! replays these.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

mod bed;
mod ledger;
mod partition;
mod planned;
mod power_cut;
