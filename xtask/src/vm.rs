//! The in-kernel tests on other kernels: each boots in a VM, by software emulation, on an initramfs
//! that holds the tests and little else.

pub mod boot;
pub mod initramfs;
pub mod verifier;

use std::cmp::Reverse;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::compile::{self, KernelTests};
use crate::setup::kernels::{self, Kernel, Kernels, Version};
use crate::test_report::Tally;
use crate::{process, setup};
use boot::Mode;
use initramfs::Archive;

pub const AFTER_HELP: &str = "\
The kernels are those of NOHOP_KERNELS, a folder of VERSION/vmlinuz and VERSION/modules/. Where it
is unset, Debian's cloud kernels of several releases are downloaded from this machine's mirror.";

/// The trials for a kernel that is locked down, by their names.
const LOCKDOWN_TRIALS: &str = "lockdown";

/// Each VM has one processor.
const N_AT_ONCE: usize = 2;

/// Runs setup, then the tests on every kernel, or only on `kernel`, and all of them or only the one
/// that `counts` the verifier's instructions; as root also that one on the running kernel. Updates
/// docs/verifier.md.
///
/// # Errors
/// When setup lacks something, or docs/verifier.md can't be written.
pub fn run(kernel: Option<Version>, counts: bool) -> Result<ExitCode> {
    setup::run(setup::Purpose::Test)?;
    let mut tally = Tally::default();
    run_matrix(&mut tally, kernel, counts.then_some(verifier::TRIAL), Extent::Full);
    if kernel.is_none() {
        ask_running_kernel(&mut tally);
    }
    if tally.failures.is_empty() {
        println!("\n{}", verifier::update(&tally.verified)?);
    }
    Ok(tally.finish())
}

/// How much is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Enough to find most faults while a change waits.
    Usual,
    /// Everything, at length.
    Full,
}

/// Runs the tests whose name contains `filter` on every kernel, or only on `only`.
pub fn run_matrix(tally: &mut Tally, only: Option<Version>, filter: Option<&str>, extent: Extent) {
    if let Err(error) = try_matrix(tally, only, filter, extent) {
        tally.fail("kernels", &error);
    }
}

fn try_matrix(
    tally: &mut Tally,
    only: Option<Version>,
    filter: Option<&str>,
    extent: Extent,
) -> Result<()> {
    let kernel_tests = compile::kernel_tests()?;
    if let Some(filter) = filter {
        let names = process::output(Command::new(&kernel_tests.tests).args(["--list", filter]))?;
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
        return Ok(()); // what is missing was reported
    }
    setup::run_for_vms()?;

    let folder = crate::repository::root().join("target/vm");
    let common = tests_archive(&kernel_tests, &folder)?;
    // The oldest lacks most, and this machine's own plays them all as well.
    let newer = found.len().saturating_sub(1);
    let is_divided = extent == Extent::Usual && filter.is_none() && newer > 1;
    let share =
        |nth: usize| (is_divided && nth > 0).then(|| format!("NOHOP_SHARE={}/{newer}", nth - 1));
    let mut starts: Vec<Start> = found
        .iter()
        .enumerate()
        .map(|(nth, kernel)| Start { kernel, mode: Mode::Plain, filter, share: share(nth) })
        .collect();
    // One of the newer ones is enough: the helper is missing from all in the same way.
    let is_wanted = filter.is_none_or(|filter| LOCKDOWN_TRIALS.contains(filter));
    if let Some(kernel) = found.iter().find(|kernel| kernel.version >= LOCKED_DOWN)
        && is_wanted
    {
        let filter = Some(LOCKDOWN_TRIALS);
        starts.push(Start { kernel, mode: Mode::LockedDown, filter, share: None });
    }
    // Those that take longest first, so that no processor waits for the last one: all trials, then
    // shares of them, the newest kernel's before others', then the few of a kernel that is locked down.
    starts.sort_by_key(|Start { kernel, mode, share, .. }| {
        (*mode != Mode::Plain, share.is_some(), Reverse(kernel.version))
    });
    println!("\n== kernels, {N_AT_ONCE} at once");
    for Run { name, lines, result, took } in boot_all(&starts, &common, &folder) {
        let before = [tally.passed, tally.failed, tally.skipped];
        tally.phase(&name, |on_line| {
            lines.iter().for_each(|line| on_line(line));
            result
        });
        let after = [tally.passed, tally.failed, tally.skipped];
        let [passed, failed, skipped] = [0, 1, 2].map(|n| after[n] - before[n]);
        let took = took.as_secs();
        println!("{passed} passed, {failed} failed, {skipped} skipped, in {took} s");
    }
    Ok(())
}

