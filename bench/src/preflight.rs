//! What a run needs, looked at before it does anything.

use std::fs;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use lb_tests::run;

/// The programs of this build, which have to lie beside the harness.
const BUILT: [&str; 3] = ["nohop", "nohop-load", "helloworld"];

/// Programs of the system that every suite needs.
const SYSTEM: [&str; 4] = ["ip", "nsenter", "ss", "unshare"];

/// That what needs these programs can run, and its reports be written to `out`.
///
/// # Errors
/// When they can't: the message says what is missing and how to get it.
pub fn check(programs: impl IntoIterator<Item = &'static str>, out: &Path) -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "it makes network namespaces and loads eBPF programs, which needs root: use `sudo -E`"
    );
    let n_cpus = thread::available_parallelism().map_or(1, usize::from);
    ensure!(
        n_cpus >= 2,
        "only one processor may be used: who dials and who answers would wait for each other, and every \
         figure would measure that; use a machine with two or more, or a wider `taskset`"
    );
    for program in BUILT {
        run::built(program)?;
    }
    let mut programs: Vec<&str> = SYSTEM.into_iter().chain(programs).collect();
    programs.sort_unstable();
    programs.dedup();
    programs.retain(|program| lb_bench::peers::find(program).is_err());
    if !programs.is_empty() {
        let names = programs.join(", ");
        bail!(
            "not installed: {names}; `cargo xtask bench` installs them with apt-get, else install them by hand"
        );
    }
    let mounts = fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
    let has_cgroup2 = mounts.lines().any(|line| line.split(' ').nth(2) == Some("cgroup2"));
    ensure!(has_cgroup2, "cgroup v2 isn't mounted: `mount -t cgroup2 none /sys/fs/cgroup`");
    writable(out)
}

/// That files can be written to a directory, which is made where it isn't there.
fn writable(dir: &Path) -> Result<()> {
    let probe = dir.join(format!(".probe-{}", std::process::id()));
    fs::create_dir_all(dir)
        .and_then(|()| fs::write(&probe, ""))
        .and_then(|()| fs::remove_file(&probe))
        .with_context(|| {
            format!("{} can't be written to; name another place by --out", dir.display())
        })
}
