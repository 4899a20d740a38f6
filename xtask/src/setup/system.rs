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

pub fn provide() -> Result<String> {
    let absent = absent();
    if absent.is_empty() {
        return Ok(TOOLS.iter().map(|(tool, _)| *tool).collect::<Vec<_>>().join(", "));
    }

    let tools = absent.iter().map(|(tool, _)| *tool).collect::<Vec<_>>().join(", ");
    let mut packages: Vec<_> =
        absent.iter().flat_map(|(_, packages)| packages.split(' ')).collect();
    packages.sort_unstable();
    packages.dedup();
    let names = packages.join(" ");
    let stopped = format!("not on PATH: {tools}");
    let by_hand = format!("install them by hand (as Debian's packages: {names})");
    if find("apt-get").is_none() {
        let unable = Err(anyhow!("setup installs with apt-get only, which isn't there"));
        return with_mend(unable, &stopped, &by_hand);
    }

    announce(&format!("installing {names} with apt-get"));
    let install = [&["install", "--no-install-recommends"], &packages[..]].concat();
    with_mend(apt_get(&["update"]).and_then(|()| apt_get(&install)), &stopped, &by_hand)?;
    let still = self::absent();
    if !still.is_empty() {
        let tools = still.iter().map(|(tool, _)| *tool).collect::<Vec<_>>().join(", ");
        bail!("apt-get installed {names}, yet these are not on PATH: {tools}");
    }
    Ok(format!("installed {names}"))
}

fn absent() -> Vec<(&'static str, &'static str)> {
    TOOLS.iter().copied().filter(|(tool, _)| find(tool).is_none()).collect()
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
