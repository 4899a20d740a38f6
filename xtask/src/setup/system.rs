//! The system's packages, judged by the programs they bring.

use std::fs;
use std::process::Command;

use anyhow::{Result, anyhow, bail};

use super::common::{Purpose, announce, with_fix};
use crate::process::{self, find, is_executable, is_root};

/// Program, and the Debian packages that bring it.
const BUILD_TOOLS: &[(&str, &str)] = &[("cc", "gcc libc6-dev"), ("tar", "tar"), ("xz", "xz-utils")];

/// What the demo needs in addition to that.
const DEMO_TOOLS: &[(&str, &str)] = &[
    ("bpftool", "bpftool"),
    ("curl", "curl"),
    ("dig", "bind9-dnsutils"),
    ("dpkg-deb", "dpkg"),
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("unshare", "util-linux"),
];

/// What the tests need in addition to that.
const TEST_TOOLS: &[(&str, &str)] =
    &[("dnsmasq", "dnsmasq-base"), ("dnsperf", "dnsperf"), ("setpriv", "util-linux")];

/// What VMs need in addition.
const VM_TOOLS: &[(&str, &str)] = &[
    ("busybox", "busybox-static"),
    ("ldd", "libc-bin"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("strip", "binutils"),
    ("timeout", "coreutils"),
];

/// What the benchmarks need in addition: load generators and peers.
const BENCH_TOOLS: &[(&str, &str)] = &[
    ("ethtool", "ethtool"),
    ("haproxy", "haproxy"),
    ("iperf3", "iperf3"),
    ("nft", "nftables"),
    ("nginx", "nginx-light libnginx-mod-stream"),
    ("ss", "iproute2"),
    ("taskset", "util-linux"),
    ("unbound", "unbound"),
    ("wrk", "wrk"),
];

/// Those of them that Debian would start at the next boot.
const BENCH_SERVICES: [&str; 3] = ["haproxy", "nginx", "unbound"];

/// Installs without starting services: Debian starts what it installs, unless this program refuses.
const INSTALL: &str = "\
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    printf '#!/bin/sh\\nexit 101\\n' > $policy && chmod 755 $policy
fi
DEBIAN_FRONTEND=noninteractive apt-get -qq --yes install --no-install-recommends \"$@\"";

/// What a few scenarios need in addition; they are skipped where it isn't available.
const CLIENTS: &[(&str, &str)] = &[
    ("dnsperf", "dnsperf"),
    ("drill", "ldnsutils"),
    ("iperf3", "iperf3"),
    ("javac", "default-jdk-headless"),
    ("kdig", "knot-dnsutils"),
    ("musl-gcc", "musl-tools"),
    ("nft", "nftables"),
    ("node", "nodejs"),
    ("postgres", "postgresql"),
    ("psql", "postgresql-client"),
    ("python3", "python3"),
    ("tmux", "tmux"),
    ("wrk", "wrk"),
];

pub fn provide(purpose: Purpose) -> Result<String> {
    let mut tools = BUILD_TOOLS.to_vec();
    if purpose >= Purpose::Demo {
        tools.extend(DEMO_TOOLS);
    }
    if purpose >= Purpose::Test {
        tools.extend(TEST_TOOLS);
    }
    provide_tools(&tools)
}

pub fn provide_for_vms() -> Result<String> {
    provide_tools(VM_TOOLS)
}

pub fn provide_for_bench() -> Result<String> {
    let fresh: Vec<_> = BENCH_SERVICES.into_iter().filter(|name| !is_there(name)).collect();
    let provided = provide_tools(BENCH_TOOLS)?;
    if !fresh.is_empty() && find("systemctl").is_some() {
        let names = fresh.join(" ");
        announce(&format!("disabling {names} at boot in systemd: the benchmarks start their own"));
        process::output(as_root("systemctl").arg("disable").args(fresh))?;
    }
    Ok(provided)
}

/// A program, by its name, from these packages.
pub fn provide_program(name: &str, packages: &str) -> Result<()> {
    provide_tools(&[(name, packages)]).map(drop)
}

/// Returns what is there in the end, and of each program that isn't, why.
pub fn provide_clients() -> (String, Vec<String>) {
    let mut there = Vec::new();
    let mut left_out = Vec::new();
    for client in CLIENTS {
        // Each by itself: one that can't be had holds no other up.
        let provided = prepare(client.0).and_then(|()| provide_tools(&[*client]));
        match provided {
            Ok(_) => there.push(client.0),
            Err(error) => left_out.push(format!("{error:#}")),
        }
    }
    (there.join(", "), left_out)
}

/// Debian's PostgreSQL makes and starts a server when it is installed, unless configured otherwise; the
/// scenarios start one of their own.
fn prepare(program: &str) -> Result<()> {
    const DIR: &str = "/etc/postgresql-common/createcluster.d";
    if program != "postgres" || is_there(program) {
        return Ok(());
    }
    let command =
        format!("mkdir -p {DIR} && echo 'create_main_cluster = false' > {DIR}/nohop.conf");
    announce(&format!("writing {DIR}/nohop.conf, so that PostgreSQL starts no server"));
    process::output(as_root("sh").args(["-c", &command])).map(drop)
}

fn provide_tools(tools: &[(&str, &str)]) -> Result<String> {
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
        return with_fix(unable, &stopped, &by_hand);
    }

    announce(&format!("installing {names} with apt-get"));
    with_fix(install(&packages), &stopped, &by_hand)?;
    let still = self::absent(tools);
    if !still.is_empty() {
        let tools = still.iter().map(|(tool, _)| *tool).collect::<Vec<_>>().join(", ");
        bail!("apt-get installed {names}, yet these are not on PATH: {tools}");
    }
    Ok(format!("installed {names}"))
}

fn absent<'a>(tools: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    tools.iter().copied().filter(|(tool, _)| !is_there(tool)).collect()
}

/// Whether a program is on PATH, or where Debian puts PostgreSQL's server.
fn is_there(tool: &str) -> bool {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut servers = versions.map(|version| version.path().join("bin").join(tool));
    find(tool).is_some() || servers.any(|server| is_executable(&server))
}

fn install(packages: &[&str]) -> Result<()> {
    process::output(as_root("apt-get").args(["-qq", "update"]))?;
    process::output(as_root("sh").args(["-ec", INSTALL, "install"]).args(packages)).map(drop)
}

fn as_root(program: &str) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}
