//! Which setups there are, and where resolvers find nohop.

use std::net::{Ipv4Addr, SocketAddr};

use ipnet::IpNet;

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
