//! Which setups there are, and where resolvers find nohop.

use std::net::{Ipv4Addr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// A setup by which lookups reach nohop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResolverKind {
    /// systemd-resolved, by a drop-in.
    SystemdResolved,
    /// /etc/resolv.conf alone.
    ResolvConf,
    /// dnsmasq, unbound or BIND.
    Dnsmasq,
    /// Docker's containers.
    Docker,
    /// A Nomad client.
    Nomad,
}

impl ResolverKind {
    /// Its option of `nohop dns setup`.
    pub fn option(self) -> &'static str {
        match self {
            ResolverKind::SystemdResolved => "--systemd-resolved",
            ResolverKind::ResolvConf => "--resolv-conf",
            ResolverKind::Dnsmasq => "--dnsmasq",
            ResolverKind::Docker => "--docker",
            ResolverKind::Nomad => "--nomad",
        }
    }
}

/// What `nohop dns setup` prints.
#[derive(Debug, Deserialize, Serialize)]
pub struct SetupReport {
    /// The setups that were requested, or are recommended for this host.
    pub setups: Vec<Setup>,
}

/// A setup by which lookups reach nohop.
#[derive(Debug, Deserialize, Serialize)]
pub struct Setup {
    /// Its option of `nohop dns setup`.
    pub option: String,
    /// Why it is recommended; `None` if it was requested.
    pub reason: Option<String>,
    /// The instructions or, of a change, what was done; empty if it is recommended.
    pub lines: Vec<String>,
}

impl Setup {
    /// One that was requested, with its text.
    pub fn requested(kind: ResolverKind, text: &str) -> Setup {
        let lines = text.lines().map(str::to_owned).collect();
        Setup { option: kind.option().to_owned(), reason: None, lines }
    }
}

/// The report as text: recommendations with their commands, or instructions.
pub fn setup_text(report: &SetupReport) -> String {
    let text = |setup: &Setup| match &setup.reason {
        Some(reason) => format!("{reason}:\n    nohop dns setup {}\n", setup.option),
        None => setup.lines.join("\n") + "\n",
    };
    let is_recommended = report.setups.iter().any(|setup| setup.reason.is_some());
    let texts: Vec<_> = report.setups.iter().map(text).collect();
    texts.join(if is_recommended { "" } else { "\n" })
}

/// Where resolvers find nohop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZoneServer {
    /// Where this host's own resolver finds it.
    pub local: SocketAddr,
    /// Where containers find it, which have a loopback of their own; `None` if nohop listens on
    /// loopback only.
    pub remote: Option<SocketAddr>,
    /// The zone.
    pub domain: String,
    /// The pools of VIPs, whose reverse names nohop answers, too.
    pub pools: Vec<IpNet>,
    /// Whether the kernel has the driver of dummy interfaces.
    pub has_dummy: bool,
}

/// The address of a dummy interface where containers find nohop. Link-local (RFC 3927): no network
/// routes it, so it can be the same on every host.
pub const DUMMY: Ipv4Addr = Ipv4Addr::new(169, 254, 53, 53);