/// The first kernel that is started locked down, too.
const LOCKED_DOWN: Version = Version { major: 6, minor: 12 };

/// A kernel, how it is started and which trials are played on it.
struct Start<'a> {
    kernel: &'a Kernel,
    mode: Mode,
    filter: Option<&'a str>,
    /// The variable that gives it a part of the trials.
    share: Option<String>,
}

/// The result of a kernel.
struct Run {
    name: String,
    lines: Vec<String>,
    /// Whether the tests succeeded.
    result: Result<bool>,
    took: Duration,
}

/// Boots every kernel, some at once; they show what they write as they run. In the order of
/// `starts`.
fn boot_all(starts: &[Start<'_>], common: &Archive, folder: &Path) -> Vec<Run> {
    let next = AtomicUsize::new(0);
    let run = |Start { kernel, mode, filter, share }: &Start<'_>| {
        let (mode, filter) = (*mode, *filter);
        let start = Instant::now();
        let name = format!("kernel {}{}", kernel.version, mode.suffix());
        let mut lines = Vec::new();
        let mut boot = || {
            let mut archive = common.clone();
            archive.add_modules(&kernel.modules, &[])?;
            archive.add_script("init", boot::init_script(share.as_slice(), filter));
            let initrd = folder.join(format!("{}.cpio", name.replace([' ', ','], "-")));
            archive.write(&initrd)?;
            boot::boot(kernel, mode, &initrd, |line| lines.push(line.to_owned()))
        };
        let result = boot();
        Run { name, lines, result, took: start.elapsed() }
    };
    let work = || {
        let indices = std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed));
        indices.map_while(|n| Some((n, run(starts.get(n)?)))).collect::<Vec<_>>()
    };
    let mut runs: Vec<(usize, Run)> = thread::scope(|scope| {
        let workers = [(); N_AT_ONCE].map(|()| scope.spawn(work));
        let join = |worker: thread::ScopedJoinHandle<_>| {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        workers.into_iter().flat_map(join).collect()
    });
    runs.sort_by_key(|(n, _)| *n);
    runs.into_iter().map(|(_, run)| run).collect()
}

/// The initramfs that all kernels share.
fn tests_archive(KernelTests { tests, nohop }: &KernelTests, folder: &Path) -> Result<Archive> {
    fs::create_dir_all(folder).with_context(|| format!("can't create {}", folder.display()))?;
    // Most of the file is for debuggers.
    let mut archive = Archive::default();
    for (name, program) in [("kernel-tests", tests), ("nohop", nohop)] {
        let stripped = folder.join(name);
        let strip = ["--strip-debug", "-o"];
        process::output(Command::new("strip").args(strip).arg(&stripped).arg(program))?;
        archive.add_program(&format!("usr/bin/{name}"), &stripped)?;
    }
    archive.add_program("bin/busybox", &installed("busybox")?)?;
    archive.add_program("usr/bin/bpftool", &installed("bpftool")?)?;
    archive.add_program("usr/bin/ip", &installed("ip")?)?;
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
        Ok(KernelTests { tests, .. }) => {
            let mut command = Command::new(tests);
            tally.tests("the running kernel", command.arg(verifier::TRIAL));
        }
        Err(error) => tally.fail("the running kernel", &error),
    }
}
