//! nohop's programs and maps in the kernel, by bpftool.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::cgroup::Cgroup;
use testbed::cleanup::Cleanup;
use testbed::cmd;

/// The attach types of hooks, as bpftool names them.
pub const CONNECT4: &str = "cgroup_inet4_connect";
pub const SENDMSG4: &str = "cgroup_udp4_sendmsg";
pub const RECVMSG4: &str = "cgroup_udp4_recvmsg";

/// The switch of the kernel's BPF statistics: on only while a mean is taken, since they cost each run of
/// a program two readings of the clock.
const STATISTICS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// The mean run time, in ns, of a cgroup's programs at these hooks while `act` runs, in their order.
/// Programs are found by where they are attached, which is the same for every release.
///
/// # Errors
/// When `act` fails, when bpftool does, when there is no such program or one didn't run.
pub fn mean_ns(
    cgroup: &Cgroup,
    hooks: &[&str],
    act: impl FnOnce() -> Result<()>,
) -> Result<Vec<f64>> {
    let attached = bpftool(&format!("cgroup show {}", cgroup.path().display()))?;
    let programs = attached.as_array().map_or(&[][..], Vec::as_slice);
    let id = |hook: &&str| {
        let found = programs.iter().find(|program| program["attach_type"] == **hook);
        found.and_then(|program| program["id"].as_u64()).with_context(|| format!("no {hook}"))
    };
    let ids = hooks.iter().map(id).collect::<Result<Vec<u64>>>()?;
    let before = fs::read_to_string(STATISTICS).context(STATISTICS)?;
    let _off = Cleanup::new(move || drop(fs::write(STATISTICS, before.trim())));
    fs::write(STATISTICS, "1").context(STATISTICS)?;
    let before = ids.iter().copied().map(counted).collect::<Result<Vec<_>>>()?;
    act()?;
    let mean = |(id, [time_before, runs_before]): (u64, [f64; 2])| {
        let [time, runs] = counted(id)?;
        ensure!(runs > runs_before, "the program {id} didn't run");
        Ok((time - time_before) / (runs - runs_before))
    };
    ids.into_iter().zip(before).map(mean).collect()
}

/// The run time in ns and the number of runs of a program, as the kernel has counted them.
fn counted(program: u64) -> Result<[f64; 2]> {
    let shown = bpftool(&format!("prog show id {program}"))?;
    // bpftool leaves the fields out while they are zero.
    Ok(["run_time_ns", "run_cnt"].map(|key| shown[key].as_f64().unwrap_or_default()))
}

/// The memory of the maps pinned below a directory, in MB, as the kernel reports it (reliable from 6.4
/// on).
///
/// # Errors
/// When bpftool fails, or no map is pinned there.
pub fn maps_mb(pins: &Path) -> Result<f64> {
    let is_link = |pin: &PathBuf| pin.parent().is_some_and(|dir| dir.ends_with("links"));
    let mut seen = BTreeSet::new();
    let mut sum = 0.0;
    for pin in files_below(pins).into_iter().filter(|pin| !is_link(pin)) {
        let map = bpftool(&format!("map show pinned {}", pin.display()))?;
        let id = map["id"].as_u64().context("bpftool reports no id of a map")?;
        if seen.insert(id) {
            sum += map["bytes_memlock"].as_f64().unwrap_or_default() / 1e6;
        }
    }
    ensure!(!seen.is_empty(), "no maps are pinned at {}", pins.display());
    Ok(sum)
}

fn bpftool(words: &str) -> Result<Value> {
    let text = cmd::words("bpftool", &format!("--json {words}"))?;
    serde_json::from_str(&text).with_context(|| format!("bpftool {words}: {text}"))
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}
