//! The system's packages, judged by the programs they bring.

use std::process::Command;

use anyhow::{Result, anyhow, bail};

use super::{announce, with_mend};
use crate::process::{self, find, is_root};

/// Program, and the Debian packages that bring it.
const TOOLS: &[(&str, &str)] = &[
    ("bpftool", "bpftool"),
    ("cc", "gcc libc6-dev"),
    ("curl", "curl"),
    ("dig", "bind9-dnsutils"),
    ("dnsmasq", "dnsmasq-base"),
    ("dpkg-deb", "dpkg"),
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("tar", "tar"),
    ("unshare", "util-linux"),
    ("xz", "xz-utils"),
];

/// What VMs need beside that.
const VM_TOOLS: &[(&str, &str)] = &[
    ("busybox", "busybox-static"),
    ("ldd", "libc-bin"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("strip", "binutils"),
    ("timeout", "coreutils"),
];

pub fn provide() -> Result<String> {
    provide_tools(TOOLS)
}

pub fn provide_for_vms() -> Result<String> {
    provide_tools(VM_TOOLS)
}

fn provide_tools(tools: &[(&'static str, &'static str)]) -> Result<String> {
    let absent = absent(tools);
    if absent.is_empty() {
        return Ok(tools.iter().map(|(tool, _)| *tool).collect::<Vec<_>>().join(", "));
    }

    let names = absent.iter().map(|(tool, _)| *tool).collect::<Vec<_>>().join(", ");
    let stopped = format!("not on PATH: {names}");
    let mut packages: Vec<_> =
        absent.iter().flat_map(|(_, packages)| packages.split(' ')).collect();
    packages.sort_unstable();
    packages.dedup();
    let names = packages.join(" ");
    let by_hand = format!("install them by hand (as Debian's packages: {names})");
    if find("apt-get").is_none() {
        let unable = Err(anyhow!("setup installs with apt-get only, which isn't there"));
        return with_mend(unable, &stopped, &by_hand);
    }

    announce(&format!("installing {names} with apt-get"));
    let install = [&["install", "--no-install-recommends"], &packages[..]].concat();
    with_mend(apt_get(&["update"]).and_then(|()| apt_get(&install)), &stopped, &by_hand)?;
    let still = self::absent(tools);
    if !still.is_empty() {
        let tools = still.iter().map(|(tool, _)| *tool).collect::<Vec<_>>().join(", ");
        bail!("apt-get installed {names}, yet these are not on PATH: {tools}");
    }
    Ok(format!("installed {names}"))
}

fn absent(tools: &[(&'static str, &'static str)]) -> Vec<(&'static str, &'static str)> {
    tools.iter().copied().filter(|(tool, _)| find(tool).is_none()).collect()
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    // sudo drops the environment, so the setting travels as a word of the command.
    let words = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "--yes"];
    let mut command = if is_root() {
        Command::new(words[0])
    } else {
        let mut command = Command::new("sudo");
        command.arg(words[0]);
        command
    };
    command.args(&words[1..]).args(arguments);
    process::output(&mut command).map(drop)
}
