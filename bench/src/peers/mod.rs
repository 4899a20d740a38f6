//! Those who are compared, each started on a node with a configuration that its own experts would
//! accept: the files in `bench/peers`.

mod common;
mod envoy;
mod haproxy;
mod nft_ipvs;
mod nginx;
mod nohop;
mod template;

use anyhow::{Context, Result};

use crate::node::Node;
use crate::report::Contender;

pub use common::{Guard, Protocol, Running, Service, Services, find, frontend, n_workers};
pub use envoy::{
    ENDPOINTS as ENVOY_ENDPOINTS, Served as ServedByEnvoy, serve_eds as serve_envoy_eds,
};
pub use haproxy::{
    Haproxy, Notify as HaproxyNotify, Served as ServedByHaproxy, serve as serve_haproxy,
};
pub use nft_ipvs::{Conntrack, route_frontends};
pub use nginx::start_backend;
pub use nohop::{Served, edge_modes, edge_sources, serve as serve_nohop, start_edge};
pub use template::{render, rendered};

/// One who is compared.
#[derive(Clone, Copy)]
pub struct Peer {
    /// As in all figures.
    pub name: &'static str,
    /// Its configuration in the repository; empty where it has none.
    pub config: &'static str,
    /// What it can serve.
    pub protocols: &'static [Protocol],
    /// Its version, or why it can't take part on this machine.
    pub version: fn() -> Result<String>,
    start: fn(&Node, &Services) -> Result<Running>,
}

/// No balancer: the client connects to the first backend.
pub const DIRECT: &str = "direct";
/// This project.
pub const NOHOP: &str = "nohop";
/// HAProxy, which passes bytes on.
pub const HAPROXY_TCP: &str = "HAProxy tcp";
/// HAProxy, which understands HTTP.
pub const HAPROXY_HTTP: &str = "HAProxy http";
/// Envoy, as one hop.
pub const ENVOY: &str = "Envoy";
/// nginx's stream module.
pub const NGINX: &str = "nginx stream";
/// Destination NAT by nftables.
pub const NFTABLES: &str = "nftables";

/// An edge of this project, by TC.
pub const NOHOP_TC: &str = "nohop, TC";
/// An edge of this project, by XDP.
pub const NOHOP_XDP: &str = "nohop, XDP";

/// All that can be compared on an edge: whether one can balance packets of any protocol, or connections only, is in
/// its protocols.
pub const EDGE_PEERS: [Peer; 7] = [
    PEERS[0],
    Peer {
        name: NOHOP_TC,
        protocols: &[Protocol::Http, Protocol::Udp],
        start: nohop::start_on_edge_by_tc,
        ..PEERS[1]
    },
    Peer {
        name: NOHOP_XDP,
        protocols: &[Protocol::Http, Protocol::Udp],
        start: nohop::start_on_edge_by_xdp,
        ..PEERS[1]
    },
    PEERS[2],
    // Of datagrams they make copies, which no packet rate is a measure of.
    Peer { protocols: &[Protocol::Http], ..PEERS[4] },
    Peer { protocols: &[Protocol::Http], ..PEERS[5] },
    Peer {
        config: "bench/peers/nftables-edge.nft",
        protocols: &[Protocol::Http, Protocol::Udp],
        start: nft_ipvs::start_nftables_on_edge,
        ..PEERS[7]
    },
];

/// All that can be compared, in the order in which rounds go through them.
pub const PEERS: [Peer; 9] = [
    Peer {
        name: DIRECT,
        config: "",
        protocols: &[Protocol::Tcp, Protocol::Http, Protocol::Udp],
        version: || Ok(String::new()),
        start: |_, services| {
            let addresses = match &services.services[..] {
                [only] => only.backends.clone(),
                many => many.iter().map(|service| service.backends[0]).collect(),
            };
            Ok(Running::new(addresses, vec![]))
        },
    },
    Peer {
        name: NOHOP,
        config: "bench/peers/nohop.toml",
        protocols: &[Protocol::Tcp, Protocol::Http, Protocol::Udp],
        version: nohop::version,
        start: nohop::start,
    },
    Peer {
        name: HAPROXY_TCP,
        config: "bench/peers/haproxy-tcp.cfg",
        protocols: &[Protocol::Tcp, Protocol::Http],
        version: haproxy::version,
        start: |node, services| haproxy::start(node, services, "haproxy-tcp.cfg"),
    },
    Peer {
        name: HAPROXY_HTTP,
        config: "bench/peers/haproxy-http.cfg",
        protocols: &[Protocol::Http],
        version: haproxy::version,
        start: |node, services| haproxy::start(node, services, "haproxy-http.cfg"),
    },
    Peer {
        name: NGINX,
        config: "bench/peers/nginx-stream.conf",
        protocols: &[Protocol::Tcp, Protocol::Http, Protocol::Udp],
        version: nginx::version,
        start: nginx::start,
    },
    Peer {
        name: ENVOY,
        config: "bench/peers/envoy.yaml",
        protocols: &[Protocol::Tcp, Protocol::Http, Protocol::Udp],
        version: envoy::version,
        start: envoy::start,
    },
    Peer {
        name: "Envoy mesh, mTLS",
        config: "bench/peers/envoy-client.yaml",
        protocols: &[Protocol::Tcp, Protocol::Http],
        version: envoy::version,
        start: envoy::start_mesh,
    },
    Peer {
        name: NFTABLES,
        config: "bench/peers/nftables.nft",
        protocols: &[Protocol::Tcp, Protocol::Http, Protocol::Udp],
        version: nft_ipvs::nftables_version,
        start: nft_ipvs::start_nftables,
    },
    Peer {
        name: "IPVS",
        config: "bench/peers/ipvs.rules",
        protocols: &[Protocol::Tcp, Protocol::Http, Protocol::Udp],
        version: nft_ipvs::ipvs_version,
        start: nft_ipvs::start_ipvs,
    },
];

impl Peer {
    /// Starts it on a node, and waits until it serves.
    ///
    /// # Errors
    /// When it can't; the message has its last words.
    pub fn start(&self, node: &Node, services: &Services) -> Result<Running> {
        (self.start)(node, services).with_context(|| format!("start {}", self.name))
    }

    /// Itself, as a report lists it.
    pub fn contender(&self) -> Contender {
        Contender::new(self.name, (self.version)(), self.config)
    }
}

/// Those who can serve this protocol, and the contenders' list, which says why others can't.
pub fn able(protocol: Protocol) -> (Vec<Peer>, Vec<Contender>) {
    able_of(&PEERS, protocol)
}

/// The same of these peers.
pub fn able_of(peers: &[Peer], protocol: Protocol) -> (Vec<Peer>, Vec<Contender>) {
    let mut able = Vec::new();
    let mut contenders = Vec::new();
    for &peer in peers {
        let mut contender = peer.contender();
        if contender.absent.is_none() && !peer.protocols.contains(&protocol) {
            contender.absent = Some("doesn't do what this suite measures".into());
        }
        if contender.absent.is_none() {
            able.push(peer);
        }
        contenders.push(contender);
    }
    (able, contenders)
}
