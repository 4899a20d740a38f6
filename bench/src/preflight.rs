//! Checks the requirements of a run before it begins.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use testbed::cmd;

/// The programs of this build, which have to be next to the harness.
const BUILT: [&str; 2] = ["nohop", "nohop-load"];

/// Programs of the system that every suite needs.
const SYSTEM: [&str; 4] = ["ip", "nsenter", "ss", "unshare"];

/// Checks that these programs can run, and that reports can be written to `out`.
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
        "only one processor may be used: client and backend would wait for each other, and every \
         figure would measure that; use a machine with two or more, or a wider `taskset`"
    );
    for program in BUILT {
        cmd::built(program)?;
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

/// How busy the processors may be before a run, and how long they are looked at.
const MAX_BUSY: f64 = 0.1;
const LOOK: Duration = Duration::from_secs(1);

/// Checks that the processors are idle; if not, and `is_tolerated`, it only prints a warning. The load
/// average is no measure: it is high for minutes after the harness was compiled.
///
/// # Errors
/// When they are busy.
pub fn is_idle(is_tolerated: bool) -> Result<()> {
    let before = processor_times()?;
    thread::sleep(LOOK);
    let busy = busy_share(before, processor_times()?);
    if busy <= MAX_BUSY {
        return Ok(());
    }
    let percent = busy * 100.0;
    let text = format!("the processors are {percent:.0}% busy with something else");
    ensure!(
        is_tolerated,
        "{text}, which distorts every figure: stop that, or continue with --force"
    );
    eprintln!("warning: {text}, which every figure will have in it");
    Ok(())
}

/// The time of all processors so far, idle and in all, in ticks.
fn processor_times() -> Result<[u64; 2]> {
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let words = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let ticks: Vec<u64> = words.filter_map(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guests' are in user and nice already.
    let idle = ticks.iter().skip(3).take(2).sum();
    Ok([idle, ticks.iter().take(8).sum()])
}

fn busy_share([idle_before, all_before]: [u64; 2], [idle, all]: [u64; 2]) -> f64 {
    let all = all.saturating_sub(all_before);
    if all == 0 { 0.0 } else { 1.0 - idle.saturating_sub(idle_before) as f64 / all as f64 }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_time() {
        assert_eq!(busy_share([100, 400], [150, 600]), 0.75);
        assert_eq!(busy_share([100, 400], [100, 400]), 0.0);
        let [idle, all] = processor_times().expect("this machine's");
        assert!(0 < idle && idle < all, "{idle} of {all}");
    }
}
