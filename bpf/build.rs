//! Compiles the BPF programs and generates their skeleton, both into `OUT_DIR` only.

use std::env;
use std::path::PathBuf;
use std::process::{Command, exit};

use libbpf_cargo::SkeletonBuilder;

const SOURCE: &str = "src/bpf/varve.bpf.c";

fn main() {
    println!("cargo:rerun-if-changed=src/bpf");
    println!("cargo:rerun-if-env-changed=CLANG");
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".into());
    match Command::new(&clang).arg("--version").output() {
        Ok(out) if out.status.success() => {}
        other => fail(&format!(
            "cannot run `{clang}` ({}): install clang 12 or newer (Debian: apt-get install clang), or set CLANG",
            match other {
                Ok(out) => out.status.to_string(),
                Err(error) => error.to_string(),
            }
        )),
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_else(|| fail("cargo did not set OUT_DIR")));
    // -mcpu=v3: atomics that return the old value. Every kernel that we support has them (5.12).
    let built = SkeletonBuilder::new()
        .source(SOURCE)
        .clang(&clang)
        .clang_args(["-mcpu=v3", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"])
        .build_and_generate(out.join("varve.skel.rs"));
    if let Err(error) = built {
        fail(&format!("cannot build {SOURCE}: {error:#}"));
    }
}

fn fail(why: &str) -> ! {
    println!("cargo:warning=varve-bpf: {why}");
    eprintln!("varve-bpf: {why}");
    exit(1)
}
