//! Those who work in the kernel by rules: nftables and IPVS.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use testbed::cmd;
use testbed::tempdir::TempDir;

use super::common::{Running, Services, find, first_line, frontend};
use super::template::render;
use crate::node::{self, Node};

pub fn nftables_version() -> Result<String> {
    first_line("nft", "--version")
}

pub fn start_nftables(node: &Node, services: &Services) -> Result<Running> {
    let tempdir = TempDir::new("nftables")?;
    route_frontends(node)?;
    let rules = render("nftables.nft", services, tempdir.path())?;
    let mut nft = node.hop_place().command(find("nft")?);
    nft.arg("-f").arg(rules);
    cmd::stdout(nft)?;
    let addresses = (0..services.services.len()).map(frontend).collect();
    // The rules go with the namespace.
    Ok(Running::new(addresses, vec![]))
}

/// The same on an edge, for packets that it forwards.
pub fn start_nftables_on_edge(node: &Node, services: &Services) -> Result<Running> {
    let tempdir = TempDir::new("nftables")?;
    let rules = render("nftables-edge.nft", services, tempdir.path())?;
    let mut nft = node.hop_place().command(find("nft")?);
    nft.arg("-f").arg(rules);
    cmd::stdout(nft)?;
    Ok(Running::new((0..services.services.len()).map(frontend).collect(), vec![]))
}

/// A cluster's addresses belong to no host: they need a route, and the client's own address as source.
pub fn route_frontends(node: &Node) -> Result<()> {
    let host = node.client_host();
    let is_alone = std::sync::Arc::ptr_eq(host, node.backend_host());
    let dev = if is_alone { "lo" } else { "eth0" };
    host.ip(&format!("route replace 10.96.0.0/16 dev {dev} src {}", node::CLIENT)).map(drop)
}

pub fn ipvs_version() -> Result<String> {
    ensure!(has_ipvs(), "the kernel has no IPVS (module ip_vs)");
    first_line("ipvsadm", "--version")
}

fn has_ipvs() -> bool {
    let is_there = || Path::new("/proc/net/ip_vs").exists();
    is_there() || {
        let _ = cmd::words("modprobe", "ip_vs");
        is_there()
    }
}

pub fn start_ipvs(node: &Node, services: &Services) -> Result<Running> {
    let tempdir = TempDir::new("ipvs")?;
    super::common::add_frontends(node)?;
    let rules = render("ipvs.rules", services, tempdir.path())?;
    let rules = fs::read_to_string(rules)?;
    let rules: Vec<_> = rules.lines().filter(|line| line.starts_with('-')).collect();
    let mut command = node.hop_place().command(find("ipvsadm-restore")?);
    let mut child = command.stdin(Stdio::piped()).spawn().context("start ipvsadm-restore")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all((rules.join("\n") + "\n").as_bytes())?;
    }
    ensure!(child.wait()?.success(), "ipvsadm-restore refuses the rules");
    let mut sh = node.hop_place().command("sh");
    sh.args(["-c", "echo 1 > /proc/sys/net/ipv4/vs/conntrack"]);
    cmd::stdout(sh)?;
    let addresses = (0..services.services.len()).map(frontend).collect();
    Ok(Running::new(addresses, vec![]))
}

/// How many connections the kernel is to be able to track: for the length of a run, and put back then.
pub struct Conntrack(
    #[expect(dead_code, reason = "undone when it is dropped")] testbed::cleanup::Cleanup,
);

impl Conntrack {
    /// Makes room for a million connections, where there is less.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enlarge() -> Result<Option<Conntrack>> {
        const MAX: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
        const WANTED: u64 = 1_048_576;
        // Without connection tracking there is nothing to enlarge.
        let Ok(before) = fs::read_to_string(MAX) else { return Ok(None) };
        if before.trim().parse::<u64>().is_ok_and(|before| before >= WANTED) {
            return Ok(None);
        }
        let undo = testbed::cleanup::Cleanup::new(move || {
            if let Err(error) = fs::write(MAX, before.trim()) {
                eprintln!("{MAX} stays at {WANTED}: {error}");
            }
        });
        fs::write(MAX, WANTED.to_string()).with_context(|| format!("raise {MAX}"))?;
        Ok(Some(Conntrack(undo)))
    }
}
