//! `varve`: everything that a person or a script does with Varve.
//!
//! - [`cli`]: the words of the command line, and which file each subcommand is in
//! - `commands/`: one file per subcommand
//! - [`context`]: the installation that is meant, and how to print
//! - [`client`]: asking a daemon
//! - [`check`]: names, addresses and times as typed by people
//! - [`confirm`], [`progress`], [`words`]: talking with people

mod check;
mod cli;
mod client;
mod commands;
mod confirm;
mod context;
mod progress;
mod takeover;
mod words;

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(cli::run(std::env::args_os().collect()))
}
