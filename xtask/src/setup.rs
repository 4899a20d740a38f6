//! Takes a bare machine to one that builds and tests. Each step checks before it acts, so running
//! it again is cheap and changes nothing.

pub mod aarch64;
mod apt;
pub mod browser;
mod common;
mod consul;
pub mod deny;
pub mod dist;
mod envoy;
pub mod fuzz;
pub mod kernels;
mod linker;
pub mod machine;
mod rust;
mod system;
pub mod toolchain;
mod unpacked;
mod wheel;

use std::env;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

pub use common::Purpose;

pub const AFTER_HELP: &str = "\
Looked up first:
  NOHOP_NIGHTLY   rustup's name of the nightly compiler; `nightly` where it is unset
  NOHOP_RUST_SRC  the standard library's source for the nightly: a rust-src tarball, or a folder
                  that holds one, or that holds library/
  NOHOP_CONSUL    a consul binary, a .deb of it, or a folder that holds one of the two
  NOHOP_KERNELS   a folder of VERSION/vmlinuz and VERSION/modules/";

/// Provides everything that `purpose` needs, and nothing else.
///
/// # Errors
/// When something can't be had: the error lists all of it, each with the way to get it.
pub fn run(purpose: Purpose) -> Result<()> {
    let mut missing = Vec::new();
    let mut step = |name: &str, result: Result<String>, took: Duration| match result {
        Ok(found) if took < Duration::from_secs(1) => println!("ok: {name}: {found}"),
        Ok(found) => println!("ok: {name}: {found} ({:.0} s)", took.as_secs_f64()),
        Err(error) => {
            println!("missing: {name}");
            missing.push(format!("{name}: {error:#}"));
        }
    };
    let mut timed = |name: &str, act: &dyn Fn() -> Result<String>| {
        let start = Instant::now();
        let result = act();
        step(name, result, start.elapsed());
    };

    timed("system packages", &|| system::provide(purpose));
    match rust::Nightly::find() {
        Ok(nightly) => {
            timed("rust-src", &|| rust::provide_source(&nightly));
            timed("bpf-linker", &|| linker::provide(&nightly));
        }
        Err(error) => timed("nightly compiler", &|| bail!("{error:#}")),
    }
    if purpose >= Purpose::Demo {
        timed("consul", &consul::provide);
    }
    if purpose >= Purpose::Test {
        let (clients, left_out) = system::provide_clients();
        println!("ok: clients that a few scenarios need: {clients}");
        for unpacked in unpacked::ALL {
            let name = unpacked.package;
            match unpacked.provide() {
                Ok(found) => println!("ok: {name}: {found}"),
                Err(error) => println!("skipped: {name}, and its scenario: {error:#}"),
            }
        }
        for reason in left_out {
            println!("skipped: the scenarios that need it: {reason}");
        }
        if let Some(folder) = env::var_os("NOHOP_KERNELS") {
            timed("kernels", &|| kernels::look(Path::new(&folder)));
        }
    }

    if missing.is_empty() {
        println!("ready");
        return Ok(());
    }
    bail!("not ready; what is missing, and how to get it:\n- {}", missing.join("\n- "));
}

/// Provides what VMs need in addition.
///
/// # Errors
/// When something can't be had, with the way to get it.
pub fn run_for_vms() -> Result<()> {
    println!("ok: VMs: {}", system::provide_for_vms()?);
    Ok(())
}

/// Provides what the benchmarks need in addition.
///
/// # Errors
/// When something can't be had, with the way to get it.
pub fn run_for_bench() -> Result<()> {
    println!("ok: benchmarks: {}", system::provide_for_bench()?);
    match envoy::provide() {
        Ok(found) => println!("ok: Envoy: {found}"),
        Err(error) => println!("left out: Envoy, which the benchmarks list as absent: {error:#}"),
    }
    Ok(())
}
