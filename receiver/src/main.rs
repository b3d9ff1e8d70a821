//! `varve-receiver`: see the library of the same package.

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;

/// The daemon of the recovery host.
#[derive(Debug, Parser)]
#[command(name = "varve-receiver", version, about)]
struct Arguments {
    /// Where everything lives below.
    #[arg(long, env = "VARVE_ROOT", default_value = "/")]
    root: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    varve_receiver::daemon::main(&arguments.root)
}
