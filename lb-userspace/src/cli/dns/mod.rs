//! `nohop dns`: how a machine's own resolver comes to ask nohop, and what nohop answers.

mod apply;
mod look;
mod query;
mod resolved;
mod text;
mod upstream;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use ipnet::IpNet;

use super::args::{ClientArguments, ConfigArguments};
use crate::config::Config;

pub use query::{document, query, text as lookup_text};

/// What to do about DNS.
#[derive(Debug, Subcommand)]
pub enum DnsCommand {
    /// Print what a resolver needs to send nohop its zone; without an option, look at this machine
    /// and recommend one
    Setup {
        /// Which resolver
        #[command(flatten)]
        way: WayArguments,
        /// Do it, for systemd-resolved
        #[arg(long, requires = "systemd_resolved", conflicts_with = "undo")]
        apply: bool,
        /// Put back what was there, for systemd-resolved
        #[arg(long, requires = "systemd_resolved")]
        undo: bool,
        /// Where the machine's files are: a test has others than the machine
        #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
        root: PathBuf,
        /// Where the configuration comes from
        #[command(flatten)]
        config: Box<ConfigArguments>,
    },
    /// Ask the running daemon for a name, and show the answer and where it came from
    Query {
        /// The name
        name: String,
        /// The type of record
        #[arg(value_name = "TYPE", default_value = "A")]
        kind: String,
        /// Ask this server instead, which can't say where its answer comes from
        #[arg(long, value_name = "ADDR:PORT")]
        server: Option<SocketAddr>,
        /// How to find the daemon
        #[command(flatten)]
        client: ClientArguments,
    },
}

/// Which resolver is to ask nohop.
#[derive(Clone, Copy, Debug, Args)]
#[group(multiple = false)]
pub struct WayArguments {
    /// systemd-resolved, by a drop-in
    #[arg(long)]
    systemd_resolved: bool,
    /// Every program itself, by /etc/resolv.conf
    #[arg(long)]
    resolv_conf: bool,
    /// dnsmasq (and, by the same words, unbound and BIND)
    #[arg(long)]
    dnsmasq: bool,
    /// Docker's containers
    #[arg(long)]
    docker: bool,
    /// Nomad's tasks that have a network of their own
    #[arg(long)]
    nomad: bool,
}

/// A way for a lookup to come to nohop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    SystemdResolved,
    ResolvConf,
    Dnsmasq,
    Docker,
    Nomad,
}

impl Way {
    /// The option of `nohop dns setup` that tells of it.
    fn option(self) -> &'static str {
        match self {
            Way::SystemdResolved => "--systemd-resolved",
            Way::ResolvConf => "--resolv-conf",
            Way::Dnsmasq => "--dnsmasq",
            Way::Docker => "--docker",
            Way::Nomad => "--nomad",
        }
    }
}

impl WayArguments {
    fn way(self) -> Option<Way> {
        [
            (self.systemd_resolved, Way::SystemdResolved),
            (self.resolv_conf, Way::ResolvConf),
            (self.dnsmasq, Way::Dnsmasq),
            (self.docker, Way::Docker),
            (self.nomad, Way::Nomad),
        ]
        .into_iter()
        .find_map(|(is_asked, way)| is_asked.then_some(way))
    }
}

/// What there is to point a resolver at.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    /// Where this machine's own resolver finds nohop.
    local: SocketAddr,
    /// Where containers find it, which have a loopback of their own; `None` where nohop listens on
    /// loopback only.
    remote: Option<SocketAddr>,
    /// The zone.
    domain: String,
    /// The networks whose addresses have names there, too.
    pools: Vec<IpNet>,
}

/// Where a container finds nohop once a dummy interface has the address. Link-local (RFC 3927): no
/// network routes it, so it can be the same on every machine.
const DUMMY: Ipv4Addr = Ipv4Addr::new(169, 254, 53, 53);

impl Target {
    fn of(config: &Config) -> Target {
        let pools = config.vip.pools().collect();
        let config = &config.dns;
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 53));
        let reachable = |address: &&SocketAddr| !address.ip().is_unspecified();
        let mut known = config.listen.iter().filter(reachable);
        let first = config.listen.first().map(|first| match first.ip().is_unspecified() {
            true => SocketAddr::from((Ipv4Addr::LOCALHOST, first.port())),
            false => *first,
        });
        let is_loopback = |address: &&SocketAddr| address.ip().is_loopback();
        Target {
            local: known.clone().find(is_loopback).copied().or(first).unwrap_or(loopback),
            remote: known.find(|address| !is_loopback(address)).copied(),
            domain: config.domain.clone(),
            pools,
        }
    }
}

/// `nohop dns setup`
///
/// # Errors
/// When a file can't be written, or systemd-resolved doesn't come up with it.
pub fn setup(
    way: WayArguments,
    apply: bool,
    undo: bool,
    root: &Path,
    config: &Config,
) -> anyhow::Result<String> {
    let target = Target::of(config);
    if (apply || undo) && way.way() != Some(Way::SystemdResolved) {
        anyhow::bail!("--apply and --undo are there for --systemd-resolved only");
    }
    Ok(match way.way() {
        Some(Way::SystemdResolved) if apply => {
            if root == Path::new("/") {
                query::ask_zone(&target)?;
            }
            apply::apply(root, &target, &config.dns)?
        }
        Some(Way::SystemdResolved) if undo => apply::undo(root, &target)?,
        Some(way) => text::text(way, &target),
        None => look::advice(&look::look(root)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let table = [
            ("127.0.0.1:53", "127.0.0.1:53", None),
            ("127.0.0.1:5354 169.254.53.53:53", "127.0.0.1:5354", Some("169.254.53.53:53")),
            ("169.254.53.53:53 127.0.0.1:53", "127.0.0.1:53", Some("169.254.53.53:53")),
            ("0.0.0.0:53", "127.0.0.1:53", None),
            ("10.0.0.1:53", "10.0.0.1:53", Some("10.0.0.1:53")),
            ("[::1]:53", "[::1]:53", None),
        ];
        for (listen, local, remote) in table {
            let listen = listen.split(' ').map(|address| address.parse().unwrap()).collect();
            let mut config = Config::default();
            config.dns.listen = listen;
            let target = Target::of(&config);
            assert_eq!(target.local.to_string(), local);
            assert_eq!(target.remote.map(|remote| remote.to_string()).as_deref(), remote);
        }
    }
}
