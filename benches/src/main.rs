//! `make bench`: what Varve costs and reaches on this machine, against the targets and beside a peer.
//!
//! Every bench takes paired, alternating measurements, so that what else happens on the machine hits both sides. A
//! missed target is shown, never an error; a wrong byte or a lost write is one. README.md holds the method and the
//! newest table.
//!
//! Two processes: the one that a person starts only supervises, so that it can clean up behind the one that measures,
//! however that ends.
#![allow(
    clippy::unwrap_used,
    reason = "as in the tests' fixtures: a broken assumption is a panic with a line number, and the harness reports it"
)]

mod benches;
mod feed;
mod machine;
mod pacer;
mod plan;
mod process;
mod pump;
mod qemu;
mod readme;
mod recovery;
mod report;
mod statistics;
mod status;
mod supervise;
mod volume;

use clap::Parser;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;

use plan::Plan;
use report::Report;

/// Measures; needs root. The table goes to stdout, what happens meanwhile to stderr.
#[derive(Parser)]
pub struct Arguments {
    /// Only this bench (can be given several times): see --list.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// A look, not a measurement: short runs, few pairs.
    #[arg(long)]
    quick: bool,
    /// Length of every measured run.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Pairs (rounds) of every paired measurement.
    #[arg(long, value_name = "N")]
    pairs: Option<usize>,
    /// Also write everything, single samples included, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also put the table between the marks of this file.
    #[arg(long, value_name = "FILE")]
    readme: Option<PathBuf>,
    /// Print the benches' names.
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        benches::ALL.iter().for_each(|bench| println!("{:<11} {}", bench.name, bench.title));
        return ExitCode::SUCCESS;
    }
    let known = |name: &&String| !benches::ALL.iter().any(|bench| bench.name == **name);
    if let Some(unknown) = arguments.only.iter().find(known) {
        eprintln!("varve-bench: there is no bench '{unknown}'; --list shows them");
        return ExitCode::from(2);
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("varve-bench: this needs root (BPF, loop devices): sudo env PATH=\"$PATH\" make bench");
        return ExitCode::FAILURE;
    }
    if supervise::is_worker() { measure(&arguments) } else { supervise::run_worker() }
}

fn measure(arguments: &Arguments) -> ExitCode {
    supervise::sweep();
    let plan = Plan { quick: arguments.quick, seconds: arguments.seconds, pairs: arguments.pairs };
    let mut report = Report::new(machine::Facts::gather(), &plan);
    for bench in benches::ALL {
        if !arguments.only.is_empty() && !arguments.only.iter().any(|name| name == bench.name) {
            continue;
        }
        report.begin(bench.name, bench.title, machine::busy_percent());
        let others = machine::Others::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| (bench.run)(&plan, &mut report)));
        if let Err(panic) = outcome {
            let words = panic.downcast_ref::<String>().cloned();
            let words = words.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            report.wrong(&words.unwrap_or_else(|| "it panicked".into()));
        }
        report.end(others.percent());
    }
    let table = report.markdown();
    println!("{table}");
    let mut code = if report.is_wrong() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    let json = || serde_json::to_string_pretty(&report).unwrap() + "\n";
    let json = arguments.json.as_ref().map(|path| (path, std::fs::write(path, json())));
    let readme = arguments.readme.as_ref().map(|path| (path, readme::insert(path, &table)));
    for (path, outcome) in [json, readme].into_iter().flatten() {
        if let Err(error) = outcome {
            eprintln!("varve-bench: {}: {error}", path.display());
            code = ExitCode::FAILURE;
        }
    }
    code
}
