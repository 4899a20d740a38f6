//! The in-kernel tests on other kernels: each boots in a VM, by software emulation, on an initramfs
//! that holds the tests and little else.

mod boot;
mod initramfs;
pub mod verifier;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};

use crate::setup::kernels::{self, Kernels, Version};
use crate::tally::Tally;
use crate::{compile, process, setup};
use initramfs::Archive;

pub const AFTER_HELP: &str = "\
The kernels are those of NOHOP_KERNELS, a folder of VERSION/vmlinuz and VERSION/modules/. Where it
is unset, Debian's cloud kernels of several releases are downloaded from this machine's mirror.";

/// Runs setup, then the tests on every kernel, or only on `kernel`; as root also the part of them
/// that tells of the verifier, on the running kernel. Brings docs/verifier.md up to date.
///
/// # Errors
/// When setup lacks something, or docs/verifier.md can't be written.
pub fn run(kernel: Option<Version>) -> Result<ExitCode> {
    setup::run()?;
    let mut tally = Tally::default();
    run_matrix(&mut tally, kernel, None);
    if kernel.is_none() {
        ask_running_kernel(&mut tally);
    }
    if tally.failures.is_empty() {
        println!("\n{}", verifier::update(&tally.verified)?);
    }
    Ok(tally.finish())
}

/// Runs the tests whose name contains `filter` on every kernel, or only on `only`.
pub fn run_matrix(tally: &mut Tally, only: Option<Version>, filter: Option<&str>) {
    if let Err(error) = try_matrix(tally, only, filter) {
        tally.fail("kernels", &error);
    }
}

fn try_matrix(tally: &mut Tally, only: Option<Version>, filter: Option<&str>) -> Result<()> {
    let kernel_tests = compile::kernel_tests()?;
    if let Some(filter) = filter {
        let names = process::output(Command::new(&kernel_tests).args(["--list", filter]))?;
        if names.trim().is_empty() {
            return Ok(());
        }
    }
    let Kernels { mut found, missing } = kernels::provide()?;
    for why in missing {
        tally.skip("a kernel", &why);
    }
    if let Some(only) = only {
        let versions: Vec<_> = found.iter().map(|kernel| kernel.version.to_string()).collect();
        found.retain(|kernel| kernel.version == only);
        ensure!(!found.is_empty(), "there is no kernel {only}, only {}", versions.join(", "));
    }
    if found.is_empty() {
        return Ok(()); // what is missing was said
    }
    setup::run_for_vms()?;

    let folder = crate::root().join("target/vm");
    let common = tests_archive(&kernel_tests, &folder, filter)?;
    for kernel in found {
        let before = [tally.passed, tally.failed, tally.skipped];
        let start = Instant::now();
        let name = format!("kernel {}", kernel.version);
        tally.phase(&name, |on_line| {
            let mut archive = common.clone();
            archive.add_modules(&kernel.modules)?;
            let initrd = folder.join(format!("{}.cpio", kernel.version));
            archive.write(&initrd)?;
            boot::boot(&kernel, &initrd, on_line)
        });
        let [passed, failed, skipped] = before;
        println!(
            "{name}: {} passed, {} failed, {} skipped ({:.0} s)",
            tally.passed - passed,
            tally.failed - failed,
            tally.skipped - skipped,
            start.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

/// The initramfs that all kernels share.
fn tests_archive(kernel_tests: &Path, folder: &Path, filter: Option<&str>) -> Result<Archive> {
    fs::create_dir_all(folder).with_context(|| format!("can't create {}", folder.display()))?;
    // Most of the file is for debuggers.
    let stripped = folder.join("kernel-tests");
    let strip = ["--strip-debug", "-o"];
    process::output(Command::new("strip").args(strip).arg(&stripped).arg(kernel_tests))?;
    let mut archive = Archive::default();
    archive.add_program("usr/bin/kernel-tests", &stripped)?;
    archive.add_program("bin/busybox", &installed("busybox")?)?;
    archive.add_program("usr/bin/bpftool", &installed("bpftool")?)?;
    archive.add_program("usr/bin/ip", &installed("ip")?)?;
    archive.add_script("init", boot::init_script(filter));
    Ok(archive)
}

fn installed(program: &str) -> Result<PathBuf> {
    process::find(program).with_context(|| format!("{program} isn't on PATH any more"))
}

/// The running kernel's part of docs/verifier.md.
fn ask_running_kernel(tally: &mut Tally) {
    if !process::is_root() {
        tally.skip("the running kernel", "loading eBPF programs needs root: use sudo -E");
        return;
    }
    match compile::kernel_tests() {
        Ok(kernel_tests) => {
            let mut command = Command::new(kernel_tests);
            tally.tests("the running kernel", command.arg(verifier::TRIAL));
        }
        Err(error) => tally.fail("the running kernel", &anyhow!(error)),
    }
}
